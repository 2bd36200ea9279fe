"""The trainer on a few tiny samples."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import write_sample
from PIL import Image as PILImage

from depthseg import catalog, masks, sa1b, train_cli
from depthseg.augment import TOKENS
from depthseg.cli import main
from depthseg.curves import Log
from depthseg.errors import DepthsegError
from depthseg.journal import locked
from depthseg.learner import Learner, World, _device, stage_of
from depthseg.models.checkpoint import save
from depthseg.models.depthseg import build
from depthseg.schema import ABSENT, CORNER_MAX, CORNER_MIN, NEGATIVE, PADDING, POSITIVE, StretchedFrame
from depthseg.stages import STAGES, TrainPlan
from depthseg.tasks.batches import Steps, chances
from depthseg.tasks.choose import task_of
from depthseg.tasks.masks import MaskLoss, deepest_errors
from depthseg.train import readers, replay, train


def test_a_mix_names_what_there_is_and_leaves_out_the_rest() -> None:
    assert chances(["coco", "cats"], {"co": 3.0}).tolist() == [3, 1]
    with pytest.raises(DepthsegError, match="no sample comes from 'dogs'"):
        chances(["coco", "cats"], {"co": 3.0, "dogs": 1.0})


def test_a_source_of_weight_0_is_not_pasted_either(root, tmp_path) -> None:
    (root.parent / "manifest.csv").write_text("file,source_repo\n" + "".join(f"train/sa_000000/sa_{i}.jpg,s{i}\n" for i in range(4)))
    plan = _plan(root, tmp_path, mix={"s1": 0.0, "s2": 2.0})
    task = task_of(plan, STAGES["0"], build("nano", depth=False))
    (root.parent / "manifest.csv").unlink()
    assert [e.source for e in task.source.entries] == ["s0", "s2", "s3"] and task.order.chance.tolist() == [1, 2, 1]


@pytest.mark.parametrize("words", [["--mix", "a=-1"], ["--mix", "a=nan"], ["--mix", "=2"], ["--loss", "mask"]])
def test_weights_are_numbers_from_0(root, tmp_path, words, capsys) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--stage", "0", "--model", "nano", "--data", str(root), "-o", str(tmp_path / "o"), *words])
    assert "take NAME=NUMBER" in capsys.readouterr().err


def _plan(root, out, **changes) -> TrainPlan:
    values = {"stage": "0", "model": "nano", "steps": 2, "batch": 2, "masks": 2, "workers": 0, "save_every": 1, "device": "cpu"}
    return TrainPlan(data=(str(root),), output=str(out), **{**values, **changes})


def test_stage_1_moves_the_depth_branch_alone_and_stage_2_everything(root, tmp_path) -> None:
    start = train(_plan(root, tmp_path / "rgb", steps=1))
    maps = tmp_path / "maps" / "sa_000000"
    maps.mkdir(parents=True)
    for i in range(4):
        ramp = np.linspace(0, 65535, 96 * 128).reshape(96, 128).astype(np.uint16)
        PILImage.fromarray(ramp).save(maps / f"sa_{i}.jpg.png")
    one = _plan(root, tmp_path / "one", stage="1", model="nano-depth", init=str(start), depth_maps=str(tmp_path / "maps"), lr=1e-2)
    train(one)
    from depthseg.models.checkpoint import read

    before, after = read(start), torch.load(tmp_path / "one" / "last.pt", weights_only=True)["network"]
    for k, v in before.items():
        torch.testing.assert_close(after[k], v.to(after[k].dtype), atol=0, rtol=0, msg=k)
    assert after["alpha"] != 0.1
    two = _plan(root, tmp_path / "two", stage="2", model="nano-depth", init=str(tmp_path / "one/weights.safetensors"), lr=1e-2,
                depth_maps=str(tmp_path / "maps"), steps=1)  # fmt: skip
    train(two)
    moved = torch.load(tmp_path / "two" / "last.pt", weights_only=True)["network"]
    for part in ("image_encoder.norm.weight", "depth_encoder.norm.weight", "mask_decoder.iou_token.weight"):
        assert not torch.equal(moved[part], after[part]), part


def test_a_resumed_run_ends_as_an_uninterrupted_one(root, tmp_path) -> None:
    whole = train(_plan(root, tmp_path / "a", steps=3))
    half = _plan(root, tmp_path / "b", steps=3)
    with pytest.raises(KeyboardInterrupt):
        _interrupted(half)
    again = train(half, resume=True)
    from depthseg.models.checkpoint import read

    for (k, a), b in zip(read(whole).items(), read(again).values(), strict=True):
        assert torch.equal(a, b), k


def _interrupted(plan: TrainPlan) -> None:
    """Train, but die hard after the second step's checkpoint."""

    class Dying(Learner):
        def learn(self, *args, **kwargs):
            if self.step == 2:
                raise KeyboardInterrupt
            return super().learn(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("depthseg.train.Learner", Dying)
        train(plan)


def test_a_run_goes_on_with_its_own_samples_and_tells_of_another_version(tmp_path) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    for number in range(4):
        write_sample(data, number)
    with pytest.raises(KeyboardInterrupt):
        _interrupted(_plan(data, out, steps=3))
    begun = json.loads((out / "plan.json").read_text())
    (out / "plan.json").write_text(json.dumps({**begun, "version": "0.0.1"}))
    write_sample(data, 9)
    with pytest.raises(DepthsegError, match=r"other options: samples \(was 4, is 5\)"):
        train(_plan(data, out, steps=3), resume=True)
    (out / "plan.json").write_text(json.dumps({k: v for k, v in begun.items() if k != "samples"} | {"version": "0.0.1"}))
    notes = []
    train(_plan(data, out, steps=3), resume=True, tell=lambda kind, values: notes.append(values) if kind == "note" else None)
    assert any("began with depthseg 0.0.1" in note.get("version", "") for note in notes)


def test_refusals(root, tmp_path) -> None:
    with pytest.raises(DepthsegError, match="no stage"):
        train(_plan(root, tmp_path / "x", stage="9"))
    with pytest.raises(DepthsegError, match="starts from a trained model"):
        train(_plan(root, tmp_path / "x", stage="1"))
    start = tmp_path / "start.safetensors"
    save(build("nano", depth=False), start, {})
    with pytest.raises(DepthsegError, match="has none"):
        train(_plan(root, tmp_path / "x", stage="1", init=str(start)))
    with pytest.raises(DepthsegError, match="needs depth maps"):
        train(_plan(root, tmp_path / "x", stage="2", model="nano-depth", init=str(start)))
    (tmp_path / "maps").mkdir()
    with pytest.raises(DepthsegError, match="depth map"):
        train(_plan(root, tmp_path / "x", stage="2", model="nano-depth", init=str(start), depth_maps=str(tmp_path / "maps")))
    with pytest.raises(DepthsegError, match="no loss called blur"):
        train(_plan(root, tmp_path / "x", losses={"blur": 1.0}))
    (tmp_path / "y").mkdir()
    (tmp_path / "y" / "last.pt").touch()
    with pytest.raises(DepthsegError, match="--resume"):
        train(_plan(root, tmp_path / "y"))
    (tmp_path / "y" / "plan.json").write_text("{}")
    with pytest.raises(DepthsegError, match="other options"):
        train(_plan(root, tmp_path / "y"), resume=True)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_proposer_trains_in_both_precisions(root, tmp_path, precision) -> None:
    plan = _plan(root, tmp_path / "boxes", stage="boxes", precision=precision)
    assert train(plan).is_file()


def _weights(path):
    from depthseg.models.checkpoint import read

    return read(path)


def _same(a, b, **tolerance) -> None:
    for (k, x), y in zip(_weights(a).items(), _weights(b).values(), strict=True):
        torch.testing.assert_close(x.float(), y.float(), **(tolerance or {"atol": 0, "rtol": 0}), msg=k)


def _log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_micro_batches_change_nothing_but_rounding(root, tmp_path) -> None:
    """Masks come in unequal numbers, so this holds only because the whole step's sum is divided once."""
    whole = _plan(root, tmp_path / "a", batch=4, masks=3, batchnorm="frozen", log_every=1, lr=1e-3)
    train(whole)
    train(replace(whole, output=str(tmp_path / "b"), micro_batch=1))
    for a, b in zip(_log(tmp_path / "a"), _log(tmp_path / "b"), strict=True):
        for name in ("mask", "dice", "iou", "aux", "norm"):
            assert a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-5), name
    _same(tmp_path / "a" / "weights.safetensors", tmp_path / "b" / "weights.safetensors", atol=2e-3, rtol=1e-2)


