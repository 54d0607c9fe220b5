"""quantize(): a float model -> a quantised copy, through torch.fx, or by swapping modules where tracing fails."""

from __future__ import annotations

import copy
import operator
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from adadfq import checks
from adadfq.errors import InvalidInputError
from adadfq.models.build import model_spec
from adadfq.nn import QuantAct, QuantConv2d, QuantLinear, QuantWeight, activations
from adadfq.reporting import Report, ReportRow

__all__ = [
    "QUANTIZING",
    "QuantInfo",
    "is_as_quantized",
    "module_bits",
    "quantize",
    "quantized_info",
    "report",
    "set_module_bits",
    "trace",
]

_LAYERS = {nn.Conv2d: QuantConv2d, nn.Linear: QuantLinear}
QUANTIZING = (QuantConv2d, QuantLinear, QuantWeight, QuantAct)
_RELU_MODULES = (nn.ReLU, nn.ReLU6)
_RELU_FUNCTIONS = {F.relu, F.relu_, F.relu6, torch.relu, torch.relu_}
_RELU_METHODS = {"relu", "relu_"}
_WEIGHT_FUNCTIONS = {F.conv2d, torch.conv2d, F.linear}

#: Functions and methods that move, add, pool or normalise values. Any other call is listed in the report.
_NEUTRAL_CALLS = frozenset(
    """
    add add_ iadd sub sub_ isub rsub mul mul_ imul div div_ truediv itruediv floordiv floor_divide mod neg pow
    getitem getattr setitem cat concat concatenate stack split chunk tensor_split unbind narrow select index_select
    flatten unflatten view view_as reshape reshape_as squeeze squeeze_ unsqueeze unsqueeze_ permute transpose t swapaxes
    movedim expand expand_as repeat repeat_interleave contiguous clone detach to float type_as size dim numel shape
    channel_shuffle pixel_shuffle pixel_unshuffle roll flip unfold fold
    mean sum amax amin max min std var norm normalize adaptive_avg_pool1d adaptive_avg_pool2d adaptive_max_pool2d
    avg_pool2d max_pool2d boolean_dispatch fn lp_pool2d interpolate upsample pad _pad grid_sample
    batch_norm layer_norm group_norm instance_norm local_response_norm
    dropout dropout2d dropout_ feature_dropout alpha_dropout drop_path stochastic_depth
    eq ne lt le gt ge and_ or_ not_ _assert int len sqrt rsqrt abs square ones zeros zeros_like ones_like
    """.split()
)
#: Calls whose result may share memory with their argument.
_ALIASING_CALLS = frozenset(
    """
    flatten view view_as reshape reshape_as squeeze unsqueeze permute transpose t swapaxes movedim expand expand_as
    contiguous detach to float type_as getitem split chunk tensor_split unbind narrow select dropout dropout2d
    alpha_dropout Dropout Dropout2d Dropout3d AlphaDropout Identity Flatten Unflatten
    """.split()
)
#: Operators that write into their first argument, besides those whose name ends in an underscore.
_INPLACE_CALLS = frozenset(
    "iadd isub imul itruediv ifloordiv imod ipow iand ior ixor setitem __iadd__ __isub__ __imul__ __setitem__".split()
)
#: torch.nn modules that the report passes over, besides containers.
_NEUTRAL_MODULES = (
    nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.LocalResponseNorm, nn.Identity, nn.Flatten,
    nn.Unflatten, nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle, nn.Upsample, nn.Fold, nn.Unfold,
    nn.modules.dropout._DropoutNd, nn.modules.pooling._MaxPoolNd, nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd, nn.modules.pooling._AdaptiveMaxPoolNd, nn.modules.pooling._LPPoolNd,
    nn.modules.padding._ConstantPadNd, nn.modules.padding._ReflectionPadNd, nn.modules.padding._ReplicationPadNd,
    nn.modules.padding._CircularPadNd, nn.Sequential, nn.ModuleList, nn.ModuleDict,
)  # fmt: skip

_NOT_CONVERTED = "only Conv2d and Linear layers and the outputs of ReLU and ReLU6 are quantised"
#: Name of the container that holds the activation quantisers of a traced model.
_ACT, _WEIGHT = "act_quant", "weight_quant"


@dataclass(frozen=True)
class QuantInfo:
    """What :func:`quantize` did: enough to do it again and to report it."""

    weight_bits: int
    act_bits: int
    model: dict[str, Any] | None
    """How the float model was built (:func:`adadfq.models.build.model_spec`), or None if unknown."""
    report: Report


