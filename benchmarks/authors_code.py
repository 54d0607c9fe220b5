"""The authors' published code, read from a checkout of their repository (hfutqian/AdaDFQ).

Nothing of theirs is here: their files are read from the checkout, changed in memory where they do not run, and
forgotten. Changed are, and nothing else:

- `main.py` cannot be parsed; of it only the two generators are needed, and only their text is compiled.
- The 200 iterations of an epoch become as many as asked for.
- The zeros of length 16 in their margin loss become as long as the batch; a view of a transposed tensor in their
  accuracy, which PyTorch has not allowed for years, becomes a reshape.
- Without CUDA, ``.cuda()`` returns what it is called on while their code runs.
- What they print is thrown away; a module they import for colours is replaced where it is missing.

Their networks come from pytorchcv and return a pair; here they are those of the other players, with their quantisers
in the places of this project's.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import io
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import adadfq
from adadfq.errors import InvalidInputError
from benchmarks.contest import swap_quantizers

#: The recipe's generator -> folder of the checkout. They differ in the temperature that is written into the trainer.
_FOLDERS = {"label_embedding": ("CIFAR", 20.0), "conditional_bn": ("ImageNet", 5.0)}
_GENERATORS = {"label_embedding": "Generator", "conditional_bn": "Generator_imagenet"}
_NOT_THEIRS = "is not a checkout of hfutqian/AdaDFQ as this benchmark knows it"


class Pair(nn.Module):
    """A network whose forward gives (logits, feature) when asked, as their trainer does; it never reads the feature."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor, out_feature: bool = False) -> Any:
        logits = self.network(images)
        return (logits, logits) if out_feature else logits


def load(checkout: Path, recipe: adadfq.Recipe, iterations: int) -> SimpleNamespace:
    """Their code for a recipe's generator; leaves no trace in ``sys``.

    Args:
        checkout: folder that holds AdaDFQ/CIFAR and AdaDFQ/ImageNet.
        recipe: its `generator` chooses between the two.
        iterations: how many an epoch of their trainer has.

    Returns:
        `trainer` and `generator` (classes), `quantizers` and `utils` (modules).

    Raises:
        InvalidInputError: `checkout` is not theirs, or the recipe's temperature is not the one written into their code.
    """
    folder_name, temperature = _FOLDERS[recipe.generator]
    if recipe.temperature != temperature:
        raise InvalidInputError(
            f"their trainer for {folder_name} has temperature {temperature:g}, the recipe {recipe.temperature:g}: "
            f"set temperature={temperature:g}"
        )
    folder = checkout / "AdaDFQ" / folder_name
    for name in ("main.py", "trainer.py", "utils/compute.py", "quantization_utils", "conditional_batchnorm.py"):
        if not (folder / name).exists():
            raise InvalidInputError(f"{checkout} {_NOT_THEIRS}: {folder.name}/{name} is missing")
    with importing_from(folder):
        utils = importlib.import_module("utils")
        exec(mended(folder, "utils/compute.py", iterations), vars(sys.modules["utils.compute"]))
        quantizers = importlib.import_module("quantization_utils.quant_modules")
        norms = importlib.import_module("conditional_batchnorm")
        trainer: dict[str, Any] = {"__name__": "trainer"}
        exec(mended(folder, "trainer.py", iterations), trainer)
    main: dict[str, Any] = {"__name__": "main", "torch": torch, "nn": nn, **vars(norms)}
    exec(compile(_generators(folder / "main.py"), str(folder / "main.py"), "exec"), main)
    generator = main[_GENERATORS[recipe.generator]]
    return SimpleNamespace(trainer=trainer["Trainer"], generator=generator, quantizers=quantizers, utils=utils)


