"""Registers every op with PyTorch's dispatcher: schema, default kernel, fake kernel and autograd.

The reference is the default kernel of every op. Importing bld_ext._C registers the C++ kernels over
it. If Triton is installed, its kernels are registered here for CUDA.
"""

import importlib
import importlib.util
import warnings

import torch
from torch.autograd.function import once_differentiable

from bld_ext import checks, reference
from bld_ext.reference import compute_dtype

try:
    _C = importlib.import_module("bld_ext._C")
except ImportError as error:
    _C = None
    warnings.warn(
        f"bld_ext._C could not be loaded ({error}): every op runs on its PyTorch reference, "
        "which is correct but slower. Install a C++ compiler and run `pip install -e .` again.",
        stacklevel=2,
    )

SCHEMAS = {
    "head_softmax": "(Tensor logits, int[] head_sizes, Tensor temperature) -> Tensor",
    "distillation_loss": (
        "(Tensor logits, Tensor bank, int[] head_sizes, Tensor temperature)"
        " -> (Tensor loss, Tensor grad_logits)"
    ),
    "warm_up_loss": (
        "(Tensor logits, Tensor labels, int[] head_sizes, Tensor temperature)"
        " -> (Tensor loss, Tensor bank, Tensor grad_logits)"
    ),
    "joint_loss": (
        "(Tensor logits, Tensor labels, Tensor bank, int[] head_sizes, Tensor temperature)"
        " -> (Tensor new_loss, Tensor distillation_loss,"
        " Tensor new_grad_logits, Tensor distillation_grad_logits)"
    ),
    "view_batch_norm": (
        "(Tensor input, Tensor? weight, Tensor? bias, Tensor? residual, int views, float eps,"
        " bool relu) -> (Tensor output, Tensor mean, Tensor variance)"
    ),
    "view_batch_norm_backward": (
        "(Tensor grad_output, Tensor input, Tensor? output, Tensor? weight, Tensor? bias,"
        " Tensor mean, Tensor variance, int views, float eps, bool relu, bool residual)"
        " -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias, Tensor grad_residual)"
    ),
    "layer_norms": "(Tensor[] tensors, int[] layers, int num_layers) -> Tensor",
    "balance_layers_": (
        "(Tensor(a!)[] grads, int[] layers, Tensor reference_norms, Tensor balance)"
        " -> (Tensor factors, Tensor norms)"
    ),
    "balanced_sgd_": (
        "(Tensor(a!)[] params, Tensor[] distill_grads, Tensor[] new_grads, int[] layers,"
        " Tensor reference_norms, Tensor balance, Tensor lr) -> (Tensor factors, Tensor norms)"
    ),
    "augment": (
        "(Tensor images, float[] policy, Tensor seed, Tensor step, int[] views, Tensor? indices,"
        " ScalarType dtype, bool channels_last) -> Tensor"
    ),
}

for _name, _schema in SCHEMAS.items():
    torch.library.define(f"bld_ext::{_name}", _schema, tags=torch.Tag.pt2_compliant_tag)


TRITON = {
    "head_softmax": "distillation",
    "distillation_loss": "distillation",
    "warm_up_loss": "distillation",
    "joint_loss": "distillation",
    "view_batch_norm": "batch_norm",
    "view_batch_norm_backward": "batch_norm",
    "augment": "augment",
}  # op: its file in bld_ext/triton
if importlib.util.find_spec("triton") is None:
    TRITON = {}


def backend(name: str, device: str = "cpu") -> str:
    """Return which kernel of an op runs on a device type: "compiled", "triton" or "reference".

    Triton kernels take float32, bfloat16, float16, and uint8 images; float64 runs on the reference.
    """
    if name not in SCHEMAS:
        raise ValueError(f"name: expected one of {', '.join(SCHEMAS)}, got {name!r}")
    if device == "cuda" and name in TRITON:
        return "triton"
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device, device)
    compiled = torch._C._dispatch_has_kernel_for_dispatch_key(f"bld_ext::{name}", key)
    return "compiled" if compiled else "reference"


# ---- default kernels, and Triton's ----


def _checked(kernel):
    """Wrap a kernel so that it checks its lists before it changes a tensor, as compiled ones do."""
    check = getattr(checks, kernel.__name__)

    def checked(*args):
        check(*args)
        return kernel(*args)

    return checked


