"""Every Triton kernel in every configuration, compiled for GPUs that are not there, and its instructions looked at."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from operator_arguments import arguments

pytest.importorskip("triton", reason="triton is not installed")

from adadfq.kernels import bn_match, configs, segments, tiles
from adadfq.ops import triton
from benchmarks import sass
from benchmarks.compiled import Launch, compiling_for

pytestmark = pytest.mark.skipif(triton.INTERPRETED, reason="interpreted kernels are not compiled")

#: 16-byte rows and columns; rows of 7 elements; channels long enough for tiles of any configuration.
ALIGNED, ODD, LONG = (8, 32, 4, 8), (8, 3, 1, 7), (8, 32, 56, 56)
#: Operator -> kernel that does the work, and how many main tensors that reads and writes.
MAIN = {
    "fake_quantize": ("fake_quantize_kernel", 1, 1),
    "fake_quantize_": ("fake_quantize_kernel", 1, 1),
    "fake_quantize_backward": ("fake_quantize_backward_kernel", 2, 1),
    "foreach_dynamic_fake_quantize": ("rows_kernel", 1, 1),
    "dynamic_fake_quantize": ("fake_quantize_kernel", 1, 1),
    "observe_fake_quantize": ("fake_quantize_kernel", 1, 1),
    "affine_act_fake_quantize": ("affine_act_fake_quantize_kernel", 2, 1),
    "affine_act_quantize": ("affine_act_fake_quantize_kernel", 2, 1),
    "affine_act_fake_quantize_backward": ("affine_act_backward_sums_kernel", 3, 2),
    "learned_fake_quantize_backward": ("learned_backward_kernel", 2, 1),
    "foreach_fake_quantize": ("fake_quantize_kernel", 1, 1),
    "foreach_learned_fake_quantize_backward": ("learned_backward_kernel", 2, 1),
    "affine_act_learned_fake_quantize_backward": ("affine_act_learned_backward_kernel", 3, 2),
    "bn_match": ("bn_match_chunks_kernel", 1, 0),
    "bn_match_backward": ("bn_match_backward_kernel", 1, 1),
    "bn_match_forward": ("bn_match_chunks_kernel", 1, 1),
    "bn_match_forward_backward": ("bn_match_backward_kernel", 2, 1),
    "batch_norm_act": ("batch_norm_act_kernel", 1, 1),
    "batch_norm_act_backward": ("batch_norm_act_backward_kernel", 2, 1),
    "margin_loss": ("margin_loss_kernel", 0, 0),
    "entropy_distillation": ("entropy_distillation_kernel", 0, 0),
}
#: Their stores move bits, or codes.
NOT_ROUNDED = {
    "fake_quantize_backward",
    "learned_fake_quantize_backward",
    "foreach_learned_fake_quantize_backward",
    "affine_act_quantize",
}
#: Approximate or flushing float32 instructions, and sums whose order is the hardware's.
INEXACT = r"(div\.full|div\.approx|sqrt\.approx|rcp\.approx)\S*\.f32|\.ftz\.f32|\bred\.|atom\S*\.add\.f"
#: Kernels with a stack access in a loop by some assembler: for (name, capability).
STACK_IN_LOOPS = {("rows_kernel", 100), ("batch_norm_act_sums_kernel", 100)}
IN_FLOAT64 = {"margin_loss_kernel", "entropy_distillation_kernel"}
FLOATS = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}


@pytest.fixture(autouse=True)
def without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backend takes CPU tensors and asks for no GPU."""
    monkeypatch.setattr(triton, "DEVICE_TYPE", "cpu")
    monkeypatch.setattr(triton, "_kernels", lambda family: importlib.import_module(f"adadfq.kernels.{family}"))


def _compile(op: str, capability: int, *args: object, **kwargs: object) -> list[Launch]:
    with compiling_for(capability) as launches:
        triton.KERNELS[op](*arguments(op, *args, **kwargs))  # type: ignore[arg-type]
    assert launches
    return launches


def _check(launch: Launch) -> None:
    """At most 16 bytes of a thread on its stack, none of them in a loop, and nothing is less exact than it looks."""
    assert launch.resources["LOCAL"] == 0, (launch.name, launch.resources)
    # What is kept there, and of which kernels, differs by the assembler's version.
    assert launch.resources["STACK"] <= 16, (launch.name, launch.resources)
    if launch.resources["STACK"] and (launch.name, launch.capability) not in STACK_IN_LOOPS:
        found = sass.stack_accesses_in_loops(launch.listing)
        assert not found, (launch.name, launch.capability, found)
    # Contraction of a multiplication and an addition would round once.
    assert launch.options["enable_fp_fusion"] is False, launch.name
    ptx = launch.ptx
    if launch.name in IN_FLOAT64:
        ptx = re.sub(r"(abs|setp\.\w+)\.ftz\.f32", "", ptx)  # how libdevice's exp looks for its special cases
    found = re.search(INEXACT, ptx)
    assert found is None, (launch.name, found)


