"""What the players of one training step share: where they begin, and what a checked step tells."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import adadfq
from adadfq.errors import InvalidInputError
from adadfq.generator import build_generator
from adadfq.models.build import BUILTINS
from adadfq.nn import QuantAct, QuantConv2d, QuantLinear, set_calibrating

#: Networks that go by a name of their own here.
MODELS = {"resnet18": "benchmarks.classifiers:resnet18", "mobilenet_v2": "benchmarks.classifiers:mobilenet_v2"}
#: Model -> the recipe it is trained with, where none is named.
RECIPES = {"resnet18": "imagenet_resnet18", "mobilenet_v2": "imagenet_mobilenetv2"}
DEFAULT_RECIPE = "cifar10_resnet20"
#: Images that the activation ranges and the teacher's statistics come from.
_CALIBRATION = 8


@dataclass(frozen=True)
class Setting:
    """What is trained."""

    model: str = "resnet20"
    recipe: str | None = None
    """By default the one in :data:`RECIPES`."""
    image_size: int | None = None
    batch_size: int = 16
    weight_bits: int = 4
    act_bits: int = 4
    seed: int = 1

    def resolved(self) -> adadfq.Recipe:
        """The recipe with what this setting overrides.

        Raises:
            InvalidInputError: there is no such recipe, or a value does not fit.
        """
        overrides: dict[str, Any] = {"batch_size": self.batch_size}
        if self.image_size is not None:
            overrides["image_size"] = self.image_size
        name = self.recipe or RECIPES.get(self.model, DEFAULT_RECIPE)
        return adadfq.Recipe.named(name, weight_bits=self.weight_bits, **overrides)

    def case(self) -> str:
        """The name of the case, such as "step/resnet20@32/b16/w4a4"."""
        size = self.resolved().image_size
        return f"step/{self.model}@{size}/b{self.batch_size}/w{self.weight_bits}a{self.act_bits}"

    def build(self) -> nn.Module:
        """The float network with random weights.

        Raises:
            InvalidInputError: there is no such model.
        """
        spec = self.model if self.model in BUILTINS else MODELS.get(self.model, self.model)
        return adadfq.build_model(spec, num_classes=self.resolved().num_classes)


#: Name -> (model, batch size) of its cases.
SUITES: dict[str, tuple[tuple[str, int], ...]] = {
    "quick": (("resnet20", 16),),
    "judged": (("resnet20", 16), ("resnet18", 16)),
    "full": tuple((model, batch) for model in ("resnet20", *MODELS) for batch in (16, 128)),
    "gpu": tuple((model, batch) for model in ("resnet20", *MODELS) for batch in (16, 64, 256)),
}


def settings(suite: str, models: Sequence[str], batch_sizes: Sequence[int], **others: Any) -> list[Setting]:
    """The cases of a suite; `models` and `batch_sizes`, where given, take the place of the suite's.

    Raises:
        InvalidInputError: there is no such suite.
    """
    if suite not in SUITES:
        raise InvalidInputError(f"suite must be one of {', '.join(SUITES)}, got {suite!r}")
    found = SUITES[suite]
    chosen_models = models or tuple(dict.fromkeys(model for model, _ in found))
    chosen_batches = batch_sizes or tuple(dict.fromkeys(batch for _, batch in found))
    return [Setting(model=m, batch_size=b, **others) for m in chosen_models for b in chosen_batches]


@contextmanager
def exact_float32() -> Iterator[None]:
    """Float32 in products and convolutions, and the same algorithms each time; afterwards as before.

    For what is compared, not for what is timed: TF32, which cuDNN takes by default, makes of the last bit of an input
    another code of 4 bits.
    """
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32, cudnn.deterministic
    cudnn.allow_tf32, matmul.allow_tf32, cudnn.deterministic = False, False, True
    try:
        yield
    finally:
        cudnn.allow_tf32, matmul.allow_tf32, cudnn.deterministic = before


@dataclass
class Step:
    """What is compared of one step."""

    loss_generator: float
    loss_student: float
    generator: dict[str, Tensor | None]
    """Gradients by the names of :func:`adadfq.generator.build_generator`'s parameters."""
    student: dict[str, Tensor | None]
    """Gradients by the names of the float network's parameters."""


