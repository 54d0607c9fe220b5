"""The command line: options, errors, and one run from weights to scores."""

import dataclasses
import io
import json
import subprocess
import sys
import zipfile

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

import adadfq.cli
import adadfq.info
from adadfq.checkpoint import write_state_dict
from adadfq.cli import NOT_OPTIONS, main, recipe_options
from adadfq.models import build_model
from adadfq.recipe import Recipe


def run(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments], catch_exceptions=False)


def fails(*arguments):
    """Standard error of a command that must end in an error of adadfq's own: one line, exit code 2."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == "" and result.stderr.count("\n") == 1 and result.stderr.startswith("error: ")
    return result.stderr


@pytest.mark.parametrize("arguments", [[], ["demo"], ["quantize"], ["evaluate"], ["info"]])
def test_help(arguments):
    result = run(*arguments, "--help")
    assert result.exit_code == 0 and "Usage:" in result.stdout and result.stderr == ""


def test_version_is_the_packages():
    assert run("--version").stdout == f"adadfq {adadfq.__version__}\n"


def test_python_dash_m():
    done = subprocess.run([sys.executable, "-m", "adadfq", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("adadfq ")


def test_every_recipe_field_is_an_option_with_its_help():
    options = {option.name: option for option in recipe_options()}
    fields = {field.name: field for field in dataclasses.fields(Recipe) if field.name not in NOT_OPTIONS}
    assert set(options) == set(fields)
    text = " ".join(run("quantize", "--help").stdout.split())
    for name, option in options.items():
        assert option.help == fields[name].metadata["help"] and "--" + name.replace("_", "-") in text
    own = [param.name for param in main.commands["quantize"].params]
    assert not set(own) & set(options)
    assert all(name in text for name in Recipe.names())


def parse(*arguments):
    """Recipe overrides that `quantize` gets from these options."""
    command = main.commands["quantize"]
    needed = ["net", "--recipe", "r", "--weight-bits", "4", "--act-bits", "4", "--out", "o"]
    params = command.make_context("quantize", [*needed, *arguments]).params
    return {option.name: params[option.name] for option in recipe_options() if params[option.name] is not None}, params


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], {}),
        (["--epochs", "8", "--lr-student", "1e-3"], {"epochs": 8, "lr_student": 1e-3}),
        (["--lr-milestones", "10,20,30"], {"lr_milestones": (10, 20, 30)}),
        (["--lr-milestones", ""], {"lr_milestones": ()}),
        (["--mean", "0.5", "--std", "0.25, 0.5,1"], {"mean": (0.5,), "std": (0.25, 0.5, 1.0)}),
        (["--no-nesterov", "--detach-min"], {"nesterov": False, "detach_min": True}),
        (["--generator", "conditional_bn"], {"generator": "conditional_bn"}),
    ],
)
def test_recipe_options_parse(arguments, expected):
    assert parse(*arguments)[0] == expected
    Recipe.named("cifar10_resnet20", weight_bits=4, **{k: v for k, v in expected.items() if k not in ("mean", "std")})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lr-milestones", "1,x"], "expected int numbers separated by commas, got '1,x'"),
        (["--generator", "gan"], "is not one of 'label_embedding', 'conditional_bn'"),
        (["--epochs", "many"], "not a valid integer"),
        (["--model-arg", "num_classes"], "expected key=value, got 'num_classes'"),
        (["--nonsense", "1"], "No such option"),
    ],
)
def test_bad_options_are_usage_errors(arguments, message):
    result = run("quantize", "net", "--recipe", "r", "--weight-bits", 4, "--act-bits", 4, "--out", "o", *arguments)
    assert result.exit_code == 2 and message in result.stderr


def test_model_arguments():
    items = ["n=5", "rate=0.5", "on=true", "off=False", "none=None", "text=abc", "shape=[1, 2]", "eq=a=b", 'quoted="5"']
    params = parse(*(part for item in items for part in ("--model-arg", item)))[1]
    assert params["model_args"] == {
        "n": 5,
        "rate": 0.5,
        "on": True,
        "off": False,
        "none": None,
        "text": "abc",
        "shape": [1, 2],
        "eq": "a=b",
        "quoted": "5",
    }


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    write_state_dict(path, build_model("resnet20", num_classes=4).state_dict())
    return path


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    path = tmp_path_factory.mktemp("images") / "images.zip"
    rng = np.random.default_rng(0)
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(12):
            data = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(data, "PNG")
            archive.writestr(f"images/class{i % 4}/{i}.png", data.getvalue())
    return path


TINY = [
    *("--recipe", "cifar10_resnet20", "--weight-bits", 4, "--act-bits", 3, "--model-arg", "num_classes=4"),
    *("--num-classes", 4, "--image-size", 16, "--epochs", 2, "--steps-per-epoch", 2, "--batch-size", 4),
    *("--warmup-epochs", 1, "--calibration-epochs", 1, "--latent-dim", 8, "--seed", 1, "--device", "cpu"),
]


@pytest.fixture(scope="module")
def result_directory(teacher, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "tiny"
    result = run("quantize", "resnet20", "--weights", teacher, *TINY, "--out", out)
    assert result.exit_code == 0, result.output
    assert f"complete: {out}" in result.stdout
    return out


def test_quantize_writes_what_was_asked_for(result_directory):
    record = adadfq.result.read_result(result_directory)
    assert record["model"] == {"spec": "resnet20", "kwargs": {"num_classes": 4}}
    assert record["quantization"]["weight_bits"] == 4 and record["quantization"]["act_bits"] == 3
    assert record["seed"] == 1 and record["status"] == "complete"
    assert (record["recipe"]["epochs"], record["recipe"]["latent_dim"]) == (2, 8)


def test_the_default_recipe_takes_the_number_of_classes_from_the_model(teacher, tmp_path):
    short = [*TINY[2:8], *TINY[10:]]
    assert "cifar10_resnet20" not in short and "--num-classes" not in short
    result = run("quantize", "resnet20", "--weights", teacher, *short, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "num_classes=4, as many as resnet20 has logits" in result.stderr
    recipe = adadfq.result.read_result(tmp_path / "out")["recipe"]
    assert (recipe["name"], recipe["num_classes"], recipe["learn_steps"]) == ("adadfq_plus", 4, True)


def test_other_classes_than_the_default_recipes_need_the_size_of_their_images(teacher, tmp_path):
    short = [*TINY[2:8], "--epochs", 9, "--out", tmp_path / "out"]
    assert "has 4 classes: say what images it takes" in fails("quantize", "resnet20", "--weights", teacher, *short)
    text = fails("quantize", "resnet20", "--weights", teacher, "--recipe", "cifar10_resnet20", *short)
    assert "4 classes" in text and "the recipe 10" in text
    assert not (tmp_path / "out").exists()


def test_evaluate_prints_a_table(result_directory, images):
    result = run("evaluate", result_directory, "--data", images, "--device", "cpu")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0] == f"{images}: 12 images, 4 classes"
    assert lines[2].split()[0] == "teacher" and lines[3].split()[:2] == ["student", "4w3a"]


def test_evaluate_as_json_to_stdout_and_to_a_file(result_directory, images, tmp_path):
    result = run("evaluate", result_directory, "--data", images, "--json", "--batch-size", 5)
    scores = json.loads(result.stdout)
    assert scores["images"] == 12 and scores["status"] == "complete"
    for name in ("teacher", "student"):
        assert scores[name]["count"] == 12
        assert scores[name]["top1"] == pytest.approx(100 * scores[name]["correct"] / 12)
    result = run("evaluate", result_directory, "--data", images, "--json", tmp_path / "x.json")
    assert "teacher" in result.stdout
    assert json.loads((tmp_path / "x.json").read_text())["student"] == scores["student"]


def test_evaluate_uses_the_given_model_and_settings(result_directory, images):
    base = ["evaluate", result_directory, "--data", images, "--json"]
    given = run(*base, "--model", "adadfq.models:resnet20", "--model-arg", "num_classes=4")
    assert json.loads(given.stdout)["student"] == json.loads(run(*base).stdout)["student"]
    assert "do not fit" in fails(*base, "--model", "resnet32", "--model-arg", "num_classes=4")
    assert "std must be positive" in fails(*base, "--std", "0,1,1")
    assert "mean must be 3 finite" in fails(*base, "--mean", "0.5")
    assert "--model-arg is for --model" in fails(*base, "--model-arg", "num_classes=4")


def test_evaluate_refuses_unknown_model_code_without_consent(result_directory, images, tmp_path):
    code = tmp_path / "net.py"
    code.write_text(
        "import pathlib\npathlib.Path(__file__).with_name('executed').touch()\n"
        "from adadfq.models import resnet20 as Net\n"
    )
    file = result_directory / "result.json"
    original = file.read_text()
    try:
        record = json.loads(original)
        record["model"]["spec"] = f"{code}:Net"
        file.write_text(json.dumps(record))
        assert "--trust-model-code" in fails("evaluate", result_directory, "--data", images)
        assert not (tmp_path / "executed").exists()
        result = run("evaluate", result_directory, "--data", images, "--trust-model-code")
        assert result.exit_code == 0 and (tmp_path / "executed").exists()
    finally:
        file.write_text(original)


def quantize_fails(teacher, tmp_path, *changes, model="resnet20"):
    text = fails("quantize", model, "--weights", teacher, *TINY, "--out", tmp_path / "out", *changes)
    assert not (tmp_path / "out").exists()
    return text


def test_quantize_refuses_bad_input_before_writing(teacher, tmp_path):
    def refused(*changes, **other):
        return quantize_fails(teacher, tmp_path, *changes, **other)

    assert "weight_bits must be 2..8, got 9" in refused("--weight-bits", 9)
    assert "act_bits must be 2..8, got 1" in refused("--act-bits", 1)
    assert "recipe must be one of" in refused("--recipe", "nope")
    assert "model must be a built-in" in refused(model="resnet99")
    assert "do not fit CifarResNet" in refused("--model-arg", "num_classes=5")
    assert "classes" in refused("--num-classes", 5)
    assert "device must be auto, cpu, cuda or cuda:i, got 'tpu9'" in refused("--device", "tpu9")
    assert "device must be auto" in refused("--device", "mps")
    assert "epochs must be at least 1, got 0" in refused("--epochs", 0)
    assert "does not exist" in refused("--weights", tmp_path / "no.pt")
    if not torch.cuda.is_available():
        assert "torch sees no CUDA device; use --device auto" in refused("--device", "cuda")


def test_quantize_needs_weights_for_a_builtin(tmp_path):
    assert "give them with --weights" in fails("quantize", "resnet20", *TINY, "--out", tmp_path / "out")


def test_quantize_refuses_an_existing_directory_first(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    text = fails("quantize", "no_such_model", *TINY, "--out", tmp_path / "out")
    assert "exists and is not empty" in text


def test_evaluate_errors(tmp_path, images, result_directory):
    assert str(tmp_path) in fails("evaluate", tmp_path, "--data", images)
    assert "does not exist" in fails("evaluate", result_directory, "--data", tmp_path / "no.zip")


def test_info():
    text = run("info").stdout
    facts = json.loads(run("info", "--json").stdout)
    assert facts["adadfq"] == adadfq.__version__ and facts["torch"] == torch.__version__
    for op, row in facts["operators"]["cpu"].items():
        assert op in text and row["serves"] in ("cpu", "reference") and row["why_not"]["reference"] is None
    assert set(facts["operators"]) == {"cpu", "cuda"}
    assert facts["triton"]["version"] or facts["triton"]["why_not"] in text


def test_info_reports_a_backend_that_cannot_serve(monkeypatch):
    monkeypatch.setenv("ADADFQ_BACKEND", "triton")
    facts = json.loads(run("info", "--json").stdout)
    row = facts["operators"]["cpu"]["fake_quantize"]
    assert row["serves"] is None and "triton" in row["error"]
    assert "error: " in run("info").stdout
    monkeypatch.setenv("ADADFQ_BACKEND", "nonsense")
    assert "nonsense" in run("info").stdout


def test_ctrl_c_ends_with_130(monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(adadfq.info, "collect", stop)
    result = run("info")
    assert result.exit_code == 130 and result.stderr == "interrupted\n"


def test_bugs_keep_their_traceback(monkeypatch):
    def bug(*_, **__):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(adadfq.info, "collect", bug)
    with pytest.raises(ZeroDivisionError):
        run("info")


def test_demo_names_the_missing_package(monkeypatch):
    find = adadfq.cli.importlib.util.find_spec
    monkeypatch.setattr(
        adadfq.cli.importlib.util, "find_spec", lambda name, *a: None if name == "matplotlib" else find(name, *a)
    )
    if find("sklearn") is None:
        pytest.skip("needs scikit-learn")
    assert "needs matplotlib, which is not installed; run: pip install -e '.[demo]'" in fails("demo")


def test_all_commands_are_there():
    assert set(main.commands) == {"demo", "quantize", "evaluate", "info"}
    assert all(isinstance(command, click.Command) for command in main.commands.values())
