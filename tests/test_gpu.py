"""What only a GPU can show; run by ``pytest -m gpu`` or benchmarks/gpu.sh, skipped elsewhere.

Every operator a GPU backend has is compared with the reference on the same device: bit for bit where nothing is summed
and nothing is left to a transcendental function, else with the reference in float64.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from operator_arguments import arguments, assert_right, call, flat, own, tensors
from toy import toy_recipe, toy_teacher

import adadfq
from adadfq import functional as F
from adadfq.ops import dispatch, reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
    pytest.mark.usefixtures("exact_convolutions"),
]

TESTS = Path(__file__).parent
#: Odd sizes; a layer; channels of one element; rows of odd length; more channels than columns of a tile.
SHAPES = [(3, 5, 7, 9), (16, 64, 56, 56), (1, 1, 1, 1), (32, 512, 7, 7), (5, 300, 1, 3), (2, 2048, 4, 4)]
LOGITS = [(16, 10), (1024, 1000), (1, 2), (256, 100), (129, 3), (64, 1000)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=["cuda", "triton"])
def gpu_backend(request: pytest.FixtureRequest) -> str:
    """Each GPU backend; one that is missing fails, for on a GPU machine both must be there."""
    assert dispatch.BACKENDS[request.param].why_unavailable() is None
    return request.param


#: Every backend with every operator it has; that none is missing is for tests/test_cuda_calls.py to say.
KERNELS = pytest.mark.parametrize(
    "gpu_backend,op",
    [(backend, op) for backend in ("cuda", "triton") for op in dispatch.BACKENDS[backend].KERNELS],
    indirect=["gpu_backend"],
)


@contextmanager
def no_synchronisation() -> Iterator[None]:
    """Waiting for the device is an error."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


#: Every variant is compiled: 16-bit dtypes have two of the shapes.
CASES = [(shape, dtype) for shape in SHAPES for dtype in (DTYPES if shape in SHAPES[:2] else DTYPES[:1])]


