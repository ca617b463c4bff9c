"""head_softmax, distillation_loss, warm_up_loss and joint_loss in one launch each, for float32,
bfloat16 and float16 logits; float64 runs on the reference.

A tile is a block of (image, head) pairs by the classes of the widest head, or, where an image has
several positions, of positions of one pair by classes. Heads of few classes are narrow: a thread
has a whole one in its registers. Old heads have tiles of their own, because their shape decides the
order in which a softmax is summed: it must be the same in the op that fills the bank and in the op
that reads it. Programs walk over the tiles; the last one to finish adds up the losses of all, in
order.

Many narrow heads of one width, without other columns, have a kernel of their own in `flat.py`.

Head boundaries are data on the device, so that another number of heads, images or positions runs on
the kernel that is already compiled; only a head wider than all before, to the next power of two, or
a batch of very many narrow heads makes a new one.
"""

import contextlib
from collections.abc import Sequence
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

from bld_ext import reference
from bld_ext.triton import flat
from bld_ext.triton.device_data import kept, tickets
from bld_ext.triton.softmax import (
    MANY,
    NARROW,
    PROGRAMS,
    WARPS,
    add_up,
    grad_of,
    inverse_of,
    log_total,
    loss_of,
    narrow_softmax,
)

TILE = 1024  # elements of a tile
IGNORED = tl.constexpr(reference.IGNORED)
REST = 1024  # columns that one tile row sets to zero


@triton.jit
def _softmax(logits_ptr, at, mask, inverse_temperature, AXIS: tl.constexpr):
    """x = (z - max) / τ, softmax(x) and log Σ e^x: the one softmax of all ops."""
    z = tl.load(logits_ptr + at, mask=mask, other=-float("inf")).to(tl.float32)
    x = (z - tl.max(z, AXIS, keep_dims=True)) * inverse_temperature
    e = tl.exp(x)  # 0 beside the head, where z = -inf
    # the largest, where e^x = 1, are counted apart: log Σ e^x keeps its digits where it is near 0
    ones = tl.sum(tl.where(x == 0, 1.0, 0.0), AXIS, keep_dims=True)
    others = tl.sum(tl.where(x == 0, 0.0, e), AXIS, keep_dims=True)
    return x, e / (others + ones), log_total(ones, others)


@triton.jit
def _load_classes(ptr, first, exists, size, other, CLASSES: tl.constexpr):
    """The classes of narrow heads, a tensor each."""
    values = ()
    for k in tl.static_range(CLASSES):
        value = tl.load(ptr + first + k, mask=exists & (k < size), other=other)
        values = values + (value.to(tl.float32),)
    return values


@triton.jit
def _join_halves(values, HALF: tl.constexpr):
    joined = ()
    for k in tl.static_range(HALF):
        joined = joined + (tl.join(values[k], values[k + HALF]),)
    return joined


@triton.jit
def _side_by_side(values, BLOCK: tl.constexpr, CLASSES: tl.constexpr):
    """[BLOCK, CLASSES] of a tensor a class: what is written in whole pieces of memory."""
    if CLASSES >= 16:
        values = _join_halves(values, 8)
    if CLASSES >= 8:
        values = _join_halves(values, 4)
    if CLASSES >= 4:
        values = _join_halves(values, 2)
    values = _join_halves(values, 1)
    return tl.reshape(values[0], [BLOCK, CLASSES])


@triton.jit
def _elements(first, exists, size, CLASSES: tl.constexpr):
    """Offsets [BLOCK, CLASSES] of narrow heads' elements, and which exist."""
    classes = tl.arange(0, CLASSES)[None, :]
    mask = exists[:, None] & (classes < size[:, None])
    return first[:, None] + classes, mask


@triton.jit
def _store_classes(
    ptr, first, exists, size, values, BLOCK: tl.constexpr, CLASSES: tl.constexpr
):  # fmt: skip
    """Write values of which there is a tensor a class."""
    at, mask = _elements(first, exists, size, CLASSES)
    values = _side_by_side(values, BLOCK, CLASSES)
    tl.store(ptr + at, values, mask=mask)


