"""Overlaps, decisions and intervals against plain counts, and the threshold that they must beat."""

from functools import partial

import numpy as np
import pytest

from heterodiff.metrics.segmentation import evaluate_segmentation, overlap, patient_interval, threshold_baseline
from heterodiff.pipelines.anomalies.masks import drop_small

SIDE = 12


def square(row: int, column: int, side: int) -> np.ndarray:
    mask = np.zeros((SIDE, SIDE), dtype=bool)
    mask[row : row + side, column : column + side] = True
    return mask


EMPTY = np.zeros((SIDE, SIDE), dtype=bool)


@pytest.mark.parametrize(
    ("found", "truth", "dice", "iou"),
    [
        (square(0, 0, 4), square(0, 0, 4), 1, 1),
        (square(0, 0, 4), square(0, 2, 4), 16 / 32, 8 / 24),
        (square(0, 0, 4), square(6, 6, 4), 0, 0),
        (EMPTY, EMPTY, 1, 1),
        (EMPTY, square(0, 0, 4), 0, 0),
        (square(0, 0, 4), EMPTY, 0, 0),
    ],
)
def test_overlap_is_counted(found: np.ndarray, truth: np.ndarray, dice: float, iou: float) -> None:
    measured = overlap(found[None], truth[None])
    assert measured[0] == pytest.approx([dice], abs=1e-6)
    assert measured[1] == pytest.approx([iou], abs=1e-6)


def some() -> dict[str, np.ndarray]:
    """Four images of lesions, two of none; of the last two one is judged wrongly."""
    truth = np.stack([square(0, 0, 2), square(0, 0, 3), square(1, 1, 4), square(2, 2, 6), EMPTY, EMPTY])
    masks = np.stack([square(0, 0, 2), square(0, 1, 3), square(1, 1, 4), EMPTY, square(0, 0, 6), square(0, 0, 6)])
    unhealthy = np.array([True, True, False, True, True, False])
    score = np.array([0.9, 0.8, 0.3, 0.7, 0.4, 0.1])
    maps = masks * 0.5 + truth * 0.25
    return {
        "masks": masks,
        "unhealthy": unhealthy,
        "maps": maps,
        "score": score,
        "truth": truth,
        "patients": np.array(["a", "a", "b", "b", "b", "c"]),
        "foreground": np.full(truth.shape, True),
    }


def test_all_numbers_of_a_case_that_is_counted_by_hand() -> None:
    found = evaluate_segmentation(**some())
    second = 2 * 6 / 18
    assert found["unhealthy"]["dice"]["mean"] == pytest.approx((1 + second + 1 + 0) / 4, abs=1e-6)
    assert found["mixed"]["dice"]["mean"] == pytest.approx((1 + second + 0 + 0 + 0 + 1) / 6, abs=1e-6)
    assert found["unhealthy"]["iou"]["mean"] == pytest.approx((1 + 0.5 + 1 + 0) / 4, abs=1e-6)
    assert found["healthy"]["false_positive_area"]["mean"] == pytest.approx(36 / 144 / 2)
    assert found["image"]["precision"] == 3 / 4
    assert found["image"]["recall"] == 3 / 4
    assert found["image"]["accuracy"] == 4 / 6
    pairs = [(i, j) for i in range(4) for j in (4, 5)]
    score = some()["score"]
    assert found["image"]["auroc"] == pytest.approx(np.mean([score[i] > score[j] for i, j in pairs]))
    assert [(row["patient"], row["n"]) for row in found["patients"]] == [("a", 2), ("b", 2), ("c", 0)]
    assert found["patients"][0]["dice"] == pytest.approx((1 + second) / 2)
    assert found["patients"][2]["dice"] is None
    assert [row["size"] for row in found["sizes"]] == ["small", "medium", "large"]
    assert sum(row["dice"]["n"] for row in found["sizes"]) == 4
    assert found["sizes"][0]["pixels"][0] == 4
    assert found["sizes"][-1]["pixels"][1] == 36


def slow_average_precision(truth: np.ndarray, values: np.ndarray) -> float:
    """Sum over thresholds of precision times the gain in recall."""
    total, before = 0.0, 0.0
    for threshold in sorted(set(values.tolist()), reverse=True):
        marked = values >= threshold
        recall = (marked & truth).sum() / truth.sum()
        total += (recall - before) * (marked & truth).sum() / marked.sum()
        before = recall
    return total


