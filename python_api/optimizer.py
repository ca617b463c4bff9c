"""BLDOptimizer: Batch-Level Distillation where a torch optimizer would stand.

Fini, Lathuilière, Sangineto, Nabi, Ricci: "Online Continual Learning under Extreme Memory Constraints",
ECCV 2020. Names follow the paper: warm-up (Algorithm 1) and joint training (Algorithm 2); L_t is the loss
of the newest head, L_d the distillation loss of the older ones, G_w and G_d their gradients.
"""

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from bld_ext import ops
from bld_ext.api.batch_norm import ViewBatchNorm, convert_view_batchnorm, view_statistics
from bld_ext.api.memory import tensor_bytes
from bld_ext.api.precision import exact_float32, replayable_rng
from bld_ext.philox import stream_seed

LAYERS = ("module", "tensor", "network")
SCHEDULES = ("two_forward", "shared_forward")
STATISTICS = {"once": ("pool", "keep"), "every_pass": ("every_pass", "every_pass")}
FORWARD_RNG = 255  # the op word of the Philox counter that seeds a forward pass


@dataclass
class StepReport:
    """What the last step did, as device tensors: reading one waits for the device, nothing else does.

    The optimizer itself never reads it again: it is no memory from batch to batch.
    """

    warm_up_loss: Tensor  # L_t of the batch before it was learned, summed over images, mean over views
    layers: tuple[str, ...]  # the name of each layer, L of them
    reference_norms: Tensor  # [L]: ‖G_w‖
    new_loss: list[Tensor] = field(default_factory=list)  # L_t of each joint repetition
    distillation_loss: list[Tensor] = field(default_factory=list)  # L_d, where there are old heads
    distillation_norms: list[Tensor] = field(default_factory=list)  # [L] each: ‖G_d‖ before balancing
    factors: list[Tensor] = field(default_factory=list)  # [L] each: λ‖G_w‖/‖G_d‖
    memory: dict[str, int] = field(default_factory=dict)  # bytes held while the batch was learned


@dataclass
class _Batch:
    """What the warm-up leaves for the joint repetitions; released before the next batch."""

    bank: Tensor  # [V·B, C_old, *]
    layers: dict[Tensor, int]  # the layer index of each parameter
    reference_norms: Tensor  # [L]
    number: int  # of this batch in the stream
    shape: tuple[int, ...]


