"""Times `augment` beside torchvision and kornia.

Run it with `pytest benchmarks/test_augment.py --benchmark-enable`. The views go from uint8 to
normalised float32, through crop, flip, rotation and scale, and colour jitter. torchvision draws one
set of parameters for all images of a batch, which is a different and weaker augmentation
("torchvision-batch"). Image by image it draws one set for each ("torchvision-image"), as kornia and
ours do. Only ours can make the same views again from a number.

Each row also counts the operators that a call runs, those that wait for a GPU, the bytes that go in
and out of operators for each pixel of a view (at least 12, and 3 for each pixel of an image), and
the bytes that must be stored to make the views again.
"""

import functools

import pytest
import torch
from torchvision.transforms import v2

from benchmarks import measure
from bld_ext import SeededAugment, reference

MEAN, STD = (0.5, 0.45, 0.4), (0.25, 0.2, 0.22)
JITTER, HUE, ROTATION, SCALE, PADDING = 0.4, 0.1, 15, (0.9, 1.1), 4
STD_ = torch.tensor(STD)
CHECKED = 20  # number of images whose views are compared with float64
CASES = {"1000x32": (20, 50, 32), "256x224": (256, 1, 224)}  # (images, views, pixels of a side)
CASES = measure.cases(CASES)
AUGMENT = SeededAugment(
    crop_padding=PADDING, flip=0.5, rotation=ROTATION, scale=SCALE,
    jitter=JITTER, hue=HUE, mean=MEAN, std=STD,
)  # fmt: skip


@functools.cache
def torchvision_policy(size):
    return v2.Compose(
        [
            v2.RandomCrop(size, padding=PADDING),
            v2.RandomHorizontalFlip(),
            v2.RandomAffine(ROTATION, scale=SCALE, interpolation=v2.InterpolationMode.BILINEAR),
            v2.ColorJitter(JITTER, JITTER, JITTER, HUE),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )


@functools.cache
def kornia_policy(size):
    import kornia.augmentation as K

    return K.AugmentationSequential(
        K.RandomCrop((size, size), padding=PADDING),
        K.RandomHorizontalFlip(),
        K.RandomAffine(ROTATION, scale=SCALE, p=1.0),
        K.ColorJitter(JITTER, JITTER, JITTER, HUE, p=1.0),
        K.Normalize(torch.tensor(MEAN), torch.tensor(STD)),
        data_keys=["input"],
    ).to(measure.DEVICE)


def repeated(images, views):
    return images.repeat(views, 1, 1, 1)


def torchvision_image(images, views):
    policy = torchvision_policy(images.shape[-1])
    return torch.stack([policy(image) for image in repeated(images, views)])


def torchvision_batch(images, views):
    return torchvision_policy(images.shape[-1])(repeated(images, views))


def kornia(images, views):
    return kornia_policy(images.shape[-1])(repeated(images, views).float() / 255)


def definition(images, views, dtype=torch.float32):
    seed, step = torch.tensor(3), torch.tensor(7)
    policy = AUGMENT.policy.pack()
    return reference.augment(images, policy, seed, step, range(views), None, dtype, False)


def ours(images, views):
    return AUGMENT(images, seed=3, step=7, views=range(views))


IMPLEMENTATIONS = {
    "torchvision-image": torchvision_image,
    "torchvision-batch": torchvision_batch,
    "kornia": kornia,
    "reference": definition,
    "ours": ours,
}


def check(name, found, images, views):
    """Compare our views with float64; of the others, which draw other views, only the mean.

    In float32 the points that pixels show are off by up to 1e-5 pixels in 224 columns, and the
    resulting error is divided by std. The tolerance allows for that.
    """
    N, size = len(images), images.shape[-1]
    assert found.shape == (views * N, 3, size, size) and found.dtype == torch.float32
    assert found.isfinite().all()
    if name in ("reference", "ours"):
        some = images[:CHECKED].double() / 255
        exact = definition(some, views, torch.float64)
        found = found.unflatten(0, (views, N))[:, :CHECKED].flatten(0, 1)
        torch.testing.assert_close(found.double(), exact, rtol=0, atol=2e-6 * size)
    elif name != "torchvision-batch":  # whose single draw says little
        average = ((images.double() / 255).mean((0, 2, 3)).cpu() - torch.tensor(MEAN)) / STD_
        assert (found.mean((0, 2, 3)).double().cpu() - average).abs().max() < 0.7  # black corners
        assert (found.std((0, 2, 3)).double().cpu() > 0.5).all()


def stored_bytes(name, views):
    """Return the bytes that must be kept of a batch to make its views again."""
    if name in ("reference", "ours"):
        return 16  # seed and step
    if name == "kornia":
        return parameter_bytes(kornia_policy(views.shape[-1])._params)
    return views.nbytes  # torchvision does not expose its parameters, so the views themselves


def parameter_bytes(data):
    if isinstance(data, torch.Tensor):
        return data.nbytes
    if isinstance(data, dict):
        data = data.values()
    elif not isinstance(data, (list, tuple)):
        return 0
    return sum(map(parameter_bytes, data))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("op, name", [("augment", name) for name in IMPLEMENTATIONS])
def test_op(benchmark, case, op, name):
    if name == "kornia":
        pytest.importorskip("kornia")
    N, views, size = CASES[case]
    if not benchmark.enabled and (size == 224 or name == "torchvision-image"):
        pytest.skip("takes seconds, and is timed only")
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (N, 3, size, size), generator=generator, dtype=torch.uint8)
    images, run = images.to(measure.DEVICE), IMPLEMENTATIONS[name]
    found = run(images, views)
    check(name, found, images, views)
    nbytes = images.numel() + 4 * views * images.numel()

    benchmark.group = f"{op} {case}"
    with measure.Dispatched() as asked:
        run(images, views)
    benchmark.extra_info.update(
        ops=asked.ops,
        waits=asked.waits,
        bytes_a_pixel=asked.bytes / (views * N * size * size),
        stored_bytes=stored_bytes(name, found),
    )
    del found
    waits = measure.DEVICE.type == "cuda" and name != "ours"
    slow = name == "torchvision-image" or (size == 224 and name != "ours")
    rounds = 3 if slow else 20 if waits else None
    call = functools.partial(run, images, views)
    seconds = measure.time_calls(benchmark, [call], nbytes, rounds)
    measure.record(benchmark, seconds, nbytes, call)
