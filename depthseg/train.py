"""`depthseg train`: one loop for all stages, a table of stages, checkpoints that survive a kill.

The paper (Sec. 3.2, 4.1) gives two stages of 2 epochs, batch 4, 4 masks per image, AdamW 0.9/0.999 and the weights 20, 1, 1.0, 0.5,
0.2. What it leaves open is decided here, once:

- Learning rates. Upstream's 6.4e-6 (EfficientViT-SAM, stage 2) for weights that are already trained; 2e-4 for the depth encoder,
  which starts at random.
- Stage 1, "the depth encoder is trained independently": the RGB encoder and the head are frozen (BatchNorm in eval mode), the masks
  are decoded from the fused features, and the depth encoder and alpha learn. So the branch learns what RGB lacks, in the head's own space.
- alpha starts stage 1 at 0.1: behind 0 the depth encoder would get no gradient, and at 1 a random branch would drown F_rgb.
- direct: mask and dice loss of the masks decoded after the first of the decoder's two blocks (an intermediate prediction that needs no
  new parameter). aux: 1 - dice between the edges of prediction and truth (the paper calls it boundary-focused).
- iou: squared error of the predicted IoU of all candidates that a prompt asks for (upstream does not train it; masks could not rank).
- Prompts: half boxes, half 1 to 10 clicks with negatives among the later ones (upstream never trained negatives, the evaluation uses them).

Knows nothing of the terminal: `progress` is called with what was measured.
"""

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader

from depthseg import __version__, catalog, sa1b, tasks
from depthseg.depth import DepthFolder
from depthseg.errors import DepthsegError
from depthseg.formats import atomic
from depthseg.models import checkpoint
from depthseg.models.boxes import BoxNet
from depthseg.models.depthnet import DepthNet
from depthseg.models.depthseg import DepthSeg
from depthseg.numerics import device_of, precision_of
from depthseg.schema import Image


@dataclass(frozen=True)
class Stage:
    """One row: what learns, from which losses, how fast."""

    about: str
    task: str  # masks, depth, boxes
    weights: dict[str, float]
    learns: tuple[str, ...] = ("",)  # prefixes of the parameters that learn
    lr: float = 1e-5
    decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.999)
    epochs: float = 2
    batch: int = 4
    masks: int = 4  # per image
    boxes_share: float = 0.5
    paste: float = 0.0
    alpha: float | None = None  # value to start from
    # encoder inputs over the crop size, and how often; only networks that take any size
    scales: tuple[tuple[float, float], ...] = ((1.0, 0.7), (1.6, 0.2), (2.4, 0.1))


_PAPER = {"mask": 20.0, "dice": 1.0, "iou": 1.0, "direct": 0.5, "aux": 0.2}
STAGES = {
    "0": Stage("the RGB model from random weights", "masks", {"mask": 4.0, "dice": 2.0, "iou": 1.0, "aux": 0.2}, lr=2e-3, decay=0.03,
               betas=(0.9, 0.98), epochs=100, batch=16, masks=3, boxes_share=0.85, paste=0.15, scales=((1.0, 1.0),)),
    "1": Stage("the depth encoder alone", "masks", _PAPER, ("depth_encoder.", "alpha"), lr=2e-4, alpha=0.1),
    "2": Stage("everything, end to end", "masks", _PAPER),
    "depth": Stage("nano's depth estimator", "depth", {"depth": 1.0, "gradient": 0.5}, lr=1e-3, decay=0.03, epochs=15, batch=8),
    "boxes": Stage("nano's box proposer", "boxes", {"score": 1.0, "box": 1.0}, lr=1e-3, decay=0.03, epochs=30, batch=8),
}  # fmt: skip


@dataclass(frozen=True)
class TrainPlan:
    """One training run, as names and numbers. None means the stage's own value."""

    stage: str
    data: tuple[str, ...]
    output: str
    model: str = "nano-depth"
    init: str | None = None  # weights to start from
    depth_maps: str | None = None  # folder of depth maps of the training pictures (16-bit PNG, near is bright)
    steps: int | None = None
    epochs: float | None = None
    minutes: float | None = None  # the schedule follows the clock instead of a number of steps; not repeatable
    batch: int | None = None  # over all processes
    masks: int | None = None
    lr: float | None = None
    boxes_share: float | None = None  # share of the masks prompted with a box
    losses: dict[str, float] = field(default_factory=dict)  # weights in place of the stage's own
    seed: int = 0
    device: str = "auto"
    precision: str = "auto"
    workers: int = 1
    ema: float = 0.998
    clip: float = 1.0
    save_every: int = 200  # steps
    mix: dict[str, float] = field(default_factory=dict)  # part of a source's name -> how often its pictures are drawn


