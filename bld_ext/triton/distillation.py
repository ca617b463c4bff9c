"""head_softmax, distillation_loss, warm_up_loss and joint_loss in one launch each, for float32,
bfloat16 and float16 logits; float64 runs on the reference.

A head of one image is read once, into the registers of as many threads as the widest of the old
heads needs: one up to 16 classes, 8 to 32 of a warp up to 512, all 128 of a program or more beyond.
Where every old head has a multiple of four classes, a thread has four in a row, which it loads and
stores at once where the logits of an image are a multiple of four too. Where an image has several
positions, a program has a block of them by the classes of a head.

The new head is read beside the old ones if it fits there, else in a second walk. It has no say in
who has which class of an old head, because the order in which a softmax is summed must be the same
in the op that fills the bank and in the op that reads it. Programs walk over the tiles; the last
one to finish adds up the losses of all, in order.

Many narrow heads of one width, without other columns, have a kernel of their own in `flat.py`.

Head boundaries are data on the device, so that another number of heads, images or positions runs on
the kernel that is already compiled. A new one is made for other dtypes, for the first task and for
those with old heads, for another width of the widest old head, and of a new head that is not read
beside it (up to 16 classes the next of `STEPS`, beyond the next power of two), and once each for

- old heads that all have a multiple of four classes, with as many columns or not, and others;
- old heads of one width with nothing beside them, and others;
- batches of at most 128 tiles, and of more.
"""

import contextlib
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from bld_ext import reference
from bld_ext.triton import flat
from bld_ext.triton.device_data import kept, on_device, tickets
from bld_ext.triton.softmax import (
    LOG2_E,
    NARROW,
    PROGRAMS,
    WARPS,
    add_loss,
    add_up,
    at_most,
    grad_of,
    in_bits,
    inverse_of,
    join_fours,
    split_fours,
    spread_softmax,
    total_of,
)

WARP, THREADS = 32, 32 * WARPS  # threads of a warp and of a program
STEPS = (2, 3, 4, 5, 6, 8, 10, 12, 16)  # classes of a narrow head that a kernel is compiled for
WIDE = 512  # classes of the widest head that a warp has by itself
MOST_EACH = 16  # classes of a thread of heads that are wider; more take minutes to compile
TILE = 1024  # elements of a tile of positions by classes
REST = 1024  # elements of a tile of columns that get no gradient
IGNORED = tl.constexpr(reference.IGNORED)


# ---- tiles of heads that LANES threads have: EACH tensors [BLOCK, LANES] ----


@triton.jit
def _label(k, LANES: tl.constexpr, RUN: tl.constexpr):
    """[1, LANES]: the class that each thread has as its k-th. A thread has RUN in a row."""
    return k // RUN * RUN * LANES + k % RUN + RUN * tl.arange(0, LANES)[None, :]


