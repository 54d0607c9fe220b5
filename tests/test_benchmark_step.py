"""The benchmark of a training step: its players, that wrong ones get no time, its parts, its files and commands."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
from click.testing import CliRunner, Result
from torch import Tensor, nn

import adadfq
from adadfq.errors import InvalidInputError
from adadfq.game import Game
from benchmarks import (
    authors_code,
    breakdown,
    classifiers,
    contest,
    memory,
    networks,
    plain_step,
    players,
    plot,
    readme,
    room,
    scaling,
    step,
    store,
)
from benchmarks.__main__ import main
from benchmarks.contest import Setting, Start
from benchmarks.environment import cpu_flags, describe
from benchmarks.report import step_text

CPU = torch.device("cpu")
TINY = Setting(image_size=8, batch_size=4)
KINDS = {kind.name: kind for kind in players.KINDS}


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments))


@pytest.fixture(scope="module")
def environment() -> dict[str, Any]:
    return describe(CPU)


@pytest.fixture(scope="module")
def checkout() -> Path:
    if not (path := os.environ.get("ADADFQ_TEST_AUTHORS")):
        pytest.skip("ADADFQ_TEST_AUTHORS does not name a checkout of hfutqian/AdaDFQ")
    return Path(path)


def of(rows: list[dict[str, Any]], name: str) -> dict[str, Any]:
    (row,) = [row for row in rows if row["provider"] == name]
    return row


# --------------------------------------------------------------------------------------------------------------- rows


def test_step(environment: dict[str, Any], tmp_path: Path) -> None:
    content = store.document("step", environment, {})
    content["rows"] = step.run_step(TINY, CPU, environment, 5, 0, patterns=("plain", "adadfq"))
    store.write(tmp_path / "step.json", content)
    assert [row["provider"] for row in content["rows"]] == ["plain", "adadfq", "eager reference"]
    for row in content["rows"]:
        assert row["status"] == "ok", row["error"]
        assert row["images_per_s"] == pytest.approx(4e3 / row["p50_ms"]) and row["peak_memory_bytes"] > 1e5
        assert tuple(row["parts"]) == breakdown.PARTS and sum(row["parts"].values()) == pytest.approx(1)
        # In a step everybody works.
        assert all(row["parts"][part] > 0 for part in breakdown.PARTS)
    ours = of(content["rows"], "adadfq")
    assert ours["case"] == "step/resnet20@8/b4/w4a4" and ours["recipe"] == "cifar10_resnet20"
    assert [row["backend"] for row in content["rows"]] == [None, "cpu", "reference"]
    pytest.importorskip("matplotlib")
    assert [path.name for path in plot.plot(content, "step", tmp_path)] == ["step-step.png"]
    text = readme.speed_block([(Path("step.json"), content)])
    assert "against plain" in text and " ms " not in text and "images/s" not in text
    assert "where its time goes" in text and "](../benchmarks/results/step-step.png)" in text
    short = readme.readme_block([(Path("ops.json"), {"kind": "ops"}), (Path("step.json"), content)])
    assert "against plain" in short and "where its time goes" not in short and "ops.json" not in short
    scaling = {**content, "options": {"scaling": True}}
    assert "No step is stored yet" in readme.readme_block([(Path("step.json"), scaling)])


def test_every_other_player_is_held_to_the_reference(
    environment: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def two_bits(start: Start, _: Any) -> players.Player:
        return players.Ours(Start(dataclasses.replace(start.setting, act_bits=2), CPU))

    monkeypatch.setattr(step, "KINDS", (players.Kind("two bits", two_bits, backend="auto"), players.KINDS[-1]))
    wrong, reference = step.run_step(TINY, CPU, environment, 5, 0)
    assert wrong["status"] == "wrong" and wrong["p50_ms"] is None and "checked step" in wrong["error"]
    assert reference["status"] == "ok"


def test_a_wrong_kernel_gets_no_time(environment: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("fake_quantize", "affine_act_fake_quantize"):  # of layers as they are, and of fused ones
        right = adadfq.ops.cpu.KERNELS[name]

        def broken(*args: Any, right: Any = right) -> Any:
            result = right(*args)
            return result * 1.2 if isinstance(result, Tensor) else (result[0] * 1.2, *result[1:])

        monkeypatch.setitem(adadfq.ops.cpu.KERNELS, name, broken)
    ours, reference = step.run_step(TINY, CPU, environment, 5, 0, patterns=("adadfq",))
    assert ours["status"] == "wrong" and ours["p50_ms"] is None and reference["status"] == "ok"


def test_a_forced_backend_does_not_serve_our_step(environment: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADADFQ_BACKEND", "reference")
    ours, reference = step.run_step(TINY, CPU, environment, 5, 0, patterns=("adadfq",))
    assert (ours["backend"], reference["backend"]) == ("cpu", "reference")


def test_every_channel_has_both_signs() -> None:
    weight = torch.tensor([[1.0, 2.0], [-1.0, -2.0], [1.0, -2.0], [-1.0, 2.0]])
    turned = torch.tensor([[-1.0, 2.0], [1.0, -2.0], [1.0, -2.0], [-1.0, 2.0]])
    assert torch.equal(contest._with_both_signs(weight), turned)


def test_what_is_compared() -> None:
    gradients = {"a": torch.tensor([3.0, 4.0]), "unused": None}
    want = contest.Step(1.0, -2.0, gradients, gradients)
    near = step.Tolerance(0.01, 0.99, 0.05)
    assert step.difference(want, want, near) is None

    def changed(**parts: Any) -> str | None:
        return step.difference(dataclasses.replace(want, **parts), want, near)

    assert "loss_generator" in str(changed(loss_generator=1.02)) and "loss_student" in str(changed(loss_student=2.0))
    assert "loss_student" in str(changed(loss_student=float("nan")))
    assert "cosine" in str(changed(generator={"a": torch.tensor([4.0, 3.0])}))
    assert "times as long" in str(changed(student={"a": torch.tensor([3.3, 4.4])}))
    assert "no gradient for a" in str(changed(student={"a": None}))


def test_steps_are_checked_in_exact_float32_and_timed_as_they_are(
    environment: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    cudnn, found = torch.backends.cudnn, {"checked": set(), "__call__": set()}

    def watch(name: str) -> None:
        play = getattr(players.Ours, name)

        def looked_at(player: players.Ours, *args: Any) -> Any:
            found[name].add((cudnn.allow_tf32, cudnn.deterministic))
            return play(player, *args)

        monkeypatch.setattr(players.Ours, name, looked_at)

    for name in found:
        watch(name)
    before = cudnn.allow_tf32, cudnn.deterministic
    step.prepared(TINY, CPU, environment, None, step.chosen(["adadfq"]))
    assert before != (False, True) and found == {"checked": {(False, True)}, "__call__": {before}}


def test_bfloat16_may_be_off_by_more() -> None:
    ours, deep = KINDS["adadfq-bf16"], Setting(model="resnet18")
    assert step.tolerance_for(TINY, KINDS["adadfq"]) is step.tolerance_for(TINY, KINDS["authors"])
    assert step.tolerance_for(TINY, ours).loss > step.tolerance_for(TINY, KINDS["adadfq"]).loss
    assert step.tolerance_for(deep, ours).cosine < step.tolerance_for(TINY, ours).cosine


def test_bfloat16_is_near_float32(environment: dict[str, Any]) -> None:
    # Of 8 images, moved codes turn the generator's gradient by more on some processors (AMX) than is near.
    entries = step.prepared(Setting(batch_size=16), CPU, environment, None, step.chosen(["adadfq-bf16"]))
    assert [entry.row["status"] for entry in entries] == ["ok", "ok"], entries[0].row["error"]
    assert entries[0].row["precision"] == "bfloat16"


# ------------------------------------------------------------------------------------------------------------- players


@pytest.mark.parametrize("recipe", ["cifar10_resnet20", "imagenet_resnet18"])
def test_the_plain_step_has_the_gradients_of_the_game_in_float64(recipe: str) -> None:
    setting = Setting(recipe=recipe, image_size=8, batch_size=4)
    start = Start(setting, CPU)
    noise, labels = start.draw()
    plain = players.Plain(start)
    teacher, student, generator = start.teacher().double(), start.student().double(), start.generator().double()
    optimizers = (torch.optim.SGD(network.parameters(), 0.0) for network in (generator, student))
    game = Game(teacher, student, generator, start.recipe, *optimizers)
    for network in (*plain.parts.values(),):
        network.double()
    got = plain.checked(noise.double(), labels)
    with adadfq.use_backend("reference"):
        metrics = game.step(noise.double(), labels, train_student=True)
    assert [got.loss_generator, got.loss_student] == pytest.approx([float(metrics[0]), float(metrics[5])], rel=1e-5)
    for name, network in (("generator", generator), ("student", student)):
        for key, parameter in network.named_parameters():
            mine = getattr(got, name)[key]
            assert mine.dtype == torch.float64
            scale = float(parameter.grad.norm())
            # A bias before a BatchNorm moves nothing: its gradient is rounding.
            assert float((mine - parameter.grad).norm()) <= 1e-5 * scale + 1e-12, f"{name}.{key}"


def test_the_generators_agree() -> None:
    for recipe in ("cifar10_resnet20", "imagenet_resnet18"):
        start = Start(Setting(recipe=recipe, image_size=8, batch_size=4), CPU)
        noise, labels = start.draw()
        plain = plain_step.Generator(start.recipe)
        plain.load_state_dict(start.generator().state_dict())
        torch.testing.assert_close(plain(noise, labels), start.generator()(noise, labels), rtol=1e-4, atol=1e-4)


def test_what_compiles_is_compiled_and_right(environment: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []

    def traced(function: Any, dynamic: bool) -> Any:
        # Inductor takes a minute: only what is before it, dynamo and autograd's graphs.
        compiled.append(function)
        return compile_(function, dynamic=dynamic, backend="aot_eager")

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", traced)
    entries = step.prepared(TINY, CPU, environment, None, step.chosen([players.COMPILE]))
    assert entries[0].row["status"] == "ok", entries[0].row["error"]
    assert len(compiled) == 4  # three networks and the losses


def test_what_does_not_compile_is_left_out(environment: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise torch._dynamo.exc.TorchDynamoException("no compiler here\nand more")

    monkeypatch.setattr(torch, "compile", refuse)
    row, reference = step.run_step(TINY, CPU, environment, 5, 0, patterns=(players.COMPILE,))
    assert row["status"] == "unavailable" and row["error"] == "TorchDynamoException: no compiler here"
    assert reference["status"] == "ok"


def test_without_a_checkout_the_authors_do_not_play(environment: dict[str, Any], tmp_path: Path) -> None:
    row, _ = step.run_step(TINY, CPU, environment, 5, 0, patterns=("authors",))
    assert row["status"] == "unavailable" and "--authors" in row["error"]
    with pytest.raises(InvalidInputError, match="main.py is missing"):
        step.run_step(TINY, CPU, environment, 5, 0, tmp_path, ("authors",))


def test_their_files_are_mended_where_expected(tmp_path: Path) -> None:
    folder = tmp_path / "AdaDFQ" / "CIFAR"
    folder.mkdir(parents=True)
    (folder / "trainer.py").write_text(
        "import torch\niters = 200\ndef zeros(teacher_out):\n    return torch.zeros(16).double()\n"
    )
    found: dict[str, Any] = {}
    exec(authors_code.mended(folder, "trainer.py", 1), found)
    assert found["iters"] == 1 and found["zeros"](range(3)).shape == (3,)
    (folder / "trainer.py").write_text("iters = 100\n")
    with pytest.raises(InvalidInputError, match="iters = 200 and no torch.zeros"):
        authors_code.mended(folder, "trainer.py", 1)


def test_imports_from_a_checkout_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = ModuleType("utils")
    monkeypatch.setitem(sys.modules, "utils", mine)
    (tmp_path / "utils").mkdir()
    (tmp_path / "utils" / "__init__.py").write_text("from utils.part import value\n")
    (tmp_path / "utils" / "part.py").write_text("value = 1\n")
    before = (list(sys.path), set(sys.modules))
    with authors_code.importing_from(tmp_path):
        import utils

        assert utils.value == 1
    assert (sys.path, set(sys.modules)) == before and sys.modules["utils"] is mine
    assert not list(tmp_path.rglob("__pycache__"))


def test_the_authors_step(environment: dict[str, Any], checkout: Path) -> None:
    before = (list(sys.path), set(sys.modules), Tensor.cuda, nn.Module.cuda, torch.randn)
    row, reference = step.run_step(TINY, CPU, environment, 5, 0, checkout, ("authors",))
    assert row["status"] == "ok" and reference["status"] == "ok", row["error"]
    assert all(row["parts"][part] > 0 for part in breakdown.PARTS)
    new = {name for name in set(sys.modules) - before[1] if name.split(".")[0] in ("utils", "trainer", "main")}
    assert not new and (sys.path, Tensor.cuda, nn.Module.cuda, torch.randn) == (before[0], *before[2:])


def test_the_authors_step_for_imagenet(environment: dict[str, Any], checkout: Path) -> None:
    setting = Setting(model="mobilenet_v2", image_size=32, batch_size=4)
    entries = step.prepared(setting, CPU, environment, checkout, step.chosen(["authors", "plain", "adadfq"]))
    assert [entry.row["status"] for entry in entries] == ["ok"] * 4, [entry.row["error"] for entry in entries]


# ----------------------------------------------------------------------------------------------------------- networks


@pytest.mark.parametrize(
    ("build", "table"),
    [(classifiers.resnet18, "resnet18@224"), (classifiers.mobilenet_v2, "mobilenetv2@224")],
)
def test_classifiers_have_the_layers_of_the_tables(build: Any, table: str) -> None:
    found = {}
    with torch.device("meta"):
        network = build().eval()
        for name, module in network.named_modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):

                def hook(module: Any, _: Any, output: Tensor, name: str = name) -> None:
                    found[name] = (tuple(module.weight.shape), tuple(output.shape[1:]))

                module.register_forward_hook(hook)
        network(torch.empty(1, 3, 224, 224))
    assert found == {layer.name: (layer.weight, layer.output) for layer in networks.layers(table)}


def test_classifiers_compute_what_torchvisions_do(torchvision_models: ModuleType) -> None:
    for name in ("resnet18", "mobilenet_v2"):
        theirs = getattr(torchvision_models, name)().eval()
        ours = getattr(classifiers, name)().eval()
        ours.load_state_dict(theirs.state_dict())
        images = torch.randn(2, 3, 64, 64)
        torch.testing.assert_close(ours(images), theirs(images))


# -------------------------------------------------------------------------------------------------------------- memory


def test_what_does_not_fit_is_left_out_with_a_reason(
    environment: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    size = dataclasses.replace(TINY, batch_size=1 << 16)
    monkeypatch.setattr(room, "available_bytes", lambda device: 1 << 30)
    rows = step.run_step(size, CPU, environment, 5, 0)
    assert {row["status"] for row in rows} == {"unavailable"}
    assert all("GB of memory, and 1.07 GB are free" in row["error"] for row in rows)
    needed = room.Room(TINY, CPU, 2).needed_bytes()
    monkeypatch.setattr(room, "available_bytes", lambda device: needed / room._USABLE + 1)
    assert room.Room(TINY, CPU, 2).why_not() is None and "GB" in str(room.Room(TINY, CPU, 3).why_not())


def test_memory_is_estimated_from_the_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    def outputs(batch: int, size: int) -> int:
        return room.Room(Setting(batch_size=batch, image_size=size), CPU, 1)._outputs

    assert outputs(8, 32) == 2 * outputs(4, 32) and outputs(4, 32) == pytest.approx(4 * outputs(4, 16), rel=0.01)
    assert room.available_bytes(CPU) is None or room.available_bytes(CPU) > 1 << 20


def test_what_a_step_frees_counts_as_alive_before() -> None:
    kept = []

    def step() -> None:
        kept.clear()
        kept.append(torch.zeros(1 << 20))
        torch.zeros(1 << 18)

    assert memory.peak_bytes(step, CPU, replaces=True) == 1 << 20
    step()
    # Of what was alive before, PyTorch knows the size only where something had its allocator watched already.
    assert memory.peak_bytes(step, CPU) in ((1 << 22) + (1 << 20), 1 << 20)


# --------------------------------------------------------------------------------------------------------------- parts


class _Slow(torch.autograd.Function):
    """The identity, whose backward takes a while."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        time.sleep(0.05)
        return grad


