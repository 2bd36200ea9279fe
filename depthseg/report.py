"""One result of an evaluation as JSON, as Markdown, and as one HTML page that opens anywhere, offline and without JavaScript.

All three come from one dict of JSON values, made elsewhere. What is absent or None in it leaves no trace, not even a heading.
Knows how numbers look, not how they are computed. Everything from the dict is escaped: keys, names and paths are users' data.
"""

import base64
import io
import json
import math
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import NamedTuple

from PIL import Image as PILImage

from depthseg.formats import atomic

LIMIT = 15_000_000  # bytes of the page: what mail servers let through
_SIDE, _QUALITY = 640, 80  # pictures in the page: long side in pixels, JPEG quality
_LISTED = 20  # failed images that the page names; report.json has all
_PROMPTS = {"box": "prompted with true boxes", "point": "prompted with clicks", "detector": "prompted with a detector's boxes"}
_HEADS = {"miou": "mIoU", "boundary_iou": "boundary IoU", "ap": "AP", "ar": "AR"}
_NAMES = {
    "iou_correlation": "IoU correlation (−1 to 1)",
    "baseline_box": "baseline: the filled box",
    "baseline_ellipse": "baseline: its inscribed ellipse",
    "ap50": "AP at IoU 0.50",
    "ap75": "AP at IoU 0.75",
    "recall_50": "recall at IoU 0.50",
    "precision_50": "precision at IoU 0.50",
    "predictions": "predictions (their number)",
}
_FORMATS = {"iou_correlation": ".2f", "predictions": ",d"}  # all other scores are percent


@dataclass(frozen=True)
class Picture:
    """One example of a gallery: panels side by side, such as photograph, depth, truth and prediction, each with its name."""

    group: str  # the gallery's heading: worst, best
    caption: str
    panels: list[tuple[str, PILImage.Image]]


class Block(NamedTuple):
    """A piece of a section in both languages; Markdown is empty where a drawing has no words."""

    html: str
    markdown: str = ""


def write(result: dict, folder: Path, pictures: Sequence[Picture] = ()) -> None:
    """Write `folder`/report.json, report.md and report/index.html, each whole or not at all.

    result: JSON values without NaN. pictures: into the page in this order until it is full; it says how many were left out.
    """
    room = LIMIT - len(_encode(_page(result))) - 10_000  # less the galleries' headings and the word on what was left out
    files = {
        "report.json": json.dumps(result, indent=1, allow_nan=False) + "\n",
        "report.md": _markdown(result),
        "report/index.html": _page(result, list(_galleries(pictures, room))),
    }
    for name, text in files.items():
        with atomic(folder / name) as part:
            part.write_bytes(_encode(text))


def _encode(text: str) -> bytes:
    return text.encode(errors="backslashreplace")  # a file's name need not be valid Unicode


# ---- words and numbers ----


def _name(key: str) -> str:
    """A key of the dict in words: miou_3 is mIoU, 3 clicks; ap_small is AP, small; ar_100 is AR, best 100."""
    found = re.fullmatch(rf"({'|'.join(_HEADS)})(_\w+)?", key)
    if key in _NAMES or not found:
        return _NAMES.get(key, key.replace("_", " "))
    number = "best {}" if found[1] == "ar" else "{} click" if "_1" in key else "{} clicks"
    parts = (found[2] or "").split("_")[1:]
    return ", ".join([_HEADS[found[1]], *(number.format(part) if part.isdigit() else part for part in parts)])


def _score(value: float | None, key: str = "", sign: str = "") -> str:
    """A score as its kind is written, an en dash where there was nothing to measure. sign: + to show it always."""
    return "–" if value is None else f"{value:{sign}{_FORMATS.get(key, '.1f')}}".replace("-", "−")


def _span(span: Sequence[float] | None, key: str = "", sign: str = "") -> str:
    return f"{_score(span[0], key, sign)} to {_score(span[1], key, sign)}" if span else "–"


def _count(value: int | None) -> str:
    return "–" if value is None else f"{value:,}"


def _plain(text: object) -> str:
    """Text as Markdown that cannot leave its line or its cell, nor become HTML."""
    return re.sub(r"([\\`*\[\]|])", r"\\\1", escape(" ".join(str(text).split()), quote=False))


# ---- blocks ----


def _words(*sentences: str) -> Block:
    return Block(f"<div>{''.join(f'<p>{escape(s)}</p>' for s in sentences)}</div>", "\n\n".join(map(_plain, sentences)))


