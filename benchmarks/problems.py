"""What a case computes: its inputs, and the functions of them that the providers run."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from adadfq import functional
from adadfq.ops.schema import compute_dtype
from benchmarks import plain
from benchmarks.cases import BITS, TINY, Case
from benchmarks.ties import near_kink, near_tie

MOMENTUM = 0.9
EPS = 1e-5
#: A gradient that is not 1: who leaves it out is found.
SCALED = 0.7
LOSS_SETTINGS = (0.1, 0.8, 0.2, 0.1, 1.0)
TEMPERATURE = 20.0

Outputs = tuple[Tensor, ...]
Function = Callable[..., Outputs]


@dataclass
class Problem:
    """Inputs of a case and functions of them.

    Functions take the tensors of `args` in order and return a tuple: first the outputs that `grads` belong to, then
    others that are checked but carry no gradient.
    """

    args: list[Tensor]
    ours: Function
    """The public function of adadfq; under the reference backend also the oracle, in float64."""
    plain: Function
    """The same from stock operators (:mod:`benchmarks.plain`)."""
    native: Function | None = None
    """The framework's own operator, where there is one."""
    wanted: list[int] = field(default_factory=list)
    """Positions of the arguments that get a gradient."""
    grads: list[Tensor] = field(default_factory=list)
    """Gradients of the first outputs, for backward passes."""
    checked_grads: list[list[Tensor]] = field(default_factory=list)
    """Other gradients of the first outputs that the check takes too; only `grads` are timed."""
    mutated: list[int] = field(default_factory=list)
    """Positions of the arguments the functions write to."""
    oracle_dtype: torch.dtype | None = torch.float64
    """What the oracle computes in. None is the operator's own: where ranges come from 16-bit data, -lo / scale often is
    exactly between two zero points, and float64 finds the other one."""
    output_slack: Callable[[Outputs], list[Tensor | None]] = field(default=lambda outputs: [])
    """How far the first outputs may be from the oracle's beside rounding, from all of these: a step where x / scale is
    next to a tie (:mod:`benchmarks.ties`), else 0."""
    gradient_slack: Callable[[], list[Tensor | None]] = field(default=lambda: [])
    """The same of the first gradients: what they jump by where the activation, or the clip, does."""
    straight_through: bool = False
    """Gradients are those of the outputs, to the last bit."""


def make(case: Case, device: torch.device) -> Problem:
    """Inputs of `case` on `device`, the same at every call, and its functions."""
    return _BUILDERS[case.op](case, _Inputs(case, device))


class _Inputs:
    def __init__(self, case: Case, device: torch.device) -> None:
        self.case, self.device = case, device
        self.random = torch.Generator(device).manual_seed(zlib.crc32(case.name.encode()))

    def normal(self, shape: tuple[int, ...], deviation: float = 1.0) -> Tensor:
        """Normal tensor in the dtype and layout of the case."""
        x = torch.randn(shape, generator=self.random, device=self.device).mul_(deviation).to(self.case.torch_dtype)
        if self.case.layout == "channels_last":
            x = x.contiguous(memory_format=torch.channels_last)
        return x

    def uniform(self, size: int, lo: float, hi: float) -> Tensor:
        """[size] in the compute dtype."""
        dtype = compute_dtype(self.case.torch_dtype)
        return torch.rand(size, generator=self.random, device=self.device).mul_(hi - lo).add_(lo).to(dtype)

    def integers(self, size: int, below: int, dtype: torch.dtype) -> Tensor:
        """[size] in 0..below - 1."""
        return torch.randint(below, (size,), generator=self.random, device=self.device, dtype=dtype)


def _axis(case: Case) -> int | None:
    scope = case.variant.removesuffix("_clip").removesuffix("_learned")
    return {"per_tensor": None, "per_channel": 1, "axis0": 0}[scope]


