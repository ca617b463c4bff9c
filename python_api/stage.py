"""Stage: a batch in one stage of its step, with the operations of Algorithms 1 and 2."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from torch import Tensor

from bld_ext import ops
from bld_ext.api import passes
from bld_ext.api.layers import Layers, release_gradients
from bld_ext.api.memory import tensor_bytes
from bld_ext.api.processes import Processes
from bld_ext.api.report import StepReport
from bld_ext.api.shards import is_sharded, part
from bld_ext.api.views import Views


@dataclass
class Stage:
    """The warm-up or one joint repetition: its inputs, and the operations on them."""

    name: str  # "warm-up" or "joint", for error messages
    views: Views
    layers: Layers
    temperature: float  # τ
    balance: float | Tensor | None  # λ, a device scalar in a captured step; None: no balancing
    fills_bank: bool  # whether λ is not 0
    report: StepReport
    check_finite: bool
    processes: Processes  # that share the step
    apply: Callable[[Sequence[Tensor]], None]  # updates parameters, θ ← θ - α G, and releases G
    plain_rate: Callable[[], float | Tensor | None]  # α if the base is plain SGD, else None
    bank: Tensor | None = None  # [V·B, C_old, *]; None in the warm-up
    reference_norms: Tensor | None = None  # ‖G_w‖, [L]

    # ---- passes over all views, which add the gradient of their loss to .grad ----

    def fill_bank(self, last: AbstractContextManager) -> tuple[Tensor, Tensor]:
        """Return L_t and the bank; `last` is entered around the last backward pass."""
        return passes.warm_up_pass(self.views, self.temperature, self.fills_bank, last)

    def learn(self, last: AbstractContextManager) -> Tensor:
        """Return L_t."""
        return passes.new_task_pass(self.views, self.temperature, last)

    def distil(self, last: AbstractContextManager) -> Tensor:
        """Return L_d against the bank; G_d and L_d are those of all processes."""
        loss = passes.distillation_pass(self.views, self.bank, self.temperature, last)
        self.sum_gradients(loss)
        self.note_distillation(loss)
        return loss

    # ---- operations on gradients ----

    def sum_gradients(self, loss: Tensor) -> None:
        """Add up the gradients of all views and processes, and this loss of all processes."""
        if self.views.tree is None:
            self.processes.sum_gradients(self.params, [loss])
        else:
            self.views.tree.finish()
            self.processes.sum_([loss])

    def carry_on(self) -> None:
        """Let the passes that follow add to a gradient that has been added up."""
        if self.views.tree is None:
            self.processes.carry_on(self.params)

    @property
    def params(self) -> Iterable[Tensor]:
        return self.layers.index

    @property
    def sharded(self) -> bool:
        """Whether each process holds only a part of some parameter."""
        return any(map(is_sharded, self.params))

    def arrived(self) -> list[Tensor]:
        """Return the parameters that have a gradient."""
        return [p for p in self.params if p.grad is not None]

    def norms(self) -> Tensor:
        """Return the gradient norm of each layer, `[L]`."""
        return self.layers.norms(self.arrived())

    def rescale(self, grads: dict[Tensor, Tensor] | None = None) -> None:
        """Balance G_d, given or in .grad: G_d[l] ← λ ‖G_w[l]‖ / ‖G_d[l]‖ · G_d[l] in each layer."""
        if grads is None:
            grads = {p: p.grad for p in self.arrived()}
        self.note_balance(*self.layers.rescale(grads, self.reference_norms, self.balance))

    def rescale_and_update(self, old: dict[Tensor, Tensor], rate: float | Tensor) -> None:
        """Balance G_d = `old`, add dL_t/dθ from .grad and update θ ← θ - α G, in one kernel."""
        params = self.arrived()
        lists = ([old[p] for p in params], [p.grad for p in params])
        index = [self.layers.index[p] for p in params]
        found = ops.balanced_sgd_(params, *lists, index, self.reference_norms, self.balance, rate)
        self.note_balance(*found)
        release_gradients(self.params)

    def update(self, params: Iterable[Tensor]) -> None:
        """Update these parameters: θ ← θ - α G."""
        params = list(params)
        self.apply(params)
        if self.check_finite:
            self.require_finite(*(p.detach() for p in params))

    # ---- reports and checks ----

    def note_distillation(self, loss: Tensor) -> None:
        self.report.distillation_loss.append(loss)
        self.require_finite(loss)

    def note_balance(self, factors: Tensor, norms: Tensor) -> None:
        self.report.factors.append(factors)
        self.report.distillation_norms.append(norms)
        self.require_finite(norms)

    @property
    def is_measured(self) -> bool:
        """Whether the norm of G is reported: if no joint repetition came before this one."""
        return not self.report.new_loss and len(self.report.distillation_loss) <= 1

    def note_step(self, norms: Tensor | None) -> None:
        if norms is not None:
            self.report.step_norms = norms

    def note_held(self, held: int | None = None) -> None:
        """Report the most bytes of gradients held so far; `held` defaults to those held now."""
        if held is None:
            held = tensor_bytes(p.grad for p in self.arrived())
        self.report.memory["gradients"] = max(held, self.report.memory.get("gradients", 0))

    def require_finite(self, *values: Tensor) -> None:
        if not self.check_finite:
            return
        lost = any(not part(value).isfinite().all() for value in values)
        if self.sharded and values:  # of which the others may have lost their part
            self.processes.sum_([count := part(values[0]).new_tensor(float(lost))])
            lost = bool(count)
        if lost:
            raise FloatingPointError(
                f"{self.name} stage: a loss, gradient norm or parameter is not finite. step() puts "
                "the network back as it was; lower lr, or look at the images and the weights"
            )
