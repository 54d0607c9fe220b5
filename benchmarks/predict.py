"""How long the Triton and CUDA kernels should take on a GPU that is not there: an estimate, and no measurement.

Every operator is called as the backend calls it, on CPU tensors that nobody touches, and what it launches is compiled
for the GPU (:mod:`benchmarks.compiled`) or looked up in the module that nvcc built (:mod:`benchmarks.predict_cuda`).
Of a launch

    memory       = bytes of the tensors it reads and writes / (MEMORY_SHARE of the GPU's bandwidth)
    instructions = executed instructions / (ISSUE_SHARE of what its lanes execute)
    time         = max(memory, instructions) + LAUNCH_US

and a call takes the sum over its launches. Executed instructions are an estimate too (:mod:`benchmarks.sass`), and all
count alike, though some take several cycles. Caches, waiting and what autograd costs are not modelled: where there is
too little work to fill the GPU, as in the losses, only the launches are left.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adadfq.errors import InvalidInputError
from benchmarks import predict_cuda, sass
from benchmarks.cases import BITS, HUGE, HUGE_ACT, LAYOUTS, LOGIT_LOSSES, PACKING, Case, backward_of, registry


class Gpu(NamedTuple):
    """What a prediction needs to know."""

    title: str
    capability: int
    bytes_per_s: float
    multiprocessors: int
    hertz: float

    @property
    def lanes(self) -> int:
        """Threads that execute an instruction at a time."""
        return 128 * self.multiprocessors


BACKENDS = ("triton", "cuda")
#: Name -> GPU; clocks are the highest it holds.
GPUS = {"h200": Gpu("NVIDIA H200", 90, 4.8e12, 132, 1.755e9)}
#: What a plain copy gets of the bandwidth, and a kernel of independent instructions of the issue slots.
MEMORY_SHARE, ISSUE_SHARE = 0.92, 0.85
LAUNCH_US = 2.0
#: A launch that moves less than this share of the largest one's bytes costs its launch only.
MAIN_SHARE = 0.05
#: Kernels that go over all elements twice in one launch, the second time from a cache.
_TWO_PASSES = ("rows_kernel",)
#: Of a loss's launch: both phases in one.
_BOTH_PHASES = 3


def chosen() -> list[Case]:
    """Cases of at least 256 MB in both dtypes and layouts, a generator's largest, networks' weights, and the losses."""
    parts = [
        ("fake_quantize", "per_tensor", "forward"),
        ("fake_quantize", "per_channel", "forward"),
        ("fake_quantize", "per_channel_clip", "backward"),
        ("fake_quantize", "per_tensor_learned", "backward"),
        ("fake_quantize_", "per_channel", "forward"),
        ("observe_fake_quantize", "per_tensor", "forward"),
        ("affine_act_fake_quantize", "{act}", "forward"),
        ("affine_act_quantize", "{act}", "forward"),
        ("affine_act_fake_quantize", "{act}_frozen", "backward"),
        ("affine_act_fake_quantize", "{act}_trained", "backward"),
        ("affine_act_fake_quantize", "{act}_learned", "backward"),
        *((op, "-", pass_) for op in ("bn_match", "bn_match_forward") for pass_ in ("forward", "backward")),
    ]
    names = [
        f"{op}/{variant.format(act=HUGE_ACT[dtype])}/{HUGE[dtype]}/{dtype}/{layout}/{pass_}"
        for op, variant, pass_ in parts
        for dtype in HUGE
        for layout in LAYOUTS
    ]
    names += [
        f"batch_norm_act/sample_leaky/generator@224.norm3/b16/{dtype}/{layout}/{pass_}"
        for dtype in HUGE
        for layout in LAYOUTS
        for pass_ in ("forward", "backward")
    ]
    weights = "axis0/resnet18@224"
    for dtype in HUGE:
        names.append(f"dynamic_fake_quantize/{weights}.layer4.0.conv2.weight/{dtype}/contiguous/forward")
        names.append(f"foreach_dynamic_fake_quantize/{weights}.weights/{dtype}/contiguous/forward")
        names.append(f"foreach_dynamic_fake_quantize/axis0/resnet50@224.weights/{dtype}/contiguous/forward")
        names.append(f"foreach_fake_quantize/{weights}.weights/{dtype}/contiguous/forward")
        names.append(f"foreach_fake_quantize/axis0_learned/resnet18@224.weights/{dtype}/contiguous/backward")
        for op in PACKING:
            names.append(f"{op}/per_tensor/{HUGE[dtype]}/{dtype}/contiguous/forward")
            names.append(f"{op}/{weights}.layer4.0.conv2.weight/{dtype}/contiguous/forward")
    for op in LOGIT_LOSSES:  # the gradients come with the value
        names += [f"{op}/-/logits/{size}/float32/contiguous/both" for size in ("b16k10", "b1024k1000")]
    known = {name: case for case in registry() for name in case.aliases}
    return [known[name] for name in names]


def serves(backend: str, case: Case) -> bool:
    """Whether a backend has kernels for the operator of a case; Triton has none for packing, CUDA C++ no BatchNorm."""
    return case.op not in PACKING if backend == "triton" else case.op != "batch_norm_act"


def _call(case: Case) -> tuple[str, tuple[Any, ...]]:
    """Operator of the schema and arguments for it that hold nothing in particular."""
    forward, bits = case.pass_ != "backward", BITS

    def tensor(shape: tuple[int, ...] = case.shapes[0]) -> Tensor:
        layout = torch.channels_last if case.layout == "channels_last" else torch.contiguous_format
        return torch.empty(shape, dtype=case.torch_dtype, memory_format=layout)

    def vector(size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(size, dtype=dtype)

    def scalar(dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty((), dtype=dtype)

    x, channels = tensor(), case.shapes[0][1]
    int32, float64 = torch.int32, torch.float64
    if case.op in ("fake_quantize", "fake_quantize_"):
        scope = case.variant.removesuffix("_clip").removesuffix("_learned")
        axis = {"per_tensor": None, "per_channel": 1, "axis0": 0}[scope]
        size = 1 if axis is None else case.shapes[0][axis]
        args = (x, vector(size), vector(size, int32), bits, axis)
        return (case.op, args) if forward else (str(backward_of(case.op, case.variant)), (tensor(), *args))
    if case.op in PACKING:
        axis = {"per_tensor": None, "axis0": 0}[case.variant]
        size = 1 if axis is None else case.shapes[0][axis]
        quantizer = (vector(size), vector(size, int32), bits)
        if case.op == "quantize_pack":
            return case.op, (x, *quantizer, axis)
        packed = vector(-(-case.numel * bits // 8), torch.uint8)
        return case.op, (packed, *quantizer, list(case.shapes[0]), axis, case.torch_dtype)
    if case.op == "dynamic_fake_quantize":
        return case.op, (x, bits, 0)
    if case.op == "foreach_dynamic_fake_quantize":
        return case.op, ([tensor(shape) for shape in case.shapes], [bits] * len(case.shapes), 0)
    if case.op == "foreach_fake_quantize":
        quantizers = [[vector(shape[0], dtype) for shape in case.shapes] for dtype in (torch.float32, int32)]
        args = ([tensor(shape) for shape in case.shapes], *quantizers, [bits] * len(case.shapes), 0)
        if forward:
            return case.op, args
        return str(backward_of(case.op, case.variant)), ([tensor(shape) for shape in case.shapes], *args)
    if case.op == "observe_fake_quantize":
        state = (scalar(), scalar(), scalar(torch.int64), scalar(), scalar(int32))
        return case.op, (x, *state, bits, 0.9)
    if case.op in ("affine_act_fake_quantize", "affine_act_quantize"):
        act, has_residual = case.variant.partition("_")[0], "residual" in case.variant
        args = (x, vector(channels), vector(channels), tensor() if has_residual else None, act)
        if forward:
            step = (None, None) if act == "none" else (vector(1), vector(1, int32))
            return case.op, (*args, *step, bits)
        backward = str(backward_of(case.op, case.variant))
        if case.variant.endswith("_learned"):
            return backward, (tensor(), *args, vector(1), vector(1, int32), bits, has_residual, True)
        return backward, (tensor(), *args, has_residual, case.variant.endswith("trained"))
    if case.op in ("bn_match", "bn_match_forward"):
        running, found = (vector(channels), vector(channels)), (vector(channels, float64), vector(channels, float64))
        if case.op == "bn_match":
            return (case.op, (x, *running)) if forward else ("bn_match_backward", (scalar(), x, *found, *running))
        if forward:
            return case.op, (x, *running, vector(channels), vector(channels), 1e-5)
        return "bn_match_forward_backward", (tensor(), x, scalar(), *found, *running, vector(channels), 1e-5)
    if case.op == "batch_norm_act":
        form, _, act = case.variant.partition("_")
        shape = case.shapes[0][1:2] if form == "channel" else case.shapes[0][:2]
        settings = (torch.empty(shape), torch.empty(shape), 1e-5, 0.2 if act else 1.0)
        if forward:
            return case.op, (x, *settings)
        return "batch_norm_act_backward", (tensor(), x, vector(channels, float64), vector(channels, float64), *settings)
    if case.op == "margin_loss":
        labels = torch.empty(case.shapes[0][0], dtype=torch.int64)
        return case.op, (x, tensor(), labels, 0.3, 0.6, 0.2, 0.1, 0.7, False)
    if case.op == "entropy_distillation":
        return case.op, (x, tensor(), 5.0)
    raise InvalidInputError(f"predict has no arguments for {case.op}: add them to benchmarks/predict.py")


@contextmanager
def _backend() -> Iterator[dict[str, Callable[..., Any]]]:
    """The operators of the Triton backend, taking CPU tensors and asking for no GPU."""
    from adadfq.ops import triton

    if triton.INTERPRETED:
        raise InvalidInputError("predict compiles kernels: unset TRITON_INTERPRET")
    from adadfq.kernels import logit_losses

    before = triton.DEVICE_TYPE, triton._kernels, logit_losses._can_wait
    triton.DEVICE_TYPE = "cpu"
    triton._kernels = lambda family: importlib.import_module(f"adadfq.kernels.{family}")
    logit_losses._can_wait = lambda x: True  # as the GPU's programs can
    try:
        yield triton.KERNELS
    finally:
        triton.DEVICE_TYPE, triton._kernels, logit_losses._can_wait = before


def _triton_launches(op: str, args: tuple[Any, ...], gpu: Gpu) -> list[Any]:
    try:
        from benchmarks.compiled import compiling_for
    except ImportError as error:
        raise InvalidInputError(f"predict needs Triton and its NVIDIA tools ({error}): pip install triton") from error
    with _backend() as kernels, compiling_for(gpu.capability) as launches:
        kernels[op](*args)
        # The first call of a size of logits has a launch more than the others.
        launches.clear()
        kernels[op](*args)
    return launches


def _triton_instructions(launch: Any, case: Case) -> float:
    """Instructions of all threads for an element."""
    twice = launch.name in _TWO_PASSES or launch.options.get("PHASES") == _BOTH_PHASES
    passes = 2 if twice else 1
    programs, turns = launch.threads // (32 * launch.warps), 0
    if case.op in LOGIT_LOSSES:
        tiles = -(-case.shapes[0][0] // launch.options["ROWS"])
        turns = -(-tiles // programs)
    bytes_per_element = launch.nbytes / case.numel
    return sass.per_element(launch.listing, launch.threads, case.numel, bytes_per_element, passes, turns)


def predict(case: Case, gpu: Gpu, backend: str = "triton", module: Path | None = None) -> dict[str, Any]:
    """A row; see :data:`benchmarks.store.FIELDS`.

    Args:
        backend: one of :data:`BACKENDS`.
        module: what nvcc built; only the CUDA backend needs it.

    Raises:
        InvalidInputError: Triton, or what the CUDA backend's kernels are read with, is missing, or the operator cannot
            be called or compiled.
    """
    op, args = _call(case)
    try:
        if backend == "cuda":
            found = predict_cuda.launches(op, args, gpu.multiprocessors, gpu.capability, module)
            instructions = predict_cuda.Launch.instructions_per_element
        else:
            found, instructions = _triton_launches(op, args, gpu), _triton_instructions
        # What moves next to nothing costs its launch.
        least = MAIN_SHARE * max(launch.nbytes for launch in found)
        parts = [
            _part(launch, instructions(launch, case) if launch.nbytes >= least else 0.0, case, gpu) for launch in found
        ]
    except InvalidInputError:
        raise
    except Exception as error:  # whatever a compiler raises, no case may be left out
        raise InvalidInputError(f"{case.name} cannot be compiled ({type(error).__name__}: {error})") from error
    terms = {
        "memory": sum(part["memory_us"] for part in parts if part["memory_us"] >= part["instructions_us"]),
        "instructions": sum(part["instructions_us"] for part in parts if part["memory_us"] < part["instructions_us"]),
        "launches": LAUNCH_US * len(parts),
    }
    predicted = sum(terms.values())
    copy = case.bytes_moved / (MEMORY_SHARE * gpu.bytes_per_s) * 1e6 + LAUNCH_US
    return {
        "case": case.name,
        "op": case.op,
        "variant": case.variant,
        "dtype": case.dtype,
        "layout": case.layout,
        "pass": case.pass_,
        "nbytes": case.nbytes,
        "bytes_moved": case.bytes_moved,
        "gpu": gpu.title,
        "backend": backend,
        "launches": parts,
        "bytes_per_element": sum(part["nbytes"] for part in parts) / case.numel,
        "instructions_per_element": sum(part["instructions_per_element"] for part in parts),
        "predicted_us": predicted,
        "fraction_of_copy": copy / predicted,
        "bound_by": max(terms, key=lambda name: terms[name]),
    }


def _part(launch: Any, instructions: float, case: Case, gpu: Gpu) -> dict[str, Any]:
    resources = launch.resources
    return {
        "kernel": launch.name,
        "programs": launch.threads // (32 * launch.warps),
        "warps": launch.warps,
        "registers": resources["REG"],
        "spilled_bytes": resources["STACK"] + resources["LOCAL"],
        "shared_bytes": launch.shared,
        "nbytes": launch.nbytes,
        "instructions_per_element": instructions,
        "memory_us": launch.nbytes / (MEMORY_SHARE * gpu.bytes_per_s) * 1e6,
        "instructions_us": instructions * case.numel / (ISSUE_SHARE * gpu.lanes * gpu.hertz) * 1e6,
    }
