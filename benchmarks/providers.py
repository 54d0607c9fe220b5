"""Who can compute a case: this project's backends and everything they are compared with."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from adadfq.errors import InvalidInputError
from adadfq.ops import dispatch
from benchmarks.cases import TINY, Case, backward_of, is_launch
from benchmarks.check import fresh_arguments, run_once
from benchmarks.problems import Function, Outputs, Problem

COPY = "copy (into existing memory)"
CLONE = "copy (new tensor)"
#: What an operator in place can be at best: a copy touches twice as many addresses.
IN_PLACE = "x.mul_(1)"
REFERENCE = "eager reference"
PLAIN = "eager plain"
COMPILE = "torch.compile"
NATIVE = "torch"
#: What autograd costs for an operator that does next to nothing.
BARE = "x * 1"
INTO = " (into existing memory)"
#: Calls recorded in a CUDA graph: the time of the kernels and of starting them, without Python's.
REPLAYED = " (graph replay)"
#: The cheapest kernel of PyTorch's there is, x.zero_() of one element, replayed as ours are.
EMPTY = "empty launch" + REPLAYED
OURS = "adadfq "

#: Providers whose results are not looked at, for they compute nothing of the case.
UNCHECKED = (COPY, CLONE, IN_PLACE, BARE, EMPTY)
#: The allocator gives smaller tensors memory that is there already: "into" would be the same again.
INTO_FROM_BYTES = 32 << 20
#: Calls that a graph holds: replaying it costs a launch, which is to be small against them.
CALLS_OF_GRAPH = 100


@dataclass
class Provider:
    """Something that can be timed on a case."""

    name: str
    call: Callable[[], Any]
    """The pass that is timed."""
    results: Callable[[], list[Tensor]] | None = None
    """The same pass on fresh arguments, for the check; None where nothing of the case is computed."""
    backend: str | None = None
    """Backend that serves the operators meanwhile; None leaves the choice to the dispatcher."""
    calls: int = 1
    """How often `call` makes the pass."""

    @property
    def is_ours(self) -> bool:
        """One of this project's backends, the reference not among them."""
        return self.name.startswith(OURS)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Force the backend. By the environment: autograd's threads see that, and the calls do not pay for it."""
        if self.backend is None:
            yield
            return
        before = os.environ.get("ADADFQ_BACKEND")
        os.environ["ADADFQ_BACKEND"] = self.backend
        try:
            yield
        finally:
            if before is None:
                del os.environ["ADADFQ_BACKEND"]
            else:
                os.environ["ADADFQ_BACKEND"] = before


def backends(case: Case, device_type: str) -> list[str]:
    """Backends other than the reference that can serve every operator of `case`, best first."""
    ops = [case.op]
    if case.pass_ != "forward" and (backward := backward_of(case.op, case.variant)) is not None:
        ops.append(backward)
    return [
        name
        for name in dispatch.PREFERENCE.get(device_type, ())
        if name != "reference" and all(dispatch.why_not(name, op, device_type, case.torch_dtype) is None for op in ops)
    ]


def names(case: Case, device_type: str, patterns: tuple[str, ...] = ("*",)) -> list[str]:
    """Providers of `case` whose name fits one of `patterns`, in the order they take turns.

    The copies, and what is their like in place, are always among them: every row is set against the copy.
    """
    ours = [OURS + backend for backend in backends(case, device_type)]
    found = list(ours)
    # A GPU's allocator keeps what it has got: there, every call writes to existing memory.
    new_memory = device_type == "cpu" and case.nbytes >= INTO_FROM_BYTES
    if case.op == "fake_quantize" and case.pass_ == "forward" and new_memory:
        found += [name + INTO for name in ours]
    if _has_native(case):
        found.append(NATIVE)
    if device_type == "cuda" and is_launch(case.where, case.pass_):
        # What torch.compile makes of these is not asked for, and compiling takes longer than all the rest.
        found += [*(name + REPLAYED for name in ours), EMPTY, REFERENCE, PLAIN]
    else:
        found += [REFERENCE, PLAIN, COMPILE]
    if case.where == TINY:
        found.append(BARE)
    chosen = [name for name in found if any(fnmatchcase(name, pattern) for pattern in patterns)]
    return [*chosen, COPY, CLONE, *([IN_PLACE] if case.op == "fake_quantize_" else [])]


def check_patterns(patterns: tuple[str, ...], cases: list[Case], device_type: str) -> None:
    """Refuse a pattern that fits no provider of any case (:class:`InvalidInputError`)."""
    known = dict.fromkeys(name for case in cases for name in names(case, device_type))
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in known):
            raise InvalidInputError(
                f"providers: {pattern!r} fits none of {', '.join(known)}; patterns, with * and ?, go between commas"
            )


def _has_native(case: Case) -> bool:
    if case.op == "fake_quantize_":
        return True
    return case.op == "fake_quantize" and (
        case.variant.endswith("_clip") or case.pass_ == "forward" or case.where == TINY
    )


