"""The table of captions: which it gives for which draw, and how long its batches are."""

import pytest
import torch

from heterodiff.text.caption_table import CaptionTable
from heterodiff.text.tokenizer import train_tokenizer

CAPTIONS = (("a red circle",), ("a cross", "one cross"), ("up", "a blue square below it", "a square", "blue"))


def table(**options: bool) -> CaptionTable:
    return CaptionTable(train_tokenizer([text for texts in CAPTIONS for text in texts], 200), CAPTIONS, 20, **options)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_captions_of_an_image_are_all_drawn_and_differ_where_there_are_as_many(count: int) -> None:
    captions = table()
    labels = torch.arange(3).repeat_interleave(400)
    rows = captions.rows(labels, torch.rand(1200, generator=torch.Generator().manual_seed(0)), count)
    assert rows.shape == (1200, count)
    for label, texts in enumerate(CAPTIONS):
        chosen = [[captions.texts[row] for row in of_one] for of_one in rows[labels == label].tolist()]
        assert all(len(set(some)) == min(count, len(texts)) for some in chosen)
        for k in range(count):
            share = [sum(some[k] == text for some in chosen) / len(chosen) for text in texts]
            assert min(share) > 0.6 / len(texts)


def test_the_last_caption_is_reached_and_none_beyond() -> None:
    captions, labels = table(), torch.tensor([0, 1, 2])
    largest = torch.tensor(1.0).nextafter(torch.tensor(0.0)).expand(3)
    for choice, expected in ((torch.zeros(3), [0, 0, 0]), (largest, [0, 1, 3]), (None, [0, 0, 0])):
        texts = [captions.texts[row] for row in captions.rows(labels, choice).tolist()]
        assert texts == [CAPTIONS[label][which] for label, which in enumerate(expected)]
        assert torch.equal(captions.rows(labels, choice, 1)[:, 0], captions.rows(labels, choice))


def test_batches_are_as_long_as_their_longest_caption_or_the_longest_of_all() -> None:
    rows = torch.tensor([0, 1])
    plain, fixed = table().tokens(rows), table(one_length=True).tokens(rows)
    assert plain.ids.shape == (2, 5) and fixed.ids.shape == (2, 7)  # noqa: PT018
    assert torch.equal(fixed.ids[:, :5], plain.ids)
    assert torch.equal(fixed.mask[:, :5], plain.mask)
    assert not fixed.mask[:, 5:].any()
