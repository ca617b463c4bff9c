"""Arithmetic of a step: exact float32 products, and random numbers that can be replayed."""

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

import numpy as np
import torch
from torch import nn

# The switches that let torch compute a float32 product in lower precision: TF32 on a GPU, bfloat16
# on a CPU. A switch that was never set follows its parent. Parents therefore come first, and only a
# switch that then still differs is set.
_SWITCHES = (
    torch.backends.cudnn,
    torch.backends.mkldnn,
    torch.backends.cuda.matmul,
    torch.backends.cudnn.conv,
    torch.backends.cudnn.rnn,
    torch.backends.mkldnn.matmul,
    torch.backends.mkldnn.conv,
    torch.backends.mkldnn.rnn,
)


_lock = threading.Lock()
_kept: dict[object, list] = {}  # global settings from before the first thread changed them


@contextmanager
def _set_aside(
    name: object, read: Callable[[], object], put_back: Callable[[object], None]
) -> Iterator[None]:
    """Save a global setting and restore it; of several threads, the last to leave restores it."""
    with _lock:
        kept = _kept.setdefault(name, [])
        kept.append(kept[0] if kept else read())
    try:
        yield
    finally:
        with _lock:
            before = kept.pop()
            if not kept:
                put_back(before)


@contextmanager
def exact_float32() -> Iterator[None]:
    """Switch off TF32, bfloat16 products and autocast inside, and restore all of them after.

    Inside, torch's older switches such as `torch.backends.cudnn.allow_tf32` raise torch's error
    about mixing them with the newer ones.
    """
    with ExitStack() as stack:
        # inside an autocast, even one that is disabled, one of the network's own would keep its
        # casts of weights from one stage to the next
        torch.clear_autocast_cache()
        stack.callback(torch.clear_autocast_cache)
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        stack.enter_context(_set_aside("precision", _precisions, _put_all_back))
        torch.backends.fp32_precision = "ieee"
        for switch in _SWITCHES:
            if switch.fp32_precision != "ieee":
                switch.fp32_precision = "ieee"
        yield


def _precisions() -> list[str]:
    return [switch.fp32_precision for switch in (torch.backends, *_SWITCHES)]


def _put_all_back(before: list[str]) -> None:
    torch.backends.fp32_precision, *own = before
    for switch, precision in zip(_SWITCHES, own, strict=True):
        _put_back(switch, precision)


def _put_back(switch, precision: str) -> None:
    """Restore a switch; if it had its parent's value, let it follow the parent again."""
    if switch.fp32_precision != precision:
        switch.fp32_precision = "none"
        if switch.fp32_precision != precision:
            switch.fp32_precision = precision


# "mixed" reduces only the backward passes, whose rounding errors are relative to the gradient.
# Those of a forward pass are relative to the activations, and what is distilled is a small
# difference of two of them.
PRECISIONS = ("fp32", "mixed")
_IN_BACKWARD = {
    torch.backends.cuda.matmul: "tf32",
    torch.backends.cudnn.conv: "tf32",
    torch.backends.cudnn.rnn: "tf32",
    torch.backends.mkldnn.matmul: "bf16",
    torch.backends.mkldnn.conv: "bf16",
    torch.backends.mkldnn.rnn: "bf16",
}
REFUSED = ("tf32", "bf16", "bfloat16", "fp16", "float16", "autocast", "amp")


def backward_arithmetic(precision: str) -> AbstractContextManager:
    """Return the context manager for a backward pass inside `exact_float32`."""
    return _reduced() if precision == "mixed" else nullcontext()


def dtype_of(model: nn.Module) -> torch.dtype:
    """Return the dtype in which a network computes; frozen integers are beside the point."""
    kinds = (p.dtype for p in model.parameters() if p.is_floating_point())
    return next(kinds, torch.get_default_dtype())


@contextmanager
def _reduced() -> Iterator[None]:
    try:
        for switch, precision in _IN_BACKWARD.items():
            switch.fp32_precision = precision
        yield
    finally:
        for switch in _IN_BACKWARD:
            switch.fp32_precision = "ieee"


@contextmanager
def replayable_rng(device: torch.device) -> Iterator[Callable[[int], None]]:
    """Yield a function that seeds torch's generators of CPU and `device`; restore them after."""
    generators = [torch.default_generator]
    if device.type == "cuda":
        generators.append(torch.cuda.default_generators[device.index])

    def reseed(seed: int) -> None:
        for generator in generators:
            generator.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)

    with ExitStack() as stack:
        for generator in generators:
            aside = _set_aside(generator.device, generator.get_state, generator.set_state)
            stack.enter_context(aside)
        stack.enter_context(_set_aside("random", random.getstate, random.setstate))
        stack.enter_context(_set_aside("numpy", np.random.get_state, np.random.set_state))
        yield reseed


@contextmanager
def no_random_numbers(device: torch.device) -> Iterator[None]:
    """Refuse a forward pass that draws random numbers: a captured step cannot seed a generator.

    Raises:
        ValueError: a global generator of torch, NumPy or Python advanced. This is not checked
            during a recording.
    """
    on_gpu = device.type == "cuda"
    if on_gpu and torch.cuda.is_current_stream_capturing():
        yield
        return
    generators = [torch.default_generator]
    if on_gpu:
        generators.append(torch.cuda.default_generators[device.index])
    before = _random_states(generators)
    yield
    if _random_states(generators) != before:
        raise ValueError(
            "capture: expected a model that draws no random numbers; dropout and the like are "
            "seeded anew in each pass, which a CUDA graph cannot do. Use capture=False, or set "
            "their probability to 0. Another thread that draws from them meanwhile counts, too"
        )


def _random_states(generators: list[torch.Generator]) -> tuple:
    """Return the states of torch's generators, NumPy's and Python's, to be compared."""
    _, words, *rest = np.random.get_state()
    own = (generator.get_state().numpy().tobytes() for generator in generators)
    return (*own, random.getstate(), words.tobytes(), *rest)
