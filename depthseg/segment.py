"""A stream of images becomes a stream of records: read, detect, estimate depth, encode, decode, compress; by batch, in order.

`Segmenter` builds the stages that a Plan names and runs them. Knows no output files, no progress bar and no second process.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from depthseg import __version__, backends, catalog, weights
from depthseg.data import Failure, Unreadable, beside, read_ahead
from depthseg.depth import DepthFolder, depth_estimator
from depthseg.detect import BoxesFile, PointsFile
from depthseg.detect.choose import Source, detector
from depthseg.errors import DepthsegError
from depthseg.formats import LONG_SIDE
from depthseg.models.mirrored import Mirrored
from depthseg.plan import Plan
from depthseg.predictor import Predictor, Seconds, prepared
from depthseg.schema import Array, Depth, Image, Record
from depthseg.views import masks_of, prompts_of, whole

T = TypeVar("T")

NAMES_SHOWN = 3  # of the entries that name no image


class Segmenter(Predictor):
    """The stages of one Plan. `notes` are sentences for the user, `provenance` says in JSON what made the masks.

    pull: fetch missing weights first; otherwise no network is used. progress: told (bytes done, bytes in all) of a download.
    images_json: COCO images file for `plan.boxes` by image_id.
    network, source, depth: ready-made stages in place of those that the plan names, used as they are.
    """

    def __init__(
        self,
        plan: Plan,
        pull: bool = False,
        images_json: str | Path | None = None,
        *,
        progress: Callable[[int, int], None] | None = None,
        network: Any = None,
        source: Source | None = None,
        depth: Depth | None = None,
    ):
        super().__init__(plan)
        self.notes: list[str] = []
        if told := backends.note(plan.backend, self.precision, self.device):
            self.notes.append(told)
        self.provenance: dict[str, Any] = {
            "device": str(self.device),
            "precision": self.precision,
            "backend": plan.backend,
            "versions": {"depthseg": __version__, **{p: version(p) for p in ("torch", "timm", "transformers")}},
        }
        self.detector = "given"  # which kind of prompts: "file", a row of catalog.DETECTORS, or "given"
        self._pull, self._progress = pull, progress
        self._chosen_rows: dict[str, catalog.Row] = {}  # by role and name
        self.network = (network if network is not None else self._build_network()).to(self.device)
        if plan.refine == "mirror":
            self.network = Mirrored(self.network)
        self.zoom = self.network.zoom_side < self.network.side if plan.zoom is None else plan.zoom
        self.source = source if source is not None else self._build_source(images_json)
        self.depth = depth if depth is not None else self._build_depth()
        self.notes += catalog.terms(self._chosen_rows)

    def _chosen(self, role: str, name: str, entry: catalog.Row | None = None, path: Path | None = None) -> None:
        """Record a choice and, with its row, the terms of its weights."""
        of = path / "model.safetensors" if path and path.is_dir() else path
        file = {"file": of.name, "sha256": weights.sha256(of)} if of and of.is_file() else {}
        about = {k: v for k, v in (("hub", entry.hub), ("licence", entry.licence)) if v} if entry else {}
        self.provenance[role] = {"name": name, **file, **about}
        if entry:
            self._chosen_rows[f"{role} {name}"] = entry

    def _build_network(self) -> Any:
        name = self.plan.model
        entry = catalog.row(catalog.MODELS, name, "model")
        path = Path(self.plan.weights) if self.plan.weights else weights.locate(entry, name, self._pull, self._progress)
        network = prepared(catalog.load(name, path), self.plan, self.precision, self.device)
        self._chosen("model", name, None if self.plan.weights else entry, path)
        return network

    def _build_source(self, images_json: str | Path | None) -> Source:
        plan = self.plan
        if given := plan.boxes or plan.points:
            self.detector = "file"
            self.notes.append(f"prompts: {'boxes' if plan.boxes else 'points'} from {Path(given).name}")
            source = BoxesFile(given, plan.confidence, plan.max_boxes, images_json) if plan.boxes else PointsFile(given)
            if plan.detector != "auto":
                self.notes.append(f"detector: {plan.detector} is not asked, for the file says where to look")
            self._chosen("detector", "file", path=Path(given))
            if images_json:
                self._chosen("images_json", "file", path=Path(images_json))
            return source
        chosen = detector(plan, self.device, self.precision, self._pull, self._progress)
        self.detector = chosen.name
        self.notes += chosen.notes
        self._chosen("detector", chosen.name, chosen.entry, chosen.path)
        return chosen.source

    def _build_depth(self) -> Depth | None:
        choice = self.plan.depth
        if self.network.alpha is None:
            if choice not in ("auto", "none"):
                raise DepthsegError(
                    f"the model {self.plan.model} does not use depth",
                    f"Choose --model {self.plan.model}-depth, or leave --depth out.",
                )
            return None
        if choice == "none":
            self.notes.append("depth: none; the model works as its RGB part alone")
            self._chosen("depth", "none")
            return None
        if choice not in ("auto", *catalog.DEPTHS) and Path(choice).exists():
            self.notes.append(f"depth: maps from {choice}")
            self._chosen("depth", Path(choice).name)
            return DepthFolder(choice)
        chosen = depth_estimator(choice, self.device, self.precision, self._pull, self.plan.backend, self.plan.depth_side)
        self.notes += [chosen.note] if choice == "auto" else []
        self._chosen("depth", chosen.name, catalog.DEPTHS[chosen.name], chosen.file)
        return chosen.estimator

    def expect(self, images: Sequence[Image]) -> list[str]:
        """Compare the plan's own files with all images of a run, before it starts; the answers are warnings for the user.

        Raises DepthsegError for boxes or clicks that fit two images or none of them, for clicks that are too many for the network, and
        for missing or misshapen depth maps.
        """
        if isinstance(self.depth, DepthFolder):
            self.depth.check(images)
        if not isinstance(self.source, BoxesFile | PointsFile):
            return []
        left = self.source.expect(image.key for image in images)
        names = list(dict.fromkeys(left))
        some = ", ".join(names[:NAMES_SHOWN]) + (", ..." if len(names) > NAMES_SHOWN else "")
        file = Path(self.plan.boxes or self.plan.points or "").name
        unheard = self.suits(self.source.most, self.source.negatives) if isinstance(self.source, PointsFile) else []
        return unheard + (
            [f"warning: {len(left)} of {len(self.source)} entries of {file} name no image of this run: {some}"] if left else []
        )

    def remarks(self) -> list[str]:
        """Warnings for the user after a run."""
        if not isinstance(self.source, BoxesFile | PointsFile) or not (outside := len(self.source.outside)):
            return []
        file = Path(self.plan.boxes or self.plan.points or "").name
        return [f"warning: {outside} of {len(self.source)} entries of {file} lie{'s' if outside == 1 else ''} outside the picture"]

    def suits(self, most: int, negatives: bool) -> list[str]:
        """Warnings for the user if clicks, at most so many in a prompt and some of them negative, do not suit the network.

        Raises DepthsegError where it cannot take so many. A box counts as two.
        """
        name, limit = self.plan.model, self.network.most_points
        if limit and most > limit:
            hint = "Use fewer clicks, or another --model."
            raise DepthsegError(f"{name} takes at most {limit} points in a prompt, of which a box counts as two, not {most}", hint)
        return [f"warning: {name} takes no notice of negative points"] if negatives and not self.network.hears_negatives else []

    def segment(self, images: Iterable[Image]) -> Iterator[Record | Failure]:
        """A Record, or a Failure, for each image, in order. Memory is bounded by the batch, not by the number of images.

        What is wrong with one image ends that image only; lack of memory and programming errors are raised.
        """
        stream = read_ahead(images, beside(), self.plan.batch, enough=self._enough())
        while True:
            start = self.clock()
            held = list(islice(stream, self.plan.batch))
            if not held:
                return
            yield from self._batch(held, self.clock() - start)

    def _enough(self) -> int | None:
        """Pixels of a picture's long side that all stages can do with; None where one of them wants every pixel.

        Crops do, and detectors that answer in the pixels they were given. The encoder gets twice what it looks at or more, depth
        networks (1036 at most) one and a half times, the overlay what it draws.
        """
        if not self.plan.draft or self.zoom or self.detector not in ("file", "grid", "nano"):
            return None
        return max(LONG_SIDE[1], 2 * self.network.side)

    def _batch(self, held: list[Image | Failure], reading: float) -> Iterator[Record | Failure]:
        out: list[Record | Failure | None] = [item if isinstance(item, Failure) else None for item in held]
        images = {k: item for k, item in enumerate(held) if isinstance(item, Image)}
        spent: Seconds = defaultdict(float, read=reading)

        def stage(name: str, call: Callable[[list[Image]], Sequence[T]]) -> dict[int, T]:
            """What `call` gives for the images that are left; those that it cannot take become failures."""
            with self.timed(spent, name):
                results = dict(zip(images, one_by_one_if_need_be(name, call, list(images.values()))))
            for k, result in results.items():
                if isinstance(result, Failure):
                    out[k] = result
                    del images[k]
            return {k: result for k, result in results.items() if not isinstance(result, Failure)}

        asked = stage("detect", self.source)
        depths = stage("depth", self.depth) if self.depth else {}
        views = [whole(image, depths.get(k)) for k, image in images.items()]
        grid = self.detector == "grid"
        overlap = catalog.DETECTORS[self.detector].overlap if self.detector in catalog.DETECTORS else ""
        answers = self.masks_for(views, [prompts_of(asked[k]) for k in images], strict=grid, spent=spent)
        for (k, image), found in zip(images.items(), answers):
            with self.timed(spent, "masks"):
                labels = self.source.categories(image) if isinstance(self.source, PointsFile) else None
                result = masks_of(found, asked[k], labels, overlap, self.plan)
            out[k] = Record(image, result, self.plan.digest(), {}, depths.get(k))
        share = {name: seconds / len(held) for name, seconds in spent.items()}
        yield from (replace(item, seconds=share) if isinstance(item, Record) else item for item in out if item)

    def depths(self, images: list[Image]) -> list[Array | None]:
        """Depth maps as the plan says, or None for each image if the network runs without."""
        return list(self.depth(images)) if self.depth else [None] * len(images)


def one_by_one_if_need_be(stage: str, call: Callable[[list[Image]], Sequence[T]], images: list[Image]) -> Sequence[T | Failure]:
    """What `call` gives for the images; if it refuses them together, for each alone, with a Failure for the guilty."""
    if not images:
        return []
    try:
        return call(images)
    except (DepthsegError, Unreadable) as error:
        if len(images) == 1:
            return [Failure(images[0], stage, getattr(error, "message", str(error)))]
    return [result for image in images for result in one_by_one_if_need_be(stage, call, [image])]
