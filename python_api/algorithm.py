"""Algorithms 1 and 2 of Fini et al., "Online Continual Learning under Extreme Memory Constraints".

A head o is the classifier of one task, z^o are its logits, and the newest head belongs to the task
being learned. A view v is one random augmentation of the batch; there are V of them. The bank ŷ
holds the older heads' predictions for every view, softened at temperature τ. A layer l is a group
of parameters whose gradients are balanced together, by default those of one module. L_t is the
cross-entropy of the newest head, with gradient G_w in the warm-up; L_d is the distillation loss of
the older heads, with gradient G_d.

The functions below read as the paper's algorithms. `Stage` has the operations they consist of,
`passes` computes losses and gradients over all views, and a schedule from `schedules` decides where
gradients are stored and when they are applied.
"""

from torch import Tensor

from bld_ext.api.schedules import Schedule
from bld_ext.api.stage import Stage

LOSSES = ("new", "distillation")


def warm_up(stage: Stage, schedule: Schedule) -> tuple[Tensor, Tensor, Tensor]:
    """Run Algorithm 1; return L_t, the bank and ‖G_w[l]‖ of each layer, `[L]`.

    for each view v:
        ŷ_v^o = softmax(z_v^o / τ) of every older head o
        G_w += dL_t(v)/dθ / V
    keep ‖G_w[l]‖ of each layer l
    θ' = θ - α_w G_w
    """
    (loss, bank), norms = schedule.descend(stage, stage.fill_bank, measure=True)
    return loss, bank, norms


def joint(stage: Stage, schedule: Schedule, losses: tuple[str, ...] = LOSSES) -> Tensor:
    """Run one repetition of Algorithm 2; return L_t, or L_d if `losses` has nothing else.

    G_d = Σ_v dL_d(v, ŷ_v^o)/dθ' / V
    G_d[l] ← λ ‖G_w[l]‖ / ‖G_d[l]‖ G_d[l] for each layer l
    G = G_d + Σ_v dL_t(v)/dθ' / V
    θ'' = θ' - α_j G
    """
    if losses == ("new",):
        loss, _ = schedule.descend(stage, stage.learn)
    elif losses == ("distillation",):
        loss = schedule.descend_old(stage)
    else:
        loss = schedule.descend_both(stage)
    return loss
