"""adadfq.models: the built-in networks, and building a network from a written specification."""

import copy
import sys
import textwrap
import types

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from adadfq.errors import CheckpointError, InvalidInputError
from adadfq.models import BUILTINS, build_model, is_trusted, model_spec, rebuild_model


@pytest.mark.parametrize(("name", "blocks", "millions"), [("resnet20", 3, 0.27), ("resnet56", 9, 0.85)])
def test_resnet_has_the_published_keys_and_size(name, blocks, millions):
    model = build_model(name, num_classes=10)
    modules = {"conv1", "bn1", "linear"} | {
        f"layer{stage}.{i}.{part}"
        for stage in (1, 2, 3)
        for i in range(blocks)
        for part in ("conv1", "bn1", "conv2", "bn2")
    }
    assert {key.rpartition(".")[0] for key in model.state_dict()} == modules
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == millions


def test_resnet_computes_what_its_description_says():
    """The network written out a second time, straight from the state_dict, in float64."""
    torch.manual_seed(0)
    model = build_model("resnet20", num_classes=7).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -1, 1)
            nn.init.uniform_(module.running_var, 0.5, 2)
    model.eval()
    state = model.state_dict()

    def norm(x, name):
        return F.batch_norm(
            x, *(state[f"{name}.{key}"] for key in ("running_mean", "running_var", "weight", "bias")), eps=1e-5
        )

    x = images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    x = norm(F.conv2d(x, state["conv1.weight"], padding=1), "bn1").relu()
    for stage, planes in ((1, 16), (2, 32), (3, 64)):
        for i in range(3):
            stride = 2 if stage > 1 and i == 0 else 1
            block = f"layer{stage}.{i}"
            out = norm(F.conv2d(x, state[f"{block}.conv1.weight"], stride=stride, padding=1), f"{block}.bn1").relu()
            out = norm(F.conv2d(out, state[f"{block}.conv2.weight"], padding=1), f"{block}.bn2")
            if stride == 2:
                shortcut = torch.zeros_like(out)
                shortcut[:, planes // 4 : planes // 4 + planes // 2] = x[:, :, ::2, ::2]
                x = shortcut
            x = (out + x).relu()
    assert x.shape == (2, 64, 8, 8)
    expected = F.linear(x.mean(dim=(2, 3)), state["linear.weight"], state["linear.bias"])
    with torch.no_grad():
        torch.testing.assert_close(model(images), expected)


@pytest.mark.parametrize("name", sorted(BUILTINS))
def test_builtins_trace_with_fx(name):
    model = build_model(name).eval()
    traced = torch.fx.symbolic_trace(model)
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(traced(x), model(x))


@pytest.mark.parametrize("value", [0, -1, 2.5, True])
def test_resnet_refuses_a_bad_class_count(value):
    with pytest.raises(InvalidInputError, match="num_classes must be a positive integer"):
        build_model("resnet20", num_classes=value)


def test_specification_is_recorded_and_rebuilds():
    model = build_model("resnet20", num_classes=4)
    assert model_spec(model) == {"spec": "resnet20", "kwargs": {"num_classes": 4}}
    assert model_spec(copy.deepcopy(model)) == model_spec(model)
    again = rebuild_model(model_spec(model))
    assert again.linear.out_features == 4 and model_spec(again) == model_spec(model)
    assert model_spec(nn.Linear(1, 1)) is None


def write_module(path, text):
    path.write_text(textwrap.dedent(text))
    return path


SMALL = """
    from dataclasses import dataclass
    from torch import nn
    import neighbour

    @dataclass
    class Settings:
        width: int = neighbour.WIDTH

    class Net(nn.Module):
        def __init__(self, shape=(1, 2)):
            super().__init__()
            self.shape = shape
            self.fc = nn.Linear(Settings().width, 3)

    def tuple_of(n):
        return (n,)

    def broken():
        raise RuntimeError("no luck")

    number = 3
    """


@pytest.fixture
def small(tmp_path):
    write_module(tmp_path / "neighbour.py", "WIDTH = 5")
    yield write_module(tmp_path / "small.py", SMALL)
    sys.modules.pop("neighbour", None)


def test_model_from_a_file(small):
    path = list(sys.path)
    model = build_model(f"{small}:Net", shape=(3, 4))
    assert model.fc.in_features == 5
    assert model.shape == [3, 4]  # as it will be when rebuilt from JSON
    assert sys.path == path


@pytest.mark.parametrize(
    ("spec", "kwargs", "message"),
    [
        ("resnet19", {}, r"model must be a built-in \(resnet20, .*\), .* got 'resnet19'; did you mean resnet"),
        ("", {}, "got ''"),
        (":Net", {}, "got ':Net'"),
        (3, {}, "got 3"),
        (
            "no_such_package.models:net",
            {},
            r"module 'no_such_package' is not installed.*no_such_package/models\.py:net",
        ),
        ("adadfq.models.no_such:net", {}, r"module 'adadfq.models.no_such' is not installed"),
        ("adadfq.models:resnet21", {}, r"adadfq.models has no 'resnet21'; close: resnet"),
        ("adadfq.models:build.nn", {}, r"must be one plain name, got 'build.nn'"),
        ("adadfq..models:resnet20", {}, "neither a module path nor a .py file"),
        ("resnet20", {"classes": 10}, r"takes \(num_classes: 'int' = 10\).*unexpected keyword argument 'classes'"),
        ("resnet20", {"num_classes": object()}, "must be JSON values"),
        ("resnet20", {"num_classes": float("nan")}, "must be JSON values"),
        ("{small}:tuple_of", {"n": 1}, "must return a torch.nn.Module, got tuple"),
        ("{small}:broken", {}, "raised RuntimeError: no luck"),
        ("{small}:number", {}, "must be a function or class that returns the network, got int"),
        ("{small}:Nett", {}, "has no 'Nett'; close: Net"),
        ("{small}.txt:Net", {}, r"must be an existing \.py file"),
        ("no/such/file.py:Net", {}, r"must be an existing \.py file"),
    ],
)
def test_bad_specification_is_refused(small, spec, kwargs, message):
    spec = spec.format(small=small) if isinstance(spec, str) else spec
    with pytest.raises(InvalidInputError, match=message):
        build_model(spec, **kwargs)


def test_a_file_that_raises_is_refused_and_forgotten(tmp_path):
    before = set(sys.modules)
    write_module(tmp_path / "bad.py", "import no_such_thing_at_all")
    with pytest.raises(InvalidInputError, match="importing .*bad.py raised ModuleNotFoundError"):
        build_model(f"{tmp_path}/bad.py:Net")
    assert set(sys.modules) == before


@pytest.mark.parametrize(
    ("spec", "trusted"),
    [
        ("resnet20", True),
        ("adadfq.models:resnet20", True),
        ("torchvision.models:resnet18", True),
        ("torchvision.models.resnet:resnet18", True),
        ("pytorchcv.model_provider:resnet20_cifar10", True),
        ("timm:create_model", True),
        ("timm.models:resnet18", True),
        ("torchvision.models:resnet18.os", False),
        ("torchvision.models:", False),
        ("torchvision.modelsx:resnet18", False),
        ("torchvision:models", False),
        ("torchvision.models/../evil.py:Net", False),
        ("torchvision.models.py:Net", False),
        ("os:system", False),
        ("my_net.py:Net", False),
        ("./resnet20:Net", False),
        ("resnet21", False),
    ],
)
def test_is_trusted(spec, trusted):
    assert is_trusted(spec) is trusted


@pytest.mark.parametrize(
    ("kwargs", "trusted"),
    [
        ({"num_classes": 10, "pretrained": False, "widths": [1, [2.5, None]]}, True),
        ({"model_name": "resnet18.a1_in1k"}, True),
        ({"model_name": "hf-hub:someone/model"}, False),
        ({"model_name": "local-dir:/tmp/x"}, False),
        ({"checkpoint_path": "x.pth"}, False),
        ({"pretrained_cfg": {"url": 1}}, False),
        ({"widths": ["x"]}, False),
    ],
)
def test_arguments_that_name_files_or_addresses_are_not_trusted(kwargs, trusted):
    assert is_trusted("timm:create_model", kwargs) is trusted


@pytest.mark.parametrize(
    "spec", ["adadfq.models.build:json", "adadfq.models.build:Path", "adadfq.models.build:nn", "adadfq.files:hashlib"]
)
def test_what_a_trusted_module_imported_is_refused(spec):
    with pytest.raises(InvalidInputError, match="must be a function or class|is defined in"):
        build_model(spec)


def test_functions_of_adadfq_that_are_no_networks_are_not_run(tmp_path):
    target = tmp_path / "made"
    with pytest.raises(InvalidInputError, match="is not a network"):
        build_model("adadfq.files:new_directory", path=str(target))
    assert not target.exists()


def test_rebuilding_unknown_code_needs_consent(small):
    record = {"spec": f"{small}:Net", "kwargs": {}}
    with pytest.raises(CheckpointError, match=r"run\.json asks to run the model code .*trust_model_code=True"):
        rebuild_model(record, source="run.json")
    assert rebuild_model(record, trust_model_code=True).fc.in_features == 5


@pytest.mark.parametrize("record", [None, {}, {"spec": "resnet20"}, {"spec": 1, "kwargs": {}}])
def test_rebuilding_refuses_a_damaged_record(record):
    with pytest.raises(CheckpointError, match="records the model as"):
        rebuild_model(record)


def test_rebuilding_switches_a_packages_own_weights_off(monkeypatch):
    """A stand-in for timm: rebuilding must neither download nor need consent for the weights switch."""
    calls = []

    def create(pretrained=False, weights=None, num_classes=10):
        calls.append((pretrained, weights))
        return nn.Linear(1, num_classes)

    create.__module__ = "timm.models.fake"
    package, module = types.ModuleType("timm"), types.ModuleType("timm.models")
    module.create = create
    monkeypatch.setitem(sys.modules, "timm", package)
    monkeypatch.setitem(sys.modules, "timm.models", module)
    model = build_model("timm.models:create", pretrained=True, weights="DEFAULT")
    again = rebuild_model(model_spec(model))
    assert calls == [(True, "DEFAULT"), (False, None)]
    assert model_spec(again) == model_spec(model)


@pytest.mark.usefixtures("torchvision_models")
def test_torchvision_model():
    model = build_model("torchvision.models:resnet18", num_classes=5)
    assert model.fc.out_features == 5
    with pytest.raises(InvalidInputError, match=r"is defined in torch\.hub, expected torchvision\.models"):
        build_model("torchvision.models._api:load_state_dict_from_url")
    with pytest.raises(InvalidInputError, match="must be a function or class that returns the network, got module"):
        build_model("torchvision.models.resnet:nn")


def test_pytorchcv_model():
    pytest.importorskip("pytorchcv")
    assert build_model("pytorchcv.model_provider:resnet20_cifar10", num_classes=10)(
        torch.zeros(1, 3, 32, 32)
    ).shape == (
        1,
        10,
    )
