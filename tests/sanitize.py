"""Runs the kernels' tests on modules built with AddressSanitizer and UndefinedBehaviorSanitizer.

    python tests/sanitize.py [--require] [--cuda] [pytest arguments]

The module is ``_C_cpu``, or with --cuda the CUDA kernels in their emulator (tests/cuda_emulator). The default arguments
are the property tests, with few examples (ADADFQ_TEST_EXAMPLES), and the tests of the kernels. torch's memory comes
from the allocator that AddressSanitizer replaces, so an access beyond a tensor is seen: before the tests, one
deliberate overrun and one deliberate overflow must be. Both sanitizers end the process; the report and the Python
stack are then the last thing printed. Where g++ has no sanitizers nothing is run, which is a success without --require.

The same file is the pytest plugin that puts the module in place.
"""

from __future__ import annotations

import argparse
import ast
import ctypes
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# Sanitizers cannot run inside the resolvers of cloned functions.
SANITIZE = ["-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all", "-DADADFQ_NO_CLONES"]
#: By backend.
DEFAULT_TESTS = {
    "cpu": ["-q", "tests/test_properties.py", "tests/test_packing.py", "tests/test_native_cpu.py"],
    # Of packing what other widths than the kernels' tests have: their last groups differ.
    "cuda": [
        "-q",
        "tests/test_properties.py",
        "tests/test_cuda_kernels.py",
        "tests/test_packing.py::test_every_size_up_to_40",
    ],
}
DEFAULT_EXAMPLES = {"cpu": "0.3", "cuda": "0.05"}
MODULE = "adadfq._C_cpu"
VARIABLE, BACKEND = "ADADFQ_SANITIZED_MODULE", "ADADFQ_SANITIZED_BACKEND"

#: What must be seen, and elements and bits of a fake quantisation of 1001 elements that does it.
FAULTS = {
    "AddressSanitizer: heap-buffer-overflow": (1002, 4),
    "runtime error: shift exponent 40 is too large": (1001, 40),
}


def why_not() -> str | None:
    """Why nothing can be built with sanitizers here; None where it can."""
    if (cxx := shutil.which("g++")) is None:
        return "no g++"
    with tempfile.TemporaryDirectory() as folder:
        probe = Path(folder, "probe.cpp")
        probe.write_text("int main() {}\n")
        command = [cxx, *SANITIZE, str(probe), "-o", str(probe.with_suffix(""))]
        failed = subprocess.run(command, capture_output=True).returncode
    return "g++ has no sanitizer runtime" if failed else None


def flags_of_setup() -> list[str]:
    """CXX_FLAGS of setup.py, which cannot be imported without the setuptools it builds with."""
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "CXX_FLAGS":
            return ast.literal_eval(node.value)
    raise RuntimeError("setup.py has no CXX_FLAGS")


def build(backend: str, folder: Path) -> Path:
    """The backend's module in `folder`."""
    if backend == "cuda":
        import emulated_cuda

        return emulated_cuda.build("sanitized")
    return build_cpu(folder)


def build_cpu(folder: Path) -> Path:
    """The extension module in `folder`, compiled as setup.py does but for optimisation and sanitizers."""
    import pybind11

    flags = [*flags_of_setup(), "-fopenmp", "-fPIC", "-O1", "-g", *SANITIZE]
    flags += [f"-I{path}" for path in (pybind11.get_include(), sysconfig.get_path("include"))]
    sources = [ROOT / "csrc" / "bind_cpu.cpp", *sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))]
    objects = [folder / f"{source.stem}.o" for source in sources]

    def compile_one(source: Path, target: Path) -> None:
        subprocess.run(["g++", *flags, "-c", str(source), "-o", str(target)], check=True)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_one, sources, objects))
    module = folder / f"_C_cpu{sysconfig.get_config_var('EXT_SUFFIX')}"
    subprocess.run(["g++", *flags, "-shared", *map(str, objects), "-o", str(module)], check=True)
    return module


