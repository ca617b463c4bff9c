"""MultiHead: logits, prediction, checkpoints and errors."""

import copy
import types
from collections import namedtuple
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from bld_ext import BLDOptimizer, MultiHead

HEADS = (2, 3, 1)


@pytest.fixture
def model(make_model):
    return make_model(HEADS, dropout=0.3)


@pytest.fixture
def images(make_batch):
    return make_batch(2)[0]


def modes(model):
    return {name: module.training for name, module in model.named_modules()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_logits_are_those_of_each_head_side_by_side(make_model, make_batch, dtype):
    model = make_model(HEADS, dtype=dtype)
    images, _ = make_batch(2, dtype=dtype)
    model.eval()
    features = model.backbone(images)
    separate = torch.cat([head(features) for head in model.heads], 1)
    tolerance = {torch.float32: 1e-6, torch.float64: 1e-14}[dtype]
    torch.testing.assert_close(model(images), separate, rtol=tolerance, atol=tolerance)


def test_a_head_learns_only_from_its_own_logits(model, images):
    model(images)[:, 2:5].square().sum().backward()
    touched = [bool(head.weight.grad.any() or head.bias.grad.any()) for head in model.heads]
    assert touched == [False, True, False]


def test_head_sizes_follow_add_head(make_model):
    model = make_model()
    assert model.head_sizes == ()
    for i, classes in enumerate(HEADS):
        head = model.add_head(classes)
        assert head is model.heads[i]
        assert model.head_sizes == HEADS[: i + 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_add_head_follows_the_backbone(make_model, device, dtype):
    model = make_model().to(device, dtype)
    head = model.add_head(4)
    assert {(p.device.type, p.dtype) for p in head.parameters()} == {(device, dtype)}


def test_add_head_on_a_backbone_without_parameters():
    model = MultiHead(nn.Flatten(), 12)
    model.add_head(2)
    assert model(torch.zeros(5, 3, 2, 2)).shape == (5, 2)


# ---- predict ----


@pytest.mark.parametrize("task", range(len(HEADS)))
def test_predict_is_the_argmax_of_its_head_in_eval_mode(model, images, task):
    predicted = model.predict(images, task)
    model.eval()
    assert predicted.dtype == torch.int64
    assert torch.equal(predicted, model(images).split(HEADS, 1)[task].argmax(1))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_predict_leaves_modes_buffers_and_gradients_alone(model, images, training):
    model.train(training)
    model.backbone[1].train(not training)  # a module whose mode differs from the rest
    before, state = modes(model), copy.deepcopy(model.state_dict())
    model.predict(images, 0)
    assert modes(model) == before
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert torch.is_grad_enabled()


def test_predict_runs_the_backbone_without_gradients(model, images):
    seen = []
    model.backbone.register_forward_hook(
        lambda *a: seen.append((a[2].requires_grad, a[0].training))
    )
    model.predict(images, 1)
    assert seen == [(False, False)]


def test_predict_puts_modes_back_after_an_exception(model, images):
    model.train()
    model.backbone[1].eval()
    before = modes(model)
    with pytest.raises(RuntimeError):
        model.predict(images[:, :2], 0)
    assert modes(model) == before


# ---- checkpoints and copies ----


@pytest.mark.parametrize("heads", [(), (2,), HEADS], ids=["none", "fewer", "all"])
def test_checkpoint_restores_the_heads(model, make_model, images, tmp_path, heads):
    torch.save(model.state_dict(), tmp_path / "model.pt")
    torch.manual_seed(9)
    other = make_model(heads)
    for p in other.parameters():
        nn.init.normal_(p)
    result = other.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    assert result.missing_keys == result.unexpected_keys == []
    assert other.head_sizes == HEADS
    assert torch.equal(model.eval()(images), other.eval()(images))


def test_checkpoint_inside_another_module_adds_heads_too(model, make_model):
    nn.Sequential(wrapped := make_model()).load_state_dict(nn.Sequential(model).state_dict())
    assert wrapped.head_sizes == HEADS


def test_checkpoint_with_fewer_heads_is_refused(model, make_model):
    with pytest.raises(RuntimeError, match="heads.1.weight"):
        model.load_state_dict(make_model((2,)).state_dict())


def test_deepcopy_is_equal_and_independent(model, images):
    clone = copy.deepcopy(model)
    model.eval(), clone.eval()
    expected = model(images)
    clone.add_head(4)
    with torch.no_grad():
        clone.heads[0].bias += 1
    assert model.head_sizes == HEADS
    assert torch.equal(model(images), expected)
    torch.testing.assert_close(clone(images)[:, :2], expected[:, :2] + 1, rtol=1e-6, atol=1e-6)


def test_compiled_in_one_graph_gives_the_same_logits(model, images):
    model.eval()
    torch._dynamo.reset()  # of one function it compiles only so many variants in a process
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(images), model(images), rtol=1e-6, atol=1e-6)
    model.add_head(2)
    torch.testing.assert_close(compiled(images), model(images), rtol=1e-6, atol=1e-6)


# ---- errors ----


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda m, x: MultiHead(lambda x: x, 6),
            TypeError,
            "backbone: expected a module.*function",
        ),
        (lambda m, x: MultiHead(m.backbone, 0), ValueError, "in_features: .* got 0"),
        (lambda m, x: MultiHead(m.backbone, 6)(x), RuntimeError, r"add_head\(num_classes\)"),
        (lambda m, x: m.add_head(0), ValueError, "num_classes: .* got 0"),
        (lambda m, x: m.add_head(-2), ValueError, "num_classes: .* got -2"),
        (lambda m, x: m.predict(x, 3), ValueError, "task: expected 0 to 2, got 3"),
        (lambda m, x: m.predict(x, -1), ValueError, "task: expected 0 to 2, got -1"),
        (
            lambda m, x: MultiHead(m.backbone, 6).predict(x, 0),
            (ValueError, RuntimeError),
            "add_head",
        ),
    ],
    ids=[
        "backbone",
        "in_features",
        "no-head",
        "zero",
        "negative",
        "task-3",
        "task--1",
        "predict-none",
    ],
)
def test_errors_name_the_argument(model, images, call, error, message):
    with pytest.raises(error, match=message):
        call(model, images)
    assert model.head_sizes == HEADS


