"""ViewBatchNorm: normalises each view of a batch by itself."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from bld_ext import ops

RUNNING = ("running_mean", "running_var", "num_batches_tracked")
STATISTICS = ("once", "every_pass")
PASSING = ("mode", "found", "pooled", "counted", "views")  # attributes of a module inside a step


class ViewBatchNorm(nn.modules.batchnorm._BatchNorm):
    """BatchNorm that normalises each of several views in a batch by its own statistics.

    Outside `view_statistics`, and so outside a BLD step, it computes exactly what the PyTorch
    module computes from which it was made. Inside, in training mode, a batch holds `views` views
    one after the other, and the attribute `statistics` decides when the running statistics are
    updated:

    "once"        once a batch. In mode "pool" the module notes every view of the warm-up, and one
                  update is made from all of them. In mode "keep" nothing is updated.
    "every_pass"  at each view by PyTorch's rule: running ← (1 - m)·running + m·statistics. If a
                  module is used twice in a forward pass, all views of the first use come first.

    In a network of your own, `norm(x, relu=True)` and `norm(x, residual=y, relu=True)` compute
    `relu(norm(x))` and `relu(norm(x) + y)`; inside a step they need only one kernel.
    """

    fuses = True  # `residual` and `relu` of `forward` into its kernel
    statistics = "once"
    keeps = False  # its running statistics whatever the stage, as it belongs to an old head
    views = 1
    mode: str | None = None
    found: list[tuple[Tensor, Tensor, int]] | None = None  # mean, variance of views, [V, C], and n
    pooled: Tensor | None = None  # [2, C], Σ x and Σ x² over the views
    counted: Tensor | None = None  # [1], values of a channel in all of them

    def forward(self, input: Tensor, residual: Tensor | None = None, relu: bool = False) -> Tensor:
        if not self.by_view():
            out = super().forward(input)
            out = out if residual is None else out + residual
            return out.relu() if relu else out
        self._check_input_dim(input)  # [views·B, C, *]
        self._require_whole_views(input)
        elements = input.numel() // (input.shape[1] * self.views)  # values of a channel in a view
        if elements == 1:
            raise ValueError(
                "images: BatchNorm expected more than 1 value per channel in training, got shape "
                f"{list(input.shape)} of {self.views} views; use more images a batch, with "
                "DataLoader(drop_last=True) also in the last one, or larger images"
            )
        out, mean, variance = ops.view_batch_norm(
            input, self.weight, self.bias, residual, views=self.views, eps=self.eps, relu=relu
        )
        if self.mode != "keep" and self.track_running_stats and not recomputing():
            if self.mode == "pool":
                self.found.append((mean.detach(), variance.detach(), elements))
            else:
                self._move(mean.double(), variance.double(), elements)
        return out

    def _require_whole_views(self, input: Tensor) -> None:
        if len(input) % self.views:
            raise ValueError(
                f"views_per_pass: expected 1, since a BatchNorm of the model gets {len(input)} "
                f"images of {self.views} views, which is not as many of each"
            )

    def by_view(self) -> bool:
        """Return whether it normalises view by view: in a step, unless by running statistics."""
        return self.mode is not None and (self.training or self.running_mean is None)

    def begin(self, mode: str) -> None:
        """Normalise view by view from now on, and gather statistics as `mode` says."""
        self.mode = mode if self.statistics == "once" else self.statistics
        if self.keeps:
            self.mode = "keep"

    def end(self) -> None:
        for name in PASSING:
            vars(self).pop(name, None)

    def __getstate__(self) -> dict:
        own = super().__getstate__()
        return {name: x for name, x in own.items() if name not in PASSING}  # a copy is in no step

    def extra_repr(self) -> str:
        own = "" if self.statistics == "once" else f", statistics={self.statistics!r}"
        return super().extra_repr() + own

    @torch.no_grad()
    def _move(self, mean: Tensor, variance: Tensor, n: int) -> None:  # [V, C]
        """Apply PyTorch's update for one view after the other, as one weighted sum."""
        V, m = len(mean), self.momentum
        self.num_batches_tracked += V
        if m is None:  # cumulative average over all views so far
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


class ViewBatchNorm1d(ViewBatchNorm, nn.BatchNorm1d):
    pass


class ViewBatchNorm2d(ViewBatchNorm, nn.BatchNorm2d):
    pass


class ViewBatchNorm3d(ViewBatchNorm, nn.BatchNorm3d):
    pass


def spare_old_heads(model: nn.Module, sizes: list[int]) -> None:
    """Let each norm keep its statistics that is only in old heads: all but the last of `heads`.

    These are the model's, or those of a module inside whose `head_sizes` are `sizes`, such as a
    MultiHead.
    """
    owners = [m for m in model.modules() if m is model or _has_sizes(m, sizes)]
    lists = [getattr(owner, "heads", None) for owner in owners]
    old = [head for heads in lists if isinstance(heads, nn.ModuleList) for head in [*heads][:-1]]
    private = {m for head in old for m in head.modules()}
    others = {id(m) for m in _outside(model, {*map(id, old)})}
    for norm in model.modules():
        if isinstance(norm, ViewBatchNorm):
            vars(norm).pop("keeps", None)
            if norm in private and id(norm) not in others:
                norm.keeps = True


def _has_sizes(module: nn.Module, sizes: list[int]) -> bool:
    own = getattr(module, "head_sizes", None)
    return isinstance(own, (tuple, list)) and [*own] == sizes


def _outside(module: nn.Module, left_out: set[int]) -> Iterator[nn.Module]:
    """All modules, but for those that are only inside of some."""
    yield module
    for child in module.children():
        if id(child) not in left_out:
            yield from _outside(child, left_out)


def recomputing() -> bool:
    """Return whether backward is running, where a checkpoint recomputes what was counted before."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
