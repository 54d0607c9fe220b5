"""setup.py as a module, and its native modules built in a folder of a test's own."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]


def load_setup(root: Path = ROOT) -> ModuleType:
    """setup.py of `root`; skips where what it needs is not installed."""
    pytest.importorskip("pybind11", reason="pybind11 is needed to read setup.py's commands")
    pytest.importorskip("setuptools", minversion="77", reason="setuptools of pyproject.toml is not installed")
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
