"""What a user would write from the paper's formulas with stock PyTorch and autograd: the "eager plain" provider.

``torch.compile`` compiles these too. Each is as fast as it can be without leaving that style, for a soft rival would
make the comparison worthless; 16-bit tensors are computed in float32, as the operators do, for otherwise the results
would differ. Everything that autograd lets be in place is, state too; ``torch.compile`` makes the same loops of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def _compute(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _view(values: Tensor, ndim: int, axis: int | None) -> Tensor:
    if axis is None:
        return values.reshape(())
    return values.reshape([-1 if d == axis else 1 for d in range(ndim)])


def _quantized(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int, into: Tensor | None = None) -> Tensor:
    """The quantised value of `x`, in a new tensor or in `into`, which holds `x`; the gradient passes unchanged."""
    x_hat = torch.div(x.detach(), scale) if into is None else into.div_(scale)  # torch.compile refuses a strided out=
    x_hat.round_().add_(zero_point).clamp_(0, 2**bits - 1).sub_(zero_point).mul_(scale)
    # Forward passes that need no gradient do not pay for the trick.
    return x_hat.sub_(x.detach()).add_(x) if x.requires_grad else x_hat


def _temporary(value: Tensor, x: Tensor) -> Tensor | None:
    """`value` where it can be written over: a copy of the argument `x` that autograd does not look at."""
    return None if value is x or value.requires_grad else value


def fake_quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, bits: int, axis: int | None, clip_grad: bool = False
) -> Tensor:
    """Fake quantisation; the gradient passes unchanged, or clipped to the range."""
    value, scale, zero_point = _compute(x), _view(scale, x.dim(), axis), _view(zero_point, x.dim(), axis)
    if clip_grad:
        value = torch.clamp(value, (-zero_point - 0.5) * scale, (2**bits - 0.5 - zero_point) * scale)
    return _quantized(value, scale, zero_point, bits, _temporary(value, x)).to(x.dtype)


def _learned(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """The quantised value of `x` with LSQ's gradients, for `x` and `scale`."""
    lo, hi = -zero_point, 2**bits - 1 - zero_point
    steps = x / scale
    clipped = steps.clamp(lo - 0.5, hi + 0.5)
    code = steps.detach().round().clamp_(lo, hi)
    return (clipped + (code - clipped.detach())) * scale


def learned_fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int, axis: int | None) -> Tensor:
    """Fake quantisation with a learned step size."""
    return _learned(_compute(x), _view(scale, x.dim(), axis), _view(zero_point, x.dim(), axis), bits).to(x.dtype)


def fake_quantize_(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int, axis: int | None) -> Tensor:
    """Fake quantisation over its input."""
    scale, zero_point = _view(scale, x.dim(), axis), _view(zero_point, x.dim(), axis)
    value = _compute(x)
    x_hat = _quantized(value, scale, zero_point, bits, into=value)
    return x if value is x else x.copy_(x_hat)


