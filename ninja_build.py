"""Builds extension modules with ninja, for setup.py: in parallel, and only what changed.

Ninja compares commands, and the times of every file that the compiler said it read, system headers included.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from setuptools.errors import CompileError, OptionError, PlatformError


class Module(NamedTuple):
    """An extension module: its file, its sources, and the commands that compile one of them and link their objects."""

    path: Path
    sources: Sequence[str]
    compiler: Sequence[str]
    linker: Sequence[str]


def find() -> list[str]:
    """The command that is ninja: that of Python's package, else the one on PATH."""
    if importlib.util.find_spec("ninja"):
        return [sys.executable, "-m", "ninja"]
    if found := shutil.which("ninja"):
        return [found]
    raise PlatformError("adadfq: no ninja, which builds the native modules: pip install ninja")


def jobs(environ: Mapping[str, str]) -> int:
    """How many files to compile at once: MAX_JOBS, or the number of CPUs this process may use."""
    if not (wanted := environ.get("MAX_JOBS", "")):
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not wanted.isdecimal() or int(wanted) < 1:
        raise OptionError(f"MAX_JOBS must be a positive integer or unset, got {wanted!r}")
    return int(wanted)


def build(folder: Path, modules: Sequence[Module], jobs: int, force: bool = False) -> None:
    """Make `modules`, whose files are in `folder`; what failed leaves them as they were.

    Raises:
        CompileError: a compiler failed; going on without CUDA would be a silent downgrade.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "build.ninja"
    edges = [edge for _, edge in sorted(edge for module in modules for edge in _compilations(module))]
    file.write_text("\n".join([f"builddir = {_path(folder)}\n", *map(_rules, modules), *edges, ""]))
    ninja = [*find(), "-f", str(file)]
    if force:
        subprocess.run([*ninja, "-t", "clean"], check=True)
    command = [*ninja, "-j", str(jobs)]
    print(shlex.join(command), flush=True)
    if subprocess.run(command).returncode != 0:
        raise CompileError(
            "adadfq: the command after FAILED above failed. If it is nvcc, fix the CUDA install, or set ADADFQ_CUDA=0"
            " to leave CUDA out; if it is another compiler, it must know C++17 and OpenMP"
        )


def _path(path: Path) -> str:
    return re.sub(r"([$ :])", r"$\1", str(path))


def _object(module: Module, source: str) -> str:
    return _path(module.path.parent / _name(module) / f"{source}.o")


def _name(module: Module) -> str:
    return module.path.name.partition(".")[0]


def _compilations(module: Module) -> Iterator[tuple[tuple[bool, int, str], str]]:
    """(key, edge) of every source. By the keys, the long ones come first, as ninja begins with what it reads first.

    Those are device code, which is compiled for every architecture, and large files.
    """
    for source in module.sources:
        path = Path(source)
        key = path.suffix != ".cu", -path.stat().st_size, source
        yield key, f"build {_object(module, source)}: compile{_name(module)} {_path(path)}"


def _rules(module: Module) -> str:
    name = _name(module)
    compiler, linker = (shlex.join(command).replace("$", "$$") for command in (module.compiler, module.linker))
    objects = " ".join(_object(module, source) for source in module.sources)
    return "\n".join(
        [
            f"rule compile{name}",
            f"  command = {compiler} -MD -MF $out.d -c $in -o $out",
            "  description = compile $in",
            "  depfile = $out.d",
            "  deps = gcc",
            f"rule link{name}",
            # Moved, so that a linker that is killed leaves nothing that looks like a module.
            f"  command = {linker} $in -o $out.tmp && mv -f $out.tmp $out",
            "  description = link $out",
            f"build {_path(module.path)}: link{name} {objects}\n",
        ]
    )
