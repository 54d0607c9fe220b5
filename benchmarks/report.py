"""Results as text: for the terminal, for README.md and for docs/speed.md."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import plot, ratios
from benchmarks.breakdown import PARTS
from benchmarks.cases import LOGIT_LOSSES, TINY
from benchmarks.environment import commit, machine
from benchmarks.players import AUTHORS
from benchmarks.players import PLAIN as STEP_PLAIN
from benchmarks.providers import BARE, COMPILE, COPY, NATIVE, OURS
from benchmarks.ratios import EAGER, RIVALS, Comparison, Judgement, Row
from benchmarks.report_step import predictions_block
from benchmarks.resources import arch_number
from benchmarks.scaling import scaling_text
from benchmarks.tables import markdown_table, number, text_table


def rows_text(rows: Sequence[Row]) -> str:
    """Every row of one case of operators."""
    header = ["provider", "p20 ms", "p50 ms", "p80 ms", "GB/s", "of copy", "of clone", "peak MB"]
    keys = ("p20_ms", "p50_ms", "p80_ms", "gb_per_s", "fraction_of_copy", "fraction_of_clone")
    table = text_table(header, [[row["provider"], *(number(row[key]) for key in keys), _peak(row)] for row in rows])
    return "\n".join([rows[0]["case"], table, *_notes(rows)])


def step_text(rows: Sequence[Row]) -> str:
    """Every row of steps, and the milliseconds of their parts."""
    cases = ratios.by_case(rows)
    header = ["step", "p20 ms", "p50 ms", "p80 ms", "images/s", "x authors", "x plain", "peak MB", *PARTS]
    lines = []
    for row in rows:
        speeds = [number(_speed_up(cases[row["case"]], row, rival)) for rival in (AUTHORS, STEP_PLAIN)]
        parts = [number(None if row["parts"] is None else row["parts"][part] * row["p50_ms"]) for part in PARTS]
        times = [number(row[key]) for key in ("p20_ms", "p50_ms", "p80_ms", "images_per_s")]
        lines.append([f"{row['case'].removeprefix('step/')} {row['provider']}", *times, *speeds, _peak(row), *parts])
    return "\n".join([text_table(header, lines), *_notes(rows)])


def _peak(row: Row) -> str:
    peak = row["peak_memory_bytes"]
    return number(None if peak is None else peak / 1e6)


def _notes(rows: Sequence[Row]) -> list[str]:
    return [f"  {row['provider']}: {row['status']}: {row['error']}" for row in rows if row["error"]]


def _speed_up(providers: dict[str, Row], row: Row, name: str) -> float | None:
    """How many times as fast as `name` the row's player is."""
    other = ratios.timed(providers, name)
    return None if other is None or row["status"] != "ok" else other["p50_ms"] / row["p50_ms"]


_MET = {True: "met", False: "NOT MET", None: "no time"}


def judged_text(judged: Iterable[Judgement]) -> str:
    """Criteria and the cases they apply to; empty where there are none."""
    lines = [
        [
            judgement.case,
            judgement.criterion.title,
            f">= {judgement.criterion.at_least:.3g}",
            "-" if judgement.ratio is None else str(judgement.ratio),
            "met: routed" if judgement.met and judgement.routed else _MET[judgement.met],
        ]
        for judgement in judged
    ]
    return text_table(["case", "criterion", "demand", "times as fast (spread)", ""], lines) if lines else ""


def predictions_text(rows: Iterable[Row]) -> str:
    """Every prediction, and the registers and instructions it comes from."""
    header = ["case", "backend", "launches", "registers", "spilled"]
    header += ["bytes/el.", "instr./el.", "us", "of copy", "bound by"]
    lines = [[row["case"], row["backend"], *_predicted_cells([row]), row["bound_by"]] for row in rows]
    return text_table(header, lines)


