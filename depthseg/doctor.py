"""`depthseg doctor`: what is on this machine, what is wrong with it, and the way out. Asks no network and changes nothing."""

import contextlib
import importlib.util
import json
import operator
import os
import platform
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import typer

from depthseg import __version__, catalog
from depthseg import options as opt
from depthseg.errors import MISSING_PIECE
from depthseg.plan import Plan
from depthseg.terminal import table

LITTLE_DISK = 2**30  # bytes
TELLING = ("CUDA_VISIBLE_DEVICES", "HF_HUB_OFFLINE", "HF_HOME", "OMP_NUM_THREADS")  # variables that change what a run does


_BOTH_ANEW = "Install both anew, from one index: pip install --force-reinstall torch torchvision"


class Findings(list[dict[str, Any]]):
    """What is wrong, as --json prints it."""

    def add(self, problem: str, way_out: str, needed: bool = False) -> None:
        """needed: a run with nothing but defaults cannot do without."""
        self.append({"problem": problem, "way_out": way_out, "needed": needed})


def doctor(as_json: opt.Json = False, debug: opt.Debug = False) -> None:
    """Say what this machine has and what is wrong with it; ends with code 5 if something is missing that every run needs.

    [bold]depthseg doctor[/bold]\\n
    [bold]depthseg doctor --json[/bold]   one object, to be added to a report of a bug
    """
    with contextlib.redirect_stdout(sys.stderr):  # libraries that print must not spoil stdout
        found = examine()
    if as_json:
        typer.echo(json.dumps(found))
    else:
        _told(found)
    if any(problem["needed"] for problem in found["problems"]):
        raise typer.Exit(MISSING_PIECE)


def examine() -> dict[str, Any]:
    """Everything that `doctor` tells."""
    wrong = Findings()
    packages = _packages(wrong)
    weights = _weights(wrong)
    if importlib.util.find_spec("cv2"):
        _check_cv2(wrong, needed=any(found["name"].startswith("yolov8") for found in weights))
    return {
        "schema_version": 1,
        "depthseg": __version__,
        "python": platform.python_version(),
        "executable": sys.executable,
        "system": platform.platform(),
        "packages": packages,
        "extras": _extras(packages),
        "devices": _devices(wrong),
        "weights": weights,
        "folders": {"weights": _folder(catalog.cache(), wrong), "current": _folder(Path.cwd(), wrong)},
        "terminal": {name: os.isatty(number) for number, name in enumerate(("stdin", "stdout", "stderr"))},
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith("DEPTHSEG_") or k in TELLING},
        "problems": wrong,
    }


# ---- packages ----


def _packages(wrong: Findings) -> list[dict[str, Any]]:
    """Every package that depthseg or one of its extras for users asks for, with the version that is here; nothing is imported."""
    try:
        lines = metadata.requires("depthseg") or []
    except metadata.PackageNotFoundError:
        wrong.add("depthseg was found on the path, but is not installed, so nobody knows what it needs", "pip install -e . in its folder")
        return []
    found = []
    for line in lines:
        requirement, _, condition = line.partition(";")
        name, wanted = re.match(r"\s*([\w.-]+)(.*)", requirement).groups()  # type: ignore[union-attr]
        extra = re.search(r"""extra\s*==\s*['"]([\w.-]+)""", condition)
        if extra and extra[1] == "test":
            continue
        version = _version(name)
        found.append({"name": name, "wanted": wanted.strip(), "version": version, "extra": extra[1] if extra else None})
        if version is None and not extra:
            wrong.add(f"the package {name} is not installed", f"pip install '{requirement.strip()}'", needed=True)
        elif version and not _lies_in(version, wanted):
            wrong.add(f"{name} is here as {version}, and {wanted.strip()} is wanted", f"pip install '{requirement.strip()}'", not extra)
    _check_torch(wrong)
    return found


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _lies_in(version: str, bounds: str) -> bool:
    """Whether a version lies in bounds like >=2,<3: enough for those of pyproject.toml."""
    signs = {">=": operator.ge, "<": operator.lt, "==": operator.eq}
    here = _numbers(version)
    found = [(signs[sign], _numbers(bound)) for sign, bound in re.findall(r"(>=|<|==)\s*([\d.]+)", bounds)]
    return all(holds(here[: len(bound)], bound) for holds, bound in found)


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version.partition("+")[0])[:3]]


def _check_torch(wrong: Findings) -> None:
    """A torchvision's compiled part fits one torch, which it names."""
    torch, vision = _version("torch"), _version("torchvision")
    if torch and vision:
        wanted = next((line for line in metadata.requires("torchvision") or [] if re.match(r"torch\b", line)), "")
        if not _lies_in(torch, wanted):
            wrong.add(f"torchvision {vision} was built for another torch than {torch}: {wanted}", _BOTH_ANEW, needed=True)


def _extras(packages: list[dict[str, Any]]) -> dict[str, bool]:
    """Extra -> whether all of its packages are here."""
    names = dict.fromkeys(package["extra"] for package in packages if package["extra"])
    return {name: all(package["version"] for package in packages if package["extra"] == name) for name in names}


