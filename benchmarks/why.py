"""Follow runs batch by batch: what distillation does to a step, and a step to older tasks."""

import argparse
import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path
from statistics import mean, median

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.paper.__main__ import parse_methods, parse_seeds
from benchmarks.paper.checkpoint import write_whole
from benchmarks.paper.experiment import evaluate, evaluate_by_test_batch
from benchmarks.paper.methods import CPU, OWN, PRESETS, Settings, evaluating, make_learner
from benchmarks.paper.report import markdown, save
from benchmarks.paper.streams import Task, load_dataset, make_stream
from benchmarks.paper.variants import Combined, inner_products
from bld_ext import MultiHead, SeededAugment
from bld_ext.api.schedules import SCHEDULES

HELD_OUT = 200  # test images of each older task


class Watched(Combined):
    """BLD's own step, with G_d and dL_t/dθ held apart to be measured."""

    def __init__(self):
        self.seen: list[dict] | None = None  # of each joint repetition, while something listens

    def combine(self, layers, old, new):
        total = super().combine(layers, old, new)
        if self.seen is not None:
            pairs = {"dot": (old, new), "old": (old, old), "new": (new, new),
                     "step": (total, total)}  # fmt: skip
            found = {k: inner_products(layers, *pair).tolist() for k, pair in pairs.items()}
            self.seen.append(found)
        return total


SCHEDULES["watched"] = watched = Watched()


class Held:
    """Test images of the older tasks, and what the network says of them."""

    def __init__(self, tasks: list[Task]):
        self.images = [SeededAugment().plain(t.x_test[:HELD_OUT]) for t in tasks]
        self.labels = [t.y_test[:HELD_OUT] for t in tasks]

    def summary(self, model: MultiHead) -> dict[str, list[float]]:
        return summary(self.margins(model), self.labels)

    def margins(self, model: MultiHead) -> list[Tensor]:
        """Return for each task z_y - max z_c over the other classes c of each image, `[N]`."""
        with evaluating(model):
            logits = model(torch.cat(self.images))
        found, rows, column = [], 0, 0
        for labels, classes in zip(self.labels, model.head_sizes, strict=False):
            own = logits[rows : rows + len(labels), column : column + classes]
            right = own.gather(1, labels[:, None])
            others = own.scatter(1, labels[:, None], -torch.inf)
            found.append((right[:, 0] - others.max(1).values).double())
            rows, column = rows + len(labels), column + classes
        return found


def ranking(margins: Tensor, labels: Tensor) -> float:
    """Return the area under the ROC curve of two classes, in percent; nan for more classes.

    It is the share of pairs, one image of each class, whose logits stand in the right order: what
    the accuracy would be able to reach if an offset common to all images were taken off.
    """
    if labels.max() > 1:
        return float("nan")
    second, first = margins[labels == 1], -margins[labels == 0]
    return 100 * float((second[:, None] > first).double().mean())


def summary(margins: list[Tensor], labels: list[Tensor]) -> dict[str, list[float]]:
    """Return of each task accuracy and ranking, in percent, mean margin and logistic loss."""
    return {
        "ranking": [ranking(m, y) for m, y in zip(margins, labels, strict=True)],
        "accuracy": [100 * float((m > 0).double().mean()) for m in margins],
        "margin": [float(m.mean()) for m in margins],
        "loss": [float(torch.nn.functional.softplus(-m).mean()) for m in margins],
    }


def follow(dataset: str, root: str, method: str, settings: Settings, seed: int, every: int) -> dict:
    """Learn a stream as `benchmarks.paper` does, and measure every `every`-th batch."""
    torch.set_num_threads(1)
    stream = make_stream(load_dataset(dataset, root), settings.tasks, seed, settings.limit)
    torch.manual_seed(seed)
    distils = method in ("bld", "no-balancing")
    learner = make_learner(
        method, replace(settings, schedule="watched") if distils else settings, seed
    )
    model, optimizer, R = learner.model, learner.optimizer, settings.joint_steps
    record = {"method": method, "seed": seed, "batches": [], "accuracy": []}
    for number, task in enumerate(stream):
        torch.manual_seed(seed + 1000 * (number + 1))
        learner.begin(task)
        model.add_head(len(task.classes))
        held = Held(stream[:number]) if number else None
        for k, (where, images, labels) in enumerate(learner.batches(task, 0)):
            if held is None or k % every:
                learner.learn(where, images, labels)
                continue
            found = {"task": number, "batch": k, "held": [held.summary(model)]}
            watched.seen = []
            optimizer.warm_up(images, labels)
            bank = optimizer._batch.bank.double()
            entropy = -float(torch.xlogy(bank, bank).sum()) / settings.views
            for _ in range(R):
                optimizer.joint(images, labels)
                found["held"].append(held.summary(model))
            if distils:
                rate, optimizer.lr = optimizer.lr, 0.0  # to measure L_d after the last step
                optimizer.joint(images, labels)
                optimizer.lr = rate
                last = optimizer.last
                losses = [float(x) - entropy for x in last.distillation_loss]
                found["divergence"] = [x / len(images) for x in losses]
                found["factors"] = [f.tolist() for f in last.factors[:R]]
                found["products"] = watched.seen[:R]
                record["layers"] = list(last.layers)
            watched.seen = None
            optimizer.release()
            record["batches"].append(found)
        now = [evaluate(model, t, j) for j, t in enumerate(stream[: number + 1])]
        record["accuracy"].append(now)
    record["accuracy by test batch"] = evaluate_by_test_batch(model, stream)
    return record


# ---- what the records show ----


