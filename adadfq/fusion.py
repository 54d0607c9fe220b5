"""fuse(): the same network in fewer passes over memory, through torch.fx; unfuse(): back."""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from adadfq import fused_layers
from adadfq.convert import is_inplace, is_relu, module_bits, trace
from adadfq.errors import InvalidInputError
from adadfq.nn import QuantAct, QuantConv2d, QuantLinear

__all__ = ["fuse", "is_fused", "unfuse", "with_features"]

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_ADD_FUNCTIONS = {operator.add, operator.iadd, torch.add}
_ADD_METHODS = {"add", "add_", "__add__", "__iadd__"}
#: Functions and methods that make a BatchNorm's output nonlinear.
_ACTIVATIONS = frozenset(
    """
    mul imul sigmoid tanh silu gelu mish elu selu celu prelu rrelu leaky_relu softplus hardswish hardsigmoid hardtanh
    logsigmoid relu relu6 clamp clip
    """.split()
)
#: What may stand between the layer that gives the logits and the network's output.
_SHAPING = {"flatten", "view", "reshape", "squeeze", "contiguous"}
_SHAPING_MODULES = (nn.Flatten, nn.Identity, nn.Dropout)
#: Where a fused teacher collects its losses, and where the module that was fused is kept.
_WATCH, _ORIGINAL = "batch_norm_watch", "adadfq_unfused"


def fuse(model: nn.Module) -> fx.GraphModule:
    """`model` with its layers in fewer passes over memory: the same function, up to rounding, on the same tensors.

    A quantised network (:func:`adadfq.quantize`): every BatchNorm in inference form with what follows it of residual
    addition, ReLU or ReLU6 and activation quantiser is one operation, and the weights of all layers are quantised by
    one call a forward. A float network, as a teacher: every BatchNorm gives the loss of its batch statistics in the
    pass that normalises (:class:`adadfq.game.BatchNormMatch` collects them; else they are not computed), with residual
    addition and activation, which keep nothing more for the backward; nor do frozen convolutions keep their input.

    The result shares the layers, parameters and buffers of `model`: training one trains the other, and state_dict keys
    are the same. Move, cast and save `model`, not the result. Control flow that depends on ``training`` is settled for
    evaluation; BatchNorms in train mode run one by one. Layers with hooks stay as they are, so that the hooks are
    called; hooks put on fused layers later are not. Gradients are first order.

    Args:
        model: traceable by torch.fx.

    Returns:
        The fused network; :func:`unfuse` gives `model` back.

    Raises:
        InvalidInputError: not a module, already fused, not traceable, or with hooks on the network itself or on a block
            of it, which would be lost.
    """
    if not isinstance(model, nn.Module):
        raise InvalidInputError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if is_fused(model):
        raise InvalidInputError("model is already fused")
    return _rewritten(model, _StudentFuser if module_bits(model) else _TeacherFuser)


def with_features(
    teacher: nn.Module, student: nn.Module, fuse: bool = True
) -> tuple[fx.GraphModule, fx.GraphModule, list[str]]:
    """Both networks returning ``(logits, features)``: the outputs of their blocks beside the logits, for matching.

    A block ends where a residual is added, after the ReLU or ReLU6 behind it if there is one, and at BatchNorms
    without activation (the linear bottlenecks of MobileNetV2). A network without such places gives what follows all
    its BatchNorms.
    Of the student they are the quantised ones. See :func:`fuse` for what the results share with the models.

    Args:
        teacher: float network.
        student: its quantised copy.
        fuse: in few passes over memory too.

    Returns:
        The teacher, the student, and the names of the BatchNorm layers that the features follow, in their order.

    Raises:
        InvalidInputError: as :func:`fuse`, or the two networks have no such place in common.
    """
    networks = [unfuse(model) if is_fused(model) else model for model in (teacher, student)]
    tappers = [_Tapper(network, _traced(network)) for network in networks]
    for tapper in tappers:
        tapper.rewrite()
    known = set(tappers[1].results)
    names = [name for name in tappers[0].block_ends() if name in known]
    if not names:
        raise InvalidInputError(
            f"{type(teacher).__name__} has no BatchNorm followed by something that its student has too: there is no "
            "block output to match"
        )
    kinds = (_TeacherFuser, _StudentFuser) if fuse else (_Tapper, _Tapper)
    tapped = [_rewritten(network, kind, names) for network, kind in zip(networks, kinds, strict=True)]
    return tapped[0], tapped[1], names


def _traced(model: nn.Module) -> fx.Graph:
    modes = {module: module.training for module in model.modules()}
    try:
        graph = trace(model.eval())
    except Exception as error:  # tracing runs the model's own code, which may raise anything
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InvalidInputError(f"{type(model).__name__} cannot be traced by torch.fx ({reason})") from error
    finally:
        for module, training in modes.items():
            module.training = training
    _refuse_hooks(model, graph)
    return graph


