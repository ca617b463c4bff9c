"""Modules, inputs and loops that are unusual and right: they learn as they would without BLD."""

import collections
import copy
import gc
import threading
import weakref
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from bld_ext import BLDOptimizer, MultiHead, SeededAugment, convert_view_batchnorm

pytestmark = pytest.mark.filterwarnings("ignore:BLDOptimizer. (SGD|Adam) keeps state")

MOMENTUM = partial(torch.optim.SGD, momentum=0.9)


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def same(one, two):
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def two_heads(*layers, features=8):
    torch.manual_seed(0)
    model = MultiHead(nn.Sequential(*layers), features)
    for size in (2, 2):
        model.add_head(size)
    return model


# ---- modules ----


class Merged(nn.Linear):
    """Has a low-rank part that is a part of the weight in eval mode, as loralib has it."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs)
        self.weight.requires_grad_(False)
        self.down, self.up = nn.Parameter(torch.randn(2, inputs)), nn.Parameter(torch.ones(8, 2))
        self.merged = False

    def train(self, mode=True):
        if mode is self.merged:
            self.weight.data += (self.up @ self.down).data * (-1 if mode else 1)
            self.merged = not mode
        return super().train(mode)

    def forward(self, x):
        return super().forward(x) + (0 if self.merged else x @ self.down.T @ self.up.T)


def test_a_module_that_merges_in_eval_mode_goes_on_learning_after_predict(make_batch):
    model = two_heads(nn.Flatten(), Merged(192, 8), nn.ReLU())
    optimizer, (images, labels) = BLDOptimizer(model, 1e-2, warmup_lr=1e-2), make_batch(2)
    optimizer.step(images, labels)
    model.predict(images, task=0)
    before = weights(model)
    optimizer.step(images, labels)
    assert not model.backbone[1].merged and not torch.equal(before[1], model.backbone[1].down)


class Cached(nn.Module):
    """Calls a layer once, and keeps what it returns."""

    def __init__(self):
        super().__init__()
        self.layer, self.position, self.cache = nn.Linear(192, 8), nn.Linear(1, 192), None

    def forward(self, x):
        if self.cache is None:
            self.cache = self.position(torch.ones(1)).detach()
        return self.layer(x.flatten(1) + self.cache)


def test_a_layer_that_is_called_once_is_no_layer_that_differs(make_batch):
    BLDOptimizer(two_heads(Cached()), 1e-2).step(*make_batch(2))


class ViewedBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad.view(len(grad), -1).mul(2).view(grad.shape)


class Own(nn.Module):
    def forward(self, x):
        return ViewedBackward.apply(x)


def test_a_backward_of_ones_own_that_needs_contiguous_gradients(make_batch):
    def step(model):
        optimizer = BLDOptimizer(model, 1e-2, views=2, augment=SeededAugment(crop_padding=1))
        return optimizer.step(*make_batch(2)), weights(model)

    layers = nn.Conv2d(3, 8, 3), Own(), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    model = two_heads(*layers)
    plain = copy.deepcopy(model)
    plain.backbone[1].forward = lambda x: x * 2
    loss, found = step(model)
    expected, wanted = step(plain)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("views_per_pass", [1, 2])
def test_a_reentrant_checkpoint_goes_with_a_shared_forward_pass(views_per_pass, make_batch):
    class Checkpointed(nn.Module):
        def __init__(self, reentrant):
            super().__init__()
            self.first, self.rest = nn.Linear(192, 8), nn.Sequential(nn.Linear(8, 8), nn.Dropout())
            self.reentrant = reentrant

        def forward(self, x):
            return checkpoint(self.rest, self.first(x.flatten(1)), use_reentrant=self.reentrant)

    found = []
    first = two_heads(Checkpointed(True))
    for reentrant in (True, False):
        model = copy.deepcopy(first)
        model.backbone[0].reentrant = reentrant
        optimizer = BLDOptimizer(
            model, 1e-2, views=2, views_per_pass=views_per_pass, schedule="shared_forward"
        )
        for number in range(2):
            optimizer.step(*make_batch(2, number))
        found.append(weights(model))
    assert same(*found)


def replaced(x, forward):
    return forward(x)


def test_a_batch_norm_with_a_forward_of_its_own_is_left_as_it_is(make_model, make_batch):
    """Whose call would go past what normalises by view."""
    model = make_model([2, 2])
    norm = next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    norm.forward = partial(replaced, forward=norm.forward)
    optimizer = BLDOptimizer(model, 1e-2, views=2)
    assert type(norm) is nn.BatchNorm2d
    with pytest.warns(UserWarning, match="running_mean.* move at every forward pass"):
        optimizer.step(*make_batch(2))
    optimizer.views_per_pass = 2
    with pytest.raises(ValueError, match=r"^views_per_pass: expected 1, since .*BatchNorm2d"):
        optimizer.step(*make_batch(2, 1))


def test_attributes_of_a_batch_norm_are_the_users(make_model, make_batch):
    model = make_model([2, 2])
    norm = next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    norm.mode, norm.views = "mine", "front"
    with pytest.warns(UserWarning, match="move at every forward pass"):
        BLDOptimizer(model, 1e-2).step(*make_batch(2))
    assert (norm.mode, norm.views) == ("mine", "front")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*deprecated")
@pytest.mark.parametrize("views_per_pass", [1, "auto"])
def test_the_first_layers_may_be_quantised(views_per_pass, make_batch):
    quantised = torch.ao.quantization
    stem = nn.Sequential(
        quantised.QuantStub(), nn.Conv2d(3, 8, 3), nn.ReLU(), quantised.DeQuantStub()
    ).eval()
    stem.qconfig = quantised.get_default_qconfig("fbgemm")
    quantised.prepare(stem, inplace=True)
    stem(make_batch(2)[0])
    quantised.convert(stem, inplace=True)
    model = two_heads(stem, nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    augment = SeededAugment(crop_padding=1)
    optimizer = BLDOptimizer(model, 1e-2, views=2, augment=augment, views_per_pass=views_per_pass)
    before = model.backbone[1].weight.detach().clone()
    optimizer.step(*make_batch(2))
    assert not torch.equal(before, model.backbone[1].weight)


@pytest.mark.parametrize("layout", ["to_sparse", "to_sparse_csr", "to_sparse_csc"])
@pytest.mark.filterwarnings("ignore:Sparse")
def test_buffers_may_be_sparse(layout, make_batch):
    class Graph(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(192, 8)
            self.register_buffer("graph", getattr(torch.eye(192) * 2, layout)())

        def forward(self, x):
            return self.layer(torch.sparse.mm(self.graph, x.flatten(1).T).T)

    BLDOptimizer(two_heads(Graph()), 1e-2).step(*make_batch(2))


def test_a_buffer_of_nan_that_nobody_touches_does_not_move(make_model, make_batch, recwarn):
    model = make_model([2, 2])
    model.register_buffer("best", torch.full((2,), torch.nan))
    BLDOptimizer(model, 1e-2).step(*make_batch(2))
    assert not [w for w in recwarn if "move at every" in str(w.message)]


def test_the_first_batch_keeps_no_output_of_a_module(make_model, make_batch):
    """What the network is tried out with takes no more memory than a pass."""
    outputs, alive = [], []
    model = make_model([2, 2])

    def note(module, inputs, output):
        alive.append(sum(output() is not None for output in outputs))
        outputs.append(weakref.ref(output))

    model.backbone.register_forward_hook(note)
    BLDOptimizer(model, 1e-2, views=2).step(*make_batch(2))
    assert len(alive) > 4 and max(alive) == 0


# ---- inputs ----


@pytest.mark.parametrize("augment", [None, SeededAugment(flip=0.5)], ids=["plain", "seeded"])
def test_images_that_carry_a_graph_are_data(augment, make_model, make_batch):
    images, labels = make_batch(2)
    generator = nn.Conv2d(3, 3, 1)
    models = [make_model([2, 2]) for _ in range(2)]
    made = generator(images).sigmoid()
    for model, given in zip(models, (made, made.detach()), strict=True):
        optimizer = BLDOptimizer(model, 1e-2, views=2, augment=augment)
        optimizer.seed = 1
        optimizer.step(given, labels)
    assert generator.weight.grad is None and same(*map(weights, models))


def test_features_may_be_made_in_inference_mode(make_batch):
    """As an augmentation that runs a frozen network may do."""
    frozen = nn.Conv2d(3, 4, 1)

    @torch.inference_mode()
    def augment(images, *, views, **where):
        return torch.cat([frozen(images).flatten(1) + view for view in views])

    model = two_heads(nn.Linear(256, 8), nn.BatchNorm1d(8))
    BLDOptimizer(model, 1e-2, views=2, augment=augment).step(*make_batch(2))


def test_a_refused_batch_is_released_at_once(make_model, make_batch):
    optimizer, (images, labels) = BLDOptimizer(make_model([2, 2]), 1e-2), make_batch(2)
    gone = weakref.ref(images)
    gc.disable()
    try:
        with pytest.raises(ValueError, match="^labels"):
            optimizer.step(images, labels + 5)
        del images
        assert gone() is None
    finally:
        gc.enable()


def test_running_out_of_memory_is_not_taken_for_a_wrong_layout(make_batch):
    """By a network that takes images whose channels come last."""

    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.left = nn.Conv2d(3, 8, 3), None

        def forward(self, x):
            if self.left is not None and torch.is_grad_enabled() and len(x) > 5:
                self.left -= 1
                if self.left == 0:
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
            return self.layer(x.permute(0, 3, 1, 2)).mean((2, 3))

    model = two_heads(Last())
    optimizer = BLDOptimizer(model, 1e-2, views=4, views_per_pass="64 MiB")
    images, labels = make_batch(2)
    images = images.permute(0, 2, 3, 1).contiguous()
    optimizer.step(images, labels)
    model.add_head(2)  # after which the number of views is on trial again
    model.backbone[0].left = 2
    optimizer.step(images, labels)
    assert model.backbone[0].left <= 0 and optimizer.views_in_pass == 2


# ---- the optimizer ----


@pytest.mark.parametrize("base", [MOMENTUM, torch.optim.Adam], ids=["momentum", "adam"])
def test_state_that_is_assigned_is_the_base_s(base, make_model, make_batch):
    def learned(reset):
        model = make_model([2, 2])
        optimizer = BLDOptimizer(model, 1e-2, base=base)
        optimizer.seed = 1
        optimizer.step(*make_batch(2))
        reset(optimizer)
        optimizer.step(*make_batch(2, 1))
        return optimizer

    cleared = learned(lambda optimizer: optimizer.state.clear())
    assigned = learned(lambda o: setattr(o, "state", collections.defaultdict(dict)))
    assert len(assigned.state) == len(cleared.state) > 0
    assert same(weights(cleared.model), weights(assigned.model))
    resumed = BLDOptimizer(copy.deepcopy(assigned.model), 1e-2, base=base)
    resumed.load_state_dict(copy.deepcopy(assigned.state_dict()))
    twin = copy.deepcopy(assigned)
    for optimizer in (assigned, resumed, twin):
        optimizer.step(*make_batch(2, 2))
    assert same(weights(assigned.model), weights(resumed.model))
    assert same(weights(assigned.model), weights(twin.model))


class Counting(torch.optim.SGD):
    """Keeps the number of its steps in its groups, as Prodigy does."""

    def step(self, closure=None):
        for group in self.param_groups:
            group["steps"] = group.get("steps", 0) + 1
        return super().step(closure)


def test_what_a_base_keeps_in_its_groups_is_undone(make_model, make_batch):
    model = make_model([2, 2])
    optimizer = BLDOptimizer(model, 1e-2, base=Counting, check_finite=True)
    optimizer.step(*make_batch(2))
    before = optimizer.param_groups[0]["steps"]
    calls = []

    def broken(module, inputs, output):
        calls.append(0)
        return output * torch.nan if len(calls) > 1 else output

    hook = model.heads[1].register_forward_hook(broken)
    with pytest.raises(FloatingPointError):
        optimizer.step(*make_batch(2, 1))
    hook.remove()
    assert before > 0 and optimizer.param_groups[0]["steps"] == before
    assert optimizer.base.param_groups[0] is optimizer.param_groups[0]
    optimizer.step(*make_batch(2, 1))


def test_a_copy_that_is_made_amid_a_step_is_not_in_it(make_model, make_batch):
    model, copies = make_model([2, 2]), []
    optimizer = BLDOptimizer(model, 1e-2)
    optimizer.base.register_step_post_hook(lambda *_: copies.append(copy.deepcopy(model)))
    optimizer.step(*make_batch(2))
    norm = next(m for m in copies[0].modules() if isinstance(m, nn.BatchNorm2d))
    before = norm.running_mean.clone()
    copies[0](make_batch(2)[0])
    assert norm.mode is None and norm.found is None
    assert not torch.equal(norm.running_mean, before)


def test_a_joint_that_failed_leaves_nothing_in_the_report(make_model, make_batch):
    model, batch = make_model([2, 2]), make_batch(2)
    optimizer = BLDOptimizer(model, 1e-2, joint_steps=1)
    optimizer.warm_up(*batch)
    calls = []

    def fails(module, inputs):
        calls.append(0)
        if len(calls) == 2:  # in the pass of the second loss
            raise RuntimeError("of the user")

    hook = model.register_forward_pre_hook(fails)
    with pytest.raises(RuntimeError, match="of the user"):
        optimizer.joint(*batch)
    hook.remove()
    assert len(optimizer.last.distillation_loss) == len(optimizer.last.factors) == 0
    optimizer.joint(*batch)
    assert len(optimizer.last.distillation_loss) == len(optimizer.last.factors) == 1
    assert optimizer.last.new_share is not None


@pytest.mark.parametrize("base", [MOMENTUM, torch.optim.Adam], ids=["momentum", "adam"])
def test_state_follows_a_model_into_double(base, make_model, make_batch):
    model = make_model([2, 2])
    optimizer = BLDOptimizer(model, 1e-2, base=base)
    optimizer.step(*make_batch(2))
    model.double()
    optimizer.step(*make_batch(2, 1, dtype=torch.float64))
    kept = {x.dtype for entry in optimizer.state.values() for x in entry.values() if x.dim()}
    assert kept == {torch.float64}


def test_layers_of_a_compiled_model_have_their_own_names(make_model, make_batch):
    model = make_model([2, 2])
    names = BLDOptimizer(model, 1e-2)
    names.step(*make_batch(2))
    compiled = BLDOptimizer(torch.compile(make_model([2, 2]), backend="eager"), 1e-2)
    compiled.step(*make_batch(2))
    assert compiled.last.layers == names.last.layers


# ---- heads ----


class Adapted(nn.Module):
    """Its last matrix is not its classifier's."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.classifier, self.out_features = nn.Linear(inputs, outputs), outputs
        self.adapter = nn.Linear(inputs, inputs)

    def forward(self, x):
        return self.classifier(x + self.adapter(x))


