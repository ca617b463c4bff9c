"""Running out of memory: how it is told, and with which remedy it is told on."""

from collections.abc import Callable

import torch
from torch import Tensor

NO_MEMORY = (
    "DefaultCPUAllocator: ",
    "_STATUS_ALLOC_FAILED",
    # a kernel of ours, which is told that a call failed but not why
    "aoti_torch_empty_strided(",
    *(f'"aten::{op}"' for op in ("new_empty", "contiguous", "clone", "to")),
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device, or the processor's allocator, has said that there is no memory left."""
    named = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return named or any(text in str(error) for text in NO_MEMORY)


def too_much(views: int, images: int, automatic: bool) -> torch.OutOfMemoryError:
    """The error to raise for a pass of so many views of so many images.

    A frame that held it would be a cycle, and hold what did not fit.
    """
    remedy = "set views_per_pass lower, or to 'auto'"
    if automatic:
        remedy = "the next batch will have fewer; a smaller budget, as in views_per_pass='64 MiB', "
        remedy += "has them at once"
    if views == 1:
        remedy = "use fewer images a batch, schedule='in_backward', or a smaller network"
    return torch.OutOfMemoryError(
        f"views_per_pass: {views} views of {images} images in one pass, and "
        f"their gradients, do not fit into memory; {remedy}"
    )


def within_memory(
    run: Callable[[], Tensor | None], explain: Callable[[], torch.OutOfMemoryError]
) -> Tensor | None:
    """Or the error that `explain` makes.

    No context manager: contextlib's frame holds the error it hands over, a cycle.
    """
    try:
        return run()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise explain() from error
