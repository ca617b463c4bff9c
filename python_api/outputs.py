"""What a module returned, read as the tensors that are meant."""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

# the entries of an output that are the logits, where it has others beside them: of transformers,
# of torchvision's segmentation networks
LOGITS = ("logits", "out")


def side_by_side(output: object) -> Tensor:
    """Return the logits of all heads, `[N, ΣC, *]`, oldest head first, in what a model returned.

    A tensor is taken as it is, and so is an entry or attribute named "logits" or "out". Otherwise
    each tensor of a list or a dict is a head. A tuple is none, as it often has features, too.

    Raises:
        ValueError: the output is none of these.
    """
    one = _single(output)
    return torch.cat(_heads(output), 1) if one is None else one


def head_sizes(output: object) -> list[int] | None:
    """Return the classes of each head; None if one tensor holds the logits of all."""
    return None if _single(output) is not None else [x.shape[1] for x in _heads(output)]


def _single(output: object) -> Tensor | None:
    named = dict(_tensors(output))
    return next((named[name] for name in ("", *LOGITS) if name in named), None)


def _heads(output: object) -> list[Tensor]:
    named = dict(_tensors(output))
    found = [*named.values()]
    several = isinstance(output, (Mapping, list)) and len(found) == len(output)
    matrices = several and all(x.dim() > 1 for x in found)
    if matrices and len({(len(x), *x.shape[2:]) for x in found}) == 1:
        return found
    shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in named.items())
    raise ValueError(
        "model: expected logits [N, ΣC, *], or a list or dict with the logits of each head, got a "
        f"{type(output).__name__}{' of ' * bool(shapes)}{shapes}. Return the logits alone"
    )


def find_features(
    output: object, in_features: int, dense: bool, features: Callable[[object], Tensor] | None
) -> Tensor:
    """The features in a backbone's output.

    A tensor is taken as it is. In a tuple, a list, a dict or an object with attributes, as those of
    transformers, it is the only tensor of the right shape.

    Args:
        output: what the backbone returned.
        in_features: C of the features `[N, C]`, or `[N, C, *spatial]` where the heads are `dense`.
        features: chooses them instead.

    Raises:
        ValueError: none or several of the tensors have that shape.
    """
    if features is not None:
        output = features(output)
    named = dict(_tensors(output))
    found = {name: _pooled(x, dense) for name, x in named.items()}
    fitting = {id(named[name]): x for name, x in found.items() if _fits(x, in_features, dense)}
    if len(fitting) == 1:
        return next(iter(fitting.values()))
    shape = f"[N, {in_features}{', *' if dense else ''}]"
    shapes = ", ".join(f"{name} {tuple(x.shape)}".strip() for name, x in named.items())
    if len(fitting) > 1:
        raise ValueError(
            f"backbone: several of its outputs are features of shape {shape}: {shapes}. Say which, "
            "as in MultiHead(..., features=lambda output: output[0])"
        )
    remedy = "Give that in_features"
    if any(x.dim() > 2 and x.shape[1] == in_features for x in named.values()) and not dense:
        remedy = (
            "Pool them in the backbone, or for a prediction at each position give heads of "
            "convolutions: MultiHead(..., head=partial(nn.Conv2d, kernel_size=1))"
        )
    if not isinstance(output, Tensor):
        remedy += ", or choose with MultiHead(..., features=...)"
    raise ValueError(
        f"backbone: expected features of shape {shape} (in_features), got "
        f"{shapes or type(output).__name__}. {remedy}"
    )


def _tensors(output: object) -> Iterator[tuple[str, Tensor]]:
    """The tensors of an output, each with its name in it; that of a plain tensor is empty."""
    if isinstance(output, Tensor):
        yield "", output
    elif isinstance(output, Mapping):  # ModelOutput of transformers is one
        yield from ((str(k), v) for k, v in output.items() if isinstance(v, Tensor))
    elif isinstance(output, Sequence) and not isinstance(output, str):
        names = getattr(output, "_fields", map(str, range(len(output))))
        yield from ((n, v) for n, v in zip(names, output, strict=True) if isinstance(v, Tensor))
    elif hasattr(output, "__dict__"):
        yield from ((k, v) for k, v in vars(output).items() if isinstance(v, Tensor))


def _pooled(x: Tensor, dense: bool) -> Tensor:
    """`[N, C, 1, 1]` as `[N, C]`, where the heads take vectors."""
    single = x.dim() > 2 and all(size == 1 for size in x.shape[2:])
    return x.flatten(1) if single and not dense else x


def _fits(x: Tensor, in_features: int, dense: bool) -> bool:
    return x.shape[1:2] == (in_features,) and (x.dim() > 2 if dense else x.dim() == 2)
