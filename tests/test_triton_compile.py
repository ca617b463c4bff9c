"""The Triton kernels, compiled ahead of time for GPUs that need not be there."""

import itertools
import json
import os
import re
import subprocess
import sys

import machine_code
import pytest
from conftest import EVERYTHING, NORMALISED

pytest.importorskip("triton")
BENCHMARK = dict(crop_padding=4, flip=0.5, rotation=15, scale=(0.9, 1.1), jitter=0.4, **NORMALISED)
ONE_CHANNEL = dict(rotation=10, brightness=0.4, contrast=0.4, mean=(0.5,), std=(0.25,))
OPS = {  # the pointers that an op leaves out
    "head_softmax": {"labels", "targets", "old_grad", "new_grad", "old_loss", "new_loss",
                     "partials", "ticket"},
    "distillation_loss": {"labels", "bank", "new_grad", "new_loss"},
    "warm_up_loss": {"targets", "old_grad", "old_loss"},
    "joint_loss": {"bank"},
}  # fmt: skip
BESIDE = {f"{op} beside": op for op in ("head_softmax", "distillation_loss")}  # other columns
CASES = [  # dtype, widest old and new head, dense, temperature on the device, capability
    *(("fp32", (5, 5), dense, True, sm) for dense in (False, True) for sm in (80, 90)),
    *((dtype, (2, 10), False, False, 90) for dtype in ("bf16", "fp16")),
    ("fp32", (1000, 100), False, True, 90),
    ("fp32", (100, 100), False, True, 80),
    ("fp32", (5, 100), False, True, 90),
    ("fp32", (2000, 100), False, True, 90),
    ("fp32", (100, 97), False, True, 90),  # the new head takes 16-byte accesses away
    ("bf16", (1000, 5), False, True, 90),
    ("fp32", (99, 100), False, True, 90),
]
AUGMENTS = {  # settings, image and view dtype, side, channels last, capability, channels
    "crop": (dict(crop_padding=4, flip=0.5), "u8", "fp32", 32, False, 90),
    "benchmark": (BENCHMARK, "u8", "fp32", 32, False, 90),
    "benchmark-224": (BENCHMARK, "u8", "bf16", 224, True, 90),
    "everything": (EVERYTHING | NORMALISED, "u8", "fp16", 32, False, 80),
    "everything-reflect": (EVERYTHING | dict(padding_mode="reflect"), "fp32", "fp32", 32, True, 90),
    "benchmark-uint16": (BENCHMARK, "u16", "fp32", 32, False, 90),
    "everything-224": (EVERYTHING | NORMALISED, "bf16", "bf16", 224, False, 90),
    "one-channel": (ONE_CHANNEL, "u8", "fp32", 28, False, 90, 1),
    "one-channel-100": (dict(ONE_CHANNEL, padding_mode="reflect"), "u8", "fp32", 100, False, 80, 1),
    "four-channels-100": (dict(rotation=15, flip=0.5), "u16", "fp32", 100, True, 90, 4),
    "everything-edge-100": (EVERYTHING | dict(padding_mode="edge"), "fp32", "fp16", 100, False, 90),
}
AUGMENTS = {
    f"{kernel} {name}": (kernel, *case)
    for kernel in ("prepare", "sums", "views")
    for name, case in AUGMENTS.items()
    if kernel != "sums" or ("contrast" in case[0] or "jitter" in case[0]) and case[3] > 32
}


NORMS = [
    f"{direction}-{dtype}-{layout}-{capability}"
    for direction in ("forward", "backward")
    for dtype, layout, capability in (
        ("fp32", "last", 90), ("fp32", "planes", 90), ("bf16", "last", 90), ("fp32", "last", 80)
    )
]  # fmt: skip


