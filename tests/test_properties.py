"""Random tensors of every layout, dtype and magnitude: each operator against float64, each CPU kernel against both.

The reference is checked against tests/oracle.py; the CPU kernel equals the reference bit for bit where no sums are
involved, and meets the same float64 bounds where there are. ADADFQ_TEST_EXAMPLES multiplies the number of examples:

    ADADFQ_TEST_EXAMPLES=100 python -m pytest tests/test_properties.py
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import oracle
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from native import NATIVE
from torch import Tensor

from adadfq.ops import reference

pytestmark = pytest.mark.usefixtures("poisoned_memory")

NATIVE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAN, INF = float("nan"), float("inf")
#: Half a unit in the last place, relative; and half the smallest subnormal.
ROUNDING = {torch.float64: 2**-53, torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11}
UNDERFLOW = {torch.float64: 0.0, torch.float32: 2**-150, torch.bfloat16: 2**-134, torch.float16: 2**-25}
INTEGERS = {torch.float64: torch.int64, torch.float32: torch.int32, torch.bfloat16: torch.int16}
INTEGERS[torch.float16] = torch.int16


def examples(count: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """`count` random examples, times ADADFQ_TEST_EXAMPLES."""
    factor = float(os.environ.get("ADADFQ_TEST_EXAMPLES") or 1)
    return settings(
        max_examples=max(1, round(count * factor)),
        deadline=None,
        print_blob=True,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )


def implementations(op: str) -> list[tuple[str, Callable[..., Any]]]:
    """The reference, and the native kernel; tests/test_ops.py and test_cuda_calls.py say which have none."""
    native = [(NATIVE.NAME, NATIVE.KERNELS[op])] if op in NATIVE.KERNELS else []
    return [("reference", reference.KERNELS[op]), *native]


def for_dtype(op: str, dtype: torch.dtype) -> list[tuple[str, Callable[..., Any]]]:
    return [(name, f) for name, f in implementations(op) if name == "reference" or dtype in NATIVE.DTYPES]


@dataclass(frozen=True)
class Layout:
    """Where the elements of a tensor lie: dimensions in memory order, every how manyth element is used, how many
    elements come before, and which dimension repeats one element."""

    shape: tuple[int, ...]
    order: tuple[int, ...]
    steps: tuple[int, ...]
    offset: int
    expanded: int | None

    def place(self, values: Tensor) -> Tensor:
        """`values` so laid out, with NaN between and around them."""
        padded = [n * step for n, step in zip(self.shape, self.steps, strict=True)]
        memory = torch.full((self.offset + prod(padded),), NAN, dtype=values.dtype)
        inverse = [self.order.index(d) for d in range(len(self.order))]
        x = memory[self.offset :].view([padded[d] for d in self.order]).permute(inverse)
        x = x[tuple(slice(None, None, step) for step in self.steps)]
        x.copy_(values)
        return x if self.expanded is None else x.narrow(self.expanded, 0, 1).expand(self.shape)


#: Around the lengths at which kernels change their way: vectors, lanes, rows, patterns.
SIZES = (1, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 64, 65, 127, 300)
LARGEST = 3000


@st.composite
def shapes(draw: st.DrawFn, dims: tuple[int, int] = (1, 5), empty: bool = True) -> tuple[int, ...]:
    shape = draw(st.lists(st.sampled_from(SIZES), min_size=dims[0], max_size=dims[1]))
    for i in range(len(shape)):
        if prod(shape[: i + 1]) > LARGEST:
            shape[i] = 1
    if empty and draw(st.integers(0, 24)) == 24:
        shape[draw(st.integers(0, len(shape) - 1))] = 0
    return tuple(shape)


@st.composite
def layouts(draw: st.DrawFn, shape: tuple[int, ...], expand: bool = True) -> Layout:
    dims = len(shape)
    kind = draw(st.sampled_from(["contiguous", "permuted", "sliced", "any"]))
    order, steps, expanded = tuple(range(dims)), (1,) * dims, None
    if kind in ("permuted", "any"):
        order = tuple(draw(st.permutations(range(dims))))
    if kind in ("sliced", "any"):
        steps = tuple(draw(st.lists(st.integers(1, 3), min_size=dims, max_size=dims)))
    if kind == "any" and expand and shape and 0 not in shape:
        expanded = draw(st.none() | st.integers(0, dims - 1))
    return Layout(shape, order, steps, draw(st.integers(0, 3)), expanded)


SEEDS = st.integers(0, 2**32 - 1)
KINDS = st.sampled_from(["normal", "ties", "special", "mixed", "huge", "denormal", "zeros"])
FINITE = st.sampled_from(["normal", "ties", "zeros", "huge", "denormal"])
SPECIAL = (NAN, INF, -INF, 0.0, -0.0, 1e-45, -1e-40, 6e-8, 1.18e-38, 65504.0, 65520.0, -3e38, 3.4e38)


def make(shape: tuple[int, ...], dtype: torch.dtype, kind: str, seed: int, step: Tensor, bits: int = 4) -> Tensor:
    """Values around `step` (which broadcasts): also (k + 0.5) step and its neighbours, and everything special."""
    rng = torch.Generator().manual_seed(seed)

    def pick(low: int, high: int) -> Tensor:
        return torch.randint(low, high, shape, generator=rng)

    step = step.float()
    normal = (torch.randn(shape, generator=rng) * 2 ** (bits - 1) * step).to(dtype)
    if kind == "normal":
        return normal
    if kind == "zeros":
        return torch.where(pick(0, 2) == 0, 0.0, -0.0).to(dtype)
    if kind == "huge":
        return (torch.randn(shape, generator=rng, dtype=torch.float64) * (torch.finfo(dtype).max / 4)).to(dtype)
    if kind == "denormal":
        return pick(-40, 41).to(INTEGERS[dtype]).abs().view(dtype) * torch.where(pick(0, 2) == 0, 1, -1).to(dtype)
    ties = ((pick(-(2**bits), 2**bits + 1) + 0.5) * step).to(dtype)
    beside = (ties.view(INTEGERS[dtype]) + pick(-1, 2).to(INTEGERS[dtype])).view(dtype)
    ties = torch.where(ties == 0, ties, beside)
    if kind == "ties":
        return ties
    special = torch.tensor(SPECIAL, dtype=torch.float64).to(dtype)[pick(0, len(SPECIAL))]
    if kind == "special":
        return torch.where(pick(0, 8) == 0, special, normal)
    which = pick(0, 12)
    return torch.where(which < 5, ties, torch.where(which < 11, normal, special))


@dataclass(frozen=True)
class Recipe:
    """A tensor in few words, for the report of a failing example."""

    layout: Layout
    dtype: torch.dtype
    kind: str
    seed: int

    def make(self, step: Tensor | float, bits: int = 4) -> Tensor:
        values = make(self.layout.shape, self.dtype, self.kind, self.seed, torch.as_tensor(step), bits)
        return self.layout.place(values)


@st.composite
def recipes(
    draw: st.DrawFn, shape: tuple[int, ...], dtype: torch.dtype, kinds: st.SearchStrategy[str] = KINDS
) -> Recipe:
    return Recipe(draw(layouts(shape)), dtype, draw(kinds), draw(SEEDS))


DTYPES = st.sampled_from([*NATIVE_DTYPES, *NATIVE_DTYPES, torch.float32, torch.float64])


def along(values: Tensor, ndim: int, axis: int | None) -> Tensor:
    return values.reshape(()) if axis is None else values.reshape([-1 if d == axis else 1 for d in range(ndim)])


STEPS = st.sampled_from(["powers of two", "powers of two", "any", "any", "tiny", "subnormal", "huge", "not finite"])


def make_steps(kind: str, count: int, seed: int, dtype: torch.dtype) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    u = torch.rand(count, generator=rng)
    steps = {
        "powers of two": lambda: torch.exp2((u * 12 - 8).floor()),
        "any": lambda: u / 4 + 0.01,
        "tiny": lambda: (u + 1) * 2.0**-126,
        "subnormal": lambda: ((u * 1000).int() + 1).view(torch.float32),
        "huge": lambda: (u + 0.1) * 1e37,
        "not finite": lambda: torch.where(u < 0.3, NAN, torch.where(u < 0.6, INF, u + 0.1)),
    }[kind]()
    return steps.to(torch.float64 if dtype == torch.float64 else torch.float32)


def assert_same_bits(got: Tensor, want: Tensor) -> None:
    """Same dtype, strides and bits; any NaN equals any NaN."""
    assert got.dtype == want.dtype and got.shape == want.shape and got.stride() == want.stride()
    if not got.is_floating_point():
        assert torch.equal(got, want)
        return
    nan = got.isnan()
    assert torch.equal(nan, want.isnan())
    differ = (got.view(INTEGERS[got.dtype]) != want.view(INTEGERS[got.dtype])) & ~nan
    assert not differ.any(), f"{got[differ][:5]} instead of {want[differ][:5]}"


def assert_bounded(got: Tensor, want: Tensor, allowed: Tensor | float) -> None:
    """NaN where `want` (float64) is, infinite only where it overflows, and otherwise within `allowed` of it."""
    assert got.shape == want.shape
    assert torch.equal(got.isnan(), want.isnan())
    allowed = torch.as_tensor(allowed, dtype=torch.float64) + UNDERFLOW[got.dtype]
    large = want.abs() + allowed >= torch.finfo(got.dtype).max * (1 - ROUNDING[got.dtype])
    assert not (got.isinf() & ~large).any()
    wrong = ((got.double() - want).abs() > allowed) & ~large
    assert not wrong.any(), f"{got[wrong][:5]} instead of {want[wrong][:5]}"


def rounding(want: Tensor, dtype: torch.dtype, operations: int = 1) -> Tensor:
    """What `operations` in the compute dtype and one conversion to `dtype` may cost."""
    compute = 2**-53 if dtype == torch.float64 else 2**-24
    return want.abs() * (ROUNDING[dtype] * 1.001 + compute * operations)


def near_ties(u: Tensor, slack: Tensor | float, scale: Tensor, exact: bool) -> Tensor:
    """Where `u` (float64), known to `slack`, may round to either of two codes."""
    if exact:
        return torch.zeros(u.shape, dtype=torch.bool)
    unsure = torch.as_tensor(slack) / scale.double() + 2**-23 * (u / scale.double()).abs()
    return oracle.tie_distance(u, scale) <= unsure


def assert_quantised(
    x_hat: Tensor, u: Tensor, slack: Tensor | float, scale: Tensor, zero_point: Tensor, bits: int, exact: bool = False
) -> None:
    """`x_hat` is the code nearest to `u` (float64, known to `slack`); next to a tie, one of the two."""
    want = oracle.quantize(u, scale, zero_point, bits)
    step = (slack + scale.double() * 1.0001).expand_as(u)
    one_off = torch.where(near_ties(u, slack, scale, exact), step, 0)
    assert_bounded(x_hat, want, one_off + rounding(want.abs() + one_off, x_hat.dtype))


@given(data=st.data())
@examples(1200)
def test_fake_quantize(data: st.DataObject) -> None:
    shape, dtype, bits = data.draw(shapes()), data.draw(DTYPES), data.draw(st.integers(2, 8))
    axis = data.draw(st.none() | st.integers(0, len(shape) - 1))
    channels = 1 if axis is None else shape[axis]
    kind = data.draw(STEPS)
    scale = make_steps(kind, channels, data.draw(SEEDS), dtype)
    rng = torch.Generator().manual_seed(data.draw(SEEDS))
    zero_point = torch.randint(0, 2**bits, (channels,), generator=rng, dtype=torch.int32)
    steps, zeros = along(scale, len(shape), axis), along(zero_point, len(shape), axis)
    layout = data.draw(layouts(shape))
    values = make(shape, dtype, data.draw(KINDS), data.draw(SEEDS), steps, bits)
    x, arguments = layout.place(values), (scale, zero_point, bits, axis)

    want = reference.fake_quantize(x, *arguments)
    # Division by a power of two is exact, so the ties themselves must go to the even neighbour.
    assert_quantised(want, x.double(), 0.0, steps, zeros, bits, exact=kind == "powers of two")
    for _, f in for_dtype("fake_quantize", dtype)[1:]:
        assert_same_bits(f(x, *arguments), want)

    grad = data.draw(recipes(shape, dtype)).make(1)
    passed = reference.fake_quantize_backward(grad, x, *arguments)
    code = torch.round(x.double() / steps.double()) + zeros
    inside = (code >= 0) & (code <= 2**bits - 1)
    sure = ~near_ties(x.double(), 0.0, steps, exact=kind == "powers of two")
    assert_same_bits(passed[sure], torch.where(inside, grad, torch.zeros_like(grad))[sure])
    for _, f in for_dtype("fake_quantize_backward", dtype)[1:]:
        assert_same_bits(f(grad, x, *arguments), passed)

    if layout.expanded is None:
        for _, f in for_dtype("fake_quantize_", dtype):
            y = layout.place(values)
            assert f(y, *arguments) is None
            assert_same_bits(*(t.clone(memory_format=torch.contiguous_format) for t in (y, want)))
            # The NaN between and around its elements are still there.
            assert int(y._base.isnan().sum()) == y._base.numel() - int((~want.isnan()).sum())


def with_range(shape: tuple[int, ...], axis: int, dtype: torch.dtype, kind: str, seed: int, bits: int) -> Tensor:
    """Channels along `axis` that each hold the ends of a range and, between them, ties of its quantiser."""
    rng = torch.Generator().manual_seed(seed)
    ends = torch.randn((2, shape[axis]), generator=rng, dtype=torch.float64)
    limits = torch.finfo(dtype)
    if kind == "one sign":
        ends = ends.abs() * torch.where(torch.rand(shape[axis], generator=rng) < 0.5, 1, -1)
    ends = ends * {"tiny": limits.tiny * 2**bits, "subnormal": limits.tiny / 8, "huge": limits.max / 4}.get(kind, 3)
    lo, hi = ends.amin(0).to(dtype), ends.amax(0).to(dtype)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    step, _ = reference.qparams(lo.to(compute), hi.to(compute), bits)
    x = make(shape, dtype, "ties", seed + 1, along(step, len(shape), axis), bits)
    lo, hi = along(lo, len(shape), axis), along(hi, len(shape), axis)
    x = torch.maximum(torch.minimum(x, hi), lo)
    flat, ends = x.movedim(axis, 0).flatten(1) if x.dim() > 1 else x.reshape(-1, 1), [lo, hi]
    for i in range(min(2, flat.shape[1])):
        where = int(torch.randint(flat.shape[1], (), generator=rng))
        index = [
            int(n) for n in torch.unravel_index(torch.tensor(where), [s for d, s in enumerate(shape) if d != axis])
        ]
        index.insert(axis, slice(None))
        x[tuple(index)] = ends[i].reshape(-1)
    return x


RANGES = st.sampled_from(["one sign", "both signs", "tiny", "subnormal", "huge"])


def draw_ranged(data: st.DataObject, shape: tuple[int, ...], axis: int, dtype: torch.dtype, bits: int) -> Tensor:
    if 0 in shape or data.draw(st.integers(0, 2)) == 0:
        return data.draw(recipes(shape, dtype)).make(2.0 ** data.draw(st.integers(-20, 6)), bits)
    recipe = data.draw(recipes(shape, dtype, RANGES))
    return recipe.layout.place(with_range(shape, axis, dtype, recipe.kind, recipe.seed, bits))


def assert_range(lo: Tensor, hi: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> None:
    """scale and zero point of [lo, hi], which may be anything."""
    limits = torch.finfo(scale.dtype)
    finite = lo.isfinite() & hi.isfinite()
    lo, hi = lo.double(), hi.double()
    true_scale, true_zero_point = oracle.quantizer_range(lo, hi, bits)
    width = hi.clamp(min=0) - lo.clamp(max=0)
    broken = ~finite | (width > limits.max * (1 + ROUNDING[scale.dtype] / 2))
    assert bool(scale[broken].isnan().all()) and not zero_point[broken].any()
    tiny = torch.finfo(torch.float32).tiny
    flat = ~broken & ((true_scale < tiny * (1 - 2**-22)) | (width == 0))
    assert bool((scale[flat] == 1).all()) and not zero_point[flat].any()
    normal = ~broken & ~flat & (true_scale > tiny * (1 + 2**-22)) & (width < limits.max)
    torch.testing.assert_close(scale[normal].double(), true_scale[normal], rtol=2**-23, atol=0)
    unsure = oracle.tie_distance(lo.clamp(max=0), true_scale) <= 2**-20 * 2**bits / 16
    sure = normal & ~unsure
    assert torch.equal(zero_point[sure].double(), true_zero_point[sure])
    assert bool(((zero_point >= 0) & (zero_point <= 2**bits - 1)).all())


@given(data=st.data())
@examples(900)
def test_dynamic_fake_quantize(data: st.DataObject) -> None:
    shape, dtype, bits = data.draw(shapes()), data.draw(DTYPES), data.draw(st.integers(2, 8))
    axis = data.draw(st.integers(0, len(shape) - 1))
    x = draw_ranged(data, shape, axis, dtype, bits)
    want = x_hat, scale, zero_point = reference.dynamic_fake_quantize(x, bits, axis)
    assert scale.shape == zero_point.shape == (shape[axis],)
    if x.numel():
        rows = x.movedim(axis, 0).reshape(shape[axis], -1)
        assert_range(rows.amin(1), rows.amax(1), scale, zero_point, bits)
        finite = rows.isfinite().all(1)
        assert bool(x_hat.movedim(axis, 0)[~finite].isnan().all())
    assert_quantised(x_hat, x.double(), 0.0, along(scale, x.dim(), axis), along(zero_point, x.dim(), axis), bits)
    for _, f in for_dtype("dynamic_fake_quantize", dtype)[1:]:
        for got, expected in zip(f(x, bits, axis), want, strict=True):
            assert_same_bits(got, expected)


@given(data=st.data())
@examples(400)
def test_foreach_dynamic_fake_quantize(data: st.DataObject) -> None:
    dtype, axis = data.draw(DTYPES), data.draw(st.integers(0, 1))
    widths = data.draw(st.lists(st.integers(2, 8), min_size=1, max_size=6))
    inputs = []
    for bits in widths:
        shape = data.draw(shapes((axis + 1, 4)))
        inputs.append(draw_ranged(data, shape, axis, dtype, bits))
    alone = [reference.dynamic_fake_quantize(x, bits, axis) for x, bits in zip(inputs, widths, strict=True)]
    for _, f in for_dtype("foreach_dynamic_fake_quantize", dtype):
        results = f(inputs, widths, axis)
        assert len(results) == 3 and all(isinstance(r, list) and len(r) == len(inputs) for r in results)
        for got, want in zip(zip(*results, strict=True), alone, strict=True):
            for value, expected in zip(got, want, strict=True):
                assert_same_bits(value, expected)


MOMENTA = st.sampled_from([0.0, 5e-324, 0.5, 0.9, 0.999, 1 - 1e-9, 1 - 2**-53]) | st.floats(0, 1, exclude_max=True)
COUNTS = st.sampled_from([0, 0, 0, 1, 10, 10**6, 2**40])


def range_state(past: tuple[float, float], count: int) -> tuple[Tensor, ...]:
    ends = torch.tensor(past[0]), torch.tensor(past[1])
    return *ends, torch.tensor(count), torch.ones(()), torch.zeros((), dtype=torch.int32)


@given(data=st.data())
@examples(600)
def test_observe_fake_quantize(data: st.DataObject) -> None:
    dtype, bits, momentum = data.draw(DTYPES), data.draw(st.integers(2, 8)), data.draw(MOMENTA)
    count = data.draw(COUNTS)
    past = (
        data.draw(st.sampled_from([(-1.0, 2.0), (0.0, 0.0), (-1e-39, 1e-39), (-3e38, 3e38)])) if count else (0.0, 0.0)
    )
    shape = data.draw(shapes((0, 4), empty=False))
    # The quantiser of the range that the batch itself will move cannot be aimed at; powers of two hit some ties.
    step = torch.exp2(torch.tensor(float(data.draw(st.integers(-10, 4)))))
    kinds = KINDS if dtype != torch.float64 else st.sampled_from(["normal", "ties", "zeros"])
    batches = [data.draw(recipes(shape, dtype, kinds)).make(step) for _ in range(data.draw(st.integers(1, 3)))]
    for _, f in for_dtype("observe_fake_quantize", dtype):
        state = running_min, running_max, num_batches, scale, zero_point = range_state(past, count)
        for i, x in enumerate(batches):
            before = float(running_min), float(running_max)
            x_hat = f(x, *state, bits, momentum)
            assert int(num_batches) == count + i + 1
            rate = oracle.moving_average_rate(count + i + 1, momentum)
            for running, old, end in ((running_min, before[0], x.min()), (running_max, before[1], x.max())):
                moved = old + rate * (float(end) - old)
                size = abs(old) + rate * abs(float(end))
                assert_bounded(running, torch.tensor(moved, dtype=torch.float64), 2**-24 * abs(moved) + 2**-50 * size)
            new_scale, new_zero_point = reference.qparams(running_min, running_max, bits)
            assert_same_bits(scale, new_scale)
            assert_same_bits(zero_point, new_zero_point)
            assert_same_bits(x_hat, reference.fake_quantize(x, scale.reshape(1), zero_point.reshape(1), bits))


def sums(terms: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of float64 `terms` over every dimension but 1, and of their sizes."""
    dims = [d for d in range(terms.dim()) if d != 1]
    return terms.sum(dims), terms.abs().sum(dims)


