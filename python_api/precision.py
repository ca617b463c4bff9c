"""The arithmetic of a step: float32 as it is written, and random numbers that can be replayed."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch

# Where torch may compute a float32 product in less: TF32 on a GPU, bfloat16 on a CPU. A switch that
# was never set follows its parent, so parents come first and only what then still differs is set.
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


@contextmanager
def exact_float32() -> Iterator[None]:
    """No TF32, no bfloat16 products, no autocast inside; everything as it was after.

    Inside, torch's older switches such as `torch.backends.cudnn.allow_tf32` raise its own error
    about mixing them with the newer ones.
    """
    root, changed = torch.backends.fp32_precision, []
    with ExitStack() as stack:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        try:
            torch.backends.fp32_precision = "ieee"
            for switch in _SWITCHES:
                if switch.fp32_precision != "ieee":
                    changed.append((switch, switch.fp32_precision))
                    switch.fp32_precision = "ieee"
            yield
        finally:
            for switch, precision in reversed(changed):
                switch.fp32_precision = precision
            torch.backends.fp32_precision = root


@contextmanager
def replayable_rng(device: torch.device) -> Iterator[Callable[[int], None]]:
    """Yield a function that seeds torch's generators of the CPU and `device`; then restore them."""
    generators = [torch.default_generator]
    if device.type == "cuda":
        generators.append(torch.cuda.default_generators[device.index])
    states = [generator.get_state() for generator in generators]

    def reseed(seed: int) -> None:
        for generator in generators:
            generator.manual_seed(seed)

    try:
        yield reseed
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
