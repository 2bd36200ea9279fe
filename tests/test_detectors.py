"""The networks of others behind our contract: D-FINE, RT-DETRv2, Grounding DINO and ViTDet, tiny and random, and class names."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image as PILImage

from depthseg import backends, catalog, cli
from depthseg.data import find, read
from depthseg.detect import BoxesFile, classes
from depthseg.detect.choose import detector as choose_detector
from depthseg.detect.classes import COCO, COCO_NAMES, choose, lvis, table, vocabulary, words
from depthseg.detect.grounding import GroundingDino, _input, _size
from depthseg.detect.hub import HubDetector
from depthseg.detect.original import OriginalGroundingDino
from depthseg.detect.vitdet import ViTDet
from depthseg.errors import MISSING_PIECE, SOME_FAILED, USAGE, DepthsegError
from depthseg.models.vitdet import Variant
from depthseg.models.vitdet import ViTDet as Network
from depthseg.plan import READER, Plan
from depthseg.schema import Image


def image(h=40, w=60, seed=0) -> Image:
    return Image(f"{seed}.jpg", seed, None, (h, w), np.random.default_rng(seed).integers(0, 256, (h, w, 3), dtype=np.uint8))


IMAGES = [image(), image(60, 40, 1), image(40, 60, 2), image(1, 1, 3), image(3, 200, 4)]


def agree(detector, images=IMAGES) -> None:
    """A batch answers as each image alone, inside the image, best first; no images give no answers."""
    together = detector(images)
    assert len(together) == len(images) and detector([]) == []
    for item, a in zip(images, together, strict=True):
        (b,) = detector([item])
        assert len(a) == len(b) and len(a) <= detector.max_boxes
        if not len(a):
            continue
        assert np.abs(a.xyxy - b.xyxy).max() < 1e-3 and np.abs(a.score - b.score).max() < 1e-5 and np.array_equal(a.label, b.label)
        h, w = item.size
        assert (a.xyxy >= 0).all() and (a.xyxy[:, 2] <= w).all() and (a.xyxy[:, 3] <= h).all() and (np.diff(a.score) <= 0).all()
        assert set(a.names) == set(a.label.tolist())
    assert any(len(found) for found in together)


def needs(backend: str) -> None:
    """Skip the test where the backend cannot run."""
    try:
        backends.check(backend, torch.device("cpu"))
    except DepthsegError as error:
        pytest.skip(error.message)


# ---- class names ----


def test_class_tables():
    assert len(lvis()) == 1203 and lvis()[1] == "aerosol_can" and lvis()[1203] == "zucchini"
    assert len(COCO) == 80 and COCO[90] == "toothbrush"
    voc = {v: k for k, v in classes._OTHERS.items()}
    assert table([voc.get(n, n) for n in COCO_NAMES]) == COCO == table(COCO_NAMES)  # as RT-DETR's config spells them
    assert table(["a", "b"]) == {0: "a", 1: "b"} and table(list(lvis().values())) == lvis()
    assert vocabulary(["coco"]) == COCO and vocabulary(["LVIS"]) == lvis() and vocabulary(["cat", "a dog", "cat"]) == {1: "cat", 2: "a dog"}
    assert words("bow_(decorative_ribbons)") == "bow" and words("A/C  unit?") == "a c unit" and words("a (red) car") == "a (red) car"


def test_classes_are_chosen_by_name_or_id():
    assert choose([], COCO, "it") is None
    assert choose(["Cat", "hot dog", "90"], COCO, "it") == [17, 58, 90]
    assert choose(["aerosol can"], lvis(), "it") == [1]
    assert choose(["bow"], lvis(), "it") == [136, 137]  # the weapon and that of ribbons
    with pytest.raises(DepthsegError, match="it knows no class 'catt'") as error:
        choose(["catt"], COCO, "it")
    assert "cat" in error.value.hint
    with pytest.raises(DepthsegError, match="'qqqq'") as error:
        choose(["qqqq"], COCO, "it")
    assert "person" in error.value.hint


# ---- D-FINE and RT-DETRv2 ----


@pytest.fixture(scope="module", params=["DFine", "RTDetrV2"])
def detr(request, tmp_path_factory):
    import transformers

    torch.manual_seed(0)
    stages = {"depths": [1, 1, 1, 1], "out_features": ["stage2", "stage3", "stage4"]}
    if request.param == "RTDetrV2":
        backbone = transformers.RTDetrResNetConfig(embedding_size=8, hidden_sizes=[8, 8, 16, 16], **stages)
    else:
        of_stages = {"in_channels": [8, 8, 8, 16], "mid_channels": [8] * 4, "out_channels": [8, 8, 16, 16], "num_blocks": [1] * 4}
        backbone = transformers.HGNetV2Config(
            stem_channels=[3, 8, 8], hidden_sizes=[8, 8, 16, 16], **{f"stage_{k}": v for k, v in of_stages.items()}, **stages
        )
    names = dict(enumerate(COCO_NAMES))
    config = getattr(transformers, f"{request.param}Config")(
        backbone_config=backbone, encoder_in_channels=[8, 16, 16], encoder_hidden_dim=16, encoder_ffn_dim=16, encoder_attention_heads=2,
        d_model=16, num_queries=20, decoder_in_channels=[16] * 3, decoder_ffn_dim=16, decoder_layers=2, decoder_attention_heads=2,
        feat_strides=[8, 16, 32], id2label=names, label2id={v: k for k, v in names.items()},
    )  # fmt: skip
    network = getattr(transformers, f"{request.param}ForObjectDetection")(config)
    for p in network.parameters():  # as it starts, all queries are nearly equal, and which are the best is chance
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=(2 / p[0].numel()) ** 0.5)
    folder = tmp_path_factory.mktemp(request.param)
    network.save_pretrained(folder)
    transformers.RTDetrImageProcessorPil(size={"height": 64, "width": 64}).save_pretrained(folder)
    return folder


def test_a_detr_in_a_batch_equals_one_by_one(detr):
    detector = HubDetector(detr, confidence=0.0, max_boxes=10)
    agree(detector)
    assert set(detector([image()])[0].label.tolist()) <= set(COCO)


def test_a_detr_limited_to_classes(detr):
    every = HubDetector(detr, confidence=0.0, max_boxes=1000)([image()])[0]
    kept = int(every.label[0])
    (some,) = HubDetector(detr, confidence=0.0, max_boxes=1000, classes=[COCO[kept]])([image()])
    assert len(some) == (every.label == kept).sum() > 0 and set(some.label.tolist()) == {kept}
    with pytest.raises(DepthsegError, match="knows no class 'zebr'") as error:
        HubDetector(detr, classes=["zebr"])
    assert "zebra" in error.value.hint


@pytest.mark.parametrize("backend", ["openvino", pytest.param("compile", marks=pytest.mark.slow)])
def test_a_detr_by_another_backend_answers_as_torch(detr, backend):
    """Every query has its counterpart: which comes first may differ where two score alike."""
    needs(backend)
    plain, other = (HubDetector(detr, confidence=0.0, max_boxes=10, backend=b) for b in ("torch", backend))
    x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        one, two = (torch.cat(detector._network(x), -1) for detector in (plain, other))  # (2, 20, 80 + 4)
    assert one.shape == two.shape == (2, 20, 84)
    between = (one[:, :, None] - one[:, None]).abs().amax(-1) + 9 * torch.eye(20)
    assert between.min() > 2e-3  # or the next assertion would hold for a single query, found twenty times
    apart = (one[:, :, None] - two[:, None]).abs().amax(-1)
    assert apart.amin(1).max() < 5e-4 and apart.amin(2).max() < 5e-4
    for a, b in zip(plain(IMAGES), other(IMAGES), strict=True):
        assert len(a) == len(b) == 10 and np.abs(a.score - b.score).max() < 1e-4
    agree(other)


def test_a_detr_by_torch_is_what_transformers_gives(detr):
    import transformers

    network = transformers.AutoModelForObjectDetection.from_pretrained(detr).eval()
    processor = transformers.RTDetrImageProcessorPil.from_pretrained(detr)
    x = processor(images=[PILImage.fromarray(i.pixels) for i in IMAGES], return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        theirs = network(x)
        ours = HubDetector(detr)._network(x)
    assert torch.equal(theirs.logits, ours[0]) and torch.equal(theirs.pred_boxes, ours[1])


def test_folders_that_are_no_such_model(detr, tmp_path):
    with pytest.raises(DepthsegError) as error:
        HubDetector(tmp_path)
    assert error.value.code == MISSING_PIECE
    (tmp_path / "model.safetensors").write_bytes(b"cut off")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(DepthsegError, match="not the config of a model"):
        HubDetector(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(DepthsegError, match="of type bert"):
        HubDetector(tmp_path)
    (tmp_path / "config.json").write_bytes((detr / "config.json").read_bytes())
    with pytest.raises(DepthsegError, match="cannot be loaded"):
        HubDetector(tmp_path)


def test_detect_writes_what_boxes_reads(detr, pictures, tmp_path, capsys):
    (pictures / "broken.jpg").write_bytes(b"no picture")
    out = tmp_path / "new" / "boxes.json"
    words = ["detect", pictures, "-o", out, "--detector", "dfine-nano", "--detector-weights", detr, "--confidence", "0", "--max-boxes", "7"]
    with pytest.raises(SystemExit) as leaving:
        cli.main(list(map(str, words)))
    told = capsys.readouterr()
    assert leaving.value.code == SOME_FAILED and told.out.split() == [str(out)] and "broken.jpg" in told.err and "21 boxes" in told.err
    images = [read(i) for i in find([pictures]) if i.key != "broken.jpg"]
    expected = HubDetector(detr, confidence=0.0, max_boxes=7)(images)
    again = BoxesFile(out)(images)
    for a, b in zip(expected, again, strict=True):
        assert len(a) == len(b) == 7 and np.abs(a.xyxy - b.xyxy).max() < 2e-3 and np.abs(a.score - b.score).max() < 1e-6
        assert np.array_equal(a.label, b.label) and set(a.names.items()) <= set(b.names.items())
    assert [p.name for p in out.parent.iterdir()] == ["boxes.json"]


@pytest.mark.parametrize("name", ["a.jpg", "folder"])
def test_detect_writes_over_no_photograph(pictures, capsys, monkeypatch, name):
    """As the shell makes it of `-o photos/*.jpg`."""
    (pictures / "folder").mkdir()
    with pytest.raises(SystemExit) as leaving:
        cli.main(["detect", str(pictures), "-o", str(pictures / name), "--detector", "nano"])
    assert leaving.value.code == USAGE and ".json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "code"), [("dfine-small", MISSING_PIECE), ("vitdet", MISSING_PIECE), ("groundingdino", USAGE), ("grid", USAGE)]
)
def test_detect_needs_its_weights_and_a_detector_of_boxes(pictures, tmp_path, capsys, option, code):
    with pytest.raises(SystemExit) as leaving:
        cli.main(["detect", str(pictures), "-o", str(tmp_path / "b.json"), "--detector", option])
    assert leaving.value.code == code and "hint" in capsys.readouterr().err and not (tmp_path / "b.json").exists()


# ---- Grounding DINO ----


@pytest.fixture(scope="module", params=["GroundingDino", "MMGroundingDino"])
def reader(request, tmp_path_factory):
    """A tiny random reader with a few of BERT's tokens; words that it does not know become letters."""
    import transformers

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp(request.param)
    letters = "abcdefghijklmnopqrstuvwxyz"
    known = {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 103: "[MASK]", 1012: ".", 1029: "?"}  # BERT's, which networks know
    known |= dict(enumerate(["cat", "dog", "hot", *letters, *(f"##{c}" for c in letters)], 200))
    vocabulary = [known.get(i, f"[unused{i}]") for i in range(1030)]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    tokenizer = transformers.BertTokenizer(vocab=str(folder / "vocab.txt"))
    assert len(tokenizer) == len(vocabulary)
    tokenizer.save_pretrained(folder)
    config = getattr(transformers, f"{request.param}Config")(
        backbone_config=transformers.SwinConfig(
            embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4, out_features=["stage2", "stage3", "stage4"]
        ),
        text_config=transformers.BertConfig(
            vocab_size=len(vocabulary), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
        ),
        d_model=32, encoder_layers=1, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=16,
        decoder_ffn_dim=16, num_queries=10,
    )  # fmt: skip
    network = getattr(transformers, f"{request.param}ForObjectDetection")(config)
    network.save_pretrained(folder)
    return folder


