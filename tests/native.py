"""The backend of kernels this process tests: a GPU's where those run on the CPU, else the CPU's."""

from __future__ import annotations

import emulated_cuda

from adadfq.ops import cpu, cuda, triton

if triton.INTERPRETED:
    import interpreter

    interpreter.install()
if emulated_cuda.WANTED:
    emulated_cuda.install()

NATIVE = triton if triton.INTERPRETED else cuda if cuda.INTERPRETED else cpu
