"""Trainer: the schedule, the loop, checkpoints and metrics around :class:`adadfq.game.Game`."""

from __future__ import annotations

import copy
import math
import os
import shutil
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adadfq import files, optimizers, resume_state
from adadfq.capture import CapturedStep
from adadfq.checkpoint import write_state_dict
from adadfq.convert import QUANTIZING, module_bits, quantized_info
from adadfq.errors import AdadfqError, InvalidInputError
from adadfq.fusion import fuse as fuse_network
from adadfq.fusion import is_fused, with_features
from adadfq.game import METRICS, REPLAY_METRICS, Game, draw_noise
from adadfq.generator import build_generator
from adadfq.metrics import MetricBuffer, MetricLog, Progress
from adadfq.nn import QuantAct, QuantConv2d, frozen_ranges, has_step, set_calibrating, step_sizes
from adadfq.players import check_generator, check_network, check_players
from adadfq.ranges import fix_weight_steps, shrink_act_ranges
from adadfq.recipe import Recipe
from adadfq.result import CHECKPOINT, RESULT, Result, save_result
from adadfq.schedule import generator_factor, student_factor

__all__ = ["H_PRIME_QUANTILES", "Trainer"]

#: Of an epoch's H' that :attr:`Trainer.epoch_h_prime` keeps.
H_PRIME_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
#: Generated batches on which activation ranges of least error are found.
RANGE_BATCHES = 8
#: Least time from one checkpoint to the next, in seconds and in times that the last one took to write: on a GPU an
#: epoch may take less, and a bank of images may be gigabytes.
CHECKPOINT_SECONDS, CHECKPOINT_SHARE = 10.0, 20


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
        fuse: play with fused networks (:func:`adadfq.fuse`): the same tensors in fewer passes over memory. `student`
            itself stays as it is. A network that cannot be fused plays as it is, with a warning; with a recipe that
            matches features (``feature_weight``) it is refused.
        capture: replay each step as a CUDA graph; default, on CUDA devices. Hooks and other Python in the networks
            then run only while the graph is recorded: four times at the start of every phase, and after an
            `on_epoch_end` that put other tensors in place or changed an optimizer's settings. Without graphs
            (``capture=False``) whatever it changes counts.
        progress: show progress on stderr.
        on_epoch_end: called as ``on_epoch_end(epoch, trainer)`` after each epoch, counted from 0, for instance to
            score ``trainer.student``.

    Raises:
        InvalidInputError: the models do not fit the recipe or each other, the teacher has no BatchNorm, a network is
            not float32 or not finite, the student is not quantised, or `capture` without a CUDA device. The student
            and the generator are then as they were.
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
        fuse: bool = True,
        capture: bool | None = None,
        progress: bool = True,
        on_epoch_end: Callable[[int, Trainer], None] | None = None,
    ) -> None:
        if not isinstance(recipe, Recipe):
            raise InvalidInputError(f"recipe must be an adadfq.Recipe, got {type(recipe).__name__}")
        if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**63:
            raise InvalidInputError(f"seed must be an integer in 0..2^63 - 1, got {seed!r}")
        for name, model in (("teacher", teacher), ("student", student)):
            check_network(name, model)
        if teacher is student or not module_bits(student):
            raise InvalidInputError(
                "student must be a quantised model: adadfq.quantize(teacher, weight_bits, act_bits)"
            )
        if own := has_step(student):
            raise InvalidInputError(
                f"the student's quantisers must have no steps of their own, {own[0]} has: it was trained already; make "
                "a new one with adadfq.quantize(), or call forget_step() on layers and learn_step(False) on activations"
            )
        info = quantized_info(student)
        if info is None and any(recipe.by_weight_bits.values()):
            raise InvalidInputError(
                f"recipe {recipe.name} differs by width and the student was not made by adadfq.quantize(): "
                "pass recipe.for_weight_bits(bits)"
            )
        self.recipe = recipe.for_weight_bits(info.weight_bits) if info else recipe
        if generator is None:
            with torch.random.fork_rng(devices=[]), torch.device("cpu"):
                # Not torch.manual_seed, which would reseed every GPU too.
                torch.default_generator.manual_seed(seed)
                generator = build_generator(self.recipe)
        check_generator(generator, self.recipe)
        if self.recipe.epochs <= self.recipe.warmup_epochs:
            warnings.warn(
                f"the student will not train: it starts after warmup_epochs={self.recipe.warmup_epochs} of "
                f"epochs={self.recipe.epochs}; the result is round to nearest over calibrated ranges",
                stacklevel=2,
            )
        elif self.recipe.epochs <= self.recipe.calibration_epochs and _changes_quantizers(self.recipe):
            warnings.warn(
                f"ranges move to the end (calibration_epochs={self.recipe.calibration_epochs} of "
                f"epochs={self.recipe.epochs}): learn_steps, weight_range and act_range, which begin after, do nothing",
                stacklevel=2,
            )
        self.seed = seed
        self.device = torch.device(device) if device is not None else next(teacher.parameters()).device
        self.capture = self.device.type == "cuda" if capture is None else capture
        if self.capture and self.device.type != "cuda":
            raise InvalidInputError(f"capture needs a CUDA device, got {self.device}: leave it out")
        self.progress, self.on_epoch_end = progress, on_epoch_end
        self.teacher = copy.deepcopy(teacher).to(self.device).eval().requires_grad_(False)
        were = [(model, next(model.parameters()).device, _modes(model)) for model in (student, generator)]
        try:
            self.student = student.to(self.device).eval()
            self.generator = generator.to(self.device).train()
            self._unreached = check_players(self.teacher, self.student, self.generator, self.recipe)
            teacher_playing, student_playing = self._playing(fuse)
        except BaseException:
            for model, was_on, modes in were:
                model.to(was_on)
                for module, training in modes.items():
                    module.training = training
            raise
        self.random = torch.Generator(self.device).manual_seed(seed)
        self.optimizer_generator = optimizers.for_generator(self.generator, self.recipe)
        self.optimizer_student = optimizers.for_student(self.student, self.recipe)
        #: Of the learned step sizes, from when there are any.
        self.optimizer_steps: torch.optim.Optimizer | None = None
        self.log_steps: list[nn.Parameter] = []
        self.game = Game(
            teacher_playing,
            student_playing,
            self.generator,
            self.recipe,
            self.optimizer_generator,
            self.optimizer_student,
            copy.deepcopy(self.generator).requires_grad_(False) if self.recipe.generator_ema else None,
        )
        #: The steps of the present phase by kind, and what tells phases apart.
        self._captured: dict[str, tuple[Any, CapturedStep]] = {}
        #: What a recorded step has settled; looked up at every step, so found once.
        self._quantizers = [module for module in self.student.modules() if isinstance(module, QUANTIZING)]
        #: The strides that weights came with, while they have others.
        self._strides: dict[nn.Parameter, tuple[int, ...]] | None = None
        self.epoch, self.step = 0, 0
        #: Means of :data:`adadfq.game.METRICS` over each epoch played so far.
        self.epoch_metrics: list[dict[str, float]] = []
        self._directory: Path | None = None
        self._checkpoint_due = -math.inf
        self._used = False
        #: Quantiles of H' over all samples of an epoch, at :data:`H_PRIME_QUANTILES`; one tuple an epoch.
        self.epoch_h_prime: list[tuple[float, ...]] = []
        #: Seconds that the steps of each epoch took, without checkpoints, logs and `on_epoch_end`.
        self.epoch_seconds: list[float] = []
        #: Seconds of the processor in them.
        self.epoch_cpu_seconds: list[float] = []
        # Of the epoch in progress: metrics, for its mean, H' [B] of its steps, and both kinds of seconds.
        self._rows: list[dict[str, float]] = []
        self._h_prime: list[Tensor] = []
        self._spent = [0.0, 0.0]
        #: Whether the student's quantisers are as its training wants them.
        self._begun = False
        #: Learning rates as the optimizers have them.
        self._rates: dict[torch.optim.Optimizer, float] = {}

    def _playing(self, fuse: bool) -> tuple[nn.Module, nn.Module]:
        """Teacher and student as they play."""
        if self.recipe.feature_weight:
            try:
                teacher, student, _ = with_features(self.teacher, self.student, fuse)
            except InvalidInputError as error:
                raise InvalidInputError(f"{error} (without feature_weight=0 the blocks' outputs are needed)") from error
            return teacher, student
        if fuse:
            return _fused("teacher", self.teacher), _fused("student", self.student)
        return self.teacher, self.student

    def play(self, train_student: bool = True) -> Tensor:
        """Play one step on noise and labels drawn from the trainer's random state; see :meth:`adadfq.game.Game.step`.

        Counts no step and changes no phase: :meth:`fit` does, and calls this. From the first call to the end of
        :meth:`fit`, weights of convolutions are channels_last. The result is overwritten by the next call.
        """
        return self._play("step", partial(self._draw_and_step, train_student), train_student)

    def replay(self) -> Tensor:
        """Play one step of the student alone, as :meth:`play`; see :meth:`adadfq.game.Game.replay`.

        With a bank, after a step in which the student trained.

        Raises:
            InvalidInputError: the bank is empty.
        """
        if self.game.bank is not None and self.game.bank.is_empty:
            raise InvalidInputError("the bank is empty: play(train_student=True) fills it")
        return self._play("replay", partial(self.game.replay, self.random), True)

    def _play(self, kind: str, step: Callable[[], Tensor], train_student: bool) -> Tensor:
        if self._strides is None:
            self._lay_out()
        if not self.capture:
            return step()
        phase = (
            train_student,
            *((_bits(module), getattr(module, "_calibrating", None)) for module in self._quantizers),
        )
        if kind not in self._captured or self._captured[kind][0] != phase:
            self._captured.pop(kind, None)  # its memory first
            self._captured[kind] = (phase, CapturedStep(step, self.device, self.random))
        return self._captured[kind][1]()

    def _lay_out(self) -> None:
        """Make the weights of plain convolutions channels_last."""
        self._strides = {}
        averaged = () if self.game.averaged is None else (self.game.averaged,)
        for model in (self.teacher, self.student, self.generator, *averaged):
            for module in model.modules():
                if type(module) in (nn.Conv2d, QuantConv2d) and module.weight not in self._strides:
                    self._strides[module.weight] = module.weight.stride()
                    module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)
        self._lay_out_optimizers()

    def _restore_layouts(self) -> None:
        """Give the weights the strides they came with."""
        self._captured = {}
        for weight, strides in (self._strides or {}).items():
            weight.data = torch.empty_strided(weight.shape, strides, dtype=weight.dtype, device=weight.device).copy_(
                weight.data
            )
            weight.grad = None
        self._strides = None
        self._lay_out_optimizers()

    def _lay_out_optimizers(self) -> None:
        """Fused optimizers walk a weight and its state by address: they must be laid out alike."""
        for optimizer in (self.optimizer_generator, self.optimizer_student, self.optimizer_steps):
            if optimizer is None:
                continue
            for weight, state in optimizer.state.items():
                for name, value in state.items():
                    if isinstance(value, torch.Tensor) and value.shape == weight.shape:
                        state[name] = torch.empty_like(weight).copy_(value)

    def _draw_and_step(self, train_student: bool) -> Tensor:
        noise, labels = draw_noise(self.recipe, self.random)
        return self.game.step(noise, labels, train_student, self.random)

    def _begin_student(self) -> None:
        """What happens to the student's quantisers when its training starts and its ranges stand still."""
        recipe = self.recipe
        if recipe.act_range == "mse":
            shrink_act_ranges(self.student, self._some_images())
        if recipe.learn_steps or recipe.weight_range == "mse":
            fix_weight_steps(self.student, recipe.weight_range, next(self._some_images()))
        if recipe.learn_steps:
            self._learn_steps()
        self._captured = {}  # a recorded step would go on without the new ones

    def _learn_steps(self, logarithms: list[Tensor] | None = None) -> None:
        """Make the step sizes parameters, their logarithms those given or taken from them."""
        for name, module in self.student.named_modules():
            if isinstance(module, QUANTIZING) and name not in self._unreached:
                module.learn_step()
        steps = step_sizes(self.student)
        if logarithms is None:
            logarithms = [step.detach().log() for step in steps]
        #: Of the learned step sizes, what the optimizer moves.
        self.log_steps = [nn.Parameter(value.to(self.device)) for value in logarithms]
        self.optimizer_steps = optimizers.for_step_sizes(self.log_steps, self.recipe)
        self.game.learn_steps(list(zip(steps, self.log_steps, strict=True)), self.optimizer_steps)
        self._captured = {}

    def _some_images(self) -> Iterator[Tensor]:
        """Batches of generated images to look at, as the networks are shown them."""
        with torch.no_grad():
            for _ in range(RANGE_BATCHES):
                yield self.game.images(*draw_noise(self.recipe, self.random), self.random)

    def fit(self, out: str | os.PathLike[str] | None = None, resume: bool = False) -> Result:
        """Train for the recipe's epochs.

        Ctrl-C ends the run after the step in progress, with the student as far as it came, written and loadable like a
        complete one; the checkpoint beside it lets ``resume=True`` go on to the same result as an unbroken run. A run
        that is killed goes on from its last checkpoint: after the first epoch, and after every later one that ends ten
        seconds or more, and twenty times as long as writing it took, after the one before.

        Args:
            out: new directory for the result (see :mod:`adadfq.result`); None keeps everything in memory.
            resume: go on from the checkpoint in `out`.

        Returns:
            :class:`adadfq.Result`.

        Raises:
            InvalidInputError: `out` exists, `resume` without it, or a second call: a trainer trains once.
            CheckpointError: the checkpoint cannot be read, or is of another recipe, seed, student or teacher, or has
                no epoch left.
            AdadfqError: a loss is no longer finite; the last checkpoint remains.
        """
        if self._used:
            raise InvalidInputError("this Trainer has already run; make a new one (fit(out, resume=True) goes on)")
        directory = Path(out) if out is not None else None
        if resume:
            if directory is None:
                raise InvalidInputError("resume needs the directory of the run to go on with")
            resume_state.restore(self, directory)
            (directory / RESULT).unlink(missing_ok=True)
        elif directory is not None:
            files.new_directory(directory)
            write_state_dict(directory / "teacher.safetensors", self.teacher.state_dict())
        self._directory, self._used = directory, True
        self._captured = {}

        recipe = self.recipe
        buffer = MetricBuffer(METRICS, recipe.steps_per_epoch, self.device)
        log = MetricLog(directory, keep_steps=self.step)
        progress = Progress(recipe.epochs, recipe.steps_per_epoch, self.step, self.progress)
        means: dict[str, float] = {}
        try:
            with _interrupts() as interrupted:
                while self.epoch < recipe.epochs and not interrupted():
                    since = time.perf_counter(), time.process_time()
                    rows = self._play_epoch(buffer, progress, interrupted)
                    self._spent[0] += time.perf_counter() - since[0]
                    self._spent[1] += time.process_time() - since[1]
                    log.write(self.step - len(rows), self.epoch, rows)
                    self._check_finite(rows)
                    self._rows += rows
                    if self._rows:
                        means = _means(self._rows)
                    if self.step < (self.epoch + 1) * recipe.steps_per_epoch:
                        break
                    self._end_epoch(progress, means)
        finally:
            log.close()
            progress.close()
            self._restore_layouts()
            for module in self._quantizers:
                if isinstance(module, QuantAct) or module.weight_scale is not None:
                    module.learn_step(False)  # what was learned stays, as a buffer

        complete = self.epoch >= recipe.epochs
        if self.step == 0:
            if directory is not None and not resume:
                shutil.rmtree(directory)  # made above, and worth nothing yet
            raise KeyboardInterrupt
        if not complete and directory is not None:
            resume_state.save(self, directory / CHECKPOINT)
        self._freeze()
        status = "complete" if complete else "interrupted"
        result = Result(self.student, recipe, self.seed, status, self.step, means, directory)
        if directory is not None:
            save_result(directory, result, self.teacher, self.generator)
            if complete:
                (directory / CHECKPOINT).unlink(missing_ok=True)
        return result

    def _play_epoch(
        self, buffer: MetricBuffer, progress: Progress, interrupted: Callable[[], bool]
    ) -> list[dict[str, float]]:
        """Play to the end of the present epoch, or to an interrupt; returns the metrics of the steps played."""
        recipe = self.recipe
        if self.epoch < recipe.calibration_epochs:
            set_calibrating(self.student, True)
        else:
            self._freeze()
        first = self.step
        if first == recipe.warmup_epochs * recipe.steps_per_epoch:
            self.game.start_average()
        if not self._begun and self.epoch >= max(recipe.warmup_epochs, recipe.calibration_epochs):
            self._begun = True
            self._begin_student()
        while self.step < (self.epoch + 1) * recipe.steps_per_epoch and not interrupted():
            self._set_learning_rates()
            if self._is_replay(self.step):
                buffer.add(self.replay())
            else:
                buffer.add(self.play(self.epoch >= recipe.warmup_epochs))
                self._h_prime.append(self.game.h_prime.clone())
            self.step += 1
            progress.step()
        rows = buffer.drain()
        for step, row in enumerate(rows, first):
            if self._is_replay(step):
                for name in set(METRICS) - set(REPLAY_METRICS):
                    del row[name]
        return rows

    def _is_replay(self, step: int) -> bool:
        trained = step - self.recipe.warmup_epochs * self.recipe.steps_per_epoch
        return trained >= 0 and trained % (self.recipe.replays + 1) != 0

    def _end_epoch(self, progress: Progress, means: dict[str, float]) -> None:
        recipe = self.recipe
        phase = "train" if self.epoch >= recipe.warmup_epochs else "warm-up"
        progress.epoch(self.epoch, phase, means)
        self.epoch_metrics.append(means)
        self.epoch += 1
        self._rows = []
        self.epoch_h_prime.append(_quantiles(self._h_prime))
        self.epoch_seconds.append(self._spent[0])
        self.epoch_cpu_seconds.append(self._spent[1])
        self._h_prime, self._spent = [], [0.0, 0.0]
        if self.epoch == recipe.calibration_epochs:
            self._freeze()
        if self.on_epoch_end is not None:
            before = self._memory()
            # Images shown to the student there are not to move its ranges: they may be real ones.
            with frozen_ranges(self.student):
                self.on_epoch_end(self.epoch - 1, self)
            self.student.eval()
            self.generator.train()
            if self._memory() != before:
                self._captured = {}  # it has put other tensors in place, or changed what optimizers read of Python
        if self._directory is not None and self.epoch < recipe.epochs and time.monotonic() >= self._checkpoint_due:
            begun = time.monotonic()
            resume_state.save(self, self._directory / CHECKPOINT)
            written = time.monotonic()
            self._checkpoint_due = written + max(CHECKPOINT_SECONDS, CHECKPOINT_SHARE * (written - begun))

    def _memory(self) -> list[Any]:
        """Where the tensors lie that a recorded step reads and writes, and the numbers that it has of optimizers."""
        if not self._captured:
            return []
        game = self.game
        models = (game.teacher, game.student, self.generator, *((game.averaged,) if game.averaged is not None else ()))
        found: list[Any] = [tensor for model in models for tensor in (*model.parameters(), *model.buffers())]
        found += self.log_steps
        for optimizer in (self.optimizer_generator, self.optimizer_student, self.optimizer_steps):
            if optimizer is not None:
                found += [value for state in optimizer.state.values() for value in state.values()]
                for group in optimizer.param_groups:
                    found += [value for name, value in group.items() if name != "params"]
        return [value.data_ptr() if isinstance(value, Tensor) else value for value in found]

    def _freeze(self) -> None:
        """Freeze every range; quantisers the forward pass never reaches have none and need none."""
        set_calibrating(self.student, False, without_range=self._unreached)

    def _set_learning_rates(self) -> None:
        """Those of the next step; written only where they change."""
        recipe = self.recipe
        factors = generator_factor(recipe, self.step), student_factor(recipe, self.step)
        rates = [(self.optimizer_generator, recipe.lr_generator * factors[0])]
        rates.append((self.optimizer_student, recipe.lr_student * factors[1]))
        if self.optimizer_steps is not None:
            rates.append((self.optimizer_steps, recipe.lr_steps * factors[1]))
        for optimizer, rate in rates:
            if self._rates.get(optimizer) != rate:
                self._rates[optimizer] = rate
                for group in optimizer.param_groups:
                    group["lr"].fill_(rate)

    def _check_finite(self, rows: list[dict[str, float]]) -> None:
        for i, row in enumerate(rows):
            for name in ("loss_generator", "loss_student"):
                if not math.isfinite(row.get(name, 0.0)):
                    step = self.step - len(rows) + i
                    raise AdadfqError(
                        f"{name} is {row[name]} at step {step} (epoch {self.epoch + 1}): training diverged; lower "
                        "lr_student or lr_generator, or check the teacher on real input"
                    )


def _fused(name: str, model: nn.Module) -> nn.Module:
    try:
        return model if is_fused(model) else fuse_network(model)
    except InvalidInputError as error:
        warnings.warn(f"the {name} plays unfused, which takes longer: {error}", stacklevel=3)
        return model


def _changes_quantizers(recipe: Recipe) -> bool:
    return recipe.learn_steps or "mse" in (recipe.weight_range, recipe.act_range)


def _means(rows: list[dict[str, float]]) -> dict[str, float]:
    """Mean of each metric over the rows that have it."""
    found = {name: [row[name] for row in rows if name in row] for name in METRICS}
    return {name: sum(values) / len(values) for name, values in found.items() if values}


def _quantiles(h_prime: list[Tensor]) -> tuple[float, ...]:
    values = torch.cat(h_prime).double()
    wanted = torch.tensor(H_PRIME_QUANTILES, dtype=values.dtype, device=values.device)
    return tuple(torch.quantile(values, wanted).tolist())


def _bits(module: Any) -> int:
    return int(module.act_bits if isinstance(module, QuantAct) else module.weight_bits)


def _modes(model: nn.Module) -> dict[nn.Module, bool]:
    return {module: module.training for module in model.modules()}


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
