"""Predictions for the CUDA kernels: recorded launches, decided branches, and the command on what nvcc compiled."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from building import ROOT, load_setup, require_recording, unavailable
from click.testing import CliRunner, Result

from adadfq.errors import InvalidInputError
from adadfq.ops import cuda, reference
from benchmarks import predict, predict_cuda, report, resources, sass, store, uniform
from benchmarks.__main__ import main
from benchmarks.cases import LOGIT_LOSSES, Case

MULTIPROCESSORS = 132

# ----------------------------------------------------------------------------------------------- decided branches

#: The parameters begin at 0x210: a 64-bit number, a byte, and an address.
PARAMETERS = (7).to_bytes(8, "little") + b"\x01" + bytes(7) + (0x7F0000001000).to_bytes(8, "little")
CONSTANTS = dict(enumerate((256).to_bytes(4, "little"))) | dict(enumerate(PARAMETERS, 0x210))


def branches(*texts: str) -> dict[int, bool]:
    return uniform.decided([(16 * i, text) for i, text in enumerate((*texts, "EXIT"))], CONSTANTS)


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (("ULDC.U8 UR4, c[0x0][0x218]", "ISETP.NE.AND P0, PT, RZ, UR4, PT", "@P0 BRA 0x40"), True),
        (("LDC.U8 R4, c[0x0][0x218]", "ISETP.NE.AND P0, PT, R4, RZ, PT", "@!P0 BRA 0x40"), False),
        (("LDC R4, c[0x0][0x210]", "ISETP.GT.AND P0, PT, R4.reuse, -0x1, PT", "@P0 BRA 0x40"), True),
        (("LDC R4, c[0x0][0x210]", "ISETP.GT.U32.AND P0, PT, R4, -0x1, PT", "@P0 BRA 0x40"), False),
        (("ISETP.EQ.OR P0, PT, RZ, c[0x0][0x0], PT", "@P0 BRA 0x40"), True),
        (("IMAD.SHL.U32 R4, R2, 0x8, RZ", "ISETP.GT.AND P0, PT, R4, 0x40, PT", "@P0 BRA 0x40"), None),
        (("IMAD.MOV.U32 R4, RZ, RZ, c[0x0][0x210]", "ISETP.LT.AND P0, PT, R4, 0x7, PT", "@P0 BRA 0x40"), False),
        # Unknown: a load, a parameter beyond the known ones, and a predicate that something else may have written.
        (("LDG.E R4, desc[UR4][R2.64]", "ISETP.NE.AND P0, PT, R4, RZ, PT", "@P0 BRA 0x40"), None),
        (("LDC R4, c[0x0][0x300]", "ISETP.NE.AND P0, PT, R4, RZ, PT", "@P0 BRA 0x40"), None),
        (("ISETP.NE.AND P0, PT, RZ, RZ, PT", "LOP3.LUT P0, RZ, R0, 0x4, RZ, 0xc0, !PT", "@P0 BRA 0x40"), None),
        (("ISETP.NE.AND P0, PT, RZ, RZ, PT", "R2P PR, R0, 0x7f", "@P0 BRA 0x40"), None),
        (("ISETP.NE.AND P0, PT, RZ, RZ, PT", "@P1 ISETP.NE.AND P0, PT, R9, RZ, PT", "@P0 BRA 0x40"), None),
        (("ISETP.NE.AND P0, PT, RZ, RZ, PT", "@P3 BRA P0, 0x40"), None),
        (("MOV R5, 0x1", "LDG.E.64 R4, desc[UR4][R2.64]", "ISETP.NE.AND P0, PT, R5, RZ, PT", "@P0 BRA 0x40"), None),
    ],
)
def test_a_branch_is_decided_by_what_is_known(texts: tuple[str, ...], expected: bool | None) -> None:
    assert branches(*texts) == ({} if expected is None else {16 * (len(texts) - 1): expected})


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        ("ISETP.NE.U32.AND P0, PT, R4, 0x7, PT", "ISETP.NE.AND.EX P0, PT, R5, RZ, PT, P0", False),
        ("ISETP.NE.U32.AND P0, PT, R4, 0x8, PT", "ISETP.NE.AND.EX P0, PT, R5, RZ, PT, P0", True),
        ("ISETP.GE.U32.AND P0, PT, R4, 0x7, PT", "ISETP.GE.AND.EX P0, PT, R5, RZ, PT, P0", True),
        ("ISETP.GE.U32.AND P0, PT, R4, 0x7, PT", "ISETP.GE.AND.EX P0, PT, R5, 0x1, PT, P0", False),
        ("ISETP.LT.U32.AND P0, PT, R4, 0x7, PT", "ISETP.LT.AND.EX P0, PT, R5, -0x1, PT, P0", False),
    ],
)
def test_halves_of_a_64_bit_number_are_compared_in_turn(low: str, high: str, expected: bool) -> None:
    assert branches("LDC.64 R4, c[0x0][0x210]", low, high, "@P0 BRA 0x40") == {0x30: expected}


def test_what_a_loop_changes_is_not_known_in_it() -> None:
    loop = ("IADD3 R4, R4, 0x1, RZ", "ISETP.NE.AND P0, PT, R4, 0x5, PT", "@P0 BRA 0x10")
    assert branches("MOV R4, RZ", *loop) == {}
    # Both ways of an undecided branch leave the same number.
    joined = ("@P1 BRA 0x30", "MOV R4, 0x2", "BRA 0x40", "MOV R4, 0x2", "ISETP.EQ.AND P0, PT, R4, 0x2, PT")
    assert branches(*joined, "@P0 BRA 0x60") == {0x50: True}
    assert branches(*joined[:3], "MOV R4, 0x3", joined[4], "@P0 BRA 0x60") == {}
    # A subroutine may have written it.
    called = ("MOV R4, RZ", "CALL.REL.NOINC 0x50", "ISETP.NE.AND P0, PT, R4, RZ, PT", "@P0 BRA 0x40", "EXIT")
    assert branches(*called, "MOV R5, R6", "RET.REL.NODEC R2 0x0") == {0x30: False}
    assert branches(*called, "MOV R4, R6", "RET.REL.NODEC R2 0x0") == {}
    assert branches("MOV R4, RZ", "ISETP.EQ.AND P0, PT, R4, RZ, PT", "@P0 BRA 0x40", "BRX R2 -0x20") == {}


#: A loop of which a branch leaves a half out, and code behind the end that goes back into it.
LISTING = [
    (0x00, "LDC R1, c[0x0][0x28]"),
    (0x10, "LDG.E.128 R4, desc[UR4][R2.64]"),
    (0x20, "@P2 BRA 0x90"),
    (0x30, "@P1 BRA 0x60"),
    (0x40, "DADD R8, R8, R10"),
    (0x50, "FADD R4, R4, R9"),
    (0x60, "STG.E.128 desc[UR4][R2.64], R4"),
    (0x70, "@P0 BRA 0x10"),
    (0x80, "EXIT"),
    (0x90, "FADD R4, R4, R9"),
    (0xA0, "BRA 0x60"),
]


def test_a_round_is_the_busiest_way_without_what_is_rare() -> None:
    (loop,) = sass.loops(LISTING)
    assert loop == sass.Loop(instructions=5, wide=2, loaded=16, stored=16)
    assert sass.loops(LISTING, {0x30: False})[0].instructions == 7
    assert sass.loops(LISTING, {0x70: False}) == []
    assert sass.outside(LISTING) == 3  # the way to the code behind the end
    assert sass.once(LISTING) == 9 and sass.once(LISTING, {0x30: True}) == 7
    without = [(address, text.replace("DADD", "FADD")) for address, text in LISTING]
    assert sass.loops(without)[0].instructions == 7 and sass.loops(without, {0x30: True})[0].instructions == 5


# ----------------------------------------------------------------------------------------------- recorded launches


recorded = pytest.mark.usefixtures("can_record")
CASES = [case for case in predict.chosen() if predict.serves("cuda", case)]


def named(text: str) -> Case:
    return next(case for case in CASES if text in case.name)


@recorded
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_launches_move_what_a_case_must(case: Case) -> None:
    found = predict_cuda.record(*predict._call(case), MULTIPROCESSORS)
    moved = sum(launch.nbytes for launch in found)
    vectors = 0.01 * case.bytes_moved + 16 * case.shapes[0][0]  # parameters, and what a loss has of every row
    assert case.bytes_moved <= moved <= case.bytes_moved + vectors
    for launch in found:
        assert launch.source.endswith(".cu") and "_kernel" in launch.mangled
        assert math.prod(launch.grid) >= 1 and math.prod(launch.block) % 32 == 0


@recorded
def test_the_grid_is_that_of_a_gpu_of_so_many_multiprocessors() -> None:
    op, args = predict._call(named("fake_quantize/per_tensor"))
    blocks = [predict_cuda.record(op, args, count)[0].grid[0] for count in (1, 66, MULTIPROCESSORS, 66)]
    assert blocks == [blocks[0] * count for count in (1, 66, MULTIPROCESSORS, 66)]
    (launch,) = predict_cuda.record(*predict._call(named("margin_loss/-/logits/b1024k1000")), MULTIPROCESSORS)
    assert launch.cooperative and launch.source == "logit_losses.cu"


@recorded
def test_the_real_module_may_be_loaded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "adadfq._C_cuda", ModuleType("adadfq._C_cuda"))
    predict_cuda._emulated.cache_clear()
    op, args = predict._call(named("fake_quantize/per_tensor"))
    assert len(predict_cuda.record(op, args, MULTIPROCESSORS)) == 1


@recorded
def test_recording_ends() -> None:
    x, scale, zero_point = torch.randn(4, 3, 5, 5), torch.full((1,), 0.1), torch.full((1,), 7, dtype=torch.int32)
    before = cuda.DEVICE_TYPE, cuda.launch, cuda.why_unavailable()
    out = x.clone()
    assert len(predict_cuda.record("fake_quantize_", (out, scale, zero_point, 4), MULTIPROCESSORS)) == 1
    assert torch.equal(out, x)
    with pytest.raises(InvalidInputError, match="bits must be"):
        predict_cuda.record("fake_quantize_", (out, scale, zero_point, 9), MULTIPROCESSORS)
    assert before == (cuda.DEVICE_TYPE, cuda.launch, cuda.why_unavailable())
    pointers = (x.data_ptr(), scale.data_ptr(), zero_point.data_ptr(), out.data_ptr())
    predict_cuda._emulated().module.fake_quantize(*pointers, 1, 1, x.numel(), 4, 0, 0, 0)
    assert torch.equal(out, reference.fake_quantize(x, scale, zero_point, 4))


# ----------------------------------------------------------------------------------------------------- the command


@pytest.fixture(scope="session")
def compile_cuda() -> Callable[[Path, Path, str], Path]:
    """Compiles a source for an architecture, as setup.py would; skips without nvcc or cuobjdump."""
    require_recording()
    setup_py = load_setup()
    if (nvcc := setup_py.find_nvcc(os.environ)) is None:
        unavailable("no nvcc")
    try:
        resources.find_cuobjdump()
    except InvalidInputError as error:
        unavailable(str(error))

    def compile_(source: Path, folder: Path, arch: str) -> Path:
        made = folder / f"{source.stem}_{arch}.o"
        code = f"-gencode=arch=compute_{arch},code=sm_{arch}"
        subprocess.run([str(nvcc), *setup_py.NVCC_FLAGS, code, "-c", str(source), "-o", str(made)], check=True)
        return made

    return compile_


@pytest.fixture(scope="session")
def module(compile_cuda: Callable[[Path, Path, str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What nvcc makes of fake_quantize.cu: enough of a module."""
    return compile_cuda(ROOT / "csrc" / "cuda" / "fake_quantize.cu", tmp_path_factory.mktemp("predict"), "90")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["predict", "--backend", "cuda", *arguments])


