"""Weight files on this machine: where they lie, their hash, and fetching what is missing.

The only module that uses a network, and only inside `pull`. Knows file names and addresses, no networks of neurons.
"""

import contextlib
import hashlib
import http.client
import os
import shutil
import socket
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

from depthseg import catalog
from depthseg.errors import DepthsegError

PROBE_SECONDS = 2.0  # without a network the hub's own retries take from 23 s to six minutes
READ_SECONDS = 60.0  # silence after which a download is given up
HUB_NEEDED = ["config.json", "model.safetensors"]  # without these a repository's folder is no model
HUB_FILES = [*HUB_NEEDED, "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"]
CHUNK = 1 << 20


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


def hub_folder(hub: str | None) -> Path | None:
    """The folder of a Hugging Face repository on this machine, if it holds a whole model. Asks no network."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    if hub is None:
        return None
    try:
        found = [try_to_load_from_cache(hub, name) for name in HUB_NEEDED]
    except HFValidationError:  # a path, or no name at all
        return None
    return Path(found[0]).parent if all(isinstance(f, str) and Path(f).is_file() for f in found) else None


def find(entry: catalog.Row) -> Path | None:
    """Where this row's file lies, or the folder of its Hugging Face repository; None if it is not here. Asks no network."""
    return catalog.find(entry) if entry.file else hub_folder(entry.hub)


def locate(entry: catalog.Row, name: str, fetch: bool, progress: Callable[[int, int], None] | None = None) -> Path:
    """Where the weights of this row are, fetched first if they are not here and that is allowed; else an error."""
    if path := find(entry):
        return path
    if fetch:
        return pull(entry, name, progress)
    raise catalog.missing(f"the weights of {name} ({entry.file or entry.hub}) are not on this machine", entry.role)


def pull(entry: catalog.Row, name: str, progress: Callable[[int, int], None] | None = None) -> Path:
    """Fetch the weights of this row unless they are here: the path of their file, or of the model's folder in the hub's cache.

    name: the row's name, for messages. progress: told (bytes done, bytes in all, 0 if unknown) of a file from an address.
    Raises DepthsegError with code MISSING_PIECE; nothing half-written remains.
    """
    if path := find(entry):
        return path
    if entry.hub:
        return _from_hub(entry, name)
    if entry.url and entry.file:
        target = catalog.cache() / entry.file
        _download(entry, target, name, progress)
        return target
    raise catalog.missing(f"the weights of {name} cannot be fetched: nobody publishes them", entry.role)


def _from_hub(entry: catalog.Row, name: str) -> Path:
    import huggingface_hub as hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    assert entry.hub
    _probe(os.environ.get("HF_ENDPOINT") or "https://huggingface.co", entry, name)
    try:
        if entry.file is None:
            return Path(hub.snapshot_download(entry.hub, allow_patterns=HUB_FILES))
        got = Path(hub.hf_hub_download(entry.hub, entry.file)).resolve()
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise _no(entry, name, f"{entry.hub} on the hub: {reason}") from error
    target = catalog.cache() / entry.file
    with _complete(target) as part:
        try:
            os.link(got, part)
        except OSError:  # another file system
            shutil.copyfile(got, part)
    return target


def _download(entry: catalog.Row, target: Path, name: str, progress: Callable[[int, int], None] | None) -> None:
    assert entry.url
    _probe(entry.url, entry, name)
    try:
        with urllib.request.urlopen(entry.url, timeout=READ_SECONDS) as answer, _complete(target) as part, open(part, "wb") as file:
            total, done = int(answer.headers.get("Content-Length") or 0), 0
            while chunk := answer.read(CHUNK):
                file.write(chunk)
                done += len(chunk)
                if progress:
                    progress(done, total)
            if total and done != total:  # read() ends quietly when the connection does
                raise OSError(f"the download ended after {done} of {total} bytes")
    except (OSError, http.client.HTTPException) as error:  # URLError and HTTPError are OSErrors
        raise _no(entry, name, f"{entry.url}: {error}") from error


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
