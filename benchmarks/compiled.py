"""Compiles what launchers launch, for GPUs that are not there.

A driver that only names a target takes the place of Triton's, and every launch compiles (with the specialisation and
the options it would have) instead of running. Tensors are CPU tensors; large ones cost address space, not memory.
"""

from __future__ import annotations

import math
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from benchmarks import sass

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass
class Launch:
    """One launch: the kernel, its grid and keyword arguments, and what was compiled."""

    name: str
    capability: int
    grid: tuple[int, ...]
    options: dict[str, Any]
    asm: dict[str, Any]
    sizes: tuple[int, ...] = ()
    """Bytes of the tensor behind each parameter that is a pointer, 0 behind the others."""
    shared: int = 0
    """Bytes of shared memory of a program."""

    @property
    def warps(self) -> int:
        """Warps of a program."""
        return self.options.get("num_warps", 4)

    @property
    def threads(self) -> int:
        """Threads of all programs."""
        return math.prod(self.grid) * 32 * self.warps

    @cached_property
    def nbytes(self) -> int:
        """Bytes of the tensors whose pointers the kernel uses: what it moves where it passes each of them once.

        A tensor that is read and written is there twice. A pointer that only fills its place is never loaded.
        """
        used = {int(number) for number in re.findall(r"ld\.param\S*\s[^;\[]*\[\w+_param_(\d+)[+\]]", self.ptx)}
        return sum(self.sizes[i] for i in used if i < len(self.sizes))  # Triton adds parameters of its own

    @property
    def ptx(self) -> str:
        return self.asm["ptx"]

    def count(self, pattern: str) -> int:
        """How many instructions of the PTX match."""
        return len(re.findall(pattern, self.ptx))

    def _cuobjdump(self, option: str) -> str:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self.asm["cubin"])
            file.flush()
            command = [str(TOOLS / "cuobjdump"), option, file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    @cached_property
    def resources(self) -> dict[str, int]:
        """REG, STACK, SHARED, LOCAL and so on: registers a thread, bytes of the rest."""
        usage = next(line for line in self._cuobjdump("-res-usage").splitlines() if "REG:" in line)
        return {name: int(value) for name, value in re.findall(r"([A-Z]+)(?:\[\d\])?:(\d+)", usage)}

    @cached_property
    def listing(self) -> list[tuple[int, str]]:
        """Address and text of the machine's instructions, in order, without the padding at the end."""
        return sass.listing(self._cuobjdump("-sass"))

    @property
    def sass(self) -> list[str]:
        """The machine's instructions, in order, without the padding at the end."""
        return [text for _, text in self.listing]


class _Driver:
    """What the JIT asks of a driver before it compiles."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # compiled kernels are kept by device

    def get_current_stream(self, device: int) -> int:
        return 0


def _sizes(given: dict[str, Any], signature: dict[str, Any]) -> tuple[int, ...]:
    """:attr:`Launch.sizes`. Constants, as None is and some integers are, are no parameters."""

    def walk(value: Any, kind: Any) -> Iterator[int]:
        if isinstance(kind, (tuple, list)):
            for i, (item, item_kind) in enumerate(zip(value, kind, strict=True)):
                # A tensor that comes again only fills the tuple up.
                again = isinstance(item, torch.Tensor) and any(item is before for before in value[:i])
                yield from (0,) if again else walk(item, item_kind)
        elif kind != "constexpr":
            yield value.nbytes if isinstance(value, torch.Tensor) else 0

    return tuple(size for name, kind in signature.items() for size in walk(given.get(name), kind))


@contextmanager
def compiling_for(capability: int) -> Iterator[list[Launch]]:
    """Inside the block launches compile for sm_`capability`, and are added to the list."""
    launches: list[Launch] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        given = dict(zip(self.arg_names, args, strict=False)) | kwargs
        sizes = _sizes(given, kernel.src.signature)
        shared = kernel.metadata.shared
        launches.append(Launch(self.fn.__name__, capability, tuple(grid), kwargs, kernel.asm, sizes, shared))
        return kernel

    JITFunction.run = compile_only
    before, driver._active = driver._active, _Driver(capability)
    try:
        yield launches
    finally:
        JITFunction.run = run
        driver._active = before
