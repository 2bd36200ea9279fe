"""What a page of results is made of: words, numbers, tables, bars and charts, each as HTML and as Markdown, and their style.

Knows how results look, not what they are. All text is escaped here: keys, names and paths are users' data.
"""

import math
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import NamedTuple

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


class Block(NamedTuple):
    """A piece of a section in both languages; Markdown is empty where a drawing has no words."""

    html: str
    markdown: str = ""


# ---- words and numbers ----


def metric_name(key: str) -> str:
    """A key of the dict in words: miou_3 is mIoU, 3 clicks; ap_small is AP, small; ar_100 is AR, best 100."""
    found = re.fullmatch(rf"({'|'.join(_HEADS)})(_\w+)?", key)
    if key in _NAMES or not found:
        return _NAMES.get(key, key.replace("_", " "))
    number = "best {}" if found[1] == "ar" else "{} click" if "_1" in key else "{} clicks"
    parts = (found[2] or "").split("_")[1:]
    return ", ".join([_HEADS[found[1]], *(number.format(part) if part.isdigit() else part for part in parts)])


def score(value: float | None, key: str = "", sign: str = "") -> str:
    """A score as its kind is written, an en dash where there was nothing to measure. sign: + to show it always."""
    return "–" if value is None else f"{value:{sign}{_FORMATS.get(key, '.1f')}}".replace("-", "−")


def span(span: Sequence[float] | None, key: str = "", sign: str = "") -> str:
    return f"{score(span[0], key, sign)} to {score(span[1], key, sign)}" if span else "–"


def count(value: int | None) -> str:
    return "–" if value is None else f"{value:,}"


def plain(text: object) -> str:
    """Text as Markdown that cannot leave its line or its cell, nor become HTML."""
    return re.sub(r"([\\`*\[\]|])", r"\\\1", escape(" ".join(str(text).split()), quote=False))


# ---- blocks ----


def words(*sentences: str) -> Block:
    return Block(f"<div>{''.join(f'<p>{escape(s)}</p>' for s in sentences)}</div>", "\n\n".join(map(plain, sentences)))


def said(values: dict, **sentences: str) -> Iterator[Block]:
    """The sentences whose value is there."""
    if found := [text.format(values[key]) for key, text in sentences.items() if values.get(key) is not None]:
        yield words(*found)


def beside(blocks: Sequence[Block]) -> Block:
    """Blocks in columns where the page is wide enough."""
    return Block(f"<div class=beside>{''.join(b.html for b in blocks)}</div>", "\n\n".join(b.markdown for b in blocks if b.markdown))


def table(
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
    lines = [[plain(text) for text in row] for row in [head, *rows]]
    lines.insert(1, [":--" if i in words else "--:" for i in range(len(head))])
    text = "\n".join(f"| {' | '.join(row)} |" for row in lines)
    return Block(html, f"### {plain(title)}\n\n{text}" if title else text)


def facts(facts: dict, title: str = "") -> Block:
    """Names and values of a nested dict without its Nones, folded under `title` if it has one."""
    return table(["", ""], list(_leaves(facts)), title, words=(0, 1), fold=True)


def _leaves(value: object, path: str = "") -> Iterator[tuple[str, str]]:
    """Nested JSON as pairs of a dotted path and a text."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner, f"{path}.{key}" if path else str(key))
    elif value is not None:
        yield path, ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def bar(share: float, style: str = "") -> str:
    """A bar over `share` (0..1) of its cell."""
    return f'<i class="bar {style}"><b style="width:{100 * min(max(share, 0), 1):.1f}%"></b></i>'


def whisker(low: float, value: float, high: float, reach: float) -> str:
    """An interval and its value on an axis from -reach to reach, zero in the middle."""
    left, middle, right = (50 + 50 * x / (reach or 1) for x in (low, value, high))
    return f'<i class=whisker><b style="left:{left:.1f}%;width:{right - left:.1f}%"></b><u style="left:{middle:.1f}%"></u></i>'


# ---- drawings ----


@dataclass(frozen=True)
class Axes:
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


def precision_recall(curves: list[dict]) -> Block:
    axes = Axes()
    lines = (axes.path(c["recall"], c["precision"], f"line s{i % 6}") for i, c in enumerate(curves))
    keys = (f'<span class="key s{i % 6}">{escape(c["name"])}</span>' for i, c in enumerate(curves))
    return axes.draw("Precision and recall", "recall", "precision", "".join(lines), "".join(keys))


def histogram(edges: Sequence[float], counts: Sequence[int]) -> Block:
    most = max([2, *counts])
    unit = 10 ** (len(str(most)) - 1)
    axes = Axes(edges[0], edges[-1], next(n * unit for n in (1, 2, 3, 4, 5, 6, 8, 10) if n * unit >= most))
    bars = []
    for low, high, count in zip(edges, edges[1:], counts):
        (x, y), (right, base) = axes.at(low, count), axes.at(high, 0)
        tip = f"<title>{low:.3g} to {high:.3g}: {count:,}</title>"
        bars.append(f'<rect x="{x + 0.5:.1f}" y="{y}" width="{right - x - 1:.1f}" height="{base - y:.1f}">{tip}</rect>')
    return axes.draw("IoU of the masks", "IoU", "masks", "".join(bars), f"{sum(counts):,} masks of the truth", steps=2)


def calibration(predicted: Sequence[float | None], true: Sequence[float | None], counts: Sequence[int]) -> Block:
    axes, most = Axes(), max([1, *counts])
    dots = [(p, t, n) for p, t, n in zip(predicted, true, counts) if p is not None and t is not None]
    inner = axes.path((0, 1), (0, 1), "ideal") + axes.path([d[0] for d in dots], [d[1] for d in dots], "line s0")
    for p, t, n in dots:
        x, y = axes.at(p, t)
        tip = f"<title>predicted {p:.2f}, true {t:.2f}: {n:,} masks</title>"
        inner += f'<circle cx="{x}" cy="{y}" r="{2 + 5 * math.sqrt(n / most):.1f}">{tip}</circle>'
    caption = "Below the dashed line the model promises too much, above it too little. Larger dots are more masks."
    return axes.draw("Predicted and true IoU", "predicted IoU", "true IoU", inner, caption)


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
