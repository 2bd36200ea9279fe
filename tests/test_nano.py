"""The embedded weights as a user meets them: they load, they are small, they have a card, and the demo runs on them."""

import json
import subprocess
import sys

import numpy as np
import pytest
from pycocotools import mask as coco

from depthseg import catalog, data, masks
from depthseg.plan import Plan
from depthseg.schema import Prompts
from depthseg.segment import Segmenter
from depthseg.views import View

FILES = [catalog.MODELS["nano"], catalog.MODELS["nano-depth"], catalog.DEPTHS["nano"], catalog.DETECTORS["nano"]]


def test_together_at_most_40_mb_and_each_on_the_card():
    folder = catalog.embedded() / "nano"
    card = (folder / "README.md").read_text()
    assert {p.name for p in folder.glob("*.safetensors")} == {row.file.split("/")[-1] for row in FILES}
    for row in FILES:
        assert row.file.split("/")[-1] in card
    assert sum(p.stat().st_size for p in folder.iterdir()) < 40_000_000


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "out"
    command = [sys.executable, "-m", "depthseg", "segment", "--demo", "-o", str(out), "--depth-panel", "--device", "cpu"]
    return out, command, subprocess.run(command, capture_output=True, text=True)


def test_the_demo_writes_what_the_readme_lists(demo):
    out, _, done = demo
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(out)
    results = json.loads((out / "predictions.json").read_text())
    images = {row["id"]: row for row in json.loads((out / "images.json").read_text())["images"]}
    assert {r["image_id"] for r in results} == set(images), "a photograph without a single mask"
    for r in results:
        mask = coco.decode(r["segmentation"])
        assert mask.shape == (images[r["image_id"]]["height"], images[r["image_id"]]["width"])
        assert mask.sum() > 0 and 0 <= r["predicted_iou"] <= 1.5 and 0 <= r["stability_score"] <= 1
    for row in images.values():
        assert (out / "overlays" / row["file_name"]).is_file() and (out / "labelmaps" / f"{row['file_name']}.png").is_file()
    run = json.loads((out / "run.json").read_text())
    assert run["state"] == "finished"


def test_run_again_it_has_nothing_left_to_do(demo):
    out, command, _ = demo
    before = (out / "predictions.json").read_bytes()
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0 and "done already" in again.stderr
    assert (out / "predictions.json").read_bytes() == before


@pytest.mark.parametrize("model, zoom", [("nano", False), ("nano-depth", False), ("nano-depth", True)])
def test_a_box_around_a_person_gives_a_person_not_the_box(model: str, zoom: bool):
    image = next(i for i in data.find(data.demo()) if "hopper" in i.key)
    image = data.read(image)
    h, w = image.size
    box = np.array([[0.06 * w, 0.06 * h, w, h]], np.float32)  # she fills the picture
    segmenter = Segmenter(Plan(model=model, zoom=zoom, device="cpu"), source=lambda images: [])
    (depth,) = segmenter.depths([image])
    (answers,) = segmenter.masks_for([View(image.pixels, depth, image.size)], [Prompts.of(boxes=box)])
    mask = masks.decode(answers[0].rle)
    face, corners = mask[int(0.35 * h), int(0.45 * w)], [mask[5, 5], mask[5, -5]]
    assert face and not any(corners)
    assert 0.3 < mask.mean() < 0.9