def _rewritten(model: nn.Module, fuser: type[_Fuser], features: Sequence[str] = ()) -> fx.GraphModule:
    fused = fuser(model, _traced(model)).run(features)
    type(fused).__reduce__ = _refuse_to_be_saved  # every graph module has a class of its own
    fused.meta = {**getattr(model, "meta", {}), _ORIGINAL: model}
    fused.training = model.training
    return fused


def unfuse(model: nn.Module) -> nn.Module:
    """The network that :func:`fuse` was given: its modules one by one, on the same tensors.

    Raises:
        InvalidInputError: `model` is not fused.
    """
    if not is_fused(model):
        raise InvalidInputError(f"model must come from adadfq.fuse(), got {type(model).__name__}")
    original = model.meta[_ORIGINAL]
    assert isinstance(original, nn.Module)
    return original


def _refuse_hooks(model: nn.Module, graph: fx.Graph) -> None:
    """Refuse hooks of modules that the graph does not call: they would be lost."""
    called = tuple(f"{node.target}." for node in graph.nodes if node.op == "call_module")
    entered = [""] if isinstance(model, fx.GraphModule) else [name for name, _ in model.named_modules()]
    for name in entered:
        if _has_hooks(model.get_submodule(name)) and not f"{name}.".startswith(called):
            raise InvalidInputError(f"{name or type(model).__name__} has hooks, which the fused network would lose")


def _refuse_to_be_saved(model: nn.Module) -> Any:
    raise InvalidInputError("a fused network cannot be saved: save adadfq.unfuse(model), or its state_dict")


def is_fused(model: nn.Module) -> bool:
    """Whether `model` came from :func:`fuse`."""
    return isinstance(model, fx.GraphModule) and _ORIGINAL in model.meta


