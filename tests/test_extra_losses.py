"""Losses beyond the paper's."""

from __future__ import annotations

import pytest
import torch

from adadfq.extra_losses import feature_loss


def test_feature_loss_is_relative_to_the_teacher_and_a_mean_over_blocks() -> None:
    a, b = torch.tensor([3.0, 4.0], requires_grad=True), torch.tensor([[2.0]])
    x = torch.tensor([3.0, 5.0], requires_grad=True)
    loss = feature_loss([a, b], [x, torch.tensor([[1.0]])])
    assert loss.item() == pytest.approx((0.5 / 12.5 + 1 / 4) / 2)
    loss.backward()
    assert a.grad is None
    torch.testing.assert_close(x.grad, torch.tensor([0.0, 2 * 1 / 2 / 12.5 / 2]))


def test_a_dead_block_gives_a_finite_loss() -> None:
    assert feature_loss([torch.zeros(3)], [torch.ones(3)]).item() == 1.0
