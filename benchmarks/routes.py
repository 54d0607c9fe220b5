"""From the times of both GPU backends to the table that chooses between them (:mod:`adadfq.ops.routes`)."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch

from adadfq import files
from adadfq.errors import InvalidInputError
from adadfq.ops import routes
from adadfq.ops.schema import OPERATORS
from benchmarks.cases import backward_of
from benchmarks.providers import OURS
from benchmarks.tables import number, text_table

FIRST, OTHER = routes.BACKENDS
#: The other backend must be faster by more than this share: less is noise.
MARGIN = 0.05
#: What files that are put together must agree on.
_SAME = ("device", "device_name", "git_commit", "versions")

Row = dict[str, Any]


def operators(row: Row) -> tuple[str, ...]:
    """The operators whose time a row is, of a backend of ours.

    A backward without an operator of its own hands on, or scales, what the forward has computed.
    """
    backward = backward_of(row["op"], row["variant"])
    found = {"forward": (row["op"],), "backward": (backward,), "both": (row["op"], backward)}[row["pass"]]
    return tuple(op for op in found if op is not None)


def size_of(row: Row) -> str:
    """The class of size (:data:`adadfq.ops.routes.SIZES`) of a row's tensors."""
    return routes.size_class(sum(math.prod(shape) for shape in row["shapes"]))


def routed(row: Row, table: routes.Routes) -> str | None:
    """The backend that a table sends all operators of a row to, or None."""
    dtype = getattr(torch, row["dtype"])
    backends = {table.backend(op, dtype, size_of(row)) for op in operators(row)}
    return backends.pop() if len(backends) == 1 else None