def settings(recipe: adadfq.Recipe, warmup_epochs: int) -> SimpleNamespace:
    """What their trainer and generator read of their options; their student trains from `warmup_epochs` on."""
    return SimpleNamespace(
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
        warmup_epochs=warmup_epochs,
        **{name: getattr(recipe, name) for name in ("alpha_ds", "alpha_as", "lambda_l", "lambda_u", "beta", "gamma")},
    )


def make_trainer(
    code: SimpleNamespace,
    options: SimpleNamespace,
    recipe: adadfq.Recipe,
    teacher: nn.Module,
    student: nn.Module,
    generator: nn.Module,
) -> Any:
    """Their trainer of the three networks; call it inside of :func:`running`."""
    policies = {}
    for player, rate in (("lr_master_S", recipe.lr_student), ("lr_master_G", recipe.lr_generator)):
        policies[player] = code.utils.LRPolicy(rate, recipe.epochs, "multi_step")
        # Their policy needs a step: one behind the last epoch is none.
        steps = list(recipe.lr_milestones) or [recipe.epochs + 1]
        policies[player].set_params({"step": steps, "decay_rate": recipe.lr_decay})
    return code.trainer(
        model=Pair(student),
        model_teacher=Pair(teacher).requires_grad_(True).eval(),
        generator=generator,
        train_loader=None,
        test_loader=None,
        settings=options,
        logger=None,
        **policies,
    )


def student(
    quantized: nn.Module, quantizers: ModuleType, activation: Callable[[Any, adadfq.nn.QuantAct], None]
) -> nn.Module:
    """`quantized`, which :func:`adadfq.quantize` made, with their quantisers in the places of this project's.

    Args:
        activation: called with each of their quantisers of activations and the one in whose place it is.

    Raises:
        InvalidInputError: a weight is quantised outside of a plain convolution or linear layer, where they have none.
    """
    if others := [name for name, module in quantized.named_modules() if isinstance(module, adadfq.nn.QuantWeight)]:
        raise InvalidInputError(
            f"the authors' code quantises plain Conv2d and Linear layers only; this network has others: {others[0]}"
        )

    def layer(cls: type[nn.Module]) -> Any:
        def make(source: Any) -> nn.Module:
            made = cls(weight_bit=source.weight_bits)
            made.set_param(source)
            return made

        return make

    def quantizer(source: adadfq.nn.QuantAct) -> nn.Module:
        made = quantizers.QuantAct(activation_bit=source.act_bits)
        activation(made, source)
        return made

    return swap_quantizers(quantized, layer(quantizers.Quant_Conv2d), layer(quantizers.Quant_Linear), quantizer)


@contextlib.contextmanager
def running(device: torch.device) -> Iterator[None]:
    """Their code runs inside: silent, on a CPU without CUDA, and on a GPU with cuDNN's choice by timing, as theirs."""
    cudnn, benchmark = torch.backends.cudnn, torch.backends.cudnn.benchmark
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.callback(setattr, cudnn, "benchmark", benchmark)
        cudnn.benchmark = True
        if device.type == "cpu":
            for owner in (Tensor, nn.Module):
                stack.enter_context(mock.patch.object(owner, "cuda", lambda self, *_, **__: self))
            stack.enter_context(mock.patch.object(torch.cuda, "device_count", lambda: 1))
        yield


# ------------------------------------------------------------------------------------------------- reading their files

#: File -> what of it does not run here (statement or expression) -> what stands there instead.
_MENDED = {
    "trainer.py": {
        "iters = 200": "iters = {iterations}",
        "torch.zeros(16)": "torch.zeros(len(teacher_out))",
    },
    "utils/compute.py": {"correct[:k].view(-1)": "correct[:k].reshape(-1)"},
}


def mended(folder: Path, name: str, iterations: int) -> CodeType:
    """The file's code with what :data:`_MENDED` says; each place must be there, once."""
    left = {text: replacement.format(iterations=iterations) for text, replacement in _MENDED[name].items()}

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
def importing_from(folder: Path) -> Iterator[None]:
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
