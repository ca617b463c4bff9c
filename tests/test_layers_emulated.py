"""The CUDA sources of the layer ops, host code and kernels, on an emulated GPU (tests/emulator).

It shows indices, barriers, orders of summation and the life of the table, on CPU tensors. What it
cannot show, a GPU has to: memory ordering, streams, speed.
"""

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

from bld_ext import reference
from bld_ext.registry import SCHEMAS
from tests.test_layers import LAYERS, REFERENCE, L, clones, dtypes, eps, make_tensors

ROOT = Path(__file__).parents[1]
LAMBDA, LR = (torch.tensor(value, dtype=torch.float64) for value in (2.0, 0.1))


class State(ctypes.Structure):
    _fields_ = [
        ("stream", ctypes.c_void_p),
        ("capture", ctypes.c_ulonglong),
        ("seed", ctypes.c_uint),
        *((name, ctypes.c_int64) for name in ("launches", "allocations", "copies")),
    ]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """csrc/cuda/layers.cu compiled for the emulator."""
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    kernels = (ROOT / "csrc/cuda/layers.cuh").read_text().replace("#pragma once", "")
    text = (ROOT / "csrc/cuda/layers.cu").read_text()
    text = text.replace('#include "layers.cuh"', kernels)
    text = re.sub(
        r"extern __shared__ \S+ char (\w+)\[\];", r"char *\1 = emulator::dynamic_shared();", text
    )
    text = re.sub(r"(\w+)<<<(\w+), (\w+), 0, stream>>>\(", r"emulator::launch(\1, \2, \3, ", text)
    text = text.replace("(bld_ext, CUDA, m)", "(bld_ext_emulated, CPU, m)")
    text = text.replace('#include "../', f'#include "{ROOT}/csrc/')
    text += """
    #define SHOWN extern "C" __attribute__((visibility("default")))
    SHOWN emulator::State *state() { return &emulator::state; }
    SHOWN void set_chunk_size(int64_t size) { bld_ext::chunk_size = size; }
    SHOWN void at_grid_sync(float *zeroed, int64_t size) {
      emulator::between = [=] { std::fill(zeroed, zeroed + size, 0.f); };
    }
    """
    source = tmp_path_factory.mktemp("emulated") / "layers.cpp"
    source.write_text(text)
    target = source.with_suffix(".so")
    folders = [ROOT / "tests/emulator", *cpp_extension.include_paths()]
    flags = ["-std=c++20", "-O1", "-fPIC", "-shared", "-fvisibility=hidden", "-ffp-contract=off"]
    flags += ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-w"]
    command = [compiler, *flags, *(f"-I{folder}" for folder in folders), source, "-o", target]
    command += [*(f"-L{folder}" for folder in cpp_extension.library_paths()), "-ltorch_cpu"]
    subprocess.run(command, check=True)
    for op in ("layer_norms", "balance_layers_", "balanced_sgd_"):
        torch.library.define(f"bld_ext_emulated::{op}", SCHEMAS[op])
    loaded = ctypes.CDLL(str(target))
    loaded.state.restype = ctypes.POINTER(State)
    loaded.set_chunk_size.argtypes = [ctypes.c_int64]
    loaded.at_grid_sync.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    return loaded


@pytest.fixture
def gpu(library):
    """The emulated GPU's state; a chunk has 1,000 elements, so that layers have several."""
    library.set_chunk_size(1000)
    state = library.state().contents
    before = (state.stream, state.capture)
    yield state
    state.stream, state.capture = before


ops = torch.ops.bld_ext_emulated


@dtypes
def test_parity(gpu, dtypes):
    params, old, new = (make_tensors(dtypes, seed=seed) for seed in range(3))
    exact = [[t.double() for t in tensors] for tensors in (params, old, new)]
    norms = ops.layer_norms(old, LAYERS, L)
    factors, same_norms = ops.balanced_sgd_(params, old, new, LAYERS, REFERENCE, LAMBDA, LR)
    balanced = clones(old)
    same_factors, _ = ops.balance_layers_(balanced, LAYERS, REFERENCE, LAMBDA)
    assert torch.equal(norms, same_norms) and torch.equal(factors, same_factors)

    exact_factors, exact_norms = reference.balanced_sgd_(
        *exact, LAYERS, REFERENCE.double(), LAMBDA, LR
    )
    torch.testing.assert_close(norms.double(), exact_norms, rtol=2 * eps(norms), atol=0)
    torch.testing.assert_close(factors.double(), exact_factors, rtol=4 * eps(factors), atol=0)
    for param, d, n, expected in zip(params, old, new, exact[0], strict=True):
        size = expected.abs() + 0.1 * (50 * d.double().abs() + n.double().abs())
        assert ((param.double() - expected).abs() <= 4 * (eps(param) + eps(norms)) * size).all()
    for grad, d, l in zip(balanced, old, LAYERS, strict=True):
        assert torch.equal(grad, (d * factors[l]).to(grad.dtype))


