"""What this installation is made of: versions, devices, what was built, and which backend serves which operator."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

from adadfq.version import __version__

BUILD_FILE = Path(__file__).with_name(f"_build_info.{sys.implementation.cache_tag}.json")


def collect() -> dict[str, Any]:
    """Everything ``adadfq info`` prints, as JSON-able values.

    Keys: adadfq, python, platform, torch, triton {version, why_not}, build (None where nothing recorded it), devices,
    threads, backends {name: reason it is unavailable, or None}, requested_backend, routes {override, measured, rules,
    error} (of :mod:`adadfq.ops.routes`), operators {device: {op: {serves, error, by_size {size: backend}, why_not
    {backend: reason or None}}}} for float32; by_size has the sizes that another backend serves.
    """
    import torch

    from adadfq.ops import dispatch

    return {
        "adadfq": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "triton": _triton(),
        "build": _build(),
        "devices": _devices(),
        "threads": {"torch": torch.get_num_threads(), "cpus": os.cpu_count()},
        "backends": {name: module.why_unavailable() for name, module in dispatch.BACKENDS.items()},
        "requested_backend": os.environ.get("ADADFQ_BACKEND") or None,
        "routes": _routes(),
        "operators": {device: _operators(device) for device in dispatch.PREFERENCE},
    }


def _triton() -> dict[str, str | None]:
    if importlib.util.find_spec("triton") is None:
        return {"version": None, "why_not": "it is not installed"}
    try:
        import triton
    except Exception as error:  # a broken installation must not take `info` away
        return {"version": None, "why_not": f"importing it raised {type(error).__name__}: {error}"}
    return {"version": triton.__version__, "why_not": None}


def _build() -> dict[str, Any] | None:
    try:
        return json.loads(BUILD_FILE.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        return {"error": f"{BUILD_FILE.name} cannot be read: {error}"}


def _devices() -> list[dict[str, Any]]:
    import torch

    devices: list[dict[str, Any]] = [{"device": "cpu", "name": _cpu_name(), "capability": _cpu_capability()}]
    if not torch.cuda.is_available():
        return devices
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        devices.append(
            {
                "device": f"cuda:{i}",
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory_bytes": properties.total_memory,
            }
        )
    return devices


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _cpu_capability() -> str:
    import torch

    return torch.backends.cpu.get_cpu_capability()


def _routes() -> dict[str, Any]:
    from adadfq.errors import BackendError
    from adadfq.ops import routes

    found: dict[str, Any] = {"override": routes.override(), "measured": None, "rules": None, "error": None}
    try:
        table = routes.current()
    except BackendError as error:
        return found | {"error": str(error)}
    return found | {"measured": table.measured, "rules": len(table.rules)}


def _operators(device: str) -> dict[str, Any]:
    import torch

    from adadfq.errors import BackendError
    from adadfq.ops import dispatch, routes
    from adadfq.ops.schema import OPERATORS

    table: dict[str, Any] = {}
    for op in OPERATORS:
        by_size: dict[str, str] = {}
        try:
            serves, error = dispatch.select(op, device, torch.float32), None
            if device == routes.DEVICE_TYPE:
                by_size = {size: dispatch.select(op, device, torch.float32, size) for size in routes.SIZES}
        except BackendError as refused:
            serves, error = None, str(refused)
        by_size = {size: name for size, name in by_size.items() if name != serves}
        reasons = {name: dispatch.why_not(name, op, device, torch.float32) for name in dispatch.PREFERENCE[device]}
        table[op] = {"serves": serves, "error": error, "by_size": by_size, "why_not": reasons}
    return table


def format_text(info: dict[str, Any]) -> str:
    """`collect()`'s dictionary as text for a terminal."""
    triton = info["triton"]
    lines = [
        f"adadfq    {info['adadfq']}",
        f"python    {info['python']} ({sys.implementation.name})",
        f"platform  {info['platform']}",
        f"torch     {info['torch']}",
        f"triton    {triton['version'] or 'no: ' + triton['why_not']}",
        f"threads   {info['threads']['torch']} of torch on {info['threads']['cpus']} CPUs",
    ]
    for device in info["devices"]:
        memory = f", {device['memory_bytes'] / 2**30:.0f} GiB" if "memory_bytes" in device else ""
        lines.append(f"{device['device']:<9} {device['name']} ({device['capability']}{memory})")
    if info["requested_backend"]:
        lines.append(f"backend   {info['requested_backend']} (ADADFQ_BACKEND)")
    lines += ["", "build"]
    build = info["build"] or {"": "nothing recorded; install with `pip install -e .` to build the native code"}
    lines += [f"  {key}{': ' if key else ''}{_inline(value)}" for key, value in build.items()]
    lines += ["", "backends"]
    lines += [f"  {name:<10} {reason or 'available'}" for name, reason in info["backends"].items()]
    lines += ["", *_routes_text(info["routes"])]
    has_gpu = any(device["device"].startswith("cuda") for device in info["devices"])
    for device, table in info["operators"].items():
        note = "; torch sees no CUDA device" if device == "cuda" and not has_gpu else ""
        lines += ["", f"operators on {device}, float32 (* serves{note})", *_operator_table(table)]
    return "\n".join(lines)


def _routes_text(routes: dict[str, Any]) -> list[str]:
    """What the choice between the GPU backends is made by."""
    if routes["error"]:
        return ["routes", f"  error: {routes['error']}"]
    measured = routes["measured"]
    if measured is None:
        text = "not measured" + (f", {routes['rules']} rules" if routes["rules"] else ": cuda first")
    else:
        commit = measured.get("git_commit")
        at = f" at commit {commit[:10]}" if commit else ""
        text = f"measured on {measured['device_name']}{at}, {routes['rules']} rules"
    return ["routes", f"  {text}" + (f" (ADADFQ_ROUTES: {routes['override']})" if routes["override"] else "")]


def _inline(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_inline(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(map(_inline, value)) or "none"
    return {None: "none", True: "yes", False: "no"}.get(value, str(value)) if not isinstance(value, str) else value


def _operator_table(table: dict[str, Any]) -> list[str]:
    """One row an operator, one column a backend; reasons are numbered below."""
    reasons: list[str] = []
    backends = list(next(iter(table.values()))["why_not"])
    width = max(map(len, table))
    lines = ["  " + " " * width + "".join(f"  {name:<9}" for name in backends)]
    for op, row in table.items():
        cells = []
        for name in backends:
            reason = row["why_not"][name]
            if reason is None:
                cells.append("*" if row["serves"] == name else "yes")
                continue
            if (text := f"{name}: {reason}") not in reasons:
                reasons.append(text)
            cells.append(f"no [{reasons.index(text) + 1}]")
        lines.append(("  " + op.ljust(width) + "".join(f"  {cell:<9}" for cell in cells)).rstrip())
    sized = {op: ", ".join(f"{size}: {name}" for size, name in row["by_size"].items()) for op, row in table.items()}
    lines += [f"  {op}, by size: {text}" for op, text in sized.items() if text]
    errors = dict.fromkeys(row["error"] for row in table.values() if row["error"])
    return lines + [f"  [{i}] {text}" for i, text in enumerate(reasons, 1)] + [f"  error: {text}" for text in errors]
