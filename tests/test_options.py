"""Training options beyond the paper, each through the trainer."""

from __future__ import annotations

import copy
import signal
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn
from toy import toy_recipe, toy_teacher

import adadfq
from adadfq import trainer as training
from adadfq.fusion import with_features
from adadfq.game import METRICS, REPLAY_METRICS
from adadfq.nn import activations, set_calibrating, step_sizes
from adadfq.result import CHECKPOINT

#: One setting an option, and one with all that go together.
OPTIONS: dict[str, dict[str, Any]] = {
    "weight_range": {"weight_range": "mse"},
    "act_range": {"act_range": "mse"},
    "learn_steps": {"learn_steps": True},
    "feature_weight": {"feature_weight": 3.0},
    "low_pass": {"low_pass": 0.5},
    "crop and flip": {"crop": 1, "flip": True},
    "mirror_teacher": {"mirror_teacher": True},
    "bank": {"replays": 2, "bank_batches": 2},
    "averaged": {"replays": 1, "bank_batches": 0, "generator_ema": 0.9},
    "spectral_norm": {"spectral_norm": True},
    "cosine": {"lr_schedule": "cosine", "lr_warmup_steps": 2},
    "adam": {"student_optimizer": "adam"},
}
OPTIONS["together"] = {
    name: value for key, option in OPTIONS.items() if key != "averaged" for name, value in option.items()
}


def _trainer(on_epoch_end: Any = None, fuse: bool = True, **settings: Any) -> adadfq.Trainer:
    teacher = toy_teacher()
    return adadfq.Trainer(
        teacher,
        adadfq.quantize(teacher, 3, 3),
        toy_recipe(**settings),
        progress=False,
        fuse=fuse,
        on_epoch_end=on_epoch_end,
    )


def _same(a: nn.Module, b: nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(v, theirs[k]) for k, v in ours.items())


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_changes_the_result_repeats_it_and_resumes_to_it(name: str, tmp_path: Path) -> None:
    option = OPTIONS[name]
    base = _trainer().fit()
    unbroken = _trainer(**option).fit()
    assert not _same(unbroken.student, base.student)
    assert unbroken.steps == base.steps

    def stop(epoch: int, trainer: adadfq.Trainer) -> None:
        if epoch == 1:
            raise KeyboardInterrupt

    # Epoch 1 is the first in which the student trains; its checkpoint is that of epoch 0 here, and then of epoch 1.
    with pytest.raises(KeyboardInterrupt):
        _trainer(on_epoch_end=stop, **option).fit(tmp_path / "run")
    first = _trainer(**option)
    resumed = first.fit(tmp_path / "run", resume=True)
    assert _same(resumed.student, unbroken.student)
    assert resumed.metrics == pytest.approx(unbroken.metrics, rel=1e-6)

    loaded = adadfq.load(tmp_path / "run", model=toy_teacher())
    images = torch.randn(4, 3, 8, 8)
    assert torch.equal(loaded(images), resumed.student(images))
    assert not step_sizes(loaded) and not step_sizes(resumed.student)


@pytest.mark.parametrize("name", ["bank", "learn_steps", "together"])
def test_resuming_after_the_student_has_trained(name: str, tmp_path: Path) -> None:
    option = {**OPTIONS[name], "epochs": 4}
    unbroken = _trainer(**option)
    unbroken.fit()

    def stop(epoch: int, trainer: adadfq.Trainer) -> None:
        if epoch == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _trainer(on_epoch_end=stop, **option).fit(tmp_path / "run")
    resumed = _trainer(**option)
    resumed.fit(tmp_path / "run", resume=True)
    assert _same(resumed.student, unbroken.student)
    assert resumed.epoch_h_prime == unbroken.epoch_h_prime and len(unbroken.epoch_h_prime) == 4


