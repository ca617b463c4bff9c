"""Where the gradients of a stage lie: in new memory each time, or always in the same."""

from collections.abc import Iterable

from torch import Tensor

from bld_ext.api.memory import tensor_bytes


def _fits(buffer: Tensor, param: Tensor) -> bool:
    """Whether it still can be the gradient: the model may have been moved or cast since, or laid
    out otherwise, and torch's fused optimizers pair a gradient with its parameter by address.
    """
    same = buffer.dtype == param.dtype and buffer.device == param.device
    if not same or buffer.shape != param.shape:
        return False
    strides = zip(param.shape, buffer.stride(), param.stride(), strict=True)
    return all(size == 1 or ours == theirs for size, ours, theirs in strides)


class Gradients:
    """The `.grad` of an optimizer's parameters, from the start of a stage to its update.

    With `keep`, each gradient goes where the one before it was, so that addresses never change and
    nothing of their size is allocated after the first step. Between stages that memory is zero, and
    `.grad` is None, as without `keep`.
    """

    def __init__(self, keep: bool = False):
        self.keep = keep
        self._kept: dict[Tensor, Tensor] = {}
        self._apart: dict[Tensor, Tensor] = {}  # G_d, where a schedule holds it apart from .grad
        self._apart_used = False
        self._versions: dict[Tensor, int] = {}  # of what was lent to .grad, before anything came

    def begin(self, params: Iterable[Tensor]) -> None:
        """No parameter has a gradient; where memory is kept, those to come are added to zeros."""
        params = list(params)
        self.release(params)
        for param in params:
            buffer = self._kept.get(param)
            if buffer is not None and param.requires_grad and _fits(buffer, param):
                self._versions[param] = buffer._version
                param.grad = buffer

    def arrived(self, params: Iterable[Tensor]) -> list[Tensor]:
        """Those whose gradient has come since `begin`."""
        return [
            p for p in params if p.grad is not None and p.grad._version != self._versions.get(p, -1)
        ]

    def settle(self, params: Iterable[Tensor]) -> None:
        """Before the update: None where no gradient came; what came is kept."""
        params = list(params)
        came = set(self.arrived(params))
        for param in params:
            if param not in came:
                param.grad = None
            elif self.keep:
                self._kept[param] = param.grad
                self._versions.setdefault(param, -1)

    def lend_apart(self) -> dict[Tensor, Tensor]:
        """Memory for gradients that a schedule holds apart from `.grad`, until `release`."""
        self._apart_used = True
        return {param: buffer for param, buffer in self._apart.items() if _fits(buffer, param)}

    def hold_apart(self, grads: dict[Tensor, Tensor]) -> None:
        """These gradients may stay where they are."""
        if self.keep:
            self._apart.update(grads)

    def release(self, params: Iterable[Tensor]) -> None:
        """No parameter has a gradient; memory that is kept holds nothing of it."""
        for param in params:
            param.grad = None
        used = [self._kept[param] for param in self._versions if param in self._kept]
        for buffer in [*used, *(self._apart.values() if self._apart_used else ())]:
            buffer.zero_()
        self._versions.clear()
        self._apart_used = False

    def nbytes(self) -> int:
        """Bytes of the memory that is kept."""
        return tensor_bytes([*self._kept.values(), *self._apart.values()])

    def forget(self, params: Iterable[Tensor]) -> None:
        """Drop the memory of parameters that are no longer there, all but `params`."""
        known = set(params)
        for buffers in (self._apart, self._kept):
            for param in buffers.keys() - known:
                del buffers[param]

    def __getstate__(self) -> dict:
        return {"keep": self.keep}  # nothing that a copy or a file would need

    def __setstate__(self, state: dict) -> None:
        self.__init__(**state)
