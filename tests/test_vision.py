"""Image encoders: the published network's shapes, early exit, folding, and features as cells in reading order."""

from __future__ import annotations

import dataclasses
import shutil

import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision import models

from hyperpelt_ds.backbones import clip
from hyperpelt_ds.config import VisionConfig
from hyperpelt_ds.model import Predictor, build
from hyperpelt_ds.vision import EfficientNetLite0, UnreadableImage, VisionEncoder, fingerprint, load_encoder
from hyperpelt_ds.vision.lite import SameConv

PICTURES = [Image.effect_noise((40, 30), 90).convert("RGB"), Image.new("RGB", (16, 16), (200, 20, 20))]


def _randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Weights and running statistics for which every layer matters."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            noise = torch.randn(value.shape, generator=generator)
            spread = (2 / value[0].numel()) ** 0.5 if value.dim() > 1 else 0.1
            value.copy_(noise * spread + ("var" in name or (value.dim() == 1 and name.endswith("weight"))))
    return model.eval()


@pytest.fixture(scope="module")
def lite(tmp_path_factory) -> tuple[EfficientNetLite0, VisionConfig]:
    model = EfficientNetLite0()
    _randomise(model)
    file = tmp_path_factory.mktemp("lite") / "lite.pth"
    torch.save(model.state_dict(), file)
    return model, VisionConfig(encoder="efficientnet_lite0", weights=str(file), image_size=64)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory) -> str:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.CLIPVisionConfig(**sizes, image_size=32, patch_size=8)
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("clip")
    transformers.CLIPVisionModel(config).save_pretrained(folder)
    return str(folder)


def test_efficientnet_lite0_has_the_published_number_of_parameters():
    assert sum(parameter.numel() for parameter in EfficientNetLite0().parameters()) == 4_652_008


@pytest.mark.parametrize(
    ("stage", "cells", "channels"),
    [("block3", 64, 40), ("block5", 16, 112), ("block7", 4, 320), ("head", 4, 1280), (None, 4, 1280)],
)
def test_a_stage_gives_its_grid(lite, stage, cells, channels):
    encoder = load_encoder(dataclasses.replace(lite[1], stage=stage))
    assert (encoder.cells, encoder.channels) == (cells, channels)
    features = encoder.encode(PICTURES)
    assert features.shape == (2, cells, channels) and features.dtype == torch.float32


def test_folded_batch_norms_and_early_exit_change_nothing(lite):
    model, _ = lite
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        folded = model.feature_map("head")(pixels)
        assert torch.allclose(model._fc(folded.mean((2, 3))), model(pixels), atol=1e-3, rtol=1e-3)
        assert folded.std() > 0.01


def test_same_padding_puts_the_odd_row_at_the_end():
    conv = SameConv(1, 1, 3, stride=2, bias=False)
    nn.init.ones_(conv.weight)
    image = torch.zeros(1, 1, 4, 4)
    image[..., 0, 0] = 1.0  # seen by the first window only if nothing is padded before it
    image[..., 2, 2] = 10.0  # seen by all four
    assert conv(image).flatten().tolist() == [11.0, 10.0, 10.0, 10.0]
    assert conv(torch.zeros(1, 1, 5, 7)).shape[-2:] == (3, 4)


@pytest.fixture(scope="module")
def encoders(lite, clip_folder, tmp_path_factory) -> dict[str, VisionEncoder]:
    """One of each source of encoders."""
    file = tmp_path_factory.mktemp("resnet") / "resnet18.safetensors"
    save_file(_randomise(models.resnet18(weights=None)).state_dict(), file)
    configs = [lite[1], VisionConfig("resnet18", str(file), 64), VisionConfig("clip", clip_folder, 32)]
    return {str(config.encoder): load_encoder(config) for config in configs}


@pytest.mark.parametrize("name", ["efficientnet_lite0", "resnet18", "clip"])
def test_an_image_has_the_same_features_whatever_batch_it_is_in(encoders, name):
    """Real encoders, in batches of 1, 7 and 32: equal, or apart by up to 5e-5 of the features' deviation, where sums
    are taken in another order. Storing them in float16 rounds off ten times as much."""
    encoder = encoders[name]
    pictures = [picture.rotate(turn) for turn in (0, 90, 180) for picture in PICTURES] + PICTURES[:1]
    together = encoder.encode(pictures)
    assert together.shape == (7, encoder.cells, encoder.channels) and together.device.type == "cpu"
    for size in (1, 3):
        assert (encoder.encode(pictures, batch_size=size) - together).abs().max() < 1e-4 * together.std()
    assert (together[0] - together[1]).abs().mean() > 0.1 * together.std()


