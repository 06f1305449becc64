"""Prior over the map given a text, and over the captioner's features of it; trained once before the denoiser.

The mean of the maps of one text is blurred, shapes first; features by which the captioner recognises them, less so.
"""

import math
from collections.abc import Callable
from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from heterodiff.codecs.cnn import CNNCodec, scaled
from heterodiff.data.sources import LoadedData
from heterodiff.models.backbone import whitening
from heterodiff.text.aligned import AlignedNetworks
from heterodiff.text.caption_table import CaptionTable
from heterodiff.training.recipes.base import spread

IMAGES, MAX_BYTES = 16_384, 2**28
STEPS, BATCH_SIZE, LEAST_BATCH, LEARNING_RATE = 800, 256, 16, 2e-3
WARMUP_STEPS = 50
HELD_OUT_EVERY, LOOKED_AT = 10, 2048
LOOK_EVERY, PATIENCE = 50, 4
"""Steps between two measurements on held-out images, and measurements without a gain before training stops."""
PART = 256
PRINCIPAL_MAPS = 1024
"""Number of maps whose features are decomposed into principal components."""


def fit_prior(
    codec: CNNCodec,
    embeddings: Tensor,
    image_of: Tensor,
    z: Tensor,
    features: Tensor | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> float:
    """Train the codec's ``projection`` anew: embedding to the mean z and features of the images that have it.

    Embeddings are whitened first, since spatial relations make up half a percent of their variance; afterwards the
    whitening is part of the first layer, and the scale of z of the last. Every tenth image is held out, and the weights
    that predict it best are kept: the denoiser would learn to trust a prior that overfits, and would on new texts, too.

    Args:
        embeddings: (N, D) of texts or images, of any length.
        image_of: (N,) rows of z that they belong to.
        z: (M, c, h, w).
        features: (M, f, h, w) of about unit variance, the codec's ``feature_channels``; ``None`` where that is 0.
        progress: called with the number of steps done; training may end before ``STEPS``.

    Returns:
        Mean squared error on held-out images relative to that of the mean; 1: embeddings predict nothing.
    """
    both = z if features is None else torch.cat([z, features], dim=1)
    inputs, targets = scaled(embeddings.float()), both.flatten(1)
    whiten = whitening(inputs)
    inputs = inputs @ whiten
    held_out = image_of % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
    learned, kept = (~held_out).nonzero().flatten(), held_out.nonzero().flatten()
    kept = kept[:: max(1, len(kept) // LOOKED_AT)] if len(kept) else learned  # empty for fewer than ten images
    network = codec.network.projection
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for layer in network:
            if isinstance(layer, nn.Linear):
                layer.reset_parameters()

    def error(rows: Tensor) -> Tensor:
        return (network(inputs[rows]) - targets[image_of[rows]]).square().mean()

    with torch.enable_grad():
        best = _train(network.requires_grad_(True), error, learned, kept, progress)
    network.requires_grad_(False)
    with torch.no_grad():
        network[0].weight.copy_(network[0].weight @ whiten)
        shift = codec.unscale(torch.zeros_like(z[:1])).flatten()
        slope = codec.unscale(torch.ones_like(z[:1])).flatten() - shift
        network[-1].weight[: len(slope)].mul_(slope[:, None])
        network[-1].bias[: len(slope)].mul_(slope).add_(shift)
        of_mean = float((targets[image_of[kept]] - targets[image_of[learned]].mean(dim=0)).square().mean())
    return best / of_mean if of_mean > 0 else 1.0


def _train(
    network: nn.Module,
    error: Callable[[Tensor], Tensor],
    learned: Tensor,
    kept: Tensor,
    progress: Callable[[int], None],
) -> float:
    """Train on rows ``learned``; keep the weights with the least ``error`` on rows ``kept``, and return that."""
    count = min(BATCH_SIZE, max(LEAST_BATCH, len(learned)))  # few rows many times over teach nothing more
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    best, best_step, weights = math.inf, 0, deepcopy(network.state_dict())
    drawn = torch.randint(len(learned), (STEPS, count), generator=torch.Generator().manual_seed(0)).to(learned.device)
    for step in range(1, STEPS + 1):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1, step / WARMUP_STEPS) * (1 + math.cos(math.pi * step / STEPS)) / 2
        error(learned[drawn[step - 1]]).backward()
        optimizer.step()
        optimizer.zero_grad()
        progress(step)
        if step % LOOK_EVERY == 0:
            with torch.no_grad():
                found = float(error(kept))
            if found < best:
                best, best_step, weights = found, step, deepcopy(network.state_dict())
            elif step - best_step >= PATIENCE * LOOK_EVERY:
                break
    network.load_state_dict(weights)
    return best


@torch.no_grad()
def known_embeddings(
    networks: AlignedNetworks, captions: CaptionTable, data: LoadedData, codec: CNNCodec
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Embeddings (N, D) of captions and images, the rows (N,) of their images in z, z (M, c, h, w), and its features.

    Args:
        data: images, or their stored latents; at most 16,384 of them are used, evenly spread.
    """

    def draw(part: Tensor) -> Tensor:
        images = data.train.batch(part.tolist())[0].to(codec.device)
        return codec.draw(images if data.latents is not None else codec.posterior(images), None)

    channels = codec.latent_channels + networks.image_codec.config.feature_channels
    size = math.prod(networks.image_codec.latent_size) * channels * 4
    chosen = spread(len(data.train), min(IMAGES, max(1, MAX_BYTES // size)))
    z = torch.cat([draw(part) for part in chosen.split(PART)])
    labels = torch.from_numpy(data.train.labels)[chosen]
    first, number = captions.rows(labels), captions.counts(labels)
    rows = torch.cat([torch.arange(int(a), int(a + n)) for a, n in zip(first, number, strict=True)])
    encoder = networks.text_encoder
    texts = [
        encoder(tokens.ids, tokens.mask).float()
        for tokens in (captions.tokens(part, codec.device) for part in rows.split(PART))
    ]
    images = [networks.image_codec.embed(codec.unscale(part)).float() for part in z.split(PART)]
    every = torch.arange(len(chosen))
    image_of = torch.cat([every.repeat_interleave(number), every])
    return torch.cat([*texts, *images]), image_of.to(z.device), z, seen_features(networks, codec, z)


@torch.no_grad()
def seen_features(networks: AlignedNetworks, codec: CNNCodec, z: Tensor) -> Tensor:
    """Principal components (M, f, h, w) of the captioner's features of z (M, c, h, w); f: ``feature_channels``.

    Each has zero mean and unit std over all positions.
    """
    see = networks.captioner.image_features

    def features(some: Tensor) -> Tensor:
        found = see(codec.unscale(some).to(networks.captioner.dtype))
        return found.double().movedim(1, -1)  # (M, h, w, width)

    few = z[spread(len(z), PRINCIPAL_MAPS)]
    positions = torch.cat([features(part).flatten(0, 2) for part in few.split(PART)])
    mean = positions.mean(dim=0)
    variances, directions = torch.linalg.eigh((positions - mean).T @ (positions - mean) / len(positions))
    count = networks.image_codec.config.feature_channels
    strongest = directions[:, -count:] * variances[-count:].clamp(min=1e-6 * float(variances[-1]) + 1e-12).rsqrt()
    strongest = pad(strongest, (0, count - strongest.shape[1]))  # a narrow captioner has fewer
    return torch.cat([((features(part) - mean) @ strongest).movedim(-1, 1).float() for part in z.split(PART)])
