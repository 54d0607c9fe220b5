"""Ranges of least squared quantisation error, for weights and for activations."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from adadfq import checks, functional
from adadfq.nn import QuantAct, QuantWeight, activations
from adadfq.weight_step import WeightStep

__all__ = ["fix_weight_steps", "mse_range", "shrink_act_ranges"]

#: Candidates: the whole range times each of these, the first of equals being taken.
SHARES = tuple(k / 50 for k in range(50, 9, -1))


@torch.no_grad()
def mse_range(x: Tensor, bits: int, axis: int = 0) -> tuple[Tensor, Tensor]:
    """Scale and zero point by channel that lose least of `x`, in squared error, over shrunken min/max ranges.

    Both ends are multiplied by the same share, from 0.2 to 1 in steps of 0.02; what lies outside saturates. At few bits
    a finer step for the many small values is worth more than the few large ones.

    Args:
        x: floating tensor, channels along `axis`.
        bits: width, 2..8.
        axis: channel dimension.

    Returns:
        scale (float32) and zero_point (int32), each ``[x.shape[axis]]``, of the ranges by
        :func:`adadfq.functional.qparams`.

    Raises:
        InvalidInputError: `bits` or `axis` does not fit, or `x` is not floating.
    """
    checks.check_floating("x", x)
    axis = checks.check_axis(axis, x)
    rows = x.detach().transpose(0, axis).flatten(1).float()
    lo, hi = rows.amin(1), rows.amax(1)
    best_scale, best_zero_point = functional.qparams(lo, hi, bits)
    best_error = torch.full_like(lo, torch.inf)
    for share in SHARES:
        scale, zero_point = functional.qparams(lo * share, hi * share, bits)
        error = (functional.fake_quantize(rows, scale, zero_point, bits, axis=0) - rows).square().sum(1)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)
        best_zero_point = torch.where(better, zero_point, best_zero_point)
    return best_scale, best_zero_point


@torch.no_grad()
def shrink_act_ranges(student: nn.Module, batches: Iterable[Tensor]) -> None:
    """Shrink every activation range of `student` to the share of least squared error over `batches`.

    Errors are summed over the batches, with everything before a layer quantised over the ranges it had. Ranges must be
    frozen; `student` runs in the mode it is in. A quantiser that the forward does not reach keeps its range.

    Args:
        student: quantised network, not fused.
        batches: images [B, C, H, W].
    """
    errors: dict[QuantAct, Tensor] = {}

    def measure(act: QuantAct, module: Any, args: tuple[Tensor, ...]) -> None:
        x = args[0]
        found = [_squared_error(x, act, share) for share in SHARES]
        errors[act] = errors.get(act, 0) + torch.stack(found)

    with ExitStack() as stack:
        for act in activations(student).values():
            stack.callback(act.register_forward_pre_hook(partial(measure, act)).remove)
        for images in batches:
            student(images)
    for act, error in errors.items():
        best = error.nan_to_num(torch.inf).argmin()
        share = torch.tensor(SHARES, device=error.device)[best]
        act.shrink_range(share)


@torch.no_grad()
def fix_weight_steps(student: nn.Module, method: str, images: Tensor) -> None:
    """Give every layer of `student` that quantises a weight the step and zero point that suit its weight now.

    Args:
        student: quantised network, not fused, its activation ranges frozen.
        method: "minmax" or "mse" (:func:`mse_range`), by output channel.
        images: [B, C, H, W]; weights that the forward computes are taken from one pass over them.
    """
    computed = {module: Tensor() for module in student.modules() if type(module) is QuantWeight}
    with ExitStack() as stack:
        for module in computed:
            stack.callback(module.register_forward_pre_hook(lambda m, args: computed.update({m: args[0]})).remove)
        if computed:
            student(images)
    for module in student.modules():
        if isinstance(module, WeightStep):
            weight = computed[module] if module in computed else module.weight
            if weight.numel():
                module.fix_step(*_weight_range(weight, module.weight_bits, method))


def _weight_range(weight: Tensor, bits: int, method: str) -> tuple[Tensor, Tensor]:
    if method == "mse":
        return mse_range(weight, bits)
    rows = weight.flatten(1)
    return functional.qparams(rows.amin(1), rows.amax(1), bits)


def _squared_error(x: Tensor, act: QuantAct, share: float) -> Tensor:
    scale, zero_point = functional.qparams(act.running_min * share, act.running_max * share, act.act_bits)
    error = functional.fake_quantize(x, scale, zero_point, act.act_bits) - x
    return error.float().square().sum()
