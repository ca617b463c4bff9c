"""SeededAugment: torchvision's pictures, from uniform parameters, with the same bits everywhere."""

import itertools
import subprocess
import sys

import pytest
import torch
from scipy import stats
from torch.library import opcheck
from torchvision.transforms.v2 import functional as tv

from bld_ext import SeededAugment, backend, ops, reference

LEVEL = 1 / 255
FIVE_SIGMA = 2 * stats.norm.sf(5)
VIEWS = range(6)
EVERYTHING = dict(crop_padding=3, flip=0.5, rotation=20, scale=(0.8, 1.25), jitter=0.4)
COORDINATES = dict(seed=2**40 + 3, step=7, views=VIEWS)


def make_images(N=5, C=3, H=11, W=8, dtype=torch.uint8):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (N, C, H, W), generator=generator, dtype=torch.uint8)
    return images if dtype == torch.uint8 else (images.double() / 255).to(dtype)


def draws(augment, images):
    """For each view of each image: the picture, the image in [0, 1], and what was drawn for it."""
    drawn = augment.parameters(**COORDINATES, indices=torch.arange(len(images)))
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
def test_crop_is_exact(padding):
    def crop(image, drawn):
        return tv.crop(tv.pad(image, padding), drawn.top, drawn.left, *image.shape[1:])

    assert_pictures(SeededAugment(crop_padding=padding), crop, atol=0)


@pytest.mark.parametrize("width", [8, 9], ids=["even", "odd"])
def test_flip_is_exact(width):
    def flip(image, drawn):
        return tv.horizontal_flip(image) if drawn.flip else image

    assert_pictures(SeededAugment(flip=0.5), flip, 0, make_images(W=width))
    assert_pictures(SeededAugment(flip=1), lambda image, _: image.flip(2), 0)


def affine(image, drawn):
    bilinear = tv.InterpolationMode.BILINEAR
    return tv.affine(image, drawn.angle, [0, 0], drawn.scale, [0, 0], interpolation=bilinear)


@pytest.mark.parametrize(
    "settings",
    [dict(rotation=180), dict(scale=(0.3, 3)), dict(rotation=15, scale=(0.9, 1.1))],
    ids=["rotation", "scale", "both"],
)
@pytest.mark.parametrize("shape", [(11, 8), (32, 32)], ids=["11x8", "32x32"])
def test_rotation_and_scale(shape, settings):
    H, W = shape
    assert_pictures(SeededAugment(**settings), affine, LEVEL / 50, make_images(H=H, W=W))


def test_crop_flip_and_affine_are_one_resample():
    # what the turned window uncovers comes from the padded image: torchvision needs a margin for it
    settings, margin = dict(EVERYTHING, jitter=0), 12

    def geometry(image, drawn):
        H, W = image.shape[1:]
        window = tv.pad(image, settings["crop_padding"] + margin)
        window = tv.crop(window, drawn.top, drawn.left, H + 2 * margin, W + 2 * margin)
        window = tv.horizontal_flip(window) if drawn.flip else window
        return tv.center_crop(affine(window, drawn), [H, W])

    assert_pictures(SeededAugment(**settings), geometry, LEVEL / 50)


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
    assert policy[5:9] == (0.4, 0, 0.4, 0.3)


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.float32, torch.float64, torch.bfloat16], ids=str
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


# What needs no sine has the bits of the definition; a sine may differ between libraries by an ulp
# of float64, which rarely reaches the float32 that is used.
WITHOUT_SINE = {
    "crop-flip": dict(crop_padding=3, flip=0.5),
    "crop-beyond": dict(crop_padding=40, flip=0.5),
    "scale": dict(crop_padding=2, flip=0.5, scale=(0.3, 3)),
    "far-away": dict(crop_padding=2**20, scale=(1e-3, 1e3)),
    "color": dict(jitter=1.0, hue=0.5),
    "contrast": dict(contrast=0.7),
    "normalised": dict(crop_padding=1, jitter=0.4, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.25)),
}


@pytest.mark.parametrize("size", [(1, 1), (7, 5), (32, 32), (3, 67)], ids=str)
@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str
)
@pytest.mark.parametrize("settings", WITHOUT_SINE.values(), ids=WITHOUT_SINE)
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


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float64], ids=str)
def test_kernel_agrees_with_the_definition_on_everything(dtype):
    settings = EVERYTHING | dict(mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.25))
    atol = 1e-12 if dtype == torch.float64 else 1e-5
    for size in ((11, 8), (32, 32), (61, 97)):
        images = make_images(9, 3, *size, dtype)
        found, expected = against_reference(images, torch.float64, **settings)
        torch.testing.assert_close(found, expected, rtol=0, atol=atol)


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


