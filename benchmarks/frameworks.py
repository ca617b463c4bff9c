"""BLD in other people's frameworks, each with its own benchmark, loop and metrics.

    python -m benchmarks.frameworks avalanche   # needs pip install -e ".[avalanche]"
    python -m benchmarks.frameworks capymoa     # needs pip install -e ".[capymoa]" and Java

Both learn MNIST in five tasks of two classes, each image once, by BLD and by finetuning (λ = 0).
"""

import argparse
import sys
from importlib import metadata
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset

from benchmarks.terminal import lenient
from bld_ext import BLDOptimizer, MultiHead, SeededAugment

BATCH = 20  # images, as in the paper
BALANCES = {"BLD": 2.0, "finetuning": 0.0}


def learner(balance: float, lr: float, views: int) -> tuple[MultiHead, BLDOptimizer]:
    torch.manual_seed(0)
    backbone = nn.Sequential(
        nn.Conv2d(1, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(),
    )  # fmt: skip
    model = MultiHead(backbone, 128)
    augment = SeededAugment(crop_padding=2, rotation=15)
    options = dict(views=views, views_per_pass=views, schedule="shared_forward", augment=augment)
    return model, BLDOptimizer(model, lr, balance=balance, **options)


def some(dataset: Dataset, count: int) -> list[int]:
    """The numbers of some images; Avalanche has them class by class."""
    generator = torch.Generator().manual_seed(0)
    return torch.randperm(len(dataset), generator=generator)[:count].tolist()


def avalanche(root: Path, balance: float, args: argparse.Namespace) -> dict[str, float]:
    from avalanche.benchmarks.classic import SplitMNIST
    from avalanche.evaluation.metrics import accuracy_metrics, forgetting_metrics
    from avalanche.training.plugins import EvaluationPlugin

    from bld_ext.api.avalanche import BLD

    benchmark = SplitMNIST(
        5, seed=0, class_ids_from_zero_in_each_exp=True, return_task_id=True, dataset_root=root
    )
    model, optimizer = learner(balance, args.lr, args.views)
    metrics = (accuracy_metrics(experience=True, stream=True), forgetting_metrics(stream=True))
    strategy = BLD(
        model=model,
        optimizer=optimizer,
        train_mb_size=BATCH,
        eval_mb_size=500,
        evaluator=EvaluationPlugin(*metrics),
    )
    found: dict[str, float] = {}
    for experience in benchmark.train_stream:
        if args.limit:
            experience.dataset = experience.dataset.subset(some(experience.dataset, args.limit))
        strategy.train(experience)
        found = strategy.eval(benchmark.test_stream)
    return found


def capymoa(root: Path, balance: float, args: argparse.Namespace) -> dict[str, float]:
    from capymoa.ocl.datasets import SplitMNIST
    from capymoa.ocl.evaluation import ocl_train_eval_loop

    from bld_ext.api.capymoa import BLD

    scenario = SplitMNIST(directory=root, auto_download=False)
    model, optimizer = learner(balance, args.lr, args.views)
    bld = BLD(scenario.schema, model, optimizer, scenario.task_schedule)
    streams = scenario.train_loaders(BATCH)
    if args.limit:
        streams = [
            DataLoader(Subset(stream.dataset, some(stream.dataset, args.limit)), BATCH)
            for stream in streams
        ]
    results = ocl_train_eval_loop(bld, streams, scenario.test_loaders(500))
    names = ("accuracy_final", "accuracy_seen_avg", "backward_transfer", "forward_transfer")
    found = {name: getattr(results, name) for name in names}
    found["ttt.accuracy"] = results.ttt.cumulative.accuracy() / 100
    for number, accuracy in enumerate(results.accuracy_matrix[-1]):
        found[f"accuracy_matrix[-1][{number}]"] = float(accuracy)
    return found


@lenient
def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("framework", choices=["avalanche", "capymoa"])
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder with MNIST")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--views", type=int, default=4)
    parser.add_argument("--limit", type=int, help="images a task; default all")
    args = parser.parse_args()
    package = {"avalanche": "avalanche-lib"}.get(args.framework, args.framework)
    try:
        version = metadata.version(package)
    except metadata.PackageNotFoundError:
        print(
            f'error: {package} is not installed: pip install "bld_ext[{args.framework}]"',
            file=sys.stderr,
        )
        return 2
    print(
        f"{package} {version}, torch {torch.__version__}, MNIST in 5 tasks, batches of {BATCH}, "
        f"{args.views} views, lr {args.lr:g}, {args.limit or 'all'} images a task"
    )
    run = {"avalanche": avalanche, "capymoa": capymoa}[args.framework]
    for name, balance in BALANCES.items():
        print(f"\n{name}, balance={balance:g}", flush=True)
        for metric, value in run(args.data, balance, args).items():
            print(f"  {metric} = {value:.4f}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
