"""What `--draft` changes: `python examples/draft.py IMAGES ANNOTATIONS [COUNT]`.

COUNT pictures of a COCO data set (8) are enlarged to 12 megapixels and written as JPEG. Then each is decoded in full, at fewer pixels, and
in full after it was written at another quality, for comparison. Differences are those of the encoder's 512-pixel input, in grey levels,
and of the masks of `nano` for the true boxes (--no-zoom, since crops always get every pixel).
"""

import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image as PILImage

from depthseg import catalog, masks, truth
from depthseg.data import read
from depthseg.plan import Plan
from depthseg.schema import Boxes, Frame, Image
from depthseg.segment import Segmenter

WAYS = {"in full": (90, None), "--draft": (90, 1600), "quality 95": (95, None)}  # JPEG quality, pixels that are enough


def main() -> None:
    data = truth.read(Path(sys.argv[1]), Path(sys.argv[2]), subset=int(sys.argv[3]) if len(sys.argv) > 3 else 8)
    network = catalog.load("nano")
    inputs, found, seconds, wanted = ({way: [] for way in WAYS} for _ in range(4))
    for t in data.truths:
        picture = PILImage.fromarray(read(t.image).pixels)
        scale = 4000 / max(picture.size)
        size = tuple(round(side * scale) for side in picture.size)
        xyxy = (masks.boxes(t.rle) * scale).astype(np.float32)
        asked = Boxes(xyxy, np.ones(len(xyxy), np.float32), np.ones(len(xyxy), np.int64))
        true = [masks.encode(np.asarray(PILImage.fromarray(masks.decode(rle)).resize(size))) for rle in t.rle]
        for way, (quality, enough) in WAYS.items():
            with tempfile.NamedTemporaryFile(suffix=".jpg") as file:
                picture.resize(size, PILImage.Resampling.LANCZOS).save(file.name, quality=quality)
                start = time.process_time()
                image = read(Image("a.jpg", 1, Path(file.name), (0, 0)), enough=enough)
                seconds[way].append(time.process_time() - start)
            h, w = Frame(image.size, 512).inner
            inputs[way].append(np.asarray(PILImage.fromarray(image.pixels).resize((w, h), PILImage.Resampling.BILINEAR), np.int16))
            segmenter = Segmenter(Plan(zoom=False, device="cpu"), network=network, source=lambda images, a=asked: [a for _ in images])
            (record,) = segmenter.segment([image])
            empty = masks.encode(np.zeros(image.size, bool))
            by_prompt = dict(zip(record.masks.prompt.tolist(), record.masks.rle))
            found[way] += [by_prompt.get(k, empty) for k in range(len(true))]
            wanted[way] += true
    print(f"{len(data.truths)} pictures of 12 megapixels, {len(wanted['in full'])} masks")
    print(f"{'':12}{'decode, CPU ms':>16}{'mean difference':>17}{'largest':>9}{'mIoU with in full':>19}{'with the truth':>16}")
    for way in WAYS:
        apart = [np.abs(a - b) for a, b in zip(inputs[way], inputs["in full"])]
        mean, most = np.mean([d.mean() for d in apart]), max(d.max() for d in apart)
        same, true = (100 * np.mean([masks.iou([a], [b])[0, 0] for a, b in zip(found[way], other)])
                      for other in (found["in full"], wanted[way]))  # fmt: skip
        print(f"{way:12}{1000 * np.median(seconds[way]):16.0f}{mean:17.2f}{most:9}{same:19.2f}{true:16.2f}")


if __name__ == "__main__":
    main()
