"""Reports: one dict in three forms, nothing lost, nothing empty, nothing that users' names could break, and a page that fits a phone."""

import copy
import json
import re
import shutil
import subprocess
from html import escape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as PILImage

from depthseg import published, report
from depthseg.report import Picture

HOSTILE = "<script>alert('x')</script>\"><img src=x onerror=y>&amp; | `a` [b](http://example.org)\n\\ 犬 \udcff"
VOID = {"meta", "link", "img"}
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def sample(prompt: str = "box") -> dict:
    """A result with every key."""
    metrics = {
        "box": {"miou": 76.83, "miou_small": 68.21, "miou_large": None, "boundary_iou": 61.2, "iou_correlation": 0.734},
        "point": {"miou_1": 52.63, "miou_3": 71.6, "miou_5": 75.51, "miou_1_small": 40.2},
        "detector": {"ap": 43.27, "ap50": 66.1, "ap_small": 26.9, "ar_100": 55.3, "predictions": 12345},
    }[prompt]
    first = next(iter(metrics))
    recall = np.linspace(0, 1, 101)
    return {
        "schema_version": 1,
        "title": "depthseg-l2 on COCO",
        "created": "2026-03-02T14:05:31+00:00",
        "state": {"images": 80, "done": 78, "failed": [{"key": f"{k}.jpg", "stage": "read", "reason": "cut"} for k in "ab"], "left_out": 9},
        "warnings": ["2 names are unknown"],
        "prompt": prompt,
        "clicks": [1, 3, 5] if prompt == "point" else None,
        "protocol": "official",
        "protocol_in_words": ["Crowds are included."],
        "metrics": metrics,
        "intervals": {first: [metrics[first] - 1.25, metrics[first] + 1.25]},
        "dataset": {"kind": "coco", "annotations": "instances.json", "sha256": "9f2c" * 16, "images": 80, "masks": 815, "crowds": 11},
        "per_class": [
            {"id": 1, "name": "person", "frequency": "f", "masks": 1200, "miou": 80.0},
            {"id": 2, "name": "kite", "frequency": None, "masks": 0, "miou": None},
            {"id": 3, "name": "fork", "frequency": "r", "masks": 7, "miou": 41.0},
        ],
        "slices": [{"by": "crowding", "metric": "miou", "rows": [{"name": "alone", "masks": 120, "value": 85.1}]}],
        "histogram": {"edges": [i / 20 for i in range(21)], "counts": [*range(10), *range(10, 210, 20)]},
        "calibration": {"predicted": [None, 0.4, 0.9], "true": [None, 0.3, 0.88], "counts": [0, 5, 700]},
        "pr": [{"name": f"IoU {t}", "recall": recall.tolist(), "precision": (1 - recall**2).tolist()} for t in ("0.50", "0.75")],
        "errors": {
            "truth": {"found": 611, "poor_mask": 88, "wrong_class": 31, "missed": 85},
            "predictions": {"right": 611, "duplicate": 40, "wrong_class": 31, "poor_mask": 88, "background": 0},
            "box_recall": 88.2,
            "miou_given_box": 79.4,
        },
        "ablation": {
            "metric": first,
            "modes": {mode: dict(metrics) for mode in ("on", "off", "constant", "shuffled")},
            "differences": [
                {"mode": "off", "metric": first, "value": 1.2, "low": 0.4, "high": 2.0},
                {"mode": "constant", "metric": first, "value": -1.3, "low": -2.0, "high": -0.4},
                {"mode": "shuffled", "metric": first, "value": 3.1, "low": None, "high": None},
            ],
        },
        "published": {
            "metrics": list(published.METRICS[prompt]),
            "rows": published.rows("coco", prompt, "vitdet" * (prompt == "detector")),
        },
        "speed": {"stages": {"read": 4.1, "depth": 18.2}, "images_per_second": 31.9, "seconds": 157.2, "peak_mib": 5321, "device": "cpu"},
        "provenance": {
            "command": "depthseg eval --images val2017 --annotations /a/rather/long/path/that/has/no/spaces/instances_val2017.json",
            "precision": "bf16",
            "model": {"name": "depthseg-l2", "weights": {"sha256": "ab12" * 16, "bytes": 474000123}},
            "plan": {"batch": 8, "sizes": [512, 1024], "text": None},
        },
    }


BARE = {key: sample()[key] for key in ("schema_version", "title", "metrics", "protocol", "protocol_in_words", "prompt")} | {
    "state": {"images": 3, "done": 3, "failed": [], "left_out": 0}
}