def _qparams(lo: Tensor, hi: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    lo, hi = lo.clamp(max=0), hi.clamp(min=0)
    scale = (hi - lo) / (2**bits - 1)
    scale = torch.where(scale == 0, 1, scale)
    return scale, torch.round(-lo / scale)


def dynamic_fake_quantize(x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Fake quantisation of every row of dimension 0 over its own range: (x_hat, scale, zero_point)."""
    value = _compute(x)
    lo, hi = value.detach().flatten(1).aminmax(dim=1)
    scale, zero_point = _qparams(lo, hi, bits)
    views = _view(scale, x.dim(), 0), _view(zero_point, x.dim(), 0)
    return _quantized(value, *views, bits, _temporary(value, x)).to(x.dtype), scale, zero_point.int()


def foreach_dynamic_fake_quantize(tensors: Sequence[Tensor], bits: int) -> tuple[Tensor, ...]:
    """:func:`dynamic_fake_quantize` of a list: x_hats, then scales, then zero points."""
    results = [dynamic_fake_quantize(x, bits) for x in tensors]
    return tuple(result[i] for i in range(3) for result in results)


def observe_fake_quantize(
    x: Tensor,
    running_min: Tensor,
    running_max: Tensor,
    num_batches: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bits: int,
    momentum: float,
) -> Tensor:
    """Move a range by a debiased moving average of the batch's ends, then quantise with it."""
    value = _compute(x)
    with torch.no_grad():
        lo, hi = torch.aminmax(value)
        num_batches.add_(1)
        rate = (1 - momentum) / (1 - momentum ** num_batches.double())
        running_min.copy_(torch.lerp(running_min.double(), lo.double(), rate))
        running_max.copy_(torch.lerp(running_max.double(), hi.double(), rate))
        new_scale, new_zero_point = _qparams(running_min, running_max, bits)
        scale.copy_(new_scale)
        zero_point.copy_(new_zero_point)
    return _quantized(value, new_scale, new_zero_point, bits, _temporary(value, x)).to(x.dtype)


def _affine_act(
    x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, act: str, mean: Tensor, var: Tensor
) -> Tensor:
    # eps 0 is refused by some versions; this one changes no variance.
    eps = torch.finfo(torch.float32).tiny
    u = F.batch_norm(_compute(x), mean, var, scale, shift, training=False, eps=eps)
    if residual is not None:
        u = u.add_(residual)
    return {"none": lambda t: t, "relu": torch.relu_, "relu6": lambda t: F.hardtanh_(t, 0.0, 6.0)}[act](u)


def affine_act_quantize(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    act: str,
    act_scale: Tensor,
    act_zero_point: Tensor,
    bits: int,
    mean: Tensor,
    var: Tensor,
) -> Tensor:
    """Codes of :func:`affine_act_fake_quantize`."""
    u = _affine_act(x, scale, shift, residual, act, mean, var)
    codes = u.div_(act_scale.reshape(())).round_().add_(act_zero_point.reshape(())).clamp_(0, 2**bits - 1)
    return codes.to(torch.uint8)


def affine_act_fake_quantize(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    act: str,
    act_scale: Tensor | None,
    act_zero_point: Tensor | None,
    bits: int,
    mean: Tensor,
    var: Tensor,
) -> Tensor:
    """BatchNorm in inference (the fused operator, fastest of PyTorch's ways), residual, activation, quantiser."""
    u = _affine_act(x, scale, shift, residual, act, mean, var)
    if act_scale is not None and act_zero_point is not None and act_scale.requires_grad:
        u = _learned(u, act_scale.reshape(()), act_zero_point.reshape(()), bits)
    elif act_scale is not None and act_zero_point is not None:
        u = _quantized(u, act_scale.reshape(()), act_zero_point.reshape(()), bits, None if u.requires_grad else u)
    return u.to(x.dtype)


def quantize_pack(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int, axis: int | None) -> Tensor:
    """Codes of `bits` bits, the first in a byte's lowest; a divisor of 8, so that none lies in two bytes."""
    value = _compute(x)
    into = _temporary(value, x)
    codes = torch.div(value, _view(scale, x.dim(), axis)) if into is None else into.div_(_view(scale, x.dim(), axis))
    codes = codes.round_().add_(_view(zero_point, x.dim(), axis)).clamp_(0, 2**bits - 1).to(torch.uint8).flatten()
    each = 8 // bits
    if rest := -codes.numel() % each:
        codes = F.pad(codes, (0, rest))
    first, *others = codes.view(-1, each).unbind(1)
    for i, code in enumerate(others, 1):
        first = first | code << i * bits
    return first


def unpack_dequantize(
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bits: int,
    shape: Sequence[int],
    axis: int | None,
    dtype: torch.dtype,
) -> Tensor:
    """(code - zero_point) * scale of what :func:`quantize_pack` packs."""
    codes = torch.stack([packed >> i * bits & 2**bits - 1 for i in range(8 // bits)], 1)
    values = codes.flatten()[: math.prod(shape)].view(shape).to(scale.dtype)
    ndim = len(shape)
    return values.sub_(_view(zero_point, ndim, axis)).mul_(_view(scale, ndim, axis)).to(dtype)


def bn_match(x: Tensor, running_mean: Tensor, running_var: Tensor) -> Tensor:
    """MSE of the batch's mean and biased variance against the running ones."""
    var, mean = torch.var_mean(_compute(x), dim=[d for d in range(x.dim()) if d != 1], correction=0)
    return F.mse_loss(mean, running_mean) + F.mse_loss(var, running_var)


def bn_match_forward(
    x: Tensor, running_mean: Tensor, running_var: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """BatchNorm in inference, and :func:`bn_match` of its input."""
    # On 16 bits it computes in float32 too, without a copy of the tensor in that.
    y = F.batch_norm(x, running_mean, running_var, weight, bias, training=False, eps=eps)
    return y, bn_match(x, running_mean, running_var)


def batch_norm_act(x: Tensor, weight: Tensor, bias: Tensor, eps: float, negative_slope: float) -> Tensor:
    """BatchNorm in training and LeakyReLU; parameters [C] or [N, C]."""
    if weight.dim() == 1:
        # On 16 bits it computes in float32 too.
        y = F.batch_norm(x, None, None, weight, bias, training=True, eps=eps)
    else:
        places = [*weight.shape, *[1] * (x.dim() - 2)]
        y = F.batch_norm(_compute(x), None, None, training=True, eps=eps) * weight.view(places) + bias.view(places)
    return (F.leaky_relu_(y, negative_slope) if negative_slope < 1 else y).to(x.dtype)


def margin_loss(
    teacher: Tensor,
    student: Tensor,
    labels: Tensor,
    lambda_l: float,
    lambda_u: float,
    alpha_ds: float,
    alpha_as: float,
    beta: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(total, margin, disagreement, agreement, H')."""
    t, q = _compute(teacher), _compute(student)
    log_p = F.log_softmax(t - q, 1)
    entropy = -(log_p.exp() * log_p).sum(1)
    lowest = entropy.amin()
    h_prime = (entropy - lowest) / (math.log(t.shape[1]) - lowest)
    margin = F.relu(lambda_l - h_prime).mean() + F.relu(h_prime - lambda_u).mean()
    disagreement, agreement = F.nll_loss(log_p, labels), F.cross_entropy(t + q, labels)
    total = margin + beta * (alpha_ds * disagreement + alpha_as * agreement)
    return total, margin, disagreement, agreement, h_prime


def entropy_distillation(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    """-T^2 mean_b H(softmax((t - q) / T))."""
    log_p = F.log_softmax((_compute(teacher) - _compute(student)) / temperature, 1)
    return temperature**2 * (log_p.exp() * log_p).sum(1).mean()
