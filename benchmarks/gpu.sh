#!/usr/bin/env bash
# Everything a machine with an NVIDIA GPU has to do, in one command of less than ten minutes:
#
#   bash benchmarks/gpu.sh [--fresh] [--from STAGE | --only STAGE] [--dry-run] [RESULTS_DIRECTORY]
#
# Stages: build (with CUDA, for this machine's GPU), tests (those marked gpu), sanitizer (the kernels' tests under
# compute-sanitizer), bench (operators and a training step; JSON in RESULTS_DIRECTORY, default benchmarks/results).
# A finished stage leaves a stamp there and is skipped by later runs at the same commit; --fresh forgets the stamps,
# --from and --only run their stages whatever the stamps say. A stage that takes longer than its limit fails.
# Needs nvcc, PyTorch with CUDA and Triton; PYTHON names the interpreter.
#
# --dry-run runs nothing, on any machine: it checks that every command exists and that every test and case collects.
set -euo pipefail
cd "$(dirname "$0")/.."

stages=(build tests sanitizer bench)
declare -A limits=([build]=150 [tests]=80 [sanitizer]=160 [bench]=200) # seconds; together less than 600
left_out=3
python=${PYTHON:-python3}

fail() {
  echo "gpu.sh: $*" >&2
  exit 1
}

is_stage() {
  [ -n "${1:-}" ] && [ -n "${limits[$1]:-}" ]
}

dry_run= fresh= from= only= inside= results=
while [ $# -gt 0 ]; do
  case $1 in
    --dry-run) dry_run=1 ;;
    --fresh) fresh=1 ;;
    --from | --only | --inside) # --inside: one stage, without its limit
      is_stage "${2:-}" || fail "$1 must be followed by one of ${stages[*]}, got '${2:-}'"
      declare "${1#--}=$2"
      shift
      ;;
    -*) fail "unknown option $1; see the head of this file" ;;
    *)
      [ -z "$results" ] || fail "one results directory is enough, got '$results' and '$1'"
      results=$1
      ;;
  esac
  shift
done
[ -z "$from" ] || [ -z "$only" ] || fail "--from and --only exclude each other"
results=${results:-benchmarks/results}
commit=$(git rev-parse HEAD 2>/dev/null || echo unknown)

run() {
  echo "+ $*"
  [ -n "$dry_run" ] || "$@"
}

run_build() {
  local archs=
  [ -n "$dry_run" ] || archs=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')
  run env ADADFQ_CUDA=1 ADADFQ_CUDA_ARCHS="${ADADFQ_CUDA_ARCHS:-$archs}" \
    "$python" -m pip install --no-build-isolation --no-deps -e .
  run "$python" -m adadfq info
}

run_tests() {
  run "$python" -m pytest -q -m gpu tests
}

run_sanitizer() {
  if [ -z "$dry_run" ] && ! command -v compute-sanitizer >/dev/null; then
    echo "gpu.sh: no compute-sanitizer on PATH: the stage is left out" >&2
    return "$left_out"
  fi
  local tool
  for tool in memcheck racecheck initcheck synccheck; do
    # Without torch's caching allocator, an access outside a tensor is an access outside an allocation.
    run env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 9 \
      "$python" -m pytest -q -m gpu -k fake_quantize tests
  done
}

run_bench() {
  # Only what a CUDA or Triton kernel serves: the rest would time the reference against itself.
  run "$python" -m benchmarks ops --device cuda --suite judged --kernels-only --rounds 21 --seconds 1 --limit 130 \
    --json "$results/ops-cuda.json"
  run "$python" -m benchmarks step --device cuda --rounds 21 --seconds 10 --json "$results/step-cuda.json"
}

if [ -n "$inside" ]; then
  "run_$inside"
  exit
fi

command -v timeout >/dev/null || fail "timeout (of GNU coreutils) is not on PATH"
command -v "$python" >/dev/null || fail "$python is not on PATH; PYTHON names the interpreter"
"$python" -c "import adadfq.ops, benchmarks.ops, benchmarks.step, pip" ||
  fail "adadfq or what it needs is not installed; pip install -e '.[test]' first"
if [ -n "$dry_run" ]; then
  # The sanitizer's choice of the GPU tests: imports every test file, and fails where nothing is left.
  "$python" -m pytest -q -m gpu -k fake_quantize --collect-only tests >/dev/null || fail "the GPU tests do not collect"
  "$python" -m benchmarks list --suite judged >/dev/null || fail "the judged cases do not collect"
  "$python" -m benchmarks ops --device cuda --suite judged --kernels-only --rounds 21 --seconds 1 --limit 1 --help >/dev/null
  "$python" -m benchmarks step --device cuda --rounds 21 --seconds 1 --help >/dev/null
elif ! "$python" -c "import torch, sys; sys.exit(not torch.cuda.is_available())"; then
  fail "torch sees no CUDA device; nothing was run (--dry-run needs none)"
fi

[ -n "$dry_run" ] || mkdir -p "$results"
begun=
for stage in "${stages[@]}"; do
  stamp=$results/.stage-$stage
  [ -z "$fresh" ] || [ -n "$dry_run" ] || rm -f "$stamp"
  [ "$stage" != "$from" ] || begun=1
  if [ -n "$only" ] && [ "$stage" != "$only" ] || [ -n "$from" ] && [ -z "$begun" ]; then
    echo "stage $stage: not asked for"
    continue
  fi
  if [ -z "$fresh$from$only" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$commit" ]; then
    echo "stage $stage: done at this commit, skipped"
    continue
  fi
  echo "stage $stage: at most ${limits[$stage]} s"
  if [ -n "$dry_run" ]; then
    "run_$stage"
    continue
  fi
  status=0
  timeout --kill-after=5 "${limits[$stage]}" bash "$0" --inside "$stage" "$results" || status=$?
  case $status in
    0) echo "$commit" >"$stamp" ;;
    "$left_out") ;;
    124 | 137) fail "stage $stage took longer than ${limits[$stage]} s; run again to go on from it" ;;
    *) fail "stage $stage failed ($status); run again to go on from it" ;;
  esac
done
