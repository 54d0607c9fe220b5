"""Accuracy by setting: training with a recipe over a grid of widths, settings and seeds.

The images only score, but for runs on real images, which learn from them and are no result. The last epoch is the
result; accuracies of the epochs before it are kept and choose nothing.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import adadfq
from adadfq import files, scoring
from adadfq.checkpoint import load_weights, read_state_dict
from adadfq.errors import AdadfqError, CheckpointError, InvalidInputError
from adadfq.models import BUILTINS
from benchmarks import held_out_images, unfinished
from benchmarks.accuracy_grid import Grid, Run, public_name
from benchmarks.authors_training import AuthorsTraining
from benchmarks.authors_training import check as check_authors
from benchmarks.decoded_images import DecodedImages
from benchmarks.epoch_scores import EpochScores
from benchmarks.real_images import WITHOUT_EFFECT, RealImages
from benchmarks.turns import EXIT_UNFINISHED

Row = dict[str, Any]

#: Who trains: this project, the authors' code, or this project on the scoring images in the place of generated ones.
OURS, AUTHORS, REAL = "adadfq", "authors", "real images"
PLAYERS = {OURS: "adadfq", AUTHORS: "authors' code", REAL: "on real images"}

#: What :meth:`adadfq.HeldOut.score` gives.
SIGNALS = ("agreement", "loss", "kl", "mirrored_agreement", "mirrored_kl")

#: Fields that tell runs apart. The commit is not among them: a grid goes on after a change elsewhere.
IDENTITY = (
    *("player", "model", "weights_sha256", "data", "images", "recipe", "weight_bits", "act_bits", "settings", "seed"),
    *("recipe_digest", "device", "threads"),
)


def player_name(row: Mapping[str, Any]) -> str:
    """What its player is called."""
    return PLAYERS.get(row["player"], row["player"])


class RunsTakenError(AdadfqError):
    """Other processes train some of a grid's runs."""

    exit_status = EXIT_UNFINISHED


def key(row: Mapping[str, Any]) -> str:
    """What a row is of, by :data:`IDENTITY`."""
    return json.dumps([row[name] for name in IDENTITY], sort_keys=True)


def load_teacher(model: str, weights: Path | None, num_classes: int) -> nn.Module:
    """The float network in eval mode.

    Raises:
        InvalidInputError: it cannot be built, or a built-in has no weights.
        CheckpointError: the weights cannot be read or do not fit.
    """
    if weights is None and model in BUILTINS:
        raise InvalidInputError(f"model {model!r} has no weights of its own; give them with --weights FILE")
    teacher = adadfq.build_model(model, **({"num_classes": num_classes} if model in BUILTINS else {}))
    if weights is not None:
        load_weights(teacher, read_state_dict(weights), weights)
    return teacher.eval()


class _Teacher:
    """The float network for one shape of images, its accuracy, and what its students are scored on."""

    def __init__(
        self,
        model: str,
        weights: Path | None,
        data: Path,
        recipe: adadfq.Recipe,
        device: torch.device,
        real_images: bool,
    ) -> None:
        images = scoring.open_images(
            data, recipe.image_size, recipe.num_classes, recipe.mean, recipe.std, recipe.image_channels
        )
        self.images = DecodedImages(images, recipe.image_channels, device)
        self.network = load_teacher(model, weights, recipe.num_classes)
        #: What has to be the same where a run goes on; the images only for one that learns from them.
        self.known = {"model": _digest_of_code(self.network, model)}
        if real_images:
            self.known["pixels"] = _digest(self.images.pixels())
        self.accuracy = scoring.accuracy(self.network, self.images, device=device).top1


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.cpu().numpy().tobytes()).hexdigest()


