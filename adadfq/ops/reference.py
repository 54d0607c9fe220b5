"""Plain PyTorch implementation of every operator: the definition of right, on any device and in float64 too.

Written for reading. Arithmetic is in the compute dtype (float32, or float64 for float64 tensors); rounding is half to
even; nothing here waits for the device except the label check, which is made on CPU tensors only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from adadfq import checks
from adadfq.errors import InvalidInputError

NAME = "reference"
DEVICE_TYPE = None
DTYPES = None

#: A batch whose every entropy is within this many nats of log K agrees completely: H' is 1 and its gradient bounded.
FULL_AGREEMENT = 1e-6


def why_unavailable() -> str | None:
    """The reference needs nothing but PyTorch."""
    return None


def _compute(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _per_axis(values: Tensor, ndim: int, axis: int | None) -> Tensor:
    """View per-channel `values` so that they broadcast along `axis` of a tensor with `ndim` dimensions."""
    if axis is None:
        return values.reshape(())
    return values.reshape([-1 if d == axis else 1 for d in range(ndim)])


def qparams(lo: Tensor, hi: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and int32 zero point of the asymmetric `bits`-bit quantiser over the range [lo, hi] widened to hold 0.

    scale = (hi - lo) / (2^bits - 1), zero_point = round(-lo / scale). A range narrower than float32's smallest normal
    number has scale 1 and zero point 0. A NaN or infinite end gives a NaN scale, so that it cannot pass unseen.
    """
    levels = 2**bits - 1
    lo, hi = lo.clamp(max=0), hi.clamp(min=0)
    # By a tensor: on a GPU PyTorch multiplies by the reciprocal of a number, which rounds twice.
    scale = (hi - lo) / torch.full_like(hi, levels)
    # Dividing each infinite end by itself would differ between devices: NaN is made explicit.
    scale = torch.where(scale.isinf(), torch.nan, scale)
    scale = torch.where(scale < torch.finfo(torch.float32).tiny, torch.ones_like(scale), scale)
    zero_point = torch.round(-lo / scale).clamp(0, levels)
    return scale, torch.nan_to_num(zero_point, nan=0.0).to(torch.int32)


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int, axis: int | None = None) -> Tensor:
    """x_hat = (clamp(round(x / scale) + zero_point, 0, 2^bits - 1) - zero_point) * scale."""
    scale = _per_axis(scale, x.dim(), axis)
    zero_point = _per_axis(zero_point, x.dim(), axis).to(scale.dtype)
    code = (torch.round(_compute(x) / scale) + zero_point).clamp(0, 2**bits - 1)
    out = torch.empty_like(x)
    return out.copy_((code - zero_point) * scale)


def fake_quantize_(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int, axis: int | None = None) -> None:
    """:func:`fake_quantize`, written over `x`."""
    x.copy_(fake_quantize(x, scale, zero_point, bits, axis))


def fake_quantize_backward(
    grad: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor, bits: int, axis: int | None = None
) -> Tensor:
    """Clipped straight-through estimator: the gradient where round(x / scale) + zero_point is a code, 0 elsewhere."""
    scale = _per_axis(scale, x.dim(), axis)
    zero_point = _per_axis(zero_point, x.dim(), axis).to(scale.dtype)
    code = torch.round(_compute(x) / scale) + zero_point
    inside = (code >= 0) & (code <= 2**bits - 1)
    out = torch.empty_like(x)
    return out.copy_(torch.where(inside, grad, torch.zeros_like(grad)))


def learned_fake_quantize_backward(
    grad: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor, bits: int, axis: int | None = None
) -> tuple[Tensor, Tensor]:
    """(grad_x, grad_scale) of :func:`fake_quantize` with a learned step size (LSQ: Esser et al., ICLR 2020).

    grad_x is that of :func:`fake_quantize_backward`. grad_scale, shaped like `scale`, is the sum over the tensor, or
    over each channel, of grad * (round(x / scale) - x / scale) where round(x / scale) + zero_point is a code and of
    grad * (code - zero_point) where it was clipped to one: the derivative of x_hat with round's taken for 1. A NaN
    element has grad_x 0 and makes its grad_scale NaN.
    """
    step = _per_axis(scale, x.dim(), axis)
    zero_point = _per_axis(zero_point, x.dim(), axis).to(step.dtype)
    steps = _compute(x) / step
    rounded = torch.round(steps)
    code = rounded + zero_point
    inside = (code >= 0) & (code <= 2**bits - 1)
    slope = torch.where(inside, rounded - steps, code.clamp(0, 2**bits - 1) - zero_point)
    terms = _compute(grad) * slope
    grad_x = torch.empty_like(x).copy_(torch.where(inside, grad, torch.zeros_like(grad)))
    summed = [d for d in range(x.dim()) if d != axis]
    # Over an empty list of dimensions PyTorch sums all of them.
    grad_scale = terms.sum(summed) if summed else terms
    return grad_x, grad_scale.reshape(scale.shape)