@pytest.mark.parametrize("name", ["efficientnet_lite0", "resnet18", "clip"])
def test_features_are_made_in_full_precision_wherever_they_are_asked_for(encoders, name):
    plain = encoders[name].encode(PICTURES)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(encoders[name].encode(PICTURES), plain)


def test_a_file_has_the_features_of_the_picture_in_it_and_a_bad_one_is_named(lite, tmp_path):
    encoder = load_encoder(lite[1])
    PICTURES[0].save(tmp_path / "a.png")
    assert torch.equal(encoder.encode([tmp_path / "a.png", str(tmp_path / "a.png")])[1], encoder.encode(PICTURES)[0])
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:700])
    with pytest.raises(UnreadableImage, match=r"cannot read image '.*b\.png': .*truncated"):
        encoder.encode([tmp_path / "a.png", tmp_path / "b.png"])


def test_a_new_image_is_read_like_a_stored_one_and_may_be_a_pair(config, tmp_path):
    """An untrained run answers nothing of use, but it reads pictures."""
    PICTURES[0].save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"")
    one = Predictor(config, build(config, ["easy_vqa"]))
    expected = load_encoder(config.vision).encode(PICTURES)
    assert torch.equal(one.features([tmp_path / "a.png", PICTURES[1]]), expected)
    with pytest.raises(ValueError, match=r"cannot read image '.*b\.png': the file is empty"):
        one.generate("easy_vqa", ["what color"], [str(tmp_path / "b.png")])
    with pytest.raises(ValueError, match="an image of this run is 1 pictures, got 2"):
        one.features([(PICTURES[0], PICTURES[1])])

    both = config.override([f"vision.cells={2 * config.vision.cells}"])
    two = Predictor(both, build(both, ["easy_vqa"]))
    pair = (str(tmp_path / "a.png"), PICTURES[1])
    assert torch.equal(two.features([pair, pair[::-1]]), torch.stack([expected, expected.flip(0)]).flatten(1, 2))
    assert len(two.generate("easy_vqa", ["what color", "what shape"], [pair, pair], max_new_tokens=2)) == 2
    with pytest.raises(ValueError, match="an image of this run is 2 pictures, got 1"):
        two.features([PICTURES[0]])


def test_cells_run_row_by_row_from_the_top_left(tmp_path):
    model = _randomise(models.resnet18(weights=None))
    save_file(model.state_dict(), tmp_path / "resnet.safetensors")
    config = VisionConfig(
        encoder="resnet18", weights=str(tmp_path / "resnet.safetensors"), image_size=128, stage="maxpool"
    )
    encoder = load_encoder(config)
    image = Image.new("RGB", (128, 128), "black")
    changed = image.copy()
    changed.paste((255, 255, 255), (120, 8, 124, 12))  # right end of the third row of 32 x 32 cells
    difference = (encoder.encode([changed]) - encoder.encode([image])).abs().sum((0, 2))
    rows, columns = difference.view(32, 32).nonzero().unbind(1)
    assert rows.min() >= 0 and rows.max() <= 5 and columns.min() >= 28


def test_grey_transparent_and_palette_images_are_taken(lite):
    encoder = load_encoder(lite[1])
    white = encoder.encode([Image.new("RGB", (20, 20), "white")])
    clear = encoder.encode([Image.new("RGBA", (20, 20), (9, 9, 9, 0))])
    assert torch.equal(white, clear)
    assert torch.equal(
        encoder.encode([PICTURES[1].convert("P")]), encoder.encode([PICTURES[1].convert("P").convert("RGB")])
    )
    assert encoder.encode([PICTURES[0].convert("L")]).isfinite().all()


def test_torchvision_stops_at_the_stage_and_equals_the_whole_model(tmp_path):
    model = _randomise(models.resnet18(weights=None))
    file = tmp_path / "resnet18.pth"
    torch.save(model.state_dict(), file)
    config = VisionConfig(encoder="resnet18", weights=str(file), image_size=64)
    last, earlier = load_encoder(config), load_encoder(dataclasses.replace(config, stage="layer2"))
    assert (last.cells, last.channels) == (4, 512) and (earlier.cells, earlier.channels) == (64, 128)
    seen = {}
    model.layer4.register_forward_hook(lambda module, inputs, output: seen.update(map=output))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    red = (torch.tensor([200.0, 20.0, 20.0]) / 255 - mean) / std
    with torch.no_grad():
        model(red.view(1, 3, 1, 1).expand(1, 3, 64, 64))
    assert torch.allclose(last.encode(PICTURES[1:]), seen["map"].flatten(2).transpose(1, 2), rtol=1e-3, atol=1e-3)


