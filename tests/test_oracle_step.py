"""Training in float64 equals the oracle's, step by step, for every shipped recipe: values, gradients and updates.

A trainer is made as a user makes one, cast to float64 (which the reference backend serves), and run over a schedule in
which every epoch the recipe names still begins a phase, two steps long.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from importlib import resources
from typing import Any

import oracle_players
import oracle_step
import pytest
import torch
from oracle_step import Batch, OracleTraining, Step
from torch import Tensor, nn
from torch.nn import functional as torch_F

import adadfq
from adadfq import Recipe, Trainer
from adadfq.game import METRICS
from adadfq.generator import build_generator
from adadfq.models.resnet_cifar import resnet20
from adadfq.nn import activations

STEPS_PER_EPOCH = 2
BATCH = 12
WEIGHT_BITS = 3  # where a test names no width
#: Wider than the weights, so that the two cannot change places unseen.
MORE_ACT_BITS = 1

#: Of a tensor's largest element. Both sides round in float64 (2e-16), each in its own order, over networks of up to 20
#: layers and up to ten steps that feed on one another; the largest error seen is 1e-10, and mistakes are above 1e-6.
TOLERANCE = 1e-9
#: Of a player's largest gradient. Some are zero in exact arithmetic, as a bias's before a BatchNorm: rounding errors.
GRADIENT_FLOOR = 1e-12
#: Of weights after a step. Adam, dividing by sqrt(v) + 1e-8, makes those errors larger again: in the generator up to
#: 6e-10 is seen. SGD moves the student's by sums alone: 3e-14.
ADAM_TOLERANCE, SGD_TOLERANCE = 1e-8, 1e-11
#: Of step sizes that are learned, and of their gradients: the package keeps them in float32.
FLOAT32_TOLERANCE = 1e-6
#: Rounding errors reach 1e-12 of a step or of an activation; nearer than this, two right computations may differ.
NEAREST_EDGE = 1e-10


class Residual(nn.Module):
    """The module of :func:`oracle_players.residual_net`."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 6, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.conv3 = nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.conv4 = nn.Conv2d(6, 8, 3, stride=2, padding=1)
        self.bn1, self.bn2, self.bn3, self.bn4 = (nn.BatchNorm2d(n) for n in (6, 6, 6, 8))
        self.relu = nn.ReLU()
        self.linear = nn.Linear(8 * 4 * 4, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(x)))
        x = torch_F.relu(self.bn3(self.conv3(y)) + x)
        x = self.relu(self.bn4(self.conv4(x)))
        return self.linear(x.flatten(1))


