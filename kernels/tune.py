"""Choosing launch configurations on the GPU that is there: ``python -m adadfq.kernels.tune FILE [--seconds S]``.

Times every configuration of :data:`adadfq.kernels.configs.CONFIGS` on what its family mostly does, for every dtype and
a small and a large tensor, and writes the fastest to FILE:

    {"device", "triton", "configs": {"rows/float32/large": [num_warps, vectors], ...},
     "times_ms": {"rows/float32/large": {"4x2": median, ...}, ...}}

Programs use it where ADADFQ_TRITON_CONFIGS names it. Needs a GPU (exit status 2 without).
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import NamedTuple

import click
import torch

from adadfq.errors import AdadfqError, InvalidInputError
from adadfq.files import atomic_write
from adadfq.kernels import configs
from adadfq.kernels.configs import Config
from adadfq.ops import triton as backend

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: Layers' outputs of a small and of a large batch.
ACTIVATIONS = {"small": (16, 64, 56, 56), "large": (128, 64, 112, 112)}
#: How often configurations take turns: the clock of a GPU drifts.
ROUNDS = 3
#: Another configuration than the default must be faster by this share: less is noise.
MARGIN = 0.02

Call = Callable[[], object]


class Workload(NamedTuple):
    """What one choice is made by."""

    family: str
    dtype: torch.dtype
    shapes: tuple[tuple[int, ...], ...]

    @property
    def key(self) -> str:
        """The name that :func:`adadfq.kernels.configs.choose` looks for."""
        return configs.key(self.family, self.dtype, sum(torch.Size(shape).numel() for shape in self.shapes))


def _weights(size: str) -> tuple[tuple[int, ...], ...]:
    """Convolutions of ResNet-18: its first half, or all of them twice, which is large in 16 bits too."""
    found: list[tuple[int, ...]] = [(64, 3, 7, 7), *[(64, 64, 3, 3)] * 4]
    for outputs in (128, 256, 512):
        found += [(outputs, outputs // 2, 3, 3), *[(outputs, outputs, 3, 3)] * 3, (outputs, outputs // 2, 1, 1)]
    return tuple(found[:10] if size == "small" else found * 2)


def workloads() -> Iterator[Workload]:
    """One for every family, dtype and size."""
    for family in configs.CONFIGS:
        for dtype in DTYPES:
            for size, shape in ACTIVATIONS.items():
                yield Workload(family, dtype, _weights(size) if family == "rows" else (shape,))


def calls(workload: Workload, device: str = "cuda") -> list[Call]:
    """What is timed, together: kernels of the family on tensors of this dtype and these shapes."""
    tensors = [torch.randn(shape, device=device).to(workload.dtype) for shape in workload.shapes]
    if workload.family == "rows":
        return [lambda: backend.foreach_dynamic_fake_quantize(tensors, [4] * len(tensors), 0)]
    (x,), channels = tensors, workload.shapes[0][1]
    a, b = (torch.rand(channels, device=device) + 0.5 for _ in range(2))
    if workload.family == "channel_tiles":
        return [lambda: backend.bn_match_forward(x, a, b, a, b, 1e-5)]
    zero_points = torch.full((channels,), 7, dtype=torch.int32, device=device)
    return [
        lambda: backend.fake_quantize(x, a, zero_points, 4, 1),
        lambda: backend.affine_act_fake_quantize(x, a, b, None, "relu", a[:1], zero_points[:1], 4),
    ]


@contextmanager
def _only(family: str, config: Config) -> Iterator[None]:
    """Every launch of the family has this configuration, whatever a file says."""
    before, variable = configs.CONFIGS[family], os.environ.pop("ADADFQ_TRITON_CONFIGS", None)
    configs.CONFIGS[family] = (config,)
    try:
        yield
    finally:
        configs.CONFIGS[family] = before
        if variable is not None:
            os.environ["ADADFQ_TRITON_CONFIGS"] = variable


def measure(family: str, to_time: Sequence[Call], time: Callable[[Call], float]) -> dict[Config, float]:
    """Configuration -> milliseconds of all calls: the median of rounds in which configurations take turns."""
    rounds: dict[Config, list[float]] = {config: [] for config in configs.CONFIGS[family]}
    for _ in range(ROUNDS):
        for config, found in rounds.items():
            with _only(family, config):
                found.append(sum(time(call) for call in to_time))
    return {config: median(found) for config, found in rounds.items()}


def best(times: Mapping[Config, float], default: Config) -> Config:
    """The fastest configuration; the default where that is not faster by more than :data:`MARGIN`."""
    fastest = min(times, key=lambda config: times[config])
    return fastest if times[fastest] < (1 - MARGIN) * times[default] else default


def document(device: str, triton: str, measured: Mapping[str, Mapping[Config, float]]) -> dict[str, object]:
    """Content of a file, from key -> configuration -> milliseconds."""
    return {
        "device": device,
        "triton": triton,
        "configs": {key: list(best(times, configs.CONFIGS[key.split("/")[0]][0])) for key, times in measured.items()},
        "times_ms": {
            key: {f"{config.num_warps}x{config.vectors}": ms for config, ms in times.items()}
            for key, times in measured.items()
        },
    }


def write(path: Path, content: dict[str, object]) -> None:
    """Write a file whole or not at all.

    Raises:
        InvalidInputError: it cannot be written there.
    """
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def tune(seconds: float) -> dict[str, object]:
    """Time everything, in about this time and what compiling takes; returns a file's content.

    Raises:
        InvalidInputError: there is no GPU, or no Triton.
    """
    if reason := backend.why_unavailable():
        raise InvalidInputError(f"tuning times kernels on a GPU, and Triton's cannot be used here: {reason}")
    if backend.INTERPRETED:
        raise InvalidInputError("tuning times compiled kernels: unset TRITON_INTERPRET")
    import triton
    from triton.testing import do_bench

    chosen = list(workloads())
    turns = ROUNDS * sum(len(configs.CONFIGS[workload.family]) for workload in chosen)
    milliseconds = max(5.0, 1e3 * seconds / turns / 2)  # two calls, or as much again for preparing one

    def time(call: Call) -> float:
        return do_bench(call, warmup=milliseconds / 4, rep=milliseconds, return_mode="median")

    measured = {}
    for workload in chosen:
        measured[workload.key] = measure(workload.family, calls(workload), time)
        shown = ", ".join(f"{c.num_warps}x{c.vectors}: {ms:.4g}" for c, ms in measured[workload.key].items())
        click.echo(f"{workload.key}  ms  {shown}")
    return document(torch.cuda.get_device_name(), triton.__version__, measured)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--seconds", default=60.0, show_default=True, type=click.FloatRange(0), help="About how long to time.")
def main(file: Path, seconds: float) -> None:
    """Time every launch configuration on this GPU and write the fastest to FILE, for ADADFQ_TRITON_CONFIGS."""
    try:
        if not file.absolute().parent.is_dir():
            raise InvalidInputError(f"{file} cannot be written: the directory {file.parent} does not exist")
        write(file, tune(seconds))
    except AdadfqError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main(prog_name="python -m adadfq.kernels.tune")