def _said(values: dict, **sentences: str) -> Iterator[Block]:
    """The sentences whose value is there."""
    if found := [text.format(values[key]) for key, text in sentences.items() if values.get(key) is not None]:
        yield _words(*found)


def _beside(blocks: Sequence[Block]) -> Block:
    """Blocks in columns where the page is wide enough."""
    return Block(f"<div class=beside>{''.join(b.html for b in blocks)}</div>", "\n\n".join(b.markdown for b in blocks if b.markdown))


def _table(
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    title: str = "",
    *,
    words: Collection[int] = (0,),
    marks: Sequence[str] = (),
    style: str = "",
    fold: bool = False,
) -> Block:
    """Rows, each named by its first cell, under the names of their columns.

    words: the columns that are no numbers. marks: HTML drawn at the end of each row. fold: closed until its title is clicked.
    """

    def line(row: Sequence[str], scope: str, end: str) -> str:
        cells = []
        for i, text in enumerate(row):
            tag, where = ("th", f" scope={scope}") if scope == "col" or i == 0 else ("td", "")
            cells.append(f"<{tag}{where}{'' if i in words else ' class=n'}>{escape(str(text))}</{tag}>")
        return f"<tr>{''.join(cells)}{end}</tr>"

    ends = [f"<td class=mark>{mark}</td>" for mark in marks] or [""] * len(rows)
    top = f"<thead>{line(head, 'col', '<td class=mark></td>' if marks else '')}</thead>" if any(head) else ""
    body = "".join(line(row, "row", end) for row, end in zip(rows, ends))
    html = f'<div class=wide role=region tabindex=0 aria-label="{escape(title or head[0])}">'
    html += f'<table class="{style}">{top}<tbody>{body}</tbody></table></div>'
    if title:
        name = escape(title)
        html = f"<details><summary>{name}</summary>{html}</details>" if fold else f"<div><h3>{name}</h3>{html}</div>"
    lines = [[_plain(text) for text in row] for row in [head, *rows]]
    lines.insert(1, [":--" if i in words else "--:" for i in range(len(head))])
    text = "\n".join(f"| {' | '.join(row)} |" for row in lines)
    return Block(html, f"### {_plain(title)}\n\n{text}" if title else text)


def _facts(facts: dict, title: str = "") -> Block:
    """Names and values of a nested dict without its Nones, folded under `title` if it has one."""
    return _table(["", ""], list(_leaves(facts)), title, words=(0, 1), fold=True)


