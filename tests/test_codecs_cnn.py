"""The codec `cnn`: maps of unit rms, embeddings, pictures of both; scaled per channel, loaded whole or not at all."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel, ConvNextConfig, ConvNextModel, ResNetConfig, ResNetModel

from heterodiff.codecs.cnn import (
    CNNCodec,
    ImageCodec,
    default_stages,
    latent_shape,
    load_image_codec,
    read_codec_config,
    scaled,
)
from heterodiff.codecs.make import make_codec
from heterodiff.config import CodecConfig
from heterodiff.data.dataset import ImageSpec
from heterodiff.data.sources import load_data
from heterodiff.errors import CheckpointError, ConfigError, HeterodiffError
from heterodiff.training.recipes.alignment_networks import build_image_codec
from heterodiff.training.recipes.base import store_scale
from heterodiff.training.start import train
from tests.test_text_encoder import change_config, change_weights, cut_weights
from tests.text_runs import text_config

WEIGHTS = "diffusion_pytorch_model.safetensors"


def small_codec(**settings: Any) -> ImageCodec:
    torch.manual_seed(0)
    sizes = {"sample_size": (16, 16), "block_out_channels": (8, 16), "latent_channels": 6, "embedding_dim": 12}
    return ImageCodec(**(sizes | settings)).eval()


def pictures(count: int = 5, channels: int = 3, height: int = 16, width: int = 16) -> torch.Tensor:
    return torch.rand(count, channels, height, width, generator=torch.Generator().manual_seed(1))


# ---- shapes ---------------------------------------------------------------------------------------------------------

SIZES = {
    (224, 224): ((32, 64, 128, 256, 256), (7, 7)),
    (128, 128): ((32, 64, 128, 256), (8, 8)),
    (64, 64): ((32, 64, 128), (8, 8)),
    (48, 64): ((32, 64, 128), (6, 8)),
    (32, 32): ((32, 64), (8, 8)),
    (16, 16): ((32,), (8, 8)),
    (8, 8): ((32,), (4, 4)),
    (512, 512): ((32, 64, 128, 256, 256, 256), (8, 8)),
}


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_as_many_stages_as_bring_the_picture_to_about_eight(size: tuple[int, int]) -> None:
    stages, latent_size = SIZES[size]
    assert default_stages(*size) == stages
    config = {"in_channels": 3, "sample_size": size, "block_out_channels": stages, "latent_channels": 256}
    assert latent_shape(config, 3, *size) == (256, *latent_size)


@pytest.mark.parametrize(("channels", "size"), [(3, (64, 64)), (1, (48, 64)), (4, (16, 16)), (2, (24, 8))], ids=str)
@torch.no_grad()
def test_every_part_has_the_shape_it_says(channels: int, size: tuple[int, int]) -> None:
    stages = tuple(min(16, width) for width in default_stages(*size))
    codec = small_codec(in_channels=channels, sample_size=size, block_out_channels=stages)
    latent_size = tuple(side // 2 ** len(stages) for side in size)
    images = pictures(2, channels, *size)
    latents = codec.encode(images * 2 - 1)
    assert latents.shape == (2, 6, *latent_size)
    assert latent_shape(codec.config, channels, *size) == (6, *latent_size)
    embeddings = codec.embed(latents)
    assert embeddings.shape == (2, 12)
    assert codec.get_latent_from_embedding(embeddings).shape == latents.shape
    assert codec.decode(latents).shape == images.shape
    adapter = CNNCodec(codec)
    assert adapter.latent_shape(channels, *size) == (6, *latent_size)
    assert adapter.encode(images).shape == latents.shape
    assert adapter.decode(latents).shape == images.shape


# ---- what the numbers are -------------------------------------------------------------------------------------------


@torch.no_grad()
def test_maps_have_an_rms_of_one_however_bright_the_picture() -> None:
    codec = small_codec()
    for images in (pictures(), 0.01 * pictures(), 1 - 0.01 * pictures()):
        latents = codec.encode(images * 2 - 1)
        torch.testing.assert_close(latents.square().mean(dim=(1, 2, 3)), torch.ones(5), atol=1e-4, rtol=0)


@torch.no_grad()
def test_the_map_of_an_embedding_does_not_depend_on_its_length() -> None:
    codec = small_codec()
    embeddings = torch.randn(5, 12)
    latents = codec.get_latent_from_embedding(embeddings)
    longer = embeddings * torch.tensor([1e-3, 0.1, 1, 10, 1000])[:, None]
    torch.testing.assert_close(codec.get_latent_from_embedding(longer), latents, atol=1e-5, rtol=0)
    assert float((latents[0] - latents[1]).abs().max()) > 0.01


def test_embeddings_are_scaled_by_their_length_and_zeros_stay() -> None:
    embeddings = torch.tensor([[3.0, 4.0], [-0.3, 0.4], [0.0, 0.0]])
    root = math.sqrt(2)
    torch.testing.assert_close(scaled(embeddings), root * torch.tensor([[0.6, 0.8], [-0.6, 0.8], [0.0, 0.0]]))


@torch.no_grad()
def test_pictures_lie_in_zero_to_one() -> None:
    codec = small_codec()
    for parameter in codec.decoder.parameters():
        parameter.mul_(3)
    latents = 5 * torch.randn(4, 6, 4, 4)
    assert float(codec.decode(latents).abs().max()) > 1
    images = codec.decode_from_latent(latents)
    assert 0 <= float(images.min()) <= float(images.max()) <= 1
    torch.testing.assert_close(images, CNNCodec(codec).decode(latents))  # no statistics yet: latents as they are


@torch.no_grad()
def test_an_image_depends_on_no_other_of_its_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    codec = CNNCodec(small_codec())
    images = pictures(7)
    z = codec.encode(images)
    decoded = codec.decode(z)
    monkeypatch.setattr("heterodiff.codecs.scaling.PIXELS_AT_ONCE", 2 * 16 * 16)
    torch.testing.assert_close(codec.encode(images), z, atol=1e-5, rtol=0)
    torch.testing.assert_close(codec.decode(z), decoded, atol=1e-5, rtol=0)
    torch.testing.assert_close(codec.encode(images[3:4]), z[3:4], atol=1e-5, rtol=0)


def test_latents_of_the_training_images_have_zero_mean_and_unit_std_in_every_channel(tmp_path: Path) -> None:
    data = load_data(text_config(tmp_path, data__image_size=(16, 32)).data)
    network = small_codec(sample_size=(16, 32))
    codec = CNNCodec(network)
    images = data.train.batch(range(len(data.train)))[0]
    before = codec.encode(images)
    assert float((before.std(dim=(0, 2, 3)) - 1).abs().max()) > 0.01
    store_scale(codec, data.train)
    network.save_pretrained(tmp_path / "codec")
    saved = CNNCodec(load_image_codec(tmp_path / "codec"))
    assert saved.per_channel
    for scaling in (codec, saved):
        z = scaling.encode(images)
        torch.testing.assert_close(z.double().mean(dim=(0, 2, 3)), torch.zeros(6).double(), atol=1e-4, rtol=0)
        torch.testing.assert_close(
            z.double().std(dim=(0, 2, 3), correction=0), torch.ones(6).double(), atol=1e-4, rtol=0
        )
        torch.testing.assert_close(scaling.unscale(z), before, atol=1e-4, rtol=0)
        torch.testing.assert_close(scaling.decode(z), network.decode_from_latent(before), atol=1e-4, rtol=0)


# ---- saved and loaded -----------------------------------------------------------------------------------------------


def test_a_saved_codec_is_the_same(tmp_path: Path) -> None:
    codec = small_codec()
    codec.save_pretrained(tmp_path / "run" / "image_codec")
    images = pictures()
    for folder in (tmp_path / "run", tmp_path / "run" / "image_codec"):  # a run, or its part alone
        loaded = load_image_codec(folder)
        assert not loaded.training
        assert not any(parameter.requires_grad for parameter in loaded.parameters())
        assert all(torch.equal(value, codec.state_dict()[name]) for name, value in loaded.state_dict().items())
        assert CNNCodec(loaded).fingerprint() == CNNCodec(codec).fingerprint()
        made = make_codec(CodecConfig(kind="cnn", path=folder))
        torch.testing.assert_close(made.encode(images), CNNCodec(codec).encode(images), atol=1e-5, rtol=0)
        assert tuple(read_codec_config(folder)["block_out_channels"]) == (8, 16)


def test_fingerprint_is_that_of_the_encoder() -> None:
    codec = small_codec()
    before = CNNCodec(codec).fingerprint()
    for part in (codec.decoder, codec.embedder, codec.projection):
        with torch.no_grad():
            next(part.parameters()).add_(1)
    codec.register_to_config(latents_mean=[0.5] * 6, latents_std=[2.0] * 6)
    assert CNNCodec(codec).fingerprint() == before
    for k, parameter in enumerate(codec.encoder.parameters()):
        kept = parameter.detach().clone()
        with torch.no_grad():
            parameter.view(-1)[0] += 1e-3
            assert CNNCodec(codec).fingerprint() != before, k
            parameter.copy_(kept)


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no folder": (lambda folder: folder.rename(folder.with_name("elsewhere")), "missing"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json: missing"),
    "not JSON": (lambda folder: (folder / "config.json").write_text("{"), "not readable as JSON"),
    "a list": (lambda folder: (folder / "config.json").write_text("[]"), "expected a JSON object, found list"),
    "another class": (change_config(_class_name="AutoencoderKL"), "expected a network of class ImageCodec, found"),
    "another width": (change_config(latent_channels=7), "damaged|another network"),
    "a stage more": (change_config(block_out_channels=[8, 16, 16]), "damaged|another network"),
    "widths of nonsense": (change_config(block_out_channels="many"), "damaged"),
    "a backbone that nobody knows": (change_config(backbone={"model_type": "nonsense"}), "damaged"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), "safetensors only"),
    "a pickle": (lambda folder: (folder / WEIGHTS).rename(folder / "diffusion_pytorch_model.bin"), "safetensors only"),
    "truncated": (cut_weights, "damaged"),
    "empty": (lambda folder: (folder / WEIGHTS).write_bytes(b""), "truncated"),
    "a weight missing": (change_weights(lambda tensors: tensors.pop("projection.0.weight")), "projection.0.weight"),
    "a weight too many": (change_weights(lambda tensors: tensors.update(more=torch.ones(1))), "more"),
    "NaN": (change_weights(lambda tensors: tensors["projection.0.bias"].fill_(math.nan)), "NaN"),
    "statistics of another width": (change_config(latents_mean=[0.0], latents_std=[1.0]), "of 6 numbers"),
    "a std of zero": (change_config(latents_mean=[0.0] * 6, latents_std=[0.0] * 6), "above 0"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_anything_but_a_whole_codec_is_refused(damage: str, tmp_path: Path) -> None:
    small_codec().save_pretrained(tmp_path / "image_codec")
    change, message = DAMAGES[damage]
    change(tmp_path / "image_codec")
    with pytest.raises(HeterodiffError, match=message) as error:
        CNNCodec(load_image_codec(tmp_path))
    assert isinstance(error.value, CheckpointError)
    assert str(error.value).count("\n") == 0


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 16, 16), r"images of 1x16x16: the image codec takes 3x16x16; set data\.channels=3"),
        ((3, 16, 32), r"images of 3x16x32: the image codec takes 3x16x16.*data\.image_size=\[16, 16\]"),
    ],
)
def test_images_that_it_was_not_made_for(shape: tuple[int, int, int], message: str) -> None:
    codec = CNNCodec(small_codec())
    with pytest.raises(ConfigError, match=message):
        codec.latent_shape(*shape)


@pytest.mark.parametrize(
    ("size", "stages", "nearest"),
    [((18, 16), 2, "[16, 16]"), ((31, 33), 3, "[32, 32]"), ((100, 260), 5, "[96, 256]"), ((8, 8), 4, "[16, 16]")],
)
def test_sides_that_do_not_divide_name_the_nearest_that_do(size: tuple[int, int], stages: int, nearest: str) -> None:
    with pytest.raises(ConfigError) as error:
        small_codec(sample_size=size, block_out_channels=(8,) * stages)
    assert f"images of {size[0]}x{size[1]}: the image codec needs sides divisible by {2**stages}" in str(error.value)
    assert f"set data.image_size={nearest}, or fewer alignment.block_out_channels" in str(error.value)


# ---- a pretrained backbone ------------------------------------------------------------------------------------------


@pytest.fixture
def resnet(tmp_path: Path) -> Path:
    """A tiny ResNet with random weights that halves a picture three times."""
    torch.manual_seed(3)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    network = ResNetModel(config)
    with torch.no_grad():
        for name, buffer in network.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_()
    network.save_pretrained(tmp_path / "resnet")
    return tmp_path / "resnet"


def test_backbone_weights_that_maps_do_not_need_wait_for_no_gradient(tmp_path: Path) -> None:
    """As the last norm of a ConvNeXt, of its pooled output: several processes would wait for its gradient in vain."""
    ConvNextModel(ConvNextConfig(num_stages=2, hidden_sizes=[8, 16], depths=[1, 1], patch_size=2)).save_pretrained(
        tmp_path / "convnext"
    )
    settings = {"alignment__backbone": str(tmp_path / "convnext"), "alignment__block_out_channels": [8, 16]}
    config = text_config(tmp_path / "run", recipe="alignment", **settings)
    codec = build_image_codec(config, load_data(config.data).spec)
    assert codec.training
    assert all(parameter.grad is None for parameter in codec.parameters())
    frozen = {name for name, parameter in codec.named_parameters() if not parameter.requires_grad}
    assert {name.split(".")[-2] for name in frozen} == {"layernorm"}
    codec.encode(torch.randn(2, 3, 16, 16)).square().sum().backward()
    learning = [p for p in codec.encoder.parameters() if p.requires_grad]
    assert len(learning) > 10
    assert all(parameter.grad is not None for parameter in learning)


BACKBONE = {"alignment__block_out_channels": [8, 8, 16], "data__image_size": 32}


def test_a_pretrained_backbone_takes_the_place_of_the_stages(resnet: Path, tmp_path: Path) -> None:
    config = text_config(tmp_path / "run", recipe="alignment", alignment__backbone=str(resnet), **BACKBONE)
    data = load_data(config.data)
    codec = build_image_codec(config, data.spec).eval()
    assert codec.latent_size == (4, 4)
    # it sees pictures as it was trained to: in the units of ImageNet
    images = data.train.batch(range(3))[0]
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)
    with torch.no_grad():
        expected = ResNetModel.from_pretrained(resnet).eval()((images - mean) / std).last_hidden_state
        stages = codec.encoder[0]
        torch.testing.assert_close(stages(images * 2 - 1), stages.projection(expected), atol=1e-4, rtol=1e-4)
    train(config, quiet=True)
    loaded = load_image_codec(tmp_path / "run")
    assert loaded.config.backbone["model_type"] == "resnet"
    with torch.no_grad():
        assert CNNCodec(loaded).encode(images).shape == (3, 6, 4, 4)
    # the weights it learned from, and the ones it has learned
    before = ResNetModel.from_pretrained(resnet).state_dict()
    after = loaded.encoder[0].network.state_dict()
    assert before.keys() == after.keys()
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert any("convolution.weight" in name for name in changed)


def write_bert(folder: Path) -> None:
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    BertModel(BertConfig(vocab_size=30, max_position_embeddings=8, **sizes)).save_pretrained(folder)


WRONG: dict[str, tuple[Callable[[Path], Any], dict[str, Any], str]] = {
    "no folder": (lambda folder: folder.rename(folder.with_name("gone")), {}, "expected a folder with config.json"),
    "no config": (lambda folder: (folder / "config.json").unlink(), {}, "expected a folder with config.json"),
    "not JSON": (lambda folder: (folder / "config.json").write_text("{"), {}, "expected a folder with config.json"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), {}, "alignment.backbone="),
    "cut weights": (cut_weights, {}, "alignment.backbone="),
    "a weight missing": (
        change_weights(lambda tensors: tensors.pop("embedder.embedder.convolution.weight")),
        {},
        "embedder.embedder.convolution.weight",
    ),
    "NaN": (
        change_weights(lambda tensors: tensors["embedder.embedder.convolution.weight"].fill_(math.nan)),
        {},
        "NaN",
    ),
    "a BERT": (write_bert, {}, "take a network for RGB images, such as a ResNet"),
    "a map of another size": (
        lambda folder: None,
        {"alignment__block_out_channels": [8, 16]},
        "one level for each halving",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_backbone_that_cannot_be_used_is_one_clear_message(what: str, resnet: Path, tmp_path: Path) -> None:
    change, overrides, message = WRONG[what]
    change(resnet)
    config = text_config(tmp_path / "run", alignment__backbone=str(resnet), **{**BACKBONE, **overrides})
    with pytest.raises((CheckpointError, ConfigError), match=message) as error:
        train(config, quiet=True)
    assert str(resnet) in str(error.value) or "alignment.backbone" in str(error.value)
    assert not (tmp_path / "run").exists()
    assert "\n" not in str(error.value)


@torch.no_grad()
def test_other_pictures_than_those_of_three_channels(resnet: Path, tmp_path: Path) -> None:
    """Grey is grey in all three; what has no colours is refused."""
    config = text_config(tmp_path, recipe="alignment", alignment__backbone=str(resnet), **BACKBONE)
    grey, colours = (
        build_image_codec(config, ImageSpec(32, 32, channels, (), (0.0, 255.0), "uint8")).eval() for channels in (1, 3)
    )
    grey.encoder.load_state_dict(colours.encoder.state_dict())
    images = pictures(2, 1, 32, 32)
    torch.testing.assert_close(grey.encode(images), colours.encode(images.repeat(1, 3, 1, 1)))
    with pytest.raises(ConfigError, match="take a network for RGB images"):
        build_image_codec(config, ImageSpec(32, 32, 2, (), (0.0, 255.0), "uint8"))


@torch.no_grad()
def test_a_backbone_in_half_precision_trains_in_single(resnet: Path, tmp_path: Path) -> None:
    ResNetModel.from_pretrained(resnet).half().save_pretrained(resnet)
    config = text_config(tmp_path, recipe="alignment", alignment__backbone=str(resnet), **BACKBONE)
    codec = build_image_codec(config, ImageSpec(32, 32, 3, (), (0.0, 255.0), "uint8")).eval()
    assert codec.dtype == torch.float32
    codec.save_pretrained(tmp_path / "image_codec")
    images = pictures(2, 3, 32, 32)
    torch.testing.assert_close(load_image_codec(tmp_path).encode(images), codec.encode(images), atol=1e-5, rtol=0)
