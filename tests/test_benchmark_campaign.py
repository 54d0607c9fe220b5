"""What the campaigns on a GPU add to the benchmarks: ceilings, equality, endurance, and files that are gone on with."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from adadfq.errors import InvalidInputError
from benchmarks import (
    cases,
    ceilings,
    contest,
    decoded_images,
    endurance,
    environment,
    equality,
    players,
    predict,
    report,
    step,
    store,
)
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
    assert len(row["losses_first"]) == len(row["losses_second"]) == 2


def test_the_cpus_way_plays_on_noise_that_every_device_gets() -> None:
    """Two trainings of one start, moved before and not; the second without fused networks."""
    (pair,) = (pair for pair in equality.PAIRS if pair.cpu_way)
    start = Start(TINY, CPU)
    start.move(CPU)
    other = equality._given(equality._trainer(Start(TINY, CPU), fuse=False), TINY.seed)
    first, second = ([next(played) for _ in range(2)] for played in (pair.play[pair.cpu_way](start), other))
    assert equality.equal_steps(first, second) == 2 and first[0] != first[1]


def test_ways_that_part_early_are_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def another(start: Start) -> equality.Losses:
        return iter([(1.0, -1.0)] * 2)

    pair = equality.PAIRS[-1]
    monkeypatch.setitem(pair.play, pair.second, another)
    done, content = run("equality", "--steps", "2", *SMALL, path=tmp_path / "e.json")
    assert done.exit_code == 1 and "part after 0 steps, 1 are to be equal" in done.output
    assert content["rows"][0]["status"] == "wrong"


def test_ways_are_compared_in_exact_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """By flags that are as before afterwards."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    found = []
    before = cudnn.allow_tf32, matmul.allow_tf32, cudnn.deterministic

    def looked_at(start: Start) -> equality.Losses:
        while True:
            found.append((cudnn.allow_tf32, matmul.allow_tf32, cudnn.deterministic))
            yield 1.0, 1.0

    pair = equality.Pair("one", "two", {"one": looked_at, "two": looked_at}, needed=1, devices=("cpu",))
    monkeypatch.setattr(equality, "PAIRS", (pair,))
    matmul.allow_tf32 = True
    try:
        equality.run_equality(TINY, 1, CPU, describe(CPU))
        assert matmul.allow_tf32
    finally:
        matmul.allow_tf32 = before[1]
    assert found == [(False, False, True)] * 2
    assert (cudnn.allow_tf32, matmul.allow_tf32, cudnn.deterministic) == before


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
    assert done.exit_code == 0 and row["status"] == "ok" and row["allocated_bytes"][0] > 0
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
    # What was not right is measured again.
    spoiled = {**kept[0], "status": "wrong", "error": "other", "p50_ms": None}
    store.write(path, {**whole, "rows": [spoiled, *whole["rows"][1:]]})
    done, again = run(*command, "--resume", path=path)
    assert done.exit_code == 0 and {row["status"] for row in again["rows"]} == {"ok"}
    # Measured at another commit, or asked for otherwise, it is measured anew, and nothing is lost.
    clean["git_commit"] = "c0ffee2"
    done, anew = run(*command, "--resume", path=path)
    assert {row["git_commit"] for row in anew["rows"]} == {"c0ffee2"}
    assert "begun anew: it differs in git_commit" in done.output
    assert json.loads((tmp_path / "ops.json.old").read_text())["rows"] == again["rows"]
    _, other = run(*command[:-1], "0.001", "--resume", path=path)
    assert other["options"]["seconds"] == 0.001 and len(other["rows"]) == len(whole["rows"])


def test_resume_needs_a_file() -> None:
    done = CliRunner().invoke(main, ["ops", "--resume", "--ops", "bn_match"])
    assert done.exit_code == 2 and "name it with --json" in done.output


def test_changed_files_are_measured_anew(tmp_path: Path) -> None:
    environment = {**describe(CPU), "git_commit": "c0ffee", "git_dirty": True}
    content = store.document("ops", environment, {})
    store.write(tmp_path / "o.json", content)
    assert store.go_on_from(tmp_path / "o.json", content) == "files are changed, or nobody knows the commit"
    (tmp_path / "o.json").write_text(json.dumps({"format": "other"}))
    with pytest.raises(InvalidInputError, match="is not a file of results"):
        store.go_on_from(tmp_path / "o.json", content)


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
    # Of a case in two files, the last counts.
    again = {**row, "case": "a", "p50_ms": 0.09}
    assert report.against_text(predicted, [*measured, again]).splitlines()[1].split()[:5] == [
        "a",
        "cuda",
        "10",
        "90",
        "9",
    ]