@triton.jit
def _clear_classes(ptr, first, exists, size, BLOCK: tl.constexpr, CLASSES: tl.constexpr):
    at, mask = _elements(first, exists, size, CLASSES)
    tl.store(ptr + at, tl.zeros([BLOCK, CLASSES], tl.float32), mask=mask)


@triton.jit
def _narrow_place(first_n, first_head, offsets_ptr, N, heads, BLOCK: tl.constexpr):
    """Image and first column of BLOCK heads in a row, their sizes, and which exist."""
    pair = first_head + tl.arange(0, BLOCK)
    ahead = ((pair + 0.5) / heads).to(tl.int32)  # pair // heads, exact below 2^20
    n = first_n + ahead
    head = pair - ahead * heads
    first = tl.load(offsets_ptr + head)
    return n, first, tl.load(offsets_ptr + head + 1) - first, n < N


@triton.jit
def _image_and_head(pair, heads):
    """Of a place among all pairs; 0 where there are no heads."""
    heads = tl.maximum(heads, 1)
    n = pair // heads
    return n, (pair - n * heads).to(tl.int32)


@triton.jit
def _advance(n, head, step_n, step_head, heads):
    """The head that is `step_n` images and `step_head` heads further on."""
    n, head = n + step_n, head + step_head
    over = head >= heads
    return tl.where(over, n + 1, n), tl.where(over, head - heads, head)


@triton.jit
def _num_tiles(N, S, heads, BLOCK: tl.constexpr, AXIS: tl.constexpr):
    pairs = tl.cast(N, tl.int64) * heads
    if AXIS == 1:
        return tl.cdiv(pairs, BLOCK)
    else:
        return pairs * tl.cdiv(S, BLOCK)


@triton.jit
def _place(
    tile, offsets_ptr, N, S, heads, BLOCK: tl.constexpr, CLASSES: tl.constexpr, AXIS: tl.constexpr
):
    """Image n, class of the head, its column, position s; the head's size; which (n, s) exist."""
    block = tl.arange(0, BLOCK)
    classes = tl.arange(0, CLASSES)
    if AXIS == 1:  # [BLOCK pairs, CLASSES]
        start = tile * BLOCK
        first_n = start // heads
        pair = (start - first_n * heads).to(tl.int32) + block
        ahead = ((pair + 0.5) / heads).to(tl.int32)  # pair // heads, exact below 2^20
        n = (first_n + ahead)[:, None]
        head = pair - ahead * heads
        exists = n < N
        s = tl.zeros([BLOCK, 1], tl.int64)
        first = tl.load(offsets_ptr + head)[:, None]
        last = tl.load(offsets_ptr + head + 1)[:, None]
        label = classes[None, :]
    else:  # [CLASSES, BLOCK positions] of one pair
        blocks = tl.cdiv(S, BLOCK)
        pair = tile // blocks
        n = pair // heads
        head = pair % heads
        s = ((tile % blocks) * BLOCK + block)[None, :]
        exists = s < S
        first = tl.load(offsets_ptr + head)
        last = tl.load(offsets_ptr + head + 1)
        label = classes[:, None]
    column = (first + label).to(tl.int64)
    return n, label, column, s, last - first, exists


@triton.jit
def _index(n, column, s, columns, S, AXIS: tl.constexpr):
    """Element (n, column, s) of an array [N, columns, S]."""
    if AXIS == 1:  # S = 1
        return n * columns + column
    else:
        return (n * columns + column) * S + s


@triton.jit
def _zeros(BLOCK: tl.constexpr, CLASSES: tl.constexpr, AXIS: tl.constexpr):
    """A tile as `_place` has it."""
    if AXIS == 1:
        return tl.zeros([BLOCK, CLASSES], tl.float32)
    else:
        return tl.zeros([CLASSES, BLOCK], tl.float32)


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


