"""QuantConv2d, QuantLinear and QuantAct as drop-in modules."""

from __future__ import annotations

import copy

import oracle
import pytest
import torch
from torch import nn

import adadfq
from adadfq import functional as F
from adadfq.nn import QuantAct, QuantConv2d, QuantLinear, QuantWeight, frozen_ranges, set_calibrating


def _rounded(weight: torch.Tensor, bits: int) -> torch.Tensor:
    rows = weight.detach().flatten(1)
    scale, zero_point = oracle.quantizer_range(rows.amin(1), rows.amax(1), bits)
    shape = [-1] + [1] * (weight.dim() - 1)
    return oracle.quantize(weight.detach(), scale.reshape(shape), zero_point.reshape(shape), bits).float()


CONVOLUTIONS = [
    {"padding": 1},
    {"padding": 2, "dilation": 2, "stride": 2},
    {"groups": 2, "bias": False},
    {"groups": 4, "padding": "same"},
    *({"padding": 1, "padding_mode": mode} for mode in ("reflect", "replicate", "circular")),
]


@pytest.mark.parametrize("options", CONVOLUTIONS, ids=str)
def test_conv_is_the_float_one_with_rounded_weights(options: dict[str, object]) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 4, 9, 9)
    float_conv = nn.Conv2d(4, 8, 3, **options)
    conv = QuantConv2d(4, 8, 3, **options, weight_bits=3)
    conv.load_state_dict(float_conv.state_dict())
    assert set(conv.state_dict()) == set(float_conv.state_dict())
    rounded = copy.deepcopy(float_conv)
    with torch.no_grad():
        rounded.weight.copy_(_rounded(float_conv.weight, 3))
    torch.testing.assert_close(conv(x), rounded(x))
    torch.testing.assert_close(QuantConv2d.from_float(float_conv, 3)(x), rounded(x))
    assert not torch.allclose(conv(x), float_conv(x), atol=1e-3)


