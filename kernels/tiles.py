"""Walking a dense tensor channel by channel, for kernels that sum over a channel or compute its parameters in float64.

Element i in memory order belongs to channel (i // inner) % channels. A program owns one block of channels and a chunk
of their positions, which it takes tile by tile; a tile is [R, K], and several tensors may be read at its offsets.

Channels in rows (COLUMNS false): the block is one channel, a scalar, and its outer * inner positions are counted row
after row. K neighbouring positions lie in one row: 16 bytes of it where rows are whole numbers of 16 bytes, else 8, 4
or one element. Each group of K finds its row by a multiplication (the host knows the divisor), and sums are over both
dimensions.

Channels in columns (COLUMNS true, inner == 1): the block is K neighbouring channels, a vector; a position is a row of
the tensor, and only dimension 0 is summed over.

A kernel reads
    block, start, count = chunk(...)          # its block of channels, its first position and how many there are
    channel = channel_numbers(block, ...)     # for loads of parameters; :func:`per_channel` gives a tile's shape
    base, lead = chunk_base(block, start, ...)
    for t in range(0, tl.cdiv(count, STEP)):  # STEP = positions(R, K, COLUMNS)
        offset, mask = tile(t, block, lead, count, ...)
        ... tl.load(x_ptr + base + offset, mask=mask, other=0.0) ...
and a lane of the tile sees at most MOST_TILES elements, few enough for float32 sums.
"""

from __future__ import annotations

from math import gcd
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from adadfq.kernels import configs
from adadfq.ops.native_args import Layout

#: The largest offset that 32 bits hold.
LAST_INT32 = 2**31 - 1
#: Programs aimed at, on any device: sums must not depend on it.
PROGRAMS = 2048
#: Tiles of a program: enough to pay for its start, and few enough for float32 sums of a lane.
FEWEST_TILES, MOST_TILES = 4, 256
#: Neighbouring channels of a tile.
MOST_COLUMNS = 128
#: Rows longer than this are told apart by comparison with it, for a chunk is shorter.
_FAR = tl.constexpr(2**30)


@triton.jit
def positions(R: tl.constexpr, K: tl.constexpr, COLUMNS: tl.constexpr):
    """Positions of a tile."""
    if COLUMNS:
        return R
    else:
        return R * K


