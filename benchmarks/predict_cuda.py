"""What the CUDA backend launches for a call, and what these kernels are for a GPU that is not there.

The launchers of csrc/cuda run as tests/cuda_emulator compiles them for the CPU, with launches recorded instead of run
and as many multiprocessors as the GPU has: that gives kernels, grids and parameters. A kernel is the one with the same
source, name and template arguments in the module that nvcc built, from which cuobjdump reads registers and
instructions.

A launch moves every tensor whose address is among its parameters once, and one that an operator is given to read and
to write twice. Partial results in scratch memory are not counted. Too few instructions are found for quantize_pack in
16-bit types, whose busiest loop copies bytes, and too many for the losses, whose threads hold more than a row has.
"""

from __future__ import annotations

import ctypes
import importlib.util
import math
import subprocess
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from torch import Tensor

from adadfq.errors import InvalidInputError
from adadfq.ops import cuda
from benchmarks import resources, sass, uniform
from benchmarks.cases import LOGIT_LOSSES, Case
from benchmarks.environment import native_matches

_TESTS = Path(__file__).parents[1] / "tests"
#: Compute capability -> where a kernel's parameters begin in constant memory.
_FIRST_PARAMETER = {90: 0x210}
#: Kernels that keep rows in registers, and so go round no loop unless rows are longer than any network's.
_IN_REGISTERS = ("quantize_rows_kernel",)
# Of csrc/cuda/logit_losses.cu: elements that a thread takes at a time, and up to how many classes a warp has a row.
_ELEMENTS_EACH, _LONGEST_OF_WARP, _WARP = 8, 256, 32


class Recorded(NamedTuple):
    """A launch that was recorded instead of run."""

    source: str
    """File of csrc/cuda."""
    mangled: str
    """The kernel's name there."""
    grid: tuple[int, ...]
    block: tuple[int, ...]
    cooperative: bool
    parameters: bytes
    nbytes: int
    """Of the tensors that it reads or writes."""


