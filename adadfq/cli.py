"""The ``adadfq`` command: demo, quantize, evaluate, info.

Nothing heavy is imported until a command runs. The options of ``quantize`` that set the recipe are made from the
fields of :class:`adadfq.recipe.Recipe`, so that the command line and the Python API have one schema.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import sys
import types
import typing
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from adadfq.errors import AdadfqError, InvalidInputError
from adadfq.version import __version__

if TYPE_CHECKING:
    import torch

    from adadfq.recipe import Recipe
    from adadfq.scoring import Accuracy, ScoringSet

EXIT_ERROR = 2
EXIT_INTERRUPTED = 130

DEFAULT_RECIPE = "adadfq_plus"
#: Recipe fields that are no options.
NOT_OPTIONS = ("name", "source", "by_weight_bits")


class _Main(click.Group):
    """Prints errors adadfq raises on purpose as one line; everything else is a bug and keeps its traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with warnings.catch_warnings():
                warnings.showwarning = _show_warning
                return super().invoke(ctx)
        except AdadfqError as error:
            click.echo("error: " + " ".join(str(error).split("\n")), err=True)
            ctx.exit(EXIT_ERROR)
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            ctx.exit(EXIT_INTERRUPTED)


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    click.echo(f"{'warning' if issubclass(category, UserWarning) else category.__name__}: {message}", err=True)


@click.group(cls=_Main, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, message="adadfq %(version)s")
def main() -> None:
    """Quantise vision networks to 2-8 bits without data, by an adaptive generator (AdaDFQ, CVPR 2023)."""


# -------------------------------------------------------------------------------------------------- shared options


class _Numbers(click.ParamType):
    """Comma-separated numbers; an empty string is none of them."""

    def __init__(self, kind: type) -> None:
        self.kind = kind
        self.name = f"{'int' if kind is int else 'float'},..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[Any, ...]:
        if isinstance(value, tuple):
            return value
        try:
            return tuple(self.kind(part) for part in value.split(",")) if value.strip() else ()
        except ValueError:
            self.fail(f"expected {self.kind.__name__} numbers separated by commas, got {value!r}", param, ctx)


_WORDS = {"True": True, "False": False, "None": None}


def _model_arguments(_: click.Context, param: click.Parameter, values: tuple[str, ...]) -> dict[str, Any]:
    arguments: dict[str, Any] = {}
    for item in values:
        key, equals, text = item.partition("=")
        if not equals or not key.isidentifier():
            raise click.BadParameter(f"expected key=value, got {item!r}", param=param)
        try:
            arguments[key] = _WORDS[text] if text in _WORDS else json.loads(text)
        except ValueError:
            arguments[key] = text
    return arguments


_model_arg = click.option(
    "--model-arg",
    "model_args",
    multiple=True,
    metavar="KEY=VALUE",
    callback=_model_arguments,
    help="Argument for the model's callable; a JSON value, or text. Repeatable.",
)
_device = click.option(
    "--device", "device_name", default="auto", metavar="auto|cpu|cuda[:i]", show_default=True, help="Where to run."
)


def _pick_device(name: str) -> torch.device:
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InvalidInputError(f"device must be auto, cpu, cuda or cuda:i, got {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise InvalidInputError(f"device must be auto, cpu, cuda or cuda:i, got {name!r}")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            seen = f"{count} CUDA device(s)" if count else "no CUDA device"
            raise InvalidInputError(f"device {name!r} was asked for, torch sees {seen}; use --device auto")
    return device


# -------------------------------------------------------------------------------------------------------- quantize


@functools.cache
def recipe_options() -> tuple[click.Option, ...]:
    """One option for every field of :class:`~adadfq.recipe.Recipe` but :data:`NOT_OPTIONS`; None where not given."""
    from adadfq.recipe import Recipe

    hints = typing.get_type_hints(Recipe)
    return tuple(
        _field_option(field, hints[field.name]) for field in dataclasses.fields(Recipe) if field.name not in NOT_OPTIONS
    )


def _field_option(field: dataclasses.Field[Any], hint: Any) -> click.Option:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):  # X | None
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    flag = "--" + field.name.replace("_", "-")
    settings: dict[str, Any] = {"default": None, "help": field.metadata["help"]}
    if hint is bool:
        return click.Option([f"{flag}/--no-{flag[2:]}", field.name], **settings)
    if choices := field.metadata.get("choices"):
        settings["type"] = click.Choice(list(choices))
    elif typing.get_origin(hint) is tuple:
        settings["type"] = _Numbers(typing.get_args(hint)[0])
    else:
        settings["type"] = {int: click.INT, float: click.FLOAT, str: click.STRING}[hint]
    return click.Option([flag, field.name], **settings)


