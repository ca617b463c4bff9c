"""Changes of BLD that were tried, each a method of its own. None of them is part of the package.

Their results are in README.md. Most are a schedule, which combines G_d and dL_t/dθ in
its own way, or makes them of something else.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from benchmarks.paper.methods import BLD, METHODS, Alternated, Settings, evaluating
from bld_ext import MultiHead, SeededAugment, ops
from bld_ext.api import passes
from bld_ext.api.layers import Layers
from bld_ext.api.pooled import not_gathered
from bld_ext.api.schedules import SCHEDULES, SharedForward, TwoForward
from bld_ext.api.stage import Stage
from bld_ext.api.views import Views
from bld_ext.philox import stream_seed

Gradients = dict[Tensor, Tensor]  # of each parameter
OTHERS_RNG = 253  # the op word of the Philox counter


def inner_products(layers: Layers, a: Gradients, b: Gradients) -> Tensor:
    """Return ⟨a[l], b[l]⟩ of each layer, `[L]` in float64."""
    found = torch.zeros(len(layers.names), dtype=torch.float64)
    for param in a.keys() & b.keys():
        found[layers.index[param]] += (a[param].double() * b[param].double()).sum().cpu()
    return found


class Combined(SharedForward):
    """Holds G_d and dL_t/dθ apart; a subclass says which gradient is made of them."""

    def combine(self, layers: Layers, old: Gradients, new: Gradients) -> Gradients:
        """Return G, given the balanced G_d and dL_t/dθ: their sum, as in BLD."""
        return added(old, new)

    def gradients(self, stage: Stage, params: list[Tensor]) -> tuple[Tensor, Gradients]:
        """Add dL_t/dθ to .grad; return L_t and the balanced G_d."""
        loss, old_loss, old = passes.shared_pass(stage.views, stage.bank, stage.temperature, params)
        stage.note_distillation(old_loss)
        stage.rescale(old)
        return loss, old

    def descend_both(self, stage: Stage) -> Tensor:
        params = [p for p in stage.params if p.requires_grad]
        loss, old = self.gradients(stage, params)
        new = {p: p.grad for p in stage.arrived()}
        for param, grad in self.combine(stage.layers, old, new).items():
            param.grad = grad
        stage.note_step(self._update(stage, loss, measure=stage.is_measured))
        return loss


def added(a: Gradients, b: Gradients) -> Gradients:
    return {p: a[p] + b[p] if p in a and p in b else a.get(p, b.get(p)) for p in {**a, **b}}


def scaled(layers: Layers, grads: Gradients, factors: Tensor) -> Gradients:
    """Return `grads` with those of layer l times factors[l]."""
    values = factors.tolist()
    return {p: g * values[layers.index[p]] for p, g in grads.items()}


class Projected(Combined):
    """dL_t/dθ loses in each layer what would raise L_d: its part against G_d. G_d is added."""

    keeps_old = True

    def combine(self, layers, old, new):
        dots, squares = inner_products(layers, old, new), inner_products(layers, old, old)
        share = torch.where(squares > 0, -dots.clamp(max=0) / squares, 0)
        new = added(new, scaled(layers, old, share))
        return added(old, new) if self.keeps_old else new


class ProjectedAlone(Projected):
    """The same without G_d, which only bounds dL_t/dθ: A-GEM (ICLR 2019) with G_d for memory."""

    keeps_old = False


class Gated(Combined):
    """G_d is added only in layers where it does not point against dL_t/dθ."""

    def combine(self, layers, old, new):
        return added(new, scaled(layers, old, (inner_products(layers, old, new) >= 0).double()))


class SparedNorms(Combined):
    """BatchNorm's parameters are not balanced: their part of G_d keeps factor 1."""

    def gradients(self, stage, params):
        loss, old = super().gradients(stage, params)
        factors = stage.report.factors[-1].double().cpu()
        norms = {
            stage.layers.index[p]
            for module in stage.views.model.modules()
            if isinstance(module, nn.BatchNorm2d)
            for p in module.parameters()
        }
        back = torch.ones_like(factors)
        for l in norms:
            back[l] = 1 / factors[l] if factors[l] > 0 else 1
        return loss, scaled(stage.layers, old, back)