def foreach_fake_quantize(
    tensors: list[Tensor], scales: list[Tensor], zero_points: list[Tensor], bits: list[int], axis: int | None
) -> list[Tensor]:
    """:func:`fake_quantize` of every tensor."""
    each = zip(tensors, scales, zero_points, bits, strict=True)
    return [fake_quantize(x, scale, zero_point, width, axis) for x, scale, zero_point, width in each]


def foreach_learned_fake_quantize_backward(
    grads: list[Tensor],
    tensors: list[Tensor],
    scales: list[Tensor],
    zero_points: list[Tensor],
    bits: list[int],
    axis: int | None,
) -> tuple[list[Tensor], list[Tensor]]:
    """:func:`learned_fake_quantize_backward` of every tensor; returns (grad_tensors, grad_scales)."""
    each = zip(grads, tensors, scales, zero_points, bits, strict=True)
    results = [learned_fake_quantize_backward(*arguments, axis) for arguments in each]
    return [grad_x for grad_x, _ in results], [grad_scale for _, grad_scale in results]


def dynamic_fake_quantize(x: Tensor, bits: int, axis: int) -> tuple[Tensor, Tensor, Tensor]:
    """Fake quantisation over each channel's own min/max; returns (x_hat, scale [C], zero_point [C])."""
    channels = _compute(x).movedim(axis, 0).flatten(1) if x.dim() > 1 else _compute(x).reshape(-1, 1)
    if channels.shape[1] == 0:
        lo = hi = channels.new_zeros(channels.shape[0])
    else:
        lo, hi = channels.aminmax(dim=1)
    scale, zero_point = qparams(lo, hi, bits)
    return fake_quantize(x, scale, zero_point, bits, axis), scale, zero_point


