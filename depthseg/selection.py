"""Which of the images that were found a run takes: by key, a shard of them, the first so many."""

import difflib
import re
from collections.abc import Sequence
from pathlib import Path

from depthseg.errors import NOTHING_TO_DO, DepthsegError
from depthseg.schema import Image


def select(
    images: Sequence[Image], only: Sequence[str] = (), keys: Path | None = None, shard: str | None = None, limit: int | None = None
) -> list[Image]:
    """The images whose key is in `only` or a line of the file `keys`, of these every n-th from the i-th on for the shard "i/n"
    (i from 1), of these the first `limit`. Ids stay what they are. Raises DepthsegError for keys that no image has.
    """
    wanted = [*only, *(_lines(keys) if keys else [])]
    chosen = list(images)
    if wanted or keys:
        known = {image.key for image in images}
        if strange := [key for key in wanted if key not in known]:
            near = difflib.get_close_matches(strange[0], known, n=1) or [images[0].key]
            more = f" and {len(strange) - 1} more" if len(strange) > 1 else ""
            raise DepthsegError(f"no image has the key '{strange[0]}'{more}", f"Keys are paths below the input folder, like {near[0]}.")
        chosen = [image for image in images if image.key in set(wanted)]
    if shard:
        i, n = _shard(shard)
        chosen = chosen[i - 1 :: n]
    chosen = chosen[:limit]
    if not chosen:
        raise DepthsegError("no image is left of this selection", "Widen it, or leave it out.", NOTHING_TO_DO)
    return chosen


def _shard(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise DepthsegError(f"'{text}' is no shard", "Write it like 1/4, 2/4, 3/4 and 4/4, one for each of four runs.")
    return int(found[1]), int(found[2])


def _lines(path: Path) -> list[str]:
    try:
        return [line for line in path.read_text("utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DepthsegError(f"cannot read the keys in {path} ({error})", "Give a text file with one key in each line.") from error