class Bottleneck(nn.Module):
    """The module of :func:`oracle_players.bottleneck_net`."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, 6, 3, stride=2, padding=1, bias=False)
        self.expand = nn.Conv2d(6, 12, 1, bias=False)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False)
        self.project = nn.Conv2d(12, 6, 1, bias=False)
        self.head = nn.Conv2d(6, 10, 1, bias=False)
        self.bn1, self.bn2, self.bn3, self.bn4, self.bn5 = (nn.BatchNorm2d(n) for n in (6, 12, 12, 6, 10))
        self.act = nn.ReLU6()
        self.linear = nn.Linear(10 * 4 * 4, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.bn1(self.stem(x)))
        y = torch_F.relu6(self.bn2(self.expand(x)))
        y = self.act(self.bn3(self.depthwise(y)))
        x = x + self.bn4(self.project(y))
        x = self.act(self.bn5(self.head(x)))
        return self.linear(x.flatten(1))


def _resnet20(channels: int, classes: int) -> nn.Module:
    assert channels == 3
    return resnet20(classes)


#: (module, the same network of the oracle, number of activations)
NETWORKS: dict[str, tuple[Callable[[int, int], nn.Module], oracle_players.Network, int]] = {
    "residual": (Residual, oracle_players.residual_net, 4),
    "bottleneck": (Bottleneck, oracle_players.bottleneck_net, 4),
    "resnet20": (_resnet20, oracle_players.resnet20, 19),
}


def _teacher(network: str, channels: int, classes: int) -> nn.Module:
    """A network whose affine parameters and running statistics are not the initial ones."""
    torch.manual_seed(1)
    net = NETWORKS[network][0](channels, classes)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            # Some activations of ReLU6 reach 6.
            nn.init.normal_(module.bias, std=2.0 if network == "bottleneck" else 0.3)
    with torch.no_grad():
        net.linear.weight.mul_(5)
        for _ in range(3):
            net(torch.randn(BATCH, channels, 8, 8))
    return net.eval()


def _oracles_name(model: nn.Module, name: str) -> str:
    """What the oracle calls a parameter: a range by its place."""
    ranges = [f"{act}.scale" for act in activations(model)]
    return f"range {ranges.index(name)}.scale" if name in ranges else name


def _network_state(model: nn.Module) -> dict[str, Tensor]:
    """Its parameters and statistics, and weights' own steps, by the oracle's names."""
    acts = tuple(f"{act}." for act in activations(model))
    state = {key: value for key, value in model.state_dict().items() if not key.startswith(acts)}
    return {**state, **{_oracles_name(model, key): value.detach() for key, value in model.named_parameters()}}


def _as_json(name: str) -> dict[str, Any]:
    """A recipe as its file says it, and the one its file is based on."""
    recipe = json.loads(resources.files("adadfq.recipes").joinpath(f"{name}.json").read_text(encoding="utf-8"))
    return {**(_as_json(recipe.pop("base")) if "base" in recipe else {}), **recipe}


def _widths(name: str) -> list[int]:
    """Every width the recipe names, and one that it does not."""
    named = sorted(int(bits) for bits in _as_json(name).get("by_weight_bits", {}))
    return [next(bits for bits in (WEIGHT_BITS, 6, 7, 8) if bits not in named), *named]


#: Where H' of the usual seed's batches does not reach both bounds.
SEEDS = {"adadfq_plus": 10}
EVERY_RECIPE = [(name, bits) for name in Recipe.names() for bits in _widths(name)]


def _condensed(name: str, weight_bits: int, **overrides: Any) -> tuple[dict[str, Any], Recipe]:
    """A recipe on small images over a short schedule: only the epochs at which something begins.

    Returns:
        The oracle's settings and the package's recipe, which the trainer settles for the width.
    """
    settings = oracle_step.settled(_as_json(name), weight_bits)
    lengths = ["epochs", "warmup_epochs", "calibration_epochs"]
    begins = {0, *(settings[length] for length in lengths), *settings["lr_milestones"]}
    if len([epoch for epoch in begins if settings["warmup_epochs"] <= epoch < settings["epochs"]]) == 1:
        begins.add(settings["warmup_epochs"] + 1)  # of the student's training more than one epoch
    begins = sorted(begins)
    changes = {
        **{length: begins.index(settings[length]) for length in lengths},
        "lr_milestones": [begins.index(milestone) for milestone in settings["lr_milestones"]],
        "steps_per_epoch": _steps_per_epoch(settings["replays"]),
        "batch_size": BATCH,
        "image_size": 8,
        **overrides,
    }
    # A recipe in bfloat16 differs in its arithmetic only, which here is float64.
    return {**settings, **changes}, Recipe.named(name, precision="float32", **changes)


def _steps_per_epoch(replays: int) -> int:
    """So that every epoch of the student's training has a step of both players, as recipes demand."""
    return STEPS_PER_EPOCH + replays


class _Recorded:
    """What one step of the package computed, in the words of :class:`oracle_step.Step`."""

    def __init__(self) -> None:
        self.values: dict[str, Tensor] = {}
        self.gradients: dict[str, Tensor] = {}
        self.inputs: list[Batch] = []

    def tap(self, x: Tensor, where: str) -> Tensor:
        """`x` under another name, whose gradient is kept."""
        tapped = x.view_as(x)
        if tapped.requires_grad:
            tapped.register_hook(lambda grad: self.gradients.__setitem__(where, grad.detach().clone()))
        return tapped


def _unmoved(noise: Tensor, labels: Tensor) -> Batch:
    """A batch neither cropped nor flipped."""
    return Batch(noise, labels, [(0, 0)] * len(labels), [False] * len(labels))


