"""The systems of the paper, each a few lines around one optimizer, so that all do equal work."""

from dataclasses import dataclass

from bld_ext import BLDOptimizer, MultiHead, SeededAugment


@dataclass(frozen=True)
class Settings:
    """Everything a run depends on besides its method and its seed."""

    network: str
    lr: float  # α_j; the warm-up takes a hundredth of it
    views: int
    augment: dict  # arguments of SeededAugment
    tasks: int = 5
    batch_size: int = 20
    views_per_pass: int = 1
    balance: float = 2.0
    temperature: float = 2.0
    statistics: str = "once"
    momentum: float = 0.1
    schedule: str = "two_forward"
    limit: int | None = None  # training images a task


PAPER_VIEWS = {"crop_padding": 4, "rotation": 15, "jitter": 0.2}
PRESETS = {
    "digits": Settings(  # chosen on seeds 0 to 4, see benchmarks/README.md
        "slim",
        3e-3,
        12,
        {"crop_padding": 1, "rotation": 15, "jitter": 0.2},
        views_per_pass=12,
        momentum=0.3,
    ),  # fmt: skip
    "mnist": Settings("resnet18", 1e-4, 50, PAPER_VIEWS),
    "cifar10": Settings("resnet18", 1e-4, 50, PAPER_VIEWS | {"flip": 0.5}),
    "svhn": Settings("resnet18", 1e-4, 50, PAPER_VIEWS),
}


def bld(model: MultiHead, settings: Settings, seed: int) -> BLDOptimizer:
    """Batch-Level Distillation."""
    return BLDOptimizer(
        model,
        lr=settings.lr,
        views=settings.views,
        views_per_pass=settings.views_per_pass,
        augment=SeededAugment(**settings.augment),
        balance=settings.balance,
        temperature=settings.temperature,
        statistics=settings.statistics,
        schedule=settings.schedule,
        seed=seed,
    )


def finetune(model: MultiHead, settings: Settings, seed: int) -> BLDOptimizer:
    """The same views and the same three updates a batch on L_t alone: λ = 0."""
    optimizer = bld(model, settings, seed)
    optimizer.balance = 0.0
    return optimizer


METHODS = {"finetune": finetune, "bld": bld}
