"""What a quantised model quantises, and what it leaves in float and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class ReportRow:
    """One convolution, linear layer, activation or other thing a reader would look for."""

    where: str
    """Module path, or path of the calling module and the function."""
    kind: str
    """Class or function name, such as ``Conv2d`` or ``relu``."""
    bits: int | None
    """Width of the codes; None if left in float."""
    reason: str = ""
    """Why it was left in float; empty if quantised."""
    quantizer: str = ""
    """Path, in the quantised model, of the module that quantises it; empty if left in float."""


@dataclass(frozen=True)
class Report:
    """Rows in order of execution (of definition, where the model could not be traced). ``str()`` gives a table."""

    rows: Sequence[ReportRow]
    method: str

    @property
    def left_in_float(self) -> list[ReportRow]:
        """The rows that were not quantised."""
        return [row for row in self.rows if row.bits is None]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return {"method": self.method, "rows": [asdict(row) for row in self.rows]}

    def __str__(self) -> str:
        cells = [(r.where, r.kind, "float" if r.bits is None else str(r.bits), r.reason) for r in self.rows]
        cells.insert(0, ("where", "what", "bits", "why"))
        widths = [max(len(row[i]) for row in cells) for i in range(3)]
        lines = [
            "  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[3]]).rstrip() for row in cells
        ]
        done = len(self.rows) - len(self.left_in_float)
        return "\n".join([*lines, f"{done} quantised, {len(self.left_in_float)} left in float ({self.method})"])