class BalancedToNow(Combined):
    """G_d is balanced to the norm of dL_t/dθ at the present weights, not to that of the warm-up."""

    def combine(self, layers, old, new):
        now, before = inner_products(layers, new, new), self.reference
        factors = torch.where(before > 0, now.sqrt() / before, 1)
        return added(scaled(layers, old, factors), new)

    def gradients(self, stage, params):
        self.reference = stage.reference_norms.double().cpu()
        return super().gradients(stage, params)


class Features(Combined):
    """Distils the features by half their squared distance, in place of the logits."""

    beside_logits = False

    def __init__(self):
        self.bank: list[Tensor] = []  # of the warm-up's passes; released with the next batch

    def watched(self, stage: Stage, to: list[Tensor]):
        return stage.views.model.backbone.register_forward_hook(lambda *call: to.append(call[2]))

    def descend(self, stage, run, measure=False):
        found: list[Tensor] = []
        hook = self.watched(stage, found)
        try:
            result = super().descend(stage, run, measure)
        finally:
            hook.remove()
        if measure:
            self.bank = [features.detach() for features in found]
        return result

    def gradients(self, stage, params):
        views, found = stage.views, []
        sums: list[Gradients] = [{}, {}]
        new_losses, old_losses = [], []
        hook = self.watched(stage, found)
        try:
            for i, each in enumerate(views):
                new, old, new_grad, old_grad = ops.joint_loss(
                    each.logits, each.labels, stage.bank[each.rows], views.sizes,
                    stage.temperature, with_gradient=True,
                )  # fmt: skip
                moved = (found[-1] - self.bank[i]).detach() / views.count
                for total, output, grad in (
                    (sums[0], found[-1], moved), (sums[1], each.logits, old_grad / views.count)
                ):  # fmt: skip
                    grads = torch.autograd.grad(
                        output, params, grad, retain_graph=True, allow_unused=True
                    )
                    for param, g in zip(params, grads, strict=True):
                        if g is not None:
                            total[param] = total[param] + g if param in total else g.clone()
                each.logits.backward(new_grad / views.count)
                new_losses.append(new)
                old_losses.append(old)
        finally:
            hook.remove()
        stage.note_distillation(torch.stack(old_losses).sum() / views.count)
        stage.rescale(sums[0])
        if self.beside_logits:
            stage.rescale(sums[1])
            both = added(*sums)
            sums[0] = {p: g / 2 for p, g in both.items()}
        return torch.stack(new_losses).sum() / views.count, sums[0]


class FeaturesAndLogits(Features):
    """Distils both, each balanced to λ/2."""

    beside_logits = True


def turned(views: Tensor, generator: torch.Generator) -> Tensor:
    """Turn all images alike, by 90, 180 or 270 degrees, and in half of all calls mirror them."""
    quarters, mirror = divmod(int(torch.randint(2, 8, (1,), generator=generator)), 2)
    views = torch.rot90(views, quarters, (2, 3))
    return views.flip(3) if mirror else views


def puzzled(views: Tensor, generator: torch.Generator) -> Tensor:
    """Make each quarter of an image from a random quarter of another, turned or mirrored."""
    side, made = views.shape[2] // 2, torch.empty_like(views)
    for y, x in ((0, 0), (0, side), (side, 0), (side, side)):
        order = torch.randperm(len(views), generator=generator)
        down, right = (side * i for i in torch.randint(2, (2,), generator=generator).tolist())
        quarter = views[order, :, down : down + side, right : right + side]
        made[:, :, y : y + side, x : x + side] = turned(quarter, generator)
    return made


class Elsewhere(TwoForward):
    """Distils on other images, each made from a view. L_t stays on the views."""

    def __init__(self, change: Callable[[Tensor, torch.Generator], Tensor]):
        self.change = change  # of the images of one view, which are square with an even side
        self.bank: Tensor | None = None  # of the batch; replaced with the next one

    def others(self, stage: Stage) -> Views:
        augment = stage.views.augment

        def changed(images: Tensor, *, seed: int, step: int, views: range, **rest) -> Tensor:
            made = augment(images, seed=seed, step=step, views=views, **rest)
            parts = []
            for part, view in zip(made.split(len(images)), views, strict=True):
                generator = torch.Generator().manual_seed(stream_seed(seed, step, view, OTHERS_RNG))
                parts.append(self.change(part, generator))
            return torch.cat(parts)

        return replace(stage.views, augment=changed)

    def descend(self, stage, run, measure=False):
        if stage.bank is None:
            self.bank = self.predictions(stage)
        return super().descend(stage, run, measure)

    @torch.no_grad()
    def predictions(self, stage: Stage) -> Tensor:
        sizes = stage.views.sizes[:-1]
        with not_gathered(stage.views.norms):
            return torch.cat(
                [
                    ops.head_softmax(
                        each.logits[:, : sum(sizes)].contiguous(), sizes, stage.temperature
                    )
                    for each in self.others(stage)
                ]
            )

    def distil(self, stage):
        return super().distil(replace(stage, views=self.others(stage), bank=self.bank))


