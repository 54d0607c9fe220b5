"""Steps as CUDA graphs play what steps without them do, and wait for nothing; skipped without a GPU.

None of them has yet run on a GPU.
"""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from test_gpu import no_synchronisation
from toy import plus_settings, toy_recipe, toy_teacher

import adadfq
from adadfq.capture import EAGER_STEPS, CapturedStep
from adadfq.convert import module_bits, set_module_bits
from adadfq.nn import set_calibrating, step_sizes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
    pytest.mark.usefixtures("exact_convolutions"),
]

PRECISION = pytest.mark.parametrize("precision", ["float32", "bfloat16"])
#: Sums in another order, and what training makes of them in some steps.
CLOSE = {"float32": {"rtol": 1e-3, "atol": 1e-4}, "bfloat16": {"rtol": 3e-2, "atol": 1e-2}}
#: (whether the student trains, whether ranges move), as a run has them one after the other.
PHASES = ((False, True), (True, True), (True, False))
#: Enough that some are replayed.
STEPS = EAGER_STEPS + 3
_BANK = {"replays": 1, "bank_batches": 4}
_SHOWN = {"low_pass": 0.5, "crop": 1, "flip": True, "mirror_teacher": True}
#: What a graph could freeze: learned steps, Adam's state, block outputs, the bank's memory, an average's, power
#: iterations, random places.
OPTIONS: dict[str, dict[str, Any]] = {
    "adadfq_plus": plus_settings(),
    "adadfq_plus, bank": {**plus_settings(), **_BANK},
    "bank": _BANK,
    "average": {"replays": 1, "bank_batches": 0, "generator_ema": 0.5, "spectral_norm": True, **_SHOWN},
}


def _trainer(capture: bool, precision: str = "float32", **overrides: Any) -> adadfq.Trainer:
    teacher = toy_teacher()
    student = adadfq.quantize(teacher, 8, 8)
    recipe = toy_recipe(precision=precision, **overrides)
    return adadfq.Trainer(teacher, student, recipe, seed=3, device="cuda", capture=capture, progress=False)


def _captured(trainer: adadfq.Trainer, kind: str = "step") -> CapturedStep:
    return trainer._captured[kind][1]


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
        assert graphs[-1].is_captured and not eager._captured
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

    def recording_step(noise: torch.Tensor, labels: torch.Tensor, *others: Any) -> torch.Tensor:
        drawn[0].copy_(noise)
        drawn[1].copy_(labels)
        return step(noise, labels, *others)

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


def _begun(capture: bool, precision: str = "float32", **overrides: Any) -> adadfq.Trainer:
    """A trainer where a run has it when the student starts to train: ranges frozen, its quantisers prepared."""
    trainer = _trainer(capture, precision, **overrides)
    _play(trainer, 2, train_student=False)
    set_calibrating(trainer.student, False)
    trainer._begin_student()
    assert not trainer._captured, "what was recorded knows nothing of the steps"
    return trainer


def _take_turns(trainer: adadfq.Trainer, steps: int = STEPS) -> torch.Tensor:
    """Metrics of steps of both players, each followed by the replays that the recipe asks for: [all, metrics]."""
    rows = []
    for _ in range(steps):
        rows.append(trainer.play().clone())
        rows += [trainer.replay().clone() for _ in range(trainer.recipe.replays)]
    return torch.stack(rows)


def _trained(trainer: adadfq.Trainer) -> dict[str, list[torch.Tensor]]:
    """Copies of what training moves, by its kind."""
    averaged = trainer.game.averaged
    groups = {
        "generator": list(trainer.generator.parameters()),
        "weights": [p for group in trainer.optimizer_student.param_groups for p in group["params"]],
        "steps": list(step_sizes(trainer.student)),
        "average": [] if averaged is None else list(averaged.parameters()),
    }
    return {kind: [tensor.detach().clone() for tensor in tensors] for kind, tensors in groups.items()}


