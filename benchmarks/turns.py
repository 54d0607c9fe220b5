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

__all__ = ["EXIT_UNFINISHED", "STRIKES", "DeviceLostError", "check_device", "given_up", "in_turn"]

#: Status of a command that the same command is to go on with.
EXIT_UNFINISHED = 75
#: A case that has hung, or lost the device, so often is begun no more.
STRIKES = 2
_AGAIN = "the same command with --resume goes on with the others, and comes to it last"

Case = TypeVar("Case")


class DeviceLostError(AdadfqError):
    """No call of this process to the device can succeed any more."""

    exit_status = EXIT_UNFINISHED


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
    limit: float | None = None,
    case_limit: float | None = None,
) -> None:
    """Play the cases, while the file says at each moment which are still to come.

    Args:
        cases: by name.
        play: puts the rows of a case into `content`.
        content: of the file. `left_out` names the case that is played and those still to come. `cut_off` counts how
            often a case was begun and did not end, for whatever reason: the more often, the later its turn. `stuck`
            counts how often it hung or lost the device: from :data:`STRIKES` on it has no turn.
        write: writes `content`.
        limit: begin no case after so many seconds.
        case_limit: end the process, with :data:`EXIT_UNFINISHED`, within a case that takes longer: what waits for a
            device cannot be interrupted.
    """
    begun, stuck = content.setdefault("cut_off", {}), content.setdefault("stuck", {})
    lost = [name for name in cases if stuck.get(name, 0) >= STRIKES]
    waiting = sorted((name for name in cases if name not in lost), key=lambda name: begun.get(name, 0))
    start = time.monotonic()
    while True:
        content["left_out"] = [*waiting, *lost]
        if not waiting or (limit is not None and time.monotonic() - start > limit):
            write()
            return
        name = waiting[0]
        begun[name] = begun.get(name, 0) + 1
        write()

        def strike(name: str = name) -> None:
            stuck[name] = stuck.get(name, 0) + 1
            write()

        try:
            with _watched(name, case_limit, strike):
                play(cases[name])
        except DeviceLostError:
            strike()
            raise
        del begun[name], waiting[0]
        stuck.pop(name, None)


def given_up(content: Mapping[str, Any]) -> list[str]:
    """The cases that have no turn any more."""
    return [name for name in content["left_out"] if content.get("stuck", {}).get(name, 0) >= STRIKES]


@contextmanager
def _watched(name: str, seconds: float | None, strike: Callable[[], None]) -> Iterator[None]:
    if seconds is None:
        yield
        return
    timer = threading.Timer(seconds, _give_up, (name, seconds, strike))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _give_up(name: str, seconds: float, strike: Callable[[], None]) -> None:
    strike()
    sys.stdout.flush()
    print(f"error: {name} took longer than {seconds:g} s: {_AGAIN}", file=sys.stderr, flush=True)
    os._exit(EXIT_UNFINISHED)
