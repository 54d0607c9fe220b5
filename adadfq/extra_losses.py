"""Losses beyond the paper's: block outputs, and cross-entropy with soft labels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from adadfq.ops.schema import compute_dtype

__all__ = ["cross_entropy", "feature_loss", "soft_targets"]


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


def soft_targets(teacher_logits: Tensor, labels: Tensor, threshold: float) -> Tensor:
    """Target probabilities [B, K], without gradient: the label's, or the teacher's own where it gives the label less
    than `threshold`.

    Args:
        teacher_logits: [B, K].
        labels: int64 [B].
        threshold: probability in 0..1.
    """
    probabilities = _compute(teacher_logits.detach()).softmax(1)
    # Not F.one_hot, which on some devices reads back whether the labels fit.
    hard = labels[:, None] == torch.arange(probabilities.shape[1], device=labels.device)
    difficult = probabilities.gather(1, labels[:, None]) < threshold
    return torch.where(difficult, probabilities, hard.to(probabilities.dtype))


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats of softmax(logits) with target probabilities, both [B, K]."""
    return F.cross_entropy(_compute(logits), targets)


def _compute(x: Tensor) -> Tensor:
    return x.to(compute_dtype(x.dtype))
