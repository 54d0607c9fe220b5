"""What the graphs made by :func:`adadfq.fuse` call: several modules in one pass, on those modules' own tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as torch_F

from adadfq import checks, functional
from adadfq.functional.autograd import first_order_only
from adadfq.nn import QuantAct, QuantConv2d, QuantLinear
from adadfq.ops.run import needs_gradient, run
from adadfq.ops.schema import compute_dtype

__all__ = [
    "BatchNormWatch",
    "batch_norm_act_quantize",
    "float32_linear",
    "fold_batch_norms",
    "frozen_convolution",
    "inference_maps",
    "quantize_weights",
    "quantized_layer",
    "watched_batch_norm",
]


def _same(x: Tensor) -> Tensor:
    return x


_ACTIVATIONS = {"none": _same, "relu": torch.relu, "relu6": torch_F.relu6}


class BatchNormWatch(nn.Module):
    """Where a fused teacher leaves the statistics losses of its BatchNorm layers; no parameters, no state.

    While `losses` is a list, every forward appends one :func:`adadfq.functional.bn_match` loss a layer to it. While it
    is None, nothing is computed of them. `norms` are the layers.
    """

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[Tensor] | None = None
        self.norms: list[nn.Module] = []


class _Fold(torch.autograd.Function):
    """(weight, bias) of every layer -> (weight * inv_std, bias - mean * weight * inv_std), all layers at once."""

    @staticmethod
    def forward(ctx: Any, sizes: list[int], mean: Tensor, inv_std: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        layers = len(sizes)
        scale = torch.cat(parameters[:layers]).to(mean.dtype) * inv_std
        shift = torch.addcmul(torch.cat(parameters[layers:]).to(mean.dtype), mean, scale, value=-1)
        ctx.sizes = sizes
        ctx.save_for_backward(mean, inv_std)
        return *scale.split(sizes), *shift.split(sizes)

    @staticmethod
    @first_order_only
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        mean, inv_std = ctx.saved_tensors
        layers = len(ctx.sizes)
        grad_shift = torch.cat(grads[layers:])
        grad_scale = torch.addcmul(torch.cat(grads[:layers]), mean, grad_shift, value=-1) * inv_std
        return None, None, None, *grad_scale.split(ctx.sizes), *grad_shift.split(ctx.sizes)


def fold_batch_norms(norms: Sequence[Any]) -> tuple[list[Tensor], list[Tensor]]:
    """The affine map of every BatchNorm in inference: (scales, shifts), each [C], with gradients to weight and bias.

    All of a device and dtype at once, in float32 at least.

    Args:
        norms: BatchNorm modules with running statistics, weight and bias.
    """
    maps: dict[int, tuple[Tensor, Tensor]] = {}
    for members in _groups([norm.weight for norm in norms]):
        group = [norms[i] for i in members]
        dtype = compute_dtype(group[0].weight.dtype)
        variances = torch._foreach_add([norm.running_var for norm in group], [norm.eps for norm in group])
        mean = torch.cat([norm.running_mean for norm in group]).to(dtype)
        inv_std = torch.cat(variances).to(dtype).rsqrt_()
        sizes = [norm.num_features for norm in group]
        folded = _Fold.apply(sizes, mean, inv_std, *(n.weight for n in group), *(n.bias for n in group))
        maps.update(zip(members, zip(folded[: len(group)], folded[len(group) :], strict=True), strict=True))
    return [maps[i][0] for i in range(len(norms))], [maps[i][1] for i in range(len(norms))]


def _groups(tensors: Sequence[Tensor]) -> list[list[int]]:
    """Positions of the tensors that one call can take: of one device and dtype."""
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, tensor in enumerate(tensors):
        groups.setdefault((tensor.device, tensor.dtype), []).append(i)
    return list(groups.values())


def quantize_weights(layers: Sequence[QuantConv2d | QuantLinear]) -> list[Tensor]:
    """The fake-quantised weight of every layer, per output channel, by one call for all of a device and dtype.

    Layers with steps of their own, fixed or learned, are a call for each of these two kinds.
    """
    results = [layer.weight for layer in layers]
    for members in _groups(results):
        own = [i for i in members if layers[i].weight_scale is not None]
        dynamic = [i for i in members if layers[i].weight_scale is None]
        weights, widths = [layers[i].weight for i in dynamic], [layers[i].weight_bits for i in dynamic]
        x_hats, _, _ = functional.foreach_dynamic_fake_quantize(weights, widths, axis=0)
        weights, widths = [layers[i].weight for i in own], [layers[i].weight_bits for i in own]
        scales, zero_points = [layers[i].weight_scale for i in own], [layers[i].weight_zero_point for i in own]
        x_hats += functional.foreach_fake_quantize(weights, scales, zero_points, widths, axis=0)
        for i, x_hat in zip(dynamic + own, x_hats, strict=True):
            results[i] = x_hat
    return results


def quantized_layer(x: Tensor, layer: QuantConv2d | QuantLinear, weight: Tensor, float32: bool = False) -> Tensor:
    """`layer` on `x` with its weight quantised already.

    Args:
        float32: compute a linear layer's output in float32 under autocast too: a 16-bit logit is too coarse for H'.
    """
    if isinstance(layer, QuantConv2d):
        return layer._conv_forward(x, weight, layer.bias)
    return _linear(x, weight, layer.bias, float32)


class _FrozenConvolution(torch.autograd.Function):
    """A convolution that keeps no input for its backward: autograd's own does, though only weights would ask for it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *settings: Any) -> Tensor:
        ctx.save_for_backward(weight)
        channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        ctx.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        ctx.shape, ctx.settings = x.shape, settings
        return torch.conv2d(x, weight, bias, *settings)

    @staticmethod
    @first_order_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        (weight,) = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.settings
        # Of the input the operator asks only what it looks like.
        x = torch.empty(ctx.shape, dtype=grad.dtype, device=grad.device, memory_format=ctx.memory_format)
        grad_x, _, _ = torch.ops.aten.convolution_backward(
            grad, x, weight, None, stride, padding, dilation, False, [0, 0], groups, [True, False, False]
        )
        return grad_x, None, None, None, None, None, None