@dataclass
class Launch:
    """A recorded launch, and its kernel in the module that nvcc built."""

    recorded: Recorded
    kernel: resources.Kernel
    capability: int
    module: Path
    cuobjdump: Path

    @property
    def name(self) -> str:
        """With the template arguments."""
        return f"{self.kernel.name}<{self.kernel.variant}>" if self.kernel.variant else self.kernel.name

    @property
    def nbytes(self) -> int:
        """See :attr:`Recorded.nbytes`."""
        return self.recorded.nbytes

    @property
    def threads(self) -> int:
        """Threads of all blocks."""
        return math.prod(self.recorded.grid) * math.prod(self.recorded.block)

    @property
    def warps(self) -> int:
        """Warps of a block."""
        return -(-math.prod(self.recorded.block) // _WARP)

    @property
    def shared(self) -> int:
        """Bytes of shared memory of a block."""
        return self.kernel.usage["SHARED"]

    @property
    def resources(self) -> dict[str, int]:
        """See :attr:`benchmarks.resources.Kernel.usage`."""
        return self.kernel.usage

    @property
    def listing(self) -> sass.Listing:
        """Address and text of the machine's instructions, in order."""
        return _listing(self.module, self.cuobjdump, self.kernel.arch, self.kernel.mangled)

    @cached_property
    def decided(self) -> dict[int, bool]:
        """Which way branches go, where the parameters say so; nothing for architectures whose layout is not known."""
        first = _FIRST_PARAMETER.get(self.capability)
        if first is None:
            return {}
        sizes = b"".join(size.to_bytes(4, "little") for size in (*self.recorded.block, *self.recorded.grid))
        constants = dict(enumerate(sizes)) | dict(enumerate(self.recorded.parameters, first))
        return uniform.decided(self.listing, constants)

    def instructions_per_element(self, case: Case) -> float:
        """Instructions of all threads for an element of a case: see :mod:`benchmarks.sass`."""
        if self.kernel.name in _IN_REGISTERS:
            each = sass.outside(self.listing, self.decided, busiest=True)
        elif case.op in LOGIT_LOSSES:
            outside = sass.outside(self.listing, self.decided)
            each = outside + self._turns(*case.shapes[0]) * (sass.once(self.listing, self.decided) - outside)
        else:
            moved = self.nbytes / case.numel
            return sass.per_element(self.listing, self.threads, case.numel, moved, decided=self.decided)
        return each * self.threads / case.numel

    def _turns(self, batch: int, classes: int) -> int:
        """How often a thread of a loss takes elements."""
        threads = math.prod(self.recorded.block)
        lanes = threads if classes > _LONGEST_OF_WARP else min(_WARP, 1 << (classes - 1).bit_length())
        rows = -(-batch // (math.prod(self.recorded.grid) * (threads // lanes)))
        return rows * -(-classes // (lanes * _ELEMENTS_EACH))


def launches(op: str, args: tuple[Any, ...], multiprocessors: int, capability: int, module: Path) -> list[Launch]:
    """What a call of an operator launches, with the kernels of `module` for sm_`capability`.

    Raises:
        InvalidInputError: a tool is missing, or the module has not these kernels.
    """
    cuobjdump = resources.find_cuobjdump()
    built = _kernels(module, cuobjdump, f"sm_{capability}")
    found = []
    recorded = record(op, args, multiprocessors)
    for launch, readable in zip(recorded, _demangled(tuple(launch.mangled for launch in recorded)), strict=True):
        key = name, variant = resources.short_name(readable)
        # A kernel that nothing of one source is in is in no source.
        kernel = built.get((launch.source, *key)) or built.get(("", *key))
        if kernel is None:
            raise InvalidInputError(
                f"{op} launches {name}<{variant}> of {launch.source}, which {module} does not hold: build it again from"
                " this csrc"
            )
        found.append(Launch(launch, kernel, capability, module, cuobjdump))
    return found


def check_module(module: Path, capability: int) -> None:
    """Refuse (:class:`InvalidInputError`) a module that is not of this csrc or has nothing for sm_`capability`."""
    _kernels(module, resources.find_cuobjdump(), f"sm_{capability}")
    if native_matches(resources.build_info(module)) is False:
        raise InvalidInputError(f"{module} was built from another csrc than this one: build it again")


@cache
def _kernels(module: Path, cuobjdump: Path, arch: str) -> dict[tuple[str, str, str], resources.Kernel]:
    """(source, name, variant) -> kernel, of one architecture."""
    kernels = resources.kernels(module, cuobjdump)
    found = {(kernel.source, kernel.name, kernel.variant): kernel for kernel in kernels if kernel.arch == arch}
    if not found:
        archs = ", ".join(sorted({kernel.arch for kernel in kernels}, key=resources.arch_number))
        raise InvalidInputError(
            f"{module} holds no machine code for {arch}; it has {archs}: build it with ADADFQ_CUDA_ARCHS={arch[3:]}"
        )
    return found


@cache
def _demangled(names: tuple[str, ...]) -> list[str]:
    """By the tool that the module's names are read with."""
    return resources.demangled(names, resources.find_cuobjdump())


@cache
def _listing(module: Path, cuobjdump: Path, arch: str, mangled: str) -> sass.Listing:
    text = resources.output_of([str(cuobjdump), "-sass", "-arch", arch, "-fun", mangled, str(module)])
    if not (found := sass.listing(text)):
        raise InvalidInputError(f"{cuobjdump} prints no instructions of {mangled} in {module}: take that of CUDA 12.4+")
    return found


# ------------------------------------------------------------------------------------------------- recorded launches


class _Emulated(NamedTuple):
    path: Path
    module: ModuleType
    library: ctypes.CDLL


@cache
def _emulated() -> _Emulated:
    """csrc/cuda compiled for the CPU."""
    try:
        spec = importlib.util.spec_from_file_location("emulated_cuda", _TESTS / "emulated_cuda.py")
        emulated_cuda = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(emulated_cuda)
        path = emulated_cuda.build()
    except (ImportError, OSError, subprocess.CalledProcessError) as error:
        raise InvalidInputError(
            f"the launchers of csrc/cuda cannot be compiled for the CPU ({error}): this needs a checkout, a C++17"
            " compiler (CXX) and pybind11"
        ) from error
    # Not adadfq._C_cuda: under a name that is loaded pybind11 gives what was loaded.
    spec = importlib.util.spec_from_file_location("emulated_cuda._C_cuda", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    library = ctypes.CDLL(str(path))
    library.emulator_recorded.restype = ctypes.c_char_p
    return _Emulated(path, module, library)


def record(op: str, args: tuple[Any, ...], multiprocessors: int) -> list[Recorded]:
    """What a call of an operator of the CUDA backend launches on a GPU of so many multiprocessors; nothing runs.

    Args:
        args: its arguments; tensors are CPU tensors, of which nothing is read.

    Raises:
        InvalidInputError: the launchers cannot be compiled, or nm is missing.
    """
    emulated = _emulated()
    tensors: list[Tensor] = []
    before = {name: getattr(cuda, name) for name in ("DEVICE_TYPE", "INTERPRETED", "_load", "launch")}

    def launch(op: str, launcher: str, x: Tensor, *arguments: Any) -> None:
        tensors.extend(_tensors(arguments))
        before["launch"](op, launcher, x, *arguments)

    cuda.DEVICE_TYPE, cuda.INTERPRETED = "cpu", False  # nobody looks at values
    cuda._load, cuda.launch = lambda: (emulated.module, None), launch
    emulated.library.emulator_record(multiprocessors)
    try:
        cuda.KERNELS[op](*args)
        lines = emulated.library.emulator_recorded().decode().splitlines()
    finally:
        emulated.library.emulator_record(0)
        for name, value in before.items():
            setattr(cuda, name, value)
    sizes: Counter[int] = Counter()
    for tensor in tensors:
        sizes[tensor.data_ptr()] += tensor.nbytes
    return [_recorded(line, emulated.path, sizes) for line in lines]


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)


def _recorded(line: str, module: Path, sizes: Counter[int]) -> Recorded:
    """A line of emulator_recorded(): see tests/cuda_emulator/emulator.cpp."""
    offset, *numbers, cooperative, parameters = line.split(" ")
    raw = bytes.fromhex(parameters)
    words = {int.from_bytes(raw[i : i + 8], "little") for i in range(0, len(raw) - 7, 8)}
    nbytes = sum(size for address, size in sizes.items() if address in words)
    grid, block = (tuple(map(int, part)) for part in (numbers[:3], numbers[3:]))
    if (function := _functions(module).get(int(offset, 16))) is None:
        raise InvalidInputError(f"{module} has no function at 0x{offset}: it must not be stripped")
    return Recorded(*function, grid, block, cooperative == "1", raw, nbytes)


@cache
def _functions(module: Path) -> dict[int, tuple[str, str]]:
    """Offset -> (source, mangled name) of the functions of a module; local symbols come after their file's."""
    found, source = {}, ""
    for line in resources.output_of(["nm", "--debug-syms", "--no-sort", str(module)]).splitlines():
        address, kind, name = line[:16].strip(), line[17:18], line[19:]
        if kind == "a":
            source = name
        elif address and kind in "tTwW":
            found[int(address, 16)] = source, name
    return found
