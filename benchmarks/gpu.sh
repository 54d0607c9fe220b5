#!/usr/bin/env bash
# Everything a machine with an NVIDIA GPU has to do, in one command of less than ten minutes, from any directory:
#
#   bash benchmarks/gpu.sh [--fresh] [--from STAGE | --only STAGE] [--dry-run] [RESULTS_DIRECTORY]
#
# Stages: build (with CUDA, for this machine's GPU), tests (those marked gpu), sanitizer (the kernels' tests under
# compute-sanitizer; left out where that is missing), bench (operators and a training step; JSON in RESULTS_DIRECTORY,
# default benchmarks/results of this repository).
# Two more are run when asked for, by --only STAGE, in a command of less than ten minutes of its own:
#   step: the training step of every network and batch size.
#   accuracy: ResNet-20 trained with the recipe adadfq_plus and with the paper's, over 40 epochs, at three widths with
#     three seeds, into accuracy-{plus,paper}-h200.json. WEIGHTS names the teacher's weights, DATA the images it is scored
#     on (see adadfq evaluate). Where the time is up, the same command goes on after the last run that is in a file.
# AUTHORS names a checkout of the authors' code, which plays too then (into accuracy-authors-h200.json).
# A finished stage leaves a stamp there and is skipped by later runs at the same commit, where nothing is changed;
# --fresh forgets the stamps, --from and --only run their stages whatever the stamps say. A stage that takes longer
# than its limit fails. Needs nvcc, PyTorch with CUDA and Triton; PYTHON names the interpreter.
#
# --dry-run runs nothing, on any machine: every command looks at its own options, tests collect, cases are chosen.
set -euo pipefail

