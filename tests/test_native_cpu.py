"""The CPU kernels against the reference: bit for bit where both are float32, in float64 where sums are involved."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from adadfq import functional
from adadfq.errors import InvalidInputError
from adadfq.ops import cpu, native_args, reference

pytestmark = pytest.mark.skipif(cpu.why_unavailable() is not None, reason=f"no CPU kernels: {cpu.why_unavailable()}")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAN, INF = float("nan"), float("inf")


@pytest.fixture(autouse=True)
def poisoned_outputs() -> Iterator[None]:
    """Fill uninitialised tensors with NaN, so that an element no kernel writes cannot pass."""
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = fill


def assert_same_bits(got: Tensor, want: Tensor) -> None:
    """Same dtype, strides and bits; any NaN equals any NaN."""
    assert got.dtype == want.dtype and got.shape == want.shape and got.stride() == want.stride()
    if not got.is_floating_point():
        assert torch.equal(got, want)
        return
    assert torch.equal(got.isnan(), want.isnan())
    integer = {8: torch.int64, 4: torch.int32, 2: torch.int16}[got.element_size()]
    differ = (got.view(integer) != want.view(integer)) & ~got.isnan()
    assert not differ.any(), f"{got[differ][:5]} instead of {want[differ][:5]}"


def layouts(x: Tensor) -> Iterator[Tensor]:
    """`x` contiguous, channels_last, transposed, sliced and expanded, with the same dtype."""
    yield x
    if x.dim() == 4:
        yield x.to(memory_format=torch.channels_last)
    if x.dim() >= 2:
        yield x.transpose(0, 1)
        yield x.permute(*reversed(range(x.dim())))
        yield torch.stack([x, -x], dim=-1)[..., 0]
        yield x[:1].expand(3, *x.shape[1:])


def some_values(shape: tuple[int, ...], dtype: torch.dtype, scale: float) -> Tensor:
    """Random numbers, a third of them next to or on ties of `scale`, and every special value."""
    x = torch.randn(shape, dtype=torch.float64).mul_(4 * scale)
    flat = x.view(-1)
    ties = (torch.randint(-20, 20, flat[::3].shape) + 0.5) * scale
    flat[::3] = ties * (1 + torch.randint(-1, 2, ties.shape) * 2.0**-23)
    special = [NAN, INF, -INF, 0.0, -0.0, 1e-45, -1e-40, 3e38, 65504.0, 65520.0, 6e-8]
    where = torch.randperm(flat.numel())[: min(len(special), flat.numel() // 4)]
    flat[where] = torch.tensor(special, dtype=torch.float64)[: len(where)]
    return x.to(dtype)


def parameters(channels: int, bits: int) -> tuple[Tensor, Tensor]:
    scale = torch.rand(channels) / 4 + 0.01
    scale[:1] = 0.125
    return scale, torch.randint(0, 2**bits, (channels,), dtype=torch.int32)


SHAPES = [(1,), (37,), (3, 5), (4, 16, 3, 3), (2, 3, 17, 5), (5, 64, 7, 7), (1, 70, 1, 1), (2, 1, 300), (40000, 3)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fake_quantize_equals_reference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for x in layouts(some_values(shape, dtype, 0.125)):
        for axis in (None, *range(x.dim())):
            for bits in (2, 4, 8):
                arguments = (*parameters(1 if axis is None else x.shape[axis], bits), bits, axis)
                assert_same_bits(cpu.fake_quantize(x, *arguments), reference.fake_quantize(x, *arguments))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fake_quantize_backward_equals_reference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for x in layouts(some_values(shape, dtype, 0.125)):
        grad = torch.randn(x.shape).to(dtype)
        grad.view(-1)[:2] = torch.tensor([-0.0, NAN])[: grad.numel()]
        for axis in (None, *range(x.dim())):
            arguments = (*parameters(1 if axis is None else x.shape[axis], 4), 4, axis)
            want = reference.fake_quantize_backward(grad, x, *arguments)
            assert_same_bits(cpu.fake_quantize_backward(grad, x, *arguments), want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dynamic_fake_quantize_equals_reference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    with_specials = some_values(shape, dtype, 0.125)
    finite = with_specials.nan_to_num(nan=0.25, posinf=1.0, neginf=-1.0)
    tame = finite.clamp(-3, 3)
    for values in (with_specials, finite, tame, tame.abs(), -tame.abs(), tame * 0, tame + 10):
        for x in layouts(values):
            for axis in range(x.dim()):
                for got, want in zip(
                    cpu.dynamic_fake_quantize(x, 4, axis), reference.dynamic_fake_quantize(x, 4, axis), strict=True
                ):
                    assert_same_bits(got, want)


@pytest.mark.parametrize(
    "values",
    [
        [0.0, 0.0],
        [-0.0, 0.0],
        [1e-40, 2e-40],
        [1.17549435e-38, 0.0],
        [15 * 1.1754943e-38, 0.0],
        [15 * 1.1754945e-38, 0.0],
        [-3e38, 3e38],
        [NAN, 1.0],
        [1.0, NAN],
        [INF, 1.0],
        [-INF, 1.0],
        [-INF, INF],
        [NAN, INF],
        [1.0, 2.0],
        [-1.0, -2.0],
        [-1e-30, 1e30],
    ],
    ids=str,
)
@pytest.mark.parametrize("repeat", [1, 30])
@pytest.mark.parametrize("axis", [0, 1])
def test_ranges_at_the_edges(values: list[float], repeat: int, axis: int) -> None:
    row = torch.tensor(values).repeat_interleave(repeat)
    x = torch.stack([row, torch.linspace(-1, 1, row.numel()), row.flip(0)], dim=axis)
    for bits in range(2, 9):
        for got, want in zip(
            cpu.dynamic_fake_quantize(x, bits, axis), reference.dynamic_fake_quantize(x, bits, axis), strict=True
        ):
            assert_same_bits(got, want)


@settings(max_examples=200, deadline=None)
@given(
    values=st.lists(st.floats(width=32), min_size=1, max_size=40),
    scale=st.floats(min_value=2.0**-126, max_value=2.0**100, width=32),
    bits=st.integers(2, 8),
    data=st.data(),
)
def test_any_float_quantizes_as_in_the_reference(
    values: list[float], scale: float, bits: int, data: st.DataObject
) -> None:
    zero_point = torch.tensor([data.draw(st.integers(0, 2**bits - 1))], dtype=torch.int32)
    x, scales = torch.tensor(values), torch.tensor([scale])
    x = torch.cat([x, x * scale, (x.round() + 0.5) * scale])
    assert_same_bits(
        cpu.fake_quantize(x, scales, zero_point, bits), reference.fake_quantize(x, scales, zero_point, bits)
    )
    grad = torch.ones_like(x)
    assert_same_bits(
        cpu.fake_quantize_backward(grad, x, scales, zero_point, bits),
        reference.fake_quantize_backward(grad, x, scales, zero_point, bits),
    )


@settings(max_examples=150, deadline=None)
@given(
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    order=st.randoms(use_true_random=False),
    bits=st.integers(2, 8),
    data=st.data(),
)
def test_any_layout_quantizes_as_in_the_reference(shape: list[int], order, bits: int, data: st.DataObject) -> None:
    dims = list(range(len(shape)))
    order.shuffle(dims)
    x = torch.randn([shape[d] for d in dims]).permute(*[dims.index(d) for d in range(len(shape))])
    x = x[..., :: data.draw(st.integers(1, 2))]
    axis = data.draw(st.integers(0, x.dim() - 1))
    arguments = (*parameters(x.shape[axis], bits), bits, axis)
    assert_same_bits(cpu.fake_quantize(x, *arguments), reference.fake_quantize(x, *arguments))
    for got, want in zip(
        cpu.dynamic_fake_quantize(x, bits, axis), reference.dynamic_fake_quantize(x, bits, axis), strict=True
    ):
        assert_same_bits(got, want)


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_every_16_bit_value_survives_conversion(dtype: torch.dtype) -> None:
    """Each value goes through as x, and unchanged as a gradient."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    scale, zero_point = torch.tensor([1.0]), torch.tensor([128], dtype=torch.int32)
    assert_same_bits(
        cpu.fake_quantize(every, scale, zero_point, 8), reference.fake_quantize(every, scale, zero_point, 8)
    )
    out = cpu.fake_quantize_backward(every, torch.zeros_like(every), scale, zero_point, 8)
    assert torch.equal(out.view(torch.int16), every.view(torch.int16))


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_rounding_to_16_bits_equals_pytorch(dtype: torch.dtype) -> None:
    """One code, so x_hat is the scale itself rounded to the dtype: every exponent, many mantissas, all ties."""
    bits = torch.arange(0, 0x7F800000, 0x1000, dtype=torch.int64)
    bits = torch.cat([bits, bits + 1, (bits - 1).clamp(min=0), torch.randint(0, 0x7F800000, (1 << 16,))])
    scale = bits.to(torch.int32).view(torch.float32)
    scale = scale[scale >= torch.finfo(torch.float32).tiny]
    x = torch.full((1, scale.numel()), INF, dtype=dtype)
    zero_point = torch.full(scale.shape, 2, dtype=torch.int32)
    assert_same_bits(cpu.fake_quantize(x, scale, zero_point, 2, 1), scale.to(dtype).unsqueeze(0))
    assert_same_bits(cpu.fake_quantize(-x, scale, zero_point, 2, 1), (-2 * scale).to(dtype).unsqueeze(0))


