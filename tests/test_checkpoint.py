"""Checkpoints that do not fit are refused with the difference, and none is ever executed."""

import pickle

import pytest
import torch

from depthseg.errors import DepthsegError
from depthseg.models.checkpoint import load_into, read, save
from depthseg.models.depthseg import build


@pytest.fixture(scope="module")
def network():
    return build("nano", depth=False)


def test_nested_state_dict_is_read(tmp_path, network) -> None:
    torch.save({"state_dict": network.state_dict()}, tmp_path / "w.pt")
    assert set(read(tmp_path / "w.pt")) == set(network.state_dict())


def test_missing_file(tmp_path, network) -> None:
    with pytest.raises(DepthsegError, match="no such weights file") as e:
        load_into(network, tmp_path / "none.pt")
    assert e.value.code == 5


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
@pytest.mark.parametrize("content", [b"", b"junk", b"a text", b"not a checkpoint", b"\x80\x02}q\x00."])
def test_garbage(tmp_path, network, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DepthsegError):
        load_into(network, tmp_path / name)


def test_foreign_checkpoint_shows_the_difference(tmp_path, network) -> None:
    state = network.state_dict()
    state.pop("mask_decoder.iou_token.weight")
    state["extra.weight"] = torch.zeros(1)
    state["mask_decoder.mask_tokens.weight"] = torch.zeros(2, 2)
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(DepthsegError) as e:
        load_into(network, tmp_path / "w.pt")
    for part in ("1 missing: mask_decoder.iou_token.weight", "1 unknown: extra.weight", "[2, 2] instead of [4, 64]"):
        assert part in e.value.message


class _Bomb:
    def __reduce__(self):
        return (open, ("executed", "w"))


def test_a_pickle_that_would_run_code_is_refused(tmp_path, network, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"a": _Bomb()}, tmp_path / "w.pt")
    (tmp_path / "v.pt").write_bytes(pickle.dumps({"a": _Bomb()}))
    for name in ("w.pt", "v.pt"):
        with pytest.raises(DepthsegError):
            load_into(network, tmp_path / name)
    assert not (tmp_path / "executed").exists()


def test_large_variances_survive_the_export_and_damage_is_refused(tmp_path) -> None:
    network = build("nano", depth=False)
    norm = network.image_encoder.backbone.stages[0].op_list[0].norm
    norm.running_var.fill_(1e5)  # more than fp16 holds
    save(network, tmp_path / "w.safetensors", {})
    (tmp_path / "any").touch()
    assert (tmp_path / "w.safetensors").stat().st_mode == (tmp_path / "any").stat().st_mode, "others may read it, as any file"
    again = build("nano", depth=False)
    load_into(again, tmp_path / "w.safetensors")
    assert (again.image_encoder.backbone.stages[0].op_list[0].norm.running_var == 1e5).all()
    norm.running_var[0] = float("inf")
    save(network, tmp_path / "w.safetensors", {})
    with pytest.raises(DepthsegError, match="not finite"):
        load_into(again, tmp_path / "w.safetensors")
