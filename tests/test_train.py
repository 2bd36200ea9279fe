"""SA-1B's layout in folders and tars, views and their prompts, and the trainer on a few tiny samples."""

import csv
import gzip
import json
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image as PILImage

from depthseg import masks, sa1b
from depthseg.augment import view
from depthseg.errors import DepthsegError
from depthseg.models.checkpoint import save
from depthseg.models.depthseg import build
from depthseg.schema import ABSENT, CORNER_MAX, CORNER_MIN, NEGATIVE, PADDING, POSITIVE
from depthseg.train import TrainPlan, train


def _write(folder, number: int) -> None:
    rng = np.random.default_rng(number)
    folder.mkdir(parents=True, exist_ok=True)
    pixels = rng.integers(0, 90, (96, 128, 3), dtype=np.uint8)
    found = []
    for _ in range(3):
        y, x = rng.integers(5, 40), rng.integers(5, 60)
        m = np.zeros((96, 128), bool)
        m[y : y + 40, x : x + 50] = True
        pixels[m] = rng.integers(100, 255, 3)
        found.append(m)
    PILImage.fromarray(pixels).save(folder / f"sa_{number}.jpg")
    rows = [{"id": i, "segmentation": masks.encode(m)} for i, m in enumerate(found)]
    (folder / f"sa_{number}.json").write_text(json.dumps({"image": {"image_id": number}, "annotations": rows}))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    top = tmp_path_factory.mktemp("sa1b") / "train"
    for i in range(4):
        _write(top / "sa_000000", i)
    (top / "sa_000000" / "sa_99.jpg").write_bytes(b"without annotation")
    return top


@pytest.mark.parametrize("zipped", [False, True])
def test_tar_and_folder_hold_the_same_samples(root, tmp_path, zipped: bool) -> None:
    path = tmp_path / "sa_000000.tar"
    with tarfile.open(path, "w") as tar:
        for f in sorted((root / "sa_000000").glob("sa_?.*")):
            tar.add(f, f"./{f.name}")
    if zipped:  # as the example archive is published
        path.write_bytes(gzip.compress(path.read_bytes()))
    a, b = sa1b.index([root]), sa1b.index([path])
    assert len(a) == len(b) == 4
    for x, y in zip(map(sa1b.load, a), map(sa1b.load, b), strict=True):
        assert np.array_equal(x.pixels, y.pixels) and x.rles == y.rles
    assert sa1b.index([tmp_path]) == b  # found again below a folder, the unpacked copy not counted twice


def test_manifest_names_the_source(root) -> None:
    with (root.parent / "manifest.csv").open("w", newline="") as f:
        csv.writer(f).writerows([["file", "source_repo"], ["train/sa_000000/sa_2.jpg", "somewhere"]])
    assert [e.source for e in sa1b.index([root])] == ["", "", "somewhere", ""]


def test_a_coco_file_is_a_data_set(root, tmp_path) -> None:
    (tmp_path / "photos").mkdir()
    sample = sa1b.load(sa1b.index([root])[0])
    PILImage.fromarray(sample.pixels).save(tmp_path / "photos" / "a.png")
    polygon = [[10, 10, 50, 10, 50, 40, 10, 40]]
    found = [{"image_id": 3, "segmentation": s, "iscrowd": i} for i, s in enumerate([polygon, sample.rles[0]])]
    content = {"images": [{"id": 3, "file_name": "photos/a.png"}, {"id": 4, "file_name": "empty.png"}], "annotations": found}
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(content))
    (entry,) = sa1b.index([path])  # a picture without objects is none
    assert (entry.key, entry.source) == ("photos/a.png", "instances.json")
    again = sa1b.load(entry)
    assert np.array_equal(again.pixels, sample.pixels)
    assert masks.boxes(again.rles).tolist() == [[10, 10, 50, 40]]  # without the crowd
    path.write_text("[]")
    with pytest.raises(DepthsegError, match="not a COCO instances file"):
        sa1b.index([path])


