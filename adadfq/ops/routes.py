"""Which GPU backend is tried first for an operator, as measurements say: routes.json beside this file.

    {"format": "adadfq-routes", "version": 1,
     "measured": null or {"device_name", "git_commit", ...},
     "rules": [{"op": "bn_match", "dtype": "float32", "size": "small", "backend": "triton"}, ...]}

The first rule that fits a call counts; one without dtype or size fits any. Without a rule, and where the backend it
names cannot serve the call, the order of :data:`adadfq.ops.dispatch.PREFERENCE` holds. `size` is the class
(:data:`SIZES`) of the elements of the main tensor, of all tensors where there is a list. What a rule came from may be
beside it: "ratio", the median of cuda's time over triton's, "worst", the largest of the chosen backend's time over the
other's, and "cases", how many.

``ADADFQ_ROUTES`` names a file to use instead. The file is read once a process, when an operator is first called on a
CUDA device: what the variable or the file says later counts for nothing, but a file that was refused is read again.
``python -m benchmarks routes RESULTS... --out FILE`` makes one.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from adadfq.errors import BackendError
from adadfq.ops import native_args, operators

FORMAT = "adadfq-routes"
VERSION = 1
DEFAULT = Path(__file__).with_name("routes.json")
#: The device whose backends are chosen among, and those.
DEVICE_TYPE = "cuda"
BACKENDS = ("cuda", "triton")
#: Classes of size, and the first numbers of elements that are above the first two.
SIZES = ("small", "medium", "large")
MEDIUM, LARGE = 2**16, 2**22

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in native_args.DTYPES}
_KNOWN: dict[str, tuple[str, ...]] = {
    "op": operators.OPERATORS,
    "backend": BACKENDS,
    "dtype": tuple(sorted(_DTYPES)),
    "size": SIZES,
}
_REQUIRED = ("op", "backend")
_EVIDENCE = {"ratio": (int, float), "worst": (int, float), "cases": (int,)}


@dataclass(frozen=True)
class Rule:
    """A line of the table; None fits anything."""

    op: str
    backend: str
    dtype: torch.dtype | None = None
    size: str | None = None


@dataclass(frozen=True)
class Routes:
    """A table, and where its measurements are from; `measured` is None where there are none."""

    measured: dict[str, Any] | None
    rules: tuple[Rule, ...]

    def backend(self, op: str, dtype: torch.dtype, size: str | None) -> str | None:
        """The backend to try first, or None; rules for one size fit no call whose size is None."""
        for rule in self.rules:
            if rule.op == op and rule.dtype in (None, dtype) and rule.size in (None, size):
                return rule.backend
        return None


def size_class(elements: int) -> str:
    """The class of this many elements."""
    return "small" if elements < MEDIUM else "medium" if elements < LARGE else "large"


def override() -> str | None:
    """The file that ADADFQ_ROUTES names."""
    return os.environ.get("ADADFQ_ROUTES") or None


@cache
def current() -> Routes:
    """The table in force, the same as long as the process runs.

    Raises:
        BackendError: the file cannot be read or is not such a table; says where it fails.
    """
    path = override()
    try:
        return load(Path(path) if path else DEFAULT)
    except BackendError as error:
        if path is None:
            raise
        raise BackendError(
            f"ADADFQ_ROUTES: {error}; make one with 'python -m benchmarks routes' or unset ADADFQ_ROUTES"
        ) from error


@cache
def load(path: Path) -> Routes:
    """Read a table; see :func:`parse`.

    Raises:
        BackendError: it cannot be read or is not such a table.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BackendError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise BackendError(f"{path} is not JSON: {error}") from error
    return parse(content, str(path))


def parse(content: Any, name: str) -> Routes:
    """The table that a file's content is.

    Raises:
        BackendError: it is none; says where it fails.
    """
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise BackendError(f"{name} is not a table of routes: 'format' must be {FORMAT!r}")
    if content.get("version") != VERSION:
        raise BackendError(f"{name} has version {content.get('version')!r}, expected {VERSION}")
    if set(content) != {"format", "version", "measured", "rules"}:
        raise BackendError(f"{name} must have format, version, measured and rules, got {', '.join(sorted(content))}")
    measured, rules = content["measured"], content["rules"]
    if measured is not None and not (isinstance(measured, dict) and isinstance(measured.get("device_name"), str)):
        raise BackendError(f"{name}: measured must be null or name the GPU in 'device_name', got {measured!r}")
    if not isinstance(rules, list):
        raise BackendError(f"{name}: rules must be a list, got {rules!r}")
    return Routes(measured, tuple(_rule(rule, f"{name}: rule {i}") for i, rule in enumerate(rules)))


def _rule(rule: Any, name: str) -> Rule:
    if not isinstance(rule, dict):
        raise BackendError(f"{name} must be an object, got {rule!r}")
    if missing := [key for key in _REQUIRED if key not in rule]:
        raise BackendError(f"{name} has no {' and no '.join(missing)}")
    for key, value in rule.items():
        if key in _EVIDENCE:
            if not isinstance(value, _EVIDENCE[key]) or isinstance(value, bool):
                raise BackendError(f"{name}: {key} must be a number, got {value!r}")
        elif key not in _KNOWN:
            raise BackendError(f"{name}: {key!r} must be one of {', '.join((*_KNOWN, *_EVIDENCE))}")
        elif value not in _KNOWN[key]:
            raise BackendError(f"{name}: {key} must be one of {', '.join(_KNOWN[key])}, got {value!r}")
    return Rule(rule["op"], rule["backend"], _DTYPES.get(rule.get("dtype")), rule.get("size"))