def _predicted_cells(rows: Sequence[Row]) -> list[str]:
    launches = [launch for row in rows for launch in row["launches"]]
    return [
        _span([len(row["launches"]) for row in rows]),
        _span([launch["registers"] for launch in launches]),
        _span([launch["spilled_bytes"] for launch in launches]),
        *(_span([row[key] for row in rows]) for key in ("bytes_per_element", "instructions_per_element")),
        _span([row["predicted_us"] for row in rows]),
        _span([row["fraction_of_copy"] for row in rows]),
    ]


def against_text(predicted: Sequence[Row], measured: Iterable[Row]) -> str:
    """Predictions beside the times of the same case and backend, the farthest apart first."""
    ours = [row for row in measured if row["status"] == "ok" and row["provider"] == f"{OURS}{row['backend']}"]
    times = {(row["case"], row["backend"]): row for row in ours}
    found = [(row, times[row["case"], row["backend"]]) for row in predicted if (row["case"], row["backend"]) in times]
    header = ["case", "backend", "predicted us", "measured us", "measured / predicted"]
    header += ["of copy, predicted", "measured", "predicted bound"]
    lines = []
    for row, time in sorted(found, key=lambda pair: -pair[1]["p50_ms"] * 1e3 / pair[0]["predicted_us"]):
        us = time["p50_ms"] * 1e3
        lines.append(
            [
                row["case"],
                row["backend"],
                number(row["predicted_us"]),
                number(us),
                number(us / row["predicted_us"]),
                number(row["fraction_of_copy"]),
                number(time["fraction_of_copy"]),
                row["bound_by"],
            ]
        )
    without = len(predicted) - len(found)
    note = f"\n{without} predictions have no time" if without else ""
    return text_table(header, lines) + note


def ceilings_text(rows: Iterable[Row]) -> str:
    """Every ceiling."""
    keys = ("p20_ms", "p50_ms", "p80_ms", "gb_per_s", "tflop_per_s")
    header = ["ceiling", "p20 ms", "p50 ms", "p80 ms", "GB/s", "TFLOP/s"]
    return text_table(header, [[row["what"], *(number(row[key]) for key in keys)] for row in rows])


def equality_text(rows: Iterable[Row]) -> str:
    """Every pair of ways, and when they part."""
    header = ["pair", "steps", "equal steps", "needed", ""]
    lines = [
        [row["pair"], *(str(row[key]) for key in ("steps", "equal_steps", "needed_steps")), row["status"]]
        for row in rows
    ]
    return text_table(header, lines)


def endurance_text(rows: Iterable[Row]) -> str:
    """Every long training."""
    header = ["case", "steps", "ms a step", "MB of tensors, first and last", "MB in use, first and last", ""]
    lines = []
    for row in rows:
        memory = [
            " - ".join(number(values[i] / 1e6) for i in (0, -1)) if values else "-"
            for values in (row["allocated_bytes"], row["used_bytes"])
        ]
        lines.append([row["case"], str(row["steps"]), number(row["step_ms"]), *memory, row["status"]])
    return text_table(header, lines)


def resources_text(rows: Iterable[Row]) -> str:
    """Every kernel for every architecture."""
    header = ["kernel", "source", "arch", "registers", "stack bytes", "local bytes", "static shared bytes"]
    keys = ("registers", "stack_bytes", "local_bytes", "shared_bytes")
    lines = [[_variant(row), row["source"], row["arch"], *(str(row[key]) for key in keys)] for row in rows]
    return text_table(header, lines)


def _variant(row: Row) -> str:
    return f"{row['kernel']}<{row['variant']}>" if row["variant"] else row["kernel"]


def compare_text(comparison: Comparison, first: str, second: str) -> str:
    """The ratios of two files, and what only one of them holds."""
    lines = [[f"{case}  {provider}", str(ratio)] for (case, provider), ratio in comparison.ratios.items()]
    parts = [f"note: {note}" for note in comparison.notes]
    parts.append(f"time in {first} / time in {second}; above 1, {second} is faster")
    parts.append("spread: 20th percentile of the one over 80th of the other, and the reverse; no confidence interval")
    parts.append(text_table(["case and provider", "ratio (spread)"], lines) if lines else "no row is in both")
    for name, keys in ((first, comparison.only_first), (second, comparison.only_second)):
        parts += [f"only in {name}: {case}  {provider}" for case, provider in keys]
    return "\n".join(parts)