def test_a_coco_file_of_other_sizes_is_named(root, tmp_path) -> None:
    PILImage.new("RGB", (10, 10)).save(tmp_path / "a.png")
    rle = sa1b.load(sa1b.index([root])[0]).rles[0]
    rows = {"images": [{"id": 1, "file_name": "a.png"}], "annotations": [{"image_id": 1, "segmentation": rle}]}
    (tmp_path / "x.json").write_text(json.dumps(rows))
    with pytest.raises(ValueError, match=r"a\.png: a mask of"):
        sa1b.load(sa1b.index([tmp_path / "x.json"])[0])


def test_bad_roots(tmp_path) -> None:
    with pytest.raises(DepthsegError, match="no such data folder"):
        sa1b.index([tmp_path / "none"])
    with pytest.raises(DepthsegError, match="no sample") as e:
        sa1b.index([tmp_path])
    assert e.value.code == 4


def test_mask_of_another_size_is_named(root, tmp_path) -> None:
    _write(tmp_path, 7)
    PILImage.new("RGB", (10, 10)).save(tmp_path / "sa_7.jpg")
    with pytest.raises(ValueError, match="masks of another size"):
        sa1b.load(sa1b.index([tmp_path])[0])


def test_views_keep_prompt_and_mask_together(root) -> None:
    samples = [sa1b.load(e) for e in sa1b.index([root])]
    depth = np.linspace(0, 1, 96 * 128, dtype=np.float32).reshape(96, 128)
    rng = np.random.default_rng(0)
    seen = set()
    for i in range(60):
        v = view(samples[i % 4], depth, (samples[(i + 1) % 4], depth) if i % 2 else None, 96, 2, 3, 0.2, 0.5, rng)
        if v is None:
            continue
        assert v.rgb.shape == v.depth.shape == (3, 96, 96) and v.target.shape[1:] == (48, 48)
        for t, box, xy, labels in zip(v.target, v.boxes, v.points, v.labels, strict=True):
            if CORNER_MIN in labels:
                assert labels[:2].tolist() == [CORNER_MIN, CORNER_MAX] and (labels[2:] == ABSENT).all()
                assert np.abs(xy[:2].ravel() / 1024 - box).max() < 0.3
                seen.add("box")
            else:
                clicks = [(p, s) for p, s in zip(xy, labels, strict=True) if s in (POSITIVE, NEGATIVE)]
                assert labels[len(clicks)] == PADDING and labels[0] == POSITIVE
                for p, s in clicks:
                    x, y = (p / 1024 * 48).astype(int).clip(0, 47)
                    assert t[y, x] > 0 if s == POSITIVE else t[y, x] < 1
                    seen.add(int(s))
    assert seen == {"box", POSITIVE, NEGATIVE}


def _plan(root, out, **changes) -> TrainPlan:
    values = {"stage": "0", "model": "nano", "steps": 2, "batch": 2, "masks": 2, "workers": 0, "save_every": 1, "device": "cpu"}
    return TrainPlan(data=(str(root),), output=str(out), **{**values, **changes})


def test_stage_1_moves_the_depth_branch_alone_and_stage_2_everything(root, tmp_path) -> None:
    start = train(_plan(root, tmp_path / "rgb", steps=1))
    maps = tmp_path / "maps" / "sa_000000"
    maps.mkdir(parents=True)
    for i in range(4):
        ramp = np.linspace(0, 65535, 96 * 128).reshape(96, 128).astype(np.uint16)
        PILImage.fromarray(ramp).save(maps / f"sa_{i}.jpg.png")
    one = _plan(root, tmp_path / "one", stage="1", model="nano-depth", init=str(start), depth_maps=str(tmp_path / "maps"), lr=1e-2)
    train(one)
    from depthseg.models.checkpoint import read

    before, after = read(start), torch.load(tmp_path / "one" / "last.pt", weights_only=True)["network"]
    for k, v in before.items():
        torch.testing.assert_close(after[k], v.to(after[k].dtype), atol=0, rtol=0, msg=k)
    assert after["alpha"] != 0.1
    two = _plan(root, tmp_path / "two", stage="2", model="nano-depth", init=str(tmp_path / "one/weights.safetensors"), lr=1e-2,
                depth_maps=str(tmp_path / "maps"), steps=1)  # fmt: skip
    train(two)
    moved = torch.load(tmp_path / "two" / "last.pt", weights_only=True)["network"]
    for part in ("image_encoder.norm.weight", "depth_encoder.norm.weight", "mask_decoder.iou_token.weight"):
        assert not torch.equal(moved[part], after[part]), part