def small(detector: GroundingDino, monkeypatch) -> GroundingDino:
    """With pictures an eighth as large as in earnest."""
    monkeypatch.setattr("depthseg.detect.grounding.SHORT", 96)
    monkeypatch.setattr("depthseg.detect.grounding.LONG", 160)
    return detector


def test_a_reader_in_a_batch_equals_one_by_one(reader, monkeypatch):
    detector = small(GroundingDino(reader, confidence=0.0, max_boxes=15, classes=["a cat", "dog"]), monkeypatch)
    agree(detector)
    (found,) = detector([image()])
    assert found.names == {i: {1: "a cat", 2: "dog"}[i] for i in found.names}


def test_a_prompt_is_put_together_from_phrases(reader):
    detector = GroundingDino(reader, classes=["cat", "hot_dog", "Dog (the animal)"])
    ((ids, spans),) = detector._prompts
    token = detector._tokenizer.convert_ids_to_tokens
    assert token(ids) == ["[CLS]", "cat", ".", "hot", "dog", ".", "dog", ".", "[SEP]"]
    assert [(c, token(ids[where])) for c, where in spans] == [(1, ["cat"]), (2, ["hot", "dog"]), (3, ["dog"])]
    whole = detector._tokenizer("cat . hot dog . dog .")["input_ids"]
    assert ids == whole


