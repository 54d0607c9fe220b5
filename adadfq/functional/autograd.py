"""Backwards that are constants to autograd."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch


def first_order_only(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Refuse ``create_graph=True``: a gradient written by a kernel has no graph, and second derivatives would be wrong.

    ``once_differentiable`` does not see it where the incoming gradient is a constant, as that of a loss is.
    """

    @wraps(backward)
    def checked(ctx: Any, *grads: Any) -> Any:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "adadfq's fused functions have first derivatives only: call backward() or grad() without "
                "create_graph=True, or compute this part with plain PyTorch operators"
            )
        return backward(ctx, *grads)

    return checked