def test_options_of_the_student_need_its_training_and_change_nothing_before() -> None:
    states = []
    for option in (
        {},
        OPTIONS["learn_steps"],
        {"weight_range": "mse", "act_range": "mse", "student_optimizer": "adam"},
    ):
        kept: list[dict[str, Any]] = []
        trainer = _trainer(
            on_epoch_end=lambda epoch, t, kept=kept: kept.append(copy.deepcopy(t.student.state_dict())), **option
        )
        trainer.fit()
        states.append(kept[0])  # after warm-up
    for state in states[1:]:
        assert state.keys() == states[0].keys()
        assert all(torch.equal(value, states[0][name]) for name, value in state.items())


@pytest.mark.parametrize("name", ["weight_range", "act_range", "learn_steps"])
def test_no_recorded_step_outlives_the_start_of_the_students_training(name: str) -> None:
    trainer = _trainer(**OPTIONS[name])
    trainer.play(False)
    set_calibrating(trainer.student, False)
    trainer._captured = {"step": (None, mock.Mock())}
    trainer._begin_student()
    assert not trainer._captured


def test_learned_steps_move_by_a_share_of_themselves() -> None:
    seen: list[list[torch.Tensor]] = []

    def keep(epoch: int, trainer: adadfq.Trainer) -> None:
        seen.append([step.detach().clone() for step in step_sizes(trainer.student)])

    trainer = _trainer(keep, learn_steps=True, lr_steps=0.5, epochs=2, steps_per_epoch=1)
    small = trainer.student.get_submodule("conv1")
    with torch.no_grad():
        small.weight[0] *= 1e-2  # an absolute rate would carry its step far up, or below 0
    begin = trainer._begin_student

    def begin_and_keep() -> None:
        begin()
        keep(-1, trainer)

    trainer._begin_student = begin_and_keep  # type: ignore[method-assign]
    result = trainer.fit()
    before, after = seen[1], seen[2]
    assert len(before) == 3 + len(activations(result.student))
    ratios = torch.cat([(b / a).flatten() for a, b in zip(before, after, strict=True)])
    # Adam's first step is the rate, either way, wherever there is a gradient.
    moved = torch.minimum((ratios.log() - 0.5).abs(), (ratios.log() + 0.5).abs()) < 0.1
    assert bool((moved | (ratios == 1)).all()) and int(moved.sum()) > len(ratios) // 2
    weights = trainer.optimizer_student.param_groups[0]["params"]
    assert not {id(p) for p in weights} & {id(step) for step, _ in trainer.game.log_steps}


def test_a_diverged_run_leaves_buffers() -> None:
    trainer = _trainer(learn_steps=True, lr_student=1e30, student_optimizer="adam")
    with pytest.raises(adadfq.AdadfqError, match="training diverged"):
        trainer.fit()
    assert not step_sizes(trainer.student)


def test_an_empty_bank_is_refused() -> None:
    with pytest.raises(adadfq.InvalidInputError, match="the bank is empty"):
        _trainer(replays=1).replay()


def test_ranges_that_move_to_the_end_leave_nothing_to_learn() -> None:
    with pytest.warns(UserWarning, match="learn_steps, weight_range and act_range, which begin after, do nothing"):
        _trainer(learn_steps=True, epochs=3, calibration_epochs=3)


def test_replays_take_turns_with_steps_of_both_and_train_the_student_alone() -> None:
    trainer = _trainer(epochs=2, steps_per_epoch=7, replays=2, bank_batches=2)
    calls: list[str] = []
    for kind in ("play", "replay"):
        play = getattr(trainer, kind)

        def watch(*args: Any, kind: str = kind, play: Any = play) -> torch.Tensor:
            generator = [p.detach().clone() for p in trainer.generator.parameters()]
            student = [p.detach().clone() for p in trainer.student.parameters()]
            row = play(*args)
            moved = any(not torch.equal(a, b) for a, b in zip(generator, trainer.generator.parameters(), strict=True))
            assert moved == (kind == "play")
            trained = any(not torch.equal(a, b) for a, b in zip(student, trainer.student.parameters(), strict=True))
            calls.append(kind if trained else "warm-up")
            finite = {name for name, value in zip(METRICS, row.tolist(), strict=True) if value == value}
            assert finite == set(METRICS if kind == "play" else REPLAY_METRICS)
            return row

        setattr(trainer, kind, watch)
    result = trainer.fit()
    assert calls == ["warm-up"] * 7 + ["play", "replay", "replay", "play", "replay", "replay", "play"]
    assert set(result.metrics) == set(METRICS)