def test_the_score_of_a_class_is_the_mean_over_its_tokens(reader, monkeypatch):
    """Against the plain way: all scores of all queries, computed from the network's own output."""
    detector = small(GroundingDino(reader, confidence=0.0, max_boxes=300, classes=["hot dog", "cat"]), monkeypatch)
    one = image()
    (found,) = detector([one])
    ((ids, _),) = detector._prompts
    x = torch.from_numpy(_input(one, _size(*one.size)))[None]
    with torch.inference_mode():
        p = detector._network(pixel_values=x, input_ids=torch.tensor([ids])).logits.sigmoid()[0].numpy()
    expected = np.sort(np.concatenate([p[:, 1:3].mean(1), p[:, 4]]))[::-1]
    assert len(found) == 20 and np.abs(found.score - expected).max() < 1e-6


def test_more_phrases_than_a_prompt_holds_are_asked_in_several(reader, monkeypatch):
    many = GroundingDino(reader, confidence=0.0, classes=["coco"])
    assert len(many._prompts) > 1 and all(len(ids) <= 256 for ids, _ in many._prompts)
    assert [c for _, spans in many._prompts for c, _ in spans] == list(COCO)
    (found,) = small(many, monkeypatch)([image()])
    assert len(found) == 100 and set(found.label.tolist()) <= set(COCO) and (np.diff(found.score) <= 0).all()
    with pytest.raises(DepthsegError, match="no phrase that fits"):
        GroundingDino(reader, classes=["cat " * 300])
    with pytest.raises(DepthsegError, match="no phrase that fits"):
        GroundingDino(reader, classes=["..."])
    bare = reader.parent / f"{reader.name}-bare"
    bare.mkdir(exist_ok=True)
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((reader / name).read_bytes())
    with pytest.raises(DepthsegError, match="has no tokenizer"):
        GroundingDino(bare, classes=["cat"])
    with pytest.raises(DepthsegError, match="told what to look for") as error:
        GroundingDino(reader)
    assert "--text" in error.value.hint


