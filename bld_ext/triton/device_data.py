"""Small data that stays on a device from launch to launch, on any stream and in CUDA graphs."""

import threading
from collections.abc import Callable, Hashable

import torch
from torch import Tensor


def capturing(device: torch.device) -> bool:
    """Whether the current stream records into a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def on_device(scalar: Tensor, device: torch.device) -> bool:
    """Whether a kernel can read a scalar itself, so that a graph can be replayed with another."""
    return scalar.device == device


class OnDevice:
    """A copy of a host tensor, made without waiting, that every stream may use."""

    def __init__(self, host: Tensor, device: torch.device):
        self.device, self.seen_by, self.captured = device, set(), False
        if device.type != "cuda":
            self.data = host.to(device)
            return
        with torch.cuda.device(device):
            self.data = host.pin_memory().to(device, non_blocking=True)
            self.copied = torch.cuda.Event()
            self.copied.record()

    def get(self) -> Tensor:
        # a graph is replayed after its capture has ended, and so after the copy
        if self.device.type == "cuda" and not capturing(self.device):
            stream = torch.cuda.current_stream(self.device)
            if stream.cuda_stream not in self.seen_by:
                stream.wait_event(self.copied)
                self.data.record_stream(stream)
                self.seen_by.add(stream.cuda_stream)
        return self.data


KEPT = 1024  # beyond these go those that were used longest ago, if no graph reads them
_kept: dict[tuple, OnDevice] = {}
_lock = threading.Lock()


def kept(key: Hashable, device: torch.device, argument: str, make: Callable[[], Tensor]) -> Tensor:
    """What `make` returns, on the device: made and copied once for a key that is in use.

    `argument` is the name of what it is made from, for the error while a graph is captured.
    """
    captured = capturing(device)
    with _lock:
        found = _kept.pop((key, device), None)
        if found is None:
            if captured:
                raise RuntimeError(
                    f"{argument}: expected what the device knows, got a new one, {key}, while a "
                    "CUDA graph is captured. Run the op with it once before."
                )
            for old in [k for k, data in _kept.items() if not data.captured][
                : max(0, len(_kept) - KEPT + 1)
            ]:
                del _kept[old]
            found = OnDevice(make(), device)
        found.captured |= captured
        _kept[key, device] = found  # the last of them
        return found.get()


class Tickets:
    """Counters by which the programs of one launch find out which of them is the last.

    Launches that can run side by side never share one: each stream has its own, and so has each
    launch in a CUDA graph, for good: nothing tells when a graph is gone.
    """

    SLOTS = 2**18  # 1 MiB

    def __init__(self, device: torch.device):
        self.zeros = OnDevice(torch.zeros(self.SLOTS, dtype=torch.int32), device)
        self.slots: dict[object, int] = {}
        self.taken = 0
        self.lock = threading.Lock()

    def take(self, key: object, count: int) -> Tensor | None:
        with self.lock:
            if (key, count) not in self.slots:
                if self.taken + count > self.SLOTS:
                    return None
                self.slots[key, count] = self.taken
                self.taken += count
            slot = self.slots[key, count]
        return self.zeros.get()[slot : slot + count]


_tickets: dict[torch.device, Tickets] = {}


def tickets(device: torch.device, count: int = 1) -> Tensor:
    """int32 zeros on the device, `[count]`; the last program at each sets it back to zero."""
    if device.type == "cuda":
        captured = capturing(device)
        if device not in _tickets and not captured:
            _tickets[device] = Tickets(device)
        key = object() if captured else torch.cuda.current_stream(device).cuda_stream
        taken = _tickets[device].take(key, count) if device in _tickets else None
        if taken is not None:
            return taken
    return torch.zeros(count, dtype=torch.int32, device=device)  # in a graph, one more node
