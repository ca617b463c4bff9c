"""BatchNorms with a forward of their own, such as timm's with an activation, view by view."""

from functools import cache

import torch
from torch import Tensor, nn

from bld_ext.api.batch_norm import ViewBatchNorm, recomputing


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
        if len(input) % self.views:
            raise ValueError(
                f"views_per_pass: expected 1, since a BatchNorm of the model gets {len(input)} "
                f"images of {self.views} views, which is not as many of each"
            )
        parts = input.chunk(self.views)
        if not self.track_running_stats:
            return torch.cat([own_forward(part, *args, **options) for part in parts])
        names = ("running_mean", "running_var", "num_batches_tracked")
        held, momentum = [getattr(self, name) for name in names], self.momentum
        outs, found = [], []
        try:
            self.momentum = 1.0
            for part in parts:
                for name, buffer in zip(names, held, strict=True):
                    setattr(self, name, buffer.clone())
                outs.append(own_forward(part, *args, **options))
                found.append((self.running_mean, self.running_var))
        finally:
            self.momentum = momentum
            for name, buffer in zip(names, held, strict=True):
                setattr(self, name, buffer)
        n = parts[0].numel() // parts[0].shape[1]  # values of a channel in a view
        mean, variance = (torch.stack(each).double() for each in zip(*found, strict=True))
        if self.mode != "keep" and not recomputing():
            gather = self._gather if self.mode == "pool" else self._move
            gather(mean, variance * (n - 1) / n, n)
        return torch.cat(outs)

    def __reduce_ex__(self, protocol):
        return _empty, (own_class(type(self)),), self.__dict__


def own_class(kind: type) -> type:
    """Return the class that a class of `view_class` was made from."""
    return kind.__mro__[kind.__mro__.index(ViewBatchNorm) + 1]


@cache
def view_class(own: type[nn.Module]) -> type[OwnViewBatchNorm]:
    return type(f"View{own.__name__}", (OwnViewBatchNorm, own), {})


def _empty(own: type) -> nn.Module:
    kind = view_class(own)
    return kind.__new__(kind)