def test_two_processes_compute_what_one_does(root, tmp_path) -> None:
    """torchrun on the CPU: the same losses and gradients as one process with the same batch, and the first one writes."""
    plan = _plan(root, tmp_path / "one", batch=4, masks=3, batchnorm="frozen", log_every=1, lr=1e-3)
    train(plan)
    code = (
        "import sys, torch, os, json; torch.set_num_threads(1)\n"
        "from depthseg.stages import TrainPlan; from depthseg.train import train\n"
        "told = json.loads(sys.argv[1]); train(TrainPlan(**{**told, 'data': tuple(told['data'])}))\n"
        "sys.stdout.flush(); os._exit(0)\n"  # gloo may abort at interpreter exit after all work is done
    )
    (tmp_path / "go.py").write_text(code)
    told = json.dumps(asdict(replace(plan, output=str(tmp_path / "two"))))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", str(tmp_path / "go.py"), told]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert (tmp_path / "two" / "weights.safetensors").exists(), done.stderr[-2000:]
    one, two = _log(tmp_path / "one"), _log(tmp_path / "two")
    for a, b in zip(one, two, strict=True):
        for name in ("mask", "dice", "iou", "aux", "norm"):
            assert a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-5), name
    _same(tmp_path / "one" / "weights.safetensors", tmp_path / "two" / "weights.safetensors", atol=2e-3, rtol=1e-2)


