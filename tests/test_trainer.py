"""Trainer: schedule, determinism, interruption, what is written, and refusal of what does not fit."""

from __future__ import annotations

import copy
import itertools
import json
import math
import signal
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn
from toy import ToyNet, toy_recipe, toy_teacher

import adadfq
from adadfq import trainer as training
from adadfq.game import METRICS
from adadfq.nn import activations
from adadfq.result import load_teacher, read_result


def _trainer(**options: object) -> adadfq.Trainer:
    settings = {k: options.pop(k) for k in list(options) if k not in ("seed", "on_epoch_end", "generator")}
    teacher = toy_teacher()
    return adadfq.Trainer(teacher, adadfq.quantize(teacher, 4, 4), toy_recipe(**settings), progress=False, **options)


def _same(a: nn.Module, b: nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(v, theirs[k]) for k, v in ours.items())


def test_a_seed_is_a_result() -> None:
    torch.manual_seed(5)
    first = _trainer(seed=3).fit()
    torch.manual_seed(6)
    state = torch.random.get_rng_state()
    second, third = _trainer(seed=3).fit(), _trainer(seed=4).fit()
    assert torch.equal(state, torch.random.get_rng_state())
    assert _same(first.student, second.student) and not _same(first.student, third.student)
    assert first.metrics == second.metrics and first.status == "complete" and first.steps == 12


def test_the_teacher_and_its_flags_are_left_alone() -> None:
    teacher = toy_teacher().train()
    before = copy.deepcopy(teacher.state_dict())
    adadfq.Trainer(teacher, adadfq.quantize(teacher), toy_recipe(), progress=False).fit()
    assert teacher.training and all(p.requires_grad and p.grad is None for p in teacher.parameters())
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())


def test_phases() -> None:
    """Ranges move in the calibration epochs only, weights after the warm-up only, BatchNorm statistics never."""
    history = []

    def record(epoch: int, trainer: adadfq.Trainer) -> None:
        history.append(copy.deepcopy(trainer.student.state_dict()))

    trainer = _trainer(epochs=4, warmup_epochs=2, calibration_epochs=3, on_epoch_end=record)
    history.append(copy.deepcopy(trainer.student.state_dict()))
    trainer.fit()

    def moved(key: str) -> list[bool]:
        return [not torch.equal(a[key], b[key]) for a, b in itertools.pairwise(history)]

    assert moved("act_quant.0.running_max") == [True, True, True, False]
    assert moved("conv1.weight") == [False, False, True, True]
    assert moved("bn1.weight") == [False, False, True, True]
    assert moved("bn1.running_mean") == [False] * 4
    assert all(not bool(a.calibrating) for a in activations(trainer.student).values())


def test_learning_rates_step_down_at_the_milestones() -> None:
    rates = []

    def record(epoch: int, trainer: adadfq.Trainer) -> None:
        rates.append([float(o.param_groups[0]["lr"]) for o in (trainer.optimizer_generator, trainer.optimizer_student)])

    _trainer(epochs=4, lr_milestones=(2, 3), on_epoch_end=record).fit()
    expected = [[1e-3 * f, 1e-2 * f] for f in (1, 1, 0.1, 0.01)]
    assert rates == [pytest.approx(row) for row in expected]


def test_the_optimisers_are_the_recipes() -> None:
    trainer = _trainer(momentum=0.8, weight_decay=3e-4, adam_betas=(0.4, 0.99), lr_generator=2e-3)
    (student,) = trainer.optimizer_student.param_groups
    found = [student[k] for k in ("lr", "momentum", "weight_decay", "nesterov", "dampening")]
    assert found == [1e-2, 0.8, 3e-4, True, 0] and type(trainer.optimizer_student) is torch.optim.SGD
    (generator,) = trainer.optimizer_generator.param_groups
    assert [generator[k] for k in ("lr", "betas", "weight_decay")] == [2e-3, (0.4, 0.99), 0]
    assert type(trainer.optimizer_generator) is torch.optim.Adam
    assert len(student["params"]) == len(list(trainer.student.parameters()))


