"""What the CUDA backend hands to ``adadfq._C_cuda``, seen by a stand-in: no GPU and no CUDA build is needed."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from operator_arguments import arguments, assert_right, call
from torch import Tensor

import adadfq
from adadfq import functional as F
from adadfq.ops import cpu, cuda, dispatch, native_args, operators
from adadfq.ops.schema import OPERATORS

LAYOUT = "outer channels inner"
#: Function -> its parameters before dtype, device and stream: csrc/bind_cuda.cpp has the same, in this order.
PARAMETERS = {
    "fake_quantize": f"x scale zero_point out {LAYOUT} bits",
    "fake_quantize_backward": f"grad x scale zero_point out {LAYOUT} bits",
    "dynamic_fake_quantize": "tensors count scratch",
    "foreach_fake_quantize": "tensors count",
    "learned_fake_quantize_backward": "tensors count scratch",
    "observe_fake_quantize": "x out n running_min running_max num_batches scale zero_point scratch bits momentum",
    "affine_act_fake_quantize": f"x scale shift residual act act_scale act_zero_point bits out {LAYOUT}",
    "affine_act_quantize": f"x scale shift residual act act_scale act_zero_point bits codes {LAYOUT}",
    "affine_act_fake_quantize_backward": (
        f"grad x scale shift residual act grad_x grad_residual grad_scale grad_shift scratch {LAYOUT}"
    ),
    "affine_act_learned_fake_quantize_backward": (
        "grad x scale shift residual act act_scale act_zero_point bits grad_x grad_residual grad_scale grad_shift "
        f"grad_act_scale scratch block_sums {LAYOUT}"
    ),
    "quantize_pack": f"x scale zero_point packed {LAYOUT} bits",
    "unpack_dequantize": f"packed scale zero_point out {LAYOUT} bits",
    "bn_match": f"x running_mean running_var weight bias eps y loss mean var scratch {LAYOUT}",
    "bn_match_backward": f"grad_y grad_loss x mean var running_mean running_var weight eps out {LAYOUT}",
    "margin_loss": (
        "teacher student labels total margin disagreement agreement h_prime grad_teacher grad_student scratch batch "
        "classes lambda_l lambda_u alpha_ds alpha_as beta detach_min"
    ),
    "entropy_distillation": "teacher student loss grad_student scratch batch classes temperature",
}
#: Not what a GPU needs: what is asked for is what must come.
DOUBLES = 7
LONGEST_ROW = 100


class StandIn:
    """Has the functions of ``_C_cuda``, over those of ``_C_cpu``, which take the same but scratch memory."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.native = importlib.import_module("adadfq._C_cpu")

    longest_row = LONGEST_ROW

    def partial_doubles(self, channels: int) -> int:
        return DOUBLES * channels

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name not in PARAMETERS:
            raise AttributeError(name)

        def function(*args: Any) -> None:
            names = [*PARAMETERS[name].split(), "dtype", "device", "stream"]
            given = dict(zip(names, args, strict=True))
            self.calls.append((name, dict(given)))
            for left_out in ("scratch", "block_sums", "device", "stream"):
                given.pop(left_out, None)
            getattr(self.native, name)(*given.values(), 1)

        return function


@pytest.fixture
def native(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    """The backend over the stand-in, serving CPU tensors; anything of torch.cuda is an error."""
    stand_in = StandIn()

    def untouched(*_: Any, **__: Any) -> None:
        raise AssertionError("torch.cuda was asked for a CPU tensor")

    monkeypatch.setattr(cuda, "DEVICE_TYPE", "cpu")
    monkeypatch.setattr(cuda, "INTERPRETED", True)
    monkeypatch.setattr(cuda, "_load", lambda: (stand_in, None))
    monkeypatch.setattr(torch.cuda, "current_device", untouched)
    monkeypatch.setattr(torch.cuda, "device", untouched)
    dispatch._select.cache_clear()
    yield stand_in
    dispatch._select.cache_clear()


@pytest.fixture
def scratch(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, Tensor]]:
    """Grows by (how many numbers were asked for, the memory) with every call that takes scratch memory."""
    taken: list[tuple[int, Tensor]] = []
    allocate = cuda._scratch

    def recorded(x: Tensor, doubles: int) -> Tensor:
        memory = allocate(x, doubles)
        assert memory.dtype == torch.float64 and memory.numel() == doubles and memory.device == x.device
        taken.append((doubles, memory))
        return memory

    monkeypatch.setattr(cuda, "_scratch", recorded)
    return taken


