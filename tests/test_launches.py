"""Kernels, bytes and FLOPs that operators are counted with (benchmarks/launches.py)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from operator_arguments import arguments
from torch import Tensor, nn
from torch.nn import functional as F

import adadfq
from adadfq.ops.schema import OPERATORS
from benchmarks import launches, predict_cuda
from benchmarks.launches import BFLOAT16, LANES, OWN, TF32, Counter, Launch


def _launches(function: Callable[[], Any]) -> list[Launch]:
    with Counter("rest") as counter:
        function()
    return [launch for call in counter.calls for launch in call.launches]


X = torch.zeros(4, 8, 6, 6)
SIZE = X.nbytes


@pytest.mark.parametrize(
    "function,expected",
    [
        (lambda: X.view(4, -1).t()[1:].detach(), []),
        (lambda: torch.empty_like(X), []),
        (lambda: X + X, [3 * SIZE]),
        (lambda: X + torch.zeros(()), [2 * SIZE + 4]),
        (lambda: X.clone().add_(X), [2 * SIZE, 3 * SIZE]),
        (lambda: X.clone().zero_(), [2 * SIZE, SIZE]),
        (lambda: X.clone().copy_(X), [2 * SIZE, 2 * SIZE]),
        # What is repeated is in memory once.
        (lambda: X[:1].expand(4, -1, -1, -1) + X, [SIZE // 4 + 2 * SIZE]),
        # Rows of a table, not the table.
        (lambda: F.embedding(torch.zeros(3, dtype=torch.int64), torch.zeros(1000, 5)), [2 * 60 + 24]),
    ],
)
def test_bytes(function: Callable[[], Any], expected: list[int]) -> None:
    found = [launch.nbytes for launch in _launches(function)]
    assert found[-len(expected) or len(found) :] == expected


@pytest.mark.parametrize(
    "function,kernels",
    [
        (lambda t: torch.cat(t[:100]), 1),
        (lambda t: torch.cat(t), 3),
        # 110 tensors of one list, 64 of two, 36 of four, and no more than 320 chunks of 65536 elements.
        (lambda t: torch._foreach_add_(t[:110], 1), 1),
        (lambda t: torch._foreach_add_(t[:111], 1), 2),
        (lambda t: torch._foreach_add(t[:64], 1), 1),
        (lambda t: torch._foreach_add(t[:65], 1), 2),
        (lambda t: torch._foreach_mul_(t[:65], t[65:130]), 2),
        (lambda t: torch._foreach_mul_([torch.empty(321 * 65536)], 1), 2),
        (lambda t: F.pad(t[0], (1, 1)), 2),
    ],
)
def test_kernels(function: Callable[[list[Tensor]], Any], kernels: int) -> None:
    tensors = [torch.zeros(3) for _ in range(300)]
    assert len(_launches(lambda: function(tensors))) == kernels


@pytest.mark.parametrize("optimizer,kernels", [(torch.optim.Adam, 1 + 2), (torch.optim.SGD, 1)])
def test_kernels_of_fused_optimizers(optimizer: type[torch.optim.Optimizer], kernels: int) -> None:
    """Steps are counted by a list operator before; 40 tensors are more than 36 of four lists, and no more than 64."""
    parameters = [nn.Parameter(torch.zeros(3)) for _ in range(40)]
    for parameter in parameters:
        parameter.grad = torch.ones(3)
    player = optimizer(parameters, lr=0.1, fused=True)
    player.step()
    assert len(_launches(player.step)) == kernels


@pytest.mark.parametrize("dtype,unit", [(torch.float32, TF32), (torch.bfloat16, BFLOAT16)])
@pytest.mark.parametrize("transposed", [False, True])
def test_convolutions(dtype: torch.dtype, unit: str, transposed: bool) -> None:
    x = torch.zeros(2, 8, 5, 5, dtype=dtype, requires_grad=True)
    weight = torch.zeros(*((8, 16) if transposed else (16, 8)), 3, 3, dtype=dtype, requires_grad=True)
    bias = torch.zeros(16, dtype=dtype, requires_grad=True)
    convolve = F.conv_transpose2d if transposed else F.conv2d
    out = convolve(x, weight, bias)
    products = 2 * 8 * 16 * 9 * 2 * (25 if transposed else 9)
    moved = x.nbytes + weight.nbytes + out.nbytes
    forward = [Launch(moved, products, unit), Launch(2 * out.nbytes + bias.nbytes)]
    assert _launches(lambda: convolve(x, weight, bias)) == forward
    with Counter("rest") as counter:
        out.backward(torch.zeros_like(out))
    (call,) = [call for call in counter.calls if "convolution_backward" in call.op]
    assert call.backward
    assert list(call.launches) == [Launch(moved, products, unit)] * 2 + [Launch(out.nbytes + bias.nbytes)]


def test_depthwise_convolutions_and_float32_matrices_use_no_matrix_units() -> None:
    weight = torch.zeros(8, 1, 3, 3, requires_grad=True)
    with Counter("rest") as counter:
        F.conv2d(X.clone().requires_grad_(), weight, groups=8).sum().backward()
    products = [launch for call in counter.calls for launch in call.launches if launch.flops]
    assert [(launch.flops, launch.unit) for launch in products] == [(2 * 4 * 8 * 16 * 9, LANES)] * 3
    matrix = torch.zeros(4, 5)
    (launch,) = _launches(lambda: matrix @ matrix.t())
    assert launch == Launch(2 * matrix.nbytes + 64, 2 * 4 * 5 * 4, LANES)


def test_every_operator_is_known() -> None:
    """Packing is no part of a step."""
    assert set(OPERATORS) - set(OWN) == {"quantize_pack", "unpack_dequantize"}
    with pytest.raises(adadfq.InvalidInputError, match="adadfq::quantize_pack"):
        _launches(lambda: torch.ops.adadfq.quantize_pack(X, torch.ones(1), torch.zeros(1).int(), 4))


@pytest.mark.usefixtures("can_record")
@pytest.mark.parametrize("op", [op for op in OWN if not op.startswith("batch_norm_act")])
@pytest.mark.parametrize("channels_last", [False, True])
def test_own_launches_are_those_of_the_launchers(op: str, channels_last: bool) -> None:
    args = arguments(op, (16, 64, 28, 28), torch.float32, channels_last, "cpu", (16, 10))
    if "dynamic" in op:
        args = (*args[:2], 0)  # of weights, whose channels are rows of memory
    if op in ("foreach_fake_quantize", "foreach_learned_fake_quantize_backward"):
        *lists, widths, _ = args
        args = (*([t.transpose(0, 1).contiguous() if t.dim() > 1 else t for t in ts] for ts in lists), widths, 0)
    assert len(predict_cuda.record(op, args, 132)) == OWN[op].launches


def test_own_bytes() -> None:
    scale, shift = torch.zeros(8), torch.zeros(8)
    (launch,) = launches.launches_of(
        torch.ops.adadfq.affine_act_fake_quantize.default, (X, scale, shift, X, "relu", None, None, 4), {}, X.clone()
    )
    assert launch == Launch(3 * SIZE + 64)
    args = arguments("observe_fake_quantize", tuple(X.shape), torch.float32, False, "cpu")
    found = launches.launches_of(torch.ops.adadfq.observe_fake_quantize.default, args, {}, X.clone())
    assert len(found) == 2 and sum(launch.nbytes for launch in found) == pytest.approx(3 * SIZE, abs=64)


def test_backwards_are_of_the_part_that_went_forward() -> None:
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    optimizer = torch.optim.SGD(first.parameters(), lr=0.1)
    with Counter("rest") as counter, counter.watch(first=first, second1=second, optimizer=optimizer):
        loss = second(first(torch.zeros(2, 4)).relu()).sum()
        loss.backward()
        optimizer.step()
    found = [(call.part, call.backward, call.op.split(".")[1]) for call in counter.calls]
    assert ("first", False, "addmm") in found and ("second", False, "addmm") in found
    assert ("first", True, "mm") in found and ("second", True, "mm") in found
    assert ("rest", False, "relu") in found and ("rest", True, "threshold_backward") in found
    assert {part for part, _, op in found if op in ("add_", "_foreach_add_")} == {"optimizer"}
