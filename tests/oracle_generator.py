"""The oracle's generators and what its images go through, in plain PyTorch; imports no package code."""

from __future__ import annotations

import math
from collections.abc import Mapping

import oracle
import torch
from oracle_players import BATCH_NORM_EPS, Edges
from torch import Tensor
from torch.nn import functional as torch_F

BATCH_NORM_MOMENTUM = 0.1


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

    Miyato et al. 2018: a step of the power iteration before the layer is used, through which no gradient passes; sigma
    = u W v does have one. In PyTorch's order: u from the last v, then v, where their algorithm 1 begins with v.
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
