"""Batch-Level Distillation for PyTorch (Fini et al., ECCV 2020).

    from bld_ext import BLDOptimizer, MultiHead, SeededAugment

bld_ext.ops has the ops, one function for each kernel; bld_ext.reference defines them in plain
PyTorch. The classes that a training loop uses are in bld_ext.api and re-exported here.
"""

from bld_ext import ops, registry
from bld_ext.api import *  # noqa: F403
from bld_ext.api import __all__ as _api
from bld_ext.registry import SCHEMAS, backend

__all__ = [*_api, "SCHEMAS", "backend", "build_info", "ops"]


def build_info() -> dict[str, str] | None:
    """Return how bld_ext._C was built, or None if it could not be loaded."""
    return registry._C and registry._C.build_info()
