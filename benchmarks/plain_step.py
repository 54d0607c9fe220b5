"""One step of the game written plainly: PyTorch's own operators, one after the other, as the formulas read.

It shares no operator, loss or module with adadfq. Each network runs forward once; its BatchNorm statistics are taken by
hooks; two backward passes follow, each for one player's parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adadfq.recipe import Recipe

# ----------------------------------------------------------------------------------------------------------- quantiser


def fake_quantize(x: Tensor, lo: Tensor, hi: Tensor, bits: int) -> Tensor:
    """`x` on the grid of 2^bits codes over [lo, hi] widened to hold 0; the gradient passes unchanged."""
    lo, hi = lo.clamp(max=0), hi.clamp(min=0)
    scale = (hi - lo) / (2**bits - 1)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    zero_point = torch.round(-lo / scale)
    code = torch.clamp(torch.round(x / scale) + zero_point, 0, 2**bits - 1)
    return x + ((code - zero_point) * scale - x).detach()


def quantized_weight(weight: Tensor, bits: int) -> Tensor:
    """Every output channel over its own minimum and maximum."""
    flat = weight.detach().flatten(1)
    shape = [-1] + [1] * (weight.dim() - 1)
    return fake_quantize(weight, flat.amin(1).view(shape), flat.amax(1).view(shape), bits)


class Weight(nn.Module):
    """Quantises the weight it is given."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits

    def forward(self, weight: Tensor) -> Tensor:
        return quantized_weight(weight, self.bits)


class Conv2d(nn.Conv2d):
    """A convolution whose weight is quantised at every forward."""

    def __init__(self, source: nn.Conv2d, bits: int) -> None:
        sizes = (source.in_channels, source.out_channels, source.kernel_size, source.stride, source.padding)
        super().__init__(*sizes, source.dilation, source.groups, source.bias is not None)
        self.load_state_dict(source.state_dict())
        self.quantizer = Weight(bits)

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.quantizer(self.weight), self.bias)


class Linear(nn.Linear):
    """A linear layer whose weight is quantised at every forward."""

    def __init__(self, source: nn.Linear, bits: int) -> None:
        super().__init__(source.in_features, source.out_features, source.bias is not None)
        self.load_state_dict(source.state_dict())
        self.quantizer = Weight(bits)

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.quantizer(self.weight), self.bias)


class Activation(nn.Module):
    """Quantises activations over a frozen range [lo, hi]."""

    lo: Tensor
    hi: Tensor

    def __init__(self, lo: Tensor, hi: Tensor, bits: int) -> None:
        super().__init__()
        self.register_buffer("lo", lo.clone())
        self.register_buffer("hi", hi.clone())
        self.bits = bits

    def forward(self, x: Tensor) -> Tensor:
        return fake_quantize(x, self.lo, self.hi, self.bits)


# ----------------------------------------------------------------------------------------------------------- generator


class ConditionalBatchNorm2d(nn.Module):
    """BatchNorm whose scale and shift are those of the image's class."""

    def __init__(self, num_classes: int, channels: int, eps: float) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, eps, affine=False)
        self.weight, self.bias = nn.Embedding(num_classes, channels), nn.Embedding(num_classes, channels)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return self.norm(x) * self.weight(labels)[:, :, None, None] + self.bias(labels)[:, :, None, None]