class BLDOptimizer(torch.optim.Optimizer):
    """Learns a stream of tasks batch by batch, distilling the network into itself within each batch.

    One `step` makes 1 + `joint_steps` updates. Warm-up: L_t of the newest head over all views gives G_w;
    the softened predictions of the older heads go into a bank; θ' = θ - α_w G_w. Joint, repeated: L_d
    against the bank gives G_d, each layer of it is rescaled to λ‖G_w‖/‖G_d‖ · G_d, dL_t/dθ is added, and
    θ'' = θ' - α_j G. Losses are summed over the batch and averaged over the views. Then everything but
    the network is released.

    Args:
        model: maps images to the logits of all heads side by side, `[N, ΣC]` or `[N, ΣC, *spatial]`,
            oldest head first, and has `head_sizes`. float32 or float64: reduced precision drowns the
            distillation gradient in rounding. Heads may be added at any time.
        lr: α_j, the learning rate of the joint updates.
        warmup_lr: α_w, default lr / 100. It keeps its ratio to lr when a scheduler changes lr.
        temperature: τ of the softened predictions.
        balance: λ. 0 is finetuning: the distillation passes are then left out.
        joint_steps: joint repetitions.
        views: views V of each image; default 50 with `augment`, else 1 (the images themselves).
        views_per_pass: views that go through the network as one batch; a matter of speed and memory.
        augment: `augment(images, seed=, step=, views=, indices=)` giving the views one after the other,
            `[len(views)·B, ...]`, the same every time: a `SeededAugment`, or your own.
        layer: what is balanced as one: "module" (weight and bias together), "tensor" or "network".
        schedule: "two_forward" holds one gradient and the bank, and runs two forward passes a view in
            each joint repetition; "shared_forward" runs one and holds a second gradient.
        statistics: when BatchNorm's running statistics move: "once" a batch, from all views of the
            warm-up pooled, or at "every_pass", which is PyTorch's way.
        base: the optimizer class that makes the updates, called as `base(params, lr=lr)`; options go
            through functools.partial. One that keeps state carries memory from batch to batch.
        check_finite: raise FloatingPointError on a loss or gradient norm that is not finite, and put
            the network back as it was before the step. Costs a copy of the network and a wait for the
            device in each stage. On a CPU, images and labels are checked even without it.
        seed: of the views and of the forward passes' random numbers (dropout), 0 to 2**63 - 1.

    The model's BatchNorm modules are turned into `ViewBatchNorm` in place (same parameters, buffers and
    state_dict). TF32, reduced-precision matrix products and autocast are off inside a step and put back
    after it; so is torch's random state. `step` owns the gradients: they are released when it returns.

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
        balance: float = 2.0,
        joint_steps: int = 2,
        views: int | None = None,
        views_per_pass: int = 1,
        augment: Callable[..., Tensor] | None = None,
        layer: str = "module",
        schedule: str = "two_forward",
        statistics: str = "once",
        base: Callable[..., torch.optim.Optimizer] = torch.optim.SGD,
        check_finite: bool = False,
        seed: int = 0,
    ):
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"model: expected a torch.nn.Module, got {type(model).__name__}. BLDOptimizer runs the "
                "forward passes itself, so it takes the model, not its parameters"
            )
        if not hasattr(model, "head_sizes"):
            raise ValueError(
                f"model: {type(model).__name__} has no head_sizes. Wrap the backbone in MultiHead, or "
                "give the model a head_sizes: classes of each head, oldest first"
            )
        if views is None:
            views = 50 if augment else 1
        _choice("layer", layer, LAYERS)
        _choice("schedule", schedule, SCHEDULES)
        _choice("statistics", statistics, STATISTICS)
        _at_least("views", views, 1)
        _at_least("views_per_pass", views_per_pass, 1)
        _at_least("joint_steps", joint_steps, 0)
        _number("temperature", temperature, positive=True)
        _number("balance", balance)
        _number("lr", lr)
        if warmup_lr is not None:
            _number("warmup_lr", warmup_lr)
            _number("lr, with a warmup_lr", lr, positive=True)
        if not (isinstance(seed, int) and 0 <= seed < 2**63):
            raise ValueError(f"seed: expected 0 to 2**63 - 1, got {seed!r}")
        for name, param in model.named_parameters():
            if param.dtype not in (torch.float32, torch.float64):
                raise ValueError(
                    f"model: parameter {name} is {param.dtype}; expected torch.float32 or float64. "
                    "In reduced precision the distillation gradient is rounding noise: call model.float()"
                )

        self.model = convert_view_batchnorm(model)
        self.base = base(list(model.named_parameters()), lr=lr)
        super().__init__(self.base.param_groups, self.base.defaults)
        self.warmup_ratio = 0.01 if warmup_lr is None else warmup_lr / lr
        self.temperature = temperature
        self.balance = balance
        self.joint_steps = joint_steps
        self.views = views
        self.views_per_pass = views_per_pass
        self.augment = augment
        self.layer = layer
        self.schedule = schedule
        self.statistics = statistics
        self.check_finite = check_finite
        self.seed = seed
        self.batches = 0  # learned so far; the step word of the views' random numbers
        self.last: StepReport | None = None
        self._batch: _Batch | None = None
        self._warned_of_state = False
        self._share_with_base()

    # ---- the step ----

    def step(self, images: Tensor, labels: Tensor) -> Tensor:
        """Learn one incoming batch: the warm-up, then the joint repetitions.

        Args:
            images: `[B, ...]`, on the model's device; the views are made from it.
            labels: `[B]` int64 (`[B, *spatial]` for dense logits), classes of the newest head from 0.

        Returns:
            L_t of the batch before it was learned: a device scalar, summed over the images and averaged
            over the views. More is in `optimizer.last`.

        Raises:
            ValueError, TypeError, RuntimeError: bad images, labels or model; nothing has changed then.
            FloatingPointError: with `check_finite`; the network is as before the step.
        """
        with self._undone_on_error() if self.check_finite else _nothing():
            try:
                loss = self.warm_up(images, labels)
                for _ in range(self.joint_steps):
                    self.joint(images, labels)
            finally:
                self.release()
        return loss

    def warm_up(self, images: Tensor, labels: Tensor) -> Tensor:
        """Algorithm 1: fill the bank, measure ‖G_w‖ per layer, take the warm-up update. Returns L_t."""
        sizes = self._check(images, labels)
        self._adopt_new_parameters()
        self.release()
        names, layers = self._layers()
        bank, losses = None, []
        with self._stage(STATISTICS[self.statistics][0]):
            for rows, logits in self._forward(images, self.batches, sizes):
                repeated = labels.repeat(len(logits) // len(labels), *(1,) * (labels.dim() - 1))
                loss, targets = ops.warm_up_loss(logits, repeated, sizes, self.temperature)
                if bank is None:
                    shape = (self.views * len(images), *targets.shape[1:])
                    bank = targets.new_empty(shape)
                bank[rows] = targets
                (loss / self.views).backward()
                losses.append(loss.detach())
            loss = torch.stack(losses).sum() / self.views
            norms = self._norms(layers)
            self._require_finite("warm-up", loss, norms)
        gradients = self._gradient_bytes()
        self._update(self.warmup_ratio)
        self._batch = _Batch(bank, layers, norms, self.batches, tuple(images.shape))
        self.batches += 1
        memory = {
            "bank": tensor_bytes([bank]),
            "layer_norms": tensor_bytes([norms]),
            "seed": 16,  # the seed and the batch's number
            "gradients": gradients,
        }
        self.last = StepReport(loss, names, norms, memory=memory)
        return loss

    def joint(self, images: Tensor, labels: Tensor) -> Tensor:
        """Algorithm 2, one repetition on the batch of the last `warm_up`. Returns L_t."""
        if self._batch is None:
            raise RuntimeError("joint: there is no bank; call warm_up(images, labels) first")
        sizes = self._check(images, labels)
        if tuple(images.shape) != self._batch.shape or sum(sizes[:-1]) != self._batch.bank.shape[1]:
            raise ValueError(
                f"images: expected the batch of the last warm_up, shape {self._batch.shape} and "
                f"{self._batch.bank.shape[1]} old classes, got {tuple(images.shape)} and {sum(sizes[:-1])}"
            )
        self.zero_grad()
        distil = len(sizes) > 1 and self.balance != 0
        with self._stage(STATISTICS[self.statistics][1]):
            if not distil:
                loss = self._new_task_pass(images, labels, sizes)
            elif self.schedule == "two_forward":
                self._distillation_pass(images, sizes)
                self._balance({p: p.grad for p in self._parameters() if p.grad is not None})
                loss = self._new_task_pass(images, labels, sizes)
            else:
                loss = self._shared_pass(images, labels, sizes)
            self._require_finite("joint", loss, *self.last.distillation_loss[-1:])
        self.last.new_loss.append(loss)
        self._update(1.0)
        return loss

    def release(self) -> None:
        """Drop the bank, the norms and the gradients, as before the next batch arrives."""
        self._batch = None
        self.zero_grad()

    # ---- passes over the views ----

    def _forward(self, images: Tensor, number: int, sizes: list[int]) -> Iterator[tuple]:
        """Logits of all views, pass by pass, with the rows each pass has in the bank."""
        B = len(images)
        norms = [m for m in self.model.modules() if isinstance(m, ViewBatchNorm)]
        for first in range(0, self.views, self.views_per_pass):
            views = range(first, min(first + self.views_per_pass, self.views))
            for norm in norms:
                norm.views = len(views)
            with replayable_rng(images.device) as reseed:
                reseed(stream_seed(self.seed, number, first, FORWARD_RNG))
                logits = self.model(self._make_views(images, number, views))
            expected = (len(views) * B, sum(sizes))
            if logits.dim() < 2 or logits.shape[:2] != expected:
                raise ValueError(
                    f"model: expected logits of shape [{expected[0]}, {expected[1]}, *] (images, classes "
                    f"of head_sizes {sizes}), got {tuple(logits.shape)}"
                )
            yield slice(first * B, first * B + len(logits)), logits

    def _make_views(self, images: Tensor, number: int, views: range) -> Tensor:
        if self.augment is None:
            return images.repeat(len(views), *(1,) * (images.dim() - 1))
        indices = torch.arange(len(images), device=images.device)
        return self.augment(images, seed=self.seed, step=number, views=views, indices=indices)

    def _distillation_pass(self, images: Tensor, sizes: list[int]) -> None:
        batch, losses = self._batch, []
        for rows, logits in self._forward(images, batch.number, sizes):
            loss = ops.distillation_loss(logits, batch.bank[rows], sizes[:-1], self.temperature)
            (loss / self.views).backward()
            losses.append(loss.detach())
        self.last.distillation_loss.append(torch.stack(losses).sum() / self.views)

    def _new_task_pass(self, images: Tensor, labels: Tensor, sizes: list[int]) -> Tensor:
        losses = []
        for _, logits in self._forward(images, self._batch.number, sizes):
            repeated = labels.repeat(len(logits) // len(labels), *(1,) * (labels.dim() - 1))
            loss, _ = ops.warm_up_loss(logits, repeated, sizes, self.temperature)
            (loss / self.views).backward()
            losses.append(loss.detach())
        return torch.stack(losses).sum() / self.views

    def _shared_pass(self, images: Tensor, labels: Tensor, sizes: list[int]) -> Tensor:
        batch, params = self._batch, [p for p in self._parameters() if p.requires_grad]
        distilled: dict[Tensor, Tensor] = {}
        new_losses, old_losses = [], []
        for rows, logits in self._forward(images, batch.number, sizes):
            repeated = labels.repeat(len(logits) // len(labels), *(1,) * (labels.dim() - 1))
            new, old = ops.joint_loss(logits, repeated, batch.bank[rows], sizes, self.temperature)
            grads = torch.autograd.grad(
                old / self.views, params, retain_graph=True, allow_unused=True
            )
            for param, grad in zip(params, grads, strict=True):
                if grad is not None:
                    distilled[param] = grad if param not in distilled else distilled[param].add_(grad)
            (new / self.views).backward()
            new_losses.append(new.detach())
            old_losses.append(old.detach())
        self.last.distillation_loss.append(torch.stack(old_losses).sum() / self.views)
        self.last.memory["second_gradients"] = tensor_bytes(distilled.values())
        self._balance(distilled)
        for param, grad in distilled.items():
            param.grad = grad if param.grad is None else param.grad.add_(grad)
        return torch.stack(new_losses).sum() / self.views

    # ---- gradients per layer ----

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _layers(self) -> tuple[tuple[str, ...], dict[Tensor, int]]:
        """The layers' names, and the layer index of each parameter."""
        names: dict[str, int] = {}
        layers: dict[Tensor, int] = {}
        owners = {p: name for name, p in self.model.named_parameters()}
        for i, param in enumerate(self._parameters()):
            tensor = owners.get(param, f"parameter {i}")
            module = tensor.rpartition(".")[0] if param in owners else tensor
            name = {"module": module, "tensor": tensor, "network": "network"}[self.layer]
            layers[param] = names.setdefault(name, len(names))
        return tuple(names), layers

    def _norms(self, layers: dict[Tensor, int]) -> Tensor:
        held = [p for p in layers if p.grad is not None]
        if not held:
            raise RuntimeError("model: no parameter received a gradient; are all of them frozen?")
        count = max(layers.values()) + 1
        return ops.layer_norms([p.grad for p in held], [layers[p] for p in held], count)

    def _balance(self, grads: dict[Tensor, Tensor]) -> None:
        index = [self._batch.layers[p] for p in grads]
        factors, norms = ops.balance_layers_(
            list(grads.values()), index, self._batch.reference_norms, self.balance
        )
        self.last.factors.append(factors)
        self.last.distillation_norms.append(norms)
        self._require_finite("joint", norms)

    def _gradient_bytes(self) -> int:
        return tensor_bytes(p.grad for p in self._parameters() if p.grad is not None)

    def _update(self, ratio: float) -> None:
        """One update of the base optimizer at `ratio` times each group's learning rate."""
        rates = [group["lr"] for group in self.param_groups]
        try:
            for group in self.param_groups:
                group["lr"] = group["lr"] * ratio
            self.base.step()
        finally:
            for group, rate in zip(self.param_groups, rates, strict=True):
                group["lr"] = rate
        self.zero_grad()
        if not self._warned_of_state and any(self.state.values()):
            self._warned_of_state = True
            warnings.warn(
                f"BLDOptimizer: {type(self.base).__name__} keeps state, which carries memory from batch "
                "to batch; the constraint of the paper is that nothing but the network does. Plain "
                "torch.optim.SGD keeps none.",
                stacklevel=4,
            )

    # ---- what surrounds a stage ----

    @contextmanager
    def _stage(self, statistics: str) -> Iterator[None]:
        """Exact arithmetic and BatchNorm by policy; on an error the gradients are released."""
        norms = [m for m in self.model.modules() if isinstance(m, ViewBatchNorm)]
        with torch.enable_grad(), exact_float32(), view_statistics(norms, statistics):
            try:
                yield
            except BaseException:
                self.zero_grad()
                raise

    @contextmanager
    def _undone_on_error(self) -> Iterator[None]:
        """Put parameters, buffers, the base's state and the batch count back if anything raises."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        before = [t.detach().clone() for t in tensors]
        state = {
            p: {k: v.clone() if isinstance(v, Tensor) else v for k, v in entry.items()}
            for p, entry in self.state.items()
        }
        batches = self.batches
        try:
            yield
        except BaseException:
            with torch.no_grad():
                for tensor, saved in zip(tensors, before, strict=True):
                    tensor.copy_(saved)
            self.state.clear()
            self.state.update(state)
            self.batches = batches
            raise

    def _require_finite(self, stage: str, *values: Tensor) -> None:
        if not self.check_finite:
            return
        for value in values:
            if not value.isfinite().all():
                what = "loss" if value.dim() == 0 else "gradient norm"
                raise FloatingPointError(
                    f"{stage} stage: the {what} is not finite ({value.tolist()}); the network is as "
                    "before this step. Lower lr, or look at the images and the weights"
                )

    def _check(self, images: Tensor, labels: Tensor) -> list[int]:
        """The head sizes, after every check that can be made before anything changes."""
        if not isinstance(images, Tensor) or not isinstance(labels, Tensor):
            raise TypeError(
                "step: expected the batch, step(images, labels), as two tensors; got "
                f"{type(images).__name__} and {type(labels).__name__}"
            )
        sizes = list(self.model.head_sizes)
        if not sizes:
            raise RuntimeError("model: it has no head yet; call add_head(num_classes) before a step")
        device = next(self.model.parameters()).device
        for name, tensor in (("images", images), ("labels", labels)):
            if tensor.device != device:
                raise ValueError(f"{name}: expected the model's device, {device}, got {tensor.device}")
        if images.dim() < 2 or len(images) == 0:
            raise ValueError(f"images: expected [B, ...] with B ≥ 1, got {tuple(images.shape)}")
        if self.augment is None and not images.is_floating_point():
            raise ValueError(
                f"images: expected a float dtype where there is no augment, got {images.dtype}. Use "
                "SeededAugment(), which takes uint8, or images.float() / 255"
            )
        if labels.dtype != torch.int64:
            raise ValueError(f"labels: expected torch.int64, got {labels.dtype}: use labels.long()")
        if labels.dim() < 1 or len(labels) != len(images):
            raise ValueError(
                f"labels: expected one for each of {len(images)} images, got shape {tuple(labels.shape)}"
            )
        if device.type == "cpu" or self.check_finite:
            self._check_values(images, labels, sizes[-1])
        return sizes

    def _check_values(self, images: Tensor, labels: Tensor, classes: int) -> None:
        if images.is_floating_point() and not images.isfinite().all():
            bad = (~images.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
            raise ValueError(f"images: expected finite values, got nan or inf in images {bad}")
        low, high = labels.min().item(), labels.max().item()
        if low < 0 or high >= classes:
            raise ValueError(
                f"labels: expected classes of the newest head, 0 to {classes - 1}, got {low} to {high}. "
                "Number each task's classes from 0, and add the head before its first batch"
            )

    # ---- a torch optimizer's life ----

    def _adopt_new_parameters(self) -> None:
        """Heads added since the last step join the first group, so that schedulers reach them."""
        known = {id(p) for p in self._parameters()}
        group = self.param_groups[0]
        for name, param in self.model.named_parameters():
            if id(param) not in known:
                group["params"].append(param)
                group["param_names"].append(name)

    def _share_with_base(self) -> None:
        """One list of groups and one state for both, so that schedulers and state_dict see all of it."""
        self.base.__setstate__({"state": self.state, "param_groups": self.param_groups})
        self.state, self.param_groups = self.base.state, self.base.param_groups

    def state_dict(self) -> dict:
        """As every torch optimizer's, with "bld": the seed and the number of batches learned."""
        return super().state_dict() | {"bld": {"seed": self.seed, "batches": self.batches}}

    def load_state_dict(self, state_dict: dict) -> None:
        """Resume bit for bit. The model must have the heads it had when the state was saved."""
        if "bld" not in state_dict:
            raise ValueError("state_dict: expected one of a BLDOptimizer, with the key 'bld'")
        self._adopt_new_parameters()
        params = dict(self.model.named_parameters())
        saved = state_dict["param_groups"][0].get("param_names", [])
        ours = self.param_groups[0]["param_names"]
        if set(saved) != set(ours):
            raise ValueError(
                f"state_dict: its parameters differ from the model's by {sorted(set(saved) ^ set(ours))}. "
                "Add the heads to the model before loading"
            )
        self.param_groups[0]["params"] = [params[name] for name in saved]
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "bld"})
        self.seed, self.batches = state_dict["bld"]["seed"], state_dict["bld"]["batches"]
        self.release()

    def __getstate__(self) -> dict:
        return self.__dict__.copy()

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._share_with_base()

    def __repr__(self) -> str:
        options = ("lr", "temperature", "balance", "joint_steps", "views", "views_per_pass")
        values = {"lr": self.param_groups[0]["lr"], **self.__dict__}
        shown = ", ".join(f"{name}={values[name]}" for name in options)
        return f"BLDOptimizer({shown}, base={type(self.base).__name__})"


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def _choice(name: str, value: str, choices) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")


def _at_least(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}: expected a whole number of at least {least}, got {value!r}")


def _number(name: str, value: float, positive: bool = False) -> None:
    value = float(value)
    if not math.isfinite(value) or value < 0 or (positive and value == 0):
        raise ValueError(f"{name}: expected a finite number {'>' if positive else '≥'} 0, got {value}")