def _leaves(value: object, path: str = "") -> Iterator[tuple[str, str]]:
    """Nested JSON as pairs of a dotted path and a text."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner, f"{path}.{key}" if path else str(key))
    elif value is not None:
        yield path, ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _bar(share: float, style: str = "") -> str:
    """A bar over `share` (0..1) of its cell."""
    return f'<i class="bar {style}"><b style="width:{100 * min(max(share, 0), 1):.1f}%"></b></i>'


def _whisker(low: float, value: float, high: float, reach: float) -> str:
    """An interval and its value on an axis from -reach to reach, zero in the middle."""
    left, middle, right = (50 + 50 * x / (reach or 1) for x in (low, value, high))
    return f'<i class=whisker><b style="left:{left:.1f}%;width:{right - left:.1f}%"></b><u style="left:{middle:.1f}%"></u></i>'


# ---- drawings ----


@dataclass(frozen=True)
class _Axes:
    """A chart of 360 by 250 units as SVG, x from `low` to `high` and y from 0 to `top`, in the page's colours."""

    low: float = 0
    high: float = 1
    top: float = 1

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Data to units."""
        return round(50 + 300 * (x - self.low) / (self.high - self.low), 1), round(204 - 192 * y / self.top, 1)

    def path(self, xs: Sequence[float], ys: Sequence[float], style: str) -> str:
        points = " ".join("{},{}".format(*self.at(x, y)) for x, y in zip(xs, ys))
        return f'<polyline class="{style}" points="{points}"/>'

    def draw(self, title: str, x: str, y: str, inner: str, caption: str, steps: int = 4) -> Block:
        """inner: the curves. caption: HTML. steps: intervals of the y axis."""
        parts = []
        for i in range(steps + 1):
            height = self.at(self.low, self.top * i / steps)[1]
            parts.append(f'<path d="M50 {height}H350" class="{"grid" if i else "axis"}"/>')
            parts.append(f'<text x="43" y="{height + 4.5}" text-anchor="end">{self.top * i / steps:,g}</text>')
        for value in (self.low + (self.high - self.low) * i / 4 for i in range(5)):
            parts.append(f'<text x="{self.at(value, 0)[0]}" y="223" text-anchor="middle">{value:.3g}</text>')
        parts.append(f'<text x="200" y="244" text-anchor="middle">{x}</text>')
        parts.append(f'<text x="-108" y="12" text-anchor="middle" transform="rotate(-90)">{y}</text>')
        svg = f'<svg viewBox="0 0 360 250" role=img aria-label="{title}: {y} over {x}">{"".join(parts)}{inner}</svg>'
        return Block(f"<figure><h3>{title}</h3>{svg}<figcaption>{caption}</figcaption></figure>")


def _precision_recall(curves: list[dict]) -> Block:
    axes = _Axes()
    lines = (axes.path(c["recall"], c["precision"], f"line s{i % 6}") for i, c in enumerate(curves))
    keys = (f'<span class="key s{i % 6}">{escape(c["name"])}</span>' for i, c in enumerate(curves))
    return axes.draw("Precision and recall", "recall", "precision", "".join(lines), "".join(keys))


def _histogram(edges: Sequence[float], counts: Sequence[int]) -> Block:
    most = max([2, *counts])
    unit = 10 ** (len(str(most)) - 1)
    axes = _Axes(edges[0], edges[-1], next(n * unit for n in (1, 2, 3, 4, 5, 6, 8, 10) if n * unit >= most))
    bars = []
    for low, high, count in zip(edges, edges[1:], counts):
        (x, y), (right, base) = axes.at(low, count), axes.at(high, 0)
        tip = f"<title>{low:.3g} to {high:.3g}: {count:,}</title>"
        bars.append(f'<rect x="{x + 0.5:.1f}" y="{y}" width="{right - x - 1:.1f}" height="{base - y:.1f}">{tip}</rect>')
    return axes.draw("IoU of the masks", "IoU", "masks", "".join(bars), f"{sum(counts):,} masks of the truth", steps=2)


def _calibration(predicted: Sequence[float | None], true: Sequence[float | None], counts: Sequence[int]) -> Block:
    axes, most = _Axes(), max([1, *counts])
    dots = [(p, t, n) for p, t, n in zip(predicted, true, counts) if p is not None and t is not None]
    inner = axes.path((0, 1), (0, 1), "ideal") + axes.path([d[0] for d in dots], [d[1] for d in dots], "line s0")
    for p, t, n in dots:
        x, y = axes.at(p, t)
        tip = f"<title>predicted {p:.2f}, true {t:.2f}: {n:,} masks</title>"
        inner += f'<circle cx="{x}" cy="{y}" r="{2 + 5 * math.sqrt(n / most):.1f}">{tip}</circle>'
    caption = "Below the dashed line the model promises too much, above it too little. Larger dots are more masks."
    return axes.draw("Predicted and true IoU", "predicted IoU", "true IoU", inner, caption)


def _galleries(pictures: Sequence[Picture], room: int) -> Iterator[Block]:
    """Figures by group, as many of the first as fit into `room` bytes."""
    groups: dict[str, list[str]] = {}
    for picture in pictures:
        figure = _figure(picture)
        room -= len(_encode(figure))
        if room < 0:
            break
        groups.setdefault(picture.group, []).append(figure)
    for group, figures in groups.items():
        yield Block(f"<div><h3>{escape(group[:1].upper() + group[1:])}</h3>{''.join(figures)}</div>")
    if left := len(pictures) - sum(map(len, groups.values())):
        yield _words(f"{left} of {len(pictures)} pictures were left out, so that this page stays under {LIMIT / 1e6:g} MB.")


def _figure(picture: Picture) -> str:
    panels = []
    for name, image in picture.panels:
        image = image.convert("RGB")
        image.thumbnail((_SIDE, _SIDE), PILImage.Resampling.LANCZOS)
        image.save(data := io.BytesIO(), "JPEG", quality=_QUALITY)
        source = f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}"
        attributes = f'loading=lazy width={image.width} height={image.height} alt="{escape(f"{name}: {picture.caption}")}"'
        panels.append(f'<div><img {attributes} src="{source}"><small>{escape(name)}</small></div>')
    return f"<figure><figcaption>{escape(picture.caption)}</figcaption><div class=panels>{''.join(panels)}</div></figure>"


# ---- sections: blocks from the dict, none where it has nothing to say ----


def _sections(r: dict, gallery: Iterable[Block]) -> dict[str, list[Block]]:
    sections: dict[str, Iterable[Block]] = {
        "Scores": _scores(r),
        "Beside published figures": _published(r),
        "Where the error comes from": _errors(r),
        "Curves": _curves(r),
        "Slices and classes": _slices(r),
        "What depth adds": _ablation(r),
        "Examples": gallery,
        "Speed": _speed(r),
        "Protocol and data": _protocol(r),
        "Provenance": _provenance(r),
    }
    full = {title: list(blocks) for title, blocks in sections.items()}
    return {title: blocks for title, blocks in full.items() if blocks}


def _scores(r: dict) -> Iterator[Block]:
    spans = r.get("intervals") or {}
    columns = 3 if any(spans.values()) else 2
    rows = [[_name(key), _score(value, key), _span(spans.get(key), key)][:columns] for key, value in r["metrics"].items()]
    if rows:
        yield _table(["Metric", "%", "95 % interval"][:columns], rows)


def _published(r: dict) -> Iterator[Block]:
    published = r.get("published") or {}
    if published.get("rows"):
        names = published["metrics"]
        model = ((r.get("provenance") or {}).get("model") or {}).get("name")
        ours = {"model": f"this run: {model}" if model else "this run", "values": r["metrics"], "source": "this report"}
        rows = [[p["model"], *(_score(p["values"].get(n), n) for n in names), p["source"]] for p in [ours, *published["rows"]]]
        yield _words("In percent. Figures compare only within one protocol and one data set; this run's are named below.")
        yield _table(["Model", *map(_name, names), "Source"], rows, words=(0, len(names) + 1), style="ours")


def _errors(r: dict) -> Iterator[Block]:
    errors = r.get("errors") or {}
    tables = []
    for side, title in (("truth", "Masks of the truth"), ("predictions", "Predictions")):
        counts = errors.get(side) or {}
        total = sum(counts.values()) or 1
        rows = [[_name(kind), _count(n), _score(100 * n / total)] for kind, n in counts.items()]
        marks = [_bar(n / total, "" if kind in ("found", "right") else "fault") for kind, n in counts.items()]
        if rows:
            tables.append(_table(["", "masks", "%"], rows, title, marks=marks))
    if tables:
        yield _beside(tables)
    yield from _said(
        errors,
        box_recall="The detector: {:.1f} % of the true masks have a box.",
        miou_given_box="The segmenter: mIoU {:.1f} % over the masks that have a box.",
    )


def _curves(r: dict) -> Iterator[Block]:
    charts = [_precision_recall(r["pr"])] if r.get("pr") else []
    charts += [_histogram(**r["histogram"])] if r.get("histogram") else []
    charts += [_calibration(**r["calibration"])] if r.get("calibration") else []
    if charts:
        yield _beside(charts)


def _slices(r: dict) -> Iterator[Block]:
    tables = []
    for cut in r.get("slices") or []:
        rows = [[row["name"], _count(row.get("masks")), _score(row["value"], cut["metric"])] for row in cut["rows"]]
        marks = [_bar((row["value"] or 0) / 100) for row in cut["rows"]]
        tables.append(_table(["", "masks", _name(cut["metric"])], rows, f"By {cut['by']}", marks=marks))
    if tables:
        yield _beside(tables)
    classes = r.get("per_class") or []
    keys = list(dict.fromkeys(k for row in classes for k in row if k not in ("id", "name", "frequency", "masks")))
    if keys:
        worst = sorted(classes, key=lambda row: (row.get(keys[0]) is None, row.get(keys[0])))
        some = ["frequency"] if any(row.get("frequency") for row in classes) else []
        rows = [
            [row["name"], *(row.get(k) or "–" for k in some), _count(row.get("masks")), *(_score(row.get(k), k) for k in keys)]
            for row in worst
        ]
        head = ["Class", *some, "masks", *map(_name, keys)]
        yield _table(head, rows, f"{len(rows):,} classes, worst {_name(keys[0])} first", words=range(1 + len(some)), fold=True)


def _ablation(r: dict) -> Iterator[Block]:
    ablation = r.get("ablation") or {}
    modes, found = ablation.get("modes") or {}, ablation.get("differences") or []
    names = list(dict.fromkeys(k for scores in modes.values() for k in scores if scores[k] is not None and "baseline" not in k))
    if names:
        yield _words("on: the image's own depth; off: none; constant: one depth everywhere; shuffled: another image's.")
        yield _table(["Depth", *map(_name, names)], [[m, *(_score(v.get(n), n) for n in names)] for m, v in modes.items()])
    if found:
        reach = max((abs(d[k]) for d in found for k in ("low", "high") if d[k] is not None), default=0)
        rows, marks = [], []
        for d in found:
            value, span, metric = d["value"], None if d["low"] is None else (d["low"], d["high"]), d["metric"]
            reading = "" if not span else "depth helps" if span[0] > 0 else "depth harms" if span[1] < 0 else "no clear difference"
            rows.append([f"on − {d['mode']}", _name(metric), _score(value, metric, "+"), _span(span, metric, "+"), reading])
            marks.append(_whisker(span[0], value, span[1], reach) if span else "")
        yield _table(["", "Metric", "points", "95 % interval", "Reading"], rows, "Differences", words=(0, 1, 4), marks=marks)


def _speed(r: dict) -> Iterator[Block]:
    speed = r.get("speed") or {}
    stages = speed.get("stages") or {}
    if stages:
        marks = [_bar(ms / (sum(stages.values()) or 1)) for ms in stages.values()]
        yield _table(["Stage", "ms per image"], [[_name(stage), f"{ms:,.1f}"] for stage, ms in stages.items()], marks=marks)
    yield from _said(
        speed,
        images_per_second="{:,.1f} images per second.",
        seconds="{:,.0f} s in all.",
        peak_mib="At most {:,.0f} MiB of memory.",
        device="Device: {}.",
    )


def _protocol(r: dict) -> Iterator[Block]:
    yield _words(f"Protocol: {r['protocol']}.", *r["protocol_in_words"])
    if r.get("dataset"):
        yield _facts(r["dataset"])


def _provenance(r: dict) -> Iterator[Block]:
    about = dict(r.get("provenance") or {})
    if command := about.pop("command", None):
        yield Block(f"<pre tabindex=0>{escape(command)}</pre>", "    " + command.replace("\n", "\n    "))
    if plain := {key: value for key, value in about.items() if value is not None and not isinstance(value, dict)}:
        yield _facts(plain)
    yield from (_facts(value, key.replace("_", " ").capitalize()) for key, value in about.items() if value and isinstance(value, dict))


# ---- the whole ----


def _headline(r: dict) -> list[tuple[str, str, str]]:
    """The numbers to remember, each as its name, itself and its interval."""
    names = {"box": ["miou"], "detector": ["ap"], "point": [f"miou_{n}" for n in r.get("clicks") or (1, 3, 5)]}
    spans = r.get("intervals") or {}
    keys = names.get(r.get("prompt") or "", list(r["metrics"])[:1])
    return [(_name(k), _score(r["metrics"].get(k), k), f"95 % interval {_span(spans[k], k)}" if spans.get(k) else "") for k in keys]


def _gaps(r: dict) -> tuple[str, list[str]]:
    """What the figures lack in a few words, "" for nothing, and all that a reader must know first."""
    state = r["state"]
    failed, images = state.get("failed") or [], state["images"]
    missing = images - state["done"] - len(failed)
    gaps = [f"{n:,} of {images:,} images {what}" for n, what in ((len(failed), "failed"), (missing, "were not reached")) if n > 0]
    notes = [f"{f['key']}: {f['stage']}: {f['reason']}" for f in failed[:_LISTED]]
    notes += [f"and {len(failed) - _LISTED:,} more, named in report.json"] if len(failed) > _LISTED else []
    return ", ".join(gaps), notes + list(r.get("warnings") or [])


def _subject(r: dict) -> str:
    """What was measured, in one line."""
    data, state = r.get("dataset") or {}, r["state"]
    counts = [f"{data[key]:,} {key}" for key in ("masks", "crowds", "categories") if data.get(key)]
    left = f", {state['left_out']:,} more left out" if state.get("left_out") else ""
    facts = [data.get("kind"), f"{state['done']:,} of {state['images']:,} images{left}", *counts]
    return " · ".join(str(fact) for fact in [*facts, _PROMPTS.get(r.get("prompt") or ""), r.get("created")] if fact)


def _markdown(r: dict) -> str:
    gap, notes = _gaps(r)
    numbers = [f"**{name} {value} %**{f' ({span})' if span else ''}" for name, value, span in _headline(r)]
    parts = [f"# {_plain(r['title'])}{f' ({gap})' if gap else ''}", ", ".join(numbers), _plain(_subject(r))]
    lines = [f"**Incomplete: {gap}.**"] * bool(gap) + [f"- {_plain(note)}" for note in notes]
    parts += ["\n".join(f"> {line}" for line in lines)] if lines else []
    for title, blocks in _sections(r, ()).items():
        parts += [f"## {title}", *(b.markdown for b in blocks if b.markdown)] if any(b.markdown for b in blocks) else []
    return "\n\n".join([*parts, "[The page](report/index.html) has curves and pictures, too."]) + "\n"


def _page(r: dict, gallery: Iterable[Block] = ()) -> str:
    gap, notes = _gaps(r)
    title = escape(r["title"]) + (f" <em>({gap})</em>" if gap else "")
    numbers = [f"<p><strong>{n}<small> %</small></strong><b>{escape(name)}</b> {span}</p>" for name, n, span in _headline(r)]
    items = "".join(f"<li>{escape(note)}</li>" for note in notes)
    box = f"<aside{' class=bad' * bool(gap)}><h2>{f'Incomplete: {gap}' if gap else 'To know first'}</h2><ul>{items}</ul></aside>"
    links, body = [], []
    for name, blocks in _sections(r, gallery).items():
        link = name.lower().replace(" ", "-")
        links.append(f'<a href="#{link}">{name}</a>')
        body.append(f'<section id="{link}"><h2>{name}</h2><div>{"".join(b.html for b in blocks)}</div></section>')
    return f"""<!doctype html>
