"""The compiled kernels return the same bits on every processor: known answers, seen on x86-64 with
SSE2, AVX2 and AVX-512, and on 64-bit ARM in an emulator."""

import hashlib

import pytest
import torch
from conftest import AUGMENTS

from bld_ext import SeededAugment, backend, ops

KNOWN = {
    "views": "2404754b67e7413b",
    "losses": "313a906972d807d5",
    "norms": "5ddc2355cac8da58",
    "batch_norm": "7f869934effa0983",
}


def numbers(*shape):
    """Of a generator whose integers do not depend on the processor, as those of randn do."""
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randint(-3000, 3000, shape, generator=generator) / 997


def views():
    for settings in (AUGMENTS[name] for name in AUGMENTS if name != "far-away"):  # for few pixels
        for shape in ((3, 3, 32, 32), (2, 3, 17, 23)):
            images = (numbers(*shape) * 997 % 256).to(torch.uint8)
            yield SeededAugment(**settings)(images, seed=7, step=3, views=range(4))


def losses():
    for sizes in ([5, 8], [2, 2, 2, 2], [100, 3], [700]):
        logits, teacher = numbers(64, sum(sizes)), numbers(65, sum(sizes))[1:]
        bank = ops.head_softmax(teacher, sizes, 2.0)
        yield bank
        yield from ops.distillation_loss(logits, bank, sizes, 2.0, with_gradient=True)
        labels = torch.arange(64) % sizes[-1]
        yield from ops.warm_up_loss(logits, labels, sizes, 2.0, with_gradient=True)


def norms():
    tensors, layers = [numbers(3, 5), numbers(10_000), numbers(7, 7, 3)], [0, 1, 1]
    found = ops.layer_norms(tensors, layers)
    yield found
    yield from ops.balance_layers_(tensors, layers, found.flip(0), 2.0)
    yield from tensors


def batch_norm():
    for relu, shape in ((True, (8, 6, 9, 9)), (False, (8, 40))):
        weight, bias = numbers(shape[1]), numbers(shape[1] + 1)[1:]
        yield from ops.view_batch_norm(numbers(*shape), weight, bias, views=2, eps=1e-5, relu=relu)


@pytest.mark.parametrize("made", [views, losses, norms, batch_norm])
def test_same_bits_on_every_processor(made):
    op = {"views": "augment", "losses": "distillation_loss", "norms": "layer_norms"}
    if backend(op.get(made.__name__, "view_batch_norm")) != "compiled":
        pytest.skip("torch's functions, of which the reference is made, round as they like")
    digest = hashlib.sha256()
    for tensor in made():
        digest.update(tensor.contiguous().numpy().tobytes())
    assert digest.hexdigest()[:16] == KNOWN[made.__name__]
