"""convert_view_batchnorm on containers: BatchNorm, shortcut and ReLU as one kernel in a step."""

import copy
import pickle
from functools import partial

import pytest
import torch
import torchvision
from arrange import arranged
from torch import nn
from torch.overrides import TorchFunctionMode
from torchvision.models.resnet import BasicBlock, Bottleneck

from bld_ext import (
    BLDOptimizer,
    MultiHead,
    ViewBatchNorm,
    convert_view_batchnorm,
    revert_view_batchnorm,
)
from bld_ext.api.memory_format import MemoryFormat
from bld_ext.api.pooled import view_statistics


def sequential():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.BatchNorm2d(8), nn.Tanh()
    )


def with_shortcut(block):
    planes = 4 if block is BasicBlock else 2
    width = planes * block.expansion
    shortcut = nn.Sequential(nn.Conv2d(3, width, 1, 2, bias=False), nn.BatchNorm2d(width))
    return block(3, planes, 2, shortcut)


NETWORKS = {
    "sequential": sequential,
    "basic": lambda: BasicBlock(3, 3),
    "basic-shortcut": lambda: with_shortcut(BasicBlock),
    "bottleneck": lambda: with_shortcut(Bottleneck),
    "resnet18": lambda: torchvision.models.resnet18(num_classes=5),
    "resnet50": lambda: torchvision.models.resnet50(num_classes=5),
}
each_network = pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)


class Calls(TorchFunctionMode):
    """Counts ReLUs and additions that are computed by themselves."""

    def __init__(self):
        super().__init__()
        self.relus = self.sums = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.relus += function in (torch.relu, torch.relu_, nn.functional.relu, torch.Tensor.relu)
        self.sums += function in (torch.Tensor.add, torch.Tensor.add_, torch.Tensor.__iadd__)
        return function(*args, **(kwargs or {}))


def pair(make):
    torch.manual_seed(0)
    plain = make()
    ours = convert_view_batchnorm(copy.deepcopy(plain))
    return plain, ours, torch.randn(6, 3, 40, 40)


def norms_of(network):
    return [m for m in network.modules() if isinstance(m, ViewBatchNorm)]


def in_step(network, images, views=1):
    with view_statistics(norms_of(network), "keep"):
        for norm in norms_of(network):
            norm.views = views
        return network(images)


@each_network
def test_outside_a_step_it_is_pytorch_bit_for_bit(make):
    plain, ours, images = pair(make)
    assert [*plain.state_dict()] == [*ours.state_dict()]
    for training in (True, False):
        assert torch.equal(ours.train(training)(images), plain.train(training)(images))
    for a, b in zip(plain.buffers(), ours.buffers(), strict=True):
        assert torch.equal(a, b)


@each_network
def test_inside_a_step_it_computes_the_same_and_in_fewer_calls(make):
    plain, ours, images = pair(make)
    with Calls() as alone:
        expected = torch.cat([plain(view) for view in images.chunk(2)])
    with Calls() as fused:
        found = in_step(ours, images, views=2)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert alone.relus > 0
    left = 1 if make in (NETWORKS["resnet18"], NETWORKS["resnet50"]) else 0  # the stem's own
    assert fused.relus == left and fused.sums == 0


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels-last"])
@each_network
def test_gradients_in_float64(make, last):
    plain, ours, images = pair(make)
    gradients, layout = [], torch.channels_last if last else torch.contiguous_format
    for network in (plain.double(), ours.double()):
        x = images.double().contiguous(memory_format=layout).requires_grad_()
        if network is plain:
            out = torch.cat([network(view) for view in x.chunk(2)])
        else:
            out = in_step(network, x, views=2)
        weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out)
        params = [*network.parameters()]
        gradients.append(torch.autograd.grad((out * weight).sum(), [x, *params]))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8 * a.abs().max().item() + 1e-10)


@each_network
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_the_same(make, clone):
    _, ours, images = pair(make)
    twin = clone(ours)
    assert [type(a) for a in ours.modules()] == [type(b) for b in twin.modules()]
    assert torch.equal(in_step(twin, images), in_step(ours, images))


