"""BLD on segmentation: two tasks of shapes to find in noise, made on the spot.

    python -m benchmarks.segmentation --seeds 0-4

The first task has discs and rings, the second squares and crosses; what is neither is
background, and the rim of each shape has no label, as in Pascal VOC. A small encoder and decoder
learns one task after the other, each image once, by finetuning (λ = 0) and by BLD, from the same
weights, images and views. Prints the mean IoU over the classes of each task, on 200 further images
and under the task's head, and writes results.json and segmentation.png.
"""

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from statistics import mean

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.paper.__main__ import parse_seeds, positive
from benchmarks.paper.checkpoint import one_line, write_whole
from benchmarks.paper.report import markdown, plus_minus, spread
from benchmarks.terminal import lenient
from benchmarks.views import check_output
from bld_ext import BLDOptimizer, MultiHead, SeededAugment

SIDE = 32  # pixels
RIM = 255  # the label of the rim of a shape
TEST_IMAGES = 200
CLASSES = (("background", "disc", "ring"), ("background", "square", "cross"))
COLOURS = [(40, 40, 40), (230, 120, 30), (60, 140, 230), (255, 255, 255)]  # of classes and the rim


# ---- the tasks ----


def inside(kind: str, x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    """Which pixels, at these places from the centre, are inside a shape of this radius."""
    distance = (x * x + y * y).sqrt()
    long, short = torch.maximum(x.abs(), y.abs()), torch.minimum(x.abs(), y.abs())
    return {
        "disc": distance < radius,
        "ring": (distance < radius) & (distance > 0.55 * radius),
        "square": long < 0.9 * radius,
        "cross": (long < radius) & (short < 0.3 * radius),
    }[kind]


def make_images(task: int, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return images `[N, 3, 32, 32]` uint8 and masks `[N, 32, 32]`: classes, or RIM."""

    def draw(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    ground = 0.15 + 0.3 * F.interpolate(draw(count, 3, 4, 4), SIDE, mode="bilinear")
    masks = torch.zeros(count, SIDE, SIDE, dtype=torch.int64)
    places = torch.arange(SIDE) + 0.5
    for number in (1, 2):
        for _ in range(2):
            centre, radius = 6 + 20 * draw(2, count, 1, 1), 4 + 3 * draw(count, 1, 1)
            x, y = places - centre[0], places.unsqueeze(1) - centre[1]
            turn = 0.5 * (draw(count, 1, 1) - 0.5)
            x, y = x * turn.cos() + y * turn.sin(), y * turn.cos() - x * turn.sin()
            shape, whole = (inside(CLASSES[task][number], x, y, radius + r) for r in (-0.5, 0.5))
            colour = 0.2 + 0.6 * draw(count, 3, 1, 1)
            ground = torch.where(whole.unsqueeze(1), colour, ground)
            masks = masks.masked_fill(whole, RIM).masked_fill(shape, number)
    noise = 0.08 * torch.randn(ground.shape, generator=generator)
    return (255 * (ground + noise).clamp(0, 1)).to(torch.uint8), masks


# ---- the network ----


class Backbone(nn.Module):
    """An encoder and a decoder with one connection between them: features of every pixel."""

    def __init__(self, width: int = 16):
        super().__init__()

        def block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
            convolution = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
            return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())

        self.fine = block(3, width)
        self.coarse = nn.Sequential(block(width, 2 * width, 2), block(2 * width, 2 * width, 2))
        self.joined = block(3 * width, width)

    def forward(self, images: Tensor) -> Tensor:
        fine = self.fine(images)
        coarse = F.interpolate(self.coarse(fine), scale_factor=4, mode="nearest")
        return self.joined(torch.cat((fine, coarse), 1))


def mean_iou(model: MultiHead, images: Tensor, masks: Tensor, task: int) -> float:
    """The mean over classes of intersection / union, over all labelled pixels of the images."""
    found, classes = predict(model, images, task), len(CLASSES[task])
    known = masks != RIM
    pairs = classes * masks[known] + found[known]
    table = torch.bincount(pairs, minlength=classes**2).view(classes, classes).double()
    both = table.diagonal()
    return (both / (table.sum(0) + table.sum(1) - both)).mean().item()


def predict(model: MultiHead, images: Tensor, task: int) -> Tensor:
    return torch.cat([model.predict(part.float() / 255, task) for part in images.split(50)])


def run(balance: float, seed: int, args: argparse.Namespace, tick) -> tuple[dict, MultiHead, list]:
    """Learn both tasks; return what came of it, the model and the test images."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    streams = [make_images(task, args.images, generator) for task in (0, 1)]
    tests = [make_images(task, TEST_IMAGES, generator) for task in (0, 1)]
    model = MultiHead(Backbone(), 16, head=partial(nn.Conv2d, kernel_size=1))
    augment = SeededAugment(flip=0.5, rotation=10, crop_padding=3, jitter=0.2)
    optimizer = BLDOptimizer(
        model, args.lr, balance=balance, views=args.views, views_per_pass=args.views,
        schedule="shared_forward", augment=augment, ignore_index=RIM,
    )  # fmt: skip
    iou = []
    for task, (images, masks) in enumerate(streams):
        model.add_head(len(CLASSES[task]))
        for batch in zip(images.split(args.batch), masks.split(args.batch), strict=True):
            optimizer.step(*batch)
            tick()
        if not all(p.isfinite().all() for p in model.parameters()):
            raise FloatingPointError(f"--lr: at {args.lr:g} the weights are not finite; lower it")
        iou.append([mean_iou(model, *tests[old], old) for old in range(task + 1)])
    return {"seed": seed, "balance": balance, "iou": iou}, model, tests


# ---- results ----


def table(records: dict[str, list[dict]]) -> str:
    rows = [["method", "task 1, just learned", "task 1, at the end", "task 2", "average"]]
    for name, found in records.items():
        columns = [
            [100 * r["iou"][0][0] for r in found],
            *([100 * r["iou"][1][task] for r in found] for task in (0, 1)),
            [100 * mean(r["iou"][1]) for r in found],
        ]
        rows.append([name, *(plus_minus(spread(values)) for values in columns)])
    return markdown(rows)


def coloured(masks: Tensor) -> Tensor:
    return torch.tensor(COLOURS, dtype=torch.uint8)[masks.clamp(max=len(COLOURS) - 1)]


def picture(models: dict[str, MultiHead], tests: list, path: Path, images: int = 3) -> None:
    """A row for each test image: the image, its mask and each model's prediction at the end."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    columns = ["image", "labels", *models]
    figure, axes = plt.subplots(
        2 * images, len(columns), figsize=(1.6 * len(columns), 3.2 * images), layout="constrained"
    )
    for axis in axes.flat:
        axis.set_xticks([]), axis.set_yticks([])
    for axis, title in zip(axes[0], columns, strict=True):
        axis.set_title(title)
    for task, (x, y) in enumerate(tests):
        shown = [x[:images].permute(0, 2, 3, 1), coloured(y[:images])]
        shown += [coloured(predict(model, x[:images], task)) for model in models.values()]
        for row in range(images):
            line = axes[task * images + row]
            line[0].set_ylabel(f"task {task + 1}")
            for axis, values in zip(line, shown, strict=True):
                axis.imshow(values[row].numpy())
    figure.savefig(path, dpi=100)
    plt.close(figure)


@lenient
def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=parse_seeds, default="0-4", help="(default: %(default)s)")
    parser.add_argument("--images", type=positive, default=1000, help="a task (%(default)s)")
    parser.add_argument("--batch", type=positive, default=10, help="(default: %(default)s)")
    parser.add_argument("--views", type=positive, default=4, help="(default: %(default)s)")
    parser.add_argument("--lr", type=float, default=4e-5, help="(default: %(default)s)")
    parser.add_argument("--balance", type=float, default=2, help="BLD's λ (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/segmentation"))
    args = parser.parse_args(arguments)
    balances = {"finetuning": 0.0, "BLD": args.balance}
    records: dict[str, list[dict]] = {name: [] for name in balances}
    models: dict[str, MultiHead] = {}
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        check_output(args.out / "segmentation.png")
        steps = 2 * len(args.seeds) * len(balances) * -(-args.images // args.batch)
        with tqdm(total=steps, unit="batch") as bar:
            for seed in args.seeds:
                for name, balance in balances.items():
                    record, models[name], tests = run(balance, seed, args, bar.update)
                    records[name].append(record)
        settings = {k: v for k, v in vars(args).items() if k != "out"}
        found = {"settings": settings, "torch": torch.__version__, "records": records}
        write_whole(args.out / "results.json", json.dumps(found, indent=1).encode())
        picture(models, tests, args.out / "segmentation.png")
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    print(
        f"mean IoU in percent; {args.images} images a task, {args.views} views, lr {args.lr:g}, "
        f"λ {args.balance:g}, seeds {args.seeds[0]} to {args.seeds[-1]}\n\n{table(records)}\n\n"
        f"wrote {args.out / 'results.json'} and {args.out / 'segmentation.png'}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
