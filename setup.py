"""Packages and native modules of adadfq; everything else about the project is in pyproject.toml.

Environment:
    ADADFQ_CUDA        0: leave CUDA out. 1: fail where there is no nvcc. Unset: build it where nvcc is found.
    ADADFQ_CUDA_ARCHS  compute capabilities to build for, such as "80;90". Default: those of DEFAULT_ARCHS nvcc knows.
    MAX_JOBS           how many files to compile at once. Default: the number of CPUs.

Ninja compiles and links: what did not change is left alone, where the build folder and pybind11 are the same as before
(pip install --no-build-isolation).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import OptionError

sys.path.insert(0, str(Path(__file__).parent))  # which isolated builds leave out
import ninja_build

CUDA = "adadfq._C_cuda"
BUILD_INFO = f"_build_info.{sys.implementation.cache_tag}.json"  # every Python has modules of its own
FIX_NVCC = "fix it, set CUDA_HOME, or ADADFQ_CUDA=0 leaves CUDA out"
OLDEST_NVCC = (12, 4)
DEFAULT_ARCHS = ("75", "80", "86", "89", "90", "100", "120")
# The PTX of one serves all from it to the next: nvcc's front end, most of its time, runs once for them. It is the same
# for all of them, so the machine code is too.
PTX_ARCHS = ("75", "80", "100")
# Results must not depend on contraction or reassociation; see csrc/common/quantizer.h.
CXX_FLAGS = ["-O3", "-std=c++17", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"]
CXX_FLAGS += ["-g0"]  # Python's own flags may ask for debug information, which takes a third of the time
NVCC_FLAGS = ["-O3", "-std=c++17", "--fmad=false", "-Xcompiler=-fPIC,-fvisibility=hidden,-ffp-contract=off"]
# Said by the compiler wherever it happens; tests/test_cuda_build.py takes no such warning.
NVCC_FLAGS += ["-Xptxas=-warn-spills,-warn-lmem-usage"]
# The static runtime imports on a machine without CUDA, and never meets another runtime's version.
NVCC_LINK_FLAGS = ["-shared", "-cudart=static"]


def find_nvcc(environ: Mapping[str, str], default: Path = Path("/usr/local/cuda")) -> Path | None:
    """nvcc under CUDA_HOME, CUDA_PATH, on PATH or under `default`, in this order; says which variable is wrong."""

    def usable(nvcc: Path) -> bool:
        return os.access(nvcc, os.X_OK) and nvcc.is_file()

    for name in ("CUDA_HOME", "CUDA_PATH"):
        if root := environ.get(name):
            if usable(nvcc := Path(root, "bin", "nvcc")):
                return nvcc
            print(f"adadfq: {name}={root} is ignored: there is no bin/nvcc in it that can be run", flush=True)
    if on_path := shutil.which("nvcc", path=environ.get("PATH", os.defpath)):
        return Path(on_path)
    return nvcc if usable(nvcc := default / "bin" / "nvcc") else None


def choose_archs(requested: str | None, available: Sequence[str]) -> list[str]:
    """Compute capabilities to build for, lowest first: those in `requested` ("80;90"), or the defaults nvcc knows."""
    archs = [arch for arch in re.split(r"[;,\s]+", requested or "") if arch]
    if not archs:
        archs = [arch for arch in DEFAULT_ARCHS if arch in available]
    if unknown := [arch for arch in archs if arch not in available]:
        raise OptionError(
            f"ADADFQ_CUDA_ARCHS: this nvcc has no {', '.join(unknown)}; it has {', '.join(available)}"
            " (compute capabilities without the dot, separated by ';')"
        )
    return sorted(set(archs), key=int)


def ptx_arch(arch: str) -> str:
    """Whose PTX the machine code for `arch` is made from: the newest of PTX_ARCHS that is not newer."""
    return max((ptx for ptx in PTX_ARCHS if int(ptx) <= int(arch)), key=int, default=arch)


def arch_flags(archs: Sequence[str]) -> list[str]:
    """Machine code for every arch, and the newest one's PTX, from which later GPUs compile their own."""
    flags = [f"-gencode=arch=compute_{ptx_arch(arch)},code=sm_{arch}" for arch in archs]
    newest = ptx_arch(archs[-1])
    return [*flags, f"-gencode=arch=compute_{newest},code=compute_{newest}"]


def output_of(command: Sequence[str], way_out: str) -> str:
    """Standard output of `command`; where it fails, `way_out` is a part of the error's message."""
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise OptionError(f"adadfq: {shlex.join(command)} cannot be run: {error.strerror}; {way_out}") from error
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip() or f"exit status {done.returncode}"
        raise OptionError(f"adadfq: {shlex.join(command)} failed: {said}; {way_out}")
    return done.stdout


