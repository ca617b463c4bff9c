"""What only a GPU can show: no synchronisation, graph capture, streams, sizes beyond 2^31."""

import pytest
import torch
from conftest import EVERYTHING
from torch.library import opcheck

import bld_ext
from bld_ext import BLDOptimizer, SeededAugment, ops, reference

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
    pytest.mark.usefixtures("poison"),
]
SIZES = [5, 2, 7]
OLD = SIZES[:-1]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def make_inputs(N=1000, sizes=SIZES, dtype=torch.float32, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    shape = (2, N, sum(sizes))
    logits, others = 2 * torch.randn(shape, generator=generator, device="cuda").to(dtype)
    labels = torch.randint(sizes[-1], (N,), generator=generator, device="cuda")
    return logits.requires_grad_(), labels, ops.head_softmax(others, sizes[:-1])


def joint(logits, labels, bank, sizes=SIZES, temperature=2.0):
    """Losses and gradients, through autograd."""
    losses = ops.joint_loss(logits, labels, bank, sizes, temperature)
    grads = [torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in losses]
    return [*(loss.detach() for loss in losses), *grads]


@pytest.fixture
def no_sync():
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


def test_triton_runs():
    for op in ("head_softmax", "distillation_loss", "warm_up_loss", "joint_loss", "augment"):
        assert bld_ext.backend(op, "cuda") == "triton"


@dtypes
def test_gpu_and_cpu_agree(dtype):
    logits, labels, bank = make_inputs(dtype=dtype)
    found = joint(logits, labels, bank)
    cpu = [t.detach().cpu() for t in (logits, labels, bank)]
    expected = joint(cpu[0].requires_grad_(), *cpu[1:])
    rtol = max(2e-6, torch.finfo(dtype).eps)
    torch.testing.assert_close([t.cpu() for t in found], expected, rtol=rtol, atol=2e-6)


@dtypes
@pytest.mark.parametrize("requires_grad", [False, True], ids=["plain", "grad"])
def test_opcheck(dtype, requires_grad):
    logits, labels, bank = make_inputs(N=4, dtype=dtype)
    logits.requires_grad_(requires_grad)
    library, tau = torch.ops.bld_ext, torch.tensor(2.0, dtype=torch.float64)
    opcheck(library.head_softmax.default, (logits, OLD, tau))
    opcheck(library.distillation_loss.default, (logits, bank, OLD, tau))
    opcheck(library.warm_up_loss.default, (logits, labels, SIZES, tau.cuda()))
    opcheck(library.joint_loss.default, (logits, labels, bank, SIZES, tau.cuda()))


def test_gradcheck_in_float64():
    logits, labels, _ = make_inputs(N=3)
    z = logits.detach().double().requires_grad_()
    bank = ops.head_softmax(make_inputs(N=3, seed=1)[0].detach().double(), OLD)
    assert torch.autograd.gradcheck(lambda z: ops.joint_loss(z, labels, bank, SIZES), z)


def test_compiles_into_one_graph():
    logits, labels, bank = make_inputs()
    compiled = torch.compile(ops.joint_loss, fullgraph=True)(logits, labels, bank, SIZES)
    eager = ops.joint_loss(logits, labels, bank, SIZES)
    assert all(map(torch.equal, compiled, eager))


def test_same_bits_in_any_run():
    for N, sizes in ((1000, SIZES), (400_000, [5] * 20)):
        inputs = make_inputs(N, sizes)
        first = joint(*inputs, sizes)
        for _ in range(10):
            assert all(map(torch.equal, joint(*inputs, sizes), first))


def test_streams_side_by_side():
    inputs = [make_inputs(200_000, seed=seed) for seed in range(4)]
    expected = [joint(*one) for one in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    torch.cuda.synchronize()
    for _ in range(20):
        found = []
        for one, stream in zip(inputs, streams, strict=True):
            with torch.cuda.stream(stream):
                found.append(joint(*one))
        torch.cuda.synchronize()
        for results, right in zip(found, expected, strict=True):
            assert all(map(torch.equal, results, right))


def test_no_synchronisation_not_even_for_a_new_head(no_sync):
    inputs = make_inputs()
    wider = make_inputs(sizes=[*SIZES, 7])
    joint(*inputs)
    torch.cuda.synchronize()
    no_sync()
    joint(*inputs)
    joint(*wider, [*SIZES, 7])
    joint(*wider, [*SIZES, 7], temperature=torch.full((), 3.0, device="cuda"))
    ops.warm_up_loss(wider[0], wider[1], [*SIZES, 7])[0].backward()


def test_no_synchronisation_in_a_step(no_sync, make_model, make_batch):
    torch.use_deterministic_algorithms(False)  # adaptive pooling has no deterministic backward
    model = make_model((2, 3)).cuda()
    augment = SeededAugment(crop_padding=1, rotation=10, jitter=0.1)
    optimizer = BLDOptimizer(model, 1e-3, views=3, augment=augment)
    images, labels = (t.cuda() for t in make_batch(3))
    optimizer.step(images, labels)
    torch.cuda.synchronize()
    no_sync()
    loss = optimizer.step(images, labels)
    torch.cuda.set_sync_debug_mode("default")
    assert loss.isfinite()


def test_another_head_count_compiles_nothing():
    import triton

    compiled = []
    inputs = make_inputs()
    joint(*inputs)
    before = triton.knobs.runtime.jit_post_compile_hook
    try:
        triton.knobs.runtime.jit_post_compile_hook = lambda **event: compiled.append(event)
        for N, sizes in ((1000, [5, 2, 7, 7]), (1, [6, 1, 8]), (16, [8] * 16), (999, [7, 5])):
            joint(*make_inputs(N, sizes), sizes, temperature=0.5)
    finally:
        triton.knobs.runtime.jit_post_compile_hook = before
    assert compiled == []


def test_capture_and_replay_with_another_temperature():
    inputs, others = make_inputs(), make_inputs(seed=1)
    tau = torch.full((), 2.0, dtype=torch.float64, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        joint(*inputs, temperature=tau)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = joint(*inputs, temperature=tau)
    for value in (2.0, 0.7):
        tau.fill_(value)
        for static, fresh in zip(inputs, others, strict=True):
            with torch.no_grad():
                static.copy_(fresh)
        for _ in range(3):
            graph.replay()
            expected = joint(*others, temperature=value)
            torch.cuda.synchronize()
            assert all(map(torch.equal, outputs, expected))


def test_capture_with_unknown_heads_says_so():
    logits, labels, bank = make_inputs(sizes=[3, 1, 4, 1, 5])
    ops.joint_loss(*make_inputs(), SIZES)
    torch.cuda.synchronize()
    with pytest.raises(RuntimeError, match="head_sizes: expected what the device knows"):
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            ops.distillation_loss(logits, bank, [3, 1, 4, 1])
    torch.cuda.synchronize()


@pytest.mark.parametrize("label", [-1, 7])
def test_bad_label_is_nan_or_an_error_on_demand(label):
    logits, labels, bank = make_inputs()
    labels[3] = label
    assert ops.joint_loss(logits, labels, bank, SIZES)[0].isnan()
    with pytest.raises(ValueError, match="^labels: expected class indices of the newest head"):
        ops.joint_loss(logits, labels, bank, SIZES, check_inputs=True)
    with pytest.raises(ValueError, match="^labels: expected class indices of the newest head"):
        ops.warm_up_loss(logits, labels, SIZES, check_inputs=True)


def test_an_ignored_label_has_no_loss_and_no_gradient():
    logits, labels, bank = make_inputs()
    labels[3] = -100
    expected = ops.joint_loss(*(x.cpu().detach() for x in (logits, labels, bank)), SIZES)
    new, old = ops.joint_loss(logits, labels, bank, SIZES, check_inputs=True)
    torch.testing.assert_close(torch.stack((new, old)).cpu(), torch.stack(expected))


def test_bad_temperature_is_nan_or_an_error_on_demand():
    logits, labels, bank = make_inputs()
    tau = torch.full((), -1.0, device="cuda")
    assert ops.distillation_loss(logits, bank, OLD, tau).isnan()
    with pytest.raises(
        ValueError, match="^temperature: expected a positive finite number, at least 1e-38"
    ):
        ops.distillation_loss(logits, bank, OLD, tau, check_inputs=True)


def test_more_than_2_to_the_31_logits():
    N, sizes = 2**31 // 100 + 1000, [50, 50]
    if torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("needs 20 GiB of GPU memory")
    torch.use_deterministic_algorithms(False)  # filling the memory is not what is tested
    logits = torch.zeros(N, 100, dtype=torch.bfloat16, device="cuda")
    logits[-1] = torch.linspace(-3, 3, 100)
    bank = ops.head_softmax(logits, sizes)
    expected = reference.head_softmax(logits[-1:].double(), sizes, 2.0)
    torch.testing.assert_close(bank[-1:].double(), expected, rtol=2e-6, atol=0)
    assert (bank[-2] == bank[0]).all()
    loss, grad = torch.ops.bld_ext.distillation_loss(
        logits, bank, sizes, torch.tensor(2.0, dtype=torch.float64)
    )
    assert loss.isfinite() and not grad[-5:].any() and not grad[:5].any()


# ---- seeded augmentation ----


def make_images(N=20, size=32, dtype=torch.uint8):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (N, 3, size, size), generator=generator, dtype=torch.uint8)
    return images if dtype == torch.uint8 else (images / 255).to(dtype)


@pytest.mark.parametrize("size", [32, 224])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64], ids=str)
def test_views_on_gpu_and_cpu_agree(settings, dtype, size):
    augment, images = SeededAugment(**settings), make_images(4, size, dtype)
    coordinates = dict(seed=2**40 + 3, step=7, views=[0, 1, 9])
    found = augment(images.cuda(), **coordinates).cpu()
    torch.testing.assert_close(found, augment(images, **coordinates), rtol=0, atol=1e-5)
    indices = torch.arange(4)
    drawn = [
        augment.parameters(**coordinates, indices=i, size=(size, size))
        for i in (indices, indices.cuda())
    ]
    assert all(torch.equal(cpu, gpu.cpu()) for cpu, gpu in zip(*drawn, strict=True))


