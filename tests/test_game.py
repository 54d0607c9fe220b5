"""The game: what a step computes, and with how many passes. Its results: test_oracle_step.py."""

from __future__ import annotations

import copy

import oracle
import oracle_generator
import oracle_players
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as torch_F
from toy import toy_recipe, toy_teacher

import adadfq
from adadfq.game import BatchNormMatch, Game
from adadfq.generator import (
    ConditionalBatchNorm2d,
    ConditionalGenerator,
    LabelEmbeddingGenerator,
    UpsampledConv2d,
    _Norm,
    build_generator,
)
from adadfq.nn import set_calibrating


def _players(fused: bool = False, **settings: object) -> tuple[nn.Module, nn.Module, nn.Module, Game]:
    torch.manual_seed(0)
    recipe = toy_recipe(**settings)
    teacher = toy_teacher()
    student = adadfq.quantize(teacher, 3, 3)
    generator = build_generator(recipe)
    student(torch.randn(8, 3, 8, 8))
    set_calibrating(student, False)
    teacher.requires_grad_(False)
    game = Game(
        adadfq.fuse(teacher) if fused else teacher,
        adadfq.fuse(student) if fused else student,
        generator,
        recipe,
        torch.optim.Adam(generator.parameters(), lr=1e-3, betas=(0.5, 0.999)),
        torch.optim.SGD(student.parameters(), lr=1e-2, momentum=0.9, nesterov=True, weight_decay=1e-4),
    )
    return teacher, student, generator, game


def _calls(train_student: bool, fused: bool, **settings: object) -> dict[str, int]:
    _, _, _, game = _players(fused, **settings)
    noise, labels = torch.randn(8, 16), torch.arange(8)
    forwards = {"teacher": 0, "student": 0, "generator": 0}
    for name in forwards:

        def count(*_: object, name: str = name) -> None:
            forwards[name] += 1

        getattr(game, name).register_forward_hook(count)
    with torch.profiler.profile() as profile:
        game.step(noise, labels, train_student)
    events = {e.key: e.count for e in profile.key_averages()}
    return {**forwards, "conv_backward": events["aten::convolution_backward"], "conv": events["aten::convolution"]}


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_runs_each_network_once_and_no_needless_gradient(fused: bool) -> None:
    # Two convolutions in the networks, three in the generator.
    assert _calls(True, fused) == {
        "teacher": 1,
        "student": 1,
        "generator": 1,
        "conv": 7,
        "conv_backward": 3 + 2 + 2 + 2,
    }
    assert _calls(False, fused) == {"teacher": 1, "student": 1, "generator": 1, "conv": 7, "conv_backward": 3 + 2 + 2}


def test_a_mirrored_teacher_is_one_more_forward_without_gradient_and_none_in_warm_up() -> None:
    plain, mirrored = (_calls(True, True, mirror_teacher=on) for on in (False, True))
    assert mirrored == {**plain, "teacher": 2, "conv": plain["conv"] + 2}
    assert _calls(False, True, mirror_teacher=True) == _calls(False, True)


@pytest.mark.parametrize("bank_batches", [1, 0])
def test_replays_learn_the_mirrored_teacher_too(bank_batches: int) -> None:
    teacher, _, _, game = _players(True, mirror_teacher=True, replays=1, bank_batches=bank_batches)
    random = torch.Generator().manual_seed(0)
    if game.bank is not None:
        game.step(torch.randn(8, 16), torch.arange(8), True)
        images, targets, _ = game.bank.draw(random)
    else:
        images, targets, _ = game._new_batch(random)
    with torch.no_grad():
        expected = (teacher(images) + teacher(images.flip(3))) / 2
    torch.testing.assert_close(targets, expected)
    assert (targets - teacher(images)).abs().max() > 1e-3


@pytest.mark.parametrize("fused", [False, True])
def test_the_generators_loss_computes_no_weight_gradient_of_the_networks(fused: bool) -> None:
    """Counted from the output masks convolution_backward is called with."""
    from torch.utils._python_dispatch import TorchDispatchMode

    masks: list[tuple[bool, bool]] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if func is torch.ops.aten.convolution_backward.default:
                masks.append((args[-1][0], args[-1][1]))
            return func(*args, **(kwargs or {}))

    _, _, _, game = _players(fused)
    with Watch():
        game.step(torch.randn(8, 16), torch.arange(8), train_student=True)
    image_gradient_only, weight_gradient_only, both = (True, False), (False, True), (True, True)
    # L_G: teacher 2 and student 2 to the image, generator 3 with weights. L_Q: one inner layer, one first layer.
    assert masks.count(image_gradient_only) == 4
    assert masks.count(both) == 3 + 1
    assert masks.count(weight_gradient_only) == 1


def test_warm_up_leaves_the_student_alone() -> None:
    _, student, generator, game = _players()
    before = copy.deepcopy(student.state_dict()), copy.deepcopy(generator.state_dict())
    game.step(torch.randn(8, 16), torch.arange(8), train_student=False)
    assert all(torch.equal(v, before[0][k]) for k, v in student.state_dict().items())
    assert any(not torch.equal(v, before[1][k]) for k, v in generator.state_dict().items())
    assert all(p.requires_grad for p in student.parameters())


def test_batch_norm_called_by_keyword_is_seen() -> None:
    class Keyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(input=x)

    teacher, x = Keyword().eval(), torch.randn(4, 3, 5, 5)
    matching = BatchNormMatch(teacher)
    with matching.watching():
        teacher(x)
    expected = oracle.batch_norm_statistics_loss(x, torch.zeros(3), torch.ones(3))
    torch.testing.assert_close(matching.loss().double(), expected, rtol=1e-5, atol=1e-6)


