"""Training step by step in float64 and plain PyTorch, written from the paper's formulas, importing no package code.

:class:`OracleTraining` plays both players' steps: the generator, the two networks, every loss, the gradients (by
autograd), the optimizers and the schedule. Networks are functions of a player and the images, in terms of the player's
layers.
Parameters are named as the package names them in a state_dict, which is what both sides start from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import oracle
import torch
from torch import Tensor
from torch.nn import functional as torch_F

#: The paper's CIFAR-10 settings, and every setting that this file computes.
PAPER: dict[str, Any] = {
    "num_classes": 10,
    "image_size": 32,
    "image_channels": 3,
    "epochs": 400,
    "steps_per_epoch": 200,
    "batch_size": 16,
    "warmup_epochs": 4,
    "calibration_epochs": 4,
    "generator": "label_embedding",
    "latent_dim": 100,
    "lr_generator": 1e-3,
    "adam_betas": [0.5, 0.999],
    "lr_student": 1e-4,
    "momentum": 0.9,
    "nesterov": True,
    "weight_decay": 1e-4,
    "lr_milestones": [100, 200, 300],
    "lr_decay": 0.1,
    "alpha_ds": 0.2,
    "alpha_as": 0.1,
    "beta": 1.0,
    "gamma": 1.0,
    "lambda_l": 0.1,
    "lambda_u": 0.8,
    "temperature": 20.0,
    "detach_min": False,
    # What is not in the paper.
    "weight_range": "minmax",
    "act_range": "minmax",
    "student_optimizer": "sgd",
    "learn_steps": False,
    "lr_steps": 1e-3,
    "feature_weight": 0.0,
    "crop": 0,
    "flip": False,
    "mirror_teacher": False,
    "low_pass": 0.0,
    "soft_labels": 0.0,
    "replays": 0,
    "bank_batches": 64,
    "generator_ema": 0.0,
    "spectral_norm": False,
    "lr_schedule": "step",
    "lr_warmup_steps": 0,
}
#: Values by name that this file computes.
CHOICES = {
    "generator": ("label_embedding", "conditional_bn"),
    "weight_range": ("minmax", "mse"),
    "act_range": ("minmax", "mse"),
    "student_optimizer": ("sgd", "adam"),
    "lr_schedule": ("step", "cosine"),
}
#: Fields of a recipe without a part in a step's mathematics: here all of it is in float64.
NO_PART = {"name", "source", "mean", "std", "precision", "by_weight_bits"}

RANGE_MOMENTUM = 0.9
BATCH_NORM_MOMENTUM = 0.1
BATCH_NORM_EPS = 1e-5
ADAM_EPS = 1e-8
STUDENT_BETAS = 0.9, 0.999
#: Of a range: those of which the one of least squared error is taken.
SHARES = [k / 50 for k in range(50, 9, -1)]
#: Generated batches on which an activation's is found.
RANGE_BATCHES = 8


class Unknown(Exception):
    """A recipe asks for something that this file does not compute."""


def settled(recipe: Mapping[str, Any], weight_bits: int) -> dict[str, Any]:
    """The paper's settings, changed by those a recipe's file sets and by those it sets for one width.

    Raises:
        Unknown: one of them has no oracle.
    """
    by_width = recipe.get("by_weight_bits", {}).get(str(weight_bits), {})
    changes = {**recipe, **by_width}
    if unknown := sorted(set(changes) - set(PAPER) - NO_PART):
        raise Unknown(
            f"the recipe sets {', '.join(unknown)}, which tests/oracle_step.py does not compute: write the oracle of "
            "each there, from its formula, and add it to PAPER with the value that leaves it out"
        )
    settings = {**PAPER, **{name: value for name, value in changes.items() if name in PAPER}}
    for name, known in CHOICES.items():
        if settings[name] not in known:
            raise Unknown(f"the recipe's {name} {settings[name]!r} is not written in tests/oracle_step.py")
    return settings


class Batch(NamedTuple):
    """What is drawn for a generated batch of B images."""

    noise: Tensor
    labels: Tensor
    #: (top, left) of each image's crop in the padded image; of an image that is not cropped (0, 0).
    places: list[tuple[int, int]]
    #: Of each image.
    flipped: list[bool]


class Phase(NamedTuple):
    """What a step does."""

    trains_student: bool
    moves_ranges: bool
    lr_generator: float
    lr_student: float
    lr_steps: float


def phase(settings: Mapping[str, Any], step: int) -> Phase:
    epoch, start = step // settings["steps_per_epoch"], settings["warmup_epochs"] * settings["steps_per_epoch"]
    decay = 1.0
    if settings["lr_schedule"] == "step":
        for milestone in settings["lr_milestones"]:
            if epoch >= milestone:
                decay *= settings["lr_decay"]
    elif step >= start:
        end = settings["epochs"] * settings["steps_per_epoch"]
        decay = math.cos(math.pi / 2 * (step - start) / (end - start)) ** 2
    rise = 1.0
    if start <= step < start + settings["lr_warmup_steps"]:
        rise = (step - start + 1) / (settings["lr_warmup_steps"] + 1)
    return Phase(
        epoch >= settings["warmup_epochs"],
        epoch < settings["calibration_epochs"],
        settings["lr_generator"] * decay,
        settings["lr_student"] * decay * rise,
        settings["lr_steps"] * decay * rise,
    )


class Edges:
    """How near a step came to where a function jumps or bends.

    Two right computations, an ulp apart, may fall on different sides there.
    """

    def __init__(self) -> None:
        self.nearest, self.where = math.inf, "nowhere"

    def add(self, where: str, distances: Tensor) -> None:
        distance = distances.detach().abs().min().item()
        if not distance >= self.nearest:  # NaN is nearest
            self.nearest, self.where = distance, where


def float32_quantizer(lo: Tensor, hi: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """scale and zero point over float32 ends, rounded to float32 after every operation; in float64."""
    lo, hi = lo.clamp(max=0), hi.clamp(min=0)
    scale = (hi - lo) / (2**bits - 1)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return scale.double(), torch.round(-lo / scale).double()


class Range:
    """An activation's range: an average of batches' ends, in which every batch weighs 0.9 of the next one.

    The package documents that it keeps ranges and step sizes in float32 whatever the network is in; so does this one.
    """

    def __init__(self, bits: int) -> None:
        self.bits, self.batches = bits, 0
        self.lo = self.hi = torch.zeros(())
        self.scale, self.zero_point = float32_quantizer(self.lo, self.hi, bits)
        #: Of the range shrunk to each of SHARES, while that is asked.
        self.errors: Tensor | None = None

    def move(self, x: Tensor) -> None:
        self.batches += 1
        rate = oracle.moving_average_rate(self.batches, RANGE_MOMENTUM)
        ends = x.detach().min(), x.detach().max()
        self.lo, self.hi = (
            (past.double() * (1 - rate) + end * rate).float()
            for past, end in zip((self.lo, self.hi), ends, strict=True)
        )
        self.scale, self.zero_point = float32_quantizer(self.lo, self.hi, self.bits)

    def add_errors(self, x: Tensor) -> None:
        quantizers = [float32_quantizer(self.lo * share, self.hi * share, self.bits) for share in SHARES]
        found = [(oracle.quantize(x, *quantizer, self.bits) - x).square().sum() for quantizer in quantizers]
        self.errors = torch.stack(found) + (0 if self.errors is None else self.errors)

    def shrink(self, edges: Edges) -> None:
        """To the share of least error over what :meth:`add_errors` saw."""
        assert self.errors is not None
        share = SHARES[int(least(self.errors[:, None], edges))]
        self.lo, self.hi, self.errors = self.lo * share, self.hi * share, None
        self.scale, self.zero_point = float32_quantizer(self.lo, self.hi, self.bits)


def least(errors: Tensor, edges: Edges) -> Tensor:
    """Position along dimension 0 of the least of each column, which the package looks for in float32."""
    first, second = errors.sort(0).values[:2]
    # Sums of squares in float32 are good for 1e-6, which is to count for as little as 1e-10 does elsewhere.
    edges.add("share of least error", (second - first) / second * 1e-4)
    return errors.argmin(0)


def weight_quantizer(weight: Tensor, bits: int, method: str, edges: Edges) -> tuple[Tensor, Tensor]:
    """scale and zero point of each channel, in float32: over min/max, or over the share of it of least error."""
    rows = weight.detach().flatten(1)
    if method == "minmax":
        scale, zero_point = oracle.quantizer_range(rows.min(1).values, rows.max(1).values, bits)
        return scale.float().double(), zero_point
    rows = rows.float()
    lo, hi = rows.min(1).values, rows.max(1).values
    tried = [float32_quantizer(lo * share, hi * share, bits) for share in SHARES]
    errors = [
        (oracle.quantize(rows, scale[:, None], zero_point[:, None], bits) - rows).square().sum(1)
        for scale, zero_point in tried
    ]
    best, channels = least(torch.stack(errors), edges), torch.arange(len(rows))
    return torch.stack([t[0] for t in tried])[best, channels], torch.stack([t[1] for t in tried])[best, channels]


def learned(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """LSQ (Esser et al., ICLR 2020): round's derivative is taken for 1, clamp's is its own; so is the scale's."""
    steps = x / scale
    whole = steps + (torch.round(steps) - steps).detach()
    lower, upper = -zero_point, 2**bits - 1 - zero_point
    whole = torch.where(torch.round(steps) < lower, lower, torch.where(torch.round(steps) > upper, upper, whole))
    return whole * scale


