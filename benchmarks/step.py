"""Measuring one training step of the game: time, memory and where the time goes, of every player.

The players take turns in one process, each on networks of its own, which begin equal and with frozen ranges, as they
are in all but the first epochs. Their first step, on equal noise and labels, must agree with the reference in the
losses and in both gradients; later ones drift apart, for training amplifies every rounding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adadfq import files
from adadfq.errors import InvalidInputError
from adadfq.models.build import BUILTINS
from adadfq.ops import dispatch
from adadfq.ops.schema import OPERATORS
from benchmarks import memory, timing
from benchmarks.breakdown import PARTS, breakdown, profiled, ranges
from benchmarks.contest import Setting, Start, Step, exact_float32
from benchmarks.players import KINDS, OURS, Kind, Player, Unavailable
from benchmarks.providers import Provider
from benchmarks.room import Room
from benchmarks.turns import check_device


@dataclass(frozen=True)
class Tolerance:
    """How far the checked step may be from the reference's."""

    loss: float
    """Of the reference's loss: a rounding tie may move a logit."""
    cosine: float
    """Least cosine between the gradients: a tie early in the student moves many further on."""
    length: float
    """Of the length of the reference's gradient."""


#: Precision -> what is allowed for the shallow networks that are built in.
TOLERANCES = {"float32": Tolerance(0.005, 0.99, 0.02), "bfloat16": Tolerance(0.05, 0.9, 0.2)}
#: For deeper ones: with random weights, and none of the order that training brings, every code that a rounding moves
#: early in the student moves more of them further on, and turns the gradients. In bfloat16 little is left of their
#: direction.
DEEP = {"float32": Tolerance(0.02, 0.7, 0.3), "bfloat16": Tolerance(0.05, -1.0, 0.5)}
#: Fewer than an operator gets: a step of a large network takes seconds.
MIN_ROUNDS = 3
#: Steps that are profiled, but one where it takes longer than :data:`benchmarks.timing.LONG`.
PROFILED = 3
#: Calls before anything is measured: on a GPU, adadfq records its graph in one of the first.
WARM_UP = {"cuda": 5}
#: Losses below this are as good as 0.
NOTHING = 1e-4


@dataclass
class Entry:
    """One player of a case, and what is known of it."""

    kind: Kind
    row: dict[str, Any]
    player: Player | None = None
    graph_bytes: int = 0
    """Memory of its CUDA graphs, which the allocator does not count as used between their replays."""
    step: Step | None = field(default=None, repr=False)

    def provider(self, name: str | None = None) -> Provider:
        assert self.player is not None
        return Provider(name or self.kind.name, self.player, backend=self.kind.backend)


def chosen(patterns: Sequence[str]) -> tuple[Kind, ...]:
    """The kinds whose names fit one of `patterns`, and the reference, which checks them.

    Raises:
        InvalidInputError: a pattern fits none.
    """
    names = [kind.name for kind in KINDS]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise InvalidInputError(f"providers: {pattern!r} fits none of {', '.join(names)}")
    return tuple(
        kind for kind in KINDS if kind is KINDS[-1] or any(fnmatchcase(kind.name, pattern) for pattern in patterns)
    )


def run_step(
    setting: Setting,
    device: torch.device,
    environment: dict[str, Any],
    rounds: int,
    seconds: float,
    authors: Path | None = None,
    patterns: Sequence[str] = ("*",),
) -> list[dict[str, Any]]:
    """One row a player; see :data:`benchmarks.store.FIELDS`.

    Raises:
        InvalidInputError: the model, the recipe or the sizes do not fit together, or a pattern fits no player.
    """
    kinds = [kind for kind in chosen(patterns) if device.type in kind.devices]
    entries = prepared(setting, device, environment, authors, kinds)
    timed = [entry for entry in entries if entry.row["status"] == "ok"]
    samples = timing.measure([entry.provider() for entry in timed], device, rounds, seconds, MIN_ROUNDS)
    for entry in timed:
        finish(entry, samples[entry.kind.name], device)
    return [entry.row for entry in entries]


def prepared(
    setting: Setting,
    device: torch.device,
    environment: dict[str, Any],
    authors: Path | None,
    kinds: Sequence[Kind],
) -> list[Entry]:
    """Players that have made their checked step; the rows say who was not right, or could not play and why."""
    entries = [Entry(kind, _row(setting, kind, environment)) for kind in kinds]
    if (reason := Room(setting, device, len(kinds)).why_not()) is not None:
        for entry in entries:
            entry.row |= {"status": "unavailable", "error": reason}
        return entries
    start = Start(setting, device)
    noise, labels = start.draw()
    for entry in entries:
        what = f"{entry.kind.name} on {setting.case()}"
        try:
            _enter(entry, start, authors, noise, labels)
        except RuntimeError:
            check_device(device, what)
            raise
        check_device(device, what)
    want = entries[-1].step
    assert want is not None
    for entry in entries:
        tolerance = tolerance_for(setting, entry.kind)
        if entry.step is not None and (error := difference(entry.step, want, tolerance)):
            entry.row |= {"status": "wrong", "error": error}
        entry.step = None  # its gradients
    return entries