def results_with(threads: int, dtype: torch.dtype) -> list[Tensor]:
    """Every operator on tensors large enough to be shared between threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        torch.manual_seed(1)
        out: list[Tensor] = []
        for x in (torch.randn(7, 33, 41, 43), torch.randn(9, 65, 19, 19).to(memory_format=torch.channels_last)):
            x = x.to(dtype)
            channels = x.shape[1]
            scale, zero_point = parameters(channels, 4)
            mean, var = torch.randn(channels), torch.rand(channels)
            out.append(cpu.fake_quantize(x, scale, zero_point, 4, 1))
            out.append(cpu.fake_quantize_backward(x, x, scale, zero_point, 4, 1))
            out += cpu.dynamic_fake_quantize(x, 4, 1)
            out += cpu.dynamic_fake_quantize(x, 4, 0)
            out += cpu.bn_match(x, mean, var)
            out.append(cpu.bn_match_backward(torch.tensor(0.3), x, out[-2], out[-1], mean, var))
            for weight, bias in ((scale, None), torch.randn(2, x.shape[0], channels)):
                y, *found = cpu.batch_norm_act(x, weight, bias, 1e-5, 0.2)
                out += [y, *found, *cpu.batch_norm_act_backward(x, x, *found, weight, bias, 1e-5, 0.2)]
        teacher, student = torch.randn(2, 33, 1000).to(dtype)
        out += cpu.margin_loss(teacher, student, torch.randint(0, 1000, (33,)), 0.1, 0.8, 0.2, 0.1, 1.0, False)
        out += cpu.entropy_distillation(teacher, student, 5.0)
        return out
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_results_do_not_depend_on_the_number_of_threads(dtype: torch.dtype) -> None:
    alone = results_with(1, dtype)
    for threads in (2, 3):
        for got, want in zip(results_with(threads, dtype), alone, strict=True):
            assert_same_bits(got, want)


BN_SHAPES = [
    (8, 3),
    (4, 5, 2),
    (3, 6, 9, 11),
    (2, 4, 80, 90),
    (300, 20, 1, 1),
    (1, 1, 5000),
    (5000, 3, 2),
    (2, 40, 4, 4),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", BN_SHAPES, ids=str)
def test_bn_match_equals_reference_in_float64(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for x in layouts((torch.randn(shape) + 1).to(dtype)):
        mean, var = torch.randn(x.shape[1]), torch.rand(x.shape[1])
        got = cpu.bn_match(x, mean, var)
        for value, want in zip(got, reference.bn_match(x.double(), mean.double(), var.double()), strict=True):
            torch.testing.assert_close(value.double(), want, rtol=1e-6, atol=1e-7)
        grad = torch.tensor(0.7)
        assert_same_bits(
            cpu.bn_match_backward(grad, x, got[1], got[2], mean, var),
            reference.bn_match_backward(grad, x, got[1], got[2], mean, var),
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*BN_SHAPES, (64, 3, 16, 16), (4, 1, 30, 50), (2, 10, 5, 7)], ids=str)
def test_batch_norm_act_equals_reference_in_float64(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for x in layouts((torch.randn(shape) + 1).to(dtype)):
        grad = torch.randn(x.shape).to(dtype)
        for form in (x.shape[1:2], x.shape[:2]):
            weight, bias = torch.randn(form) + 0.5, torch.randn(form)
            y, mean, var = cpu.batch_norm_act(x, weight, bias, 1e-3, 0.2)
            parameters = weight.double(), bias.double(), 1e-3, 0.2
            want = reference.batch_norm_act(x.double(), *parameters)
            torch.testing.assert_close(y.double(), want[0], rtol=2 * torch.finfo(dtype).eps, atol=2e-6)
            torch.testing.assert_close((mean, var), want[1:], rtol=1e-6, atol=1e-7)
            # With these statistics, so that no u changes its sign.
            got = cpu.batch_norm_act_backward(grad, x, mean, var, weight, bias, 1e-3, 0.2)
            exact = reference.batch_norm_act_backward(grad.double(), x.double(), mean, var, *parameters)
            for i, (value, true) in enumerate(zip(got, exact, strict=True)):
                # Sums, of grad_weight and grad_bias, cancel: what they lose is of the size of what they add.
                size = max(float(true.abs().max()), x.numel() ** 0.5 if i else 0.0)
                near = torch.isclose(value.double(), true, rtol=2 * torch.finfo(value.dtype).eps, atol=4e-6 * size)
                # Next to the kink float32 and float64 may part, and take others of their channel with them.
                assert int((~near).sum()) <= value.numel() // 2000


@pytest.mark.parametrize("channels_last", [False, True])
def test_bn_match_holds_where_the_mean_dwarfs_the_deviation(channels_last: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(16, 8, 40, 40, dtype=torch.float64).mul_(1e-2).add_(1e4).float()
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    want = torch.var_mean(x.double(), dim=(0, 2, 3), correction=0)
    _, mean, var = cpu.bn_match(x, torch.zeros(8), torch.ones(8))
    torch.testing.assert_close(mean.double(), want[1], rtol=1e-7, atol=0)
    torch.testing.assert_close(var.double(), want[0], rtol=1e-6, atol=0)


def test_bn_match_lets_nan_and_infinity_through() -> None:
    x = torch.randn(2, 3, 50)
    x[0, 1, 7], x[1, 2, 3] = NAN, INF
    loss, mean, var = cpu.bn_match(x, torch.zeros(3), torch.ones(3))
    assert loss.isnan() and mean[0].isfinite() and mean[1].isnan() and mean[2] == INF and var[1:].isnan().all()


LOGITS = {
    "random": lambda b, k: torch.randn(2, b, k) * 3,
    "alike": lambda b, k: torch.randn(1, b, k) + torch.randn(2, b, k) * 1e-3,
    "equal": lambda b, k: torch.randn(1, b, k).repeat(2, 1, 1),
    "far": lambda b, k: torch.randn(2, b, k) * 1e3,
    "tied": lambda b, k: torch.randn(2, 1, k).repeat(1, b, 1),
}


@pytest.mark.parametrize("kind", LOGITS)
@pytest.mark.parametrize("shape", [(1, 1), (1, 10), (16, 10), (3, 1), (17, 1000)], ids=str)
@pytest.mark.parametrize("detach_min", [False, True])
def test_margin_loss_equals_reference_in_float64(kind: str, shape: tuple[int, int], detach_min: bool) -> None:
    torch.manual_seed(0)
    teacher, student = LOGITS[kind](*shape)
    labels = torch.randint(0, shape[1], (shape[0],))
    options = (0.3, 0.6, 0.2, 0.1, 0.7, detach_min)
    got = cpu.margin_loss(teacher, student, labels, *options)
    want = reference.margin_loss(teacher.double(), student.double(), labels, *options)
    for value, exact in zip(got, want, strict=True):
        assert value.dtype == torch.float32 and value.is_contiguous()
        torch.testing.assert_close(value.double(), exact, rtol=2e-6, atol=1e-9 + 2e-6 * exact.abs().max().item())


@pytest.mark.parametrize("kind", LOGITS)
@pytest.mark.parametrize("shape", [(1, 1), (16, 10), (17, 1000)], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 20.0])
def test_entropy_distillation_equals_reference_in_float64(
    kind: str, shape: tuple[int, int], temperature: float
) -> None:
    torch.manual_seed(0)
    teacher, student = LOGITS[kind](*shape)
    got = cpu.entropy_distillation(teacher, student, temperature)
    want = reference.entropy_distillation(teacher.double(), student.double(), temperature)
    for value, exact in zip(got, want, strict=True):
        torch.testing.assert_close(value.double(), exact, rtol=2e-6, atol=1e-9 + 2e-6 * exact.abs().max().item())


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_losses_take_16_bit_logits_in_any_layout(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    teacher, student = torch.randn(2, 10, 16).to(dtype).transpose(1, 2)
    labels = torch.arange(20)[::2] % 10
    labels = torch.cat([labels, labels])[:16]
    got = cpu.margin_loss(teacher, student, labels, 0.1, 0.8, 0.2, 0.1, 1.0, False)
    want = reference.margin_loss(teacher.double(), student.double(), labels, 0.1, 0.8, 0.2, 0.1, 1.0, False)
    assert got[5].dtype == got[6].dtype == dtype and got[5].is_contiguous()
    for value, exact in zip(got, want, strict=True):
        tolerance = 1e-6 if value.dtype == torch.float32 else torch.finfo(dtype).eps
        torch.testing.assert_close(value.double(), exact, rtol=tolerance, atol=1e-7)


def test_exp_is_right_over_its_whole_range() -> None:
    """D of [x, 0] through H', in double; the gradient, in float, element by element down to float32's end."""
    x = torch.cat([torch.linspace(-750, 750, 6001), torch.logspace(-3, 1, 500)])
    teacher = torch.stack([x, torch.zeros_like(x)], 1)
    arguments = (torch.zeros_like(teacher), torch.zeros(len(x), dtype=torch.int64), 0.3, 0.6, 0.2, 0.1, 1.0, False)
    got = cpu.margin_loss(teacher, *arguments)
    want = reference.margin_loss(teacher.double(), arguments[0].double(), *arguments[1:])
    torch.testing.assert_close(got[4].double(), want[4], rtol=0, atol=1e-7)

    for spread in (80.0, 700.0):
        row = torch.linspace(-spread, spread, 4001)[None]
        loss, grad = cpu.entropy_distillation(row, torch.zeros_like(row), 1.0)
        want_loss, want_grad = reference.entropy_distillation(row.double(), torch.zeros_like(row).double(), 1.0)
        torch.testing.assert_close(loss.double(), want_loss, rtol=1e-7, atol=0)
        torch.testing.assert_close(grad.double(), want_grad, rtol=3e-5, atol=1e-36)


def assert_same_but_for_rounding(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    for value, other in zip(got, want, strict=True):
        torch.testing.assert_close(value, other, rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("classes", [1, 2, 10, 16, 33, 300])
@pytest.mark.parametrize("special", [NAN, INF, -INF], ids=str)
@pytest.mark.parametrize("where", ["teacher", "student", "both", "opposite"])
def test_losses_show_a_nan_or_infinity_as_the_reference_does(classes: int, special: float, where: str) -> None:
    torch.manual_seed(0)
    for k in {0, 1, 9, 15, 16, 31, 32, 257, classes - 1} & set(range(classes)):
        teacher, student = torch.randn(2, 5, classes)
        if where != "student":
            teacher[3, k] = special
        if where != "teacher":
            student[3, k] = -special if where == "opposite" else special
        for label in {0, k, classes - 1}:
            arguments = (torch.full((5,), label), 0.1, 0.8, 0.2, 0.1, 1.0, False)
            got = cpu.margin_loss(teacher, student, *arguments)
            assert_same_but_for_rounding(got, reference.margin_loss(teacher, student, *arguments))
            assert got[0].isnan() and got[5].isnan().all() and got[6].isnan().all()
        loss, grad = cpu.entropy_distillation(teacher, student, 5.0)
        assert_same_but_for_rounding((loss, grad), reference.entropy_distillation(teacher, student, 5.0))
        assert loss.isnan() and grad.isnan().all(1).tolist() == [False, False, False, True, False]


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_the_losses_scale_with_what_comes_from_above(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    logits = [torch.randn(4, 10).to(dtype).requires_grad_() for _ in range(2)]
    losses = (
        lambda: functional.margin_loss(*logits, torch.arange(4), 0.1, 0.8, 0.2, 0.1, 1.0).total,
        lambda: functional.entropy_distillation(*logits, 5.0),
    )
    for loss_of in losses:
        loss = loss_of()

        def gradients(loss: Tensor = loss, **options: object) -> list[Tensor]:
            found = torch.autograd.grad(loss, logits, retain_graph=True, allow_unused=True, **options)  # type: ignore
            return [g for g in found if g is not None]

        once = [g.clone() for g in gradients()]
        for g, unit in zip(gradients(grad_outputs=torch.tensor(2.0)), once, strict=True):
            assert torch.equal(g, 2 * unit)
        for g, unit in zip(gradients(grad_outputs=torch.tensor([1.0, 4.0]), is_grads_batched=True), once, strict=True):
            assert torch.equal(g, torch.stack([unit, 4 * unit]))
        for _ in range(2):  # accumulation must not write to what the graph has saved
            loss.backward(retain_graph=True)
        for g, unit in zip((x.grad for x in logits if x.grad is not None), once, strict=True):
            assert torch.equal(g, 2 * unit)
        for unit, g in zip(once, gradients(), strict=True):
            assert torch.equal(g, unit)
        for x in logits:
            x.grad = None


@pytest.mark.parametrize("bad", [-1, 10, 2**40])
def test_margin_loss_names_the_first_label_outside(bad: int) -> None:
    labels = torch.tensor([0, 9, bad, -5])
    arguments = (torch.randn(4, 10), torch.randn(4, 10), labels, 0.1, 0.8, 0.2, 0.1, 1.0, False)
    with pytest.raises(InvalidInputError, match=rf"labels must be in 0\.\.9, got {bad}$") as native:
        cpu.margin_loss(*arguments)
    with pytest.raises(InvalidInputError) as plain:
        reference.margin_loss(*arguments)
    assert str(native.value) == str(plain.value)


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (2, 3, 0, 4)], ids=str)
def test_empty_tensors(shape: tuple[int, ...]) -> None:
    x = torch.empty(shape)
    for axis in range(x.dim()):
        scale, zero_point = parameters(shape[axis], 4)
        assert_same_bits(cpu.fake_quantize(x, scale, zero_point, 4, axis), x)
        assert_same_bits(cpu.fake_quantize_backward(x, x, scale, zero_point, 4, axis), x)
        for got, want in zip(
            cpu.dynamic_fake_quantize(x, 4, axis), reference.dynamic_fake_quantize(x, 4, axis), strict=True
        ):
            assert_same_bits(got, want)
    if x.dim() > 1:
        statistics = (torch.zeros(shape[1]), torch.ones(shape[1]))
        for got, want in zip(cpu.bn_match(x, *statistics), reference.bn_match(x, *statistics), strict=True):
            assert_same_bits(got, want)


def test_tensors_that_native_code_cannot_take_are_refused() -> None:
    x, scale, zero_point = torch.randn(4, 5), torch.ones(5), torch.zeros(5, dtype=torch.int32)
    with pytest.raises(InvalidInputError, match=r"scale must have shape \[4\], got \[5\]"):
        cpu.fake_quantize(x, scale, zero_point, 4, 0)
    with pytest.raises(InvalidInputError, match=r"zero_point must be torch.int32, got torch.int64"):
        cpu.fake_quantize(x, scale, zero_point.long(), 4, 1)
    with pytest.raises(InvalidInputError, match=r"x must be one of .*, got torch.float64"):
        cpu.fake_quantize(x.double(), scale, zero_point, 4, 1)
    with pytest.raises(InvalidInputError, match=r"grad must have shape \[4, 5\], got \[5, 4\]"):
        cpu.fake_quantize_backward(x.t(), x, scale, zero_point, 4, 1)
    with pytest.raises(InvalidInputError, match=r"axis must be in 0\.\.1"):
        cpu.fake_quantize(x, scale, zero_point, 4, 2)
    with pytest.raises(InvalidInputError, match="x must be on a cpu device"):
        cpu.fake_quantize(torch.empty(4, 5, device="meta"), scale, zero_point, 4, 1)
    with pytest.raises(InvalidInputError, match="plain strided tensor"):
        cpu.fake_quantize(x.to_sparse(), scale, zero_point, 4, 1)


def test_density() -> None:
    x = torch.randn(2, 3, 4, 5)
    for dense in (x, x.permute(3, 1, 0, 2), x.to(memory_format=torch.channels_last), x[1], x[:, :1, :1, :1][:1], x[1:]):
        assert native_args.is_dense(dense)
    for sparse in (x[:, :2], x[..., ::2], x[:1].expand(2, 3, 4, 5), torch.zeros(10).as_strided((3, 3), (2, 1))):
        assert not native_args.is_dense(sparse)


def test_a_dense_layout_is_walked_without_a_copy() -> None:
    for x in (torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last), torch.randn(3, 4, 5).permute(2, 0, 1)):
        assert native_args.main_tensor("test", "x", x, "cpu") is x


def test_a_forked_child_may_use_the_kernels_with_one_thread() -> None:
    """As a data loader's worker does; entering the parent's thread pool there would hang."""
    script = (
        "import os, torch; from adadfq.ops import cpu\n"
        "x, s, z = torch.randn(1 << 20), torch.ones(1), torch.zeros(1, dtype=torch.int32)\n"
        "torch.set_num_threads(2); cpu.fake_quantize(x, s, z, 4)\n"
        "pid = os.fork()\n"
        "if pid == 0:\n    torch.set_num_threads(1); cpu.fake_quantize(x, s, z, 4); os._exit(0)\n"
        "assert os.waitpid(pid, 0)[1] == 0"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=300, env=dict(os.environ))
