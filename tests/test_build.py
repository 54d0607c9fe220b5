"""What setup.py decides and has ninja do, with scripts in the place of nvcc."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import building
import pytest
from building import ROOT, copy_sources, load_setup, unavailable

AVAILABLE = ["75", "80", "86", "89", "90", "100", "103", "120"]


@pytest.fixture(scope="module")
def setup_py() -> ModuleType:
    return load_setup()


def executable(path: Path, script: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def fake_nvcc(root: Path, script: str = "exit 0") -> Path:
    return executable(root / "bin" / "nvcc", script)


def test_nvcc_is_looked_for_in_order(setup_py: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
        capsys.readouterr()
    assert setup_py.find_nvcc(environ, default.parents[1]) == default
    for name, line in zip(("CUDA_HOME", "CUDA_PATH"), capsys.readouterr().out.splitlines(), strict=True):
        assert line.startswith(f"adadfq: {name}={tmp_path / 'nothing'} is ignored: ")
    assert setup_py.find_nvcc(environ, tmp_path / "nothing") is None


def test_a_file_that_cannot_be_run_is_no_nvcc(setup_py: ModuleType, tmp_path: Path) -> None:
    fake_nvcc(tmp_path / "cuda").chmod(0o644)
    (tmp_path / "folder" / "bin" / "nvcc").mkdir(parents=True)
    environ = {"CUDA_PATH": str(tmp_path / "folder"), "PATH": ""}
    assert setup_py.find_nvcc(environ, tmp_path / "nothing") is None


def test_default_archs_are_those_nvcc_knows(setup_py: ModuleType) -> None:
    assert setup_py.choose_archs(None, AVAILABLE) == ["75", "80", "86", "89", "90", "100", "120"]
    assert setup_py.choose_archs("", ["70", "75", "80"]) == ["75", "80"]
    assert setup_py.choose_archs(" ; ", ["70", "75", "80"]) == ["75", "80"]


@pytest.mark.parametrize("text", ["80;90", "90;80", "80,90", " 80 90 ", "80;90;90;"])
def test_requested_archs(setup_py: ModuleType, text: str) -> None:
    assert setup_py.choose_archs(text, AVAILABLE) == ["80", "90"]


@pytest.mark.parametrize("text", ["8.0", "sm_80", "70", "80;all"])
def test_archs_nvcc_does_not_know_are_refused(setup_py: ModuleType, text: str) -> None:
    with pytest.raises(setup_py.OptionError, match=r"ADADFQ_CUDA_ARCHS: this nvcc has no .*; it has 75, 80"):
        setup_py.choose_archs(text, AVAILABLE)


def test_the_newest_arch_is_also_ptx(setup_py: ModuleType) -> None:
    flags = setup_py.arch_flags(["75", "80", "120"])
    assert flags == [
        "-gencode=arch=compute_75,code=sm_75",
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_100,code=sm_120",
        "-gencode=arch=compute_100,code=compute_100",
    ]


def test_archs_share_ptx(setup_py: ModuleType) -> None:
    archs = {"70": "70", "75": "75", "80": "80", "86": "80", "89": "80", "90": "80", "100": "100", "121": "100"}
    assert {arch: setup_py.ptx_arch(arch) for arch in archs} == archs


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


def test_an_old_nvcc_is_refused(setup_py: ModuleType, tmp_path: Path) -> None:
    for number, text in enumerate(("release 12.3, V12.3.107", "release 11.8, V11.8.89", "no version")):
        nvcc = fake_nvcc(tmp_path / str(number), f"echo 'Cuda compilation tools, {text}'")
        with pytest.raises(setup_py.OptionError, match=r"expected 12\.4 or newer: set CUDA_HOME .* or ADADFQ_CUDA=0"):
            setup_py.nvcc_version(nvcc)
    broken = fake_nvcc(tmp_path / "broken", "echo 'nvcc: no cudafe++' >&2; exit 1")
    expected = "bin/nvcc --version failed: nvcc: no cudafe[+]+; fix it, set CUDA_HOME, or ADADFQ_CUDA=0 leaves CUDA out"
    with pytest.raises(setup_py.OptionError, match=expected):
        setup_py.nvcc_version(broken)
    not_a_program = tmp_path / "text"
    not_a_program.write_bytes(b"\x7fELF")
    not_a_program.chmod(0o755)
    with pytest.raises(setup_py.OptionError, match=f"{not_a_program} --version cannot be run: .*; fix it, set CUDA"):
        setup_py.nvcc_version(not_a_program)
    nvcc = fake_nvcc(tmp_path / "new", "echo 'Cuda compilation tools, release 13.10, V13.10.5'")
    assert setup_py.nvcc_version(nvcc) == "13.10"


def test_every_source_is_listed(setup_py: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    listed = {source for extension in setup_py.extensions() for source in extension.sources}
    assert listed == {
        str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.suffix in (".cpp", ".cu")
    }


def test_jobs(setup_py: ModuleType) -> None:
    jobs = setup_py.ninja_build.jobs
    assert jobs({"MAX_JOBS": "7"}) == 7 and jobs({"MAX_JOBS": ""}) == jobs({}) >= 1
    for text in ("0", "-1", "many", "1.5"):
        with pytest.raises(setup_py.OptionError, match="MAX_JOBS must be a positive integer or unset, got"):
            jobs({"MAX_JOBS": text})


def test_ninja_is_the_packages_or_on_path(setup_py: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    ninja_build = setup_py.ninja_build
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert ninja_build.find() == [sys.executable, "-m", "ninja"]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(shutil, "which", lambda name: f"/somewhere/{name}")
    assert ninja_build.find() == ["/somewhere/ninja"]
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ninja_build.PlatformError, match="no ninja, .*: pip install ninja"):
        ninja_build.find()


#: Writes what it is told to; fails where the file `fail` holds a part of its command. What ran is in `log`.
FAKE_NVCC = """
case "$1" in
  --version) echo "Cuda compilation tools, release VERSION, V0"; exit ;;
  --list-gpu-arch) printf 'compute_%s\\n' ARCHS; exit ;;
