"""Where a run's metrics go: a buffer on the device, then JSON lines, TensorBoard where installed, and the terminal."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from adadfq import files


class MetricBuffer:
    """Rows of metrics kept on the device, so that a step never waits for it; read once an epoch.

    Args:
        names: one a column.
        capacity: rows held between reads.
        device: where the rows are.
    """

    def __init__(self, names: Sequence[str], capacity: int, device: torch.device) -> None:
        self.names = tuple(names)
        self._rows = torch.zeros(capacity, len(self.names), device=device)
        self._used = 0

    def add(self, row: Tensor) -> None:
        """Append one row, [len(names)]."""
        self._rows[self._used].copy_(row)
        self._used += 1

    def drain(self) -> list[dict[str, float]]:
        """All rows since the last drain; waits for the device."""
        rows = self._rows[: self._used].tolist()
        self._used = 0
        return [dict(zip(self.names, row, strict=True)) for row in rows]


#: TensorBoard is given one of so many values: those of a step take a millisecond, as long as a GPU takes to play it.
BOARD_EVERY = 10


class MetricLog:
    """Appends steps to ``metrics.jsonl`` and, where TensorBoard is installed, every tenth value to ``tensorboard/``.

    Args:
        directory: an existing directory, or None to write nothing.
        keep_steps: lines already there to keep; later ones belong to steps that will be played again.
    """

    def __init__(self, directory: Path | None, keep_steps: int = 0) -> None:
        self._file: Any = None
        self._board: Any = None
        self._seen: Counter[str] = Counter()  # of each metric: replays lack some
        if directory is None:
            return
        # Truncated where it stands: at no moment are kept lines missing from the file.
        self._file = (directory / "metrics.jsonl").open("a+b")
        self._file.seek(0)
        for _ in range(keep_steps):
            self._file.readline()
        self._file.truncate(self._file.tell())
        if importlib.util.find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(directory / "tensorboard"), purge_step=keep_steps)

    def write(self, first_step: int, epoch: int, rows: Sequence[dict[str, float]]) -> None:
        """Write consecutive steps of one epoch."""
        for step, row in enumerate(rows, first_step):
            if self._file is not None:
                self._file.write(json.dumps(files.finite({"step": step, "epoch": epoch, **row})).encode() + b"\n")
            if self._board is not None:
                for name, value in row.items():
                    if self._seen[name] % BOARD_EVERY == 0:
                        self._board.add_scalar(name, value, step)
                    self._seen[name] += 1
        if self._file is not None:
            self._file.flush()

    def close(self) -> None:
        """Close the files."""
        for sink in (self._file, self._board):
            if sink is not None:
                sink.close()


class Progress:
    """A progress bar on a terminal, one plain line an epoch elsewhere, nothing if not `enabled`; on stderr."""

    def __init__(self, epochs: int, steps_per_epoch: int, first_step: int, enabled: bool) -> None:
        self._epochs, self._enabled = epochs, enabled
        self._bar: Any = None
        self._last = time.monotonic()
        if enabled and sys.stderr.isatty():
            self._bar = tqdm(
                total=epochs * steps_per_epoch, initial=first_step, unit="step", dynamic_ncols=True, file=sys.stderr
            )

    def step(self) -> None:
        """One step was played."""
        if self._bar is not None:
            self._bar.update()

    def epoch(self, epoch: int, phase: str, means: dict[str, float]) -> None:
        """An epoch (counted from 0) ended."""
        now = time.monotonic()
        text = (
            f"{phase}: G {means['loss_generator']:.3f}, Q {means['loss_student']:.2f}, H' {means['h_prime']:.2f}, "
            f"agreement {means['agreement']:.2f}"
        )
        if self._bar is not None:
            self._bar.set_description_str(f"epoch {epoch + 1}/{self._epochs}", refresh=False)
            self._bar.set_postfix_str(text)
        elif self._enabled:
            print(f"epoch {epoch + 1}/{self._epochs}, {text}, {now - self._last:.1f} s", file=sys.stderr, flush=True)
        self._last = now

    def close(self) -> None:
        """Leave the terminal as it was found."""
        if self._bar is not None:
            self._bar.close()
