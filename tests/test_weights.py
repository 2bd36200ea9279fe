"""Fetching weights from a small server on this machine: whole files arrive, everything else leaves nothing behind."""

import hashlib
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from depthseg import catalog, weights
from depthseg.catalog import Row
from depthseg.errors import MISSING_PIECE, DepthsegError

BODY = bytes(range(256)) * 9000  # more than one chunk


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path == "/absent.pt":
            self.send_error(404)
            return
        self.send_response(200)
        if self.path != "/unsized.pt":
            self.send_header("Content-Length", str(len(BODY)))
        self.end_headers()
        self.wfile.write(BODY[:1_500_000] if self.path == "/cut.pt" else BODY)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("no_proxy", "*")
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()


def row(server: str, name: str) -> Row:
    return Row("depthseg.detect.yolo:Yolo", file=f"sub/{name}", url=f"{server}/{name}", role="detector")


@pytest.mark.parametrize("name", ["whole.pt", "unsized.pt"])
def test_a_file_is_fetched_once(server, weights_cache, name):
    told = []
    entry = row(server, name)
    assert weights.state(entry) == "--pull"
    path = weights.pull(entry, "thing", lambda done, total: told.append((done, total)))
    assert path == weights_cache / "sub" / name == catalog.find(entry)
    assert weights.sha256(path) == hashlib.sha256(BODY).hexdigest() and weights.state(entry) == "here"
    assert told[-1] == (len(BODY), 0 if name == "unsized.pt" else len(BODY)) and len(told) > 1
    (weights_cache / "plain").touch()
    assert path.stat().st_mode == (weights_cache / "plain").stat().st_mode  # others may read it as far as the umask says
    path.write_bytes(b"mine")
    assert weights.pull(entry, "thing").read_bytes() == b"mine"


@pytest.mark.parametrize("name, reason", [("cut.pt", "1500000 of 2304000 bytes"), ("absent.pt", "404")])
def test_nothing_half_written_remains(server, weights_cache, name, reason):
    with pytest.raises(DepthsegError, match=reason) as error:
        weights.pull(row(server, name), "thing")
    assert error.value.code == MISSING_PIECE and "--boxes FILE" in error.value.hint and "--weights" not in error.value.hint
    assert [p for p in weights_cache.rglob("*") if p.is_file()] == []


def test_an_interrupted_download_leaves_nothing(server, weights_cache):
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        weights.pull(row(server, "whole.pt"), "thing", stop)
    assert [p for p in weights_cache.rglob("*") if p.is_file()] == []


@pytest.mark.parametrize("source", ["url", "hub"])
def test_without_a_network_it_fails_at_once(monkeypatch, source):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # the discard port: nobody listens
    entry = Row("", file="x.pt", url="http://127.0.0.1:9/x.pt") if source == "url" else Row("", file="x.pt", hub="someone/some")
    start = time.monotonic()
    with pytest.raises(DepthsegError, match="could not be fetched") as error:
        weights.pull(entry, "thing")
    assert error.value.code == MISSING_PIECE and time.monotonic() - start < 2 + weights.PROBE_SECONDS


def test_the_probe_goes_to_the_proxy_where_there_is_one(server, monkeypatch):
    monkeypatch.delenv("no_proxy")
    monkeypatch.setenv("https_proxy", server)
    weights._probe("https://nowhere.invalid/x.pt", Row(""), "thing")
    monkeypatch.setenv("no_proxy", "*")
    with pytest.raises(DepthsegError):
        weights._probe("https://nowhere.invalid/x.pt", Row(""), "thing")


def test_a_file_of_the_hub_lands_in_our_cache(server, tmp_path, weights_cache, monkeypatch):
    import huggingface_hub

    blob = tmp_path / "blob"
    blob.write_bytes(b"weights")
    asked = []

    def download(repo: str, file: str) -> str:
        asked.append((repo, file))
        return str(blob)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setenv("HF_ENDPOINT", server)
    entry = catalog.MODELS["efficientvit-sam-l0"]
    path = weights.pull(entry, "efficientvit-sam-l0")
    assert asked == [(entry.hub, "efficientvit_sam_l0.pt")]
    assert path == weights_cache / "efficientvit_sam_l0.pt" == catalog.find(entry) and path.read_bytes() == b"weights"
    assert [p.name for p in weights_cache.iterdir()] == [path.name] and weights.locate(entry, "thing", False) == path
    assert catalog.find(catalog.MODELS["efficientvit-sam-l0-depth"]) == path


def test_a_model_of_the_hub_stays_in_the_hubs_cache(server, tmp_path, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo, allow_patterns: str(tmp_path / repo))
    monkeypatch.setenv("HF_ENDPOINT", server)
    assert weights.pull(Row("", hub="owner/some"), "thing") == tmp_path / "owner/some"


def test_offline_mode_is_respected(server, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", server)
    with pytest.raises(DepthsegError, match="someone/some") as error:  # HF_HUB_OFFLINE=1 in conftest
        weights.pull(Row("", file="x.pt", hub="someone/some"), "thing")
    assert error.value.code == MISSING_PIECE


def test_what_nobody_publishes_cannot_be_fetched():
    with pytest.raises(DepthsegError, match="nobody publishes") as error:
        weights.pull(Row("", file="own.safetensors"), "thing")
    assert error.value.code == MISSING_PIECE


def test_state_in_a_word(tmp_path, weights_cache, monkeypatch):
    assert weights.state(Row("")) == "-" and weights.state(Row("", file="own.pt")) == "missing"
    assert weights.state(Row("", hub="owner/none")) == "--pull"
    monkeypatch.setattr(catalog, "embedded", lambda: tmp_path)
    Path(tmp_path, "own.pt").write_bytes(b"x")
    assert weights.state(Row("", file="own.pt")) == "embedded"


@pytest.mark.parametrize(
    ("entry", "ways"),
    [
        (catalog.MODELS["efficientvit-sam-l0"], ["--weights PATH"]),
        (catalog.DETECTORS["yolov8m"], ["--boxes FILE", "--detector nano or grid"]),
        (Row("", file="x", role="depth"), ["--depth FOLDER", "--depth nano"]),
    ],
)
def test_the_ways_out_fit_the_role(entry, ways):
    with pytest.raises(DepthsegError, match="not on this machine") as error:
        weights.locate(entry, "thing", False)
    assert error.value.code == MISSING_PIECE and all(way in error.value.hint for way in [*ways, "--pull"])
    assert all(row.role == role for role, rows in (("depth", catalog.DEPTHS), ("detector", catalog.DETECTORS)) for row in rows.values())


def test_equal_terms_are_said_once():
    rows = {"model a": Row("", licence="GPL"), "depth b": Row("", licence="GPL", note="slow"), "c": Row("", licence="Apache-2.0")}
    assert catalog.terms(rows) == ["model a, depth b: licence GPL", "depth b: slow"]
