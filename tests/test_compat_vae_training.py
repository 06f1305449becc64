"""Data and networks in a VAE's latents, as scripts in the manner of guided-diffusion make them."""

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from PIL import Image

import heterodiff as hd
from heterodiff.compat.guided_diffusion import HAEUNetModelV2
from heterodiff.compat.vae import VAEInterface, create_model_and_diffusion_vae, load_data_with_vae
from heterodiff.errors import ConfigError, DataError
from tests.vae_runs import plain_vae


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> VAEInterface:
    folder = tmp_path_factory.mktemp("vae")
    plain_vae().save_pretrained(folder)
    return VAEInterface(folder, device="cpu")


def pictures(root: Path, *names: str) -> dict[str, torch.Tensor]:
    rng, found = np.random.default_rng(0), {}
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        values = rng.integers(0, 256, (16, 16), dtype=np.uint8)
        Image.fromarray(values).save(root / name)
        found[name] = torch.from_numpy(values.astype(np.float32) / 255)[None]
    return found


@pytest.mark.parametrize("names", [("cat_1.png", "cat_2.png", "dog_1.png"), ("cat/1.png", "cat/2.png", "dog/1.png")])
def test_latents_and_classes_of_a_folder(names: tuple[str, ...], vae: VAEInterface, tmp_path: Path) -> None:
    images = pictures(tmp_path, *names)
    own = {"data_dir": tmp_path, "image_size": 16, "vae": vae}
    batches = load_data_with_vae(batch_size=2, class_cond=True, deterministic=True, **own)  # type: ignore[arg-type]
    expected = vae.encode_batch(torch.stack([*images.values()]))
    for order, (latents, extra) in zip(([0, 1], [2, 0], [1, 2]), islice(batches, 3), strict=True):
        torch.testing.assert_close(latents, expected[order])
        assert extra["y"].tolist() == [[0, 0, 1][k] for k in order]
    drawn = load_data_with_vae(batch_size=3, seed=1, **own)  # type: ignore[arg-type]
    for latents, extra in islice(drawn, 3):  # each epoch has every image once
        assert extra == {}
        distance = torch.cdist(latents.flatten(1), expected.flatten(1))
        assert sorted(distance.argmin(dim=1).tolist()) == [0, 1, 2]
    flipped = load_data_with_vae(batch_size=24, random_flip=True, random_crop=True, **own)  # type: ignore[arg-type]
    latents, _ = next(flipped)
    assert len({tuple(one.flatten().tolist()) for one in latents}) > 3


def test_data_that_cannot_be_used(vae: VAEInterface, tmp_path: Path) -> None:
    pictures(tmp_path / "plain", "1.png", "2.png")
    with pytest.raises(DataError, match="images have no classes; use subfolders"):
        load_data_with_vae(data_dir=tmp_path / "plain", batch_size=1, image_size=16, vae=vae, class_cond=True)
    pictures(tmp_path / "some", "a/1.png", "b/2.png", "3.png")
    with pytest.raises(DataError, match=r"3\.png: no class"):
        load_data_with_vae(data_dir=tmp_path / "some", batch_size=1, image_size=16, vae=vae, class_cond=True)
    with pytest.raises(ConfigError, match="divisible by 4"):
        load_data_with_vae(data_dir=tmp_path / "some", batch_size=1, image_size=18, vae=vae)


@pytest.mark.parametrize("learn_sigma", [False, True])
def test_a_script_trains_and_draws(learn_sigma: bool, vae: VAEInterface, tmp_path: Path) -> None:
    """A few steps as scripts write them, on two pictures; then samples, of the VAE's scale."""
    pictures(tmp_path, "cat_1.png", "dog_1.png")
    torch.manual_seed(0)
    model, diffusion = create_model_and_diffusion_vae(
        16,
        vae,
        class_cond=True,
        num_classes=2,
        learn_sigma=learn_sigma,
        num_channels=32,
        num_res_blocks=1,
        channel_mult="1,1",
        attention_resolutions="2",
        timestep_respacing="ddim5",
        network=HAEUNetModelV2,
    )
    data = load_data_with_vae(data_dir=tmp_path, batch_size=8, image_size=16, vae=vae, class_cond=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for batch, cond in islice(data, 25):
        t = torch.randint(0, diffusion.num_timesteps, (len(batch),))
        loss = diffusion.training_losses(model, batch, t, model_kwargs={**cond, "threshold": 0.1})["loss"].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    with torch.no_grad():
        drawn = diffusion.ddim_sample_loop(model, (2, 4, 4, 4), model_kwargs={"y": torch.tensor([0, 1])})
    assert vae.decode_batch(drawn).shape == (2, 1, 16, 16)


def test_losses_and_noise_are_those_of_the_paper(vae: VAEInterface) -> None:
    model, diffusion = create_model_and_diffusion_vae(16, vae, num_channels=32, num_res_blocks=1, channel_mult="1")
    own = hd.create_model("unet", **{k: v for k, v in dict(model.config).items() if k in OURS})
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.1, generator=generator)
    own.load_state_dict(model.state_dict())
    x, noise = (torch.randn(3, 4, 4, 4, generator=generator) for _ in range(2))
    t = torch.tensor([0, 500, 999])
    noisy = DDPMScheduler(beta_start=1e-4, beta_end=0.02).add_noise(x, noise, t)
    torch.testing.assert_close(diffusion.q_sample(x, t, noise), noisy, rtol=1e-4, atol=1e-5)
    expected = (own(noisy, t).sample - noise).square().mean(dim=(1, 2, 3))
    found = diffusion.training_losses(model, x, t, noise=noise)
    torch.testing.assert_close(found["loss"], expected, rtol=1e-4, atol=1e-5)


OURS = (
    "in_channels",
    "out_channels",
    "model_channels",
    "channel_mult",
    "layers_per_block",
    "attention_resolutions",
    "num_classes",
    "num_heads",
    "activation",
    "condition_tokens",
    "class_embedding",
)


def test_sampling_is_ancestral(vae: VAEInterface) -> None:
    """As diffusers' DDPM with the same noise in every step, for a network that knows the answer."""
    _, diffusion = create_model_and_diffusion_vae(16, vae, num_channels=32, timestep_respacing="", diffusion_steps=50)
    target = torch.full((2, 4, 4, 4), 0.7)
    scheduler = DDPMScheduler(50, beta_start=0.1 / 50, beta_end=20 / 50, clip_sample=False)

    def network(z: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        bar = scheduler.alphas_cumprod[time.long()].view(-1, 1, 1, 1)
        return (z - bar.sqrt() * target) / (1 - bar).sqrt()

    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(3))
    found = diffusion.p_sample_loop(network, noise.shape, noise=noise, generator=generator)
    z, generator = noise.clone(), torch.Generator().manual_seed(0)
    scheduler.set_timesteps(50)
    for t in scheduler.timesteps:
        z = scheduler.step(network(z, t.expand(2)), t, z, generator=generator).prev_sample
    torch.testing.assert_close(found, z, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found, target, rtol=0, atol=0.05)


def test_arguments_that_no_network_here_has(vae: VAEInterface) -> None:
    for wrong, message in (
        ({"use_kl": True}, "use_kl=True"),
        ({"rescale_timesteps": True, "diffusion_steps": 500}, "rescale_timesteps"),
        ({"use_new_attention_order": True}, "legacy order"),
        ({"channel_mult": "1,x"}, "channel_mult"),
    ):
        with pytest.raises(ConfigError, match=message):
            create_model_and_diffusion_vae(16, vae, num_channels=32, **wrong)  # type: ignore[arg-type]
