"""The operators of every backend with kernels: arguments checked, results allocated, one launcher called.

A launcher writes to tensors it is given; its arguments are those of the function of its name in :mod:`adadfq.kernels`,
whose docstring says what they are (those of packing end with layout and bits). A backend (:class:`Backend`) is how
launchers are reached.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from adadfq.errors import InvalidInputError
from adadfq.ops import native_args, reference

#: The operators of this module whose launchers all backends have, then those that Triton's has not.
OPERATORS = (
    "fake_quantize",
    "fake_quantize_",
    "fake_quantize_backward",
    "learned_fake_quantize_backward",
    "foreach_fake_quantize",
    "foreach_learned_fake_quantize_backward",
    "dynamic_fake_quantize",
    "foreach_dynamic_fake_quantize",
    "observe_fake_quantize",
    "affine_act_fake_quantize",
    "affine_act_quantize",
    "affine_act_fake_quantize_backward",
    "affine_act_learned_fake_quantize_backward",
    "bn_match",
    "bn_match_backward",
    "bn_match_forward",
    "bn_match_forward_backward",
    "margin_loss",
    "entropy_distillation",
)
PACKING = ("quantize_pack", "unpack_dequantize")
#: Those whose launchers CUDA's C++ has not.
BATCH_NORM_ACT = ("batch_norm_act", "batch_norm_act_backward")


class Backend(Protocol):
    """What a backend's module has; all of it is looked up in every call."""

    DEVICE_TYPE: str
    """Of the tensors it takes."""
    INTERPRETED: bool
    """Whether a GPU's kernels run on the host: then looking at values waits for nothing."""

    def launch(self, op: str, launcher: str, x: Tensor, *arguments: Any) -> None:
        """Queue `launcher` on the current stream of the device of `x`, the main tensor.

        Raises:
            BackendError: it could not be queued; `op` is named.
        """


_NOTHING = nullcontext()


def device_guard(x: Tensor) -> AbstractContextManager[object]:
    """Makes the device of `x` current, which it mostly is; does nothing for CPU tensors."""
    if not x.is_cuda or x.get_device() == torch.cuda.current_device():
        return _NOTHING
    return torch.cuda.device(x.get_device())


def kernels(backend: Backend, names: tuple[str, ...] = OPERATORS) -> dict[str, Callable[..., Any]]:
    """Operator name -> its implementation over the launchers of `backend`."""
    operators = _Operators(backend)
    return {name: getattr(operators, name) for name in names}


def attribute(module: str, kernels: dict[str, Callable[..., Any]], name: str) -> Callable[..., Any]:
    """For a backend's ``__getattr__``: operators are attributes of the module too, as the reference's are."""
    if name in kernels:
        return kernels[name]
    raise AttributeError(f"module {module!r} has no attribute {name!r}")