class _Watch:
    """Casts a trainer to float64 and compares each of its steps with the oracle's."""

    def __init__(self, trainer: Trainer, training: OracleTraining, monkeypatch: pytest.MonkeyPatch) -> None:
        self.trainer, self.training = trainer, training
        self.seen = _Recorded()
        self.steps: list[Step] = []
        averaged = trainer.game.averaged
        generators = [trainer.generator] if averaged is None else [trainer.generator, averaged]
        for model in (trainer.teacher, trainer.student, *generators):
            model.double()
        for optimizer in (trainer.optimizer_generator, trainer.optimizer_student):
            for group in optimizer.param_groups:
                group["lr"] = group["lr"].double()
        for generator in generators:
            generator.register_forward_pre_hook(self._inputs)
        trainer.generator.register_forward_hook(
            lambda module, args, images: self.seen.tap(images, "loss_generator at images")
        )
        self._shown = trainer.game.transform.__call__
        if not trainer.game.transform.is_identity:
            monkeypatch.setattr(adadfq.game.Transform, "__call__", lambda transform, *args: self._transform(*args))
        self._losses(monkeypatch, adadfq.game.functional)
        self._step = trainer.game.step
        self._replay = trainer.game.replay
        trainer.game.step = self._compared_step  # type: ignore[method-assign]
        trainer.game.replay = self._compared_replay  # type: ignore[method-assign]

    def _inputs(self, module: nn.Module, args: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        noise, labels = args[0].double(), args[1].clone()
        self.seen.inputs.append(_unmoved(noise, labels))
        return noise, labels

    def _transform(self, images: Tensor, random: torch.Generator) -> Tensor:
        """Keep what the transform is about to draw: first all tops, then all lefts, then the flips."""
        again = torch.Generator().set_state(random.get_state())
        recipe, batch = self.trainer.recipe, len(images)
        changes: dict[str, Any] = {}
        if recipe.crop:
            tops, lefts = torch.randint(2 * recipe.crop + 1, (2, batch, 1), generator=again).squeeze(2).tolist()
            changes["places"] = list(zip(tops, lefts, strict=True))
        if recipe.flip:
            changes["flipped"] = (torch.rand(batch, generator=again) < 0.5).tolist()
        self.seen.inputs[-1] = self.seen.inputs[-1]._replace(**changes)
        return self._shown(images, random)

    def _losses(self, monkeypatch: pytest.MonkeyPatch, functional: Any) -> None:
        """Keep what the step's metrics round to float32."""
        logits_loss, entropy_distillation = self.trainer.game._logits_loss, functional.entropy_distillation
        feature_loss = adadfq.game.feature_loss

        def of_logits(t: Tensor, q: Tensor, labels: Tensor) -> Any:
            seen = self.seen
            places = "loss_generator at teacher_logits", "loss_generator at student_logits"
            result = logits_loss(seen.tap(t, places[0]), seen.tap(q, places[1]), labels)
            parts = {"margin": "loss_margin", "disagreement": "loss_ds", "agreement": "loss_as", "h_prime": "h_prime"}
            seen.values.update({name: getattr(result, part) for part, name in parts.items()})
            seen.values["teacher_logits"] = t.detach()
            return result

        def distillation(t: Tensor, q: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            q = self.seen.tap(q, "loss_student at student_logits")
            loss = entropy_distillation(t, q, *args, **kwargs)
            self.seen.values.update(loss_logits=loss.detach(), targets=t, student_logits=q.detach())
            return loss

        def features(teacher: Any, student: Any) -> Tensor:
            loss = feature_loss(teacher, student)
            self.seen.values["loss_features"] = self.trainer.recipe.feature_weight * loss.detach()
            return loss

        monkeypatch.setattr(self.trainer.game, "_logits_loss", of_logits)
        monkeypatch.setattr(functional, "entropy_distillation", distillation)
        monkeypatch.setattr(adadfq.game, "feature_loss", features)
        loss = self.trainer.game.bn_match.loss

        def statistics_loss() -> Tensor:
            found = loss()
            self.seen.values["loss_bns"] = found.detach()
            return found

        monkeypatch.setattr(self.trainer.game.bn_match, "loss", statistics_loss)

    def _compared_step(self, *args: Any, **kwargs: Any) -> Tensor:
        trainer, looked_at, self.seen = self.trainer, self.seen.inputs, _Recorded()
        images: list[Tensor] = []
        handle = trainer.generator.register_forward_hook(lambda module, inputs, output: images.append(output.detach()))
        metrics = self._step(*args, **kwargs)
        handle.remove()
        self.seen.values["images"] = images[0]
        self.seen.values.setdefault("loss_features", torch.zeros((), dtype=torch.float64))

        (inputs,) = self.seen.inputs
        self.seen.inputs = []
        want = self.training.step(inputs, looked_at)
        teacher = want.values["teacher_logits"].argmax(1)
        self._compare(want, metrics, teacher_accuracy=(teacher == inputs.labels).double().mean().item())
        return metrics

    def _compared_replay(self, random: torch.Generator) -> Tensor:
        trainer, training = self.trainer, self.training
        looked_at, self.seen = self.seen.inputs, _Recorded()
        drawn = torch.rand((), generator=torch.Generator().set_state(random.get_state()), dtype=torch.float64).item()
        metrics = self._replay(random)
        self.seen.values.setdefault("loss_features", torch.zeros((), dtype=torch.float64))
        inputs, self.seen.inputs = self.seen.inputs, []
        if trainer.recipe.bank_batches:
            assert not inputs  # nothing was generated
            want = training.replay(int(drawn * min(training.stored, trainer.recipe.bank_batches)), looked_at)
        else:
            (batch,) = inputs
            want = training.replay(batch, looked_at)
        self._compare(want, metrics)
        return metrics

    def _compare(self, want: Step, metrics: Tensor, **also: float) -> None:
        trainer = self.trainer
        self.steps.append(want)
        step = f"step {len(self.steps) - 1}"
        assert want.edges.nearest > NEAREST_EDGE, (
            f"{step}: {want.edges.where} comes within {want.edges.nearest:.1e} of its edge, where both answers are "
            "right; take another seed"
        )
        unseen = ("loss_generator", "loss_student")  # the sums are in the metrics
        values = {key: value for key, value in want.values.items() if key not in unseen}
        _compare_all(step, self.seen.values, values)
        _compare_all(f"{step}, gradient of", self.seen.gradients, want.gradients)
        of_student = SGD_TOLERANCE if trainer.recipe.student_optimizer == "sgd" else ADAM_TOLERANCE
        for name, model, gradients, state, tolerance in (
            ("generator", trainer.generator, want.generator_gradients, want.generator, ADAM_TOLERANCE),
            ("student", trainer.student, want.student_gradients, want.student, of_student),
        ):
            got = {_oracles_name(model, k): p.grad for k, p in model.named_parameters() if p.grad is not None}
            floor = GRADIENT_FLOOR * max([g.abs().max().item() for g in gradients.values()], default=0.0)
            if gradients or model is trainer.student:  # a replay leaves the generator's
                _compare_all(f"{step}, {name}'s gradient of", got, gradients, floor=floor)
            _compare_all(f"{step}, {name}'s new", _network_state(model), state, tolerance)
        if trainer.recipe.generator_ema and want.phase.trains_student:
            assert trainer.game.averaged is not None and want.averaged is not None
            _compare_all(f"{step}, average's", trainer.game.averaged.state_dict(), want.averaged, ADAM_TOLERANCE)
        self._compare_ranges(step, want)
        self._compare_metrics(step, metrics, want, also)
        sizes = {name: value for name, value in _network_state(trainer.student).items() if name.endswith("scale")}
        self.training.adopt_step_sizes(sizes)

    def _compare_ranges(self, step: str, want: Step) -> None:
        acts = list(activations(self.trainer.student).values())
        assert len(acts) == len(want.ranges)
        for i, (act, (lo, hi, batches, scale, zero_point)) in enumerate(zip(acts, want.ranges, strict=True)):
            assert act._calibrating == bool(act.calibrating) == want.phase.moves_ranges, f"{step}, range {i}"
            assert int(act.num_batches) == batches, f"{step}, range {i}"
            # A learned scale is compared with the weights; the range is then what its codes span.
            learned = f"range {i}.scale" in want.student
            pairs = [] if learned else [(act.running_min, lo), (act.running_max, hi), (act.scale, scale)]
            for got, expected in pairs:
                # Float32 on both sides, of one number but for its float64 rounding: the same float32.
                assert got.item() == expected.item(), f"{step}, range {i}"
            assert int(act.zero_point) == int(zero_point), f"{step}, range {i}"

    def _compare_metrics(self, step: str, metrics: Tensor, want: Step, also: dict[str, float]) -> None:
        """The row of float32 that users see."""
        targets, student = (want.values[name].argmax(1) for name in ("targets", "student_logits"))
        expected = {
            **{key: value.mean().item() for key, value in want.values.items() if key in METRICS},
            "agreement": (targets == student).double().mean().item(),
            **also,
        }
        got = dict(zip(METRICS, metrics.tolist(), strict=True))
        assert want.phase.is_replay or set(expected) == set(METRICS), step
        assert {name for name, value in got.items() if value != value} == set(METRICS) - set(expected), step
        assert {name: got[name] for name in expected} == pytest.approx(expected, rel=1e-6), step


def _compare_all(
    what: str, got: dict[str, Any], want: dict[str, Tensor], tolerance: float = TOLERANCE, floor: float = 0.0
) -> None:
    assert set(got) == set(want), what
    for name, expected in want.items():
        found = got[name]
        of_quantizer = name.endswith(("scale", "zero_point"))
        dtype = (torch.float32 if name.endswith("scale") else torch.int32) if of_quantizer else expected.dtype
        assert found.dtype == dtype and found.shape == expected.shape, f"{what} {name}"
        if not dtype.is_floating_point:
            assert torch.equal(found, expected.to(dtype)), f"{what} {name}"
            continue
        error, size = (found - expected).abs().max().item(), expected.abs().max().item()
        allowed = max(tolerance, FLOAT32_TOLERANCE if of_quantizer else 0) * size + floor
        assert error <= allowed, f"{what} {name}: {error:.2e} off, largest element {size:.2e}"


def _players(
    network: str, recipe: Recipe, settings: dict[str, Any], weight_bits: int, **options: Any
) -> tuple[Trainer, OracleTraining]:
    """A trainer and an oracle that start alike."""
    teacher = _teacher(network, recipe.image_channels, recipe.num_classes)
    act_bits = min(weight_bits + MORE_ACT_BITS, 8)
    student = adadfq.quantize(teacher, weight_bits, act_bits)
    generator = build_generator(recipe)
    with torch.no_grad():
        for parameter in generator.parameters():  # labels are to matter from the first step on
            parameter.add_(torch.randn_like(parameter) * 0.1)
        for module in generator.modules():
            if isinstance(module, nn.Embedding):
                module.weight.mul_(torch.randn(len(module.weight), 1).exp())
        # A student apart from its teacher, or log K - min H, by which H' is divided, would be next to nothing; but not
        # on every image alike, or no H' would be high.
        for parameter in student.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.3 * parameter.std() if parameter.dim() > 1 else 0.03))
        images = torch.randn(64, recipe.image_channels, 8, 8)
        student.linear.bias.add_((teacher(images) - copy.deepcopy(student)(images)).mean(0))
    states = teacher.state_dict(), _network_state(student), generator.state_dict()
    training = OracleTraining(settings, *NETWORKS[network][1:], *states, weight_bits, act_bits)
    return Trainer(teacher, student, recipe, generator, **{"seed": 3, "progress": False, **options}), training


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Step]]:
    """Train in float64, comparing every step; arguments as :func:`_players` takes. Returns the oracle's steps."""

    def start(*players: Any, **options: Any) -> list[Step]:
        watch = _Watch(*_players(*players, **options), monkeypatch)
        watch.trainer.fit()
        return watch.steps

    return start