def build(contents: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The content of a table, from the contents of files of results (:mod:`benchmarks.store`).

    A rule for every operator, dtype and class of size that has a case with a time of both backends: the one with the
    smaller times, by the median of the cases' ratios; the first where the other is not faster by more than MARGIN. But
    where that would leave a case slower by more than MARGIN, the one whose slowest case is the less slow.

    Raises:
        InvalidInputError: the files are not all of operators on one GPU at one commit, were made with native modules
            of other sources, hold a wrong result, or hold no such case.
    """
    measured = _environment(contents)
    ratios: dict[tuple[str, str, str], list[float]] = {}
    for pair in _pairs(contents):
        if len(ops := operators(pair.row)) == 1:
            ratios.setdefault((*ops, pair.row["dtype"], size_of(pair.row)), []).append(pair.ratio)
    if not ratios:
        raise InvalidInputError(
            f"no case has a time of both {FIRST} and {OTHER}: run 'ops --device cuda' where 'adadfq info' has both"
        )
    rules = []
    for (op, dtype, size), values in sorted(ratios.items(), key=lambda item: _order(*item[0])):
        ratio = median(values)
        worst = {FIRST: max(values), OTHER: 1 / min(values)}
        backend = OTHER if ratio > 1 + MARGIN else FIRST
        if worst[backend] > 1 + MARGIN:
            backend = min((backend, *routes.BACKENDS), key=lambda name: worst[name])
        rule = {"op": op, "dtype": dtype, "size": size, "backend": backend}
        rules.append(rule | {"ratio": round(ratio, 4), "worst": round(worst[backend], 4), "cases": len(values)})
    content = {"format": routes.FORMAT, "version": routes.VERSION, "measured": measured, "rules": rules}
    routes.parse(content, "the table")
    return content


class _Pair(NamedTuple):
    """A case with a time of both backends in one run."""

    row: Row
    ratio: float
    """Time of the first over that of the other."""


def _pairs(contents: Sequence[dict[str, Any]]) -> list[_Pair]:
    # Providers of one case took turns in one run: times of different runs make no ratio.
    times: dict[tuple[int, str], dict[str, Row]] = {}
    for i, row in ((i, row) for i, content in enumerate(contents) for row in content["rows"]):
        for backend in routes.BACKENDS:
            if row["provider"] == OURS + backend:
                if row["status"] == "wrong":
                    raise InvalidInputError(f"{backend} is wrong on {row['case']}: {row['error']}; mend it first")
                if row["status"] == "ok":
                    times.setdefault((i, row["case"]), {})[backend] = row
    both = (found for found in times.values() if len(found) == len(routes.BACKENDS))
    return [_Pair(found[FIRST], found[FIRST]["p50_ms"] / found[OTHER]["p50_ms"]) for found in both]


def left_slower(contents: Sequence[dict[str, Any]], content: dict[str, Any]) -> list[tuple[str, str, float]]:
    """Cases that a table leaves with a backend slower than the other by more than MARGIN, the slowest first.

    Args:
        contents: of files of results.
        content: of the table.

    Returns:
        (case, backend, its time over the other's); of cases of one operator.
    """
    table, found = routes.parse(content, "the table"), []
    for row, ratio in _pairs(contents):
        if len(operators(row)) == 1:
            backend = routed(row, table) or FIRST
            slower = ratio if backend == FIRST else 1 / ratio
            if slower > 1 + MARGIN:
                found.append((row["case"], backend, slower))
    return sorted(found, key=lambda item: -item[2])


def _order(op: str, dtype: str, size: str) -> tuple[int, str, int]:
    return list(OPERATORS).index(op), dtype, routes.SIZES.index(size)


def _environment(contents: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the table says about where it is from."""
    for content in contents:
        if content["kind"] != "ops":
            raise InvalidInputError(f"routes are made from files of 'ops', got one of kind {content['kind']!r}")
        if content["environment"]["device"] != routes.DEVICE_TYPE:
            raise InvalidInputError(
                f"routes are made from times on a GPU, got {content['environment']['device_name']}: run 'ops --device "
                f"{routes.DEVICE_TYPE}'"
            )
        if content["environment"]["native_matches_sources"] is False:
            raise InvalidInputError("the native modules were not those of csrc: 'pip install -e .' and measure again")
    first = contents[0]["environment"]
    for key in _SAME:
        if other := [c["environment"][key] for c in contents if c["environment"][key] != first[key]]:
            raise InvalidInputError(f"the files differ in {key}: {first[key]} and {other[0]}; measure again")
    found = {key: first[key] for key in ("device_name", "git_commit", "git_dirty", "date", "versions")}
    return found | {"git_dirty": any(content["environment"]["git_dirty"] for content in contents)}


def write(path: Path, content: dict[str, Any]) -> None:
    """Write a table, whole or not at all, a rule a line.

    Raises:
        InvalidInputError: the file cannot be written there.
    """
    head = json.dumps({key: value for key, value in content.items() if key != "rules"}, indent=2, ensure_ascii=False)
    rules = ",\n".join(f"    {json.dumps(rule)}" for rule in content["rules"])
    with files.atomic_write(path) as temporary:
        temporary.write_text(f'{head[:-2]},\n  "rules": [\n{rules}\n  ]\n}}\n', encoding="utf-8")


def table_text(content: dict[str, Any]) -> str:
    """The rules, with what they were made from."""
    header = ("operator", "dtype", "size", "backend", f"{FIRST} / {OTHER}", "worst", "cases")
    keys = ("op", "dtype", "size", "backend")
    rows = [
        (*(rule[key] for key in keys), number(rule["ratio"]), number(rule["worst"]), str(rule["cases"]))
        for rule in content["rules"]
    ]
    return text_table(header, rows)


def slower_text(slower: Sequence[tuple[str, str, float]]) -> str:
    """What :func:`left_slower` found; a line that says so where that is nothing."""
    if not slower:
        return f"no case is left with a backend more than {MARGIN:.0%} slower than the other"
    lines = [f"  {case}: {backend} takes {ratio:.2f} times the other's time" for case, backend, ratio in slower]
    return "\n".join([f"left with a backend more than {MARGIN:.0%} slower than the other:", *lines])
