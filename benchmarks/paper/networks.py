"""Backbones by name, each of which maps images of one or three channels to feature vectors."""

from functools import partial

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from bld_ext import MultiHead


class Gray(nn.Module):
    """Repeats a single channel three times, so that one network serves every dataset."""

    def forward(self, images: Tensor) -> Tensor:
        return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images


class Shrink(nn.Module):
    """Halves the sides of images by averaging until each has at most `size` pixels.

    Each side is halved as often as it needs, so that a wide image keeps its few rows.
    """

    def __init__(self, size: int):
        super().__init__()
        self.size = size

    def forward(self, images: Tensor) -> Tensor:
        while max(images.shape[-2:]) > self.size:
            images = F.avg_pool2d(images, [1 + (side > self.size) for side in images.shape[-2:]])
        return images


class Autocast(nn.Module):
    """A backbone under bfloat16 autocast, as one would naively write it."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, dtype=torch.bfloat16):
            return self.inner(images).float()


def resnet18() -> tuple[nn.Module, int]:
    """Make torchvision's ResNet18 with its 7×7 stem, 11.2 M parameters: the paper's network."""
    net = torchvision.models.resnet18(weights=None)
    net.fc = nn.Identity()
    return net, 512


def resnet18_cifar() -> tuple[nn.Module, int]:
    """Make a ResNet18 with a 3×3 stem of stride 1 and no pooling, for images of 32×32."""
    net, features = resnet18()
    net.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    net.maxpool = nn.Identity()
    return net, features


def slim(width: int = 16, grid: int = 1) -> tuple[nn.Module, int]:
    """Make a ResNet for a CPU: three blocks with 16, 32 and 64 channels, 77 k parameters.

    It shrinks images to at most 16×16 pixels. The last block has 4·`width` channels, and the
    features are their means in each of `grid`×`grid` parts of the image.
    """

    def block(inputs, outputs, stride):
        shortcut = None
        if stride > 1:
            convolution = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            shortcut = nn.Sequential(convolution, nn.BatchNorm2d(outputs))
        return BasicBlock(inputs, outputs, stride, shortcut)

    stem = [
        Shrink(16),
        nn.Conv2d(3, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
    ]
    blocks = [block(width, width, 1), block(width, 2 * width, 2), block(2 * width, 4 * width, 2)]
    pooled = [nn.AdaptiveAvgPool2d(grid), nn.Flatten()]
    return nn.Sequential(*stem, *blocks, *pooled), 4 * width * grid**2


def add_dropout(backbone: nn.Module, p: float) -> None:
    """Put dropout behind each residual block, in place."""
    for module in list(backbone.modules()):
        if isinstance(module, nn.Sequential):
            for name, child in module.named_children():
                if isinstance(child, BasicBlock):
                    module[int(name)] = nn.Sequential(child, nn.Dropout(p))


NETWORKS = {
    "resnet18": resnet18,
    "resnet18-cifar": resnet18_cifar,
    "slim": slim,
    "slim-wide": partial(slim, width=32),
    "slim-2x2": partial(slim, grid=2),
}


def make_model(
    network: str, momentum: float = 0.1, autocast: bool = False, dropout: float = 0.0
) -> MultiHead:
    """Make a MultiHead without heads; `momentum` is that of BatchNorm's running statistics.

    `autocast` runs the backbone in bfloat16, which BLDOptimizer itself never does. The ablation
    uses it to show what is lost. `dropout` is the share of values that is dropped behind each
    residual block.
    """
    backbone, features = NETWORKS[network]()
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = momentum
    if dropout:
        add_dropout(backbone, dropout)
    if autocast:
        backbone = Autocast(backbone)
    return MultiHead(nn.Sequential(Gray(), backbone), features)
