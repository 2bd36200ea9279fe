"""SAM's head (Kirillov et al. 2023) under the official parameter names: prompt encoder and mask decoder, prompts flat.

Differences from SAM's own code are of shape, not of function: prompts of many images come in one flat batch, all prompts are
labelled points (a box is two corners), and ragged rows are filled with ABSENT tokens that the attention does not see.
`nano` switches on two additions that a head trained from little data needs (`dense_prompt`, `skips`); official weights have neither.
"""

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from depthseg.models.efficientvit import NORM_EPS, LayerNorm2d
from depthseg.schema import ABSENT, CORNER_MAX, CORNER_MIN, NEGATIVE, POSITIVE, PROMPT_SIDE

MASK_TOKENS = 4  # token 0 answers unambiguous prompts, tokens 1..3 are the candidates for ambiguous ones


class PositionalEncoding(nn.Module):
    """Random Fourier features of positions in 0..1 (Tancik et al. 2020)."""

    positional_encoding_gaussian_matrix: Tensor

    def __init__(self, half: int):
        super().__init__()
        self.register_buffer("positional_encoding_gaussian_matrix", torch.randn(2, half))

    def forward(self, xy: Tensor) -> Tensor:
        """(..., 2) x, y in 0..1 -> (..., 2 * half)."""
        x, y = (2 * xy - 1).split(1, -1)
        a, b = self.positional_encoding_gaussian_matrix
        angle = 2 * math.pi * (x * a + y * b)  # no matrix product: autocast would round positions to bf16's 8 bits
        return torch.cat([angle.sin(), angle.cos()], -1)

    def grid(self, size: tuple[int, int]) -> Tensor:
        """Codes of the cell centres of an (h, w) grid, (h * w, 2 * half)."""
        h, w = size
        matrix = self.positional_encoding_gaussian_matrix
        y, x = (torch.arange(n, device=matrix.device, dtype=matrix.dtype).add(0.5).div(n) for n in (h, w))
        yy, xx = torch.meshgrid(y, x, indexing="ij")
        return self(torch.stack([xx, yy], -1).reshape(h * w, 2))


def prompt_maps(points: Tensor, labels: Tensor, size: int) -> Tensor:
    """Prompts drawn as pictures, for heads trained from little data: (P, 9, size, size).

    points (P, K, 2) in 0..1, labels (P, K). Channels: share of the cell inside the box, position relative to the box (u, v), two
    profiles of the inscribed ellipse, box flag; narrow bumps of positive and of negative points, a wide bump of positive ones.
    """
    centre = (torch.arange(size, device=points.device, dtype=points.dtype) + 0.5) / size
    low, high = labels == CORNER_MIN, labels == CORNER_MAX
    boxed = low.any(1)  # (P,)
    a, b = ((points * which[..., None]).sum(1) for which in (low, high))  # (P, 2)
    half = ((b - a) / 2).clamp_min(0.5 / size)
    mid = (a + b) / 2
    inside, relative = [], []
    for axis in (0, 1):  # x, y
        t = centre[None]  # (1, size)
        over = torch.minimum(t + 0.5 / size, b[:, axis, None]) - torch.maximum(t - 0.5 / size, a[:, axis, None])
        inside.append((over * size).clamp(0, 1))
        relative.append(((t - mid[:, axis, None]) / half[:, axis, None]).clamp(-3, 3))
    u = relative[0][:, None, :].expand(-1, size, -1)
    v = relative[1][:, :, None].expand(-1, -1, size)
    r2 = u * u + v * v
    out = [
        inside[0][:, None, :] * inside[1][:, :, None],
        u / 3,
        v / 3,
        torch.tanh(2 * (1 - r2)),
        torch.exp(-r2),
        torch.ones_like(u),
    ]
    out = [m * boxed[:, None, None] for m in out]

    def bumps(which: Tensor, width: float) -> Tensor:
        dx = (centre - points[..., :1]) ** 2  # (P, K, size)
        dy = (centre - points[..., 1:]) ** 2
        k = 1 / (2 * width**2)
        peaks = torch.exp(-k * dy)[..., :, None] * torch.exp(-k * dx)[..., None, :] * which[..., None, None]
        return peaks.amax(1)

    positive, negative = labels == POSITIVE, labels == NEGATIVE
    out += [bumps(positive, 0.02), bumps(negative, 0.02), bumps(positive, 0.12)]
    return torch.stack(out, 1)


PROMPT_MAPS = 9


