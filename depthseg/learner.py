"""What learns, and one step of it: network, losses, optimiser, moving average, scaler, and all of that as one state.

A step's batch may be split into micro-batches and among processes. Losses come as sums, so gradients are added up and divided once
by the number of things in the whole step: how it was split changes rounding only, as long as BatchNorm is frozen and the masks are
small enough to be compared in all cells (larger ones are at points that each part draws for itself, tasks/masks.py).
"""

import math
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import AveragedModel

from depthseg.errors import DepthsegError
from depthseg.numerics import PRECISIONS, device_of, precision_of, set_up
from depthseg.stages import BATCHNORM, STAGES, Stage, TrainPlan
from depthseg.tasks.batches import Batch
from depthseg.tasks.choose import Task, network_of, task_of

WARM_UP = 60  # steps
MAKE_ROOM = "Make room and go on with --resume, or choose another -o."
PATIENCE = timedelta(hours=6)  # the others wait while the first process validates; NCCL's own ten minutes would end the run


def stage_of(plan: TrainPlan) -> Stage:
    """The stage with what the plan changes in it. Raises DepthsegError for what does not exist."""
    if plan.stage not in STAGES:
        raise DepthsegError(f"no stage is called '{plan.stage}'", f"Stages: {', '.join(STAGES)}.")
    stage = STAGES[plan.stage]
    if unknown := set(plan.losses) - set(stage.weights):
        raise DepthsegError(f"stage {plan.stage} has no loss called {', '.join(sorted(unknown))}", f"It has {', '.join(stage.weights)}.")
    own = ("epochs", "batch", "masks", "lr", "boxes_share", "one_click", "central", "rounds", "batchnorm")
    given = {k: v for k in own if (v := getattr(plan, k)) is not None}
    stage = replace(stage, weights={**stage.weights, **plan.losses}, **given)
    if stage.batchnorm not in BATCHNORM:
        raise DepthsegError(f"BatchNorm cannot be '{stage.batchnorm}'", f"Use {' or '.join(BATCHNORM)}.")
    return stage


class World:
    """The processes of a run, as torchrun tells them: this one's rank, their number, and the sum of numbers over all."""

    def __init__(self) -> None:
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.local = int(os.environ.get("LOCAL_RANK", 0))

    def start(self, device: torch.device) -> None:
        card = device if device.type == "cuda" else None
        if card:
            torch.cuda.set_device(card)  # or every process would pin memory, and wait for the others, on the first card
        if self.size > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if card else "gloo", timeout=PATIENCE, device_id=card)

    def wait(self) -> None:
        """For all processes."""
        if self.size > 1:
            dist.barrier()

    def end(self) -> None:
        if self.size > 1 and dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()

    def sum(self, values: Tensor) -> Tensor:
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def of_first(self, value: float, device: torch.device) -> float:
        """The first process' value, for all."""
        if self.size == 1:
            return value
        shared = torch.tensor(value, dtype=torch.float64, device=device)
        dist.broadcast(shared, 0)
        return float(shared)


