"""The command line with a fake Segmenter: options reach the plan, streams and exit codes are what scripts rely on."""

import errno
import io
import json
import os
import signal
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
import typer.main

import depthseg.evaluate  # noqa: F401  # so that it keeps the real Segmenter, whatever is tested first
from depthseg import __version__, catalog, cli, data, masks, sink, terminal
from depthseg.errors import MISSING_PIECE, DepthsegError
from depthseg.plan import Plan
from depthseg.schema import Masks, Record


class FakeSegmenter:
    """One mask in each image that can be read; keeps what it was built with."""

    built: ClassVar[list] = []
    trouble: ClassVar[list] = []  # raised, or sent as a signal, after the first image

    def __init__(self, plan, pull=False, images_json=None, progress=None):
        self.plan, self.pull, self.images_json = plan, pull, images_json
        self.notes, self.provenance, self.categories = ["detector: fake"], {"detector": "fake"}, {}
        self.seen = []
        FakeSegmenter.built.append(self)

    def expect(self, images):
        self.expected = [image.key for image in images]
        return ["warning: 1 of 2 entries"]

    def remarks(self):
        return ["warning: 1 of 2 lies outside"]

    def segment(self, images):
        print("a library that prints")
        for image in images:
            self.seen.append(image.key)
            try:
                image = data.read(image)
            except data.Unreadable as error:
                yield data.Failure(image, "read", str(error))
                continue
            mask = np.zeros(image.size, bool)
            mask[2:9, 3:12] = True
            one = np.ones(1, np.float32)
            box = np.array([[3, 2, 12, 9]], np.float32)
            yield Record(image, Masks([masks.encode(mask)], box, np.array([63]), one, one, one, np.array([1]), {1: "thing"}))
            for what in self.trouble:
                if isinstance(what, int):
                    os.kill(os.getpid(), what)
                else:
                    raise what


@pytest.fixture(autouse=True)
def fake(monkeypatch, tmp_path):
    for row in (*catalog.MODELS.values(), *catalog.DETECTORS.values()):
        if row.file and row.file.startswith("nano/"):
            (tmp_path / "embedded" / "nano").mkdir(parents=True, exist_ok=True)
            (tmp_path / "embedded" / row.file).touch()
    monkeypatch.setattr(catalog, "embedded", lambda: tmp_path / "embedded")
    FakeSegmenter.built, FakeSegmenter.trouble = [], []
    monkeypatch.setattr("depthseg.segment.Segmenter", FakeSegmenter)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("NO_COLOR", "1")
    return FakeSegmenter


def options(verb):
    return {p.name: p for p in typer.main.get_command(cli.app).commands[verb].params}


def test_every_field_of_the_plan_is_an_option_with_the_plans_default():
    given = options("segment")
    assert {f.name: f.default for f in fields(Plan)} == {f.name: given[f.name].default for f in fields(Plan)}


