"""The papers' other systems: against the official code's answers, transformers' SAM, ultralytics, and themselves."""

import json
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import needs_ultralytics
from PIL import Image as PILImage
from synthetic import DATA, checkpoint, picture
from torch import nn
from torch.nn import functional as F

from depthseg import catalog
from depthseg.data import find
from depthseg.errors import MISSING_PIECE, DepthsegError
from depthseg.models import edge_sam, efficient_sam, mobile_sam
from depthseg.models.checkpoint import load_into, read
from depthseg.models.sam_vit import HEAD, SamVit, VitEncoder, renamed
from depthseg.models.sam_vit import build as build_sam
from depthseg.plan import Plan
from depthseg.schema import ABSENT, PADDING, Frame, GreyFrame, Prompts, StretchedFrame
from depthseg.segment import Segmenter

BOX = np.array([[100, 80, 420, 360]])
POINT, POINTS2 = np.array([[[320, 240]]]), np.array([[[320, 240], [50, 400]]])
MODES = {
    "box": Prompts.of(boxes=BOX),
    "point": Prompts.of(points=POINT),
    "points2": Prompts.of(points=POINTS2, signs=np.array([[1, 0]])),
    "box_point": Prompts.of(boxes=BOX, points=POINT),
}
SMALL = 128  # pixels, of an input in tests: the convolutional encoders and EfficientSAM's take any


def asked(prompts: Prompts) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.from_numpy(prompts.points), torch.from_numpy(prompts.labels)


def nobody(count: int = 1) -> torch.Tensor:
    return torch.zeros(count, dtype=torch.long)


# ---- frames ----


@pytest.mark.parametrize("size", [(480, 640), (1500, 37), (64, 64), (300, 1024)])
def test_the_stretched_frame_is_torchs_interpolation(size) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    frame = StretchedFrame(size, 1024)
    wanted = F.interpolate(torch.from_numpy(pixels).permute(2, 0, 1)[None].double() / 255, (1024, 1024), mode="bilinear")[0].numpy()
    mean, std = np.array([0.485, 0.456, 0.406])[:, None, None], np.array([0.229, 0.224, 0.225])[:, None, None]
    np.testing.assert_allclose(frame.image(pixels), (wanted - mean) / std, atol=2e-5)
    low = np.random.default_rng(1).standard_normal((256, 256)).astype(np.float32)
    large = F.interpolate(torch.from_numpy(low)[None, None].double(), size, mode="bicubic")[0, 0].numpy()
    np.testing.assert_allclose(frame.logits(low), large, atol=5e-6)
    unlike = frame.crop(low).whole() != (large >= 0)
    assert np.abs(large[unlike]).max(initial=0) < 5e-6
    corner = np.array([size[1], size[0]])
    assert np.array_equal(frame.to_prompt(corner), [1024, 1024]) and frame.valid(256) == (256, 256)


def test_the_grey_frame_fills_with_grey() -> None:
    frame = GreyFrame((480, 640), 1024)
    x = frame.image(picture())
    assert x.shape == (3, 1024, 1024) and x.min() >= 0 and x.max() <= 1
    assert np.allclose(x[:, 768:], 114 / 255) and x[:, :768].std() > 0.1
    assert np.array_equal(GreyFrame((64, 64), 64).image(picture()[:64, :64]), picture()[:64, :64].transpose(2, 0, 1) / np.float32(255))


# ---- SAM ----


