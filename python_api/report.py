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
    memory: dict[str, int] = field(default_factory=lambda: {"seed": 16})


@dataclass
class Batch:
    """What the warm-up leaves for the joint repetitions; released before the next batch."""

    bank: Tensor  # [V·B, C_old, *]
    layers: Layers
    reference_norms: Tensor  # [L]
    number: int  # position of the batch in the stream
    shape: tuple[int, ...]
    settings: dict[str, object]  # of the warm-up, which make its views and its bank
