"""MultiHead: a shared backbone with one classifier a task."""

import operator
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy

from bld_ext.api import checks
from bld_ext.api.convert import unwatched
from bld_ext.api.outputs import find_features
from bld_ext.reference import WHITE


class MultiHead(nn.Module):
    """A backbone Ψ and the heads φ_1 … φ_t on its features.

    Each head is a module of its own, so layer-wise balancing treats it as a layer of its own.
    Plain `nn.Linear` heads are computed in one matrix product; a head of another class, or one with
    hooks, is called. `load_state_dict` adds the heads that a checkpoint has and the model lacks.

    Args:
        backbone: maps images `[N, ...]` to features `[N, in_features]`, or to a tuple, a dict or an
            object with attributes in which one tensor has that shape.
        in_features: length of a feature vector. Default: `backbone.head_hidden_size` or
            `backbone.num_features`, as models of timm have it. For a network with its
            classifier still on, see `replacing`.
        head: makes the classifier of a task, called as `head(in_features, num_classes)`. For
            features `[N, in_features, H, W]` and one prediction a pixel it is
            `partial(nn.Conv2d, kernel_size=1)`.
        features: `features(output)` chooses the features in what the backbone returns, where their
            shape does not tell.

    Example:
        model = MultiHead(backbone, in_features=512)
        model.add_head(2)
        logits = model(images)                   # [N, ΣC], oldest head first
        classes = model.predict(images, task=0)  # [N], 0 or 1
    """

    def __init__(
        self,
        backbone: nn.Module,
        in_features: int | None = None,
        head: Callable[[int, int], nn.Module] = nn.Linear,
        features: Callable[[object], Tensor] | None = None,
    ):
        super().__init__()
        if not isinstance(backbone, nn.Module):
            raise TypeError(f"backbone: expected a module, got {type(backbone).__name__}")
        if isinstance(backbone, MultiHead):
            raise TypeError(
                "backbone: expected a network that returns features, got a MultiHead, which has "
                "heads of its own; give its backbone, model.backbone"
            )
        if in_features is None:
            names = ("head_hidden_size", "num_features")  # of timm; the first has a last layer in
            in_features = next((s for n in names if (s := getattr(backbone, n, None))), None)
            if in_features is None:
                raise ValueError(
                    "in_features: expected the length of a feature vector, got None, and the "
                    f"backbone, a {type(backbone).__name__}, has no num_features. If it still has "
                    f"its classifier, use MultiHead.replacing(model, {_classifier(backbone)!r})"
                )
        self.backbone = backbone
        self.in_features = checks.at_least("in_features", in_features, 1)
        self.heads = nn.ModuleList()
        self._make_head, self._choose = head, features
        self.replaced: str | None = None

    @classmethod
    def replacing(cls, model: nn.Module, name: str, **options) -> "MultiHead":
        """Put heads in the place of a network's classifier, the module called `name`.

        That module becomes an `nn.Identity`, in place; `replaced` tells what it was. `in_features`
        are those of its first linear layer. `options` are those of the constructor.

        Example:
            model = MultiHead.replacing(torchvision.models.resnet18(weights="DEFAULT"), "fc")
        """
        modules = dict(model.named_modules())
        found = modules.get(name) if name else None
        linear = None if found is None else _first_linear(found)
        if linear is None:
            got = f"{name!r}" + ("" if found is None else f", a {type(found).__name__}")
            known = _classifier(model)
            there = (
                f"such as {known!r}" if known else "but this model has none: use MultiHead(model)"
            )
            raise ValueError(
                "name: expected a module of the model with a linear layer in it, "
                f"{there}, got {got}"
            )
        options.setdefault("in_features", linear.in_features)
        multi = cls(model, **options)
        parent, _, last = name.rpartition(".")
        setattr(modules[parent], last, nn.Identity())
        multi.replaced = f"{name}, {found}"
        return multi

    def extra_repr(self) -> str:
        return "" if self.replaced is None else f"replaced: {self.replaced}"

    @property
    def head_sizes(self) -> tuple[int, ...]:
        """The number of classes of each head, oldest first."""
        return tuple(_classes_of(head, f"heads.{i}") for i, head in enumerate(self.heads))

    def add_head(self, num_classes: int) -> nn.Module:
        """Add the classifier of a new task, initialised as its module does, and return it."""
        head = self._new_head(checks.at_least("num_classes", num_classes, 1))
        self.heads.append(head)
        return head

    def _new_head(self, num_classes: int) -> nn.Module:
        like = next((p for p in self.parameters() if p.is_floating_point()), torch.empty(0))
        head = self._make_head(self.in_features, num_classes)
        if not isinstance(head, nn.Module):
            raise TypeError(f"head: expected it to make a module, got {type(head).__name__}")
        if (found := _classes_of(head, "head")) != num_classes:
            raise ValueError(f"head: expected one of {num_classes} classes, got one of {found}")
        if {*head.parameters()} & {*self.parameters()}:
            raise ValueError(
                "head: expected a new module for each task, got one that shares parameters with "
                "the backbone or an earlier head; make it inside the function that is given"
            )
        return head.to(like.device, like.dtype)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of all heads side by side, `[N, ΣC, *]`, oldest head first."""
        self._require_head()
        features = self._features(images)
        if not self._are_plain():
            return torch.cat([head(features) for head in self.heads], 1)
        weight = torch.cat([head.weight for head in self.heads])
        bias = torch.cat([head.bias for head in self.heads])
        return F.linear(features, weight, bias)

    def _are_plain(self) -> bool:
        """Return whether one product of all weights and biases is the same as calling the heads."""
        plain = all(type(head) is nn.Linear and head.bias is not None for head in self.heads)
        return plain and unwatched(*self.heads)

    def _features(self, images: Tensor) -> Tensor:
        dense = any(isinstance(m, _ConvNd) for m in self.heads[0].modules())
        return find_features(self.backbone(images), self.in_features, dense, self._choose)

    def _require_head(self) -> None:
        if not self.heads:
            raise RuntimeError("MultiHead has no head yet: call add_head(num_classes) first")

    @torch.no_grad()
    def predict(self, images: Tensor, task: int | None = None) -> Tensor:
        """Return each image's most probable class under head `task`, counted from 0.

        The model runs in eval mode, without gradients; the modes of all modules are then restored.

        Args:
            images: what the backbone takes: float, normalised as in training.
            task: number of the head; may be left out where there is one.

        Returns:
            `[N]` int64, or `[N, *spatial]` of dense heads.
        """
        self._require_head()
        if task is None and len(self.heads) > 1:
            raise ValueError(
                f"task: expected the number of a head, 0 to {len(self.heads) - 1}, got None. The "
                "heads are classifiers of their own, whose logits cannot be compared: evaluate "
                "each task with its head. model(images) has the logits of all"
            )
        if images.dtype in WHITE:
            raise ValueError(
                f"images: expected what the network was trained on, float images, got "
                f"{images.dtype}; use SeededAugment.plain(images), or images / 255 without it"
            )
        task = 0 if task is None else operator.index(task)
        if not 0 <= task < len(self.heads):
            raise ValueError(f"task: expected 0 to {len(self.heads) - 1}, got {task}")
        with evaluating(self):
            return self.heads[task](self._features(images)).argmax(1)

    def load_state_dict(self, state_dict, *args, **kwargs):
        """As `nn.Module.load_state_dict`; heads that were added for it go again if it fails."""
        before = len(self.heads)
        try:
            return super().load_state_dict(state_dict, *args, **kwargs)
        except BaseException:
            del self.heads[before:]
            raise

    def _head_of(self, saved: dict[str, torch.Size]) -> nn.Module:
        """Make a head for saved tensors of these shapes: where it can be, one that has them all.

        Tried first is the length of the last matrix or bias, but for what a parametrization keeps.
        """
        aside = re.compile(r"parametrizations\.\w+\.\d+\.")
        sizes = [shape[0] for shape in saved.values() if shape]
        likely = [
            shape[0]
            for name, shape in saved.items()
            if (len(shape) > 1 or shape and name.endswith("bias")) and not aside.search(name)
        ]
        first = self._new_head([*sizes, *likely][-1])
        if _shapes(first.state_dict()) != saved:
            for size in dict.fromkeys(sizes):
                with suppress(Exception):  # some heads cannot be made in every size
                    head = self._new_head(size)
                    if _shapes(head.state_dict()) == saved:
                        return head
        return first

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        while saved := _shapes(state_dict, f"{prefix}heads.{len(self.heads)}."):
            self.heads.append(self._head_of(saved))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode, and each of its modules back into its own mode."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            own = type(module).train is not nn.Module.train  # which may undo what eval() did
            if own and module.training != training:
                module.train(training)
        for module, training in modes.items():
            module.training = training


def _classes_of(head: nn.Module, name: str) -> int:
    """Return the classes that the head names itself, or else its last module that names some."""
    for module in (head, *reversed([*head.modules()])):
        for attribute in ("out_features", "out_channels"):
            if isinstance(size := getattr(module, attribute, None), int):
                return size
    raise ValueError(
        f"{name}: expected a module with out_features, its number of classes, got a "
        f"{type(head).__name__} without; set head.out_features"
    )


def _shapes(state: Mapping[str, object], prefix: str = "") -> dict[str, torch.Size]:
    """Return the shapes of the tensors in a state_dict whose names begin with `prefix`."""
    tensors = {k: x for k, x in state.items() if isinstance(x, Tensor) and not is_lazy(x)}
    return {k.removeprefix(prefix): x.shape for k, x in tensors.items() if k.startswith(prefix)}


def _first_linear(module: nn.Module) -> nn.Linear | None:
    return next((m for m in module.modules() if isinstance(m, nn.Linear)), None)


def _classifier(model: nn.Module) -> str | None:
    """Return the name of the child with the last linear layer, as that of most classifiers."""
    names = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    return names[-1].partition(".")[0] if names else None