class PromptEncoder(nn.Module):
    """Points, corners and low-resolution masks -> sparse tokens and dense embeddings."""

    def __init__(self, dim: int, dense_prompt: bool):
        super().__init__()
        self.pe_layer = PositionalEncoding(dim // 2)
        self.point_embeddings = nn.ModuleList(nn.Embedding(1, dim) for _ in range(4))  # indexed by the labels 0..3
        self.not_a_point_embed = nn.Embedding(1, dim)
        c = 16
        self.mask_downscaling = nn.Sequential(
            nn.Conv2d(1, c // 4, 2, 2), LayerNorm2d(c // 4), nn.GELU(),
            nn.Conv2d(c // 4, c, 2, 2), LayerNorm2d(c), nn.GELU(), nn.Conv2d(c, dim, 1),
        )  # fmt: skip
        self.no_mask_embed = nn.Embedding(1, dim)
        self.dense = nn.Conv2d(PROMPT_MAPS, dim, 1) if dense_prompt else None

    def tokens(self, points: Tensor, labels: Tensor) -> Tensor:
        """points (P, K, 2) in the 1024 frame, labels (P, K) -> (P, K, dim). ABSENT rows hold zeros."""
        table = torch.cat(list(self.point_embeddings.parameters()))
        real = labels >= 0
        code = self.pe_layer((points + 0.5) / PROMPT_SIDE) + F.embedding(labels.clamp_min(0), table)
        code = torch.where(real[..., None], code, self.not_a_point_embed.weight.to(code.dtype))
        return code * (labels != ABSENT)[..., None]

    def embed(self, points: Tensor, labels: Tensor, masks: Tensor | None, size: tuple[int, int]) -> Tensor:
        """What is added to the image embedding: (P or 1, dim, h, w)."""
        if masks is None:
            out = self.no_mask_embed.weight[..., None, None].expand(1, -1, *size)
        else:
            out = self.mask_downscaling(masks)
        if self.dense is not None:
            out = out + self.dense(prompt_maps(points / PROMPT_SIDE, labels, size[0]))
        return out


class Attention(nn.Module):
    """Multi-head attention whose inner width may be smaller than its outer one."""

    def __init__(self, dim: int, heads: int, downsample: int = 1):
        super().__init__()
        self.heads = heads
        inner = dim // downsample
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(dim, inner) for _ in range(3))
        self.out_proj = nn.Linear(inner, dim)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None = None) -> Tensor:
        """(P, N, dim) each; seen (P, 1, 1, keys) is False where a key must be ignored."""
        q, k, v = (
            proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for proj, x in ((self.q_proj, q), (self.k_proj, k), (self.v_proj, v))
        )
        return self.out_proj(F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2).flatten(2))

    # The same attention between few tokens t (P, T, dim) and the many cells x of an image, with less work; equal but for rounding. A
    # product of tokens, weights and cells may be taken in either order. Where each prompt has cells of its own (P, N, dim), the weights
    # are folded into the tokens, so that heads * T rows meet the cells instead of the inner width's: it pays as long as `folds`. Where
    # prompts look at few images, cells (G, N, dim) are projected once for each; `counts` says how many prompts each has, in their order.

    def folds(self, tokens: int) -> bool:
        return self.heads * tokens <= 0.75 * self.k_proj.out_features

    def _split(self, x: Tensor) -> Tensor:
        """(..., N, inner) -> (..., heads, N, d)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(-2, -3)

    def _scores(self, rows: Tensor, project: nn.Linear, cells: Tensor, counts: list[int] | None) -> Tensor:
        """Products (P, heads, T, N) of rows (P, heads, T, d) with the projected cells."""
        if counts:
            pairs = zip(rows.split(counts), self._split(project(cells)))
            return torch.cat([torch.einsum("phtd,hnd->phtn", r, c) for r, c in pairs])
        folded = rows @ project.weight.unflatten(0, (self.heads, -1))  # (P, heads, T, dim)
        always = rows @ project.bias.view(self.heads, -1, 1)
        return torch.baddbmm(always.flatten(1, 2), folded.flatten(1, 2), cells.transpose(1, 2)).unflatten(1, rows.shape[1:3])

    def from_image(self, t: Tensor, x: Tensor, placed: Tensor, counts: list[int] | None) -> Tensor:
        """What tokens gather from the cells: forward(t, placed, x). placed: the cells with their positional code."""
        q = self._split(self.q_proj(t))
        share = self._scores(q * q.shape[-1] ** -0.5, self.k_proj, placed, counts).softmax(-1)  # (P, heads, T, N)
        if counts:
            pairs = zip(share.split(counts), self._split(self.v_proj(x)))
            out = torch.cat([torch.einsum("phtn,hnd->phtd", s, v) for s, v in pairs])
        else:
            gathered = (share.flatten(1, 2) @ x).unflatten(1, q.shape[1:3])  # (P, heads, T, dim)
            out = gathered @ self.v_proj.weight.unflatten(0, (self.heads, -1)).transpose(1, 2) + self.v_proj.bias.view(self.heads, 1, -1)
        return self.out_proj(out.transpose(1, 2).flatten(2))

    def to_image(self, x: Tensor, placed: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, counts: list[int] | None) -> Tensor:
        """Cells (P, N, dim) with what they gather from the tokens: x + forward(placed, k, v, seen)."""
        k, v = self._split(self.k_proj(k)), self._split(self.v_proj(v))
        scores = self._scores(k * k.shape[-1] ** -0.5, self.q_proj, placed, counts)  # (P, heads, T, N)
        if seen is not None:
            scores = scores.masked_fill(~seen.transpose(2, 3), -torch.inf)  # (P, 1, T, 1)
        share = scores.softmax(2).flatten(1, 2).transpose(1, 2)  # over the tokens, which lie across: few in a row would be slow
        # the shares of each head add up to 1, and so does a heads' part of the bias from each of them
        sums = v @ self.out_proj.weight.unflatten(1, (self.heads, -1)).permute(1, 2, 0) + self.out_proj.bias / self.heads
        out = x.clone() if counts is None else spread(x, counts)
        if torch.is_autocast_enabled(x.device.type):  # which leaves operations in place as they are
            return out.add_(share @ sums.flatten(1, 2))
        return out.baddbmm_(share, sums.flatten(1, 2))


def _of(maps: Tensor, owner: Tensor) -> Tensor:
    """The map of each prompt's image, (P, dim, h, w) of (B, dim, h, w), channels_last.

    As maps[owner], but the gradients of an image's prompts are added up in one order however many threads there are, in less time.
    """
    return maps.permute(0, 2, 3, 1).index_select(0, owner).permute(0, 3, 1, 2)


def spread(x: Tensor, counts: list[int]) -> Tensor:
    """Cells (G, N, dim) once for each prompt, (P, N, dim)."""
    return torch.cat([own.expand(n, -1, -1) for own, n in zip(x, counts)])


class MLP(nn.Module):
    """Linear layers with ReLU between them, or the two-layer form with SAM's names lin1 and lin2."""

    def __init__(self, inside: int, hidden: int, out: int, depth: int):
        super().__init__()
        widths = [inside, *[hidden] * (depth - 1), out]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


