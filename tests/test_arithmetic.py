"""Arithmetic of csrc/common that only GPU kernels use, compiled for the host."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from building import ROOT, unavailable


def check(root: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """Compile and run native_arithmetic.cpp of `root`."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    if shutil.which(compiler[-1]) is None:
        unavailable(f"no {compiler[-1]}")
    program = folder / "native_arithmetic"
    # No multiply-add is fused but those that are written so.
    command = [*compiler, "-std=c++17", "-O2", "-ffp-contract=off", str(root / "tests" / "native_arithmetic.cpp")]
    subprocess.run([*command, "-o", str(program)], check=True)
    return subprocess.run([str(program)], capture_output=True, text=True, timeout=120)


def test_divisions_and_reciprocals_are_exact(tmp_path: Path) -> None:
    done = check(ROOT, tmp_path)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("file", "right", "wrong"),
    [
        ("division.h", "+ 1) >> 23;", "+ 0) >> 23;"),
        ("division.h", "kToCodes = 0.25f", "kToCodes = 0.75f"),
        ("fast_divide.h", "/ divisor + 1)", "/ divisor)"),
        ("wide_divide.h", "/ divisor_ + 1)", "/ divisor_)"),
    ],
)
def test_a_mistake_is_found(tmp_path: Path, file: str, right: str, wrong: str) -> None:
    for source in (*ROOT.glob("csrc/common/*.h"), ROOT / "tests" / "native_arithmetic.cpp"):
        copy = tmp_path / source.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        text = source.read_text()
        assert source.name != file or right in text
        copy.write_text(text.replace(right, wrong) if source.name == file else text)
    assert check(tmp_path, tmp_path).returncode == 1
