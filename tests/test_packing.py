"""Packing to k-bit codes and back, against Python's integers: every code, every tie, every layout, every size."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from math import prod
from types import ModuleType

import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from native import NATIVE
from test_properties import (
    DTYPES,
    INTEGERS,
    KINDS,
    SEEDS,
    along,
    assert_same_bits,
    examples,
    layouts,
    make,
    make_steps,
    shapes,
    threads,
)
from torch import Tensor

import adadfq
from adadfq import functional as F
from adadfq.ops import cpu, dispatch, reference
from adadfq.ops.schema import compute_dtype

pytestmark = pytest.mark.usefixtures("poisoned_memory")

WIDTHS = range(2, 9)
#: Triton has no kernels for these.
PACKING = cpu if NATIVE.NAME == "triton" else NATIVE
MODULES = (reference, PACKING)
NATIVE_DTYPES = [torch.float32, torch.bfloat16, torch.float16]
#: Exact ties; steps that are no binary fractions; with float16 ties that are subnormal.
SCALES = [0.25, 0.1, 113.7, 3e-6]


each_module = pytest.mark.parametrize("module", MODULES, ids=lambda module: module.NAME)
each_module_and_dtype = pytest.mark.parametrize(
    "module,dtype",
    [(m, d) for m in MODULES for d in (*NATIVE_DTYPES, torch.float64) if m.DTYPES is None or d in m.DTYPES],
    ids=lambda value: value.NAME if isinstance(value, ModuleType) else str(value),
)


def _random(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _quantizer(channels: int, bits: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    scale = torch.rand(channels, generator=_random(seed)) / 4 + 0.05
    return scale, torch.randint(0, 2**bits, (channels,), generator=_random(seed + 1), dtype=torch.int32)


def _as_bytes(packed: Tensor) -> bytes:
    assert packed.dtype == torch.uint8 and packed.dim() == 1 and packed.is_contiguous()
    return bytes(packed.tolist())


def _row_major(x: Tensor) -> Tensor:
    """A copy with the strides of a new tensor, which those of a contiguous one need not be."""
    return x.clone(memory_format=torch.contiguous_format)


def _boundaries(bits: int, scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """[3, n] numbers around the ties between any two codes, whatever the zero point: the nearest number of the dtype,
    one below and one above; and the steps each is rounded to."""
    ties = ((torch.arange(-(2**bits) - 1, 2**bits + 1) + 0.5).double() * scale.double()).to(dtype)
    values = torch.stack([(ties.view(INTEGERS[dtype]) + step).view(dtype) for step in (-1, 0, 1)])
    steps = [oracle.whole_steps(x, float(scale), dtype == torch.float64) for x in values.flatten().tolist()]
    return values, torch.tensor(steps).view(values.shape)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "last axis"])
@each_module_and_dtype
@pytest.mark.parametrize("bits", WIDTHS)
def test_every_code_of_every_zero_point_at_its_ties(
    bits: int, module: ModuleType, dtype: torch.dtype, layout: str
) -> None:
    zero_point = torch.arange(2**bits, dtype=torch.int32)
    for number in SCALES:
        scale = torch.tensor(number, dtype=compute_dtype(dtype))
        values, steps = _boundaries(bits, scale, dtype)
        # [3, ties, zero points]: neighbours in memory are of different channels; or [3, zero points, ties / 2, 2].
        axis = 2 if layout == "last axis" else 1
        x = values[:, :, None].expand(-1, -1, 2**bits)
        codes = (steps[:, :, None] + zero_point).clamp(0, 2**bits - 1)
        assert set(codes.unique().tolist()) == set(range(2**bits))
        want = ((codes - zero_point).double() * scale.double()).to(scale.dtype).to(dtype)
        if axis == 1:
            x, codes, want = (t.transpose(1, 2).unflatten(2, (-1, 2)) for t in (x, codes, want))
        memory = torch.channels_last if layout == "channels_last" else torch.contiguous_format
        x, want = (t.contiguous(memory_format=memory) for t in (x, want))
        arguments = (scale.repeat(2**bits), zero_point, bits)
        stream = oracle.pack(codes.flatten().tolist(), bits)
        kernels = module.KERNELS
        assert_same_bits(kernels["fake_quantize"](x, *arguments, axis), want)
        packed = kernels["quantize_pack"](x, *arguments, axis)
        assert _as_bytes(packed) == stream
        got = kernels["unpack_dequantize"](packed, *arguments, list(x.shape), axis, dtype)
        assert_same_bits(got, _row_major(want))


@each_module_and_dtype
@pytest.mark.parametrize("bits", WIDTHS)
def test_every_code_of_every_zero_point_per_tensor(bits: int, module: ModuleType, dtype: torch.dtype) -> None:
    scale = torch.tensor(0.1, dtype=compute_dtype(dtype))
    values, steps = _boundaries(bits, scale, dtype)
    for zero_point in range(2**bits):
        codes = (steps + zero_point).clamp(0, 2**bits - 1)
        want = ((codes - zero_point).double() * scale.double()).to(scale.dtype).to(dtype)
        arguments = (scale, torch.tensor(zero_point, dtype=torch.int32), bits)
        stream = oracle.pack(codes.flatten().tolist(), bits)
        kernels = module.KERNELS
        assert_same_bits(kernels["fake_quantize"](values, *arguments), want)
        packed = kernels["quantize_pack"](values, *arguments)
        assert _as_bytes(packed) == stream
        assert_same_bits(kernels["unpack_dequantize"](packed, *arguments, list(values.shape), None, dtype), want)


@each_module
@pytest.mark.parametrize("bits", WIDTHS)
def test_every_size_up_to_40(bits: int, module: ModuleType) -> None:
    """Every remainder of a group, with nothing beyond the stream read or written, nor the bits it leaves over."""
    scale, zero_point = _quantizer(1, bits)
    for n in range(41):
        x = torch.randn(n, generator=_random(n)) * 2**bits * 0.1
        codes = oracle.codes(x, scale, zero_point, bits, None)
        stream = oracle.pack(codes, bits)
        assert len(stream) == math.ceil(n * bits / 8) and oracle.unpack(stream, bits, n) == codes
        packed = module.KERNELS["quantize_pack"](x, scale, zero_point, bits)
        assert _as_bytes(packed) == stream
        if used := n * bits % 8:
            packed[-1] |= 256 - 2**used
            assert _as_bytes(packed) != stream
        got = module.KERNELS["unpack_dequantize"](packed, scale, zero_point, bits, [n], None, torch.float32)
        assert_same_bits(got, module.KERNELS["fake_quantize"](x, scale, zero_point, bits))


@each_module
@pytest.mark.parametrize("bits", WIDTHS)
def test_codes_come_back_as_they_were(bits: int, module: ModuleType) -> None:
    """Any bytes are codes, and the bytes of what they stand for."""
    packed = torch.randint(0, 256, (bits * 1000,), generator=_random(), dtype=torch.uint8)
    scale, zero_point = _quantizer(80, bits)
    arguments = (scale, zero_point, bits)
    codes = torch.tensor(oracle.unpack(bytes(packed.tolist()), bits, 8000))
    for shape, axis in (([80, 100], 0), ([100, 80], 1), ([4, 80, 5, 5], 1)):
        steps, zeros = (along(t, len(shape), axis) for t in (scale, zero_point))
        got = module.KERNELS["unpack_dequantize"](packed, *arguments, shape, axis, torch.float32)
        assert_same_bits(got, (codes.view(shape) - zeros) * steps)
        assert torch.equal(module.KERNELS["quantize_pack"](got, *arguments, axis), packed)


@each_module
@given(data=st.data())
@examples(400)
def test_packing_any_tensor(module: ModuleType, data: st.DataObject) -> None:
    dtypes = st.sampled_from(NATIVE_DTYPES) if module.DTYPES else DTYPES
    shape, dtype, bits = data.draw(shapes()), data.draw(dtypes), data.draw(st.integers(2, 8))
    axis = data.draw(st.none() | st.integers(0, len(shape) - 1))
    channels = 1 if axis is None else shape[axis]
    kind = data.draw(st.sampled_from(["powers of two", "any", "any", "tiny", "subnormal", "huge"]))
    scale = make_steps(kind, channels, data.draw(SEEDS), dtype)
    rng = _random(data.draw(SEEDS))
    zero_point = torch.randint(0, 2**bits, (channels,), generator=rng, dtype=torch.int32)
    values = make(shape, dtype, data.draw(KINDS), data.draw(SEEDS), along(scale, len(shape), axis), bits)
    x, arguments = data.draw(layouts(shape)).place(values), (scale, zero_point, bits)

    stream = oracle.pack(oracle.codes(x, *arguments, axis), bits)
    want = _row_major(reference.fake_quantize(x, *arguments, axis))
    packed = module.KERNELS["quantize_pack"](x, *arguments, axis)
    assert _as_bytes(packed) == stream
    got = module.KERNELS["unpack_dequantize"](packed, *arguments, list(x.shape), axis, dtype)
    zeros = along(zero_point, len(shape), axis).to(scale.dtype)
    from_nan = ((0 - zeros) * along(scale, len(shape), axis)).to(dtype).expand(x.shape)
    assert_same_bits(got, torch.where(want.isnan(), from_nan, want))


@each_module
@pytest.mark.parametrize("shape", [(1, 2, 0, 1), (0,), (2, 0, 3), (3, 1, 4), ()], ids=str)
def test_unpacked_tensors_have_the_strides_of_new_ones(module: ModuleType, shape: tuple[int, ...]) -> None:
    scale, zero_point = _quantizer(1, 3)
    packed = torch.zeros(reference.packed_bytes(prod(shape), 3), dtype=torch.uint8)
    got = module.KERNELS["unpack_dequantize"](packed, scale, zero_point, 3, list(shape), None, torch.float32)
    assert got.stride() == torch.empty(shape).stride()


@each_module_and_dtype
def test_nan_has_code_0_and_infinities_saturate(module: ModuleType, dtype: torch.dtype) -> None:
    x = torch.tensor([math.nan, math.inf, -math.inf, -0.0, 3e38], dtype=torch.float64).to(dtype)
    scale, zero_point = torch.tensor([0.5], dtype=compute_dtype(dtype)), torch.tensor([5], dtype=torch.int32)
    packed = module.KERNELS["quantize_pack"](x, scale, zero_point, 4)
    assert oracle.unpack(_as_bytes(packed), 4, 5) == [0, 15, 0, 5, 15]
    got = module.KERNELS["unpack_dequantize"](packed, scale, zero_point, 4, [5], None, dtype)
    assert got.tolist() == [-2.5, 5.0, -2.5, 0.0, 5.0] and not got[3].signbit()


@each_module
@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("impossible", [-1, 256, 2**30, 2**31 - 1, -(2**31)])
def test_a_zero_point_that_no_code_has_spoils_its_own_codes_only(
    module: ModuleType, bits: int, impossible: int
) -> None:
    x = torch.randn(50, 3, generator=_random())
    scale, zero_point = torch.full((3,), 0.1), torch.tensor([1, impossible, 2], dtype=torch.int32)
    packed = module.KERNELS["quantize_pack"](x, scale, zero_point, bits, 1)
    codes = oracle.unpack(_as_bytes(packed), bits, 150)
    for channel in (0, 2):
        want = oracle.codes(x[:, channel], scale[channel], zero_point[channel], bits, None)
        assert codes[channel::3] == want


#: A tile of each thread ends in a row, a pattern or a channel; more channels than a pattern has.
PLANES = [(3 * 16384 + 1, 1, 1), (1, 60001, 1), (301, 5, 37), (2003, 33, 1), (5, 12001, 3), (2, 3, 10007)]


@pytest.mark.parametrize("shape", PLANES, ids=str)
@pytest.mark.parametrize("dtype", NATIVE_DTYPES)
def test_results_do_not_depend_on_the_number_of_threads(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    for bits in WIDTHS:
        arguments = (*_quantizer(shape[1], bits), bits)
        x = (torch.randn(shape, generator=_random()) * 2**bits * 0.1).to(dtype)
        want = reference.quantize_pack(x, *arguments, 1), reference.fake_quantize(x, *arguments, 1)
        for count in (1, 2, 3):
            with threads(count):
                packed = cpu.quantize_pack(x, *arguments, 1)
                got = packed, cpu.unpack_dequantize(packed, *arguments, list(shape), 1, dtype)
            for value, expected in zip(got, want, strict=True):
                assert_same_bits(value, expected)


# ------------------------------------------------------------------------------------------- the public functions


@pytest.fixture(params=[module.NAME for module in MODULES])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """In place of that of conftest.py, whose native one may be Triton."""
    assert dispatch.BACKENDS[request.param].why_unavailable() is None
    with adadfq.use_backend(request.param):
        yield request.param


def _layouts(dtype: torch.dtype) -> dict[str, Tensor]:
    dense = torch.randn(3, 5, 7, 9, generator=_random()).to(dtype)
    base = torch.randn(4, 6, 10, 12, generator=_random()).to(dtype)
    return {
        "contiguous": dense,
        "channels_last": dense.contiguous(memory_format=torch.channels_last),
        "sliced": base[1:, ::2, 2:9, 1::3],
        "transposed": base.transpose(0, 3),
        "expanded": base[:1].expand(4, 6, 10, 12),
        "empty": base[:, :0],
        "single element": base[:1, :1, :1, :1],
        "one dimension": base[0, 0, 0],
        "no dimension": base[0, 0, 0, 0],
    }


@pytest.mark.parametrize("layout", list(_layouts(torch.float32)))
@pytest.mark.parametrize("dtype", NATIVE_DTYPES)
def test_the_stream_is_in_logical_order_along_every_axis(backend: str, layout: str, dtype: torch.dtype) -> None:
    x = _layouts(dtype)[layout]
    for axis in (None, *range(-x.dim(), x.dim())):
        for bits in (3, 8):
            arguments = (*_quantizer(1 if axis is None else x.shape[axis], bits), bits)
            packed = F.quantize_pack(x, *arguments, axis)
            positive = None if axis is None else axis % x.dim()
            assert _as_bytes(packed) == oracle.pack(oracle.codes(x, *arguments, positive), bits)
            got = F.unpack_dequantize(packed, *arguments, x.shape, axis, dtype)
            assert_same_bits(got, _row_major(F.fake_quantize(x, *arguments, axis)))


def test_functions_take_what_the_quantiser_does(backend: str) -> None:
    """Other integer and floating dtypes, one element of any dimensions, bytes that are not neighbours."""
    x, scale, zero_point = torch.randn(5, 7, generator=_random()), torch.tensor([[0.1]]), torch.tensor([[7]])
    packed = F.quantize_pack(x, scale.double(), zero_point, 3)
    assert torch.equal(packed, F.quantize_pack(x, scale.view(()), zero_point.int().view(()), 3))
    apart = torch.stack([packed, packed + 1], 1)[:, 0]
    assert not apart.is_contiguous()
    for shape in ([5, 7], (35,), torch.Size([7, 1, 5]), (Size(5), Size(7)), [Size(35)]):
        got = F.unpack_dequantize(apart, scale.half().float(), zero_point.to(torch.uint8), 3, shape)
        assert got.shape == torch.Size(map(int, shape)) and got.dtype == torch.float32 and got.is_contiguous()


def test_codes_have_no_gradient(backend: str) -> None:
    x, scale = torch.randn(9, generator=_random()).requires_grad_(), torch.tensor(0.1, requires_grad=True)
    zero_point = torch.tensor(3)
    packed = F.quantize_pack(x, scale, zero_point, 4)
    got = F.unpack_dequantize(packed, scale, zero_point, 4, [9])
    assert not packed.requires_grad and not got.requires_grad
    assert torch.equal(got, F.fake_quantize(x, scale, zero_point, 4).detach())


def test_the_dtype_that_is_asked_for_chooses_the_backend() -> None:
    scale, zero_point = torch.tensor([0.1]), torch.tensor([3], dtype=torch.int32)
    packed = F.quantize_pack(torch.randn(9, generator=_random()), scale, zero_point, 4)
    double = F.unpack_dequantize(packed, scale, zero_point, 4, [9], dtype=torch.float64)
    assert double.dtype == torch.float64
    with adadfq.use_backend("cpu"):
        for dtype in NATIVE_DTYPES:
            assert F.unpack_dequantize(packed, scale, zero_point, 4, [9], dtype=dtype).dtype == dtype
        with pytest.raises(adadfq.BackendError, match="cannot serve unpack_dequantize: it takes .*not torch.float64"):
            F.unpack_dequantize(packed, scale, zero_point, 4, [9], dtype=torch.float64)


def _functions() -> dict[str, Callable[[Tensor], Tensor]]:
    per_tensor = (torch.tensor(0.1), torch.tensor(3), 3)
    per_channel = (torch.linspace(0.1, 0.2, 3), torch.tensor([3, 0, 7]), 3)
    return {
        "quantize_pack": lambda x: F.quantize_pack(x, *per_channel, 1),
        "there and back": lambda x: F.unpack_dequantize(
            F.quantize_pack(x * 2, *per_tensor), *per_tensor, x.shape, dtype=x.dtype
        ),
        "unpack_dequantize": lambda x: F.unpack_dequantize(
            torch.arange(x.numel() * 3 // 8, dtype=torch.uint8), *per_channel, x.shape, -3, torch.bfloat16
        ),
    }


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", list(_functions()))
def test_functions_compile_into_one_graph(backend: str, name: str, dynamic: bool) -> None:
    torch._dynamo.reset()
    call = _functions()[name]
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for sizes in ((2, 3, 4, 5), (8, 3, 2, 2)):
        x = torch.randn(sizes, generator=_random())
        assert torch.equal(compiled(x), call(x))


@pytest.mark.parametrize("op", ["quantize_pack", "unpack_dequantize"])
@pytest.mark.parametrize("axis", [None, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(backend: str, op: str, axis: int | None, dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 4, 5, generator=_random()).to(dtype)
    arguments = (*_quantizer(1 if axis is None else 3, 3), 3)
    calls = {
        "quantize_pack": [(x, *arguments, axis), (x.transpose(0, 2), *arguments, axis)],
        "unpack_dequantize": [
            (torch.arange(45, dtype=torch.uint8), *arguments, [2, 3, 4, 5], axis, dtype),
            (torch.arange(90, dtype=torch.uint8)[::2], *arguments, [2, 3, 4, 5], axis, dtype),
        ],
    }
    for args in calls[op]:
        torch.library.opcheck(getattr(torch.ops.adadfq, op).default, args)


class Size:
    """An integer that is no int, as NumPy's are."""

    def __init__(self, value: int) -> None:
        self.value = value

    def __index__(self) -> int:
        return self.value