def test_the_predicted_cases_are_a_suite() -> None:
    names = {case.name for case in predict.chosen()}
    assert {case.name for case in cases.select("predicted")} == names and len(names) > 80


def test_a_dry_run_asks_for_no_backend_of_the_device() -> None:
    command = ["ops", "--device", "cuda", "--suite", "predicted", "--dry-run", "--providers"]
    assert CliRunner().invoke(main, [*command, "adadfq*"]).exit_code == 0
    assert "'fastest' fits none of" in CliRunner().invoke(main, [*command, "adadfq*,fastest"]).output


def test_sources_outside_of_git_are_what_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "_git", lambda *arguments: None)
    monkeypatch.delenv("ADADFQ_COMMIT", raising=False)
    assert [describe(CPU)[key] for key in ("git_commit", "git_dirty")] == [None, None]
    monkeypatch.setenv("ADADFQ_COMMIT", "sources-1")
    assert [describe(CPU)[key] for key in ("git_commit", "git_dirty")] == ["sources-1", False]


def test_results_make_no_checkout_dirty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("adadfq/game.py", "benchmarks/results/ops.json", "docs/results.md", "README.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("before")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "all"]):
        subprocess.run([*git, *command], check=True)
    monkeypatch.setattr(environment, "_ROOT", tmp_path)
    for name in ("benchmarks/results/ops.json", "docs/results.md", "README.md"):
        (tmp_path / name).write_text("after")
    assert describe(CPU)["git_dirty"] is False
    (tmp_path / "adadfq/game.py").write_text("after")
    assert describe(CPU)["git_dirty"] is True


def test_a_player_without_memory_leaves_the_others_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    def large(start: Start, checkout: Path | None) -> players.Player:
        raise torch.OutOfMemoryError("tried to allocate 1 TiB")

    monkeypatch.setattr(step, "KINDS", (players.Kind("large", large), players.KINDS[-1]))
    first, second = step.run_step(TINY, CPU, describe(CPU), 5, 0.0)
    assert first["status"] == "unavailable" and "OutOfMemoryError: tried to allocate 1 TiB" in first["error"]
    assert second["status"] == "ok"


def test_steps_without_graphs_are_for_gpus() -> None:
    setting = Setting(batch_size=2)
    rows = step.run_step(setting, CPU, describe(CPU), 5, 0.0, patterns=["adadfq*"])
    assert [row["provider"] for row in rows] == [players.OURS, players.OURS_BF16, players.REFERENCE]
    assert {batch for _, batch in contest.SUITES["gpu"]} == {16, 64, 256}


@pytest.mark.parametrize("kind", ["ceilings", "equality", "endurance"])
def test_the_readme_shows_what_a_campaign_leaves(kind: str, tmp_path: Path) -> None:
    commands = {
        "ceilings": ["ceilings", "--small", "--seconds", "0", "--rounds", "5"],
        "equality": ["equality", "--steps", "1", *SMALL],
        "endurance": ["endurance", "--epochs", "12", "--steps-per-epoch", "1", *SMALL],
    }
    _, content = run(*commands[kind], path=tmp_path / f"{kind}.json")
    assert f"{kind}.json" in report._file_block(tmp_path / f"{kind}.json", content)


def test_images_are_decoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    class Images:
        name, num_classes, image_size, passes = "images", 3, 2, 0

        def __len__(self) -> int:
            return 5

        def batches(self, batch_size: int) -> Any:
            self.passes += 1
            labels = torch.tensor([0, 1, 2, 0, 1])
            return iter([(torch.ones(4, 3, 2, 2), labels[:4]), (torch.zeros(1, 3, 2, 2), labels[4:])])

    images = Images()
    decoded = decoded_images.DecodedImages(images, 3, CPU)
    for _ in range(2):
        assert [len(labels) for _, labels in decoded.batches(4)] == [4, 1]
    assert images.passes == 1 and len(decoded) == 5
    monkeypatch.setattr(decoded_images, "MOST_BYTES", 239)  # one less than theirs
    decoded = decoded_images.DecodedImages(images, 3, CPU)
    assert [len([*decoded.batches(4)]) for _ in range(2)] == [2, 2] and images.passes == 3
