"""The three losses: values and gradients against float64 autograd, and what is exactly zero."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck
from torch.nn import functional as F

import bld_ext
from bld_ext import ops
from bld_ext.reference import compute_dtype

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SIZES = [2, 64, 1, 5]
OLD, NEW = SIZES[:-1], SIZES[-1]
C, C_OLD = sum(SIZES), sum(OLD)
TEMPERATURE = 0.7
pytestmark = pytest.mark.usefixtures("poison")
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
spatials = pytest.mark.parametrize("spatial", [(), (3, 5), (2, 1, 3)], ids=["flat", "2d", "3d"])


def make_inputs(*spatial, dtype=torch.float32, N=4, sizes=SIZES, seed=0):
    """logits, labels, and a bank of other logits."""
    generator = torch.Generator().manual_seed(seed)
    shape = (N, sum(sizes), *spatial)
    logits, others = 2 * torch.randn((2, *shape), generator=generator, dtype=torch.float64).to(
        dtype
    )
    labels = torch.randint(sizes[-1], (N, *spatial), generator=generator)
    bank = ops.head_softmax(others, sizes[:-1], TEMPERATURE)
    return logits.requires_grad_(), labels, bank


def exact(logits, labels, bank, sizes=SIZES):
    """(L_t, L_d) and their gradients, in float64 by autograd."""
    z = logits.detach().double().requires_grad_()
    new = F.cross_entropy(z[:, -sizes[-1] :], labels, reduction="sum")
    log_p = [head.log_softmax(1) for head in (z / TEMPERATURE).split(sizes, 1)[:-1]]
    old = -(bank.double() * torch.cat(log_p or [z[:, :0]], 1)).sum()
    grads = [torch.autograd.grad(loss, z, retain_graph=True)[0] for loss in (new, old)]
    return (new, old), grads


def assert_value(loss, expected, dtype):
    assert loss.dtype == compute_dtype(dtype) and loss.shape == ()
    rtol = 8 * torch.finfo(compute_dtype(dtype)).eps
    torch.testing.assert_close(loss.double(), expected, rtol=rtol, atol=0)


def assert_grad(grad, expected, dtype, scale=1):
    """One rounding to the logits' dtype of a float32 difference of probabilities."""
    assert grad.dtype == dtype
    half_ulp, smallest = torch.finfo(dtype).eps / 2, torch.finfo(dtype).smallest_normal
    inner = scale * 8 * torch.finfo(compute_dtype(dtype)).eps / TEMPERATURE
    atol = inner + smallest * half_ulp
    rtol = 1.01 * half_ulp if dtype.itemsize == 2 else 2 * half_ulp
    torch.testing.assert_close(grad.double(), expected, rtol=rtol, atol=atol)


def grad_of(loss, logits):
    return torch.autograd.grad(loss, logits, retain_graph=True)[0]


@dtypes
@spatials
def test_distillation_loss(spatial, dtype):
    logits, labels, bank = make_inputs(*spatial, dtype=dtype)
    (_, expected), (_, expected_grad) = exact(logits, labels, bank)
    loss = ops.distillation_loss(logits, bank, OLD, TEMPERATURE)
    assert_value(loss, expected, dtype)
    grad = grad_of(loss, logits)
    assert_grad(grad, expected_grad, dtype)
    assert torch.equal(grad[:, C_OLD:], torch.zeros_like(grad[:, C_OLD:]))


@dtypes
@spatials
def test_warm_up_loss(spatial, dtype):
    logits, labels, bank = make_inputs(*spatial, dtype=dtype)
    (expected, _), (expected_grad, _) = exact(logits, labels, bank)
    loss, bank = ops.warm_up_loss(logits, labels, SIZES, TEMPERATURE)
    assert_value(loss, expected, dtype)
    grad = grad_of(loss, logits)
    assert_grad(grad, expected_grad, dtype)
    assert torch.equal(grad[:, :C_OLD], torch.zeros_like(grad[:, :C_OLD]))
    assert not bank.requires_grad
    assert torch.equal(bank, ops.head_softmax(logits, OLD, TEMPERATURE))


