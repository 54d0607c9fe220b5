"""Launchers that hand addresses to an extension module: what the backends in C++ and CUDA have in common.

Arguments are those of :mod:`adadfq.kernels`' functions, behind the operator's name; what the module's functions take is
in csrc/bind_cpu.cpp and csrc/bind_cuda.cpp, which differ in memory for partial sums and in what follows the layout.
"""

from __future__ import annotations

from array import array
from typing import Any, Protocol

import torch
from torch import Tensor

from adadfq.ops.native_args import Layout


class Module(Protocol):
    """How a backend's extension module is called; looked up in every call."""

    def call(self, op: str, function: str, x: Tensor, *arguments: Any) -> None:
        """Run `function` of the extension module on addresses and numbers, for main tensor `x`.

        Raises:
            BackendError: it failed; `op` is named.
        """

    def channel_scratch(self, x: Tensor, channels: int) -> tuple[Tensor | None, ...]:
        """What the function takes for sums over so many channels; 0: it sums nothing."""

    def range_scratch(self, x: Tensor, layouts: list[Layout]) -> tuple[Tensor | None, ...]:
        """What dynamic_fake_quantize and learned_fake_quantize_backward take for tensors of these layouts."""


def address(tensor: Tensor | None) -> int:
    """Where the elements of `tensor` are; 0 where there is none."""
    return 0 if tensor is None else tensor.data_ptr()


