"""Batch-Level Distillation for PyTorch (Fini et al., ECCV 2020).

    from bld_ext import BLDOptimizer, MultiHead, SeededAugment

The engine is in bld_ext.ops (one function a kernel) and bld_ext.reference (their definitions); the
classes a training loop touches are in bld_ext.api and re-exported here.
"""

from bld_ext import ops, registry
from bld_ext.api import *  # noqa: F403
from bld_ext.api import __all__ as _api
from bld_ext.registry import SCHEMAS, backend

__all__ = [*_api, "SCHEMAS", "backend", "build_info", "ops"]


def build_info() -> dict[str, str] | None:
    """How bld_ext._C was built, or None where every op runs on its reference."""
    return registry._C and registry._C.build_info()
