"""Lengths of time as users read them."""

import pytest

from heterodiff.progress import duration


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (0.0351, "0.035 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (200, "3 min 20 s"),
        (854, "14 min"),
        (8111, "2 h 15 min"),
        (3599.6, "1 h 00 min"),
        (86_399, "23 h 59 min"),
        (3 * 86_400 + 4 * 3600 + 5, "3 d 4 h"),
    ],
)
def test_a_length_of_time_is_two_units_at_most(seconds: float, text: str) -> None:
    assert duration(seconds) == text