def environment(backend: str, module: Path) -> dict[str, str]:
    """For a Python that was not linked with a sanitizer: its runtime must be the first library of the process, and
    libstdc++, whose exceptions it watches, there from the beginning."""
    linked = subprocess.run(["ldd", str(module)], check=True, capture_output=True, text=True).stdout
    preload = re.findall(r"lib(?:asan|stdc\+\+)\.so\S* => (\S+)", linked)
    path = os.pathsep.join(filter(None, (str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH"))))
    return {
        "ADADFQ_TEST_EXAMPLES": DEFAULT_EXAMPLES[backend],
        **os.environ,
        "LD_PRELOAD": " ".join(sorted(preload)),
        # The interpreter and libgomp keep memory until the process ends.
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1",
        "UBSAN_OPTIONS": "print_stacktrace=1:abort_on_error=1",
        "PYTHONPATH": path,
        VARIABLE: str(module),
        BACKEND: backend,
        **({"ADADFQ_TEST_EMULATED_CUDA": str(module)} if backend == "cuda" else {}),
    }


def load() -> None:
    """Put the sanitized module where the package looks for its own."""
    import torch  # noqa: F401  (its libgomp first, as in adadfq/ops/cpu.py)

    if os.environ[BACKEND] == "cuda":
        import emulated_cuda

        emulated_cuda.install()
        return
    spec = importlib.util.spec_from_file_location(MODULE, os.environ[VARIABLE])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[MODULE] = module


def backend() -> ModuleType:
    """The backend under test."""
    return importlib.import_module(f"adadfq.ops.{os.environ[BACKEND]}")


def check_in_use() -> None:
    """Raise unless the package uses the sanitized module, and the sanitizer guards the ends of tensors."""
    import torch

    assert backend().why_unavailable() is None and backend()._native().__file__ == os.environ[VARIABLE]
    x = torch.empty(1001)
    poisoned = ctypes.CDLL(None).__asan_address_is_poisoned
    poisoned.argtypes = [ctypes.c_void_p]
    assert poisoned(x.data_ptr() + 4004) and not poisoned(x.data_ptr() + 4000)


def pytest_load_initial_conftests() -> None:
    load()


def pytest_collection_finish() -> None:
    check_in_use()


def pytest_sessionfinish(session: Any) -> None:
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if session.exitstatus == 0 and not reporter.stats.get("passed"):
        session.exitstatus = 5  # as pytest where it collects nothing: tests that all skip are no success


def commit_fault(elements: int, bits: int) -> None:
    """Fake quantisation of `elements` elements, where there are 1001."""
    import torch

    load()
    check_in_use()
    x, out, scale = torch.zeros(1001), torch.empty(1001), torch.ones(1)
    zero_point = torch.zeros(1, dtype=torch.int32)
    # After the dtype: the number of threads, or device and stream.
    last = (1,) if os.environ[BACKEND] == "cpu" else (0, 0)
    print("begun", flush=True)
    pointers = (tensor.data_ptr() for tensor in (x, scale, zero_point, out))
    backend()._native().fake_quantize(*pointers, 1, 1, elements, bits, 0, *last)


def check_faults_are_seen(env: dict[str, str]) -> None:
    """Raise unless the sanitizers end the process at each of FAULTS."""
    for report, (elements, bits) in FAULTS.items():
        command = [sys.executable, "-c", f"import sanitize; sanitize.commit_fault({elements}, {bits})"]
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
        if done.returncode == 0 or "begun" not in done.stdout or report not in done.stderr:
            raise SystemExit(f"a deliberate fault was not seen ({report}):\n{done.stdout}{done.stderr}")
        print(f"seen: {report}", flush=True)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--require", action="store_true", help="fail where there are no sanitizers")
    parser.add_argument("--cuda", action="store_true", help="the CUDA kernels, in their emulator")
    options, tests = parser.parse_known_args(arguments)
    backend = "cuda" if options.cuda else "cpu"
    if (reason := why_not()) is not None:
        print(f"sanitizers skipped: {reason}")
        return int(options.require)
    with tempfile.TemporaryDirectory() as folder:
        module = build(backend, Path(folder))
        env = environment(backend, module)
        check_faults_are_seen(env)
        # Reports are written to file descriptor 2, which pytest would otherwise keep to itself until it ends.
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-p",
            "sanitize",
            "--capture=sys",
            *(tests or DEFAULT_TESTS[backend]),
        ]
        return subprocess.run(command, cwd=ROOT, env=env).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