def test_a_replay_from_the_bank_runs_neither_teacher_nor_generator() -> None:
    trainer = _trainer(epochs=2, steps_per_epoch=4, replays=1)
    counts = {"teacher": 0, "generator": 0, "student": 0}
    for name in counts:

        def count(*_: Any, name: str = name) -> None:
            counts[name] += 1

        getattr(trainer.game, name).register_forward_hook(count)
    trainer.play(True)
    assert counts == {"teacher": 1, "generator": 1, "student": 1}
    trainer.replay()
    assert counts == {"teacher": 1, "generator": 1, "student": 2}


def test_replays_without_a_bank_show_the_averaged_generators_images() -> None:
    trainer = _trainer(replays=1, bank_batches=0, generator_ema=0.75)
    assert trainer.game.averaged is not None
    with torch.no_grad():
        for p in trainer.generator.parameters():
            p.add_(1.0)
    trainer.game.start_average()
    leaders = [p.detach().clone() for p in trainer.generator.parameters()]
    followers = [p.detach().clone() for p in trainer.game.averaged.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(leaders, followers, strict=True))
    trainer.play(True)
    for now, start, average in zip(
        trainer.generator.parameters(), followers, trainer.game.averaged.parameters(), strict=True
    ):
        torch.testing.assert_close(average, 0.75 * start + 0.25 * now)
    with mock.patch.object(trainer.game, "generator", None):
        assert bool(trainer.replay()[METRICS.index("loss_student")].isfinite())


def test_feature_matching_is_in_the_students_loss_alone() -> None:
    rows = {}
    for weight in (1e-9, 2.0, 4.0):
        trainer = _trainer(feature_weight=weight)
        rows[weight] = dict(zip(METRICS, trainer.play(True).tolist(), strict=True))
        rows[weight]["gradient"] = [p.grad.clone() for p in trainer.generator.parameters()]
    assert rows[4.0]["loss_features"] == pytest.approx(2 * rows[2.0]["loss_features"]) != 0
    assert rows[4.0]["loss_student"] - rows[2.0]["loss_student"] == pytest.approx(
        rows[2.0]["loss_features"], rel=1e-3, abs=1e-3
    )
    assert rows[4.0]["loss_generator"] == pytest.approx(rows[1e-9]["loss_generator"])
    for a, b in zip(rows[4.0]["gradient"], rows[1e-9]["gradient"], strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["learn_steps", "feature_weight", "together"])
def test_fused_and_unfused_have_the_same_gradients(name: str) -> None:
    gradients = []
    for fuse in (True, False):
        trainer = _trainer(fuse=fuse, lr_generator=0.0, **OPTIONS[name])
        for _ in range(3):
            trainer.play(False)
        set_calibrating(trainer.student, False)
        trainer._begin_student()
        trainer.play(True)
        named = {**dict(trainer.student.named_parameters()), **dict(trainer.generator.named_parameters(prefix="g"))}
        gradients.append({key: p.grad for key, p in named.items()})
    assert gradients[0].keys() == gradients[1].keys()
    for key, found in gradients[0].items():
        expected = gradients[1][key]
        assert float((found - expected).norm()) <= 1e-3 * float(expected.norm()) + 1e-6, key


