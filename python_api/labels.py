"""Labels: what a step expects of them, and how they follow the views where they have positions."""

from collections.abc import Callable

import torch
from torch import Tensor

from bld_ext.api.augment import is_seeded, parameters_of
from bld_ext.checks import outside_classes
from bld_ext.reference import IGNORED


def check(labels: Tensor, images: Tensor, augment: object) -> None:
    """Check device, dtype and shape, none of which waits for the device."""
    if labels.device != images.device:
        expected = f"the model's device, {images.device}"
        raise ValueError(f"labels: expected {expected}, got {labels.device}")
    if labels.dtype != torch.int64:
        soft = labels.is_floating_point() and labels.dim() > 1
        remedy = "for one-hot or soft labels use labels.argmax(1)" if soft else "use labels.long()"
        raise ValueError(f"labels: expected torch.int64, got {labels.dtype}: {remedy}")
    if labels.dim() < 1 or len(labels) != len(images):
        shape = tuple(labels.shape)
        raise ValueError(f"labels: expected one for each of {len(images)} images, got {shape}")
    if must_move(labels, augment) and is_seeded(augment) and labels.shape[1:] != images.shape[2:]:
        raise ValueError(
            f"labels: expected one for each image, or one for each pixel of {list(images.shape)}, "
            f"got {list(labels.shape)}; of one-hot labels use labels.argmax(1)"
        )
    if must_move(labels, augment) and not takes_masks(augment):
        raise ValueError(
            f"labels: expected one for each image, got {list(labels.shape)}, which have positions. "
            "The augment moves these in the images but not in the labels. Use a SeededAugment, or "
            "an augment(images, ..., masks=) of your own that returns views and masks, or for one "
            "that moves nothing set augment.keeps_positions = True"
        )


def check_classes(labels: Tensor, classes: int, ignore_index: int) -> None:
    """Check the values; on an accelerator this waits for the device."""
    if outside := outside_classes(labels, classes, ignore_index):
        low, high = outside
        raise ValueError(
            f"labels: expected classes of the newest head, 0 to {classes - 1}, got {low} to {high}."
            " Number each task's classes from 0, and add the head before its first batch. What has "
            f"no class is labelled {ignore_index}; another number is set by ignore_index="
        )


def read(labels: Tensor, ignore_index: int) -> Tensor:
    """Return the labels with IGNORED for what has no class."""
    if ignore_index == IGNORED:
        return labels
    wrong = labels == IGNORED  # which the ops would ignore
    return labels.masked_fill(wrong, -1).masked_fill(labels == ignore_index, IGNORED)


def must_move(labels: Tensor, augment: object) -> bool:
    """Return whether labels have positions that the augmentation may move in the images."""
    has_positions = labels.numel() != len(labels)
    return has_positions and augment is not None and not getattr(augment, "keeps_positions", False)


def takes_masks(augment: Callable) -> bool:
    """Return whether it has an argument `masks`."""
    parameters = parameters_of(augment)
    return parameters is not None and "masks" in parameters.parameters


def moved(made: object, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return the views and the masks that an augmentation of the user's own returned."""
    pair = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    masks = pair[1]
    if not isinstance(masks, Tensor) or (masks.shape, masks.dtype) != (like.shape, like.dtype):
        got = f"{masks.dtype} {list(masks.shape)}" if isinstance(masks, Tensor) else "none"
        raise ValueError(
            f"augment: expected it to return (views, masks) with masks {like.dtype} "
            f"{list(like.shape)}, got {got}"
        )
    return pair


def match(labels: Tensor, logits: Tensor) -> None:
    """Require one label for each position of the logits."""
    if labels.shape[1:] == logits.shape[2:]:
        return
    expected = ", ".join(["B", *map(str, logits.shape[2:])])
    flat = logits.dim() == 2 and labels.numel() == len(labels)
    remedy = "; use labels.flatten()" if flat else ""
    raise ValueError(
        f"labels: expected [{expected}], one for each position of the logits, got "
        f"{['B', *labels.shape[1:]]}{remedy}".replace("'B'", "B")
    )
