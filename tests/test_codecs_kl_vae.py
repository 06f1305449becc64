"""The codec `kl-vae`: latents are scaled as diffusers scales them, and only whole VAEs are loaded."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from safetensors.torch import load_file, save_file

from heterodiff.codecs import scaling as latent
from heterodiff.codecs.base import PixelCodec
from heterodiff.codecs.kl_vae import KLVAECodec, load_vae
from heterodiff.codecs.make import latent_shape, make_codec
from heterodiff.codecs.scaling import check_scale, measure, scaled_std
from heterodiff.config import CodecConfig
from heterodiff.errors import CheckpointError, ConfigError, DataError
from tests.vae_runs import plain_vae

MEAN, STD = [0.5, -1.0, 0.0, 2.0], [0.5, 1.0, 2.0, 4.0]
SCALES: dict[str, dict[str, Any]] = {
    "a mean and std of each channel": {"latents_mean": MEAN, "latents_std": STD, "scaling_factor": 1.0},
    "with a factor": {"latents_mean": MEAN, "latents_std": STD, "scaling_factor": 0.3},
    "a factor": {"scaling_factor": 0.18215},
    "a factor and a shift": {"scaling_factor": 0.3611, "shift_factor": 0.1159},
    "a std only": {"latents_std": STD, "scaling_factor": 1.0},
    "a mean only, which the shift is not added to": {"latents_mean": MEAN, "shift_factor": 9.0},
}
WEIGHTS = "diffusion_pytorch_model.safetensors"


def slow_scaling(latents: np.ndarray, config: dict[str, Any]) -> np.ndarray:
    """z = (latent - mean) / std * scaling_factor, a number at a time."""
    z = np.empty_like(latents)
    for index in np.ndindex(latents.shape):
        channel = index[1]
        mean = config["latents_mean"][channel] if config.get("latents_mean") else config.get("shift_factor") or 0.0
        std = config["latents_std"][channel] if config.get("latents_std") else 1.0
        z[index] = (latents[index] - mean) / std * config.get("scaling_factor", 0.18215)
    return z


@pytest.mark.parametrize("case", SCALES)
def test_scaling_is_that_of_diffusers_and_decoding_undoes_it(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    codec = KLVAECodec(plain_vae(**SCALES[case]))
    mean, std, noise = torch.randn(3, 3, 4, 2, 5).unbind(0)
    std = std.exp()
    posterior = torch.cat([mean, std], dim=1)
    decoded: list[torch.Tensor] = []
    monkeypatch.setattr(codec.vae, "decode", lambda z: decoded.append(z) or SimpleNamespace(sample=z))
    for latents, z in (
        (mean, codec.draw(posterior, None)),
        (mean + std * noise, codec.draw(posterior, noise)),
        (mean, codec.draw(posterior, torch.zeros_like(noise))),
    ):
        np.testing.assert_allclose(z.numpy(), slow_scaling(latents.numpy(), SCALES[case]), rtol=1e-5, atol=1e-6)
        codec.decode(z)
        torch.testing.assert_close(decoded[-1], latents, rtol=1e-5, atol=1e-5)


def test_the_networks_work_on_images_in_minus_one_to_one() -> None:
    vae = plain_vae(**SCALES["with a factor"])
    codec = KLVAECodec(vae)
    images = torch.rand(3, 1, 16, 24)
    with torch.no_grad():
        expected = vae.encode(images * 2 - 1).latent_dist
        z = (expected.mean - torch.tensor(MEAN).view(-1, 1, 1)) / torch.tensor(STD).view(-1, 1, 1) * 0.3
        drawn = vae.decode(expected.mean).sample / 2 + 0.5
    torch.testing.assert_close(codec.posterior(images), torch.cat([expected.mean, expected.std], dim=1))
    torch.testing.assert_close(codec.encode(images), z)
    torch.testing.assert_close(codec.decode(codec.encode(images)), drawn.clamp(0, 1), atol=1e-5, rtol=1e-5)
    assert tuple(z.shape[1:]) == codec.latent_shape(1, 16, 24) == (4, 4, 6)


def test_decoding_in_parts_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    codec = KLVAECodec(plain_vae())
    z = torch.randn(5, 4, 4, 4)
    whole, calls = codec.decode(z), []
    original = codec.vae.decode
    monkeypatch.setattr(codec.vae, "decode", lambda part: calls.append(len(part)) or original(part))
    monkeypatch.setattr(latent, "PIXELS_AT_ONCE", 2 * 16 * 16)
    torch.testing.assert_close(codec.decode(z), whole)
    assert calls == [2, 2, 1]
    assert 0 <= float(whole.min()) <= float(whole.max()) <= 1


def test_log_variance_is_clamped_as_diffusers_clamps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    codec = KLVAECodec(plain_vae())
    moments = torch.cat([torch.zeros(1, 4, 1, 1), torch.tensor([-100.0, -30.0, 20.0, 100.0]).view(1, 4, 1, 1)], dim=1)
    monkeypatch.setattr(codec.vae, "encode", lambda x: SimpleNamespace(latent_dist=SimpleNamespace(parameters=moments)))
    expected = [math.exp(-15), math.exp(-15), math.exp(10), math.exp(10)]
    assert codec.posterior(torch.zeros(1, 1, 4, 4))[0, 4:].flatten().tolist() == pytest.approx(expected)


def test_measured_statistics_are_those_of_drawn_latents() -> None:
    rng = np.random.default_rng(0)
    mean = rng.normal(MEAN, STD, (40, 3, 5, 4)).transpose(0, 3, 1, 2).astype(np.float32)
    std = np.exp(rng.normal(size=mean.shape)).astype(np.float32)
    parts = [torch.from_numpy(np.concatenate([m, s], axis=1)) for m, s in zip(mean[:, None], std[:, None], strict=True)]
    parts = [torch.cat(parts[:7]), torch.cat(parts[7:8]), torch.cat(parts[8:])]
    found_mean, found_std = measure(parts, 4)
    axes = (0, 2, 3)
    np.testing.assert_allclose(found_mean, mean.astype(np.float64).mean(axes), rtol=1e-6)
    total = mean.astype(np.float64).var(axes) + np.square(std.astype(np.float64)).mean(axes)
    np.testing.assert_allclose(found_std, np.sqrt(total), rtol=1e-6)
    drawn = mean + std * rng.normal(size=(200, *mean.shape))
    np.testing.assert_allclose(found_std, drawn.std((0, *(a + 1 for a in axes))), rtol=0.02)


@pytest.mark.parametrize(
    ("value", "message"), [(float("nan"), "NaN or infinite"), (float("inf"), "NaN or infinite"), (0.0, "channel 2")]
)
def test_latents_that_cannot_be_scaled_are_refused(value: float, message: str) -> None:
    posterior = torch.rand(2, 8, 3, 3)
    posterior[:, 2], posterior[:, 6] = value, value
    with pytest.raises(DataError, match=message):
        measure([posterior], 4)


def test_scale_of_each_channel_is_checked() -> None:
    codec = KLVAECodec(plain_vae(latents_mean=MEAN, latents_std=STD, scaling_factor=1.0))
    mean, std = torch.tensor(MEAN).double(), torch.tensor(STD).double()
    torch.testing.assert_close(scaled_std(codec, mean, std), torch.ones(4).double())
    for factor, fits in ((1.0, True), (0.81, True), (1.24, True), (0.79, False), (1.26, False), (float("nan"), False)):
        changed = std.clone()
        changed[2] *= factor
        if fits:
            check_scale(codec, mean, changed)
            continue
        with pytest.raises(DataError, match=r"std of 1, 1, .*, 1 after scaling.*codec\.statistics=measured"):
            check_scale(codec, mean, changed)


def test_one_factor_is_checked_over_all_channels() -> None:
    codec = KLVAECodec(plain_vae(scaling_factor=0.25, shift_factor=1.0))
    mean, std = torch.tensor([1.0, -1.0, 3.0, 0.0]).double(), torch.tensor([1.0, 2.0, 4.0, 0.5]).double()
    drawn = torch.randn(200_000, 4).double() * std + mean
    expected = float(((drawn - 1) * 0.25).std())
    assert scaled_std(codec, mean, std).tolist() == pytest.approx([expected], rel=0.01)
    wanted = 1 / expected
    check_scale(codec, mean * wanted, std * wanted)  # channels differ by far, together they fit
    for factor in (0.79, 1.26):
        with pytest.raises(DataError, match="recipe: vae"):
            check_scale(codec, mean * wanted * factor, std * wanted * factor)


def test_statistics_stay_with_the_vae(tmp_path: Path) -> None:
    codec = KLVAECodec(plain_vae(scaling_factor=0.18215, shift_factor=3.0))
    assert not codec.per_channel
    codec.set_statistics(torch.tensor(MEAN), torch.tensor(STD))
    posterior = torch.rand(2, 8, 4, 4)
    z = codec.draw(posterior, None)
    np.testing.assert_allclose(z, slow_scaling(posterior[:, :4].numpy(), SCALES["a mean and std of each channel"]))
    codec.vae.save_pretrained(tmp_path)
    again = KLVAECodec(load_vae(tmp_path))
    assert again.per_channel
    assert torch.equal(again.draw(posterior, None), z)
    images = torch.rand(2, 1, 16, 16)
    torch.testing.assert_close(again.encode(images), codec.encode(images), atol=1e-5, rtol=0)
    torch.testing.assert_close(again.decode(z), codec.decode(z), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "wrong", [{"latents_std": [1.0, 1.0]}, {"latents_mean": [0.0] * 5}, {"latents_std": [1.0, 0.0, 1.0, 1.0]}]
)
def test_statistics_that_do_not_fit_the_latents_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="latents_mean and latents_std of 4 numbers"):
        KLVAECodec(plain_vae(**wrong))


def test_fingerprint_is_that_of_the_encoder(tmp_path: Path) -> None:
    codec = KLVAECodec(plain_vae())
    before = codec.fingerprint()
    codec.vae.save_pretrained(tmp_path / "a")
    load_vae(tmp_path / "a").save_pretrained(tmp_path / "b")
    assert KLVAECodec(load_vae(tmp_path / "b")).fingerprint() == before
    codec.set_statistics(torch.tensor(MEAN), torch.tensor(STD))
    with torch.no_grad():
        codec.vae.decoder.conv_out.weight += 1
        codec.vae.post_quant_conv.weight += 1
    assert codec.fingerprint() == before
    seen = {before}
    for name in ("encoder.conv_in.weight", "encoder.mid_block.resnets.0.norm1.bias", "quant_conv.bias"):
        with torch.no_grad():
            codec.vae.get_parameter(name).flatten()[0] += 1e-3
        seen.add(codec.fingerprint())
    assert len(seen) == 4


# ---- loading ------------------------------------------------------------------------------------------------------


def test_a_vae_of_plain_diffusers_is_used_as_it_is(tmp_path: Path) -> None:
    vae = plain_vae(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        mid_block_add_attention=True,
        scaling_factor=0.18215,
    ).eval()
    vae.save_pretrained(tmp_path / "pipeline" / "vae")
    for path in (tmp_path / "pipeline", tmp_path / "pipeline" / "vae", str(tmp_path / "pipeline" / "vae")):
        codec = KLVAECodec(load_vae(path))
        assert (codec.factor, codec.clip_sample, codec.random, codec.per_channel) == (8, False, True, False)
        images = torch.rand(2, 3, 16, 32)
        with torch.no_grad():
            expected = vae.encode(images * 2 - 1).latent_dist.mean * vae.config.scaling_factor
        torch.testing.assert_close(codec.encode(images), expected)
        assert codec.latent_shape(3, 16, 32) == tuple(expected.shape[1:]) == (4, 2, 4)
        assert codec.decode(expected).shape == images.shape
        assert not any(p.requires_grad for p in codec.vae.parameters())
        assert not codec.vae.training


def test_weights_with_the_earlier_names_of_attention_load(tmp_path: Path) -> None:
    vae = plain_vae(mid_block_add_attention=True)
    vae.save_pretrained(tmp_path)
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for key, value in load_file(tmp_path / WEIGHTS).items():
        for new, old in names.items():
            key = key.replace(f".attentions.0.{new}.", f".attentions.0.{old}.")
        renamed[key] = value
    assert sum(".query." in key for key in renamed) == 4
    save_file(renamed, tmp_path / WEIGHTS)
    assert KLVAECodec(load_vae(tmp_path)).fingerprint() == KLVAECodec(vae).fingerprint()


def test_a_short_configuration_means_the_defaults_of_diffusers(tmp_path: Path) -> None:
    AutoencoderKL(norm_num_groups=8, block_out_channels=(8,)).save_pretrained(tmp_path)
    short = {"_class_name": "AutoencoderKL", "norm_num_groups": 8, "block_out_channels": [8]}
    (tmp_path / "config.json").write_text(json.dumps(short))
    config = CodecConfig(kind="kl-vae", path=tmp_path)
    assert latent_shape(config, 3, 8, 8) == make_codec(config).latent_shape(3, 8, 8) == (4, 8, 8)


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def edit_weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        weights = load_file(folder / WEIGHTS)
        change(weights)
        save_file(weights, folder / WEIGHTS)

    return apply


def edit_config(**changes: Any) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    return apply


def truncate(folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: len(content) // 2])


def only_pickle(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    torch.save(plain_vae().state_dict(), folder / "diffusion_pytorch_model.bin")


def another_class(folder: Path) -> None:
    AutoencoderTiny(3, 3, encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
                    num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1)).save_pretrained(folder)  # fmt: skip


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "no VAE": (remove("config.json"), "holds no VAE"),
    "another class": (another_class, "expected a network of class AutoencoderKL, found AutoencoderTiny"),
    "no weights": (remove(WEIGHTS), f"{WEIGHTS}: missing"),
    "pickled weights only": (only_pickle, "from safetensors only"),
    "truncated": (truncate, "damaged"),
    "empty": (lambda folder: (folder / WEIGHTS).write_bytes(b""), "truncated"),
    "NaN": (edit_weights(lambda w: w["encoder.conv_in.weight"].fill_(math.nan)), r"NaN.*encoder\.conv_in\.weight"),
    "infinite": (edit_weights(lambda w: w["decoder.conv_out.bias"].fill_(math.inf)), r"decoder\.conv_out\.bias"),
    "a weight less": (edit_weights(lambda w: w.pop("quant_conv.bias")), r"another network.*quant_conv\.bias"),
    "a weight more": (edit_weights(lambda w: w.update(extra=torch.ones(1))), "another network.*extra"),
    "another width": (edit_config(block_out_channels=[8, 8, 16]), "damaged network|another network"),
    "another depth": (
        edit_config(block_out_channels=[8, 8], down_block_types=["DownEncoderBlock2D"] * 2,
                    up_block_types=["UpDecoderBlock2D"] * 2), "another network"),
    "config not JSON": (lambda folder: (folder / "config.json").write_text("{"), "not readable as JSON"),
    "config too deep": (lambda folder: (folder / "config.json").write_text("[" * 10**5), "not readable as JSON"),
    "config not text": (lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe"), "not readable as JSON"),
    "config a list": (lambda folder: (folder / "config.json").write_text("[1]"), "expected a JSON object, found list"),
    "config of nonsense": (edit_config(block_out_channels="many"), "damaged"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGES)
def test_anything_but_a_whole_vae_is_refused(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    damage, message = DAMAGES[case]
    plain_vae().save_pretrained(tmp_path / "vae")
    damage(tmp_path / "vae")
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("a pickle was opened"))
    with pytest.raises(CheckpointError, match=message) as error:
        load_vae(tmp_path / "vae")
    text = str(error.value)
    assert text.startswith(str(tmp_path / "vae"))
    assert "train" in text
    assert "\n" not in text


def test_no_folder_names_the_way_out(tmp_path: Path) -> None:
    path = tmp_path / "nowhere"
    with pytest.raises(CheckpointError, match=rf"{path}: no such folder; train one with recipe `vae`"):
        load_vae(path)


# ---- shapes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((3, 16, 16), r"images of 3 channels: the VAE takes 1; set data\.channels=1"),
        ((1, 18, 16), r"18x16: the VAE needs sides divisible by 4; set data\.image_size=\[16, 16\]"),
        ((1, 16, 19), r"set data\.image_size=\[16, 20\]"),
        ((1, 1, 16), r"set data\.image_size=\[4, 16\]"),
    ],
)
def test_images_the_vae_cannot_take(shape: tuple[int, int, int], message: str, tmp_path: Path) -> None:
    plain_vae().save_pretrained(tmp_path)
    config = CodecConfig(kind="kl-vae", path=tmp_path)
    for ask in (lambda: latent_shape(config, *shape), lambda: make_codec(config).latent_shape(*shape)):
        with pytest.raises(ConfigError, match=message):
            ask()


def test_pixels_are_their_own_latents() -> None:
    codec = make_codec(CodecConfig())
    assert isinstance(codec, PixelCodec)
    assert (codec.factor, codec.clip_sample, codec.random) == (1, True, False)
    assert latent_shape(CodecConfig(), 3, 17, 19) == (3, 17, 19)
    images = torch.rand(2, 3, 4, 4)
    z = codec.draw(codec.posterior(images), torch.randn_like(images))
    torch.testing.assert_close(z, images * 2 - 1)
    torch.testing.assert_close(codec.decode(z), images)
