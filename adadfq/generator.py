"""The two generators: noise and a class label in, a normalised image out (paper, implementation details).

Both: linear -> 128 x (S/4) x (S/4) -> norm -> upsample x2 -> conv3x3 128 -> norm -> LeakyReLU 0.2 -> upsample x2 ->
conv3x3 64 -> norm -> LeakyReLU 0.2 -> conv3x3 C -> tanh -> BatchNorm without affine. They differ in how the label
enters: multiplied into the noise, or through the affine parameters of the inner norms. The last BatchNorm gives every
channel mean 0 and variance 1, which is the teacher's normalised input space.

Any module with attributes `num_classes` and `latent_dim` and ``forward(noise [B, latent_dim], labels [B])`` can take
their place in the trainer.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm, conv_transpose2d, leaky_relu
from torch.nn.utils import parametrizations
from torch.nn.utils.parametrize import register_parametrization

from adadfq import checks, functional
from adadfq.errors import InvalidInputError
from adadfq.recipe import Recipe

__all__ = ["ConditionalBatchNorm2d", "ConditionalGenerator", "LabelEmbeddingGenerator", "build_generator"]

#: The authors' code passes 0.8 where BatchNorm takes eps; results reported with it depend on it, so it stays.
INNER_EPS = 0.8
FIRST_EPS = 1e-5


def _batch_norm_act(
    norm: nn.BatchNorm2d, x: Tensor, weight: Tensor | None, bias: Tensor | None, negative_slope: float
) -> Tensor:
    """LeakyReLU of `norm` on `x` with that scale and shift, in one pass in train mode."""
    if not norm.training:
        return _inference(norm, x, weight, bias, negative_slope)
    y, mean, var = functional.batch_norm_act(x, weight, bias, norm.eps, negative_slope)
    norm.num_batches_tracked.add_(1)
    count = x.numel() // x.shape[1]
    norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), norm.momentum)
    norm.running_var.lerp_((var * (count / (count - 1))).to(norm.running_var.dtype), norm.momentum)
    return y


def _inference(
    norm: nn.BatchNorm2d, x: Tensor, weight: Tensor | None, bias: Tensor | None, negative_slope: float
) -> Tensor:
    y = batch_norm(x, norm.running_mean, norm.running_var, eps=norm.eps)
    if weight is not None and bias is not None:
        y = y * weight[..., None, None] + bias[..., None, None]
    return leaky_relu(y, negative_slope)


class ConditionalBatchNorm2d(nn.Module):
    """BatchNorm whose scale and shift are looked up by class, then LeakyReLU; starts as plain BatchNorm.

    Shape: input [N, C, H, W], labels int64 [N].
    """

    def __init__(
        self, num_classes: int, num_features: int, eps: float = FIRST_EPS, negative_slope: float = 1.0
    ) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(num_features, eps, affine=False)
        self.weight = nn.Embedding(num_classes, num_features)
        self.bias = nn.Embedding(num_classes, num_features)
        self.negative_slope = negative_slope
        nn.init.ones_(self.weight.weight)
        nn.init.zeros_(self.bias.weight)

    def forward(self, input: Tensor, labels: Tensor) -> Tensor:
        return _batch_norm_act(self.norm, input, self.weight(labels), self.bias(labels), self.negative_slope)


class _Norm(nn.BatchNorm2d):
    """Plain BatchNorm and LeakyReLU with the signature of the conditional one."""

    def __init__(self, num_features: int, eps: float, negative_slope: float) -> None:
        super().__init__(num_features, eps)
        self.negative_slope = negative_slope

    def forward(self, input: Tensor, labels: Tensor) -> Tensor:
        return _batch_norm_act(self, input, self.weight, self.bias, self.negative_slope)


class UpsampledConv2d(nn.Conv2d):
    """Nearest upsampling by 2, then a 3x3 convolution with padding 1, without the upsampled tensor.

    An output pixel sees a 2x2 patch of the small map: which of the 3x3 weights fall on the same pixel, and are summed,
    depends on whether its row and column are even or odd. Those four 2x2 convolutions, interleaved, are one transposed
    convolution with a 4x4 kernel and stride 2: 16 multiplications for every 36 of the usual way, the same function.
    Parameters are those of the 3x3 convolution.

    Shape: input [N, C_in, H, W] -> [N, C_out, 2 H, 2 W].
    """

    #: Row r: which rows of the 3x3 kernel row r of the 4x4 kernel sums.
    _SUMS = ((0.0, 0.0, 1.0), (0.0, 1.0, 1.0), (1.0, 1.0, 0.0), (1.0, 0.0, 0.0))

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1)
        sums = torch.tensor(self._SUMS)
        self.register_buffer("_sums", torch.kron(sums, sums).T.contiguous(), persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight
        with torch.autocast(weight.device.type, enabled=False):  # sums of weights are not rounded before they are used
            kernel = weight.permute(1, 0, 2, 3).reshape(-1, 9) @ self._sums
        kernel = kernel.view(self.in_channels, self.out_channels, 4, 4)
        return conv_transpose2d(input, kernel, self.bias, stride=2, padding=1)


class _Generator(nn.Module):
    """What both share; `norm` makes an inner norm from (num_features, eps, slope), called with (input, labels)."""

    def __init__(
        self,
        num_classes: int,
        image_size: int,
        channels: int,
        latent_dim: int,
        norm: Callable[[int, float, float], nn.Module],
    ) -> None:
        super().__init__()
        for name, value in (("num_classes", num_classes), ("channels", channels), ("latent_dim", latent_dim)):
            checks.check_number(name, value, 1)
        if image_size < 4 or image_size % 4:
            raise InvalidInputError(f"image_size must be a positive multiple of 4, got {image_size}")
        self.num_classes, self.latent_dim = num_classes, latent_dim
        self.start_size = image_size // 4
        self.project = nn.Linear(latent_dim, 128 * self.start_size**2)
        self.norm1 = norm(128, FIRST_EPS, 1.0)
        self.conv2 = UpsampledConv2d(128, 128)
        self.norm2 = norm(128, INNER_EPS, 0.2)
        self.conv3 = UpsampledConv2d(128, 64)
        self.norm3 = norm(64, INNER_EPS, 0.2)
        self.to_image = nn.Conv2d(64, channels, 3, padding=1)
        self.image_norm = nn.BatchNorm2d(channels, affine=False)

    def _images(self, latent: Tensor, labels: Tensor) -> Tensor:
        x = self.project(latent).reshape(-1, 128, self.start_size, self.start_size)
        x = self.norm1(x.contiguous(memory_format=torch.channels_last), labels)
        x = self.norm2(self.conv2(x), labels)
        x = self.norm3(self.conv3(x), labels)
        return _batch_norm_act(self.image_norm, self.to_image(x).tanh_(), None, None, 1.0)


class LabelEmbeddingGenerator(_Generator):
    """For small images: the noise is multiplied by an embedding of the label.

    Args:
        num_classes: K.
        image_size: S, a multiple of 4.
        channels: channels of the image.
        latent_dim: length of the noise.

    Shape: noise [B, latent_dim], labels int64 [B] -> images [B, channels, S, S].
    """

    def __init__(self, num_classes: int, image_size: int = 32, channels: int = 3, latent_dim: int = 100) -> None:
        super().__init__(num_classes, image_size, channels, latent_dim, _Norm)
        self.label_embedding = nn.Embedding(num_classes, latent_dim)

    def forward(self, noise: Tensor, labels: Tensor) -> Tensor:
        return self._images(noise * self.label_embedding(labels), labels)


class ConditionalGenerator(_Generator):
    """For ImageNet: the label enters through class-conditional BatchNorm. Arguments and shapes as
    :class:`LabelEmbeddingGenerator`."""

    def __init__(self, num_classes: int, image_size: int = 32, channels: int = 3, latent_dim: int = 100) -> None:
        norm = partial(ConditionalBatchNorm2d, num_classes)
        super().__init__(num_classes, image_size, channels, latent_dim, norm)

    def forward(self, noise: Tensor, labels: Tensor) -> Tensor:
        return self._images(noise, labels)


class _SpectralNorm(parametrizations._SpectralNorm):
    """torch's; under autocast in float32 too, where CUDA's would round the products that find the norm."""

    def forward(self, weight: Tensor) -> Tensor:
        with torch.autocast(weight.device.type, enabled=False):
            return super().forward(weight)


def build_generator(recipe: Recipe) -> nn.Module:
    """The untrained generator that `recipe` names, on the CPU, initialised from torch's global random state."""
    classes = {"label_embedding": LabelEmbeddingGenerator, "conditional_bn": ConditionalGenerator}
    generator = classes[recipe.generator](
        recipe.num_classes, recipe.image_size, recipe.image_channels, latent_dim=recipe.latent_dim
    )
    if recipe.spectral_norm:
        for layer in (generator.project, generator.conv2, generator.conv3, generator.to_image):
            register_parametrization(layer, "weight", _SpectralNorm(layer.weight))
    return generator