def frozen_convolution(x: Tensor, layer: nn.Conv2d) -> Tensor:
    """`layer` on `x`, whose values are not kept for a backward while the layer's weights do not train."""
    weight, bias = layer.weight, layer.bias
    plain = layer.padding_mode != "zeros" or isinstance(layer.padding, str) or x.dim() != 4
    if plain or needs_gradient(weight, bias) or not needs_gradient(x):
        return layer(x)
    if torch.is_autocast_enabled(x.device.type):  # which an autograd function does not see
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    return _FrozenConvolution.apply(x, weight, bias, layer.stride, layer.padding, layer.dilation, layer.groups)


def float32_linear(x: Tensor, layer: nn.Linear) -> Tensor:
    """`layer` on `x`, in float32 under autocast too."""
    return _linear(x, layer.weight, layer.bias, True)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, float32: bool) -> Tensor:
    if not float32 or not torch.is_autocast_enabled(x.device.type):
        return torch_F.linear(x, weight, bias)
    with torch.autocast(x.device.type, enabled=False):
        return torch_F.linear(x.float(), weight.float(), None if bias is None else bias.float())


def _one_by_one(x: Tensor, norm: Any, residual: Tensor | None, act: str) -> Tensor:
    y = norm(x)
    return _ACTIVATIONS[act](y if residual is None else y + residual)


def batch_norm_act_quantize(
    x: Tensor,
    norm: Any,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None = None,
    act: str = "none",
    quantizer: QuantAct | None = None,
) -> Tensor:
    """``quantizer(act(norm(x) + residual))`` in one pass, in inference.

    In two while the quantiser calibrates, for its range depends on the whole result. In train mode, or where
    `residual` is to be broadcast, the modules run one by one.

    Args:
        x: [N, C, ...].
        norm: the BatchNorm layer.
        scale, shift: its affine map, of :func:`fold_batch_norms`.
        residual: added before the activation.
        act: "none", "relu" or "relu6".
        quantizer: of the result; None leaves it in float.
    """
    if norm.training or (residual is not None and residual.shape != x.shape):
        y = _one_by_one(x, norm, residual, act)
        return y if quantizer is None else quantizer(y)
    if residual is not None and residual.dtype != x.dtype:
        residual = residual.to(x.dtype)
    if quantizer is None or quantizer._calibrating:
        y = functional.affine_act_fake_quantize(x, scale, shift, residual, act)
        return y if quantizer is None else quantizer(y)
    qparams = (quantizer.scale, quantizer.zero_point, quantizer.act_bits)
    return functional.affine_act_fake_quantize(x, scale, shift, residual, act, qparams)


