"""The split is stratified, reproducible from names and seed, and can be saved and used again."""

import json

import numpy as np
import pytest

from heterodiff.data.split import apply_split, draw_split
from heterodiff.errors import DataError

NAMES = [f"{index}.png" for index in range(200)]
LABELS = np.array([index % 4 if index < 190 else -1 for index in range(200)])


def test_every_class_gives_its_share():
    mask = draw_split(NAMES, LABELS, 0.1, seed=0)
    for label in range(-1, 4):
        assert mask[label == LABELS].sum() == round((label == LABELS).sum() * 0.1)


@pytest.mark.parametrize(
    ("count", "fraction", "expected"), [(1, 0.5, 0), (2, 0.01, 1), (2, 0.99, 1), (9, 0.99, 8), (9, 0, 0)]
)
def test_at_least_one_and_never_all(count, fraction, expected):
    assert draw_split(NAMES[:count], np.zeros(count), fraction, seed=3).sum() == expected


def test_independent_of_order_and_of_other_classes():
    mask = dict(zip(NAMES, draw_split(NAMES, LABELS, 0.3, seed=1), strict=True))
    order = np.random.default_rng(0).permutation(200)
    again = draw_split([NAMES[i] for i in order], LABELS[order], 0.3, seed=1)
    assert {NAMES[i]: out for i, out in zip(order, again, strict=True)} == mask
    some = LABELS == 2
    alone = draw_split([name for name, keep in zip(NAMES, some, strict=True) if keep], LABELS[some], 0.3, seed=1)
    assert alone.tolist() == [mask[name] for name, keep in zip(NAMES, some, strict=True) if keep]


def test_seed_changes_the_split():
    assert (draw_split(NAMES, LABELS, 0.3, seed=0) != draw_split(NAMES, LABELS, 0.3, seed=1)).any()


def test_names_of_any_bytes_can_be_split():
    draw_split(["a\udcff.png", "b\n.png"], np.zeros(2), 0.5, seed=0)


def test_saved_split_is_applied_in_any_order():
    saved = json.loads(json.dumps({"train": ["c", "a"], "val": ["b"]}))
    assert apply_split(["a", "b", "c"], saved, "data").tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ({"train": ["a", "gone"], "val": ["b"]}, "1 are missing, 1 are new .*missing gone, new c.*start a new run"),
        ({"train": ["a", "b"], "val": ["b", "c"]}, "b appears twice"),
        ({"train": ["a", "b", "c"]}, "'val'"),
        ({"train": "abc", "val": []}, "'train'"),
        ([], "'train'"),
    ],
)
def test_a_split_that_does_not_fit_is_refused(split, message):
    with pytest.raises(DataError, match=message):
        apply_split(["a", "b", "c"], split, "data")


def test_a_patient_may_be_in_one_part_only():
    patients = ["p1", "p1", "p2"]
    assert apply_split(["a", "b", "c"], {"train": ["a", "b"], "val": ["c"]}, "data", patients).sum() == 1
    with pytest.raises(DataError, match="images of p1 are both in 'train' and in 'val'"):
        apply_split(["a", "b", "c"], {"train": ["a", "c"], "val": ["b"]}, "data", patients)