def _check_vectors(op: str, launch: Launch, dtype: torch.dtype, reads: int, writes: int) -> None:
    """Main tensors are read and written 16 bytes at a time, and rounded to nearest even."""
    loads, stores = launch.count(r"ld\.global\S*\.v4\.b32"), launch.count(r"st\.global\S*\.v4\.b32")
    assert loads >= reads and stores >= writes, (launch.name, loads, stores)
    if dtype != torch.float32 and reads:
        if op != "foreach_dynamic_fake_quantize":  # whose rows may be of any length, and have a body of their own then
            assert not launch.count(r"(ld|st)\.global\S*\.b16"), launch.name
        if writes and op not in NOT_ROUNDED:
            assert launch.count(rf"cvt\.rn\.{FLOATS[dtype]}"), launch.name


def _configurations() -> Iterator[tuple[str, configs.Config]]:
    for family, found in configs.CONFIGS.items():
        yield from ((family, config) for config in found)


FAMILY = {
    "elementwise": [
        "fake_quantize",
        "fake_quantize_backward",
        "observe_fake_quantize",
        "affine_act_fake_quantize",
        "affine_act_quantize",
    ],
    "channel_tiles": [
        op
        for op in triton.KERNELS
        if op.startswith(("bn_match", "batch_norm", "dynamic")) or op.endswith("quantize_backward")
    ],
    "rows": ["foreach_dynamic_fake_quantize"],
}


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("family,config", list(_configurations()), ids=str)
def test_every_configuration_compiles(
    capability: int, family: str, config: configs.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(configs.CONFIGS, family, (config,))
    for op in FAMILY[family]:
        for dtype in (torch.float32, torch.bfloat16):
            for launch in _compile(op, capability, ALIGNED if family == "rows" else LONG, dtype):
                _check(launch)


def test_configurations_differ() -> None:
    """Each makes a kernel of its own of what it is for."""
    for family, op in (
        ("elementwise", "fake_quantize"),
        ("channel_tiles", "bn_match"),
        ("rows", "foreach_dynamic_fake_quantize"),
    ):
        found = set()
        for config in configs.CONFIGS[family]:
            with pytest.MonkeyPatch.context() as patch:
                patch.setitem(configs.CONFIGS, family, (config,))
                main, *_ = _compile(op, 90, ALIGNED if family == "rows" else LONG, torch.float32)
            constants = [(name, str(value)) for name, value in main.options.items() if name.isupper()]
            found.add((main.options["num_warps"], *sorted(constants)))
        assert len(found) == len(configs.CONFIGS[family]), (family, found)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("op", [op for op in triton.KERNELS if not op.endswith(("loss", "distillation"))])
def test_64_bit_addresses_compile(op: str, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "LAST_INT32", 0)
    monkeypatch.setattr(tiles, "LAST_INT32", 0)
    for dtype in (torch.float32, torch.bfloat16):
        for launch in _compile(op, 90, LONG, dtype, layout == "channels_last"):
            _check(launch)


def test_every_kernel_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that kernels/ defines, in the variants that arguments choose; and each compiles."""
    defined = set()
    for path in Path(segments.__file__).parent.glob("*.py"):
        defined |= set(re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.MULTILINE))
    # More channels than one program combines.
    monkeypatch.setattr(bn_match, "_MOST_SPLITS", 2)
    monkeypatch.setattr(bn_match, "_COMBINED", 2)
    launched = []
    with compiling_for(90) as launches:
        for op in triton.KERNELS:
            triton.KERNELS[op](*arguments(op, LONG, torch.float32, logits=(1024, 100)))
        x, grad = torch.empty(2, *LONG)
        scale, mean, var = torch.ones(3, LONG[1])
        logits, labels = torch.empty(2, 16, 10), torch.zeros(16, dtype=torch.int64)
        for act in ("none", "relu", "relu6"):
            for residual in (None, grad):
                triton.KERNELS["affine_act_fake_quantize"](x, scale, mean, residual, act, None, None, 8)
                for params in (False, True):
                    triton.KERNELS["affine_act_fake_quantize_backward"](
                        grad, x, scale, mean, residual, act, residual is not None, params
                    )
        triton.KERNELS["bn_match_forward"](x, mean, var, None, None, 1e-5)
        triton.KERNELS["bn_match_forward"](
            x.contiguous(memory_format=torch.channels_last), mean, var, scale, None, 1e-5
        )
        for weight, bias in ((None, None), (scale, None), (None, mean), (scale, mean)):
            triton.KERNELS["batch_norm_act"](x, weight, bias, 1e-5, 0.2)
            statistics = mean.double(), var.double()
            triton.KERNELS["batch_norm_act_backward"](grad, x, *statistics, weight, bias, 1e-5, 0.2)
        triton.KERNELS["dynamic_fake_quantize"](torch.empty(64, 32, 3, 3), 4, 0)
        triton.KERNELS["margin_loss"](*logits, labels, 0.3, 0.6, 0.2, 0.1, 0.7, True)
        launched += launches
    for launch in launched:
        _check(launch)
    assert {launch.name for launch in launched} == defined


def test_weights_of_a_network_take_one_launch() -> None:
    weights = [torch.empty(64, 3, 7, 7), *(torch.empty(64, 64, 3, 3) for _ in range(4)), torch.empty(1000, 512)]
    with compiling_for(90) as launches:
        triton.KERNELS["foreach_dynamic_fake_quantize"](weights, [4] * len(weights), 0)
    assert [launch.name for launch in launches] == ["rows_kernel"]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "odd"])
@pytest.mark.parametrize("dtype", list(FLOATS))
@pytest.mark.parametrize("op", list(triton.KERNELS))
def test_every_layout_compiles(op: str, dtype: torch.dtype, layout: str) -> None:
    launches = _compile(op, 90, ODD if layout == "odd" else ALIGNED, dtype, layout == "channels_last")
    for launch in launches:
        _check(launch)
    kernel, reads, writes = MAIN[op]
    main = [launch for launch in launches if launch.name == kernel]
    assert main, [launch.name for launch in launches]
    if layout != "odd":
        _check_vectors(op, main[0], dtype, reads, writes)


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("logits", [(16, 10), (256, 10), (16, 1000), (1024, 1000), (4, 21841)], ids=str)
@pytest.mark.parametrize("op", ["margin_loss", "entropy_distillation"])
def test_losses_compile(op: str, logits: tuple[int, int], capability: int) -> None:
    for launch in _compile(op, capability, ALIGNED, torch.float32, logits=logits):
        _check(launch)


@pytest.mark.parametrize("dtype", list(FLOATS))
@pytest.mark.parametrize("shape", [(2**20 + 4,), (2**20 + 1,), (63, 3, 14, 14), (2, 3, 7, 7)], ids=str)
def test_tensors_of_any_size_are_read_16_bytes_at_a_time(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, channels = torch.empty(shape, dtype=dtype), shape[1] if len(shape) > 1 else 1
    with compiling_for(90) as launches:
        scale, zero_point = torch.ones(channels), torch.zeros(channels, dtype=torch.int32)
        triton.KERNELS["fake_quantize"](x, scale, zero_point, 4, 1 if channels > 1 else None)
    (launch,) = launches
    # Twice: without a mask as far as tensors go, and with it.
    assert launch.count(r"ld\.global\.v4\.b32") >= launch.options["SEGMENTS"]
    assert launch.count(r"st\.global\.v4\.b32") >= launch.options["SEGMENTS"]


def test_the_barrier_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    from adadfq.kernels import logit_losses

    monkeypatch.setattr(logit_losses, "_can_wait", lambda x: True)
    for capability in (80, 90, 100):
        args = arguments("margin_loss", ALIGNED, torch.float32, logits=(1024, 1000))
        with compiling_for(capability) as launches:
            monkeypatch.setattr(logit_losses, "_launched", set())
            for _ in range(2):  # the first call of a size has no barrier
                triton.KERNELS["margin_loss"](*args)
        assert [launch.options["PHASES"] for launch in launches] == [1, 2, 3]
        for launch in launches:
            _check(launch)
        together = launches[-1]
        assert together.options["launch_cooperative_grid"]
        # At most 255 registers of 128 threads: two programs a multiprocessor, as the docstring counts.
        assert together.options["num_warps"] == logit_losses.NUM_WARPS == 4
        assert together.count(r"atom\S*\.release\S*\.exch") and together.count(r"atom\S*\.acquire\S*\.add")


def test_quotients_are_corrected_twice() -> None:
    """One reciprocal a parameter and four fused multiply-adds an element: see kernels/arithmetic.py."""
    (launch,) = _compile("fake_quantize", 90, ALIGNED, torch.float32)
    elements = launch.options["SEGMENTS"] * launch.options["BLOCK"] // (launch.options["num_warps"] * 32)
    assert launch.count(r"fma\.rn\.f32") == 4 * elements
    # Rounding half to even: 1.5 * 2^23 goes on and comes off again.
    added = launch.count(r"add(\.rn)?\.f32[^;]*0f4B400000")
    taken = len(re.findall(r"add(\.rn)?\.f32[^;]*0fCB400000|sub(\.rn)?\.f32[^;]*0f4B400000", launch.ptx))
    assert added == taken == elements
    assert 1 <= launch.count(r"div\.rn\.f32") <= elements