def table(records: list[dict]) -> str:
    """Format what one joint step after the other does, a row a method and repetition."""
    rows = [["method", "step", "KL to the bank, before", "after", "median factor",
             "cosine of G_d and G_t", "G_t left, median layer", "least layer", "length",
             "change of old loss"]]  # fmt: skip
    rows.append(["---", *["---:"] * (len(rows[0]) - 1)])
    for method in dict.fromkeys(r["method"] for r in records):
        batches = [b for r in records if r["method"] == method for b in r["batches"]]
        for step in range(len(batches[0]["held"]) - 1):
            cells = [method, str(step + 1)]
            if "divergence" in batches[0]:
                of = [measures(b, step) for b in batches]
                cells += [f"{median([b['divergence'][step + i] for b in batches]):.2g}"
                          for i in (0, 1)]  # fmt: skip
                cells += [f"{median([x[name] for x in of]):.3g}"
                          for name in ("factor", "cosine", "left", "least", "length")]  # fmt: skip
            else:
                cells += [""] * 7
            change = [
                mean(b["held"][step + 1]["loss"]) - mean(b["held"][step]["loss"]) for b in batches
            ]
            rows.append([*cells, f"{1e3 * mean(change):+.2f}e-3"])
    return markdown(rows)


def measures(batch: dict, step: int) -> dict[str, float]:
    """Return how G_d stands to dL_t/dθ in one joint step, over the layers that have both."""
    products, factors = batch["products"][step], batch["factors"][step]
    both = [i for i, f in enumerate(factors) if f > 0 and products["new"][i] > 0]
    dot, old, new = ([products[k][i] for i in both] for k in ("dot", "old", "new"))
    left = [1 + d / n for d, n in zip(dot, new, strict=True)]
    return {
        "factor": median([factors[i] for i in both]),
        "cosine": sum(dot) / (sum(old) * sum(new)) ** 0.5,
        "left": median(left),
        "least": min(left),
        "length": sum(products["step"]) ** 0.5,
    }


def along(records: list[dict], name: str) -> dict[int, float]:
    """Return the mean of a measure over older tasks and seeds, by the number of the batch."""
    found: dict[int, list[float]] = {}
    for record in records:
        length = 1 + max(b["batch"] for b in record["batches"])
        for batch in record["batches"]:
            number = (batch["task"] - 1) * length + batch["batch"]
            found.setdefault(number, []).append(mean(batch["held"][0][name]))
    return {number: mean(values) for number, values in sorted(found.items())}


def figure(records: list[dict], path: Path) -> None:
    """Draw what the two joint steps do to predictions and layers, and the older tasks' fate."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, (moved, left, fate) = plt.subplots(1, 3, figsize=(14, 4))
    for color, method in enumerate(dict.fromkeys(r["method"] for r in records)):
        own = [r for r in records if r["method"] == method]
        for name, style in (("accuracy", "-"), ("ranking", ":")):
            points = along(own, name)
            fate.plot([*points], [*points.values()], style, color=f"C{color}",
                      label=f"{method}, {name}")  # fmt: skip
        batches = [b for r in own for b in r["batches"] if "divergence" in b]
        if not batches:
            continue
        after = [median(b["divergence"][i] for b in batches) for i in range(3)]
        moved.plot(["warm-up", "first", "second"], after, marker="o", color=f"C{color}",
                   label=method)  # fmt: skip
        names = [n for n in own[0]["layers"] if not n.startswith("heads")]
        for step, style in enumerate(("-", "--")):
            shares = [
                median(
                    1 + b["products"][step]["dot"][i] / b["products"][step]["new"][i]
                    for b in batches
                )
                for i in range(len(names))
            ]
            left.plot(range(len(names)), shares, style, color=f"C{color}",
                      label=f"{method}, {('first', 'second')[step]}")  # fmt: skip
    moved.set(yscale="log", title="KL divergence from the bank", ylabel="an image, median",
              xlabel="after the step")  # fmt: skip
    left.set(title="share of the step along dL_t/dθ, median", xlabel="layer, from the input")
    left.axhline(0, color="gray", lw=0.8)
    fate.set(title="older tasks, held-out images", ylabel="percent", xlabel="batches after task 0")
    for ax in (moved, left, fate):
        ax.legend(fontsize=7)
        ax.grid(alpha=0.3)
    fig.tight_layout()
    save(fig, path, 110)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.why", description=__doc__)
    add = parser.add_argument
    add("--dataset", default="digits", help="as in benchmarks.paper (default: digits)")
    add("--preset", choices=["paper", "cpu"], default="cpu", help="as in benchmarks.paper")
    add("--methods", type=parse_methods, default=["finetune", "bld", "no-balancing"])
    add("--seeds", type=parse_seeds, default=list(range(10)))
    add("--lr", type=float, help="learning rate of the joint updates")
    add("--limit", type=int, help="training images a task (default: all)")
    add("--every", type=int, default=1, help="measure each batch of so many (default: 1)")
    add("--data", default="data", help="folder of downloaded datasets (default: data)")
    add("--out", type=Path, default=Path("runs/why"), help="folder for why.json and why.png")
    args = parser.parse_args(argv)
    settings = PRESETS.get(args.dataset, OWN)
    if args.dataset != "digits" and args.preset == "cpu":
        settings = replace(settings, **CPU)
    settings = replace(settings, limit=args.limit, lr=args.lr or settings.lr)
    args.out.mkdir(parents=True, exist_ok=True)
    runs = [(args.dataset, args.data, m, settings, s, args.every)
            for s in args.seeds for m in args.methods]  # fmt: skip
    records = []
    for record in tqdm(itertools.starmap(follow, runs), total=len(runs), unit="run"):
        records.append(record)
        found = {"settings": settings.as_dict(), "runs": records}
        write_whole(args.out / "why.json", json.dumps(found).encode())
    text = table(records)
    write_whole(args.out / "why.md", f"{text}\n".encode())
    figure(records, args.out / "why.png")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