@pytest.mark.parametrize("name,bits", EVERY_RECIPE)
def test_recipes_settle_as_their_files_say(name: str, bits: int) -> None:
    """A recipe setting a field that the oracle does not compute fails here, by the field's name."""
    settings = oracle_step.settled(_as_json(name), bits)
    recipe = Recipe.named(name).for_weight_bits(bits).to_dict()
    assert {key: recipe[key] for key in settings} == settings
    assert set(recipe) == set(settings) | oracle_step.NO_PART  # every field of a recipe has its oracle


def test_fields_without_an_oracle_are_named() -> None:
    for recipe in ({"lookahead": 3}, {"by_weight_bits": {"3": {"lookahead": 3}}}):
        with pytest.raises(oracle_step.Unknown, match="the recipe sets lookahead, which tests/oracle_step.py does not"):
            oracle_step.settled(recipe, 3)
        assert oracle_step.settled({"by_weight_bits": {"3": {"lookahead": 3}}}, 4) == oracle_step.PAPER
    for name in oracle_step.CHOICES:
        with pytest.raises(oracle_step.Unknown, match=f"the recipe's {name} 'new' is not written"):
            oracle_step.settled({name: "new"}, 3)


def _assert_both_bounds_are_felt(steps: list[Step], settings: dict[str, Any]) -> None:
    h_prime = torch.cat([step.values["h_prime"] for step in steps if not step.phase.is_replay])
    assert ((h_prime > 0) & (h_prime < settings["lambda_l"])).any() and (h_prime > settings["lambda_u"]).any()


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("name,bits", EVERY_RECIPE)
def test_every_step_of_a_recipe_equals_the_oracle(
    play: Callable[..., list[Step]], name: str, bits: int, fuse: bool
) -> None:
    settings, recipe = _condensed(name, bits)
    network = "bottleneck" if "mobilenet" in name else "residual"
    steps = play(network, recipe, settings, bits, fuse=fuse, seed=SEEDS.get(name, 3))
    phases = [step.phase for step in steps]
    assert len(phases) == settings["epochs"] * settings["steps_per_epoch"]
    assert sum(phase.moves_ranges for phase in phases) >= 2
    assert any(not phase.trains_student for phase in phases)
    assert sum(phase.trains_student and not phase.moves_ranges for phase in phases) >= 3
    if bits <= 5:  # with more, teacher and student agree too well for the lower bound
        _assert_both_bounds_are_felt(steps, settings)


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("name", ["cifar10_resnet20", "adadfq_plus"])
def test_every_step_on_a_resnet20_equals_the_oracle(play: Callable[..., list[Step]], name: str, fuse: bool) -> None:
    settings, recipe = _condensed(name, 4, epochs=2)
    assert len(play("resnet20", recipe, settings, 4, fuse=fuse)) == 2 * STEPS_PER_EPOCH


