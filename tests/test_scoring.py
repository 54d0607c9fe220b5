"""adadfq.scoring: reading labelled images, and counting right answers."""

import io
import math
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from adadfq import scoring
from adadfq.checkpoint import load_weights, read_state_dict
from adadfq.errors import InvalidInputError
from adadfq.models import build_model
from adadfq.scoring import accuracy, evaluate, open_images

PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
GRAY = {"mean": (0.0,), "std": (1.0,), "channels": 1}


def encode(pixels, format="PNG", mode=None):
    data = io.BytesIO()
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(data, format)
    return data.getvalue()


def noise(seed, *shape):
    return np.random.default_rng(seed).integers(0, 256, shape or (8, 8, 3), dtype=np.uint8)


def write_zip(path, members):
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def write_folder(path, members):
    for name, data in members.items():
        if name.endswith("/"):
            (path / name).mkdir(parents=True, exist_ok=True)
        else:
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(data)
    return path


WRITERS = {
    "zip": lambda tmp, members: write_zip(tmp / "x.zip", members),
    "folder": lambda t, m: write_folder(t / "x", m),
}


@pytest.fixture(params=sorted(WRITERS))
def write(request, tmp_path):
    return lambda members: WRITERS[request.param](tmp_path, members)


@pytest.mark.parametrize("inside", ["", "samples/"])
def test_images_named_by_the_index_of_their_class(write, inside):
    members = {f"{inside}{i:04d}_n{i}.png": encode(noise(i)) for i in (7, 2, 30)}
    data = open_images(write(members), image_size=8, num_classes=31, **PLAIN)
    assert read_all(data)[1].tolist() == [2, 7, 30]
    assert data.num_classes == 31


def test_numbered_names_in_a_class_folder_say_nothing(write):
    data = open_images(write({"3/0_x.png": PNG, "3/1_x.png": PNG}), image_size=8, num_classes=5, **PLAIN)
    assert read_all(data)[1].tolist() == [3, 3]


def read_all(data, batch_size=100):
    batches = list(data.batches(batch_size))
    return torch.cat([b[0] for b in batches]), torch.cat([b[1] for b in batches])


def test_class_folders(write):
    pixels = {name: noise(i) for i, name in enumerate(["cat/b.png", "cat/a.png", "Dog/z.png", "ant/1.bmp"])}
    formats = {".png": "PNG", ".bmp": "BMP"}
    data = open_images(
        write({k: encode(v, formats[k[-4:]]) for k, v in pixels.items()}), image_size=8, num_classes=3, **PLAIN
    )
    assert data.class_names == ("Dog", "ant", "cat")
    assert len(data) == 4 and data.num_classes == 3 and data.ignored == 0
    images, labels = read_all(data)
    assert images.dtype == torch.float32 and labels.dtype == torch.int64
    assert labels.tolist() == [0, 1, 2, 2]
    order = ["Dog/z.png", "ant/1.bmp", "cat/a.png", "cat/b.png"]
    expected = torch.stack([torch.from_numpy(pixels[name]).permute(2, 0, 1) for name in order])
    assert torch.equal((images * 255).round().to(torch.uint8), expected)


def test_a_common_folder_hidden_and_other_files(write):
    png = encode(noise(0))
    data = open_images(
        write(
            {
                "set/a/1.png": png,
                "set/b/deep/2.PNG": png,
                "set/b/.hidden.png": png,
                "set/.git/x/3.png": png,
                "__MACOSX/set/a/1.png": b"x",
                "set/a/notes.txt": b"x",
                "set/readme.md": b"x",
            }
        ),
        image_size=8,
        num_classes=2,
        **PLAIN,
    )
    assert data.class_names == ("a", "b") and len(data) == 2 and data.ignored == 2


def test_integer_folders_are_the_indices(write):
    png = encode(noise(0))
    data = open_images(write({f"{i:03}/x.png": png for i in (10, 2, 7)}), image_size=8, num_classes=12, **PLAIN)
    assert read_all(data)[1].tolist() == [2, 7, 10]
    assert data.num_classes == 12


def test_an_empty_class_counts(write):
    png = encode(noise(0))
    data = open_images(write({"a/x.png": png, "b/": b"", "c/x.png": png}), image_size=8, num_classes=3, **PLAIN)
    assert read_all(data)[1].tolist() == [0, 2]


