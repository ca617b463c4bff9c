"""Measures the distillation gradient in each precision: `python -m benchmarks.precision`.

For a batch early in the second task, and for one late in it (mean cross-entropy at most 1e-2), G_d
is computed in float64 and then in each mode, at the same θ and θ' and on the same views. Tensor
cores are emulated: the factors of every product are rounded, and products are summed in float32. A
GPU may be less exact, because it may also sum in another order; `--device cuda` adds rows that the
GPU itself computes. "bf16 autocast" is torch's own.
"""

import argparse
import copy
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from benchmarks.paper.networks import NETWORKS, make_model
from benchmarks.paper.streams import LOADERS, load_dataset
from benchmarks.terminal import lenient
from bld_ext import BLDOptimizer, SeededAugment, ops
from bld_ext.api.precision import backward_arithmetic, exact_float32


@dataclass(frozen=True)
class Mode:
    """The precisions to which the factors of every product are rounded."""

    forward: str = "fp32"
    backward: str = "fp32"
    by_gpu: bool = False  # by the GPU's tensor cores where the precision is tf32, not emulated


def round_tf32(x: Tensor) -> Tensor:
    """Round to TF32: ten bits after the leading one, to the nearest, ties to even."""
    bits = x.contiguous().view(torch.int32)
    return ((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)


def round_bf16(x: Tensor) -> Tensor:
    return x.bfloat16().float()


ROUND = {"tf32": (round_tf32, 1), "bf16": (round_bf16, 1), "3xtf32": (round_tf32, 2)}
ROUND |= {"bf16x3": (round_bf16, 2), "bf16x6": (round_bf16, 3)}


def parts(x: Tensor, precision: str) -> list[Tensor]:
    """Split x into rounded parts whose sum approximates it, the largest first."""
    if precision == "fp32":
        return [x]
    rounded, count = ROUND[precision]
    result = []
    for _ in range(count):
        result.append(rounded(x))
        x = x - result[-1]
    return result


def product(function, a: Tensor, b: Tensor, precision: str) -> Tensor:
    """Compute a bilinear function(a, b) from rounded parts, without the smallest pairs of parts."""
    a, b = parts(a, precision), parts(b, precision)
    pairs = [(i, j) for i in range(len(a)) for j in range(len(b)) if i + j < len(a)]
    return sum(function(a[i], b[j]) for i, j in sorted(pairs, key=sum, reverse=True))


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, mode, options):
        ctx.save_for_backward(x, weight)
        ctx.mode, ctx.options = mode, options
        return product(lambda a, b: F.conv2d(a, b, None, *options), x, weight, mode.forward)

    @staticmethod
    def backward(ctx, grad):
        (x, weight), options, how = ctx.saved_tensors, ctx.options, ctx.mode.backward
        of_input, of_weight = torch.nn.grad.conv2d_input, torch.nn.grad.conv2d_weight
        grad_x = product(lambda g, w: of_input(x.shape, w, g, *options), grad, weight, how)
        grad_w = product(lambda g, a: of_weight(a, weight.shape, g, *options), grad, x, how)
        return grad_x, grad_w, None, None


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, mode):
        ctx.save_for_backward(x, weight)
        ctx.mode = mode
        return product(lambda a, b: a @ b.T, x, weight, mode.forward)

    @staticmethod
    def backward(ctx, grad):
        (x, weight), how = ctx.saved_tensors, ctx.mode.backward
        grad_x = product(lambda g, w: g @ w, grad, weight, how)
        return grad_x, product(lambda g, a: g.T @ a, grad, x, how), None


class Emulated(TorchFunctionMode):
    """A mode in which float32 convolutions and linear layers round as tensor cores do."""

    def __init__(self, mode: Mode):
        super().__init__()
        self.mode = mode

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.conv2d and args[0].dtype == torch.float32:
            x, weight, bias, *options = args
            out = _Convolution.apply(x, weight, self.mode, options)
            return out if bias is None else out + bias[:, None, None]
        if function is F.linear and args[0].dtype == torch.float32:
            x, weight, bias = (*args, kwargs.get("bias"))[:3]
            out = _Linear.apply(x, weight, self.mode)
            return out if bias is None else out + bias
        return function(*args, **kwargs)


