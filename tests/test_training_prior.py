"""The prior over maps given an embedding: the mean over its images, without overfitting."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from torch import Tensor

from heterodiff.codecs.cnn import CNNCodec, ImageCodec
from heterodiff.training.recipes.prior import fit_prior, seen_features

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


def test_the_prior_is_the_mean_of_what_an_embedding_can_be() -> None:
    """Also where what tells the groups apart is a matter of their product: the means are any of the group."""
    network, (embeddings, group, z) = codec(), grouped()
    error = fit_prior(network, embeddings, torch.arange(len(z)), z)
    means = torch.stack([z[group == k].mean(dim=0) for k in range(GROUPS)])
    found = torch.stack([network.prior(embeddings)[group == k].mean(dim=0) for k in range(GROUPS)])
    assert float((found - means).abs().max()) < 0.4
    within = float((z - means[group]).square().mean() / (z - z.mean(dim=0)).square().mean())
    assert within < error < 1.5 * within  # at best what is random within a group is left
    scale = 7 * embeddings
    torch.testing.assert_close(network.prior(scale), network.prior(embeddings), atol=1e-4, rtol=1e-4)
    assert not any(parameter.requires_grad for parameter in network.network.parameters())


def test_several_embeddings_may_belong_to_an_image() -> None:
    network, (embeddings, _, z) = codec(), grouped()
    other = torch.cat([embeddings[:, :3], embeddings[:, 3:].flip(0)], dim=1)  # that say the same
    twice = torch.cat([embeddings, other])
    image_of = torch.arange(len(z)).repeat(2)
    assert fit_prior(network, twice, image_of, z) < 0.6


def test_the_prior_does_not_overfit() -> None:
    """Embeddings that have nothing to do with the maps: the mean map is the best prediction."""
    network, (embeddings, _, z) = codec(), grouped()
    error = fit_prior(
        network, embeddings[torch.randperm(len(z), generator=torch.Generator().manual_seed(2))], *_rows(z)
    )
    assert 0.9 < error < 1.2
    assert float(network.prior(embeddings).std(dim=0).mean()) < 0.6 * float(z.std(dim=0).mean())


def _rows(z: Tensor) -> tuple[Tensor, Tensor]:
    return torch.arange(len(z)), z


def test_no_condition_has_a_prior_of_zeros_and_the_same_again_is_the_same() -> None:
    embeddings, _, z = grouped()
    found = []
    for seed in (1, 2):
        network = codec()
        torch.manual_seed(seed)
        fit_prior(network, embeddings, *_rows(z))
        found.append(network.prior(torch.cat([embeddings[:3], torch.zeros(1, DIM)])))
        assert found[-1][3].eq(0).all()
    assert torch.equal(*found)


def test_features_are_predicted_beside_the_map() -> None:
    """They are what the group's are on average, and the map is predicted as it is without them."""
    network, (embeddings, group, z) = codec(), grouped()
    network.network.add_features(3)
    assert network.network.config.feature_channels == 3
    means = torch.randn(GROUPS, 3, 2, 2, generator=torch.Generator().manual_seed(5))
    features = means[group] + 0.3 * torch.randn(len(z), 3, 2, 2, generator=torch.Generator().manual_seed(6))
    fit_prior(network, embeddings, torch.arange(len(z)), z, features)
    found = network.prior(torch.cat([embeddings, torch.zeros(1, DIM)]))
    assert found.shape == (len(z) + 1, SHAPE[0] + 3, 2, 2)
    assert not found[-1].any()
    of_groups = torch.stack([found[:-1][group == k].mean(dim=0) for k in range(GROUPS)])
    assert float((of_groups[:, SHAPE[0] :] - means).abs().max()) < 0.4
    expected = torch.stack([z[group == k].mean(dim=0) for k in range(GROUPS)])
    assert float((of_groups[:, : SHAPE[0]] - expected).abs().max()) < 0.4
    maps = network.network.get_latent_from_embedding(embeddings[:5])
    torch.testing.assert_close(network.scale(maps), found[:5, : SHAPE[0]], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("width", "channels"), [(12, 5), (3, 5)])
def test_features_are_the_principal_components_of_what_the_captioner_sees(width: int, channels: int) -> None:
    network = codec()
    network.network.add_features(channels)
    see = torch.nn.Conv2d(SHAPE[0], width, 3, padding=1)
    captioner = SimpleNamespace(image_features=see, dtype=torch.float32)
    networks: Any = SimpleNamespace(captioner=captioner, image_codec=network.network)
    z = torch.randn(300, *SHAPE, generator=torch.Generator().manual_seed(3))
    found = seen_features(networks, network, z)
    assert found.shape == (300, channels, 2, 2)
    with torch.no_grad():
        cells = see(network.unscale(z)).movedim(1, -1).flatten(0, 2).double().numpy()
    expected = PCA(min(width, channels), whiten=True).fit_transform(cells)[:, ::-1]
    mine = found.movedim(1, -1).flatten(0, 2).numpy()
    sign = np.sign((mine[:, : expected.shape[1]] * expected).sum(axis=0))
    np.testing.assert_allclose(mine[:, : expected.shape[1]], expected * sign, atol=5e-3)
    assert not mine[:, expected.shape[1] :].any()


@pytest.mark.parametrize("images", [1, 2, 5])
def test_a_handful_of_images_will_do(images: int) -> None:
    network, (embeddings, _, z) = codec(), grouped()
    fit_prior(network, embeddings[:images], *_rows(z[:images]))
    assert bool(torch.isfinite(network.prior(embeddings)).all())
