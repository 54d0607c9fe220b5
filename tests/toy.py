"""A network and a recipe small enough to train in a test."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from adadfq import Recipe


class ToyNet(nn.Module):
    """Two convolutions with BatchNorm and ReLU, and a linear layer: 8x8 images, ten classes."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(6)
        self.linear = nn.Linear(6, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.bn2(self.conv2(x)))
        return self.linear(x.mean((2, 3)))


def toy_teacher(num_classes: int = 10) -> ToyNet:
    """A teacher whose running statistics and affine parameters are not the initial ones."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        net = ToyNet(num_classes)
        for norm in (net.bn1, net.bn2):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, std=0.2)
        for _ in range(5):
            net(torch.randn(16, 3, 8, 8))
    return net.eval()


def toy_recipe(**overrides: object) -> Recipe:
    """A few steps on :class:`ToyNet`."""
    settings = {
        "name": "toy",
        "image_size": 8,
        "latent_dim": 16,
        "batch_size": 8,
        "epochs": 3,
        "steps_per_epoch": 4,
        "warmup_epochs": 1,
        "calibration_epochs": 1,
        "lr_student": 1e-2,
    }
    return Recipe(**{**settings, **overrides})


def plus_settings() -> dict[str, object]:
    """What recipe adadfq_plus changes of the method, without the length of its run."""
    lengths = ("name", "source", "epochs", "warmup_epochs", "calibration_epochs", "lr_warmup_steps", "by_weight_bits")
    base, plus = Recipe().to_dict(), Recipe.named("adadfq_plus").to_dict()
    return {name: value for name, value in plus.items() if value != base[name] and name not in lengths}
