"""The methods that the paper compares, one class each. To add a method, add a class.

All methods see the same views, split and initial weights, and all make their updates with a
BLDOptimizer, so they differ only where the paper says so. They follow Algorithms 1 and 2 and
section 4 of Fini et al., ECCV 2020. Each docstring says how what the paper leaves open was decided.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor, nn

from benchmarks.paper.networks import make_model
from benchmarks.paper.streams import Task
from bld_ext import (
    BLDOptimizer,
    MultiHead,
    SeededAugment,
    convert_view_batchnorm,
    ops,
    tensor_bytes,
)
from bld_ext.api import heads


@dataclass(frozen=True)
class Settings:
    """Everything a run depends on besides its method and its seed."""

    network: str
    lr: float  # α_j; α_w is this times `warmup_ratio`
    views: int
    augment: dict  # arguments of SeededAugment
    tasks: int = 5
    batch_size: int = 20
    views_per_pass: int | str = 1  # or "auto": as many as fit into memory
    balance: float = 2.0
    temperature: float = 2.0
    statistics: str = "once"
    momentum: float = 0.1
    schedule: str = "two_forward"
    limit: int | None = None  # most training images of a task
    warmup_ratio: float = 0.01
    joint_steps: int = 2
    layer: str = "module"
    lr_decay: float = 1.0  # factor of the learning rates from one task to the next
    dropout: float = 0.0  # share of values dropped behind each residual block
    capture: bool = False  # replay a CUDA graph in BLD, no-balancing and finetune
    # "mixed" is BLDOptimizer's; "bf16" runs the backbone under autocast, see networks.py
    precision: str = "fp32"
    l2_weight: float = 0.3  # of L2's penalty, in units of 1 / (2 α_j): at 1 it undoes a step
    offline_epochs: int = 10  # epochs of offline LwF, in batches of `offline_batch`
    offline_batch: int = 500
    offline_lr: float = 1e-4

    def as_dict(self) -> dict:
        return asdict(self)


PAPER_VIEWS = {"crop_padding": 4, "rotation": 15, "jitter": 0.2}
FAST = {"views_per_pass": "auto", "schedule": "shared_forward"}  # changes speed, not results
PRESETS = {
    "digits": Settings(  # tuned on seeds 0 to 4, see README.md
        "slim",
        3e-3,
        12,
        {"crop_padding": 1, "rotation": 15, "jitter": 0.2},
        views_per_pass=12,
        momentum=0.3,
        schedule="shared_forward",
    ),  # fmt: skip
    "mnist": Settings("resnet18", 1e-4, 50, PAPER_VIEWS, **FAST, l2_weight=0.1),
    "cifar10": Settings(
        "resnet18", 1e-4, 50, PAPER_VIEWS | {"flip": 0.5}, **FAST, offline_epochs=120
    ),
    "svhn": Settings("resnet18", 1e-4, 50, PAPER_VIEWS, **FAST, offline_epochs=120),
}
# For a dataset of one's own: the paper's learning rate, because no rate has been tuned for it.
OWN = replace(PRESETS["digits"], lr=1e-4, augment=PAPER_VIEWS)
PRECISIONS = ("fp32", "mixed", "bf16")
SMALL = {"network": "slim", "views": 4, "views_per_pass": 4}  # minutes a run on one core
CPU = SMALL | {"lr": 1e-3, "offline_epochs": 20, "offline_batch": 50, "offline_lr": 1e-3}
CPU_IMAGES = 6000  # training images of all tasks together


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode, without gradients; then each module back into its own mode."""
    with torch.no_grad(), heads.evaluating(model):
        yield