@pytest.mark.parametrize("make", [sequential, NETWORKS["basic"]], ids=["sequential", "basic"])
def test_hooks_see_what_they_saw_before(make):
    plain, ours, images = pair(make)
    seen = []
    for network in (plain, ours):
        for module in network.modules():
            if isinstance(module, (nn.BatchNorm2d, nn.ReLU)):
                module.register_forward_hook(lambda m, x, y: seen.append(y.clone()))
    plain(images)
    count = len(seen)
    in_step(ours, images)
    assert len(seen) == 2 * count > 0
    for a, b in zip(seen[:count], seen[count:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_forward_of_an_instance_s_own_is_used():
    plain, ours, images = pair(sequential)
    for network in (plain, ours):
        network[2].forward = lambda x: x * 0 + 0.5
    torch.testing.assert_close(in_step(ours, images), plain(images), rtol=1e-4, atol=1e-5)


def test_global_hooks_see_every_module():
    _, ours, images = pair(sequential)
    seen = []
    hook = nn.modules.module.register_module_forward_hook(lambda m, x, y: seen.append(type(m)))
    try:
        in_step(ours, images)
    finally:
        hook.remove()
    assert nn.ReLU in seen


def test_a_norm_that_was_replaced_later_is_used():
    _, ours, images = pair(NETWORKS["basic"])
    ours.bn1 = nn.GroupNorm(3, 3)
    ours.relu = nn.Tanh()
    out = ours.bn2(ours.conv2(ours.relu(ours.bn1(ours.conv1(images))))) + images
    torch.testing.assert_close(in_step(ours, images), out.tanh(), rtol=1e-4, atol=1e-5)


def test_frozen_norms_keep_their_relu():
    plain, ours, images = pair(NETWORKS["basic"])
    ours.bn1.eval(), plain.bn1.eval()
    torch.testing.assert_close(in_step(ours, images), plain(images), rtol=1e-4, atol=1e-5)


class Own(nn.Module):
    """A block of a user's own, as ViewBatchNorm's documentation has it."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

    def forward(self, x):
        if isinstance(self.norm, ViewBatchNorm):
            return self.norm(self.conv(x), residual=x, relu=True)
        return (self.norm(self.conv(x)) + x).relu()


def test_a_block_of_one_s_own():
    plain, ours, images = pair(Own)
    assert torch.equal(ours(images), plain(images))
    torch.testing.assert_close(in_step(ours, images), plain(images), rtol=1e-4, atol=1e-5)


# ---- channels last ----


def test_weights_stay_as_they_are(make_model, make_batch, tmp_path):
    """So that what asks for contiguous weights still takes them."""
    model = make_model(heads=(2, 2))
    before = [(p, p.stride(), p.data_ptr()) for p in model.parameters()]
    optimizer = BLDOptimizer(model, 0.05)
    optimizer.step(*make_batch(2))
    after = [(p, p.stride(), p.data_ptr()) for p in model.parameters()]
    assert all(
        p is q and rest == same for (p, *rest), (q, *same) in zip(before, after, strict=True)
    )
    assert len(torch.nn.utils.parameters_to_vector(model.parameters())) > 0


@pytest.mark.parametrize("channels_last", [None, True, False])
def test_images_are_in_channels_last_on_a_cpu(channels_last, make_model, make_batch):
    model = make_model(heads=(2, 2))
    optimizer = arranged(model, 0.05, channels_last=channels_last)
    seen = []
    model.backbone[3].register_forward_hook(
        lambda m, x, y: seen.append(y.is_contiguous(memory_format=torch.channels_last))
    )
    optimizer.step(*make_batch(2))  # with which contiguous images are tried out, too
    seen.clear()
    optimizer.step(*make_batch(2))
    assert seen and all(last == (channels_last is not False) for last in seen)


def test_elsewhere_images_lie_as_the_weights_do(make_model):
    model = make_model(heads=(2,)).to("meta")
    assert not MemoryFormat().channels_last(model)
    assert MemoryFormat().channels_last(model.to(memory_format=torch.channels_last))


def test_formats_agree_in_float64(make_model, make_batch):
    results = []
    for channels_last in (False, True):
        model = make_model(heads=(2, 2), dtype=torch.float64)
        optimizer = arranged(model, 0.05, channels_last=channels_last)
        for number in range(3):
            optimizer.step(*make_batch(2, number, dtype=torch.float64))
        results.append([*model.parameters(), *model.buffers()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


class Viewing(nn.Module):
    """Needs contiguous activations."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, images):
        return self.conv(images).view(len(images), -1)


@pytest.mark.parametrize("views_per_pass", [1, 2, "auto"])
def test_a_model_with_view_falls_back_to_contiguous(views_per_pass, make_batch):
    states = []
    for channels_last in (None, False):
        torch.manual_seed(0)
        model = MultiHead(Viewing(), 144)
        model.add_head(2)
        model.add_head(2)
        optimizer = arranged(
            model, 0.05, views=2, views_per_pass=views_per_pass, channels_last=channels_last
        )
        for number in range(2):
            optimizer.step(*make_batch(2, number))
        states.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


def test_a_base_with_state_that_was_saved_in_the_other_format(make_model, make_batch):
    """torch's fused kernels pair parameters and momentum by address."""
    base, weights = partial(torch.optim.SGD, momentum=0.9, fused=True), []
    for formats in ((False, None), (False, False)):
        model, saved = make_model(heads=(2, 2)), None
        for number, channels_last in enumerate(formats):
            optimizer = arranged(model, 0.01, base=base, channels_last=channels_last)
            if saved:
                optimizer.load_state_dict(saved)
            optimizer._warned_of_state = True
            optimizer.step(*make_batch(2, number))
            saved = optimizer.state_dict()
        weights.append([p.detach().clone() for p in model.parameters()])
    for a, b in zip(*weights, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_a_policy_of_running_statistics_is_one_of_two(make_model):
    model = convert_view_batchnorm(make_model(), "every_pass")
    norms = [m for m in model.modules() if isinstance(m, ViewBatchNorm)]
    assert [n.statistics for n in norms] == ["every_pass"] * 2 and "every_pass" in repr(model)
    with pytest.raises(ValueError, match="^statistics: expected one of once, every_pass, got 1"):
        convert_view_batchnorm(model, 1)
    assert [n.statistics for n in convert_view_batchnorm(model).modules() if n in norms] == [
        "every_pass"
    ] * 2


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
@pytest.mark.parametrize("statistics", ["once", "every_pass"])
def test_a_subclass_that_was_reverted_is_converted_again(statistics):
    class Own(nn.BatchNorm2d):
        def forward(self, x):
            return 2 * super().forward(x)

    norm = convert_view_batchnorm(Own(3), statistics=statistics)
    for _ in range(2):
        assert isinstance(norm, ViewBatchNorm) and norm.statistics == statistics
        revert_view_batchnorm(norm)
        assert type(norm) is Own
        convert_view_batchnorm(norm)


@pytest.mark.parametrize("kind", ["buffer", "parameter", "module", "array"])
def test_a_subclass_with_attributes_of_the_same_names_is_left_alone(kind):
    norm = type("Own", (nn.BatchNorm2d,), {})(3)
    if kind == "buffer":
        norm.register_buffer("counted", torch.zeros(1))
    elif kind == "parameter":
        norm.views = nn.Parameter(torch.zeros(1))
    elif kind == "module":
        norm.mode = nn.Identity()
    else:
        norm.statistics = torch.zeros(2)
    before = type(norm)
    assert type(convert_view_batchnorm(norm)) is before


def test_a_network_that_was_reverted_is_what_it_was(make_model, make_batch):
    """For tools that go by a module's exact type."""
    model = make_model(heads=(2, 2))
    model.backbone = nn.Sequential(torchvision.models.resnet18(num_classes=6), nn.Sequential())
    classes = [type(m) for m in model.modules()]
    optimizer = BLDOptimizer(model, 0.01)
    batch = [x.repeat(1, 1, 4, 4) if x.dim() == 4 else x for x in make_batch(2)]
    optimizer.step(*batch)
    assert [type(m) for m in model.modules()] != classes
    values = {name: value.clone() for name, value in model.state_dict().items()}
    assert revert_view_batchnorm(model) is model
    assert [type(m) for m in model.modules()] == classes
    assert all(torch.equal(values[name], value) for name, value in model.state_dict().items())
    backbone = model.backbone.eval()
    torch.testing.assert_close(torch.jit.script(backbone)(batch[0]), backbone(batch[0]))
    torch.testing.assert_close(torch.fx.symbolic_trace(backbone)(batch[0]), backbone(batch[0]))
    model.train()
    optimizer.step(*batch)


# ---- torch.compile ----


def compiled_model(backend):
    torch.manual_seed(0)
    backbone = nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), BasicBlock(4, 4),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip
    eager = MultiHead(backbone, 4)
    twin = copy.deepcopy(eager)
    twin.backbone.compile(backend=backend, fullgraph=True, dynamic=False)
    return eager, twin


@pytest.mark.parametrize("schedule", ["two_forward", "shared_forward"])
def test_a_compiled_backbone_has_no_break_and_is_not_compiled_again_for_a_head(
    schedule, make_batch
):
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    models = compiled_model(backend)
    # a compiled model with a shared forward pass learns as with two
    names = ("two_forward", schedule)
    optimizers = [
        BLDOptimizer(m, 0.05, views=3, schedule=name) for m, name in zip(models, names, strict=True)
    ]
    counts = []
    for _ in range(3):
        torch.manual_seed(1)
        for model in models:
            with torch.random.fork_rng():
                model.add_head(2)
        for number in range(2):
            for optimizer in optimizers:
                optimizer.step(*make_batch(2, number))
        counts.append(len(graphs))
    assert counts[1] == counts[2]
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