@dtypes
@spatials
def test_joint_loss(spatial, dtype):
    logits, labels, bank = make_inputs(*spatial, dtype=dtype)
    expected, expected_grads = exact(logits, labels, bank)
    losses = ops.joint_loss(logits, labels, bank, SIZES, TEMPERATURE)
    for loss, value, expected_grad in zip(losses, expected, expected_grads, strict=True):
        assert_value(loss, value, dtype)
        assert_grad(grad_of(loss, logits), expected_grad, dtype)
    both = 0.25 * losses[0] - 2 * losses[1]
    assert_grad(grad_of(both, logits), 0.25 * expected_grads[0] - 2 * expected_grads[1], dtype)


def test_joint_loss_is_its_two_parts_bit_for_bit():
    logits, labels, bank = make_inputs(3)
    new, old = ops.joint_loss(logits, labels, bank, SIZES, TEMPERATURE)
    new_alone, _ = ops.warm_up_loss(logits, labels, SIZES, TEMPERATURE)
    old_alone = ops.distillation_loss(logits, bank, OLD, TEMPERATURE)
    for loss, alone in ((new, new_alone), (old, old_alone)):
        assert torch.equal(loss, alone)
        assert torch.equal(grad_of(loss, logits), grad_of(alone, logits))


@pytest.mark.parametrize("layout", ["contiguous", "channels-last", "transposed"])
@pytest.mark.parametrize("scale", [1, 1000], ids=["usual", "extreme"])
@dtypes
def test_gradient_is_exactly_zero_until_a_logit_moves(dtype, scale, layout):
    logits = (scale * make_inputs(3, 2, dtype=dtype, N=6)[0]).detach()
    if layout == "channels-last":
        logits = logits.contiguous(memory_format=torch.channels_last)
    elif layout == "transposed":
        logits = logits.transpose(2, 3)
    logits.requires_grad_()
    _, labels, _ = make_inputs(*logits.shape[2:], N=6)
    _, bank = ops.warm_up_loss(logits, labels, SIZES, TEMPERATURE)
    _, old = ops.joint_loss(logits, labels, bank, SIZES, TEMPERATURE)
    for loss in (old, ops.distillation_loss(logits, bank, OLD, TEMPERATURE)):
        assert torch.equal(grad_of(loss, logits), torch.zeros_like(logits))


@dtypes
def test_gradient_is_not_zero_after_a_change(dtype):
    logits, labels, _ = make_inputs(dtype=dtype)
    _, bank = ops.warm_up_loss(logits, labels, SIZES, TEMPERATURE)
    moved = logits.detach().clone()
    moved[:, 0] += 0.125
    moved.requires_grad_()
    grad = grad_of(ops.distillation_loss(moved, bank, OLD, TEMPERATURE), moved)
    assert (grad[:, 0] > 0).all() and (grad[:, 1] < 0).all()
    assert torch.equal(grad[:, 2:], torch.zeros_like(grad[:, 2:]))


@pytest.mark.parametrize("scale", [2.0**16, 2.0**20], ids=["2^16", "2^20"])
@dtypes
def test_gradient_under_loss_scaling(dtype, scale):
    # torch.amp.GradScaler starts at 2^16, which is no float16; its product with the gradient is
    logits, labels, other = make_inputs(dtype=dtype)
    unmoved = ops.head_softmax(logits.detach(), OLD, TEMPERATURE)
    for bank in (unmoved, torch.lerp(unmoved, other, 2.0**-8)):
        expected = exact(logits, labels, bank)[1][1]
        assert scale * expected.abs().max() < torch.finfo(torch.float16).max
        grad = grad_of(scale * ops.distillation_loss(logits, bank, OLD, TEMPERATURE), logits)
        assert_grad(grad, scale * expected, dtype, scale)