@triton.jit
def _fours(ptr, first, size, j, LANES: tl.constexpr):
    """Where each thread's j-th four classes lie, [BLOCK, 4 · LANES], and which of them exist."""
    label = 4 * LANES * j + tl.arange(0, 4 * LANES)[None, :]
    at = tl.multiple_of(ptr + (first + label), [1, ptr.dtype.element_ty.primitive_bitwidth // 2])
    return at, label // 4 < size // 4  # of four all, or none


@triton.jit
def _one(
    ptr, first, size, k, BLOCK: tl.constexpr, LANES: tl.constexpr, RUN: tl.constexpr
):  # fmt: skip
    """Where each thread's k-th class lies, [BLOCK · LANES], and whether it exists.

    In one dimension, so that the compiler leaves a head to the threads that have it by fours.
    """
    label = _label(k, LANES, RUN)
    at, mask = ptr + (first + label), label < size
    return tl.reshape(at, [BLOCK * LANES]), tl.reshape(mask, [BLOCK * LANES])


@triton.jit
def _load(
    ptr, first, size, other, BLOCK: tl.constexpr,
    EACH: tl.constexpr, LANES: tl.constexpr, RUN: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """The classes of heads that begin at `first`: EACH tensors [BLOCK, LANES]."""
    values = ()
    if ALIGNED:
        for j in tl.static_range(EACH // 4):
            at, mask = _fours(ptr, first, size, j, LANES)
            row = tl.load(at, mask=mask, other=other).to(tl.float32)
            values = values + split_fours(tl.reshape(row, [BLOCK, LANES, 4]))
    else:
        for k in tl.static_range(EACH):
            at, mask = _one(ptr, first, size, k, BLOCK, LANES, RUN)
            value = tl.reshape(tl.load(at, mask=mask, other=other), [BLOCK, LANES])
            values = values + (value.to(tl.float32),)
    return values


@triton.jit
def _join_halves(values, HALF: tl.constexpr):
    joined = ()
    for k in tl.static_range(HALF):
        joined = joined + (tl.join(values[k], values[k + HALF]),)
    return joined


@triton.jit
def _side_by_side(values, BLOCK: tl.constexpr, EACH: tl.constexpr, WIDTH: tl.constexpr):
    """[BLOCK, WIDTH] of a tensor a class: what is written in whole pieces of memory."""
    for _ in tl.static_range(EACH, WIDTH):
        values = values + (values[0],)
    if WIDTH >= 16:
        values = _join_halves(values, 8)
    if WIDTH >= 8:
        values = _join_halves(values, 4)
    if WIDTH >= 4:
        values = _join_halves(values, 2)
    values = _join_halves(values, 1)
    return tl.reshape(values[0], [BLOCK, WIDTH])


@triton.jit
def _store(
    ptr, first, size, values, BLOCK: tl.constexpr,
    EACH: tl.constexpr, LANES: tl.constexpr, RUN: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Write what `_load` reads."""
    if ALIGNED:
        for j in tl.static_range(EACH // 4):
            at, mask = _fours(ptr, first, size, j, LANES)
            four = join_fours(
                values[4 * j], values[4 * j + 1], values[4 * j + 2], values[4 * j + 3]
            )
            tl.store(at, tl.reshape(four, [BLOCK, 4 * LANES]), mask=mask)
    elif LANES == 1:
        WIDTH: tl.constexpr = triton.next_power_of_2(EACH)
        label = tl.arange(0, WIDTH)[None, :]
        row = _side_by_side(values, BLOCK, EACH, WIDTH)
        tl.store(ptr + (first + label), row, mask=label < size)
    else:
        for k in tl.static_range(EACH):
            at, mask = _one(ptr, first, size, k, BLOCK, LANES, RUN)
            tl.store(at, tl.reshape(values[k], [BLOCK * LANES]), mask=mask)


@triton.jit
def _image_and_head(pair, heads):
    """The image and the head of a pair, when all pairs are numbered image by image."""
    n = pair // heads
    return n.to(tl.int64), pair - n * heads


@triton.jit
def _images_and_heads(first_n, first_head, heads, BLOCK: tl.constexpr):
    """Those of BLOCK pairs in a row, [BLOCK, 1]."""
    pair = first_head + tl.arange(0, BLOCK)[:, None]
    ahead = ((pair + 0.5) / heads).to(tl.int32)  # pair // heads, exact below 2^20
    return first_n + ahead, pair - ahead * heads


@triton.jit
def _walk(
    logits_ptr, labels_ptr, targets_ptr, bank_ptr, old_grad_ptr, new_grad_ptr, offsets_ptr,
    inverse_tau, N, C, C_old, old_heads, program, tiles, programs,
    OLD: tl.constexpr, NEW: tl.constexpr, BLOCK: tl.constexpr, EACH: tl.constexpr,
    LANES: tl.constexpr, RUN: tl.constexpr, ALIGNED: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """A program's tiles of old heads, of the new one, or of all: bank and gradients.

    Returns the losses of the old heads and of the new one, [BLOCK, LANES].
    """
    old_losses = tl.zeros([BLOCK, LANES], tl.float32)
    new_losses = tl.zeros([BLOCK, LANES], tl.float32)
    if OLD:
        heads = tl.maximum(old_heads + (1 if NEW else 0), 1)
    else:
        heads = 1
        offsets_ptr += old_heads
    width = C // heads
    # from tile to tile without a division; BLOCK * programs is at most 2^18
    first_n, first_head = _image_and_head(program * BLOCK, heads)
    step_n, step_head = _image_and_head(programs * BLOCK, heads)
    for tile in range(program, tiles, programs):
        n, head = _images_and_heads(first_n, first_head, heads, BLOCK)
        if EVEN:
            pair = tl.cast(tile, tl.int64) * BLOCK + tl.arange(0, BLOCK)[:, None]
            size = tl.where(pair < N.to(tl.int64) * heads, width, 0)
            at, at_bank = pair * width, pair * width
        else:
            first = tl.load(offsets_ptr + head)
            size = tl.where(n < N, tl.load(offsets_ptr + head + 1) - first, 0)
            at, at_bank = n * C + first, n * C_old + first
        old_size, new_size, scale = size, size, in_bits(inverse_tau)
        if NEW and OLD:
            is_new = head == old_heads
            old_size, new_size = tl.where(is_new, 0, size), tl.where(is_new, size, 0)
            scale = tl.where(is_new, LOG2_E, scale)
        elif NEW:
            scale = LOG2_E

        z = _load(logits_ptr, at, size, -float("inf"), BLOCK, EACH, LANES, RUN, ALIGNED)
        if OLD and targets_ptr is not None:
            targets = _load(targets_ptr, at_bank, old_size, 0.0, BLOCK, EACH, LANES, RUN, RUN == 4)
        if NEW:
            y = tl.load(labels_ptr + n, mask=new_size > 0, other=IGNORED)
            poison = _poison(y, new_size)
        x, e, inverse, log_sum = spread_softmax(z, scale, EACH, LANES)
        p, old_grad, new_grad = (), (), ()
        for k in tl.static_range(EACH):
            p_k = e[k] * inverse
            p = p + (p_k,)
            old_grad_k, new_grad_k = tl.zeros_like(p_k), tl.zeros_like(p_k)
            if OLD and targets_ptr is not None:
                old_losses = add_loss(old_losses, x[k], log_sum, targets[k])
                old_grad_k = grad_of(p_k, targets[k], inverse_tau)
                if NEW:
                    old_grad_k = tl.where(is_new, 0.0, old_grad_k)
            if NEW:
                label = _label(k, LANES, RUN)
                new_losses += tl.where(_has_loss(label, y, poison), log_sum - x[k] + poison, 0.0)
                new_grad_k = _new_grad(p_k, label, y, poison)
            old_grad, new_grad = old_grad + (old_grad_k,), new_grad + (new_grad_k,)
        if OLD and bank_ptr is not None:
            _store(bank_ptr, at_bank, old_size, p, BLOCK, EACH, LANES, RUN, RUN == 4)
        if old_grad_ptr is not None:
            _store(old_grad_ptr, at, size, old_grad, BLOCK, EACH, LANES, RUN, ALIGNED)
        if new_grad_ptr is not None:
            _store(new_grad_ptr, at, size, new_grad, BLOCK, EACH, LANES, RUN, ALIGNED)

        first_n, first_head = first_n + step_n, first_head + step_head
        over = first_head >= heads
        first_n = tl.where(over, first_n + 1, first_n)
        first_head = tl.where(over, first_head - heads, first_head)
    return old_losses, new_losses


# ---- tiles of one head: [CLASSES, BLOCK positions] ----


@triton.jit
def _softmax(z, scale):
    """As `spread_softmax`, of heads along axis 0: x, softmax and log2 Σ 2^x."""
    x = (z - tl.max(z, 0, keep_dims=True)) * scale
    e = tl.exp2(x)
    ones = tl.sum((x == 0).to(tl.int32), 0, keep_dims=True)
    others = tl.sum(tl.where(x == 0, 0.0, e), 0, keep_dims=True)
    inverse, log_sum = total_of(ones, others)
    return x, e * inverse, log_sum


@triton.jit
def _place(tile, offsets_ptr, S, heads, BLOCK: tl.constexpr, CLASSES: tl.constexpr):
    """Image n, classes of the head, its columns, positions s; its size; which elements exist."""
    blocks = tl.cdiv(S, BLOCK)
    pair = tile // blocks
    n = pair // heads
    head = pair - n * heads
    s = ((tile - pair * blocks) * BLOCK + tl.arange(0, BLOCK))[None, :]
    first = tl.load(offsets_ptr + head)
    size = tl.load(offsets_ptr + head + 1) - first
    label = tl.arange(0, CLASSES)[:, None]
    column = first.to(tl.int64) + label
    return n.to(tl.int64), label, column, s, size, (s < S) & (label < size)


@triton.jit
def _walk_old_blocks(
    logits_ptr, targets_ptr, bank_ptr, old_grad_ptr, new_grad_ptr, offsets_ptr,
    inverse_tau, C, C_old, S, heads, program, tiles, programs,
    BLOCK: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    """A program's tiles of old heads: bank and gradients; returns a tile of losses."""
    losses = tl.zeros([CLASSES, BLOCK], tl.float32)
    for tile in range(program, tiles, programs):
        n, label, column, s, size, mask = _place(tile, offsets_ptr, S, heads, BLOCK, CLASSES)
        at, at_bank = (n * C + column) * S + s, (n * C_old + column) * S + s
        z = tl.load(logits_ptr + at, mask=mask, other=-float("inf")).to(tl.float32)
        x, p, log_sum = _softmax(z, in_bits(inverse_tau))
        if bank_ptr is not None:
            tl.store(bank_ptr + at_bank, p, mask=mask)
        if targets_ptr is not None:
            target = tl.load(targets_ptr + at_bank, mask=mask, other=0.0)
            losses = add_loss(losses, x, log_sum, target)
            tl.store(old_grad_ptr + at, grad_of(p, target, inverse_tau), mask=mask)
        if new_grad_ptr is not None:
            tl.store(new_grad_ptr + at, tl.zeros_like(p), mask=mask)
    return losses


@triton.jit
def _walk_new_blocks(
    logits_ptr, labels_ptr, old_grad_ptr, new_grad_ptr, offsets_ptr, old_heads,
    C, S, program, tiles, programs, BLOCK: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    """As `_walk_old_blocks`, for the new head."""
    losses = tl.zeros([CLASSES, BLOCK], tl.float32)
    for tile in range(program, tiles, programs):
        n, label, column, s, size, mask = _place(
            tile, offsets_ptr + old_heads, S, 1, BLOCK, CLASSES
        )
        at = (n * C + column) * S + s
        y = tl.load(labels_ptr + n * S + s, mask=s < S, other=IGNORED)
        z = tl.load(logits_ptr + at, mask=mask, other=-float("inf")).to(tl.float32)
        x, p, log_sum = _softmax(z, LOG2_E)
        poison = _poison(y, size)
        losses += tl.where(_has_loss(label, y, poison), log_sum - x + poison, 0.0)
        tl.store(new_grad_ptr + at, _new_grad(p, label, y, poison), mask=mask)
        if old_grad_ptr is not None:
            tl.store(old_grad_ptr + at, tl.zeros_like(p), mask=mask)
    return losses


@triton.jit
def _walk_rest(
    grad_ptr, N, C, C_old, S, width, program, tiles, programs, BLOCK: tl.constexpr
):  # fmt: skip
    """Columns behind the old heads that get no gradient: `width` elements of an image."""
    for tile in range(program, tiles, programs):
        start = tl.cast(tile, tl.int64) * BLOCK
        first_n = start // width
        place = (start - first_n * width).to(width.dtype) + tl.arange(0, BLOCK)
        n = first_n + place // width
        at = (n * C + C_old) * S + place % width
        tl.store(grad_ptr + at, tl.zeros([BLOCK], tl.float32), mask=n < N)


# ---- the loss of the new head ----


@triton.jit
def _poison(y, size):
    """nan where y is no class of the head, else 0."""
    return tl.where((y >= 0) & (y < size), 0.0, float("nan"))


@triton.jit
def _has_loss(label, y, poison):
    """Whether the loss of y stands in the class `label`: in 0 where y is no class, if it counts."""
    return (y == label) | ((label == 0) & (poison != 0) & (y != IGNORED))


@triton.jit
def _new_grad(p, label, y, poison):
    """The gradient of the cross-entropy of y in the class `label`."""
    return tl.where(y == IGNORED, 0.0, p - tl.where(y == label, 1.0, 0.0) + poison)


@triton.jit(
    do_not_specialize=["N", "C", "C_old", "S", "rest", "old_heads", "old_tiles", "new_tiles",
                       "temperature"],
    do_not_specialize_on_alignment=[
        "logits_ptr", "labels_ptr", "targets_ptr", "bank_ptr", "old_grad_ptr", "new_grad_ptr",
        "old_loss_ptr", "new_loss_ptr", "partials_ptr", "ticket_ptr", "offsets_ptr", "temperature",
    ],
)  # fmt: skip
def heads_kernel(
    logits_ptr,  # [N, C, S]
    labels_ptr,  # [N, S], of the head behind the old ones
    targets_ptr,  # [N, C_old, S], the bank to distil from
    bank_ptr,  # [N, C_old, S], the bank to fill
    old_grad_ptr,  # [N, C, S], of the distillation loss
    new_grad_ptr,  # [N, C, S], of the cross-entropy
    old_loss_ptr,
    new_loss_ptr,
    partials_ptr,  # [2, programs]
    ticket_ptr,
    offsets_ptr,  # [heads + 1], the column at which each head begins
    temperature,  # a number or a pointer to one
    N,
    C,
    C_old,
    S,
    rest,  # elements of an image that get no gradient, of 64 bits if they are very many
    old_heads,
    old_tiles,  # of all heads, if TOGETHER
    new_tiles,  # of the new head by itself, or of the rest
    TOGETHER: tl.constexpr,  # the new head is in the tiles of the old ones
    OLD_BLOCK: tl.constexpr,
    OLD_EACH: tl.constexpr,
    OLD_LANES: tl.constexpr,  # 0: a block of positions by classes
    NEW_BLOCK: tl.constexpr,
    NEW_EACH: tl.constexpr,
    NEW_LANES: tl.constexpr,
    REST: tl.constexpr,  # elements of a tile of the rest
    RUN: tl.constexpr,  # classes in a row that a thread has: 4 if all old heads have whole fours
    ALIGNED: tl.constexpr,  # and so have the logits of an image
    EVEN: tl.constexpr,  # the old heads have one width, and nothing is beside them
    ON_DEVICE: tl.constexpr,  # temperature is a pointer
    PROGRAMS: tl.constexpr,  # at most; a power of two
):
    """A pointer that is None leaves its part out."""
    inverse_tau = inverse_of(temperature, ON_DEVICE)
    program = tl.program_id(0)
    programs = tl.num_programs(0)

    old_losses, new_losses = 0.0, 0.0
    if OLD_LANES == 0:
        old_losses = _walk_old_blocks(
            logits_ptr, targets_ptr, bank_ptr, old_grad_ptr, new_grad_ptr, offsets_ptr,
            inverse_tau, C, C_old, S, old_heads, program, old_tiles, programs,
            OLD_BLOCK, OLD_EACH,
        )  # fmt: skip
    else:
        old_losses, new_losses = _walk(
            logits_ptr, labels_ptr, targets_ptr, bank_ptr, old_grad_ptr, new_grad_ptr, offsets_ptr,
            inverse_tau, N, C, C_old, old_heads, program, old_tiles, programs,
            True, TOGETHER, OLD_BLOCK, OLD_EACH, OLD_LANES, RUN, ALIGNED, EVEN,
        )  # fmt: skip

    # the programs that had one tile less begin
    begin = (program + programs - (old_tiles % programs).to(tl.int32)) % programs
    if labels_ptr is None:
        if old_grad_ptr is not None and not EVEN:
            _walk_rest(old_grad_ptr, N, C, C_old, S, rest, begin, new_tiles, programs, REST)
    elif NEW_LANES == 0:
        new_losses = _walk_new_blocks(
            logits_ptr, labels_ptr, old_grad_ptr, new_grad_ptr, offsets_ptr, old_heads,
            C, S, begin, new_tiles, programs, NEW_BLOCK, NEW_EACH,
        )  # fmt: skip
    elif not TOGETHER:
        _, new_losses = _walk(
            logits_ptr, labels_ptr, targets_ptr, bank_ptr, old_grad_ptr, new_grad_ptr, offsets_ptr,
            inverse_tau, N, C, C_old, old_heads, begin, new_tiles, programs,
            False, True, NEW_BLOCK, NEW_EACH, NEW_LANES, 4 if ALIGNED else 1, ALIGNED, False,
        )  # fmt: skip

    if partials_ptr is not None:
        add_up(
            old_losses, new_losses, old_loss_ptr, new_loss_ptr, partials_ptr, ticket_ptr,
            program, programs, PROGRAMS,
        )  # fmt: skip


def offsets(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """Where each head begins, and where the last one ends, on the device."""
    return kept(
        sizes,
        device,
        "head_sizes",
        lambda: torch.tensor([0, *accumulate(sizes)], dtype=torch.int32),
    )


class Tile(NamedTuple):
    """BLOCK heads, each spread over LANES threads that have EACH of its classes.

    With no lanes: BLOCK positions by EACH classes of one head.
    """

    block: int
    each: int
    lanes: int

    def count(self, N: int, S: int, heads: int) -> int:
        """How many tiles a batch has."""
        if self.lanes == 0:
            return N * heads * triton.cdiv(S, self.block)
        return triton.cdiv(N * heads, self.block)


def tile_shape(sizes: Sequence[int], S: int = 1) -> Tile:
    """The tile that holds the widest head."""
    widest = max(sizes, default=4)
    classes = max(2, triton.next_power_of_2(widest))
    if S > 1:
        return Tile(max(1, TILE // classes), classes, 0)
    if classes <= NARROW:
        each = next(step for step in STEPS if step >= widest)
        return Tile(THREADS * max(1, 4 // each), each, 1)
    lanes = min(classes // 4, WARP)
    if classes > WIDE:
        lanes = max(THREADS, classes // MOST_EACH)
    each = classes // lanes
    return Tile(max(1, THREADS // lanes * max(1, 8 // each)), each, lanes)


class Plan(NamedTuple):
    """How the heads of a batch are read."""

    old: Tile
    new: Tile
    together: bool  # the new head is read in the tiles of the old ones
    run: int
    aligned: bool
    even: bool

    def constants(self) -> dict[str, int | bool]:
        """What the kernel is compiled for."""
        tiles = {"OLD": self.old, "NEW": self.old if self.together else self.new}.items()
        shapes = {f"{name}_{k.upper()}": v for name, t in tiles for k, v in t._asdict().items()}
        own = dict(TOGETHER=self.together, RUN=self.run, ALIGNED=self.aligned, EVEN=self.even)
        return shapes | own | dict(REST=REST)


def plan(head_sizes: Sequence[int], C: int, labelled: bool, S: int = 1) -> Plan:
    """The plan for these old heads in C columns, with a new one behind them if `labelled`.

    The run depends on nothing but the old heads: it says in which order they are summed.
    """
    new_sizes = [C - sum(head_sizes)] if labelled else []
    old, new = tile_shape(head_sizes, S), tile_shape(new_sizes, S)
    together = bool(head_sizes and new_sizes)
    together &= old.lanes == new.lanes > 0 and new.each <= old.each
    run = 4 if old.lanes > 0 and all(size % 4 == 0 for size in head_sizes) else 1
    even = old.lanes > 0 and len({*head_sizes}) == 1 and sum(head_sizes) == C
    return Plan(old, new, together, run, run == 4 and C % 4 == 0, even)


def _whole(tensor: Tensor, aligned: bool) -> Tensor:
    """Without gaps; if `aligned`, from a place in memory where four elements begin."""
    tensor = tensor.contiguous()
    return tensor.clone() if aligned and tensor.data_ptr() % (4 * tensor.itemsize) else tensor


def _check(logits, head_sizes, labels, targets):
    """Refuses what would make the kernel leave its buffers."""
    (N, C), C_old = logits.shape[:2], sum(head_sizes)
    if C_old > C or min(head_sizes, default=1) < 1:
        raise ValueError(f"head_sizes: expected sizes with a sum of at most {C}, got {head_sizes}")
    if targets is not None and (
        targets.shape != (N, C_old, *logits.shape[2:]) or targets.dtype != torch.float32
    ):
        raise ValueError(f"bank: expected float32 [N, {C_old}, *], got {targets.shape}")
    if labels is not None and (
        labels.shape != (N, *logits.shape[2:]) or labels.dtype != torch.int64
    ):
        raise ValueError(f"labels: expected int64 [N, *], got {labels.dtype} {labels.shape}")


def _launch(logits, head_sizes, temperature, labels=None, targets=None, bank=None):
    """One launch: fills `bank`; returns the losses and the gradients, of labels and of targets."""
    _check(logits, head_sizes, labels, targets)
    (N, C), C_old = logits.shape[:2], sum(head_sizes)
    S = logits.numel() // max(1, N * C)
    wanted = [labels is not None, targets is not None]
    like = dict(dtype=torch.float32, device=logits.device)
    losses = [torch.empty((), **like) if want else None for want in wanted]
    grads = [torch.empty(logits.shape, **like) if want else None for want in wanted]

    heads, new = len(head_sizes), [] if labels is None else [C - C_old]
    how = plan(head_sizes, C, bool(new), S)
    old_tiles, new_tiles = how.old.count(N, S, heads + how.together), 0
    if new and not how.together:
        new_tiles = how.new.count(N, S, 1)
    elif targets is not None and not new:
        new_tiles = triton.cdiv(N * (C - C_old) * S, REST)
    if not logits.numel() or not old_tiles + new_tiles:
        return [loss if loss is None else loss.zero_() for loss in losses], grads
    programs = min(old_tiles + new_tiles, PROGRAMS)
    partials = torch.empty(2, programs, **like) if any(wanted) else None
    by_pointer = on_device(temperature, logits.device)
    guard = torch.cuda.device(logits.device) if logits.is_cuda else contextlib.nullcontext()
    with guard:
        heads_kernel[(programs,)](
            _whole(logits, how.aligned),
            None if labels is None else labels.contiguous(),
            None if targets is None else _whole(targets, how.run == 4),
            bank, grads[1], grads[0], losses[1], losses[0], partials,
            tickets(logits.device) if any(wanted) else None,
            offsets((*head_sizes, *new), logits.device),
            temperature if by_pointer else temperature.item(),
            N, C, C_old, S, (C - C_old) * S, heads, old_tiles, new_tiles,
            **how.constants(),
            ON_DEVICE=by_pointer,
            PROGRAMS=at_most(programs) if any(wanted) else PROGRAMS,
            num_warps=WARPS,
            enable_fp_fusion=False,  # p - target is not fused with what makes p
        )  # fmt: skip
    return losses, grads


def _empty_bank(logits, head_sizes):
    shape = (logits.shape[0], sum(head_sizes), *logits.shape[2:])
    return torch.empty(shape, dtype=torch.float32, device=logits.device)


def head_softmax(logits, head_sizes, temperature):
    if logits.dtype == torch.float64:
        return reference.head_softmax(logits, head_sizes, temperature)
    bank = _empty_bank(logits, head_sizes)
    if flat.is_flat(logits, head_sizes):
        flat.launch(logits, head_sizes[0], temperature, bank=bank)
    else:
        _launch(logits, head_sizes, temperature, bank=bank)
    return bank


def distillation_loss(logits, bank, head_sizes, temperature):
    if logits.dtype == torch.float64:
        return reference.distillation_loss(logits, bank, head_sizes, temperature)
    if flat.is_flat(logits, head_sizes, bank):
        _check(logits, head_sizes, None, bank)
        return flat.launch(logits, head_sizes[0], temperature, targets=bank)
    (_, loss), (_, grad) = _launch(logits, head_sizes, temperature, targets=bank)
    return loss, grad


def warm_up_loss(logits, labels, head_sizes, temperature):
    if logits.dtype == torch.float64:
        return reference.warm_up_loss(logits, labels, head_sizes, temperature)
    bank = _empty_bank(logits, head_sizes[:-1])
    (loss, _), (grad, _) = _launch(logits, head_sizes[:-1], temperature, labels, bank=bank)
    return loss, bank, grad


def joint_loss(logits, labels, bank, head_sizes, temperature):
    if logits.dtype == torch.float64:
        return reference.joint_loss(logits, labels, bank, head_sizes, temperature)
    losses, grads = _launch(logits, head_sizes[:-1], temperature, labels, targets=bank)
    return *losses, *grads
