"""Batch-Level Distillation as a strategy of Avalanche: `pip install -e ".[avalanche]"`."""

import torch
from avalanche.training.templates import SupervisedTemplate
from torch import Tensor

from bld_ext.api.heads import MultiHead, evaluating
from bld_ext.api.optimizer import BLDOptimizer


class BLD(SupervisedTemplate):
    """Learns each mini-batch by `BLDOptimizer.step`, with a head for each experience.

    In evaluation each experience is classified by its own head, and by zeros while it has none. The
    benchmark numbers the classes of each experience from 0
    (`class_ids_from_zero_in_each_exp=True`), and each experience is trained on once.

    Args:
        model: a `MultiHead` without heads.
        optimizer: a `BLDOptimizer` of the model.
        options: further ones of `SupervisedTemplate`, such as `train_mb_size` and `evaluator`.
            `criterion` is for evaluation; the step has losses of its own.
    """

    def __init__(self, *, model: MultiHead, optimizer: BLDOptimizer, **options):
        super().__init__(model=model, optimizer=optimizer, **options)

    def make_optimizer(self, **_) -> None:
        pass  # BLDOptimizer follows the heads of its model

    def model_adaptation(self, model: MultiHead | None = None) -> MultiHead:
        model, number = self.model if model is None else model, self.experience.current_experience
        if self.is_training:
            heads = len(model.heads)
            if number not in (heads - 1, heads):
                raise ValueError(
                    f"experience: expected {f'number {heads - 1} or the next one' if heads else 0}"
                    f", since a step trains the newest head, got {number}"
                )
            if number == heads:
                model.add_head(len(self.experience.classes_in_this_experience))
        return super().model_adaptation(model)

    def training_epoch(self, **kwargs) -> None:
        for self.mbatch in self.dataloader:  # noqa: B020
            if self._stop_training:
                break
            self._unpack_minibatch()
            self._require_own_images()
            self._before_training_iteration(**kwargs)
            self.mb_output = self.forward()  # for the metrics, before the batch is learned
            self._before_update(**kwargs)
            self.loss = self.optimizer.step(self.mb_x, self.mb_y) / len(self.mb_x)
            self._after_update(**kwargs)
            self._after_training_iteration(**kwargs)

    def _require_own_images(self) -> None:
        if len(self.mbatch) > 2 and len(tasks := self.mb_task_id.unique()) > 1:
            raise ValueError(
                f"mini-batch: expected images of one task, got those of {tasks.tolist()}, as "
                "replay adds them; the newest head would learn all. Leave the plugin out"
            )

    @torch.no_grad()
    def forward(self) -> Tensor:
        """The logits of the experience's head, computed in eval mode."""
        number = self.experience.current_experience
        if number >= len(self.model.heads):
            return self.mb_x.new_zeros(len(self.mb_x), 1 + int(self.mb_y.max()))
        with evaluating(self.model):
            return self.model(self.mb_x).split(self.model.head_sizes, 1)[number]
