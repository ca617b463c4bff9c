"""Every system of the paper: one batch against its equations in float64, and what it holds.

The expected side uses neither the optimizer nor the ops: one graph over all views, plain BatchNorm,
torch's own cross-entropy.
"""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from benchmarks.paper import tables
from benchmarks.paper.methods import MC_OCL, METHODS, PAPER, PRESETS, Settings
from benchmarks.paper.networks import make_model as make_network
from benchmarks.paper.streams import Task
from bld_ext import SeededAugment
from bld_ext.api import in_backward

AUGMENT = {"crop_padding": 1, "flip": 0.5, "rotation": 15, "dtype": torch.float64}
SETTINGS = Settings(
    "none", 0.05, 3, AUGMENT, warmup_ratio=0.2, balance=1.5, temperature=2.0, l2_weight=0.4,
    offline_lr=0.01, offline_epochs=2, offline_batch=4,
)  # fmt: skip
SEED = 3


@pytest.fixture
def task():
    generator = torch.Generator().manual_seed(7)
    images = torch.randint(256, (10, 3, 8, 8), generator=generator, dtype=torch.uint8)
    labels = torch.randint(2, (10,), generator=generator)
    return Task((4, 5), images, labels, images, labels)


class Equations:
    """θ of one batch, step by step; `model` has the new head last."""

    def __init__(self, model, images, labels, views):
        self.model, self.labels = model, labels
        augment = SeededAugment(**AUGMENT)
        self.views = [augment(images, seed=SEED, step=0, views=[v]) for v in range(views)]
        self.names = dict(model.named_parameters())

    def heads(self):
        return [self.model(x).split(list(self.model.head_sizes), 1) for x in self.views]

    def new(self, heads):
        losses = [F.cross_entropy(h[-1], self.labels, reduction="sum") for h in heads]
        return sum(losses) / len(self.views)

    def bank(self):
        tau = SETTINGS.temperature
        return [[(z / tau).softmax(1).detach() for z in h[:-1]] for h in self.heads()]

    def old(self, heads, bank):
        total = 0
        for h, targets in zip(heads, bank, strict=True):
            for z, target in zip(h[:-1], targets, strict=True):
                total = total - (target * (z / SETTINGS.temperature).log_softmax(1)).sum()
        return total / len(self.views)

    def gradient(self, loss):
        params = list(self.names.values())
        grads = torch.autograd.grad(loss, params, retain_graph=True, allow_unused=True)
        return {
            n: torch.zeros_like(p) if g is None else g
            for (n, p), g in zip(self.names.items(), grads, strict=True)
        }

    @torch.no_grad()
    def update(self, grads, lr):
        for name, param in self.names.items():
            param -= lr * grads[name]

    def norms(self, grads):
        squares = {}
        for name, grad in grads.items():
            layer = name.rpartition(".")[0]
            squares[layer] = squares.get(layer, 0) + (grad**2).sum()
        return {layer: square.sqrt() for layer, square in squares.items()}


def warm_up(e):
    grads = e.gradient(e.new(e.heads()))
    e.update(grads, SETTINGS.warmup_ratio * SETTINGS.lr)
    return grads


def finetune(e, _):
    warm_up(e)
    for _ in range(2):
        e.update(e.gradient(e.new(e.heads())), SETTINGS.lr)


def l2(e, _):
    before = {n: p.detach().clone() for n, p in e.names.items()}
    warm_up(e)
    for _ in range(2):
        penalty = sum(((p - before[n]) ** 2).sum() for n, p in e.names.items())
        weight = SETTINGS.l2_weight / (2 * SETTINGS.lr)
        e.update(e.gradient(e.new(e.heads()) + weight * penalty), SETTINGS.lr)


def bld(e, _):
    bank = e.bank()
    reference = e.norms(warm_up(e))
    for _ in range(2):
        heads = e.heads()
        new, old = e.gradient(e.new(heads)), e.gradient(e.old(heads, bank))
        norms = e.norms(old)
        total = {}
        for name in new:
            layer = name.rpartition(".")[0]
            nothing = norms[layer] == 0
            factor = 0 if nothing else SETTINGS.balance * reference[layer] / norms[layer]
            total[name] = new[name] + factor * old[name]
        e.update(total, SETTINGS.lr)