class _Fuser(ABC):
    """Rewrites a traced graph; modules are passed to the functions of `fused_layers` through get_attr nodes."""

    def __init__(self, model: nn.Module, graph: fx.Graph) -> None:
        self.model, self.graph = model, graph
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.attributes: dict[str, fx.Node] = {}
        #: What follows a BatchNorm, by its name: the node that gives the result, of its last call.
        self.results: dict[str, fx.Node] = {}
        self.first = next(node for node in graph.nodes if node.op != "placeholder")

    def run(self, features: Sequence[str] = ()) -> fx.GraphModule:
        """The rewritten network; with `features`, it returns (logits, what follows these BatchNorms)."""
        self.rewrite()
        if features:
            output = next(node for node in self.graph.nodes if node.op == "output")
            output.args = ((output.args[0], [self.block_end(self.results[name]) for name in features]),)
        self.graph.lint()
        targets = {str(node.target) for node in self.graph.nodes if node.op in ("get_attr", "call_module")}
        root = {target: self.modules.get(target) or operator.attrgetter(target)(self.model) for target in targets}
        fused = fx.GraphModule(root, self.graph, type(self.model).__name__)
        # What the forward pass does not reach is not fused, but belongs to the state_dict.
        reached = {name for name, _ in fused.named_modules(remove_duplicate=False)}
        for name, module in self.modules.items():
            if name not in reached and name.rpartition(".")[0] in reached:
                fused.add_submodule(name, module)
                reached |= {f"{name}.{inner}" for inner, _ in module.named_modules(remove_duplicate=False)}
        for name, module in self.modules.items():
            if (container := fused.get_submodule(name)) is not module:
                _share_tensors(module, container)
        return fused

    def block_end(self, result: fx.Node) -> fx.Node:
        """`result`, or the sum of it and a residual where nothing else reads it."""
        user = _only_user(result)
        return user if user is not None and _sum_of(user) is not None else result

    @abstractmethod
    def rewrite(self) -> None:
        """Rewrite the graph."""

    def called(self, node: Any, *kinds: type[nn.Module]) -> nn.Module | None:
        """The module that `node` calls on one argument, if it is of exactly one of `kinds` and without hooks."""
        if not isinstance(node, fx.Node) or node.op != "call_module" or len(node.args) != 1 or node.kwargs:
            return None
        module = self.modules.get(str(node.target))
        if type(module) not in kinds or _has_hooks(module):
            return None
        return module

    def norm(self, node: Any) -> bool:
        """Whether `node` calls a BatchNorm whose inference form is an affine map."""
        module = self.called(node, *_NORMS)
        return module is not None and module.running_mean is not None

    def attribute(self, path: str) -> fx.Node:
        """A node that gives the module at `path`, made once."""
        if path not in self.attributes:
            with self.graph.inserting_before(self.first):
                self.attributes[path] = self.graph.create_node("get_attr", path)
        return self.attributes[path]

    def at_start(self, function: Any, paths: list[str]) -> fx.Node:
        """A call of `function` on the list of modules at `paths`, before everything else."""
        modules = [self.attribute(path) for path in paths]
        with self.graph.inserting_before(self.first):
            return self.graph.call_function(function, (modules,))

    def item(self, node: fx.Node, *indices: int) -> fx.Node:
        with self.graph.inserting_before(self.first):
            for index in indices:
                node = self.graph.call_function(operator.getitem, (node, index))
        return node

    def replace(self, nodes: list[fx.Node], function: Any, *args: Any) -> fx.Node:
        """Put a call of `function` in place of `nodes`, each of which but the last only the next one reads."""
        with self.graph.inserting_before(nodes[-1]):
            new = self.graph.call_function(function, args)
        nodes[-1].replace_all_uses_with(new)
        for node in reversed(nodes):
            if node is self.first:
                self.first = node.next
            self.graph.erase_node(node)
        return new

    def gives_logits(self, node: fx.Node) -> bool:
        """Whether the network returns what `node` gives, perhaps in another shape."""
        if len(node.users) != 1:
            return False
        user = _only_user(node)
        if user.op == "output":
            return True
        if user.op == "call_module":
            shaping = isinstance(self.modules.get(str(user.target)), _SHAPING_MODULES)
        else:
            name = user.target if isinstance(user.target, str) else getattr(user.target, "__name__", "")
            shaping = name in _SHAPING
        return shaping and self.gives_logits(user)

    def tail(self, norm: fx.Node) -> tuple[list[fx.Node], fx.Node | None, str, fx.Node | None]:
        """(the nodes, residual, activation, quantiser) from `norm` on, as far as nothing else reads what is between."""
        tail, residual = [norm], None
        user = _only_user(norm)
        if user is not None and (terms := _sum_of(user)) is not None:
            other = terms[1] if terms[0] is norm else terms[0]
            # Written into the other term, the sum is what that term's readers, aliases among them, are to see.
            written = terms[0] is not norm and is_inplace(user, self.modules)
            # Only with an activation behind it is an addition more than a pass of its own.
            act = _only_user(user)
            if other is norm or written or act is None or self.act(act) is None:
                return tail, None, "none", None
            if self.writes_between(norm, act, [user]):
                return tail, None, "none", None
            tail, residual = [norm, user], other
        act = _only_user(tail[-1])
        if act is None or (name := self.act(act)) is None or self.writes_between(norm, act, tail):
            return tail, residual, "none", None
        tail.append(act)
        quantizer = _only_user(act)
        if quantizer is None or self.called(quantizer, QuantAct) is None or self.writes_between(act, quantizer, []):
            return tail, residual, name, None
        return [*tail, quantizer], residual, name, self.attribute(str(quantizer.target))

    def act(self, node: fx.Node) -> str | None:
        """Name of the activation that `node` applies to one argument."""
        if len(node.all_input_nodes) != 1 or not is_relu(node, self.modules):
            return None
        if node.op != "call_module":
            return "relu6" if node.target is torch.nn.functional.relu6 else "relu"
        module = self.called(node, nn.ReLU, nn.ReLU6)
        return None if module is None else "relu6" if type(module) is nn.ReLU6 else "relu"

    def writes_between(self, start: fx.Node, end: fx.Node, tail: list[fx.Node]) -> bool:
        """Whether something outside `tail` is written in place after `start` and before `end`.

        A fused tail reads everything where it ends: what is overwritten before then it would see too late.
        """
        node = start.next
        while node is not end and node.op != "output":
            if node not in tail and is_inplace(node, self.modules):
                return True
            node = node.next
        return False


class _StudentFuser(_Fuser):
    def rewrite(self) -> None:
        nodes = list(self.graph.nodes)
        self._tails(nodes)
        self._layers(nodes)

    def _tails(self, nodes: list[fx.Node]) -> None:
        all_norms = [node for node in nodes if self.norm(node)]
        norms = [node for node in all_norms if _is_affine(self.modules[str(node.target)])]
        self.results = {str(node.target): self.tail(node)[0][-1] for node in all_norms}
        if not norms:
            return
        paths = list(dict.fromkeys(str(node.target) for node in norms))
        folded = self.at_start(fused_layers.fold_batch_norms, paths)
        maps = {path: (self.item(folded, 0, i), self.item(folded, 1, i)) for i, path in enumerate(paths)}
        for node in norms:
            tail, residual, act, quantizer = self.tail(node)
            path = str(node.target)
            args = (node.args[0], self.attribute(path), *maps[path], residual, act, quantizer)
            self.results[path] = self.replace(tail, fused_layers.batch_norm_act_quantize, *args)

    def _layers(self, nodes: list[fx.Node]) -> None:
        calls = [node for node in nodes if self.called(node, QuantConv2d, QuantLinear) is not None]
        if not calls:
            return
        paths = list(dict.fromkeys(str(node.target) for node in calls))
        quantized = self.at_start(fused_layers.quantize_weights, paths)
        weights = {path: self.item(quantized, i) for i, path in enumerate(paths)}
        for node in calls:
            path = str(node.target)
            args = (node.args[0], self.attribute(path), weights[path], self.gives_logits(node))
            self.replace([node], fused_layers.quantized_layer, *args)