class Launchers:
    """Every launcher but those of the losses on logits, as methods."""

    def __init__(self, backend: Module) -> None:
        self._backend = backend

    def fake_quantize(
        self, op: str, x: Tensor, scale: Tensor, zero_point: Tensor, out: Tensor, channels: int, inner: int, bits: int
    ) -> None:
        layout = Layout(x.numel() // (channels * inner), channels, inner)
        pointers = (x.data_ptr(), scale.data_ptr(), zero_point.data_ptr(), out.data_ptr())
        self._backend.call(op, "fake_quantize", x, *pointers, *layout, bits)

    def fake_quantize_backward(
        self,
        op: str,
        grad: Tensor,
        x: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        out: Tensor,
        channels: int,
        inner: int,
        bits: int,
    ) -> None:
        layout = Layout(x.numel() // (channels * inner), channels, inner)
        pointers = (grad.data_ptr(), x.data_ptr(), scale.data_ptr(), zero_point.data_ptr(), out.data_ptr())
        self._backend.call(op, "fake_quantize_backward", x, *pointers, *layout, bits)

    def dynamic_fake_quantize(self, op: str, calls: list[tuple[Tensor, Tensor, Tensor, Tensor, Layout, int]]) -> None:
        structs = array("q")
        for x, out, scale, zero_point, layout, bits in calls:
            # The fields of DynamicTensor in csrc/common/dynamic_tensor.h.
            structs.extend((x.data_ptr(), out.data_ptr(), scale.data_ptr(), zero_point.data_ptr(), *layout, bits))
        first = calls[0][0]
        scratch = self._backend.range_scratch(first, [call[4] for call in calls])
        addresses = (structs.buffer_info()[0], len(calls), *map(address, scratch))
        self._backend.call(op, "dynamic_fake_quantize", first, *addresses)

    def foreach_fake_quantize(self, op: str, calls: list[tuple[Tensor, Tensor, Tensor, Tensor, Layout, int]]) -> None:
        structs = array("q")
        for x, out, scale, zero_point, layout, bits in calls:
            # The fields of DynamicTensor in csrc/common/dynamic_tensor.h.
            structs.extend((x.data_ptr(), out.data_ptr(), scale.data_ptr(), zero_point.data_ptr(), *layout, bits))
        self._backend.call(op, "foreach_fake_quantize", calls[0][0], structs.buffer_info()[0], len(calls))

    def learned_fake_quantize_backward(
        self, op: str, calls: list[tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Layout, int]]
    ) -> None:
        structs = array("q")
        for *tensors, layout, bits in calls:
            # The fields of LearnedTensor in csrc/common/learned_tensor.h.
            structs.extend((*(tensor.data_ptr() for tensor in tensors), *layout, bits))
        first = calls[0][1]
        scratch = self._backend.range_scratch(first, [call[-2] for call in calls])
        addresses = (structs.buffer_info()[0], len(calls), *map(address, scratch))
        self._backend.call(op, "learned_fake_quantize_backward", first, *addresses)

    def observe_fake_quantize(
        self,
        op: str,
        x: Tensor,
        out: Tensor,
        running_min: Tensor,
        running_max: Tensor,
        num_batches: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        bits: int,
        momentum: float,
    ) -> None:
        scratch = self._backend.channel_scratch(x, 1)
        self._backend.call(
            op,
            "observe_fake_quantize",
            x,
            x.data_ptr(),
            out.data_ptr(),
            x.numel(),
            running_min.data_ptr(),
            running_max.data_ptr(),
            num_batches.data_ptr(),
            scale.data_ptr(),
            zero_point.data_ptr(),
            *map(address, scratch),
            bits,
            momentum,
        )

    def affine_act_fake_quantize(
        self,
        op: str,
        x: Tensor,
        scale: Tensor,
        shift: Tensor,
        residual: Tensor | None,
        act: int,
        act_scale: Tensor | None,
        act_zero_point: Tensor | None,
        out: Tensor,
        channels: int,
        inner: int,
        bits: int,
    ) -> None:
        self._backend.call(
            op,
            "affine_act_quantize" if out.dtype is torch.uint8 else "affine_act_fake_quantize",
            x,
            x.data_ptr(),
            scale.data_ptr(),
            shift.data_ptr(),
            address(residual),
            act,
            address(act_scale),
            address(act_zero_point),
            bits,
            out.data_ptr(),
            x.numel() // (channels * inner),
            channels,
            inner,
        )

    def affine_act_fake_quantize_backward(
        self,
        op: str,
        grad: Tensor,
        x: Tensor,
        scale: Tensor,
        shift: Tensor,
        residual: Tensor | None,
        act: int,
        grad_x: Tensor,
        grad_residual: Tensor | None,
        grad_scale: Tensor | None,
        grad_shift: Tensor | None,
        layout: Layout,
    ) -> None:
        # Nothing is summed where the parameters have no gradient.
        scratch = self._backend.channel_scratch(x, 0 if grad_scale is None else layout.channels)
        self._backend.call(
            op,
            "affine_act_fake_quantize_backward",
            x,
            grad.data_ptr(),
            x.data_ptr(),
            scale.data_ptr(),
            shift.data_ptr(),
            address(residual),
            act,
            grad_x.data_ptr(),
            address(grad_residual),
            address(grad_scale),
            address(grad_shift),
            *map(address, scratch),
            *layout,
        )

    def affine_act_learned_fake_quantize_backward(
        self,
        op: str,
        grad: Tensor,
        x: Tensor,
        scale: Tensor,
        shift: Tensor,
        residual: Tensor | None,
        act: int,
        act_scale: Tensor,
        act_zero_point: Tensor,
        bits: int,
        grad_x: Tensor,
        grad_residual: Tensor | None,
        grad_scale: Tensor | None,
        grad_shift: Tensor | None,
        grad_act_scale: Tensor,
        layout: Layout,
    ) -> None:
        # Of channels, and of blocks, which are fewer.
        scratch = [part for _ in range(2) for part in self._backend.channel_scratch(x, layout.channels)]
        self._backend.call(
            op,
            "affine_act_learned_fake_quantize_backward",
            x,
            grad.data_ptr(),
            x.data_ptr(),
            scale.data_ptr(),
            shift.data_ptr(),
            address(residual),
            act,
            act_scale.data_ptr(),
            act_zero_point.data_ptr(),
            bits,
            grad_x.data_ptr(),
            address(grad_residual),
            address(grad_scale),
            address(grad_shift),
            grad_act_scale.data_ptr(),
            *map(address, scratch),
            *layout,
        )

    def quantize_pack(
        self, op: str, x: Tensor, scale: Tensor, zero_point: Tensor, packed: Tensor, layout: Layout, bits: int
    ) -> None:
        pointers = (x.data_ptr(), scale.data_ptr(), zero_point.data_ptr(), packed.data_ptr())
        self._backend.call(op, "quantize_pack", x, *pointers, *layout, bits)

    def unpack_dequantize(
        self, op: str, packed: Tensor, scale: Tensor, zero_point: Tensor, out: Tensor, layout: Layout, bits: int
    ) -> None:
        pointers = (packed.data_ptr(), scale.data_ptr(), zero_point.data_ptr(), out.data_ptr())
        self._backend.call(op, "unpack_dequantize", out, *pointers, *layout, bits)

    def bn_match(
        self,
        op: str,
        x: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        y: Tensor | None,
        loss: Tensor,
        mean: Tensor,
        var: Tensor,
        layout: Layout,
    ) -> None:
        scratch = self._backend.channel_scratch(x, layout.channels)
        self._backend.call(
            op,
            "bn_match",
            x,
            x.data_ptr(),
            running_mean.data_ptr(),
            running_var.data_ptr(),
            address(weight),
            address(bias),
            eps,
            address(y),
            loss.data_ptr(),
            mean.data_ptr(),
            var.data_ptr(),
            *map(address, scratch),
            *layout,
        )

    def bn_match_backward(
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
        out: Tensor,
        layout: Layout,
    ) -> None:
        self._backend.call(
            op,
            "bn_match_backward",
            x,
            address(grad_y),
            grad_loss.data_ptr(),
            x.data_ptr(),
            mean.data_ptr(),
            var.data_ptr(),
            running_mean.data_ptr(),
            running_var.data_ptr(),
            address(weight),
            eps,
            out.data_ptr(),
            *layout,
        )

    def batch_norm_act(
        self,
        op: str,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        negative_slope: float,
        y: Tensor,
        mean: Tensor,
        var: Tensor,
        layout: Layout,
        samples: int,
    ) -> None:
        self._backend.call(
            op,
            "batch_norm_act",
            x,
            x.data_ptr(),
            address(weight),
            address(bias),
            eps,
            negative_slope,
            y.data_ptr(),
            mean.data_ptr(),
            var.data_ptr(),
            samples,
            *layout,
        )

    def batch_norm_act_backward(
        self,
        op: str,
        grad_y: Tensor,
        x: Tensor,
        mean: Tensor,
        var: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        negative_slope: float,
        grad_x: Tensor,
        grad_weight: Tensor | None,
        grad_bias: Tensor | None,
        layout: Layout,
        samples: int,
    ) -> None:
        self._backend.call(
            op,
            "batch_norm_act_backward",
            x,
            grad_y.data_ptr(),
            x.data_ptr(),
            mean.data_ptr(),
            var.data_ptr(),
            address(weight),
            address(bias),
            eps,
            negative_slope,
            grad_x.data_ptr(),
            address(grad_weight),
            address(grad_bias),
            samples,
            *layout,
        )
