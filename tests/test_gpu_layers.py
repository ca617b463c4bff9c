"""The layer ops on a GPU: parity with the CPU, capture, streams, synchronisation, large sizes."""

import pytest
import torch
from arrange import arranged
from torch.library import opcheck

from bld_ext import SeededAugment, backend, ops
from tests.test_layers import (
    LAYERS,
    REFERENCE,
    L,
    clones,
    columns,
    dtypes,
    eps,
    make_tensors,
    shifted,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
f64 = torch.float64


def on_gpu(tensors):
    return [tensor.cuda() for tensor in tensors]


def make_lists(dtypes=None):
    """θ, G_d and G_t on the CPU."""
    options = {} if dtypes is None else {"dtypes": dtypes}
    return [make_tensors(seed=seed, **options) for seed in range(3)]


def run_all(lists, balance=2.0, lr=0.1):
    """Every result of the three ops; the lists are left alone."""
    params, old, new = map(clones, lists)
    reference_norms = REFERENCE.to(params[0].device)
    norms = ops.layer_norms(old, LAYERS, L)
    updated = ops.balanced_sgd_(params, old, new, LAYERS, reference_norms, balance, lr)
    balanced = ops.balance_layers_(old, LAYERS, reference_norms, balance)
    return [norms, *updated, *balanced, *params, *old]


@pytest.fixture
def no_sync():
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


def test_cuda_runs():
    for op in ("layer_norms", "balance_layers_", "balanced_sgd_"):
        assert backend(op, "cuda") == "compiled"


@dtypes
def test_gpu_and_cpu_agree(dtypes):
    lists = make_lists(dtypes)
    found, expected = run_all(map(on_gpu, lists)), run_all(lists)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=4 * eps(other), atol=4 * eps(other))


@dtypes
def test_same_bits_in_any_run(dtypes):
    lists = [on_gpu(tensors) for tensors in make_lists(dtypes)]
    expected = run_all(lists)
    for _ in range(20):
        assert all(map(torch.equal, run_all(lists), expected))