ON_LAYERS = ("layer_norms", "balance_layers_", "balanced_sgd_")
for _name in SCHEMAS:
    _kernel = getattr(reference, _name)
    _kernel = _checked(_kernel) if _name in ON_LAYERS else _kernel
    torch.library.impl(f"bld_ext::{_name}", "default", _kernel)


def _triton_kernel(name):
    def kernel(*args):  # imports Triton only when it is needed
        return getattr(importlib.import_module(f"bld_ext.triton.{TRITON[name]}"), name)(*args)

    return kernel


for _name in TRITON:
    torch.library.impl(f"bld_ext::{_name}", "cuda", _triton_kernel(_name))


# ---- fake kernels ----


@torch.library.register_fake("bld_ext::head_softmax")
def _(logits, head_sizes, temperature):
    shape = (logits.shape[0], sum(head_sizes), *logits.shape[2:])
    return logits.new_empty(shape, dtype=compute_dtype(logits.dtype))


def _fake_loss(logits):
    return logits.new_empty((), dtype=compute_dtype(logits.dtype))


def _fake_grad(logits):
    return logits.new_empty(logits.shape, dtype=compute_dtype(logits.dtype))


@torch.library.register_fake("bld_ext::distillation_loss")
def _(logits, bank, head_sizes, temperature):
    return _fake_loss(logits), _fake_grad(logits)


@torch.library.register_fake("bld_ext::warm_up_loss")
def _(logits, labels, head_sizes, temperature):
    bank = torch.ops.bld_ext.head_softmax(logits, head_sizes[:-1], temperature)
    return _fake_loss(logits), bank, _fake_grad(logits)


@torch.library.register_fake("bld_ext::joint_loss")
def _(logits, labels, bank, head_sizes, temperature):
    return _fake_loss(logits), _fake_loss(logits), _fake_grad(logits), _fake_grad(logits)


@torch.library.register_fake("bld_ext::view_batch_norm")
def _(input, weight, bias, residual, views, eps, relu):
    mean = input.new_empty(views, input.shape[1], dtype=compute_dtype(input.dtype))
    return reference.like_input(input), mean, torch.empty_like(mean)


@torch.library.register_fake("bld_ext::view_batch_norm_backward")
def _(grad_output, input, output, weight, bias, mean, variance, views, eps, relu, residual):
    grad_weight = mean.new_empty(input.shape[1])
    grad_residual = reference.like_input(input) if residual else input.new_empty(0)
    grads = grad_weight, torch.empty_like(grad_weight), grad_residual
    return reference.like_input(input), *grads


@torch.library.register_fake("bld_ext::layer_norms")
def _(tensors, layers, num_layers):
    checks.layer_norms(tensors, layers, num_layers)
    return tensors[0].new_empty(num_layers, dtype=compute_dtype(tensors[0].dtype))


def _fake_norms(grads, reference_norms):
    norms = grads[0].new_empty(reference_norms.shape, dtype=compute_dtype(grads[0].dtype))
    return norms, torch.empty_like(norms)


@torch.library.register_fake("bld_ext::balance_layers_")
def _(grads, layers, reference_norms, balance):
    checks.balance_layers_(grads, layers, reference_norms, balance)
    return _fake_norms(grads, reference_norms)


@torch.library.register_fake("bld_ext::balanced_sgd_")
def _(params, distill_grads, new_grads, layers, reference_norms, balance, lr):
    lists = (params, distill_grads, new_grads)
    checks.balanced_sgd_(*lists, layers, reference_norms, balance, lr)
    return _fake_norms(distill_grads, reference_norms)


@torch.library.register_fake("bld_ext::augment")
def _(images, policy, seed, step, views, indices, dtype, channels_last):
    N, *shape = images.shape
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return images.new_empty((len(views) * N, *shape), dtype=dtype).to(memory_format=layout)


# ---- autograd ----


def _save_softmax(ctx, inputs, output):
    logits, ctx.head_sizes, temperature = inputs
    ctx.classes, ctx.dtype = logits.shape[1], logits.dtype
    ctx.save_for_backward(output, temperature)


