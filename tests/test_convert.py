"""quantize(): what is converted, what is left, and that nothing is left silently."""

from __future__ import annotations

import copy
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import adadfq
from adadfq.convert import module_bits, set_module_bits
from adadfq.nn import QuantAct, QuantConv2d, QuantLinear, QuantWeight, set_calibrating


class Net(nn.Module):
    """Every form of ReLU, a shared ReLU module, a tied layer, an unused branch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.relu6 = nn.ReLU6()
        self.aux = nn.Linear(4, 2)
        self.linear = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu6(self.conv2(x)) + x
        x = F.relu(self.conv2(x), inplace=True)
        x = self.relu(x - 1).relu()
        x = torch.relu(x)
        F.relu_(x)
        if self.training:
            x = x + self.aux(x.mean((2, 3)))[:, :1, None, None]
        return self.linear(F.relu6(x).mean((2, 3)))


def _net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def test_every_layer_and_activation_is_converted_and_the_original_is_not() -> None:
    net = _net()
    before = copy.deepcopy(net.state_dict())
    student = adadfq.quantize(net, weight_bits=3, act_bits=5)
    assert isinstance(student.conv1, QuantConv2d) and isinstance(student.linear, QuantLinear)
    acts = [m for m in student.modules() if isinstance(m, QuantAct)]
    assert len(acts) == 8 and {a.act_bits for a in acts} == {5}
    with torch.no_grad():
        for p in student.parameters():
            p.zero_()
    assert type(net.conv1) is nn.Conv2d
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_every_activation_call_has_a_range_of_its_own() -> None:
    student = adadfq.quantize(_net(), 8, 8)
    student(torch.randn(2, 3, 6, 6))
    ranges = [round(float(act.running_max), 4) for act in student.act_quant.children()]
    assert all(int(act.num_batches) == 1 for act in student.act_quant.children())
    assert len(set(ranges)) >= 3


def test_eight_bits_stay_close_to_float() -> None:
    net, x = _net(), torch.randn(4, 3, 6, 6)
    student = adadfq.quantize(net, 8, 8)
    student(x)
    set_calibrating(student, False)
    torch.testing.assert_close(student(x), net(x), atol=0.02, rtol=0.05)


def test_an_inplace_activation_whose_result_is_dropped_is_quantised_for_its_readers() -> None:
    class Inplace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.linear(x)
            F.relu_(x)
            return x

    student = adadfq.quantize(Inplace().eval(), 8, 2)
    out = student(torch.randn(64, 4))
    assert len(out.unique()) <= 4


def test_state_dict_keys_of_the_float_model_are_kept() -> None:
    net = _net()
    student = adadfq.quantize(net)
    keys = {k for k in net.state_dict() if not k.startswith("aux")}
    assert keys == {k for k in student.state_dict() if not k.startswith("act_quant")}
    for key in keys:
        assert torch.equal(student.state_dict()[key], net.state_dict()[key])


def test_report_names_everything() -> None:
    report = adadfq.report(adadfq.quantize(_net(), 3, 5))
    quantised = [(r.kind, r.bits) for r in report.rows if r.bits]
    assert quantised.count(("Conv2d", 3)) == 2 and ("Linear", 3) in quantised
    assert sum(bits == 5 for _, bits in quantised) == 8
    (left,) = report.left_in_float
    assert left.where == "aux" and "not reached" in left.reason
    assert "1 left in float" in str(report) and report.to_dict()["method"] == "torch.fx"


def test_what_is_left_in_float_is_listed_with_a_reason() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)
            self.up = nn.ConvTranspose2d(4, 4, 2)
            self.act = nn.SiLU()
            self.norm = nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(self.act(self.up(self.conv(x))))
            x = F.gelu(x).sigmoid().clamp_min(0).mean((2, 3))
            return torch.addmm(x, x, torch.maximum(x[:4, :4], x[:4, :4]))

    with pytest.warns(UserWarning, match="has no ReLU or ReLU6"):
        student = adadfq.quantize(Mixed())
    left = {r.kind: r.reason for r in adadfq.report(student).left_in_float}
    assert set(left) == {"ConvTranspose2d", "SiLU", "gelu", "sigmoid", "clamp_min", "addmm", "maximum"}
    assert all(left.values())


class InplaceThroughAnAlias(nn.Module):
    """Reads what an in-place ReLU wrote under another name."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.linear, self.dropout = nn.Linear(4, 4), nn.Dropout()

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        if self.form == "dropout":
            F.relu_(self.dropout(x))
        elif self.form == "view":
            torch.relu_(x.view(-1))
        else:
            y = x.flatten(1)
            x.relu_()
            return y
        return x


