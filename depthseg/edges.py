"""From low-resolution logits to RLE on the device that has them: full-size masks never leave it, only where their runs begin and end.

What `Frame.crop` and `masks.encode_crop` do on the host, in SAM's own two steps, which a card does faster than it could copy the logits.
"""

from torch import Tensor
from torch.nn import functional as F

from depthseg import masks
from depthseg.schema import PROMPT_SIDE, Frame

_AT_ONCE = 2**25  # pixels: 128 MiB of logits


def rles(low: Tensor, frame: Frame) -> list[dict]:
    """Compressed RLE of the masks of logits (P, s, s), as the frame's picture is large."""
    out: list[dict] = []
    for some in low.float().split(max(1, _AT_ONCE // (PROMPT_SIDE**2 + frame.size[0] * frame.size[1]))):
        out += _rles(some[:, None], frame)
    return out


def _rles(low: Tensor, frame: Frame) -> list[dict]:
    (h, w), (ih, iw) = frame.size, frame.prompt_inner
    square = F.interpolate(low, (PROMPT_SIDE, PROMPT_SIDE), mode="bilinear")[..., :ih, :iw]
    mask = F.interpolate(square, (h, w), mode="bilinear")[:, 0] > 0
    columns = F.pad(mask.transpose(1, 2).flatten(1), (1, 0))  # RLE goes down the columns, and begins outside the mask
    row, at = (columns[:, 1:] != columns[:, :-1]).nonzero(as_tuple=True)
    counts = row.bincount(minlength=len(low)).tolist()
    return [masks.encode_edges(own.numpy(), (h, w)) for own in at.cpu().split(counts)]


def stability(low: Tensor, frame: Frame, offset: float = 1.0) -> Tensor:
    """`masks.stability` of logits (P, s, s) without their padding: (P,) on their device."""
    h, w = frame.valid(low.shape[-1])
    inner, outer = ((low[:, :h, :w] > limit).sum((1, 2)) for limit in (offset, -offset))
    return inner / outer.clamp_min(1)
