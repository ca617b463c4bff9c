"""BLDOptimizer against Algorithms 1 and 2 written straight down, in float64.

Nothing below uses the optimizer, the ops or ViewBatchNorm: plain autograd over one graph of all
views, plain BatchNorm, torch's own cross-entropy. Only the views and their seeds come from the
package.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from arrange import arranged
from torch import nn

from bld_ext import SeededAugment
from bld_ext.philox import stream_seed

LR, WARMUP_LR, TEMPERATURE, BALANCE, VIEWS, SEED = 0.05, 0.002, 2.0, 1.5, 4, 3
AUGMENT = SeededAugment(crop_padding=1, flip=0.5, rotation=15, jitter=0.2, dtype=torch.float64)
TASKS = (2, 3, 2)
BATCHES = 3


class StraightLine:
    """θ → θ' → θ'' → θ''' of one batch, equation by equation."""

    def __init__(self, model, layer, warmup_lr=WARMUP_LR):
        self.model, self.layer, self.number = model, layer, 0
        self.warmup_lr = warmup_lr
        self.new_share = {}  # ⟨G, G_t⟩ / ‖G_t‖² of each layer in the first repetition
        self.norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]

    def logits(self, images):
        """Logits of every view, a list of heads a view."""
        views = []
        for v in range(VIEWS):
            x = AUGMENT(images, seed=SEED, step=self.number, views=[v])
            torch.manual_seed(stream_seed(SEED, self.number, v, 255))
            views.append(self.model(x).split(list(self.model.head_sizes), 1))
        return views

    def new_loss(self, views, labels):
        return sum(F.cross_entropy(h[-1], labels, reduction="sum") for h in views) / VIEWS

    def layer_of(self, name):
        return {"module": name.rsplit(".", 1)[0], "tensor": name, "network": ""}[self.layer]

    def norm(self, grads):
        """‖G‖ of each layer."""
        squares = {}
        for name, grad in grads.items():
            layer = self.layer_of(name)
            squares[layer] = squares.get(layer, 0) + (grad**2).sum()
        return {layer: square.sqrt() for layer, square in squares.items()}

    def share(self, total, new):
        products, squares = {}, self.norm(new)
        for name in new:
            layer = self.layer_of(name)
            products[layer] = products.get(layer, 0) + (total[name] * new[name]).sum()
        return {layer: product / squares[layer] ** 2 for layer, product in products.items()}

    def gradient(self, loss):
        names, params = zip(*self.model.named_parameters(), strict=True)
        grads = torch.autograd.grad(loss, params, retain_graph=True, allow_unused=True)
        return {
            n: torch.zeros_like(p) if g is None else g
            for n, p, g in zip(names, params, grads, strict=True)
        }

    @torch.no_grad()
    def update(self, grads, lr):
        for name, param in self.model.named_parameters():
            param -= lr * grads[name]

    def batch(self, images, labels):
        inputs = {norm: [] for norm in self.norms}
        hooks = [
            n.register_forward_hook(lambda m, x, _: inputs[m].append(x[0])) for n in self.norms
        ]
        running = copy.deepcopy([(n.running_mean, n.running_var) for n in self.norms])

        views = self.logits(images)
        for hook in hooks:
            hook.remove()
        bank = [[(z / TEMPERATURE).softmax(1).detach() for z in heads[:-1]] for heads in views]
        loss = self.new_loss(views, labels)
        G_w = self.gradient(loss)
        norm_w = self.norm(G_w)
        self.update(G_w, self.warmup_lr)

        for repetition in range(2):
            views = self.logits(images)
            G_t = self.gradient(self.new_loss(views, labels))
            if len(views[0]) > 1:
                L_d = 0
                for heads, targets in zip(views, bank, strict=True):
                    for z, target in zip(heads[:-1], targets, strict=True):
                        L_d -= (target * (z / TEMPERATURE).log_softmax(1)).sum() / VIEWS
                G_d = self.gradient(L_d)
                norm_d = self.norm(G_d)
                alone = dict(G_t)
                for name, grad in G_d.items():
                    layer = self.layer_of(name)
                    if norm_d[layer] > 0:
                        G_t[name] = G_t[name] + BALANCE * norm_w[layer] / norm_d[layer] * grad
                if repetition == 0:
                    self.new_share = self.share(G_t, alone)
            self.update(G_t, LR)

        self.number += 1
        for norm, (mean, var) in zip(self.norms, running, strict=True):
            x = torch.cat(inputs[norm]).detach()  # all views as one batch
            weight = 0.1 / (1 - 0.9**self.number)
            norm.running_mean = mean.lerp(x.mean((0, 2, 3)), weight)
            norm.running_var = var.lerp(x.var((0, 2, 3)), weight)
        return loss


@pytest.mark.parametrize("layer", ["module", "tensor", "network"])
@pytest.mark.parametrize("schedule", ["two_forward", "shared_forward", "in_backward"])
@pytest.mark.parametrize("views_per_pass", [1, 3, 4], ids="{}_views_a_pass".format)
def test_equals_the_paper_s_algorithms(schedule, layer, views_per_pass, make_model, make_batch):
    # a mask is drawn for a whole pass and laid out as the images are, so it agrees with the
    # straight line only for single contiguous views
    model = make_model(dropout=0.2 if views_per_pass == 1 else 0, dtype=torch.float64)
    straight = StraightLine(copy.deepcopy(model), layer)
    optimizer = arranged(
        model, LR, warmup_lr=WARMUP_LR, temperature=TEMPERATURE, balance=BALANCE, views=VIEWS,
        views_per_pass=views_per_pass, augment=AUGMENT, layer=layer, schedule=schedule, seed=SEED,
        channels_last=views_per_pass > 1,
    )  # fmt: skip
    for task, classes in enumerate(TASKS):
        head = model.add_head(classes)
        straight.model.add_head(classes).load_state_dict(head.state_dict())
        for number in range(BATCHES):
            batch = make_batch(classes, 10 * task + number, dtype=torch.float64)
            start = {n: p.detach().clone() for n, p in model.named_parameters()}
            loss = optimizer.step(*batch)
            torch.testing.assert_close(loss, straight.batch(*batch), rtol=1e-10, atol=1e-10)
            moved = max((p - start[n]).abs().max() for n, p in model.named_parameters())
            assert moved > 1e-3
    for name, value in straight.model.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(
                model.state_dict()[name],
                value,
                rtol=1e-10,
                atol=1e-10,
                msg=lambda m, n=name: f"{n}: {m}",
            )


@pytest.mark.parametrize("layer", ["module", "tensor", "network"])
@pytest.mark.parametrize("views_per_pass", [1, 4], ids="{}_views_a_pass".format)
@pytest.mark.parametrize("schedule", ["two_forward", "shared_forward", "in_backward"])
@pytest.mark.parametrize("check_finite", [False, True], ids=["", "check_finite"])
def test_reports_the_share_of_the_new_task_s_step(
    check_finite, schedule, views_per_pass, layer, make_model, make_batch
):
    """The warm-up is so short that G_w is dL_t/dθ' but for rounding, and G_d is still clear."""
    model = make_model(dtype=torch.float64)
    straight = StraightLine(copy.deepcopy(model), layer, warmup_lr=1e-6)
    optimizer = arranged(
        model, LR, warmup_lr=1e-6, temperature=TEMPERATURE, balance=BALANCE, views=VIEWS,
        views_per_pass=views_per_pass, augment=AUGMENT, layer=layer, schedule=schedule, seed=SEED,
        check_finite=check_finite,
    )  # fmt: skip
    assert optimizer.last is None
    for task, classes in enumerate((2, 3)):
        head = model.add_head(classes)
        straight.model.add_head(classes).load_state_dict(head.state_dict())
        for number in range(2):
            batch = make_batch(classes, 10 * task + number, dtype=torch.float64)
            optimizer.step(*batch)
            straight.batch(*batch)
            if task == 0:
                assert optimizer.last.new_share is None
                continue
            found = dict(zip(optimizer.last.layers, optimizer.last.new_share, strict=True))
            assert found and all(value.dtype == torch.float64 for value in found.values())
            norms = dict(zip(optimizer.last.layers, optimizer.last.reference_norms, strict=True))
            for name, value in found.items():
                if 0 < norms[name] < 1e-10:  # a bias before BatchNorm, whose gradient is rounding
                    continue
                expected = straight.new_share["" if layer == "network" else name]
                torch.testing.assert_close(
                    value, expected, rtol=1e-4, atol=1e-4, equal_nan=True, msg=str((name, found))
                )
            old = [name for name in found if name.startswith("heads.0")]
            assert all(found[name].isnan() for name in old)  # which have no gradient of it
            others = torch.stack([found[name] for name in found if name not in old])
            assert (others - 1).abs().max() > 0.05


@pytest.mark.parametrize("schedule", ["two_forward", "shared_forward", "in_backward"])
def test_no_share_without_a_warm_up_or_after_a_step_on_one_loss(schedule, make_model, make_batch):
    model, batch = make_model(heads=(2, 3)), make_batch(3)
    optimizer = arranged(model, LR, views=2, schedule=schedule, balance=None)
    optimizer.joint(*batch, bank=torch.full((2 * len(batch[1]), 2), 0.5))
    assert optimizer.last.new_share is None
    optimizer.release()
    for first in ("new", "distillation"):
        optimizer.warm_up(*batch)
        optimizer.joint(*batch, losses=[first])
        optimizer.joint(*batch)
        assert optimizer.last.new_share is None
        optimizer.release()
    optimizer.step(*batch)
    assert optimizer.last.new_share.isfinite().any()
