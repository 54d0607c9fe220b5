"""The JSON files of results: their fields, reading, and writing.

A file is ``{"format", "version", "kind", "environment", "options", "left_out", "rows"}``, its kind one of
:data:`FIELDS`; ``"cut_off"`` and ``"stuck"`` are of :func:`benchmarks.turns.in_turn`. A measured row carries its
environment too, so that rows of several files can be put together. Times are in milliseconds unless their names say
otherwise, sizes in bytes.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import NoneType
from typing import Any

from adadfq import files
from adadfq.errors import InvalidInputError

FORMAT = "adadfq-benchmarks"
VERSION = 2

_ENVIRONMENT: dict[str, tuple[type, ...]] = {
    "device": (str,),
    "device_name": (str,),
    "cpu": (str,),
    "cpus": (int, NoneType),
    "threads": (int,),
    "transparent_hugepage": (str, NoneType),
    "thp_mem_alloc": (bool,),
    "system": (str,),
    "versions": (dict,),
    "native_matches_sources": (bool, NoneType),
    "git_commit": (str, NoneType),
    "git_dirty": (bool, NoneType),
    "date": (str,),
}
#: In the environments of files that know of it.
_OPTIONAL: dict[str, tuple[type, ...]] = {"cpu_flags": (list,)}
_MEASURED: dict[str, tuple[type, ...]] = {
    "case": (str,),
    "provider": (str,),
    "backend": (str, NoneType),
    "status": (str,),
    "error": (str, NoneType),
    "rounds": (int, NoneType),
    "repeats": (int, NoneType),
    "p20_ms": (float, NoneType),
    "p50_ms": (float, NoneType),
    "p80_ms": (float, NoneType),
    "peak_memory_bytes": (int, NoneType),
}
#: Kind -> field of a row -> its types. Where something is timed, status is "ok", "wrong" (a result is not right) or
#: "unavailable".
FIELDS: dict[str, dict[str, tuple[type, ...]]] = {
    "ops": {
        **_MEASURED,
        "op": (str,),
        "variant": (str,),
        "where": (str,),
        "layers": (list,),
        "shapes": (list,),
        "dtype": (str,),
        "layout": (str,),
        "pass": (str,),
        "nbytes": (int,),
        "bytes_moved": (int,),
        "gb_per_s": (float, NoneType),
        "fraction_of_copy": (float, NoneType),
        "fraction_of_clone": (float, NoneType),
        **_ENVIRONMENT,
    },
    "step": {
        **_MEASURED,
        "model": (str,),
        "recipe": (str,),
        "image_size": (int,),
        "batch_size": (int,),
        "weight_bits": (int,),
        "act_bits": (int,),
        "precision": (str,),
        "images_per_s": (float, NoneType),
        "parts": (dict, NoneType),  # share of the step's time by part: benchmarks/breakdown.py
        **_ENVIRONMENT,
    },
    # Of benchmarks/accuracy.py: a training. Accuracies are in percent, None where training diverged.
    "accuracy": {
        "player": (str,),  # benchmarks.accuracy.PLAYERS
        "model": (str,),
        "weights": (str, NoneType),
        "weights_sha256": (str, NoneType),
        "data": (str,),
        "images": (int,),
        "recipe": (str,),
        "weight_bits": (int,),
        "act_bits": (int,),
        "settings": (dict,),  # what differs from the recipe
        "recipe_digest": (str,),  # of the resolved recipe, which may have changed since
        "variant": (dict,),  # what the grid varies
        "seed": (int,),
        "status": (str,),
        "error": (str, NoneType),
        "accuracies": (list,),  # after the last epoch of warm-up and every later one
        "accuracy": (float, NoneType),
        "teacher_accuracy": (float,),
        "round_to_nearest": (float, NoneType),  # min/max ranges; None where they still moved after warm-up
        "train_seconds": (float,),  # without scoring
        "steps": (int,),
        "images_seen": (int,),
        "step_ms": (float, NoneType),  # median of the epochs in which the student trains
        "agreement": (float, NoneType),
        "h_prime": (float, NoneType),
        **_ENVIRONMENT,
    },
    # Of benchmarks/predict.py: a row's launches are dicts.
    "predictions": {
        "case": (str,),
        "op": (str,),
        "variant": (str,),
        "dtype": (str,),
        "layout": (str,),
        "pass": (str,),
        "nbytes": (int,),
        "bytes_moved": (int,),
        "gpu": (str,),
        "backend": (str,),
        "launches": (list,),
        "bytes_per_element": (float,),
        "instructions_per_element": (float,),
        "predicted_us": (float,),
        "fraction_of_copy": (float,),
        "bound_by": (str,),
    },
    # Of benchmarks/predict_step.py: times are of (low, high) constants; a row's parts are dicts.
    "step predictions": {
        "case": (str,),
        "way": (str,),
        "model": (str,),
        "image_size": (int,),
        "batch_size": (int,),
        "precision": (str,),
        "gpu": (str,),
        "parts": (list,),
        "operators": (int,),
        "launches": (int,),
        "nbytes": (int,),
        "flops": (int,),
        "device_low_us": (float,),
        "device_high_us": (float,),
        "predicted_low_us": (float,),
        "predicted_high_us": (float,),
    },
    # Of benchmarks/ceilings.py: what a machine can do at best.
    "ceilings": {
        "what": (str,),
        "p20_ms": (float,),
        "p50_ms": (float,),
        "p80_ms": (float,),
        "bytes_moved": (int,),
        "flops": (int,),
        "gb_per_s": (float, NoneType),
        "tflop_per_s": (float, NoneType),
        **_ENVIRONMENT,
    },
    # Of benchmarks/equality.py: two ways to run one training, and their losses (generator's, student's) by step.
    "equality": {
        "pair": (str,),
        "case": (str,),
        "steps": (int,),
        "equal_steps": (int,),
        "needed_steps": (int,),
        "status": (str,),
        "error": (str, NoneType),
        "losses_first": (list,),
        "losses_second": (list,),
        **_ENVIRONMENT,
    },
    # Of benchmarks/endurance.py: a whole training; memory after every epoch.
    "endurance": {
        "case": (str,),
        "recipe": (str,),
        "steps": (int,),
        "steps_per_epoch": (int,),
        "status": (str,),
        "error": (str, NoneType),
        "epoch_seconds": (list,),
        "allocated_bytes": (list,),
        "used_bytes": (list,),
        "step_ms": (float, NoneType),
        **_ENVIRONMENT,
    },
    # Of benchmarks/resources.py: a kernel for one architecture.
    "resources": {
        "source": (str,),
        "kernel": (str,),
        "variant": (str,),
        "arch": (str,),
        "registers": (int,),
        "stack_bytes": (int,),
        "local_bytes": (int,),
        "shared_bytes": (int,),
    },
}
#: Kind -> fields that rows made before them lack.
OPTIONAL_FIELDS: dict[str, dict[str, tuple[type, ...]]] = {
    "accuracy": {
        "epoch_seconds": (list,),  # of every epoch, without scoring
        "epoch_cpu_seconds": (list,),  # the processor's time of the process in it
        "losses_student": (list,),  # mean L_Q of every epoch
        "h_prime_quantiles": (list, NoneType),  # of every epoch: 5, 25, 50, 75 and 95 % of all samples' H'
        # Of adadfq.HeldOut, on generated images: a value beside each of `accuracies`.
        "held_out_agreement": (list,),
        "held_out_loss": (list,),
        "held_out_kl": (list,),
        "held_out_mirrored_agreement": (list,),
        "held_out_mirrored_kl": (list,),
        "held_out_digest": (str, NoneType),  # of those images: values of the same ones compare
        "base_digest": (str, NoneType),  # the recipe_digest without what the grid varies
        "warmup_epochs": (int,),
        "lambda_l": (float,),
        "lambda_u": (float,),
    }
}
#: Of the environment, what has to be the same where measuring goes on.
KNOWN = ("device_name", "cpu", "threads", "versions", "git_commit", "git_dirty", "native_matches_sources")
#: Kinds whose rows have a status and, where it is "ok", a time.
TIMED = ("ops", "step")
STATUSES = ("ok", "wrong", "unavailable")


def document(kind: str, environment: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """A file's content without rows yet."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "kind": kind,
        "environment": environment,
        "options": options,
        "left_out": [],
        "rows": [],
    }


