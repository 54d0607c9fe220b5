"""Judging a student without data: generated images held out from every training, and the teacher's logits on them."""

from __future__ import annotations

import copy
import hashlib
import os
import pickle
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adadfq import checks, files, functional
from adadfq.errors import InvalidInputError
from adadfq.fusion import fuse, is_fused
from adadfq.game import BatchNormMatch
from adadfq.generator import build_generator
from adadfq.nn import frozen_ranges
from adadfq.players import check_network
from adadfq.recipe import Recipe

__all__ = ["HeldOut"]

#: Generators that give the images, in equal shares.
GENERATORS = 2
#: Images the networks see at once.
BATCH = 64


class HeldOut:
    """A fixed set of generated images that no student is trained on: the only measure of a result without data.

    Fresh generators are trained on the teacher alone, L = CE(t, y) + gamma L_bns, with no student to play against; the
    images are those they make in the second half of that training, equally many of each step. A student that agrees
    with its teacher there has kept more of it: the measures order results, they are no accuracies. The same teacher,
    recipe, sizes and seed give the same images on the same machine and number of threads; no training that has the
    same seed has anything in common with them.

    Args:
        teacher: float classifier with BatchNorm; a frozen copy is used, on the device where the teacher is.
        recipe: shapes, generator, its learning rate and `adam_betas`, `gamma`, and the temperature of :meth:`score`.
        images: how many, at most half of ``GENERATORS * steps * batch_size``.
        seed: of the generators, the noise and the labels.
        steps: of each generator's training.
        batch_size: of each step.

    Attributes:
        images: float16 [N, C, S, S], normalised as the teacher's input.
        labels: the classes they were made for, int64 [N].
        logits: the teacher's on them, float32 [N, K].
        mirrored_logits: their mean with those on the mirror images (left to right), float32 [N, K].

    Raises:
        InvalidInputError: the teacher has no BatchNorm, does not fit the recipe or is not finite, or more images are
            asked for than the steps can give.
    """

    def __init__(
        self,
        teacher: nn.Module,
        recipe: Recipe,
        images: int = 1024,
        seed: int = 0,
        *,
        steps: int = 200,
        batch_size: int = 32,
    ) -> None:
        for name, value in (("images", images), ("steps", steps), ("batch_size", batch_size)):
            checks.check_number(name, value, 1)
        taken = steps - steps // 2
        if images > GENERATORS * (most := taken * batch_size):
            raise InvalidInputError(
                f"{GENERATORS} generators of {steps} steps at batch {batch_size} give at most {GENERATORS * most} "
                f"images, {images} were asked for: give more steps"
            )
        self.seed = seed
        self._take(teacher, recipe)
        shares = [images // GENERATORS + (i < images % GENERATORS) for i in range(GENERATORS)]
        kept = [self._generate(i, share, steps, batch_size) for i, share in enumerate(shares) if share]
        self.images, self.labels = (torch.cat(parts) for parts in zip(*kept, strict=True))
        self._ask_teacher()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write images and labels, whole or not at all; :meth:`load` reads them.

        Raises:
            InvalidInputError: the file cannot be written there.
        """
        content = {"images": self.images.cpu(), "labels": self.labels.cpu(), "seed": self.seed}
        with files.atomic_write(path) as temporary:
            torch.save(content, temporary)

    @classmethod
    def load(cls, path: str | os.PathLike[str], teacher: nn.Module, recipe: Recipe) -> HeldOut:
        """What :meth:`save` wrote, with the logits of `teacher`: minutes less than making the images again.

        Args:
            path: the file.
            teacher: float classifier, on the device where it is; usually the one that the images were made for.
            recipe: shapes, and the temperature of :meth:`score`.

        Raises:
            InvalidInputError: the file cannot be read or is none of :meth:`save`, or teacher, recipe and images do not
                fit together.
        """
        try:
            content: Any = torch.load(path, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise InvalidInputError(f"{path} cannot be read as held-out images: {error}; make them again") from error
        held_out = cls.__new__(cls)
        shape = [recipe.image_channels, recipe.image_size, recipe.image_size]
        images, labels = (content.get(name) if isinstance(content, dict) else None for name in ("images", "labels"))
        if not isinstance(images, Tensor) or not isinstance(labels, Tensor) or labels.shape != images.shape[:1]:
            raise InvalidInputError(f"{path} holds no held-out images: give a file that HeldOut.save wrote")
        if list(images.shape[1:]) != shape:
            raise InvalidInputError(
                f"{path} holds images {list(images.shape[1:])}, the recipe's are {shape}: make them again"
            )
        held_out.seed = content["seed"]
        held_out._take(teacher, recipe)
        held_out.images, held_out.labels = images.to(held_out._device), labels.to(held_out._device)
        held_out._ask_teacher()
        return held_out

    @property
    def digest(self) -> str:
        """16 hexadecimal digits of the images: scores compare where it is the same."""
        return hashlib.sha256(self.images.cpu().contiguous().numpy().tobytes()).hexdigest()[:16]

    def _take(self, teacher: nn.Module, recipe: Recipe) -> None:
        check_network("teacher", teacher)
        self.recipe = recipe
        self._device = next(teacher.parameters()).device
        frozen = copy.deepcopy(teacher).eval().requires_grad_(False)
        self._teacher = frozen if is_fused(frozen) else _fused(frozen)

    def _ask_teacher(self) -> None:
        self.logits = self._teachers_logits(mirrored=False)
        self.mirrored_logits = (self.logits + self._teachers_logits(mirrored=True)) / 2

    def _teachers_logits(self, mirrored: bool) -> Tensor:
        batches = (batch.flip(3) if mirrored else batch for batch in self.images.split(BATCH))
        with torch.no_grad():
            found = torch.cat(
                [_checked(self._teacher(_ready(x, self._device)), len(x), self.recipe).float() for x in batches]
            )
        if not bool(found.isfinite().all()):
            raise InvalidInputError("the teacher's logits on generated images are not finite: check its weights")
        return found

    def __len__(self) -> int:
        return len(self.images)

    def _generate(self, index: int, count: int, steps: int, batch_size: int) -> tuple[Tensor, Tensor]:
        """`count` images of one generator, float16, and labels: equally many of each step of the second half."""
        recipe = self.recipe
        seed = _seed(self.seed, index)
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.default_generator.manual_seed(seed)
            generator = build_generator(recipe)
        generator = generator.to(self._device).train()
        random = torch.Generator(self._device).manual_seed(seed)
        optimizer = torch.optim.Adam(
            generator.parameters(), lr=recipe.lr_generator, betas=(recipe.adam_betas[0], recipe.adam_betas[1])
        )
        matching = BatchNormMatch(self._teacher)
        first, kept, kept_labels = steps // 2, [], []
        for step in range(steps):
            noise = torch.randn(batch_size, recipe.latent_dim, generator=random, device=self._device)
            labels = torch.randint(recipe.num_classes, (batch_size,), generator=random, device=self._device)
            images = generator(noise, labels).contiguous(memory_format=torch.channels_last)
            with matching.watching():
                logits = _checked(self._teacher(images), batch_size, recipe)
            loss = F.cross_entropy(logits.float(), labels) + recipe.gamma * matching.loss()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step >= first:
                place, of = step - first, steps - first
                share = (place + 1) * count // of - place * count // of
                kept.append(images.detach()[:share].half().contiguous())
                kept_labels.append(labels[:share])
        return torch.cat(kept), torch.cat(kept_labels)

    def score(self, student: nn.Module) -> dict[str, float]:
        """How close a network is to the teacher on the held-out images.

        It runs where it is, in eval mode, without gradients and without moving a range; every module's mode is
        restored.

        Args:
            student: any network with the teacher's classes; nothing of it is changed.

        Returns:
            ``agreement``: images, in percent, of which both name the same class; one whose logits hold a NaN agrees
            with nothing. ``loss``: mean L_Q at the recipe's temperature, in nats, between -T^2 log K (q = t up to a
            constant) and 0. ``kl``: mean KL(softmax(t) || softmax(q)), in nats. ``mirrored_agreement`` and
            ``mirrored_kl``: both with `mirrored_logits` in place of t, what students of recipes with
            ``mirror_teacher`` learn.

        Raises:
            InvalidInputError: the logits are not [B, K].
        """
        device = next((p.device for p in student.parameters()), self._device)
        modes = [(module, module.training) for module in student.modules()]
        sums = torch.zeros(5, dtype=torch.float64, device=device)
        student.eval()
        try:
            with frozen_ranges(student), torch.no_grad():
                for batch, *targets in zip(
                    *(tensor.split(BATCH) for tensor in (self.images, self.logits, self.mirrored_logits)), strict=True
                ):
                    teacher, mirrored = (target.to(device) for target in targets)
                    theirs = _checked(student(_ready(batch, device)), len(batch), self.recipe).float()
                    loss = functional.entropy_distillation(teacher, theirs, self.recipe.temperature)
                    measures = [*_nearness(teacher, theirs), *_nearness(mirrored, theirs), loss.double() * len(batch)]
                    sums += torch.stack(measures)
        finally:
            for module, training in modes:
                module.training = training
        agreement, kl, mirrored_agreement, mirrored_kl, loss = (sums / len(self)).tolist()
        return {
            "agreement": 100 * agreement,
            "loss": loss,
            "kl": kl,
            "mirrored_agreement": 100 * mirrored_agreement,
            "mirrored_kl": mirrored_kl,
        }


def _nearness(teacher: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
    """Over a batch, of how many both name the same class, and the sum of KL(softmax(t) || softmax(q))."""
    same = (teacher.argmax(1) == student.argmax(1)) & ~student.isnan().any(1)
    kl = F.kl_div(student.log_softmax(1), teacher.log_softmax(1), reduction="sum", log_target=True)
    return same.sum().double(), kl.double()


def _seed(seed: int, index: int) -> int:
    """A seed of its own for each generator, far from the small numbers that trainings are given."""
    digest = hashlib.sha256(f"adadfq held-out images {seed} {index}".encode()).digest()
    return int.from_bytes(digest[:7], "big")


def _fused(teacher: nn.Module) -> nn.Module:
    """`teacher` in fewer passes over memory where it can be fused; the tensors are the same."""
    try:
        return fuse(teacher)
    except InvalidInputError:
        return teacher


def _ready(images: Tensor, device: torch.device) -> Tensor:
    return images.to(device, torch.float32).contiguous(memory_format=torch.channels_last)


def _checked(logits: object, batch: int, recipe: Recipe) -> Tensor:
    if not isinstance(logits, Tensor) or logits.shape != (batch, recipe.num_classes):
        got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise InvalidInputError(f"expected logits {[batch, recipe.num_classes]} of the recipe's classes, got {got}")
    return logits
