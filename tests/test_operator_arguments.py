"""Whether what compares kernels with the reference can fail."""

from __future__ import annotations

import pytest
import torch
from operator_arguments import arguments, assert_right, call

from adadfq.ops import reference
from adadfq.ops.schema import OPERATORS


@pytest.mark.parametrize("op", list(OPERATORS))
def test_the_reference_is_right(op: str) -> None:
    args = arguments(op, (3, 5, 7, 9), torch.float32)
    assert_right(op, call(reference.KERNELS[op], op, args), args)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 12345.0], ids=str)
@pytest.mark.parametrize("op", list(OPERATORS))
def test_each_result_must_be_right(op: str, value: float) -> None:
    """NaN is what memory holds that a kernel never wrote."""
    args = arguments(op, (3, 5, 7, 9), torch.float32)
    right = call(reference.KERNELS[op], op, args)
    for i, result in enumerate(right):
        wrong = list(right)
        wrong[i] = torch.full_like(result, value if result.is_floating_point() else 77)
        with pytest.raises(AssertionError):
            assert_right(op, wrong, args)