def test_killed_at_any_step_a_run_ends_bit_for_bit_as_if_nothing_had_happened(root, tmp_path) -> None:
    """The real command on two threads, killed by the system; with the clicks of interactive rounds and a reader's randomness in it."""
    threads = {**os.environ, "OMP_NUM_THREADS": "2"}
    words = ["train", "--stage", "0", "--model", "nano", "--data", str(root), "--batch", "2", "--masks", "4", "--boxes-share", "0.3",
             "--steps", "6", "--save-every", "1", "--log-every", "1", "--workers", "1", "--device", "cpu", "--no-preflight"]  # fmt: skip
    command = [sys.executable, "-m", "depthseg", *words]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    subprocess.run([*command, "-o", str(whole)], check=True, capture_output=True, timeout=240, env=threads)
    process = subprocess.Popen([*command, "-o", str(cut)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=threads)
    while not (cut / "log.jsonl").exists() or len((cut / "log.jsonl").read_text().splitlines()) < 3:
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert torch.load(cut / "last.pt", weights_only=True)["step"] < 6
    subprocess.run([*command, "-o", str(cut), "--resume"], check=True, capture_output=True, timeout=240, env=threads)
    a, b = (torch.load(folder / "last.pt", weights_only=True) for folder in (whole, cut))
    for name in ("network", "average"):
        assert all(torch.equal(a[name][k], b[name][k]) for k in a[name]), name
    for k, state in a["optimizer"]["state"].items():
        assert all(torch.equal(v, b["optimizer"]["state"][k][name]) for name, v in state.items())
    _same(whole / "weights.safetensors", cut / "weights.safetensors")
    losses = [[(line["step"], line["mask"], line["iou"]) for line in _log(folder)] for folder in (whole, cut)]
    assert losses[0] == losses[1], "no step is logged twice or lost"


def test_a_signal_saves_first(root, tmp_path) -> None:
    asked = iter([0, 0, 15])
    with pytest.raises(KeyboardInterrupt) as stop:
        train(_plan(root, tmp_path / "o", steps=50, save_every=1000), stop=lambda: next(asked))
    assert stop.value.args == (15,)
    assert torch.load(tmp_path / "o" / "last.pt", weights_only=True)["step"] == 3


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_all_processes_of_a_run_saves_first(root, tmp_path, number) -> None:
    """As systemd, Slurm and Ctrl-C send it; and again, as torchrun hands it on."""
    words = ["train", "--stage", "0", "--model", "nano", "--data", str(root), "--batch", "2", "--masks", "2", "--steps", "500",
             "--save-every", "1000", "--log-every", "1", "--workers", "2", "--device", "cpu", "--no-preflight"]  # fmt: skip
    words += ["-o", str(tmp_path / "o")]
    under_torchrun = {**os.environ, "TORCHELASTIC_RUN_ID": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "depthseg", *words], stderr=subprocess.PIPE, text=True, start_new_session=True, env=under_torchrun
    )
    while not (tmp_path / "o" / "log.jsonl").exists() or not (tmp_path / "o" / "log.jsonl").read_text():
        assert process.poll() is None
        time.sleep(0.01)
    for _ in range(2):
        os.killpg(process.pid, number)
        time.sleep(0.05)
    _, told = process.communicate(timeout=120)
    assert process.returncode == 128 + number and "error" not in told and told.count("once more") == 1
    assert torch.load(tmp_path / "o" / "last.pt", weights_only=True)["step"] >= 1


def test_max_hours_ends_a_sitting_not_the_schedule(root, tmp_path) -> None:
    notes = []
    plan = _plan(root, tmp_path / "a", steps=3, max_hours=0.0, save_every=1000)
    train(plan, tell=lambda kind, values: notes.append(values) if kind == "note" else None)
    assert notes == [{"stopped": "at step 1 of 3; go on with --resume"}]
    train(replace(plan, max_hours=None), resume=True)
    train(_plan(root, tmp_path / "b", steps=3, save_every=1000))
    _same(tmp_path / "a" / "weights.safetensors", tmp_path / "b" / "weights.safetensors")


def test_checkpoints_are_kept_to_a_limit_and_a_damaged_one_is_named(root, tmp_path) -> None:
    plan = _plan(root, tmp_path / "o", steps=4, keep=2)
    train(plan)
    assert sorted(f.name for f in (tmp_path / "o").glob("step-*.pt")) == ["step-00000002.pt", "step-00000003.pt"]
    (tmp_path / "o" / "last.pt").write_bytes(b"PK half")
    with pytest.raises(DepthsegError, match="cannot be read") as refused:
        train(plan, resume=True)
    assert "step-00000003.pt" in refused.value.hint
    (tmp_path / "o" / "step-00000003.pt").replace(tmp_path / "o" / "last.pt")
    train(plan, resume=True)
    train(_plan(root, tmp_path / "p", steps=4))
    _same(tmp_path / "o" / "weights.safetensors", tmp_path / "p" / "weights.safetensors")


