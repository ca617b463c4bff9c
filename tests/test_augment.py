"""SeededAugment: torchvision's pictures, from uniform parameters, with the same bits everywhere."""

import itertools
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import EVERYTHING
from scipy import stats
from torch._dynamo.testing import CompileCounter
from torch.library import opcheck
from torchvision.transforms.v2 import functional as tv

from bld_ext import SeededAugment, backend, ops, reference

LEVEL = 1 / 255  # also of pictures of noise, whose points are rounded to 1/256 pixel
FIVE_SIGMA = 2 * stats.norm.sf(5)
VIEWS = range(6)
COORDINATES = dict(seed=2**40 + 3, step=7, views=VIEWS)


def make_images(N=5, C=3, H=11, W=8, dtype=torch.uint8):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (N, C, H, W), generator=generator, dtype=torch.uint8)
    if dtype == torch.uint16:
        return (images.int() * 257 - 99).clamp(0).to(dtype)
    return images if dtype == torch.uint8 else (images.double() / 255).to(dtype)


def draws(augment, images):
    """For each view of each image: the picture, the image in [0, 1], and what was drawn for it."""
    indices, size = torch.arange(len(images)), images.shape[2:]
    drawn = augment.parameters(**COORDINATES, indices=indices, size=size)
    pictures = augment(images, **COORDINATES).unflatten(0, (len(VIEWS), len(images)))
    for v, n in itertools.product(range(len(VIEWS)), range(len(images))):
        yield pictures[v, n], images[n].float() / 255, type(drawn)(*(f[v, n].item() for f in drawn))


def assert_pictures(augment, expected, atol, images=None):
    for picture, image, drawn in draws(augment, make_images() if images is None else images):
        torch.testing.assert_close(picture, expected(image, drawn), rtol=0, atol=atol)


def test_no_policy_returns_the_images():
    images = make_images()
    views = SeededAugment()(images, **COORDINATES)
    assert torch.equal(views, (images / 255).repeat(len(VIEWS), 1, 1, 1))
    floats = make_images(dtype=torch.float64)
    assert torch.equal(
        SeededAugment(dtype=torch.float64)(floats, seed=0, step=0, views=[3]), floats
    )


@pytest.mark.parametrize("padding", [1, 4, 20], ids=["1", "4", "more-than-the-image"])
@pytest.mark.parametrize("mode", ["zeros", "edge", "reflect"])
def test_crop_is_exact(padding, mode):
    def crop(image, drawn):
        if mode == "zeros":
            image = tv.pad(image, padding)
        else:  # torchvision reflects once only; numpy as often as it takes
            around = ((0, 0), (padding, padding), (padding, padding))
            image = torch.from_numpy(np.pad(image.numpy(), around, mode))
        return tv.crop(image, drawn.top, drawn.left, drawn.height, drawn.width)

    assert_pictures(SeededAugment(crop_padding=padding, padding_mode=mode), crop, atol=0)


@pytest.mark.parametrize("width", [8, 9], ids=["even", "odd"])
def test_flip_is_exact(width):
    def flip(image, drawn):
        return tv.horizontal_flip(image) if drawn.flip else image

    assert_pictures(SeededAugment(flip=0.5), flip, 0, make_images(W=width))
    assert_pictures(SeededAugment(flip=1), lambda image, _: image.flip(2), 0)


def affine(image, drawn, interpolation="bilinear"):
    translate, shear = (
        [drawn.translate_x, drawn.translate_y],
        [drawn.shear_x, drawn.shear_y],
    )
    mode = tv.InterpolationMode(interpolation)
    return tv.affine(image, drawn.angle, translate, drawn.scale, shear, interpolation=mode)


AFFINE = {
    "rotation": dict(rotation=180),
    "scale": dict(scale=(0.3, 3)),
    "translation": dict(translate=(0.5, 1)),
    "shear-x": dict(shear=(60, 0)),
    "shear-y": dict(shear=(0, 60)),
    "all": dict(rotation=15, scale=(0.9, 1.1), translate=(0.1, 0.2), shear=(20, 30)),
}


@pytest.mark.parametrize("settings", AFFINE.values(), ids=AFFINE)
@pytest.mark.parametrize("shape", [(11, 8), (32, 32)], ids=["11x8", "32x32"])
def test_affine(shape, settings):
    H, W = shape
    assert_pictures(SeededAugment(**settings), affine, LEVEL, make_images(H=H, W=W))


@pytest.mark.parametrize("size, factor", [((9, 9), 2), ((32, 32), 0.5), ((8, 11), 0.5)], ids=str)
def test_nearest_of_two_as_near_is_torchvision_s(size, factor):
    augment = SeededAugment(scale=(factor, factor), interpolation="nearest")

    def nearest(image, drawn):
        return affine(image, drawn, "nearest")

    assert_pictures(augment, nearest, 1e-7, make_images(H=size[0], W=size[1]))


@pytest.mark.parametrize("settings", AFFINE.values(), ids=AFFINE)
def test_nearest(settings):
    # float32 chooses another neighbour where two are equally near, up to rounding
    images, other = make_images(H=31, W=33), 0
    for picture, image, drawn in draws(SeededAugment(**settings, interpolation="nearest"), images):
        differs = (picture - affine(image, drawn, "nearest")).abs().amax(0) > LEVEL / 100
        other += differs.sum().item()
    assert other <= 30 * 31 * 33 * 1e-3


