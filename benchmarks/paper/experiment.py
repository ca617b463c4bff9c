"""One run: a method over one stream, evaluated after every task."""

import time
from collections.abc import Callable
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from benchmarks.paper.methods import METHODS, Settings
from benchmarks.paper.networks import make_model
from benchmarks.paper.streams import Dataset, Task, make_stream
from bld_ext import MultiHead, SeededAugment


def run(
    dataset: Dataset,
    method: str,
    settings: Settings,
    seed: int,
    device: str = "cpu",
    progress: Callable[[], None] = lambda: None,
) -> dict:
    """Train `method` over the stream of `seed`; `progress` is called after each batch.

    Split, order, initial weights of network and heads, and views depend on the seed alone, so they
    are the same for every method.

    Returns:
        A JSON-ready record. `accuracy[i][j]`: test accuracy in percent of task j after task i;
        `memory`: the most bytes that were held for each purpose.
    """
    stream = make_stream(dataset, settings.tasks, seed, settings.limit)
    torch.manual_seed(seed)
    model = make_model(settings.network, settings.momentum).to(device)
    optimizer = METHODS[method](model, settings, seed)
    accuracy, memory, start = [], {}, time.perf_counter()
    for number, task in enumerate(stream):
        torch.manual_seed(seed + 1000 * (number + 1))
        model.add_head(len(task.classes))
        for images, labels in task.batches(settings.batch_size):
            optimizer.step(images.to(device), labels.to(device))
            for purpose, size in optimizer.last.memory.items():
                memory[purpose] = max(size, memory.get(purpose, 0))
            progress()
        accuracy.append([evaluate(model, seen, j) for j, seen in enumerate(stream[: number + 1])])
    with batch_statistics(model):
        diagnostic = [evaluate(model, task, j) for j, task in enumerate(stream)]
    return {
        "method": method,
        "seed": seed,
        "classes": [list(task.classes) for task in stream],
        "accuracy": accuracy,
        "accuracy_with_batch_statistics": diagnostic,
        "memory": memory,
        "seconds": round(time.perf_counter() - start, 1),
    }


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