@triton.jit
def _walk_old_narrow(
    logits_ptr, targets_ptr, bank_ptr, old_grad_ptr, new_grad_ptr, offsets_ptr,
    inverse_tau, N, C, C_old, heads, program, tiles, programs,
    BLOCK: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    """A program's tiles of narrow old heads: bank and gradients; returns the losses, [BLOCK]."""
    losses = tl.zeros([BLOCK], tl.float32)
    # from tile to tile without a division of 64 bits
    first_n, first_head = _image_and_head(program * BLOCK, heads)
    step_n, step_head = _image_and_head(programs * BLOCK, heads)
    for _ in range(program, tiles, programs):
        n, column, size, exists = _narrow_place(first_n, first_head, offsets_ptr, N, heads, BLOCK)
        at, at_bank = n * C + column, n * C_old + column
        z = _load_classes(logits_ptr, at, exists, size, -float("inf"), CLASSES)
        if targets_ptr is not None:
            targets = _load_classes(targets_ptr, at_bank, exists, size, 0.0, CLASSES)
        x, e, total, log_sum = narrow_softmax(z, inverse_tau, CLASSES)
        if bank_ptr is not None:
            p = ()
            for k in tl.static_range(CLASSES):
                p = p + (e[k] / total,)
            _store_classes(bank_ptr, at_bank, exists, size, p, BLOCK, CLASSES)
        if targets_ptr is not None:
            grad = ()
            for k in tl.static_range(CLASSES):
                p_k = e[k] / total
                losses += loss_of(x[k], log_sum, targets[k])
                grad = grad + (grad_of(p_k, targets[k], inverse_tau),)
            _store_classes(old_grad_ptr, at, exists, size, grad, BLOCK, CLASSES)
        if new_grad_ptr is not None:
            _clear_classes(new_grad_ptr, at, exists, size, BLOCK, CLASSES)
        first_n, first_head = _advance(first_n, first_head, step_n, step_head, heads)
    return losses


@triton.jit
def _walk_old(
    logits_ptr, targets_ptr, bank_ptr, old_grad_ptr, new_grad_ptr, offsets_ptr,
    inverse_tau, N, C, C_old, S, heads, program, tiles, programs,
    BLOCK: tl.constexpr, CLASSES: tl.constexpr, AXIS: tl.constexpr,
):  # fmt: skip
    """A program's tiles of other old heads: bank and gradients; returns a tile of losses."""
    losses = _zeros(BLOCK, CLASSES, AXIS)
    for tile in range(program, tiles, programs):
        n, label, column, s, size, exists = _place(
            tile, offsets_ptr, N, S, heads, BLOCK, CLASSES, AXIS
        )
        mask = exists & (label < size)
        at = _index(n, column, s, C, S, AXIS)
        at_bank = _index(n, column, s, C_old, S, AXIS)
        x, p, log_sum = _softmax(logits_ptr, at, mask, inverse_tau, AXIS)
        if bank_ptr is not None:
            tl.store(bank_ptr + at_bank, p, mask=mask)
        if targets_ptr is not None:
            target = tl.load(targets_ptr + at_bank, mask=mask, other=0.0)
            losses += loss_of(x, log_sum, target)
            tl.store(old_grad_ptr + at, grad_of(p, target, inverse_tau), mask=mask)
        if new_grad_ptr is not None:
            tl.store(new_grad_ptr + at, tl.zeros_like(p), mask=mask)
    return losses


@triton.jit
def _walk_rest_narrow(
    logits_ptr, labels_ptr, old_grad_ptr, new_grad_ptr, offsets_ptr, old_heads,
    N, C, heads, program, tiles, programs, BLOCK: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    """As `_walk_old_narrow`, for a narrow new head or columns that get no gradient."""
    losses = tl.zeros([BLOCK], tl.float32)
    first_n, first_head = _image_and_head(program * BLOCK, heads)
    step_n, step_head = _image_and_head(programs * BLOCK, heads)
    for _ in range(program, tiles, programs):
        n, column, size, exists = _narrow_place(
            first_n, first_head, offsets_ptr + old_heads, N, heads, BLOCK
        )
        at = n * C + column
        if labels_ptr is not None:
            y = tl.load(labels_ptr + n, mask=exists, other=0)
            z = _load_classes(logits_ptr, at, exists, size, -float("inf"), CLASSES)
            x, e, total, log_sum = narrow_softmax(z, 1.0, CLASSES)
            poison, grad = _poison(y, size), ()
            for k in tl.static_range(CLASSES):
                counts = exists & _has_loss(k, y, poison)
                losses += tl.where(counts, log_sum - x[k] + poison, 0.0)
                grad = grad + (_new_grad(e[k] / total, k, y, poison),)
            _store_classes(new_grad_ptr, at, exists, size, grad, BLOCK, CLASSES)
        if old_grad_ptr is not None:
            _clear_classes(old_grad_ptr, at, exists, size, BLOCK, CLASSES)
        first_n, first_head = _advance(first_n, first_head, step_n, step_head, heads)
    return losses


@triton.jit
def _walk_rest(
    logits_ptr, labels_ptr, old_grad_ptr, new_grad_ptr, offsets_ptr, old_heads,
    N, C, S, heads, program, tiles, programs,
    BLOCK: tl.constexpr, CLASSES: tl.constexpr, AXIS: tl.constexpr,
):  # fmt: skip
    """As `_walk_old`, for a new head or columns that get no gradient."""
    losses = _zeros(BLOCK, CLASSES, AXIS)
    for tile in range(program, tiles, programs):
        n, label, column, s, size, exists = _place(
            tile, offsets_ptr + old_heads, N, S, heads, BLOCK, CLASSES, AXIS
        )
        mask = exists & (label < size)
        at = _index(n, column, s, C, S, AXIS)
        if labels_ptr is not None:
            y = tl.load(labels_ptr + n * S + s, mask=exists, other=0)
            x, p, log_sum = _softmax(logits_ptr, at, mask, 1.0, AXIS)
            poison = _poison(y, size)
            loss = tl.where(_has_loss(label, y, poison), log_sum - x + poison, 0.0)
            losses += tl.where(mask, loss, 0.0)
            tl.store(new_grad_ptr + at, _new_grad(p, label, y, poison), mask=mask)
        if old_grad_ptr is not None:
            tl.store(old_grad_ptr + at, tl.zeros([1, 1], tl.float32), mask=mask)
    return losses


@triton.jit(
    do_not_specialize=["N", "C", "C_old", "S", "old_heads", "rest_heads", "temperature"],
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
    offsets_ptr,  # [old_heads + rest_heads + 1], the column at which each head begins
    temperature,  # a number or a pointer to one
    N,
    C,
    C_old,
    S,
    old_heads,
    rest_heads,
    OLD_BLOCK: tl.constexpr,
    OLD_CLASSES: tl.constexpr,
    REST_BLOCK: tl.constexpr,
    REST_CLASSES: tl.constexpr,
    AXIS: tl.constexpr,  # of the classes in a tile
    OLD_NARROW: tl.constexpr,
    REST_NARROW: tl.constexpr,
    ON_DEVICE: tl.constexpr,  # temperature is a pointer
):
    """A pointer that is None leaves its part out."""
    inverse_tau = inverse_of(temperature, ON_DEVICE)
    program = tl.program_id(0).to(tl.int64)
    programs = tl.num_programs(0).to(tl.int64)
    old_tiles = _num_tiles(N, S, old_heads, OLD_BLOCK, AXIS)
    rest_tiles = _num_tiles(N, S, rest_heads, REST_BLOCK, AXIS)

    if OLD_NARROW:
        old_losses = _walk_old_narrow(
            logits_ptr, targets_ptr, bank_ptr, old_grad_ptr, new_grad_ptr, offsets_ptr,
            inverse_tau, N, C, C_old, old_heads, program, old_tiles, programs,
            OLD_BLOCK, OLD_CLASSES,
        )  # fmt: skip
    else:
        old_losses = _walk_old(
            logits_ptr, targets_ptr, bank_ptr, old_grad_ptr, new_grad_ptr, offsets_ptr,
            inverse_tau, N, C, C_old, S, old_heads, program, old_tiles, programs,
            OLD_BLOCK, OLD_CLASSES, AXIS,
        )  # fmt: skip

    # the programs that had one tile less begin
    begin = (program + programs - old_tiles % programs) % programs
    if REST_NARROW:
        new_losses = _walk_rest_narrow(
            logits_ptr, labels_ptr, old_grad_ptr, new_grad_ptr, offsets_ptr, old_heads,
            N, C, rest_heads, begin, rest_tiles, programs, REST_BLOCK, REST_CLASSES,
        )  # fmt: skip
    else:
        new_losses = _walk_rest(
            logits_ptr, labels_ptr, old_grad_ptr, new_grad_ptr, offsets_ptr, old_heads,
            N, C, S, rest_heads, begin, rest_tiles, programs, REST_BLOCK, REST_CLASSES, AXIS,
        )  # fmt: skip

    if partials_ptr is not None:
        add_up(
            old_losses, new_losses, old_loss_ptr, new_loss_ptr, partials_ptr, ticket_ptr,
            program, programs,
        )  # fmt: skip


def offsets(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """Where each head begins, and where the last one ends, on the device."""
    return kept(
        sizes,
        device,
        "head_sizes",
        lambda: torch.tensor([0, *accumulate(sizes)], dtype=torch.int32),
    )


def tile_shape(sizes: Sequence[int], N: int, dense: bool) -> tuple[int, int, bool]:
    """(pairs or positions, classes, narrow) of a tile that holds the widest head."""
    classes = max(2, triton.next_power_of_2(max(sizes, default=1)))
    if dense or classes > NARROW:
        return max(1, TILE // classes), classes, False
    elements = 2 * TILE if N * len(sizes) >= MANY else TILE
    return max(32 * WARPS, elements // classes), classes, True


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


def _rest_sizes(C, C_old, labels, targets):
    """Columns behind the old heads: the new head, or columns that get no gradient."""
    if labels is not None:
        return [C - C_old]
    if targets is not None:
        return [min(REST, C - first) for first in range(C_old, C, REST)]
    return []


def _count_tiles(N, S, heads, block):
    """As `_num_tiles`, on the host."""
    return triton.cdiv(N * heads, block) if S == 1 else N * heads * triton.cdiv(S, block)


def _launch(logits, head_sizes, temperature, labels=None, targets=None, bank=None):
    """One launch: fills `bank`; returns the losses and the gradients, of labels and of targets."""
    _check(logits, head_sizes, labels, targets)
    logits, (N, C), C_old = logits.contiguous(), logits.shape[:2], sum(head_sizes)
    S = logits.numel() // max(1, N * C)
    wanted = [labels is not None, targets is not None]
    like = dict(dtype=torch.float32, device=logits.device)
    losses = [torch.empty((), **like) if want else None for want in wanted]
    grads = [torch.empty(logits.shape, **like) if want else None for want in wanted]

    rest = _rest_sizes(C, C_old, labels, targets)
    old_block, old_classes, old_narrow = tile_shape(head_sizes, N, S > 1)
    rest_block, rest_classes, rest_narrow = tile_shape(rest, N, S > 1)
    tiles = _count_tiles(N, S, len(head_sizes), old_block)
    tiles += _count_tiles(N, S, len(rest), rest_block)
    if not tiles:
        return [loss if loss is None else loss.zero_() for loss in losses], grads
    programs = min(tiles, PROGRAMS.value)
    partials = torch.empty(2, programs, **like) if any(wanted) else None
    on_device = temperature.device == logits.device
    guard = torch.cuda.device(logits.device) if logits.is_cuda else contextlib.nullcontext()
    with guard:
        heads_kernel[(programs,)](
            logits,
            None if labels is None else labels.contiguous(),
            None if targets is None else targets.contiguous(),
            bank, grads[1], grads[0], losses[1], losses[0], partials,
            tickets(logits.device) if any(wanted) else None,
            offsets((*head_sizes, *rest), logits.device),
            temperature if on_device else temperature.item(),
            N, C, C_old, S, len(head_sizes), len(rest),
            OLD_BLOCK=old_block, OLD_CLASSES=old_classes,
            REST_BLOCK=rest_block, REST_CLASSES=rest_classes,
            AXIS=0 if S > 1 else 1,
            OLD_NARROW=old_narrow, REST_NARROW=rest_narrow,
            ON_DEVICE=on_device,
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