def _softmax_backward(ctx, grad):
    bank, temperature = ctx.saved_tensors  # dL/dz = p (dL/dp - Σ_head p dL/dp) / τ
    heads = zip(bank.split(ctx.head_sizes, 1), grad.split(ctx.head_sizes, 1), strict=True)
    parts = [p * (g - (p * g).sum(1, keepdim=True)) / temperature for p, g in heads]
    rest = bank.new_zeros(bank.shape[0], ctx.classes - bank.shape[1], *bank.shape[2:])
    return torch.cat([*parts, rest], 1).to(ctx.dtype), None, None


torch.library.register_autograd(
    "bld_ext::head_softmax", _softmax_backward, setup_context=_save_softmax
)


class _NoSecondDerivative(torch.autograd.Function):
    """A gradient that raises when it is differentiated again, instead of giving a silent zero."""

    @staticmethod
    def forward(ctx, logits, grad_logits, grad_loss):
        return _scaled(logits, grad_logits, grad_loss)

    @staticmethod
    def backward(ctx, _):
        raise RuntimeError(
            "bld_ext: the losses have no second derivative. Write the loss in PyTorch, as under "
            "'Equivalent to' in its docstring; head_softmax can be differentiated twice."
        )


def _scaled(logits, grad_logits, grad_loss):
    """Return dL/dz times the incoming gradient, rounded once to the logits' dtype."""
    return (grad_logits * grad_loss).to(logits.dtype)


class _Loss(torch.autograd.Function):
    """An op whose first `losses` outputs are scalar losses and whose last are their gradients."""

    @staticmethod
    def forward(ctx, op, losses, *inputs):
        with torch._C._AutoDispatchBelowAutograd():
            output = op(*inputs)
        ctx.num_inputs = len(inputs)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(inputs[0], *output[-losses:])
        ctx.mark_non_differentiable(*output[losses:])
        return output

    @staticmethod
    def backward(ctx, *grads):
        total = None
        logits, *grads_logits = ctx.saved_tensors
        scaled = _NoSecondDerivative.apply if torch.is_grad_enabled() else _scaled
        for grad_logits, grad_loss in zip(grads_logits, grads, strict=False):
            if grad_loss is not None:
                part = scaled(logits, grad_logits, grad_loss)
                total = part if total is None else total + part
        return None, None, total, *(None,) * (ctx.num_inputs - 1)


def _register_loss(name, losses):
    """Register autograd as torch.library.register_autograd does, at a third of its cost a call."""
    op = getattr(torch.ops.bld_ext, name).default

    def kernel(logits, *inputs):
        if torch.is_grad_enabled() and logits.requires_grad:
            return _Loss.apply(op, losses, logits, *inputs)
        with torch._C._AutoDispatchBelowAutograd():
            return op(logits, *inputs)

    torch.library.impl(f"bld_ext::{name}", "Autograd", kernel)


_register_loss("distillation_loss", losses=1)
_register_loss("warm_up_loss", losses=1)
_register_loss("joint_loss", losses=2)


class _ViewBatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, weight, bias, residual, views, eps, relu):
        with torch._C._AutoDispatchBelowAutograd():
            output, mean, variance = torch.ops.bld_ext.view_batch_norm.default(
                input, weight, bias, residual, views, eps, relu
            )
        ctx.views, ctx.eps, ctx.relu = views, eps, relu
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(mean, variance)
        # for a ReLU's mask; cheaper than to read the output is to compute it again, where that
        # takes nothing more and where it is not rounded
        again = residual is None and compute_dtype(input.dtype) == input.dtype
        kept = output if relu and not again else None
        ctx.save_for_backward(input, kept, weight, bias, mean, variance)
        return output, mean, variance

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, *_):
        if grad is None:
            return (None,) * 7
        masked = ctx.relu and ctx.needs_input_grad[3]
        *grads, beside = torch.ops.bld_ext.view_batch_norm_backward.default(
            grad, *ctx.saved_tensors, ctx.views, ctx.eps, ctx.relu, masked
        )
        grads = *grads, beside if masked else grad
        wanted = zip(grads, ctx.needs_input_grad[:4], strict=True)
        return *(g if want else None for g, want in wanted), None, None, None


def _view_batch_norm(input, weight, bias, residual, views, eps, relu):
    tensors = (input, weight, bias, residual)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return _ViewBatchNorm.apply(*tensors, views, eps, relu)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.bld_ext.view_batch_norm.default(*tensors, views, eps, relu)


torch.library.impl("bld_ext::view_batch_norm", "Autograd", _view_batch_norm)
