"""adadfq.files: a reader sees the old file or the new one, never half of one."""

import hashlib
import json
import math
import os
import stat

import pytest

from adadfq import files
from adadfq.errors import InvalidInputError


def test_atomic_write_replaces_only_on_success(tmp_path):
    path = tmp_path / "data.bin"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError, match="midway"), files.atomic_write(path) as temporary:
        temporary.write_bytes(b"half")
        raise RuntimeError("midway")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["data.bin"]
    with files.atomic_write(path) as temporary:
        assert temporary.parent == tmp_path and temporary.suffix == ".bin"
        temporary.write_bytes(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["data.bin"]


def test_atomic_write_survives_a_keyboard_interrupt(tmp_path):
    with pytest.raises(KeyboardInterrupt), files.atomic_write(tmp_path / "x") as temporary:
        temporary.write_bytes(b"half")
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []


def test_atomic_write_gives_the_permissions_of_an_ordinary_file(tmp_path):
    (tmp_path / "ordinary").touch()
    with files.atomic_write(tmp_path / "ours") as temporary:
        temporary.write_bytes(b"x")
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("ordinary", "ours")}
    assert len(modes) == 1


def test_atomic_write_syncs_before_it_replaces(tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append("fsync"), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append("replace"), replace(a, b)))
    with files.atomic_write(tmp_path / "x") as temporary:
        temporary.write_bytes(b"x")
    assert events == ["fsync", "replace", "fsync"]


def test_atomic_write_refuses_a_missing_directory_and_a_directory(tmp_path):
    with pytest.raises(InvalidInputError, match="does not exist; create it"), files.atomic_write(tmp_path / "no" / "x"):
        pass
    with pytest.raises(InvalidInputError, match="is a directory"), files.atomic_write(tmp_path):
        pass


def test_write_json(tmp_path):
    path = tmp_path / "x.json"
    files.write_json(path, {"a": (1, 2.5), "nan": math.nan, "deep": [{"inf": math.inf}], "text": "é"})
    assert json.loads(path.read_text(encoding="utf-8")) == {
        "a": [1, 2.5],
        "nan": None,
        "deep": [{"inf": None}],
        "text": "é",
    }


def test_write_json_of_something_else_leaves_the_file_alone(tmp_path):
    path = tmp_path / "x.json"
    files.write_json(path, 1)
    with pytest.raises(TypeError):
        files.write_json(path, {"x": object()})
    assert path.read_text() == "1\n" and os.listdir(tmp_path) == ["x.json"]


def test_sha256(tmp_path):
    data = os.urandom((1 << 20) + 17)  # more than one block
    (tmp_path / "x").write_bytes(data)
    assert files.sha256(tmp_path / "x") == hashlib.sha256(data).hexdigest()


def test_new_directory(tmp_path):
    path = tmp_path / "a" / "b"
    assert files.check_new_directory(path) == path and not path.exists()
    assert files.new_directory(path) == path and path.is_dir()
    assert files.new_directory(str(path)) == path  # empty: will do
    (path / "x").touch()
    with pytest.raises(InvalidInputError, match=r"b exists and is not empty; choose another name or remove it"):
        files.new_directory(path)
    with pytest.raises(InvalidInputError, match="is not a directory"):
        files.new_directory(path / "x")
    with pytest.raises(InvalidInputError, match="cannot create"):
        files.new_directory(path / "x" / "y")
