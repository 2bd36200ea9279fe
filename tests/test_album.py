"""The page of a run: what it shows, escapes and leaves alone, and that a browser filters it."""

import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image as PILImage

from depthseg import album, data, masks
from depthseg.errors import DepthsegError
from depthseg.plan import Plan
from depthseg.schema import Image, Masks, Record
from depthseg.sink import Sink

HOSTILE = "a'><script>alert(1)</script>\n&é.png"


@pytest.fixture
def run(tmp_path):
    """A run of three pictures, one with a hostile name and class, one failed."""
    out, names = tmp_path / "run", ["cat.png", HOSTILE.replace("/", "∕"), "broken.png"]
    images = []
    for n, name in enumerate(names, 1):
        path = tmp_path / name
        PILImage.fromarray(np.full((40, 60, 3), 60 * n, np.uint8)).save(path, "PNG")
        images.append(Image(name, n, path, (0, 0)))
    with Sink(out, Plan(), images, {}) as sink:
        for image, kind, score in ((images[0], "cat", 0.9), (images[1], "<b>dog</b>", 0.3)):
            mask = np.zeros((40, 60), bool)
            mask[5:20, 5:30] = True
            rle, one = [masks.encode(mask)], np.ones(1, np.float32)
            found = Masks(rle, masks.boxes(rle), masks.area(rle), one, one, one * score, np.array([1]), {1: kind})
            sink.write(Record(data.read(image), found))
        sink.failed(data.Failure(images[2], "read", "cut off"))
    return out


def test_the_page_shows_and_escapes(run):
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    page = album.write(run)
    text = page.read_text()
    assert page == run / "report" / "index.html" and text.count("<figure") == 2 and text.count("<script>") == 1
    assert "1 pictures failed" in text and "broken.png: cut off (read)" in text and "2 pictures, 2 masks" in text
    assert "<b>dog</b>" not in text and "&lt;b&gt;dog&lt;/b&gt;" in text and "alert(1)</script>" not in text
    assert "http:" not in text and "https:" not in text and len(list((run / "report" / "thumbnails").iterdir())) == 2
    assert all(p.read_bytes() == content for p, content in before.items())
    stamps = {p: p.stat().st_mtime_ns for p in (run / "report" / "thumbnails").iterdir()}
    album.write(run)
    assert stamps == {p: p.stat().st_mtime_ns for p in (run / "report" / "thumbnails").iterdir()}  # made once


def test_many_pictures_are_split_over_pages(run, monkeypatch):
    monkeypatch.setattr(album, "PER_PAGE", 1)
    text = album.write(run).read_text()
    second = (run / "report" / "page-2.html").read_text()
    assert text.count("<figure") == second.count("<figure") == 1 and 'href="page-2.html"' in text and 'href="index.html"' in second


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(DepthsegError, match="holds no run"):
        album.write(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_browser_filters_by_class_and_score(run, tmp_path):
    browser = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
    if not browser:
        pytest.skip("needs a browser")
    page = album.write(run)
    acted = page.with_name("acted.html")  # the page, with somebody who moves the slider and then picks a class
    steps = (
        "least.value=0.5;pick();const one=told.textContent;least.value=0;kind.value='cat';pick();document.title=one+'|'+told.textContent;"
    )
    acted.write_text(page.read_text().replace("</script></html>", f"{steps}</script></html>"))
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--virtual-time-budget=3000"]
    done = subprocess.run(
        [*command, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", acted.as_uri()], capture_output=True, text=True
    )
    assert "<title>1 pictures|1 pictures</title>" in done.stdout, done.stderr[-500:]
