"""Ranges of least squared error."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from toy import toy_teacher

import adadfq
from adadfq import functional
from adadfq.nn import activations, set_calibrating
from adadfq.ranges import fix_weight_steps, mse_range, shrink_act_ranges


def _error(x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, bits: int) -> torch.Tensor:
    return (functional.fake_quantize(x, scale, zero_point, bits, axis=0) - x).square().sum(1)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_no_shrunken_range_loses_less(bits: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 400) * torch.tensor([0.1, 1.0, 10.0, 1.0, 1.0])[:, None]
    x[3] = x[3].abs()
    x[4, 0] = 40.0  # an outlier
    found = _error(x, *mse_range(x, bits), bits)
    shares = torch.linspace(0.2, 1.0, 41)
    errors = torch.stack(
        [_error(x, *functional.qparams(x.amin(1) * s, x.amax(1) * s, bits), bits) for s in shares.tolist()]
    )
    torch.testing.assert_close(found, errors.amin(0))
    whole = errors[-1]
    assert bool((found <= whole).all())
    if bits <= 4:
        assert bool((found[:3] < 0.95 * whole[:3]).all())


def test_channels_of_another_axis_and_constant_channels() -> None:
    x = torch.randn(6, 3, 4)
    scale, zero_point = mse_range(x, 3, axis=1)
    expected = mse_range(x.transpose(0, 1).reshape(3, -1), 3)
    assert torch.equal(scale, expected[0]) and torch.equal(zero_point, expected[1])
    scale, zero_point = mse_range(torch.zeros(2, 4), 3)
    assert scale.tolist() == [1.0, 1.0] and zero_point.tolist() == [0, 0]


def test_activation_ranges_shrink_to_the_least_error() -> None:
    torch.manual_seed(0)
    student = adadfq.quantize(toy_teacher(), 3, 3).eval()
    batches = [torch.randn(8, 3, 8, 8) for _ in range(3)]
    for images in batches:
        student(images)
    set_calibrating(student, False)
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in activations(student)}
    for name, act in activations(student).items():
        act.register_forward_pre_hook(lambda m, args, name=name: seen[name].append(args[0]))
    before = copy.deepcopy(student)
    shrink_act_ranges(student, batches)
    for name, act in activations(student).items():
        was = before.get_submodule(name)
        x = torch.cat([value.reshape(1, -1) for value in seen[name]], 1)
        share = (act.running_max / was.running_max).item()
        assert 0.2 <= share <= 1
        errors = [
            _error(x, *functional.qparams(was.running_min[None] * s, was.running_max[None] * s, 3), 3).item()
            for s in (share, share - 0.02, share + 0.02, 1.0)
        ]
        assert errors[0] == min(errors)
        assert torch.equal(act.scale, functional.qparams(act.running_min, act.running_max, 3)[0])


class _Functional(nn.Module):
    """A convolution as a function of a weight that no layer holds."""

    def __init__(self) -> None:
        super().__init__()
        self.raw = nn.Parameter(torch.randn(4, 3, 3, 3))
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.norm(torch.conv2d(x, self.raw))).mean((2, 3))


@pytest.mark.parametrize("method", ["minmax", "mse"])
def test_weights_keep_the_range_they_have(method: str) -> None:
    torch.manual_seed(0)
    for model in (toy_teacher(), _Functional().eval()):
        student = adadfq.quantize(model, 3, 3)
        images = torch.randn(4, 3, 8, 8)
        student(images)
        set_calibrating(student, False)
        before = student(images)
        fix_weight_steps(student, method, images)
        after = student(images)
        if method == "minmax":
            torch.testing.assert_close(after, before)
        else:
            assert not torch.allclose(after, before)
    weight = student.get_parameter("raw")
    quantizer = next(m for m in student.modules() if type(m) is adadfq.nn.QuantWeight)
    expected = functional.qparams(*weight.flatten(1).aminmax(dim=1), 3) if method == "minmax" else mse_range(weight, 3)
    torch.testing.assert_close(quantizer.weight_scale, expected[0])


def test_an_activation_of_zeros_or_without_numbers_keeps_its_range() -> None:
    student = adadfq.quantize(toy_teacher(), 3, 3).eval()
    student(torch.randn(8, 3, 8, 8))
    set_calibrating(student, False)
    before = {name: act.running_max.clone() for name, act in activations(student).items()}
    with torch.no_grad():
        student.bn1.weight.zero_()
        student.bn1.bias.zero_()
    shrink_act_ranges(student, [torch.randn(8, 3, 8, 8)])
    first = next(iter(before))
    assert torch.equal(student.get_submodule(first).running_max, before[first])
    shrink_act_ranges(student, [torch.full((8, 3, 8, 8), torch.nan)])
    assert torch.equal(student.get_submodule(first).running_max, before[first])
