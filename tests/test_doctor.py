"""What `depthseg doctor` finds where something is wrong, and what scripts read from it."""

import json
import socket
import subprocess
import sys
from importlib import metadata
from types import SimpleNamespace

import pytest

from depthseg import __version__, catalog, cli, doctor


@pytest.fixture
def wrong():
    return doctor.Findings()


@pytest.fixture
def run(capfd, monkeypatch):
    monkeypatch.setenv("DEPTHSEG_CONFIG", "none")
    monkeypatch.setenv("NO_COLOR", "1")

    def call(*argv):
        with pytest.raises(SystemExit) as leaving:
            cli.main(list(argv))
        out, err = capfd.readouterr()
        return leaving.value.code, out, err

    return call


@pytest.fixture
def versions(monkeypatch):
    """Change what the metadata of packages say: a version, or None for a package that is not installed."""
    true, changed = metadata.version, {}

    def version(name):
        found = changed[name] if name in changed else true(name)
        if found is None:
            raise metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(metadata, "version", version)
    return changed


def test_json_is_one_object_and_nothing_else(run, monkeypatch, weights_cache):
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("no network"))
    code, out, _ = run("doctor", "--json")
    found = json.loads(out)
    assert code == 5 * any(problem["needed"] for problem in found["problems"])
    assert found["schema_version"] == 1 and found["depthseg"] == __version__
    assert {"name": "nano-depth", "role": "model"}.items() <= found["weights"][1].items() and "research only" in found["weights"][1][
        "licence"
    ]
    assert {"yolo", "demo", "lvis", "groundingdino"} <= set(found["extras"]) and "test" not in found["extras"]
    assert found["folders"]["weights"] == {**found["folders"]["weights"], "path": str(weights_cache), "exists": False, "writable": True}
    assert set(found["terminal"]) == {"stdin", "stdout", "stderr"} and found["devices"]["cpu"]["count"]
    assert found["environment"]["DEPTHSEG_WEIGHTS"] == str(weights_cache)


def test_in_words(run, monkeypatch):
    found = {"depthseg": "1", "python": "3", "executable": "p", "system": "s", "packages": [], "extras": {"yolo": False}, "environment": {}}
    found |= {
        "devices": {"cpu": {"count": 2, "threads": 1}, "cuda": [{"name": "Card", "memory_bytes": 2**33}]},
        "terminal": {"stdin": True},
    }
    found |= {"folders": {"current": {"path": "here", "free_bytes": 2**30}}, "problems": doctor.Findings()}
    found |= {"weights": [{"name": "nano", "role": "model", "licence": "research only: see", "path": "w"}]}
    monkeypatch.setattr(doctor, "examine", lambda: found)
    code, out, _ = run("doctor")
    for text in ("cuda:0", "Card, 8 GiB", "with the extra yolo", "research only", "here, 1.0 GiB free", "nothing is wrong"):
        assert text in out
    assert code == 0
    found["problems"].add("this", "do that")
    assert run("doctor")[0] == 0
    found["problems"].add("those", "do so", needed=True)
    code, out, _ = run("doctor")
    assert code == 5 and "note: this\nway out: do that\nproblem: those\nway out: do so\n" in out


def test_packages_that_are_missing_or_of_the_wrong_version(wrong, versions):
    versions |= {"timm": None, "transformers": "4.57.1", "ultralytics": "7.0", "lvis": None}
    packages = doctor._packages(wrong)
    told = {problem["problem"].split()[0]: problem for problem in wrong}
    assert "timm is not installed" in wrong[0]["problem"] and wrong[0]["needed"] and "pip install 'timm" in wrong[0]["way_out"]
    assert told["transformers"]["needed"] and "4.57.1" in told["transformers"]["problem"]
    assert not told["ultralytics"]["needed"] and "lvis" not in told and len(wrong) == 3
    assert doctor._extras(packages)["lvis"] is False


