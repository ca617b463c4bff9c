"""head_softmax and distillation_loss of many narrow heads of one width, with nothing beside them.

Logits and bank are then one stream of heads. A thread has a few whole heads that begin at a
multiple of 16 bytes, and loads and stores them 16 bytes at a time. Each head is computed as in
`distillation.py`, so that its softmax has the same bits whichever kernel computes it.
"""

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

from bld_ext.triton.device_data import tickets
from bld_ext.triton.softmax import (
    MANY,
    NARROW,
    PROGRAMS,
    WARPS,
    add_loss,
    add_up,
    grad_of,
    in_bits,
    inverse_of,
    join_fours,
    split_fours,
    spread_softmax,
)

BLOCK = 32 * WARPS  # threads
MOST_FLOATS = 36  # of a thread


@triton.jit
def _load(ptr, start, end, other, MASKED: tl.constexpr, FLOATS: tl.constexpr, BLOCK: tl.constexpr):
    """FLOATS tensors [BLOCK]: what each thread has from `start` on."""
    values = ()
    at = start + tl.arange(0, BLOCK)[:, None] * FLOATS + tl.arange(0, 4)[None, :]
    for j in tl.static_range(FLOATS // 4):
        if MASKED:
            four = tl.load(ptr + at + 4 * j, mask=at + 4 * j < end, other=other)
        else:
            four = tl.load(ptr + at + 4 * j)
        values = values + split_fours(four.to(tl.float32))
    return values


@triton.jit
def _store(
    ptr, start, end, values, MASKED: tl.constexpr, FLOATS: tl.constexpr, BLOCK: tl.constexpr
):
    at = start + tl.arange(0, BLOCK)[:, None] * FLOATS + tl.arange(0, 4)[None, :]
    for j in tl.static_range(FLOATS // 4):
        four = join_fours(values[4 * j], values[4 * j + 1], values[4 * j + 2], values[4 * j + 3])
        if MASKED:
            tl.store(ptr + at + 4 * j, four, mask=at + 4 * j < end)
        else:
            tl.store(ptr + at + 4 * j, four)


@triton.jit
def _part(values, first: tl.constexpr, CLASSES: tl.constexpr):
    found = ()
    for k in tl.static_range(CLASSES):
        found = found + (values[first + k],)
    return found


@triton.jit
def _tile(
    logits_ptr, targets_ptr, bank_ptr, grad_ptr, inverse_tau, losses, start, end,
    MASKED: tl.constexpr, CLASSES: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Bank or gradient of HEADS heads a thread; returns the losses with theirs, [BLOCK]."""
    FLOATS: tl.constexpr = CLASSES * HEADS
    logits = _load(logits_ptr, start, end, 0.0, MASKED, FLOATS, BLOCK)
    if targets_ptr is not None:
        targets = _load(targets_ptr, start, end, 0.0, MASKED, FLOATS, BLOCK)
    out = ()
    for head in tl.static_range(HEADS):
        z = _part(logits, head * CLASSES, CLASSES)
        x, e, inverse, log_sum = spread_softmax(z, in_bits(inverse_tau), CLASSES, 1)
        for k in tl.static_range(CLASSES):
            p = e[k] * inverse
            if targets_ptr is not None:
                target = targets[head * CLASSES + k]
                losses = add_loss(losses, x[k], log_sum, target)
                out = out + (grad_of(p, target, inverse_tau),)
            else:
                out = out + (p,)
    if targets_ptr is not None:
        _store(grad_ptr, start, end, out, MASKED, FLOATS, BLOCK)
    else:
        _store(bank_ptr, start, end, out, MASKED, FLOATS, BLOCK)
    return losses


@triton.jit(
    do_not_specialize=["end", "temperature"],
    # a launch in a CUDA graph has a ticket of its own, and runs on the kernel that is compiled
    do_not_specialize_on_alignment=["ticket_ptr", "temperature"],
)
def flat_kernel(
    logits_ptr,  # [end]
    targets_ptr,  # [end], the bank to distil from
    bank_ptr,  # [end], the bank to fill
    grad_ptr,  # [end]
    loss_ptr,
    partials_ptr,  # [2, programs]
    ticket_ptr,
    temperature,  # a number or a pointer to one
    end,
    CLASSES: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    ON_DEVICE: tl.constexpr,  # temperature is a pointer
    PROGRAMS: tl.constexpr,  # at most; a power of two
):
    """A pointer that is None leaves its part out."""
    inverse_tau = inverse_of(temperature, ON_DEVICE)
    program = tl.program_id(0).to(tl.int64)
    programs = tl.num_programs(0).to(tl.int64)
    SIZE: tl.constexpr = CLASSES * HEADS * BLOCK
    whole = end // SIZE
    losses = tl.zeros([BLOCK], tl.float32)
    for tile in range(program, whole, programs):
        losses = _tile(
            logits_ptr, targets_ptr, bank_ptr, grad_ptr, inverse_tau, losses,
            tile * SIZE, end, False, CLASSES, HEADS, BLOCK,
        )  # fmt: skip
    if (program == programs - 1) & (whole * SIZE < end):
        losses = _tile(
            logits_ptr, targets_ptr, bank_ptr, grad_ptr, inverse_tau, losses,
            whole * SIZE, end, True, CLASSES, HEADS, BLOCK,
        )  # fmt: skip
    if partials_ptr is not None:
        nothing = tl.zeros([BLOCK], tl.float32)
        add_up(
            losses, nothing, loss_ptr, None, partials_ptr, ticket_ptr, program, programs, PROGRAMS
        )


def heads_of_a_thread(classes: int) -> int:
    """The fewest heads that fill whole 16 bytes, and at least 32 bytes up to eight classes."""
    return max({0: 1, 2: 2}.get(classes % 4, 4), 8 // classes)


def is_flat(logits: Tensor, head_sizes: list[int], *others: Tensor) -> bool:
    """Return whether these heads are computed by the kernel of this file."""
    if len({*head_sizes}) != 1 or logits.dim() != 2 or logits.shape[1] != sum(head_sizes):
        return False
    width, tensors = head_sizes[0], (logits, *others)
    fits = width <= NARROW and width * heads_of_a_thread(width) <= MOST_FLOATS
    enough = len(logits) * len(head_sizes) >= MANY
    whole = all(t.is_contiguous() and t.data_ptr() % 16 == 0 for t in tensors)
    return fits and enough and whole


def launch(
    logits: Tensor,
    width: int,
    temperature: Tensor,
    targets: Tensor | None = None,
    bank: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """One launch: fills `bank`, or returns the loss and the gradient against `targets`."""
    like = dict(dtype=torch.float32, device=logits.device)
    heads, distils = heads_of_a_thread(width), targets is not None
    programs = min(triton.cdiv(logits.numel(), width * heads * BLOCK), PROGRAMS)
    loss = torch.empty((), **like) if distils else None
    grad = torch.empty(logits.shape, **like) if distils else None
    partials = torch.empty(2, programs, **like) if distils else None
    on_device = temperature.device == logits.device
    guard = torch.cuda.device(logits.device) if logits.is_cuda else contextlib.nullcontext()
    with guard:
        flat_kernel[(programs,)](
            logits, targets, bank, grad, loss, partials,
            tickets(logits.device) if distils else None,
            temperature if on_device else temperature.item(), logits.numel(),
            CLASSES=width, HEADS=heads, BLOCK=BLOCK, ON_DEVICE=on_device,
            PROGRAMS=PROGRAMS,
            num_warps=WARPS,
            enable_fp_fusion=False,  # p - target is not fused with what makes p
        )  # fmt: skip
    return loss, grad
