"""Steps as CUDA graphs play what steps without them do, and wait for nothing; skipped without a GPU."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from test_gpu import no_synchronisation
from toy import toy_recipe, toy_teacher

import adadfq
from adadfq.capture import EAGER_STEPS, CapturedStep
from adadfq.convert import module_bits, set_module_bits
from adadfq.nn import set_calibrating

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]

PRECISION = pytest.mark.parametrize("precision", ["float32", "bfloat16"])
#: Sums in another order, and what training makes of them in some steps.
CLOSE = {"float32": {"rtol": 1e-3, "atol": 1e-4}, "bfloat16": {"rtol": 3e-2, "atol": 1e-2}}
#: (whether the student trains, whether ranges move), as a run has them one after the other.
PHASES = ((False, True), (True, True), (True, False))
#: Enough that some are replayed.
STEPS = EAGER_STEPS + 3


def _trainer(capture: bool, precision: str = "float32", **overrides: Any) -> adadfq.Trainer:
    teacher = toy_teacher()
    student = adadfq.quantize(teacher, 8, 8)
    recipe = toy_recipe(precision=precision, **overrides)
    return adadfq.Trainer(teacher, student, recipe, seed=3, device="cuda", capture=capture, progress=False)


def _captured(trainer: adadfq.Trainer) -> CapturedStep:
    assert trainer._captured is not None
    return trainer._captured[1]


def _replaying(trainer: adadfq.Trainer) -> adadfq.Trainer:
    """`trainer`, whose next step with both networks in training is a replay."""
    for _ in range(EAGER_STEPS + 1):
        trainer.play()
    assert _captured(trainer).is_captured
    return trainer


def _play(trainer: adadfq.Trainer, steps: int, train_student: bool = True) -> torch.Tensor:
    """Metrics of some steps, [steps, metrics]."""
    return torch.stack([trainer.play(train_student).clone() for _ in range(steps)])


def _assert_close(trainer: adadfq.Trainer, other: adadfq.Trainer, precision: str) -> None:
    for ours, theirs in ((trainer.student, other.student), (trainer.generator, other.generator)):
        state = theirs.state_dict()
        for name, tensor in ours.state_dict().items():
            torch.testing.assert_close(tensor, state[name], **CLOSE[precision], msg=lambda m, name=name: f"{name}: {m}")


@PRECISION
def test_captured_steps_play_what_others_do(precision: str) -> None:
    """The same metrics, parameters, ranges, statistics and random numbers, in every phase."""
    captured, eager = _trainer(True, precision), _trainer(False, precision)
    graphs = []
    for train_student, calibrating in PHASES:
        rows = []
        for trainer in (captured, eager):
            set_calibrating(trainer.student, calibrating)
            rows.append(_play(trainer, STEPS, train_student))
        torch.testing.assert_close(*rows, **CLOSE[precision])
        _assert_close(captured, eager, precision)
        graphs.append(_captured(captured))
        assert graphs[-1].is_captured and eager._captured is None
    assert len(set(map(id, graphs))) == len(PHASES), "every phase has a graph of its own"
    draws = [torch.randn(64, generator=trainer.random, device="cuda") for trainer in (captured, eager)]
    assert torch.equal(*draws), "the random state is where it would be without graphs"


def test_replays_draw_the_numbers_that_steps_would() -> None:
    trainer = _trainer(True)
    recipe, step = trainer.recipe, trainer.game.step
    drawn = (
        torch.empty(recipe.batch_size, recipe.latent_dim, device="cuda"),
        torch.empty(recipe.batch_size, dtype=torch.int64, device="cuda"),
    )

    def recording_step(noise: torch.Tensor, labels: torch.Tensor, train_student: bool) -> torch.Tensor:
        drawn[0].copy_(noise)
        drawn[1].copy_(labels)
        return step(noise, labels, train_student)

    trainer.game.step = recording_step
    random = torch.Generator("cuda").manual_seed(trainer.seed)
    noises, metrics = [], []
    for _ in range(EAGER_STEPS + 5):
        metrics.append(trainer.play().clone())
        noise = torch.randn(recipe.batch_size, recipe.latent_dim, generator=random, device="cuda")
        labels = torch.randint(recipe.num_classes, (recipe.batch_size,), generator=random, device="cuda")
        assert torch.equal(drawn[0], noise) and torch.equal(drawn[1], labels)
        noises.append(noise)
    assert _captured(trainer).is_captured
    for i, (noise, row) in enumerate(zip(noises, metrics, strict=True)):
        for other_noise, other_row in zip(noises[:i], metrics[:i], strict=True):
            assert not torch.equal(noise, other_noise) and not torch.equal(row, other_row)


def test_other_bits_are_captured_anew() -> None:
    captured, eager = _trainer(True), _trainer(False)
    for trainer in (captured, eager):
        set_calibrating(trainer.student, True)
        _play(trainer, STEPS)
        set_calibrating(trainer.student, False)
        _play(trainer, STEPS)
    before = _captured(captured)
    rows = []
    for trainer in (captured, eager):
        set_module_bits(trainer.student, dict.fromkeys(module_bits(trainer.student), 2))
        rows.append(_play(trainer, STEPS))
    after = _captured(captured)
    assert after is not before and after.is_captured
    torch.testing.assert_close(*rows, **CLOSE["float32"])


def test_learning_rates_change_without_a_new_graph() -> None:
    trainer = _replaying(_trainer(True))
    graph = _captured(trainer)

    def changed() -> list[bool]:
        """Whether a step moves the parameters of the generator, and of the student."""
        networks = (trainer.generator, trainer.student)
        before = [[p.detach().clone() for p in network.parameters()] for network in networks]
        trainer.play()
        return [
            any(not torch.equal(p, old) for p, old in zip(network.parameters(), values, strict=True))
            for network, values in zip(networks, before, strict=True)
        ]

    assert changed() == [True, True]
    for group in trainer.optimizer_student.param_groups:
        group["lr"].fill_(0)
    assert changed() == [True, False]
    for group in trainer.optimizer_generator.param_groups:
        group["lr"].fill_(0)
    assert changed() == [False, False]
    for optimizer in (trainer.optimizer_student, trainer.optimizer_generator):
        for group in optimizer.param_groups:
            group["lr"].fill_(1e-2)
    assert changed() == [True, True]
    assert _captured(trainer) is graph


@PRECISION
@pytest.mark.parametrize("train_student,calibrating", [*PHASES, (False, False)])
def test_a_step_waits_for_nothing(precision: str, train_student: bool, calibrating: bool) -> None:
    for capture in (False, True):
        trainer = _trainer(capture, precision)
        _play(trainer, 1)  # gives the ranges something to be frozen at
        set_calibrating(trainer.student, calibrating)
        _play(trainer, STEPS, train_student)
        assert not capture or _captured(trainer).is_captured
        with no_synchronisation():
            for _ in range(3):
                trainer.play(train_student)


def test_waiting_would_be_an_error() -> None:
    with no_synchronisation(), pytest.raises(RuntimeError, match="synchroniz"):
        torch.ones(1, device="cuda").item()


def _fit(out: Path, precision: str, interrupted_after: int | None = None, resume: bool = False) -> adadfq.Result:
    trainer = _trainer(True, precision, steps_per_epoch=6)
    play, played = trainer.play, []

    def counting(train_student: bool = True) -> torch.Tensor:
        played.append(None)
        if len(played) == interrupted_after:
            signal.raise_signal(signal.SIGINT)
        return play(train_student)

    trainer.play = counting
    return trainer.fit(out, resume=resume)


@PRECISION
def test_an_interrupted_run_goes_on_to_the_same_result(tmp_path: Path, precision: str) -> None:
    unbroken = _fit(tmp_path / "unbroken", precision)
    # In the second epoch, after a replay of its graph.
    broken = _fit(tmp_path / "broken", precision, interrupted_after=6 + EAGER_STEPS + 2)
    assert (unbroken.status, broken.status) == ("complete", "interrupted")
    resumed = _fit(tmp_path / "broken", precision, resume=True)
    assert resumed.status == "complete" and resumed.steps == unbroken.steps
    tolerance = CLOSE[precision]
    assert resumed.metrics == pytest.approx(unbroken.metrics, rel=tolerance["rtol"], abs=tolerance["atol"])
    state = unbroken.student.state_dict()
    for name, tensor in resumed.student.state_dict().items():
        torch.testing.assert_close(tensor, state[name], **tolerance, msg=lambda m, name=name: f"{name}: {m}")
