"""Whether a step fits into memory, estimated before anything is built."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks import plain_step
from benchmarks.contest import Setting

#: Bytes that a step has alive at its peak, in bytes of the float32 outputs of all modules of teacher, student and
#: generator: measured were 0.7 to 1.8, by player and network.
_KEPT = 2.0
#: Of the memory that is there, this much may be asked for.
_USABLE = 0.85


class Room:
    """Estimates for one setting.

    Args:
        setting: what is trained.
        device: where.
        players: how many hold networks and optimiser states at once; they step in turns.
    """

    def __init__(self, setting: Setting, device: torch.device, players: int) -> None:
        recipe = setting.resolved()
        with torch.device("meta"):
            network, generator = setting.build().eval(), plain_step.Generator(recipe)
            noise = torch.empty(setting.batch_size, recipe.latent_dim)
            labels = torch.zeros(setting.batch_size, dtype=torch.int64)
            images = torch.empty(setting.batch_size, recipe.image_channels, recipe.image_size, recipe.image_size)
            self._outputs = 2 * _output_bytes(network, images) + _output_bytes(generator, noise, labels)
        weights, generated = (4 * sum(p.numel() for p in module.parameters()) for module in (network, generator))
        # Parameters of all three, gradients and momentum of the student, gradients and two moments of the generator.
        self._held = (players + 1) * (4 * weights + 4 * generated)
        self._free = available_bytes(device)

    def needed_bytes(self) -> int:
        """Of all networks and one step of one player."""
        return int(self._held + _KEPT * self._outputs)

    def why_not(self) -> str | None:
        """Why a step would not fit; None where it does, or nobody knows how much memory there is."""
        needed = self.needed_bytes()
        if self._free is None or needed <= _USABLE * self._free:
            return None
        return f"needs an estimated {needed / 1e9:.3g} GB of memory, and {self._free / 1e9:.3g} GB are free"


def available_bytes(device: torch.device) -> int | None:
    """Memory that can be had on `device` without swapping; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    found = []
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        found.append(next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")))
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text())
        found.append(limit - int((group / "memory.current").read_text()))
    except (OSError, ValueError, StopIteration):
        pass  # no Linux, or no limit ("max")
    return min(found) if found else None


def _output_bytes(module: nn.Module, *inputs: Tensor) -> int:
    """Of the outputs of all modules without children, in a forward on the meta device."""
    total = 0

    def hook(_: nn.Module, __: object, output: Tensor) -> None:
        nonlocal total
        total += 4 * math.prod(output.shape)

    for child in module.modules():
        if not list(child.children()):
            child.register_forward_hook(hook)
    module(*inputs)
    return total
