"""Names of earlier text-to-image scripts: each does what it says, and computes what our own object does."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import heterodiff as hd
from heterodiff.codecs.cnn import ImageCodec
from heterodiff.compat.gaussian_diffusion import GaussianDiffusion
from heterodiff.compat.latent_diffusion import (
    AttentionBlock,
    ConditionalUNet2D,
    GenerativeMultimodalModel,
    ImageDecoder,
    LatentDiffusionUNet,
    ResBlockWithCondition,
    SinusoidalPositionEmbedding,
)
from heterodiff.config.file import load_config
from heterodiff.data.sources import load_data
from heterodiff.errors import ConfigError, RunError
from heterodiff.models.blocks import ResBlock
from heterodiff.training.start import train
from tests.training_runs import tiny_config

SMALL: dict[str, Any] = {"model_channels": 32, "channel_mult": (1, 2), "layers_per_block": 1}


def filled(network: Any, std: float = 0.1) -> Any:
    """``network`` with weights that make no output zero."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(0, std)
    return network


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def alpha_bar(steps: int = 1000) -> Tensor:
    """Ho et al. 2020, section 4: betas from 1e-4 to 0.02."""
    return torch.cumprod(1 - torch.linspace(1e-4, 0.02, steps, dtype=torch.float64), 0)


def test_the_default_network_has_the_documented_size() -> None:
    with torch.device("meta"):
        model = LatentDiffusionUNet(latent_channels=256, latent_size=7, condition_dim=512, num_timesteps=1000)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == 48
    assert model.diffusion.num_timesteps == 1000


def test_the_denoiser_is_film_unet() -> None:
    face = filled(ConditionalUNet2D(4, None, 12, 5, **SMALL))
    own = hd.create_model("film-unet", latent_channels=4, latent_size=5, condition_dim=12, **SMALL, num_heads=4)
    own.load_state_dict(face.state_dict())
    z, t, condition = draw(3, 4, 5, 5), torch.tensor([1, 400, 999]), draw(3, 12)
    expected = own(z, t, condition=condition).sample
    torch.testing.assert_close(face(z, t, condition), expected, rtol=0, atol=0)
    assert not torch.allclose(face(z, t, condition), face(z, t))


class Knowing(torch.nn.Module):
    """The noise in z_t where the clean latents are everywhere the first number of the condition."""

    def forward(self, x: Tensor, timesteps: Tensor, condition: Tensor) -> Tensor:
        bar = alpha_bar()[timesteps.long()].float().view(-1, 1, 1, 1)
        return (x - bar.sqrt() * condition[:, 0].view(-1, 1, 1, 1)) / (1 - bar).sqrt()


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_latents_are_drawn_by_ddim_and_guided(scale: float) -> None:
    model = LatentDiffusionUNet(latent_channels=2, latent_size=4, condition_dim=3, **SMALL)
    model.unet = Knowing()  # type: ignore[assignment]
    model.anchor = torch.nn.Parameter(torch.zeros(1))  # tells the device
    conditions = torch.tensor([[0.5, 0, 0], [-0.25, 1, 0]])
    drawn = model.sample(conditions, 30, scale, torch.Generator().manual_seed(0))
    expected = scale * conditions[:, 0].view(-1, 1, 1, 1).expand(2, 2, 4, 4)
    torch.testing.assert_close(drawn, expected, rtol=0, atol=1e-2)