class _Blocks(nn.Module):
    """A residual block, a linear bottleneck and a shortcut with a BatchNorm of its own."""

    def __init__(self) -> None:
        super().__init__()
        for i in range(5):
            setattr(self, f"conv{i}", nn.Conv2d(3, 3, 3, padding=1, bias=False))
            setattr(self, f"bn{i}", nn.BatchNorm2d(3))
        self.linear = nn.Linear(3, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.bn0(self.conv0(x)))
        shortcut = self.bn1(self.conv1(x))
        x = torch.relu(self.bn2(self.conv2(x)) + shortcut)
        x = self.bn3(self.conv3(x))
        x = torch.relu(self.bn4(self.conv4(x)))
        return self.linear(x.mean((2, 3)))


@pytest.mark.parametrize("fuse", [False, True])
def test_features_are_block_outputs(fuse: bool) -> None:
    torch.manual_seed(0)
    model = _Blocks().eval()
    student = adadfq.quantize(model, 4, 4)
    images = torch.randn(2, 3, 8, 8)
    student(images)
    set_calibrating(student, False)
    seen: list[torch.Tensor] = []
    quantizers = list(activations(student).values())
    handles = [m.register_forward_hook(lambda m, args, y: seen.append(y)) for m in quantizers]
    logits = student(images)
    for handle in handles:
        handle.remove()
    teacher_taps, student_taps, names = with_features(model, student, fuse)
    assert names == ["bn1", "bn3"]  # the sum belongs to the first of its two BatchNorms
    with torch.no_grad():
        found, features = student_taps(images)
        torch.testing.assert_close(found, logits)
        torch.testing.assert_close(features[0], seen[1])
        expected = torch.relu(model.bn0(model.conv0(images)))
        expected = torch.relu(model.bn2(model.conv2(expected)) + model.bn1(model.conv1(expected)))
        found, features = teacher_taps(images)
        torch.testing.assert_close(found, model(images))
        torch.testing.assert_close(features[0], expected)
        torch.testing.assert_close(features[1], model.bn3(model.conv3(expected)))


class _Bottlenecks(nn.Module):
    """A sum without activation, a BatchNorm without parameters, and SiLU."""

    def __init__(self) -> None:
        super().__init__()
        for i in range(3):
            setattr(self, f"conv{i}", nn.Conv2d(3, 3, 3, padding=1, bias=False))
            setattr(self, f"bn{i}", nn.BatchNorm2d(3, affine=i != 1))
        self.linear = nn.Linear(3, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.bn0(self.conv0(x)))
        x = x + self.bn1(self.conv1(x))
        x = nn.functional.silu(self.bn2(self.conv2(x)))
        return self.linear(x.mean((2, 3)))


@pytest.mark.parametrize("fuse", [False, True])
def test_a_linear_bottlenecks_output_is_the_sum(fuse: bool) -> None:
    torch.manual_seed(0)
    model = _Bottlenecks().eval()
    student = adadfq.quantize(model, 4, 4)
    images = torch.randn(2, 3, 8, 8)
    student(images)
    set_calibrating(student, False)
    teacher_taps, student_taps, names = with_features(model, student, fuse)
    assert names == ["bn1"]
    with torch.no_grad():
        _, (found,) = teacher_taps(images)
        expected = torch.relu(model.bn0(model.conv0(images)))
        torch.testing.assert_close(found, expected + model.bn1(model.conv1(expected)))
        logits, (found,) = student_taps(images)
        torch.testing.assert_close(logits, student(images))
        assert found.shape == expected.shape


def test_features_that_cannot_be_had_are_refused_and_nothing_is_changed() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = toy_teacher()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x) if x.sum() > -1e9 else x

    teacher = Branching().eval()
    with pytest.warns(UserWarning, match="cannot be traced"):
        student = adadfq.quantize(teacher, 3, 3).train()
    with pytest.raises(adadfq.InvalidInputError, match="feature_weight=0"):
        adadfq.Trainer(teacher, student, toy_recipe(feature_weight=1.0), progress=False)
    assert student.training


