"""The Triton kernels: on a GPU where there is one, else under Triton's interpreter on the CPU."""

import pytest
import torch

from bld_ext import reference

pytest.importorskip("triton")
from bld_ext.triton import (
    device_data,  # noqa: E402
    flat,  # noqa: E402
)
from bld_ext.triton import distillation as kernels  # noqa: E402

INTERPRETED = not torch.cuda.is_available()
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


HEADS = {  # the last one is the new head
    "first-task": [3],
    "pairs": [2] * 5,
    "ragged": [2, 64, 1, 5],
    "wide-new": [5, 5, 130],
    "wide-old": [1000, 1, 7],
    "64-heads": [1, 2, 3, 7] * 16,
    "fours": [100, 100, 100],
    "ragged-fours": [20, 4, 64, 8],
    "narrow-fours": [4, 16, 12, 8],
    "fours-and-odd-new": [20, 100, 7],
    "65-ragged-heads": [*range(1, 65), 2],
}
SPATIAL = {"flat": (), "2d": (3, 5), "3d": (2, 1, 3)}
pytestmark = [
    pytest.mark.usefixtures("triton_counts", "poison", "bounds"),
    # numpy warns of what masks throw away
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
]
heads = pytest.mark.parametrize("sizes", HEADS.values(), ids=HEADS.keys())
spatials = pytest.mark.parametrize("spatial", SPATIAL.values(), ids=SPATIAL.keys())
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
TAU = torch.tensor(0.7, dtype=torch.float64, device=DEVICE)


def make_inputs(sizes, spatial=(), dtype=torch.float32, N=3, scale=2.0):
    """logits, labels, and a bank of other logits."""
    generator = torch.Generator().manual_seed(0)
    shape = (2, N, sum(sizes), *spatial)
    logits, others = (scale * torch.randn(shape, generator=generator)).to(dtype)
    labels = torch.randint(sizes[-1], (N, *spatial), generator=generator)
    bank = reference.head_softmax(others, sizes[:-1], TAU.cpu())
    return logits.to(DEVICE), labels.to(DEVICE), bank.to(DEVICE)


def assert_near(actual, expected):
    """A difference of float32 probabilities over τ, not yet rounded to the logits' dtype."""
    assert actual.shape == expected.shape and actual.is_contiguous()
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), expected, rtol=2e-6, atol=2e-6 / TAU.item())


def skip_if_slow(sizes, spatial):
    if INTERPRETED and (sum(sizes) > 500 and spatial or len(sizes) > 16 and len(spatial) != 2):
        pytest.skip("minutes under the interpreter")


@pytest.mark.skipif(not INTERPRETED, reason="memcheck looks for it on a GPU")
@pytest.mark.parametrize("reads", [True, False], ids=["read", "written"])
def test_what_lies_behind_an_argument_is_not_touched_unnoticed(reads):
    import triton
    import triton.language as tl

    @triton.jit
    def copy(source, target, n, READS: tl.constexpr):
        at = tl.arange(0, 8)
        values = tl.load(source + at, mask=(at < n) | READS, other=0.0)
        tl.store(target + at, values, mask=(at < n) | (not READS))

    whole = torch.zeros(2, 16)
    with pytest.raises(Exception, match="3 accesses outside of all arguments"):
        copy[(1,)](whole[0, :5], whole[1, :5], 5, reads)
    copy[(1,)](whole[0, :8], whole[1, :8], 5, reads)


@heads
@spatials
@dtypes
def test_parity(sizes, spatial, dtype):
    skip_if_slow(sizes, spatial)
    logits, labels, bank = make_inputs(sizes, spatial, dtype)
    expected = reference.joint_loss(logits.double(), labels, bank.double(), sizes, TAU)
    new, old, new_grad, old_grad = kernels.joint_loss(logits, labels, bank, sizes, TAU)
    torch.testing.assert_close(new.double(), expected[0], rtol=2e-6, atol=0)
    torch.testing.assert_close(old.double(), expected[1], rtol=2e-6, atol=0)
    assert_near(new_grad, expected[2])
    assert_near(old_grad, expected[3])

    filled = kernels.head_softmax(logits, sizes[:-1], TAU)
    expected = reference.head_softmax(logits.double(), sizes[:-1], TAU)
    assert_near(filled, expected)


