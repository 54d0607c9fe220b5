"""Fake quantisation: ``python -m benchmarks.fake_quantize [--device cpu] [--megabytes 200] [--json PATH]``.

Peers: PyTorch's own operator, a copy of the same bytes (what the memory allows), and the reference. Providers take
turns, so that a disturbance hits all of them; rows are medians with the 20th and 80th percentile. Each case is first
checked: a row whose result is wrong ends the run, with no speed reported.

"new" writes to a fresh tensor, as the operators do, and on a CPU pays for the system's page faults; "into" writes to
memory that is already there. An untimed call of the same provider goes before each timed one, as in a loop: a virtual
machine may hand freed memory back to its host within seconds, and getting it again costs more than anything measured
here.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from adadfq.ops import cpu, dispatch, native_args, reference
from adadfq.ops.dispatch import use_backend

BITS = 4
CHANNELS = 512


def providers(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None) -> dict[str, Callable[[], Tensor]]:
    """Name -> what to time. Names that start with "copy" compute nothing."""
    out = torch.empty_like(x).copy_(x)

    def pytorch() -> Tensor:
        if axis is None:
            return torch.fake_quantize_per_tensor_affine(x, scale[0], zero_point[0], 0, 2**BITS - 1)
        return torch.fake_quantize_per_channel_affine(x, scale, zero_point, axis, 0, 2**BITS - 1)

    def ours(backend: str) -> Callable[[], Tensor]:
        def call() -> Tensor:
            with use_backend(backend):
                return torch.ops.adadfq.fake_quantize(x, scale, zero_point, BITS, axis)

        return call

    def native_into() -> Tensor:
        layout = native_args.layout("benchmark", x, axis)
        pointers = (x.data_ptr(), scale.data_ptr(), zero_point.data_ptr(), out.data_ptr())
        cpu._native().fake_quantize(*pointers, *layout, BITS, 0, torch.get_num_threads())
        return out

    backends = [name for name in dispatch.PREFERENCE[x.device.type] if name != "reference"]
    unavailable = {name: dispatch.why_not(name, "fake_quantize", x.device.type, x.dtype) for name in backends}
    if missing := [f"{name}: {reason}" for name, reason in unavailable.items() if reason]:
        raise SystemExit("; ".join(missing))
    result = {f"adadfq {name} (new)": ours(name) for name in backends}
    if x.device.type == "cpu":
        result["adadfq cpu (into)"] = native_into
    return {
        **result,
        "torch (new)": pytorch,
        "reference (new)": lambda: reference.fake_quantize(x, scale, zero_point, BITS, axis),
        "copy (new)": lambda: x.clone(),
        "copy (into)": lambda: out.copy_(x),
    }


def check(name: str, got: Tensor, want: Tensor, step: float) -> None:
    """End the run where a result is wrong. PyTorch multiplies by 1 / scale: next to ties it may be one step off."""
    if name.startswith("copy"):
        return
    if name.startswith("torch"):
        wrong = (got - want).abs() > step * 1.001
        share = (got != want).float().mean().item()
        ok = not wrong.any() and share < 1e-3
    else:
        ok = torch.equal(got, want)
    if not ok:
        raise SystemExit(f"{name} is wrong: no speed is reported")


def seconds(function: Callable[[], Tensor], device: torch.device) -> float:
    """Time of one call, after an untimed one; on a GPU between two events."""
    function()
    if device.type != "cuda":
        start = time.perf_counter()
        function()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    function()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def run(device: torch.device, megabytes: float, threads: int, rounds: int) -> list[dict[str, object]]:
    """One row for each case and provider."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    columns = max(1, round(megabytes * 1e6 / 4 / CHANNELS))
    x = torch.randn(CHANNELS, columns, device=device)
    rows = []
    for case, axis in (("per channel", 0), ("per tensor", None)):
        channels = CHANNELS if axis == 0 else 1
        scale = torch.rand(channels, device=device) / 4 + 0.05
        zero_point = torch.randint(0, 2**BITS, (channels,), dtype=torch.int32, device=device)
        runs = providers(x, scale, zero_point, axis)
        want = reference.fake_quantize(x, scale, zero_point, BITS, axis)
        for name, function in runs.items():
            check(name, function(), want, scale.max().item())
        del want
        times: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(rounds):
            for name, function in runs.items():
                times[name].append(seconds(function, device))
        for name, values in times.items():
            low, _, _, high = statistics.quantiles(values, n=5)
            median = statistics.median(values)
            rows.append(
                {
                    "case": case,
                    "provider": name,
                    "p20_ms": low * 1e3,
                    "p50_ms": median * 1e3,
                    "p80_ms": high * 1e3,
                    "gb_per_s": 2 * x.nbytes / median / 1e9,
                    "times_torch": statistics.median(times["torch (new)"]) / median,
                }
            )
    return rows


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", type=torch.device, default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--megabytes", type=float, default=200, help="size of the float32 tensor (default: 200)")
    parser.add_argument("--threads", type=int, default=2, help="PyTorch threads (default: 2)")
    parser.add_argument("--rounds", type=int, default=9, help="runs of every provider (default: 9)")
    parser.add_argument("--json", type=Path, help="also write rows and configuration to this file")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    rows = run(device, arguments.megabytes, arguments.threads, arguments.rounds)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {arguments.threads} threads"
    print(f"float32 {arguments.megabytes:g} MB, {BITS} bits, {where}, torch {torch.__version__}")
    print(f"{'case':12} {'provider':20} {'p20 ms':>8} {'p50 ms':>8} {'p80 ms':>8} {'GB/s':>7} {'x torch':>8}")
    for row in rows:
        print(
            f"{row['case']:12} {row['provider']:20} {row['p20_ms']:8.1f} {row['p50_ms']:8.1f} {row['p80_ms']:8.1f}"
            f" {row['gb_per_s']:7.1f} {row['times_torch']:8.1f}"
        )
    if arguments.json:
        configuration = {
            "device": where,
            "megabytes": arguments.megabytes,
            "threads": arguments.threads,
            "rounds": arguments.rounds,
            "bits": BITS,
            "torch": torch.__version__,
            "machine": platform.machine(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        }
        arguments.json.write_text(json.dumps({"configuration": configuration, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