@pytest.mark.parametrize("mode", ["edge", "reflect"])
@pytest.mark.parametrize("interpolation", ["bilinear", "nearest"])
def test_padding_is_that_of_a_padded_image(mode, interpolation):
    settings = dict(
        rotation=20, scale=(0.6, 1.1), translate=(0.2, 0.2), interpolation=interpolation
    )

    def padded(image, drawn):
        around = ((0, 0), (40, 40), (40, 40))
        wide = torch.from_numpy(np.pad(image.numpy(), around, mode))
        return tv.center_crop(affine(wide, drawn, interpolation), image.shape[1:])

    augment, images = SeededAugment(**settings, padding_mode=mode), make_images(H=12, W=9)
    if interpolation == "bilinear":
        assert_pictures(augment, padded, LEVEL, images)
    else:
        differs = [(a - padded(b, d)).abs().amax(0) > 0.001 for a, b, d in draws(augment, images)]
        assert torch.stack(differs).float().mean() < 1e-3


@pytest.mark.parametrize("shape", [(11, 8), (32, 32), (40, 17)], ids=str)
@pytest.mark.parametrize("interpolation", ["bilinear", "nearest"])
@pytest.mark.parametrize("flip", [0, 1])
def test_resized_crop(shape, interpolation, flip):
    exact = {"nearest": "nearest-exact"}.get(interpolation, interpolation)  # the middle of a pixel

    def crop(image, drawn):
        box = drawn.top, drawn.left, drawn.height, drawn.width
        image = tv.resized_crop(image, *box, shape, tv.InterpolationMode(exact))
        return tv.horizontal_flip(image) if flip else image

    augment = SeededAugment(resized_crop=(0.08, 1), interpolation=interpolation, flip=flip)
    images = make_images(H=shape[0], W=shape[1])
    if interpolation == "bilinear":
        assert_pictures(augment, crop, LEVEL, images)
    else:  # where two are equally near, rounding decides
        differs = [
            (a - crop(b, d)).abs().amax(0) > LEVEL / 100 for a, b, d in draws(augment, images)
        ]
        assert torch.stack(differs).float().mean() < 0.002


def test_crop_flip_and_affine_are_one_resample():
    # what the turned window uncovers comes from the padded image: torchvision needs a margin for it
    settings, margin = dict(crop_padding=3, flip=0.5, rotation=20, scale=(0.8, 1.25)), 12
    settings |= dict(translate=(0.1, 0.2), shear=(10, 15))

    def geometry(image, drawn):
        H, W = image.shape[1:]
        window = tv.pad(image, settings["crop_padding"] + margin)
        window = tv.crop(window, drawn.top, drawn.left, H + 2 * margin, W + 2 * margin)
        window = tv.horizontal_flip(window) if drawn.flip else window
        return tv.center_crop(affine(window, drawn), [H, W])

    assert_pictures(SeededAugment(**settings), geometry, LEVEL)


def test_one_resample_is_near_to_several():
    # of a smooth picture: of noise, each further resample removes a part
    H, W = 40, 48
    x, y = torch.meshgrid(torch.linspace(0, 3, W), torch.linspace(0, 2, H), indexing="xy")
    smooth = torch.stack([torch.sin(k + x + k * y) / 2 + 0.5 for k in range(3)])
    images = (255 * smooth).round().byte().expand(5, -1, -1, -1)

    def several(image, drawn):
        box = drawn.top, drawn.left, drawn.height, drawn.width
        image = tv.resized_crop(image, *box, [H, W])
        return affine(tv.horizontal_flip(image) if drawn.flip else image, drawn)

    augment = SeededAugment(resized_crop=(0.5, 1), flip=0.5, rotation=15, scale=(1.3, 1.4))
    worst = 0
    for picture, image, drawn in draws(augment, images):
        inside = (..., slice(12, -12), slice(12, -12))  # torchvision's corners are black
        worst = max(worst, (picture - several(image, drawn))[inside].abs().max().item())
    assert worst < LEVEL


def test_erasing():
    settings = dict(mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.25))
    images = make_images(H=20, W=17)
    plain = SeededAugment(**settings)(images, **COORDINATES)
    pictures, count = iter(plain), 0

    def erase(_, drawn):
        nonlocal count
        count += drawn.erase_width > 0
        box = drawn.erase_top, drawn.erase_left, drawn.erase_height, drawn.erase_width
        return tv.erase(next(pictures), *box, torch.zeros(()))

    assert_pictures(SeededAugment(**settings, erase=0.5), erase, 0, images)
    assert 0 < count < 30
    nearly_all = SeededAugment(erase=1, erase_area=(0.9, 0.9), erase_ratio=(0.85, 0.85))
    views = nearly_all(torch.full_like(images, 9), **COORDINATES)
    assert ((views == 0).float().mean((1, 2, 3)) > 0.85).all()


