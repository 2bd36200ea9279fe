"""What each backend and precision changes: `python examples/exactness.py IMAGES ANNOTATIONS`, COCO's, with the true boxes as prompts.

For each choice: the largest relative difference of an image's features, mean and least IoU of the masks with those of the plain
network (torch, fp32, BatchNorm as loaded), and the process' CPU time for an image beside the plain one's, in turns in one process.
Options: --model NAME (nano-depth), --count N images (all), --threads N (1), --only BACKEND/PRECISION (repeatable).
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from depthseg import truth
from depthseg.data import read
from depthseg.errors import DepthsegError
from depthseg.exactness import exactness
from depthseg.plan import BACKENDS, Plan
from depthseg.schema import Prompts


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("images", type=Path)
    parser.add_argument("annotations", type=Path)
    parser.add_argument("--model", default="nano-depth")
    parser.add_argument("--count", type=int)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", action="append")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    data = truth.read(given.images, given.annotations, subset=given.count)
    images = [read(t.image) for t in data.truths]
    asked = [Prompts.of(boxes=t.box) for t in data.truths]
    plan = Plan(model=given.model, detector="grid", depth="nano" if given.model.endswith("depth") else "auto", device="cpu", zoom=False)
    print(f"{given.model}, {len(images)} images, {sum(map(len, asked))} masks, {given.threads} thread, whole pictures")
    print(f"{'backend':10}{'precision':10}{'features':>10}{'mean IoU':>10}{'least':>8}{'plain ms':>10}{'ms':>8}{'ratio':>7}")
    for choice in given.only or [f"{b}/{p}" for b in BACKENDS for p in ("fp32", "bf16")]:
        backend, precision = choice.split("/")
        try:
            found = exactness(replace(plan, backend=backend, precision=precision), images, asked)
        except DepthsegError as error:
            print(f"{backend:10}{precision:10}  {error.message}")
            continue
        plain, ms = (1000 * s / len(images) for s in found.seconds)
        print(
            f"{backend:10}{precision:10}{found.features:10.1e}{found.iou.mean():10.5f}{found.iou.min():8.3f}"
            f"{plain:10.0f}{ms:8.0f}{plain / ms:7.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