def test_noise_is_normal_and_labels_are_uniform() -> None:
    trainer = _trainer(epochs=1, steps_per_epoch=100, warmup_epochs=0, batch_size=8)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def watch(noise: torch.Tensor, labels: torch.Tensor, *_: object) -> torch.Tensor:
        seen.append((noise, labels))
        return torch.zeros(len(METRICS))

    trainer.game.step = watch
    with torch.no_grad():
        trainer.student(torch.randn(2, 3, 8, 8))
    trainer.fit()
    noise, labels = (torch.cat(column) for column in zip(*seen, strict=True))
    assert noise.shape == (800, 16) and abs(float(noise.mean())) < 0.05 and abs(float(noise.std()) - 1) < 0.05
    counts = torch.bincount(labels, minlength=10)
    assert len(counts) == 10 and counts.min() > 40 and counts.max() < 120


def test_making_a_trainer_moves_nothing() -> None:
    teacher = toy_teacher()
    student = adadfq.quantize(teacher)
    before = copy.deepcopy(student.state_dict())
    generator = adadfq.generator.LabelEmbeddingGenerator(10, 8, 3, latent_dim=16)
    state = copy.deepcopy(generator.state_dict())
    trainer = adadfq.Trainer(teacher, student, toy_recipe(), generator, progress=False)
    assert all(torch.equal(v, before[k]) for k, v in student.state_dict().items())
    assert all(torch.equal(v, state[k]) for k, v in generator.state_dict().items())
    assert all(int(act.num_batches) == 0 for act in activations(trainer.student).values())


def test_images_shown_by_a_callback_move_no_range() -> None:
    def show(epoch: int, trainer: adadfq.Trainer) -> None:
        trainer.student(1000 * torch.randn(4, 3, 8, 8))
        trainer.student.train()

    quiet, loud = (_trainer(calibration_epochs=2, on_epoch_end=f).fit() for f in (None, show))
    ranges = [{k: v for k, v in r.student.state_dict().items() if "running_max" in k} for r in (quiet, loud)]
    assert ranges[0] == ranges[1] and not loud.student.training


def test_a_trainer_trains_once() -> None:
    trainer = _trainer()
    trainer.fit()
    with pytest.raises(adadfq.InvalidInputError, match="already run"):
        trainer.fit()


def test_a_student_that_will_not_train_is_announced() -> None:
    with pytest.warns(UserWarning, match="the student will not train.*round to nearest"):
        trainer = _trainer(epochs=2, warmup_epochs=2)
    before = trainer.student.conv1.weight.clone()
    assert torch.equal(trainer.fit().student.conv1.weight, before)


def test_training_brings_the_student_nearer_to_the_teacher() -> None:
    means: list[float] = []
    trainer = _trainer(epochs=16, steps_per_epoch=25, warmup_epochs=4, lr_student=3e-3, calibration_epochs=4)
    teacher, x = trainer.teacher, torch.randn(256, 3, 8, 8)

    def record(epoch: int, trainer: adadfq.Trainer) -> None:
        if epoch >= 3:
            with torch.no_grad():
                gap = torch.log_softmax(trainer.student(x), 1) - torch.log_softmax(teacher(x), 1)
                means.append(float(gap.abs().mean()))

    trainer.on_epoch_end = record
    trainer.fit()
    assert means[-1] < 0.7 * means[0]


def test_a_run_is_written_and_loads(tmp_path: Path) -> None:
    teacher = adadfq.build_model("resnet20")
    recipe = toy_recipe(image_size=16, batch_size=4, steps_per_epoch=2, lr_student=1e-4)
    student = adadfq.quantize(teacher, 3, 5)
    result = adadfq.Trainer(teacher, student, recipe, seed=2, progress=False).fit(tmp_path / "run")
    files = {p.name for p in (tmp_path / "run").iterdir()} - {"tensorboard"}
    weights = {f"{n}.safetensors" for n in ("student", "teacher", "generator")}
    assert files == {"result.json", "metrics.jsonl", *weights}
    loaded, x = adadfq.load(tmp_path / "run"), torch.randn(3, 3, 16, 16)
    assert _same(loaded, result.student) and torch.equal(loaded(x), result.student(x)) and not loaded.training
    assert _same(load_teacher(tmp_path / "run"), teacher)
    saved = read_result(tmp_path / "run")
    assert saved["status"] == "complete" and saved["seed"] == 2 and saved["steps"] == 6
    assert adadfq.Recipe.from_dict(saved["recipe"]) == recipe
    assert (saved["quantization"]["weight_bits"], saved["quantization"]["act_bits"]) == (3, 5)
    assert saved["report"] == adadfq.report(student).to_dict() and saved["metrics"] == result.metrics
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(6)) and set(lines[0]) == {"step", "epoch", *METRICS}