def test_the_input_is_that_of_transformers():
    from transformers import GroundingDinoImageProcessorPil

    theirs = GroundingDinoImageProcessorPil()
    for item in (image(37, 61), image(300, 40), image(50, 50)):
        expected = theirs(images=[PILImage.fromarray(item.pixels)], return_tensors="np")["pixel_values"][0]
        assert np.abs(_input(item, _size(*item.size)) - expected).max() < 1e-5
    assert _size(1, 1) == (800, 800) and _size(30, 6468) == (6, 1333) and _size(1, 6468) == (1, 1333)


# ---- Grounding DINO by its authors ----

RENAMED = [  # their name -> that of transformers 5
    (r"^backbone\.0\.norm([123])\.", lambda m: f"model.backbone.conv_encoder.model.hidden_states_norms.stage{int(m[1]) + 1}."),
    (r"^backbone\.0\.patch_embed\.proj", "model.backbone.conv_encoder.model.swin.embeddings.patch_embeddings.projection"),
    (r"^backbone\.0\.patch_embed\.norm", "model.backbone.conv_encoder.model.swin.embeddings.norm"),
    (r"^backbone\.0\.layers", "model.backbone.conv_encoder.model.swin.encoder.layers"),
    (r"(swin.*)\.norm1\.", r"\1.layernorm_before."),
    (r"(swin.*)\.norm2\.", r"\1.layernorm_after."),
    (r"(swin.*)attn\.relative_position_bias_table", r"\1attention.relative_position_bias.relative_position_bias_table"),
    (r"(swin.*)attn\.proj", r"\1attention.o_proj"),
    (r"(swin.*)attn\.qkv", r"\1attention.{}_proj"),
    (r"^input_proj\.", "model.input_proj_vision."),
    (r"^bert\.", "model.text_backbone."),
    (r"^feat_map\.", "model.text_projection."),
    (r"^transformer\.(level_embed|enc_output)", r"model.\1"),
    (r"^transformer\.tgt_embed", "model.query_position_embeddings"),
    (r"^transformer\.enc_out_bbox_embed", "model.encoder_output_bbox_embed"),
    (r"^transformer\.encoder\.layers\.(\d+)", r"model.encoder.layers.\1.deformable_layer"),
    (r"^transformer\.encoder\.text_layers\.(\d+)", r"model.encoder.layers.\1.text_enhancer_layer"),
    (r"^transformer\.encoder\.fusion_layers\.(\d+)", r"model.encoder.layers.\1.fusion_layer"),
    (r"^transformer\.decoder\.norm", "model.decoder.layer_norm"),
    (r"^transformer\.decoder\.ref_point_head", "model.decoder.reference_points_head"),
    (r"^transformer\.decoder", "model.decoder"),
    (r"\.linear([12])\.", r".fc\1."),
    (r"(deformable_layer)\.norm1", r"\1.self_attn_layer_norm"),
    (r"(deformable_layer)\.norm2", r"\1.final_layer_norm"),
    (r"(text_enhancer_layer)\.norm1", r"\1.layer_norm_before"),
    (r"(text_enhancer_layer)\.norm2", r"\1.layer_norm_after"),
    (r"gamma_v$", "vision_param"),
    (r"gamma_l$", "text_param"),
    (r"(fusion_layer)\.layer_norm_v", r"\1.layer_norm_vision"),
    (r"(fusion_layer)\.layer_norm_l", r"\1.layer_norm_text"),
    (r"(fusion_layer\.attn\..*)(?<![a-z])v_proj", r"\1vision_proj"),
    (r"(fusion_layer\.attn\..*)(?<![a-z])l_proj", r"\1text_proj"),
    (r"(decoder\.layers\.\d+)\.cross_attn", r"\1.encoder_attn"),
    (r"(decoder\.layers\.\d+)\.norm1", r"\1.encoder_attn_layer_norm"),
    (r"(decoder\.layers\.\d+)\.ca_text", r"\1.encoder_attn_text"),
    (r"(decoder\.layers\.\d+)\.catext_norm", r"\1.encoder_attn_text_layer_norm"),
    (r"(decoder\.layers\.\d+)\.norm2", r"\1.self_attn_layer_norm"),
    (r"(decoder\.layers\.\d+)\.norm3", r"\1.final_layer_norm"),
    (r"\.in_proj_(weight|bias)", r".{}.\1"),
]


