"""From the times of both GPU backends to the table that chooses between them (:mod:`adadfq.ops.routes`)."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from adadfq import files
from adadfq.errors import InvalidInputError
from adadfq.ops import routes
from adadfq.ops.schema import OPERATORS
from benchmarks.providers import OURS
from benchmarks.tables import number, text_table

FIRST, OTHER = routes.BACKENDS
#: The other backend must be faster by more than this share: less is noise.
MARGIN = 0.05
#: What files that are put together must agree on.
_SAME = ("device", "device_name", "git_commit", "versions")

Row = dict[str, Any]


def operator(row: Row) -> str | None:
    """The operator whose time a row is; None where it is that of several, or of none.

    A backward without an operator of its own hands on, or scales, what the forward has computed.
    """
    backward: str | None = f"{row['op']}_backward"
    if backward not in OPERATORS or (row["op"] == "fake_quantize" and not row["variant"].endswith("_clip")):
        backward = None
    if row["pass"] == "backward":
        return backward
    return row["op"] if row["pass"] == "forward" or backward is None else None


def build(contents: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The content of a table, from the contents of files of results (:mod:`benchmarks.store`).

    A rule for every operator, dtype and class of size that has a case with a time of both backends: the one with the
    smaller times, by the median of the cases' ratios; the first where the other is not faster by more than MARGIN.

    Raises:
        InvalidInputError: the files are not all of operators on one GPU at one commit, were made with native modules
            of other sources, hold a wrong result, or hold no such case.
    """
    measured = _environment(contents)
    # Providers of one case took turns in one run: times of different runs make no ratio.
    times: dict[tuple[int, str], dict[str, Row]] = {}
    for i, row in ((i, row) for i, content in enumerate(contents) for row in content["rows"]):
        for backend in routes.BACKENDS:
            if row["provider"] == OURS + backend:
                if row["status"] == "wrong":
                    raise InvalidInputError(f"{backend} is wrong on {row['case']}: {row['error']}; mend it first")
                if row["status"] == "ok":
                    times.setdefault((i, row["case"]), {})[backend] = row
    ratios: dict[tuple[str, str, str], list[float]] = {}
    for found in times.values():
        if len(found) == len(routes.BACKENDS) and (op := operator(found[FIRST])) is not None:
            row = found[FIRST]
            size = routes.size_class(sum(math.prod(shape) for shape in row["shapes"]))
            ratios.setdefault((op, row["dtype"], size), []).append(row["p50_ms"] / found[OTHER]["p50_ms"])
    if not ratios:
        raise InvalidInputError(
            f"no case has a time of both {FIRST} and {OTHER}: run 'ops --device cuda' where 'adadfq info' has both"
        )
    rules = []
    for (op, dtype, size), values in sorted(ratios.items(), key=lambda item: _order(*item[0])):
        ratio = median(values)
        backend = OTHER if ratio > 1 + MARGIN else FIRST
        rule = {"op": op, "dtype": dtype, "size": size, "backend": backend}
        rules.append(rule | {"ratio": round(ratio, 4), "cases": len(values)})
    content = {"format": routes.FORMAT, "version": routes.VERSION, "measured": measured, "rules": rules}
    routes.parse(content, "the table")
    return content


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
    header = ("operator", "dtype", "size", "backend", f"{FIRST} / {OTHER}", "cases")
    keys = ("op", "dtype", "size", "backend")
    rows = [(*(rule[key] for key in keys), number(rule["ratio"]), str(rule["cases"])) for rule in content["rules"]]
    return text_table(header, rows)
