"""Held-out generated images: that they are fixed, fit the teacher, and tell better students from worse."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from toy import ToyNet, toy_recipe, toy_teacher

import adadfq
from adadfq import HeldOut, InvalidInputError
from adadfq.demo import digits
from adadfq.game import BatchNormMatch

RECIPE = toy_recipe(temperature=4.0)
SIZES = {"images": 37, "steps": 12, "batch_size": 8}


@pytest.fixture(scope="module")
def held_out() -> HeldOut:
    return HeldOut(toy_teacher(), RECIPE, **SIZES)


def test_the_same_seed_gives_the_same_images(held_out: HeldOut) -> None:
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    again = HeldOut(toy_teacher(), RECIPE, **SIZES)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(again.images, held_out.images) and torch.equal(again.logits, held_out.logits)
    other = HeldOut(toy_teacher(), RECIPE, **SIZES, seed=1)
    assert not torch.equal(other.images, held_out.images)
    # What is of the student's training alone plays no part.
    trained_otherwise = RECIPE.replace(epochs=9, lr_student=1.0, lambda_l=0.3, alpha_ds=2.0, precision="bfloat16")
    assert torch.equal(HeldOut(toy_teacher(), trained_otherwise, **SIZES).images, held_out.images)


def test_shapes_and_the_teachers_logits(held_out: HeldOut) -> None:
    assert len(held_out) == 37 and held_out.images.dtype is torch.float16
    assert held_out.images.shape == (37, 3, 8, 8) and held_out.logits.shape == (37, 10)
    assert held_out.labels.shape == (37,) and held_out.labels.dtype is torch.int64
    with torch.no_grad():
        torch.testing.assert_close(held_out.logits, toy_teacher()(held_out.images.float()))
    # Two generators, each image once.
    assert len(held_out.images.flatten(1).unique(dim=0)) == 37
    (one,) = HeldOut(toy_teacher(), RECIPE, images=1, steps=1, batch_size=2).images
    assert one.shape == (3, 8, 8)


def test_images_are_of_all_steps_of_the_second_half(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Tensor] = []

    class Seen(nn.Module):
        """Images that say which step made them."""

        num_classes, latent_dim = 10, 16

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))

        def forward(self, noise: Tensor, labels: Tensor) -> Tensor:
            made.append(noise)
            return self.weight * 0 + torch.full((len(noise), 3, 8, 8), float(len(made)))

    monkeypatch.setattr("adadfq.held_out.build_generator", lambda _: Seen())
    found = HeldOut(toy_teacher(), RECIPE, images=25, steps=10, batch_size=4).images[:, 0, 0, 0].tolist()
    assert len(made) == 20 and not torch.equal(made[0], made[10])
    assert [found.count(float(step)) for step in range(1, 21)] == [0] * 5 + [2, 3, 2, 3, 3] + [0] * 5 + [2, 2, 3, 2, 3]


def test_the_images_fit_the_teachers_statistics() -> None:
    teacher = digits.load_teacher()
    recipe = adadfq.Recipe.named("digits")
    held_out = HeldOut(teacher, recipe, images=128, steps=60, batch_size=16)
    untrained = HeldOut(teacher, recipe.replace(lr_generator=0.0), images=128, steps=2, batch_size=64)
    by_label = HeldOut(teacher, recipe.replace(gamma=0.0), images=128, steps=30, batch_size=16)
    by_statistics = HeldOut(teacher, recipe.replace(gamma=100.0), images=128, steps=30, batch_size=16)

    def mismatch(images: Tensor) -> float:
        matching = BatchNormMatch(teacher)
        with matching.watching(), torch.no_grad():
            teacher(images.float())
        return float(matching.loss())

    assert mismatch(held_out.images) < 0.5 * mismatch(untrained.images)
    assert mismatch(by_statistics.images) < 0.5 * mismatch(by_label.images)
    quick = recipe.replace(gamma=0.0, lr_generator=1e-2)
    by_label_alone = HeldOut(teacher, quick, images=64, steps=60, batch_size=32)
    found, before = (float(cross_entropy(h.logits, h.labels)) for h in (by_label_alone, untrained))
    assert found < 0.7 * before
    assert int((held_out.logits.argmax(1).bincount(minlength=10) > 0).sum()) >= 7  # of ten classes
    # More bits agree more, by every measure.
    scores = []
    for bits in (2, 4, 8):
        student = adadfq.quantize(teacher, bits, bits)
        student(held_out.images.float())
        scores.append(held_out.score(student))
    assert scores[0]["agreement"] < scores[1]["agreement"] <= scores[2]["agreement"]
    for name in ("loss", "kl"):
        assert scores[0][name] > scores[1][name] > scores[2][name]


def test_scores_against_a_plain_calculation(held_out: HeldOut) -> None:
    torch.manual_seed(3)
    student = ToyNet().eval()
    with torch.no_grad():
        t, q = held_out.logits.double(), student(held_out.images.float()).double()
    p = ((t - q) / 4.0).softmax(1)
    found = held_out.score(student)
    assert found["agreement"] == pytest.approx(100 * float((t.argmax(1) == q.argmax(1)).double().mean()))
    assert found["loss"] == pytest.approx(float(16 * (p * p.log()).sum(1).mean()), rel=1e-5)
    assert found["kl"] == pytest.approx(float((t.softmax(1) * (t.log_softmax(1) - q.log_softmax(1))).sum(1).mean()))
    with torch.no_grad():
        mirrored = (t + toy_teacher()(held_out.images.float().flip(3)).double()) / 2
    torch.testing.assert_close(held_out.mirrored_logits.double(), mirrored, rtol=1e-5, atol=1e-5)
    expected_kl = (mirrored.softmax(1) * (mirrored.log_softmax(1) - q.log_softmax(1))).sum(1).mean()
    same = (mirrored.argmax(1) == q.argmax(1)).double().mean()
    assert found["mirrored_agreement"] == pytest.approx(100 * float(same))
    assert found["mirrored_kl"] == pytest.approx(float(expected_kl), rel=1e-5)
    of_teacher = held_out.score(toy_teacher())
    assert of_teacher["agreement"] == 100 and of_teacher["loss"] == pytest.approx(-16 * math.log(10), rel=1e-6)
    assert of_teacher["kl"] == pytest.approx(0, abs=1e-6)


def test_scoring_changes_nothing(held_out: HeldOut) -> None:
    student = adadfq.quantize(toy_teacher(), 4, 4)
    student(torch.randn(8, 3, 8, 8))  # ranges go on moving
    student.train()
    student.bn1.eval()
    modes = [module.training for module in student.modules()]
    before = {name: value.clone() for name, value in student.state_dict().items()}
    first = held_out.score(student)
    assert held_out.score(student) == first
    assert [module.training for module in student.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in student.parameters())
    student(torch.randn(8, 3, 8, 8))
    assert any(not torch.equal(value, before[name]) for name, value in student.state_dict().items())


def test_nan_agrees_with_nothing(held_out: HeldOut) -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.full((len(x), 10), float("nan"))

    found = held_out.score(Broken())
    assert found["agreement"] == 0 and math.isnan(found["loss"]) and math.isnan(found["kl"])


def test_a_fused_teacher_and_one_that_cannot_be_fused_give_the_same() -> None:
    class Unfusable(ToyNet):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x if x.sum() > -1e30 else -x)  # a branch on values

    unfusable = Unfusable()
    unfusable.load_state_dict(toy_teacher().state_dict())
    fused = adadfq.fuse(toy_teacher().requires_grad_(False))
    # Few steps: roundings that differ grow from step to step.
    first, *others = (
        HeldOut(teacher, RECIPE, images=20, steps=3, batch_size=8)
        for teacher in (toy_teacher(), unfusable.eval(), fused)
    )
    for other in others:
        torch.testing.assert_close(other.images, first.images, atol=5e-3, rtol=0)


@pytest.mark.parametrize(
    ("changes", "sizes", "message"),
    [
        ({}, {"images": 0}, "images must be"),
        (
            {},
            {"images": 97, "steps": 12, "batch_size": 8},
            "give at most 96 images, 97 were asked for: give more steps",
        ),
        ({"num_classes": 7}, {}, r"expected logits \[32, 7\] of the recipe's classes, got \[32, 10\]"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, int], sizes: dict[str, int], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        HeldOut(toy_teacher(), RECIPE.replace(**changes), **sizes)


def test_a_teacher_without_batch_norm_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="has no BatchNorm"):
        HeldOut(nn.Sequential(nn.Flatten(), nn.Linear(192, 10)), RECIPE)


def test_logits_of_other_classes_are_refused(held_out: HeldOut) -> None:
    with pytest.raises(InvalidInputError, match=r"expected logits \[37, 10\] of the recipe's classes, got \[37, 4\]"):
        held_out.score(toy_teacher(4))


def test_saved_images_are_the_same_ones(held_out: HeldOut, tmp_path: Path) -> None:
    path = tmp_path / "held-out.pt"
    held_out.save(path)
    again = HeldOut.load(path, toy_teacher(), RECIPE)
    assert again.digest == held_out.digest and len(again.digest) == 16 and again.seed == held_out.seed
    assert torch.equal(again.labels, held_out.labels) and torch.equal(again.logits, held_out.logits)
    student = adadfq.quantize(toy_teacher(), 3, 3)
    student(held_out.images.float())
    assert again.score(student) == held_out.score(student)
    assert HeldOut(toy_teacher(), RECIPE, **SIZES, seed=1).digest != held_out.digest
    assert [file.name for file in tmp_path.iterdir()] == ["held-out.pt"]


def test_files_that_hold_no_images_are_refused(held_out: HeldOut, tmp_path: Path) -> None:
    path = tmp_path / "held-out.pt"
    path.write_bytes(b"no such file")
    with pytest.raises(InvalidInputError, match="cannot be read as held-out images"):
        HeldOut.load(path, toy_teacher(), RECIPE)
    with pytest.raises(InvalidInputError, match="cannot be read as held-out images"):
        HeldOut.load(tmp_path / "absent.pt", toy_teacher(), RECIPE)
    torch.save({"images": held_out.images}, path)
    with pytest.raises(InvalidInputError, match="holds no held-out images"):
        HeldOut.load(path, toy_teacher(), RECIPE)
    held_out.save(path)
    with pytest.raises(InvalidInputError, match=r"holds images \[3, 8, 8\], the recipe's are \[3, 12, 12\]"):
        HeldOut.load(path, toy_teacher(), RECIPE.replace(image_size=12))
    with pytest.raises(InvalidInputError, match=r"expected logits \[37, 10\] of the recipe's classes, got \[37, 4\]"):
        HeldOut.load(path, toy_teacher(4), RECIPE)
