"""BLDOptimizer as a torch optimizer: what code around it may rely on."""

import copy
import functools
import io
import pickle
import subprocess
import sys
import warnings

import pytest
import torch
from arrange import arranged
from torch import nn

from bld_ext import BLDOptimizer, MultiHead, SeededAugment

AUGMENT = SeededAugment(crop_padding=1, rotation=15)


def make_optimizer(model, **options):
    return arranged(model, **{"lr": 0.05, "views": 3, "augment": AUGMENT} | options)


def learn(optimizer, make_batch, numbers, classes=2):
    return [optimizer.step(*make_batch(classes, number)) for number in numbers]


def assert_same_network(a, b):
    for (name, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert torch.equal(x, y), name


def test_it_learns(make_model, make_batch):
    model = make_model(heads=(2, 2))
    optimizer = make_optimizer(model, warmup_lr=5e-4, lr=0.02)
    losses = learn(optimizer, make_batch, [0] * 40)
    assert losses[-1] < 0.5 * losses[0]


def test_the_default_is_the_paper_s(make_model):
    optimizer = BLDOptimizer(make_model(heads=(2,)), augment=AUGMENT)
    assert optimizer.param_groups[0]["lr"] == 1e-4
    assert (optimizer.warmup_ratio, optimizer.balance, optimizer.views) == (0.01, 2.0, 50)
    assert (optimizer.joint_steps, type(optimizer.base)) == (2, torch.optim.SGD)
    assert BLDOptimizer(make_model(heads=(2,))).views == 1


def test_step_is_warm_up_and_joint_repetitions(make_model, make_batch):
    models = [make_model(heads=(2, 2)) for _ in range(2)]
    whole, parts = (make_optimizer(model) for model in models)
    batch = make_batch(2)
    returned = whole.step(*batch)
    assert torch.equal(parts.warm_up(*batch), returned)
    for _ in range(2):
        parts.joint(*batch)
    parts.release()
    assert_same_network(*models)


@pytest.mark.parametrize(
    "scheduler",
    [
        functools.partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.5),
        functools.partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=lambda i: 0.5**i),
        functools.partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5),
    ],
    ids=["exponential", "lambda", "step"],
)
def test_a_scheduler_moves_both_learning_rates(scheduler, make_model, make_batch):
    """Also for a head added after the scheduler was made."""
    model = make_model(heads=(2,))
    optimizer = make_optimizer(model, lr=0.04)
    scheduled = scheduler(optimizer)
    learn(optimizer, make_batch, [0])
    scheduled.step()
    model.add_head(2)
    by_hand = copy.deepcopy(model)
    learn(optimizer, make_batch, [1])
    scheduled.step()
    assert optimizer.param_groups[0]["lr"] == 0.01

    other = make_optimizer(by_hand, lr=0.02, warmup_lr=0.0002)
    other.batches = 1
    learn(other, make_batch, [1])
    assert_same_network(model, by_hand)


def test_hooks_run_once_a_step(make_model, make_batch):
    optimizer = make_optimizer(make_model(heads=(2, 2)))
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    learn(optimizer, make_batch, [0, 1])
    assert calls == ["before", "after"] * 2


@pytest.mark.filterwarnings("ignore:BLDOptimizer")
@pytest.mark.parametrize("base", ["sgd", "momentum", "adam"])
def test_state_dict_resumes_bit_for_bit_in_the_middle_of_a_stream(base, make_model, make_batch):
    make_base = {
        "sgd": torch.optim.SGD,
        "momentum": functools.partial(torch.optim.SGD, momentum=0.9),
        "adam": torch.optim.Adam,
    }[base]

    def fresh(heads=()):
        model = make_model(heads, dropout=0.2)
        return model, make_optimizer(model, base=make_base, lr=0.01, seed=5)

    whole, optimizer = fresh()
    whole.add_head(2)
    learn(optimizer, make_batch, [0, 1])
    whole.add_head(2)
    learn(optimizer, make_batch, [2])
    saved = io.BytesIO()
    torch.save({"model": whole.state_dict(), "optimizer": optimizer.state_dict()}, saved)
    expected = learn(optimizer, make_batch, [3, 4])

    saved.seek(0)
    checkpoint = torch.load(saved, weights_only=True)
    resumed, other = fresh()
    other.seed = 0
    resumed.load_state_dict(checkpoint["model"])
    other.load_state_dict(checkpoint["optimizer"])
    torch.manual_seed(99)
    assert [a.item() for a in learn(other, make_batch, [3, 4])] == [a.item() for a in expected]
    assert_same_network(whole, resumed)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))],
                         ids=["deepcopy", "pickle"])  # fmt: skip
