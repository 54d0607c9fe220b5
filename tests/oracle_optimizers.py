"""The oracle's optimizers, in plain PyTorch; parameters and gradients are dictionaries of tensors by name."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

ADAM_EPS = 1e-8


def _zeros(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.zeros_like(value) for name, value in parameters.items()}


class Adam:
    """Kingma and Ba 2015, algorithm 1; weights decay beside it (Loshchilov and Hutter 2019, algorithm 2)."""

    def __init__(self, parameters: Mapping[str, Tensor], betas: tuple[float, float], weight_decay: float = 0.0) -> None:
        self.betas, self.weight_decay, self.steps = betas, weight_decay, 0
        self.first, self.second = _zeros(parameters), _zeros(parameters)

    def step(self, parameters: dict[str, Tensor], gradients: Mapping[str, Tensor], lr: float) -> None:
        self.steps += 1
        b1, b2 = self.betas
        for name, g in gradients.items():
            self.first[name] = b1 * self.first[name] + (1 - b1) * g
            self.second[name] = b2 * self.second[name] + (1 - b2) * g * g
            m = self.first[name] / (1 - b1**self.steps)
            v = self.second[name] / (1 - b2**self.steps)
            decayed = parameters[name] * (1 - lr * self.weight_decay)
            parameters[name] = decayed - lr * m / (torch.sqrt(v) + ADAM_EPS)


class SGD:
    """v <- momentum v + g; the weight moves against v, or with Nesterov's look ahead against g + momentum v."""

    def __init__(self, parameters: Mapping[str, Tensor], momentum: float, nesterov: bool, weight_decay: float) -> None:
        self.momentum, self.nesterov, self.weight_decay = momentum, nesterov, weight_decay
        self.velocity = _zeros(parameters)

    def step(self, parameters: dict[str, Tensor], gradients: Mapping[str, Tensor], lr: float) -> None:
        for name, g in gradients.items():
            g = g + self.weight_decay * parameters[name]
            self.velocity[name] = self.momentum * self.velocity[name] + g
            direction = g + self.momentum * self.velocity[name] if self.nesterov else self.velocity[name]
            parameters[name] = parameters[name] - lr * direction
