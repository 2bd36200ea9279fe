"""One result of an evaluation as JSON, as Markdown, and as one HTML page that opens anywhere, offline and without JavaScript.

All three come from one dict of JSON values, made elsewhere. What is absent or None in it leaves no trace, not even a heading.
Knows how numbers look, not how they are computed. Everything from the dict is escaped: keys, names and paths are users' data.
"""

import base64
import io
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from PIL import Image as PILImage

from depthseg import page
from depthseg.formats import atomic

LIMIT = 15_000_000  # bytes of the page: what mail servers let through
_SIDE, _QUALITY = 640, 80  # pictures in the page: long side in pixels, JPEG quality
_LISTED = 20  # failed images that the page names; report.json has all
_PROMPTS = {"box": "prompted with true boxes", "point": "prompted with clicks", "detector": "prompted with a detector's boxes"}


@dataclass(frozen=True)
class Picture:
    """One example of a gallery: panels side by side, such as photograph, depth, truth and prediction, each with its name."""

    group: str  # the gallery's heading: worst, best
    caption: str
    panels: list[tuple[str, PILImage.Image]]


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


def _galleries(pictures: Sequence[Picture], room: int) -> Iterator[page.Block]:
    """Figures by group, as many of the first as fit into `room` bytes."""
    groups: dict[str, list[str]] = {}
    for picture in pictures:
        figure = _figure(picture)
        room -= len(_encode(figure))
        if room < 0:
            break
        groups.setdefault(picture.group, []).append(figure)
    for group, figures in groups.items():
        yield page.Block(f"<div><h3>{escape(group[:1].upper() + group[1:])}</h3>{''.join(figures)}</div>")
    if left := len(pictures) - sum(map(len, groups.values())):
        yield page.words(f"{left} of {len(pictures)} pictures were left out, so that this page stays under {LIMIT / 1e6:g} MB.")


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


