"""Shared fixtures."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from building import require_recording
from native import NATIVE

import adadfq
from adadfq.ops import dispatch
from benchmarks.contest import exact_float32

# The tests' tensors are too small to share between threads; those about threads set their own number.
THREADS = 1
torch.set_num_threads(THREADS)

#: Files of few tests that take minutes: two processes share the rest better when these come first.
SLOW_FILES = ("test_triton.py", "test_cuda_emulated.py", "test_triton_compiled.py", "test_sanitize.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in SLOW_FILES)


def pytest_make_parametrize_id(val: object) -> str | None:
    """Tests are chosen by dtype with -k, which knows names."""
    return str(val).removeprefix("torch.") if isinstance(val, torch.dtype) else None


def pytest_runtest_setup() -> None:
    # A command that a test ran in this process may have set another number: on busy cores that costs the rest minutes.
    torch.set_num_threads(THREADS)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """torch.empty returns NaN (or the largest integer), so that an element never written is seen."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def exact_convolutions() -> Iterator[None]:
    """Convolutions on a GPU in float32 and the same each time."""
    with exact_float32():
        yield


@pytest.fixture(params=["reference", NATIVE.NAME])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The reference and a native backend for CPU tensors, forced in turn: see native.py.

    The native one must be there: it is never skipped.
    """
    name = request.param
    assert dispatch.BACKENDS[name].why_unavailable() is None
    with adadfq.use_backend(name):
        yield name


@pytest.fixture(scope="session")
def can_record() -> None:
    """Launches of the CUDA backend can be recorded (benchmarks/predict_cuda.py)."""
    require_recording()


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Directory of real checkpoints and images, named by ADADFQ_TEST_DATA; tests that need it skip without it."""
    if not (path := os.environ.get("ADADFQ_TEST_DATA")):
        pytest.skip("ADADFQ_TEST_DATA does not name a directory of real data")
    return Path(path)


@pytest.fixture(scope="session")
def torchvision_models() -> ModuleType:
    """``torchvision.models``; beside a PyTorch it was not built for, importing it may raise anything."""
    try:
        return importlib.import_module("torchvision.models")
    except Exception as error:
        pytest.skip(f"torchvision does not import: {error}")