def write(path: Path, content: dict[str, Any]) -> None:
    """Check and write a file, whole or not at all.

    Raises:
        InvalidInputError: the content is not valid, or the file cannot be written there.
    """
    validate(content, str(path))
    head = {key: value for key, value in content.items() if key != "rows"}
    rows = ",\n".join(json.dumps(files.finite(row), ensure_ascii=False, allow_nan=False) for row in content["rows"])
    text = json.dumps(files.finite(head), ensure_ascii=False, allow_nan=False, indent=1)
    with files.atomic_write(path) as temporary:
        # A row a line: stored files are read in diffs.
        temporary.write_text(f'{text[:-2]},\n "rows": [\n{rows}\n]\n}}\n', encoding="utf-8")


def merge(path: Path, content: dict[str, Any], key: Callable[[dict[str, Any]], str]) -> dict[str, Any]:
    """Write `content` into a file that other processes may be writing to: no row of theirs is lost.

    The file is read again, and written, under a lock on its folder. Of rows with the same key, the one that is there
    stays; commands of both are kept.

    Returns:
        What the file then holds, with the head of `content`.

    Raises:
        InvalidInputError: as :func:`read` and :func:`write`, or the file is of another kind.
    """
    with locked(path.parent):
        merged = dict(content)
        if path.exists():
            before = read(path)
            if before["kind"] != content["kind"]:
                raise InvalidInputError(f"{path} holds results of kind {before['kind']!r}: give another file")
            known = {key(row) for row in before["rows"]}
            merged["rows"] = [*before["rows"], *(row for row in content["rows"] if key(row) not in known)]
            commands = [*before["options"].get("commands", []), *content["options"].get("commands", [])]
            merged["options"] = {**content["options"], "commands": list(dict.fromkeys(commands))}
            if {**merged, "environment": before["environment"]} == before:
                return merged  # nothing is new: the file stays as it is
        write(path, merged)
        return merged