class _TeacherFuser(_Fuser):
    def rewrite(self) -> None:
        if hasattr(self.model, _WATCH):
            raise InvalidInputError(f"the model has an attribute {_WATCH!r}, which adadfq needs; rename it")
        self.modules[_WATCH] = fused_layers.BatchNormWatch()
        nodes = list(self.graph.nodes)
        norms = [node for node in nodes if self.norm(node)]
        self.modules[_WATCH].norms = [self.modules[str(node.target)] for node in norms]
        paths = [str(node.target) for node in norms if _is_affine(self.modules[str(node.target)])]
        paths = list(dict.fromkeys(paths))
        folded = self.at_start(fused_layers.inference_maps, paths) if paths else None
        maps = {path: self.item(folded, i) for i, path in enumerate(paths)}
        for node in norms:
            tail, residual, act, _ = self.tail(node)
            path = str(node.target)
            args = (node.args[0], self.attribute(path), self.attribute(_WATCH), maps.get(path), residual, act)
            self.results[path] = self.replace(tail, fused_layers.watched_batch_norm, *args)
        for node in nodes:
            if self.called(node, nn.Conv2d) is not None:
                self.replace([node], fused_layers.frozen_convolution, node.args[0], self.attribute(str(node.target)))
            elif self.called(node, nn.Linear) is not None and self.gives_logits(node):
                self.replace([node], fused_layers.float32_linear, node.args[0], self.attribute(str(node.target)))


class _Tapper(_Fuser):
    """Changes nothing, and finds where blocks end."""

    def rewrite(self) -> None:
        self._linear: list[str] = []
        self._added: list[str] = []
        residuals = []
        for node in self.graph.nodes:
            if not self.norm(node):
                continue
            tail, residual, act, _ = self.tail(node)
            path = str(node.target)
            if tail[-1] in self.results.values():  # the sum of two BatchNorms belongs to the first
                tail, residual, act = [node], None, "none"
            self.results[path] = tail[-1]
            if residual is not None:
                self._added.append(path)
                residuals.append(residual)
            elif act == "none" and not any(_is_activation(user, self.modules) for user in node.users):
                self._linear.append(path)
        # The BatchNorm of a shortcut ends no block.
        self._linear = [path for path in self._linear if self.results[path] not in residuals]

    def block_ends(self) -> list[str]:
        """BatchNorms after which blocks end, in the order of the graph."""
        ends = {*self._added, *self._linear} or set(self.results)
        return [path for path in self.results if path in ends]


def _is_activation(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Whether `node` calls an activation of torch.nn, whichever, or multiplies, as SiLU written out and gates do."""
    if node.op == "call_module":
        return type(modules.get(str(node.target))).__module__ == nn.modules.activation.__name__
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return name.strip("_") in _ACTIVATIONS


def _share_tensors(source: nn.Module, container: nn.Module) -> None:
    """Give `container`, made anew for the fused network, the tensors that `source` holds itself."""
    for name in set(container._buffers) - set(source._buffers):  # plain attributes that the graph reads
        value = container._buffers.pop(name)
        setattr(container, name, value)
    container._parameters.update(source._parameters)
    container._buffers.update(source._buffers)
    container._non_persistent_buffers_set |= source._non_persistent_buffers_set


def _is_affine(norm: Any) -> bool:
    return norm.weight is not None and norm.bias is not None


def _has_hooks(module: nn.Module | None) -> bool:
    return module is not None and bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _sum_of(node: fx.Node) -> tuple[Any, Any] | None:
    """The two terms of an addition of two nodes."""
    added = node.target in (_ADD_FUNCTIONS if node.op == "call_function" else _ADD_METHODS)
    if node.op not in ("call_function", "call_method") or not added or node.kwargs or len(node.args) != 2:
        return None
    first, second = node.args
    return (first, second) if isinstance(first, fx.Node) and isinstance(second, fx.Node) else None
