"""Times the losses beside plain PyTorch: `pytest benchmarks --benchmark-enable`.

A case is named rows x heads x classes of a head. A call computes the losses and their gradients
with respect to the logits. Each implementation is checked against float64 before it is timed.
"""

import pytest
import torch
from torch.nn import functional as F

from benchmarks import measure
from bld_ext import ops, reference

TAU = 2.0
CASES = {"20x20x5": (20, [5] * 20), "1000x20x5": (1_000, [5] * 20)}
if measure.DEVICE.type == "cuda":
    CASES |= {"1000x200x5": (1_000, [5] * 200), "1000x10x100": (1_000, [100] * 10)}
    CASES |= {"100000x20x5": (100_000, [5] * 20), "1000000x20x5": (1_000_000, [5] * 20)}
else:
    CASES |= {"1000x4x2": (1_000, [2] * 4), "100000x4x2": (100_000, [2] * 4)}
    CASES |= {"20000x2x100": (20_000, [100] * 2)}
CASES = measure.cases(CASES)
# Bytes that an op has to move for each float32 logit, in the old columns and in the new ones.
BYTES = {"head_softmax": (8, 0), "distillation": (12, 0), "warm_up": (12, 8), "joint": (16, 12)}


# ---- (log) softmax of every head, as written without the op ----


def loop(logits, sizes, tau, function=torch.log_softmax):
    parts, first = [], 0
    for size in sizes:
        parts.append(function(logits[:, first : first + size] / tau, 1))
        first += size
    return torch.cat(parts, 1)


def split(logits, sizes, tau, function=torch.log_softmax):
    return torch.cat([function(head, 1) for head in (logits / tau).split(sizes, 1)], 1)


def reshape(logits, sizes, tau, function=torch.log_softmax):
    """Compute all heads at once, if they have one size."""
    heads = logits.reshape(len(logits), len(sizes), sizes[0]) / tau
    return function(heads, 2).flatten(1)


def loop_loss(logits, bank, sizes, tau):
    """Compute one loss for each head and sum them in Python."""
    loss, first = 0, 0
    for size in sizes:
        head = slice(first, first + size)
        loss = loss - (bank[:, head] * torch.log_softmax(logits[:, head] / tau, 1)).sum()
        first += size
    return loss


def loss_of(log_softmax):
    return lambda logits, bank, sizes, tau: -(bank * log_softmax(logits, sizes, tau)).sum()


def liger_loss(logits, bank, sizes, tau):
    """Compute the loss as Liger-Kernel's KL divergence over reshaped heads plus the entropy."""
    from liger_kernel.ops import LigerKLDivLossFunction

    log_p = (logits.reshape(-1, sizes[0]) / tau).log_softmax(1)
    target = bank.reshape(-1, sizes[0])
    divergence = LigerKLDivLossFunction.apply(log_p, target, "sum", False, 1e-30)
    return divergence - torch.xlogy(target, target).sum()


LOSSES = {
    "loop": loop_loss,
    "split": loss_of(split),
    "reshape": loss_of(reshape),
    "compile-split": loss_of(split),
    "compile-reshape": loss_of(reshape),
    "liger": liger_loss,
}
SOFTMAXES = {"loop": loop, "split": split, "reshape": reshape}
SOFTMAXES |= {"compile-split": split, "compile-reshape": reshape}


# ---- the ops, each as one call: (name of the implementation) -> function of the inputs ----


def head_softmax(name):
    if name == "ours":
        return lambda z, y, bank, sizes: [ops.head_softmax(z.detach(), sizes, TAU)]
    function = compiled(SOFTMAXES[name], name)
    return lambda z, y, bank, sizes: [function(z.detach(), sizes, TAU, torch.softmax)]


def distillation(name):
    if name == "ours-op":  # the op alone, without autograd: one launch for loss and gradient
        tau = torch.tensor(TAU, dtype=torch.float64)
        op = torch.ops.bld_ext.distillation_loss
        return lambda z, y, bank, sizes: op(z.detach(), bank, sizes, tau)
    function = ops.distillation_loss if name == "ours" else compiled(LOSSES[name], name)

    def run(z, y, bank, sizes):
        loss = function(z, bank, sizes, TAU)
        return [loss.detach(), *torch.autograd.grad(loss, z)]

    return run


