"""The networks against the official code's answers, transformers' SAM, the paper's counts, and themselves."""

import numpy as np
import pytest
import torch
from conftest import needs_ultralytics
from synthetic import DATA, checkpoint, picture
from torch import nn

from depthseg import catalog
from depthseg.models.boxes import BoxNet
from depthseg.models.checkpoint import load_into, save
from depthseg.models.depthnet import DepthNet
from depthseg.models.depthseg import build
from depthseg.models.sam import SamHead
from depthseg.schema import ABSENT, Frame, Prompts

BOX = np.array([[100, 80, 420, 360]])
POINT, POINTS2 = np.array([[[320, 240]]]), np.array([[[320, 240], [50, 400]]])
MODES = {
    "box": Prompts.of(boxes=BOX),
    "point": Prompts.of(points=POINT),
    "points2": Prompts.of(points=POINTS2, signs=np.array([[1, 0]])),
    "box_point": Prompts.of(boxes=BOX, points=POINT),
}


def _check(variant: str, state: dict, truth, low: int, full: int, embedding: tuple) -> None:
    network = build(variant, depth=False).eval()
    network.load_state_dict(state, strict=True)
    frame = Frame((480, 640), network.side)
    x = frame.image(picture())
    np.testing.assert_allclose(x[:, :8, :16], truth["input_first_rows"], atol=2e-5)
    with torch.inference_mode():
        features = network.encode(torch.from_numpy(x)[None])
        a, b = embedding
        np.testing.assert_allclose(features[0][0].numpy()[::a, ::b, ::b], truth["embedding_strided"], atol=2e-5)
        mask = None
        for mode, prompt in [*MODES.items(), ("point_mask", MODES["point"])]:
            for multi in (True, False):
                logits, iou = network.decode(
                    features,
                    torch.zeros(1, dtype=torch.long),
                    torch.from_numpy(frame.to_prompt(prompt.points)),
                    torch.from_numpy(prompt.labels),
                    mask if mode == "point_mask" else None,
                    multi,
                )
                name = f"{mode}_{'multi' if multi else 'single'}"
                got = logits[0].numpy()
                np.testing.assert_allclose(got[:, ::low, ::low], truth[f"{name}_lowres_strided{low}"], atol=2e-5, err_msg=name)
                np.testing.assert_allclose(iou[0].numpy(), truth[f"{name}_iou"], atol=1e-5, err_msg=name)
                if name == "point_multi":
                    mask = logits[:, :1]
                if f"{name}_full_area" in truth:
                    large = np.stack([frame.logits(g) for g in got])
                    np.testing.assert_allclose(large[:, ::full, ::full], truth[f"{name}_full_strided{full}"], atol=2e-5)
                    areas = [int(frame.crop(g).whole().sum()) for g in got]
                    np.testing.assert_allclose(areas, truth[f"{name}_full_area"], atol=1)  # one pixel within rounding of 0


def test_l0_answers_as_the_official_code() -> None:
    state = checkpoint(DATA / "efficientvit_sam_l0.keys.json")
    _check("l0", state, np.load(DATA / "efficientvit_sam_l0.npz"), 16, 32, (32, 8))


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["l0", "xl0"])
def test_full_parity_kit(variant: str, shared) -> None:
    kit = shared / "parity"
    state = checkpoint(kit / f"efficientvit_sam_{variant}.keys.json")
    _check(variant, state, np.load(kit / f"efficientvit_sam_{variant}.npz"), 4, 8, (8, 4))


def test_norms_and_attention_carry_the_official_eps() -> None:
    network = build("l0", depth=False)
    for m in network.modules():
        if isinstance(m, nn.BatchNorm2d | nn.LayerNorm):
            assert m.eps == 1e-6
        if type(m).__name__ == "LiteMLA":
            assert m.eps == 1e-15


@pytest.mark.parametrize(
    ("name", "millions"),
    [("l0", 34_792_784), ("l1", 47_650_128), ("l2", 61_328_592), ("xl0", 116_957_904), ("xl1", 203_346_128)],
)
def test_parameter_counts(name: str, millions: int) -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in build(name, depth=False).parameters()) == millions


