"""Before a long run: what would end it hours later is tried in a minute. Samples, a step, saving and loading, validation, disk, time."""

import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from depthseg import score
from depthseg.depth import maps_of
from depthseg.errors import DepthsegError
from depthseg.learner import WARM_UP, Learner
from depthseg.models import checkpoint
from depthseg.tasks.batches import Steps

SAMPLES = 32  # that are read


@dataclass(frozen=True)
class Finding:
    """One thing that was tried, in words."""

    what: str
    said: str


def preflight(learner: Learner, steps: Steps, count: int, folder: Path) -> Iterator[Finding]:
    """Try what the run will do, and leave the learner as it was. Raises DepthsegError for what would end the run.

    count: steps of the run.
    """
    yield Finding("learns", _parts(learner))
    yield from _samples(learner, steps)
    if made_by := maps_of(learner.plan.depth_maps, *learner.plan.data):
        yield Finding("depth", f"maps of {made_by}")
    yield from _step(learner, steps, count, folder)


def _parts(learner: Learner) -> str:
    out = []
    for name, part in learner.parts().items():
        own = [part] if isinstance(part, torch.nn.Parameter) else list(part.parameters())
        learning = sum(p.numel() for p in own if p.requires_grad)
        out.append(f"{name} {learning:,} of {sum(p.numel() for p in own):,}")
    rule = f"BatchNorm {learner.stage.batchnorm}, {learner.precision} on {learner.device}"
    return f"{', '.join(out)} parameters; {rule}"


def _samples(learner: Learner, steps: Steps) -> Iterator[Finding]:
    """Read some samples from end to end of the data: wrong layouts and damaged sets show at once."""
    rng = np.random.default_rng(0)
    setting = steps.source.setting(rng)
    some = np.unique(np.linspace(0, steps.order.count - 1, SAMPLES).astype(int)).tolist()
    wrong = []
    start = time.process_time()
    for index in some:
        try:
            steps.source.sample(index, rng, setting)
        except ValueError as error:
            wrong.append(str(error))
    seconds = (time.process_time() - start) / len(some)
    if len(wrong) > len(some) / 2:
        raise DepthsegError(
            f"{len(wrong)} of {len(some)} training samples cannot be read, such as {wrong[0]}", "`depthseg data check` names all of them."
        )
    broken = f"; {len(wrong)} of {len(some)} tried cannot be read, such as {wrong[0]}" if wrong else ""
    yield Finding("data", f"{steps.order.count:,} samples, {1000 * seconds:.1f} ms of CPU to read one{broken}")


def _step(learner: Learner, steps: Steps, count: int, folder: Path) -> Iterator[Finding]:
    """Save, take a step, load: then everything must be as it was."""
    before = {name: value.clone() for name, value in _tensors(learner).items()}
    rank = learner.world.rank  # each process tries with files of its own
    probe, weights = folder / f"preflight-{rank}.pt", folder / f"preflight-{rank}.safetensors"
    try:
        learner.write(probe)
        checkpoint.save(learner.average.module, weights, {})
        moments = 2 * sum(p.nbytes for p in learner.learns)  # of AdamW, which has none before the first step
        kept = (probe.stat().st_size + moments) * (2 + learner.plan.keep) + 3 * weights.stat().st_size
        free = shutil.disk_usage(folder).free
        if free < kept:
            raise DepthsegError(
                f"{folder} has {free / 1e9:.1f} GB free, and this run keeps {kept / 1e9:.1f} GB", "Make room, or choose another -o."
            )
        step = steps[learner.step]
        if step.failure:
            raise DepthsegError(step.failure, "Check --data.")
        start = time.perf_counter()
        found = learner.learn(step.batches, 0.5)
        first = time.perf_counter() - start
        start = time.perf_counter()
        learner.learn(step.batches, 0.5)  # the first one allocates and tunes
        seconds = min(first, time.perf_counter() - start)
        if found["skipped"]:
            raise DepthsegError("the first step's loss or gradient is not finite", "Check --init and the data, or use --precision fp32.")
        learner.load(torch.load(probe, map_location=learner.device, weights_only=True))
        changed = [name for name, value in _tensors(learner).items() if name in before and not torch.equal(value, before[name])]
        if changed:
            raise DepthsegError(f"a checkpoint does not bring back {', '.join(changed[:3])}", "This is a fault of the program: report it.")
    except OSError as error:
        raise DepthsegError(f"{folder} cannot be written ({error.strerror})", "Choose another -o.") from error
    finally:
        probe.unlink(missing_ok=True)
        weights.unlink(missing_ok=True)
    memory = torch.cuda.max_memory_allocated(learner.device) / 2**20 if learner.device.type == "cuda" else score.peak_mib()
    yield Finding("checkpoint", f"saved, loaded and compared; the run keeps {kept / 1e6:,.0f} MB, {free / 1e9:,.1f} GB are free")
    length = f"about {seconds * count / 3600:.1f} h for {count:,} steps" if count < 10**7 else "as long as --minutes says"
    if count < 4 * WARM_UP:
        yield Finding("schedule", f"{count} steps, and the first {WARM_UP} of a run are warm-up: --steps or --epochs makes it longer")
    yield Finding("step", f"{seconds:.2f} s, {memory:,.0f} MiB at most; {length} without validation")


def _tensors(learner: Learner) -> dict[str, torch.Tensor]:
    return {f"{kind}.{k}": v for kind in ("network", "average") for k, v in getattr(learner, kind).state_dict().items()}
