"""Fake tensors on a CUDA device that is not there: shapes, dtypes and devices of a step, no memory, no kernels.

``python -m benchmarks.fake_cuda MODULE ARGUMENT...`` runs `MODULE` as ``python -m`` does, in a process in which such
tensors can be differentiated: a few lines of C++ (fake_cuda.cpp) give autograd a device before torch is imported, and a
real one is hidden. :func:`run` starts such a process.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import runpy
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

if TYPE_CHECKING:
    from torch import nn

    from adadfq import Trainer

SOURCE = Path(__file__).with_name("fake_cuda.cpp")
_ROOT = Path(__file__).parents[1]
_LIBRARY = "BENCHMARKS_FAKE_CUDA"


def run(module: str, *arguments: str) -> str:
    """What `module`, run as by ``python -m`` where fake CUDA tensors can be differentiated, prints on stdout.

    Raises:
        InvalidInputError: the device cannot be compiled, or the module failed; the end of its stderr is in the message.
    """
    from adadfq.errors import InvalidInputError

    path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "fake_cuda.so"
        try:
            subprocess.run(_compile_command(library), check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            reason = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[-1]
            raise InvalidInputError(
                f"a CUDA device for fake tensors cannot be compiled ({reason}): this needs a C++20 compiler (CXX)"
            ) from error
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.fake_cuda", module, *arguments],
            # A real device cannot be used beside this one.
            env={**os.environ, "PYTHONPATH": path, _LIBRARY: str(library), "CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
        )
    if done.returncode:
        raise InvalidInputError(f"{module} failed on fake CUDA tensors: {done.stderr.strip()[-2000:]}")
    return done.stdout


def _torch_folder() -> Path:
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


def _compile_command(library: Path) -> list[str]:
    torch = _torch_folder()
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    options = ["-std=c++20", "-O0", "-shared", "-fPIC", "-w", f"-I{torch / 'include'}", f"-L{torch / 'lib'}"]
    return [*compiler, *options, str(SOURCE), "-o", str(library), "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{torch / 'lib'}"]


def _install() -> None:
    """Import torch with the device of fake_cuda.cpp."""
    library = ctypes.CDLL(os.environ[_LIBRARY])
    import torch  # noqa: F401

    library.fake_cuda_install()


@contextmanager
def mode() -> Iterator[None]:
    """Tensors made inside are fake, and autocast believes in the device. What would wait for the device raises.

    Reading a value raises torch's DataDependentOutputException or DynamicOutputShapeException, and a copy between the
    device and the host :class:`HostCopyError`.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    with (
        mock.patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False),
        mock.patch("torch.cuda.is_bf16_supported", lambda including_emulation=True: True),
        # One thread: those of a device would be counted when the first backward of the process runs.
        torch.autograd.set_multithreading_enabled(False),
        FakeTensorMode(),
        _device_mode(),
    ):
        yield


class HostCopyError(RuntimeError):
    """A tensor was to be copied between the device and the host."""


def _device_mode() -> Any:
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    aten = torch.ops.aten
    #: They only write to their arguments, and nobody has told torch that they need no device for that.
    written = {
        getattr(packet, overload)
        for packet in (aten._fused_adam_, aten._fused_adamw_, aten._fused_sgd_)
        for overload in ("default", "tensor_lr")
    }

    class DeviceMode(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func in written:
                return None
            result = func(*args, **(kwargs or {}))
            if func is aten.convolution.default:
                return _like_cudnn(result, *args[:2])
            if func is aten.convolution_backward.default:
                return tuple(_like_cudnn(gradient, *args[1:3]) for gradient in result)
            if func in (aten._to_copy.default, aten.copy_.default):
                tensors = [leaf for leaf in tree_leaves((args, result)) if isinstance(leaf, torch.Tensor)]
                if len({tensor.device.type for tensor in tensors}) > 1:
                    raise HostCopyError(f"{func} between {' and '.join(str(tensor.device) for tensor in tensors)}")
            return result

    return DeviceMode()


def _like_cudnn(result: Any, x: Any, weight: Any) -> Any:
    """A result of a convolution of `x` in the layout that cuDNN gives it, which fake tensors do not ask."""
    import torch

    last = [t for t in (x, weight) if t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last)]
    if not last or result is None or result.dim() != 4:
        return result
    return torch.empty_like(result, memory_format=torch.channels_last)


def replace_tensors(*networks: nn.Module) -> dict[Any, Any]:
    """Put fake CUDA tensors of the same layout in the place of all parameters and buffers; in :func:`mode`.

    Returns:
        Old tensor -> new one.
    """
    made: dict[Any, Any] = {}
    new: set[Any] = set()
    for network in networks:
        for module in network.modules():
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is None or tensor in new:  # modules are shared between networks
                        continue
                    if tensor not in made:
                        made[tensor] = _fake_like(tensor)
                        new.add(made[tensor])
                    tensors[name] = made[tensor]
    return made


def to_fake(trainer: Trainer) -> None:
    """Make of `trainer`, which has played no step, one on the device, in place; in :func:`mode`.

    Networks, optimizers and random state are what a trainer made on a GPU has; nothing is captured. Steps that the
    student learns must be there already.
    """
    import torch

    from adadfq.nn import step_sizes

    game = trainer.game
    averaged = () if game.averaged is None else (game.averaged,)
    networks = (trainer.teacher, trainer.student, trainer.generator, game.teacher, game.student, *averaged)
    made = replace_tensors(*networks)
    made |= {logarithm: _fake_like(logarithm) for logarithm in trainer.log_steps}
    trainer.log_steps = [made[logarithm] for logarithm in trainer.log_steps]
    trainer.device, trainer.capture = torch.device("cuda"), False
    trainer.random = torch.Generator("cuda")
    optimizers = (trainer.optimizer_generator, trainer.optimizer_student)
    for optimizer in (*optimizers, trainer.optimizer_steps):
        for group in () if optimizer is None else optimizer.param_groups:
            # Not by the optimizers' constructors, which look at the rate.
            group["params"] = [made[parameter] for parameter in group["params"]]
            group["lr"] = _fake_like(group["lr"])
            if "capturable" in group:
                group["capturable"] = True
    trainer.game = type(game)(game.teacher, game.student, trainer.generator, trainer.recipe, *optimizers, *averaged)
    if trainer.optimizer_steps is not None:
        pairs = zip(step_sizes(trainer.student), trainer.log_steps, strict=True)
        trainer.game.learn_steps(list(pairs), trainer.optimizer_steps)


def _fake_like(tensor: Any) -> Any:
    import torch

    fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda")
    return torch.nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, torch.nn.Parameter) else fake


if __name__ == "__main__":
    _install()
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
