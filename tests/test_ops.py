"""Every operator against the float64 oracle: forward, gradient, layouts, dtypes, degenerate sizes."""

from __future__ import annotations

import math

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import adadfq
from adadfq import functional as F
from adadfq.ops.schema import OPERATORS

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
#: Half a unit in the last place, relative: what rounding a result to the dtype may cost.
#: Half the smallest subnormal: what underflow may cost.
SMALLEST = {torch.float32: 0.0, torch.bfloat16: 0.0, torch.float16: 2**-25}
ROUNDING = {torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float64: 2**-53}


def _randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _layouts(dtype: torch.dtype) -> dict[str, Tensor]:
    base = _randn(4, 6, 10, 12, dtype=dtype)
    return {
        "contiguous": _randn(3, 5, 7, 9, dtype=dtype),
        "channels_last": _randn(3, 5, 7, 9, dtype=dtype).contiguous(memory_format=torch.channels_last),
        "sliced": base[1:, ::2, 2:9, 1::3],
        "transposed": base.transpose(0, 3),
        "expanded": base[:1].expand(4, 6, 10, 12),
        "empty": _randn(2, 0, 3, 3, dtype=dtype),
        "single element": _randn(1, 1, 1, 1, dtype=dtype),
        "one dimension": _randn(17, dtype=dtype),
    }


LAYOUTS = list(_layouts(torch.float32))


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


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name not in ("empty", "one dimension")])
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
    return {
        "fake_quantize": (x, scale, zero_point, 4, 1),
        "fake_quantize_backward": (grad, x, scale, zero_point, 4, 1),
        "dynamic_fake_quantize": (x, 4, 0),
        "bn_match": (x, mean, var),
        "bn_match_backward": (torch.tensor(1.0), x, mean, var, mean, var),
        "margin_loss": (*logits, torch.arange(4), 0.1, 0.8, 0.2, 0.1, 1.0, False),
        "entropy_distillation": (*logits, 20.0),
    }


def test_every_operator_has_arguments_here() -> None:
    assert set(_op_arguments()) == set(OPERATORS)


@pytest.mark.parametrize("name", list(OPERATORS))
@pytest.mark.parametrize("channels_last", [False, True])
def test_opcheck(backend: str, name: str, channels_last: bool) -> None:
    arguments = tuple(
        a.contiguous(memory_format=torch.channels_last)
        if channels_last and isinstance(a, Tensor) and a.dim() == 4
        else a
        for a in _op_arguments()[name]
    )
    torch.library.opcheck(getattr(torch.ops.adadfq, name).default, arguments)


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
