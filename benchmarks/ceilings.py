"""What a machine can do at best: bytes copied and multiplications a second, and how long next to nothing takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks import timing
from benchmarks.providers import Provider, replayed

#: Bytes of what is copied: below and above what caches hold.
COPIED = tuple(1 << shift for shift in (18, 22, 26, 30))
#: Side of the square bfloat16 matrices that are multiplied.
SIDES = (1024, 4096, 8192)
NOTHING = "x.zero_() of one element"


def run_ceilings(
    device: torch.device,
    environment: dict[str, Any],
    rounds: int,
    seconds: float,
    copied: tuple[int, ...] = COPIED,
    sides: tuple[int, ...] = SIDES,
) -> list[dict[str, Any]]:
    """One row a ceiling; see :data:`benchmarks.store.FIELDS`. `seconds` is spent on each."""
    one = torch.empty(1, device=device)
    rows = [_row(NOTHING, one.zero_, device, environment, rounds, seconds)]
    for nbytes in copied:
        source = torch.randint(256, (nbytes,), dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        what = f"copy of {nbytes >> 10} KiB"
        rows.append(
            _row(what, lambda a=target, b=source: a.copy_(b), device, environment, rounds, seconds, moved=2 * nbytes)
        )
    for side in sides:
        a, b = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
        out = torch.empty_like(a)
        what = f"bfloat16 product of {side} x {side}"
        rows.append(
            _row(
                what,
                lambda a=a, b=b, out=out: torch.mm(a, b, out=out),
                device,
                environment,
                rounds,
                seconds,
                flops=2 * side**3,
            )
        )
    return rows


def _row(
    what: str,
    call: Callable[[], Any],
    device: torch.device,
    environment: dict[str, Any],
    rounds: int,
    seconds: float,
    moved: int = 0,
    flops: int = 0,
) -> dict[str, Any]:
    provider = Provider(what, call)
    if device.type == "cuda":  # the device's time, not that of Python calling it
        provider = replayed(provider)
    samples = timing.measure([provider], device, rounds, seconds)[what]
    low, median, high = samples.quantiles()
    return {
        "what": what,
        "p20_ms": low * 1e3,
        "p50_ms": median * 1e3,
        "p80_ms": high * 1e3,
        "bytes_moved": moved,
        "flops": flops,
        "gb_per_s": moved / median / 1e9 if moved else None,
        "tflop_per_s": flops / median / 1e12 if flops else None,
        **environment,
    }
