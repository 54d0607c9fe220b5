"""``python -m benchmarks resources``, with a script in the place of cuobjdump."""

from __future__ import annotations

import json
import os
import shutil
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from adadfq.errors import InvalidInputError
from adadfq.info import BUILD_FILE
from benchmarks import plot, readme, report, resources, store
from benchmarks.__main__ import main
from benchmarks.environment import digest_of_sources

IN_FILE = "49_GLOBAL__N__0e502c91_16_fake_quantize_cu_204191d5"  # what has no name elsewhere
SPILLING = f"_ZN6adadfq4cuda{IN_FILE}20fake_quantize_kernelIfLi4ELb1EEEvPKT_PS3_"
PLAIN = "_ZN6adadfq4cuda10sum_kernelEPfi"
STUB = "_ZN6adadfq4cudaL10sum_kernelEPfi"  # what launches it: local to its file
#: What nm prints: who else has symbols, and the two ways in which nvcc names what it makes of a .cu.
SYMBOLS = f"""
0000000000000000 a bind_cuda.cpp
0000000000000000 a tmpxft_0000524d_00000000-6_bn_match.cudafe1.cpp
0000000000001000 t _ZN6adadfq4cudaL12other_kernelEPfi
0000000000000000 a tmpxft_0000548f_00000000-6_dynamic_fake_quantize.compute_120.cudafe1.cpp
0000000000002000 t {STUB}
0000000000002010 t {STUB}.cold
0000000000000000 a cudart_global.cpp
0000000000003000 t {STUB}
"""
#: What cuobjdump prints: a part without kernels, then two architectures.
LISTING = f"""
Fatbin elf code:
================
arch = sm_100
code version = [1,8]

Resource usage:
 Common:
  GLOBAL:0

Fatbin elf code:
================
arch = sm_100
compressed

Resource usage:
 Common:
  GLOBAL:0
 Function {PLAIN}:
  REG:22 STACK:0 SHARED:1056 LOCAL:0 CONSTANT[0]:424 TEXTURE:0 SURFACE:0 SAMPLER:0

Fatbin elf code:
================
arch = sm_90
code version = [1,8]

Resource usage:
 Common:
  GLOBAL:4 CONSTANT[3]:88
 Function {PLAIN}:
  REG:20 STACK:0 SHARED:1040 LOCAL:0 CONSTANT[0]:424 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function {SPILLING}:
  REG:255 STACK:16 SHARED:0 LOCAL:8 CONSTANT[0]:424 CONSTANT[2]:4 TEXTURE:0 SURFACE:0 SAMPLER:0

Fatbin ptx code:
================
arch = sm_100
"""


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module whose kernels are those of LISTING, by a cuobjdump that is found first."""
    if shutil.which("c++filt") is None:
        pytest.skip("no c++filt")
    (tmp_path / "listing").write_text(LISTING)
    home = tmp_path / "toolkit"
    arguments = '[ "$1" = -res-usage ] || exit 2; [ "$(cat "$2")" = module ] || { echo "no device code"; exit 1; }'
    script(home / "bin" / "cuobjdump", f"{arguments}\ncat '{tmp_path}/listing'")
    monkeypatch.setenv("CUDA_HOME", str(home))
    (tmp_path / "symbols").write_text(SYMBOLS)
    script(tmp_path / "tools" / "nm", f"cat '{tmp_path}/symbols'")
    monkeypatch.setenv("PATH", f"{tmp_path / 'tools'}:{os.environ['PATH']}")
    path = tmp_path / "_C_cuda.so"
    path.write_text("module")
    path.with_name(resources.record_name(path)).write_text(json.dumps({"nvcc": "13.0", "sources": "others"}))
    return path


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["resources", *arguments])


def test_rows(module: Path) -> None:
    rows = resources.resources(module, resources.find_cuobjdump())
    keys = ("source", "kernel", "variant", "arch", "registers", "stack_bytes", "local_bytes", "shared_bytes")
    assert [tuple(row[key] for key in keys) for row in rows] == [
        ("dynamic_fake_quantize.cu", "sum_kernel", "", "sm_90", 20, 0, 0, 1040),
        ("dynamic_fake_quantize.cu", "sum_kernel", "", "sm_100", 22, 0, 0, 1056),
        ("fake_quantize.cu", "fake_quantize_kernel", "float, 4, true", "sm_90", 255, 16, 8, 0),
    ]


@pytest.mark.parametrize("symbols", [SYMBOLS.replace("cudart_global.cpp", "tmpxft_1_2-6_packing.cudafe1.cpp"), ""])
def test_a_kernel_of_no_file_or_several_has_no_source(module: Path, tmp_path: Path, symbols: str) -> None:
    (tmp_path / "symbols").write_text(symbols)
    rows = resources.resources(module, resources.find_cuobjdump())
    assert {row["source"] for row in rows if row["kernel"] == "sum_kernel"} == {""}


def test_only_a_module_of_the_last_build_and_of_this_csrc_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "built").mkdir()
    (tmp_path / "built" / "__init__.py").touch()
    module = tmp_path / "built" / f"_C_cuda{EXTENSION_SUFFIXES[0]}"
    module.touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    record = module.with_name(resources.record_name(module))
    sources = digest_of_sources()
    for build in ({"cuda_left_out": None, "sources": sources}, {}):
        record.write_text(json.dumps(build))
        assert resources.find_module("built._C_cuda") == module
    record.write_text(json.dumps({"cuda_left_out": "left out by ADADFQ_CUDA=0", "sources": sources}))
    with pytest.raises(InvalidInputError, match=r"the last one has no CUDA \(left out by ADADFQ_CUDA=0\): build it"):
        resources.find_module("built._C_cuda")
    record.write_text(json.dumps({"cuda_left_out": None, "sources": "others"}))
    with pytest.raises(InvalidInputError, match="built from another csrc than this one: run 'pip install -e .' again"):
        resources.find_module("built._C_cuda")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("void a::(anonymous namespace)::k<a::Half, 4, true>(a::Half const*, int)", ("k", "Half, 4, true")),
        ("void a::k<(a::DType)1, b<int>(3)>(float*, int (*)(int))", ("k", "(DType)1, b<int>(3)")),
        ("a::k(std::vector<int>)", ("k", "")),
        ("k", ("k", "")),
    ],
)
def test_short_names(name: str, expected: tuple[str, str]) -> None:
    assert resources.short_name(name) == expected


def test_the_command_prints_and_writes(module: Path, tmp_path: Path) -> None:
    path = tmp_path / "results" / "cuda-resources.json"
    path.parent.mkdir()
    result = run("--json", str(path), str(module))
    assert result.exit_code == 0, result.output
    assert "fake_quantize_kernel<float, 4, true>" in result.output and "sm_100" in result.output
    content = store.read(path)
    assert content["kind"] == "resources" and len(content["rows"]) == 3
    assert content["options"] == {"archs": [], "nvcc": "13.0"}
    # What was built, not what this checkout would build.
    assert content["environment"]["native_matches_sources"] is False

    result = run("--archs", "90", "--json", str(path), str(module))
    assert result.exit_code == 0 and "sm_100" not in result.output
    assert {row["arch"] for row in store.read(path)["rows"]} == {"sm_90"}


def test_readme_shows_a_family_in_a_row(module: Path, tmp_path: Path) -> None:
    results = tmp_path / "results"
    results.mkdir()
    path = results / "cuda-resources.json"
    assert run("--json", str(path), str(module)).exit_code == 0
    page = tmp_path / "README.md"
    page.write_text(f"{readme.BEGIN}\n{readme.END}\n")
    with pytest.raises(InvalidInputError, match="not built from the csrc of its commit"):
        readme.update(page, results)
    content = store.read(path)
    content["environment"]["native_matches_sources"] = True
    store.write(path, content)
    assert readme.update(page, results) == [page] and readme.stale(page, results) == []
    text = page.read_text()
    assert "**CUDA kernels for sm_90: compiled, not yet run on a GPU**" in text and "by nvcc 13.0" in text
    assert "| `fake_quantize.cu` | `fake_quantize_kernel` | 1 | 255 | 24 | 0 |" in text
    assert "| `dynamic_fake_quantize.cu` | `sum_kernel` | 1 | 20 | 0 | 1040 |" in text
    note = "Of 3 variants for sm_90, sm_100, 1 with spills or local memory: `fake_quantize_kernel<float, 4, true>`."
    assert note in text
    content["rows"] = [row for row in content["rows"] if row["arch"] == "sm_100"]
    text = report.speed_block([(path, content)])
    assert "CUDA kernels for sm_100" in text and "Of 1 variants for sm_100, none with spills or local memory." in text


def test_they_are_no_times(module: Path, tmp_path: Path) -> None:
    path = tmp_path / "cuda-resources.json"
    assert run("--json", str(path), str(module)).exit_code == 0
    assert plot.names(store.read(path)) == ()
    for command in (["compare", str(path), str(path)], ["judge", str(path)], ["plot", str(path)]):
        result = CliRunner().invoke(main, command)
        assert result.exit_code == 2 and "error: " in result.output, command


def test_what_cannot_be_read_is_said(module: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run("--archs", "90,sm_75", str(module))
    assert result.exit_code == 2 and "no machine code for sm_75; it has sm_90, sm_100" in result.output
    assert "there is no module" in run(str(tmp_path / "nothing.so")).output
    other = tmp_path / "other.so"
    other.write_text("other")
    assert "-res-usage" in (text := run(str(other)).output) and "failed: no device code" in text
    (tmp_path / "listing").write_text("")
    result = run(str(module))
    assert result.exit_code == 2 and "holds no CUDA kernels: build it with nvcc present" in result.output
    with pytest.raises(InvalidInputError, match=r"adadfq\._C_nothing is not built: run 'pip install -e \.'"):
        resources.find_module("adadfq._C_nothing")


def test_a_build_without_record(module: Path, tmp_path: Path) -> None:
    module.with_name(resources.record_name(module)).unlink()
    path = tmp_path / "cuda-resources.json"
    assert run("--json", str(path), str(module)).exit_code == 0
    content = store.read(path)
    assert content["options"]["nvcc"] is None and content["environment"]["native_matches_sources"] is None


def test_every_python_has_a_record() -> None:
    this = f"_build_info.{sys.implementation.cache_tag}.json"
    assert resources.record_name(Path(f"_C_cuda{EXTENSION_SUFFIXES[0]}")) == BUILD_FILE.name == this
    assert resources.record_name(Path("a/_C_cuda.cpython-38-x86_64-linux-gnu.so")) == "_build_info.cpython-38.json"
    assert resources.record_name(Path("_C_cuda.so")) == resources.record_name(Path("copy.o")) == this


def test_cuobjdump_is_looked_for_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, path, default, triton, on_path = (tmp_path / name for name in ("home", "path", "default", "triton", "folder"))
    script(on_path / "cuobjdump", "exit 0")
    for folder in (home, path, default, triton / "backends" / "nvidia"):
        script(folder / "bin" / "cuobjdump", "exit 0")
    script(triton / "__init__.py", "")
    (tmp_path / "empty").mkdir()
    found = type("Spec", (), {"origin": str(triton / "__init__.py")})()
    monkeypatch.setattr(resources.importlib.util, "find_spec", lambda name: found)
    environ = {"CUDA_HOME": str(home), "CUDA_PATH": str(path), "PATH": f"{tmp_path / 'empty'}:{on_path}"}
    for expected, name in ((home / "bin", "CUDA_HOME"), (path / "bin", "CUDA_PATH"), (on_path, "PATH")):
        assert resources.find_cuobjdump(environ, default) == expected / "cuobjdump"
        environ[name] = str(tmp_path / "empty")
    assert resources.find_cuobjdump(environ, default) == default / "bin" / "cuobjdump"
    nowhere = tmp_path / "empty"
    assert resources.find_cuobjdump(environ, nowhere) == triton / "backends" / "nvidia" / "bin" / "cuobjdump"
    monkeypatch.setattr(resources.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InvalidInputError, match="no cuobjdump .* the CUDA toolkit, and with 'pip install triton'"):
        resources.find_cuobjdump(environ, nowhere)
