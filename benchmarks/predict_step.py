"""How long a step of the game should take on a GPU that is not there: an estimate, and no measurement.

The step runs on fake tensors (:mod:`benchmarks.fake_cuda`), where every kernel it would launch is counted with its
bytes and FLOPs (:mod:`benchmarks.launches`). Of a kernel

    time = max(bytes / (MEMORY_SHARE of the GPU's bandwidth), FLOPs / (share of the unit's rate), least time)

This project's step is replayed as a CUDA graph: the times of its kernels, one after the other, and REPLAY_US. The
authors' is a model, no run of their code: the plain step of :mod:`benchmarks.plain_step` with the network work that
METHOD.md counts, nine forward-equivalents, every operator launched by Python, which takes HOST_US of each: whichever of
host and device takes longer. Their bookkeeping and the times they wait for the device are left out. Low and high ends
are those of the assumed constants, all of which are guesses for a GPU nobody has run this on.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import adadfq
from adadfq.errors import InvalidInputError
from adadfq.generator import build_generator
from adadfq.nn import activations
from benchmarks import fake_cuda, plain_step
from benchmarks.contest import SUITES, Setting, swap_quantizers
from benchmarks.launches import BFLOAT16, LANES, TF32, Call, Counter, Launch
from benchmarks.predict import GPUS, ISSUE_SHARE, MEMORY_SHARE, Gpu

#: Dense FLOPs a second of the matrix units, from the data sheet, and what layers of 16 to 2048 channels get of it.
MATRIX_FLOPS = {"h200": {BFLOAT16: 989e12, TF32: 494e12}}
MATRIX_SHARE = 0.3
#: Least times (low, high) of any kernel of a graph and of a convolution or matrix product, whose sums are long chains.
KERNEL_US, PRODUCT_US = (1.5, 2.0), (3.0, 6.0)
#: Launching a graph.
REPLAY_US = 10.0
#: What Python, autograd and the dispatcher take for an operator that launches something.
HOST_US = (5.0, 8.0)
OURS, AUTHORS = "adadfq", "authors' way"
PARTS = ("teacher", "student", "generator", "losses", "optimizers")
#: Steps of the paper's schedule.
SCHEDULE = 400 * 200
#: Of the batch that the networks are made with on the host.
_SMALL = 2


def rows(gpu_name: str = "h200", settings: Sequence[Setting] | None = None) -> list[dict[str, Any]]:
    """Predictions for this project in both precisions and for the authors' way; see :data:`benchmarks.store.FIELDS`.

    Args:
        gpu_name: one of :data:`MATRIX_FLOPS`.
        settings: by default those of the suite "full".

    Raises:
        InvalidInputError: no such GPU, a setting does not fit, or the steps cannot be run on fake tensors here.
    """
    if gpu_name not in MATRIX_FLOPS:
        raise InvalidInputError(f"gpu must be one of {', '.join(MATRIX_FLOPS)}, got {gpu_name!r}")
    if settings is None:
        settings = [Setting(model=model, batch_size=batch) for model, batch in SUITES["full"]]
    for setting in settings:
        setting.resolved()
    chosen = [[s.model, s.image_size, s.batch_size] for s in settings]
    found: list[dict[str, Any]] = json.loads(fake_cuda.run("benchmarks.predict_step", gpu_name, json.dumps(chosen)))
    return found


def ours(setting: Setting, precision: str, fuse: bool = True) -> list[Call]:
    """What a step of :class:`adadfq.Trainer` launches, both networks in training, ranges frozen."""
    teacher = setting.build().eval()
    student = adadfq.quantize(teacher, setting.weight_bits, setting.act_bits)
    recipe = setting.resolved().replace(precision=precision)
    trainer = adadfq.Trainer(teacher, student, recipe.replace(batch_size=_SMALL), fuse=fuse, progress=False)
    trainer.recipe = trainer.recipe.replace(batch_size=setting.batch_size)
    for act in activations(student).values():
        act.set_calibrating(False)
    with fake_cuda.mode():
        fake_cuda.to_fake(trainer)
        game = trainer.game
        trainer.play()  # which makes the optimizers' state
        with (
            Counter("losses") as counter,
            counter.watch(
                teacher=game.teacher,
                student=game.student,
                generator=game.generator,
                optimizers1=game.optimizer_student,
                optimizers2=game.optimizer_generator,
            ),
        ):
            trainer.play()
    return counter.calls


class _StraightThrough(torch.autograd.Function):
    """The quantiser over [lo, hi] in as few of PyTorch's operators as the authors': 13 of them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, lo: Tensor, hi: Tensor, bits: int) -> Tensor:
        inverse = (2**bits - 1) / torch.clamp(hi - lo, min=1e-8)
        zero_point = torch.round(inverse * lo) + 2 ** (bits - 1)
        code = torch.clamp(torch.round(inverse * x - zero_point), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        return (code + zero_point) / inverse

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return grad, None, None, None


class _Weight(nn.Module):
    """Every output channel over its own ends."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits

    def forward(self, weight: Tensor) -> Tensor:
        flat = weight.detach().flatten(1)
        shape = [-1] + [1] * (weight.dim() - 1)
        return _StraightThrough.apply(weight, flat.amin(1).view(shape), flat.amax(1).view(shape), self.bits)


class _Activation(plain_step.Activation):
    def forward(self, x: Tensor) -> Tensor:
        return _StraightThrough.apply(x, self.lo, self.hi, self.bits)


class AuthorsWay(plain_step.PlainStep):
    """The plain step with what the authors' does besides: METHOD.md, faults 5 and 6.

    For L_G weight gradients of teacher and student are computed too, and not used; the student runs forward a second
    time for L_Q. Upsampled maps are convolved, as in the plain step. Their Adam is taken for a fused one, which is the
    least it could launch.

    Args:
        teacher, student, generator: as :class:`benchmarks.plain_step.PlainStep` takes them.
    """

    def __init__(self, teacher: nn.Module, student: nn.Module, generator: nn.Module, recipe: adadfq.Recipe) -> None:
        super().__init__(teacher, student, generator, recipe)
        teacher.requires_grad_(True)
        betas = (recipe.adam_betas[0], recipe.adam_betas[1])
        self.optimizer_generator = torch.optim.Adam(
            self.generator_parameters, lr=recipe.lr_generator, betas=betas, fused=True
        )
        for group in self.optimizer_student.param_groups:
            group["foreach"] = True  # PyTorch's default for tensors that are not fake

    def step(self, noise: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Update both players; returns (L_G, L_Q) before it."""
        images = self.generator(noise, labels)
        teacher_logits, loss_bns = self.teacher(images)
        loss_generator, _ = self.losses(teacher_logits, self.student(images), labels, loss_bns, self.recipe)
        self.optimizer_generator.zero_grad()
        loss_generator.backward()
        self.optimizer_generator.step()

        student_logits, temperature = self.student(images.detach()), self.recipe.temperature
        difference = (teacher_logits.detach() - student_logits) / temperature
        loss_student = temperature**2 * (F.softmax(difference, 1) * F.log_softmax(difference, 1)).sum(1).mean()
        self.optimizer_student.zero_grad()
        loss_student.backward()
        self.optimizer_student.step()
        return loss_generator.detach(), loss_student.detach()


def authors(setting: Setting) -> list[Call]:
    """What a step the authors' way launches, in float32."""
    recipe = setting.resolved()
    teacher = setting.build().eval()
    student = swap_quantizers(
        adadfq.quantize(teacher, setting.weight_bits, setting.act_bits),
        lambda layer: plain_step.Conv2d(layer, layer.weight_bits),
        lambda layer: plain_step.Linear(layer, layer.weight_bits),
        lambda act: _Activation(act.running_min, act.running_max, act.act_bits),
    )
    for module in student.modules():
        if isinstance(module, (plain_step.Conv2d, plain_step.Linear)):
            module.quantizer = _Weight(module.quantizer.bits)
    student.eval()
    generator = plain_step.Generator(recipe).train()
    generator.load_state_dict(build_generator(recipe).state_dict())
    with fake_cuda.mode():
        fake_cuda.replace_tensors(teacher, student, generator)
        player = AuthorsWay(teacher, student, generator, recipe)

        def play() -> None:
            noise = torch.randn(recipe.batch_size, recipe.latent_dim, device="cuda")
            player.step(noise, torch.randint(recipe.num_classes, (recipe.batch_size,), device="cuda"))

        play()
        with (
            Counter("losses") as counter,
            counter.watch(
                teacher=player.teacher,
                student=player.student,
                generator=player.generator,
                optimizers1=player.optimizer_student,
                optimizers2=player.optimizer_generator,
            ),
        ):
            play()
    return counter.calls


def kernel_us(launch: Launch, gpu: Gpu, matrix_flops: dict[str, float]) -> tuple[float, float]:
    """Microseconds of a kernel, (low, high)."""
    lanes = 2 * gpu.lanes * gpu.hertz * ISSUE_SHARE
    rate = lanes if launch.unit == LANES else MATRIX_SHARE * matrix_flops[launch.unit]
    work = max(launch.nbytes / (MEMORY_SHARE * gpu.bytes_per_s), launch.flops / rate) * 1e6
    low, high = (max(work, least) for least in (PRODUCT_US if launch.flops else KERNEL_US))
    return low, high


def row(way: str, setting: Setting, precision: str, calls: Sequence[Call], gpu_name: str) -> dict[str, Any]:
    """A row of what was counted; see :data:`benchmarks.store.FIELDS`."""
    gpu, matrix_flops = GPUS[gpu_name], MATRIX_FLOPS[gpu_name]
    parts = [
        _part(name, pass_, [c for c in calls if c.part == name and c.backward == (pass_ == "backward")], gpu, gpu_name)
        for name in PARTS
        for pass_ in ("forward", "backward")
    ]
    kernels = [launch for call in calls for launch in call.launches]
    device = [sum(times) for times in zip(*(kernel_us(k, gpu, matrix_flops) for k in kernels), strict=True)]
    if way == OURS:
        low, high = (us + REPLAY_US for us in device)
    else:
        low, high = (max(us, host * len(calls)) for us, host in zip(device, HOST_US, strict=True))
    return {
        "case": setting.case(),
        "way": way,
        "model": setting.model,
        "image_size": setting.resolved().image_size,
        "batch_size": setting.batch_size,
        "precision": precision,
        "gpu": gpu.title,
        "parts": [part for part in parts if part["launches"]],
        "operators": len(calls),
        "launches": len(kernels),
        "nbytes": sum(k.nbytes for k in kernels),
        "flops": sum(k.flops for k in kernels),
        "device_low_us": device[0],
        "device_high_us": device[1],
        "predicted_low_us": low,
        "predicted_high_us": high,
    }


def _part(name: str, pass_: str, calls: Iterable[Call], gpu: Gpu, gpu_name: str) -> dict[str, Any]:
    kernels = [launch for call in calls for launch in call.launches]
    times = [kernel_us(kernel, gpu, MATRIX_FLOPS[gpu_name]) for kernel in kernels]
    return {
        "part": name,
        "pass": pass_,
        "launches": len(kernels),
        "nbytes": sum(k.nbytes for k in kernels),
        "flops": sum(k.flops for k in kernels),
        "device_low_us": sum(low for low, _ in times),
        "device_high_us": sum(high for _, high in times),
    }


def main(gpu_name: str, chosen: str) -> None:
    """Print the rows of settings given as JSON; in the process of :func:`benchmarks.fake_cuda.run`."""
    found = []
    for model, image_size, batch_size in json.loads(chosen):
        setting = Setting(model=model, image_size=image_size, batch_size=batch_size)
        for precision in ("float32", "bfloat16"):
            found.append(row(OURS, setting, precision, ours(setting, precision), gpu_name))
        found.append(row(AUTHORS, setting, "float32", authors(setting), gpu_name))
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