@pytest.fixture(scope="module")
def small_sam():
    """transformers' SAM with random weights, LayerNorms as in the original, and the arguments of our encoder."""
    from transformers import SamConfig, SamMaskDecoderConfig, SamModel, SamPromptEncoderConfig, SamVisionConfig

    torch.manual_seed(0)
    vision = {"hidden_size": 32, "output_channels": 64, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 320,
              "num_pos_feats": 32, "global_attn_indexes": [1], "initializer_range": 0.1}  # fmt: skip
    config = SamConfig(
        vision_config=SamVisionConfig(**vision),
        prompt_encoder_config=SamPromptEncoderConfig(hidden_size=64, image_size=1024, patch_size=1024 * 16 // 320),
        mask_decoder_config=SamMaskDecoderConfig(hidden_size=64, mlp_dim=48, num_attention_heads=8, iou_head_hidden_dim=24),
    )
    config.prompt_encoder_config.image_embedding_size = 20
    oracle = SamModel(config).eval()
    with torch.no_grad():
        for p in oracle.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return original_norms(oracle), vision


def original_norms(oracle):
    for m in oracle.mask_decoder.transformer.modules():
        if isinstance(m, nn.LayerNorm):
            m.eps = 1e-5
    return oracle


def assert_alike(oracle, network, x: torch.Tensor, atol: float) -> None:
    """Both answer equally to boxes and to clicks, three masks and one."""
    boxes = torch.tensor([[100.0, 80, 420, 360], [5, 6, 900, 1000]])
    points, signs = torch.tensor([[[50.0, 60], [700, 300]], [[512, 512], [3, 1000]]]), torch.tensor([[1, 0], [1, 1]])
    with torch.inference_mode():
        features = network.encode(x)
        theirs = oracle.get_image_embeddings(x)
        torch.testing.assert_close(features[0], theirs, atol=atol, rtol=0)
        for multimask in (True, False):
            for prompts, words in (
                (Prompts.of(boxes=boxes.numpy()), {"input_boxes": boxes[None]}),
                (Prompts.of(points=points.numpy(), signs=signs.numpy()), {"input_points": points[None], "input_labels": signs[None]}),
            ):
                low, iou = network.decode(features, nobody(2), *asked(prompts), None, multimask)
                wanted = oracle(image_embeddings=theirs, multimask_output=multimask, **words)
                torch.testing.assert_close(low, wanted.pred_masks[0], atol=atol, rtol=0)
                torch.testing.assert_close(iou, wanted.iou_scores[0], atol=atol, rtol=0)


def our_small_sam(vision: dict) -> SamVit:
    from transformers import SamVisionConfig

    return SamVit(VitEncoder(SamVisionConfig(**vision, attn_implementation="sdpa")), dim=64, hidden=48, iou_hidden=24).eval()


def test_sam_from_a_hub_folder_equals_transformers(small_sam, tmp_path) -> None:
    oracle, vision = small_sam
    oracle.save_pretrained(tmp_path / "hub")
    network = our_small_sam(vision)
    load_into(network, tmp_path / "hub")
    assert_alike(oracle, network, torch.randn(1, 3, 320, 320), 1e-5)
    with torch.inference_mode():  # the encoder goes through a batch one by one
        x = torch.randn(2, 3, 320, 320)
        torch.testing.assert_close(network.encode(x)[0][1:], network.encode(x[1:])[0], atol=1e-5, rtol=0)


def as_meta_writes(state: dict) -> dict:
    """Our names -> those of sam_vit_*.pth."""
    parts = {"patch_embed.projection": "patch_embed.proj", ".layers.": ".blocks.", "layer_norm": "norm"}
    neck = {"neck.conv1": "neck.0", "neck.norm1": "neck.1", "neck.conv2": "neck.2", "neck.norm2": "neck.3"}
    out = {}
    for name, tensor in state.items():
        if name.startswith("image_encoder."):
            for a, b in (parts | neck).items():
                name = name.replace(a, b)
        out[name] = tensor
    return out


def test_metas_names_load_strictly(small_sam, tmp_path) -> None:
    _, vision = small_sam
    first, second = our_small_sam(vision), our_small_sam(vision)
    state = as_meta_writes(first.state_dict())
    for name in ("blocks.0.norm1.weight", "blocks.2.mlp.lin1.bias", "patch_embed.proj.weight", "neck.3.bias", "blocks.1.attn.rel_pos_h"):
        assert f"image_encoder.{name}" in state
    torch.save(state, tmp_path / "sam.pth")
    load_into(second, tmp_path / "sam.pth")
    for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    state["image_encoder.blocks.3.norm1.weight"] = torch.zeros(32)
    torch.save(state, tmp_path / "sam.pth")
    with pytest.raises(DepthsegError, match="1 unknown"):
        load_into(second, tmp_path / "sam.pth")


@pytest.mark.parametrize(("size", "keys", "millions"), [("b", 314, 93_735_472), ("l", 482, 312_342_832), ("h", 594, 641_090_608)])
def test_sams_sizes(size: str, keys: int, millions: int) -> None:
    with torch.device("meta"):
        network = build_sam(size)
    assert sum(p.numel() for p in network.parameters()) == millions and len(network.state_dict()) == keys


def test_sams_head_has_the_original_eps_and_every_other_norm_its_own() -> None:
    with torch.device("meta"):
        network = build_sam("b")
    eps = {name: m.eps for name, m in network.named_modules() if isinstance(m, nn.LayerNorm)}
    of_tokens = [e for name, e in eps.items() if name.startswith("mask_decoder.transformer")]
    assert of_tokens == [1e-5] * 9
    assert {e for name, e in eps.items() if not name.startswith("mask_decoder.transformer")} == {1e-6}


@pytest.mark.slow
def test_sam_b_equals_transformers() -> None:
    from transformers import SamConfig, SamModel

    torch.manual_seed(0)
    oracle = original_norms(SamModel(SamConfig()).eval())
    with torch.no_grad():
        for p in oracle.parameters():
            p.copy_(torch.randn_like(p) * (p[0].numel() ** -0.5 if p.ndim > 1 else 0.05) + (p == 1))
    network = build_sam("b").eval()
    network.load_state_dict(renamed(renamed(oracle.state_dict(), HEAD), VitEncoder.RENAMES), strict=True)
    assert_alike(oracle, network, torch.randn(1, 3, 1024, 1024), 1e-5)


# ---- the kits ----


def check(network, name: str, shared, full: float) -> None:
    """The official code's answers, on a checkpoint of rule-made values; full: tolerance of enlarged logits."""
    truth = np.load(shared / "parity" / f"{name}.npz")
    frame = network.frame((480, 640), network.side)
    x = frame.image(picture())
    np.testing.assert_allclose(x[:, :8, :16], truth["input_first_rows"], atol=2e-5)
    with torch.inference_mode():
        features = network.encode(torch.from_numpy(x)[None])
        np.testing.assert_allclose(features[0][0, ::8, ::4, ::4], truth["embedding_strided"], atol=2e-5)
        mask = None
        for mode, prompts in [*MODES.items(), ("point_mask", MODES["point"])]:
            for multi in (True, False):
                one = f"{mode}_{'multi' if multi else 'single'}"
                if f"{one}_iou" not in truth:
                    continue
                points, labels = torch.from_numpy(frame.to_prompt(prompts.points)), torch.from_numpy(prompts.labels)
                logits, iou = network.decode(features, nobody(), points, labels, mask if mode == "point_mask" else None, multi)
                got = logits[0].numpy()
                np.testing.assert_allclose(got[:, ::4, ::4], truth[f"{one}_lowres_strided4"], atol=2e-5, err_msg=one)
                np.testing.assert_allclose(iou[0].numpy(), truth[f"{one}_iou"], atol=1e-5, err_msg=one)
                if one == "point_multi":
                    mask = logits[:, :1]
                if f"{one}_full_strided8" in truth:
                    large = np.stack([frame.logits(g) for g in got])
                    np.testing.assert_allclose(large[:, ::8, ::8], truth[f"{one}_full_strided8"], atol=full)
                    (area,) = [truth[k] for k in truth if k.startswith(f"{one}_full_area")]
                    np.testing.assert_allclose([frame.crop(g).pixels.sum() for g in got], area, atol=2)  # pixels within rounding of 0


@pytest.mark.slow
def test_mobile_sam_answers_as_the_official_code(shared, tmp_path) -> None:
    torch.save(checkpoint(shared / "parity" / "mobile_sam_vit_t.keys.json"), tmp_path / "mobile_sam.pt")
    network = mobile_sam.build().eval()
    load_into(network, tmp_path / "mobile_sam.pt")  # after eval, and with ImageNet's classifier in it
    check(network, "mobile_sam_vit_t", shared, 2e-5)


@pytest.mark.slow
def test_efficient_sam_answers_as_the_official_code(shared, tmp_path) -> None:
    torch.save({"model": checkpoint(shared / "parity" / "efficient_sam_ti.keys.json")}, tmp_path / "vitt.pt")
    network = efficient_sam.build("ti").eval()
    load_into(network, tmp_path / "vitt.pt")
    check(network, "efficient_sam_ti", shared, 1e-4)  # torch's own cubic rounds more than that


def test_edge_sams_encoder_answers_as_the_official_code() -> None:
    """Computed with the official encoder in fp32 on rule-made values, for the upper left 256 pixels of the picture."""
    network = edge_sam.build().eval()
    state = renamed(checkpoint(DATA / "edge_sam.keys.json"), edge_sam.RepVit.RENAMES)
    network.image_encoder.load_state_dict({k.removeprefix("image_encoder."): v for k, v in state.items()}, strict=True)
    x = Frame((256, 256), 256).image(picture()[:256, :256])
    with torch.inference_mode():  # in fp64: what is left is the official rounding (fp32 with AVX-512 is 2.1e-5 off)
        (embedding,) = network.double().encode(torch.from_numpy(x)[None].double())
    np.testing.assert_allclose(embedding[0, ::16, ::2, ::2], np.load(DATA / "edge_sam.npz")["embedding_strided"], atol=2e-5)


def test_edge_sam_rates_masks_by_stability() -> None:
    from depthseg import masks

    torch.manual_seed(0)
    network = edge_sam.build().eval()
    with torch.inference_mode():
        features = network.encode(torch.randn(1, 3, SMALL, SMALL))
        logits, rating = network.decode(features, nobody(), *asked(MODES["box"]))
    np.testing.assert_allclose(rating[0], masks.stability(logits[0].numpy()), atol=1e-6)


# ---- MobileSAM ----


def test_weights_loaded_after_use_in_eval_mode_count(tmp_path) -> None:
    """In the official code, and in timm's, the attention biases of the first use stay."""
    torch.manual_seed(0)
    first, second = mobile_sam.build().eval(), mobile_sam.build().eval()
    with torch.no_grad():
        for name, p in first.named_parameters():
            if name.endswith("attention_biases"):
                p.normal_()
    x = torch.randn(1, 3, SMALL, SMALL)
    torch.save(first.state_dict(), tmp_path / "w.pt")
    with torch.inference_mode():
        before = second.encode(x)[0]
        load_into(second, tmp_path / "w.pt")
        wanted, got = first.encode(x)[0], second.encode(x)[0]
    assert torch.equal(wanted, got) and (before - got).abs().max() > 0.01
    with torch.no_grad():
        second.image_encoder.layers[1].blocks[0].attn.attention_biases.zero_()
    with torch.inference_mode():
        assert not torch.equal(second.encode(x)[0], got)


# ---- EfficientSAM ----


@pytest.fixture(scope="module")
def ti():
    torch.manual_seed(0)
    network = efficient_sam.build("ti").eval()
    network.side = network.zoom_side = SMALL
    return network


def test_no_more_than_six_points(ti) -> None:
    features = (torch.randn(1, 256, 8, 8),)
    six, seven = (Prompts.of(points=np.random.default_rng(0).uniform(0, 900, (1, n, 2))) for n in (6, 7))
    with torch.inference_mode():
        logits, iou = ti.decode(features, nobody(), *asked(six))
        assert logits.shape == (1, 3, 32, 32) and iou.shape == (1, 3)
        with pytest.raises(DepthsegError, match=r"at most 6 points.*not 7"):
            ti.decode(features, nobody(), *asked(seven))
        with pytest.raises(DepthsegError, match="no mask as a prompt"):
            ti.decode(features, nobody(), *asked(six), torch.zeros(1, 1, 32, 32))


def test_empty_tokens_and_their_place_mean_nothing(ti) -> None:
    features = (torch.randn(1, 256, 8, 8),)
    plain = torch.tensor([[[300.0, 200], [500, 600]]]), torch.tensor([[2, 3]])
    filled = (
        torch.tensor([[[9.0, 9], [300, 200], [0, 0], [500, 600], *[[7, 7]] * 5]]),
        torch.tensor([[ABSENT, 2, PADDING, 3, *[ABSENT] * 5]]),
    )
    with torch.inference_mode():
        for a, b in zip(ti.decode(features, nobody(), *plain), ti.decode(features, nobody(), *filled)):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_prompts_of_many_images_in_one_call_equal_each_alone(ti) -> None:
    features = (torch.randn(3, 256, 8, 8),)
    boxes = np.random.default_rng(0).uniform(0, 1000, (5, 4))
    owner = torch.tensor([2, 0, 0, 1, 2])
    points, labels = asked(Prompts.of(boxes=boxes))
    with torch.inference_mode():
        together, _ = ti.decode(features, owner, points, labels)
        for i, o in enumerate(owner.tolist()):
            one, _ = ti.decode((features[0][o : o + 1],), nobody(), points[i : i + 1], labels[i : i + 1])
            torch.testing.assert_close(together[i : i + 1], one, atol=1e-5, rtol=1e-5)


def test_a_thousand_prompts_never_copy_the_embedding_a_thousand_times(ti, pictures) -> None:
    seen = []

    class Watched(nn.Module):
        frame, side, zoom_side, alpha = ti.frame, SMALL, SMALL, None
        grid_limits, specks, single_mask_for, most_points, hears_negatives = (-9.0, 0.0), 0.0, "never", 6, False

        def encode(self, rgb, depth=None):
            return ti.encode(rgb)

        def decode(self, features, owner, *rest):
            seen.append((len(owner), len(features[0])))
            return torch.ones(len(owner), 3, 16, 16), torch.ones(len(owner), 3)

    segmenter = Segmenter(Plan(detector="grid", points_per_side=32, prompt_batch=16, min_region=0), network=Watched())
    list(segmenter.segment(find([pictures / "a.png"])))
    assert seen == [(16, 1)] * 64


def test_clicks_that_do_not_suit_are_told_before_the_run(ti, pictures, tmp_path) -> None:
    def segmenter(entry: dict) -> Segmenter:
        (tmp_path / "points.json").write_text(json.dumps([{"file_name": "a.png", **entry}]))
        return Segmenter(Plan(model="efficient-sam-ti", points=str(tmp_path / "points.json")), network=ti)

    images = find([pictures])
    five = [[i, i] for i in range(5)]
    with pytest.raises(DepthsegError, match=r"efficient-sam-ti takes at most 6 points.*not 7") as error:
        segmenter({"points": five, "box": [1, 1, 9, 9]}).expect(images)
    assert "another --model" in error.value.hint
    assert segmenter({"points": five}).expect(images) == []
    (warning,) = segmenter({"points": five[:2], "labels": [1, 0]}).expect(images)
    assert "takes no notice of negative points" in warning


# ---- FastSAM ----


@pytest.fixture(scope="module")
def fast_file(tmp_path_factory):
    """A checkpoint of ultralytics with random weights and scores about 0.5."""
    needs_ultralytics()
    from ultralytics.nn.tasks import SegmentationModel, yaml_model_load

    torch.manual_seed(0)
    theirs = SegmentationModel(yaml_model_load("yolov8s-seg.yaml") | {"nc": 1}, verbose=False)
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.fill_(0.17)
    for branch in theirs.model[-1].cv3:
        nn.init.normal_(branch[-1].weight)
        nn.init.zeros_(branch[-1].bias)
    theirs.names, theirs.args, theirs.task = {0: "object"}, {}, "segment"
    path = tmp_path_factory.mktemp("fast") / "FastSAM-s.pt"
    torch.save({"model": theirs, "train_args": {}}, path)
    return path


def test_fast_sam_finds_what_ultralytics_does_and_chooses_as_well(fast_file) -> None:
    """On a square picture, which both take as it is. Their masks are cut off at a box on pixels, ours on cells of four."""
    from ultralytics import FastSAM

    from depthseg.fast_sam import _masks

    side = 256
    pixels = np.asarray(PILImage.fromarray(picture()[:32, :32]).resize((side, side), PILImage.Resampling.BICUBIC))
    network = catalog.load("fastsam-s", fast_file)
    frame = network.frame((side, side), side)
    boxes = np.array([[20, 30, 120, 160], [0, 0, 255, 255], [100, 90, 250, 200]], np.float32)
    with torch.inference_mode():
        features = network.encode(torch.from_numpy(frame.image(pixels))[None])
        every, confidence = _masks(features[0][0], features[1][0])
        prompts = Prompts.of(boxes=boxes)
        logits, _ = network.decode(features, nobody(3), *asked(replace(prompts, points=frame.to_prompt(prompts.points))))
    theirs = FastSAM(str(fast_file))
    words = {"imgsz": side, "conf": 0.4, "iou": 0.9, "retina_masks": True, "device": "cpu", "verbose": False}
    (result,) = theirs.predict(PILImage.fromarray(pixels), **words)
    np.testing.assert_allclose(confidence, result.boxes.conf, atol=1e-5)
    for mine, wanted in list(zip(every, result.masks.data.numpy() > 0))[::10]:
        assert overlap(frame.crop(mine.numpy()).whole(), wanted) > 0.95
    for i, (x0, y0, x1, y1) in enumerate(boxes.astype(int).tolist()):
        (result,) = theirs.predict(PILImage.fromarray(pixels), **words, bboxes=[[x0, y0, x1, y1]])
        box = np.zeros((side, side), bool)
        box[y0:y1, x0:x1] = True
        assert overlap(frame.crop(logits[i, 0].numpy()).whole(), box) > overlap(result.masks.data[0].numpy() > 0, box) - 0.02


def test_fast_sams_boxes_are_decoded_in_fp32_whatever_the_head_computes_in(fast_file) -> None:
    from depthseg.fast_sam import _boxes

    network = catalog.load("fastsam-s", fast_file)
    head = network.image_encoder.model[-1]
    rgb = torch.rand(1, 3, 256, 256, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        _, raw = network.image_encoder(rgb)
        coarse = {"boxes": raw["boxes"].bfloat16(), "feats": [level.bfloat16() for level in raw["feats"]]}
        wanted = head._get_decode_boxes({"boxes": coarse["boxes"].float(), "feats": raw["feats"]})
        with torch.autocast("cpu", torch.bfloat16):
            found = head._get_decode_boxes(coarse)
            (decoded, _), _ = network.image_encoder(rgb)
    assert found.dtype == decoded.dtype == torch.float32
    torch.testing.assert_close(found, wanted, atol=1e-3, rtol=1e-5)
    assert head._get_decode_boxes.func is _boxes


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    return (a & b).sum() / (a | b).sum()


def test_fast_sams_rules() -> None:
    from depthseg.fast_sam import _chosen

    every = torch.zeros(3, 16, 16, dtype=torch.bool)  # a cell is 64 of the prompt frame
    every[0, 2:14, 2:14], every[1, 4:8, 4:8], every[2, 10:12, 10:12] = True, True, True
    points, labels = (torch.zeros(6, 4, 2), torch.full((6, 4), ABSENT))
    for row, prompt in enumerate(
        [
            [(5, 5, 1)],  # merged: the large and the small one
            [(5, 5, 1), (3, 3, 0)],  # without the large one
            [(5, 5, 1), (10, 10, 1), (3, 3, 0)],
            [(4, 4, 2), (8.5, 8, 3)],  # a box
            [(2, 2, 2), (14, 14, 3), (12, 5, 0)],  # a box, without the mask under the negative point: the best of the others
            [(0, 0, 1)],
        ]
    ):
        for k, (x, y, label) in enumerate(prompt):
            points[row, k], labels[row, k] = torch.tensor([x * 64.0, y * 64.0]) + (0 if label > 1 else 32), label
    wanted = [[True, True, False], [False, True, False], [False, True, True], [False, True, False], [False, True, False], [False] * 3]
    assert _chosen(every, points, labels).tolist() == wanted


def test_fast_sam_refuses_other_checkpoints(fast_file, tmp_path) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(DepthsegError, match="not a readable YOLO checkpoint"):
        catalog.load("fastsam-s", tmp_path / "other.pt")
    with pytest.raises(DepthsegError, match="does not fit this network"):
        catalog.load("fastsam-x", fast_file)


# ---- all of them ----


SYSTEMS = {"mobile-sam": 128, "edge-sam": 128, "efficient-sam-ti": 128, "fastsam-s": 256}  # inputs that tests can afford


def random_network(name: str, monkeypatch):
    if "extra yolo" in catalog.MODELS[name].note:
        needs_ultralytics()
        monkeypatch.setattr("depthseg.fast_sam.CONFIDENCE", 0.0)
    torch.manual_seed(0)
    row = catalog.MODELS[name]
    network = catalog.resolve(row)(**row.args).eval()
    network.side = network.zoom_side = SYSTEMS[name]
    return network


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        *((name, "fp32") for name in SYSTEMS),
        ("efficient-sam-ti", "bf16"),  # convolutions in bf16 take minutes on some CPUs
        *(pytest.param(name, "bf16", marks=pytest.mark.slow) for name in SYSTEMS if name != "efficient-sam-ti"),
    ],
)
def test_boxes_clicks_and_the_grid(name: str, precision: str, pictures, tmp_path, monkeypatch) -> None:
    """Every system takes a batch of pictures with prompts of all kinds, and answers each as it does alone."""
    network = random_network(name, monkeypatch)
    images = find([pictures])
    clicks = [{"file_name": key, "points": [[9, 9], [20, 11]][:n], "box": box} for key, n, box in (("a.png", 2, [4, 4, 20, 20]),)]
    clicks += [{"file_name": "b.jpg", "points": [[20, 20]]}, {"file_name": "a.png", "points": [[30, 12]]}]
    (tmp_path / "points.json").write_text(json.dumps([{k: v for k, v in c.items() if v is not None} for c in clicks]))
    common = {"model": name, "precision": precision}
    answers = {}
    for batch in (1, 3):
        plan = Plan(points=str(tmp_path / "points.json"), batch=batch, prompt_batch=3 * batch, **common)
        records = list(Segmenter(plan, network=network).segment(images))
        answers[batch] = {(r.image.key, int(p)): float(i) for r in records for p, i in zip(r.masks.prompt, r.masks.predicted_iou)}
    loose = 1e-3 if precision == "fp32" else 0.1
    for prompt in answers[1].keys() & answers[3].keys():
        assert answers[1][prompt] == pytest.approx(answers[3][prompt], abs=loose)
    grid = Plan(detector="grid", points_per_side=2, min_predicted_iou=-9.0, min_stability=0.0, min_region=0, **common)
    (record,) = Segmenter(grid, network=network).segment(images[:1])
    assert record.masks.names == {1: "object"}