MODES = {
    "fp32": Mode(),
    "mixed: fp32, backward in TF32": Mode("fp32", "tf32"),
    "mixed: fp32, backward in bf16": Mode("fp32", "bf16"),
    "3×TF32, backward in TF32": Mode("3xtf32", "tf32"),
    "bf16×6, backward in bf16": Mode("bf16x6", "bf16"),
    "bf16×3, backward in bf16": Mode("bf16x3", "bf16"),
    "TF32 (PyTorch's default for convolutions)": Mode("tf32", "tf32"),
    "bf16": Mode("bf16", "bf16"),
    "bf16 autocast": None,
}


MODES_OF_A_GPU = {
    "mixed, by the GPU": Mode("fp32", "tf32", by_gpu=True),
    "TF32, by the GPU": Mode("tf32", "tf32", by_gpu=True),
}


@contextmanager
def arithmetic(mode: Mode | None, device: str) -> Iterator[None]:
    """Set the arithmetic of the enclosed forward and backward passes."""
    if mode is None:
        with torch.autocast(device, dtype=torch.bfloat16):
            yield
    elif mode.by_gpu:
        with exact_float32(), backward_arithmetic("mixed" if mode.forward == "tf32" else "fp32"):
            yield
    else:
        with exact_float32(), nullcontext() if mode == Mode() else Emulated(mode):
            yield


def of_backward_pass(mode: Mode | None):
    """Return the context manager for the backward pass, if it differs from the forward pass."""
    mixed = mode is not None and mode.by_gpu and mode.forward == "fp32"
    return backward_arithmetic("mixed" if mixed else "fp32")


def distillation_gradient(
    model: nn.Module, before: dict, after: dict, views: Sequence[Tensor], mode: Mode | None
) -> dict[str, Tensor]:
    """Return G_d of each tensor at the weights `after`, with a bank from the weights `before`."""
    old = list(model.head_sizes[:-1])
    model.load_state_dict(before)
    model.train().zero_grad()
    with arithmetic(mode, views[0].device.type):
        with torch.no_grad():
            bank = [ops.head_softmax(model(x), old) for x in views]
        model.load_state_dict(after)
        for x, targets in zip(views, bank, strict=True):
            loss = ops.distillation_loss(model(x), targets, old) / len(views)
            with of_backward_pass(mode):
                loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def by_layer(gradient: dict[str, Tensor]) -> dict[str, Tensor]:
    """Concatenate the gradients of each module, such as its weight and bias, in float64."""
    layers: dict[str, list[Tensor]] = {}
    for name, grad in gradient.items():
        layers.setdefault(name.rpartition(".")[0], []).append(grad.double().flatten())
    return {name: torch.cat(grads) for name, grads in layers.items()}


def compare(gradient: dict[str, Tensor], exact: dict[str, Tensor]) -> tuple[float, float, float]:
    """Return the lowest and the median cosine over the layers, and the largest ratio of norms."""
    found, wanted = by_layer(gradient), by_layer(exact)
    wanted = {n: g for n, g in wanted.items() if g.norm() > 0}  # the newest head gets none
    cosines = torch.stack([F.cosine_similarity(found[n], g, dim=0) for n, g in wanted.items()])
    ratios = torch.stack([found[n].norm() / g.norm() for n, g in wanted.items()])
    return cosines.min().item(), cosines.median().item(), ratios.max().item()


@dataclass
class Situation:
    """A batch at some point of a task: θ before its warm-up, θ' after it, and the views."""

    before: dict
    after: dict
    views: list[Tensor]
    cross_entropy: float
    warm_up_norms: dict[str, float]  # ‖G_w‖ of each layer


