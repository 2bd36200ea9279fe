"""`depthseg train`: one loop for all stages, which nothing stops for good.

A run's folder holds what it was told (plan.json), its newest state (last.pt) and earlier ones if asked for (step-N.pt), its log
(log.jsonl, curves.png), validation pictures, and what it is for: weights.safetensors, the moving average, with a card; best.safetensors
is the average at its best validation. A state is everything: killed at any step and resumed, a run on the CPU ends bit for bit as if
nothing had happened. Knows nothing of the terminal: `tell` is called with what was measured.
"""

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from depthseg import __version__
from depthseg.curves import Log
from depthseg.data import OF_THE_DISK, cores
from depthseg.depth import maps_of
from depthseg.errors import GAVE_OUT, DepthsegError
from depthseg.formats import atomic, text_file
from depthseg.journal import LOCK, locked
from depthseg.learner import MAKE_ROOM, Learner, World, stage_of
from depthseg.models import checkpoint
from depthseg.preflight import preflight
from depthseg.stages import FREE, MENDING, TrainPlan
from depthseg.tasks.batches import Step, Steps
from depthseg.validation import Validation

ENDLESS = 10**7  # steps of a run that ends by the clock
NOT_FINITE = 5  # steps in a row, after which a run is given up
BAD_BATCH = "bad-batch-{}.pt"  # of each process by its rank
UNREADABLE = "unreadable.txt"
MOST_READERS = 8  # for each process that computes; a sample costs some 30 to 120 ms of a core to read

Tell = Callable[[str, dict[str, Any]], None]  # told (what kind, its values): preflight, log, validation, note


def _silent(kind: str, values: dict[str, Any]) -> None:
    pass


def train(
    plan: TrainPlan,
    resume: bool = False,
    check: bool = False,
    anew: bool = False,
    tell: Tell = _silent,
    stop: Callable[[], int] = lambda: 0,
) -> Path:
    """Run one stage; returns the exported weights, `OUT/weights.safetensors` (the moving average, kernels in fp16).

    resume: go on from `OUT/last.pt`. check: try everything first. anew: remove what OUT holds. stop: tells the signal that asked to
    stop, 0 if none did; then the state is saved and KeyboardInterrupt raised with its number. Under torchrun every process computes its
    share of the batch; the first one writes and tells. Raises DepthsegError for what a user can mend.
    """
    world = World()
    try:
        with ExitStack() as held:
            if world.rank == 0:  # two runs in one folder would write each other's files
                Path(plan.output).mkdir(parents=True, exist_ok=True)
                held.enter_context(locked(Path(plan.output)))
            return _train(plan, world, resume, check, anew, tell, stop)
    except OSError as error:
        if error.errno not in OF_THE_DISK:
            raise
        raise DepthsegError(f"{plan.output} takes nothing any more ({error.strerror})", MAKE_ROOM, GAVE_OUT) from error


