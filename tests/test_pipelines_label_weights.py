"""Weights that image labels teach: they find which plane shows a lesion and with which sign."""

from dataclasses import asdict

import numpy as np
import pytest
from scipy.ndimage import uniform_filter
from scipy.optimize import minimize

from heterodiff.metrics.segmentation import overlap
from heterodiff.pipelines.anomalies.label_weights import DECAY, OUTSIDE, LabelWeights, fit_label_weights, planes_of
from heterodiff.pipelines.anomalies.masks import half_peak_mask

COUNT, SIDE, AREA = 60, 16, 6
SICK = np.arange(COUNT) % 3 == 0


def pictures(seed: int = 0, strength: float = -4.0) -> tuple[np.ndarray, np.ndarray]:
    """Planes (N, 3, H, W) and lesions (N, H, W): dark in plane 1; plane 2 has bright blobs in every image."""
    rng = np.random.default_rng(seed)
    planes = rng.normal(size=(COUNT, 3, SIDE, SIDE)) * np.array([1.0, 0.2, 5.0])[:, None, None]
    truth = np.zeros((COUNT, SIDE, SIDE), bool)
    for k in range(COUNT):
        for plane, shown in ((2, True), (1, SICK[k])):
            y, x = rng.integers(1, SIDE - 5, 2)
            if shown:
                planes[k, plane, y : y + 4, x : x + 4] += strength * 0.2 if plane == 1 else 30
                truth[k, y : y + 4, x : x + 4] |= plane == 1
    planes[:, :, 0] = 0  # background
    truth[:, 0] = False
    return planes.astype(np.float32), truth


def literal_loss(planes: np.ndarray, sick: np.ndarray, found: LabelWeights) -> float:
    """The loss of weights, image by image and pixel by pixel."""
    inside = [planes[:, p][planes[:, 1] != 0] for p in range(planes.shape[1])]
    decay = DECAY * sum((w * one.std()) ** 2 for w, one in zip(found.weights, inside, strict=True)) / 2
    losses = []
    for image, ill in zip(planes, sick, strict=True):
        values = [
            sum(w * v for w, v in zip(found.weights, image[:, y, x], strict=True)) + found.bias
            for y in range(SIDE)
            for x in range(SIDE)
            if image[:, y, x].any()
        ]
        score = np.mean(sorted(values)[-found.area :])
        cross_entropy = np.logaddexp(0, -score) if ill else np.logaddexp(0, score)
        losses.append(cross_entropy * 0.5 / (sick.mean() if ill else 1 - sick.mean()))
    return float(np.mean(losses) + decay)


def test_the_plane_and_the_sign_of_a_lesion_are_learned_from_labels() -> None:
    planes, _ = pictures()
    found = fit_label_weights(planes, SICK, AREA)
    shares = np.array(found.weights) * planes.std(axis=(0, 2, 3))
    assert shares[1] < 0
    assert abs(shares[1]) > 3 * np.abs(shares[[0, 2]]).max()
    others, truth = pictures(seed=1)
    scores = found.scores(found.values(others))
    assert scores[SICK].min() > scores[~SICK].max()
    masks = np.stack([half_peak_mask(one[None], 1) for one in found.probabilities(others)])
    assert overlap(masks, truth)[0][SICK].mean() > 0.7


def test_weights_are_where_a_literal_loss_is_least() -> None:
    planes, _ = pictures(strength=-2.0)
    found = fit_label_weights(planes, SICK, AREA)
    start = np.array([*found.weights, found.bias])

    def loss(numbers: np.ndarray) -> float:
        return literal_loss(planes, SICK, LabelWeights(tuple(numbers[:3]), float(numbers[3]), AREA))

    best = minimize(loss, start, method="Nelder-Mead", options={"maxfev": 120}).fun
    assert loss(start) < best + 0.01
    for other in (np.array([0.0, 0, 0, 0]), start * [1, -1, 1, 1]):
        assert loss(other) > loss(start) + 0.1


def test_the_unit_of_a_plane_does_not_matter() -> None:
    planes, _ = pictures()
    scale = np.array([1.0, 7.0, 0.1], np.float32)[:, None, None]
    one, other = fit_label_weights(planes, SICK, AREA), fit_label_weights(planes * scale, SICK, AREA)
    np.testing.assert_allclose(one.values(planes), other.values(planes * scale), atol=0.05)


def test_scores_are_means_of_the_largest_values_and_the_background_counts_for_nothing() -> None:
    planes, _ = pictures()
    weights = LabelWeights((1.0, -2.0, 0.5), 0.25, AREA)
    values = weights.values(planes)
    assert (values[:, 0] == OUTSIDE).all()
    assert (weights.probabilities(planes)[:, 0] == 0).all()
    expected = planes[:, 0] - 2 * planes[:, 1] + 0.5 * planes[:, 2] + 0.25
    np.testing.assert_allclose(values[:, 1:], expected[:, 1:], rtol=1e-5, atol=1e-5)
    literal = [np.sort(one.ravel())[-AREA:].mean() for one in values]
    np.testing.assert_allclose(weights.scores(values), literal, rtol=1e-6)


def test_planes_are_smoothed_differences_and_intensities() -> None:
    rng = np.random.default_rng(0)
    images, differences = rng.uniform(0.1, 1, (2, 3, SIDE, SIDE)), rng.normal(size=(2, 2, SIDE, SIDE))
    images[:, :, :3] = 0
    planes = planes_of(differences, images, [2, 0], 3)
    assert planes.shape == (2, 4, SIDE, SIDE)
    assert (planes[:, :, :3] == 0).all()
    for k in range(2):
        for plane, whole in enumerate([*differences[k], images[k, 2], images[k, 0]]):
            np.testing.assert_allclose(planes[k, plane, 3:], uniform_filter(whole, 3)[3:], rtol=1e-4, atol=1e-6)


def test_weights_survive_json_and_others_are_refused() -> None:
    weights = LabelWeights((1.0, -2.0), 0.5, 3)
    content = asdict(weights)
    assert LabelWeights.from_dict(content, 2) == weights
    for planes, changes in ((3, {}), (2, {"area": 0}), (2, {"bias": float("nan")}), (2, {"weights": [1, 1e999]})):
        with pytest.raises(ValueError, match="weights: expected"):
            LabelWeights.from_dict(content | changes, planes)
