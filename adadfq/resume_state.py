"""Everything a Trainer needs to go on: written as a checkpoint, and taken up again after all of it was checked."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from adadfq import files
from adadfq.checkpoint import fitted, load_weights, read_state_dict
from adadfq.convert import module_bits
from adadfq.errors import CheckpointError
from adadfq.recipe import Recipe
from adadfq.result import CHECKPOINT

if TYPE_CHECKING:
    from adadfq.trainer import Trainer

__all__ = ["restore", "save"]


def _settings(trainer: Trainer) -> dict[str, Any]:
    """What a checkpoint must agree on; epochs may grow, where learning rates do not depend on their number."""
    recipe = trainer.recipe.to_dict()
    if trainer.recipe.lr_schedule == "step":
        recipe.pop("epochs")
    return {"recipe": recipe, "seed": trainer.seed, "bits": module_bits(trainer.student)}


def _state(trainer: Trainer) -> dict[str, Any]:
    return {
        "settings": _settings(trainer),
        "epoch": trainer.epoch,
        "step": trainer.step,
        "rows": trainer._rows,
        "begun": trainer._begun,
        "student": trainer.student.state_dict(),
        "generator": trainer.generator.state_dict(),
        "optimizer_student": trainer.optimizer_student.state_dict(),
        "optimizer_generator": trainer.optimizer_generator.state_dict(),
        "optimizer_steps": None if trainer.optimizer_steps is None else trainer.optimizer_steps.state_dict(),
        "log_steps": [step.detach() for step in trainer.log_steps],
        "averaged": None if trainer.game.averaged is None else trainer.game.averaged.state_dict(),
        "bank": None if trainer.game.bank is None else trainer.game.bank.state(),
        "history": {
            "metrics": trainer.epoch_metrics,
            "h_prime": trainer.epoch_h_prime,
            "seconds": trainer.epoch_seconds,
            "cpu_seconds": trainer.epoch_cpu_seconds,
            "spent": trainer._spent,
        },
        "h_prime": trainer._h_prime,
        "random": trainer.random.get_state(),
    }


def save(trainer: Trainer, path: Path) -> None:
    """Write the run to `path`, whole or not at all."""
    with files.atomic_write(path) as temporary:
        torch.save(_state(trainer), temporary)


def restore(trainer: Trainer, directory: Path) -> None:
    """Take up the run in `directory`; everything is checked before anything is changed."""
    path = directory / CHECKPOINT
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint to resume from at {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever its zip and pickle readers do
        # The reader's own advice is to load it unsafely: only its first sentence is passed on.
        raise CheckpointError(f"{path} cannot be read: {str(error).splitlines()[0].split('. ')[0]}") from None
    expected = set(_state(trainer))
    if not isinstance(state, dict) or set(state) != expected:
        raise CheckpointError(f"{path} is not a checkpoint of adadfq: it must hold {', '.join(sorted(expected))}")
    ours, theirs = _settings(trainer), state["settings"]
    # A run from before a field was known was played as its default plays.
    theirs_recipe = {**Recipe().to_dict(), **theirs["recipe"]}
    differing = [k for k in ours["recipe"] if ours["recipe"][k] != theirs_recipe[k]]
    differing += [k for k in ("seed", "bits") if ours[k] != theirs[k]]
    file = directory / "teacher.safetensors"
    theirs_then, ours_now = fitted(trainer.teacher, read_state_dict(file), file), trainer.teacher.state_dict()
    if not all(torch.equal(ours_now[key].cpu(), theirs_then[key]) for key in theirs_then):
        differing.append("teacher")
    for name in ("optimizer_student", "optimizer_generator"):
        counts = [len(group["params"]) for group in state[name]["param_groups"]]
        if counts != [len(group["params"]) for group in getattr(trainer, name).param_groups]:
            differing.append(f"trained parameters of {name}")
    if differing:
        raise CheckpointError(
            f"{path} belongs to a run with other settings ({', '.join(differing)}): resume with the same ones"
        )
    if state["epoch"] >= trainer.recipe.epochs:
        raise CheckpointError(
            f"{path} has {state['epoch']} epochs behind it and the recipe asks for {trainer.recipe.epochs}: "
            "give more epochs to go on"
        )
    players = {"student": trainer.student, "generator": trainer.generator}
    for name, model in players.items():
        fitted(model, state[name], f"{path} ({name})")
    for name, model in players.items():
        load_weights(model, state[name], f"{path} ({name})")
    if state["optimizer_steps"] is not None:
        trainer._learn_steps(state["log_steps"])
    for name in ("optimizer_student", "optimizer_generator", "optimizer_steps"):
        optimizer = getattr(trainer, name)
        if optimizer is not None:
            optimizer.load_state_dict(state[name])
            for group in optimizer.param_groups:
                group["lr"] = group["lr"].to(trainer.device)
                if "capturable" in group:  # of the device it was saved on
                    group["capturable"] = trainer.device.type == "cuda"
    if trainer.game.averaged is not None:
        trainer.game.averaged.load_state_dict(state["averaged"])
    if trainer.game.bank is not None:
        trainer.game.bank.load_state(state["bank"], trainer.device)
    trainer.epoch_metrics = list(state["history"]["metrics"])
    trainer.epoch_h_prime = [tuple(quantiles) for quantiles in state["history"]["h_prime"]]
    unknown = [math.nan] * len(trainer.epoch_metrics)  # in a checkpoint from before they were measured
    trainer.epoch_seconds = list(state["history"].get("seconds", unknown))
    trainer.epoch_cpu_seconds = list(state["history"].get("cpu_seconds", unknown))
    trainer._spent = list(state["history"].get("spent", [0.0, 0.0]))
    trainer._h_prime = [values.to(trainer.device) for values in state["h_prime"]]
    trainer.random.set_state(state["random"])
    trainer.epoch, trainer.step, trainer._rows = state["epoch"], state["step"], state["rows"]
    trainer._begun = state["begun"]
