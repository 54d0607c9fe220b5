"""The CUDA kernels without a GPU: an emulator runs them on CPU tensors, under the tests of the CPU kernels.

Which kernels serve CPU tensors is settled when tests are collected, so this takes processes of its own. By hand:

    ADADFQ_TEST_EMULATED_CUDA=1 python -m pytest tests/test_properties.py tests/test_cuda_kernels.py
    ADADFQ_TEST_EMULATED_CUDA=1 python -m pytest tests/test_ops.py tests/test_packing.py -k cuda
    ADADFQ_TEST_EMULATED_CUDA=1 python -m pytest tests/test_learned_steps.py -k cuda
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import emulated_cuda
import pytest
from building import unavailable

if shutil.which(os.environ.get("CXX", "c++").split()[-1]) is None:
    unavailable("no C++ compiler to compile the kernels with")
pytest.importorskip("pybind11", reason="pybind11 is needed to compile the kernels")

TESTS = Path(__file__).parent
#: Of the examples that the CPU kernels get: a launch takes milliseconds.
SHARE = 0.25


def _run(*arguments: str, variant: str = "1") -> None:
    emulated_cuda.build(variant)
    factor = float(os.environ.get("ADADFQ_TEST_EXAMPLES") or 1)
    environment = {
        **os.environ,
        "ADADFQ_TEST_EMULATED_CUDA": variant,
        "ADADFQ_TEST_EXAMPLES": str(SHARE * factor),
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    process = subprocess.run(command, cwd=TESTS.parent, env=environment, capture_output=True, text=True, timeout=1500)
    # A barrier that not all threads reach ends the process, and says so on the other stream.
    assert process.returncode == 0, process.stdout[-6000:] + process.stderr[-2000:]
    assert " passed" in process.stdout


def test_properties() -> None:
    _run("tests/test_properties.py")


def test_operators() -> None:
    _run("tests/test_ops.py", "-k", "cuda")


def test_learned_steps() -> None:
    _run("tests/test_learned_steps.py", "-k", "cuda")


def test_packing() -> None:
    _run("tests/test_packing.py", "-k", "cuda")


def test_shapes_addresses_orders_and_repetition() -> None:
    _run("tests/test_cuda_kernels.py")


def test_positions_of_64_bits() -> None:
    _run("tests/test_cuda_kernels.py", variant="64")