@pytest.mark.parametrize(
    ("tail", "in_features", "got"),
    [
        (nn.Identity(), 7, r"\(5, 6\)"),
        (nn.Unflatten(1, (3, 2)), 3, r"\(5, 3, 2\)"),
        (nn.Flatten(0), 6, r"\(30,\)"),
    ],
    ids=["width", "too-many-dims", "too-few-dims"],
)
@pytest.mark.parametrize("method", ["forward", "predict"])
def test_features_of_the_wrong_shape(model, images, tail, in_features, got, method):
    wrong = MultiHead(nn.Sequential(model.backbone, tail), in_features)
    wrong.add_head(2)
    with pytest.raises(ValueError, match=f"backbone: expected features of shape .*got {got}"):
        wrong(images) if method == "forward" else wrong.predict(images, 0)


# ---- heads of one's own ----


class Adapter(nn.Module):
    """As PEFT's LoRA layers: weight and bias are those of the layer that it adapts."""

    def __init__(self, base):
        super().__init__()
        self.base, self.out_features = base, base.out_features
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    weight = property(lambda self: self.base.weight)
    bias = property(lambda self: self.base.bias)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def deep(in_features, num_classes):
    return nn.Sequential(nn.Linear(in_features, 8), nn.ReLU(), nn.Linear(8, num_classes))


def hooked(in_features, num_classes):
    head = nn.Linear(in_features, num_classes)
    head.register_forward_hook(lambda module, inputs, output: 3 * output)
    return head


