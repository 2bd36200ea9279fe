"""Fixtures for all tests, and an environment in which no test touches the network, the user's caches or every core."""

import atexit
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

import pytest

# Read by torch, huggingface_hub, ultralytics and our catalog when they are first used, hence before any test imports them.
_scratch = Path(tempfile.mkdtemp(prefix="depthseg-tests-"))
atexit.register(shutil.rmtree, _scratch, ignore_errors=True)
for _name in [name for name in os.environ if name.startswith("DEPTHSEG_")]:
    del os.environ[_name]  # a developer's own settings
os.environ.update(
    DEPTHSEG_CONFIG="none",
    OMP_NUM_THREADS="1",
    HF_HUB_OFFLINE="1",
    HF_HOME=str(_scratch / "huggingface"),
    XDG_CACHE_HOME=str(_scratch / "cache"),
    DEPTHSEG_WEIGHTS=str(_scratch / "weights"),
    YOLO_OFFLINE="true",
    YOLO_CONFIG_DIR=str(_scratch / "ultralytics"),
    MPLCONFIGDIR=str(_scratch / "matplotlib"),
)
os.environ.pop("HF_HUB_CACHE", None)


@pytest.fixture(autouse=True)
def weights_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that takes the place of the user's cache of pulled weights, empty in every test."""
    folder = tmp_path.parent / f"{tmp_path.name}-weights"
    monkeypatch.setenv("DEPTHSEG_WEIGHTS", str(folder))
    return folder


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder of three tiny photographs: a.png, b.jpg and sub/c.png, each with a bright rectangle on noise."""
    import numpy as np
    from PIL import Image

    folder = tmp_path / "pictures"
    (folder / "sub").mkdir(parents=True)
    for seed, (name, h, w) in enumerate([("a.png", 48, 64), ("b.jpg", 64, 40), ("sub/c.png", 32, 32)]):
        pixels = np.random.default_rng(seed).integers(0, 80, (h, w, 3), dtype=np.uint8)
        pixels[h // 4 : h // 2, w // 4 : 3 * w // 4] = (220, 180, 60)
        Image.fromarray(pixels).save(folder / name)
    return folder


@pytest.fixture
def coco_file(pictures: Path, tmp_path: Path) -> Path:
    """Annotations of the three pictures, one of each way to write a mask; the last is a crowd, and one has no area."""
    import json

    import numpy as np
    from PIL import Image

    from depthseg import masks

    images, annotations = [], []
    for n, name in enumerate(("a.png", "b.jpg", "sub/c.png"), 1):
        w, h = Image.open(pictures / name).size
        mask = np.zeros((h, w), bool)
        mask[h // 4 : h // 2, w // 4 : 3 * w // 4] = True
        x0, y0, x1, y1 = w // 4, h // 4, 3 * w // 4, h // 2
        runs = np.flatnonzero(np.diff(mask.ravel(order="F"), prepend=False))
        segmentation = {
            1: [[x0, y0, x1, y0, x1, y1, x0, y1]],
            2: masks.encode(mask),
            3: {"size": [h, w], "counts": np.diff([0, *runs, mask.size]).tolist()},
        }[n]
        images.append({"id": n, "file_name": name, "height": h, "width": w})
        common = {"id": n, "image_id": n, "category_id": 1, "bbox": [x0, y0, x1 - x0, y1 - y0]}
        annotations.append({**common, "segmentation": segmentation, "area": int(mask.sum()), "iscrowd": int(n == 3)})
    annotations.append({**annotations[0], "id": 9, "area": 0.4})
    path = tmp_path / "instances.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "thing"}]}))
    return path


def write_sample(folder: Path, number: int) -> None:
    """A picture of noise with three bright rectangles, one over the other, in SA-1B's layout."""
    import json

    import numpy as np
    from PIL import Image

    from depthseg import masks

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
    Image.fromarray(pixels).save(folder / f"sa_{number}.jpg")
    rows = [{"id": i, "segmentation": masks.encode(m)} for i, m in enumerate(found)]
    (folder / f"sa_{number}.json").write_text(json.dumps({"image": {"image_id": number}, "annotations": rows}))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four samples in SA-1B's layout, and a picture without annotations."""
    top = tmp_path_factory.mktemp("sa1b") / "train"
    for i in range(4):
        write_sample(top / "sa_000000", i)
    (top / "sa_000000" / "sa_99.jpg").write_bytes(b"without annotation")
    return top


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of data and parity files beside the repository; tests that need it are skipped without it."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip("needs the folder ../shared beside the repository")
    return folder


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]):
    """Run the command line in this process: exit code, stdout, stderr."""
    from depthseg import cli

    def call(*words: object) -> tuple[object, str, str]:
        with pytest.raises(SystemExit) as leaving:
            cli.main([str(word) for word in words])
        out, err = capsys.readouterr()
        return leaving.value.code, out, err

    return call


def needs_ultralytics() -> None:
    """Skip where the extra yolo is not installed. Looks without importing: that would change PIL.Image.open for all tests after."""
    if importlib.util.find_spec("ultralytics") is None:
        pytest.skip("needs the extra yolo")
