"""Builds the CPU launchers alone under AddressSanitizer and UBSan and drives them through raw buffers."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import sanitize

ROOT = Path(__file__).parents[1]
FLAGS = ["-std=c++17", "-O1", "-g", "-fopenmp", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]


def compiler() -> str:
    if (cxx := shutil.which("g++")) is None:
        pytest.skip("no g++")
    return cxx


def test_cpu_launchers_under_sanitizers(tmp_path: Path) -> None:
    cxx = compiler()
    if (reason := sanitize.why_not()) is not None:
        pytest.skip(reason)
    sources = [ROOT / "tests" / "native_sanitize.cpp", *sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))]
    program = tmp_path / "native_sanitize"
    subprocess.run([cxx, *FLAGS, *sanitize.SANITIZE, *map(str, sources), "-o", str(program)], check=True, timeout=300)
    # libgomp keeps its thread pool until the process ends, which is no leak.
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
    run = subprocess.run([str(program)], capture_output=True, text=True, timeout=300, env=environment)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    assert "no failures" in run.stdout


def test_16_bit_conversions_compile_without_hardware_types(tmp_path: Path) -> None:
    """What a compiler for another architecture sees: no clones, no vector intrinsics, strict C++17, no warnings."""
    for source in sorted((ROOT / "csrc" / "cpu").glob("*.cpp")):
        command = [compiler(), "-std=c++17", "-pedantic", "-Wall", "-Wextra", "-Werror", "-DADADFQ_NO_CLONES"]
        subprocess.run([*command, "-fopenmp", "-fsyntax-only", str(source)], check=True, timeout=120)