@pytest.mark.parametrize("name", [name for name, row in catalog.MODELS.items() if row.input == 1024 and row.file and row.url])
def test_missing_weights_say_how_to_get_them(name: str, run, pictures, tmp_path) -> None:
    code, _, err = run("segment", pictures, "-o", tmp_path / "out", "--model", name, "--detector", "grid")
    assert code == MISSING_PIECE and catalog.MODELS[name].file in err and "--pull" in err


def test_the_wrong_checkpoint_is_refused_with_the_difference(run, pictures, tmp_path) -> None:
    torch.save({"image_encoder.patch_embed.seq.0.c.weight": torch.zeros(32, 3, 3, 3)}, tmp_path / "w.pt")
    for name in ("mobile-sam", "efficient-sam-ti", "edge-sam"):
        words = ["segment", pictures, "-o", tmp_path / "out", "--detector", "grid", "--model", name, "--weights", tmp_path / "w.pt"]
        code, _, err = run(*words)
        assert code == 2 and "does not fit this network" in err and "missing" in err


def test_only_sam_takes_a_folder(run, pictures, tmp_path) -> None:
    (tmp_path / "folder").mkdir()
    words = ["segment", pictures, "-o", tmp_path / "out", "--detector", "grid", "--weights", tmp_path / "folder", "--model"]
    code, _, err = run(*words, "mobile-sam")
    assert code == 2 and "no such file" in err
    code, _, err = run(*words, "sam-vit-b")
    assert code == MISSING_PIECE and "model.safetensors" in err


