"""Losses on the disagreement d = t - q and the agreement a = t + q of two [B, K] tensors of logits.

p = softmax(d), D = log K - H(p)            how far row b is from agreement, 0 <= D <= log K
dD/dd = p (log(K p) - D)
H' = 1 - D / max_b D                        (H - min H) / (log K - min H)
margin_loss:           mean max(lambda_l - H', 0) + mean max(H' - lambda_u, 0)
                       + beta (alpha_ds mean CE(d, label) + alpha_as mean CE(a, label))
entropy_distillation:  -T^2 mean_b H(softmax(d / T)) = T^2 (mean_b D - log K)

All in float64. With x = d - max d, D is sum e^x x / sum e^x - log(sum e^x / K): near agreement both terms are small and
D keeps an absolute error of about 1e-15, where 1e-6 counts as agreement.

A program takes tiles of ROWS rows and BLOCK_K classes, and sums a row of more classes chunk by chunk, lowering what it
has by how much the row's peak rose. Scratch holds a few float64 values a row, and max_b D enters every gradient, so
margin_loss has two phases: values of the rows, then of the batch and the gradients. Every program sums the batch
itself, in the same order, so results depend neither on the number of programs nor on that of launches:

- one program, one launch: few elements;
- up to 128 programs, one launch with a barrier among them: up to 2^20 elements;
- two launches, one a phase: more, a device with few multiprocessors, under capture into a CUDA graph, interpreted,
  and the first call of a size, so that a capture later finds these kernels loaded.

The barrier. Waiting for a program that cannot start before this one ends would hang, so the launch is cooperative: it
starts all programs at once or fails. It does not fail: with 4 warps of at most 255 registers two programs fit a
multiprocessor of sm_80 and up, so 128 do from 64 multiprocessors on. Each program publishes its rows by releasing a
flag, a word in scratch, and goes on when it has acquired all flags. "Raised" is a number no other launch has, hence
nobody has to clear flags, which would be a launch of its own, nor keep them from call to call, which would tie them to
a stream. Replays of a graph would all have the same number: so not under capture.

Bytes an element, float32: 24 (two logits in, twice; two gradients out), distillation 12 (what it reads twice comes from
a cache); 16-bit types half of that. Launches: 1 or 2; distillation 1 with few elements, else 2.

Test: python -m pytest tests/test_triton.py -k losses
Time: python -m benchmarks ops --device cuda --suite gpu --ops margin_loss,entropy_distillation --json out.json
"""

from __future__ import annotations

import itertools
import random
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Elements of a tile: 8 a thread.
TILE = 1024
#: Warps of a program; the barrier counts on 4.
NUM_WARPS = 4
#: Registers of a thread, at most; the barrier counts on no more.
MAX_REGISTERS = 255
#: Elements, padding included, that one program takes alone.
ALONE = 4096
#: Programs that a launch with a barrier can have, one flag a thread, and multiprocessors that hold so many.
MAX_TOGETHER, MULTIPROCESSORS = 128, 64
#: Elements up to which a barrier is quicker than a second launch.
TOGETHER = 2**20
#: Programs of a launch without a barrier; they take turns with the rows.
MAX_PROGRAMS = 1024
#: Rows of the batch that are summed at a time.
BLOCK_B = 1024

#: Phases of a launch.
ROW_VALUES, BATCH_AND_GRADIENTS, BOTH = 1, 2, 3
_ROW_VALUES, _BATCH_AND_GRADIENTS, _BOTH = tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)

#: Scratch, float64 [_VALUES, B]: D, what turns d into log(K p) and a into log softmax(a), and both at the label.
_VALUES = 5
_DEFICIT, _SHIFT_DS, _SHIFT_AS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
_LABEL_DS, _LABEL_AS, _FLAGS = tl.constexpr(3), tl.constexpr(4), tl.constexpr(_VALUES)

_MAX_TOGETHER = tl.constexpr(MAX_TOGETHER)
#: Below every sum and difference of float32 numbers, but finite.
_LOWEST = tl.constexpr(-1e300)
#: Pads logits relative to their peak: e^_ABSENT is 0.
_ABSENT = tl.constexpr(-1000.0)
#: adadfq.ops.reference.FULL_AGREEMENT
_FULL_AGREEMENT = tl.constexpr(1e-6)

