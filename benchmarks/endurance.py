"""A whole training in one process: do a step's time and the memory stay what they are?"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import adadfq
from benchmarks.contest import Setting, Start

#: The median of the last fifth of the epochs may be as much above that of the fifth after the first.
MORE_TIME, MORE_MEMORY = 0.10, 0.01
LEAST_EPOCHS = 10


def run_endurance(
    setting: Setting, epochs: int, steps_per_epoch: int, device: torch.device, environment: dict[str, Any]
) -> dict[str, Any]:
    """Train with `setting`'s recipe over another number of epochs; the row, see :data:`benchmarks.store.FIELDS`."""
    recipe = setting.resolved().replace(
        epochs=epochs, steps_per_epoch=steps_per_epoch, warmup_epochs=1, calibration_epochs=1, lr_milestones=()
    )
    start = Start(setting, device)
    seconds: list[float] = []
    allocated: list[int] = []
    used: list[int] = []
    last = time.perf_counter()

    def note(epoch: int, trainer: adadfq.Trainer) -> None:
        nonlocal last
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        now = time.perf_counter()
        seconds.append(now - last)
        of_tensors, of_everything = memory_bytes(device)
        allocated.append(of_tensors)
        used.append(of_everything)
        last = time.perf_counter()

    trainer = adadfq.Trainer(
        start.teacher(), start.student(), recipe, start.generator(),
        seed=setting.seed, device=device, progress=False, on_epoch_end=note,
    )  # fmt: skip
    last = time.perf_counter()
    error = None
    try:
        result = trainer.fit()
        if result.status != "complete":
            raise KeyboardInterrupt
    except adadfq.AdadfqError as diverged:
        error = str(diverged)
    trained = recipe.warmup_epochs
    found = [
        reason
        for name, values, more in (
            ("an epoch's time", seconds, MORE_TIME),
            ("memory of tensors", allocated, MORE_MEMORY),
            ("memory in use", used, MORE_MEMORY),
        )
        # A CPU may do anything else meanwhile.
        if not (values is seconds and device.type == "cpu")
        and (reason := grown(name, values[trained:], more)) is not None
    ]
    return {
        "case": setting.case(),
        "recipe": recipe.name,
        "steps": trainer.step,
        "steps_per_epoch": steps_per_epoch,
        "status": "ok" if error is None and not found else "wrong",
        "error": error or "; ".join(found) or None,
        "epoch_seconds": seconds,
        "allocated_bytes": allocated,
        "used_bytes": used,
        "step_ms": 1e3 * statistics.median(seconds[trained:]) / steps_per_epoch if seconds[trained:] else None,
        **environment,
    }


def grown(name: str, values: Sequence[float], more: float) -> str | None:
    """Why `values`, one an epoch, are not flat: the last fifth against the second; None where they are.

    With fewer than :data:`LEAST_EPOCHS` nothing can be said, and that is the answer.
    """
    if len(values) < LEAST_EPOCHS:
        return f"{name}: {len(values)} epochs say nothing, {LEAST_EPOCHS} would"
    fifth = len(values) // 5
    early, late = statistics.median(values[fifth : 2 * fifth]), statistics.median(values[-fifth:])
    if late <= early * (1 + more):
        return None
    return f"{name} grew by {100 * (late / early - 1):.1f} %, from {early:.4g} to {late:.4g}"


def memory_bytes(device: torch.device) -> tuple[int, int]:
    """Of the tensors there are, and all that is in use: on a GPU by graphs and libraries too, and by other processes.

    On a CPU both are the process's resident memory; 0 where the system does not tell.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return torch.cuda.memory_allocated(device), total - free
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return 0, 0
    resident = pages * os.sysconf("SC_PAGE_SIZE")
    return resident, resident