class _WatchedTail(torch.autograd.Function):
    """act(x scale_c + shift_c + residual) and the loss of x's statistics; keeps x and the residual, not the result."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, act: str, eps: float, maps: Sequence[Tensor], *running: Tensor
    ) -> tuple[Tensor, Tensor]:
        scale, shift, std = maps
        loss, mean, var = run("bn_match", x, *running)
        y = run("affine_act_fake_quantize", x, scale, shift, residual, act, None, None, checks.MAX_BITS)
        ctx.act, ctx.eps = act, eps
        ctx.save_for_backward(x, residual, scale, shift, std, mean, var, *running)
        ctx.set_materialize_grads(False)
        return y, loss

    @staticmethod
    @first_order_only
    def backward(ctx: Any, grad_y: Tensor | None, grad_loss: Tensor | None) -> tuple[Any, ...]:
        x, residual, scale, shift, std, *statistics = ctx.saved_tensors
        grad_residual, nothing = None, (None,) * 5
        if grad_y is None:
            grad_x = None if grad_loss is None else run("bn_match_backward", grad_loss, x, *statistics)
            return grad_x, None, *nothing
        needs_residual = ctx.needs_input_grad[1]
        grad_x, grad_residual, _, _ = run(
            "affine_act_fake_quantize_backward", grad_y, x, scale, shift, residual, ctx.act, needs_residual, False
        )
        if grad_loss is not None:
            # Scaled already: a weight of std makes the layer's own factor 1.
            arguments = (grad_x, x, grad_loss, *statistics, std, ctx.eps)
            grad_x = run("bn_match_forward_backward", *arguments)
        return grad_x, grad_residual if needs_residual else None, *nothing


@torch.no_grad()
def inference_maps(norms: Sequence[Any]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Scale, shift and sqrt(running_var + eps) of every BatchNorm in inference, each [C] and a constant."""
    scales, shifts = fold_batch_norms(norms)
    stds = torch._foreach_add([norm.running_var for norm in norms], [norm.eps for norm in norms])
    torch._foreach_sqrt_(stds)
    return [(scale, shift, std.to(scale.dtype)) for scale, shift, std in zip(scales, shifts, stds, strict=True)]


def watched_batch_norm(
    x: Tensor,
    norm: Any,
    watch: BatchNormWatch,
    maps: tuple[Tensor, Tensor, Tensor] | None = None,
    residual: Tensor | None = None,
    act: str = "none",
) -> Tensor:
    """``act(norm(x) + residual)``; while `watch` collects, with the loss of the layer's statistics.

    Arguments as :func:`batch_norm_act_quantize`, and `maps`: those of the layer in :func:`inference_maps`, if it has
    any.
    """
    if watch.losses is None:
        return _one_by_one(x, norm, residual, act)
    if norm.training or needs_gradient(norm.weight, norm.bias):
        watch.losses.append(functional.bn_match(x, norm.running_mean, norm.running_var))
        return _one_by_one(x, norm, residual, act)
    if act != "none" and maps is not None and (residual is None or residual.shape == x.shape):
        if residual is not None and residual.dtype != x.dtype:
            residual = residual.to(x.dtype)
        dtype = maps[0].dtype
        running = checks.as_constant(norm.running_mean, dtype), checks.as_constant(norm.running_var, dtype)
        y, loss = _WatchedTail.apply(x, residual, act, norm.eps, maps, *running)
    else:
        y, loss = functional.bn_match_forward(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps)
        y = _ACTIVATIONS[act](y if residual is None else y + residual)
    watch.losses.append(loss)
    return y
