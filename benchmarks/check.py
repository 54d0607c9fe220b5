"""Is what a provider computes right? Asked in the same run that times it; a wrong one gets no time.

The oracle is the reference in float64, or in float32 where the range comes from the data. Beside rounding, results may
be off only where the problem says that they jump: a step next to a rounding tie, where stock PyTorch multiplies by
1 / scale instead of dividing. Counters and scalar zero points must be exact, and so must straight-through gradients.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from adadfq.ops.dispatch import use_backend
from benchmarks.problems import Function, Problem

#: dtype -> (relative tolerance, absolute tolerance as a share of the largest value).
TOLERANCES = {
    torch.float64: (1e-4, 1e-5),
    torch.float32: (1e-4, 1e-5),
    torch.bfloat16: (2**-7, 2**-8),
    torch.float16: (2**-10, 2**-11),
}


def run_once(problem: Problem, function: Function, pass_: str, dtype: torch.dtype | None = None) -> list[Tensor]:
    """What a pass of `function` gives on fresh arguments: outputs (forward, both), then gradients (backward, both).

    Args:
        dtype: what to convert the floating arguments to; None leaves them.
    """
    args = fresh_arguments(problem, pass_ != "forward", dtype)
    outputs = function(*args)
    if pass_ == "forward":
        return list(outputs)
    gradients: list[Tensor] = []
    for i, chosen in enumerate((problem.grads, *problem.checked_grads)):
        if i > 0:  # a graph serves once: compiled ones give their buffers away
            args = fresh_arguments(problem, True, dtype)
            outputs = function(*args)
        grads = [grad if dtype is None else grad.to(dtype) for grad in chosen]
        wanted = [args[position] for position in problem.wanted]
        gradients += torch.autograd.grad(outputs[: len(grads)], wanted, grads)
    return [*([] if pass_ == "backward" else [t.detach() for t in outputs]), *gradients]


def fresh_arguments(problem: Problem, differentiable: bool, dtype: torch.dtype | None = None) -> list[Tensor]:
    """The arguments, copied where the functions write to them, as leaves where a gradient is wanted."""
    args = []
    for i, value in enumerate(problem.args):
        arg = value.detach()
        if dtype is not None and arg.is_floating_point():
            arg = arg.to(dtype)
        if i in problem.mutated:
            arg = arg.clone()
        if differentiable and i in problem.wanted:
            arg = arg.detach().requires_grad_()
        args.append(arg)
    return args


class Oracle:
    """The right results of a pass of a problem, from the reference."""

    def __init__(self, problem: Problem, pass_: str) -> None:
        with use_backend("reference"):
            # On a GPU the backward runs in another thread, which the block above does not reach.
            with torch.autograd.set_multithreading_enabled(False):
                self.want = run_once(problem, problem.ours, pass_, problem.oracle_dtype)
                outputs = self.want if pass_ != "backward" else []
        slack = problem.output_slack(tuple(outputs)) if outputs else []
        gradients = 0 if pass_ == "forward" else len(problem.wanted) * (1 + len(problem.checked_grads))
        others = len(self.want) - gradients
        jumps = [] if pass_ == "forward" else problem.gradient_slack()
        self.slack = _padded(slack, others) + _padded(jumps, gradients)
        self.exact = [False] * others + [problem.straight_through] * gradients

    def error(self, got: Sequence[Tensor]) -> str | None:
        """What is wrong with `got`; None where nothing is."""
        if len(got) != len(self.want):
            return f"it gives {len(got)} results, expected {len(self.want)}"
        for i, (result, want, slack, exact) in enumerate(zip(got, self.want, self.slack, self.exact, strict=True)):
            if reason := _difference(result, want, slack, exact):
                return f"result {i} of {len(self.want)} {reason}"
        return None


def _padded(slack: Sequence[Tensor | None], size: int) -> list[Tensor | None]:
    return [*slack, *[None] * size][:size]


def _difference(got: Tensor, want: Tensor, slack: Tensor | None, exact: bool) -> str | None:
    if got.shape != want.shape:
        return f"has shape {list(got.shape)}, expected {list(want.shape)}"
    if want.numel() == 0:
        return None
    if not want.is_floating_point():
        error = (got.to(torch.int64) - want.to(torch.int64)).abs()
        off = error > (0 if slack is None else slack.to(torch.int64))
        if not bool(off.any()):
            return None
        return (
            f"has {int(off.sum())} of {want.numel()} integers other than the reference's, by up to {int(error.amax())}"
        )
    error = (got.detach().to(want.dtype) - want).abs_()
    if exact:
        allowed = torch.zeros_like(want)
    else:
        relative, absolute = TOLERANCES[got.dtype]
        # Of numbers below the smallest normal one, as gradients of a mean in float16 are, the last bit is all there is.
        info = torch.finfo(got.dtype)
        allowed = want.abs().mul_(relative).add_(want.abs().amax() * absolute + info.smallest_normal * info.eps)
    if slack is not None:
        allowed = allowed.add_(slack, alpha=1.01)
    off = ~(error <= allowed)  # NaN is off
    if not bool(off.any()):
        return None
    return f"is off in {int(off.sum())} of {want.numel()} elements, by up to {float(error.amax()):.3g}"