def test_they_cannot_be_trained(run, tmp_path) -> None:
    code, _, err = run("train", "--stage", "0", "--data", tmp_path, "-o", tmp_path / "out", "--model", "mobile-sam")
    assert code == 2 and "mobile-sam cannot be trained here" in err


@pytest.mark.slow
def test_mobile_sam_from_end_to_end(run, shared, pictures, tmp_path) -> None:
    torch.save(checkpoint(shared / "parity" / "mobile_sam_vit_t.keys.json"), tmp_path / "random.pt")
    (tmp_path / "b.json").write_text(json.dumps([{"file_name": "a.png", "category_id": 1, "bbox": [9, 9, 20, 20], "score": 0.5}]))
    own = ["--model", "mobile-sam", "--weights", tmp_path / "random.pt"]
    code, _, err = run("segment", pictures, "-o", tmp_path / "out", "--boxes", tmp_path / "b.json", *own)
    assert code == 0, err
    (found,) = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert found["segmentation"]["size"] == [48, 64] and found["score"] == 0.5
    code, _, err = run("weights", "convert", tmp_path / "random.pt", "-o", tmp_path / "c.safetensors", "--model", "mobile-sam")
    assert code == 0, err
    converted = catalog.load("mobile-sam", tmp_path / "c.safetensors").state_dict()
    assert all(torch.equal(a, converted[k]) for k, a in catalog.load("mobile-sam", tmp_path / "random.pt").state_dict().items())