def _check_cv2(wrong: Findings, needed: bool) -> None:
    """Import cv2, which ultralytics and groundingdino need, in a process of its own: on servers a library of the system may be missing."""
    done = subprocess.run([sys.executable, "-P", "-c", "import cv2"], capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["it crashes"])[-1]
        way = "Debian, Ubuntu: apt-get install libgl1 libglib2.0-0; elsewhere: pip install opencv-python-headless in place of opencv-python"
        wrong.add(f"cv2 cannot be imported ({reason}), and yolo and groundingdino need it", way, needed)


# ---- devices, weights, folders ----


def _devices(wrong: Findings) -> dict[str, Any]:
    found: dict[str, Any] = {"cpu": {"count": os.cpu_count(), "threads": None}, "cuda": []}
    if not (_version("torch") and _version("torchvision")):
        return found
    try:
        import torch
        import torchvision  # noqa: F401  # fails beside a torch that it was not built for
    except Exception as error:
        wrong.add(f"torch and torchvision cannot be imported ({_line(error)})", _BOTH_ANEW, needed=True)
        return found
    found["cpu"]["threads"] = torch.get_num_threads()
    build = f"torch {torch.__version__} was built for {'CUDA ' + torch.version.cuda if torch.version.cuda else 'the CPU'}"
    if not torch.cuda.is_available():
        if shutil.which("nvidia-smi"):
            wrong.add("there is an NVIDIA driver, and torch finds no device", f"{build}: take another build if `nvidia-smi` works")
        return found
    for n in range(torch.cuda.device_count()):
        try:
            about = torch.cuda.get_device_properties(n)
            found["cuda"].append({"name": about.name, "memory_bytes": about.total_memory, "capability": f"{about.major}.{about.minor}"})
            torch.ones(1, device=f"cuda:{n}").add(1).item()
        except Exception as error:  # no code for a card so new or old, or another process has it for itself
            wrong.add(f"cuda:{n} does not compute ({_line(error)})", f"Run with --device cpu; {build}", needed=not n)
    return found


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _weights(wrong: Findings) -> list[dict[str, Any]]:
    """The weights that are here; those that come with the package are looked at, too: are they whole?"""
    found = []
    embedded = {"model": Plan.model, "detector": "nano", "depth": "nano"}  # what a run takes where nothing better is here
    if all_of_them := bool(_version("filelock") and _version("huggingface-hub")):  # without them, no look into the hub's cache
        from depthseg import weights
    for role, entries in catalog.TABLES.items():
        for name, entry in entries.items():
            path = weights.find(entry) if all_of_them else catalog.find(entry)
            if path:
                found.append({"name": name, "role": role, "licence": entry.licence, "note": entry.note, "path": str(path)})
            if embedded.get(role) == name:
                state = "missing" if path is None else weights.verify(entry) if all_of_them else ""
                if state in ("missing", "damaged"):
                    wrong.add(f"the weights {entry.file} of this package are {state}", "Install depthseg anew.", needed=True)
    return found


def _folder(path: Path, wrong: Findings) -> dict[str, Any]:
    """Free disk, and whether one can write, where a folder is or would be made."""
    there = next(folder for folder in (path.absolute(), *path.absolute().parents) if os.path.isdir(folder))
    free, writable = shutil.disk_usage(there).free, os.access(there, os.W_OK)
    if not writable:
        wrong.add(f"nothing can be written to {path}", "Set DEPTHSEG_WEIGHTS to another folder, and name another one with -o.")
    if free < LITTLE_DISK:
        wrong.add(f"only {free / 2**30:.2f} GiB are free in {there}", "Make room, or use a folder on another disk.")
    return {"path": str(path), "exists": path.is_dir(), "writable": writable, "free_bytes": free}


# ---- in words ----


def _told(found: dict[str, Any]) -> None:
    cpu, cuda = found["devices"]["cpu"], found["devices"]["cuda"]
    rows = [
        ["depthseg", found["depthseg"]],
        ["python", f"{found['python']}, {found['executable']}"],
        ["system", found["system"]],
        ["cpu", f"{cpu['count']} cores" + (f", torch uses {cpu['threads']} threads" if cpu["threads"] else "")],
        *([f"cuda:{n}", f"{card['name']}, {card['memory_bytes'] / 2**30:.0f} GiB"] for n, card in enumerate(cuda)),
        *([] if cuda else [["cuda", "none"]]),
        *(
            ["extra " + name, "here" if here else f"not here: install depthseg with the extra {name}"]
            for name, here in found["extras"].items()
        ),
        *([f"{name} folder", f"{f['path']}, {f['free_bytes'] / 2**30:.1f} GiB free"] for name, f in found["folders"].items()),
        ["terminal", ", ".join(name for name, interactive in found["terminal"].items() if interactive) or "none"],
        *([name, value] for name, value in found["environment"].items()),
    ]
    table(["what", "found"], rows)
    packages = [[p["name"], p["version"] or "missing", p["wanted"], p["extra"] or "every run"] for p in found["packages"]]
    table(["package", "version", "wanted", "for"], packages)
    weights = [[w["name"], w["role"], w["licence"].partition(":")[0], w["path"]] for w in found["weights"]]
    table(["weights", "role", "licence", "path"], weights)
    for problem in found["problems"]:
        typer.echo(f"{'problem' if problem['needed'] else 'note'}: {problem['problem']}\nway out: {problem['way_out']}")
    if not found["problems"]:
        typer.echo("nothing is wrong")
