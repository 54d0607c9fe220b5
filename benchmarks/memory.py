"""How much memory a call takes beyond what there was: tensors at the peak, results included."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

#: Around the call that counts, in a trace.
_MEASURED = "peak_bytes: measured"


def peak_bytes(call: Callable[[], Any], device: torch.device, replaces: bool = False) -> int:
    """Bytes of tensors that one `call` has alive at most, beyond those alive before; what it returns counts.

    On a CPU this is what passes through PyTorch's allocator: a kernel's own scratch memory does not.

    Args:
        call: what is measured.
        device: where it runs.
        replaces: it frees tensors of the call before, as a step does with gradients. On a CPU, what was there before
            is known only then, from another call.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        kept = call()
        torch.cuda.synchronize(device)
        del kept
        return torch.cuda.max_memory_allocated(device) - before
    # Its library writes a line a run to stderr otherwise.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        if replaces:
            call()
        with torch.profiler.record_function(_MEASURED):
            kept = call()
    del kept
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profile.export_chrome_trace(str(trace))
        # Names of operators are not always UTF-8 there.
        events = json.loads(trace.read_text(encoding="utf-8", errors="replace"))["traceEvents"]
    begin = next(event["ts"] for event in events if event.get("name") == _MEASURED)
    changes = [(event["ts"], event["args"]["Bytes"]) for event in events if event.get("name") == "[memory]"]
    alive = sum(change for time, change in changes if time < begin)
    before = peak = alive
    for time, change in sorted(changes, key=lambda item: item[0]):
        if time >= begin:
            alive += change
            peak = max(peak, alive)
    return peak - before


def graph_bytes(device: torch.device) -> int:
    """Bytes that captured CUDA graphs have for themselves: between replays the allocator counts them as unused."""
    if device.type != "cuda":
        return 0
    segments = torch.cuda.memory_snapshot()
    return sum(segment["total_size"] for segment in segments if tuple(segment["segment_pool_id"]) != (0, 0))