def test_networks_without_blocks_match_every_activation() -> None:
    teacher = toy_teacher()
    assert with_features(teacher, adadfq.quantize(teacher, 4, 4))[2] == ["bn1", "bn2"]


def test_spectral_norm_bounds_the_generators_layers() -> None:
    trainer = _trainer(spectral_norm=True)
    for name in ("project", "conv2", "conv3", "to_image"):
        layer = trainer.generator.get_submodule(name)
        trainer.generator.eval()
        largest = torch.linalg.matrix_norm(layer.weight.detach().flatten(1), 2)
        assert float(largest) == pytest.approx(1, rel=0.15)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight_range": "best"}, "weight_range must be one of minmax, mse"),
        ({"student_optimizer": "lion"}, "student_optimizer must be one of sgd, adam"),
        ({"lr_schedule": "linear"}, "lr_schedule must be one of step, cosine"),
        ({"generator_ema": 1.0}, "generator_ema must be at least 0 and below 1"),
        ({"generator_ema": 0.9}, "set replays of at least 1 and bank_batches=0"),
        ({"crop": 8}, "crop must be below image_size=8"),
        ({"replays": -1}, "replays must be at least 0"),
        ({"replays": 4}, "replays must be below steps_per_epoch=4"),
        ({"feature_weight": -1.0}, "feature_weight must be at least 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(adadfq.InvalidInputError, match=message):
        toy_recipe(**settings)


def test_an_interrupt_before_the_students_first_step_prepares_it_once(tmp_path: Path) -> None:
    option = {**OPTIONS["together"], "epochs": 3}
    unbroken = _trainer(**option).fit()
    interrupted = _trainer(**option)
    begin = interrupted._begin_student

    def prepare_and_interrupt() -> None:
        begin()
        signal.raise_signal(signal.SIGINT)

    interrupted._begin_student = prepare_and_interrupt  # type: ignore[method-assign]
    result = interrupted.fit(tmp_path / "run")
    assert (result.status, result.steps) == ("interrupted", 4)
    resumed = _trainer(**option).fit(tmp_path / "run", resume=True)
    assert _same(resumed.student, unbroken.student)


def test_a_run_goes_on_on_another_kind_of_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(training, "CHECKPOINT_SHARE", 0)

    def stop(epoch: int, trainer: adadfq.Trainer) -> None:
        if epoch == 2:
            raise KeyboardInterrupt

    option = {**OPTIONS["together"], "epochs": 4}
    with pytest.raises(KeyboardInterrupt):
        _trainer(stop, **option).fit(tmp_path / "run")
    path = tmp_path / "run" / CHECKPOINT
    state = torch.load(path, weights_only=True)
    names = ("optimizer_student", "optimizer_generator", "optimizer_steps")
    for name in names:
        for group in state[name]["param_groups"]:
            assert group["capturable"] is False
            group["capturable"] = True  # as from a GPU
    torch.save(state, path)
    resumed = _trainer(**option)
    resumed.fit(tmp_path / "run", resume=True)
    assert not any(group["capturable"] for name in names for group in getattr(resumed, name).param_groups)


def test_more_epochs_on_resuming_would_be_another_cosine(tmp_path: Path) -> None:
    def stop(epoch: int, trainer: adadfq.Trainer) -> None:
        if epoch == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _trainer(stop, lr_schedule="cosine").fit(tmp_path / "run")
    with pytest.raises(adadfq.CheckpointError, match="other settings \\(epochs\\)"):
        _trainer(lr_schedule="cosine", epochs=5).fit(tmp_path / "run", resume=True)


def test_a_student_with_steps_of_its_own_is_refused() -> None:
    teacher = toy_teacher()
    student = adadfq.Trainer(teacher, adadfq.quantize(teacher, 3, 3), toy_recipe(learn_steps=True), progress=False)
    trained = student.fit().student
    with pytest.raises(adadfq.InvalidInputError, match="must have no steps of their own, conv1 has"):
        adadfq.Trainer(teacher, trained, toy_recipe(), progress=False)
