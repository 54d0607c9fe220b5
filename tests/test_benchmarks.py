"""The benchmark suite: its registry, that wrong results get no time, its files, and its commands."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import json
import math
import os
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from test_predict_cuda import MULTIPROCESSORS, recorded
from torch import Tensor, nn

import adadfq
from adadfq.errors import InvalidInputError
from adadfq.kernels import configs, tune
from adadfq.ops import cuda, reference, routes, triton
from adadfq.ops.schema import OPERATORS
from benchmarks import (
    cases,
    huge_pages,
    memory,
    networks,
    ops,
    plot,
    predict,
    predict_cuda,
    problems,
    providers,
    ratios,
    readme,
    sass,
    store,
    timing,
    turns,
)
from benchmarks.__main__ import main
from benchmarks.cases import Case, registry, select
from benchmarks.check import Oracle
from benchmarks.environment import describe, digest_of_sources, machine
from benchmarks.providers import CLONE, COMPILE, COPY, EMPTY, NATIVE, PLAIN, REFERENCE, REPLAYED

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
SMALL = "fake_quantize/per_channel/resnet20@32.layer3.0.conv1/b16/float32/channels_last/forward"


def case_named(name: str) -> Case:
    (case,) = [case for case in registry() if case.name == name]
    return case


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments))


@pytest.fixture(scope="module")
def environment() -> dict[str, Any]:
    return describe(CPU)


# -------------------------------------------------------------------------------------------------------- networks


def observed_layers(model: nn.Module, size: int) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Name -> (shape of the weight, shape of the output without the batch), in the order they run."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):

            def hook(module: nn.Module, _: Any, output: Tensor, name: str = name) -> None:
                found[name] = (tuple(module.weight.shape), tuple(output.shape[1:]))

            module.register_forward_hook(hook)
    with torch.no_grad():
        model.eval()(torch.zeros(1, 3, size, size))
    return found


def table(network: str) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    return {layer.name: (layer.weight, layer.output) for layer in networks.layers(network)}


def test_resnet20_is_the_built_in_one() -> None:
    assert table("resnet20@32") == observed_layers(adadfq.build_model("resnet20"), 32)


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "mobilenet_v2"])
def test_networks_are_those_of_torchvision(name: str, torchvision_models: ModuleType) -> None:
    assert table(name.replace("_", "") + "@224") == observed_layers(getattr(torchvision_models, name)(), 224)


def test_residuals_and_activations() -> None:
    layers = {layer.name: layer for layer in networks.layers("mobilenetv2@224")}
    residual = [name for name, layer in layers.items() if layer.residual]
    assert len(layers) == 53 and len(residual) == 10 and all(layers[name].act == "none" for name in residual)
    assert sum(layer.residual for layer in networks.layers("resnet18@224")) == 8
    resnet50 = networks.layers("resnet50@224")
    assert len(resnet50) == 54 and sum(layer.residual for layer in resnet50) == 16
    # Of 25557032 parameters, these are BatchNorm's and the bias.
    assert sum(math.prod(layer.weight) for layer in resnet50) == 25557032 - 53120 - 1000
    assert sum(layer.act == "relu" for layer in networks.layers("resnet20@32")) == 19


# -------------------------------------------------------------------------------------------------------- registry


def test_every_operator_is_in_the_registry() -> None:
    assert set(cases.OPERATORS) == {name for name in OPERATORS if not name.endswith("_backward")}
    for op, passes in cases.OPERATORS.items():
        assert {case.pass_ for case in registry() if case.op == op} == set(passes)
        for suite in cases.SUITES:
            assert select(suite, [op]), (suite, op)


def test_names_are_unique_and_every_layer_is_found_by_its_own() -> None:
    names = [case.name for case in registry()]
    assert len(set(names)) == len(names)
    found = {alias: case for case in registry() for alias in case.aliases}
    for network in networks.NETWORKS:
        for layer in networks.convolutions(network):
            for batch in (16, 128):
                where = f"{network}.{layer.name}/b{batch}/float16/channels_last/both"
                assert found[f"bn_match/-/{where}"].shapes == ((batch, *layer.output),)
        for layer in networks.layers(network):
            case = found[f"dynamic_fake_quantize/axis0/{network}.{layer.name}.weight/float32/contiguous/forward"]
            assert case.shapes == (layer.weight,)
    # One case goes by the first layer's name and is selected by the other's.
    (case,) = select("full", ["bn_match"], ["resnet18@224.layer3.1.conv2/b16/float32/contiguous/both"])
    assert case.where == "resnet18@224.layer3.0.conv1/b16"


def test_the_judged_suite_holds_what_is_judged() -> None:
    chosen = select("judged")
    quantize = [case for case in chosen if case.op in ("fake_quantize", "fake_quantize_") and case.where != "tiny"]
    large = [case for case in quantize if 50e6 <= case.nbytes <= 200e6]
    keys = {(case.op, case.variant, case.dtype, case.layout) for case in large}
    assert len(keys) == 2**4 == len(large)
    sizes = sorted({case.nbytes for case in quantize if case not in large})
    assert sizes[0] < 100e3 and sizes[-1] > 3e6 and all(64e3 <= size <= 4e6 for size in sizes)
    weights = select("judged", ["foreach_dynamic_fake_quantize"], ["resnet18"])
    assert [case.shapes for case in weights] == [tuple(layer.weight for layer in networks.layers("resnet18@224"))]
    assert {case.shapes[0] for case in select("judged", ["margin_loss"], ["logits"])} >= {(16, 10), (256, 1000)}
    # Every pattern still names something, and every demand has a case.
    rows = [{"op": c.op, "pass": c.pass_, "where": c.where, "nbytes": c.nbytes, "variant": c.variant} for c in chosen]
    for criterion in ratios.CRITERIA:
        assert any(criterion.applies(row) for row in rows), criterion.title
    names = [case.name for case in registry()]
    for patterns in cases._PATTERNS.values():
        for pattern in patterns:
            assert any(cases.fnmatchcase(name, pattern) for name in names), pattern


def test_the_gpu_suite_holds_what_is_judged_there() -> None:
    chosen = select("gpu")
    assert 35 <= len(chosen) <= 58  # what a stage of gpu.sh has time for
    rows = [{"op": c.op, "pass": c.pass_, "where": c.where, "nbytes": c.nbytes, "variant": c.variant} for c in chosen]
    for criterion in ratios.criteria("cuda"):
        assert any(criterion.applies(row) for row in rows), criterion.title
    huge = [case for case in chosen if case.where in cases.HUGE.values()]
    assert min(case.nbytes for case in huge) >= 256e6
    for op, passes in (
        ("affine_act_fake_quantize", {"forward", "backward"}),
        ("bn_match_forward", {"forward", "both"}),
    ):
        assert {case.pass_ for case in huge if case.op == op} == passes
    quantize = {(c.variant, c.dtype, c.layout) for c in huge if (c.op, c.pass_) == ("fake_quantize", "forward")}
    assert quantize >= set(itertools.product(["per_channel"], cases.HUGE, cases.LAYOUTS))
    assert {case.op for case in chosen if case.where == "tiny"} == set(cases.OPERATORS)
    assert {case.shapes[0] for case in chosen if case.op == "margin_loss"} >= {(16, 10), (1024, 1000)}
    launches = {(case.op, case.where) for case in chosen if cases.is_launch(case.where, case.pass_)}
    ops_there = ("fake_quantize", "affine_act_fake_quantize", "bn_match")
    layers = ("resnet20@32.conv1/b16", "resnet20@32.layer3.0.conv1/b16")
    assert launches == set(itertools.product(ops_there, layers))
    weights = {case.where: len(case.shapes) for case in chosen if case.op == "foreach_dynamic_fake_quantize"}
    assert weights["resnet50@224.weights"] == 54


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (SMALL, 2 * 4 * 16 * 64 * 8 * 8),
        ("fake_quantize/per_tensor_clip/resnet20@32.layer3.0.conv1/b16/bfloat16/contiguous/backward", 3 * 2 * 65536),
        ("fake_quantize/per_tensor_clip/resnet20@32.layer3.0.conv1/b16/float32/contiguous/both", 5 * 4 * 65536),
        ("affine_act_fake_quantize/relu/resnet20@32.layer3.0.conv1/b16/float32/contiguous/forward", 2 * 4 * 65536),
        (
            "affine_act_fake_quantize/relu_residual/resnet20@32.layer3.0.conv2/b16/float32/contiguous/forward",
            3 * 4 * 65536,
        ),
        (
            "affine_act_fake_quantize/relu_residual_trained/resnet20@32.layer3.0.conv2/b16/float32/contiguous/backward",
            5 * 4 * 65536,
        ),
        ("affine_act_quantize/relu_residual/resnet20@32.layer3.0.conv2/b16/bfloat16/contiguous/forward", 5 * 65536),
        ("bn_match_forward/-/resnet20@32.layer3.0.conv1/b16/float32/contiguous/forward", 2 * 4 * 65536),
        ("bn_match_forward/-/resnet20@32.layer3.0.conv1/b16/float32/contiguous/backward", 3 * 4 * 65536),
        ("foreach_dynamic_fake_quantize/axis0/resnet20@32.weights/float32/contiguous/forward", 2 * 4 * 268336),
        ("quantize_pack/axis0/resnet18@224.fc.weight/float32/contiguous/forward", 512000 * 4 + 256000),
        ("unpack_dequantize/axis0/resnet18@224.fc.weight/bfloat16/contiguous/forward", 512000 * 2 + 256000),
        ("margin_loss/-/logits/b16k10/float32/contiguous/forward", 2 * 4 * 160),
        ("margin_loss/-/logits/b16k10/float32/contiguous/backward", 4 * 4 * 160),
        ("margin_loss/scaled/logits/b16k10/float32/contiguous/both", 4 * 4 * 160),
        ("entropy_distillation/-/logits/b16k10/float32/contiguous/forward", 2 * 4 * 160),
        ("entropy_distillation/scaled/logits/b16k10/float32/contiguous/backward", 3 * 4 * 160),
        ("entropy_distillation/-/logits/b16k10/float32/contiguous/both", 3 * 4 * 160),
    ],
)
def test_bytes_moved(name: str, expected: int) -> None:
    case = case_named(name)
    assert case.bytes_moved == expected
    problem = problems.make(case, CPU)
    for copy in providers.build(case, problem, [COPY, CLONE]):
        # A copy reads as much as it writes: of an odd number of elements, one less.
        assert 2 * copy.call().nbytes == expected // (2 * case.torch_dtype.itemsize) * (2 * case.torch_dtype.itemsize)


def test_selection_says_what_is_wrong() -> None:
    for arguments in (("fast",), ("full", ["quantize"]), ("full", [], ["resnet19"])):
        with pytest.raises(InvalidInputError):
            select(*arguments)


# ----------------------------------------------------------------------------------------------------- right or not


def smallest_cases() -> list[Case]:
    """For every operator, variant and pass the smallest case, in float32 and bfloat16."""
    found: dict[tuple[str, ...], Case] = {}
    for case in registry():
        key = (case.op, case.variant, case.pass_, case.dtype)
        if case.where != "tiny" and case.dtype != "float16" and (key not in found or case.numel < found[key].numel):
            found[key] = case
    return list(found.values())


@pytest.mark.parametrize("case", smallest_cases(), ids=lambda case: case.name)
def test_every_provider_is_right(case: Case) -> None:
    problem = problems.make(case, CPU)
    oracle = Oracle(problem, case.pass_)
    names = [name for name in providers.names(case, "cpu") if name != COMPILE]
    assert {REFERENCE, PLAIN, COPY, CLONE} <= set(names)
    for provider in providers.build(case, problem, names):
        assert ops.verdict(provider, oracle) == ("ok", None), provider.name


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize(
    "name", ["fake_quantize/per_tensor/tiny/float32/contiguous/both", "margin_loss/-/tiny/float32/contiguous/both"]
)
def test_a_compiled_provider_is_right(name: str) -> None:
    case = case_named(name)
    problem = problems.make(case, CPU)
    (provider,) = providers.build(case, problem, [COMPILE])
    assert ops.verdict(provider, Oracle(problem, case.pass_)) == ("ok", None)


def off_by_a_step(x: Tensor, scale: Tensor, zero_point: Tensor) -> tuple[Tensor, ...]:
    x_hat = torch.fake_quantize_per_channel_affine(x, scale, zero_point, 1, 0, 15)
    # One element that is nowhere near a tie.
    step = scale.view(1, -1, 1, 1)
    distance = (x / step % 1 - 0.5).abs()
    return (x_hat + step * (distance == distance.amax()),)


def one_nan(x: Tensor, scale: Tensor, zero_point: Tensor) -> tuple[Tensor, ...]:
    x_hat = torch.fake_quantize_per_channel_affine(x, scale, zero_point, 1, 0, 15)
    x_hat[0, 0, 0, 0] = float("nan")
    return (x_hat,)


def raising(*_: Tensor) -> tuple[Tensor, ...]:
    raise ValueError("no kernel today\nsecond line")


WRONG: dict[str, tuple[Callable[..., Any], str, str]] = {
    "identity": (lambda x, s, z: (x.clone(),), "wrong", "is off in"),
    "twice": (lambda x, s, z: (2 * torch.fake_quantize_per_channel_affine(x, s, z, 1, 0, 15),), "wrong", "is off in"),
    "steps": (off_by_a_step, "wrong", "is off in"),
    "nan": (one_nan, "wrong", "off"),
    "shape": (lambda x, s, z: (x[:1],), "wrong", "has shape"),
    "count": (lambda x, s, z: (x, x), "wrong", "gives 2 results"),
    "raising": (raising, "unavailable", "ValueError: no kernel today"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_provider_gets_no_time(name: str, environment: dict[str, Any]) -> None:
    function, status, error = WRONG[name]
    case = case_named(SMALL)
    problem = problems.make(case, CPU)
    wrong = providers.from_function(name, case, problem, function)
    built = [wrong, *providers.build(case, problem, [REFERENCE, COPY, CLONE])]
    rows = ops.measure_case(case, problem, built, environment, 5, 0)
    first, *others = rows
    assert first["status"] == status and error in first["error"] and "second line" not in first["error"]
    timed = ("rounds", "p20_ms", "p50_ms", "p80_ms", "gb_per_s", "fraction_of_copy", "peak_memory_bytes")
    assert all(first[key] is None for key in timed)
    assert all(row["status"] == "ok" and row["p50_ms"] > 0 for row in others)


@pytest.mark.parametrize("pass_", ["backward", "both"])
def test_a_wrong_gradient_gets_no_time(pass_: str) -> None:
    case = case_named(f"bn_match_forward/-/resnet20@32.layer3.0.conv1/b16/float32/contiguous/{pass_}")
    problem = problems.make(case, CPU)

    def loss_detached(*args: Tensor) -> tuple[Tensor, ...]:
        y, loss = problem.plain(*args)
        return y, loss.detach() + 0 * y.sum()

    provider = providers.from_function("no gradient of the loss", case, problem, loss_detached)
    assert ops.verdict(provider, Oracle(problem, pass_))[0] == "wrong"


@pytest.mark.parametrize("op", ["margin_loss", "entropy_distillation"])
@pytest.mark.parametrize("variant", ["-", "scaled"])
def test_a_loss_that_ignores_its_gradient_gets_no_time(op: str, variant: str) -> None:
    case = case_named(f"{op}/{variant}/logits/b16k10/float32/contiguous/both")
    problem = problems.make(case, CPU)
    assert problem.grads[0].item() == pytest.approx(1 if variant == "-" else problems.SCALED)

    class Unit(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, loss: Tensor) -> Tensor:
            return loss.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return torch.ones_like(grad)

    def ignoring(*args: Tensor) -> tuple[Tensor, ...]:
        loss, *others = problem.plain(*args)
        return Unit.apply(loss), *others

    oracle = Oracle(problem, case.pass_)
    right = providers.from_function("right", case, problem, problem.plain)
    assert ops.verdict(right, oracle) == ("ok", None)
    assert ops.verdict(providers.from_function("wrong", case, problem, ignoring), oracle)[0] == "wrong"


def test_a_step_off_is_right_only_next_to_a_tie() -> None:
    case = case_named(SMALL.replace("channels_last", "contiguous"))
    problem = problems.make(case, CPU)
    x, scale, _ = problem.args
    x[0, 0, 0, 0] = 2.5 * scale[0]
    oracle = Oracle(problem, "forward")
    right = oracle.want[0].float()
    for where, error in ((0, None), (1, "is off in 1 of 65536")):
        got = right.clone()
        got.view(-1)[where] += scale[0]
        reason = oracle.error([got])
        assert reason is None if error is None else error in str(reason)


def test_state_must_be_exact() -> None:
    case = case_named("observe_fake_quantize/per_tensor/tiny/float32/contiguous/both")
    oracle = Oracle(problems.make(case, CPU), case.pass_)
    for i, want in enumerate(oracle.want):
        if not want.is_floating_point():
            got = list(oracle.want)
            got[i] = want + 1
            assert "1 of 1 integers" in str(oracle.error(got))


def test_straight_through_gradients_must_be_exact() -> None:
    case = case_named(SMALL.replace("forward", "both"))
    oracle = Oracle(problems.make(case, CPU), case.pass_)
    x_hat, gradient = oracle.want
    changed = gradient.float()
    assert oracle.error([x_hat, changed]) is None
    changed[0, 0, 0, 5] *= 1 + 1e-6
    assert "result 1 of 2 is off in 1 of" in str(oracle.error([x_hat, changed]))


def test_a_backend_of_ours_that_raises_is_wrong() -> None:
    case = case_named(SMALL)
    problem = problems.make(case, CPU)
    provider = providers.from_function("adadfq cpu", case, problem, raising, backend="cpu")
    assert ops.verdict(provider, Oracle(problem, "forward"))[0] == "wrong"


def test_the_command_fails_where_a_result_is_wrong(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(problems.plain, "fake_quantize", lambda x, *_: x.clone())
    path = tmp_path / "wrong.json"
    result = run(
        *("ops", "--suite", "full", "--filter", SMALL, "--providers", "eager*", "--threads", "1", "--seconds", "0"),
        *("--json", str(path)),
    )
    assert result.exit_code == 1 and f"wrong: {PLAIN} on {SMALL}" in result.output
    by_provider = {row["provider"]: row for row in store.read(path)["rows"]}
    assert by_provider[PLAIN]["p50_ms"] is None and by_provider[REFERENCE]["p50_ms"] > 0


# ------------------------------------------------------------------------------------------------ timing and memory


def test_providers_take_turns() -> None:
    calls: list[str] = []

    def slow(name: str) -> Callable[[], None]:
        def call() -> None:
            calls.append(name)
            timing.time.sleep(2 * timing.MIN_SAMPLE)

        return call

    built = [providers.Provider(name, slow(name)) for name in "abc"]
    samples = timing.measure(built, CPU, 7, 100.0)
    assert [len(kept.values) for kept in samples.values()] == [7] * 3
    # After the first look at each, every provider has an untimed and a timed call a round.
    rounds = calls[-7 * 6 :]
    for i in range(7):
        turn = rounds[6 * i : 6 * i + 6]
        assert turn[::2] == turn[1::2] and sorted(turn[::2]) == ["a", "b", "c"]
    low, median, high = samples["a"].quantiles()
    assert timing.MIN_SAMPLE < low <= median <= high < 1


def test_nobody_always_follows_the_same_one() -> None:
    built = [providers.Provider(name, lambda: None) for name in "abcd"]
    counts = dict.fromkeys(itertools.permutations("abcd", 2), 0)
    for order in timing.orders(built, 200):
        assert len(order) == 4
        for before, after in itertools.pairwise(order):
            counts[before.name, after.name] += 1
    # 600 pairs of 12 kinds
    assert 25 < min(counts.values()) and max(counts.values()) < 75


def test_short_calls_are_repeated_and_rounds_have_a_floor() -> None:
    samples = timing.measure([providers.Provider("nothing", lambda: None)], CPU, 21, 0.0)["nothing"]
    assert samples.repeats > 10 and len(samples.values) == timing.MIN_ROUNDS


def test_peak_memory(environment: dict[str, Any]) -> None:
    case = case_named(SMALL)
    inplace = case_named(SMALL.replace("fake_quantize/", "fake_quantize_/"))
    peaks = {}
    for chosen in (case, inplace):
        problem = problems.make(chosen, CPU)
        for provider in providers.build(chosen, problem, providers.names(chosen, "cpu", ("adadfq*", "eager*"))):
            with provider.active():
                provider.call()
                peaks[chosen.op, provider.name] = memory.peak_bytes(provider.call, CPU)
    assert peaks["fake_quantize", "adadfq cpu"] == case.nbytes
    assert peaks["fake_quantize", REFERENCE] >= 3 * case.nbytes
    assert peaks["fake_quantize", PLAIN] < 1.1 * case.nbytes
    assert peaks["fake_quantize", CLONE] == case.nbytes and peaks["fake_quantize", COPY] == 0
    assert peaks["fake_quantize_", PLAIN] < case.nbytes / 10


def test_the_backend_is_forced_only_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADADFQ_BACKEND", "cpu")
    with providers.Provider("", lambda: None, backend="reference").active():
        assert adadfq.ops.dispatch.forced_backend() == "reference"
    assert os.environ["ADADFQ_BACKEND"] == "cpu"
    monkeypatch.delenv("ADADFQ_BACKEND")
    with providers.Provider("", lambda: None, backend="reference").active():
        assert adadfq.ops.dispatch.forced_backend() == "reference"
    assert "ADADFQ_BACKEND" not in os.environ


def test_into_existing_memory_writes_there(monkeypatch: pytest.MonkeyPatch) -> None:
    # Listed from 32 MB on; right at any size.
    case = case_named(SMALL)
    problem = problems.make(case, CPU)
    (provider,) = providers.build(case, problem, ["adadfq cpu" + providers.INTO])
    assert ops.verdict(provider, Oracle(problem, "forward")) == ("ok", None)
    with provider.active():
        assert provider.call()[0].data_ptr() == provider.call()[0].data_ptr()
        assert memory.peak_bytes(provider.call, CPU) == 0
    large = select("judged", ["fake_quantize"], ["b128"])[0]
    assert "adadfq cpu" + providers.INTO in providers.names(large, "cpu")
    monkeypatch.setattr(providers, "backends", lambda *_: ["cuda"])
    assert "adadfq cuda" in providers.names(large, "cuda")
    assert "adadfq cuda" + providers.INTO not in providers.names(large, "cuda")


def test_the_limit_in_place_changes_no_memory_but_its_own() -> None:
    case = case_named(SMALL.replace("fake_quantize/", "fake_quantize_/"))
    problem = problems.make(case, CPU)
    assert providers.IN_PLACE in providers.names(case, "cpu", ("adadfq*",))
    (provider,) = providers.build(case, problem, [providers.IN_PLACE])
    assert 2 * provider.call().nbytes == case.bytes_moved and memory.peak_bytes(provider.call, CPU) < 100
    assert providers.IN_PLACE not in providers.names(case_named(SMALL), "cpu")


# ----------------------------------------------------------------------------------------------------------- files


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of a few cheap cases, made by the command."""
    path = tmp_path_factory.mktemp("results") / "ops.json"
    result = run(
        *("ops", "--filter", "*/tiny/*", "--ops", "fake_quantize,fake_quantize_,margin_loss", "--threads", "1"),
        *("--providers", "adadfq*,eager*,torch,x*", "--seconds", "0", "--json", str(path)),
    )
    assert result.exit_code == 0, result.output
    return path


