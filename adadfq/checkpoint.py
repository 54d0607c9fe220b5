"""Weights from and to files. Reading never runs code that a file brings along."""

from __future__ import annotations

import io
import os
import pickle
import pickletools
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from adadfq.errors import CheckpointError, InvalidInputError
from adadfq.files import atomic_write
from adadfq.weight_step import WeightStep

SAFETENSORS_SUFFIXES = (".safetensors",)
TORCH_SUFFIXES = (".pt", ".pth", ".th", ".tar", ".bin", ".ckpt")

#: Keys under which training scripts wrap a state_dict, the likeliest first.
WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "network", "weights", "params")

#: Prefixes that nn.DataParallel and torch.compile put in front of every key.
PREFIXES = ("module.", "_orig_mod.")

_LISTED = 10
_TENSOR_PARTS = re.compile(r"collections\.OrderedDict|torch\._utils\._rebuild_\w+|torch\.(storage\.)?\w*Storage")
_RESAVE = "re-save it where you trust it as safetensors, or with torch.save(model.state_dict(), ...)"


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read a state_dict: CPU tensors by name, wrappers and uniform prefixes removed.

    Reads ``.safetensors``, and ``.pt .pth .th .tar .bin .ckpt`` written by ``torch.save`` (``weights_only=True``).

    Raises:
        CheckpointError: the file is missing, of another kind, empty, truncated or corrupt, would execute code, or
            holds no state_dict.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"checkpoint {path} does not exist; check the path")
    if not path.is_file():
        raise CheckpointError(f"checkpoint {path} is not a file; give the path of the weights file itself")
    suffix = path.suffix.lower()
    if suffix not in SAFETENSORS_SUFFIXES + TORCH_SUFFIXES:
        known = " ".join(SAFETENSORS_SUFFIXES + TORCH_SUFFIXES)
        raise CheckpointError(f"checkpoint {path} must end in one of {known}, got {suffix or 'no suffix'!r}; rename it")
    try:
        with path.open("rb") as file:
            empty = not file.read(1)
    except OSError as error:
        raise CheckpointError(f"checkpoint {path} cannot be read: {error.strerror}; check its permissions") from error
    if empty:
        raise CheckpointError(f"checkpoint {path} is empty; copy or download it again")
    loaded = _read_safetensors(path) if suffix in SAFETENSORS_SUFFIXES else _read_torch(path)
    return _strip_prefixes(_tensors(_unwrap(loaded), path))


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"checkpoint {path} is not a whole safetensors file ({error}); copy or download it again"
        ) from error