def situations(
    model: nn.Module, dataset: str, root: str, lr: float, views: int, train_lr: float
) -> dict[str, Situation]:
    """Learn one task, and the second one until two batches are found, "early" and "late"."""
    data = load_dataset(dataset, root)
    size = max(32, data.x_train.shape[-1])
    augment = SeededAugment(crop_padding=size // 8, rotation=15, jitter=0.2)
    optimizer = BLDOptimizer(model, train_lr, views=4, views_per_pass=4, augment=augment)
    found: dict[str, Situation] = {}
    device = next(model.parameters()).device

    def task(number: int) -> Iterator[tuple[Tensor, Tensor]]:
        mine = (data.y_train // 2 == number).nonzero().flatten()
        while True:
            for rows in mine[torch.randperm(len(mine))].split(20)[:-1]:
                images = data.x_train[rows]
                if images.shape[-1] < 32:
                    images = F.interpolate(images.float(), 32).byte()
                yield images.to(device), (data.y_train[rows] % 2).to(device)

    def at(images: Tensor, labels: Tensor) -> Situation:
        twin = copy.deepcopy(model)
        before = copy.deepcopy(twin.state_dict())
        shown = [augment(images, seed=7, step=0, views=[v]) for v in range(views)]
        once = BLDOptimizer(
            twin, lr, joint_steps=0, views=views, views_per_pass=1,
            augment=lambda images, views, **_: torch.cat([shown[v] for v in views]),
        )  # fmt: skip
        loss = once.step(images, labels).item()
        norms = dict(zip(once.last.layers, once.last.reference_norms.tolist(), strict=True))
        return Situation(before, twin.state_dict(), shown, loss / len(images), norms)

    for number in range(2):
        model.add_head(2)
        for step, (images, labels) in enumerate(task(number)):
            loss = optimizer.step(images, labels).item() / len(images)
            if number == 0 and step >= 40:
                break
            if number == 1 and step == 1:
                found["early"] = at(images, labels)
            if number == 1 and step > 5 and loss <= 1e-2:
                found["late"] = at(images, labels)
                break
    return found


def in_float64(situation: Situation, model: nn.Module) -> dict[str, Tensor]:
    """Return G_d of each tensor in float64."""
    states = (situation.before, situation.after)
    wide = [{k: v.double() for k, v in state.items()} for state in states]
    views = [x.double() for x in situation.views]
    return distillation_gradient(copy.deepcopy(model).double(), *wide, views, Mode())


def shrinkage(situation: Situation, exact: dict[str, Tensor]) -> float:
    """Return ‖G_w‖ / ‖G_d‖ in the median layer; 1e7 is as far as the digits of float32 go."""
    norms = {name: gradient.norm().item() for name, gradient in by_layer(exact).items()}
    return median(situation.warm_up_norms[name] / norm for name, norm in norms.items() if norm)


def table(
    found: dict[str, Situation], exact: dict[str, dict[str, Tensor]], model: nn.Module
) -> Iterator[list[str]]:
    """Yield a row for each mode: cosines and ratios of norms, early and late."""
    on_gpu = found and next(iter(found.values())).views[0].is_cuda
    for label, mode in (MODES | MODES_OF_A_GPU if on_gpu else MODES).items():
        row = [label]
        for name, s in found.items():
            gradient = distillation_gradient(model, s.before, s.after, s.views, mode)
            low, median, norm = compare(gradient, exact[name])
            row += [f"{low:.4f}", f"{median:.4f}", f"{norm:.3g}"]
        yield row


@lenient
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--network", choices=NETWORKS, default="resnet18-cifar")
    parser.add_argument("--dataset", choices=LOADERS, default="digits")
    parser.add_argument("--data", default="data", help="folder of the datasets")
    parser.add_argument("--lr", type=float, default=1e-4, help="the paper's (default: %(default)s)")
    parser.add_argument("--train-lr", type=float, default=1e-3, help="of the batches before")
    parser.add_argument("--views", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    model = make_model(options.network).to(options.device)
    found = situations(
        model, options.dataset, options.data, options.lr, options.views, options.train_lr
    )
    print(
        f"{options.network}, {options.dataset}, lr {options.lr:g}, {options.views} views, "
        + ", ".join(f"{name}: cross-entropy {s.cross_entropy:.2g}" for name, s in found.items())
    )
    print("\n| mode | " + " | ".join(f"{n}: lowest cosine | median | norm" for n in found) + " |")
    print("| --- |" + " ---: |" * (3 * len(found)))
    exact = {name: in_float64(s, model) for name, s in found.items()}
    for row in table(found, exact, model):
        print("| " + " | ".join(row) + " |", flush=True)
    ratios = (f"{name} {shrinkage(s, exact[name]):.1g}" for name, s in found.items())
    print(f"\n‖G_w‖ / ‖G_d‖ in the median layer: {', '.join(ratios)}")


if __name__ == "__main__":
    sys.exit(main())
