"""One run: a method over one stream, evaluated after every task."""

import json
import math
import time
from collections.abc import Callable
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.paper.checkpoint import Checkpoint, CheckpointError, one_line
from benchmarks.paper.methods import Method, Settings, make_learner
from benchmarks.paper.streams import Dataset, Task, digest, make_stream
from bld_ext import MultiHead, SeededAugment


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
) -> dict:
    """Train `method` over the stream of `seed`; `progress(1)` is called after each batch.

    Split, order, initial weights of network and heads, and views depend on the seed alone, so they
    are the same for every method.

    Args:
        checkpoint: a file that holds the state of the run, written every `every` seconds and after
            each task, and removed at the end.
        resume: go on from that file, if it is there, to the same bits as a run that never stopped.

    Returns:
        A JSON-ready record. `accuracy[i][j]`: test accuracy in percent of task j after task i;
        `memory`: the most bytes that were held for each purpose; `columns`: those of the paper's
        tables; `factors`: of each task the mean of log10 of each layer's balance factor;
        `weights`: a digest of the network at the end; `allocated`: on a GPU, the most bytes that
        its allocator had given out.
    """
    stream = make_stream(dataset, settings.tasks, seed, settings.limit)
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
    torch.manual_seed(seed)
    learner = make_learner(method, settings, seed, device)
    model = learner.model
    what = conditions(dataset, method, settings, seed, device)
    saved = Checkpoint(checkpoint, what, every) if checkpoint else None
    state = _fresh()
    if saved and resume and saved.exists():
        state = saved.load(device)
        try:
            model.load_state_dict(state.pop("model"))
            learner.load_state_dict(state.pop("learner"))
            state = {name: state[name] for name in _fresh()}
        except (KeyError, RuntimeError, ValueError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"checkpoint {checkpoint}: its state does not fit ({one_line(error)}). Remove it, "
                "or start without --resume"
            ) from error
        progress(state["batches"])
    start = time.perf_counter() - state["seconds"]

    def save(force: bool = False) -> None:
        state["seconds"] = time.perf_counter() - start
        if saved and (force or saved.due()):
            saved.save(state | {"model": model.state_dict(), "learner": learner.state_dict()})

    for number in range(state["task"], len(stream)):
        task = stream[number]
        if state["epoch"] == state["batch"] == 0 and len(model.heads) == number:
            torch.manual_seed(seed + 1000 * (number + 1))
            learner.begin(task)
            model.add_head(len(task.classes))
            state["factors"].append({})
        for epoch in range(state["epoch"], learner.epochs):
            state["epoch"] = epoch
            for k, (where, images, labels) in enumerate(learner.batches(task, epoch)):
                if k < state["batch"]:
                    continue
                learner.learn(where, images.to(device), labels.to(device))
                _account(state, learner)
                state["batch"], state["batches"] = k + 1, state["batches"] + 1
                progress(1)
                save()
            state["batch"] = 0
        seen = stream[: number + 1]
        state["accuracy"].append([evaluate(model, t, j) for j, t in enumerate(seen)])
        state.update(task=number + 1, epoch=0, batch=0)
        save(force=True)
    with batch_statistics(model):
        diagnostic = [evaluate(model, task, j) for j, task in enumerate(stream)]
    record = {
        "method": method,
        "seed": seed,
        "classes": [list(task.classes) for task in stream],
        "accuracy": state["accuracy"],
        "accuracy_with_batch_statistics": diagnostic,
        "memory": state["memory"],
        "columns": state["columns"],
        "factors": [
            {name: total / count for name, (total, count) in layers.items()}
            for layers in state["factors"]
        ],
        "batches": state["batches"],
        "weights": digest(model.state_dict()),
        "seconds": round(time.perf_counter() - start, 1),
    }
    if device.startswith("cuda"):
        record["allocated"] = torch.cuda.max_memory_allocated(device)
    return record


def conditions(dataset: Dataset, method: str, settings: Settings, seed: int, device: str) -> dict:
    """What a run depends on: it goes on under the same only."""
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


def _fresh() -> dict:
    return dict(
        task=0, epoch=0, batch=0, batches=0, seconds=0.0, accuracy=[], memory={}, columns={},
        factors=[],
    )  # fmt: skip


def _account(state: dict, learner: Method) -> None:
    """The most bytes so far, and the layers' factors."""
    last = learner.optimizer.last
    for purpose, size in last.memory.items():
        state["memory"][purpose] = max(size, state["memory"].get(purpose, 0))
    for column, size in learner.extra_bytes().items():
        state["columns"][column] = max(size, state["columns"].get(column, 0))
    for factors in last.factors:
        for name, factor in zip(last.layers, factors.tolist(), strict=True):
            if factor > 0:
                total, count = state["factors"][-1].get(name, (0.0, 0))
                state["factors"][-1][name] = (total + math.log10(factor), count + 1)


def evaluate(model: MultiHead, task: Task, head: int, batch: int = 500) -> float:
    """Test accuracy in percent of a task under its own head, in eval mode."""
    device = next(model.parameters()).device
    plain = SeededAugment()  # uint8 to float, nothing drawn
    correct = 0
    for x, y in zip(task.x_test.split(batch), task.y_test.split(batch), strict=True):
        images = plain(x.to(device), seed=0, step=0, views=[0])
        correct += int((model.predict(images, head) == y.to(device)).sum())
    return 100 * correct / len(task.y_test)


@contextmanager
def batch_statistics(model: nn.Module):
    """A diagnostic, no result: BatchNorm normalises even in eval mode by the batch it sees."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    held: list[tuple[Tensor, Tensor]] = [(m.running_mean, m.running_var) for m in norms]
    for norm in norms:
        norm.running_mean = norm.running_var = None
    try:
        yield
    finally:
        for norm, (mean, variance) in zip(norms, held, strict=True):
            norm.running_mean, norm.running_var = mean, variance