@pytest.mark.parametrize("spatial", [(), (2,)], ids=["flat", "dense"])
@pytest.mark.parametrize("N", [0, 3])
def test_first_task_has_no_old_heads(N, spatial):
    logits, labels, _ = make_inputs(*spatial, N=N, sizes=[4])
    warm_up, bank = ops.warm_up_loss(logits, labels, [4])
    assert bank.shape == (N, 0, *spatial)
    new, old = ops.joint_loss(logits, labels, bank, [4])
    torch.testing.assert_close(new, F.cross_entropy(logits, labels, reduction="sum"))
    assert torch.equal(warm_up, new)
    assert torch.equal(old, torch.zeros(()))
    assert torch.equal(grad_of(old, logits), torch.zeros_like(logits))


def test_bank_zero_of_an_impossible_class_contributes_nothing():
    logits, bank = torch.tensor([[0.0, -torch.inf]], requires_grad=True), torch.tensor([[1.0, 0.0]])
    loss = ops.distillation_loss(logits, bank, [2])
    assert torch.equal(loss, torch.zeros(()))
    assert torch.equal(grad_of(loss, logits), torch.zeros(1, 2))


def losses(logits, labels, bank, tau=TEMPERATURE):
    """Every loss of the module, and its name."""
    return {
        "distillation": ops.distillation_loss(logits, bank, OLD, tau),
        "warm-up": ops.warm_up_loss(logits, labels, SIZES, tau)[0],
        "joint-new": ops.joint_loss(logits, labels, bank, SIZES, tau)[0],
        "joint-old": ops.joint_loss(logits, labels, bank, SIZES, tau)[1],
    }


each_loss = pytest.mark.parametrize("name", ["distillation", "warm-up", "joint-new", "joint-old"])


@each_loss
def test_gradcheck(name):
    logits, labels, bank = make_inputs(2, dtype=torch.float64, N=2)
    assert torch.autograd.gradcheck(lambda z: losses(z, labels, bank)[name], logits)


@each_loss
def test_second_derivative_raises(name):
    logits, labels, bank = make_inputs()
    loss = losses(logits, labels, bank)[name]
    (grad,) = torch.autograd.grad(loss, logits, create_graph=True)
    # a gradient penalty, whose second half must not vanish silently
    with pytest.raises(RuntimeError, match="bld_ext: the losses have no second derivative"):
        (loss + grad.square().sum()).backward()


@each_loss
def test_forward_mode_raises(name):
    logits, labels, bank = make_inputs()
    with pytest.raises(NotImplementedError, match="^logits: expected a plain tensor, got a dual"):
        torch.func.jvp(
            lambda z: losses(z, labels, bank)[name], (logits.detach(),), (torch.ones(4, C),)
        )


@each_loss
def test_functional_gradients_raise(name):
    logits, labels, bank = make_inputs()
    with pytest.raises(NotImplementedError, match="^logits: .*torch.func.grad.*use backward or"):
        torch.func.grad(lambda z: losses(z, labels, bank)[name])(logits.detach())


def test_bank_gets_no_gradient():
    logits, labels, bank = make_inputs()
    bank.requires_grad_()
    for loss in (losses(logits, labels, bank)[name] for name in ("distillation", "joint-old")):
        assert torch.autograd.grad(loss, bank, allow_unused=True) == (None,)


@pytest.mark.parametrize("requires_grad", [False, True], ids=["plain", "grad"])
@pytest.mark.parametrize("spatial", [(), (2, 3)], ids=["flat", "dense"])
@dtypes
def test_opcheck(spatial, dtype, requires_grad):
    logits, labels, bank = make_inputs(*spatial, dtype=dtype)
    logits.requires_grad_(requires_grad)
    library, tau = torch.ops.bld_ext, torch.tensor(TEMPERATURE, dtype=torch.float64)
    opcheck(library.distillation_loss.default, (logits, bank, OLD, tau))
    opcheck(library.warm_up_loss.default, (logits, labels, SIZES, tau))
    opcheck(library.joint_loss.default, (logits, labels, bank, SIZES, tau))