def pictures(count: int = 2, size: tuple[int, int] = (900, 600)) -> list[Picture]:
    """Noise, which JPEG cannot make small, beside a plain panel, in two groups by turns."""
    rng = np.random.default_rng(0)
    noise = [PILImage.fromarray(rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)) for _ in range(count)]
    plain = PILImage.new("L", size, 90)
    return [Picture(("worst", "best")[i % 2], f"{i}.jpg: IoU 0.3", [("photograph", n), ("depth", plain)]) for i, n in enumerate(noise)]


class Page(HTMLParser):
    """Tags with the names of their attributes in order, all links, all text outside of tags; refuses tags that do not nest."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.links, self.images, self.words, self.open = [], [], [], [], []
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, *(name for name, _ in attributes)))
        self.links += [value for name, value in attributes if name in ("src", "href", "srcset", "action", "data", "xlink:href")]
        if tag == "img":
            self.images.append(dict(attributes))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, *(name for name, _ in attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def written(result: dict, folder: Path, some: list[Picture] | None = None) -> tuple[str, Page, str]:
    """The page as text and parsed, and the Markdown."""
    report.write(result, folder, some or [])
    html = (folder / "report/index.html").read_text("utf-8")
    return html, Page(html), (folder / "report.md").read_text("utf-8")


def headings(html: str) -> list[str]:
    return re.findall(r"<section id=.*?<h2>(.*?)</h2>", html)


def test_report_json_is_the_dict(tmp_path):
    written(sample(), tmp_path, pictures())
    assert json.loads((tmp_path / "report.json").read_text()) == sample()
    assert sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()) == [
        "report.json",
        "report.md",
        "report/index.html",
    ]


def test_a_nan_is_refused_before_anything_is_written(tmp_path):
    written(sample(), tmp_path)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(ValueError):
        report.write({**sample(), "title": "new", "metrics": {"miou": float("nan")}}, tmp_path)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


# The key that makes each section; scores and protocol are always there.
SECTIONS = {
    "Beside published figures": ["published"],
    "Where the error comes from": ["errors"],
    "Curves": ["pr", "histogram", "calibration"],
    "Slices and classes": ["slices", "per_class"],
    "What depth adds": ["ablation"],
    "Speed": ["speed"],
    "Provenance": ["provenance"],
}


def test_a_full_dict_has_every_section_in_order(tmp_path):
    html, _, markdown = written(sample(), tmp_path, pictures())
    order = ["Scores", *list(SECTIONS)[:5], "Examples", "Speed", "Protocol and data", "Provenance"]
    assert headings(html) == order
    assert re.findall("^## (.*)", markdown, re.M) == [name for name in order if name not in ("Curves", "Examples")]
    assert re.findall('<a href="#(.*?)"', html) == re.findall('<section id="(.*?)"', html)


@pytest.mark.parametrize("gone", SECTIONS)
def test_absent_keys_leave_no_empty_heading(tmp_path, gone):
    without = {key: value for key, value in sample().items() if key not in SECTIONS[gone]}
    html, _, markdown = written(without, tmp_path / "absent")
    assert headings(html) == [h for h in ["Scores", *list(SECTIONS)[:6], "Protocol and data", "Provenance"] if h != gone]
    assert f"## {gone}" not in markdown and f">{gone}<" not in html
    assert html == written({**sample(), **dict.fromkeys(SECTIONS[gone])}, tmp_path / "none")[0]
    for key in SECTIONS[gone]:  # each alone, where several make a section
        written({**sample(), key: None}, tmp_path / key)


def test_the_least_dict(tmp_path):
    html, page, _ = written(BARE, tmp_path)
    assert headings(html) == ["Scores", "Protocol and data"] and "<aside" not in html and "<h3>" not in html
    assert "76.8" in page.words and "–" in page.words
    assert headings(written({**BARE, "metrics": {}}, tmp_path)[0]) == ["Protocol and data"]


@pytest.mark.parametrize(
    "prompt, numbers",
    [
        ("box", {"mIoU": "76.8"}),
        ("point", {"mIoU, 1 click": "52.6", "mIoU, 3 clicks": "71.6", "mIoU, 5 clicks": "75.5"}),
        ("detector", {"AP": "43.3"}),
    ],
)
def test_the_headline(tmp_path, prompt, numbers):
    html, _, markdown = written(sample(prompt), tmp_path)
    assert dict(re.findall(r"<strong>(.*?)<small> %</small></strong><b>(.*?)</b>", html)) == {v: k for k, v in numbers.items()}
    assert all(f"**{name} {value} %**" in markdown for name, value in numbers.items())
    low = next(iter(sample(prompt)["intervals"].values()))[0]
    assert f"95 % interval {low:.1f} to " in html and f"95 % interval {low:.1f} to " in markdown


def test_names_and_numbers_are_written_for_people(tmp_path):
    html, _, markdown = written(sample("detector"), tmp_path)
    for row in ("| AP, small | 26.9 |", "| AR, best 100 | 55.3 |", "| predictions (their number) | 12,345 |", "| AP at IoU 0.50 | 66.1 |"):
        assert row in markdown
    assert "| mIoU, 1 click, small | 40.2 |" in written(sample("point"), tmp_path)[2]
    _, _, markdown = written(sample(), tmp_path)
    assert "| mIoU, large | – | – |" in markdown and "| IoU correlation (−1 to 1) | 0.73 | – |" in markdown
    assert "| on − off | mIoU | +1.2 | +0.4 to +2.0 | depth helps |" in markdown
    assert "| on − constant | mIoU | −1.3 | −2.0 to −0.4 | depth harms |" in markdown
    assert "| on − shuffled | mIoU | +3.1 | – |  |" in markdown
    assert re.findall(r"^\| (fork|person|kite) \| (.) \|", markdown, re.M) == [("fork", "r"), ("person", "f"), ("kite", "–")]
    assert "<summary>3 classes, worst mIoU first</summary>" in html.replace("AP", "mIoU")


def test_failures_and_warnings_cannot_be_overlooked(tmp_path):
    html, _, markdown = written(sample(), tmp_path)
    assert "<em>(2 of 80 images failed)</em></h1>" in html and "(2 of 80 images failed)</title>" in html
    box = re.search("<aside class=bad>.*?</aside>", html)[0]
    assert html.index(box) < html.index("<section") and "Incomplete: 2 of 80 images failed" in box
    assert "a.jpg: read: cut" in box and "2 names are unknown" in box and "> - a.jpg: read: cut" in markdown
    assert "9 more left out" in html and markdown.startswith("# depthseg-l2 on COCO (2 of 80 images failed)\n")
    many = {"images": 80, "done": 10, "failed": [{"key": f"{i:02}.jpg", "stage": "read", "reason": "cut"} for i in range(50)]}
    html, *_ = written({**sample(), "state": many}, tmp_path)
    assert "50 of 80 images failed, 20 of 80 images were not reached" in html
    assert "19.jpg" in html and "20.jpg" not in html and "and 30 more" in html
    html, *_ = written({**BARE, "warnings": ["careful"]}, tmp_path)
    assert "<aside><h2>To know first</h2><ul><li>careful</li></ul></aside>" in html


def test_the_page_asks_for_nothing_outside_itself(tmp_path):
    html, page, _ = written(sample(), tmp_path, pictures())
    assert page.links and all(link.startswith(("data:", "#")) for link in page.links)
    assert "script" not in {tag[0] for tag in page.tags} and not re.search(r"url\(|@import|\bon\w+=", html)
    assert "default-src 'none'" in html
    assert all(image["alt"] and image["loading"] == "lazy" for image in page.images)
    assert [(image["width"], image["height"]) for image in page.images] == [("640", "427")] * 4


def spoiled(value, key=""):
    """The dict with a hostile end to every text that users can choose."""
    if isinstance(value, dict):
        return {k: spoiled(v, k) for k, v in value.items()}
    if isinstance(value, list):
        return [spoiled(v, key) for v in value]
    return value + HOSTILE if isinstance(value, str) and key not in ("prompt", "metric", "metrics") else value


def test_hostile_names_change_no_tag_and_no_line(tmp_path):
    bad = [Picture(p.group + HOSTILE, p.caption + HOSTILE, [(n + HOSTILE, i) for n, i in p.panels]) for p in pictures()]
    _, page, markdown = written(sample(), tmp_path, pictures())
    bad_html, bad_page, bad_markdown = written(spoiled(sample()), tmp_path, bad)
    assert bad_page.tags == page.tags and all(link.startswith(("data:", "#")) for link in bad_page.links)
    assert escape(HOSTILE.replace("\udcff", "\\udcff")) in bad_html and "犬" in bad_html and "犬" in bad_markdown
    assert json.loads((tmp_path / "report.json").read_text()) == spoiled(sample())

    lines, bad_lines = ([x for x in text.splitlines() if not x.startswith("    ")] for text in (markdown, bad_markdown))  # no command
    bars = [[len(re.findall(r"(?<!\\)(?:\\\\)*\|", x)) for x in some] for some in (lines, bad_lines)]
    assert bars[0] == bars[1] and max(bars[0]) > 3
    assert not any("<" in x or re.search(r"(?<!\\)(?:\\\\)*`", x) for x in bad_lines)


def test_hostile_names_of_keys(tmp_path):
    result = sample()
    for key in ("metrics", "errors", "speed", "provenance", "dataset"):
        part = {"truth": {}, **result[key]} if key == "errors" else result[key]
        inner = {"errors": "truth", "speed": "stages"}.get(key)
        (part[inner] if inner else part)[f"<b>|{key}"] = 1.5
    result["ablation"]["modes"]["<b>|mode"] = {"<b>|metric": 1.5}
    html, page, _ = written(result, tmp_path)
    assert "<b>|" not in html and sum("<b>|" in word for word in page.words) == 7


def test_pictures_are_left_out_where_the_page_would_grow_too_large(tmp_path, monkeypatch):
    whole = len(written(sample(), tmp_path, pictures(6))[0])
    assert "left out, so that" not in (tmp_path / "report/index.html").read_text()
    monkeypatch.setattr(report, "LIMIT", whole // 2)
    html, page, _ = written(sample(), tmp_path, pictures(6))
    shown = sorted({re.match(r"\w+: (\d)", image["alt"])[1] for image in page.images})
    assert shown == list("012345")[: len(shown)] and 1 <= len(shown) < 4 and len(html.encode()) <= whole // 2
    assert f"{6 - len(shown)} of 6 pictures were left out" in html
    monkeypatch.setattr(report, "LIMIT", 1000)
    html, page, _ = written(sample(), tmp_path, pictures(2))
    assert not page.images and "2 of 2 pictures were left out" in html


def test_the_dict_is_not_changed(tmp_path):
    result = sample()
    before = copy.deepcopy(result)
    written(result, tmp_path)
    assert result == before


@pytest.mark.parametrize("counts", [[0] * 20, [0] * 19 + [1], [10] * 20, [0] * 19 + [999_999]])
def test_every_histogram_fits_its_axes(tmp_path, counts):
    html, *_ = written({**sample(), "histogram": {"edges": [i / 20 for i in range(21)], "counts": counts}}, tmp_path)
    bars = [tuple(map(float, bar)) for bar in re.findall(r'<rect x="(.*?)" y="(.*?)" width="(.*?)" height="(.*?)"', html)]
    assert len(bars) == 20 and all(12 <= y <= 204 and h >= 0 and x >= 50 and x + w <= 350 for x, y, w, h in bars)
    assert max(h for *_, h in bars) > 90 or max(counts) < 2  # a page wide open would say nothing


# ---- the page in a browser ----


def browse(page: Path, tmp_path: Path, *options: str) -> str:
    """What a headless browser says to `options`."""
    always = "--headless --no-sandbox --disable-gpu --disable-background-networking --hide-scrollbars --virtual-time-budget=3000".split()
    command = [BROWSER, *always, f"--user-data-dir={tmp_path / 'browser'}", *options, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
@pytest.mark.parametrize("result", [sample(), sample("point"), sample("detector"), BARE, spoiled(sample())], ids=range(5))
def test_the_page_fits_a_desk_and_a_phone(tmp_path, result):
    """A page of ours holds the report in frames of both widths (as srcdoc, so that it may look inside) and writes down what it sees."""
    html, page, _ = written(result, tmp_path, pictures(2))
    see = """onload = () => { document.body.innerHTML = [...document.querySelectorAll("iframe")].map(frame => {
      const d = frame.contentDocument, root = d.documentElement
      d.querySelectorAll("details").forEach(x => x.open = true)
      return [root.clientWidth, root.scrollWidth, [...d.images].filter(i => i.naturalWidth).length, d.querySelectorAll("section").length]
    }).join(" ") }"""
    frames = "".join(f'<iframe width="{w}" height="9000" style="border:0" srcdoc="{escape(html)}"></iframe>' for w in (1280, 390))
    (tmp_path / "wrapper.html").write_text(f"<!doctype html><meta charset=utf-8><script>{see}</script>{frames}", "utf-8")
    seen = browse(tmp_path / "wrapper.html", tmp_path, "--window-size=1700,9000", "--dump-dom")
    sections = len(headings(html))
    assert re.search("<body>(.*?)</body>", seen, re.S)[1] == " ".join(f"{w},{w},4,{sections}" for w in (1280, 390)), page.words[:3]


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
def test_the_page_can_be_seen_by_day_and_by_night(tmp_path):
    written(sample(), tmp_path, pictures(2))
    light = []
    for scheme in (0, 1):  # dark, light
        shot = tmp_path / f"{scheme}.png"
        options = [f"--blink-settings=preferredColorScheme={scheme}", "--window-size=1280,2000", f"--screenshot={shot}"]
        browse(tmp_path / "report/index.html", tmp_path, *options)
        grey = np.asarray(PILImage.open(shot).convert("L"), float)
        assert grey.shape == (2000, 1280) and grey.std() > 10  # not blank
        light.append(grey.mean())
    assert light[0] < 60 and light[1] > 200


# ---- published figures ----


def test_published_figures_are_those_of_the_papers():
    found = {(f.model, f.dataset, f.prompt, f.detector, f.metric, f.source): f.value for f in published.FIGURES}
    assert len(found) == len(published.FIGURES)
    depth, evit, readme = published.DEPTH_PAPER, published.EVIT_PAPER, published.EVIT_README
    known = {
        ("EfficientViT-SAM-L2-Depth", "coco", "box", "", "miou", f"{depth}, Table 3"): 76.6,
        ("EfficientViT-SAM-L2-Depth", "coco", "box", "", "miou_small", f"{depth}, Table 3"): 72.2,
        ("EfficientViT-SAM-L2-Depth", "lvis", "box", "", "miou_large", f"{depth}, Table 3"): 88.6,
        ("EfficientViT-SAM-L2", "coco", "box", "", "miou", f"{depth}, Table 3"): 75.6,
        ("EfficientViT-SAM-L2-Depth", "coco", "point", "", "miou_5", f"{depth}, Table 2"): 75.5,
        ("EfficientViT-SAM-L2-Depth", "lvis", "point", "", "miou_1", f"{depth}, Table 2"): 56.3,
        ("EfficientViT-SAM-L2", "lvis", "point", "", "miou_3", f"{depth}, Table 2"): 64.9,
        ("EfficientViT-SAM-XL1", "coco", "box", "", "miou_large", f"{depth}, Table 3"): 83.7,
        ("EfficientViT-SAM-XL1", "coco", "box", "", "miou_large", f"{evit}, Table 3"): 83.8,
        ("EfficientViT-SAM-L2", "coco", "detector", "vitdet", "ap", f"{evit}, Table 4"): 46.6,
        ("EfficientViT-SAM-L1", "lvis", "detector", "vitdet", "ap_small", f"{evit}, Table 4"): 29.1,
        ("SAM-ViT-H", "coco", "detector", "groundingdino", "ap_large", f"{evit}, Table 5"): 64.4,
        ("EfficientViT-SAM-XL1", "coco", "detector", "yolov8", "ap_small", f"{evit}, Table 5"): 26.0,
        ("EfficientViT-SAM-L0", "lvis", "detector", "vitdet", "ap", readme): 41.8,
        ("EfficientViT-SAM-XL1", "coco", "box", "", "miou_large", readme): 83.748,
        ("EfficientViT-SAM-XL1", "lvis", "point", "", "miou_1", readme): 56.624,
    }
    assert known.items() <= found.items()
    assert all(10 < f.value < 100 and f.metric in published.METRICS[f.prompt] for f in published.FIGURES)
    assert all((f.detector != "") == (f.prompt == "detector") for f in published.FIGURES)


def test_published_rows_are_grouped_by_model_and_source():
    first, *_, last = published.rows("coco", "box")
    table = "Depth-Aware EfficientViT-SAM (arXiv 2602.11804), Table 3"
    assert first == {
        "model": "SAM-ViT-H",
        "source": table,
        "values": {"miou": 77.4, "miou_small": 72.3, "miou_medium": 80.4, "miou_large": 81.8},
    }
    assert last["values"]["miou"] == 79.927 and last["source"] == "EfficientViT-SAM's README"
    assert [r["model"] for r in published.rows("coco", "detector", "yolov8")] == ["SAM-ViT-H", "EfficientViT-SAM-XL1"]
    assert "ap_medium" not in next(r for r in published.rows("coco", "detector", "vitdet") if r["model"] == "EdgeSAM")["values"]
    assert published.rows("coco", "detector") == published.rows("lvis", "detector", "yolov8") == published.rows("other", "box") == []