class _SlowLayer(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return _Slow.apply(super().forward(input))


def test_a_backward_belongs_to_whose_forward_it_is() -> None:
    parts = {"generator": nn.Linear(3, 3), "teacher": _SlowLayer(3, 3), "student": nn.Linear(3, 3)}
    optimizer = torch.optim.SGD(parts["generator"].parameters(), 0.1)

    def play() -> None:
        images = parts["generator"](torch.randn(2, 3))
        loss = (parts["teacher"](images) - parts["student"](images)).square().sum()
        loss.backward()
        optimizer.step()

    shares = breakdown.breakdown(play, parts, (), CPU, 2)
    assert shares["teacher"] > 0.8 and shares["quantisation"] == 0 and sum(shares.values()) == pytest.approx(1)
    assert all(shares[part] > 0 for part in breakdown.PARTS if part != "quantisation")


def test_quantisation_is_what_is_not_the_convolution() -> None:
    class Quantiser(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            time.sleep(0.02)
            return nn.functional.linear(x, torch.eye(3))

    class Slow(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            time.sleep(0.02)
            return x

    parts = {"student": nn.Sequential(Quantiser(), Slow())}
    original = nn.functional.linear
    shares = breakdown.breakdown(lambda: parts["student"](torch.zeros(1, 3)), parts, (Quantiser,), CPU, 1)
    assert 0.3 < shares["quantisation"] < 0.7 and 0.3 < shares["student"] < 0.7
    assert nn.functional.linear is original
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in parts["student"].modules())


# ------------------------------------------------------------------------------------------------------------- scaling


def test_a_straight_line_is_found() -> None:
    line = scaling.fit([1, 2, 4], [5, 7, 11])
    assert (line.slope, line.intercept, line.r2) == pytest.approx((2, 3, 1))
    assert scaling.fit([0, 1, 2], [0, 1, 0]).r2 == pytest.approx(0)


def test_scaling(environment: dict[str, Any], tmp_path: Path) -> None:
    rows = scaling.run_scaling(TINY, CPU, environment, 5, 0, batches=(2, 4, 8), sizes=(8, 12))
    assert [(row["batch_size"], row["image_size"]) for row in rows] == [(2, 8), (4, 8), (8, 8), (4, 12)]
    assert {row["status"] for row in rows} == {"ok"} and {row["provider"] for row in rows} == {"adadfq"}
    assert [x for x, _ in scaling.points(rows, "batch_size")] == [2, 4, 8]
    assert [x for x, _ in scaling.points(rows, "pixels")] == [64, 144]
    text = scaling.scaling_text(rows)
    assert text.count("r^2") == 2 and "images in a batch, 2 to 8" in text
    content = store.document("step", environment, {"scaling": True}) | {"rows": rows}
    pytest.importorskip("matplotlib")
    assert [path.name for path in plot.plot(content, "s", tmp_path)] == ["s-scaling.png"]
    assert "s-scaling.png" in (block := readme.speed_block([(Path("s.json"), content)])) and "r^2" in block


# ------------------------------------------------------------------------------------------------- commands and files


def test_suites() -> None:
    assert [setting.case() for setting in contest.settings("quick", (), ())] == ["step/resnet20@32/b16/w4a4"]
    full = [setting.case() for setting in contest.settings("full", (), ())]
    assert len(full) == 6 and "step/mobilenet_v2@224/b128/w4a4" in full
    some = contest.settings("full", ("resnet18",), (4, 8), weight_bits=3)
    assert [setting.case() for setting in some] == ["step/resnet18@224/b4/w3a4", "step/resnet18@224/b8/w3a4"]
    assert some[0].resolved().name == "imagenet_resnet18" and some[0].resolved().temperature == 5


def test_the_command(tmp_path: Path) -> None:
    path = tmp_path / "step.json"
    options = ("--image-size", "8", "--batch-size", "2,4", "--rounds", "5", "--seconds", "0", "--threads", "1")
    result = run("step", *options, "--providers", "plain", "--json", str(path))
    assert result.exit_code == 0, result.output
    content = store.read(path)
    assert len(content["rows"]) == 4 and "resnet20@8/b4/w4a4 plain" in result.output
    assert content["options"]["authors"] is False and "x plain" in result.output
    assert isinstance(content["environment"]["cpu_flags"], list)
    assert run("step", "--suite", "full", "--dry-run").output == "6 cases\n"


def test_the_trace(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    result = run("step", "--image-size", "8", "--batch-size", "2", "--threads", "1", "--profile", str(path))
    assert result.exit_code == 0, result.output
    names = {event.get("name") for event in json.loads(path.read_text(errors="replace"))["traceEvents"]}
    assert {"part: teacher", "part: student", "part: generator"} <= names


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--suite", "fast"), "suite must be one of quick, judged, full, gpu, got 'fast'"),
        (("--providers", "fastest"), "'fastest' fits none of authors, plain"),
        (("--batch-size", "8,many"), "must be positive numbers between commas, got 'many'"),
        (("--recipe", "none"), "recipe must be one of"),
        (("--model", "resnet21"), "did you mean resnet"),
        (("--profile", "/nowhere/at/all.json", "--image-size", "8"), "/nowhere/at does not exist"),
    ],
)
def test_errors_are_one_line(arguments: tuple[str, ...], message: str) -> None:
    result = run("step", *arguments)
    assert result.exit_code == 2 and message in result.output.replace("\n", " ") and "Traceback" not in result.output


def test_cpu_flags(tmp_path: Path) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text(
        "processor\t: 0\nflags\t\t: fpu avx2 avx512f avx512_bf16 amx_tile\n\nprocessor\t: 1\nflags\t\t: fpu\n"
    )
    assert cpu_flags(file) == ["avx2", "avx512f", "avx512_bf16", "amx_tile"]
    assert cpu_flags(tmp_path / "none") == []


def test_older_files_without_cpu_flags_are_read(environment: dict[str, Any], tmp_path: Path) -> None:
    older = copy.deepcopy(environment)
    del older["cpu_flags"]
    store.write(tmp_path / "a.json", store.document("step", older, {}))
    wrong = store.document("step", environment | {"cpu_flags": "amx"}, {})
    with pytest.raises(InvalidInputError, match="cpu_flags must be list"):
        store.validate(wrong, "wrong")


def test_text_names_what_was_not_timed(environment: dict[str, Any]) -> None:
    with mock.patch.object(room, "available_bytes", lambda device: 1):
        rows = step.run_step(TINY, CPU, environment, 5, 0)
    assert step_text(rows).count("unavailable: needs an estimated") == sum(
        "cpu" in kind.devices for kind in KINDS.values()
    )