def test_auprc_is_the_area_over_recall_of_the_foreground() -> None:
    case, rng = some(), np.random.default_rng(0)
    case["maps"] = np.round(rng.random(case["truth"].shape) + case["truth"], 2)
    case["foreground"] = rng.random(case["truth"].shape) < 0.7
    found = evaluate_segmentation(**case)
    truth, maps = (case[name][case["foreground"]] for name in ("truth", "maps"))
    assert found["mixed"]["auprc"] == pytest.approx(slow_average_precision(truth, maps))


def test_an_image_that_is_labelled_unhealthy_counts_as_that_without_a_pixel_of_its_lesion() -> None:
    case = some()
    found = evaluate_segmentation(**case, ill=np.array([True] * 5 + [False]))
    assert (found["image"]["unhealthy"], found["image"]["precision"]) == (5, 1)
    assert found["healthy"]["false_positive_area"]["n"] == 1
    assert found["unhealthy"]["dice"]["n"] == 4


def test_interval_resamples_patients_not_slices() -> None:
    """Slices of a patient are alike here, so the interval is as wide as that of so many patients."""
    rng = np.random.default_rng(0)
    of_patient = rng.normal(0, 1, 40)
    values, patients = np.repeat(of_patient, 25), np.repeat([f"p{k}" for k in range(40)], 25).tolist()
    low, high = patient_interval(values, patients)
    half = 1.96 * of_patient.std() / np.sqrt(40)
    assert low == pytest.approx(values.mean() - half, abs=0.06)
    assert high == pytest.approx(values.mean() + half, abs=0.06)
    assert patient_interval(values, patients) == (low, high)


EVERYWHERE = np.full((2, SIDE, SIDE), True)
LESIONS = np.stack([square(2, 2, 5), square(5, 5, 4)])


def test_threshold_takes_the_best_of_channels_and_their_mean() -> None:
    rng = np.random.default_rng(0)
    noise = rng.random((2, 2, SIDE, SIDE)) * 0.4
    noise[:, 1] = 0.4 - noise[:, 0]  # in their mean only the lesion is left
    found = threshold_baseline(noise + 0.1 * LESIONS[:, None], LESIONS, EVERYWHERE, drop_small)
    assert found["of"] == "mean of channels, above"
    assert found["dice"] == pytest.approx(1)
    assert found["auprc"] == pytest.approx(1)


def test_threshold_finds_dark_lesions_inside_the_foreground() -> None:
    foreground = np.stack([square(1, 1, 9)] * 2)
    images = np.where(foreground, 0.6, 0.0)[:, None] - 0.3 * LESIONS[:, None]
    found = threshold_baseline(images, LESIONS, foreground, drop_small)
    assert found["of"] == "channel 0, below"
    assert found["dice"] == pytest.approx(1)
    assert 0.3 < found["threshold"] <= 0.6


def test_threshold_is_smoothed_and_rid_of_small_components_as_masks_are() -> None:
    """Single bright pixels beside a lesion: told apart by what is around them, or by their size."""
    images = 0.1 + 0.5 * LESIONS[:, None]
    images[:, :, [0, 0, 10, 10], [0, 10, 0, 10]] = 0.9
    plain = overlap(images[:, 0] > 0.5, LESIONS)[0].mean()
    dropped = threshold_baseline(images, LESIONS, EVERYWHERE, partial(drop_small, least=2), smoothing=1)
    smoothed = threshold_baseline(images, LESIONS, EVERYWHERE, partial(drop_small, least=0), smoothing=3)
    assert dropped["dice"] == pytest.approx(1)
    assert plain < smoothed["dice"] < 1
    assert smoothed["of"] == "channel 0, smoothed, above"


@pytest.mark.parametrize("kind", ["healthy", "unhealthy"])
def test_images_of_one_kind_alone(kind: str) -> None:
    case = {name: values[4:] if kind == "healthy" else values[:4] for name, values in some().items()}
    found = evaluate_segmentation(**case)
    assert found["image"]["auroc"] is None
    assert found[kind if kind == "unhealthy" else "mixed"]["dice"]["n"] == len(case["truth"])
    assert ("sizes" in found) == (kind == "unhealthy")
