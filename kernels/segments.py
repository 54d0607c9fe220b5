"""Walking a dense tensor element by element, in memory order, with parameters per channel.

Element i in memory order belongs to channel (i // inner) % channels. The tensor is cut into a few segments, each a
whole number of times `channels * inner` long, and a program takes the same place in every segment: one 16-byte vector
a thread and segment, all of them of the same channels. So a thread has several loads in flight, and finds its channels
and their parameters once for all of them.

Where 16 bytes never span two channels (GROUP > 1), a thread finds one channel; where channels are innermost, GROUP
neighbouring ones. Otherwise (GROUP == 1) every element finds its own.
"""

from __future__ import annotations

from math import lcm
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from adadfq.kernels import configs

#: The largest offset that 32 bits hold.
LAST_INT32 = 2**31 - 1
#: How parameters lie: one for the tensor, one a channel with rows of `inner`, or channels innermost.
PER_TENSOR, PER_ROW, PER_COLUMN = 0, 1, 2
_PER_TENSOR, _PER_ROW, _PER_COLUMN = tl.constexpr(PER_TENSOR), tl.constexpr(PER_ROW), tl.constexpr(PER_COLUMN)


@triton.jit
def first_element(WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """Place of this program's first element in a segment, in 64 bits where 32 could overflow."""
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    return program * BLOCK


@triton.jit
def channels_at(start, channels, inner, PARAMS: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """Channel numbers for :func:`load_params`: one a group of elements, or all of a group's."""
    if PARAMS == _PER_TENSOR:
        return 0
    elif PARAMS == _PER_COLUMN:
        first = (start % channels).to(tl.int32) + tl.arange(0, BLOCK // GROUP) * GROUP
        if GROUP == 1:
            return first % channels
        else:
            first = tl.multiple_of(first % channels, [GROUP])
            return first[:, None] + tl.arange(0, GROUP)[None, :]
    else:
        row = start // inner
        # In the width of `start`: a row may be longer than 32 bits count.
        place = start - row * inner + tl.arange(0, BLOCK // GROUP) * GROUP
        return (row % channels + place // inner) % channels


@triton.jit
def load_params(ptr, channel, PARAMS: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """Parameters of the channels of :func:`channels_at`; for :func:`to_tile`, once all has been derived from them."""
    v = tl.load(ptr + channel)
    if PARAMS == _PER_COLUMN:
        v = tl.reshape(v, [BLOCK])[None, :]
    return v


@triton.jit
def to_tile(v, PARAMS: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """`v`, of :func:`load_params` or derived from that, so that it broadcasts over a tile of :func:`elements`."""
    if PARAMS == _PER_ROW:
        if GROUP > 1:
            v = tl.reshape(tl.broadcast_to(v[:, None], [BLOCK // GROUP, GROUP]), [BLOCK])
        v = v[None, :]
    return v


@triton.jit
def elements(start, n, segment, SEGMENTS: tl.constexpr, BLOCK: tl.constexpr):
    """(offsets [SEGMENTS, BLOCK] of the program's elements, which of them exist, whether all do).

    One tile of all segments, rather than a loop over them: a store may alias the next load, which would wait for it.
    """
    local = tl.arange(0, BLOCK)[None, :]
    before = tl.arange(0, SEGMENTS)[:, None] * segment
    left = tl.minimum(tl.minimum(segment, n - before) - start, BLOCK)
    whole = start + BLOCK <= tl.minimum(segment, n - (SEGMENTS - 1) * segment)
    return before + start + local, local < tl.maximum(left, 0).to(tl.int32), whole


@triton.jit
def load(ptr, offsets, mask, whole):
    """Elements, 0 where there are none; without the mask, which may keep from 16-byte accesses, as far as possible."""
    if whole:
        v = tl.load(ptr + offsets)
    else:
        v = tl.load(ptr + offsets, mask=mask, other=0.0)
    return v


@triton.jit
def store(ptr, offsets, v, mask, whole):
    """Store elements in the dtype of `ptr`; see :func:`load`."""
    v = v.to(ptr.dtype.element_ty)
    if whole:
        tl.store(ptr + offsets, v)
    else:
        tl.store(ptr + offsets, v, mask=mask)


def plan(x: Tensor, channels: int, inner: int) -> tuple[tuple[int], int, dict[str, Any]]:
    """(grid, elements of a segment, constants and launch options) for dense `x`, not empty."""
    n = x.numel()
    config = configs.choose("elementwise", x.dtype, n)
    vector = 16 // x.element_size()
    block = config.num_warps * 32 * vector
    if channels == 1:
        params, group, period = PER_TENSOR, 1, 16
    else:
        params = PER_COLUMN if inner == 1 else PER_ROW
        group = vector if (channels if inner == 1 else inner) % vector == 0 else 1
        period = lcm(channels * inner, 16)  # segments begin where 16-byte accesses may
    periods = triton.cdiv(n, period)
    # As many segments as there are vectors, but no empty ones.
    segments = min(config.vectors, 1 << (periods.bit_length() - 1))
    segment = triton.cdiv(periods, segments) * period
    options = {
        "PARAMS": params,
        "GROUP": group,
        "SEGMENTS": segments,
        # The last program's places may pass the segment's end by less than a block.
        "WIDE": segment + block > LAST_INT32,
        "BLOCK": block,
        "num_warps": config.num_warps,
        "enable_fp_fusion": False,  # contraction would change the rounding
    }
    return (triton.cdiv(segment, block),), segment, options
