"""Packages and native modules of adadfq; everything else about the project is in pyproject.toml.

Environment:
    ADADFQ_CUDA        0: leave CUDA out. 1: fail where there is no nvcc. Unset: build it where nvcc is found.
    ADADFQ_CUDA_ARCHS  compute capabilities to build for, such as "80;90". Default: those of DEFAULT_ARCHS nvcc knows.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, OptionError
from setuptools.modified import newer_group

DEFAULT_ARCHS = ("75", "80", "86", "89", "90", "100", "120")
HEADERS = sorted(str(path) for path in Path("csrc").rglob("*.h"))
# Results must not depend on contraction or reassociation; see csrc/common/quantizer.h.
CXX_FLAGS = ["-O3", "-std=c++17", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"]
NVCC_FLAGS = ["-O3", "-std=c++17", "--fmad=false", "-Xcompiler=-fPIC,-fvisibility=hidden"]


def find_nvcc(environ: Mapping[str, str], default: Path = Path("/usr/local/cuda")) -> Path | None:
    """nvcc under CUDA_HOME, CUDA_PATH, on PATH or under `default`, in this order."""
    roots = [Path(environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if environ.get(name)]
    on_path = shutil.which("nvcc", path=environ.get("PATH", os.defpath))
    candidates = [root / "bin" / "nvcc" for root in roots]
    candidates += [Path(on_path)] if on_path else []
    candidates += [default / "bin" / "nvcc"]
    return next((nvcc for nvcc in candidates if os.access(nvcc, os.X_OK) and nvcc.is_file()), None)


def choose_archs(requested: str | None, available: Sequence[str]) -> list[str]:
    """Compute capabilities to build for, lowest first: those in `requested` ("80;90"), or the defaults nvcc knows."""
    if not requested:
        return [arch for arch in DEFAULT_ARCHS if arch in available]
    archs = [arch for arch in re.split(r"[;,\s]+", requested.strip()) if arch]
    if unknown := [arch for arch in archs if arch not in available]:
        raise OptionError(
            f"ADADFQ_CUDA_ARCHS: this nvcc has no {', '.join(unknown)}; it has {', '.join(available)}"
            " (compute capabilities without the dot, separated by ';')"
        )
    return sorted(set(archs), key=int)


def arch_flags(archs: Sequence[str]) -> list[str]:
    """Machine code for every arch, and PTX for the newest, from which later GPUs compile their own."""
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    return [*flags, f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}"]


def output_of(command: Sequence[str]) -> str:
    """Standard output of `command`."""
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def run_nvcc(command: Sequence[str]) -> None:
    """Run nvcc; raises where it fails, for going on without CUDA would be a silent downgrade."""
    print(" ".join(command), flush=True)
    if subprocess.run(command).returncode != 0:
        raise CompileError("adadfq: nvcc failed: fix the CUDA install, or set ADADFQ_CUDA=0 to leave CUDA out")


def cuda_decision(environ: Mapping[str, str]) -> tuple[Path | None, str | None]:
    """(nvcc, None), or (None, why CUDA is left out). Raises where ADADFQ_CUDA=1 and there is no nvcc."""
    wanted = environ.get("ADADFQ_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise OptionError(f"ADADFQ_CUDA must be 0, 1 or unset, got {wanted!r}")
    if wanted == "0":
        return None, "left out by ADADFQ_CUDA=0"
    if nvcc := find_nvcc(environ):
        return nvcc, None
    reason = "no nvcc found (looked in CUDA_HOME, CUDA_PATH, PATH, /usr/local/cuda)"
    if wanted == "1":
        raise OptionError(f"adadfq: {reason}, but ADADFQ_CUDA=1 asks for CUDA: install it or set CUDA_HOME")
    print(f"adadfq: {reason}: building for the CPU only", flush=True)
    return None, reason


def digest_of_sources(folder: Path = Path("csrc")) -> str:
    """SHA-256 of the names and contents of all files of `folder`; benchmarks/environment.py has the same."""
    found = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        content = path.read_bytes()
        found.update(f"{path.relative_to(folder).as_posix()} {len(content)}\n".encode() + content)
    return found.hexdigest()


class BuildExt(build_ext):
    """build_ext that compiles .cu files with nvcc and records what was built in adadfq/_build_info.json."""

    def finalize_options(self) -> None:
        super().finalize_options()
        import pybind11

        self.nvcc, reason = cuda_decision(os.environ)
        self.info: dict[str, object] = {"cuda_left_out": reason}
        if self.nvcc is None:
            self.extensions = [ext for ext in self.extensions if ext.name != "adadfq._C_cuda"]
        for ext in self.extensions:
            ext.include_dirs.append(pybind11.get_include())

    def run(self) -> None:
        super().run()
        compiler = getattr(self.compiler, "compiler_cxx", None) or ["c++"]
        self.info["sources"] = digest_of_sources()
        self.info["cxx"] = output_of([compiler[0], "--version"]).splitlines()[0]
        in_place = self.inplace or getattr(self, "editable_mode", False)
        folder = Path("adadfq") if in_place else Path(self.build_lib, "adadfq")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "_build_info.json").write_text(json.dumps(self.info, indent=2, sort_keys=True) + "\n")

    def build_extension(self, ext: Extension) -> None:
        if ext.name == "adadfq._C_cuda":
            self.build_with_nvcc(ext)
        else:
            super().build_extension(ext)

    def build_with_nvcc(self, ext: Extension) -> None:
        """Compile and link `ext` with nvcc, which knows where its headers and libraries are, wherever it is itself."""
        nvcc, target = str(self.nvcc), Path(self.get_ext_fullpath(ext.name))
        available = re.findall(r"compute_(\d+)\b", output_of([nvcc, "--list-gpu-arch"]))
        archs = choose_archs(os.environ.get("ADADFQ_CUDA_ARCHS"), available)
        version = re.search(r"release (\S+?),", output_of([nvcc, "--version"]))
        self.info |= {"cuda_archs": archs, "nvcc": version.group(1) if version else "unknown"}
        includes = [f"-I{folder}" for folder in (*ext.include_dirs, *self.include_dirs)]
        objects = []
        for source in ext.sources:
            objects.append(str(Path(self.build_temp, source).with_suffix(".o")))
            Path(objects[-1]).parent.mkdir(parents=True, exist_ok=True)
            if self.force or newer_group([source, *ext.depends], objects[-1]):
                run_nvcc([nvcc, *NVCC_FLAGS, *arch_flags(archs), *includes, "-c", source, "-o", objects[-1]])
        target.parent.mkdir(parents=True, exist_ok=True)
        # The static runtime imports on a machine without CUDA, and never meets another runtime's version.
        run_nvcc([nvcc, "-shared", "-cudart=static", *objects, "-o", str(target)])


def sources(folder: str, *suffixes: str) -> list[str]:
    """Files of csrc/`folder` with these suffixes."""
    return sorted(str(path) for suffix in suffixes for path in Path("csrc", folder).glob(f"*{suffix}"))


def extensions() -> list[Extension]:
    """_C_cpu and _C_cuda: two modules, so that a CUDA failure cannot take the CPU path away."""
    cpu = Extension(
        "adadfq._C_cpu",
        ["csrc/bind_cpu.cpp", *sources("cpu", ".cpp")],
        depends=HEADERS,
        extra_compile_args=[*CXX_FLAGS, "-fopenmp"],
        extra_link_args=["-fopenmp"],
        language="c++",
    )
    cuda = Extension(
        "adadfq._C_cuda",
        ["csrc/bind_cuda.cpp", *sources("cuda", ".cu")],
        depends=HEADERS,
    )
    return [cpu, cuda]


if __name__ == "__main__":
    setup(
        packages=[*find_packages(include=["adadfq", "adadfq.*"]), "adadfq.kernels"],
        # A top-level package called "kernels" would clash with another project's.
        package_dir={"adadfq.kernels": "kernels"},
        ext_modules=extensions(),
        cmdclass={"build_ext": BuildExt},
    )
