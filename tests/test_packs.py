"""Training data checked and packed: every fault is named, and a pack trains like the folder that it was made of."""

import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as PILImage
from typer.testing import CliRunner

from depthseg import cli, masks, packs, sa1b
from depthseg.depth import DepthFolder, maps_of
from depthseg.errors import NOTHING_TO_DO, SOME_FAILED, DepthsegError
from depthseg.schema import Image


def sample(folder: Path, number: int, size=(96, 128)) -> None:
    rng = np.random.default_rng(number)
    folder.mkdir(parents=True, exist_ok=True)
    pixels = np.asarray(PILImage.fromarray(rng.integers(0, 255, (6, 8, 3), dtype=np.uint8)).resize(size[::-1], PILImage.Resampling.BICUBIC))
    mask = np.zeros(size, bool)
    mask[10 : size[0] // 2, 20 : size[1] // 2] = True
    PILImage.fromarray(pixels).save(folder / f"sa_{number}.jpg", quality=95)
    rows = [{"segmentation": masks.encode(m)} for m in (mask, ~mask)]
    (folder / f"sa_{number}.json").write_text(json.dumps({"annotations": rows}))


@pytest.fixture
def root(tmp_path):
    for i in range(6):
        sample(tmp_path / "data" / "sa_000000", i)
    return tmp_path / "data"


def run(*words: object):
    from depthseg import cli

    return CliRunner().invoke(cli.app, ["data", *map(str, words)])


def test_every_fault_is_named(root, tmp_path) -> None:
    folder = root / "sa_000000"
    (folder / "sa_0.jpg").write_bytes((folder / "sa_0.jpg").read_bytes()[:300])
    (folder / "sa_1.json").write_text('{"annotations": []}')
    tiny = np.zeros((96, 128), bool)
    tiny[3:6, 3:6] = True
    (folder / "sa_2.json").write_text(json.dumps({"annotations": [{"segmentation": masks.encode(tiny)}]}))
    shutil.copy(folder / "sa_3.jpg", folder / "sa_4.jpg")
    PILImage.new("RGB", (50, 40)).save(folder / "sa_5.jpg")
    (folder / "sa_7.jpg").write_bytes(b"alone")
    (folder / "sa_8.json").write_text("alone")
    entries = sa1b.index([root])
    found = {Path(key).name: (fault, said) for key, fault, said in [*packs.unpaired([root]), *packs.check(entries)]}
    assert {name: fault for name, (fault, _) in found.items()} == {
        "sa_0.jpg": "unreadable",
        "sa_1.jpg": "empty",
        "sa_2.jpg": "tiny",
        "sa_4.jpg": "duplicate",
        "sa_5.jpg": "unreadable",
        "sa_7.jpg": "unpaired",
        "sa_8.json": "unpaired",
    }
    assert found["sa_4.jpg"][1].endswith("sa_000000/sa_3.jpg") and "another size" in found["sa_5.jpg"][1]
    shutil.copytree(folder, tmp_path / "other" / "sa_000000")
    twins = {key: said for key, fault, said in packs.check(sa1b.index([root, tmp_path / "other"])) if fault == "duplicate"}
    assert twins["sa_000000/sa_3.jpg"].endswith(str(folder / "sa_3.jpg")), "the same name in another root"
    done = run("check", root, "--json")
    told = json.loads(done.stdout)
    assert done.exit_code == SOME_FAILED and told["samples"] == 6 and told["unusable"] == 5
    assert run("check", root, "--limit", 1).exit_code == SOME_FAILED
    shutil.rmtree(root)
    sample(root, 1)
    assert run("check", root).exit_code == 0


def test_a_coco_set_of_ones_own_is_checked(tmp_path) -> None:
    PILImage.new("RGB", (40, 30)).save(tmp_path / "a.png")
    square = [[5, 5, 20, 5, 20, 20, 5, 20]]
    rows = [{"id": i, "image_id": i, "segmentation": square, "iscrowd": 0} for i in (1, 2)]
    (tmp_path / "mine.json").write_text(
        json.dumps({"images": [{"id": 1, "file_name": "a.png"}, {"id": 2, "file_name": "gone.png"}], "annotations": rows})
    )
    found = list(packs.check(sa1b.index([tmp_path / "mine.json"])))
    assert [(key, fault) for key, fault, _ in found] == [("gone.png", "unreadable")]


def test_upstreams_layout_is_read(root, tmp_path) -> None:
    own = tmp_path / "upstream"
    for folder, suffix in (("images", "jpg"), ("masks", "json")):
        (own / folder).mkdir(parents=True)
        for i in range(6):
            shutil.copy(root / "sa_000000" / f"sa_{i}.{suffix}", own / folder)
    (own / "sa_images_ids.txt").write_text("3\n1\n")
    entries = sa1b.index([own])
    assert [e.key for e in entries] == ["images/sa_3.jpg", "images/sa_1.jpg"], "in the order of the list"
    plain = {e.key: e for e in sa1b.index([root])}
    for entry, number in zip(entries, (3, 1)):
        assert sa1b.load(entry).rles == sa1b.load(plain[f"sa_000000/sa_{number}.jpg"]).rles
    (own / "sa_images_ids.txt").write_text("3\n9\n")
    assert [fault for _, fault, _ in packs.check(sa1b.index([own]))] == ["unreadable"]
    (own / "sa_images_ids.txt").write_text("3\n../../x\n")
    with pytest.raises(DepthsegError, match="holds"):
        sa1b.index([own])


def test_a_pack_holds_what_went_in(root, tmp_path) -> None:
    maps = tmp_path / "maps" / "sa_000000"
    maps.mkdir(parents=True)
    for i in range(6):
        ramp = np.linspace(0, 65535, 96 * 128).reshape(96, 128).astype(np.uint16)
        PILImage.fromarray(ramp if i % 2 else ramp[::-1].copy()).save(maps / f"sa_{i}.jpg.png")
    (tmp_path / "maps" / "depth.json").write_text('{"kind": "inverse", "estimator": "nano"}')
    done = run("pack", root, "-o", tmp_path / "pack", "--side", 1024, "--depth-maps", tmp_path / "maps")
    assert done.exit_code == 0, done.output
    folder = DepthFolder(tmp_path / "maps")
    plain = {sa1b.load(e).rles[0]["counts"] + str(sa1b.load(e).pixels.sum()): e for e in sa1b.index([root])}
    assert len(sa1b.index([tmp_path / "pack"])) == 6
    with tarfile.open(tmp_path / "pack" / "shard-00000.tar") as tar:
        keys = {json.load(tar.extractfile(m))["image"]["key"]: m.name for m in tar if m.name.endswith(".json")}
    for entry in sa1b.index([tmp_path / "pack"]):
        got = sa1b.load(entry)
        origin = next(k for k, name in keys.items() if Path(name).stem == Path(entry.key).stem)
        before = next(e for e in plain.values() if e.key == origin)
        was = sa1b.load(before)
        assert got.rles == was.rles, "not shrunk, so the very same masks"
        assert np.abs(got.pixels.astype(int) - was.pixels).mean() < 3, "one JPEG later"
        (wanted,) = folder([Image(origin, 0, None, (96, 128))])
        assert np.abs(sa1b.depth_of(entry) - wanted).max() < 1e-4
    assert sa1b.depth_of(sa1b.index([root])[0]) is None


def test_smaller_pictures_keep_their_masks_in_place(root, tmp_path) -> None:
    count, left = packs.pack(sa1b.index([root]), tmp_path / "pack", side=64)
    assert (count, left) == (6, [])
    for entry in sa1b.index([tmp_path / "pack"]):
        got = sa1b.load(entry)
        assert got.pixels.shape == (48, 64, 3)
        assert masks.boxes(got.rles[:1]).tolist() == [[10, 5, 32, 24]]


def test_shards_go_on_where_they_stopped(root, tmp_path) -> None:
    entries = sa1b.index([root])
    packs.pack(entries, tmp_path / "whole", side=64, shard=4000)
    files = sorted((tmp_path / "whole").glob("shard-*.tar"))
    assert len(files) >= 3

    def stop(done: int, total: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        packs.pack(entries, tmp_path / "cut", side=64, shard=4000, progress=stop)
    assert not list((tmp_path / "cut").glob(".*part"))
    packs.pack(entries, tmp_path / "cut", side=64, shard=4000)
    for file in files:
        assert file.read_bytes() == (tmp_path / "cut" / file.name).read_bytes()
    with pytest.raises(DepthsegError, match="other settings: side"):
        packs.pack(entries, tmp_path / "cut", side=32)
    with pytest.raises(DepthsegError, match="other settings: maps"):
        packs.pack(entries, tmp_path / "cut", side=64, maps="depth-anything-v2-small")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(DepthsegError, match="not empty"):
        packs.pack(entries, tmp_path / "mine", side=32)


def test_tars_get_depth_maps_and_tell_what_has_no_partner(root, tmp_path) -> None:
    tars = tmp_path / "tars"
    tars.mkdir()
    with tarfile.open(tars / "sa_000020.tar", "w") as tar:
        for file in sorted((root / "sa_000000").iterdir()):
            if file.name not in ("sa_2.json", "sa_4.jpg"):
                tar.add(file, f"./{file.name}")
    found = [(Path(key).name, fault) for key, fault, _ in packs.unpaired([tars])]
    assert found == [("sa_2.jpg", "unpaired"), ("sa_4.json", "unpaired")]
    done = CliRunner().invoke(cli.app, ["depth", str(tars), "-o", str(tmp_path / "maps"), "--depth", "nano", "--device", "cpu"])
    assert done.exit_code == 0, done.output
    entries = sa1b.index([tars])
    assert len(entries) == 4
    images = [sa1b.picture(e) for e in entries]
    DepthFolder(tmp_path / "maps").check(images)
    (tars / "backup.tar").write_bytes(b"something else")
    assert [i.key for i in sa1b.pictures([str(tars)])] == [i.key for i in sa1b.pictures([f"{tars}/sa_*.tar"])] == [i.key for i in images]
    with pytest.raises(DepthsegError, match=r"not a readable \.tar archive"):
        sa1b.pictures([tars / "missing.tar"])
    (tars / "backup.tar").unlink()
    plain = tmp_path / "plain"
    assert CliRunner().invoke(cli.app, ["depth", str(root), "-o", str(plain), "--depth", "nano", "--device", "cpu"]).exit_code == 0
    for image in images:
        name = f"{Path(image.key).name}.png"
        assert (tmp_path / "maps" / f"{image.key}.png").read_bytes() == (plain / "sa_000000" / name).read_bytes()
    done = run("pack", tars, "-o", tmp_path / "pack", "--depth-maps", tmp_path / "maps")
    assert done.exit_code == 0 and maps_of(None, str(tmp_path / "pack")) == "nano"


def test_what_cannot_be_packed_is_said(root, tmp_path) -> None:
    (root / "sa_000000" / "sa_2.jpg").write_bytes(b"x")
    done = run("pack", root, "-o", tmp_path / "pack", "--json")
    told = json.loads(done.stdout.splitlines()[0])
    assert done.exit_code == SOME_FAILED and told["samples"] == 5 and "sa_2.jpg" in told["left_out"][0]
    for i in range(6):
        (root / "sa_000000" / f"sa_{i}.jpg").write_bytes(b"x")
    done = subprocess.run(
        [sys.executable, "-m", "depthseg", "data", "pack", str(root), "-o", str(tmp_path / "none")], capture_output=True, text=True
    )
    assert done.returncode == NOTHING_TO_DO and "data check" in done.stderr
