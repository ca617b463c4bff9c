"""Acts on each layer's gradient while backward is still computing those of earlier layers."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor

from bld_ext.api.memory import tensor_bytes

BUCKET_BYTES = 8 * 2**20  # gradients wait until they are this large, so that one call serves many


@contextmanager
def complete_layers(
    layers: dict[Tensor, int],
    act: Callable[[list[Tensor]], None],
    bucket_bytes: int | None = None,
) -> Iterator[None]:
    """Pass each layer to `act(params)` as soon as the enclosed backward completes its gradient.

    A layer is complete when all its parameters that require a gradient have accumulated theirs in
    this pass, or when the pass ends. `act` gets one or more complete layers at a time: those of
    their parameters that have a gradient, layer by layer. It may change the gradients, update the
    parameters and release the gradients.

    Args:
        layers: the layer index of each parameter.
        act: called inside backward; on a GPU in the stream of backward.
        bucket_bytes: `act` is called once this many bytes of gradients are complete. Default 8 MiB.

    Raises:
        RuntimeError: a parameter gets a second gradient after its layer was complete, as under
            reentrant checkpointing of modules that share it.
    """
    limit = BUCKET_BYTES if bucket_bytes is None else bucket_bytes
    members: dict[int, list[Tensor]] = {}
    for param, l in layers.items():
        members.setdefault(l, []).append(param)
    missing = {l: {p for p in params if p.requires_grad} for l, params in members.items()}
    bucket: list[Tensor] = []

    def flush() -> None:
        if bucket:
            params = bucket.copy()
            bucket.clear()
            act(params)

    def complete(l: int) -> None:
        del missing[l]
        bucket.extend(p for p in members[l] if p.grad is not None)
        if tensor_bytes(p.grad for p in bucket) >= limit:
            flush()

    def accumulated(param: Tensor) -> None:
        l = layers[param]
        if l not in missing:
            raise RuntimeError(
                f"model: a parameter of shape {tuple(param.shape)} got a second gradient after its "
                "layer was complete, as reentrant checkpointing does; use "
                "schedule='two_forward', or checkpoint(use_reentrant=False)"
            )
        missing[l].discard(param)
        if not missing[l]:
            complete(l)

    hooks = [p.register_post_accumulate_grad_hook(accumulated) for p in layers if p.requires_grad]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    for l in list(missing):
        complete(l)
    flush()