def test_what_is_not_finite_is_skipped_then_kept_for_replay(root, tmp_path) -> None:
    lines = []
    plan = _plan(root, tmp_path / "o", steps=20, log_every=1, losses={"mask": float("inf")}, save_every=1)
    with pytest.raises(DepthsegError, match="5 steps in a row"):
        train(plan, tell=lambda kind, values: lines.append(values))
    assert [line["skipped"] for line in lines] == [1.0] * 4
    assert torch.load(tmp_path / "o" / "last.pt", weights_only=True)["step"] == 5, "to go on from, with another --lr or --precision"
    before = torch.load(tmp_path / "o" / "bad-batch-0.pt", weights_only=True)
    assert before["step"] == 5 and len(before["batches"]) == 1
    assert all(torch.isfinite(v).all() for v in before["network"].values()), "no step was taken"
    found = replay(tmp_path / "o" / "bad-batch-0.pt")
    assert found["skipped"] == 1 and np.isfinite(found["dice"])


def test_a_run_may_go_on_with_what_mends_it(root, tmp_path) -> None:
    with pytest.raises(KeyboardInterrupt):
        _interrupted(_plan(root, tmp_path / "o", steps=3))
    notes = []
    train(
        _plan(root, tmp_path / "o", steps=3, lr=1e-6),
        resume=True,
        tell=lambda kind, values: notes.append(values) if kind == "note" else None,
    )
    assert notes == [{"lr": "was None, is 1e-06 from here"}]
    train(_plan(root, tmp_path / "o", steps=4), resume=True, tell=lambda kind, values: notes.append(values) if kind == "note" else None)
    assert notes[1:] == [{"lr": "was 1e-06, is None from here"}], "it is remembered"
    with pytest.raises(DepthsegError, match=r"other options: seed \(was 0, is 1\)"):
        train(_plan(root, tmp_path / "o", steps=3, seed=1), resume=True)


def test_a_second_run_in_the_folder_is_refused(root, tmp_path) -> None:
    (tmp_path / "o").mkdir()
    with locked(tmp_path / "o"), pytest.raises(DepthsegError, match="another process is writing"):
        train(_plan(root, tmp_path / "o"))
    train(_plan(root, tmp_path / "o"))


@pytest.mark.parametrize("rounds", [0, 1])
def test_threads_add_a_gradient_up_in_one_order(root, tmp_path, rounds) -> None:
    """Several prompts of one picture give its features gradients, which threads would add as they come."""
    threads = torch.get_num_threads()
    learner, _ = _taught(root, tmp_path, masks=3, boxes_share=0.5, rounds=rounds)
    learner.optimizer.step = lambda: None  # each time from the same weights
    (alone,) = Steps(learner.task.source, learner.task.order, 1, 1, 0)[0].batches
    seen = set()
    try:
        torch.set_num_threads(2)
        for _ in range(8):
            learner.step = 0
            learner.learn([alone], 0.0)
            seen.add(b"".join(p.grad.numpy().tobytes() for p in learner.network.parameters() if p.grad is not None))
    finally:
        torch.set_num_threads(threads)
    assert len(seen) == 1 and not torch.are_deterministic_algorithms_enabled()


def _taught(root, out, **changes):
    """A learner, and the samples of its first step."""
    plan = _plan(root, out, **changes)
    learner = Learner(plan, stage_of(plan), World())
    return learner, Steps(learner.task.source, learner.task.order, 2, 2, plan.seed)[0].batches


def test_a_step_that_is_not_taken_leaves_the_statistics(root, tmp_path) -> None:
    """One infinite value in one batch would stay in the running mean, and in the average's, for good."""
    learner, batches = _taught(root, tmp_path)
    batches[0]["rgb"][0, 0, 0, 0] = float("inf")
    before = {k: v.clone() for k, v in learner.network.state_dict().items()}
    assert learner.learn(batches, 0.0)["skipped"] == 1
    assert all(torch.equal(v, before[k]) for k, v in learner.network.state_dict().items())


@pytest.mark.parametrize("scale, skipped", [(1024.0, 0.0), (0.5, 1.0)])
def test_a_gradient_that_no_scale_mends_counts_as_skipped(root, tmp_path, scale, skipped) -> None:
    learner, batches = _taught(root, tmp_path, precision="fp16")
    learner.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    learner.learns[0].register_hook(lambda grad: grad * float("nan"))
    assert learner.learn(batches, 0.0)["skipped"] == skipped


def test_what_no_loss_reaches_keeps_its_weights(root, tmp_path) -> None:
    """No prompt in training is a mask: weight decay alone would shrink the encoder of such prompts."""
    learner, batches = _taught(root, tmp_path, clip=0.0)
    before = {k: v.clone() for k, v in learner.network.named_parameters()}
    assert learner.learn(batches, 0.0)["norm"] > 0
    moved = {k for k, v in learner.network.named_parameters() if not torch.equal(v, before[k])}
    assert not any("mask_downscaling" in k for k in moved)
    assert "image_encoder.norm.weight" in moved, "--clip 0 is no limit, and a vector has no decay"


def test_clicks_are_tried_without_leaving_weights_in_autocast(root, tmp_path) -> None:
    """Those that it casts under no_grad would be used again for the losses, without a gradient (torch 2.9)."""
    learner, batches = _taught(root, tmp_path, precision="bf16", boxes_share=0.0)
    batches[0]["rounds"].fill_(1)
    asked = []
    learner.network.register_forward_pre_hook(lambda *_: asked.append((torch.is_grad_enabled(), torch.is_autocast_cache_enabled())))
    learner.learn(batches, 0.0)
    assert asked == [(False, False), (True, False)]


