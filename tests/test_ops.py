"""Every operator against the float64 oracle: forward, gradient, layouts, dtypes, degenerate sizes."""

from __future__ import annotations

import math
from collections.abc import Callable

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import adadfq
from adadfq import functional as F
from adadfq.ops import cpu, dispatch, reference, triton
from adadfq.ops.schema import OPERATORS

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
#: Half a unit in the last place, relative: what rounding a result to the dtype may cost.
#: Half the smallest subnormal: what underflow may cost.
SMALLEST = {torch.float32: 0.0, torch.bfloat16: 0.0, torch.float16: 2**-25}
ROUNDING = {torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float64: 2**-53}


def _randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _layouts(dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
    base, dense = _randn(4, 6, 10, 12, dtype=dtype, seed=seed), _randn(3, 5, 7, 9, dtype=dtype, seed=seed)
    return {
        "contiguous": dense,
        "channels_last": dense.contiguous(memory_format=torch.channels_last),
        "sliced": base[1:, ::2, 2:9, 1::3],
        "transposed": base.transpose(0, 3),
        "expanded": base[:1].expand(4, 6, 10, 12),
        "empty": _randn(2, 0, 3, 3, dtype=dtype),
        "single element": _randn(1, 1, 1, 1, dtype=dtype, seed=seed),
        "one dimension": _randn(17, dtype=dtype, seed=seed),
    }


LAYOUTS = list(_layouts(torch.float32))
#: Those a layer's input [N, C, ...] may have.
LAYER_LAYOUTS = [name for name in LAYOUTS if name not in ("empty", "one dimension")]


def _need(backend: str, op: str) -> None:
    """Skip the test where a GPU's backend has no kernel for `op`."""
    if op not in dispatch.BACKENDS[backend].KERNELS:
        pytest.skip(f"{backend} has no {op}")


def _compute(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _with_axes(*axes: int | None) -> pytest.MarkDecorator:
    """Every layout with every axis it has."""
    sizes = {name: x.dim() for name, x in _layouts(torch.float32).items()}
    pairs = [(name, axis) for name in LAYOUTS for axis in axes if axis is None or axis < sizes[name]]
    return pytest.mark.parametrize("layout,axis", pairs)


def _broadcast(values: Tensor, x: Tensor, axis: int | None) -> Tensor:
    return values.reshape(()) if axis is None else values.reshape([-1 if d == axis else 1 for d in range(x.dim())])


def _assert_quantised(x_hat: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> None:
    """Equal to the oracle away from rounding ties; at most one step from it next to them."""
    assert x_hat.dtype == x.dtype and x_hat.shape == x.shape
    expected = oracle.quantize(x, scale, zero_point, bits)
    error = (x_hat.double() - expected).abs()
    rounding = expected.abs() * (ROUNDING[x.dtype] + 2**-23)
    near_tie = oracle.tie_distance(x, scale) < 1e-4
    assert bool((error[~near_tie] <= rounding[~near_tie]).all())
    assert bool((error <= rounding + scale.double().expand_as(error) * 1.0001).all())
    # Where it is off by more than rounding it is off by exactly one step, not by some fraction.
    steps = (error / scale.double()).round()
    assert bool(((error - steps * scale.double()).abs() <= rounding * 2 + 1e-12).all())


@_with_axes(None, 0, 1, -1)
@pytest.mark.parametrize("dtype", DTYPES)
def test_fake_quantize_forward(backend: str, layout: str, dtype: torch.dtype, axis: int | None) -> None:
    x = _layouts(dtype)[layout]
    channels = 1 if axis is None else x.shape[axis]
    scale = 0.05 + torch.rand(channels, generator=torch.Generator().manual_seed(1)) * 0.3
    zero_point = torch.randint(0, 16, (channels,), generator=torch.Generator().manual_seed(2))
    x_hat = F.fake_quantize(x, scale, zero_point, 4, axis)
    positive = None if axis is None else axis % x.dim()
    _assert_quantised(x_hat, x, _broadcast(scale, x, positive), _broadcast(zero_point, x, positive), 4)


@_with_axes(None, 1)
@pytest.mark.parametrize("dtype", DTYPES)
def test_fake_quantize_gradient(backend: str, layout: str, dtype: torch.dtype, axis: int | None) -> None:
    x = _layouts(dtype)[layout]
    channels = 1 if axis is None else x.shape[axis]
    step = torch.tensor(0.1)
    scale, zero_point = step.expand(channels), torch.full((channels,), 5)
    grad = _randn(*x.shape, dtype=dtype, seed=3)
    for clip in (False, True):
        leaf = x.detach().requires_grad_()
        F.fake_quantize(leaf, scale, zero_point, 4, axis, clip_grad=clip).backward(grad)
        code = torch.round(x.double() / step.double()) + 5
        inside = ((code >= 0) & (code <= 15)) | (not clip)
        sure = (oracle.tie_distance(x, step) > 1e-4) | (not clip)
        assert leaf.grad is not None
        assert torch.equal(leaf.grad[sure], torch.where(inside, grad, torch.zeros_like(grad))[sure])


def _outside(x: Tensor) -> Tensor:
    """The elements of the memory of `x` that are not its own."""
    assert x._base is not None
    outside = torch.ones(x._base.shape, dtype=torch.bool)
    outside.as_strided(x.shape, x.stride(), x.storage_offset()).fill_(False)
    return x._base[outside]


@_with_axes(None, 0, 1, -1)
@pytest.mark.parametrize("dtype", DTYPES)
def test_fake_quantize_in_place(backend: str, layout: str, dtype: torch.dtype, axis: int | None) -> None:
    x = _layouts(dtype)[layout]
    channels = 1 if axis is None else x.shape[axis]
    scale = 0.05 + torch.rand(channels, generator=torch.Generator().manual_seed(1)) * 0.3
    zero_point = torch.randint(0, 16, (channels,), generator=torch.Generator().manual_seed(2))
    if layout == "expanded":  # one address for several elements, as for any operation in place
        with pytest.raises((RuntimeError, ValueError)):
            F.fake_quantize(x, scale, zero_point, 4, axis, inplace=True)
        return
    expected = F.fake_quantize(x, scale, zero_point, 4, axis)
    address, strides, version = x.data_ptr(), x.stride(), x._version
    outside = _outside(x).clone() if layout == "sliced" else None
    assert F.fake_quantize(x, scale, zero_point, 4, axis, inplace=True) is x
    assert x.data_ptr() == address and x.stride() == strides and x._version > version
    assert torch.equal(x, expected)
    assert outside is None or torch.equal(_outside(x), outside)


def test_gradient_passes_fake_quantize_in_place(backend: str) -> None:
    quantizer = (torch.tensor(0.1), torch.tensor(5), 4)
    grad = _randn(4, 6, seed=3)
    leaf = _randn(4, 6).requires_grad_()
    F.fake_quantize(leaf * 2, *quantizer, inplace=True).backward(grad)
    assert leaf.grad is not None and torch.equal(leaf.grad, 2 * grad)

    leaf = _randn(4, 6).requires_grad_()
    whole = leaf * 2
    F.fake_quantize(whole[1:3, ::2], *quantizer, inplace=True)
    expected = (leaf * 2).detach()
    expected[1:3, ::2] = F.fake_quantize(expected[1:3, ::2], *quantizer)
    assert torch.equal(whole, expected)
    whole.backward(grad)
    assert leaf.grad is not None and torch.equal(leaf.grad, 2 * grad)


def test_a_backward_sees_that_what_it_saved_was_quantised(backend: str) -> None:
    leaf = _randn(4, 6).requires_grad_()
    saved = leaf.exp()
    F.fake_quantize(saved, torch.tensor(0.1), torch.tensor(5), 4, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.sum().backward()


def test_a_leaf_may_be_quantised_in_place_without_autograd(backend: str) -> None:
    leaf = _randn(4, 6).requires_grad_()
    quantizer = (torch.tensor(0.1), torch.tensor(5), 4)
    expected = F.fake_quantize(leaf, *quantizer)
    with torch.no_grad():
        F.fake_quantize(leaf, *quantizer, inplace=True)
    assert torch.equal(leaf, expected) and leaf.requires_grad and leaf.is_leaf


@_with_axes(0, 1)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [2, 3, 8])
def test_dynamic_fake_quantize(backend: str, layout: str, dtype: torch.dtype, axis: int, bits: int) -> None:
    x = _layouts(dtype)[layout]
    leaf = x.detach().requires_grad_()
    x_hat, scale, zero_point = F.dynamic_fake_quantize(leaf, bits, axis)
    assert scale.shape == zero_point.shape == (x.shape[axis],)
    assert scale.dtype == torch.float32 and zero_point.dtype == torch.int32
    grad = _randn(*x.shape, dtype=dtype, seed=4)
    x_hat.backward(grad)
    assert leaf.grad is not None and torch.equal(leaf.grad, grad)
    if x.numel() == 0:
        return
    rows = x.movedim(axis, 0).flatten(1) if x.dim() > 1 else x.reshape(-1, 1)
    true_scale, true_zero_point = oracle.quantizer_range(rows.amin(1), rows.amax(1), bits)
    torch.testing.assert_close(scale.double(), true_scale, rtol=2**-23, atol=0)
    unsure = (-rows.amin(1).double() / true_scale + 0.5).frac().abs() < 1e-4
    assert torch.equal(zero_point[~unsure].double(), true_zero_point[~unsure])
    _assert_quantised(x_hat.detach(), x, _broadcast(scale, x, axis), _broadcast(zero_point, x, axis), bits)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("bits", [4, "mixed"])
def test_foreach_equals_one_by_one(backend: str, dtype: torch.dtype, axis: int, bits: int | str) -> None:
    tensors = [x.detach() for name, x in _layouts(dtype).items() if name != "one dimension"]
    tensors += [_randn(70, 3, 1, 1, dtype=dtype, seed=1), tensors[0]]
    widths = [bits] * len(tensors) if isinstance(bits, int) else [2 + i % 7 for i in range(len(tensors))]
    leaves = [x.detach().requires_grad_() for x in tensors]
    results = F.foreach_dynamic_fake_quantize(leaves, widths if bits == "mixed" else bits, axis)
    assert all(isinstance(r, list) and len(r) == len(tensors) for r in results)
    for x, width, got in zip(tensors, widths, zip(*results, strict=True), strict=True):
        for value, want in zip(got, F.dynamic_fake_quantize(x, width, axis), strict=True):
            assert value.dtype == want.dtype and value.stride() == want.stride() and torch.equal(value, want)
    grads = [_randn(*x.shape, dtype=dtype, seed=i) for i, x in enumerate(tensors)]
    # The outputs that take no part: their inputs get no gradient, the others theirs.
    used = [i for i in range(len(tensors)) if i % 3 != 1]
    assert all(r.requires_grad for r in results[0]) and not any(r.requires_grad for r in results[1] + results[2])
    torch.autograd.backward([results[0][i] for i in used], [grads[i] for i in used])
    for i, leaf in enumerate(leaves):
        assert torch.equal(leaf.grad, grads[i]) if i in used else leaf.grad is None


def test_foreach_takes_different_shapes_the_same_tensor_twice_and_nothing(backend: str) -> None:
    x = _randn(3, 4).requires_grad_()
    tensors = (x, _randn(5), x, _randn(2, 3, 4, 5), _randn(1, 1))
    x_hats, scales, zero_points = F.foreach_dynamic_fake_quantize(tensors, [4, 2, 3, 8, 5])
    for i, bits in enumerate([4, 2, 3, 8, 5]):
        for got, want in zip(
            (x_hats[i], scales[i], zero_points[i]), F.dynamic_fake_quantize(tensors[i], bits), strict=True
        ):
            assert torch.equal(got, want)
    (x_hats[0] + 2 * x_hats[2]).sum().backward()
    assert x.grad is not None and torch.equal(x.grad, torch.full((3, 4), 3.0))
    assert F.foreach_dynamic_fake_quantize([], 4) == ([], [], []) == F.foreach_dynamic_fake_quantize([], [])


def _range_state(shape: tuple[int, ...] = ()) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    count, zero_point = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int32)
    return torch.zeros(shape), torch.zeros(shape), count, torch.ones(shape), zero_point


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "empty"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("momentum", [0, 0.9, 0.999])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_observe_fake_quantize(
    backend: str, layout: str, dtype: torch.dtype, momentum: float, shape: tuple[int, ...]
) -> None:
    state = running_min, running_max, num_batches, scale, zero_point = _range_state(shape)
    lows, highs = [], []
    for seed in range(5):
        x = _layouts(dtype, seed)[layout].detach()
        lows.append(float(x.min()))
        highs.append(float(x.max()))
        x.requires_grad_()
        versions = [s._version for s in state]
        x_hat = F.observe_fake_quantize(x, *state, 4, momentum)
        assert all(s._version > version for s, version in zip(state, versions, strict=True))
        assert [s.dtype for s in state] == [torch.float32, torch.float32, torch.int64, torch.float32, torch.int32]
        assert all(s.shape == shape for s in state) and int(num_batches) == seed + 1
        size = max(map(abs, lows + highs))
        for running, ends in ((running_min, lows), (running_max, highs)):
            assert abs(float(running) - oracle.moving_average(ends, momentum)) <= 2**-24 * (seed + 2) * size
        true_scale, true_zero_point = oracle.quantizer_range(running_min, running_max, 4)
        torch.testing.assert_close(scale.double(), true_scale, rtol=2**-23, atol=0)
        if float(oracle.tie_distance(running_min.clamp(max=0), true_scale)) > 1e-4:
            assert torch.equal(zero_point.double(), true_zero_point)
        _assert_quantised(x_hat.detach(), x.detach(), scale, zero_point, 4)
        grad = _randn(*x.shape, dtype=dtype, seed=seed + 10)
        x_hat.backward(grad)
        assert x.grad is not None and torch.equal(x.grad, grad)


@pytest.mark.parametrize("momentum", [0.0, 1e-300, 0.9, 0.999999, 1 - 1e-9])
@pytest.mark.parametrize("past", [0.0, 2.0])
def test_observe_after_a_million_batches(backend: str, momentum: float, past: float) -> None:
    state = running_min, running_max, num_batches, *_ = _range_state()
    running_min.fill_(-past)
    running_max.fill_(past)
    num_batches.fill_(10**6 - 1)
    F.observe_fake_quantize(torch.tensor([-3.0, 5.0]), *state, 8, momentum)
    rate = oracle.moving_average_rate(10**6, momentum)
    for running, expected in ((running_min, -past + rate * (past - 3)), (running_max, past + rate * (5 - past))):
        assert abs(float(running) - expected) <= 2**-24 * abs(expected)
    assert int(num_batches) == 10**6


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", [0, 5, 40])
def test_observe_lets_nan_and_infinity_through(backend: str, bad: float, where: int) -> None:
    x = _randn(41)
    x[where] = bad
    for first in (False, True):
        state = running_min, running_max, num_batches, scale, zero_point = _range_state()
        if not first:
            F.observe_fake_quantize(_randn(7), *state, 4)
        x_hat = F.observe_fake_quantize(x, *state, 4)
        assert bool(x_hat.isnan().all()) and bool(scale.isnan()) and int(zero_point) == 0
        assert bool(running_max.isfinite()) == (bad == -math.inf)
        assert bool(running_min.isfinite()) == (bad == math.inf)
        assert bool(running_min.isnan()) == bool(running_max.isnan()) == math.isnan(bad)
        assert int(num_batches) == 2 - first


def test_observe_equals_quant_act(backend: str) -> None:
    act = adadfq.QuantAct(4, momentum=0.8)
    state = _range_state()
    for seed in range(4):
        x = _randn(3, 5, 7, seed=seed) + seed
        x_hat = F.observe_fake_quantize(x, *state, 4, 0.8)
        assert torch.equal(x_hat, act(x))
        names = ("running_min", "running_max", "num_batches", "scale", "zero_point")
        for name, value in zip(names, state, strict=True):
            assert torch.equal(value, getattr(act, name)), name


@pytest.mark.parametrize(
    "change",
    [
        {"x": torch.zeros(0)},
        {"x": torch.zeros(3, dtype=torch.int32)},
        {"bits": 1},
        {"momentum": 1.0},
        {"momentum": -0.1},
        {"momentum": math.nan},
        {"running_max": torch.zeros((), dtype=torch.float64)},
        {"running_min": torch.zeros(2)},
        {"num_batches": torch.zeros((), dtype=torch.int32)},
        {"zero_point": torch.zeros((), dtype=torch.int64)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_refused_input_leaves_a_range_as_it_was(backend: str, change: dict[str, object]) -> None:
    names = ("running_min", "running_max", "num_batches", "scale", "zero_point")
    state = dict(zip(names, _range_state(), strict=True))
    F.observe_fake_quantize(_randn(9), *state.values(), 4)
    before = {name: value.clone() for name, value in state.items()}
    with pytest.raises(adadfq.InvalidInputError):
        F.observe_fake_quantize(**{"x": _randn(9, seed=1), **state, "bits": 4, "momentum": 0.9, **change})
    assert all(torch.equal(state[name], before[name]) for name in names)


#: Relative, of the sizes of the terms added up: what a few float32 operations may cost.
ARITHMETIC = 2**-21


def _layer(layout: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x, scale [C], shift [C], residual) with scales of both signs."""
    x = _layouts(dtype)[layout]
    scale = 0.2 + torch.rand(x.shape[1], generator=torch.Generator().manual_seed(1)) * 3
    scale[1::3] *= -1
    return x, scale, _randn(x.shape[1], seed=5), _randn(*x.shape, dtype=dtype, seed=6)


@pytest.mark.parametrize("layout", [*LAYER_LAYOUTS, "empty"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act", ["none", "relu", "relu6"])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("quantised", [False, True])
def test_affine_act_fake_quantize(
    backend: str, layout: str, dtype: torch.dtype, act: str, with_residual: bool, quantised: bool
) -> None:
    tensors = [t.detach() for t in _layer(layout, dtype)[: 4 if with_residual else 3]]
    ours, exact = [t.clone() for t in tensors], [t.double() for t in tensors]
    ours[0] = tensors[0]
    for t in (*ours, *exact):
        t.requires_grad_()
    step, zero_point = torch.tensor(0.37), torch.tensor(6)
    x, scale, shift, residual = [*ours, None][:4]
    y = F.affine_act_fake_quantize(x, scale, shift, residual, act, (step, zero_point, 4) if quantised else None)
    assert y.dtype == dtype and y.shape == x.shape

    u = oracle.affine(*[*exact, None][:4])
    expected = oracle.activation(u, act)
    terms = oracle.affine(*[t.abs() for t in exact[:3]], exact[3].abs() if with_residual else None).detach()
    slack = ARITHMETIC * terms
    if quantised:
        near_tie = oracle.tie_distance(expected.detach(), step) < (slack / step + 1e-4)
        expected = oracle.straight_through(expected, step, zero_point, 4)
        slack = torch.where(near_tie, float(step) * 1.0001, 0.0)
    error = (y.double() - expected).abs().detach()
    rounding = expected.abs().detach() * (ROUNDING[dtype] + 2**-23) + SMALLEST[dtype]
    assert bool((error <= slack + rounding).all())

    grad = _randn(*x.shape, dtype=dtype, seed=7)
    y.backward(grad)
    expected.backward(grad.double())
    kinks = {"none": [], "relu": [0.0], "relu6": [0.0, 6.0]}[act]
    unsure = torch.zeros(x.shape, dtype=torch.bool)
    for kink in kinks:
        unsure |= (u.detach() - kink).abs() < ARITHMETIC * terms
    assert float(unsure.double().mean()) < 0.01 or x.numel() == 0
    for got, want in zip(ours, exact, strict=True):
        assert got.grad is not None and want.grad is not None and got.grad.dtype == got.dtype
        if got.shape == x.shape:
            error = (got.grad.double() - want.grad).abs()
            allowed = want.grad.abs() * (ROUNDING[dtype] + 2**-23) + SMALLEST[dtype]
            assert bool((error <= allowed)[~unsure].all())
        elif x.numel():
            assert not unsure.any()
            total = (grad.double().abs() * (x.double().abs() + 1)).transpose(0, 1).flatten(1).sum(1)
            assert bool(((got.grad.double() - want.grad).abs() <= 1e-6 * total).all())
        else:
            assert got.grad.numel() == 0


@pytest.mark.parametrize("needed", range(16))
@pytest.mark.parametrize("act", ["none", "relu"])
def test_affine_gives_the_gradients_that_are_asked_for(backend: str, needed: int, act: str) -> None:
    tensors = [t.detach().requires_grad_() for t in _layer("contiguous", torch.float32)]
    y = F.affine_act_fake_quantize(*tensors, act, (torch.tensor(0.1), torch.tensor(3), 4))
    every = torch.autograd.grad(y.square().sum(), tensors)
    some = [t.detach().requires_grad_(bool(needed >> i & 1)) for i, t in enumerate(tensors)]
    y = F.affine_act_fake_quantize(*some, act, (torch.tensor(0.1), torch.tensor(3), 4))
    assert y.requires_grad == bool(needed)
    if needed:
        y.square().sum().backward()
    for i, (t, want) in enumerate(zip(some, every, strict=True)):
        assert torch.equal(t.grad, want) if needed >> i & 1 else t.grad is None


@pytest.mark.parametrize(
    "act,values,slopes",
    [
        ("none", [-2, 0, 0, 3, 6, 9, math.nan, math.inf, -math.inf], [1, 1, 1, 1, 1, 1, 1, 1, 1]),
        ("relu", [0, 0, 0, 3, 6, 9, math.nan, math.inf, 0], [0, 0, 0, 1, 1, 1, 1, 1, 0]),
        ("relu6", [0, 0, 0, 3, 6, 6, math.nan, 6, 0], [0, 0, 0, 1, 0, 0, 1, 0, 0]),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels_last", [False, True])
def test_activations_at_their_kinks(
    backend: str, act: str, values: list[float], slopes: list[int], dtype: torch.dtype, channels_last: bool
) -> None:
    """PyTorch's conventions: no slope at 0 nor at 6; NaN passes, and passes its gradient."""
    u = torch.tensor([-2, 0.0, -0.0, 3, 6, 9, math.nan, math.inf, -math.inf], dtype=dtype)
    for residual in (None, torch.zeros(2, 3, 3, 6, dtype=dtype)):
        x = u.repeat(2, 3, 2, 1)[:, :, :, None, :].reshape(2, 3, 3, 6)
        x = (x.contiguous(memory_format=torch.channels_last) if channels_last else x).requires_grad_()
        y = F.affine_act_fake_quantize(x, torch.ones(3), torch.zeros(3), residual, act)
        y.backward(torch.full_like(y, 2))
        order = y.detach().reshape(-1, 9).double()
        torch.testing.assert_close(order, torch.tensor(values).double().expand_as(order), equal_nan=True)
        assert x.grad is not None
        slope = x.grad.reshape(-1, 9).double() / 2
        assert torch.equal(slope, torch.tensor(slopes).double().expand_as(slope))


@pytest.mark.parametrize("act", ["none", "relu", "relu6"])
def test_affine_lets_nan_through_its_quantiser(backend: str, act: str) -> None:
    x, scale, shift, residual = (t.detach() for t in _layer("contiguous", torch.float32))
    x[0, 1, 2, 3], residual[1, 2, 3, 4] = math.nan, math.nan
    y = F.affine_act_fake_quantize(x, scale, shift, residual, act, (torch.tensor(0.1), torch.tensor(3), 4))
    assert torch.equal(y.isnan(), x.isnan() | residual.isnan())


def test_codes_are_those_of_the_fake_quantised_value(backend: str) -> None:
    x = _randn(2, 3, 4, 5) * 4
    x[0, 0, 0, :3] = torch.tensor([math.nan, math.inf, -math.inf])
    scale, shift = torch.tensor([1.0, -0.5, 2.0]), torch.tensor([0.0, 1.0, -1.0])
    step, zero_point = torch.tensor(0.3), torch.tensor(5)
    for layout in (torch.contiguous_format, torch.channels_last):
        x = x.contiguous(memory_format=layout).requires_grad_()
        codes = F.affine_act_quantize(x, scale, shift, x * 0.5, "none", (step, zero_point, 4))
        assert codes.dtype == torch.uint8 and codes.stride() == x.stride() and not codes.requires_grad
        want = F.affine_act_fake_quantize(x, scale, shift, x * 0.5, "none", (step, zero_point, 4)).detach()
        assert codes[0, 0, 0, :3].tolist() == [0, 15, 0]
        decoded = (codes.float() - zero_point) * step
        assert torch.equal(decoded[~want.isnan()], want[~want.isnan()])


def test_quantizer_holds_zero_and_the_ends_of_its_range(backend: str) -> None:
    x = torch.tensor([[0.0, 0.3, 1.0], [-1.0, -0.2, 0.0], [-0.5, 0.0, 1.0], [2.0, 3.0, 4.0], [0.0, 0.0, 0.0]])
    x_hat, scale, zero_point = F.dynamic_fake_quantize(x, 4)
    assert torch.equal(x_hat == 0, x == 0) or bool((x_hat[x == 0] == 0).all())
    torch.testing.assert_close(x_hat[0, 2], torch.tensor(1.0))
    torch.testing.assert_close(x_hat[1, 0], torch.tensor(-1.0))
    assert zero_point.tolist() == [0, 15, 5, 0, 0] and scale[4] == 1


def test_quantizer_passes_nan_and_saturates_infinity(backend: str) -> None:
    x = torch.tensor([math.nan, math.inf, -math.inf, 0.1])
    x_hat = F.fake_quantize(x, torch.tensor(0.1), torch.tensor(4), 4)
    assert math.isnan(x_hat[0])
    torch.testing.assert_close(x_hat[1:], torch.tensor([1.1, -0.4, 0.1]))
    rows, scale, _ = F.dynamic_fake_quantize(torch.tensor([[math.nan, 1.0], [math.inf, 1.0], [1.0, 2.0]]), 4)
    assert rows.isnan().all(1).tolist() == [True, True, False] and scale.isnan().tolist() == [True, True, False]


@settings(deadline=None, max_examples=200)
@given(
    values=st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=40),
    bits=st.integers(2, 8),
)
def test_quantizer_properties(values: list[float], bits: int) -> None:
    x = torch.tensor([values])
    with adadfq.use_backend("cpu"):
        x_hat, scale, zero_point = F.dynamic_fake_quantize(x, bits)
        again = F.fake_quantize(x_hat, scale, zero_point, bits, 0)
    codes = x_hat / scale + zero_point
    assert 0 <= int(zero_point) <= 2**bits - 1
    torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-3)
    assert codes.round().min() >= 0 and codes.round().max() <= 2**bits - 1
    # Half a step inside the range; the zero point's own rounding may cost half a step more at the ends.
    assert bool(((x_hat - x).abs() <= scale * 1.001).all())
    assert torch.equal(again, x_hat)
    ordered = x_hat.gather(1, x.argsort(stable=True))
    assert bool((ordered.diff() >= 0).all())


@pytest.mark.parametrize("layout", LAYER_LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_bn_match(backend: str, layout: str, dtype: torch.dtype) -> None:
    x = _layouts(dtype)[layout]
    mean, var = _randn(x.shape[1], seed=5), _randn(x.shape[1], seed=6).abs()
    leaf = x.detach().requires_grad_()
    loss = F.bn_match(leaf, mean, var)
    assert loss.dtype == torch.float32 and loss.shape == ()
    (3 * loss).backward()
    exact = x.detach().double().requires_grad_()
    expected = oracle.batch_norm_statistics_loss(exact, mean, var)
    (3 * expected).backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-7)
    assert leaf.grad is not None and exact.grad is not None
    size = float(exact.grad.abs().max())
    torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=2 * ROUNDING[dtype], atol=1e-5 * size)


def test_bn_match_two_dimensions(backend: str) -> None:
    x = _randn(9, 4).requires_grad_()
    mean, var = torch.zeros(4), torch.ones(4)
    exact = x.detach().double().requires_grad_()
    loss, expected = F.bn_match(x, mean, var), oracle.batch_norm_statistics_loss(exact, mean, var)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("layout", LAYER_LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("parameters", ["none", "weight", "bias", "both"])
@pytest.mark.parametrize("through", ["y", "loss", "both"])
def test_bn_match_forward(backend: str, layout: str, dtype: torch.dtype, parameters: str, through: str) -> None:
    x = _layouts(dtype)[layout].detach()
    channels = x.shape[1]
    mean, var = _randn(channels, seed=5), _randn(channels, seed=6).abs() + 0.1
    weight = _randn(channels, seed=8) if parameters in ("weight", "both") else None
    bias = _randn(channels, seed=9) if parameters in ("bias", "both") else None
    leaf, exact = x.detach().requires_grad_(), x.double().requires_grad_()
    y, loss = F.bn_match_forward(leaf, mean, var, weight, bias, 1e-3)
    assert y.dtype == dtype and y.shape == x.shape and loss.dtype == torch.float32 and loss.shape == ()

    true_y = oracle.batch_norm(exact, mean, var, weight, bias, 1e-3)
    true_loss = oracle.batch_norm_statistics_loss(exact, mean, var)
    size = true_y.detach().abs() + (0 if bias is None else 2 * _broadcast(bias.double().abs(), x, 1))
    rounding = true_y.detach().abs() * ROUNDING[dtype] + SMALLEST[dtype]
    assert bool(((y.double() - true_y).abs() <= ARITHMETIC * size + rounding).all())
    torch.testing.assert_close(loss.double(), true_loss, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(loss.detach(), F.bn_match(x, mean, var), rtol=1e-6, atol=0)
    statistics = [None if t is None else t.double() for t in (weight, bias)]
    library = torch.nn.functional.batch_norm(x.double(), mean.double(), var.double(), *statistics, eps=1e-3)
    torch.testing.assert_close(true_y.detach(), library)

    grad = _randn(*x.shape, dtype=dtype, seed=3)
    ours, theirs = [], []
    if through != "loss":
        ours.append((y * grad).sum().float())
        theirs.append((true_y * grad.double()).sum())
    if through != "y":
        ours.append(3 * loss)
        theirs.append(3 * true_loss)
    sum(ours).backward()
    sum(theirs).backward()
    assert leaf.grad is not None and exact.grad is not None and leaf.grad.dtype == dtype
    size = float(exact.grad.abs().max())
    torch.testing.assert_close(
        leaf.grad.double(), exact.grad, rtol=2 * ROUNDING[dtype], atol=1e-5 * size + SMALLEST[dtype]
    )


@pytest.mark.parametrize("channels_last", [False, True])
def test_bn_match_forward_where_the_mean_dwarfs_the_deviation(backend: str, channels_last: bool) -> None:
    x = _randn(8, 3, 20, 20).double().mul_(torch.tensor([1, 1e-2, 1]).view(3, 1, 1))
    x = (x + torch.tensor([0, 1e4, -3]).view(3, 1, 1)).float()
    x = (x.contiguous(memory_format=torch.channels_last) if channels_last else x).requires_grad_()
    exact = x.detach().double().requires_grad_()
    mean, var = torch.tensor([0.1, 1e4 + 0.25, -3]), torch.tensor([1.5, 1e-4, 1])
    weight, bias = torch.tensor([1.0, 2.0, -1.0]), torch.tensor([0.5, 0.0, 1.0])
    y, loss = F.bn_match_forward(x, mean, var, weight, bias)
    true_y = oracle.batch_norm(exact, mean, var, weight, bias, 1e-5)
    true_loss = oracle.batch_norm_statistics_loss(exact, mean, var)
    torch.testing.assert_close(y.double(), true_y, rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(loss.double(), true_loss, rtol=1e-5, atol=0)
    op = torch.ops.adadfq.bn_match_forward(x.detach(), mean, var, weight, bias, 1e-5)
    true_var, true_mean = torch.var_mean(exact.detach(), dim=(0, 2, 3), correction=0)
    torch.testing.assert_close(op[2], true_mean, rtol=1e-11, atol=1e-6)
    torch.testing.assert_close(op[3], true_var, rtol=1e-5, atol=0)
    grad = _randn(*x.shape, seed=3) * 1e-4
    torch.autograd.backward([y, loss], [grad, torch.tensor(2.0)])
    ((true_y * grad.double()).sum() + 2 * true_loss).backward()
    assert x.grad is not None and exact.grad is not None
    for c in range(3):
        size = float(exact.grad[:, c].abs().max())
        torch.testing.assert_close(x.grad[:, c].double(), exact.grad[:, c], rtol=1e-6, atol=1e-6 * size)


def test_bn_match_forward_lets_nan_through(backend: str) -> None:
    x = _randn(4, 3, 5, 5)
    x[1, 2, 3, 4] = math.nan
    x.requires_grad_()
    y, loss = F.bn_match_forward(x, torch.zeros(3), torch.ones(3))
    assert torch.equal(y.isnan(), x.isnan()) and bool(loss.isnan())
    loss.backward()
    assert x.grad is not None and x.grad.isnan().flatten(2).all(2).any(0).tolist() == [False, False, True]


def _per_sample(x: Tensor, form: str) -> tuple[Tensor | None, Tensor | None]:
    """weight and bias of batch_norm_act: none, one a channel, one a sample and channel, or one of the two alone."""
    shape = x.shape[1:2] if form == "channel" else x.shape[:2]
    weight, bias = _randn(*shape, seed=8) + 0.5, _randn(*shape, seed=9)
    return (None if form in ("none", "bias") else weight), (None if form in ("none", "weight") else bias)


@pytest.mark.parametrize("layout", [name for name in LAYER_LAYOUTS if name != "single element"])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("form", ["none", "channel", "sample", "weight", "bias"])
@pytest.mark.parametrize("negative_slope", [1.0, 0.2, 0.0])
def test_batch_norm_act(backend: str, layout: str, dtype: torch.dtype, form: str, negative_slope: float) -> None:
    _need(backend, "batch_norm_act")
    if dtype == torch.float64 and backend != "reference":
        pytest.skip("kernels take no float64")
    x = _layouts(dtype)[layout].detach()
    parameters = [None if p is None else p.to(_compute(dtype)).requires_grad_() for p in _per_sample(x, form)]
    leaf, exact = x.detach().requires_grad_(), x.double().requires_grad_()
    exact_parameters = [None if p is None else p.detach().double().requires_grad_() for p in parameters]
    y, mean, var = F.batch_norm_act(leaf, *parameters, 1e-3, negative_slope)
    true_y, true_mean, true_var = oracle.batch_norm_act(exact, *exact_parameters, 1e-3, negative_slope)
    assert y.dtype == dtype and y.shape == x.shape and not mean.requires_grad and not var.requires_grad
    assert y.stride() == torch.empty_like(x).stride()
    fine = 1e-12 if dtype == torch.float64 else 2e-6
    torch.testing.assert_close(y.double(), true_y, rtol=2 * ROUNDING[dtype], atol=2 * fine)
    torch.testing.assert_close(mean, true_mean, rtol=fine, atol=fine)
    torch.testing.assert_close(var, true_var, rtol=fine, atol=fine)
    if form in ("none", "channel"):
        library = [None if p is None else p.detach().double() for p in parameters]
        library = torch.nn.functional.batch_norm(x.double(), None, None, *library, training=True, eps=1e-3)
        torch.testing.assert_close(true_y.detach(), torch.nn.functional.leaky_relu(library, negative_slope))

    grad = _randn(*x.shape, dtype=dtype, seed=3)
    y.backward(grad)
    true_y.backward(grad.double())
    for got, want in zip([leaf, *parameters], [exact, *exact_parameters], strict=True):
        if got is not None:
            assert got.grad is not None and got.grad.dtype == got.dtype
            size = float(want.grad.abs().max())
            torch.testing.assert_close(
                got.grad.double(),
                want.grad,
                rtol=2 * ROUNDING[got.dtype],
                atol=5 * fine * size + SMALLEST.get(dtype, 0),
            )


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("form", ["channel", "sample"])
def test_batch_norm_act_where_the_mean_dwarfs_the_deviation(backend: str, channels_last: bool, form: str) -> None:
    _need(backend, "batch_norm_act")
    x = _randn(8, 3, 20, 20).double().mul_(torch.tensor([1, 1e-2, 1]).view(3, 1, 1))
    x = (x + torch.tensor([0, 1e4, -3]).view(3, 1, 1)).float()
    x = (x.contiguous(memory_format=torch.channels_last) if channels_last else x).requires_grad_()
    exact = x.detach().double().requires_grad_()
    weight, bias = _per_sample(x, form)
    y = F.batch_norm_act(x, weight, bias, 1e-6, 0.2).y
    true_y, *_ = oracle.batch_norm_act(exact, weight, bias, 1e-6, 0.2)
    torch.testing.assert_close(y.double(), true_y, rtol=1e-5, atol=1e-5)
    grad = _randn(*x.shape, seed=3)
    y.backward(grad)
    true_y.backward(grad.double())
    assert x.grad is not None and exact.grad is not None
    for c in range(3):
        size = float(exact.grad[:, c].abs().max())
        torch.testing.assert_close(x.grad[:, c].double(), exact.grad[:, c], rtol=1e-5, atol=1e-5 * size)


def test_batch_norm_act_lets_nan_through(backend: str) -> None:
    _need(backend, "batch_norm_act")
    x = _randn(4, 3, 5, 5)
    x[1, 2, 3, 4] = math.nan
    x.requires_grad_()
    y, mean, _ = F.batch_norm_act(x, torch.ones(4, 3), torch.zeros(4, 3), negative_slope=0.0)
    assert y.isnan().flatten(2).all(2).all(0).tolist() == mean.isnan().tolist() == [False, False, True]
    y.sum().backward()
    assert x.grad is not None and x.grad.isnan().flatten(2).all(2).all(0).tolist() == [False, False, True]
    assert bool(x.grad[:, :2].isfinite().all())


def test_batch_norm_act_gives_gradients_where_they_are_wanted(backend: str) -> None:
    _need(backend, "batch_norm_act")
    x, weight, bias = _randn(4, 3, 5, 5), torch.ones(4, 3, requires_grad=True), torch.zeros(4, 3)
    y = F.batch_norm_act(x, weight, bias, negative_slope=0.2).y
    y.sum().backward()
    assert weight.grad is not None and x.grad is None and bias.grad is None
    x.requires_grad_()
    coarse = weight.detach().bfloat16().requires_grad_()
    y, mean, var = F.batch_norm_act(x, coarse, bias, negative_slope=0.2)
    assert y.requires_grad and not mean.requires_grad and not var.requires_grad
    y.sum().backward()
    assert coarse.grad is not None and coarse.grad.dtype == torch.bfloat16
    torch.testing.assert_close(coarse.grad, weight.grad.bfloat16())


LOSS_SETTINGS = {"lambda_l": 0.3, "lambda_u": 0.6, "alpha_ds": 0.2, "alpha_as": 0.1, "beta": 1.5}


def _logits(batch: int, classes: int, spread: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    teacher = (_randn(batch, classes, seed=7) * spread).to(dtype)
    student = (teacher.float() + _randn(batch, classes, seed=8) * spread / 3).to(dtype)
    labels = torch.randint(0, classes, (batch,), generator=torch.Generator().manual_seed(9))
    return teacher, student, labels


@pytest.mark.parametrize("batch,classes", [(16, 10), (1, 10), (5, 2), (64, 1000)])
@pytest.mark.parametrize("spread", [0.01, 1.0, 30.0])
@pytest.mark.parametrize("detach_min", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_margin_loss(
    backend: str, batch: int, classes: int, spread: float, detach_min: bool, dtype: torch.dtype
) -> None:
    teacher, student, labels = _logits(batch, classes, spread, dtype)
    ours = [t.detach().requires_grad_() for t in (teacher, student)]
    exact = [t.detach().double().requires_grad_() for t in (teacher, student)]
    result = F.margin_loss(*ours, labels, **LOSS_SETTINGS, detach_min=detach_min)
    expected = oracle.margin_loss(*exact, labels, **LOSS_SETTINGS, detach_min=detach_min)
    tolerance = 2e-5
    for got, want in zip(result, expected, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)
    assert not any(t.requires_grad for t in result[1:])
    (2 * result.total).backward()
    (2 * expected[0]).backward()
    for got, want in zip(ours, exact, strict=True):
        size = float(want.grad.abs().max())
        rounding = 2 * ROUNDING[dtype]
        # H' is a ratio of small differences where both nearly agree: float32 keeps about four digits of its gradient.
        torch.testing.assert_close(
            got.grad.double(), want.grad, rtol=rounding, atol=(1e-4 + rounding) * size + 2 * SMALLEST[dtype]
        )


@pytest.mark.parametrize("batch,classes", [(16, 10), (1, 10), (3, 1), (64, 1000)])
@pytest.mark.parametrize("spread", [1e-3, 1.0, 100.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_entropy_distillation(backend: str, batch: int, classes: int, spread: float, dtype: torch.dtype) -> None:
    teacher, student, _ = _logits(batch, classes, spread, dtype)
    ours = [t.detach().requires_grad_() for t in (teacher, student)]
    exact = student.detach().double().requires_grad_()
    loss, expected = F.entropy_distillation(*ours, 5.0), oracle.student_loss(teacher.double(), exact, 5.0)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    loss.backward()
    expected.backward()
    assert ours[0].grad is None
    size = float(exact.grad.abs().max())
    torch.testing.assert_close(
        ours[1].grad.double(), exact.grad, rtol=2 * ROUNDING[dtype], atol=1e-5 * size + SMALLEST[dtype]
    )


@pytest.mark.parametrize("detach_min", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "case", ["equal", "equal up to a constant", "one sample", "one class", "equal entropies", "nearly equal"]
)
def test_losses_stay_finite(backend: str, case: str, dtype: torch.dtype, detach_min: bool) -> None:
    teacher = _randn(8, 10)
    student = {
        "equal": teacher,
        "equal up to a constant": teacher + 3,
        "equal entropies": teacher + torch.arange(10.0).roll(3) * torch.ones(8, 1),
        "nearly equal": teacher * (1 + 1e-6),
    }.get(case, teacher + 1)
    labels = torch.arange(8)
    if case == "one sample":
        teacher, student, labels = teacher[:1], _randn(1, 10, seed=1), labels[:1]
    if case == "one class":
        teacher, student, labels = teacher[:, :1], teacher[:, 1:2], torch.zeros(8, dtype=torch.int64)
    teacher, student = (t.detach().to(dtype).requires_grad_() for t in (teacher, student))
    result = F.margin_loss(teacher, student, labels, **LOSS_SETTINGS, detach_min=detach_min)
    loss = result.total + F.entropy_distillation(teacher, student, 20.0)
    loss.backward()
    for tensor in (*result, loss, teacher.grad, student.grad):
        assert tensor is not None and bool(tensor.isfinite().all())
    assert bool(((result.h_prime >= 0) & (result.h_prime <= 1)).all())
    if case == "equal" or (case == "one class"):
        assert result.h_prime.tolist() == [1.0] * len(labels)
    if case == "one sample":
        assert result.h_prime.tolist() == [0.0]


@pytest.mark.parametrize("label", [-1, 10])
def test_label_out_of_range_is_refused(backend: str, label: int) -> None:
    logits = torch.zeros(2, 10)
    with pytest.raises(adadfq.InvalidInputError, match=rf"labels must be in 0\.\.9, got {label}"):
        F.margin_loss(logits, logits, torch.tensor([0, label]), **LOSS_SETTINGS)


def _op_arguments() -> dict[str, tuple[object, ...]]:
    x, grad = _randn(2, 3, 4, 5), _randn(2, 3, 4, 5, seed=1)
    scale, zero_point = torch.full((3,), 0.1), torch.full((3,), 5, dtype=torch.int32)
    mean, var = torch.zeros(3), torch.ones(3)
    logits = _randn(4, 10), _randn(4, 10, seed=1)
    act_quantizer = (torch.tensor([0.1]), torch.tensor([3], dtype=torch.int32))
    return {
        "fake_quantize": (x, scale, zero_point, 4, 1),
        "fake_quantize_backward": (grad, x, scale, zero_point, 4, 1),
        "dynamic_fake_quantize": (x, 4, 0),
        "fake_quantize_": (x, scale, zero_point, 4, 1),
        "foreach_dynamic_fake_quantize": ([x, grad, _randn(3, 7)], [4, 2, 8], 1),
        "observe_fake_quantize": (x, *_range_state(), 4, 0.9),
        "affine_act_fake_quantize": (x, scale, mean, grad, "relu", *act_quantizer, 4),
        "affine_act_quantize": (x, scale, mean, grad, "relu6", *act_quantizer, 4),
        "quantize_pack": (x, scale, zero_point, 3, 1),
        "unpack_dequantize": (
            torch.arange(45, dtype=torch.uint8),
            scale,
            zero_point,
            3,
            [2, 3, 4, 5],
            1,
            torch.bfloat16,
        ),
        "affine_act_fake_quantize_backward": (grad, x, scale, mean, grad, "relu6", True, True),
        "learned_fake_quantize_backward": (grad, x, scale, zero_point, 4, 1),
        "foreach_fake_quantize": ([x, grad], [scale, scale * 2], [zero_point, zero_point], [4, 2], 1),
        "foreach_learned_fake_quantize_backward": (
            *([grad, x], [x, grad], [scale, scale * 2], [zero_point, zero_point], [4, 2]),
            1,
        ),
        "affine_act_learned_fake_quantize_backward": (
            *(grad, x, scale, mean, grad, "relu6", *act_quantizer, 4),
            *(True, True),
        ),
        "bn_match": (x, mean, var),
        "bn_match_backward": (torch.tensor(1.0), x, mean.double(), var.double(), mean, var),
        "bn_match_forward": (x, mean, var, scale, mean, 1e-5),
        "bn_match_forward_backward": (
            *(grad, x, torch.tensor(1.0), mean.double(), var.double()),
            *(mean, var, scale, 1e-5),
        ),
        "batch_norm_act": (x, _randn(2, 3, seed=2), _randn(2, 3, seed=3), 1e-5, 0.2),
        "batch_norm_act_backward": (
            *(grad, x, mean.double(), var.double(), _randn(2, 3, seed=2), _randn(2, 3, seed=3)),
            *(1e-5, 0.2),
        ),
        "margin_loss": (*logits, torch.arange(4), 0.1, 0.8, 0.2, 0.1, 1.0, False),
        "entropy_distillation": (*logits, 20.0),
    }


def test_every_operator_has_arguments_here() -> None:
    assert set(_op_arguments()) == set(OPERATORS)


def test_every_operator_has_a_reference_and_a_cpu_kernel_and_all_but_two_triton() -> None:
    assert set(reference.KERNELS) == set(OPERATORS)
    assert set(cpu.KERNELS) == set(OPERATORS)
    assert set(OPERATORS) - set(triton.KERNELS) == {"quantize_pack", "unpack_dequantize"}


@pytest.mark.parametrize("name", list(OPERATORS))
@pytest.mark.parametrize("channels_last", [False, True])
def test_opcheck(backend: str, name: str, channels_last: bool) -> None:
    _need(backend, name)
    arguments = tuple(
        a.contiguous(memory_format=torch.channels_last)
        if channels_last and isinstance(a, Tensor) and a.dim() == 4
        else a
        for a in _op_arguments()[name]
    )
    torch.library.opcheck(getattr(torch.ops.adadfq, name).default, arguments)


@pytest.mark.parametrize("name", [name for name in OPERATORS if name.startswith(("bn_match", "batch_norm"))])
def test_opcheck_of_transposed_matrices(backend: str, name: str) -> None:
    """Of [N, C], `x` and parameters of samples have one shape; the results must still take each one's strides."""
    _need(backend, name)
    arguments = tuple(
        a[:, :, 0, 0].t().contiguous().t() if isinstance(a, Tensor) and a.dim() == 4 else a
        for a in _op_arguments()[name]
    )
    torch.library.opcheck(getattr(torch.ops.adadfq, name).default, arguments)


@pytest.mark.parametrize(
    "name,arguments",
    [
        ("affine_act_fake_quantize", {3: None}),
        ("affine_act_fake_quantize", {5: None, 6: None}),
        ("affine_act_quantize", {3: None}),
        ("affine_act_fake_quantize_backward", {4: None, 6: False}),
        ("affine_act_fake_quantize_backward", {7: False}),
        ("affine_act_learned_fake_quantize_backward", {4: None, 9: False}),
        ("affine_act_learned_fake_quantize_backward", {10: False}),
        ("learned_fake_quantize_backward", {2: torch.tensor(0.1), 3: torch.tensor(3, dtype=torch.int32), 5: None}),
        ("bn_match_forward", {3: None, 4: None}),
        ("bn_match_forward_backward", {7: None}),
        ("batch_norm_act", {1: None, 2: None}),
        ("batch_norm_act", {1: torch.ones(3), 2: None}),
        ("batch_norm_act_backward", {4: None}),
        ("batch_norm_act_backward", {4: torch.ones(3), 5: torch.zeros(3)}),
        ("batch_norm_act_backward", {4: None, 5: None}),
        ("fake_quantize_", {1: torch.tensor([0.1]), 2: torch.tensor([3], dtype=torch.int32), 4: None}),
    ],
)
def test_opcheck_without_optional_arguments(backend: str, name: str, arguments: dict[int, object]) -> None:
    _need(backend, name)
    every = list(_op_arguments()[name])
    for position, value in arguments.items():
        every[position] = value
    torch.library.opcheck(getattr(torch.ops.adadfq, name).default, tuple(every))


def _learned(scale: Tensor, x: Tensor) -> Tensor:
    """`scale` with a gradient where `x` has one."""
    return scale + x.flatten()[: scale.numel()].abs().reshape(scale.shape) / 8


def _public_calls() -> dict[str, Callable[[Tensor], list[Tensor]]]:
    """Every differentiable function of the package on x [2, 3, 4, 5]; each returns all that it computes."""
    scale, zero_point = torch.full((3,), 0.1), torch.full((3,), 5, dtype=torch.int32)
    # Dynamo takes no tensor twice for one autograd.Function.
    shift, weight, bias = torch.linspace(-1, 1, 3), torch.linspace(2, 1, 3), torch.linspace(0, 1, 3)
    step = (torch.tensor(0.1), torch.tensor(3), 4)
    other, labels = _randn(6, 20, seed=1), torch.arange(6)
    pair = _randn(2, 3, seed=2), _randn(2, 3, seed=3)

    def observe(x: Tensor) -> list[Tensor]:
        state = [torch.zeros((), dtype=s.dtype) for s in _range_state()]
        return [F.observe_fake_quantize(x, *state, 4), *state]

    return {
        "fake_quantize": lambda x: [F.fake_quantize(x, scale, zero_point, 4, 1, clip_grad=True)],
        "fake_quantize inplace": lambda x: [F.fake_quantize(x * 2, scale, zero_point, 4, 1, inplace=True)],
        "fake_quantize learned": lambda x: [F.fake_quantize(x, _learned(scale, x), zero_point, 4, 1)],
        "foreach_fake_quantize": lambda x: F.foreach_fake_quantize(
            [x, x[0] * 2], [torch.full((2,), 0.1), torch.full((3,), 0.2)], [zero_point[:2], shift.int() + 3], [4, 2], 0
        ),
        "foreach_fake_quantize learned": lambda x: F.foreach_fake_quantize(
            [x, x * 2], [_learned(scale, x), _learned(weight, x)], [zero_point, shift.int() + 3], [4, 2], 1
        ),
        "affine_act_fake_quantize learned": lambda x: [
            F.affine_act_fake_quantize(x, scale, shift, x.sin(), "relu6", (_learned(step[0], x), *step[1:]))
        ],
        "dynamic_fake_quantize": lambda x: list(F.dynamic_fake_quantize(x, 4, 1)),
        "foreach_dynamic_fake_quantize": lambda x: [
            t for r in F.foreach_dynamic_fake_quantize([x, x[0] * 2, x.flatten(1)], [4, 2, 8], 1) for t in r
        ],
        "observe_fake_quantize": observe,
        "affine_act_fake_quantize": lambda x: [F.affine_act_fake_quantize(x, scale, shift, x.sin(), "relu6", step)],
        "bn_match": lambda x: [F.bn_match(x, shift, scale)],
        "bn_match_forward": lambda x: list(F.bn_match_forward(x, shift, scale, weight, bias)),
        "batch_norm_act": lambda x: list(F.batch_norm_act(x, weight, bias, 1e-3, 0.2)),
        "batch_norm_act of samples": lambda x: list(F.batch_norm_act(x, *pair, 1e-3, 0.2)),
        "margin_loss": lambda x: list(F.margin_loss(x.view(6, 20), other, labels, **LOSS_SETTINGS)),
        "entropy_distillation": lambda x: [F.entropy_distillation(other, x.view(6, 20), 5.0)],
    }


@pytest.mark.parametrize("name", list(_public_calls()))
def test_every_function_compiles_into_one_graph(backend: str, name: str) -> None:
    _need(backend, name.partition(" ")[0])
    torch._dynamo.reset()
    call = _public_calls()[name]
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    results = []
    for function in (call, compiled):
        x = _randn(2, 3, 4, 5).requires_grad_()
        out = function(x)
        sum((t * t).sum() for t in out if t.requires_grad).backward()
        results.append([*(t.detach() for t in out), x.grad])
    for got, want in zip(*reversed(results), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("name", list(_public_calls()))
def test_every_function_computes_the_same_without_a_gradient(backend: str, name: str) -> None:
    _need(backend, name.partition(" ")[0])
    call = _public_calls()[name]
    with_gradient = call(_randn(2, 3, 4, 5).requires_grad_())
    assert any(t.requires_grad for t in with_gradient)
    with torch.no_grad():
        for x in (_randn(2, 3, 4, 5).requires_grad_(), _randn(2, 3, 4, 5)):
            without = call(x)
            assert not any(t.requires_grad for t in without)
            assert all(torch.equal(*pair) for pair in zip(without, with_gradient, strict=True))
    assert not any(t.requires_grad for t in call(_randn(2, 3, 4, 5)))


def test_state_given_to_a_compiled_function_moves(backend: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(F.observe_fake_quantize, fullgraph=True, backend="aot_eager")
    states = _range_state(), _range_state()
    for seed in range(3):
        x = _randn(40, seed=seed)
        assert torch.equal(compiled(x, *states[0], 4), F.observe_fake_quantize(x, *states[1], 4))
    assert all(torch.equal(*pair) for pair in zip(*states, strict=True)) and int(states[0][2]) == 3
    with torch.compiler.set_stance("fail_on_recompile"):
        another = _range_state()
        compiled(_randn(40), *another, 4)
    assert int(another[2]) == 1


@pytest.mark.parametrize(
    "message,call",
    [
        ("bits must be 2..8, got 1", lambda x: F.fake_quantize(x, torch.ones(1), torch.zeros(1).int(), 1)),
        ("bits must be 2..8, got 9", lambda x: F.dynamic_fake_quantize(x, 9)),
        ("bits must be 2..8, got True", lambda x: F.dynamic_fake_quantize(x, True)),
        ("axis must be -2..1 for a tensor of shape", lambda x: F.dynamic_fake_quantize(x, 4, 2)),
        ("scale must have 3 elements", lambda x: F.fake_quantize(x, torch.ones(2), torch.zeros(2).int(), 4, 1)),
        ("zero_point must have 1 element", lambda x: F.fake_quantize(x, torch.ones(1), torch.zeros(2).int(), 4)),
        ("zero_point must be an integer tensor", lambda x: F.fake_quantize(x, torch.ones(1), torch.zeros(1), 4)),
        ("x must be a floating-point tensor", lambda x: F.dynamic_fake_quantize(x.int(), 4)),
        ("x must be a non-empty", lambda x: F.bn_match(x[:0], torch.zeros(3), torch.ones(3))),
        (r"running_mean must have shape \[3\]", lambda x: F.bn_match(x, torch.zeros(2), torch.ones(3))),
        (r"equal B and K", lambda x: F.entropy_distillation(x, x[:, :2], 1.0)),
        ("at least one sample", lambda x: F.entropy_distillation(x[:0], x[:0], 1.0)),
        ("temperature must be positive, got 0", lambda x: F.entropy_distillation(x, x, 0)),
        ("labels must be an integer", lambda x: F.margin_loss(x, x, torch.zeros(2), **LOSS_SETTINGS)),
        (
            r"labels must have shape \[2\]",
            lambda x: F.margin_loss(x, x, torch.zeros(3, dtype=torch.int64), **LOSS_SETTINGS),
        ),
        (
            r"lambda_l must be 0\.\.0\.6",
            lambda x: F.margin_loss(x, x, torch.zeros(2, dtype=torch.int64), **{**LOSS_SETTINGS, "lambda_l": 0.7}),
        ),
        ("lo and hi must have equal shapes", lambda x: F.qparams(x, x[0], 4)),
        (
            "inplace must be False with clip_grad",
            lambda x: F.fake_quantize(x, torch.ones(1), torch.zeros(1).int(), 4, clip_grad=True, inplace=True),
        ),
        (
            "inplace must be False for a leaf",
            lambda x: F.fake_quantize(x.requires_grad_(), torch.ones(1), torch.zeros(1).int(), 4, inplace=True),
        ),
        ("bits must be one width or one a tensor, got 2 for 1", lambda x: F.foreach_dynamic_fake_quantize([x], [4, 4])),
        ("bits must be 2..8, got 9", lambda x: F.foreach_dynamic_fake_quantize([x, x], [4, 9])),
        ("bits must be 2..8, got True", lambda x: F.foreach_dynamic_fake_quantize([x], True)),
        ("tensors must have one dtype and device", lambda x: F.foreach_dynamic_fake_quantize([x, x.half()], 4)),
        (r"tensors\[1\] must be a floating-point", lambda x: F.foreach_dynamic_fake_quantize([x, x.int()], 4)),
        ("axis must be -2..1 for a tensor", lambda x: F.foreach_dynamic_fake_quantize([x[None], x], 4, 2)),
        ("axis must be counted from the front", lambda x: F.foreach_dynamic_fake_quantize([x[None], x], 4, -1)),
        ("x must hold at least one element", lambda x: F.observe_fake_quantize(x[:0], *_range_state(), 4)),
        ("momentum must be below 1", lambda x: F.observe_fake_quantize(x, *_range_state(), 4, 1.0)),
        (r"momentum must be 0\.\.1, got -0\.1", lambda x: F.observe_fake_quantize(x, *_range_state(), 4, -0.1)),
        (
            "running_max must hold one torch.float32 on cpu, got 2 of torch.float32",
            lambda x: F.observe_fake_quantize(x, torch.zeros(()), torch.zeros(2), *_range_state()[2:], 4),
        ),
        (
            "num_batches must hold one torch.int64 on cpu, got 1 of torch.float32",
            lambda x: F.observe_fake_quantize(x, *_range_state()[:2], torch.zeros(()), *_range_state()[3:], 4),
        ),
        (
            "act must be one of none, relu, relu6, got 'gelu'",
            lambda x: F.affine_act_fake_quantize(x, x[0], x[0], act="gelu"),
        ),
        ("without a quantiser there are no codes", lambda x: F.affine_act_quantize(x, x[0], x[0])),
        ("x must have at least the dimensions", lambda x: F.affine_act_fake_quantize(x[0], x[0], x[0])),
        (r"scale must have shape \[3\]", lambda x: F.affine_act_fake_quantize(x, x[0, :2], x[0])),
        (r"shift must have shape \[3\]", lambda x: F.affine_act_fake_quantize(x, x[0], x)),
        (r"residual must be torch.float32 \[2, 3\]", lambda x: F.affine_act_fake_quantize(x, x[0], x[0], x[:1])),
        (r"residual must be torch.float32 \[2, 3\]", lambda x: F.affine_act_fake_quantize(x, x[0], x[0], x.half())),
        (
            "bits must be 2..8, got 1",
            lambda x: F.affine_act_fake_quantize(x, x[0], x[0], qparams=(torch.ones(1), torch.zeros(1).int(), 1)),
        ),
        (
            "scale must have 1 element",
            lambda x: F.affine_act_fake_quantize(x, x[0], x[0], qparams=(torch.ones(3), torch.zeros(1).int(), 4)),
        ),
        ("x must be a non-empty", lambda x: F.bn_match_forward(x[:0], x[0], x[0])),
        (r"running_var must have shape \[3\]", lambda x: F.bn_match_forward(x, x[0], x)),
        (r"bias must have shape \[3\]", lambda x: F.bn_match_forward(x, x[0], x[0], x[0], x[0, :2])),
        (
            "weight must not require a gradient",
            lambda x: F.bn_match_forward(x, x[0], x[0], torch.ones(3, requires_grad=True)),
        ),
        (
            "bias must not require a gradient",
            lambda x: F.bn_match_forward(x, x[0], x[0], None, torch.ones(3, requires_grad=True)),
        ),
        ("eps must be at least 0, got -1", lambda x: F.bn_match_forward(x, x[0], x[0], eps=-1)),
        ("x must be a non-empty", lambda x: F.batch_norm_act(x[:0])),
        ("x must be a non-empty", lambda x: F.batch_norm_act(x[0])),
        ("at least two values a channel", lambda x: F.batch_norm_act(x[:1])),
        (r"weight must have shape \[3\], .* or \[2, 3\], .* got \[2\]", lambda x: F.batch_norm_act(x, x[:, 0])),
        (r"bias must have shape \[3\]", lambda x: F.batch_norm_act(x, x, x[:1])),
        ("weight must be a floating-point tensor", lambda x: F.batch_norm_act(x, x.int())),
        (r"weight and bias must both be \[C\] or both \[N, C\]", lambda x: F.batch_norm_act(x, x, x[0])),
        ("weight must be on cpu like x, got meta", lambda x: F.batch_norm_act(x, x.to("meta"))),
        (r"eps must be positive, got -1\.0", lambda x: F.batch_norm_act(x, eps=-1)),
        (r"eps must be positive, got 0\.0", lambda x: F.batch_norm_act(x, eps=0)),
        ("eps must be a finite number, got nan", lambda x: F.batch_norm_act(x, eps=math.nan)),
        (r"negative_slope must be 0\.\.1, got 1\.5", lambda x: F.batch_norm_act(x, negative_slope=1.5)),
        (r"negative_slope must be 0\.\.1, got -0\.1", lambda x: F.batch_norm_act(x, negative_slope=-0.1)),
        ("negative_slope must be a finite number", lambda x: F.batch_norm_act(x, negative_slope=math.nan)),
    ],
)
def test_bad_arguments_are_refused(message: str, call) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(adadfq.InvalidInputError, match=message):
        call(torch.zeros(2, 3))


def test_backend_choice() -> None:
    x = torch.randn(3, 4)
    with adadfq.use_backend("reference"):
        expected = F.dynamic_fake_quantize(x, 4)[0]
    assert torch.equal(F.dynamic_fake_quantize(x, 4)[0], expected)
    with pytest.raises(adadfq.BackendError, match="cannot serve dynamic_fake_quantize: it serves cuda tensors"):
        with adadfq.use_backend("triton"):
            F.dynamic_fake_quantize(x, 4)
    with pytest.raises(adadfq.BackendError, match="it takes .*not torch.float64"), adadfq.use_backend("cpu"):
        F.dynamic_fake_quantize(x.double(), 4)
    with pytest.raises(adadfq.BackendError, match="must be one of"), adadfq.use_backend("nonsense"):
        pass


def test_backend_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(3, 4)
    monkeypatch.setenv("ADADFQ_BACKEND", "cuda")
    with pytest.raises(adadfq.BackendError, match="'cuda' cannot serve"):
        F.dynamic_fake_quantize(x, 4)
    monkeypatch.setenv("ADADFQ_BACKEND", "no such")
    with pytest.raises(adadfq.BackendError, match="ADADFQ_BACKEND must be one of"):
        F.dynamic_fake_quantize(x, 4)