def _enter(entry: Entry, start: Start, authors: Path | None, noise: Tensor, labels: Tensor) -> None:
    kind, device = entry.kind, start.device
    before = memory.graph_bytes(device)
    with Provider(kind.name, lambda: None, backend=kind.backend).active():
        try:
            entry.player = kind.build(start, authors)
            with exact_float32():
                entry.step = _copied(entry.player.checked(noise, labels))
            for _ in range(WARM_UP.get(device.type, 1)):
                entry.player()
        except (Unavailable, torch.OutOfMemoryError, torch._dynamo.exc.TorchDynamoException) as error:
            lines = str(error).strip().splitlines() or [""]
            reason = lines[0] if isinstance(error, Unavailable) else f"{type(error).__name__}: {lines[0]}"
            entry.row |= {"status": "unavailable", "error": reason}
            entry.player = entry.step = None
            if device.type == "cuda":
                torch.cuda.empty_cache()
            return
        entry.row["backend"] = None if kind.backend is None else _served(device)
    entry.graph_bytes = memory.graph_bytes(device) - before


def _copied(step: Step) -> Step:
    """The next step writes over the gradients."""
    copies = (
        {name: None if gradient is None else gradient.detach().clone() for name, gradient in gradients.items()}
        for gradients in (step.generator, step.student)
    )
    return Step(step.loss_generator, step.loss_student, *copies)


def finish(entry: Entry, samples: timing.Samples, device: torch.device) -> None:
    """Put into the row of `entry` what was measured, and measure its memory and the shares of its parts."""
    player, row = entry.player, entry.row
    assert player is not None
    low, median, high = samples.quantiles()
    with entry.provider().active():
        peak = memory.peak_bytes(player, device, replaces=True) + entry.graph_bytes
        steps = PROFILED if median < timing.LONG else 1
        shares = breakdown(player.eagerly, player.parts, player.quantizers, device, steps)
    row |= {
        "rounds": len(samples.values),
        "repeats": samples.repeats,
        "p20_ms": low * 1e3,
        "p50_ms": median * 1e3,
        "p80_ms": high * 1e3,
        "peak_memory_bytes": peak,
        "images_per_s": row["batch_size"] / median,
        "parts": {part: shares[part] for part in PARTS},
    }


def write_trace(path: Path, setting: Setting, device: torch.device) -> None:
    """Write a Chrome trace of one step of this project's player, its parts marked, after two that warm up.

    Raises:
        InvalidInputError: the model, the recipe or the sizes do not fit together, or there is no such directory.
    """
    kind = next(kind for kind in KINDS if kind.name == OURS)
    with Provider(kind.name, lambda: None, backend=kind.backend).active():
        player = kind.build(Start(setting, device), None)
        player.eagerly()
        with files.atomic_write(path) as temporary, ranges(player.parts, player.quantizers):
            player.eagerly()
            profiled(player.eagerly, device).export_chrome_trace(str(temporary))
        if device.type == "cuda":  # the timeline that counts: of a graph, in which no range is
            for _ in range(WARM_UP["cuda"]):
                player()
            with files.atomic_write(path.with_name(f"{path.stem}-replayed{path.suffix}")) as temporary:
                profiled(player, device).export_chrome_trace(str(temporary))


def _row(setting: Setting, kind: Kind, environment: dict[str, Any]) -> dict[str, Any]:
    recipe = setting.resolved()
    return {
        "case": setting.case(),
        "provider": kind.name,
        "backend": None,
        "status": "ok",
        "error": None,
        "rounds": None,
        "repeats": None,
        "p20_ms": None,
        "p50_ms": None,
        "p80_ms": None,
        "peak_memory_bytes": None,
        "model": setting.model,
        "recipe": recipe.name,
        "image_size": recipe.image_size,
        "batch_size": setting.batch_size,
        "weight_bits": setting.weight_bits,
        "act_bits": setting.act_bits,
        "precision": kind.precision,
        "images_per_s": None,
        "parts": None,
        **environment,
    }


def _served(device: torch.device) -> str:
    """Who serves the operators, in float32: "cpu", or "cuda + reference" where one does not have them all."""
    return " + ".join(dict.fromkeys(dispatch.select(op, device.type, torch.float32) for op in OPERATORS))


def tolerance_for(setting: Setting, kind: Kind) -> Tolerance:
    """What the checked step of `kind` may be off."""
    return (TOLERANCES if setting.model in BUILTINS else DEEP)[kind.precision]


def difference(got: Step, want: Step, tolerance: Tolerance) -> str | None:
    """What of `got` is not near `want`; None where all is."""
    for name in ("loss_generator", "loss_student"):
        found, expected = getattr(got, name), getattr(want, name)
        if not math.isfinite(found) or abs(found - expected) > tolerance.loss * abs(expected) + NOTHING:
            return f"{name} of the checked step is {found:.4g}, the reference's {expected:.4g}"
    for name in ("generator", "student"):
        found, expected = getattr(got, name), getattr(want, name)
        if missing := [key for key in expected if expected[key] is not None and found.get(key) is None]:
            return f"the {name} has no gradient for {missing[0]} in the checked step"
        keys = [key for key in expected if expected[key] is not None]
        one, other = (torch.cat([gradients[key].double().flatten() for key in keys]) for gradients in (found, expected))
        cosine = float(torch.nn.functional.cosine_similarity(one, other, dim=0))
        if not cosine >= tolerance.cosine:
            return f"the {name}'s gradient in the checked step has cosine {cosine:.4g} with the reference's"
        ratio = float(one.norm() / other.norm())
        if not abs(ratio - 1) <= tolerance.length:
            return f"the {name}'s gradient in the checked step is {ratio:.4g} times as long as the reference's"
    return None
