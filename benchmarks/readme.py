"""README's tables and plots, from the stored files and nothing else."""

from __future__ import annotations

from pathlib import Path

from adadfq import files
from adadfq.errors import InvalidInputError
from benchmarks import plot, store
from benchmarks.report import BEGIN, END, readme_block

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"


def update(readme: Path = README, results: Path = RESULTS) -> list[Path]:
    """Rewrite the part of `readme` between the markers and the plots of every file in `results`; returns what changed.

    Raises:
        InvalidInputError: a marker is missing, or a file of results is not valid.
    """
    stored = _stored(results)
    text = readme.read_text(encoding="utf-8")
    new = _replaced(text, readme_block(stored), readme)
    written = []
    for path, content in stored:
        written += plot.plot(content, path.stem, results)
    if new != text:
        with files.atomic_write(readme) as temporary:
            temporary.write_text(new, encoding="utf-8")
        written.append(readme)
    return written


def stale(readme: Path = README, results: Path = RESULTS) -> list[str]:
    """What `update` would change or is missing; empty where nothing is."""
    stored = _stored(results)
    text = readme.read_text(encoding="utf-8")
    reasons = []
    if _replaced(text, readme_block(stored), readme) != text:
        reasons.append(f"{readme.name} does not show the stored results")
    for path, content in stored:
        names = ("step",) if content["kind"] == "step" else ("speedup", "roofline")
        plots = [results / f"{path.stem}-{name}.png" for name in names]
        reasons += [f"{image.name} is missing" for image in plots if not image.is_file()]
    return reasons


def _stored(results: Path) -> list[tuple[Path, dict[str, object]]]:
    return [(path, store.read(path)) for path in sorted(results.glob("*.json"))]


def _replaced(text: str, block: str, readme: Path) -> str:
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise InvalidInputError(f"{readme.name} must hold {BEGIN} and, after it, {END}: put them where the tables go")
    return before + block + after