def _network(plan: TrainPlan, stage: Stage) -> nn.Module:
    if stage.task == "depth":
        network: nn.Module = DepthNet()
    elif stage.task == "boxes":
        network = BoxNet()
    else:
        entry = catalog.row(catalog.MODELS, plan.model, "model")
        network = catalog.resolve(entry)(**entry.args)
        if not isinstance(network, DepthSeg):
            raise DepthsegError(f"{plan.model} cannot be trained here", "Choose nano or an EfficientViT-SAM, with or without depth.")
    if stage.task == "masks" and plan.stage != "0" and not plan.init:
        raise DepthsegError(f"stage {plan.stage} starts from a trained model", "Pass --init with its weights.")
    if plan.init:
        if stage.task == "masks":
            checkpoint.load_into(network, Path(plan.init))
        else:  # only the backbone of a segmenter is of use
            state = {k.split("image_encoder.", 1)[-1]: v for k, v in checkpoint.read(Path(plan.init)).items()}
            own = {k: v for k, v in state.items() if k in network.state_dict()}
            if not own:
                raise DepthsegError(f"{plan.init} shares no weights with the {stage.task} network", "Pass --init with a nano model.")
            network.load_state_dict(own, strict=False)
    if stage.alpha is not None:
        if getattr(network, "alpha", None) is None:
            raise DepthsegError(f"stage {plan.stage} trains the depth branch, and {plan.model} has none", f"Use {plan.model}-depth.")
        with torch.no_grad():
            network.alpha.fill_(stage.alpha)  # type: ignore[union-attr,operator]
    return network


def _data(plan: TrainPlan, stage: Stage, network: nn.Module, batch: int, rank: int) -> tuple[Any, int]:
    """The data set of one process, and how many samples an epoch has."""
    roots = [Path(d) for d in plan.data]
    common = {"batch": batch, "steps": 0, "seed": plan.seed, "rank": rank}
    if stage.task == "depth":
        pairs = sa1b.depth_pairs(roots)
        scenes = [p.scene.rstrip("0123456789_") for p in pairs]
        chance = np.array([scenes.count(s) ** -0.5 for s in scenes])  # a long sequence counts less per frame
        return tasks.DepthData(pairs, chance / chance.sum(), **common), len(pairs)
    entries = sa1b.index(roots)
    chance = np.array([next((w for part, w in plan.mix.items() if part in e.source), 1.0) for e in entries])
    if not chance.sum():
        raise DepthsegError("no sample is left after --mix", "Give at least one source a weight above 0.")
    chance = chance / chance.sum()
    if stage.task == "boxes":
        return tasks.BoxData(entries, chance, **common), int((chance > 0).sum())
    assert isinstance(network, DepthSeg)
    if network.alpha is not None and not plan.depth_maps:
        raise DepthsegError(f"{plan.model} needs depth maps of the training pictures", "Make them once, then pass --depth-maps FOLDER.")
    sides: tuple[tuple[int, float], ...]
    if network.zoom_side < network.side:  # takes any size: crops at the zoom size mostly, larger ones so that it holds there too
        z = network.zoom_side
        sides, whole = tuple((round(z * s / 32) * 32, share) for s, share in stage.scales), 0.15
    else:
        sides, whole = ((network.side, 1.0),), 1.0
    depth = DepthFolder(plan.depth_maps) if plan.depth_maps and network.alpha is not None else None
    if depth:  # a map that is missing shall not end the run hours later
        depth.check([Image(e.key, 0, e.root / e.key, (0, 0)) for e in entries])
    return tasks.MaskData(entries, chance, depth, masks=plan.masks or stage.masks, sides=sides, stride=network.mask_stride, whole=whole,
                          boxes_share=stage.boxes_share, paste=stage.paste, **common), len(entries)  # fmt: skip