def quantize(model: nn.Module, weight_bits: int = 4, act_bits: int = 4) -> nn.Module:
    """A copy of `model` with quantised weights and activations; the original is untouched.

    Every Conv2d and Linear weight is quantised per output channel, every output of ReLU and ReLU6 (module, function or
    method; each call has a range of its own) per tensor. State_dict keys of everything that the forward pass reaches
    are those of the float model. The activation quantisers start out calibrating: run a few forwards, or train, then
    freeze them (:func:`adadfq.nn.set_calibrating`).

    The model is traced by torch.fx in eval mode, so control flow that depends on ``training`` is settled for
    evaluation, and branches not reached then are absent from the copy. A model that cannot be traced has its modules
    swapped instead, with a warning: functional activations and convolutions then stay in float. :func:`report` lists
    everything that was and was not quantised.

    Args:
        model: float network with finite weights.
        weight_bits: 2..8.
        act_bits: 2..8.

    Returns:
        The quantised copy, on the same device, in the train or eval mode of `model`. A ``torch.fx.GraphModule`` where
        tracing succeeded.

    Raises:
        InvalidInputError: bits out of range, not a module, already quantised, nothing to quantise, uninitialised lazy
            modules, NaN or infinite weights, or a forward pre-hook on a layer (weight_norm, spectral_norm and prune
            are made of them), which the copy would lose.
    """
    checks.check_bits("weight_bits", weight_bits)
    checks.check_bits("act_bits", act_bits)
    _check_model(model)
    training = model.training
    float_copy = copy.deepcopy(model).eval()
    try:
        graph = trace(float_copy)
    except Exception as error:  # tracing runs the model's own code, which may raise anything
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        warnings.warn(
            f"{type(model).__name__} cannot be traced by torch.fx ({reason}); its modules are swapped instead and "
            "functional activations stay in float: see adadfq.report()",
            stacklevel=2,
        )
        student, rows = _swap_modules(float_copy, weight_bits, act_bits, reason)
        method = "module swap"
    else:
        student, rows = _rewrite(float_copy, graph, weight_bits, act_bits)
        method = "torch.fx"
    if not any(isinstance(module, (QuantConv2d, QuantLinear, QuantWeight)) for module in student.modules()):
        raise InvalidInputError(f"{type(model).__name__} has no Conv2d or Linear layer to quantise")
    # Not the whole student: its parts may be on several devices.
    device = next(student.parameters()).device
    for act in activations(student).values():
        act.to(device)
    if not activations(student):
        warnings.warn(
            f"{type(model).__name__} has no ReLU or ReLU6: only its weights are quantised, activations stay in float",
            stacklevel=2,
        )
    _attach(student, QuantInfo(weight_bits, act_bits, model_spec(model), Report(tuple(rows), method)))
    return student.train(training)


def report(model: nn.Module) -> Report:
    """What `model` quantises and what it leaves in float, and why.

    For a model made by :func:`quantize`, its record with the present bits; for any other, its modules as they stand.
    """
    info = quantized_info(model)
    if info is None:
        rows = [_module_row(name, module) for name, module in model.named_modules()]
        return Report(tuple(row for row in rows if row is not None), "modules as they stand")
    bits = module_bits(model)
    return replace(info.report, rows=tuple(_present(row, bits) for row in info.report.rows))


def _present(row: ReportRow, bits: Mapping[str, int]) -> ReportRow:
    """`row` with the width its quantiser has now."""
    if not row.quantizer:
        return row
    if row.quantizer not in bits:
        return replace(row, bits=None, reason="its quantiser was replaced after quantize()", quantizer="")
    return replace(row, bits=bits[row.quantizer])


def is_as_quantized(model: nn.Module) -> bool:
    """Whether `model` came from :func:`quantize` and still has exactly the quantisers it was given there."""
    info = quantized_info(model)
    return info is not None and set(module_bits(model)) == {r.quantizer for r in info.report.rows if r.quantizer}


def module_bits(model: nn.Module) -> dict[str, int]:
    """Width of every quantising module of `model`, by path."""
    return {
        name: module.act_bits if isinstance(module, QuantAct) else module.weight_bits
        for name, module in model.named_modules()
        if isinstance(module, QUANTIZING)
    }


