"""Captions in free words against those that people wrote."""

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from heterodiff.metrics.intervals import proportion


def _words(text: str) -> list[str]:
    """The words of a text, without punctuation and case."""
    return re.findall(r"\w+", text.casefold())


def unigram_f1(caption: str, references: Sequence[str]) -> float:
    """Harmonic mean of unigram precision and recall against the best of ``references``."""
    found = Counter(_words(caption))
    scores = [0.0]
    for reference in references:
        right = Counter(_words(reference))
        if words := found.total() + right.total():
            scores.append(2 * (found & right).total() / words)
    return max(scores)


def caption_likeness(captions: Sequence[str], references: Sequence[Sequence[str]], seed: int) -> dict[str, Any]:
    """Compare captions with those that people wrote.

    Args:
        references: all captions of each image.

    Returns:
        ``exact``: proportion of captions that have the words of one of the image's captions, in its order;
        ``unigram_f1``: mean over the images of the best :func:`unigram_f1`.
    """
    pairs = list(zip(captions, references, strict=True))
    exact = [any(_words(caption) == _words(text) for text in texts) for caption, texts in pairs]
    return {
        "exact": proportion(exact, seed),
        "unigram_f1": float(np.mean([unigram_f1(caption, texts) for caption, texts in pairs])),
    }