def translated(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    out = {}
    for key, value in state.items():
        if "relative_position_index" in key or ".pooler." in key:
            continue
        for pattern, name in RENAMED:
            key = re.sub(pattern, name, key)
        parts = ("q", "k", "v") if "swin" in key else ("query", "key", "value")
        out |= {key.format(p): v for p, v in zip(parts, value.chunk(3), strict=True)} if "{}" in key else {key: value}
    return out


def test_the_authors_code_equals_transformers(reader, tmp_path, monkeypatch):
    """The same random weights in both, from the file on: names, boxes, scores."""
    theirs = pytest.importorskip("groundingdino.models.GroundingDINO.groundingdino", reason="needs the extra groundingdino")
    import transformers

    if reader.name.startswith("MM"):
        pytest.skip("the authors have another model")
    bert = {"vocab_size": len(transformers.AutoTokenizer.from_pretrained(reader)), "hidden_size": 16, "num_hidden_layers": 1,
            "num_attention_heads": 2, "intermediate_size": 16}  # fmt: skip
    size = {"enc_layers": 1, "dec_layers": 2, "num_queries": 10, "dim_feedforward": 16}  # 256 wide, as is written into their code
    build = theirs.build_groundingdino
    made = []
    monkeypatch.setattr(theirs, "build_groundingdino", lambda settings: made.append(build(settings)) or made[-1])
    torch.manual_seed(3)
    torch.save({"model": {}}, tmp_path / "empty.pth")
    arguments = {"confidence": 0.0, "max_boxes": 300, "classes": ["hot dog", "cat"]}
    kind = {"config": "GroundingDINO_SwinT_OGC", "words": str(reader), "changes": size, "bert": bert}
    before = vars(transformers.BertModel).copy(), theirs.get_tokenlizer
    with pytest.raises(DepthsegError, match="does not fit GroundingDINO_SwinT_OGC"):
        OriginalGroundingDino(tmp_path / "empty.pth", **arguments, **kind)
    network = made[0]
    for name, p in network.named_parameters():  # some start at 0, where a swapped weight would not show
        torch.nn.init.normal_(p, std=0.1) if p.ndim < 2 or "sampling_offsets" in name else None
    torch.save({"model": {f"module.{k}": v for k, v in network.state_dict().items()}}, tmp_path / "random.pth")
    original = small(OriginalGroundingDino(tmp_path / "random.pth", **arguments, **kind), monkeypatch)
    assert (vars(transformers.BertModel).copy(), theirs.get_tokenlizer) == before, "a patch was left behind"
    config = transformers.GroundingDinoConfig(
        text_config=transformers.BertConfig(**bert), encoder_layers=1, decoder_layers=2, encoder_ffn_dim=16, decoder_ffn_dim=16,
        num_queries=10,
    )  # fmt: skip
    same = transformers.GroundingDinoForObjectDetection(config)
    lacking, unknown = same.load_state_dict(translated(network.state_dict()), strict=False)
    assert not unknown and {k.rpartition(".")[0] for k in lacking} <= {"model.backbone.conv_encoder.model.swin.layernorm"}  # unused
    same.save_pretrained(tmp_path / "same")
    transformers.AutoTokenizer.from_pretrained(reader).save_pretrained(tmp_path / "same")
    for a, b in zip(original(IMAGES[:2]), GroundingDino(tmp_path / "same", **arguments)(IMAGES[:2]), strict=True):
        assert len(a) == len(b) == 20
        rows_a, rows_b = (np.column_stack([f.xyxy, 100 * f.score, 1000 * f.label]) for f in (a, b))  # equal scores may swap places
        apart = np.abs(rows_a[:, None] - rows_b[None]).max(2)
        assert apart.min(0).max() < 1e-3 and apart.min(1).max() < 1e-3


# ---- ViTDet ----


@pytest.fixture(scope="module")
def vitdet(tmp_path_factory):
    from depthseg.models import checkpoint

    torch.manual_seed(0)
    tiny = Variant(32, 2, 2, (1,))
    path = tmp_path_factory.mktemp("vitdet") / "tiny.safetensors"
    network = Network(tiny, 80, side=64, window=3)
    checkpoint.save(network, path, {})
    return path, {"variant": tiny, "side": 64, "window": 3}


def test_vitdet_in_a_batch_equals_one_by_one(vitdet):
    path, arguments = vitdet
    detector = ViTDet(path, confidence=0.0, max_boxes=20, **arguments)
    agree(detector)
    every = detector([image()])[0]
    kept = int(every.label[0])
    (some,) = ViTDet(path, confidence=0.0, classes=[str(kept)], **arguments)([image()])
    assert set(some.label.tolist()) == {kept}
    with pytest.raises(DepthsegError, match="does not fit this ViTDet"):
        ViTDet(path, data="lvis", **arguments)


@pytest.mark.parametrize("backend", ["openvino", pytest.param("compile", marks=pytest.mark.slow)])
@pytest.mark.parametrize("cascade", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_vitdets_backbone_by_another_backend_answers_as_torch(cascade, backend, tmp_path):
    from depthseg.models import checkpoint

    needs(backend)
    torch.manual_seed(0)
    size = {"variant": Variant(32, 2, 2, (1,)), "side": 64, "window": 3}
    network = Network(size["variant"], 80, cascade, side=64, window=3)
    for name, p in network.backbone.named_parameters():
        if "pos" in name:  # which start at 0
            torch.nn.init.normal_(p)
    checkpoint.save(network, tmp_path / "w.safetensors", {})
    plain, other = (
        ViTDet(tmp_path / "w.safetensors", confidence=0.0, max_boxes=20, backend=b, cascade=cascade, **size) for b in ("torch", backend)
    )
    x = torch.randn(3, 3, 64, 64)
    with torch.inference_mode():
        for a, b in zip(plain._network.backbone(x), other._network.backbone(x), strict=True):
            assert (a - b).norm() < 1e-5 * a.norm()
    agree(other)
    for one, two in zip(plain(IMAGES), other(IMAGES), strict=True):
        assert np.abs(one.score - two.score).max(initial=0) < 1e-4


# ---- the backend ----


def test_a_run_says_which_detector_the_backend_does_not_compute(detr, reader, vitdet, monkeypatch):
    path, size = vitdet
    asked = []
    monkeypatch.setattr(backends, "ready", lambda network, backend="torch", *rest: (asked.append(backend), network)[1])
    monkeypatch.setitem(catalog.DETECTORS, "vitdet", replace(catalog.DETECTORS["vitdet"], args=size))
    plans = {
        "nano": Plan(detector="nano"),
        "grid": Plan(detector="grid"),
        "dfine-nano": Plan(detector="dfine-nano", detector_weights=str(detr)),
        "vitdet": Plan(detector="vitdet", detector_weights=str(path)),
        READER: Plan(detector=READER, detector_weights=str(reader), text="cat."),
    }
    for name, plan in plans.items():
        for backend in ("torch", "openvino"):
            chosen = choose_detector(replace(plan, backend=backend), torch.device("cpu"), "fp32", False)
            told = any("computes in torch" in note for note in chosen.notes)
            assert told is (name == READER and backend == "openvino")
            assert ("openvino" in asked) is (backend == "openvino" and not told and name != "grid")
            asked.clear()
