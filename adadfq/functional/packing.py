"""Quantised tensors as k-bit codes packed into bytes, and back: what packed checkpoints hold."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from adadfq import checks
from adadfq.errors import InvalidInputError
from adadfq.ops import reference
from adadfq.ops.run import run
from adadfq.ops.schema import compute_dtype

__all__ = ["quantize_pack", "unpack_dequantize"]


def quantize_pack(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int, axis: int | None = None) -> Tensor:
    """The codes of ``fake_quantize(x, scale, zero_point, bits, axis)``, `bits` bits each, without gaps.

    code = clamp(round(x / scale) + zero_point, 0, 2^bits - 1), rounding half to even. The code of element i, counted in
    row-major order, is bits [i * bits, (i + 1) * bits) of a little-endian bit stream: bit j of the stream is bit j % 8
    of byte j // 8. Unused bits of the last byte are 0. A tensor that is not contiguous, as in channels_last, is copied
    first: layouts make no difference. Codes have no gradient. NaN, which an integer cannot hold, has code 0.

    Args:
        x: floating tensor, any shape.
        scale: step size; one element when `axis` is None, else ``[x.shape[axis]]``. Must be positive and finite; it is
            not looked at.
        zero_point: code of 0, shaped like `scale`, an integer tensor. Must be in 0..2^bits - 1; it is not looked at
            either.
        bits: width, 2..8.
        axis: channel dimension, or None for one scale for the whole tensor.

    Returns:
        uint8 ``[ceil(x.numel() * bits / 8)]``.

    Raises:
        InvalidInputError: `bits`, `axis`, a shape, a dtype or a device does not fit.
    """
    checks.check_floating("x", x)
    checks.check_bits("bits", bits)
    if axis is not None:
        axis = checks.check_axis(axis, x)
    scale, zero_point = checks.check_quantizer(scale, zero_point, axis, x, compute_dtype(x.dtype))
    with torch.no_grad():
        return run("quantize_pack", x, scale, zero_point, bits, axis)


def unpack_dequantize(
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bits: int,
    shape: Sequence[int],
    axis: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The tensor of `shape` whose codes :func:`quantize_pack` packed: (code - zero_point) * scale.

    With the scale and dtype that packed `x` this is ``fake_quantize(x, scale, zero_point, bits, axis)``, bit for bit,
    but for NaN. Arithmetic is in float32 (float64 for float64). The result has no gradient.

    Args:
        packed: uint8 ``[ceil(n * bits / 8)]`` for the n elements of `shape`; unused bits of the last byte are ignored.
        scale: step size; one element when `axis` is None, else ``[shape[axis]]``.
        zero_point: code of 0, shaped like `scale`, an integer tensor.
        bits: width, 2..8.
        shape: of the result, a sequence of integers (NumPy's too).
        axis: channel dimension of the result, or None for one scale for the whole tensor.
        dtype: of the result, floating.

    Returns:
        Contiguous tensor of `shape` and `dtype`.

    Raises:
        InvalidInputError: `packed` is not uint8 or has not as many bytes as the codes of `shape` take; or `bits`,
            `shape`, `axis`, `dtype`, a shape or a device does not fit.
    """
    if not isinstance(packed, Tensor):
        raise InvalidInputError(f"packed must be a tensor, got {type(packed).__name__}")
    checks.check_bits("bits", bits)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise InvalidInputError(f"dtype must be a floating-point dtype, got {dtype!r}")
    shape = _sizes(shape)
    reference.check_packed(packed, shape, bits)
    for name, values in (("scale", scale), ("zero_point", zero_point)):
        if isinstance(values, Tensor) and values.device != packed.device:
            raise InvalidInputError(f"{name} must be on {packed.device} like packed, got {values.device}")
    # Has the shape and device of the result, and no memory.
    result = packed.new_empty(()).expand(shape)
    if axis is not None:
        axis = checks.check_axis(axis, result)
    scale, zero_point = checks.check_quantizer(scale, zero_point, axis, result, compute_dtype(dtype))
    with torch.no_grad():
        return run("unpack_dequantize", packed, scale, zero_point, bits, shape, axis, dtype)


def _sizes(shape: Any) -> list[int]:
    """The sizes that `shape` holds, as Python's integers."""
    try:
        # Text is a sequence, of which the empty one would pass, and True is an integer.
        if not isinstance(shape, Sequence) or isinstance(shape, (str, bytes)):
            raise TypeError
        if any(isinstance(size, bool) for size in shape):
            raise TypeError
        # What a compiler traces are integers that must not become constants.
        sizes = [size if isinstance(size, (int, torch.SymInt)) else operator.index(size) for size in shape]
    except TypeError:
        sizes = [-1]
    if any(size < 0 for size in sizes):
        raise InvalidInputError(f"shape must be the sizes of a tensor, a sequence of integers from 0, got {shape!r}")
    return sizes