@pytest.mark.parametrize("size", [(32, 32), (20, 50), (1, 7)], ids=str)
def test_rectangles_lie_inside_and_have_the_area_and_ratio_asked_for(size):
    H, W = size
    augment = SeededAugment(
        resized_crop=(0.2, 0.5), resized_crop_ratio=(0.5, 2), erase=1, erase_area=(0.2, 0.5),
        erase_ratio=(0.5, 2),
    )  # fmt: skip
    indices = torch.arange(5000)
    drawn = augment.parameters(seed=1, step=2, views=[3, 4], indices=indices, size=size)
    boxes = [drawn[:4], drawn[-4:]]
    for left, top, width, height in boxes:
        assert (left >= 0).all() and (left + width <= W).all() and left.float().std() > 0
        assert (top >= 0).all() and (top + height <= H).all()
        if size == (32, 32):  # to rounding
            area, ratio = width * height / (H * W), width / height
            assert 0.17 < area.min() < 0.22 and 0.48 < area.max() < 0.53
            assert 0.45 < ratio.min() < 0.55 and 1.9 < ratio.max() < 2.2
            # uniform in the logarithm: as many rectangles are wide as are high
            assert abs((ratio > 1).float().mean() - (ratio < 1).float().mean()) < 0.03


COLORS = {
    "brightness": (tv.adjust_brightness, 0.4),
    "contrast": (tv.adjust_contrast, 0.4),
    "saturation": (tv.adjust_saturation, 1.0),
    "hue": (tv.adjust_hue, 0.5),
}


@pytest.mark.parametrize("channels", [1, 3], ids=["gray", "rgb"])
@pytest.mark.parametrize("name", COLORS)
def test_color(name, channels):
    adjust, size = COLORS[name]
    images = make_images(C=channels)
    images[0] = images[0, :1]  # no saturation, so no hue
    images[1], images[2] = 0, 255

    def expected(image, drawn):
        gray = channels == 1 and name in ("saturation", "hue")
        return image if gray else adjust(image, getattr(drawn, name))

    assert_pictures(SeededAugment(**{name: size}), expected, 2e-6, images)


def test_colors_follow_each_other_and_normalisation_is_last():
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)

    def expected(image, drawn):
        for name, (adjust, _) in COLORS.items():
            image = adjust(image, getattr(drawn, name))
        return tv.normalize(image, mean, std)

    assert_pictures(SeededAugment(jitter=0.4, mean=mean, std=std), expected, 2e-5)


def test_jitter_stands_for_what_is_not_given():
    assert repr(SeededAugment(jitter=0.4)) == repr(
        SeededAugment(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1)
    )
    policy = SeededAugment(jitter=0.4, contrast=0, hue=0.3).policy
    assert policy.pack()[13:17] == [0.4, 0, 0.4, 0.3]


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.uint16, torch.float32, torch.float64, torch.bfloat16], ids=str
)
def test_same_bits_in_any_split_and_order(dtype):
    # wide enough for vector loops and short enough for their scalar ends
    images = make_images(N=37, H=9, W=7, dtype=dtype)
    augment = SeededAugment(**EVERYTHING, dtype=torch.float64)
    views = augment(images, **COORDINATES).unflatten(0, (len(VIEWS), len(images)))
    for v, rows in itertools.product(VIEWS, ([0], [36, 4], list(range(1, 36)))):
        indices = torch.tensor(rows)
        part = augment(images[indices], **COORDINATES | {"views": [v]}, indices=indices)
        assert torch.equal(part, views[v, indices])
    order, backwards = torch.randperm(37), list(reversed(VIEWS))
    shuffled = augment(images[order], **COORDINATES | {"views": backwards}, indices=order)
    assert torch.equal(shuffled.view_as(views), views[backwards][:, order])


def test_same_bits_from_tensor_coordinates():
    images, augment = make_images(), SeededAugment(**EVERYTHING)
    coordinates = {"seed": torch.tensor(2**40 + 3), "step": torch.tensor(7), "views": VIEWS}
    assert torch.equal(augment(images, **coordinates), augment(images, **COORDINATES))


def against_reference(images, dtype=torch.float32, channels_last=False, **settings):
    """The op's views, and those of its definition."""
    policy, indices = (
        SeededAugment(**settings).policy.pack(),
        torch.arange(len(images)) + 2**32 - 99,
    )
    coordinates = (torch.tensor(2**62 + 5), torch.tensor(2**32 - 1), [0, 2**32 - 1, 3], indices)
    arguments = (images, policy, *coordinates, dtype, channels_last)
    return torch.ops.bld_ext.augment(*arguments), reference.augment(*arguments)


@pytest.mark.parametrize("size", [(1, 1), (7, 5), (32, 32), (3, 67)], ids=str)
@pytest.mark.parametrize(
    "dtype",
    [torch.uint8, torch.uint16, torch.float32, torch.float64, torch.bfloat16, torch.float16],
    ids=str,
)
def test_kernel_has_the_bits_of_the_definition(settings, dtype, size):
    found, expected = against_reference(make_images(4, 3, *size, dtype), **settings)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels-last"])
def test_kernel_writes_any_dtype_and_layout(dtype, channels, channels_last):
    images = make_images(C=channels)
    found, expected = against_reference(
        images, dtype, channels_last, crop_padding=3, flip=0.5, brightness=0.5
    )
    assert torch.equal(found, expected)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    assert found.is_contiguous(memory_format=layout)


@pytest.mark.skipif(backend("augment") != "compiled", reason="bld_ext._C was not built")
def test_same_bits_on_all_registers(outputs_by_registers):
    digests = outputs_by_registers(SCRIPT + "print(digest)")
    assert digests[0] and len(set(digests)) == 1


