"""The classes and functions that a training loop uses; bld_ext re-exports them."""

from bld_ext.api.augment import SeededAugment
from bld_ext.api.batch_norm import ViewBatchNorm
from bld_ext.api.convert import convert_view_batchnorm, revert_view_batchnorm
from bld_ext.api.heads import MultiHead
from bld_ext.api.memory import bank_bytes, tensor_bytes
from bld_ext.api.optimizer import BLDOptimizer
from bld_ext.api.report import StepReport

__all__ = [
    "BLDOptimizer",
    "MultiHead",
    "SeededAugment",
    "StepReport",
    "ViewBatchNorm",
    "bank_bytes",
    "convert_view_batchnorm",
    "revert_view_batchnorm",
    "tensor_bytes",
]
