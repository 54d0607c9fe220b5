"""The CIFAR ResNets of He et al. 2015, section 4.2 (6n + 2 layers, parameter-free shortcuts).

Parameter names and arithmetic match the widely shared CIFAR checkpoints: ``conv1, bn1,
layer{1,2,3}.{i}.{conv1,bn1,conv2,bn2}, linear``.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from adadfq.errors import InvalidInputError

WIDTHS = (16, 32, 64)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut without parameters.

    Where the shape changes, the shortcut takes every `stride`-th pixel and pads the new channels with zeros, half
    in front and half behind ("option A").
    """

    def __init__(self, in_planes: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.stride = stride
        self.pad = (planes - in_planes) // 2

    def forward(self, x: Tensor) -> Tensor:
        """[N, in_planes, H, W] -> [N, planes, ceil(H / stride), ceil(W / stride)]."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        # Both are plain numbers, so torch.fx traces one branch.
        if self.stride != 1 or self.pad != 0:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad, self.pad))
        return F.relu(out + x)


class CifarResNet(nn.Module):
    """ResNet of depth 6 * `blocks` + 2 for small RGB images.

    Raises:
        InvalidInputError: `blocks` or `num_classes` is not a positive integer.
    """

    def __init__(self, blocks: int, num_classes: int = 10) -> None:
        super().__init__()
        for name, value in (("blocks", blocks), ("num_classes", num_classes)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InvalidInputError(f"{name} must be a positive integer, got {value!r}")
        self.conv1 = nn.Conv2d(3, WIDTHS[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(WIDTHS[0])
        self.layer1 = self._stage(WIDTHS[0], WIDTHS[0], blocks, stride=1)
        self.layer2 = self._stage(WIDTHS[0], WIDTHS[1], blocks, stride=2)
        self.layer3 = self._stage(WIDTHS[1], WIDTHS[2], blocks, stride=2)
        self.linear = nn.Linear(WIDTHS[2], num_classes)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight)

    @staticmethod
    def _stage(in_planes: int, planes: int, blocks: int, stride: int) -> nn.Sequential:
        first = BasicBlock(in_planes, planes, stride)
        return nn.Sequential(first, *(BasicBlock(planes, planes) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3, H, W] images -> [N, num_classes] logits."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        return self.linear(F.adaptive_avg_pool2d(out, 1).flatten(1))


def resnet20(num_classes: int = 10) -> CifarResNet:
    """ResNet-20, 0.27 M parameters."""
    return CifarResNet(3, num_classes)


def resnet32(num_classes: int = 10) -> CifarResNet:
    """ResNet-32, 0.46 M parameters."""
    return CifarResNet(5, num_classes)


def resnet44(num_classes: int = 10) -> CifarResNet:
    """ResNet-44, 0.66 M parameters."""
    return CifarResNet(7, num_classes)


def resnet56(num_classes: int = 10) -> CifarResNet:
    """ResNet-56, 0.85 M parameters."""
    return CifarResNet(9, num_classes)