@pytest.mark.parametrize("form", ["dropout", "view", "flatten"])
def test_an_alias_of_an_inplace_activation_is_reported(form: str) -> None:
    (row,) = adadfq.report(adadfq.quantize(InplaceThroughAnAlias(form).eval())).left_in_float
    assert "under another name" in row.reason


def test_inner_modules_of_an_unconverted_one_are_reported() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.mix = nn.Linear(4, 4), nn.MultiheadAttention(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.mix(x, self.linear(x), x)[0])

    report = adadfq.report(adadfq.quantize(Attention()))
    assert {r.where for r in report.left_in_float} == {"mix", "mix.out_proj"}


def test_hooks_that_the_copy_would_lose() -> None:
    net = _net()
    watching = net.linear.register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match="forward hooks of linear are absent from the copy"):
        adadfq.quantize(net)
    watching.remove()
    net.bn1.register_forward_hook(lambda *_: None)
    adadfq.quantize(net)
    torch.nn.utils.spectral_norm(net.linear)
    with pytest.raises(adadfq.InvalidInputError, match="linear has a forward pre-hook"):
        adadfq.quantize(net)


def test_a_buffer_may_hold_infinity() -> None:
    net = _net()
    net.register_buffer("mask", torch.tensor([0.0, -float("inf")]))
    adadfq.quantize(net)
    net.bn1.running_var[0] = float("inf")
    with pytest.raises(adadfq.InvalidInputError, match=r"NaN or infinity in bn1\.running_var"):
        adadfq.quantize(net)


def test_bits_of_a_calibrated_quantiser_can_be_changed() -> None:
    student = adadfq.quantize(_net(), 8, 8)
    student(torch.randn(2, 3, 6, 6))
    act = student.get_submodule("act_quant.0")
    set_module_bits(student, {"act_quant.0": 3})
    assert act.act_bits == 3
    torch.testing.assert_close(act.scale, act.running_max / 7)
    student.linear = nn.Linear(4, 5)
    assert ["replaced" in r.reason for r in adadfq.report(student).rows if r.where == "linear"] == [True]