@pytest.mark.parametrize(
    "version, bounds, fits",
    [
        ("2.9.0+cu128", "<3,>=2.9", True), ("3.0.0", "<3,>=2.9", False), ("2.8.1", "<3,>=2.9", False), ("2.15.0", ">=2.9", True),
        ("1.0.31", "<1.1,>=1.0.20", True), ("1.1.0", "<1.1", False), ("2", "", True),
        ("2.9.0", "torch==2.9.0", True), ("2.9.1+cpu", "torch (==2.9.0)", False),
    ],
)  # fmt: skip
def test_bounds(version, bounds, fits):
    assert doctor._lies_in(version, bounds) is fits


def test_a_torch_that_torchvision_was_not_built_for(wrong, versions, monkeypatch):
    versions |= {"torch": "2.9.1+cpu", "torchvision": "0.24.0"}
    monkeypatch.setattr(metadata, "requires", lambda name: ["numpy", "torch==2.9.0", "gdown; extra == 'gdown'"])
    doctor._check_torch(wrong)
    assert wrong[0]["needed"] and "2.9.1+cpu" in wrong[0]["problem"] and "--force-reinstall" in wrong[0]["way_out"]


def test_a_torchvision_that_cannot_be_imported(wrong, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    assert doctor._devices(wrong)["cuda"] == []
    assert wrong[0]["needed"] and "cannot be imported" in wrong[0]["problem"]


def test_cards(wrong, monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/bin/nvidia-smi")
    assert doctor._devices(wrong)["cuda"] == [] and not wrong[0]["needed"] and "NVIDIA" in wrong[0]["problem"]

    def ones(*_, device):
        raise RuntimeError("no kernel image is available\nfor this card")

    card = SimpleNamespace(name="Card", total_memory=2**33, major=3, minor=5)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda n: card)
    monkeypatch.setattr(torch, "ones", ones)
    assert doctor._devices(wrong)["cuda"] == 2 * [{"name": "Card", "memory_bytes": 2**33, "capability": "3.5"}]
    assert [problem["needed"] for problem in wrong[1:]] == [True, False]
    assert "cuda:0 does not compute (no kernel image is available)" in wrong[1]["problem"]


@pytest.mark.parametrize("needed", [False, True])
def test_a_cv2_without_its_library(wrong, monkeypatch, needed):
    error = "Traceback\nImportError: libGL.so.1: cannot open shared object file"
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=1, stderr=error))
    doctor._check_cv2(wrong, needed)
    assert "libGL.so.1" in wrong[0]["problem"] and "apt-get install libgl1" in wrong[0]["way_out"] and wrong[0]["needed"] is needed


def test_weights_of_the_package(wrong, monkeypatch, tmp_path, weights_cache):
    weights_cache.mkdir()
    (weights_cache / "yolov8m.pt").touch()
    monkeypatch.setattr(catalog, "embedded", lambda: tmp_path)
    (tmp_path / "nano").mkdir()
    (tmp_path / "nano" / "nano-boxes.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    (tmp_path / "SHA256SUMS").write_text(f"{'0' * 64}  nano/nano-boxes.safetensors\n")
    found = doctor._weights(wrong)
    assert {entry["name"]: entry["licence"] for entry in found}["yolov8m"] == "AGPL-3.0"
    assert sorted(problem["problem"].split()[-1] for problem in wrong) == ["damaged", "missing", "missing"]
    assert all(problem["needed"] for problem in wrong)


def test_a_full_disk(wrong, monkeypatch, tmp_path):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder: SimpleNamespace(free=2**20))
    monkeypatch.setattr(doctor.os, "access", lambda *_: False)
    found = doctor._folder(tmp_path / "not" / "yet", wrong)
    assert found == {"path": str(tmp_path / "not" / "yet"), "exists": False, "writable": False, "free_bytes": 2**20}
    assert len(wrong) == 2 and not any(problem["needed"] for problem in wrong)


def test_not_installed(wrong, monkeypatch):
    def requires(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", requires)
    assert doctor._packages(wrong) == [] and "not installed" in wrong[0]["problem"]