#: What no shipped recipe does: both bounds felt by most samples, every weight of its own, ranges that still move while
#: the student trains, and optimizers of other settings.
OTHER = {
    "num_classes": 7,
    "image_size": 8,
    "latent_dim": 16,
    "batch_size": BATCH,
    "epochs": 4,
    "steps_per_epoch": STEPS_PER_EPOCH,
    "warmup_epochs": 1,
    "calibration_epochs": 2,
    "lr_milestones": (2, 3),
    "lr_decay": 0.3,
    "lr_generator": 2e-3,
    "lr_student": 1e-2,
    "adam_betas": (0.7, 0.95),
    "momentum": 0.6,
    "weight_decay": 0.05,
    "alpha_ds": 0.5,
    "alpha_as": 0.3,
    "beta": 0.7,
    "gamma": 0.4,
    "lambda_l": 0.45,
    "lambda_u": 0.55,
    "temperature": 3.0,
}


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("detach_min", [False, True])
@pytest.mark.parametrize("network,generator", [("residual", "label_embedding"), ("bottleneck", "conditional_bn")])
def test_every_step_of_other_settings_equals_the_oracle(
    play: Callable[..., list[Step]], network: str, generator: str, detach_min: bool, fuse: bool
) -> None:
    changes = {**OTHER, "generator": generator, "detach_min": detach_min, "nesterov": not detach_min}
    steps = play(network, Recipe(**changes), {**oracle_step.PAPER, **changes}, 4, fuse=fuse)
    assert [tuple(step.phase[:2]) for step in steps[::STEPS_PER_EPOCH]] == [
        (False, True),
        (True, True),
        (True, False),
        (True, False),
    ]
    _assert_both_bounds_are_felt(steps, changes)


