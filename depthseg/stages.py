"""The stages of training as rows of one table, and what one run of a stage is told. Numbers and names only.

The paper (Sec. 3.2, 4.1) gives two stages of 2 epochs, batch 4, 4 masks per image, AdamW 0.9/0.999 and the weights 20, 1, 1.0, 0.5,
0.2. What it leaves open is decided here, once; measured choices name their figures in the card of `nano`.

- Learning rates. Upstream's 6.4e-6 (EfficientViT-SAM on eight cards) for weights that are already trained; 2e-4 for the depth encoder,
  which starts at random. Cosine to a hundredth after 60 steps of warm-up; they are never scaled by the number of processes.
- Stage 1, "the depth encoder is trained independently": the RGB encoder and the head are frozen, the masks are decoded from the fused
  features, and the depth encoder and alpha learn. So the branch learns what RGB lacks, in the head's own space.
- alpha starts stage 1 at 0.1: behind 0 the depth encoder would get no gradient, and at 1 a random branch would drown F_rgb.
- direct: mask and dice loss of the masks decoded after the first of the decoder's two blocks (an intermediate prediction that needs no
  new parameter). aux: 1 - dice between the edges of prediction and truth (the paper calls it boundary-focused).
- iou: squared error of the predicted IoU of all candidates that a prompt asks for (upstream does not train it; masks could not rank).
- Prompts: half boxes, half 1 to 10 clicks with negatives among the later ones (one_click: how many of them are one click alone; central:
  how many begin where the evaluation does, deepest inside the mask). Interactive rounds: in each step up to `rounds` more
  clicks go where the network's own answer is most wrong, as the evaluation places them (upstream trains neither; the paper's
  gain at 3 and 5 clicks lies there).
- Views: crops around an object as `zoom` asks for them, and whole pictures at the native input, where clicks are asked: a click
  means a smaller thing in a larger picture. Networks of one size see whole pictures only. All are flipped at random and change their
  colours, one in ten turns grey (upstream only flips).
- BatchNorm: "batch" computes with each micro-batch's statistics (across processes on CUDA) and keeps their mean; "frozen" computes with
  the kept ones, so that neither accumulation nor the number of processes changes a result. Frozen where a trained network is tuned in
  batches of four: their statistics say little. Parts that do not learn are always frozen.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Stage:
    """One row: what learns, from which losses, how fast."""

    about: str
    task: str  # masks, embeddings, depth or boxes: what tasks/choose.py builds
    weights: dict[str, float]  # of the losses
    learns: tuple[str, ...] = ("",)  # prefixes of the parameters that learn
    lr: float = 1e-5
    decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.999)
    epochs: float = 2
    batch: int = 4  # images in one step, over all processes
    masks: int = 4  # per image
    boxes_share: float = 0.5
    one_click: float = 0.5  # share of the clicked masks that are clicked once, the rest up to ten times
    central: float = 0.5  # share of the first clicks deepest inside the mask, the rest anywhere in it
    paste: float = 0.0  # how often an object of another image is laid over the crop
    rounds: int = 0  # clicks that answer the network's own errors, at most
    alpha: float | None = None  # value to start from
    batchnorm: str = "batch"  # or frozen
    fresh: bool = False  # may start from random weights
    # encoder inputs over the crop size, how often, and how often the whole picture is shown then; only for networks that take any size
    scales: tuple[tuple[float, float, float], ...] = ((1.0, 0.6, 0.15), (2.0, 0.25, 0.7), (8 / 3, 0.15, 1.0))


_PAPER = {"mask": 20.0, "dice": 1.0, "iou": 1.0, "direct": 0.5, "aux": 0.2}
STAGES = {
    "0": Stage("a model without depth from random weights", "masks", {"mask": 4.0, "dice": 2.0, "iou": 1.0, "aux": 0.2}, lr=2e-3,
               decay=0.03, betas=(0.9, 0.98), epochs=100, batch=16, masks=3, boxes_share=0.85, paste=0.15, rounds=2, fresh=True,
               scales=((1.0, 1.0, 0.15),)),
    "1": Stage("the depth encoder alone (the paper's first)", "masks", _PAPER, ("depth_encoder.", "alpha"), lr=2e-4, alpha=0.1, rounds=2),
    "2": Stage("everything, end to end (the paper's second)", "masks", _PAPER, lr=6.4e-6, rounds=2, batchnorm="frozen"),
    "distil": Stage("the image encoder learns the embeddings of SAM ViT-H (EfficientViT-SAM's first)", "embeddings", {"embedding": 1.0},
                    ("image_encoder.",), lr=1e-3, decay=0.05, epochs=2, batch=32, fresh=True),
    "sam": Stage("end to end without depth (EfficientViT-SAM's second)", "masks", {"mask": 20.0, "dice": 1.0}, lr=6.4e-6, batch=32,
                 masks=64),
    "tune": Stage("fine-tuning on a data set of one's own", "masks", {"mask": 20.0, "dice": 1.0, "iou": 1.0, "aux": 0.2}, lr=5e-5, epochs=5,
                  batch=8, boxes_share=0.7, paste=0.15, rounds=2, batchnorm="frozen"),
    "depth": Stage("nano's depth estimator", "depth", {"depth": 1.0, "gradient": 0.5}, lr=1e-3, decay=0.03, epochs=15, batch=8,
                   fresh=True),
    "boxes": Stage("nano's box proposer", "boxes", {"score": 1.0, "box": 1.0}, lr=1e-3, decay=0.03, epochs=30, batch=8, fresh=True),
}  # fmt: skip
BATCHNORM = ("batch", "frozen")


@dataclass(frozen=True)
class TrainPlan:
    """One training run, as names and numbers. None means the stage's own value."""

    stage: str
    data: tuple[str, ...]
    output: str
    model: str = "nano-depth"
    init: str | None = None  # weights to start from
    depth_maps: str | None = None  # folder of depth maps of the training pictures (16-bit PNG, near is bright)
    teacher: str = "sam-vit-h"  # distil: a row of catalog.MODELS
    teacher_weights: str | None = None
    steps: int | None = None
    epochs: float | None = None
    minutes: float | None = None  # the schedule follows the clock instead of a number of steps; not repeatable
    max_hours: float | None = None  # stop there and keep the state; the schedule is not touched
    batch: int | None = None  # over all processes
    micro_batch: int | None = None  # images that one process computes at once; None: its whole share of the batch
    masks: int | None = None
    lr: float | None = None
    boxes_share: float | None = None  # share of the masks prompted with a box
    one_click: float | None = None
    central: float | None = None
    rounds: int | None = None
    batchnorm: str | None = None
    losses: dict[str, float] = field(default_factory=dict)  # weights in place of the stage's own
    overfit: int | None = None  # train on the first so many samples only, always the same views of them
    seed: int = 0
    device: str = "auto"
    precision: str = "auto"
    compile: bool = False  # the image encoders, by torch.compile
    workers: int | None = None  # processes that read ahead; None: one, on CUDA this process' share of the cores up to eight
    ema: float = 0.998
    clip: float = 1.0  # 0: gradients of any norm
    save_every: int = 200  # steps
    keep: int = 0  # checkpoints beside the last one
    log_every: int = 20  # steps
    validate: str | None = None  # COCO or LVIS annotations
    validate_images: str | None = None  # their folder; None: beside the annotations
    validate_depth: str = "auto"  # as --depth of segment
    validate_every: int = 500  # steps
    validate_count: int = 24  # images
    max_unreadable: int = 100  # samples
    mix: dict[str, float] = field(default_factory=dict)  # part of a source's name -> how often its pictures are drawn


# Fields that steer a run's course, not what it computes: they may change when it goes on.
FREE = {"steps", "epochs", "minutes", "max_hours", "workers", "save_every", "keep", "log_every", "device", "output", "micro_batch",
        "validate_images", "validate_every", "validate_count", "max_unreadable"}  # fmt: skip
MENDING = {"lr", "precision"}  # they change it, and may do so: how a run whose losses are no longer finite goes on
