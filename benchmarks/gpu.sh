#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, in one command:  bash benchmarks/gpu.sh [RESULTS_DIRECTORY]
# Builds with CUDA, runs the GPU tests, the same tests under compute-sanitizer, and the benchmarks; the results are
# JSON files in RESULTS_DIRECTORY (default: benchmarks/results). Needs nvcc, PyTorch with CUDA and Triton installed.
# --dry-run stops after checking that every command it would run exists.
set -euo pipefail
cd "$(dirname "$0")/.."

dry_run=
if [ "${1:-}" = --dry-run ]; then
  dry_run=1
  shift
fi
results=${1:-benchmarks/results}
python=${PYTHON:-python3}

run() {
  echo "+ $*"
  [ -n "$dry_run" ] || "$@"
}

"$python" -c "import adadfq.ops, benchmarks.fake_quantize" || {
  echo "gpu.sh: adadfq is not installed; pip install -e '.[test]' first" >&2
  exit 1
}
"$python" -m pytest -q -m gpu --collect-only tests >/dev/null
if [ -z "$dry_run" ] && ! "$python" -c "import torch, sys; sys.exit(not torch.cuda.is_available())"; then
  echo "gpu.sh: torch sees no CUDA device; nothing was run" >&2
  exit 1
fi

run env ADADFQ_CUDA=1 "$python" -m pip install --no-build-isolation --no-deps -e .
run "$python" -m adadfq info
run "$python" -m pytest -m gpu tests
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck initcheck synccheck; do
    # Without torch's caching allocator, an access outside a tensor is an access outside an allocation.
    run env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 9 \
      "$python" -m pytest -q -m gpu -k "fake_quantize" tests
  done
else
  echo "gpu.sh: no compute-sanitizer on PATH; that step is left out" >&2
fi
run mkdir -p "$results"
run "$python" -m benchmarks.fake_quantize --device cuda --megabytes 256 --rounds 51 --json "$results/fake_quantize_cuda.json"
