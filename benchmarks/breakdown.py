"""Where the time of a step goes: teacher, student, generator, quantisation, losses, optimisers.

Hooks put a range around the forward of each part while a profiler runs; what happens inside an operator belongs to the
innermost range around it. An operator of a backward pass belongs to where the forward operator of the same sequence
number belongs, which autograd gives both. Operators outside of every part are losses (noise, labels and metrics among
them); time in which no operator runs, outside of every part, is "other", Python between them for the most part.

What one operator does for two parts cannot be divided: the BatchNorm statistics are the teacher's, a fused layer's
quantisation is the student's.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.nn import functional
from torch.profiler import ProfilerActivity

PARTS = ("teacher", "student", "generator", "quantisation", "losses", "optimisers", "other")
_RANGE = "part: "
_STEP = "one step of the game"
_QUANTISES = re.compile("quantize|quantise", re.IGNORECASE)
_BACKWARD = "autograd::engine::evaluate_function: "


def breakdown(
    call: Callable[[], Any],
    parts: Mapping[str, nn.Module],
    quantizers: tuple[type[nn.Module], ...],
    device: torch.device,
    steps: int,
) -> dict[str, float]:
    """The share of every one of :data:`PARTS` in the time of `call`; together 1.

    On a CPU, in the time that the profiled calls take; on a GPU, in the time that their kernels and copies take.

    Args:
        call: makes a step.
        parts: the three networks by their names among :data:`PARTS`.
        quantizers: classes of modules whose forward is quantisation, but for a convolution or a linear layer in it.
        device: where it runs.
        steps: how often it is called, each time counted.
    """
    with ranges(parts, quantizers):
        profile = profiled(lambda: [_one(call) for _ in range(steps)], device)
    return _shares(profile.events(), device)


def _one(call: Callable[[], Any]) -> None:
    with torch.profiler.record_function(_STEP):
        call()


def profiled(call: Callable[[], Any], device: torch.device) -> Any:
    """torch.profiler's profile of `call`."""
    # Its library writes a line a run to stderr otherwise.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with torch.profiler.profile(activities=activities) as profile:
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return profile


@contextlib.contextmanager
def ranges(parts: Mapping[str, nn.Module], quantizers: tuple[type[nn.Module], ...]) -> Iterator[None]:
    """Put the ranges around the parts while inside."""
    stack: list[tuple[str, Any]] = []

    def enter(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            stack.append((name, torch.profiler.record_function(_RANGE + name)))
            stack[-1][1].__enter__()

        return hook

    def leave(*_: Any) -> None:
        stack.pop()[1].__exit__(None, None, None)

    def the_students(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if not stack or stack[-1][0] != "quantisation":
                return function(*args, **kwargs)
            with torch.profiler.record_function(_RANGE + "student"):
                return function(*args, **kwargs)

        return call

    with contextlib.ExitStack() as cleanup:
        for name, part in parts.items():
            named = [(name, part)]
            if name == "student" and quantizers:
                named += [("quantisation", module) for module in part.modules() if isinstance(module, quantizers)]
            for each, module in named:
                cleanup.callback(module.register_forward_pre_hook(enter(each), prepend=True).remove)
                cleanup.callback(module.register_forward_hook(leave).remove)
        if quantizers:  # the convolutions inside of these modules are the student's
            for name in ("conv2d", "linear"):
                cleanup.enter_context(mock.patch.object(functional, name, the_students(getattr(functional, name))))
        yield


def _shares(events: list[Any], device: torch.device) -> dict[str, float]:
    owners = _owners(events)
    field = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    totals = dict.fromkeys(PARTS, 0.0)
    for event in events:
        if (part := owners[id(event)]) is not None:
            totals[part] += getattr(event, field)
    whole = sum(totals.values())
    return {part: total / whole for part, total in totals.items()}


def _owners(events: list[Any]) -> dict[int, str | None]:
    """Id of an event -> its part; None outside of the steps."""
    owners: dict[int, str | None] = {}
    made: dict[int, str] = {}  # sequence number -> part of the forward operator that autograd recorded last with it
    previous = "losses"
    # Parents begin before their children, forward operators before their backwards.
    for event in sorted(events, key=lambda event: (event.time_range.start, -event.time_range.end)):
        parent = event.cpu_parent
        above = owners.get(id(parent)) if parent is not None else None
        name = event.name
        if name == _STEP:
            owner: str | None = "other"
        elif name.startswith(_RANGE):
            owner = name.removeprefix(_RANGE)
        elif name.startswith(_BACKWARD):
            # The sum of a parameter's gradients has no number: it follows what made the last of them.
            owner = previous = made.get(event.sequence_nr, previous)
        elif name.startswith("Optimizer."):
            owner = "optimisers"
        elif above is None:
            owner = None
        elif _QUANTISES.search(name):
            owner = "quantisation"
        else:
            owner = "losses" if parent.name == _STEP else above
        owners[id(event)] = owner
        if owner is not None and event.sequence_nr >= 0 and not _in_backward(event):
            made[event.sequence_nr] = owner
    return owners


def _in_backward(event: Any) -> bool:
    while event is not None:
        if event.name.startswith(_BACKWARD):
            return True
        event = event.cpu_parent
    return False