def foreach_dynamic_fake_quantize(
    tensors: list[Tensor], bits: list[int], axis: int
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """:func:`dynamic_fake_quantize` of every tensor; returns (x_hats, scales, zero_points)."""
    results = [dynamic_fake_quantize(x, width, axis) for x, width in zip(tensors, bits, strict=True)]
    x_hats, scales, zero_points = zip(*results, strict=True)
    return list(x_hats), list(scales), list(zero_points)


def update_range(
    lo: Tensor,
    hi: Tensor,
    running_min: Tensor,
    running_max: Tensor,
    num_batches: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bits: int,
    momentum: float,
) -> None:
    """Move a range by one batch's ends, in place: a debiased moving average, then the quantiser over it.

    After n batches batch i weighs momentum^(n - i), divided by the sum of those weights, so batch n moves the average
    by rate = (1 - m) / (1 - m^n) of the way: all of it for the first. In float64, for the rate is a small difference.
    """
    num_batches.add_(1)
    n = num_batches.double()
    if momentum == 0:
        rate = torch.ones_like(n)
    else:
        log_momentum = math.log(momentum)
        rate = math.expm1(log_momentum) / torch.expm1(log_momentum * n)
    for running, end in ((running_min, lo), (running_max, hi)):
        past = running.double()
        running.copy_(past + rate * (end.double() - past))
    new_scale, new_zero_point = qparams(running_min, running_max, bits)
    scale.copy_(new_scale)
    zero_point.copy_(new_zero_point)


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
    """Move the range by the min/max of `x`, then quantise `x` per tensor with it."""
    lo, hi = torch.aminmax(x)
    update_range(lo, hi, running_min, running_max, num_batches, scale, zero_point, bits, momentum)
    return fake_quantize(x, scale, zero_point, bits)


#: Activations, in the order of their numbers in csrc/cpu/affine_act_fake_quantize.h.
ACTS = ("none", "relu", "relu6")


def act_number(act: str) -> int:
    """Position of `act` in :data:`ACTS`.

    Raises:
        InvalidInputError: it is none of them.
    """
    if act not in ACTS:
        raise InvalidInputError(f"act must be one of {', '.join(ACTS)}, got {act!r}")
    return ACTS.index(act)


def is_quantised(act_scale: Tensor | None, act_zero_point: Tensor | None) -> bool:
    """Whether the quantiser is there.

    Raises:
        InvalidInputError: half of it is.
    """
    if (act_scale is None) != (act_zero_point is None):
        raise InvalidInputError("act_scale and act_zero_point must be given together or not at all")
    return act_scale is not None


def _affine(x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None) -> Tensor:
    u = _compute(x) * _per_axis(scale, x.dim(), 1) + _per_axis(shift, x.dim(), 1)
    return u if residual is None else u + _compute(residual)


def _activation(u: Tensor, act: str) -> Tensor:
    act_number(act)
    # Comparisons rather than clamp: NaN and -0 come out alike on every device.
    if act != "none":
        u = torch.where(u < 0, 0, u)
    return torch.where(u > 6, 6, u) if act == "relu6" else u


def affine_act_fake_quantize(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    act: str,
    act_scale: Tensor | None,
    act_zero_point: Tensor | None,
    bits: int,
) -> Tensor:
    """fake_quantize(act(x * scale_c + shift_c + residual)), without quantisation where `act_scale` is None."""
    u = _activation(_affine(x, scale, shift, residual), act)
    if is_quantised(act_scale, act_zero_point):
        u = fake_quantize(u, act_scale, act_zero_point, bits)
    return torch.empty_like(x).copy_(u)


def affine_act_quantize(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    act: str,
    act_scale: Tensor,
    act_zero_point: Tensor,
    bits: int,
) -> Tensor:
    """Codes (uint8) of :func:`affine_act_fake_quantize`: round(act(u) / scale) + zero_point in 0..2^bits - 1."""
    u = _activation(_affine(x, scale, shift, residual), act)
    code = (torch.round(u / act_scale.reshape(())) + act_zero_point.reshape(())).clamp(0, 2**bits - 1)
    # An integer cannot hold NaN.
    out = torch.empty_like(x, dtype=torch.uint8)
    return out.copy_(torch.where(code.isnan(), 0, code))


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that `count` codes of `bits` bits take."""
    return (count * bits + 7) // 8


def check_packed(packed: Tensor, shape: Sequence[int], bits: int) -> None:
    """Refuse what is not as many bytes as the codes of a tensor of `shape` take.

    Raises:
        InvalidInputError: `packed` is not uint8, has another number of dimensions than one, or another size.
    """
    if packed.dtype != torch.uint8 or packed.dim() != 1:
        raise InvalidInputError(f"packed must be torch.uint8 [n], got {packed.dtype} {list(packed.shape)}")
    if packed.numel() != (expected := packed_bytes(math.prod(shape), bits)):
        raise InvalidInputError(
            f"packed must hold {expected} bytes, {bits} bits for each element of shape {list(shape)}, got "
            f"{packed.numel()} bytes"
        )


def quantize_pack(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int, axis: int | None = None) -> Tensor:
    """Codes clamp(round(x / scale) + zero_point, 0, 2^bits - 1), 0 for NaN, as a stream of bits, lowest first."""
    scale = _per_axis(scale, x.dim(), axis)
    zero_point = _per_axis(zero_point, x.dim(), axis).to(scale.dtype)
    code = (torch.round(_compute(x) / scale) + zero_point).clamp(0, 2**bits - 1)
    codes = torch.where(code.isnan(), 0, code).to(torch.uint8).reshape(-1, 1)
    stream = (codes >> torch.arange(bits, dtype=torch.uint8, device=x.device)) & 1
    in_bytes = torch.nn.functional.pad(stream.reshape(-1), (0, -stream.numel() % 8)).view(-1, 8)
    return (in_bytes << torch.arange(8, dtype=torch.uint8, device=x.device)).sum(1, dtype=torch.uint8)


def unpack_dequantize(
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bits: int,
    shape: list[int],
    axis: int | None,
    dtype: torch.dtype,
) -> Tensor:
    """(code - zero_point) * scale for the codes of :func:`quantize_pack`: :func:`fake_quantize` of what had no NaN."""
    check_packed(packed, shape, bits)
    scale = _per_axis(scale, len(shape), axis)
    zero_point = _per_axis(zero_point, len(shape), axis).to(scale.dtype)
    stream = (packed.unsqueeze(1) >> torch.arange(8, dtype=torch.uint8, device=packed.device)) & 1
    in_codes = stream.reshape(-1)[: math.prod(shape) * bits].view(-1, bits)
    codes = (in_codes << torch.arange(bits, dtype=torch.uint8, device=packed.device)).sum(1, dtype=torch.uint8)
    # Into a new tensor: an empty one would keep the strides of arithmetic.
    out = torch.empty(shape, dtype=dtype, device=packed.device)
    return out.copy_((codes.view(shape).to(scale.dtype) - zero_point) * scale)


def affine_act_fake_quantize_backward(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    act: str,
    need_residual: bool,
    need_params: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(grad_x, grad_residual, grad_scale [C], grad_shift [C]); those not needed are empty.

    du = grad where the activation is not flat at u = x * scale + shift + residual (quantisation passes it unchanged);
    grad_x = du scale, grad_residual = du, grad_scale = sum du x, grad_shift = sum du.
    """
    act_number(act)
    du = _compute(grad)
    if act != "none":
        du = _where_sloped(du, _affine(x, scale, shift, residual), act)
    return _affine_gradients(du, x, scale, need_residual, need_params)


def affine_act_learned_fake_quantize_backward(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    act: str,
    act_scale: Tensor,
    act_zero_point: Tensor,
    bits: int,
    need_residual: bool,
    need_params: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """:func:`affine_act_fake_quantize_backward` where the quantiser's step is learned, and the gradient of that.

    (grad_x, grad_residual, grad_scale [C], grad_shift [C], grad_act_scale): quantisation passes the gradient, and gives
    that of its step, as :func:`learned_fake_quantize_backward` does for act(u).
    """
    u = _affine(x, scale, shift, residual)
    du, grad_act_scale = learned_fake_quantize_backward(
        _compute(grad), _activation(u, act), act_scale, act_zero_point, bits
    )
    if act != "none":
        du = _where_sloped(du, u, act)
    return *_affine_gradients(du, x, scale, need_residual, need_params), grad_act_scale


def _where_sloped(grad: Tensor, u: Tensor, act: str) -> Tensor:
    flat = u <= 0 if act == "relu" else (u <= 0) | (u >= 6)
    return torch.where(flat, 0, grad)


def _affine_gradients(
    du: Tensor, x: Tensor, scale: Tensor, need_residual: bool, need_params: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_x = torch.empty_like(x).copy_(du * _per_axis(scale, x.dim(), 1))
    grad_residual = torch.empty_like(x).copy_(du) if need_residual else x.new_empty(0)
    if not need_params:
        return grad_x, grad_residual, scale.new_empty(0), scale.new_empty(0)
    dims = _reduced_dims(x)
    return grad_x, grad_residual, (du * _compute(x)).sum(dims), du.sum(dims)


def _reduced_dims(x: Tensor) -> list[int]:
    return [d for d in range(x.dim()) if d != 1]


def bn_match(x: Tensor, running_mean: Tensor, running_var: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """MSE(mean, running_mean) + MSE(var, running_var) with the biased variance; returns (loss, mean [C], var [C]).

    mean and var are float64: rounding a mean of 1e4 to float32 moves it by a twentieth of a deviation of 1e-2.
    """
    mean, var = _moments(x)
    loss = (mean - running_mean).square().mean() + (var - running_var).square().mean()
    return loss.to(_compute(x).dtype), mean, var


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    values, dims = _compute(x), _reduced_dims(x)
    rounded = values.mean(dims)
    # Where a channel holds an infinity, its mean is one, and centred values would be NaN.
    pivot = torch.where(rounded.isfinite(), rounded, 0)
    centred = values - _per_axis(pivot, x.dim(), 1)
    offset = centred.mean(dims).double()
    mean = pivot.double() + offset
    var = centred.square().mean(dims).double() - offset.square()
    return mean, torch.where(var < 0, 0, var)


def bn_match_backward(
    grad_loss: Tensor, x: Tensor, mean: Tensor, var: Tensor, running_mean: Tensor, running_var: Tensor
) -> Tensor:
    """dL/dx = g 2 / (C n) [(mean - running_mean) + 2 (var - running_var) (x - mean)], n elements a channel."""
    values = _compute(x)
    factor = grad_loss.double() * (2 / x.numel())
    rounded = mean.to(values.dtype)
    slope = factor * 2 * (var - running_var)
    # What rounding the mean leaves out goes to the shift: it may be much of the deviation.
    shift = factor * (mean - running_mean) + slope * (rounded.double() - mean)
    shift, slope, rounded = (_per_axis(v.to(values.dtype), x.dim(), 1) for v in (shift, slope, rounded))
    out = torch.empty_like(x)
    return out.copy_(shift + slope * (values - rounded))


def _batch_norm_slope(running_var: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    # In float64: square roots in float32 are not rounded alike everywhere.
    slope = 1 / torch.sqrt(running_var.double() + eps)
    slope = slope if weight is None else weight.double() * slope
    return slope.to(running_var.dtype)


def bn_match_forward(
    x: Tensor, running_mean: Tensor, running_var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y, loss, mean [C], var [C]): inference BatchNorm of `x`, and :func:`bn_match` of `x`.

    y = (x - running_mean) * (weight / sqrt(running_var + eps)) + bias: subtracting first keeps the digits of a channel
    whose mean dwarfs its deviation.
    """
    slope = _per_axis(_batch_norm_slope(running_var, weight, eps), x.dim(), 1)
    y = (_compute(x) - _per_axis(running_mean, x.dim(), 1)) * slope
    if bias is not None:
        y = y + _per_axis(bias, x.dim(), 1)
    return torch.empty_like(x).copy_(y), *bn_match(x, running_mean, running_var)


def bn_match_forward_backward(
    grad_y: Tensor,
    x: Tensor,
    grad_loss: Tensor,
    mean: Tensor,
    var: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    eps: float,
) -> Tensor:
    """dL/dx = grad_y weight / sqrt(running_var + eps) + the gradient of :func:`bn_match_backward`."""
    slope = _per_axis(_batch_norm_slope(running_var, weight, eps), x.dim(), 1)
    matched = bn_match_backward(grad_loss, _compute(x), mean, var, running_mean, running_var)
    return torch.empty_like(x).copy_(_compute(grad_y) * slope + matched)


def _per_sample(values: Tensor, x: Tensor) -> Tensor:
    """View `values`, [C] or [N, C], so that they broadcast over `x`."""
    return values.reshape([*(values.shape if values.dim() == 2 else (1, -1)), *(1 for _ in range(x.dim() - 2))])


def is_per_sample(weight: Tensor | None, bias: Tensor | None) -> bool:
    """Whether the parameters of a normalisation are [N, C] rather than [C].

    Raises:
        InvalidInputError: one is this and the other that.
    """
    checks.check_same_form(weight, bias)
    return any(values is not None and values.dim() == 2 for values in (weight, bias))


def _normalised(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(u, x - mean with the mean rounded, du/dx) of :func:`batch_norm_act`."""
    values = _compute(x)
    inverse = 1 / torch.sqrt(var + eps)
    rounded = mean.to(values.dtype)
    slope = inverse if weight is None else weight.double() * inverse
    # What rounding the mean leaves out goes to the shift: it may be much of the deviation.
    shift = slope * (rounded.double() - mean)
    shift = shift if bias is None else bias.double() + shift
    slope, shift = (_per_sample(v.to(values.dtype), x) for v in (slope, shift))
    centred = values - _per_sample(rounded, x)
    return centred * slope + shift, centred, slope


def batch_norm_act(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, negative_slope: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, mean [C], var [C]): BatchNorm with the statistics of the batch, then LeakyReLU.

    u = (x - mean) / sqrt(var + eps) * weight + bias with `weight` and `bias` [C] or [N, C]; y = u where u > 0, else
    negative_slope u. mean and biased var are float64, as those of :func:`bn_match`.
    """
    checks.check_same_form(weight, bias)
    mean, var = _moments(x)
    u, _, _ = _normalised(x, mean, var, weight, bias, eps)
    return torch.empty_like(x).copy_(torch.where(u > 0, u, negative_slope * u)), mean, var


def batch_norm_act_backward(
    grad_y: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    negative_slope: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(grad_x, grad_weight, grad_bias), the last two in the form of `weight` and `bias` ([0] where that is None).

    With g = dL/du and x_hat = (x - mean) / sqrt(var + eps): grad_bias = sum g and grad_weight = sum g x_hat over what
    shares a weight, and grad_x = (weight g - mean_c(weight g) - x_hat mean_c(weight g x_hat)) / sqrt(var + eps) with
    averages over each channel.
    """
    per_sample = is_per_sample(weight, bias)
    u, centred, slope = _normalised(x, mean, var, weight, bias, eps)
    g = _compute(grad_y)
    g = torch.where(u > 0, g, negative_slope * g)
    dims = list(range(2, x.dim()))
    sum_g = (g.sum(dims) if dims else g).double()
    sum_product = ((g * centred).sum(dims) if dims else g * centred).double()
    if not per_sample:
        sum_g, sum_product = sum_g.sum(0), sum_product.sum(0)
    inverse = 1 / torch.sqrt(var + eps)
    left_out = mean.to(centred.dtype).double() - mean
    sum_g_hat = inverse * (sum_product + left_out * sum_g)

    weights = 1 if weight is None else weight.double()
    count = max(1, x.numel() // max(1, x.shape[1]))
    mean_g, mean_g_hat = (
        ((weights * total).sum(0) if per_sample else weights * total) / count for total in (sum_g, sum_g_hat)
    )
    factor = -inverse.square() * mean_g_hat
    offset = factor * left_out - inverse * mean_g
    offset, factor = (_per_sample(v.to(centred.dtype), x) for v in (offset, factor))
    grad_x = torch.empty_like(x).copy_(g * slope + (offset + factor * centred))
    return (
        grad_x,
        g.new_empty(0) if weight is None else sum_g_hat.to(g.dtype).contiguous(),
        g.new_empty(0) if bias is None else sum_g.to(g.dtype).contiguous(),
    )


def _entropy_deficit(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(p, log(K p), D) with p = softmax(logits) and D = log K - H(p), per row.

    D is computed from centred logits c as sum p c - log mean exp c rather than by subtracting H from log K: the
    subtraction loses every digit where teacher and student nearly agree, and H' is a ratio of such numbers.
    """
    classes = logits.shape[1]
    centred = logits - logits.mean(1, keepdim=True)
    p = torch.softmax(centred, 1)
    # log1p/expm1 is exact where every |c| is small; for large c it would overflow.
    small = torch.log1p(torch.expm1(centred.clamp(max=1)).mean(1, keepdim=True))
    large = torch.logsumexp(centred, 1, keepdim=True) - math.log(classes)
    log_mean_exp = torch.where(centred.amax(1, keepdim=True) < 1, small, large)
    log_kp = centred - log_mean_exp
    return p, log_kp, (p * log_kp).sum(1).clamp(0, math.log(classes))


def _deficit_gradient(p: Tensor, log_kp: Tensor, deficit: Tensor) -> Tensor:
    """dD/dlogits = p (log(K p) - D)."""
    return p * (log_kp - deficit.unsqueeze(1))


def check_labels(labels: Tensor, classes: int) -> None:
    """Refuse labels outside 0..classes - 1: at once on a CPU, when the device comes to it elsewhere."""
    if labels.device.type == "cpu":
        outside = labels[(labels < 0) | (labels >= classes)]
        if outside.numel():
            raise InvalidInputError(f"labels must be in 0..{classes - 1}, got {int(outside[0])}")
    else:
        torch._assert_async(((labels >= 0) & (labels < classes)).all())


def margin_loss(
    teacher_logits: Tensor,
    student_logits: Tensor,
    labels: Tensor,
    lambda_l: float,
    lambda_u: float,
    alpha_ds: float,
    alpha_as: float,
    beta: float,
    detach_min: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(total, L_margin, L_ds, L_as, H' [B], d total/d teacher_logits, d total/d student_logits).

    With D = log K - H, the normalised entropy is H' = 1 - D / max_b D, the same as (H - min H) / (log K - min H).
    """
    batch, classes = teacher_logits.shape
    check_labels(labels, classes)
    teacher, student = _compute(teacher_logits), _compute(student_logits)
    p_ds, log_kp, deficit = _entropy_deficit(teacher - student)
    log_p_as = torch.log_softmax(teacher + student, 1)

    largest = deficit.amax()
    largest_floor = largest.clamp(min=FULL_AGREEMENT)
    h_prime = 1 - deficit / largest_floor
    margin = (lambda_l - h_prime).clamp(min=0).mean() + (h_prime - lambda_u).clamp(min=0).mean()
    row_labels = labels.unsqueeze(1)
    disagreement = math.log(classes) - log_kp.gather(1, row_labels).mean()
    agreement = -log_p_as.gather(1, row_labels).mean()
    total = margin + beta * (alpha_ds * disagreement + alpha_as * agreement)

    grad_h = ((h_prime > lambda_u).to(deficit.dtype) - (h_prime < lambda_l).to(deficit.dtype)) / batch
    grad_deficit = -grad_h / largest_floor
    if not detach_min:
        # The batch minimum of H is the maximum of D; ties share its gradient evenly, as torch.amin's backward does.
        is_largest = (deficit == largest).to(deficit.dtype)
        through_largest = (grad_h * deficit).sum() / largest_floor.square()
        through_largest = torch.where(largest >= FULL_AGREEMENT, through_largest, 0)
        grad_deficit = grad_deficit + is_largest / is_largest.sum() * through_largest
    one_hot = torch.zeros_like(p_ds).scatter_(1, row_labels, 1)
    grad_ds = grad_deficit.unsqueeze(1) * _deficit_gradient(p_ds, log_kp, deficit)
    grad_ds = grad_ds + (beta * alpha_ds / batch) * (p_ds - one_hot)
    grad_as = (beta * alpha_as / batch) * (log_p_as.exp() - one_hot)
    return (
        total,
        margin,
        disagreement,
        agreement,
        h_prime,
        (grad_as + grad_ds).to(teacher_logits.dtype),
        (grad_as - grad_ds).to(student_logits.dtype),
    )


def entropy_distillation(teacher_logits: Tensor, student_logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """(-T^2 mean_b H(softmax((t - q) / T)), its gradient with respect to the student's logits)."""
    batch, classes = student_logits.shape
    p, log_kp, deficit = _entropy_deficit((_compute(teacher_logits) - _compute(student_logits)) / temperature)
    loss = temperature**2 * (deficit.mean() - math.log(classes))
    grad = (-temperature / batch) * _deficit_gradient(p, log_kp, deficit)
    return loss, grad.to(student_logits.dtype)


KERNELS = {
    "fake_quantize": fake_quantize,
    "fake_quantize_backward": fake_quantize_backward,
    "learned_fake_quantize_backward": learned_fake_quantize_backward,
    "fake_quantize_": fake_quantize_,
    "foreach_fake_quantize": foreach_fake_quantize,
    "foreach_learned_fake_quantize_backward": foreach_learned_fake_quantize_backward,
    "dynamic_fake_quantize": dynamic_fake_quantize,
    "foreach_dynamic_fake_quantize": foreach_dynamic_fake_quantize,
    "observe_fake_quantize": observe_fake_quantize,
    "affine_act_fake_quantize": affine_act_fake_quantize,
    "affine_act_quantize": affine_act_quantize,
    "quantize_pack": quantize_pack,
    "unpack_dequantize": unpack_dequantize,
    "affine_act_fake_quantize_backward": affine_act_fake_quantize_backward,
    "affine_act_learned_fake_quantize_backward": affine_act_learned_fake_quantize_backward,
    "bn_match": bn_match,
    "bn_match_backward": bn_match_backward,
    "bn_match_forward": bn_match_forward,
    "bn_match_forward_backward": bn_match_forward_backward,
    "batch_norm_act": batch_norm_act,
    "batch_norm_act_backward": batch_norm_act_backward,
    "margin_loss": margin_loss,
    "entropy_distillation": entropy_distillation,
}
