"""Measuring the operators: every provider of a case checked, then timed in turns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from benchmarks import memory, problems, providers, timing
from benchmarks.cases import Case
from benchmarks.check import Oracle
from benchmarks.providers import CLONE, COPY, Provider
from benchmarks.turns import check_device


def run_case(
    case: Case,
    device: torch.device,
    environment: dict[str, Any],
    patterns: tuple[str, ...] = ("*",),
    rounds: int = 21,
    seconds: float = 5.0,
) -> list[dict[str, Any]]:
    """Rows of `case`, one a provider whose name fits `patterns`; see :data:`benchmarks.store.FIELDS`."""
    problem = problems.make(case, device)
    built = providers.build(case, problem, providers.names(case, device.type, patterns))
    return measure_case(case, problem, built, environment, rounds, seconds)


def measure_case(
    case: Case,
    problem: problems.Problem,
    built: Sequence[Provider],
    environment: dict[str, Any],
    rounds: int,
    seconds: float,
) -> list[dict[str, Any]]:
    """Check the providers, time those that are right, and measure their memory."""
    device = problem.args[0].device
    oracle = Oracle(problem, case.pass_)
    verdicts = {}
    for provider in built:
        verdicts[provider.name] = verdict(provider, oracle)
        check_device(device, f"{provider.name} on {case.name}")
    del oracle
    right = [provider for provider in built if verdicts[provider.name][0] == "ok"]
    samples = timing.measure(right, device, rounds, seconds)
    peaks = {}
    for provider in right:
        with provider.active():
            peaks[provider.name] = memory.peak_bytes(provider.call, device)
    copies = {name: samples[name].quantiles()[1] for name in (COPY, CLONE) if name in samples}
    rows = []
    for provider in built:
        status, error = verdicts[provider.name]
        row = {
            "case": case.name,
            "provider": provider.name,
            "backend": provider.backend,
            "status": status,
            "error": error,
            "rounds": None,
            "repeats": None,
            "p20_ms": None,
            "p50_ms": None,
            "p80_ms": None,
            "peak_memory_bytes": peaks.get(provider.name),
            "op": case.op,
            "variant": case.variant,
            "where": case.where,
            "layers": list(case.also),
            "shapes": [list(shape) for shape in case.shapes],
            "dtype": case.dtype,
            "layout": case.layout,
            "pass": case.pass_,
            "nbytes": case.nbytes,
            "bytes_moved": case.bytes_moved,
            "gb_per_s": None,
            "fraction_of_copy": None,
            "fraction_of_clone": None,
            **environment,
        }
        if provider.name in samples:
            kept = samples[provider.name]
            low, median, high = kept.quantiles()
            row |= {
                "rounds": len(kept.values),
                "repeats": kept.repeats * kept.calls,
                "p20_ms": low * 1e3,
                "p50_ms": median * 1e3,
                "p80_ms": high * 1e3,
                "gb_per_s": case.bytes_moved / median / 1e9,
                "fraction_of_copy": copies[COPY] / median if COPY in copies else None,
                "fraction_of_clone": copies[CLONE] / median if CLONE in copies else None,
            }
        rows.append(row)
    return rows


def verdict(provider: Provider, oracle: Oracle) -> tuple[str, str | None]:
    """("ok", None), or why the provider is not timed: ("wrong" or "unavailable", reason)."""
    if provider.results is None:
        return "ok", None
    try:
        with provider.active():
            got = provider.results()
            provider.call()
            if got[0].is_cuda:  # what a kernel does wrong is told by a later call
                torch.cuda.synchronize()
    except Exception as error:  # whatever a rival raises, its row says so and the others go on
        reason = f"{type(error).__name__}: {_first_line(error)}"
        # Our own are listed only where they say that they can serve the case.
        return ("wrong" if provider.backend is not None else "unavailable"), reason
    reason = oracle.error(got)
    return ("ok", None) if reason is None else ("wrong", reason)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else "no message"