#: What sums of a few thousand float32 may lose, of the sum of the sizes.
SUMMATION = 2e-6


@given(data=st.data())
@examples(1000)
def test_affine_act_fake_quantize(data: st.DataObject) -> None:
    shape, dtype, bits = data.draw(shapes((2, 5))), data.draw(DTYPES), data.draw(st.integers(2, 8))
    act = data.draw(st.sampled_from(["none", "relu", "relu6"]))
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    x = data.draw(recipes(shape, dtype)).make(0.25)
    kind = data.draw(st.sampled_from(["whole", "whole", "any", "large"]))
    rng = torch.Generator().manual_seed(data.draw(SEEDS))
    scale, shift = torch.randn(2, shape[1], generator=rng, dtype=compute) * (1e30 if kind == "large" else 3)
    if kind == "whole":  # exact arithmetic, so that many u are 0, 6 and ties
        scale, shift = torch.exp2(scale.round()) * scale.sign(), shift.round()
    residual = data.draw(recipes(shape, dtype)).make(0.25) if data.draw(st.booleans()) else None
    step = zero_point = None
    if data.draw(st.booleans()):
        step = make_steps(data.draw(st.sampled_from(["powers of two", "any", "tiny", "huge"])), 1, 5, dtype)
        zero_point = torch.tensor([data.draw(st.integers(0, 2**bits - 1))], dtype=torch.int32)
    arguments = (x, scale, shift, residual, act)

    u = oracle.affine(x, scale, shift, residual)
    terms = oracle.affine(x.abs(), scale.abs(), shift.abs(), None if residual is None else residual.abs())
    slack = terms * 2**-51 if dtype == torch.float64 else terms * 2**-22 + 2**-148
    want = reference.affine_act_fake_quantize(*arguments, step, zero_point, bits)
    # Beyond float32 the steps on the way overflow, and the float64 formula tells nothing.
    tame = terms < 1e38
    true = oracle.activation(u, act)
    assert torch.equal(want.isnan()[tame], true.isnan()[tame])
    assert bool(want[x.isnan()].isnan().all()) and (residual is None or bool(want[residual.isnan()].isnan().all()))
    if step is None:
        assert_bounded(want[tame], true[tame], rounding(true, dtype)[tame] + slack[tame])
    else:
        assert_quantised(want[tame], true[tame], slack[tame], step, zero_point, bits)
    for _, f in for_dtype("affine_act_fake_quantize", dtype)[1:]:
        assert_same_bits(f(*arguments, step, zero_point, bits), want)

    if step is not None:
        codes = reference.affine_act_quantize(*arguments, step, zero_point, bits)
        assert codes.dtype == torch.uint8 and not codes[true.isnan() & tame].any()
        decoded = torch.empty_like(want).copy_((codes.to(compute) - zero_point) * step)
        held = ~want.isnan()
        assert torch.equal(decoded[held], want[held])
        for _, f in for_dtype("affine_act_quantize", dtype)[1:]:
            assert_same_bits(f(*arguments, step, zero_point, bits), codes)

    grad = data.draw(recipes(shape, dtype, st.sampled_from(["normal", "normal", "special"]))).make(1)
    need_residual, need_params = data.draw(st.booleans()), data.draw(st.booleans())
    kinks = {"none": [], "relu": [0.0], "relu6": [0.0, 6.0]}[act]
    unsure = ~tame
    for kink in kinks:
        # A power of two times x plus a whole number is that kink exactly or not at all.
        exact = (u == kink) & (kind == "whole" and residual is None)
        unsure = unsure | (((u - kink).abs() <= slack) & ~exact)
    flat = torch.zeros_like(u, dtype=torch.bool)
    if act != "none":
        flat = (u <= 0) if act == "relu" else (u <= 0) | (u >= 6)
    du = torch.where(flat, 0, grad.double())
    plain = None
    for name, f in for_dtype("affine_act_fake_quantize_backward", dtype):
        got = grad_x, grad_residual, grad_scale, grad_shift = f(grad, *arguments, need_residual, need_params)
        true_x = du * along(scale.double(), x.dim(), 1)
        assert_bounded(grad_x[~unsure], true_x[~unsure], rounding(true_x, dtype)[~unsure])
        assert grad_x.dtype == dtype and grad_residual.dtype == dtype
        if need_residual:
            assert torch.equal(grad_residual.isnan()[~unsure], du.isnan()[~unsure])
            sure = ~unsure & ~du.isnan()
            assert torch.equal(grad_residual.double()[sure], du[sure])
        else:
            assert grad_residual.shape == (0,)
        if need_params:
            # The slopes that float32 finds, which next to a kink may be others.
            used = torch.where(slopes(grad, *arguments), grad.double(), 0.0) if unsure.any() else du
            for value, products in ((grad_scale, used * x.double()), (grad_shift, used)):
                total, size = sums(products)
                assert value.shape == (shape[1],) and value.dtype == compute
                sound = size < 1e37
                lost = SUMMATION * size + x.numel() * UNDERFLOW[compute]
                assert_bounded(value[sound], total[sound], lost[sound])
                assert torch.equal(value.isnan(), total.isnan()) or not bool(sound.all())
        else:
            assert grad_scale.shape == grad_shift.shape == (0,)
        if name == "reference":
            plain = got
        else:
            assert_same_bits(grad_x, plain[0])
            assert_same_bits(grad_residual, plain[1])


