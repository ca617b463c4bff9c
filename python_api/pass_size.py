"""How many views go through the network at once, and whether that changes what is computed."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from bld_ext.api.views import Views

CPU_BYTES = 256 * 2**20  # of activations in a pass; with more, a processor is no faster
GPU_SHARE = 0.8  # of what is free
NO_MEMORY = (
    "DefaultCPUAllocator: ",
    "_STATUS_ALLOC_FAILED",
    # a kernel of ours, which is told that a call failed but not why
    "aoti_torch_empty_strided(",
    *(f'"aten::{op}"' for op in ("new_empty", "contiguous", "clone", "to")),
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device, or the processor's allocator, has said that there is no memory left."""
    named = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return named or any(text in str(error) for text in NO_MEMORY)


class PassSize:
    """The number of views in a pass: as given, or the largest whose activations fit a budget.

    Args:
        wanted: a number, or "auto".
        budget: bytes that the activations of a pass may take; None: 256 MiB on a CPU, and 80 % of
            what is free on a GPU.
    """

    def __init__(self, wanted: int | str, budget: int | None):
        self.wanted, self.budget = wanted, budget
        self.automatic = wanted == "auto"
        self.number = 1 if self.automatic else wanted
        self.on_trial = False  # no step has ended with this number yet
        self._key: object = None
        self._known: dict[object, int] = {}

    def fits(self, key: object) -> bool:
        """Whether nothing has to be measured for such a batch."""
        if self.automatic and key in self._known:
            self._key, self.number = key, self._known[key]
        return not self.automatic or key == self._key

    def fit(self, one: Views, count: int, key: object) -> None:
        """Choose a number for V = `count` views, from a forward pass of `one` view."""
        device = one.images.device
        free = self.budget
        if free is None and device.type == "cuda":
            unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
            free = int(GPU_SHARE * (torch.cuda.mem_get_info(device)[0] + unused))
        largest = (CPU_BYTES if free is None else free) // max(1, activation_bytes(one))
        passes = -(-count // min(count, max(1, largest)))
        self.number = -(-count // passes)  # as even as they get
        self.on_trial, self._key = True, key
        self._known[key] = self.number

    def halve(self, now: bool = True) -> bool:
        """After running out of memory, from now on or from the next batch; False where it cannot
        be less.
        """
        if not self.automatic or self.number == 1:
            return False
        self._known[self._key] = -(-self.number // 2)
        if now:
            self.number = self._known[self._key]
        return True

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_key": None, "_known": {}}


def activation_bytes(one: Views) -> int:
    """What backward would keep of these views, and two gradients of the largest of it."""
    model = one.model
    known = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    held: dict[int, int] = {}

    def count(saved: Tensor) -> Tensor:
        storage = saved.untyped_storage()
        if storage.data_ptr() not in known:
            held[storage.data_ptr()] = storage.nbytes()
        return saved.detach()  # itself, it would hold the graph that holds it, for good

    with torch.autograd.graph.saved_tensors_hooks(count, lambda saved: saved):
        _ = list(one)  # held until all is counted, so that no address comes twice
    return sum(held.values()) + 2 * max(held.values(), default=0)


@contextmanager
def no_trace(model: nn.Module) -> Iterator[None]:
    """What a forward pass changes of the buffers, as the iteration of spectral_norm, is undone."""
    buffers = [*model.buffers()]
    before = [b.clone() for b in buffers]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)


# A call of a module: its name, its first input and its output.
Call = tuple[str, Tensor, Tensor]


@contextmanager
def _watched(model: nn.Module, calls: list[Call]) -> Iterator[None]:
    """Note the calls of all modules, inner ones first; dropout does nothing meanwhile."""

    def note(module: nn.Module, inputs: tuple, output: object) -> None:
        if inputs and isinstance(inputs[0], Tensor) and isinstance(output, Tensor):
            calls.append((names[module], inputs[0].detach(), output.detach()))

    scripted = torch.jit.ScriptModule  # takes no hooks
    names = {m: name for name, m in model.named_modules() if not isinstance(m, scripted)}
    masks = [m for m in names if isinstance(m, _DropoutNd) and m.training]
    hooks = [m.register_forward_hook(note) for m in names]
    for mask in masks:
        mask.training = False
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for mask in masks:
            mask.training = True


def _same(alone: tuple[Tensor, ...], beside: Tensor) -> bool:
    """Whether the views have the same values side by side, but for rounding."""
    if any(x.dim() == 0 or x.shape[1:] != beside.shape[1:] for x in alone):
        return all(x.shape == beside.shape and _close(x, beside) for x in alone)
    expected = torch.cat(alone)
    return len(expected) == len(beside) and _close(expected, beside)


def _close(a: Tensor, b: Tensor) -> bool:
    wide = torch.complex128 if a.is_complex() else torch.float64
    a, b = a.to(wide), b.to(wide)
    finite = a.abs().nan_to_num(0, 0, 0)
    scale = finite.max().item() if finite.numel() else 0
    return torch.allclose(a, b, rtol=1e-3, atol=1e-3 * scale, equal_nan=True)


@torch.no_grad()
def what_mixes(first: Views, second: Views, both: Views) -> str | None:
    """The module that computes a view differently where another one is beside it, if there is one.

    The innermost, and of those the first. Dropout, whose masks are drawn a pass, is left out.
    "augment" where it makes another view of the same number.
    """
    calls: list[list[Call]] = [[], [], []]
    logits = []
    for views, noted in zip((first, second, both), calls, strict=True):
        with no_trace(first.model), _watched(first.model, noted):
            ((_, found, _),) = views
        logits.append(found)
    for (name, *one), (_, *two), (_, *pair) in zip(*calls, strict=False):
        same_input, same_output = (_same((one[i], two[i]), pair[i]) for i in (0, 1))
        if name == "" and not same_input:
            return "augment"
        if same_input and not same_output:
            return name or type(first.model).__name__
    # a model that takes no hooks
    return None if _same(tuple(logits[:2]), logits[2]) else type(first.model).__name__


def warn_of_mixing(first: Views, second: Views, both: Views, per_pass: int) -> None:
    if name := what_mixes(first, second, both):
        warnings.warn(
            f"BLDOptimizer: {name} computes an image differently beside other images, or at "
            f"random. With views_per_pass={per_pass} it sees {per_pass} views at a time, which "
            "changes what is learned and not only how fast; use views_per_pass=1",
            stacklevel=5,
        )
