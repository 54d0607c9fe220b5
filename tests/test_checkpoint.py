"""adadfq.checkpoint: weights from and to files; reading never runs code."""

import io
import os
import pickle
import struct
import warnings
import zipfile
from argparse import Namespace
from collections import OrderedDict
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from adadfq.checkpoint import load_weights, read_state_dict, write_state_dict
from adadfq.errors import CheckpointError, InvalidInputError
from adadfq.models import build_model


@pytest.fixture
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))


def assert_same(ours, theirs):
    assert set(ours) == set(theirs)
    for key in theirs:
        assert ours[key].dtype == theirs[key].dtype
        assert torch.equal(ours[key], theirs[key])


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".th", ".tar", ".PTH"])
@pytest.mark.parametrize("legacy", [False, True])
def test_reads_what_torch_saves(tmp_path, net, suffix, legacy):
    path = tmp_path / f"x{suffix}"
    torch.save(net.state_dict(), path, _use_new_zipfile_serialization=not legacy)
    assert_same(read_state_dict(path), net.state_dict())


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: {"state_dict": s, "epoch": 3, "best": 0.5, "optimizer": {"state": {}, "param_groups": [{"lr": 1.0}]}},
        lambda s: {"model_state_dict": s, "loss": torch.ones(())},
        lambda s: {"net": s, "acc": 93.1},
        lambda s: {"epoch": 1, "model": {"state_dict": s}},
        lambda s: {f"module.{k}": v for k, v in s.items()},
        lambda s: {"state_dict": {f"module._orig_mod.{k}": v for k, v in s.items()}},
        lambda s: OrderedDict((k, nn.Parameter(v) if v.is_floating_point() else v) for k, v in s.items()),
    ],
)
def test_unwraps(tmp_path, net, wrap):
    torch.save(wrap(net.state_dict()), tmp_path / "x.pt")
    state = read_state_dict(tmp_path / "x.pt")
    assert_same(state, net.state_dict())
    assert not any(isinstance(value, nn.Parameter) for value in state.values())


def test_a_prefix_that_is_not_uniform_stays(tmp_path):
    state = {"module.a": torch.ones(1), "b": torch.ones(1)}
    torch.save(state, tmp_path / "x.pt")
    assert list(read_state_dict(tmp_path / "x.pt")) == ["module.a", "b"]


def test_safetensors_round_trip(tmp_path, net):
    path = tmp_path / "x.safetensors"
    write_state_dict(path, net.state_dict(), {"mean": "0.5"})
    assert_same(read_state_dict(path), net.state_dict())
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata() == {"mean": "0.5"}
    assert os.listdir(tmp_path) == ["x.safetensors"]


def test_write_shared_sliced_and_strided_tensors(tmp_path):
    base = torch.arange(24.0).reshape(2, 3, 2, 2)
    state = {
        "base": base,
        "same": base,
        "slice": base[1:],
        "permuted": base.permute(1, 0, 3, 2),
        "channels_last": base.to(memory_format=torch.channels_last),
        "expanded": torch.ones(1).expand(3),
        "empty": torch.empty(0, 4),
        "scalar": torch.tensor(3, dtype=torch.int64),
        "half": torch.ones(2, dtype=torch.bfloat16),
        "parameter": nn.Parameter(torch.ones(2)),
    }
    write_state_dict(tmp_path / "x.safetensors", state)
    loaded = read_state_dict(tmp_path / "x.safetensors")
    assert set(loaded) == set(state)
    for key, value in state.items():
        assert torch.equal(loaded[key], value.detach()) and loaded[key].dtype == value.dtype, key


def test_write_refuses_what_it_cannot_hold(tmp_path):
    path = tmp_path / "x.safetensors"
    with pytest.raises(InvalidInputError, match="'a' must be a dense tensor, got int"):
        write_state_dict(path, {"a": 3})
    with pytest.raises(InvalidInputError, match="must be a dense tensor"):
        write_state_dict(path, {"a": torch.eye(2).to_sparse()})
    with pytest.raises(InvalidInputError, match="must map strings to strings, got 'epoch': 3"):
        write_state_dict(path, {"a": torch.ones(1)}, {"epoch": 3})
    assert not path.exists()


