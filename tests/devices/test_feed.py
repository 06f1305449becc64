"""Images on their way to the device: stored there or copied batch by batch, they are those of the CPU."""

import numpy as np
import pytest
import torch

from heterodiff.config import RunConfig
from heterodiff.config.file import parse_config
from heterodiff.data.dataset import ImageDataset, ImageSpec, MemoryStore
from heterodiff.devices import default_device
from heterodiff.diffusion.timesteps import LossSecondMomentTimesteps
from heterodiff.training import feed as feed_module
from heterodiff.training.feed import Feed
from tests.devices import watched

CPU = torch.device("cpu")


def dataset(dtype: str) -> ImageDataset:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (40, 2, 6, 5)).astype(dtype)
    spec = ImageSpec(6, 5, 2, ("a", "b"), (10.0, 240.0), dtype)
    return ImageDataset(spec, MemoryStore(images), np.arange(3, 40), [str(k) for k in range(37)], np.arange(37) % 2)


def config(keep: bool | str, **data: object) -> RunConfig:
    return parse_config(
        {"data": {"source": "digits", "keep_on_device": keep, **data}, "training": {"batch_size": 8, "steps": 6}}
    )


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32", "bool"])
@pytest.mark.parametrize("augmented", [False, True])
@pytest.mark.parametrize("keep", [False, True, "auto"])
def test_batches_are_those_of_the_cpu(keep: bool | str, augmented: bool, dtype: str) -> None:
    options = {"horizontal_flip": True, "random_crop": 2} if augmented else {}
    data = dataset(dtype)
    here, there = (Feed(config(keep, **options), data, device) for device in (CPU, default_device()))
    for mine, theirs in zip(here.loader(0, 6), there.loader(0, 6), strict=True):
        assert theirs.stored is None if keep else theirs.stored is not None
        assert torch.equal(mine.labels, theirs.labels)
        for rows in (slice(None), slice(2, 5)):
            found = there.images(theirs, rows)
            assert found.device.type == default_device().type
            assert torch.equal(here.images(mine, rows), found.cpu())


def test_kept_images_do_not_travel_again() -> None:
    data = dataset("uint8")
    feed = Feed(config("auto"), data, default_device())
    with watched() as counts:
        feed.images(feed.batch(0), slice(None))
    assert counts.copies == 1  # which images they are
    assert counts.waits == 0


def test_a_set_that_is_too_large_is_not_kept_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    data = dataset("uint8")
    size = data.bytes_in_memory()
    assert size == 37 * 60
    for free, kept in ((10 * size, True), (10 * size - 10, False)):
        monkeypatch.setattr(feed_module, "free_memory", lambda device, free=free: (free, "memory"))
        assert (Feed(config("auto"), data, default_device()).batch(0).stored is None) == kept
        assert Feed(config(True), data, default_device()).batch(0).stored is None


def test_importance_sampling_learns_on_the_device_without_waiting() -> None:
    here, there = LossSecondMomentTimesteps(12), LossSecondMomentTimesteps(12)
    device = default_device()
    there.to(device)
    rng = np.random.default_rng(0)
    for step in range(40):
        t = torch.from_numpy(rng.integers(0, 12, 32))  # some timesteps occur more than ten times
        losses = torch.from_numpy(rng.random(32).astype(np.float32))
        losses[step % 5] = torch.nan
        here.update(t, losses)
        moved = t.to(device), losses.to(device)
        with watched() as counts:
            there.update(*moved)
            drawn = there.sample(16, torch.Generator(device).manual_seed(step))
        assert counts.waits == counts.copies == 0
        expected = here.sample(16, torch.Generator().manual_seed(step))
        assert all(torch.equal(a, b.cpu()) for a, b in zip(expected, drawn, strict=True))
    assert not torch.equal(here.probabilities(), torch.full((12,), 1 / 12, dtype=torch.float64))
