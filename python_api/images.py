"""Images: what a step expects of them, checked before anything changes."""

import torch
from torch import Tensor

from bld_ext.api.augment import SeededAugment
from bld_ext.reference import WHITE

MARGIN = 0.1  # outside of 0 to 1, as resizing with a bicubic filter overshoots
CHANNELS = (1, 3, 4)  # of a picture: grey, colour, colour with transparency


def check(images: Tensor, device: torch.device, augment: object) -> None:
    """Check type, device, shape and dtype, none of which waits for the device."""
    if images.device != device:
        raise ValueError(f"images: expected the model's device, {device}, got {images.device}")
    if images.dim() < 2 or len(images) == 0:
        raise ValueError(f"images: expected [B, ...] with B ≥ 1, got {tuple(images.shape)}")
    if augment is None and (white := WHITE.get(images.dtype)):
        raise ValueError(
            f"images: expected a float dtype where there is no augment, got {images.dtype}. Use "
            f"SeededAugment(), which takes it, or images.float() / {white}"
        )
    if isinstance(augment, SeededAugment) and (remedy := channels_come_last(images)):
        raise ValueError(f"images: expected [B, C, H, W], got {tuple(images.shape)}; {remedy}")


def channels_come_last(images: Tensor) -> str:
    """Return the remedy if the images look like pictures [B, H, W, C], else an empty string."""
    if images.dim() != 4 or images.shape[3] not in CHANNELS or min(images.shape[1:3]) <= 4:
        return ""
    return "where the channels come last, give images.permute(0, 3, 1, 2)"


def check_values(images: Tensor, augment: object) -> None:
    """Check the values; on an accelerator this waits for the device."""
    if not images.is_floating_point():
        return
    if not images.isfinite().all():
        bad = (~images.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
        raise ValueError(f"images: expected finite values, got nan or inf in images {bad}")
    if getattr(augment, "needs_unit_range", False):
        low, high = (x.item() for x in images.aminmax())
        if low < -MARGIN or high > 1 + MARGIN:
            remedy = "images / 255, or images as uint8"
            if low < 0:
                remedy = "images before they are normalised, and SeededAugment(mean=..., std=...)"
            raise ValueError(
                "images: expected values from 0 to 1, which the augment clamps to or normalises, "
                f"got {low:.4g} to {high:.4g}. Give {remedy}"
            )