# Built by hand as well as by torch.save: what an attacker would send.
class Touch:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


class System:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def raw_pickle(obj, path, protocol=2):
    path.write_bytes(pickle.dumps(obj, protocol=protocol))


def legacy(obj, path):
    torch.save(obj, path, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize("attack", [Touch, System])
@pytest.mark.parametrize(
    "save",
    [
        torch.save,
        legacy,
        *(lambda obj, path, p=p: raw_pickle(obj, path, p) for p in range(pickle.HIGHEST_PROTOCOL + 1)),
    ],
)
def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(tmp_path, attack, save):
    proof, path = tmp_path / "executed", tmp_path / "x.pth"
    save({"state_dict": {"w": torch.ones(1)}, "extra": attack(proof)}, path)
    with pytest.raises(CheckpointError, match=r"asks for .*(touch|system|getattr).*could execute code.*re-save"):
        read_state_dict(path)
    assert not proof.exists()
    # The attack is real: the same bytes, read without protection, do run.
    if save is torch.save or save is legacy:
        torch.load(path, weights_only=False)
    else:
        pickle.loads(path.read_bytes())
    assert proof.exists()


def test_a_pickle_renamed_to_safetensors_does_not_run(tmp_path):
    proof, path = tmp_path / "executed", tmp_path / "x.safetensors"
    raw_pickle(System(proof), path)
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        read_state_dict(path)
    assert not proof.exists()


@pytest.mark.parametrize(
    ("make", "name"),
    [(lambda net: net, r"torch\.nn\."), (lambda net: {"args": Namespace(a=1)}, r"argparse\.Namespace")],
)
def test_pickled_objects_are_refused_by_name(tmp_path, net, make, name):
    torch.save(make(net), tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=f"asks for {name}"):
        read_state_dict(tmp_path / "x.pt")


def test_torchscript_is_refused(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and still found in the wild
        torch.jit.script(nn.Linear(1, 1)).save(tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="is a TorchScript archive, which carries code; re-save"):
        read_state_dict(tmp_path / "x.pt")


def test_missing_directory_empty_and_unknown(tmp_path):
    with pytest.raises(CheckpointError, match=r"no\.pt does not exist; check the path"):
        read_state_dict(tmp_path / "no.pt")
    (tmp_path / "dir.pt").mkdir()
    with pytest.raises(CheckpointError, match="is not a file"):
        read_state_dict(tmp_path / "dir.pt")
    for suffix in (".pt", ".safetensors"):
        (tmp_path / f"empty{suffix}").touch()
        with pytest.raises(CheckpointError, match="is empty; copy or download it again"):
            read_state_dict(tmp_path / f"empty{suffix}")
    (tmp_path / "x.onnx").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"must end in one of \.safetensors .*got '\.onnx'"):
        read_state_dict(tmp_path / "x.onnx")


@pytest.mark.parametrize("legacy", [False, True])
def test_every_truncation_is_a_checkpoint_error(tmp_path, net, legacy):
    whole = io.BytesIO()
    torch.save(net.state_dict(), whole, _use_new_zipfile_serialization=not legacy)
    data, path = whole.getvalue(), tmp_path / "x.pt"
    for size in [1, 2, 10, 30, 100, *range(200, len(data) - 1, max(1, len(data) // 23)), len(data) - 1]:
        path.write_bytes(data[:size])
        with pytest.raises(CheckpointError, match=r"x\.pt is not a file written by torch\.save, or is truncated"):
            read_state_dict(path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda b: b[:4],
        lambda b: b[: len(b) // 2],
        lambda b: b[:-1],
        lambda b: b + b"x",
        lambda b: struct.pack("<Q", 1 << 60) + b[8:],
        lambda b: b[:8] + b"\xff" + b[9:],
        lambda b: b"<html>not found</html>",
    ],
)
def test_damaged_safetensors(tmp_path, net, damage):
    path = tmp_path / "x.safetensors"
    write_state_dict(path, net.state_dict())
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CheckpointError, match=r"x\.safetensors is not a whole safetensors file .*download it again"):
        read_state_dict(path)


@pytest.mark.parametrize("data", [b"<html>not found</html>", b"version https://git-lfs\noid sha256:ab\n", bytes(100)])
def test_something_else_with_the_suffix(tmp_path, data):
    (tmp_path / "x.pt").write_bytes(data)
    with pytest.raises(CheckpointError, match="is not a file written by torch.save"):
        read_state_dict(tmp_path / "x.pt")


def test_a_foreign_zip(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(CheckpointError, match="is not a file written by torch.save"):
        read_state_dict(tmp_path / "x.pt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "holds no tensors"),
        ([torch.ones(1)], "holds a list, expected a state_dict"),
        (torch.ones(1), "holds a Tensor, expected a state_dict"),
        ({"a": torch.ones(1), "n": 3}, r"more than named dense tensors: 'n' \(int\)"),
        ({1: torch.ones(1)}, r"more than named dense tensors: 1 \(Tensor\)"),
        ({"a": torch.eye(2).to_sparse()}, "more than named dense tensors"),
    ],
)
def test_no_state_dict_inside(tmp_path, content, message):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=message):
        read_state_dict(tmp_path / "x.pt")


def test_load_weights(net):
    other = {key: torch.ones_like(value) for key, value in net.state_dict().items()}
    load_weights(net, other, "x.pt")
    assert_same(net.state_dict(), other)


def test_load_weights_allows_old_checkpoints_and_other_widths(net):
    state = {k: v.half() if v.is_floating_point() else v for k, v in net.state_dict().items()}
    del state["1.num_batches_tracked"]
    net[1].num_batches_tracked.fill_(7)
    load_weights(net, state, "x.pt")
    assert net[0].weight.dtype == torch.float32 and torch.equal(net[0].weight, state["0.weight"].float())
    assert net[1].num_batches_tracked == 7


def test_load_weights_lists_all_problems_and_changes_nothing(net):
    before = {key: value.clone() for key, value in net.state_dict().items()}
    state = {key: torch.zeros_like(value) for key, value in before.items()}
    del state["0.weight"]
    state["fc.bias"] = torch.ones(2)
    state["3.weight"] = torch.ones(5, 4)
    state["3.bias"] = torch.ones(2, dtype=torch.int8)
    with pytest.raises(CheckpointError) as caught:
        load_weights(net, state, "x.pt")
    text = str(caught.value)
    assert "weights from x.pt do not fit Sequential" in text
    assert "1 missing: 0.weight;" in text
    assert "1 unexpected: fc.bias;" in text
    assert (
        "2 mismatched: 3.weight is float32[5, 4], expected float32[2, 4], 3.bias is int8[2], expected float32[2]"
        in text
    )
    assert_same(net.state_dict(), before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("0.bias"), "1 missing: 0.bias;"),
        (lambda s: s.update(x=torch.ones(1)), "1 unexpected: x;"),
        (lambda s: s.update({"0.bias": torch.ones(5)}), "1 mismatched: 0.bias"),
        (lambda s: s.clear(), "8 missing"),
    ],
)
def test_load_weights_refuses_a_single_problem(net, change, message):
    state = {key: torch.zeros_like(value) for key, value in net.state_dict().items()}
    change(state)
    with pytest.raises(CheckpointError, match=message):
        load_weights(net, state, "x.pt")
    assert net[0].weight.abs().sum() > 0


def test_load_weights_shortens_long_lists():
    with pytest.raises(CheckpointError) as caught:
        load_weights(build_model("resnet20"), {"x": torch.ones(1)}, "x.pt")
    text = str(caught.value)
    assert "97 missing: conv1.weight" in text and "and 87 more" in text and "1 unexpected: x" in text
    assert "num_batches_tracked" not in text
