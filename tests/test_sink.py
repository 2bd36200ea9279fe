"""The output folder survives whatever happens to a run, and never mixes two."""

import errno
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as PILImage
from pycocotools.coco import COCO

from depthseg import data, masks
from depthseg.data import Failure
from depthseg.errors import DepthsegError
from depthseg.plan import Plan
from depthseg.schema import Image, Masks, Record
from depthseg.sink import Sink, check_output

PLAN = Plan(overlays=False, labelmaps=False)


def record(image: Image) -> Record:
    """An answer that depends on the picture alone: two masks, or none for a narrow one."""
    image = data.read(image)
    h, w = image.size
    half = np.zeros((h, w), bool)
    half[: h // 2, 3:] = True
    rle = [masks.encode(half), masks.encode(image.pixels[..., 0] > 90)] if w > 35 else []
    score = np.array([0.9, 0.3], np.float32)[: len(rle)]
    found = Masks(rle, masks.boxes(rle), masks.area(rle), score, score, score, np.array([17, 1])[: len(rle)], {17: "cat", 1: "person"})
    return Record(image, found, PLAN.digest(), {"encode": 0.1}, np.zeros((4, 4), np.float32))


@pytest.fixture
def images(pictures):
    return data.find([pictures])


def run(output, images, plan=PLAN, **options):
    with Sink(output, plan, images, {"weights": "abc"}, **options) as sink:
        for image in images:
            if image.key not in sink.done:
                sink.write(record(image))
    return manifest(output)


def manifest(output):
    return json.loads((output / "run.json").read_text())


def test_a_whole_run(tmp_path, images):
    out = tmp_path / "out"
    with Sink(out, PLAN, images, {"weights": "abc"}) as sink:
        assert sink.done == set()
        assert manifest(out)["state"] == "running" and manifest(out)["finished"] is None
        for image in images:
            sink.write(record(image))
        assert sink.done == {"a.png", "b.jpg", "sub/c.png"}
    about = manifest(out)
    counts = {"images": 3, "done": 3, "failed": 0, "skipped": 0, "earlier": 0, "instances": 4}
    assert about["state"] == "finished" and about["counts"] == counts
    assert about["schema_version"] == 1 and about["extra"] == {"weights": "abc"} and about["digest"] == PLAN.digest()
    assert Plan.from_json(about["plan"]) == PLAN and about["finished"] >= about["started"]
    pictures = json.loads((out / "images.json").read_text())
    assert pictures["images"][0] == {"id": 1, "file_name": "a.png", "height": 48, "width": 64}
    assert [i["file_name"] for i in pictures["images"]] == ["a.png", "b.jpg", "sub/c.png"], "an image without masks is there too"
    assert pictures["categories"] == [{"id": 1, "name": "person"}, {"id": 17, "name": "cat"}]
    first = json.loads((out / "predictions.json").read_text())[0]
    expected = record(images[0]).masks
    assert first["segmentation"] == expected.rle[0] and first["bbox"] == [3, 0, 61, 24]
    assert (first["image_id"], first["file_name"], first["category_id"]) == (1, "a.png", 17)
    assert (first["score"], first["predicted_iou"], first["stability_score"]) == (0.9, 0.9, 0.9)


def test_cocotools_read_the_result(tmp_path, images):
    run(tmp_path / "out", images)
    coco = COCO()
    coco.dataset = json.loads((tmp_path / "out/images.json").read_text()) | {"annotations": []}
    coco.createIndex()
    results = coco.loadRes(str(tmp_path / "out/predictions.json"))
    np.testing.assert_array_equal(results.annToMask(results.loadAnns(1)[0]), masks.decode(record(images[0]).masks.rle[0]))


def test_journal_lines(tmp_path, images):
    run(tmp_path / "out", images)
    line = json.loads((tmp_path / "out/journal.jsonl").read_text().splitlines()[0])
    assert (line["key"], line["id"], line["size"], line["plan"]) == ("a.png", 1, [48, 64], PLAN.digest())
    assert line["seconds"] == {"encode": 0.1} and line["instances"][0]["category"] == "cat"


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_broken_off_run_goes_on_to_the_same_result(tmp_path, images, error):
    whole, out = tmp_path / "whole", tmp_path / "out"
    run(whole, images)
    with pytest.raises(error), Sink(out, PLAN, images, {}) as sink:
        sink.write(record(images[2]))
        raise error
    assert manifest(out)["state"] == "interrupted" and manifest(out)["counts"]["done"] == 1
    assert [i["file_name"] for i in json.loads((out / "images.json").read_text())["images"]] == ["sub/c.png"]
    with Sink(out, PLAN, images, {}) as sink:
        assert sink.done == {"sub/c.png"}
        sink.write(record(images[1]))
        sink.write(record(images[0]))
    assert manifest(out)["state"] == "finished"
    for name in ("predictions.json", "images.json"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()


def test_images_that_were_not_reached_make_a_run_unfinished(tmp_path, images):
    with Sink(tmp_path / "out", PLAN, images, {}) as sink:
        sink.write(record(images[0]))
    assert manifest(tmp_path / "out")["state"] == "interrupted"


def test_a_killed_process_loses_nothing_that_was_written(tmp_path, images):
    """SIGKILL between two images: no code of ours runs any more."""
    script = (
        "import os, sys; sys.path.insert(0, 'tests'); from test_sink import *\n"
        "images = data.find([sys.argv[1]])\n"
        "sink = Sink(sys.argv[2], PLAN, images, {}).__enter__(); sink.write(record(images[0])); os.kill(os.getpid(), 9)"
    )
    out = tmp_path / "out"
    root = str(images[0].path.parent)
    ran = subprocess.run([sys.executable, "-c", script, root, str(out)], cwd=Path(__file__).parents[1])
    assert ran.returncode == -9
    assert manifest(out)["state"] == "running"
    with Sink(out, PLAN, images, {}) as sink:
        assert sink.done == {"a.png"}


@pytest.mark.parametrize("torn", [b'{"key": "b.jpg", "id": 2, "si', b'{"key": "b.jpg"', b"\xff\xfe"])
def test_a_torn_line_is_cut_off(tmp_path, images, torn):
    whole, out = tmp_path / "whole", tmp_path / "out"
    run(whole, images)
    with pytest.raises(KeyboardInterrupt), Sink(out, PLAN, images, {}) as sink:
        sink.write(record(images[0]))
        raise KeyboardInterrupt
    with open(out / "journal.jsonl", "ab") as journal:
        journal.write(torn)
    with Sink(out, PLAN, images, {}) as sink:
        assert sink.done == {"a.png"}
        for image in images[1:]:
            sink.write(record(image))
    assert (out / "predictions.json").read_bytes() == (whole / "predictions.json").read_bytes()
    assert len((out / "journal.jsonl").read_text().splitlines()) == 3


def test_failures_are_tried_again(tmp_path, images):
    out = tmp_path / "out"
    with Sink(out, PLAN, images, {}) as sink:
        sink.failed(Failure(images[0], "read", "truncated file"))
        for image in images[1:]:
            sink.write(record(image))
    line = json.loads((out / "failures.jsonl").read_text())
    assert line == {"key": "a.png", "stage": "read", "reason": "truncated file"}
    assert manifest(out)["state"] == "finished" and manifest(out)["counts"]["failed"] == 1
    again = run(out, images)
    assert again["counts"] == {"images": 3, "done": 3, "failed": 0, "skipped": 0, "earlier": 0, "instances": 4}
    assert not (out / "failures.jsonl").exists()


def test_another_plan_is_refused_and_named(tmp_path, images):
    out = tmp_path / "out"
    run(out, images)
    before = (out / "predictions.json").read_bytes()
    with pytest.raises(DepthsegError, match=r"confidence \(was None, is 0.5\)") as caught:
        run(out, images, replace(PLAN, confidence=0.5))
    assert "--overwrite" in caught.value.hint and "batch" not in caught.value.message
    assert (out / "predictions.json").read_bytes() == before
    run(out, images, replace(PLAN, batch=9, device="cpu"))  # these decide nothing
    assert run(out, images[:1], replace(PLAN, confidence=0.5), overwrite=True)["counts"]["done"] == 1


def test_overwriting_leaves_other_files_alone(tmp_path, images):
    out = tmp_path / "out"
    run(out, images, replace(PLAN, labelmaps=True))
    (out / "notes.txt").write_text("mine")
    run(out, images, overwrite=True)
    assert (out / "notes.txt").exists() and not (out / "labelmaps").exists()


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_is_no_run_is_refused(tmp_path, images, overwrite):
    with pytest.raises(DepthsegError, match="not empty"):
        run(tmp_path / "pictures", images, overwrite=overwrite)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/run.json").write_text('{"name": "somebody else"}')
    with pytest.raises(DepthsegError, match="not from a run"):
        run(tmp_path / "other", images, overwrite=overwrite)
    (tmp_path / "file").write_text("x")
    with pytest.raises(DepthsegError, match="File exists"):
        run(tmp_path / "file", images, overwrite=overwrite)


def test_one_process_at_a_time(tmp_path, images):
    pytest.importorskip("fcntl")
    with Sink(tmp_path / "out", PLAN, images[:1], {}) as sink:
        with pytest.raises(DepthsegError, match="another process"), Sink(tmp_path / "out", PLAN, images, {}):
            pass
        sink.write(record(images[0]))
    assert run(tmp_path / "out", images)["state"] == "finished"


def test_the_output_must_not_lie_inside_the_input(tmp_path, pictures, monkeypatch):
    for output in (pictures, pictures / "out", pictures / "sub/../new/deep"):
        with pytest.raises(DepthsegError, match="inside"):
            check_output(output, [tmp_path / "elsewhere", pictures])
    monkeypatch.chdir(pictures)
    with pytest.raises(DepthsegError, match="inside"):
        check_output("out", ["."])
    check_output(tmp_path / "out", [pictures, pictures / "a.png"])
    check_output(tmp_path / "pictures2", [pictures])
    check_output(pictures / "out", [pictures / "a.png", "sub"])


def test_a_picture_that_has_changed_is_done_again(tmp_path, images):
    run(tmp_path / "out", images)
    PILImage.new("RGB", (50, 50), "red").save(images[0].path)
    with Sink(tmp_path / "out", PLAN, images, {}) as sink:
        assert sink.done == {"b.jpg", "sub/c.png"}
        sink.write(record(data.find([images[0].path])[0]))
    sizes = json.loads((tmp_path / "out/images.json").read_text())["images"]
    assert [i["width"] for i in sizes] == [50, 40, 32]


def test_pictures_asked_for_later_are_made(tmp_path, images):
    out = tmp_path / "out"
    run(out, images)
    run(out, images, replace(PLAN, overlays=True, labelmaps=True, instances=True, depth_panel=True))
    files = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}
    assert {"overlays/a.png.jpg", "overlays/b.jpg", "overlays/sub/c.png.jpg"} <= files
    assert {"labelmaps/a.png.png", "labelmaps/b.jpg.png", "labelmaps/sub/c.png.png"} <= files
    assert {"instances/a.png/000_cat_0.90.png", "instances/a.png/001_person_0.30.png"} <= files
    assert not any(name.endswith(".part") for name in files)
    with PILImage.open(out / "overlays/a.png.jpg") as overlay:
        assert overlay.size == (2 * 512 + 2, 384)
    with Sink(out, replace(PLAN, overlays=True), images, {}) as sink:
        assert len(sink.done) == 3


def test_an_earlier_runs_images_stay_in_the_result(tmp_path, images):
    out = tmp_path / "out"
    run(out, images[:2])
    later = [replace(images[2], id=1)]
    counts = run(out, later)["counts"]
    assert (counts["done"], counts["earlier"], counts["skipped"]) == (1, 2, 0)
    listed = json.loads((out / "images.json").read_text())["images"]
    assert [(i["id"], i["file_name"]) for i in listed] == [(1, "sub/c.png"), (2, "a.png"), (3, "b.jpg")]


def test_ids_stay_unique_when_sources_number_alike(tmp_path, images):
    twice = [images[0], replace(images[1], id=1), images[2]]
    run(tmp_path / "out", twice)
    assert [i["id"] for i in json.loads((tmp_path / "out/images.json").read_text())["images"]] == [1, 4, 3]


def test_keys_with_hostile_characters_come_back(tmp_path):
    key = 'a", "instances": [\n\udcff.png'
    image = Image(key, 1, None, (36, 36), np.zeros((36, 36, 3), np.uint8))
    run(tmp_path / "out", [image])
    with Sink(tmp_path / "out", PLAN, [image], {}) as sink:
        assert sink.done == {key}


def test_a_run_goes_on_only_with_the_same_resolved_pieces(tmp_path, images):
    """`auto` may mean another detector later: the plan is the same then, the masks are not."""
    pieces = {"detector": {"name": "nano", "sha256": "a"}, "precision": "fp32"}
    with Sink(tmp_path / "out", Plan(), images, pieces):
        pass
    for changed in ({**pieces, "detector": {"name": "yolov8m", "sha256": "b"}}, {**pieces, "precision": "bf16"}):
        with pytest.raises(DepthsegError, match="other options"), Sink(tmp_path / "out", Plan(), images, changed):
            pass
    with Sink(tmp_path / "out", Plan(), images, pieces) as sink:
        assert not sink.done


def test_pictures_are_drawn_while_the_next_answers_are_made(tmp_path, images):
    """In order, a batch ahead at most; a journal line comes after its pictures, and a failure takes no other answer along."""
    plan, made, most = Plan(batch=2), 0, 0
    many = [replace(images[k % 3], key=f"{k:02}.png") for k in range(12)]
    broken = Failure(replace(images[0], key="broken.png"), "read", "empty file")

    with Sink(tmp_path / "out", plan, [*many, broken.image], {}) as sink:

        def answers():
            nonlocal made
            for k, image in enumerate(many):
                made += 1
                yield broken if k == 5 else record(image)

        draw = sink.draw

        def refusing(answer):
            if answer.image.key == "07.png":
                raise OSError(errno.ENAMETOOLONG, "File name too long")
            draw(answer)

        sink.draw = refusing
        seen = []
        for answer in sink.drawn(answers()):
            most = max(most, made - len(seen))
            seen.append(answer.image.key)
            if isinstance(answer, Failure):
                assert (answer.image.key, answer.stage) in (("broken.png", "read"), ("07.png", "write"))
                sink.failed(answer)
                continue
            assert (tmp_path / "out" / "overlays" / f"{answer.image.key}.jpg").is_file() and answer.image.key not in sink.done
            sink.note(answer)
        assert seen == [*(f"{k:02}.png" for k in range(5)), "broken.png", *(f"{k:02}.png" for k in range(6, 12))]
        assert most <= plan.batch + 1
        assert sink.done == set(seen) - {"broken.png", "07.png"}


def test_a_full_disk_ends_the_drawing(tmp_path, images):
    with pytest.raises(DepthsegError, match="takes nothing any more"), Sink(tmp_path / "out", Plan(), images, {}) as sink:

        def full(answer):
            raise OSError(errno.ENOSPC, "No space left on device")

        sink.draw = full
        list(sink.drawn(record(image) for image in images))
    assert manifest(tmp_path / "out")["counts"]["done"] == 0
