"""An evaluation from question to report: ask, score, ablate, write. `evaluate_depth` scores a depth estimator by itself."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image as PILImage

from depthseg import catalog, compare, gallery, metrics, predictions, sa1b, score, weights
from depthseg.asking import MODES, Tell, other_depth, predict
from depthseg.data import read
from depthseg.errors import NOTHING_TO_DO, DepthsegError
from depthseg.report import Picture
from depthseg.report import write as write_report
from depthseg.schema import Depth, Image
from depthseg.score import Request
from depthseg.segment import Segmenter
from depthseg.truth import Dataset


class Outcome(NamedTuple):
    """What came of one way of asking."""

    results: list[dict]
    scored: score.Scored


def run(
    dataset: Dataset,
    segmenter: Segmenter,
    ask: Request,
    folder: Path,
    *,
    pictures: bool = True,
    command: str = "",
    overwrite: bool = False,
    ablate: bool = False,
    progress: Tell = lambda done, total: None,
) -> dict:
    """Ask, score and write the report with all that belongs to it into `folder`; the report.

    ablate: ask again with each other depth of MODES. pictures: galleries in the page.
    """
    if ablate and segmenter.depth is None:
        raise DepthsegError("there is no depth to be changed", "Choose a model with depth, like nano-depth, and leave --depth none out.")
    if ablate and segmenter.depth:
        other_depth("shuffled", segmenter.depth, dataset)  # refuses what cannot be shuffled
    if segmenter.detector in ("nano", "grid") and ask.prompt == "detector":
        ask = replace(ask, agnostic=True, threshold=catalog.DETECTORS["nano"].confidence if segmenter.detector == "nano" else 0.0)
    before = len(segmenter.notes)
    results, seconds, failed = predict(dataset, segmenter, ask, folder, overwrite, progress)
    peak = score.peak_mib()  # before scoring, which holds all masks
    bad = {f.image.id for f in failed}
    done = dataset.only({t.image.id for t in dataset.truths} - bad)
    on = Outcome(results, ask.scored(done, results))
    kept = [note for note in segmenter.notes if note.startswith("warning: ")] + segmenter.notes[before:]
    report = score.report(
        done,
        on.scored,
        ask,
        zoom=segmenter.zoom,
        single=segmenter.network.single_mask_for != "never",
        refine=segmenter.plan.refine,
        model=segmenter.plan.model,
        detector=segmenter.provenance.get("detector", {}).get("name", "") if ask.prompt == "detector" else "",
        failed=failed,
        warnings=[note.removeprefix("warning: ") for note in kept],
        seconds=seconds,
        peak=peak,
        device=str(segmenter.device),
        provenance={"command": command, **segmenter.provenance, "plan": segmenter.plan.to_json()},
    )
    off = None
    if ablate:
        outcomes = _ablate(done, segmenter, ask, folder / "ablation", overwrite, progress)
        report["ablation"] = _ablation(done, ask, score.headline(report), on, outcomes)
        off = outcomes["off"]
    _write(done, report, folder, on, off, segmenter.depth, pictures)
    return report


def from_file(dataset: Dataset, file: Path, ask: Request, folder: Path, pictures: bool = True, command: str = "") -> dict:
    """Score the results of a file, write the report into `folder`, with a copy of what was scored; the report. No model is used."""
    if ask.prompt == "detector" and _classless(file):
        ask = replace(ask, agnostic=True)
    results, warnings = predictions.read(file, dataset, ask.agnostic or ask.prompt != "detector")
    made_by = {"file": str(file), "sha256": weights.sha256(file)}
    with predictions.Journal(folder, {"predictions": made_by["sha256"], "annotations": dataset.sha256}, dataset) as journal:
        journal.take(results)
    on = Outcome(results, ask.scored(dataset, results))
    provenance = {"command": command, "predictions": made_by}
    report = score.report(dataset, on.scored, ask, warnings=warnings, provenance=provenance, detector=file.stem)
    _write(dataset, report, folder, on, None, None, pictures)
    return report


def _classless(file: Path) -> bool:
    """Whether a run of `segment` without classes wrote this file: its images.json has one category, called object."""
    try:
        return [c["name"] for c in json.loads((file.parent / "images.json").read_bytes())["categories"]] == ["object"]
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _write(dataset: Dataset, report: dict, folder: Path, on: Outcome, off: Outcome | None, depth: Depth | None, pictures: bool) -> None:
    """The report with its pictures, and the scores of single masks. off: without depth."""
    shown: list[Picture] = []
    if pictures:
        quality = score.by_image(on.scored.table)
        shown = gallery.pictures(dataset, on.results, quality, gallery.extremes(quality), depth)
        if off:
            without = score.by_image(off.scored.table)
            most = sorted(quality, key=lambda i: -abs(quality[i] - without.get(i, quality[i])))[: gallery.EACH]
            shown += gallery.pictures(dataset, on.results, quality, {"most changed by depth": most}, depth, {"without depth": off.results})
    write_report(report, folder, shown)
    compare.write_scores(folder, dataset, on.scored.table)


# ---- depth ----


def _ablate(dataset: Dataset, segmenter: Segmenter, ask: Request, folder: Path, overwrite: bool, progress: Tell) -> dict[str, Outcome]:
    """What comes of the same questions with each other depth, by mode."""
    depth, provenance = segmenter.depth, segmenter.provenance
    assert depth is not None
    out = {}
    try:
        for mode in MODES:
            segmenter.depth = other_depth(mode, depth, dataset)
            order = ",".join(str(t.image.id) for t in dataset.truths)  # decides whose depth is whose
            made = {
                "name": f"{mode} of {provenance.get('depth', {}).get('name')}",
                "sha256": hashlib.sha256(order.encode()).hexdigest()[:12],
            }
            segmenter.provenance = {**provenance, "depth": made}
            found, _, failed = predict(dataset, segmenter, ask, folder / mode, overwrite, progress)
            if failed:
                raise DepthsegError(f"{failed[0].image.key} failed with depth {mode}: {failed[0].reason}", "Leave the image out.")
            out[mode] = Outcome(found, ask.scored(dataset, found))
    finally:
        segmenter.depth, segmenter.provenance = depth, provenance
    return out


def _ablation(dataset: Dataset, ask: Request, metric: str, on: Outcome, others: dict[str, Outcome]) -> dict:
    """Metrics by mode, and depth less each other mode, with paired intervals where they can be had."""
    names = {metric, "boundary_iou", *(f"{metric}_{size}" for size in ("small", "medium", "large"))}
    rows = []
    for mode, other in others.items():
        if ask.prompt == "detector":
            bounds = score.paired_ap(dataset, ask, on.results, other.results)
        else:
            bounds = score.paired_miou(score.ids_of(dataset), ask, on.scored.table, other.scored.table)
        for name, value in on.scored.report["metrics"].items():
            against = other.scored.report["metrics"][name]
            if name in names and value is not None and against is not None:
                low, high = bounds.get(name) or (None, None)
                rows.append({"mode": mode, "metric": name, "value": value - against, "low": low, "high": high})
    modes = {"on": on, **others}
    return {"metric": metric, "modes": {mode: o.scored.report["metrics"] for mode, o in modes.items()}, "differences": rows}


def evaluate_depth(root: Path, depth: Depth, progress: Tell | None = None) -> dict:
    """AbsRel and delta1 of a depth estimator on the metric pairs of a folder `root`/rgb, `root`/depth with a manifest beside it.

    Beside it stands what needs no picture: one constant for all pixels, and a ramp from top (far) to bottom (near).
    """
    pairs = [p for p in sa1b.depth_pairs([root]) if p.kind == "metric"]
    if not pairs:
        raise DepthsegError(f"no metric depth below {root}", "Only metric maps can be scored.", NOTHING_TO_DO)
    rows: dict[str, list[tuple[float, float]]] = {"estimator": [], "ramp": [], "constant": []}
    for i, pair in enumerate(pairs, 1):
        image = read(Image(pair.rgb.name, i, pair.rgb, (0, 0)))
        truth = np.asarray(PILImage.open(pair.depth)).astype(np.float32)
        h, w = truth.shape
        (found,) = depth([image])
        guess = np.asarray(PILImage.fromarray(found).resize((w, h), PILImage.Resampling.BILINEAR))
        ramp = np.broadcast_to(np.linspace(0, 1, h)[:, None], (h, w))
        for name, inverse in (("estimator", guess), ("ramp", ramp), ("constant", np.zeros((h, w)))):
            rows[name].append(metrics.depth_errors(inverse, truth))
        if progress:
            progress(i, len(pairs))
    means = {name: np.mean(values, 0) for name, values in rows.items()}
    scores = {f"{name}_{what}": float(m[k]) for name, m in means.items() for k, what in enumerate(("abs_rel", "delta1"))}
    return {
        "protocol": "scale and shift fitted per image in inverse depth; mean over images",
        "images": len(pairs),
        "abs_rel": scores.pop("estimator_abs_rel"),
        "delta1": scores.pop("estimator_delta1"),
        **scores,
    }
