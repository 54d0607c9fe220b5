"""The method in float64 and plain PyTorch, written from the paper's formulas and sharing no code with the package.

Everything is differentiable by autograd, so that gradients have an independent source too.
"""

from __future__ import annotations

import math
import struct
from decimal import Decimal, localcontext

import torch
from torch import Tensor


def quantizer_range(lo: Tensor, hi: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """scale and zero point over [lo, hi] widened to hold 0, in float64."""
    lo = torch.minimum(lo.double(), torch.zeros((), dtype=torch.float64))
    hi = torch.maximum(hi.double(), torch.zeros((), dtype=torch.float64))
    scale = (hi - lo) / (2**bits - 1)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return scale, torch.round(-lo / scale)


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """x_hat in float64; scale and zero_point broadcast against x."""
    code = torch.round(x.double() / scale.double()) + zero_point.double()
    return (torch.clamp(code, 0, 2**bits - 1) - zero_point.double()) * scale.double()


def tie_distance(x: Tensor, scale: Tensor) -> Tensor:
    """Distance of x / scale from the nearest rounding tie, in steps."""
    steps = x.double() / scale.double()
    return (steps - torch.floor(steps) - 0.5).abs()


def straight_through(u: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """quantize(u), whose gradient is that of `u`."""
    return u + (quantize(u.detach(), scale, zero_point, bits) - u.detach())


def learned_step_gradients(
    grad: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor, bits: int
) -> tuple[Tensor, Tensor]:
    """(gradient of x, what each element gives the gradient of its scale) of LSQ, in float64, by cases.

    Written for k = x / scale between the bounds -zero_point and 2^bits - 1 - zero_point of its whole values.
    """
    k, upper = x.double() / scale.double(), 2**bits - 1 - zero_point.double()
    lower = (upper - (2**bits - 1)).expand(k.shape)
    upper = upper.expand(k.shape)
    whole = torch.round(k)
    grad_x, factor = grad.double().clone(), whole - k
    for clipped, bound in ((whole < lower, lower), (whole > upper, upper)):
        grad_x[clipped], factor[clipped] = 0.0, bound[clipped]
    grad_x[k.isnan()] = 0.0
    return grad_x, grad.double() * factor


def activation(u: Tensor, act: str) -> Tensor:
    """The identity, max(u, 0) or min(max(u, 0), 6), flat at 0 and at 6 themselves; NaN stays."""
    if act == "none":
        return u
    u = torch.where((u > 0) | u.isnan(), u, torch.zeros_like(u))
    return torch.where(u >= 6, torch.full_like(u, 6.0), u) if act == "relu6" else u


def affine(x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None) -> Tensor:
    """x scale_c + shift_c + residual, channels in dimension 1."""
    u = (x.double().transpose(1, -1) * scale.double() + shift.double()).transpose(1, -1)
    return u if residual is None else u + residual.double()


def moving_average(ends: list[float], momentum: float) -> float:
    """Average of the batches' ends, batch i weighing momentum^(n - i)."""
    weights = [momentum ** (len(ends) - 1 - i) for i in range(len(ends))]
    return math.fsum(w * end for w, end in zip(weights, ends, strict=True)) / math.fsum(weights)


def moving_average_rate(n: int, momentum: float) -> float:
    """Weight of the last of `n` batches in :func:`moving_average`: one over the sum of a geometric series."""
    with localcontext() as context:
        context.prec = 60
        past = Decimal(momentum)
        return float((1 - past) / (1 - past**n))


def batch_norm(
    x: Tensor, running_mean: Tensor, running_var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """BatchNorm over given statistics, channels in dimension 1."""
    y = (x.double().transpose(1, -1) - running_mean.double()) / (running_var.double() + eps).sqrt()
    if weight is not None:
        y = y * weight.double()
    if bias is not None:
        y = y + bias.double()
    return y.transpose(1, -1)


def batch_norm_act(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, negative_slope: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, mean, biased var): BatchNorm with the batch's statistics, parameters [C] or [N, C], then LeakyReLU."""
    rows = x.double().transpose(0, 1).reshape(x.shape[1], -1)
    mean = rows.mean(1)
    var = (rows - mean[:, None]).square().mean(1)
    u = ((x.double().transpose(1, -1) - mean) / (var + eps).sqrt()).transpose(1, -1)
    for values, combine in ((weight, torch.mul), (bias, torch.add)):
        if values is not None:
            every = values.double().expand(x.shape[0], x.shape[1])
            u = combine(u, every[(...,) + (None,) * (x.dim() - 2)])
    return torch.where(u > 0, u, negative_slope * u), mean, var


def batch_norm_statistics_loss(x: Tensor, running_mean: Tensor, running_var: Tensor) -> Tensor:
    channels = x.double().transpose(0, 1).reshape(x.shape[1], -1)
    mean = channels.sum(1) / channels.shape[1]
    var = ((channels - mean[:, None]) ** 2).sum(1) / channels.shape[1]
    return ((mean - running_mean.double()) ** 2).mean() + ((var - running_var.double()) ** 2).mean()


def entropy(logits: Tensor) -> Tensor:
    p = torch.exp(logits - torch.logsumexp(logits, 1, keepdim=True))
    return -(p * (logits - torch.logsumexp(logits, 1, keepdim=True))).sum(1)


def normalised_entropy(teacher: Tensor, student: Tensor, detach_min: bool) -> Tensor:
    """H' = (H - min H) / (log K - min H). Undefined where every H is log K."""
    h = entropy(teacher - student)
    lowest = h.amin()
    if detach_min:
        lowest = lowest.detach()
    return (h - lowest) / (math.log(teacher.shape[1]) - lowest)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    rows = torch.arange(len(labels))
    return (torch.logsumexp(logits, 1) - logits[rows, labels]).mean()


def margin_loss(
    teacher: Tensor,
    student: Tensor,
    labels: Tensor,
    lambda_l: float,
    lambda_u: float,
    alpha_ds: float,
    alpha_as: float,
    beta: float,
    detach_min: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(total, L_margin, L_ds, L_as, H')."""
    h_prime = normalised_entropy(teacher, student, detach_min)
    below = torch.where(h_prime < lambda_l, lambda_l - h_prime, torch.zeros_like(h_prime)).mean()
    above = torch.where(h_prime > lambda_u, h_prime - lambda_u, torch.zeros_like(h_prime)).mean()
    disagreement = cross_entropy(teacher - student, labels)
    agreement = cross_entropy(teacher + student, labels)
    total = below + above + beta * (alpha_ds * disagreement + alpha_as * agreement)
    return total, below + above, disagreement, agreement, h_prime


def student_loss(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    return -(temperature**2) * entropy((teacher - student) / temperature).mean()


def whole_steps(x: float, scale: float, double: bool = False) -> int | None:
    """x / scale rounded to an integer, half to even, cut off far outside all codes; None for NaN.

    The quotient is rounded to float32 first, or is float64's with `double`: two float32 divided in float64 and rounded
    to float32 are their quotient in float32.
    """
    steps = x / scale
    if math.isnan(steps):
        return None
    steps = min(max(steps, -(2.0**20)), 2.0**20)
    return round(steps if double else struct.unpack("f", struct.pack("f", steps))[0])


def codes(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int, axis: int | None) -> list[int]:
    """The code of every element of `x` in row-major order, 0 for NaN; channels are along `axis`."""
    view = [1] * x.dim() if axis is None else [-1 if d == axis else 1 for d in range(x.dim())]
    each = [t.reshape(view).expand(x.shape).reshape(-1).tolist() for t in (scale, zero_point)]
    found = []
    for value, s, z in zip(x.reshape(-1).tolist(), *each, strict=True):
        steps = whole_steps(value, s, x.dtype == torch.float64)
        found.append(0 if steps is None else min(max(steps + z, 0), 2**bits - 1))
    return found


def pack(codes: list[int], bits: int) -> bytes:
    """A stream of `bits`-bit codes as one binary number, whose last digits are the first code."""
    digits = "".join(f"{code:0{bits}b}" for code in reversed(codes))
    return int("0" + digits, 2).to_bytes((len(digits) + 7) // 8, "little")


def unpack(packed: bytes, bits: int, count: int) -> list[int]:
    """The first `count` codes of a stream."""
    digits = f"{int.from_bytes(packed, 'little'):0{8 * len(packed)}b}"[::-1]
    return [int(digits[i * bits : (i + 1) * bits][::-1], 2) for i in range(count)]