class Teacher:
    """Layers by name over float parameters, collecting the statistics loss of every BatchNorm it passes."""

    def __init__(self, state: Mapping[str, Tensor], edges: Edges) -> None:
        self.state, self.edges = state, edges
        self.statistics_losses: list[Tensor] = []
        self.features: list[Tensor] = []

    def block_end(self, x: Tensor) -> Tensor:
        self.features.append(x)
        return x

    def weight(self, name: str) -> Tensor:
        return self.state[f"{name}.weight"]

    def conv(self, x: Tensor, name: str, stride: int = 1, groups: int = 1) -> Tensor:
        """Square kernels, padded to keep the size at stride 1."""
        weight = self.weight(name)
        return torch_F.conv2d(x, weight, self.state.get(f"{name}.bias"), stride, weight.shape[2] // 2, groups=groups)

    def linear(self, x: Tensor, name: str) -> Tensor:
        return torch_F.linear(x, self.weight(name), self.state.get(f"{name}.bias"))

    def batch_norm(self, x: Tensor, name: str) -> Tensor:
        mean, var, weight, bias = (
            self.state[f"{name}.{key}"] for key in ("running_mean", "running_var", "weight", "bias")
        )
        self.normalised(x, mean, var)
        return oracle.batch_norm(x, mean, var, weight, bias, BATCH_NORM_EPS)

    def normalised(self, x: Tensor, mean: Tensor, var: Tensor) -> None:
        self.statistics_losses.append(oracle.batch_norm_statistics_loss(x, mean, var))

    def act(self, x: Tensor, kind: str) -> Tensor:
        self.edges.add(f"{type(self).__name__.lower()}'s {kind} at 0", x)
        if kind == "relu6":
            self.edges.add(f"{type(self).__name__.lower()}'s relu6 at 6", x - 6)
        return oracle.activation(x, kind)


class Student(Teacher):
    """The same layers with rounded weights, and with activations rounded over ranges that move or stand still.

    In `state`, a layer's weight may have a scale and a zero point of its own, and a range ("range 0", "range 1", ...) a
    scale; where those require a gradient, they are learned.
    """

    def __init__(self, state: Mapping[str, Tensor], edges: Edges, bits: int, ranges: list[Range], moving: bool) -> None:
        super().__init__(state, edges)
        self.bits, self.ranges, self.moving = bits, iter(enumerate(ranges)), moving

    def weight(self, name: str) -> Tensor:
        weight, scale = self.state[f"{name}.weight"], self.state.get(f"{name}.weight_scale")
        if scale is not None:
            zero_point = self.state[f"{name}.weight_zero_point"]
        else:
            rows = weight.detach().flatten(1)
            lo, hi = rows.min(1).values, rows.max(1).values
            scale, zero_point = oracle.quantizer_range(lo, hi, self.bits)
            self.edges.add(f"zero point of {name}.weight", oracle.tie_distance(lo.clamp(max=0), scale))
        each = (-1,) + (1,) * (weight.dim() - 1)
        return self.round(f"{name}.weight", weight, scale.reshape(each), zero_point.reshape(each), self.bits)

    def round(self, what: str, x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
        self.edges.add(f"rounding of {what}", oracle.tie_distance(x.detach(), scale.detach()))
        return (learned if scale.requires_grad else oracle.straight_through)(x, scale, zero_point, bits)

    def normalised(self, x: Tensor, mean: Tensor, var: Tensor) -> None:
        pass  # only the teacher's statistics are matched

    def act(self, x: Tensor, kind: str) -> Tensor:
        x = super().act(x, kind)
        i, range_ = next(self.ranges)
        if self.moving:
            range_.move(x)
        if range_.errors is not None:
            range_.add_errors(x)
        scale = self.state.get(f"range {i}.scale", range_.scale)
        return self.round(f"range {i}", x, scale, range_.zero_point, range_.bits)


#: logits = network(player, images)
Network = Callable[[Teacher, Tensor], Tensor]


def residual_net(net: Teacher, x: Tensor) -> Tensor:
    """A basic block between two convolutions, the last with a bias and stride 2."""
    x = net.act(net.batch_norm(net.conv(x, "conv1"), "bn1"), "relu")
    y = net.act(net.batch_norm(net.conv(x, "conv2"), "bn2"), "relu")
    x = net.block_end(net.act(net.batch_norm(net.conv(y, "conv3"), "bn3") + x, "relu"))
    x = net.act(net.batch_norm(net.conv(x, "conv4", stride=2), "bn4"), "relu")
    return net.linear(x.flatten(1), "linear")


def bottleneck_net(net: Teacher, x: Tensor) -> Tensor:
    """MobileNetV2's block: ReLU6, a depthwise convolution, and a sum without an activation."""
    x = net.act(net.batch_norm(net.conv(x, "stem", stride=2), "bn1"), "relu6")
    y = net.act(net.batch_norm(net.conv(x, "expand"), "bn2"), "relu6")
    y = net.act(net.batch_norm(net.conv(y, "depthwise", groups=y.shape[1]), "bn3"), "relu6")
    x = net.block_end(x + net.batch_norm(net.conv(y, "project"), "bn4"))
    x = net.act(net.batch_norm(net.conv(x, "head"), "bn5"), "relu6")
    return net.linear(x.flatten(1), "linear")


def resnet20(net: Teacher, x: Tensor) -> Tensor:
    """He et al. 2015, section 4.2, with shortcuts that take every second pixel and pad channels with zeros."""
    x = net.act(net.batch_norm(net.conv(x, "conv1"), "bn1"), "relu")
    for layer in (1, 2, 3):
        for i in range(3):
            name, stride = f"layer{layer}.{i}", 2 if layer > 1 and i == 0 else 1
            y = net.act(net.batch_norm(net.conv(x, f"{name}.conv1", stride=stride), f"{name}.bn1"), "relu")
            y = net.batch_norm(net.conv(y, f"{name}.conv2"), f"{name}.bn2")
            if stride == 2:
                small = x[:, :, ::2, ::2]
                zeros = torch.zeros_like(small[:, : small.shape[1] // 2])
                x = torch.cat([zeros, small, zeros], 1)
            x = net.block_end(net.act(y + x, "relu"))
    return net.linear(x.mean((2, 3)), "linear")


def _plain_affine(state: Mapping[str, Tensor], norm: str, labels: Tensor) -> tuple[Tensor, Tensor, str]:
    return state[f"{norm}.weight"], state[f"{norm}.bias"], norm


def _class_affine(state: Mapping[str, Tensor], norm: str, labels: Tensor) -> tuple[Tensor, Tensor, str]:
    return state[f"{norm}.weight.weight"][labels], state[f"{norm}.bias.weight"][labels], f"{norm}.norm"


#: Scale and shift of an inner norm, and where its statistics are.
GENERATOR_NORMS = {"label_embedding": _plain_affine, "conditional_bn": _class_affine}


def generate(
    kind: str, state: Mapping[str, Tensor], noise: Tensor, labels: Tensor, edges: Edges
) -> tuple[Tensor, dict[str, Tensor]]:
    """(images, running statistics afterwards) of a generator in train mode."""
    state, statistics = divided_by_largest_singular_value(state)

    def norm(x: Tensor, name: str, eps: float, slope: float) -> Tensor:
        weight = bias = None
        where = name
        if name != "image_norm":
            weight, bias, where = GENERATOR_NORMS[kind](state, name, labels)
        y, mean, var = oracle.batch_norm_act(x, weight, bias, eps, slope)
        if slope != 1:
            edges.add("generator's LeakyReLU at 0", y)
        count = x.numel() // x.shape[1]
        moved = {"running_mean": mean, "running_var": var * count / (count - 1)}
        for key, value in moved.items():
            past = state[f"{where}.{key}"]
            statistics[f"{where}.{key}"] = (past + BATCH_NORM_MOMENTUM * (value - past)).detach()
        tracked = f"{where}.num_batches_tracked"
        statistics[tracked] = state[tracked] + 1
        return y

    def conv(x: Tensor, name: str) -> Tensor:
        return torch_F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], padding=1)

    def double(x: Tensor) -> Tensor:
        return x.repeat_interleave(2, 2).repeat_interleave(2, 3)

    x = noise if kind == "conditional_bn" else noise * state["label_embedding.weight"][labels]
    x = torch_F.linear(x, state["project.weight"], state["project.bias"])
    size = math.isqrt(x.shape[1] // 128)
    x = norm(x.reshape(-1, 128, size, size), "norm1", BATCH_NORM_EPS, 1.0)
    # The authors' code passes 0.8 where BatchNorm takes its eps.
    x = norm(conv(double(x), "conv2"), "norm2", 0.8, 0.2)
    x = norm(conv(double(x), "conv3"), "norm3", 0.8, 0.2)
    x = norm(torch.tanh(conv(x, "to_image")), "image_norm", BATCH_NORM_EPS, 1.0)
    return x, statistics


def divided_by_largest_singular_value(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(weights to generate with, vectors afterwards) of a generator's layers under spectral normalisation.

    Miyato et al. 2018, algorithm 1: a step of the power iteration before the layer is used, through which no gradient
    passes; sigma = u W v does have one.
    """
    used, vectors = dict(state), {}
    for key in [key for key in state if key.endswith(".original")]:
        at = key.removesuffix(".original")
        matrix = state[key].flatten(1)
        with torch.no_grad():
            u = matrix @ state[f"{at}.0._v"]
            u = u / u.norm()
            v = matrix.T @ u
            v = v / v.norm()
        vectors.update({f"{at}.0._u": u, f"{at}.0._v": v})
        used[at.replace(".parametrizations", "")] = state[key] / (u @ matrix @ v)
    return used, vectors


def low_passed(images: Tensor, deviation: float, dim: int) -> Tensor:
    """A Gaussian of that deviation in pixels along `dim`, cut off beyond three of them, the last pixels repeated."""
    radius, size = math.ceil(3 * deviation), images.shape[dim]
    weights = [math.exp(-0.5 * (offset / deviation) ** 2) for offset in range(-radius, radius + 1)]
    sums = []
    for place in range(size):
        pixels = [images.select(dim, min(max(place + k - radius, 0), size - 1)) for k in range(len(weights))]
        sums.append(sum(weight * pixel for weight, pixel in zip(weights, pixels, strict=True)) / sum(weights))
    return torch.stack(sums, dim)


def _zeros(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.zeros_like(value) for name, value in parameters.items()}


class Adam:
    """Kingma and Ba 2015, algorithm 1; weights decay beside it (Loshchilov and Hutter 2019, algorithm 2)."""

    def __init__(self, parameters: Mapping[str, Tensor], betas: tuple[float, float], weight_decay: float = 0.0) -> None:
        self.betas, self.weight_decay, self.steps = betas, weight_decay, 0
        self.first, self.second = _zeros(parameters), _zeros(parameters)

    def step(self, parameters: dict[str, Tensor], gradients: Mapping[str, Tensor], lr: float) -> None:
        self.steps += 1
        b1, b2 = self.betas
        for name, g in gradients.items():
            self.first[name] = b1 * self.first[name] + (1 - b1) * g
            self.second[name] = b2 * self.second[name] + (1 - b2) * g * g
            m = self.first[name] / (1 - b1**self.steps)
            v = self.second[name] / (1 - b2**self.steps)
            decayed = parameters[name] * (1 - lr * self.weight_decay)
            parameters[name] = decayed - lr * m / (torch.sqrt(v) + ADAM_EPS)


class SGD:
    """v <- momentum v + g; the weight moves against v, or with Nesterov's look ahead against g + momentum v."""

    def __init__(self, parameters: Mapping[str, Tensor], momentum: float, nesterov: bool, weight_decay: float) -> None:
        self.momentum, self.nesterov, self.weight_decay = momentum, nesterov, weight_decay
        self.velocity = _zeros(parameters)

    def step(self, parameters: dict[str, Tensor], gradients: Mapping[str, Tensor], lr: float) -> None:
        for name, g in gradients.items():
            g = g + self.weight_decay * parameters[name]
            self.velocity[name] = self.momentum * self.velocity[name] + g
            direction = g + self.momentum * self.velocity[name] if self.nesterov else self.velocity[name]
            parameters[name] = parameters[name] - lr * direction


class Kept(NamedTuple):
    """A batch as the student learns it."""

    shown: Tensor
    target: Tensor
    features: list[Tensor]


class Step(NamedTuple):
    """All that one step computed. Dictionaries are by parameter or statistic; those of the end are after the update."""

    phase: Phase
    values: dict[str, Tensor]
    """images, both logits, those that the student learns, h_prime [B], the losses, and whose labels are soft [B].

    Of a replay only what is the student's.
    """
    gradients: dict[str, Tensor]
    """At the images, and at the logits for either loss."""
    generator_gradients: dict[str, Tensor]
    student_gradients: dict[str, Tensor]
    """Empty while only the generator trains."""
    generator: dict[str, Tensor]
    """Parameters and running statistics."""
    student: dict[str, Tensor]
    """Parameters, running statistics and weights' own steps; a learned scale of a range is "range 0.scale" etc."""
    ranges: list[tuple[Tensor, Tensor, int, Tensor, Tensor]]
    """Of every activation in the order of the forward: (lo, hi, batches seen, scale, zero point)."""
    edges: Edges


class OracleTraining:
    """Both players from the state_dicts they start with.

    Args:
        settings: of :func:`settled`.
        network: one of the networks above.
        activations: how many activations it has.
        teacher, student, generator: their parameters and running statistics.
        weight_bits, act_bits: widths.
    """

    def __init__(
        self,
        settings: Mapping[str, Any],
        network: Network,
        activations: int,
        teacher: Mapping[str, Tensor],
        student: Mapping[str, Tensor],
        generator: Mapping[str, Tensor],
        weight_bits: int,
        act_bits: int,
    ) -> None:
        self.settings, self.network, self.bits = settings, network, weight_bits
        self.teacher, self.student, self.generator = (
            {key: value.double() if value.is_floating_point() else value.clone() for key, value in state.items()}
            for state in (teacher, student, generator)
        )
        self.ranges = [Range(act_bits) for _ in range(activations)]
        betas = settings["adam_betas"]
        self.adam = Adam(_parameters(self.generator), (betas[0], betas[1]))
        trained, decay = _parameters(self.student), settings["weight_decay"]
        self.optimizer: Adam | SGD
        if settings["student_optimizer"] == "adam":
            self.optimizer = Adam(trained, STUDENT_BETAS, decay)
        else:
            self.optimizer = SGD(trained, settings["momentum"], settings["nesterov"], decay)
        #: Of the learned step sizes, from when there are any.
        self.adam_steps: Adam | None = None
        #: Average of the generator's weights from when the student's training starts; its own running statistics.
        self.averaged: dict[str, Tensor] | None = None
        #: By place; the batches stored so far take the places in turn.
        self.bank: dict[int, Kept] = {}
        self.stored = self.steps = 0

    def looks(self) -> int:
        """How many generated batches the next step is preceded by, to be looked at alone."""
        settings = self.settings
        epoch = max(settings["warmup_epochs"], settings["calibration_epochs"])
        if self.steps != epoch * settings["steps_per_epoch"]:
            return 0
        fixed = settings["learn_steps"] or settings["weight_range"] != "minmax"
        return RANGE_BATCHES * (settings["act_range"] != "minmax") + fixed

    def shown(self, images: Tensor, batch: Batch) -> Tensor:
        """Low-passed, padded by zeros, cropped back, and flipped left to right: what the networks see of images."""
        margin, size = self.settings["crop"], images.shape[2]
        if self.settings["low_pass"]:
            images = low_passed(low_passed(images, self.settings["low_pass"], 2), self.settings["low_pass"], 3)
        seen = []
        for image, (top, left), flipped in zip(images, batch.places, batch.flipped, strict=True):
            padded = image.new_zeros(len(image), size + 2 * margin, size + 2 * margin)
            padded[:, margin : margin + size, margin : margin + size] = image
            cropped = padded[:, top : top + size, left : left + size]
            seen.append(torch.stack(cropped.unbind(2)[::-1], 2) if flipped else cropped)
        return torch.stack(seen)

    def begin_student(self, batches: list[Batch], edges: Edges) -> None:
        """The student's training starts and its ranges stand still: set what keeps a step of its own."""
        settings, images = self.settings, []
        with torch.no_grad():
            for batch in batches:
                made, statistics = generate(
                    settings["generator"], self.generator, batch.noise.double(), batch.labels, edges
                )
                self.generator.update(statistics)
                images.append(self.shown(made, batch))
            if settings["act_range"] == "mse":
                for range_ in self.ranges:
                    range_.errors = torch.zeros(len(SHARES), dtype=torch.float64)
                for shown in images[:RANGE_BATCHES]:
                    self.network(Student(self.student, edges, self.bits, self.ranges, False), shown)
                for range_ in self.ranges:
                    range_.shrink(edges)
        if settings["learn_steps"] or settings["weight_range"] == "mse":
            for key, value in list(self.student.items()):
                if key.endswith(".weight") and value.dim() > 1:
                    scale, zero_point = weight_quantizer(value, self.bits, settings["weight_range"], edges)
                    self.student.update({f"{key}_scale": scale, f"{key}_zero_point": zero_point})
        if settings["learn_steps"]:
            self.student.update({f"range {i}.scale": range_.scale for i, range_ in enumerate(self.ranges)})
            self.adam_steps = Adam(_step_sizes(self.student), STUDENT_BETAS)

    def step(self, batch: Batch, looked_at: list[Batch]) -> Step:
        """One step on this batch; `looked_at` are those of :meth:`looks` before it."""
        settings, (now, edges) = self.settings, self._begin(looked_at)
        generator = {k: v.requires_grad_() for k, v in _parameters(self.generator).items()}
        student = self._learned_by_student()

        images, statistics = generate(
            settings["generator"], {**self.generator, **generator}, batch.noise.double(), batch.labels, edges
        )
        shown = self.shown(images, batch)
        watching = Teacher(self.teacher, edges)
        t = self.network(watching, shown)
        quantised = Student({**self.student, **student}, edges, self.bits, self.ranges, now.moves_ranges)
        q = self.network(quantised, shown)

        total, margin, disagreement, agreement, h_prime = oracle.margin_loss(
            t,
            q,
            batch.labels,
            settings["lambda_l"],
            settings["lambda_u"],
            settings["alpha_ds"],
            settings["alpha_as"],
            settings["beta"],
            settings["detach_min"],
        )
        soft = torch.zeros(len(t), dtype=torch.bool)
        if settings["soft_labels"]:
            p = t.detach().softmax(1)
            of_label = p[torch.arange(len(p)), batch.labels]
            edges.add("p(label) at soft_labels", of_label - settings["soft_labels"])
            hard = torch.eye(p.shape[1], dtype=p.dtype)[batch.labels]
            soft = of_label < settings["soft_labels"]
            targets = torch.where(soft[:, None], p, hard)
            disagreement, agreement = (-(targets * x.log_softmax(1)).sum(1).mean() for x in (t - q, t + q))
            cross_entropies = settings["alpha_ds"] * disagreement + settings["alpha_as"] * agreement
            total = margin + settings["beta"] * cross_entropies
        for name in ("lambda_l", "lambda_u"):
            edges.add(f"H' at {name}", h_prime - settings[name])
        statistics_loss = sum(watching.statistics_losses) / len(watching.statistics_losses)
        loss_generator = total + settings["gamma"] * statistics_loss
        target = self._target(t, shown, edges) if now.trains_student else t.detach()
        loss_logits, loss_features = self._student_losses(target, watching.features, q, quantised.features)
        loss_student = loss_logits + loss_features

        gradients, student_gradients = {}, {}
        places = {"images": images, "teacher_logits": t, "student_logits": q}
        found = torch.autograd.grad(loss_generator, [*places.values(), *generator.values()], retain_graph=True)
        gradients.update({f"loss_generator at {key}": g for key, g in zip(places, found, strict=False)})
        generator_gradients = dict(zip(generator, found[len(places) :], strict=True))
        if now.trains_student:
            found = torch.autograd.grad(loss_student, [q, *student.values()])
            gradients["loss_student at student_logits"] = found[0]
            student_gradients = dict(zip(student, found[1:], strict=True))

        with torch.no_grad():
            self.adam.step(self.generator, generator_gradients, now.lr_generator)
            if now.trains_student:
                self._update_student(student_gradients, now)
                self.bank[self.stored % settings["bank_batches"] if settings["bank_batches"] else 0] = Kept(
                    shown, target, [feature.detach() for feature in watching.features]
                )
                self.stored += 1
            if self.averaged is not None:
                for key in generator:
                    self.averaged[key] = torch.lerp(self.generator[key], self.averaged[key], settings["generator_ema"])
            self.generator.update(statistics)
        values = {
            "images": images,
            "teacher_logits": t,
            "targets": target,
            "soft": soft,
            "student_logits": q,
            "h_prime": h_prime,
            "loss_generator": loss_generator,
            "loss_margin": margin,
            "loss_ds": disagreement,
            "loss_as": agreement,
            "loss_bns": statistics_loss,
            "loss_logits": loss_logits,
            "loss_features": loss_features,
            "loss_student": loss_student,
        }
        return self._step(now, values, gradients, generator_gradients, student_gradients, edges)

    def is_replay(self) -> bool:
        """Whether the next step is of the student alone."""
        trained = self.steps - self.settings["warmup_epochs"] * self.settings["steps_per_epoch"]
        return trained >= 0 and trained % (self.settings["replays"] + 1) > 0

    def _begin(self, looked_at: list[Batch]) -> tuple[Phase, Edges]:
        settings, now, edges = self.settings, phase(self.settings, self.steps), Edges()
        assert len(looked_at) == self.looks()
        if settings["generator_ema"] and self.steps == settings["warmup_epochs"] * settings["steps_per_epoch"]:
            self.averaged = dict(self.generator)
        if looked_at:
            self.begin_student(looked_at, edges)
        self.steps += 1
        return now, edges

    def replay(self, place: int | None, batch: Batch | None, looked_at: list[Batch]) -> Step:
        """One step of the student alone, on the kept batch of that place, or on new images."""
        now, edges = self._begin(looked_at)
        student = self._learned_by_student()
        if batch is None:
            assert place is not None
            kept = self.bank[place]
        else:
            kept = self._new(batch, edges)
        quantised = Student({**self.student, **student}, edges, self.bits, self.ranges, now.moves_ranges)
        q = self.network(quantised, kept.shown)
        loss_logits, loss_features = self._student_losses(kept.target, kept.features, q, quantised.features)
        loss_student = loss_logits + loss_features
        at_logits, *found = torch.autograd.grad(loss_student, [q, *student.values()])
        student_gradients = dict(zip(student, found, strict=True))
        self._update_student(student_gradients, now)
        values = {
            "targets": kept.target,
            "student_logits": q,
            "loss_logits": loss_logits,
            "loss_features": loss_features,
            "loss_student": loss_student,
        }
        gradients = {"loss_student at student_logits": at_logits}
        return self._step(now, values, gradients, {}, student_gradients, edges)

    @torch.no_grad()
    def _new(self, batch: Batch, edges: Edges) -> Kept:
        state = self.generator if self.averaged is None else self.averaged
        images, statistics = generate(self.settings["generator"], state, batch.noise.double(), batch.labels, edges)
        state.update(statistics)
        shown = self.shown(images, batch)
        watching = Teacher(self.teacher, edges)
        return Kept(shown, self._target(self.network(watching, shown), shown, edges), watching.features)

    def _learned_by_student(self) -> dict[str, Tensor]:
        student = _parameters(self.student)
        if self.adam_steps is not None:
            student.update({key: value.clone() for key, value in _step_sizes(self.student).items()})
        return {key: value.requires_grad_() for key, value in student.items()}

    @torch.no_grad()
    def _target(self, t: Tensor, shown: Tensor, edges: Edges) -> Tensor:
        target = t.detach()
        if self.settings["mirror_teacher"]:
            mirrored = torch.stack(shown.unbind(3)[::-1], 3)
            target = 0.5 * target + 0.5 * self.network(Teacher(self.teacher, edges), mirrored)
        return target

    def _student_losses(
        self, target: Tensor, theirs: list[Tensor], q: Tensor, ours: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        errors = [
            (their.detach() - our).square().sum() / their.detach().square().sum()
            for their, our in zip(theirs, ours, strict=True)
        ]
        matching = self.settings["feature_weight"] * sum(errors) / len(errors)
        return oracle.student_loss(target, q, self.settings["temperature"]), matching

    @torch.no_grad()
    def _update_student(self, gradients: Mapping[str, Tensor], now: Phase) -> None:
        of_steps = {k: g for k, g in gradients.items() if k.endswith("scale")}
        self.optimizer.step(self.student, {k: g for k, g in gradients.items() if k not in of_steps}, now.lr_student)
        if self.adam_steps is not None:
            # Adam moves the logarithm of a step, whose gradient is s dL/ds.
            logarithms = {k: self.student[k].log() for k in of_steps}
            self.adam_steps.step(logarithms, {k: g * self.student[k] for k, g in of_steps.items()}, now.lr_steps)
            self.student.update({k: value.exp() for k, value in logarithms.items()})

    def _step(
        self,
        now: Phase,
        values: Mapping[str, Tensor],
        gradients: dict[str, Tensor],
        generator_gradients: dict[str, Tensor],
        student_gradients: dict[str, Tensor],
        edges: Edges,
    ) -> Step:
        return Step(
            now,
            {key: value.detach() for key, value in values.items()},
            gradients,
            generator_gradients,
            student_gradients,
            dict(self.generator),
            dict(self.student),
            [(r.lo, r.hi, r.batches, r.scale, r.zero_point) for r in self.ranges],
            edges,
        )

    def adopt_step_sizes(self, step_sizes: Mapping[str, Tensor]) -> None:
        """Go on from the other side's learned step sizes: of its float32, the next step's every digit depends."""
        self.student.update({name: value.double() for name, value in step_sizes.items()})


def _step_sizes(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if key.endswith("scale")}


def _parameters(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of what trains: all but the running statistics and what belongs to quantisers."""
    others = ("running_mean", "running_var", "num_batches_tracked", "scale", "zero_point", "._u", "._v")
    return {key: value.detach().clone() for key, value in state.items() if not key.endswith(others)}