def test_the_parameters_are_those_of_every_function() -> None:
    assert {*PARAMETERS, "partial_doubles", "longest_row", "warm_up"} == set(cuda.FUNCTIONS)


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", sorted(native_args.DTYPES, key=str))
@pytest.mark.parametrize("op", list(cuda.KERNELS))
def test_arguments_come_in_order(native: StandIn, op: str, dtype: torch.dtype, channels_last: bool) -> None:
    """Whatever was exchanged for something else would make the result another one."""
    for shape in ((3, 5, 7, 9), (2, 1, 4, 3)):
        native.calls.clear()
        args = arguments(op, shape, dtype, channels_last)
        assert_right(op, call(cuda.KERNELS[op], op, args), args)
        ((_, given),) = native.calls
        assert (given["dtype"], given["device"], given["stream"]) == (native_args.DTYPE_NUMBERS[dtype], 0, 0)


@pytest.mark.parametrize("op", [op for op in cuda.KERNELS if not op.startswith(("dynamic", "foreach"))])
def test_layouts(native: StandIn, op: str) -> None:
    for channels_last in (False, True):
        cuda.KERNELS[op](*arguments(op, (3, 5, 7, 9), torch.float32, channels_last))
        name, given = native.calls[-1]
        if "outer" in given:
            # The stream of packed codes has its order whatever the strides.
            rows = not channels_last or op in operators.PACKING
            expected = {"outer": 3, "inner": 63} if rows else {"outer": 3 * 63, "inner": 1}
            _check(native, name, {}, channels=5, **expected)


def test_tensors_come_as_their_addresses(native: StandIn) -> None:
    random = torch.Generator().manual_seed(0)
    x, grad, residual = torch.randn(3, 2, 5, 4, 4, generator=random)
    scale, shift = torch.rand(2, 5, generator=random)
    zero_point = torch.zeros(5, dtype=torch.int32)
    out = cuda.KERNELS["fake_quantize"](x, scale, zero_point, 4, 1)
    tensors = {"x": x, "scale": scale, "zero_point": zero_point, "out": out}
    _check(native, "fake_quantize", tensors, bits=4, outer=2, channels=5, inner=16)

    cuda.KERNELS["fake_quantize_"](out, scale[:1], zero_point[:1], 3)
    tensors |= {"x": out}
    _check(native, "fake_quantize", tensors, bits=3, outer=1, channels=1, inner=out.numel())

    grads = cuda.KERNELS["affine_act_fake_quantize_backward"](grad, x, scale, shift, residual, "relu6", True, True)
    named = dict(zip(("grad_x", "grad_residual", "grad_scale", "grad_shift"), grads, strict=True))
    named |= {"grad": grad, "x": x, "scale": scale, "shift": shift, "residual": residual}
    _check(native, "affine_act_fake_quantize_backward", named, act=2)

    step, zero = torch.tensor([0.1]), torch.tensor([3], dtype=torch.int32)
    learned = (grad, x, scale, shift, residual, "relu", step, zero, 5)
    grads = cuda.KERNELS["affine_act_learned_fake_quantize_backward"](*learned, True, True)
    names = ("grad_x", "grad_residual", "grad_scale", "grad_shift", "grad_act_scale")
    named = {**named, **dict(zip(names, grads, strict=True)), "act_scale": step, "act_zero_point": zero}
    _check(native, "affine_act_learned_fake_quantize_backward", named, act=1, bits=5)
    assert native.calls[-1][1]["scratch"] != native.calls[-1][1]["block_sums"]

    y, loss, mean, var = cuda.KERNELS["bn_match_forward"](x, scale, shift, grad[0, :, 0, 0], residual[0, :, 0, 0], 1e-3)
    named = {"x": x, "running_mean": scale, "running_var": shift, "y": y, "loss": loss, "mean": mean, "var": var}
    _check(native, "bn_match", named, eps=1e-3)


def _check(native: StandIn, function: str, tensors: dict[str, Tensor], **values: Any) -> None:
    name, given = native.calls[-1]
    assert name == function
    assert {key: given[key] for key in tensors} == {key: tensor.data_ptr() for key, tensor in tensors.items()}
    assert {key: given[key] for key in values} == values


