"""What each CUDA kernel takes of a GPU, read from the built module by cuobjdump; nothing is run.

Stack and local memory are in the GPU's memory: a kernel that has them spills registers, calls what is not inlined, or
indexes an array of its own by what only the run knows.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

from adadfq.errors import InvalidInputError
from benchmarks.environment import native_matches

MODULE = "adadfq._C_cuda"
_DEFAULT_CUDA = Path("/usr/local/cuda")
_USAGE = re.compile(r"^\s*Function (\S+):\s*$\n\s*(REG:.*)$|^arch = (\S+)$", re.MULTILINE)
_ANONYMOUS = re.compile(r"\(anonymous namespace\)::")
# nvcc calls the unnamed namespace of a file by it; the number is the length of the name.
_SOURCE = re.compile(r"_GLOBAL__N__[0-9a-f]+_(\d+)_(\w+)")
# What nvcc has the host's compiler compile in the place of a .cu.
_HOST_FILE = re.compile(r"^tmpxft_\w+-\d+_(.+?)(?:\.compute_\w+)?\.cudafe1\.cpp$")


class Kernel(NamedTuple):
    """A kernel for one architecture."""

    source: str
    name: str
    variant: str
    arch: str
    mangled: str
    usage: dict[str, int]
    """REG, STACK, SHARED, LOCAL and so on: registers a thread, bytes of the rest."""


def kernels(module: Path, cuobjdump: Path) -> list[Kernel]:
    """Every kernel of a module, for every architecture.

    Raises:
        InvalidInputError: the module is missing, holds no kernels or cannot be read, or no c++filt is there.
    """
    if not module.is_file():
        raise InvalidInputError(f"there is no module {module}: build it first, or name another one")
    found: list[tuple[str, str, dict[str, int]]] = []
    arch = ""
    for name, usage, next_arch in _USAGE.findall(output_of([str(cuobjdump), "-res-usage", str(module)])):
        if next_arch:
            arch = next_arch
        else:
            found.append((name, arch, {key: int(value) for key, value in re.findall(r"\b([A-Z]+):(\d+)", usage)}))
    if not found:
        raise InvalidInputError(f"{module} holds no CUDA kernels: build it with nvcc present, or name another module")
    readable = demangled([name for name, *_ in found], cuobjdump)
    return [
        Kernel(source(mangled), *short_name(name), arch, mangled, usage)
        for (mangled, arch, usage), name in zip(found, readable, strict=True)
    ]


def resources(module: Path, cuobjdump: Path) -> list[dict[str, Any]]:
    """A row (:data:`benchmarks.store.FIELDS`) for every kernel and architecture, in this order.

    "source" is the file that was compiled, also for the kernels of headers; "" where several or none are known.

    Raises:
        InvalidInputError: the module is missing, holds no kernels or cannot be read, or a tool of binutils is missing.
    """
    found = kernels(module, cuobjdump)
    units = translation_units(module, [kernel.mangled for kernel in found if not kernel.source], cuobjdump)
    rows = [
        {
            "source": kernel.source or units[kernel.mangled],
            "kernel": kernel.name,
            "variant": kernel.variant,
            "arch": kernel.arch,
            "registers": kernel.usage["REG"],
            "stack_bytes": kernel.usage["STACK"],
            "local_bytes": kernel.usage["LOCAL"],
            "shared_bytes": kernel.usage["SHARED"],
        }
        for kernel in found
    ]
    return sorted(rows, key=lambda row: (row["source"], row["kernel"], row["variant"], arch_number(row["arch"])))


def source(mangled: str) -> str:
    """Such as "fake_quantize.cu", in whose unnamed namespace a function, or what it is made for, is; else ""."""
    if (found := _SOURCE.search(mangled)) is None:
        return ""
    return re.sub(r"_(cuh?|h)$", r".\1", found[2][: int(found[1])])


def translation_units(module: Path, mangled: Sequence[str], cuobjdump: Path) -> dict[str, str]:
    """Mangled name of a kernel -> such as "fake_quantize.cu", whose object has the function that launches it.

    "" where no file or several have it: it is local to a file by nvcc's default since 12.8, and anybody's before.

    Raises:
        InvalidInputError: nm or c++filt is missing, or fails.
    """
    if not mangled:
        return {}
    names, files, file = [], [], ""
    for line in output_of(["nm", "--debug-syms", "--no-sort", str(module)]).splitlines():
        kind, name = line[17:18], line[19:]
        if kind == "a":
            file = f"{host[1]}.cu" if (host := _HOST_FILE.match(name)) else ""
        elif kind == "t" and file:
            names.append(name)
            files.append(file)
    # As the local function is not mangled as the kernel is, they are compared by what is read.
    readable = demangled([*mangled, *names], cuobjdump)
    found: dict[str, set[str]] = {}
    for name, file in zip(readable[len(mangled) :], files, strict=True):
        found.setdefault(name, set()).add(file)
    units = [found.get(name, set()) for name in readable[: len(mangled)]]
    return {name: "".join(unit) if len(unit) == 1 else "" for name, unit in zip(mangled, units, strict=True)}


def arch_number(arch: str) -> int:
    """90 for "sm_90" and "sm_90a"."""
    return int(re.sub(r"\D", "", arch) or 0)


def short_name(name: str) -> tuple[str, str]:
    """(name, template arguments) of a demangled function, without namespaces and parameters."""
    name = _ANONYMOUS.sub("", name)
    depths = list(accumulate((character == "<") - (character == ">") for character in name))
    end = next((i for i, depth in enumerate(depths) if name[i] == "(" and depth == 0), len(name))
    function, _, arguments = name[:end].partition("<")
    return re.split(r"::|\s", function)[-1], re.sub(r"\b(?:\w+::)+", "", arguments.removesuffix(">"))


def find_module(name: str = MODULE) -> Path:
    """The file of an extension module, which must be of the last build and of this csrc.

    Raises:
        InvalidInputError: it is not built, left of an earlier build, or of other sources.
    """
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise InvalidInputError(f"{name} is not built: run 'pip install -e .' where nvcc is, or name a built module")
    module = Path(spec.origin)
    build = build_info(module) or {}
    if reason := build.get("cuda_left_out"):
        raise InvalidInputError(
            f"{module} is of an earlier build, the last one has no CUDA ({reason}): build it again with nvcc, or name a"
            " built module"
        )
    if native_matches(build) is False:
        raise InvalidInputError(
            f"{module} was built from another csrc than this one: run 'pip install -e .' again, or name a built module"
        )
    return module


def find_cuobjdump(environ: Mapping[str, str] = os.environ, default: Path = _DEFAULT_CUDA) -> Path:
    """cuobjdump of CUDA_HOME, CUDA_PATH, on PATH, under `default`, or of Triton's package, in this order.

    Raises:
        InvalidInputError: there is none.
    """
    folders = [Path(environ[name], "bin") for name in ("CUDA_HOME", "CUDA_PATH") if environ.get(name)]
    folders += [Path(folder) for folder in environ.get("PATH", os.defpath).split(os.pathsep) if folder]
    folders.append(default / "bin")
    if (triton := importlib.util.find_spec("triton")) and triton.origin:
        folders.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin")
    for folder in folders:
        if found := shutil.which("cuobjdump", path=str(folder)):
            return Path(found)
    raise InvalidInputError(
        "no cuobjdump (looked in CUDA_HOME, CUDA_PATH, PATH, /usr/local/cuda and Triton's package): it comes with the"
        " CUDA toolkit, and with 'pip install triton'"
    )


def build_info(module: Path) -> dict[str, Any] | None:
    """What the build recorded beside `module`; None where it did not."""
    try:
        return json.loads(module.with_name(record_name(module)).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


def record_name(module: Path) -> str:
    """The name of what a build recorded beside `module`: each Python has its own, this one where none is named."""
    tag = re.match(r"\w+\.([a-z]+-\d+)-", module.name)
    return f"_build_info.{tag[1] if tag else sys.implementation.cache_tag}.json"


def select(rows: Sequence[dict[str, Any]], archs: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of `archs` ("90" or "sm_90"); of all where there are none.

    Raises:
        InvalidInputError: there are no rows of one of them.
    """
    wanted = {f"sm_{arch.removeprefix('sm_')}" for arch in archs}
    built = sorted({row["arch"] for row in rows}, key=arch_number)
    if missing := sorted(wanted - set(built)):
        raise InvalidInputError(f"the module holds no machine code for {', '.join(missing)}; it has {', '.join(built)}")
    return [row for row in rows if not wanted or row["arch"] in wanted]


def demangled(names: Sequence[str], cuobjdump: Path) -> list[str]:
    """Readable names, by the tool beside `cuobjdump` or on PATH.

    Raises:
        InvalidInputError: there is none, or it fails.
    """
    tool = shutil.which("cu++filt", path=str(cuobjdump.parent)) or shutil.which("cu++filt") or shutil.which("c++filt")
    if tool is None:
        raise InvalidInputError("neither cu++filt nor c++filt is on PATH: the latter comes with binutils")
    readable = output_of([tool], "\n".join(names)).splitlines()
    if len(readable) != len(names):
        raise InvalidInputError(f"{tool} gave {len(readable)} names for {len(names)}")
    return readable


def output_of(command: Sequence[str], text: str | None = None) -> str:
    """Standard output of `command`, which reads `text`.

    Raises:
        InvalidInputError: it cannot be run, or fails.
    """
    try:
        done = subprocess.run(command, input=text, capture_output=True, text=True)
    except OSError as error:
        raise InvalidInputError(f"{command[0]} cannot be run: {error.strerror}") from error
    if done.returncode != 0:
        raise InvalidInputError(f"{' '.join(command)} failed: {(done.stderr or done.stdout).strip()}")
    return done.stdout