def set_module_bits(model: nn.Module, bits: Mapping[str, int]) -> None:
    """Set the width of quantising modules by path, as :func:`module_bits` gives them.

    Ranges of activations stay, and those that given or learned steps span (their `set_bits`).

    Raises:
        InvalidInputError: a path that is no quantising module, or bits out of range; nothing is changed.
    """
    known = module_bits(model)
    for name, value in bits.items():
        if name not in known:
            raise InvalidInputError(f"{name!r} is not a quantising module of the model")
        checks.check_bits(f"bits of {name}", value)
    for name, value in bits.items():
        model.get_submodule(name).set_bits(value)


def quantized_info(model: nn.Module) -> QuantInfo | None:
    """The record :func:`quantize` left on `model`; None for a model it did not make."""
    store = model.meta if isinstance(model, fx.GraphModule) else vars(model)
    info = store.get("adadfq_info")
    return info if isinstance(info, QuantInfo) else None


def _attach(model: nn.Module, info: QuantInfo) -> None:
    # GraphModule.__deepcopy__ keeps `meta` but drops plain attributes.
    if isinstance(model, fx.GraphModule):
        model.meta["adadfq_info"] = info
    else:
        model.adadfq_info = info


def _check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise InvalidInputError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    for name, module in model.named_modules():
        if isinstance(module, QUANTIZING):
            raise InvalidInputError(f"model is already quantised ({name} is a {type(module).__name__})")
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise InvalidInputError(f"{name} is not initialised: run one forward of the float model first")
    for name, module in model.named_modules():
        hooked = module._forward_hooks or module._forward_pre_hooks
        if hooked and isinstance(module, tuple(_LAYERS)) and module._forward_pre_hooks:
            raise InvalidInputError(
                f"{name or type(module).__name__} has a forward pre-hook, which the quantised copy would lose: make "
                "it permanent (weight_norm, spectral_norm and prune are such hooks) or remove it"
            )
        if hooked and (isinstance(module, tuple(_LAYERS)) or not name):
            warnings.warn(f"forward hooks of {name or type(module).__name__} are absent from the copy", stacklevel=3)
    tensors = checks.learned_tensors(model)
    if bad := [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]:
        more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
        raise InvalidInputError(f"weights must be finite, got NaN or infinity in {', '.join(bad[:5])}{more}")


def _module_row(path: str, module: nn.Module) -> ReportRow | None:
    """The row of a model that stands as its maker placed it; None if nobody would look for it there."""
    kind = type(module).__name__
    if isinstance(module, QuantAct):
        return ReportRow(path, kind, module.act_bits, quantizer=path)
    if isinstance(module, (QuantConv2d, QuantLinear, QuantWeight)):
        return ReportRow(path, kind, module.weight_bits, quantizer=path)
    if isinstance(module, _RELU_MODULES):
        return ReportRow(path, kind, None, "quantised only where a QuantAct follows it")
    if type(module) in _LAYERS:
        return ReportRow(path, kind, None, f"a float layer; Quant{kind} takes its place")
    return _float_row(path, module)


def _float_row(path: str, module: nn.Module) -> ReportRow | None:
    """The row of a module that is not converted; None for containers, pooling, norms and the like."""
    if isinstance(module, _NEUTRAL_MODULES):
        return None
    layer = isinstance(module, tuple(_LAYERS))
    weighted = any(p.dim() > 1 for p in module.parameters(recurse=False))
    own_forward = type(module).__module__.startswith("torch.nn") and not list(module.children())
    if not (layer or weighted or own_forward):
        return None
    reason = _NOT_CONVERTED
    if type(module) in _LAYERS:
        reason = "part of a module that is called as a whole"
    elif layer:
        reason = f"a subclass of {'Conv2d' if isinstance(module, nn.Conv2d) else 'Linear'} may compute anything"
    return ReportRow(path, type(module).__name__, None, reason)


class _Proxy(fx.Proxy):
    """Records ``x += y`` and its like as what they are; torch.fx takes them for ``x = x + y``."""