def test_a_resumed_run_ends_as_an_uninterrupted_one(root, tmp_path) -> None:
    whole = train(_plan(root, tmp_path / "a", steps=3))
    half = _plan(root, tmp_path / "b", steps=3)
    with pytest.raises(KeyboardInterrupt):
        _interrupted(half)
    again = train(half, resume=True)
    from depthseg.models.checkpoint import read

    for (k, a), b in zip(read(whole).items(), read(again).values(), strict=True):
        assert torch.equal(a, b), k


def _interrupted(plan: TrainPlan) -> None:
    """Train, but stop hard after the second step's checkpoint."""
    import depthseg.train as module

    original, calls = module._save, []

    def save(path, state) -> None:
        original(path, state)
        calls.append(path)
        if len(calls) == 2:
            raise KeyboardInterrupt

    module._save = save
    try:
        train(plan)
    finally:
        module._save = original


def test_refusals(root, tmp_path) -> None:
    with pytest.raises(DepthsegError, match="no stage"):
        train(_plan(root, tmp_path / "x", stage="9"))
    with pytest.raises(DepthsegError, match="starts from a trained model"):
        train(_plan(root, tmp_path / "x", stage="1"))
    start = tmp_path / "start.safetensors"
    save(build("nano", depth=False), start, {})
    with pytest.raises(DepthsegError, match="has none"):
        train(_plan(root, tmp_path / "x", stage="1", init=str(start)))
    with pytest.raises(DepthsegError, match="needs depth maps"):
        train(_plan(root, tmp_path / "x", stage="2", model="nano-depth", init=str(start)))
    (tmp_path / "maps").mkdir()
    with pytest.raises(DepthsegError, match="depth map"):
        train(_plan(root, tmp_path / "x", stage="2", model="nano-depth", init=str(start), depth_maps=str(tmp_path / "maps")))
    with pytest.raises(DepthsegError, match="no loss called blur"):
        train(_plan(root, tmp_path / "x", losses={"blur": 1.0}))
    (tmp_path / "y").mkdir()
    (tmp_path / "y" / "last.pt").touch()
    with pytest.raises(DepthsegError, match="--resume"):
        train(_plan(root, tmp_path / "y"))
    (tmp_path / "y" / "plan.json").write_text("{}")
    with pytest.raises(DepthsegError, match="other options"):
        train(_plan(root, tmp_path / "y"), resume=True)


def test_two_processes_train_one_model(root, tmp_path) -> None:
    """torchrun on the CPU: both ranks step together and rank 0 writes."""
    code = (
        "import sys, torch, os; torch.set_num_threads(1)\n"
        "from depthseg.train import train, TrainPlan\n"
        f"train(TrainPlan(stage='0', data=({str(root)!r},), output={str(tmp_path / 'out')!r}, model='nano', steps=2, batch=2,"
        " masks=1, workers=0, device='cpu', save_every=1))\n"
        "sys.stdout.flush(); os._exit(0)\n"  # gloo may abort at interpreter exit after all work is done
    )
    script = tmp_path / "go.py"
    script.write_text(code)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=29517", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert (tmp_path / "out" / "weights.safetensors").exists(), done.stderr[-2000:]
    assert torch.load(tmp_path / "out" / "last.pt", weights_only=True)["step"] == 2


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_proposer_trains_in_both_precisions(root, tmp_path, precision) -> None:
    plan = _plan(root, tmp_path / "boxes", stage="boxes", precision=precision)
    assert train(plan).is_file()
