"""MultiHead: logits, prediction, checkpoints and errors."""

import copy

import pytest
import torch
from torch import nn

from bld_ext import MultiHead

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
        (nn.Unflatten(1, (6, 1)), 6, r"\(5, 6, 1\)"),
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