class Generator(nn.Module):
    """Noise [B, latent_dim] and labels [B] -> images [B, C, S, S]; parameters are named as adadfq's."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.size = recipe.image_size // 4
        self.conditional = recipe.generator == "conditional_bn"
        if not self.conditional:
            self.label_embedding = nn.Embedding(recipe.num_classes, recipe.latent_dim)
        self.project = nn.Linear(recipe.latent_dim, 128 * self.size**2)
        self.conv2 = nn.Conv2d(128, 128, 3, padding=1)
        self.conv3 = nn.Conv2d(128, 64, 3, padding=1)
        self.to_image = nn.Conv2d(64, recipe.image_channels, 3, padding=1)
        self.image_norm = nn.BatchNorm2d(recipe.image_channels, affine=False)
        for name, channels, eps in (("norm1", 128, 1e-5), ("norm2", 128, 0.8), ("norm3", 64, 0.8)):
            norm = (
                ConditionalBatchNorm2d(recipe.num_classes, channels, eps)
                if self.conditional
                else nn.BatchNorm2d(channels, eps)
            )
            self.add_module(name, norm)

    def _norm(self, name: str, x: Tensor, labels: Tensor) -> Tensor:
        norm = getattr(self, name)
        return norm(x, labels) if self.conditional else norm(x)

    def forward(self, noise: Tensor, labels: Tensor) -> Tensor:
        latent = noise if self.conditional else noise * self.label_embedding(labels)
        x = self.project(latent).view(-1, 128, self.size, self.size)
        x = F.interpolate(self._norm("norm1", x, labels), scale_factor=2)
        x = F.leaky_relu(self._norm("norm2", self.conv2(x), labels), 0.2)
        x = F.interpolate(x, scale_factor=2)
        x = F.leaky_relu(self._norm("norm3", self.conv3(x), labels), 0.2)
        return self.image_norm(torch.tanh(self.to_image(x)))


# -------------------------------------------------------------------------------------------------------------- losses


class Teacher(nn.Module):
    """A network that also gives the BatchNorm-statistics loss of its forward: (logits [B, K], L_bns)."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self._losses: list[Tensor] = []
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.register_forward_pre_hook(self._hook)

    def _hook(self, module: Any, args: tuple[Tensor, ...]) -> None:
        mean = args[0].mean((0, 2, 3))
        var = args[0].var((0, 2, 3), unbiased=False)
        self._losses.append(F.mse_loss(mean, module.running_mean) + F.mse_loss(var, module.running_var))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        self._losses = []
        logits = self.network(images)
        loss = torch.stack(self._losses).mean()
        self._losses = []  # they hold the graph
        return logits, loss


def entropy(logits: Tensor) -> Tensor:
    """[B], in nats."""
    return -(F.softmax(logits, 1) * F.log_softmax(logits, 1)).sum(1)


def losses(t: Tensor, q: Tensor, labels: Tensor, loss_bns: Tensor, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """(L_G, L_Q) of logits [B, K]."""
    h = entropy(t - q)
    h_prime = (h - h.min()) / (math.log(t.shape[1]) - h.min())
    margin = F.relu(recipe.lambda_l - h_prime).mean() + F.relu(h_prime - recipe.lambda_u).mean()
    disagreement, agreement = F.cross_entropy(t - q, labels), F.cross_entropy(t + q, labels)
    both = recipe.alpha_ds * disagreement + recipe.alpha_as * agreement
    loss_generator = margin + recipe.beta * both + recipe.gamma * loss_bns
    temperature = recipe.temperature
    loss_student = -(temperature**2) * entropy((t.detach() - q) / temperature).mean()
    return loss_generator, loss_student


# ---------------------------------------------------------------------------------------------------------------- step


class PlainStep:
    """Both players, their optimisers and one step.

    Args:
        teacher: float network, frozen, in eval mode.
        student: network made of :class:`Conv2d`, :class:`Linear` and :class:`Activation`, in eval mode.
        generator: :class:`Generator` in train mode.
        recipe: weights and bounds of the losses, and the optimisers' settings.
        compile: ``torch.compile`` or alike, applied to each network and to the losses.
    """

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        generator: nn.Module,
        recipe: Recipe,
        compile: Callable[[Any], Any] = lambda function: function,
    ) -> None:
        self.recipe = recipe
        self.generator_parameters = list(generator.parameters())
        self.student_parameters = list(student.parameters())
        self.teacher, self.student, self.generator = compile(Teacher(teacher)), compile(student), compile(generator)
        self.losses = compile(losses)
        self.optimizer_generator = torch.optim.Adam(
            self.generator_parameters, lr=recipe.lr_generator, betas=(recipe.adam_betas[0], recipe.adam_betas[1])
        )
        self.optimizer_student = torch.optim.SGD(
            self.student_parameters,
            lr=recipe.lr_student,
            momentum=recipe.momentum,
            weight_decay=recipe.weight_decay,
            nesterov=recipe.nesterov,
        )

    def step(self, noise: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Update both players; returns (L_G, L_Q) before it."""
        images = self.generator(noise, labels)
        teacher_logits, loss_bns = self.teacher(images)
        student_logits = self.student(images)
        loss_generator, loss_student = self.losses(teacher_logits, student_logits, labels, loss_bns, self.recipe)

        self.optimizer_generator.zero_grad()
        self.optimizer_student.zero_grad()
        loss_generator.backward(inputs=self.generator_parameters, retain_graph=True)
        loss_student.backward(inputs=self.student_parameters)
        self.optimizer_generator.step()
        self.optimizer_student.step()
        return loss_generator.detach(), loss_student.detach()
