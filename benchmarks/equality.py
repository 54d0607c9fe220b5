"""Is it the same training, however it is run? Two ways play from one start, and their losses are compared by step.

Training amplifies every rounding, so that sums in another order part two ways after some steps: until then they are to
be equal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

import adadfq
from adadfq.game import METRICS
from benchmarks.contest import Setting, Start, exact_float32

#: Losses that differ by no more than this share, or by next to nothing, are equal.
SHARE, NOTHING = 1e-3, 1e-5
LOSSES = ("loss_generator", "loss_student")
#: (generator's loss, student's loss) of each step.
Losses = Iterator[tuple[float, float]]


def _played(trainer: adadfq.Trainer) -> Losses:
    """Steps as users run them, on noise that the trainer draws: from a CUDA graph where it captures."""
    while True:
        yield _losses(trainer.play())


def _given(trainer: adadfq.Trainer, seed: int) -> Losses:
    """Steps on noise that is drawn on the CPU, whatever the device."""
    random = torch.Generator().manual_seed(seed)
    recipe, device = trainer.recipe, next(trainer.generator.parameters()).device
    while True:
        noise = torch.randn(recipe.batch_size, recipe.latent_dim, generator=random)
        labels = torch.randint(recipe.num_classes, (recipe.batch_size,), generator=random)
        yield _losses(trainer.game.step(noise.to(device), labels.to(device), train_student=True))


def _losses(metrics: torch.Tensor) -> tuple[float, float]:
    values = dict(zip(METRICS, metrics.tolist(), strict=True))
    return values[LOSSES[0]], values[LOSSES[1]]


@dataclass(frozen=True)
class Pair:
    """Two ways.

    Attributes:
        first, second: their names.
        play: of each, from a start to the losses.
        needed: so many steps at least must be equal. Graphs are recorded in the fourth. Where sums have another order
            it is one: a code at a tie moves the second. Their gradients are what benchmarks/step.py compares.
        devices: types of device on which the pair is played.
        cpu_way: the one of the two that is played on the CPU.
        most_steps: as a CPU takes its time.
    """

    first: str
    second: str
    play: dict[str, Callable[[Start], Losses]]
    needed: int
    devices: tuple[str, ...]
    cpu_way: str | None = None
    most_steps: int | None = None

    @property
    def name(self) -> str:
        """Such as "graph against eager"."""
        return f"{self.first} against {self.second}"


def _trainer(start: Start, **how: Any) -> adadfq.Trainer:
    return adadfq.Trainer(
        start.teacher(), start.student(), start.recipe, start.generator(),
        seed=start.setting.seed, device=start.device, progress=False, **how,
    )  # fmt: skip


def _eager(start: Start) -> Losses:
    return _played(_trainer(start, capture=False))


PAIRS = (
    # What the device's own library does not repeat, no other pair can be asked for.
    Pair("eager", "eager again", {"eager": _eager, "eager again": _eager}, needed=8, devices=("cuda",)),
    Pair(
        "graph",
        "eager",
        {
            "graph": lambda start: _played(_trainer(start, capture=True)),
            "eager": _eager,
        },
        needed=8,
        devices=("cuda",),
    ),
    Pair(
        "GPU",
        "CPU",
        {
            "GPU": lambda start: _given(_trainer(start, capture=False), start.setting.seed),
            "CPU": lambda start: _given(_trainer(start), start.setting.seed),
        },
        needed=1,
        devices=("cuda",),
        cpu_way="CPU",
        most_steps=10,
    ),
    Pair(
        "fused",
        "layer by layer",
        {
            "fused": _eager,
            "layer by layer": lambda start: _played(_trainer(start, capture=False, fuse=False)),
        },
        needed=1,
        devices=("cpu", "cuda"),
    ),
)


def run_equality(
    setting: Setting, steps: int, device: torch.device, environment: dict[str, Any]
) -> list[dict[str, Any]]:
    """One row a pair that the device allows; see :data:`benchmarks.store.FIELDS`."""
    rows = []
    for pair in PAIRS:
        if device.type not in pair.devices:
            continue
        losses = {}
        for way in (pair.first, pair.second):
            # The start is made on the CPU, from the seed: the same weights wherever they go.
            start = Start(setting, torch.device("cpu"))
            start.move(torch.device("cpu") if way == pair.cpu_way else device)
            played = pair.play[way](start)
            with exact_float32():
                losses[way] = [next(played) for _ in range(pair.most_steps or steps)]
        first, second = losses[pair.first], losses[pair.second]
        same = equal_steps(first, second)
        enough = same >= min(pair.needed, len(first))
        rows.append(
            {
                "pair": pair.name,
                "case": setting.case(),
                "steps": len(first),
                "equal_steps": same,
                "needed_steps": pair.needed,
                "status": "ok" if enough else "wrong",
                "error": None if enough else f"part after {same} steps, {pair.needed} are to be equal",
                "losses_first": [list(values) for values in first],
                "losses_second": [list(values) for values in second],
                **environment,
            }
        )
    return rows


def equal_steps(first: list[tuple[float, float]], second: list[tuple[float, float]]) -> int:
    """Steps from the first on in which both losses are equal (:data:`SHARE`); NaN equals nothing."""
    for i, (ours, theirs) in enumerate(zip(first, second, strict=True)):
        if not all(abs(a - b) <= SHARE * max(abs(a), abs(b)) + NOTHING for a, b in zip(ours, theirs, strict=True)):
            return i
    return len(first)
