"""BLDOptimizer: Batch-Level Distillation where a torch optimizer would stand.

Fini, Lathuilière, Sangineto, Nabi, Ricci: "Online Continual Learning under Extreme Memory
Constraints", ECCV 2020. Names follow the paper: warm-up (Algorithm 1) and joint training (Algorithm
2); L_t is the loss of the newest head, L_d the distillation loss of the older ones, G_w and G_d
their gradients.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from bld_ext import ops
from bld_ext.api import checks
from bld_ext.api.batch_norm import ViewBatchNorm, view_statistics
from bld_ext.api.capture import CapturedStep, Scalars
from bld_ext.api.convert import convert_view_batchnorm, lay_out, lay_out_state
from bld_ext.api.gradients import Gradients
from bld_ext.api.layers import KINDS, Layers
from bld_ext.api.memory import tensor_bytes
from bld_ext.api.model_optimizer import ModelOptimizer
from bld_ext.api.pass_size import PassSize, is_out_of_memory, no_trace, warn_of_mixing
from bld_ext.api.passes import (
    distillation_pass,
    new_task_pass,
    one_graph_pass,
    shared_pass,
    warm_up_pass,
)
from bld_ext.api.precision import exact_float32
from bld_ext.api.report import Batch, StepReport
from bld_ext.api.views import NeedsContiguousError, Views

LOSSES = ("new", "distillation")
SCHEDULES = ("two_forward", "shared_forward", "in_backward")
STATISTICS = {"once": ("pool", "keep"), "every_pass": ("every_pass", "every_pass")}


class BLDOptimizer(ModelOptimizer):
    """Learns a stream of tasks, distilling the network into itself within each batch.

    One `step` makes 1 + `joint_steps` updates. Warm-up: L_t of the newest head over all views gives
    G_w; the softened predictions of the older heads go into a bank; θ' = θ - α_w G_w. Joint,
    repeated: L_d against the bank gives G_d, each layer of it is rescaled to λ‖G_w‖/‖G_d‖ · G_d,
    dL_t/dθ is added, and θ'' = θ' - α_j G. Losses are summed over the batch and averaged over the
    views. Then everything but the network is released.

    Args:
        model: maps images to the logits of all heads side by side, `[N, ΣC]` or
            `[N, ΣC, *spatial]`, oldest head first, and has `head_sizes`. float32 or float64:
            reduced precision drowns the distillation gradient in rounding. Heads may be added at
            any time. Balancing relies on layers that follow or precede a BatchNorm; with other
            normalisations it was seen to do harm, so look at `last.factors` there.
        lr: α_j, the learning rate of the joint updates.
        warmup_lr: α_w, default lr / 100. It keeps its ratio to lr when a scheduler changes lr.
        temperature: τ of the softened predictions.
        balance: λ. 0 is finetuning: the distillation passes are then left out. None leaves G_d as
            it is, factor 1: the paper's "no balancing".
        joint_steps: joint repetitions.
        views: views V of each image; default 50 with `augment`, else 1 (the images themselves).
        views_per_pass: views that go through the network as one batch; BatchNorm's statistics stay
            those of a view. A matter of speed and memory alone, except that dropout masks are drawn
            a pass; a model that mixes the images of a batch in another way is warned about. "auto"
            is the most that fits `memory_budget`, and less after running out of memory.
        memory_budget: bytes of activations in a pass, for "auto"; default 256 MiB on a CPU, 80 % of
            what is free on a GPU.
        augment: `augment(images, seed=, step=, views=, indices=)` giving the views one after the
            other, `[len(views)·B, ...]`, the same every time: a `SeededAugment`, or your own.
        layer: what is balanced as one: "module" (weight and bias together), "tensor", or "network".
            A tensor without a gradient but for rounding, such as a bias in front of BatchNorm, is
            scaled up to full size where it is a layer of its own.
        schedule: "two_forward" holds one gradient and the bank, and runs two forward passes a view
            in each joint repetition; "shared_forward" runs one, and holds a second gradient unless
            all views go through the network in one pass;
            "in_backward" is two_forward that updates each layer as soon as its gradient is
            complete, and then releases it. Where all views go through the network in one pass, the
            warm-up, and the joint stage while there is nothing to distil, never hold a whole
            gradient; while distilling, the joint stage holds one. An error amid the backward pass
            leaves the layers behind it updated, unless `check_finite` is set; torch raises one if
            a weight is also used detached, as backward still needs it after its update. The base's
            step, with its hooks, runs once for every 8 MiB of gradients.
        balance_in_backward: rescale each layer's G_d as soon as it is complete, during backward,
            instead of all after it; the same bits. Always so with "in_backward"; not with
            "shared_forward", which does not accumulate G_d by itself.
        keep_gradients: hold the gradients' memory from step to step, zeroed: addresses stay, and
            nothing of its size is allocated after the first step. Not with "in_backward".
        statistics: when BatchNorm's running statistics move: "once" a batch, from all views of the
            warm-up pooled, or at "every_pass", which is PyTorch's way.
        precision: of products. "fp32": all of them, TF32 off. "mixed": the forward passes are as in
            fp32, whose rounding would drown what is distilled; the backward passes, whose rounding
            is relative to the gradient, run in TF32 on a GPU, and in bfloat16 on a CPU that has
            instructions for it; what a checkpoint computes again is part of the backward pass.
        channels_last: keep images and the weights of two-dimensional convolutions in
            torch.channels_last. Default: on a CPU, where it is faster, unless the model needs
            contiguous activations, for a `view`. Weights that share memory stay as they are.
        capture: learn batches of one shape by replaying a CUDA graph of the whole step: the first
            one runs without, the second is recorded; so again after a new head, another shape,
            module, hook or setting. Learning rates, λ and seed may change at any time; what a
            module of your own decides in Python stays as it was recorded. The graph's memory, with
            the last batch's values in it, is held from batch to batch; `last` and what is in it
            change with each step. Not for models with dropout, nor with "in_backward" or
            `check_finite`; `augment` gets seed and step as device scalars.
        base: the optimizer class that makes the updates, called as `base(params, lr=lr)`; options
            go through functools.partial. One that keeps state carries memory from batch to batch.
        check_finite: raise FloatingPointError on a loss or gradient norm that is not finite, and
            put the network back as it was before the step. Costs a copy of the network and a wait
            for the device in each stage. On a CPU, images and labels are checked even without it.
        seed: of the views and of the forward passes' random numbers (dropout), 0 to 2**63 - 1.

    The model's BatchNorm modules are turned into `ViewBatchNorm` in place (same parameters, buffers
    and state_dict). TF32, reduced-precision matrix products and autocast are off inside a step and
    put back after it; so is torch's random state, which is global: steps in two threads at once
    disturb each other's dropout, and "mixed" the precision of both. `step` owns the gradients: they
    are released when it returns. Whatever else changes between two forward passes, such as the
    power iteration of spectral_norm, is distilled as if learning had caused it.

    Example:
        optimizer = BLDOptimizer(model, lr=1e-4, views=50, augment=SeededAugment(crop_padding=4))
        for task in stream:
            model.add_head(task.num_classes)
            for images, labels in task:
                loss = optimizer.step(images, labels)
    """

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
        memory_budget: int | None = None,
        augment: Callable[..., Tensor] | None = None,
        layer: str = "module",
        schedule: str = "two_forward",
        balance_in_backward: bool = False,
        keep_gradients: bool = False,
        statistics: str = "once",
        precision: str = "fp32",
        channels_last: bool | None = None,
        capture: bool = False,
        base: Callable[..., torch.optim.Optimizer] = torch.optim.SGD,
        check_finite: bool = False,
        seed: int = 0,
    ):
        if views is None:
            views = 50 if augment else 1
        checks.model(model)
        checks.choice("layer", layer, KINDS)
        checks.choice("schedule", schedule, SCHEDULES)
        checks.choice("statistics", statistics, STATISTICS)
        checks.apart(
            "schedule", schedule, "shared_forward", balance_in_backward=balance_in_backward
        )
        checks.apart("schedule", schedule, "in_backward", keep_gradients=keep_gradients)
        checks.apart("schedule", schedule, "in_backward", capture=capture)
        checks.apart("check_finite", check_finite, True, capture=capture)
        checks.at_least("views", views, 1)
        checks.views_per_pass(views_per_pass, memory_budget)
        checks.precision(precision)
        checks.switch("channels_last", channels_last)
        checks.at_least("joint_steps", joint_steps, 0)
        checks.at_least("seed", seed, 0)
        if seed >= 2**63:
            raise ValueError(f"seed: expected 0 to 2**63 - 1, got {seed}")
        checks.number("temperature", temperature, positive=True)
        if balance is not None:
            checks.number("balance", balance)
        checks.number("lr", lr, positive=warmup_lr is not None)
        if warmup_lr is not None:
            checks.number("warmup_lr", warmup_lr)

        self.channels_last = channels_last
        self._needs_contiguous = False  # whether the model was seen to
        if self._wants_channels_last(next(model.parameters()).device):
            lay_out(model, torch.channels_last)
        super().__init__(convert_view_batchnorm(model), base, lr, seed)
        self.warmup_ratio = 0.01 if warmup_lr is None else warmup_lr / lr
        self.temperature = temperature
        self.balance = balance
        self.joint_steps = joint_steps
        self.views = views
        self.augment = augment
        self.layer = layer
        self.schedule = schedule
        self.balance_in_backward = balance_in_backward
        self.statistics = statistics
        self.precision = precision
        self.capture = capture
        self.check_finite = check_finite
        self.last: StepReport | None = None
        self._batch: Batch | None = None
        self._gradients = Gradients(keep_gradients)
        self._pass_size = PassSize(views_per_pass, memory_budget)
        self._looked_for_mixing = False
        self._captured: CapturedStep | None = None
        self._scalars: Scalars | None = None  # on the device, while a captured step runs
        self._warned_of_state = False

    # ---- the step ----

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
        while True:
            undo = self.check_finite or self._pass_size.on_trial
            try:
                with self._undone_on_error() if undo else nullcontext():
                    loss = (self._captured_step if self.capture else self._step)(
                        images, labels, sizes
                    )
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                views = self.views_in_pass
                if not (self._pass_size.halve() and undo):
                    raise self._no_memory(images, views) from error
            else:
                self._pass_size.on_trial = False
                return loss

    def _step(self, images: Tensor, labels: Tensor, sizes: list[int]) -> Tensor:
        try:
            loss = self._in_either_format(lambda: self._warm_up(images, labels, sizes))
            for _ in range(self.joint_steps):
                self._joint(images, labels, sizes)
        finally:
            self.release()
        return loss

    def _captured_step(self, images: Tensor, labels: Tensor, sizes: list[int]) -> Tensor:
        self._follow_model()
        key, batches = self._capture_key(images, labels, sizes), self.batches
        if self._captured is None or self._captured.key != key:
            self._captured = None  # its memory goes first
            self._captured = CapturedStep(key, images, labels, len(self.param_groups))
        captured = self._captured
        captured.images.copy_(images)
        captured.labels.copy_(labels)
        rates = [group["lr"] for group in self.param_groups]
        captured.scalars.fill(rates, self.balance or 0.0, self.seed, batches)

        def step() -> tuple[Tensor, StepReport]:
            loss = self._step(captured.images, captured.labels, sizes)
            return loss, self.last

        try:
            self._scalars = captured.scalars
            loss, self.last = captured.run(step)
        except BaseException:
            self._captured, self.batches = None, batches
            raise
        finally:
            self._scalars = None
        self.batches = batches + 1
        return loss.clone()

    def _capture_key(self, images: Tensor, labels: Tensor, sizes: list[int]) -> tuple:
        """All that a recorded step has been made for."""
        settings = [self.temperature, self.joint_steps, self.views, self.views_in_pass, self.layer]
        settings += [self.schedule, self.balance_in_backward, self.statistics, self.precision]
        settings += [self.balance is None, self.balance == 0, self.warmup_ratio]
        settings += [self._wants_channels_last(images.device), self.augment, repr(self.augment)]
        batch = [(tuple(t.shape), t.stride(), t.dtype, t.device) for t in (images, labels)]
        # hooks by the numbers of their handles, which no two share
        params = [
            (
                *(id(p), p.data_ptr(), p.requires_grad),
                *(p._backward_hooks or ()),
                *(p._post_accumulate_grad_hooks or ()),
            )
            for p in self._parameters()
        ]
        modules = [
            (
                *(id(m), type(m), m.training, m.extra_repr()),
                *(*m._forward_hooks, *m._forward_pre_hooks),
                *(*m._backward_hooks, *m._backward_pre_hooks),
            )
            for m in self.model.modules()
        ]
        base = [(*self.base._optimizer_step_pre_hooks, *self.base._optimizer_step_post_hooks)]
        values = [v for entry in self.state.values() for v in entry.values()]
        kept = [*self.model.buffers(), *(v for v in values if isinstance(v, Tensor))]
        places = [t.data_ptr() for t in kept]
        options = [
            {k: v for k, v in group.items() if k not in ("lr", "initial_lr", "params")}
            for group in self.param_groups
        ]
        return (*settings, *batch, *sizes, *params, *modules, *base, *places, repr(options))

    def warm_up(self, images: Tensor, labels: Tensor) -> Tensor:
        """Algorithm 1: bank, ‖G_w‖ per layer, θ' = θ - α_w G_w. Returns L_t."""
        sizes = self._check(images, labels)
        self._choose_pass_size(images, labels, sizes)
        run = partial(self._warm_up, images, labels, sizes)
        return self._within_memory(images, partial(self._in_either_format, run))

    def _warm_up(self, images: Tensor, labels: Tensor, sizes: list[int]) -> Tensor:
        self._follow_model()
        self.release()
        layers = Layers.of(self.model, self._parameters(), self.layer)
        self._gradients.begin(layers.index)
        in_backward = self.schedule == "in_backward"
        last, held = nullcontext(), []
        with self._stage(STATISTICS[self.statistics][0]):
            views = self._views(images, labels, sizes, self.batches)
            if in_backward:
                norms = next(iter(layers.index)).new_zeros(len(layers.names))

                def measured(found: Tensor) -> None:
                    self._require_finite("warm-up", found)
                    norms.add_(found)

                update = partial(self._update, "warm-up", self.warmup_ratio)
                last = layers.updating(update, measured, held)
            loss, bank = warm_up_pass(views, self.temperature, self.balance != 0, last)
            if not in_backward:
                came = self._gradients.arrived(layers.index)
                norms = layers.norms(came)
                held.append(tensor_bytes(p.grad for p in came))
            self._require_finite("warm-up", loss, norms)
        memory = {
            "bank": tensor_bytes([bank]),
            "layer_norms": tensor_bytes([norms]) if self.balance else 0,
            "seed": 16,  # the seed and the batch's number
            "gradients": max(held),
        }
        self.last = StepReport(loss, layers.names, norms, memory=memory)
        if not in_backward:
            self._update("warm-up", self.warmup_ratio, self._parameters())
        self._batch = Batch(bank, layers, norms, self.batches, tuple(images.shape))
        self.batches += 1
        return loss

    def joint(
        self,
        images: Tensor,
        labels: Tensor,
        bank: Tensor | None = None,
        losses: Sequence[str] = LOSSES,
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
        losses = checks.some("losses", losses, LOSSES)
        if self._batch is None and (bank is None or self.balance is not None):
            raise RuntimeError("joint: there is no bank; call warm_up(images, labels) first")
        sizes = self._check(images, labels)
        run = partial(self._joint, images, labels, sizes, bank, losses)
        return self._within_memory(images, run)

    def _joint(
        self,
        images: Tensor,
        labels: Tensor,
        sizes: list[int],
        bank: Tensor | None = None,
        losses: Sequence[str] = LOSSES,
    ) -> Tensor:
        distil = len(sizes) > 1 and self.balance != 0 and "distillation" in losses
        if bank is not None:
            dtype = next(self.model.parameters()).dtype
            checks.bank(bank, labels, self.views, sum(sizes[:-1]), dtype)
            self._replace_bank(images, bank)
        batch = self._batch
        old_classes = sum(sizes[:-1]) if distil else batch.bank.shape[1]
        if tuple(images.shape) != batch.shape or old_classes != batch.bank.shape[1]:
            raise ValueError(
                f"images: expected the batch of the last warm_up, shape {batch.shape} with "
                f"{batch.bank.shape[1]} old classes, got {tuple(images.shape)} with {old_classes}; "
                "call warm_up(images, labels) first"
            )
        if not distil and "new" not in losses:
            return batch.reference_norms.new_zeros(())
        self._gradients.begin(batch.layers.index)
        views = self._views(images, labels, sizes, batch.number)
        updated = self.schedule == "in_backward" and "new" in losses
        last, held = nullcontext(), []
        with self._stage(STATISTICS[self.statistics][1]):
            if updated:
                measured = partial(self._require_finite, "joint") if self.check_finite else None
                update = partial(self._update, "joint", 1.0)
                last = batch.layers.updating(update, measured, held)
            if distil and "new" in losses and self.schedule == "shared_forward":
                loss, updated = self._shared_joint(views)
            else:
                loss = self._distil(views) if distil else None
                if "new" in losses:
                    loss = new_task_pass(views, self.temperature, last)
            self._require_finite("joint", loss, *self.last.distillation_loss[-1:])
            if self.check_finite and not updated:
                came = self._gradients.arrived(batch.layers.index)
                self._require_finite("joint", batch.layers.norms(came))
        self.last.memory["gradients"] = max(self.last.memory["gradients"], *held, 0)
        if "new" in losses:
            self.last.new_loss.append(loss)
        if not updated:
            self._update("joint", 1.0, self._parameters())
        return loss

    def _replace_bank(self, images: Tensor, bank: Tensor) -> None:
        """Distil from these predictions; where there was no warm-up, a batch begins."""
        if self._batch is not None:
            self._batch = replace(self._batch, bank=bank)
        else:
            self._follow_model()
            layers = Layers.of(self.model, self._parameters(), self.layer)
            norms = next(iter(layers.index)).new_zeros(len(layers.names))
            params = [p for p in layers.index if p.requires_grad]
            memory = {"layer_norms": 0, "seed": 16, "gradients": tensor_bytes(params)}
            self.last = StepReport(None, layers.names, norms, memory=memory)
            self._batch = Batch(bank, layers, norms, self.batches, tuple(images.shape))
            self.batches += 1
        self.last.memory["bank"] = tensor_bytes([bank])

    def release(self) -> None:
        """Drop the bank, the norms and the gradients, as before the next batch arrives."""
        self._batch = None
        self._gradients.release(self._parameters())
        if self._gradients.keep and self.last:
            self.last.memory["kept_gradients"] = self._gradients.nbytes()

    # ---- passes over the views ----

    def _views(self, images: Tensor, labels: Tensor, sizes: list[int], number: int) -> Views:
        seed = self.seed
        if self._scalars is not None:
            seed, number = self._scalars.seed, self._scalars.number
        return Views(
            self.model, self._norms(), images, labels, sizes, number, self.views,
            self._pass_size.number, self.augment, seed, self.precision,
            self._wants_channels_last(images.device),
        )  # fmt: skip

    def _norms(self) -> list[ViewBatchNorm]:
        return [m for m in self.model.modules() if isinstance(m, ViewBatchNorm)]

    @property
    def views_per_pass(self) -> int | str:
        """As it was asked for: a number, or "auto"."""
        return self._pass_size.wanted

    @views_per_pass.setter
    def views_per_pass(self, value: int | str) -> None:
        budget = self._pass_size.budget if value == "auto" else None
        checks.views_per_pass(value, budget)
        self._pass_size = PassSize(value, budget)

    @property
    def views_in_pass(self) -> int:
        """Views that go through the network at once: `views_per_pass`, or what "auto" chose."""
        return min(self._pass_size.number, self.views)

    def _wants_channels_last(self, device: torch.device) -> bool:
        if self.channels_last is None:
            return device.type == "cpu" and not self._needs_contiguous
        return self.channels_last

    def _choose_pass_size(self, images: Tensor, labels: Tensor, sizes: list[int]) -> None:
        """Measure what a view takes, where the batch is of a new shape or other parameters learn;
        look for layers that mix images, once. Neither leaves a trace.
        """
        key: tuple = ()
        if self._pass_size.automatic:
            params = [*self.model.parameters()]
            key = (tuple(images.shape), images.device, params[0].dtype, self.views)
            key += tuple(p.requires_grad for p in params)
        fits = self._pass_size.fits(key)
        if fits and (self._looked_for_mixing or self.views_in_pass == 1):
            return

        def measure() -> None:
            views = self._views(images, labels, sizes, self.batches)
            one = replace(views, count=1, per_pass=1)
            with no_trace(self.model), self._stage("keep"):
                if not fits:
                    self._pass_size.fit(one, self.views, key)
                if not self._looked_for_mixing and self.views_in_pass > 1:
                    self._look_for_mixing(one)

        self._within_memory(images, partial(self._in_either_format, measure))

    def _in_either_format(self, run: Callable[[], Tensor | None]) -> Tensor | None:
        """Where channels_last is the default and the model cannot, contiguous from now on."""
        try:
            return run()
        except NeedsContiguousError:
            if self.channels_last is not None:
                raise
        self._needs_contiguous = True
        lay_out(self.model, torch.contiguous_format)
        return run()

    def _look_for_mixing(self, one: Views) -> None:
        self._looked_for_mixing = True
        compiled = (m._compiled_call_impl is not None for m in self.model.modules())
        if any(compiled) or any(hasattr(m, "_orig_mod") for m in self.model.modules()):
            return  # each of these passes would be compiled
        both = replace(one, count=2, per_pass=2)
        try:
            warn_of_mixing(one, replace(one, start=1), both, self.views_in_pass)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise

    def _within_memory(self, images: Tensor, run: Callable[[], Tensor | None]) -> Tensor | None:
        """Or an error that names the remedy.

        No context manager: contextlib's frame holds the error it hands over, a cycle.
        """
        try:
            return run()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            views = self.views_in_pass
            # both stages of a batch have the same passes
            self._pass_size.halve(now=self._batch is None)
            raise self._no_memory(images, views) from error

    def _no_memory(self, images: Tensor, views: int) -> torch.OutOfMemoryError:
        """The error to raise; a frame that held it would be a cycle, and hold what did not fit."""
        remedy = "set views_per_pass lower, or to 'auto'"
        if self._pass_size.automatic:
            remedy = "the next batch will have fewer; a smaller memory_budget has them at once"
        if views == 1:
            remedy = "use fewer images a batch, schedule='in_backward', or a smaller network"
        return torch.OutOfMemoryError(
            f"views_per_pass: {views} views of {len(images)} images in one pass, and "
            f"their gradients, do not fit into memory; {remedy}"
        )

    # ---- gradients per layer ----

    def _distil(self, views: Views) -> Tensor:
        """G_d into .grad, balanced; returns L_d."""
        batch, after = self._batch, nullcontext()
        in_backward = self.balance_in_backward or self.schedule == "in_backward"
        if in_backward:
            norms = batch.reference_norms
            after = batch.layers.balancing(
                norms, self._balance_now(), self._report_balance, self._gradients.arrived
            )
        loss = distillation_pass(views, batch.bank, self.temperature, after)
        self.last.distillation_loss.append(loss)
        if not in_backward:
            self._balance_arrived()
        return loss

    def _balance_arrived(self) -> None:
        """Rescale the G_d that is in .grad."""
        index = self._batch.layers.index
        self._balance({p: p.grad for p in self._gradients.arrived(index)})

    def _balance(self, grads: dict[Tensor, Tensor]) -> None:
        batch = self._batch
        balance = self._balance_now()
        self._report_balance(*batch.layers.balance(grads, batch.reference_norms, balance))

    def _balance_now(self) -> float | Tensor | None:
        """λ: a number, or on the device in a captured step."""
        on_device = self._scalars is not None and self.balance is not None
        return self._scalars.balance if on_device else self.balance

    def _report_balance(self, factors: Tensor, norms: Tensor) -> None:
        self.last.factors.append(factors)
        self.last.distillation_norms.append(norms)
        self._require_finite("joint", norms)

    def _shared_joint(self, views: Views) -> tuple[Tensor, bool]:
        """Both losses from one forward pass a view; returns L_t, and whether θ is updated."""
        batch, index = self._batch, self._batch.layers.index
        if self.views_in_pass == self.views:
            balance = self._balance_arrived
            loss, old_loss = one_graph_pass(views, batch.bank, self.temperature, balance)
            self.last.distillation_loss.append(old_loss)
            return loss, False
        params = [p for p in index if p.requires_grad]
        loss, old_loss, grads = shared_pass(
            views, batch.bank, self.temperature, params, self._gradients.lend_apart()
        )
        self._gradients.hold_apart(grads)
        self.last.distillation_loss.append(old_loss)
        self.last.memory["second_gradients"] = tensor_bytes(grads.values())
        lr = self._plain_sgd_rate()
        came = self._gradients.arrived(index)
        if lr is None or self.balance is None or self.check_finite or set(came) != set(grads):
            self._balance(grads)
            for param, grad in grads.items():
                param.grad = grad.clone() if param.grad is None else param.grad.add_(grad)
            return loss, False
        lists = (came, [grads[p] for p in came], [p.grad for p in came], [index[p] for p in came])
        found = ops.balanced_sgd_(*lists, batch.reference_norms, self._balance_now(), lr)
        self._report_balance(*found)
        self._gradients.settle(index)
        self._gradients.release(index)
        return loss, True

    def _rates(self) -> list[float | Tensor]:
        """The learning rate of each group: in a captured step on the device."""
        own = [group["lr"] for group in self.param_groups]
        return own if self._scalars is None else self._scalars.rates

    def _plain_sgd_rate(self) -> float | Tensor | None:
        """The one learning rate of a plain SGD."""
        rates = set(self._rates())
        return rates.pop() if self._is_plain_sgd() and len(rates) == 1 else None

    def _update(self, stage: str, ratio: float, params: list[Tensor]) -> None:
        """Update these parameters by the base, at `ratio` times each group's learning rate."""
        self._gradients.settle(params)
        before = [(group["lr"], group["params"]) for group in self.param_groups]
        chosen = set(params)
        rates, on_device = self._rates(), self._scalars is not None and self._is_plain_sgd()
        try:
            for group, rate in zip(self.param_groups, rates, strict=True):
                group["lr"] = rate * ratio
                group["params"] = [p for p in group["params"] if p in chosen]
                if on_device:
                    self._plain_update(group)
            if not on_device:
                self._start_momentum()
                self.base.step()
        finally:
            for group, (rate, members) in zip(self.param_groups, before, strict=True):
                group["lr"], group["params"] = rate, members
            self._gradients.release(params)
        if self.check_finite:
            self._require_finite(stage, *(p.detach() for p in params))
        if not self._warned_of_state and any(self.state.values()):
            self._warned_of_state = True
            warnings.warn(
                f"BLDOptimizer: {type(self.base).__name__} keeps state, which carries memory from "
                "batch to batch; in the paper nothing but the network does. Plain torch.optim.SGD "
                "keeps none.",
                stacklevel=4,
            )

    @staticmethod
    def _plain_update(group: dict) -> None:
        """θ - lr · G with lr on the device, which torch's SGD would wait for; the same bits."""
        if params := [p for p in group["params"] if p.grad is not None]:
            grads, layers = [p.grad for p in params], list(range(len(params)))
            none = grads[0].new_zeros(len(params))
            ops.balanced_sgd_(params, grads, grads, layers, none, 0.0, group["lr"])

    # ---- what surrounds a stage ----

    @contextmanager
    def _stage(self, statistics: str) -> Iterator[None]:
        """Exact arithmetic and BatchNorm by policy; on an error the gradients are released."""
        with torch.enable_grad(), exact_float32(), view_statistics(self._norms(), statistics):
            try:
                yield
            except BaseException:
                self._gradients.release(self._parameters())
                raise

    def _require_finite(self, stage: str, *values: Tensor) -> None:
        if not self.check_finite:
            return
        for value in values:
            if not value.isfinite().all():
                raise FloatingPointError(
                    f"{stage} stage: a loss, gradient norm or parameter is not finite. step() puts "
                    "the network back as it was; lower lr, or look at the images and the weights"
                )

    def _check(self, images: Tensor, labels: Tensor) -> list[int]:
        """The head sizes, after every check that can be made before anything changes."""
        convert_view_batchnorm(self.model)  # also what was added since the last step
        device = next(self.model.parameters()).device
        checks.batch(images, labels, device, takes_uint8=self.augment is not None)
        sizes = checks.heads(self.model.head_sizes)
        checks.dtypes(self.model)
        checks.batch_norms(self.model, self.views_per_pass, self.statistics)
        checks.trainable(self.model)
        if device.type == "cpu" or self.check_finite:
            checks.batch_values(images, labels, sizes[-1])
        if self._wants_channels_last(device):
            lay_out(self.model, torch.channels_last)
        lay_out_state(self.state)
        return sizes

    # ---- a torch optimizer's life ----

    def _follow_model(self) -> None:
        super()._follow_model()
        self._gradients.forget(self._parameters())

    def load_state_dict(self, state_dict: dict) -> None:
        """Resume bit for bit. The model must have the heads it had when the state was saved."""
        super().load_state_dict(state_dict)
        self.release()
        self._captured = None

    def __getstate__(self) -> dict:
        return super().__getstate__() | {"_captured": None}

    def __repr__(self) -> str:
        options = ("lr", "temperature", "balance", "joint_steps", "views", "views_per_pass")
        lr = self.param_groups[0]["lr"]
        shown = ", ".join(f"{n}={lr if n == 'lr' else getattr(self, n)}" for n in options)
        return f"BLDOptimizer({shown}, base={type(self.base).__name__})"