def compile_augment(kernel, settings, image, view, side, channels_last, capability, channels=3):
    """As `compile_heads`, for "prepare", "sums" and "views"."""
    import torch

    from bld_ext import SeededAugment
    from bld_ext.triton import augment as kernels

    policy = SeededAugment(**settings).policy
    if kernel == "prepare":
        constants = kernels.draw_flags(policy) | dict(BLOCK=kernels.PREPARED)
        made, warps = kernels.prepare_kernel, kernels.PREPARED // 32
        if image != "u8":
            constants |= dict(images_ptr=None, words_ptr=None)
    else:
        dtype = dict(u8=torch.uint8, u16=torch.uint16, bf16=torch.bfloat16, fp32=torch.float32)
        form, _ = kernels.form(policy, dtype[image], channels, side, side, channels_last)
        constants = dict(SUMS=kernel == "sums", F=form)
        made, warps = kernels.views_kernel, form.warps
        image = "i32" if form.PACKED else image
    types = {parameter.name: "i32" for parameter in made.params}
    types |= dict(images_ptr=f"*{image}", settings_ptr="*fp32", drawn_ptr="*i32")
    types |= dict(made_ptr=f"*{view}", words_ptr="*i32")
    types |= dict.fromkeys(("seed_ptr", "step_ptr", "indices_ptr"), "*i64")
    types |= dict(share="i64")
    types = {parameter.name: types[parameter.name] for parameter in made.params}
    return compile_source(made, types, constants, capability, warps)


def compile_heads(op, sizes, positions=1, dtype="fp32", on_device=True, capability=90, rest=0):
    """The compiled kernel and its constants; by a process of its own, without the interpreter."""
    from bld_ext.triton import distillation as kernels

    labelled = op in ("joint_loss", "warm_up_loss")
    old = sizes[:-1] if labelled else sizes
    constants = kernels.plan(old, sum(sizes) + rest, labelled, positions).constants()
    pointers = dict(logits=dtype, labels="i64", targets="fp32", bank="fp32", old_grad="fp32")
    pointers |= dict(new_grad="fp32", old_loss="fp32", new_loss="fp32", partials="fp32")
    pointers |= dict(ticket="i32", offsets="i32")
    constants |= dict(ON_DEVICE=on_device, PROGRAMS=kernels.PROGRAMS)
    constants |= {f"{name}_ptr": None for name in OPS[op]}
    types = {f"{name}_ptr": f"*{kind}" for name, kind in pointers.items()}
    numbers = ("N", "C", "C_old", "S", "rest", "old_heads", "old_tiles", "new_tiles")
    types |= dict.fromkeys(numbers, "i32")
    types["temperature"] = "*fp64" if on_device else "fp32"
    made = compile_source(kernels.heads_kernel, types, constants, capability, kernels.WARPS)
    return made, constants


def compile_norm(direction, dtype, channels_last, capability):
    """As `compile_heads`, for view_batch_norm with everything it can have."""
    from bld_ext.triton import batch_norm as kernels

    most = kernels.FORWARD_TILES if direction == "forward" else kernels.BACKWARD_TILES
    constants = kernels.tile_shape(20 * 256, 64, 256, channels_last, most) | {"RELU": True}
    warps = constants.pop("num_warps")
    kernel = getattr(kernels, f"{direction}_kernel")
    types = {parameter.name: f"*{dtype}" for parameter in kernel.params}
    of_channels = ("weight", "bias", "mean", "variance", "grad_weight", "grad_bias")
    types |= {f"{name}_ptr": "*fp32" for name in of_channels}
    types |= dict.fromkeys(("n", "C", "S", "stride_b"), "i32")
    types |= dict(parts_ptr="*fp64", tickets_ptr="*i32", eps="fp32")
    types = {p.name: types[p.name] for p in kernel.params}
    whole = [name for name in types if types[name] != "fp32" and name not in constants]
    return compile_source(kernel, types, constants, capability, warps, whole)