def no_balancing(e, _):
    bank = e.bank()
    warm_up(e)
    for _ in range(2):
        heads = e.heads()
        e.update(e.gradient(e.new(heads) + e.old(heads, bank)), SETTINGS.lr)


def alternated(e, _):
    bank = e.bank()
    for _ in range(2):
        e.update(e.gradient(e.new(e.heads())), SETTINGS.lr)
        e.update(e.gradient(e.old(e.heads(), bank)), SETTINGS.lr)


def stored(before, images, views):
    """Of the images as they are, by the network as it was, in eval mode: the same for each view."""
    logits = copy.deepcopy(before).eval()((images / 255).double())
    parts = logits.split(list(before.head_sizes), 1)
    return [[(z / SETTINGS.temperature).softmax(1).detach() for z in parts]] * views


def lwf(e, targets):
    warm_up(e)
    for _ in range(2):
        heads = e.heads()
        e.update(e.gradient(e.new(heads) + e.old(heads, targets)), SETTINGS.lr)


def offline(e, targets):
    heads = e.heads()
    e.update(e.gradient(e.new(heads) + e.old(heads, targets[:1])), SETTINGS.offline_lr)


EXPECTED = {
    "finetune": finetune, "l2": l2, "bld": bld, "alternated": alternated,
    "no-balancing": no_balancing, "lwf": lwf, "lwf-offline": offline,
}  # fmt: skip


@pytest.mark.parametrize("name", PAPER)
def test_one_batch_is_its_equations(name, make_model, task):
    model = make_model((2, 3), dtype=torch.float64)
    before, learner = copy.deepcopy(model), METHODS[name](model, SETTINGS, SEED)
    learner.begin(task)
    model.add_head(2)
    where, images, labels = next(iter(learner.batches(task, 0)))
    equations = copy.deepcopy(before)
    equations.heads.append(copy.deepcopy(model.heads[-1]))
    views = 1 if name == "lwf-offline" else SETTINGS.views
    targets = stored(before, task.x_train[where], SETTINGS.views)
    EXPECTED[name](Equations(equations, images, labels, views), targets)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}

    learner.learn(where, images, labels)
    for (n, found), right in zip(model.named_parameters(), equations.parameters(), strict=True):
        torch.testing.assert_close(found, right, rtol=1e-9, atol=1e-12, msg=n)
    assert any(not torch.equal(p, start[n]) for n, p in model.named_parameters())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("schedule", ["shared_forward", "in_backward"])
@pytest.mark.parametrize("name", ["finetune", "l2", "bld", "no-balancing", "alternated", "lwf"])
def test_every_schedule_learns_the_same(name, schedule, make_model, task, monkeypatch):
    monkeypatch.setattr(in_backward, "BUCKET_BYTES", 100)  # several updates a stage
    networks = []
    for chosen in ("two_forward", schedule):
        model = make_model((2, 3), dtype=torch.float64)
        learner = METHODS[name](model, replace(SETTINGS, schedule=chosen), SEED)
        learner.begin(task)
        torch.manual_seed(0)
        model.add_head(2)
        learner.learn(*next(iter(learner.batches(task, 0))))
        networks.append(model)
    for a, b in zip(*(model.parameters() for model in networks), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("name", PAPER)
def test_the_first_task_has_nothing_to_distil(name, make_model, task):
    model = make_model((), dtype=torch.float64)
    learner = METHODS[name](model, SETTINGS, SEED)
    learner.begin(task)
    model.add_head(2)
    for where, images, labels in learner.batches(task, 0):
        learner.learn(where, images, labels)
    assert all(p.isfinite().all() for p in model.parameters())
    if name != "l2":
        assert learner.extra_bytes()["intra"] == 0


def test_offline_epochs_see_every_image_in_another_order(make_model, task):
    learner = METHODS["lwf-offline"](make_model((2,)), SETTINGS, SEED)
    orders = [torch.cat([where for where, *_ in learner.batches(task, epoch)]) for epoch in (0, 1)]
    assert all(order.sort().values.tolist() == list(range(10)) for order in orders)
    assert not torch.equal(*orders)
    assert torch.equal(orders[1], torch.cat([w for w, *_ in learner.batches(task, 1)]))


# ---- bytes ----


def expected_columns(method, batch, views, task_images, image_bytes, sizes, network):
    """Bytes at the last of the tasks, by the paper's formulas; `task_images` is a task's mean."""
    old = sum(sizes[:-1])
    if method == "l2":
        return {"intra": network, "inter": 0, "data": 0}
    if method.startswith("lwf"):
        held = task_images * old * 4
        return {"intra": held, "inter": held, "data": task_images * image_bytes}
    bank = 0 if method == "finetune" else batch * views * old * 4
    return {"intra": bank, "inter": 0, "data": 0}


def columns(method, images, image_bytes, sizes, network=0):
    return expected_columns(method, 20, 50, images, image_bytes, sizes, network)


def test_the_printed_bytes_by_formula():
    pairs = [2] * 5
    assert columns("bld", 12_000, 0, pairs)["intra"] == 32_000
    assert columns("lwf", 60_000 / 5, 0, pairs)["inter"] == 384_000
    assert columns("lwf-offline", 50_000 / 5, 0, pairs)["intra"] == 320_000
    svhn = columns("lwf", 73_257 / 5, 0, pairs)["intra"]
    assert round(svhn / 1e3) == 469 and tables.size(int(svhn)) == "469 kB"
    model = make_network("resnet18")
    for _ in range(5):
        model.add_head(2)
    held = [*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())]
    network = sum(t.nbytes for t in held)
    assert tables.size(columns("l2", 0, 0, pairs, network)["intra"]) == "44.8 MB"