def test_a_copy_lives_on_by_itself(clone, make_model, make_batch):
    model = make_model(heads=(2, 2))
    optimizer = make_optimizer(model)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)  # it wraps the step of this instance
    learn(optimizer, make_batch, [0])
    model2, optimizer2 = clone((model, optimizer))
    assert optimizer2.model is model2
    learn(optimizer2, make_batch, [1])
    learn(optimizer, make_batch, [1])
    assert_same_network(model, model2)
    assert optimizer2.base.param_groups is optimizer2.param_groups
    assert optimizer2.param_groups[0]["params"][0] is not optimizer.param_groups[0]["params"][0]


def test_a_base_with_state_warns_once(make_model, make_batch):
    base = functools.partial(torch.optim.SGD, momentum=0.9)
    with pytest.warns(UserWarning, match="SGD keeps state, which carries memory") as caught:
        optimizer = make_optimizer(make_model(heads=(2, 2)), base=base)
    assert len(caught) == 1
    with warnings.catch_warnings(action="error"):  # none comes between two updates
        learn(optimizer, make_batch, [0, 1])


@pytest.mark.filterwarnings("ignore:BLDOptimizer")
def test_heads_added_later_are_learned_by_a_base_with_state(make_model, make_batch):
    model = make_model(heads=(2,))
    optimizer = make_optimizer(model, base=torch.optim.Adam, lr=0.01)
    learn(optimizer, make_batch, [0])
    head = model.add_head(2)
    before = head.weight.clone()
    learn(optimizer, make_batch, [1])
    assert not torch.equal(head.weight, before)
    assert len(optimizer.param_groups) == 1


def test_parameters_stay_where_they_are(make_model, make_batch):
    model = make_model(heads=(2, 2))
    optimizer = make_optimizer(model)
    pointers = [p.data_ptr() for p in model.parameters()]
    learn(optimizer, make_batch, [0, 1])
    assert pointers == [p.data_ptr() for p in model.parameters()]
    assert all(p.grad is None for p in model.parameters())


def test_frozen_and_shared_parameters(make_model, make_batch):
    model = make_model(heads=(2, 2))
    model.backbone[0].weight.requires_grad_(False)
    model.heads[1].weight = model.heads[0].weight
    frozen = model.backbone[0].weight.clone()
    shared = model.heads[0].weight.clone()
    optimizer = make_optimizer(model)
    learn(optimizer, make_batch, [0])
    assert torch.equal(model.backbone[0].weight, frozen)
    assert not torch.equal(model.heads[0].weight, shared)
    assert model.heads[1].weight is model.heads[0].weight


def test_frozen_batch_norm_stays_frozen(make_model, make_batch):
    model = make_model(heads=(2, 2))
    norm = model.backbone[1].eval()
    before = copy.deepcopy(norm.state_dict())
    learn(make_optimizer(model), make_batch, [0])
    assert not norm.training
    assert torch.equal(norm.running_mean, before["running_mean"])
    assert norm.num_batches_tracked == before["num_batches_tracked"]


