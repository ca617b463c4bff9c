"""Schedules: where the gradients of a stage are stored, and when they are balanced and applied.

A schedule has three methods. Each updates the parameters along one gradient and releases that
gradient. Schedules differ in the order in which they call the operations of `Stage`, and so in
memory and time, but not in what they compute, except that `statistics="every_pass"` moves running
statistics at each forward pass there is. To add one, write a class here and list it in
`SCHEDULES`.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

from torch import Tensor

from bld_ext.api import passes
from bld_ext.api.memory import tensor_bytes
from bld_ext.api.mixing import is_compiled
from bld_ext.api.stage import Stage

# Runs the passes over all views; enters the context manager it gets around the last backward pass.
Passes = Callable[[AbstractContextManager], Any]


class Schedule(Protocol):
    def descend(
        self, stage: Stage, run: Passes, measure: bool = False
    ) -> tuple[Any, Tensor | None]:
        """Update θ ← θ - α G, where G is the gradient that `run` computes.

        Returns what `run` returns and, with `measure`, ‖G[l]‖ of each layer, `[L]`.
        """

    def descend_both(self, stage: Stage) -> Tensor:
        """Update θ ← θ - α (G_d + dL_t/dθ) with G_d balanced; return L_t."""

    def descend_old(self, stage: Stage) -> Tensor:
        """Update θ ← θ - α G_d with G_d balanced; return L_d."""


class TwoForward:
    """Forward passes of its own for each loss, and a single gradient, in .grad."""

    def descend(self, stage, run, measure=False):
        result = run(nullcontext())
        stage.sum_gradients(_loss(result))
        return result, self._update(stage, _loss(result), measure)

    def _update(self, stage: Stage, loss: Tensor, measure: bool = False) -> Tensor | None:
        """Update along the gradient in .grad, which is complete; return its norms if asked."""
        norms = stage.norms() if measure or stage.check_finite else None
        if measure:
            stage.note_held()
        stage.require_finite(loss, *([] if norms is None else [norms]))
        stage.update(stage.params)
        return norms if measure else None

    def distil(self, stage: Stage) -> Tensor:
        """Add G_d to .grad; return L_d."""
        return stage.distil(nullcontext())

    def descend_both(self, stage):
        self.distil(stage)  # G_d = Σ_v dL_d(v, ŷ_v)/dθ' / V
        stage.rescale()  # G_d[l] ← λ ‖G_w[l]‖ / ‖G_d[l]‖ · G_d[l]
        stage.carry_on()
        # θ'' = θ' - α_j (G_d + Σ_v dL_t(v)/dθ' / V)
        loss, norms = self.descend(stage, stage.learn, measure=stage.is_measured)
        stage.note_step(norms)
        return loss

    def descend_old(self, stage):
        loss = self.distil(stage)
        stage.rescale()  # which needs the whole G_d
        self._update(stage, loss)
        return loss


class SharedForward(TwoForward):
    """The same forward passes for both losses.

    With all views in one pass of one process, both gradients are added to .grad, one after the
    other. Otherwise G_d is kept in a second set of gradients until both are complete. Sharded
    parameters, of which FSDP adds up a single gradient, are learned as with `TwoForward`, and so is
    a compiled model, whose graphs can be walked backwards only once.
    """

    def descend_both(self, stage):
        if stage.sharded or is_compiled(stage.views.model):
            return super().descend_both(stage)
        if stage.processes.alone and stage.views.per_pass >= stage.views.count:
            loss, old_loss = passes.one_graph_pass(
                stage.views, stage.bank, stage.temperature, stage.rescale
            )
            stage.note_distillation(old_loss)
            stage.note_step(self._update(stage, loss, measure=stage.is_measured))
            return loss
        if any(p._post_accumulate_grad_hooks for p in stage.params):
            return super().descend_both(stage)  # they are called on the sum of both gradients
        params = [p for p in stage.params if p.requires_grad]
        loss, old_loss, grads = passes.shared_pass(
            stage.views, stage.bank, stage.temperature, params
        )
        stage.report.memory["second_gradients"] = tensor_bytes(grads.values())
        grads = stage.processes.sum_both(params, grads, [loss, old_loss])
        stage.note_distillation(old_loss)
        rate, same = stage.plain_rate(), set(stage.arrived()) == set(grads)
        fused = rate is not None and same and stage.balance is not None
        if fused and not (stage.check_finite or stage.is_measured):
            stage.rescale_and_update(grads, rate)
        else:
            stage.rescale(grads)
            for param, grad in grads.items():
                param.grad = grad.clone() if param.grad is None else param.grad.add_(grad)
            stage.note_step(self._update(stage, loss, measure=stage.is_measured))
        return loss


class InBackward(TwoForward):
    """`TwoForward`, but with updates during the last backward pass of L_t.

    Each layer is updated as soon as its gradient is complete, and the gradient is then released.
    Where processes share the step, a gradient is complete only when it has been added up over all,
    and their layers need not come in the same order: they learn as with `TwoForward`.
    """

    def descend(self, stage, run, measure=False):
        if not stage.processes.alone:
            return super().descend(stage, run, measure)
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
