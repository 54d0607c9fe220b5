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
from types import TracebackType
from typing import Any

from adadfq import files
from adadfq.errors import InvalidInputError
from adadfq.result import CHECKPOINT
from benchmarks import store
from benchmarks.environment import digest_of_files

__all__ = ["Place", "forget", "known", "take"]

ROOT = Path(__file__).parents[1]
#: Of the package with its recipes and routes, the native sources, and the benchmarks.
SOURCES = ("adadfq/**/*.py", "adadfq/**/*.json", "kernels/**/*.py", "csrc/**/*.*", "benchmarks/*.py")


def known(environment: Mapping[str, Any], root: Path = ROOT) -> dict[str, Any]:
    """What has to be the same where a training goes on: the commit is not among it, its sources are.

    To be asked when the code was just read: what is edited later is not what runs.
    """
    paths = {path for pattern in SOURCES for path in root.glob(pattern) if path.is_file()}
    routes = os.environ.get("ADADFQ_ROUTES")
    return {
        **{name: environment.get(name) for name in store.KNOWN if not name.startswith("git_")},
        "sources": digest_of_files((path for path in paths if not path.name.startswith("_build_info")), root),
        "ADADFQ_BACKEND": os.environ.get("ADADFQ_BACKEND"),
        "ADADFQ_ROUTES": files.sha256(routes) if routes and Path(routes).is_file() else routes,
    }


class Place:
    """The folder of a run that this process has taken; a context manager that gives it back.

    What is there to go on with stays for whoever comes next, but for a run that was refused before it had any.

    Attributes:
        training: where the trainer keeps what it needs to go on; not there yet, or with its checkpoint.
        scores: of the epochs behind the checkpoint, and perhaps of later ones; empty for a new run.
    """

    def __init__(self, folder: Path, descriptor: int, known: Mapping[str, Any]) -> None:
        self._folder, self._descriptor, self._removed = folder, descriptor, False
        self._known = known
        self.training = folder / "training"
        self._scores, self._row = folder / "scores.json", folder / "row.json"
        self.scores: dict[str, list[Any]] = {}

    def go_on(self, say: Callable[[str], None]) -> bool:
        """Whether a training is there to go on with; otherwise the folder is emptied, and `say` told why."""
        if (self.training / CHECKPOINT).is_file():
            # A checkpoint of an epoch before the first that is scored has none.
            scores = json.loads(self._scores.read_text(encoding="utf-8")) if self._scores.is_file() else {}
            begun = json.loads((self._folder / "known.json").read_text(encoding="utf-8"))
            different = [name for name in self._known if begun.get(name) != self._known[name]]
            if not different:
                self.scores = scores
                return True
            say(f"begun anew: it differs in {', '.join(different)}")
        self.begin_anew()
        return False

    def begin_anew(self) -> None:
        """Forget what is there."""
        self.scores = {}
        shutil.rmtree(self.training, ignore_errors=True)
        self._scores.unlink(missing_ok=True)
        files.write_json(self._folder / "known.json", self._known)

    def keep(self, scores: Mapping[str, list[Any]]) -> None:
        """Write the scores of all epochs so far, before the trainer writes its checkpoint."""
        files.write_json(self._scores, scores)

    def keep_row(self, row: Mapping[str, Any]) -> None:
        """Keep the row of a training that has ended until it is stored."""
        files.write_json(self._row, row)

    def row(self) -> dict[str, Any] | None:
        """What :meth:`keep_row` has kept."""
        return json.loads(self._row.read_text(encoding="utf-8")) if self._row.is_file() else None

    def remove(self) -> None:
        """The run has its row: nothing is left to go on with."""
        shutil.rmtree(self._folder, ignore_errors=True)
        self._removed = True

    def __enter__(self) -> Place:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._removed:  # otherwise another process may have it by now
            if isinstance(error, InvalidInputError) and not (self.training / CHECKPOINT).is_file():
                self.remove()
            with suppress(OSError):
                self._folder.rmdir()  # where it is empty
        os.close(self._descriptor)


def take(folder: Path, key: str, known: Mapping[str, Any]) -> Place | None:
    """The place of the run `key` beside the results in `folder`; None where another process has it.

    Args:
        known: what has to be the same where its training goes on.
    """
    path = _path(folder, key)
    while True:
        try:
            path.mkdir(exist_ok=True)
            descriptor = os.open(path, os.O_RDONLY)
        except (FileExistsError, FileNotFoundError):  # removed just now by the process that had it
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return Place(path, descriptor, known)
        except BlockingIOError:
            os.close(descriptor)
            return None
        except FileNotFoundError:
            pass
        os.close(descriptor)  # nothing, or another folder, is at the path by now


def forget(folder: Path, key: str) -> None:
    """Remove what is left of a run that has its row, unless a process has it."""
    if _path(folder, key).is_dir() and (place := take(folder, key, {})) is not None:
        with place:
            place.remove()


def _path(folder: Path, key: str) -> Path:
    return folder / f".run-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