@pytest.mark.parametrize("name", PAPER)
def test_the_ledger_is_the_formula(name, make_model, task):
    model = make_model((2, 3))
    settings = Settings("none", 0.05, 3, {"crop_padding": 1}, batch_size=10, offline_batch=10)
    learner = METHODS[name](model, settings, SEED)
    learner.begin(task)
    model.add_head(2)
    learner.learn(*next(iter(learner.batches(task, 0))))
    floats = [*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())]
    expected = expected_columns(
        name, 10, 3, 10, 3 * 8 * 8, [2, 3, 2], sum(t.nbytes for t in floats)
    )
    assert learner.extra_bytes() == expected


@pytest.mark.parametrize("name", MC_OCL)
def test_nothing_but_the_network_survives_a_batch(name, make_model, task):
    """Every tensor that can be reached from the learner is the network's, or a few numbers."""
    model = make_model((2, 3))
    settings = Settings("none", 0.05, 3, {"crop_padding": 1}, batch_size=10)
    learner = METHODS[name](model, settings, SEED)
    learner.begin(task)
    model.add_head(2)
    learner.learn(*next(iter(learner.batches(task, 0))))
    network = {id(t) for t in [*model.parameters(), *model.buffers()]}
    seen, found, queue = set(), [], [learner.optimizer, learner.__dict__]
    while queue:
        thing = queue.pop()
        if id(thing) in seen or thing is model:
            continue
        seen.add(id(thing))
        if isinstance(thing, torch.Tensor):
            found.append(thing)
        elif isinstance(thing, dict):
            queue += [*thing.keys(), *thing.values()]
        elif isinstance(thing, (list, tuple, set)):
            queue += thing
        elif hasattr(thing, "__dict__") and not isinstance(thing, (type, torch.nn.Module)):
            queue.append(vars(thing))
    others = [t for t in found if id(t) not in network]
    assert all(t.numel() <= len(learner.optimizer.last.layers) for t in others)  # the report


# ---- printed values ----


def test_every_table_knows_what_was_printed():
    for table in tables.TABLES.values():
        for dataset, tasks in table.streams:
            assert PRESETS[dataset]
            for method in table.methods:
                values = tables.printed(dataset, tasks, method)
                assert len(values) == tasks + 1
                assert values[-1] == pytest.approx(sum(values[:-1]) / tasks, abs=0.11)
    assert tables.printed("mnist", 5, "bld")[-1] == 89.9
    assert tables.printed("cifar10", 5, "bld")[-1] == 86.2
    assert tables.printed("svhn", 5, "l2")[-1] == 83.9  # 81.3 is printed
    assert tables.printed("digits", 5, "bld") is None


def test_backward_transfer_is_last_minus_first():
    record = {"accuracy": [[90.0], [95.0, 80.0], [70.0, 85.0, 99.0]]}
    assert tables.backward_transfer(record) == pytest.approx((70 - 90 + 85 - 80) / 2)
