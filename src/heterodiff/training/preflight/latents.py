"""Checks of a latent set-up: codec, round trip, loader, forward pass, loss, sample."""

from collections.abc import Callable

import torch
from torch import Tensor

from heterodiff.codecs.scaling import LatentCodec, measure, scaled_std
from heterodiff.config import RunConfig
from heterodiff.data.sources import LoadedData
from heterodiff.metrics.reconstruction import psnr, ssim
from heterodiff.training.recipes.diffusion import DiffusionRecipe

IMAGES = 16
STEPS = 20
LEARNING_RATE = 1e-3
LEAST_PSNR = 15.0
"""PSNR in dB below which a codec has hardly learned anything (noise against its mean has about 10)."""

Add = Callable[[bool, str, str], None]


def check_latent_setup(
    config: RunConfig, recipe: DiffusionRecipe, data: LoadedData, device: torch.device, add: Add
) -> None:
    """Try each part of a latent set-up on a few training images and report it through ``add``.

    Trains ``recipe``'s network for 20 steps, so it is of no use afterwards.

    Args:
        data: images, or their stored latents.
        device: where the networks are.
    """
    codec = recipe.codec
    assert isinstance(codec, LatentCodec)
    parameters = sum(p.numel() for p in codec.network.parameters())
    shape = "x".join(map(str, recipe.latent_shape))
    spec = data.spec
    add(
        True,
        "vae" if config.codec.kind == "kl-vae" else "codec",
        f"{config.codec.path}: {parameters:,} parameters, {spec.channels}x{spec.height}x{spec.width} to {shape}, "
        f"fingerprint {codec.fingerprint()}",
    )
    rows = torch.linspace(0, len(data.train) - 1, min(IMAGES, len(data.train))).long().tolist()
    stored, labels = data.train.batch(rows)
    stored = stored.to(device)
    posteriors = stored if data.latents is not None else codec.posterior(stored)
    _check_round_trip(codec, posteriors, None if data.latents is not None else stored, add)
    _check_loader(codec, data, posteriors, add)
    z = codec.draw(posteriors, None)
    network = recipe.model.to(device)
    with torch.no_grad():
        draws = recipe.draw(0, len(z), torch.Generator(device).manual_seed(0), device)
        out = recipe.conditioned(network, labels, draws)(z, torch.zeros(len(z), device=device))
    expected = (len(z), network.config.out_channels, *z.shape[2:])
    add(tuple(out.shape) == expected, "forward", f"{tuple(z.shape)} to {tuple(out.shape)}")
    losses = falling_losses(recipe, posteriors, labels, device)
    finite = bool(torch.isfinite(losses).all())
    text = f"{float(losses[0]):.4f} to {float(losses[-1]):.4f} over {STEPS} steps on one batch"
    add(finite and float(losses[-1]) < float(losses[0]), "loss", text if finite else f"not finite: {text}")
    images = recipe.two_images()
    low, high = float(images.min()), float(images.max())
    valid = bool(torch.isfinite(images).all()) and tuple(images.shape[1:]) == (spec.channels, spec.height, spec.width)
    add(valid, "sample", f"decodes to {tuple(images.shape[1:])}, values {low:.3f} to {high:.3f}")


def _check_round_trip(codec: LatentCodec, posteriors: Tensor, images: Tensor | None, add: Add) -> None:
    decoded = codec.decode(codec.draw(posteriors, None))
    if images is not None:
        found = float(psnr(images, decoded).mean())
        text = f"PSNR {found:.1f} dB, SSIM {float(ssim(images, decoded).mean()):.3f} on {len(images)} training images"
        add(found >= LEAST_PSNR, "round trip", text + ("" if found >= LEAST_PSNR else f"; expected {LEAST_PSNR:g} dB"))
        return
    before, after = codec.draw(posteriors, None), codec.encode(decoded)
    error = float((after - before).square().mean().sqrt())
    add(error < 1, "round trip", f"stored latents, decoded and encoded again, differ by {error:.3f} of their std")


def _check_loader(codec: LatentCodec, data: LoadedData, posteriors: Tensor, add: Add) -> None:
    # Statistics of this batch alone; those of the whole set were checked when it was opened.
    mean, std = measure([posteriors], codec.latent_channels)
    scaled = ", ".join(f"{value:.2f}" for value in scaled_std(codec, mean, std).tolist())
    z = codec.draw(posteriors, torch.zeros_like(posteriors.chunk(2, dim=1)[0]))
    where = "stored latents" if data.latents is not None else "images encoded now"
    text = f"{where}: {tuple(z.shape)}, {float(z.min()):.2f} to {float(z.max()):.2f}, std {scaled} after scaling"
    add(bool(torch.isfinite(z).all()), "loader", text)


def falling_losses(recipe: DiffusionRecipe, posteriors: Tensor, labels: Tensor, device: torch.device) -> Tensor:
    """Return the losses (21,) of one batch with one draw of noise over 20 training steps."""
    draws = recipe.draw(0, len(labels), torch.Generator(device).manual_seed(0), device)
    optimizer = torch.optim.AdamW(recipe.model.parameters(), lr=LEARNING_RATE)
    recipe.model.train()
    losses = []
    for step in range(STEPS + 1):
        torch.manual_seed(step)  # dropout
        loss = recipe.losses(recipe.model, posteriors, labels, draws).each.mean()
        losses.append(loss.detach())
        if step < STEPS:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    recipe.model.eval()
    return torch.stack(losses).cpu()