def test_depth_l2_has_two_encoders_one_head_and_alpha() -> None:
    with torch.device("meta"):
        network = build("l2", depth=True)
    assert sum(p.numel() for p in network.parameters()) == 118_592_625
    assert network.alpha.shape == ()


def _renamed(key: str) -> str:
    """SAM's parameter name -> transformers' name."""
    key = key.replace("norm_final_attn", "layer_norm_final_attn")
    for i in "1234":
        key = key.replace(f".norm{i}.", f".layer_norm{i}.")
    for a, b in {"mask_downscaling.0": "mask_embed.conv1", "mask_downscaling.1": "mask_embed.layer_norm1",
                 "mask_downscaling.3": "mask_embed.conv2", "mask_downscaling.4": "mask_embed.layer_norm2",
                 "mask_downscaling.6": "mask_embed.conv3", "point_embeddings": "point_embed",
                 "pe_layer.positional_encoding_gaussian_matrix": "shared_embedding.positional_embedding",
                 "output_upscaling.0": "upscale_conv1", "output_upscaling.1": "upscale_layer_norm",
                 "output_upscaling.3": "upscale_conv2"}.items():  # fmt: skip
        key = key.replace(a, b)
    for head in ("iou_prediction_head", "output_hypernetworks_mlps.0", "output_hypernetworks_mlps.1",
                 "output_hypernetworks_mlps.2", "output_hypernetworks_mlps.3"):  # fmt: skip
        for i, new in enumerate(("proj_in", "layers.0", "proj_out")):
            key = key.replace(f"{head}.layers.{i}.", f"{head}.@{new}.")
    return key.replace("@", "")