def test_what_is_absent_is_0(native: StandIn) -> None:
    x, grad = torch.randn(2, 2, 5, 4, 4)
    scale, shift = torch.rand(2, 5)
    cuda.KERNELS["affine_act_fake_quantize"](x, scale, shift, None, "relu", None, None, 8)
    _check(native, "affine_act_fake_quantize", {}, residual=0, act_scale=0, act_zero_point=0, act=1, bits=8)
    cuda.KERNELS["affine_act_fake_quantize_backward"](grad, x, scale, shift, None, "relu", False, False)
    absent = ("residual", "grad_residual", "grad_scale", "grad_shift", "scratch")
    _check(native, "affine_act_fake_quantize_backward", {}, **dict.fromkeys(absent, 0))
    step, zero = torch.tensor([0.1]), torch.tensor([3], dtype=torch.int32)
    learned = (grad, x, scale, shift, None, "relu", step, zero, 5)
    cuda.KERNELS["affine_act_learned_fake_quantize_backward"](*learned, False, False)
    _check(native, "affine_act_learned_fake_quantize_backward", {}, **dict.fromkeys(absent[:-1], 0))
    _, mean, var = cuda.KERNELS["bn_match"](x, scale, shift)
    _check(native, "bn_match", {}, weight=0, bias=0, y=0, eps=0.0)
    cuda.KERNELS["bn_match_backward"](torch.tensor(1.0), x, mean, var, scale, shift)
    _check(native, "bn_match_backward", {}, weight=0, grad_y=0, eps=0.0)


@pytest.mark.parametrize(
    "op,doubles",
    [
        ("dynamic_fake_quantize", DOUBLES * 5),
        ("foreach_dynamic_fake_quantize", DOUBLES * 3),  # tensors of 3, 1 and 3 channels
        ("observe_fake_quantize", DOUBLES),
        ("learned_fake_quantize_backward", DOUBLES * 5),
        ("foreach_learned_fake_quantize_backward", DOUBLES * 5),
        ("affine_act_fake_quantize_backward", DOUBLES * 5),
        ("bn_match", DOUBLES * 5),
        ("bn_match_forward", DOUBLES * 5),
        ("margin_loss", 5 * 16),
        ("entropy_distillation", 5 * 16),
    ],
)
def test_scratch_memory(native: StandIn, scratch: list[tuple[int, Tensor]], op: str, doubles: int) -> None:
    cuda.KERNELS[op](*arguments(op, (3, 5, 7, 9), torch.float32))
    ((name, given),) = native.calls
    ((taken, memory),) = scratch
    assert taken == doubles and given["scratch"] == memory.data_ptr(), name


@pytest.mark.parametrize("op", [op for op in cuda.KERNELS if not op.startswith(("dynamic", "foreach"))])
def test_no_other_scratch_memory_is_taken(native: StandIn, scratch: list[tuple[int, Tensor]], op: str) -> None:
    cuda.KERNELS[op](*arguments(op, (3, 5, 7, 9), torch.float32))
    ((_, given),) = native.calls
    assert len(scratch) == ("scratch" in given) + ("block_sums" in given)


@pytest.mark.parametrize(
    "shapes,axis,doubles",
    [
        ([(5, LONGEST_ROW), (3, 2, 7)], 0, 0),
        ([(5, LONGEST_ROW + 1), (300, 7)], 0, 5),
        ([(1, 9, 4), (2, 3, 7)], 1, 3),  # channels of the second are two rows each
    ],
)
def test_rows_take_no_scratch_memory(
    native: StandIn, scratch: list[tuple[int, Tensor]], shapes: list[tuple[int, ...]], axis: int, doubles: int
) -> None:
    tensors = [torch.randn(shape) for shape in shapes]
    cuda.KERNELS["foreach_dynamic_fake_quantize"](tensors, [4] * len(shapes), axis)
    ((_, given),) = native.calls
    assert [taken for taken, _ in scratch] == [DOUBLES * doubles] * (doubles > 0)
    assert (given["scratch"] == 0) == (doubles == 0)


def test_many_tensors_are_one_call(native: StandIn) -> None:
    tensors = [torch.randn(shape) for shape in ((4, 3, 3, 3), (0, 3), (7, 2), (1, 9))]
    x_hats, scales, zero_points = cuda.KERNELS["foreach_dynamic_fake_quantize"](tensors, [4, 4, 2, 8], 0)
    for x, width, *found in zip(tensors, (4, 4, 2, 8), x_hats, scales, zero_points, strict=True):
        for got, want in zip(found, cpu.dynamic_fake_quantize(x, width, 0), strict=True):
            assert torch.equal(got, want)
    ((_, given),) = native.calls
    assert given["count"] == 3


