"""Processes: a step that is divided among several processes of torch.distributed."""

import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, distributed, nn

from bld_ext.api.shards import plain

SHARDS = ("views", "images")
COMPARED = 2  # batches at the start whose digest is compared
SAMPLED = 4096  # values of a batch whose places count in its checksum
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes


@dataclass
class Seen:
    """What the other processes need to know of a rank before a batch."""

    error: str  # empty if it has none
    images: int
    digest: int
    shapes: dict[str, object]  # of the parameters, in their order
    settings: dict[str, str]
    state: int  # a digest of the base optimizer's


class Processes:
    """The processes that share a step, and what each of them has of it.

    Alone, in one process, nothing is sent and each method leaves things as they are.

    Args:
        group: a ProcessGroup, a DeviceMesh of one dimension, False for a process alone, or None,
            which is False unless there are other processes.
        shard: "views" or "images".
    """

    def __init__(self, group: object, shard: str):
        self.group = _group_of(group)
        self.shard = shard
        self.size = 1 if self.group is None else distributed.get_world_size(self.group)
        self.rank = 0 if self.group is None else distributed.get_rank(self.group)
        if self.size == 1:
            self.group = None  # which can be copied and saved
        self.first_image = 0  # number of this rank's first image among those of all ranks
        self._mark: tuple[int, Tensor | None] = 0, None
        self._known: set[Tensor] = set()
        self._compared = 0

    @property
    def alone(self) -> bool:
        return self.size == 1

    @property
    def ranks(self) -> set[int]:
        """The global ranks of all of them."""
        if self.group is None:
            return {distributed.get_rank()} if _are_others() else {0}
        return {*distributed.get_process_group_ranks(self.group)}

    def views(self, count: int) -> range:
        """The views that this process makes: every R-th, or all of them for its own images."""
        if self.alone or self.shard == "images":
            return range(count)
        if count < self.size:
            raise ValueError(
                f"views: expected at least {self.size}, one for each process, got {count}; or use "
                "shard='images'"
            )
        return range(self.rank, count, self.size)

    def most_views(self, count: int) -> int:
        """The number of views of a process that makes the most."""
        return count if self.shard == "images" else -(-count // self.size)

    # ---- sums over all processes ----

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over all processes, with one all_reduce a dtype.

        Gradients of sharded parameters are left out, as FSDP has added them up.
        """
        if self.alone:
            return
        _flattened(plain(tensors), lambda flat: distributed.all_reduce(flat, group=self.group))

    def mark(self, where: object, images: Tensor | None, labels: Tensor | None) -> None:
        """Have each sum of gradients compare what this process is doing with the others.

        `where` has the batch's number, the stage and the settings. Images and labels are those that
        all processes have, or None.
        """
        if not self.alone:
            both = (images, labels)
            sums = None if images is None else torch.cat([_checksum(t) for t in both])
            self._mark = zlib.crc32(repr(where).encode()), sums

    def _marks(self, like: Tensor) -> Tensor:
        """A few whole numbers below 2^15, so that their sum over 512 processes is exact."""
        digest, sums = self._mark
        marks = like.new_tensor([digest % 2**15, digest // 2**15 % 2**15])
        return marks if sums is None else torch.cat((marks, sums.to(marks)))

    def _require_same(self, own: Tensor, total: Tensor) -> None:
        if not torch.equal(own * self.size, total):
            raise RuntimeError(
                "process_group: the processes are no longer at the same step. One of them has left "
                "out a batch or a step, or has another batch, other settings or other parameters. "
                "Load the last checkpoint on all of them"
            )

    def sum_flags(self, flags: Sequence[bool], like: Tensor, sums: Sequence[Tensor]) -> list[bool]:
        """Add up `sums`, and return which flags are set on some process."""
        marks = self._marks(like)
        came = torch.cat((like.new_tensor([float(flag) for flag in flags]), marks))
        self.sum_([*sums, came])
        count = len(flags)
        self._require_same(marks, came[count:])
        return [n > 0 for n in came[:count].tolist()]

    def sum_gradients(self, params: Iterable[Tensor], losses: Sequence[Tensor]) -> None:
        """Add up .grad and the losses; a gradient that no process has stays None."""
        if self.alone:
            return
        params = [p for p in plain(params) if p.requires_grad]
        (grads,) = self._sum_sets(params, [[p.grad for p in params]], losses)
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad

    def sum_both(
        self, params: list[Tensor], second: dict[Tensor, Tensor], losses: Sequence[Tensor]
    ) -> dict[Tensor, Tensor]:
        """Add up .grad, a second gradient, which is returned, and the losses."""
        if self.alone:
            return second
        sets = [[p.grad for p in params], [second.get(p) for p in params]]
        first, found = self._sum_sets(params, sets, losses)
        for param, grad in zip(params, first, strict=True):
            param.grad = grad
        return {p: g for p, g in zip(params, found, strict=True) if g is not None}

    def _sum_sets(
        self,
        params: list[Tensor],
        sets: Sequence[list[Tensor | None]],
        losses: Sequence[Tensor],
    ) -> list[list[Tensor | None]]:
        here = [g is not None for of_params in sets for g in of_params]
        grads = [
            torch.zeros_like(p) if g is None else g
            for of_params in sets
            for p, g in zip(params, of_params, strict=True)
        ]
        came = self.sum_flags(here, losses[0], [*grads, *losses])
        found = [g if there else None for g, there in zip(grads, came, strict=True)]
        return [found[i * len(params) : (i + 1) * len(params)] for i in range(len(sets))]

    def carry_on(self, params: Iterable[Tensor]) -> None:
        """Keep a gradient that was added up on rank 0 alone, so that a further sum has it once."""
        if self.rank:
            for param in plain(params):
                if param.grad is not None:
                    param.grad.zero_()

    # ---- agreement ----

    def must_compare(self, check_finite: bool) -> bool:
        """Return whether the ranks compare their batches before this one."""
        always = check_finite or self.shard == "images"
        return not self.alone and (always or self._compared < COMPARED)

    @torch.no_grad()
    def agree(self, model: nn.Module) -> bool:
        """Take parameters and buffers over from rank 0 where a parameter is met first.

        Returns whether that was so.
        """
        params = [*model.parameters()]
        if self.alone or self._known >= {*params}:
            return False
        values = plain([*params, *model.buffers()])

        def broadcast(flat: Tensor) -> None:  # as bytes, since gloo does not know all types
            distributed.broadcast(flat.view(torch.uint8), group=self.group, group_src=0)

        _flattened(values, broadcast)
        self._known = {*params}
        return True

    def from_rank_0(self, value: object) -> object:
        if self.alone:
            return value
        values = [value]
        distributed.broadcast_object_list(values, group=self.group, group_src=0)
        return values[0]

    def compare(
        self,
        error: Exception | None,
        images: object,
        labels: object,
        shapes: dict[str, object],
        settings: dict[str, str],
        state: int,
    ) -> None:
        """Tell the others of an error of this rank, and compare the batches and settings of all.

        `shapes` are those of the parameters, and `state` a digest of the base optimizer's.

        Raises:
            Exception: `error`, or on the other ranks a RuntimeError that tells of it.
            ValueError: the processes have different settings, parameters, states or, with
                shard="views", batches.
        """
        self._compared += 1
        seen: list[Seen | None] = [None] * self.size
        tensors = isinstance(images, Tensor) and isinstance(labels, Tensor)
        digest = _digest(images, labels) if tensors and self.shard == "views" else 0
        text = "" if error is None else f"{type(error).__name__}: {error}"
        count = len(images) if isinstance(images, Tensor) and images.dim() else 0
        own = Seen(text, count, digest, shapes, settings | {"shard": repr(self.shard)}, state)
        distributed.all_gather_object(seen, own, group=self.group)
        if error is not None:
            raise error
        for rank, other in enumerate(seen):
            if other.error:
                raise RuntimeError(f"rank {rank} could not begin this batch: {other.error}")
            for name, value in own.settings.items():
                if other.settings.get(name) != value:
                    raise ValueError(
                        f"{name}: expected the same on every rank, got {value} here and "
                        f"{other.settings.get(name)} on rank {rank}"
                    )
            if [*other.shapes.items()] != [*shapes.items()]:
                raise ValueError(
                    f"model: expected the same parameters on every rank, got others on rank {rank},"
                    " or in another order. Add heads and parameter groups on all ranks"
                )
            if other.state != state:
                raise ValueError(
                    f"base: expected its state to be the same on every rank, got another one on "
                    f"rank {rank}. Call load_state_dict on all ranks"
                )
        if self.shard == "views" and len({other.digest for other in seen}) > 1:
            raise ValueError(
                "images, labels: expected the same batch on every rank with shard='views', got "
                "different ones. Load the batches in the same order, or use shard='images'"
            )
        if self.shard == "images":
            self.first_image = sum(other.images for other in seen[: self.rank])

    def forget(self) -> None:
        """Take everything over from rank 0 again before the next batch, and compare."""
        self._known, self._compared = set(), 0

    def __getstate__(self) -> dict:
        if self.alone:
            return self.__dict__
        raise TypeError(
            "BLDOptimizer: a process group cannot be copied or saved; save optimizer.state_dict()"
        )


def _are_others() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def _group_of(given: object) -> object | None:
    size = distributed.get_world_size() if _are_others() else 1
    if given is False or (given is None and size == 1):
        return None
    if given is None:
        raise ValueError(
            f"process_group: there are {size} processes, whose networks would drift apart. Give "
            "process_group=torch.distributed.group.WORLD to divide each step among them, or "
            "process_group=False to let this process learn alone"
        )
    if hasattr(given, "get_group") and hasattr(given, "ndim"):  # a DeviceMesh
        if given.ndim != 1:
            raise ValueError(
                f"process_group: expected a DeviceMesh of one dimension, got {given.ndim}; choose "
                "one with mesh['name']"
            )
        given = given.get_group()
    if not (distributed.is_available() and isinstance(given, distributed.ProcessGroup)):
        raise TypeError(
            "process_group: expected a ProcessGroup, a DeviceMesh, False or None, got "
            f"{type(given).__name__}"
        )
    return given


def _flattened(tensors: Sequence[Tensor], change: Callable[[Tensor], object]) -> None:
    """Let `change` write to the tensors of each dtype as one vector."""
    for dtype in dict.fromkeys(t.dtype for t in tensors):
        own = [t for t in tensors if t.dtype == dtype]
        flat = torch.cat([t.reshape(-1) for t in own])
        change(flat)
        for t, part in zip(own, flat.split([t.numel() for t in own]), strict=True):
            t.copy_(part.view(t.shape))


def _checksum(tensor: Tensor) -> Tensor:
    """Two whole numbers below 2^15: of all values, and of some with their places. On the device."""
    values = tensor.detach().contiguous().reshape(-1).view(INTEGERS[tensor.element_size()])
    some = values[:: max(1, len(values) // SAMPLED)].to(torch.int64)
    places = torch.arange(1, len(some) + 1, device=some.device)
    sums = values.sum(dtype=torch.int64), (some * places).sum()
    return torch.stack(sums) % 32749  # a prime


def digest_of(tensors: Iterable[Tensor]) -> int:
    """A checksum of the values that every process should have alike; it waits for the device."""
    return _digest(*plain(tensors))


def _digest(*tensors: Tensor) -> int:
    """A checksum of the values; it waits for the device."""
    found = 0
    for tensor in tensors:
        values = tensor.detach().cpu().contiguous().reshape(-1)
        found = zlib.crc32(values.view(torch.uint8).numpy(), found)
    return found
