"""What a CUDA device is asked to do by code that runs on fake tensors: kernels, the bytes they move, their FLOPs.

PyTorch's operators are counted by rules: one kernel an operator that computes anything, none for a view, several where
its CUDA implementation is known to launch several; every kernel reads what it is given and writes its results once.
adadfq's operators launch what :data:`OWN` says. These are models of libraries that are not here: cuDNN may choose an
algorithm with helpers of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from adadfq.errors import InvalidInputError

aten = torch.ops.aten

#: Units that FLOPs are done in: matrix units on 16-bit numbers, on float32 rounded to TF32, and all others in float32.
BFLOAT16, TF32, LANES = "bfloat16", "tf32", "lanes"


class Own(NamedTuple):
    """What an operator of adadfq launches, and how often its kernels go over its largest tensors."""

    launches: int
    passes: int = 1


#: Of the CUDA backend, on weights for dynamic_fake_quantize and lists; of Triton's for batch_norm_act, only there.
OWN = {
    "fake_quantize": Own(1),
    "fake_quantize_": Own(1),
    "fake_quantize_backward": Own(1),
    "dynamic_fake_quantize": Own(1),
    "foreach_dynamic_fake_quantize": Own(1),
    "learned_fake_quantize_backward": Own(1),
    "foreach_fake_quantize": Own(1),
    "foreach_learned_fake_quantize_backward": Own(1),
    "observe_fake_quantize": Own(2, 2),
    "affine_act_fake_quantize": Own(1),
    "affine_act_quantize": Own(1),
    "affine_act_fake_quantize_backward": Own(1),
    "affine_act_learned_fake_quantize_backward": Own(1),
    "bn_match": Own(1),
    "bn_match_backward": Own(1),
    "bn_match_forward": Own(1),
    "bn_match_forward_backward": Own(1),
    "batch_norm_act": Own(3, 2),
    "batch_norm_act_backward": Own(3, 2),
    "margin_loss": Own(1),
    "entropy_distillation": Own(1),
}

#: They allocate, or give what is there under another name.
_NOTHING = {
    aten.empty.memory_format,
    aten.empty_strided.default,
    aten.empty_like.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
    aten._unsafe_view.default,
    aten.lift_fresh.default,
    aten._reshape_alias.default,
}
#: Operator -> kernels, where not one. BatchNorm in training: statistics, then the map; and so back.
_SEVERAL = {
    aten.native_batch_norm: 2,
    aten.cudnn_batch_norm: 2,
    aten.native_batch_norm_backward: 2,
    aten.cudnn_batch_norm_backward: 2,
    # Zeros, then what is put among them.
    aten.constant_pad_nd: 2,
    aten.slice_backward: 2,
    aten.select_backward: 2,
    aten.embedding_dense_backward: 2,
    aten.max_pool2d_with_indices_backward: 2,
    aten.nll_loss_backward: 2,
}
#: Tensors that one kernel of a list operator takes (ATen's multi_tensor_apply, arguments of 4 KB), by the number of
#: lists, and the chunks of so many elements.
_TENSORS_OF_LISTS, _CHUNKS, _CHUNK = (110, 64, 48, 36, 30), 320, 65536
#: Tensors that one kernel of aten.cat takes.
_TENSORS_OF_CAT = 128


class Launch(NamedTuple):
    """A kernel: bytes it moves, FLOPs and the unit they are done in."""

    nbytes: int
    flops: int = 0
    unit: str = LANES


class Call(NamedTuple):
    """A call of an operator that launched something."""

    op: str
    part: str
    backward: bool
    launches: tuple[Launch, ...]


@dataclass
class _Range:
    """Sequence numbers of the autograd nodes that a part's forward made."""

    part: str
    first: int
    end: int