def slopes(grad: Tensor, x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, act: str) -> Tensor:
    """Where the activation has a slope, as the reference finds it."""
    ones = torch.ones_like(grad)
    return reference.affine_act_fake_quantize_backward(ones, x, scale, shift, residual, act, True, False)[1] != 0


def assert_step_gradient(
    got: Tensor, grad: Tensor, u: Tensor, step: Tensor, zero_point: Tensor, bits: int, exact: bool, axis: int | None
) -> None:
    """`got` is the gradient of a learned step for values `u` known exactly."""
    _, products = oracle.learned_step_gradients(grad, u, step, zero_point, bits)
    # Next to a tie the other side of it counts; and quotients are float32's.
    most = grad.double().abs() * 2**bits
    slack = torch.where(near_ties(u.double(), 0.0, step, exact), most, most * 2**-22)
    dims = [d for d in range(u.dim()) if d != axis]
    total, size, lost = (t.sum(dims) if dims else t for t in (products, products.abs(), slack))
    assert got.numel() == total.numel()
    value, lost = got.reshape(total.shape), lost + SUMMATION * size + grad.numel() * UNDERFLOW[got.dtype]
    sound = (size < 1e37) & (lost < 1e37)
    assert bool(((value.double() - total).abs() <= lost)[sound].all()), (value, total)
    assert bool(value[(products.isnan().sum(dims) if dims else products.isnan()) > 0].isnan().all())


