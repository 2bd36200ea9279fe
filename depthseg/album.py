"""The pictures of a run as pages that open in any browser, offline: thumbnails, filters by class and score, what failed.

Reads the run folder only: its journal, its failures, and the pictures that it wrote. Keys and class names are escaped.
"""

import json
from collections import Counter
from html import escape
from pathlib import Path
from urllib.parse import quote

from PIL import Image as PILImage

from depthseg import formats
from depthseg.errors import DepthsegError
from depthseg.page import CSS

THUMB = 480  # long side of a thumbnail, pixels
PER_PAGE = 200
_OWN = """
.filter{display:flex;flex-wrap:wrap;gap:12px 28px;align-items:center;margin:28px 0;font-size:.9375rem}
.filter label{display:flex;gap:8px;align-items:center}
.filter select{font:inherit;color:inherit;background:var(--panel);border:1px solid var(--line);border-radius:6px;padding:4px 8px}
.album{display:grid;gap:24px;grid-template-columns:repeat(auto-fill,minmax(min(100%,260px),1fr))}
.album figure{margin:0}.album figcaption b{display:block;color:var(--ink);font-weight:500}[hidden]{display:none!important}
"""
_SCRIPT = """
const kind=document.getElementById('kind'),least=document.getElementById('least'),told=document.getElementById('told');
function pick(){let n=0;for(const f of document.querySelectorAll('.album figure')){const found=JSON.parse(f.dataset.found);
const fits=!kind.value&&least.value==0||found.some(([c,s])=>(!kind.value||c===kind.value)&&s>=least.value);f.hidden=!fits;n+=fits}
told.textContent=n+' pictures'}
document.querySelector('.filter').hidden=false;kind.onchange=least.oninput=pick;pick();
"""


def write(run: Path) -> Path:
    """Write `run`/report/index.html, further pages where there are many pictures, and thumbnails; the first page.

    Pictures without an overlay are listed by name. Raises DepthsegError for a folder that holds no run.
    """
    try:
        about = json.loads((run / "run.json").read_bytes())
        plan, counts, state = about["plan"], about["counts"], about["state"]
        lines = _lines(run / "journal.jsonl")
        failures = [json.loads(line) for line in _text(run / "failures.jsonl").splitlines()]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DepthsegError(f"{run} holds no run of `depthseg segment` ({error})", "Give the folder that it wrote.") from error
    lines.sort(key=lambda line: line["key"])
    pages = [lines[start : start + PER_PAGE] for start in range(0, len(lines), PER_PAGE)] or [[]]
    folder = run / "report"
    for number, some in enumerate(pages, 1):
        figures = "".join(_figure(run, folder, line) for line in some)
        kinds = Counter(name for line in some for name, _ in line["found"])
        with formats.atomic(folder / _name(number)) as part:
            page = _page(run.name, plan, counts, state, failures, kinds, figures, number, len(pages))
            part.write_bytes(page.encode(errors="backslashreplace"))  # a file's name need not be valid Unicode
    return folder / "index.html"


def _text(path: Path) -> str:
    return path.read_text("utf-8") if path.exists() else ""


def _lines(journal: Path) -> list[dict]:
    """Key and (class, score) of each mask, for every picture that is done; the last line of a picture counts."""
    out: dict[str, dict] = {}
    with open(journal, "rb") as file:
        for raw in file:
            if not raw.endswith(b"\n"):  # torn by a crash
                break
            line = json.loads(raw)
            out[line["key"]] = {"key": line["key"], "found": [(m["category"], round(m["score"], 3)) for m in line["instances"]]}
    return list(out.values())


def _name(number: int) -> str:
    return "index.html" if number == 1 else f"page-{number}.html"


def _figure(run: Path, folder: Path, line: dict) -> str:
    """One picture with its classes; its thumbnail is made from the overlay."""
    key, found = line["key"], line["found"]
    overlay = run / "overlays" / formats.overlay_name(key)
    inside = ""
    if overlay.is_file():
        small = folder / "thumbnails" / formats.overlay_name(key)
        if not small.exists() or small.stat().st_mtime < overlay.stat().st_mtime:
            with PILImage.open(overlay) as picture, formats.atomic(small) as part:
                picture.thumbnail((THUMB, THUMB), reducing_gap=3)
                picture.save(part, "JPEG", quality=80)
        width, height = PILImage.open(small).size
        paths = small.relative_to(folder), Path("..") / overlay.relative_to(run)
        source, target = (quote(path.as_posix(), errors="surrogateescape") for path in paths)
        inside = (
            f'<a href="{target}"><img src="{source}" width={width} height={height} loading=lazy alt="{escape(key)} with its masks"></a>'
        )
    kinds = ", ".join(f"{name} {n}" if n > 1 else name for name, n in Counter(name for name, _ in found).items()) or "nothing found"
    return f"<figure data-found='{escape(json.dumps(found))}'>{inside}<figcaption><b>{escape(key)}</b>{escape(kinds)}</figcaption></figure>"


def _page(
    title: str, plan: dict, counts: dict, state: str, failures: list[dict], kinds: Counter[str], figures: str, number: int, pages: int
) -> str:
    facts = f"{counts['done']} pictures, {counts['instances']} masks; {plan['model']}, {state}"
    lost = "".join(f"<li>{escape(f['key'])}: {escape(f['reason'])} ({escape(f['stage'])})</li>" for f in failures)
    box = f"<aside class=bad><h2>{len(failures)} pictures failed</h2><ul>{lost}</ul></aside>" if failures else ""
    choices = "".join(f'<option value="{escape(k)}">{escape(k)} ({n})</option>' for k, n in kinds.most_common())
    links = (
        " ".join(f'<a href="{_name(n)}"{" aria-current=page" * (n == number)}>{n}</a>' for n in range(1, pages + 1)) if pages > 1 else ""
    )
    policy = "default-src 'none';img-src 'self' file: data:;style-src 'unsafe-inline';script-src 'unsafe-inline'"
    return f"""<!doctype html>
<html lang=en><meta charset=utf-8><meta name=viewport content="width=device-width,initial-scale=1">
<meta http-equiv=Content-Security-Policy content="{policy}">
<link rel=icon href="data:,"><title>{escape(title)}</title><style>{CSS}{_OWN}</style>
<main><header><h1>{escape(title)}</h1><p>{escape(facts)}</p></header>{box}
<form class=filter hidden><label>Class <select id=kind><option value="">all</option>{choices}</select></label>
<label>Score from <input id=least type=range min=0 max=1 step=0.05 value=0></label><span id=told></span></form>
<nav aria-label=Pages>{links}</nav><div class=album>{figures}</div><nav aria-label=Pages>{links}</nav></main>
<script>{_SCRIPT}</script></html>
"""