def _sections(r: dict, gallery: Iterable[page.Block]) -> dict[str, list[page.Block]]:
    sections: dict[str, Iterable[page.Block]] = {
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


def _scores(r: dict) -> Iterator[page.Block]:
    spans = r.get("intervals") or {}
    columns = 3 if any(spans.values()) else 2
    rows = [
        [page.metric_name(key), page.score(value, key), page.span(spans.get(key), key)][:columns] for key, value in r["metrics"].items()
    ]
    if rows:
        yield page.table(["Metric", "%", "95 % interval"][:columns], rows)


def _published(r: dict) -> Iterator[page.Block]:
    published = r.get("published") or {}
    if published.get("rows"):
        names = published["metrics"]
        model = ((r.get("provenance") or {}).get("model") or {}).get("name")
        ours = {"model": f"this run: {model}" if model else "this run", "values": r["metrics"], "source": "this report"}
        rows = [[p["model"], *(page.score(p["values"].get(n), n) for n in names), p["source"]] for p in [ours, *published["rows"]]]
        yield page.words("In percent. Figures compare only within one protocol and one data set; this run's are named below.")
        yield page.table(["Model", *map(page.metric_name, names), "Source"], rows, words=(0, len(names) + 1), style="ours")


def _errors(r: dict) -> Iterator[page.Block]:
    errors = r.get("errors") or {}
    tables = []
    for side, title in (("truth", "Masks of the truth"), ("predictions", "Predictions")):
        counts = errors.get(side) or {}
        total = sum(counts.values()) or 1
        rows = [[page.metric_name(kind), page.count(n), page.score(100 * n / total)] for kind, n in counts.items()]
        marks = [page.bar(n / total, "" if kind in ("found", "right") else "fault") for kind, n in counts.items()]
        if rows:
            tables.append(page.table(["", "masks", "%"], rows, title, marks=marks))
    if tables:
        yield page.beside(tables)
    yield from page.said(
        errors,
        box_recall="The detector: {:.1f} % of the true masks have a box.",
        miou_given_box="The segmenter: mIoU {:.1f} % over the masks that have a box.",
    )


def _curves(r: dict) -> Iterator[page.Block]:
    charts = [page.precision_recall(r["pr"])] if r.get("pr") else []
    charts += [page.histogram(**r["histogram"])] if r.get("histogram") else []
    charts += [page.calibration(**r["calibration"])] if r.get("calibration") else []
    if charts:
        yield page.beside(charts)


def _slices(r: dict) -> Iterator[page.Block]:
    tables = []
    for cut in r.get("slices") or []:
        rows = [[row["name"], page.count(row.get("masks")), page.score(row["value"], cut["metric"])] for row in cut["rows"]]
        marks = [page.bar((row["value"] or 0) / 100) for row in cut["rows"]]
        tables.append(page.table(["", "masks", page.metric_name(cut["metric"])], rows, f"By {cut['by']}", marks=marks))
    if tables:
        yield page.beside(tables)
    classes = r.get("per_class") or []
    keys = list(dict.fromkeys(k for row in classes for k in row if k not in ("id", "name", "frequency", "masks")))
    if keys:
        worst = sorted(classes, key=lambda row: (row.get(keys[0]) is None, row.get(keys[0])))
        some = ["frequency"] if any(row.get("frequency") for row in classes) else []
        rows = [
            [row["name"], *(row.get(k) or "–" for k in some), page.count(row.get("masks")), *(page.score(row.get(k), k) for k in keys)]
            for row in worst
        ]
        head = ["Class", *some, "masks", *map(page.metric_name, keys)]
        yield page.table(
            head, rows, f"{len(rows):,} classes, worst {page.metric_name(keys[0])} first", words=range(1 + len(some)), fold=True
        )


def _ablation(r: dict) -> Iterator[page.Block]:
    ablation = r.get("ablation") or {}
    modes, found = ablation.get("modes") or {}, ablation.get("differences") or []
    names = list(dict.fromkeys(k for scores in modes.values() for k in scores if scores[k] is not None and "baseline" not in k))
    if names:
        yield page.words("on: the image's own depth; off: none; constant: one depth everywhere; shuffled: another image's.")
        yield page.table(
            ["Depth", *map(page.metric_name, names)], [[m, *(page.score(v.get(n), n) for n in names)] for m, v in modes.items()]
        )
    if found:
        reach = max((abs(d[k]) for d in found for k in ("low", "high") if d[k] is not None), default=0)
        rows, marks = [], []
        for d in found:
            value, span, metric = d["value"], None if d["low"] is None else (d["low"], d["high"]), d["metric"]
            reading = "" if not span else "depth helps" if span[0] > 0 else "depth harms" if span[1] < 0 else "no clear difference"
            rows.append(
                [f"on − {d['mode']}", page.metric_name(metric), page.score(value, metric, "+"), page.span(span, metric, "+"), reading]
            )
            marks.append(page.whisker(span[0], value, span[1], reach) if span else "")
        yield page.table(["", "Metric", "points", "95 % interval", "Reading"], rows, "Differences", words=(0, 1, 4), marks=marks)


def _speed(r: dict) -> Iterator[page.Block]:
    speed = r.get("speed") or {}
    stages = speed.get("stages") or {}
    if stages:
        marks = [page.bar(ms / (sum(stages.values()) or 1)) for ms in stages.values()]
        yield page.table(["Stage", "ms per image"], [[page.metric_name(stage), f"{ms:,.1f}"] for stage, ms in stages.items()], marks=marks)
    yield from page.said(
        speed,
        images_per_second="{:,.1f} images per second.",
        seconds="{:,.0f} s in all.",
        peak_mib="At most {:,.0f} MiB of memory.",
        device="Device: {}.",
    )


def _protocol(r: dict) -> Iterator[page.Block]:
    yield page.words(f"Protocol: {r['protocol']}.", *r["protocol_in_words"])
    if r.get("dataset"):
        yield page.facts(r["dataset"])


def _provenance(r: dict) -> Iterator[page.Block]:
    about = dict(r.get("provenance") or {})
    if command := about.pop("command", None):
        yield page.Block(f"<pre tabindex=0>{escape(command)}</pre>", "    " + command.replace("\n", "\n    "))
    if plain := {key: value for key, value in about.items() if value is not None and not isinstance(value, dict)}:
        yield page.facts(plain)
    yield from (page.facts(value, key.replace("_", " ").capitalize()) for key, value in about.items() if value and isinstance(value, dict))


# ---- the whole ----


def _headline(r: dict) -> list[tuple[str, str, str]]:
    """The numbers to remember, each as its name, itself and its interval."""
    names = {"box": ["miou"], "detector": ["ap"], "point": [f"miou_{n}" for n in r.get("clicks") or (1, 3, 5)]}
    spans = r.get("intervals") or {}
    keys = names.get(r.get("prompt") or "", list(r["metrics"])[:1])
    return [
        (page.metric_name(k), page.score(r["metrics"].get(k), k), f"95 % interval {page.span(spans[k], k)}" if spans.get(k) else "")
        for k in keys
    ]


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
    parts = [f"# {page.plain(r['title'])}{f' ({gap})' if gap else ''}", ", ".join(numbers), page.plain(_subject(r))]
    lines = [f"**Incomplete: {gap}.**"] * bool(gap) + [f"- {page.plain(note)}" for note in notes]
    parts += ["\n".join(f"> {line}" for line in lines)] if lines else []
    for title, blocks in _sections(r, ()).items():
        parts += [f"## {title}", *(b.markdown for b in blocks if b.markdown)] if any(b.markdown for b in blocks) else []
    return "\n\n".join([*parts, "[The page](report/index.html) has curves and pictures, too."]) + "\n"


def _page(r: dict, gallery: Iterable[page.Block] = ()) -> str:
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
<link rel=icon href="data:,"><title>{re.sub("</?em>", "", title)}</title><style>{page.CSS}</style>
<main><header><h1>{title}</h1><div class=numbers>{"".join(numbers)}</div><p>{escape(_subject(r))}</p></header>
{box if gap or notes else ""}<nav aria-label=Sections>{"".join(links)}</nav>{"".join(body)}
<footer>depthseg report, schema {r["schema_version"]:d}. The same figures stand in report.md and report.json.</footer></main></html>
"""
