"""Where right results may differ by more than rounding: at the jumps of rounding, clipping and activations.

What is computed in float32, by division or by multiplication with 1 / scale, is within 1e-5 of the float64 value here
(levels are at most 15 and activations about 5): elements as near to a jump may fall on either side, no others.
"""

from __future__ import annotations

from torch import Tensor

#: Distance of x / scale from a jump of the quantiser within which either side is right.
TIE = 1e-4
#: The same of what goes into an activation.
KINK = 1e-5


def near_tie(levels: Tensor) -> Tensor:
    """Where `levels`, x / scale in float64, is about halfway between two integers: rounding and clipping jump there."""
    return (levels - levels.floor()).sub_(0.5).abs_() < TIE


def near_kink(u: Tensor, act: str) -> Tensor:
    """Where the slope of the activation `act` jumps at about `u`, in float64."""
    near = u.abs() < KINK
    return near | ((u - 6).abs() < KINK) if act == "relu6" else near