def test_options_reach_the_plan(run, fake, pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("w.pt", "d.pt", "b.json", "p.json", "i.json"):
        Path(name).touch()
    words = """--model efficientvit-sam-l0-depth --weights w.pt --detector yolov8s --depth none
        --device cpu --precision bf16 --backend compile --batch 3 --prompt-batch 7 --confidence 0.5 --max-boxes 9 --depth-side 392
        --draft --threads 5 --zoom --anywhere --refine amr --refine-rounds 2 --refine-points 3 --refine-below 0.7 --points-per-side 5
        --min-predicted-iou 0.1 --min-stability 0.2 --nms 0.3 --min-area 8 --max-area 9 --min-region 4
        --no-overlays --no-labelmaps --depth-panel --instances""".split()
    expected = Plan(
        "efficientvit-sam-l0-depth", "w.pt", "yolov8s", None, None, "d.pt", None, None, "none", "cpu", "bf16", "compile",
        3, 7, 0.5, 9, 392, True, 5, True, False, "amr", 2, 3, 0.7, 5, 0.1, 0.2, 0.3, 8, 9, 4, False, False, True, True,
    )  # fmt: skip
    alone = {"boxes": "b.json", "points": "p.json", "text": "a cat .", "classes": "cat,dog"}  # these exclude each other
    for field, value in alone.items():
        own = field in ("text", "classes")  # a file leaves the detector nothing to do
        given = [*words, "--detector-weights", "d.pt"] if own else words
        code, _, err = run("segment", pictures, "-o", tmp_path / field, "--pull", "--images-json", "i.json", *given, f"--{field}", value)
        assert code == 0, err
        assert fake.built[-1].plan == replace(expected, **{field: value}, **({} if own else {"detector_weights": None}))
    assert fake.built[-1].pull and fake.built[-1].images_json == Path("i.json")
    changed = {f.name for f in fields(Plan) if getattr(expected, f.name) != f.default}
    assert changed | set(alone) == {f.name for f in fields(Plan)}, "the test must change every option"


@pytest.mark.parametrize(
    "options",
    [
        ["--boxes", "b.json", "--points", "b.json"],
        ["--text", "a", "--classes", "b"],
        ["--boxes", "b.json", "--classes", "cat"],
        ["--detector", "grid", "--classes", "cat"],
        ["--detector-weights", "b.json"],
        ["--classes", ""],
        ["--classes", " , "],
        ["--text", " . "],
    ],
)
def test_options_that_exclude_each_other(run, pictures, tmp_path, monkeypatch, options):
    monkeypatch.chdir(tmp_path)
    Path("b.json").write_text("[]")
    code, _, err = run("segment", pictures, "-o", "out", *options)
    assert code == 2 and "hint" in err and not Path("out").exists()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--detector", "yolov8m", "--classes", "persn"], "Did you mean person"),
        (["--detector", "vitdet-b-lvis", "--classes", "aeroplan"], "Did you mean"),
        (["--detector", "dfine-nano", "--detector-weights", "b.json"], "a folder, with a config.json"),
        (["--detector", "yolov8m", "--detector-weights", "."], "are a file"),
    ],
)
def test_a_detector_is_not_fetched_for_what_it_cannot_do(run, pictures, tmp_path, monkeypatch, options, reason):
    monkeypatch.chdir(tmp_path)
    Path("b.json").write_text("[]")
    code, _, err = run("segment", pictures, "-o", "out", *options, "--pull")
    assert code == 2 and reason in err and not Path("out").exists()


def test_a_run_writes_results_and_prints_only_the_folder(run, pictures, tmp_path):
    out = tmp_path / "out"
    code, stdout, stderr = run("segment", pictures, "-o", out)
    assert (code, stdout) == (0, f"{out}\n")
    assert "detector: fake" in stderr and "3 images, 3 masks" in stderr
    assert [p["file_name"] for p in json.loads((out / "predictions.json").read_text())] == ["a.png", "b.jpg", "sub/c.png"]
    code, _, stderr = run("segment", pictures, "-o", out)
    assert code == 0 and "3 of 3 images done already" in stderr and "warning: 1 of 2 entries" in stderr


def test_a_broken_image_is_listed_and_the_others_are_done(run, pictures, tmp_path):
    (pictures / "broken.jpg").write_bytes(b"")
    out = tmp_path / "out"
    code, stdout, stderr = run("segment", pictures, "-o", out)
    assert (code, stdout) == (3, f"{out}\n")
    assert "failed: broken.jpg: " in stderr and "Traceback" not in stderr
    assert len(json.loads((out / "predictions.json").read_text())) == 3


