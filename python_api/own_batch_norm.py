"""BatchNorms with a forward of their own, such as timm's with an activation, view by view."""

from functools import cache

import torch
from torch import Tensor, nn

from bld_ext.api.batch_norm import RUNNING, STATISTICS, ViewBatchNorm, recomputing

TAKEN = (
    "statistics",
    "keeps",
    "views",
    "mode",
    "found",
    "pooled",
    "counted",
    "fuses",
)  # attributes of ViewBatchNorm


def is_taken(norm: nn.Module) -> bool:
    """Return whether a module has attributes of its own by these names.

    A setting that an earlier conversion left is not one.
    """
    own = {**vars(norm), **norm._buffers, **norm._parameters, **norm._modules}
    left = own.get("statistics")
    if isinstance(left, str) and left in STATISTICS:
        del own["statistics"]
    return any(name in own or hasattr(type(norm), name) for name in TAKEN)


class OwnViewBatchNorm(ViewBatchNorm):
    """Calls the forward of the class that it was made from, on one view after the other.

    The statistics of a view are read from the running statistics, which are put aside meanwhile and
    take them over whole.
    """

    fuses = False  # what follows it: its forward may do something after the normalisation

    def forward(self, input: Tensor, *args, **options) -> Tensor:
        own_forward = super(ViewBatchNorm, self).forward
        if not self.by_view():
            return own_forward(input, *args, **options)
        self._require_whole_views(input)
        if not self.track_running_stats:
            outs = [own_forward(part, *args, **options) for part in input.chunk(self.views)]
            return outs[0] if self.views == 1 else torch.cat(outs)
        held, momentum = [getattr(self, name) for name in RUNNING], self.momentum
        outs, found = [], []
        try:
            self.momentum = 1.0
            for part in input.chunk(self.views):
                aside = [buffer.clone() for buffer in held]
                for name, buffer in zip(RUNNING, aside, strict=True):
                    setattr(self, name, buffer)
                outs.append(own_forward(part, *args, **options))
                found.append((self.running_mean.clone(), self.running_var.clone()))
        finally:
            self.momentum = momentum
            for name, buffer in zip(RUNNING, held, strict=True):
                setattr(self, name, buffer)
        if self.mode != "keep" and not recomputing():
            self._note([torch.stack(each).double() for each in zip(*found, strict=True)], input)
        return outs[0] if self.views == 1 else torch.cat(outs)

    @torch.no_grad()
    def _note(self, found: list[Tensor], input: Tensor) -> None:
        """Gather the statistics of each view, unless the forward moved none, as a frozen one."""
        mean, variance = found  # [V, C]
        n = input.numel() // (self.num_features * self.views)  # values of a channel in a view
        before = torch.stack((self.running_mean, self.running_var)).double().unsqueeze(1)
        moved = (torch.stack((mean, variance)) != before).any(2).any(0)  # [V]
        variance = variance * (n - 1) / n
        if self.mode == "pool":
            weight = n * moved.double().unsqueeze(1)
            self.pooled[0] += (mean * weight).sum(0)
            self.pooled[1] += ((variance + mean * mean) * weight).sum(0)
            self.counted += weight.sum()
        elif moved.any():
            self._move(mean, variance, n)

    def __reduce_ex__(self, protocol):
        return _empty, (own_class(type(self)),), self.__getstate__()


def own_class(kind: type) -> type:
    """Return the class that a class of `view_class` was made from."""
    return kind.__mro__[kind.__mro__.index(ViewBatchNorm) + 1]


@cache
def view_class(own: type[nn.Module]) -> type[OwnViewBatchNorm]:
    return type(f"View{own.__name__}", (OwnViewBatchNorm, own), {})


def _empty(own: type) -> nn.Module:
    kind = view_class(own)
    return kind.__new__(kind)
