"""Schema and fake (shape) implementation of every operator, once each.

The real implementation of each operator is the dispatcher (:mod:`adadfq.ops.dispatch`): it is registered for every
device and picks a backend when the operator runs, so tracing and ``torch.compile`` see one opaque operator whatever
the backend. Gradients are attached in :mod:`adadfq.functional`; a backward that needs a kernel is an operator here.

What every backend may rely on, because adadfq.functional sees to it: `bits` is in 2..8 and `axis` in 0..ndim-1; all
tensors are on one device; `scale` has the compute dtype and `zero_point` is int32, both one-dimensional (where axis is
None: one element, with or without a dimension); the gradient, or the student's logits, have the dtype and shape of the
main tensor; logits are [B, K] with B, K >= 1 and labels int64 [B]; running statistics and the parameters of an affine
map have the compute dtype and shape [C], with channels in dimension 1 (those of batch_norm_act may be [N, C], both);
`residual` has the dtype and shape of `x`; the tensors of a list, which holds one at least, have one dtype; the state of
an activation range has one element each (float32, num_batches int64, zero_point int32); `packed` is uint8 and
one-dimensional, and holds as many codes as `shape` has elements. Layout is free.

Compute dtype: float32 for float32, bfloat16 and float16 tensors, float64 for float64. Scales and losses have it; batch
statistics are float64. Outputs shaped like an input have its dtype and, where it is dense, its strides.

Packed codes are a bit stream: the `bits`-bit code of element i, in row-major order whatever the strides, is bits
[i * bits, (i + 1) * bits), lowest first; bit j of the stream is bit j % 8 of byte j // 8; the last byte's unused bits
are 0. What is unpacked is contiguous.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from adadfq.ops import dispatch, reference

LIBRARY = torch.library.Library("adadfq", "DEF")


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype arithmetic is done in for tensors of `dtype`: float64 for float64, otherwise float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int, axis: int | None = None) -> Tensor:
    return torch.empty_like(x)


def _fake_quantize_backward(
    grad: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor, bits: int, axis: int | None = None
) -> Tensor:
    return torch.empty_like(x)


def _learned_fake_quantize_backward(
    grad: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor, bits: int, axis: int | None = None
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), scale.new_empty(scale.shape)


def _foreach_fake_quantize(
    tensors: list[Tensor], scales: list[Tensor], zero_points: list[Tensor], bits: list[int], axis: int | None
) -> list[Tensor]:
    return [torch.empty_like(x) for x in tensors]


def _foreach_learned_fake_quantize_backward(
    grads: list[Tensor],
    tensors: list[Tensor],
    scales: list[Tensor],
    zero_points: list[Tensor],
    bits: list[int],
    axis: int | None,
) -> tuple[list[Tensor], list[Tensor]]:
    return [torch.empty_like(x) for x in tensors], [scale.new_empty(scale.shape) for scale in scales]


def _dynamic_fake_quantize(x: Tensor, bits: int, axis: int) -> tuple[Tensor, Tensor, Tensor]:
    channels = x.shape[axis]
    scale = x.new_empty((channels,), dtype=compute_dtype(x.dtype))
    return torch.empty_like(x), scale, x.new_empty((channels,), dtype=torch.int32)


def _fake_quantize_(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int, axis: int | None = None) -> None:
    return None


def _foreach_dynamic_fake_quantize(
    tensors: list[Tensor], bits: list[int], axis: int
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    results = [_dynamic_fake_quantize(x, width, axis) for x, width in zip(tensors, bits, strict=True)]
    return [r[0] for r in results], [r[1] for r in results], [r[2] for r in results]


def _observe_fake_quantize(
    x: Tensor,
    running_min: Tensor,
    running_max: Tensor,
    num_batches: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bits: int,
    momentum: float,
) -> Tensor:
    return torch.empty_like(x)


def _affine_act_fake_quantize(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    act: str,
    act_scale: Tensor | None,
    act_zero_point: Tensor | None,
    bits: int,
) -> Tensor:
    return torch.empty_like(x)


def _affine_act_quantize(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    act: str,
    act_scale: Tensor,
    act_zero_point: Tensor,
    bits: int,
) -> Tensor:
    return torch.empty_like(x, dtype=torch.uint8)


def _quantize_pack(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int, axis: int | None = None) -> Tensor:
    return x.new_empty((reference.packed_bytes(x.numel(), bits),), dtype=torch.uint8)


def _unpack_dequantize(
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bits: int,
    shape: list[int],
    axis: int | None,
    dtype: torch.dtype,
) -> Tensor:
    return packed.new_empty(shape, dtype=dtype)


def _affine_act_fake_quantize_backward(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    act: str,
    need_residual: bool,
    need_params: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_residual = torch.empty_like(x) if need_residual else x.new_empty(0)
    length = x.shape[1] if need_params else 0
    return torch.empty_like(x), grad_residual, scale.new_empty(length), scale.new_empty(length)


def _affine_act_learned_fake_quantize_backward(
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
    gradients = _affine_act_fake_quantize_backward(grad, x, scale, shift, residual, act, need_residual, need_params)
    return *gradients, act_scale.new_empty(act_scale.shape)


def _bn_match(x: Tensor, running_mean: Tensor, running_var: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    mean, var = (x.new_empty((x.shape[1],), dtype=torch.float64) for _ in range(2))
    return x.new_empty((), dtype=compute_dtype(x.dtype)), mean, var


def _bn_match_backward(
    grad_loss: Tensor, x: Tensor, mean: Tensor, var: Tensor, running_mean: Tensor, running_var: Tensor
) -> Tensor:
    return torch.empty_like(x)


def _bn_match_forward(
    x: Tensor, running_mean: Tensor, running_var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.empty_like(x), *_bn_match(x, running_mean, running_var)


def _bn_match_forward_backward(
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
    return torch.empty_like(x)


def _batch_norm_act(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, negative_slope: float
) -> tuple[Tensor, Tensor, Tensor]:
    mean, var = (x.new_empty((x.shape[1],), dtype=torch.float64) for _ in range(2))
    return torch.empty_like(x), mean, var


def _batch_norm_act_backward(
    grad_y: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    negative_slope: float,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_weight, grad_bias = (
        x.new_empty((0,) if values is None else values.shape, dtype=compute_dtype(x.dtype)) for values in (weight, bias)
    )
    return torch.empty_like(x), grad_weight, grad_bias


def _margin_loss(
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
    dtype = compute_dtype(teacher_logits.dtype)
    total, margin, disagreement, agreement = (teacher_logits.new_empty((), dtype=dtype) for _ in range(4))
    h_prime = teacher_logits.new_empty((teacher_logits.shape[0],), dtype=dtype)
    return (
        total,
        margin,
        disagreement,
        agreement,
        h_prime,
        teacher_logits.new_empty(teacher_logits.shape),
        student_logits.new_empty(student_logits.shape),
    )


def _entropy_distillation(teacher_logits: Tensor, student_logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(teacher_logits.dtype)
    return student_logits.new_empty((), dtype=dtype), student_logits.new_empty(student_logits.shape)


#: operator name -> (signature, fake implementation)
OPERATORS = {
    "fake_quantize": (
        "(Tensor x, Tensor scale, Tensor zero_point, int bits, int? axis=None) -> Tensor",
        _fake_quantize,
    ),
    "fake_quantize_backward": (
        "(Tensor grad, Tensor x, Tensor scale, Tensor zero_point, int bits, int? axis=None) -> Tensor",
        _fake_quantize_backward,
    ),
    "learned_fake_quantize_backward": (
        "(Tensor grad, Tensor x, Tensor scale, Tensor zero_point, int bits, int? axis=None) -> "
        "(Tensor grad_x, Tensor grad_scale)",
        _learned_fake_quantize_backward,
    ),
    "foreach_fake_quantize": (
        "(Tensor[] tensors, Tensor[] scales, Tensor[] zero_points, int[] bits, int? axis) -> Tensor[]",
        _foreach_fake_quantize,
    ),
    "foreach_learned_fake_quantize_backward": (
        "(Tensor[] grads, Tensor[] tensors, Tensor[] scales, Tensor[] zero_points, int[] bits, int? axis) -> "
        "(Tensor[] grad_tensors, Tensor[] grad_scales)",
        _foreach_learned_fake_quantize_backward,
    ),
    "dynamic_fake_quantize": (
        "(Tensor x, int bits, int axis) -> (Tensor x_hat, Tensor scale, Tensor zero_point)",
        _dynamic_fake_quantize,
    ),
    "fake_quantize_": (
        "(Tensor(a!) x, Tensor scale, Tensor zero_point, int bits, int? axis=None) -> ()",
        _fake_quantize_,
    ),
    "foreach_dynamic_fake_quantize": (
        "(Tensor[] tensors, int[] bits, int axis) -> (Tensor[] x_hats, Tensor[] scales, Tensor[] zero_points)",
        _foreach_dynamic_fake_quantize,
    ),
    "observe_fake_quantize": (
        "(Tensor x, Tensor(a!) running_min, Tensor(b!) running_max, Tensor(c!) num_batches, Tensor(d!) scale, "
        "Tensor(e!) zero_point, int bits, float momentum) -> Tensor",
        _observe_fake_quantize,
    ),
    "affine_act_fake_quantize": (
        "(Tensor x, Tensor scale, Tensor shift, Tensor? residual, str act, Tensor? act_scale, "
        "Tensor? act_zero_point, int bits) -> Tensor",
        _affine_act_fake_quantize,
    ),
    "affine_act_quantize": (
        "(Tensor x, Tensor scale, Tensor shift, Tensor? residual, str act, Tensor act_scale, Tensor act_zero_point, "
        "int bits) -> Tensor",
        _affine_act_quantize,
    ),
    "quantize_pack": (
        "(Tensor x, Tensor scale, Tensor zero_point, int bits, int? axis=None) -> Tensor",
        _quantize_pack,
    ),
    "unpack_dequantize": (
        "(Tensor packed, Tensor scale, Tensor zero_point, int bits, SymInt[] shape, int? axis, ScalarType dtype) -> "
        "Tensor",
        _unpack_dequantize,
    ),
    "affine_act_fake_quantize_backward": (
        "(Tensor grad, Tensor x, Tensor scale, Tensor shift, Tensor? residual, str act, bool need_residual, "
        "bool need_params) -> (Tensor grad_x, Tensor grad_residual, Tensor grad_scale, Tensor grad_shift)",
        _affine_act_fake_quantize_backward,
    ),
    "affine_act_learned_fake_quantize_backward": (
        "(Tensor grad, Tensor x, Tensor scale, Tensor shift, Tensor? residual, str act, Tensor act_scale, "
        "Tensor act_zero_point, int bits, bool need_residual, bool need_params) -> (Tensor grad_x, "
        "Tensor grad_residual, Tensor grad_scale, Tensor grad_shift, Tensor grad_act_scale)",
        _affine_act_learned_fake_quantize_backward,
    ),
    "bn_match": (
        "(Tensor x, Tensor running_mean, Tensor running_var) -> (Tensor loss, Tensor mean, Tensor var)",
        _bn_match,
    ),
    "bn_match_backward": (
        "(Tensor grad_loss, Tensor x, Tensor mean, Tensor var, Tensor running_mean, Tensor running_var) -> Tensor",
        _bn_match_backward,
    ),
    "bn_match_forward": (
        "(Tensor x, Tensor running_mean, Tensor running_var, Tensor? weight, Tensor? bias, float eps) -> "
        "(Tensor y, Tensor loss, Tensor mean, Tensor var)",
        _bn_match_forward,
    ),
    "bn_match_forward_backward": (
        "(Tensor grad_y, Tensor x, Tensor grad_loss, Tensor mean, Tensor var, Tensor running_mean, "
        "Tensor running_var, Tensor? weight, float eps) -> Tensor",
        _bn_match_forward_backward,
    ),
    "batch_norm_act": (
        "(Tensor x, Tensor? weight, Tensor? bias, float eps, float negative_slope) -> "
        "(Tensor y, Tensor mean, Tensor var)",
        _batch_norm_act,
    ),
    "batch_norm_act_backward": (
        "(Tensor grad_y, Tensor x, Tensor mean, Tensor var, Tensor? weight, Tensor? bias, float eps, "
        "float negative_slope) -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)",
        _batch_norm_act_backward,
    ),
    "margin_loss": (
        "(Tensor teacher_logits, Tensor student_logits, Tensor labels, float lambda_l, float lambda_u, "
        "float alpha_ds, float alpha_as, float beta, bool detach_min) -> (Tensor total, Tensor margin, "
        "Tensor disagreement, Tensor agreement, Tensor h_prime, Tensor grad_teacher, Tensor grad_student)",
        _margin_loss,
    ),
    "entropy_distillation": (
        "(Tensor teacher_logits, Tensor student_logits, float temperature) -> (Tensor loss, Tensor grad_student)",
        _entropy_distillation,
    ),
}

for _name, (_signature, _fake) in OPERATORS.items():
    LIBRARY.define(_name + _signature, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(_name, partial(dispatch.call, _name), "CompositeExplicitAutograd")
    torch.library.register_fake(f"adadfq::{_name}", _fake, lib=LIBRARY)
