"""One run: a method over one stream, evaluated after every task."""

import json
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

TIMES = ("seconds", "step_ms", "images_per_s")  # of a record; all else is the same every time


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
        `weights`: a digest of the network at the end; `seconds`: of the whole run; `step_ms` and
        `images_per_s`: of learning alone, without evaluations and checkpoints; `allocated`: on a
        GPU, the most bytes that its allocator had given out.
    """
    stream = make_stream(dataset, settings.tasks, seed, settings.limit)
    if device.startswith("cuda"):
        torch.zeros(1, device=device)  # there are no statistics before
        torch.cuda.reset_peak_memory_stats(device)
    torch.manual_seed(seed)
    learner = make_learner(method, settings, seed, device)
    what = conditions(dataset, method, settings, seed, device)
    saved = Checkpoint(checkpoint, what, every) if checkpoint else None
    state = _fresh()
    if saved and resume and saved.exists():
        state = _restore(saved, learner, device)
        progress(state["batches"])
    start = time.perf_counter() - state["seconds"]

    def save() -> None:
        state["seconds"] = time.perf_counter() - start
        if saved:
            model = learner.model.state_dict()
            saved.save(state | {"model": model, "learner": learner.state_dict()})

    for number in range(state["task"], len(stream)):
        task = stream[number]
        if state["epoch"] == state["batch"] == 0 and len(learner.model.heads) == number:
            torch.manual_seed(seed + 1000 * (number + 1))
            learner.begin(task)
            learner.model.add_head(len(task.classes))
        _learn_task(state, learner, task, device, progress, saved.due if saved else bool, save)
        seen = stream[: number + 1]
        state["accuracy"].append([evaluate(learner.model, t, j) for j, t in enumerate(seen)])
        state["factors"].append(_mean_logarithms(state["summed"]))
        state.update(task=number + 1, epoch=0, batch=0, summed=None)
        save()
    with batch_statistics(learner.model):
        diagnostic = [evaluate(learner.model, task, j) for j, task in enumerate(stream)]
    record = {
        "method": method,
        "seed": seed,
        "classes": [list(task.classes) for task in stream],
        "accuracy": state["accuracy"],
        "accuracy_with_batch_statistics": diagnostic,
        "memory": state["memory"],
        "columns": state["columns"],
        "factors": state["factors"],
        "batches": state["batches"],
        "weights": digest(learner.model.state_dict()),
        "seconds": round(time.perf_counter() - start, 1),
        "step_ms": round(1e3 * state["learning"] / state["batches"], 3),
        "images_per_s": round(state["images"] / state["learning"], 1),
    }
    if device.startswith("cuda"):
        record["allocated"] = torch.cuda.max_memory_allocated(device)
    return record


def _learn_task(
    state: dict,
    learner: Method,
    task: Task,
    device: str,
    progress: Callable[[int], None],
    due: Callable[[], bool],
    save: Callable[[], None],
) -> None:
    """What is left of a task; nothing in here waits for a GPU, but a checkpoint."""
    since = time.perf_counter()

    def count_time() -> None:
        nonlocal since
        synchronize(device)
        now = time.perf_counter()
        state["learning"], since = state["learning"] + now - since, now

    for epoch in range(state["epoch"], learner.epochs):
        state["epoch"] = epoch
        for k, (where, images, labels) in enumerate(learner.batches(task, epoch)):
            if k < state["batch"]:
                continue
            learner.learn(where, images.to(device), labels.to(device))
            _account(state, learner)
            state["batch"], state["batches"] = k + 1, state["batches"] + 1
            state["images"] += len(images)
            progress(1)
            if due():
                count_time()
                save()
                since = time.perf_counter()
        state["batch"] = 0
    count_time()


def _restore(saved: Checkpoint, learner: Method, device: str) -> dict:
    state = saved.load(device)
    try:
        learner.model.load_state_dict(state.pop("model"))
        learner.load_state_dict(state.pop("learner"))
        return {name: state[name] for name in _fresh()}
    except (KeyError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"checkpoint {saved.path}: its state does not fit ({one_line(error)}). Remove it, "
            "or start without --resume"
        ) from error


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
        task=0, epoch=0, batch=0, batches=0, images=0, seconds=0.0, learning=0.0, accuracy=[],
        memory={}, columns={}, factors=[], summed=None,
    )  # fmt: skip


def _account(state: dict, learner: Method) -> None:
    """The most bytes so far; and the logarithms of the layers' factors, summed on the device."""
    last = learner.optimizer.last
    for purpose, size in last.memory.items():
        state["memory"][purpose] = max(size, state["memory"].get(purpose, 0))
    for column, size in learner.extra_bytes().items():
        state["columns"][column] = max(size, state["columns"].get(column, 0))
    for factors in last.factors:
        if state["summed"] is None:
            sums, counts = factors.new_zeros(2, len(factors), dtype=torch.float64)
            state["summed"] = {"layers": list(last.layers), "sums": sums, "counts": counts}
        balanced = factors > 0
        state["summed"]["sums"] += torch.where(balanced, factors.double().log10(), 0)
        state["summed"]["counts"] += balanced


def _mean_logarithms(summed: dict | None) -> dict[str, float]:
    """By layer, of those that were balanced at all."""
    if summed is None:
        return {}
    columns = (summed["layers"], summed["sums"].tolist(), summed["counts"].tolist())
    return {name: total / count for name, total, count in zip(*columns, strict=True) if count}


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


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
