"""The demo's network, weights and images: scikit-learn's 8x8 handwritten digits."""

from __future__ import annotations

import itertools
from pathlib import Path

import torch
from torch import Tensor, nn

from adadfq.checkpoint import load_weights, read_state_dict
from adadfq.errors import InvalidInputError
from adadfq.models.build import build_model

WEIGHTS = Path(__file__).with_name("digits.safetensors")
#: Mean and deviation of the training half's pixels, in 0..1.
MEAN, STD = 0.305, 0.376


class DigitsNet(nn.Module):
    """Four 3x3 convolutions with BatchNorm and ReLU, average pooling and a linear layer.

    Shape: [N, 1, 8, 8] normalised by MEAN and STD -> logits [N, 10].
    """

    def __init__(self) -> None:
        super().__init__()
        widths = (1, 16, 16, 32, 32)
        layers: list[nn.Module] = []
        for i, (fan_in, fan_out) in enumerate(itertools.pairwise(widths)):
            stride = 2 if i == 2 else 1
            conv = nn.Conv2d(fan_in, fan_out, 3, stride, padding=1, bias=False)
            layers += [conv, nn.BatchNorm2d(fan_out), nn.ReLU()]
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(widths[-1], 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean((2, 3)))


def load_teacher() -> nn.Module:
    """The shipped teacher, in eval mode (``python -m adadfq.demo.train_teacher`` made its weights)."""
    # Built by name, so that a run records how to build it again.
    net = build_model("adadfq.demo.digits:DigitsNet")
    load_weights(net, read_state_dict(WEIGHTS), str(WEIGHTS))
    return net.eval()


def load_images(held_out: bool) -> tuple[Tensor, Tensor]:
    """Two thirds of the digits for training the teacher, or the third held out from it, stratified by class.

    Returns:
        images [N, 1, 8, 8], normalised, float32, and labels int64 [N].

    Raises:
        InvalidInputError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError:
        raise InvalidInputError("the demo needs scikit-learn: pip install -e '.[demo]'") from None
    digits = load_digits()
    halves = train_test_split(digits.images, digits.target, test_size=1 / 3, random_state=0, stratify=digits.target)
    images, labels = halves[held_out], halves[2 + held_out]
    x = torch.from_numpy(images).float().unsqueeze(1) / 16
    return (x - MEAN) / STD, torch.from_numpy(labels).long()


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Top-1 accuracy in percent."""
    return float((model(images).argmax(1) == labels).float().mean()) * 100
