"""What the kernels of the losses share: a head's softmax, and sums over all programs."""

import triton
import triton.language as tl

WARPS = 4
NARROW = 16  # classes of the widest head that a thread has by itself
MANY = 2**17  # narrow heads in a batch from which on a thread has several at a time
PROGRAMS = 1024  # at most; a power of two
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


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
def split_fours(four):
    """The four tensors [...] of one [..., 4]: what a thread moves in 16 bytes."""
    even, odd = tl.split(tl.reshape(four, four.shape[:-1] + (2, 2)))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def join_fours(first, second, third, fourth):
    """What `split_fours` takes apart."""
    pairs = tl.join(tl.join(first, third), tl.join(second, fourth))
    return tl.reshape(pairs, first.shape + (4,))


@triton.jit
def in_bits(inverse_tau):
    """log2(e) / τ: e^((z - max) / τ) is 2 to the power of (z - max) times this."""
    return tl.minimum(inverse_tau * LOG2_E, 3.4028234e38, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def total_of(ones, others):
    """1 / (1 + a) and log2(1 + a), where 1 + a is the sum of `others` and of as many ones.

    Of s, the rounded 1 + a, the logarithm is corrected by what the rounding took away, which is all
    of it where a is tiny.
    """
    ones = ones.to(tl.float32)
    total = others + ones
    inverse = 1 / total
    lost = others + (ones - 1) - (total - 1)
    return inverse, tl.fma(lost * LOG2_E, inverse, tl.log2(total))


@triton.jit
def spread_softmax(z, scale, EACH: tl.constexpr, LANES: tl.constexpr):
    """x = scale (z - max) and 2^x, EACH tensors as z has them; 1 / Σ 2^x and log2 Σ 2^x.

    In bits a difference of logits over τ is finite up to 2.3e38, not 3.4e38.

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
    # the largest, where 2^x = 1, are counted apart: log Σ 2^x keeps its digits where it is near 0
    ones, others = tl.zeros_like(z[0]).to(tl.int32), tl.zeros_like(z[0])
    for k in tl.static_range(EACH):
        x_k = (z[k] - top) * scale
        e_k = tl.exp2(x_k)  # 0 beside the head, where z = -inf
        x, e = x + (x_k,), e + (e_k,)
        ones += (x_k == 0).to(tl.int32)
        others += tl.where(x_k == 0, 0.0, e_k)
    if LANES > 1:
        ones = tl.sum(ones, 1, keep_dims=True)
        others = tl.sum(others, 1, keep_dims=True)
    inverse, log = total_of(ones, others)
    return x, e, inverse, log


@triton.jit
def add_loss(losses, x, log_sum, target):
    """`losses` and target (log_sum - x), in bits."""
    # a target of 0 contributes nothing, even where x = -inf
    return tl.fma(target, tl.where(target != 0, log_sum - x, 0.0), losses)


@triton.jit
def grad_of(p, target, inverse_tau):
    # exactly 0 where the targets were made from the same logits
    return (p - target) * inverse_tau


@triton.jit
def sum_of(partials_ptr, mask):
    """From bits."""
    # .cg: past the first-level cache, which may hold what was there before
    partials = tl.load(partials_ptr, mask, 0.0, cache_modifier=".cg")
    return tl.sum(partials.to(tl.float64)) * LN_2


@triton.jit
def add_up(
    old_losses, new_losses, old_loss_ptr, new_loss_ptr, partials_ptr, ticket_ptr, program, programs,
    PROGRAMS: tl.constexpr,
):  # fmt: skip
    """The last program to finish adds up the losses of all, in bits, in order."""
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
