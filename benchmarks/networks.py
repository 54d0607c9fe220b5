"""Layer shapes of the networks the suite takes its tensors from, from tables written out here.

Layers have the names of their network's state_dict (torchvision's for ResNet-18, ResNet-50 and MobileNetV2).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache


@dataclass(frozen=True)
class Layer:
    """A convolution or the linear layer, and what happens to its output."""

    name: str
    weight: tuple[int, ...]
    """[out, in / groups, kernel, kernel], or [out, in] of a linear layer."""
    output: tuple[int, ...]
    """[C, H, W], or [K] of a linear layer, without the batch."""
    act: str
    """"relu", "relu6" or "none": after BatchNorm and the residual; activations are quantised after the first two."""
    residual: bool
    """A tensor of the output's shape is added before the activation."""


def _conv(name: str, outputs: int, inputs: int, kernel: int, size: int, act: str, residual: bool = False) -> Layer:
    return Layer(name, (outputs, inputs, kernel, kernel), (outputs, size, size), act, residual)


def _basic_stages(table: tuple[tuple[int, int, int, int], ...], inputs: int, projected: bool) -> list[Layer]:
    """Stages of basic blocks; rows are (stage, blocks, channels, size of the output)."""
    layers = []
    for stage, blocks, channels, size in table:
        for block in range(blocks):
            prefix = f"layer{stage}.{block}"
            layers.append(_conv(f"{prefix}.conv1", channels, inputs, 3, size, "relu"))
            layers.append(_conv(f"{prefix}.conv2", channels, channels, 3, size, "relu", residual=True))
            if projected and inputs != channels:
                layers.append(_conv(f"{prefix}.downsample.0", channels, inputs, 1, size, "none"))
            inputs = channels
    return layers


def _resnet20() -> list[Layer]:
    stages = ((1, 3, 16, 32), (2, 3, 32, 16), (3, 3, 64, 8))
    return [
        _conv("conv1", 16, 3, 3, 32, "relu"),
        *_basic_stages(stages, 16, projected=False),
        Layer("linear", (10, 64), (10,), "none", False),
    ]


def _resnet18() -> list[Layer]:
    stages = ((1, 2, 64, 56), (2, 2, 128, 28), (3, 2, 256, 14), (4, 2, 512, 7))
    return [
        _conv("conv1", 64, 3, 7, 112, "relu"),
        *_basic_stages(stages, 64, projected=True),
        Layer("fc", (1000, 512), (1000,), "none", False),
    ]


def _resnet50() -> list[Layer]:
    layers = [_conv("conv1", 64, 3, 7, 112, "relu")]
    inputs, before = 64, 56
    for stage, blocks, channels, size in ((1, 3, 64, 56), (2, 4, 128, 28), (3, 6, 256, 14), (4, 3, 512, 7)):
        for block in range(blocks):
            prefix = f"layer{stage}.{block}"
            # torchvision's stride is the 3x3 convolution's.
            layers.append(_conv(f"{prefix}.conv1", channels, inputs, 1, before, "relu"))
            layers.append(_conv(f"{prefix}.conv2", channels, channels, 3, size, "relu"))
            layers.append(_conv(f"{prefix}.conv3", 4 * channels, channels, 1, size, "relu", residual=True))
            if block == 0:
                layers.append(_conv(f"{prefix}.downsample.0", 4 * channels, inputs, 1, size, "none"))
            inputs, before = 4 * channels, size
    return [*layers, Layer("fc", (1000, 2048), (1000,), "none", False)]


#: Expansion, channels, blocks, stride of the first: table 2 of the MobileNetV2 paper.
MOBILENETV2 = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


def _mobilenetv2() -> list[Layer]:
    layers = [_conv("features.0.0", 32, 3, 3, 112, "relu6")]
    index, inputs, size = 1, 32, 112
    for expansion, channels, blocks, first_stride in MOBILENETV2:
        for block in range(blocks):
            stride = first_stride if block == 0 else 1
            prefix, hidden, i = f"features.{index}.conv", inputs * expansion, 0
            if expansion != 1:
                layers.append(_conv(f"{prefix}.0.0", hidden, inputs, 1, size, "relu6"))
                i = 1
            size //= stride
            layers.append(_conv(f"{prefix}.{i}.0", hidden, 1, 3, size, "relu6"))
            residual = stride == 1 and inputs == channels
            layers.append(_conv(f"{prefix}.{i + 1}", channels, hidden, 1, size, "none", residual))
            index, inputs = index + 1, channels
    layers.append(_conv(f"features.{index}.0", 1280, 320, 1, 7, "relu6"))
    return [*layers, Layer("classifier.1", (1000, 1280), (1000,), "none", False)]


#: Name (with the size of the image in pixels) -> its layers in the order they run.
_TABLES: dict[str, Callable[[], list[Layer]]] = {
    "resnet20@32": _resnet20,
    "resnet18@224": _resnet18,
    "resnet50@224": _resnet50,
    "mobilenetv2@224": _mobilenetv2,
}
NETWORKS = tuple(_TABLES)


@cache
def layers(network: str) -> tuple[Layer, ...]:
    """The layers of one of :data:`NETWORKS`, in the order they run.

    Raises:
        KeyError: `network` is none of them.
    """
    return tuple(_TABLES[network]())


def convolutions(network: str) -> tuple[Layer, ...]:
    """The layers of `network` that are convolutions; each is followed by BatchNorm."""
    return tuple(layer for layer in layers(network) if len(layer.output) == 3)
