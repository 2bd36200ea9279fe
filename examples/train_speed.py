"""What training costs on this machine: reading a sample, from pictures as they are and from packs, and a step of each stage.

    python examples/train_speed.py                                  nano-depth on the CPU
    python examples/train_speed.py --model efficientvit-sam-l2-depth --steps 30

Samples are made here: one photograph of the demo at SA-1B's size (2000 x 1500), each copy with 100 masks of other shapes. Weights are
random. Reading is in milliseconds of CPU for one sample, read one after the other; steps run as `depthseg train` runs them.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image as PILImage
from PIL import ImageDraw

from depthseg import catalog, data, masks, packs, sa1b
from depthseg.depth import DepthFolder
from depthseg.models import checkpoint
from depthseg.stages import STAGES, TrainPlan
from depthseg.tasks.choose import task_of
from depthseg.train import train

SIZE = (2000, 1500)


def make(folder: Path, count: int) -> tuple[Path, Path]:
    """Samples in SA-1B's layout, and their depth maps."""
    photograph = PILImage.open(data.demo()[0]).convert("RGB").resize(SIZE, PILImage.Resampling.BICUBIC)
    samples, maps = folder / "sa1b", folder / "maps"
    samples.mkdir()
    maps.mkdir()
    rng = np.random.default_rng(0)
    for i in range(count):
        photograph.save(samples / f"sa_{i}.jpg", quality=90)
        rows = []
        for _ in range(100):
            shape = PILImage.new("1", SIZE)
            x, y = rng.uniform(0, SIZE[0]), rng.uniform(0, SIZE[1])
            turn, reach = np.linspace(0, 2 * np.pi, 16, endpoint=False), rng.uniform(20, 300) * rng.uniform(0.6, 1, 16)
            ImageDraw.Draw(shape).polygon(list(zip(x + reach * np.cos(turn), y + reach * np.sin(turn))), fill=1)
            if np.asarray(shape).any():
                rows.append({"segmentation": masks.encode(np.asarray(shape))})
        (samples / f"sa_{i}.json").write_text(json.dumps({"annotations": rows}))
        ramp = np.linspace(0, 65535, 518 * 690).reshape(518, 690).astype(np.uint16)
        PILImage.fromarray(ramp).save(maps / f"sa_{i}.jpg.png")
    (maps / "depth.json").write_text('{"kind": "inverse", "estimator": "a ramp"}')
    return samples, maps


def reading(plan: TrainPlan) -> float:
    """Milliseconds of CPU for one sample, drawn as training draws them."""
    stage = STAGES[plan.stage]
    entry = catalog.row(catalog.MODELS, plan.model, "model")
    source = task_of(plan, stage, catalog.resolve(entry)(**entry.args)).source
    rng = np.random.default_rng(0)
    setting = source.setting(rng)
    source.sample(0, rng, setting)
    start = time.process_time()
    for index in range(1, 9):
        source.sample(index, rng, setting)
    return 1000 * (time.process_time() - start) / 8


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="nano-depth")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--device", default="auto")
    told = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        samples, maps = make(folder, 12)
        depth = DepthFolder(maps)

        def depth_of(entry: sa1b.Entry, size: tuple[int, int]):
            return depth([data.Image(entry.key, 0, None, size)])[0]

        packs.pack(sa1b.index([samples]), folder / "packs", 512, depth_of)
        entry = catalog.row(catalog.MODELS, told.model, "model")
        start = folder / "start.safetensors"
        checkpoint.save(catalog.resolve(entry)(**entry.args), start, {})
        common = {"model": told.model, "init": str(start), "device": told.device, "steps": told.steps, "log_every": 1}
        plain = TrainPlan("2", (str(samples),), str(folder / "o"), depth_maps=str(maps), **common)
        packed = TrainPlan("2", (str(folder / "packs"),), str(folder / "o"), **common)
        a, b = reading(plain), reading(packed)
        print(f"reading a sample: {a:.1f} ms of CPU as published, {b:.1f} ms from a pack of 512 pixels, {a / b:.1f} times less")
        for stage in ("1", "2"):
            lines: list[dict] = []
            train(TrainPlan(**{**vars(packed), "stage": stage, "output": str(folder / f"out{stage}")}),
                  tell=lambda kind, values, lines=lines: lines.append(values) if kind == "log" else None)  # fmt: skip
            speeds = sorted(line["images_per_s"] for line in lines[len(lines) // 4 :])
            middle = speeds[len(speeds) // 2]
            epochs = sum(STAGES[s].epochs for s in ("1", "2"))
            print(f"stage {stage}: {middle:.2f} images/s; the paper's {epochs:g} epochs of 11,186 images at this speed: "
                  f"{epochs * 11186 / middle / 3600:.1f} h")  # fmt: skip


if __name__ == "__main__":
    main()
