"""Losses beyond the paper's: block outputs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from adadfq.ops.schema import compute_dtype

__all__ = ["feature_loss"]


def feature_loss(teacher: Sequence[Tensor], student: Sequence[Tensor]) -> Tensor:
    """Mean over block outputs of their squared error relative to the teacher's mean square.

    Args:
        teacher: block outputs, any shapes; get no gradient.
        student: the student's, of the same shapes.

    Returns:
        A scalar, float32 (float64 for float64); 0 where they are equal, 1 where the student's are 0.
    """
    terms = []
    for target, found in zip(teacher, student, strict=True):
        target = _compute(target.detach())
        power = target.square().mean()
        # A dead block, all zeros, has nothing to be relative to.
        terms.append(F.mse_loss(_compute(found), target) / torch.where(power > 0, power, torch.ones_like(power)))
    return torch.stack(terms).mean()


def _compute(x: Tensor) -> Tensor:
    return x.to(compute_dtype(x.dtype))
