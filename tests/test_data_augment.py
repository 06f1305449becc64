"""Augmentation depends on the seed of each image alone."""

import numpy as np
import pytest
import torch

from heterodiff.config import DataConfig
from heterodiff.data.augment import augment

KNOWN = [51, 43, 47, 53, 43, 41]
BOTH = DataConfig(horizontal_flip=True, random_crop=3)


def batch(count: int = 16) -> torch.Tensor:
    return torch.rand(count, 3, 9, 7, generator=torch.Generator().manual_seed(0))


def test_off_changes_nothing():
    images = batch()
    assert augment(images, range(16), DataConfig()) is images


@pytest.mark.parametrize("config", [BOTH, DataConfig(horizontal_flip=True), DataConfig(random_crop=2)])
def test_batched_equals_one_by_one(config):
    images, seeds = batch(), [5, -1, 2**63, 0, *range(100, 112)]
    together = augment(images, seeds, config)
    assert together.shape == images.shape
    assert not torch.equal(together, images)
    for index, seed in enumerate(seeds):
        torch.testing.assert_close(
            together[index], augment(images[index : index + 1], [seed], config)[0], rtol=0, atol=0
        )
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1)).tolist()
    shuffled = augment(images[order], [seeds[i] for i in order], config)
    assert torch.equal(shuffled, together[order])


def test_crop_is_padding_by_replication_and_cutting():
    image = torch.arange(63.0).reshape(1, 1, 9, 7)
    padded = torch.nn.functional.pad(image, (3, 3, 3, 3), mode="replicate")
    crops = [padded[0, :, top : top + 9, left : left + 7] for top in range(7) for left in range(7)]
    seen = set()
    for seed in range(600):
        out = augment(image, [seed], DataConfig(random_crop=3))[0]
        seen.add(next(index for index, crop in enumerate(crops) if torch.equal(crop, out)))
    assert len(seen) == 49


def test_half_is_flipped():
    image = batch(1)
    flips = [
        torch.equal(augment(image, [seed], DataConfig(horizontal_flip=True)), image.flip(3)) for seed in range(1000)
    ]
    assert 430 < np.sum(flips) < 570


def test_flip_does_not_change_the_crop():
    images, seeds = batch(), range(16)
    cropped = augment(images, seeds, DataConfig(random_crop=3))
    both = augment(images, seeds, BOTH)
    for one, other in zip(cropped, both, strict=True):
        assert torch.equal(one, other) or not torch.equal(one.flip(2), one)


def test_known_draws_stay():
    """Guards resumed runs: the draws of a seed must never change between releases."""
    image = torch.arange(63.0).reshape(1, 1, 9, 7)
    assert [int(augment(image, [seed], BOTH)[0, 0, 4, 3]) for seed in range(6)] == KNOWN