@given(data=st.data())
@examples(600)
def test_learned_fake_quantize(data: st.DataObject) -> None:
    shape, dtype, bits = data.draw(shapes()), data.draw(DTYPES), data.draw(st.integers(2, 8))
    axis = data.draw(st.none() | st.integers(0, len(shape) - 1))
    channels, kind = 1 if axis is None else shape[axis], data.draw(STEPS)
    scale = make_steps(kind, channels, data.draw(SEEDS), dtype)
    rng = torch.Generator().manual_seed(data.draw(SEEDS))
    zero_point = torch.randint(0, 2**bits, (channels,), generator=rng, dtype=torch.int32)
    steps, zeros = along(scale, len(shape), axis), along(zero_point, len(shape), axis)
    x = data.draw(layouts(shape)).place(make(shape, dtype, data.draw(KINDS), data.draw(SEEDS), steps, bits))
    grad = data.draw(recipes(shape, dtype, st.sampled_from(["normal", "normal", "special"]))).make(1)
    arguments = (x, scale, zero_point, bits, axis)
    passed = reference.fake_quantize_backward(grad, *arguments)
    lists = [[t] * 3 for t in (grad, x, scale, zero_point, bits)]
    for _, f in for_dtype("learned_fake_quantize_backward", dtype):
        grad_x, grad_scale = f(grad, *arguments)
        assert_same_bits(grad_x, passed)
        assert grad_scale.shape == scale.shape and grad_scale.dtype == scale.dtype
        assert_step_gradient(grad_scale, grad, x, steps, zeros, bits, kind == "powers of two", axis)
    for name, f in for_dtype("foreach_learned_fake_quantize_backward", dtype):
        alone = dict(for_dtype("learned_fake_quantize_backward", dtype))[name](grad, *arguments)
        for results, want in zip(f(*lists, axis), alone, strict=True):
            assert len(results) == 3
            for got in results:
                assert_same_bits(got, want)
    want = reference.fake_quantize(*arguments)
    for _, f in for_dtype("foreach_fake_quantize", dtype):
        for got in f(*lists[1:], axis):
            assert_same_bits(got, want)


