"""A BLDOptimizer and what surrounds it: the seed, BatchNorm's policy and the memory format."""

import torch

from bld_ext import BLDOptimizer, convert_view_batchnorm

LAYOUTS = {True: torch.channels_last, False: torch.contiguous_format}


def arranged(model, lr=1e-4, *, seed=None, statistics=None, channels_last=None, **options):
    """None leaves each as it is by itself."""
    if statistics:
        convert_view_batchnorm(model, statistics)
    optimizer = BLDOptimizer(model, lr, **options)
    if channels_last is not None:
        model.to(memory_format=LAYOUTS[channels_last])
        optimizer._format.possible = channels_last
    if seed is not None:
        optimizer.seed = seed
    return optimizer