esac
here=$(dirname "$0")
echo "$*" >> "$here/log"
case "$*" in *"$(cat "$here/fail")"*) echo failing; exit 3 ;; esac
while [ $# -gt 0 ]; do
  case $1 in -o) out=$2 ;; -MF) dependencies=$2 ;; -c) source=$2 ;; esac
  shift
done
echo built > "$out"
if [ -n "$dependencies" ]; then echo "$out: $source csrc/common/dtype.h" > "$dependencies"; fi
"""
NVCC_12_4 = ("12.4", "50 52 53 60 61 62 70 72 75 80 86 87 89 90")
NVCC_13 = ("13.0", "75 80 86 87 88 89 90 100 110 103 120 121")
NEVER = "no command holds this"


@pytest.fixture
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """setup.py of a copy of the sources, which is the current directory."""
    root = tmp_path / "it's a $path"
    root.mkdir()
    setup_py = load_setup(copy_sources(root))
    try:
        setup_py.ninja_build.find()
    except setup_py.ninja_build.PlatformError as error:
        unavailable(str(error))
    monkeypatch.chdir(root)
    return setup_py


@pytest.fixture
def build(copied: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Builds _C_cuda in a copy of the sources, with paths that need quoting; returns the commands that nvcc ran.

    nvcc itself would expand a $ in --build-temp.
    """
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cu da"))
    for name in ("ADADFQ_CUDA", "ADADFQ_CUDA_ARCHS", "MAX_JOBS"):
        monkeypatch.delenv(name, raising=False)

    def run(release: tuple[str, str] = NVCC_13, fail: str = NEVER, options: tuple[str, ...] = ()) -> list[str]:
        shutil.rmtree(tmp_path / "cu da", ignore_errors=True)
        nvcc = fake_nvcc(tmp_path / "cu da", FAKE_NVCC.replace("VERSION", release[0]).replace("ARCHS", release[1]))
        nvcc.with_name("fail").write_text(fail)
        log = nvcc.with_name("log")
        log.touch()
        building.build(copied, copied.CUDA, "--build-temp", "te mp", *options)
        return log.read_text().splitlines()

    return run


def compiled(commands: list[str]) -> set[str]:
    return {command.partition(" -c ")[2].partition(" -o ")[0] for command in commands if " -c " in command}


def module() -> Path:
    (found,) = Path("lib/adadfq").glob("_C_cuda*.so")
    return found


@pytest.mark.parametrize(
    ("release", "archs"), [(NVCC_12_4, "75 80 86 89 90"), (NVCC_13, "75 80 86 89 90 100 120")], ids=["12.4", "13.0"]
)
def test_commands(
    build: Callable[..., list[str]],
    copied: ModuleType,
    capsys: pytest.CaptureFixture[str],
    release: tuple[str, str],
    archs: str,
) -> None:
    commands = build(release)
    sources = {str(path) for path in Path("csrc/cuda").glob("*.cu")} | {"csrc/bind_cuda.cpp"}
    assert compiled(commands) == sources and len(commands) == len(sources) + 1
    targets = copied.arch_flags(archs.split())
    for command in commands[:-1]:
        assert [part for part in command.split() if part.startswith("-gencode")] == targets
        assert "--fmad=false" in command and "-ffp-contract=off" in command
    assert commands[-1].startswith("-shared -cudart=static ")
    info = json.loads(Path("lib/adadfq", copied.BUILD_INFO).read_text())
    assert info["cuda_archs"] == archs.split() and info["nvcc"] == release[0] and info["cuda_left_out"] is None
    assert module().read_text() == "built\n"
    line = rf"adadfq: CUDA {release[0]} at \S+/cu da/bin/nvcc, for sm_75, sm_80, .*sm_{archs.split()[-1]}"
    assert re.search(line, capsys.readouterr().out)


