"""From the names and numbers of a TrainPlan to a network, its samples and its losses."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from depthseg import catalog, sa1b, weights
from depthseg.augment import Asked
from depthseg.depth import DepthFolder
from depthseg.errors import MISSING_PIECE, DepthsegError
from depthseg.models import checkpoint
from depthseg.models.boxes import BoxNet
from depthseg.models.depthnet import DepthNet
from depthseg.models.depthseg import DepthSeg
from depthseg.schema import Frame
from depthseg.stages import Stage, TrainPlan
from depthseg.tasks.batches import Order, Source, chances
from depthseg.tasks.boxes import BoxLoss, BoxSource
from depthseg.tasks.depth import DepthLoss, DepthSource
from depthseg.tasks.embeddings import EmbeddingLoss, EmbeddingSource
from depthseg.tasks.masks import MaskLoss, MaskSource


@dataclass
class Task:
    """What a run feeds and minimises. The losses return sums by name, and of how many things."""

    source: Source
    order: Order
    loss: nn.Module


def network_of(plan: TrainPlan, stage: Stage) -> nn.Module:
    """The network of a stage with the weights that it starts from. Raises DepthsegError where these are missing or do not fit."""
    if stage.task == "depth":
        network: nn.Module = DepthNet()
    elif stage.task == "boxes":
        network = BoxNet()
    else:
        entry = catalog.row(catalog.MODELS, plan.model, "model")
        network = catalog.resolve(entry)(**entry.args)
        if not isinstance(network, DepthSeg):
            raise DepthsegError(f"{plan.model} cannot be trained here", "Choose nano or a model of the efficientvit-sam family.")
    if not stage.fresh and not plan.init:  # upstream's trainer goes on from random weights in silence
        raise DepthsegError(f"stage {plan.stage} starts from a trained model", "Pass --init with its weights.")
    if plan.init and isinstance(network, DepthSeg):
        checkpoint.load_into(network, Path(plan.init))
    elif plan.init:  # only the backbone of a segmenter is of use
        state = {k.split("image_encoder.", 1)[-1]: v for k, v in checkpoint.read(Path(plan.init)).items()}
        own = {k: v for k, v in state.items() if k in network.state_dict()}
        if not own:
            raise DepthsegError(f"{plan.init} shares no weights with the {stage.task} network", "Pass --init with a nano model.")
        network.load_state_dict(own, strict=False)
    if stage.alpha is not None:
        alpha = getattr(network, "alpha", None)
        if alpha is None:
            raise DepthsegError(f"stage {plan.stage} trains the depth branch, and {plan.model} has none", f"Use {plan.model}-depth.")
        with torch.no_grad():
            alpha.fill_(stage.alpha)
    return network


def task_of(plan: TrainPlan, stage: Stage, network: nn.Module) -> Task:
    """The samples and the losses of a stage. Raises DepthsegError for data that cannot serve."""
    roots = [Path(d) for d in plan.data]
    if isinstance(network, DepthNet):
        pairs = sa1b.depth_pairs(roots)[: plan.overfit]
        scenes = [p.scene.rstrip("0123456789_") for p in pairs]
        seldom = np.array([scenes.count(s) ** -0.5 for s in scenes])  # a long sequence counts less per frame
        return Task(DepthSource(pairs), Order(len(pairs), plan.seed, None if plan.overfit else seldom), DepthLoss(network))
    entries = sa1b.index(roots)[: plan.overfit]
    chance = chances([e.source for e in entries], plan.mix)
    if chance is not None:
        if not chance.any():
            raise DepthsegError("no sample is left after --mix", "Give at least one source a weight above 0.")
        entries = [e for e, often in zip(entries, chance) if often]  # what is left out is not pasted into others either
        chance = chance[chance > 0]
    order = Order(len(entries), plan.seed, chance)
    if isinstance(network, BoxNet):
        return Task(BoxSource(entries), order, BoxLoss(network))
    assert isinstance(network, DepthSeg)
    if stage.task == "embeddings":
        return Task(EmbeddingSource(entries, network.side), order, EmbeddingLoss(network, _teacher(plan)))
    direct = bool(stage.weights.get("direct"))
    loss = MaskLoss(network, stage.weights.get("mask", 0), stage.weights.get("dice", 0), direct)
    return Task(_masks(plan, stage, network, entries), order, loss)


def _masks(plan: TrainPlan, stage: Stage, network: DepthSeg, entries: list[sa1b.Entry]) -> MaskSource:
    with_depth = network.alpha is not None
    folder = None
    if with_depth and any(e.depth is None for e in entries):
        if not plan.depth_maps:
            raise DepthsegError(
                f"{plan.model} needs depth maps of the training pictures",
                "Make them once with `depthseg depth`, then pass --depth-maps FOLDER.",
            )
        folder = DepthFolder(plan.depth_maps)  # a map that is missing shall not end the run hours later
        folder.check([sa1b.picture(e) for e in entries if e.depth is None])
    sides: tuple[tuple[int, float, float], ...] = ((network.side, 1.0, 1.0),)
    if network.zoom_side < network.side:  # takes any size
        sides = tuple((round(network.zoom_side * scale / 32) * 32, share, whole) for scale, share, whole in stage.scales)
    return MaskSource(entries, folder, with_depth, masks=stage.masks, sides=sides, stride=network.mask_stride,
                      asked=Asked(stage.boxes_share, stage.one_click, stage.central), paste=stage.paste, rounds=stage.rounds)  # fmt: skip


def _teacher(plan: TrainPlan) -> nn.Module:
    """The model whose embeddings are learned, frozen."""
    entry = catalog.row(catalog.MODELS, plan.teacher, "teacher")
    path = Path(plan.teacher_weights) if plan.teacher_weights else weights.find(entry)
    if path is None:
        raise DepthsegError(
            f"the weights of the teacher {plan.teacher} are not on this machine",
            f"Pass --teacher-weights PATH, or run `depthseg weights pull {plan.teacher}` on a machine with a network.",
            MISSING_PIECE,
        )
    network = catalog.load(plan.teacher, path)
    if getattr(network, "frame", Frame) is not Frame:
        raise DepthsegError(f"{plan.teacher} sees stretched pictures, which no student here does", "Choose another --teacher.")
    return network.eval().requires_grad_(False)