def test_a_full_disk_is_said(root, tmp_path, monkeypatch) -> None:
    def full(state, path):
        raise RuntimeError("[enforce fail at inline_container.cc:671] . unexpected pos 576 vs 534")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(DepthsegError, match=r"cannot be written to .* GB free"):
        train(_plan(root, tmp_path / "o"))

    def full_too(log, line):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.undo()
    monkeypatch.setattr(Log, "write", full_too)
    with pytest.raises(DepthsegError, match="takes nothing any more") as said:
        train(_plan(root, tmp_path / "p", log_every=1))
    assert "--resume" in said.value.hint


def test_checkpoints_are_kept_where_files_have_no_second_name(root, tmp_path, monkeypatch) -> None:
    def refused(source, target):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    train(_plan(root, tmp_path / "o", steps=3, keep=1))
    assert torch.load(tmp_path / "o" / "step-00000002.pt", weights_only=True)["step"] == 2


def test_what_a_run_is_told_in_vain_is_refused_or_said(root, tmp_path) -> None:
    with pytest.raises(DepthsegError, match="makes no masks that could be validated"):
        train(_plan(root, tmp_path / "o", stage="boxes", validate="x.json"))
    notes = []
    train(_plan(root, tmp_path / "new"), resume=True, tell=lambda kind, values: notes.append(values) if kind == "note" else None)
    assert "holds no checkpoint" in notes[0]["resume"]


def test_a_teacher_of_stretched_pictures_is_refused(root, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(catalog, "load", lambda name, path: SimpleNamespace(frame=StretchedFrame))
    with pytest.raises(DepthsegError, match="stretched"):
        train(_plan(root, tmp_path / "o", stage="distil", teacher_weights="x.pt"))


def test_preflight_leaves_no_trace_and_says_what_learns(root, tmp_path) -> None:
    told = {}
    train(_plan(root, tmp_path / "a"), check=True, tell=lambda kind, values: told.update(values) if kind == "preflight" else None)
    train(_plan(root, tmp_path / "b"))
    _same(tmp_path / "a" / "weights.safetensors", tmp_path / "b" / "weights.safetensors")
    assert "image_encoder 2,686,192 of 2,686,192" in told["learns"] and told["data"].startswith("4 samples")
    last, weights = ((tmp_path / "a" / name).stat().st_size for name in ("last.pt", "weights.safetensors"))
    kept = float(told["checkpoint"].split("keeps ")[1].split(" MB")[0])
    assert kept == pytest.approx((2 * last + 3 * weights) / 1e6, rel=0.05), "with AdamW's moments, which come with the first step"
    assert "saved, loaded and compared" in told["checkpoint"] and "MiB at most" in told["step"]
    assert not list((tmp_path / "a").glob("preflight*"))


def test_preflight_refuses_what_would_end_a_run_later(root, tmp_path, monkeypatch) -> None:
    (tmp_path / "bad").mkdir()
    for i in range(3):
        PILImage.new("RGB", (64, 64)).save(tmp_path / "bad" / f"sa_{i}.jpg")
        (tmp_path / "bad" / f"sa_{i}.json").write_text('{"annotations": [{"bbox": [0, 0, 4, 4]}]}')
    with pytest.raises(DepthsegError, match="3 of 3 training samples cannot be read"):
        train(_plan(tmp_path / "bad", tmp_path / "o"), check=True)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=1000))
    with pytest.raises(DepthsegError, match="this run keeps"):
        train(_plan(root, tmp_path / "p"), check=True)
    assert not list((tmp_path / "p").glob("preflight*"))


def test_broken_samples_are_named_and_have_a_limit(root, tmp_path) -> None:
    some = tmp_path / "some"
    for i in range(6):
        write_sample(some, i)
    for i in range(3):
        (some / f"sa_{i}.jpg").write_bytes(b"no picture")
    train(_plan(some, tmp_path / "a", steps=4))
    names = (tmp_path / "a" / "unreadable.txt").read_text()
    assert "sa_0.jpg" in names or "sa_1.jpg" in names or "sa_2.jpg" in names
    plan = _plan(some, tmp_path / "b", steps=40, max_unreadable=1, save_every=1000)
    with pytest.raises(DepthsegError, match="could not be read") as refused:
        train(plan)
    assert "--max-unreadable" in refused.value.hint
    assert torch.load(tmp_path / "b" / "last.pt", weights_only=True)["step"] < 40, "what was learned is kept"
    train(_plan(some, tmp_path / "d", steps=12, batch=6, masks=1, max_unreadable=3))  # three, however many epochs meet them
    assert sorted(line.split(":")[0] for line in (tmp_path / "d" / "unreadable.txt").open()) == ["sa_0.jpg", "sa_1.jpg", "sa_2.jpg"]
    (some / "sa_3.jpg").write_bytes(b"no picture")
    with pytest.raises(DepthsegError, match=r"^4 training samples"):  # one more than those of the sitting before
        train(_plan(some, tmp_path / "d", steps=24, batch=6, masks=1, max_unreadable=3), resume=True)
    for i in range(6):
        (some / f"sa_{i}.jpg").write_bytes(b"no picture")
    with pytest.raises(DepthsegError, match="in a row cannot be read"):
        train(_plan(some, tmp_path / "c"))


