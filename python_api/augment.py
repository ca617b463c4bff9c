"""SeededAugment: random views that are regenerated instead of stored."""

from collections.abc import Sequence
from numbers import Integral, Real

import torch
from torch import Tensor

from bld_ext import checks, ops
from bld_ext.reference import Policy, ViewParameters


def _plain(setting: object) -> object:
    """As plain Python numbers, where it is numbers; else as it is, to be refused."""
    if isinstance(setting, (tuple, list)):
        return tuple(map(_plain, setting))
    if isinstance(setting, Real):
        return int(setting) if isinstance(setting, Integral) else float(setting)
    return setting


class SeededAugment:
    """Views of images as a pure function of (seed, step, view, image index); nothing is stored.

    Crop, flip and affine map are one inverse matrix and one resample; then follow brightness,
    contrast, saturation, hue, normalisation and erasing. The semantics of each step are
    torchvision's. Paper: section 3.5 of Fini et al., ECCV 2020.

    Args:
        crop_padding: pixels around the image; a crop of the image's size is taken from what is then
            there. In whole pixels, as all crops.
        flip: probability of a horizontal flip, 0 to 1.
        rotation: degrees; the angle is uniform in ± this, 0 to 180.
        scale: a range of zoom factors, such as (0.9, 1.1).
        jitter: sets brightness, contrast and saturation to this, and hue to a quarter of it (the
            proportions of SimCLR), where they are not given themselves.
        brightness, contrast, saturation: the factor is uniform in 1 ± this, 0 to 1.
        hue: turns of the colour wheel, uniform in ± this, 0 to 0.5.
        mean, std: one number a channel of images in [0, 1]; both or none.
        translate: shares of width and height, such as (0.1, 0.1); uniform in ± these.
        shear: degrees along x and along y, such as (10, 10); uniform in ± these, 0 to 80.
        resized_crop: a range of shares of the image's area, such as (0.08, 1): a rectangle of such
            an area is resized to the size of the image, and what does not fit into it is cut.
        resized_crop_ratio: a range of its width / height, uniform in the logarithm.
        erase: probability that a rectangle of the view is set to 0, the mean where it is
            normalised (random erasing, cutout).
        erase_area, erase_ratio: ranges of its share of the area and of its width / height.
        interpolation: "bilinear", or "nearest" to the middle of a pixel: with a resized crop this
            is torchvision's "nearest-exact".
        padding_mode: what is outside of the image: "zeros", "reflect" (the border pixel once) or
            "edge".
        dtype: of the views.
        channels_last: memory format of the views.

    Raises:
        ValueError: a setting is not as described.

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
        *,
        translate: tuple[float, float] = (0, 0),
        shear: tuple[float, float] = (0, 0),
        resized_crop: tuple[float, float] | None = None,
        resized_crop_ratio: tuple[float, float] = (3 / 4, 4 / 3),
        erase: float = 0,
        erase_area: tuple[float, float] = (0.02, 0.33),
        erase_ratio: tuple[float, float] = (0.3, 3.3),
        interpolation: str = "bilinear",
        padding_mode: str = "zeros",
    ):
        known = isinstance(jitter, Real) and 0 <= jitter <= 1
        checks.require(known, "jitter", "0 to 1", jitter)
        checks.require((mean is None) == (std is None), "mean, std", "both or none", (mean, std))
        checks.require(dtype in checks.FLOATS, "dtype", "a floating-point dtype", dtype)

        colour = [jitter if x is None else x for x in (brightness, contrast, saturation)]
        settings = (
            crop_padding, resized_crop, resized_crop_ratio, flip, rotation, translate, scale, shear,
            *colour, jitter / 4 if hue is None else hue, () if mean is None else mean,
            () if std is None else std, erase, erase_area,
            erase_ratio, interpolation, padding_mode,
        )  # fmt: skip
        self.policy = Policy(*map(_plain, settings))
        checks.policy(self.policy, prefix="")
        self.dtype = dtype
        self.channels_last = channels_last

    @property
    def needs_unit_range(self) -> bool:
        """Whether images have to lie in 0 to 1, to which changes of colour clamp them."""
        policy = self.policy
        return any((policy.brightness, policy.contrast, policy.saturation, policy.hue))

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
        self,
        *,
        seed: int | Tensor,
        step: int | Tensor,
        views: Sequence[int],
        indices: Tensor,
        size: tuple[int, int],
    ) -> ViewParameters:
        """What is drawn for the images `indices` [N] of `size` (H, W), each field `[V, N]`."""
        return ops.view_parameters(self.policy, seed, step, views, indices, size)

    def __repr__(self) -> str:
        given = self.policy._asdict() | {"dtype": self.dtype, "channels_last": self.channels_last}
        default = Policy()._asdict() | {"dtype": torch.float32, "channels_last": False}
        shown = (f"{k}={v!r}" for k, v in given.items() if v != default[k])
        return f"SeededAugment({', '.join(shown)})"
