"""setup.py as a module, and its native modules built in a folder of a test's own."""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import NoReturn

import pytest

ROOT = Path(__file__).resolve().parents[1]


def unavailable(reason: str) -> NoReturn:
    """Skip a test, a fixture's tests or a file, for want of a tool; ADADFQ_TEST_REQUIRE_CUDA=1 makes it a failure."""
    if os.environ.get("ADADFQ_TEST_REQUIRE_CUDA") == "1":
        pytest.fail(f"{reason}, and ADADFQ_TEST_REQUIRE_CUDA=1 asks for it", pytrace=False)
    pytest.skip(reason, allow_module_level=True)


def require_recording() -> None:
    """:func:`unavailable` where launches of the CUDA backend cannot be recorded."""
    if importlib.util.find_spec("pybind11") is None:
        unavailable("pybind11 is needed to compile the launchers")
    for tool in (shlex.split(os.environ.get("CXX", "c++"))[-1], "nm", "c++filt"):
        if shutil.which(tool) is None:
            unavailable(f"no {tool}")


def load_setup(root: Path = ROOT) -> ModuleType:
    """setup.py of `root`; what it needs is :func:`unavailable` where it is not installed."""
    try:
        pytest.importorskip("pybind11", reason="pybind11 is needed to read setup.py's commands")
        pytest.importorskip("setuptools", minversion="77", reason="setuptools of pyproject.toml is not installed")
    except pytest.skip.Exception as skipped:
        unavailable(str(skipped))
    spec = importlib.util.spec_from_file_location("adadfq_setup", root / "setup.py")
    module = importlib.util.module_from_spec(spec)
    before = list(sys.path)
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path[:] = before
    return module


def copy_sources(folder: Path) -> Path:
    """What setup.py builds from, in `folder`, where a test may change it."""
    for name in ("setup.py", "ninja_build.py"):
        shutil.copy2(ROOT / name, folder)
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    return folder


def build(setup_py: ModuleType, name: str, *options: str) -> None:
    """Build one module alone, by setup.py's own command, below ``lib`` and ``temp`` of the current directory."""
    setup_py.setup(
        name="adadfq",
        ext_modules=[extension for extension in setup_py.extensions() if extension.name == name],
        cmdclass={"build_ext": setup_py.BuildExt},
        script_args=["build_ext", "--build-lib", "lib", "--build-temp", "temp", *options],
    )


if __name__ == "__main__":
    build(load_setup(Path.cwd()), *sys.argv[1:])
