"""Recipe: every setting of a training run, with the paper's settings shipped as data in ``adadfq/recipes``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from importlib import resources
from typing import Any, get_type_hints

from adadfq import checks
from adadfq.errors import InvalidInputError

__all__ = ["Recipe"]

GENERATORS = ("label_embedding", "conditional_bn")
PRECISIONS = ("float32", "bfloat16")
RANGES = ("minmax", "mse")
SCHEDULES = ("step", "cosine")
OPTIMIZERS = ("sgd", "adam")


def _setting(default: Any, help: str, **metadata: Any) -> Any:
    return field(default=default, metadata={"help": help, **metadata})


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The settings of one training run; immutable, checked when made.

    The defaults are the paper's CIFAR-10 ResNet-20 settings. Symbols in brackets are those of the paper. A field's
    ``metadata["help"]`` is the help of the command-line option made from it.

    Raises:
        InvalidInputError: a value is out of range or of the wrong type.
    """

    name: str = _setting("custom", "name of the recipe")
    source: str = _setting("", "where the settings come from")

    num_classes: int = _setting(10, "classes of the teacher [K]")
    image_size: int = _setting(32, "height and width of the generated images in pixels, a multiple of 4")
    image_channels: int = _setting(3, "channels of the generated images")
    mean: tuple[float, ...] = _setting(
        (0.485, 0.456, 0.406), "per-channel mean the teacher's input is normalised by; for scoring and showing images"
    )
    std: tuple[float, ...] = _setting(
        (0.229, 0.224, 0.225), "per-channel deviation the teacher's input is normalised by"
    )

    epochs: int = _setting(400, "epochs to train")
    steps_per_epoch: int = _setting(200, "steps in an epoch")
    batch_size: int = _setting(16, "generated images in a step [B]")
    precision: str = _setting(
        "float32",
        "of the networks' arithmetic; bfloat16: autocast, with parameters, statistics, ranges and losses in float32",
        choices=PRECISIONS,
    )
    warmup_epochs: int = _setting(4, "epochs before the student starts to train; only the generator trains in them")
    calibration_epochs: int = _setting(4, "epochs in which activation ranges move; frozen after")

    generator: str = _setting("label_embedding", "architecture of the generator", choices=GENERATORS)
    latent_dim: int = _setting(100, "length of the noise vector")
    lr_generator: float = _setting(1e-3, "learning rate of the generator (Adam)")
    adam_betas: tuple[float, ...] = _setting((0.5, 0.999), "Adam's betas")

    lr_student: float = _setting(1e-4, "learning rate of the student")
    momentum: float = _setting(0.9, "momentum of the student's SGD")
    nesterov: bool = _setting(True, "Nesterov momentum")
    weight_decay: float = _setting(1e-4, "weight decay of the student")
    lr_milestones: tuple[int, ...] = _setting((100, 200, 300), "epochs at which both learning rates are multiplied")
    lr_decay: float = _setting(0.1, "factor of both learning rates at a milestone")

    alpha_ds: float = _setting(0.2, "weight of the disagreement cross-entropy")
    alpha_as: float = _setting(0.1, "weight of the agreement cross-entropy")
    beta: float = _setting(1.0, "weight of both cross-entropies in the generator's loss")
    gamma: float = _setting(1.0, "weight of the BatchNorm-statistics loss in the generator's loss")
    lambda_l: float = _setting(0.1, "lower bound of H'")
    lambda_u: float = _setting(0.8, "upper bound of H'")
    temperature: float = _setting(20.0, "temperature of the student's loss [T]")
    detach_min: bool = _setting(False, "treat the batch minimum of H in H' as a constant (the authors' code does not)")

    # What follows is not in the paper; every default leaves its method as it is.
    weight_range: str = _setting(
        "minmax",
        "range of each weight channel; minmax: its own at every step; mse: the one of least squared error, found when "
        "the student starts to train, and kept",
        choices=RANGES,
    )
    act_range: str = _setting(
        "minmax",
        "range of each activation; minmax: moving average of the batch's; mse: the one of least squared error, found "
        "on generated images when the student starts to train",
        choices=RANGES,
    )
    student_optimizer: str = _setting(
        "sgd",
        "of the student's weights; adam: betas 0.9 and 0.999, decoupled weight decay (AdamW), without momentum and "
        "nesterov",
        choices=OPTIMIZERS,
    )
    learn_steps: bool = _setting(
        False,
        "learn the quantisers' step sizes (LSQ) once ranges stand still and the student trains; weights then keep a "
        "range of their own instead of min/max, and no gradient, the generator's included, passes where values are "
        "clipped",
    )
    lr_steps: float = _setting(
        1e-3, "learning rate of the step sizes' logarithms (Adam): the share by which a step moves"
    )
    feature_weight: float = _setting(0.0, "weight of the block-output matching in the student's loss; 0: logits alone")
    low_pass: float = _setting(0.0, "deviation in pixels of a Gaussian low-pass on generated images; 0: none")
    crop: int = _setting(0, "generated images are padded by as many pixels and cropped at random; 0: not")
    flip: bool = _setting(False, "generated images are flipped left to right at random")
    mirror_teacher: bool = _setting(
        False,
        "the student's logits learn the mean of the teacher's on each image and on its mirror image, for classes that "
        "mirroring does not change (not digits or letters); costs one more forward of the teacher a step. The "
        "generator's losses and feature_weight keep the teacher as it is",
    )
    replays: int = _setting(0, "steps of the student alone after every step of both players; each counts as a step")
    bank_batches: int = _setting(
        64,
        "replays draw from as many generated batches, kept with the logits that the student learns and, for "
        "feature_weight, the teacher's block outputs (6 MB a batch of 16 for ResNet-20 at 32 pixels, some 350 MB for "
        "ResNet-50 at 224), also in checkpoints; 0: from new images",
    )
    generator_ema: float = _setting(
        0.0, "decay of an average of the generator's weights, from which replays without a bank draw; 0: no average"
    )
    spectral_norm: bool = _setting(False, "spectral normalisation of the generator's layers")
    lr_schedule: str = _setting(
        "step",
        "of all learning rates; step: lr_milestones and lr_decay; cosine: to 0 at the end, without them",
        choices=SCHEDULES,
    )
    lr_warmup_steps: int = _setting(0, "steps over which the student's learning rates rise when it starts")

    by_weight_bits: Mapping[int, Mapping[str, Any]] = field(
        default_factory=dict,
        metadata={"help": "settings that differ for a width of the weights: {bits: {field: value}}"},
    )

    def __post_init__(self) -> None:
        for name, type_ in get_type_hints(Recipe).items():
            if name != "by_weight_bits":
                object.__setattr__(self, name, _typed(name, type_, getattr(self, name)))
        try:
            widths = {int(k): dict(v) for k, v in self.by_weight_bits.items()}
        except (AttributeError, TypeError, ValueError):
            raise InvalidInputError(
                f"by_weight_bits must be {{bits: {{field: value}}}}, got {self.by_weight_bits!r}"
            ) from None
        for bits in widths:
            checks.check_bits("by_weight_bits", bits)
        object.__setattr__(self, "by_weight_bits", widths)
        self._check()
        for bits, changes in widths.items():
            if changes:
                _without_widths(self, changes, f"{self.name}, {bits} bits")

    def _check(self) -> None:
        for name in ("num_classes", "image_channels", "epochs", "steps_per_epoch", "batch_size", "latent_dim"):
            checks.check_number(name, getattr(self, name), 1)
        for name in ("warmup_epochs", "lr_generator", "lr_student", "weight_decay", "lr_decay", "gamma", "lr_steps"):
            checks.check_number(name, getattr(self, name), 0)
        for name in ("feature_weight", "low_pass", "crop", "replays", "bank_batches", "lr_warmup_steps"):
            checks.check_number(name, getattr(self, name), 0)
        for name in ("alpha_ds", "alpha_as", "beta"):
            checks.check_number(name, getattr(self, name))
        checks.check_number("calibration_epochs", self.calibration_epochs, 1)
        checks.check_number("lambda_u", self.lambda_u, 0, 1)
        checks.check_number("lambda_l", self.lambda_l, 0, self.lambda_u)
        if self.image_size < 4 or self.image_size % 4:
            raise InvalidInputError(f"image_size must be a positive multiple of 4, got {self.image_size}")
        for field_ in fields(self):
            choices, value = field_.metadata.get("choices"), getattr(self, field_.name)
            if choices and value not in choices:
                raise InvalidInputError(f"{field_.name} must be one of {', '.join(choices)}, got {value!r}")
        if not 0 <= self.generator_ema < 1:
            raise InvalidInputError(f"generator_ema must be at least 0 and below 1, got {self.generator_ema!r}")
        if self.generator_ema and (not self.replays or self.bank_batches):
            raise InvalidInputError(
                "generator_ema is for replays without a bank: set replays of at least 1 and bank_batches=0, or "
                "generator_ema=0"
            )
        if self.replays >= self.steps_per_epoch:
            raise InvalidInputError(
                f"replays must be below steps_per_epoch={self.steps_per_epoch}, got {self.replays}: every epoch has a "
                "step of both players"
            )
        if self.crop >= self.image_size:
            raise InvalidInputError(f"crop must be below image_size={self.image_size}, got {self.crop}")
        if self.temperature <= 0:
            raise InvalidInputError(f"temperature must be positive, got {self.temperature!r}")
        if not 0 <= self.momentum < 1 or (self.nesterov and self.momentum == 0):
            raise InvalidInputError(
                f"momentum must be at least 0 and below 1, and above 0 with nesterov, got {self.momentum!r}"
            )
        if len(self.adam_betas) != 2 or not all(0 <= beta < 1 for beta in self.adam_betas):
            raise InvalidInputError(f"adam_betas must be two numbers in [0, 1), got {self.adam_betas!r}")
        if list(self.lr_milestones) != sorted(set(self.lr_milestones)) or any(m < 1 for m in self.lr_milestones):
            raise InvalidInputError(
                f"lr_milestones must be increasing epochs of at least 1, got {self.lr_milestones!r}"
            )
        for name in ("mean", "std"):
            if len(getattr(self, name)) != self.image_channels:
                raise InvalidInputError(
                    f"{name} must have one number for each of the {self.image_channels} image channels, "
                    f"got {getattr(self, name)!r}"
                )
        if any(value <= 0 for value in self.std):
            raise InvalidInputError(f"std must be positive, got {self.std!r}")

    @staticmethod
    def names() -> list[str]:
        """Names of the shipped recipes."""
        files = resources.files("adadfq.recipes").iterdir()
        return sorted(file.name.removesuffix(".json") for file in files if file.name.endswith(".json"))

    @classmethod
    def named(cls, name: str, weight_bits: int | None = None, **overrides: Any) -> Recipe:
        """A shipped recipe, with fields replaced by `overrides`.

        Args:
            name: one of :meth:`names`.
            weight_bits: settle now what the recipe sets by width; without it the trainer does, from the student.
            overrides: field values; they win over anything the recipe sets, by width or not.

        Raises:
            InvalidInputError: no such recipe or field, or a bad value.
        """
        if name not in cls.names():
            raise InvalidInputError(f"recipe must be one of {', '.join(cls.names())}, got {name!r}")
        recipe = cls.from_dict({"name": name, **_shipped(name)}).replace(**overrides)
        return recipe if weight_bits is None else recipe.for_weight_bits(weight_bits)

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> Recipe:
        """The recipe that :meth:`to_dict` wrote (lists and string keys of JSON are converted).

        Raises:
            InvalidInputError: an unknown field or a bad value.
        """
        _check_fields(settings)
        return cls(**settings)

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON-able values."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    def replace(self, **overrides: Any) -> Recipe:
        """A copy with fields replaced; a replaced field no longer changes with the width.

        Raises:
            InvalidInputError: no such field, or a bad value.
        """
        _check_fields(overrides)
        if "by_weight_bits" not in overrides:
            overrides["by_weight_bits"] = {
                bits: {k: v for k, v in changes.items() if k not in overrides}
                for bits, changes in self.by_weight_bits.items()
            }
        return replace(self, **overrides)

    def for_weight_bits(self, weight_bits: int) -> Recipe:
        """The recipe settled for one width: `by_weight_bits` applied and emptied."""
        checks.check_bits("weight_bits", weight_bits)
        return _without_widths(self, self.by_weight_bits.get(weight_bits, {}), self.name)


