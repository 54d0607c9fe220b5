"""Huge pages under new tensors: our kernels ask for them from 8 MB on, PyTorch's allocator only where it is told to."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from adadfq.errors import InvalidInputError

#: Has PyTorch ask for huge pages under every large tensor; read at the first allocation.
VARIABLE = "THP_MEM_ALLOC_ENABLE"
_MODE = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_BYTES = 64 << 20


def mode(file: Path = _MODE) -> str | None:
    """The system's choice, "always", "madvise" or "never"; None where it has none."""
    try:
        text = file.read_text(encoding="ascii")
    except OSError:
        return None
    return text.partition("[")[2].partition("]")[0] or None


def asked_for() -> bool:
    """Whether PyTorch's allocator asks for huge pages."""
    return os.environ.get(VARIABLE) == "1"


def for_everybody() -> None:
    """Have PyTorch ask for huge pages: starts this process again where it was not told to from the start.

    Raises:
        InvalidInputError: new tensors get none all the same.
    """
    if not asked_for():
        sys.stdout.flush()
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | {VARIABLE: "1"})
    if not _given():
        raise InvalidInputError(
            f"--huge-pages: a new tensor of {_BYTES >> 20} MB got no huge page; they need Linux, "
            f"transparent_hugepage madvise or always (here {mode()}), and free memory in one piece"
        )


def _given() -> bool:
    """Whether a new tensor gets any."""
    import torch

    before = _huge_kb()
    kept = torch.ones(_BYTES // 4)
    after = _huge_kb()
    del kept
    return before is not None and after is not None and after > before


def _huge_kb() -> int | None:
    """kB of this process on huge pages."""
    try:
        lines = Path("/proc/self/smaps_rollup").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("AnonHugePages:")), None)