class Spy(nn.Module):
    """Records what the world looks like inside a forward pass."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x):
        switches = (
            torch.backends.cuda.matmul,
            torch.backends.cudnn.conv,
            torch.backends.mkldnn.matmul,
        )
        precisions = [s.fp32_precision for s in switches]
        self.seen.append((precisions, torch.is_autocast_enabled("cpu"), torch.rand(3), x.clone()))
        return x


@pytest.mark.parametrize("schedule", ["two_forward", "shared_forward", "in_backward"])
def test_every_stage_sees_the_same_views_and_random_numbers(schedule, make_batch):
    spy = Spy()
    model = MultiHead(nn.Sequential(spy, nn.Flatten()), 192)
    model.add_head(2)
    model.add_head(2)
    make_optimizer(model, schedule=schedule).step(*make_batch(2))
    passes = 3 if schedule == "shared_forward" else 5
    tried, spy.seen = spy.seen[:3], spy.seen[3:]  # view 0, tried three times before the step
    assert len(spy.seen) == 3 * passes
    assert all(
        torch.equal(a, b) for t in tried for a, b in zip(t[2:], spy.seen[0][2:], strict=True)
    )
    for again in range(1, passes):
        for v in range(3):
            first, replay = spy.seen[v], spy.seen[3 * again + v]
            assert torch.equal(first[2], replay[2]) and torch.equal(first[3], replay[3])
    drawn = {tuple(s[2].tolist()) for s in spy.seen}
    assert len(drawn) == 3


@pytest.mark.parametrize("fails", [False, True], ids=["returns", "raises"])
def test_precision_is_exact_inside_and_as_before_after(fails, make_batch):
    spy = Spy()
    model = MultiHead(nn.Sequential(spy, nn.Flatten()), 192)
    model.add_head(2)
    optimizer = make_optimizer(model)
    if fails:
        model.heads[0].register_parameter("bias", nn.Parameter(torch.zeros(3)))
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.conv.fp32_precision
    state = torch.get_rng_state()
    torch.set_float32_matmul_precision("medium")
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            if fails:
                with pytest.raises((RuntimeError, ValueError)):
                    optimizer.step(*make_batch(2))
            else:
                optimizer.step(*make_batch(2))
            assert torch.is_autocast_enabled("cpu")
        assert torch.get_float32_matmul_precision() == "medium"
        assert torch.backends.cudnn.conv.fp32_precision == "tf32"
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.conv.fp32_precision = before[1]
    assert torch.equal(torch.get_rng_state(), state)
    assert spy.seen and all(seen[0] == ["ieee"] * 3 and not seen[1] for seen in spy.seen)


def test_the_report_says_what_the_step_did(make_model, make_batch):
    model = make_model(heads=(2, 3, 2))
    optimizer = make_optimizer(model, balance=1.5)
    loss = optimizer.step(*make_batch(2))
    report = optimizer.last
    assert report.warm_up_loss is loss
    assert report.layers == (
        "backbone.0", "backbone.1", "backbone.4", "backbone.5", "heads.0", "heads.1", "heads.2",
    )  # fmt: skip
    assert [len(x) for x in (report.new_loss, report.distillation_loss, report.factors)] == [2] * 3
    factors, norms = report.factors[0], report.distillation_norms[0]
    shared = slice(0, 4)
    torch.testing.assert_close(
        factors[shared], 1.5 * report.reference_norms[shared] / norms[shared]
    )
    assert factors[4:].tolist() == [0, 0, 0]
    params = sum(p.numel() * 4 for p in model.parameters())
    assert report.memory == {
        "bank": 3 * 5 * 5 * 4, "layer_norms": 7 * 4, "seed": 16, "gradients": params,
    }  # fmt: skip


@pytest.mark.parametrize("seed", [5, -1, 2**64 - 1])
def test_the_seed_is_that_of_torch(seed, make_model, make_batch):
    model = make_model(heads=(2,))
    torch.manual_seed(seed)
    torch.rand(3)  # the seed stays, however much has been drawn
    optimizer = make_optimizer(model)
    learn(optimizer, make_batch, [0])
    assert optimizer.seed == seed % 2**63 == optimizer.state_dict()["param_groups"][0]["seed"]


def test_the_first_task_has_nothing_to_distil(make_model, make_batch):
    optimizer = make_optimizer(make_model(heads=(2,)))
    learn(optimizer, make_batch, [0])
    assert optimizer.last.distillation_loss == [] and len(optimizer.last.new_loss) == 2
    assert optimizer.last.memory["bank"] == 0


def test_without_augment_the_images_are_the_views(make_model, make_batch):
    seen = []
    model = make_model(heads=(2,))
    model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    images, labels = make_batch(2)
    BLDOptimizer(model, lr=0.01).step(images, labels)
    assert len(seen) == 4 + 3 and all(torch.equal(x, images) for x in seen)


def test_a_compiled_model_takes_the_same_steps(make_model, make_batch):
    eager, model = make_model(heads=(2, 2)), make_model(heads=(2, 2))
    compiled = torch.compile(model, backend="aot_eager")
    learn(make_optimizer(eager), make_batch, [0, 1])
    learn(make_optimizer(compiled), make_batch, [0, 1])
    torch.testing.assert_close(model.state_dict(), eager.state_dict(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("statistics", ["once", "every_pass"])
def test_running_statistics_follow_their_policy(statistics, make_model, make_batch):
    model = make_model(heads=(2, 2))
    learn(make_optimizer(model, statistics=statistics), make_batch, [0, 1])
    # three views in the warm-up, then two forward passes of three in each of two repetitions
    expected = {"once": 2, "every_pass": 2 * (3 + 2 * 6)}[statistics]
    assert model.backbone[1].num_batches_tracked == expected


def test_a_base_that_needs_a_closure_is_refused(make_model):
    with pytest.raises(ValueError, match="^base: LBFGS could not take a step by itself .*closure"):
        make_optimizer(make_model(heads=(2,)), base=torch.optim.LBFGS)


@pytest.mark.filterwarnings("ignore:BLDOptimizer")
@pytest.mark.parametrize("batches", [[], [1]], ids=["saved-at-once", "after-a-batch"])
@pytest.mark.parametrize("how", ["assign", "new-head", "deleted"])
def test_replaced_parameters_leave_the_optimizer(how, batches, make_model, make_batch):
    """Else a second network stays alive, and a resumed run updates what replaced it twice."""
    model = make_model(heads=(2, 2))
    if how == "deleted":
        model.extra = nn.Linear(2, 2)
    optimizer = make_optimizer(model, base=functools.partial(torch.optim.SGD, momentum=0.9))
    learn(optimizer, make_batch, [0])
    if how == "assign":
        model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    elif how == "new-head":
        model.heads[1] = nn.Linear(6, 2)
    else:
        del model.extra
    learn(optimizer, make_batch, batches)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    group = optimizer.param_groups[0]
    assert len(group["params"]) == len(group["param_names"]) == len(list(model.parameters()))
    assert set(optimizer.state) <= set(model.parameters())

    other = make_model(heads=(2, 2))
    resumed = make_optimizer(other, base=functools.partial(torch.optim.SGD, momentum=0.9))
    other.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    learn(optimizer, make_batch, [2])
    learn(resumed, make_batch, [2])
    assert_same_network(model, other)


def test_a_failed_load_changes_nothing(make_model, make_batch):
    optimizer = make_optimizer(make_model(heads=(2, 2)))
    learn(optimizer, make_batch, [0])
    before = copy.deepcopy(optimizer.state_dict())
    wrong = copy.deepcopy(before)
    wrong["param_groups"][0]["param_names"].reverse()
    wrong["param_groups"].append(dict(wrong["param_groups"][0], params=[]))
    with pytest.raises(ValueError):
        optimizer.load_state_dict(wrong)
    assert optimizer.state_dict() == before
    learn(optimizer, make_batch, [1])


def test_batch_norm_added_later_follows_the_policy_too(make_model, make_batch):
    model = make_model(heads=(2, 2))
    optimizer = make_optimizer(model)
    late = nn.BatchNorm1d(6)
    model.backbone.append(late)
    learn(optimizer, make_batch, [0])
    assert late.num_batches_tracked == 1


class BatchNormAct(nn.BatchNorm2d):
    """With an activation, as timm's BatchNormAct2d."""

    def forward(self, x):
        return torch.nn.functional.leaky_relu(super().forward(x))


