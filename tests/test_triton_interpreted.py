"""What the property tests leave out of the Triton kernels: every configuration, 64-bit addresses, repeated runs.

Needs a process in which Triton interprets kernels; tests/test_triton.py starts one.
"""

from __future__ import annotations

import pytest
import torch
from operator_arguments import arguments, assert_right, call

pytest.importorskip("triton", reason="triton is not installed")

import triton as compiler
import triton.language as tl

from adadfq.errors import BackendError
from adadfq.kernels import affine_act_fake_quantize, batch_norm_act, bn_match, configs, segments, tiles
from adadfq.kernels.segments import channels_at
from adadfq.ops import dispatch, native_args, reference, triton

pytestmark = [
    pytest.mark.skipif(not triton.INTERPRETED, reason="tests/test_triton.py runs these, with TRITON_INTERPRET=1"),
    pytest.mark.usefixtures("poisoned_memory"),
]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
#: Odd everything; 16-byte rows; 16-byte columns; many channels; one channel; more samples than segments.
SHAPES = [(5, 3, 4, 7), (3, 4, 2, 16), (2, 24, 3, 3), (2, 200, 1, 1), (1, 1, 30, 50), (19, 8, 5, 1)]
LOSSES = ("margin_loss", "entropy_distillation")
LOGITS = [(16, 10), (3, 1000), (1, 2), (40, 100), (129, 3), (2, 2500)]


#: The last is smaller than any that is used, so that small tensors have many programs.
CONFIGURATIONS = {family: (*found, configs.Config(1, 1)) for family, found in configs.CONFIGS.items()}


