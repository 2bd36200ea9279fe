"""How much faster `depthseg eval` is than the official loop, with equal scores: `python examples/eval_speed.py IMAGES ANNOTATIONS`.

The loop is that of depthseg/reference.py (one prompt in each call of the decoder, all three candidate masks enlarged to the full
picture in two steps), and here from its description: all annotations looked through for each image, clicks by a distance transform
over the whole picture, a run of its own for 1, 3 and 5 clicks. Both sides have the same weights in fp32 and take turns in one process.
Options: --model NAME (random weights unless its own are here), --count N images (8), --rounds N (3), --threads N (1).
"""

import argparse
import json
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from scipy.ndimage import distance_transform_edt

from depthseg import asking, bench, reference, score, truth
from depthseg.data import read
from depthseg.masks import decode
from depthseg.plan import Plan
from depthseg.schema import Prompts
from depthseg.segment import Segmenter

CLICKS = (1, 3, 5)


def click(wanted, seen, before):
    """The deepest point of the error over the whole picture: x, y, positive."""
    depth = []
    for error in (wanted & ~seen, ~wanted & seen):
        inside = distance_transform_edt(np.pad(error, 1))[1:-1, 1:-1]
        for x, y in before:
            inside[y, x] = 0
        depth.append(inside)
    positive = depth[0].max() > depth[1].max()
    y, x = np.unravel_index((depth[0] if positive else depth[1]).argmax(), wanted.shape)
    return x, y, positive


def official(network, multimask, data, annotations, clicks):
    """mIoU in percent, by the loop; clicks None: boxes. multimask: a function of the labels (K,) of a prompt."""
    ious = []
    for t in data.truths:
        features = reference.set_image(network, read(t.image).pixels)
        for annotation in [a for a in annotations if a["image_id"] == t.image.id]:
            if annotation["area"] < 1:
                continue
            wanted = decode(t.rle[t.id.tolist().index(annotation["id"])])
            seen, points, signs = np.zeros_like(wanted), [], []
            for _ in range(clicks or 1):
                if clicks:
                    x, y, positive = click(wanted, seen, points)
                    points.append((x, y))
                    signs.append(int(positive))
                    prompt = Prompts.of(points=np.array([points]), signs=np.array([signs]))
                else:
                    x, y, w, h = annotation["bbox"]
                    prompt = Prompts.of(boxes=np.array([[x, y, x + w, y + h]]))
                xy, labels = prompt.points[0], prompt.labels[0]
                found, predicted = reference.predict(network, features, t.image.size, xy, labels, multimask(labels))
                seen = found[predicted.argmax()]
            ious.append(np.logical_and(wanted, seen).sum() / (np.logical_or(wanted, seen).sum() + 1e-7))
    return 100 * np.mean(ious)


def ours(segmenter, data, clicks):
    """mIoU in percent after each number of clicks, or for boxes."""
    ask = score.Request("point", clicks) if clicks else score.Request()
    with tempfile.TemporaryDirectory() as folder:
        results, *_ = asking.predict(data, segmenter, ask, Path(folder))
        scores = score.prompted(data, results, "official", clicks or ()).report["metrics"]
    return [scores[f"miou_{n}"] for n in clicks] if clicks else [scores["miou"]]


def timed(call):
    wall, cpu = time.perf_counter(), time.process_time()
    value = call()
    return value, time.perf_counter() - wall, time.process_time() - cpu


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("images", type=Path)
    parser.add_argument("annotations", type=Path)
    parser.add_argument("--model", default="nano")
    for name, default in (("--count", 8), ("--rounds", 3), ("--threads", 1)):
        parser.add_argument(name, type=int, default=default)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    data = truth.read(given.images, given.annotations, subset=given.count)
    annotations = json.loads(given.annotations.read_bytes())["annotations"]
    plan = Plan(model=given.model, zoom=False, device="cpu")
    (network, _), (plain, _) = bench.network_for(plan, False), bench.network_for(plan, False)
    network.specks = 0.0  # a rule of ours that the official loop does not have
    segmenter = Segmenter(plan, network=network, source=lambda images: [])
    loop = partial(official, plain, segmenter.multimask, data, annotations)
    sides = {
        "boxes": (lambda: [loop(None)], lambda: ours(segmenter, data, None)),
        "1, 3, 5 clicks": (lambda: [loop(n) for n in CLICKS], lambda: ours(segmenter, data, CLICKS)),
    }
    print(f"{given.model}, {len(data.truths)} images, {sum(map(len, data.truths))} masks, {given.threads} thread, fp32")
    for what, (theirs, mine) in sides.items():
        rows = [(timed(theirs), timed(mine)) for _ in range(given.rounds)]
        (a, _, _), (b, _, _) = rows[0]
        for kind, at in (("wall", 1), ("CPU", 2)):
            ratios = sorted(slow[at] / fast[at] for slow, fast in rows)
            seconds = [float(np.median([pair[side][at] for pair in rows])) for side in (0, 1)]
            spread = f"{ratios[0]:.2f} to {ratios[-1]:.2f}"
            print(f"{what:16}{kind:6}{seconds[0]:8.1f} s -> {seconds[1]:6.1f} s   ratio {np.median(ratios):.2f} ({spread})")
        print(f"{'':16}mIoU {', '.join(f'{v:.4f}' for v in a)} -> {', '.join(f'{v:.4f}' for v in b)}")


if __name__ == "__main__":
    main()