def test_what_takes_long_is_compiled_first(build: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Ninja begins with what its file names first."""
    monkeypatch.setenv("MAX_JOBS", "1")
    order = [source for command in build() for source in re.findall(r" -c (\S+)", command)]
    assert order[-1] == "csrc/bind_cuda.cpp" and len(order) > 2
    sizes = [Path(source).stat().st_size for source in order[:-1]]
    assert sizes == sorted(sizes, reverse=True)


def test_a_module_of_an_earlier_build_goes_with_cuda(
    build: Callable[..., list[str]], copied: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It could be imported from the sources, and be shipped from the folder of the build."""
    Path("adadfq").mkdir()
    build()
    build(options=("--inplace",))
    Path("adadfq/_C_cuda.other_python.so").touch()
    built = module()
    in_sources = Path("adadfq", built.name)
    assert in_sources.read_text() == "built\n"
    monkeypatch.setenv("ADADFQ_CUDA", "0")
    monkeypatch.setenv("CXX", str(executable(tmp_path / "cxx", FAKE_NVCC)))
    tmp_path.joinpath("fail").write_text(NEVER)
    building.build(copied, "adadfq._C_cpu", "--inplace")
    assert not built.exists() and not in_sources.exists() and Path("adadfq/_C_cuda.other_python.so").exists()
    assert len(list(Path("adadfq").glob("_C_cpu*.so"))) == 1
    build_info = json.loads(Path("adadfq", copied.BUILD_INFO).read_text())
    assert build_info["cuda_left_out"] == "left out by ADADFQ_CUDA=0"


def test_only_what_changed_is_built_again(build: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    everything = compiled(build())
    assert build() == []
    source = Path("csrc/cuda/fake_quantize.cu")
    source.write_text(source.read_text() + "\n")
    commands = build()
    assert compiled(commands) == {str(source)} and len(commands) == 2
    assert compiled(build(options=("--force",))) == everything
    header = Path("csrc/common/dtype.h")  # the one that this nvcc says it read
    header.write_text(header.read_text() + "\n")
    assert compiled(build()) == everything and build() == []
    monkeypatch.setenv("ADADFQ_CUDA_ARCHS", "80;90")
    assert compiled(build()) == everything and build() == []


@pytest.mark.parametrize("step", ["-c csrc/cuda/fake_quantize.cu", "-shared"])
def test_a_failing_nvcc_names_the_way_out(
    build: Callable[..., list[str]], capfd: pytest.CaptureFixture[str], step: str
) -> None:
    with pytest.raises(SystemExit, match=r"command after FAILED .* failed\. If it is nvcc, .*ADADFQ_CUDA=0"):
        build(fail=step)
    assert "FAILED: " in (output := capfd.readouterr().out) and "failing" in output
    assert not list(Path().rglob("*.so")) and not list(Path().rglob("_build_info*"))
    build()
    assert module().read_text() == "built\n"
    # A module of before stays as it is.
    Path("csrc/bind_cuda.cpp").touch()
    with pytest.raises(SystemExit, match="ADADFQ_CUDA=0"):
        build(fail="-shared")
    assert module().read_text() == "built\n"


def test_cxx_compiles_and_links(copied: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cxx = executable(tmp_path / "cxx", FAKE_NVCC)
    cxx.with_name("fail").write_text(NEVER)
    monkeypatch.setenv("CXX", str(cxx))
    monkeypatch.setenv("ADADFQ_CUDA", "0")
    building.build(copied, "adadfq._C_cpu")
    *compilations, linking = cxx.with_name("log").read_text().splitlines()
    assert compiled(compilations) == {"csrc/bind_cpu.cpp", *(str(path) for path in Path("csrc/cpu").glob("*.cpp"))}
    for command in compilations:
        assert set(copied.CXX_FLAGS) | {"-fopenmp", "-fPIC"} <= set(command.split())
    assert {"-shared", "-fopenmp"} <= set(linking.split())
    assert json.loads(Path("lib/adadfq", copied.BUILD_INFO).read_text())["cuda_left_out"] == "left out by ADADFQ_CUDA=0"


@pytest.mark.parametrize("required", ["", "1"])
def test_what_is_missing_skips_or_fails(monkeypatch: pytest.MonkeyPatch, required: str) -> None:
    monkeypatch.setenv("ADADFQ_TEST_REQUIRE_CUDA", required)
    outcome = pytest.fail.Exception if required else pytest.skip.Exception
    with pytest.raises(outcome, match="no nvcc"):
        unavailable("no nvcc")


def test_ninja_build_is_in_source_distributions() -> None:
    assert "include ninja_build.py" in (ROOT / "MANIFEST.in").read_text().splitlines()


def test_setup_py_reads_without_a_compiler() -> None:
    command = [sys.executable, "setup.py", "--quiet", "--name"]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert process.stdout.strip().endswith("adadfq"), process.stderr[-2000:]