@pytest.mark.parametrize(
    "number",
    range(max(map(len, CONFIGURATIONS.values()))),
    ids=lambda i: "-".join("{}x{}".format(*found[i % len(found)]) for found in CONFIGURATIONS.values()),
)
@pytest.mark.parametrize("op", [op for op in triton.KERNELS if op not in LOSSES])
def test_every_configuration(op: str, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All families have their own of that number at once, as a kernel asks for few of them."""
    monkeypatch.delenv("ADADFQ_TRITON_CONFIGS", raising=False)
    for family, found in CONFIGURATIONS.items():
        monkeypatch.setitem(configs.CONFIGS, family, (found[number % len(found)],))
    wanted = {found[0] for found in configs.CONFIGS.values()}
    chosen, choose = set(), configs.choose
    monkeypatch.setattr(configs, "choose", lambda *args: chosen.add(choose(*args)) or choose(*args))
    for i, shape in enumerate(SHAPES):
        args = arguments(op, shape, DTYPES[i % 3], i % 2 == 1)
        assert_right(op, call(triton.KERNELS[op], op, args), args)
    assert chosen and chosen <= wanted


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", LOSSES)
def test_losses_in_one_launch_and_in_two(op: str, dtype: torch.dtype) -> None:
    for logits in LOGITS:
        args = arguments(op, SHAPES[0], dtype, False, logits=logits)
        assert_right(op, call(triton.KERNELS[op], op, args), args)


@pytest.mark.parametrize("number", range(len(CONFIGURATIONS["elementwise"])))
@pytest.mark.parametrize("act", ["none", "relu6"])
def test_a_gradient_without_its_parameters(number: int, act: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a teacher's BatchNorm, which is a constant: a kernel without sums, its last run with 64-bit addresses."""
    op = "affine_act_fake_quantize_backward"
    monkeypatch.delenv("ADADFQ_TRITON_CONFIGS", raising=False)
    monkeypatch.setitem(configs.CONFIGS, "elementwise", (CONFIGURATIONS["elementwise"][number],))
    families, choose = set(), configs.choose
    monkeypatch.setattr(configs, "choose", lambda *args: families.add(args[0]) or choose(*args))
    if number == len(CONFIGURATIONS["elementwise"]) - 1:
        monkeypatch.setattr(segments, "LAST_INT32", 0)
    for i, shape in enumerate(SHAPES):
        grad, x, scale, shift, residual = arguments(op, shape, DTYPES[i % 3], i % 2 == 1)[:5]
        for added, need_residual in ((residual, True), (residual, False), (None, False)):
            args = grad, x, scale, shift, added, act, need_residual, False
            got, want = (call(kernels[op], op, args) for kernels in (triton.KERNELS, reference.KERNELS))
            assert all(torch.equal(*pair) and pair[0].dtype == pair[1].dtype for pair in zip(got, want, strict=True))
    assert families == {"elementwise"}


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("op", list(triton.KERNELS))
def test_addresses_of_64_bits(op: str, channels_last: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "LAST_INT32", 0)
    monkeypatch.setattr(tiles, "LAST_INT32", 0)
    for shape in SHAPES:
        args = arguments(op, shape, torch.float32, channels_last)
        assert_right(op, call(triton.KERNELS[op], op, args), args)


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize(
    "op", [op for op in triton.KERNELS if op.startswith(("bn_match", "affine_act", "dynamic", "learned"))]
)
def test_sums_in_two_stages(op: str, channels_last: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every channel in several programs of several tiles, and more channels than one program combines."""
    monkeypatch.setattr(tiles, "PROGRAMS", 1)
    monkeypatch.setattr(tiles, "MOST_TILES", 2)
    monkeypatch.setattr(bn_match, "_MOST_SPLITS", 2)
    monkeypatch.setattr(bn_match, "_COMBINED", 2)
    monkeypatch.setattr(affine_act_fake_quantize, "_MOST_SPLITS", 2)
    monkeypatch.setitem(configs.CONFIGS, "channel_tiles", (configs.Config(1, 1),))
    for shape in ((2, 3, 30, 40), (5, 24, 12, 12)):
        args = arguments(op, shape, torch.float32, channels_last)
        main = args[op.endswith("_backward")]
        assert tiles.plan(main, native_args.layout(op, main, 1)).splits > bn_match._MOST_SPLITS
        assert_right(op, call(triton.KERNELS[op], op, args), args)


@pytest.mark.parametrize("form", ["channel", "sample", "bias of a sample"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("op", ["batch_norm_act", "batch_norm_act_backward"])
def test_batch_norm_act_in_two_stages(op: str, channels_last: bool, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums combined in several turns, of splits and of samples; samples in two dimensions of the grid, one to spare."""
    monkeypatch.setattr(tiles, "PROGRAMS", 1)
    monkeypatch.setattr(tiles, "MOST_TILES", 2)
    monkeypatch.setattr(bn_match, "_MOST_SPLITS", 2)
    monkeypatch.setattr(bn_match, "_COMBINED", 2)
    monkeypatch.setattr(batch_norm_act, "_COMBINED", 8)
    monkeypatch.setattr(batch_norm_act, "_MOST_SAMPLES", 2)
    monkeypatch.setitem(configs.CONFIGS, "channel_tiles", (configs.Config(1, 1),))
    turn = 8 // batch_norm_act._CHANNELS
    args = list(arguments(op, (3, 6, 20, 26), torch.float32, channels_last))
    backward = op.endswith("_backward")
    weight, bias = (4, 5) if backward else (1, 2)
    if form == "channel":
        args[weight], args[bias] = args[weight][0], args[bias][0]
    elif form == "bias of a sample":
        args[weight] = None
    _, layout, samples = native_args.sample_layout(op, args[backward], form != "channel")
    plan, (_, rows, thirds), _ = batch_norm_act._plan(args[backward], layout, samples)
    assert plan.splits > turn
    assert form == "channel" or (thirds > 1 and samples == 3 < rows * thirds)
    assert_right(op, call(triton.KERNELS[op], op, tuple(args)), tuple(args))


@compiler.jit
def channels_kernel(out_ptr, start: tl.int64, inner: tl.int64, BLOCK: tl.constexpr):
    tl.store(out_ptr + tl.arange(0, BLOCK // 4), channels_at(tl.cast(start, tl.int64), 3, inner, 1, 4, BLOCK))


def test_rows_longer_than_32_bits_count() -> None:
    """Which channel elements on both sides of a row's end belong to, without the memory for such rows."""
    for inner in (2**31 + 512, 3 * 2**30 + 512, 2**31 - 64):
        for row in (1, 2, 3):
            start = row * inner - 256
            out = torch.full((128,), -1, dtype=torch.int32)
            channels_kernel[(1,)](out, start, inner, BLOCK=512)
            assert out.tolist() == [(start + 4 * i) // inner % 3 for i in range(128)]


@pytest.mark.parametrize("op", list(triton.KERNELS))
def test_results_are_the_same_every_time(op: str) -> None:
    args = arguments(op, (9, 16, 13, 11), torch.float32, logits=(64, 100))
    first, second = (call(triton.KERNELS[op], op, args) for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


def test_it_serves_cpu_tensors_only_where_it_is_asked_for() -> None:
    assert dispatch.select("fake_quantize", "cpu", torch.float32) == "cpu"
    with dispatch.use_backend("triton"):
        assert dispatch.select("fake_quantize", "cpu", torch.float32) == "triton"
        with pytest.raises(BackendError, match="it serves cpu tensors, not cuda"):
            dispatch.select("fake_quantize", "cuda", torch.float32)