def compile_source(kernel, types, constants, capability, warps, aligned=()):
    """`aligned` names arguments that the runtime knows to be divisible by 16."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = types | dict.fromkeys(constants, "constexpr")
    names = [parameter.name for parameter in kernel.params]
    source = ASTSource(
        fn=kernel,
        signature={name: types[name] for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    target = GPUTarget("cuda", capability, 32)
    options = dict(num_warps=warps, enable_fp_fusion=False)
    return triton.compile(source, target=target, options=options)


def softmax_layouts(ttgir):
    """How the tiles whose reductions make a softmax lie in threads: {tile: layout}."""
    layouts = dict(re.findall(r"^(#\w+) = (.*)$", ttgir, re.M))
    reduced = re.findall(r'"tt\.reduce".*?:\s*\(tensor<(\d+x\d+)xf32, (#\w+)>\)', ttgir, re.S)
    return {(tile, layouts[name]) for tile, name in reduced}


@pytest.fixture(scope="module")
def compiled():
    done = subprocess.run(
        [sys.executable, __file__],
        capture_output=True,
        text=True,
        env=os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("case", range(len(CASES)), ids=["-".join(map(str, c)) for c in CASES])
def test_compiles_and_sums_a_softmax_the_same_way_in_every_op(compiled, case):
    results = {op: compiled[f"{op} {case}"] for op in (*OPS, *BESIDE)}
    assert all(result["cubin"] > 1000 for result in results.values())
    _, widest, dense, *_ = CASES[case]
    if not dense and widest[0] <= 16:  # a thread adds up a whole head, one class after the other
        without = results if widest[1] <= 16 else ("head_softmax", "distillation_loss", *BESIDE)
        assert all(results[op]["softmax"] == [] for op in without)
        return
    (old,) = results["head_softmax"]["softmax"]  # the tile of the old heads
    for op, result in results.items():
        assert old in result["softmax"], op
        same_tile = [layout for tile, layout in result["softmax"] if tile == old[0]]
        assert same_tile == [old[1]], op


@pytest.mark.parametrize("case", range(len(CASES)), ids=["-".join(map(str, c)) for c in CASES])
def test_registers_suffice(compiled, case):
    _, widest, _, _, capability = CASES[case]
    for op in (*OPS, *BESIDE):
        # the compiler keeps to 56 registers there, and one tile writes and reads one of them
        known = 8 if (op, widest, capability) == ("joint_loss", (100, 100), 80) else 0
        assert compiled[f"{op} {case}"]["local"] <= known, op


@pytest.mark.parametrize("name", AUGMENTS)
def test_augment_rounds_every_operation_by_itself_and_spills_nothing(compiled, name):
    result = compiled[f"augment {name}"]
    assert result["cubin"] > 1000 and result["local"] == 0 and result["registers"] <= 192
    assert result["inexact"] == []


@pytest.mark.parametrize("name", NORMS, ids=str)
def test_batch_norm_rounds_every_operation_by_itself_and_spills_nothing(compiled, name):
    result = compiled[f"norm {name}"]
    assert result["cubin"] > 1000 and result["local"] == 0 and result["registers"] <= 192
    assert result["inexact"] == []


def test_spilled_registers_are_counted():
    """Of a kernel that has more in registers than there are."""
    done = subprocess.run(
        [sys.executable, __file__, "spill"],
        capture_output=True,
        text=True,
        env=os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert int(done.stdout) > 0


def inexact(ptx):
    """Instructions that may be fused, or do not round correctly."""
    pattern = r"\b(?:fma|mad)\.[\w.]*f(?:32|64)|\b(?:div|sqrt|rcp)\.(?:full|approx)[\w.]*"
    return sorted({*re.findall(pattern, ptx), *re.findall(r"\b(?:add|mul|sub)\.f\d+", ptx)})


if __name__ == "__main__":
    if sys.argv[1:] == ["spill"]:
        from bld_ext.triton import batch_norm

        batch_norm.MANY_TILES = 20
        print(machine_code.read(compile_norm("forward", "fp32", True, 90).asm["cubin"]).spilled)
        sys.exit()
    results = {}
    for name, (number, case) in itertools.product((*OPS, *BESIDE), enumerate(CASES)):
        dtype, (old, new), dense, on_device, capability = case
        op, rest = BESIDE.get(name, name), new if name in BESIDE else 0
        sizes = [old, new] if op in ("joint_loss", "warm_up_loss") else [old]
        positions = 1024 if dense else 1
        asm = compile_heads(op, sizes, positions, dtype, on_device, capability, rest)[0].asm
        results[f"{name} {number}"] = dict(
            cubin=len(asm["cubin"]),
            softmax=sorted(softmax_layouts(asm["ttgir"])),
            local=machine_code.read(asm["cubin"]).spilled,
        )
    compilations = {f"augment {name}": (compile_augment, case) for name, case in AUGMENTS.items()}
    for name in NORMS:
        direction, dtype, layout, capability = name.split("-")
        case = direction, dtype, layout == "last", int(capability)
        compilations[f"norm {name}"] = compile_norm, case
    for name, (function, case) in compilations.items():
        asm = function(*case).asm
        code = machine_code.read(asm["cubin"])
        results[name] = dict(
            cubin=len(asm["cubin"]), local=code.spilled, registers=code.registers,
            inexact=inexact(asm["ptx"]),
        )  # fmt: skip
    json.dump(results, sys.stdout)