def _read_torch(path: Path) -> Any:
    if _is_torchscript(path):
        raise CheckpointError(f"checkpoint {path} is a TorchScript archive, which carries code; {_RESAVE}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols; what cannot be read raises
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever its parser trips over, and advises loading unsafely
        if isinstance(error, pickle.UnpicklingError) and (code := _foreign_objects(path)):
            raise CheckpointError(
                f"checkpoint {path} is a pickle that asks for {_some(code)} and could execute code; it was not loaded; "
                f"{_RESAVE}"
            ) from error
        lines = str(error).strip().splitlines()
        detail = "" if isinstance(error, pickle.UnpicklingError) or not lines else f": {lines[0].split('. ')[0]}"
        raise CheckpointError(
            f"checkpoint {path} is not a file written by torch.save, or is truncated ({type(error).__name__}{detail}); "
            "copy or download it again"
        ) from error


def _is_torchscript(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.split("/")[1:2] in (["constants.pkl"], ["code"]) for name in archive.namelist())
    except Exception:  # a damaged archive raises several things; reading it will say what is wrong
        return False


def _foreign_objects(path: Path) -> list[str]:
    """Names a pickle imports, other than those of plain tensors; read from its opcodes, nothing is run."""
    found: dict[str, None] = {}
    strings: list[str] = []
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                data = next((archive.read(name) for name in archive.namelist() if name.endswith("data.pkl")), b"")
        else:
            data = path.read_bytes()
        stream = io.BytesIO(data)
        while stream.tell() < len(data):  # the legacy format is several pickles in a row
            for opcode, argument, _ in pickletools.genops(stream):
                if opcode.name == "GLOBAL":
                    found[argument.replace(" ", ".")] = None
                elif opcode.name == "STACK_GLOBAL":
                    found[".".join(strings[-2:])] = None
                elif isinstance(argument, str):
                    strings.append(argument)
    except Exception:  # damaged, or not a pickle from here on
        pass
    return [name for name in found if not _TENSOR_PARTS.fullmatch(name)]


def _unwrap(loaded: Any) -> Any:
    while isinstance(loaded, Mapping) and not all(isinstance(value, Tensor) for value in loaded.values()):
        inner = next((loaded[key] for key in WRAPPERS if isinstance(loaded.get(key), Mapping)), None)
        if inner is None:
            break
        loaded = inner
    return loaded


def _tensors(loaded: Any, path: Path) -> dict[str, Tensor]:
    if not isinstance(loaded, Mapping):
        raise CheckpointError(f"checkpoint {path} holds a {type(loaded).__name__}, expected a state_dict; {_RESAVE}")
    if not loaded:
        raise CheckpointError(f"checkpoint {path} holds no tensors; {_RESAVE}")
    wrong = [
        f"{key!r} ({type(value).__name__})"
        for key, value in loaded.items()
        if not isinstance(key, str)
        or not isinstance(value, Tensor)
        or value.layout != torch.strided
        or value.is_quantized
        or value.is_meta
    ]
    if wrong:
        raise CheckpointError(f"checkpoint {path} holds more than named dense tensors: {_some(wrong)}; {_RESAVE}")
    return {key: value.detach() for key, value in loaded.items()}


def _strip_prefixes(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    while prefix := next((p for p in PREFIXES if all(k.startswith(p) and k != p for k in state_dict)), None):
        state_dict = {key.removeprefix(prefix): value for key, value in state_dict.items()}
    return state_dict


def _some(items: list[str]) -> str:
    more = len(items) - _LISTED
    return ", ".join(items[:_LISTED]) + (f" and {more} more" if more > 0 else "")


def load_weights(model: nn.Module, state_dict: Mapping[str, Tensor], source: str | os.PathLike[str]) -> None:
    """Copy `state_dict` into `model`, in place, after checking that all of it fits (:func:`fitted`).

    Raises:
        CheckpointError: as :func:`fitted`; the model is unchanged.
    """
    state_dict = fitted(model, state_dict, source)
    try:
        model.load_state_dict(dict(state_dict), strict=False)
    except RuntimeError as error:
        raise CheckpointError(f"{type(model).__name__} refused the weights from {source}: {error}") from error


def fitted(model: nn.Module, state_dict: Mapping[str, Tensor], source: str | os.PathLike[str]) -> Mapping[str, Tensor]:
    """`state_dict` with the keys of `model`, after checking that all of it fits; nothing is changed.

    A missing ``num_batches_tracked`` is allowed: old checkpoints lack it and inference does not use it. Steps of
    weights fit quantised layers that have none, and are given to them (:mod:`adadfq.weight_step`). Floating tensors of
    another width pass: ``load_state_dict`` converts them.

    Args:
        source: where the weights come from, for the error.

    Raises:
        CheckpointError: keys are missing or unexpected, or a shape or kind of dtype differs; lists them.
    """
    own = {key: value for key, value in model.state_dict().items() if isinstance(value, Tensor)}
    state_dict = _with_prefix_of(own, state_dict)
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, WeightStep):
            own.update(module.expected_step(state_dict, f"{path}." if path else ""))
    missing = [key for key in own if key not in state_dict and key.rpartition(".")[2] != "num_batches_tracked"]
    unexpected = [key for key in state_dict if key not in own]
    misfit = [
        f"{key} is {_describe(value)}, expected {_describe(own[key])}"
        for key, value in state_dict.items()
        if key in own and (value.shape != own[key].shape or _kind(value) != _kind(own[key]))
    ]
    problems = [
        f"{len(items)} {what}: {_some(items)}"
        for what, items in (("missing", missing), ("unexpected", unexpected), ("mismatched", misfit))
        if items
    ]
    if problems:
        raise CheckpointError(
            f"weights from {source} do not fit {type(model).__name__} ({len(own)} tensors): {'; '.join(problems)}; "
            "choose the model (and its arguments, such as num_classes) that these weights were saved from"
        )
    return state_dict


def _with_prefix_of(own: Mapping[str, Tensor], state_dict: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """`state_dict` with the prefix that reading it took away, where every key of the network itself has it."""
    bare = _strip_prefixes(dict(own))
    if not own or set(state_dict) & set(own) or not set(state_dict) & set(bare):
        return state_dict
    prefix = next(iter(own)).removesuffix(next(iter(bare)))
    return {prefix + key: value for key, value in state_dict.items()}


def _kind(tensor: Tensor) -> str:
    if tensor.is_complex():
        return "complex"
    return "floating" if tensor.is_floating_point() else "bool" if tensor.dtype == torch.bool else "integer"


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def write_state_dict(
    path: str | os.PathLike[str], state_dict: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write dense tensors as safetensors, atomically. Tensors that share memory are written out each in full.

    Raises:
        InvalidInputError: a value is not a dense tensor, a metadata entry is not a string, or `path` cannot be a file.
    """
    for key, value in state_dict.items():
        if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_quantized or value.is_meta:
            raise InvalidInputError(f"state_dict entry {key!r} must be a dense tensor, got {type(value).__name__}")
    for key, value in (metadata or {}).items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise InvalidInputError(f"metadata must map strings to strings, got {key!r}: {value!r}")
    tensors: dict[str, Tensor] = {}
    storages: set[int] = set()
    for key, value in state_dict.items():
        tensor = value.detach().to("cpu").contiguous()
        # safetensors refuses tensors that share a storage, and views of a larger one.
        if (storage := tensor.untyped_storage()).data_ptr() in storages or storage.nbytes() != tensor.nbytes:
            tensor = tensor.clone(memory_format=torch.contiguous_format)
        storages.add(tensor.untyped_storage().data_ptr())
        tensors[key] = tensor
    with atomic_write(path) as temporary:
        safetensors.torch.save_file(tensors, temporary, metadata=dict(metadata or {}))