def test_conv_weight_gets_the_gradient_of_the_rounded_weight() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 4, 9, 9)
    conv = QuantConv2d(4, 8, 3, weight_bits=4)
    rounded = nn.Conv2d(4, 8, 3)
    with torch.no_grad():
        rounded.weight.copy_(_rounded(conv.weight, 4))
        rounded.bias.copy_(conv.bias)
    for module in (conv, rounded):
        module(x).square().sum().backward()
    torch.testing.assert_close(conv.weight.grad, rounded.weight.grad, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("bias", [True, False])
def test_linear(bias: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 3, 7)
    float_linear = nn.Linear(7, 4, bias=bias)
    linear = QuantLinear.from_float(float_linear, 4)
    expected = nn.functional.linear(x, _rounded(float_linear.weight, 4), float_linear.bias)
    torch.testing.assert_close(linear(x), expected)
    loaded = QuantLinear(7, 4, bias=bias, weight_bits=4)
    loaded.load_state_dict(float_linear.state_dict())
    torch.testing.assert_close(loaded(x), expected)


def test_from_float_copies_and_keeps_what_the_module_was() -> None:
    float_conv = nn.Conv2d(3, 4, 1, dtype=torch.bfloat16).eval()
    float_conv.weight.requires_grad_(False)
    conv = QuantConv2d.from_float(float_conv, 4)
    assert conv.weight.dtype == torch.bfloat16 and not conv.weight.requires_grad and not conv.training
    with torch.no_grad():
        conv.weight.zero_()
    assert bool((float_conv.weight != 0).any())


def test_from_float_refuses_what_it_cannot_copy() -> None:
    class Padded(nn.Conv2d):
        pass

    with pytest.raises(adadfq.InvalidInputError, match=r"takes a torch.nn.Conv2d, got Padded"):
        QuantConv2d.from_float(Padded(1, 1, 1), 4)
    with pytest.raises(adadfq.InvalidInputError, match=r"takes a torch.nn.Linear, got Conv2d"):
        QuantLinear.from_float(nn.Conv2d(1, 1, 1), 4)


@pytest.mark.parametrize("bits", [1, 9, 4.0, "4", None, True])
def test_bits_are_checked(bits: object) -> None:
    for make in (
        lambda: QuantConv2d(1, 1, 1, weight_bits=bits),
        lambda: QuantLinear(1, 1, weight_bits=bits),
        lambda: QuantWeight(bits),
    ):
        with pytest.raises(adadfq.InvalidInputError, match=r"weight_bits must be 2\.\.8, got"):
            make()
    with pytest.raises(adadfq.InvalidInputError, match=r"act_bits must be 2\.\.8, got"):
        QuantAct(bits)


def test_act_range_is_the_debiased_moving_average() -> None:
    act = QuantAct(4)
    batches = [torch.tensor([-i, 2.0 * i + 1]) for i in range(1, 6)]
    for n in range(1, 6):
        act(batches[n - 1])
        weights = torch.tensor([0.9 ** (n - i) for i in range(1, n + 1)], dtype=torch.float64)
        for buffer, end in ((act.running_min, 0), (act.running_max, 1)):
            seen = torch.stack([b[end].double() for b in batches[:n]])
            assert buffer.item() == pytest.approx(float((weights * seen).sum() / weights.sum()), rel=1e-5)
    scale, zero_point = F.qparams(act.running_min, act.running_max, 4)
    assert torch.equal(act.scale, scale) and torch.equal(act.zero_point, zero_point)


def test_act_range_stands_at_a_constant_from_the_first_batch_on() -> None:
    act = QuantAct(4)
    for _ in range(50):
        act(torch.tensor([0.0, 1.0]))
        assert act.running_max.item() == pytest.approx(1.0, abs=1e-6)


def test_act_without_momentum_follows_the_last_batch() -> None:
    act = QuantAct(4, momentum=0.0)
    for top in (1.0, 7.0):
        act(torch.tensor([0.0, top]))
    assert act.running_max.item() == 7.0


def test_act_calibrates_in_eval_mode_and_stands_when_frozen() -> None:
    act = QuantAct(3).eval()
    act(torch.tensor([0.0, 1.0]))
    act.freeze()
    out = act(torch.tensor([0.0, 100.0]))
    assert act.running_max.item() == 1.0 and out.tolist() == [0.0, 1.0]


def test_act_state_survives_a_round_trip() -> None:
    act = QuantAct(4)
    act(torch.tensor([0.0, 2.0]))
    act.freeze()
    loaded = QuantAct(4)
    loaded.load_state_dict(act.state_dict())
    loaded(torch.tensor([0.0, 50.0]))
    assert loaded.running_max.item() == 2.0
    assert {k: v.shape for k, v in act.state_dict().items()} == {k: torch.Size([]) for k in act.state_dict()}


def test_act_range_is_not_rounded_by_a_cast() -> None:
    act = QuantAct(8)
    act(torch.tensor([0.0, 1.001]))
    act.freeze()
    expected = act.scale.clone()
    model = nn.Sequential(act).to(torch.bfloat16)
    assert model[0].scale.dtype == torch.float32 and torch.equal(model[0].scale, expected)
    assert model(torch.ones(3, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_freezing_asks_for_a_finite_range() -> None:
    model = nn.Sequential(QuantAct(4), QuantAct(4))
    with pytest.raises(adadfq.InvalidInputError, match="0: QuantAct cannot be frozen before it has seen a batch"):
        set_calibrating(model, False)
    model(torch.tensor([0.0, float("inf")]))
    with pytest.raises(adadfq.InvalidInputError, match="held NaN or infinity"):
        set_calibrating(model, False)
    assert all(act.calibrating for act in model)
    with pytest.raises(adadfq.InvalidInputError, match="empty batch"):
        QuantAct(4)(torch.zeros(0, 3))


def test_frozen_ranges_is_for_the_block_only() -> None:
    act = QuantAct(4)
    act(torch.tensor([0.0, 1.0]))
    with frozen_ranges(act):
        act(torch.tensor([0.0, 9.0]))
        assert act.running_max.item() == 1.0
    act(torch.tensor([0.0, 9.0]))
    assert act.running_max.item() > 1.0


@pytest.mark.parametrize("calibrating", [True, False])
def test_a_block_compiles_into_one_graph(calibrating: bool) -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    block = nn.Sequential(QuantConv2d(3, 8, 3, padding=1, weight_bits=4), nn.ReLU(), QuantAct(4))
    x = torch.randn(2, 3, 8, 8)
    block(x)
    if not calibrating:
        set_calibrating(block, False)
    eager = copy.deepcopy(block)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [compiled(inputs[0]), eager(inputs[1])]
    for out in outputs:
        out.square().sum().backward()
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    torch.testing.assert_close(block[0].weight.grad, eager[0].weight.grad)
    torch.testing.assert_close(dict(block.state_dict()), dict(eager.state_dict()))


def test_a_block_compiles_with_inductor() -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    block = nn.Sequential(QuantConv2d(3, 8, 3, padding=1, weight_bits=4), nn.ReLU(), QuantAct(4))
    x = torch.randn(2, 3, 8, 8)
    block(x)
    set_calibrating(block, False)
    compiled = torch.compile(block, fullgraph=True)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [compiled(inputs[0]), block(inputs[1])]
    for out in outputs:
        out.square().sum().backward()
    # Inductor may fuse the convolution's bias differently: codes next to a tie may move by one step.
    assert (outputs[0] - outputs[1]).abs().max() <= block[2].scale * 1.001
    assert ((outputs[0] - outputs[1]).abs() > 1e-5).float().mean() < 0.01
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-2, atol=1e-2)