@triton.jit
def chunk(
    blocks,
    length: tl.int64,
    tiles,
    R: tl.constexpr,
    K: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """(block of channels, first position, number of positions) of this program."""
    program = tl.program_id(0)
    split = program // blocks
    block = program - split * blocks
    if WIDE:
        split = split.to(tl.int64)
    size = tiles * positions(R, K, COLUMNS)
    start = split * size
    return block, start, tl.minimum(length - start, size).to(tl.int32)


@triton.jit
def channel_numbers(block, channels, K: tl.constexpr, COLUMNS: tl.constexpr):
    """The channel, or K of them; those past the last repeat it, so that their parameters may be loaded."""
    if COLUMNS:
        return tl.minimum(block * K + tl.arange(0, K), channels - 1)
    else:
        return block


@triton.jit
def chunk_base(
    block, start, channels, inner, K: tl.constexpr, VECTOR: tl.constexpr, COLUMNS: tl.constexpr, WIDE: tl.constexpr
):
    """(offset of the chunk's first element, in 64 bits where 32 could overflow; places before it in its row)."""
    if COLUMNS:
        channels = (channels // VECTOR) * VECTOR  # tells the compiler what divides it
        return start * channels + block * K, 0
    else:
        inner = (inner // VECTOR) * VECTOR
        row = start // inner
        place = start - row * inner
        lead = tl.minimum(inner, _FAR) - tl.minimum(inner - place, _FAR)
        return (row * channels + block) * inner + place, lead.to(tl.int32)


@triton.jit
def tile(
    t,
    block,
    lead,
    count,
    channels,
    inner,
    multiplier: tl.int64,
    shift,
    R: tl.constexpr,
    K: tl.constexpr,
    VECTOR: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """(offsets after the chunk's base, which of them exist) of tile `t` of the chunk, both [R, K]."""
    within = tl.arange(0, K)[None, :]
    if COLUMNS:
        channels = (channels // VECTOR) * VECTOR
        row = t * R + tl.arange(0, R)[:, None]
        mask = (row < count) & (block * K + within < channels)
        if WIDE:
            row = row.to(tl.int64)
        return row * channels + within, mask
    else:
        inner = (inner // VECTOR) * VECTOR
        first = (t * R + tl.arange(0, R)[:, None]) * K
        rows = tl.umulhi((lead + first).to(tl.uint32), multiplier.to(tl.uint32)) >> shift
        rows = rows.to(tl.int32)
        if WIDE:
            rows = rows.to(tl.int64)
        # `first` positions on, and the other channels' rows jumped over.
        offset = rows * (channels - 1) * inner + first
        return offset + within, tl.broadcast_to(first < count, [R, K])


@triton.jit
def lane_counts(count, R: tl.constexpr, K: tl.constexpr, COLUMNS: tl.constexpr):
    """How many elements each lane of the tile reads in a chunk of `count` positions: [R, 1]."""
    row = tl.arange(0, R)[:, None]
    if COLUMNS:
        return (count - row + (R - 1)) // R
    else:
        return (count - row * K + (R * K - 1)) // (R * K)


@triton.jit
def per_channel(v, COLUMNS: tl.constexpr):
    """A value of each channel (a scalar or [K]) in a shape that broadcasts over a tile."""
    if COLUMNS:
        return v[None, :]
    else:
        return v


@triton.jit
def channel_sum(v, COLUMNS: tl.constexpr):
    """Sum of a tile for each channel: a scalar or [K]."""
    if COLUMNS:
        return tl.sum(v, 0)
    else:
        return tl.sum(tl.sum(v, 1), 0)


@triton.jit
def store_per_channel(ptr, v, block, channels, K: tl.constexpr, COLUMNS: tl.constexpr):
    """Store a value of each channel (a scalar or [K]) to `ptr` [channels]."""
    if COLUMNS:
        channel = block * K + tl.arange(0, K)
        tl.store(ptr + channel, v, mask=channel < channels)
    else:
        tl.store(ptr + block, v)


class Plan(NamedTuple):
    """How to launch a kernel over channel tiles.

    Attributes:
        grid: one dimension; program = split * blocks + block.
        splits: chunks of a block of channels.
        size: positions of every chunk but the last.
        length: positions of a channel.
        walk: blocks, channels, inner, length, tiles, multiplier, shift, in the order helpers take them; annotate
            `length` and `multiplier` as ``tl.int64`` in the kernel.
        options: constants R, K, VECTOR, COLUMNS and WIDE, and launch options.
    """

    grid: tuple[int]
    splits: int
    size: int
    length: int
    walk: tuple[int, ...]
    options: dict[str, Any]


def _division(divisor: int) -> tuple[int, int]:
    """(multiplier, shift): p // divisor == (p * multiplier >> 32) >> shift for 0 <= p < 2^31; divisor >= 2."""
    bits = (divisor - 1).bit_length()
    return (1 << (31 + bits)) // divisor + 1, bits - 1


def plan(x: Tensor, layout: Layout, samples: int = 1) -> Plan:
    """The launch for dense `x`, not empty, and tensors like it.

    With `samples` it is that of one of so many equal blocks of `x`, whose layout is given; the others' programs are the
    caller's to launch.
    """
    outer, channels, inner = layout
    n = outer * channels * inner
    config = configs.choose("channel_tiles", x.dtype, x.numel())
    vector = 16 // x.element_size()
    threads = config.num_warps * 32
    block = threads * config.vectors * vector
    multiplier = shift = 0
    columns = inner == 1 and channels > 1
    if columns:
        vector = gcd(vector, channels)
        k = min(MOST_COLUMNS, triton.next_power_of_2(channels))
        length, blocks = outer, triton.cdiv(channels, k)
    else:
        length, blocks = outer * inner, channels
        if channels == 1:
            inner = 2**20 if length % vector == 0 else length  # rows of any length do
        vector = k = gcd(vector, inner)
        if channels > 1:
            multiplier, shift = _division(min(inner, _FAR.value))
    # Short channels have smaller tiles, though no thread is without a vector.
    groups = length if columns else triton.cdiv(length, k)
    rows = min(block // k, max(threads * vector // k, triton.next_power_of_2(groups)))
    step = rows if columns else rows * k
    tiles = triton.cdiv(length, step)
    splits = max(min(triton.cdiv(PROGRAMS, blocks * samples), tiles // FEWEST_TILES), triton.cdiv(tiles, MOST_TILES), 1)
    tiles = triton.cdiv(tiles, splits)
    splits = triton.cdiv(length, tiles * step)
    options = {
        "R": rows,
        "K": k,
        "VECTOR": vector,
        "COLUMNS": columns,
        # The last tile's places may pass the end by less than a tile of every channel.
        "WIDE": n + step * (channels + 1) > LAST_INT32,
        "num_warps": config.num_warps,
        "enable_fp_fusion": False,  # contraction would change the rounding
    }
    walk = (blocks, channels, inner, length, tiles, multiplier, shift)
    return Plan((blocks * splits,), splits, tiles * step, length, walk, options)