@each_loss
def test_compiles_into_one_graph(name):
    logits, labels, bank = make_inputs(2)
    compiled = torch.compile(losses, fullgraph=True)(logits, labels, bank)[name]
    eager = losses(logits, labels, bank)[name]
    assert torch.equal(compiled, eager)
    assert torch.equal(grad_of(compiled, logits), grad_of(eager, logits))


LOGITS, LABELS, BANK = torch.zeros(2, 5), torch.zeros(2, dtype=torch.int64), torch.zeros(2, 3)
FINITE = "a positive finite number, at least 1e-38"
RANGE = "class indices of the newest head, 0 to 1, or -100"
FROM_ZERO = "Number each task's classes from 0"


@pytest.mark.parametrize(
    "argument, value, message",
    [
        ("logits", LOGITS.int(), "a floating-point dtype, got torch.int32"),
        ("head_sizes", [], r"at least one head: add one first, got \[\]"),
        ("head_sizes", [3, 1], r"a sum of 5, logits' classes, got \[3, 1\]"),
        ("temperature", 0, f"{FINITE}, got 0"),
        ("labels", LABELS.int(), "torch.int64, got torch.int32"),
        ("labels", LABELS[:1], r"shape \(2,\), got \(1,\)"),
        ("labels", LABELS + 2, f"{RANGE}, got 2 to 2. {FROM_ZERO}"),
        ("labels", LABELS - 1, f"{RANGE}, got -1 to -1. {FROM_ZERO}"),
        ("labels", LABELS.to("meta"), "device cpu, got meta"),
        ("bank", BANK[:, :2], r"shape \(2, 3\), got \(2, 2\)"),
        ("bank", BANK.half(), "torch.float32 for torch.float32 logits, got torch.float16"),
        ("bank", BANK.to("meta"), "device cpu, got meta"),
    ],
)
def test_bad_argument(argument, value, message):
    arguments = dict(logits=LOGITS, labels=LABELS, bank=BANK, head_sizes=[3, 2], temperature=2.0)
    arguments[argument] = value
    match = f"^{argument}: expected {message}$"
    with pytest.raises(ValueError, match=match):
        ops.joint_loss(**arguments)
    one_less = ops.distillation_loss if argument == "bank" else ops.warm_up_loss
    if argument == "bank":
        arguments["head_sizes"] = [3]
    del arguments["labels" if argument == "bank" else "bank"]
    with pytest.raises(ValueError, match=match):
        one_less(**arguments)


def test_a_small_gradient_survives_until_the_loss_is_scaled():
    logits = torch.tensor([[17.5, 0.0]], dtype=torch.float16, requires_grad=True)
    bank = torch.tensor([[1.0, 0.0]])
    grad = grad_of(2.0**16 * ops.distillation_loss(logits, bank, [2], 1.0), logits)
    assert grad[0, 1] == torch.tensor(2.0**16 / (1 + torch.e**17.5)).half()


@dtypes
def test_incoming_gradient_is_rounded_with_the_gradient_once(dtype):
    logits, labels, bank = make_inputs(N=200, dtype=dtype)
    expected = exact(logits, labels, bank)[1][1] / 3
    grad = grad_of(ops.distillation_loss(logits, bank, OLD, TEMPERATURE) / 3, logits)
    assert_grad(grad, expected, dtype)


def test_confident_predictions_keep_their_digits():
    logits = torch.tensor([[13.0, 0.0], [0.0, 9.0]]).repeat(500, 1)
    labels = torch.tensor([0, 1]).repeat(500)
    bank = F.one_hot(labels).float()
    (value, _), _ = exact(logits, labels, bank[:, :0], [2])
    for loss in (ops.warm_up_loss(logits, labels, [2])[0],
                 ops.distillation_loss(logits, bank, [2], 1.0)):  # fmt: skip
        torch.testing.assert_close(loss.double(), value, rtol=2e-6, atol=0)