def test_clip_gives_the_last_states_of_its_patches(clip_folder):
    encoder = load_encoder(VisionConfig(encoder="clip", weights=clip_folder, image_size=32))
    assert (encoder.cells, encoder.channels) == (16, 16)
    model = transformers.CLIPVisionModel.from_pretrained(clip_folder)
    mean, std = torch.tensor(clip.MEAN), torch.tensor(clip.STD)
    red = (torch.tensor([200.0, 20.0, 20.0]) / 255 - mean) / std
    with torch.no_grad():
        states = model(pixel_values=red.view(1, 3, 1, 1).expand(1, 3, 32, 32)).last_hidden_state
    assert torch.allclose(encoder.encode(PICTURES[1:]), states[:, 1:], atol=1e-5)


def test_a_tower_that_is_no_clip_or_not_whole_is_refused(clip_folder, tmp_path):
    """Features of a random network look like features."""
    settings = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32)
    transformers.ViTModel(transformers.ViTConfig(**settings, patch_size=8)).save_pretrained(tmp_path / "vit")
    with pytest.raises(ValueError, match=r"vision.weights: .*vit holds a model of type 'vit', expected clip"):
        load_encoder(VisionConfig(encoder="clip", weights=str(tmp_path / "vit"), image_size=32))
    shutil.copytree(clip_folder, tmp_path / "cut")
    weights = load_file(tmp_path / "cut" / "model.safetensors")
    weights.pop(next(name for name in weights if "layers.0" in name))
    save_file(weights, tmp_path / "cut" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"vision.weights: .*cut lacks the weights"):
        load_encoder(VisionConfig(encoder="clip", weights=str(tmp_path / "cut"), image_size=32))


@pytest.mark.parametrize(("name", "stage"), [("swin_t", None), ("vit_b_32", "encoder")])
def test_a_layer_that_is_no_map_of_channels_is_refused(tmp_path, name, stage):
    torch.save(models.get_model(name, weights=None).state_dict(), tmp_path / "w.pth")
    config = VisionConfig(encoder=name, weights=str(tmp_path / "w.pth"), image_size=224, stage=stage)
    with pytest.raises(ValueError, match=r"vision.stage: .* expected channels x height x width"):
        load_encoder(config)


def test_a_description_names_the_weights(lite, tmp_path):
    _, config = lite
    other = _randomise(EfficientNetLite0(), seed=1)
    torch.save(other.state_dict(), tmp_path / "other.pth")
    first, again = load_encoder(config).describe(), load_encoder(config).describe()
    changed = load_encoder(dataclasses.replace(config, weights=str(tmp_path / "other.pth"))).describe()
    assert first == again and len(first["sha256"]) == 64
    assert {name for name in first if first[name] != changed[name]} == {"sha256"}
    assert (first["encoder"], first["image_size"], first["stage"]) == ("efficientnet_lite0", 64, "head")


def test_a_fingerprint_depends_on_names_and_values_and_not_on_their_order():
    a, b = torch.arange(3.0), torch.ones(2, dtype=torch.int64)
    assert fingerprint([("a", a), ("b", b)]) == fingerprint([("b", b), ("a", a)])
    assert fingerprint([("a", a)]) != fingerprint([("b", a)]) != fingerprint([("b", a + 1)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder": None}, "vision.encoder"),
        ({"encoder": "resnet1"}, r"vision.encoder: unknown encoder 'resnet1'.*efficientnet_lite0, clip"),
        ({"weights": None}, "vision.weights: efficientnet_lite0 needs"),
        ({"weights": "/no/such.pth"}, "vision.weights: no file /no/such.pth"),
        ({"stage": "block9"}, "vision.stage.*block7 and head, got 'block9'"),
        ({"encoder": "resnet18"}, "vision.weights: .* does not fit ResNet"),
    ],
)
def test_what_cannot_be_had_is_named(lite, change, message):
    with pytest.raises(ValueError, match=message):
        load_encoder(dataclasses.replace(lite[1], **change))


def test_stages_that_do_not_exist_are_named(tmp_path, clip_folder):
    torch.save(models.resnet18(weights=None).state_dict(), tmp_path / "r.pth")
    config = VisionConfig(encoder="resnet18", weights=str(tmp_path / "r.pth"), image_size=32, stage="layer9")
    with pytest.raises(ValueError, match=r"vision.stage: resnet18 has no layer 'layer9'.*layer4"):
        load_encoder(config)
    with pytest.raises(ValueError, match=r"vision.image_size: .* takes images of 32 pixels, got 64"):
        load_encoder(VisionConfig(encoder="clip", weights=clip_folder, image_size=64))
    with pytest.raises(ValueError, match=r"vision.stage: clip has no stages"):
        load_encoder(VisionConfig(encoder="clip", weights=clip_folder, image_size=32, stage="x"))