@pytest.mark.parametrize("count, largest", [(1, 20_000_000), (300, 40_000)])
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, f64, torch.bfloat16, torch.float16], ids=str)
def test_one_launch_has_the_bits_of_two(dtype, offset, count, largest, monkeypatch):
    """More chunks than a block keeps, and layers that many blocks share; in a graph too."""
    generator = torch.Generator("cuda").manual_seed(0)
    made = [
        torch.randn(offset + largest - i, generator=generator, device="cuda").to(dtype)[offset:]
        for i in range(count)
    ]
    layers, norms = [i // 3 for i in range(count)], torch.ones(count // 3 + 1, device="cuda")
    grads = [t.clone() if offset == 0 else t for t in made]
    saved = [t.clone() for t in grads]
    monkeypatch.delenv("BLD_EXT_ONE_LAUNCH", raising=False)
    expected = ops.balance_layers_(grads, layers, norms)
    balanced = [t.clone() for t in grads]
    monkeypatch.setenv("BLD_EXT_ONE_LAUNCH", "1")
    torch._foreach_copy_(grads, saved)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        ops.balance_layers_(grads, layers, norms)
        torch.cuda.synchronize()
    assert sum("balance_kernel" in event.name for event in profile.events()) == 1
    for _ in range(20):
        torch._foreach_copy_(grads, saved)
        found = ops.balance_layers_(grads, layers, norms)
        assert all(map(torch.equal, (*found, *grads), (*expected, *balanced)))
    graph = torch.cuda.CUDAGraph()
    torch._foreach_copy_(grads, saved)
    with torch.cuda.graph(graph):
        found = ops.balance_layers_(grads, layers, norms)
    for _ in range(3):
        torch._foreach_copy_(grads, saved)
        graph.replay()
        assert all(map(torch.equal, (*found, *grads), (*expected, *balanced)))


@pytest.mark.parametrize("view", [columns, shifted])
def test_views(view):
    lists = [on_gpu(tensors) for tensors in make_lists()]
    plain = [[t.reshape(-1, 1) for t in tensors] for tensors in lists]
    viewed = [[view(t) for t in tensors] for tensors in plain]
    reference_norms = REFERENCE.cuda()
    for params, old, new in (plain, viewed):
        ops.balanced_sgd_(params, old, new, LAYERS, reference_norms)
        ops.balance_layers_(old, LAYERS, reference_norms)
    for tensors, others in zip(plain, viewed, strict=True):
        assert all(map(torch.equal, tensors, others))


@pytest.mark.parametrize("count", [1, 2, 60, 2000])
def test_lists_of_any_length(count):
    generator = torch.Generator().manual_seed(0)
    grads = [torch.randn(i % 37, generator=generator) for i in range(count)]
    layers, gpu = [(7 * i) % (count // 2 + 1) for i in range(count)], on_gpu(grads)
    norms = torch.rand(count // 2 + 1, generator=generator)
    expected, found = (
        ops.balance_layers_(g, layers, n) for g, n in ((grads, norms), (gpu, norms.cuda()))
    )
    for one, other in zip([*found, *gpu], [*expected, *grads], strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=1e-6, atol=0)


@pytest.mark.parametrize("size", [1, 3, 255, 1024, 8191, 8192, 8193, 20_000])
@pytest.mark.parametrize("dtype", [torch.float32, f64, torch.bfloat16, torch.float16], ids=str)
def test_nothing_outside_a_tensor_is_touched(size, dtype):
    lists = []
    for _ in range(3):
        whole = torch.randn(size + 64, device="cuda").to(dtype)
        whole[:33] = whole[33 + size :] = torch.nan
        lists.append(whole)
    (p,), (d,), (n,) = ([whole[33 : 33 + size]] for whole in lists)
    ops.balanced_sgd_([p], [d], [n], [0], torch.ones(1, device="cuda"))
    ops.balance_layers_([d], [0], torch.ones(1, device="cuda"))
    for whole in lists:
        assert whole[:33].isnan().all() and whole[33 + size :].isnan().all()
        assert not whole[33 : 33 + size].isnan().any()


def test_opcheck():
    params, old, new = (on_gpu(tensors) for tensors in make_lists())
    library, one = torch.ops.bld_ext, torch.tensor(1.0, dtype=f64)
    norms = REFERENCE.cuda()
    opcheck(library.layer_norms.default, (params, LAYERS, L))
    opcheck(library.balance_layers_.default, (old, LAYERS, norms, one))
    opcheck(library.balanced_sgd_.default, (params, old, new, LAYERS, norms, one.cuda(), one))


def test_no_synchronisation(no_sync):
    lists = [on_gpu(tensors) for tensors in make_lists()]
    scalars = [torch.tensor(value, dtype=f64, device="cuda") for value in (2.0, 0.1)]
    reference_norms = REFERENCE.cuda()
    torch.cuda.synchronize()
    no_sync()
    for balance, lr in ((2.0, 0.1), scalars):
        ops.layer_norms(lists[1], LAYERS, L)
        ops.balanced_sgd_(*lists, LAYERS, reference_norms, balance, lr)
        ops.balance_layers_(lists[1], LAYERS, reference_norms, balance)


def test_two_launches():
    grads, norms = on_gpu(make_tensors()), REFERENCE.cuda()
    ops.balance_layers_(grads, LAYERS, norms)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        ops.balance_layers_(grads, LAYERS, norms)
        torch.cuda.synchronize()
    assert sum(event.device_type.name == "CUDA" for event in profile.events()) == 2


@pytest.mark.parametrize("value", [-1.0, torch.nan, torch.inf])
def test_a_bad_balance_on_the_device_makes_nan(value):
    grads = on_gpu(make_tensors())
    balance = torch.tensor(value, dtype=f64, device="cuda")
    factors, _ = ops.balance_layers_(grads, LAYERS, REFERENCE.cuda(), balance)
    assert factors.isnan().all() and all(grad.isnan().all() for grad in grads)


def test_capture_and_replay_with_scalars_that_change():
    """lr and λ come from a scheduler; gradients change in place; other lists run in between."""
    lists = [on_gpu(tensors) for tensors in make_lists()]
    eager = [clones(tensors) for tensors in lists]
    balance, lr = (torch.tensor(value, dtype=f64, device="cuda") for value in (2.0, 0.1))
    reference_norms = REFERENCE.cuda()

    def step(params, old, new):
        factors, _ = ops.balanced_sgd_(params, old, new, LAYERS, reference_norms, balance, lr)
        ops.balance_layers_(new, LAYERS, reference_norms, balance)
        return factors

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(*map(clones, lists))
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        factors = step(*lists)
    for i in range(100):
        balance.fill_(1 + i % 3)
        lr.fill_(0.1 / (1 + i))
        graph.replay()
        expected = step(*eager)
        assert torch.equal(factors, expected)
        if i % 10 == 0:  # tables that would push the graph's out, if it could be pushed
            for seed in range(20):
                ops.layer_norms(on_gpu(make_tensors(seed=seed)), LAYERS, L)
    for tensors, others in zip(lists, eager, strict=True):
        assert all(map(torch.equal, tensors, others))


def test_streams_side_by_side():
    grads = [torch.randn(3_000_000, device="cuda") for _ in range(4)]
    layers = [0, 1, 1, 2]
    expected = ops.layer_norms(grads, layers)
    streams = [torch.cuda.Stream() for _ in range(4)]
    torch.cuda.synchronize()
    for _ in range(30):
        found = []
        for stream in streams:
            with torch.cuda.stream(stream):
                found.append(ops.layer_norms(grads, layers))
        torch.cuda.synchronize()
        assert all(torch.equal(norms, expected) for norms in found)


def test_new_addresses_every_time():
    for seed in range(100):
        cpu = make_tensors(seed=seed)
        pad = torch.empty(seed + 1, 1000, device="cuda")
        found = ops.layer_norms(on_gpu(cpu), LAYERS, L).cpu()
        torch.testing.assert_close(found, ops.layer_norms(cpu, LAYERS, L), rtol=3e-7, atol=0)
        del pad


@pytest.mark.parametrize("argument", ["distill_grads", "reference_norms", "balance"])
def test_mixed_devices(argument):
    params, old, new = (on_gpu(tensors) for tensors in make_lists())
    before = clones(params)
    arguments = {"distill_grads": old, "reference_norms": REFERENCE.cuda(), "balance": 2.0}
    wrong = {"distill_grads": [*old[:3], old[3].cpu(), *old[4:]], "reference_norms": REFERENCE}
    wrong["balance"] = torch.tensor(2.0, device="meta")
    arguments[argument] = wrong[argument]
    with pytest.raises(ValueError, match=rf"^({argument}|params)(\[\d\])?: expected .*, got "):
        ops.balanced_sgd_(params, new_grads=new, layers=LAYERS, **arguments)
    assert all(map(torch.equal, params, before))


def test_a_tensor_beyond_int32():
    size = 2**31 + 5
    if torch.cuda.mem_get_info()[0] < 3 * 2 * size:
        pytest.skip("needs 13 GB")
    grad = torch.ones(size, dtype=torch.float16, device="cuda")
    grad[-1] = 2
    norms = ops.layer_norms([grad], [0])
    torch.testing.assert_close(norms.item(), (size + 3) ** 0.5, rtol=2e-7, atol=0)
    ops.balance_layers_([grad], [0], norms, 2.0)
    assert grad[[0, 2**31 - 1, 2**31, -1]].tolist() == [2, 2, 2, 4]


def test_in_backward_gives_the_same_bits(make_model, make_batch):
    states = []
    augment = SeededAugment(crop_padding=1, rotation=15)
    torch.use_deterministic_algorithms(True)
    try:
        for options in ({}, {"schedule": "in_backward"}):
            model = make_model((2, 3)).cuda()
            optimizer = arranged(model, 0.05, views=4, augment=augment, seed=3, **options)
            for number in range(3):
                optimizer.step(*(t.cuda() for t in make_batch(3, number)))
            states.append(model.state_dict())
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
