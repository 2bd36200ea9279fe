"""Weight files on this machine: where they lie, their hash, and fetching what is missing.

The only module that uses a network, and only inside `pull`. Knows file names and addresses, no networks of neurons.
"""

import contextlib
import hashlib
import http.client
import json
import os
import shutil
import socket
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from filelock import FileLock, Timeout

from depthseg import catalog
from depthseg.errors import DepthsegError

HUB = "https://huggingface.co"
PROBE_SECONDS = 2.0  # without a network the hub's own retries take from 23 s to six minutes
READ_SECONDS = 60.0  # silence after which a download is given up
HUB_NEEDED = ["config.json", "model.safetensors"]  # without these a repository's folder is no model
TOKENIZER = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"]
HUB_FILES = [*HUB_NEEDED, "preprocessor_config.json", *TOKENIZER]
CHUNK = 1 << 20
NOTES = "pulled.json"  # in the cache: hash, size and source of each pulled file


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def state(entry: catalog.Row) -> str:
    """Where this row's weights are, in a word: embedded, here, --pull (they can be fetched), missing, or - (it has none)."""
    if entry.file is None and entry.hub is None:
        return "-"
    if path := catalog.find(entry):
        return "embedded" if path.is_relative_to(catalog.embedded()) else "here"
    if find(entry):
        return "here"
    return "--pull" if entry.hub or entry.url else "missing"


def hub_folder(hub: str | None, revision: str | None = None) -> Path | None:
    """The folder of a Hugging Face repository on this machine, if it holds a whole model. Asks no network."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    if hub is None:
        return None
    try:
        found = [try_to_load_from_cache(hub, name, revision=revision) for name in HUB_NEEDED]
    except HFValidationError:  # a path, or no name at all
        return None
    return Path(found[0]).parent if all(isinstance(f, str) and Path(f).is_file() for f in found) else None


def find(entry: catalog.Row) -> Path | None:
    """Where this row's file lies, or the folder of its Hugging Face repository; None if it is not here. Asks no network."""
    return catalog.find(entry) if entry.file else hub_folder(entry.hub, entry.revision)


def locate(entry: catalog.Row, name: str, fetch: bool, progress: Callable[[int, int], None] | None = None) -> Path:
    """Where the weights of this row are, fetched first if they are not here and that is allowed; else an error."""
    if fetch:
        return pull(entry, name, progress)
    if path := find(entry):
        return path
    raise catalog.missing(f"the weights of {name} ({entry.file or entry.hub}) are not on this machine", entry.role)


def pull(entry: catalog.Row, name: str, progress: Callable[[int, int], None] | None = None) -> Path:
    """Fetch the weights of this row unless they are here: the path of their file, or of the model's folder in the hub's cache.

    name: the row's name, for messages. progress: told (bytes done, bytes in all, 0 if unknown) of a file from an address.
    A download that broke off is continued. What came is compared with what its publisher names, and its hash is written down.
    Raises DepthsegError with code MISSING_PIECE; a file appears under its name only when it is whole.
    """
    words = entry.args.get("words")  # a detector that reads, with a tokenizer of its own
    if words and not _has_tokenizer(words):
        _snapshot(entry, name, words, TOKENIZER + ["config.json"])
    if path := find(entry):
        return path
    if entry.hub:
        return _from_hub(entry, name)
    if entry.url and entry.file:
        target = catalog.cache() / entry.file
        _download(entry, target, name, progress)
        _note(entry, target, entry.url)
        return target
    raise catalog.missing(f"the weights of {name} cannot be fetched: nobody publishes them", entry.role)


def _from_hub(entry: catalog.Row, name: str) -> Path:
    import huggingface_hub as hub

    assert entry.hub
    if entry.file is None:
        return _snapshot(entry, name, entry.hub, HUB_FILES)
    _probe(os.environ.get("HF_ENDPOINT") or HUB, entry, name)
    try:
        got = Path(hub.hf_hub_download(entry.hub, entry.inside or entry.file, revision=entry.revision))
    except Exception as error:  # its HTTP client raises types of its own
        raise _no(entry, name, f"{entry.hub} on the hub: {_first_line(error)}") from error
    _compare(entry, name, got.resolve(), entry.sha256 or _hubs_hash(got))
    target = catalog.cache() / entry.file
    with _complete(target) as part:
        try:
            os.link(got.resolve(), part)
        except OSError:  # another file system
            shutil.copyfile(got, part)
    _note(entry, target, f"{entry.hub}/{entry.inside or entry.file}")
    return target