@given(data=st.data())
@examples(600)
def test_affine_act_learned_fake_quantize(data: st.DataObject) -> None:
    shape, dtype, bits = data.draw(shapes((2, 5))), data.draw(DTYPES), data.draw(st.integers(2, 8))
    act = data.draw(st.sampled_from(["none", "relu", "relu6"]))
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    rng = torch.Generator().manual_seed(data.draw(SEEDS))
    x, grad = data.draw(recipes(shape, dtype)).make(0.25), data.draw(recipes(shape, dtype)).make(1)
    scale, shift = (torch.randn(2, shape[1], generator=rng, dtype=compute) * 3).round()
    residual = data.draw(recipes(shape, dtype)).make(0.25) if data.draw(st.booleans()) else None
    kind = data.draw(st.sampled_from(["powers of two", "any"]))
    step = make_steps(kind, 1, data.draw(SEEDS), dtype)
    zero_point = torch.tensor([data.draw(st.integers(0, 2**bits - 1))], dtype=torch.int32)
    arguments = (grad, x, scale, shift, residual, act, step, zero_point, bits)
    need_residual, need_params = data.draw(st.booleans()), data.draw(st.booleans())

    wide = None if residual is None else residual.to(compute)
    u = reference.affine_act_fake_quantize(x.to(compute), scale, shift, wide, act, None, None, bits)
    before = reference.affine_act_fake_quantize(x.to(compute), scale, shift, wide, "none", None, None, bits)
    true, _ = oracle.learned_step_gradients(grad, u, step, zero_point, bits)
    flat = (before <= 0) & (act != "none") | (before >= 6) & (act == "relu6")
    du = torch.where(flat, 0, true)
    sure = ~near_ties(u.double(), 0.0, step, kind == "powers of two")
    plain = reference.affine_act_learned_fake_quantize_backward(*arguments, True, True)
    assert torch.equal(plain[1].double().nan_to_num()[sure], du.nan_to_num()[sure])
    for _, f in for_dtype("affine_act_learned_fake_quantize_backward", dtype):
        grad_x, grad_residual, grad_scale, grad_shift, grad_step = f(*arguments, need_residual, need_params)
        assert_same_bits(grad_x, plain[0])
        if need_residual:
            assert_same_bits(grad_residual, plain[1])
        assert_step_gradient(grad_step, grad, u, step, zero_point, bits, kind == "powers of two", None)
        used = plain[1].double()
        for value, products in ((grad_scale, used * x.double()), (grad_shift, used)):
            total, size = sums(products)
            assert value.shape == (shape[1] * need_params,) and value.dtype == compute
            if need_params:
                sound = size < 1e37
                lost = SUMMATION * size + x.numel() * UNDERFLOW[compute]
                assert_bounded(value[sound], total[sound], lost[sound])