class Learner:
    """One run's training state. `step` counts the steps taken."""

    def __init__(self, plan: TrainPlan, stage: Stage, world: World):
        self.plan, self.stage, self.world = plan, stage, world
        self.device, self.precision = _device(plan, world.local)
        set_up(self.device, self.precision)
        if stage.batch % world.size:
            raise DepthsegError(f"a batch of {stage.batch} does not divide among {world.size} processes", "Choose --batch accordingly.")
        torch.manual_seed(plan.seed)
        self.network = network_of(plan, stage)
        for name, p in self.network.named_parameters():
            p.requires_grad_(name.startswith(stage.learns))
        if world.size > 1 and self.device.type == "cuda" and stage.batchnorm == "batch":
            self.network = nn.SyncBatchNorm.convert_sync_batchnorm(self.network)
        self.network = self.network.to(self.device).to(memory_format=torch.channels_last)
        self.learns = [p for p in self.network.parameters() if p.requires_grad]
        self.task: Task = task_of(plan, stage, self.network)
        self.optimizer = torch.optim.AdamW(self._groups(), lr=stage.lr, betas=stage.betas, fused=True)
        self.average = AveragedModel(self.network, multi_avg_fn=_ema(plan.ema), use_buffers=True)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")
        if plan.compile:
            _compile(self.network)
        self.step = 0
        self.spent = 0.0  # seconds of earlier sittings

    def _groups(self) -> list[dict]:
        """Weight decay on matrices and kernels only."""
        return [
            {"params": [p for p in self.learns if p.ndim > 1], "weight_decay": self.stage.decay},
            {"params": [p for p in self.learns if p.ndim <= 1], "weight_decay": 0.0},
        ]

    def parts(self) -> dict[str, nn.Module | nn.Parameter]:
        """The network's parts by name: its children, and alpha."""
        alone = {name: p for name, p in self.network.named_parameters(recurse=False)}
        return {**dict(self.network.named_children()), **alone}

    def learn(self, batches: list[Batch], done: float, told: dict[str, float] | None = None, norms: bool = False) -> dict[str, float]:
        """Take one step on this process' share of its batch; the mean of each loss and measurement over the whole step.

        done: share of the schedule, 0..1. told: numbers of this process; the sum over all processes comes back. norms: add the
        gradient's norm of each part. `skipped` is 1 where a loss or gradient was not finite: then nothing was changed.
        """
        torch.manual_seed((self.plan.seed * 1_000_003 + self.step) * 4099 + self.world.rank)  # so that a resumed run draws alike
        self._set_modes()
        moving = [m for m in self.network.modules() if isinstance(m, _BatchNorm) and m.training]
        before = [(b, b.clone()) for m in moving for b in m.buffers()]
        warm = min(1.0, (self.step + 1) / WARM_UP)
        rate = self.stage.lr * warm * (0.01 + 0.99 * (0.5 + 0.5 * math.cos(math.pi * done)))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        sums: dict[str, Tensor] = {}
        count = torch.zeros((), device=self.device)
        for batch in batches:
            terms, n = self._forward(batch)
            total = sum((w * terms[k] for k, w in self.stage.weights.items() if w), torch.zeros((), device=self.device))
            self.scaler.scale(total).backward()
            for k, v in terms.items():
                sums[k] = sums.get(k, 0) + v.detach().float()
            count += n.float()
        told = told or {}
        numbers = torch.stack([count, *sums.values(), *(torch.tensor(float(v), device=self.device) for v in told.values())])
        values = self.world.sum(numbers).tolist()
        number = max(values[0], 1.0)
        out = {k: v / number for k, v in zip(sums, values[1:])} | dict(zip(told, values[1 + len(sums) :]))
        taken, measured = self._apply(number, norms, all(map(math.isfinite, values[1 : 1 + len(sums)])))
        if not taken:  # a statistic that has met an infinite value once would never be finite again
            for buffer, kept in before:
                buffer.copy_(kept)
        out |= measured
        self.step += 1
        return {**out, "lr": rate}

    def _forward(self, batch: Batch) -> tuple[Batch, Tensor]:
        b = {k: v.to(self.device, non_blocking=True) for k, v in batch.items()}
        b = {k: v.to(memory_format=torch.channels_last) if v.ndim == 4 else v for k, v in b.items()}
        # without autocast's cache: in torch 2.9 weights that it has cast under no_grad get no gradient afterwards
        with torch.autocast(self.device.type, PRECISIONS[self.precision], enabled=self.precision != "fp32", cache_enabled=False):
            return self.task.loss(b)

    def _apply(self, number: float, norms: bool, finite: bool) -> tuple[bool, dict[str, float]]:
        """Bring the gradients of all processes together and step, unless they are not finite; whether it did, and what was measured."""
        # Parts that no loss reaches, such as the encoder of mask prompts, have no gradient, in all processes alike: a gradient of zero
        # would let their weights decay.
        grads = [p.grad for p in self.learns if p.grad is not None]
        if self.world.size > 1:
            flat = self.world.sum(torch.cat([g.flatten() for g in grads]))
            torch._foreach_copy_(grads, [part.view_as(g) for part, g in zip(flat.split([g.numel() for g in grads]), grads)])
        torch._foreach_div_(grads, number)
        self.scaler.unscale_(self.optimizer)
        out = {}
        if norms:
            out = {f"norm_{name}": _norm(part) for name, part in self.parts().items() if _learns(part)}
        norm = float(nn.utils.clip_grad_norm_(self.learns, self.plan.clip or math.inf))
        good = finite and math.isfinite(norm)
        if good:
            self.scaler.step(self.optimizer)
            self.average.update_parameters(self.network)
        self.scaler.update()  # an overflow of scaled gradients lowers the scale
        overflow = finite and not good and self.scaler.is_enabled() and self.scaler.get_scale() >= 1  # under 1 it is not the scale's doing
        return good, {**out, "norm": norm, "skipped": float(not good and not overflow)}

    def _set_modes(self) -> None:
        """Frozen parts, and BatchNorm where the stage says so, compute with the statistics that they have."""
        self.network.train()
        for part in self.network.children():
            part.train(_learns(part))
        if self.stage.batchnorm == "frozen":
            for module in self.network.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()

    def share_buffers(self) -> None:
        """Give all processes the mean of their running statistics: one model is kept."""
        for model in (self.network, self.average.module):
            for buffer in model.buffers():
                if self.world.size > 1 and buffer.is_floating_point():
                    self.world.sum(buffer).div_(self.world.size)

    def state(self) -> dict[str, Any]:
        return {
            "network": self.network.state_dict(), "average": self.average.state_dict(), "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(), "step": self.step, "spent": self.spent,
        }  # fmt: skip

    def write(self, path: Path) -> None:
        """The state as a file. Raises DepthsegError where it cannot be written."""
        try:
            with path.open("wb") as file:
                torch.save(self.state(), file)
                file.flush()
                os.fsync(file.fileno())  # before it takes the place of an earlier one
        except (OSError, RuntimeError) as error:  # torch's own for a full disk is a RuntimeError about positions
            free = shutil.disk_usage(path.parent).free / 1e9
            raise DepthsegError(f"the state cannot be written to {path.parent}, which has {free:.1f} GB free", MAKE_ROOM) from error

    def load(self, state: dict[str, Any]) -> None:
        for name in ("network", "average", "optimizer", "scaler"):
            if state[name]:  # that of a scaler is empty where the run began in another precision, on another device
                getattr(self, name).load_state_dict(state[name])
        self.step, self.spent = state["step"], state["spent"]