def _snapshot(entry: catalog.Row, name: str, repository: str, files: list[str]) -> Path:
    import huggingface_hub as hub

    _probe(os.environ.get("HF_ENDPOINT") or HUB, entry, name)
    try:
        folder = Path(hub.snapshot_download(repository, revision=entry.revision, allow_patterns=files))
    except Exception as error:  # its HTTP client raises types of its own
        raise _no(entry, name, f"{repository} on the hub: {_first_line(error)}") from error
    if damaged := _damaged(folder, entry if repository == entry.hub else None)[0]:
        for file in damaged:
            file.resolve().unlink()
            file.unlink(missing_ok=True)
        raise _no(entry, name, f"{repository} on the hub: {damaged[0].name} has another sha256 than it should")
    return folder


def _has_tokenizer(repository: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return all(isinstance(try_to_load_from_cache(repository, file), str) for file in ("config.json", "tokenizer_config.json"))


def _damaged(folder: Path, entry: catalog.Row | None) -> tuple[list[Path], int]:
    """The files of a snapshot that differ from the row's or the hub's hash of them, and how many have one (small files do not)."""
    own = {HUB_NEEDED[1]: entry.sha256} if entry else {}
    known = [(file, expected) for file in sorted(folder.iterdir()) if (expected := own.get(file.name) or _hubs_hash(file))]
    return [file for file, expected in known if sha256(file) != expected], len(known)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _hubs_hash(file: Path) -> str | None:
    """What the hub says the sha256 of a large file in its cache is: the name of the entry that the file in a snapshot links to."""
    name = os.readlink(file).replace("\\", "/").rpartition("/")[2] if file.is_symlink() else ""
    return name if len(name) == 64 and set(name) <= set("0123456789abcdef") else None  # small files carry a git hash of 40


def _compare(entry: catalog.Row, name: str, file: Path, expected: str | None) -> None:
    """Refuse, and remove, a file that is not what its publisher says."""
    if expected and (found := sha256(file)) != expected:
        file.unlink()
        raise _no(entry, name, f"{entry.url or entry.hub}: what came has the sha256 {found[:12]}..., not {expected[:12]}...")


def _download(entry: catalog.Row, target: Path, name: str, progress: Callable[[int, int], None] | None) -> None:
    """Fetch `entry.url`, going on where an earlier attempt broke off if the server can, and if its file is still the same one."""
    assert entry.url
    _probe(entry.url, entry, name)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DepthsegError(f"cannot write to {target.parent} ({error.strerror})", "Set DEPTHSEG_WEIGHTS to another folder.") from None
    part = target.with_name(f".{target.name}.part")
    version = part.with_suffix(".version")  # the server's mark of the file that `part` is the beginning of
    lock = FileLock(part.with_suffix(".lock"), timeout=0)
    try:
        with lock:
            try:
                _resume(entry, name, part, version, progress)
                _compare(entry, name, part, entry.sha256)
                part.replace(target)
                version.unlink(missing_ok=True)
            finally:  # while it is held, so that nobody else's is deleted
                with contextlib.suppress(OSError):
                    Path(lock.lock_file).unlink()
    except Timeout:
        raise _no(entry, name, f"{entry.url}: another process is fetching it") from None


def _resume(entry: catalog.Row, name: str, part: Path, version: Path, progress: Callable[[int, int], None] | None) -> None:
    """Fetch what `part` lacks of the file at `entry.url`."""
    assert entry.url
    request = urllib.request.Request(entry.url)
    if (held := part.stat().st_size if part.exists() else 0) and version.exists():
        request.add_header("Range", f"bytes={held}-")
        request.add_header("If-Range", version.read_text())
    try:
        with urllib.request.urlopen(request, timeout=READ_SECONDS) as answer:
            if "text/html" in answer.headers.get("Content-Type", ""):  # a login or error page that calls itself a success
                raise OSError("a web page came instead of the file")
            done = held if answer.status == 206 else 0
            total = done + int(answer.headers.get("Content-Length") or 0) if answer.headers.get("Content-Length") else 0
            version.write_text(answer.headers.get("ETag") or answer.headers.get("Last-Modified") or "")
            if not version.read_text():
                version.unlink()
            with open(part, "ab" if done else "wb") as file:
                while chunk := answer.read(CHUNK):
                    file.write(chunk)
                    done += len(chunk)
                    if progress:
                        progress(done, total)
            if total and done != total:  # read() ends quietly when the connection does
                raise OSError(f"the download ended after {done} of {total} bytes; started again, it goes on there")
    except (OSError, http.client.HTTPException) as error:  # URLError and HTTPError are OSErrors
        if getattr(error, "code", None) == 416:  # nothing is left to ask for
            if held and error.headers.get("Content-Range", "").endswith(f"/{held}"):  # type: ignore[union-attr]
                return  # the whole was here already
            part.unlink(missing_ok=True)
        raise _no(entry, name, f"{entry.url}: {error}") from error


# ---- what is here, and whether it is sound ----


def _notes() -> dict[str, dict]:
    """What was written down about pulled files, by their path below the cache."""
    try:
        table = json.loads((catalog.cache() / NOTES).read_bytes())
    except (OSError, ValueError):
        return {}
    rows = table.items() if isinstance(table, dict) else ()
    return {k: v for k, v in rows if isinstance(v, dict) and isinstance(v.get("sha256"), str)}


def _note(entry: catalog.Row, file: Path, source: str) -> None:
    assert entry.file
    notes = _notes() | {entry.file: {"sha256": sha256(file), "bytes": file.stat().st_size, "source": source}}
    with _complete(catalog.cache() / NOTES) as part:
        part.write_text(json.dumps(notes, indent=1) + "\n")


def partial(entry: catalog.Row) -> Path | None:
    """The beginning of a download that broke off, if there is one."""
    path = catalog.cache() / entry.file if entry.file else None
    part = path and path.with_name(f".{path.name}.part")
    return part if part and part.exists() else None


def verify(entry: catalog.Row) -> str:
    """In a phrase: sound, missing, half fetched, no reference to compare with, or damaged."""
    path = find(entry)
    if path is None:
        return "half fetched" if partial(entry) else "missing"
    if path.is_dir():
        bad, known = _damaged(path, entry)
        return f"damaged: {', '.join(file.name for file in bad)}" if bad else "sound" if known else "no reference"
    sums = catalog.embedded() / "SHA256SUMS"
    table = dict(line.split()[::-1] for line in sums.read_text().splitlines()) if sums.exists() else {}
    embedded = path.is_relative_to(catalog.embedded())
    expected_one = entry.sha256 or (table if embedded else {k: v["sha256"] for k, v in _notes().items()}).get(str(entry.file))
    if expected_one is None:
        return "no reference"
    return "sound" if sha256(path) == expected_one else "damaged"


def remove(entry: catalog.Row, name: str) -> int:
    """Delete what was pulled for this row, whole or half; the bytes that were freed. Embedded weights are refused."""
    path = find(entry)
    if path and not path.is_dir() and path.is_relative_to(catalog.embedded()):
        raise DepthsegError(f"the weights of {name} are part of the package", "Uninstall depthseg to be rid of them.")
    freed = 0
    if entry.hub:
        import huggingface_hub

        try:
            cache = huggingface_hub.scan_cache_dir()
        except huggingface_hub.CacheNotFound:
            cache = huggingface_hub.HFCacheInfo(0, frozenset(), [])
        plan = cache.delete_revisions(*(r.commit_hash for repo in cache.repos if repo.repo_id == entry.hub for r in repo.revisions))
        freed = plan.expected_freed_size
        plan.execute()
    for file in (path, partial(entry)):
        if file and file.is_file():
            freed += file.stat().st_size
            file.unlink()
    return freed


@contextlib.contextmanager
def _complete(target: Path) -> Iterator[Path]:
    """A path beside `target` for a file that takes its name when all went well and vanishes otherwise."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.{os.getpid()}.part")  # not of tempfile, whose files nobody else may read
    part.unlink(missing_ok=True)
    try:
        yield part
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def _probe(url: str, entry: catalog.Row, name: str) -> None:
    """Fail within seconds where there is no network: a short connection to the server, or to the proxy in front of it."""
    parts = urlsplit(url)
    proxy = urllib.request.getproxies().get(parts.scheme)
    if proxy and parts.hostname and not urllib.request.proxy_bypass(parts.hostname):
        parts = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    port = parts.port or (80 if parts.scheme == "http" else 443)
    try:
        socket.create_connection((parts.hostname or "", port), timeout=PROBE_SECONDS).close()
    except OSError as error:
        raise _no(entry, name, f"{parts.hostname} does not answer ({error})") from error


def _no(entry: catalog.Row, name: str, reason: str) -> DepthsegError:
    return catalog.missing(f"the weights of {name} could not be fetched from {reason}", entry.role)


# ---- converting ----


def convert(source: Path, target: Path, name: str, half: bool = False) -> dict[str, str]:
    """Write a checkpoint as safetensors, with a card beside it (`target` with .md); what the card says, by heading.

    name: the row of a segmentation model or of ViTDet that `source` fits. A plain checkpoint for a depth-aware model becomes the
    start of its training: the depth encoder is a copy of the RGB encoder, and alpha is 0. half: matrices and kernels in fp16.
    """
    from depthseg.models import checkpoint

    entry = catalog.pullable(name)
    if entry.role == "model":
        network = catalog.resolve(entry)(**entry.args)
        plain = network.alpha is not None and "alpha" not in checkpoint.read(source)
        checkpoint.load_into(network, source)
        if plain:
            network.depth_encoder.load_state_dict(network.image_encoder.state_dict())
        done = "the depth encoder is a copy of the RGB encoder, alpha is 0: a start for training" if plain else "the values are unchanged"
    elif name.startswith("vitdet"):
        from depthseg.models.vitdet import ViTDet

        arguments = entry.args
        network = ViTDet(
            arguments["variant"], 1203 if arguments["data"] == "lvis" else 80, arguments["cascade"], arguments["data"] == "lvis"
        )
        network.load(source)
        done = "without its mask heads; the position embedding is brought to 64 x 64"
    else:
        raise DepthsegError(f"{name} keeps the format of its publisher", "Segmentation models and ViTDet can be converted.")
    return _with_card(network, target, entry, name, [source], done, half)


def mean(sources: Sequence[Path], target: Path, name: str, half: bool = False) -> dict[str, str]:
    """Write the mean of checkpoints of one segmentation model, value by value; target, name, half and what comes back as in `convert`.

    Runs that began with the same weights lie in one valley of the loss, and their mean is often better than each (Wortsman et al. 2022,
    "Model soups"). Statistics of BatchNorm are averaged like all else. Raises DepthsegError for a file that does not fit.
    """
    from depthseg.models import checkpoint

    entry = catalog.pullable(name)
    if entry.role != "model":
        raise DepthsegError(f"{name} is no segmentation model", "Name the model that the checkpoints belong to, for example nano.")
    network = catalog.resolve(entry)(**entry.args)
    total: dict[str, Any] = {}
    for source in sources:
        checkpoint.load_into(network, source)
        for key, value in network.state_dict().items():
            total[key] = total.get(key, 0) + value.double()
    network.load_state_dict({key: value / len(sources) for key, value in total.items()})
    return _with_card(network, target, entry, name, sources, f"the mean of the values of {len(sources)} checkpoints", half)


def _with_card(network: Any, target: Path, entry: Any, name: str, sources: Sequence[Path], done: str, half: bool) -> dict[str, str]:
    """Write the weights and the card beside them; what the card says, by heading."""
    from depthseg.models import checkpoint

    about = {
        "Model": name,
        "Made from": "; ".join(f"{source.name}, sha256 {sha256(source)}" for source in sources),
        "What was done": done + (", matrices and kernels in fp16" if half else ""),
        "Parameters": f"{sum(p.numel() for p in network.parameters()):,}",
        "Licence": entry.licence,
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.save(network, target, {"model": name}, half)
    with _complete(target.with_suffix(".md")) as part:
        part.write_text(f"# {target.name}\n\n" + "".join(f"- {k}: {v}\n" for k, v in about.items()), encoding="utf-8")
    return about