STATISTICS = st.sampled_from(["normal", "large mean", "large mean", "constant", "small", "large", "outliers"])


def make_activations(shape: tuple[int, ...], dtype: torch.dtype, kind: str, seed: int) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    channels = along(torch.randn(shape[1], generator=rng, dtype=torch.float64), len(shape), 1)
    x = torch.randn(shape, generator=rng, dtype=torch.float64)
    return {
        "normal": lambda: x * 2 + channels,
        "large mean": lambda: x * 1e-2 + channels.sign() * 1e4 + channels,
        "constant": lambda: x * 0 + channels,
        "small": lambda: (x + channels) * 1e-6,
        "large": lambda: (x + channels) * 1e4,
        # What the first elements say about the mean is far from it.
        "outliers": lambda: x + torch.where(torch.arange(shape[0]) == 0, 1e4, 0.0).view(-1, *[1] * (len(shape) - 1)),
    }[kind]().to(dtype)


def draw_activations(data: st.DataObject) -> tuple[str, Tensor, Tensor, Tensor]:
    """(kind, x, running_mean, running_var), now and then with one NaN or infinity in x."""
    draw = data.draw
    recipe = draw(recipes(draw(shapes((2, 5), empty=False)), draw(DTYPES), STATISTICS))
    shape, dtype = recipe.layout.shape, recipe.dtype
    values = make_activations(shape, dtype, recipe.kind, recipe.seed)
    if draw(st.integers(0, 7)) == 0:
        values.view(-1)[draw(st.integers(0, values.numel() - 1))] = draw(st.sampled_from([NAN, INF, -INF]))
    x = recipe.layout.place(values)
    rng = torch.Generator().manual_seed(draw(SEEDS))
    var, mean = torch.var_mean(x.double(), [d for d in range(x.dim()) if d != 1], correction=0)
    near = draw(st.booleans())  # what a teacher has, or anything
    mean = torch.where(mean.isfinite() & near, mean, 0) + torch.randn(shape[1], generator=rng)
    var = torch.where(var.isfinite() & near, var, 1) * (0.5 + torch.rand(shape[1], generator=rng))
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    return recipe.kind, x, mean.to(compute), var.to(compute)


def assert_moments(kind: str, x: Tensor, mean: Tensor, var: Tensor) -> tuple[Tensor, ...]:
    """Within a few float32 roundings of float64's statistics; NaN in a channel is NaN there.

    Returns:
        True mean and var, how far from them mean and var may be, and which channels hold what is not finite.
    """
    assert mean.dtype == var.dtype == torch.float64
    rows = x.double().transpose(0, 1).reshape(x.shape[1], -1)
    true_mean = rows.sum(1) / rows.shape[1]
    true_var = (rows - true_mean[:, None]).square().sum(1) / rows.shape[1]
    size = rows.abs().amax(1)
    bad = ~rows.isfinite().all(1)
    assert (
        bool(var[bad].isnan().all())
        and not mean[bad].isfinite().any()
        and bool(mean[rows.isnan().any(1)].isnan().all())
    )
    # Distances from about the mean are summed in float32: what is lost is of their size, not of the mean's.
    mean_error = 2**-18 * true_var.sqrt() + 2**-44 * size
    var_error = (2**-14 if kind == "outliers" else 2**-17) * true_var + 2**-62 * size.square()
    assert_bounded(mean[~bad], true_mean[~bad], mean_error[~bad])
    assert_bounded(var[~bad], true_var[~bad], var_error[~bad])
    return true_mean, true_var, mean_error, var_error, bad


def assert_statistics(
    kind: str, x: Tensor, running: tuple[Tensor, Tensor], loss: Tensor, mean: Tensor, var: Tensor
) -> None:
    """:func:`assert_moments`, and the loss within what their errors may do to it; NaN in a channel is NaN there."""
    true_mean, true_var, mean_error, var_error, bad = assert_moments(kind, x, mean, var)
    assert bool(loss.isnan()) == bool(bad.any())
    if not bad.any():
        total = torch.zeros((), dtype=torch.float64)
        cost = torch.zeros((), dtype=torch.float64)
        for true, error, expected in ((true_mean, mean_error, running[0]), (true_var, var_error, running[1])):
            difference = (true - expected.double()).abs()
            error = error + 2**-24 * difference
            total = total + difference.square().mean()
            cost = cost + (2 * difference * error + error.square()).mean()
        assert_bounded(loss, total, cost + 2e-6 * total)


def statistics_gradient(
    x: Tensor, mean: Tensor, var: Tensor, running: tuple[Tensor, Tensor], grad: Tensor
) -> tuple[Tensor, Tensor]:
    """d(grad * loss)/dx in float64 for the statistics given, and the sizes of its terms."""
    m, v, rm, rv = (along(t.double(), x.dim(), 1) for t in (mean, var, *running))
    factor = 2 * grad.double() / x.numel()
    distance = x.double() - m
    value = factor * ((m - rm) + 2 * (v - rv) * distance)
    # x has the mean as a float32 taken off; the rest of the mean is added again.
    sizes = factor.abs() * ((m - rm).abs() + 2 * (v - rv).abs() * (distance.abs() + 2**-24 * m.abs()))
    return value, sizes.expand_as(value)


@given(data=st.data())
@examples(600)
def test_bn_match(data: st.DataObject) -> None:
    kind, x, *running = draw_activations(data)
    grad = torch.tensor(data.draw(st.sampled_from([1.0, 0.3, -1e3, 0.0])), dtype=running[0].dtype)
    for name, f in for_dtype("bn_match", x.dtype):
        loss, mean, var = f(x, *running)
        assert loss.dtype == running[0].dtype and mean.dtype == var.dtype == torch.float64
        assert_statistics(kind, x, running, loss, mean, var)
        backward = dict(implementations("bn_match_backward"))
        got = backward[name](grad, x, mean, var, *running)
        want, sizes = statistics_gradient(x, mean, var, running, grad)
        assert_bounded(got, want, 2 * rounding(sizes, x.dtype, operations=4))
        assert_same_bits(got, backward["reference"](grad, x, mean, var, *running))