VARIANTS = {
    "projected": Projected(),
    "projected-alone": ProjectedAlone(),
    "gated": Gated(),
    "spared-norms": SparedNorms(),
    "balanced-to-now": BalancedToNow(),
    "features": Features(),
    "features-and-logits": FeaturesAndLogits(),
    "turned": Elsewhere(turned),
    "puzzled": Elsewhere(puzzled),
}
SCHEDULES.update(VARIANTS)


def method(name: str) -> type[BLD]:
    class Variant(BLD):
        __doc__ = VARIANTS[name].__doc__
        capturable = False

        def __init__(self, *args: object):
            super().__init__(*args)
            if self.optimizer.views_here != range(self.settings.views):
                raise ValueError(
                    f"method: {name} holds gradients apart that several processes do not add up; "
                    "run it in one process, without torchrun"
                )

        def options(self, s: Settings) -> dict:
            return super().options(s) | {"schedule": name}

    return Variant


class AlternatedBalanced(Alternated):
    """`Alternated` with balancing: a step on L_d has λ times the length of the first one on L_t."""

    def options(self, s: Settings) -> dict:
        return super().options(s) | {"balance": s.balance}


class EvalBank(BLD):
    """The bank is made in eval mode, with the running statistics."""

    capturable = False

    def bank(self, images: Tensor, number: int) -> Tensor:
        model, optimizer = self.model, self.optimizer
        sizes = list(model.head_sizes[:-1])
        views = optimizer.augment(
            images, seed=optimizer.seed, step=number, views=optimizer.views_here
        )
        with evaluating(model):
            logits = model(views)[:, : sum(sizes)]
        if not sizes:
            return logits
        return ops.head_softmax(logits.contiguous(), sizes, self.settings.temperature)

    def learn(self, where: Tensor, images: Tensor, labels: Tensor) -> None:
        bank = self.bank(images, self.optimizer.batches)
        try:
            self.optimizer.warm_up(images, labels)
            for _ in range(self.settings.joint_steps):
                self.optimizer.joint(images, labels, bank=bank)
        finally:
            self.optimizer.release()


class ZeroHeads(BLD):
    """A new head begins with zeros."""

    capturable = False

    def __init__(self, model: MultiHead, *rest: object):
        def make(inputs: int, outputs: int) -> nn.Linear:
            head = nn.Linear(inputs, outputs)
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)
            return head

        model._make_head = make
        super().__init__(model, *rest)


class Recentred(BLD):
    """BLD, and after each batch the old heads' biases take back the mean change of their logits.

    The change is that of the batch's own images, without augmentation and in eval mode.
    """

    capturable = False

    def old_logits(self, images: Tensor) -> Tensor:
        """Return the mean old logits of a batch, `[C_old]`."""
        model = self.model
        plain = SeededAugment(dtype=next(model.parameters()).dtype).plain
        with evaluating(model):
            return model(plain(images))[:, : sum(model.head_sizes[:-1])].mean(0)

    def learn(self, where: Tensor, images: Tensor, labels: Tensor) -> None:
        before = self.old_logits(images)
        super().learn(where, images, labels)
        change = (self.old_logits(images) - before).split(list(self.model.head_sizes[:-1]))
        for head, moved in zip(self.model.heads, change, strict=False):
            head.bias.data -= moved


class RecentredFinetune(Recentred):
    """Finetuning with the same correction."""

    def options(self, s: Settings) -> dict:
        return super().options(s) | {"balance": 0.0}


METHODS.update({name: method(name) for name in VARIANTS})
METHODS.update(
    {
        "alternated-balanced": AlternatedBalanced,
        "eval-bank": EvalBank,
        "zero-heads": ZeroHeads,
        "recentred": Recentred,
        "recentred-finetune": RecentredFinetune,
    }
)
