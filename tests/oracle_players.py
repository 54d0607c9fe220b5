"""Teacher and student of the oracle in plain PyTorch: quantisers, their ranges, and networks as functions of a player.

Imports no package code. Parameters are named as the package names them in a state_dict.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import oracle
import torch
from torch import Tensor
from torch.nn import functional as torch_F

RANGE_MOMENTUM = 0.9
BATCH_NORM_EPS = 1e-5
#: Of a range: those of which the one of least squared error is taken.
SHARES = [k / 50 for k in range(50, 9, -1)]


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