def _train(plan: TrainPlan, world: World, resume: bool, check: bool, anew: bool, tell: Tell, stop: Callable[[], int]) -> Path:
    stage = stage_of(plan)
    out = Path(plan.output)
    last = out / "last.pt"
    if last.exists() and not (resume or anew):
        raise DepthsegError(f"{out} already holds a training run", "Pass --resume to go on with it, or choose another --output.")
    if plan.validate and stage.task != "masks":
        raise DepthsegError(f"stage {plan.stage} makes no masks that could be validated", "Leave --validate out.")
    validation = Validation(plan) if plan.validate else None
    learner = Learner(plan, stage, world)
    world.start(learner.device)
    if world.rank:
        tell = _silent
    elif anew:
        _clear(out)
    world.wait()
    steps = Steps(learner.task.source, learner.task.order, stage.batch, plan.micro_batch or stage.batch, plan.seed, world.rank, world.size,
                  -(-plan.overfit // stage.batch) if plan.overfit else None)  # fmt: skip
    count = _length(plan, stage.epochs, steps)
    told = {**asdict(plan), "maps_of": maps_of(plan.depth_maps, *plan.data), "samples": learner.task.order.count}
    if resume and last.exists():
        begun, mended = _same_run(told, out)
        if mended:
            tell("note", mended)
        if mended and world.rank == 0:
            _write_plan(out, {**told, "version": begun})
        if begun not in (None, __version__):
            tell("note", {"version": f"the run began with depthseg {begun}, and goes on as {__version__} computes"})
        learner.load(_state(last, learner.device))
    elif world.rank == 0:
        if resume:
            tell("note", {"resume": f"{out} holds no checkpoint, so this is a new run"})
        (out / UNREADABLE).unlink(missing_ok=True)
        _write_plan(out, {**told, "version": __version__})
    world.wait()  # for the folder
    if check and learner.step == 0:
        for finding in preflight(learner, steps, count, out):
            tell("preflight", {finding.what: finding.said})
        if validation and world.rank == 0:
            tell("preflight", {"validation": ", ".join(f"{k} {v}" for k, v in _validated(validation, learner, out).items())})
    with _Sitting(plan, learner, world, count, out, validation, tell) as sitting:
        stopped = sitting.run(steps, stop)
    world.end()
    if stopped:
        raise KeyboardInterrupt(stopped)
    return out / "weights.safetensors"


def _clear(folder: Path) -> None:
    """Empty a run's folder, but for its lock."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name != LOCK:
            path.unlink()


def _length(plan: TrainPlan, epochs: float, steps: Steps) -> int:
    if plan.minutes is not None:
        return ENDLESS
    return plan.steps if plan.steps is not None else max(1, round(epochs * steps.order.count / steps.batch))


def _state(path: Path, device: torch.device) -> dict[str, Any]:
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        if not {"network", "average", "optimizer", "scaler", "step"} <= state.keys():
            raise ValueError("it is no state of this version")
        return state
    except Exception as error:  # a damaged file raises anything from pickle's and zipfile's to AttributeError
        earlier = sorted(path.parent.glob("step-*.pt"))
        how = f"Copy {earlier[-1].name} over it to go on from there." if earlier else "Start anew in another --output."
        raise DepthsegError(f"{path} cannot be read ({str(error)[:120]})", how) from error


def _write_plan(out: Path, told: dict[str, Any]) -> None:
    with text_file(out / "plan.json") as file:
        file.write(json.dumps(told, indent=1))


def _same_run(told: dict[str, Any], out: Path) -> tuple[str | None, dict[str, str]]:
    """The version that a run began with, and in words what of MENDING has changed. Refuses to go on with other options or samples."""
    try:
        before = json.loads((out / "plan.json").read_text())
        if not isinstance(before, dict):
            raise ValueError("no object")
    except (OSError, ValueError) as e:
        raise DepthsegError(f"{out} has a checkpoint but no readable plan.json", "Start anew in another --output.") from e
    before = {"samples": told["samples"], **before}  # which earlier runs did not note
    now = json.loads(json.dumps(told))
    differ = [f"{k} (was {before.get(k)!r}, is {v!r})" for k, v in now.items() if k not in FREE | MENDING and before.get(k) != v]
    if differ:
        raise DepthsegError(f"{out} holds a run with other options: {', '.join(differ)}", "Use the same, or another --output.")
    mended = {k: f"was {before.get(k)!r}, is {now[k]!r} from here" for k in MENDING if before.get(k) != now[k]}
    return before.get("version"), mended


def _validated(validation: Validation, learner: Learner, out: Path) -> dict[str, float]:
    return validation.score(learner.average.module, out / "validation" / f"step-{learner.step:08d}.png")


def readers(device: str) -> int:
    """Processes that read samples ahead for one that computes on this kind of device: a CPU has no core to spare, a card waits for them."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # of torchrun's processes
    return max(1, min(MOST_READERS, cores() // here)) if device == "cuda" else 1


def _deaf(worker: int) -> None:
    """Readers end with the trainer: Slurm, systemd and Ctrl-C signal every process of a job, and who saves first still needs them."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


class _Sitting:
    """The steps from here to the end, or to where this sitting is stopped; what is written on the way."""

    def __init__(self, plan: TrainPlan, learner: Learner, world: World, count: int, out: Path, validation: Validation | None, tell: Tell):
        self.plan, self.learner, self.world, self.count, self.out = plan, learner, world, count, out
        self.validation, self.tell = validation, tell
        self.first = world.rank == 0
        self.log = Log(out, learner.step) if self.first else None
        self.unreadable = int(world.of_first(len(self._noted()), learner.device))  # samples, each counted once
        self.saved = learner.step
        self.began = time.monotonic() - learner.spent
        self.opened = time.monotonic()

    def __enter__(self) -> "_Sitting":
        return self

    def __exit__(self, *_: object) -> None:
        if self.log:
            self.log.draw()
            self.log.close()

    def run(self, steps: Steps, stop: Callable[[], int]) -> int:
        """The signal that stopped it, 0 when it came to its end or to --max-hours."""
        learner, plan = self.learner, self.plan
        pinned = learner.device.type == "cuda"
        workers = readers(learner.device.type) if plan.workers is None else plan.workers
        loader = DataLoader(steps, batch_size=None, sampler=range(learner.step, self.count), num_workers=workers,
                            prefetch_factor=4 if workers else None, pin_memory=pinned, worker_init_fn=_deaf)  # fmt: skip
        window = _Window()
        bad = 0
        if self._validating() and not self._scores(learner.step):  # the sitting before was stopped while it validated
            self._validate()
        waiting = time.monotonic()
        for step in loader:
            window.wait += time.monotonic() - waiting
            if (done := self._done()) >= 1:
                break
            asked = stop()
            told = {"unreadable": self._usable(step), "stop": float(bool(asked)), "late": float(self._late())}
            log_now = (learner.step + 1) % plan.log_every == 0
            found = learner.learn(step.batches, done, told, norms=log_now)
            self.unreadable += int(found.pop("unreadable"))
            stopped, late = found.pop("stop"), found.pop("late")
            bad = bad + 1 if found["skipped"] else 0
            if bad == NOT_FINITE:
                self._give_up(step)
            window.add(found, step, self.world.size)
            if log_now:
                self._tell_log(window, found, done)
                window = _Window()
            validating = self._validating()
            if learner.step % plan.save_every == 0 or validating or stopped or late:
                self.save()
            if stopped or late:
                if not asked:
                    self.tell("note", {"stopped": f"at step {learner.step:,} of {self.count:,}; go on with --resume"})
                return asked if stopped else 0
            if validating:
                self._validate()
            waiting = time.monotonic()
        self.save()
        if self.validation and plan.minutes is not None and learner.step % plan.validate_every:  # the clock ended it between two
            self._validate()
        return 0

    def _validating(self) -> bool:
        """Whether the network is measured after the steps taken so far."""
        step = self.learner.step
        return self.validation is not None and step > 0 and (step % self.plan.validate_every == 0 or step == self.count)

    def _done(self) -> float:
        """The share of the schedule, by steps, or by the first process' clock."""
        if self.plan.minutes is None:
            return self.learner.step / self.count
        return self.world.of_first((time.monotonic() - self.began) / 60 / max(self.plan.minutes, 1e-9), self.learner.device)

    def _late(self) -> bool:
        return self.first and self.plan.max_hours is not None and time.monotonic() - self.opened > 3600 * self.plan.max_hours

    def _usable(self, step: Step) -> int:
        """Note the samples that were passed over, each once however many epochs meet it; how many are new. End the run where there are
        too many, or nothing is left."""
        new: list[str] = []
        if step.unreadable:
            known = self._noted()
            new = [reason for reason in dict.fromkeys(" ".join(r.split()) for r in step.unreadable) if reason not in known]
            with (self.out / UNREADABLE).open("a", encoding="utf-8", errors="replace") as file:
                file.writelines(reason + "\n" for reason in new)
        if self.unreadable > self.plan.max_unreadable:
            self.save()
            raise DepthsegError(
                f"{self.unreadable} training samples could not be read",
                f"{self.out / UNREADABLE} names them; mend them, or raise --max-unreadable, and go on with --resume.",
            )
        if step.failure:
            if self.world.size == 1:  # the other processes do not know of it, and would not save with this one
                self.save()
            raise DepthsegError(step.failure, "`depthseg data check` names all samples that are broken.")
        return len(new)

    def _noted(self) -> set[str]:
        """The samples that were passed over, with reasons."""
        try:
            return set((self.out / UNREADABLE).read_text(encoding="utf-8", errors="replace").splitlines())
        except FileNotFoundError:
            return set()

    def _give_up(self, step: Step) -> None:
        """Keep each process' share of the batch, and the weights that it met, for `replay`."""
        self.save()
        name = BAD_BATCH.format(self.world.rank)
        kept = {"plan": json.dumps(asdict(self.plan)), "network": self.learner.network.state_dict(), "batches": step.batches,
                "step": self.learner.step, "rank": self.world.rank}  # fmt: skip
        with atomic(self.out / name) as part:
            torch.save(kept, part)
        self.world.wait()  # who ends first ends the others
        raise DepthsegError(
            f"the loss or its gradient was not finite in {NOT_FINITE} steps in a row, up to step {self.learner.step}",
            f"{self.out / name} holds the last batch and the weights. Lower --lr, or use --precision fp32, and go on with --resume.",
        )

    def _tell_log(self, window: "_Window", found: dict[str, float], done: float) -> None:
        if not self.log:
            return
        line: dict[str, Any] = {"step": self.learner.step, "minutes": round((time.monotonic() - self.began) / 60, 2), **window.line()}
        line |= {k: round(v, 5) for k, v in found.items() if k.startswith("norm_")} | {"lr": found["lr"]}
        alpha = getattr(self.learner.network, "alpha", None)
        if alpha is not None:
            line["alpha"] = round(float(alpha.detach()), 6)
        if self.unreadable:
            line["unreadable"] = self.unreadable
        self.log.write(line)
        self.tell("log", {**line, "done": done})

    def _validate(self) -> None:
        """The first process measures; what it finds is kept with the weights."""
        if not (self.first and self.validation and self.log):
            return
        best = max((line["val_miou"] for line in self.log.lines if "val_miou" in line), default=-1.0)
        scores = _validated(self.validation, self.learner, self.out)
        better = scores["miou"] > best
        if better:  # before the log says so: a run that is killed in between measures again
            self._export("best.safetensors")
        self.log.write({"step": self.learner.step, **{f"val_{k}": v for k, v in scores.items()}})
        self.log.draw()
        self.tell("validation", {"step": self.learner.step, **scores})
        for name in ["best.safetensors"] * better + ["weights.safetensors"]:
            self._describe(name)

    def _scores(self, step: int | None = None) -> dict[str, float]:
        """What the validation measured last, or after that step."""
        lines = self.log.lines if self.log else []
        return {k: v for line in lines if step in (None, line["step"]) for k, v in line.items() if k.startswith("val_")}

    def save(self) -> None:
        """The state, and the weights for use."""
        learner = self.learner
        learner.share_buffers()
        learner.spent = time.monotonic() - self.began
        if not self.first:
            return
        last = self.out / "last.pt"
        with atomic(last) as part:
            learner.write(part)
            if self.plan.keep and last.exists() and self.saved < learner.step:
                with atomic(self.out / f"step-{self.saved:08d}.pt") as earlier:
                    earlier.unlink(missing_ok=True)
                    try:
                        os.link(last, earlier)  # costs nothing: the new file takes only the name away
                    except OSError:  # a file system without links
                        shutil.copyfile(last, earlier)
        self.saved = learner.step
        if self.plan.keep:
            for old in sorted(self.out.glob("step-*.pt"))[: -self.plan.keep]:
                old.unlink()
        self._export("weights.safetensors")

    def _export(self, name: str) -> None:
        plan, learner = self.plan, self.learner
        about = {"stage": plan.stage, "step": str(learner.step), "model": plan.model}
        checkpoint.save(learner.average.module, self.out / name, about)
        self._describe(name)

    def _describe(self, name: str) -> None:
        with text_file((self.out / name).with_suffix(".md")) as file:
            file.write(card(self.plan, self.learner.step, self._scores()))


class _Window:
    """What is measured between two lines of the log."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.steps, self.images, self.wait, self.read, self.own = 0, 0, 0.0, 0.0, 0
        self.start = time.monotonic()

    def add(self, found: dict[str, float], step: Step, processes: int) -> None:
        self.steps += 1
        own = sum(len(batch["rgb"]) for batch in step.batches)
        self.own += own
        self.images += own * processes
        self.read += step.seconds
        for name, value in found.items():
            if name != "lr" and not name.startswith("norm_"):
                self.sums[name] = self.sums.get(name, 0.0) + value

    def line(self) -> dict[str, float]:
        """Means over the steps; images per second of all processes, the share of the time that was spent waiting for samples, and the
        CPU's milliseconds to read one."""
        seconds = max(time.monotonic() - self.start, 1e-9)
        means = {k: round(v / self.steps, 5) for k, v in self.sums.items()}
        return {
            **means,
            "images_per_s": round(self.images / seconds, 2),
            "wait": round(self.wait / seconds, 4),
            "read_ms": round(1000 * self.read / max(1, self.own), 2),
        }


def card(plan: TrainPlan, step: int, scores: dict[str, float]) -> str:
    """What the exported weights are, in Markdown."""
    told = {k: v for k, v in asdict(plan).items() if v not in (None, {}, ()) and k != "output"}
    rows = "\n".join(f"| {k} | {', '.join(map(str, v)) if isinstance(v, list | tuple) else v} |" for k, v in told.items())
    found = "".join(f"| {k.removeprefix('val_')} | {v} |\n" for k, v in scores.items())
    measured = f"\n## Validation\n\n| | |\n|---|---|\n{found}" if found else ""
    return (
        f"# {plan.model}, stage {plan.stage}, step {step:,}\n\n"
        f"The moving average of the weights, kernels in fp16, by depthseg {__version__}. What may be done with them depends on the terms\n"
        f"of the training pictures and of the weights that they started from: write them here.\n\n| option | value |\n|---|---|\n{rows}\n"
        f"{measured}"
    )


def replay(path: Path, device: str = "cpu") -> dict[str, float]:
    """The losses of a process' kept batch (BAD_BATCH) with the weights that it met, as means: for finding out what was not finite."""
    kept = torch.load(path, map_location=device, weights_only=True)
    told = json.loads(kept["plan"])
    plan = TrainPlan(**{**told, "data": tuple(told["data"]), "device": device, "compile": False})
    world = World()
    world.rank, world.size = kept["rank"], 1
    learner = Learner(plan, stage_of(plan), world)
    learner.network.load_state_dict(kept["network"])
    learner.step = kept["step"] - 1
    return learner.learn(kept["batches"], 0.0)