def test_compiled_with_one_temperature_after_another():
    logits, _, bank = make_inputs()
    compiled = torch.compile(ops.distillation_loss, fullgraph=True)
    for tau in (TEMPERATURE, 2.0, 3.0):
        expected = ops.distillation_loss(logits, bank, OLD, tau)
        assert torch.equal(compiled(logits, bank, OLD, tau), expected)


def test_compiled_code_cannot_check_inputs():
    logits, labels, bank = make_inputs()
    compiled = torch.compile(ops.joint_loss, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="check_inputs: expected False: torch.compile cannot"):
        compiled(logits, labels, bank, SIZES, check_inputs=True)


def test_another_default_device_changes_nothing():
    logits, _, bank = make_inputs()
    expected = ops.distillation_loss(logits, bank, OLD)
    with torch.device("meta"):
        assert torch.equal(ops.distillation_loss(logits, bank, OLD), expected)


@pytest.mark.parametrize("argument", ["labels", "bank", "temperature"])
def test_argument_of_another_type(argument):
    arguments = dict(logits=LOGITS, labels=LABELS, bank=BANK, head_sizes=[3, 2], temperature=2.0)
    with pytest.raises(TypeError, match=f"^{argument}: expected .*, got NoneType$"):
        ops.joint_loss(**arguments | {argument: None})


SHAPES = {
    "one-class": (7, [1, 1]),
    "pairs": (1000, [2] * 5),
    "twenty-fives": (1000, [5] * 20),
    "ragged": (50, [1, 7, 64, 3, 5]),
    "wide": (9, [1000, 1, 999]),
    "64-heads": (5, list(range(1, 65))),
}


