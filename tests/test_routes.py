"""The choice between the GPU backends: the table, what is done with it, and how times make one; no GPU is needed."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

import adadfq
from adadfq import info
from adadfq.cli import main as cli
from adadfq.errors import BackendError, InvalidInputError
from adadfq.ops import cuda, dispatch, operators, routes, triton
from adadfq.ops.schema import OPERATORS
from benchmarks import routes as making
from benchmarks import store
from benchmarks.__main__ import main
from benchmarks.cases import registry
from benchmarks.environment import describe

F32, BF16 = torch.float32, torch.bfloat16


def forget() -> None:
    """Choices, and the table in force, are kept while a process runs."""
    dispatch._select.cache_clear()
    routes.current.cache_clear()


@pytest.fixture(autouse=True)
def nothing_chosen(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test makes its own choices, whatever the environment asks for."""
    for name in ("ADADFQ_ROUTES", "ADADFQ_BACKEND"):
        monkeypatch.delenv(name, raising=False)
    forget()
    yield
    forget()


@pytest.fixture
def both(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both GPU backends say that they can be used."""
    for backend in (cuda, triton):
        monkeypatch.setattr(backend, "DEVICE_TYPE", "cuda")
        monkeypatch.setattr(backend, "why_unavailable", lambda: None)


@pytest.fixture
def use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Write a table of these rules and have ADADFQ_ROUTES name it."""

    def write(*rules: dict[str, Any], **other: Any) -> Path:
        path = tmp_path / f"routes-{len(list(tmp_path.iterdir()))}.json"
        content = {"format": routes.FORMAT, "version": routes.VERSION, "measured": None, "rules": list(rules)}
        path.write_text(json.dumps(content | other))
        monkeypatch.setenv("ADADFQ_ROUTES", str(path))
        forget()
        return path

    return write


# ---------------------------------------------------------------------------------------------------------- choosing


def test_the_table_of_the_package(both: None) -> None:
    table = routes.load(routes.DEFAULT)
    assert (table.measured is None) == (not table.rules)
    for op in OPERATORS:
        first = "triton" if op in operators.BATCH_NORM_ACT else "cuda"
        for size in (None, *routes.SIZES):
            assert dispatch.select(op, "cuda", F32, size) == (table.backend(op, F32, size) or first)


def test_classes_of_size() -> None:
    found = [routes.size_class(elements) for elements in (0, 2**16 - 1, 2**16, 2**22 - 1, 2**22, 2**40)]
    assert found == ["small", "small", "medium", "medium", "large", "large"]


def test_the_first_rule_that_fits_counts(both: None, use: Callable[..., Path]) -> None:
    use(
        {"op": "bn_match", "dtype": "bfloat16", "size": "small", "backend": "cuda", "ratio": 1.01, "cases": 3},
        {"op": "bn_match", "size": "small", "backend": "triton"},
        {"op": "bn_match", "dtype": "float16", "backend": "triton", "ratio": 2},
        {"op": "bn_match", "backend": "cuda"},
        {"op": "margin_loss", "backend": "triton"},
    )
    for op, dtype, size, expected in (
        ("bn_match", BF16, "small", "cuda"),
        ("bn_match", F32, "small", "triton"),
        ("bn_match", F32, "large", "cuda"),
        ("bn_match", F32, None, "cuda"),
        ("bn_match", torch.float16, "large", "triton"),
        ("bn_match", torch.float16, None, "triton"),
        ("margin_loss", F32, "medium", "triton"),
        ("bn_match_forward", F32, "small", "cuda"),
    ):
        assert dispatch.select(op, "cuda", dtype, size) == expected, (op, dtype, size)


def test_a_backend_asked_for_by_name_is_never_rerouted(
    both: None, use: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    use({"op": "bn_match", "backend": "triton"})
    for name in ("cuda", "triton", "reference"):
        with adadfq.use_backend(name):
            assert dispatch.select("bn_match", "cuda", F32, "small") == name
        monkeypatch.setenv("ADADFQ_BACKEND", name)
        assert dispatch.select("bn_match", "cuda", F32, "small") == name
    with adadfq.use_backend("auto"):
        assert dispatch.select("bn_match", "cuda", F32, "small") == "triton"


def test_a_backend_that_cannot_serve_is_passed_over(
    both: None, use: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    use({"op": "bn_match", "backend": "triton"}, {"op": "margin_loss", "backend": "cuda"})
    assert dispatch.select("bn_match", "cuda", torch.float64, "small") == "reference"
    monkeypatch.setattr(triton, "why_unavailable", lambda: "not installed")
    dispatch._select.cache_clear()
    assert dispatch.select("bn_match", "cuda", F32, "small") == "cuda"
    monkeypatch.setattr(cuda, "why_unavailable", lambda: "not built")
    dispatch._select.cache_clear()
    assert dispatch.select("bn_match", "cuda", F32, "small") == "reference"
    monkeypatch.setattr(triton, "why_unavailable", lambda: None)
    dispatch._select.cache_clear()
    assert dispatch.select("margin_loss", "cuda", F32, "small") == "triton"


def test_no_other_device_looks_at_the_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ADADFQ_ROUTES", str(tmp_path / "nowhere.json"))
    assert dispatch.select("bn_match", "cpu", F32) in ("cpu", "reference")
    assert dispatch.select("bn_match", "xpu", F32) == "reference"
    assert bool(adadfq.functional.bn_match(torch.randn(4, 3), torch.zeros(3), torch.ones(3)).isfinite())


class OnDevice(SimpleNamespace):
    """What the dispatcher asks of a CUDA tensor."""

    def __init__(self, elements: int) -> None:
        super().__init__(device=SimpleNamespace(type="cuda"), dtype=F32, numel=lambda: elements)


def test_a_call_is_routed_by_the_size_of_its_main_tensor(
    both: None, use: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    ops = ("bn_match", "bn_match_backward", "foreach_dynamic_fake_quantize")
    use(*({"op": op, "size": "medium", "backend": "triton"} for op in ops))
    served: list[str] = []
    for backend in (cuda, triton):
        for op in ops:
            monkeypatch.setitem(backend.KERNELS, op, lambda *_, name=backend.NAME: served.append(name))
    for elements, expected in ((2**16 - 1, "cuda"), (2**16, "triton"), (2**22, "cuda")):
        dispatch.call("bn_match", OnDevice(elements))
        dispatch.call("bn_match_backward", OnDevice(1), OnDevice(elements))
        assert served == [expected] * 2, elements
        served.clear()
    # All tensors of a list together.
    dispatch.call("foreach_dynamic_fake_quantize", [OnDevice(2**15)], [4], 0)
    dispatch.call("foreach_dynamic_fake_quantize", [OnDevice(2**15)] * 3, [4] * 3, 0)
    assert served == ["cuda", "triton"]


# ------------------------------------------------------------------------------------------------------- files, info


RULE = {"op": "bn_match", "backend": "triton"}


@pytest.mark.parametrize(
    "content,message",
    [
        ([], "is not a table of routes: 'format' must be 'adadfq-routes'"),
        ({"format": "adadfq-benchmarks"}, "is not a table of routes"),
        ({"version": 2}, "has version 2, expected 1"),
        ({"more": 1}, "must have format, version, measured and rules, got .*more"),
        ({"measured": {"git_commit": "c0ffee"}}, "measured must be null or name the GPU in 'device_name'"),
        ({"rules": {}}, "rules must be a list"),
        ({"rules": [RULE, "cuda"]}, "rule 1 must be an object, got 'cuda'"),
        ({"rules": [{"op": "bn_match"}]}, "rule 0 has no backend"),
        ({"rules": [{}]}, "rule 0 has no op and no backend"),
        ({"rules": [RULE | {"op": "relu"}]}, "rule 0: op must be one of .*bn_match.*, got 'relu'"),
        ({"rules": [RULE | {"backend": "reference"}]}, "backend must be one of cuda, triton, got 'reference'"),
        ({"rules": [RULE | {"dtype": "float64"}]}, "dtype must be one of bfloat16, float16, float32, got 'float64'"),
        ({"rules": [RULE | {"size": "huge"}]}, "size must be one of small, medium, large, got 'huge'"),
        ({"rules": [RULE | {"size": []}]}, "size must be one of small, medium, large, got \\[\\]"),
        (
            {"rules": [RULE | {"layout": "contiguous"}]},
            "'layout' must be one of op, backend, dtype, size, ratio, worst, cases",
        ),
        ({"rules": [RULE | {"ratio": "fast"}]}, "ratio must be a number, got 'fast'"),
        ({"rules": [RULE | {"worst": "slow"}]}, "worst must be a number, got 'slow'"),
        ({"rules": [RULE | {"cases": True}]}, "cases must be a number, got True"),
    ],
)
def test_what_is_no_table_is_refused(both: None, use: Callable[..., Path], content: Any, message: str) -> None:
    path = use(**content) if isinstance(content, dict) else use()
    if not isinstance(content, dict):
        path.write_text(json.dumps(content))
    with pytest.raises(BackendError, match=message) as refused:
        dispatch.select("margin_loss", "cuda", F32)
    assert str(refused.value).startswith(f"ADADFQ_ROUTES: {path}") and "unset ADADFQ_ROUTES" in str(refused.value)
    with adadfq.use_backend("triton"):
        assert dispatch.select("margin_loss", "cuda", F32) == "triton"


def test_a_file_that_cannot_be_read_is_refused(both: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADADFQ_ROUTES", str(tmp_path / "nowhere.json"))
    with pytest.raises(BackendError, match="cannot be read: No such file.*unset ADADFQ_ROUTES"):
        dispatch.select("bn_match", "cuda", F32)
    (tmp_path / "nowhere.json").write_text("{")
    with pytest.raises(BackendError, match="is not JSON"):
        dispatch.select("bn_match", "cuda", F32)
    # A mended file is read: a failure is not kept.
    (tmp_path / "nowhere.json").write_text(routes.DEFAULT.read_text())
    assert dispatch.select("bn_match", "cuda", F32) in routes.BACKENDS


def test_the_file_is_read_once_a_process(
    both: None, use: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = use({"op": "bn_match", "backend": "triton"}, {"op": "margin_loss", "backend": "triton"})
    assert dispatch.select("bn_match", "cuda", F32) == "triton"
    # Another operator, of which nothing was chosen yet, is served by the same table.
    path.write_text("{")
    monkeypatch.setenv("ADADFQ_ROUTES", str(tmp_path / "nowhere.json"))
    assert dispatch.select("margin_loss", "cuda", F32) == "triton"


def test_info_says_what_is_in_force(both: None, use: Callable[..., Path]) -> None:
    default = routes.load(routes.DEFAULT)
    found = info.collect()["routes"]
    assert found == {"override": None, "measured": default.measured, "rules": len(default.rules), "error": None}

    measured = {"device_name": "NVIDIA H200", "git_commit": "0123456789abcdef"}
    path = use({"op": "bn_match", "size": "small", "backend": "triton"}, measured=measured)
    found = info.collect()
    assert found["routes"] == {"override": str(path), "measured": measured, "rules": 1, "error": None}
    row = found["operators"]["cuda"]["bn_match"]
    assert row["serves"] == "cuda" and row["by_size"] == {"small": "triton"}
    assert found["operators"]["cuda"]["margin_loss"]["by_size"] == {}
    text = info.format_text(found)
    assert f"measured on NVIDIA H200 at commit 0123456789, 1 rules (ADADFQ_ROUTES: {path})" in text
    assert "bn_match, by size: small: triton" in text

    use()
    assert "not measured: cuda first (ADADFQ_ROUTES:" in info.format_text(info.collect())


def test_info_survives_a_bad_file(both: None, use: Callable[..., Path]) -> None:
    path = use({"op": "relu", "backend": "cuda"})
    result = CliRunner().invoke(cli, ["info"])
    assert result.exit_code == 0
    assert f"error: ADADFQ_ROUTES: {path}: rule 0: op must be one of" in result.stdout
    assert json.loads(CliRunner().invoke(cli, ["info", "--json"]).stdout)["operators"]["cpu"]["bn_match"]["serves"]


# ------------------------------------------------------------------------------------------------------------ making


CASES = {case.name: case for case in registry()}
SMALL = "resnet20@32.layer3.0.conv1/b16"  # 65536 elements, the first that are medium
LARGE = "resnet18@224.layer1.0.conv1/b128"
WEIGHTS = "foreach_dynamic_fake_quantize/axis0/resnet18@224.weights/float32/contiguous/forward"


@pytest.fixture(scope="module")
def environment() -> dict[str, Any]:
    found = describe(torch.device("cpu")) | {"device": "cuda", "device_name": "NVIDIA H200"}
    return found | {"git_commit": "0123456789abcdef", "git_dirty": False, "native_matches_sources": True}


@pytest.fixture
def results(environment: dict[str, Any]) -> Callable[..., dict[str, Any]]:
    """The content of a file: case -> (cuda's time, triton's), where None is a provider that is not there."""

    def make(times: dict[str, tuple[float | None, float | None]]) -> dict[str, Any]:
        content = store.document("ops", dict(environment), {})
        for name, pair in times.items():
            case = CASES[name]
            for backend, time in zip(("cuda", "triton", "reference"), (*pair, 1.0), strict=True):
                if time is None:
                    continue
                row = dict.fromkeys(store.FIELDS["ops"]) | {
                    "case": name,
                    "provider": "eager reference" if backend == "reference" else f"adadfq {backend}",
                    "backend": backend,
                    "status": "ok",
                    "p20_ms": time,
                    "p50_ms": time,
                    "p80_ms": time,
                    "op": case.op,
                    "variant": case.variant,
                    "where": case.where,
                    "layers": [],
                    "shapes": [list(shape) for shape in case.shapes],
                    "dtype": case.dtype,
                    "layout": case.layout,
                    "pass": case.pass_,
                    "nbytes": case.nbytes,
                    "bytes_moved": case.bytes_moved,
                }
                content["rows"].append(row | environment)
        store.validate(content, "synthetic results")
        return copy.deepcopy(content)

    return make


def rules(content: dict[str, Any]) -> dict[tuple[str, str, str], tuple[str, float, int]]:
    return {
        (rule["op"], rule["dtype"], rule["size"]): (rule["backend"], rule["ratio"], rule["cases"])
        for rule in content["rules"]
    }


def test_a_table_from_times(results: Callable[..., dict[str, Any]]) -> None:
    content = making.build(
        [
            results(
                {
                    # The median of four ratios, 1.5, 1.0, 1.1 and 9: of "both" too, where one operator runs.
                    f"fake_quantize/per_tensor/{LARGE}/float32/contiguous/forward": (1.5, 1.0),
                    f"fake_quantize/per_channel/{LARGE}/float32/contiguous/forward": (1.0, 1.0),
                    f"fake_quantize/per_channel/{LARGE}/float32/channels_last/forward": (2.2, 2.0),
                    f"fake_quantize/per_tensor/{LARGE}/float32/contiguous/both": (9.0, 1.0),
                    # Another dtype, another size; 5 % is not enough.
                    f"fake_quantize/per_tensor/{LARGE}/bfloat16/contiguous/forward": (1.05, 1.0),
                    f"fake_quantize/per_tensor/{SMALL}/float32/contiguous/forward": (1.0, 2.0),
                    # Backwards with an operator of their own, and without.
                    f"fake_quantize/per_tensor_clip/{LARGE}/float32/contiguous/backward": (3.0, 2.0),
                    f"bn_match_forward/-/{LARGE}/float32/contiguous/both": (9.0, 1.0),
                    f"bn_match_forward/-/{LARGE}/float32/contiguous/backward": (1.0, 3.0),
                    "margin_loss/-/logits/b16k10/float32/contiguous/both": (2.0, 1.0),
                    "margin_loss/-/logits/b16k10/float32/contiguous/backward": (9.0, 1.0),
                    # One provider is not there.
                    f"bn_match/-/{LARGE}/float32/contiguous/forward": (9.0, None),
                }
            ),
            results({WEIGHTS: (1.0, 1.5)}),
        ]
    )
    assert rules(content) == {
        ("fake_quantize", "float32", "large"): ("triton", 1.3, 4),
        ("fake_quantize", "bfloat16", "large"): ("cuda", 1.05, 1),
        ("fake_quantize", "float32", "medium"): ("cuda", 0.5, 1),
        ("fake_quantize_backward", "float32", "large"): ("triton", 1.5, 1),
        ("bn_match_forward_backward", "float32", "large"): ("cuda", 0.3333, 1),
        ("margin_loss", "float32", "small"): ("triton", 2.0, 1),
        ("foreach_dynamic_fake_quantize", "float32", "large"): ("cuda", 0.6667, 1),
    }
    assert content["measured"]["device_name"] == "NVIDIA H200"
    assert content["measured"]["git_commit"] == "0123456789abcdef" and content["measured"]["git_dirty"] is False


def test_times_of_different_runs_make_no_ratio(results: Callable[..., dict[str, Any]]) -> None:
    first, second = results({WEIGHTS: (1.0, None)}), results({WEIGHTS: (None, 1.0)})
    with pytest.raises(InvalidInputError, match="no case has a time of both cuda and triton"):
        making.build([first, second])


def test_operators_of_rows() -> None:
    """Every operator of the schema has a kind of row of its own."""
    found: dict[tuple[str, ...], tuple[str, ...]] = {}
    for case in registry():
        row = {"op": case.op, "variant": case.variant, "pass": case.pass_}
        kind = next((kind for kind in ("clip", "learned") if case.variant.endswith(f"_{kind}")), "")
        found[case.op, kind, case.pass_] = making.operators(row)
    assert (
        {ops[0] for ops in found.values() if len(ops) == 1}
        == {*operators.OPERATORS, *operators.PACKING, *operators.BATCH_NORM_ACT}
        == set(OPERATORS)
    )
    affine = "affine_act_fake_quantize"
    assert found[affine, "", "both"] == (affine, f"{affine}_backward")
    assert found["fake_quantize", "clip", "both"] == ("fake_quantize", "fake_quantize_backward")
    assert found[affine, "learned", "both"] == (affine, "affine_act_learned_fake_quantize_backward")
    assert found["entropy_distillation", "", "both"] == ("entropy_distillation",)
    assert found["entropy_distillation", "", "backward"] == ()
    assert found["bn_match", "", "backward"] == ("bn_match_backward",)


FORWARD = "fake_quantize/{}/" + LARGE + "/float32/{}/forward"


@pytest.mark.parametrize(
    ("ratios", "backend", "worst", "slower"),
    [
        # Cuda's by the median, and no case is slower by more than 5 %.
        ((0.8, 1.0, 1.05), "cuda", 1.05, {}),
        # Cuda's by the median, but it is the slower one by more on its worst case than triton on its own.
        ((0.9, 1.0, 1.5), "triton", 1.1111, {0: 1.11}),
        ((0.5, 1.0, 1.5), "cuda", 1.5, {2: 1.5}),
        # Triton's by the median.
        ((0.5, 1.2, 1.4), "cuda", 1.4, {2: 1.4, 1: 1.2}),
        ((0.96, 1.2, 1.4), "triton", 1.0417, {}),
        ((0.8, 1.2, 1.25), "triton", 1.25, {0: 1.25}),
    ],
)
def test_no_case_is_left_slower_than_need_be(
    results: Callable[..., dict[str, Any]],
    tmp_path: Path,
    ratios: tuple[float, ...],
    backend: str,
    worst: float,
    slower: dict[int, float],
) -> None:
    places = (("per_tensor", "contiguous"), ("per_channel", "contiguous"), ("per_channel", "channels_last"))
    names = [FORWARD.format(*place) for place in places]
    measured = results({name: (ratio, 1.0) for name, ratio in zip(names, ratios, strict=True)})
    # Two operators: no rule's business.
    both = results({f"bn_match_forward/-/{LARGE}/float32/contiguous/both": (9.0, 1.0)})
    content = making.build([measured, both])
    (rule,) = content["rules"]
    assert (rule["backend"], rule["ratio"], rule["worst"]) == (backend, sorted(ratios)[1], worst)
    found = making.left_slower([measured, both], content)
    assert [(case, name, round(factor, 2)) for case, name, factor in found] == [
        (names[i], backend, factor) for i, factor in slower.items()
    ]
    store.write(tmp_path / "ops-cuda.json", measured)
    output = run(tmp_path / "ops-cuda.json", "--out", tmp_path / "routes.json").output
    for i, factor in slower.items():
        assert f"{names[i]}: {backend} takes {factor:.2f} times the other's time" in output
    assert ("no case is left with a backend more than 5% slower" in output) is not bool(slower)
    assert routes.load(tmp_path / "routes.json").rules[0].backend == backend


def _change(content: dict[str, Any], key: str, value: object) -> None:
    content["environment"][key] = value


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda c: c.update(kind="step"), "made from files of 'ops', got one of kind 'step'"),
        (lambda c: _change(c, "device", "cpu"), "made from times on a GPU"),
        (lambda c: _change(c, "device_name", "another"), "the files differ in device_name: NVIDIA H200 and another"),
        (lambda c: _change(c, "git_commit", "c0ffee"), "the files differ in git_commit"),
        (lambda c: _change(c, "native_matches_sources", False), "were not those of csrc"),
        (
            lambda c: c["rows"][0].update(status="wrong", p50_ms=None, error="1 is not 2"),
            "cuda is wrong on .*1 is not 2",
        ),
        (lambda c: c["rows"][1].update(status="wrong", p50_ms=None, error="1 is not 2"), "triton is wrong on"),
    ],
)
def test_results_that_make_no_table(
    results: Callable[..., dict[str, Any]], change: Callable[[dict[str, Any]], None], message: str
) -> None:
    good, bad = results({WEIGHTS: (1.0, 1.0)}), results({WEIGHTS: (1.0, 1.0)})
    assert len(making.build([good, bad])["rules"]) == 1
    change(bad)
    with pytest.raises(InvalidInputError, match=message):
        making.build([good, bad])


def test_changed_files_are_said_to_be(results: Callable[..., dict[str, Any]]) -> None:
    good, changed = results({WEIGHTS: (1.0, 1.0)}), results({WEIGHTS: (1.0, 1.0)})
    _change(changed, "git_dirty", True)
    assert making.build([good, changed])["measured"]["git_dirty"] is True


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["routes", *map(str, arguments)])


def test_the_command_makes_what_the_dispatcher_takes(
    both: None, results: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = tmp_path / "ops-cuda.json", tmp_path / "routes.json"
    store.write(source, results({WEIGHTS: (1.2, 1.0), f"bn_match/-/{LARGE}/bfloat16/contiguous/forward": (1.0, 1.2)}))
    result = run(source, "--out", out)
    assert result.exit_code == 0, result.output
    assert "foreach_dynamic_fake_quantize" in result.output and "cuda / triton" in result.output
    assert [line.count('"op"') for line in out.read_text().splitlines() if '"op"' in line] == [1, 1]
    monkeypatch.setenv("ADADFQ_ROUTES", str(out))
    forget()
    assert dispatch.select("foreach_dynamic_fake_quantize", "cuda", F32, "large") == "triton"
    assert dispatch.select("foreach_dynamic_fake_quantize", "cuda", F32, "small") == "cuda"
    assert dispatch.select("bn_match", "cuda", BF16, "large") == "cuda"
    assert routes.current().measured is not None


def test_the_command_says_what_is_wrong(results: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    source = tmp_path / "ops-cuda.json"
    assert run(source, "--out", tmp_path / "routes.json").exit_code == 2
    store.write(source, results({WEIGHTS: (1.0, None)}))
    result = run(source, "--out", tmp_path / "routes.json")
    assert result.exit_code == 2 and "no case has a time of both" in result.output
    assert not (tmp_path / "routes.json").exists()
    assert run("--out", tmp_path / "routes.json").exit_code == 2 and run(source).exit_code == 2