def _quantizer(case: Case, inputs: _Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """scale, zero_point and the scale's view against the tensor: the outermost percent or so is clipped."""
    (shape,), axis = case.shapes, _axis(case)
    channels = 1 if axis is None else shape[axis]
    scale = inputs.uniform(channels, 0.25, 0.4)
    zero_point = inputs.integers(channels, 4, torch.int32) + 6
    view = scale if axis is None else scale.view([-1 if d == axis else 1 for d in range(len(shape))])
    return scale, zero_point, view


def _native_fake_quantize(axis: int | None) -> Function:
    def call(x: Tensor, scale: Tensor, zero_point: Tensor) -> Outputs:
        if axis is None:
            return (torch.fake_quantize_per_tensor_affine(x, scale, zero_point, 0, 2**BITS - 1),)
        return (torch.fake_quantize_per_channel_affine(x, scale, zero_point, axis, 0, 2**BITS - 1),)

    return call


def _fake_quantize(case: Case, inputs: _Inputs) -> Problem:
    (shape,), axis, clip = case.shapes, _axis(case), case.variant.endswith("_clip")
    scale, zero_point, step = _quantizer(case, inputs)
    # Next to no data is within the range: the gradient of torch's operator, which is clipped, is then the same.
    x = inputs.normal(shape, 0.3 if case.where == TINY else 1.0)
    grad = inputs.normal(shape)
    if case.variant.endswith("_learned"):
        return Problem(
            args=[x, scale, zero_point],
            ours=lambda x, s, z: (functional.fake_quantize(x, s, z, BITS, axis),),
            plain=lambda x, s, z: (plain.learned_fake_quantize(x, s, z, BITS, axis),),
            wanted=[0, 1],
            grads=[grad],
            output_slack=lambda outputs: [_step_slack(x, step)],
            gradient_slack=lambda: _learned_slack(x, step, grad, axis),
        )
    return Problem(
        args=[x, scale, zero_point],
        ours=lambda x, s, z: (functional.fake_quantize(x, s, z, BITS, axis, clip),),
        plain=lambda x, s, z: (plain.fake_quantize(x, s, z, BITS, axis, clip),),
        # Its gradient is clipped; that of a straight-through case it does not compute.
        native=_native_fake_quantize(axis) if clip or case.pass_ == "forward" or case.where == TINY else None,
        wanted=[0],
        grads=[grad],
        output_slack=lambda outputs: [_step_slack(x, step)],
        gradient_slack=lambda: [near_tie(x.double() / step.double()) * grad.abs()] if clip else [],
        straight_through=not clip,
    )


def _fake_quantize_inplace(case: Case, inputs: _Inputs) -> Problem:
    (shape,), axis = case.shapes, _axis(case)
    scale, zero_point, step = _quantizer(case, inputs)
    x = inputs.normal(shape)
    return Problem(
        args=[x, scale, zero_point],
        ours=lambda x, s, z: (functional.fake_quantize(x, s, z, BITS, axis, inplace=True),),
        plain=lambda x, s, z: (plain.fake_quantize_(x, s, z, BITS, axis),),
        # PyTorch has none in place: a new tensor is what its user gets, and less work than copying it back.
        native=_native_fake_quantize(axis),
        mutated=[0],
        output_slack=lambda outputs: [_step_slack(x, step)],
    )


def _quantize_pack(case: Case, inputs: _Inputs) -> Problem:
    (shape,), axis = case.shapes, _axis(case)
    scale, zero_point, step = _quantizer(case, inputs)
    x = inputs.normal(shape)

    def output_slack(_: Outputs) -> list[Tensor | None]:
        # A code may be one off; a byte holds two, the first in its lower half.
        codes = near_tie(x.double() / step.double()).flatten().to(torch.int64)
        halves = torch.nn.functional.pad(codes, (0, codes.numel() % 2)).view(-1, 2)
        return [halves[:, 0] + 2**BITS * halves[:, 1]]

    return Problem(
        args=[x, scale, zero_point],
        ours=lambda x, s, z: (functional.quantize_pack(x, s, z, BITS, axis),),
        plain=lambda x, s, z: (plain.quantize_pack(x, s, z, BITS, axis),),
        output_slack=output_slack,
    )


def _unpack_dequantize(case: Case, inputs: _Inputs) -> Problem:
    (shape,), axis, dtype = case.shapes, _axis(case), case.torch_dtype
    scale, zero_point, _ = _quantizer(case, inputs)
    packed = inputs.integers(-(-case.numel * BITS // 8), 256, torch.uint8)
    return Problem(
        args=[packed, scale, zero_point],
        ours=lambda p, s, z: (functional.unpack_dequantize(p, s, z, BITS, shape, axis, dtype),),
        plain=lambda p, s, z: (plain.unpack_dequantize(p, s, z, BITS, shape, axis, dtype),),
    )


def _step_slack(x: Tensor, step: Tensor) -> Tensor:
    return near_tie(x.double() / step.double()) * step


def _learned_slack(x: Tensor, step: Tensor, grad: Tensor, axis: int | None) -> list[Tensor | None]:
    """Of the gradients of x and of its step: next to a tie x may be in the range or not, and have another code."""
    jump = near_tie(x.double() / step.double()) * grad.double().abs()
    others = [d for d in range(x.dim()) if d != axis]
    return [jump, (jump * 2**BITS).sum(others).reshape(-1)]


def _zero_point_slack(x: Tensor, scale: Tensor) -> Tensor:
    lo = x.double().flatten(1).amin(1).clamp(max=0)
    return near_tie(-lo / scale.double())


def _rows(scale: Tensor, shape: tuple[int, ...]) -> Tensor:
    return scale.view(-1, *[1] * (len(shape) - 1))


def _dynamic_fake_quantize(case: Case, inputs: _Inputs) -> Problem:
    (shape,) = case.shapes
    x = inputs.normal(shape, 0.05)
    return Problem(
        args=[x],
        ours=lambda x: functional.dynamic_fake_quantize(x, BITS, 0),
        plain=lambda x: plain.dynamic_fake_quantize(x, BITS),
        wanted=[0],
        grads=[inputs.normal(shape)],
        oracle_dtype=None,
        output_slack=lambda outputs: [
            _step_slack(x, _rows(outputs[1], shape)),
            None,
            _zero_point_slack(x, outputs[1]),
        ],
        straight_through=True,
    )


def _foreach_dynamic_fake_quantize(case: Case, inputs: _Inputs) -> Problem:
    def ours(*tensors: Tensor) -> Outputs:
        x_hats, scales, zero_points = functional.foreach_dynamic_fake_quantize(tensors, BITS, 0)
        return *x_hats, *scales, *zero_points

    tensors = [inputs.normal(shape, 0.05) for shape in case.shapes]

    def output_slack(outputs: Outputs) -> list[Tensor | None]:
        scales = outputs[len(tensors) : 2 * len(tensors)]
        pairs = list(zip(tensors, scales, strict=True))
        x_hats = [_step_slack(x, _rows(scale, tuple(x.shape))) for x, scale in pairs]
        return [*x_hats, *[None] * len(scales), *(_zero_point_slack(x, scale) for x, scale in pairs)]

    return Problem(
        args=list(tensors),
        ours=ours,
        plain=lambda *tensors: plain.foreach_dynamic_fake_quantize(tensors, BITS),
        wanted=list(range(len(case.shapes))),
        grads=[inputs.normal(shape) for shape in case.shapes],
        oracle_dtype=None,
        output_slack=output_slack,
        straight_through=True,
    )


def _foreach_fake_quantize(case: Case, inputs: _Inputs) -> Problem:
    """Tensors, then their scales, then their zero points."""
    n = len(case.shapes)
    tensors = [inputs.normal(shape, 0.05) for shape in case.shapes]
    scales = [inputs.uniform(shape[0], 0.012, 0.02) for shape in case.shapes]
    zero_points = [inputs.integers(shape[0], 4, torch.int32) + 6 for shape in case.shapes]
    grads = [inputs.normal(shape) for shape in case.shapes]
    pairs = [(x, _rows(scale, tuple(x.shape))) for x, scale in zip(tensors, scales, strict=True)]

    def ours(*args: Tensor) -> Outputs:
        return tuple(functional.foreach_fake_quantize(args[:n], args[n : 2 * n], args[2 * n :], BITS, 0))

    def plainly(*args: Tensor) -> Outputs:
        each = zip(args[:n], args[n : 2 * n], args[2 * n :], strict=True)
        if any(scale.requires_grad for scale in args[n : 2 * n]):
            return tuple(plain.learned_fake_quantize(x, s, z, BITS, 0) for x, s, z in each)
        return tuple(plain.fake_quantize(x, s, z, BITS, 0) for x, s, z in each)

    def gradient_slack() -> list[Tensor | None]:
        found = [_learned_slack(x, step, grad, 0) for (x, step), grad in zip(pairs, grads, strict=True)]
        return [each[i] for i in range(2) for each in found]

    return Problem(
        args=[*tensors, *scales, *zero_points],
        ours=ours,
        plain=plainly,
        wanted=list(range(2 * n)),
        grads=grads,
        output_slack=lambda outputs: [_step_slack(x, step) for x, step in pairs],
        gradient_slack=gradient_slack,
    )


def _observe_fake_quantize(case: Case, inputs: _Inputs) -> Problem:
    (shape,), device = case.shapes, inputs.device
    state = [
        torch.tensor(-3.5, device=device),
        torch.tensor(3.75, device=device),
        torch.tensor(2, device=device),
        torch.ones((), device=device),
        torch.zeros((), dtype=torch.int32, device=device),
    ]

    def ours(x: Tensor, *state: Tensor) -> Outputs:
        return functional.observe_fake_quantize(x, *state, BITS, MOMENTUM), *state

    def plainly(x: Tensor, *state: Tensor) -> Outputs:
        return plain.observe_fake_quantize(x, *state, BITS, MOMENTUM), *state

    x = inputs.normal(shape)
    return Problem(
        args=[x, *state],
        ours=ours,
        plain=plainly,
        # PyTorch's own (fused_moving_avg_obs_fake_quant) averages without debiasing: another function.
        wanted=[0],
        grads=[inputs.normal(shape)],
        mutated=[1, 2, 3, 4, 5],
        oracle_dtype=None,
        output_slack=lambda outputs: [_step_slack(x, outputs[4])],
        straight_through=True,
    )


def _affine_act_fake_quantize(case: Case, inputs: _Inputs) -> Problem:
    (shape,) = case.shapes
    act, residual = case.variant.partition("_")[0], "residual" in case.variant
    learned = case.variant.endswith("_learned")
    trained = learned or case.variant.endswith("_trained")
    channels = shape[1]
    # Linear bottlenecks are not quantised.
    quantizer = [torch.tensor([0.3], device=inputs.device), torch.tensor([0], device=inputs.device, dtype=torch.int32)]
    args = [inputs.normal(shape), inputs.uniform(channels, 0.5, 1.5), inputs.uniform(channels, -0.5, 0.5)]
    args += [inputs.normal(shape)] if residual else []
    args += quantizer if act != "none" else []
    mean, var = torch.zeros_like(args[1]), torch.ones_like(args[1])

    def split(rest: tuple[Tensor, ...]) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        added, rest = (rest[0], rest[1:]) if residual else (None, rest)
        return added, *(rest or (None, None))

    def ours(x: Tensor, scale: Tensor, shift: Tensor, *rest: Tensor) -> Outputs:
        added, act_scale, act_zero_point = split(rest)
        qparams = None if act_scale is None or act_zero_point is None else (act_scale, act_zero_point, BITS)
        return (getattr(functional, case.op)(x, scale, shift, added, act, qparams),)

    def plainly(x: Tensor, scale: Tensor, shift: Tensor, *rest: Tensor) -> Outputs:
        added, act_scale, act_zero_point = split(rest)
        return (getattr(plain, case.op)(x, scale, shift, added, act, act_scale, act_zero_point, BITS, mean, var),)

    grad = inputs.normal(shape)
    per_channel = [1, -1, *[1] * (len(shape) - 2)]

    def before_act() -> Tensor:
        u = args[0].double() * args[1].double().view(per_channel) + args[2].double().view(per_channel)
        return u.add_(args[3]) if residual else u

    def output_slack(_: Outputs) -> list[Tensor | None]:
        u = before_act()
        if case.op == "affine_act_quantize":  # codes differ by one
            return [near_tie((u.clamp(0, 6) if act == "relu6" else u.relu()) / quantizer[0].double())]
        return [_step_slack(u.clamp(0, 6) if act == "relu6" else u.relu(), quantizer[0])]

    def gradient_slack() -> list[Tensor | None]:
        jump = near_kink(before_act(), act) * grad.double().abs()
        last = []
        if learned:
            u = before_act()
            passed, step = _learned_slack(u.clamp(0, 6) if act == "relu6" else u.relu(), quantizer[0], grad, None)
            jump, last = jump + passed, [step]
        found: list[Tensor | None] = [jump * args[1].view(per_channel).abs()]
        if trained:
            others = [d for d in range(len(shape)) if d != 1]
            found += [(jump * args[0].abs()).sum(others), jump.sum(others)]
        return [*found, *([jump] if residual else []), *last]

    return Problem(
        args=args,
        ours=ours,
        plain=plainly,
        wanted=[0, *([1, 2] if trained else []), *([3] if residual else []), *([3 + residual] if learned else [])],
        grads=[grad],
        **({"output_slack": output_slack, "gradient_slack": gradient_slack} if act != "none" else {}),
    )


def _bn_match(case: Case, inputs: _Inputs) -> Problem:
    (shape,) = case.shapes
    channels = shape[1]
    return Problem(
        args=[inputs.normal(shape), inputs.uniform(channels, -0.5, 0.5), inputs.uniform(channels, 0.5, 1.5)],
        ours=lambda x, mean, var: (functional.bn_match(x, mean, var),),
        plain=lambda x, mean, var: (plain.bn_match(x, mean, var),),
        wanted=[0],
        grads=[torch.tensor(SCALED, device=inputs.device, dtype=compute_dtype(case.torch_dtype))],
    )


def _bn_match_forward(case: Case, inputs: _Inputs) -> Problem:
    (shape,) = case.shapes
    channels = shape[1]
    ranges = ((-0.5, 0.5), (0.5, 1.5), (0.5, 1.5), (-0.5, 0.5))
    return Problem(
        args=[inputs.normal(shape), *(inputs.uniform(channels, lo, hi) for lo, hi in ranges)],
        ours=lambda x, mean, var, w, b: functional.bn_match_forward(x, mean, var, w, b, EPS),
        plain=lambda x, mean, var, w, b: plain.bn_match_forward(x, mean, var, w, b, EPS),
        wanted=[0],
        grads=[
            inputs.normal(shape),
            # Large enough that leaving the loss's gradient out of a batch this large would be seen.
            torch.tensor(float(case.numel), device=inputs.device, dtype=compute_dtype(case.torch_dtype)),
        ],
    )


def _batch_norm_act(case: Case, inputs: _Inputs) -> Problem:
    (shape,) = case.shapes
    form, _, act = case.variant.partition("_")
    negative_slope = 0.2 if act else 1.0
    size = shape[1] if form == "channel" else shape[0] * shape[1]
    parameters = [
        inputs.uniform(size, lo, lo + 1).view(shape[1:2] if form == "channel" else shape[:2]) for lo in (0.5, -0.5)
    ]
    args, grad = [inputs.normal(shape), *parameters], inputs.normal(shape)

    def gradient_slack() -> list[Tensor | None]:
        x, weight, bias = (value.double() for value in args)
        others = [d for d in range(x.dim()) if d != 1]
        var, mean = torch.var_mean(x, others, correction=0, keepdim=True)
        inverse = (var + EPS).rsqrt()
        x_hat = (x - mean) * inverse
        places = [*([1] if form == "channel" else []), *weight.shape, *[1] * (x.dim() - 2)]
        weight, bias = weight.view(places), bias.view(places)
        jump = near_kink(x_hat * weight + bias, "relu") * grad.double().abs() * (1 - negative_slope)
        shared = others if form == "channel" else others[1:]
        # PyTorch rounds the activation's gradient to 16 bits before it sums; a deviation of the sum of such errors is
        # about a third of a unit of what sums of squares say.
        unit = 8 * torch.finfo(case.torch_dtype).eps if case.torch_dtype.itemsize == 2 else 0.0
        g = grad.double()
        rounded = [unit * (g * factor).square().sum(shared).sqrt() for factor in (x_hat, 1)]
        return [
            jump * weight.abs() * inverse,
            (jump * x_hat.abs()).sum(shared) + rounded[0],
            jump.sum(shared) + rounded[1],
        ]

    return Problem(
        args=args,
        ours=lambda x, w, b: (functional.batch_norm_act(x, w, b, EPS, negative_slope).y,),
        plain=lambda x, w, b: (plain.batch_norm_act(x, w, b, EPS, negative_slope),),
        wanted=[0, 1, 2],
        grads=[grad],
        gradient_slack=gradient_slack,
    )


def _logits(case: Case, inputs: _Inputs) -> tuple[Tensor, Tensor, Tensor]:
    (shape,) = case.shapes
    return inputs.normal(shape, 2), inputs.normal(shape, 2), inputs.integers(shape[0], shape[1], torch.int64)


def _loss_grads(case: Case, inputs: _Inputs) -> dict[str, Any]:
    """The loss's gradient is 1, as in ``loss.backward()``, and is checked with another too; or that one is timed."""
    dtype = compute_dtype(case.torch_dtype)
    one, scaled = (torch.tensor(value, device=inputs.device, dtype=dtype) for value in (1.0, SCALED))
    return {"grads": [scaled]} if case.variant == "scaled" else {"grads": [one], "checked_grads": [[scaled]]}


def _margin_loss(case: Case, inputs: _Inputs) -> Problem:
    teacher, student, labels = _logits(case, inputs)
    return Problem(
        args=[teacher, student, labels],
        ours=lambda t, q, y: tuple(functional.margin_loss(t, q, y, *LOSS_SETTINGS)),
        plain=lambda t, q, y: plain.margin_loss(t, q, y, *LOSS_SETTINGS),
        wanted=[0, 1],
        **_loss_grads(case, inputs),
    )


def _entropy_distillation(case: Case, inputs: _Inputs) -> Problem:
    teacher, student, _ = _logits(case, inputs)
    return Problem(
        args=[teacher, student],
        ours=lambda t, q: (functional.entropy_distillation(t, q, TEMPERATURE),),
        plain=lambda t, q: (plain.entropy_distillation(t, q, TEMPERATURE),),
        wanted=[1],
        **_loss_grads(case, inputs),
    )


_BUILDERS: dict[str, Callable[[Case, Any], Problem]] = {
    "fake_quantize": _fake_quantize,
    "fake_quantize_": _fake_quantize_inplace,
    "dynamic_fake_quantize": _dynamic_fake_quantize,
    "foreach_dynamic_fake_quantize": _foreach_dynamic_fake_quantize,
    "foreach_fake_quantize": _foreach_fake_quantize,
    "observe_fake_quantize": _observe_fake_quantize,
    "affine_act_fake_quantize": _affine_act_fake_quantize,
    "affine_act_quantize": _affine_act_fake_quantize,
    "quantize_pack": _quantize_pack,
    "unpack_dequantize": _unpack_dequantize,
    "bn_match": _bn_match,
    "bn_match_forward": _bn_match_forward,
    "batch_norm_act": _batch_norm_act,
    "margin_loss": _margin_loss,
    "entropy_distillation": _entropy_distillation,
}