PNG = encode(noise(0))


@pytest.mark.parametrize(
    ("members", "classes", "message"),
    [
        ({"a/x.png": PNG, "b/x.png": PNG}, 3, r"must have 3 class folders, .* got 2 \(a, b\)"),
        ({"0/x.png": PNG, "3/x.png": PNG}, 3, r"class folder 3 must be 0\.\.2"),
        ({"1/x.png": PNG, "01/x.png": PNG}, 3, "two class folders have one number"),
        ({"a/x.txt": b"x"}, 1, "holds no images"),
        ({"9_x.png": PNG, "0_y.png": PNG}, 2, "class 9 must be 0..1"),
        ({"0_x.png": PNG, "y.png": PNG}, 2, r"image 0_x\.png is not in a class folder"),
        ({"x.png": PNG, "y.png": PNG}, 2, r"image x\.png is not in a class folder"),
        ({"a/x.png": PNG, "y.png": PNG}, 2, r"image y\.png is not in a class folder"),
    ],
)
def test_folders_that_do_not_fit_are_refused(write, members, classes, message):
    with pytest.raises(InvalidInputError, match=message):
        open_images(write(members), image_size=8, num_classes=classes, **PLAIN)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"not an image", r"a/x\.png is not an image that can be decoded"),
        (b"", r"a/x\.png is not an image that can be decoded"),
        (encode(noise(0, 64, 64, 3))[:-2000], r"a/x\.png cannot be decoded"),
        (encode(np.zeros((8, 8), np.uint16)), r"a/x\.png has more than 8 bits a channel"),
    ],
)
def test_an_unreadable_image_is_named(write, data, message):
    images = open_images(write({"a/x.png": data}), image_size=8, num_classes=1, **PLAIN)
    with pytest.raises(InvalidInputError, match=message):
        list(images)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_too_large_images_are_refused(write, monkeypatch):
    images = open_images(write({"a/x.png": encode(noise(0, 20, 20, 3))}), image_size=8, num_classes=1, **PLAIN)
    for limit in (300, 100):  # Pillow warns at the first and raises at the second
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(InvalidInputError, match=r"a/x\.png is too large an image"):
            list(images)


def test_archive_members_that_unpack_to_too_much_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(scoring, "_MAX_MEMBER_BYTES", 50)
    images = open_images(write_zip(tmp_path / "x.zip", {"a/x.png": PNG}), image_size=8, num_classes=1, **PLAIN)
    with pytest.raises(InvalidInputError, match=r"a/x\.png unpacks to \d+ bytes, more than 50"):
        list(images)


def test_a_damaged_member_is_named(tmp_path):
    path = write_zip(tmp_path / "x.zip", {"a/x.png": PNG, "a/y.png": PNG})
    data = bytearray(path.read_bytes())
    data[60] ^= 0xFF  # inside the first member; its checksum no longer fits
    path.write_bytes(data)
    images = open_images(path, image_size=8, num_classes=1, **PLAIN)
    with pytest.raises(InvalidInputError, match=r"a/x\.png cannot be unpacked"):
        list(images)


def test_paths_that_are_no_data(tmp_path):
    def refused(path, message):
        with pytest.raises(InvalidInputError, match=message):
            open_images(path, image_size=8, num_classes=2, **PLAIN)

    refused(tmp_path / "no.zip", "does not exist; check the path")
    (tmp_path / "x.tar").write_bytes(b"x")
    refused(tmp_path / "x.tar", r"must be a folder, a \.zip or an \.npz")
    write_zip(tmp_path / "x.zip", {"a/x.png": PNG})
    (tmp_path / "short.zip").write_bytes((tmp_path / "x.zip").read_bytes()[:-10])
    refused(tmp_path / "short.zip", "is not a whole zip archive")
    (tmp_path / "bad.npz").write_bytes(b"x" * 100)
    refused(tmp_path / "bad.npz", r"is not a whole \.npz")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "holds no images")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mean": (0.5,)}, r"mean must be 3 finite number\(s\), one a channel, got \(0\.5,\)"),
        ({"std": (1.0, math.nan, 1.0)}, "std must be 3 finite"),
        ({"std": (1.0, 0.0, 1.0)}, "std must be positive"),
        ({"channels": 2}, "channels must be 1 or 3, got 2"),
        ({"image_size": 0}, "must be positive, got 0"),
        ({"num_classes": 0}, "must be positive, got 8 and 0"),
    ],
)
def test_settings_that_do_not_fit_are_refused(tmp_path, change, message):
    with pytest.raises(InvalidInputError, match=message):
        open_images(tmp_path, **{"image_size": 8, "num_classes": 2, **PLAIN, **change})


