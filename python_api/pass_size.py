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


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device, or the processor's allocator, has said that there is no memory left."""
    named = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return named or any(
        text in str(error) for text in ("DefaultCPUAllocator: ", "_STATUS_ALLOC_FAILED")
    )


class PassSize:
    """The number of views in a pass: as given, or the largest whose activations fit a budget.

    Args:
        wanted: a number, or "auto".
        budget: bytes that the activations of a pass may take; None: 256 MiB on a CPU, and 80 % of
            what is free on a GPU.
    """

    def __init__(self, wanted: int | str, budget: int | None):
        self.automatic = wanted == "auto"
        self.number = 1 if self.automatic else wanted
        self.budget = budget
        self.on_trial = False  # no step has ended with this number yet
        self._fitted_to: object = None

    def fits(self, key: object) -> bool:
        """Whether nothing has to be measured for such a batch."""
        return not self.automatic or key == self._fitted_to

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
        self.on_trial, self._fitted_to = True, key

    def halve(self) -> bool:
        """After running out of memory; False where it cannot be less."""
        if not self.automatic or self.number == 1:
            return False
        self.number = -(-self.number // 2)
        return True

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_fitted_to": None}


def activation_bytes(one: Views) -> int:
    """What backward would keep of these views, and two gradients of the largest of it."""
    model = one.model
    known = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    held: dict[int, int] = {}

    def count(saved: Tensor) -> Tensor:
        storage = saved.untyped_storage()
        if storage.data_ptr() not in known:
            held[storage.data_ptr()] = storage.nbytes()
        return saved

    with torch.autograd.graph.saved_tensors_hooks(count, lambda saved: saved):
        _ = list(one)  # held until all is counted, so that no address comes twice
    return sum(held.values()) + 2 * max(held.values(), default=0)


@contextmanager
def _watched(model: nn.Module, calls: list) -> Iterator[None]:
    """Note the first input and the output of every call of a module without children."""

    def note(module: nn.Module, inputs: tuple, output: object) -> None:
        if inputs and isinstance(inputs[0], Tensor) and isinstance(output, Tensor):
            calls.append((names[module], inputs[0].clone(), output.clone()))

    names = {m: name for name, m in model.named_modules() if not any(m.children())}
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


def _same(few: Tensor, many: Tensor) -> bool:
    """Whether `many` begins with `few`, but for rounding."""
    if few.dim() == 0 or few.shape[1:] != many.shape[1:] or len(many) < len(few):
        return False
    few, many = few.double(), many[: len(few)].double()
    return torch.allclose(few, many, rtol=1e-3, atol=1e-3 * few.abs().max().item(), equal_nan=True)


@torch.no_grad()
def layers_that_mix(one: Views, two: Views) -> list[str]:
    """Modules that compute a view differently where another one is beside it.

    Dropout, whose masks are drawn a pass, is left out.
    """
    alone, beside = [], []
    results = []
    for views, calls in ((one, alone), (two, beside)):
        with _watched(one.model, calls):
            ((_, logits, _),) = views
        results.append(logits)
    found = []
    for (name, few, out), (_, many, wide) in zip(alone, beside, strict=False):
        if _same(few, many) and not _same(out, wide):
            found.append(name)
    if not found and not _same(*results):
        found.append(type(one.model).__name__)
    return list(dict.fromkeys(found))


def warn_of_mixing(one: Views, two: Views, per_pass: int) -> None:
    if layers := layers_that_mix(one, two):
        warnings.warn(
            f"BLDOptimizer: {', '.join(layers)} computes an image differently beside other images, "
            f"or at random. With views_per_pass={per_pass} it sees {per_pass} views at a time, "
            "which changes what is learned and not only how fast; use views_per_pass=1",
            stacklevel=4,
        )
