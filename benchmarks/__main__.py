"""``python -m benchmarks``: ops, step, accuracy, ceilings, equality, endurance, predict, against, resources, compare,
judge, routes, plot, readme, results, list."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from adadfq.errors import AdadfqError

EXIT_WRONG = 1
EXIT_ERROR = 2


class _Main(click.Group):
    """Prints errors raised on purpose as one line."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except AdadfqError as error:
            click.echo("error: " + " ".join(str(error).split("\n")), err=True)
            ctx.exit(getattr(error, "exit_status", EXIT_ERROR))


@click.group(cls=_Main, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
def main() -> None:
    """Benchmarks of adadfq. Results are checked in the run that times them; what is wrong gets no time."""


def _words(_: click.Context, __: click.Parameter, value: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in value.split(",") if word.strip())


def _options(*options: Any) -> Any:
    def decorate(function: Any) -> Any:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


_json = click.option("--json", "json_path", type=click.Path(path_type=Path, dir_okay=False), help="Write the results.")
_timing = _options(
    click.option("--device", "device_name", default="cpu", metavar="cpu|cuda", show_default=True, help="Where to run."),
    click.option("--threads", default=2, show_default=True, help="PyTorch's threads."),
    click.option("--rounds", default=21, show_default=True, type=click.IntRange(5), help="Samples of every provider."),
    click.option(
        "--seconds", default=5.0, show_default=True, type=click.FloatRange(0), help="Timing one case takes about this."
    ),
)
_resume = click.option(
    "--resume", is_flag=True, help="Keep what --json FILE holds already, measured alike here at this commit."
)
_case_limit = click.option(
    "--case-limit", type=click.FloatRange(0), metavar="SECONDS", help="End the command within a case that takes longer."
)
_dry_run = click.option("--dry-run", is_flag=True, hidden=True, help="Only look whether the other options fit.")
_selection = _options(
    click.option(
        "--suite", default="quick", show_default=True, metavar="quick|judged|gpu|predicted|full", help="Which cases."
    ),
    click.option("--ops", default="", callback=_words, metavar="OP,...", help="Only these operators."),
    click.option("--filter", "filters", multiple=True, metavar="TEXT", help="Only names that hold or match it."),
    click.option(
        "--providers", default="*", callback=_words, metavar="PATTERN,...", help="Only these, and the copies."
    ),
)


@main.command("list")
@_selection
@click.option("--device", "device_type", default="cpu", metavar="cpu|cuda", show_default=True)
@click.option("--kernels-only", is_flag=True, help="Only cases that a backend other than the reference serves.")
def list_(
    suite: str,
    ops: tuple[str, ...],
    filters: tuple[str, ...],
    providers: tuple[str, ...],
    device_type: str,
    kernels_only: bool,
) -> None:
    """Print the names of cases, and who can compute them here."""
    chosen = _select(suite, ops, filters, providers, device_type, kernels_only)
    from benchmarks.providers import names

    for case in chosen:
        click.echo(f"{case.name}  [{', '.join(names(case, device_type, providers))}]")
    click.echo(f"{len(chosen)} cases", err=True)


def _select(
    suite: str,
    ops: tuple[str, ...],
    filters: tuple[str, ...],
    providers: tuple[str, ...],
    device_type: str,
    kernels_only: bool,
) -> list[Any]:
    from adadfq.errors import InvalidInputError
    from benchmarks.cases import select
    from benchmarks.providers import backends, check_patterns

    chosen = select(suite, ops, filters)
    if kernels_only:
        chosen = [case for case in chosen if backends(case, device_type)]
        if not chosen:
            raise InvalidInputError(
                f"no backend but the reference serves these cases on {device_type}: see 'adadfq info'"
            )
    check_patterns(providers, chosen, device_type)
    return chosen


@main.command()
@_selection
@_timing
@_json
@click.option("--kernels-only", is_flag=True, help="Only cases that a backend other than the reference serves.")
@click.option("--limit", type=click.FloatRange(0), help="Begin no case after so many seconds; the file says which.")
@click.option("--huge-pages", is_flag=True, help="Huge pages under every provider's new tensors (Linux, CPU).")
@_case_limit
@_resume
@_dry_run
def ops(
    suite: str,
    ops: tuple[str, ...],
    filters: tuple[str, ...],
    providers: tuple[str, ...],
    device_name: str,
    threads: int,
    rounds: int,
    seconds: float,
    json_path: Path | None,
    kernels_only: bool,
    limit: float | None,
    huge_pages: bool,
    case_limit: float | None,
    resume: bool,
    dry_run: bool,
) -> None:
    """Time the operators against their rivals and a copy of the same bytes.

    Exits with 1 where a result was wrong.
    """
    from adadfq.ops import routes
    from benchmarks import ratios, store
    from benchmarks.environment import describe, machine, pick_device
    from benchmarks.huge_pages import for_everybody
    from benchmarks.ops import run_case
    from benchmarks.report import judged_text, rows_text
    from benchmarks.turns import in_turn

    if dry_run:  # on a machine without the device, too, and so without our backends for it
        others = tuple(name for name in providers if not name.startswith("adadfq")) or ("*",)
        click.echo(f"{len(_select(suite, ops, filters, others, device_name, False))} cases")
        return
    device = pick_device(device_name, threads)
    chosen = _select(suite, ops, filters, providers, device.type, kernels_only)
    if huge_pages:
        for_everybody()
    environment = describe(device)
    options = {
        "suite": suite,
        "ops": list(ops),
        "filters": list(filters),
        "providers": list(providers),
        "rounds": rounds,
        "seconds": seconds,
    }
    content = store.document("ops", environment, options)
    done = _begin(json_path, content, resume)
    click.echo(machine(environment))
    if environment["native_matches_sources"] is False:
        click.echo("warning: the native modules were not built from this csrc: run 'pip install -e .'", err=True)
    waiting = {case.name: case for case in chosen if case.name not in done}

    def play(case: Any) -> None:
        rows = run_case(case, device, environment, providers, rounds, seconds)
        content["rows"] += rows
        place = 1 + len(waiting) - len(content["left_out"])
        click.echo(f"\n[{place}/{len(waiting)}] {rows_text(rows)}")

    in_turn(waiting, play, content, _writer(json_path, content), limit, case_limit)
    table = routes.current() if device.type == routes.DEVICE_TYPE else None
    if judged := judged_text(ratios.judge(content["rows"], content["left_out"], table=table)):
        click.echo(f"\n{judged}")
    _say_what_is_left(content, len(waiting))
    _exit_if_wrong(content)


def _begin(json_path: Path | None, content: dict[str, Any], resume: bool) -> set[str]:
    """Find out now whether the file can be written; the cases that it holds, and `content` then too, with `resume`.

    A file that cannot be gone on with is kept under another name.
    """
    from benchmarks import store

    if json_path is None:
        if resume:
            raise click.UsageError("--resume goes on with a file: name it with --json")
        return set()
    if resume and (reason := store.go_on_from(json_path, content)) is not None:
        kept = json_path.with_name(f"{json_path.name}.old")
        json_path.replace(kept)
        click.echo(f"begun anew: {reason}; what was there is in {kept.name}", err=True)
    store.write(json_path, content)
    return {row["case"] for row in content["rows"]}


def _writer(json_path: Path | None, content: dict[str, Any]) -> Callable[[], None]:
    from benchmarks import store

    return lambda: None if json_path is None else store.write(json_path, content)


def _say_what_is_left(content: dict[str, Any], of: int) -> None:
    from benchmarks.turns import given_up

    if count := len(content["left_out"]) - len(given_up(content)):
        click.echo(f"the time was up: {count} of {of} cases were not run", err=True)


def _exit_if_wrong(content: dict[str, Any]) -> None:
    from benchmarks.turns import STRIKES, given_up

    wrong = [row for row in content["rows"] if row["status"] == "wrong"]
    for row in wrong:
        click.echo(f"wrong: {row['provider']} on {row['case']}: {row['error']}", err=True)
    for name in (stuck := given_up(content)):
        click.echo(f"given up: {name}, which hung or lost the device {STRIKES} times", err=True)
    if wrong or stuck:
        sys.exit(EXIT_WRONG)


def _numbers(context: click.Context, parameter: click.Parameter, value: str) -> tuple[int, ...]:
    words = _words(context, parameter, value)
    if bad := [word for word in words if not word.isdecimal() or int(word) < 1]:
        raise click.BadParameter(f"must be positive numbers between commas, got {bad[0]!r}")
    return tuple(int(word) for word in words)


@main.command()
@_timing
@_json
@click.option("--suite", default="quick", show_default=True, metavar="quick|judged|gpu|full", help="Which cases.")
@click.option(
    "--model",
    "models",
    default="",
    callback=_words,
    metavar="MODEL,...",
    help="Instead of the suite's: resnet20, resnet18, mobilenet_v2, another built-in, or module.path:callable.",
)
@click.option(
    "--batch-size", "batch_sizes", default="", callback=_numbers, metavar="N,...", help="Instead of the suite's."
)
@click.option("--recipe", help="Recipe whose settings are used; by default the model's.")
@click.option("--image-size", type=int, help="Pixels; by default the recipe's.")
@click.option("--weight-bits", default=4, show_default=True)
@click.option("--act-bits", default=4, show_default=True)
@click.option("--providers", default="*", callback=_words, metavar="PATTERN,...", help="Only these, and the reference.")
@click.option(
    "--authors",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    help="A checkout of hfutqian/AdaDFQ, whose step is timed too.",
)
@click.option("--scaling", "by_size", is_flag=True, help="Time this project's step over batches and sizes instead.")
@click.option(
    "--profile",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Write a Chrome trace of one step of this project's instead.",
)
@_case_limit
@_resume
@_dry_run
def step(
    device_name: str,
    threads: int,
    rounds: int,
    seconds: float,
    json_path: Path | None,
    suite: str,
    models: tuple[str, ...],
    batch_sizes: tuple[int, ...],
    providers: tuple[str, ...],
    authors: Path | None,
    by_size: bool,
    profile: Path | None,
    case_limit: float | None,
    resume: bool,
    dry_run: bool,
    **others: Any,
) -> None:
    """Time one training step of the game, played by this project, plain PyTorch and the authors' code.

    Exits with 1 where a step was wrong.
    """
    from benchmarks import contest, scaling, store
    from benchmarks.environment import describe, machine, pick_device
    from benchmarks.report import step_text
    from benchmarks.step import chosen, run_step, write_trace
    from benchmarks.turns import in_turn

    settings = contest.settings(suite, models, batch_sizes, **others)
    chosen(providers)
    for setting in settings:
        setting.resolved()
    if dry_run:  # on a machine without the device, too
        click.echo(f"{len(settings)} cases")
        return
    device = pick_device(device_name, threads)
    if profile is not None:
        write_trace(profile, settings[0], device)
        click.echo(profile)
        return
    environment = describe(device)
    options = {
        "suite": suite,
        "cases": [setting.case() for setting in settings],
        "providers": list(providers),
        "authors": authors is not None,
        "scaling": by_size,
        "rounds": rounds,
        "seconds": seconds,
    }
    content = store.document("step", environment, options)
    done = _begin(json_path, content, resume)
    click.echo(machine(environment))
    waiting = {setting.case(): setting for setting in settings if setting.case() not in done}

    def play(setting: contest.Setting) -> None:
        if by_size:
            rows = scaling.run_scaling(setting, device, environment, rounds, seconds)
            click.echo(f"\n{step_text(rows)}\n{scaling.scaling_text(rows)}")
        else:
            rows = run_step(setting, device, environment, rounds, seconds, authors, providers)
            click.echo(f"\n{step_text(rows)}")
        content["rows"] += rows

    in_turn(waiting, play, content, _writer(json_path, content), case_limit=case_limit)
    _say_what_is_left(content, len(waiting))
    _exit_if_wrong(content)


def _integers(_: click.Context, param: click.Parameter, value: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in value.split(","))
    except ValueError:
        raise click.BadParameter(f"expected integers separated by commas, got {value!r}", param=param) from None


@main.command()
@click.argument("model")
@click.option("--weights", type=click.Path(path_type=Path, dir_okay=False), help="The network's weights.")
@click.option("--data", type=click.Path(path_type=Path), required=True, help="Images to score on: see adadfq evaluate.")
@click.option("--study", metavar="NAME", help="A named grid: see benchmarks/studies.py.")
@click.option("--recipe", metavar="NAME", help="Settings to start from.")
@click.option("--bits", default="", callback=_words, metavar="BITS,...", help="Widths: 4 for 4w4a, or such as 4w8a.")
@click.option("--seeds", default="1,2,3", callback=_integers, show_default=True, metavar="INT,...")
@click.option("--set", "settings", multiple=True, metavar="FIELD=VALUE", help="Of the recipe, for all runs.")
@click.option("--vary", "variants", multiple=True, metavar='"FIELD=VALUE ..."', help="Of the recipe: one variant each.")
@click.option(
    "--authors",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    help="A checkout of hfutqian/AdaDFQ, whose trainer plays the runs instead.",
)
@click.option(
    "--real-images",
    is_flag=True,
    help="Train on the scoring images, without their labels, in the place of generated ones: a bound, no result.",
)
@click.option("--device", "device_name", default="cpu", metavar="cpu|cuda", show_default=True, help="Where to run.")
@click.option("--threads", default=1, show_default=True, help="PyTorch's threads.")
@_json
@_dry_run
def accuracy(
    model: str,
    weights: Path | None,
    data: Path,
    study: str | None,
    recipe: str | None,
    bits: tuple[str, ...],
    seeds: tuple[int, ...],
    settings: tuple[str, ...],
    variants: tuple[str, ...],
    authors: Path | None,
    real_images: bool,
    device_name: str,
    threads: int,
    json_path: Path | None,
    dry_run: bool,
) -> None:
    """Train MODEL by widths x variants of a recipe x seeds, and score the last epoch of each run.

    --study names a grid (benchmarks/studies.py); --recipe, --bits and --set then change it.

    The file is written after every run. Runs that it holds already are not repeated, and a run that was cut off goes on
    from its last checkpoint while the sources are the same (--authors: begins anew): repeat the command. Several
    processes may work on one file; one that left runs to others exits with 75. A run that another file in the folder
    holds is taken from there.
    """
    from benchmarks import store
    from benchmarks.accuracy import check_grid, key, train_grid
    from benchmarks.accuracy_grid import Grid, command_line, parse_bits, parse_settings
    from benchmarks.accuracy_report import run_text, text
    from benchmarks.environment import describe, machine, pick_device
    from benchmarks.studies import study_grid

    if study is not None:
        if variants:
            raise click.UsageError("--study brings its own variants: leave out --vary")
        grid = study_grid(study, model, recipe, seeds, parse_bits(bits), parse_settings(settings))
    elif recipe is None or not bits:
        raise click.UsageError("give --recipe and --bits, or --study")
    else:
        varied = tuple(parse_settings(variant.split()) for variant in variants) or ({},)
        grid = Grid(model, recipe, parse_bits(bits), seeds, parse_settings(settings), varied)
    count = len(check_grid(grid, authors, real_images))  # what does not fit is said before anything is read
    if dry_run:  # on a machine without the device, too
        click.echo(f"{count} runs")
        return
    environment = describe(pick_device(device_name, threads))
    command = command_line(
        grid, study, settings, variants, weights, data, authors, real_images, device_name, threads, json_path
    )
    content = store.document("accuracy", environment, {"commands": [command]})
    if json_path is not None:
        content = store.merge(json_path, content, key)  # a path that cannot be written is found now
    click.echo(f"{machine(environment)}: {count} runs, {len(content['rows'])} rows in the file")
    if environment["native_matches_sources"] is False:
        click.echo("warning: the native modules were not built from this csrc: run 'pip install -e .'", err=True)
    rows = content["rows"]
    folder = None if json_path is None else json_path.parent

    def stored() -> list[dict[str, Any]]:
        if json_path is not None:
            rows[:] = store.merge(json_path, {**content, "rows": rows}, key)["rows"]  # and what others did meanwhile
        return rows

    def elsewhere(wanted: dict[str, Any]) -> dict[str, Any] | None:
        for path in sorted(folder.glob("*.json")) if folder is not None else ():
            if path != json_path and (found := store.same_run(path, key, wanted)) is not None:
                click.echo(f"from {path.name}:")
                return found
        return None

    try:
        found = train_grid(
            grid, weights, data, environment, stored, authors, folder, click.echo, elsewhere, real_images
        )
        for row in found:
            rows.append(row)
            click.echo(run_text(row))
            stored()
    finally:
        click.echo(text(rows))


@main.command()
@_timing
@_json
@click.option("--small", is_flag=True, help="Small sizes, to see that it runs.")
@_dry_run
def ceilings(
    device_name: str,
    threads: int,
    rounds: int,
    seconds: float,
    json_path: Path | None,
    small: bool,
    dry_run: bool,
) -> None:
    """Time copies, bfloat16 products and next to nothing: what this machine can do at best."""
    from benchmarks import ceilings
    from benchmarks.report import ceilings_text

    if dry_run:
        return
    sizes = {"copied": ceilings.COPIED[:2], "sides": (256,)} if small else {}
    _measure(
        "ceilings",
        {"rounds": rounds, "seconds": seconds, "small": small},
        json_path,
        (device_name, threads),
        lambda device, environment: ceilings.run_ceilings(device, environment, rounds, seconds, **sizes),
        ceilings_text,
    )


def _measure(
    kind: str,
    options: dict[str, Any],
    json_path: Path | None,
    where: tuple[str, int],
    rows_of: Callable[[Any, dict[str, Any]], list[dict[str, Any]]],
    text: Callable[[list[dict[str, Any]]], str],
) -> list[dict[str, Any]]:
    """Rows of a kind that is measured whole: printed, and written once all are there.

    Args:
        where: name of the device, and PyTorch's threads.
        rows_of: from the device and the description of the environment.
        text: of rows, to print.
    """
    from benchmarks import store
    from benchmarks.environment import describe, machine, pick_device

    device = pick_device(*where)
    environment = describe(device)
    content = store.document(kind, environment, options)
    # A path that cannot be written is found now; what is there stays until there is something new.
    if json_path is not None and not json_path.exists():
        store.write(json_path, content)
    content["rows"] = rows_of(device, environment)
    click.echo(f"{machine(environment)}\n{text(content['rows'])}")
    if json_path is not None:
        store.write(json_path, content)
    return content["rows"]


_setting = _options(
    click.option("--device", "device_name", default="cpu", metavar="cpu|cuda", show_default=True, help="Where to run."),
    click.option("--threads", default=2, show_default=True, help="PyTorch's threads."),
    click.option("--model", default="resnet20", show_default=True, help="As of step."),
    click.option("--batch-size", default=16, show_default=True),
    click.option("--image-size", type=int, help="Pixels; by default the recipe's."),
    click.option("--weight-bits", default=4, show_default=True),
    click.option("--act-bits", default=4, show_default=True),
)


@main.command()
@_setting
@click.option("--steps", default=200, show_default=True, type=click.IntRange(1), help="Of either way.")
@_json
@_dry_run
def equality(device_name: str, threads: int, steps: int, json_path: Path | None, dry_run: bool, **setting: Any) -> None:
    """Train in two ways from one start, and say after how many steps their losses part.

    From CUDA graphs and without, on the GPU and on the CPU, fused and layer by layer; on a CPU the last alone. Exits
    with 1 where two ways part too early.
    """
    from benchmarks.contest import Setting
    from benchmarks.equality import run_equality
    from benchmarks.report import equality_text

    chosen = Setting(**setting)
    options = {"steps": steps, "case": chosen.case()}
    if dry_run:
        return
    rows = _measure(
        "equality",
        options,
        json_path,
        (device_name, threads),
        lambda device, environment: run_equality(chosen, steps, device, environment),
        equality_text,
    )
    _exit_if_not_ok(rows)


@main.command()
@_setting
@click.option("--epochs", default=400, show_default=True, type=click.IntRange(2))
@click.option("--steps-per-epoch", default=200, show_default=True, type=click.IntRange(1))
@_json
@_dry_run
def endurance(
    device_name: str,
    threads: int,
    epochs: int,
    steps_per_epoch: int,
    json_path: Path | None,
    dry_run: bool,
    **setting: Any,
) -> None:
    """Train a network of random weights for long, and see that memory and a step's time stay what they are.

    Exits with 1 where they do not.
    """
    from benchmarks.contest import Setting
    from benchmarks.endurance import run_endurance
    from benchmarks.report import endurance_text

    chosen = Setting(**setting)
    options = {"case": chosen.case(), "epochs": epochs, "steps_per_epoch": steps_per_epoch}
    if dry_run:
        return
    rows = _measure(
        "endurance",
        options,
        json_path,
        (device_name, threads),
        lambda device, environment: [run_endurance(chosen, epochs, steps_per_epoch, device, environment)],
        endurance_text,
    )
    _exit_if_not_ok(rows)


def _exit_if_not_ok(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        if row["status"] != "ok":
            click.echo(f"wrong: {row.get('pair', row['case'])}: {row['error']}", err=True)
    if any(row["status"] != "ok" for row in rows):
        sys.exit(EXIT_WRONG)


@main.command()
@_json
@click.option("--gpu", "gpu_name", default="h200", show_default=True, help="Whose bandwidth and clocks.")
@click.option("--filter", "filters", multiple=True, metavar="TEXT", help="Only names that hold or match it.")
@click.option("--backend", default="triton", metavar="triton|cuda|both", show_default=True, help="Whose kernels.")
@click.option(
    "--module",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Where the CUDA kernels are; by default the installed adadfq._C_cuda.",
)
def predict(json_path: Path | None, gpu_name: str, filters: tuple[str, ...], backend: str, module: Path | None) -> None:
    """Estimate, without a GPU, how long the kernels take on one, from their machine code.

    CUDA kernels are read from a module that nvcc built for that GPU; their launchers are compiled for the CPU.
    """
    from adadfq.errors import InvalidInputError
    from benchmarks import predict_cuda, resources, store
    from benchmarks.cases import matches
    from benchmarks.environment import describe, native_matches, pick_device
    from benchmarks.predict import BACKENDS, GPUS, chosen, serves
    from benchmarks.predict import predict as predict_case
    from benchmarks.report import predictions_text

    if gpu_name not in GPUS:
        raise InvalidInputError(f"gpu must be one of {', '.join(GPUS)}, got {gpu_name!r}")
    if backend not in (*BACKENDS, "both"):
        raise InvalidInputError(f"backend must be one of {', '.join(BACKENDS)}, both, got {backend!r}")
    backends = BACKENDS if backend == "both" else (backend,)
    cases = [case for case in chosen() if all(matches(case.name, text) for text in filters)]
    pairs = [(case, name) for case in cases for name in backends if serves(name, case)]
    if not pairs:
        raise InvalidInputError(f"no predicted case fits the filters {list(filters)}")
    environment, build = describe(pick_device("cpu", 1)), None
    if "cuda" in backends:
        module = resources.find_module() if module is None else module
        predict_cuda.check_module(module, GPUS[gpu_name].capability)
        build = resources.build_info(module)
        environment["native_matches_sources"] = native_matches(build)
    options = {"gpu": gpu_name, "filters": list(filters), "backend": backend, "nvcc": (build or {}).get("nvcc")}
    content = store.document("predictions", environment, options)
    if json_path is not None:
        store.write(json_path, content)  # a path that cannot be written is found now
    content["rows"] = [predict_case(case, GPUS[gpu_name], name, module) for case, name in pairs]
    click.echo(predictions_text(content["rows"]))
    if json_path is not None:
        store.write(json_path, content)


@main.command("predict-step")
@_json
@click.option("--gpu", "gpu_name", default="h200", show_default=True, help="Whose bandwidth and rates.")
@click.option("--model", "models", default="", callback=_words, metavar="NAME,...", help="Only these networks.")
@click.option("--batch-size", "batch_sizes", default="", callback=_words, metavar="N,...", help="Only these.")
def predict_step(json_path: Path | None, gpu_name: str, models: tuple[str, ...], batch_sizes: tuple[str, ...]) -> None:
    """Estimate, without a GPU, how long a step of the game takes on one, from the kernels it launches.

    The step runs on fake tensors, for which a C++ compiler must be there. Beside it stands a model of the authors' way.
    """
    from benchmarks import store
    from benchmarks.contest import settings
    from benchmarks.environment import describe, pick_device
    from benchmarks.predict_step import rows
    from benchmarks.report_step import predictions_text

    chosen = settings("full", models, [_positive("batch-size", size) for size in batch_sizes])
    options = {"gpu": gpu_name, "models": list(models), "batch_sizes": list(batch_sizes)}
    content = store.document("step predictions", describe(pick_device("cpu", 1)), options)
    if json_path is not None:
        store.write(json_path, content)  # a path that cannot be written is found now
    content["rows"] = rows(gpu_name, chosen)
    click.echo(predictions_text(content["rows"]))
    if json_path is not None:
        store.write(json_path, content)


def _positive(name: str, text: str) -> int:
    from adadfq.errors import InvalidInputError

    if not text.isdecimal() or int(text) < 1:
        raise InvalidInputError(f"{name} must be positive integers, separated by commas, got {text!r}")
    return int(text)


_file = click.Path(path_type=Path, dir_okay=False)


@main.command()
@_json
@click.option("--archs", default="", callback=_words, metavar="ARCH,...", help="Only these, such as 80,90.")
@click.argument("module", type=_file, required=False)
def resources(json_path: Path | None, archs: tuple[str, ...], module: Path | None) -> None:
    """Print registers, local and shared memory of every CUDA kernel in a built module (adadfq._C_cuda)."""
    from benchmarks import resources as usage
    from benchmarks import store
    from benchmarks.environment import describe, native_matches, pick_device
    from benchmarks.report import resources_text

    path = usage.find_module() if module is None else module
    build = usage.build_info(path)
    options = {"archs": list(archs), "nvcc": (build or {}).get("nvcc")}
    environment = describe(pick_device("cpu", 1)) | {"native_matches_sources": native_matches(build)}
    content = store.document("resources", environment, options)
    content["rows"] = usage.select(usage.resources(path, usage.find_cuobjdump()), archs)
    click.echo(resources_text(content["rows"]))
    if json_path is not None:
        store.write(json_path, content)


@main.command()
@click.argument("first", type=_file)
@click.argument("second", type=_file)
@click.option("--force", is_flag=True, help="Compare files of different machines all the same.")
def compare(first: Path, second: Path, force: bool) -> None:
    """Ratios of the medians of two files, with the spread that their percentiles leave."""
    from benchmarks import ratios, store
    from benchmarks.report import compare_text

    click.echo(compare_text(ratios.compare(store.read(first), store.read(second), force), first.name, second.name))


@main.command()
@click.argument("predictions", type=_file)
@click.argument("results", type=_file, nargs=-1, required=True)
@_dry_run
def against(predictions: Path, results: tuple[Path, ...], dry_run: bool) -> None:
    """Predicted and measured time of every case of files of 'ops --device cuda', and how far they are apart.

    Of a case in several files, the last counts.
    """
    from benchmarks import store
    from benchmarks.report import against_text

    if dry_run:
        return
    measured = [row for result in results for row in store.read(result)["rows"]]
    click.echo(against_text(store.read(predictions)["rows"], measured))


@main.command()
@click.argument("results", type=_file)
@click.option("--routes", "table", type=_file, help="Of which backend serves what on a GPU; by default that in force.")
def judge(results: Path, table: Path | None) -> None:
    """Hold a file against the table of demands (README, "Benchmarks"). Exits with 1 where one is not met.

    A demand without a case, or on a case that was left out, is not met.
    """
    from adadfq.errors import InvalidInputError
    from adadfq.ops import routes
    from benchmarks import ratios, store
    from benchmarks.report import judged_text

    content = store.read(results)
    left_out = content["left_out"]
    in_force = routes.current() if table is None else routes.load(table)
    if content["kind"] != "ops" or not ratios.judge(content["rows"], left_out, table=in_force):
        raise InvalidInputError(f"{results} holds no case with a demand: run 'ops --suite judged'")
    judged = ratios.judge(content["rows"], left_out, whole=True, table=in_force)
    click.echo(judged_text(judged))
    if not all(judgement.met for judgement in judged):
        sys.exit(EXIT_WRONG)


@main.command()
@click.argument("results", type=_file, nargs=-1, required=True)
@click.option(
    "--out", "path", type=_file, required=True, help="The table, for ADADFQ_ROUTES or adadfq/ops/routes.json."
)
@_dry_run
def routes(results: tuple[Path, ...], path: Path, dry_run: bool) -> None:
    """Choose between cuda and triton, by operator, dtype and size, from files of 'ops --device cuda'.

    Prints every case that the table leaves with a backend more than 5 % slower than the other.
    """
    from benchmarks import routes as table
    from benchmarks import store

    if dry_run:
        return
    contents = [store.read(result) for result in results]
    content = table.build(contents)
    table.write(path, content)
    click.echo(table.table_text(content))
    click.echo(table.slower_text(table.left_slower(contents, content)))


@main.command()
@click.argument("results", type=_file)
@click.option("--out", "folder", type=click.Path(path_type=Path, file_okay=False), help="Default: beside the file.")
def plot(results: Path, folder: Path | None) -> None:
    """PNG: speed-up against size and a roofline with the copy's line; for steps, time by part and memory; for
    accuracies, their spread and the time an image takes."""
    from benchmarks import store
    from benchmarks.plot import plot as draw

    for path in draw(store.read(results), results.stem, folder or results.parent):
        click.echo(path)


@main.command()
@click.option("--check", is_flag=True, help="Change nothing; exit with 1 where a table or a plot is stale.")
def readme(check: bool) -> None:
    """Write the tables of docs/speed.md and README.md, and the plots, from benchmarks/results/*.json."""
    from benchmarks.readme import PAGES, stale, update

    if not check:
        for page, block in PAGES.items():
            for path in update(page, block=block):
                click.echo(path.name)
        return
    reasons = [reason for page, block in PAGES.items() for reason in stale(page, block=block)]
    for reason in dict.fromkeys(reasons):
        click.echo(f"{reason}: run 'python -m benchmarks readme'", err=True)
    if reasons:
        sys.exit(EXIT_WRONG)


@main.command()
@click.option("--check", is_flag=True, help="Change nothing; exit with 1 where the page or a plot is stale.")
def results(check: bool) -> None:
    """Write docs/results.md and its plots from benchmarks/results/accuracy-*.json."""
    from benchmarks import results_page as page

    if not check:
        for path in page.update():
            click.echo(path.name)
    elif reasons := page.stale():
        for reason in reasons:
            click.echo(f"{reason}: run 'python -m benchmarks results'", err=True)
        sys.exit(EXIT_WRONG)


if __name__ == "__main__":
    main(prog_name="python -m benchmarks")