ONE, ZERO = torch.ones(1), torch.zeros(1, dtype=torch.int32)


@pytest.mark.parametrize(
    "message,call",
    [
        ("bits must be 2..8, got 1", lambda x, p: F.quantize_pack(x, ONE, ZERO, 1)),
        ("bits must be 2..8, got 9", lambda x, p: F.unpack_dequantize(p, ONE, ZERO, 9, [8])),
        ("x must be a floating-point tensor, got torch.uint8", lambda x, p: F.quantize_pack(p, ONE, ZERO, 4)),
        ("axis must be -2..1", lambda x, p: F.quantize_pack(x, ONE, ZERO, 4, 2)),
        ("scale must have 3 elements for axis 1", lambda x, p: F.quantize_pack(x, ONE, ZERO, 4, 1)),
        ("zero_point must be an integer tensor", lambda x, p: F.quantize_pack(x, ONE, ONE, 4)),
        ("packed must be a tensor, got bytes", lambda x, p: F.unpack_dequantize(b"1234", ONE, ZERO, 4, [8])),
        (r"packed must be torch.uint8 \[n\], got", lambda x, p: F.unpack_dequantize(p.int(), ONE, ZERO, 4, [8])),
        (r"got torch.uint8 \[1, 4\]", lambda x, p: F.unpack_dequantize(p[None], ONE, ZERO, 4, [8])),
        (
            r"packed must hold 5 bytes, 4 bits for each element of shape \[3, 3\], got 4 bytes",
            lambda x, p: F.unpack_dequantize(p, ONE, ZERO, 4, [3, 3]),
        ),
        ("packed must hold 3 bytes, 4 bits", lambda x, p: F.unpack_dequantize(p, ONE, ZERO, 4, [2, 3])),
        ("packed must hold 0 bytes, 4 bits", lambda x, p: F.unpack_dequantize(p, ONE, ZERO, 4, [0, 3])),
        (
            "shape must be the sizes of a tensor, a sequence of integers from 0, got 8",
            lambda x, p: F.unpack_dequantize(p, ONE, ZERO, 4, 8),
        ),
        (r"shape must be .*, got \[-2, -4\]", lambda x, p: F.unpack_dequantize(p, ONE, ZERO, 4, [-2, -4])),
        (r"shape must be .*, got \[8.0\]", lambda x, p: F.unpack_dequantize(p, ONE, ZERO, 4, [8.0])),
        ("shape must be .*, got ''", lambda x, p: F.unpack_dequantize(p[:1], ONE, ZERO, 4, "")),
        ("shape must be .*, got b'", lambda x, p: F.unpack_dequantize(p, ONE, ZERO, 4, bytes([2, 4]))),
        (r"shape must be .*, got \[True\]", lambda x, p: F.unpack_dequantize(p[:1], ONE, ZERO, 4, [True])),
        ("axis must be -2..1", lambda x, p: F.unpack_dequantize(p, ONE, ZERO, 4, [2, 4], 2)),
        ("scale must have 4 elements for axis 1", lambda x, p: F.unpack_dequantize(p, ONE, ZERO, 4, [2, 4], 1)),
        (
            "dtype must be a floating-point dtype, got torch.int8",
            lambda x, p: F.unpack_dequantize(p, ONE, ZERO, 4, [8], dtype=torch.int8),
        ),
        (
            "scale must be on cpu like packed, got meta",
            lambda x, p: F.unpack_dequantize(p, ONE.to("meta"), ZERO, 4, [8]),
        ),
        (
            "zero_point must be on cpu like packed, got meta",
            lambda x, p: F.unpack_dequantize(p, ONE, ZERO.to("meta"), 4, [8]),
        ),
    ],
)  # fmt: skip
def test_bad_arguments_are_refused(message: str, call: Callable[[Tensor, Tensor], Tensor]) -> None:
    with pytest.raises(adadfq.InvalidInputError, match=message):
        call(torch.zeros(2, 3), torch.zeros(4, dtype=torch.uint8))


