"""What a step leaves behind: a report for the user, and a warm-up's data for the joint stage."""

from dataclasses import dataclass, field

from torch import Tensor

from bld_ext.api.layers import Layers


@dataclass
class StepReport:
    """What the last step did, as device tensors; only reading one waits for the device.

    The optimizer never reads it, so it does not carry memory from batch to batch.

    Attributes:
        layers: the names of the L layers.
        warm_up_loss: L_t before the batch was learned, summed over the images and averaged over the
            views; None if there was no warm-up.
        reference_norms: ‖G_w‖ of each layer, `[L]`.
        new_loss: L_t of each joint repetition.
        distillation_loss: L_d of each joint repetition; empty while there is no old head.
        distillation_norms: ‖G_d‖ before balancing, `[L]` for each joint repetition. If all are
            zero, nothing was distilled.
        factors: λ‖G_w‖/‖G_d‖, `[L]` for each joint repetition.
        step_norms: ‖G‖ of the sum G of both gradients in the first joint repetition, `[L]`.
        memory: bytes held while the batch was learned, beside the network and the activations;
            "seed" stands for the seed and the batch's number.
    """

    layers: tuple[str, ...]
    warm_up_loss: Tensor | None = None
    reference_norms: Tensor | None = None
    new_loss: list[Tensor] = field(default_factory=list)
    distillation_loss: list[Tensor] = field(default_factory=list)
    distillation_norms: list[Tensor] = field(default_factory=list)
    factors: list[Tensor] = field(default_factory=list)
    step_norms: Tensor | None = None
    memory: dict[str, int] = field(default_factory=lambda: {"seed": 16})

    @property
    def new_share(self) -> Tensor | None:
        """The share of the new task's step that the first joint repetition takes, `[L]` float64.

        It is ⟨G, G_t⟩ / ‖G_t‖², where G is the sum of the balanced G_d and of G_t = dL_t/dθ: 1
        where G_d changes nothing about the step along G_t, less where it points against it, and
        negative in layers that move against their new task. ‖G_w‖ stands for ‖G_t‖, from which the
        warm-up moves it by a share of about α_w/α_j. It is nan in layers without a gradient of the
        new task, such as old heads, and None while there is no old head, or if there was no warm-up
        or the first repetition was on one loss alone.
        """
        if self.warm_up_loss is None or self.step_norms is None or not self.factors:
            return None
        new, total = self.reference_norms.double(), self.step_norms.double()
        old = self.factors[0].double() * self.distillation_norms[0].double()
        return (total**2 + new**2 - old**2) / (2 * new**2)

    def copy(self) -> "StepReport":
        """Return a report that later repetitions do not add to, of the same tensors."""
        mutable = (list, dict)
        own = vars(self).items()
        return StepReport(**{k: x.copy() if isinstance(x, mutable) else x for k, x in own})


@dataclass
class Batch:
    """What the warm-up leaves for the joint repetitions; released before the next batch."""

    bank: Tensor  # [V·B, C_old, *]
    layers: Layers
    reference_norms: Tensor  # [L]
    number: int  # position of the batch in the stream
    shape: tuple[int, ...]
    sizes: tuple[int, ...]  # classes of each head
    settings: dict[str, object]  # of the warm-up, which make its views and its bank