def nvcc_version(nvcc: Path) -> str:
    """Such as "13.0". Raises where it is older than OLDEST_NVCC."""
    found = re.search(r"release (\d+)\.(\d+)", output_of([str(nvcc), "--version"], FIX_NVCC))
    version = found.groups() if found else ("0", "0")
    if tuple(map(int, version)) < OLDEST_NVCC:
        raise OptionError(
            f"adadfq: {nvcc} is of CUDA {'.'.join(version)}, expected {'.'.join(map(str, OLDEST_NVCC))} or newer:"
            " set CUDA_HOME to one that is, or ADADFQ_CUDA=0 to leave CUDA out"
        )
    return ".".join(version)


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
    """build_ext that compiles with g++ and nvcc, and records what was built in adadfq, as BUILD_INFO."""

    def finalize_options(self) -> None:
        super().finalize_options()
        import pybind11

        self.nvcc, reason = cuda_decision(os.environ)
        self.info: dict[str, object] = {"cuda_left_out": reason}
        if self.nvcc is None:
            self.extensions = [ext for ext in self.extensions if ext.name != CUDA]
        if self.editable_mode:  # pip's is a temporary folder: everything would be compiled every time
            self.build_temp = f"build/temp.{self.plat_name}-{sys.implementation.cache_tag}"
        for ext in self.extensions:
            ext.include_dirs.append(pybind11.get_include())

    def run(self) -> None:
        self.info["sources"] = digest_of_sources()  # now: what is edited meanwhile was not all compiled
        super().run()
        compiler = getattr(self.compiler, "compiler_cxx", None) or ["c++"]
        self.info["cxx"] = output_of([compiler[0], "--version"], "set CXX").splitlines()[0]
        in_place = self.inplace or getattr(self, "editable_mode", False)
        folder = Path("adadfq") if in_place else Path(self.build_lib, "adadfq")
        folder.mkdir(parents=True, exist_ok=True)
        if self.nvcc is None:  # of an earlier build: it would be imported, or come into a wheel
            name = Path(self.get_ext_filename(CUDA)).name
            for stale in {folder / name, Path(self.build_lib, "adadfq", name)}:
                stale.unlink(missing_ok=True)
        (folder / BUILD_INFO).write_text(json.dumps(self.info, indent=2, sort_keys=True) + "\n")

    def build_extensions(self) -> None:
        """Compile and link all modules in build_temp by one run of ninja, and copy them from there."""
        folder = Path(self.build_temp)
        built = {ext.name: folder / self.get_ext_filename(ext.name) for ext in self.extensions}
        modules = [ninja_build.Module(built[ext.name], ext.sources, *self.commands(ext)) for ext in self.extensions]
        ninja_build.build(folder, modules, self.parallel or ninja_build.jobs(os.environ), bool(self.force))
        for name, path in built.items():
            target = Path(self.get_ext_fullpath(name))
            target.parent.mkdir(parents=True, exist_ok=True)
            self.copy_file(str(path), str(target))

    def commands(self, ext: Extension) -> tuple[list[str], list[str]]:
        """What compiles a source of `ext`, and what links its objects."""
        includes = [f"-I{folder}" for folder in (*ext.include_dirs, *self.include_dirs)]
        if ext.name != CUDA:
            compiler = [*self.compiler.compiler_so_cxx, *includes, *ext.extra_compile_args]
            # As setuptools does: CXX links too, in the place of the linker that Python was built with.
            return compiler, [*self.compiler.compiler_cxx, *self.compiler.linker_so_cxx[1:], *ext.extra_link_args]
        # nvcc compiles the binding too: it knows where its headers and libraries are, wherever it is itself.
        nvcc, version = str(self.nvcc), nvcc_version(self.nvcc)
        available = re.findall(r"compute_(\d+)\b", output_of([nvcc, "--list-gpu-arch"], FIX_NVCC))
        archs = choose_archs(os.environ.get("ADADFQ_CUDA_ARCHS"), available)
        print(f"adadfq: CUDA {version} at {nvcc}, for {', '.join(f'sm_{arch}' for arch in archs)}", flush=True)
        self.info |= {"cuda_archs": archs, "nvcc": version}
        return [nvcc, *NVCC_FLAGS, *arch_flags(archs), *includes], [nvcc, *NVCC_LINK_FLAGS]

    def copy_file(self, source: str, target: str, *args: object, **kwargs: object) -> tuple[str, bool]:
        """By way of another name: a module is there whole or not at all."""
        temporary = f"{target}.tmp"
        copied = super().copy_file(source, temporary, *args, **kwargs)
        os.replace(temporary, target)
        return target, copied[1]


def sources(folder: str, *suffixes: str) -> list[str]:
    """Files of csrc/`folder` with these suffixes."""
    return sorted(str(path) for suffix in suffixes for path in Path("csrc", folder).glob(f"*{suffix}"))


def extensions() -> list[Extension]:
    """_C_cpu and _C_cuda: two modules, so that a CUDA failure cannot take the CPU path away."""
    cpu = Extension(
        "adadfq._C_cpu",
        ["csrc/bind_cpu.cpp", *sources("cpu", ".cpp")],
        extra_compile_args=[*CXX_FLAGS, "-fopenmp"],
        extra_link_args=["-fopenmp"],
        language="c++",
    )
    return [cpu, Extension(CUDA, ["csrc/bind_cuda.cpp", *sources("cuda", ".cu")])]


if __name__ == "__main__":
    setup(
        packages=[*find_packages(include=["adadfq", "adadfq.*"]), "adadfq.kernels"],
        # A top-level package called "kernels" would clash with another project's.
        package_dir={"adadfq.kernels": "kernels"},
        ext_modules=extensions(),
        cmdclass={"build_ext": BuildExt},
    )