# Starts at random, so that what other tensors left in the memory of flags does not look like one of these.
_launches = itertools.count(random.SystemRandom().getrandbits(62))


@triton.jit
def _tile(teacher_ptr, student_ptr, base, first, rows, classes, slope, ROWS: tl.constexpr, BLOCK_K: tl.constexpr):
    """d, a, offsets from `base`, which columns and which elements exist; 0 where an element does not."""
    column = first + tl.arange(0, BLOCK_K)[None, :]
    row = tl.arange(0, ROWS)[:, None]
    exists = column < classes
    mask = (row < rows) & exists
    local = row * classes + column
    teacher = tl.load(teacher_ptr + base + local, mask=mask, other=0.0).to(tl.float64)
    student = tl.load(student_ptr + base + local, mask=mask, other=0.0).to(tl.float64)
    return (teacher - student) * slope, teacher + student, local, exists, mask


@triton.jit
def _reciprocal(x):
    """1 / x to about a last place, for x in float32's range: float64's division is a call, with spills around it."""
    narrow = x.to(tl.float32)
    r = tl.div_rn(tl.zeros_like(narrow) + 1.0, narrow).to(tl.float64)
    r = r * (2.0 - x * r)
    return r * (2.0 - x * r)


@triton.jit
def _add(x, exists, peak, total, weighted):
    """Adds a chunk to sum e^(x - peak) and sum e^(x - peak) (x - peak) of each row, and raises the peak."""
    # Passes over NaN, which enters the sums below.
    top = tl.maximum(peak, tl.max(tl.where(exists, x, _LOWEST), 1))
    drop = peak - top
    shrink = tl.exp(drop)
    x = tl.where(exists, x - top[:, None], _ABSENT)
    e = tl.exp(x)
    weighted = shrink * (weighted + total * drop) + tl.sum(e * x, 1)
    return top, shrink * total + tl.sum(e, 1), weighted


@triton.jit
def _deficit(peak, total, weighted, log_classes):
    """(D, log mean e^d) of each row; NaN stays."""
    log_mean = tl.log(total) - log_classes
    deficit = weighted * _reciprocal(total) - log_mean
    deficit = tl.where(deficit < 0.0, tl.zeros_like(deficit), deficit)
    return tl.where(deficit > log_classes, log_classes, deficit), peak + log_mean


@triton.jit
def _values(scratch_ptr, value, first, batch, BLOCK: tl.constexpr):
    """`value` of rows `first` and on, 0 beyond the last; other programs may have written them in this launch."""
    row = first + tl.arange(0, BLOCK)
    # 64 bits, as 5 * batch may need them.
    start = scratch_ptr + tl.cast(batch, tl.int64) * value
    return tl.load(start + row, mask=row < batch, other=0.0, volatile=True)


@triton.jit
def _set_values(scratch_ptr, value, first, batch, values, BLOCK: tl.constexpr):
    row = first + tl.arange(0, BLOCK)
    tl.store(scratch_ptr + tl.cast(batch, tl.int64) * value + row, values, mask=row < batch)


@triton.jit
def _wait_for_all(flag_ptr, raised):
    """Returns when every program of this launch has come here; what they wrote before can be read then."""
    tl.debug_barrier()
    tl.atomic_xchg(flag_ptr + tl.program_id(0), raised, sem="release", scope="gpu")
    program = tl.arange(0, _MAX_TOGETHER)
    exists = program < tl.num_programs(0)
    missing = 1
    while missing > 0:
        flags = tl.load(flag_ptr + program, mask=exists, other=0, volatile=True)
        missing = tl.max((exists & (flags != raised)).to(tl.int32), 0)
    # All are raised; reading them once more, in order, is what makes the other programs' writes visible.
    tl.atomic_add(flag_ptr + program, tl.zeros([_MAX_TOGETHER], tl.int64), mask=exists, sem="acquire", scope="gpu")
    tl.debug_barrier()


