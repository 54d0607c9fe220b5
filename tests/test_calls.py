"""How operators are called: transforms, modes, default devices, forward mode and second derivatives around them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

import adadfq
from adadfq import functional as F
from adadfq.ops import cpu

SCALE, ZERO_POINT = torch.tensor([0.1]), torch.tensor([3], dtype=torch.int32)
MEAN, VAR = torch.zeros(3), torch.ones(3)
LABELS = torch.zeros(3, dtype=torch.int64)


def _x(seed: int = 0) -> Tensor:
    return torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(seed))


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "fake_quantize": lambda x: F.fake_quantize(x, SCALE, ZERO_POINT, 4),
    "dynamic_fake_quantize": lambda x: F.dynamic_fake_quantize(x, 4)[0],
    "foreach_dynamic_fake_quantize": lambda x: F.foreach_dynamic_fake_quantize([x], 4)[0][0],
    "affine_act_fake_quantize": lambda x: F.affine_act_fake_quantize(x, VAR, MEAN, x, "relu", (SCALE, ZERO_POINT, 4)),
    "bn_match": lambda x: F.bn_match(x, MEAN, VAR),
    "bn_match_forward": lambda x: F.bn_match_forward(x, MEAN, VAR)[0],
    "batch_norm_act": lambda x: F.batch_norm_act(x, VAR, MEAN, negative_slope=0.2).y,
    "margin_loss": lambda x: F.margin_loss(x[0], x[1], LABELS, 0.1, 0.8, 0.2, 0.1, 1.0).total,
    "entropy_distillation": lambda x: F.entropy_distillation(x[0], x[1], 5.0),
}
named = pytest.mark.parametrize("name", FUNCTIONS)


@named
def test_a_default_device_is_not_where_results_go(name: str) -> None:
    want = FUNCTIONS[name](_x())
    x = _x().requires_grad_()
    with torch.device("meta"):
        got = FUNCTIONS[name](x)
        got.sum().backward()
    assert got.device.type == "cpu"
    torch.testing.assert_close(got.detach(), want, rtol=0, atol=0)
    assert x.grad is not None and x.grad.device.type == "cpu" and bool(x.grad.isfinite().all())


@named
def test_functionalize_gives_the_same(name: str) -> None:
    torch.testing.assert_close(torch.func.functionalize(FUNCTIONS[name])(_x()), FUNCTIONS[name](_x()), rtol=0, atol=0)


def test_tensors_that_are_not_their_memory() -> None:
    zeros = torch._efficientzerotensor(4, 3, 5)
    assert torch.equal(F.fake_quantize(zeros, SCALE, ZERO_POINT, 4), torch.zeros(4, 3, 5))
    assert torch.equal(F.affine_act_fake_quantize(_x(), VAR, MEAN, zeros), F.affine_act_fake_quantize(_x(), VAR, MEAN))
    negative = torch.view_as_complex(torch.stack([_x(), _x(1)], -1)).conj().imag
    assert negative.is_neg()
    assert torch.equal(F.fake_quantize(negative, SCALE, ZERO_POINT, 4), F.fake_quantize(-_x(1), SCALE, ZERO_POINT, 4))


def test_a_tensor_subclass_anywhere_goes_through_the_framework() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        residual = mode.from_tensor(_x())
    # A fake tensor beside real ones is refused by the framework; what it must not be is ignored, or read.
    with pytest.raises(Exception, match=r"(?i)fake"):
        F.affine_act_fake_quantize(_x(), VAR, MEAN, residual)


def test_a_function_mode_and_a_trace_see_the_operator() -> None:
    seen = []

    class Mode(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Mode():
        F.fake_quantize(_x(), SCALE, ZERO_POINT, 4)
    assert any("adadfq" in name for name in seen)
    traced = torch.jit.trace(FUNCTIONS["fake_quantize"], (_x(),))
    torch.testing.assert_close(traced(_x(1)), FUNCTIONS["fake_quantize"](_x(1)), rtol=0, atol=0)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        F.fake_quantize(_x(), SCALE, ZERO_POINT, 4)
    assert any("adadfq::fake_quantize" in event.key for event in profile.key_averages())


@named
def test_forward_mode_is_refused(name: str) -> None:
    with forward_ad.dual_level(), pytest.raises((NotImplementedError, RuntimeError)):
        dual = forward_ad.make_dual(_x(), _x(1))
        FUNCTIONS[name](dual)


@pytest.mark.parametrize("name", ["affine_act_fake_quantize", "bn_match", "margin_loss", "entropy_distillation"])
def test_second_derivatives_are_refused(name: str) -> None:
    x = _x().requires_grad_()
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(FUNCTIONS[name](x).sum() + x.pow(3).sum(), x, create_graph=True)


def test_straight_through_has_every_derivative() -> None:
    x = _x().requires_grad_()
    (gradient,) = torch.autograd.grad(F.fake_quantize(x, SCALE, ZERO_POINT, 4).pow(3).sum(), x, create_graph=True)
    gradient.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, 6 * F.fake_quantize(x, SCALE, ZERO_POINT, 4).detach())


def test_a_gradient_given_twice_is_the_same_gradient() -> None:
    teacher, student = (_x(s)[0].requires_grad_() for s in (0, 1))
    loss = F.entropy_distillation(teacher, student, 5.0)
    first = torch.autograd.grad(loss, student, retain_graph=True)[0].clone()
    assert torch.equal(torch.autograd.grad(loss, student)[0], first)


def test_the_state_of_a_range_is_refused_before_it_is_changed() -> None:
    def state() -> list[Tensor]:
        return [torch.zeros(()), torch.zeros(()), torch.tensor(0), torch.ones(()), torch.tensor(0, dtype=torch.int32)]

    learned = state()
    learned[3].requires_grad_()
    refused = [(learned, "scale must be a tensor without a gradient")]
    for first, second in ((0, 1), (0, 3), (1, 3)):
        shared = state()
        shared[second] = shared[first]
        refused.append((shared, "different tensors"))
    mixed = state()
    mixed[4] = mixed[2]
    refused.append((mixed, "zero_point must hold one torch.int32"))
    for bad, message in refused:
        with pytest.raises(adadfq.InvalidInputError, match=message):
            F.observe_fake_quantize(_x(), *bad, 4)
        assert int(bad[2]) == 0 and float(bad[0]) == 0
    with pytest.raises(adadfq.InvalidInputError, match="running_min must be a tensor"):
        F.observe_fake_quantize(_x(), 0.0, *state()[1:], 4)


@pytest.mark.parametrize(
    "message,call",
    [
        ("bits must be 2..8, got 40", lambda o, x: o.fake_quantize(x, SCALE, ZERO_POINT, 40)),
        ("bits must be 2..8, got 0", lambda o, x: o.dynamic_fake_quantize(x, 0, 0)),
        ("at least one tensor", lambda o, x: o.foreach_dynamic_fake_quantize([], [], 0)),
        (
            "act must be one of none, relu, relu6, got 'tanh'",
            lambda o, x: o.affine_act_fake_quantize(x, VAR, MEAN, None, "tanh", None, None, 4),
        ),
        (
            "must be given together",
            lambda o, x: o.affine_act_fake_quantize(x, VAR, MEAN, None, "relu", SCALE, None, 4),
        ),
    ],
)
def test_operators_called_directly_refuse_bad_arguments(message: str, call: Callable[..., Tensor]) -> None:
    with pytest.raises(adadfq.InvalidInputError, match=message):
        call(torch.ops.adadfq, _x())


def test_functions_refuse_what_is_no_tensor() -> None:
    x = _x()
    with pytest.raises(adadfq.InvalidInputError, match="residual must be a tensor, got float"):
        F.affine_act_fake_quantize(x, VAR, MEAN, 1.0)
    with pytest.raises(adadfq.InvalidInputError, match=r"qparams must be \(scale, zero_point, bits\)"):
        F.affine_act_fake_quantize(x, VAR, MEAN, qparams=(SCALE, ZERO_POINT))
    with pytest.raises(adadfq.InvalidInputError, match="tensors must be a list of tensors"):
        F.foreach_dynamic_fake_quantize(x, 8)
    with pytest.raises(adadfq.InvalidInputError, match=r"bits must be 2..8, got 8.0"):
        F.foreach_dynamic_fake_quantize([x], 8.0)


def test_only_what_needs_a_gradient_gets_one_in_a_list() -> None:
    needs, not_needed = _x().requires_grad_(), _x(1)
    x_hats, _, _ = F.foreach_dynamic_fake_quantize([needs, not_needed], 4)
    assert [x.requires_grad for x in x_hats] == [True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_gradient_of_y_or_of_the_loss_alone(dtype: torch.dtype) -> None:
    x = _x().to(dtype).requires_grad_()
    y, loss = F.bn_match_forward(x, MEAN, VAR)
    both = torch.autograd.grad(y.sum() + loss, x, retain_graph=True)[0]
    alone = [torch.autograd.grad(part, x, retain_graph=True)[0] for part in (y.sum(), loss)]
    torch.testing.assert_close(alone[0] + alone[1], both, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-3)


def test_flushing_denormals_is_the_same_for_every_thread_count() -> None:
    """The mode is the calling thread's; the pool's threads work in it too."""
    x = torch.full((1 << 17,), 1e-40).reshape(1, 2, -1)
    before = torch.get_num_threads()
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormals")
    try:
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(cpu.affine_act_fake_quantize(x, VAR[:2], MEAN[:2], None, "none", None, None, 8))
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(before)
    assert torch.equal(results[0].view(torch.int32), results[1].view(torch.int32))
