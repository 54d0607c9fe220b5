"""A network from a written specification: a built-in name, ``module.path:callable`` or ``path/to/file.py:callable``.

A specification runs code. Typed by the user, that is what they asked for; read from a file, only code of adadfq and of
three well-known model packages runs without the caller's consent (:func:`is_trusted`, :func:`rebuild_model`).
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import importlib
import importlib.util
import inspect
import json
import keyword
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from adadfq.errors import CheckpointError, InvalidInputError
from adadfq.models import resnet_cifar

#: Models that are named without a module.
BUILTINS: dict[str, Callable[..., nn.Module]] = {
    "resnet20": resnet_cifar.resnet20,
    "resnet32": resnet_cifar.resnet32,
    "resnet44": resnet_cifar.resnet44,
    "resnet56": resnet_cifar.resnet56,
}

#: A module at or below the key may be named; what it names must be defined at or below the value.
_TRUSTED = {
    "torchvision.models": "torchvision.models",
    "pytorchcv.model_provider": "pytorchcv",
    "timm": "timm.models",
    "adadfq": "adadfq",
}

#: Arguments that make those packages fetch or read weights; a rebuilt model gets its weights from the result.
_NO_WEIGHTS = {"pretrained": False, "weights": None, "weights_backbone": None}

_FORMS = f"a built-in ({', '.join(BUILTINS)}), 'module.path:callable' or 'path/to/file.py:callable'"


def build_model(spec: str, **kwargs: Any) -> nn.Module:
    """Build the network that `spec` names, calling it with `kwargs`.

    `kwargs` must survive JSON (tuples become lists before the call, so that a saved specification rebuilds the same
    network); the pair is recorded on the model, see :func:`model_spec`. The module is left in the mode its callable
    returns it in.

    Args:
        spec: ``"resnet20"``, ``"torchvision.models:resnet18"``, ``"my_nets/small.py:Net"``. The callable is a plain
            name, not a chain of attributes.

    Raises:
        InvalidInputError: the specification names nothing that can be imported, the callable refuses `kwargs`, or
            what it returns is not an ``nn.Module``.
    """
    try:
        kwargs = json.loads(json.dumps(kwargs, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise InvalidInputError(
            f"model arguments must be JSON values (numbers, strings, booleans, lists), got {kwargs!r}: {error}"
        ) from error
    target = _resolve(spec)
    try:
        inspect.signature(target).bind(**kwargs)
    except TypeError as error:
        raise InvalidInputError(
            f"model {spec!r} takes {inspect.signature(target)}, got arguments {kwargs!r}: {error}"
        ) from error
    except ValueError:
        pass  # no signature to check against: the call itself will tell
    try:
        model = target(**kwargs)
    except Exception as error:
        raise InvalidInputError(
            f"model {spec!r} called with arguments {kwargs!r} raised {type(error).__name__}: {error}; "
            "check the model arguments"
        ) from error
    if not isinstance(model, nn.Module):
        raise InvalidInputError(
            f"model {spec!r} must return a torch.nn.Module, got {type(model).__name__}; "
            "name a function or class that returns the network"
        )
    model.adadfq_model = {"spec": spec, "kwargs": kwargs}
    return model


def model_spec(model: nn.Module) -> dict[str, Any] | None:
    """``{"spec": str, "kwargs": dict}`` of a model made by :func:`build_model`; None for any other."""
    record = getattr(model, "adadfq_model", None)
    return copy.deepcopy(record) if isinstance(record, dict) else None


def is_trusted(spec: str, kwargs: Mapping[str, Any] | None = None) -> bool:
    """Whether a specification read from a file may be built without the caller's consent.

    True for built-ins and for modules under ``torchvision.models``, ``pytorchcv.model_provider``, ``timm`` and
    ``adadfq``. With `kwargs`, also that these cannot point such a package at a file or an address: numbers, booleans
    and None, lists of them, and the plain name of a model in a package's registry.
    """
    if not isinstance(spec, str) or not (spec in BUILTINS or _trusted_root(spec)):
        return False
    return all(_is_plain(value) or _is_harmless_string(key, value) for key, value in (kwargs or {}).items())


def rebuild_model(record: Mapping[str, Any], trust_model_code: bool = False, source: str = "the file") -> nn.Module:
    """Build the network that a record of :func:`model_spec`, read from `source`, describes.

    Nothing is downloaded for a trusted package: its own weights are switched off.

    Raises:
        CheckpointError: `record` is not such a record, or it is not trusted and `trust_model_code` is False.
        InvalidInputError: as :func:`build_model`.
    """
    spec, kwargs = (record.get("spec"), record.get("kwargs")) if isinstance(record, Mapping) else (None, None)
    if not isinstance(spec, str) or not isinstance(kwargs, dict):
        raise CheckpointError(
            f"{source} records the model as {record!r}, expected {{'spec': str, 'kwargs': dict}}; "
            "build the model yourself and pass it"
        )
    kwargs_now = dict(kwargs)
    if _trusted_root(spec) is not None:
        kwargs_now |= _no_weights(spec, kwargs)
    if not trust_model_code and not is_trusted(spec, kwargs_now):
        raise CheckpointError(
            f"{source} asks to run the model code {spec!r} with {kwargs!r}, which is not code adadfq knows; if you "
            "trust it pass trust_model_code=True (--trust-model-code), or build the model yourself and pass it "
            "(model=..., --model)"
        )
    model = build_model(spec, **kwargs_now)
    model.adadfq_model = {"spec": spec, "kwargs": kwargs}
    return model


def _no_weights(spec: str, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments that keep the callable from fetching weights: those it names, and those it was given."""
    try:
        named = set(inspect.signature(_resolve(spec)).parameters)
    except (InvalidInputError, ValueError):
        named = set()
    return {key: value for key, value in _NO_WEIGHTS.items() if key in named or key in kwargs}


