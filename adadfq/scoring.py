"""Scoring networks on labelled images. Nothing here takes part in training."""

from __future__ import annotations

import io
import math
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from adadfq.errors import InvalidInputError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff", ".gif")

#: From this size on, images are resized to size / 0.875 and cropped, as is usual for ImageNet.
CROP_FROM = 64
CROP_FRACTION = 0.875

_MAX_MEMBER_BYTES = 1 << 28  # an archive member that unpacks to more is not a photograph
_LAYOUT = "images must lie in one folder per class (CLASS/IMAGE.jpg), or be named INDEX_NAME.jpg by its index"


# ---------------------------------------------------------------------------------------------------- the images


class ScoringSet:
    """Labelled images, read and decoded batch by batch; made by :func:`open_images`.

    Iterating yields ``(images, labels)``: float32 [B, channels, image_size, image_size], normalised, and int64 [B],
    both on the CPU, in a fixed order. ``len()`` is the number of images.

    Attributes:
        class_names: name by class index; the index itself where the data give no name.
        ignored: files that are not images by their suffix.
    """

    def __init__(
        self,
        name: str,
        labels: Sequence[int],
        reader: Callable[[], Any],
        class_names: Sequence[str],
        image_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        ignored: int = 0,
    ) -> None:
        self.name = name
        self.class_names = tuple(class_names)
        self.image_size = image_size
        self.ignored = ignored
        self.batch_size = 100
        self._labels = torch.tensor(labels, dtype=torch.int64)
        self._reader = reader  # () -> context manager giving index -> float32 [channels, size, size] in 0..1
        self._mean = torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1)
        self._std = torch.tensor(std, dtype=torch.float32).view(-1, 1, 1)

    def __len__(self) -> int:
        return len(self._labels)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.batches(self.batch_size)

    @property
    def num_classes(self) -> int:
        """Number of classes, with or without images."""
        return len(self.class_names)

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of `batch_size` images, the last one smaller.

        Raises:
            InvalidInputError: `batch_size` is not positive, or an image cannot be decoded (names it).
        """
        if batch_size < 1:
            raise InvalidInputError(f"batch_size must be at least 1, got {batch_size}")
        with self._reader() as read:
            for start in range(0, len(self), batch_size):
                labels = self._labels[start : start + batch_size]
                images = torch.stack([read(i) for i in range(start, start + len(labels))])
                yield images.sub_(self._mean).div_(self._std), labels


def open_images(
    path: str | os.PathLike[str],
    image_size: int,
    num_classes: int,
    mean: Sequence[float],
    std: Sequence[float],
    channels: int = 3,
) -> ScoringSet:
    """Open labelled images for scoring.

    `path` is one of

    - a folder, or a zip archive, of class folders (all inside one common folder, or not). A class's index is the
      position of its folder's name in sorted order; where all names are integers, the name is the index.
    - a folder, or a zip archive, of images in one place whose names begin with the index of their class and an
      underscore (``0017_n01580077.jpg``).
    - an ``.npz`` with ``images``, uint8 [N, H, W] or [N, H, W, C] or floating [N, C, H, W] in 0..1, and ``labels``,
      integers [N].

    Images become `channels` (1 or 3) channels of `image_size` x `image_size`: left alone if they have that size;
    otherwise, bicubic and antialiased, the short side is resized to ``round(image_size / 0.875)`` and the centre
    cropped from `CROP_FROM` pixels on, and resized directly to the size below. Then ``(x - mean) / std`` on 0..1.

    Raises:
        InvalidInputError: the path is none of these or cannot be read, it holds no images, its classes do not fit
            `num_classes`, a label is out of range, or `mean` and `std` do not fit `channels`.
    """
    path = Path(path)
    if channels not in (1, 3):
        raise InvalidInputError(f"channels must be 1 or 3, got {channels}")
    if image_size < 1 or num_classes < 1:
        raise InvalidInputError(f"image_size and num_classes must be positive, got {image_size} and {num_classes}")
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != channels or not all(math.isfinite(v) for v in values):
            raise InvalidInputError(f"{name} must be {channels} finite number(s), one a channel, got {tuple(values)}")
    if any(value <= 0 for value in std):
        raise InvalidInputError(f"std must be positive, got {tuple(std)}")
    if not path.exists():
        raise InvalidInputError(f"evaluation data {path} does not exist; check the path")
    if path.is_dir():
        members, directories = _list_folder(path)
        opener: Callable[[], Any] = lambda: _folder_bytes(path)  # noqa: E731
    elif path.suffix.lower() == ".npz":
        return _open_npz(path, image_size, num_classes, mean, std, channels)
    elif path.suffix.lower() == ".zip":
        members, directories = _list_zip(path)
        opener = lambda: _zip_bytes(path)  # noqa: E731
    else:
        raise InvalidInputError(f"evaluation data {path} must be a folder, a .zip or an .npz; convert it")
    images, labels, names, ignored = _classify(path, members, directories, num_classes)

    @contextmanager
    def reader() -> Iterator[Callable[[int], Tensor]]:
        with opener() as read_bytes:
            yield lambda i: _decode(read_bytes(images[i]), f"{path}: {images[i]}", image_size, channels)

    return ScoringSet(str(path), labels, reader, names, image_size, mean, std, ignored)


# ------------------------------------------------------------------------------------------------- class folders


def _list_folder(root: Path) -> tuple[list[str], list[str]]:
    """Relative posix paths of the files and of the directories below `root`."""
    files: list[str] = []
    directories: list[str] = []
    for folder, below, names in os.walk(root, followlinks=True):
        below[:] = [name for name in below if not _is_hidden(name)]
        relative = Path(folder).relative_to(root)
        files += [(relative / name).as_posix() for name in names]
        directories += [(relative / name).as_posix() for name in below]
    return files, directories


def _list_zip(path: Path) -> tuple[list[str], list[str]]:
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError) as error:
        raise InvalidInputError(
            f"evaluation data {path} is not a whole zip archive ({error}); copy or download it again"
        ) from error
    for entry in entries:
        if entry.flag_bits & 1:
            raise InvalidInputError(f"{path}: {entry.filename} is encrypted; make the archive without a password")
    return (
        [entry.filename for entry in entries if not entry.is_dir()],
        [entry.filename.rstrip("/") for entry in entries if entry.is_dir()],
    )


@contextmanager
def _folder_bytes(root: Path) -> Iterator[Callable[[str], bytes]]:
    def read(member: str) -> bytes:
        try:
            return (root / member).read_bytes()
        except OSError as error:
            raise InvalidInputError(f"{root}: {member} cannot be read: {error.strerror}; check the file") from error

    yield read


@contextmanager
def _zip_bytes(path: Path) -> Iterator[Callable[[str], bytes]]:
    with zipfile.ZipFile(path) as archive:

        def read(member: str) -> bytes:
            if (size := archive.getinfo(member).file_size) > _MAX_MEMBER_BYTES:
                raise InvalidInputError(f"{path}: {member} unpacks to {size} bytes, more than {_MAX_MEMBER_BYTES}")
            try:
                return archive.read(member)
            except (
                zipfile.BadZipFile,
                NotImplementedError,  # zipfile's word for a compression it does not know
                EOFError,
                OSError,
                ValueError,
                zipfile.zlib.error,
            ) as error:
                raise InvalidInputError(
                    f"{path}: {member} cannot be unpacked ({error}); copy or download the archive again"
                ) from error

        yield read


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _classify(
    path: Path, members: list[str], directories: list[str], num_classes: int
) -> tuple[list[str], list[int], list[str], int]:
    """Images in a fixed order, their labels, class names by index, and how many files were ignored."""
    visible = {m: PurePosixPath(m).parts for m in members if not any(map(_is_hidden, PurePosixPath(m).parts))}
    images = {m: parts for m, parts in visible.items() if parts[-1].lower().endswith(IMAGE_SUFFIXES)}
    if not images:
        raise InvalidInputError(f"evaluation data {path} holds no images ({' '.join(IMAGE_SUFFIXES)}); {_LAYOUT}")
    places = {parts[:-1] for parts in images.values()}
    in_class_folder = any(_is_number(place[-1]) for place in places if place) or (num_classes == 1 and () not in places)
    if len(places) == 1 and not in_class_folder and all(_numbered(parts[-1]) for parts in images.values()):
        return _by_number(path, images, num_classes, len(visible) - len(images))
    # One folder around all class folders is the archive's own name, not a class.
    top = 1 if len({parts[0] for parts in images.values()}) == 1 and min(map(len, images.values())) > 2 else 0
    if loose := min((m for m, parts in images.items() if len(parts) < top + 2), default=None):
        raise InvalidInputError(f"{path}: image {loose} is not in a class folder; {_LAYOUT}")
    folders = {parts[top] for parts in images.values()}
    inside = next(iter(images.values()))[:top]
    for directory in directories:  # a class may be empty
        parts = PurePosixPath(directory).parts
        if len(parts) > top and parts[:top] == inside and not any(map(_is_hidden, parts)):
            folders.add(parts[top])
    index, names = _class_index(path, sorted(folders), num_classes)
    order = sorted(images)
    return order, [index[images[m][top]] for m in order], names, len(visible) - len(images)


def _is_number(name: str) -> bool:
    return name.isascii() and name.isdigit()


def _numbered(name: str) -> bool:
    number, underscore, _ = name.partition("_")
    return bool(underscore) and _is_number(number)


def _by_number(
    path: Path, images: Mapping[str, tuple[str, ...]], num_classes: int, ignored: int
) -> tuple[list[str], list[int], list[str], int]:
    """As :func:`_classify`, of images in one folder named by the index of their class."""
    labels = {member: int(parts[-1].partition("_")[0]) for member, parts in images.items()}
    if (highest := max(labels.values())) >= num_classes:
        raise InvalidInputError(f"{path}: class {highest} must be 0..{num_classes - 1}, as the model has it")
    order = sorted(images)
    return order, [labels[member] for member in order], [str(i) for i in range(num_classes)], ignored


def _class_index(path: Path, folders: list[str], num_classes: int) -> tuple[dict[str, int], list[str]]:
    if all(_is_number(name) for name in folders):
        index = {name: int(name) for name in folders}
        if (highest := max(index.values())) >= num_classes:
            raise InvalidInputError(f"{path}: class folder {highest} must be 0..{num_classes - 1}, as the model has it")
        if len(set(index.values())) != len(index):
            raise InvalidInputError(f"{path}: two class folders have one number ({', '.join(folders)}); merge them")
        return index, [str(i) for i in range(num_classes)]
    if len(folders) != num_classes:
        shown = ", ".join(folders[:5]) + (", ..." if len(folders) > 5 else "")
        raise InvalidInputError(
            f"{path} must have {num_classes} class folders, as the model has classes, got {len(folders)} ({shown}); "
            "for a part of the classes name the folders by class index (0, 1, ...)"
        )
    return {name: i for i, name in enumerate(folders)}, folders


def _decode(data: bytes, name: str, size: int, channels: int) -> Tensor:
    """Encoded image -> float32 [channels, size, size] in 0..1."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            limit = Image.MAX_IMAGE_PIXELS  # Pillow itself only warns between once and twice this
            if limit is not None and image.width * image.height > limit:
                raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels, more than {limit}")
            if image.mode in ("I", "F") or image.mode.startswith("I;"):
                raise InvalidInputError(f"{name} has more than 8 bits a channel (mode {image.mode}); convert it to 8")
            image = image.convert("L" if channels == 1 else "RGB")
    except InvalidInputError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InvalidInputError(f"{name} is too large an image: {error}") from error
    except UnidentifiedImageError as error:
        raise InvalidInputError(f"{name} is not an image that can be decoded; replace or remove it") from error
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, ...
        raise InvalidInputError(f"{name} cannot be decoded ({error}); replace or remove it") from error
    return _to_float(np.asarray(_resize(image, size)))


