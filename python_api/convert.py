"""Prepares a network for batches of several views, in place.

BatchNorm then normalises view by view, and one kernel computes it with the ReLU that follows.
"""

from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin

from bld_ext.api.batch_norm import (
    STATISTICS,
    ViewBatchNorm,
    ViewBatchNorm1d,
    ViewBatchNorm2d,
    ViewBatchNorm3d,
)
from bld_ext.api.own_batch_norm import TAKEN, is_taken, own_class, view_class


def unwatched(*modules: nn.Module) -> bool:
    """Return whether no hook and no overridden forward would miss a call if these are fused."""
    watchers = (
        torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks,
        torch_module._global_backward_hooks, torch_module._global_backward_pre_hooks,
    )  # fmt: skip
    return not any(watchers) and not any(
        m._forward_hooks
        or m._forward_pre_hooks
        or m._backward_hooks
        or m._backward_pre_hooks
        or "forward" in vars(m)
        for m in modules
    )


def absorbs(norm: nn.Module, relu: nn.Module) -> bool:
    """Return whether this BatchNorm may at present compute the ReLU that follows it, too."""
    by_view = isinstance(norm, ViewBatchNorm) and norm.fuses and norm.by_view()
    return by_view and type(relu) is nn.ReLU and unwatched(norm, relu)


class FusedSequential(nn.Sequential):
    """An nn.Sequential in which each ViewBatchNorm computes the following ReLU, inside a step."""

    def forward(self, input: Tensor) -> Tensor:
        done = None
        for module, behind in zip(self, [*self][1:] + [None], strict=True):
            if module is done:
                done = None
            elif behind is not None and absorbs(module, behind):
                input, done = module(input, relu=True), behind
            else:
                input = module(input)
        return input


def _fuse(module: nn.Module) -> None:
    """Turn a container of a known class into its fused variant, in place."""
    kind = type(module)
    if kind is nn.Sequential:
        children = [*module]
        pairs = zip(children, children[1:], strict=False)
        if any(isinstance(a, ViewBatchNorm) and type(b) is nn.ReLU for a, b in pairs):
            module.__class__ = FusedSequential
    elif kind.__module__ == "torchvision.models.resnet":
        from bld_ext.api import resnet

        module.__class__ = resnet.FUSED.get(kind, kind)


_CONVERTED = {
    nn.BatchNorm1d: ViewBatchNorm1d,
    nn.BatchNorm2d: ViewBatchNorm2d,
    nn.BatchNorm3d: ViewBatchNorm3d,
}
_LEFT = (ViewBatchNorm, nn.SyncBatchNorm, LazyModuleMixin)


def convert_view_batchnorm(module: nn.Module, statistics: str | None = None) -> nn.Module:
    """Turn every `nn.BatchNorm*d` inside into a `ViewBatchNorm`, in place, and return the module.

    A subclass of BatchNorm keeps its own forward, which is called view by view. A SyncBatchNorm is
    left as it is, and so is a module whose forward was replaced on the object.
    `revert_view_batchnorm` undoes all of it.

    Modules, parameters, buffers and hooks stay the same objects, and the state_dict is unchanged.
    Outside a BLD step each module computes what it did before, and it is still an instance of its
    PyTorch class. Tools that go by a module's exact type, such as torch.jit.script, need it
    reverted.

    Inside a step, the BatchNorm's kernel also computes a ReLU that follows it in an
    `nn.Sequential`, and the shortcut and ReLUs of torchvision's residual blocks, unless a hook
    watches them.

    Args:
        statistics: when the running statistics are updated: "once" a batch, from all views of the
            warm-up pooled, or at "every_pass", as in PyTorch; a schedule with fewer forward passes
            then moves them less often. None leaves the setting as it is, which at first is "once".
    """
    if statistics not in (None, *STATISTICS):
        expected = ", ".join(STATISTICS)
        raise ValueError(f"statistics: expected one of {expected}, got {statistics!r}")
    for child in module.modules():
        new = isinstance(child, _BatchNorm) and not isinstance(child, _LEFT)
        if new and not is_taken(child) and "forward" not in vars(child):
            child.__class__ = _CONVERTED.get(type(child)) or view_class(type(child))
        if statistics and isinstance(child, ViewBatchNorm):
            child.statistics = statistics
    for child in module.modules():
        _fuse(child)
    return module


def revert_view_batchnorm(module: nn.Module) -> nn.Module:
    """Give every module that `convert_view_batchnorm` changed its own class back, in place.

    Use it before tools that go by a module's exact type: torch.fx and torchvision's feature
    extraction, torch.jit.script, torch.export. The next step of an optimizer converts again, with
    the same `statistics`.
    """
    for child in module.modules():
        if isinstance(child, ViewBatchNorm):
            child.__class__ = own_class(type(child))
            for name in TAKEN:
                if name != "statistics":
                    vars(child).pop(name, None)
        elif type(child) is FusedSequential:
            child.__class__ = nn.Sequential
        elif type(child).__module__ == "bld_ext.api.resnet":
            child.__class__ = type(child).__base__
    return module