def warm_up(name):
    def eager(z, y, sizes):
        old = z.shape[1] - sizes[-1]
        loss = F.cross_entropy(z[:, old:], y, reduction="sum")
        return loss, SOFTMAXES[name](z.detach()[:, :old], sizes[:-1], TAU, torch.softmax)

    def ours(z, y, sizes):
        return ops.warm_up_loss(z, y, sizes, TAU)

    function = ours if name == "ours" else compiled(eager, name)

    def run(z, y, bank, sizes):
        loss, filled = function(z, y, sizes)
        return [loss.detach(), filled, *torch.autograd.grad(loss, z)]

    return run


def joint(name):
    def eager(z, y, bank, sizes):
        old = z.shape[1] - sizes[-1]
        new_loss = F.cross_entropy(z[:, old:], y, reduction="sum")
        return new_loss, LOSSES[name](z[:, :old], bank, sizes[:-1], TAU)

    def ours(z, y, bank, sizes):
        return ops.joint_loss(z, y, bank, sizes, TAU)

    function = ours if name == "ours" else compiled(eager, name)

    def run(z, y, bank, sizes):
        new, old = function(z, y, bank, sizes)
        (new_grad,) = torch.autograd.grad(new, z, retain_graph=True)
        return [new.detach(), old.detach(), new_grad, *torch.autograd.grad(old, z)]

    return run


OPS = {f.__name__: f for f in (head_softmax, distillation, warm_up, joint)}


def compiled(function, name):
    if not name.startswith("compile"):
        return function
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True)


# ---- inputs, the answer, the measurement ----


def old_heads(op, sizes):
    return sizes[:-1] if op in ("warm_up", "joint") else sizes


def make_inputs(N, sizes, op, seed):
    on = dict(generator=torch.Generator(measure.DEVICE).manual_seed(seed), device=measure.DEVICE)
    logits, others = 2 * torch.randn(2, N, sum(sizes), **on)
    labels = torch.randint(sizes[-1], (N,), **on)
    bank = reference.head_softmax(others, old_heads(op, sizes), TAU)
    return logits.requires_grad_(), labels, bank, sizes


def answer(op, z, y, bank, sizes):
    """Return the exact results, from the reference in float64."""
    z, bank = z.detach().double(), bank.double()
    if op == "head_softmax":
        return [reference.head_softmax(z, sizes, TAU)]
    if op == "distillation":
        return reference.distillation_loss(z, bank, sizes, TAU)
    if op == "warm_up":
        return reference.warm_up_loss(z, y, sizes, TAU)
    return reference.joint_loss(z, y, bank, sizes, TAU)


def implementations(op):
    names = [*SOFTMAXES, "ours"] if op in ("head_softmax", "warm_up") else [*LOSSES, "ours"]
    return [*names, "ours-op"] if op == "distillation" else names


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("op, name", [(op, name) for op in OPS for name in implementations(op)])
def test_op(benchmark, case, op, name):
    N, sizes = CASES[case]
    if name.startswith("compile") and not benchmark.enabled:
        pytest.skip("compiles for seconds, and is timed only")
    if name == "compile-split" and len(sizes) > 20:
        pytest.skip("torch.compile takes minutes for as many heads")
    if name == "liger":
        pytest.importorskip("liger_kernel")
        if measure.DEVICE.type == "cpu":
            pytest.skip("Liger-Kernel needs a GPU")
    old = sum(old_heads(op, sizes))
    nbytes = N * (BYTES[op][0] * old + BYTES[op][1] * (sum(sizes) - old))
    run = OPS[op](name)
    sets = [make_inputs(N, sizes, op, seed) for seed in range(measure.copies(nbytes))]
    loss_rtol = 2e-6 if name.startswith("ours") else 2e-5
    for value, exact in zip(run(*sets[0]), answer(op, *sets[0]), strict=True):
        rtol, atol = (loss_rtol, 0) if exact.dim() == 0 else (2e-6, 2e-6)
        torch.testing.assert_close(value.double(), exact, rtol=rtol, atol=atol)

    benchmark.group = f"{op} {case}"
    # Liger-Kernel copies a number from the CPU in its backward pass, which no graph can record
    rounds = 50 if name == "liger" else None
    seconds = measure.time_calls(benchmark, [lambda s=s: run(*s) for s in sets], nbytes, rounds)
    measure.record(benchmark, seconds, nbytes, lambda: run(*sets[0]))