FILTERS = ("--filter", "fake_quantize/per_*/float32/*/forward")


def test_predictions(module: Path, tmp_path: Path) -> None:
    path = tmp_path / "predictions.json"
    result = run("--module", str(module), *FILTERS, "--json", str(path))
    assert result.exit_code == 0, result.output
    content = store.read(path)
    assert content["options"]["backend"] == "cuda" and len(content["rows"]) == 4
    for row in content["rows"]:
        (launch,) = row["launches"]
        assert launch["kernel"].startswith("elementwise_kernel<(Walk)")
        assert 16 <= launch["registers"] <= 128 and launch["spilled_bytes"] == 0 and launch["warps"] == 8
        assert launch["programs"] % MULTIPROCESSORS == 0
        assert 5 < row["instructions_per_element"] < 60
        assert row["bytes_per_element"] * row["nbytes"] / 4 == pytest.approx(row["bytes_moved"], rel=1e-4)
        assert row["predicted_us"] > row["bytes_moved"] / 4.5e6
    each = {(row["variant"], row["layout"]): row["instructions_per_element"] for row in content["rows"]}
    # One channel needs no channel found for every 16 bytes, and a thread of columns keeps its channels.
    assert each["per_tensor", "contiguous"] == each["per_tensor", "channels_last"] < each["per_channel", "contiguous"]
    assert each["per_channel", "channels_last"] < each["per_channel", "contiguous"]
    page = report.speed_block([(path, content)])
    assert "| cuda | `fake_quantize` per_tensor forward | 2 | 1 |" in page
    assert "predicted, not yet run on a GPU" in page and "from the machine code of nvcc" in page


