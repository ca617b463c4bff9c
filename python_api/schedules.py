"""Where the gradients of a stage lie, and when they are balanced and applied.

A schedule has three methods; each takes a step along a gradient and leaves none. A new one is a
class here and its line in `SCHEDULES`. It may change the order of the verbs of `Stage`, and with it
memory and time, but not what they compute.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

from torch import Tensor

from bld_ext.api import passes
from bld_ext.api.memory import tensor_bytes
from bld_ext.api.stage import Stage

# Passes of all views; what it gets is around the last backward pass.
Passes = Callable[[AbstractContextManager], Any]


class Schedule(Protocol):
    def descend(
        self, stage: Stage, run: Passes, measure: bool = False
    ) -> tuple[Any, Tensor | None]:
        """θ - α G with the gradient of the passes `run`; returns what `run` does, and with
        `measure` ‖G[l]‖ of each layer.
        """

    def descend_both(self, stage: Stage) -> Tensor:
        """θ - α (G_d + dL_t/dθ), G_d balanced; returns L_t."""

    def descend_old(self, stage: Stage) -> Tensor:
        """θ - α G_d, balanced; returns L_d."""


class TwoForward:
    """One gradient, in .grad: each loss has forward passes of its own."""

    def descend(self, stage, run, measure=False):
        result = run(nullcontext())
        norms = stage.norms() if measure or stage.check_finite else None
        if measure:
            stage.note_held()
        stage.require_finite(_loss(result), *([] if norms is None else [norms]))
        stage.update(stage.params)
        return result, norms

    def descend_both(self, stage):
        stage.distil(nullcontext())
        stage.rescale()
        loss, _ = self.descend(stage, stage.learn)
        return loss

    def descend_old(self, stage):
        def distil(last):
            loss = stage.distil(last)
            stage.rescale()
            return loss

        loss, _ = TwoForward.descend(self, stage, distil)
        return loss


class SharedForward(TwoForward):
    """Both losses from the same forward passes.

    With all views in one pass their gradients come one after the other into .grad; else G_d lies
    apart, in a second gradient, until both are complete.
    """

    def descend_both(self, stage):
        if stage.views.per_pass >= stage.views.count:
            loss, _ = self.descend(stage, lambda last: self._one_graph(stage))
            return loss
        params = [p for p in stage.params if p.requires_grad]
        loss, old_loss, grads = passes.shared_pass(
            stage.views, stage.bank, stage.temperature, params
        )
        stage.report.memory["second_gradients"] = tensor_bytes(grads.values())
        stage.note_distillation(old_loss)
        rate, same = stage.plain_rate(), set(stage.arrived()) == set(grads)
        if rate is not None and same and stage.balance is not None and not stage.check_finite:
            stage.rescale_and_update(grads, rate)
        else:
            self.descend(stage, lambda last: self._added(stage, loss, grads))
        return loss

    def _one_graph(self, stage: Stage) -> Tensor:
        loss, old_loss = passes.one_graph_pass(
            stage.views, stage.bank, stage.temperature, stage.rescale
        )
        stage.note_distillation(old_loss)
        return loss

    def _added(self, stage: Stage, loss: Tensor, grads: dict[Tensor, Tensor]) -> Tensor:
        stage.rescale(grads)
        for param, grad in grads.items():
            param.grad = grad.clone() if param.grad is None else param.grad.add_(grad)
        return loss


class InBackward(TwoForward):
    """Two forward passes; each layer is updated as soon as its gradient is complete, amid the
    backward pass, and its gradient released.
    """

    def descend(self, stage, run, measure=False):
        norms, held = None, []
        if measure:
            norms = stage.layers.zeros()

        def measured(found: Tensor) -> None:
            stage.require_finite(found)
            if norms is not None:
                norms.add_(found)

        needed = measured if measure or stage.check_finite else None
        result = run(stage.layers.updating(stage.update, needed, held))
        stage.note_held(max(held))
        stage.require_finite(_loss(result), *([] if norms is None else [norms]))
        return result, norms


def _loss(result: Any) -> Tensor:
    return result[0] if isinstance(result, tuple) else result


SCHEDULES: dict[str, Schedule] = {
    "two_forward": TwoForward(),
    "shared_forward": SharedForward(),
    "in_backward": InBackward(),
}
