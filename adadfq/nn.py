"""Drop-in quantised modules: QuantConv2d, QuantLinear, QuantAct.

Weights are quantised per output channel over their min/max at every forward; activations per tensor over a moving
average of the batch min/max. State_dict keys of the layers are ``weight`` and ``bias``, so a float checkpoint loads.
Both may have steps that are given or learned instead (:mod:`adadfq.weight_step`, :meth:`QuantAct.learn_step`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from adadfq import checks, functional
from adadfq.errors import InvalidInputError
from adadfq.ops import reference
from adadfq.weight_step import WeightStep, keeping_dtype, make_learned, range_of_step, rescaled_step

__all__ = [
    "QuantAct",
    "QuantConv2d",
    "QuantLinear",
    "QuantWeight",
    "activations",
    "frozen_ranges",
    "has_step",
    "set_calibrating",
    "step_sizes",
]

_Layer = TypeVar("_Layer", "QuantConv2d", "QuantLinear")


def _copy_parameters(layer: _Layer, source: nn.Module) -> _Layer:
    """Give `layer`, built without parameters, copies of those of `source`."""
    for name in ("weight", "bias"):
        parameter = getattr(source, name)
        if parameter is not None:
            copy = nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
            setattr(layer, name, copy)
    return layer.train(source.training)


class QuantConv2d(WeightStep, nn.Conv2d):
    """``nn.Conv2d`` whose weight is quantised per output channel at every forward.

    Args:
        weight_bits: width of the weight's codes, 2..8. All other arguments are those of :class:`torch.nn.Conv2d`.

    Shape: input [N, C_in, H, W] or [C_in, H, W], as :class:`torch.nn.Conv2d`. The gradient reaches the float weight
    unchanged (straight-through estimator); with a learned step (:mod:`adadfq.weight_step`) it is clipped to the range:
    0 for weights outside of it.

    Raises:
        InvalidInputError: `weight_bits` outside 2..8.
    """

    @classmethod
    def from_float(cls, module: nn.Conv2d, weight_bits: int) -> QuantConv2d:
        """A quantised layer with copies of the parameters of `module`.

        Raises:
            InvalidInputError: `module` is not exactly an ``nn.Conv2d`` (a subclass may compute something else), or
                `weight_bits` is outside 2..8.
        """
        return _copy_parameters(cls.without_parameters(module, weight_bits), module)

    @classmethod
    def without_parameters(cls, module: nn.Conv2d, weight_bits: int) -> QuantConv2d:
        """A layer shaped like `module` with its parameters on the meta device; errors as :meth:`from_float`."""
        if type(module) is not nn.Conv2d:
            raise InvalidInputError(f"QuantConv2d.from_float takes a torch.nn.Conv2d, got {type(module).__name__}")
        return cls(
            module.in_channels,
            module.out_channels,
            module.kernel_size,
            module.stride,
            module.padding,
            module.dilation,
            module.groups,
            module.bias is not None,
            module.padding_mode,
            device="meta",
            weight_bits=weight_bits,
        )

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.quantize_weight(self.weight), self.bias)


class QuantLinear(WeightStep, nn.Linear):
    """``nn.Linear`` whose weight is quantised per output feature at every forward.

    Args:
        weight_bits: width of the weight's codes, 2..8. All other arguments are those of :class:`torch.nn.Linear`.

    Shape: input [..., in_features], as :class:`torch.nn.Linear`. The gradient reaches the float weight unchanged
    (straight-through estimator); with a learned step (:mod:`adadfq.weight_step`) it is clipped to the range: 0 for
    weights outside of it.

    Raises:
        InvalidInputError: `weight_bits` outside 2..8.
    """

    @classmethod
    def from_float(cls, module: nn.Linear, weight_bits: int) -> QuantLinear:
        """A quantised layer with copies of the parameters of `module`.

        Raises:
            InvalidInputError: `module` is not exactly an ``nn.Linear``, or `weight_bits` is outside 2..8.
        """
        return _copy_parameters(cls.without_parameters(module, weight_bits), module)

    @classmethod
    def without_parameters(cls, module: nn.Linear, weight_bits: int) -> QuantLinear:
        """A layer shaped like `module` with its parameters on the meta device; errors as :meth:`from_float`."""
        if type(module) is not nn.Linear:
            raise InvalidInputError(f"QuantLinear.from_float takes a torch.nn.Linear, got {type(module).__name__}")
        return cls(
            module.in_features, module.out_features, module.bias is not None, device="meta", weight_bits=weight_bits
        )

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self.quantize_weight(self.weight), self.bias)


class QuantWeight(WeightStep):
    """Quantises a weight tensor given to it, per output channel (dim 0): for convolutions called as functions.

    Raises:
        InvalidInputError: `weight_bits` outside 2..8.
    """

    def __init__(self, weight_bits: int = 8) -> None:
        super().__init__(weight_bits=weight_bits)

    def forward(self, weight: Tensor) -> Tensor:
        return self.quantize_weight(weight)


class QuantAct(nn.Module):
    """Quantises activations per tensor over a moving average of the batch min/max.

    While calibrating (from construction until :meth:`freeze`) every forward, in train and in eval mode, moves the range
    by the batch's min/max: after n batches the average weighs batch i by ``momentum ** (n - i)``, divided by the sum of
    those weights, so that it is unbiased from the first batch on. Once frozen the range stands still. The state,
    including whether it is frozen, is in buffers of fixed shape (all scalars, kept in float32 whatever the model is
    cast to): running_min, running_max, num_batches, scale, zero_point, calibrating.

    The range of a frozen one and its step agree in every state_dict: while a step is learned, the range saved is what
    its codes span. Where one that is loaded has a step and a range that disagree (saved while the step was learned, by
    a version that kept the old range) the range is taken from the step; where the step is that of the range at another
    width, it is replaced by that of this width.

    Args:
        act_bits: width of the codes, 2..8.
        momentum: weight of the past, 0 <= momentum < 1; the paper's 0.9 by default.

    Raises:
        InvalidInputError: an argument is out of range.
    """

    running_min: Tensor
    running_max: Tensor
    num_batches: Tensor
    scale: Tensor
    zero_point: Tensor

    def __init__(self, act_bits: int = 8, momentum: float = 0.9) -> None:
        super().__init__()
        self.act_bits = checks.check_bits("act_bits", act_bits)
        if checks.check_number("momentum", momentum, 0, 1) == 1:
            raise InvalidInputError("momentum must be below 1, got 1: the range would never move")
        self.momentum = float(momentum)
        self.register_buffer("running_min", torch.zeros(()))
        self.register_buffer("running_max", torch.zeros(()))
        self.register_buffer("num_batches", torch.zeros((), dtype=torch.int64))
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("zero_point", torch.zeros((), dtype=torch.int32))
        self.register_buffer("calibrating", torch.ones((), dtype=torch.bool))
        # Read at every forward, where reading the buffer would wait for the device.
        self._calibrating = True

    def set_calibrating(self, enabled: bool) -> QuantAct:
        """Move the range at every forward, or not. Unlike :meth:`freeze` it asks nothing of the range.

        Raises:
            InvalidInputError: `enabled`, and the step is learned, which moving the range would overwrite.
        """
        if enabled:
            self.check_step()
        self._calibrating = bool(enabled)
        self.calibrating.fill_(bool(enabled))
        return self

    def check_range(self) -> None:
        """Refuse a range that saw no batch or is not finite (:class:`InvalidInputError`). Waits for the device."""
        if int(self.num_batches) == 0:
            raise InvalidInputError("QuantAct cannot be frozen before it has seen a batch: run a forward first")
        if not math.isfinite(float(self.scale.detach())):
            raise InvalidInputError(
                f"QuantAct cannot be frozen over the range {float(self.running_min)}..{float(self.running_max)}: "
                "the activations held NaN or infinity"
            )

    def check_step(self) -> None:
        """Refuse a learned step (:class:`InvalidInputError`), as a range that is to move does."""
        if isinstance(self.scale, nn.Parameter):
            raise InvalidInputError(
                "QuantAct cannot calibrate while its step is learned, which would be overwritten: call "
                "learn_step(False) first"
            )

    def learn_step(self, enabled: bool = True) -> QuantAct:
        """Make `scale` a parameter of the same name (LSQ; the zero point stays), or a buffer again, of the same value.

        The parameter is a new one, float32 whatever the model is cast to: make optimizers, and record graphs,
        afterwards. Nothing keeps it positive. A state_dict loads whichever of the two it is; one of a range that moves
        makes it a buffer. What was learned stays: the range of the buffer is what its codes span.

        Raises:
            InvalidInputError: the range moves still; :meth:`freeze` it first.
        """
        if enabled and self._calibrating:
            raise InvalidInputError("QuantAct cannot learn its step while its range moves: call freeze() first")
        if not enabled:
            self._take_learned_range()
        make_learned(self, "scale", bool(enabled))
        return self

    @torch.no_grad()
    def _take_learned_range(self) -> None:
        """Make the range what the codes of a learned step span, which until then it is not."""
        if isinstance(self.scale, nn.Parameter):
            lo, hi = range_of_step(self.scale, self.zero_point, self.act_bits)
            self.running_min.copy_(lo)
            self.running_max.copy_(hi)

    def freeze(self) -> QuantAct:
        """Stop moving the range. Waits for the device once.

        Raises:
            InvalidInputError: as :meth:`check_range`.
        """
        self.check_range()
        return self.set_calibrating(False)

    def _check_not_empty(self, x: Tensor) -> None:
        if x.numel() == 0:
            raise InvalidInputError(f"QuantAct cannot calibrate on an empty batch, got shape {list(x.shape)}")

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        """Move the range by the min/max of `x`, a non-empty floating tensor; not that of a learned step."""
        self._check_not_empty(x)
        self.check_step()
        lo, hi = torch.aminmax(x.detach())
        reference.update_range(lo, hi, *self._state(), self.act_bits, self.momentum)

    def _state(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return self.running_min, self.running_max, self.num_batches, self.scale, self.zero_point

    @torch.no_grad()
    def set_bits(self, act_bits: int) -> None:
        """Change the width; the range stays, and the same width changes nothing.

        Of a step being learned it is the range that its codes span, up to rounding of the zero point: its ends move by
        half a new step at most.

        Raises:
            InvalidInputError: `act_bits` outside 2..8.
        """
        before, self.act_bits = self.act_bits, checks.check_bits("act_bits", act_bits)
        if act_bits == before:
            return
        if isinstance(self.scale, nn.Parameter):
            scale, zero_point = rescaled_step(self.scale, self.zero_point, before, act_bits)
        else:
            scale, zero_point = functional.qparams(self.running_min, self.running_max, act_bits)
        self.scale.copy_(scale)
        self.zero_point.copy_(zero_point)

    @torch.no_grad()
    def shrink_range(self, share: Tensor) -> None:
        """Multiply both ends of the range by `share`, one element; waits for nothing.

        Raises:
            InvalidInputError: the step is learned, which would be overwritten.
        """
        self.check_step()
        self.running_min.mul_(share)
        self.running_max.mul_(share)
        scale, zero_point = functional.qparams(self.running_min, self.running_max, self.act_bits)
        self.scale.copy_(scale)
        self.zero_point.copy_(zero_point)

    def forward(self, input: Tensor) -> Tensor:
        if self._calibrating:
            self._check_not_empty(input)
            return functional.observe_fake_quantize(input, *self._state(), self.act_bits, self.momentum)
        return functional.fake_quantize(input, self.scale, self.zero_point, self.act_bits)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantAct:
        # Casting a model to half precision must not round its ranges: move them, keep their dtype.
        return super()._apply(keeping_dtype(fn, [*self._buffers.values(), *self._parameters.values()]), recurse)

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._take_learned_range()
        super()._save_to_state_dict(*args, **kwargs)

    def _in_agreement(self, state_dict: dict[str, Any], prefix: str) -> dict[str, Any]:
        """`state_dict` with a range and a step of this module that agree, where it has both and they stand still."""
        keys = [prefix + name for name in ("running_min", "running_max", "scale", "zero_point", "calibrating")]
        found = [state_dict.get(key) for key in keys]
        if not all(isinstance(value, Tensor) and value.numel() == 1 and not value.is_meta for value in found):
            return state_dict
        dtypes = (torch.float32, torch.float32, torch.float32, torch.int32, torch.bool)
        lo, hi, scale, zero_point, calibrating = (
            value.detach().to("cpu", dtype).reshape(()) for value, dtype in zip(found, dtypes, strict=True)
        )
        if calibrating or _is_step_of(scale, zero_point, lo, hi, self.act_bits):
            return state_dict
        if any(_is_step_of(scale, zero_point, lo, hi, bits) for bits in range(2, 9)):
            scale, zero_point = functional.qparams(lo, hi, self.act_bits)
        else:
            lo, hi = range_of_step(scale, zero_point, self.act_bits)
        agreeing = {
            key: value.to(old.device, old.dtype).reshape(old.shape)
            for key, value, old in zip(keys, (lo, hi, scale, zero_point), found, strict=False)
        }
        return {**state_dict, **agreeing}

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(self._in_agreement(state_dict, prefix), prefix, *args, **kwargs)
        if self.calibrating.device.type != "meta":
            self._calibrating = bool(self.calibrating)
            if self._calibrating:
                make_learned(self, "scale", False)  # not by learn_step: the range that was loaded stays

    def extra_repr(self) -> str:
        return f"act_bits={self.act_bits}, momentum={self.momentum}, calibrating={self._calibrating}" + (
            ", step=learned" if isinstance(self.scale, nn.Parameter) else ""
        )


def _is_step_of(scale: Tensor, zero_point: Tensor, lo: Tensor, hi: Tensor, bits: int) -> bool:
    """Whether the range lo..hi has that step at that width, up to rounding."""
    expected, code = functional.qparams(lo, hi, bits)
    return torch.equal(code, zero_point) and torch.allclose(scale, expected, rtol=1e-5, atol=0, equal_nan=True)


def activations(model: nn.Module) -> dict[str, QuantAct]:
    """Every :class:`QuantAct` of `model` by its name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantAct)}


