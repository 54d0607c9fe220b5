"""Builds csrc/cuda for the CPU, against tests/cuda_emulator, and has the CUDA backend serve CPU tensors with it.

ADADFQ_TEST_EMULATED_CUDA=1 python -m pytest tests/test_ops.py -k cuda
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
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
_FLAGS += ["-Werror", "-Wno-unused-function", "-Wno-unknown-pragmas"]


def sources() -> list[Path]:
    """What is compiled: the launchers and their binding as they are, and the emulator."""
    kernels = sorted(ROOT.joinpath("csrc", "cuda").glob("*.cu"))
    return [ROOT / "csrc" / "bind_cuda.cpp", *kernels, EMULATOR / "emulator.cpp"]


def _digest(command: list[str]) -> str:
    found = hashlib.sha256(repr(command).encode())
    for folder in (ROOT / "csrc", EMULATOR):
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            found.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return found.hexdigest()[:16]


def build(variant: str = "1", folder: Path = ROOT / "build" / "emulated_cuda") -> Path:
    """The extension module, compiled unless `folder` has it from the same sources."""
    import pybind11

    compiler = os.environ.get("CXX", "c++")
    includes = [f"-I{EMULATOR}", f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
    compile_ = [compiler, "-x", "c++", *_FLAGS, *VARIANTS[variant], *includes, "-c"]
    module = folder / _digest([*compile_, sys.version]) / "_C_cuda.so"
    if module.exists():
        return module
    module.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:

        def object_of(source: Path) -> Path:
            made = Path(temporary, source.name).with_suffix(".o")
            subprocess.run([*compile_, str(source), "-o", str(made)], check=True)
            return made

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(object_of, sources()))
        linked = Path(temporary, module.name)
        link = [compiler, *VARIANTS[variant], "-shared", *map(str, objects), "-pthread", "-o", str(linked)]
        subprocess.run(link, check=True)
        linked.replace(module)
    return module


def _import(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("adadfq._C_cuda", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def install() -> None:
    """From here on the CUDA backend of this process takes CPU tensors, where it is asked for by name."""
    module = _import(build(WANTED) if WANTED in VARIANTS else Path(WANTED))
    cuda.DEVICE_TYPE, cuda.INTERPRETED = "cpu", True
    cuda._load = lambda: (module, None)