def test_what_cannot_be_predicted_is_said(
    module: Path, tmp_path: Path, compile_cuda: Callable[[Path, Path, str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    result = run("--module", str(module), "--filter", "observe*float32/contiguous*")
    assert result.exit_code == 2 and "launches update_range_kernel<float> of observe_fake_quantize.cu" in result.output
    source = tmp_path / "other.cu"
    source.write_text("__global__ void kernel(float* x) { *x = 1.0f; }\n")
    result = run("--module", str(compile_cuda(source, tmp_path, "80")), *FILTERS)
    assert result.exit_code == 2 and "no machine code for sm_90; it has sm_80: build it with" in result.output
    assert "there is no module" in run("--module", str(tmp_path / "nothing.so"), *FILTERS).output
    copied = Path(shutil.copy(module, tmp_path / "copy.o"))
    copied.with_name(resources.record_name(copied)).write_text('{"sources": "others"}')
    result = run("--module", str(copied), *FILTERS)
    assert result.exit_code == 2 and "was built from another csrc than this one" in result.output
    nowhere = InvalidInputError("no cuobjdump (looked everywhere)")
    monkeypatch.setattr(resources, "find_cuobjdump", lambda: (_ for _ in ()).throw(nowhere))
    result = run("--module", str(module), *FILTERS)
    assert result.exit_code == 2 and "error: no cuobjdump" in result.output
    result = run("--backend", "neither")
    assert result.exit_code == 2 and "backend must be one of triton, cuda, both, got 'neither'" in result.output


@recorded
def test_without_a_compiler_there_are_no_launches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(predict_cuda, "_TESTS", tmp_path)
    predict_cuda._emulated.cache_clear()
    with pytest.raises(InvalidInputError, match=r"cannot be compiled for the CPU .* a C\+\+17 compiler"):
        predict_cuda.record("fake_quantize", (), MULTIPROCESSORS)


def test_losses_are_counted_in_turns() -> None:
    def turns(batch: int, classes: int, blocks: int) -> int:
        launch = predict_cuda.Recorded("logit_losses.cu", "", (blocks, 1, 1), (256, 1, 1), True, b"", 0)
        return predict_cuda.Launch(launch, None, 90, Path(), Path())._turns(batch, classes)

    assert (turns(16, 10, 1), turns(17, 10, 1), turns(1024, 1000, 264), turns(2, 5000, 2)) == (1, 2, 4, 3)
    assert {case.op for case in CASES if case.op in LOGIT_LOSSES} == set(LOGIT_LOSSES)