def test_rows_have_all_fields_and_survive_json(measured: Path, tmp_path: Path) -> None:
    content = store.read(measured)
    assert {row["op"] for row in content["rows"]} == {"fake_quantize", "fake_quantize_", "margin_loss"}
    for row in content["rows"]:
        assert set(row) == {*store.FIELDS["ops"], "cpu_flags"}
        assert row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]
        assert row["gb_per_s"] == pytest.approx(row["bytes_moved"] / row["p50_ms"] / 1e6)
        assert row["device_name"] and row["threads"] == 1 and row["versions"]["torch"] == torch.__version__
    copies = {row["case"]: row["p50_ms"] for row in content["rows"] if row["provider"] == COPY}
    for row in content["rows"]:
        assert row["fraction_of_copy"] == pytest.approx(copies[row["case"]] / row["p50_ms"])
    names = {row["provider"] for row in content["rows"]}
    assert {"adadfq cpu", NATIVE, REFERENCE, PLAIN, COPY, CLONE, providers.BARE, providers.IN_PLACE} == names
    store.write(tmp_path / "again.json", content)
    assert store.read(tmp_path / "again.json") == content
    assert (tmp_path / "again.json").read_bytes() == measured.read_bytes()


def test_what_was_built_is_held_against_the_sources(
    environment: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert digest_of_sources(tmp_path) is None
    (tmp_path / "a.h").write_text("1")
    before = digest_of_sources(tmp_path)
    (tmp_path / "a.h").write_text("2")
    assert before != digest_of_sources(tmp_path)
    pytest.importorskip("setuptools", minversion="69")
    built = runpy.run_path(str(ROOT / "setup.py"))["digest_of_sources"](ROOT / "csrc")
    found = adadfq.info.collect()
    for build, matches in (
        (None, None),
        ({"cxx": "g++"}, None),
        ({"sources": built}, True),
        ({"sources": "other"}, False),
    ):
        monkeypatch.setattr(adadfq.info, "collect", lambda build=build: found | {"build": build})
        assert describe(CPU)["native_matches_sources"] is matches
    arguments = (
        "--filter",
        "tiny",
        "--ops",
        "margin_loss",
        "--providers",
        "adadfq*",
        "--threads",
        "1",
        "--seconds",
        "0",
    )
    assert "not built from this csrc" in run("ops", *arguments).output


def test_nothing_names_the_machine_or_a_path(environment: dict[str, Any]) -> None:
    text = json.dumps(environment)
    assert str(Path.home()) not in text and str(ROOT) not in text
    if len(socket.gethostname()) > 5:
        assert socket.gethostname() not in text
    assert environment["device_name"] in machine(environment) and torch.__version__ in machine(environment)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(format="other"), "format"),
        (lambda c: c.update(version=0), "version"),
        (lambda c: c.update(kind="speed"), "kind"),
        (lambda c: c["rows"][0].pop("p50_ms"), "missing fields ['p50_ms']"),
        (lambda c: c["rows"][0].update(extra=1), "unknown fields ['extra']"),
        (lambda c: c["rows"][0].update(p50_ms="1"), "p50_ms must be float"),
        (lambda c: c["rows"][0].update(status="wrong"), "only there"),
        (lambda c: c["environment"].update(threads=None), "threads must be int"),
    ],
)
def test_an_invalid_file_is_refused(measured: Path, tmp_path: Path, change: Any, message: str) -> None:
    content = json.loads(measured.read_text())
    change(content)
    with pytest.raises(InvalidInputError) as error:
        store.write(tmp_path / "bad.json", content)
    assert message in str(error.value) and not (tmp_path / "bad.json").exists()


