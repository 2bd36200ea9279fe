"""The output folder: pictures and one journal line for each image as it is done; COCO files and a manifest at the end.

A run may stop at any moment and go on later: what the journal holds is done, everything else is done again. Memory holds keys
and file positions, never masks. Knows nothing of models, devices or the terminal.
"""

import contextlib
import json
import shutil
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self

from depthseg import __version__, formats
from depthseg.data import Failure, beside, gave_out, in_threads, not_written, read, stamp
from depthseg.errors import NOTHING_TO_DO, DepthsegError
from depthseg.journal import Lines, locked
from depthseg.plan import Plan
from depthseg.schema import Image, Record

_PICTURES = ("overlays", "depth_panel", "labelmaps", "instances")  # fields of Plan that ask for pictures
_OURS = ("run.json", "journal.jsonl", "failures.jsonl", "predictions.json", "images.json", "overlays", "labelmaps", "instances", "report")
_NEXT = "Choose another folder, or start anew in this one with --overwrite."


def check_output(output: str | Path, paths: Sequence[str | Path]) -> None:
    """Refuse an output folder that is, or lies inside, one of the input folders: a second run would read it as input."""
    target = Path(output).resolve()
    for path in paths:
        folder = Path(path).resolve()
        if folder.is_dir() and target.is_relative_to(folder):
            raise DepthsegError(f"the output folder {output} lies inside the input {path}", "Choose a folder outside of it.")


def failed_keys(output: str | Path) -> list[str]:
    """The keys that failures.jsonl of an output folder names. Raises DepthsegError, with NOTHING_TO_DO if there are none."""
    path = Path(output) / "failures.jsonl"
    try:
        lines = path.read_text("utf-8").splitlines()
        return list(dict.fromkeys(json.loads(line)["key"] for line in lines))
    except FileNotFoundError:
        raise DepthsegError(f"no image failed in {output}", "Leave --retry-failed out.", NOTHING_TO_DO) from None
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise DepthsegError(f"{path} cannot be read ({e})", "Leave --retry-failed out: failed images are tried again anyway.") from e