def test_head_equals_transformers_sam() -> None:
    from transformers import SamConfig, SamMaskDecoderConfig, SamModel, SamPromptEncoderConfig, SamVisionConfig

    torch.manual_seed(0)
    dim, side = 32, 64
    config = SamConfig(
        vision_config=SamVisionConfig(hidden_size=16, output_channels=dim, num_hidden_layers=1, num_attention_heads=2,
                                      image_size=1024, patch_size=16, num_pos_feats=dim // 2, mlp_dim=32,
                                      global_attn_indexes=[0], window_size=4),
        prompt_encoder_config=SamPromptEncoderConfig(hidden_size=dim, image_size=1024, patch_size=16, mask_input_channels=16),
        mask_decoder_config=SamMaskDecoderConfig(hidden_size=dim, mlp_dim=64, num_attention_heads=8, iou_head_hidden_dim=24),
    )  # fmt: skip
    oracle = SamModel(config).eval()
    head = SamHead(dim, heads=8, hidden=64, iou_hidden=24).eval()
    for m in oracle.modules():
        if isinstance(m, nn.LayerNorm):
            m.eps = 1e-6
    state = {_renamed(k): v for k, v in head.state_dict().items()}
    missing, unexpected = oracle.load_state_dict(state, strict=False)
    assert not unexpected
    assert not [k for k in missing if k.startswith(("prompt_encoder", "mask_decoder")) and "positional" not in k]
    for m in (oracle.shared_image_embedding, oracle.prompt_encoder.shared_embedding):
        m.positional_embedding.data.copy_(head.prompt_encoder.pe_layer.positional_encoding_gaussian_matrix)
    image = torch.randn(1, dim, side, side)
    boxes = torch.tensor([[100.0, 80, 420, 360], [5, 6, 900, 1000]])
    owner = torch.zeros(2, dtype=torch.long)
    with torch.inference_mode():
        p = Prompts.of(boxes=boxes.numpy())
        low, iou, _ = head((image,), owner, torch.from_numpy(p.points), torch.from_numpy(p.labels), which=range(1, 4))
        theirs = oracle(image_embeddings=image, input_boxes=boxes[None], multimask_output=True)
        torch.testing.assert_close(low, theirs.pred_masks[0], atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(iou, theirs.iou_scores[0], atol=1e-5, rtol=1e-4)
        points = torch.tensor([[[50.0, 60], [700, 300]], [[512, 512], [3, 1000]]])
        signs = torch.tensor([[1, 0], [1, 1]])
        p = Prompts.of(points=points.numpy(), signs=signs.numpy())
        low, iou, _ = head((image,), owner, torch.from_numpy(p.points), torch.from_numpy(p.labels), which=range(1))
        theirs = oracle(image_embeddings=image, input_points=points[None], input_labels=signs[None], multimask_output=False)
        torch.testing.assert_close(low, theirs.pred_masks[0], atol=2e-5, rtol=1e-4)


@pytest.fixture(scope="module")
def nano():
    torch.manual_seed(1)
    return build("nano", depth=True).eval()


def _features(network, count: int):
    torch.manual_seed(2)
    with torch.inference_mode():
        return network.encode(torch.randn(count, 3, 96, 96))


def test_flat_prompts_equal_the_loop_over_images(nano) -> None:
    features = _features(nano, 3)
    owner = torch.tensor([2, 0, 1, 1, 0])
    p = Prompts.of(boxes=np.random.default_rng(0).uniform(0, 1000, (5, 4)))
    points, labels = torch.from_numpy(p.points), torch.from_numpy(p.labels)
    with torch.inference_mode():
        flat, _ = nano.decode(features, owner, points, labels)
        for i, o in enumerate(owner.tolist()):
            one, _ = nano.decode(
                tuple(f[o : o + 1] for f in features), torch.zeros(1, dtype=torch.long), points[i : i + 1], labels[i : i + 1]
            )
            torch.testing.assert_close(flat[i : i + 1], one, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("variant", ["nano"])
def test_absent_tokens_change_nothing(nano, variant: str) -> None:
    features = _features(nano, 1)
    p = Prompts.of(points=np.array([[[500.0, 300]]]))
    points, labels = torch.from_numpy(p.points), torch.from_numpy(p.labels)
    wide = torch.cat([points, torch.full((1, 3, 2), 77.0)], 1), torch.cat([labels, torch.full((1, 3), ABSENT)], 1)
    with torch.inference_mode():
        owner = torch.zeros(1, dtype=torch.long)
        a, b = nano.decode(features, owner, points, labels), nano.decode(features, owner, *wide)
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_alpha_zero_is_exactly_the_rgb_model(tmp_path, nano) -> None:
    torch.manual_seed(3)
    plain = build("nano", depth=False).eval()
    path = tmp_path / "plain.pt"
    torch.save(plain.state_dict(), path)
    load_into(nano, path)
    x, d = torch.randn(1, 3, 64, 64), torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        for a, b in zip(plain.encode(x), nano.encode(x, d), strict=True):
            assert torch.equal(a, b)
        assert any(not torch.equal(a, b) for a, b in zip(_fused(nano, x, d), plain.encode(x), strict=True))


def _fused(network, x, d):
    network.alpha.data.fill_(0.5)
    out = network.encode(x, d)
    network.alpha.data.fill_(0)
    return out


@pytest.mark.parametrize("name", catalog.MODELS)
def test_every_row_builds_and_takes_its_native_input(name: str) -> None:
    row = catalog.MODELS[name]
    if "extra yolo" in row.note:
        needs_ultralytics()
    with torch.device("meta"):
        network = catalog.resolve(row)(**row.args).eval().to("meta")
        x = torch.empty(1, 3, row.input, row.input)
        features = network.encode(x, x if network.alpha is not None else None)
    assert network.side == row.input and network.frame((3, 4), row.input).side == row.input
    assert features[-1 if row.build.startswith("depthseg.fast_sam") else 0].shape[-2:] in ((64, 64), (256, 256))


def test_small_networks_save_and_load(tmp_path) -> None:
    for cls, shape in ((DepthNet, (1, 32, 32)), (BoxNet, None)):
        network = cls().eval()
        save(network, tmp_path / "w.safetensors", {"a": "b"})
        again = cls.load(tmp_path / "w.safetensors")
        x = torch.randn(1, 3, 64, 64)
        with torch.inference_mode():
            out = again(x)
            ours = network(x)
        if shape:
            assert out.shape == shape
            torch.testing.assert_close(out, ours, atol=2e-2, rtol=2e-2)  # stored in fp16
        else:
            scores, boxes = out
            assert scores.shape == (1, 8 * 8 + 4 * 4 + 2 * 2) and boxes.shape == (1, 84, 4)
            assert (boxes[..., 2:] > boxes[..., :2]).all()


PROMPTS = {  # owner and labels of each prompt
    "boxes": ([0, 1, 1], [[2, 3]] * 3),
    "boxes of one image": ([1] * 5, [[2, 3]] * 5),
    "boxes out of order": ([1, 1, 1, 0, 0, 0, 0, 0, 1, 1, 1, 1], [[2, 3]] * 12),
    "points": ([0, 1, 1], [[1, -1]] * 3),
    "ragged": ([0, 0, 0], [[1, 0, 1, -1], [1, -1, -10, -10], [2, 3, -10, -10]]),
    "masks": ([0, 0, 0, 1], [[1, -1]] * 4),
    "many points": ([0, 0, 0, 1], [[1, 0] * 5, [1] * 9 + [-1], [2, 3, 1, 1] + [-10] * 6, [2, 3] + [0] * 8]),
}


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_folded_decoder_equals_the_plain_one(prompt):
    """Without gradients the head folds the cells' projections into the tokens, or does them once for an image, and grows masks by
    cells: other orders of the same sums."""
    torch.manual_seed(0)
    head = SamHead().eval()
    features = (torch.randn(2, 256, 16, 16),)
    owner, labels = (torch.tensor(column) for column in PROMPTS[prompt])
    points = torch.rand(*labels.shape, 2) * 1000
    earlier = torch.randn(len(owner), 1, 64, 64) if prompt == "masks" else None
    assert head.mask_decoder.transformer.final_attn_token_to_image.folds(5 + points.shape[1]) is (prompt != "many points")
    plain, iou = (out.detach() for out in head(features, owner, points, labels, earlier)[:2])
    with torch.inference_mode():
        folded, folded_iou, _ = head(features, owner, points, labels, earlier)
        best, best_iou, _ = head(features, owner, points, labels, earlier, range(1, 4), best=True)
    assert _apart(plain, folded) < 1e-6 and float((iou - folded_iou).abs().max()) < 1e-6
    assert not torch.equal(plain, folded)  # it is another way
    top = 1 + iou[:, 1:].argmax(1)
    assert best.shape[:2] == best_iou.shape == (len(owner), 1)
    every = torch.arange(len(owner))
    assert _apart(plain[every, top], best[:, 0]) < 1e-6 and float((iou[every, top] - best_iou[:, 0]).abs().max()) < 1e-6


def _apart(a, b) -> float:
    return float((a - b).abs().max() / a.abs().max())


def test_the_best_mask_of_a_head_with_skips(nano):
    features, owner = _features(nano, 2), torch.tensor([0, 1, 1, 1])
    p = Prompts.of(points=np.random.default_rng(0).uniform(0, 1000, (4, 1, 2)))
    with torch.inference_mode():
        logits, iou = nano.decode(features, owner, torch.from_numpy(p.points), torch.from_numpy(p.labels))
        best, best_iou = nano.decode(features, owner, torch.from_numpy(p.points), torch.from_numpy(p.labels), best=True)
    top = iou.argmax(1)
    assert torch.equal(best_iou[:, 0], iou[torch.arange(4), top])
    assert _apart(logits[torch.arange(4), top], best[:, 0]) < 1e-6


def test_half_precision_does_not_move_prompts(nano):
    """bf16 has 8 bits: positions in it would be off by up to 4 of 1024 pixels."""
    points, labels = torch.tensor([[[513.0, 300], [1000, 999]]]), torch.tensor([[2, 3]])
    with torch.inference_mode():
        exact = nano.prompt_encoder.tokens(points, labels)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(nano.prompt_encoder.tokens(points, labels).float(), exact)


@pytest.mark.parametrize("prompt", ["boxes of one image", "boxes", "ragged", "masks"])
def test_the_decoder_in_half_precision_stays_close(prompt):
    torch.manual_seed(0)
    head = SamHead().eval()
    owner, labels = (torch.tensor(column) for column in PROMPTS[prompt])
    given = (torch.randn(2, 256, 16, 16),), owner, torch.rand(*labels.shape, 2) * 1000, labels
    earlier = torch.randn(len(owner), 1, 64, 64) if prompt == "masks" else None
    with torch.inference_mode():
        exact, iou, _ = head(*given, earlier)
        with torch.autocast("cpu", torch.bfloat16):
            half, half_iou, _ = head(*given, earlier)
    assert float((half - exact).norm() / exact.norm()) < 0.03 and float((iou - half_iou).abs().max()) < 0.01
