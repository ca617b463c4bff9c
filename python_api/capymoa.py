"""Batch-Level Distillation as a learner of CapyMOA: `pip install -e ".[capymoa]"` and Java."""

from collections.abc import Iterable, Sequence

import torch
from capymoa.base import BatchClassifier
from capymoa.ocl.evaluation.events import TestEnd, TestTaskBegin, TrainTaskBegin
from capymoa.ocl.events import Dispatcher, Handler
from capymoa.stream import Schema
from torch import Tensor

from bld_ext.api.heads import MultiHead, evaluating
from bld_ext.api.optimizer import BLDOptimizer


class BLD(BatchClassifier, Handler):
    """Learns each batch by `BLDOptimizer.step`, with a head for each task of `ocl_train_eval_loop`.

    Each test task is classified by its own head (task-incremental), and by equal probabilities
    while it has none.

    Args:
        schema: of the stream; its `shape` is `[C, H, W]` of an image, which the loop flattens.
        model: a `MultiHead` without heads.
        optimizer: a `BLDOptimizer` of the model.
        tasks: the classes of each task, as `scenario.task_schedule` has them.
    """

    def __init__(
        self,
        schema: Schema,
        model: MultiHead,
        optimizer: BLDOptimizer,
        tasks: Sequence[Iterable[int]],
    ):
        super().__init__(schema, 0)
        self.model, self.optimizer = model, optimizer
        self.tasks = [sorted(classes) for classes in tasks]
        self.device = next(model.parameters()).device
        self._heads: list[int] = []  # the task of each head
        self._trained = self._task = -1

    def attach_with(self, source: Dispatcher) -> "BLD":
        source.subscribe(TrainTaskBegin, self._begin_task)
        source.subscribe(TestTaskBegin, lambda event: setattr(self, "_task", event.test_task))
        source.subscribe(TestEnd, lambda event: setattr(self, "_task", self._trained))
        return self

    def _begin_task(self, event: TrainTaskBegin) -> None:
        self._trained = self._task = task = event.train_task
        if task in self._heads[:-1]:
            raise ValueError(
                f"task: expected {self._heads[-1]} or a new one, since a step trains the newest "
                f"head, got {task}"
            )
        if task not in self._heads:
            self.model.add_head(len(self.tasks[task]))
            self._heads.append(task)

    def batch_train(self, x: Tensor, y: Tensor) -> None:
        classes = torch.tensor(self.tasks[self._trained], device=y.device)
        labels = torch.searchsorted(classes, y).clamp(max=len(classes) - 1)
        if (foreign := y[classes[labels] != y]).numel():
            raise ValueError(
                f"y: expected classes of task {self._trained}, {classes.tolist()}, got "
                f"{foreign.unique().tolist()}, as replay adds them; the newest head would learn all"
            )
        self.optimizer.step(x.view(-1, *self.schema.shape), labels)

    @torch.no_grad()
    def batch_predict_proba(self, x: Tensor) -> Tensor:
        proba = x.new_zeros(len(x), self.schema.get_num_classes())
        if self._task not in self._heads:
            return proba + 1 / proba.shape[1]
        with evaluating(self.model):
            logits = self.model(x.view(-1, *self.schema.shape))
        own = logits.split(self.model.head_sizes, 1)[self._heads.index(self._task)]
        proba[:, self.tasks[self._task]] = own.softmax(1)
        return proba

    def __str__(self) -> str:
        return f"BLD({self.optimizer!r})"
