"""What a step leaves behind: a report for whoever asks, and what its next stage needs."""

from dataclasses import dataclass, field

from torch import Tensor

from bld_ext.api.layers import Layers


@dataclass
class StepReport:
    """What the last step did, as device tensors; only reading one waits for the device.

    The optimizer never reads it again: it is no memory from batch to batch.

    Attributes:
        layers: the name of each layer, L of them.
        warm_up_loss: L_t before the batch was learned, summed over images, averaged over views;
            None where no warm-up was made.
        reference_norms: ‖G_w‖, `[L]`.
        new_loss: L_t of each joint repetition.
        distillation_loss: L_d of each; empty while there is no old head.
        distillation_norms: ‖G_d‖ before balancing, `[L]` each. All zero means: no distillation.
        factors: λ‖G_w‖/‖G_d‖, `[L]` each.
        memory: bytes held while the batch was learned, beside the network and the activations;
            "seed" is the seed and the batch's number.
    """

    layers: tuple[str, ...]
    warm_up_loss: Tensor | None = None
    reference_norms: Tensor | None = None
    new_loss: list[Tensor] = field(default_factory=list)
    distillation_loss: list[Tensor] = field(default_factory=list)
    distillation_norms: list[Tensor] = field(default_factory=list)
    factors: list[Tensor] = field(default_factory=list)
    memory: dict[str, int] = field(default_factory=lambda: {"seed": 16})


@dataclass
class Batch:
    """What the warm-up leaves for the joint repetitions; released before the next batch."""

    bank: Tensor  # [V·B, C_old, *]
    layers: Layers
    reference_norms: Tensor  # [L]
    number: int  # of this batch in the stream
    shape: tuple[int, ...]
