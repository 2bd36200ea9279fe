"""Images per second and peak memory of `depthseg segment`, as a user runs it: `python examples/speed.py PHOTOS`.

Every row is a process of its own over N copies of the photographs in PHOTOS, on the CPU, with ten boxes an image from a file, so
that all models get the same work. L2 runs with random weights, which costs the same time as trained ones.
"""

import itertools
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from PIL import Image

from depthseg import catalog

ROWS = [  # model, depth, number of images
    ("nano", "none", 10), ("nano", "none", 200), ("nano-depth", "nano", 10), ("nano-depth", "nano", 200),
    ("efficientvit-sam-l2", "none", 10), ("efficientvit-sam-l2-depth", "nano", 10),
]  # fmt: skip


def copies(photos: Path, count: int, folder: Path) -> Path:
    """`count` pictures at 640 pixels, and ten boxes for each."""
    boxes = []
    sources = itertools.cycle(sorted(p for p in photos.iterdir() if p.suffix.lower() in (".jpg", ".jpeg", ".png")))
    for i, source in zip(range(count), sources, strict=False):
        picture = Image.open(source).convert("RGB")
        picture.thumbnail((640, 640))
        picture.save(folder / f"{i:04}.jpg")
        w, h = picture.size
        boxes += [{"file_name": f"{i:04}.jpg", "category_id": 1, "score": 1.0,
                   "bbox": [w * 0.09 * k, h * 0.05 * k, w * 0.2, h * 0.4]} for k in range(10)]  # fmt: skip
    (folder / "boxes.json").write_text(json.dumps(boxes))
    return folder


def random_weights(name: str, folder: Path) -> Path:
    row = catalog.MODELS[name]
    torch.manual_seed(0)
    torch.save(catalog.resolve(row)(**row.args).state_dict(), folder / f"{name}.pt")
    return folder / f"{name}.pt"


def main() -> None:
    print(f"{'model':28}{'depth':8}{'images':>8}{'images/s':>10}{'peak MiB':>10}")
    for model, depth, count in ROWS:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            (folder / "in").mkdir()
            data = copies(Path(sys.argv[1]), count, folder / "in")
            command = [sys.executable, "-m", "depthseg", "segment", str(data), "-o", str(folder / "out"), "--model", model,
                       "--depth", depth, "--boxes", str(data / "boxes.json"), "--device", "cpu"]  # fmt: skip
            if model.startswith("efficientvit"):
                command += ["--weights", str(random_weights(model, folder))]
            # a process of its own waits for it, so that the peak is that of this command alone
            code = (
                "import resource, subprocess, sys; r = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL);"
                "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024); sys.exit(r.returncode)"
            )
            done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True)
            if done.returncode:
                sys.exit(done.stderr)
            # the run itself says its images/s, without the start of the process
            said = next(line for line in done.stderr.splitlines() if "masks in" in line)
            rate = float(said.split(" images/s")[0].split()[-1])
            print(f"{model:28}{depth:8}{count:8}{rate:10.2f}{float(done.stdout):10.0f}", flush=True)


if __name__ == "__main__":
    main()