OWN = {
    "adapter": lambda i, n: Adapter(nn.Linear(i, n)),
    "hook": hooked,
    "without-bias": partial(nn.Linear, bias=False),
    "deep": deep,
    "weight-norm": lambda i, n: nn.utils.parametrizations.weight_norm(nn.Linear(i, n)),
    "old-weight-norm": lambda i, n: nn.utils.weight_norm(nn.Linear(i, n)),
    "spectral-norm": lambda i, n: nn.utils.parametrizations.spectral_norm(nn.Linear(i, n)),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize("head", OWN.values(), ids=OWN)
def test_a_head_of_one_s_own_is_called(head, images):
    torch.manual_seed(0)
    model = MultiHead(nn.Flatten(), 3 * 8 * 8, head=head)
    for classes in (2, 3):
        model.add_head(classes)
    assert model.eval().head_sizes == (2, 3)
    features = images.flatten(1)
    separate = torch.cat([head(features) for head in model.heads], 1)
    torch.testing.assert_close(model(images), separate)
    assert torch.equal(model.predict(images, 1), separate[:, 2:].argmax(1))
    optimizer = BLDOptimizer(model.train(), lr=0.1)
    before = [p.detach().clone() for p in model.heads[1].parameters()]
    optimizer.step(images, torch.arange(len(images)) % 3)
    for old, (name, param) in zip(before, model.heads[1].named_parameters(), strict=True):
        assert not torch.equal(old, param) or name == "down.weight", name  # `up` starts at random


def test_dense_heads_and_dense_features(make_batch):
    body = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
    model = MultiHead(body, 4, head=partial(nn.Conv2d, kernel_size=1))
    model.add_head(2), model.add_head(3)
    images, _ = make_batch(2)
    assert model(images).shape == (5, 5, 8, 8) and model.head_sizes == (2, 3)
    assert model.predict(images, 1).shape == (5, 8, 8)


def test_a_head_that_does_not_tell_its_classes_is_refused():
    model = MultiHead(nn.Flatten(), 12, head=lambda i, n: nn.Identity())
    with pytest.raises(ValueError, match="^head: expected a module with out_features.*Identity"):
        model.add_head(2)
    with pytest.raises(ValueError, match="^head: expected one of 2 classes, got one of 3"):
        MultiHead(nn.Flatten(), 12, head=lambda i, n: nn.Linear(i, 3)).add_head(2)
    assert len(model.heads) == 0


@pytest.mark.parametrize("classes", [np.int64(3), torch.tensor(3), torch.tensor([3])[0]])
def test_a_number_of_classes_may_be_an_array_s_or_a_tensor_s(classes):
    model = MultiHead(nn.Flatten(), np.int32(12))
    head = model.add_head(classes)
    assert type(head.out_features) is int and model.head_sizes == (3,)


@pytest.mark.parametrize("classes", [0, 2.0, True, None, "3", torch.tensor([2, 3]), [2]], ids=str)
def test_another_number_of_classes_is_refused(classes):
    model = MultiHead(nn.Flatten(), 12)
    with pytest.raises(ValueError, match="^num_classes: expected a whole number of at least 1"):
        model.add_head(classes)
    assert len(model.heads) == 0


def test_a_checkpoint_that_does_not_fit_leaves_no_head_behind(make_model):
    saved = make_model((2, 3)).state_dict()
    saved["backbone.0.weight"] = torch.zeros(1)
    model = make_model((2,))
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict(saved)
    assert model.head_sizes == (2,)


# ---- what a backbone returns ----


class Returns(nn.Module):
    def __init__(self, wrap):
        super().__init__()
        self.layer, self.wrap = nn.Linear(192, 6), wrap

    def forward(self, images):
        return self.wrap(self.layer(images.flatten(1)))


Named = namedtuple("Named", ["logits", "aux"])
OUTPUTS = {
    "tuple-twice-the-same": lambda h: (h, h),
    "dict": lambda h: {"pooler_output": h, "last_hidden_state": h.new_zeros(5, 7, 6)},
    "named-tuple": lambda h: Named(h, h.new_zeros(5, 9)),
    "object": lambda h: types.SimpleNamespace(hidden=None, pooler_output=h),
    "pixels": lambda h: h[:, :, None, None],
    "list": lambda h: [h.new_zeros(5, 3), h],
}


@pytest.mark.parametrize("wrap", OUTPUTS.values(), ids=OUTPUTS)
def test_features_are_the_tensor_of_their_shape(wrap, images):
    model = MultiHead(Returns(wrap), 6)
    model.add_head(2)
    expected = model.heads[0](model.backbone.layer(images.flatten(1)))
    torch.testing.assert_close(model(images), expected)
    BLDOptimizer(model, lr=0.1).step(images, torch.arange(len(images)) % 2)


def test_features_of_which_shape_does_not_tell_are_chosen(images):
    model = MultiHead(Returns(lambda h: (h, -h)), 6)
    model.add_head(2)
    with pytest.raises(ValueError, match="^backbone: several of its outputs.*0 .*1 .*features="):
        model(images)
    chosen = MultiHead(model.backbone, 6, features=lambda output: output[1])
    chosen.heads = model.heads
    torch.testing.assert_close(
        chosen(images), model.heads[0](-model.backbone.layer(images.flatten(1)))
    )
    for wrap in (lambda h: None, lambda h: {"a": h[:, :5]}, lambda h: (h[:, 1:], h[:, 1:, None])):
        model.backbone.wrap = wrap
        with pytest.raises(ValueError, match=r"^backbone: expected features of shape \[N, 6\]"):
            model(images)


def test_the_length_of_features_is_found():
    backbone = nn.Flatten()
    with pytest.raises(ValueError, match="^in_features: expected .* got None.*num_features"):
        MultiHead(backbone)
    backbone.num_features = 12
    assert MultiHead(backbone).in_features == 12
    with pytest.raises(TypeError, match="^backbone: .* got a MultiHead.*model.backbone"):
        MultiHead(MultiHead(backbone))


def test_without_a_task_the_one_head_predicts(make_model, images):
    model = make_model((2,))
    assert torch.equal(model.predict(images), model.predict(images, 0))
    model.add_head(2)
    with pytest.raises(ValueError, match="^task: expected the number of a head, 0 to 1, got None"):
        model.predict(images)


class Cosine(nn.Linear):
    def __init__(self, features, classes):
        super().__init__(features, classes, bias=False)
        self.sigma = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return self.sigma * super().forward(x)


DEEP = {
    "deep": lambda f, c: nn.Sequential(nn.Linear(f, 3), nn.ReLU(), nn.Linear(3, c, bias=False)),
    "cosine": Cosine,
    "spectral": lambda f, c: nn.utils.parametrizations.spectral_norm(nn.Linear(f, c)),
    "orthogonal": lambda f, c: nn.utils.parametrizations.orthogonal(nn.Linear(f, c)),
}


@pytest.mark.parametrize("kind", DEEP)
def test_a_checkpoint_adds_heads_of_any_kind(kind):
    model, twin = (MultiHead(nn.Flatten(), 4, head=DEEP[kind]).eval() for _ in "ab")
    for size in (2, 5):
        model.add_head(size)
    twin.load_state_dict(model.state_dict())
    x = torch.rand(3, 4)
    model.eval(), twin.eval()
    assert twin.head_sizes == (2, 5) and torch.equal(model(x), twin(x))