def test_an_evaluation_says_once_that_negative_clicks_are_not_heard(ti, pictures, coco_file, tmp_path) -> None:
    from depthseg import asking, truth
    from depthseg.score import Request

    dataset = truth.read(pictures, coco_file)
    segmenter = Segmenter(Plan(model="efficient-sam-ti"), network=ti, source=lambda images: [])
    results, *_ = asking.predict(dataset, segmenter, Request("point", (1, 2)), tmp_path / "journal")
    assert len(results) == 6
    assert [note for note in segmenter.notes if "negative" in note] == ["efficient-sam-ti takes no notice of negative points"]
    with pytest.raises(DepthsegError, match="at most 6 points"):
        asking.predict(dataset, segmenter, Request("point", (7,)), tmp_path / "other")


def test_the_zip_of_efficient_sam_s_is_read(tmp_path) -> None:
    torch.save({"model": {"a": torch.arange(3.0)}}, tmp_path / "s.pt")
    with zipfile.ZipFile(tmp_path / "s.pt.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(tmp_path / "s.pt", "efficient_sam_vits.pt")
        archive.writestr("__MACOSX/._efficient_sam_vits.pt", b"x")
    assert torch.equal(read(tmp_path / "s.pt.zip")["a"], torch.arange(3.0))
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.pt", bytes(10_000_000))
    for wrong, content in (("bomb.zip", None), ("empty.zip", b""), ("two.zip", b"junk")):
        if content is not None:
            (tmp_path / wrong).write_bytes(content)
        with pytest.raises(DepthsegError, match="not a readable checkpoint"):
            read(tmp_path / wrong)
