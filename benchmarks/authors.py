"""The authors' published step, run from a checkout of their repository (hfutqian/AdaDFQ).

Nothing of theirs is here: their files are read from the checkout, changed in memory where they do not run, and
forgotten. Changed are, and nothing else:

- `main.py` cannot be parsed; of it only the two generators are needed, and only their text is compiled.
- The 200 iterations of an epoch become one, so that a step is a call of their ``train``.
- The zeros of length 16 in their margin loss become as long as the batch; a view of a transposed tensor in their
  accuracy, which PyTorch has not allowed for years, becomes a reshape.
- Without CUDA, ``.cuda()`` returns what it is called on while their code runs.
- What they print is thrown away; a module they import for colours is replaced where it is missing.

Their networks come from pytorchcv and return a pair; here they are those of the other players, with their quantisers
in the places of this project's. Their average of ranges does not settle (it applies its bias correction recursively):
ranges are given, and frozen, as they are in all but the first epochs.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import io
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import adadfq
from adadfq.errors import InvalidInputError
from benchmarks.contest import Start, Step, swap_quantizers

#: The recipe's generator -> folder of the checkout. They differ in the temperature that is written into the trainer.
_FOLDERS = {"label_embedding": ("CIFAR", 20.0), "conditional_bn": ("ImageNet", 5.0)}
_GENERATORS = {"label_embedding": "Generator", "conditional_bn": "Generator_imagenet"}
#: This project's name of a module of the generator -> theirs.
_GENERATOR_MODULES = {
    "label_embedding": {
        "label_embedding": "label_emb",
        "project": "l1.0",
        "norm1": "conv_blocks0.0",
        "conv2": "conv_blocks1.0",
        "norm2": "conv_blocks1.1",
        "conv3": "conv_blocks2.0",
        "norm3": "conv_blocks2.1",
        "to_image": "conv_blocks2.3",
        "image_norm": "conv_blocks2.5",
    },
    "conditional_bn": {
        "project": "l1.0",
        "conv2": "conv_blocks1_0",
        "conv3": "conv_blocks2_0",
        "to_image": "conv_blocks2_3",
        "image_norm": "conv_blocks2_5",
        **{
            f"{ours}.{part}": theirs + suffix
            for ours, theirs in (("norm1", "conv_blocks0_0"), ("norm2", "conv_blocks1_1"), ("norm3", "conv_blocks2_1"))
            for part, suffix in (("norm", ""), ("weight", ".weights"), ("bias", ".biases"))
        },
    },
}
_NOT_THEIRS = "is not a checkout of hfutqian/AdaDFQ as this benchmark knows it"


class _Pair(nn.Module):
    """A network whose forward gives (logits, feature) when asked, as their trainer does; it never reads the feature."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor, out_feature: bool = False) -> Any:
        logits = self.network(images)
        return (logits, logits) if out_feature else logits


