"""What the campaigns on a GPU add to the benchmarks: ceilings, equality, endurance, and files that are gone on with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from adadfq.errors import InvalidInputError
from benchmarks import ceilings, contest, endurance, equality, report, store
from benchmarks.__main__ import main
from benchmarks.contest import Setting, Start
from benchmarks.environment import describe

CPU = torch.device("cpu")
SMALL = ["--threads", "1", "--batch-size", "4", "--image-size", "8"]
TINY = Setting(batch_size=4, image_size=8)


def run(*arguments: str, path: Path) -> tuple[Result, dict[str, Any]]:
    done = CliRunner().invoke(main, [*arguments, "--json", str(path)], catch_exceptions=False)
    return done, store.read(path)


def test_ceilings(tmp_path: Path) -> None:
    done, content = run("ceilings", "--small", "--seconds", "0", "--rounds", "5", path=tmp_path / "c.json")
    assert done.exit_code == 0
    nothing, *copies, product = content["rows"]
    assert [row["bytes_moved"] for row in copies] == [2 * nbytes for nbytes in ceilings.COPIED[:2]]
    for row in copies:
        assert row["gb_per_s"] == pytest.approx(row["bytes_moved"] / row["p50_ms"] / 1e6)
    assert product["tflop_per_s"] == pytest.approx(2 * 256**3 / product["p50_ms"] / 1e9)
    assert nothing["gb_per_s"] is None and nothing["what"] in done.output


def test_two_ways_are_equal_for_as_many_steps_as_they_must(tmp_path: Path) -> None:
    done, content = run("equality", "--steps", "2", *SMALL, path=tmp_path / "e.json")
    assert done.exit_code == 0, done.output
    (row,) = content["rows"]  # the others are for a GPU
    assert row["pair"] == "fused against layer by layer" and row["equal_steps"] == 2
    assert row["losses_first"] != row["losses_second"]  # they were computed apart


def test_the_cpus_way_plays_on_given_noise() -> None:
    """As it does beside a GPU; twice the same."""
    (pair,) = (pair for pair in equality.PAIRS if pair.on_cpu)
    losses = []
    for way in (pair.first, pair.second):
        start = Start(TINY, CPU)
        start.move(CPU)
        played = pair.play[way](start)
        losses.append([next(played) for _ in range(2)])
    assert losses[0] == losses[1] and losses[0][0] != losses[0][1]


def test_ways_that_part_early_are_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def another(start: Start) -> equality.Losses:
        return iter([(1.0, -1.0)] * 2)

    pair = equality.PAIRS[-1]
    monkeypatch.setitem(pair.play, pair.second, another)
    done, content = run("equality", "--steps", "2", *SMALL, path=tmp_path / "e.json")
    assert done.exit_code == 1 and "part after 0 steps, 2 are to be equal" in done.output
    assert content["rows"][0]["status"] == "wrong"


def test_equal_steps() -> None:
    ours = [(1.0, -2.0), (3.0, -4.0), (5.0, -6.0)]
    assert equality.equal_steps(ours, ours) == 3
    assert equality.equal_steps(ours, [(1.0005, -2.0), (3.0, -4.01), (5.0, -6.0)]) == 1
    assert equality.equal_steps(ours, [(float("nan"), -2.0), *ours[1:]]) == 0


def test_endurance(tmp_path: Path) -> None:
    epochs = ["--epochs", "12", "--steps-per-epoch", "2"]
    done, content = run("endurance", *epochs, *SMALL, path=tmp_path / "e.json")
    (row,) = content["rows"]
    assert row["steps"] == 24 and len(row["epoch_seconds"]) == len(row["allocated_bytes"]) == 12
    assert (done.exit_code == 0) == (row["status"] == "ok")  # on a shared machine an epoch may take any time
    assert row["step_ms"] > 0 and row["case"] in done.output


def test_what_grows_is_found() -> None:
    flat = [10.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.05]
    assert endurance.grown("time", flat, 0.1) is None
    assert endurance.grown("time", [1 + i / 20 for i in range(20)], 0.1) is not None
    assert endurance.grown("memory", [100, 100, 100, 100, 100, 102, 102, 102, 102, 102], 0.01) == (
        "memory grew by 2.0 %, from 100 to 102"
    )
    assert "9 epochs say nothing" in str(endurance.grown("time", flat[:9], 0.1))


def test_ops_go_on_with_their_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "ops.json"
    command = ["ops", "--filter", "*/tiny/*", "--ops", "fake_quantize,bn_match", "--rounds", "5", "--seconds", "0"]
    clean = {**describe(CPU), "git_commit": "c0ffee", "git_dirty": False}
    monkeypatch.setattr("benchmarks.environment.describe", lambda device: clean)
    _, whole = run(*command, path=path)
    cases = list(dict.fromkeys(row["case"] for row in whole["rows"]))
    assert len(cases) == 2
    kept = [row for row in whole["rows"] if row["case"] == cases[0]]
    store.write(path, {**whole, "rows": kept})
    _, again = run(*command, "--resume", path=path)
    assert again["rows"][: len(kept)] == kept and {row["case"] for row in again["rows"]} == set(cases)
    # Measured at another commit, or asked for otherwise, it is measured anew.
    clean["git_commit"] = "c0ffee2"
    _, anew = run(*command, "--resume", path=path)
    assert {row["git_commit"] for row in anew["rows"]} == {"c0ffee2"}
    _, other = run(*command[:-1], "0.001", "--resume", path=path)
    assert other["options"]["seconds"] == 0.001 and len(other["rows"]) == len(whole["rows"])


def test_resume_needs_a_file() -> None:
    done = CliRunner().invoke(main, ["ops", "--resume", "--ops", "bn_match"])
    assert done.exit_code == 2 and "name it with --json" in done.output


def test_changed_files_are_measured_anew(tmp_path: Path) -> None:
    environment = {**describe(CPU), "git_commit": "c0ffee", "git_dirty": True}
    content = store.document("ops", environment, {})
    store.write(tmp_path / "o.json", content)
    assert store.rows_to_go_on_from(tmp_path / "o.json", content) == []
    (tmp_path / "o.json").write_text(json.dumps({"format": "other"}))
    with pytest.raises(InvalidInputError, match="is not a file of results"):
        store.rows_to_go_on_from(tmp_path / "o.json", content)


def test_predictions_stand_beside_times() -> None:
    predicted = [
        {"case": case, "backend": "cuda", "predicted_us": 10.0, "fraction_of_copy": 0.5, "bound_by": "memory"}
        for case in ("a", "b", "c")
    ]
    row = {"backend": "cuda", "provider": "adadfq cuda", "status": "ok", "fraction_of_copy": 0.25}
    measured = [
        {**row, "case": "a", "p50_ms": 0.02},
        {**row, "case": "b", "p50_ms": 0.04},
        {**row, "case": "b", "p50_ms": 0.5, "provider": "adadfq cuda (graph replay)"},
        {**row, "case": "c", "p50_ms": None, "status": "wrong"},
    ]
    _, first, second, note = report.against_text(predicted, measured).splitlines()
    assert first.split()[:5] == ["b", "cuda", "10", "40", "4"] and second.split()[:5] == ["a", "cuda", "10", "20", "2"]
    assert note == "1 predictions have no time"


def test_steps_without_graphs_are_for_gpus() -> None:
    from benchmarks import players, step

    names = [kind.name for kind in step.chosen(["*"]) if "cpu" in kind.devices]
    assert players.EAGER not in names and players.OURS in names
    assert {batch for _, batch in contest.SUITES["gpu"]} == {16, 64, 256}