def _device(plan: TrainPlan, local: int) -> tuple[torch.device, str]:
    device = device_of(plan.device)
    if device.type == "cuda" and device.index is None:
        device = device_of(f"cuda:{local}")
    return device, precision_of(plan.precision, device)


def _learns(part: nn.Module | nn.Parameter) -> bool:
    return part.requires_grad if isinstance(part, nn.Parameter) else any(p.requires_grad for p in part.parameters())


def _norm(part: nn.Module | nn.Parameter) -> float:
    own = [part] if isinstance(part, nn.Parameter) else list(part.parameters())
    return float(torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(p.grad) for p in own if p.grad is not None])))


def _ema(decay: float) -> Callable:
    """A moving average that forgets its random start: the decay rises to its value with the number of updates."""

    @torch.no_grad()
    def update(averages: Any, current: Any, count: Any) -> None:
        d = min(decay, (1 + int(count)) / (10 + int(count)))
        kept = [(a, c.to(a.dtype)) for a, c in zip(averages, current, strict=True) if a.is_floating_point()]
        if kept:  # torch calls once for each dtype
            torch._foreach_lerp_([a for a, _ in kept], [c for _, c in kept], 1 - d)  # on a card one launch, not one for each
        for a, c in zip(averages, current, strict=True):
            if not a.is_floating_point():
                a.copy_(c)

    return update


def _compile(network: nn.Module) -> None:
    """The image encoders, whose inputs keep their shape; prompts come in all numbers."""
    for name in ("image_encoder", "depth_encoder"):
        if isinstance(part := getattr(network, name, None), nn.Module):
            part.compile()
