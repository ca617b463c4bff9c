"""Warnings that point at the user's line."""

import contextlib
import os
import sys
import warnings

import torch

import bld_ext

_OURS = tuple(
    os.path.dirname(os.path.abspath(file)) + os.sep
    for file in (__file__, bld_ext.__file__, torch.__file__)
) + (os.path.abspath(contextlib.__file__),)


def warn(message: str) -> None:
    """A UserWarning at the innermost frame that is neither this package's nor torch's."""
    frame, level = sys._getframe(1), 2
    while frame.f_back and os.path.abspath(frame.f_code.co_filename).startswith(_OURS):
        frame, level = frame.f_back, level + 1
    warnings.warn(f"BLDOptimizer: {message}", stacklevel=level)