@pytest.mark.parametrize("trouble, expected", [(KeyboardInterrupt(), 130), (int(signal.SIGTERM), 143)])
def test_stopped_and_started_again_it_goes_on(run, fake, pictures, tmp_path, trouble, expected):
    out = tmp_path / "out"
    before = signal.getsignal(signal.SIGTERM)
    fake.trouble = [trouble]
    code, stdout, stderr = run("segment", pictures, "-o", out)
    assert (code, stdout) == (expected, "") and "run the same command again" in stderr
    assert signal.getsignal(signal.SIGTERM) == before
    assert json.loads((out / "run.json").read_text())["state"] == "interrupted"
    fake.trouble = []
    code, _, stderr = run("segment", pictures, "-o", out)
    assert code == 0 and fake.built[0].seen == (["a.png"] if expected == 130 else ["a.png", "b.jpg"])  # twice told, it stops at once
    assert fake.built[1].expected == ["a.png", "b.jpg", "sub/c.png"]  # those that are done count, too
    assert len(json.loads((out / "predictions.json").read_text())) == 3
    assert len(fake.built[1].seen) == 3 - int(stderr.partition(" of 3 images done already")[0].splitlines()[-1])


def test_a_files_name_does_nothing_to_the_terminal(run, pictures, tmp_path):
    (pictures / "x\x1b[31m\ny.png").write_bytes(b"broken")
    code, _, err = run("segment", pictures, "-o", tmp_path / "o")
    assert code == 3 and "\x1b" not in err and r"failed: x\x1b[31m\ny.png: " in err


def test_the_first_signal_ends_after_the_batch(run, fake, pictures, tmp_path, monkeypatch):
    def once(self, images):
        for n, record in enumerate(segment(self, images)):
            yield record
            if not n:
                os.kill(os.getpid(), signal.SIGINT)

    segment = fake.segment
    monkeypatch.setattr(fake, "segment", once)
    code, _, err = run("segment", pictures, "-o", tmp_path / "o", "--batch", "2")
    assert code == 130 and "stopping after this batch" in err and "2 images done, 1 left" in err
    about = json.loads((tmp_path / "o" / "run.json").read_text())
    assert about["state"] == "interrupted" and about["counts"]["done"] == 2 and about["counts"]["skipped"] == 1


def test_selected_images_and_those_left_out_are_accounted_for(run, fake, pictures, tmp_path):
    (tmp_path / "keys.txt").write_text("sub/c.png\n\na.png\n")
    for n, (words, seen) in enumerate([
        (["--limit", "2"], ["a.png", "b.jpg"]), (["--only", "b.jpg"], ["b.jpg"]), (["--shard", "2/2"], ["b.jpg"]),
        (["--keys", tmp_path / "keys.txt"], ["a.png", "sub/c.png"]), (["--shard", "1/2", "--limit", "1"], ["a.png"]),
    ]):  # fmt: skip
        code, out, _ = run("segment", pictures, "-o", tmp_path / f"o{n}", *words, "--json")
        told = json.loads(out)
        assert code == 0 and fake.built[-1].seen == seen and (told["done"], told["skipped"]) == (len(seen), 3 - len(seen))
        counts = json.loads((tmp_path / f"o{n}" / "run.json").read_text())["counts"]
        assert counts["images"] == 3 == counts["done"] + counts["failed"] + counts["skipped"]
    for words, code in ((["--shard", "3/2"], 2), (["--only", "z"], 2), (["--keys", tmp_path / "no"], 2), (["--shard", "9/9"], 4)):
        assert run("segment", pictures, "-o", tmp_path / "p", *words)[0] == code and not (tmp_path / "p").exists()


@pytest.mark.parametrize("seed", range(6))
def test_every_input_is_accounted_for(run, fake, pictures, tmp_path, seed):
    """Whatever is broken, selected, refused or interrupted: images = done + failed + skipped, and no key is in two places."""
    g = np.random.default_rng(seed)
    for n in range(20):
        (pictures / f"{n:02}.png").write_bytes((pictures / "a.png").read_bytes() if g.random() < 0.7 else b"broken")
    words = [["--limit", str(g.integers(1, 23))], ["--shard", f"{g.integers(1, 4)}/3"], [], ["--batch", "2"]][seed % 4]
    if seed % 2:
        fake.trouble = [KeyboardInterrupt()] if g.random() < 0.5 else []
    for _ in range(2):
        code, _, err = run("segment", pictures, "-o", tmp_path / "o", *words)
        assert code in (0, 3, 130), err
        counts = json.loads((tmp_path / "o" / "run.json").read_text())["counts"]
        assert counts["images"] == 23 == counts["done"] + counts["failed"] + counts["skipped"]
        done = {json.loads(line)["key"] for line in (tmp_path / "o" / "journal.jsonl").read_text().splitlines()}
        lost = tmp_path / "o" / "failures.jsonl"
        failed = {json.loads(line)["key"] for line in lost.read_text().splitlines()} if lost.exists() else set()
        assert (len(done), len(failed)) == (counts["done"], counts["failed"]) and not done & failed
        fake.trouble = []


