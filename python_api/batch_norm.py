"""BatchNorm whose statistics are those of one view, with running statistics by a stated policy."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from bld_ext import ops


class ViewBatchNorm(nn.modules.batchnorm._BatchNorm):
    """BatchNorm that normalises each of several views in a batch by its own statistics.

    Outside `view_statistics` it is the PyTorch module it was made from, to the letter. Inside, in
    training mode, a batch holds `views` views one after the other, and the running statistics move
    as the attribute `statistics` says:

    "once"        once a batch: the mode "pool" gathers every view of the warm-up, and `commit`
                  makes one update of it; in the mode "keep" they are left alone.
    "every_pass"  by PyTorch's rule at each view: running ← (1 - m)·running + m·statistics. A module
                  that is used twice in a forward pass moves for all views of one use first.

    In a network of your own, `norm(x, relu=True)` and `norm(x, residual=y, relu=True)` are what
    `relu(norm(x))` and `relu(norm(x) + y)` are, in one kernel inside a step.
    """

    statistics = "once"
    views = 1
    mode: str | None = None
    pooled: Tensor | None = None  # [2, C], Σ mean and Σ E[x²] over the views
    counted: Tensor | None = None  # [2], views, and values of a channel in all of them

    def forward(self, input: Tensor, residual: Tensor | None = None, relu: bool = False) -> Tensor:
        if not self.by_view():
            out = super().forward(input)
            out = out if residual is None else out + residual
            return out.relu() if relu else out
        self._check_input_dim(input)  # [views·B, C, *]
        if len(input) % self.views:
            raise ValueError(
                f"views_per_pass: expected 1, since a BatchNorm of the model gets {len(input)} "
                f"images of {self.views} views, which is not as many of each"
            )
        elements = input.numel() // (input.shape[1] * self.views)  # of a channel in a view
        if elements == 1:
            raise ValueError(
                "images: BatchNorm expected more than 1 value per channel in training, got shape "
                f"{list(input.shape)} of {self.views} views; use more images a batch"
            )
        out, mean, variance = ops.view_batch_norm(
            input, self.weight, self.bias, residual, views=self.views, eps=self.eps, relu=relu
        )
        if self.mode != "keep" and self.track_running_stats and not recomputing():
            gather = self._gather if self.mode == "pool" else self._move
            gather(mean.double(), variance.double(), elements)
        return out

    def by_view(self) -> bool:
        """Whether it normalises, and view by view: in a step, unless it is frozen."""
        return self.mode is not None and (self.training or self.running_mean is None)

    def begin(self, mode: str) -> None:
        """From now on a batch holds views."""
        self.mode = mode if self.statistics == "once" else self.statistics
        if self.mode == "pool" and self.track_running_stats:
            like = dict(dtype=torch.float64, device=self.running_mean.device)
            self.pooled = torch.zeros(2, self.num_features, **like)
            self.counted = torch.zeros(2, **like)

    def end(self) -> None:
        self.mode = self.pooled = self.counted = None
        self.views = 1

    def extra_repr(self) -> str:
        own = "" if self.statistics == "once" else f", statistics={self.statistics!r}"
        return super().extra_repr() + own

    @torch.no_grad()
    def _gather(self, mean: Tensor, variance: Tensor, n: int) -> None:  # [V, C]
        self.pooled[0] += mean.sum(0)
        self.pooled[1] += (variance + mean * mean).sum(0)
        self.counted[0] += len(mean)
        self.counted[1] += n * len(mean)

    @torch.no_grad()
    def _move(self, mean: Tensor, variance: Tensor, n: int) -> None:  # [V, C]
        """PyTorch's update at one view after the other, as one weighted sum."""
        V, m = len(mean), self.momentum
        self.num_batches_tracked += V
        if m is None:  # the average of all views there ever were
            weights = (1 / self.num_batches_tracked.double()).expand(V)
        else:
            age = torch.arange(V - 1, -1, -1, dtype=torch.float64, device=mean.device)
            weights = m * (1 - m) ** age
        for running, new in (
            (self.running_mean, mean),
            (self.running_var, variance * (n / (n - 1))),
        ):
            rest = (1 - weights.sum()) * running.double()
            running.copy_(rest + (weights.unsqueeze(1) * new).sum(0))

    @torch.no_grad()
    def commit(self) -> None:
        """One update of the running statistics from all gathered views, as one batch.

        The variance is that of the pooled views, unbiased; the moving average is corrected for its
        start as Adam's is, so that the first batch counts in full: m_t = m / (1 - (1 - m)^t).
        Statistics that came without a count, as in torchvision's pretrained weights, are no start.
        """
        if self.pooled is None:
            return
        came = self.counted[0] > 0  # an idle module keeps what it has
        views, n = self.counted.clamp(min=1)
        mean, square = self.pooled / views
        variance = (square - mean**2).clamp(min=0) * (n / (n - 1).clamp(min=1))
        m = self.momentum
        if m:
            initial = (self.running_mean == 0).all() & (self.running_var == 1).all()
            loaded = came & (self.num_batches_tracked == 0) & ~initial
            self.num_batches_tracked += loaded * math.ceil(20 / m)  # (1 - m)^(20 / m) < 1e-8
        self.num_batches_tracked += came
        t = self.num_batches_tracked.double().clamp(min=1)
        weight = 1 / t if m is None else m / (1 - (1 - m) ** t) if m > 0 else torch.zeros_like(t)
        for running, new in ((self.running_mean, mean), (self.running_var, variance)):
            running.copy_(torch.lerp(running.double(), new, weight * came))


class ViewBatchNorm1d(ViewBatchNorm, nn.BatchNorm1d):
    pass


class ViewBatchNorm2d(ViewBatchNorm, nn.BatchNorm2d):
    pass


class ViewBatchNorm3d(ViewBatchNorm, nn.BatchNorm3d):
    pass


def recomputing() -> bool:
    """Whether backward is running: what a checkpoint computes again has been counted before."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


@contextmanager
def view_statistics(layers: Sequence[ViewBatchNorm], mode: str) -> Iterator[None]:
    """Put the layers into a mode; commit what they gathered, or undo it if anything raises."""
    for layer in layers:
        layer.begin(mode)
    moving = [b for layer in layers if layer.mode == "every_pass" for b in layer.buffers()]
    before = [b.clone() for b in moving]
    try:
        yield
        for layer in layers:
            layer.commit()
    except BaseException:
        for buffer, value in zip(moving, before, strict=True):
            buffer.copy_(value)
        raise
    finally:
        for layer in layers:
            layer.end()
