"""Cases one after the other: one that never ends, or takes the device with it, costs the others nothing."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from adadfq.errors import AdadfqError

__all__ = ["EXIT_STUCK", "DeviceLostError", "check_device", "in_turn"]

#: Status of a process that ended itself within a case.
EXIT_STUCK = 3
_AGAIN = "the same command with --resume goes on with the others and comes to it last"

Case = TypeVar("Case")


class DeviceLostError(AdadfqError):
    """No call of this process to the device can succeed any more."""


def check_device(device: torch.device, what: str) -> None:
    """Ask the device whether it still answers.

    Raises:
        DeviceLostError: it does not, since `what`.
    """
    if device.type != "cuda":
        return
    try:
        torch.cuda.synchronize(device)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise DeviceLostError(f"{what}: {reason}; the device is lost to this process: {_AGAIN}") from error


def in_turn(
    cases: Mapping[str, Case],
    play: Callable[[Case], None],
    content: dict[str, Any],
    write: Callable[[], None],
    last: str | None = None,
    limit: float | None = None,
    case_limit: float | None = None,
) -> None:
    """Play the cases, while the file says at each moment which are still to come.

    Args:
        cases: by name.
        play: puts the rows of a case into `content`.
        content: of the file; `left_out` names the case that is played, and then those behind it.
        write: writes `content`.
        last: the case that was played when an earlier call was cut off, and so goes last.
        limit: begin no case after so many seconds.
        case_limit: end the process, with :data:`EXIT_STUCK`, within a case that takes longer: what waits for a device
            cannot be interrupted.
    """
    waiting = list(cases)
    if last in waiting:
        waiting.append(waiting.pop(waiting.index(last)))
    start = time.monotonic()
    while waiting:
        content["left_out"] = list(waiting)
        write()
        if limit is not None and time.monotonic() - start > limit:
            return
        with _watched(waiting[0], case_limit):
            play(cases[waiting[0]])
        del waiting[0]
    content["left_out"] = []
    write()


@contextmanager
def _watched(name: str, seconds: float | None) -> Iterator[None]:
    if seconds is None:
        yield
        return
    timer = threading.Timer(seconds, _give_up, (name, seconds))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _give_up(name: str, seconds: float) -> None:
    sys.stdout.flush()
    print(f"error: {name} took longer than {seconds:g} s: {_AGAIN}", file=sys.stderr, flush=True)
    os._exit(EXIT_STUCK)