def test_ids_do_not_depend_on_what_is_selected(run, fake, pictures, tmp_path):
    for name, words in (("whole", []), ("parts", ["--shard", "2/2"])):
        assert run("segment", pictures, "-o", tmp_path / name, *words)[0] == 0
    assert run("segment", pictures, "-o", tmp_path / "parts", "--only", "a.png")[0] == 0
    counts = json.loads((tmp_path / "parts" / "run.json").read_text())["counts"]
    assert (counts["done"], counts["skipped"], counts["earlier"]) == (2, 1, 0)
    assert run("segment", pictures, "-o", tmp_path / "parts")[0] == 0
    for name in ("predictions.json", "images.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()


def test_only_what_failed_is_tried_again(run, fake, pictures, tmp_path):
    good = (pictures / "b.jpg").read_bytes()
    (pictures / "b.jpg").write_bytes(b"")
    out = tmp_path / "o"
    assert run("segment", pictures, "-o", out)[0] == 3
    assert run("segment", pictures, "-o", out, "--only", "a.png")[0] == 0
    assert json.loads((out / "run.json").read_text())["counts"]["failed"] == 1 and "b.jpg" in (out / "failures.jsonl").read_text()
    (pictures / "b.jpg").write_bytes(good)
    assert run("segment", pictures, "-o", out, "--retry-failed")[0] == 0 and fake.built[-1].seen == ["b.jpg"]
    assert len(json.loads((out / "predictions.json").read_text())) == 3
    code, _, err = run("segment", pictures, "-o", out, "--retry-failed")
    assert code == 4 and "no image failed" in err


def test_a_dry_run_writes_nothing(run, fake, pictures, tmp_path):
    (pictures / "b.jpg").write_bytes(b"")
    code, out, err = run("segment", pictures, "-o", tmp_path / "o", "--dry-run", "--nms", "0.5")
    assert (code, out) == (0, "") and not (tmp_path / "o").exists()
    assert "nms: 0.5" in err and "images/s" in err and "MiB of disk" in err and "would fail: b.jpg" in err
    code, out, _ = run("segment", pictures, "-o", tmp_path / "o", "--dry-run", "--json")
    told = json.loads(out)
    assert code == 0 and told["images"] == 3 and told["plan"]["model"] == Plan.model and told["bytes"] > 0


def test_a_list_on_stdin(run, fake, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{pictures / 'a.png'}\n{pictures / 'sub' / 'c.png'}\n"))
    code, _, err = run("segment", "-", "-o", tmp_path / "out")
    assert code == 0, err
    assert [Path(key).name for key in fake.built[0].seen] == ["a.png", "c.png"]


def test_demo_needs_no_output(run, fake, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    code, stdout, err = run("segment", "--demo")
    assert (code, stdout) == (0, "depthseg-demo\n"), err
    assert "grace_hopper.jpg" in fake.built[0].seen and (tmp_path / "depthseg-demo" / "run.json").is_file()


@pytest.mark.parametrize(
    "words, code, text",
    [
        ("segment", 2, "nothing to segment was named"),
        ("segment {pictures}", 2, "no output folder was named"),
        ("segment {pictures}/missing -o {tmp}/o", 2, "missing"),
        ("segment {empty} -o {tmp}/o", 4, "no image"),
        ("segment {pictures} -o {pictures}/o", 2, "inside the input"),
        ("segment {pictures} -o {tmp}/o --model nanno", 2, "Did you mean nano"),
        ("segment {pictures} -o {tmp}/o --detector yolo", 2, "Did you mean yolov8"),
        ("segment {pictures} -o {tmp}/o --depth depth-anything-v2-smal", 2, "Did you mean depth-anything-v2-small"),
        ("segment {pictures} -o {tmp}/o --precision fp8", 2, "fp8"),
        ("segment {pictures} -o {tmp}/o --batch 0", 2, "--batch"),
        ("segment {pictures} -o {tmp}/o --model efficientvit-sam-l0", 5, "--weights PATH"),
        ("segment {pictures} -o {tmp}/o --detector yolov8m", 5, "--detector nano"),
        ("segment {pictures} -o {tmp}/o --depth nano", 5, "--depth FOLDER"),
        ("segment {pictures} -o {tmp}/o --weights {tmp}/w.pt", 2, "Check --weights"),
        ("segment {pictures} -o {tmp}/o --pull --boxes {tmp}/b.json", 2, "Check --boxes"),
        ("segment {pictures} -o {tmp}/o --points {tmp}/p.json", 2, "Check --points"),
        ("segment {pictures} -o {tmp}/o --images-json {tmp}/i.json", 2, "Check --images-json"),
        ("depth {pictures} -o {pictures}/a.png", 2, "inside the input"),
        ("depth {pictures} -o {file}/maps", 2, "cannot write to"),
        ("eval --images x --annotations y -o {file}", 2, "cannot write to"),
        ("train --stage 1 --data x -o {file}", 2, "cannot write to"),
        ("eval --images x", 2, "--annotations"),
        ("segment {pictures} -o {tmp}/o --zom", 2, "--zoom"),
        ("segmet", 2, "segment"),
        ("models nanno", 2, "Did you mean nano"),
        ("eval --images x --annotations y --clicks one", 2, "--clicks one"),
        ("train --stage 9 --data x -o y", 2, "9"),
        ("train --stage 1 --data x -o y --steps 3 --epochs 2", 2, "--epochs"),
    ],
)
def test_bad_input_is_one_line_and_a_hint(run, fake, pictures, tmp_path, words, code, text):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    places = {"pictures": pictures, "tmp": tmp_path, "empty": tmp_path / "empty", "file": tmp_path / "file"}
    got, stdout, stderr = run(*words.format(**places).split())
    assert (got, stdout) == (code, "") and text in stderr
    lines = stderr.splitlines()
    assert lines[0].startswith("error: ") and all(line.startswith("hint: ") for line in lines[1:]) and len(lines) <= 2
    assert not fake.built and not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    "trouble, code, first",
    [
        (DepthsegError("no weights", "pull them", MISSING_PIECE), 5, "error: no weights"),
        (OSError("disk\nfull"), 1, "unexpected error: OSError: disk full"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"), 1, "error: the memory is full"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), 1, "error: the memory is full"),
        (MemoryError(), 1, "error: the memory is full"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), 1, "error: the memory is full"),
    ],
)
def test_errors_show_a_traceback_only_with_debug(run, fake, pictures, tmp_path, trouble, code, first):
    fake.trouble = [trouble]
    got, _, stderr = run("segment", pictures, "-o", tmp_path / "a")
    assert got == code and first in stderr and "Traceback" not in stderr
    got, _, stderr = run("segment", pictures, "-o", tmp_path / "b", "--debug")
    assert got == code and first in stderr and "Traceback" in stderr


@pytest.mark.parametrize("number, code", [(errno.ENAMETOOLONG, 3), (errno.ENOSPC, 1)])
def test_what_cannot_be_written_is_a_failure_unless_the_disk_is_full(run, fake, pictures, tmp_path, monkeypatch, number, code):
    draw = sink.Sink.draw

    def refuse(self, record):
        if record.image.key == "b.jpg":
            raise OSError(number, "File name too long")
        draw(self, record)

    monkeypatch.setattr(sink.Sink, "draw", refuse)
    got, _, stderr = run("segment", pictures, "-o", tmp_path / "out")
    assert got == code and ("failed: b.jpg: File name too long" in stderr) == (code == 3)
    if code == 3:
        line = json.loads((tmp_path / "out" / "failures.jsonl").read_text())
        assert line == {"key": "b.jpg", "stage": "write", "reason": "File name too long"} and "2 images, 2 masks" in stderr


def test_a_download_is_shown_from_its_first_bytes_on(capsys, monkeypatch):
    monkeypatch.setattr(terminal, "LINE_EVERY", 0.0)
    with terminal.downloads():
        pass
    assert capsys.readouterr().err == ""
    with terminal.downloads() as tell:
        tell(3 << 20, 6 << 20)
        tell(5 << 20, 0)
    assert [line.partition(",")[0] for line in capsys.readouterr().err.splitlines()] == ["3/6 MiB", "5/5 MiB"]


def test_progress_is_plain_lines_where_there_is_no_terminal(capsys, monkeypatch):
    monkeypatch.setattr(terminal, "LINE_EVERY", 0.0)
    with terminal.progress("images") as show:
        show(1, 4)
        show(4, 4)
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(",")[0] for line in lines] == ["1/4 images", "4/4 images"]
    assert all("images/s" in line and line.endswith(" left") for line in lines) and "\x1b" not in "".join(lines)


def test_train_fills_a_train_plan(run, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    train = pytest.importorskip("depthseg.train")
    asked = []

    def fake(plan, resume, check, anew, tell, stop):
        asked.append((plan, resume))
        tell("log", {"step": 20, "mask": 0.25, "done": 0.5})
        return Path("o/weights.safetensors")

    monkeypatch.setattr(train, "train", fake)
    words = """train --stage 2 --data a --data b -o o --model nano-depth --init i --depth-maps d --epochs 2 --batch 4 --lr 1e-4
        --seed 3 --resume --device cpu --precision bf16""".split()
    code, stdout, stderr = run(*words)
    assert (code, stdout) == (0, f"{Path('o/weights.safetensors')}\n"), stderr
    assert "step 20  mask 0.25" in stderr
    plan = train.TrainPlan(
        stage="2", data=("a", "b"), output="o", model="nano-depth", init="i", depth_maps="d",
        epochs=2, batch=4, lr=1e-4, seed=3, device="cpu", precision="bf16",
    )  # fmt: skip
    assert asked == [(plan, True)]


def test_models_lists_every_row(run):
    from depthseg.catalog import DEPTHS, DETECTORS, MODELS

    code, stdout, err = run("models")
    assert code == 0, err
    words = stdout.split()
    assert all(name in words for name in (*MODELS, *DEPTHS, *DETECTORS))
    assert "AGPL-3.0" in words and "CC-BY-NC-4.0" in words and "--pull" in words


def test_models_measures_what_is_named(run):
    code, stdout, err = run("models", "efficientvit-sam-l2")
    assert code == 0, err
    assert all(text in stdout for text in ("61,328,592", "61.3 M", "68.55 G", "69 G"))


def test_version_and_help(run):
    assert run("--version")[:2] == (0, f"depthseg {__version__}\n")
    for words in ([], ["-h"], ["segment", "-h"], ["eval", "--help"], ["train", "-h"], ["models", "-h"]):
        code, stdout, stderr = run(*words)
        assert code == 0 and stdout.lstrip().startswith("Usage: depthseg") and not stderr


@pytest.mark.parametrize(
    "words",
    ["models", "models nano", "weights list", "weights verify nano", "doctor", "config show segment"],
)
def test_json_is_one_object_and_nothing_else(run, words):
    code, out, _ = run(*words.split(), "--json")
    assert code in (0, MISSING_PIECE) and isinstance(json.loads(out), dict), out
