"""Times per-layer norms, rescaling and update beside plain PyTorch and apex.

Run it with `pytest benchmarks/test_layers.py --benchmark-enable`. A case is the parameters of a
network, with a layer for each module, or a list of small tensors. `balance` computes the norm of
each layer of G_d and rescales it; `update` also adds G_t and takes the SGD step. Each
implementation is checked against float64 before it is timed.
"""

import functools
import os

import pytest
import torch
import torchvision

from benchmarks import measure
from bld_ext import ops, reference

BALANCE, LR = 2.0, 1e-6
CASES = {
    "tiny": [(8,)] * 62,  # the overhead of a call, for as many tensors as ResNet18 has
    "list-2000": [(1 + 37 * i % 4096,) for i in range(2000)],
    "resnet18": torchvision.models.resnet18,
    "resnet50": torchvision.models.resnet50,
    "vit_b_16": torchvision.models.vit_b_16,
}
CASES = measure.cases(CASES)
# Bytes that have to be moved for each float32 element. `balance` reads and writes G_d; `update`
# reads θ, G_d and G_t and writes θ. A gradient that does not fit into a cache is read once more.
BYTES = {"balance": 8, "update": 16}


@functools.cache
def shapes_and_layers(case):
    if isinstance(CASES[case], list):
        return CASES[case], list(range(len(CASES[case])))
    with torch.device("meta"):
        named = list(CASES[case]().named_parameters())
    index = {}
    for name, _ in named:
        index.setdefault(name.rpartition(".")[0], len(index))
    return [p.shape for _, p in named], [index[name.rpartition(".")[0]] for name, _ in named]


# ---- norm and rescale: (G_d, layers, ‖G_w‖) -> nothing; changes G_d ----


def loop_balance(grads, layers, reference_norms):
    """Balance layer by layer, as the paper reads."""
    members = {}
    for grad, l in zip(grads, layers, strict=True):
        members.setdefault(l, []).append(grad)
    for l, own in members.items():
        norm = torch.stack([grad.norm() for grad in own]).norm()
        factor = torch.where(norm > 0, BALANCE * reference_norms[l] / norm, 0)
        for grad in own:
            grad.mul_(factor)


def foreach_factors(grads, layers, reference_norms):
    """Return a zero-dimensional factor for each tensor."""
    index = index_on(grads[0].device, tuple(layers))
    squares = torch.stack(torch._foreach_norm(grads)).square()
    norms = torch.zeros_like(reference_norms).index_add_(0, index, squares).sqrt()
    factors = torch.where(norms > 0, BALANCE * reference_norms / norms, 0)
    return list(factors[index].unbind())


@functools.cache
def index_on(device, layers):
    return torch.tensor(layers, device=device)


def foreach_balance(grads, layers, reference_norms):
    torch._foreach_mul_(grads, foreach_factors(grads, layers, reference_norms))


def ours_balance(grads, layers, reference_norms):
    ops.balance_layers_(grads, layers, reference_norms, BALANCE)


def apex_norms(grads):
    import amp_C
    from apex.multi_tensor_apply import multi_tensor_applier

    zero = torch.zeros(1, dtype=torch.int, device=grads[0].device)
    return multi_tensor_applier(amp_C.multi_tensor_l2norm, zero, [grads], True)[1]


def apex_balance(grads, layers, reference_norms):
    index = index_on(grads[0].device, tuple(layers))
    squares = apex_norms(grads).square()
    norms = torch.zeros_like(reference_norms).index_add_(0, index, squares).sqrt()
    factors = torch.where(norms > 0, BALANCE * reference_norms / norms, 0)
    torch._foreach_mul_(grads, list(factors[index].unbind()))


# ---- the same and the update: (θ, G_d, G_t, layers, ‖G_w‖) -> nothing; changes θ, perhaps G_d ----


def loop_update(params, old, new, layers, reference_norms):
    loop_balance(old, layers, reference_norms)
    for param, d, n in zip(params, old, new, strict=True):
        param.sub_(LR * (d + n))


def foreach_update(params, old, new, layers, reference_norms):
    foreach_balance(old, layers, reference_norms)
    torch._foreach_add_(old, new)
    torch._foreach_add_(params, old, alpha=-LR)


