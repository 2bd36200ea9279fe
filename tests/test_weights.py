"""Fetching weights from a small server on this machine: whole files arrive, everything else leaves nothing behind."""

import hashlib
import time
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import ClassVar

import pytest
import torch
from filelock import FileLock

from depthseg import catalog, cli, weights
from depthseg.catalog import Row
from depthseg.errors import MISSING_PIECE, DepthsegError

BODY = bytes(range(256)) * 9000  # more than one chunk


class Handler(BaseHTTPRequestHandler):
    """Gives BODY, as its file's name says: cut off, unsized, absent, a web page; resumes what is asked for by range."""

    asked: ClassVar[list[str | None]] = []
    mark = "one"

    def do_GET(self) -> None:
        begin = 0
        wanted = self.headers.get("Range")
        self.asked.append(wanted)
        if self.path == "/absent.pt":
            self.send_error(404)
            return
        if wanted and self.headers.get("If-Range") == self.mark and self.path != "/rigid.pt":
            begin = int(wanted.removeprefix("bytes=").removesuffix("-"))
        if begin == len(BODY):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(BODY)}")
            self.end_headers()
            return
        self.send_response(206 if begin else 200)
        if self.path != "/unsized.pt":
            self.send_header("Content-Length", str(len(BODY) - begin))
        if self.path == "/page.pt":
            self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("ETag", self.mark)
        self.end_headers()
        self.wfile.write(BODY[begin:1_500_000] if self.path in ("/cut.pt", "/rigid.pt") and not wanted else BODY[begin:])

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


@pytest.mark.parametrize(("name", "reason"), [("absent.pt", "404"), ("page.pt", "a web page came")])
def test_what_is_no_file_leaves_nothing(server, weights_cache, name, reason):
    with pytest.raises(DepthsegError, match=reason) as error:
        weights.pull(row(server, name), "thing")
    assert error.value.code == MISSING_PIECE and "--detector nano" in error.value.hint and "--weights" not in error.value.hint
    assert [p for p in weights_cache.rglob("*") if p.is_file()] == []


@pytest.mark.parametrize("name", ["cut.pt", "rigid.pt"])
def test_a_download_that_broke_off_is_continued(server, weights_cache, name):
    """Also by a server that cannot resume and begins again."""
    entry = row(server, name)
    with pytest.raises(DepthsegError, match="1500000 of 2304000 bytes; started again"):
        weights.pull(entry, "thing")
    assert weights.find(entry) is None and weights.verify(entry) == "half fetched" and weights.state(entry) == "--pull"
    told = []
    path = weights.pull(entry, "thing", lambda done, total: told.append((done, total)))
    assert path.read_bytes() == BODY and Handler.asked[-1] == "bytes=1500000-" and told[-1] == (len(BODY), len(BODY))
    assert (told[0][0] > 1_500_000) == (name == "cut.pt")
    assert sorted(p.name for p in weights_cache.rglob("*") if p.is_file()) == sorted([name, "pulled.json"])
    assert weights.verify(entry) == "sound"


def test_a_file_that_changed_in_between_is_fetched_anew(server, weights_cache, monkeypatch):
    entry = row(server, "cut.pt")
    with pytest.raises(DepthsegError):
        weights.pull(entry, "thing")
    monkeypatch.setattr(Handler, "mark", "two")
    assert weights.pull(entry, "thing").read_bytes() == BODY


def test_what_comes_is_compared_with_what_its_publisher_says(server, weights_cache):
    entry = row(server, "whole.pt")
    with pytest.raises(DepthsegError, match="sha256"):
        weights.pull(replace(entry, sha256="0" * 64), "thing")
    assert [p for p in weights_cache.rglob("*.pt") if p.is_file()] == [] and weights.partial(entry) is None
    entry = replace(entry, sha256=hashlib.sha256(BODY).hexdigest())
    path = weights.pull(entry, "thing")
    assert weights.verify(entry) == "sound"
    path.write_bytes(BODY[:-1] + b"?")
    assert weights.verify(entry) == weights.verify(replace(entry, sha256=None)) == "damaged"
    (weights_cache / weights.NOTES).unlink()
    assert weights.verify(replace(entry, sha256=None)) == "no reference"
    assert weights.remove(entry, "thing") == len(BODY) and weights.verify(entry) == "missing" and weights.remove(entry, "thing") == 0


def test_an_interrupted_download_goes_on(server, weights_cache):
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    entry = row(server, "whole.pt")
    with pytest.raises(KeyboardInterrupt):
        weights.pull(entry, "thing", stop)
    assert weights.find(entry) is None and weights.partial(entry)
    assert weights.pull(entry, "thing").read_bytes() == BODY and Handler.asked[-1].startswith("bytes=")


def test_two_processes_do_not_write_one_file(server, weights_cache):
    entry = row(server, "whole.pt")
    (weights_cache / "sub").mkdir(parents=True)
    with FileLock(weights_cache / "sub" / ".whole.pt.lock"), pytest.raises(DepthsegError, match="another process"):
        weights.pull(entry, "thing")