def test_a_teacher_without_batch_norm_is_refused() -> None:
    with pytest.raises(adadfq.InvalidInputError, match="has no BatchNorm layer with running statistics"):
        BatchNormMatch(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()))
    with pytest.raises(adadfq.InvalidInputError, match="has no BatchNorm"):
        BatchNormMatch(nn.BatchNorm2d(3, track_running_stats=False))


@pytest.mark.parametrize(
    "kind,make", [("label_embedding", LabelEmbeddingGenerator), ("conditional_bn", ConditionalGenerator)]
)
def test_generators_are_the_papers(kind: str, make: type[nn.Module]) -> None:
    """Written out in the oracle: where each norm, upsampling and activation stands, and with which constants."""
    torch.manual_seed(0)
    generator = make(10, 16, 3, latent_dim=12).double()
    with torch.no_grad():
        for parameter in generator.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    noise, labels = torch.randn(6, 12, dtype=torch.float64), torch.tensor([0, 3, 3, 9, 1, 7])
    state = {key: value.clone() for key, value in generator.state_dict().items()}
    expected, statistics = oracle_generator.generate(kind, state, noise, labels, oracle_players.Edges())
    assert state["conv2.weight"].shape == (128, 128, 3, 3) and state["conv3.weight"].shape == (64, 128, 3, 3)
    torch.testing.assert_close(generator(noise, labels), expected, rtol=1e-9, atol=1e-9)
    found = generator.state_dict()
    for key, value in statistics.items():
        torch.testing.assert_close(found[key], value, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("make", [LabelEmbeddingGenerator, ConditionalGenerator])
@pytest.mark.parametrize("size,channels", [(32, 3), (8, 1)])
def test_generators(make: type[nn.Module], size: int, channels: int) -> None:
    torch.manual_seed(0)
    generator = make(10, size, channels, latent_dim=12)
    noise = torch.randn(4, 12)
    images = generator(noise, torch.arange(4))
    assert images.shape == (4, channels, size, size)
    torch.testing.assert_close(images.mean((0, 2, 3)), torch.zeros(channels), atol=1e-4, rtol=0)
    torch.testing.assert_close(images.var((0, 2, 3), correction=0), torch.ones(channels), atol=1e-2, rtol=0)
    images.square().mean().backward()
    assert all(p.grad is not None for p in generator.parameters())
    with torch.no_grad():
        for name, p in generator.named_parameters():
            if "label_embedding" in name or ".weight.weight" in name:
                p.add_(torch.randn_like(p))
    assert not torch.equal(generator(noise, torch.zeros(4, dtype=torch.int64)), generator(noise, torch.arange(4)))
    with pytest.raises(adadfq.InvalidInputError, match="image_size must be a positive multiple of 4, got 30"):
        make(10, 30)


@pytest.mark.parametrize("affine", [False, True])
def test_the_generators_running_statistics_are_batch_norms(affine: bool) -> None:
    torch.manual_seed(0)
    ours = _Norm(6, 0.8, 0.2) if affine else ConditionalBatchNorm2d(3, 6, 0.8, 0.2)
    norm = ours if isinstance(ours, nn.BatchNorm2d) else ours.norm
    theirs = nn.BatchNorm2d(6, 0.8)
    labels = torch.tensor([0, 2, 1, 1])
    for _ in range(3):
        x = torch.randn(4, 6, 5, 5) * 2 + 1
        got, want = ours(x, labels), torch_F.leaky_relu(theirs(x), 0.2)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        torch.testing.assert_close(getattr(norm, name), getattr(theirs, name))
    ours.eval()
    torch.testing.assert_close(ours(x, labels), torch_F.leaky_relu(theirs.eval()(x), 0.2), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_upsampled_convolutions_are_upsampling_and_convolution(memory_format: torch.memory_format) -> None:
    torch.manual_seed(0)
    conv = UpsampledConv2d(5, 7).double()
    x = torch.randn(2, 5, 6, 4, dtype=torch.float64).contiguous(memory_format=memory_format).requires_grad_()
    got = conv(x)
    want = torch_F.conv2d(torch_F.interpolate(x, scale_factor=2), conv.weight, conv.bias, padding=1)
    seed = torch.randn_like(want)
    inputs = (x, conv.weight, conv.bias)
    for a, b in zip(
        (got, *torch.autograd.grad(got, inputs, seed)), (want, *torch.autograd.grad(want, inputs, seed)), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert list(conv.state_dict()) == ["weight", "bias"] and conv.weight.shape == (7, 5, 3, 3)


def test_the_last_backward_of_a_step_lets_go_of_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the teacher and the generator, whose layers hold most of the memory, only one pass goes: the last."""
    _, _, _, game = _players()
    kept: list[tuple[bool, bool]] = []
    grad = torch.autograd.grad

    def recorded(loss: Tensor, parameters: list[nn.Parameter], **options: bool) -> tuple[Tensor, ...]:
        kept.append((parameters is game.generator_parameters, options["retain_graph"]))
        return grad(loss, parameters, **options)

    monkeypatch.setattr(torch.autograd, "grad", recorded)
    for train_student in (True, False):
        game.step(torch.randn(8, 16), torch.arange(8), train_student)
    assert kept == [(False, True), (True, False), (True, False)]