class _RecipeCommand(click.Command):
    """A command with the recipe's options behind its own; the recipe is imported when they are needed."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        return [*super().get_params(ctx), *recipe_options()]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        own = [param for param in super().get_params(ctx) if isinstance(param, click.Option)]
        for title, options in (("Options", own), ("Settings of the recipe", recipe_options())):
            records = [record for option in options if (record := option.get_help_record(ctx)) is not None]
            with formatter.section(title):
                formatter.write_dl(records)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        from adadfq.recipe import Recipe

        with formatter.section("Recipes"):
            formatter.write_text(", ".join(Recipe.names()))


@main.command(cls=_RecipeCommand, short_help="Quantise a network without data.")
@click.argument("model")
@click.option("--weights", type=click.Path(path_type=Path), help="The network's weights: .safetensors, .pt, .pth, .th.")
@click.option(
    "--recipe",
    "recipe_name",
    metavar="NAME",
    help="Settings to start from, of those below; adadfq_plus by default, with the model's own number of classes. The "
    "paper's are named after its networks.",
)
@click.option("--weight-bits", type=int, required=True, help="Bits of the weights, 2..8.")
@click.option("--act-bits", type=int, required=True, help="Bits of the activations, 2..8.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="New directory for the result.")
@_model_arg
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the run.")
@_device
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads; torch's choice by default.")
@click.option("--resume", is_flag=True, help="Continue the run in --out.")
def quantize(
    model: str,
    weights: Path | None,
    recipe_name: str | None,
    weight_bits: int,
    act_bits: int,
    out: Path,
    model_args: dict[str, Any],
    seed: int,
    device_name: str,
    threads: int | None,
    resume: bool,
    **overrides: Any,
) -> None:
    """Quantise MODEL without data and write the result to --out.

    MODEL is a built-in (resnet20, resnet32, resnet44, resnet56), module.path:callable
    (torchvision.models:resnet18), or path/to/file.py:callable. The options of the second group replace single
    settings of the recipe.
    """
    import torch

    import adadfq
    from adadfq.checkpoint import load_weights, read_state_dict
    from adadfq.files import check_new_directory
    from adadfq.models import BUILTINS, build_model
    from adadfq.players import count_classes
    from adadfq.recipe import Recipe

    if not resume:
        check_new_directory(out)  # before anything is read or built
    given = {name: value for name, value in overrides.items() if value is not None}
    recipe = Recipe.named(recipe_name or DEFAULT_RECIPE, weight_bits=weight_bits, **given)
    device = _pick_device(device_name)
    if threads is not None:
        torch.set_num_threads(threads)
    if weights is None and model in BUILTINS:
        raise InvalidInputError(f"model {model!r} has no weights of its own; give them with --weights FILE")
    teacher = build_model(model, **model_args)
    if weights is not None:
        load_weights(teacher, read_state_dict(weights), weights)
    else:
        click.echo(f"note: no --weights: {model} keeps the weights its callable gives it", err=True)
    teacher.eval()
    if recipe_name is None and "num_classes" not in given:
        recipe = _with_classes(recipe, count_classes(teacher, recipe), model, "image_size" in given)
    student = adadfq.quantize(teacher, weight_bits, act_bits)
    trainer = adadfq.Trainer(teacher, student, recipe, seed=seed, device=device)
    click.echo(str(adadfq.report(student)))
    result = trainer.fit(out, resume=resume)
    for name, value in result.metrics.items():
        click.echo(f"{name:<20} {value:.4f}" if isinstance(value, float) else f"{name:<20} {value}")
    click.echo(f"{result.status}: {result.directory}")
    if result.status == "interrupted":
        click.echo("continue with the same command and --resume", err=True)
        sys.exit(EXIT_INTERRUPTED)


def _with_classes(recipe: Recipe, classes: int | None, model: str, knows_size: bool) -> Recipe:
    """`recipe` for a model with another number of classes: then its images are other ones too, of a size to be told."""
    if classes in (None, recipe.num_classes):
        return recipe
    if not knows_size:
        raise InvalidInputError(
            f"{model} has {classes} classes: say what images it takes, with --image-size {recipe.image_size} or "
            "another, or take a recipe such as --recipe adadfq_plus_imagenet"
        )
    click.echo(f"note: num_classes={classes}, as many as {model} has logits", err=True)
    return recipe.replace(num_classes=classes)


# -------------------------------------------------------------------------------------------------------- evaluate


@main.command(short_help="Score a result, and its teacher, on labelled images.")
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    required=True,
    help="A folder or zip of class folders, or an .npz with `images` and `labels`.",
)
@click.option("--batch-size", type=click.IntRange(min=1), default=100, show_default=True, help="Images at a time.")
@click.option("--mean", type=_Numbers(float), help="Per-channel mean; the recipe's by default.")
@click.option("--std", type=_Numbers(float), help="Per-channel standard deviation; the recipe's by default.")
@click.option("--image-size", type=click.IntRange(min=1), help="Size of the input; the recipe's by default.")
@click.option(
    "--json",
    "json_file",
    is_flag=False,
    flag_value="-",
    metavar="[FILE]",
    help="JSON instead of the table, or to FILE.",
)
@click.option("--model", "spec", metavar="SPEC", help="Build this network instead of the one the result names.")
@_model_arg
@click.option("--trust-model-code", is_flag=True, help="Run the model code that the result names, whatever it is.")
@_device
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads; torch's choice by default.")
def evaluate(
    run: Path,
    data: Path,
    batch_size: int,
    mean: tuple[float, ...] | None,
    std: tuple[float, ...] | None,
    image_size: int | None,
    json_file: str | None,
    spec: str | None,
    model_args: dict[str, Any],
    trust_model_code: bool,
    device_name: str,
    threads: int | None,
) -> None:
    """Top-1 accuracy of the result in directory RUN and of its teacher on labelled images.

    The images only score: nothing is trained or calibrated on them.
    """
    import torch

    from adadfq import scoring
    from adadfq.models import build_model
    from adadfq.result import load, load_teacher, read_result

    if model_args and spec is None:
        raise InvalidInputError("--model-arg is for --model, which is missing; give both")
    device = _pick_device(device_name)
    if threads is not None:
        torch.set_num_threads(threads)
    record = read_result(run)
    recipe = record["recipe"]
    images = scoring.open_images(
        data,
        image_size=image_size or recipe["image_size"],
        num_classes=recipe["num_classes"],
        mean=recipe["mean"] if mean is None else mean,
        std=recipe["std"] if std is None else std,
        channels=recipe["image_channels"],
    )

    network = None if spec is None else build_model(spec, **model_args)  # copied by both loaders
    networks = {
        "teacher": load_teacher(run, model=network, trust_model_code=trust_model_code),
        "student": load(run, model=network, trust_model_code=trust_model_code),
    }
    scores = scoring.evaluate(networks, images, batch_size, device, progress=True)
    if json_file is not None:
        _write_scores(json_file, _score_record(run, record, images, scores))
    if json_file != "-":
        click.echo(_score_table(record["quantization"], images, scores))


def _score_record(run: Path, record: dict[str, Any], images: ScoringSet, scores: dict[str, Accuracy]) -> dict[str, Any]:
    return {
        "run": str(run),
        "data": images.name,
        "images": len(images),
        "classes": list(images.class_names),
        "ignored_files": images.ignored,
        "quantization": record["quantization"],
        "status": record["status"],
        **{name: score.to_dict() for name, score in scores.items()},
        "adadfq": __version__,
    }


def _write_scores(file: str, scores: dict[str, Any]) -> None:
    from adadfq.files import write_json

    if file == "-":
        click.echo(json.dumps(scores, indent=2))
    else:
        write_json(file, scores)


def _score_table(quantization: dict[str, Any], images: ScoringSet, scores: dict[str, Accuracy]) -> str:
    bits = f"{quantization['weight_bits']}w{quantization['act_bits']}a"
    lines = [f"{images.name}: {len(images)} images, {images.num_classes} classes"]
    if images.ignored:
        lines.append(f"{images.ignored} file(s) that are not images were ignored")
    lines.append(f"{'':<16}{'top-1 %':>9}{'+- s.e.':>9}{'correct':>10}{'images':>9}")
    for name, score in scores.items():
        label = f"{name} {bits}" if name == "student" else name
        lines.append(f"{label:<16}{score.top1:>9.2f}{score.standard_error:>9.2f}{score.correct:>10}{score.count:>9}")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------- info and demo


@main.command(short_help="Versions, devices, what was built, which backend serves what.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def info(as_json: bool) -> None:
    """Print versions, devices, what was built, and which backend serves each operator, or why not."""
    from adadfq.info import collect, format_text

    facts = collect()
    click.echo(json.dumps(facts, indent=2) if as_json else format_text(facts))


@main.command(short_help="Quantise a small digit classifier; needs no download.")
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("adadfq-demo"), show_default=True, help="New directory."
)
@click.option("--bits", type=_Numbers(int), default="4,3", show_default=True, help="Widths to quantise to.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the runs.")
def demo(out: Path, bits: tuple[int, ...], seed: int) -> None:
    """Quantise a small classifier of handwritten digits without data, and score it on held-out digits."""
    for module, package in (("sklearn", "scikit-learn"), ("matplotlib", "matplotlib")):
        if importlib.util.find_spec(module) is None:
            raise AdadfqError(f"the demo needs {package}, which is not installed; run: pip install -e '.[demo]'")
    from adadfq.demo.run import run

    run(out=out, bits=bits, seed=seed)