stages=(build tests sanitizer bench)
declare -A limits=([build]=120 [tests]=110 [sanitizer]=140 [bench]=190) # seconds; together at most 560
alone=(step accuracy)
limits+=([step]=560 [accuracy]=560)
# Exit statuses of --inside that no command of a stage can bring about, see run().
left_out=77 partial=78
python=${PYTHON:-python3}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

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
      is_stage "${2:-}" || fail "$1 must be followed by one of ${stages[*]} ${alone[*]}, got '${2:-}'"
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
results=${results:-$root/benchmarks/results}
# Relative paths are the caller's.
case $results in /*) ;; *) results=$PWD/$results ;; esac
case $python in /*) ;; */*) python=$PWD/$python ;; esac
for name in AUTHORS WEIGHTS DATA; do
  case ${!name:-/} in /*) ;; *) export "$name=$PWD/${!name}" ;; esac
done
export PYTHON=$python
cd "$root"

# run OPTION COMMAND...: run the command; with --dry-run add the option that has it look at the others and do nothing.
run() {
  local look=$1
  shift
  echo "+ $*"
  if [ -n "$dry_run" ]; then
    "$@" "$look" >/dev/null || fail "exit status $? of: $* $look"
  else
    "$@" || fail "exit status $? of: $*"
  fi
}

run_build() {
  local archs=
  [ -n "$dry_run" ] || archs=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')
  run --help env ADADFQ_CUDA=1 ADADFQ_CUDA_ARCHS="${ADADFQ_CUDA_ARCHS:-$archs}" \
    "$python" -m pip install --no-build-isolation --no-deps -e .
  run --help "$python" -m adadfq info
}

run_tests() {
  run --collect-only "$python" -m pytest -q -m gpu tests
}

run_sanitizer() {
  if [ -z "$dry_run" ] && ! command -v compute-sanitizer >/dev/null; then
    echo "gpu.sh: no compute-sanitizer on PATH: the stage is left out" >&2
    return "$left_out"
  fi
  # Every operator in both layouts, on the two smallest shapes: kernels are some fifty times slower here.
  local small="test_kernel_equals_the_reference and float32 and not 56 and not 512 and not 300 and not 2048"
  local barrier="test_margin_loss_with_a_barrier and 1024x10 and not 1024x1000"
  local tool chosen kernels
  for tool in memcheck racecheck initcheck synccheck; do
    chosen="($small) or ($barrier)"
    # Triton's programs wait for flags that others have yet to write: initcheck would report just that.
    [ "$tool" != initcheck ] || chosen="($small) or ($barrier and not triton)"
    kernels=("$python" -m pytest -q -m gpu -k "$chosen" tests/test_gpu.py)
    [ -z "$dry_run" ] || run --collect-only "${kernels[@]}"
    # Without torch's caching allocator, an access outside a tensor is an access outside an allocation.
    local sanitized=(env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 9)
    if [ -n "$dry_run" ] && ! command -v compute-sanitizer >/dev/null; then
      echo "+ ${sanitized[*]} ${kernels[*]} (not looked at: compute-sanitizer is not here)"
    else
      run --collect-only "${sanitized[@]}" "${kernels[@]}"
    fi
  done
}

run_bench() {
  # Only what a CUDA or Triton kernel serves: the rest would time the reference against itself.
  run --dry-run "$python" -m benchmarks ops --device cuda --suite gpu --kernels-only --rounds 21 --seconds 0.5 \
    --limit 140 --json "$results/ops-cuda.json"
  # Which of the two backends serves what, for ADADFQ_ROUTES or adadfq/ops/routes.json.
  run --dry-run "$python" -m benchmarks routes "$results/ops-cuda.json" --out "$results/routes.json"
  run --dry-run "$python" -m benchmarks step --device cuda --providers "plain,adadfq*" --rounds 21 --seconds 10 --json "$results/step-cuda.json"
  [ -n "$dry_run" ] ||
    "$python" -c 'import json, sys; sys.exit(bool(json.load(open(sys.argv[1]))["left_out"]))' "$results/ops-cuda.json" ||
    return "$partial"
}

run_step() {
  local others=()
  [ -z "${AUTHORS:-}" ] || others=(--authors "$AUTHORS")
  run --dry-run "$python" -m benchmarks step --device cuda --suite full --rounds 21 --seconds 10 \
    --providers "plain,adadfq*${AUTHORS:+,authors}" "${others[@]}" --json "$results/step-full-cuda.json"
}

run_accuracy() {
  local study
  if [ -z "$dry_run" ] && { [ -z "${WEIGHTS:-}" ] || [ -z "${DATA:-}" ]; }; then
    fail "stage accuracy needs WEIGHTS, the teacher's weights, and DATA, the images it is scored on"
  fi
  local common=(--weights "${WEIGHTS:-WEIGHTS}" --data "${DATA:-DATA}" --device cuda)
  for study in plus paper; do
    run --dry-run "$python" -m benchmarks accuracy resnet20 --study "$study" "${common[@]}" \
      --json "$results/accuracy-$study-h200.json"
  done
  [ -z "${AUTHORS:-}" ] || run --dry-run "$python" -m benchmarks accuracy resnet20 --study paper "${common[@]}" \
    --authors "$AUTHORS" --json "$results/accuracy-authors-h200.json"
}

if [ -n "$inside" ]; then
  "run_$inside"
  exit
fi

command -v timeout >/dev/null || fail "timeout (of GNU coreutils) is not on PATH"
command -v "$python" >/dev/null || fail "$python is not on PATH; PYTHON names the interpreter"
"$python" -c "import adadfq.ops, benchmarks.ops, benchmarks.step, pip" ||
  fail "adadfq or what it needs is not installed; pip install -e '.[test]' first"
if [ -z "$dry_run" ] && ! "$python" -c "import torch, sys; sys.exit(not torch.cuda.is_available())"; then
  fail "torch sees no CUDA device; nothing was run (--dry-run needs none)"
fi

for stage in "${alone[@]}"; do
  [ "$only$from" != "$stage" ] || stages=("$stage")
done

# A stamp names a commit, and so says nothing where there is none or the files are others.
commit=$(git rev-parse HEAD 2>/dev/null) || commit=
[ -z "$commit" ] || [ -z "$(git status --porcelain --untracked-files=no)" ] || commit=
[ -n "$commit" ] || echo "not a clean checkout: nothing is skipped, and no stamps are left"

[ -n "$dry_run" ] || mkdir -p "$results"
begun= running= notes=()
# timeout runs its command in a group of its own, which an interrupt from the keyboard does not reach.
trap '[ -z "$running" ] || { kill -TERM "$running"; wait "$running"; } 2>/dev/null || true; fail interrupted' INT TERM
for stage in "${stages[@]}"; do
  stamp=$results/.stage-$stage
  [ -z "$fresh" ] || [ -n "$dry_run" ] || rm -f "$stamp"
  [ "$stage" != "$from" ] || begun=1
  if [ -n "$only" ] && [ "$stage" != "$only" ] || [ -n "$from" ] && [ -z "$begun" ]; then
    echo "stage $stage: not asked for"
    continue
  fi
  if [ -z "$fresh$from$only" ] && [ -n "$commit" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$commit" ]; then
    echo "stage $stage: done at this commit, skipped"
    continue
  fi
  echo "stage $stage: at most ${limits[$stage]} s"
  if [ -n "$dry_run" ]; then
    "run_$stage"
    continue
  fi
  rm -f "$stamp"
  status=0
  timeout --kill-after=5 "${limits[$stage]}" bash "$root/benchmarks/gpu.sh" --inside "$stage" "$results" &
  running=$!
  wait "$running" || status=$?
  running=
  case $stage-$status in
    *-0) [ -z "$commit" ] || echo "$commit" >"$stamp" ;;
    sanitizer-"$left_out") notes+=("stage sanitizer was left out: no compute-sanitizer on PATH") ;;
    bench-"$partial") notes+=("stage bench is not complete: its time was up; --only bench runs it again") ;;
    *-124 | *-137) fail "stage $stage took longer than ${limits[$stage]} s; run again to go on from it" ;;
    *) fail "stage $stage failed ($status); run again to go on from it" ;;
  esac
done
[ ${#notes[@]} -eq 0 ] || printf 'note: %s\n' "${notes[@]}"
