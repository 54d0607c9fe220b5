"""What only a GPU can show; run by ``pytest -m gpu`` or benchmarks/gpu.sh, skipped elsewhere."""

from __future__ import annotations

import pytest
import torch
from toy import toy_recipe, toy_teacher

import adadfq
from adadfq import functional as F
from adadfq.ops import dispatch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]

SHAPES = [(3, 5, 7, 9), (64, 64, 3, 3), (1, 1, 1, 1), (16, 64, 56, 56), (2, 0, 3, 3)]


@pytest.fixture(params=["cuda", "triton"])
def gpu_backend(request: pytest.FixtureRequest) -> str:
    """Each GPU backend; one that is missing fails, for on a GPU machine both must be there."""
    assert dispatch.BACKENDS[request.param].why_unavailable() is None
    return request.param


def _case(shape: tuple[int, ...], dtype: torch.dtype, axis: int | None, channels_last: bool):  # type: ignore[no-untyped-def]
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(shape, generator=generator, device="cuda").to(dtype)
    if x.numel() > 3:
        x.view(-1)[:3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    channels = 1 if axis is None else shape[axis]
    scale = torch.rand(channels, generator=generator, device="cuda") * 0.3 + 0.05
    zero_point = torch.randint(0, 16, (channels,), generator=generator, device="cuda")
    return x, scale, zero_point


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("axis", [None, 0, 1])
@pytest.mark.parametrize("channels_last", [False, True])
def test_fake_quantize_equals_the_reference(
    gpu_backend: str, shape: tuple[int, ...], dtype: torch.dtype, axis: int | None, channels_last: bool
) -> None:
    x, scale, zero_point = _case(shape, dtype, axis, channels_last)
    results = []
    for backend in (gpu_backend, "reference"):
        leaf = x.detach().requires_grad_()
        with adadfq.use_backend(backend):
            out = torch.ops.adadfq.fake_quantize(x, scale, zero_point.int(), 4, axis)
            grad = torch.ops.adadfq.fake_quantize_backward(leaf.detach(), x, scale, zero_point.int(), 4, axis)
        results.append((out, grad))
    for got, want in zip(*results, strict=True):
        assert got.stride() == want.stride()
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def test_fake_quantize_in_a_graph(gpu_backend: str) -> None:
    x, scale, zero_point = _case((16, 64, 56, 56), torch.float32, 1, False)
    with adadfq.use_backend(gpu_backend):
        expected = F.fake_quantize(x, scale, zero_point, 4, 1)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = F.fake_quantize(x, scale, zero_point, 4, 1)
    for _ in range(2):
        out.zero_()
        graph.replay()
        torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", ["fake_quantize", "fake_quantize_backward"])
def test_fake_quantize_opcheck(gpu_backend: str, name: str) -> None:
    x, scale, zero_point = _case((3, 5, 7, 9), torch.float32, 1, False)
    x = x.nan_to_num(0, 1, -1)
    arguments = (x, scale, zero_point.int(), 4, 1)
    with adadfq.use_backend(gpu_backend):
        operator = getattr(torch.ops.adadfq, name).default
        torch.library.opcheck(operator, (x, *arguments) if name.endswith("backward") else arguments)


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