def test_metrics_go_to_tensorboard_where_it_is_installed(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    _trainer().fit(tmp_path / "run")
    events = accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == set(METRICS)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    shown = {event.step: event.value for event in events.Scalars("loss_student")}
    assert shown == pytest.approx({step: lines[step]["loss_student"] for step in (0, 10)}, rel=1e-6)


def test_tensorboard_is_shown_replays_and_steps(tmp_path: Path) -> None:
    shown: list[tuple[str, int]] = []
    log = training.MetricLog(None)
    log._board = mock.Mock(add_scalar=lambda name, value, step: shown.append((name, step)))
    rows = [{"loss_student": 1.0} if step % 2 else {"loss_student": 1.0, "h_prime": 0.5} for step in range(45)]
    log.write(5, 0, rows)
    assert [step for name, step in shown if name == "loss_student"] == [5, 15, 25, 35, 45]
    assert [step for name, step in shown if name == "h_prime"] == [5, 25, 45]


def test_without_tensorboard_there_is_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adadfq.metrics.importlib.util, "find_spec", lambda name: None)
    _trainer().fit(tmp_path / "run")
    assert not (tmp_path / "run" / "tensorboard").exists()
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 12


def test_a_model_of_unknown_make_loads_with_an_instance(tmp_path: Path) -> None:
    result = _trainer().fit(tmp_path / "run")
    with pytest.raises(adadfq.CheckpointError, match="does not record how its .* is built: pass model="):
        adadfq.load(tmp_path / "run")
    assert _same(adadfq.load(tmp_path / "run", model=ToyNet()), result.student)
    with pytest.raises(adadfq.CheckpointError, match=r"linear\.weight"):
        adadfq.load(tmp_path / "run", model=ToyNet(num_classes=11))


def test_a_model_whose_code_would_run_needs_consent(tmp_path: Path) -> None:
    _trainer().fit(tmp_path / "run")
    file = tmp_path / "run" / "result.json"
    saved = json.loads(file.read_text())
    saved["model"] = {"spec": "os:system", "kwargs": {"command": f"touch {tmp_path / 'executed'}"}}
    file.write_text(json.dumps(saved))
    with pytest.raises(adadfq.CheckpointError, match="asks to run the model code 'os:system'"):
        adadfq.load(tmp_path / "run")
    assert not (tmp_path / "executed").exists()


def test_a_damaged_run_is_refused(tmp_path: Path) -> None:
    run = tmp_path / "run"
    _trainer().fit(run)
    weights = (run / "student.safetensors").read_bytes()
    flipped = bytearray(weights)
    flipped[-5] ^= 1
    (run / "student.safetensors").write_bytes(flipped)
    with pytest.raises(adadfq.CheckpointError, match="damaged or replaced"):
        adadfq.load(run, model=ToyNet())
    (run / "student.safetensors").write_bytes(weights[:-5])
    with pytest.raises(adadfq.CheckpointError, match=r"student\.safetensors"):
        adadfq.load(run, model=ToyNet())
    (run / "result.json").write_text("{")
    with pytest.raises(adadfq.CheckpointError, match="cannot be read"):
        adadfq.load(run, model=ToyNet())
    (run / "result.json").write_text('{"format": 99}')
    with pytest.raises(adadfq.CheckpointError, match="has format 99, this version of adadfq reads 1"):
        adadfq.load(run, model=ToyNet())
    with pytest.raises(adadfq.CheckpointError, match="not the directory of a run"):
        adadfq.load(tmp_path)


def test_an_edited_student_is_written_and_loads_as_it_is(tmp_path: Path) -> None:
    teacher = toy_teacher()
    student = adadfq.quantize(teacher)
    student.linear = copy.deepcopy(teacher.linear)
    architecture = copy.deepcopy(student)
    result = adadfq.Trainer(teacher, student, toy_recipe(), progress=False).fit(tmp_path / "run")
    assert adadfq.report(student).left_in_float[0].where == "linear"
    loaded, x = adadfq.load(tmp_path / "run", model=architecture), torch.randn(2, 3, 8, 8)
    assert torch.equal(loaded(x), result.student(x))


