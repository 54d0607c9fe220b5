"""Which backend serves which operator, decided when the operator runs.

Automatic choice takes the first backend of the device's list that is available, has the operator and takes the
tensor's dtype; `reference` takes everything. On a CUDA device measurements (:mod:`adadfq.ops.routes`) may put another
one first, by operator, dtype and size. A backend asked for by name (``ADADFQ_BACKEND`` or :func:`use_backend`) serves
the call or raises: it never falls back.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from types import ModuleType
from typing import Any

import torch

from adadfq.errors import BackendError, InvalidInputError
from adadfq.ops import cpu, cuda, reference, routes, triton

#: Every backend is a module with NAME, DEVICE_TYPE (None: any), DTYPES (None: any floating), KERNELS and
#: why_unavailable() -> str | None.
BACKENDS: dict[str, ModuleType] = {module.NAME: module for module in (cpu, cuda, triton, reference)}

#: Order of preference by device type; any other device is served by the reference.
PREFERENCE: dict[str, tuple[str, ...]] = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}

_forced: ContextVar[str | None] = ContextVar("adadfq_backend", default=None)


def _check_name(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise BackendError(f"{source} must be one of {', '.join(BACKENDS)} or auto, got {name!r}")
    return name


def forced_backend() -> str | None:
    """The backend asked for by name, or None for the automatic choice.

    Raises:
        BackendError: ``ADADFQ_BACKEND`` names no backend.
    """
    if (name := _forced.get()) is None:
        name = os.environ.get("ADADFQ_BACKEND") or "auto"
    return None if name == "auto" else _check_name(name, "ADADFQ_BACKEND")


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Serve every operator inside the block by backend `name` ("auto" restores the automatic choice).

    Takes precedence over ``ADADFQ_BACKEND``. Calls that the backend cannot serve raise
    :class:`~adadfq.errors.BackendError`; there is no fallback.

    Backward operators run by autograd are served by the backend in force when ``backward()`` runs; on a CUDA device
    autograd runs them in a thread of its own, which sees ``ADADFQ_BACKEND`` but not this block.

    Raises:
        BackendError: `name` is not a backend.
    """
    if name != "auto":
        _check_name(name, "backend")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def why_not(backend: str, op: str, device_type: str, dtype: torch.dtype) -> str | None:
    """Why `backend` cannot serve `op` for tensors of this device and dtype; None when it can."""
    module = BACKENDS[backend]
    if module.DEVICE_TYPE not in (None, device_type):
        return f"it serves {module.DEVICE_TYPE} tensors, not {device_type}"
    if op not in module.KERNELS:
        return "it has no kernel for this operator"
    if (reason := module.why_unavailable()) is not None:
        return reason
    if module.DTYPES is not None and dtype not in module.DTYPES:
        return f"it takes {', '.join(sorted(str(d).removeprefix('torch.') for d in module.DTYPES))}, not {dtype}"
    return None


def select(op: str, device_type: str, dtype: torch.dtype, size: str | None = None) -> str:
    """Name of the backend that serves `op` for tensors of this device, dtype and, on a CUDA device, size.

    Args:
        size: a class of :data:`adadfq.ops.routes.SIZES`; None is what serves where no measurement by size says else.

    Raises:
        BackendError: the backend asked for by name cannot serve the call, or the file of ADADFQ_ROUTES is no table.
    """
    return _select(op, device_type, dtype, size, forced_backend())


@cache
def _select(op: str, device_type: str, dtype: torch.dtype, size: str | None, forced: str | None) -> str:
    # What a process can use does not change while it runs.
    if forced is not None:
        if (reason := why_not(forced, op, device_type, dtype)) is not None:
            raise BackendError(f"backend {forced!r} cannot serve {op}: {reason}; choose another or 'auto'")
        return forced
    order = PREFERENCE.get(device_type, ("reference",))
    if device_type == routes.DEVICE_TYPE and (first := routes.current().backend(op, dtype, size)) is not None:
        order = (first, *order)
    return next(name for name in order if why_not(name, op, device_type, dtype) is None)


#: Operators that write to arguments, and the positions of those.
MUTATES: dict[str, tuple[int, ...]] = {"fake_quantize_": (0,), "observe_fake_quantize": (1, 2, 3, 4, 5)}

#: Operators that compute in a dtype of their own, not that of their main tensor, and the position of that argument.
DTYPE_ARGUMENT: dict[str, int] = {"unpack_dequantize": 6}


def call(op: str, *args: Any, **kwargs: Any) -> Any:
    """Run `op` on the backend chosen for its main tensor: the implementation registered for every operator."""
    main: torch.Tensor = args[1] if op.endswith("_backward") else args[0]
    tensors = None
    if isinstance(main, list):
        if not main:
            raise InvalidInputError(f"{op}: the list must hold at least one tensor")
        tensors, main = main, main[0]
    dtype = args[DTYPE_ARGUMENT[op]] if op in DTYPE_ARGUMENT else main.dtype
    device_type, size = main.device.type, None
    if device_type == routes.DEVICE_TYPE:
        size = routes.size_class(main.numel() if tensors is None else sum(x.numel() for x in tensors))
    backend = BACKENDS[_select(op, device_type, dtype, size, forced_backend())]
    result = backend.KERNELS[op](*args, **kwargs)
    if op in MUTATES:
        # Native code writes behind autograd's back: a backward that saved an argument must see that it changed.
        torch.autograd.graph.increment_version([args[i] for i in MUTATES[op]])
    return result