@dtypes
def test_same_bits_in_any_order_of_threads_and_blocks(gpu, dtypes):
    params, old, new = (make_tensors(dtypes, seed=seed) for seed in range(3))
    runs = []
    for seed in (0, 1000, 2000):
        gpu.seed = seed
        changed = clones(params)
        found = ops.balanced_sgd_(changed, old, new, LAYERS, REFERENCE, LAMBDA, LR)
        runs.append([*changed, *found])
    assert all(all(map(torch.equal, run, runs[0])) for run in runs[1:])


@pytest.mark.parametrize("offset", range(4))
@pytest.mark.parametrize("size", [1, 3, 4, 5, 1023, 1024, 1025, 4095, 4096, 4097, 9999])
def test_nothing_outside_a_tensor_is_touched(gpu, library, size, offset):
    library.set_chunk_size(8192)
    lists = []
    for _ in range(3):
        whole = torch.full((size + 64,), torch.nan)
        whole[32 + offset : 32 + offset + size].normal_()
        lists.append(whole)
    (p,), (d,), (n,) = ([whole[32 + offset : 32 + offset + size]] for whole in lists)
    expected = p.double(), d.double(), n.double()
    factors, _ = ops.balanced_sgd_([p], [d], [n], [0], torch.ones(1), LAMBDA, LR)
    value = expected[0] - 0.1 * (factors[0].double() * expected[1] + expected[2])
    torch.testing.assert_close(p.double(), value, rtol=1e-6, atol=1e-6)
    ops.balance_layers_([d], [0], torch.ones(1), LAMBDA)
    torch.testing.assert_close(d.double(), factors[0] * expected[1], rtol=1e-6, atol=0)
    for whole in lists:
        assert whole[: 32 + offset].isnan().all() and whole[32 + offset + size :].isnan().all()


def test_two_launches_and_one_upload(gpu):
    grads = make_tensors()
    ops.balance_layers_(grads, LAYERS, REFERENCE, LAMBDA)
    launches, allocations, copies = gpu.launches, gpu.allocations, gpu.copies
    for _ in range(3):
        ops.balance_layers_(grads, LAYERS, REFERENCE, LAMBDA)
    assert gpu.launches == launches + 6
    assert (gpu.allocations, gpu.copies) == (allocations, copies)
    ops.balance_layers_(grads[:3], LAYERS[:3], REFERENCE, LAMBDA)
    assert gpu.copies == copies + 1


def test_tables_are_reused_oldest_first(gpu):
    gpu.stream = 4096  # of its own, with no tables yet
    lists = [make_tensors(seed=seed) for seed in range(20)]
    expected = [reference.layer_norms(grads, LAYERS, L) for grads in lists]
    allocations, copies = gpu.allocations, gpu.copies

    def norms_are_right(which):
        for i in which:
            found = ops.layer_norms(lists[i], LAYERS, L)
            torch.testing.assert_close(found, expected[i], rtol=2e-7, atol=0)

    norms_are_right(range(16))
    norms_are_right(range(16))
    assert (gpu.allocations, gpu.copies) == (allocations + 16, copies + 16)
    norms_are_right([0, 16, 17, 18, 19, 0])  # in the memory of 1 to 4
    assert (gpu.allocations, gpu.copies) == (allocations + 16, copies + 20)
    norms_are_right([5])
    assert gpu.copies == copies + 20
    norms_are_right([1])
    assert gpu.copies == copies + 21


def test_a_table_grows_with_its_tensors(gpu):
    gpu.stream = 8192
    for count in (1, 7):
        for i in range(17):
            grads = [torch.full((i + 1,), 3.0) for _ in range(count)]
            norms = ops.layer_norms(grads, [0] * count, 1)
            torch.testing.assert_close(norms.item(), 3 * (count * (i + 1)) ** 0.5)