def _digest_of_code(network: nn.Module, spec: str) -> str:
    """Of the files that define the network: that of its specification, and those of its modules' classes and bases."""
    where = spec.rpartition(":")[0]
    paths = {str(Path(where).expanduser()), getattr(sys.modules.get(where), "__file__", None) or ""}
    for kind in {base for module in network.modules() for base in type(module).__mro__}:
        with suppress(TypeError, OSError):  # a class without a file, as of a prompt
            paths.add(inspect.getfile(kind))
    digests = sorted({files.sha256(path) for path in paths if Path(path).is_file()})
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def train_grid(
    grid: Grid,
    weights: Path | None,
    data: Path,
    environment: Mapping[str, Any],
    done: Callable[[], Sequence[Mapping[str, Any]]] = list,
    authors: Path | None = None,
    folder: Path | None = None,
    say: Callable[[str], None] = print,
    elsewhere: Callable[[Row], Row | None] = lambda _: None,
    real_images: bool = False,
) -> Iterator[Row]:
    """Train what is not among `done`; a row a run, see :data:`benchmarks.store.FIELDS`, as soon as it is there.

    Args:
        done: gives the rows that are there; asked before every run, for what others have added meanwhile.
        authors: a checkout of the authors' code, which then trains in this project's place.
        folder: where held-out images and this project's unfinished runs are kept for the next call, and runs are told
            from those that other processes have begun (:mod:`benchmarks.unfinished`); None: nowhere.
        say: is told what takes time before the first row.
        elsewhere: given what is known of a row before it is trained, gives the row if another grid has it: grids share
            their bases.
        real_images: train on the scoring images, without their labels, in the place of generated ones.

    Raises:
        InvalidInputError: model, weights, recipe and images do not fit together, or the authors' code lacks a setting
            or is to train on real images.
        KeyboardInterrupt: a run was interrupted; it has no row, and goes on in the next call with the same `folder`.
        RunsTakenError: at the end, where other processes still train some of the runs.
    """

    def is_done(row: Row) -> bool:
        return key(row) in {key(other) for other in done()}

    runs = check_grid(grid, authors, real_images)
    player = REAL if real_images else OURS if authors is None else AUTHORS
    left: list[Row] = []
    known = {} if folder is None else unfinished.known(environment)
    teachers: dict[Any, _Teacher] = {}
    held_out: dict[Any, adadfq.HeldOut] = {}
    digest = None if weights is None else files.sha256(weights)
    device = torch.device(environment["device"])
    for run in runs:
        recipe = run.recipe
        inputs = (recipe.num_classes, recipe.image_size, recipe.image_channels, recipe.mean, recipe.std)
        if inputs not in teachers:
            teachers[inputs] = _Teacher(grid.model, weights, data, recipe, device, real_images)
        teacher = teachers[inputs]
        row = {
            "player": player,
            "model": public_name(grid.model),
            "weights": None if weights is None else weights.name,
            "weights_sha256": digest,
            "data": data.name,
            "images": len(teacher.images),
            "recipe": grid.recipe,
            "weight_bits": run.weight_bits,
            "act_bits": run.act_bits,
            "settings": run.settings,
            "recipe_digest": run.digest,
            "base_digest": run.base_digest,
            "variant": run.variant,
            "seed": run.seed,
            "warmup_epochs": recipe.warmup_epochs,
            "lambda_l": recipe.lambda_l,
            "lambda_u": recipe.lambda_u,
            "teacher_accuracy": teacher.accuracy,
            **environment,
        }
        if is_done(row):
            if folder is not None:
                unfinished.forget(folder, key(row))
            continue
        if inputs not in held_out:
            held_out[inputs] = held_out_images.make(teacher.network, recipe, folder, say)
        row["held_out_digest"] = held_out[inputs].digest
        place = None
        if folder is not None:
            of_run = {"held_out_digest": row["held_out_digest"], **teacher.known}
            place = unfinished.take(folder, key(row), {**known, **of_run})
            if place is None:
                left.append(row)
                say(f"seed {run.seed} of {run.weight_bits}w{run.act_bits}a {run.variant}: another process trains it")
                continue
        with place or nullcontext():
            if not is_done(row):  # by the process that had the place until now
                other = elsewhere(row)
                if other is None and place is not None:
                    other = place.row()
                if other is not None:
                    yield other | {"variant": run.variant, "base_digest": run.base_digest}
                else:
                    scorer = EpochScores(teacher.images, held_out[inputs], recipe.warmup_epochs, place)
                    student = adadfq.quantize(teacher.network, run.weight_bits, run.act_bits)
                    if authors is None:
                        generator = RealImages(teacher.images, recipe) if real_images else None
                        row |= _train(run, teacher.network, student, generator, scorer, device, place, say)
                    else:
                        row |= _train_authors(run, teacher.network, student, scorer, device, authors)
                    if place is not None:
                        place.keep_row(row)
                    yield row
            if place is not None:
                place.remove()
    if missing := sum(not is_done(row) for row in left):
        raise RunsTakenError(f"{missing} of {len(runs)} runs were left to other processes: repeat this when they end")


def check_grid(grid: Grid, authors: Path | None, real_images: bool = False) -> list[Run]:
    """The grid's runs.

    Raises:
        InvalidInputError: see :meth:`benchmarks.accuracy_grid.Grid.runs`; the authors' code lacks a setting or is to
            train on real images; or a variant changes nothing there.
    """
    if authors is not None and real_images:
        raise InvalidInputError("the authors' code trains on no real images: leave out --authors or --real-images")
    runs = grid.runs()
    for run in runs if real_images else ():
        if run.variant and set(run.variant) <= set(WITHOUT_EFFECT):
            raise InvalidInputError(f"{run.variant} is of the generator, whose place real images take: nothing differs")
    for run in runs if authors is not None else ():
        check_authors(run.recipe)
    return runs


