"""A network asked about pictures: from views and prompts to masks, on whole pictures and on crops.

Prompts of all pictures of a call are flat, an owner beside them, so the prompt batch is independent of the image batch.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import numpy as np
import torch

from depthseg import backends, edges, masks, refine
from depthseg.models.sam import SamHead
from depthseg.numerics import device_of, inference, precision_of, set_up
from depthseg.plan import Plan
from depthseg.prompts import centredness
from depthseg.schema import ABSENT, CORNER_MIN, NEGATIVE, POSITIVE, Array, Crop, Frame, Prompts
from depthseg.views import (
    LOOKS,
    Answer,
    Encoded,
    View,
    around,
    fit,
    is_boxed,
    is_clicked,
    is_one_click,
    likeliest,
    on_crop,
    rows_of,
    the_click,
)

Seconds = defaultdict[str, float]  # by stage


class Predictor:
    """Asks a network as a Plan says. Whoever makes one sets `network`, and `zoom`: whether it looks at crops, too."""

    network: Any
    zoom: bool

    def __init__(self, plan: Plan):
        self.plan = plan
        self.device = device_of(plan.device)
        self.precision = precision_of(plan.precision, self.device)
        set_up(self.device, self.precision, plan.threads)
        backends.check(plan.backend, self.device)
        self.edges_on_device = self.device.type == "cuda"  # masks become RLE there, where that gives the same
        self.by_box = False  # of a box's candidates, take the one with the highest IoU with the box, not the highest predicted IoU
        self.clock: Callable[[], Any] = time.perf_counter  # for the seconds by stage; may count several things, as an array

    def masks_for(
        self, views: Sequence[View], asked: Sequence[Prompts], strict: bool = False, spent: Seconds | None = None
    ) -> list[list[Answer]]:
        """The answers to the prompts of each whole picture, in the order of the prompts.

        With `zoom`, prompts with a box are asked on a crop around it instead, clicks on crops around their answers, too.
        strict: as in `decode`. spent: seconds by stage are added here.
        """
        spent = defaultdict(float) if spent is None else spent
        answers: list[list[Answer]] = [[] for _ in views]
        zoomed = [self.zoom & is_boxed(p) for p in asked]  # bool (P,) for each view
        wholes = [(v, np.flatnonzero(~z)) for v, z in enumerate(zoomed) if not z.all()]
        for start in range(0, len(wholes), self.plan.batch):
            some = wholes[start : start + self.plan.batch]
            encoded = self.encode([views[v] for v, _ in some], self.network.side, spent)
            questions = [rows_of(asked[v], rows) for v, rows in some]
            found = self.decode(encoded, questions, strict and not self.zoom, spent, every=self.zoom and not strict)
            for (v, rows), those in zip(some, found):
                answers[v] += [a._replace(prompt=int(rows[a.prompt])) for a in those]
        boxed = [(v, int(i)) for v, z in enumerate(zoomed) for i in np.flatnonzero(z)]
        boxes = [around(asked[v], i) for v, i in boxed]
        for (v, _), those in zip(boxed, self._on_crops(views, asked, boxed, boxes, strict, spent)):
            answers[v] += those
        return self.closer(views, asked, answers, strict, spent)

    def closer(
        self,
        views: Sequence[View],
        asked: Sequence[Prompts],
        answers: Sequence[list[Answer]],
        strict: bool = False,
        spent: Seconds | None = None,
    ) -> list[list[Answer]]:
        """With `zoom`, answers to clicks alone after looks at crops around them; all others as they are.

        A click says nothing of the size of what is meant, the first answers do, and from near the network ranks them better. What one
        click alone has found is asked for once more by its box, which the network answers best. Of all answers that is given which
        all together speak for. answers: of each whole picture, one for a prompt or some to choose from. strict: everything
        mode, which does not ask by box and gives an answer of the last look, to which the limits of `decode` apply.
        """
        if not self.zoom:
            return list(answers)
        heard: defaultdict[tuple[int, int], list[Answer]] = defaultdict(list)  # by view and prompt
        for v, found in enumerate(answers):
            for a in found:
                heard[v, a.prompt].append(a)
        clicked = [(v, int(i)) for v, prompts in enumerate(asked) for i in np.flatnonzero(is_clicked(prompts))]
        latest = heard.copy()
        central = self.plan.central and not strict  # the points of everything mode lie anywhere
        for look in range(LOOKS):
            which = [key for key in clicked for _ in latest[key]]
            boxes = [around(asked[v], i, a.rle) for v, i in clicked for a in latest[v, i]]
            nearer = self._on_crops(views, asked, which, boxes, strict and look == LOOKS - 1, spent, every=True, central=central)
            for key in clicked:
                crops = [next(nearer) for _ in latest[key]]  # the candidates of each
                heard[key] = sum(crops, heard[key])
                latest[key] = [a for candidates in crops for a in likeliest(candidates, heard[key], central)]
        if clicked and not strict:
            for key, answer in self._by_box(views, asked, latest, spent):
                heard[key] = [*heard[key], answer]
        out: list[list[Answer]] = [[] for _ in views]
        given = latest if strict else heard  # only the last look's have passed the limits of everything mode
        for v, i in sorted(given):
            out[v] += likeliest(given[v, i], heard[v, i], central)
        return out

    def _by_box(
        self, views: Sequence[View], asked: Sequence[Prompts], latest: dict[tuple[int, int], list[Answer]], spent: Seconds | None
    ) -> Iterator[tuple[tuple[int, int], Answer]]:
        """What the boxes of the answers to one click alone are answered, with the view and prompt of each."""
        lone = [is_one_click(p) for p in asked]
        own: list[list[Answer]] = [[] for _ in views]
        for (v, i), found in latest.items():
            own[v] += [a for a in found if lone[v][i] and masks.area([a.rle])[0]]
        boxes = [masks.boxes([a.rle for a in found]) for found in own]
        which = [(v, row) for v, found in enumerate(own) for row in range(len(found))]
        answers = self._on_crops(views, [Prompts.of(boxes=xyxy) for xyxy in boxes], which, list(np.concatenate(boxes)), False, spent)
        for (v, row), (answer,) in zip(which, answers):
            i = own[v][row].prompt
            middle = centredness(masks.crop(answer.rle), the_click(asked[v], i)) if self.plan.central else 1.0
            yield (v, i), answer._replace(prompt=i, centredness=middle)

    def _on_crops(
        self,
        views: Sequence[View],
        asked: Sequence[Prompts],
        which: Sequence[tuple[int, int]],
        boxes: Sequence[Array],
        strict: bool,
        spent: Seconds | None,
        every: bool = False,
        central: bool = True,
    ) -> Iterator[list[Answer]]:
        """The answers to each of the prompts `which` (view, row), asked on a crop around its box. The rest as in `decode`."""
        size = int(self.plan.batch * (self.network.side / self.network.zoom_side) ** 2)  # one call has the pixels of a batch of wholes
        for start in range(0, len(which), size):
            some = which[start : start + size]
            crops = [views[v].crop(box) for (v, _), box in zip(some, boxes[start:])]
            questions = [on_crop(asked[v], i, crop) for (v, i), crop in zip(some, crops)]
            found = self.decode(self.encode(crops, self.network.zoom_side, spent), questions, strict, spent, every, central)
            yield from ([a._replace(prompt=i) for a in those] for (_, i), those in zip(some, found))

    def encode(self, views: Sequence[View], side: int, spent: Seconds | None = None) -> Encoded:
        """Features of the views, in one encoder call with an input of `side` pixels."""
        frames = [self.network.frame(view.size or (view.pixels.shape[0], view.pixels.shape[1]), side) for view in views]
        with self.timed(spent, "encode"), inference(self.device, self.precision):
            rgb = self._tensor(np.stack([f.image(v.pixels) for f, v in zip(frames, views)]))
            maps = [f.depth(v.depth) for f, v in zip(frames, views) if v.depth is not None]
            features = self.network.encode(rgb, self._tensor(np.stack(maps)) if maps else None)
        return Encoded(features, list(views), frames)

    def decode(
        self,
        encoded: Encoded,
        asked: Sequence[Prompts],
        strict: bool = False,
        spent: Seconds | None = None,
        every: bool = False,
        central: bool = True,
    ) -> list[list[Answer]]:
        """The answers to the prompts of each view, whose coordinates are the view's own; masks lie on the whole picture.

        strict: drop answers below the plan's min_predicted_iou and min_stability, and clean small regions. every: all candidates of a
        prompt, not the best alone, unless refined ones take their place, with the centredness of single clicks where `central` and the
        plan want it.
        """
        plan = self.plan
        limits = (plan.min_predicted_iou, plan.min_stability)
        least_iou, least_stability = (own if given is None else given for given, own in zip(limits, self.network.grid_limits))
        groups: dict[tuple[bool, bool], list[tuple[int, int]]] = {}  # (three candidates?, mask input?) -> view, row
        for v, p in enumerate(asked):
            for i in range(len(p)):
                groups.setdefault((self.multimask(p.labels[i]), p.masks is not None), []).append((v, i))
        lone = [is_one_click(p) & (every and central and plan.central) for p in asked]  # whose centredness is wanted
        answers: list[list[Answer]] = [[] for _ in asked]
        for (multimask, _), flat in groups.items():
            for start in range(0, len(flat), plan.prompt_batch):
                chunk = flat[start : start + plan.prompt_batch]
                with self.timed(spent, "decode"), inference(self.device, self.precision):
                    tensors = self._best(encoded, asked, chunk, multimask, every and plan.refine not in refine.RULES)
                chunk = [pair for pair in chunk for _ in range(len(tensors[1]) // len(chunk))]
                if self.edges_on_device and not (strict or every) and self._plain(encoded):
                    with self.timed(spent, "masks"), torch.inference_mode():
                        for v, answer in _on_device(encoded, chunk, *tensors):
                            answers[v].append(answer)
                    continue
                low, ious = (t.cpu().numpy() for t in tensors)
                if plan.refine in refine.RULES:
                    with self.timed(spent, "refine"), inference(self.device, self.precision):
                        self._again(encoded, asked, chunk, low, ious)
                with self.timed(spent, "masks"):
                    for (v, i), logits, iou in zip(chunk, low, ious.tolist()):
                        frame, view = encoded.frames[v], encoded.views[v]
                        h, w = frame.valid(len(logits))
                        stability = float(masks.stability(logits[None, :h, :w])[0])
                        if strict and (iou < least_iou or stability < least_stability):
                            continue
                        mask = self._enlarged(frame, logits)
                        middle = centredness(mask, the_click(asked[v], i)) if lone[v][i] else 1.0
                        mask = view.paste(mask)
                        mask = masks.clean_crop(mask, plan.min_region) if strict else mask
                        answers[v].append(Answer(i, masks.encode_crop(mask), iou, stability, middle))
        return [sorted(found, key=lambda a: a.prompt) for found in answers]

    def _plain(self, encoded: Encoded) -> bool:
        """Whether masks are what their logits say, on whole pictures, by SAM's own two steps: then nothing keeps them on the host."""
        as_they_are = not self.network.specks and self.plan.refine not in refine.RULES
        return as_they_are and all(type(f) is Frame and f.size == v.canvas for f, v in zip(encoded.frames, encoded.views))

    def _enlarged(self, frame: Frame, logits: Array) -> Crop:
        """The mask of low-resolution logits (s, s) on its view, without specks."""
        mask = frame.crop(logits)
        least = int(self.network.specks * np.count_nonzero(mask.pixels))
        return masks.clean_crop(mask, least, edges=False) if self.network.specks else mask

    def _again(self, encoded: Encoded, asked: Sequence[Prompts], chunk: list[tuple[int, int]], low: Array, ious: Array) -> None:
        """Adaptive mask refinement of one decoder call's answers: `low` (P, s, s) and `ious` (P,) take those of a higher predicted IoU.

        All masks that need it are asked again in one call, on the features at hand (in two, where the added points make some prompts
        unambiguous and others not).
        """
        plan, sign = self.plan, refine.RULES[self.plan.refine].sign
        rows = [k for k in range(len(chunk)) if plan.refine_below is None or ious[k] < plan.refine_below]
        for _ in range(plan.refine_rounds):
            clicks = {v: np.zeros((len(asked[v]), plan.refine_points, 2), np.float32) for v, _ in chunk}
            calls: dict[bool, list[int]] = {}
            for k in rows:
                v, i = chunk[k]
                mask = self._enlarged(encoded.frames[v], low[k]).wider(1)  # with its rim
                at = refine.points(mask.pixels, plan.refine, plan.refine_points) + mask.corner
                if len(at):
                    clicks[v][i] = at
                    labels = np.append(asked[v].labels[i], [sign] * len(at))
                    calls.setdefault(self.multimask(labels), []).append(k)
            again = [p.clicked(clicks[v], sign) if v in clicks else p for v, p in enumerate(asked)]
            rows = []
            for multimask, some in calls.items():
                logits, predicted = (t.cpu().numpy() for t in self._best(encoded, again, [chunk[k] for k in some], multimask))
                for n in np.flatnonzero(predicted > ious[some]):
                    rows.append(some[n])
                    low[some[n]], ious[some[n]] = logits[n], predicted[n]

    def _best(
        self, encoded: Encoded, asked: Sequence[Prompts], chunk: list[tuple[int, int]], multimask: bool, every: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (P, s, s) and predicted IoU (P,) of the candidate with the highest predicted IoU, for one decoder call.

        every: of all M candidates of each prompt, (P * M, s, s) and (P * M,).
        """
        width = max(asked[v].labels.shape[1] for v, _ in chunk)
        points = np.zeros((len(chunk), width, 2), np.float32)
        labels = np.full((len(chunk), width), ABSENT, np.int64)
        for row, (v, i) in enumerate(chunk):
            k = asked[v].labels.shape[1]
            points[row, :k] = encoded.frames[v].to_prompt(asked[v].points[i])
            labels[row, :k] = asked[v].labels[i]
        earlier = [asked[v].masks[i] for v, i in chunk if asked[v].masks is not None]  # type: ignore[index]
        owner = np.array([v for v, _ in chunk], np.int64)
        low_resolution = self._tensor(np.stack(earlier)) if earlier else None
        one = not (self.by_box or every)  # the network need not make the others
        logits, iou = self.network.decode(
            encoded.features, self._tensor(owner), self._tensor(points), self._tensor(labels), low_resolution, multimask, one
        )
        if every:
            return logits.flatten(0, 1).float(), iou.flatten().float()
        boxed = self.by_box and bool((labels == CORNER_MIN).any(1).all())
        rank = fit(logits, points, labels) + 1e-4 * iou if boxed else iou  # a box between all pixel centres fits none
        best = rank.argmax(1)  # before anything is enlarged
        rows = torch.arange(len(best), device=best.device)
        return logits[rows, best].float(), iou[rows, best].float()

    def multimask(self, labels: Array) -> bool:
        """Whether a prompt with these labels (K,) is answered by three candidates."""
        if self.network.single_mask_for == "never":
            return True
        return not (CORNER_MIN in labels or np.isin(labels, (NEGATIVE, POSITIVE)).sum() >= 3)

    def _tensor(self, array: Array) -> torch.Tensor:
        """The array on the device; on CUDA the copy is queued from pinned memory, and the CPU goes on."""
        tensor = torch.from_numpy(array)
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else tensor

    @contextmanager
    def timed(self, spent: Seconds | None, stage: str) -> Iterator[None]:
        start = self.clock()
        yield
        if spent is not None:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            spent[stage] += self.clock() - start


def _on_device(encoded: Encoded, chunk: list[tuple[int, int]], low: torch.Tensor, ious: torch.Tensor) -> Iterator[tuple[int, Answer]]:
    """The answers of one decoder call, whose prompts lie by view, with the view of each."""
    runs = [list(own) for _, own in groupby(chunk, lambda pair: pair[0])]
    for own, logits, predicted in zip(runs, *(t.split([len(run) for run in runs]) for t in (low, ious))):
        v, frame = own[0][0], encoded.frames[own[0][0]]
        found = zip(own, edges.rles(logits, frame), predicted.tolist(), edges.stability(logits, frame).tolist())
        yield from ((v, Answer(i, rle, iou, stability)) for (_, i), rle, iou, stability in found)


def prepared(network: Any, plan: Plan, precision: str, device: torch.device) -> Any:
    """The network with encoders that compute as the plan says, for inference alone; those that the plan does not ask stay as they are."""
    for encoder in ("image_encoder", "depth_encoder")[: 1 if network.alpha is None or plan.depth == "none" else 2]:
        setattr(network, encoder, backends.ready(getattr(network, encoder), plan.backend, precision, device))
    if plan.backend == "compile" and device.type == "cuda" and isinstance(network, SamHead):
        network.answer = backends.ready_for_any_number(network.answer)  # type: ignore[method-assign]
    return network