def _device(plan: TrainPlan, local: int) -> tuple[torch.device, torch.dtype | None]:
    device = device_of(plan.device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", local)
    precision = precision_of(plan.precision, device)
    if precision == "fp16" and plan.precision == "auto":
        precision = "fp32"
    if precision == "fp16":
        raise DepthsegError("training in fp16 would need loss scaling, which is not built", "Use --precision bf16 or fp32.")
    return device, {"fp32": None, "bf16": torch.bfloat16}[precision]


def _groups(network: nn.Module, decay: float) -> list[dict]:
    """Weight decay on matrices and kernels only."""
    learn = [p for p in network.parameters() if p.requires_grad]
    return [{"params": [p for p in learn if p.ndim > 1], "weight_decay": decay},
            {"params": [p for p in learn if p.ndim <= 1], "weight_decay": 0.0}]  # fmt: skip


def _ema(decay: float) -> Callable:
    """A moving average that forgets its random start: the decay rises to its value with the number of updates."""

    @torch.no_grad()
    def update(averages: Any, current: Any, count: Any) -> None:
        d = min(decay, (1 + int(count)) / (10 + int(count)))
        for a, c in zip(averages, current, strict=True):
            if a.is_floating_point():
                a.lerp_(c.to(a.dtype), 1 - d)
            else:
                a.copy_(c)

    return update


def _save(path: Path, state: dict) -> None:
    with atomic(path) as part:
        torch.save(state, part)


def _same_run(plan: TrainPlan, out: Path) -> None:
    """Refuse to go on with other options than the run began with; those that only steer its course may change."""
    free = {"steps", "epochs", "minutes", "workers", "save_every", "device", "output"}
    try:
        before = json.loads((out / "plan.json").read_text())
    except (OSError, ValueError) as e:
        raise DepthsegError(f"{out} has a checkpoint but no readable plan.json", "Start anew in another --output.") from e
    now = json.loads(json.dumps(asdict(plan)))
    differ = [f"{k} (was {before.get(k)!r}, is {v!r})" for k, v in now.items() if k not in free and before.get(k) != v]
    if differ:
        raise DepthsegError(f"{out} holds a run with other options: {', '.join(differ)}", "Use the same, or another --output.")


def train(plan: TrainPlan, resume: bool = False, progress: Callable[[dict], None] | None = None) -> Path:
    """Run one stage; returns the exported weights, `OUT/weights.safetensors` (the averaged model, fp16).

    `OUT` also gets `last.pt` (everything needed to go on), `log.jsonl` (one line per 20 steps) and `plan.json`. Under torchrun every
    process computes its share of the batch and rank 0 writes. Raises DepthsegError for what a user can mend.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if plan.stage not in STAGES:
        raise DepthsegError(f"no stage is called '{plan.stage}'", f"Stages: {', '.join(STAGES)}.")
    stage = STAGES[plan.stage]
    if unknown := set(plan.losses) - set(stage.weights):
        raise DepthsegError(f"stage {plan.stage} has no loss called {', '.join(sorted(unknown))}", f"It has {', '.join(stage.weights)}.")
    stage = replace(
        stage, weights={**stage.weights, **plan.losses}, boxes_share=stage.boxes_share if plan.boxes_share is None else plan.boxes_share
    )
    device, dtype = _device(plan, int(os.environ.get("LOCAL_RANK", 0)))
    batch = plan.batch or stage.batch
    if batch % world:
        raise DepthsegError(f"a batch of {batch} does not divide among {world} processes", "Choose --batch accordingly.")
    out = Path(plan.output)
    last, log = out / "last.pt", out / "log.jsonl"
    if last.exists() and not resume:
        raise DepthsegError(f"{out} already holds a training run", "Pass --resume to go on with it, or choose another --output.")
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")

    torch.manual_seed(plan.seed)
    network = _network(plan, stage).to(device).to(memory_format=torch.channels_last)
    for name, p in network.named_parameters():
        p.requires_grad_(name.startswith(stage.learns))
    data, epoch = _data(plan, stage, network, batch // world, rank)
    if plan.minutes is not None:
        steps = 10**7
    elif plan.steps is not None:
        steps = plan.steps
    else:
        steps = max(1, round((stage.epochs if plan.epochs is None else plan.epochs) * epoch / batch))
    data = replace(data, steps=steps)

    loss_module = tasks.loss_of(network, stage.weights.get("mask", 0), stage.weights.get("dice", 0), "direct" in stage.weights).to(device)
    forward: nn.Module = loss_module
    if world > 1:
        forward = nn.parallel.DistributedDataParallel(loss_module, find_unused_parameters=True)
    lr = stage.lr if plan.lr is None else plan.lr
    optimizer = torch.optim.AdamW(_groups(network, stage.decay), lr=lr, betas=stage.betas)
    average = AveragedModel(network, multi_avg_fn=_ema(plan.ema), use_buffers=True)
    step, spent = 0, 0.0
    if resume and last.exists():
        _same_run(plan, out)
        state = torch.load(last, map_location=device, weights_only=True)
        network.load_state_dict(state["network"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"].cpu())
        step, spent = state["step"], state["spent"]
    elif rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        with atomic(out / "plan.json") as part:
            part.write_text(json.dumps({**asdict(plan), "version": __version__}, indent=1))

    def save() -> None:
        if rank == 0:
            _save(last, {"network": network.state_dict(), "average": average.state_dict(), "optimizer": optimizer.state_dict(),
                         "rng": torch.get_rng_state(), "step": step, "spent": spent + time.monotonic() - begun})  # fmt: skip
            checkpoint.save(average.module, out / "weights.safetensors", {"stage": plan.stage, "step": str(step), "model": plan.model})

    loader = DataLoader(data, batch_size=None, sampler=range(step, steps), num_workers=plan.workers,
                        prefetch_factor=4 if plan.workers else None)  # fmt: skip
    begun = mark = time.monotonic()
    sums: dict[str, float] = {}
    count = 0
    forward.train()
    if stage.learns != ("",):  # frozen parts keep their statistics
        for module in network.children():
            module.train(any(p.requires_grad for p in module.parameters()))
    for b in loader:
        done = (spent + time.monotonic() - begun) / 60 / max(plan.minutes, 1e-9) if plan.minutes is not None else step / steps
        if world > 1 and plan.minutes is not None:  # one clock for all
            clock = torch.tensor(done, dtype=torch.float64, device=device)
            dist.broadcast(clock, 0)
            done = float(clock)
        if done >= 1:
            break
        warm = min(1.0, (step + 1) / 60)
        for group in optimizer.param_groups:
            group["lr"] = lr * warm * (0.01 + 0.99 * (0.5 + 0.5 * float(np.cos(np.pi * done))))
        b = {k: v.to(device, non_blocking=True) for k, v in b.items()}
        for k in ("rgb", "depth"):
            if k in b:
                b[k] = b[k].to(memory_format=torch.channels_last)
        with torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None):
            parts = forward(b)
        total = sum(w * parts[k] for k, w in stage.weights.items())
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        norm = nn.utils.clip_grad_norm_([p for p in network.parameters() if p.requires_grad], plan.clip)
        if torch.isfinite(norm):  # one bad batch shall not end the run; it shows in the log as skipped
            optimizer.step()
            average.update_parameters(network)
        else:
            sums["skipped"] = sums.get("skipped", 0) + 1
        step += 1
        count += len(b["rgb"])
        for k, v in parts.items():
            sums[k] = sums.get(k, 0) + float(v.detach())
        if step % 20 == 0 and rank == 0:
            now = time.monotonic()
            line = {"step": step, "minutes": round((spent + now - begun) / 60, 2), "lr": optimizer.param_groups[0]["lr"],
                    "samples_per_s": round(world * count / (now - mark), 2), "norm": round(float(norm), 3),
                    **{k: round(v / 20, 4) for k, v in sums.items()}}  # fmt: skip
            if getattr(network, "alpha", None) is not None:
                line["alpha"] = float(network.alpha.detach())  # type: ignore[union-attr,operator]
            with log.open("a") as f:
                f.write(json.dumps(line) + "\n")
            if progress:
                progress({**line, "done": done})
            sums, count, mark = {}, 0, now
        if step % plan.save_every == 0:
            save()
    save()
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()
    return out / "weights.safetensors"