def test_a_failure_names_the_operator_and_its_tensors(native: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: Any) -> None:
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(StandIn, "__getattr__", lambda self, name: failing)
    for op, text in (
        ("fake_quantize_", r"fake_quantize_ failed on cpu for torch.float32 \[3, 5, 7, 9\]: no kernel image"),
        ("bn_match_forward", r"bn_match_forward failed on cpu for torch.float32 \[3, 5, 7, 9\]: no kernel image"),
        ("margin_loss", r"margin_loss failed on cpu for torch.float32 \[16, 10\]: .*ADADFQ_BACKEND=reference"),
    ):
        with pytest.raises(adadfq.BackendError, match=text):
            cuda.KERNELS[op](*arguments(op, (3, 5, 7, 9), torch.float32))


def test_it_serves_what_it_is_asked_for(native: StandIn) -> None:
    x = torch.randn(3, 4, requires_grad=True)
    with adadfq.use_backend("cuda"):
        x_hat, _, _ = F.dynamic_fake_quantize(x, 4)
        loss = F.bn_match(x, torch.zeros(4), torch.ones(4))
        (x_hat.sum() + loss).backward()
    assert [name for name, _ in native.calls] == ["dynamic_fake_quantize", "bn_match", "bn_match_backward"]
    logits, labels = torch.randn(2, 3, 4), torch.tensor([0, 1, 9])
    with pytest.raises(adadfq.InvalidInputError, match="labels must be in 0..3, got 9"):
        cuda.KERNELS["margin_loss"](*logits, labels, 0.3, 0.6, 0.2, 0.1, 0.7, False)


# -------------------------------------------------------------------------------------------------- streams, devices


class OnDevice(SimpleNamespace):
    """What a call asks of a CUDA tensor."""

    is_cuda = True
    dtype = torch.float32

    def get_device(self) -> int:
        return self.index


@pytest.mark.parametrize("current", [0, 1])
def test_the_stream_is_that_of_the_tensors_device(current: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []

    class Device:
        def __init__(self, index: int) -> None:
            self.index = index

        def __enter__(self) -> None:
            seen.append(("enter", self.index))

        def __exit__(self, *_: object) -> None:
            seen.append(("exit", self.index))

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
    monkeypatch.setattr(torch.cuda, "device", Device)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 1000 + index, raising=False)
    module = SimpleNamespace(
        function=lambda *args: seen.append(args), warm_up=lambda device: seen.append(("warm up", device))
    )
    monkeypatch.setattr(cuda, "_load", lambda: (module, None))
    for first in ([("warm up", 1)], []):
        seen.clear()
        cuda.call("op", "function", OnDevice(index=1), 5)
        launched = [*first, (5, 0, 1, 1001)]
        assert seen == (launched if current == 1 else [("enter", 1), *launched, ("exit", 1)])


# ---------------------------------------------------------------------------------------------------- availability


def test_a_module_of_other_sources_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    old = SimpleNamespace(**{name: None for name in cuda.FUNCTIONS if name not in ("bn_match", "partial_doubles")})
    monkeypatch.setattr(cuda, "build_info", dict)
    monkeypatch.setattr(cuda.importlib, "import_module", lambda name: old)
    module, reason = cuda._load.__wrapped__()
    assert module is None and reason is not None
    assert re.search(r"without bn_match, partial_doubles: build it again with 'pip install -e .'", reason)


def test_one_backend_or_the_other_has_every_operator() -> None:
    """Packed codes, which only checkpoints have, have no Triton kernel; training-mode BatchNorm has none in C++."""
    norm = {"batch_norm_act", "batch_norm_act_backward"}
    assert set(OPERATORS) - norm == set(cuda.KERNELS)
    assert set(OPERATORS) - {"quantize_pack", "unpack_dequantize"} == set(dispatch.BACKENDS["triton"].KERNELS)
    assert {*operators.OPERATORS, *operators.PACKING, *operators.BATCH_NORM_ACT} == set(OPERATORS)
    for name in ("cuda", "triton"):
        assert all(callable(kernel) for kernel in dispatch.BACKENDS[name].KERNELS.values())
