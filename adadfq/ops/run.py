"""Running an operator: straight away where nobody watches, through the framework's dispatcher where somebody does.

``torch.ops.adadfq.*`` is what tracing, compilation, subclasses, modes and the profiler see; for plain tensors with none
of them about, going through it does the same and costs several microseconds a call more, which is what a call on the
logits of a small batch costs altogether.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from adadfq.ops import dispatch
from adadfq.ops.schema import OPERATORS

_OVERLOADS = {name: getattr(torch.ops.adadfq, name).default for name in OPERATORS}
_PLAIN = (Tensor, nn.Parameter)


def run(op: str, x: Tensor, *args: Any) -> Any:
    """Call operator `op`; `x` is its first argument, a tensor or a list of them."""
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch.autograd.profiler._is_profiler_enabled
        or not (type(x) in _PLAIN or (type(x) is list and all(type(t) in _PLAIN for t in x)))
    ):
        return _OVERLOADS[op](x, *args)
    return dispatch.call(op, x, *args)


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether a call on `tensors` must be recorded for a backward."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
