"""Algorithms 1 and 2 of Fini et al., "Online Continual Learning under Extreme Memory Constraints".

z is a logit, ŷ^o the bank of an older head o, τ the temperature; L_t is the cross-entropy of the
newest head, L_d the distillation loss of the older ones, G_w and G_d their gradients; l is a layer.
`passes` computes losses and gradients over all views, `Stage` has the verbs, and a schedule of
`schedules` says where gradients lie and when they are applied.
"""

from torch import Tensor

from bld_ext.api.schedules import Schedule
from bld_ext.api.stage import Stage

LOSSES = ("new", "distillation")


def warm_up(stage: Stage, schedule: Schedule) -> tuple[Tensor, Tensor, Tensor]:
    """Algorithm 1. Returns L_t, the bank, and ‖G_w[l]‖ of each layer.

    for each view v:
        ŷ_v^o = softmax(z_v^o / τ) of every older head o
        G_w += dL_t(v)/dθ / V
    keep ‖G_w[l]‖ of each layer l
    θ' = θ - α_w G_w
    """
    (loss, bank), norms = schedule.descend(stage, stage.fill_bank, measure=True)
    return loss, bank, norms


def joint(stage: Stage, schedule: Schedule, losses: tuple[str, ...] = LOSSES) -> Tensor:
    """Algorithm 2, one repetition. Returns L_t, or L_d where that alone is learned.

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
