"""augment in Triton: on a GPU where there is one, else under Triton's interpreter on the CPU."""

import pytest
import torch
from conftest import EVERYTHING, NORMALISED

from bld_ext import SeededAugment, reference

pytest.importorskip("triton")
from bld_ext.triton import augment as kernels  # noqa: E402

INTERPRETED = not torch.cuda.is_available()
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
pytestmark = [
    pytest.mark.usefixtures("triton_counts", "poison", "bounds"),
    # numpy warns of what masks throw away
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
]
SEED, STEP, VIEWS = 2**62 + 5, 2**32 - 1, [2**32 - 1, 3]


def make_images(N=2, C=3, H=7, W=5, dtype=torch.uint8):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (N, C, H, W), generator=generator, dtype=torch.uint8)
    if dtype == torch.uint16:
        return (images.int() * 257 - 99).clamp(0).to(DEVICE, dtype)
    return (images if dtype == torch.uint8 else (images.double() / 255).to(dtype)).to(DEVICE)


def arguments(images, settings, dtype=torch.float32, channels_last=False, views=VIEWS):
    seed, step = (torch.tensor(number, device=DEVICE) for number in (SEED, STEP))
    indices = torch.arange(len(images), device=DEVICE) + 2**32 - 99
    policy = SeededAugment(**settings).policy.pack()
    return images, policy, seed, step, views, indices, dtype, channels_last


def assert_same_bits(*given):
    found, expected = kernels.augment(*given), reference.augment(*given)
    layout = torch.channels_last if given[-1] else torch.contiguous_format
    assert found.dtype == expected.dtype and found.is_contiguous(memory_format=layout)
    same = torch.equal(found, expected)
    if not same and INTERPRETED and found.dtype == torch.bfloat16:
        # the interpreter cuts a float32 where a GPU rounds it
        exact = reference.augment(*given[:-2], torch.float32, given[-1])
        same = torch.equal(found, (exact.view(torch.int32) & -(2**16)).view(torch.float32))
    assert same
    if not INTERPRETED:
        on_cpu = (x.cpu() if isinstance(x, torch.Tensor) else x for x in given)
        assert torch.equal(found.cpu(), reference.augment(*on_cpu))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.float32], ids=str)
def test_bits_of_the_definition(settings, dtype):
    assert_same_bits(*arguments(make_images(dtype=dtype), settings))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_images_of_less_precision(dtype):
    assert_same_bits(*arguments(make_images(dtype=dtype), EVERYTHING))


@pytest.mark.parametrize("size", [(1, 1), (1, 130), (32, 32), (50, 47)], ids=str)
def test_any_size(size):
    images = make_images(N=1, H=size[0], W=size[1])
    for settings in (dict(rotation=20, flip=0.5), EVERYTHING | NORMALISED):
        assert_same_bits(*arguments(images, settings, views=[1]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("C", [1, 2, 3, 4])
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels-last"])
def test_any_channels_dtype_and_layout(dtype, C, channels_last):
    settings = dict(crop_padding=2, rotation=10, brightness=0.5, erase=0.5)
    settings |= dict(mean=(0.5,) * C, std=(0.25, 0.2, 0.3, 0.4)[:C])
    if C in (1, 3):
        settings |= dict(jitter=0.4)
    assert_same_bits(*arguments(make_images(C=C), settings, dtype, channels_last))


@pytest.mark.parametrize("C", [1, 3])
@pytest.mark.parametrize("contrast", [0, 0.4], ids=["tiles-apart", "view-by-view"])
def test_programs_share_a_view_in_tiles(monkeypatch, contrast, C):
    monkeypatch.setattr(kernels, "BLOCK", 64)
    settings = dict(crop_padding=2, rotation=10, contrast=contrast, brightness=0.4, erase=0.5)
    given = arguments(make_images(C=C, H=33, W=31), settings)
    assert_same_bits(*given)
    monkeypatch.setattr(kernels, "MOST_PROGRAMS", 2)
    assert_same_bits(*given)


def test_seed_and_step_by_value(monkeypatch):
    """As they come from a host that knows them, and no tensors for the indices."""
    images, policy, seed, step, views, _, *rest = arguments(make_images(), EVERYTHING)
    given = images, policy, seed.cpu(), step.cpu(), views, None, *rest
    monkeypatch.setattr(kernels, "on_device", lambda scalar, device: False)
    expected = reference.augment(images, policy, seed, step, views, None, *rest)
    assert torch.equal(kernels.augment(*given), expected)


@pytest.mark.parametrize(
    "views, stretches",
    [
        ([], []),
        ([4], [range(4, 5)]),
        (range(50), [range(50)]),
        ([3, 4, 5, 0, 1, 9], [range(3, 6), range(2), range(9, 10)]),
        ([2, 1, 1], [range(2, 3), range(1, 2), range(1, 2)]),
    ],
    ids=["none", "one", "all", "stretches", "backwards-and-twice"],
)
def test_one_launch_for_consecutive_views(views, stretches):
    assert kernels.runs(views) == stretches


def test_views_in_any_order():
    assert_same_bits(*arguments(make_images(), EVERYTHING, views=[5, 6, 1, 1]))


@pytest.mark.parametrize("layout", ["channels-last", "strided"])
def test_any_layout_of_images(layout):
    images = make_images(W=16)[..., ::2]
    if layout == "channels-last":
        images = images.contiguous(memory_format=torch.channels_last)
    before = images.clone()
    assert_same_bits(*arguments(images, EVERYTHING))
    assert torch.equal(images, before)


@pytest.mark.parametrize("N, views", [(0, [0, 1]), (3, []), (0, [])], ids=["N", "V", "both"])
def test_empty(N, views):
    assert_same_bits(*arguments(make_images(N=N), EVERYTHING, views=views))


def test_results_stay_inside_their_buffer():
    images, policy, seed, step, views, indices, *_ = arguments(make_images(N=2), EVERYTHING)
    expected = kernels.augment(images, policy, seed, step, views, indices, torch.float32, False)
    guarded = torch.full((expected.numel() + 4096,), 77.0, device=DEVICE)
    inside = guarded[2048:-2048].view(expected.shape)
    kernels.launch(images, inside, policy, seed, step, views, indices, False)
    assert torch.equal(inside, expected)
    assert (guarded[:2048] == 77).all() and (guarded[-2048:] == 77).all()


def test_float64_runs_on_the_reference():
    assert_same_bits(*arguments(make_images(dtype=torch.float64), EVERYTHING, torch.float64))


def test_indices_of_another_number_are_refused():
    given = list(arguments(make_images(), {}))
    given[5] = given[5][:1]
    with pytest.raises(ValueError, match=r"^indices: expected int64 \[2\], got torch.int64"):
        kernels.augment(*given)


@pytest.mark.parametrize("size", [(1, 1), (10, 10), (32, 32), (45, 45), (1, 5000), (224, 224)])
def test_tiles_cover_a_view(size):
    form, programs = kernels.form(SeededAugment().policy, torch.uint8, 3, *size, False)
    rows, columns = form.ROWS, form.COLUMNS
    assert rows & (rows - 1) == 0 and columns & (columns - 1) == 0 and 1 <= form.warps <= 16
    assert rows * columns <= kernels.BLOCK * (2 if form.ONE_TILE else 1)
    tiles = -(-size[0] // rows) * -(-size[1] // columns)
    assert 1 <= programs <= tiles
    assert tiles == 1 or max(size) > 16
    assert form.ONE_TILE == (tiles == 1)
    assert form.FULL == (rows * columns * tiles == size[0] * size[1])
