"""What a step is predicted to take on a GPU (benchmarks/predict_step.py): counted on fake tensors, nothing measured."""

from __future__ import annotations

import shlex
import shutil
from os import environ
from pathlib import Path
from typing import Any

import pytest

import adadfq
from benchmarks import predict_step, readme, report_step, store
from benchmarks.contest import Setting
from benchmarks.environment import describe, pick_device
from benchmarks.launches import BFLOAT16, LANES, TF32, Call, Launch
from benchmarks.predict import GPUS, MEMORY_SHARE
from benchmarks.predict_step import AUTHORS, KERNEL_US, MATRIX_FLOPS, MATRIX_SHARE, OURS, PRODUCT_US

Row = dict[str, Any]
GPU, MATRIX = GPUS["h200"], MATRIX_FLOPS["h200"]


@pytest.fixture(scope="module")
def rows() -> dict[tuple[str, str], Row]:
    """(way, precision) -> row of ResNet-20."""
    if shutil.which(shlex.split(environ.get("CXX", "c++"))[-1]) is None:
        pytest.skip("no C++ compiler: autograd gets no device for fake tensors")
    found = predict_step.rows("h200", [Setting(batch_size=4)])
    return {(row["way"], row["precision"]): row for row in found}


def _flops(row: Row, *parts: str) -> int:
    return sum(part["flops"] for part in row["parts"] if part["part"] in parts)


def test_six_forward_equivalents_against_nine(rows: dict[tuple[str, str], Row]) -> None:
    """METHOD.md, fault 5, counted; the first convolution's input gradient is left out of L_Q's backward."""
    forward = next(part["flops"] for part in rows[AUTHORS, "float32"]["parts"] if part["part"] == "teacher")
    for precision in ("float32", "bfloat16"):
        assert _flops(rows[OURS, precision], "teacher", "student") == pytest.approx(6 * forward, rel=0.02)
    assert _flops(rows[AUTHORS, "float32"], "teacher", "student") == pytest.approx(9 * forward, rel=0.02)


def test_the_generators_convolutions_take_fewer_products(rows: dict[tuple[str, str], Row]) -> None:
    """METHOD.md, fault 6: those on upsampled maps take 2.25 times as many."""
    ours, theirs = (_flops(rows[way, "float32"], "generator") for way in (OURS, AUTHORS))
    assert 2 < theirs / ours < 2.25


def test_rows_add_up(rows: dict[tuple[str, str], Row]) -> None:
    assert set(rows) == {(OURS, "float32"), (OURS, "bfloat16"), (AUTHORS, "float32")}
    for row in rows.values():
        for key in ("launches", "nbytes", "flops", "device_low_us", "device_high_us"):
            assert sum(part[key] for part in row["parts"]) == pytest.approx(row[key])
        assert {part["part"] for part in row["parts"]} == set(predict_step.PARTS)
        assert row["operators"] <= row["launches"]
        assert 0 < row["device_low_us"] < row["device_high_us"] <= row["predicted_high_us"]
        assert row["predicted_low_us"] < row["predicted_high_us"]
    ours, half, authors = (rows[key] for key in ((OURS, "float32"), (OURS, "bfloat16"), (AUTHORS, "float32")))
    assert ours["launches"] < authors["launches"] / 4 and ours["nbytes"] < authors["nbytes"]
    assert half["nbytes"] < ours["nbytes"] and half["flops"] == ours["flops"]
    assert ours["predicted_high_us"] == ours["device_high_us"] + predict_step.REPLAY_US
    assert authors["predicted_low_us"] == 5 * authors["operators"] > authors["device_low_us"], (
        "the host is what it waits for"
    )


def test_times_of_kernels() -> None:
    def us(*launch: Any) -> tuple[float, float]:
        return predict_step.kernel_us(Launch(*launch), GPU, MATRIX)

    assert us(100) == KERNEL_US and us(100, 100, TF32) == PRODUCT_US
    moved = 1e9 / (MEMORY_SHARE * GPU.bytes_per_s) * 1e6
    assert us(10**9) == us(10**9, 1000, BFLOAT16) == pytest.approx((moved, moved))
    for unit in (TF32, BFLOAT16):
        worked = 1e12 / (MATRIX_SHARE * MATRIX[unit]) * 1e6
        assert us(100, 10**12, unit) == pytest.approx((worked, worked))
    assert us(100, 10**12, LANES)[0] > us(100, 10**12, TF32)[0]


def _row(way: str, precision: str, kernels: int, batch_size: int = 16) -> Row:
    calls = [Call("aten.relu.default", "teacher", False, (Launch(0),))] * kernels
    return predict_step.row(way, Setting(batch_size=batch_size), precision, calls, "h200")


def test_statements() -> None:
    """1000 kernels of 1.5 to 2 us and 10 us for the graph, against 3000 operators of 5 to 8 us."""
    rows = [_row(OURS, "float32", 1000), _row(AUTHORS, "float32", 3000)]
    assert report_step.statements(rows) == [
        "step/resnet20@32/b16/w4a4: predicted as fast as the authors' way 7.46 - 15.9 times in float32; "
        "the paper's 80,000 steps in minutes: 2.01 - 2.68 in float32."
    ]
    assert report_step.statements(rows[:1]) == []
    (other,) = report_step.statements([_row(OURS, "bfloat16", 1000, 128), _row(AUTHORS, "float32", 3000, 128)])
    assert "80,000" not in other and "in bfloat16" in other


def test_stored_and_shown(rows: dict[tuple[str, str], Row], tmp_path: Path) -> None:
    content = store.document("step predictions", describe(pick_device("cpu", 1)), {"gpu": "h200"})
    content["rows"] = [*rows.values(), _row(OURS, "float32", 1000)]
    store.write(tmp_path / "predictions-step.json", content)
    assert store.read(tmp_path / "predictions-step.json") == content
    page = tmp_path / "README.md"
    page.write_text(f"# Title\n{readme.BEGIN}\n{readme.END}\n")
    assert readme.update(page, tmp_path) == [page] and readme.stale(page, tmp_path) == []
    text = page.read_text()
    assert "predicted, not yet run on a GPU" in text and "`step/resnet20@32/b4/w4a4`" in text
    assert "| `step/resnet20@32/b16/w4a4` float32 | 1000, 1.5 - 2 | 0, 0 |" in text
    assert "authors' way" in report_step.predictions_text(content["rows"])


def test_what_does_not_fit_is_said() -> None:
    with pytest.raises(adadfq.InvalidInputError, match="gpu must be one of h200"):
        predict_step.rows("a100", [])
    with pytest.raises(adadfq.InvalidInputError, match="batch_size"):
        predict_step.rows("h200", [Setting(batch_size=0)])