# ----------------------------------------------------------------------------------------- README and docs/speed.md
# Times of a CPU say more about the machine, and who else is on it, than about the code: published are ratios only.

#: Whose kernels' resources are shown.
SHOWN_ARCH = "sm_90"
BEGIN = "<!-- benchmarks: begin -->"
END = "<!-- benchmarks: end -->"
_NOTHING = (
    "Nothing measured yet is stored. `python -m benchmarks ops --suite judged --json benchmarks/results/ops.json`\n"
    "measures, `python -m benchmarks readme` writes the tables and plots here."
)


def readme_block(stored: Sequence[tuple[Path, dict[str, Any]]]) -> str:
    """What README.md holds between :data:`BEGIN` and :data:`END`, the markers included: measured steps at a glance."""
    parts = []
    for path, content in stored:
        if (
            content["kind"] == "step"
            and not content["options"].get("scaling")
            and (tables := _step_tables(content["rows"]))
        ):
            parts += [_title(path, content["environment"]), tables[0]]
    return "\n\n".join([BEGIN, *(parts or ["No step is stored yet: `python -m benchmarks step` measures."]), END])


def speed_block(stored: Sequence[tuple[Path, dict[str, Any]]]) -> str:
    """What docs/speed.md holds between the markers: every stored file."""
    parts = [_file_block(path, content) for path, content in stored]
    return "\n\n".join([BEGIN, *(parts or [_NOTHING]), END])


def _title(path: Path, environment: dict[str, Any]) -> str:
    return f"**{machine(environment)}** (`benchmarks/results/{path.name}`)"


def _file_block(path: Path, content: dict[str, Any]) -> str:
    rows = content["rows"]
    environment = content["environment"]
    if content["kind"] == "predictions":
        return _predictions_block(path, content)
    if content["kind"] == "step predictions":
        return predictions_block(path, content)
    if content["kind"] == "resources":
        return _resources_block(path, content)
    title = _title(path, environment)
    texts = {"ceilings": ceilings_text, "equality": equality_text, "endurance": endurance_text}
    if (text := texts.get(content["kind"])) is not None:
        return "\n\n".join([title, f"```\n{text(rows)}\n```"])
    if content["kind"] == "ops" and environment["device"] == "cpu":
        title += ": huge pages for all" if environment["thp_mem_alloc"] else ": stock allocator"
    parts = [title]
    if content["kind"] == "step":
        parts += _step_tables(rows)
        if content["options"].get("scaling"):
            parts.append("\n".join(f"- {line}" for line in scaling_text(rows).splitlines()))
    else:
        parts += [
            table
            for table in (_judged_table(rows, content["left_out"]), _ops_table(rows), _overhead_table(rows))
            if table
        ]
    if left_out := content["left_out"]:
        parts.append(f"{len(left_out)} cases were left out.")
    for status, text in (("wrong", "Not right, and so without a time: "), ("unavailable", "Could not be run: ")):
        if found := sorted({f"{row['provider']} on `{row['case']}`" for row in rows if row["status"] == status}):
            parts.append(text + ", ".join(found) + ".")
    return "\n\n".join([*parts, *_images(path, content)])


def _images(path: Path, content: dict[str, Any]) -> list[str]:
    links = [f"![{name}](../benchmarks/results/{path.stem}-{name}.png)" for name in plot.names(content)]
    return ["\n".join(links)] if links else []


