"""Trainer: the schedule, the loop, checkpoints and metrics around :class:`adadfq.game.Game`."""

from __future__ import annotations

import copy
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adadfq import files
from adadfq.checkpoint import write_state_dict
from adadfq.convert import module_bits, quantized_info
from adadfq.errors import AdadfqError, CheckpointError, InvalidInputError
from adadfq.game import METRICS, Game
from adadfq.generator import build_generator
from adadfq.metrics import MetricBuffer, MetricLog, Progress
from adadfq.nn import activations, frozen_ranges, set_calibrating
from adadfq.recipe import Recipe
from adadfq.result import CHECKPOINT, RESULT, Result, save_result

__all__ = ["Trainer"]


class Trainer:
    """Trains a quantised student from its teacher without data.

    Args:
        teacher: float classifier with BatchNorm; a frozen copy is used, yours stays as it is.
        student: its quantised copy (:func:`adadfq.quantize`); trained in place.
        recipe: every setting; what depends on the width is settled from the student.
        generator: by default the one the recipe names, initialised from `seed`.
        seed: of the generator's weights, the noise and the labels. The same seed gives the same result on the same
            machine; torch's global random state is left alone.
        device: default, the teacher's.
        progress: show progress on stderr.
        on_epoch_end: called as ``on_epoch_end(epoch, trainer)`` after each epoch, counted from 0, for instance to
            score ``trainer.student``.

    Raises:
        InvalidInputError: the models do not fit the recipe or each other, the teacher has no BatchNorm, or the student
            has no activation quantiser or is in use elsewhere as float.
    """

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        recipe: Recipe,
        generator: nn.Module | None = None,
        *,
        seed: int = 0,
        device: str | torch.device | None = None,
        progress: bool = True,
        on_epoch_end: Callable[[int, Trainer], None] | None = None,
    ) -> None:
        if not isinstance(recipe, Recipe):
            raise InvalidInputError(f"recipe must be an adadfq.Recipe, got {type(recipe).__name__}")
        if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**63:
            raise InvalidInputError(f"seed must be an integer in 0..2^63 - 1, got {seed!r}")
        for name, model in (("teacher", teacher), ("student", student)):
            if not isinstance(model, nn.Module):
                raise InvalidInputError(f"{name} must be a torch.nn.Module, got {type(model).__name__}")
        if teacher is student or not module_bits(student):
            raise InvalidInputError(
                "student must be a quantised model: adadfq.quantize(teacher, weight_bits, act_bits)"
            )
        info = quantized_info(student)
        self.recipe = recipe.for_weight_bits(info.weight_bits) if info else recipe.replace(by_weight_bits={})
        self.seed = seed
        self.device = torch.device(device) if device is not None else next(teacher.parameters()).device
        self.progress, self.on_epoch_end = progress, on_epoch_end

        self.teacher = copy.deepcopy(teacher).to(self.device).eval().requires_grad_(False)
        if generator is None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                generator = build_generator(self.recipe)
        _check_generator(generator, self.recipe)
        self.generator = generator.to(self.device).train()
        self.student = student.to(self.device).eval()
        self.random = torch.Generator(self.device).manual_seed(seed)
        self._make_optimizers()
        self.game = Game(
            self.teacher, self.student, self.generator, self.recipe, self.optimizer_generator, self.optimizer_student
        )
        self._check_forward()
        self.epoch, self.step = 0, 0
        self._directory: Path | None = None

    def _make_optimizers(self) -> None:
        recipe = self.recipe
        trained = [p for p in self.student.parameters() if p.requires_grad]
        if not trained:
            raise InvalidInputError("the student has no parameter that requires a gradient: nothing would train")
        self.optimizer_generator = torch.optim.Adam(
            [p for p in self.generator.parameters() if p.requires_grad],
            lr=recipe.lr_generator,
            betas=(recipe.adam_betas[0], recipe.adam_betas[1]),
        )
        self.optimizer_student = torch.optim.SGD(
            trained,
            lr=recipe.lr_student,
            momentum=recipe.momentum,
            weight_decay=recipe.weight_decay,
            nesterov=recipe.nesterov,
        )

    @torch.no_grad()
    def _check_forward(self) -> None:
        """Run both networks once on noise: shapes are refused here, before anything moves."""
        recipe = self.recipe
        shape = (2, recipe.image_channels, recipe.image_size, recipe.image_size)
        images = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(self.device)
        for name, model in (("teacher", self.teacher), ("student", self.student)):
            try:
                with frozen_ranges(model):
                    logits = model(images)
            except AdadfqError:
                raise
            except (RuntimeError, ValueError, TypeError) as error:
                raise InvalidInputError(
                    f"the {name} does not take images of shape {list(shape)} (image_channels and image_size of the "
                    f"recipe): {error}"
                ) from error
            if not isinstance(logits, Tensor) or logits.dim() != 2:
                got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
                raise InvalidInputError(f"the {name} must return logits [B, K], got {got}")
            if logits.shape[1] != recipe.num_classes:
                raise InvalidInputError(
                    f"the {name} has {logits.shape[1]} classes and the recipe {recipe.num_classes}: "
                    f"set num_classes={logits.shape[1]}"
                )
        if not bool(torch.isfinite(logits).all()) and not activations(self.student):
            raise InvalidInputError("the student's logits are not finite")

    def fit(self, out: str | os.PathLike[str] | None = None, resume: bool = False) -> Result:
        """Train for the recipe's epochs.

        Ctrl-C ends the run after the step in progress, with the student as far as it came, written and loadable like a
        complete one; the checkpoint beside it lets ``resume=True`` go on to the same result as an unbroken run.

        Args:
            out: new directory for the result (see :mod:`adadfq.result`); None keeps everything in memory.
            resume: go on from the checkpoint in `out`.

        Returns:
            :class:`adadfq.Result`.

        Raises:
            InvalidInputError: `out` exists, or `resume` without it.
            CheckpointError: the checkpoint cannot be read or is of another recipe, seed or student.
            AdadfqError: a loss is no longer finite; the last epoch's checkpoint remains.
        """
        directory = Path(out) if out is not None else None
        if resume:
            if directory is None:
                raise InvalidInputError("resume needs the directory of the run to go on with")
            self._restore(directory / CHECKPOINT)
            (directory / RESULT).unlink(missing_ok=True)
        elif directory is not None:
            files.new_directory(directory)
            write_state_dict(directory / "teacher.safetensors", self.teacher.state_dict())
        self._directory = directory

        recipe = self.recipe
        buffer = MetricBuffer(METRICS, recipe.steps_per_epoch, self.device)
        log = MetricLog(directory, keep_steps=self.step)
        progress = Progress(recipe.epochs, recipe.steps_per_epoch, self.step, self.progress)
        means: dict[str, float] = {}
        try:
            with _interrupts() as interrupted:
                while self.epoch < recipe.epochs and not interrupted():
                    rows = self._play_epoch(buffer, progress, interrupted)
                    log.write(self.step - len(rows), self.epoch, rows)
                    means = {name: sum(row[name] for row in rows) / len(rows) for name in METRICS} if rows else means
                    self._check_finite(rows)
                    if self.step < (self.epoch + 1) * recipe.steps_per_epoch:
                        break
                    self._end_epoch(progress, means)
        finally:
            log.close()
            progress.close()

        complete = self.epoch >= recipe.epochs
        if self.step == 0:
            raise KeyboardInterrupt
        if not complete and directory is not None:
            self._save_checkpoint(directory / CHECKPOINT)
        set_calibrating(self.student, False)
        status = "complete" if complete else "interrupted"
        result = Result(self.student, recipe, self.seed, status, self.step, means, directory)
        if directory is not None:
            save_result(directory, result, self.generator)
            if complete:
                (directory / CHECKPOINT).unlink(missing_ok=True)
        return result

    def _play_epoch(
        self, buffer: MetricBuffer, progress: Progress, interrupted: Callable[[], bool]
    ) -> list[dict[str, float]]:
        """Play to the end of the present epoch, or to an interrupt; returns the metrics of the steps played."""
        recipe = self.recipe
        set_learning_rates(self)
        calibrating = self.epoch < recipe.calibration_epochs
        if self.step == self.epoch * recipe.steps_per_epoch:
            set_calibrating(self.student, calibrating)
        train_student = self.epoch >= recipe.warmup_epochs
        while self.step < (self.epoch + 1) * recipe.steps_per_epoch and not interrupted():
            noise = torch.randn(recipe.batch_size, recipe.latent_dim, generator=self.random, device=self.device)
            labels = torch.randint(recipe.num_classes, (recipe.batch_size,), generator=self.random, device=self.device)
            buffer.add(self.game.step(noise, labels, train_student))
            self.step += 1
            progress.step()
        return buffer.drain()

    def _end_epoch(self, progress: Progress, means: dict[str, float]) -> None:
        recipe = self.recipe
        phase = "train" if self.epoch >= recipe.warmup_epochs else "warm-up"
        progress.epoch(self.epoch, phase, means)
        self.epoch += 1
        if self.epoch == recipe.calibration_epochs:
            set_calibrating(self.student, False)
        if self.on_epoch_end is not None:
            self.on_epoch_end(self.epoch - 1, self)
        if self._directory is not None and self.epoch < recipe.epochs:
            self._save_checkpoint(self._directory / CHECKPOINT)

    def _check_finite(self, rows: list[dict[str, float]]) -> None:
        for i, row in enumerate(rows):
            for name in ("loss_generator", "loss_student"):
                if not torch.isfinite(torch.tensor(row[name])):
                    step = self.step - len(rows) + i
                    raise AdadfqError(
                        f"{name} is {row[name]} at step {step} (epoch {self.epoch + 1}): training diverged; lower "
                        "lr_student or lr_generator, or check the teacher on real input"
                    )

    def _settings(self) -> dict[str, Any]:
        """What a checkpoint must agree on; epochs may grow."""
        recipe = self.recipe.to_dict()
        recipe.pop("epochs")
        return {"recipe": recipe, "seed": self.seed, "bits": module_bits(self.student)}

    def _save_checkpoint(self, path: Path) -> None:
        state = {
            "settings": self._settings(),
            "epoch": self.epoch,
            "step": self.step,
            "student": self.student.state_dict(),
            "generator": self.generator.state_dict(),
            "optimizer_student": self.optimizer_student.state_dict(),
            "optimizer_generator": self.optimizer_generator.state_dict(),
            "random": self.random.get_state(),
        }
        with files.atomic_write(path) as file:
            torch.save(state, file)

    def _restore(self, path: Path) -> None:
        if not path.is_file():
            raise CheckpointError(f"there is no checkpoint to resume from at {path}")
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch.load raises whatever its zip and pickle readers do
            # The reader's own advice is to load it unsafely: only its first sentence is passed on.
            raise CheckpointError(f"{path} cannot be read: {str(error).splitlines()[0].split('. ')[0]}") from None
        ours = self._settings()
        theirs = state["settings"]
        differing = [k for k in ours["recipe"] if ours["recipe"][k] != theirs["recipe"].get(k)]
        differing += [k for k in ("seed", "bits") if ours[k] != theirs[k]]
        if differing:
            raise CheckpointError(
                f"{path} belongs to a run with other settings ({', '.join(differing)}): resume with the same ones"
            )
        self.student.load_state_dict(state["student"])
        self.generator.load_state_dict(state["generator"])
        self.optimizer_student.load_state_dict(state["optimizer_student"])
        self.optimizer_generator.load_state_dict(state["optimizer_generator"])
        self.random.set_state(state["random"])
        self.epoch, self.step = state["epoch"], state["step"]