def _train(
    run: Run,
    teacher: nn.Module,
    student: nn.Module,
    generator: nn.Module | None,
    scorer: EpochScores,
    device: torch.device,
    place: unfinished.Place | None,
    say: Callable[[str], None],
) -> Row:
    trainer = adadfq.Trainer(
        teacher, student, run.recipe, generator, seed=run.seed, device=device, progress=False, on_epoch_end=scorer
    )
    metrics: Mapping[str, float] = {}
    out = None if place is None else place.training
    goes_on = place is not None and place.go_on(say)

    def fit() -> None:
        nonlocal metrics
        try:
            if place is not None:
                scorer.take_up(place.scores)
            result = trainer.fit(out, resume=goes_on)
        except CheckpointError as error:
            if place is None or not goes_on:
                raise
            say(f"begun anew: {error}")
            place.begin_anew()
            scorer.take_up({})
            result = trainer.fit(out)
        if result.status != "complete":
            raise KeyboardInterrupt
        metrics = result.metrics

    row = _result(run, scorer, trainer, fit)
    return row | {
        "losses_student": [means["loss_student"] for means in trainer.epoch_metrics],
        "h_prime_quantiles": [list(quantiles) for quantiles in trainer.epoch_h_prime],
        "agreement": metrics.get("agreement"),
        "h_prime": metrics.get("h_prime"),
    }


def _train_authors(
    run: Run, teacher: nn.Module, student: nn.Module, scorer: EpochScores, device: torch.device, checkout: Path
) -> Row:
    training = AuthorsTraining(
        teacher, student, run.recipe, seed=run.seed, device=device, checkout=checkout, on_epoch_end=scorer
    )
    row = _result(run, scorer, training, training.fit)
    # Their trainer keeps neither of H' nor of the agreement.
    missing = {"h_prime_quantiles": None, "agreement": None, "h_prime": None}
    return row | {"losses_student": training.losses_student, **missing}


def _result(run: Run, scorer: EpochScores, trainer: Any, fit: Callable[[], None]) -> Row:
    """`fit`, and what both players' rows have."""
    recipe, error = run.recipe, None
    try:
        fit()
    except InvalidInputError:
        raise
    except AdadfqError as diverged:
        error = str(diverged)
    training = trainer.epoch_seconds[recipe.warmup_epochs :]
    nearest = 0 < recipe.warmup_epochs and recipe.calibration_epochs <= recipe.warmup_epochs
    return {
        "status": "ok" if error is None else "diverged",
        "error": error,
        "accuracies": scorer.accuracies,
        "accuracy": scorer.accuracies[-1] if error is None else None,
        # As warm-up leaves it: weights untouched, min/max ranges of the images seen so far, which no longer move.
        "round_to_nearest": scorer.accuracies[0] if nearest and scorer.accuracies else None,
        **{f"held_out_{name}": [found[name] for found in scorer.signals] for name in SIGNALS},
        "train_seconds": sum(trainer.epoch_seconds),
        "epoch_seconds": trainer.epoch_seconds,
        "epoch_cpu_seconds": trainer.epoch_cpu_seconds,
        "steps": trainer.step,
        "images_seen": trainer.step * recipe.batch_size,
        "step_ms": 1e3 * statistics.median(training) / recipe.steps_per_epoch if training else None,
    }


@dataclass(frozen=True)
class Summary:
    """All seeds of one variant.

    Attributes:
        label: what is varied.
        rows: one a seed.
        accuracies: of the last epoch, one a seed that did not diverge.
        diverged: how many did.
        round_to_nearest: mean over the seeds.
        ms_per_image: median over the seeds; while the student trains.
    """

    label: str
    rows: tuple[Row, ...]
    accuracies: tuple[float, ...]
    diverged: int
    round_to_nearest: float | None
    teacher: float
    steps: int
    ms_per_image: float | None

    @property
    def mean(self) -> float | None:
        """Mean accuracy; None where every seed diverged."""
        return statistics.fmean(self.accuracies) if self.accuracies else None

    @property
    def deviation(self) -> float | None:
        """Sample deviation of the accuracies; None with fewer than two."""
        return statistics.stdev(self.accuracies) if len(self.accuracies) > 1 else None

    def average(self, of: Callable[[Row], float | None]) -> float | None:
        """Mean of a number over the seeds that did not diverge and have it; None where none has."""
        values = [value for row in self.rows if row["status"] == "ok" and (value := of(row)) is not None]
        return statistics.fmean(values) if values else None


def summarize(rows: Sequence[Row]) -> list[Summary]:
    """Rows by variant, in the order of their first rows."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(key({**row, "seed": None}), []).append(row)
    summaries = []
    for found in groups.values():
        first = min(found, key=lambda row: len(row["variant"]))  # seeds may be of several grids
        varied = " ".join(f"{name}={value}" for name, value in first["variant"].items()) or "as set"
        ok = [row for row in found if row["status"] == "ok"]
        nearest = [row["round_to_nearest"] for row in found if row["round_to_nearest"] is not None]
        times = [row["step_ms"] * row["steps"] / row["images_seen"] for row in found if row["step_ms"] is not None]
        summaries.append(
            Summary(
                label=varied if first["player"] == OURS else f"{varied}, {player_name(first)}",
                rows=tuple(found),
                accuracies=tuple(row["accuracy"] for row in ok),
                diverged=len(found) - len(ok),
                round_to_nearest=statistics.fmean(nearest) if nearest else None,
                teacher=first["teacher_accuracy"],
                steps=first["steps"],
                ms_per_image=statistics.median(times) if times else None,
            )
        )
    return summaries
