"""SeededAugment: random views that are regenerated instead of stored."""

from collections.abc import Sequence

import torch
from torch import Tensor

from bld_ext import ops
from bld_ext.checks import POLICY
from bld_ext.reference import Policy, ViewParameters


class SeededAugment:
    """Views of images as a pure function of (seed, step, view, image index); nothing is stored.

    Order: crop from the zero-padded image, horizontal flip, rotation and scale about the centre
    (one matrix, one bilinear resample, zeros outside), brightness, contrast, saturation, hue,
    normalisation. The semantics of each step are torchvision's. Paper: section 3.5 of Fini et al.,
    ECCV 2020.

    Args:
        crop_padding: pixels of zero padding around the image a crop of its size is taken from.
        flip: probability of a horizontal flip, 0 to 1.
        rotation: degrees; the angle is uniform in ± this, 0 to 180.
        scale: a range of zoom factors, such as (0.9, 1.1).
        jitter: sets brightness, contrast and saturation to this, and hue to a quarter of it (the
            proportions of SimCLR), where they are not given themselves.
        brightness, contrast, saturation: the factor is uniform in 1 ± this, 0 to 1.
        hue: turns of the colour wheel, uniform in ± this, 0 to 0.5.
        mean, std: one number a channel of images in [0, 1]; both or none.
        dtype: of the views.
        channels_last: memory format of the views.

    Example:
        augment = SeededAugment(crop_padding=4, rotation=15, jitter=0.2)
        views = augment(images, seed=0, step=7, views=range(50))  # [50·N, C, H, W]
    """

    def __init__(
        self,
        crop_padding: int = 0,
        flip: float = 0,
        rotation: float = 0,
        scale: tuple[float, float] = (1, 1),
        jitter: float = 0,
        brightness: float | None = None,
        contrast: float | None = None,
        saturation: float | None = None,
        hue: float | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        dtype: torch.dtype = torch.float32,
        channels_last: bool = False,
    ):
        if not 0 <= crop_padding <= 2**20 or crop_padding != int(crop_padding):
            raise ValueError(f"crop_padding: expected whole pixels, 0 or more, got {crop_padding}")
        if (mean is None) != (std is None) or len(mean or ()) != len(std or ()):
            raise ValueError(f"mean, std: expected both, one number a channel, got {mean}, {std}")
        if any(s <= 0 for s in std or ()):
            raise ValueError(f"std: expected positive numbers, got {std}")
        color = {"brightness": brightness, "contrast": contrast, "saturation": saturation}
        color = {name: jitter if value is None else value for name, value in color.items()}
        hue = jitter / 4 if hue is None else hue
        ranges = {"flip": flip, "jitter": jitter, "rotation": rotation, "hue": hue, **color}
        for name, value in ranges.items():
            high = POLICY.get(name, 1)
            if isinstance(value, (tuple, list)) or not 0 <= value <= high:
                raise ValueError(f"{name}: expected 0 to {high}, got {value}")
        low, high = scale
        if not 1e-3 <= low <= high <= 1e3:
            raise ValueError(f"scale: expected (low, high) within 0.001 to 1000, got {scale}")
        self.policy = Policy(
            int(crop_padding), flip, rotation, low, high, **color, hue=hue,
            mean=tuple(mean or ()), std=tuple(std or ()),
        )  # fmt: skip
        self.dtype = dtype
        self.channels_last = channels_last

    def __call__(
        self,
        images: Tensor,
        *,
        seed: int | Tensor,
        step: int | Tensor,
        views: Sequence[int],
        indices: Tensor | None = None,
    ) -> Tensor:
        """Views of `images`, `[V·N, C, H, W]` view by view; see `bld_ext.ops.augment`."""
        return ops.augment(
            images, self.policy, seed, step, views, indices, self.dtype, self.channels_last
        )

    def parameters(
        self, *, seed: int | Tensor, step: int | Tensor, views: Sequence[int], indices: Tensor
    ) -> ViewParameters:
        """What is drawn for the images `indices` [N] in these views, each field `[V, N]`."""
        return ops.view_parameters(self.policy, seed, step, views, indices)

    def __repr__(self) -> str:
        given = self.policy._asdict()
        given["scale"] = (given.pop("scale_min"), given.pop("scale_max"))
        given |= {"dtype": self.dtype, "channels_last": self.channels_last}
        default = Policy()._asdict() | {
            "scale": (1, 1), "dtype": torch.float32, "channels_last": False,
        }  # fmt: skip
        shown = (f"{k}={v!r}" for k, v in given.items() if v != default[k])
        return f"SeededAugment({', '.join(shown)})"