def set_learning_rates(trainer: Trainer) -> None:
    """Step decay: both base rates times ``lr_decay`` for every milestone reached by the present epoch."""
    recipe = trainer.recipe
    factor = recipe.lr_decay ** sum(trainer.epoch >= milestone for milestone in recipe.lr_milestones)
    for optimizer, base in (
        (trainer.optimizer_generator, recipe.lr_generator),
        (trainer.optimizer_student, recipe.lr_student),
    ):
        for group in optimizer.param_groups:
            group["lr"] = base * factor


def _check_generator(generator: Any, recipe: Recipe) -> None:
    if not isinstance(generator, nn.Module):
        raise InvalidInputError(f"generator must be a torch.nn.Module, got {type(generator).__name__}")
    for name in ("num_classes", "latent_dim"):
        if (found := getattr(generator, name, None)) != getattr(recipe, name):
            raise InvalidInputError(
                f"the generator has {name}={found!r} and the recipe {getattr(recipe, name)}: make them agree"
            )


@contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C into a flag, so that the step in progress is finished; a second one raises.

    In threads other than the main one, where Python handles no signals, the flag stays down.
    """
    raised = False

    def handle(number: int, frame: Any) -> None:
        nonlocal raised
        if raised:
            raise KeyboardInterrupt
        raised = True

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield lambda: raised
    finally:
        signal.signal(signal.SIGINT, previous)
