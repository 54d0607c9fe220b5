"""Nothing in a step waits for the device: all of it runs on CUDA tensors that hold no values (benchmarks/fake_cuda.py).

What the operators' kernels do is not seen here, only what is called: see tests/test_gpu.py for those.
"""

from __future__ import annotations

import json
import shlex
import shutil
from itertools import product
from os import environ
from typing import Any

import pytest
from fake_cuda_steps import OPTIONS

from adadfq.game import METRICS
from benchmarks import fake_cuda

PHASES = {"warm-up, calibrating": (False, True), "warm-up": (False, False)}
PHASES |= {"training, calibrating": (True, True), "training": (True, False)}


@pytest.fixture(scope="module")
def lines() -> list[dict[str, Any]]:
    """What tests/fake_cuda_steps.py prints."""
    if shutil.which(shlex.split(environ.get("CXX", "c++"))[-1]) is None:
        pytest.skip("no C++ compiler: autograd gets no device for fake tensors")
    return [json.loads(line) for line in fake_cuda.run("tests.fake_cuda_steps").splitlines()]


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize(
    "fuse,precision,generator",
    list(product([True, False], ["float32", "bfloat16"], ["label_embedding", "conditional_bn"])),
)
def test_a_step_reads_nothing_back(
    lines: list[dict[str, Any]], fuse: bool, precision: str, generator: str, phase: str
) -> None:
    (found,) = [line for line in lines if line.get("case") == [fuse, precision, generator, *PHASES[phase]]]
    assert found["metrics"] == ["cuda:0", "torch.float32", len(METRICS)]
    assert found["gradients"] == ["cuda:0"]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("name", OPTIONS)
def test_a_step_with_options_reads_nothing_back(
    lines: list[dict[str, Any]], name: str, fuse: bool, precision: str
) -> None:
    (found,) = [line for line in lines if line.get("option") == [name, fuse, precision]]
    settings = OPTIONS[name]
    described = {"metrics": ["cuda:0", "torch.float32", len(METRICS)], "gradients": ["cuda:0"], "without gradient": 0}
    assert {key: found[key] for key in described} == described
    assert found["replay"] == (described if settings.get("replays") else None)
    assert found["bank"] == (["cuda:0"] if settings.get("replays") and settings["bank_batches"] else [])
    assert (found["learned"] > 0) == settings.get("learn_steps", False)
    assert found["norms"] == (["torch.float32"] if settings.get("spectral_norm") else [])


@pytest.mark.parametrize(
    "name,error",
    {
        "item": "DataDependentOutputException",
        "bool": "DataDependentOutputException",
        "tolist": "DataDependentOutputException",
        "in a backward": "DataDependentOutputException",
        "nonzero": "DynamicOutputShapeException",
        "mask": "DynamicOutputShapeException",
        "cpu": "HostCopyError",
        "numpy": "HostCopyError",
        "to the device": "HostCopyError",
        "copied in": "HostCopyError",
    }.items(),
)
def test_waiting_would_be_seen(lines: list[dict[str, Any]], name: str, error: str) -> None:
    assert [line["error"] for line in lines if line.get("waiting") == name] == [error]
