"""The CUDA kernels, compiled for sm_80 and sm_90: what a machine without a GPU, or a driver, can see of them."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
from building import ROOT, copy_sources, load_setup, unavailable

from adadfq.errors import InvalidInputError
from benchmarks.resources import find_cuobjdump, resources
from benchmarks.resources import kernels as all_kernels

ARCHS = ["80", "90"]
#: What CUDA says on a machine without a driver, and without a device.
NO_DEVICE = "CUDA driver version is insufficient|no CUDA-capable device|stub library"


class Build(NamedTuple):
    """A copy of the sources, and what its build made and printed."""

    root: Path
    module: Path
    nvcc: Path
    output: str
    seconds: float


@pytest.fixture(scope="session")
def setup_py() -> ModuleType:
    return load_setup()


@pytest.fixture(scope="session")
def built(setup_py: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Build:
    """_C_cuda, built once by setup.py in a process of its own."""
    if (nvcc := setup_py.find_nvcc(os.environ)) is None:
        unavailable("no nvcc")
    if shutil.which("g++") is None:
        unavailable("no g++")
    root = copy_sources(tmp_path_factory.mktemp("cuda"))
    environ = {**os.environ, "ADADFQ_CUDA": "1", "ADADFQ_CUDA_ARCHS": ";".join(ARCHS)}
    command = [sys.executable, str(ROOT / "tests" / "building.py"), setup_py.CUDA]
    start = time.monotonic()
    done = subprocess.run(command, cwd=root, env=environ, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    seconds = time.monotonic() - start
    assert done.returncode == 0, done.stdout[-6000:]
    (module,) = (root / "lib" / "adadfq").glob("_C_cuda*.so")
    return Build(root, module, nvcc, done.stdout, seconds)


def test_the_build_is_recorded(built: Build, setup_py: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    info = json.loads((built.root / "lib" / "adadfq" / setup_py.BUILD_INFO).read_text())
    assert info["cuda_archs"] == ARCHS and info["cuda_left_out"] is None and re.fullmatch(r"1\d\.\d+", info["nvcc"])
    assert info["sources"] == setup_py.digest_of_sources(built.root / "csrc")
    with capsys.disabled():
        print(f"\n_C_cuda for {', '.join(ARCHS)}: built in {built.seconds:.0f} s on {os.cpu_count()} CPUs")


# --------------------------------------------------------------------------------------------- without a device


LOAD = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("_C_cuda", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
"""


def python(code: str, built: Build) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", LOAD + code, str(built.module)]
    # No device is seen, be there one or not, as addresses are those of nothing or of the CPU.
    environ = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environ)


def test_importing_loads_no_library_of_cuda(built: Build) -> None:
    done = python("print(open('/proc/self/maps').read())", built)
    assert done.returncode == 0, done.stderr
    assert "_C_cuda" in done.stdout and not re.search(r"libcuda\b|libcudart|libnv", done.stdout)


def test_a_call_without_a_device_says_so(built: Build) -> None:
    code = "import re; f = module.fake_quantize; f(*[0] * len(re.findall(r'arg\\d+:', f.__doc__)))"
    done = python(code, built)
    assert done.returncode == 1 and re.search(f"RuntimeError: .*({NO_DEVICE})", done.stderr), done.stderr


#: The module in the backend's hands, which takes CPU tensors as if they were on a device.
SERVE = """
import torch
from adadfq.ops import cuda
print([name for name in cuda.FUNCTIONS if not hasattr(module, name)])
cuda._load, cuda.DEVICE_TYPE = lambda: (module, None), "cpu"
x, scale, zero_point = torch.ones(2, 3), torch.ones(1), torch.zeros(1, dtype=torch.int32)
cuda.KERNELS["fake_quantize"](x, scale, zero_point, 4)
"""


def test_the_backend_names_operator_and_shape(built: Build) -> None:
    done = python(SERVE, built)
    assert done.stdout == "[]\n", done.stdout + done.stderr
    expected = rf"BackendError: fake_quantize failed on cpu for torch\.float32 \[2, 3\]: .*({NO_DEVICE})"
    assert done.returncode == 1 and re.search(f"{expected}.*ADADFQ_BACKEND=reference", done.stderr), done.stderr


# ---------------------------------------------------------------------------------------------------- resources


def test_nothing_spills(built: Build) -> None:
    try:
        cuobjdump = find_cuobjdump()
    except InvalidInputError as error:
        unavailable(str(error))
    rows = resources(built.module, cuobjdump)
    assert {row["arch"] for row in rows} == {f"sm_{arch}" for arch in ARCHS}
    names = {row["kernel"] for row in rows}
    assert all(name in names for name in kernels(built.root)), sorted(kernels(built.root) - names)
    files = {path.name for path in (built.root / "csrc" / "cuda").glob("*.cu")}
    assert {row["source"] for row in rows} <= files  # also those of headers
    assert [row for row in rows if row["stack_bytes"] or row["local_bytes"]] == []
    assert all(0 < row["registers"] <= 255 for row in rows)