def test_another_architecture_with_the_same_weights_is_refused(tmp_path: Path) -> None:
    _trainer().fit(tmp_path / "run")
    other = ToyNet()
    other.conv2.stride = (2, 2)
    for read in (adadfq.load, load_teacher):
        with pytest.raises(adadfq.CheckpointError, match="it computes something else"):
            read(tmp_path / "run", model=other)


def test_a_student_of_another_shape_than_the_teacher_loads(tmp_path: Path) -> None:
    class Wide(ToyNet):
        def __init__(self) -> None:
            super().__init__()
            self.extra = nn.BatchNorm2d(3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(self.extra(x))

    student = adadfq.quantize(toy_teacher())
    result = adadfq.Trainer(Wide(), student, toy_recipe(), progress=False).fit(tmp_path / "run")
    assert _same(adadfq.load(tmp_path / "run", model=ToyNet()), result.student)
    load_teacher(tmp_path / "run", model=Wide())


def test_a_random_teacher_has_no_probe(tmp_path: Path) -> None:
    class Random(ToyNet):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(nn.functional.dropout(x))  # also in eval mode

    teacher = Random().eval()
    adadfq.Trainer(teacher, adadfq.quantize(teacher), toy_recipe(), progress=False).fit(tmp_path / "run")
    assert read_result(tmp_path / "run")["probes"] == {"student": None, "teacher": None}
    adadfq.load(tmp_path / "run", model=Random())


def test_a_generator_with_normed_weights_trains() -> None:
    teacher = toy_teacher()
    generator = adadfq.generator.LabelEmbeddingGenerator(10, 8, 3, latent_dim=16)
    torch.nn.utils.spectral_norm(generator.conv2)
    generator(torch.randn(8, 16), torch.arange(8))
    trainer = adadfq.Trainer(teacher, adadfq.quantize(teacher), toy_recipe(), generator, progress=False)
    assert trainer.fit().status == "complete"


def test_an_interrupt_before_the_first_step_leaves_nothing(tmp_path: Path) -> None:
    trainer = _trainer()
    play = trainer._play_epoch
    trainer._play_epoch = lambda *args: (signal.raise_signal(signal.SIGINT), play(*args))[1]
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_network_whose_own_keys_have_a_prefix(tmp_path: Path) -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = toy_teacher()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.module(x)

    teacher = Wrapped().eval()
    result = adadfq.Trainer(teacher, adadfq.quantize(teacher), toy_recipe(), progress=False).fit(tmp_path / "run")
    assert _same(adadfq.load(tmp_path / "run", model=Wrapped()), result.student)
    assert _same(load_teacher(tmp_path / "run", model=Wrapped()), teacher)


@pytest.mark.filterwarnings("ignore:.*cannot be traced")
def test_a_quantiser_the_forward_never_reaches_needs_no_range() -> None:
    class Spare(ToyNet):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.spare = nn.ReLU(), nn.ReLU()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if x.sum() > 1e9:  # keeps torch.fx out
                return x
            return self.linear(self.used(self.bn2(self.conv2(self.used(self.bn1(self.conv1(x)))))).mean((2, 3)))

    teacher = Spare().eval()
    student = adadfq.quantize(teacher)
    assert set(activations(student)) == {"used.1", "spare.1"}
    assert adadfq.Trainer(teacher, student, toy_recipe(), progress=False).fit().status == "complete"


def _interrupt_at(step: int, trainer: adadfq.Trainer) -> None:
    play = trainer.game.step

    def stepped(*args: object) -> torch.Tensor:
        row = play(*args)
        if trainer.step == step:
            signal.raise_signal(signal.SIGINT)
        return row

    trainer.game.step = stepped


def test_a_run_from_before_a_setting_was_known_goes_on(tmp_path: Path) -> None:
    trainer = _trainer()
    _interrupt_at(6, trainer)
    trainer.fit(tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoint.pt"
    state = torch.load(checkpoint, weights_only=True)
    del state["settings"]["recipe"]["mirror_teacher"]
    for name in ("seconds", "cpu_seconds", "spent"):
        del state["history"][name]
    torch.save(state, checkpoint)
    with pytest.raises(adadfq.CheckpointError, match="mirror_teacher"):
        _trainer(mirror_teacher=True).fit(tmp_path / "run", resume=True)
    resumed = _trainer()
    assert _same(resumed.fit(tmp_path / "run", resume=True).student, _trainer().fit().student)
    assert math.isnan(resumed.epoch_seconds[0]) and min(resumed.epoch_seconds[1:]) > 0


@pytest.mark.parametrize("step", [1, 3, 6, 9])
def test_an_interrupted_run_is_usable_and_goes_on_to_the_same_result(tmp_path: Path, step: int) -> None:
    unbroken = _trainer().fit()
    trainer = _trainer()
    _interrupt_at(step, trainer)
    handler = signal.getsignal(signal.SIGINT)
    result = trainer.fit(tmp_path / "run")
    assert signal.getsignal(signal.SIGINT) is handler
    assert result.status == "interrupted" and result.steps == step + 1
    assert read_result(tmp_path / "run")["status"] == "interrupted"
    usable = adadfq.load(tmp_path / "run", model=ToyNet())
    assert bool(usable(torch.randn(2, 3, 8, 8)).isfinite().all())
    resumed = _trainer().fit(tmp_path / "run", resume=True)
    assert resumed.status == "complete" and _same(resumed.student, unbroken.student)
    assert resumed.metrics == pytest.approx(unbroken.metrics, rel=1e-6)
    assert not (tmp_path / "run" / "checkpoint.pt").exists()
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(12))


def _do_nothing(trainer: adadfq.Trainer) -> None:
    trainer.student(torch.randn(2, 3, 8, 8))
    trainer.student.train()


def _replace_a_weight(trainer: adadfq.Trainer) -> None:
    trainer.student.conv1.weight.data = trainer.student.conv1.weight.data.clone()


def _replace_a_teachers_buffer(trainer: adadfq.Trainer) -> None:
    trainer.teacher.bn1.running_mean = trainer.teacher.bn1.running_mean.clone()


def _change_the_momentum(trainer: adadfq.Trainer) -> None:
    trainer.optimizer_student.param_groups[0]["momentum"] = 0.5


def _load_an_optimizer(trainer: adadfq.Trainer) -> None:
    trainer.optimizer_generator.load_state_dict(copy.deepcopy(trainer.optimizer_generator.state_dict()))


@pytest.mark.parametrize(
    ("change", "recorded"),
    [
        (_do_nothing, 2),  # warm-up, training
        (_replace_a_weight, 3),
        (_replace_a_teachers_buffer, 3),
        (_change_the_momentum, 3),
        (_load_an_optimizer, 3),
    ],
)
def test_a_recorded_step_outlives_an_epochs_end_that_leaves_its_tensors(
    monkeypatch: pytest.MonkeyPatch, change: Any, recorded: int
) -> None:
    steps = []

    class Recorded:
        def __init__(self, step: Any, device: torch.device, random: torch.Generator) -> None:
            self.step = step
            steps.append(step)

        def __call__(self) -> torch.Tensor:
            return self.step()

    monkeypatch.setattr(training, "CapturedStep", Recorded)
    trainer = _trainer(epochs=4, warmup_epochs=1, calibration_epochs=1)
    trainer.capture = True
    trainer.on_epoch_end = lambda epoch, trainer: change(trainer) if epoch == 2 else None
    trainer.fit()
    assert len(steps) == recorded


def test_a_checkpoint_is_written_seconds_after_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a run that is killed goes on from it to the same result."""
    clock = 0.0
    monkeypatch.setattr(training.time, "monotonic", lambda: clock)
    epochs_of = []

    def look(epoch: int, trainer: adadfq.Trainer) -> None:
        nonlocal clock
        path = tmp_path / "run" / "checkpoint.pt"
        epochs_of.append(torch.load(path, weights_only=True)["epoch"] if path.exists() else 0)
        clock += (0.0, 9.0, 1.0, 9.5, 0.0)[epoch]
        if epoch == 4:
            raise SystemExit("killed")

    with pytest.raises(SystemExit):
        _trainer(on_epoch_end=look, epochs=6).fit(tmp_path / "run")
    assert epochs_of == [0, 1, 1, 3, 3]
    resumed = _trainer(epochs=6).fit(tmp_path / "run", resume=True)
    assert _same(resumed.student, _trainer(epochs=6).fit().student)


def test_a_checkpoint_that_takes_long_is_written_less_often(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, written = 0.0, []
    save = training.resume_state.save

    def slow(trainer: adadfq.Trainer, path: Path) -> None:
        nonlocal clock
        clock += 2.0
        written.append(trainer.epoch)
        save(trainer, path)

    def pass_time(epoch: int, trainer: adadfq.Trainer) -> None:
        nonlocal clock
        clock += 15.0

    monkeypatch.setattr(training.time, "monotonic", lambda: clock)
    monkeypatch.setattr(training.resume_state, "save", slow)
    _trainer(on_epoch_end=pass_time, epochs=9).fit(tmp_path / "run")
    assert written == [1, 4, 7]  # 40 seconds apart


def test_the_time_of_an_epoch_is_that_of_its_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of one that was interrupted; nothing else counts."""
    clock = 0.0

    def slow(name: str, owner: Any, by: float) -> None:
        function = getattr(owner, name)

        def timed(*arguments: Any, **options: Any) -> Any:
            nonlocal clock
            clock += by
            return function(*arguments, **options)

        monkeypatch.setattr(owner, name, timed)

    slow("play", adadfq.Trainer, 1.0)
    slow("write", training.MetricLog, 100.0)
    for name in ("save", "restore"):
        slow(name, training.resume_state, 100.0)
    slow("save_result", training, 100.0)
    for name in ("perf_counter", "process_time"):
        monkeypatch.setattr(training.time, name, lambda: clock)

    def pass_time(epoch: int, trainer: adadfq.Trainer) -> None:
        nonlocal clock
        clock += 100.0

    trainer = _trainer(on_epoch_end=pass_time)
    _interrupt_at(6, trainer)
    trainer.fit(tmp_path / "run")
    assert trainer.epoch_seconds == trainer.epoch_cpu_seconds == [4.0]
    resumed = _trainer(on_epoch_end=pass_time)
    resumed.fit(tmp_path / "run", resume=True)
    assert resumed.epoch_seconds == resumed.epoch_cpu_seconds == [4.0] * 3


@pytest.mark.filterwarnings("ignore:the student will not train")
def test_resuming_asks_for_the_same_run(tmp_path: Path) -> None:
    trainer = _trainer()
    _interrupt_at(5, trainer)
    trainer.fit(tmp_path / "run")
    with pytest.raises(adadfq.CheckpointError, match="other settings .*alpha_ds"):
        _trainer(alpha_ds=0.9).fit(tmp_path / "run", resume=True)
    with pytest.raises(adadfq.CheckpointError, match="other settings .*seed"):
        _trainer(seed=9).fit(tmp_path / "run", resume=True)
    with pytest.raises(adadfq.CheckpointError, match="has 1 epochs behind it and the recipe asks for 1"):
        _trainer(epochs=1).fit(tmp_path / "run", resume=True)
    teacher = toy_teacher()
    with torch.no_grad():
        teacher.linear.bias.add_(1)
    other = adadfq.Trainer(teacher, adadfq.quantize(teacher, 4, 4), toy_recipe(), progress=False)
    with pytest.raises(adadfq.CheckpointError, match="other settings .*teacher"):
        other.fit(tmp_path / "run", resume=True)
    torch.save({"student": {}}, tmp_path / "run" / "checkpoint.pt")
    with pytest.raises(adadfq.CheckpointError, match="is not a checkpoint of adadfq"):
        _trainer().fit(tmp_path / "run", resume=True)
    (tmp_path / "run" / "checkpoint.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(adadfq.CheckpointError, match="cannot be read"):
        _trainer().fit(tmp_path / "run", resume=True)
    with pytest.raises(adadfq.CheckpointError, match="no checkpoint to resume from"):
        _trainer().fit(tmp_path / "elsewhere", resume=True)
    with pytest.raises(adadfq.InvalidInputError, match="resume needs the directory"):
        _trainer().fit(resume=True)


def test_an_existing_directory_is_refused_before_training(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "precious").write_text("keep")
    trainer = _trainer()
    with pytest.raises(adadfq.InvalidInputError, match="run"):
        trainer.fit(tmp_path / "run")
    assert trainer.step == 0 and (tmp_path / "run" / "precious").read_text() == "keep"
    assert len(list((tmp_path / "run").iterdir())) == 1


def test_divergence_is_an_error() -> None:
    with pytest.raises(adadfq.AdadfqError, match="diverged"):
        _trainer(lr_student=1e30).fit()


class _NoNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3 * 8 * 8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x.flatten(1))


def test_what_does_not_fit_is_refused() -> None:
    teacher = toy_teacher()

    def make(teacher: nn.Module = teacher, student: nn.Module | None = None, **settings: object) -> adadfq.Trainer:
        return adadfq.Trainer(teacher, student or adadfq.quantize(teacher), toy_recipe(**settings), progress=False)

    with pytest.raises(adadfq.InvalidInputError, match="10 classes and the recipe 100: set num_classes=10"):
        make(num_classes=100)
    with pytest.raises(adadfq.InvalidInputError, match="has no BatchNorm"):
        make(_NoNorm())
    with pytest.raises(adadfq.InvalidInputError, match="student must be a quantised model"):
        make(student=copy.deepcopy(teacher))
    with pytest.raises(adadfq.InvalidInputError, match="does not take images of shape"):
        make(image_channels=1, mean=(0.0,), std=(1.0,))
    with pytest.raises(adadfq.InvalidInputError, match="the student has 7 classes"):
        make(student=adadfq.quantize(toy_teacher(7)))
    student = adadfq.quantize(teacher).train()
    student.bn1.eval()
    with pytest.raises(adadfq.InvalidInputError, match="10 classes"):
        make(student=student, num_classes=100)
    assert student.training and not student.bn1.training
    with pytest.raises(adadfq.InvalidInputError, match=r"the teacher must be float32, got torch\.bfloat16"):
        make(toy_teacher().bfloat16(), student=student)
    broken = toy_teacher()
    with torch.no_grad():
        broken.bn1.running_var[0] = float("nan")
    with pytest.raises(adadfq.InvalidInputError, match=r"NaN or infinity in bn1\.running_var"):
        make(broken, student=student)
    with pytest.raises(adadfq.InvalidInputError, match="the generator does not take noise and labels"):
        make(batch_size=1, image_size=4)
    with pytest.raises(adadfq.InvalidInputError, match=r"must return images of shape \[8, 3, 8, 8\], got \[8, 1, 8, 8"):
        generator = adadfq.generator.LabelEmbeddingGenerator(10, 8, 1, latent_dim=16)
        adadfq.Trainer(teacher, student, toy_recipe(), generator, progress=False)
    by_hand = nn.Sequential(adadfq.QuantConv2d(3, 4, 1), nn.Flatten(), nn.Linear(256, 10))
    with pytest.raises(adadfq.InvalidInputError, match="differs by width and the student was not made by"):
        make(student=by_hand, by_weight_bits={4: {"gamma": 2.0}})
    with pytest.raises(adadfq.InvalidInputError, match="recipe must be an adadfq.Recipe, got str"):
        adadfq.Trainer(teacher, adadfq.quantize(teacher), "cifar10_resnet20")  # type: ignore[arg-type]
    with pytest.raises(adadfq.InvalidInputError, match="seed must be an integer"):
        adadfq.Trainer(teacher, adadfq.quantize(teacher), toy_recipe(), seed=-1)
    generator = adadfq.generator.LabelEmbeddingGenerator(10, 8, 3, latent_dim=99)
    with pytest.raises(adadfq.InvalidInputError, match="the generator has latent_dim=99 and the recipe 16"):
        adadfq.Trainer(teacher, adadfq.quantize(teacher), toy_recipe(), generator)


def test_a_step_reads_nothing_back() -> None:
    """No .item(), .tolist() or bool() on a tensor inside a step: on a GPU each would wait for the device.

    Adam reads its step counter, which it keeps on the host whatever the device: the optimisers are left out.
    """
    from torch.utils._python_dispatch import TorchDispatchMode

    class Refuse(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            assert func is not torch.ops.aten._local_scalar_dense.default
            return func(*args, **(kwargs or {}))

    trainer = _trainer()
    noise, labels = torch.randn(8, 16), torch.arange(8)
    trainer.game.optimizer_generator = trainer.game.optimizer_student = mock.Mock()
    with Refuse():
        for train in (False, True):
            trainer.game.step(noise, labels, train)


def test_the_student_keeps_its_layout_but_while_it_plays() -> None:
    teacher = toy_teacher()
    for memory_format in (torch.contiguous_format, torch.channels_last):
        student = adadfq.quantize(teacher, 4, 4).to(memory_format=memory_format)
        strides = [p.stride() for p in student.parameters()]
        trainer = adadfq.Trainer(teacher, student, toy_recipe(epochs=2), progress=False)
        assert [p.stride() for p in student.parameters()] == strides
        trainer.play()
        assert student.conv2.weight.is_contiguous(memory_format=torch.channels_last)
        assert trainer.game.teacher.conv2.weight.is_contiguous(memory_format=torch.channels_last)
        trainer.fit()
        assert [p.stride() for p in student.parameters()] == strides
        for optimizer in (trainer.optimizer_generator, trainer.optimizer_student):
            for weight, state in optimizer.state.items():
                shaped = [value for value in state.values() if value.shape == weight.shape]
                assert shaped and all(value.stride() == weight.stride() for value in shaped)


def test_tied_weights_keep_their_layout_and_weights_are_laid_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = toy_teacher()
    student = adadfq.quantize(teacher, 4, 4)
    twin = copy.deepcopy(student.conv2)
    twin.weight = student.conv2.weight
    student.add_submodule("twin", twin)
    trainer = adadfq.Trainer(teacher, student, toy_recipe(epochs=2), progress=False)
    calls = []
    lay_out = trainer._lay_out
    monkeypatch.setattr(trainer, "_lay_out", lambda: (calls.append(1), lay_out()))
    strides = student.conv2.weight.stride()
    trainer.fit()
    assert student.conv2.weight.stride() == strides and len(calls) == 1


@pytest.mark.parametrize("after_fit", [False, True])
def test_updates_are_those_of_plain_optimizers(after_fit: bool) -> None:
    """Fused optimizers walk weights, gradients and state by address: a layout that differs would scramble them."""
    trainer = _trainer(epochs=2, warmup_epochs=0)
    if after_fit:
        trainer.fit()
    optimizers = [trainer.optimizer_generator, trainer.optimizer_student]
    players = [trainer.game.generator_parameters, trainer.game.student_parameters]
    twins = [[p.detach().clone(memory_format=torch.contiguous_format) for p in group] for group in players]
    adam = torch.optim.Adam(twins[0], lr=float(optimizers[0].param_groups[0]["lr"]), betas=(0.5, 0.999), foreach=False)
    settings = {name: optimizers[1].param_groups[0][name] for name in ("momentum", "weight_decay", "nesterov")}
    sgd = torch.optim.SGD(twins[1], lr=float(optimizers[1].param_groups[0]["lr"]), foreach=False, **settings)
    for fused, plain, group, copies in zip(optimizers, (adam, sgd), players, twins, strict=True):
        for parameter, twin in zip(group, copies, strict=True):
            state = fused.state[parameter]
            if state:
                plain.state[twin] = {k: v.clone(memory_format=torch.contiguous_format) for k, v in state.items()}
    for _ in range(3):
        trainer.play()
        for plain, group, copies in zip((adam, sgd), players, twins, strict=True):
            for parameter, twin in zip(group, copies, strict=True):
                twin.grad = parameter.grad.contiguous()
            plain.step()
    for group, copies in zip(players, twins, strict=True):
        for parameter, twin in zip(group, copies, strict=True):
            torch.testing.assert_close(parameter.data, twin, rtol=1e-4, atol=1e-6)


def test_capture_needs_a_gpu() -> None:
    with pytest.raises(adadfq.InvalidInputError, match="capture needs a CUDA device, got cpu"):
        adadfq.Trainer(toy_teacher(), adadfq.quantize(toy_teacher()), toy_recipe(), capture=True)


def test_what_cannot_be_fused_plays_as_it_is_and_what_is_fused_stays_so() -> None:
    teacher = toy_teacher()
    student = adadfq.quantize(teacher, 4, 4)
    fused = adadfq.fuse(student)
    trainer = adadfq.Trainer(teacher, fused, toy_recipe(), progress=False)
    assert trainer.game.student is fused
    hooked = toy_teacher()
    hooked.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    with pytest.warns(UserWarning, match="the teacher plays unfused, which takes longer: ToyNet has hooks"):
        trainer = adadfq.Trainer(hooked, adadfq.quantize(teacher, 4, 4), toy_recipe(), progress=False)
    assert trainer.game.teacher is trainer.teacher