def hand_made(times: dict[tuple[str, str], tuple[float, float, float]], like: Path) -> dict[str, Any]:
    """A file with these (case, provider) -> (p20, p50, p80)."""
    content = store.read(like)
    template = content["rows"][0]
    content["rows"] = [
        template
        | {"case": case, "provider": provider, "p20_ms": p20, "p50_ms": p50, "p80_ms": p80, "status": "ok"}
        | {"op": case.split("/")[0], "pass": case.split("/")[-1], "where": "here"}
        for (case, provider), (p20, p50, p80) in times.items()
    ]
    return content


def test_compare(measured: Path, tmp_path: Path) -> None:
    first = hand_made({("a/forward", "x"): (4.0, 5.0, 6.0), ("gone/forward", "x"): (1.0, 1.0, 1.0)}, measured)
    second = hand_made({("a/forward", "x"): (2.0, 2.5, 4.0), ("new/forward", "x"): (1.0, 1.0, 1.0)}, measured)
    result = ratios.compare(first, second)
    assert result.ratios == {("a/forward", "x"): ratios.Ratio(1.0, 2.0, 3.0)}
    assert result.only_first == [("gone/forward", "x")] and result.only_second == [("new/forward", "x")]
    assert result.notes == []

    second["environment"]["threads"] = 9
    second["options"] |= {"rounds": 5}
    second["environment"] |= {"git_commit": "c0ffee"}
    second["environment"] |= {"transparent_hugepage": "other", "thp_mem_alloc": True}
    second["environment"]["versions"]["torch"] = "0.1"
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    store.write(a, first)
    store.write(b, second)
    output = run("compare", str(a), str(b))
    assert output.exit_code == 0 and "2.00 (1.00-3.00)" in output.output
    assert "--rounds: 21 and 5" in output.output and "and c0ffee" in output.output
    assert "spread: 20th percentile" in output.output
    assert "thp_mem_alloc: False and True" in output.output and "transparent_hugepage: " in output.output
    assert "threads: 1 and 9" in output.output and f"torch: {torch.__version__} and 0.1" in output.output
    assert "only in a.json: gone/forward  x" in output.output and "only in b.json: new/forward  x" in output.output

    second["environment"]["device_name"] = "Another"
    store.write(b, second)
    refused = run("compare", str(a), str(b))
    assert refused.exit_code == 2 and "different machines" in refused.output and "--force" in refused.output
    assert "2.00 (1.00-3.00)" in run("compare", "--force", str(a), str(b)).output


