"""torchvision's residual blocks with BatchNorm, shortcut and ReLU in one kernel inside a step.

`convert` imports this file only when a model has such blocks.
"""

from torch import Tensor
from torchvision.models.resnet import BasicBlock, Bottleneck

from bld_ext.api.convert import absorbs


class FusedBasicBlock(BasicBlock):
    def forward(self, x: Tensor) -> Tensor:
        if not (absorbs(self.bn1, self.relu) and absorbs(self.bn2, self.relu)):
            return super().forward(x)
        out = self.bn1(self.conv1(x), relu=True)
        identity = x if self.downsample is None else self.downsample(x)
        return self.bn2(self.conv2(out), identity, relu=True)


class FusedBottleneck(Bottleneck):
    def forward(self, x: Tensor) -> Tensor:
        if not all(absorbs(norm, self.relu) for norm in (self.bn1, self.bn2, self.bn3)):
            return super().forward(x)
        out = self.bn1(self.conv1(x), relu=True)
        out = self.bn2(self.conv2(out), relu=True)
        identity = x if self.downsample is None else self.downsample(x)
        return self.bn3(self.conv3(out), identity, relu=True)


FUSED = {BasicBlock: FusedBasicBlock, Bottleneck: FusedBottleneck}
