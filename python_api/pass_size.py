"""PassSize: how many views go through the network at once, as given or as fits into memory."""

import math
import re
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor, nn

from bld_ext.api.mixing import runs_uncompiled, warn_of_mixing
from bld_ext.api.out_of_memory import is_out_of_memory
from bld_ext.api.views import Views

CPU_BYTES = 256 * 2**20  # activations in a pass; more of them make a CPU no faster
CPU_SHARE, GPU_SHARE = 0.5, 0.8  # of the free memory
MEMINFO, CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
UNITS = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def parse_bytes(text: str) -> int | None:
    """Return the bytes of a size such as "512 MiB", or None if `text` is not a size."""
    found = re.fullmatch(rf"(\d+(?:\.\d+)?) ?({'|'.join(UNITS)})", text.strip())
    return int(float(found[1]) * UNITS[found[2]]) if found else None


class PassSize:
    """The number of views in a pass: as given, or the largest whose activations fit into memory.

    Args:
        wanted: a number; or the memory that the activations of a pass may take, such as "512 MiB",
            or "auto", which is 80 % of the free memory on a GPU, and on a CPU 256 MiB or, if that
            is less, half of what Linux says is free.
    """

    def __init__(self, wanted: int | str):
        self.wanted = wanted
        self.automatic = isinstance(wanted, str)
        self.budget = parse_bytes(wanted) if self.automatic and wanted != "auto" else None
        self.number = 1 if self.automatic else wanted
        self.on_trial = False  # True until a step has succeeded with this number
        self.looked_for_mixing = False
        self._key: object = None
        self._known: dict[object, int] = {}

    def choose(self, views: Views, count: int) -> None:
        """Choose the number for this batch, of which a process makes up to `count` views.

        The first time, look for layers that mix images.

        What a view takes is measured when the batch has a new shape, or other parameters require a
        gradient.
        """
        key = self.key_of(views.model, views.images, count)
        if not self.fits(key):
            self.fit(views.of(0), count, key)
        if not self.looked_for_mixing and self.number > 1 and count > 1:
            self.looked_for_mixing = True
            self._look_for_mixing(views, min(self.number, count))

    def is_chosen(self, model: nn.Module, images: Tensor, count: int) -> bool:
        """Return whether `choose` has nothing to do for `count` views of such a batch."""
        fits = self.fits(self.key_of(model, images, count))
        return fits and (self.looked_for_mixing or min(self.number, count) == 1)

    def key_of(self, model: nn.Module, images: Tensor, count: int) -> object:
        """Return a key that is equal for batches whose views take the same memory."""
        if not self.automatic:
            return ()
        params = [*model.parameters()]
        batch = (tuple(images.shape), images.device, params[0].dtype, count)
        return batch + tuple(p.requires_grad for p in params)

    def _look_for_mixing(self, views: Views, per_pass: int) -> None:
        if not runs_uncompiled(views.model):
            return
        try:
            warn_of_mixing(views.of(0), views.of(1), views.of(0, 1), per_pass)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise

    def fits(self, key: object) -> bool:
        """Return whether such a batch needs no measurement; use its number if it is known."""
        if self.automatic and key in self._known:
            self._key, self.number = key, self._known[key]
        return not self.automatic or key == self._key

    def fit(self, one: Views, count: int, key: object) -> None:
        """Choose the number for V = `count` views by measuring a forward pass of `one` view."""
        device = one.images.device
        free = self.budget
        if free is None and device.type == "cuda":
            unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
            free = int(GPU_SHARE * (torch.cuda.mem_get_info(device)[0] + unused))
        if free is None:
            free = int(min(CPU_BYTES, CPU_SHARE * free_memory()))
        largest = free // max(1, activation_bytes(one))
        passes = -(-count // min(count, max(1, largest)))
        self.number = -(-count // passes)  # passes as equal as possible
        self.on_trial, self._key = True, key
        self._known[key] = self.number

    def halve(self, now: bool = True) -> bool:
        """Halve the number after running out of memory, `now` or from the next batch on.

        Returns False if the number cannot be lower or was not chosen here.
        """
        if not self.automatic or self.number == 1:
            return False
        self._known[self._key] = -(-self.number // 2)
        if now:
            self.number = self._known[self._key]
        return True

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_key": None, "_known": {}}


def free_memory() -> float:
    """Return the bytes that Linux can still give to this process; elsewhere, infinity."""
    found = [math.inf]
    with suppress(OSError, ValueError, TypeError):
        available = re.search(r"MemAvailable: +(\d+) kB", MEMINFO.read_text())
        found.append(1024 * int(available[1]))
    with suppress(OSError, ValueError):  # a container's limit, which may be "max"
        limit, used = ((CGROUP / f"memory.{name}").read_text() for name in ("max", "current"))
        found.append(max(0, int(limit) - int(used)))
    return min(found)


def activation_bytes(one: Views) -> int:
    """Return the bytes that backward needs: saved tensors, and two gradients of the largest one."""
    model = one.model
    known = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    held: dict[int, int] = {}

    def count(saved: Tensor) -> Tensor:
        storage = saved.untyped_storage()
        if storage.data_ptr() not in known:
            held[storage.data_ptr()] = storage.nbytes()
        return saved.detach()  # `saved` itself refers to the graph that would hold it: a cycle

    with torch.autograd.graph.saved_tensors_hooks(count, lambda saved: saved):
        _ = list(one)  # kept until all is counted, so that no address is used twice
    return sum(held.values()) + 2 * max(held.values(), default=0)
