"""`VAEInterface`, under which earlier scripts use a VAE."""

from pathlib import Path

import pytest
import torch

from heterodiff.codecs.kl_vae import KLVAECodec, load_vae
from heterodiff.compat.vae import VAEInterface
from heterodiff.data.sources import load_data
from heterodiff.errors import CheckpointError, ConfigError, DataError, HeterodiffError
from tests.vae_runs import plain_vae, vae_config


@pytest.fixture
def vae(digits_vae: Path) -> VAEInterface:
    return VAEInterface(digits_vae, device="cpu")


def test_latents_of_the_training_images_have_unit_std(digits_vae: Path, vae: VAEInterface) -> None:
    data = load_data(vae_config(digits_vae).data).train
    images = data.batch(range(len(data)))[0]
    latents = vae.encode_batch(images)
    assert tuple(latents.shape) == (len(data), 4, 4, 4)
    assert latents.dtype == torch.float32
    assert 0.8 < float(latents.std()) < 1.25
    for std in latents.std(dim=(0, 2, 3)).tolist():
        assert 0.8 < std < 1.25
    decoded = vae.decode_batch(latents)
    assert decoded.shape == images.shape
    assert 0 <= float(decoded.min()) <= float(decoded.max()) <= 1
    error = float((decoded - images).square().mean())
    assert error < 10**-1.5  # 15 dB
    assert vae.test_roundtrip(images, max_mse=1.01 * error) is True
    assert vae.test_roundtrip(images, max_mse=0.99 * error) is False


def test_it_is_the_codec(digits_vae: Path, vae: VAEInterface) -> None:
    codec = KLVAECodec(load_vae(digits_vae))
    images = torch.rand(3, 1, 16, 24)
    latents = vae.encode_batch(images)
    assert torch.equal(latents, codec.encode(images))
    assert torch.equal(vae.decode_batch(latents), codec.decode(latents))
    assert torch.equal(vae.encode_batch(images.numpy()), latents)  # type: ignore[arg-type]
    assert torch.equal(vae.encode_batch((images > 0.5).int()), codec.encode((images > 0.5).float()))
    assert not latents.requires_grad


def test_a_foreign_vae_keeps_its_own_factor(tmp_path: Path) -> None:
    model = plain_vae(in_channels=3, out_channels=3, scaling_factor=0.5).eval()
    model.save_pretrained(tmp_path / "vae")
    images = torch.rand(2, 3, 8, 8)
    with torch.no_grad():
        expected = 0.5 * model.encode(images * 2 - 1).latent_dist.mean
    torch.testing.assert_close(VAEInterface(tmp_path / "vae", "cpu").encode_batch(images), expected)


def test_size_of_latents(vae: VAEInterface) -> None:
    assert [vae.get_latent_size(size) for size in (4, 16, 128)] == [1, 4, 32]
    with pytest.raises(ConfigError, match="divisible by 4"):
        vae.get_latent_size(18)


BAD_IMAGES = {
    "in -1 to 1": (torch.linspace(-1, 1, 256).view(1, 1, 16, 16), r"hold values -1 to 1; expected \[0, 1\]"),
    "in 0 to 255": (torch.full((1, 1, 16, 16), 255), r"hold values 255 to 255; expected \[0, 1\]"),
    "NaN": (torch.full((1, 1, 16, 16), float("nan")), "hold values nan to nan"),
    "colour": (torch.rand(1, 3, 16, 16), "images of 3 channels: the VAE takes 1"),
    "indivisible": (torch.rand(1, 1, 16, 18), "16x18: the VAE needs sides divisible by 4"),
    "a single one": (torch.rand(1, 16, 16), r"\(1, 16, 16\).*\(B, 1, H, W\)"),
    "none": (torch.rand(0, 1, 16, 16), r"\(0, 1, 16, 16\).*\(B, 1, H, W\)"),
}


@pytest.mark.parametrize("case", BAD_IMAGES)
def test_images_it_cannot_take(case: str, vae: VAEInterface) -> None:
    images, message = BAD_IMAGES[case]
    with pytest.raises((ConfigError, DataError), match=message) as error:
        vae.encode_batch(images)
    assert isinstance(error.value, HeterodiffError)


@pytest.mark.parametrize("shape", [(1, 3, 4, 4), (4, 4, 4), (1, 8, 4, 4)])
def test_latents_it_cannot_take(shape: tuple[int, ...], vae: VAEInterface) -> None:
    with pytest.raises(ConfigError, match=r"the VAE decodes \(B, 4, h, w\)"):
        vae.decode_batch(torch.rand(shape))


def test_values_a_rounding_beyond_the_range_are_taken(vae: VAEInterface) -> None:
    assert torch.isfinite(vae.encode_batch(torch.rand(1, 1, 16, 16) * 1.0005)).all()


def test_no_vae(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no VAE"):
        VAEInterface(tmp_path)