class TokenMLP(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.lin1 = nn.Linear(dim, hidden)
        self.lin2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin2(F.relu(self.lin1(x)))


class TwoWayBlock(nn.Module):
    """Tokens attend to themselves, tokens to the image, MLP, image to the tokens."""

    def __init__(self, dim: int, heads: int, hidden: int, first: bool):
        super().__init__()
        self.first = first  # the first block's self-attention has no positional code and no residual
        self.self_attn = Attention(dim, heads)
        self.norm1, self.norm2, self.norm3, self.norm4 = (nn.LayerNorm(dim, eps=NORM_EPS) for _ in range(4))
        self.cross_attn_token_to_image = Attention(dim, heads, 2)
        self.mlp = TokenMLP(dim, hidden)
        self.cross_attn_image_to_token = Attention(dim, heads, 2)

    def forward(
        self, t: Tensor, image: Tensor, code: Tensor, image_code: Tensor, seen: Tensor | None, fold: bool, counts: list[int] | None
    ) -> tuple[Tensor, Tensor]:
        """Tokens (P, T, dim) and cells (P, N, dim). fold: in less work; then, with counts, from image (G, N, dim)."""
        if self.first:
            t = self.self_attn(t, t, t, seen)
        else:
            t = t + self.self_attn(t + code, t + code, t, seen)
        t = self.norm1(t)
        there, back = self.cross_attn_token_to_image, self.cross_attn_image_to_token
        placed = image + image_code
        t = self.norm2(t + (there.from_image(t + code, image, placed, counts) if fold else there(t + code, placed, image)))
        t = self.norm3(t + self.mlp(t))
        if fold:
            return t, self.norm4(back.to_image(image, placed, t + code, t, seen, counts))
        return t, self.norm4(image + back(placed, t + code, t, seen))


SHARED = 3  # prompts of an image from which on projecting its cells once is less work than folding their weights into each prompt


class TwoWayTransformer(nn.Module):
    def __init__(self, dim: int, heads: int, hidden: int, depth: int = 2):
        super().__init__()
        self.layers = nn.ModuleList(TwoWayBlock(dim, heads, hidden, first=i == 0) for i in range(depth))
        self.final_attn_token_to_image = Attention(dim, heads, 2)
        self.norm_final_attn = nn.LayerNorm(dim, eps=NORM_EPS)

    def forward(
        self, image: Tensor, counts: list[int] | None, image_code: Tensor, tokens: Tensor, seen: Tensor | None
    ) -> list[tuple[Tensor, Tensor]]:
        """Tokens and cells (P, h*w, dim) after each block.

        image (G, h*w, dim), each for `counts` of the prompts, in their order, or None for one each; image_code (h*w, dim); tokens
        (P, T, dim).
        """
        t, out, last = tokens, [], self.final_attn_token_to_image
        fold = not torch.is_grad_enabled() and last.folds(tokens.shape[1])
        shared = counts if fold and len(tokens) >= SHARED * len(image) else None
        if counts and not shared and len(image) < len(tokens):
            image = spread(image, counts)
        for layer in self.layers:
            t, image = layer(t, image, tokens, image_code, seen, fold, shared)
            shared = None  # from here on each prompt has cells of its own
            out.append((t, image))
        placed = image + image_code
        t = self.norm_final_attn(t + (last.from_image(t + tokens, image, placed, None) if fold else last(t + tokens, placed, image)))
        out[-1] = (t, image)
        return out


class MaskDecoder(nn.Module):
    """Image embedding and prompt tokens -> low-resolution mask logits and predicted IoU."""

    def __init__(self, dim: int, heads: int, hidden: int, iou_hidden: int, skips: tuple[int, int] | None):
        super().__init__()
        self.transformer = TwoWayTransformer(dim, heads, hidden)
        self.iou_token = nn.Embedding(1, dim)
        self.mask_tokens = nn.Embedding(MASK_TOKENS, dim)
        self.output_upscaling = nn.Sequential(
            nn.ConvTranspose2d(dim, dim // 4, 2, 2), LayerNorm2d(dim // 4), nn.GELU(),
            nn.ConvTranspose2d(dim // 4, dim // 8, 2, 2), nn.GELU(),
        )  # fmt: skip
        self.output_hypernetworks_mlps = nn.ModuleList(MLP(dim, dim, dim // 8, 3) for _ in range(MASK_TOKENS))
        self.iou_prediction_head = MLP(dim, iou_hidden, MASK_TOKENS, 3)
        if skips:  # as SAM 2 does: finer encoder features join the upscaling path
            self.skip4 = nn.Conv2d(skips[0], dim // 4, 1)
            self.skip2 = nn.Conv2d(skips[1], dim // 8, 1)
            self.dense4 = nn.Conv2d(PROMPT_MAPS, dim // 4, 1)
            self.refine = nn.Conv2d(dim // 8, dim // 8, 3, padding=1)
        self.skips = skips is not None

    def upscale(self, x: Tensor, finer: tuple[Tensor, Tensor, Tensor] | None) -> Tensor:
        """(P, dim, s, s) -> (P, dim / 8, 4s, 4s). finer: encoder features at stride 4 and 2, prompt maps at stride 4."""
        if finer is None:
            return self.output_upscaling(x)
        up1, norm, act, up2, _ = self.output_upscaling
        stride4, stride2, maps = finer
        x = act(norm(up1(x) + stride4 + self.dense4(maps)))
        x = act(up2(x) + stride2)
        return x + F.gelu(self.refine(x))

    def kernels(self, tokens: Tensor, which: tuple[int, ...]) -> Tensor:
        """What makes masks of upscaled features, (P, len(which), dim / 8), of the chosen mask tokens."""
        return torch.stack([self.output_hypernetworks_mlps[i](tokens[:, 1 + i]) for i in which], 1)

    def masks(self, kernels: Tensor, upscaled: Tensor) -> Tensor:
        """Logits (P, M, 4s, 4s) of kernels (P, M, dim / 8)."""
        return (kernels @ upscaled.flatten(2)).unflatten(-1, upscaled.shape[-2:])

    def masks_of_cells(self, kernels: Tensor, x: Tensor, size: tuple[int, int]) -> Tensor:
        """What `masks` makes of what `upscale` makes of cells (P, h * w, dim), for a head without skips; equal but for rounding.

        Matrix products with the channels last. The 2 x 2, then 4 x 4, pixels that grow out of a cell stay with it until the end, so
        that nothing is moved in between.
        """
        layers: Any = self.output_upscaling
        up1, norm, act, up2, _ = layers
        x = act(norm.by_pixel(_grown(up1, x)))  # (P, h * w, 4, c)
        x = act(_grown(up2, x).flatten(2, 3))  # (P, h * w, 16, c)
        h, w = size
        cells = (x.flatten(1, 2) @ kernels.transpose(1, 2)).view(len(x), h, w, 2, 2, 2, 2, -1)
        return cells.permute(0, 7, 1, 3, 5, 2, 4, 6).reshape(len(x), -1, 4 * h, 4 * w)


def _grown(up: Any, x: Tensor) -> Tensor:
    """A ConvTranspose2d of 2 x 2 and stride 2 for pixels (..., c): (..., 4, c')."""
    return F.linear(x, up.weight.permute(2, 3, 1, 0).flatten(0, 2), up.bias.repeat(4)).unflatten(-1, (4, -1))


class SamHead(nn.Module):
    """Prompt encoder and mask decoder: features of B images and P prompts that name their image -> P answers."""

    def __init__(
        self,
        dim: int = 256,
        heads: int = 8,
        hidden: int = 2048,
        iou_hidden: int = 256,
        dense_prompt: bool = False,
        skips: tuple[int, int] | None = None,
    ):
        super().__init__()
        self.prompt_encoder = PromptEncoder(dim, dense_prompt)
        self.mask_decoder = MaskDecoder(dim, heads, hidden, iou_hidden, skips)

    def forward(
        self,
        features: tuple[Tensor, ...],
        owner: Tensor,
        points: Tensor,
        labels: Tensor,
        masks: Tensor | None = None,
        which: range = range(MASK_TOKENS),
        intermediate: bool = False,
        best: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Logits (P, M, 4s, 4s), predicted IoU (P, M), and the logits after the first block if asked for. M is len(which).

        features: embedding (B, dim, s, s) and, for heads with skips, stride 4 and 2. owner (P,): each prompt's image.
        points (P, K, 2) in the 1024 frame, labels (P, K), masks (P, 1, 4s, 4s).
        best: of each prompt's masks only the one with the highest predicted IoU is made, M = 1.
        """
        prompt, decoder = self.prompt_encoder, self.mask_decoder
        embedding = features[0]
        size = (embedding.shape[-2], embedding.shape[-1])
        added = prompt.embed(points, labels, masks, size)
        if len(added) == len(owner):
            cells, counts = _of(embedding, owner) + added, [1] * len(owner)
        else:  # the same for all prompts of an image
            images, run = owner.unique_consecutive(return_counts=True)
            cells, counts = _of(embedding, images) + added, run.tolist()
        finer = None
        if decoder.skips:  # projected once per image, then handed to each prompt
            finer = _of(decoder.skip4(features[1]), owner), _of(decoder.skip2(features[2]), owner)
        ragged = bool((labels == ABSENT).any())
        return self.answer(cells, counts, finer, points, labels, ragged, tuple(which), intermediate, best)

    def answer(
        self,
        cells: Tensor,
        counts: list[int] | None,
        finer: tuple[Tensor, Tensor] | None,
        points: Tensor,
        labels: Tensor,
        ragged: bool,
        which: tuple[int, ...],
        intermediate: bool,
        best: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The second half of `forward`, for cells (G, dim, s, s), each of `counts` of the prompts; None: of one each.

        finer: encoder features at stride 4 and 2 of each prompt. ragged: whether some labels are ABSENT.
        """
        prompt, decoder = self.prompt_encoder, self.mask_decoder
        size = (cells.shape[-2], cells.shape[-1])
        fixed = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight]).expand(len(points), -1, -1)
        tokens = torch.cat([fixed, prompt.tokens(points, labels)], 1)
        seen = F.pad(labels != ABSENT, (fixed.shape[1], 0), value=True)[:, None, None] if ragged else None
        image_code = prompt.pe_layer.grid(size)
        steps = decoder.transformer(cells.flatten(2).transpose(1, 2), counts, image_code, tokens, seen)
        t = steps[-1][0]
        iou = decoder.iou_prediction_head(t[:, 0])[:, which[0] : which[-1] + 1]
        top = iou.argmax(1, keepdim=True) if best else None
        detail = None if finer is None else (*finer, prompt_maps(points / PROMPT_SIDE, labels, 2 * size[0]))
        answers = []
        for t, image in steps if intermediate else steps[-1:]:
            kernels = decoder.kernels(t, which)
            if top is not None:
                kernels = kernels.gather(1, top[..., None].expand(-1, -1, kernels.shape[-1]))
            if detail is None and not torch.is_grad_enabled():
                answers.append(decoder.masks_of_cells(kernels, image, size))
            else:
                answers.append(decoder.masks(kernels, decoder.upscale(image.transpose(1, 2).unflatten(-1, size), detail)))
        return answers[-1], iou if top is None else iou.gather(1, top), answers[0] if intermediate else None