class Sink:
    """A context manager that owns the output folder of one run. `done` holds the keys that need no work any more.

    Leaving the context writes the COCO files, after an exception too, from what is done. A failed image is tried again when the
    run is started again. extra: JSON values that say what made the masks, for run.json. images: all that were found, in the order of
    the result, whose ids do not depend on what is selected; selected: those that this run takes, by default all.
    """

    def __init__(
        self,
        output: str | Path,
        plan: Plan,
        images: Sequence[Image],
        extra: dict,
        overwrite: bool = False,
        selected: Sequence[Image] | None = None,
    ):
        self.output = Path(output)
        self.plan = plan
        self.images = images
        self.extra = extra
        self.overwrite = overwrite
        self.selected = images if selected is None else selected
        self.done: set[str] = set()
        self._offsets: dict[str, int] = {}  # key -> where its line starts in the journal
        self._failed: set[str] = set()
        self._made = [name for name in _PICTURES if getattr(plan, name)]
        self._started = _now()
        self._synced = 0.0
        self._finished = False

    def __enter__(self) -> Self:
        """Take the folder. Raises DepthsegError if it is in use, holds something else, or a run with another plan."""
        try:
            self.output.mkdir(parents=True, exist_ok=True)
            (self.output / ".lock").touch()
        except OSError as e:
            raise DepthsegError(f"cannot write to the output folder {self.output} ({e.strerror})", "Choose another with -o.") from None
        with contextlib.ExitStack() as undo:
            undo.enter_context(locked(self.output))
            self._claim()
            self._keep_failures()
            self._journal = undo.enter_context(Lines(self.output / "journal.jsonl", "instances"))
            self._resume()
            self._manifest("running", None)
            self._held = undo.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self._held:
            if not self._finished:
                complete = kind is None and all(i.key in self._offsets or i.key in self._failed for i in self.selected)
                try:
                    self.finish("finished" if complete else "interrupted")
                except OSError:
                    if error is None:  # else the full disk has been told already: the journal holds what was done
                        raise

    def _keep_failures(self) -> None:
        """Of the failures of an earlier run those that this one does not try again."""
        path, others = self.output / "failures.jsonl", {i.key for i in self.images} - {i.key for i in self.selected}
        lines = path.read_text("utf-8").splitlines() if path.exists() else []
        with contextlib.suppress(ValueError, KeyError, TypeError):
            kept = [line for line in lines if json.loads(line)["key"] in others]
            self._failed = {json.loads(line)["key"] for line in kept}
            path.unlink(missing_ok=True)
            if kept:
                path.write_text("\n".join(kept) + "\n", "utf-8")

    def _claim(self) -> None:
        """See to it that the folder is empty or holds a run with this plan."""
        manifest = self.output / "run.json"
        if not manifest.exists():
            if any(not path.name.startswith(".") for path in self.output.iterdir()):
                raise DepthsegError(f"the folder {self.output} is not empty and holds no run", "Choose an empty or a new folder.")
            return
        try:
            earlier = json.loads(manifest.read_text("utf-8"))
            plan, made_by, started = dict(earlier["plan"]), resolved(earlier["extra"]), str(earlier["started"])
        except (ValueError, KeyError, TypeError):
            raise DepthsegError(f"{manifest} is not from a run of depthseg", "Choose an empty or a new folder.") from None
        if self.overwrite:
            for name in _OURS:
                path = self.output / name
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)
            return
        new = self.plan.decisive()
        differ = [f"{name} (was {plan.get(name)!r}, is {new[name]!r})" for name in new if plan.get(name) != new[name]]
        if (version := earlier.get("depthseg")) != __version__:  # whose rules may be others
            differ.append(f"depthseg (was {version}, is {__version__})")
        # `auto` may mean something else by now, and a file may have changed under its name
        now = resolved(self.extra)
        differ += [f"{role} (was {made_by.get(role)}, is {now.get(role)})" for role in now | made_by if now.get(role) != made_by.get(role)]
        if differ:
            raise DepthsegError(f"{self.output} holds a run with other options: {', '.join(differ)}", _NEXT)
        self._started = started

    def _resume(self) -> None:
        """Read which images are done: their file has the size it had, and all pictures that are asked for were made."""
        known = {image.key: image for image in self.images}
        for at, head in self._journal.heads():
            with contextlib.suppress(KeyError):
                image = known.get(head["key"])
                if image is None or (head["file"] == stamp(image) and set(self._made) <= set(head["pictures"])):
                    self._offsets[head["key"]] = at
        self.done = self._offsets.keys() & known.keys()

    def write(self, record: Record) -> None:
        """The pictures of one image, then its journal line."""
        self.draw(record)
        self.note(record)

    def drawn(self, answers: Iterable[Record | Failure]) -> Generator[Record | Failure]:
        """The answers in their order, each once its pictures are on the disk, which threads see to while the next ones are computed.

        `note` is still to be called for each. A batch of answers waits at most, or one for each thread. One whose pictures cannot be
        written becomes a Failure.
        """

        def attempt(answer: Record | Failure) -> Record | Failure:
            try:
                if isinstance(answer, Record):
                    self.draw(answer)
            except OSError as error:
                return not_written(answer.image, error)
            return answer

        return in_threads(attempt, answers, beside(), self.plan.batch + 1)  # answers come by batch

    def draw(self, record: Record) -> None:
        """The pictures of one image. Threads may draw different ones at a time."""
        image, masks, key = record.image, record.masks, record.image.key
        if self.plan.overlays:
            path = self.output / "overlays" / formats.overlay_name(key)
            pixels = read(image).pixels
            assert pixels is not None
            formats.write_overlay(path, pixels, masks, record.depth if self.plan.depth_panel else None)
        if self.plan.labelmaps:
            formats.write_label_map(self.output / "labelmaps" / f"{key}.png", masks, image.size)
        if self.plan.instances:
            formats.write_instances(self.output / "instances" / key, masks)

    def note(self, record: Record) -> None:
        """The journal line of an image whose pictures are drawn: from now on it is done."""
        image, masks, key = record.image, record.masks, record.image.key
        instances = []
        for i, rle in enumerate(masks.rle):
            x0, y0, x1, y1 = masks.box[i].tolist()
            label = int(masks.label[i])
            instances.append({
                "category_id": label,
                "category": masks.names.get(label, str(label)),
                "score": round(float(masks.score[i]), 6),
                "predicted_iou": round(float(masks.predicted_iou[i]), 6),
                "stability_score": round(float(masks.stability[i]), 6),
                "bbox": [round(v, 2) for v in (x0, y0, x1 - x0, y1 - y0)],  # COCO's xywh
                "segmentation": {"size": list(rle["size"]), "counts": rle["counts"]},
            })  # fmt: skip
        head = {"key": key, "id": image.id, "size": list(image.size), "file": stamp(image), "pictures": self._made}
        seconds = {stage: round(s, 5) for stage, s in record.seconds.items()}
        self._offsets[key] = self._journal.append(head | {"instances": instances, "seconds": seconds, "plan": record.plan})
        self._failed.discard(key)
        self.done.add(key)
        if time.monotonic() - self._synced > 1:
            self._journal.sync()
            self._synced = time.monotonic()

    def failed(self, failure: Failure) -> None:
        """One line in failures.jsonl; the image counts as not done."""
        line = json.dumps({"key": failure.image.key, "stage": failure.stage, "reason": failure.reason})
        try:
            with open(self.output / "failures.jsonl", "a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            raise gave_out(error) from error
        self._failed.add(failure.image.key)

    def finish(self, state: str) -> None:
        """Write predictions.json, images.json and run.json from what is done. state: finished, interrupted or failed.

        Images come in input order; those that only an earlier run on this folder was given follow, so nothing is lost.
        """
        self._journal.sync()
        names: dict[int, str] = {}
        instances = 0
        with (
            formats.text_file(self.output / "predictions.json") as predictions,
            formats.text_file(self.output / "images.json") as about,
        ):
            predictions.write("[")
            about.write('{"images": [')
            for position, (key, offset, id) in enumerate(self._in_order()):
                line = self._journal.read(offset)
                height, width = line["size"]
                entry = {"id": id, "file_name": key, "height": height, "width": width}
                about.write((",\n" if position else "\n") + json.dumps(entry))
                for found in line["instances"]:
                    names[found["category_id"]] = found.pop("category")
                    entry = {"image_id": id, "file_name": key, **found}
                    predictions.write((",\n" if instances else "\n") + json.dumps(entry))
                    instances += 1
            predictions.write("\n]\n")
            categories = [{"id": id, "name": name} for id, name in sorted(names.items())]
            about.write(f'\n], "categories": {json.dumps(categories)}}}\n')
        self._manifest(state, instances)
        self._finished = True

    def _in_order(self) -> Iterator[tuple[str, int, int]]:
        """Key, journal position and a unique image id of everything that is done."""
        taken: set[int] = set()
        free = 1 + max((image.id for image in self.images), default=0)
        for image in self.images:
            id, free = (free, free + 1) if image.id in taken else (image.id, free)  # two sources may number alike
            taken.add(id)
            if image.key in self._offsets:
                yield image.key, self._offsets[image.key], id
        known = {image.key for image in self.images}
        for id, key in enumerate((key for key in self._offsets if key not in known), free):
            yield key, self._offsets[key], id

    def _manifest(self, state: str, instances: int | None) -> None:
        found, failed = len(self.images), len(self._failed)
        counts = {
            "images": found,
            "done": len(self.done),
            "failed": failed,
            "skipped": found - len(self.done) - failed,  # not selected, or not reached
            "earlier": len(self._offsets) - len(self.done),  # of other inputs, done by a run before this one
            "instances": instances,
        }
        text = {
            "schema_version": 1,
            "depthseg": __version__,
            "state": state,
            "started": self._started,
            "finished": None if state == "running" else _now(),
            "counts": counts,
            "digest": self.plan.digest(),
            "plan": self.plan.to_json(),
            "extra": self.extra,
        }
        with formats.text_file(self.output / "run.json") as file:
            file.write(json.dumps(text, indent=2) + "\n")


def resolved(extra: dict) -> dict[str, str]:
    """What made the masks, by role: names, with the hash of their file, and the precision."""
    roles = {
        k: " ".join(str(v[n]) for n in ("name", "sha256") if v.get(n)) for k, v in extra.items() if isinstance(v, dict) and "name" in v
    }
    return roles | ({"precision": str(extra["precision"])} if "precision" in extra else {})


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