def test_packs_are_loaded_and_stored_16_bytes_at_a_time(built: Build) -> None:
    """In the machine's instructions, by the kernels whose template arguments say that they take packs."""
    try:
        cuobjdump = find_cuobjdump()
    except InvalidInputError as error:
        unavailable(str(error))
    command = [str(cuobjdump), "-sass", "-arch", f"sm_{ARCHS[-1]}", str(built.module)]
    listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    bodies = dict(zip(*[iter(re.split(r"Function : (\S+)", listing)[1:])] * 2, strict=True))
    seen = set()
    for kernel in all_kernels(built.module, cuobjdump):
        # Walk or tensors a pass, and elements of a pack.
        numbers = re.findall(r"(?<![\w>])(\d+)(?=[,>]|$)", re.sub(r"\([^)]*\)\d+", "", kernel.variant))
        takes_packs = kernel.name in ("elementwise_kernel", "channel_kernel", "channel_ranges_kernel")
        if kernel.arch != f"sm_{ARCHS[-1]}" or not takes_packs or numbers[:1] not in (["4"], ["8"]):
            continue
        seen.add(kernel.name)
        body = bodies[kernel.mangled]
        assert re.search(r"\bLDG\.E\S*\.128", body), (kernel.name, kernel.variant)
        # Codes are narrower than what they are made of, and ranges store none.
        if kernel.name != "channel_ranges_kernel" and "unsigned char" not in kernel.variant:
            assert re.search(r"\bSTG\.E\S*\.128", body), (kernel.name, kernel.variant)
    assert seen == {"elementwise_kernel", "channel_kernel", "channel_ranges_kernel"}


def kernels(root: Path) -> set[str]:
    """The names of the kernels in the sources."""
    found = set()
    for path in (root / "csrc" / "cuda").iterdir():
        found |= set(re.findall(r"__global__\s+void\s+(?:__launch_bounds__\([^)]*\)\s*)?(\w+)\(", path.read_text()))
    return found


#: An array indexed by what is known at run time only, and more live values than registers.
SPILLING = """
__global__ void __launch_bounds__(1024, 2) kernel(float* x, int n) {
  float values[96];
  for (int i = 0; i < 96; ++i) values[i] = x[i * n];
  for (int i = 0; i < 96; ++i) x[i] = values[(i * n) % 96];
}
"""


def test_the_compiler_warns_of_no_spill(built: Build, setup_py: ModuleType, tmp_path: Path) -> None:
    """The compiler's own report, which needs no cuobjdump; it must be seen where there is a spill."""
    source = tmp_path / "spilling.cu"
    source.write_text(SPILLING)
    command = [str(built.nvcc), *setup_py.NVCC_FLAGS, "-gencode=arch=compute_90,code=sm_90", "-cubin", str(source)]
    done = subprocess.run([*command, "-o", str(tmp_path / "spilling.cubin")], capture_output=True, text=True)
    warning = r"(?i)local memory|spill"
    assert done.returncode == 0 and re.search(warning, done.stdout + done.stderr), done.stderr
    assert "compile csrc/cuda/fake_quantize.cu" in built.output and not re.search(warning, built.output), built.output


# ------------------------------------------------------------------------------------------- what is built again


def would_build(built: Build, file: str = "temp/build.ninja") -> set[str]:
    """The sources that ninja would compile now."""
    command = [*load_setup(built.root).ninja_build.find(), "-n", "-f", file]
    done = subprocess.run(command, cwd=built.root, capture_output=True, text=True, check=True)
    return set(re.findall(r"compile (\S+)", done.stdout))


def includers(root: Path) -> dict[str, set[str]]:
    """Header below csrc -> the sources of _C_cuda that read it, by what the files themselves say."""
    csrc = root / "csrc"

    def read_by(path: Path, seen: set[Path]) -> set[Path]:
        for name in re.findall(r'^#include "(.+)"', path.read_text(), re.MULTILINE):
            found = next(p for p in ((path.parent / name).resolve(), csrc / name) if p.is_file())
            if found not in seen:
                seen.add(found)
                read_by(found, seen)
        return seen

    sources = [csrc / "bind_cuda.cpp", *(csrc / "cuda").glob("*.cu")]
    reads = {str(source.relative_to(root)): read_by(source, set()) for source in sources}
    return {
        str(header.relative_to(root)): {source for source, headers in reads.items() if header in headers}
        for header in csrc.rglob("*.h")
    }


def test_an_edited_header_rebuilds_what_includes_it(built: Build) -> None:
    assert would_build(built) == set()
    expected = includers(built.root)
    everything = set().union(*expected.values())
    assert set() in expected.values() and any(set() < sources < everything for sources in expected.values())
    for header, sources in expected.items():
        path = built.root / header
        before = path.stat()
        path.touch()
        found = would_build(built)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert found == sources, header
    assert would_build(built) == set()


def test_another_arch_or_flag_rebuilds_everything(built: Build) -> None:
    rules = (built.root / "temp" / "build.ninja").read_text()
    everything = {str(path.relative_to(built.root)) for path in (built.root / "csrc" / "cuda").glob("*.cu")}
    for old, new in (("code=sm_80", "code=sm_86"), ("-O3", "-O2")):
        assert old in rules
        (built.root / "changed.ninja").write_text(rules.replace(old, new))
        assert would_build(built, "changed.ninja") == everything | {"csrc/bind_cuda.cpp"}
