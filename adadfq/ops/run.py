"""Running an operator: straight away where nobody watches, through the framework's dispatcher where somebody does.

``torch.ops.adadfq.*`` is what tracing, compilation, transforms, modes, subclasses and the profiler see. For plain
tensors with none of them about, going through it does the same and costs several microseconds a call more, which is
what a call on the logits of a small batch costs altogether.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from adadfq.ops import dispatch
from adadfq.ops.schema import OPERATORS

_OVERLOADS = {name: getattr(torch.ops.adadfq, name).default for name in OPERATORS}
_TENSORS = frozenset({Tensor, nn.Parameter})
_SETTINGS = frozenset({bool, int, float, str, torch.dtype, type(None)})


def _is_watched() -> bool:
    """Whether a compiler, mode, transform, tracer or profiler is to see every operator."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or torch.autograd.profiler._is_profiler_enabled
    )


def _are_plain(arguments: Sequence[Any]) -> bool:
    """Whether every tensor is just its memory: no subclass, nothing that is still to be computed."""
    for argument in arguments:
        kind = type(argument)
        if kind in _TENSORS:
            if argument.is_neg() or argument._is_zerotensor():
                return False
        elif kind not in _SETTINGS and not (kind is list and _are_plain(argument)):
            return False
    return True


def run(op: str, *args: Any) -> Any:
    """Call operator `op` on positional arguments."""
    if _is_watched() or not _are_plain(args):
        return _OVERLOADS[op](*args)
    return dispatch.call(op, *args)


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether a call on `tensors` must be recorded for a backward, or for forward-mode differentiation to refuse."""
    if forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