def _predictions_block(path: Path, content: dict[str, Any]) -> str:
    rows, environment = content["rows"], content["environment"]
    gpus = ", ".join(dict.fromkeys(row["gpu"] for row in rows))
    title = f"**{gpus}: predicted, not yet run on a GPU** (`benchmarks/results/{path.name}`), from the machine code of"
    compilers = {
        "triton": f"Triton {environment['versions']['triton']}",
        "cuda": f"nvcc {content['options'].get('nvcc')}",
    }
    title += " " + " and ".join(compilers[name] for name in dict.fromkeys(row["backend"] for row in rows))
    title += _commit(environment)
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        # Of one layer, or logits of one size, in every dtype and layout; activations are the layer's.
        what = row["variant"].removeprefix("relu6").removeprefix("relu").strip("_-")
        if row["op"] in LOGIT_LOSSES:
            what = row["case"].split("/")[3]
        groups.setdefault((row["backend"], f"`{row['op']}` {what}".strip(), row["pass"]), []).append(row)
    lines = [
        [
            backend,
            f"{name} {pass_}",
            str(len(found)),
            *_predicted_cells(found),
            ", ".join(dict.fromkeys(row["bound_by"] for row in found)),
        ]
        for (backend, name, pass_), found in groups.items()
    ]
    header = ["backend", "operator and pass", "cases", "launches", "registers", "spilled bytes", "bytes an element"]
    header += ["instructions an element", "us", "of the copy", "bound by"]
    note = "Estimates of `benchmarks/predict.py`: memory or instructions, whichever takes longer, and the launches."
    return "\n\n".join([title, *([markdown_table(header, lines)] if lines else []), note])


def _resources_block(path: Path, content: dict[str, Any]) -> str:
    """A row a kernel for :data:`SHOWN_ARCH`, or the newest arch, and whether anything spills for any arch."""
    rows = content["rows"]
    archs = sorted({row["arch"] for row in rows}, key=arch_number)
    shown = SHOWN_ARCH if SHOWN_ARCH in archs or not archs else archs[-1]
    title = f"**CUDA kernels for {shown}: compiled, not yet run on a GPU** (`benchmarks/results/{path.name}`), by nvcc"
    title += f" {content['options']['nvcc']}{_commit(content['environment'])}"
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row["arch"] == shown:
            groups.setdefault((row["source"], row["kernel"]), []).append(row)
    lines = [
        [
            f"`{source}`" if source else "",
            f"`{kernel}`",
            str(len(found)),
            _span([row["registers"] for row in found]),
            _span([_in_memory(row) for row in found]),
            _span([row["shared_bytes"] for row in found]),
        ]
        for (source, kernel), found in groups.items()
    ]
    header = ["source", "kernel", "variants", "registers", "stack and local bytes", "static shared bytes"]
    spilling = [row for row in rows if _in_memory(row)]
    note = f"Of {len(rows)} variants for {', '.join(archs)}, {len(spilling) or 'none'} with spills or local memory"
    note += f": {', '.join(sorted({f'`{_variant(row)}`' for row in spilling}))}." if spilling else "."
    return "\n\n".join([title, markdown_table(header, lines), note])


def _in_memory(row: Row) -> int:
    return row["stack_bytes"] + row["local_bytes"]


def _commit(environment: dict[str, Any]) -> str:
    if not environment["git_commit"]:
        return ""
    return f", commit {commit(environment)}"


def _span(values: Sequence[float]) -> str:
    if not values:
        return "-"
    low, high = number(min(values)), number(max(values))
    return low if low == high else f"{low} - {high}"


def _judged_table(rows: Sequence[Row], left_out: Sequence[str]) -> str:
    judged = ratios.judge(rows, left_out)
    lines = []
    for criterion in (*ratios.CRITERIA, *ratios.CUDA_CRITERIA):
        found = [judgement for judgement in judged if judgement.criterion is criterion]
        values = [judgement.ratio.median for judgement in found if judgement.ratio is not None]
        if found:
            met = sum(judgement.met is True for judgement in found)
            lines.append([criterion.title, f"{criterion.at_least:.3g}x", f"{_span(values)}x", f"{met} of {len(found)}"])
    return markdown_table(["adadfq against", "wanted", "measured", "met"], lines) if lines else ""


