"""Patients whose sequences are ordered or scaled differently than those trained on are noticed, others are not."""

from itertools import permutations
from pathlib import Path

import numpy as np
import pytest

from heterodiff.errors import RunError
from heterodiff.pipelines.anomalies.known_patients import KnownPatients

NAMES = ("flair", "t1", "t2")


def patient(seed: int, channels: int = 3) -> np.ndarray:
    """Slices (5, C, 40, 36) of a head whose tissues differ in each channel."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[-1:1:40j, -1:1:36j]
    tissue = np.digitize(np.sqrt((x * rng.uniform(0.95, 1.05)) ** 2 + y**2), [0.3, 0.6, 0.9])
    brightness = np.array([[0.9, 0.5, 0.3, 0], [0.3, 0.7, 0.9, 0], [0.6, 0.3, 0.7, 0], [0.5, 0.9, 0.5, 0]])[:channels]
    images = brightness[:, tissue] * rng.uniform(0.9, 1.1, (channels, 1, 1))
    noise = rng.normal(0, 0.02, (5, *images.shape)) * (tissue < 3)
    return np.clip(images + noise, 0, 1).astype(np.float32)


@pytest.fixture(scope="module")
def known() -> KnownPatients:
    return KnownPatients.of([patient(seed) for seed in range(12)])


def test_patients_like_those_known_are_not_reported(known: KnownPatients) -> None:
    assert [line for seed in range(100, 130) for line in known.differences(patient(seed), NAMES)] == []


@pytest.mark.parametrize("order", [o for o in permutations(range(3)) if o != (0, 1, 2)])
def test_exchanged_sequences_are_named(known: KnownPatients, order: tuple[int, ...]) -> None:
    lines = "\n".join(known.differences(patient(100)[:, order], NAMES))
    for place, channel in enumerate(order):
        assert (f"'{NAMES[place]}' looks like '{NAMES[channel]}'" in lines) == (place != channel)


def test_another_scale_is_named(known: KnownPatients) -> None:
    dark = patient(100) * np.array([1, 0.4, 1], np.float32)[:, None, None]
    lines = known.differences(dark, NAMES)
    assert len(lines) == 1
    assert lines[0].startswith("'t1': 10 % of the foreground are below 0.1")
    assert "among the patients trained on, below 0." in lines[0]
    assert known.differences(np.zeros((2, 3, 40, 36), np.float32), NAMES)  # nothing at all, but no error


def test_one_channel_and_many_have_no_order(known: KnownPatients) -> None:
    alone = KnownPatients.of([patient(seed)[:, :1] for seed in range(5)])
    assert alone.differences(patient(100)[:, :1], NAMES[:1]) == []
    many = np.concatenate([patient(100, 4), patient(100, 4)], axis=1)
    assert KnownPatients.of([many]).differences(many[:, ::-1], [str(k) for k in range(8)])


def test_facts_survive_a_file_and_damage_is_reported(known: KnownPatients, tmp_path: Path) -> None:
    file = tmp_path / "patients.npz"
    assert KnownPatients.load(file) is None
    known.save(file)
    again = KnownPatients.load(file)
    assert again is not None
    for key in ("mean", "low", "high"):
        np.testing.assert_array_equal(getattr(again, key), getattr(known, key))
    np.savez(file, mean=known.mean[:, :5], low=known.low, high=known.high)
    with pytest.raises(RunError, match=r"unexpected shapes; calibrate again"):
        KnownPatients.load(file)
    for content in (b"", b"no archive", file.read_bytes()[:200]):
        file.write_bytes(content)
        with pytest.raises(RunError, match="cannot be read"):
            KnownPatients.load(file)
