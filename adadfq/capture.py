"""One step as one CUDA graph: recorded once, then replayed without Python and without waiting for the host."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["CapturedStep"]

#: Steps played without a graph before it is recorded: libraries choose algorithms and optimizers make their state.
EAGER_STEPS = 3


class CapturedStep:
    """Plays `step`; from its fourth call on by replaying a CUDA graph of it.

    Every call is one step: the first ones run as they are, on a stream of their own, as recording asks for. Random
    numbers drawn from `random` go on from call to call as they would without a graph.

    Args:
        step: takes nothing and gives one tensor; reads and writes memory that stays where it is, and never waits for
            the device. What it reads of Python is settled when the graph is recorded.
        device: a CUDA device.
        random: generator that `step` draws from, on `device`.
    """

    def __init__(self, step: Callable[[], Tensor], device: torch.device, random: torch.Generator) -> None:
        self._step, self._device, self._random = step, device, random
        self._stream = torch.cuda.Stream(device)
        self._eager_steps = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._result: Tensor | None = None

    @property
    def is_captured(self) -> bool:
        """Whether the next call replays."""
        return self._graph is not None

    def __call__(self) -> Tensor:
        """Play one step; the result is overwritten by the next call."""
        with torch.cuda.device(self._device):
            if self._eager_steps < EAGER_STEPS:
                self._eager_steps += 1
                return self._on_stream()
            if self._graph is None:
                self._graph = self._capture()
            self._graph.replay()
            assert self._result is not None
            return self._result

    def _on_stream(self) -> Tensor:
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            result = self._step()
        current.wait_stream(self._stream)
        result.record_stream(current)
        return result

    def _capture(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self._random)
        with torch.cuda.graph(graph, stream=self._stream):
            self._result = self._step()
        return graph
