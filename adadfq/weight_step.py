"""Weights quantised with steps that a layer keeps, given or learned, instead of over their own minima and maxima."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from adadfq import checks, functional
from adadfq.errors import InvalidInputError

__all__ = ["WeightStep", "keeping_dtype", "make_learned", "range_of_step", "rescaled_step"]

_SCALE, _ZERO_POINT = "weight_scale", "weight_zero_point"
_Self = TypeVar("_Self", bound="WeightStep")


def make_learned(module: nn.Module, name: str, learned: bool) -> None:
    """Make the tensor `name` of `module` a parameter, or a buffer again; the other kind of the same value goes."""
    tensor = getattr(module, name)
    if isinstance(tensor, nn.Parameter) == learned:
        return
    value = tensor.detach().clone()
    delattr(module, name)
    if learned:
        module.register_parameter(name, nn.Parameter(value))
    else:
        module.register_buffer(name, value)


def keeping_dtype(fn: Callable[[Tensor], Tensor], tensors: Sequence[Tensor | None]) -> Callable[[Tensor], Tensor]:
    """`fn`, of ``nn.Module._apply``, which moves `tensors` and their gradients but does not cast them."""
    kept = [t for tensor in tensors if tensor is not None for t in (tensor, tensor.grad) if t is not None]

    def apply(tensor: Tensor) -> Tensor:
        applied = fn(tensor)
        cast = applied.dtype != tensor.dtype and any(tensor is t for t in kept)
        return tensor.to(applied.device) if cast else applied

    return apply


class WeightStep(nn.Module):
    """What QuantConv2d, QuantLinear and QuantWeight have in common: how their weight is quantised, along dimension 0.

    Without a step of its own (the default) every channel is quantised over its minimum and maximum, found anew at every
    forward, and the state_dict knows nothing of it. :meth:`fix_step` gives `weight_scale` (float32 [C_out], whatever
    the layer is cast to) and `weight_zero_point` (int32 [C_out]), both in the state_dict; :meth:`learn_step` makes
    `weight_scale` a parameter of the same name. A state_dict with a step loads into a layer without one, which then has
    it, as buffers; one without does not fit a layer that has one. Scales that are not positive and finite, and zero
    points that are no codes of this width, are refused, and leave the layer without a step. The state_dict does not
    name its width: a step of fewer bits loads into a wider layer unseen, so set the width it was saved with first.
    """

    weight_bits: int
    weight_scale: Tensor | None
    weight_zero_point: Tensor | None

    def __init__(self, *args: Any, weight_bits: int = 8, **kwargs: Any) -> None:
        checks.check_bits("weight_bits", weight_bits)
        super().__init__(*args, **kwargs)
        self.weight_bits = weight_bits
        self.register_buffer(_SCALE, None)
        self.register_buffer(_ZERO_POINT, None)

    def quantize_weight(self, weight: Tensor) -> Tensor:
        """`weight` fake-quantised with the layer's step, or over its channels' own ranges."""
        if self.weight_scale is None or self.weight_zero_point is None:
            return functional.dynamic_fake_quantize(weight, self.weight_bits, axis=0)[0]
        return functional.fake_quantize(weight, self.weight_scale, self.weight_zero_point, self.weight_bits, axis=0)

    def fix_step(self: _Self, scale: Tensor, zero_point: Tensor) -> _Self:
        """Quantise the weight with copies of these from now on; a step that was learned no longer is.

        Waits for the device once.

        Args:
            scale: step of each channel, floating [C_out], positive and finite.
            zero_point: code of 0 of each channel, an integer tensor [C_out] in 0..2^weight_bits - 1.

        Raises:
            InvalidInputError: a shape, dtype or value does not fit, or the layer's weight or a value is on the meta
                device; nothing is changed.
        """
        checks.check_floating("scale", scale)
        if not isinstance(zero_point, Tensor) or zero_point.is_floating_point() or zero_point.dtype == torch.bool:
            got = zero_point.dtype if isinstance(zero_point, Tensor) else type(zero_point).__name__
            raise InvalidInputError(f"zero_point must be an integer tensor, got {got}")
        expected = list(scale.shape[:1]) if self._channels() is None else [self._channels()]
        for name, values in (("scale", scale), ("zero_point", zero_point)):
            if list(values.shape) != expected:
                raise InvalidInputError(
                    f"{name} must have shape {expected or '[C_out]'}, one element a channel, got {list(values.shape)}"
                )
        weight = getattr(self, "weight", None)
        for name, values in (("weight", weight), ("scale", scale), ("zero_point", zero_point)):
            if values is not None and values.is_meta:
                raise InvalidInputError(
                    f"{name} must hold values, but is on the meta device: give {type(self).__name__} its weight and "
                    "real tensors before fix_step"
                )
        scale = scale.detach().to(torch.float32)
        if wrong := _wrong_values(scale, zero_point, self.weight_bits):
            raise InvalidInputError(wrong)
        device = scale.device if weight is None else weight.device
        self.forget_step()
        self.register_buffer(_SCALE, scale.to(device, copy=True).contiguous())
        self.register_buffer(_ZERO_POINT, zero_point.detach().to(device, torch.int32, copy=True).contiguous())
        return self

    def learn_step(self: _Self, enabled: bool = True) -> _Self:
        """Make `weight_scale` a parameter (LSQ; zero points stay), or a buffer again that keeps what was learned.

        The parameter is a new one: make optimizers, and record graphs, afterwards. Nothing keeps it positive.

        Raises:
            InvalidInputError: the layer has no step; :meth:`fix_step` gives it one.
        """
        if self.weight_scale is None:
            raise InvalidInputError(
                f"{type(self).__name__} has no step to learn: call fix_step(scale, zero_point) first"
            )
        make_learned(self, _SCALE, bool(enabled))
        return self

    def forget_step(self: _Self) -> _Self:
        """Quantise the weight over its own minima and maxima again."""
        for name in (_SCALE, _ZERO_POINT):
            delattr(self, name)
            self.register_buffer(name, None)
        return self

    @torch.no_grad()
    def set_bits(self, weight_bits: int) -> None:
        """Change the width; a step, learned or not, is changed with it.

        The range of its codes stays up to rounding of the zero point: its ends move by half a new step at most.

        Raises:
            InvalidInputError: `weight_bits` outside 2..8.
        """
        checks.check_bits("weight_bits", weight_bits)
        if self.weight_scale is not None and self.weight_zero_point is not None and weight_bits != self.weight_bits:
            rescaled = rescaled_step(self.weight_scale, self.weight_zero_point, self.weight_bits, weight_bits)
            self.weight_scale.copy_(rescaled[0])
            self.weight_zero_point.copy_(rescaled[1])
        self.weight_bits = weight_bits

    def expected_step(self, state_dict: Mapping[str, Any], prefix: str) -> dict[str, Tensor]:
        """What a layer without a step takes of `state_dict` to have one, on the meta device; empty where it is none."""
        names = (prefix + _SCALE, prefix + _ZERO_POINT)
        found = [state_dict[name] for name in names if name in state_dict]
        if self.weight_scale is not None or not found:
            return {}
        channels = self._channels()
        if channels is None:
            channels = found[0].numel()
        dtypes = (torch.float32, torch.int32)
        return {
            name: torch.empty(channels, dtype=dtype, device="meta") for name, dtype in zip(names, dtypes, strict=True)
        }

    def _channels(self) -> int | None:
        weight = getattr(self, "weight", None)
        return None if weight is None else int(weight.shape[0])

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        expected, errors = self.expected_step(state_dict, prefix), len(error_msgs)
        whole = all(name in state_dict for name in expected)
        for name, empty in expected.items():
            near = getattr(self, "weight", state_dict.get(name, empty))
            self.register_buffer(name.removeprefix(prefix), torch.empty_like(empty, device=near.device))
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        # What was not filled must not quantise, nor what is no step.
        if expected and (len(error_msgs) > errors or not whole):
            self.forget_step()
        elif prefix + _SCALE in state_dict and self.weight_scale is not None and self.weight_zero_point is not None:
            wrong = _wrong_values(self.weight_scale, self.weight_zero_point, self.weight_bits)
            if wrong:
                error_msgs.append(f"{prefix}{_SCALE} and {prefix}{_ZERO_POINT} are no step: {wrong}")
                self.forget_step()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> WeightStep:
        return super()._apply(keeping_dtype(fn, [self.weight_scale]), recurse)

    def extra_repr(self) -> str:
        described = super().extra_repr()
        step = "" if self.weight_scale is None else ", step="
        if step:
            step += "learned" if isinstance(self.weight_scale, nn.Parameter) else "fixed"
        return f"{described}{', ' if described else ''}weight_bits={self.weight_bits}{step}"


def _wrong_values(scale: Tensor, zero_point: Tensor, bits: int) -> str:
    """What keeps these from being a step; "" if nothing, or on the meta device. Waits for the device."""
    if scale.is_meta or zero_point.is_meta:
        return ""
    if not bool(((scale > 0) & scale.isfinite()).all()):
        return "scale must be positive and finite in float32 for every channel"
    if not bool(((zero_point >= 0) & (zero_point <= 2**bits - 1)).all()):
        return f"zero_point must be in 0..{2**bits - 1} for every channel"
    return ""


def range_of_step(scale: Tensor, zero_point: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Both ends of what the codes of a quantiser span, without a gradient."""
    scale = scale.detach()
    return -zero_point * scale, (2**bits - 1 - zero_point) * scale


def rescaled_step(scale: Tensor, zero_point: Tensor, bits: int, new_bits: int) -> tuple[Tensor, Tensor]:
    """Scale and zero point at another width over the range that the codes of a quantiser span."""
    return functional.qparams(*range_of_step(scale, zero_point, bits), new_bits)