class Apart(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x):
        return torch.nn.functional.leaky_relu(self.norm(x))


@pytest.mark.parametrize("views_per_pass", [1, 2, 3])
@pytest.mark.parametrize("statistics", ["once", "every_pass"])
def test_a_batch_norm_with_an_activation_is_one_and_an_activation(
    statistics, views_per_pass, make_model, make_batch
):
    states = []
    for kind in (BatchNormAct, Apart):
        model = make_model(heads=(2, 2), dtype=torch.float64)
        model.backbone[1] = kind(4).double()
        model.backbone[2] = nn.Identity()
        augment = SeededAugment(crop_padding=1, dtype=torch.float64)
        optimizer = make_optimizer(
            model, views_per_pass=views_per_pass, statistics=statistics, augment=augment
        )
        with warnings.catch_warnings(action="error"):
            for number in range(2):
                optimizer.step(*make_batch(2, number, dtype=torch.float64))
        states.append([*model.state_dict().values()])
    torch.testing.assert_close(*states, rtol=1e-9, atol=1e-9)


def test_a_batch_norm_of_one_s_own_is_copied_and_saved(make_model, make_batch):
    model = make_model(heads=(2,))
    model.backbone[1] = BatchNormAct(4)
    make_optimizer(model).step(*make_batch(2))
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    for other in (copy.deepcopy(model), torch.load(saved, weights_only=False)):
        assert type(other.backbone[1]) is type(model.backbone[1]) is not BatchNormAct
        assert_same_network(model, other)
        make_optimizer(other).step(*make_batch(2))


