"""Tries out on the first batch what BLD needs of a network and an augmentation.

A view that is made again has to be the same view, and the network has to compute the same for it.
Otherwise the distillation gradient is noise, which balancing scales to full size.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch._subclasses.fake_tensor import is_fake
from torch.nn.modules.dropout import _DropoutNd

from bld_ext.api.batch_norm import RUNNING, ViewBatchNorm
from bld_ext.api.buffers import Buffers, equal
from bld_ext.api.memory_format import NeedsContiguousError
from bld_ext.api.out_of_memory import is_out_of_memory
from bld_ext.api.shards import part, reshard
from bld_ext.api.views import Views
from bld_ext.api.warn import warn


@contextmanager
def no_trace(model: nn.Module) -> Iterator[Buffers]:
    """Undo what forward passes change in the buffers, such as the iteration of spectral_norm."""
    before = Buffers(model)
    try:
        yield before
    finally:
        before.restore()
        reshard(model)  # which a forward pass without backward leaves whole


# A call of a module: its name, and samples of its first input and of its output.
Call = tuple[str, Tensor, Tensor]


@contextmanager
def _watched(model: nn.Module, calls: list[Call]) -> Iterator[None]:
    """Record the calls of all modules, inner ones first."""

    def note(module: nn.Module, inputs: tuple, output: object) -> None:
        output = output[0] if isinstance(output, tuple) and output else output
        if inputs and _is_plain(inputs[0]) and _is_plain(output):
            calls.append((names[module], _sample(inputs[0]), _sample(output)))

    scripted = torch.jit.ScriptModule  # cannot have hooks
    names = {m: name for name, m in model.named_modules() if not isinstance(m, scripted)}
    hooks = [m.register_forward_hook(note) for m in names]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _is_plain(x: object) -> bool:
    """Return whether it is a tensor with values that can be looked at."""
    return (
        isinstance(x, Tensor)
        and x.layout is torch.strided
        and not (x.is_nested or x.is_meta or is_fake(x) or is_functorch_wrapped_tensor(x))
    )


def _sample(x: Tensor) -> Tensor:
    """A copy of up to 512 values of each row of a batch, since those of all layers are kept."""
    x = part(x.detach())
    few = {2: 512, 3: 22}.get(x.dim(), 8)  # along each dimension but the first
    if x.dim() > 1:
        steps = (slice(None, None, max(1, -(-size // few))) for size in x.shape[1:])
        x = x[(slice(None), *steps)]
    return x.dequantize() if x.is_quantized else x.clone()


def _recorded(one: Views) -> tuple[Tensor, list[Call], list[str]]:
    """Run the network; return the logits, all calls, and the buffers that moved."""
    calls: list[Call] = []
    try:
        with no_trace(one.model) as before, _watched(one.model, calls), uncompiled(one.model):
            return _logits(one), calls, before.moved()
    except Exception as error:
        if isinstance(error, NeedsContiguousError) or is_out_of_memory(error):
            raise
    # as it is without hooks, which torch.cond, for one, does not take
    with no_trace(one.model) as before, uncompiled(one.model):
        return _logits(one), [], before.moved()


def _logits(one: Views) -> Tensor:
    (found,) = one
    return found.logits.detach()


def _names(calls: list[Call]) -> list[str]:
    return [name for name, *_ in calls]


def _dropouts(model: nn.Module) -> list[nn.Module]:
    kinds = (_DropoutNd, nn.MultiheadAttention)  # the latter drops out by itself
    return [m for m in model.modules() if isinstance(m, kinds) and m.training]


@contextmanager
def _without_dropout(model: nn.Module) -> Iterator[None]:
    dropouts = _dropouts(model)
    for dropout in dropouts:
        dropout.training = False
    try:
        yield
    finally:
        for dropout in dropouts:
            dropout.training = True


def _same(alone: tuple[Tensor, ...], beside: Tensor) -> bool:
    """Return whether the views have the same values side by side as alone, up to rounding."""
    if any(x.dim() == 0 or x.shape[1:] != beside.shape[1:] for x in alone):
        return all(x.shape == beside.shape and _close(x, beside) for x in alone)
    expected = torch.cat(alone)
    return len(expected) == len(beside) and _close(expected, beside)


def _close(a: Tensor, b: Tensor, tolerance: float = 1e-3) -> bool:
    if a.shape != b.shape:
        return False
    wide = torch.complex128 if a.is_complex() else torch.float64
    a, b = a.to(wide), b.to(wide)
    finite = a.abs().nan_to_num(0, 0, 0)
    scale = finite.max().item() if finite.numel() else 0
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance * scale, equal_nan=True)


def is_compiled(model: nn.Module) -> bool:
    return any(
        m._compiled_call_impl is not None
        or hasattr(m, "_orig_mod")
        or hasattr(m.forward, "_torchdynamo_orig_callable")
        for m in model.modules()
    )


def uncompiled(model: nn.Module) -> AbstractContextManager:
    """Let a compiled model run as it is written: a pass to try it out would be compiled, too."""
    return torch.compiler.set_stance("force_eager") if is_compiled(model) else nullcontext()


def runs_uncompiled(model: nn.Module) -> bool:
    """Return whether it can: torch forbids it inside of a function that is compiled itself."""
    if not is_compiled(model):
        return True
    if torch.compiler.is_compiling():
        return False
    try:
        with uncompiled(model):
            return True
    except RuntimeError:  # amid such a function, behind a break of its graph
        return False


def require_repeatable(one: Views) -> bool:
    """Make a view twice and run the network on it twice.

    Warns of buffers that move meanwhile, of modules that compute in reduced precision and, on a
    CPU, of those whose last digits differ.

    Returns:
        Whether the network computes the same from contiguous images; if not, images must be so.

    Raises:
        ValueError: the view or what the network computes is another one the second time.
    """
    made = [one.make(range(1)) for _ in range(2)]
    same = all(_close(a, b, 1e-5) for a, b in zip(*made, strict=True))
    del made
    if not same:
        raise ValueError(
            "augment: expected the same view from the same seed, step, view and indices, got "
            "another one the second time. The global generators of torch, NumPy and Python are "
            "seeded before each call. Draw from one of them, or make a generator in the call from "
            "its arguments, as numpy.random.default_rng((seed, step, view))"
        )
    if not runs_uncompiled(one.model):
        return True
    (before, first, _), (logits, again, moved) = _recorded(one), _recorded(one)
    if _names(first) != _names(again):  # as where a layer is called once, and its output kept
        for _ in range(3):
            before, first = logits, again
            logits, again, moved = _recorded(one)
            if _names(first) != _names(again):
                _refuse("", one.model)
    for (name, *then), (_, *now) in zip(first, again, strict=True):
        same_input, same_output = (_close(a, b, 1e-5) for a, b in zip(then, now, strict=True))
        if same_input and not same_output:
            _refuse(name, one.model)
    if not _close(before, logits, 1e-5):  # a model that takes no hooks
        _refuse("", one.model)
    if logits.device.type == "cpu" and not equal(before, logits):
        _warn_of_last_digits(first, again)
    _warn_of_buffers(one.model, moved)
    _warn_of_reduced_precision(one.model, again)
    return not one.channels_last or _takes_channels_last(one, logits)


def _takes_channels_last(one: Views, logits: Tensor) -> bool:
    """Return whether contiguous images give these logits, too."""
    dropouts = _dropouts(one.model)
    with no_trace(one.model), uncompiled(one.model), _without_dropout(one.model):
        # dropout's masks are drawn in the order of memory
        contiguous = _logits(replace(one, channels_last=False))
        found = _logits(one) if dropouts else logits
    return _close(found, contiguous, 1e-4)


def _warn_of_last_digits(calls: list[Call], others: list[Call]) -> None:
    """Warn of what is not repeated bit for bit; on a GPU, atomic sums may do so within reason."""
    found = (
        name
        for (name, *first), (_, *again) in zip(calls, others, strict=True)
        if equal(first[0], again[0]) and not equal(first[1], again[1])
    )
    warn(
        f"{next(found, '') or 'the model'} computed other last digits when it ran again on the "
        "same view. Early in a task, what is distilled is as small as they are, and balancing "
        "scales both to full size. Draw random numbers from the global generators of torch, "
        "NumPy or Python, and keep nothing from one forward pass to the next but buffers",
    )


def _warn_of_reduced_precision(model: nn.Module, calls: list[Call]) -> None:
    reduced = (torch.bfloat16, torch.float16)
    found = {name: output.dtype for name, _, output in calls if output.dtype in reduced}
    if found:
        name, dtype = next(iter(found.items()))
        warn(
            f"{name or 'the model'} computes in {dtype}, as inside an autocast of its own. Its "
            "rounding drowns the distillation gradient, and balancing scales it to full size. "
            "Leave the autocast out; precision='mixed' reduces the backward passes alone",
        )


def warn_of_eval_mode(model: nn.Module) -> None:
    """Warn of a whole model in eval mode; single modules may be in it on purpose."""
    differs = (nn.modules.batchnorm._NormBase, _DropoutNd)
    kinds = sorted({type(m).__name__ for m in model.modules() if isinstance(m, differs)})
    if kinds and not model.training:
        warn(
            f"the model is in eval mode, in which {', '.join(kinds)} compute something else than "
            "in training: BatchNorm takes running statistics, which no step then updates. Call "
            "model.train(). To freeze single modules, put these alone into eval mode",
        )


def _refuse(name: str, model: nn.Module) -> None:
    kind = type(model.get_submodule(name)).__name__
    raise ValueError(
        f"model: {name or 'it'}, a {kind}, computed another output when it ran again on the same "
        "view with torch's generators at the same seed. BLD would distil that difference as if "
        "learning had caused it. Draw random numbers from the global generators of torch, NumPy "
        "or Python, and keep nothing from one forward pass to the next but buffers"
    )


def _warn_of_buffers(model: nn.Module, moved: list[str]) -> None:
    norms = [name for name, m in model.named_modules() if isinstance(m, ViewBatchNorm)]
    asked = {f"{name}.{buffer}".lstrip(".") for name in norms for buffer in RUNNING}
    others = [name for name in moved if name not in asked]
    if others:
        kinds = {type(model.get_submodule(name.rpartition(".")[0])).__name__ for name in others}
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        warn(
            f"{', '.join(others[:3])}{more}, of {', '.join(sorted(kinds))}, move at "
            "every forward pass, and not once a batch as the statistics of nn.BatchNorm do. A step "
            "runs several passes a view; what moves the predictions between them is distilled as "
            "if learning had caused it. Put such modules into eval mode, or use nn.BatchNorm",
        )


def what_mixes(first: Views, second: Views, both: Views) -> str | None:
    """Return the name of the module that computes a view differently when another is beside it.

    Returns the first of the innermost such modules, or None. Dropout is ignored, because its masks
    are drawn for each pass anyway. Returns "augment" if the augmentation does not make the same
    view again.
    """
    with _without_dropout(first.model):
        logits, calls, _ = zip(*map(_recorded, (first, second, both)), strict=True)
    for (name, *one), (other, *two), (third, *pair) in zip(*calls, strict=False):
        if not name == other == third:  # a layer is called for each image
            break
        same_input, same_output = (_same((one[i], two[i]), pair[i]) for i in (0, 1))
        if name == "" and not same_input:
            return "augment"
        if same_input and not same_output:
            return name or type(first.model).__name__
    # only the logits are left to compare in a model that cannot have hooks
    return None if _same(logits[:2], logits[2]) else type(first.model).__name__


def warn_of_mixing(first: Views, second: Views, both: Views, per_pass: int) -> None:
    if name := what_mixes(first, second, both):
        warn(
            f"{name} computes an image differently beside other images, or at "
            f"random. With views_per_pass={per_pass} it sees {per_pass} views at a time, which "
            "changes what is learned and not only how fast; use views_per_pass=1",
        )
