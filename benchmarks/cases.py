"""The registry: every case of the suite, as data. What a case computes is in :mod:`benchmarks.problems`.

A case is operator x variant x shape x dtype x layout x pass; backends and their rivals are the providers of a case
(:mod:`benchmarks.providers`). Shapes are those of real networks and named after the layers that have them; layers of
one network with equal shapes are one case that goes by the first one's name and is found under every name.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache

import torch

from adadfq.errors import InvalidInputError
from adadfq.ops.schema import OPERATORS as SCHEMA
from benchmarks.networks import NETWORKS, Layer, convolutions, layers

BATCHES = (16, 128)
DTYPES = ("float32", "bfloat16", "float16")
LAYOUTS = ("contiguous", "channels_last")
PASSES = ("forward", "backward", "both")
#: dtype -> the layer whose tensor has at least 256 MB in it, several times what a GPU's caches hold.
HUGE = {"float32": "resnet18@224.conv1/b128", "bfloat16": "mobilenetv2@224.features.2.conv.0.0/b128"}
#: Layers of ResNet-20, the first and one of the last, on whose tensors a kernel takes about as long as an empty one.
_LAUNCHES = ("resnet20@32.conv1/b16", "resnet20@32.layer3.0.conv1/b16")
#: Whose weights are packed.
_PACKED = "resnet18@224"
SUITES = ("quick", "judged", "gpu", "predicted", "full")
#: Batch x classes of the losses on logits.
LOGITS = ((16, 10), (16, 100), (16, 1000), (64, 100), (128, 10), (128, 1000), (256, 10), (256, 1000), (1024, 1000))
LOGIT_LOSSES = ("margin_loss", "entropy_distillation")
PACKING = ("quantize_pack", "unpack_dequantize")
#: Inputs of the generators' norms by image size, and whether LeakyReLU follows.
GENERATOR_NORMS = {
    size: (
        ("norm1", (128, size // 4, size // 4), False),
        ("norm2", (128, size // 2, size // 2), True),
        ("norm3", (64, size, size), True),
        ("image_norm", (3, size, size), False),
    )
    for size in (32, 224)
}
#: Of quantised tensors, and of packed codes.
BITS = 4
#: Name of the shape on which a call costs nothing but its overhead.
TINY = "tiny"

#: Operator -> the passes its cases have. A straight-through backward hands the gradient on: nothing to time alone.
OPERATORS: dict[str, tuple[str, ...]] = {
    "fake_quantize": PASSES,
    "fake_quantize_": ("forward",),
    "dynamic_fake_quantize": ("forward", "both"),
    "foreach_dynamic_fake_quantize": ("forward", "both"),
    "foreach_fake_quantize": PASSES,
    "observe_fake_quantize": ("forward", "both"),
    "affine_act_fake_quantize": PASSES,
    "affine_act_quantize": ("forward",),
    "quantize_pack": ("forward",),
    "unpack_dequantize": ("forward",),
    "bn_match": PASSES,
    "bn_match_forward": PASSES,
    "batch_norm_act": PASSES,
    "margin_loss": PASSES,
    "entropy_distillation": PASSES,
}


#: Operator -> that of its backward where the step size is learned: in variants that end in "_learned".
LEARNED = {
    "fake_quantize": "learned_fake_quantize_backward",
    "foreach_fake_quantize": "foreach_learned_fake_quantize_backward",
    "affine_act_fake_quantize": "affine_act_learned_fake_quantize_backward",
}


def backward_of(op: str, variant: str) -> str | None:
    """The operator of the backward of a case of `op`; None where it hands on, or scales, what the forward has found."""
    if variant.endswith("_learned"):
        return LEARNED[op]
    backward = f"{op}_backward"
    if backward not in SCHEMA or (op == "fake_quantize" and not variant.endswith("_clip")):
        return None
    return backward


@dataclass(frozen=True)
class Case:
    """One thing to time, whoever computes it."""

    op: str
    variant: str
    """What is told apart within an operator, such as "per_channel"."""
    where: str
    """Where the shape is from, such as "resnet18@224.layer3.0.conv1/b16"."""
    shapes: tuple[tuple[int, ...], ...]
    """Shape of the main tensor, of packed codes that of the tensor they stand for; of every tensor of a list."""
    dtype: str
    layout: str
    pass_: str
    also: tuple[str, ...] = ()
    """Every layer with these shapes."""

    @property
    def name(self) -> str:
        """Unique name, by which files are compared."""
        return "/".join((self.op, self.variant, self.where, self.dtype, self.layout, self.pass_))

    @property
    def aliases(self) -> Iterator[str]:
        """The name, and the names it would have after every other layer of these shapes."""
        yield self.name
        batch = self.where.partition("/")[2]
        for layer in self.also:
            where = f"{layer}/{batch}" if batch else layer
            yield "/".join((self.op, self.variant, where, self.dtype, self.layout, self.pass_))

    @property
    def numel(self) -> int:
        """Elements of the main tensor, or of all tensors of the list."""
        return sum(math.prod(shape) for shape in self.shapes)

    @property
    def nbytes(self) -> int:
        """Bytes of the main tensor, or of all tensors of the list."""
        return self.numel * self.torch_dtype.itemsize

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as PyTorch's."""
        return getattr(torch, self.dtype)

    @property
    def bytes_moved(self) -> int:
        """Bytes that any implementation must read and write at least, through memory that holds none of them before.

        Where the backward needs nothing that the forward has not read already, one pass over it does for both.

        Per-channel vectors are not counted. Straight-through backwards move nothing.
        """
        size = self.nbytes
        residual = "residual" in self.variant
        # Where no activation can be flat, x serves the parameters only and the residual's gradient is the gradient.
        affine_backward = 3 + 2 * residual
        if self.variant.startswith("none") and not self.variant.endswith("_learned"):
            affine_backward = 3 if self.variant.endswith("trained") else 2
        if self.op == "affine_act_quantize":  # codes of one byte
            return size * (1 + residual) + self.numel
        if self.op in PACKING:
            return size + -(-self.numel * BITS // 8)
        forward, backward, *both = {
            # x -> x_hat; grad, x -> dx, or nothing
            "fake_quantize": (2, 3 if self.variant.endswith(("clip", "learned")) else 0),
            "fake_quantize_": (2, 0),
            # a channel is in the cache when it is read for the second time
            "dynamic_fake_quantize": (2, 0),
            "foreach_dynamic_fake_quantize": (2, 0),
            "foreach_fake_quantize": (2, 3 if self.variant.endswith("learned") else 0),
            # the range of the whole tensor, then the tensor again
            "observe_fake_quantize": (3, 0),
            # x, residual -> y; grad, x, residual -> dx, dresidual
            "affine_act_fake_quantize": (2 + residual, affine_backward),
            # x -> scalar; x -> dx
            "bn_match": (1, 2),
            # x -> y; grad, x -> dx
            "bn_match_forward": (2, 3),
            # x, for the statistics, and again -> y; grad, x, for the sums, and again -> dx
            "batch_norm_act": (3, 5),
            # both logits -> scalars; both logits -> the gradients of both, or of the student's
            "margin_loss": (2, 4, 4),
            "entropy_distillation": (2, 3, 3),
        }[self.op]
        return size * {"forward": forward, "backward": backward, "both": sum(both) or forward + backward}[self.pass_]


def _by_shape(
    network: str, chosen: Iterable[Layer], key: Callable[[Layer], tuple[object, ...]]
) -> list[tuple[Layer, tuple[str, ...]]]:
    """First layer of every distinct `key`, and the names of all that share it."""
    groups: dict[object, list[Layer]] = {}
    for layer in chosen:
        groups.setdefault(key(layer), []).append(layer)
    return [(group[0], tuple(f"{network}.{layer.name}" for layer in group)) for group in groups.values()]


def _activation_cases(network: str) -> Iterator[Case]:
    def cases(
        layer: Layer, names: tuple[str, ...], op: str, variants: Iterable[str], passes: Iterable[str]
    ) -> Iterator[Case]:
        for batch in BATCHES:
            for variant in variants:
                for dtype in DTYPES:
                    for layout in LAYOUTS:
                        for pass_ in passes:
                            where = f"{names[0]}/b{batch}"
                            yield Case(op, variant, where, ((batch, *layer.output),), dtype, layout, pass_, names)

    found = convolutions(network)
    for layer, names in _by_shape(network, (layer for layer in found if layer.act != "none"), lambda la: la.output):
        scopes = ("per_tensor", "per_channel")
        yield from cases(layer, names, "fake_quantize", scopes, ("forward", "both"))
        parts = [f"{scope}_clip" for scope in scopes] + ["per_tensor_learned"]
        yield from cases(layer, names, "fake_quantize", parts, ("backward", "both"))
        yield from cases(layer, names, "fake_quantize_", scopes, ("forward",))
        yield from cases(layer, names, "observe_fake_quantize", ("per_tensor",), ("forward", "both"))
    for layer, names in _by_shape(network, found, lambda la: la.output):
        yield from cases(layer, names, "bn_match", ("-",), PASSES)
        yield from cases(layer, names, "bn_match_forward", ("-",), PASSES)
    for layer, names in _by_shape(network, found, lambda la: (la.output, la.act, la.residual)):
        variant = "_".join([layer.act, *(["residual"] if layer.residual else [])])
        yield from cases(layer, names, "affine_act_fake_quantize", (variant,), ("forward",))
        if layer.act != "none":  # linear bottlenecks are not quantised
            yield from cases(layer, names, "affine_act_quantize", (variant,), ("forward",))
        # "frozen": only x and the residual get a gradient; "trained": scale and shift too.
        parts = [f"{variant}_frozen", f"{variant}_trained"]
        if layer.act != "none":  # and the step of the quantiser
            parts.append(f"{variant}_learned")
        yield from cases(layer, names, "affine_act_fake_quantize", parts, ("backward", "both"))


def _weight_cases(network: str) -> Iterator[Case]:
    for layer, layer_names in _by_shape(network, layers(network), lambda la: la.weight):
        names = tuple(f"{name}.weight" for name in layer_names)
        for dtype in DTYPES:
            for layout in LAYOUTS if len(layer.weight) == 4 else LAYOUTS[:1]:

                def case(
                    op: str,
                    variant: str,
                    pass_: str,
                    shape: tuple[int, ...] = layer.weight,
                    dtype: str = dtype,
                    layout: str = layout,
                    names: tuple[str, ...] = names,
                ) -> Case:
                    return Case(op, variant, names[0], (shape,), dtype, layout, pass_, names)

                for pass_ in OPERATORS["dynamic_fake_quantize"]:
                    yield case("dynamic_fake_quantize", "axis0", pass_)
                yield case("fake_quantize", "axis0", "forward")
                yield case("fake_quantize_", "axis0", "forward")
                # Packing looks at no layout: what is not contiguous is copied first.
                if network == _PACKED and layout == "contiguous":
                    for op in PACKING:
                        yield case(op, "axis0", "forward")
    shapes = tuple(layer.weight for layer in layers(network))
    for dtype in DTYPES:
        for pass_ in OPERATORS["foreach_dynamic_fake_quantize"]:
            op = "foreach_dynamic_fake_quantize"
            yield Case(op, "axis0", f"{network}.weights", shapes, dtype, "contiguous", pass_)
        for pass_ in OPERATORS["foreach_fake_quantize"]:
            variant = "axis0" if pass_ == "forward" else "axis0_learned"
            yield Case("foreach_fake_quantize", variant, f"{network}.weights", shapes, dtype, "contiguous", pass_)


def _logit_cases() -> Iterator[Case]:
    for op in LOGIT_LOSSES:
        for batch, classes in LOGITS:
            for dtype in DTYPES:
                where = f"logits/b{batch}k{classes}"
                for pass_ in OPERATORS[op]:
                    yield Case(op, "-", where, ((batch, classes),), dtype, "contiguous", pass_)
                # With another gradient than the 1 of loss.backward(), for which multiplying can be left out.
                for pass_ in ("backward", "both"):
                    yield Case(op, "scaled", where, ((batch, classes),), dtype, "contiguous", pass_)


def _packed_tensor_cases() -> Iterator[Case]:
    """Packing with one scale, of a tensor of at least 256 MB and of a small one."""
    known = {f"{network}.{layer.name}": layer for network in NETWORKS for layer in convolutions(network)}
    for dtype, where in (*HUGE.items(), *((dtype, _LAUNCHES[1]) for dtype in HUGE)):
        layer, _, batch = where.partition("/b")
        for op in PACKING:
            shape = (int(batch), *known[layer].output)
            yield Case(op, "per_tensor", where, (shape,), dtype, "contiguous", "forward", (layer,))


def _generator_cases() -> Iterator[Case]:
    """The norms of both generators: plain ones, and class-conditional ones but for the last."""
    for size, norms in GENERATOR_NORMS.items():
        for name, shape, is_active in norms:
            variants = ["channel"] if name == "image_norm" else ["channel", "sample"]
            for batch in BATCHES if size == 32 else BATCHES[:1]:
                where = f"generator@{size}.{name}/b{batch}"
                for variant, dtype, layout in itertools.product(variants, DTYPES, LAYOUTS):
                    variant += "_leaky" if is_active else ""
                    for pass_ in OPERATORS["batch_norm_act"]:
                        yield Case("batch_norm_act", variant, where, ((batch, *shape),), dtype, layout, pass_)


def _tiny_cases() -> Iterator[Case]:
    """One call of every operator on next to no data: what Python, the framework and the dispatch cost."""
    variants = {
        "fake_quantize": "per_tensor",
        "fake_quantize_": "per_tensor",
        "dynamic_fake_quantize": "axis0",
        "foreach_dynamic_fake_quantize": "axis0",
        "foreach_fake_quantize": "axis0_learned",
        "observe_fake_quantize": "per_tensor",
        "affine_act_fake_quantize": "relu_residual_frozen",
        "affine_act_quantize": "relu_residual",
        **dict.fromkeys(PACKING, "per_tensor"),
        "batch_norm_act": "sample_leaky",
    }
    for op, passes in OPERATORS.items():
        pass_ = "both" if "both" in passes else "forward"
        shape = (2, 3) if op in LOGIT_LOSSES else (2, 3, 2, 2)
        yield Case(op, variants.get(op, "-"), TINY, (shape,), "float32", "contiguous", pass_)


@cache
def registry() -> tuple[Case, ...]:
    """Every case of the suite, by operator in the order of :data:`OPERATORS`."""
    found = [*_tiny_cases(), *_logit_cases(), *_packed_tensor_cases(), *_generator_cases()]
    for network in NETWORKS:
        found += [*_activation_cases(network), *_weight_cases(network)]
    order = list(OPERATORS)
    return tuple(sorted(found, key=lambda case: order.index(case.op)))


_QUICK = (
    "*/tiny/*",
    "fake_quantize*/per_channel*/resnet20@32.conv1/b16/float32/channels_last/*",
    "fake_quantize*/per_tensor/resnet18@224.layer1.0.conv1/b16/float32/contiguous/forward",
    "dynamic_fake_quantize/*/resnet18@224.layer3.0.conv2.weight/float32/contiguous/*",
    "foreach_dynamic_fake_quantize/*/resnet20@32.weights/float32/*/forward",
    "observe_fake_quantize/*/resnet20@32.conv1/b16/float32/contiguous/forward",
    "affine_act_fake_quantize/relu_residual*/resnet20@32.layer1.0.conv2/b16/float32/contiguous/*",
    "bn_match*/*/resnet20@32.conv1/b16/float32/contiguous/both",
    "batch_norm_act/*/generator@32.norm3/b16/float32/channels_last/both",
    "*/logits/b16k10/float32/*/both",
)

_LARGE = "resnet18@224.layer1.0.conv1/b128"  # 103 MB in float32, 51 MB in bfloat16
_SMALL = ("resnet20@32.layer3.0.conv1/b16", "resnet20@32.conv1/b16", "resnet18@224.layer3.0.conv1/b16")
_JUDGED = (
    *(
        f"fake_quantize{place}/{scope}/{_LARGE}/{dtype}/{layout}/forward"
        for place in ("", "_")
        for scope in ("per_tensor", "per_channel")
        for dtype in ("float32", "bfloat16")
        for layout in LAYOUTS
    ),
    # 64 kB - 4 MB
    *(
        f"fake_quantize{place}/{scope}/{where}/{dtype}/{layout}/forward"
        for place in ("", "_")
        for scope in ("per_tensor", "per_channel")
        for where in _SMALL
        for dtype in ("float32", "bfloat16")
        for layout in (LAYOUTS if where == _SMALL[1] else LAYOUTS[:1])
    ),
    *(
        f"fake_quantize{place}/axis0/resnet20@32.layer3.0.conv1.weight/float32/contiguous/forward"
        for place in ("", "_")
    ),
    "foreach_dynamic_fake_quantize/axis0/resnet18@224.weights/float32/contiguous/forward",
    *(
        f"affine_act_fake_quantize/relu_residual{part}/resnet18@224.layer1.0.conv2/{batch}/{dtype}/{layout}/{pass_}"
        for part, pass_ in (("", "forward"), ("_frozen", "backward"), ("_trained", "backward"))
        for batch, dtype, layout in (
            ("b16", "float32", "contiguous"),
            ("b16", "float32", "channels_last"),
            ("b16", "bfloat16", "contiguous"),
            ("b128", "float32", "contiguous"),
        )
    ),
    *(
        f"bn_match_forward/-/resnet18@224.layer1.0.conv1/{batch}/{dtype}/{layout}/both"
        for batch, dtype, layout in (
            ("b16", "float32", "contiguous"),
            ("b16", "float32", "channels_last"),
            ("b16", "bfloat16", "contiguous"),
            ("b128", "float32", "contiguous"),
        )
    ),
    *(
        f"batch_norm_act/{variant}_leaky/{where}/b16/{dtype}/channels_last/both"
        for variant in ("channel", "sample")
        for where in ("generator@32.norm2", "generator@32.norm3", "generator@224.norm3")
        for dtype in ("float32", "bfloat16")
    ),
    *(
        f"margin_loss/{variant}/logits/{size}/float32/contiguous/both"
        for variant in ("-", "scaled")
        for size in ("b16k10", "b16k1000", "b64k100", "b256k10", "b256k1000")
    ),
    "*/tiny/*",
)

#: dtype -> the activation after it.
HUGE_ACT = {"float32": "relu", "bfloat16": "relu6"}
_BOTH_LAYOUTS = tuple((dtype, layout) for dtype in HUGE for layout in LAYOUTS)
_ONE_LAYOUT = (("float32", "contiguous"), ("bfloat16", "contiguous"))
_THREE = (("float32", "contiguous"), ("float32", "channels_last"), ("bfloat16", "contiguous"))


def _huge(op: str, variant: str, pass_: str, places: Iterable[tuple[str, str]]) -> Iterator[str]:
    """Names of cases in these dtypes and layouts; ``{act}`` in `variant` is the layer's activation."""
    for dtype, layout in places:
        yield f"{op}/{variant.format(act=HUGE_ACT[dtype])}/{HUGE[dtype]}/{dtype}/{layout}/{pass_}"


def is_launch(where: str, pass_: str) -> bool:
    """Whether a case is so small that on a GPU its kernels are held against an empty launch."""
    return where.startswith("resnet20@32.") and where.endswith("/b16") and pass_ == "forward"


#: What the kernels are judged by on a GPU: few enough cases, each compiled by torch.compile, for a stage of gpu.sh.
_GPU = (
    *_huge("fake_quantize", "per_channel", "forward", _BOTH_LAYOUTS),
    *_huge("fake_quantize", "per_tensor", "forward", _ONE_LAYOUT),
    *_huge("affine_act_fake_quantize", "{act}", "forward", _THREE),
    *_huge("bn_match_forward", "-", "forward", _THREE),
    "foreach_dynamic_fake_quantize/axis0/resnet18@224.weights/float32/contiguous/forward",
    "foreach_dynamic_fake_quantize/axis0/resnet18@224.weights/bfloat16/contiguous/forward",
    "foreach_dynamic_fake_quantize/axis0/resnet50@224.weights/float32/contiguous/forward",
    *(
        f"{what}/{where}/float32/contiguous/forward"
        for what in ("fake_quantize/per_tensor", "affine_act_fake_quantize/relu", "bn_match/-")
        for where in _LAUNCHES
    ),
    *(f"{op}/per_tensor/{HUGE['float32']}/float32/contiguous/forward" for op in PACKING),
    *(f"{op}/axis0/resnet18@224.layer4.0.conv2.weight/float32/contiguous/forward" for op in PACKING),
    *(f"margin_loss/-/logits/{size}/float32/contiguous/forward" for size in ("b16k10", "b128k1000", "b1024k1000")),
    *_huge("fake_quantize_", "per_channel", "forward", _ONE_LAYOUT),
    *_huge("fake_quantize", "per_channel_clip", "backward", _ONE_LAYOUT),
    *_huge("affine_act_fake_quantize", "{act}_trained", "backward", _THREE[:2]),
    *_huge("affine_act_fake_quantize", "{act}_frozen", "backward", _THREE[2:]),
    *_huge("bn_match_forward", "-", "both", _THREE[:2]),
    *_huge("observe_fake_quantize", "per_tensor", "forward", _THREE[:1]),
    *(f"batch_norm_act/sample_leaky/generator@{size}.norm3/b16/float32/channels_last/both" for size in (32, 224)),
    *(f"margin_loss/-/logits/{size}/float32/contiguous/both" for size in ("b16k10", "b1024k1000")),
    "entropy_distillation/-/logits/b1024k1000/float32/contiguous/both",
    "*/tiny/*",
)

#: Suite -> the patterns of its cases; see README, "Benchmarks".
_PATTERNS = {"quick": _QUICK, "judged": _JUDGED, "gpu": _GPU, "full": ("*",)}


def select(suite: str, ops: Iterable[str] = (), filters: Iterable[str] = ()) -> list[Case]:
    """Cases of `suite`, of `ops` (all where empty) and with a name or alias that holds or matches every filter.

    A filter with ``*`` or ``?`` is a pattern of the whole name, any other is looked for anywhere in it.

    Raises:
        InvalidInputError: there is no such suite or operator, or nothing is left.
    """
    if suite not in SUITES:
        raise InvalidInputError(f"suite must be one of {', '.join(SUITES)}, got {suite!r}")
    ops, filters = list(ops), list(filters)
    if unknown := [op for op in ops if op not in OPERATORS]:
        raise InvalidInputError(f"ops must be among {', '.join(OPERATORS)}, got {', '.join(unknown)}")
    patterns = _predicted() if suite == "predicted" else _PATTERNS[suite]
    chosen = [
        case
        for case in registry()
        if (not ops or case.op in ops)
        and any(fnmatchcase(case.name, pattern) for pattern in patterns)
        and all(any(matches(name, text) for name in case.aliases) for text in filters)
    ]
    if not chosen:
        raise InvalidInputError(
            f"no case of suite {suite} fits ops {ops or 'all'} and filters {filters or 'none'}: "
            "see 'python -m benchmarks list', or take --suite full"
        )
    return chosen


def _predicted() -> tuple[str, ...]:
    """Names of the cases whose times on a GPU are predicted."""
    from benchmarks import predict

    return tuple(case.name for case in predict.chosen())


def matches(name: str, text: str) -> bool:
    """Whether a name fits a filter of :func:`select`."""
    return fnmatchcase(name, text) if "*" in text or "?" in text else text in name
