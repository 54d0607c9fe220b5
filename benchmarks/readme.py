"""The tables of docs/speed.md and README.md, and the plots, from the stored files and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from adadfq import files
from adadfq.errors import InvalidInputError
from benchmarks import plot, store
from benchmarks.report import BEGIN, END, readme_block, speed_block

ROOT = Path(__file__).parents[1]
Block = Callable[[Sequence[tuple[Path, dict[str, Any]]]], str]
#: What is written where.
PAGES: dict[Path, Block] = {ROOT / "docs" / "speed.md": speed_block, ROOT / "README.md": readme_block}
RESULTS = ROOT / "benchmarks" / "results"
#: What gpu.sh makes there of the operators' times.
ROUTES = "routes.json"


def update(page: Path, results: Path = RESULTS, block: Block = speed_block) -> list[Path]:
    """Rewrite the part of `page` between the markers and the plots of every file in `results`; returns what changed.

    Raises:
        InvalidInputError: a marker is missing, or a file of results is not valid or not to be published.
    """
    stored = _stored(results)
    before = page.read_text(encoding="utf-8")
    text = _replaced(before, block(stored), page)
    written = []
    for path, content in stored:
        images = {image: image.read_bytes() for image in _plots(path, content) if image.is_file()}
        if plot.names(content):
            written += [new for new in plot.plot(content, path.stem, results) if images.get(new) != new.read_bytes()]
    if text != before:
        with files.atomic_write(page) as temporary:
            temporary.write_text(text, encoding="utf-8")
        written.append(page)
    return written


def stale(page: Path, results: Path = RESULTS, block: Block = speed_block) -> list[str]:
    """What `update` would change or is missing; empty where nothing is."""
    stored = _stored(results)
    text = page.read_text(encoding="utf-8")
    reasons = []
    if _replaced(text, block(stored), page) != text:
        reasons.append(f"{page.name} does not show the stored results")
    for path, content in stored:
        digest = plot.digest(content).encode()
        for image in _plots(path, content):
            if not image.is_file():
                reasons.append(f"{image.name} is missing")
            elif digest not in image.read_bytes():
                reasons.append(f"{image.name} does not show {path.name}")
    return reasons


def _plots(path: Path, content: dict[str, Any]) -> list[Path]:
    return [path.with_name(f"{path.stem}-{name}.png") for name in plot.names(content)]


def _stored(results: Path) -> list[tuple[Path, dict[str, Any]]]:
    # A table of routes is made of a file that is here, and is no results; accuracies have a page of their own.
    found = [(path, store.read(path)) for path in sorted(results.glob("*.json")) if path.name != ROUTES]
    stored = [(path, content) for path, content in found if content["kind"] != "accuracy"]
    for path, content in stored:
        if _is_native(content) and content["environment"]["native_matches_sources"] is False:
            raise InvalidInputError(
                f"{path.name} was measured with modules that were not built from the csrc of its commit: "
                "build with 'pip install -e .' and measure again"
            )
    return stored


def _is_native(content: dict[str, Any]) -> bool:
    """Whether the rows, or some, are about the native modules; predictions for Triton and for steps are not."""
    if content["kind"] == "step predictions":
        return False
    return content["kind"] != "predictions" or any(row["backend"] == "cuda" for row in content["rows"])


def _replaced(text: str, block: str, page: Path) -> str:
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise InvalidInputError(f"{page.name} must hold {BEGIN} and, after it, {END}: put them where the tables go")
    return before + block + after