def test_latent_diffusion_learns() -> None:
    torch.manual_seed(0)
    model = LatentDiffusionUNet(latent_channels=2, latent_size=4, condition_dim=3, num_timesteps=1000, **SMALL)
    conditions = torch.eye(3)[:2]
    latents = torch.stack([torch.full((2, 4, 4), 1.0), torch.full((2, 4, 4), -1.0)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(60):
        loss = model.compute_loss(latents.repeat(8, 1, 1, 1), conditions.repeat(8, 1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    assert model.sample(conditions, num_inference_steps=3).shape == (2, 2, 4, 4)


def test_its_loss_is_the_squared_error_of_the_noise() -> None:
    model = filled(LatentDiffusionUNet(4, 5, 12, 1000, **SMALL))
    z, noise, t, condition = draw(3, 4, 5, 5), draw(3, 4, 5, 5, seed=2), torch.tensor([0, 400, 999]), draw(3, 12)
    bar = alpha_bar()[t].view(-1, 1, 1, 1)
    noisy = (bar.sqrt() * z + (1 - bar).sqrt() * noise).float()
    expected = (model(noisy, t, condition) - noise).square().mean()
    torch.testing.assert_close(model.compute_loss(z, condition, t, noise), expected, rtol=1e-5, atol=1e-6)


def test_blocks() -> None:
    face, own = filled(ResBlockWithCondition(32, 64, 10)), ResBlock(32, 64, 10, 0.0, use_scale_shift_norm=True)
    own.load_state_dict(face.state_dict())
    x, condition = draw(2, 32, 4, 4), draw(2, 10)
    expected = own(x.clone(), torch.nn.functional.silu(condition))
    torch.testing.assert_close(face(x, condition), expected, rtol=0, atol=0)
    t = torch.tensor([0, 3, 900])
    angles = t[:, None] * torch.tensor([10000 ** (-i / 4) for i in range(4)])
    expected = torch.cat([angles.cos(), angles.sin()], dim=1)
    torch.testing.assert_close(SinusoidalPositionEmbedding(8)(t), expected, rtol=1e-5, atol=1e-5)
    block = filled(AttentionBlock(32, num_heads=2))
    tokens = block.norm(x).flatten(2).transpose(1, 2)
    qkv = torch.nn.functional.linear(tokens, block.qkv.weight.squeeze(-1), block.qkv.bias)
    heads = []
    for rows in (qkv[..., :48], qkv[..., 48:]):
        q, k, v = rows.split(16, dim=-1)
        heads.append((q @ k.transpose(1, 2) / math.sqrt(16)).softmax(-1) @ v)
    out = torch.nn.functional.linear(torch.cat(heads, -1), block.proj_out.weight.squeeze(-1), block.proj_out.bias)
    torch.testing.assert_close(block(x), x + out.transpose(1, 2).reshape(x.shape), rtol=1e-4, atol=1e-4)


def test_the_decoder_is_half_of_the_codec() -> None:
    codec = filled(ImageCodec(3, (16, 16), (8, 16), 6, 12), 0.3)
    decoder = ImageDecoder(latent_channels=6, latent_size=4, embedding_dim=12, block_out_channels=(8, 16))
    kept = {name: value for name, value in codec.state_dict().items() if name in decoder.state_dict()}
    decoder.load_state_dict(kept)
    maps, embeddings = draw(2, 6, 4, 4), draw(2, 12)
    torch.testing.assert_close(decoder.decode_from_latent(maps), codec.decode_from_latent(maps), rtol=0, atol=0)
    torch.testing.assert_close(decoder(maps), codec.decode_from_latent(maps), rtol=0, atol=0)
    found = decoder.get_latent_from_embedding(embeddings)
    torch.testing.assert_close(found, codec.get_latent_from_embedding(embeddings), rtol=0, atol=0)
    assert sum(p.numel() for p in decoder.parameters()) < sum(p.numel() for p in codec.parameters())


def test_a_run_is_trained_on_and_draws_both_ways(shapes_run: Path) -> None:
    model = GenerativeMultimodalModel(shapes_run, device="cpu")
    pipe = hd.load(shapes_run, device="cpu")
    data = load_data(load_config(shapes_run / "config.yaml").data).train
    images = data.batch(range(4))[0]
    texts = pipe.encode_text(["a red circle", "a blue square", "a green triangle"])
    texts = torch.cat([texts, torch.zeros_like(texts[:1])])  # no condition
    maps = model.image_codec.encode(images * 2 - 1)
    t, noise = torch.tensor([10, 300, 700, 990]), draw(*maps.shape)
    loss = model.compute_diffusion_loss(maps, texts, t, noise)
    denoiser, schedule = pipe.denoiser, pipe.denoiser.schedule
    alpha, sigma = (values[t].view(-1, 1, 1, 1).float() for values in (schedule.alpha, schedule.sigma))
    maps = maps.detach()
    z = (maps - pipe.codec.unscale(torch.zeros_like(maps))) * (
        pipe.codec.scale(torch.ones_like(maps)) - pipe.codec.scale(torch.zeros_like(maps))
    )
    assert denoiser.prediction == "v"
    found = pipe.predict(alpha * z + sigma * noise, schedule.time[t].float(), (texts, pipe.codec.prior(texts)))
    torch.testing.assert_close(loss, (found - (alpha * noise - sigma * z)).square().mean(), rtol=1e-4, atol=1e-5)
    model.unet.requires_grad_(True)
    optimizer = torch.optim.SGD(model.unet.parameters(), lr=1e-3)
    model.compute_diffusion_loss(maps, texts, t, noise).backward()
    optimizer.step()
    assert float(model.compute_diffusion_loss(maps, texts, t, noise).detach()) < float(loss.detach())
    pooled = model.compute_diffusion_loss(model.image_codec.embed(maps), texts, t, noise)
    assert torch.isfinite(pooled)
    with pytest.raises(ConfigError, match=r"features \(4, 3\) of images"):
        model.compute_diffusion_loss(draw(4, 3), texts)
    other = GenerativeMultimodalModel(pipe)
    drawn = other.generate_image_from_text(texts, num_inference_steps=3, seed=5)
    torch.testing.assert_close(drawn, pipe.generate_image_from_text(texts, 3, seed=5), rtol=0, atol=0)
    assert drawn.shape == images.shape
    captions = other.generate_text_from_image(images, temperature=0.0)
    assert captions == pipe.generate_text_from_image(images, temperature=0.0)


def test_only_runs_of_texts_are_multimodal(tmp_path: Path) -> None:
    train(tiny_config(tmp_path / "run", training__steps=1, model__channel_mult=[1, 1]), quiet=True)
    with pytest.raises(RunError, match="knows no texts; train a run of recipe text-image"):
        GenerativeMultimodalModel(tmp_path / "run")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"noise_schedule": "sqrt"}, "expected linear or cosine"),
        ({"timestep_respacing": "ddim0"}, "expected a number of steps from 1 to 1000"),
        ({"timestep_respacing": "10,10"}, "expected a number of steps"),
    ],
)
def test_processes_that_there_are_not(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GaussianDiffusion(**arguments)
