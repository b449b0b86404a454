"""The command line as a user meets it: every mistake is one line and exit code 2, every command shows its help."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import opsdl
from opsdl.cli.main import main
from opsdl.data.triplets import read_triplets
from opsdl.training.recipe import load_recipe

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
COMMANDS = ("train", "eval", "prepare", "info")
NEEDLES = {"haystack": "python", "split": "eval", "kinds": ["multikey"], "length": 300, "short_length": 150}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipes_load(recipe):
    config = load_recipe(recipe)
    assert config.run_dir == f"runs/{recipe.stem}"
    assert all(chosen.task.options["split"] == "eval" for chosen in config.evaluation.sets)


@pytest.fixture
def config(tmp_path):
    """Write a config; keyword arguments replace its top-level keys."""

    def write(**keys):
        path = tmp_path / "config.yaml"
        base = {"run_dir": str(tmp_path / "run"), "model": {"name": str(tmp_path / "no-model")}, "steps": 1}
        path.write_text(yaml.safe_dump(base | keys))
        return str(path)

    return write


@pytest.fixture
def fails(capsys):
    """Run a command that must fail with code 2 and one line on stderr; return the line."""

    def run(*arguments):
        assert main(list(map(str, arguments))) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("opsdl: error: ") and captured.err.count("\n") == 1
        return captured.err

    return run


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optimiser.lr=1", "unknown key optimiser; the nearest valid key is optimizer"),
        ("optimizer.l_r=1", "unknown key optimizer.l_r; the nearest valid key is optimizer.lr"),
        ("steps=many", "key steps: Value 'many' of type 'str' could not be converted to Integer"),
        ("steps=0", "key steps is 0; expected a positive number"),
        ("steps=${nothing}", "key steps: Interpolation key 'nothing' not found"),
        ("optimizer=1", "int is not a subclass of OptimizerConfig"),
        ("steps", "override 'steps': expected key.sub=value"),
        ("loss.kind=forward", "key loss.kind is 'forward'; expected one of full, policy"),
        ("evaluation.sets.0.items=1", "a list has no keys to set; give the whole list"),
        ("loss={kind: policy, baseline: mean}", "key loss.baseline is 'mean'; expected one of None, kl"),
        ("loss.base=kl", "unknown key loss.base"),
        ("data.needles.lenght=3", "unknown key data.needles.lenght; the nearest valid key is data.needles.length"),
        ("data.needles.length=0", "key data.needles.length is 0; expected a positive number"),
        ("data.needels={length: 3}", "unknown key data.needels; the nearest valid key is data.needles"),
        ("evaluation.sets=[{name: a, needles: {length: x}}]", "key evaluation.sets[0].needles.length: Value 'x'"),
        ("evaluation.sets=[{name: a, items: -1}]", "key evaluation.sets[0].items is -1; expected a positive number"),
        ("data.template=text", "key data.template is 'text'; expected text with {context} and {question} once each"),
    ],
)
@pytest.mark.parametrize("command", ["train", "eval"])
def test_bad_override(command, override, expected, config, fails):
    assert expected in fails(command, config(), override)


def test_unknown_key_in_the_file_names_the_file_and_the_nearest_key(config, fails):
    path = config(rollouts={"group_size": 2})
    assert f"config {path}: unknown key rollouts; the nearest valid key is rollout" in fails("train", path)


def test_missing_config(tmp_path, fails):
    assert f"config {tmp_path / 'none.yaml'}: no such file" in fails("train", tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"steps: [1", "not valid YAML"),
        (b"\xff\xfe\x00", "not valid YAML"),
        (b"- steps", "expected a mapping of keys"),
        (b"", "is required and has no value"),
    ],
)
def test_broken_config(content, expected, tmp_path, fails):
    path = tmp_path / "broken.yaml"
    path.write_bytes(content)
    line = fails("train", path)
    assert expected in line


@pytest.mark.parametrize("name", ["no/such/directory", "no-one-has-this/model-at-all"])
def test_unknown_model(name, tmp_path, fails):
    (tmp_path / "a.txt").write_text("Some text.")
    line = fails("prepare", tmp_path / "a.txt", "--model", name, "--out", tmp_path / "out.jsonl")
    assert f"model {name}: " in line and "local directory" in line and "hub id" in line


def test_directory_without_a_model(tmp_path, config, fails):
    path = config(model={"name": str(tmp_path)}, evaluation={"sets": [{"name": "a", "items": 1, "needles": NEEDLES}]})
    line = fails("eval", path)
    assert f"model {tmp_path}: cannot be read" in line and "expected a hub id" in line


def test_broken_weights(tiny_model_dir, tmp_path, config, fails):
    for file in tiny_model_dir.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes()[: 100 if file.suffix == ".safetensors" else None])
    path = config(model={"name": str(tmp_path)}, evaluation={"sets": [{"name": "a", "items": 1, "needles": NEEDLES}]})
    assert f"model {tmp_path}: cannot be read" in fails("eval", path)


def test_missing_gguf_file(tmp_path, config, fails):
    sets = [{"name": "a", "items": 1, "needles": NEEDLES}]
    path = config(model={"name": str(tmp_path), "gguf_file": "none.gguf"}, evaluation={"sets": sets})
    assert f"GGUF file {tmp_path / 'none.gguf'}: no such file" in fails("eval", path)


def test_unusable_device(config, fails):
    path = config(evaluation={"sets": [{"name": "a", "items": 1, "needles": NEEDLES}]})
    assert "device 'abacus': not usable here" in fails("eval", path, "device=abacus")


def test_eval_refuses_before_the_model_is_loaded(tmp_path, config, fails):
    assert "evaluation.sets is empty" in fails("eval", config())
    path = config(evaluation={"sets": [{"name": "a", "items": 1, "needles": NEEDLES}]})
    assert "--checkpoint" in fails("eval", path, "--checkpoint", tmp_path / "none")
    assert "no such directory" in fails("eval", path, "--out", tmp_path / "none" / "out.json")


def test_eval_prints_a_table_and_writes_every_answer(tiny_model_dir, tmp_path, config, capsys):
    sets = [{"name": name, "items": 1, "needles": NEEDLES} for name in ("first", "second")]
    path = config(evaluation={"sets": sets, "max_new_tokens": 2})
    out = tmp_path / "out.json"
    assert main(["eval", path, "--checkpoint", str(tiny_model_dir), "--out", str(out)]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert re.split(r"\s{2,}", rows[0]) == ["set", "items", "long context", "short context"]
    assert [row.split()[:2] for row in rows[1:]] == [["first", "1"], ["second", "1"]]
    assert [result["name"] for result in json.loads(out.read_text())["sets"]] == ["first", "second"]


def test_prepare_keeps_a_file_that_exists(tmp_path, fails):
    out = tmp_path / "out.jsonl"
    out.write_text("precious")
    assert "exists already" in fails("prepare", tmp_path, "--model", "m", "--out", out)
    assert out.read_text() == "precious"


def test_prepare_writes_triplets(tiny_model_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("opsdl.training.questions.self_questions", lambda *_, **__: lambda short_context: ["Who?"])
    document, out = tmp_path / "a.txt", tmp_path / "out.jsonl"
    document.write_text("\n\n".join(f"Paragraph {n} has a few words." for n in range(20)))
    sizes = ["--long-tokens", "60", "--short-tokens", "20", "--per-document", "3"]
    assert main(["prepare", str(document), "--model", str(tiny_model_dir), "--out", str(out), *sizes]) == 0
    assert capsys.readouterr().out == f"{out}: 3 triplets\n"
    assert [triplet.question for _, triplet in read_triplets(out)] == ["Who?"] * 3


def test_prepare_without_a_single_question(tiny_model_dir, tmp_path, fails, monkeypatch):
    monkeypatch.setattr("opsdl.training.questions.self_questions", lambda *_, **__: lambda short_context: [])
    document, out = tmp_path / "a.txt", tmp_path / "out.jsonl"
    document.write_text("A paragraph.")
    assert "wrote no question" in fails("prepare", document, "--model", tiny_model_dir, "--out", out)
    assert not out.exists()


@pytest.mark.parametrize(
    "arguments", [["train"], ["trian"], ["train", "c.yaml", "--quick"], ["prepare", "--model"], ["prepare", "a.txt"]]
)
def test_wrong_usage(arguments, fails):
    fails(*arguments)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_holds_an_example(command, capsys):
    assert main([command, "--help"]) == 0
    assert f"Example: opsdl {command}" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_help_lists_the_commands(arguments, capsys):
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert all(re.search(rf"^  {command}  ", out, re.MULTILINE) for command in COMMANDS)


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"opsdl {opsdl.__version__}\n"


def test_info(capsys):
    assert main(["info"]) == 0
    facts = dict(re.split(r":\s+", line, maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert facts["opsdl"] == opsdl.__version__
    assert {"python", "torch", "triton", "transformers", "flash-attn", "cpu", "cuda"} <= facts.keys()
    assert facts["loss backend reference"] == "available"


def test_interrupt_is_one_line(monkeypatch, capsys):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr("opsdl.cli.info.facts", interrupted)
    assert main(["info"]) == 130
    assert capsys.readouterr().err.strip() == "opsdl: error: interrupted"


def test_a_defect_of_ours_is_not_blamed_on_the_user(monkeypatch):
    def broken():
        raise ImportError("cannot import name 'x'", name="opsdl.losses")

    monkeypatch.setattr("opsdl.cli.info.facts", broken)
    with pytest.raises(ImportError):
        main(["info"])


def test_as_a_program(tmp_path):
    command = [sys.executable, "-m", "opsdl.cli", "train", str(tmp_path / "none.yaml")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"opsdl: error: config {tmp_path / 'none.yaml'}: no such file\n"
