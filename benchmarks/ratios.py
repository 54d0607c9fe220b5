"""From rows to ratios: speed-ups over the rivals, the judged table, and two files against each other."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from adadfq.errors import InvalidInputError
from adadfq.ops import routes as package_routes
from adadfq.ops.dispatch import PREFERENCE
from adadfq.ops.routes import Routes
from benchmarks import routes
from benchmarks.cases import PACKING, is_launch, registry
from benchmarks.providers import (
    CLONE,
    COMPILE,
    COPY,
    EMPTY,
    IN_PLACE,
    INTO,
    NATIVE,
    OURS,
    PLAIN,
    REFERENCE,
    REPLAYED,
    UNCHECKED,
)
from benchmarks.store import TIMED

Row = dict[str, Any]

#: Rival -> what it is called in tables.
EAGER = "eager"
RIVALS = (EAGER, COMPILE, NATIVE)


def by_case(rows: Iterable[Row]) -> dict[str, dict[str, Row]]:
    """case -> provider -> row, with a time or without."""
    found: dict[str, dict[str, Row]] = {}
    for row in rows:
        found.setdefault(row["case"], {})[row["provider"]] = row
    return found


def timed(providers: dict[str, Row], name: str) -> Row | None:
    """The row of a provider; None where it has no time."""
    row = providers.get(name)
    return row if row is not None and row["status"] == "ok" else None


def ours(providers: dict[str, Row], table: Routes | None = None) -> Row | None:
    """The row of the backend that the dispatcher would choose: the first it prefers, else the reference.

    None where that one has no time: another one's would hide it.

    Args:
        table: which of a GPU's backends serves what; None is the package's.
    """
    row = next(iter(providers.values()))
    order = PREFERENCE.get(row["device"], ())
    if row["device"] == package_routes.DEVICE_TYPE:
        table = package_routes.load(package_routes.DEFAULT) if table is None else table
        order = (*filter(None, [routes.routed(row, table)]), *order)
    for backend in order:
        if OURS + backend in providers:
            return timed(providers, OURS + backend)
    return timed(providers, REFERENCE)


def rival(providers: dict[str, Row], name: str) -> Row | None:
    """The row of a rival; "eager" is the faster of the two eager ones."""
    if name != EAGER:
        return timed(providers, name)
    return fastest(providers, (REFERENCE, PLAIN))


def fastest(providers: dict[str, Row], names: Iterable[str]) -> Row | None:
    """The fastest of these providers; None where one has no time, for it might be the fastest."""
    rows = [timed(providers, name) for name in names]
    found = [row for row in rows if row is not None]
    return min(found, key=lambda row: row["p50_ms"]) if found and len(found) == len(rows) else None


@dataclass(frozen=True)
class Ratio:
    """A ratio of medians, and the spread that the 20th and 80th percentiles of both leave."""

    low: float
    median: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}-{self.high:.2f})"


def speed_up(slow: Row, fast: Row) -> Ratio:
    """How many times faster `fast` is than `slow`."""
    return Ratio(slow["p20_ms"] / fast["p80_ms"], slow["p50_ms"] / fast["p50_ms"], slow["p80_ms"] / fast["p20_ms"])


# ---------------------------------------------------------------------------------------------------------- judged


@dataclass(frozen=True)
class Criterion:
    """One demand on one kind of case: provider against rival, at least so many times as fast."""

    title: str
    applies: Callable[[Row], bool]
    rival: str
    at_least: float
    provider_suffix: str = ""
    """Of another row of ours than the one that writes to a new tensor."""
    backend: str | None = None
    """Whose row; None is that of the backend which the dispatcher would choose."""
    or_routed: bool = False
    """Met, too, where the table sends the case to the rival."""


def _is_fake_quantize(row: Row) -> bool:
    return row["op"] in ("fake_quantize", "fake_quantize_") and row["pass"] == "forward" and row["where"] != "tiny"


def _large(row: Row) -> bool:
    return _is_fake_quantize(row) and 50e6 <= row["nbytes"] <= 200e6


def _large_new(row: Row) -> bool:
    return _large(row) and row["op"] == "fake_quantize"


def _large_in_place(row: Row) -> bool:
    return _large(row) and row["op"] == "fake_quantize_"


def _small(row: Row) -> bool:
    return _is_fake_quantize(row) and 64e3 <= row["nbytes"] <= 4e6


def _huge(op: str) -> Callable[[Row], bool]:
    return lambda row: row["op"] == op and row["pass"] == "forward" and row["nbytes"] >= 256e6


def _op(op: str, *passes: str) -> Callable[[Row], bool]:
    return lambda row: row["op"] == op and row["pass"] in passes and row["where"] != "tiny"


def _is_resnet18_weights(row: Row) -> bool:
    return row["op"] == "foreach_dynamic_fake_quantize" and row["where"] == "resnet18@224.weights"


_BEST_OTHER = "best other"

#: The table by which the operators are judged on a CPU. Where a demand can be read in two ways, both are here.
CRITERIA = (
    Criterion("large, in place: of the copy", _large_in_place, COPY, 0.85),
    Criterion("large, in place: of x.mul_(1)", _large_in_place, IN_PLACE, 0.85),
    Criterion("large, into existing memory: of the copy", _large_new, COPY, 0.85, INTO),
    Criterion("large, new tensor: of the copy to a new tensor", _large_new, CLONE, 0.85),
    Criterion("large, new tensor: of the copy into existing memory", _large_new, COPY, 0.85),
    Criterion(
        "large, new tensor: torch's per-channel op",
        lambda r: _large_new(r) and r["variant"].startswith("per_channel"),
        NATIVE,
        10,
    ),
    Criterion("large, new tensor: torch.compile", _large_new, COMPILE, 1.0),
    Criterion("small: best other provider", _small, _BEST_OTHER, 1.0),
    Criterion("ResNet-18 weights: eager", _is_resnet18_weights, REFERENCE, 4),
    Criterion("ResNet-18 weights: faster eager", _is_resnet18_weights, EAGER, 4),
    Criterion("ResNet-18 weights: torch.compile", _is_resnet18_weights, COMPILE, 1.5),
    Criterion("affine forward: eager", _op("affine_act_fake_quantize", "forward"), EAGER, 3),
    Criterion("affine backward: eager", _op("affine_act_fake_quantize", "backward"), EAGER, 2.5),
    Criterion("affine: torch.compile", _op("affine_act_fake_quantize", "forward", "backward"), COMPILE, 1.0),
    Criterion("bn_match_forward: eager", _op("bn_match_forward", "both"), EAGER, 3),
    Criterion("bn_match_forward: torch.compile", _op("bn_match_forward", "both"), COMPILE, 1.3),
    Criterion(
        "margin_loss, gradient 1: eager",
        lambda r: _op("margin_loss", "both")(r) and r["variant"] != "scaled",
        EAGER,
        8,
    ),
    Criterion(
        "margin_loss, another gradient: eager",
        lambda r: _op("margin_loss", "both")(r) and r["variant"] == "scaled",
        EAGER,
        8,
    ),
)

#: Backend of a GPU -> the share of the copy's bandwidth that its kernels must reach on large tensors.
OF_THE_COPY = {"cuda": 0.92, "triton": 0.9}
#: How many times as long as an empty launch a kernel may take on the smallest tensors.
LAUNCHES = 1.3


def _of_the_copy(title: str, applies: Callable[[Row], bool], *backends: str) -> tuple[Criterion, ...]:
    return tuple(
        Criterion(f"{title}: of the copy ({name})", applies, COPY, OF_THE_COPY[name], backend=name) for name in backends
    )


#: And on a GPU. A copy there writes to memory that the allocator has already.
CUDA_CRITERIA = (
    *_of_the_copy("256 MB and more", _huge("fake_quantize"), *OF_THE_COPY),
    *_of_the_copy("256 MB and more, in place", _huge("fake_quantize_"), *OF_THE_COPY),
    Criterion("256 MB and more: torch's own op", _huge("fake_quantize"), NATIVE, 2),
    Criterion("256 MB and more: torch.compile", _huge("fake_quantize"), COMPILE, 1.2),
    *_of_the_copy("affine forward, 256 MB and more", _huge("affine_act_fake_quantize"), *OF_THE_COPY),
    *_of_the_copy("bn_match_forward forward, 256 MB and more", _huge("bn_match_forward"), *OF_THE_COPY),
    *_of_the_copy("packing, 256 MB and more", _huge("quantize_pack"), "cuda"),
    *_of_the_copy("unpacking, 256 MB and more", _huge("unpack_dequantize"), "cuda"),
    Criterion("ResNet-18 weights: of the copy", _is_resnet18_weights, COPY, 0.5),
    # The operator of the reference computes the gradients with the value, as the kernel does.
    Criterion("margin_loss, value and gradients: eager", _op("margin_loss", "forward"), REFERENCE, 10),
    Criterion(
        "layers of ResNet-20: an empty launch (cuda)",
        lambda r: is_launch(r["where"], r["pass"]),
        EMPTY,
        1 / LAUNCHES,
        REPLAYED,
        backend="cuda",
    ),
    # Triton has no kernels for packing.
    Criterion(
        "every case: triton, or routed to it (cuda)",
        lambda r: bool(routes.operators(r)) and r["op"] not in PACKING,
        OURS + routes.OTHER,
        1 / (1 + routes.MARGIN),
        backend=routes.FIRST,
        or_routed=True,
    ),
)


def criteria(device: str) -> tuple[Criterion, ...]:
    """The table for rows of this device ("cpu" or "cuda")."""
    return CRITERIA if device == "cpu" else CUDA_CRITERIA


@dataclass(frozen=True)
class Judgement:
    """One criterion on one case; ratio is None where a row is missing."""

    criterion: Criterion
    case: str
    ratio: Ratio | None
    routed: bool = False
    """The table sends the case to the rival, which is enough for this criterion."""

    @property
    def met(self) -> bool | None:
        """Whether the medians, or the table of routes, meet the demand; None without a ratio."""
        return None if self.ratio is None else self.routed or self.ratio.median >= self.criterion.at_least


def judge(
    rows: Iterable[Row], left_out: Iterable[str] = (), whole: bool = False, table: Routes | None = None
) -> list[Judgement]:
    """Every criterion of the rows' devices on every case it applies to, by criterion.

    Args:
        left_out: names of cases that were not run: they have no time.
        whole: every criterion is asked for: one that applies to no case is there without a time.
        table: which of a GPU's backends serves what; None is the package's.
    """
    table = package_routes.load(package_routes.DEFAULT) if table is None else table
    groups = by_case(rows)
    cases = {case: next(iter(providers.values())) for case, providers in groups.items()}
    devices = dict.fromkeys(row["device"] for row in cases.values()) or {"cpu": None}
    known = {case.name: case for case in registry()}
    for name in left_out:
        if name in known and name not in cases:
            case = known[name]
            cases[name] = {"op": case.op, "variant": case.variant, "where": case.where, "pass": case.pass_}
            cases[name] |= {"nbytes": case.nbytes, "device": next(iter(devices))}
    found = []
    for device in devices:
        here = {case: row for case, row in cases.items() if row["device"] == device}
        for criterion in criteria(device):
            applies = [
                case
                for case, any_row in here.items()
                if criterion.applies(any_row) and (case not in groups or _has_rows(criterion, groups[case]))
            ]
            for case in applies:
                ratio = _judged_ratio(criterion, groups.get(case, {}), table)
                routed = criterion.or_routed and case in groups and _rival_serves(criterion, here[case], table)
                found.append(Judgement(criterion, case, ratio, routed))
            if whole and not applies:
                found.append(Judgement(criterion, "no case", None))
    return found


def _has_rows(criterion: Criterion, providers: dict[str, Row]) -> bool:
    """Whether a case that was run has the rows of ours that a criterion is about."""
    if criterion.backend is None:
        return True
    wanted = [criterion.backend, *([criterion.rival.removeprefix(OURS)] if criterion.or_routed else [])]
    return all(OURS + backend in providers for backend in wanted)


def _rival_serves(criterion: Criterion, row: Row, table: Routes) -> bool:
    return OURS + str(routes.routed(row, table)) == criterion.rival


def _judged_ratio(criterion: Criterion, providers: dict[str, Row], table: Routes) -> Ratio | None:
    if not providers:
        return None
    own = ours(providers, table) if criterion.backend is None else timed(providers, OURS + criterion.backend)
    if own is None:
        return None
    if criterion.provider_suffix:
        own = timed(providers, own["provider"] + criterion.provider_suffix)
    if criterion.rival == _BEST_OTHER:
        others = [name for name in providers if not name.startswith(OURS) and name not in UNCHECKED]
        other = fastest(providers, dict.fromkeys((REFERENCE, PLAIN, COMPILE, *others)))
    else:
        other = rival(providers, criterion.rival)
    return None if own is None or other is None else speed_up(other, own)


# --------------------------------------------------------------------------------------------------------- compare


@dataclass(frozen=True)
class Comparison:
    """Two files: the ratios of the rows they share, and what only one of them has a time for."""

    ratios: dict[tuple[str, str], Ratio]
    """(case, provider) -> time in the first over time in the second: above 1, the second is faster."""
    only_first: list[tuple[str, str]]
    only_second: list[tuple[str, str]]
    notes: list[str]
    """What differs between the files besides the times."""


def compare(first: dict[str, Any], second: dict[str, Any], force: bool = False) -> Comparison:
    """Compare two files of one kind (:mod:`benchmarks.store`).

    Raises:
        InvalidInputError: they are of different kinds, hold no times, or are of different devices and not `force`.
    """
    if first["kind"] != second["kind"]:
        raise InvalidInputError(f"the files must be of one kind, got {first['kind']} and {second['kind']}")
    if first["kind"] not in TIMED:
        raise InvalidInputError(f"{first['kind']} hold no times that could be compared: give files of 'ops' or 'step'")
    here, there = first["environment"], second["environment"]
    notes = []
    for key in ("device", "device_name", "cpu"):
        if here[key] != there[key]:
            if not force:
                raise InvalidInputError(
                    f"the files are of different machines ({key}: {here[key]} and {there[key]}), whose times cannot be "
                    "compared; --force compares them all the same"
                )
            notes.append(f"{key}: {here[key]} and {there[key]}")
    for key in ("threads", "transparent_hugepage", "thp_mem_alloc"):
        if here[key] != there[key]:
            notes.append(f"{key}: {here[key]} and {there[key]}")
    for name in here["versions"] | there["versions"]:
        if here["versions"].get(name) != there["versions"].get(name):
            notes.append(f"{name}: {here['versions'].get(name)} and {there['versions'].get(name)}")
    for key in ("git_commit", "git_dirty"):
        if here[key] != there[key]:
            notes.append(f"{key}: {here[key]} and {there[key]}")
    for key in ("rounds", "seconds"):
        if (one := first["options"].get(key)) != (other := second["options"].get(key)):
            notes.append(f"--{key}: {one} and {other}")
    a, b = _timed(first), _timed(second)
    return Comparison(
        {key: speed_up(a[key], b[key]) for key in a if key in b},
        [key for key in a if key not in b],
        [key for key in b if key not in a],
        notes,
    )


def _timed(content: dict[str, Any]) -> dict[tuple[str, str], Row]:
    return {(row["case"], row["provider"]): row for row in content["rows"] if row["status"] == "ok"}
