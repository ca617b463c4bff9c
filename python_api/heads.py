"""MultiHead: a shared backbone with one linear classifier for each task."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MultiHead(nn.Module):
    """A backbone Ψ with one linear head for each task, φ_1 … φ_t, on its features.

    One matrix product computes all heads. Each head is still a module of its own, so layer-wise
    balancing treats it as a layer. `load_state_dict` adds the heads that a checkpoint has and the
    model lacks.

    Args:
        backbone: maps images `[N, ...]` to features `[N, in_features]`.
        in_features: length of one feature vector.

    Example:
        model = MultiHead(backbone, in_features=512)
        model.add_head(2)
        logits = model(images)                   # [N, ΣC], oldest head first
        classes = model.predict(images, task=0)  # [N], 0 or 1
    """

    def __init__(self, backbone: nn.Module, in_features: int):
        super().__init__()
        if not isinstance(backbone, nn.Module):
            raise TypeError(f"backbone: expected a module, got {type(backbone).__name__}")
        if in_features < 1:
            raise ValueError(f"in_features: expected at least 1, got {in_features}")
        self.backbone = backbone
        self.in_features = in_features
        self.heads = nn.ModuleList()

    @property
    def head_sizes(self) -> tuple[int, ...]:
        """The number of classes of each head, oldest first."""
        return tuple(head.out_features for head in self.heads)

    def add_head(self, num_classes: int) -> nn.Linear:
        """Add the classifier of a new task, initialised as an `nn.Linear`, and return it."""
        if num_classes < 1:
            raise ValueError(f"num_classes: expected at least 1, got {num_classes}")
        like = next(self.parameters(), torch.empty(0))
        head = nn.Linear(self.in_features, num_classes, device=like.device, dtype=like.dtype)
        self.heads.append(head)
        return head

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of all heads side by side, `[N, ΣC]`, oldest head first."""
        self._require_head()
        features = self._features(images)
        weight = torch.cat([head.weight for head in self.heads])
        bias = torch.cat([head.bias for head in self.heads])
        return F.linear(features, weight, bias)

    def _features(self, images: Tensor) -> Tensor:
        features = self.backbone(images)
        if features.dim() != 2 or features.shape[1] != self.in_features:
            raise ValueError(
                f"backbone: expected features of shape [N, {self.in_features}] (in_features), "
                f"got {tuple(features.shape)}"
            )
        return features

    def _require_head(self) -> None:
        if not self.heads:
            raise RuntimeError("MultiHead has no head yet: call add_head(num_classes) first")

    @torch.no_grad()
    def predict(self, images: Tensor, task: int) -> Tensor:
        """Return each image's most probable class under head `task`: `[N]` int64, counted from 0.

        `images` are as the backbone takes them: float, and normalised as in training. The model
        runs in eval mode, without gradients; the modes of all modules are then restored.
        """
        self._require_head()
        if not 0 <= task < len(self.heads):
            raise ValueError(f"task: expected 0 to {len(self.heads) - 1}, got {task}")
        modes = {module: module.training for module in self.modules()}
        self.eval()
        try:
            features = self._features(images)
            return self.heads[task](features).argmax(1)
        finally:
            for module, training in modes.items():
                module.training = training

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        while (key := f"{prefix}heads.{len(self.heads)}.weight") in state_dict:
            self.add_head(state_dict[key].shape[0])
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