def test_a_damaged_depth_map_is_one_sample_that_cannot_be_read(root, tmp_path) -> None:
    maps = tmp_path / "maps" / "sa_000000"
    maps.mkdir(parents=True)
    for i in range(4):
        PILImage.fromarray(np.random.default_rng(i).integers(0, 65535, (96, 128), dtype=np.uint16)).save(maps / f"sa_{i}.jpg.png")
    whole = (maps / "sa_1.jpg.png").read_bytes()
    (maps / "sa_1.jpg.png").write_bytes(whole[: len(whole) // 2])  # its header is there, so that nothing shows before it is read
    save(build("nano", depth=True), tmp_path / "start.safetensors", {})
    train(_plan(root, tmp_path / "o", stage="1", model="nano-depth", init=str(tmp_path / "start.safetensors"), steps=4,
                depth_maps=str(tmp_path / "maps")))  # fmt: skip
    (line,) = (tmp_path / "o" / "unreadable.txt").read_text().splitlines()
    assert line.startswith("sa_000000/sa_1.jpg: ") and "depth map" in line


def test_the_next_click_goes_where_the_answer_is_most_wrong() -> None:
    target = torch.zeros(3, 20, 20)
    target[0, 2:9, 2:9] = 1
    target[1, 2:12, 2:12] = 1
    target[2, 5:8, 5:8] = 1
    logits = torch.where(target > 0, 1.0, -1.0)
    logits[0] = -1  # all missed
    logits[1, 13:19, 13:19] = 1  # more than there is
    xy, sign = deepest_errors(logits, target, torch.tensor([0.1, 0.4, 0.8]))
    assert sign.tolist() == [POSITIVE, NEGATIVE, POSITIVE]
    assert (xy[0] * 20).tolist() == [5.5, 5.5]
    assert all(15 <= v <= 17 for v in (xy[1] * 20).tolist())
    assert all(5 <= v <= 8 for v in (xy[2] * 20).tolist()), "a perfect answer is clicked inside once more"


def test_interactive_rounds_add_clicks_to_clicks_only(root) -> None:
    network = build("nano", depth=False)
    loss = MaskLoss(network, 1, 1, direct=False)
    boxes, clicks = np.full((1, TOKENS), ABSENT), np.full((1, TOKENS), ABSENT)
    boxes[0, :2], clicks[0, :2] = (CORNER_MIN, CORNER_MAX), (POSITIVE, PADDING)
    full = np.full((1, TOKENS), POSITIVE)
    full[0, -1] = PADDING
    target = torch.zeros(3, 80, 80)
    target[:, 20:50, 30:60] = 1
    batch = {
        "rgb": torch.zeros(1, 3, 160, 160),
        "owner": torch.zeros(3, dtype=torch.long),
        "rounds": torch.tensor(2),
        "target": target,
        "dither": torch.tensor([0.1, 0.4, 0.8]),
        "points": torch.full((3, TOKENS, 2), 400.0),
        "labels": torch.from_numpy(np.concatenate([boxes, clicks, full])),
    }
    points, labels = loss._interactive(network.encode(batch["rgb"]), batch)
    assert labels[0].tolist() == boxes[0].tolist() and labels[2].tolist() == full[0].tolist()
    assert labels[1, 3] == PADDING and all(v in (POSITIVE, NEGATIVE) for v in labels[1, 1:3].tolist())
    assert (points[1, 1:3] >= 0).all() and not torch.equal(points[1, 1], batch["points"][1, 1])
    batch["rounds"] = torch.tensor(0)
    assert torch.equal(loss._interactive(network.encode(batch["rgb"]), batch)[1], batch["labels"])


def test_every_stage_names_a_task_and_frozen_statistics_stay(root, tmp_path) -> None:
    start = tmp_path / "start.safetensors"
    save(build("nano", depth=False), start, {}, half=False)
    train(_plan(root, tmp_path / "tuned", stage="tune", init=str(start), lr=1e-2))
    moved = torch.load(tmp_path / "tuned" / "last.pt", weights_only=True)["network"]
    before = _weights(start)
    assert all(torch.equal(moved[k], before[k]) for k in before if "running" in k or "num_batches" in k)
    assert not torch.equal(moved["image_encoder.norm.weight"], before["image_encoder.norm.weight"])
    assert {stage.task for stage in STAGES.values()} == {"masks", "depth", "boxes", "embeddings"}


def test_overfitting_on_purpose_shows_that_the_network_learns(root, tmp_path) -> None:
    train(_plan(root, tmp_path / "o", steps=24, overfit=2, log_every=1, lr=3e-3, boxes_share=1.0, save_every=1000))
    found = [line["mask"] for line in _log(tmp_path / "o")]
    assert found[-1] < 0.8 * found[0]


def test_the_student_learns_the_teachers_embeddings(root, tmp_path, monkeypatch) -> None:
    """With a teacher of random weights: what is tested is that the error falls and only the encoder moves."""
    from depthseg.tasks import choose

    class Teacher(torch.nn.Module):
        def encode(self, x):
            assert x.shape[-1] == 1024
            small = torch.nn.functional.interpolate(x, (64, 64), mode="bilinear")
            return (small.repeat(1, 22, 1, 1)[:, :64],)

    monkeypatch.setattr(choose, "_teacher", lambda plan: Teacher())
    train(_plan(root, tmp_path / "o", stage="distil", steps=12, log_every=1, lr=2e-2, batch=1, overfit=1))
    found = [line["embedding"] for line in _log(tmp_path / "o")]
    assert found[-1] < found[0]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_masks_train_in_half_precision(root, tmp_path, precision) -> None:
    train(_plan(root, tmp_path / "o", precision=precision, log_every=1))
    assert all(np.isfinite(line["mask"]) for line in _log(tmp_path / "o"))


def test_a_run_may_go_on_in_a_precision_that_scales_its_loss(root, tmp_path) -> None:
    """As when one begun on the CPU goes on with a card that has no bf16."""
    plan = _plan(root, tmp_path / "o", precision="fp32")
    before = Learner(plan, stage_of(plan), World())
    after = Learner(replace(plan, precision="fp16", seed=1), stage_of(plan), World())
    after.load(before.state())
    for name, value in before.network.state_dict().items():
        assert torch.equal(value, after.network.state_dict()[name]), name


def test_each_process_has_a_card_of_its_own(root, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    asked = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: asked.append(str(device)))
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda kind, timeout, device_id: asked.append((kind, str(device_id))))
    monkeypatch.setenv("WORLD_SIZE", "3")
    for local in (0, 1):
        device, _ = _device(_plan(root, tmp_path, device="auto", precision="bf16"), local)
        World().start(device)
        assert asked[-2:] == [f"cuda:{local}", ("nccl", f"cuda:{local}")]
    with pytest.raises(DepthsegError, match="no device cuda:2"):
        _device(_plan(root, tmp_path, device="cuda", precision="bf16"), 2)


def _coco(root, folder):
    """The samples as COCO annotations."""
    images, rows = [], []
    for number, entry in enumerate(sa1b.index([root]), 1):
        sample = sa1b.load(entry)
        h, w = sample.pixels.shape[:2]
        images.append({"id": number, "file_name": entry.key, "width": w, "height": h})
        for rle, box, area in zip(sample.rles, masks.boxes(sample.rles), masks.area(sample.rles)):
            x0, y0, x1, y1 = box.tolist()
            rows.append({"id": len(rows) + 1, "image_id": number, "category_id": 1, "iscrowd": 0, "area": float(area),
                         "bbox": [x0, y0, x1 - x0, y1 - y0], "segmentation": rle})  # fmt: skip
    file = folder / "val.json"
    file.write_text(json.dumps({"images": images, "annotations": rows, "categories": [{"id": 1, "name": "thing"}]}))
    return file


def test_validation_is_the_evaluation_in_small(root, tmp_path) -> None:
    """The scores in the log are those of `depthseg eval` for the exported weights, and the best ones are kept."""
    file = _coco(root, tmp_path)
    plan = _plan(root, tmp_path / "o", steps=4, validate=str(file), validate_images=str(root), validate_every=2, log_every=2)
    seen = []
    train(plan, tell=lambda kind, values: seen.append(values) if kind == "validation" else None)
    lines = [line for line in _log(tmp_path / "o") if "val_miou" in line]
    assert [line["step"] for line in lines] == [2, 4] == [values["step"] for values in seen]
    assert {"val_miou", "val_miou_1", "val_miou_3", "val_miou_5", "val_iou_correlation"} <= set(lines[-1])
    assert (tmp_path / "o/best.safetensors").exists() and "| miou |" in (tmp_path / "o/weights.md").read_text()
    with PILImage.open(tmp_path / "o/validation/step-00000004.png") as sheet:
        assert sheet.width == 4 * 480
    told = ["eval", "--images", str(root), "--annotations", str(file), "--model", "nano",
            "--weights", str(tmp_path / "o/weights.safetensors"), "-o", str(tmp_path / "e")]  # fmt: skip
    subprocess.run([sys.executable, "-m", "depthseg", *told], check=True, capture_output=True, timeout=240)
    report = json.loads((tmp_path / "e" / "report.json").read_text())
    assert lines[-1]["val_miou"] == pytest.approx(report["metrics"]["miou"], abs=0.6), "fp16 kernels are all that differs"


def test_what_was_learned_is_saved_before_it_is_validated(root, tmp_path, monkeypatch) -> None:
    file = _coco(root, tmp_path)
    plan = _plan(root, tmp_path / "o", steps=3, validate=str(file), validate_images=str(root), validate_every=2, validate_count=1,
                 save_every=1000, log_every=1000)  # fmt: skip

    def failing(*args):
        raise DepthsegError("the validation picture cannot be used")

    with monkeypatch.context() as patch, pytest.raises(DepthsegError, match="validation picture"):
        patch.setattr("depthseg.train._validated", failing)
        train(plan)
    assert torch.load(tmp_path / "o" / "last.pt", weights_only=True)["step"] == 2
    train(plan, resume=True)
    assert [line["step"] for line in _log(tmp_path / "o") if "val_miou" in line] == [2, 3], "the one that was missed comes first"
    last = next(line for line in reversed(_log(tmp_path / "o")) if "val_miou" in line)
    assert (
        f"| miou | {last['val_miou']} |" in (tmp_path / "o" / "weights.md").read_text() and (tmp_path / "o" / "best.safetensors").exists()
    )


def test_a_run_that_the_clock_ends_is_validated_at_its_end(root, tmp_path) -> None:
    seen = []
    file = _coco(root, tmp_path)
    plan = _plan(root, tmp_path / "o", steps=None, minutes=0.02, validate=str(file), validate_images=str(root), validate_every=10_000,
                 validate_count=1)  # fmt: skip
    train(plan, tell=lambda kind, values: seen.append(values["step"]) if kind == "validation" else None)
    assert seen == [torch.load(tmp_path / "o" / "last.pt", weights_only=True)["step"]]


def test_the_log_has_curves_and_tensorboard(root, tmp_path) -> None:
    pytest.importorskip("tensorboard")
    train(_plan(root, tmp_path / "o", steps=4, log_every=2))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(tmp_path / "o" / "tensorboard"))
    board.Reload()
    assert [e.step for e in board.Scalars("mask")] == [2, 4]
    assert [round(e.value, 5) for e in board.Scalars("mask")] == [line["mask"] for line in _log(tmp_path / "o")]
    with PILImage.open(tmp_path / "o" / "curves.png") as curves:
        assert curves.width > 800