class Start:
    """Where every player begins: equal weights, and frozen ranges.

    Teacher and student have random weights, each its own: were they alike, the student's gradient would be made of
    little but rounding, and compare with nothing. Their BatchNorm statistics are those of random images, so that
    activations keep their size through the layers as they do in trained networks.

    Raises:
        InvalidInputError: the model, the recipe or the sizes do not fit together.
    """

    def __init__(self, setting: Setting, device: torch.device) -> None:
        self.setting, self.recipe, self.device = setting, setting.resolved(), device
        recipe = self.recipe
        with torch.random.fork_rng(devices=[]), torch.no_grad(), adadfq.use_backend("reference"):
            torch.default_generator.manual_seed(setting.seed)
            shape = (_CALIBRATION, recipe.image_channels, recipe.image_size, recipe.image_size)
            images = torch.randn(shape).to(device)
            self._teacher, other = (_with_statistics(setting.build().to(device), images) for _ in range(2))
            self._generator = build_generator(recipe).to(device).train()
            self._student = adadfq.quantize(other, setting.weight_bits, setting.act_bits)
            self._student(images)
            set_calibrating(self._student, False)
        self._random = torch.Generator(device).manual_seed(setting.seed)

    def move(self, device: torch.device) -> None:
        """Go on from `device`: the same weights there; what is drawn begins anew."""
        self.device = device
        for network in (self._teacher, self._generator, self._student):
            network.to(device)
        self._random = torch.Generator(device).manual_seed(self.setting.seed)

    def teacher(self) -> nn.Module:
        """A copy, in eval mode; its parameters require no gradients."""
        return copy.deepcopy(self._teacher).requires_grad_(False)

    def student(self) -> nn.Module:
        """A copy made by :func:`adadfq.quantize`, in eval mode, its ranges frozen."""
        return copy.deepcopy(self._student)

    def generator(self) -> nn.Module:
        """A copy, in train mode."""
        return copy.deepcopy(self._generator)

    def draw(self) -> tuple[Tensor, Tensor]:
        """Noise [B, latent_dim] and labels int64 [B]."""
        recipe = self.recipe
        noise = torch.randn(recipe.batch_size, recipe.latent_dim, generator=self._random, device=self.device)
        labels = torch.randint(recipe.num_classes, (recipe.batch_size,), generator=self._random, device=self.device)
        return noise, labels


def _with_both_signs(weight: Tensor) -> Tensor:
    """`weight` with the sign of the first element turned in output channels whose weights have one sign.

    A range that holds 0 anyway is the same to every player: the authors' is not widened to hold it.
    """
    flat = weight.flatten(1).clone()
    one_sign = (flat.amin(1) > 0) | (flat.amax(1) < 0)
    flat[one_sign, 0] *= -1
    return flat.view_as(weight)


def _with_statistics(network: nn.Module, images: Tensor) -> nn.Module:
    """`network` in eval mode, with the statistics of `images` in its BatchNorm layers."""
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = None  # the plain average
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.copy_(_with_both_signs(module.weight))
    network.train()(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return network.eval()


def swap_quantizers(
    student: nn.Module,
    conv: Callable[[QuantConv2d], nn.Module],
    linear: Callable[[QuantLinear], nn.Module],
    activation: Callable[[QuantAct], nn.Module],
) -> nn.Module:
    """`student` with its quantising modules replaced by what the functions make of them, names unchanged."""
    for name, module in list(student.named_modules()):
        for kind, make in ((QuantConv2d, conv), (QuantLinear, linear), (QuantAct, activation)):
            if isinstance(module, kind):
                parent, _, child = name.rpartition(".")
                setattr(student.get_submodule(parent), child, make(module))
    return student