def sgd_update(params, old, new, layers, reference_norms):
    """Update by torch.optim.SGD in place of the last foreach call."""
    foreach_balance(old, layers, reference_norms)
    torch._foreach_add_(old, new)
    for param, grad in zip(params, old, strict=True):
        param.grad = grad
    torch.optim.SGD(params, lr=LR, foreach=True).step()


def addcmul_update(params, old, new, layers, reference_norms):
    """Update without changing G_d; fast from torch 2.13 on."""
    factors = foreach_factors(old, layers, reference_norms)
    torch._foreach_addcmul_(params, old, factors, value=-LR)
    torch._foreach_add_(params, new, alpha=-LR)


def ours_update(params, old, new, layers, reference_norms):
    ops.balanced_sgd_(params, old, new, layers, reference_norms, BALANCE, LR)


def one_launch_balance(grads, layers, reference_norms):
    """Rescale in one cooperative launch of the CUDA kernels, the alternative to their two."""
    os.environ["BLD_EXT_ONE_LAUNCH"] = "1"
    try:
        ours_balance(grads, layers, reference_norms)
    finally:
        del os.environ["BLD_EXT_ONE_LAUNCH"]


IMPLEMENTATIONS = {
    "balance": {
        "loop": loop_balance,
        "foreach": foreach_balance,
        "compile-loop": loop_balance,
        "compile-foreach": foreach_balance,
        "apex": apex_balance,
        "one-launch": one_launch_balance,
        "ours": ours_balance,
    },
    "update": {
        "loop": loop_update,
        "foreach": foreach_update,
        "foreach-SGD": sgd_update,
        "addcmul": addcmul_update,
        "compile-foreach": foreach_update,
        "compile-addcmul": addcmul_update,
        "ours": ours_update,
    },
}


# ---- inputs, the answer, the measurement ----


def make_inputs(op, case, seed):
    """Return the lists that the op works on, the layers and the reference norms."""
    on = dict(generator=torch.Generator(measure.DEVICE).manual_seed(seed), device=measure.DEVICE)
    shapes, layers = shapes_and_layers(case)
    lists = [
        [torch.randn(shape, **on) for shape in shapes] for _ in range(1 if op == "balance" else 3)
    ]
    return [*lists, layers, 1 + torch.rand(max(layers) + 1, **on)]


def check(op, run, inputs):
    """Compare what one call writes with float64; the call changes the inputs."""
    *lists, layers, norms = inputs
    exact = [[tensor.double() for tensor in tensors] for tensors in lists]
    scalars = [torch.tensor(value, dtype=torch.float64) for value in (BALANCE, LR)]
    if op == "balance":
        reference.balance_layers_(*exact, layers, norms.double(), scalars[0])
    else:
        reference.balanced_sgd_(*exact, layers, norms.double(), *scalars)
    run(*inputs)
    for found, expected in zip(lists[0], exact[0], strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    "op, name", [(op, name) for op, names in IMPLEMENTATIONS.items() for name in names]
)
def test_op(benchmark, case, op, name):
    run = IMPLEMENTATIONS[op][name]
    if not benchmark.enabled and (name.startswith("compile") or case in ("resnet50", "vit_b_16")):
        pytest.skip("takes seconds, and is timed only")
    if name.startswith("compile") and case == "list-2000":
        pytest.skip("torch.compile takes more than four minutes")
    if name == "compile-loop" and case in ("resnet50", "vit_b_16"):
        pytest.skip("torch.compile takes minutes for as many separate norms")
    if name == "one-launch" and measure.DEVICE.type == "cpu":
        pytest.skip("a choice of the CUDA kernels")
    if name == "apex":
        pytest.importorskip("amp_C")
    if name.startswith("compile"):
        torch._dynamo.reset()
        run = torch.compile(run, fullgraph=True)
    elements = sum(torch.Size(shape).numel() for shape in shapes_and_layers(case)[0])
    nbytes = BYTES[op] * elements
    sets = [make_inputs(op, case, seed) for seed in range(measure.copies(nbytes))]
    check(op, run, sets[0])

    benchmark.group = f"{op} {case}"
    seconds = measure.time_calls(benchmark, [lambda s=s: run(*s) for s in sets], nbytes)
    measure.record(benchmark, seconds, nbytes, lambda: run(*sets[0]), copied=elements)
