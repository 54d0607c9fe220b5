"""Trainings that were cut off: kept beside the file of results, and gone on with by the same command.

A run that is being trained has a hidden folder of its own, held under a lock: of processes that work on one file, each
takes the runs that no other has.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from adadfq import files
from adadfq.result import CHECKPOINT
from benchmarks import store

__all__ = ["Place", "take"]


class Place:
    """The folder of a run that this process has taken.

    Attributes:
        training: where the trainer keeps what it needs to go on; not there yet, or with its checkpoint.
        scores: of the epochs behind the checkpoint, and perhaps of one more; empty for a new run.
    """

    def __init__(self, folder: Path, descriptor: int, environment: Mapping[str, Any]) -> None:
        self._folder, self._descriptor, self._removed = folder, descriptor, False
        self._environment = {name: environment.get(name) for name in store.KNOWN}
        self.training = folder / "training"
        self._scores = folder / "scores.json"
        self.scores: dict[str, list[Any]] = {}

    def go_on(self, say: Callable[[str], None]) -> bool:
        """Whether a training is there to go on with; otherwise the folder is emptied, and `say` told why."""
        if (self.training / CHECKPOINT).is_file() and self._scores.is_file():
            before = json.loads(self._scores.read_text(encoding="utf-8"))
            reason = store.reason_against(before["environment"], self._environment)
            if reason is None:
                self.scores = before["scores"]
                return True
            say(f"begun anew: {reason}")
        self.begin_anew()
        return False

    def begin_anew(self) -> None:
        """Forget what is there."""
        self.scores = {}
        shutil.rmtree(self.training, ignore_errors=True)
        self._scores.unlink(missing_ok=True)

    def keep(self, scores: Mapping[str, list[Any]]) -> None:
        """Write the scores of all epochs so far, before the trainer writes its checkpoint."""
        files.write_json(self._scores, {"environment": self._environment, "scores": scores})

    def remove(self) -> None:
        """Nothing is left to go on with: the run has its row, or cannot have one."""
        shutil.rmtree(self._folder, ignore_errors=True)
        self._removed = True

    def release(self) -> None:
        """Leave what is there to whoever comes next."""
        if not self._removed:  # another process may have it by now
            with suppress(OSError):
                self._folder.rmdir()  # where it is empty
        os.close(self._descriptor)


def take(folder: Path, key: str, environment: Mapping[str, Any]) -> Place | None:
    """The place of the run `key` beside the results in `folder`; None where another process has it."""
    path = folder / f".run-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    while True:
        path.mkdir(exist_ok=True)
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:  # removed by the process that had it
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.is_dir() and os.path.samestat(os.fstat(descriptor), path.stat()):
                return Place(path, descriptor, environment)
        except BlockingIOError:
            os.close(descriptor)
            return None
        os.close(descriptor)  # another folder is at the path by now
