"""Triton's interpreter, made as exact as the hardware where it is not.

It truncates float32 to bfloat16, loses subnormal bfloat16, and rounds a fused multiply-add twice;
tests/test_triton_compiled.py looks for the instructions that do these right.
"""

from __future__ import annotations

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def _to_bfloat16(values: np.ndarray) -> np.ndarray:
    """float32 to the bits of bfloat16, to nearest even."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = ((bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def _fused_multiply_add(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """x y + z of float32, rounded once: the product is exact in float64, and the sum is rounded to odd before."""
    with np.errstate(all="ignore"):
        product, addend = x.astype(np.float64) * y.astype(np.float64), z.astype(np.float64)
        total = product + addend
        part = total - product
        error = (product - (total - part)) + (addend - part)
        bits = np.ascontiguousarray(total).view(np.int64)
        # An even last digit with something left over goes one towards it.
        inexact = np.isfinite(total) & (error != 0) & (bits & 1 == 0)
        away = (error > 0) == (total > 0)
        odd = np.where(inexact, np.where(away, bits + 1, bits - 1), bits).view(np.float64)
        return odd.astype(np.float32)


def install() -> None:
    """Mend the interpreter of this process."""
    builder = interpreter.InterpreterBuilder
    cast = builder.cast_impl

    def cast_impl(self, src, dst_type):  # type: ignore[no-untyped-def]
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            return interpreter.TensorHandle(_to_bfloat16(src.data), tl.bfloat16)
        if src.dtype.scalar == tl.bfloat16 and dst_type.scalar == tl.float32:
            bits = src.data.view(np.uint16).astype(np.uint32) << 16
            return interpreter.TensorHandle(bits.view(np.float32), tl.float32)
        return cast(self, src, dst_type)

    def create_fma(self, x, y, z):  # type: ignore[no-untyped-def]
        assert x.dtype.scalar == tl.float32
        return interpreter.TensorHandle(_fused_multiply_add(x.data, y.data, z.data), tl.float32)

    patch = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor, scope):  # type: ignore[no-untyped-def]
        patch(tensor, scope)
        # Triton 3.6 makes an int of an array with a dimension, which NumPy 2.4 refuses.
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    builder.cast_impl, builder.create_fma = cast_impl, create_fma
    interpreter._patch_lang_tensor = patch_lang_tensor
