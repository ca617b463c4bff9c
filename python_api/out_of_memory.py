"""Recognises that a pass ran out of memory, and raises an error that names a remedy."""

from collections.abc import Callable

import torch
from torch import Tensor

NO_MEMORY = (
    "DefaultCPUAllocator: ",
    "_STATUS_ALLOC_FAILED",
    # from our kernels, which learn that a call failed but not why
    "aoti_torch_empty_strided(",
    *(f'"aten::{op}"' for op in ("new_empty", "contiguous", "clone", "to")),
)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether the error says that a device or the CPU allocator has no memory left."""
    named = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return named or any(text in str(error) for text in NO_MEMORY)


def too_much(views: int, images: int, automatic: bool) -> torch.OutOfMemoryError:
    """Return the error for a pass of `views` views of `images` images that does not fit.

    Raise it without storing it in a variable: the error refers to the frames it passes, so a frame
    that held it would form a reference cycle and keep the tensors that did not fit.
    """
    remedy = "set views_per_pass lower, or to 'auto'"
    if automatic:
        remedy = "the next batch will use fewer views a pass; to use fewer at once, set a smaller "
        remedy += "budget, such as views_per_pass='64 MiB'"
    if views == 1:
        remedy = "use fewer images a batch, schedule='in_backward', or a smaller network"
    return torch.OutOfMemoryError(
        f"views_per_pass: {views} views of {images} images in one pass, and "
        f"their gradients, do not fit into memory; {remedy}"
    )


def within_memory(
    run: Callable[[], Tensor | None], explain: Callable[[], torch.OutOfMemoryError]
) -> Tensor | None:
    """Return `run()`, or raise the error that `explain` makes if it runs out of memory.

    This is not a context manager, because contextlib's frame would hold the error in a cycle.
    """
    try:
        return run()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise explain() from error