def test_embedded_weights_are_sound_and_stay():
    for table in catalog.TABLES.values():
        for name, entry in table.items():
            if entry.file and entry.file.startswith("nano/"):
                assert weights.verify(entry) == "sound", f"{name}: renew weights/SHA256SUMS"
                with pytest.raises(DepthsegError, match="part of the package"):
                    weights.remove(entry, name)


def test_a_repository_of_the_hub_is_compared_by_the_names_of_its_blobs(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--someone--some"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    (snapshot / "config.json").write_text("{}")
    blob = repository / "blobs" / hashlib.sha256(BODY).hexdigest()
    blob.write_bytes(BODY)
    (snapshot / "model.safetensors").symlink_to(f"../../blobs/{blob.name}")
    entry = Row("", hub="someone/some", role="detector")
    assert weights.verify(entry) == "sound" and weights.state(entry) == "here"
    blob.write_bytes(BODY[1:])
    assert weights.verify(entry) == "damaged: model.safetensors"
    assert weights.remove(entry, "some") > 0 and weights.verify(entry) == "missing"


def test_a_pinned_repository_is_found_by_its_commit(tmp_path, monkeypatch):
    """The hub's client writes no reference for a commit, unlike for a branch."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--someone--some" / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    for name in weights.HUB_NEEDED:
        (snapshot / name).write_text("{}")
    assert weights.find(Row("", hub="someone/some", revision="a" * 40, role="detector")) == snapshot
    assert weights.find(Row("", hub="someone/some", revision="b" * 40, role="detector")) is None


@pytest.mark.parametrize("text", ["[1]", "null", '{"a": 1}', '{"sub/whole.pt": {}}', "no json"])
def test_a_strange_table_of_hashes_is_no_reference(server, weights_cache, text):
    entry = row(server, "whole.pt")
    weights_cache.mkdir(parents=True)
    (weights_cache / weights.NOTES).write_text(text)
    weights.pull(entry, "thing")
    assert weights.verify(entry) == "sound"


def test_what_is_whole_already_is_not_fetched_again(server, weights_cache):
    entry = row(server, "whole.pt")
    (weights_cache / "sub").mkdir(parents=True)
    (weights_cache / "sub" / ".whole.pt.part").write_bytes(BODY)  # stopped just before it got its name
    (weights_cache / "sub" / ".whole.pt.version").write_text(Handler.mark)
    told = []
    assert weights.pull(entry, "thing", lambda *done: told.append(done)).read_bytes() == BODY and not told


def test_a_cache_that_cannot_be_written(server, monkeypatch):
    monkeypatch.setenv("DEPTHSEG_WEIGHTS", "/dev/null/x")
    with pytest.raises(DepthsegError, match="cannot write") as error:
        weights.pull(row(server, "whole.pt"), "thing")
    assert "DEPTHSEG_WEIGHTS" in error.value.hint


# ---- converting ----


def test_a_plain_checkpoint_becomes_a_depth_aware_start(tmp_path):
    from depthseg.models.depthseg import build

    torch.manual_seed(0)
    plain = build("nano", depth=False)
    torch.save(plain.state_dict(), tmp_path / "plain.pt")
    about = weights.convert(tmp_path / "plain.pt", tmp_path / "sub" / "start.safetensors", "nano-depth")
    network = catalog.load("nano-depth", tmp_path / "sub" / "start.safetensors")
    assert network.alpha == 0
    for a, b in zip(network.image_encoder.state_dict().values(), network.depth_encoder.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    for k, v in plain.state_dict().items():
        assert torch.equal(v, network.state_dict()[k]), k
    card = (tmp_path / "sub" / "start.md").read_text()
    assert "a start for training" in card and weights.sha256(tmp_path / "plain.pt") in card and about["Model"] == "nano-depth"
    weights.convert(tmp_path / "plain.pt", tmp_path / "half.safetensors", "nano", half=True)
    assert (tmp_path / "half.safetensors").stat().st_size < 0.6 * (tmp_path / "plain.pt").stat().st_size
    with pytest.raises(DepthsegError, match="does not fit"):
        weights.convert(tmp_path / "plain.pt", tmp_path / "x.safetensors", "efficientvit-sam-l0")
    with pytest.raises(DepthsegError, match="keeps the format"):
        weights.convert(tmp_path / "plain.pt", tmp_path / "x.safetensors", "yolov8n")
    assert not (tmp_path / "x.safetensors").exists()


def test_the_mean_of_checkpoints(tmp_path, run):
    from depthseg.models.depthseg import build

    states = []
    for seed in range(3):
        torch.manual_seed(seed)
        states.append(build("nano", depth=False).state_dict())
        torch.save(states[-1], tmp_path / f"{seed}.pt")
    files = [tmp_path / f"{seed}.pt" for seed in range(3)]
    code, out, err = run("weights", "mean", *files, "-o", tmp_path / "mean.safetensors", "--model", "nano")
    assert code == 0 and out == f"{tmp_path / 'mean.safetensors'}\n" and "3 checkpoints" in err
    network = catalog.load("nano", tmp_path / "mean.safetensors")
    for key, value in network.state_dict().items():
        expected = torch.stack([state[key].double() for state in states]).mean(0).to(value.dtype)
        assert torch.equal(value, expected), key
    card = (tmp_path / "mean.md").read_text()
    assert all(weights.sha256(file) in card for file in files)
    torch.save(build("nano", depth=True).state_dict(), tmp_path / "other.pt")
    for given, model, expected_code, said in (
        (files[:1], "nano", 2, "the mean of one checkpoint"),
        ([files[0], tmp_path / "other.pt"], "nano", 2, "does not fit"),
        ([files[0], tmp_path / "none.pt"], "nano", MISSING_PIECE, "none.pt"),
        (files, "yolov8n", 2, "no segmentation model"),
    ):
        code, _, err = run("weights", "mean", *given, "-o", tmp_path / "x.safetensors", "--model", model)
        assert code == expected_code and said in err, err
    assert not (tmp_path / "x.safetensors").exists() and not (tmp_path / "x.md").exists()


# ---- the command ----


def test_the_commands(server, weights_cache, monkeypatch, capsys):
    entry = replace(row(server, "whole.pt"), licence="AGPL-3.0", note="a note")
    monkeypatch.setitem(catalog.DETECTORS, "thing", entry)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*words: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as leaving:
            cli.main(["weights", *words])
        return (leaving.value.code, *capsys.readouterr())

    code, out, _ = run("list")
    assert code == 0 and all(name in out for table in catalog.TABLES.values() for name, e in table.items() if e.file or e.hub)
    assert run("path", "thing")[0] == MISSING_PIECE
    code, out, err = run("pull", "thing")
    assert code == 0 and not out and "AGPL-3.0" in err and "a note" in err
    code, out, _ = run("path", "thing")
    assert (code, out) == (0, f"{weights_cache / 'sub' / 'whole.pt'}\n")
    assert "thing" in run("list", "--here")[1] and "sound" in run("verify", "thing")[1]
    Path(out.strip()).write_bytes(b"x")
    code, _, err = run("verify")
    assert code == MISSING_PIECE and "not sound: thing" in err
    assert run("rm", "thing")[0] == 0 and run("path", "thing")[0] == MISSING_PIECE
    code, _, err = run("pull", "thin")
    assert code == 2 and "Did you mean thing" in err


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

    def download(repo: str, file: str, revision: str | None) -> str:
        asked.append((repo, file))
        return str(blob)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setenv("HF_ENDPOINT", server)
    entry = catalog.MODELS["efficientvit-sam-l1"]
    path = weights.pull(entry, "efficientvit-sam-l1")
    assert asked == [(entry.hub, "efficientvit_sam_l1.pt")]
    assert path == weights_cache / "efficientvit_sam_l1.pt" == catalog.find(entry) and path.read_bytes() == b"weights"
    assert sorted(p.name for p in weights_cache.iterdir()) == [path.name, weights.NOTES] and weights.locate(entry, "thing", False) == path
    assert catalog.find(catalog.MODELS["efficientvit-sam-l1-depth"]) == path


@pytest.mark.parametrize("whole", [True, False])
def test_a_model_of_the_hub_stays_in_the_hubs_cache(server, tmp_path, monkeypatch, whole):
    import huggingface_hub

    blob = tmp_path / hashlib.sha256(BODY).hexdigest()
    blob.write_bytes(BODY if whole else BODY[1:])
    link = tmp_path / "owner" / "some" / "model.safetensors"
    link.parent.mkdir(parents=True)
    link.symlink_to(blob)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo, revision, allow_patterns: str(tmp_path / repo))
    monkeypatch.setenv("HF_ENDPOINT", server)
    if whole:
        assert weights.pull(Row("", hub="owner/some"), "thing") == tmp_path / "owner/some"
    else:
        with pytest.raises(DepthsegError, match="has another sha256"):
            weights.pull(Row("", hub="owner/some"), "thing")
        assert not link.is_symlink() and not blob.exists()


def test_a_tokenizer_is_fetched_although_the_checkpoint_is_here(weights_cache, monkeypatch):
    """Somebody copied the .pth by hand; the detector cannot read without its tokenizer."""
    weights_cache.mkdir(parents=True)
    (weights_cache / "here.pth").write_bytes(b"x")
    fetched = []
    monkeypatch.setattr(weights, "_snapshot", lambda entry, name, repository, files: fetched.append(repository))
    entry = Row("", {"words": "someone/bert"}, file="here.pth", url="http://127.0.0.1:9/here.pth")
    assert weights.pull(entry, "thing") == weights_cache / "here.pth" and fetched == ["someone/bert"]
    monkeypatch.setattr(weights, "_has_tokenizer", lambda repository: True)
    weights.pull(entry, "thing")
    assert len(fetched) == 1


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
        (catalog.DETECTORS["yolov8m"], ["--detector nano"]),
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
