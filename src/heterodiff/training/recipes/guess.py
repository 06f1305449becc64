"""The map to be expected of a text, learned once between the alignment and the denoiser, which sees it beside z_t."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from heterodiff.codecs.cnn import CNNCodec, scaled
from heterodiff.data.sources import LoadedData
from heterodiff.models.denoiser import whitening
from heterodiff.text.networks import TextNetworks
from heterodiff.text.table import CaptionTable

IMAGES, MAX_BYTES = 16_384, 2**28
STEPS, BATCH_SIZE, LEARNING_RATE = 800, 256, 2e-3
HELD_OUT_EVERY, LOOK_EVERY, PATIENCE = 10, 50, 4
PART = 256


def fit_guess(codec: CNNCodec, embeddings: Tensor, image_of: Tensor, z: Tensor) -> float:
    """Train the codec's ``projection`` anew: embeddings to the mean z among images that have such an embedding.

    Embeddings are whitened first, since who is where takes half a percent of their variance; afterwards the whitening
    is part of the first layer. Every tenth image is held out, and the weights that guess it best are kept: where there
    are few images, a guess by heart would teach the denoiser to believe what it cannot believe of new texts.

    Args:
        embeddings: (N, D) of texts or images, of any length.
        image_of: (N,) rows of z that they belong to.
        z: (M, c, h, w).

    Returns:
        Mean squared error on held-out images over that of the mean z; 1: embeddings tell nothing.
    """
    generator = torch.Generator().manual_seed(0)
    inputs, targets = scaled(embeddings.float()), z.flatten(1)
    whiten = whitening(inputs)
    inputs = inputs @ whiten
    held_out = image_of % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
    learned, kept = (~held_out).nonzero().flatten(), held_out.nonzero().flatten()
    kept = kept[:: max(1, len(kept) // 2048)] if len(kept) else learned  # of a handful of images there is none
    network = codec.network.projection
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for layer in network:
            if isinstance(layer, nn.Linear):
                layer.reset_parameters()
    trained = [parameter.requires_grad_() for parameter in network.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.01)
    best, best_step, weights = math.inf, 0, [parameter.detach().clone() for parameter in trained]
    with torch.enable_grad():
        for step in range(STEPS):
            rows = learned[torch.randint(len(learned), (BATCH_SIZE,), generator=generator)].to(inputs.device)
            loss = (network(inputs[rows]) - targets[image_of[rows]]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * min(1, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / STEPS))
            optimizer.step()
            if (step + 1) % LOOK_EVERY == 0:
                with torch.no_grad():
                    error = float((network(inputs[kept]) - targets[image_of[kept]]).square().mean())
                if error < best:
                    best, best_step = error, step
                    weights = [parameter.detach().clone() for parameter in trained]
                elif step - best_step >= PATIENCE * LOOK_EVERY:
                    break
    with torch.no_grad():
        for parameter, value in zip(trained, weights, strict=True):
            parameter.copy_(value).requires_grad_(False)
        network[0].weight.copy_(network[0].weight @ whiten)
        shift = codec.unscale(z.new_zeros(1, *z.shape[1:])).flatten()
        slope = codec.unscale(z.new_ones(1, *z.shape[1:])).flatten() - shift
        network[-1].weight.mul_(slope[:, None])
        network[-1].bias.mul_(slope).add_(shift)
        plain = float((targets[image_of[kept]] - targets[image_of[learned]].mean(dim=0)).square().mean())
    return best / plain if plain > 0 else 1.0


@torch.no_grad()
def known_embeddings(
    networks: TextNetworks, captions: CaptionTable, data: LoadedData, codec: CNNCodec
) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings (N, D) of captions and images, the rows (N,) of the images they belong to, and those z (M, c, h, w).

    Args:
        data: images, or their stored latents; of at most 16,384 of them, evenly spread.
    """
    size = math.prod(networks.image_codec.latent_size) * codec.latent_channels * 4
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
    return torch.cat([*texts, *images]), image_of.to(z.device), z


def _maps(chosen: Tensor, data: LoadedData, codec: CNNCodec) -> Iterator[Tensor]:
    for part in chosen.split(PART):
        images = data.train.batch(part.tolist())[0].to(codec.device)
        yield codec.draw(images if data.latents is not None else codec.posterior(images), None)