class _Operators:
    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def fake_quantize(self, x: Tensor, scale: Tensor, zero_point: Tensor, bits: int, axis: int | None = None) -> Tensor:
        """See :func:`adadfq.ops.reference.fake_quantize`; equal to it bit for bit."""
        op = "fake_quantize"
        out = torch.empty_like(x)
        if x.numel() == 0:
            return out
        x, scale, zero_point, layout = native_args.quantizer(
            op, x, scale, zero_point, bits, axis, self._backend.DEVICE_TYPE
        )
        self._backend.launch(op, "fake_quantize", x, x, scale, zero_point, out, layout.channels, layout.inner, bits)
        return out

    def fake_quantize_(self, x: Tensor, scale: Tensor, zero_point: Tensor, bits: int, axis: int | None = None) -> None:
        """See :func:`adadfq.ops.reference.fake_quantize_`; equal to it bit for bit."""
        op = "fake_quantize_"
        if x.numel() == 0:
            return
        dense, scale, zero_point, layout = native_args.quantizer(
            op, x, scale, zero_point, bits, axis, self._backend.DEVICE_TYPE
        )
        self._backend.launch(
            op, "fake_quantize", dense, dense, scale, zero_point, dense, layout.channels, layout.inner, bits
        )
        if dense is not x:
            x.copy_(dense)

    def fake_quantize_backward(
        self, grad: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor, bits: int, axis: int | None = None
    ) -> Tensor:
        """See :func:`adadfq.ops.reference.fake_quantize_backward`; equal to it bit for bit."""
        op = "fake_quantize_backward"
        out = torch.empty_like(x)
        if x.numel() == 0:
            return out
        x, scale, zero_point, layout = native_args.quantizer(
            op, x, scale, zero_point, bits, axis, self._backend.DEVICE_TYPE
        )
        grad = native_args.like(op, "grad", grad, x)
        self._backend.launch(op, op, x, grad, x, scale, zero_point, out, layout.channels, layout.inner, bits)
        return out

    def learned_fake_quantize_backward(
        self, grad: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor, bits: int, axis: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """See :func:`adadfq.ops.reference.learned_fake_quantize_backward`; long sums in float64."""
        lists = [grad], [x], [scale], [zero_point], [bits]
        grads, grad_scales = self._learned_backward("learned_fake_quantize_backward", *lists, axis)
        return grads[0], grad_scales[0]

    def foreach_learned_fake_quantize_backward(
        self,
        grads: list[Tensor],
        tensors: list[Tensor],
        scales: list[Tensor],
        zero_points: list[Tensor],
        bits: list[int],
        axis: int | None,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """See :func:`adadfq.ops.reference.foreach_learned_fake_quantize_backward`; long sums in float64.

        One launch for all tensors whose channels along `axis` are one row of memory each, as those of weights are.
        """
        op = "foreach_learned_fake_quantize_backward"
        return self._learned_backward(op, grads, tensors, scales, zero_points, bits, axis)

    def _learned_backward(
        self,
        op: str,
        grads: list[Tensor],
        tensors: list[Tensor],
        scales: list[Tensor],
        zero_points: list[Tensor],
        bits: list[int],
        axis: int | None,
    ) -> tuple[list[Tensor], list[Tensor]]:
        grad_tensors, grad_scales, calls = [], [], []
        for grad, x, scale, zero_point, width in zip(grads, tensors, scales, zero_points, bits, strict=True):
            grad_x = torch.empty_like(x)
            grad_scale = torch.empty(scale.shape, dtype=torch.float32, device=x.device)
            grad_tensors.append(grad_x)
            grad_scales.append(grad_scale)
            if x.numel() == 0:
                grad_scale.zero_()
                continue
            x, scale, zero_point, layout = native_args.quantizer(
                op, x, scale, zero_point, width, axis, self._backend.DEVICE_TYPE
            )
            grad = native_args.like(op, "grad", grad, x)
            calls.append((grad, x, grad_x, scale, zero_point, grad_scale, layout, width))
            _check_alike(op, calls[0][1], x)
        if calls:
            self._backend.launch(op, "learned_fake_quantize_backward", calls[0][1], calls)
        return grad_tensors, grad_scales

    def foreach_fake_quantize(
        self,
        tensors: list[Tensor],
        scales: list[Tensor],
        zero_points: list[Tensor],
        bits: list[int],
        axis: int | None,
    ) -> list[Tensor]:
        """See :func:`adadfq.ops.reference.foreach_fake_quantize`; equal to it bit for bit."""
        op = "foreach_fake_quantize"
        x_hats, calls = [], []
        for x, scale, zero_point, width in zip(tensors, scales, zero_points, bits, strict=True):
            out = torch.empty_like(x)
            x_hats.append(out)
            if x.numel() == 0:
                continue
            x, scale, zero_point, layout = native_args.quantizer(
                op, x, scale, zero_point, width, axis, self._backend.DEVICE_TYPE
            )
            calls.append((x, out, scale, zero_point, layout, width))
            _check_alike(op, calls[0][0], x)
        if calls:
            self._backend.launch(op, op, calls[0][0], calls)
        return x_hats

    def dynamic_fake_quantize(self, x: Tensor, bits: int, axis: int) -> tuple[Tensor, Tensor, Tensor]:
        """See :func:`adadfq.ops.reference.dynamic_fake_quantize`; equal to it bit for bit."""
        x_hats, scales, zero_points = self._dynamic_fake_quantize("dynamic_fake_quantize", [x], [bits], axis)
        return x_hats[0], scales[0], zero_points[0]

    def foreach_dynamic_fake_quantize(
        self, tensors: list[Tensor], bits: list[int], axis: int
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """See :func:`adadfq.ops.reference.foreach_dynamic_fake_quantize`; equal to it bit for bit.

        One launch for all tensors whose channels along `axis` are one row of memory each, as those of weights are.
        """
        return self._dynamic_fake_quantize("foreach_dynamic_fake_quantize", tensors, bits, axis)

    def _dynamic_fake_quantize(
        self, op: str, tensors: list[Tensor], bits: list[int], axis: int
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        x_hats, scales, zero_points, calls = [], [], [], []
        for x, width in zip(tensors, bits, strict=True):
            native_args.check_bits(op, width)
            if x.numel() == 0:
                out, scale, zero_point = reference.dynamic_fake_quantize(x, width, axis)
            else:
                out = torch.empty_like(x)
                x = native_args.main_tensor(op, "x", x, self._backend.DEVICE_TYPE)
                layout = native_args.layout(op, x, axis)
                scale = torch.empty(layout.channels, dtype=torch.float32, device=x.device)
                zero_point = torch.empty(layout.channels, dtype=torch.int32, device=x.device)
                calls.append((x, out, scale, zero_point, layout, width))
                _check_alike(op, calls[0][0], x)
            x_hats.append(out)
            scales.append(scale)
            zero_points.append(zero_point)
        if calls:
            self._backend.launch(op, "dynamic_fake_quantize", calls[0][0], calls)
        return x_hats, scales, zero_points

    def observe_fake_quantize(
        self,
        x: Tensor,
        running_min: Tensor,
        running_max: Tensor,
        num_batches: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        bits: int,
        momentum: float,
    ) -> Tensor:
        """See :func:`adadfq.ops.reference.observe_fake_quantize`; the state stays on the device."""
        op = "observe_fake_quantize"
        native_args.check_bits(op, bits)
        out = torch.empty_like(x)
        x = native_args.main_tensor(op, "x", x, self._backend.DEVICE_TYPE)
        if x.numel() == 0:
            raise InvalidInputError(f"{op}: x must hold at least one element, got shape {list(x.shape)}")
        state = [
            native_args.scalar(op, name, tensor, dtype, x.device)
            for name, tensor, dtype in (
                ("running_min", running_min, torch.float32),
                ("running_max", running_max, torch.float32),
                ("num_batches", num_batches, torch.int64),
                ("scale", scale, torch.float32),
                ("zero_point", zero_point, torch.int32),
            )
        ]
        self._backend.launch(op, op, x, x, out, *state, bits, momentum)
        return out

    def affine_act_fake_quantize(
        self,
        x: Tensor,
        scale: Tensor,
        shift: Tensor,
        residual: Tensor | None,
        act: str,
        act_scale: Tensor | None,
        act_zero_point: Tensor | None,
        bits: int,
    ) -> Tensor:
        """See :func:`adadfq.ops.reference.affine_act_fake_quantize`; equal to it bit for bit."""
        op = "affine_act_fake_quantize"
        return self._affine_act(op, x, scale, shift, residual, act, act_scale, act_zero_point, bits, x.dtype)

    def affine_act_quantize(
        self,
        x: Tensor,
        scale: Tensor,
        shift: Tensor,
        residual: Tensor | None,
        act: str,
        act_scale: Tensor,
        act_zero_point: Tensor,
        bits: int,
    ) -> Tensor:
        """See :func:`adadfq.ops.reference.affine_act_quantize`; equal to it."""
        op = "affine_act_quantize"
        return self._affine_act(op, x, scale, shift, residual, act, act_scale, act_zero_point, bits, torch.uint8)

    def _affine_act(
        self,
        op: str,
        x: Tensor,
        scale: Tensor,
        shift: Tensor,
        residual: Tensor | None,
        act: str,
        act_scale: Tensor | None,
        act_zero_point: Tensor | None,
        bits: int,
        out_dtype: torch.dtype,
    ) -> Tensor:
        native_args.check_bits(op, bits)
        out = torch.empty_like(x, dtype=out_dtype)
        act_number = reference.act_number(act)
        if x.numel() == 0:
            return out
        x = native_args.main_tensor(op, "x", x, self._backend.DEVICE_TYPE)
        layout = native_args.layout(op, x, 1)
        scale = native_args.vector(op, "scale", scale, x.shape[1], torch.float32, x.device)
        shift = native_args.vector(op, "shift", shift, x.shape[1], torch.float32, x.device)
        if residual is not None:
            residual = native_args.like(op, "residual", residual, x)
        if reference.is_quantised(act_scale, act_zero_point):
            act_scale = native_args.scalar(op, "act_scale", act_scale, torch.float32, x.device)
            act_zero_point = native_args.scalar(op, "act_zero_point", act_zero_point, torch.int32, x.device)
        self._backend.launch(
            op,
            "affine_act_fake_quantize",
            x,
            x,
            scale,
            shift,
            residual,
            act_number,
            act_scale,
            act_zero_point,
            out,
            layout.channels,
            layout.inner,
            bits,
        )
        return out

    def quantize_pack(self, x: Tensor, scale: Tensor, zero_point: Tensor, bits: int, axis: int | None = None) -> Tensor:
        """See :func:`adadfq.ops.reference.quantize_pack`; equal to it."""
        op = "quantize_pack"
        packed = torch.empty(reference.packed_bytes(x.numel(), bits), dtype=torch.uint8, device=x.device)
        if x.numel() == 0:
            return packed
        # The stream's order is that of a contiguous tensor.
        x = native_args.main_tensor(op, "x", x, self._backend.DEVICE_TYPE).contiguous()
        x, scale, zero_point, layout = native_args.quantizer(
            op, x, scale, zero_point, bits, axis, self._backend.DEVICE_TYPE
        )
        self._backend.launch(op, op, x, x, scale, zero_point, packed, layout, bits)
        return packed

    def unpack_dequantize(
        self,
        packed: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        bits: int,
        shape: list[int],
        axis: int | None,
        dtype: torch.dtype,
    ) -> Tensor:
        """See :func:`adadfq.ops.reference.unpack_dequantize`; equal to it bit for bit."""
        op = "unpack_dequantize"
        reference.check_packed(packed, shape, bits)
        out = torch.empty(shape, dtype=dtype, device=packed.device)
        if out.numel() == 0:
            return out
        out, scale, zero_point, layout = native_args.quantizer(
            op, out, scale, zero_point, bits, axis, self._backend.DEVICE_TYPE
        )
        packed = native_args.vector(op, "packed", packed, packed.numel(), torch.uint8, out.device)
        self._backend.launch(op, op, out, packed, scale, zero_point, out, layout, bits)
        return out

    def affine_act_fake_quantize_backward(
        self,
        grad: Tensor,
        x: Tensor,
        scale: Tensor,
        shift: Tensor,
        residual: Tensor | None,
        act: str,
        need_residual: bool,
        need_params: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See :func:`adadfq.ops.reference.affine_act_fake_quantize_backward`; long sums in float64."""
        op = "affine_act_fake_quantize_backward"
        act_number = reference.act_number(act)
        grad_x = torch.empty_like(x)
        x = native_args.main_tensor(op, "x", x, self._backend.DEVICE_TYPE)
        channels = x.shape[1]
        grad_residual = torch.empty_like(x) if need_residual else x.new_empty(0)
        grad_scale = torch.empty(channels if need_params else 0, dtype=torch.float32, device=x.device)
        grad_shift = torch.empty_like(grad_scale)
        if x.numel() == 0:
            return grad_x, grad_residual, grad_scale.zero_(), grad_shift.zero_()
        layout = native_args.layout(op, x, 1)
        scale = native_args.vector(op, "scale", scale, channels, torch.float32, x.device)
        shift = native_args.vector(op, "shift", shift, channels, torch.float32, x.device)
        grad = native_args.like(op, "grad", grad, x)
        if residual is not None:
            residual = native_args.like(op, "residual", residual, x)
        self._backend.launch(
            op,
            op,
            x,
            grad,
            x,
            scale,
            shift,
            residual,
            act_number,
            grad_x,
            grad_residual if need_residual else None,
            grad_scale if need_params else None,
            grad_shift if need_params else None,
            layout,
        )
        return grad_x, grad_residual, grad_scale, grad_shift

    def affine_act_learned_fake_quantize_backward(
        self,
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
        """See :func:`adadfq.ops.reference.affine_act_learned_fake_quantize_backward`; long sums in float64."""
        op = "affine_act_learned_fake_quantize_backward"
        native_args.check_bits(op, bits)
        act_number = reference.act_number(act)
        grad_x = torch.empty_like(x)
        x = native_args.main_tensor(op, "x", x, self._backend.DEVICE_TYPE)
        channels = x.shape[1]
        grad_residual = torch.empty_like(x) if need_residual else x.new_empty(0)
        grad_scale = torch.empty(channels if need_params else 0, dtype=torch.float32, device=x.device)
        grad_shift = torch.empty_like(grad_scale)
        grad_act_scale = torch.empty(act_scale.shape, dtype=torch.float32, device=x.device)
        results = grad_x, grad_residual, grad_scale, grad_shift, grad_act_scale
        if x.numel() == 0:
            for sums in results[2:]:
                sums.zero_()
            return results
        layout = native_args.layout(op, x, 1)
        scale = native_args.vector(op, "scale", scale, channels, torch.float32, x.device)
        shift = native_args.vector(op, "shift", shift, channels, torch.float32, x.device)
        grad = native_args.like(op, "grad", grad, x)
        if residual is not None:
            residual = native_args.like(op, "residual", residual, x)
        act_scale = native_args.scalar(op, "act_scale", act_scale, torch.float32, x.device)
        act_zero_point = native_args.scalar(op, "act_zero_point", act_zero_point, torch.int32, x.device)
        self._backend.launch(
            op,
            op,
            x,
            grad,
            x,
            scale,
            shift,
            residual,
            act_number,
            act_scale,
            act_zero_point,
            bits,
            grad_x,
            grad_residual if need_residual else None,
            grad_scale if need_params else None,
            grad_shift if need_params else None,
            grad_act_scale,
            layout,
        )
        return results

    def bn_match(self, x: Tensor, running_mean: Tensor, running_var: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See :func:`adadfq.ops.reference.bn_match`; long sums in float64."""
        return self._bn_match("bn_match", x, running_mean, running_var, None, None, 0.0, None)

    def bn_match_forward(
        self,
        x: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See :func:`adadfq.ops.reference.bn_match_forward`; y is equal to it bit for bit."""
        y = torch.empty_like(x)
        return y, *self._bn_match("bn_match_forward", x, running_mean, running_var, weight, bias, eps, y)

    def _bn_match(
        self,
        op: str,
        x: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        y: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        x = native_args.main_tensor(op, "x", x, self._backend.DEVICE_TYPE)
        if x.numel() == 0:
            return reference.bn_match(x, running_mean, running_var)
        channels, device = x.shape[1], x.device
        running_mean = native_args.vector(op, "running_mean", running_mean, channels, torch.float32, device)
        running_var = native_args.vector(op, "running_var", running_var, channels, torch.float32, device)
        if weight is not None:
            weight = native_args.vector(op, "weight", weight, channels, torch.float32, device)
        if bias is not None:
            bias = native_args.vector(op, "bias", bias, channels, torch.float32, device)
        loss = torch.empty((), dtype=torch.float32, device=device)
        mean = torch.empty(channels, dtype=torch.float64, device=device)
        var = torch.empty(channels, dtype=torch.float64, device=device)
        layout = native_args.layout(op, x, 1)
        self._backend.launch(
            op, "bn_match", x, x, running_mean, running_var, weight, bias, eps, y, loss, mean, var, layout
        )
        return loss, mean, var

    def bn_match_backward(
        self, grad_loss: Tensor, x: Tensor, mean: Tensor, var: Tensor, running_mean: Tensor, running_var: Tensor
    ) -> Tensor:
        """See :func:`adadfq.ops.reference.bn_match_backward`; equal to it bit for bit."""
        op = "bn_match_backward"
        return self._bn_match_backward(op, None, grad_loss, x, mean, var, running_mean, running_var, None, 0.0)

    def bn_match_forward_backward(
        self,
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
        """See :func:`adadfq.ops.reference.bn_match_forward_backward`; equal to it bit for bit."""
        op = "bn_match_forward_backward"
        return self._bn_match_backward(op, grad_y, grad_loss, x, mean, var, running_mean, running_var, weight, eps)

    def _bn_match_backward(
        self,
        op: str,
        grad_y: Tensor | None,
        grad_loss: Tensor,
        x: Tensor,
        mean: Tensor,
        var: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        weight: Tensor | None,
        eps: float,
    ) -> Tensor:
        out = torch.empty_like(x)
        if x.numel() == 0:
            return out
        x = native_args.main_tensor(op, "x", x, self._backend.DEVICE_TYPE)
        grad_loss = native_args.scalar(op, "grad_loss", grad_loss, torch.float32, x.device)
        channels, device = x.shape[1], x.device
        mean = native_args.vector(op, "mean", mean, channels, torch.float64, device)
        var = native_args.vector(op, "var", var, channels, torch.float64, device)
        running_mean = native_args.vector(op, "running_mean", running_mean, channels, torch.float32, device)
        running_var = native_args.vector(op, "running_var", running_var, channels, torch.float32, device)
        if weight is not None:
            weight = native_args.vector(op, "weight", weight, channels, torch.float32, device)
        if grad_y is not None:
            grad_y = native_args.like(op, "grad_y", grad_y, x)
        layout = native_args.layout(op, x, 1)
        self._backend.launch(
            op,
            "bn_match_backward",
            x,
            grad_y,
            grad_loss,
            x,
            mean,
            var,
            running_mean,
            running_var,
            weight,
            eps,
            out,
            layout,
        )
        return out

    def batch_norm_act(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, negative_slope: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See :func:`adadfq.ops.reference.batch_norm_act`; long sums in float64."""
        op = "batch_norm_act"
        y = torch.empty_like(x)
        x = native_args.main_tensor(op, "x", x, self._backend.DEVICE_TYPE)
        if x.numel() == 0:
            return reference.batch_norm_act(x, weight, bias, eps, negative_slope)
        x, weight, bias, layout, samples = _sample_parameters(op, x, weight, bias)
        out = y if y.stride() == x.stride() else torch.empty_like(x)
        mean = torch.empty(x.shape[1], dtype=torch.float64, device=x.device)
        var = torch.empty(x.shape[1], dtype=torch.float64, device=x.device)
        self._backend.launch(op, op, x, x, weight, bias, eps, negative_slope, out, mean, var, layout, samples)
        return y if out is y else y.copy_(out), mean, var

    def batch_norm_act_backward(
        self,
        grad_y: Tensor,
        x: Tensor,
        mean: Tensor,
        var: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        negative_slope: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See :func:`adadfq.ops.reference.batch_norm_act_backward`; long sums in float64."""
        op = "batch_norm_act_backward"
        grad_x = torch.empty_like(x)
        x = native_args.main_tensor(op, "x", x, self._backend.DEVICE_TYPE)
        if x.numel() == 0:
            return reference.batch_norm_act_backward(grad_y, x, mean, var, weight, bias, eps, negative_slope)
        x, weight, bias, layout, samples = _sample_parameters(op, x, weight, bias)
        grad_y = native_args.like(op, "grad_y", grad_y, x)
        mean = native_args.vector(op, "mean", mean, x.shape[1], torch.float64, x.device)
        var = native_args.vector(op, "var", var, x.shape[1], torch.float64, x.device)
        out = grad_x if grad_x.stride() == x.stride() else torch.empty_like(x)
        grads = [None if values is None else values.new_empty(values.shape) for values in (weight, bias)]
        self._backend.launch(
            op, op, x, grad_y, x, mean, var, weight, bias, eps, negative_slope, out, *grads, layout, samples
        )
        grad_weight, grad_bias = (x.new_empty(0, dtype=torch.float32) if grad is None else grad for grad in grads)
        return grad_x if out is grad_x else grad_x.copy_(out), grad_weight, grad_bias

    def margin_loss(
        self,
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
        """See :func:`adadfq.ops.reference.margin_loss`; computed in float64.

        A label outside 0..K - 1 makes the losses and its row's gradients NaN: finding it out would wait for the device.
        """
        op = "margin_loss"
        teacher, student = native_args.logits(op, teacher_logits, student_logits, self._backend.DEVICE_TYPE)
        labels = native_args.vector(op, "labels", labels, teacher.shape[0], torch.int64, teacher.device)
        if self._backend.INTERPRETED:
            reference.check_labels(labels, teacher.shape[1])
        # Four tensors, for operators may not return views of one.
        total, margin, disagreement, agreement = (
            torch.empty((), dtype=torch.float32, device=teacher.device) for _ in range(4)
        )
        h_prime = torch.empty(teacher.shape[0], dtype=torch.float32, device=teacher.device)
        grad_teacher, grad_student = torch.empty_like(teacher), torch.empty_like(student)
        results = (total, margin, disagreement, agreement, h_prime, grad_teacher, grad_student)
        self._backend.launch(
            op,
            op,
            teacher,
            teacher,
            student,
            labels,
            *results,
            lambda_l,
            lambda_u,
            alpha_ds,
            alpha_as,
            beta,
            detach_min,
        )
        return results

    def entropy_distillation(
        self, teacher_logits: Tensor, student_logits: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """See :func:`adadfq.ops.reference.entropy_distillation`; computed in float64."""
        op = "entropy_distillation"
        teacher, student = native_args.logits(op, teacher_logits, student_logits, self._backend.DEVICE_TYPE)
        loss = torch.empty((), dtype=torch.float32, device=teacher.device)
        grad_student = torch.empty_like(student)
        self._backend.launch(op, op, teacher, teacher, student, loss, grad_student, temperature)
        return loss, grad_student


def _check_alike(op: str, first: Tensor, x: Tensor) -> None:
    """Refuse tensors of a list that one launch cannot take."""
    if x.dtype != first.dtype or x.device != first.device:
        raise InvalidInputError(
            f"{op}: tensors must have one dtype and device, got {first.dtype} on {first.device} and {x.dtype} on "
            f"{x.device}"
        )


def _sample_parameters(
    op: str, x: Tensor, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None, native_args.Layout, int]:
    """(x, weight, bias, layout, samples), checked; `x` dense, with samples one after the other where they matter."""
    per_sample = reference.is_per_sample(weight, bias)
    if weight is not None:
        weight = native_args.per_sample_vector(op, "weight", weight, x, torch.float32)
    if bias is not None:
        bias = native_args.per_sample_vector(op, "bias", bias, x, torch.float32)
    x, layout, samples = native_args.sample_layout(op, x, per_sample)
    return x, weight, bias, layout, samples