@heads
@pytest.mark.parametrize("spatial", [(), (7,)], ids=["flat", "dense"])
def test_one_op_is_the_others_bit_for_bit(sizes, spatial):
    skip_if_slow(sizes, spatial)
    logits, labels, bank = make_inputs(sizes, spatial)
    new, old, new_grad, old_grad = kernels.joint_loss(logits, labels, bank, sizes, TAU)
    loss, grad = kernels.distillation_loss(logits, bank, sizes[:-1], TAU)
    assert torch.equal(old_grad, grad)
    torch.testing.assert_close(old, loss, rtol=2e-7, atol=0)
    loss, filled, grad = kernels.warm_up_loss(logits, labels, sizes, TAU)
    assert torch.equal(new_grad, grad)
    torch.testing.assert_close(new, loss, rtol=2e-7, atol=0)
    assert torch.equal(filled, kernels.head_softmax(logits, sizes[:-1], TAU))


@pytest.mark.parametrize("scale", [1, 1e4], ids=["usual", "extreme"])
@pytest.mark.parametrize("spatial", [(), (7,)], ids=["flat", "dense"])
@dtypes
def test_gradient_is_exactly_zero_until_a_logit_moves(dtype, spatial, scale):
    sizes = [2, 40, 1, 5, 90]
    logits, labels, _ = make_inputs(sizes, spatial, dtype)
    logits = (scale * logits).clamp(-1e4, 1e4)
    _, bank, _ = kernels.warm_up_loss(logits, labels, sizes, TAU)
    grads = kernels.joint_loss(logits, labels, bank, sizes, TAU)[3]
    assert torch.equal(grads, torch.zeros_like(grads))
    loss, grads = kernels.distillation_loss(logits, bank, sizes[:-1], TAU)
    assert torch.equal(grads, torch.zeros_like(grads)) and loss.isfinite()
    logits[:, 0] += 0.5 * (1 + logits[:, 0].abs())
    grads = kernels.distillation_loss(logits, bank, sizes[:-1], TAU)[1]
    assert (grads[:, :2] != 0).any() and torch.equal(grads[:, 2:], torch.zeros_like(grads[:, 2:]))


@pytest.mark.parametrize("spatial", [(), (2,)], ids=["flat", "dense"])
@pytest.mark.parametrize("sizes", [[3, 5], [5, 5], [40, 33]], ids=["apart", "together", "warps"])
@pytest.mark.parametrize("label", [-1, 0, 2**40], ids=["below", "next", "huge"])
def test_a_label_that_is_no_class_makes_its_image_nan(label, sizes, spatial):
    old_columns, label = sizes[0], label or sizes[1]
    logits, labels, bank = make_inputs(sizes, spatial)
    good = kernels.joint_loss(logits, labels, bank, sizes, TAU)
    labels[1] = label
    for run in (kernels, reference):
        new, old, new_grad, old_grad = run.joint_loss(logits, labels, bank, sizes, TAU)
        assert new.isnan() and old.isfinite() and old_grad.isfinite().all()
        assert new_grad[1, old_columns:].isnan().all() and not new_grad[:, :old_columns].any()
        torch.testing.assert_close(new_grad[[0, 2]], good[2][[0, 2]])
        assert run.warm_up_loss(logits, labels, sizes, TAU)[0].isnan()


@pytest.mark.parametrize("sizes", [[3, 5], [3, 70], [5, 3], [40, 33]], ids=str)
@pytest.mark.parametrize("spatial", [(), (2,)], ids=["flat", "dense"])
def test_an_ignored_label_has_no_loss_and_no_gradient(spatial, sizes):
    logits, labels, bank = make_inputs(sizes, spatial)
    labels[1] = -100
    expected = reference.joint_loss(logits.double(), labels, bank.double(), sizes, TAU)
    logits[1, sizes[0] :] = torch.nan  # they do not matter
    new, old, new_grad, old_grad = kernels.joint_loss(logits, labels, bank, sizes, TAU)
    torch.testing.assert_close(new.double(), expected[0], rtol=2e-6, atol=0)
    torch.testing.assert_close(old.double(), expected[1], rtol=2e-6, atol=0)
    assert not new_grad[1].any()
    assert_near(new_grad, expected[2])
    assert_near(old_grad, expected[3])