@pytest.mark.parametrize("N, sizes", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("spatial", [(), (2, 9)], ids=["flat", "dense"])
def test_float32_against_float64(N, sizes, spatial):
    logits, labels, bank = make_inputs(*spatial, N=N if not spatial else 3, sizes=sizes)
    values, grads = exact(logits, labels, bank, sizes)
    found = ops.joint_loss(logits, labels, bank, sizes, TEMPERATURE)
    for loss, value, grad in zip(found, values, grads, strict=True):
        torch.testing.assert_close(loss.double(), value, rtol=2e-6, atol=1e-30)
        # of the mean over images 2e-6 / N, so of the sum 2e-6
        torch.testing.assert_close(grad_of(loss, logits).double(), grad, rtol=0, atol=2e-6)


@pytest.mark.parametrize("temperature", [0.05, 1.0, 100.0])
@dtypes
def test_finite_for_extreme_logits(dtype, temperature):
    sizes = [1, 9, 20]
    logits = (4000 * make_inputs(dtype=dtype, N=8, sizes=sizes)[0].detach()).clamp(-1e4, 1e4)
    logits[1], logits[2, ::2], logits[2, 1::2] = 1e4, 1e4, -1e4
    logits.requires_grad_()
    _, labels, bank = make_inputs(dtype=dtype, N=8, sizes=sizes)
    new, old = ops.joint_loss(logits, labels, bank, sizes, temperature)
    filled = ops.warm_up_loss(logits, labels, sizes, temperature)[1]
    zero = grad_of(ops.distillation_loss(logits, filled, sizes[:-1], temperature), logits)
    for loss in (new, old):
        assert loss.isfinite() and grad_of(loss, logits).isfinite().all()
    assert torch.equal(zero, torch.zeros_like(zero))


@pytest.mark.parametrize("spatial", [(), (3, 50)], ids=["flat", "dense"])
def test_same_bits_in_any_run_and_thread_count(spatial, with_threads):
    logits, labels, bank = make_inputs(*spatial, N=300)

    def results():
        found = ops.joint_loss(logits, labels, bank, SIZES, TEMPERATURE)
        return [*found, *(grad_of(loss, logits) for loss in found)]

    expected = results()
    assert all(all(map(torch.equal, found, expected)) for found in with_threads(results))


BITS = """
import hashlib, torch
import bld_ext
from bld_ext import ops
digest = hashlib.sha256()
for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
    for spatial in ((), (5, 9)):
        generator = torch.Generator().manual_seed(0)
        z, other = 3 * torch.randn(2, 37, 9, *spatial, generator=generator, dtype=torch.float64)
        z, labels = z.to(dtype), torch.randint(4, (37, *spatial), generator=generator)
        labels[1] = -100
        bank = ops.head_softmax(other.to(dtype), [2, 3], 0.7)
        tau = torch.tensor(0.7, dtype=torch.float64)
        outputs = torch.ops.bld_ext.joint_loss(z, labels, bank, [2, 3, 4], tau)
        for tensor in (bank, *outputs):
            digest.update(tensor.double().numpy().tobytes())
print(digest.hexdigest())
"""


@pytest.mark.skipif(bld_ext.build_info() is None, reason="bld_ext._C is not built")
def test_same_bits_whatever_the_vector_registers(outputs_by_registers):
    assert len(set(outputs_by_registers(BITS))) == 1


@pytest.mark.parametrize("spatial", [(), (2,)], ids=["flat", "dense"])
@pytest.mark.parametrize("label", [-1, SIZES[-1], 2**40])
def test_a_label_that_is_no_class_makes_its_image_nan(label, spatial):
    """Where looking at labels would wait: the op itself, without the check of its function."""
    logits, labels, bank = make_inputs(*spatial)
    tau = torch.tensor(TEMPERATURE, dtype=torch.float64)
    good = torch.ops.bld_ext.joint_loss(logits, labels, bank, SIZES, tau)
    labels[1] = label
    new, old, new_grad, old_grad = torch.ops.bld_ext.joint_loss(logits, labels, bank, SIZES, tau)
    assert new.isnan() and torch.equal(old, good[1]) and torch.equal(old_grad, good[3])
    assert new_grad[1, C_OLD:].isnan().all() and not new_grad[:, :C_OLD].any()
    assert torch.equal(new_grad[[0, 2, 3]], good[2][[0, 2, 3]])


def test_temperature_may_be_a_tensor():
    logits, labels, bank = make_inputs()
    for tau in (torch.tensor(TEMPERATURE), torch.tensor(TEMPERATURE, dtype=torch.float64)):
        found = losses(logits, labels, bank, tau)
        expected = losses(logits, labels, bank, tau.item())
        assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize(
    "value, message",
    [
        (torch.tensor(0.0), "a positive finite number, at least 1e-38, got 0.0"),
        (torch.tensor(torch.nan), "a positive finite number, at least 1e-38, got nan"),
        (torch.ones(2), r"a number or a scalar tensor, got \(2,\)"),
        (torch.tensor(2), "a floating-point dtype, got torch.int64"),
        (torch.tensor(2.0, requires_grad=True), "a constant: detach it, got requires_grad=True"),
        (torch.tensor(2.0, device="meta"), "device cpu, got meta"),
    ],
)
def test_bad_temperature_tensor(value, message):
    with pytest.raises(ValueError, match=f"^temperature: expected {message}$"):
        ops.head_softmax(LOGITS, [5], value)


# ---- positions without a class ----


@dtypes
@spatials
def test_an_ignored_label_has_no_loss_and_no_gradient(spatial, dtype):
    logits, labels, bank = make_inputs(*spatial, dtype=dtype)
    labels[1], labels.view(-1)[-1] = -100, -100
    (new, old), (new_grad, old_grad) = exact(logits, labels, bank)
    losses = ops.joint_loss(logits, labels, bank, SIZES, TEMPERATURE)
    loss, _ = ops.warm_up_loss(logits, labels, SIZES, TEMPERATURE)
    for found in (losses[0], loss):
        assert_value(found, new, dtype)
        assert_grad(grad_of(found, logits), new_grad, dtype)
    assert not grad_of(loss, logits)[1].any()
    assert_value(losses[1], old, dtype)  # distilled everywhere
    assert_grad(grad_of(losses[1], logits), old_grad, dtype)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("spatial", [(), (2,)], ids=["flat", "dense"])
def test_the_logits_of_an_ignored_label_do_not_matter(value, spatial):
    logits, labels, _ = make_inputs(*spatial)
    with torch.no_grad():
        logits[1, C_OLD:] = value
    labels[1] = -100
    loss, _ = ops.warm_up_loss(logits, labels, SIZES, TEMPERATURE)
    assert loss.isfinite() and not grad_of(loss, logits)[1].any()


@pytest.mark.parametrize("classes, scale", [(1000, 1e-3), (100_000, 1e-3), (300_000, 5)])
def test_wide_heads_lose_no_digits(classes, scale):
    """Of nearly equal logits, as those of a new head, and of others."""
    logits = (torch.rand(3, 2 * classes) * scale).requires_grad_()
    labels, bank = torch.tensor([0, classes - 1, 7]), torch.rand(3, classes).softmax(1)
    losses = ops.joint_loss(logits, labels, bank, [classes, classes], TEMPERATURE)
    values, grads = exact(logits, labels, bank, [classes, classes])
    for loss, value, grad in zip(losses, values, grads, strict=True):
        assert abs(loss.item() / value.item() - 1) < 1e-6
        (found,) = torch.autograd.grad(loss, logits, retain_graph=True)
        assert (found - grad).norm() < 1e-5 * grad.norm()
    sums = ops.head_softmax(logits.detach(), [classes]).double().sum(1)
    assert (sums - 1).abs().max() < 1e-5


def test_labels_that_float32_cannot_tell_apart():
    classes = 2**24 + 4
    logits = torch.zeros(1, classes, requires_grad=True)
    loss, _ = ops.warm_up_loss(logits, torch.tensor([2**24 + 1]), [classes])
    (grad,) = torch.autograd.grad(loss, logits)
    assert (grad < 0).nonzero().tolist() == [[0, 2**24 + 1]]


def test_labels_of_another_shape_are_refused_by_the_kernel():
    tau = torch.tensor(TEMPERATURE, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"labels: expected \[N, \*spatial\]"):
        torch.ops.bld_ext.warm_up_loss(
            torch.randn(4, 3, 2), torch.zeros(2, 4, dtype=torch.int64), [3], tau
        )


def test_tensors_without_values_are_not_looked_at():
    labels = torch.tensor([0, 1, 1, 0])

    def loss(logits, labels):
        return ops.warm_up_loss(logits, labels, [2, 2])[0]

    logits = torch.randn(4, 4)
    with FakeTensorMode() as fake:
        made = [fake.from_tensor(t) for t in (logits, labels)]
        assert loss(*made).shape == ()
    graph = make_fx(loss, tracing_mode="symbolic")(logits, labels)
    assert torch.equal(graph(logits, labels), loss(logits, labels))
    found = torch.func.vmap(loss, (None, 0))(logits, torch.stack([labels, 1 - labels]))
    assert torch.equal(found, torch.stack([loss(logits, labels), loss(logits, 1 - labels)]))


def test_a_batch_of_ignored_labels():
    logits, labels, _ = make_inputs(3, 5)
    loss, _ = ops.warm_up_loss(logits, labels.fill_(-100), SIZES, TEMPERATURE)
    assert loss == 0 and not grad_of(loss, logits).any()


def test_a_wrong_label_beside_ignored_ones_is_refused():
    logits, labels, bank = make_inputs()
    labels[0], labels[2] = -100, 7
    message = r"^labels: expected .* 0 to 4, or -100, got \d to 7\."
    with pytest.raises(ValueError, match=message):
        ops.joint_loss(logits, labels, bank, SIZES, TEMPERATURE)


def test_opcheck_of_ignored_labels():
    logits, labels, bank = make_inputs()
    labels[1] = -100
    tau = torch.tensor(TEMPERATURE, dtype=torch.float64)
    opcheck(torch.ops.bld_ext.joint_loss.default, (logits, labels, bank, SIZES, tau))
    opcheck(torch.ops.bld_ext.warm_up_loss.default, (logits, labels, SIZES, tau))
