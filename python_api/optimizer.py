"""BLDOptimizer: Batch-Level Distillation, used in a training loop in place of a torch optimizer.

Fini, Lathuilière, Sangineto, Nabi, Ricci: "Online Continual Learning under Extreme Memory
Constraints", ECCV 2020. This file has the interface, `algorithm.py` the method, and `runner.py`
what surrounds the method in a step.
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
from bld_ext.api.processes import SHARDS, Processes
from bld_ext.api.report import Batch, StepReport
from bld_ext.api.runner import NEVER, StepRunner
from bld_ext.api.schedules import SCHEDULES
from bld_ext.api.setting import Setting
from bld_ext.api.warn import warn

REMOVED = {
    "balance_in_backward": "it changed neither results nor memory; schedule='in_backward' updates "
    "each layer during the backward pass",
    "keep_gradients": "capture=True keeps every address from step to step",
    "memory_budget": "give the budget as views_per_pass='512 MiB'",
    "channels_last": "images are so on a CPU, and elsewhere where the model's weights are: call "
    "model.to(memory_format=torch.channels_last)",
    "statistics": "call convert_view_batchnorm(model, statistics=...) before the constructor",
    "seed": "call torch.manual_seed(seed) before the constructor, or set optimizer.seed = seed",
}


class BLDOptimizer(StepRunner):
    """Learns a stream of tasks, distilling the network into itself within each batch.

    The network θ has one head, a classifier, for each task. The newest head learns; the older heads
    are to keep their predictions. Each `step` learns one batch in 1 + `joint_steps` updates:

    - The warm-up runs the network on V views of each image: random augmentations, made again
      whenever they are needed. It computes the loss L_t of the newest head, keeps the softened
      predictions of the older heads (the bank) and the norm of the gradient, ‖G_w‖, in each layer
      (by default a module that owns parameters), and takes a small step θ' = θ - α_w G_w.
    - Each joint repetition computes the gradient G_d of the distillation loss L_d against the bank,
      rescales it in each layer to λ‖G_w‖/‖G_d‖ · G_d, adds dL_t/dθ', and takes a step of size α_j.

    Losses are summed over the batch and averaged over the views. After a step, everything but the
    network, and the state of a base optimizer that keeps one, is released.

    Args:
        model: maps images to the logits of all heads side by side, `[N, ΣC]` or
            `[N, ΣC, *spatial]`, oldest head first. Its `head_sizes` lists the number of classes of
            each head. Parameters are float32 or float64. Heads may be added at any time.
        lr: α_j, the learning rate of the joint updates.
        warmup_lr: α_w; default lr / 100. It keeps its ratio to lr when a scheduler changes lr.
        temperature: τ of the softened predictions.
        balance: λ. 0 is finetuning: the distillation passes are skipped. None leaves G_d as it is,
            the paper's "no balancing".
        joint_steps: the number of joint repetitions.
        views: V, the number of views of each image. Default: 50 with `augment`; without it 1, the
            image itself.
        views_per_pass: the number of views that go through the network as one batch. It changes
            speed and memory only, because BatchNorm normalises each view by its own statistics. A
            warning names a layer that mixes the images of a batch in another way. A memory budget
            such as "512 MiB" chooses the most views whose activations fit into it, and fewer after
            running out of memory. "auto" is a budget of 80 % of the free memory on a GPU, and on a
            CPU of 256 MiB, or of half the free memory where Linux says that this is less.
        augment: a `SeededAugment` or your own `augment(images, seed=, step=, views=, indices=)`. It
            returns the views one after the other, `[len(views)·B, ...]`, and the same values
            whenever its arguments are the same. Labels that have positions move with the views, if
            it takes an argument `masks=` as `SeededAugment` does.
        ignore_index: the label of images or positions without a class. They have no loss and no
            gradient of L_t; the old heads are distilled there too.
        layer: what is balanced together: "module" (weight and bias of a module), "tensor" (each
            parameter alone) or "network" (all parameters).
        schedule: "two_forward" holds one gradient and runs two forward passes a view in each joint
            repetition. "shared_forward" runs one, and holds a second gradient unless all views go
            through the network in one pass. "in_backward" works as "two_forward", but updates each
            layer and releases its gradient as soon as that gradient is complete. See
            `schedules.py`.
        precision: of matrix products and convolutions. "fp32" switches TF32 off. "mixed" runs the
            backward passes in TF32 on a GPU, and in bfloat16 on a CPU with instructions for it. The
            forward passes stay in fp32, because their rounding would drown the distillation
            gradient.
        capture: whether to replay a CUDA graph of the whole step for batches of one shape. The
            first such batch runs without a graph and the second is recorded. After a change of
            heads, shape, modules, hooks or settings other than learning rates, λ and seed, this
            starts again. The graph's memory is held from batch to batch, and each step overwrites
            the values in `last`. Excludes models with dropout, "in_backward" and `check_finite`.
        base: the class of the torch optimizer that makes the updates, called as
            `base(params, lr=lr)`. One that keeps state, such as momentum, carries memory from batch
            to batch.
        check_finite: whether to raise FloatingPointError on a loss, gradient norm or parameter that
            is not finite, and restore the network as it was before the step. Costs a copy of the
            network and a wait for the device in each stage.
        process_group: the processes that share each step: a ProcessGroup or a DeviceMesh of one
            dimension of torch.distributed. False lets this process learn alone. None is the same
            where there is one process, and an error where there are more. The network is then not
            in DistributedDataParallel; its parameters are taken over from rank 0.
        shard: what is divided among the processes. "views": each is given the same batch and makes
            every R-th view of it. "images": each has images of its own, whose losses are added up.
        reproducible: whether gradients are added up in a fixed tree over the views, so that any
            power-of-two number of processes updates to the same bits. Needs "two_forward" and one
            view a pass, and a gradient more for each doubling of the views of a process.

    Attributes:
        seed: the seed of the views and of the forward passes' random numbers, 0 to 2**63 - 1. It
            starts as torch's initial seed, which `torch.manual_seed` sets.
        last: a `StepReport` of the last step: losses, norms and factors of each layer.

    The model's BatchNorm modules become `ViewBatchNorm` in place, with the same parameters, buffers
    and state_dict; `convert_view_batchnorm` sets when their running statistics are updated. Images
    go to the network in torch.channels_last on a CPU, where that is faster, and wherever the
    model's weights have that layout.

    Inside a step TF32, reduced-precision products and autocast are off, and the random states of
    torch, NumPy and Python are replaced; all are restored after it. These settings are global, so
    steps in two threads at once disturb each other. `step` drops the gradients it finds and
    releases its own.

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
    ignore_index = Setting(checks.label)
    layer = Setting(partial(checks.choice, choices=KINDS))
    schedule = Setting(partial(checks.choice, choices=SCHEDULES), checks.together)
    precision = Setting(checks.precision)
    capture = Setting(checks.switch, checks.together)
    check_finite = Setting(checks.switch, checks.together)
    reproducible = Setting(checks.switch, checks.together)

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
        ignore_index: int = -100,
        layer: str = "module",
        schedule: str = "two_forward",
        precision: str = "fp32",
        capture: bool = False,
        base: Callable[..., torch.optim.Optimizer] = torch.optim.SGD,
        check_finite: bool = False,
        process_group: object = None,
        shard: str = "views",
        reproducible: bool = False,
        **removed: object,
    ):
        checks.removed(removed, REMOVED, BLDOptimizer)
        checks.model(model)
        self._processes = Processes(process_group, checks.choice("shard", shard, SHARDS))
        self.warmup_ratio = checks.rates(lr, warmup_lr)
        self.temperature, self.balance, self.joint_steps = temperature, balance, joint_steps
        self.views = (1 if augment is None else 50) if views is None else views
        self.views_per_pass, self.augment = views_per_pass, augment
        self.ignore_index = ignore_index
        self.layer, self.schedule, self.precision = layer, schedule, precision
        self.capture, self.check_finite, self.reproducible = capture, check_finite, reproducible
        self.last: StepReport | None = None
        self._batch: Batch | None = None
        self._format = MemoryFormat()
        self._recorder = Recorder()
        self._probed_with: object = NEVER
        self._sizes_found = NEVER, []
        self._undistilled, self._alone = (0, 0), set()
        super().__init__(model, base, lr)
        convert_view_batchnorm(model)

    # ---- what a training loop calls ----

    def step(
        self,
        images: Tensor | Callable[[], tuple[Tensor, Tensor]] | None = None,
        labels: Tensor | None = None,
        *,
        closure: Callable[[], tuple[Tensor, Tensor]] | None = None,
    ) -> Tensor | None:
        """Learn one incoming batch: the warm-up, then the joint repetitions.

        Args:
            images: `[B, ...]`, on the model's device; the views are made from it. They are data:
                no gradient reaches what made them.
            labels: `[B]` int64 (`[B, *spatial]` for dense logits), the classes of the newest head
                counted from 0, or `ignore_index`.
            closure: in place of both, a function that returns `(images, labels)`, for frameworks
                that call `optimizer.step(closure)`; it may also come as the only argument. Without
                any argument and with gradients of zero, the base makes its step, with which some
                tools create its state.

        Returns:
            L_t of the batch before it was learned: a device scalar, summed over the images and
            averaged over the views. `optimizer.last` reports more.

        Raises:
            ValueError, TypeError, RuntimeError: images, labels or model are not as expected. The
                network has not changed then. After another error in the joint stage, such as
                running out of memory, it may hold the warm-up update, and with "in_backward" some
                layers' updates, unless `check_finite` is set.
            FloatingPointError: with `check_finite`, a value is not finite. The network is as it was
                before the step.
        """
        if closure is not None and images is not None:
            raise TypeError("step: expected step(images, labels) or step(closure), got both")
        if labels is None:
            batch = self._batch_from(images if closure is None else closure)
            if batch is None:
                return self._base_step()
            images, labels = batch
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
                again = undo and self._processes.alone  # else the others are a step further
                if not (self._pass_size.halve() and again):
                    raise too_much(views, len(images), self._pass_size.automatic) from error
            else:
                self._pass_size.on_trial = False
                self._watch_distillation(sizes)
                return loss

    @staticmethod
    def _batch_from(closure: object) -> tuple[Tensor, Tensor] | None:
        batch = closure() if callable(closure) else closure
        if batch is None and closure is None:
            return None
        if not (isinstance(batch, (tuple, list)) and len(batch) == 2):
            what = f"a closure that returned a {type(batch).__name__}"
            if not callable(closure):
                what = f"a {type(closure).__name__} alone"
            raise TypeError(
                "step: expected step(images, labels), or step(closure) with a closure that returns "
                f"(images, labels), got {what}. A step computes the losses and gradients itself, "
                "so call no backward()"
            )
        return batch[0], batch[1]

    @property
    def _step_supports_amp_scaling(self) -> bool:
        raise TypeError(
            "BLDOptimizer: expected to be stepped by itself, got a GradScaler. Gradients need no "
            "scaling, since a step runs in float32: call optimizer.step(images, labels)"
        )

    def warm_up(self, images: Tensor, labels: Tensor) -> Tensor:
        """Run Algorithm 1: keep the bank and ‖G_w‖ of each layer, update θ' = θ - α_w G_w.

        Returns L_t. `images` and `labels` are as in `step`.
        """
        sizes = self._check(images, labels)
        self._watch_stages()
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
        """Run one repetition of Algorithm 2 on the batch of the last `warm_up`. Returns L_t.

        Args:
            images, labels: those given to `warm_up`; only the shape of the images is checked.
            bank: `[V·B, C_old, *]`, predictions to distil from in place of the warm-up's, as in
                LwF. They are not read with balance=0. With balance=None no warm-up is needed: the
                batch then begins here and ends with `release`.
            losses: the losses to learn from: "new" (L_t), "distillation" (L_d) or both. With
                "distillation" alone L_d is returned; while there is no old head, it is zero and
                nothing is updated.
        """
        losses = checks.some("losses", losses, algorithm.LOSSES)
        if self._batch is None and (bank is None or self.balance is not None):
            raise RuntimeError("joint: there is no bank; call warm_up(images, labels) first")
        sizes = self._check(images, labels)
        run = partial(self._joint, images, labels, sizes, bank, losses)
        if self._batch is None:
            self._choose_pass_size(images, labels, sizes)
            run = partial(self._format.run, run)
        return self._within_memory(images, run)

    @property
    def warmup_lr(self) -> float:
        """α_w, the learning rate of the warm-up; it changes with `lr`."""
        return self.lr * self.warmup_ratio

    @warmup_lr.setter
    def warmup_lr(self, value: float) -> None:
        self.warmup_ratio = checks.rates(self.lr, value)

    @property
    def views_per_pass(self) -> int | str:
        """The setting as it was given: a number, "auto", or a size such as "512 MiB"."""
        return self._pass_size.wanted

    @views_per_pass.setter
    def views_per_pass(self, value: int | str) -> None:
        self._pass_size = PassSize(checks.views_per_pass("views_per_pass", value))

    @property
    def views_here(self) -> range:
        """The numbers of the views that this process makes of a batch."""
        return self._processes.views(self.views)

    @property
    def views_in_pass(self) -> int:
        """The number of views that go through the network at once, as given or as chosen."""
        return min(self._pass_size.number, self.views)

    # ---- what every torch optimizer has ----

    def state_dict(self) -> dict:
        """Return torch's state and, under "bld", what tells whether it fits this optimizer."""
        saved = super().state_dict()
        saved["bld"]["options"] = self._options()
        return saved

    def load_state_dict(self, state_dict: dict) -> None:
        """Restore a saved state; training continues bit for bit as it would have then.

        The model must already have the heads it had when the state was saved, and the optimizer
        the options of then: views, λ and the like are not restored, and a warning names those that
        are others.
        """
        super().load_state_dict(state_dict)
        saved, own = state_dict.get("bld", {}).get("options", {}), self._options()
        apart = [f"{k}={own[k]} (it was {v})" for k, v in saved.items() if own.get(k, v) != v]
        if apart:
            warn(
                f"the state was saved with other options than those of this optimizer, which keeps "
                f"its own: {', '.join(apart)}"
            )
        self._release()
        self._recorder.forget()
        self._processes.forget()

    def __repr__(self) -> str:
        options = ("lr", "temperature", "balance", "joint_steps", "views", "views_per_pass")
        shown = ", ".join(f"{name}={getattr(self, name)}" for name in options)
        return f"BLDOptimizer({shown}, base={type(self.base).__name__})"