def test_a_synchronised_batch_norm_takes_one_view_a_pass(make_model, make_batch):
    model = nn.SyncBatchNorm.convert_sync_batchnorm(make_model(heads=(2, 2)))
    with pytest.raises(ValueError, match="views_per_pass: expected 1, since backbone.1 is a SyncB"):
        learn(make_optimizer(model, views_per_pass=3), make_batch, [0])


INHERITANCE = """
import sys, torch
from torch import nn
from bld_ext import BLDOptimizer, MultiHead
model = MultiHead(nn.Flatten(), 12)
model.add_head(2)
if sys.argv[1] == "step":
    BLDOptimizer(model).step(torch.rand(2, 3, 2, 2), torch.tensor([0, 1]))
backends = torch.backends
for parent in (backends, backends.cudnn, backends.mkldnn):
    for precision in ("ieee", "none"):
        parent.fp32_precision = precision
        children = (backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul)
        print([child.fp32_precision for child in children])
"""


def test_precision_switches_still_follow_their_parents_after_a_step():
    """In processes of their own: a switch that any test has set never follows again."""
    runs = [
        subprocess.run([sys.executable, "-c", INHERITANCE, how], capture_output=True, check=True)
        for how in ("step", "no step")
    ]
    assert runs[0].stdout == runs[1].stdout and runs[0].stdout.count(b"ieee") > 3


def test_finetuning_keeps_no_bank(make_model, make_batch):
    optimizer = make_optimizer(make_model(heads=(2, 2)), balance=0.0)
    learn(optimizer, make_batch, [0])
    assert optimizer.last.memory["bank"] == optimizer.last.memory["layer_norms"] == 0


# ---- other schedules of one's own ----


@pytest.mark.parametrize("schedule", ["shared_forward", "in_backward"])
def test_without_balancing_the_factor_is_one_in_every_schedule(schedule, make_model, make_batch):
    models = [make_model(heads=(2, 2), dtype=torch.float64) for _ in range(2)]
    augment = SeededAugment(crop_padding=1, rotation=15, dtype=torch.float64)
    for model, name in zip(models, ("two_forward", schedule), strict=True):
        optimizer = make_optimizer(model, balance=None, schedule=name, augment=augment)
        learn(optimizer, make_batch, range(2))
        assert all((factors == 1).all() for factors in optimizer.last.factors)
        assert all(norms.max() > 0 for norms in optimizer.last.distillation_norms)
    for a, b in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_the_warm_up_s_own_bank_given_again_changes_nothing(make_model, make_batch):
    models = [make_model(heads=(2, 2)) for _ in range(2)]
    plain, given = (make_optimizer(model) for model in models)
    batch = make_batch(2)
    plain.step(*batch)
    given.warm_up(*batch)
    for _ in range(2):
        given.joint(*batch, bank=given._batch.bank.clone())
    given.release()
    assert_same_network(*models)
    assert given.last.memory["bank"] == plain.last.memory["bank"]