def test_judged_ratios_take_the_faster_eager(measured: Path, tmp_path: Path) -> None:
    case = "margin_loss/both"
    times = {(case, REFERENCE): (20.0, 20.0, 20.0), (case, PLAIN): (10.0, 10.0, 10.0), (case, "adadfq cpu"): (1, 1, 2)}
    (judgement,) = ratios.judge(hand_made(times, measured)["rows"])
    assert judgement.ratio == ratios.Ratio(5.0, 10.0, 10.0) and judgement.met is True
    times[case, PLAIN] = (7.0, 7.0, 7.0)
    content = hand_made(times, measured)
    (judgement,) = ratios.judge(content["rows"])
    assert judgement.met is False
    store.write(tmp_path / "judged.json", content)
    result = run("judge", str(tmp_path / "judged.json"))
    assert result.exit_code == 1 and "NOT MET" in result.output
    # Criteria without a case have no time, which is not enough.
    assert "no case" in result.output and "no time" in result.output
    # Without a kernel the reference is what a user gets.
    del times[case, "adadfq cpu"]
    (judgement,) = ratios.judge(hand_made(times, measured)["rows"])
    assert judgement.ratio == ratios.Ratio(0.35, 0.35, 0.35)


def test_what_has_no_time_meets_no_demand(measured: Path) -> None:
    case = "margin_loss/both"
    times = {(case, name): (time, time, time) for name, time in ((REFERENCE, 20.0), (PLAIN, 10.0), ("adadfq cpu", 1.0))}
    rows = hand_made(times, measured)["rows"]
    (judgement,) = ratios.judge(rows)
    assert judgement.met is True
    for i, status in ((1, "unavailable"), (2, "wrong")):  # a rival that might be faster; our own
        changed = [row | ({"status": status, "p50_ms": None} if j == i else {}) for j, row in enumerate(rows)]
        (judgement,) = ratios.judge(changed)
        assert judgement.met is None, i
    assert ratios.ours(ratios.by_case(changed)[case]) is None
    left_out = "margin_loss/-/logits/b16k10/float32/contiguous/both"
    assert [j.met for j in ratios.judge(rows, [left_out])] == [True, None]
    whole = ratios.judge(rows, whole=True)
    assert {j.criterion.title for j in whole} == {c.title for c in ratios.CRITERIA} and None in {j.met for j in whole}


def test_each_device_has_its_table(measured: Path) -> None:
    case = "margin_loss/forward"
    times = {(case, REFERENCE): (20.0, 20.0, 20.0), (case, PLAIN): (5.0,) * 3, (case, "adadfq triton"): (1.0,) * 3}
    rows = hand_made(times, measured)["rows"]
    assert ratios.judge(rows) == []  # of a CPU the whole pass is judged
    on_gpu = [row | {"device": "cuda"} for row in rows]
    (judgement,) = ratios.judge(on_gpu)
    assert judgement.met is True and judgement.criterion in ratios.CUDA_CRITERIA and judgement.ratio.median == 20
    left_out = "fake_quantize_/per_channel/resnet18@224.conv1/b128/float32/contiguous/forward"
    assert [j.criterion.title for j in ratios.judge(on_gpu, [left_out]) if j.met is None] == [
        "256 MB and more, in place: of the copy (cuda)",
        "256 MB and more, in place: of the copy (triton)",
        "every case: triton, or routed to it (cuda)",
    ]
    assert {j.criterion for j in ratios.judge(on_gpu, whole=True)} == set(ratios.criteria("cuda"))
    assert ratios.criteria("cpu") is ratios.CRITERIA
    content = store.read(measured)
    content |= {"rows": on_gpu, "environment": content["environment"] | {"device": "cuda"}}
    assert "margin_loss, value and gradients: eager | 10x | 20x | 1 of 1" in readme.speed_block([(Path("a"), content)])


def on_a_gpu(case: Case, times: dict[str, float], like: Path) -> list[dict[str, Any]]:
    """Rows of a case: provider -> time."""
    shape = {"op": case.op, "variant": case.variant, "where": case.where, "nbytes": case.nbytes, "dtype": case.dtype}
    shape |= {"pass": case.pass_, "device": "cuda", "shapes": [list(shape) for shape in case.shapes]}
    rows = hand_made({(f"{case.op}/{case.pass_}", name): (time,) * 3 for name, time in times.items()}, like)["rows"]
    return [row | shape | {"case": case.name} for row in rows]


def verdicts(rows: list[dict[str, Any]], **others: Any) -> dict[str, tuple[bool | None, bool]]:
    """Title -> (met, routed)."""
    return {j.criterion.title: (j.met, j.routed) for j in ratios.judge(rows, **others)}


def test_each_gpu_backend_has_its_share_of_the_copy(measured: Path) -> None:
    case = case_named("fake_quantize/per_channel/resnet18@224.conv1/b128/float32/contiguous/forward")
    title = "256 MB and more: of the copy"
    rows = on_a_gpu(case, {COPY: 0.91, "adadfq cuda": 1.0, "adadfq triton": 1.0}, measured)
    found = verdicts(rows)
    assert found[f"{title} (cuda)"] == (False, False) and found[f"{title} (triton)"] == (True, False)
    # Without the rows of one, nothing is said about it, but where everything is asked for.
    alone = [row for row in rows if row["provider"] != "adadfq cuda"]
    assert f"{title} (cuda)" not in verdicts(alone) and verdicts(alone)[f"{title} (triton)"] == (True, False)
    assert verdicts(alone, whole=True)[f"{title} (cuda)"] == (None, False)
    packed = case_named("quantize_pack/per_tensor/resnet18@224.conv1/b128/float32/contiguous/forward")
    assert verdicts(on_a_gpu(packed, {COPY: 0.93, "adadfq cuda": 1.0}, measured)) == {
        "packing, 256 MB and more: of the copy (cuda)": (True, False)
    }


def test_cuda_is_no_slower_than_triton_or_routed_to_it(measured: Path, tmp_path: Path) -> None:
    case = case_named("bn_match_forward/-/resnet18@224.conv1/b128/float32/contiguous/both")
    title = "every case: triton, or routed to it (cuda)"
    fast, slow = (
        on_a_gpu(case, {"adadfq cuda": taken, "adadfq triton": 1.0, REFERENCE: 3.0}, measured) for taken in (1.04, 1.06)
    )
    assert verdicts(fast)[title] == (True, False) and verdicts(slow)[title] == (False, False)

    def table(*ops: str) -> routes.Routes:
        return routes.Routes(None, tuple(routes.Rule(op, "triton", torch.float32, "large") for op in ops))

    # The time is that of two operators: both must be routed.
    forward, backward = "bn_match_forward", "bn_match_forward_backward"
    assert verdicts(slow, table=table(forward))[title] == (False, False)
    assert verdicts(slow, table=table(forward, backward))[title] == (True, True)
    providers_of = ratios.by_case(slow)[case.name]
    assert ratios.ours(providers_of)["provider"] == "adadfq cuda"
    assert ratios.ours(providers_of, table(forward, backward))["provider"] == "adadfq triton"

    content = store.read(measured)
    content |= {"rows": slow, "environment": content["environment"] | {"device": "cuda"}}
    store.write(tmp_path / "slow.json", content)
    rules = [{"op": op, "backend": "triton"} for op in (forward, backward)]
    written = {"format": routes.FORMAT, "version": routes.VERSION, "measured": None, "rules": rules}
    (tmp_path / "table.json").write_text(json.dumps(written))
    for arguments, expected in (((), "NOT MET"), (("--routes", str(tmp_path / "table.json")), "met: routed")):
        result = run("judge", str(tmp_path / "slow.json"), *arguments)
        (line,) = [line for line in result.output.splitlines() if title in line and case.name in line]
        assert line.rstrip().endswith(expected)


def test_small_layers_are_held_against_an_empty_launch(measured: Path) -> None:
    case = case_named("bn_match/-/resnet20@32.layer3.0.conv1/b16/float32/contiguous/forward")
    title = "layers of ResNet-20: an empty launch (cuda)"
    replayed = f"adadfq cuda{REPLAYED}"
    for taken, met in ((1.29, True), (1.31, False)):
        times = {"adadfq cuda": 9.0, replayed: taken, EMPTY: 1.0}
        assert verdicts(on_a_gpu(case, times, measured)) == {title: (met, False)}
    # Without a replay there is no time.
    assert verdicts(on_a_gpu(case, {"adadfq cuda": 0.1, EMPTY: 1.0}, measured)) == {title: (None, False)}


class Graph:
    """Stands in for a CUDA graph: what is called while it is recorded is called by a replay, too."""

    recorded = replayed = 0

    def replay(self) -> None:
        Graph.replayed += 1