def test_batches_and_normalisation(tmp_path):
    path = write_zip(tmp_path / "x.zip", {f"{i}/x.png": encode(noise(i)) for i in range(5)})
    plain = read_all(open_images(path, image_size=8, num_classes=5, **PLAIN))[0]
    data = open_images(path, image_size=8, num_classes=5, mean=(0.1, 0.2, 0.3), std=(0.5, 1.0, 2.0))
    assert [len(labels) for _, labels in data.batches(2)] == [2, 2, 1]
    expected = (plain - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / torch.tensor([0.5, 1.0, 2.0]).view(3, 1, 1)
    torch.testing.assert_close(read_all(data, 2)[0], expected)
    data.batch_size = 3
    assert [tuple(images.shape) for images, _ in data] == [(3, 3, 8, 8), (2, 3, 8, 8)]
    with pytest.raises(InvalidInputError, match="batch_size must be at least 1, got 0"):
        next(data.batches(0))


def test_images_are_decoded_lazily(tmp_path):
    members = {"a/0.png": PNG, "a/1.png": b"broken"}
    batches = open_images(write_zip(tmp_path / "x.zip", members), image_size=8, num_classes=1, **PLAIN).batches(1)
    next(batches)
    with pytest.raises(InvalidInputError, match=r"a/1\.png"):
        next(batches)


@pytest.mark.parametrize("mode", ["L", "RGBA", "LA", "P", "CMYK", "1"])
def test_modes_become_the_models_channels(tmp_path, mode):
    format = "TIFF" if mode == "CMYK" else "PNG"
    data = encode(noise(0), format, mode)
    path = write_zip(tmp_path / "x.zip", {f"a/x.{format.lower()}": data})
    decoded = Image.open(io.BytesIO(data))
    for settings, target in ((PLAIN, "RGB"), (GRAY, "L")):
        images, _ = read_all(open_images(path, image_size=8, num_classes=1, **settings))
        expected = np.atleast_3d(np.asarray(decoded.convert(target))).transpose(2, 0, 1)
        assert np.array_equal((images[0] * 255).round().numpy(), expected)


def test_large_images_are_resized_and_cropped(tmp_path):
    pixels = noise(0, 100, 150, 3)
    path = write_zip(tmp_path / "x.zip", {"a/x.png": encode(pixels)})
    images, _ = read_all(open_images(path, image_size=64, num_classes=1, **PLAIN))
    short = round(64 / 0.875)
    assert short == 73
    resized = np.asarray(Image.fromarray(pixels).resize((int(73 * 150 / 100), 73), Image.Resampling.BICUBIC))
    left, top = round((109 - 64) / 2), round((73 - 64) / 2)
    expected = resized[top : top + 64, left : left + 64].transpose(2, 0, 1)
    assert np.array_equal((images[0] * 255).round().numpy(), expected)


def test_small_sizes_are_resized_directly_and_right_sizes_left_alone(tmp_path):
    pixels = noise(0, 40, 30, 3)
    path = write_zip(tmp_path / "x.zip", {"a/x.png": encode(pixels)})
    images, _ = read_all(open_images(path, image_size=32, num_classes=1, **PLAIN))
    expected = np.asarray(Image.fromarray(pixels).resize((32, 32), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    assert np.array_equal((images[0] * 255).round().numpy(), expected)
    exact = noise(1, 64, 64, 3)
    write_zip(path, {"a/x.png": encode(exact)})
    images, _ = read_all(open_images(path, image_size=64, num_classes=1, **PLAIN))
    assert np.array_equal((images[0] * 255).round().numpy(), exact.transpose(2, 0, 1))


def test_npz_layouts_agree(tmp_path):
    pixels, labels = noise(0, 4, 8, 8, 3), np.array([3, 0, 1, 1], np.int32)
    expected = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    for images in (pixels, (pixels.astype(np.float64) / 255).transpose(0, 3, 1, 2)):
        np.savez_compressed(tmp_path / "x.npz", images=images, labels=labels)
        got, got_labels = read_all(open_images(tmp_path / "x.npz", image_size=8, num_classes=4, **PLAIN), 3)
        torch.testing.assert_close(got, expected)
        assert got_labels.tolist() == [3, 0, 1, 1]


def test_npz_gray_and_channel_conversion(tmp_path):
    gray = noise(0, 2, 8, 8)
    for images in (gray, gray[..., None], gray[:, None].astype(np.float32) / 255):
        np.savez(tmp_path / "x.npz", images=images, labels=np.zeros(2, int))
        one = read_all(open_images(tmp_path / "x.npz", image_size=8, num_classes=1, **GRAY))[0]
        three = read_all(open_images(tmp_path / "x.npz", image_size=8, num_classes=1, **PLAIN))[0]
        torch.testing.assert_close(one, torch.from_numpy(gray)[:, None].float() / 255)
        torch.testing.assert_close(three, one.expand(-1, 3, -1, -1))
    colour = noise(1, 2, 8, 8, 4)
    np.savez(tmp_path / "x.npz", images=colour, labels=np.zeros(2, int))
    got = read_all(open_images(tmp_path / "x.npz", image_size=8, num_classes=1, **PLAIN))[0]
    torch.testing.assert_close(got, torch.from_numpy(colour[..., :3]).permute(0, 3, 1, 2).float() / 255)
    as_float = (colour[..., :3].astype(np.float32) / 255).transpose(0, 3, 1, 2)
    np.savez(tmp_path / "y.npz", images=as_float, labels=np.zeros(2, int))
    ours, pillows = (
        read_all(open_images(tmp_path / name, image_size=8, num_classes=1, **GRAY))[0] for name in ("y.npz", "x.npz")
    )
    torch.testing.assert_close(ours, pillows, atol=1 / 255, rtol=0)


@pytest.mark.parametrize("size", [16, 64])
def test_npz_floats_resize_like_bytes(tmp_path, size):
    x, y = np.meshgrid(np.linspace(0, 3, 96), np.linspace(0, 2, 80))
    pixels = (127.5 + 127.5 * np.sin(np.stack([x, y, x + y], -1)))[None].astype(np.uint8)
    np.savez(tmp_path / "b.npz", images=pixels, labels=[0])
    np.savez(tmp_path / "f.npz", images=(pixels / 255).transpose(0, 3, 1, 2), labels=[0])
    ours, bytes_ = (
        read_all(open_images(tmp_path / name, image_size=size, num_classes=1, **PLAIN))[0]
        for name in ("f.npz", "b.npz")
    )
    assert ours.shape == (1, 3, size, size)
    torch.testing.assert_close(ours, bytes_, atol=1.5 / 255, rtol=0)


IMAGES = noise(0, 3, 8, 8, 3)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": IMAGES}, "lacks 'labels', has images"),
        ({"x": IMAGES}, "lacks 'images', has x"),
        ({"images": IMAGES, "labels": [0, 1, 2]}, r"labels must be 0\.\.1, .* got 2"),
        ({"images": IMAGES, "labels": [0, -1, 0]}, r"labels must be 0\.\.1, .* got -1"),
        ({"images": IMAGES, "labels": [0, 1]}, r"labels must be integers \[3\], one an image, got int64 \[2\]"),
        ({"images": IMAGES, "labels": [0.0, 1.0, 1.0]}, r"labels must be integers \[3\]"),
        ({"images": IMAGES.astype(np.int32), "labels": [0, 1, 1]}, r"images must be uint8 .* got int32 \[3, 8, 8, 3\]"),
        ({"images": IMAGES / 255, "labels": [0, 1, 1]}, r"images must be uint8 .* got float64 \[3, 8, 8, 3\]"),
        ({"images": np.zeros((3, 3, 8, 8)) - 0.1, "labels": [0, 1, 1]}, r"must be finite and in 0\.\.1"),
        ({"images": np.full((3, 3, 8, 8), np.nan), "labels": [0, 1, 1]}, r"must be finite and in 0\.\.1"),
        ({"images": IMAGES[:0], "labels": np.zeros(0, int)}, "at least one image"),
        ({"images": np.array([None]), "labels": [0]}, r"is not a whole \.npz of plain arrays"),
    ],
)
def test_npz_that_does_not_fit_is_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(InvalidInputError, match=message):
        open_images(tmp_path / "x.npz", image_size=8, num_classes=2, **PLAIN)


class Fixed(nn.Module):
    """Answers with the given logits, in order."""

    def __init__(self, logits):
        super().__init__()
        self.register_buffer("logits", logits)
        self.dropout = nn.Dropout(0.9)
        self.at = 0

    def forward(self, x):
        start, self.at = self.at, self.at + len(x)
        return self.dropout(self.logits[start : self.at])


@pytest.fixture
def eight(tmp_path):
    np.savez(tmp_path / "x.npz", images=noise(0, 4, 8, 8, 3), labels=[0, 3, 3, 7])
    return open_images(tmp_path / "x.npz", image_size=8, num_classes=8, **PLAIN)


def test_accuracy_counts(eight):
    logits = F.one_hot(torch.tensor([0, 3, 0, 0]), 8).float()
    logits[2] = torch.tensor([9.0, 8, 10, 4, 7, 3, 2, 1])  # label 3 is fifth
    logits[3] = torch.tensor([5.0, 6, 9, 7, 8, 1, 2, 4])  # label 7 is sixth
    score = accuracy(Fixed(logits), eight, batch_size=3)
    assert (score.count, score.correct, score.correct5) == (4, 2, 3)
    assert score.top1 == 50.0 and score.top5 == 75.0
    assert score.standard_error == pytest.approx(25.0)
    assert score.per_class[0] == (1, 1) and score.per_class[3] == (1, 2) and score.per_class[7] == (0, 1)
    assert score.to_dict()["top1"] == 50.0 and score.to_dict()["per_class"][3] == [1, 2]


def test_nan_logits_are_wrong(eight):
    assert accuracy(Fixed(torch.full((4, 8), math.nan)), eight).correct == 0


def test_few_classes_have_no_top5(tmp_path):
    np.savez(tmp_path / "x.npz", images=noise(0, 1, 8, 8, 3), labels=[0])
    score = accuracy(Fixed(torch.ones(1, 5)), open_images(tmp_path / "x.npz", image_size=8, num_classes=5, **PLAIN))
    assert score.top5 is None and score.to_dict()["top5"] is None


@pytest.mark.parametrize("shape", [(4, 9), (4,), (2, 8)])
def test_wrong_outputs_are_refused_and_the_mode_restored(eight, shape):
    class Wrong(Fixed):
        def forward(self, x):
            return self.logits

    model = Wrong(torch.zeros(shape))
    model.dropout.eval()
    with pytest.raises(InvalidInputError, match=r"student must return logits \[4, 8\]"):
        evaluate({"student": model}, eight)
    assert model.training and not model.dropout.training


def test_evaluate_scores_several_in_one_pass(eight, monkeypatch):
    passes = []
    batches = eight.batches
    monkeypatch.setattr(eight, "batches", lambda size: passes.append(size) or batches(size))
    right = F.one_hot(torch.tensor([0, 3, 3, 7]), 8).float()
    models = {"right": Fixed(right), "wrong": Fixed(-right)}
    scores = evaluate(models, eight, batch_size=2)
    assert passes == [2]
    assert (scores["right"].correct, scores["wrong"].correct) == (4, 0)
    assert all(model.training and model.dropout.training for model in models.values())


# ------------------------------------------------------------------------------------------------------ real data

TEST_DATA = Path(os.environ.get("ADADFQ_TEST_DATA", "ADADFQ_TEST_DATA is not set"))


def real_file(name):
    path = TEST_DATA / name
    return path, pytest.mark.skipif(not path.is_file(), reason=f"needs {path}; set ADADFQ_TEST_DATA to its directory")


CIFAR_IMAGES, needs_cifar_images = real_file("cifar10_jpeg_test_dev.zip")
CIFAR_TEACHER, needs_cifar_teacher = real_file("resnet20_cifar10_jpeg.safetensors")


@needs_cifar_images
@needs_cifar_teacher
def test_real_teacher_accuracy():
    model = build_model("resnet20")
    load_weights(model, read_state_dict(CIFAR_TEACHER), CIFAR_TEACHER)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    data = open_images(CIFAR_IMAGES, image_size=32, num_classes=10, mean=mean, std=std)
    score = accuracy(model, data)
    assert score.count == 5000 and {count for _, count in score.per_class} == {500}
    assert f"{score.top1:.2f}" == "88.88"
