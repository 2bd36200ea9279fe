"""Where the value of an option comes from, and what a file of settings may not hold."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main

from depthseg import cli, config

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    """No settings but those of the test, in an empty folder."""
    for name in [n for n in os.environ if n.startswith("DEPTHSEG_") and n != config.FOLDER_OF_WEIGHTS]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def shown(run):
    """What `config show` says of an option of a command: value, source, name."""

    def call(command, option, *flags, before=()):
        code, out, err = run(*before, "config", "show", command, *flags, "--json")
        assert code == 0, err
        return tuple(json.loads(out)["commands"][command][option].values())

    return call


def test_the_first_that_says_something_wins(shown, monkeypatch):
    assert shown("segment", "batch") == (4, "default", None)
    Path("pyproject.toml").write_text("[tool.other]\na = 1\n[tool.depthseg]\nbatch = 5\n")
    assert shown("segment", "batch") == (5, "file", "pyproject.toml")
    Path("depthseg.toml").write_text("batch = 6\n[segment]\nnms = 0.5\n")
    assert shown("segment", "batch") == (6, "file", "depthseg.toml")
    Path("depthseg.toml").write_text("batch = 6\n[segment]\nbatch = 7\n")
    assert shown("segment", "batch") == (7, "file", "depthseg.toml") and shown("bench", "batch")[0] == 6
    Path("my.toml").write_text("batch = 8\n")
    assert shown("segment", "batch", before=["--config", "my.toml"]) == (8, "file", "my.toml")
    monkeypatch.setenv("DEPTHSEG_CONFIG", "my.toml")
    assert shown("segment", "batch") == (8, "file", "my.toml")
    monkeypatch.setenv("DEPTHSEG_BATCH", "9")
    assert shown("segment", "batch") == (9, "environment", "DEPTHSEG_BATCH")
    monkeypatch.setenv("DEPTHSEG_SEGMENT_BATCH", "10")
    assert shown("segment", "batch") == (10, "environment", "DEPTHSEG_SEGMENT_BATCH") and shown("bench", "batch")[0] == 9
    assert shown("segment", "batch", "--batch", "11") == (11, "flag", None)


def test_none_reads_no_file(shown):
    Path("depthseg.toml").write_text("no TOML")
    assert shown("segment", "batch", before=["--config", "none"]) == (4, "default", None)


def test_a_file_after_the_command_takes_the_place_of_one_before_it(shown, run):
    Path("depthseg.toml").write_text("nms = 0.1\nbatch = 2")
    Path("a.toml").write_text("batch = 8")
    Path("b.toml").write_text("[segment]\nbatch = 9")
    assert shown("segment", "batch", "--config", "b.toml", before=["--config", "a.toml"]) == (9, "file", "b.toml")
    assert shown("segment", "nms", "--config", "b.toml") == (0.1, "file", "depthseg.toml")
    code, out, err = run("segment", "-h", "--config", "b.toml")
    assert code == 0 and "--config" in out, err


def test_values_reach_the_command(run, monkeypatch):
    got = {}
    monkeypatch.setattr("depthseg.train.train", lambda plan, resume, **rest: got.update(vars(plan), resume=resume) or "w")
    Path("depthseg.toml").write_text("""
        stage = 1
        lr = 1
        precision = "bf16"
        [train]
        data = ["a", "b c"]
        output = "out"
        depth-maps = "maps"
        mix = ["x=2"]
        resume = true
        """)
    monkeypatch.setenv("DEPTHSEG_LOSS", "dice=3 mask=2")
    code, out, err = run("train", "--lr", "0.5")
    assert (code, out) == (0, "w\n"), err
    wanted = {"stage": "1", "lr": 0.5, "precision": "bf16", "data": ("a", "b c"), "output": "out", "depth_maps": "maps"}
    assert wanted.items() <= got.items() and got["resume"] and got["mix"] == {"x": 2} and got["losses"] == {"dice": 3, "mask": 2}
    monkeypatch.setenv("DEPTHSEG_TRAIN_DATA", os.pathsep.join(["c", "d e"]))  # paths, as in PATH
    run("train")
    assert got["data"] == ("c", "d e")
    run("train", "--data", "f")
    assert got["data"] == ("f",)


@pytest.mark.parametrize("text, flags, expected", [("zoom = false", [], False), ("zoom = false", ["--zoom"], True), ("", [], None)])
def test_pairs_of_flags(shown, text, flags, expected):
    Path("depthseg.toml").write_text(text)
    assert shown("segment", "zoom", *flags)[0] is expected


def test_pairs_of_flags_in_the_environment(shown, monkeypatch):
    monkeypatch.setenv("DEPTHSEG_OVERLAYS", "no")
    monkeypatch.setenv("DEPTHSEG_ZOOM", "1")
    assert shown("segment", "overlays")[0] is False and shown("segment", "zoom")[0] is True


def test_the_folder_of_weights_is_no_checkpoint(shown, monkeypatch):
    monkeypatch.setenv("DEPTHSEG_WEIGHTS", "folder")
    assert shown("segment", "weights") == (None, "default", None)
    monkeypatch.setenv("DEPTHSEG_SEGMENT_WEIGHTS", "w.pt")
    assert shown("segment", "weights") == ("w.pt", "environment", "DEPTHSEG_SEGMENT_WEIGHTS")


def test_words_that_are_options_and_tables(shown):
    Path("depthseg.toml").write_text('depth = "none"\n[weights.list]\nhere = true')
    assert shown("depth", "depth")[0] == shown("segment", "depth")[0] == "none"
    Path("depthseg.toml").write_text('weights = "w.pt"\n[depth]\nbatch = 2')
    assert shown("segment", "weights")[0] == "w.pt" and shown("depth", "batch")[0] == 2 and shown("segment", "batch")[0] == 4


def test_no_variable_means_two_things():
    commands = {words: config._options(command) for words, command in config._commands(typer.main.get_command(cli.app))}
    for_all = {key for options in commands.values() for key in options}
    for_one = {"_".join([*words, key]) for words, options in commands.items() for key in options}
    assert not for_all & for_one and "config" not in for_all


@pytest.mark.parametrize(
    "text, error, hint",
    [
        ("bach = 3", "unknown key 'bach' in depthseg.toml", "Did you mean batch?"),
        ("min_regions = 3", "unknown key 'min_regions' in depthseg.toml", "Did you mean min_region?"),
        ("no-such-thing = 3", "unknown key", "depthseg --config none config show"),
        ("[segmet]\nbatch = 3", "unknown key 'segmet' in depthseg.toml", "Did you mean segment?"),
        ("[segment]\nsubset = 3", "unknown key 'subset' in [segment] of depthseg.toml", "hint: "),
        ("[weights.pul]\nx = 3", "unknown key 'pul' in [weights] of depthseg.toml", "Did you mean pull?"),
        ("segment = 3", "unknown key 'segment'", "hint: "),
        ("debug = true", "unknown key 'debug'", "hint: "),
        ('paths = ["a"]', "unknown key 'paths'", "hint: "),
        ('batch = "many"', "'batch' in depthseg.toml does not fit --batch: ", "--help"),
        ("batch = 0", "'batch' in depthseg.toml does not fit --batch: ", "--help"),
        ("batch = true", "'batch' in depthseg.toml does not fit --batch: ", "--help"),
        ("batch = [1]", "'batch' in depthseg.toml does not fit --batch: it is one value", "--help"),
        ('[segment]\noverlays = "yes"', "'overlays' in depthseg.toml does not fit --overlays: it is true or false", "--help"),
        ('only = "a.jpg"', "'only' in depthseg.toml does not fit --only: it is a list", "--help"),
        ("only = [[1]]", "'only' in depthseg.toml does not fit --only: it is made of strings or numbers", "--help"),
        ('precision = "fp8"', "'precision' in depthseg.toml does not fit --precision: ", "--help"),
        ("batch = ", "depthseg.toml is no TOML", "--config none"),
    ],
)
def test_a_bad_file_is_one_line_and_a_hint(run, text, error, hint):
    Path("depthseg.toml").write_text(text)
    code, out, err = run("models")
    first, second = err.splitlines()
    assert (code, out) == (2, "") and first.startswith(f"error: {error}") and second.startswith("hint: ") and hint in second


def test_a_bad_variable_is_named(run, monkeypatch):
    monkeypatch.setenv("DEPTHSEG_BATCH", "many")
    code, out, err = run("models")
    assert (code, out) == (2, "") and "error: the variable DEPTHSEG_BATCH does not fit --batch: " in err


def test_a_file_that_is_not_there(run):
    code, _, err = run("--config", "missing.toml", "models")
    assert code == 2 and "missing.toml" in err and "Check --config" in err


def test_show_prints_a_table_and_warns_of_variables_that_nobody_reads(run, monkeypatch):
    monkeypatch.setenv("DEPTHSEG_BACTH", "3")
    Path("depthseg.toml").write_text("batch = 3")
    code, out, err = run("config", "show")
    lines = [line.split() for line in out.splitlines()]
    assert code == 0 and err == "warning: no option reads DEPTHSEG_BACTH\n"
    assert ["segment", "--batch", "3", "file", "depthseg.toml"] in lines and ["weights", "list", "--here", "false", "default"] in lines
    code, out, err = run("config", "show", "segmet")
    assert code == 2 and "Did you mean segment?" in err
    code, out, err = run("config", "show", "segment", "--bach", "3")
    assert code == 2 and "--bach" in err


WRAPPER = """
import sys
from depthseg.cli import main
try:
    main(["config", "show"])
except SystemExit as leaving:
    assert not leaving.code
assert not {"torch", "numpy"} & set(sys.modules)
"""


def test_it_needs_no_torch():
    subprocess.run([sys.executable, "-c", WRAPPER], cwd=ROOT, env=os.environ | {"DEPTHSEG_CONFIG": "none"}, check=True, capture_output=True)
