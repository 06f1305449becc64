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
        one_length: give all batches the length of the longest caption, as a compiled network wants them.

    Attributes:
        texts: the captions one after another, those of each image together; a row of the table each.
        wording: (rows,) a number for each different caption.
        warnings: what was cut, and what the tokenizer does not know.
    """

    def __init__(
        self, tokenizer: object, captions: Sequence[tuple[str, ...]], max_tokens: int, one_length: bool = False
    ):
        self.captions, self._one_length = captions, one_length
        self._first = torch.from_numpy(np.cumsum([0, *map(len, captions)], dtype=np.int64))
        self.texts = [text for texts in captions for text in texts]
        number: dict[str, int] = {}
        self.wording = torch.tensor([number.setdefault(text, len(number)) for text in self.texts])
        tokens, self.warnings = encode_texts(tokenizer, self.texts, max_tokens)
        self._ids, self._lengths = tokens.ids.int(), tokens.mask.sum(dim=1)
        self._padding = int(tokenizer.pad_token_id)  # type: ignore[attr-defined]

    def __len__(self) -> int:
        return len(self._ids)

    def rows(self, labels: Tensor, choice: Tensor | None = None, count: int | None = None) -> Tensor:
        """Captions of each image as rows of the table: (B,), or with ``count`` K (B, K).

        Of K captions, those after the first follow it in the image's list, so that they differ where it has as many.

        Args:
            labels: (B,) of the images.
            choice: (B,) in [0, 1): where among the image's captions the first is; None for its very first.
        """
        labels = labels.cpu()
        first, among = self._first[labels], self.counts(labels)
        chosen = torch.zeros_like(first) if choice is None else (choice.cpu().double() * among).long()
        if count is None:
            return first + chosen.minimum(among - 1)
        return first[:, None] + (chosen[:, None] + torch.arange(count)) % among[:, None]

    def counts(self, labels: Tensor) -> Tensor:
        """Number of captions of each image (B,)."""
        labels = labels.cpu()
        return self._first[labels + 1] - self._first[labels]

    def tokens(self, rows: Tensor, device: torch.device | str = "cpu") -> Tokens:
        """Ids and mask (B, L) of ``rows`` (B,), L the longest among them or of all."""
        length = int((self._lengths if self._one_length else self._lengths[rows]).max())
        ids = self._ids[rows, :length].long()
        mask = torch.arange(length) < self._lengths[rows, None]
        return Tokens(ids.to(device), mask.to(device))