@pytest.mark.parametrize("channels_last", [False, True])
def test_statistics_hold_where_squares_overflow_float32(channels_last: bool) -> None:
    values = (torch.randn(3, 5, 70, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 1e25).float()
    x = Layout((3, 5, 70), (0, 2, 1) if channels_last else (0, 1, 2), (1, 1, 1), 0, None).place(values)
    loss, mean, var = NATIVE.KERNELS["bn_match"](x, torch.zeros(5), torch.ones(5))
    true_var, true_mean = torch.var_mean(x.double(), (0, 2), correction=0)
    torch.testing.assert_close(mean, true_mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(var, true_var, rtol=1e-6, atol=0)
    assert loss == INF


@pytest.mark.parametrize("channels_last", [False, True])
def test_statistics_hold_where_the_first_elements_are_far_from_the_mean(channels_last: bool) -> None:
    values = torch.randn(4, 3, 20000, generator=torch.Generator().manual_seed(0))
    values[0, :, :20] += 1e4
    x = Layout((4, 3, 20000), (0, 2, 1) if channels_last else (0, 1, 2), (1, 1, 1), 0, None).place(values)
    true_var, true_mean = torch.var_mean(x.double(), (0, 2), correction=0)
    for _, f in implementations("bn_match"):
        _, mean, var = f(x, torch.zeros(3), torch.ones(3))
        torch.testing.assert_close(mean, true_mean, rtol=1e-6, atol=0)
        torch.testing.assert_close(var, true_var, rtol=3e-6, atol=0)


@given(data=st.data())
@examples(700)
def test_bn_match_forward(data: st.DataObject) -> None:
    kind, x, *running = draw_activations(data)
    compute, channels = running[0].dtype, x.shape[1]
    rng = torch.Generator().manual_seed(data.draw(SEEDS))
    weight = torch.randn(channels, generator=rng, dtype=compute) if data.draw(st.booleans()) else None
    bias = torch.randn(channels, generator=rng, dtype=compute) if data.draw(st.booleans()) else None
    eps = data.draw(st.sampled_from([1e-5, 1e-3, 0.0]))
    grad_loss = torch.tensor(data.draw(st.sampled_from([1.0, -1e3, 0.0])), dtype=compute)
    grad_y = data.draw(recipes(tuple(x.shape), x.dtype, st.sampled_from(["normal", "special"]))).make(1)

    true_y = oracle.batch_norm(x, *running, weight, bias, eps)
    sizes = true_y.abs() + (0 if bias is None else 2 * along(bias.double().abs(), x.dim(), 1))
    slope = along((1 if weight is None else weight.double()) / (running[1].double() + eps).sqrt(), x.dim(), 1)
    for name, f in for_dtype("bn_match_forward", x.dtype):
        y, loss, mean, var = f(x, *running, weight, bias, eps)
        assert y.dtype == x.dtype and loss.dtype == compute and mean.dtype == var.dtype == torch.float64
        assert_bounded(y, true_y, rounding(sizes, x.dtype, operations=8))
        assert_statistics(kind, x, running, loss, mean, var)
        backward = dict(implementations("bn_match_forward_backward"))
        arguments = (grad_y, x, grad_loss, mean, var, *running, weight, eps)
        got = backward[name](*arguments)
        assert_same_bits(y, reference.bn_match_forward(x, *running, weight, bias, eps)[0])
        assert_same_bits(got, backward["reference"](*arguments))
        want, parts = statistics_gradient(x, mean, var, running, grad_loss)
        want, parts = want + grad_y.double() * slope, parts + (grad_y.double() * slope).abs()
        assert_bounded(got, want, 2 * rounding(parts, x.dtype, operations=8))


def normalisation(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(u, x_hat, weight, 1 / deviation, size of what is rounded in u) in float64 for the statistics given."""

    def of_samples(values: Tensor | None, otherwise: float) -> Tensor:
        values = torch.tensor(otherwise) if values is None else values
        return values.double().expand(x.shape[:2])[(...,) + (None,) * (x.dim() - 2)]

    inverse = along(1 / (var + eps).sqrt(), x.dim(), 1)
    x_hat = (x.double() - along(mean, x.dim(), 1)) * inverse
    weights, biases = of_samples(weight, 1), of_samples(bias, 0)
    # x has the mean as a float32 taken off; the rest of the mean is added again.
    apart = 2**-24 * along(mean.abs(), x.dim(), 1) * inverse
    return x_hat * weights + biases, x_hat, weights, inverse, (x_hat.abs() + apart) * weights.abs() + biases.abs()


@given(data=st.data())
@examples(250)
def test_batch_norm_act(data: st.DataObject) -> None:
    kind, x, *_ = draw_activations(data)
    compute, seed = torch.float64 if x.dtype == torch.float64 else torch.float32, data.draw(SEEDS)
    form = x.shape[:2] if data.draw(st.booleans()) else x.shape[1:2]
    drawn = torch.randn(2, *form, generator=torch.Generator().manual_seed(seed), dtype=compute)
    weight, bias = (values if data.draw(st.booleans()) else None for values in drawn)
    eps, slope = data.draw(st.sampled_from([1e-5, 1e-3])), data.draw(st.sampled_from([1.0, 0.2, 0.0]))
    grad_y = data.draw(recipes(tuple(x.shape), x.dtype, st.just("normal"))).make(1)
    others = [d for d in range(x.dim()) if d != 1]
    shared = others if len(form) == 1 else others[1:]
    count = x.numel() // x.shape[1]
    tiny, summed = (2**-53, 2**-40) if x.dtype == torch.float64 else (2**-24, 2**-16)

    def total(values: Tensor, dims: list[int]) -> Tensor:
        return values.sum(dims) if dims else values

    for name, f in for_dtype("batch_norm_act", x.dtype):
        y, mean, var = f(x, weight, bias, eps, slope)
        assert y.dtype == x.dtype and y.stride() == torch.empty_like(x).stride()
        assert_moments(kind, x, mean, var)
        u, x_hat, weights, inverse, sizes = normalisation(x, mean, var, weight, bias, eps)
        assert_bounded(y, torch.where(u > 0, u, slope * u), rounding(sizes, x.dtype, operations=8))

        backward = dict(implementations("batch_norm_act_backward"))[name]
        grad_x, grad_weight, grad_bias = backward(grad_y, x, mean, var, weight, bias, eps, slope)
        # On which side of the kink u is, is unknown to so much.
        jump = torch.where(u.abs() <= 8 * tiny * sizes, (1 - slope) * grad_y.double().abs(), 0.0)
        g = torch.where(u > 0, grad_y.double(), slope * grad_y.double())
        wide = x_hat.abs() + tiny * along(mean.abs(), x.dim(), 1) * inverse
        unsure, unsure_hat = (total(jump + summed * g.abs() * size, shared) for size in (1, wide))
        if bias is None:
            assert grad_bias.shape == (0,)
        else:
            assert_bounded(grad_bias, total(g, shared), rounding(total(g, shared), compute) + unsure)
        if weight is None:
            assert grad_weight.shape == (0,)
        else:
            want = total(g * x_hat, shared)
            assert_bounded(grad_weight, want, rounding(want, compute) + unsure_hat)
        parts = [(weights * g * factor).sum(others, keepdim=True) / count for factor in (1, x_hat)]
        want = inverse * (weights * g - parts[0] - x_hat * parts[1])
        errors = [
            (weights.abs() * (jump + summed * g.abs() * size)).sum(others, keepdim=True) / count for size in (1, wide)
        ]
        allowed = inverse * (weights.abs() * jump + errors[0] + wide * errors[1])
        magnitude = inverse * ((weights * g).abs() + parts[0].abs() + wide * parts[1].abs())
        assert_bounded(grad_x, want, 2 * (allowed + rounding(magnitude, x.dtype, operations=8)))


@given(data=st.data())
@examples(300)
def test_losses_on_logits(data: st.DataObject) -> None:
    batch, classes = data.draw(st.integers(1, 20)), data.draw(st.sampled_from([1, 2, 3, 7, 10, 16, 17, 33, 100]))
    dtype, rng = data.draw(DTYPES), torch.Generator().manual_seed(data.draw(SEEDS))
    shape, spread = (batch, classes), data.draw(st.sampled_from([1e-3, 1.0, 10.0, 300.0]))
    teacher, student = (torch.randn(2, *shape, generator=rng, dtype=torch.float64) * spread).to(dtype)
    if data.draw(st.booleans()):
        student = (teacher.double() + student.double() * 1e-2).to(dtype)
    poisoned = data.draw(st.integers(0, 9)) == 0
    if poisoned:
        teacher[0, classes - 1] = NAN
    teacher, student = data.draw(layouts(shape, expand=False)).place(teacher), data.draw(layouts(shape)).place(student)
    labels = torch.randint(0, classes, (batch,), generator=rng)
    options = (0.3, 0.6, 0.2, 0.1, 0.7, data.draw(st.booleans()))
    temperature = data.draw(st.sampled_from([1.0, 5.0, 20.0]))
    exact = teacher.double(), student.double()
    for op, arguments in (("margin_loss", (labels, *options)), ("entropy_distillation", (temperature,))):
        want = reference.KERNELS[op](*exact, *arguments)
        for name, f in for_dtype(op, dtype):
            got = f(teacher, student, *arguments)
            if poisoned:
                assert bool(got[0].isnan()) and bool(got[-1].isnan().any())
                continue
            if name == "reference":
                continue
            for value, true in zip(got, want, strict=True):
                limit = 2e-6 * true.abs().max() + 1e-9
                assert_bounded(value, true, rounding(true, value.dtype, operations=8) + limit)


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


#: More than a thread takes for itself (csrc/cpu/parallel.h), three times.
SHARED = 3 * 16384 + 1
#: Shapes are [n, C, inner] with n as large as it takes; channels_last is [n, inner, C].
PLANES = st.sampled_from([(1, 1), (3, 1), (3, 5), (17, 16), (64, 49), (65, 361), (300, 3), (1000, 1), (1, 5000)])


@given(data=st.data())
@examples(40)
def test_results_do_not_depend_on_the_number_of_threads(data: st.DataObject) -> None:
    channels, inner = data.draw(PLANES)
    extra = data.draw(st.integers(0, 9))
    shape = (SHARED // (channels * inner) + 1 + extra, channels, inner)
    dtype, layout = data.draw(st.sampled_from(NATIVE_DTYPES)), (0, 2, 1) if data.draw(st.booleans()) else (0, 1, 2)
    seed, act = data.draw(SEEDS), data.draw(st.sampled_from(["none", "relu", "relu6"]))
    place = Layout(shape, layout, (1, 1, 1), 0, None).place
    x, grad, residual = (place(make(shape, dtype, "normal", seed + i, torch.tensor(0.2))) for i in range(3))
    scale, mean, var = torch.rand(3, channels, generator=torch.Generator().manual_seed(seed)) + 0.05
    rows = [] if data.draw(st.booleans()) else [shape[0]]
    per_sample = torch.randn(2, *rows, channels, generator=torch.Generator().manual_seed(seed))
    zero_point = torch.full((channels,), 5, dtype=torch.int32)
    step, zero, loss_grad = torch.tensor([0.1]), torch.tensor([5], dtype=torch.int32), torch.tensor(0.3)

    def results() -> dict[str, list[Tensor]]:
        state, own = range_state((0.0, 0.0), 0), x.clone()
        calls: dict[str, tuple[Any, ...]] = {
            "fake_quantize": (x, scale, zero_point, 4, 1),
            "fake_quantize_backward": (grad, x, scale, zero_point, 4, 1),
            "fake_quantize_": (own, scale, zero_point, 4, 1),
            "learned_fake_quantize_backward": (grad, x, scale, zero_point, 4, 1),
            "foreach_fake_quantize": ([x, grad], [scale] * 2, [zero_point] * 2, [4, 3], 1),
            "foreach_learned_fake_quantize_backward": (
                *([grad, x, grad], [x, grad, x], [scale] * 3, [zero_point] * 3, [4, 2, 8]),
                1,
            ),
            "affine_act_learned_fake_quantize_backward": (
                *(grad, x, scale, mean, residual, act, step, zero, 4),
                *(True, True),
            ),
            "dynamic_fake_quantize": (x, 4, 1),
            "foreach_dynamic_fake_quantize": ([x, grad, x[:7]], [4, 2, 8], 1),
            "observe_fake_quantize": (x, *state, 4, 0.9),
            "affine_act_fake_quantize": (x, scale, mean, residual, act, step, zero, 4),
            "affine_act_fake_quantize_backward": (grad, x, scale, mean, residual, act, True, True),
            "bn_match": (x, mean, var),
            "bn_match_backward": (loss_grad, x, scale.double(), var.double(), mean, mean),
            "bn_match_forward": (x, mean, var, scale, mean, 1e-5),
            "bn_match_forward_backward": (grad, x, loss_grad, scale.double(), var.double(), mean, mean, scale, 1e-5),
            "batch_norm_act": (x, *per_sample, 1e-5, 0.2),
            "batch_norm_act_backward": (grad, x, mean.double(), var.double(), *per_sample, 1e-5, 0.2),
        }
        found = {}
        for op, arguments in calls.items():
            out = implementations(op)[-1][1](*arguments)
            flat = [out] if isinstance(out, Tensor) else [*(out or ())]
            found[op] = [t for part in flat for t in (part if isinstance(part, list) else [part])]
        found["fake_quantize_"] = [own]
        found["observe_fake_quantize"] += list(state)
        return found

    with threads(1):
        alone = results()
    for got, want in zip(alone["fake_quantize_"], alone["fake_quantize"], strict=True):
        assert_same_bits(got, want)
    for count in (2, 3):
        with threads(count):
            for op, values in results().items():
                if len(implementations(op)) > 1:
                    for got, want in zip(values, alone[op], strict=True):
                        assert_same_bits(got, want)
