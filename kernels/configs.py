"""The launch configurations each kernel family may use: the first is the default, the others are what tuning tries.

Nothing is ever timed while a program runs: a call takes the default, or what the file named by ADADFQ_TRITON_CONFIGS
says, so training does not retune, a CUDA graph replays what was captured, and sums come out alike in every run.
``python -m adadfq.kernels.tune FILE`` writes such a file on a machine with a GPU.
"""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch


class Config(NamedTuple):
    """Warps of a program, and how many 16-byte vectors of the main tensor a thread has in flight."""

    num_warps: int
    vectors: int


#: family -> configurations.
CONFIGS: dict[str, tuple[Config, ...]] = {
    # One vector in each of `vectors` segments of the tensor.
    "elementwise": (Config(4, 4), Config(4, 2), Config(8, 4), Config(8, 2)),
    # A tile of one channel, or of neighbouring channels, in a loop.
    "channel_tiles": (Config(4, 2), Config(4, 1), Config(8, 2), Config(8, 1)),
    # A row of a weight, in a loop.
    "rows": (Config(2, 2), Config(1, 2), Config(4, 2), Config(8, 2)),
}

#: Bytes of a tensor from which it is "large": it does not stay in a cache between two passes.
LARGE = 32 * 2**20


def key(family: str, dtype: torch.dtype, numel: int) -> str:
    """What a choice depends on: family, dtype and whether the tensor is small or large."""
    size = "large" if numel * dtype.itemsize >= LARGE else "small"
    return f"{family}/{str(dtype).removeprefix('torch.')}/{size}"


@cache
def _chosen(path: str | None) -> dict[str, Config]:
    if not path:
        return {}
    try:
        found = json.loads(Path(path).read_text())["configs"]
        chosen = {name: Config(*values) for name, values in found.items()}
        wrong = [name for name, config in chosen.items() if config not in CONFIGS.get(name.split("/")[0], ())]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"ADADFQ_TRITON_CONFIGS: {path} cannot be used ({error}); tune again or unset it") from error
    if wrong:
        raise ValueError(
            f"ADADFQ_TRITON_CONFIGS: {path} has no known configuration for {wrong}; tune again or unset it"
        )
    return chosen


def choose(family: str, dtype: torch.dtype, numel: int) -> Config:
    """The configuration for a main tensor of this dtype and size.

    Raises:
        ValueError: the file named by ADADFQ_TRITON_CONFIGS cannot be read or names a configuration not in CONFIGS.
    """
    chosen = _chosen(os.environ.get("ADADFQ_TRITON_CONFIGS"))
    return chosen.get(key(family, dtype, numel), CONFIGS[family][0])
