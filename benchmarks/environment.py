"""Where a measurement was made: what a reader needs to judge it, and nothing that names a machine or a person."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from adadfq import info
from adadfq.errors import InvalidInputError
from benchmarks import huge_pages

_ROOT = Path(__file__).parents[1]
#: Results, and pages made of them: tracked, and changing while things are measured.
WRITTEN = ("benchmarks/results", "docs", "README.md")
#: What decides how fast bfloat16 is on a CPU, as Linux names it.
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16")


def pick_device(name: str, threads: int) -> torch.device:
    """The device of this name, with torch's threads set.

    Raises:
        InvalidInputError: there is no such device, or `threads` is not positive.
    """
    if threads < 1:
        raise InvalidInputError(f"threads must be at least 1, got {threads}")
    if name not in ("cpu", "cuda"):
        raise InvalidInputError(f"device must be cpu or cuda, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise InvalidInputError("device cuda was asked for and torch sees no CUDA device; use --device cpu")
    torch.set_num_threads(threads)
    return torch.device(name)


def describe(device: torch.device) -> dict[str, Any]:
    """device, device_name, cpu, cpus, threads, system, versions {name: version}, git_commit, git_dirty, date (UTC).

    Also transparent_hugepage, the system's mode, and thp_mem_alloc, whether PyTorch's allocator asks for huge pages.
    cpu_flags are those of :data:`CPU_FLAGS` that the processor has, where the system tells.
    native_matches_sources says whether csrc is what the native modules were built from; None where nobody knows.
    git_commit and git_dirty are None outside a git checkout, but where ADADFQ_COMMIT names what is there; what is in
    :data:`WRITTEN` makes no checkout dirty.
    """
    found = info.collect()
    cpu = next(entry for entry in found["devices"] if entry["device"] == "cpu")
    commit = _git("rev-parse", "HEAD") or os.environ.get("ADADFQ_COMMIT")
    status = _git(
        "status", "--porcelain", "--untracked-files=no", "--", ".", *(f":(exclude){path}" for path in WRITTEN)
    )
    if status is None and commit is not None:
        status = ""  # a digest of the sources themselves: benchmarks/gpu.sh
    return {
        "device": device.type,
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu["name"],
        "cpu": f"{cpu['name']} ({cpu['capability']})",
        "cpus": os.cpu_count(),
        "cpu_flags": cpu_flags(),
        "threads": torch.get_num_threads(),
        "transparent_hugepage": huge_pages.mode(),
        "thp_mem_alloc": huge_pages.asked_for(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {
            "adadfq": found["adadfq"],
            "python": found["python"],
            "torch": found["torch"],
            "triton": found["triton"]["version"],
            "cuda": torch.version.cuda,
        },
        "native_matches_sources": native_matches(found["build"]),
        "git_commit": commit,
        "git_dirty": None if status is None else bool(status),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


def cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> list[str]:
    """Those of :data:`CPU_FLAGS` that the first processor has; none where the system does not tell."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    found = next((line.split() for line in lines if line.startswith("flags")), [])
    return [flag for flag in CPU_FLAGS if flag in found]


def machine(environment: dict[str, Any]) -> str:
    """One line that names the machine and the software, for titles and tables."""
    parts = [environment["device_name"]]
    if environment["device"] == "cpu":
        parts.append(f"{environment['threads']} thread{'s' if environment['threads'] != 1 else ''}")
    versions = environment["versions"]
    parts.append(f"PyTorch {versions['torch']}")
    if environment["device"] == "cuda" and versions["triton"]:
        parts.append(f"Triton {versions['triton']}")
    if environment["git_commit"]:
        parts.append(f"commit {commit(environment)}")
    return ", ".join(parts)


def commit(environment: dict[str, Any]) -> str:
    """The commit's first digits, and whether what was measured differed from it."""
    return f"{environment['git_commit'][:10]}{' with changes' if environment['git_dirty'] else ''}"


def digest_of_sources(folder: Path = _ROOT / "csrc") -> str | None:
    """SHA-256 of the names and contents of all files of `folder`, as setup.py records it; None where there are none."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return digest_of_files(paths, folder) if paths else None


def digest_of_files(paths: Iterable[Path], folder: Path) -> str:
    """SHA-256 of the names, as seen from `folder`, and the contents of files."""
    found = hashlib.sha256()
    for path in sorted(paths):
        content = path.read_bytes()
        found.update(f"{path.relative_to(folder).as_posix()} {len(content)}\n".encode() + content)
    return found.hexdigest()


def native_matches(build: dict[str, Any] | None) -> bool | None:
    """Whether csrc is what `build`, the record of a build, was made from; None where nobody knows."""
    recorded, here = (build or {}).get("sources"), digest_of_sources()
    return None if recorded is None or here is None else recorded == here


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(_ROOT), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