def _distance(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> float:
    return float(sum((a - b).double().square().sum() for a, b in zip(ours, theirs, strict=True))) ** 0.5


@PRECISION
@pytest.mark.parametrize("name", OPTIONS)
def test_captured_steps_and_replays_with_options_play_what_others_do(name: str, precision: str) -> None:
    """Two graphs take turns: the same metrics, training, bank and random numbers as without them."""
    captured, eager = (_begun(capture, precision, **OPTIONS[name]) for capture in (True, False))
    for trainer in (captured, eager):
        _take_turns(trainer, EAGER_STEPS)
    before = _trained(eager)
    rows = [_take_turns(trainer) for trainer in (captured, eager)]
    kinds = ["step", "replay"] if captured.recipe.replays else ["step"]
    assert list(captured._captured) == kinds and not eager._captured
    assert all(_captured(captured, kind).is_captured for kind in kinds)

    torch.testing.assert_close(rows[0], rows[1], rtol=0.05, atol=0.05, equal_nan=True)
    after, found = _trained(eager), _trained(captured)
    for kind, start in before.items():
        # Adam makes a whole step of a gradient's sign, and so of rounding: what counts is how far training went.
        moved = _distance(after[kind], start)
        assert _distance(found[kind], after[kind]) <= (0.1 if precision == "float32" else 0.3) * moved, kind
        assert (moved > 0) == bool(start), kind
    banks = [trainer.game.bank for trainer in (captured, eager)]
    if banks[0] is not None and banks[1] is not None:
        assert int(banks[0]._count) == int(banks[1]._count) == EAGER_STEPS + STEPS
    draws = [torch.randn(64, generator=trainer.random, device="cuda") for trainer in (captured, eager)]
    assert torch.equal(*draws), "the random state is where it would be without graphs"


def test_recorded_steps_fill_the_bank_and_recorded_replays_draw_from_it() -> None:
    trainer = _begun(True, **OPTIONS["bank"])
    bank, size = trainer.game.bank, trainer.recipe.batch_size
    assert bank is not None
    seen = torch.empty(size, 3, 8, 8, device="cuda")
    draw, slots = bank.draw, []

    def recording_draw(random: torch.Generator) -> Any:
        drawn = draw(random)
        seen.copy_(drawn[0])
        return drawn

    bank.draw = recording_draw  # type: ignore[method-assign]
    trainer.play()
    for stored in range(1, 40):
        before = bank._kept[0].clone()
        trainer.play()
        changed = [not torch.equal(*pair) for pair in zip(before.split(size), bank._kept[0].split(size), strict=True)]
        assert [slot for slot, new in enumerate(changed) if new] == [stored % bank.batches], "the oldest makes room"
        trainer.replay()
        same = [torch.equal(batch, seen) for batch in bank._kept[0].split(size)]
        assert sum(same) == 1, "a whole batch that is kept"
        slots.append(same.index(True))
    assert _captured(trainer).is_captured and _captured(trainer, "replay").is_captured
    assert set(slots[EAGER_STEPS:]) == set(range(bank.batches)), "not always the same"


def test_learning_rates_of_options_change_without_a_new_graph() -> None:
    trainer = _begun(True, **OPTIONS["adadfq_plus, bank"])
    _take_turns(trainer, EAGER_STEPS + 1)
    graphs = [_captured(trainer, kind) for kind in ("step", "replay")]
    assert all(graph.is_captured for graph in graphs)
    assert trainer.optimizer_steps is not None
    optimizers = {
        "generator": trainer.optimizer_generator,
        "weights": trainer.optimizer_student,
        "steps": trainer.optimizer_steps,
    }

    def moved(play: Any) -> set[str]:
        before = _trained(trainer)
        play()
        return {kind for kind, values in _trained(trainer).items() if _distance(values, before[kind]) > 0}

    def set_rates(rates: dict[str, float]) -> None:
        for kind, rate in rates.items():
            for group in optimizers[kind].param_groups:
                group["lr"].fill_(rate)

    assert moved(trainer.play) == {"generator", "weights", "steps"}
    assert moved(trainer.replay) == {"weights", "steps"}
    for kind, rate in (("steps", 0.0), ("weights", 0.0), ("weights", 1e-2), ("steps", 1e-2)):
        set_rates({kind: rate})
        training = {name for name in ("weights", "steps") if float(optimizers[name].param_groups[0]["lr"]) > 0}
        assert moved(trainer.replay) == training
        assert moved(trainer.play) == training | {"generator"}
    set_rates(dict.fromkeys(optimizers, 0.0))
    assert moved(trainer.play) == moved(trainer.replay) == set()
    assert [_captured(trainer, kind) for kind in ("step", "replay")] == graphs


def test_recorded_power_iterations_and_averages_go_on() -> None:
    trainer = _begun(True, **OPTIONS["average"])
    _take_turns(trainer, EAGER_STEPS + 1)
    averaged = trainer.game.averaged
    assert averaged is not None and _captured(trainer).is_captured and _captured(trainer, "replay").is_captured
    decay = trainer.recipe.generator_ema
    vectors = {name: buffer for name, buffer in trainer.generator.named_buffers() if name.endswith("._u")}
    assert len(vectors) == 4
    for _ in range(3):
        old_vectors, old = {name: u.clone() for name, u in vectors.items()}, _trained(trainer)["average"]
        trainer.play()
        for name, u in vectors.items():
            assert not torch.equal(u, old_vectors[name]), name
        pairs = zip(averaged.parameters(), old, trainer.generator.parameters(), strict=True)
        for average, was, now in pairs:
            torch.testing.assert_close(average, decay * was + (1 - decay) * now.detach())
        trainer.replay()


@PRECISION
@pytest.mark.parametrize("name", OPTIONS)
def test_a_step_with_options_waits_for_nothing(name: str, precision: str) -> None:
    for capture in (False, True):
        trainer = _begun(capture, precision, **OPTIONS[name])
        _take_turns(trainer)
        with no_synchronisation():
            _take_turns(trainer, 2)


def test_waiting_would_be_an_error() -> None:
    with no_synchronisation(), pytest.raises(RuntimeError, match="synchroniz"):
        torch.ones(1, device="cuda").item()


def _fit(
    out: Path, precision: str, interrupted_after: int | None = None, resume: bool = False, **overrides: Any
) -> adadfq.Result:
    trainer = _trainer(True, precision, steps_per_epoch=6, **overrides)
    play, played = trainer.play, []

    def counting(train_student: bool = True) -> torch.Tensor:
        played.append(None)
        if len(played) == interrupted_after:
            signal.raise_signal(signal.SIGINT)
        return play(train_student)

    trainer.play = counting  # type: ignore[method-assign]
    return trainer.fit(out, resume=resume)


@PRECISION
@pytest.mark.parametrize("name", [None, "adadfq_plus, bank"])
def test_an_interrupted_run_goes_on_to_the_same_result(tmp_path: Path, precision: str, name: str | None) -> None:
    options = {} if name is None else OPTIONS[name]
    unbroken = _fit(tmp_path / "unbroken", precision, **options)
    # After a replay of the graph of the student's training, and inside an epoch.
    broken = _fit(tmp_path / "broken", precision, interrupted_after=6 + EAGER_STEPS + 2, **options)
    assert (unbroken.status, broken.status) == ("complete", "interrupted")
    resumed = _fit(tmp_path / "broken", precision, resume=True, **options)
    assert resumed.status == "complete" and resumed.steps == unbroken.steps
    tolerance = CLOSE[precision] if name is None else {"rtol": 0.05, "atol": 0.02}
    assert resumed.metrics == pytest.approx(unbroken.metrics, rel=tolerance["rtol"], abs=tolerance["atol"])
    state = unbroken.student.state_dict()
    for key, tensor in resumed.student.state_dict().items():
        torch.testing.assert_close(tensor, state[key], **tolerance, msg=lambda m, key=key: f"{key}: {m}")


def test_a_graph_outlives_an_epochs_end_and_sees_what_changes_there() -> None:
    """Looking at the student there changes nothing; a weight in another place is played with."""
    results = []
    for capture in (True, False):
        graphs = []

        def look(epoch: int, trainer: adadfq.Trainer, graphs: list[Any] = graphs) -> None:
            trainer.student(torch.randn(4, 3, 8, 8, device="cuda", generator=torch.Generator("cuda").manual_seed(0)))
            graphs.append(trainer._captured["step"][1] if trainer._captured else None)
            if epoch == 3:
                weight = trainer.student.conv1.weight
                weight.data = (2 * weight.data).contiguous(memory_format=torch.channels_last)

        steps = EAGER_STEPS + 3
        trainer = _trainer(capture, epochs=6, warmup_epochs=1, calibration_epochs=1, steps_per_epoch=steps)
        trainer.on_epoch_end = look
        results.append((trainer, trainer.fit()))
        if capture:
            assert graphs[1] is graphs[2] is graphs[3] is not graphs[4] and graphs[4] is graphs[5]
    (captured, ours), (eager, theirs) = results
    _assert_close(captured, eager, "float32")
    assert ours.metrics == pytest.approx(theirs.metrics, rel=1e-2, abs=1e-3)
