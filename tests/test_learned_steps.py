"""Learned step sizes (LSQ): gradients against the float64 oracle, and modules with steps of their own."""

from __future__ import annotations

import copy
import io
import math
from pathlib import Path

import oracle
import pytest
import torch
from torch import Tensor, nn
from toy import toy_teacher

import adadfq
from adadfq import functional as F
from adadfq.checkpoint import load_weights
from adadfq.convert import module_bits, set_module_bits
from adadfq.errors import CheckpointError
from adadfq.fused_layers import batch_norm_act_quantize, fold_batch_norms, quantize_weights
from adadfq.nn import (
    QuantAct,
    QuantConv2d,
    QuantLinear,
    QuantWeight,
    activations,
    frozen_ranges,
    has_step,
    set_calibrating,
    step_sizes,
)
from adadfq.result import Result, load, save_result
from adadfq.weight_step import WeightStep

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
HALF_UNIT = {torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float64: 2**-53}


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _along(values: Tensor, x: Tensor, axis: int | None) -> Tensor:
    return values.reshape(()) if axis is None else values.reshape([-1 if d == axis else 1 for d in range(x.dim())])


def _layouts() -> dict[str, Tensor]:
    dense, base = _randn(3, 5, 7, 9), _randn(4, 6, 10, 12)
    return {
        "contiguous": dense,
        "channels_last": dense.contiguous(memory_format=torch.channels_last),
        "sliced": base[1:, ::2, 2:9, 1::3],
        "transposed": base.transpose(0, 3),
        "expanded": base[:1].expand(4, 6, 10, 12),
        "empty": _randn(2, 0, 3, 3),
        "no batch": _randn(0, 4, 3, 3),
        "single element": _randn(1, 1, 1, 1),
        "matrix": _randn(33, 12),
        "one dimension": _randn(17),
        "long rows": _randn(2, 3, 70, 70),
    }


def _on_grid(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int, axis: int | None) -> Tensor:
    """Values like `x` at every quarter of a step from below to above the range: ties and its very ends among them.

    Laid out as `x`; exact in every dtype, for `scale` is a power of two.
    """
    upper = 2**bits - 1 - _along(zero_point, x, axis).float()
    lower = upper - (2**bits - 1)
    quarters = torch.arange(x.numel()).reshape(x.shape) * 7 % 101 / 100
    steps = ((lower - 2) + (upper - lower + 4) * quarters) * 4
    return torch.empty_like(x).copy_(steps.round() / 4 * _along(scale, x, axis))


def _check(got: Tensor | None, products: Tensor, axis: int | None, sums: torch.dtype, relative: float = 3e-6) -> None:
    """`got` is the sum of `products` over all but `axis`, for sums kept in that dtype."""
    summed = [d for d in range(products.dim()) if d != axis]
    want = products.sum(summed) if summed else products
    size = products.abs().sum(summed) if summed else products.abs()
    assert got is not None and got.dtype == sums and got.numel() == want.numel()
    error = (got.double().reshape(want.shape) - want).abs()
    assert bool((error <= (1e-13 if sums == torch.float64 else relative) * size).all()), error.max()


CASES = [(name, axis) for name, x in _layouts().items() for axis in (None, 0, 1) if axis is None or axis < x.dim()]


