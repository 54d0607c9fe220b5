"""fuse(): the same function and gradients on the same tensors, in fewer calls; what cannot be fused stays as it is."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from toy import ToyNet, toy_teacher

import adadfq
from adadfq.fused_layers import BatchNormWatch
from adadfq.game import BatchNormMatch
from adadfq.nn import set_calibrating


class Patterns(nn.Module):
    """BatchNorm with everything that may follow it."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(9))
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(10))
        self.relu, self.relu6 = nn.ReLU(inplace=True), nn.ReLU6(inplace=True)
        self.linear = nn.Linear(4, 5)
        self.norm1d = nn.BatchNorm1d(5)
        self.unreached = nn.Conv2d(4, 2, 1)
        for norm in [*self.norms, self.norm1d]:
            nn.init.normal_(norm.running_mean)
            nn.init.uniform_(norm.running_var, 0.5, 2)
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias)

    def forward(self, x: Tensor) -> Tensor:
        c, n = self.convs, self.norms
        x = x.repeat(1, 2, 1, 1)[:, :4]
        x = self.relu(n[0](c[0](x)))  # plain
        x = F.relu(n[1](c[1](x)) + x)  # residual second
        x = torch.relu(x + n[2](c[2](x)))  # residual first
        x = self.relu(n[3](c[3](x)) + n[4](x))  # of two norms
        x = n[5](c[4](x))  # linear bottleneck
        x = self.relu6(n[6](c[5](x)))
        y = n[7](c[6](x))
        y += x  # in place on the norm's result
        y = y.relu_()
        z = n[8](c[7](y))
        y = F.relu6(z) + z.mean()  # the norm's result is read twice
        y = y + n[9](c[8](y)) * 2  # not a plain sum
        x = F.relu(n[9](y))  # a norm called twice
        return self.norm1d(self.linear(x.mean((2, 3))))


def _student(model: nn.Module, shape: tuple[int, ...], bits: int = 4, dtype: torch.dtype = torch.float64) -> nn.Module:
    student = adadfq.quantize(model.to(dtype).eval(), bits, bits)
    student(torch.randn(shape, dtype=dtype))
    set_calibrating(student, False)
    return student


def _gradients(model: nn.Module, x: Tensor, seed: Tensor) -> list[Tensor]:
    x = x.detach().clone().requires_grad_()
    parameters = [p for p in model.parameters() if p.requires_grad]
    got = torch.autograd.grad(model(x), [x, *parameters], seed, allow_unused=True)
    names = ["x", *(n for n, p in model.named_parameters() if p.requires_grad)]
    return [g for _, g in sorted(zip(names, got, strict=True), key=lambda item: item[0]) if g is not None]


def _calls(model: fx.GraphModule) -> Counter[str]:
    return Counter(n.target.__name__ for n in model.graph.nodes if n.op == "call_function")


@pytest.fixture
def patterns() -> Patterns:
    torch.manual_seed(0)
    return Patterns().eval()


def test_a_fused_student_computes_the_same(patterns: Patterns) -> None:
    student = _student(patterns, (6, 4, 8, 8))
    fused = adadfq.fuse(student)
    x, seed = torch.randn(6, 4, 8, 8, dtype=torch.float64), torch.randn(6, 5, dtype=torch.float64)
    torch.testing.assert_close(fused(x), student(x), rtol=1e-12, atol=1e-12)
    for got, want in zip(_gradients(fused, x, seed), _gradients(student, x, seed), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)
    calls = _calls(fused)
    assert calls["batch_norm_act_quantize"] == 12 and calls["quantized_layer"] == 10
    assert calls["fold_batch_norms"] == calls["quantize_weights"] == 1
    # Left: the norm whose result is read twice has its activation outside, and so has a product.
    assert [n.op for n in fused.graph.nodes if n.op == "call_module"] == ["call_module"]


