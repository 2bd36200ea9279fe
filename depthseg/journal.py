"""A file of JSON lines that only grows, one for each image as it is done: what a run that was stopped goes on from.

A line is whole or it is not there. Memory holds positions, never what stands at the end of a line.
"""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from depthseg.data import gave_out
from depthseg.errors import DepthsegError

try:
    import fcntl
except ImportError:  # Windows: no lock
    fcntl = None  # type: ignore[assignment]


LOCK = ".lock"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Refuse a folder that another process writes to."""
    with open(folder / LOCK, "w") as file:
        if hasattr(os, "register_at_fork"):  # or a child that outlives its killed parent would hold the folder
            os.register_at_fork(after_in_child=file.close)
        if fcntl:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise DepthsegError(f"another process is writing to {folder}", "Wait for it to end.") from None
            except OSError:
                pass  # some network file systems have no locks
        yield


class Lines:
    """The file, open for appending. body: the field that comes after the head of a line and is long."""

    def __init__(self, path: Path, body: str):
        self._mark = f', "{body}": '.encode()  # a quote inside of a text is escaped, so the mark is unambiguous
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115  # both held open until __exit__
        self._reader = open(path, "rb")  # noqa: SIM115  # with a buffer: readline without one goes byte by byte
        self._end = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()
        self._reader.close()

    def heads(self) -> Iterator[tuple[int, dict]]:
        """Position and head of each line, damaged ones left out; at the end a line that a crash tore is cut off."""
        end = 0
        self._reader.seek(0)
        for line in self._reader:
            if not line.endswith(b"\n"):
                break
            with contextlib.suppress(ValueError):
                yield end, json.loads(line.partition(self._mark)[0] + b"}")
            end += len(line)
        self._file.truncate(end)
        self._end = end

    def append(self, line: dict) -> int:
        """Write a line; its position. Raises DepthsegError where the file system takes no more, for then the run cannot go on."""
        at, whole = self._end, json.dumps(line).encode() + b"\n"
        rest = whole
        try:
            while rest := rest[self._file.write(rest) :]:  # a disk that fills up takes the beginning first
                pass
        except OSError as error:
            raise gave_out(error) from error
        self._end += len(whole)
        return at

    def read(self, at: int) -> dict:
        """The line at a position."""
        self._reader.seek(at)
        return json.loads(self._reader.readline())

    def sync(self) -> None:
        """See to it that what was written is on the disk."""
        os.fsync(self._file.fileno())
