"""Options of ``pytest benchmarks``: which cases, and where."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options of ``python -m benchmarks ops`` that choose what runs."""
    group = parser.getgroup("adadfq benchmarks")
    group.addoption("--suite", default="quick", help="quick, judged, gpu or full")
    group.addoption("--ops", default="", help="only these operators, separated by commas")
    group.addoption("--filter", action="append", default=[], help="only names that hold or match it")
    group.addoption("--providers", default="*", help="patterns separated by commas")
    group.addoption("--device", default="cpu", help="cpu or cuda")
    group.addoption("--threads", type=int, default=2, help="PyTorch's threads")