@pytest.mark.parametrize("shape,dtype", CASES, ids=str)
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@KERNELS
def test_kernel_equals_the_reference(
    gpu_backend: str, op: str, shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool
) -> None:
    args = arguments(op, shape, dtype, channels_last, "cuda", LOGITS[SHAPES.index(shape)])
    kernel = dispatch.BACKENDS[gpu_backend].KERNELS[op]
    got = call(kernel, op, args)
    assert_right(op, got, args)
    with no_synchronisation():
        again = call(kernel, op, args)
    for one, other in zip(got, again, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("shape", [(64, 64, 3, 3), (3, 5, 7, 9), (2, 0, 3, 3)], ids=str)
@pytest.mark.parametrize("axis", [None, 0, 2])
def test_fake_quantize_along_other_axes(gpu_backend: str, shape: tuple[int, ...], axis: int | None) -> None:
    random = torch.Generator("cuda").manual_seed(0)
    x, grad = torch.randn(2, *shape, generator=random, device="cuda")
    channels = 1 if axis is None else shape[axis]
    scale = torch.rand(channels, generator=random, device="cuda") * 0.3 + 0.05
    zero_point = torch.randint(0, 16, (channels,), generator=random, device="cuda").int()
    kernels = dispatch.BACKENDS[gpu_backend].KERNELS
    for op, args in (
        ("fake_quantize", (x, scale, zero_point, 4, axis)),
        ("fake_quantize_backward", (grad, x, scale, zero_point, 4, axis)),
    ):
        assert_right(op, call(kernels[op], op, args), args)


def _shifted(argument: Any) -> Any:
    """A copy of a tensor, or of those of a list, with its strides: one element behind an address that is aligned."""
    if isinstance(argument, list):
        return [_shifted(part) for part in argument]
    if not isinstance(argument, torch.Tensor):
        return argument
    memory = torch.empty(argument.numel() + 1, dtype=argument.dtype, device=argument.device)
    return memory.as_strided(argument.shape, argument.stride(), 1).copy_(argument)


@pytest.mark.parametrize("dtype", DTYPES)
@KERNELS
def test_kernel_on_memory_that_is_not_aligned(gpu_backend: str, op: str, dtype: torch.dtype) -> None:
    """No tensor begins where 16 bytes can be read at once."""
    for channels_last in (False, True):
        args = arguments(op, (3, 8, 7, 9), dtype, channels_last, "cuda")
        inputs = [_shifted(argument) for argument in args]
        got = flat(dispatch.BACKENDS[gpu_backend].KERNELS[op](*inputs))
        assert_right(op, got + [inputs[i] for i in dispatch.MUTATES.get(op, ())], args)


@pytest.mark.parametrize("op", ["fake_quantize", "fake_quantize_backward", "dynamic_fake_quantize", "bn_match_forward"])
def test_kernel_passes_what_is_not_finite(gpu_backend: str, op: str) -> None:
    args = arguments(op, (3, 5, 7, 9), torch.float32, False, "cuda")
    x = args[op.endswith("_backward")]
    x[0, 0, 0, :3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    got = call(dispatch.BACKENDS[gpu_backend].KERNELS[op], op, args)[0]
    torch.testing.assert_close(got, call(reference.KERNELS[op], op, args)[0], rtol=0, atol=0, equal_nan=True)


@KERNELS
def test_kernel_in_a_graph(gpu_backend: str, op: str) -> None:
    """A captured launch computes from what its inputs hold when it is replayed, as an eager one would."""
    kernel = dispatch.BACKENDS[gpu_backend].KERNELS[op]
    args = arguments(op, (16, 64, 56, 56), torch.float32, False, "cuda")
    before = own(args)
    call(kernel, op, args)
    graph, inputs = torch.cuda.CUDAGraph(), own(args)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        out = flat(kernel(*inputs))
    mutated = [inputs[i] for i in dispatch.MUTATES.get(op, ())]
    for scale in (1.0, 0.5):
        for a, b in zip(tensors(inputs), tensors(before), strict=True):
            a.copy_(b * scale if a.is_floating_point() else b)
        expected = call(kernel, op, inputs)
        graph.replay()
        for got, want in zip(out + mutated, expected, strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


#: Sums over blocks, with their counters, come first.
CAPTURED_FIRST = """
import torch
from operator_arguments import arguments, assert_right, flat, own
from adadfq.ops import dispatch

for op in ("bn_match", "observe_fake_quantize", "margin_loss", "fake_quantize"):
    args = arguments(op, (3, 5, 7, 9), torch.float32, False, "cuda")
    inputs, graph = own(args), torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        out = flat(dispatch.BACKENDS["cuda"].KERNELS[op](*inputs))
    graph.replay()
    assert_right(op, out + [inputs[i] for i in dispatch.MUTATES.get(op, ())], args)
"""


def test_the_first_call_of_a_process_is_captured() -> None:
    """What is loaded on first use is loaded in a capture too, in which a thread may not do just anything."""
    path = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-c", CAPTURED_FIRST],
        cwd=TESTS.parent,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr[-3000:]


LARGE_LOGITS = pytest.mark.parametrize(
    "logits", [(1024, 10), (128, 1000), (1024, 1000)], ids=lambda size: "x".join(map(str, size))
)


@LARGE_LOGITS
def test_margin_loss_with_a_barrier(gpu_backend: str, logits: tuple[int, int]) -> None:
    """Programs that wait for each other in one launch give the same every time, and what two launches give."""
    kernel = dispatch.BACKENDS[gpu_backend].KERNELS["margin_loss"]
    args = arguments("margin_loss", (1, 1, 1, 1), torch.float32, False, "cuda", logits)
    first, *others = (call(kernel, "margin_loss", args) for _ in range(20))
    assert_right("margin_loss", first, args)
    for results in others:
        for got, want in zip(results, first, strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=0)


@LARGE_LOGITS
def test_margin_loss_in_a_graph(gpu_backend: str, logits: tuple[int, int]) -> None:
    """After calls with a barrier, capture finds the launches without one compiled."""
    kernel = dispatch.BACKENDS[gpu_backend].KERNELS["margin_loss"]
    args = arguments("margin_loss", (1, 1, 1, 1), torch.float32, False, "cuda", logits)
    eager = [call(kernel, "margin_loss", args) for _ in range(3)][-1]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = flat(kernel(*args))
    for _ in range(3):
        graph.replay()
    for got, want in zip(captured, eager, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


@KERNELS
def test_opcheck(gpu_backend: str, op: str) -> None:
    with adadfq.use_backend(gpu_backend):
        operator = getattr(torch.ops.adadfq, op).default
        torch.library.opcheck(operator, arguments(op, (3, 5, 7, 9), torch.float32, False, "cuda"))


@pytest.mark.parametrize(
    "name", ["affine", "batch_norm", "bn_match", "bn_match_forward", "losses", "quantizers", "weights"]
)
def test_functions_compile_into_one_graph(name: str) -> None:
    torch._dynamo.reset()
    channel = [torch.rand(5, device="cuda") + 0.1 for _ in range(4)]
    per_sample = torch.rand(6, 5, device="cuda"), torch.rand(6, 5, device="cuda")
    step = (torch.tensor(0.1, device="cuda"), torch.tensor(3, device="cuda"), 4)
    other, labels = torch.randn(6, 20, device="cuda"), torch.arange(6, device="cuda")
    settings = {"lambda_l": 0.3, "lambda_u": 0.6, "alpha_ds": 0.2, "alpha_as": 0.1, "beta": 0.7}
    computed = {
        "affine": lambda x: [F.affine_act_fake_quantize(x, channel[0], channel[1], x.sin(), "relu", step)],
        "batch_norm": lambda x: list(F.batch_norm_act(x, *per_sample, negative_slope=0.2)),
        "bn_match_forward": lambda x: list(F.bn_match_forward(x, *channel)),
        "losses": lambda x: [
            *F.margin_loss(x.flatten()[:120].view(6, 20), other, labels, **settings),
            F.entropy_distillation(other, x.flatten()[:120].view(6, 20), 5.0),
        ],
        "weights": lambda x: F.foreach_dynamic_fake_quantize([x, x.flatten(1)], 4)[0],
        "quantizers": lambda x: [F.fake_quantize(x, *step, clip_grad=True), F.dynamic_fake_quantize(x, 4, 1)[0]],
        "bn_match": lambda x: [F.bn_match(x, *channel[:2])],
    }[name]
    results = []
    for function in (computed, torch.compile(computed, fullgraph=True, backend="aot_eager")):
        x = torch.randn(6, 5, 4, 4, generator=torch.Generator().manual_seed(0)).cuda().requires_grad_()
        out = function(x)
        sum((t * t).sum() for t in out if t.requires_grad).backward()
        results.append([*(t.detach() for t in out), x.grad])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


@KERNELS
def test_kernel_runs_on_the_current_stream(gpu_backend: str, op: str) -> None:
    """Work queued before on another stream, and slow, has happened when the kernel reads."""
    kernel = dispatch.BACKENDS[gpu_backend].KERNELS[op]
    args = arguments(op, (3, 5, 7, 9), torch.float32, False, "cuda")
    expected = call(kernel, op, args)
    inputs = own(args)
    stale = [t.clone() for t in tensors(inputs)]
    for t in tensors(inputs):
        t.zero_()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        for t, value in zip(tensors(inputs), stale, strict=True):
            t.copy_(value)
        got = flat(kernel(*inputs)) + [inputs[i] for i in dispatch.MUTATES.get(op, ())]
    stream.synchronize()
    for value, want in zip(got, expected, strict=True):
        torch.testing.assert_close(value, want, rtol=0, atol=0, equal_nan=True)


@KERNELS
def test_kernel_takes_no_memory_but_its_results(gpu_backend: str, op: str) -> None:
    kernel = dispatch.BACKENDS[gpu_backend].KERNELS[op]
    args = own(arguments(op, (16, 64, 56, 56), torch.float32, False, "cuda"))
    kernel(*args)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    results = kernel(*args)
    held = torch.cuda.memory_allocated() - before
    assert torch.cuda.max_memory_allocated() - before - held <= 2**20, "scratch for the stages' sums is small"
    del results


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
@KERNELS
def test_kernel_on_a_device_that_is_not_current(gpu_backend: str, op: str) -> None:
    args = arguments(op, (3, 5, 7, 9), torch.float32, False, "cuda:1")
    assert torch.cuda.current_device() == 0
    assert_right(op, call(dispatch.BACKENDS[gpu_backend].KERNELS[op], op, args), args)
    assert torch.cuda.current_device() == 0


@pytest.mark.xdist_group("most of the memory")  # one at a time
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_more_than_two_to_the_31_elements(gpu_backend: str, channels_last: bool) -> None:
    shape = (33, 64, 1024, 1024)  # 2.2e9 elements
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of GPU memory")
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.empty(shape, dtype=torch.bfloat16, device="cuda", memory_format=layout).normal_()
    scale, zero_point = torch.rand(64, device="cuda") + 0.05, torch.full((64,), 7, dtype=torch.int32, device="cuda")
    kernels = dispatch.BACKENDS[gpu_backend].KERNELS
    got = kernels["fake_quantize"](x, scale, zero_point, 4, 1)
    for i in (0, 16, 31, 32):
        assert torch.equal(got[i : i + 1], reference.fake_quantize(x[i : i + 1], scale, zero_point, 4, 1))
    del got
    mean, var = torch.zeros(64, device="cuda"), torch.ones(64, device="cuda")
    _, found, found_var = kernels["bn_match"](x, mean, var)
    parts = [reference.bn_match(x[i : i + 1], mean, var) for i in range(shape[0])]
    torch.testing.assert_close(found, torch.stack([p[1] for p in parts]).mean(0), rtol=0, atol=1e-6)
    torch.testing.assert_close(found_var, torch.stack([p[2] for p in parts]).mean(0), rtol=1e-4, atol=0)


def test_training_on_a_gpu_follows_the_cpu() -> None:
    """Ten steps from one seed; noise differs between the devices' generators, so it is drawn on the CPU."""
    metrics = []
    for device in ("cpu", "cuda"):
        teacher = toy_teacher()
        trainer = adadfq.Trainer(
            teacher, adadfq.quantize(teacher, 8, 8), toy_recipe(), seed=1, device=device, progress=False
        )
        random = torch.Generator().manual_seed(2)
        rows = []
        for _ in range(10):
            noise, labels = torch.randn(8, 16, generator=random), torch.randint(10, (8,), generator=random)
            rows.append(trainer.game.step(noise.to(device), labels.to(device), True).cpu())
        metrics.append(torch.stack(rows))
    torch.testing.assert_close(metrics[0][:3], metrics[1][:3], rtol=1e-2, atol=1e-2)


def test_fit_on_a_gpu(tmp_path) -> None:  # type: ignore[no-untyped-def]
    teacher = toy_teacher()
    trainer = adadfq.Trainer(teacher, adadfq.quantize(teacher), toy_recipe(), device="cuda", progress=False)
    result = trainer.fit(tmp_path / "run")
    loaded = adadfq.load(tmp_path / "run", model=toy_teacher(), device="cuda")
    x = torch.randn(4, 3, 8, 8, device="cuda")
    torch.testing.assert_close(loaded(x), result.student(x))