class AuthorsStep:
    """Their trainer, one iteration a step: see :class:`benchmarks.players.Player`.

    Args:
        start: where every player begins.
        checkout: folder that holds AdaDFQ/CIFAR and AdaDFQ/ImageNet.

    Raises:
        InvalidInputError: `checkout` is not theirs, or the recipe's temperature is not the one written into their code.
    """

    def __init__(self, start: Start, checkout: Path) -> None:
        recipe = start.recipe
        folder_name, temperature = _FOLDERS[recipe.generator]
        if recipe.temperature != temperature:
            raise InvalidInputError(
                f"their trainer for {folder_name} has temperature {temperature:g}, the recipe {recipe.temperature:g}"
            )
        self._start, self._cpu = start, start.device.type == "cpu"
        code = _load(checkout / "AdaDFQ" / folder_name, _GENERATORS[recipe.generator])
        settings = SimpleNamespace(
            nGPU=1,
            GPU=0,
            batchSize=recipe.batch_size,
            latent_dim=recipe.latent_dim,
            nClasses=recipe.num_classes,
            img_size=recipe.image_size,
            channels=recipe.image_channels,
            momentum=recipe.momentum,
            weightDecay=recipe.weight_decay,
            lr_G=recipe.lr_generator,
            b1=recipe.adam_betas[0],
            b2=recipe.adam_betas[1],
            nEpochs=recipe.epochs,
            warmup_epochs=0,  # both networks train
            **{
                name: getattr(recipe, name)
                for name in ("alpha_ds", "alpha_as", "lambda_l", "lambda_u", "beta", "gamma")
            },
        )
        student = _Pair(_student(start, code.quantizers))
        teacher = _Pair(start.teacher()).requires_grad_(True).eval()
        with self._running():
            generator = code.generator(settings).to(start.device)
            self._names = _GENERATOR_MODULES[recipe.generator]
            self._take_weights(generator, start)
            policies = {}
            for player, rate in (("lr_master_S", recipe.lr_student), ("lr_master_G", recipe.lr_generator)):
                policies[player] = code.utils.LRPolicy(rate, recipe.epochs, "multi_step")
                policies[player].set_params({"step": list(recipe.lr_milestones), "decay_rate": recipe.lr_decay})
            self.trainer = code.trainer(
                model=student,
                model_teacher=teacher,
                generator=generator,
                train_loader=None,
                test_loader=None,
                settings=settings,
                logger=None,
                **policies,
            )
        # They hook the teacher's BatchNorm in epoch 0, whatever the call.
        self._epoch = 0
        self.parts = {"teacher": teacher, "student": student, "generator": generator}
        quantizers = code.quantizers
        self.quantizers = (quantizers.QuantAct, quantizers.Quant_Conv2d, quantizers.Quant_Linear)

    @contextlib.contextmanager
    def _running(self) -> Iterator[None]:
        """Their code runs inside: silent, and on a CPU without CUDA."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
            if self._cpu:
                for owner in (Tensor, nn.Module):
                    stack.enter_context(mock.patch.object(owner, "cuda", lambda self, *_, **__: self))
                stack.enter_context(mock.patch.object(torch.cuda, "device_count", lambda: 1))
            yield

    def _take_weights(self, generator: nn.Module, start: Start) -> None:
        source = start.generator().state_dict()
        state = {_their_name(name, self._names): value for name, value in source.items()}
        generator.load_state_dict(state)

    def __call__(self) -> None:
        with self._running():
            self.trainer.train(self._epoch)
        self._epoch = 1

    eagerly = __call__

    def checked(self, noise: Tensor, labels: Tensor) -> Step:
        with (
            mock.patch.object(torch, "randn", lambda *_, **__: noise.clone()),
            mock.patch.object(torch, "randint", lambda *_, **__: labels.clone()),
        ):
            self()
        losses = [self.trainer.scalar_info[f"{player} loss every epoch"] for player in "GS"]
        theirs = dict(self.trainer.generator.named_parameters())
        generator = {
            name: theirs[_their_name(name, self._names)].grad for name, _ in self._start.generator().named_parameters()
        }
        student = {name: p.grad for name, p in self.trainer.model.network.named_parameters()}
        return Step(*(float(loss.detach()) for loss in losses), generator, student)


def _their_name(name: str, modules: dict[str, str]) -> str:
    module, _, parameter = name.rpartition(".")
    return f"{modules[module]}.{parameter}"


def _student(start: Start, quantizers: ModuleType) -> nn.Module:
    def layer(cls: type[nn.Module]) -> Any:
        def make(source: Any) -> nn.Module:
            made = cls(weight_bit=source.weight_bits)
            made.set_param(source)
            return made

        return make

    def activation(source: adadfq.nn.QuantAct) -> nn.Module:
        made = quantizers.QuantAct(activation_bit=source.act_bits)
        made.x_min, made.x_max = source.running_min.reshape(1).clone(), source.running_max.reshape(1).clone()
        made.fix()
        return made

    layers = (layer(quantizers.Quant_Conv2d), layer(quantizers.Quant_Linear))
    return swap_quantizers(start.student(), *layers, activation).to(start.device).eval()


# ------------------------------------------------------------------------------------------------- reading their files


#: File -> what of it does not run here (statement or expression) -> what stands there instead.
_MENDED = {
    "trainer.py": {
        "iters = 200": "iters = 1",
        "torch.zeros(16)": "torch.zeros(len(teacher_out))",
    },
    "utils/compute.py": {"correct[:k].view(-1)": "correct[:k].reshape(-1)"},
}


def _load(folder: Path, generator: str) -> SimpleNamespace:
    """Their code: trainer and generator (classes), quantizers and utils (modules). Leaves no trace in ``sys``."""
    for name in ("main.py", "trainer.py", "utils/compute.py", "quantization_utils", "conditional_batchnorm.py"):
        if not (folder / name).exists():
            raise InvalidInputError(f"{folder.parents[1]} {_NOT_THEIRS}: {folder.name}/{name} is missing")
    with _importing_from(folder):
        utils = importlib.import_module("utils")
        exec(_mended(folder, "utils/compute.py"), vars(sys.modules["utils.compute"]))
        quantizers = importlib.import_module("quantization_utils.quant_modules")
        norms = importlib.import_module("conditional_batchnorm")
        trainer: dict[str, Any] = {"__name__": "trainer"}
        exec(_mended(folder, "trainer.py"), trainer)
    main: dict[str, Any] = {"__name__": "main", "torch": torch, "nn": nn, **vars(norms)}
    exec(compile(_generators(folder / "main.py"), str(folder / "main.py"), "exec"), main)
    return SimpleNamespace(trainer=trainer["Trainer"], generator=main[generator], quantizers=quantizers, utils=utils)


def _mended(folder: Path, name: str) -> CodeType:
    """The file's code with what :data:`_MENDED` says; each place must be there, once."""
    left = dict(_MENDED[name])

    class Mend(ast.NodeTransformer):
        def generic_visit(self, node: ast.AST) -> ast.AST:
            if isinstance(node, (ast.Assign, ast.Call)) and (text := ast.unparse(node)) in left:
                statement = ast.parse(left.pop(text)).body[0]
                return statement.value if isinstance(statement, ast.Expr) else statement
            return super().generic_visit(node)

    tree = Mend().visit(ast.parse((folder / name).read_text(encoding="utf-8")))
    if left:
        raise InvalidInputError(
            f"{folder.parents[1]} {_NOT_THEIRS}: {folder.name}/{name} has no {' and no '.join(left)}"
        )
    return compile(ast.fix_missing_locations(tree), str(folder / name), "exec")