def test_replayed_calls_are_timed_by_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    case = case_named("fake_quantize/per_tensor/resnet20@32.conv1/b16/float32/contiguous/forward")
    monkeypatch.setattr(providers, "backends", lambda case, device_type: ["cuda"] if device_type == "cuda" else ["cpu"])
    names = providers.names(case, "cuda")
    assert {f"adadfq cuda{REPLAYED}", EMPTY, "adadfq cuda", REFERENCE, PLAIN, COPY} <= set(names)
    assert COMPILE not in names
    assert not [name for name in providers.names(case, "cpu") if name.endswith(REPLAYED)]
    training = case_named("fake_quantize/per_tensor/resnet20@32.conv1/b16/float32/contiguous/both")
    assert not [name for name in providers.names(training, "cuda") if name.endswith(REPLAYED)]

    calls = 0

    @contextlib.contextmanager
    def recording(graph: Graph) -> Iterator[None]:
        before = calls
        yield
        graph.recorded = calls - before

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", recording)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    def call() -> None:
        nonlocal calls
        calls += 1

    provider = providers.replayed(providers.Provider("empty", call))
    clock = 0.5  # of a call that takes longer than a second, none goes untimed
    monkeypatch.setattr(timing, "clock_of", lambda device: lambda function, repeats: (function(), clock)[1])
    kept = timing.measure([provider], CPU, 5, 0)["empty"]
    assert calls == 1 + providers.CALLS_OF_GRAPH and Graph.replayed == 1 + 1 + 5 * 2
    assert set(kept.values) == {clock / providers.CALLS_OF_GRAPH} and kept.calls == providers.CALLS_OF_GRAPH
    problem = problems.make(case, CPU)
    empty, ours = providers.build(case, problem, [EMPTY, f"adadfq cuda{REPLAYED}"])
    assert empty.results is None and empty.backend is None
    assert ours.backend == "cuda" and ours.results is not None and ours.is_ours
    empty.call()


def test_readme_names_who_has_no_time(measured: Path) -> None:
    content = store.read(measured)
    empty = dict.fromkeys(("p20_ms", "p50_ms", "p80_ms", "gb_per_s", "fraction_of_copy", "fraction_of_clone"))
    for row, status in zip(content["rows"], ("wrong", "unavailable"), strict=False):
        row |= empty | {"status": status, "error": "reason"}
    text = readme.speed_block([(Path("ops.json"), content)])
    first, second = content["rows"][:2]
    assert f"without a time: {first['provider']} on `{first['case']}`" in text
    assert f"Could not be run: {second['provider']} on `{second['case']}`" in text


def test_no_times_of_a_cpu_are_published(measured: Path) -> None:
    content = store.read(measured)
    text = readme.speed_block([(Path("ops.json"), content)])
    assert "in `x * 1` of the same pass" in text and "us |" not in text
    for row in content["rows"]:  # a machine twice as slow has the same tables
        times = ("p20_ms", "p50_ms", "p80_ms")
        row |= {key: None if row[key] is None else 2 * row[key] for key in times}
    assert readme.speed_block([(Path("ops.json"), content)]) == text
    on_gpu = content | {"rows": [row | {"device": "cuda"} for row in content["rows"]]}
    assert "no data, us |" in readme.speed_block([(Path("ops.json"), on_gpu)])


def test_plots(measured: Path, tmp_path: Path) -> None:
    result = run("plot", str(measured), "--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    for name in ("ops-speedup.png", "ops-roofline.png"):
        data = (tmp_path / name).read_bytes()
        assert data.startswith(b"\x89PNG") and len(data) > 10_000
    assert run("plot", str(measured), "--out", str(tmp_path / "nowhere")).exit_code == 2
    content = store.read(measured)
    content["rows"] = []
    with pytest.raises(InvalidInputError, match="no row has a time"):
        plot.plot(content, "empty", tmp_path)


# ------------------------------------------------------------------------------------------------------ huge pages


def test_the_mode_of_huge_pages(tmp_path: Path, environment: dict[str, Any]) -> None:
    file = tmp_path / "enabled"
    file.write_text("always [madvise] never\n")
    assert huge_pages.mode(file) == "madvise" and huge_pages.mode(tmp_path / "absent") is None
    assert environment["transparent_hugepage"] == huge_pages.mode() and environment["thp_mem_alloc"] is False


def test_huge_pages_for_every_provider(tmp_path: Path) -> None:
    path = tmp_path / "huge.json"
    command = [sys.executable, "-m", "benchmarks", "ops", "--huge-pages", "--ops", "margin_loss", "--filter", "tiny"]
    command += ["--providers", "adadfq*", "--threads", "1", "--seconds", "0", "--json", str(path)]
    environ = {name: value for name, value in os.environ.items() if name != huge_pages.VARIABLE}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, cwd=ROOT)
    if huge_pages.mode() not in ("always", "madvise"):
        assert done.returncode == 2 and "got no huge page" in done.stderr
        return
    # The command itself looks whether a new tensor is on huge pages; memory in pieces has none to give.
    assert done.returncode == 0 or "free memory in one piece" in done.stderr, done.stderr
    if done.returncode == 0:
        assert store.read(path)["environment"]["thp_mem_alloc"] is True


# ---------------------------------------------------------------------------------------------------------- README


def test_readme_is_made_from_the_stored_files(measured: Path, tmp_path: Path) -> None:
    page, results = tmp_path / "README.md", tmp_path / "results"
    results.mkdir()
    page.write_text(f"before\n{readme.BEGIN}\nold\n{readme.END}\nafter\n")
    assert readme.stale(page, results)
    assert readme.update(page, results) == [page]
    assert "Nothing measured yet is stored" in page.read_text() and readme.stale(page, results) == []

    shutil.copy(measured, results / "ops.json")
    assert readme.stale(page, results)
    assert {path.name for path in readme.update(page, results)} == {"README.md", "ops-speedup.png", "ops-roofline.png"}
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert machine(store.read(measured)["environment"]) in text and "`margin_loss` forward + backward" in text
    assert "](../benchmarks/results/ops-speedup.png)" in text
    assert "`benchmarks/results/ops.json`): stock allocator" in text
    assert readme.stale(page, results) == []
    assert readme.update(page, results) == []
    (results / "ops-roofline.png").unlink()
    assert readme.stale(page, results) == ["ops-roofline.png is missing"]
    assert readme.update(page, results) == [results / "ops-roofline.png"]

    # What tables do not show and plots might.
    content = store.read(measured)
    content["environment"]["date"] = "2000-01-01T00:00:00Z"
    store.write(results / "ops.json", content)
    stale = [f"ops-{name}.png does not show ops.json" for name in ("speedup", "roofline")]
    assert readme.stale(page, results) == stale
    assert [path.name for path in readme.update(page, results)] == ["ops-speedup.png", "ops-roofline.png"]
    assert readme.stale(page, results) == []

    store.write(results / "partial.json", content | {"rows": [], "left_out": ["all"]})
    assert readme.update(page, results) == [page] and "1 cases were left out." in page.read_text()
    assert readme.stale(page, results) == []

    content["environment"]["native_matches_sources"] = False
    store.write(results / "ops.json", content)
    with pytest.raises(InvalidInputError, match=r"ops\.json was measured with modules"):
        readme.update(page, results)
    (results / "ops.json").unlink()

    page.write_text("no markers")
    with pytest.raises(InvalidInputError, match="must hold"):
        readme.update(page, results)


def test_readme_shows_what_is_stored() -> None:
    result = run("readme", "--check")
    assert result.exit_code == 0, result.output


def test_readme_is_checked_by_its_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readme, "stale", lambda page, block: ["ops.png is missing"])
    result = run("readme", "--check")
    assert result.exit_code == 1 and result.output.count("ops.png is missing: run 'python -m benchmarks readme'") == 1


# -------------------------------------------------------------------------------------------------------- commands