@pytest.mark.parametrize("value", [0.0, -1.0, torch.nan, torch.inf])
def test_a_temperature_that_is_none_makes_everything_nan(value):
    logits, labels, bank = make_inputs([3, 5])
    tau = torch.full_like(TAU, value)
    for run in (kernels, reference):
        assert run.head_softmax(logits, [3], tau).isnan().all()
        loss, grad = run.distillation_loss(logits, bank, [3], tau)
        assert loss.isnan() and grad[:, :3].isnan().all() and not grad[:, 3:].any()


@pytest.mark.parametrize("tau", [1e-30, 0.05, 100.0, 1e30])
def test_extreme_temperatures(tau):
    logits, labels, bank = make_inputs([30, 5], scale=4e3)
    tau = torch.full_like(TAU, tau)
    filled = kernels.head_softmax(logits, [30], tau)
    expected = reference.head_softmax(logits.double(), [30], tau)
    torch.testing.assert_close(filled.double(), expected, rtol=2e-6, atol=2e-6)
    assert torch.equal(
        kernels.distillation_loss(logits, filled, [30], tau)[1], torch.zeros_like(logits)
    )


def test_nan_stays_in_its_head_and_image():
    logits, labels, bank = make_inputs([2, 3, 1, 2])
    logits[1, 3] = torch.nan
    where = torch.zeros_like(bank, dtype=torch.bool)
    where[1, 2:5] = True
    assert torch.equal(kernels.head_softmax(logits, [2, 3, 1], TAU).isnan(), where)


def test_a_zero_target_of_an_impossible_class_contributes_nothing():
    logits = torch.tensor([[0.0, -torch.inf]], device=DEVICE)
    bank = torch.tensor([[1.0, 0.0]], device=DEVICE)
    loss, grad = kernels.distillation_loss(logits, bank, [2], TAU)
    assert torch.equal(loss, torch.zeros_like(loss)) and torch.equal(grad, torch.zeros_like(grad))