def go_on_from(path: Path, content: dict[str, Any]) -> str | None:
    """Put into `content` what the file at `path` holds, where it was begun alike, on such a machine at the same commit.

    Of a case with a row that is not right it takes none: it is measured again.

    Returns:
        Why there is nothing to go on from; None where there is, or no file.

    Raises:
        InvalidInputError: there is a file, and it is none of results.
    """
    if not path.exists():
        return None
    before, here = read(path), content["environment"]
    different = [part for part in ("kind", "options") if before[part] != content[part]]
    different += [name for name in KNOWN if before["environment"][name] != here[name]]
    if different:
        return f"it differs in {', '.join(different)}"
    if not here["git_commit"] or here["git_dirty"]:
        return "files are changed, or nobody knows the commit"
    wrong = {row["case"] for row in before["rows"] if row["status"] == "wrong"}
    content["rows"] = [row for row in before["rows"] if row["case"] not in wrong]
    content["cut_off"], content["stuck"] = before.get("cut_off", {}), before.get("stuck", {})
    return None


def same_run(path: Path, key: Callable[[Mapping[str, Any]], str], wanted: Mapping[str, Any]) -> dict[str, Any] | None:
    """The row that a file of accuracies has of the run `wanted`, judged on the same held-out images; None: none."""
    try:
        content = read(path)
    except InvalidInputError:
        return None
    fields = set(OPTIONAL_FIELDS["accuracy"])
    for row in content["rows"] if content["kind"] == "accuracy" else ():
        alike = row.get("held_out_digest") == wanted["held_out_digest"] and key(row) == key(wanted)
        if alike and fields <= set(row):
            return row
    return None


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Alone among the processes that do the same; a process that ends lets go, however it ends."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise InvalidInputError(f"cannot write to {folder}: {error.strerror}; give an existing directory") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def read(path: Path) -> dict[str, Any]:
    """A file's content.

    Raises:
        InvalidInputError: it cannot be read or is not such a file; says where it fails.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidInputError(
            f"{path} cannot be read: {error.strerror}; give a file that 'ops' or 'step' wrote"
        ) from error
    except ValueError as error:
        raise InvalidInputError(f"{path} is not JSON: {error}; give a file that 'ops' or 'step' wrote") from error
    validate(content, str(path))
    return content


def validate(content: Any, name: str) -> None:
    """Refuse what is not a file of this format and version (:class:`InvalidInputError`)."""
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise InvalidInputError(f"{name} is not a file of results: 'format' must be {FORMAT!r}; run 'ops' or 'step'")
    if content.get("version") != VERSION:
        raise InvalidInputError(f"{name} has version {content.get('version')!r}, expected {VERSION}: measure again")
    if content.get("kind") not in FIELDS:
        raise InvalidInputError(f"{name}: kind must be one of {', '.join(FIELDS)}, got {content.get('kind')!r}")
    for key, kind in (("environment", dict), ("options", dict), ("left_out", list), ("rows", list)):
        if not isinstance(content.get(key), kind):
            raise InvalidInputError(f"{name}: {key} must be a {kind.__name__}, got {content.get(key)!r}")
    _check_fields(content["environment"], _ENVIRONMENT, f"{name}: environment")
    for i, row in enumerate(content["rows"]):
        if not isinstance(row, dict):
            raise InvalidInputError(f"{name}: row {i} must be a dict, got {row!r}")
        later = OPTIONAL_FIELDS.get(content["kind"], {})
        expected = FIELDS[content["kind"]] | {key: types for key, types in later.items() if key in row}
        _check_fields(row, expected, f"{name}: row {i}")
        if content["kind"] not in TIMED:
            continue
        if row["status"] not in STATUSES:
            raise InvalidInputError(f"{name}: row {i}: status must be one of {STATUSES}, got {row['status']!r}")
        if (row["status"] == "ok") != (row["p50_ms"] is not None):
            raise InvalidInputError(f"{name}: row {i} must have a time where its status is ok, and only there")


def _check_fields(found: dict[str, Any], expected: dict[str, tuple[type, ...]], name: str) -> None:
    expected = expected | {key: types for key, types in _OPTIONAL.items() if key in found and "device" in expected}
    if set(found) != set(expected):
        missing, unknown = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
        raise InvalidInputError(f"{name}: missing fields {missing}, unknown fields {unknown}: measure again")
    for key, types in expected.items():
        value = found[key]
        # bool is an int, and JSON has no float that is whole.
        fits = isinstance(value, types) and (not isinstance(value, bool) or bool in types)
        if not fits and not (float in types and isinstance(value, int) and not isinstance(value, bool)):
            names = " or ".join(t.__name__ for t in types)
            raise InvalidInputError(f"{name}: {key} must be {names}, got {value!r}")