<html lang=en><meta charset=utf-8><meta name=viewport content="width=device-width,initial-scale=1">
<meta http-equiv=Content-Security-Policy content="default-src 'none';img-src data:;style-src 'unsafe-inline'">
<link rel=icon href="data:,"><title>{re.sub("</?em>", "", title)}</title><style>{CSS}</style>
<main><header><h1>{title}</h1><div class=numbers>{"".join(numbers)}</div><p>{escape(_subject(r))}</p></header>
{box if gap or notes else ""}<nav aria-label=Sections>{"".join(links)}</nav>{"".join(body)}
<footer>depthseg report, schema {r["schema_version"]:d}. The same figures stand in report.md and report.json.</footer></main></html>
"""


CSS = """
:root{color-scheme:light dark;--page:#fdfdfc;--ink:#1c2024;--soft:#5c636b;--line:#e3e3df;--panel:#f1f2ef;--bad:#b3261e;--badpage:#fdf1ef;
--warn:#8a6100;--warnpage:#fdf8e8;--s0:#2b6f98;--s1:#c2651a;--s2:#3c8a5b;--s3:#8a5aa5;--s4:#a9473f;--s5:#77752c}
@media screen and (prefers-color-scheme:dark){:root{--page:#14171a;--ink:#e6e8e6;--soft:#9fa6ad;--line:#2d3237;--panel:#20252a;
--bad:#ff8a80;--badpage:#2b1917;--warn:#e0b84e;--warnpage:#262012;--s0:#6fb4da;--s1:#e79a58;--s2:#74c394;--s3:#c199d8;--s4:#e58c84;--s5:#c2bf6a}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans",sans-serif;
font-variant-numeric:tabular-nums;overflow-wrap:anywhere}
main{max-width:1160px;margin:0 auto;padding:56px 24px 80px}
h1,h2,h3,p,figure{margin:0;font-weight:600}h1{font-size:1.25rem}h2{font-size:1.0625rem}h3{font-size:.875rem;margin-bottom:6px}
p,figure{font-weight:400}small,p,footer,figcaption,summary,nav{color:var(--soft);font-size:.875rem}
a{color:var(--s0);text-underline-offset:3px;text-decoration-thickness:1px}
:focus-visible{outline:2px solid var(--s0);outline-offset:3px;border-radius:2px}
.numbers{display:flex;flex-wrap:wrap;gap:16px 56px;margin:20px 0 16px}
.numbers strong{display:block;color:var(--ink);font-size:clamp(3rem,9vw,4.5rem);font-weight:650;line-height:1.05;letter-spacing:-.03em}
.numbers strong small{font-size:.4em;font-weight:400;letter-spacing:0}
.numbers b{display:block;color:var(--ink);font-weight:500;font-size:1rem}h1 em{color:var(--bad);font-style:normal}
aside{margin:28px 0 0;padding:16px 20px;background:var(--warnpage);border:1px solid var(--warn);border-left-width:6px;border-radius:6px}
aside.bad{background:var(--badpage);border-color:var(--bad)}aside h2{color:var(--warn)}aside.bad h2{color:var(--bad)}
aside ul{margin:6px 0 0;padding-left:20px;font-size:.9375rem}
nav{display:flex;flex-wrap:wrap;gap:4px 20px;margin:32px 0 40px}
section{border-top:1px solid var(--line);padding:28px 0 44px;display:grid;gap:16px 40px;grid-template-columns:minmax(0,1fr)}
section>div{display:grid;gap:24px;grid-template-columns:minmax(0,1fr)}section p{max-width:75ch;margin-bottom:4px}
.beside{display:grid;gap:32px 48px;grid-template-columns:repeat(auto-fit,minmax(min(100%,340px),1fr))}
.wide{overflow-x:auto}table{border-collapse:collapse;font-size:.9375rem;line-height:1.4;overflow-wrap:normal}
th,td{padding:7px 28px 7px 0;text-align:left;vertical-align:baseline;border-bottom:1px solid var(--line);font-weight:400}
th:first-child{position:sticky;left:0;background:var(--page);min-width:7rem;max-width:22rem;overflow-wrap:break-word}
thead th,td:not(.n){color:var(--soft);font-size:.8125rem}th:last-child,td:last-child{padding-right:0}thead th{vertical-align:bottom}
td:last-child:not(.n,.mark){min-width:13rem;overflow-wrap:anywhere}.n{text-align:right;white-space:nowrap}
.ours tbody tr:first-child>*{color:var(--ink);font-weight:650}
table:has(.mark){width:100%}td.mark{width:36%;min-width:80px;vertical-align:middle}
.bar,.whisker{display:block;position:relative;height:10px;background:var(--panel);border-radius:2px}
.bar b{display:block;height:100%;background:var(--s0);border-radius:2px}.bar.fault b{background:var(--s1)}
.whisker{background:linear-gradient(var(--soft),var(--soft)) center/1px 100% no-repeat;height:16px}
.whisker b{position:absolute;top:7px;height:2px;background:var(--s0)}
.whisker u{position:absolute;top:4px;width:8px;height:8px;margin-left:-4px;border-radius:50%;background:var(--s0)}
svg{display:block;width:100%;max-width:440px;height:auto}svg text{font-size:12.5px;fill:var(--soft)}rect,circle{fill:var(--s0)}
.axis{stroke:var(--soft)}.grid{stroke:var(--line)}.ideal{fill:none;stroke:var(--soft);stroke-dasharray:4 4}
.line{fill:none;stroke:var(--c);stroke-width:2;stroke-linejoin:round}
.s0{--c:var(--s0)}.s1{--c:var(--s1)}.s2{--c:var(--s2)}.s3{--c:var(--s3)}.s4{--c:var(--s4)}.s5{--c:var(--s5)}
.s1,.s4{stroke-dasharray:7 3}.s2,.s5{stroke-dasharray:2 3}.key{display:inline-block;margin-right:18px}
.key::before{content:"";display:inline-block;width:18px;border-top:3px solid var(--c);margin-right:7px;vertical-align:middle}
.panels{display:grid;gap:8px;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));margin:4px 0 20px}
img{display:block;width:100%;height:auto;border-radius:4px;background:var(--panel)}
summary{cursor:pointer;padding:4px 0}footer{border-top:1px solid var(--line);padding-top:20px}
pre{margin:0;padding:12px 14px;background:var(--panel);border-radius:6px;font:.8125rem/1.5 ui-monospace,monospace;white-space:pre-wrap}
@media (min-width:1000px){section{grid-template-columns:176px minmax(0,1fr)}}
@media (max-width:600px){main{padding:32px 16px 56px}th,td{padding-right:18px}}
@media print{:root{--page:#fff}nav{display:none}main{padding:0;max-width:none}body{font-size:10pt}.wide{overflow:visible}
th:first-child{position:static}tr,figure,aside,.beside>*{break-inside:avoid}
h2,h3{break-after:avoid}.bar b,.whisker *,aside{print-color-adjust:exact}}
"""
