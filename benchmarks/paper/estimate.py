"""Estimates what a job would take, from a few batches of each method, within a time limit."""

import time
from dataclasses import dataclass, replace

import torch
from tqdm import tqdm

from benchmarks.paper.experiment import synchronize
from benchmarks.paper.job import count_batches
from benchmarks.paper.methods import Method, Settings, make_learner
from benchmarks.paper.streams import Task

SAMPLE = 100  # number of images in a trial: those seen before the task, and the largest batch
# settings that do not change the time of a batch
IRRELEVANT = dict(tasks=1, limit=None, augment={}, l2_weight=0.0, offline_epochs=1)


@dataclass
class Trial:
    """What was measured of a method on the last task of a stream, where it has the most heads."""

    learner: Method
    step_seconds: float  # for a whole batch with all views
    begin_seconds: float  # for each image before a task: LwF's predictions
    timed: int  # number of views that were timed
    views: int  # number of views of a real batch
    images: int  # number of images seen before the task
    old_classes: int
    allocated: int | None  # peak bytes of a GPU's allocator


@dataclass
class Estimate:
    """The estimate of one method on one stream, all seeds together, without evaluations."""

    method: str
    batches: int
    step_seconds: float
    seconds: float
    held_bytes: int  # bytes held beside the network and the activations
    allocated: int | None
    views: str  # how many views were timed, such as "4 of 50"


class Estimator:
    """Times each method once for each of `settings`, and estimates whole jobs from that.

    Args:
        threads: CPU threads of a run.
        seconds: time limit of all trials together.
    """

    def __init__(
        self,
        device: str,
        threads: int,
        seconds: float,
        methods: list[str],
        settings: list[Settings],
    ):
        self.device, self.threads = device, threads
        self.end = time.perf_counter() + seconds
        self.left = len(methods) * len({_relevant(s) for s in settings})  # trials to come
        self.known: dict[object, Trial] = {}

    def estimate(
        self, stream: list[Task], methods: list[str], settings: Settings, seeds: list[int]
    ) -> list[Estimate]:
        before, found = torch.get_num_threads(), []
        torch.set_num_threads(self.threads)
        try:
            bar = tqdm(methods, unit="method")
            for method in bar:
                bar.set_postfix_str(method)
                key = (method, stream[0].x_train.shape[2:], _relevant(settings))
                if key not in self.known:
                    limit = (self.end - time.perf_counter()) / max(1, self.left)
                    self.known[key] = try_out(
                        stream, method, settings, seeds[0], self.device, limit
                    )
                    self.left -= 1
                found.append(reckon(self.known[key], method, stream, settings, seeds))
        finally:
            torch.set_num_threads(before)
        return found


def _relevant(settings: Settings) -> str:
    return repr(replace(settings, **IRRELEVANT))


def try_out(
    stream: list[Task], method: str, settings: Settings, seed: int, device: str, limit: float
) -> Trial:
    """Time a quarter of a batch, a batch with one view, and one with as many views as time allows.

    This takes about `limit` seconds. The difference between the last two gives the cost of each
    further view, because part of a step, such as the update, does not depend on the views. If there
    is no time for more than one view, the quarter of a batch gives that cost.
    """
    deadline, last = time.perf_counter() + limit, stream[-1]
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
    learner = make_learner(method, replace(settings, views=1), seed, device)
    for task in stream[:-1]:
        learner.model.add_head(len(task.classes))
    sample = replace(last, x_train=last.x_train[:SAMPLE], y_train=last.y_train[:SAMPLE])
    synchronize(device)
    start = time.perf_counter()
    learner.begin(sample)
    synchronize(device)
    begin = (time.perf_counter() - start) / len(sample.x_train)
    learner.model.add_head(len(last.classes))
    wanted, timed = learner.options(settings)["views"], 1
    quarter = _step_seconds(learner, sample, last, device, 0.25) if wanted > 1 else 0.0
    seconds = _step_seconds(learner, sample, last, device)
    a_view = max(0.0, seconds - quarter) / 0.75
    # a batch is learned twice, and the first time takes longer
    fit = int((deadline - time.perf_counter() - seconds) / (1.6 * seconds))
    if wanted > 1 and fit > 1:
        learner.optimizer.views = timed = min(wanted, fit)
        slower = _step_seconds(learner, sample, last, device)
        a_view = max(0.0, (slower - seconds) / (timed - 1))
        seconds = slower
    seconds += a_view * (wanted - timed)
    return Trial(
        learner,
        step_seconds=seconds,
        begin_seconds=begin,
        timed=timed,
        views=wanted,
        images=len(sample.x_train),
        old_classes=_old_classes(stream),
        allocated=torch.cuda.max_memory_allocated(device) if device.startswith("cuda") else None,
    )


def _step_seconds(
    learner: Method, sample: Task, task: Task, device: str, part: float = 1.0
) -> float:
    """Return the seconds of a batch, or of a part of one.

    The first batch is not timed, nor is the second on a GPU, which is recorded. For a batch larger
    than the sample, the time is scaled in proportion.
    """
    batch = next(learner.batches(sample, 0))
    where, images, labels = (tensor[: max(2, int(part * len(tensor)))] for tensor in batch)
    whole = max(len(where), part * len(next(learner.batches(task, 0))[0]))
    images, labels = images.to(device), labels.to(device)
    start = 0.0
    for _ in range(2 if device == "cpu" else 3):
        start = time.perf_counter()
        learner.learn(where, images, labels)
        synchronize(device)
    return (time.perf_counter() - start) * whole / len(where)


def _old_classes(stream: list[Task]) -> int:
    return sum(len(task.classes) for task in stream[:-1])


def reckon(
    trial: Trial, method: str, stream: list[Task], settings: Settings, seeds: list[int]
) -> Estimate:
    """Estimate all seeds of a stream from a trial."""
    learner = trial.learner
    batches = count_batches(make_learner(method, settings, seeds[0]), stream) * len(seeds)
    images = sum(len(task.x_train) for task in stream) / len(stream)
    classes = _old_classes(stream) / max(1, trial.old_classes)
    more = {
        "views": classes * trial.views / trial.timed,
        "images": classes * images / trial.images,
        None: 1,
    }
    memory, extra = learner.optimizer.last.memory, learner.extra_bytes()
    # the bank is in `memory` and in `extra`
    held = sum(memory.values()) - memory["bank"]
    held += more[learner.intra_grows_with] * extra["intra"] + extra["data"] * images / trial.images
    begin = trial.begin_seconds * images * (len(stream) - 1) * len(seeds)
    return Estimate(
        method, batches, trial.step_seconds, batches * trial.step_seconds + begin, round(held),
        trial.allocated, f"{trial.timed} of {trial.views}",
    )  # fmt: skip
