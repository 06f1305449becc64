"""Masks and decisions against slow, plain versions; what labels and numbers cannot be used."""

import json

import numpy as np
import pytest

from heterodiff.errors import DataError, RunError
from heterodiff.pipelines.anomalies.masks import (
    Calibration,
    anomaly_mask,
    calibrate,
    drop_small,
    half_peak_mask,
    peak_score,
)


def slow_quantile(values: np.ndarray, q: float) -> float:
    ordered = sorted(values.ravel().tolist())
    place = q * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def slow_median(image: np.ndarray, side: int) -> np.ndarray:
    padded = np.pad(image, side // 2, mode="symmetric")
    rows, columns = image.shape
    squares = [[padded[i : i + side, j : j + side] for j in range(columns)] for i in range(rows)]
    return np.array([[sorted(square.ravel())[side**2 // 2] for square in row] for row in squares])


@pytest.mark.parametrize(
    ("shares", "side"),
    [((0.0, 0.0), 5), ((0.3, 0.824), 5), ((1.0, 1.0), 5), ((5.0, 0.5), 5), ((0.3, 0.8), 1), ((0.3, 0.8), 3)],
)
def test_mask_is_that_of_the_formula(shares: tuple[float, float], side: int) -> None:
    maps = np.random.default_rng(0).gamma(1.0, size=(2, 20, 24))
    maps[:, 5:12, 8:15] += 3
    largest = np.array([0.5, 2.0])
    limits = []
    for one, share in zip(maps, shares, strict=True):
        r = round(100 * min(max(share, 0), 1))
        limits.append(slow_quantile(one, 0.98 - 0.0008 * r))
    expected = slow_median((maps[0] + maps[1]) / 2, side) >= sum(limits) / 2
    default = {} if side == 5 else {"smoothing": side}
    found = anomaly_mask(maps, np.array(shares) * largest, largest, **default)
    np.testing.assert_array_equal(found, expected)


def test_a_stronger_anomaly_marks_more() -> None:
    maps = np.random.default_rng(0).random((1, 64, 64)) * 0.2
    maps[:, 10:30, 10:30] += np.linspace(0.2, 3, 20)  # stronger to the right
    counts = [anomaly_mask(maps, np.array([share]), np.ones(1)).sum() for share in (0.0, 0.5, 1.0)]
    assert counts[0] < counts[1] < counts[2]


def test_no_divergence_at_calibration_counts_as_the_strongest() -> None:
    maps = np.random.default_rng(0).gamma(1.0, size=(1, 16, 16))
    strongest = anomaly_mask(maps, np.ones(1), np.ones(1))
    np.testing.assert_array_equal(anomaly_mask(maps, np.zeros(1), np.zeros(1)), strongest)


def flooded(mask: np.ndarray) -> list[set[tuple[int, int]]]:
    """Components by flood filling, neighbours by edge or corner."""
    left, found = {tuple(map(int, place)) for place in np.argwhere(mask)}, []
    while left:
        part, border = set(), {left.pop()}
        while border:
            row, column = border.pop()
            part.add((row, column))
            near = {(row + i, column + j) for i in (-1, 0, 1) for j in (-1, 0, 1)} & left
            left -= near
            border |= near
        found.append(part)
    return found


@pytest.mark.parametrize("least", [0, 1, 4, 10])
def test_small_components_are_dropped(least: int) -> None:
    mask = np.random.default_rng(1).random((40, 30)) < 0.25
    expected = np.zeros_like(mask)
    for part in flooded(mask):
        if len(part) > least:
            expected[tuple(np.array(sorted(part)).T)] = True
    np.testing.assert_array_equal(drop_small(mask, least), expected)


@pytest.mark.parametrize(("side", "dropped", "kept"), [(128, 40, 41), (64, 10, 11)])
def test_what_is_small_depends_on_the_picture(side: int, dropped: int, kept: int) -> None:
    mask = np.zeros((side, side), dtype=bool)
    mask[2, :dropped] = True
    mask[8, :kept] = True
    assert drop_small(mask).sum() == kept


# --- the peak of a map -------------------------------------------------------------------------------


def means_of_squares(image: np.ndarray, side: int) -> np.ndarray:
    """Literally; beyond the border, the picture mirrored at its edge."""
    height, width = image.shape
    near = range(-(side // 2), side // 2 + 1)
    result = np.empty((height, width))
    for row in range(height):
        for column in range(width):
            rows = [abs(r) - (r < 0) if r < height else 2 * height - 1 - r for r in (row + k for k in near)]
            columns = [abs(c) - (c < 0) if c < width else 2 * width - 1 - c for c in (column + k for k in near)]
            result[row, column] = np.mean([[image[r, c] for c in columns] for r in rows])
    return result


@pytest.mark.parametrize("side", [1, 3, 5])
def test_the_peak_is_that_of_the_mean_map_smoothed(side: int) -> None:
    maps = np.random.default_rng(0).random((3, 14, 11))
    smooth = means_of_squares(maps.mean(axis=0), side)
    default = {} if side == 5 else {"smoothing": side}
    assert peak_score(maps, **default) == pytest.approx(smooth.max() / maps.mean())
    assert peak_score(7 * maps, **default) == pytest.approx(peak_score(maps, **default))
    np.testing.assert_array_equal(half_peak_mask(maps, **default), smooth >= smooth.max() / 2)


def test_a_map_of_almost_nothing_is_not_marked_everywhere() -> None:
    maps = np.zeros((1, 16, 16))
    assert not half_peak_mask(maps).any()
    maps[0, 3, 3:5] = 1  # less than any quantile leaves above it
    assert not anomaly_mask(maps, np.ones(1), np.ones(1)).any()
    assert anomaly_mask(maps, np.ones(1), np.ones(1), smoothing=1).sum() == 2


def test_a_map_without_a_peak() -> None:
    assert peak_score(np.zeros((2, 8, 8))) == 0
    assert peak_score(np.ones((2, 8, 8))) == pytest.approx(1)


def test_a_lesion_in_noise_is_marked_and_noise_alone_has_a_low_peak() -> None:
    rng = np.random.default_rng(0)
    noise = rng.chisquare(1, (4, 64, 64))
    lesion = np.zeros((64, 64), dtype=bool)
    lesion[20:30, 30:42] = True
    ill = noise * (1 + 8 * lesion)
    assert peak_score(ill) > 3 * peak_score(noise)
    found = half_peak_mask(ill)
    assert 2 * (found & lesion).sum() / (found.sum() + lesion.sum()) > 0.9


# --- calibration -------------------------------------------------------------------------------------


def validation(overlap: float = 1.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    unhealthy = np.arange(300) % 3 == 0
    score = rng.normal(0, overlap, 300) + 3 * unhealthy
    return rng.random((300, 2)) + unhealthy[:, None], score, unhealthy


@pytest.mark.parametrize("overlap", [0.1, 1.0, 3.0])
def test_limit_has_the_fewest_errors_of_a_hundred(overlap: float) -> None:
    divergence, score, unhealthy = validation(overlap)
    found = calibrate(divergence, score, unhealthy)
    errors = []
    for k in range(100):
        limit = slow_quantile(score[~unhealthy], 0.905 + k * 0.09 / 99)
        errors.append(sum((value >= limit) != label for value, label in zip(score, unhealthy, strict=True)))
    assert found.errors == min(errors)
    assert int(((score >= found.score_limit) != unhealthy).sum()) == found.errors
    assert found.largest_divergence == pytest.approx(divergence[unhealthy].max(axis=0))
    assert (found.healthy, found.unhealthy) == (200, 100)


def test_calibration_is_saved_and_read() -> None:
    found = calibrate(*validation())
    assert Calibration.from_dict(json.loads(json.dumps(found.to_dict()))) == found


def test_healthy_images_alone_give_a_limit_that_one_of_twenty_exceeds() -> None:
    generator = np.random.default_rng(0)
    divergence, score = generator.random((200, 3)), generator.random(200)
    healthy = np.zeros(200, dtype=bool)
    found = calibrate(divergence, score, healthy, healthy_alone=True)
    assert (found.healthy, found.unhealthy) == (200, 0)
    assert found.errors == (score >= found.score_limit).sum() == 10
    assert found.largest_divergence == tuple(divergence.max(axis=0))
    with pytest.raises(DataError, match="found 200 and 0"):
        calibrate(divergence, score, healthy)
    with pytest.raises(DataError, match="found 0 and 200"):
        calibrate(divergence, score, ~healthy, healthy_alone=True)


@pytest.mark.parametrize("content", [{}, [], {"largest_divergence": "x"}, None])
def test_damaged_calibration_is_refused(content: object) -> None:
    with pytest.raises(RunError, match="calibrate again"):
        Calibration.from_dict(content)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("key", ["largest_divergence", "score_limit", "healthy"])
def test_a_calibration_that_is_not_finite_is_refused(key: str, value: float) -> None:
    content = Calibration((0.5, 0.5), 0.1, 3, 2, 1).to_dict()
    with pytest.raises(RunError, match="calibrate again"):
        Calibration.from_dict(content | {key: [0.5, value] if key == "largest_divergence" else value})


def test_a_calibration_of_other_channels_is_refused() -> None:
    found = Calibration((0.5, 0.5), 0.1, 3, 2, 1)
    assert Calibration.from_dict(found.to_dict(), 2) == found
    with pytest.raises(RunError, match="expected 4 channels, found 2; calibrate again"):
        Calibration.from_dict(found.to_dict(), 4)


def test_labels_the_wrong_way_round_are_found() -> None:
    divergence, score, unhealthy = validation()
    with pytest.raises(DataError, match=r"unhealthy validation images score .* less than healthy .*labels are swapped"):
        calibrate(divergence, score, ~unhealthy)


@pytest.mark.parametrize("value", [True, False])
def test_both_labels_are_needed(value: bool) -> None:
    divergence, score, unhealthy = validation()
    counts = "0 and 300" if value else "300 and 0"
    with pytest.raises(DataError, match=f"found {counts}; hold out more"):
        calibrate(divergence, score, np.full_like(unhealthy, value))


@pytest.mark.parametrize("which", [0, 1])
def test_numbers_that_are_none_are_refused(which: int) -> None:
    numbers = validation()
    numbers[which][7] = np.nan
    with pytest.raises(DataError, match="not finite"):
        calibrate(*numbers)


def test_a_threshold_that_no_unhealthy_image_reaches_is_refused() -> None:
    score = np.concatenate([np.linspace(0, 1, 40), np.full(10, 0.6)])
    with pytest.raises(DataError, match="every image would be judged healthy"):
        calibrate(np.ones((50, 1)), score, np.arange(50) >= 40)