LAYOUTS = {
    "transposed": lambda x: x.transpose(0, 3),
    "channels-last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "strided": lambda x: x[::2, :, ::2, 1:],
    "expanded": lambda x: x[:1].expand(6, -1, -1, -1),
    "offset": lambda x: x.flatten()[1 : 1 + 5 * x.shape[1]].view(5, x.shape[1]),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("classes", [3, 4, 20])
@dtypes
def test_any_layout_and_alignment(layout, classes, dtype):
    logits = layout(make_inputs([classes, classes], (4, 6), dtype, N=6)[0])
    before = logits.clone()
    labels = torch.zeros_like(logits[:, 0], dtype=torch.int64)
    bank = kernels.head_softmax(logits, [classes], TAU)
    assert torch.equal(bank, kernels.head_softmax(logits.clone().contiguous(), [classes], TAU))
    bank = torch.cat([bank.new_zeros(1), bank.flatten()])[1:].view_as(bank)
    results = kernels.joint_loss(logits, labels, bank, [classes] * 2, TAU)
    expected = kernels.joint_loss(
        logits.clone().contiguous(), labels, bank.clone(), [classes] * 2, TAU
    )
    assert all(map(torch.equal, results, expected)) and not results[3].any()
    assert torch.equal(logits, before)


def test_what_is_not_aligned_is_copied():
    numbers = torch.arange(41.0, device=DEVICE)
    assert kernels._whole(numbers[4:], True).data_ptr() == numbers[4:].data_ptr()
    assert kernels._whole(numbers[1:], False).data_ptr() == numbers[1:].data_ptr()
    copied = kernels._whole(numbers[1:], True)
    assert copied.data_ptr() % 16 == 0 and torch.equal(copied, numbers[1:])
    halves = numbers.half()  # of two bytes: four in eight
    assert kernels._whole(halves[4:], True).data_ptr() == halves[4:].data_ptr()
    assert kernels._whole(halves[2:], True).data_ptr() != halves[2:].data_ptr()


def test_columns_that_no_tile_row_holds_at_once_get_zero():
    logits, _, bank = make_inputs([3, 2100], N=2)
    loss, grad = kernels.distillation_loss(logits, bank, [3], TAU)
    alone, grad_alone = kernels.distillation_loss(logits[:, :3], bank, [3], TAU)
    assert torch.equal(loss, alone) and torch.equal(grad[:, :3], grad_alone)
    assert torch.equal(grad[:, 3:], torch.zeros_like(grad[:, 3:]))


@pytest.mark.parametrize(
    "shape, sizes",
    [((0, 5), [2, 3]), ((3, 5, 0), [2, 3]), ((0, 5, 2), [5])],
    ids=["no-images", "no-positions", "nothing"],
)
def test_empty(shape, sizes):
    logits = torch.ones(shape, device=DEVICE)
    labels = torch.zeros(shape[0], *shape[2:], dtype=torch.int64, device=DEVICE)
    loss, bank, grad = kernels.warm_up_loss(logits, labels, sizes, TAU)
    assert loss == 0 and bank.numel() == 0 and grad.shape == shape
    assert kernels.distillation_loss(logits, bank, sizes[:-1], TAU)[0] == 0
    new, old, *grads = kernels.joint_loss(logits, labels, bank, sizes, TAU)
    assert new == old == 0


def test_no_heads_and_no_columns_behind_them():
    logits = torch.ones(3, 2, device=DEVICE)
    assert kernels.head_softmax(logits, [], TAU).shape == (3, 0)
    loss, grad = kernels.distillation_loss(logits, logits[:, :0], [], TAU)
    assert loss == 0 and not grad.any()


@pytest.mark.parametrize("programs", [1, 2, 4])
@pytest.mark.parametrize(
    "sizes, spatial",
    [([2, 2, 2, 3], ()), ([3, 2, 2, 2], ()), ([40, 20, 33], ()), ([2, 2, 2, 3], (150,))],
    ids=["apart", "together", "warps", "dense"],
)
def test_programs_share_the_tiles(monkeypatch, programs, sizes, spatial):
    logits, labels, bank = make_inputs(sizes, spatial, N=3 if spatial else 700)
    many = kernels.joint_loss(logits, labels, bank, sizes, TAU)
    monkeypatch.setattr(kernels, "PROGRAMS", programs)
    few = kernels.joint_loss(logits, labels, bank, sizes, TAU)
    assert torch.equal(few[2], many[2]) and torch.equal(few[3], many[3])
    torch.testing.assert_close(few[:2], many[:2], rtol=1e-6, atol=0)


def test_results_stay_inside_their_buffers():
    """Guard bands around every buffer, the bank's included."""
    sizes = [2, 3, 4]
    logits, labels, bank = make_inputs(sizes, N=5)
    guarded = []

    def guard(tensor):
        guarded.append(torch.full((tensor.numel() + 128,), 77, device=DEVICE).to(tensor.dtype))
        inside = guarded[-1][64:-64].view(tensor.shape)
        inside.copy_(tensor)
        return inside

    out = guard(torch.zeros_like(bank))
    inputs = guard(logits), guard(labels), guard(bank)
    kernels._launch(inputs[0], sizes[:-1], TAU, labels=inputs[1], bank=out)
    assert torch.equal(out, kernels.head_softmax(logits, sizes[:-1], TAU))
    for buffer in guarded:
        assert (buffer[:64] == 77).all() and (buffer[-64:] == 77).all()
    for inside, original in zip(inputs, (logits, labels, bank), strict=True):
        assert torch.equal(inside, original)


@pytest.mark.parametrize("classes", [2, 40, 600])
@pytest.mark.parametrize("positions", [(), (3,)], ids=["flat", "dense"])
def test_confident_predictions_keep_their_digits(classes, positions):
    logits = torch.zeros(10, classes, *positions, device=DEVICE)
    logits[:, 0] = 17.0
    labels = torch.zeros(10, *positions, dtype=torch.int64, device=DEVICE)
    exact = reference.warm_up_loss(logits.double(), labels, [classes], TAU)[0]
    loss = kernels.warm_up_loss(logits, labels, [classes], TAU)[0]
    torch.testing.assert_close(loss.double(), exact, rtol=2e-6, atol=0)


@pytest.mark.skipif(not INTERPRETED, reason="a stand-in for a scalar on the host")
@pytest.mark.parametrize("width", [2, 40])
def test_a_temperature_by_value(width, monkeypatch):
    logits, labels, bank = make_inputs([width, 3])
    monkeypatch.setattr(kernels, "on_device", lambda temperature, device: False)
    expected = reference.joint_loss(logits.double(), labels, bank.double(), [width, 3], TAU)
    found = kernels.joint_loss(logits, labels, bank, [width, 3], TAU)
    torch.testing.assert_close(found[1].double(), expected[1], rtol=2e-6, atol=0)
    assert_near(found[3], expected[3])


@pytest.mark.parametrize("argument", ["head_sizes", "bank", "labels"])
def test_the_kernel_refuses_what_would_leave_its_buffers(argument):
    logits, labels, bank = make_inputs([3, 5])
    sizes = [9, 5] if argument == "head_sizes" else [3, 5]
    bank = bank[:, :2] if argument == "bank" else bank
    labels = labels[:2] if argument == "labels" else labels
    with pytest.raises(ValueError, match=f"^{argument}: expected"):
        kernels.joint_loss(logits, labels, bank, sizes, TAU)


def test_float64_runs_on_the_reference():
    logits, labels, bank = make_inputs([3, 5], dtype=torch.float64)
    results = kernels.joint_loss(logits, labels, bank.double(), [3, 5], TAU)
    expected = reference.joint_loss(logits, labels, bank.double(), [3, 5], TAU)
    assert all(map(torch.equal, results, expected))


def test_launches_side_by_side_have_tickets_of_their_own(monkeypatch):
    monkeypatch.setattr(device_data.Tickets, "SLOTS", 5)
    tickets = device_data.Tickets(DEVICE)
    streams = [tickets.take(stream, 1) for stream in ("a", "b", "a", "c")]
    assert all(ticket.shape == (1,) and ticket.item() == 0 for ticket in streams)
    addresses = [ticket.data_ptr() for ticket in streams]
    assert addresses[0] == addresses[2] and len(set(addresses)) == 3
    several = tickets.take("a", 2)  # of a launch that has two groups of programs
    assert several.shape == (2,) and several.data_ptr() not in addresses
    assert tickets.take("d", 1) is None and tickets.take("c", 1).data_ptr() == addresses[3]
    assert tickets.take("a", 2).data_ptr() == several.data_ptr()


# ---- many narrow heads of one width, by a kernel of their own ----


def both_kernels(monkeypatch, compute):
    """What the kernel for heads of one width computes, and what that for any heads does."""
    found = []
    for many in (1, 2**62):
        monkeypatch.setattr(flat, "MANY", many)
        found.append(compute())
    return found


@dtypes
@pytest.mark.parametrize("width", [1, 2, 3, 5, 6, 9, 12, 16])
@pytest.mark.parametrize("N", [1, 131], ids=["few", "several-tiles"])
def test_heads_of_one_width_have_the_same_bits(width, N, dtype, monkeypatch):
    sizes = [width] * 5
    logits, _, bank = make_inputs([*sizes, 1], dtype=dtype, N=N)
    logits = logits[:, :-1].contiguous()
    flat_bank, other_bank = both_kernels(
        monkeypatch, lambda: kernels.head_softmax(logits, sizes, TAU)
    )
    assert torch.equal(flat_bank, other_bank)
    expected = reference.distillation_loss(logits.double(), bank.double(), sizes, TAU)
    (loss, grad), (other_loss, other_grad) = both_kernels(
        monkeypatch, lambda: kernels.distillation_loss(logits, bank, sizes, TAU)
    )
    assert torch.equal(grad, other_grad)
    torch.testing.assert_close(loss, other_loss, rtol=4e-7, atol=0)
    torch.testing.assert_close(loss.double(), expected[0], rtol=2e-6, atol=0)
    assert_near(grad, expected[1])
    zeros = [g for _, g in both_kernels(
        monkeypatch, lambda: kernels.distillation_loss(logits, flat_bank, sizes, TAU)
    )]  # fmt: skip
    assert not any(g.any() for g in zeros)


def test_which_heads_are_flat(monkeypatch):
    monkeypatch.setattr(flat, "MANY", 4)
    logits = torch.zeros(2, 8, device=DEVICE)
    assert flat.is_flat(logits, [2] * 4) and flat.is_flat(logits, [4, 4])
    assert not flat.is_flat(logits, [2, 2, 4]) and not flat.is_flat(logits, [2] * 3)
    assert not flat.is_flat(logits[:1], [4, 4])  # too few
    assert not flat.is_flat(torch.zeros(17, device=DEVICE)[1:].view(2, 8), [4, 4])  # not aligned
    assert not flat.is_flat(torch.zeros(8, 2, device=DEVICE).T, [4, 4])
    assert not flat.is_flat(torch.zeros(9, 13, device=DEVICE), [13])  # 52 floats of a thread


def test_heads_of_one_width_with_a_temperature_that_is_none(monkeypatch):
    monkeypatch.setattr(flat, "MANY", 1)
    logits, tau = torch.randn(4, 8, device=DEVICE), torch.full_like(TAU, -1)
    assert kernels.head_softmax(logits, [2] * 4, tau).isnan().all()


def test_head_boundaries_are_kept_on_the_device():
    first = kernels.offsets((2, 3), DEVICE)
    assert first.tolist() == [0, 2, 5]
    assert kernels.offsets((2, 3), DEVICE) is first
    assert kernels.offsets((2, 3, 1), DEVICE).tolist() == [0, 2, 5, 6]


@pytest.mark.parametrize("size", [1, 2, 4, 5, 16, 20, 33, 100, 1000])
@pytest.mark.parametrize("labelled", [False, True], ids=["bank", "labels"])
def test_another_number_of_heads_runs_on_the_compiled_kernel(size, labelled):
    plans = [kernels.plan([size] * k, size * (k + labelled), labelled) for k in range(1, 9)]
    assert len({tuple(plan.constants().items()) for plan in plans}) == 1
    assert kernels.plan([4, 7], 15, True).constants() != kernels.plan([4, 8], 16, True).constants()


@pytest.mark.parametrize("size", [3, 4])
def test_positions_have_one_plan_whatever_the_heads(size):
    how = kernels.plan([size, size], 3 * size, labelled=True, S=9)
    assert (how.run, how.aligned, how.even) == (1, False, False)


@pytest.mark.parametrize("size", [1, 2, 3, 16, 17, 100, 512, 1000, 1025, 3000])
def test_who_has_a_head_depends_on_the_widest(size):
    block, each, lanes = kernels.tile_shape([1, size, 1])
    assert max(2, size) <= each * lanes < 2 * max(2, size)
    expected = {1: 1, 2: 1, 3: 1, 16: 1, 17: 8, 100: 32, 512: 32, 1000: 128, 1025: 128}
    expected |= {3000: 256}
    assert lanes == expected[size] and block * lanes % 128 == 0  # every thread has something
    block, each, lanes = kernels.tile_shape([1, size, 1], S=9)
    assert size <= each and lanes == 0 and block * each >= kernels.TILE


@pytest.mark.parametrize("new", [2, 16, 17, 64, 1025])
@pytest.mark.parametrize("widest", [2, 16, 17, 128, 1025])
@pytest.mark.parametrize("others", [[2, 1], [4, 12]], ids=str)
def test_the_new_head_does_not_change_the_bits_of_the_old_ones(widest, others, new):
    """It is read beside them, or by itself, as its size allows; four classes at a time, or not."""
    sizes = [widest, *others]
    logits, labels, bank = make_inputs([*sizes, new])
    _, filled, _ = kernels.warm_up_loss(logits, labels, [*sizes, new], TAU)
    assert torch.equal(filled, kernels.head_softmax(logits, sizes, TAU))
    alone = logits[:, : sum(sizes)].contiguous()
    assert torch.equal(filled, kernels.head_softmax(alone, sizes, TAU))
    for heads in (sizes, [*sizes, new]):
        loss = kernels.distillation_loss if heads is sizes else kernels.joint_loss
        arguments = (logits, filled) if heads is sizes else (logits, labels, filled)
        grad = loss(*arguments, heads, TAU)[-1]
        assert torch.equal(grad, torch.zeros_like(grad))
    how = kernels.plan(sizes, sum(sizes) + new, labelled=True)
    fits = {12: 12}.get(max(sizes), 1 << (max(sizes) - 1).bit_length())
    assert how.together == (how.old.lanes == how.new.lanes > 0 and new <= fits)
    assert how.aligned == (how.run == 4 and new % 4 == 0)
    assert how.run == (4 if all(size % 4 == 0 for size in sizes) else 1)
