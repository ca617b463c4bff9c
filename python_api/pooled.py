"""Running statistics of all BatchNorms of a network, updated together, once from all views.

What a layer would do with a few channels in some thirty operators is done here with the channels of
all layers side by side.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from bld_ext.api.batch_norm import ViewBatchNorm


@contextmanager
def view_statistics(
    layers: Sequence[ViewBatchNorm],
    mode: str,
    add_up: Callable[[list[Tensor]], None] = lambda gathered: None,
) -> Iterator[None]:
    """Set the modules' mode; after, commit what they gathered, or undo it if anything raises.

    `add_up` adds up what they gathered over several processes.
    """
    for layer in layers:
        layer.begin(mode)
    moving = [b for layer in layers if layer.mode == "every_pass" for b in layer.buffers()]
    before = [b.clone() for b in moving]
    pooling = [layer for layer in layers if layer.mode == "pool" and layer.track_running_stats]
    try:
        groups = [Pool(group) for group in _alike(pooling)]
        yield
        gather(pooling)
        if groups:
            add_up([t for group in groups for t in (group.pooled, group.counted)])
        for group in groups:
            group.commit()
    except BaseException:
        for buffer, value in zip(moving, before, strict=True):
            buffer.copy_(value)
        raise
    finally:
        for layer in layers:
            layer.end()


@contextmanager
def not_gathered(layers: Sequence[ViewBatchNorm]) -> Iterator[None]:
    """Leave the forward passes inside out of the statistics."""
    modes = [layer.mode for layer in layers]
    for layer in layers:
        layer.mode = "keep"
    try:
        yield
    finally:
        for layer, mode in zip(layers, modes, strict=True):
            layer.mode = mode


@torch.no_grad()
def gather(layers: Sequence[ViewBatchNorm]) -> None:
    """Add what the layers noted of a pass to what is pooled."""
    while noted := [layer for layer in layers if layer.found]:
        calls = [(layer, *layer.found.pop(0)) for layer in noted]
        for same in {(len(mean), mean.device): None for _, mean, *_ in calls}:
            own = [c for c in calls if (len(c[1]), c[1].device) == same]
            _gather(*zip(*own, strict=True))


def _gather(
    layers: Sequence[ViewBatchNorm],
    means: Sequence[Tensor],
    variances: Sequence[Tensor],
    counts: Sequence[int],
) -> None:
    mean, variance = (torch.cat(list(t), 1).double() for t in (means, variances))  # [V, ΣC]
    sums = torch.stack((mean.sum(0), (variance + mean * mean).sum(0)))
    parts = sums.split([m.shape[1] for m in means], 1)
    torch._foreach_add_(
        [layer.pooled for layer in layers], torch._foreach_mul(parts, [*map(float, counts)])
    )
    values = [float(n * len(mean)) for n in counts]
    torch._foreach_add_([layer.counted for layer in layers], values)


def _alike(layers: Sequence[ViewBatchNorm]) -> list[list[ViewBatchNorm]]:
    """Groups of layers that have the same momentum, and buffers of one dtype on one device."""
    groups: dict[object, list[ViewBatchNorm]] = {}
    for layer in layers:
        running = layer.running_mean
        groups.setdefault((layer.momentum, running.dtype, running.device), []).append(layer)
    return [*groups.values()]


class Pool:
    """The statistics of some layers, side by side."""

    def __init__(self, layers: list[ViewBatchNorm]):
        self.layers = layers
        self.sizes = [layer.num_features for layer in layers]
        like = dict(dtype=torch.float64, device=layers[0].running_mean.device)
        self.pooled = torch.zeros(2, sum(self.sizes), **like)
        self.counted = torch.zeros(len(layers), **like)
        parts = self.pooled.split(self.sizes, 1), self.counted.split(1)
        for layer, layer.pooled, layer.counted in zip(layers, *parts, strict=True):
            layer.found = []

    def _by_channel(self, values: Tensor) -> Tensor:
        """[L] → [ΣC]"""
        each = zip(values.split(1), self.sizes, strict=True)
        return torch.cat([value.expand(size) for value, size in each])

    @torch.no_grad()
    def commit(self) -> None:
        """Update the running statistics once, from all gathered views as if they were one batch.

        The variance is the unbiased one of the pooled views. The moving average has Adam's bias
        correction, so that the first batch counts in full: m_t = m / (1 - (1 - m)^t). It is not
        applied to statistics that were loaded without a count, as in torchvision's pretrained
        weights.
        """
        came = self.counted > 0  # a module that was not used keeps its statistics
        n = self._by_channel(self.counted.clamp(min=1))
        mean, square = self.pooled / n
        variance = (square - mean**2).clamp(min=0) * (n / (n - 1).clamp(min=1))
        running = [[layer.running_mean, layer.running_var] for layer in self.layers]
        means, variances = (torch.cat(buffers) for buffers in zip(*running, strict=True))
        batches = [layer.num_batches_tracked for layer in self.layers]
        t, m = torch.stack(batches), self.layers[0].momentum
        if m:
            apart = ((means != 0) | (variances != 1)).double().split(self.sizes)
            other = torch.stack(torch._foreach_norm(apart, math.inf)) > 0
            t = t + (came & (t == 0) & other) * math.ceil(20 / m)  # (1 - m)^(20 / m) < 1e-8
        t = t + came
        age = t.double().clamp(min=1)
        weight = 1 / age if m is None else m / (1 - (1 - m) ** age) if m > 0 else age * 0
        weight = self._by_channel(weight * came)
        new = [
            torch.lerp(old.double(), now, weight).to(old.dtype).split(self.sizes)
            for old, now in ((means, mean), (variances, variance))
        ]
        torch._foreach_copy_([b for both in running for b in both], [*_alternating(*new)])
        torch._foreach_copy_(batches, [*t.unbind()])


def _alternating(first: Sequence[Tensor], second: Sequence[Tensor]) -> Iterator[Tensor]:
    for both in zip(first, second, strict=True):
        yield from both