def test_a_fused_teacher_computes_the_same_and_its_statistics_losses(patterns: Patterns) -> None:
    teacher = patterns.double().requires_grad_(False)
    fused = adadfq.fuse(teacher)
    x, seed = torch.randn(6, 4, 8, 8, dtype=torch.float64), torch.randn(6, 5, dtype=torch.float64)
    torch.testing.assert_close(fused(x), teacher(x), rtol=1e-12, atol=1e-12)
    results = []
    for model in (fused, teacher):
        images = x.clone().requires_grad_()
        match = BatchNormMatch(model)
        with match.watching():
            logits = model(images)
        loss = match.loss()
        total = loss + (logits * seed).sum()
        results.append((logits, loss, torch.autograd.grad(total, images)[0]))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    assert _calls(fused)["watched_batch_norm"] == 12
    assert all(m.losses is None for m in fused.modules() if isinstance(m, BatchNormWatch))


def test_a_fused_student_calibrates_as_its_modules_do(patterns: Patterns) -> None:
    student = adadfq.quantize(patterns, 4, 4)
    twin = copy.deepcopy(student)
    fused = adadfq.fuse(student)
    for _ in range(3):
        x = torch.randn(4, 4, 8, 8)
        torch.testing.assert_close(fused(x), twin(x), rtol=1e-4, atol=1e-4)
    for name, state in twin.state_dict().items():
        torch.testing.assert_close(student.state_dict()[name], state, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("quantized", [False, True])
def test_everything_is_shared_and_fusing_can_be_undone(patterns: Patterns, quantized: bool) -> None:
    model = adadfq.quantize(patterns, 4, 4) if quantized else patterns
    fused = adadfq.fuse(model)
    assert set(fused.state_dict()) == set(model.state_dict())
    ours, theirs = dict(model.named_parameters()), dict(fused.named_parameters())
    assert set(ours) == set(theirs) and all(ours[name] is theirs[name] for name in ours)
    assert adadfq.unfuse(fused) is model
    with pytest.raises(adadfq.InvalidInputError, match="model is already fused"):
        adadfq.fuse(fused)
    with pytest.raises(adadfq.InvalidInputError, match=r"must come from adadfq.fuse\(\), got Patterns"):
        adadfq.unfuse(patterns)
    copied = copy.deepcopy(fused)
    x = torch.randn(2, 4, 8, 8)
    assert torch.equal(copied(x), fused(x))
    with torch.no_grad():
        next(copied.parameters()).add_(1)
    assert not torch.equal(copied(x), fused(x))
    if not quantized:
        assert torch.allclose(adadfq.unfuse(copied)(x), copied(x), atol=1e-5)


def test_loaded_weights_and_changed_bits_take_effect(patterns: Patterns) -> None:
    student = _student(patterns, (4, 4, 8, 8))
    fused = adadfq.fuse(student)
    other = _student(Patterns(), (4, 4, 8, 8))
    fused.load_state_dict(other.state_dict())
    adadfq.convert.set_module_bits(student, {name: 6 for name in adadfq.convert.module_bits(student)})
    x = torch.randn(4, 4, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(fused(x), student(x), rtol=1e-10, atol=1e-10)
    assert not torch.allclose(fused(x), other(x))


def test_in_train_mode_the_modules_run_one_by_one(patterns: Patterns) -> None:
    for model in (adadfq.quantize(patterns, 4, 4), copy.deepcopy(patterns)):
        twin = copy.deepcopy(model).train()
        fused = adadfq.fuse(model).train()
        x = torch.randn(4, 4, 8, 8)
        torch.testing.assert_close(fused(x), twin(x), rtol=1e-5, atol=1e-5)
        for name, state in twin.state_dict().items():
            torch.testing.assert_close(model.state_dict()[name], state, rtol=1e-4, atol=1e-5)


def test_modules_with_hooks_stay(patterns: Patterns) -> None:
    student = _student(patterns, (4, 4, 8, 8))
    seen: list[str] = []
    for name in ("norms.0", "convs.1", "act_quant.2"):
        student.get_submodule(name).register_forward_hook(lambda *_, name=name: seen.append(name))
    fused = adadfq.fuse(student)
    x = torch.randn(4, 4, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(fused(x), student(x), rtol=1e-10, atol=1e-10)
    assert sorted(seen) == sorted(["norms.0", "convs.1", "act_quant.2"] * 2)


class _Writes(nn.Module):
    """Writes into tensors that a fused tail would read later, or under another name."""

    def __init__(self, case: str) -> None:
        super().__init__()
        self.case = case
        self.conv, self.norm, self.norm2 = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.identity = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm2(self.conv(x)) + 0.5
        y = self.norm(x)
        if self.case == "into the residual":
            x += y
            return torch.relu(x) + x
        if self.case == "into an alias":
            alias = self.identity(x)
            alias += y
            return torch.relu(alias) + x
        if self.case == "into a view":
            view = x.view(x.shape)
            view += y
            return torch.relu(view) + x
        if self.case == "activation of the residual":
            x = F.relu_(x)
            return torch.relu(y + x)
        if self.case == "before the activation":
            x.mul_(0.5)
            return torch.relu(y) + x
        total = y + x
        x.add_(1)
        return torch.relu(total) + x


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize(
    "case",
    [
        "into the residual",
        "into an alias",
        "into a view",
        "activation of the residual",
        "before the activation",
        "after the sum",
    ],
)
def test_writes_in_place_are_seen_when_they_happen(case: str, quantized: bool) -> None:
    torch.manual_seed(0)
    model = _Writes(case).eval()
    x = torch.randn(2, 3, 4, 4)
    if quantized:
        model = _student(model, (2, 3, 4, 4), dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(adadfq.fuse(model)(x), model(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("where", ["", "block", "block.0"])
def test_hooks_that_would_be_lost_are_refused(where: str) -> None:
    model = nn.Sequential()
    model.add_module("block", nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()))
    seen: list[int] = []
    model.eval().get_submodule(where).register_forward_pre_hook(lambda *_: seen.append(1))
    if where == "block.0":  # a layer, which stays
        adadfq.fuse(model)(torch.randn(1, 3, 8, 8))
        assert seen
        return
    with pytest.raises(adadfq.InvalidInputError, match=f"{where or 'Sequential'} has hooks, which the fused network"):
        adadfq.fuse(model)


def test_tensors_of_blocks_are_shared_too(tmp_path: Path) -> None:
    class Scaled(ToyNet):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.rand(3, 1, 1), persistent=False)
            self.register_buffer("unread", torch.rand(3))
            self.gain = nn.Parameter(torch.ones(1))
            self.shift = torch.rand(1)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward((x - self.mean) * self.gain + self.shift)

    model = Scaled().eval()
    fused = adadfq.fuse(model)
    assert set(fused.state_dict()) == set(model.state_dict())
    ours = dict(model.named_buffers())
    assert {name: id(b) for name, b in fused.named_buffers()} == {name: id(b) for name, b in ours.items()}
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(fused(x), model(x))
    with pytest.raises(adadfq.InvalidInputError, match=r"cannot be saved: save adadfq.unfuse\(model\)"):
        torch.save(fused, tmp_path / "fused.pt")


def test_a_norm_without_bias_stays_and_half_models_fold_in_float32() -> None:
    torch.manual_seed(0)
    teacher = toy_teacher()
    teacher.bn1.bias = None
    student = _student(copy.deepcopy(teacher), (4, 3, 8, 8))
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(adadfq.fuse(student)(x), student(x), rtol=1e-10, atol=1e-10)
    half = _student(toy_teacher(), (4, 3, 8, 8), bits=8, dtype=torch.float32)
    want = half(x.float())
    half.bfloat16()
    got = adadfq.fuse(half)(x.bfloat16())
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), want, rtol=0.1, atol=0.05)


@pytest.mark.parametrize("shaped", [False, True])
def test_logits_are_float32_under_autocast(shaped: bool) -> None:
    class Shaped(ToyNet):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).unflatten(1, (10, 1)).flatten(1) if not shaped else super().forward(x).flatten(1)

    torch.manual_seed(0)
    model = Shaped().eval()
    student = _student(copy.deepcopy(model), (4, 3, 8, 8), dtype=torch.float32)
    for network in (adadfq.fuse(model), adadfq.fuse(student)):
        with torch.autocast("cpu", torch.bfloat16):
            assert network(torch.randn(4, 3, 8, 8)).dtype == (torch.float32 if shaped else torch.bfloat16)


def test_what_cannot_be_fused_is_refused_and_unchanged() -> None:
    class Branching(ToyNet):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x if x.sum() > 0 else -x)

    net = Branching().train()
    with pytest.raises(adadfq.InvalidInputError, match="Branching cannot be traced by torch.fx"):
        adadfq.fuse(net)
    assert net.training and net.bn1.training
    with pytest.raises(adadfq.InvalidInputError, match="must be a torch.nn.Module, got int"):
        adadfq.fuse(3)  # type: ignore[arg-type]
    clash = toy_teacher()
    clash.batch_norm_watch = nn.Identity()
    with pytest.raises(adadfq.InvalidInputError, match="has an attribute 'batch_norm_watch'"):
        adadfq.fuse(clash)
    assert isinstance(adadfq.fuse(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())), fx.GraphModule)