def _recorded(function: Any) -> Any:
    def method(self: _Proxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return method


for _name in ("iadd", "isub", "imul", "itruediv"):
    setattr(_Proxy, f"__{_name}__", _recorded(getattr(operator, _name)))


class _Tracer(fx.Tracer):
    """Symbolic tracing that records, for every call, the module it is made in; quantising modules stay whole."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, QUANTIZING) or super().is_leaf_module(module, name)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        stack = list(getattr(self, "module_stack", {}).values())
        node.meta["adadfq_caller"] = str(stack[-1][0]) if stack else ""
        return node


def trace(model: nn.Module) -> fx.Graph:
    """The calls that `model` makes, a graph of its own; raises whatever the model's code does on symbolic values."""
    if not isinstance(model, fx.GraphModule):
        return _Tracer().trace(model)
    graph = fx.Graph()
    graph.output(graph.graph_copy(model.graph, {}))
    return graph


def _location(node: fx.Node) -> str:
    if node.op == "call_module":
        return str(node.target)
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    caller = node.meta.get("adadfq_caller", "")
    return f"{caller}: {name}()" if caller else f"{name}()"


def _function_name(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


def is_relu(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether `node` calls ReLU or ReLU6, as a module, function or method."""
    if node.op == "call_module":
        return isinstance(modules[str(node.target)], _RELU_MODULES)
    if node.op == "call_function":
        return node.target in _RELU_FUNCTIONS
    return node.op == "call_method" and node.target in _RELU_METHODS


def is_inplace(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether `node` writes into a tensor it is given."""
    if node.op == "call_module":
        return bool(getattr(modules.get(str(node.target)), "inplace", False))
    if node.op not in ("call_function", "call_method"):
        return False
    name = _function_name(node)
    if (name.endswith("_") and not name.endswith("__")) or name in _INPLACE_CALLS or "out" in node.kwargs:
        return True
    position = 1  # relu(input, inplace)
    written = node.kwargs.get("inplace", is_relu(node, modules) and len(node.args) > position and node.args[position])
    return bool(written)


def _is_alias(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    if node.op == "call_module":
        # Quantisers put in so far are not among the modules, and give a tensor of their own.
        return type(modules.get(str(node.target))).__name__ in _ALIASING_CALLS
    return node.op in ("call_function", "call_method") and _function_name(node) in _ALIASING_CALLS


def _read_through_alias(activation: fx.Node, source: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether a tensor that shares memory with `source` is read after the in-place `activation` on it."""
    root = source
    while _is_alias(root, modules) and root.all_input_nodes:
        root = root.all_input_nodes[0]
    family, open_ends = {root}, [root]
    while open_ends:
        for user in open_ends.pop().users:
            if user is not activation and user not in family and _is_alias(user, modules):
                family.add(user)
                open_ends.append(user)
    family.discard(source)
    return any(activation < user and user not in family for member in family for user in member.users)


class _Rewriter:
    """Puts quantisers into a traced graph and writes the report as it goes."""

    def __init__(self, root: nn.Module, graph: fx.Graph, weight_bits: int, act_bits: int) -> None:
        self.root, self.graph = root, graph
        self.weight_bits, self.act_bits = weight_bits, act_bits
        self.modules = dict(root.named_modules())
        self.rows: list[ReportRow] = []
        self.converted: dict[nn.Module, nn.Module] = {}
        for name in (_ACT, _WEIGHT):
            if hasattr(root, name):
                raise InvalidInputError(f"the model has an attribute {name!r}, which adadfq needs; rename it")
        self.acts, self.weights = nn.ModuleList(), nn.ModuleList()

    def run(self) -> tuple[fx.GraphModule, list[ReportRow]]:
        for node in list(self.graph.nodes):
            if node.op == "call_module":
                self._module(node)
            elif node.op in ("call_function", "call_method"):
                self._function(node)
        for name, container in ((_ACT, self.acts), (_WEIGHT, self.weights)):
            if len(container):
                self.root.add_module(name, container)
        student = fx.GraphModule(self.root, self.graph, type(self.root).__name__)
        self._unreached(student)
        return student, self.rows

    def _module(self, node: fx.Node) -> None:
        path = str(node.target)
        module = self.modules[path]
        if type(module) in _LAYERS:
            if module not in self.converted:
                self.converted[module] = _converted_layer(module, self.weight_bits)
                self.rows.append(ReportRow(path, type(module).__name__, self.weight_bits, quantizer=path))
            self.root.set_submodule(path, self.converted[module])
        elif isinstance(module, _RELU_MODULES):
            self._quantise_output(node, type(module).__name__)
        else:
            # A leaf may hold others (nn.MultiheadAttention): each of them is looked at.
            for inner, child in module.named_modules(prefix=path):
                row = _float_row(inner, child)
                if row is not None and all(r.where != inner for r in self.rows):
                    self.rows.append(row)

    def _function(self, node: fx.Node) -> None:
        name = _function_name(node)
        if is_relu(node, self.modules):
            self._quantise_output(node, name)
        elif node.op == "call_function" and node.target in _WEIGHT_FUNCTIONS:
            self._quantise_weight(node, name)
        elif name not in _NEUTRAL_CALLS:
            self.rows.append(ReportRow(_location(node), name, None, _NOT_CONVERTED))

    def _quantise_output(self, node: fx.Node, kind: str) -> None:
        # In place, later readers of the input see the activation's output: they must see the quantised one.
        stale = [node]
        if is_inplace(node, self.modules):
            stale.append(node.args[0] if node.args else node.kwargs["input"])
            if _read_through_alias(node, stale[1], self.modules):
                reason = "works in place on a tensor that is read under another name later; that reader sees float"
                self.rows.append(ReportRow(_location(node), kind, None, reason))
        readers = [n for source in stale for n in source.users if node < n]
        target = f"{_ACT}.{len(self.acts)}"
        self.acts.append(QuantAct(self.act_bits))
        with self.graph.inserting_after(node):
            quantised = self.graph.create_node("call_module", target, (node,), {})
        for reader in readers:
            for source in stale:
                reader.replace_input_with(source, quantised)
        self.rows.append(ReportRow(_location(node), kind, self.act_bits, quantizer=target))

    def _quantise_weight(self, node: fx.Node, kind: str) -> None:
        weight = node.args[1] if len(node.args) > 1 else node.kwargs.get("weight")
        if not (isinstance(weight, fx.Node) and weight.op == "get_attr"):
            reason = "its weight is computed in the forward pass, not a parameter"
            self.rows.append(ReportRow(_location(node), kind, None, reason))
            return
        target = f"{_WEIGHT}.{len(self.weights)}"
        self.weights.append(QuantWeight(self.weight_bits))
        with self.graph.inserting_before(node):
            quantised = self.graph.create_node("call_module", target, (weight,), {})
        node.replace_input_with(weight, quantised)
        self.rows.append(ReportRow(str(weight.target), kind, self.weight_bits, quantizer=target))

    def _unreached(self, student: fx.GraphModule) -> None:
        kept = {name for name, _ in student.named_parameters(remove_duplicate=False)}
        for path, module in self.modules.items():
            names = [n for n, _ in module.named_parameters(prefix=path, recurse=False)]
            if names and not kept.intersection(names):
                reason = "not reached by the forward pass in eval mode; absent from the quantised model"
                self.rows.append(ReportRow(path, type(module).__name__, None, reason))


def _rewrite(
    root: nn.Module, graph: fx.Graph, weight_bits: int, act_bits: int
) -> tuple[fx.GraphModule, list[ReportRow]]:
    return _Rewriter(root, graph, weight_bits, act_bits).run()


def _converted_layer(module: nn.Module, weight_bits: int) -> nn.Module:
    """The quantised layer around the very parameters of `module`, so that those tied to other layers stay tied."""
    layer = _LAYERS[type(module)].without_parameters(module, weight_bits)
    layer.weight, layer.bias = module.weight, module.bias
    return layer.train(module.training)


def _swap_modules(
    root: nn.Module, weight_bits: int, act_bits: int, why_untraced: str
) -> tuple[nn.Module, list[ReportRow]]:
    """Replace layers and ReLU modules where they stand; a ReLU module called twice has one range for both calls."""
    unseen = f"unseen: not traceable ({why_untraced}); nor is an in-place activation whose result is dropped quantised"
    rows = [ReportRow("functions called in forward", "?", None, unseen)]
    replaced: dict[nn.Module, nn.Module] = {}
    for path, module in list(root.named_modules(remove_duplicate=False)):
        new = replaced.get(module)
        if new is None:
            kind = type(module).__name__
            if type(module) in _LAYERS:
                new = _converted_layer(module, weight_bits)
                rows.append(ReportRow(path, kind, weight_bits, quantizer=path))
            elif isinstance(module, _RELU_MODULES):
                new = nn.Sequential(module, QuantAct(act_bits))
                rows.append(ReportRow(path, kind, act_bits, quantizer=f"{path}.1"))
            else:
                row = _float_row(path, module)
                rows.extend([row] if row is not None else [])
                continue
            replaced[module] = new
        if not path:
            root = new
        else:
            root.set_submodule(path, new)
    return root, rows