def _generators(path: Path) -> str:
    """The text of main.py's generators, which stand before the class that cannot be parsed."""
    text = path.read_text(encoding="utf-8")
    found = re.search(r"^class Generator\(.*?(?=^class ExperimentDesign)", text, re.DOTALL | re.MULTILINE)
    if found is None:
        raise InvalidInputError(f"{path.parents[2]} {_NOT_THEIRS}: main.py defines no generators")
    return found.group()


@contextlib.contextmanager
def _importing_from(folder: Path) -> Iterator[None]:
    """Imports inside look in `folder` first; what they import from there is not in ``sys.modules`` afterwards."""
    names = {path.stem for path in folder.iterdir()}
    ours = {name: module for name, module in sys.modules.items() if name.split(".")[0] in names}
    for name in ours:
        del sys.modules[name]
    stubs = {}
    if importlib.util.find_spec("termcolor") is None:
        stubs["termcolor"] = ModuleType("termcolor")
        stubs["termcolor"].colored = lambda text, *_, **__: text  # type: ignore[attr-defined]
    sys.modules.update(stubs)
    writes = sys.dont_write_bytecode
    sys.dont_write_bytecode = True
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        sys.dont_write_bytecode = writes
        for name in [name for name in sys.modules if name.split(".")[0] in names or name in stubs]:
            del sys.modules[name]
        sys.modules.update(ours)