def test_views_have_the_same_bits_in_any_split():
    augment, images = SeededAugment(**EVERYTHING), make_images().cuda()
    views = augment(images, seed=1, step=2, views=range(50)).unflatten(0, (50, 20))
    for v, rows in ((49, [3]), (7, [19, 0]), (0, list(range(5, 17)))):
        index = torch.tensor(rows, device="cuda")
        part = augment(images[index], seed=1, step=2, views=[v], indices=index)
        assert torch.equal(part, views[v, index])


def test_opcheck_of_views():
    policy, images = SeededAugment(**EVERYTHING).policy.pack(), make_images(3).cuda()
    seed, step = torch.tensor(1, device="cuda"), torch.tensor(2)
    arguments = (images, policy, seed, step, [0, 3], torch.arange(3, device="cuda"))
    opcheck(torch.ops.bld_ext.augment.default, (*arguments, torch.bfloat16, True))


def test_views_are_one_launch_without_synchronisation(no_sync):
    torch.use_deterministic_algorithms(False)  # which fill what is empty, by a launch more
    augment, images = SeededAugment(**EVERYTHING), make_images().cuda()
    seed = torch.tensor(5, device="cuda")
    calls = [
        lambda: augment(images, seed=5, step=7, views=range(50)),
        lambda: augment(images, seed=seed, step=7, views=range(50)),
    ]
    assert torch.equal(*(call() for call in calls))
    torch.cuda.synchronize()
    no_sync()
    for call in calls:
        call()
    torch.cuda.set_sync_debug_mode("default")
    for call in calls:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            call()
            torch.cuda.synchronize()
        assert sum(event.device_type.name == "CUDA" for event in profile.events()) == 1


def test_a_captured_step_changes_its_seed():
    augment, images = SeededAugment(**EVERYTHING), make_images().cuda()
    seed, step = (torch.zeros((), dtype=torch.int64, device="cuda") for _ in range(2))
    augment(images, seed=seed, step=step, views=range(4))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        views = augment(images, seed=seed, step=step, views=range(4))
    for k in (3, 2**40):
        seed.fill_(k)
        step.fill_(7)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(views, augment(images, seed=k, step=7, views=range(4)))


def test_capture_with_an_unknown_policy_says_so():
    augment, images = SeededAugment(rotation=12.345), make_images().cuda()
    SeededAugment(rotation=1)(images, seed=0, step=0, views=[0])
    torch.cuda.synchronize()
    with pytest.raises(RuntimeError, match="policy: expected what the device knows"):
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            augment(images, seed=0, step=0, views=[0])
