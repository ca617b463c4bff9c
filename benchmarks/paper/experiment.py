"""One run: a method over one stream, evaluated after every task."""

import json
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, distributed, nn

from benchmarks.paper import variants  # noqa: F401  adds its methods
from benchmarks.paper.checkpoint import Checkpoint, CheckpointError, one_line
from benchmarks.paper.methods import Method, Settings, make_learner
from benchmarks.paper.streams import Dataset, Task, digest, make_stream
from bld_ext import MultiHead, SeededAugment

TIMES = ("seconds", "step_ms", "images_per_s")  # keys of a record that differ from run to run


def run(
    dataset: Dataset,
    method: str,
    settings: Settings,
    seed: int,
    device: str = "cpu",
    progress: Callable[[int], None] = lambda batches: None,
    checkpoint: Path | None = None,
    resume: bool = False,
    every: float = 120.0,
    process_group: object = False,
) -> dict:
    """Train `method` over the stream of `seed`; `progress(1)` is called after each batch.

    Split, order, initial weights of network and heads, and views depend on the seed alone, so they
    are the same for every method.

    Args:
        checkpoint: the file for the state of the run, written every `every` seconds and after each
            task.
        resume: whether to go on from that file, if it exists. The result is bitwise equal to that
            of a run that was never interrupted.
        process_group: of the processes that share the views; only rank 0 has a checkpoint.

    Returns:
        A JSON-ready record. `accuracy[i][j]`: test accuracy in percent of task j after task i;
        `memory`: the peak bytes held for each purpose; `columns`: the peak bytes in the columns of
        the paper's tables; `factors`: for each task, the mean log10 of each layer's balance factor;
        `weights`: a digest of the final network; `seconds`: time of the whole run; `step_ms` and
        `images_per_s`: speed of learning, without evaluations and checkpoints; `allocated`: on a
        GPU, the peak bytes of its allocator.
    """
    stream = make_stream(dataset, settings.tasks, seed, settings.limit)
    _forget_peak(device)
    torch.manual_seed(seed)
    learner = make_learner(method, settings, seed, device, process_group)
    what = conditions(dataset, method, settings, seed, device)
    saved = Checkpoint(checkpoint, what, every) if checkpoint else None
    going = Run(learner, device, progress, saved, process_group)
    if resume:
        going.restore()
    for number, task in enumerate(stream):
        if going.is_before(number):
            torch.manual_seed(seed + 1000 * (number + 1))
            learner.begin(task)
            learner.model.add_head(len(task.classes))
        if going.state.task == number:
            going.learn(task)
            going.evaluate(stream[: number + 1])
    classes = [list(task.classes) for task in stream]
    return {"method": method, "seed": seed, "classes": classes} | going.record(stream)


@dataclass
class State:
    """How far a run has come and what it measured so far, as saved in a checkpoint."""

    task: int = 0
    epoch: int = 0
    batch: int = 0  # batches learned in this epoch
    batches: int = 0
    images: int = 0
    seconds: float = 0.0
    learning: float = 0.0  # seconds, without evaluations and checkpoints
    accuracy: list[list[float]] = field(default_factory=list)
    memory: dict[str, int] = field(default_factory=dict)
    columns: dict[str, int] = field(default_factory=dict)
    factors: list[dict[str, float]] = field(default_factory=list)
    summed: dict | None = None  # sums of log10 of the layers' factors in this task, on the device

    def account(self, learner: Method) -> None:
        """Update the peak bytes, and add up the logarithms of the layers' factors."""
        last = learner.optimizer.last
        for purpose, size in last.memory.items():
            self.memory[purpose] = max(size, self.memory.get(purpose, 0))
        for column, size in learner.extra_bytes().items():
            self.columns[column] = max(size, self.columns.get(column, 0))
        for factors in last.factors:
            if self.summed is None:
                sums, counts = factors.new_zeros(2, len(factors), dtype=torch.float64)
                self.summed = {"layers": list(last.layers), "sums": sums, "counts": counts}
            balanced = factors > 0
            self.summed["sums"] += torch.where(balanced, factors.double().log10(), 0)
            self.summed["counts"] += balanced

    def mean_logarithms(self) -> dict[str, float]:
        """Return the mean log10 factor of each layer that was balanced."""
        if self.summed is None:
            return {}
        columns = [self.summed["layers"]] + [self.summed[k].tolist() for k in ("sums", "counts")]
        return {name: total / count for name, total, count in zip(*columns, strict=True) if count}


