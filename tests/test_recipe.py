"""Recipes: the paper's table, overriding, and refusal of bad values."""

from __future__ import annotations

import json

import pytest

from adadfq import InvalidInputError, Recipe

#: METHOD's table: lr_Q, steps, Q starts at, alpha_ds, alpha_as, lambda_l, lambda_u, T, by recipe and width.
PAPER = {
    ("cifar10_resnet20", 3): (1e-4, (100, 200, 300), 4, 0.2, 0.1, 0.1, 0.8, 20),
    ("cifar10_resnet20", 5): (1e-4, (100, 200, 300), 4, 0.2, 0.1, 0.1, 0.8, 20),
    ("cifar100_resnet20", 4): (1e-4, (100, 200, 300), 4, 0.2, 0.1, 0.1, 0.8, 20),
    ("imagenet_resnet18", 3): (1e-5, (350, 400), 50, 0.2, 0.1, 0.1, 0.8, 5),
    ("imagenet_resnet18", 4): (1e-5, (350, 400), 50, 0.2, 0.1, 0.3, 0.8, 5),
    ("imagenet_resnet18", 5): (1e-5, (350, 400), 50, 0.3, 0.1, 0.3, 0.8, 5),
    ("imagenet_mobilenetv2", 3): (1e-5, (350, 400), 50, 0.2, 0.1, 0.1, 0.8, 5),
    ("imagenet_mobilenetv2", 4): (1e-5, (350, 400), 50, 0.3, 0.1, 0.1, 0.8, 5),
    ("imagenet_resnet50", 3): (1e-4, (150, 300, 400), 100, 0.2, 0.1, 0.4, 0.8, 5),
    ("imagenet_resnet50", 4): (1e-4, (200, 300, 400), 50, 0.1, 0.1, 0.3, 0.8, 5),
    ("imagenet_resnet50", 5): (1e-4, (350, 400), 50, 0.2, 0.1, 0.3, 0.8, 5),
}


@pytest.mark.parametrize("name,bits", PAPER)
def test_shipped_recipes_are_the_papers(name: str, bits: int) -> None:
    r = Recipe.named(name, weight_bits=bits)
    found = (
        r.lr_student,
        r.lr_milestones,
        r.warmup_epochs,
        r.alpha_ds,
        r.alpha_as,
        r.lambda_l,
        r.lambda_u,
        r.temperature,
    )
    assert found == PAPER[name, bits]
    common = (r.batch_size, r.epochs, r.steps_per_epoch, r.latent_dim, r.beta, r.gamma, r.lr_generator, r.adam_betas)
    assert common == (16, 400, 200, 100, 1, 1, 1e-3, (0.5, 0.999))
    assert (r.momentum, r.nesterov, r.weight_decay, r.lr_decay, r.calibration_epochs) == (0.9, True, 1e-4, 0.1, 4)
    assert r.generator == ("conditional_bn" if name.startswith("imagenet") else "label_embedding")


@pytest.mark.parametrize("name", Recipe.names())
def test_round_trip_through_json(name: str) -> None:
    recipe = Recipe.named(name)
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    assert recipe.name == name and recipe.source


def test_an_override_wins_over_the_width() -> None:
    recipe = Recipe.named("imagenet_resnet18", lambda_l=0.2)
    assert recipe.for_weight_bits(4).lambda_l == 0.2
    assert Recipe.named("imagenet_resnet18").for_weight_bits(4).lambda_l == 0.3
    assert Recipe.named("imagenet_resnet18").for_weight_bits(4).by_weight_bits == {}


@pytest.mark.parametrize(
    "field,value,message",
    [
        ("epochs", 0, "epochs must be at least 1, got 0"),
        ("epochs", 2.5, "epochs must be of type int, got 2.5"),
        ("epochs", True, "epochs must be of type int, got True"),
        ("image_size", 30, "image_size must be a positive multiple of 4, got 30"),
        ("lambda_l", 0.9, r"lambda_l must be 0\.\.0\.8, got 0\.9"),
        ("lambda_u", 1.5, r"lambda_u must be 0\.\.1, got 1\.5"),
        ("temperature", 0, "temperature must be positive"),
        ("momentum", 1.0, "momentum must be at least 0 and below 1"),
        ("lr_milestones", (20, 10), "increasing epochs"),
        ("lr_milestones", 10, "lr_milestones must be a sequence of int"),
        ("mean", (0.5,), "mean must have one number for each of the 3 image channels"),
        ("std", (0.0, 1, 1), "std must be positive"),
        ("generator", "gan", "generator must be one of label_embedding, conditional_bn, got 'gan'"),
        ("lr_student", float("nan"), "lr_student must be a finite number"),
        ("adam_betas", (0.5,), "adam_betas must be two numbers"),
        ("by_weight_bits", {9: {}}, r"by_weight_bits must be 2\.\.8, got 9"),
        ("by_weight_bits", {"x": {}}, r"by_weight_bits must be \{bits"),
        ("by_weight_bits", [4], r"by_weight_bits must be \{bits"),
        ("by_weight_bits", {4: {"lamda": 1}}, "unknown recipe field lamda"),
        ("learning_rate", 1, "unknown recipe field learning_rate"),
    ],
)
def test_bad_settings_are_refused(field: str, value: object, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        Recipe.named("cifar10_resnet20", **{field: value})


def test_unknown_recipe() -> None:
    with pytest.raises(InvalidInputError, match="recipe must be one of .*cifar10_resnet20.*, got 'cifar11'"):
        Recipe.named("cifar11")
