"""Arguments of every operator for a layer of any shape, calls that leave them as they are, and what to expect."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from adadfq.ops import dispatch, reference

#: Operators with sums or exponentials, whose results may differ in the last digits.
INEXACT = {
    "bn_match",
    "bn_match_forward",
    "batch_norm_act",
    "batch_norm_act_backward",
    "margin_loss",
    "entropy_distillation",
    "affine_act_fake_quantize_backward",
    "affine_act_learned_fake_quantize_backward",
    "learned_fake_quantize_backward",
    "foreach_learned_fake_quantize_backward",
}


def arguments(
    op: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    channels_last: bool = False,
    device: str = "cpu",
    logits: tuple[int, int] = (16, 10),
) -> tuple[Any, ...]:
    """Arguments of `op` for a layer of this shape (losses: logits of that one), the same in every call."""
    random = torch.Generator().manual_seed(0)

    def tensor() -> Tensor:
        x = torch.randn(shape, generator=random).to(dtype).to(device)
        return x.contiguous(memory_format=torch.channels_last) if channels_last else x

    channels = shape[1]
    x, grad, residual = tensor(), tensor(), tensor()
    slope, mean, var, weight = (torch.rand(channels, generator=random).to(device) + 0.05 for _ in range(4))
    zero_point = torch.randint(0, 16, (channels,), generator=random, dtype=torch.int32).to(device)
    step, zero = torch.tensor([0.1], device=device), torch.tensor([5], dtype=torch.int32, device=device)
    grad_loss = torch.tensor(0.3, device=device)
    state = [torch.zeros((), dtype=d, device=device) for d in (torch.float32, torch.float32, torch.int64)]
    state += [torch.ones((), device=device), torch.zeros((), dtype=torch.int32, device=device)]
    teacher, student = (torch.randn(logits, generator=random).to(dtype).to(device) * 3 for _ in range(2))
    labels = torch.randint(0, logits[1], logits[:1], generator=random).to(device)
    per_sample = [torch.randn(shape[:2], generator=random).to(device) + 0.5 for _ in range(2)]
    packed = torch.randint(0, 256, (reference.packed_bytes(x.numel(), 3),), generator=random, dtype=torch.uint8)
    return {
        "fake_quantize": (x, slope, zero_point, 4, 1),
        "fake_quantize_": (x, slope, zero_point, 4, 1),
        "fake_quantize_backward": (grad, x, slope, zero_point, 4, 1),
        "dynamic_fake_quantize": (x, 4, 1),
        "foreach_dynamic_fake_quantize": ([x, grad[:1], residual.flatten(1)], [4, 2, 8], 0),
        "observe_fake_quantize": (x, *state, 4, 0.9),
        "affine_act_fake_quantize": (x, slope, mean, residual, "relu6", step, zero, 4),
        "affine_act_quantize": (x, slope, mean, residual, "relu", step, zero, 4),
        "quantize_pack": (x, slope, zero_point, 3, 1),
        "unpack_dequantize": (packed.to(device), slope, zero_point, 3, list(shape), 1, dtype),
        "affine_act_fake_quantize_backward": (grad, x, slope, mean, residual, "relu6", True, True),
        "learned_fake_quantize_backward": (grad, x, slope, zero_point, 4, 1),
        "foreach_fake_quantize": ([x, grad], [slope, var], [zero_point, zero_point], [4, 8], 1),
        "foreach_learned_fake_quantize_backward": (
            *([grad, x[:1], grad], [x, residual[:1], residual], [slope, var, weight]),
            *([zero_point] * 3, [4, 2, 8], 1),
        ),
        "affine_act_learned_fake_quantize_backward": (
            *(grad, x, slope, mean, residual, "relu6", step, zero, 4),
            *(True, True),
        ),
        "bn_match": (x, mean, var),
        "bn_match_backward": (grad_loss, x, mean.double(), var.double() + 1, mean, var),
        "bn_match_forward": (x, mean, var, weight, mean, 1e-5),
        "bn_match_forward_backward": (grad, x, grad_loss, mean.double(), var.double() + 1, mean, var, weight, 1e-5),
        "batch_norm_act": (x, *per_sample, 1e-5, 0.2),
        "batch_norm_act_backward": (grad, x, mean.double(), var.double() + 1, *per_sample, 1e-5, 0.2),
        "margin_loss": (teacher, student, labels, 0.3, 0.6, 0.2, 0.1, 0.7, False),
        "entropy_distillation": (teacher, student, 5.0),
    }[op]


def _is_tensors(argument: Any) -> bool:
    return isinstance(argument, list) and isinstance(argument[0], Tensor)


def _double(argument: Any) -> Any:
    return argument.double() if isinstance(argument, Tensor) and argument.is_floating_point() else argument


def own(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Copies, so that an operator that writes to its arguments leaves these as they are."""
    return tuple(a.clone() if isinstance(a, Tensor) else [t.clone() for t in a] if _is_tensors(a) else a for a in args)


def tensors(args: tuple[Any, ...]) -> list[Tensor]:
    """Every tensor among arguments."""
    return [t for a in args for t in (a if _is_tensors(a) else [a]) if isinstance(t, Tensor)]


def flat(result: Any) -> list[Tensor]:
    """Every tensor of a result."""
    if isinstance(result, Tensor):
        return [result]
    return [t for part in result or () for t in flat(part)]


def call(kernel: Callable[..., Any], op: str, args: tuple[Any, ...]) -> list[Tensor]:
    """What `kernel` returns for copies of the arguments, and the copies that it has written to."""
    args = own(args)
    results = flat(kernel(*args))
    return results + [args[i] for i in dispatch.MUTATES.get(op, ())]


def assert_right(op: str, got: list[Tensor], args: tuple[Any, ...]) -> None:
    """What :func:`call` returned is what the reference returns: bit for bit, or nearly float64's (see INEXACT)."""
    want = call(reference.KERNELS[op], op, args)
    if op in INEXACT:
        doubled = tuple([_double(t) for t in a] if _is_tensors(a) else _double(a) for a in args)
        exact = call(reference.KERNELS[op], op, doubled)
    else:
        exact = want
    for value, expected, true in zip(got, want, exact, strict=True):
        assert value.shape == expected.shape and value.dtype == expected.dtype and value.stride() == expected.stride()
        if op not in INEXACT:
            torch.testing.assert_close(value, expected, rtol=0, atol=0, equal_nan=True)
            continue
        unit = torch.finfo(value.dtype).eps if value.is_floating_point() else 0
        # Of float16's subnormal numbers, which small gradients are.
        step = unit * torch.finfo(value.dtype).smallest_normal if value.is_floating_point() else 0
        size = float(true.abs().max()) if true.numel() else 0.0
        # Next to a kink or a tie float32 and float64 may part: one element in ten thousand.
        near = (value.double() - true.double()).abs() <= unit * true.double().abs() + 4e-6 * size + step + 1e-9
        # Memory that is never written holds NaN in tests.
        wrong = ~near & (value != true) & ~(value.isnan() & true.isnan())
        assert int(wrong.sum()) <= wrong.numel() // 10_000, (op, int(wrong.sum()), wrong.numel())
