"""The guess of a map from an embedding: the mean over images of that embedding, and nothing by heart."""

import pytest
import torch
from torch import Tensor

from heterodiff.codecs.cnn import CNNCodec, ImageCodec
from heterodiff.training.recipes.guess import fit_guess

DIM, SHAPE, GROUPS, EACH = 16, (4, 2, 2), 8, 200


def codec() -> CNNCodec:
    torch.manual_seed(0)
    network = ImageCodec(1, (8, 8), (8, 8), SHAPE[0], DIM).eval().requires_grad_(False)
    network.register_to_config(latents_mean=[0.5, -1.0, 0.0, 2.0], latents_std=[0.3, 1.0, 2.0, 0.7])
    return CNNCodec(network)


def grouped() -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings that say in a thousandth of their variance what group an image is of: embeddings, groups, z."""
    generator = torch.Generator().manual_seed(1)
    group = torch.arange(GROUPS * EACH) % GROUPS
    embeddings = torch.randn(len(group), DIM, generator=generator)
    embeddings[:, :3] = 0.05 * (2.0 * ((group[:, None] >> torch.arange(3)) & 1) - 1)
    means = torch.randn(GROUPS, *SHAPE, generator=generator)
    z = means[group] + 0.5 * torch.randn(len(group), *SHAPE, generator=generator)
    return embeddings, group, z


def test_the_guess_is_the_mean_of_what_an_embedding_can_be() -> None:
    """Also where what tells the groups apart is a matter of their product: the means are any of the group."""
    network, (embeddings, group, z) = codec(), grouped()
    error = fit_guess(network, embeddings, torch.arange(len(z)), z)
    means = torch.stack([z[group == k].mean(dim=0) for k in range(GROUPS)])
    guessed = torch.stack([network.guess(embeddings)[group == k].mean(dim=0) for k in range(GROUPS)])
    assert float((guessed - means).abs().max()) < 0.4
    within = float((z - means[group]).square().mean() / (z - z.mean(dim=0)).square().mean())
    assert within < error < 1.5 * within  # at best what is random within a group is left
    scale = 7 * embeddings
    torch.testing.assert_close(network.guess(scale), network.guess(embeddings), atol=1e-4, rtol=1e-4)
    assert not any(parameter.requires_grad for parameter in network.network.parameters())


def test_several_embeddings_may_belong_to_an_image() -> None:
    network, (embeddings, _, z) = codec(), grouped()
    other = torch.cat([embeddings[:, :3], embeddings[:, 3:].flip(0)], dim=1)  # that say the same
    twice = torch.cat([embeddings, other])
    image_of = torch.arange(len(z)).repeat(2)
    assert fit_guess(network, twice, image_of, z) < 0.6


def test_nothing_is_guessed_by_heart() -> None:
    """Embeddings that have nothing to do with the maps: the mean map is the best guess."""
    network, (embeddings, _, z) = codec(), grouped()
    error = fit_guess(
        network, embeddings[torch.randperm(len(z), generator=torch.Generator().manual_seed(2))], *_rows(z)
    )
    assert 0.9 < error < 1.2
    assert float(network.guess(embeddings).std(dim=0).mean()) < 0.6 * float(z.std(dim=0).mean())


def _rows(z: Tensor) -> tuple[Tensor, Tensor]:
    return torch.arange(len(z)), z


def test_no_condition_is_guessed_as_zeros_and_the_same_again_is_the_same() -> None:
    embeddings, _, z = grouped()
    found = []
    for seed in (1, 2):
        network = codec()
        torch.manual_seed(seed)
        fit_guess(network, embeddings, *_rows(z))
        found.append(network.guess(torch.cat([embeddings[:3], torch.zeros(1, DIM)])))
        assert found[-1][3].eq(0).all()
    assert torch.equal(*found)


@pytest.mark.parametrize("images", [1, 2, 5])
def test_a_handful_of_images_will_do(images: int) -> None:
    network, (embeddings, _, z) = codec(), grouped()
    fit_guess(network, embeddings[:images], *_rows(z[:images]))
    assert bool(torch.isfinite(network.guess(embeddings)).all())