SCRIPT = """
import hashlib, torch
from bld_ext import SeededAugment
images = torch.arange(4 * 3 * 10 * 7).remainder(251).to(torch.uint8).view(4, 3, 10, 7)
views = SeededAugment(crop_padding=3, flip=0.5, rotation=20, scale=(0.8, 1.25), jitter=0.4)(
    images, seed=2**40 + 3, step=7, views=range(6))
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
    settings = EVERYTHING | {"hue": 0.25, "flip": 0.3}
    drawn = SeededAugment(**settings).parameters(
        seed=5, step=1, views=range(50), indices=torch.arange(2000)
    )
    fields = {name: field.flatten().double().numpy() for name, field in drawn._asdict().items()}
    ranges = {"angle": (-20, 20), "scale": (0.8, 1.25), "hue": (-0.25, 0.25)}
    ranges |= dict.fromkeys(["brightness", "contrast", "saturation"], (0.6, 1.4))
    for name, (low, high) in ranges.items():
        assert stats.kstest(fields[name], "uniform", (low, high - low)).pvalue > FIVE_SIGMA, name
    for name in ("left", "top"):
        counts = torch.bincount(getattr(drawn, name).flatten(), minlength=7)
        assert len(counts) == 7 and stats.chisquare(counts).pvalue > FIVE_SIGMA, name
    assert stats.binomtest(int(fields["flip"].sum()), 100_000, 0.3).pvalue > FIVE_SIGMA
    for a, b in itertools.combinations(fields, 2):
        assert abs(stats.pearsonr(fields[a], fields[b]).statistic) < 5 / 100_000**0.5, (a, b)
    for axis, field in itertools.product((0, 1), drawn):  # neighbouring views, neighbouring images
        first, second = field.double().narrow(axis, 0, 49), field.double().narrow(axis, 1, 49)
        correlation = stats.pearsonr(first.flatten(), second.flatten()).statistic
        assert abs(correlation) < 5 / first.numel() ** 0.5


def test_off_policy_draws_are_neutral():
    drawn = SeededAugment().parameters(seed=0, step=0, views=[0, 1], indices=torch.arange(9))
    assert [field.unique().tolist() for field in drawn] == [[0], [0], [False], [0], *[[1]] * 4, [0]]
    assert all(field.shape == (2, 9) for field in drawn)


def test_uint8_and_float_images_agree():
    augment = SeededAugment(**EVERYTHING)
    assert torch.equal(
        augment(make_images(), **COORDINATES), augment(make_images() / 255, **COORDINATES)
    )


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
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64], ids=str)
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
    ],
    ids=["scale", "normalised", "format"],
)
def test_repr_makes_the_same_augment(settings):
    augment = SeededAugment(**settings)
    again = eval(repr(augment), {"SeededAugment": SeededAugment, "torch": torch})
    assert vars(again) == vars(augment)


ZOOM = r"\(low, high\) within 0.001 to 1000"


@pytest.mark.parametrize(
    "argument, value, message",
    [
        ("crop_padding", -1, "whole pixels, 0 or more, got -1"),
        ("crop_padding", 1.5, "whole pixels, 0 or more, got 1.5"),
        ("crop_padding", float("nan"), "whole pixels, 0 or more, got nan"),
        ("mean", (0.5,), r"both, one number a channel, got \(0.5,\), None"),
        ("std", (0.5,), r"both, one number a channel, got None, \(0.5,\)"),
        ("jitter", -0.1, "0 to 1, .*got -0.1"),
        ("flip", 2, "0 to 1, .*got 2"),
        ("rotation", float("nan"), "0 to 180, .*got nan"),
        ("rotation", (0, 15), r".*got \(0, 15\)"),
        ("brightness", (0.2, 0.4), r".*got \(0.2, 0.4\)"),
        ("hue", 0.7, "0 to 0.5, .*got 0.7"),
        ("scale", (1.1, 0.9), rf"{ZOOM}, got \(1.1, 0.9\)"),
        ("scale", (0, 1), rf"{ZOOM}, got \(0, 1\)"),
    ],
)
def test_bad_setting(argument, value, message):
    with pytest.raises(ValueError, match=rf"^(mean, )?{argument}(, std)?: expected {message}$"):
        SeededAugment(**{argument: value})


@pytest.mark.parametrize("std", [(1, 2), (0,), (-1,)], ids=["too-long", "zero", "negative"])
def test_bad_std(std):
    with pytest.raises(ValueError, match=r"std: expected .*got .*\(.*\)$"):
        SeededAugment(mean=(0.5,), std=std)


SEEDS, STEPS = f"0 to {2**63 - 1}", f"0 to {2**32 - 1}"


@pytest.mark.parametrize(
    "argument, value, message",
    [
        ("images", make_images()[0], r"shape \[N, C, H, W\], got \(3, 11, 8\)"),
        ("images", make_images().int(), "uint8 or a floating-point dtype, got torch.int32"),
        ("images", make_images(C=2), r"1 or 3 channels .*, got \(5, 2, 11, 8\)"),
        ("indices", torch.arange(4), r"shape \(5,\), got .*4.*"),
        ("indices", torch.arange(5.0), "torch.int64, got torch.float32"),
        ("indices", [0, 1, 2, 3, 4], ".*got .*"),
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
        (
            dict(scale_min=2),
            r"scale_min, scale_max: expected .* within 0.001 to 1000, got \(2, 1\)",
        ),
        (
            dict(mean=(0, 0, float("inf")), std=(1, 1, 1)),
            "mean: expected finite numbers, got .*inf.*",
        ),
        (dict(mean=(0, 0, 0), std=(1, 1, 0)), r"std: expected finite numbers above 0, got .* 0\)"),
        (dict(mean=(0, 0, 0), std=(1, 1)), "std: expected 3 values, got 2"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_policy(changed, message):
    policy = SeededAugment().policy._replace(**changed)
    with pytest.raises(ValueError, match=f"^policy.{message}$"):
        ops.augment(make_images(), policy, seed=0, step=0, views=[0])


def test_mean_of_another_number_of_channels():
    policy = SeededAugment(mean=(0.5,), std=(1,)).policy
    with pytest.raises(ValueError, match="^policy.mean: expected 3 values, one a channel, got 1$"):
        ops.augment(make_images(), policy, seed=0, step=0, views=[0])
