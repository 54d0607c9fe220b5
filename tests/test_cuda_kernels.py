"""What the property tests leave out of the CUDA kernels: every walk, any alignment, threads in any order.

Needs a process in which an emulator runs them; tests/test_cuda_emulated.py starts one.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from operator_arguments import arguments, assert_right, call
from torch import Tensor

from adadfq.ops import cuda

pytestmark = [
    pytest.mark.skipif(not cuda.INTERPRETED, reason="tests/test_cuda_emulated.py runs these, in an emulator"),
    pytest.mark.usefixtures("poisoned_memory"),
]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
#: Odd everything; rows of whole packs; columns of whole packs; odd planes of many channels; one element; rows longer
#: than a block; more channels than threads; more columns than a grid's step.
SHAPES = [
    (5, 3, 4, 7),
    (3, 4, 2, 16),
    (6, 24, 3, 3),
    (2, 96, 7, 7),
    (1, 1, 1, 1),
    (2, 3, 60, 64),
    (2, 520, 2, 2),
    (3, 1000, 1, 1),
]
LOGITS = [(16, 10), (3, 1000), (1, 2), (40, 100), (129, 3), (2, 2500), (1, 1), (300, 17)]


def _shifted(args: tuple[Any, ...], bytes_: int) -> tuple[Any, ...]:
    """The same arguments, tensors beginning `bytes_` beyond where memory begins."""

    def shift(x: Tensor) -> Tensor:
        memory = torch.empty(x.numel() * x.element_size() + 64, dtype=torch.uint8)
        start = -memory.data_ptr() % 16 + bytes_
        storage = memory[start : start + x.numel() * x.element_size()].view(x.dtype)
        return torch.as_strided(storage, x.shape, x.stride()).copy_(x)

    def move(argument: Any) -> Any:
        if isinstance(argument, Tensor):
            return shift(argument)
        if isinstance(argument, list) and argument and isinstance(argument[0], Tensor):
            return [shift(x) for x in argument]
        return argument

    return tuple(move(argument) for argument in args)


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", list(cuda.KERNELS))
def test_every_walk(op: str, dtype: torch.dtype, channels_last: bool) -> None:
    for shape, logits in zip(SHAPES, LOGITS, strict=True):
        args = arguments(op, shape, dtype, channels_last, logits=logits)
        assert_right(op, call(cuda.KERNELS[op], op, args), args)


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("op", list(cuda.KERNELS))
def test_any_alignment(op: str, channels_last: bool) -> None:
    """Also where tensors of one call differ in it."""
    for i, shape in enumerate(SHAPES):
        dtype = DTYPES[i % 3]
        args = arguments(op, shape, dtype, channels_last, logits=LOGITS[i])
        for steps in (1, 3):
            moved = _shifted(args, 8 * steps)
            assert_right(op, call(cuda.KERNELS[op], op, moved), args)
        first, *others = args
        mixed = (*_shifted((first,), 8), *others)
        assert_right(op, call(cuda.KERNELS[op], op, mixed), args)


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("op", list(cuda.KERNELS))
def test_threads_in_either_order(op: str, channels_last: bool) -> None:
    """The emulator turns the order of blocks and threads round from launch to launch."""
    for shape, logits in zip(SHAPES, LOGITS, strict=True):
        args = arguments(op, shape, torch.float32, channels_last, logits=logits)
        # An odd number of calls of two launches, or of one, has both orders for each kernel.
        results = [call(cuda.KERNELS[op], op, args)]
        call(cuda.KERNELS["fake_quantize"], "fake_quantize", arguments("fake_quantize", (1, 1, 1, 1), torch.float32))
        results += [call(cuda.KERNELS[op], op, args) for _ in range(2)]
        for other in results[1:]:
            for got, want in zip(other, results[0], strict=True):
                torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
