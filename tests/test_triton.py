"""The Triton kernels without a GPU: Triton's interpreter runs them on CPU tensors, under the tests of the CPU kernels.

Whether kernels are interpreted is settled when they are defined, so this takes processes of its own. By hand:

    TRITON_INTERPRET=1 python -m pytest tests/test_properties.py tests/test_triton_interpreted.py
    TRITON_INTERPRET=1 python -m pytest tests/test_ops.py -k triton
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

TESTS = Path(__file__).parent
#: Of the examples that the CPU kernels get: the interpreter takes milliseconds for each program.
SHARE = 0.05


def _run(*arguments: str) -> None:
    factor = float(os.environ.get("ADADFQ_TEST_EXAMPLES") or 1)
    environment = {**os.environ, "TRITON_INTERPRET": "1", "ADADFQ_TEST_EXAMPLES": str(SHARE * factor)}
    # The interpreter's arithmetic is NumPy's, which warns of overflow.
    command = [sys.executable, "-W", "ignore", "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    process = subprocess.run(command, cwd=TESTS.parent, env=environment, capture_output=True, text=True, timeout=1500)
    assert process.returncode == 0, process.stdout[-6000:]
    assert " passed" in process.stdout


PROPERTIES = [
    "test_fake_quantize",
    "dynamic_fake_quantize",
    "test_observe_fake_quantize",
    "test_affine_act_fake_quantize",
    "learned",
    "bn_match or statistics",
    "test_batch_norm_act",
    "test_losses_on_logits",
]


@pytest.mark.parametrize("name", PROPERTIES)
def test_properties(name: str) -> None:
    _run("tests/test_properties.py", "-k", name)


def test_operators() -> None:
    # 16-bit dtypes are the property tests'.
    _run("tests/test_ops.py", "-k", "triton and not float16")


def test_learned_steps() -> None:
    chosen = "4-float32 or any_step or nan or foreach or without_gradients or (fused_tail and shape0)"
    _run("tests/test_learned_steps.py", "-k", f"triton and not float16 and ({chosen})")


def test_configurations_addresses_and_repetition() -> None:
    _run("tests/test_triton_interpreted.py")