class Run:
    """A learner that goes through a stream, with its state saved from time to time."""

    def __init__(
        self,
        learner: Method,
        device: str,
        progress: Callable[[int], None],
        saved: Checkpoint | None,
        process_group: object,
    ):
        self.learner, self.device, self.progress, self.saved = learner, device, progress, saved
        self.process_group = process_group
        self.state = State()
        self.start = time.perf_counter()

    def restore(self) -> None:
        """Restore the run from its checkpoint, if there is one."""
        state = self.saved.load(self.device) if self.saved and self.saved.exists() else None
        if self.process_group is not False:
            states = [state]
            distributed.broadcast_object_list(states, group=self.process_group, group_src=0)
            (state,) = states
        if state is None:
            return
        try:
            self.learner.model.load_state_dict(state["model"])
            self.learner.load_state_dict(state["learner"])
            self.state = State(**{each.name: state[each.name] for each in fields(State)})
        except (KeyError, RuntimeError, ValueError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"checkpoint {self.saved.path}: its state does not fit ({one_line(error)}). Remove "
                "it, or start without --resume"
            ) from error
        self.progress(self.state.batches)
        self.start -= self.state.seconds

    def save(self) -> None:
        self.state.seconds = time.perf_counter() - self.start
        if self.saved:
            model, learner = self.learner.model.state_dict(), self.learner.state_dict()
            self.saved.save(vars(self.state) | {"model": model, "learner": learner})

    def is_before(self, task: int) -> bool:
        """Return whether this task comes next and nothing of it has been learned."""
        state = self.state
        has_begun = state.epoch or state.batch or len(self.learner.model.heads) > task
        return state.task == task and not has_begun

    def learn(self, task: Task) -> None:
        """Learn the rest of a task; only a checkpoint and the end of the task wait for a GPU."""
        state, since = self.state, time.perf_counter()

        def count_time() -> None:
            nonlocal since
            synchronize(self.device)
            now = time.perf_counter()
            state.learning, since = state.learning + now - since, now

        for epoch in range(state.epoch, self.learner.epochs):
            state.epoch = epoch
            for k, (where, images, labels) in enumerate(self.learner.batches(task, epoch)):
                if k < state.batch:
                    continue
                self.learner.learn(where, images.to(self.device), labels.to(self.device))
                state.account(self.learner)
                state.batch, state.batches = k + 1, state.batches + 1
                state.images += len(images)
                self.progress(1)
                if self.saved and self.saved.due():
                    count_time()
                    self.save()
                    since = time.perf_counter()
            state.batch = 0
        count_time()

    def evaluate(self, seen: list[Task]) -> None:
        """End a task: measure the accuracy of all tasks so far, and save the run."""
        state = self.state
        state.accuracy.append([evaluate(self.learner.model, t, j) for j, t in enumerate(seen)])
        state.factors.append(state.mean_logarithms())
        state.task, state.epoch, state.batch, state.summed = len(seen), 0, 0, None
        self.save()

    def record(self, stream: list[Task]) -> dict:
        state, model = self.state, self.learner.model
        record = {
            "accuracy": state.accuracy,
            "accuracy_with_batch_statistics": evaluate_by_test_batch(model, stream),
            "memory": state.memory,
            "columns": state.columns,
            "factors": state.factors,
            "batches": state.batches,
            "weights": digest(model.state_dict()),
            "seconds": round(time.perf_counter() - self.start, 1),
            "step_ms": round(1e3 * state.learning / state.batches, 3),
            "images_per_s": round(state.images / state.learning, 1),
        }
        if self.device.startswith("cuda"):
            record["allocated"] = torch.cuda.max_memory_allocated(self.device)
        return record


def conditions(dataset: Dataset, method: str, settings: Settings, seed: int, device: str) -> dict:
    """Return everything a run depends on; it is resumed only if none of it has changed."""
    return {
        "method": method,
        "seed": seed,
        "dataset": dataset.name,
        "images": dataset.digest,
        "device": device.partition(":")[0],
        "bld_ext": version("bld_ext"),
        "torch": str(torch.__version__),
        **json.loads(json.dumps(settings.as_dict())),
    }


def _forget_peak(device: str) -> None:
    """Reset the allocator's peak, so that it measures this run only."""
    if device.startswith("cuda"):
        torch.zeros(1, device=device)  # without an allocation there are no statistics yet
        torch.cuda.reset_peak_memory_stats(device)


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def evaluate(model: MultiHead, task: Task, head: int, batch: int = 500) -> float:
    """Return the test accuracy of a task under its own head, in percent, in eval mode."""
    device = next(model.parameters()).device
    plain = SeededAugment().plain
    correct = 0
    for x, y in zip(task.x_test.split(batch), task.y_test.split(batch), strict=True):
        images = plain(x.to(device))
        if len(images) == 1:  # batch statistics of a single value do not exist
            images = images.repeat(2, 1, 1, 1)
        correct += int((model.predict(images, head)[: len(y)] == y.to(device)).sum())
    return 100 * correct / len(task.y_test)


def evaluate_by_test_batch(model: MultiHead, stream: list[Task]) -> list[float]:
    """Return each task's accuracy with images normalised by their own mixed batch: a diagnostic."""
    with batch_statistics(model):
        return [evaluate(model, task.with_mixed_tests(), j) for j, task in enumerate(stream)]


@contextmanager
def batch_statistics(model: nn.Module):
    """Let BatchNorm use batch statistics in eval mode too: a diagnostic, not a result."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    held: list[tuple[Tensor, Tensor]] = [(m.running_mean, m.running_var) for m in norms]
    for norm in norms:
        norm.running_mean = norm.running_var = None
    try:
        yield
    finally:
        for norm, (mean, variance) in zip(norms, held, strict=True):
            norm.running_mean, norm.running_var = mean, variance