@triton.jit
def _largest_deficit(scratch_ptr, batch, BLOCK_B: tl.constexpr):
    """max_b D, NaN where one is."""
    largest = tl.zeros([BLOCK_B], tl.float64)
    for first in range(0, batch, BLOCK_B):
        deficit = _values(scratch_ptr, _DEFICIT, first, batch, BLOCK_B)
        largest = tl.where((deficit > largest) | (deficit != deficit), deficit, largest)
    has_nan = tl.max((largest != largest).to(tl.int32), 0)
    return tl.where(has_nan > 0, float("nan"), tl.max(largest, 0))


@triton.jit
def _h_prime(deficit, largest_floor, slope_h, lambda_l, lambda_u, per_row):
    """H' and d L_margin / d H' of each row; `slope_h` is 1 / `largest_floor`."""
    ratio = deficit * slope_h
    # The largest D's H' is 0, and no H' is less, whatever the product's rounding. NaN stays.
    h = tl.where((deficit == largest_floor) | (ratio > 1.0), 0.0, 1.0 - ratio)
    return h, ((h > lambda_u).to(tl.float64) - (h < lambda_l).to(tl.float64)) * per_row


@triton.jit(do_not_specialize=["raised"])
def margin_loss_kernel(
    teacher_ptr,
    student_ptr,
    labels_ptr,
    total_ptr,
    margin_ptr,
    disagreement_ptr,
    agreement_ptr,
    h_prime_ptr,
    grad_teacher_ptr,
    grad_student_ptr,
    scratch_ptr,
    raised: tl.int64,
    batch,
    class_groups,
    lambda_l: tl.float64,
    lambda_u: tl.float64,
    alpha_ds: tl.float64,
    alpha_as: tl.float64,
    beta: tl.float64,
    DETACH_MIN: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_B: tl.constexpr,
    PHASES: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    classes = class_groups * GROUP
    # Added to 0, for an argument that is 1 is a constant without a type.
    per_row = _reciprocal(tl.full([], 0, tl.float64) + batch)
    log_classes = tl.log(tl.full([], 0, tl.float64) + classes)
    slope = tl.full([], 1, tl.float64)
    program = tl.program_id(0)
    blocks = (batch + ROWS - 1) // ROWS

    if PHASES != _BATCH_AND_GRADIENTS:
        for block in range(program, blocks, tl.num_programs(0)):
            first_row = block * ROWS
            base = first_row.to(tl.int64) * classes
            peak_ds = tl.full([ROWS], _LOWEST, tl.float64)
            peak_as = peak_ds
            total_ds = tl.zeros([ROWS], tl.float64)
            weighted_ds = total_ds
            total_as = total_ds
            unused = total_ds
            for first in range(0, classes, BLOCK_K):
                ds, as_, local, exists, mask = _tile(
                    teacher_ptr, student_ptr, base, first, batch - first_row, classes, slope, ROWS, BLOCK_K
                )
                peak_ds, total_ds, weighted_ds = _add(ds, exists, peak_ds, total_ds, weighted_ds)
                peak_as, total_as, unused = _add(as_, exists, peak_as, total_as, unused)
            deficit, shift_ds = _deficit(peak_ds, total_ds, weighted_ds, log_classes)
            shift_as = peak_as + tl.log(total_as)

            row = tl.arange(0, ROWS)
            label = tl.load(labels_ptr + first_row + row, mask=first_row + row < batch, other=0)
            is_class = (label >= 0) & (label < classes) & (first_row + row < batch)
            place = base + row * classes + label
            teacher = tl.load(teacher_ptr + place, mask=is_class, other=float("nan")).to(tl.float64)
            student = tl.load(student_ptr + place, mask=is_class, other=float("nan")).to(tl.float64)
            # -infinity in d makes D NaN but might leave this a number: no loss is to look sound then.
            label_ds = teacher - student - shift_ds + 0.0 * deficit
            _set_values(scratch_ptr, _DEFICIT, first_row, batch, deficit, ROWS)
            _set_values(scratch_ptr, _SHIFT_DS, first_row, batch, shift_ds, ROWS)
            _set_values(scratch_ptr, _SHIFT_AS, first_row, batch, shift_as, ROWS)
            _set_values(scratch_ptr, _LABEL_DS, first_row, batch, label_ds, ROWS)
            _set_values(scratch_ptr, _LABEL_AS, first_row, batch, teacher + student - shift_as, ROWS)

    if PHASES == _BOTH:
        if TOGETHER:
            flags = scratch_ptr + tl.cast(batch, tl.int64) * _FLAGS
            _wait_for_all(flags.to(tl.pointer_type(tl.int64), bitcast=True), raised)
        else:
            tl.debug_barrier()

    if PHASES != _ROW_VALUES:
        floor = tl.full([], _FULL_AGREEMENT, tl.float64)
        largest = _largest_deficit(scratch_ptr, batch, BLOCK_B)
        largest_floor = tl.where(largest < floor, floor, largest)
        slope_h = _reciprocal(largest_floor)
        sums = tl.zeros([BLOCK_B], tl.float64)
        ties = tl.zeros([BLOCK_B], tl.float64)
        margins = tl.zeros([BLOCK_B], tl.float64)
        labels_ds = tl.zeros([BLOCK_B], tl.float64)
        labels_as = tl.zeros([BLOCK_B], tl.float64)
        for first in range(0, batch, BLOCK_B):
            exists = first + tl.arange(0, BLOCK_B) < batch
            deficit = _values(scratch_ptr, _DEFICIT, first, batch, BLOCK_B)
            h, grad_h = _h_prime(deficit, largest_floor, slope_h, lambda_l, lambda_u, per_row)
            below = lambda_l - h
            above = h - lambda_u
            margin = tl.where(below < 0.0, 0.0, below) + tl.where(above < 0.0, 0.0, above)
            sums += tl.where(exists, grad_h * deficit, 0.0)
            ties += (exists & (deficit == largest)).to(tl.float64)
            margins += tl.where(exists, margin, 0.0)
            labels_ds += _values(scratch_ptr, _LABEL_DS, first, batch, BLOCK_B)
            labels_as += _values(scratch_ptr, _LABEL_AS, first, batch, BLOCK_B)

        if program == 0:
            # Against a uniform guess: log p = log(K p) - log K.
            disagreement = log_classes - tl.sum(labels_ds, 0) * per_row
            agreement = 0.0 - tl.sum(labels_as, 0) * per_row
            # NaN where a label is none.
            margin = tl.sum(margins, 0) * per_row + 0.0 * agreement
            total = margin + beta * (alpha_ds * disagreement + alpha_as * agreement)
            tl.store(total_ptr, total.to(tl.float32))
            tl.store(margin_ptr, margin.to(tl.float32))
            tl.store(disagreement_ptr, disagreement.to(tl.float32))
            tl.store(agreement_ptr, agreement.to(tl.float32))

        through_largest = tl.full([], 0, tl.float64)
        if not DETACH_MIN:
            # The batch minimum of H is the maximum of D; ties share its gradient evenly.
            through_largest = tl.sum(sums, 0) * slope_h * slope_h * _reciprocal(tl.sum(ties, 0))
            through_largest = tl.where(largest >= floor, through_largest, 0.0)
        weight_ds = beta * alpha_ds * per_row
        weight_as = beta * alpha_as * per_row
        for block in range(program, blocks, tl.num_programs(0)):
            first_row = block * ROWS
            base = first_row.to(tl.int64) * classes
            deficit = _values(scratch_ptr, _DEFICIT, first_row, batch, ROWS)
            shift_ds = _values(scratch_ptr, _SHIFT_DS, first_row, batch, ROWS)
            shift_as = _values(scratch_ptr, _SHIFT_AS, first_row, batch, ROWS)
            h, grad_h = _h_prime(deficit, largest_floor, slope_h, lambda_l, lambda_u, per_row)
            row = first_row + tl.arange(0, ROWS)
            tl.store(h_prime_ptr + row, h.to(tl.float32), mask=row < batch)
            grad_deficit = 0.0 - grad_h * slope_h + tl.where(deficit == largest, through_largest, 0.0)
            label = tl.load(labels_ptr + row, mask=row < batch, other=0)
            grad_deficit = tl.where((label >= 0) & (label < classes), grad_deficit, float("nan"))
            for first in range(0, classes, BLOCK_K):
                ds, as_, local, exists, mask = _tile(
                    teacher_ptr, student_ptr, base, first, batch - first_row, classes, slope, ROWS, BLOCK_K
                )
                is_label = (first + tl.arange(0, BLOCK_K)[None, :] == label[:, None]).to(tl.float64)
                log_kp = ds - shift_ds[:, None]
                p = tl.exp(log_kp - log_classes)
                grad_ds = grad_deficit[:, None] * p * (log_kp - deficit[:, None]) + weight_ds * (p - is_label)
                grad_as = weight_as * (tl.exp(as_ - shift_as[:, None]) - is_label)
                element = grad_teacher_ptr.dtype.element_ty
                # By way of float32, as the reference rounds.
                teacher = (grad_as + grad_ds).to(tl.float32).to(element)
                student = (grad_as - grad_ds).to(tl.float32).to(element)
                tl.store(grad_teacher_ptr + base + local, teacher, mask=mask)
                tl.store(grad_student_ptr + base + local, student, mask=mask)


@triton.jit
def entropy_distillation_kernel(
    teacher_ptr,
    student_ptr,
    loss_ptr,
    grad_student_ptr,
    scratch_ptr,
    batch,
    class_groups,
    temperature: tl.float64,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_B: tl.constexpr,
    PHASES: tl.constexpr,
):
    classes = class_groups * GROUP
    per_row = _reciprocal(tl.full([], 0, tl.float64) + batch)
    log_classes = tl.log(tl.full([], 0, tl.float64) + classes)
    slope = tl.full([], 1, tl.float64) / temperature
    blocks = (batch + ROWS - 1) // ROWS

    if PHASES != _BATCH_AND_GRADIENTS:
        # d falls as q grows.
        weight = 0.0 - temperature * per_row
        for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
            first_row = block * ROWS
            base = first_row.to(tl.int64) * classes
            peak = tl.full([ROWS], _LOWEST, tl.float64)
            total = tl.zeros([ROWS], tl.float64)
            weighted = total
            for first in range(0, classes, BLOCK_K):
                ds, _as, local, exists, mask = _tile(
                    teacher_ptr, student_ptr, base, first, batch - first_row, classes, slope, ROWS, BLOCK_K
                )
                peak, total, weighted = _add(ds, exists, peak, total, weighted)
            deficit, shift = _deficit(peak, total, weighted, log_classes)
            _set_values(scratch_ptr, _DEFICIT, first_row, batch, deficit, ROWS)
            for first in range(0, classes, BLOCK_K):
                ds, _as, local, exists, mask = _tile(
                    teacher_ptr, student_ptr, base, first, batch - first_row, classes, slope, ROWS, BLOCK_K
                )
                log_kp = ds - shift[:, None]
                grad = weight * tl.exp(log_kp - log_classes) * (log_kp - deficit[:, None])
                grad = grad.to(tl.float32).to(grad_student_ptr.dtype.element_ty)
                tl.store(grad_student_ptr + base + local, grad, mask=mask)

    if PHASES == _BOTH:
        tl.debug_barrier()

    if PHASES != _ROW_VALUES:
        sums = tl.zeros([BLOCK_B], tl.float64)
        for first in range(0, batch, BLOCK_B):
            sums += _values(scratch_ptr, _DEFICIT, first, batch, BLOCK_B)
        loss = temperature * temperature * (tl.sum(sums, 0) * per_row - log_classes)
        tl.store(loss_ptr, loss.to(tl.float32))


def _plan(batch: int, classes: int) -> tuple[int, int, dict[str, Any]]:
    """(tiles of rows, groups of classes, constants and launch options)."""
    block_k = min(triton.next_power_of_2(max(classes, 16)), TILE)
    rows = min(TILE // block_k, triton.next_power_of_2(batch))
    # Classes in groups of the largest power of two up to 16 that divides them: Triton finds 16-byte vectors by it.
    group = min(classes & -classes, 16)
    options = {
        "GROUP": group,
        "ROWS": rows,
        "BLOCK_K": block_k,
        "BLOCK_B": min(BLOCK_B, max(NUM_WARPS * 32, triton.next_power_of_2(batch))),
        "num_warps": NUM_WARPS,
        # All there are: fewer programs a multiprocessor than might fit, but none that spills.
        "maxnreg": MAX_REGISTERS,
        "enable_fp_fusion": False,
    }
    return triton.cdiv(batch, rows), classes // group, options


def _is_for_one_program(tiles: int, classes: int, options: dict[str, Any]) -> bool:
    return tiles * options["ROWS"] * max(options["BLOCK_K"], classes) <= ALONE


#: What has been launched without a barrier. The first call of a size is, so that a graph captured later finds the two
#: launches compiled: loading a kernel is not allowed under capture.
_launched: set[tuple[object, ...]] = set()


def _can_wait(x: Tensor) -> bool:
    """Whether a launch on `x` may have a barrier among its programs."""
    if not x.is_cuda or triton.knobs.runtime.interpret or torch.cuda.is_current_stream_capturing():
        return False
    return torch.cuda.get_device_properties(x.device).multi_processor_count >= MULTIPROCESSORS


def margin_loss(
    teacher: Tensor,
    student: Tensor,
    labels: Tensor,
    total: Tensor,
    margin: Tensor,
    disagreement: Tensor,
    agreement: Tensor,
    h_prime: Tensor,
    grad_teacher: Tensor,
    grad_student: Tensor,
    lambda_l: float,
    lambda_u: float,
    alpha_ds: float,
    alpha_as: float,
    beta: float,
    detach_min: bool,
) -> None:
    """Write the losses, H' and both gradients; see adadfq.ops.reference.margin_loss.

    A label outside 0..K - 1 makes the losses and its row's gradients NaN.

    Args:
        teacher, student, grad_teacher, grad_student: [B, K], contiguous; float32, bfloat16 or float16.
        labels: int64 [B].
        total, margin, disagreement, agreement: float32, one element.
        h_prime: float32 [B].
    """
    batch, classes = teacher.shape
    tiles, class_groups, options = _plan(batch, classes)
    scratch = torch.empty(_VALUES * batch + MAX_TOGETHER, dtype=torch.float64, device=teacher.device)
    settings = (float(lambda_l), float(lambda_u), float(alpha_ds), float(alpha_as), float(beta))
    tensors = (teacher, student, labels, total, margin, disagreement, agreement, h_prime, grad_teacher, grad_student)
    options["DETACH_MIN"] = bool(detach_min)

    def launch(programs: int, phases: int, raised: int = 0, **together: bool) -> None:
        margin_loss_kernel[(programs,)](
            *tensors,
            scratch,
            raised,
            batch,
            class_groups,
            *settings,
            PHASES=phases,
            TOGETHER=bool(together),
            **options,
            **together,
        )

    size = (teacher.device, teacher.dtype, batch, classes, detach_min)
    if _is_for_one_program(tiles, classes, options):
        launch(1, BOTH)
    elif teacher.numel() <= TOGETHER and size in _launched and _can_wait(teacher):
        launch(min(tiles, MAX_TOGETHER), BOTH, next(_launches), launch_cooperative_grid=True)
    else:
        launch(min(tiles, MAX_PROGRAMS), ROW_VALUES)
        # Each sums the whole batch: not too many.
        launch(min(tiles, MAX_TOGETHER), BATCH_AND_GRADIENTS)
        _launched.add(size)


def entropy_distillation(
    teacher: Tensor, student: Tensor, loss: Tensor, grad_student: Tensor, temperature: float
) -> None:
    """Write the loss and its gradient; see adadfq.ops.reference.entropy_distillation.

    Args:
        teacher, student, grad_student: [B, K], contiguous; float32, bfloat16 or float16.
        loss: float32, one element.
    """
    batch, classes = teacher.shape
    tiles, class_groups, options = _plan(batch, classes)
    scratch = torch.empty(batch, dtype=torch.float64, device=teacher.device)

    def launch(programs: int, phases: int) -> None:
        entropy_distillation_kernel[(programs,)](
            teacher,
            student,
            loss,
            grad_student,
            scratch,
            batch,
            class_groups,
            float(temperature),
            PHASES=phases,
            **options,
        )

    if _is_for_one_program(tiles, classes, options):
        launch(1, BOTH)
    else:
        launch(min(tiles, MAX_PROGRAMS), ROW_VALUES)
        launch(1, BATCH_AND_GRADIENTS)
