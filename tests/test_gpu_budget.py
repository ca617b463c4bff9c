"""What the GPU kernels may cost, counted in their machine code: no GPU is needed.

The kernels are compiled for compute capability 9.0 as the runtime specialises them for the shapes
of the benchmarks. `gpu_budget.json` holds what was counted; more instructions, registers, shuffles,
barriers or float64, or narrower accesses, are an error. Another version of a compiler counts
otherwise, so its kernels are left out.

    python tests/test_gpu_budget.py            prints what is counted beside the budget
    python tests/test_gpu_budget.py --write    makes it the budget
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import machine_code  # noqa: E402
from test_triton_compile import BENCHMARK, compile_augment, compile_heads, compile_source  # noqa: E402

FILE = Path(__file__).with_name("gpu_budget.json")
MOST = ("instructions", "registers", "spilled", "shuffles", "barriers", "float64")
LEAST = ("load", "store", "occupancy")
HEADS = {  # of a batch: classes of each head, images
    "20x5": ([5] * 20, 10**6),
    "4x2": ([2] * 4, 10**6),
    "10x100": ([100] * 10, 10**5),
    "10x99": ([99] * 10, 10**5),
    "10x20": ([20] * 10, 10**5),
    "4x2000": ([2000] * 4, 10**4),
    "20x5 small": ([5] * 20, 1000),
}
NORMS = {  # channels, positions, images of a view, channels last
    "16x8x8 last": (16, 64, 20, True),
    "64x8x8 last": (64, 64, 20, True),
    "64x8x8": (64, 64, 20, False),
    "256x2x2 last": (256, 4, 20, True),
    "512x1": (512, 1, 20, True),
    "64x32x32 last": (64, 1024, 20, True),
}
LAYERS = {  # of layers.cu: dynamic shared memory, 16-byte loads in the loop over floats, arrays
    "measure_kernel": (0, 4, 1),
    "rescale_kernel": (0, 4, 1),
    "balance_kernel": (2 * 32768, 4, 1),
    "update_kernel": (0, 6, 3),
}


def wide_loads(code):
    return sum(i.name == "LDG" and i.width == 16 for i in code.instructions)


def counted(code, part, items, threads, shared):
    """The figures of a kernel, of which `part` computes `items` items in all threads of a block."""
    return {
        "instructions": round(len(part.instructions) * threads / items, 1),  # of a thread, an item
        "registers": code.registers,
        "spilled": code.spilled,
        "shuffles": part.count("SHFL"),
        "barriers": part.count("BAR"),
        "float64": part.float64,
        "load": max((i.width for i in part.instructions if i.name == "LDG"), default=0),
        "store": max((i.width for i in part.instructions if i.name == "STG"), default=0),
        "occupancy": code.occupancy(threads, shared),
    }


def count_heads(op, sizes, images):
    """The loop with the most exponentials: a tile of old heads, or of all."""
    from bld_ext.triton import distillation as kernels
    from bld_ext.triton import flat

    if op != "joint_loss" and sizes[0] <= kernels.NARROW and images * len(sizes) >= flat.MANY:
        return count_flat(op, sizes[0])
    made, constants = compile_heads(op, sizes)
    code = machine_code.read(made.asm["cubin"], "heads_kernel")
    heads, loop = constants["OLD_BLOCK"], max(code.loops, key=lambda part: part.count("MUFU"))
    return counted(code, loop, heads * sizes[0], 32 * kernels.WARPS, made.metadata.shared)


def count_flat(op, width):
    """The loop over whole tiles."""
    from bld_ext.triton import flat

    heads = flat.heads_of_a_thread(width)
    constants = dict(CLASSES=width, HEADS=heads, BLOCK=flat.BLOCK, ON_DEVICE=True, PROGRAMS=1024)
    without = (
        ("targets", "grad", "loss", "partials", "ticket") if op == "head_softmax" else ("bank",)
    )
    constants |= {f"{name}_ptr": None for name in without}
    types = {parameter.name: "*fp32" for parameter in flat.flat_kernel.params}
    types |= dict(ticket_ptr="*i32", temperature="*fp64", end="i64")
    aligned = [f"{n}_ptr" for n in ("logits", "targets", "bank", "grad") if n not in without]
    made = compile_source(flat.flat_kernel, types, constants, 90, flat.WARPS, aligned)
    code = machine_code.read(made.asm["cubin"], "flat_kernel")
    items = width * heads * flat.BLOCK
    return counted(code, code.loops[0], items, 32 * flat.WARPS, made.metadata.shared)


def count_norm(direction, C, S, B, last):
    """All of a program, which has a slab; or, of a slab in pieces, the loop over them."""
    from bld_ext.triton import batch_norm as kernels

    forward = direction == "forward"
    most = kernels.FORWARD_TILES if forward else kernels.BACKWARD_TILES
    tile = kernels.tile_shape(B * S, C, S, last, most)
    warps = tile.pop("num_warps")
    kernel = kernels.forward_kernel if forward else kernels.backward_kernel
    constants = tile | {"RELU": True}
    constants["residual_ptr" if forward else "grad_residual_ptr"] = None
    if not forward:
        constants["y_ptr"] = None
    types = {parameter.name: "*fp32" for parameter in kernel.params}
    numbers = dict(n=B * S, C=C, S=S, stride_b=C * S)
    types |= dict.fromkeys(numbers, "i32")
    types |= dict(parts_ptr="*fp64", tickets_ptr="*i32", eps="fp32")
    types = {p.name: types[p.name] for p in kernel.params}
    pointers = [n for n in types if n.endswith("_ptr") and n not in {*constants, "tickets_ptr"}]
    aligned = pointers + [name for name, number in numbers.items() if number % 16 == 0]
    ones = [name for name, number in numbers.items() if number == 1]
    constants |= dict.fromkeys(ones, 1)
    made = compile_source(kernel, types, constants, 90, warps, aligned)
    code = machine_code.read(made.asm["cubin"], kernel.__name__)
    rows = B * S if tile["WHOLE"] else tile["ROWS"] * tile["TILES"]
    part = code if tile["WHOLE"] else code.loops[0]
    return counted(code, part, rows * tile["CHANNELS"], 32 * warps, made.metadata.shared)


def count_augment(kernel, side):
    """Pixels: all of a program that has one tile, else the loop over tiles."""
    import torch

    from bld_ext import SeededAugment
    from bld_ext.triton.augment import form as form_of

    form, _ = form_of(SeededAugment(**BENCHMARK).policy, torch.uint8, 3, side, side, False)
    made = compile_augment(kernel, BENCHMARK, "u8", "fp32", side, False, 90)
    code = machine_code.read(made.asm["cubin"], "views_kernel")
    part = code if form.ONE_TILE else code.loops[0]
    return counted(code, part, form.ROWS * form.COLUMNS, 32 * form.warps, made.metadata.shared)


def count_draw():
    """All of a thread, which draws a view and packs a word."""
    made = compile_augment("prepare", BENCHMARK, "u8", "fp32", 32, False, 90)
    code = machine_code.read(made.asm["cubin"], "prepare_kernel")
    return counted(code, code, 128, 128, made.metadata.shared)


TRITON = {
    **{
        f"{op} {name}": (count_heads, op, *HEADS[name])
        for op in ("head_softmax", "distillation_loss", "joint_loss")
        for name in HEADS
    },
    **{
        f"norm {direction} {name}": (count_norm, direction, *NORMS[name])
        for direction in ("forward", "backward")
        for name in NORMS
    },
    **{f"augment {side}x{side}": (count_augment, "views", side) for side in (32, 224)},
    "augment 224x224, sums": (count_augment, "sums", 224),
    "augment, draw": (count_draw,),
}


def count_layers():
    """The loop over float32 of each kernel in layers.cu; an item is four floats of each array."""
    from test_cuda_build import ROOT, find_nvcc
    from torch.utils import cpp_extension

    command = [find_nvcc(), "-std=c++20", "-O3", "-cubin", "-arch=sm_90", "-DUSE_CUDA"]
    command += ["-DTORCH_TARGET_VERSION=0x020b000000000000"]
    for folder in cpp_extension.include_paths():
        command += ["-isystem", folder]
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "layers.cubin"
        command += [str(ROOT / "csrc/cuda/layers.cu"), "-o", str(cubin)]
        subprocess.run(command, check=True, capture_output=True)
        found = {}
        for name, (shared, loads, arrays) in LAYERS.items():
            code = machine_code.read(cubin.read_bytes(), name)
            of_floats = [loop for loop in code.loops if wide_loads(loop) == loads]
            assert of_floats, f"{name}: no loop has {loads} 16-byte loads"
            found[name] = counted(code, of_floats[0], loads // arrays * 256, 256, shared)
        return found


def nvcc_version():
    from test_cuda_build import find_nvcc

    said = subprocess.run([find_nvcc(), "--version"], capture_output=True, text=True).stdout
    return re.search(r"V([\d.]+)", said)[1]


def more_than(budget, found):
    """The figures that are worse than the budget: "registers 70, at most 64"."""
    worse = [f"{n} {found[n]}, at most {budget[n]}" for n in MOST if found[n] > budget[n]]
    return worse + [f"{n} {found[n]}, at least {budget[n]}" for n in LEAST if found[n] < budget[n]]


@pytest.fixture(scope="module")
def known():
    return json.loads(FILE.read_text())


@pytest.fixture(scope="module")
def found(known):
    triton = pytest.importorskip("triton")
    if triton.__version__ != known["triton"]:
        pytest.skip(f"the budget is that of Triton {known['triton']}, not {triton.__version__}")
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, __file__, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", TRITON)
def test_a_kernel_keeps_its_budget(name, known, found):
    assert more_than(known["kernels"][name], found[name]) == []


def test_cuda_kernels_keep_their_budget(known):
    pytest.importorskip("triton")  # whose wheel has the disassembler
    if (version := nvcc_version()) != known["nvcc"]:
        pytest.skip(f"the budget is that of nvcc {known['nvcc']}, not {version}")
    found = count_layers()
    assert {
        name: more_than(known["kernels"][name], found[name]) for name in LAYERS
    } == dict.fromkeys(LAYERS, [])


def test_a_regression_is_noticed(known):
    """An instruction more in the loop, a narrower load, a spilled register."""
    budget = known["kernels"]["norm forward 64x8x8 last"]
    assert more_than(budget, budget) == []
    for name, value in {"instructions": 999, "load": 4, "spilled": 8, "occupancy": 0.125}.items():
        (worse,) = more_than(budget, budget | {name: value})
        assert worse.startswith(f"{name} {value}, at ")


if __name__ == "__main__":
    counts = {name: count(*arguments) for name, (count, *arguments) in TRITON.items()}
    if "--json" in sys.argv:
        json.dump(counts, sys.stdout)
        sys.exit()
    import triton

    counts |= count_layers()
    before = json.loads(FILE.read_text())["kernels"] if FILE.exists() else {}
    for kernel, figures in counts.items():
        print(kernel, *(f"{name} {value}" for name, value in figures.items()), sep="  ")
        for line in more_than(before[kernel], figures) if kernel in before else ["new"]:
            print(f"    {line}")
    if "--write" in sys.argv:
        content = {"triton": triton.__version__, "nvcc": nvcc_version(), "kernels": counts}
        FILE.write_text(json.dumps(content, indent=1) + "\n")