class Cosine(nn.Module):
    """Its last parameter is a scale."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight, self.out_features = nn.Parameter(torch.randn(outputs, inputs)), outputs
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return nn.functional.linear(x, self.weight) * self.bias.exp()


def lazy(inputs, outputs):
    return nn.LazyLinear(outputs)


@pytest.mark.filterwarnings("ignore:Lazy modules")
@pytest.mark.parametrize("head", [Adapted, Cosine, nn.Linear, lazy])
def test_a_checkpoint_of_any_head_adds_the_heads(head, make_batch):
    def empty():
        return MultiHead(nn.Sequential(nn.Flatten(), nn.Linear(192, 6)), 6, head=head)

    saved, loaded = empty(), empty()
    for size in (3, 6, 5):
        saved.add_head(size)
    images = make_batch(2)[0]
    saved(images)
    loaded.load_state_dict(saved.state_dict())
    assert loaded.head_sizes == (3, 6, 5)
    torch.testing.assert_close(loaded(images), saved(images))


# ---- what only looks like the same network when it runs again ----


class Sometimes(nn.Module):
    """Calls a layer or not, by a generator of its own."""

    def __init__(self, seed):
        super().__init__()
        self.layer, self.generator = nn.Linear(8, 8), torch.Generator().manual_seed(seed)

    def forward(self, x):
        return self.layer(x) if torch.rand(1, generator=self.generator) > 0.5 else x


def test_a_layer_that_is_called_by_chance_is_refused(make_batch):
    """Behind heads of zeros, where the logits do not tell."""
    refused = 0
    for seed in range(20):
        model = two_heads(nn.Flatten(), nn.Linear(192, 8), Sometimes(seed))
        nn.init.zeros_(model.heads[0].weight), nn.init.zeros_(model.heads[1].weight)
        try:
            BLDOptimizer(model, 1e-2).step(*make_batch(2))
        except ValueError as error:
            refused += "computed another output when it ran again" in str(error)
    assert refused >= 5


class Signs(nn.Module):
    def __init__(self, seed):
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def forward(self, x):
        return x * (torch.randint(2, x.shape, generator=self.generator) * 2 - 1)


def test_signs_by_chance_are_refused(make_batch):
    for seed in range(20):
        model = two_heads(nn.Flatten(), nn.Linear(192, 8), Signs(seed))
        nn.init.zeros_(model.heads[0].weight), nn.init.zeros_(model.heads[1].weight)
        with pytest.raises(ValueError, match="backbone.2, a Signs, computed another output"):
            BLDOptimizer(model, 1e-2).step(*make_batch(2))


class Experts(nn.Module):
    """Of which one gets no image."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(192, 8), nn.Linear(192, 8)

    def forward(self, x):
        x = x.flatten(1)
        return torch.cat([self.first(x), self.second(x[:0])])


