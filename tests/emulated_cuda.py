"""Builds csrc/cuda for the CPU, against tests/cuda_emulator, and has the CUDA backend serve CPU tensors with it.

ADADFQ_TEST_EMULATED_CUDA=1 python -m pytest tests/test_ops.py -k cuda
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from types import ModuleType

from adadfq.ops import cuda

ROOT = Path(__file__).parents[1]
EMULATOR = ROOT / "tests" / "cuda_emulator"
#: Which build of the kernels this process's tests run; none where it is not set.
VARIANTS = {
    "1": [],
    "64": ["-DADADFQ_LAST_32_BITS=0"],
    "sanitized": ["-g", "-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all"],
}
WANTED = os.environ.get("ADADFQ_TEST_EMULATED_CUDA")

_FLAGS = ["-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-U_FORTIFY_SOURCE", "-Wall"]
# Of nvcc's: functions of a header that a file leaves unused, and #pragma unroll.
_FLAGS += ["-Wno-unused-function", "-Wno-unknown-pragmas"]


def sources() -> list[Path]:
    """What is compiled, as it is linked: the binding and the launchers as they are, and the emulator."""
    kernels = sorted(ROOT.joinpath("csrc", "cuda").glob("*.cu"))
    kernels = [EMULATOR / "shared_memory_begin.cpp", *kernels, EMULATOR / "shared_memory_end.cpp"]
    return [ROOT / "csrc" / "bind_cuda.cpp", *kernels, EMULATOR / "emulator.cpp"]


def _digest(command: list[str]) -> str:
    found = hashlib.sha256(repr(command).encode())
    for folder in (ROOT / "csrc", EMULATOR):
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            found.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return found.hexdigest()[:16]


def _folder() -> Path:
    """Where modules are kept: in the checkout, or where that cannot be written for this user and process."""
    kept = ROOT / "build" / "emulated_cuda"
    try:
        kept.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=kept):
            return kept
    except OSError:
        return Path(tempfile.mkdtemp(prefix="adadfq-emulated-cuda-"))


@cache
def build(variant: str = "1") -> Path:
    """The extension module, compiled unless there is one from the same sources by the same compiler."""
    import pybind11

    compiler = shlex.split(os.environ.get("CXX", "c++"))
    includes = [f"-I{EMULATOR}", f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
    compile_ = [*compiler, "-x", "c++", *_FLAGS, *VARIANTS[variant], *includes, "-c"]
    version = subprocess.run([*compiler, "--version"], check=True, capture_output=True, text=True).stdout
    folder = _folder()
    module = folder / f"{variant}-{_digest([*compile_, version, sys.version])}" / "_C_cuda.so"
    if module.exists():
        return module
    # Those of sources that were changed since.
    for old in folder.glob(f"{variant}-*"):
        shutil.rmtree(old, ignore_errors=True)
    module.parent.mkdir(parents=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:

        def object_of(source: Path) -> Path:
            made = Path(temporary, source.name).with_suffix(".o")
            subprocess.run([*compile_, str(source), "-o", str(made)], check=True)
            return made

        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            objects = list(pool.map(object_of, sources()))
        linked = Path(temporary, module.name)
        link = [*compiler, *VARIANTS[variant], "-shared", *map(str, objects), "-pthread", "-o", str(linked)]
        subprocess.run(link, check=True)
        linked.replace(module)
    return module


def _import(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("adadfq._C_cuda", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    # Under a name that is loaded pybind11 gives what was loaded.
    if not Path(module.__file__).samefile(path):
        raise RuntimeError(f"{path} cannot be loaded: this process has adadfq._C_cuda from {module.__file__} already")
    return module


def install() -> None:
    """From here on the CUDA backend of this process takes CPU tensors, where it is asked for by name."""
    if WANTED not in VARIANTS and not Path(str(WANTED)).is_file():
        raise ValueError(
            f"ADADFQ_TEST_EMULATED_CUDA must be one of {', '.join(VARIANTS)} or a module's path, got {WANTED!r}"
        )
    module = _import(build(WANTED) if WANTED in VARIANTS else Path(WANTED))
    cuda.DEVICE_TYPE, cuda.INTERPRETED = "cpu", True
    cuda._load = lambda: (module, None)