class Counter(TorchDispatchMode):
    """Records every call while it is active; a backward operator is of the part whose forward made its node.

    Args:
        rest: the part of what :meth:`watch` does not name.
    """

    def __init__(self, rest: str) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self._rest, self._part = rest, rest
        self._ranges: list[_Range] = []

    @contextmanager
    def watch(self, **parts: nn.Module | torch.optim.Optimizer) -> Iterator[None]:
        """Take the forwards of these networks and the steps of these optimizers as parts of a step by these names."""
        handles = []
        for part, player in parts.items():

            def enter(*_: Any, part: str = part.rstrip("0123456789")) -> None:
                self._part = part
                self._ranges.append(_Range(part, torch.autograd._get_sequence_nr(), -1))

            def leave(*_: Any) -> None:
                self._part, self._ranges[-1].end = self._rest, torch.autograd._get_sequence_nr()

            if isinstance(player, nn.Module):
                handles += [player.register_forward_pre_hook(enter), player.register_forward_hook(leave)]
            else:
                handles += [player.register_step_pre_hook(enter), player.register_step_post_hook(leave)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _where(self) -> tuple[str, bool]:
        """(part, whether in a backward) of the operator that is being called."""
        node = torch._C._current_autograd_node()
        if node is None:
            return self._part, False
        number = node._sequence_nr()
        found = (range_.part for range_ in self._ranges if range_.first <= number < range_.end)
        return next(found, self._rest), True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if launches := launches_of(func, args, kwargs, result):
            self.calls.append(Call(str(func), *self._where(), tuple(launches)))
        return result


def launches_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> list[Launch]:
    """The kernels of one call of an operator.

    Raises:
        InvalidInputError: it is one of adadfq's that :data:`OWN` does not hold.
    """
    if func.namespace == "adadfq":
        return _own(func, args, kwargs, result)
    if func in _NOTHING or func.namespace in ("prim", "profiler"):
        return []
    if func.is_view or torch.Tag.inplace_view in func.tags:
        return []
    name = func.overloadpacket.__name__
    if func.overloadpacket is aten.convolution:
        return _convolution(args, result)
    if func.overloadpacket is aten.convolution_backward:
        return _convolution_backward(args, result)
    nbytes = _moved(func, args, kwargs, result)
    if name.startswith(("_foreach", "_fused_ad", "_fused_sgd")):
        kernels = _list_kernels(name, [*args, result])
    elif func.overloadpacket in (aten.cat, aten.stack):
        kernels = -(-len(args[0]) // _TENSORS_OF_CAT)
    else:
        kernels = _SEVERAL.get(func.overloadpacket, 1)
    if "batch_norm" in name:
        # The statistics' pass reads x, or x and the gradient, before the map's does.
        nbytes += _nbytes(args[0]) + (_nbytes(args[1]) if name.endswith("backward") else 0)
    if func.overloadpacket in (aten.embedding, aten.index, aten.gather):
        nbytes = 2 * _nbytes(result) + _nbytes(args[1])  # not the whole table
    flops = _flops(func, args, kwargs, result)
    unit = BFLOAT16 if _is_16_bit(result) else LANES  # PyTorch's products of float32 matrices are not rounded to TF32
    return [Launch(nbytes // kernels, flops // kernels, unit) for _ in range(kernels)]


def _own(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> list[Launch]:
    name = func.overloadpacket.__name__
    if name not in OWN:
        raise InvalidInputError(f"nobody has said how many kernels adadfq::{name} launches: see benchmarks/launches.py")
    own = OWN[name]
    nbytes = _moved(func, args, kwargs, result)
    if own.passes > 1:
        main = _nbytes(args[0]) + (_nbytes(args[1]) if name.endswith("_backward") else 0)
        nbytes += (own.passes - 1) * main
    return [Launch(nbytes // own.launches) for _ in range(own.launches)]


def _convolution(args: tuple[Any, ...], result: Tensor) -> list[Launch]:
    x, weight, bias = args[:3]
    flops = _products(x, weight, result, transposed=args[6])
    launches = [Launch(_nbytes(x) + _nbytes(weight) + _nbytes(result), flops, _unit(weight))]
    return launches + ([] if bias is None else [Launch(2 * _nbytes(result) + _nbytes(bias))])


def _convolution_backward(args: tuple[Any, ...], result: Any) -> list[Launch]:
    grad, x, weight = args[:3]
    grad_x, grad_weight, grad_bias = result
    flops = _products(x, weight, grad, transposed=args[7])
    launches = []
    if grad_x is not None:
        launches.append(Launch(_nbytes(grad) + _nbytes(weight) + _nbytes(grad_x), flops, _unit(weight)))
    if grad_weight is not None:
        launches.append(Launch(_nbytes(grad) + _nbytes(x) + _nbytes(grad_weight), flops, _unit(weight)))
    if grad_bias is not None:
        launches.append(Launch(_nbytes(grad) + _nbytes(grad_bias)))
    return launches


def _products(x: Tensor, weight: Tensor, out: Tensor, transposed: bool) -> int:
    """FLOPs of a convolution, of its input's gradient and of its weight's: flop_counter takes groups for none there."""
    return 2 * (x if transposed else out).numel() * weight.shape[1:].numel()


def _unit(weight: Tensor) -> str:
    """Of a convolution; PyTorch lets cuDNN round float32 to TF32 by default. Depthwise ones are no matrix products."""
    if weight.shape[1] == 1:
        return LANES
    return BFLOAT16 if _is_16_bit(weight) else TF32


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _is_16_bit(value: Any) -> bool:
    return _is_tensor(value) and value.is_floating_point() and value.dtype.itemsize == 2


def _nbytes(tensor: Tensor | None) -> int:
    """Of the memory that a tensor is in: what is repeated is read once."""
    if tensor is None:
        return 0
    sizes = [size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride]
    return torch.Size(sizes).numel() * tensor.dtype.itemsize if tensor.numel() else 0


def _moved(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
    """Bytes of the arguments read, of the results, and of the arguments written to."""
    total, written = 0, []
    overwritten = func.overloadpacket in (aten.copy_, aten.fill_, aten.zero_)
    for i, argument in enumerate(func._schema.arguments):
        value = kwargs.get(argument.name, args[i] if i < len(args) else None)
        tensors = [leaf for leaf in tree_leaves(value) if _is_tensor(leaf)]
        mutated = argument.alias_info is not None and argument.alias_info.is_write
        written += tensors if mutated else []
        total += sum(map(_nbytes, tensors)) * (1 if not mutated or overwritten else 2)
    ids = {id(tensor) for tensor in written}
    return total + sum(_nbytes(leaf) for leaf in tree_leaves(result) if _is_tensor(leaf) and id(leaf) not in ids)


def _flops(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
    formula = flop_registry.get(func.overloadpacket)
    return 0 if formula is None else int(formula(*args, **kwargs, out_val=result))


def _list_kernels(name: str, values: list[Any]) -> int:
    """A kernel takes so many tensors of so many lists, and so many chunks of their elements."""
    lists = [value for value in values if isinstance(value, (list, tuple)) and value and _is_tensor(value[0])]
    depth = len(lists) - name.startswith("_fused_adam")  # the steps, one number a tensor, are not walked
    most = _TENSORS_OF_LISTS[min(depth, len(_TENSORS_OF_LISTS)) - 1]
    kernels = tensors = chunks = 0
    for tensor in lists[0]:
        tensors += 1
        chunks += -(-tensor.numel() // _CHUNK)
        kernels += chunks // _CHUNKS
        chunks %= _CHUNKS
        if tensors == most:
            kernels, tensors, chunks = kernels + (chunks > 0), 0, 0
    return kernels + (chunks > 0)