def _to_float(pixels: np.ndarray) -> Tensor:
    """uint8 [H, W] or [H, W, C] -> float32 [C, H, W] in 0..1."""
    tensor = torch.from_numpy(np.array(pixels, copy=True))
    tensor = tensor.unsqueeze(0) if tensor.dim() == 2 else tensor.permute(2, 0, 1)
    return tensor.to(torch.float32).div_(255)


def _sizes(width: int, height: int, size: int) -> tuple[int, int]:
    """Width and height to resize to, before the centre is cropped to `size`."""
    if size < CROP_FROM:
        return size, size
    short = round(size / CROP_FRACTION)
    if width <= height:
        return short, int(short * height / width)
    return int(short * width / height), short


def _resize(image: Image.Image, size: int) -> Image.Image:
    if image.size == (size, size):
        return image
    width, height = _sizes(*image.size, size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return image.crop((left, top, left + size, top + size))


# ------------------------------------------------------------------------------------------------------------ npz


def _open_npz(
    path: Path, size: int, num_classes: int, mean: Sequence[float], std: Sequence[float], channels: int
) -> ScoringSet:
    try:
        with np.load(path, allow_pickle=False) as archive:
            if lacking := [key for key in ("images", "labels") if key not in archive.files]:
                found = ", ".join(archive.files) or "nothing"
                raise InvalidInputError(f"{path} must hold 'images' and 'labels', lacks {lacking[0]!r}, has {found}")
            images, labels = archive["images"], archive["labels"]
    except InvalidInputError:
        raise
    except Exception as error:  # zipfile, zlib and numpy each raise their own
        raise InvalidInputError(
            f"evaluation data {path} is not a whole .npz of plain arrays ({error}); write it again with numpy.savez"
        ) from error
    images = _check_arrays(path, images, labels, num_classes, channels)

    def convert(i: int) -> Tensor:
        if images.dtype != np.uint8:
            return _convert_float(torch.from_numpy(images[i].astype(np.float32)), size, channels)
        pixels = images[i]
        if pixels.ndim == 3 and pixels.shape[2] == 1:
            pixels = pixels[..., 0]
        return _to_float(np.asarray(_resize(Image.fromarray(pixels).convert("L" if channels == 1 else "RGB"), size)))

    @contextmanager
    def reader() -> Iterator[Callable[[int], Tensor]]:
        yield convert

    return ScoringSet(str(path), labels.tolist(), reader, [str(i) for i in range(num_classes)], size, mean, std)


def _check_arrays(path: Path, images: np.ndarray, labels: np.ndarray, num_classes: int, channels: int) -> np.ndarray:
    got = f"{images.dtype} {list(images.shape)}"
    as_bytes = images.dtype == np.uint8 and (images.ndim == 3 or (images.ndim == 4 and images.shape[3] in (1, 3, 4)))
    as_floats = images.dtype.kind == "f" and images.ndim == 4 and images.shape[1] in (1, 3)
    if not as_bytes and not as_floats:
        raise InvalidInputError(
            f"{path}: images must be uint8 [N, H, W] or [N, H, W, C], or floating [N, C, H, W] in 0..1, got {got}"
        )
    if images.size == 0:
        raise InvalidInputError(f"{path}: images must hold at least one image, got {got}")
    if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
        raise InvalidInputError(
            f"{path}: labels must be integers [{len(images)}], one an image, got {labels.dtype} {list(labels.shape)}"
        )
    if len(wrong := labels[(labels < 0) | (labels >= num_classes)]):
        raise InvalidInputError(f"{path}: labels must be 0..{num_classes - 1}, as the model has them, got {wrong[0]}")
    if as_floats and not (images.min() >= 0 and images.max() <= 1):  # false for NaN, too
        raise InvalidInputError(
            f"{path}: floating images must be finite and in 0..1, got {images.min()}..{images.max()}; "
            "give them before normalisation"
        )
    return images


def _convert_float(image: Tensor, size: int, channels: int) -> Tensor:
    """float32 [C, H, W] in 0..1 -> [channels, size, size]."""
    if image.shape[0] != channels:
        luma = torch.tensor((0.299, 0.587, 0.114)).view(3, 1, 1)  # ITU-R 601, as Pillow's "L"
        image = image.expand(channels, -1, -1).contiguous() if channels == 3 else (image * luma).sum(0, keepdim=True)
    height, width = image.shape[1:]
    if (height, width) == (size, size):
        return image
    width, height = _sizes(width, height, size)
    image = F.interpolate(image[None], (height, width), mode="bicubic", antialias=True)[0].clamp_(0, 1)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return image[:, top : top + size, left : left + size]


# --------------------------------------------------------------------------------------------------------- scores


@dataclass(frozen=True)
class Accuracy:
    """How many of `count` images a network classified correctly.

    Attributes:
        correct: the largest logit was the label's.
        correct5: the label's logit was among the five largest; None with five classes or fewer.
        per_class: (correct, count) by class.
    """

    count: int
    correct: int
    correct5: int | None
    per_class: tuple[tuple[int, int], ...]

    @property
    def top1(self) -> float:
        """Top-1 accuracy in percent."""
        return 100 * self.correct / self.count

    @property
    def top5(self) -> float | None:
        """Top-5 accuracy in percent; None with five classes or fewer."""
        return None if self.correct5 is None else 100 * self.correct5 / self.count

    @property
    def standard_error(self) -> float:
        """Standard error of :attr:`top1` in percentage points, of a sample of `count` images."""
        share = self.correct / self.count
        return 100 * math.sqrt(share * (1 - share) / self.count)

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON-able values, percentages included."""
        return {
            "top1": self.top1,
            "standard_error": self.standard_error,
            "top5": self.top5,
            "count": self.count,
            "correct": self.correct,
            "correct5": self.correct5,
            "per_class": [list(pair) for pair in self.per_class],
        }


def accuracy(
    model: nn.Module, data: ScoringSet, batch_size: int = 100, device: str | torch.device | None = None
) -> Accuracy:
    """Accuracy of one network; see :func:`evaluate`."""
    return evaluate({"model": model}, data, batch_size, device)["model"]


def evaluate(
    models: Mapping[str, nn.Module],
    data: ScoringSet,
    batch_size: int = 100,
    device: str | torch.device | None = None,
    progress: bool = False,
) -> dict[str, Accuracy]:
    """Score several networks in one pass over the images.

    Networks run in eval mode without gradients; every module's mode is restored. A sample with a NaN among its
    logits counts as wrong.

    Args:
        device: the networks are moved there and stay; None: where the first parameter of the first network is.
        progress: show a bar, if standard error is a terminal.

    Raises:
        InvalidInputError: a network's output is not [B, K] with K the number of classes of `data`, or an image
            cannot be decoded.
    """
    if device is None:
        first = next((tensor for model in models.values() for tensor in model.parameters()), None)
        device = torch.device("cpu") if first is None else first.device
    classes = data.num_classes
    seen = torch.zeros(classes, dtype=torch.int64, device=device)
    right = {name: torch.zeros_like(seen) for name in models}
    right5 = {name: torch.zeros_like(seen) for name in models}
    bar = tqdm(total=len(data), desc="scoring", unit="image", leave=False, disable=None if progress else True)
    for model in models.values():
        model.to(device)
    with bar, _eval_mode(models.values()), torch.no_grad():
        for images, labels in data.batches(batch_size):
            images = images.to(device).contiguous(memory_format=torch.channels_last)  # half the time on a CPU
            labels = labels.to(device)
            seen.index_add_(0, labels, torch.ones_like(labels))
            for name, model in models.items():
                logits = _check_output(name, model(images), len(labels), classes)
                sound = ~logits.isnan().any(dim=1)
                right[name].index_add_(0, labels, (sound & (logits.argmax(dim=1) == labels)).long())
                if classes > 5:
                    among = (logits.topk(5, dim=1).indices == labels[:, None]).any(dim=1)
                    right5[name].index_add_(0, labels, (sound & among).long())
            bar.update(len(labels))
    return {
        name: Accuracy(
            count=len(data),
            correct=int(right[name].sum()),
            correct5=int(right5[name].sum()) if classes > 5 else None,
            per_class=tuple(zip(right[name].tolist(), seen.tolist(), strict=True)),
        )
        for name in models
    }


def _check_output(name: str, logits: Any, batch: int, classes: int) -> Tensor:
    if not isinstance(logits, Tensor) or logits.shape != (batch, classes):
        got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise InvalidInputError(
            f"{name} must return logits [{batch}, {classes}] for {batch} images of {classes} classes, got {got}; "
            "check that model, recipe and data have the same classes"
        )
    return logits


@contextmanager
def _eval_mode(models: Any) -> Iterator[None]:
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training