def test_a_fast_dev_run_does_three_steps_of_everything(root, tmp_path) -> None:
    command = [sys.executable, "-m", "depthseg", "train", "--stage", "0", "--model", "nano", "--data", str(root), "--batch", "2",
               "-o", str(tmp_path / "o"), "--fast-dev-run", "--workers", "0"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path / "o" / "fast-dev-run" / "weights.safetensors")
    assert "preflight: learns" in done.stderr and "step 3 " in done.stderr
    assert [path.name for path in (tmp_path / "o").iterdir()] == ["fast-dev-run"]


def test_the_command_under_torchrun_tries_everything_too(root, tmp_path) -> None:
    """Preflight and validation write files: two processes must not write the same ones, nor remove what the other made."""
    annotations = _coco(root, tmp_path)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "-m", "depthseg", "train",
               "--stage", "0", "--model", "nano", "--data", str(root), "--batch", "2", "-o", str(tmp_path / "o"), "--fast-dev-run",
               "--workers", "0", "--validate", str(annotations), "--validate-images", str(root)]  # fmt: skip
    for _ in range(2):  # the second one finds a folder to make anew
        done = subprocess.run(command, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == str(tmp_path / "o" / "fast-dev-run" / "weights.safetensors"), "said once"
        assert done.stderr.count("preflight: step") == 1
        assert done.stderr.count("validation: step") == 2
        left = {path.name for path in (tmp_path / "o" / "fast-dev-run").iterdir()}
        assert "last.pt" in left and not any(name.startswith("preflight") for name in left)


def test_a_teacher_that_is_not_here_is_named(root, tmp_path) -> None:
    with pytest.raises(DepthsegError, match="teacher sam-vit-h are not on this machine") as refused:
        train(_plan(root, tmp_path / "o", stage="distil"))
    assert "weights pull sam-vit-h" in refused.value.hint


@pytest.mark.slow
def test_distillation_from_a_network_of_the_catalog(root, tmp_path) -> None:
    """MobileSAM of random weights teaches L0: the embeddings of the two families have one shape."""
    entry = catalog.MODELS["mobile-sam"]
    save(catalog.resolve(entry)(**entry.args), tmp_path / "teacher.safetensors", {})
    plan = _plan(root, tmp_path / "o", stage="distil", model="efficientvit-sam-l0", teacher="mobile-sam", steps=1, batch=1, log_every=1,
                 teacher_weights=str(tmp_path / "teacher.safetensors"))  # fmt: skip
    train(plan)
    (line,) = _log(tmp_path / "o")
    assert line["embedding"] > 0 and -1 <= line["cosine"] <= 1
    plan = replace(plan, model="nano", output=str(tmp_path / "p"))
    with pytest.raises(DepthsegError, match=r"Choose a student|embeddings are"):
        train(plan)


def test_the_time_left_counts_from_the_first_word(monkeypatch, capsys) -> None:
    """Loading and the steps before it tell nothing of the speed, and a resumed run does not begin at zero."""
    clock = iter([100.0, 110.0])  # a tenth of the run in ten seconds
    monkeypatch.setattr(train_cli, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    with train_cli._shown() as tell:
        tell("log", {"step": 1, "done": 0.5})
        tell("log", {"step": 2, "done": 0.6})
    first, second = capsys.readouterr().err.splitlines()
    assert "left" not in first and second.endswith("40.0 s left")


def test_a_card_gets_as_many_readers_as_its_share_of_the_cores(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    for cores, processes, expected in ((2, 1, 2), (16, 1, 8), (16, 4, 4), (4, 8, 1)):
        monkeypatch.setattr("depthseg.train.cores", lambda cores=cores: cores)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        assert readers("cuda") == expected and readers("cpu") == 1
