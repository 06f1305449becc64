"""The captions of a data set as token ids, several an image."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from heterodiff.text.tokenizer import Tokens, encode_texts


class CaptionTable:
    """All captions of a data set, tokenised once.

    Args:
        tokenizer: of the run.
        captions: of each image; label i of an image points at ``captions[i]``.
        max_tokens: longer captions are cut.

    Attributes:
        texts: the captions one after another, those of each image together; a row of the table each.
        wording: (rows,) a number for each different caption.
        warnings: what was cut, and what the tokenizer does not know.
    """

    def __init__(self, tokenizer: object, captions: Sequence[tuple[str, ...]], max_tokens: int):
        self.captions = captions
        self._first = torch.from_numpy(np.cumsum([0, *map(len, captions)], dtype=np.int64))
        self.texts = [text for texts in captions for text in texts]
        number: dict[str, int] = {}
        self.wording = torch.tensor([number.setdefault(text, len(number)) for text in self.texts])
        tokens, self.warnings = encode_texts(tokenizer, self.texts, max_tokens)
        self._ids, self._lengths = tokens.ids.int(), tokens.mask.sum(dim=1)
        self._padding = int(tokenizer.pad_token_id)  # type: ignore[attr-defined]

    def __len__(self) -> int:
        return len(self._ids)

    def rows(self, labels: Tensor, choice: Tensor | None = None) -> Tensor:
        """Captions of each image as rows of the table, shaped like ``choice``.

        Args:
            labels: (B,) of the images.
            choice: (B,) or (B, K) in [0, 1): where among the image's captions; None for the first: (B,).
        """
        labels = labels.cpu()
        first, count = self._first[labels], self._first[labels + 1] - self._first[labels]
        if choice is None:
            return first
        choice = choice.cpu().double()
        first, count = (x.view(-1, *(1,) * (choice.ndim - 1)) for x in (first, count))
        return first + torch.minimum((choice * count).long(), count - 1)

    def tokens(self, rows: Tensor, device: torch.device | str = "cpu") -> Tokens:
        """Ids and mask (B, L) of ``rows`` (B,), L the longest among them."""
        length = int(self._lengths[rows].max())
        ids = self._ids[rows, :length].long()
        mask = torch.arange(length) < self._lengths[rows, None]
        return Tokens(ids.to(device), mask.to(device))
