"""What setup.py decides, without building anything."""

from __future__ import annotations

import importlib.util
import stat
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("pybind11", reason="pybind11 is needed to read setup.py's commands")
pytest.importorskip("setuptools", minversion="77", reason="setuptools of pyproject.toml is not installed")

ROOT = Path(__file__).parents[1]
AVAILABLE = ["75", "80", "86", "89", "90", "100", "103", "120"]


@pytest.fixture(scope="module")
def setup_py() -> ModuleType:
    spec = importlib.util.spec_from_file_location("adadfq_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fake_nvcc(root: Path, script: str = "exit 0") -> Path:
    nvcc = root / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(f"#!/bin/sh\n{script}\n")
    nvcc.chmod(nvcc.stat().st_mode | stat.S_IXUSR)
    return nvcc


def test_nvcc_is_looked_for_in_order(setup_py: ModuleType, tmp_path: Path) -> None:
    home, path, default = (fake_nvcc(tmp_path / name) for name in ("home", "path", "default"))
    on_path = fake_nvcc(tmp_path / "on_path")
    environ = {
        "CUDA_HOME": str(home.parents[1]),
        "CUDA_PATH": str(path.parents[1]),
        "PATH": str(on_path.parent),
    }
    for expected, name in ((home, "CUDA_HOME"), (path, "CUDA_PATH"), (on_path, "PATH")):
        assert setup_py.find_nvcc(environ, default.parents[1]) == expected
        environ[name] = str(tmp_path / "nothing")
    assert setup_py.find_nvcc(environ, default.parents[1]) == default
    assert setup_py.find_nvcc(environ, tmp_path / "nothing") is None


def test_a_file_that_cannot_be_run_is_no_nvcc(setup_py: ModuleType, tmp_path: Path) -> None:
    fake_nvcc(tmp_path / "cuda").chmod(0o644)
    (tmp_path / "folder" / "bin" / "nvcc").mkdir(parents=True)
    environ = {"CUDA_PATH": str(tmp_path / "folder"), "PATH": ""}
    assert setup_py.find_nvcc(environ, tmp_path / "nothing") is None


def test_default_archs_are_those_nvcc_knows(setup_py: ModuleType) -> None:
    assert setup_py.choose_archs(None, AVAILABLE) == ["75", "80", "86", "89", "90", "100", "120"]
    assert setup_py.choose_archs("", ["70", "75", "80"]) == ["75", "80"]


@pytest.mark.parametrize("text", ["80;90", "90;80", "80,90", " 80 90 ", "80;90;90;"])
def test_requested_archs(setup_py: ModuleType, text: str) -> None:
    assert setup_py.choose_archs(text, AVAILABLE) == ["80", "90"]


@pytest.mark.parametrize("text", ["8.0", "sm_80", "70", "80;all"])
def test_archs_nvcc_does_not_know_are_refused(setup_py: ModuleType, text: str) -> None:
    with pytest.raises(setup_py.OptionError, match=r"ADADFQ_CUDA_ARCHS: this nvcc has no .*; it has 75, 80"):
        setup_py.choose_archs(text, AVAILABLE)


def test_the_newest_arch_is_also_ptx(setup_py: ModuleType) -> None:
    flags = setup_py.arch_flags(["80", "120"])
    assert flags == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_120,code=sm_120",
        "-gencode=arch=compute_120,code=compute_120",
    ]


def test_cuda_is_left_out_with_a_reason(
    setup_py: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert setup_py.cuda_decision({"ADADFQ_CUDA": "0"}) == (None, "left out by ADADFQ_CUDA=0")
    monkeypatch.setattr(setup_py, "find_nvcc", lambda environ: None)
    nvcc, reason = setup_py.cuda_decision({})
    assert nvcc is None and reason.startswith("no nvcc found (looked in CUDA_HOME, ")
    assert capsys.readouterr().out == f"adadfq: {reason}: building for the CPU only\n"


def test_cuda_asked_for_is_never_left_out(setup_py: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup_py, "find_nvcc", lambda environ: None)
    with pytest.raises(setup_py.OptionError, match="ADADFQ_CUDA=1 asks for CUDA"):
        setup_py.cuda_decision({"ADADFQ_CUDA": "1"})
    with pytest.raises(setup_py.OptionError, match="must be 0, 1 or unset, got 'yes'"):
        setup_py.cuda_decision({"ADADFQ_CUDA": "yes"})


def test_a_failing_nvcc_names_the_way_out(setup_py: ModuleType, tmp_path: Path) -> None:
    nvcc = fake_nvcc(tmp_path, "exit 3")
    with pytest.raises(setup_py.CompileError, match="nvcc failed.*ADADFQ_CUDA=0"):
        setup_py.run_nvcc([str(nvcc), "-c", "x.cu"])


def test_every_source_and_header_is_listed(setup_py: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """A header that is not in `depends` would not rebuild what includes it."""
    monkeypatch.chdir(ROOT)
    listed = {source for extension in setup_py.extensions() for source in extension.sources}
    assert listed == {
        str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.suffix in (".cpp", ".cu")
    }
    headers = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.h")}
    assert all(set(extension.depends) == headers for extension in setup_py.extensions())


def test_setup_py_reads_without_a_compiler() -> None:
    command = [sys.executable, "setup.py", "--quiet", "--name"]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert process.stdout.strip().endswith("adadfq"), process.stderr[-2000:]
