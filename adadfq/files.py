"""Writing files so that a reader never meets half of one."""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from adadfq.errors import InvalidInputError


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path` to write to; on success it replaces `path`, on failure it is removed.

    The data are on the disk before the name changes. The temporary file has the suffix of `path`.

    Raises:
        InvalidInputError: the directory of `path` does not exist, or `path` is a directory.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise InvalidInputError(f"cannot write {path}: the directory {path.parent} does not exist; create it first")
    if path.is_dir():
        raise InvalidInputError(f"cannot write {path}: it is a directory; give a file name")
    temporary = path.with_name(f".{path.stem}.{secrets.token_hex(6)}{path.suffix}")
    try:
        temporary.touch(exist_ok=False)  # permissions follow the umask, unlike tempfile's
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: str | os.PathLike[str], obj: Any) -> None:
    """Write `obj` as indented JSON, atomically. NaN and infinities, which JSON lacks, become null.

    Raises:
        InvalidInputError: as :func:`atomic_write`.
        TypeError: `obj` holds something JSON cannot; nothing is written.
    """
    text = json.dumps(finite(obj), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def finite(obj: Any) -> Any:
    """`obj` with every NaN and infinity inside dicts, lists and tuples replaced by None."""
    if isinstance(obj, float):
        return obj if math.isfinite(obj) else None
    if isinstance(obj, dict):
        return {key: finite(value) for key, value in obj.items()}
    if isinstance(obj, (list, tuple)):
        return [finite(value) for value in obj]
    return obj


def sha256(path: str | os.PathLike[str]) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def new_directory(path: str | os.PathLike[str]) -> Path:
    """Create `path` with its parents; an empty directory that exists already will do.

    Raises:
        InvalidInputError: `path` is a file, a directory with something in it, or cannot be created.
    """
    path = check_new_directory(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidInputError(
            f"cannot create the output directory {path}: {error.strerror}; choose another path"
        ) from error
    return path


def check_new_directory(path: str | os.PathLike[str]) -> Path:
    """Return `path` if it does not exist or is an empty directory; nothing is created.

    Raises:
        InvalidInputError: otherwise.
    """
    path = Path(path)
    if path.is_dir():
        if any(path.iterdir()):
            raise InvalidInputError(
                f"output directory {path} exists and is not empty; choose another name or remove it"
            )
    elif os.path.lexists(path):
        raise InvalidInputError(f"output directory {path} exists and is not a directory; choose another name")
    return path