def test_list() -> None:
    result = run("list", "--suite", "full", "--filter", "resnet18@224.layer3.0.conv1/b16/", "--ops", "bn_match")
    names = [line.split()[0] for line in result.output.splitlines() if line.startswith("bn_match/")]
    assert result.exit_code == 0 and len(names) == 3 * 2 * 3 and "adadfq cpu" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("ops", "--suite", "fast"), "suite must be one of quick, judged, gpu, predicted, full, got 'fast'"),
        (("ops", "--ops", "quantize"), "ops must be among"),
        (("ops", "--filter", "nothing"), "no case of suite quick fits"),
        (("ops", "--providers", "adadfq*,fastest"), "'fastest' fits none of"),
        (("ops", "--device", "tpu"), "device must be cpu or cuda"),
        (("ops", "--threads", "0"), "threads must be at least 1"),
        (("ops", "--json", "/nowhere/at/all.json", "--filter", "tiny"), "the directory /nowhere/at does not exist"),
        (("compare", "a.json", "b.json"), "a.json cannot be read"),
        (("step", "--model", "resnet21"), "did you mean"),
        (("list", "--device", "cuda", "--kernels-only"), "no backend but the reference"),
    ],
)
def test_errors_are_one_line(arguments: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    result = run(*arguments)
    assert result.exit_code == 2 and message in result.output
    assert result.output.count("error: ") == 1 and "Traceback" not in result.output


def test_a_limit_leaves_cases_out_and_says_so(tmp_path: Path) -> None:
    path = tmp_path / "partial.json"
    result = run(
        *("ops", "--filter", "tiny", "--ops", "margin_loss,entropy_distillation", "--providers", "adadfq*"),
        *("--threads", "1", "--seconds", "0", "--limit", "0", "--json", str(path)),
    )
    content = store.read(path)
    assert result.exit_code == 0 and "2 of 2 cases were not run" in result.output
    assert len(content["left_out"]) == 2 and content["rows"] == []


def test_pytest_runs_benchmarks_only_when_asked() -> None:
    assert '\ntestpaths = ["tests"]\n' in (ROOT / "pyproject.toml").read_text()
    pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed")
    command = [sys.executable, "-m", "pytest", "benchmarks", "-q", "--benchmark-only", "--threads", "1"]
    command += ["-p", "no:cacheprovider", "--ops", "margin_loss", "--filter", "tiny", "--providers", "adadfq*"]
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    done = subprocess.run(command, env=alone, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "3 passed" in done.stdout, done.stdout + done.stderr


# ----------------------------------------------------------------------------------------------------- predictions

#: Two ways to a loop of four instructions, and the padding at the end.
LISTING = [
    (0x00, "LDC R1, c[0x0][0x28]"),
    (0x10, "ISETP.GE.AND P0, PT, R0, 0x1, PT"),
    (0x20, "@!P0 BRA 0x60"),
    (0x30, "MOV R2, R3"),
    (0x40, "MOV R2, R3"),
    (0x50, "BRA 0x70"),
    (0x60, "MOV R2, R4"),
    (0x70, "LDG.E R9, desc[UR4][R2.64]"),
    (0x80, "@P0 LDG.E.128 R4, desc[UR4][R2.64]"),
    (0x90, "FADD R4, R4, R9"),
    (0xA0, "STG.E.128 desc[UR4][R2.64], R4"),
    (0xB0, "@P1 BRA 0x80"),
    (0xC0, "@P2 EXIT"),
    (0xD0, "FADD R4, R4, R9"),
    (0xE0, "EXIT"),
    (0xF0, "BRA 0xf0"),
]


def test_instructions_are_counted_along_the_longest_way() -> None:
    (loop,) = sass.loops(LISTING)
    assert loop == sass.Loop(instructions=4, wide=2, loaded=16, stored=16)
    assert sass.outside(LISTING) == 10  # the block at 0x30, not that at 0x60, nor the padding's loop
    # A round of a thread is 4 elements of 8 bytes; 64 threads have 16 elements each.
    assert sass.per_element(LISTING, 64, 1024, 8.0) == 10 / 16 + 4 / 4
    assert sass.per_element([*LISTING[:3], (0x30, "EXIT"), (0x60, "EXIT")], 64, 128, 8.0) == 4 / 2


def test_a_pass_that_only_reads_counts_too() -> None:
    reading = [(0x60, "LDG.E.128 R4, desc[UR4][R2.64]"), (0x68, "FADD R4, R4, R9"), (0x6C, "@P1 BRA 0x60")]
    listing = [*LISTING[:2], *reading, *LISTING[7:]]
    assert [loop.stored for loop in sass.loops(listing)] == [0, 16]
    one, two = (sass.per_element(listing, 1, 10**9, 8.0, passes) for passes in (1, 2))
    assert two - one == pytest.approx(3 / 4)


def test_loops_around_others_count_by_their_turns() -> None:
    listing = [*LISTING[:-3], (0xD0, "@P3 BRA 0x10"), *LISTING[-2:]]
    assert sass.around(listing) == 9  # 0x10 to 0xd0 without the loop at 0x80
    none, some = (sass.per_element(listing, 64, 1024, 8.0, turns=turns) for turns in (0, 5))
    assert some - none == 5 * 9 / 16


def test_what_a_loop_keeps_on_the_stack_is_found() -> None:
    store, load = "STL [R1], R6", "@P0 LDL.LU R26, [R1]"

    def found(*others: tuple[int, str]) -> list[str]:
        return sass.stack_accesses_in_loops(sorted([*LISTING, *others]))

    assert found((0x04, store), (0xC4, load)) == []
    assert found((0x04, store), (0xA4, load)) == [load]
    # Moved behind the end, and back into the loop; called by it.
    assert found((0x84, "@P3 BRA 0x100"), (0x100, store), (0x110, "BRA 0x90")) == [store]
    assert found((0x84, "CALL.REL.NOINC 0x100"), (0x100, store), (0x110, "RET.REL.NODEC R2 0x0")) == [store]
    # Out of it, by what looks like a call.
    assert found((0xA4, "@!P0 CALL.REL.NOINC 0xd0"), (0xD4, load)) == []
    assert found((0x34, "CALL.REL.NOINC 0x100"), (0x100, store), (0x110, "RET.REL.NODEC R2 0x0")) == []


@pytest.mark.parametrize("case", predict.chosen(), ids=lambda case: case.name)
def test_a_prediction_calls_the_operator(case: Case) -> None:
    op, args = predict._call(case)
    inspect.signature(reference.KERNELS[op]).bind(*args)
    assert ("backward" in op) is (case.pass_ == "backward")
    main = [
        tensor for arg in args for tensor in (arg if isinstance(arg, list) else [arg]) if isinstance(tensor, Tensor)
    ]
    if op == "unpack_dequantize":
        assert args[4] == list(case.shapes[0]) and main[0].numel() == math.prod(args[4]) // 2
    else:
        assert {tuple(tensor.shape) for tensor in main} >= set(case.shapes)


def test_every_operator_is_predicted() -> None:
    for backend in (triton, cuda):
        served = {predict._call(case)[0] for case in predict.chosen() if predict.serves(backend.NAME, case)}
        assert served == set(backend.KERNELS)


@recorded
@pytest.mark.parametrize("dtype", cases.HUGE)
def test_the_weights_of_resnet50_are_one_launch(dtype: str) -> None:
    case = case_named(f"foreach_dynamic_fake_quantize/axis0/resnet50@224.weights/{dtype}/contiguous/forward")
    op, args = predict._call(case)
    assert op == case.op and len(args[0]) == 54
    (launch,) = predict_cuda.record(op, args, MULTIPROCESSORS)
    assert launch.nbytes >= case.bytes_moved


@pytest.fixture(scope="module")
def predicted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of a few predictions, made by the command."""
    pytest.importorskip("triton", reason="triton is not installed")
    path = tmp_path_factory.mktemp("predictions") / "predictions-h200.json"
    filters = ("--filter", "float32/contiguous", "--filter", "*ke_quantize/[!a]*")
    result = run("predict", "--json", str(path), *filters)
    assert result.exit_code == 0, result.output
    return path


def test_predictions(predicted: Path) -> None:
    content = store.read(predicted)
    assert {row["op"] for row in content["rows"]} >= {"fake_quantize", "observe_fake_quantize"}
    for row in content["rows"]:
        assert row["bytes_per_element"] * row["nbytes"] / 4 == pytest.approx(row["bytes_moved"], rel=0.02), row["case"]
        assert 0.1 < row["fraction_of_copy"] <= 1.0001 and row["instructions_per_element"] > 1
        # 4.8 TB/s, of which a copy gets 92 %.
        assert row["predicted_us"] > row["bytes_moved"] / 4.5e6
        for launch in row["launches"]:
            assert launch["registers"] <= 255 and launch["spilled_bytes"] == 0 and launch["programs"] >= 1
    (in_turn,) = [row for row in content["rows"] if row["op"] == "observe_fake_quantize"]
    assert len(in_turn["launches"]) == 3 and in_turn["bound_by"] == "memory"


def test_predictions_are_shown_as_such(predicted: Path, tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    page.write_text(f"{readme.BEGIN}\n{readme.END}\n")
    assert readme.update(page, predicted.parent) == [page] and readme.stale(page, predicted.parent) == []
    assert "NVIDIA H200: predicted, not yet run on a GPU" in page.read_text()
    assert "| `fake_quantize` per_channel_clip backward | 1 | 1 |" in page.read_text()
    assert run("compare", str(predicted), str(predicted)).exit_code == 2
    assert run("judge", str(predicted)).exit_code == 2


def test_an_operator_that_cannot_be_compiled_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    monkeypatch.setitem(adadfq.ops.triton.KERNELS, "fake_quantize", raising)
    result = run("predict", "--filter", "fake_quantize/per_tensor/*float32/contiguous*")
    assert result.exit_code == 2 and "cannot be compiled (ValueError: no kernel today" in result.output
    assert "gpu must be one of h200" in run("predict", "--gpu", "h300").output
    assert "no predicted case fits" in run("predict", "--filter", "nothing").output


# ---------------------------------------------------------------------------------------------------------- tuning


def test_tuning_needs_a_gpu(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    result = CliRunner().invoke(tune.main, [str(tmp_path / "configs.json")])
    assert result.exit_code == 2 and "error: tuning times kernels on a GPU" in result.output
    assert list(tmp_path.iterdir()) == []
    result = CliRunner().invoke(tune.main, [str(tmp_path / "nowhere" / "configs.json")])
    assert result.exit_code == 2 and "does not exist" in result.output


def test_every_choice_is_tuned_once() -> None:
    dtypes = ("float32", "bfloat16", "float16")
    keys = ["/".join(parts) for parts in itertools.product(configs.CONFIGS, dtypes, ("small", "large"))]
    assert [workload.key for workload in tune.workloads()] == keys


def test_the_default_stays_unless_another_is_clearly_faster() -> None:
    default, other = configs.CONFIGS["rows"][:2]
    assert tune.best({default: 1.0, other: 0.99}, default) == default
    assert tune.best({default: 1.0, other: 0.9}, default) == other
    assert tune.best({other: 1.0, default: 0.5}, default) == default


def test_configurations_are_timed_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADADFQ_TRITON_CONFIGS", "nowhere.json")
    before, seen = dict(configs.CONFIGS), []

    def time(call: Callable[[], object]) -> float:
        seen.append(call())
        return float(len(seen))

    found = tune.measure("rows", [lambda: configs.choose("rows", torch.float32, 10)], time)
    assert seen == list(before["rows"]) * tune.ROUNDS
    assert found == {config: 1.0 + i + len(found) for i, config in enumerate(before["rows"])}
    with pytest.raises(ZeroDivisionError):
        tune.measure("rows", [lambda: 1 // 0], time)
    assert before == configs.CONFIGS and os.environ["ADADFQ_TRITON_CONFIGS"] == "nowhere.json"


@pytest.mark.parametrize("family", configs.CONFIGS)
def test_what_is_tuned_depends_on_the_configuration(family: str) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    from benchmarks.compiled import compiling_for

    shapes = ((8, 16, 3, 3), (4, 8)) if family == "rows" else ((8, 16, 16, 16),)
    with predict._backend(), compiling_for(90) as launches:
        to_time = tune.calls(tune.Workload(family, torch.float32, shapes), "cpu")
        tune.measure(family, to_time, lambda call: float(call() is None))
    assert {launch.warps for launch in launches} >= {config.num_warps for config in configs.CONFIGS[family]}


def test_a_tuned_file_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = {
        workload.key: {config: 10.0 - i for i, config in enumerate(configs.CONFIGS[workload.family])}
        for workload in tune.workloads()
    }
    path = tmp_path / "configs.json"
    content = tune.document("a GPU", "3.0", measured)
    tune.write(path, content)
    assert json.loads(path.read_text()) == content and len(list(tmp_path.iterdir())) == 1
    monkeypatch.setenv("ADADFQ_TRITON_CONFIGS", str(path))
    for family, found in configs.CONFIGS.items():
        assert configs.choose(family, torch.bfloat16, 10**9) == found[-1]
    warps, vectors = configs.CONFIGS["rows"][0]
    assert content["times_ms"]["rows/float32/small"][f"{warps}x{vectors}"] == 10.0  # type: ignore[index]


# ---------------------------------------------------------------------------------------------------------- gpu.sh


GPU_SH = ["bash", str(ROOT / "benchmarks" / "gpu.sh")]


def gpu_sh(*arguments: str, cwd: Path = ROOT, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*GPU_SH, *arguments], env=os.environ | environ, capture_output=True, text=True, cwd=cwd)


STAGES = ("build", "tests", "sanitizer", "bench")


def test_gpu_sh_dry_run() -> None:
    done = gpu_sh("--dry-run", PYTHON=sys.executable)
    assert done.returncode == 0, done.stderr
    limits = [int(line.split()[-2]) for line in done.stdout.splitlines() if line.startswith("stage ")]
    assert len(limits) == len(STAGES) and sum(limits) <= 560
    for text in (
        "pip install",
        "-m gpu tests/test_gpu",
        "compute-sanitizer --tool racecheck",
        "-m benchmarks ops --device cuda",
        "-m benchmarks routes",
    ):
        assert text in done.stdout


@pytest.mark.parametrize(
    ("campaign", "stages"),
    [
        (
            "ops",
            [
                *("build", "tests", "sanitizer", "ceilings", "bench"),
                *("predicted", "judged", "against", "tune", "suite"),
            ],
        ),
        (
            "training",
            ["build", "equality", "step", "profile", "accuracy", "schedule", "efficientnet", "endurance"],
        ),
    ],
)
def test_gpu_sh_dry_run_of_a_campaign(campaign: str, stages: list[str]) -> None:
    # The stages before are those of the shorter set, which the test above looks at.
    first = "ceilings" if campaign == "ops" else "build"
    begin = [] if first == "build" else ["--from", first]
    done = gpu_sh(campaign, "--dry-run", *begin, PYTHON=sys.executable)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines() if line.startswith("stage ")]
    assert [words[1].strip(":") for words in lines] == stages
    # Each in a command of less than ten minutes.
    limits = [int(words[-2]) for words in lines if "most" in words]
    assert len(limits) == len(stages[stages.index(first) :]) and max(limits) < 600


def test_gpu_sh_has_all_tests_that_are_for_a_gpu() -> None:
    """By the names of their files, so that eight processes need not collect the others."""
    mark = re.compile(r"^\s*(@|pytestmark = )?pytest\.mark\.gpu\b", re.MULTILINE)
    marked = {path.name for path in (ROOT / "tests").glob("test_*.py") if mark.search(path.read_text())}
    found = gpu_sh("--dry-run", "--only", "tests", PYTHON=sys.executable).stdout
    assert marked and all(f"tests/{name}" in found for name in marked)


@pytest.mark.parametrize("authors", ["", "checkout"])
def test_gpu_sh_has_a_stage_for_steps_of_all_sizes(tmp_path: Path, authors: str) -> None:
    """Which is not among the others, for its time."""
    (tmp_path / "checkout").mkdir()
    done = gpu_sh("--dry-run", "--only", "step", PYTHON=sys.executable, AUTHORS=authors, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (stage,) = (line for line in done.stdout.splitlines() if line.startswith("stage "))
    assert int(stage.split()[-2]) < 600
    assert "-m benchmarks step --device cuda --suite gpu" in done.stdout
    assert (f"--authors {tmp_path / authors}" in done.stdout) == bool(authors)


@pytest.mark.parametrize("authors", ["", "checkout"])
def test_gpu_sh_has_a_stage_for_accuracy(tmp_path: Path, authors: str) -> None:
    (tmp_path / "checkout").mkdir()
    files = {"WEIGHTS": "teacher.safetensors", "DATA": str(tmp_path / "images.zip"), "AUTHORS": authors}
    done = gpu_sh("--dry-run", "--only", "accuracy", "here", PYTHON=sys.executable, cwd=tmp_path, **files)
    assert done.returncode == 0, done.stderr
    (stage,) = (line for line in done.stdout.splitlines() if line.startswith("stage "))
    assert int(stage.split()[-2]) < 600
    commands = [line for line in done.stdout.splitlines() if line.startswith("+ ")]
    names = ["plus", "paper", "authors"] if authors else ["plus", "paper"]
    for name, command in zip(names, commands, strict=True):
        study = "paper" if name == "authors" else name
        assert f"-m benchmarks accuracy resnet20 --study {study} --device cuda" in command
        assert f"--weights {tmp_path}/teacher.safetensors --data {tmp_path}/images.zip" in command
        assert f"--json {tmp_path / 'here'}/accuracy-{name}-cuda.json" in command
        assert (f"--authors {tmp_path / 'checkout'}" in command) == (name == "authors")
    assert not (tmp_path / "here").exists()


@pytest.fixture
def machinery(tmp_path: Path) -> Path:
    """Stand-ins for Python and compute-sanitizer that log their arguments; git that knows a commit.

    The first two exit with what the file "status" says where they are asked what a line of the file "fail" matches.
    """
    scripts = {
        "git": f'case "$*" in *rev-parse*) echo c0ffee ;; *status*) cat "{tmp_path}/dirty" 2>/dev/null || true ;; esac',
    }
    for name in ("python", "compute-sanitizer"):
        scripts[name] = (
            f'echo "{name} $*" >>"{tmp_path}/log"\n'
            f'if echo "$*" | grep -q -s -f "{tmp_path}/fail"; then exit $(cat "{tmp_path}/status"); fi'
        )
    (tmp_path / "bin").mkdir()
    for name, script in scripts.items():
        path = tmp_path / "bin" / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
    return tmp_path


@pytest.fixture
def standing_in(machinery: Path) -> dict[str, str]:
    return {"PATH": f"{machinery / 'bin'}:{os.environ['PATH']}", "PYTHON": "python"}


def fail(machinery: Path, pattern: str, status: int) -> None:
    (machinery / "fail").write_text(pattern + "\n")
    (machinery / "status").write_text(str(status))


def stamped(results: Path) -> list[str]:
    return [stage for stage in STAGES if (results / f".stage-{stage}").exists()]


def test_gpu_sh_goes_on_where_it_stopped(machinery: Path, standing_in: dict[str, str]) -> None:
    results, log = machinery / "results", machinery / "log"
    fail(machinery, "-m gpu tests/", 5)
    first = gpu_sh(str(results), **standing_in)
    assert first.returncode == 1 and "exit status 5 of: python -m pytest" in first.stderr
    assert "stage tests failed" in first.stderr and stamped(results) == ["build"]

    (machinery / "fail").unlink()
    log.unlink()
    second = gpu_sh(str(results), **standing_in)
    assert second.returncode == 0, second.stderr
    assert "stage build: done at this commit, skipped" in second.stdout
    assert "pip install" not in log.read_text() and log.read_text().count("compute-sanitizer --tool") == 4
    assert stamped(results) == list(STAGES)
    assert gpu_sh(str(results), **standing_in).stdout.count("skipped") == 4

    # Stamps of another commit do not count; --only, --from and --fresh run what they say.
    (results / ".stage-bench").write_text("another\n")
    done = gpu_sh(str(results), **standing_in)
    assert done.stdout.count("skipped") == 3 and "stage bench: at most" in done.stdout
    assert gpu_sh("--only", "tests", str(results), **standing_in).stdout.count("not asked for") == 3
    done = gpu_sh("--from", "sanitizer", str(results), **standing_in)
    assert done.stdout.count("not asked for") == 2 and done.stdout.count("at most") == 2
    assert gpu_sh("--fresh", str(results), **standing_in).stdout.count("at most") == 4

    # A stage that fails now has not been done, whatever it did before.
    fail(machinery, "-m gpu tests/", 5)
    assert gpu_sh("--only", "tests", str(results), **standing_in).returncode == 1
    assert stamped(results) == ["build", "sanitizer", "bench"]


def test_gpu_sh_trains_where_it_is_told_of_a_teacher_and_images(machinery: Path, standing_in: dict[str, str]) -> None:
    files = {"WEIGHTS": "teacher.safetensors", "DATA": "images.zip", "AUTHORS": ""}
    arguments = ("--only", "accuracy", str(machinery / "results"))
    for left_out in ("WEIGHTS", "DATA"):
        done = gpu_sh(*arguments, **standing_in, **{**files, left_out: ""})
        assert done.returncode == 1 and "stage accuracy needs WEIGHTS, the teacher's weights, and DATA" in done.stderr
        assert "-m benchmarks" not in (machinery / "log").read_text()
    done = gpu_sh(*arguments, **standing_in, **files)
    assert done.returncode == 0, done.stderr
    made = [line.split() for line in (machinery / "log").read_text().splitlines() if "-m benchmarks" in line]
    assert [words[words.index("--study") + 1] for words in made] == ["plus", "paper"]
    # Among the others it is not.
    assert "stage accuracy" not in gpu_sh("--fresh", str(machinery / "results"), **standing_in, **files).stdout


def test_gpu_sh_begins_what_fits_and_goes_on(machinery: Path, standing_in: dict[str, str]) -> None:
    files = {"WEIGHTS": "", "DATA": "", "IMAGES": "", "AUTHORS": ""}
    begun, notes = [], []
    for seconds in ("300", "300", "570"):
        done = gpu_sh("training", "--seconds", seconds, str(machinery / "results"), **standing_in, **files)
        assert done.returncode == 0, done.stderr
        begun.append([line.split()[1] for line in done.stdout.splitlines() if "at most" in line])
        notes.append("note: stage endurance and what follows do not fit into 300 s" in done.stdout)
    # A stage that can go on later gets what is left.
    assert begun == [["build:", "equality:", "step:", "profile:"], [], ["endurance:"]]
    assert notes == [True, True, False]
    for stage in ("accuracy", "schedule", "efficientnet"):
        assert f"note: stage {stage} was left out: it needs" in done.stdout


@pytest.mark.parametrize("seconds", ["300", "700"])
def test_a_stage_of_less_time_hands_it_to_its_cases(machinery: Path, standing_in: dict[str, str], seconds: str) -> None:
    done = gpu_sh("--only", "predicted", "--seconds", seconds, str(machinery / "results"), **standing_in)
    assert done.returncode == 0, done.stderr
    (stage,) = re.findall("stage predicted: at most ([0-9]+) s", done.stdout)
    (made,) = (line.split() for line in (machinery / "log").read_text().splitlines() if "benchmarks ops" in line)
    # 80 s are for what begins last, and for the start.
    assert int(made[made.index("--limit") + 1]) == int(stage) - 80
    assert int(stage) == 560 if seconds == "700" else 290 < int(stage) <= 300
    looked = gpu_sh("--dry-run", "--only", "predicted", "--seconds", seconds, **standing_in).stdout
    (stage,) = re.findall("stage predicted: at most ([0-9]+) s", looked)
    assert f"--limit {int(stage) - 80} " in looked


@pytest.mark.parametrize("seconds", ["", "300"])
def test_a_stage_of_less_time_than_its_limit_is_not_complete(
    machinery: Path, standing_in: dict[str, str], seconds: str
) -> None:
    script = machinery / "bin" / "timeout"  # of the stage: its limit is over
    script.write_text("#!/bin/sh\nexit 124\n")
    script.chmod(0o755)
    given = ["--seconds", seconds] if seconds else []
    done = gpu_sh("training", "--only", "step", *given, str(machinery / "results"), **standing_in)
    assert done.returncode == (0 if seconds else 1)
    assert ("note: stage step is not complete after the" in done.stdout) == bool(seconds)
    assert ("stage step took longer than 560 s" in done.stderr) == (not seconds)
    assert not (machinery / "results" / ".stage-step").exists() and "all stages" not in done.stdout


def test_a_campaign_goes_on_after_a_stage_that_fails(machinery: Path, standing_in: dict[str, str]) -> None:
    results = machinery / "results"
    fail(machinery, "benchmarks ceilings", 5)
    done = gpu_sh("ops", str(results), **standing_in)
    assert done.returncode == 1 and "stage ceilings failed (1)" in done.stderr and "all stages" not in done.stdout
    assert (results / ".stage-suite").exists() and not (results / ".stage-ceilings").exists()
    (machinery / "fail").unlink()
    done = gpu_sh("ops", str(results), **standing_in)
    assert done.returncode == 0 and done.stdout.count("skipped") == 9 and "all stages are done" in done.stdout
    fail(machinery, "pip install", 5)
    done = gpu_sh("ops", "--fresh", str(results), **standing_in)
    assert done.returncode == 1 and "stage tests" not in done.stdout  # nothing is there to be tested


def test_sources_without_git_are_known_by_their_digest(machinery: Path, standing_in: dict[str, str]) -> None:
    (machinery / "bin" / "git").write_text("#!/bin/sh\nexit 128\n")
    results = machinery / "results"
    done = gpu_sh("--only", "build", str(results), **standing_in)
    assert done.returncode == 0 and "not a clean checkout" not in done.stdout
    assert (results / ".stage-build").read_text().startswith("sources-")


@pytest.mark.parametrize("status", [3, 77, 78])
@pytest.mark.parametrize("pattern", ["pip install", "-m gpu tests/", "--tool racecheck", "benchmarks step"])
def test_gpu_sh_fails_whatever_the_status(
    machinery: Path, standing_in: dict[str, str], pattern: str, status: int
) -> None:
    fail(machinery, pattern, status)
    done = gpu_sh(str(machinery / "results"), **standing_in)
    assert done.returncode == 1 and f"exit status {status} of:" in done.stderr and "failed" in done.stderr


def test_gpu_sh_makes_routes_of_the_times(machinery: Path, standing_in: dict[str, str]) -> None:
    done = gpu_sh("--only", "bench", str(machinery / "results"), **standing_in)
    assert done.returncode == 0, done.stderr
    made = [line.split() for line in (machinery / "log").read_text().splitlines() if "-m benchmarks" in line]
    assert [words[3] for words in made] == ["ops", "routes", "step"]
    times = made[0][made[0].index("--json") + 1]
    assert made[1][4:] == [times, "--out", str(machinery / "results" / readme.ROUTES)]


def test_a_table_of_routes_is_no_file_of_results(tmp_path: Path) -> None:
    shutil.copy(routes.DEFAULT, tmp_path / readme.ROUTES)
    page = tmp_path / "README.md"
    page.write_text(f"{readme.BEGIN}\n{readme.END}\n")
    assert readme.update(page, tmp_path) == [page] and readme.stale(page, tmp_path) == []


def test_gpu_sh_says_what_it_left_out(machinery: Path, standing_in: dict[str, str]) -> None:
    results = machinery / "results"
    (machinery / "bin" / "compute-sanitizer").unlink()
    fail(machinery, "left_out", 1)  # the look into the file of results
    done = gpu_sh(str(results), **standing_in)
    if shutil.which("compute-sanitizer") is None:
        assert "note: stage sanitizer was left out" in done.stdout and stamped(results) == ["build", "tests"]
    assert done.returncode == 0 and "note: stage bench is not complete" in done.stdout


def test_gpu_sh_goes_on_after_a_case_that_hangs(machinery: Path, standing_in: dict[str, str]) -> None:
    fail(machinery, "benchmarks ops", turns.EXIT_UNFINISHED)
    results = machinery / "results"
    done = gpu_sh(str(results), **standing_in)
    assert done.returncode == 0 and "note: stage bench is not complete" in done.stdout
    made = [line.split()[3] for line in (machinery / "log").read_text().splitlines() if "-m benchmarks" in line]
    assert made == ["ops", "step"] and "bench" not in stamped(results)  # routes want times of all
    # What fails otherwise fails, whatever was unfinished before.
    (machinery / "fail").write_text("benchmarks ops\n")
    script = machinery / "bin" / "python"
    script.write_text(f'{script.read_text()}case "$*" in *"benchmarks step"*) exit 1 ;; esac\n')
    done = gpu_sh("--only", "bench", str(results), **standing_in)
    assert done.returncode == 1 and "exit status 1 of:" in done.stderr


def test_gpu_sh_leaves_no_stamps_where_files_are_changed(machinery: Path, standing_in: dict[str, str]) -> None:
    (machinery / "dirty").write_text(" M setup.py\n")
    done = gpu_sh(str(machinery / "results"), **standing_in)
    assert done.returncode == 0 and "not a clean checkout" in done.stdout
    assert stamped(machinery / "results") == []


def test_gpu_sh_takes_paths_from_where_it_is_called(machinery: Path, standing_in: dict[str, str]) -> None:
    done = gpu_sh("here", cwd=machinery, **(standing_in | {"PYTHON": "bin/python"}))
    assert done.returncode == 0, done.stderr
    assert stamped(machinery / "here") == list(STAGES)
    command = ["bash", "gpu.sh", "--only", "build", str(machinery / "here")]
    again = subprocess.run(command, env=os.environ | standing_in, cwd=ROOT / "benchmarks", capture_output=True)
    assert again.returncode == 0, again.stderr


def test_gpu_sh_takes_its_stage_along(machinery: Path, standing_in: dict[str, str]) -> None:
    script = machinery / "bin" / "python"
    script.write_text(f'{script.read_text()}case "$*" in *pip\\ install*) sleep 60; touch "{machinery}/late" ;; esac\n')
    # Where the tests run in the background, interrupts are ignored, and a shell cannot undo that.
    process = subprocess.Popen(
        [*GPU_SH, str(machinery / "results")],
        env=os.environ | standing_in,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while "pip install" not in ((machinery / "log").read_text() if (machinery / "log").exists() else ""):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    # Its pipes are closed when the last process of the stage has gone.
    _, error = process.communicate(timeout=20)
    assert process.returncode == 1 and "interrupted" in error and not (machinery / "late").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--only", "compile"), "must be followed by a stage, see the head of this file, got 'compile'"),
        (("--seconds", "soon"), "--seconds must be followed by a whole number, got 'soon'"),
        (("ops", "--toy", "here"), "--toy is for the set training"),
        (("training", "--toy"), "--toy needs RESULTS"),
        (("--only", "build", "--from", "tests"), "exclude each other"),
        (("--quick",), "unknown option --quick"),
        (("a", "b"), "one results directory is enough"),
    ],
)
def test_gpu_sh_says_what_is_wrong(arguments: tuple[str, ...], message: str) -> None:
    done = gpu_sh(*arguments, PYTHON="python-that-is-not-there")
    assert done.returncode == 1 and message in done.stderr
