"""BatchNorm whose statistics are those of one view, with running statistics by a stated policy."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ViewBatchNorm(nn.modules.batchnorm._BatchNorm):
    """BatchNorm that normalises each of several views in a batch by its own statistics.

    Outside `view_statistics` it is the PyTorch module it was made from, to the letter. Inside, in
    training mode, a batch holds `views` views one after the other, and what happens to the running
    statistics is the mode's affair:

    "every_pass"  PyTorch's rule at each view: running ← (1 - m)·running + m·statistics.
    "pool"        they wait; `pooled` gathers every view, and `commit` makes one update of it.
    "keep"        they are left alone.
    """

    views = 1
    mode: str | None = None
    pooled: tuple[Tensor, Tensor, int, int] | None = None  # Σ mean, Σ E[x²], views, elements

    def forward(self, input: Tensor) -> Tensor:  # [views·B, C, *]
        if not self.training or self.mode is None:
            return super().forward(input)
        self._check_input_dim(input)
        views = [self._normalise(view) for view in input.chunk(self.views)]
        return views[0] if len(views) == 1 else torch.cat(views)

    def _normalise(self, view: Tensor) -> Tensor:  # [B, C, *]
        if self.mode == "every_pass" and self.track_running_stats:
            return super().forward(view)
        # With momentum 1 F.batch_norm reports this view's statistics; both stages call it alike.
        # Of views in half precision, as under an autocast inside the model, they are float32.
        dtype = torch.promote_types(view.dtype, torch.float32)
        mean = view.new_zeros(view.shape[1], dtype=dtype)
        variance = torch.ones_like(mean)
        out = F.batch_norm(view, mean, variance, self.weight, self.bias, True, 1.0, self.eps)
        if self.mode == "pool" and self.track_running_stats:
            n = view.numel() // view.shape[1]
            self._gather(mean.double(), variance.double() * ((n - 1) / n), n)
        return out

    @torch.no_grad()
    def _gather(self, mean: Tensor, variance: Tensor, n: int) -> None:
        means, squares, count, elements = self.pooled or (0, 0, 0, 0)
        self.pooled = (means + mean, squares + variance + mean**2, count + 1, elements + n)

    @torch.no_grad()
    def commit(self) -> None:
        """One update of the running statistics from all gathered views, as one batch.

        The variance is that of the pooled views, unbiased; the moving average is corrected for its
        start as Adam's is, so that the first batch counts in full: m_t = m / (1 - (1 - m)^t).
        Statistics that came without a count, as in torchvision's pretrained weights, are no start.
        """
        if self.pooled is None:
            return
        means, squares, count, n = self.pooled
        self.pooled = None
        mean = means / count
        variance = (squares / count - mean**2).clamp(min=0) * (n / max(n - 1, 1))
        m = self.momentum
        if m:
            initial = (self.running_mean == 0).all() & (self.running_var == 1).all()
            loaded = (self.num_batches_tracked == 0) & ~initial
            self.num_batches_tracked += loaded * math.ceil(20 / m)  # (1 - m)^(20 / m) < 1e-8
        self.num_batches_tracked += 1
        t = self.num_batches_tracked.double()
        weight = 1 / t if m is None else m / (1 - (1 - m) ** t) if m > 0 else torch.zeros_like(t)
        for running, new in ((self.running_mean, mean), (self.running_var, variance)):
            running.copy_(torch.lerp(running.double(), new, weight))


class ViewBatchNorm1d(ViewBatchNorm, nn.BatchNorm1d):
    pass


class ViewBatchNorm2d(ViewBatchNorm, nn.BatchNorm2d):
    pass


class ViewBatchNorm3d(ViewBatchNorm, nn.BatchNorm3d):
    pass


_CONVERTED = {
    nn.BatchNorm1d: ViewBatchNorm1d,
    nn.BatchNorm2d: ViewBatchNorm2d,
    nn.BatchNorm3d: ViewBatchNorm3d,
}


def convert_view_batchnorm(module: nn.Module) -> nn.Module:
    """Turn every `nn.BatchNorm*d` inside into a `ViewBatchNorm`, in place, and return the module.

    The modules, their parameters, buffers, hooks and state_dict stay the same objects; each is
    still an instance of its PyTorch class and behaves as before outside a BLD step.
    """
    for child in module.modules():
        if type(child) in _CONVERTED:
            child.__class__ = _CONVERTED[type(child)]
    return module


@contextmanager
def view_statistics(layers: Sequence[ViewBatchNorm], mode: str) -> Iterator[None]:
    """Put the layers into a mode; commit what they gathered, or undo it if anything raises."""
    for layer in layers:
        layer.mode, layer.pooled = mode, None
    moving = [b for layer in layers for b in layer.buffers()] if mode == "every_pass" else []
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
            layer.mode, layer.pooled, layer.views = None, None, 1
