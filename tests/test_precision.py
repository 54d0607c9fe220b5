"""bfloat16: what is exact in it, what stays in float32, and how far a step is from float32's."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from toy import plus_settings, toy_recipe, toy_teacher

import adadfq
from adadfq import functional as F
from adadfq.game import METRICS
from adadfq.nn import activations, set_calibrating


@pytest.mark.parametrize("bits", range(2, 9))
def test_codes_are_exact_in_bfloat16(bits: int) -> None:
    levels = torch.arange(2**bits, dtype=torch.float32)
    torch.manual_seed(0)
    for zero_point in (0, 2 ** (bits - 1), 2**bits - 1):
        for scale in (torch.rand(50) * 3 + 1e-3).tolist():
            qparams = (torch.tensor(scale), torch.tensor(zero_point, dtype=torch.int32))
            exact = (levels - zero_point) * scale
            assert torch.equal(F.fake_quantize(exact, *qparams, bits), exact)
            # Up to 7 bits a level rounded to bfloat16 still has its own code; at 8 bits, the significand's own
            # width, it may look like its neighbour.
            rounded = F.fake_quantize(exact.bfloat16(), *qparams, bits)
            moved = (rounded.float() / scale - (levels - zero_point)).abs()
            assert bool((moved <= (0.5 if bits < 8 else 1.5)).all())
    whole = torch.arange(-(2**bits) + 1, 2**bits, dtype=torch.float32)
    assert torch.equal(whole.bfloat16().float(), whole)


def test_quantisers_choose_codes_in_float32(bits: int = 4) -> None:
    torch.manual_seed(0)
    x, residual = (torch.randn(4, 6, 8, 8).bfloat16() for _ in range(2))
    scale, shift = torch.rand(6) + 0.5, torch.randn(6)
    qparams = (torch.tensor(0.173), torch.tensor(2, dtype=torch.int32), bits)
    want = F.affine_act_quantize(x.float(), scale, shift, residual.float(), "relu", qparams)
    assert torch.equal(F.affine_act_quantize(x, scale, shift, residual, "relu", qparams), want)
    got = F.affine_act_fake_quantize(x, scale, shift, residual, "relu", qparams)
    assert torch.equal(got, ((want.int() - 2) * 0.173).bfloat16())


class _Convolutions(TorchDispatchMode):
    """Collects the dtypes of activations that convolutions take."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func in (torch.ops.aten.convolution.default, torch.ops.aten.convolution_backward.default):
            self.dtypes.add(args[0].dtype)
        return func(*args, **(kwargs or {}))


def _trainer(fuse: bool = True, **settings: object) -> adadfq.Trainer:
    teacher = toy_teacher()
    student = adadfq.quantize(teacher, 4, 4)
    return adadfq.Trainer(teacher, student, toy_recipe(**settings), fuse=fuse, progress=False)


@pytest.mark.parametrize("generator", ["label_embedding", "conditional_bn"])
def test_only_activations_are_bfloat16(generator: str) -> None:
    trainer = _trainer(generator=generator, precision="bfloat16")
    logits: list[Tensor] = []
    for network in (trainer.game.teacher, trainer.game.student):
        network.register_forward_hook(lambda module, args, output: logits.append(output))
    with _Convolutions() as seen:
        metrics = trainer.play()
        set_calibrating(trainer.student, False)
        trainer.play()
    assert seen.dtypes == {torch.bfloat16}
    assert {x.dtype for x in logits} == {torch.float32} and metrics.dtype == torch.float32
    for model in (trainer.student, trainer.generator, trainer.teacher):
        kinds = {t.dtype for t in model.state_dict().values() if t.is_floating_point()}
        assert kinds == {torch.float32}
    assert all(
        p.grad.dtype == torch.float32 for p in trainer.game.student_parameters + trainer.game.generator_parameters
    )
    assert all(act.scale.dtype == torch.float32 for act in activations(trainer.student).values())
    assert not _dtypes_of(_trainer(generator=generator)) - {torch.float32}


def _dtypes_of(trainer: adadfq.Trainer) -> set[torch.dtype]:
    with _Convolutions() as seen:
        trainer.play()
    return seen.dtypes


def test_a_bfloat16_step_is_near_float32s() -> None:
    results = []
    for precision in ("float32", "bfloat16"):
        # Bounds that no H' exceeds: the toy's entropies differ by less than rounding.
        trainer = _trainer(precision=precision, batch_size=64, lambda_l=0.0, lambda_u=1.0)
        metrics = trainer.play()
        parameters = (trainer.game.generator_parameters, trainer.game.student_parameters)
        results.append((metrics, *(torch.cat([p.grad.flatten() for p in group]) for group in parameters)))
    (metrics, *gradients), (metrics16, *gradients16) = results
    losses = [i for i, name in enumerate(METRICS) if name.startswith("loss")]
    torch.testing.assert_close(metrics16[losses], metrics[losses], rtol=0.02, atol=1e-3)
    for got, want in zip(gradients16, gradients, strict=True):
        assert torch.nn.functional.cosine_similarity(got, want, dim=0) > 0.97
        assert not torch.equal(got, want)


@pytest.mark.parametrize("fuse", [True, False])
def test_adadfq_plus_in_bfloat16_is_near_float32s(fuse: bool) -> None:
    """A run with the recipe's settings, from warm-up over the preparation of the quantisers to learned steps."""
    runs = []
    for precision in ("float32", "bfloat16"):
        settings = {**plus_settings(), "batch_size": 64, "lambda_l": 0.0, "lambda_u": 1.0}
        trainer = _trainer(fuse=fuse, precision=precision, **settings)
        with _Convolutions() as seen:
            result = trainer.fit()
        assert (torch.bfloat16 in seen.dtypes) == (precision == "bfloat16")
        assert {tensor.dtype for pair in trainer.game.log_steps for tensor in pair} == {torch.float32}
        runs.append((trainer.epoch_metrics, result.student.state_dict()))
    (epochs, student), (epochs16, student16) = runs
    for found, expected in zip(epochs16, epochs, strict=True):
        for name in expected:
            if name.startswith("loss"):
                assert math.isfinite(found[name])
                # What the student is apart from its teacher by is a sum of small differences.
                close = {"rel": 0.15} if name == "loss_features" else {"rel": 1e-3, "abs": 5e-3}
                assert found[name] == pytest.approx(expected[name], **close), name
    # Of a layer's steps, the ranges they start from differ by a share or two of those tried.
    for key, value in student.items():
        if key.endswith("scale"):
            assert float((student16[key] - value).norm()) < 0.05 * float(value.norm()), key
    assert any(not torch.equal(student16[key], value) for key, value in student.items())


def test_the_precision_is_one_of_two() -> None:
    with pytest.raises(adadfq.InvalidInputError, match="precision must be one of float32, bfloat16, got 'float16'"):
        toy_recipe(precision="float16")
