"""BLDOptimizer: Batch-Level Distillation where a torch optimizer would stand.

Fini, Lathuilière, Sangineto, Nabi, Ricci: "Online Continual Learning under Extreme Memory
Constraints", ECCV 2020. The method itself is in `algorithm.py`, what surrounds it is put together
in `runner.py`; this class is what a training loop sees.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor, nn

from bld_ext.api import algorithm, checks
from bld_ext.api.capture import Recorder
from bld_ext.api.convert import convert_view_batchnorm
from bld_ext.api.layers import KINDS
from bld_ext.api.memory_format import MemoryFormat
from bld_ext.api.out_of_memory import is_out_of_memory, too_much
from bld_ext.api.pass_size import PassSize
from bld_ext.api.report import Batch, StepReport
from bld_ext.api.runner import NEVER, StepRunner
from bld_ext.api.schedules import SCHEDULES
from bld_ext.api.setting import Setting

REMOVED = {
    "balance_in_backward": "it changed neither results nor memory; schedule='in_backward' updates "
    "each layer amid the backward pass",
    "keep_gradients": "capture=True keeps every address from step to step",
    "memory_budget": "give the budget as views_per_pass='512 MiB'",
    "channels_last": "images are so on a CPU, and elsewhere where the model's weights are: call "
    "model.to(memory_format=torch.channels_last)",
    "statistics": "call convert_view_batchnorm(model, statistics=...) before the constructor",
    "seed": "call torch.manual_seed(seed) before the constructor, or set optimizer.seed = seed",
}


class BLDOptimizer(StepRunner):
    """Learns a stream of tasks, distilling the network into itself within each batch.

    One `step` makes 1 + `joint_steps` updates of the network θ. The warm-up computes the loss L_t
    of the newest head over all views of the batch, keeps the softened predictions of the older
    heads (the bank) and the gradient norm ‖G_w‖ of each layer, and takes a small step
    θ' = θ - α_w G_w. Each joint repetition computes the gradient G_d of the distillation loss L_d
    against the bank, rescales each layer of it to λ‖G_w‖/‖G_d‖ · G_d, adds dL_t/dθ', and takes a
    step of size α_j. Losses are summed over the batch and averaged over the views. Then everything
    but the network is released.

    Args:
        model: maps images to the logits of all heads side by side, `[N, ΣC]` or
            `[N, ΣC, *spatial]`, oldest head first, and has `head_sizes`. float32 or float64. Heads
            may be added at any time.
        lr: α_j, the learning rate of the joint updates.
        warmup_lr: α_w; default lr / 100. It keeps its ratio to lr when a scheduler changes lr.
        temperature: τ of the softened predictions.
        balance: λ. 0 is finetuning: the distillation passes are left out. None leaves G_d as it is,
            the paper's "no balancing".
        joint_steps: joint repetitions.
        views: views V of each image; default 50 with `augment`, else 1, the images themselves.
        views_per_pass: views that go through the network as one batch. BatchNorm's statistics stay
            those of a view, so this changes speed and memory alone; a model that mixes the images
            of a batch in another way is named in a warning. A size such as "512 MiB" stands for
            the most views whose activations fit into it, and for less after running out of memory;
            "auto" is 256 MiB on a CPU, 80 % of what is free on a GPU.
        augment: `augment(images, seed=, step=, views=, indices=)`, which returns the views one
            after the other, `[len(views)·B, ...]`, the same every time: a `SeededAugment` or your
            own.
        layer: what is balanced as one: "module" (weight and bias together), "tensor", "network".
        schedule: "two_forward" holds one gradient and runs two forward passes a view in each joint
            repetition. "shared_forward" runs one, and holds a second gradient unless all views go
            through the network in one pass. "in_backward" is two_forward that updates each layer as
            soon as its gradient is complete, and releases it. See `schedules.py`.
        precision: of products. "fp32" switches TF32 off. "mixed" keeps the forward passes in fp32,
            where rounding would drown what is distilled, and runs the backward passes in TF32 on a
            GPU, and in bfloat16 on a CPU with instructions for it.
        capture: replay a CUDA graph of the whole step for batches of one shape. The first such
            batch is learned without a graph and the second is recorded; so again after a change of
            heads, shape, modules, hooks or settings other than learning rates, λ and seed. The
            graph's memory is held from batch to batch, and `last` changes with each step. Not for
            models with dropout, "in_backward" or `check_finite`.
        base: the optimizer class that makes the updates, called as `base(params, lr=lr)`. One that
            keeps state carries memory from batch to batch.
        check_finite: raise FloatingPointError on a loss, gradient norm or parameter that is not
            finite, and put the network back as it was before the step. Costs a copy of the network
            and a wait for the device in each stage.

    Attributes:
        seed: of the views and of the forward passes' random numbers, 0 to 2**63 - 1. It is torch's
            initial seed, which `torch.manual_seed` sets.
        last: a `StepReport` of the last step: losses, norms and factors of each layer.

    The model's BatchNorm modules become `ViewBatchNorm` in place, with the same parameters, buffers
    and state_dict; `convert_view_batchnorm` sets when their running statistics move. Images go to
    the network in torch.channels_last on a CPU, where that is faster, and where the model's weights
    lie so. Inside a step TF32, reduced-precision products and
    autocast are off, and torch's random state is replaced; both are put back after it. They are
    global, so steps in two threads at once disturb each other. `step` owns the gradients and
    releases them.

    Example:
        optimizer = BLDOptimizer(model, lr=1e-4, views=50, augment=SeededAugment(crop_padding=4))
        for task in stream:
            model.add_head(task.num_classes)
            for images, labels in task:
                loss = optimizer.step(images, labels)
    """

    warmup_ratio = Setting(checks.number)
    temperature = Setting(partial(checks.number, positive=True))
    balance = Setting(checks.balance)
    joint_steps = Setting(partial(checks.at_least, least=0))
    views = Setting(partial(checks.at_least, least=1))
    augment = Setting(checks.augment)
    layer = Setting(partial(checks.choice, choices=KINDS))
    schedule = Setting(partial(checks.choice, choices=SCHEDULES), checks.together)
    precision = Setting(checks.precision)
    capture = Setting(checks.switch, checks.together)
    check_finite = Setting(checks.switch, checks.together)

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-4,
        *,
        warmup_lr: float | None = None,
        temperature: float = 2.0,
        balance: float | None = 2.0,
        joint_steps: int = 2,
        views: int | None = None,
        views_per_pass: int | str = 1,
        augment: Callable[..., Tensor] | None = None,
        layer: str = "module",
        schedule: str = "two_forward",
        precision: str = "fp32",
        capture: bool = False,
        base: Callable[..., torch.optim.Optimizer] = torch.optim.SGD,
        check_finite: bool = False,
        **removed: object,
    ):
        checks.removed(removed, REMOVED)
        checks.model(model)
        self.warmup_ratio = checks.rates(lr, warmup_lr)
        self.temperature, self.balance, self.joint_steps = temperature, balance, joint_steps
        self.views = (50 if augment else 1) if views is None else views
        self.views_per_pass, self.augment = views_per_pass, augment
        self.layer, self.schedule, self.precision = layer, schedule, precision
        self.capture, self.check_finite = capture, check_finite
        self.last: StepReport | None = None
        self._batch: Batch | None = None
        self._format = MemoryFormat()
        self._recorder = Recorder()
        self._probed_with: object = NEVER
        super().__init__(model, base, lr)
        convert_view_batchnorm(model)

    # ---- what a training loop calls ----

    def step(self, images: Tensor, labels: Tensor) -> Tensor:
        """Learn one incoming batch: the warm-up, then the joint repetitions.

        Args:
            images: `[B, ...]`, on the model's device; the views are made from it.
            labels: `[B]` int64 (`[B, *spatial]` for dense logits), newest head's classes from 0.

        Returns:
            L_t of the batch before it was learned: a device scalar, summed over the images and
            averaged over the views. More is in `optimizer.last`.

        Raises:
            ValueError, TypeError, RuntimeError: bad images, labels or model. The network has not
                changed then. After an error of another kind in the joint stage, such as running
                out of memory, it may hold the warm-up update, unless `check_finite` is set.
            FloatingPointError: with `check_finite`; the network is as before the step.
        """
        sizes = self._check(images, labels)
        self._choose_pass_size(images, labels, sizes)
        run = self._captured_step if self.capture else self._step
        while True:
            undo = self.check_finite or self._pass_size.on_trial
            try:
                with self._undone_on_error() if undo else nullcontext():
                    loss = run(images, labels, sizes)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                views = self.views_in_pass
                if not (self._pass_size.halve() and undo):
                    raise too_much(views, len(images), self._pass_size.automatic) from error
            else:
                self._pass_size.on_trial = False
                return loss

    def warm_up(self, images: Tensor, labels: Tensor) -> Tensor:
        """Algorithm 1: bank, ‖G_w‖ per layer, θ' = θ - α_w G_w. Returns L_t."""
        sizes = self._check(images, labels)
        self._choose_pass_size(images, labels, sizes)
        run = partial(self._warm_up, images, labels, sizes)
        return self._within_memory(images, partial(self._format.run, run))

    def joint(
        self,
        images: Tensor,
        labels: Tensor,
        bank: Tensor | None = None,
        losses: Sequence[str] = algorithm.LOSSES,
    ) -> Tensor:
        """Algorithm 2, one repetition on the batch of the last `warm_up`. Returns L_t.

        The batch has to be the same; only its shape is checked.

        Args:
            images, labels: as in `step`.
            bank: `[V·B, C_old, *]`, other predictions to distil from than those of the warm-up, as
                LwF has them; balance=0 leaves them unread. With balance=None this needs no warm-up
                before it: a batch then begins here, and ends with `release`.
            losses: what makes the update, "new" (L_t), "distillation" (L_d) or both. With
                "distillation" alone L_d is returned, and while there is no old head it is zero and
                nothing is updated.
        """
        losses = checks.some("losses", losses, algorithm.LOSSES)
        if self._batch is None and (bank is None or self.balance is not None):
            raise RuntimeError("joint: there is no bank; call warm_up(images, labels) first")
        sizes = self._check(images, labels)
        run = partial(self._joint, images, labels, sizes, bank, losses)
        return self._within_memory(images, run)

    @property
    def views_per_pass(self) -> int | str:
        """As it was asked for: a number, "auto", or a size such as "512 MiB"."""
        return self._pass_size.wanted

    @views_per_pass.setter
    def views_per_pass(self, value: int | str) -> None:
        self._pass_size = PassSize(checks.views_per_pass("views_per_pass", value))

    @property
    def views_in_pass(self) -> int:
        """Views that go through the network at once: `views_per_pass`, or what was chosen."""
        return min(self._pass_size.number, self.views)

    # ---- a torch optimizer's life ----

    def load_state_dict(self, state_dict: dict) -> None:
        """Resume bit for bit. The model must have the heads it had when the state was saved."""
        super().load_state_dict(state_dict)
        self.release()
        self._recorder.forget()

    def __repr__(self) -> str:
        options = ("lr", "temperature", "balance", "joint_steps", "views", "views_per_pass")
        lr = self.param_groups[0]["lr"]
        shown = ", ".join(f"{n}={lr if n == 'lr' else getattr(self, n)}" for n in options)
        return f"BLDOptimizer({shown}, base={type(self.base).__name__})"
