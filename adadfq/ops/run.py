"""Running an operator: straight away where nobody watches, through the framework's dispatcher where somebody does.

``torch.ops.adadfq.*`` is what tracing, compilation, transforms, modes, subclasses and the profiler see. For plain
tensors with none of them about, going through it does the same and costs several microseconds a call more, which is
what a call on the logits of a small batch costs altogether.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from adadfq.ops import dispatch
from adadfq.ops.schema import OPERATORS

_OVERLOADS = {name: getattr(torch.ops.adadfq, name).default for name in OPERATORS}
_PLAIN = (Tensor, nn.Parameter)
_WITHOUT_MEMORY = (bool, int, float, str, type(None))


def _is_watched() -> bool:
    """Whether a compiler, mode, transform, tracer or profiler is to see every operator."""
    return bool(
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or torch.autograd.profiler._is_profiler_enabled
    )


def _is_plain(argument: Any) -> bool:
    """Whether `argument` is no tensor, or one that is just its memory: no subclass, nothing left to be computed."""
    if type(argument) in _PLAIN:
        return not (argument.is_neg() or argument._is_zerotensor())
    if type(argument) is list:
        return all(map(_is_plain, argument))
    return isinstance(argument, _WITHOUT_MEMORY)


def run(op: str, *args: Any) -> Any:
    """Call operator `op` on positional arguments."""
    if _is_watched() or not all(map(_is_plain, args)):
        return _OVERLOADS[op](*args)
    return dispatch.call(op, *args)


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether a call on `tensors` must be recorded for a backward, or for forward-mode differentiation to refuse."""
    if forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