def build(case: Case, problem: Problem, chosen: list[str]) -> list[Provider]:
    """The providers of these :func:`names`."""
    return [_build(case, problem, name) for name in chosen]


def _build(case: Case, problem: Problem, name: str) -> Provider:
    if name in (COPY, CLONE, IN_PLACE):
        return _copy(case, problem, name)
    if name == BARE:
        return from_function(
            name, case, problem, lambda *args: (args[max(problem.wanted[:1], default=0)] * 1,), bare=True
        )
    if name == REFERENCE:
        return from_function(name, case, problem, problem.ours, "reference")
    if name == PLAIN:
        return from_function(name, case, problem, problem.plain)
    if name == COMPILE:
        return _compiled(case, problem)
    if name == NATIVE:
        assert problem.native is not None  # as _has_native says
        return from_function(name, case, problem, problem.native)
    if name == EMPTY:
        one = torch.ones(1, device=problem.args[0].device)
        return replayed(Provider(name, one.zero_))
    if name.endswith(REPLAYED):
        backend = name.removeprefix(OURS).removesuffix(REPLAYED)
        return replayed(from_function(name, case, problem, problem.ours, backend))
    if name.endswith(INTO):
        return _into(name, case, problem)
    return from_function(name, case, problem, problem.ours, name.removeprefix(OURS))


def from_function(
    name: str, case: Case, problem: Problem, function: Function, backend: str | None = None, bare: bool = False
) -> Provider:
    """Time `function` on the arguments of `problem`, in the pass of `case`.

    Args:
        bare: the function has one output shaped like its argument, whatever the operator; it is not checked.
    """
    prepared: list[Any] = []

    def prepare() -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        args = fresh_arguments(problem, case.pass_ != "forward")
        wanted = [args[i] for i in problem.wanted]
        if bare:
            return args, wanted[:1], [torch.ones_like(wanted[0])] if wanted else []
        return args, wanted, problem.grads

    def forward() -> Outputs:
        if not prepared:
            prepared.append(prepare())
        return function(*prepared[0][0])

    def both() -> tuple[Outputs, Outputs]:
        if not prepared:
            prepared.append(prepare())
        args, wanted, grads = prepared[0]
        outputs = function(*args)
        return outputs, torch.autograd.grad(outputs[: len(grads)], wanted, grads)

    def backward() -> Outputs:
        if not prepared:
            args, wanted, grads = prepare()
            prepared.append((function(*args)[: len(grads)], wanted, grads))
        outputs, wanted, grads = prepared[0]
        return torch.autograd.grad(outputs, wanted, grads, retain_graph=True)

    call = {"forward": forward, "both": both, "backward": backward}[case.pass_]
    results = None if bare else lambda: run_once(problem, function, case.pass_)
    return Provider(name, call, results, backend)


def _copy(case: Case, problem: Problem, name: str) -> Provider:
    """A copy, or a pass in place, that reads and writes together as many bytes as the case."""
    device = problem.args[0].device
    elements = max(1, case.bytes_moved // 2 // case.torch_dtype.itemsize)
    source = torch.ones(elements, dtype=case.torch_dtype, device=device)
    if name == CLONE:
        return Provider(name, source.clone)
    if name == IN_PLACE:
        return Provider(name, lambda: source.mul_(1))
    target = torch.zeros_like(source)
    return Provider(name, lambda: target.copy_(source))


def _into(name: str, case: Case, problem: Problem) -> Provider:
    """The backend, writing to memory that is there already: without the system's page faults, like the plain copy.

    A backend allocates its result with ``torch.empty_like``; here that hands out the same tensor every time.
    """
    out = torch.zeros_like(problem.args[0])
    allocate = torch.empty_like

    def function(*args: Tensor) -> Outputs:
        torch.empty_like = lambda *_, **__: out
        try:
            outputs = problem.ours(*args)
        finally:
            torch.empty_like = allocate
        if outputs[0].data_ptr() != out.data_ptr():
            raise RuntimeError("the backend did not write to the memory it was given")
        return outputs

    return from_function(name, case, problem, function, name.removeprefix(OURS).removesuffix(INTO))


def replayed(provider: Provider) -> Provider:
    """The same calls from a CUDA graph, recorded when it is first asked for."""
    graphs: list[torch.cuda.CUDAGraph] = []
    call = provider.call

    def replay() -> None:
        if not graphs:
            call()  # compiles and allocates, which no graph may
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for _ in range(CALLS_OF_GRAPH):
                    call()
            graphs.append(graph)
        graphs[0].replay()

    return Provider(provider.name, replay, provider.results, provider.backend, CALLS_OF_GRAPH)


def _compiled(case: Case, problem: Problem) -> Provider:
    from torch._functorch import config

    # One worker: a pool of them would go on using the cores that the next provider is timed on.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    # Code compiled for other cases counts against the limit of recompilations.
    torch.compiler.reset()
    # A graph that is run again and again, as in the backward pass, cannot give its buffers away.
    config.donated_buffer = case.pass_ != "backward"
    return from_function(COMPILE, case, problem, torch.compile(problem.plain, fullgraph=True, dynamic=False))
