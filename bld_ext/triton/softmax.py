"""What the kernels of the losses share: a head's softmax, and sums over all programs."""

import triton
import triton.language as tl

WARPS = 4
NARROW = 16  # classes of the widest head that a thread has by itself
MANY = 2**17  # narrow heads in a batch from which on a thread has several at a time
PROGRAMS = 1024  # at most; a power of two


@triton.jit
def inverse_of(temperature, ON_DEVICE: tl.constexpr):
    """1 / τ, and nan where τ is no temperature."""
    if ON_DEVICE:
        tau = tl.load(temperature).to(tl.float32)
    else:
        tau = temperature
    # of a tiny τ finite, so that 0 / τ stays 0
    inverse_tau = tl.minimum(1.0 / tau, 3.4028234e38)
    return tl.where((tau > 0) & (tau < float("inf")), inverse_tau, float("nan"))


@triton.jit
def log_total(ones, others):
    """log(1 + a) = log(s) a / (s - 1) with s the rounded 1 + a, as Kahan has it."""
    total, a = others + ones, others + (ones - 1)
    return tl.where(total == 1, a, tl.log(total) * (a / (total - 1)))


@triton.jit
def spread_softmax(z, inverse_temperature, EACH: tl.constexpr, LANES: tl.constexpr):
    """x = (z - max) / τ and e^x, EACH tensors as z has them; Σ e^x and log Σ e^x.

    A head lies in LANES threads, along axis 1 of each tensor. A thread adds up what it has, then
    the threads add up theirs, so the order depends on LANES alone: not on how many heads a tile
    has, nor on EACH.
    """
    top = z[0]
    for k in tl.static_range(1, EACH):
        top = tl.maximum(top, z[k])
    if LANES > 1:
        top = tl.max(top, 1, keep_dims=True)
    x, e = (), ()
    # the largest, where e^x = 1, are counted apart: log Σ e^x keeps its digits where it is near 0
    ones, others = tl.zeros_like(z[0]), tl.zeros_like(z[0])
    for k in tl.static_range(EACH):
        x_k = (z[k] - top) * inverse_temperature
        e_k = tl.exp(x_k)  # 0 beside the head, where z = -inf
        x, e = x + (x_k,), e + (e_k,)
        ones += tl.where(x_k == 0, 1.0, 0.0)
        others += tl.where(x_k == 0, 0.0, e_k)
    if LANES > 1:
        ones = tl.sum(ones, 1, keep_dims=True)
        others = tl.sum(others, 1, keep_dims=True)
    return x, e, others + ones, log_total(ones, others)


@triton.jit
def loss_of(x, log_sum, target):
    # a target of 0 contributes nothing, even where x = -inf
    return tl.where(target != 0, target * (log_sum - x), 0.0)


@triton.jit
def grad_of(p, target, inverse_tau):
    # exactly 0 where the targets were made from the same logits
    return (p - target) * inverse_tau


@triton.jit
def sum_of(partials_ptr, mask):
    # .cg: past the first-level cache, which may hold what was there before
    partials = tl.load(partials_ptr, mask, 0.0, cache_modifier=".cg")
    return tl.sum(partials.to(tl.float64))


@triton.jit
def add_up(
    old_losses, new_losses, old_loss_ptr, new_loss_ptr, partials_ptr, ticket_ptr, program, programs,
    PROGRAMS: tl.constexpr,
):  # fmt: skip
    """The last program to finish adds up the losses of all, in order."""
    if old_loss_ptr is not None:
        tl.store(partials_ptr + program, tl.sum(old_losses))
    if new_loss_ptr is not None:
        tl.store(partials_ptr + programs + program, tl.sum(new_losses))
    tl.debug_barrier()
    if tl.atomic_add(ticket_ptr, 1, sem="acq_rel", scope="gpu") == programs - 1:
        tl.store(ticket_ptr, 0)
        each = tl.arange(0, PROGRAMS)
        if old_loss_ptr is not None:
            tl.store(old_loss_ptr, sum_of(partials_ptr + each, each < programs))
        if new_loss_ptr is not None:
            tl.store(new_loss_ptr, sum_of(partials_ptr + programs + each, each < programs))


def at_most(programs: int) -> int:
    """The programs for which `add_up` is compiled: two cases, so that few partials take no time."""
    return 128 if programs <= 128 else PROGRAMS