@pytest.mark.parametrize(
    "message,call",
    [
        ("bits must be 2..8, got 40", lambda x, p: cpu.quantize_pack(x, ONE, ZERO, 40)),
        ("bits must be 2..8, got 1", lambda x, p: cpu.unpack_dequantize(p, ONE, ZERO, 1, [32], None, torch.float32)),
        ("x must be one of .*, got torch.float64", lambda x, p: cpu.quantize_pack(x.double(), ONE, ZERO, 4)),
        ("x must be on a cpu device", lambda x, p: cpu.quantize_pack(x.to("meta"), ONE, ZERO, 4)),
        (r"scale must have shape \[3\]", lambda x, p: cpu.quantize_pack(x, ONE, ZERO, 4, 1)),
        ("got 4 bytes", lambda x, p: cpu.unpack_dequantize(p, ONE, ZERO, 4, [9], None, torch.float32)),
        ("got 4 bytes", lambda x, p: reference.unpack_dequantize(p, ONE, ZERO, 4, [9], None, torch.float32)),
        ("packed must be torch.uint8", lambda x, p: cpu.unpack_dequantize(x, ONE, ZERO, 4, [9], None, torch.float32)),
        ("torch.float64", lambda x, p: cpu.unpack_dequantize(p, ONE, ZERO, 4, [8], None, torch.float64)),
        (
            "must be on a cpu device",
            lambda x, p: cpu.unpack_dequantize(p.to("meta"), ONE, ZERO, 4, [8], None, torch.float32),
        ),
    ],
)
def test_operators_called_directly_refuse_bad_arguments(message: str, call: Callable[..., Tensor]) -> None:
    with pytest.raises(adadfq.InvalidInputError, match=message):
        call(torch.zeros(2, 3), torch.zeros(4, dtype=torch.uint8))