class ByImage(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(192, 8)

    def forward(self, x):
        return torch.func.vmap(self.layer)(x.flatten(1))


@pytest.mark.parametrize("backbone", [Experts, ByImage])
@pytest.mark.parametrize("views_per_pass", [1, 2])
def test_layers_may_get_no_image_or_one_at_a_time(backbone, views_per_pass, make_batch):
    optimizer = BLDOptimizer(two_heads(backbone()), 1e-2, views=2, views_per_pass=views_per_pass)
    optimizer.step(*make_batch(2))


# ---- copies and heads ----


class Locked(nn.BatchNorm2d):
    """A BatchNorm of the user's, which knows what of it can be copied."""

    def __init__(self, channels):
        super().__init__(channels)
        self.lock = threading.Lock()

    def __getstate__(self):
        return {**super().__getstate__(), "lock": None}

    def forward(self, x):
        return super().forward(x)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, Locked])
def test_any_batch_norm_can_be_copied_amid_a_step(norm, make_batch):
    model = two_heads(nn.Conv2d(3, 8, 3), norm(8), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    copies, optimizer = [], BLDOptimizer(model, 1e-2)
    optimizer.base.register_step_post_hook(lambda *_: copies.append(copy.deepcopy(model)))
    optimizer.step(*make_batch(2))
    before = copies[0].backbone[1].running_mean.clone()
    copies[0](make_batch(2)[0])
    assert copies[0].backbone[1].mode is None
    assert not torch.equal(copies[0].backbone[1].running_mean, before)


def test_a_compiled_batch_norm_is_copied_as_itself():
    one = convert_view_batchnorm(nn.Sequential(nn.BatchNorm1d(3)))
    one[0].compile(backend="eager")
    other = copy.deepcopy(one)
    with torch.no_grad():
        other[0].weight.zero_(), other[0].bias.zero_()
    assert not other(torch.rand(4, 3)).any()


def test_loading_makes_each_head_once(make_batch):
    made = []

    def head(inputs, outputs):
        made.append(nn.Linear(inputs, outputs))
        return made[-1]

    saved = MultiHead(nn.Flatten(), 6, head=head)
    for size in (3, 5):
        saved.add_head(size)
    loaded = MultiHead(nn.Flatten(), 6, head=head)
    made.clear()
    loaded.load_state_dict(saved.state_dict())
    assert len(made) == 2 and [*loaded.heads] == made


def test_what_a_base_keeps_from_its_constructor_is_kept(make_model, make_batch):
    class Anchored(torch.optim.SGD):
        def __init__(self, params, lr):
            super().__init__(params, lr)
            for group in self.param_groups:
                for param in group["params"]:
                    self.state[param]["anchor"] = param.detach().clone()

    model = make_model([2, 2])
    optimizer = BLDOptimizer(model, 1e-2, base=Anchored)
    optimizer.step(*make_batch(2))
    assert all("anchor" in optimizer.state[param] for param in model.parameters())
