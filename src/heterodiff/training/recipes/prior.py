"""The map to be expected of a text, and what the captioner would see in it; learned once before the denoiser.

The mean of maps of one text is blurred: shapes are lost first. What the captioner reads them by is less so.
"""

import math
from collections.abc import Callable, Iterator
from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from heterodiff.codecs.cnn import CNNCodec, scaled
from heterodiff.data.sources import LoadedData
from heterodiff.models.backbone import whitening
from heterodiff.text.aligned import TextNetworks
from heterodiff.text.caption_table import CaptionTable

IMAGES, MAX_BYTES = 16_384, 2**28
STEPS, BATCH_SIZE, LEAST_BATCH, LEARNING_RATE = 800, 256, 16, 2e-3
WARMUP_STEPS = 50
HELD_OUT_EVERY, LOOKED_AT = 10, 2048
LOOK_EVERY, PATIENCE = 50, 4
"""How often held-out images are looked at; after so many looks without a gain it is over."""
PART = 256
PRINCIPAL_MAPS = 1024
"""From so many maps the directions of their features are taken."""


def fit_prior(
    codec: CNNCodec,
    embeddings: Tensor,
    image_of: Tensor,
    z: Tensor,
    features: Tensor | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> float:
    """Train the codec's ``projection`` anew: embeddings to the mean z, and features, of images of such an embedding.

    Embeddings are whitened first, since who is where takes half a percent of their variance; afterwards the whitening
    is part of the first layer, and the scale of z of the last. Every tenth image is held out, and the weights that
    predict it best are kept: a prior that overfits few images would teach the denoiser to trust it on new texts.

    Args:
        embeddings: (N, D) of texts or images, of any length.
        image_of: (N,) rows of z that they belong to.
        z: (M, c, h, w).
        features: (M, f, h, w) of about unit variance, the codec's ``feature_channels``; ``None`` where that is 0.
        progress: called with the number of steps done; training may end before ``STEPS``.

    Returns:
        Mean squared error on held-out images over that of the means; 1: embeddings tell nothing.
    """
    both = z if features is None else torch.cat([z, features], dim=1)
    inputs, targets = scaled(embeddings.float()), both.flatten(1)
    whiten = whitening(inputs)
    inputs = inputs @ whiten
    held_out = image_of % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
    learned, kept = (~held_out).nonzero().flatten(), held_out.nonzero().flatten()
    kept = kept[:: max(1, len(kept) // LOOKED_AT)] if len(kept) else learned  # of a handful of images there is none
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
    """Learn from rows ``learned``; the network gets the weights of the least ``error`` on rows ``kept``, returned."""
    count = min(BATCH_SIZE, max(LEAST_BATCH, len(learned)))  # a handful of rows many times over teaches nothing more
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
    networks: TextNetworks, captions: CaptionTable, data: LoadedData, codec: CNNCodec
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Embeddings (N, D) of captions and images, the rows (N,) of their images, those z (M, c, h, w) and their features.

    Args:
        data: images, or their stored latents; of at most 16,384 of them, evenly spread.
    """
    channels = codec.latent_channels + networks.image_codec.config.feature_channels
    size = math.prod(networks.image_codec.latent_size) * channels * 4
    count = min(IMAGES, len(data.train), max(1, MAX_BYTES // size))
    chosen = torch.linspace(0, len(data.train) - 1, count).long()
    z = torch.cat(list(_maps(chosen, data, codec)))
    labels = torch.from_numpy(data.train.labels)[chosen]
    first, number = captions.rows(labels), captions.counts(labels)
    rows = torch.cat([torch.arange(int(a), int(a + n)) for a, n in zip(first, number, strict=True)])
    encoder = networks.text_encoder
    texts = [
        encoder(tokens.ids, tokens.mask).float()
        for tokens in (captions.tokens(part, codec.device) for part in rows.split(PART))
    ]
    images = [networks.image_codec.embed(codec.unscale(part)).float() for part in z.split(PART)]
    every = torch.arange(count)
    image_of = torch.cat([every.repeat_interleave(number), every])
    return torch.cat([*texts, *images]), image_of.to(z.device), z, seen_features(networks, codec, z)


@torch.no_grad()
def seen_features(networks: TextNetworks, codec: CNNCodec, z: Tensor) -> Tensor:
    """What the captioner makes of the maps z (M, c, h, w): its strongest principal components, (M, f, h, w).

    Each has zero mean and unit std over cells; there are the codec's ``feature_channels`` of them.
    """
    see = networks.captioner.image_features

    def features(some: Tensor) -> Tensor:
        found = see(codec.unscale(some).to(networks.captioner.dtype))
        return found.double().movedim(1, -1)  # (M, h, w, width)

    few = z[torch.linspace(0, len(z) - 1, min(len(z), PRINCIPAL_MAPS)).long()]
    cells = torch.cat([features(part).flatten(0, 2) for part in few.split(PART)])
    mean = cells.mean(dim=0)
    variances, directions = torch.linalg.eigh((cells - mean).T @ (cells - mean) / len(cells))
    count = networks.image_codec.config.feature_channels
    strongest = directions[:, -count:] * variances[-count:].clamp(min=1e-6 * float(variances[-1]) + 1e-12).rsqrt()
    strongest = pad(strongest, (0, count - strongest.shape[1]))  # of a narrow captioner there are few
    return torch.cat([((features(part) - mean) @ strongest).movedim(-1, 1).float() for part in z.split(PART)])


def _maps(chosen: Tensor, data: LoadedData, codec: CNNCodec) -> Iterator[Tensor]:
    for part in chosen.split(PART):
        images = data.train.batch(part.tolist())[0].to(codec.device)
        yield codec.draw(images if data.latents is not None else codec.posterior(images), None)