def test_a_subclass_of_conv_with_a_forward_of_its_own_is_quantised_through_its_call() -> None:
    class SamePadConv(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(F.pad(x, (1, 1, 1, 1)), self.weight, self.bias, self.stride)

    net = nn.Sequential(SamePadConv(3, 4, 3), nn.ReLU()).eval()
    student = adadfq.quantize(net, 2, 8)
    assert [type(m) for m in student.weight_quant.children()] == [QuantWeight]
    assert "0.weight" in student.state_dict()
    x = torch.randn(1, 3, 5, 5)
    float_copy = copy.deepcopy(net)
    with torch.no_grad():
        float_copy[0].weight.copy_(adadfq.functional.dynamic_fake_quantize(net[0].weight, 2)[0])
    with torch.no_grad():
        torch.testing.assert_close(student(x), float_copy(x), atol=0.02, rtol=0)
    assert adadfq.report(student).left_in_float == []


class Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.relu = nn.ReLU()
        self.linear = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            x = x + 1
        return self.linear(F.relu(self.relu(self.conv(x))).mean((2, 3)))


def test_an_untraceable_model_has_its_modules_swapped_and_says_so() -> None:
    with pytest.warns(UserWarning, match="cannot be traced by torch.fx"):
        student = adadfq.quantize(Untraceable())
    assert isinstance(student.conv, QuantConv2d) and isinstance(student.relu[1], QuantAct)
    report = adadfq.report(student)
    assert report.method == "module swap" and "not traceable" in report.left_in_float[0].reason
    student(torch.randn(2, 3, 6, 6))


@pytest.mark.filterwarnings("ignore:.*cannot be traced")
@pytest.mark.parametrize("make", [_net, lambda: Untraceable().eval()])
def test_a_copy_of_the_student_keeps_its_record(make) -> None:  # type: ignore[no-untyped-def]
    student = adadfq.quantize(make(), 3, 4)
    twin = copy.deepcopy(student)
    assert adadfq.report(twin).to_dict() == adadfq.report(student).to_dict()
    set_module_bits(twin, {"linear": 8})
    assert module_bits(twin)["linear"] == 8 and module_bits(student)["linear"] == 3
    assert [r.bits for r in adadfq.report(twin).rows if r.where == "linear"] == [8]


def test_tied_weights_stay_tied() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    net[2].weight = net[0].weight
    student = adadfq.quantize(net)
    assert student.get_submodule("0").weight is student.get_submodule("2").weight
    assert student.get_submodule("0").weight is not net[0].weight


@pytest.mark.filterwarnings("ignore:.*no ReLU")
def test_a_layer_alone_can_be_quantised() -> None:
    student = adadfq.quantize(nn.Conv2d(3, 4, 3), 2, 2)
    assert [r.bits for r in adadfq.report(student).rows] == [2]
    student(torch.randn(1, 3, 5, 5))


def test_mode_is_kept() -> None:
    assert adadfq.quantize(_net()).training is False
    assert adadfq.quantize(_net().train()).training is True


def test_report_of_modules_placed_by_hand() -> None:
    model = nn.Sequential(QuantConv2d(3, 4, 1, weight_bits=5), nn.ReLU(), nn.Conv2d(4, 4, 1))
    rows = {r.where: (r.bits, r.reason) for r in adadfq.report(model).rows}
    assert rows == {
        "0": (5, ""),
        "1": (None, "quantised only where a QuantAct follows it"),
        "2": (None, "a float layer; QuantConv2d takes its place"),
    }


def test_bad_models_are_refused() -> None:
    def with_value(value: float) -> nn.Module:
        net = _net()
        with torch.no_grad():
            net.conv2.weight[0, 0, 0, 0] = value
        return net

    for value in (float("nan"), float("inf")):
        with pytest.raises(adadfq.InvalidInputError, match=r"NaN or infinity in conv2\.weight"):
            adadfq.quantize(with_value(value))
    with pytest.raises(adadfq.InvalidInputError, match="already quantised"):
        adadfq.quantize(adadfq.quantize(_net()))
    with pytest.raises(adadfq.InvalidInputError, match="no Conv2d or Linear"):
        adadfq.quantize(nn.ReLU())
    with pytest.raises(adadfq.InvalidInputError, match="not initialised"):
        adadfq.quantize(nn.LazyConv2d(3, 3))
    with pytest.raises(adadfq.InvalidInputError, match=r"model must be a torch\.nn\.Module, got str"):
        adadfq.quantize("resnet20")  # type: ignore[arg-type]
    with pytest.raises(adadfq.InvalidInputError, match=r"weight_bits must be 2\.\.8, got 1"):
        adadfq.quantize(_net(), weight_bits=1)
    with pytest.raises(adadfq.InvalidInputError, match=r"act_bits must be 2\.\.8, got 16"):
        adadfq.quantize(_net(), act_bits=16)


@pytest.mark.parametrize("name,layers,acts", [("resnet18", 21, 17), ("mobilenet_v2", 53, 35), ("vgg11_bn", 11, 10)])
def test_torchvision_networks_are_converted_whole(
    torchvision_models: ModuleType, name: str, layers: int, acts: int
) -> None:
    net = getattr(torchvision_models, name)(weights=None).eval()
    student = adadfq.quantize(net, 4, 4)
    report = adadfq.report(student)
    assert report.left_in_float == [] and report.method == "torch.fx"
    kinds = [type(m) for m in student.modules()]
    assert kinds.count(QuantConv2d) + kinds.count(QuantLinear) == layers and kinds.count(QuantAct) == acts
    assert student(torch.randn(1, 3, 64, 64)).shape == (1, 1000)


@pytest.mark.parametrize("operation", ["add", "sub", "mul", "truediv"])
def test_operations_in_place_stay_in_place(operation: str) -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            alias = y.view(-1)
            if operation == "add":
                alias += 1
            elif operation == "sub":
                alias -= 1
            elif operation == "mul":
                alias *= 2
            else:
                alias /= 2
            return F.relu(y)

    torch.manual_seed(0)
    net = InPlace().eval()
    x = torch.randn(2, 3, 4, 4)
    student = adadfq.quantize(net, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(student(x), net(x), rtol=0.05, atol=0.05)
