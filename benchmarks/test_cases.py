"""The registry's cases under pytest-benchmark: ``pytest benchmarks --benchmark-only [--suite judged] [--filter TEXT]``.

One test a case and provider, in the case's group; wrong results fail and are not timed. pytest-benchmark runs one test
after the other: numbers to quote, from providers that take turns, come from ``python -m benchmarks ops``.
"""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch

from benchmarks import ops, problems, providers, timing
from benchmarks.cases import Case, select
from benchmarks.check import Oracle
from benchmarks.environment import pick_device

pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed: pip install -e '.[bench]'")

ROUNDS = 11


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test for every chosen case and provider, the providers of a case next to each other."""
    option = metafunc.config.getoption
    device = pick_device(option("device"), option("threads"))
    patterns = tuple(option("providers").split(","))
    chosen = [
        (case, name, device)
        for case in select(option("suite"), [op for op in option("ops").split(",") if op], option("filter"))
        for name in providers.names(case, device.type, patterns)
        if not name.endswith(providers.REPLAYED)  # many passes a call, which pytest-benchmark would not know
    ]
    ids = [f"{case.name}-{name}" for case, name, _ in chosen]
    metafunc.parametrize(("case", "provider_name", "device"), chosen, ids=ids)


@lru_cache(maxsize=1)
def _prepared(case: Case, device: torch.device) -> tuple[problems.Problem, Oracle]:
    problem = problems.make(case, device)
    return problem, Oracle(problem, case.pass_)


def test_case(benchmark, case: Case, provider_name: str, device: torch.device) -> None:  # type: ignore[no-untyped-def]
    """Check the provider, then time it."""
    problem, oracle = _prepared(case, device)
    (provider,) = providers.build(case, problem, [provider_name])
    status, error = ops.verdict(provider, oracle)
    if status == "unavailable":
        pytest.skip(str(error))
    assert status == "ok", error
    benchmark.group = case.name
    benchmark.extra_info.update(bytes_moved=case.bytes_moved, device=device.type, threads=torch.get_num_threads())

    def synchronised() -> None:
        provider.call()
        torch.cuda.synchronize()

    call = synchronised if device.type == "cuda" else provider.call
    with provider.active():
        repeats = timing.repeats_for(call, timing.clock_of(torch.device("cpu")))[0]
        benchmark.pedantic(call, rounds=ROUNDS, iterations=repeats, warmup_rounds=1)