@pytest.mark.parametrize("layout,axis", CASES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_gradients_are_the_oracles_at_ties_and_at_the_ends_too(
    backend: str, layout: str, axis: int | None, dtype: torch.dtype, bits: int
) -> None:
    like = _layouts()[layout]
    if dtype == torch.float64 and backend != "reference":
        pytest.skip("the reference serves float64")
    channels = 1 if axis is None else like.shape[axis]
    random = torch.Generator().manual_seed(bits)
    scale = torch.exp2(torch.randint(-4, 3, (channels,), generator=random))
    zero_point = torch.randint(0, 2**bits, (channels,), generator=random, dtype=torch.int32)
    x = _on_grid(like, scale, zero_point, bits, axis).to(dtype)
    if layout != "expanded":
        assert x.stride() == like.stride() or not like.is_contiguous()
    grad = _randn(*x.shape, seed=1).to(dtype)
    want, products = oracle.learned_step_gradients(grad, x, _along(scale, x, axis), _along(zero_point, x, axis), bits)
    leaf, step = x.detach().requires_grad_(), scale.clone().requires_grad_()
    x_hat = F.fake_quantize(leaf, step, zero_point, bits, axis)
    assert torch.equal(x_hat, F.fake_quantize(x, scale, zero_point, bits, axis))
    x_hat.backward(grad)
    assert leaf.grad is not None and torch.equal(leaf.grad.double(), want)
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    _check(step.grad, products, axis, torch.float32, 3e-6 if sums == torch.float32 else 1e-7)
    if axis is not None and like.numel():
        # One call for a list is the same, and so is a step that some of its tensors share.
        leaves, steps = [x.detach().requires_grad_() for _ in range(2)], [scale.clone().requires_grad_(), step.detach()]
        x_hats = F.foreach_fake_quantize(leaves, steps, [zero_point] * 2, [bits, bits], axis)
        torch.autograd.backward(x_hats, [grad, grad])
        assert torch.equal(leaves[0].grad, leaf.grad) and torch.equal(leaves[1].grad, grad)
        assert torch.equal(steps[0].grad, step.grad) and steps[1].grad is None
        assert all(torch.equal(got, x_hat) for got in x_hats)


@pytest.mark.parametrize("axis", [None, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels_last", [False, True])
def test_gradients_of_any_step_are_the_oracles(
    backend: str, axis: int | None, dtype: torch.dtype, channels_last: bool
) -> None:
    x, grad = _randn(6, 24, 17, 13).to(dtype), _randn(6, 24, 17, 13, seed=1).to(dtype)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    channels = 1 if axis is None else x.shape[axis]
    scale = 0.02 + torch.rand(channels, generator=torch.Generator().manual_seed(2)) * 0.3
    zero_point = torch.randint(0, 16, (channels,), generator=torch.Generator().manual_seed(3))
    step, zeros = _along(scale, x, axis), _along(zero_point, x, axis)
    x = torch.where(oracle.tie_distance(x, step) < 1e-4, torch.zeros_like(x), x)
    want, products = oracle.learned_step_gradients(grad, x, step, zeros, 4)
    leaf, learned = x.detach().requires_grad_(), scale.clone().requires_grad_()
    F.fake_quantize(leaf, learned, zero_point, 4, axis).backward(grad)
    assert torch.equal(leaf.grad.double(), want)
    assert leaf.grad.is_contiguous(memory_format=torch.channels_last) == channels_last
    _check(learned.grad, products, axis, torch.float32)


def test_scale_alone_x_alone_and_neither(backend: str) -> None:
    x, zero_point = _randn(4, 6), torch.tensor(5)
    step = torch.tensor([0.25], requires_grad=True)
    out = F.fake_quantize(x, step, zero_point, 4)
    out.sum().backward()
    assert step.grad is not None and step.grad.shape == (1,)
    leaf = x.clone().requires_grad_()
    F.fake_quantize(leaf, step.detach(), zero_point, 3).sum().backward()
    assert torch.equal(leaf.grad, torch.ones_like(x)), "without a gradient of the step it passes unchanged"
    with torch.no_grad():
        assert not F.fake_quantize(leaf, step, zero_point, 4).requires_grad
    half = torch.tensor(0.25, dtype=torch.float16, requires_grad=True)
    F.fake_quantize(x, half, zero_point, 4).sum().backward()
    assert half.grad.dtype == torch.float16 and half.grad.shape == ()
    torch.testing.assert_close(half.grad.float(), step.grad[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("axis", [None, 1])
def test_nan_reaches_the_gradient_of_its_step_and_infinity_is_clipped(
    backend: str, bad: float, axis: int | None
) -> None:
    x = _randn(40, 6, 5)
    x[17, 2, 3] = bad
    channels = 1 if axis is None else 6
    step = torch.full((channels,), 0.25, requires_grad=True)
    leaf = x.requires_grad_()
    zero_point = torch.full((channels,), 5)
    F.fake_quantize(leaf, step, zero_point, 4, axis).sum().backward()
    assert leaf.grad[17, 2, 3] == 0 and bool(leaf.grad.isfinite().all())
    nan = step.grad.isnan()
    assert nan.tolist() == [math.isnan(bad) and (axis is None or c == 2) for c in range(channels)]
    _, products = oracle.learned_step_gradients(
        torch.ones_like(x), x.detach(), _along(step.detach(), x, axis), _along(zero_point, x, axis), 4
    )
    if not math.isnan(bad):
        _check(step.grad, products, axis, torch.float32)


def test_foreach_gives_gradients_to_what_is_used_and_asked(backend: str) -> None:
    tensors = [_randn(6, 3, 3, 3), _randn(10, 50, seed=1), _randn(5, 7, seed=2), _randn(4, 300, seed=3)]
    needs = [True, True, False, True]
    leaves = [x.clone().requires_grad_(need) for x, need in zip(tensors, needs, strict=True)]
    zero_points = [torch.full((x.shape[0],), 2 + i) for i, x in enumerate(tensors)]
    steps = [torch.full((x.shape[0],), 0.1 * (i + 1), requires_grad=i != 3) for i, x in enumerate(tensors)]
    bits = [4, 2, 3, 8]
    x_hats = F.foreach_fake_quantize(leaves, steps, zero_points, bits)
    assert [x.requires_grad for x in x_hats] == [True] * 4
    grads = [_randn(*x.shape, seed=9 + i) for i, x in enumerate(tensors)]
    used = [0, 2, 3]
    torch.autograd.backward([x_hats[i] for i in used], [grads[i] for i in used])
    assert leaves[1].grad is None and steps[1].grad is None and leaves[2].grad is None and steps[3].grad is None
    assert torch.equal(leaves[3].grad, grads[3])
    for i in (0, 2):
        x, step = tensors[i].clone().requires_grad_(), steps[i].detach().clone().requires_grad_()
        F.fake_quantize(x, step, zero_points[i], bits[i], 0).backward(grads[i])
        assert torch.equal(step.grad, steps[i].grad)
        assert leaves[i].grad is None or torch.equal(leaves[i].grad, x.grad)
    assert F.foreach_fake_quantize([], [], [], 4) == []
    one = torch.tensor(0.5, requires_grad=True)
    (out,) = F.foreach_fake_quantize([tensors[1]], [one], [torch.tensor(3)], 4, axis=None)
    out.sum().backward()
    assert one.grad is not None and torch.equal(out, F.fake_quantize(tensors[1], one, torch.tensor(3), 4))


@pytest.mark.parametrize("act", ["none", "relu", "relu6"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(4, 6, 7, 7), (2, 8, 33, 40), (40, 12), (3, 1, 5), (0, 4, 3, 3), (2, 3, 100, 90)])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
def test_the_fused_tail_has_the_oracles_gradients(
    backend: str, act: str, dtype: torch.dtype, shape: tuple[int, ...], with_residual: bool, channels_last: bool
) -> None:
    if dtype == torch.float64 and backend != "reference":
        pytest.skip("the reference serves float64")
    if channels_last and len(shape) != 4:
        pytest.skip("channels_last is of four dimensions")
    # Multiples of an eighth and powers of two: u is exact in every dtype, and ties, kinks and ends are among them.
    x, residual = ((_randn(*shape, seed=i) * 8).round() / 8 for i in range(2))
    grad = _randn(*shape, seed=2)
    x, residual, grad = x.to(dtype), residual.to(dtype), grad.to(dtype)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    scale, shift = torch.exp2(_randn(shape[1], seed=3).round()), _randn(shape[1], seed=4).round()
    step, zero_point, bits = torch.tensor(0.5), torch.tensor(3 if act == "none" else 1), 3
    leaves = [t.clone().requires_grad_() for t in (x, scale, shift, step)]
    added = residual.clone().requires_grad_() if with_residual else None
    out = F.affine_act_fake_quantize(*leaves[:3], added, act, (leaves[3], zero_point, bits))
    out.backward(grad)

    u = oracle.affine(x, scale, shift, residual if with_residual else None)
    da, products = oracle.learned_step_gradients(grad, oracle.activation(u, act), step, zero_point, bits)
    flat = torch.zeros_like(u, dtype=torch.bool) if act == "none" else (u <= 0) | ((u >= 6) & (act == "relu6"))
    du = torch.where(flat, 0.0, da)
    want = du * _along(scale, x, 1).double()
    assert bool(((leaves[0].grad.double() - want).abs() <= 1.01 * HALF_UNIT[dtype] * want.abs() + 2**-25).all())
    if with_residual:
        assert torch.equal(added.grad.double(), du)
    relative = 1e-7 if dtype == torch.float64 else 3e-6
    _check(leaves[1].grad, du * x.double(), 1, torch.float32, relative)
    _check(leaves[2].grad, du, 1, torch.float32, relative)
    _check(leaves[3].grad, products, None, torch.float32, relative)
    if min(shape):
        assert bool((du == 0).any()) and bool((du != 0).any())


def test_the_fused_tail_without_gradients_of_its_parameters(backend: str) -> None:
    x, scale, shift = _randn(4, 6, 9, 9), torch.rand(6) + 0.5, _randn(6, seed=1)
    whole = [t.clone().requires_grad_() for t in (x, scale, shift, torch.tensor([0.3]))]
    qparams = whole[3], torch.tensor([2]), 4
    F.affine_act_fake_quantize(*whole[:3], None, "relu", qparams).square().sum().backward()
    step = torch.tensor([0.3], requires_grad=True)
    F.affine_act_fake_quantize(x, scale, shift, None, "relu", (step, torch.tensor([2]), 4)).square().sum().backward()
    assert torch.equal(step.grad, whole[3].grad)
    leaf = x.clone().requires_grad_()
    step = torch.tensor([0.3], requires_grad=True)
    F.affine_act_fake_quantize(leaf, scale, shift, None, "relu", (step, torch.tensor([2]), 4)).square().sum().backward()
    assert torch.equal(leaf.grad, whole[0].grad)
    torch.testing.assert_close(step.grad, whole[3].grad)


def test_refusals() -> None:
    x, step, zero_point = _randn(4, 6), torch.tensor(0.1, requires_grad=True), torch.tensor(3)
    with pytest.raises(adadfq.InvalidInputError, match="inplace must be False with a scale that requires a gradient"):
        F.fake_quantize(x, step, zero_point, 4, inplace=True)
    with pytest.raises(adadfq.InvalidInputError, match="a scale and a zero point for each of 2 tensors, got 1 and 2"):
        F.foreach_fake_quantize([x, x], [step], [zero_point] * 2, 4, None)
    with pytest.raises(adadfq.InvalidInputError, match=r"scale must have 4 elements for axis 0 .* got shape \[3\]"):
        F.foreach_fake_quantize([x], [torch.ones(3)], [torch.zeros(4, dtype=torch.int32)], 4)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(F.fake_quantize(x, step, zero_point, 4).sum(), step, create_graph=True)


def _fix(layer: WeightStep, weight: Tensor | None = None, factor: float = 0.7) -> WeightStep:
    """Give `layer` a step a little shorter than that of its ranges."""
    rows = (layer.weight if weight is None else weight).detach().flatten(1).float()
    scale, zero_point = F.qparams(rows.amin(1) * factor, rows.amax(1) * factor, layer.weight_bits)
    return layer.fix_step(scale, zero_point)


def _layers() -> list[WeightStep]:
    torch.manual_seed(0)
    return [QuantConv2d(4, 8, 3, padding=1, weight_bits=3), QuantLinear(12, 5, weight_bits=4)]


def _input(layer: WeightStep) -> Tensor:
    return _randn(2, 4, 6, 6) if isinstance(layer, QuantConv2d) else _randn(3, 12)


@pytest.mark.parametrize("which", [0, 1])
def test_a_layer_quantises_with_the_step_it_is_given(which: int) -> None:
    layer = _layers()[which]
    keys, x = set(layer.state_dict()), _input(layer)
    assert keys == {"weight", "bias"}
    before = layer(x)
    _fix(layer)
    assert layer.weight_scale.dtype == torch.float32 and layer.weight_zero_point.dtype == torch.int32
    assert set(layer.state_dict()) == keys | {"weight_scale", "weight_zero_point"}
    plain = copy.deepcopy(layer).forget_step()
    assert set(plain.state_dict()) == keys and torch.equal(plain(x), before)
    with torch.no_grad():
        quantised = F.fake_quantize(layer.weight, layer.weight_scale, layer.weight_zero_point, layer.weight_bits, 0)
    assert torch.equal(layer.quantize_weight(layer.weight), quantised) and not torch.allclose(layer(x), before)
    layer(x).sum().backward()
    straight = layer.weight.grad.clone()
    layer.weight.grad = None
    layer.learn_step()
    assert isinstance(layer.weight_scale, nn.Parameter) and "step=learned" in repr(layer)
    assert set(layer.state_dict()) == keys | {"weight_scale", "weight_zero_point"}
    layer(x).sum().backward()
    assert layer.weight_scale.grad is not None and bool((layer.weight_scale.grad != 0).any())
    clipped = layer.weight.grad == 0
    assert bool(clipped.any()) and torch.equal(layer.weight.grad[~clipped], straight[~clipped])
    assert step_sizes(layer) == [layer.weight_scale]
    layer.learn_step(False)
    assert not isinstance(layer.weight_scale, nn.Parameter) and step_sizes(layer) == []


def test_quant_weight_has_steps_too() -> None:
    weight = _randn(6, 20).requires_grad_()
    module = _fix(QuantWeight(3), weight).learn_step()
    module(weight).square().sum().backward()
    assert module.weight_scale.grad.shape == (6,)
    loaded = QuantWeight(3)
    loaded.load_state_dict(module.state_dict())
    assert torch.equal(loaded(weight), module(weight))
    assert QuantWeight(3).state_dict() == {}


def test_what_is_no_step_is_refused_and_changes_nothing() -> None:
    layer, ones, zeros = QuantLinear(4, 3, weight_bits=2), torch.ones(3), torch.zeros(3, dtype=torch.int32)
    for scale, zero_point, message in (
        (torch.ones(4), zeros, r"scale must have shape \[3\], one element a channel, got \[4\]"),
        (torch.tensor(1.0), zeros, r"scale must have shape \[3\]"),
        (ones, zeros[:2], r"zero_point must have shape \[3\]"),
        (torch.tensor([1.0, 0.0, 1.0]), zeros, "scale must be positive and finite"),
        (torch.tensor([1.0, math.nan, 1.0]), zeros, "scale must be positive and finite"),
        (torch.tensor([1e-60, 1.0, 1.0], dtype=torch.float64), zeros, "scale must be positive and finite in float32"),
        (ones, zeros + 4, r"zero_point must be in 0\.\.3"),
        (ones, zeros.float(), "zero_point must be an integer tensor, got torch.float32"),
        (zeros, zeros, "scale must be a floating-point tensor"),
    ):
        with pytest.raises(adadfq.InvalidInputError, match=message):
            layer.fix_step(scale, zero_point)
        assert layer.weight_scale is None
    with pytest.raises(adadfq.InvalidInputError, match=r"QuantLinear has no step to learn: call fix_step"):
        layer.learn_step()


@pytest.mark.parametrize("learned", [False, True])
def test_casts_moves_copies_and_pickles_keep_the_step(learned: bool) -> None:
    layer = _fix(_layers()[0])
    act = QuantAct(4)
    act(torch.tensor([-1.0, 3.0]))
    act.freeze()
    model = nn.Sequential(layer, act)
    if learned:
        layer.learn_step()
        act.learn_step()
        model(_input(layer)).sum().backward()
    scales = [layer.weight_scale.detach().clone(), act.scale.detach().clone()]
    gradients = [None if s.grad is None else s.grad.clone() for s in (layer.weight_scale, act.scale)]
    assert learned == (gradients[0] is not None)
    same = [layer.weight_scale, act.scale]
    model.bfloat16()
    assert layer.weight.dtype == torch.bfloat16 and [layer.weight_scale, act.scale] == same
    for tensor, scale, gradient in zip(same, scales, gradients, strict=True):
        assert tensor.dtype == torch.float32 and torch.equal(tensor, scale)
        assert gradient is None or torch.equal(tensor.grad, gradient)
    assert model(_input(layer).bfloat16()).dtype == torch.bfloat16
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert isinstance(twin[0].weight_scale, nn.Parameter) == isinstance(twin[1].scale, nn.Parameter) == learned
        assert torch.equal(twin[0].weight_scale, scales[0]) and twin[1].scale is not act.scale
        assert len(step_sizes(twin)) == 2 * learned
    model.to("meta")
    assert layer.weight_scale.is_meta and layer.weight_zero_point.is_meta and act.scale.is_meta


@pytest.mark.parametrize("source", ["fixed", "learned"])
@pytest.mark.parametrize("target", ["without", "fixed", "learned"])
@pytest.mark.parametrize("assign", [False, True])
def test_state_dicts_load_whatever_the_step_is(source: str, target: str, assign: bool) -> None:
    def make(kind: str, factor: float) -> nn.Sequential:
        model = nn.Sequential(QuantConv2d(4, 8, 3, weight_bits=3), QuantAct(4))
        if kind != "without":
            _fix(model[0], factor=factor)
        model(_randn(2, 4, 6, 6))
        set_calibrating(model, False)
        if kind == "learned":
            model[0].learn_step()
            model[1].learn_step()
            with torch.no_grad():
                for step in step_sizes(model):
                    step.mul_(0.9)
        return model

    saved, loaded = make(source, 0.7), make(target, 0.5)
    was = [isinstance(loaded[0].weight_scale, nn.Parameter), isinstance(loaded[1].scale, nn.Parameter)]
    loaded.load_state_dict(saved.state_dict(), assign=assign)
    assert was == [isinstance(loaded[0].weight_scale, nn.Parameter), isinstance(loaded[1].scale, nn.Parameter)]
    x = _randn(2, 4, 6, 6, seed=1)
    assert torch.equal(loaded(x), saved(x))
    with torch.no_grad():
        saved[0].weight_scale.mul_(2)
    assert assign or not torch.equal(loaded(x), saved(x))


def test_steps_load_into_modules_on_the_meta_device() -> None:
    source = _fix(_layers()[0]).learn_step()
    module = QuantConv2d(4, 8, 3, padding=1, weight_bits=3, device="meta")
    module.load_state_dict(source.state_dict(), assign=True)
    x = _input(source)
    assert torch.equal(module(x), source(x))


def test_half_a_step_or_one_of_another_size_does_not_load() -> None:
    layer, source = QuantLinear(12, 5), _fix(_layers()[1])
    state = source.state_dict()
    wrong = {**state, "weight_scale": torch.ones(3)}
    with pytest.raises(RuntimeError, match="size mismatch for weight_scale"):
        layer.load_state_dict(wrong)
    assert layer.weight_scale is None
    del state["weight_zero_point"]
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "weight_zero_point"'):
        layer.load_state_dict(state)
    layer.load_state_dict(state, strict=False)
    assert layer.weight_scale is None and layer.weight_zero_point is None
    with pytest.raises(CheckpointError, match=r"1 missing: weight_zero_point"):
        load_weights(layer, state, "a test")
    with pytest.raises(CheckpointError, match=r"weight_scale is float32\[3\], expected float32\[5\]"):
        load_weights(layer, wrong, "a test")
    with pytest.raises(CheckpointError, match=r"2 missing: weight_scale, weight_zero_point"):
        load_weights(source, {"weight": source.weight, "bias": source.bias}, "a test")
    with pytest.raises(CheckpointError, match=r"unexpected: weight_scale, weight_zero_point"):
        load_weights(nn.Linear(12, 5), source.state_dict(), "a test")
    load_weights(layer, source.state_dict(), "a test")
    assert torch.equal(layer.weight_scale, source.weight_scale)


def test_another_width_keeps_the_range_of_the_step() -> None:
    layer = _fix(_layers()[0]).learn_step()
    scale, zero_point, step = layer.weight_scale.detach().clone(), layer.weight_zero_point.clone(), layer.weight_scale
    layer.set_bits(3)
    assert torch.equal(layer.weight_scale, scale) and torch.equal(layer.weight_zero_point, zero_point)
    set_module_bits(layer, {"": 6})
    assert layer.weight_bits == 6 and layer.weight_scale is step
    torch.testing.assert_close(step.detach(), scale * 7 / 63)
    assert torch.equal(layer.weight_zero_point, zero_point * 9)
    plain = QuantLinear(3, 2, weight_bits=4)
    plain.set_bits(2)
    assert plain.weight_bits == 2 and plain.weight_scale is None
    with pytest.raises(adadfq.InvalidInputError, match=r"weight_bits must be 2\.\.8, got 9"):
        layer.set_bits(9)


@pytest.mark.parametrize("bits", [2, 4, 5, 8])
def test_a_width_that_does_not_divide_moves_the_range_by_half_a_step_at_most(bits: int) -> None:
    layer = _fix(_layers()[0]).learn_step()
    scale, zero_point = layer.weight_scale.detach().double(), layer.weight_zero_point.clone()
    layer.set_bits(bits)
    step, zeros, levels = layer.weight_scale.detach().double(), layer.weight_zero_point, 2**bits - 1
    torch.testing.assert_close(step * levels, scale * 7, rtol=1e-6, atol=0)
    moved = (zero_point * scale - zeros * step).abs() / step
    assert bool((moved <= 0.5 + 1e-5).all()) and bool((moved > 0.01).any())


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("target", ["without", "fixed", "learned"])
@pytest.mark.parametrize(
    "name,value,message",
    [
        ("weight_scale", 0.0, "scale must be positive and finite"),
        ("weight_scale", -0.1, "scale must be positive and finite"),
        ("weight_scale", math.nan, "scale must be positive and finite"),
        ("weight_scale", math.inf, "scale must be positive and finite"),
        ("weight_zero_point", -1, r"zero_point must be in 0\.\.7"),
        ("weight_zero_point", 8, r"zero_point must be in 0\.\.7"),
    ],
)
def test_what_is_no_step_does_not_load(target: str, name: str, value: float, message: str, assign: bool) -> None:
    source = _fix(_layers()[0])
    state = {key: entry.clone() for key, entry in source.state_dict(prefix="0.").items()}
    state[f"0.{name}"][3] = value
    layer = _layers()[0] if target == "without" else _fix(_layers()[0])
    if target == "learned":
        layer.learn_step()
    with pytest.raises(RuntimeError, match=rf"0\.weight_scale and 0\.weight_zero_point are no step: {message}"):
        nn.Sequential(layer).load_state_dict(state, assign=assign)
    assert layer.weight_scale is None and layer.weight_zero_point is None and step_sizes(layer) == []
    with pytest.raises(CheckpointError, match=message):
        load_weights(nn.Sequential(layer), state, "a test")
    nn.Sequential(layer).load_state_dict(source.state_dict(prefix="0."), assign=assign)
    assert torch.equal(layer.weight_scale, source.weight_scale)


def test_a_layer_without_values_is_given_no_step() -> None:
    ones, zeros = torch.ones(3), torch.zeros(3, dtype=torch.int32)
    for layer, scale, zero_point, name in (
        (QuantLinear(4, 3, device="meta"), ones, zeros, "weight"),
        (QuantLinear(4, 3), ones.to("meta"), zeros, "scale"),
        (QuantWeight(4), ones, zeros.to("meta"), "zero_point"),
    ):
        with pytest.raises(adadfq.InvalidInputError, match=f"^{name} must hold values, but is on the meta device"):
            layer.fix_step(scale, zero_point)
        assert layer.weight_scale is None


def test_names_of_what_has_a_step() -> None:
    model = nn.Sequential(_layers()[0], _layers()[1], nn.Sequential(_frozen_act(0.0, 1.0)), QuantWeight(3))
    assert has_step(model) == []
    _fix(model[1])
    assert has_step(model) == ["1"]
    model[2][0].learn_step()
    _fix(model[3], _randn(2, 3)).learn_step()
    model.append(model[1])
    assert has_step(model) == ["1", "2.0", "3", "4"]
    model[2][0].learn_step(False)
    model[1].forget_step()
    assert has_step(model) == ["3"] and has_step(model[3]) == [""]


def _frozen_act(*values: float) -> QuantAct:
    act = QuantAct(4)
    act(torch.tensor(values))
    return act.freeze()


def test_an_activation_learns_its_step_once_frozen() -> None:
    act = QuantAct(4)
    with pytest.raises(adadfq.InvalidInputError, match=r"cannot learn its step while its range moves: call freeze\(\)"):
        act.learn_step()
    act = _frozen_act(-1.0, 5.0)
    keys, scale = list(act.state_dict()), act.scale.clone()
    assert act.learn_step() is act and set(act.state_dict()) == set(keys)
    assert isinstance(act.scale, nn.Parameter) and act.scale.dtype == torch.float32 and torch.equal(act.scale, scale)
    assert "step=learned" in repr(act)
    x = torch.tensor([-3.0, 0.3, 9.0], requires_grad=True)
    act(x).sum().backward()
    want, products = oracle.learned_step_gradients(torch.ones(3), x.detach(), scale, act.zero_point, 4)
    assert torch.equal(x.grad.double(), want)
    torch.testing.assert_close(act.scale.grad.double(), products.sum(), rtol=1e-6, atol=1e-6)
    for calibrate in (
        lambda: act.set_calibrating(True),
        lambda: act.observe(x),
        lambda: set_calibrating(nn.Sequential(QuantAct(4), act), True),
    ):
        with pytest.raises(adadfq.InvalidInputError, match="cannot calibrate while its step is learned"):
            calibrate()
    with frozen_ranges(act):
        act(x.detach())
    assert torch.equal(act.scale, scale) and not act._calibrating
    act.learn_step(False)
    act.set_calibrating(True)
    assert not isinstance(act.scale, nn.Parameter)


def test_none_calibrates_where_one_has_learned() -> None:
    model = nn.Sequential(_frozen_act(0.0, 1.0), _frozen_act(0.0, 1.0).learn_step())
    with pytest.raises(adadfq.InvalidInputError, match="1: QuantAct cannot calibrate while its step is learned"):
        set_calibrating(model, True)
    assert not model[0]._calibrating and not bool(model[0].calibrating)


def test_the_state_of_a_range_that_moves_ends_learning() -> None:
    act, moving = _frozen_act(0.0, 1.0).learn_step(), QuantAct(4)
    moving(torch.tensor([1.0, 2.0]))  # not what its codes span, which is from 0
    act.load_state_dict({**moving.state_dict(), "scale": torch.tensor(0.3)})
    assert not isinstance(act.scale, nn.Parameter) and act._calibrating
    assert (act.running_min.item(), act.running_max.item()) == (1.0, 2.0)
    act(torch.tensor([0.0, 4.0]))
    assert act.num_batches.item() == 2


def test_another_width_of_a_learned_activation() -> None:
    act = _frozen_act(-1.0, 4.0).learn_step()
    with torch.no_grad():
        act.scale.mul_(0.5)
    scale, zero_point = act.scale.detach().clone(), act.zero_point.clone()
    act.set_bits(8)
    assert isinstance(act.scale, nn.Parameter) and act.act_bits == 8
    torch.testing.assert_close(act.scale.detach(), scale * 15 / 255)
    assert torch.equal(act.zero_point, zero_point * 17)
    for seed in range(20):  # to the last bit
        with torch.no_grad():
            act.scale.copy_(scale := _randn(1, seed=seed)[0].abs())
        act.set_bits(8)
        assert torch.equal(act.scale, scale)
    with pytest.raises(adadfq.InvalidInputError, match=r"act_bits must be 2\.\.8, got 9"):
        act.set_bits(9)
    assert act.act_bits == 8


def test_the_range_of_a_learned_activation_is_what_it_learned() -> None:
    act = _frozen_act(-1.0, 4.0).learn_step()
    with torch.no_grad():
        act.scale.mul_(0.37)
    scale, zero_point = act.scale.detach().clone(), act.zero_point.clone()
    ends = -zero_point * scale, (15 - zero_point) * scale
    act.learn_step(False)
    assert torch.equal(act.running_min, ends[0]) and torch.equal(act.running_max, ends[1])
    act.set_bits(4)
    assert torch.equal(act.scale, scale) and torch.equal(act.zero_point, zero_point)
    act.set_bits(8)
    torch.testing.assert_close(act.scale, scale / 17)
    assert torch.equal(act.zero_point, zero_point * 17)
    act.set_bits(4)
    torch.testing.assert_close(act.scale, scale)
    act.shrink_range(torch.tensor(0.5))
    torch.testing.assert_close(act.scale, scale / 2)
    act.set_calibrating(True)
    act(torch.tensor([0.0, 0.0]))
    assert act.num_batches == 2 and bool((act.running_max < ends[1]).all())
    # A range that never learned is left alone.
    plain = _frozen_act(-1.0, 4.0)
    state = copy.deepcopy(plain.state_dict())
    plain.learn_step(False).set_bits(4)
    assert all(torch.equal(value, state[name]) for name, value in plain.state_dict().items())


@pytest.mark.parametrize("target", ["calibrating", "frozen", "learned"])
@pytest.mark.parametrize("stale", [False, True])
@pytest.mark.parametrize("assign", [False, True])
def test_a_state_saved_while_learning_has_the_range_that_was_learned(target: str, stale: bool, assign: bool) -> None:
    source = _frozen_act(-1.0, 4.0)
    old = source.running_min.clone(), source.running_max.clone()
    source.learn_step()
    with torch.no_grad():
        source.scale.mul_(0.37)
    state = {name: value.clone() for name, value in source.state_dict().items()}
    ends = -source.zero_point * source.scale.detach(), (15 - source.zero_point) * source.scale.detach()
    assert torch.equal(state["running_min"], ends[0]) and torch.equal(state["running_max"], ends[1])
    if stale:
        state["running_min"], state["running_max"] = (end.clone() for end in old)
    kept = {name: value.clone() for name, value in state.items()}
    act = QuantAct(4) if target == "calibrating" else _frozen_act(0.0, 9.0)
    if target == "learned":
        act.learn_step()
    buffer = act.running_max
    act.load_state_dict(state, assign=assign)
    assert all(torch.equal(value, kept[name]) for name, value in state.items()), "what is loaded is not changed"
    assert torch.equal(act.running_min, ends[0]) and torch.equal(act.running_max, ends[1])
    assert torch.equal(act.scale, source.scale) and (act.running_max is buffer) != assign
    act.set_bits(8)
    torch.testing.assert_close(act.scale.detach(), source.scale.detach() / 17)


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_the_state_of_another_width_keeps_its_range(bits: int, learned: bool) -> None:
    source = _frozen_act(-1.3, 4.0)
    source.set_bits(bits)
    if learned:
        source.learn_step()
        with torch.no_grad():
            source.scale.mul_(0.37)
    act = QuantAct(4)
    act.load_state_dict(source.state_dict())
    assert torch.equal(act.running_min, source.running_min) and torch.equal(act.running_max, source.running_max)
    if bits == 4:
        assert torch.equal(act.scale, source.scale) and torch.equal(act.zero_point, source.zero_point)
    else:
        scale, zero_point = F.qparams(source.running_min, source.running_max, 4)
        assert torch.equal(act.scale, scale) and torch.equal(act.zero_point, zero_point)


@pytest.mark.parametrize("learned", [False, True])
def test_widths_of_a_network_given_again_change_nothing(learned: bool) -> None:
    student = _learn(_student(torch.float32)).eval()
    if not learned:
        for module in student.modules():
            if isinstance(module, (QuantAct, WeightStep)):
                module.learn_step(False)
    twin = _student(torch.float32).eval()
    twin.load_state_dict(student.state_dict())
    x = torch.randn(4, 3, 8, 8)
    for model in (student, twin):
        before = model(x)
        set_module_bits(model, module_bits(model))
        assert torch.equal(model(x), before)
    set_module_bits(twin, dict.fromkeys(module_bits(twin), 8))
    for name, act in activations(twin).items():
        learner = activations(student)[name]
        torch.testing.assert_close(act.scale, learner.scale.detach() * 15 / 255)


def _student(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    student = adadfq.quantize(toy_teacher().to(dtype).eval(), 4, 4)
    student(torch.randn(8, 3, 8, 8, dtype=dtype))
    set_calibrating(student, False)
    return student


def _learn(student: nn.Module, every: int = 1) -> nn.Module:
    steps = [m for m in student.modules() if isinstance(m, (QuantAct, WeightStep))]
    for i, module in enumerate(steps):
        if isinstance(module, WeightStep):
            if i % every:
                continue
            _fix(module)
        module.learn_step()
    with torch.no_grad():
        for step in step_sizes(student):
            step.mul_(0.8)
    return student


@pytest.mark.parametrize("every", [1, 2])
def test_fused_and_unfused_networks_have_the_same_gradients(every: int) -> None:
    student = _learn(_student(), every)
    fused = adadfq.fuse(student)
    assert {id(s) for s in step_sizes(fused)} == {id(s) for s in step_sizes(student)} != set()
    x, seed = torch.randn(6, 3, 8, 8, dtype=torch.float64), torch.randn(6, 10, dtype=torch.float64)
    found = []
    for model in (student, fused):
        images = x.clone().requires_grad_()
        names = [name for name, p in model.named_parameters() if p.requires_grad]
        out = model(images)
        grads = torch.autograd.grad(out, [images, *(dict(model.named_parameters())[n] for n in sorted(names))], seed)
        found.append([out, *grads])
    assert any("scale" in name for name in names)
    for got, want in zip(*found, strict=True):
        # Gradients of steps come back in float32.
        tight = 1e-9 if want.dtype == torch.float64 else 1e-5
        torch.testing.assert_close(got, want, rtol=tight, atol=tight * 1e-2)
        assert bool((want != 0).any())


def test_a_fused_network_that_learns_compiles_without_a_graph_break() -> None:
    student = _learn(_student(torch.float32), 2)
    fused = adadfq.fuse(student)
    torch._dynamo.reset()
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    x, seed = torch.randn(4, 3, 8, 8), torch.randn(4, 10)
    results = []
    for model in (fused, compiled):
        out = model(x)
        results.append([out, *torch.autograd.grad(out, step_sizes(student), seed)])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_weights_of_both_kinds_are_quantised_together() -> None:
    layers = [_layers()[1], _fix(_layers()[0]), _fix(_layers()[1]).learn_step(), _layers()[0].double()]
    for layer, got in zip(layers, quantize_weights(layers), strict=True):
        assert torch.equal(got, layer.quantize_weight(layer.weight))


def test_a_fused_norm_passes_the_learned_step() -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(4).eval()
    act = _frozen_act(0.0, 1.0).learn_step()
    x = torch.randn(3, 4, 5, 5, requires_grad=True)
    ((scale,), (shift,)) = fold_batch_norms([norm])
    fused = batch_norm_act_quantize(x, norm, scale, shift, None, "relu", act)
    plain = act(torch.relu(norm(x)))
    for got, want in zip(
        *(torch.autograd.grad(y.square().sum(), [x, norm.weight, norm.bias, act.scale]) for y in (fused, plain)),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_a_result_with_steps_loads(tmp_path: Path) -> None:
    torch.manual_seed(0)
    teacher = toy_teacher().eval()
    student = _learn(_student(torch.float32)).eval()
    recipe = adadfq.Recipe.named("cifar10_resnet20", weight_bits=4, image_size=8, batch_size=4)
    adadfq.checkpoint.write_state_dict(tmp_path / "teacher.safetensors", teacher.state_dict())
    save_result(tmp_path, Result(student, recipe, 0, "complete", 1), teacher, nn.Linear(1, 1))
    loaded = load(tmp_path, model=teacher)
    x = torch.randn(4, 3, 8, 8)
    assert torch.equal(loaded(x), student(x))
    assert module_bits(loaded) == module_bits(student) and step_sizes(loaded) == []
    assert set(loaded.state_dict()) == set(student.state_dict())
    set_module_bits(loaded, module_bits(loaded))
    assert torch.equal(loaded(x), student(x))


def test_a_step_downhill_lowers_the_error_of_quantisation(backend: str) -> None:
    weight = _randn(8, 200)
    scale, zero_point = F.qparams(weight.amin(1), weight.amax(1), 3)
    step = scale.clone().requires_grad_()
    errors = []
    for _ in range(30):
        error = (F.fake_quantize(weight, step, zero_point, 3, 0) - weight).square().mean(1)
        errors.append(error.detach())
        (gradient,) = torch.autograd.grad(error.sum(), step)
        with torch.no_grad():
            step -= 0.05 * gradient
    assert bool((errors[-1] < 0.9 * errors[0]).all())
