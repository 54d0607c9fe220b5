"""The Triton kernels without a GPU: run by Triton's interpreter, and compiled ahead of time to look at the PTX."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest

pytest.importorskip("triton", reason="triton is not installed")

# TRITON_INTERPRET is read when kernels are defined, so each check is a process of its own.
RUN = """
    import torch
    from adadfq.kernels import fake_quantize as kernels
    from adadfq.ops import native_args, reference

    def same(got, want):
        assert got.dtype == want.dtype and got.stride() == want.stride()
        assert torch.equal(got.isnan(), want.isnan())
        bits = torch.int32 if got.dtype == torch.float32 else torch.int16
        differ = (got.view(bits) != want.view(bits)) & ~got.isnan()
        assert not differ.any(), (got[differ], want[differ])

    torch.manual_seed(0)
    checked = 0
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for shape, axis in (((7,), None), ((5, 3, 4, 6), None), ((5, 3, 4, 6), 0), ((5, 3, 4, 6), 1), ((2000, 3), 1)):
            x = torch.randn(shape) * 2
            scale = torch.rand(1 if axis is None else shape[axis]) / 4 + 0.05
            zero_point = torch.randint(0, 16, scale.shape, dtype=torch.int32)
            x.view(-1)[::5] = (x.view(-1)[::5] / 0.125).round() * 0.125 + 0.0625  # ties for scale 0.125
            scale[0] = 0.125
            x.view(-1)[:4] = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0])
            x = x.to(dtype)
            for x in (x, x.to(memory_format=torch.channels_last) if x.dim() == 4 else x):
                _, channels, inner = native_args.layout("test", x, axis)
                out = torch.full_like(x, float("nan"))
                kernels.fake_quantize(x, scale, zero_point, out, channels, inner, 4)
                want = reference.fake_quantize(x, scale, zero_point, 4, axis)
                if dtype == torch.bfloat16:  # the interpreter truncates; COMPILE looks for the rounding instruction
                    exact = reference.fake_quantize(x.float(), scale, zero_point, 4, axis)
                    want = (exact.view(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16)
                same(out, want)
                grad, out = torch.randn_like(x), torch.full_like(x, float("nan"))
                kernels.fake_quantize_backward(grad, x, scale, zero_point, out, channels, inner, 4)
                same(out, reference.fake_quantize_backward(grad, x, scale, zero_point, 4, axis))
                checked += 2
    print("checked", checked)
"""

COMPILE = """
    import re
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from adadfq.kernels import fake_quantize as kernels

    for capability in (80, 90):
        target = GPUTarget("cuda", capability, 32)
        for kernel in (kernels.fake_quantize_kernel, kernels.fake_quantize_backward_kernel):
            for element in ("fp32", "bf16", "fp16"):
                for wide in (False, True):
                    signature = {}
                    for name in kernel.arg_names:
                        if name in ("PER_CHANNEL", "WIDE", "BLOCK"):
                            signature[name] = "constexpr"
                        elif name in ("scale_ptr", "zero_point_ptr"):
                            signature[name] = "*fp32" if name == "scale_ptr" else "*i32"
                        elif name.endswith("_ptr"):
                            signature[name] = "*" + element
                        else:
                            signature[name] = "i64" if wide and name == "n" else "i32"
                    constants = {"PER_CHANNEL": True, "WIDE": wide, "BLOCK": kernels.BLOCK}
                    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
                    ptx = triton.compile(source, target=target, options={"enable_fp_fusion": False}).asm["ptx"]
                    divisions = len(re.findall(r"div\\.rn\\.f32", ptx))
                    assert divisions > 0 and "div.full" not in ptx, "division must be correctly rounded"
                    # 1.5 * 2^23 is added and subtracted once for each division.
                    added = len(re.findall(r"add(\\.rn)?\\.f32[^;]*0f4B400000", ptx))
                    taken = len(re.findall(r"add(\\.rn)?\\.f32[^;]*0fCB400000|sub(\\.rn)?\\.f32[^;]*0f4B400000", ptx))
                    assert added == taken == divisions, (added, taken, divisions)
                    if "backward" not in kernel.__name__ and element != "fp32":
                        assert re.search(r"cvt\\.rn\\." + element.replace("fp", "f"), ptx), "rounded to nearest even"
                    assert "fma" not in ptx, "contraction would change the rounding"
    print("checked")
"""


def run(script: str, **environment: str) -> str:
    process = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return process.stdout


def test_interpreted_kernels_equal_the_reference_bit_for_bit() -> None:
    assert "checked 60" in run(RUN, TRITON_INTERPRET="1")


def test_compiled_kernels_keep_the_arithmetic() -> None:
    assert "checked" in run(COMPILE, TRITON_INTERPRET="0")