def set_calibrating(model: nn.Module, enabled: bool, without_range: Collection[str] = ()) -> None:
    """Make every :class:`QuantAct` of `model` calibrate, or freeze them all.

    Args:
        without_range: names of those that the forward pass never reaches: freezing asks no range of them.

    Raises:
        InvalidInputError: calibrating, and the step of one of them is learned; or freezing, and one has no range or one
            that is not finite. It is named and none is changed.
    """
    found = activations(model)
    for name, module in found.items():
        if name in without_range and not enabled:
            continue
        try:
            if enabled:
                module.check_step()
            else:
                module.check_range()
        except InvalidInputError as error:
            raise InvalidInputError(f"{name or 'model'}: {error}") from None
    for module in found.values():
        module.set_calibrating(enabled)


def step_sizes(model: nn.Module) -> list[nn.Parameter]:
    """The learned step sizes of `model`, of activations and weights: for a parameter group of their own.

    In the order of its modules; a layer that stands in several places is there once.
    """
    tensors = [
        module.scale if isinstance(module, QuantAct) else module.weight_scale
        for module in model.modules()
        if isinstance(module, (QuantAct, WeightStep))
    ]
    return [tensor for tensor in tensors if isinstance(tensor, nn.Parameter)]


def has_step(model: nn.Module) -> list[str]:
    """Names of what in `model` keeps a step that training gave it, or trains it.

    Layers, and :class:`QuantWeight`, with a step of their own, given or learned (:mod:`adadfq.weight_step`), and every
    :class:`QuantAct` whose step is being learned; a module that stands in several places under each of its names.
    """
    return [
        name
        for name, module in model.named_modules(remove_duplicate=False)
        if (isinstance(module, WeightStep) and module.weight_scale is not None)
        or (isinstance(module, QuantAct) and isinstance(module.scale, nn.Parameter))
    ]


@contextmanager
def frozen_ranges(model: nn.Module) -> Iterator[None]:
    """Run forwards inside the block without moving any activation range of `model`."""
    moving = [module for module in activations(model).values() if module._calibrating]
    for module in moving:
        module.set_calibrating(False)
    try:
        yield
    finally:
        for module in moving:
            module.set_calibrating(True)