def test_a_graph_keeps_tables_of_its_own(gpu):
    grads = make_tensors()
    ops.layer_norms(grads, LAYERS, L)
    copies = gpu.copies
    for capture in (7, 8):
        gpu.capture = capture
        for _ in range(2):
            ops.layer_norms(grads, LAYERS, L)
    assert gpu.copies == copies + 2
    gpu.capture = 0
    ops.layer_norms(grads, LAYERS, L)
    assert gpu.copies == copies + 2


def test_an_error_leaves_no_table_behind(gpu):
    gpu.stream = 12288
    whole = torch.ones(10)
    for _ in range(20):
        with pytest.raises(RuntimeError, match="expected memory of its own"):
            ops.balance_layers_([whole[:6], whole[5:]], [0, 1], torch.ones(2), LAMBDA)
    assert torch.equal(whole, torch.ones(10))
    ops.balance_layers_([whole[:5], whole[5:]], [0, 1], torch.ones(2), LAMBDA)
    assert not torch.equal(whole, torch.ones(10))


def test_bad_scalars(gpu):
    params, old, new = ([torch.ones(3)] for _ in range(3))
    for balance, lr in ((-LAMBDA, LR), (LAMBDA, -LR), (LAMBDA.float(), LR)):
        with pytest.raises(RuntimeError, match="balance|lr"):
            ops.balanced_sgd_(params, old, new, [0], torch.ones(1), balance, lr)
    assert torch.equal(params[0], torch.ones(3))


# ---- norm and rescaling in one cooperative launch, of at most six blocks here ----


@dtypes
@pytest.mark.parametrize("chunk", [100, 1000, 20_000])
def test_one_launch_has_the_bits_of_two(gpu, library, monkeypatch, dtypes, chunk):
    """On one table, by turns: what a launch leaves behind must not disturb the next.

    With small chunks a block has more of them than it keeps.
    """
    library.set_chunk_size(chunk)
    grads = make_tensors(dtypes, seed=1)
    changed, results = clones(grads), []
    for turn, one in enumerate([False, True, True, False, True]):
        monkeypatch.setenv("BLD_EXT_ONE_LAUNCH", str(int(one)))
        torch._foreach_copy_(changed, grads)
        gpu.seed, launches = 1000 * turn, gpu.launches
        found = ops.balance_layers_(changed, LAYERS, REFERENCE, LAMBDA)
        assert gpu.launches == launches + (1 if one else 2)
        results.append([*found, *clones(changed)])
    assert all(all(map(torch.equal, result, results[0])) for result in results[1:])


def test_one_launch_reads_once_what_it_keeps(gpu, library, monkeypatch):
    """A gradient that changes between norm and rescaling shows where the second reading is from."""
    library.set_chunk_size(8192)
    monkeypatch.setenv("BLD_EXT_ONE_LAUNCH", "1")
    grad = torch.ones(20 * 8192)  # 20 chunks, of which six blocks keep two each
    library.at_grid_sync(grad.data_ptr(), len(grad))
    try:
        (factor,), _ = ops.balance_layers_([grad], [0], torch.ones(1), LAMBDA)
    finally:
        library.at_grid_sync(None, 0)
    kept = (grad != 0).view(20, 8192)
    assert torch.equal(kept.all(1), kept.any(1))
    assert kept.all(1).tolist() == [True] * 12 + [False] * 8
    torch.testing.assert_close(grad[:8192], factor.expand(8192))


@pytest.mark.parametrize("offset", range(4))
@pytest.mark.parametrize("size", [1, 5, 4097, 60_001])
def test_one_launch_touches_nothing_outside_a_tensor(gpu, library, monkeypatch, size, offset):
    library.set_chunk_size(4096)
    monkeypatch.setenv("BLD_EXT_ONE_LAUNCH", "1")
    whole = torch.full((size + 64,), torch.nan)
    inside = whole[32 + offset : 32 + offset + size].normal_()
    before = inside.double()
    factors, _ = ops.balance_layers_([inside], [0], torch.ones(1), LAMBDA)
    torch.testing.assert_close(inside.double(), factors[0] * before, rtol=1e-6, atol=0)
    assert whole[: 32 + offset].isnan().all() and whole[32 + offset + size :].isnan().all()
