"""Which rows of accuracies stand beside each other: of one teacher, images, widths, kind of device and threads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

Row = dict[str, Any]

#: What a teacher and its accuracy are.
TEACHER = ("model", "weights_sha256", "data", "images")
WIDTHS = ("weight_bits", "act_bits")
MACHINE = ("device", "threads")
#: Field that a heading names where rows differ in it -> how.
_TEXTS: dict[str, Callable[[Any], str]] = {
    "weights_sha256": lambda digest: "weights of its own" if digest is None else f"weights {digest[:8]}",
    "data": str,
    "images": lambda count: f"{count} images",
    "device": str,
    "threads": lambda count: f"{count} thread{'s' * (count > 1)}",
    "held_out_digest": lambda digest: "no held-out images" if digest is None else f"held-out images {digest[:8]}",
}


def of_teacher(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """What rows of one teacher on one kind of machine share."""
    return tuple(row[name] for name in (*TEACHER, *MACHINE))


def of_network(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """The same, and the widths."""
    return (*of_teacher(row), *(row[name] for name in WIDTHS))


def bits(row: Mapping[str, Any]) -> str:
    """Widths, such as "4w4a"."""
    return f"{row['weight_bits']}w{row['act_bits']}a"


def grouped(rows: Sequence[Row], by: Callable[[Row], Any]) -> dict[Any, list[Row]]:
    """Rows by a key, in the order of their first."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(by(row), []).append(row)
    return groups


class Names:
    """Short headings that tell apart what stands in `rows`: the model, and what differs among rows of that model."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._values: dict[tuple[str, str], set[Any]] = {}
        for row in rows:
            for field in _TEXTS:
                self._values.setdefault((row["model"], field), set()).add(row.get(field))

    def teacher(self, row: Row) -> str:
        """Of rows that share :func:`of_teacher`."""
        return self._name(row, row["model"], (*TEACHER, *MACHINE))

    def network(self, row: Row) -> str:
        """Of rows that share :func:`of_network`."""
        return self._name(row, f"{row['model']} {bits(row)}", (*TEACHER, *MACHINE))

    def signals(self, row: Row, widths: str) -> str:
        """Of rows whose held-out images are the same ones too."""
        return self._name(row, f"{row['model']} {widths}", (*TEACHER, *MACHINE, "held_out_digest"))

    def _name(self, row: Row, start: str, fields: Sequence[str]) -> str:
        differing = [name for name in fields if len(self._values.get((row["model"], name), ())) > 1]
        return ", ".join([start, *(_TEXTS[name](row.get(name)) for name in differing)])
