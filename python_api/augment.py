"""SeededAugment: random views that are regenerated instead of stored."""

import inspect
from collections.abc import Callable, Sequence
from numbers import Integral, Real

import torch
from torch import Tensor, nn

from bld_ext import checks, ops
from bld_ext.reference import IGNORED, Policy, ViewParameters


def _plain(setting: object) -> object:
    """Convert numbers to plain Python ones; leave anything else to be refused by the checks."""
    if isinstance(setting, (tuple, list)):
        return tuple(map(_plain, setting))
    if isinstance(setting, Real):
        return int(setting) if isinstance(setting, Integral) else float(setting)
    return setting


class SeededAugment:
    """Random views of images, each a pure function of (seed, step, view, image index).

    The views can be made again at any time, so none is stored. Crop, flip and affine map are
    combined into one inverse matrix and one resampling; then follow brightness, contrast,
    saturation, hue, normalisation and erasing. Each operation is defined as in torchvision. Paper:
    section 3.5 of Fini et al., ECCV 2020.

    Args:
        crop_padding: pixels added on each side of the image, from which a crop of the image's size
            is then taken. All crops are in whole pixels.
        flip: probability of a horizontal flip, 0 to 1.
        rotation: degrees, 0 to 180; the angle is uniform in ± this.
        scale: range of zoom factors, such as (0.9, 1.1).
        jitter: 0 to 1; the default of brightness, contrast and saturation, and four times that of
            hue (the proportions of SimCLR).
        brightness, contrast, saturation: 0 to 1; the factor is uniform in 1 ± this.
        hue: turns of the colour wheel, 0 to 0.5; the shift is uniform in ± this.
        mean, std: one number for each channel of images in [0, 1], for normalisation. Give both or
            neither.
        translate: fractions of width and height, such as (0.1, 0.1); shifts are uniform in ± these.
        shear: degrees along x and y, 0 to 80, such as (10, 10); angles are uniform in ± these.
        resized_crop: range of the crop's fraction of the image's area, such as (0.08, 1). A
            rectangle of that area is resized to the size of the image; one that is wider or higher
            than the image is first cut to it.
        resized_crop_ratio: range of the crop's width / height, uniform in the logarithm.
        erase: probability that a rectangle of the view is set to 0, which is the mean of normalised
            views (random erasing, cutout).
        erase_area, erase_ratio: ranges of the rectangle's fraction of the area and of its
            width / height.
        interpolation: "bilinear", or "nearest", which takes the pixel with the nearest centre. With
            a resized crop that is torchvision's "nearest-exact".
        padding_mode: what lies outside the image: "zeros", "reflect" (without repeating the border
            pixel) or "edge".
        dtype: dtype of the views.
        channels_last: whether the views are in torch.channels_last.

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
        unit = all(0 <= x <= 1 for x in self.policy.mean)
        expected = "values from 0 to 1, as images have before they are normalised: divide by 255"
        checks.require(unit, "mean", expected, mean)
        self._geometry = self.policy.geometry_alone()
        self.dtype = dtype
        self.channels_last = channels_last

    def plain(self, images: Tensor) -> Tensor:
        """Return the images as the network sees them, without a random change: for evaluation.

        They are in `dtype` and from 0 to 1, or normalised by `mean` and `std`, `[N, C, H, W]`.
        """
        policy = Policy(mean=self.policy.mean, std=self.policy.std)
        return ops.augment(images, policy, 0, 0, [0], None, self.dtype, self.channels_last)

    @property
    def keeps_positions(self) -> bool:
        """Whether each pixel stays where it is, so that labels of pixels fit the views."""
        return is_seeded(self) and self.policy.geometry() == Policy().geometry()

    @property
    def needs_unit_range(self) -> bool:
        """Whether images have to lie in 0 to 1, since they are clamped to that or normalised."""
        policy = self.policy
        colours = (policy.brightness, policy.contrast, policy.saturation, policy.hue)
        return any(colours) or bool(policy.mean)

    def __call__(
        self,
        images: Tensor,
        *,
        seed: int | Tensor,
        step: int | Tensor,
        views: Sequence[int],
        indices: Tensor | None = None,
        masks: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return views of `images`, `[V·N, C, H, W]`, view by view; see `bld_ext.ops.augment`.

        With `masks`, `[N, H, W]` int64, the labels of the images' pixels, also return those of the
        views' pixels, `[V·N, H, W]`. They are moved as the images are, each pixel taking the label
        nearest to its centre; labels are exact from -100 to 2**24. Pixels from outside the image
        have the label -100, which losses ignore, unless `padding_mode` fills them. Erasing leaves
        labels as they are.
        """
        made = ops.augment(
            images, self.policy, seed, step, views, indices, self.dtype, self.channels_last
        )
        if masks is None:
            return made
        return made, self._moved(masks, images, seed, step, views, indices)

    def _moved(self, masks: Tensor, images: Tensor, *where) -> Tensor:
        """The masks go through the same geometry as float32 images, where 0 is what is outside."""
        size = [len(images), *images.shape[2:]]
        if not isinstance(masks, Tensor) or masks.dtype != torch.int64:
            got = masks.dtype if isinstance(masks, Tensor) else type(masks).__name__
            raise ValueError(f"masks: expected torch.int64, got {got}; use masks.long()")
        if list(masks.shape) != size:
            raise ValueError(
                f"masks: expected {size}, a label for each pixel of the images, got "
                f"{list(masks.shape)}"
            )
        shift = 1 - IGNORED
        moved = ops.augment((masks + shift).unsqueeze(1).float(), self._geometry, *where)
        moved = moved.squeeze(1).long() - shift
        return moved.masked_fill(moved == -shift, IGNORED)

    def parameters(
        self,
        *,
        seed: int | Tensor,
        step: int | Tensor,
        views: Sequence[int],
        indices: Tensor,
        size: tuple[int, int],
    ) -> ViewParameters:
        """Return what is drawn for images `indices` [N] of `size` (H, W); fields are `[V, N]`."""
        return ops.view_parameters(self.policy, seed, step, views, indices, size)

    def __repr__(self) -> str:
        given = self.policy._asdict() | {"dtype": self.dtype, "channels_last": self.channels_last}
        default = Policy()._asdict() | {"dtype": torch.float32, "channels_last": False}
        shown = (f"{k}={v!r}" for k, v in given.items() if v != default[k])
        return f"SeededAugment({', '.join(shown)})"


def is_seeded(augment: object) -> bool:
    """Return whether its views are SeededAugment's own, and not those of a subclass."""
    return isinstance(augment, SeededAugment) and type(augment).__call__ is SeededAugment.__call__


def parameters_of(augment: Callable) -> inspect.Signature | None:
    """Return what an augmentation takes, or None where that cannot be known."""
    try:
        return inspect.signature(augment.forward if isinstance(augment, nn.Module) else augment)
    except (TypeError, ValueError):  # as of a callable written in C
        return None
