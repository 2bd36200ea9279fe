"""A run over 200 pictures is killed at random moments and started again, until it ends: the folder is that of an undisturbed run.

Everything is real but the network, which would take most of the time: masks follow from the pixels. `python tests/test_kill.py 100`
kills so many times and says how often the result was the same.
"""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

COUNT = 200
CHILD = """
import sys, time, types
import numpy as np
from depthseg import cli, data, masks
from depthseg.schema import Masks, Record

class Segmenter:
    def __init__(self, plan, **given):
        self.plan, self.notes, self.provenance = plan, [], {"model": {"name": "pixels"}}

    def expect(self, images):
        return []

    def remarks(self):
        return []

    def segment(self, images):
        for image in data.read_ahead(images):
            if isinstance(image, data.Failure):
                yield image
                continue
            time.sleep(0.001)
            mask = np.asarray(image.pixels).mean(2) > 127
            one = np.ones(1, np.float32)
            rle = [masks.encode(mask)]
            found = Masks(rle, masks.boxes(rle), masks.area(rle), one, one, one, np.array([1]), {1: "thing"})
            yield Record(image, found, seconds={"read": 0.0})

sys.modules["depthseg.segment"] = types.SimpleNamespace(Segmenter=Segmenter)
cli.main(sys.argv[1:])
"""


def pictures(folder: Path) -> Path:
    """Small pictures in a tree, two of them broken."""
    g = np.random.default_rng(0)
    for i in range(COUNT):
        path = folder / f"{i % 7}" / f"{i:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(g.integers(0, 256, (24, 32, 3), dtype=np.uint8)).resize((48, 64)).save(path)
    for i in (50, 150):
        (folder / f"{i % 7}" / f"{i:03}.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    return folder


def start(inside: Path, out: Path) -> subprocess.Popen:
    words = ["segment", str(inside), "-o", str(out), "--model", "nano", "--depth", "none", "--detector", "nano", "--instances"]
    return subprocess.Popen([sys.executable, "-c", CHILD, *words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def contents(out: Path) -> dict[str, object]:
    """Every file of a run but for times: of run.json the counts and state, of the journal the lines in any order."""
    found: dict[str, object] = {}
    for path in sorted(p for p in out.rglob("*") if p.is_file()):
        name = path.relative_to(out).as_posix()
        if name == "run.json":
            about = json.loads(path.read_text())
            found[name] = (about["state"], about["counts"], about["digest"])
        elif name == "journal.jsonl":
            found[name] = sorted(json.dumps({**json.loads(line), "seconds": 0}) for line in path.read_text().splitlines())
        elif name == "failures.jsonl":
            found[name] = sorted(path.read_text().splitlines())
        else:
            found[name] = path.read_bytes()
    return found


def killed(inside: Path, out: Path, whole: float, chance: random.Random, times: int) -> tuple[int, set[int]]:
    """Start, kill, start again, at most so many times, then let it end: how often it was killed and with which exit codes.

    whole: seconds of an undisturbed run.
    """
    codes, kills = set(), 0
    for _ in range(times):
        child = start(inside, out)
        number = chance.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
        try:
            child.communicate(timeout=chance.uniform(0.2, 0.8) * whole)
        except subprocess.TimeoutExpired:
            child.send_signal(number)
            kills += 1
        child.communicate()
        codes.add(child.returncode)
        if child.returncode == 3:
            break
    child = start(inside, out)
    _, err = child.communicate()
    assert child.returncode == 3, err  # two pictures are broken
    return kills, codes


def tried(kills: int, seed: int = 0) -> tuple[int, int, int]:
    """Kill that often in all: kills, runs that were disturbed, and how many of them ended as the undisturbed one."""
    chance, done, runs, same = random.Random(seed), 0, 0, 0
    with tempfile.TemporaryDirectory() as scratch:
        inside = pictures(Path(scratch, "in"))
        begin = time.monotonic()
        assert start(inside, Path(scratch, "whole")).wait() == 3
        whole, expected = time.monotonic() - begin, contents(Path(scratch, "whole"))
        while done < kills:
            out = Path(scratch, f"out{runs}")
            more, codes = killed(inside, out, whole, chance, min(5, kills - done))
            whole *= 1 if more else 0.7  # the machine was busier in the beginning
            assert codes <= {3, 130, 143, -signal.SIGKILL, -signal.SIGINT, -signal.SIGTERM}, codes  # - : before the handlers are there
            done, runs = done + more, runs + 1
            same += contents(out) == expected
    return done, runs, same


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_killed_anywhere_it_ends_alike():
    kills, runs, same = tried(8)
    assert kills >= 8 and same == runs


def test_a_full_disk_stops_the_run_which_goes_on_when_there_is_room(tmp_path):
    """A small file system in memory, which only root may mount."""
    disk, inside = tmp_path / "disk", pictures(tmp_path / "in")
    disk.mkdir()
    if os.name != "posix" or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    try:
        child = start(inside, disk / "out")
        _, err = child.communicate()
        assert child.returncode == 1 and "No space left on device" in err and "run the same command again" in err, err
        done = len((disk / "out" / "journal.jsonl").read_bytes().splitlines())
        assert 0 < done < COUNT
        subprocess.run(["mount", "-o", "remount,size=100m", disk], check=True)
        child = start(inside, disk / "out")
        _, err = child.communicate()
        assert child.returncode == 3 and "done already" in err, err
        assert start(inside, tmp_path / "whole").wait() == 3
        assert contents(disk / "out") == contents(tmp_path / "whole")
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        child = start(inside, disk / "out")
        _, err = child.communicate()
        assert child.returncode == 2 and "cannot write" in err and "hint: " in err, err
    finally:
        subprocess.run(["umount", disk], check=True)


def test_inputs_that_disappear_are_failures_and_all_are_accounted_for(tmp_path):
    inside, out = pictures(tmp_path / "in"), tmp_path / "out"
    child = start(inside, out)
    while not (out / "journal.jsonl").exists() and child.poll() is None:
        time.sleep(0.005)
    gone = sorted(inside.rglob("*.png"))[::-1][:30]  # the last in line
    for path in gone:
        path.unlink()
    _, err = child.communicate()
    assert child.returncode == 3, err
    counts = json.loads((out / "run.json").read_text())["counts"]
    assert counts["images"] == COUNT == counts["done"] + counts["failed"] and counts["skipped"] == 0
    failed = [json.loads(line) for line in (out / "failures.jsonl").read_text().splitlines()]
    assert len(failed) == counts["failed"] >= 2 + 10 and all(f["stage"] == "read" for f in failed)


if __name__ == "__main__":
    print("{} kills in {} runs of 200 pictures; {} ended as the undisturbed run".format(*tried(int(sys.argv[1]), seed=1)))
