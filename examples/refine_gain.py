"""What each --refine adds to mean IoU, and what it costs: `python examples/refine_gain.py IMAGES ANNOTATIONS`.

True boxes, one click in the middle, and two random clicks in the true mask (the set-up of the paper of adaptive mask refinement). The
refinements take turns image by image in one process on one network. Printed: mIoU and its S, M and L; what it adds with a paired 95 %
interval over images; the share of masks that changed; process-CPU time over that of `none`, from reading to compressed masks.
Options: --model NAME, --count N images, --prompts box,1,2, --refine NAMES, --points N, --no-zoom.
"""

import argparse
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch

from depthseg import asking, score, truth
from depthseg.plan import REFINEMENTS, Plan
from depthseg.segment import Segmenter

REQUESTS = {
    "box": ("true boxes", score.Request()),
    "1": ("one click", score.Request("point", (1,))),
    "2": ("two random clicks", score.Request("point", (2,), "efficientsam")),
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("images", type=Path)
    parser.add_argument("annotations", type=Path)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--count", type=int)
    parser.add_argument("--prompts", default="box,1,2")
    parser.add_argument("--refine", default=",".join(REFINEMENTS))
    parser.add_argument("--points", type=int, default=Plan.refine_points)
    parser.add_argument("--no-zoom", action="store_false", dest="zoom", default=None)
    given = parser.parse_args()
    torch.set_num_threads(1)
    data = truth.read(given.images, given.annotations, subset=given.count)
    network = Segmenter(Plan(model=given.model, device="cpu"), source=lambda images: []).network
    ids, names = score.ids_of(data), list(dict.fromkeys(["none", *given.refine.split(",")]))
    sides = {}
    for name in names:
        more = {} if name in ("none", "mirror") else {"refine_points": given.points}
        sides[name] = Segmenter(
            Plan(model=given.model, device="cpu", zoom=given.zoom, refine=name, **more), network=network, source=lambda images: []
        )
    print(f"{given.model}, {len(data.truths)} images of {given.annotations.name}, 1 thread, fp32")
    for what, ask in (REQUESTS[prompt] for prompt in given.prompts.split(",")):
        results, seconds = defaultdict(list), defaultdict(float)
        for image in ids.tolist():
            one = data.only({image})
            if not len(one.truths[0]):
                continue
            for name, segmenter in sides.items():
                with tempfile.TemporaryDirectory() as folder:
                    start = time.process_time()
                    results[name] += asking.predict(one, segmenter, ask, Path(folder))[0]
                    seconds[name] += time.process_time() - start
        scored = {name: ask.scored(data, found) for name, found in results.items()}
        base, metric = scored["none"], "miou" + "".join(f"_{n}" for n in ask.clicks)
        title = f"{what}, {len(base.table['iou'])} masks"
        print(f"{title:32}  mIoU      S      M      L    adds  95 % interval     changed   time")
        for name, of in scored.items():
            m = of.report["metrics"]
            by_size = " ".join(f"{m[metric + size] or np.nan:6.2f}" for size in ("", "_small", "_medium", "_large"))
            adds = of.table["iou"] - base.table["iou"]
            low, high = score.interval(ids, base.table["image_id"], adds) or (np.nan, np.nan)
            changed = np.mean([a["segmentation"] != b["segmentation"] for a, b in zip(results["none"], results[name], strict=True)])
            cost, bounds = seconds[name] / seconds["none"], f"{low:+6.2f} to {high:+6.2f}"
            print(f"  {name:30}{by_size} {100 * adds.mean():+7.2f}  {bounds}  {100 * changed:5.0f} % {cost:6.2f}", flush=True)


if __name__ == "__main__":
    main()