def _under(module: str, root: str) -> bool:
    return module == root or module.startswith(root + ".")


def _trusted_root(spec: str) -> str | None:
    """Package that must define what a trusted ``module:callable`` names; None when the module is not trusted."""
    module, colon, name = spec.rpartition(":")
    if not colon or _is_file(module) or not _is_dotted(module) or not _is_name(name):
        return None
    return next((owner for root, owner in _TRUSTED.items() if _under(module, root)), None)


def _is_plain(value: Any) -> bool:
    if isinstance(value, list):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, (bool, int, float))


def _is_harmless_string(key: str, value: Any) -> bool:
    # timm also takes "hf-hub:owner/name" and "local-dir:path" here.
    return key in ("model_name", "name") and isinstance(value, str) and re.fullmatch(r"[\w.-]+", value) is not None


def _is_file(module: str) -> bool:
    return module.endswith(".py") or "/" in module or "\\" in module


def _is_name(name: str) -> bool:
    return name.isidentifier() and not keyword.iskeyword(name)


def _is_dotted(module: str) -> bool:
    return all(_is_name(part) for part in module.split("."))


def _resolve(spec: str) -> Callable[..., Any]:
    """The callable that `spec` names."""
    if not isinstance(spec, str):
        raise InvalidInputError(f"model must be {_FORMS}, got {spec!r}")
    if spec in BUILTINS:
        return BUILTINS[spec]
    where, colon, name = spec.rpartition(":")
    if not colon or not where:
        close = difflib.get_close_matches(spec, BUILTINS, n=1)
        raise InvalidInputError(
            f"model must be {_FORMS}, got {spec!r}" + (f"; did you mean {close[0]}?" if close else "")
        )
    if not _is_name(name):
        raise InvalidInputError(f"model {spec!r}: what follows the colon must be one plain name, got {name!r}")
    if not _is_file(where) and not _is_dotted(where):
        raise InvalidInputError(f"model {spec!r}: {where!r} is neither a module path nor a .py file; expected {_FORMS}")
    module = _import_file(where, spec) if _is_file(where) else _import_module(where, spec)
    try:
        target = getattr(module, name)
    except AttributeError:
        close = difflib.get_close_matches(name, dir(module), n=3)
        hint = f"; close: {', '.join(close)}" if close else ""
        raise InvalidInputError(f"model {spec!r}: {where} has no {name!r}{hint}; check the name") from None
    if not callable(target):
        raise InvalidInputError(
            f"model {spec!r}: {name} must be a function or class that returns the network, got {type(target).__name__}"
        )
    _check_origin(spec, target)
    return target


def _check_origin(spec: str, target: Callable[..., Any]) -> None:
    """Refuse what a trusted module merely imported, and adadfq's own functions that are not networks."""
    if (root := _trusted_root(spec)) is None:
        return
    origin = getattr(target, "__module__", None)
    if not isinstance(origin, str) or not _under(origin, root):
        raise InvalidInputError(f"model {spec!r} is defined in {origin}, expected {root}; name it where it is defined")
    is_network = isinstance(target, type) and issubclass(target, nn.Module)
    if root == "adadfq" and not is_network and not _under(origin, "adadfq.models"):
        raise InvalidInputError(f"model {spec!r} is not a network; expected {_FORMS}")


def _import_module(module: str, spec: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not _under(module, error.name):
            raise InvalidInputError(f"model {spec!r}: {module} needs {error.name}, which is not installed") from error
        raise InvalidInputError(
            f"model {spec!r}: module {error.name!r} is not installed; install its package, or for a file of yours "
            f"write '{module.replace('.', '/')}.py:{spec.rpartition(':')[2]}'"
        ) from error
    except Exception as error:
        raise InvalidInputError(f"model {spec!r}: importing {module} raised {type(error).__name__}: {error}") from error


def _import_file(file: str, spec: str) -> ModuleType:
    path = Path(file).expanduser()
    if path.suffix != ".py" or not path.is_file():
        raise InvalidInputError(f"model {spec!r}: {file} must be an existing .py file; check the path")
    name = "adadfq_model_" + hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]
    loader = importlib.util.spec_from_file_location(name, path)
    assert loader is not None and loader.loader is not None  # a .py file always has one
    module = importlib.util.module_from_spec(loader)
    folder = str(path.resolve().parent)
    sys.modules[name] = module  # dataclasses and torch.fx look their module up there
    sys.path.append(folder)  # the file's neighbours, after everything installed
    try:
        loader.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise InvalidInputError(f"model {spec!r}: importing {file} raised {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(folder)
    return module
