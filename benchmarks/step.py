"""Measuring one step of the game (:meth:`adadfq.game.Game.step`).

The players take turns, each on networks of its own. The reference takes everybody's first step, which calibrates; then
the ranges are frozen, as they are when time is taken. The next step, from equal networks, noise and labels, must agree
in the losses and in the direction of both gradients; later ones drift apart, for training amplifies every rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import adadfq
from adadfq.game import METRICS
from adadfq.nn import set_calibrating
from adadfq.ops import dispatch
from adadfq.ops.schema import OPERATORS
from benchmarks import memory, timing
from benchmarks.providers import REFERENCE, Provider

#: How far the losses of the checked step may be from the reference's, of these: a rounding tie may move a logit.
TOLERANCE = 0.02
#: Losses below this are as good as 0.
NOTHING = 1e-4
#: Least cosine between the gradients of the checked step and the reference's.
COSINE = 0.99
#: Metrics that are compared; the others count argmaxes.
_COMPARED = tuple(i for i, name in enumerate(METRICS) if name.startswith("loss") or name == "h_prime")


@dataclass(frozen=True)
class Setting:
    """What is trained."""

    model: str = "resnet20"
    recipe: str = "cifar10_resnet20"
    image_size: int | None = None
    batch_size: int = 16
    weight_bits: int = 4
    act_bits: int = 4
    seed: int = 1

    def resolved(self) -> adadfq.Recipe:
        """The recipe with what this setting overrides.

        Raises:
            InvalidInputError: there is no such recipe, or a value does not fit.
        """
        overrides: dict[str, Any] = {"batch_size": self.batch_size}
        if self.image_size is not None:
            overrides["image_size"] = self.image_size
        return adadfq.Recipe.named(self.recipe, **overrides)


class _Player:
    """A trainer, stepping with both networks in training."""

    def __init__(self, setting: Setting, device: torch.device) -> None:
        recipe = setting.resolved()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(setting.seed)
            teacher = adadfq.build_model(setting.model, num_classes=recipe.num_classes).eval()
        student = adadfq.quantize(teacher, setting.weight_bits, setting.act_bits)
        self.trainer = adadfq.Trainer(teacher, student, recipe, seed=setting.seed, device=device, progress=False)
        self.random = torch.Generator(device).manual_seed(setting.seed)

    def calibrate(self) -> None:
        """Calibrate and train on one batch, then freeze the ranges."""
        self()
        set_calibrating(self.trainer.student, False)

    def checked_step(self) -> list[Tensor]:
        """A step with frozen ranges: (losses, generator's gradient, student's)."""
        metrics = self()
        game = self.trainer.game
        players = (game.generator_parameters, game.student_parameters)
        gradients = [torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]) for parameters in players]
        return [metrics[list(_COMPARED)], *gradients]

    def __call__(self) -> Tensor:
        recipe, device = self.trainer.recipe, self.trainer.device
        noise = torch.randn(recipe.batch_size, recipe.latent_dim, generator=self.random, device=device)
        labels = torch.randint(recipe.num_classes, (recipe.batch_size,), generator=self.random, device=device)
        return self.trainer.game.step(noise, labels, train_student=True)


REFERENCE_BACKEND = "reference"


def _backend_player(name: str, backend: str | None) -> Callable[[Setting, torch.device], Provider]:
    def build(setting: Setting, device: torch.device) -> Provider:
        player = _Player(setting, device)
        with Provider(name, player, backend=REFERENCE_BACKEND).active():
            player.calibrate()
        return Provider(name, player, player.checked_step, backend)

    return build


#: Who can play. The last one's checked step is what the others' are compared with.
PLAYERS: dict[str, Callable[[Setting, torch.device], Provider]] = {
    "adadfq": _backend_player("adadfq", "auto"),
    REFERENCE: _backend_player(REFERENCE, REFERENCE_BACKEND),
}


def run_step(
    setting: Setting, device: torch.device, environment: dict[str, Any], rounds: int, seconds: float
) -> list[dict[str, Any]]:
    """One row a player; see :data:`benchmarks.store.FIELDS`.

    Raises:
        InvalidInputError: the model, the recipe or the sizes do not fit together.
    """
    recipe = setting.resolved()
    players = [build(setting, device) for build in PLAYERS.values()]
    results, served = {}, {}
    for player in players:
        assert player.results is not None
        with player.active():
            results[player.name] = player.results()
            served[player.name] = _served(device)
    want = results[players[-1].name]
    errors = {name: _error(got, want) for name, got in results.items()}
    right = [player for player in players if errors[player.name] is None]
    samples = timing.measure(right, device, rounds, seconds)
    rows = []
    for player in players:
        row = {
            "case": f"step/{setting.model}@{recipe.image_size}/b{recipe.batch_size}"
            f"/w{setting.weight_bits}a{setting.act_bits}",
            "provider": player.name,
            "backend": served[player.name],
            "status": "ok" if player in right else "wrong",
            "error": errors[player.name],
            "rounds": None,
            "repeats": None,
            "p20_ms": None,
            "p50_ms": None,
            "p80_ms": None,
            "peak_memory_bytes": None,
            "model": setting.model,
            "image_size": recipe.image_size,
            "batch_size": recipe.batch_size,
            "weight_bits": setting.weight_bits,
            "act_bits": setting.act_bits,
            "images_per_s": None,
            **environment,
        }
        if player in right:
            low, median, high = samples[player.name].quantiles()
            with player.active():
                peak = memory.peak_bytes(player.call, device)
            row |= {
                "rounds": len(samples[player.name].values),
                "repeats": samples[player.name].repeats,
                "p20_ms": low * 1e3,
                "p50_ms": median * 1e3,
                "p80_ms": high * 1e3,
                "peak_memory_bytes": peak,
                "images_per_s": recipe.batch_size / median,
            }
        rows.append(row)
    return rows


def _served(device: torch.device) -> str:
    """Who serves the operators, in float32: "cpu", or "cuda + reference" where one does not have them all."""
    return " + ".join(dict.fromkeys(dispatch.select(op, device.type, torch.float32) for op in OPERATORS))


def _error(got: list[Tensor], want: list[Tensor]) -> str | None:
    off = (got[0] - want[0]).abs() - TOLERANCE * want[0].abs() - NOTHING
    if not bool((off <= 0).all()):
        worst = int(off.nan_to_num(torch.inf).argmax())
        return (
            f"{METRICS[_COMPARED[worst]]} of the checked step is {float(got[0][worst]):.4g}, "
            f"the reference's {float(want[0][worst]):.4g}"
        )
    for name, gradient, expected in zip(("generator", "student"), got[1:], want[1:], strict=True):
        cosine = float(torch.nn.functional.cosine_similarity(gradient.double(), expected.double(), dim=0))
        if not cosine >= COSINE:
            return f"the {name}'s gradient in the checked step has cosine {cosine:.4g} with the reference's"
    return None