@pytest.mark.parametrize("name,norms,layers", [("resnet18", 20, 21), ("resnet50", 53, 54), ("mobilenet_v2", 52, 53)])
def test_torchvision_networks_are_fused_whole(
    torchvision_models: ModuleType, name: str, norms: int, layers: int
) -> None:
    torch.manual_seed(0)
    teacher = getattr(torchvision_models, name)(weights=None).eval()
    shape = (2, 3, 64, 64)
    student = _student(copy.deepcopy(teacher), shape, bits=8)
    fused = adadfq.fuse(student)
    calls = _calls(fused)
    assert calls["batch_norm_act_quantize"] == norms and calls["quantized_layer"] == layers
    left = {type(fused.get_submodule(str(n.target))) for n in fused.graph.nodes if n.op == "call_module"}
    assert left <= {nn.MaxPool2d, nn.AdaptiveAvgPool2d, nn.Dropout}
    assert _calls(adadfq.fuse(teacher))["watched_batch_norm"] == norms
    x = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(fused(x), student(x), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(adadfq.fuse(teacher)(x.float()), teacher(x.float()), rtol=1e-3, atol=1e-4)


def test_fused_networks_compile_without_a_graph_break() -> None:
    torch.manual_seed(0)
    teacher = toy_teacher().requires_grad_(False)
    student = _student(copy.deepcopy(teacher).requires_grad_(True), (4, 3, 8, 8), dtype=torch.float32)
    x = torch.randn(4, 3, 8, 8)
    fused = adadfq.fuse(student)
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    seed = torch.randn(4, 10)
    for got, want in zip(_gradients(compiled, x, seed), _gradients(fused, x, seed), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    fused = adadfq.fuse(teacher)
    match = BatchNormMatch(fused)
    losses = []
    for model in (torch.compile(fused, backend="aot_eager", fullgraph=True), fused):
        with match.watching():
            model(x.clone().requires_grad_())
        losses.append(match.loss())
    torch.testing.assert_close(*losses)


def _kept_bytes(model: nn.Module, x: Tensor) -> int:
    """Bytes that a forward keeps for its backward, parameters and buffers left out."""
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(x.requires_grad_())
    assert output.requires_grad
    return sum(kept.values())


def test_a_fused_teacher_keeps_little_for_its_backward() -> None:
    torch.manual_seed(0)
    teacher = adadfq.build_model("resnet20").eval().requires_grad_(False)
    fused = adadfq.fuse(teacher)
    x = torch.randn(2, 3, 32, 32)
    match = BatchNormMatch(fused)
    with match.watching():
        ours = _kept_bytes(fused, x)
    plain = BatchNormMatch(teacher)
    with plain.watching():
        theirs = _kept_bytes(teacher, x)
    # Of each BatchNorm's input and each activation: the inputs, and the activations that blocks add to others.
    assert ours < 0.8 * theirs