@pytest.mark.parametrize("schedule", ["two_forward", "shared_forward", "in_backward"])
def test_one_loss_at_a_time(schedule, make_model, make_batch):
    batch, models = make_batch(2), [make_model(heads=(2, 2)) for _ in range(2)]
    new, finetune = (
        make_optimizer(model, balance=balance, schedule=schedule)
        for model, balance in zip(models, (2.0, 0.0), strict=True)
    )
    for optimizer, losses in ((new, ["new", "new"]), (finetune, ["new"])):
        optimizer.warm_up(*batch)
        optimizer.joint(*batch, losses=losses)  # named twice is learned once
    assert_same_network(*models)  # L_t alone is finetuning

    before = copy.deepcopy(models[0])
    loss = new.joint(*batch, losses=["distillation"])
    assert torch.equal(loss, new.last.distillation_loss[-1]) and len(new.last.new_loss) == 1
    newest = zip(models[0].heads[-1].parameters(), before.heads[-1].parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in newest)  # L_d does not reach it
    moved = zip(models[0].backbone.parameters(), before.backbone.parameters(), strict=True)
    assert any(not torch.equal(a, b) for a, b in moved)


def test_distillation_alone_in_the_first_task_does_nothing(make_model, make_batch):
    model = make_model(heads=(2,))
    optimizer, batch = make_optimizer(model), make_batch(2)
    optimizer.warm_up(*batch)
    before = copy.deepcopy(model)
    assert optimizer.joint(*batch, losses=["distillation"]) == 0
    assert_same_network(model, before)


def test_a_batch_that_begins_with_given_predictions(make_model, make_batch):
    model = make_model(heads=(2, 2))
    optimizer, batch = make_optimizer(model, balance=None), make_batch(2)
    bank = torch.full((3 * 5, 2), 0.5)
    optimizer.joint(*batch, bank=bank)
    assert optimizer.last.warm_up_loss is None and optimizer.batches == 1
    assert optimizer.last.memory["bank"] == bank.nbytes
    optimizer.release()
    with pytest.raises(RuntimeError, match="^joint: there is no bank"):
        optimizer.joint(*batch)
    optimizer.balance = 2.0
    with pytest.raises(RuntimeError, match="^joint: there is no bank"):
        optimizer.joint(*batch, bank=bank)


@pytest.mark.parametrize("losses", ["new", [], ["old"], ["new", "old"]], ids=str)
def test_unknown_losses_are_refused(losses, make_model, make_batch):
    optimizer, batch = make_optimizer(make_model(heads=(2, 2))), make_batch(2)
    optimizer.warm_up(*batch)
    with pytest.raises(ValueError, match="^losses: expected a list of new, distillation, got"):
        optimizer.joint(*batch, losses=losses)


BANKS = {
    "classes": (torch.ones(15, 3), r"probabilities \[15, 2\]"),
    "rows": (torch.ones(14, 2), r"probabilities \[15, 2\]"),
    "flat": (torch.ones(15), r"probabilities \[15, 2\]"),
    "dense": (torch.ones(15, 2, 1), r"probabilities \[15, 2\]"),
    "dtype": (torch.ones(15, 2).double(), "torch.float32 on cpu, got torch.float64 on cpu"),
    "nan": (torch.full((15, 2), torch.nan), "finite probabilities"),
}


@pytest.mark.parametrize("bank, message", BANKS.values(), ids=BANKS)
@pytest.mark.parametrize("warm", [True, False], ids=["warm", "cold"])
def test_a_bank_that_does_not_fit_is_refused(bank, message, warm, make_model, make_batch):
    model = make_model(heads=(2, 2))
    optimizer, batch = make_optimizer(model, balance=None), make_batch(2)
    if warm:
        optimizer.warm_up(*batch)
    before, number = copy.deepcopy(model), optimizer.batches
    with pytest.raises(ValueError, match=f"^bank: expected {message}"):
        optimizer.joint(*batch, bank=bank)
    assert_same_network(model, before)
    assert optimizer.batches == number and (optimizer._batch is not None) == warm