def _shipped(name: str) -> dict[str, Any]:
    """Settings of a shipped recipe: those of the one it is based on, replaced by its own."""
    text = resources.files("adadfq.recipes").joinpath(f"{name}.json").read_text(encoding="utf-8")
    settings = json.loads(text)
    base = settings.pop("base", None)
    return settings if base is None else {**_shipped(base), **settings}


def _without_widths(recipe: Recipe, changes: Mapping[str, Any], where: str) -> Recipe:
    _check_fields(changes, f" (in recipe {where})")
    return replace(recipe, **changes, by_weight_bits={})


def _check_fields(settings: Mapping[str, Any], where: str = "") -> None:
    known = {f.name for f in fields(Recipe)}
    if unknown := sorted(set(settings) - known):
        raise InvalidInputError(
            f"unknown recipe field{'s' * (len(unknown) > 1)} {', '.join(unknown)}{where}; "
            f"the fields are {', '.join(sorted(known))}"
        )


def _typed(name: str, type_: Any, value: Any) -> Any:
    """`value` as the field's type; integers pass for floats and sequences for tuples."""
    element = {tuple[int, ...]: int, tuple[float, ...]: float}.get(type_)
    if element is not None:
        if not isinstance(value, (tuple, list)):
            raise InvalidInputError(f"{name} must be a sequence of {element.__name__}, got {value!r}")
        return tuple(_typed(name, element, v) for v in value)
    if type_ is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, type_) or (type_ is not bool and isinstance(value, bool)):
        raise InvalidInputError(f"{name} must be of type {type_.__name__}, got {value!r}")
    return checks.check_number(name, value) if type_ is float else value