class Method:
    """A method that learns one stream. `learn` gets each batch once, in the order of the stream."""

    balance: float | None = None
    epochs = 1
    statistics: str | None = None  # when running statistics are updated; None: see the settings
    capturable = False  # whether it learns by `step` alone, so that a graph can replay it
    intra_grows_with: str | None = "views"  # what the bytes in "intra", here the bank, grow with

    def __init__(
        self, model: MultiHead, settings: Settings, seed: int, process_group: object = False
    ):
        self.model, self.settings = model, settings
        convert_view_batchnorm(model, self.statistics or settings.statistics)
        options = self.options(settings) | {"process_group": process_group}
        self.optimizer = BLDOptimizer(model, **options)
        self.optimizer.seed = seed

    def options(self, s: Settings) -> dict:
        return dict(
            lr=s.lr,
            warmup_lr=s.warmup_ratio * s.lr,
            views=s.views,
            views_per_pass=s.views_per_pass,
            augment=SeededAugment(**s.augment),
            balance=self.balance,
            temperature=s.temperature,
            schedule=s.schedule,
            joint_steps=s.joint_steps,
            layer=s.layer,
            precision="mixed" if s.precision == "mixed" else "fp32",
            capture=s.capture and self.capturable and not s.dropout,
        )

    def begin(self, task: Task) -> None:
        """Prepare for a task, before its head is added."""
        if self.model.heads:
            self.optimizer.lr = self.optimizer.lr * self.settings.lr_decay

    def batches(self, task: Task, epoch: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield the positions in the task, images and labels of each batch."""
        return task.batches(self.settings.batch_size)

    def batch_count(self, task: Task) -> int:
        """Return the number of batches in all epochs, 0 if the task is too small for one."""
        return self.epochs * task.batch_count(self.settings.batch_size)

    def learn(self, where: Tensor, images: Tensor, labels: Tensor) -> None:
        self.optimizer.step(images, labels)

    def extra_bytes(self) -> dict[str, int]:
        """Return the bytes held beside the network, by the columns of the paper's tables."""
        return {"intra": self.optimizer.last.memory["bank"], "inter": 0, "data": 0}

    def state_dict(self) -> dict:
        return {"optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.optimizer.load_state_dict(state["optimizer"])


class Finetune(Method):
    """Finetuning: L_t alone (λ = 0), in as many updates as BLD makes."""

    balance = 0.0
    capturable = True


class BLD(Method):
    """Batch-Level Distillation: Algorithms 1 and 2."""

    capturable = True

    def options(self, s: Settings) -> dict:
        return super().options(s) | {"balance": s.balance}


class NoBalancing(Method):
    """BLD with a factor of 1 in place of λ‖G_w‖/‖G_d‖ (table 5)."""

    capturable = True


class Alternated(Method):
    """Alternating updates on L_t and L_d, two of each, without warm-up and balancing (table 5).

    The predictions to distil from are made before the first update. That update has the full
    learning rate.
    """

    def options(self, s: Settings) -> dict:
        return super().options(s) | {"warmup_lr": s.lr}

    def learn(self, where: Tensor, images: Tensor, labels: Tensor) -> None:
        try:
            self.optimizer.warm_up(images, labels)
            self.optimizer.joint(images, labels, losses=["distillation"])
            for _ in range(self.settings.joint_steps - 1):
                self.optimizer.joint(images, labels, losses=["new"])
                self.optimizer.joint(images, labels, losses=["distillation"])
        finally:
            self.optimizer.release()


class L2(Method):
    """Batch-level L2: L_t + w Σ (θ - θ_before)², with θ_before from before the batch (section 4.2).

    The gradient of the penalty is added to that of L_t just before each update, with
    w = `l2_weight` / (2 α_j).
    """

    balance = 0.0
    intra_grows_with = None

    def __init__(self, model: MultiHead, settings: Settings, seed: int, *shared: object):
        super().__init__(model, settings, seed, *shared)
        self.before: dict[Tensor, Tensor] = {}
        self.copied = 0
        self.optimizer.base.register_step_pre_hook(self._add_penalty)

    @torch.no_grad()
    def _add_penalty(self, *_) -> None:
        weight = self.settings.l2_weight / self.optimizer.lr  # 2 w
        for group in self.optimizer.param_groups:  # with "in_backward", some layers at a time
            for param in group["params"]:
                if param.grad is not None and param in self.before:
                    param.grad.add_(param - self.before[param], alpha=weight)

    def learn(self, where: Tensor, images: Tensor, labels: Tensor) -> None:
        self.before = {p: p.detach().clone() for p in self.model.parameters()}
        buffers = [b for b in self.model.buffers() if b.is_floating_point()]
        self.copied = tensor_bytes(self.before.values()) + tensor_bytes(buffers)
        try:
            self.optimizer.step(images, labels)
        finally:
            self.before = {}

    def extra_bytes(self) -> dict[str, int]:
        """Return the bytes, with a copy of network and running statistics: the paper's 44.8 MB."""
        return super().extra_bytes() | {"intra": self.copied}


class LwF(Method):
    """Single-pass LwF: stores the network's predictions for a whole task before the task begins.

    It stores one prediction for each image, without augmentation, and uses λ_o = 1. Each batch gets
    the same three updates as in BLD; the joint ones are on L_t and L_d against the stored
    predictions.
    """

    intra_grows_with = "images"

    def __init__(self, model: MultiHead, settings: Settings, seed: int, *shared: object):
        super().__init__(model, settings, seed, *shared)
        self.targets: Tensor | None = None  # [images of the task, C_old]
        self.stored = 0

    def begin(self, task: Task) -> None:
        super().begin(task)
        self.stored = task.x_train.nbytes
        if not self.model.heads:
            self.targets = None
            return
        like, parts = next(self.model.parameters()), []
        plain = SeededAugment(dtype=like.dtype).plain
        with evaluating(self.model):
            for images in task.x_train.split(500):
                logits = self.model(plain(images.to(like.device)))
                sizes, tau = list(self.model.head_sizes), self.settings.temperature
                parts.append(ops.head_softmax(logits, sizes, tau))
        self.targets = torch.cat(parts)

    def bank(self, where: Tensor, images: Tensor) -> Tensor:
        """Return the stored predictions of a batch, repeated for each view."""
        if self.targets is None:
            like = next(self.model.parameters())
            return like.new_zeros(len(self.optimizer.views_here) * len(images), 0)
        views = len(self.optimizer.views_here)
        return self.targets[where.to(self.targets.device)].repeat(views, 1)

    def learn(self, where: Tensor, images: Tensor, labels: Tensor) -> None:
        try:
            self.optimizer.warm_up(images, labels)
            for _ in range(self.settings.joint_steps):
                self.optimizer.joint(images, labels, bank=self.bank(where, images))
        finally:
            self.optimizer.release()

    def extra_bytes(self) -> dict[str, int]:
        held = 0 if self.targets is None else self.targets.nbytes
        return {"intra": held, "inter": held, "data": self.stored}

    def state_dict(self) -> dict:
        return super().state_dict() | {"targets": self.targets, "stored": self.stored}

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        self.targets, self.stored = state["targets"], state["stored"]


class OfflineLwF(LwF):
    """Offline LwF, the upper bound: many epochs of large shuffled batches, one view and update."""

    statistics = "every_pass"

    def __init__(self, model: MultiHead, settings: Settings, seed: int, *shared: object):
        super().__init__(model, settings, seed, *shared)
        self.epochs, self.seed = settings.offline_epochs, seed

    def options(self, s: Settings) -> dict:
        rate = {"lr": s.offline_lr, "warmup_lr": 0.0}
        return super().options(s) | rate | {"views": 1, "views_per_pass": 1}

    def batches(self, task: Task, epoch: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + epoch)
        order = torch.randperm(len(task.x_train), generator=generator)
        return task.batches(self.settings.offline_batch, order)

    def batch_count(self, task: Task) -> int:
        return self.epochs * task.batch_count(self.settings.offline_batch)

    def learn(self, where: Tensor, images: Tensor, labels: Tensor) -> None:
        try:
            self.optimizer.joint(images, labels, bank=self.bank(where, images))
        finally:
            self.optimizer.release()


METHODS: dict[str, type[Method]] = {
    "finetune": Finetune,
    "l2": L2,
    "bld": BLD,
    "alternated": Alternated,
    "no-balancing": NoBalancing,
    "lwf": LwF,
    "lwf-offline": OfflineLwF,
}
PAPER = tuple(METHODS)  # the paper's; variants.py adds those that were tried beside them


def make_learner(
    method: str,
    settings: Settings,
    seed: int,
    device: str = "cpu",
    process_group: object = False,
) -> Method:
    """Make a method with a fresh network."""
    if settings.precision not in PRECISIONS:
        raise ValueError(f"precision: expected {', '.join(PRECISIONS)}, got {settings.precision!r}")
    autocast = settings.precision == "bf16"
    model = make_model(settings.network, settings.momentum, autocast, settings.dropout).to(device)
    if device == "cpu":  # as the published tables were measured; the optimizer leaves weights alone
        model = model.to(memory_format=torch.channels_last)
    return METHODS[method](model, settings, seed, process_group)


MC_OCL = ("finetune", "l2", "bld", "alternated", "no-balancing")  # only θ survives a batch
