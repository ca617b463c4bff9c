"""Capture: records a whole step as one CUDA graph and replays it for batches of the same shape.

What differs from batch to batch is read from the device: images, labels, the learning rates, λ, the
seed and the batch's number. Everything else belongs to the key. When the key changes, the next
batch is learned without a graph, and the one after it records a new graph. A base optimizer that
keeps state creates it in its first step, which also changes the key.
"""

import gc
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bld_ext.api.model_optimizer import EVERY_STEP

if TYPE_CHECKING:
    from bld_ext.api.optimizer import BLDOptimizer


class CudaGraph:
    """Records the kernels that a function launches, without running them, and replays them."""

    def __init__(self, device: torch.device):
        if device.type != "cuda":
            raise ValueError(f"capture: expected False on {device}; CUDA graphs need a GPU")
        self._device = device
        self._graph = torch.cuda.CUDAGraph()

    def rehearse(self, function: Callable[[], Tensor]) -> Tensor:
        """Run `function` on a side stream, which torch requires before a recording."""
        with torch.cuda.device(self._device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                result = function()
            torch.cuda.current_stream().wait_stream(side)
        return result

    def record(self, function: Callable[[], Tensor]) -> Tensor:
        generator, collects = torch.cuda.default_generators[self._device.index], gc.isenabled()
        state = generator.get_state()
        gc.collect()  # a graph freed during the recording of another would end that recording
        gc.disable()
        try:
            with torch.cuda.device(self._device), torch.cuda.graph(self._graph):
                return function()
        except BaseException:
            # torch leaves its generator in recording mode, in which no number can be drawn
            usual = torch.Generator(self._device)
            usual.set_state(state)
            generator.graphsafe_set_state(usual)
            raise
        finally:
            if collects:
                gc.enable()

    def replay(self) -> None:
        with torch.cuda.device(self._device):
            self._graph.replay()


class Scalars:
    """The numbers that may change between two replays, as scalars on the device."""

    def __init__(self, device: torch.device, groups: int):
        def scalar(dtype):
            return torch.zeros((), dtype=dtype, device=device)

        self.rates = [scalar(torch.float64) for _ in range(groups)]
        self.balance = scalar(torch.float64)
        self.seed, self.number = scalar(torch.int64), scalar(torch.int64)

    def fill(self, rates: list[float | Tensor], balance: float, seed: int, number: int) -> None:
        """Set all scalars, in stream order and without waiting for the device."""
        scalars = (*self.rates, self.balance, self.seed, self.number)
        for scalar, value in zip(scalars, (*rates, balance, seed, number), strict=True):
            scalar.copy_(value) if isinstance(value, Tensor) else scalar.fill_(value)


class CapturedStep:
    """A step on images, labels and scalars whose addresses never change.

    It runs the first batch without a graph, records the second and replays it, and replays the
    graph for all others.
    """

    def __init__(self, key: object, images: Tensor, labels: Tensor, groups: int):
        self.key = key
        self.graph = CudaGraph(images.device)
        self.images, self.labels = torch.empty_like(images), torch.empty_like(labels)
        self.scalars = Scalars(images.device, groups)
        self.rehearsed = False
        self.recorded: tuple[Tensor, object] | None = None  # loss and report

    def run(self, step: Callable[[], tuple[Tensor, object]]) -> tuple[Tensor, object]:
        """Return loss and report of `step()`, which reads the tensors held here.

        Each replay overwrites the values of both.
        """
        if not self.rehearsed:
            result = self.graph.rehearse(step)
            self.rehearsed = True
            return result
        if self.recorded is None:
            try:
                self.recorded = self.graph.record(step)
            except Exception as error:
                raise RuntimeError(
                    f"capture: the step cannot be recorded as a CUDA graph ({error}). Look for "
                    "what waits for the device or allocates outside of torch: a hook or an augment "
                    "of your own, or a base optimizer without capturable=True or fused=True; and "
                    "for a loss or logits of your own that still hold the parameters' graph. The "
                    "network has not changed; capture=False goes without a graph"
                ) from error
        self.graph.replay()
        return self.recorded


class Recorder:
    """Learns batches by a recorded step, and records another when the key changes."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        self.recorded: CapturedStep | None = None
        self.scalars: Scalars | None = None  # set while a captured step runs

    def run(
        self,
        key: object,
        images: Tensor,
        labels: Tensor,
        rates: Sequence[float | Tensor],
        numbers: tuple[float, int, int],
        step: Callable[[Tensor, Tensor], tuple[Tensor, object]],
    ) -> tuple[Tensor, object]:
        """Return loss and report of `step(images, labels)`.

        `numbers` are λ, the seed and the batch's number.
        """
        if self.recorded is None or self.recorded.key != key:
            self.recorded = None  # free its memory first
            self.recorded = CapturedStep(key, images, labels, len(rates))
        recorded = self.recorded
        recorded.images.copy_(images)
        recorded.labels.copy_(labels)
        recorded.scalars.fill(list(rates), *numbers)
        try:
            self.scalars = recorded.scalars
            return recorded.run(lambda: step(recorded.images, recorded.labels))
        except BaseException:
            self.recorded = None
            raise
        finally:
            self.scalars = None

    def __getstate__(self) -> dict:
        return {"recorded": None, "scalars": None}


def key_of(
    optimizer: "BLDOptimizer", images: Tensor, labels: Tensor, sizes: Sequence[int]
) -> tuple:
    """Return the key of a step: everything that a recorded step depends on and cannot change."""
    o = optimizer
    settings = [o.temperature, o.joint_steps, o.views, o.views_in_pass, o.layer, o.schedule]
    settings += [o.precision, o.balance is None, o.balance == 0, o.warmup_ratio]
    settings += [o._format.channels_last(o.model), o.augment, repr(o.augment), o.ignore_index]
    batch = [(tuple(t.shape), t.stride(), t.dtype, t.device) for t in (images, labels)]
    # hooks are identified by the ids of their handles, which are unique
    params = [
        (
            *(id(p), p.data_ptr(), p.requires_grad),
            *(p._backward_hooks or ()),
            *(p._post_accumulate_grad_hooks or ()),
        )
        for group in o.param_groups
        for p in group["params"]
    ]
    modules = [
        (
            *(id(m), type(m), m.training, m.extra_repr()),
            *(*m._forward_hooks, *m._forward_pre_hooks),
            *(*m._backward_hooks, *m._backward_pre_hooks),
        )
        for m in o.model.modules()
    ]
    base = [(*o.base._optimizer_step_pre_hooks, *o.base._optimizer_step_post_hooks)]
    values = [v for entry in o.state.values() for v in entry.values()]
    kept = [*o.model.buffers(), *(v for v in values if isinstance(v, Tensor))]
    places = [t.data_ptr() for t in kept]
    options = [{k: v for k, v in group.items() if k not in EVERY_STEP} for group in o.param_groups]
    return (*settings, *batch, *sizes, *params, *modules, *base, *places, repr(options))