LEARNED = {
    "act_range": "mse",
    "learn_steps": True,
    "lr_steps": 3e-3,
    "student_optimizer": "adam",
    "lr_schedule": "cosine",
}
AVERAGED = {"replays": 1, "bank_batches": 0, "generator_ema": 0.8}
#: Options that are not the paper's, each in as few others' company as it can be.
BEYOND = {
    "kept ranges": (
        "bottleneck",
        {"generator": "conditional_bn", "weight_range": "mse", "feature_weight": 5.0, "lr_warmup_steps": 3},
    ),
    "learned steps": ("residual", LEARNED),
    "mirrored teacher": ("residual", {"mirror_teacher": True, "flip": True}),
    "low-pass": ("residual", {"low_pass": 0.6}),
    "bank": (
        "residual",
        {"replays": 2, "bank_batches": 2, "feature_weight": 5.0, "mirror_teacher": True, "crop": 1},
    ),
    "bank, learned steps": ("bottleneck", {**LEARNED, "replays": 1, "bank_batches": 2}),
    "new images": ("residual", {"replays": 1, "bank_batches": 0, "flip": True, "mirror_teacher": True}),
    "averaged generator": ("residual", AVERAGED),
    "averaged generator of classes": (
        "bottleneck",
        {**AVERAGED, "generator": "conditional_bn", "spectral_norm": True},
    ),
    "spectral norm": ("residual", {"spectral_norm": True}),
}


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("which", BEYOND)
def test_every_step_beyond_the_paper_equals_the_oracle(play: Callable[..., list[Step]], which: str, fuse: bool) -> None:
    network, options = BEYOND[which]
    changes = {**OTHER, **options}
    changes["steps_per_epoch"] = _steps_per_epoch(changes.get("replays", 0))
    steps = play(network, Recipe(**changes), {**oracle_step.PAPER, **changes}, 4, fuse=fuse)
    assert len(steps) == OTHER["epochs"] * changes["steps_per_epoch"]
    if which.startswith("bank"):
        replayed = [step.replayed for step in steps if step.replayed is not None]
        # Of kept batches the first ones make room, and those that came in their places are drawn.
        assert max(replayed) >= changes["bank_batches"] and len(set(replayed)) > 2


