"""Draws images, their views, and the same views made again: `python -m benchmarks.views`.

Each image has a row of its views, and a second row of the same views, made again one at a time in
reversed order. The command prints the largest difference between the two, and fails unless it is 0.
"""

import argparse
import io
import sys
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from sklearn.datasets import load_digits
from torch import Tensor
from torchvision.transforms.v2.functional import center_crop, pil_to_tensor, resize

from benchmarks.paper.checkpoint import one_line
from benchmarks.terminal import lenient
from bld_ext import SeededAugment

STEP = 0
AUGMENT = SeededAugment(crop_padding=4, rotation=15, jitter=0.3)


def digits(count: int, size: int) -> Tensor:  # [N, 3, size, size], uint8
    pixels = torch.from_numpy(load_digits().images[:count]).float() / 16 * 255
    return resize(pixels.unsqueeze(1).round().byte().repeat(1, 3, 1, 1), [size, size])


def folder(path: Path, count: int, size: int) -> Tensor:  # [N, 3, size, size], uint8
    found = []
    for file in sorted(path.iterdir()) if path.is_dir() else ():
        if len(found) < count and file.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"):
            try:
                image, transparent = decode(file)
            except Exception as error:  # Pillow raises many classes of errors for a damaged file
                print(f"{file} is left out: {one_line(error)}", file=sys.stderr)
                continue
            if transparent:
                print(f"{file}: its transparency is left out", file=sys.stderr)
            found.append(center_crop(resize(image, [size]), [size, size]))
    if not found:
        raise ValueError(
            f"--dataset: expected 'digits' or a folder with .png, .jpg or .webp images, got {path}"
        )
    return torch.stack(found)


def decode(file: Path) -> tuple[Tensor, bool]:
    """Return an image upright as [3, H, W] uint8, and whether it had transparency, now left out."""
    with Image.open(file) as opened:
        image = ImageOps.exif_transpose(opened)
        transparent = "A" in image.getbands() or "transparency" in image.info
        if image.mode.startswith("I"):  # gray of 16 bits, which convert() would clip to 8
            gray = np.rint(np.asarray(image) * (255 / 65535)).astype(np.uint8)
            return torch.from_numpy(gray).expand(3, -1, -1), transparent
        if transparent:
            image = image.convert("RGBA")
        return pil_to_tensor(image.convert("RGB")), transparent


def views_twice(augment, images: Tensor, seed: int, views: int) -> tuple[Tensor, Tensor]:
    """Return views [V, N, C, H, W] from one call, and again from V·N calls in reversed order."""
    made = augment(images, seed=seed, step=STEP, views=range(views)).unflatten(0, (views, -1))
    again = torch.full_like(made, torch.nan)
    for v in reversed(range(views)):
        for n in reversed(range(len(images))):
            index = torch.tensor([n])
            again[v, n] = augment(images[index], seed=seed, step=STEP, views=[v], indices=index)[0]
    return made, again


def draw(images: Tensor, made: Tensor, again: Tensor, difference: float, path: Path) -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    V, N = made.shape[:2]
    figure, axes = plt.subplots(
        2 * N, V + 1, figsize=(0.9 * (V + 1), 1.85 * N + 0.5), squeeze=False, layout="constrained"
    )
    for axis in axes.flat:
        axis.set_axis_off()
    for n in range(N):
        axes[2 * n, 0].imshow(images[n].permute(1, 2, 0))
        axes[2 * n + 1, 0].text(1, 0.5, "made again", ha="right", va="center", fontsize=8)
        for v in range(V):
            axes[2 * n, v + 1].imshow(made[v, n].permute(1, 2, 0))
            axes[2 * n + 1, v + 1].imshow(again[v, n].permute(1, 2, 0))
    for v, title in enumerate(["image", *(f"view {v}" for v in range(V))]):
        axes[0, v].set_title(title, fontsize=8)
    figure.suptitle(f"maximum difference {difference:g}", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def check_output(path: Path) -> None:
    """Raise ValueError unless a figure can be written as a file of this name."""
    if path.is_dir():
        raise ValueError(f"--out: {path} is a folder; give the name of a file such as views.png")
    try:
        Figure().savefig(io.BytesIO(), format=path.suffix[1:] or "none")
    except Exception as error:  # some formats need programs that may be missing
        raise ValueError(
            f"--out: expected a name that ends in .png, .pdf or another format of matplotlib, got "
            f"{path} ({one_line(error)}); give another --out"
        ) from error


@lenient
def main(arguments: list[str] | None = None, augment=AUGMENT) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="digits", help="digits, or a folder of images")
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--views", type=int, default=8)
    parser.add_argument("--size", type=int, default=32, help="pixels of a side")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/views.png"))
    options = parser.parse_args(arguments)
    for name in ("images", "views", "size"):
        if getattr(options, name) < 1:
            parser.error(f"--{name}: expected at least 1, got {getattr(options, name)}")
    if options.seed < 0:
        parser.error(f"--seed: expected at least 0, got {options.seed}")
    try:
        return make_sheet(options, augment)
    except (ValueError, OSError, MemoryError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2


def make_sheet(options: argparse.Namespace, augment) -> int:
    check_output(options.out)
    if options.dataset == "digits":
        images = digits(options.images, options.size)
    else:
        images = folder(Path(options.dataset), options.images, options.size)
    made, again = views_twice(augment, images, options.seed, options.views)
    difference = (made - again).abs().max().item()
    draw(images, made, again, difference, options.out)
    print(f"{augment}\n{made.shape[0]} views of {made.shape[1]} images: {options.out}")
    print(f"stored: 0 bytes an image, 16 bytes a batch (seed and step)\n{difference=:g}")
    return 0 if difference == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
