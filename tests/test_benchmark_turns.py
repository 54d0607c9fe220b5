"""Cases that hang, or take the device with them, and what the next call of the same command does."""

from __future__ import annotations

import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from benchmarks import ops, step, store, turns
from benchmarks.__main__ import main
from benchmarks.contest import Setting
from benchmarks.environment import describe

CASES = {"a": 1, "b": 2, "c": 3}
COMMAND = ("ops", "--filter", "*/tiny/*", "--ops", "fake_quantize,bn_match", "--rounds", "5", "--seconds", "0")


def played(content: dict[str, Any], **options: Any) -> list[int]:
    seen: list[int] = []
    turns.in_turn(CASES, seen.append, content, lambda: None, **options)
    return seen


def test_the_file_names_what_is_still_to_come() -> None:
    content: dict[str, Any] = {}
    seen, written = [], []
    turns.in_turn(
        CASES,
        lambda case: seen.append((case, content["left_out"], dict(content["cut_off"]))),
        content,
        lambda: written.append((content["left_out"], dict(content["cut_off"]))),
    )
    assert seen == [(1, ["a", "b", "c"], {"a": 1}), (2, ["b", "c"], {"b": 1}), (3, ["c"], {"c": 1})]
    assert written == [*((left, cut_off) for _, left, cut_off in seen), ([], {})]


def test_no_case_begins_after_the_limit() -> None:
    content: dict[str, Any] = {}
    assert played(content, limit=0) == [] and content == {"left_out": ["a", "b", "c"], "cut_off": {}, "stuck": {}}


@pytest.mark.parametrize(
    ("death", "calls_expected", "left"),
    [
        (turns.DeviceLostError, ["a", "b", "cda", "b", ""], ["a", "b"]),  # given up after two turns each
        (SystemExit, ["a", "b", "cda", "b", "a", "b", "a", "b"], ["b", "a"]),  # killed: may be anybody's fault
    ],
)
def test_cases_that_end_their_calls_leave_the_others_their_turns(
    death: type[BaseException], calls_expected: list[str], left: list[str]
) -> None:
    """Each call dies within the first of two cases of four."""
    cases = {name: name for name in "abcd"}
    content: dict[str, Any] = {}
    calls: list[str] = []

    def play(case: str) -> None:
        calls[-1] += case
        if case in "ab":
            raise death

    while len(calls) < 8 and (not calls or calls[-1]):
        calls.append("")
        done = set("".join(calls)) - set("ab")
        with suppress(death):
            turns.in_turn({name: case for name, case in cases.items() if name not in done}, play, content, lambda: None)
    assert calls == calls_expected and content["left_out"] == left
    assert turns.given_up(content) == (["a", "b"] if death is turns.DeviceLostError else [])


def test_a_case_that_ends_at_last_has_no_strikes_left() -> None:
    content = {"stuck": {"a": 1}, "cut_off": {"a": 1}}
    assert played(content) == [2, 3, 1] and content == {"left_out": [], "cut_off": {}, "stuck": {}}


def test_a_case_that_never_ends_ends_the_process(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from benchmarks import turns\n"
        "content = {}\n"
        "write = lambda: Path(sys.argv[1]).write_text(str([content['left_out'], content['stuck']]))\n"
        "play = lambda case: (print(case), time.sleep(case))\n"
        "turns.in_turn({'a': 0, 'b': 600}, play, content, write, case_limit=3)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "left_out")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1], timeout=300)
    assert done.returncode == turns.EXIT_UNFINISHED and done.stdout == "0\n600\n"
    assert done.stderr.startswith("error: b took longer than 3 s: the same command with --resume")
    assert (tmp_path / "left_out").read_text() == "[['b'], {'b': 1}]"


def test_a_case_in_time_leaves_no_watch_behind() -> None:
    assert played({}, case_limit=1000) == [1, 2, 3]
    with pytest.raises(ZeroDivisionError):
        turns.in_turn(CASES, lambda case: 1 / (case - 2), {}, lambda: None, case_limit=1000)  # type: ignore[arg-type]
    for thread in threading.enumerate():
        if isinstance(thread, threading.Timer):
            thread.join(10)
            assert not thread.is_alive()


def test_a_lost_device_is_told_from_a_call_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    turns.check_device(torch.device("cpu"), "x")
    answers = [None]
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: answers.pop())
    turns.check_device(torch.device("cuda"), "x")
    assert answers == []

    def lost(device: Any = None) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore of it")

    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    with pytest.raises(turns.DeviceLostError, match="^x: CUDA error: an illegal .* encountered; the device is lost"):
        turns.check_device(torch.device("cuda"), "x")


def test_ops_come_last_to_a_case_that_lost_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "ops.json"
    clean = {**describe(torch.device("cpu")), "git_commit": "c0ffee", "git_dirty": False}
    monkeypatch.setattr("benchmarks.environment.describe", lambda device: clean)
    looked_at: list[str] = []
    losing = True

    def check(device: torch.device, what: str) -> None:
        looked_at.append(what)
        if losing:
            raise turns.DeviceLostError(f"{what}: lost")

    monkeypatch.setattr(ops, "check_device", check)
    done = CliRunner().invoke(main, [*COMMAND, "--json", str(path)])
    assert done.exit_code == turns.EXIT_UNFINISHED and "lost" in done.output and len(looked_at) == 1
    cut_off = store.read(path)
    assert len(cut_off["left_out"]) == 2 and cut_off["rows"] == []
    losing = False
    done = CliRunner().invoke(main, [*COMMAND, "--resume", "--json", str(path)])
    content = store.read(path)
    assert done.exit_code == 0 and content["left_out"] == [] and content["cut_off"] == content["stuck"] == {}
    assert list(dict.fromkeys(row["case"] for row in content["rows"])) == cut_off["left_out"][::-1]

    # Twice is enough, and no success.
    store.write(path, {**cut_off, "stuck": {cut_off["left_out"][0]: 2}})
    done = CliRunner().invoke(main, [*COMMAND, "--resume", "--json", str(path)])
    content = store.read(path)
    assert done.exit_code == 1 and content["left_out"] == cut_off["left_out"][:1]
    assert f"given up: {cut_off['left_out'][0]}, which hung or lost the device 2 times" in done.output
    assert "the time was up" not in done.output


@pytest.mark.parametrize("raises", [False, True])
def test_a_step_that_loses_the_device_says_so(monkeypatch: pytest.MonkeyPatch, raises: bool) -> None:
    def check(device: torch.device, what: str) -> None:
        raise turns.DeviceLostError(what)

    def enter(*_: Any) -> None:
        if raises:
            raise RuntimeError("CUDA error")

    monkeypatch.setattr(step, "check_device", check)
    monkeypatch.setattr(step, "_enter", enter)
    setting = Setting(batch_size=4, image_size=8)
    with pytest.raises(turns.DeviceLostError, match="^plain on step/resnet20@8/b4/w4a4$"):
        step.run_step(setting, torch.device("cpu"), describe(torch.device("cpu")), 5, 0, None, ("plain",))