def test_same_bits_with_any_number_of_threads(with_threads):
    augment, images = SeededAugment(**EVERYTHING), make_images(N=40, H=33, W=31)
    first, *others = with_threads(lambda: augment(images, **COORDINATES))
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_every_element_is_written(poison, dtype):
    for settings in (dict(crop_padding=40), EVERYTHING):
        views = SeededAugment(**settings, dtype=dtype)(make_images(), **COORDINATES)
        assert views.isfinite().all()


def test_more_views_than_malloc_keeps_memory_for():
    """A result of that size, over 32 MiB, is written into large pages."""
    augment, images = SeededAugment(**EVERYTHING), make_images(H=128, W=128)
    each = 4 * images.numel()
    count = (33 << 20) // each + 1
    made = augment(images, seed=3, step=5, views=range(count))
    assert made.numel() * 4 > 33 << 20
    for v in (0, count // 2, count - 1):
        rows = slice(v * len(images), (v + 1) * len(images))
        assert torch.equal(made[rows], augment(images, seed=3, step=5, views=[v]))


SCRIPT = """
import hashlib, torch
from bld_ext import SeededAugment
images = torch.arange(4 * 3 * 10 * 7).remainder(251).to(torch.uint8).view(4, 3, 10, 7)
augment = SeededAugment(
    crop_padding=3, flip=0.5, rotation=20, scale=(0.8, 1.25), jitter=0.4, translate=(0.1, 0.2),
    shear=(10, 15), resized_crop=(0.3, 1), erase=0.5)
views = augment(images, seed=2**40 + 3, step=7, views=range(6))
digest = hashlib.sha256(views.numpy().tobytes()).hexdigest()
"""


def test_same_bits_in_a_fresh_process():
    here = {}
    exec(SCRIPT, here)
    command = [sys.executable, "-c", SCRIPT + "print(digest)"]
    fresh = subprocess.run(command, capture_output=True, text=True, check=True)
    assert fresh.stdout.strip() == here["digest"]


@pytest.mark.parametrize("changed", ["seed", "seed-high-word", "step", "views", "indices"])
def test_every_coordinate_matters(changed):
    augment, images = SeededAugment(**EVERYTHING), make_images(N=1).expand(4, -1, -1, -1)
    coordinates = dict(seed=1, step=2, views=[3], indices=torch.arange(4))
    other = {
        "seed": 2,
        "seed-high-word": 1 + 2**32,
        "step": 3,
        "views": [4],
        "indices": torch.arange(4, 8),
    }
    moved = coordinates | {changed.removesuffix("-high-word"): other[changed]}
    pictures = torch.cat([augment(images, **coordinates), augment(images, **moved)])
    assert len(torch.unique(pictures, dim=0)) == 8


def test_parameters_are_uniform_and_independent():
    """A million draws; five standard errors."""
    settings = EVERYTHING | {"hue": 0.25, "flip": 0.3, "erase": 0.4, "resized_crop": None}
    count = 1_000_000
    drawn = SeededAugment(**settings).parameters(
        seed=5, step=1, views=range(50), indices=torch.arange(count // 50), size=(32, 64)
    )
    fields = {name: field.flatten().double().numpy() for name, field in drawn._asdict().items()}
    ranges = {"angle": (-20, 20), "scale": (0.8, 1.25), "hue": (-0.25, 0.25)}
    ranges |= {"translate_x": (-6.4, 6.4), "translate_y": (-6.4, 6.4)}
    ranges |= {"shear_x": (-10, 10), "shear_y": (-15, 15)}
    ranges |= dict.fromkeys(["brightness", "contrast", "saturation"], (0.6, 1.4))
    for name, (low, high) in ranges.items():
        assert stats.kstest(fields[name], "uniform", (low, high - low)).pvalue > FIVE_SIGMA, name
    for name in ("left", "top"):
        counts = torch.bincount(getattr(drawn, name).flatten(), minlength=7)
        assert len(counts) == 7 and stats.chisquare(counts).pvalue > FIVE_SIGMA, name
    erased = fields["erase_width"] > 0
    for happened, probability in ((fields["flip"], 0.3), (erased, 0.4)):
        happened = int(happened.sum())
        assert stats.binomtest(happened, count, probability).pvalue > FIVE_SIGMA
    independent = [*ranges, "left", "top", "flip", "erased"]
    fields["erased"] = erased
    for a, b in itertools.combinations(independent, 2):
        assert abs(np.corrcoef(fields[a], fields[b])[0, 1]) < 5 / count**0.5, (a, b)
    for axis, name in itertools.product((0, 1), independent[:-1]):  # neighbouring views and images
        field = getattr(drawn, name).double()
        length = field.shape[axis] - 1
        first, second = field.narrow(axis, 0, length), field.narrow(axis, 1, length)
        correlation = np.corrcoef(first.flatten(), second.flatten())[0, 1]
        assert abs(correlation) < 5 / first.numel() ** 0.5, name


def test_rectangles_are_uniform_in_area_log_ratio_and_place():
    """A million draws in an image so large that rounding to pixels does not matter."""
    size, areas, ratios = (30_000, 30_000), (0.1, 0.2), (0.5, 2.0)
    augment = SeededAugment(
        resized_crop=areas, resized_crop_ratio=ratios, erase=1, erase_area=areas, erase_ratio=ratios
    )
    drawn = augment.parameters(
        seed=6, step=1, views=range(50), indices=torch.arange(20_000), size=size
    )
    places = []
    for box in (drawn[:4], drawn[-4:]):
        left, top, width, height = (field.flatten().double().numpy() for field in box)
        area, ratio = width * height / 9e8, np.log(width / height)
        x, y = left / (30_000 - width), top / (30_000 - height)
        for field, (low, high) in (
            (area, areas),
            (ratio, (math.log(0.5), math.log(2))),
            (x, (0, 1)),
            (y, (0, 1)),
        ):
            assert stats.kstest(field, "uniform", (low, high - low)).pvalue > FIVE_SIGMA
            places.append(field)
    for a, b in itertools.combinations(places, 2):
        assert abs(np.corrcoef(a, b)[0, 1]) < 5 / 1000


def test_off_policy_draws_are_neutral():
    drawn = SeededAugment().parameters(
        seed=0, step=0, views=[0, 1], indices=torch.arange(9), size=(5, 6)
    )
    neutral = [0, 0, 6, 5, False, 0, 0, 0, 1, 0, 0, 1, 1, 1, 0, 0, 0, 0, 0]
    assert [field.unique().tolist() for field in drawn] == [[value] for value in neutral]
    assert all(field.shape == (2, 9) for field in drawn)


def test_sine_and_exponential_are_right():
    degrees = torch.linspace(-400, 400, 100_001, dtype=torch.float64)
    for found, exact in zip(reference.sine(degrees), (np.sin, np.cos), strict=True):
        np.testing.assert_allclose(found, exact(np.radians(degrees.numpy())), rtol=0, atol=4e-15)
    sin, cos = reference.sine(torch.arange(-4, 5).double() * 90)
    assert sin.tolist() == [0, 1, 0, -1, 0, 1, 0, -1, 0]
    assert cos.tolist() == [1, 0, -1, 0, 1, 0, -1, 0, 1]
    x = torch.linspace(-8, 8, 10_001, dtype=torch.float64)
    torch.testing.assert_close(reference.exp(x), x.exp(), rtol=5e-14, atol=0)


@pytest.mark.parametrize("dtype, white", [(torch.uint8, 255), (torch.uint16, 65_535)], ids=str)
def test_whole_numbers_and_float_images_agree(dtype, white):
    augment, images = SeededAugment(**EVERYTHING), make_images(dtype=dtype)
    views = [augment(x, **COORDINATES) for x in (images, images.float() / white)]
    torch.testing.assert_close(*views, rtol=0, atol=1e-5)  # divided behind or before


def test_uint16_keeps_what_uint8_has_no_levels_for():
    images = torch.tensor([0, 1, 255, 256, 32_768, 65_535]).to(torch.uint16).view(1, 1, 2, 3)
    views = SeededAugment()(images, **COORDINATES)
    assert torch.equal(views[:1], images.float() / 65_535)


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels-last"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_result_is_rounded_once_into_its_dtype_and_layout(dtype, channels_last):
    images = make_images()
    views = SeededAugment(**EVERYTHING, dtype=dtype, channels_last=channels_last)(
        images, **COORDINATES
    )
    layout = torch.channels_last if channels_last else torch.contiguous_format
    assert views.is_contiguous(memory_format=layout)
    assert torch.equal(views, SeededAugment(**EVERYTHING)(images, **COORDINATES).to(dtype))


@pytest.mark.parametrize("layout", ["channels-last", "strided"])
def test_any_layout_of_images(layout):
    images = make_images(W=16)[..., ::2]
    if layout == "channels-last":
        images = images.contiguous(memory_format=torch.channels_last)
    augment = SeededAugment(**EVERYTHING)
    before = images.clone()
    views = augment(images, **COORDINATES)
    assert torch.equal(views, augment(images.contiguous(), **COORDINATES))
    assert torch.equal(images, before)


@pytest.mark.parametrize("N, views", [(0, [0, 1]), (3, []), (0, [])], ids=["N", "V", "both"])
@pytest.mark.parametrize("settings", [{}, EVERYTHING], ids=["no-policy", "everything"])
def test_empty(settings, N, views):
    result = SeededAugment(**settings)(make_images(N=N), seed=0, step=0, views=views)
    assert result.shape == (0, 3, 11, 8)


@pytest.mark.parametrize("channels", [1, 3], ids=["gray", "rgb"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels-last"])
@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.uint16, torch.float32, torch.float64], ids=str
)
@pytest.mark.parametrize("settings", [{}, EVERYTHING], ids=["no-policy", "everything"])
def test_opcheck(settings, dtype, channels_last, channels):
    images, policy = make_images(C=channels, dtype=dtype), SeededAugment(**settings).policy.pack()
    coordinates = (torch.tensor(1), torch.tensor(2), [0, 3], torch.arange(5))
    arguments = (images, policy, *coordinates, torch.bfloat16, channels_last)
    opcheck(torch.ops.bld_ext.augment.default, arguments)


def test_compiles_into_one_graph():
    augment, images = SeededAugment(**EVERYTHING), make_images()
    compiled = torch.compile(lambda x: augment(x, **COORDINATES), fullgraph=True)
    assert torch.equal(compiled(images), augment(images, **COORDINATES))


@pytest.mark.parametrize("dynamic", [None, True])
def test_compiles_once_for_all_sizes(dynamic):
    counter, augment = CompileCounter(), SeededAugment(**EVERYTHING)
    compiled = torch.compile(
        lambda x: augment(x, **COORDINATES), fullgraph=True, dynamic=dynamic, backend=counter
    )
    for side in range(8, 18):
        images = make_images(H=side, W=side + 1)
        assert torch.equal(compiled(images), augment(images, **COORDINATES))
    assert counter.frame_count <= 2


@pytest.mark.parametrize("channels_last", [False, True])
def test_views_are_tensors_of_their_own(channels_last):
    policy = SeededAugment(crop_padding=1).policy
    for images in (make_images(), make_images(N=0), make_images(N=1, C=1, H=1, W=1)):
        views = ops.augment(images, policy, 0, 0, [0, 1], channels_last=channels_last)
        expected = reference.augment(
            images, policy.pack(), torch.tensor(0), torch.tensor(0), [0, 1], None, torch.float32,
            channels_last,
        )  # fmt: skip
        assert not views._is_view() and views.stride() == expected.stride()
        assert torch.equal(views, expected)


@pytest.mark.skipif(backend("augment") != "compiled", reason="bld_ext._C was not built")
def test_higher_bits_of_numbers_do_not_count_anywhere():
    policy = SeededAugment(crop_padding=2, flip=0.5, rotation=30).policy.pack()
    given = torch.tensor(5), torch.tensor(2**32 + 5), [1], torch.arange(5) + 2**33
    arguments = (make_images(), policy, *given, torch.float32, False)
    assert torch.equal(torch.ops.bld_ext.augment(*arguments), reference.augment(*arguments))


def test_repr_shows_what_differs_from_the_default():
    assert repr(SeededAugment()) == "SeededAugment()"
    shown = repr(SeededAugment(crop_padding=4, rotation=15, brightness=0.2, hue=0.1))
    assert shown == "SeededAugment(crop_padding=4, rotation=15, brightness=0.2, hue=0.1)"


@pytest.mark.parametrize(
    "settings",
    [
        dict(scale=(0.9, 1.1)),
        dict(jitter=0.2, mean=(0.5,), std=(0.2,)),
        dict(dtype=torch.bfloat16, channels_last=True),
        EVERYTHING | dict(interpolation="nearest", padding_mode="edge"),
    ],
    ids=["scale", "normalised", "format", "everything"],
)
def test_repr_makes_the_same_augment(settings):
    augment = SeededAugment(**settings)
    again = eval(repr(augment), {"SeededAugment": SeededAugment, "torch": torch})
    assert vars(again) == vars(augment)


@pytest.mark.parametrize(
    "argument, value, message",
    [
        ("crop_padding", -1, "0 to 1048576, got -1"),
        ("crop_padding", 1.5, "whole pixels, got 1.5"),
        ("crop_padding", math.nan, "0 to 1048576, got nan"),
        ("mean", (0.5,), r"both or none, got \(\(0.5,\), None\)"),
        ("std", (0.5,), r"both or none, got \(None, \(0.5,\)\)"),
        ("jitter", -0.1, "0 to 1, got -0.1"),
        ("jitter", (0, 1), r"0 to 1, got \(0, 1\)"),
        ("flip", 2, "0 to 1, got 2"),
        ("rotation", math.nan, "0 to 180, got nan"),
        ("rotation", (0, 15), r"0 to 180, got \(0, 15\)"),
        ("brightness", (0.2, 0.4), r"0 to 1, got \(0.2, 0.4\)"),
        ("hue", 0.7, "0 to 0.5, got 0.7"),
        ("scale", (1.1, 0.9), r"\(low, high\) within 0.001 to 1000, low first, got \(1.1, 0.9\)"),
        ("scale", (0, 1), r"\(low, high\) within 0.001 to 1000, low first, got \(0, 1\)"),
        ("scale", 1.1, r"\(low, high\) within .*, got 1.1"),
        ("scale", (0.9, math.inf), r"\(low, high\) within .*, got \(0.9, inf\)"),
        ("translate", 0.1, r"\(x, y\), each 0 to 1, got 0.1"),
        ("translate", (0.1, -0.1), r"\(x, y\), each 0 to 1, got \(0.1, -0.1\)"),
        ("shear", (10, 90), r"\(x, y\), each 0 to 80, got \(10, 90\)"),
        ("shear", (10,), r"\(x, y\), each 0 to 80, got \(10,\)"),
        ("resized_crop", (0, 1), r"\(low, high\) within 1e-06 to 1, low first, got \(0, 1\)"),
        ("resized_crop", 0.5, r"\(low, high\) within 1e-06 to 1, low first, got 0.5"),
        ("resized_crop_ratio", (2, 1), r"\(low, high\) within .*, got \(2, 1\)"),
        ("erase", 1.5, "0 to 1, got 1.5"),
        ("erase_area", (0.5, 2), r"\(low, high\) within 1e-06 to 1, low first, got \(0.5, 2\)"),
        ("erase_ratio", None, r"\(low, high\) within .*, got None"),
        ("interpolation", "bicubic", "one of bilinear, nearest, got 'bicubic'"),
        ("padding_mode", "wrap", "one of zeros, reflect, edge, got 'wrap'"),
        ("dtype", torch.uint8, "a floating-point dtype, got torch.uint8"),
        ("rotation", 10**400, "0 to 180, got 1000+"),
        ("scale", "ab", r"\(low, high\) within .*, got 'ab'"),
    ],
)
def test_bad_setting(argument, value, message):
    with pytest.raises(ValueError, match=rf"^(mean, )?{argument}(, std)?: expected {message}$"):
        SeededAugment(**{argument: value})


@pytest.mark.parametrize(
    "std", [(1, 2), (0,), (-1,), (1e-50,), 0.5], ids=["too-long", "zero", "negative", "tiny", "no"]
)
def test_bad_std(std):
    with pytest.raises(ValueError, match=r"^std: expected .*got .*[0-9]\)?,?\)?$"):
        SeededAugment(mean=(0.5,), std=std)


def test_numbers_of_numpy_are_numbers():
    given = dict(scale=(np.float32(0.5), np.float64(2)), jitter=np.float32(0.25))
    augment = SeededAugment(**given)
    assert repr(augment) == repr(SeededAugment(scale=(0.5, 2.0), jitter=0.25))
    images = make_images()
    seeds = dict(seed=np.int64(3), step=np.int64(4), views=[0])
    assert torch.equal(augment(images, **seeds), augment(images, seed=3, step=4, views=[0]))


@pytest.mark.parametrize(
    "policy", [None, [0.0] * 24, SeededAugment()], ids=["none", "list", "other"]
)
def test_a_policy_is_a_policy(policy):
    with pytest.raises(TypeError, match="^policy: expected a Policy, such as .* got "):
        ops.augment(make_images(), policy, seed=0, step=0, views=[0])


@pytest.mark.skipif(backend("augment") != "compiled", reason="bld_ext._C was not built")
@pytest.mark.parametrize("at", range(24))
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_the_kernel_refuses_a_packed_policy_that_is_not_finite(at, value):
    policy = SeededAugment(rotation=5).policy.pack()
    policy[at] = value
    arguments = (make_images(W=8), policy, torch.tensor(0), torch.tensor(0), [0], None)
    with pytest.raises(RuntimeError, match="policy: expected finite numbers"):
        torch.ops.bld_ext.augment(*arguments, torch.float32, False)


SEEDS, STEPS = f"a whole number, 0 to {2**63 - 1}", f"a whole number, 0 to {2**32 - 1}"


@pytest.mark.parametrize(
    "argument, value, message",
    [
        ("images", make_images()[0], r"shape \[N, C, H, W\], got \(3, 11, 8\)"),
        ("images", make_images().int(), "uint8, uint16 or a floating-point dtype, got torch.int32"),
        ("images", make_images(C=2), r"1 or 3 channels .*, got \(5, 2, 11, 8\)"),
        ("images", make_images(H=0), r"at least one pixel, got \(5, 3, 0, 8\)"),
        ("images", make_images(C=0), r"at least one pixel, got \(5, 0, 11, 8\)"),
        (
            "images",
            torch.empty(1, 3, 1, 1, dtype=torch.uint8).expand(1, 3, 2**16, 2**16),
            r"fewer than 2\*\*31 pixels, .*, got \(65536, 65536\)",
        ),
        (
            "images",
            torch.empty(1, 1, 1, 1, dtype=torch.uint8).expand(1, 3, 1, 2**24 + 1),
            r"sides of at most 2\*\*24 pixels, got \(1, 16777217\)",
        ),
        ("images", torch.rand(5, 3, 4, 4, requires_grad=True), "a constant, .*requires_grad=True"),
        ("images", make_images().float().to_sparse(), "a dense tensor, got torch.sparse_coo"),
        ("channels_last", "no", "True or False, got no"),
        ("images", [1, 2], "a tensor, got list"),
        ("indices", torch.arange(4), r"shape \(5,\), got .*4.*"),
        ("indices", torch.arange(5.0), "torch.int64, got torch.float32"),
        ("indices", [0, 1, 2, 3, 4], "a tensor, got list"),
        ("indices", torch.arange(5, device="meta"), "device cpu, got meta"),
        ("seed", torch.tensor(-1), f"{SEEDS}, got -1"),
        ("step", torch.tensor(2**32), f"{STEPS}, got {2**32}"),
        ("step", torch.tensor(0, device="meta"), "a scalar on the CPU or .* are, got meta"),
        ("indices", torch.arange(5) - 1, ".*got -1.*"),
        ("seed", -1, f"{SEEDS}, got -1"),
        ("seed", 2**63, f"{SEEDS}, got {2**63}"),
        ("seed", 0.5, ".*got 0.5"),
        ("step", 2**32, f"{STEPS}, got {2**32}"),
        ("step", torch.arange(2), ".*got .*"),
        ("views", 3, ".*got 3"),
        ("views", [0.5], ".*got .*0.5.*"),
        ("views", [-1], ".*got .*-1.*"),
        ("dtype", torch.uint8, "a floating-point dtype, got torch.uint8"),
    ],
)
def test_bad_argument(argument, value, message):
    policy = SeededAugment(jitter=0.1).policy
    arguments = {"images": make_images(), "policy": policy, "seed": 0, "step": 0, "views": [0]}
    with pytest.raises((ValueError, TypeError), match=f"^{argument}: expected {message}$"):
        ops.augment(**arguments | {argument: value})


@pytest.mark.parametrize(
    "changed, message",
    [
        (dict(hue=0.7), "hue: expected 0 to 0.5, got 0.7"),
        (dict(rotation=float("nan")), "rotation: expected 0 to 180, got nan"),
        (dict(crop_padding=-1), "crop_padding: expected 0 to 1048576, got -1"),
        (dict(scale=(2, 1)), r"scale: expected .* within 0.001 to 1000, low first, got \(2, 1\)"),
        (dict(padding_mode=0), "padding_mode: expected one of zeros, reflect, edge, got 0"),
        (
            dict(mean=(0, 0, float("inf")), std=(1, 1, 1)),
            "mean: expected finite numbers, one a channel, got .*inf.*",
        ),
        (dict(mean=(0, 0, 0), std=(1, 1, 0)), r"std: expected finite numbers above 0, .* 0\)"),
        (dict(mean=(0, 0, 0), std=(1, 1)), "std: expected as many values as mean, 3, got 2"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_policy(changed, message):
    policy = SeededAugment().policy._replace(**changed)
    with pytest.raises(ValueError, match=f"^policy.{message}$"):
        ops.augment(make_images(), policy, seed=0, step=0, views=[0])


@pytest.mark.parametrize(
    "settings, sides",
    [
        ({}, (1, 450_000)),
        (dict(scale=(1e-3, 1), translate=(1, 1)), (400, 400)),
        (dict(scale=(0.05, 1), shear=(80, 80)), (1500, 1500)),
        (dict(crop_padding=2**20), (1, 1)),
    ],
    ids=["long", "scale", "shear", "padding"],
)
def test_points_too_far_away_for_32_bits_are_refused(settings, sides):
    images = torch.zeros(1, 1, 1, 1, dtype=torch.uint8).expand(1, 1, *sides)
    with pytest.raises(
        ValueError, match=rf"^images: expected sides .* got {sides[0]} x {sides[1]}"
    ):
        SeededAugment(**settings)(images, seed=0, step=0, views=[0])


def test_points_as_far_away_as_32_bits_allow():
    """The furthest point that is not refused is outside, as it is in the definition."""
    settings = dict(scale=(1e-3, 1e-3), translate=(1, 1), padding_mode="reflect")
    images = make_images(N=2, H=150, W=150)
    given = images, SeededAugment(**settings).policy.pack(), torch.tensor(1), torch.tensor(2), [0]
    given = *given, None, torch.float32, False
    assert torch.equal(torch.ops.bld_ext.augment(*given), reference.augment(*given))
    views = SeededAugment(**settings | dict(padding_mode="zeros"))(
        images, seed=0, step=0, views=[0]
    )
    assert (views != 0).float().mean() < 1e-3


@pytest.mark.parametrize("width", [224, 4096, 8192, 16384])
def test_a_crop_of_a_long_image_stays_where_it_is(width):
    """What counts as a tie does not grow with the image."""
    height = max(9, width // 900)
    ramp = torch.arange(width).expand(1, 1, height, width).float() / width
    ratio = (width / height,) * 2
    augment = SeededAugment(resized_crop=(1, 1), resized_crop_ratio=ratio, interpolation="nearest")
    where = dict(seed=0, step=0, views=[0])
    box = augment.parameters(**where, indices=torch.arange(1), size=(height, width))
    assert (box.width.item(), box.height.item()) == (width, height)
    assert torch.equal(augment(ramp, **where), ramp)


def test_mean_of_another_number_of_channels():
    policy = SeededAugment(mean=(0.5,), std=(1,)).policy
    with pytest.raises(ValueError, match="^policy.mean: expected 3 values, one a channel, got 1$"):
        ops.augment(make_images(), policy, seed=0, step=0, views=[0])


@pytest.mark.parametrize("size", [(0, 5), (5,), (5.0, 5), (2**16, 2**16), (1, 2**25), 32], ids=str)
def test_bad_size(size):
    with pytest.raises(ValueError, match=r"^size: expected .*got \(?[0-9]"):
        SeededAugment().parameters(seed=0, step=0, views=[0], indices=torch.arange(2), size=size)


def test_a_packed_policy_of_another_length_is_refused():
    policy = SeededAugment().policy.pack()[:-1]
    arguments = (make_images(), policy, torch.tensor(0), torch.tensor(0), [0], None)
    with pytest.raises((RuntimeError, ValueError, IndexError)):
        torch.ops.bld_ext.augment(*arguments, torch.float32, False)


def test_a_packed_policy_is_the_policy_again(settings):
    policy = SeededAugment(**settings).policy
    assert reference.Policy.unpack(policy.pack()) == policy


def test_plain_images_are_scaled_and_normalised_alone():
    images = make_images(N=3)
    augment = SeededAugment(**EVERYTHING | {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7]})
    statistics = (torch.tensor(x).view(3, 1, 1) for x in ([0.1, 0.2, 0.3], [0.5, 0.6, 0.7]))
    mean, std = statistics
    torch.testing.assert_close(augment.plain(images), (images.float() / 255 - mean) / std)
    assert torch.equal(SeededAugment(jitter=0.5).plain(images), images.float() / 255)
