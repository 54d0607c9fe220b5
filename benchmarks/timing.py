"""Interleaved timing: providers take turns, so that a disturbance hits all of them."""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.providers import Provider

#: A sample takes at least this long, in seconds: shorter calls are repeated within it.
MIN_SAMPLE = 200e-6
MIN_ROUNDS = 5
#: Calls that take longer, in seconds, are timed without another one before each.
LONG = 1.0
MAX_REPEATS = 10_000


@dataclass
class Samples:
    """Seconds of one pass, one value a round."""

    repeats: int
    """Calls within a sample, whose mean it is."""
    calls: int = 1
    """Passes that a call makes."""
    values: list[float] = field(default_factory=list)

    def quantiles(self) -> tuple[float, float, float]:
        """20th, 50th and 80th percentile, in seconds."""
        low, _, _, high = statistics.quantiles(self.values, n=5, method="inclusive")
        return low, statistics.median(self.values), high


def measure(
    providers: Sequence[Provider], device: torch.device, rounds: int, seconds: float, minimum: int = MIN_ROUNDS
) -> dict[str, Samples]:
    """Time every provider once a round, `rounds` times or as often as `seconds` allow, but `minimum` times.

    An untimed call of the same provider goes before each sample, as in a loop: a virtual machine may hand freed memory
    back to its host within seconds, and getting it again costs more than any operator measured here. Where every call
    takes longer than :data:`LONG`, that is nothing, and no call goes before.
    """
    clock = clock_of(device)
    samples = {}
    round_seconds, shortest = 0.0, math.inf
    with _quiet():
        for provider in providers:
            with provider.active():
                repeats, once = repeats_for(provider.call, clock)
            samples[provider.name] = Samples(repeats, provider.calls)
            round_seconds += once * (repeats + 1)
            shortest = min(shortest, once)
        rounds = max(minimum, min(rounds, int(seconds / round_seconds))) if providers else 0
        for order in orders(providers, rounds):
            for provider in order:
                kept = samples[provider.name]
                with provider.active():
                    if shortest < LONG:
                        provider.call()
                    kept.values.append(clock(provider.call, kept.repeats) / kept.calls)
    return samples


def orders(providers: Sequence[Provider], rounds: int) -> Iterator[list[Provider]]:
    """A shuffled order for every round, the same ones at every call: none always follows the same one."""
    shuffle = random.Random(0)
    for _ in range(rounds):
        yield shuffle.sample(providers, len(providers))


Clock = Callable[[Callable[[], Any], int], float]


def clock_of(device: torch.device) -> Clock:
    """What times so many calls and gives the seconds of one; on a GPU between two events."""
    return _cuda_seconds if device.type == "cuda" else _cpu_seconds


def repeats_for(call: Callable[[], Any], clock: Clock) -> tuple[int, float]:
    """(calls in a sample, seconds of one of them), after another one unless that took long."""
    once = clock(call, 1)
    if once < LONG:
        once = clock(call, 1)
    if once < MIN_SAMPLE:  # the first guess is cold
        once = clock(call, 8)
    once = max(once, 1e-9)
    return min(MAX_REPEATS, max(1, math.ceil(MIN_SAMPLE / once))), once


def _cpu_seconds(call: Callable[[], Any], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def _cuda_seconds(call: Callable[[], Any], repeats: int) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / repeats


@contextmanager
def _quiet() -> Iterator[None]:
    """No garbage collection meanwhile."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