@pytest.mark.parametrize("fuse", [False, True])
def test_a_float32_trainer_follows_the_oracle(backend: str, fuse: bool) -> None:
    """As users run it, nothing cast or replaced, over a whole schedule: learning rates, updates, ranges and losses."""
    settings, recipe = _condensed("cifar10_resnet20", 4)
    inputs: list[Batch] = []
    steps: list[Step] = []

    def compare(epoch: int, trainer: Trainer) -> None:
        steps.extend(training.step(inputs.pop(0), []) for _ in range(STEPS_PER_EPOCH))
        last = steps[-1]
        for model, optimizer, lr, start, end in (
            (trainer.generator, trainer.optimizer_generator, last.phase.lr_generator, generator, last.generator),
            (trainer.student, trainer.optimizer_student, last.phase.lr_student, student, last.student),
        ):
            assert [group["lr"].item() for group in optimizer.param_groups] == [pytest.approx(lr, rel=1e-6)]
            got = {name: value.detach().double() for name, value in model.named_parameters()}
            moved = sum((end[name] - start[name]).square().sum().item() for name in got) ** 0.5
            off = sum((end[name] - got[name]).square().sum().item() for name in got) ** 0.5
            # Seen: 0.5 % of the way, of which the student's is its weights' own float32 rounding.
            assert off <= 0.02 * moved, f"epoch {epoch}: {off:.2e} off after {moved:.2e}"
        for act, (lo, hi, *_) in zip(activations(trainer.student).values(), last.ranges, strict=True):
            assert act.running_min.item() == pytest.approx(lo.item(), abs=1e-5)
            assert act.running_max.item() == pytest.approx(hi.item(), rel=1e-5)

    trainer, training = _players("residual", recipe, settings, 4, fuse=fuse, on_epoch_end=compare)
    generator, student = dict(training.generator), dict(training.student)
    trainer.generator.register_forward_pre_hook(lambda module, args: inputs.append(_unmoved(*args)))
    result = trainer.fit()
    assert len(steps) == settings["epochs"] * STEPS_PER_EPOCH
    for name, got in result.metrics.items():
        if name in steps[-1].values:
            of_last_epoch = [step.values[name].mean().item() for step in steps[-STEPS_PER_EPOCH:]]
            assert got == pytest.approx(sum(of_last_epoch) / STEPS_PER_EPOCH, rel=1e-4), name
