"""The height of a slice in the head, which tells much of its label: kept apart from what a model finds."""

from collections.abc import Callable, Sequence

import numpy as np

ENTANGLED = 0.98
"""AUROC of the height above which labels can hardly be told from places."""


SLICED = ("volumes", "brain-phantom")
"""Sources of slices, whose names are ``patient/0012``."""


def patients_and_heights(names: Sequence[str], source: str) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the patient of each slice, and its height among the patient's slices, 0 to 1, from its name.

    Of a ``source`` that is not one of :data:`SLICED`, each image counts as a patient, and heights are None.
    """
    if source not in SLICED:
        return np.array(names), None
    parts = [name.rpartition("/") for name in names]
    numbers = ["".join(letter for letter in last if letter.isdigit()) for _, _, last in parts]
    patients, index = np.array([patient for patient, _, _ in parts]), np.array([int(number) for number in numbers])
    heights = np.zeros(len(names))
    for patient in np.unique(patients):
        own = index[patients == patient]
        heights[patients == patient] = (own - own.min()) / max(1, own.max() - own.min())
    return patients, heights


def _height_model(heights: np.ndarray, unhealthy: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Fit the probability of the label by a quadratic function of the height."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import PolynomialFeatures

    fitted = make_pipeline(PolynomialFeatures(2), LogisticRegression(C=100)).fit(heights[:, None], unhealthy)
    return lambda others: np.asarray(fitted.predict_proba(others[:, None])[:, 1])


def overlap_weights(heights: np.ndarray, unhealthy: np.ndarray) -> np.ndarray:
    """Return the weight of each slice that makes heights the same for both labels: what its height says of the other.

    Li, Morgan and Zaslavsky 2018. Slices of heights that only one label has hardly count, so that a place is not taken
    for a lesion.
    """
    probability = _height_model(heights, unhealthy)(heights)
    return np.clip(np.where(unhealthy, 1 - probability, probability), 1e-3, None)


def by_height(heights: np.ndarray, unhealthy: np.ndarray) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Return a function for :func:`held_out_auroc` that scores slices by their height alone."""
    return lambda known, others: _height_model(heights[known], unhealthy[known])(heights[others])


def held_out_auroc(
    scores: Callable[[np.ndarray, np.ndarray], np.ndarray],
    unhealthy: np.ndarray,
    patients: np.ndarray,
    importance: np.ndarray,
) -> float | None:
    """Return the AUROC of images, each scored by what was learned from the other half of the patients.

    Args:
        scores: (rows to learn from, rows to score) -> a score for each of the latter.
        importance: (N,) how much each image counts.

    Returns:
        The mean over both halves; None where a half has images of one label alone.
    """
    from sklearn.metrics import roc_auc_score

    second = np.isin(patients, np.unique(patients)[1::2])
    halves = [np.flatnonzero(half) for half in (~second, second)]
    if any(not 0 < unhealthy[half].sum() < len(half) for half in halves):
        return None
    pairs = [(halves[0], halves[1]), (halves[1], halves[0])]
    areas = [
        roc_auc_score(unhealthy[others], scores(known, others), sample_weight=importance[others])
        for known, others in pairs
    ]
    return float(np.mean(areas))


def entangled(heights: np.ndarray, unhealthy: np.ndarray, patients: np.ndarray) -> str:
    """Return a warning where the height of a slice tells its label almost always; empty where it does not."""
    found = held_out_auroc(by_height(heights, unhealthy), unhealthy, patients, np.ones(len(heights)))
    if found is None or found <= ENTANGLED:
        return ""
    return (
        f"the height of a slice tells its label almost always (AUROC {found:.3f}): a model may learn places and not "
        "lesions; train on slices of the heights at which both labels occur"
    )
