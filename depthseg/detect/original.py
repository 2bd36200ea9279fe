"""Grounding DINO by its authors' own code, the package groundingdino-py (an optional extra), with their .pth checkpoints.

The package was written for transformers 4: three methods of `BertModel` that it takes are gone. They are supplied here, to the one
instance that it builds, together with the tokens and without the downloads that it would ask for.
"""

import contextlib
import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from depthseg import catalog
from depthseg.detect.grounding import GroundingDino
from depthseg.errors import MISSING_PIECE, DepthsegError
from depthseg.plan import CONFIDENCE, MAX_BOXES


class OriginalGroundingDino(GroundingDino):
    """config: name of a file in the package's config folder. words: folder, or repository in the hub's cache, of BERT's tokenizer.

    changes: other values than the config's, bert: than BERT's own; for tests.
    """

    def __init__(
        self,
        path: str | Path,
        device: Any = "cpu",
        precision: str = "fp32",
        confidence: float = CONFIDENCE,
        max_boxes: int = MAX_BOXES,
        classes: Sequence[str] = (),
        *,
        config: str,
        words: str,
        changes: dict[str, Any] | None = None,
        bert: dict[str, Any] | None = None,
    ):
        self._config, self._words, self._changes, self._bert = config, words, changes or {}, bert or {}
        catalog.there(path, "Grounding DINO", "detector")
        super().__init__(path, device, precision, confidence, max_boxes, classes)

    def _open(self, folder: Path) -> tuple[Any, Any]:
        import torch
        from transformers import AutoTokenizer

        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):  # it prints, and torch has moved on
            warnings.simplefilter("ignore")
            try:
                import groundingdino.config
                from groundingdino.models.GroundingDINO import groundingdino as theirs
                from groundingdino.util.slconfig import SLConfig
            except ImportError as e:
                install = "Install it: pip install 'depthseg[groundingdino]'; or use --detector groundingdino-tiny."
                raise DepthsegError(f"this detector needs the package groundingdino-py ({e})", install, MISSING_PIECE) from e
            try:
                tokenizer = AutoTokenizer.from_pretrained(self._words, local_files_only=True)
            except (OSError, ValueError) as e:
                raise catalog.missing(f"the tokenizer of {self._words} is not on this machine", "detector") from e
            settings = SLConfig.fromfile(str(Path(groundingdino.config.__file__).parent / f"{self._config}.py"))
            for key, value in {"device": "cpu", "use_checkpoint": False, "use_transformer_ckpt": False, **self._changes}.items():
                setattr(settings, key, value)
            before = theirs.get_tokenlizer
            theirs.get_tokenlizer = SimpleNamespace(  # type: ignore[assignment]
                get_tokenlizer=lambda kind: tokenizer, get_pretrained_language_model=lambda kind: _bert(self._bert)
            )
            try:
                network = theirs.build_groundingdino(settings)
            finally:
                theirs.get_tokenlizer = before
        try:
            state = torch.load(folder, map_location="cpu", weights_only=True)
            state = {k.removeprefix("module."): v for k, v in state.get("model", state).items()}
            lacking, unknown = network.load_state_dict(state, strict=False)
        except Exception as e:  # a foreign pickle, or tensors of other shapes
            raise DepthsegError(
                f"{folder} is no checkpoint of Grounding DINO ({str(e).strip()[:120]})",
                "It may be damaged: `depthseg weights rm` and `depthseg weights pull` fetch it again.",
            ) from e
        expected = ("relative_position_index", "position_ids", "label_enc.")  # computed, or of the training only
        if bad := [k for k in (*lacking, *unknown) if not any(part in k for part in expected)]:
            raise DepthsegError(
                f"{folder} does not fit {self._config}: {len(bad)} other weights, like {bad[0]}", "Is it of the other size?"
            )
        return _Like(network.eval()), tokenizer


def _bert(changes: dict[str, Any]) -> Any:
    """A BERT without weights, for the checkpoint brings them, with what transformers 5 took away from it."""
    import torch
    from transformers import BertConfig, BertModel

    bert = BertModel(BertConfig(**changes))

    def additive(mask: Any, shape: Any, device: Any = None) -> Any:
        """0 where a token may look and the least number elsewhere, from a mask (B, T) or (B, T, T)."""
        mask = mask[:, None, None, :] if mask.ndim == 2 else mask[:, None]
        return (1 - mask.to(torch.float32)) * torch.finfo(torch.float32).min

    bert.get_extended_attention_mask = additive  # type: ignore[method-assign]
    bert.invert_attention_mask = lambda mask: mask  # type: ignore[method-assign]
    bert.get_head_mask = lambda mask, layers: [None] * layers  # type: ignore[method-assign]
    return bert


class _Like:
    """Their network behind the call of transformers' one."""

    def __init__(self, network: Any):
        self._network = network

    def to(self, device: Any) -> "_Like":
        self._network.to(device)
        return self

    def __call__(self, pixel_values: Any, input_ids: Any, attention_mask: Any) -> Any:
        import torch
        from groundingdino.util.misc import NestedTensor
        from transformers import BatchEncoding

        tokens = BatchEncoding({"input_ids": input_ids, "token_type_ids": torch.zeros_like(input_ids), "attention_mask": attention_mask})
        self._network.tokenizer = lambda captions, **how: tokens  # the phrases are tokens already
        padding = torch.zeros_like(pixel_values[:, 0], dtype=torch.bool)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            answer = self._network(NestedTensor(pixel_values, padding), captions=[])
        return SimpleNamespace(logits=answer["pred_logits"], pred_boxes=answer["pred_boxes"])