def _ops_table(rows: Sequence[Row]) -> str:
    groups: dict[tuple[str, str], list[dict[str, Row]]] = {}
    for providers in ratios.by_case(rows).values():
        row = next(iter(providers.values()))
        if row["where"] != TINY:
            groups.setdefault((row["op"], row["pass"]), []).append(providers)
    lines = []
    for (op, pass_), cases in groups.items():
        sizes = [next(iter(providers.values()))["nbytes"] / 1e6 for providers in cases]
        columns = [_span(_against(cases, lambda p, name=name: ratios.rival(p, name))) for name in RIVALS]
        copy = _span(_against(cases, lambda p: ratios.timed(p, COPY)))
        lines.append([f"`{op}` {pass_}", str(len(cases)), _span(sizes), *columns, copy])
    header = ["operator and pass", "cases", "MB", "x eager", "x torch.compile", "x torch's own", "of the copy"]
    return markdown_table(header, lines) if lines else ""


def _against(cases: Iterable[dict[str, Row]], choose: Callable[[dict[str, Row]], Row | None]) -> list[float]:
    found = []
    for providers in cases:
        own, other = ratios.ours(providers), choose(providers)
        if own is not None and other is not None:
            found.append(other["p50_ms"] / own["p50_ms"])
    return found


def _overhead_table(rows: Sequence[Row]) -> str:
    lines = []
    on_gpu = any(row["device"] != "cpu" for row in rows)
    for case, providers in ratios.by_case(row for row in rows if row["where"] == TINY).items():
        own, bare = ratios.ours(providers), ratios.timed(providers, BARE)
        others = [ratios.rival(providers, name) for name in (EAGER, COMPILE, NATIVE)]
        unit = 1e-3
        if not on_gpu:
            unit = None if bare is None else bare["p50_ms"]
        cells = [number(None if row is None or unit is None else row["p50_ms"] / unit) for row in (own, *others, bare)]
        op, *_, pass_ = case.split("/")
        lines.append([f"`{op}` {'forward + backward' if pass_ == 'both' else pass_}", *cells])
    unit_name = "us" if on_gpu else "in `x * 1` of the same pass"
    header = [f"one call on next to no data, {unit_name}", "adadfq", "eager", "torch.compile", "torch's own", "`x * 1`"]
    return markdown_table(header, lines) if lines else ""


def _step_tables(rows: Sequence[Row]) -> list[str]:
    """Speed and memory of every player, and the shares of its parts."""
    cases = ratios.by_case(rows)
    timed = [row for row in rows if row["status"] == "ok"]
    if not timed:
        return []
    on_gpu = any(row["device"] != "cpu" for row in timed)
    speeds, parts = [], []
    for row in timed:
        providers = cases[row["case"]]
        name = [f"`{row['case'].removeprefix('step/')}`", row["provider"]]
        authors = ratios.timed(providers, AUTHORS)
        memory = None if authors is None else row["peak_memory_bytes"] / authors["peak_memory_bytes"]
        against = [_times(_speed_up(providers, row, rival)) for rival in (AUTHORS, STEP_PLAIN)]
        units = [number(row["p50_ms"]), number(row["images_per_s"])] if on_gpu else []
        speeds.append([*name, *units, *against, _peak(row), _times(memory)])
        parts.append([*name, *(f"{100 * row['parts'][part]:.0f} %" for part in PARTS)])
    header = ["one step", "", *(["ms", "images/s"] if on_gpu else []), "against authors", "against plain", "peak MB"]
    return [
        markdown_table([*header, "peak against authors"], speeds),
        markdown_table(["where its time goes", "", *PARTS], parts),
    ]


def _times(value: float | None) -> str:
    return "-" if value is None else f"{number(value)}x"
