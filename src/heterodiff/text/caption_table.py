"""Captions of a data set as token ids, several for each image."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from heterodiff.devices import double_dtype, send
from heterodiff.text.tokenizer import Tokens, encode_texts


class Columns(NamedTuple):
    """Caption table on one device."""

    first: Tensor
    """(images + 1,) first row of each image"""
    ids: Tensor
    """(rows, L) token ids, int32"""
    lengths: Tensor
    """(rows,) number of tokens of each caption"""
    wording: Tensor
    """(rows,) equal numbers for equal captions"""


class CaptionTable:
    """All captions of a data set, tokenised once, a row each.

    Args:
        tokenizer: tokenizer of the run.
        captions: captions of each image; label i of an image refers to ``captions[i]``.
        max_tokens: longer captions are cut.
        one_length: pad all batches to the longest caption, for compiled networks.

    Attributes:
        texts: caption of each row, those of an image together.
        wording: (rows,) equal numbers for equal captions.
        warnings: messages about captions that were cut or have unknown words.
    """

    def __init__(
        self, tokenizer: object, captions: Sequence[tuple[str, ...]], max_tokens: int, one_length: bool = False
    ):
        self.captions, self._one_length = captions, one_length
        first = torch.from_numpy(np.cumsum([0, *map(len, captions)], dtype=np.int64))
        self.texts = [text for texts in captions for text in texts]
        number: dict[str, int] = {}
        self.wording = torch.tensor([number.setdefault(text, len(number)) for text in self.texts])
        tokens, self.warnings = encode_texts(tokenizer, self.texts, max_tokens)
        lengths = tokens.mask.sum(dim=1)
        self._columns = {torch.device("cpu"): Columns(first, tokens.ids.int(), lengths, self.wording)}
        self._longest = torch.stack([part.max() for part in lengths.split([len(texts) for texts in captions])])

    def __len__(self) -> int:
        return len(self.texts)

    def on(self, device: torch.device) -> Columns:
        """Columns on ``device``, copied there once."""
        if device not in self._columns:
            self._columns[device] = Columns(*(column.to(device) for column in self.on(torch.device("cpu"))))
        return self._columns[device]

    def rows(self, labels: Tensor, choice: Tensor | None = None, count: int | None = None) -> Tensor:
        """Choose a caption of each image: its row (B,), or K rows (B, K) with ``count`` K.

        K captions are consecutive in the image's list, so that they differ where it has as many.

        Args:
            labels: (B,) labels of the images.
            choice: (B,) in [0, 1), relative position of the (first) caption in the image's list; None: 0.

        Returns:
            Rows on the device of ``choice``, or of ``labels`` without it.
        """
        device = labels.device if choice is None else choice.device
        labels = send(labels, device)
        first, among = self.on(device).first[labels], self.counts(labels)
        chosen = torch.zeros_like(first) if choice is None else (choice.to(double_dtype(device)) * among).long()
        if count is None:
            return first + chosen.minimum(among - 1)
        return first[:, None] + (chosen[:, None] + torch.arange(count, device=device)) % among[:, None]

    def counts(self, labels: Tensor) -> Tensor:
        """Number of captions of each image (B,)."""
        first = self.on(labels.device).first
        return first[labels + 1] - first[labels]

    def tokens(self, rows: Tensor, device: torch.device | None = None, labels: Tensor | None = None) -> Tokens:
        """Ids and mask (B, L) of ``rows`` (B,), where L is the length of the longest of them, or of all.

        Args:
            device: device of the result; default: that of ``rows``.
            labels: labels of their images, on the CPU. For ``rows`` on another device, L is then the longest caption of
                these images, which is known without waiting for that device.
        """
        device = rows.device if device is None else device
        if self._one_length:
            length = int(self._longest.max())
        elif labels is not None and rows.device.type != "cpu":
            length = int(self._longest[labels].max())
        else:
            length = int(self.on(rows.device).lengths[rows].max())
        columns, rows = self.on(device), send(rows, device)
        mask = torch.arange(length, device=device) < columns.lengths[rows, None]
        return Tokens(columns.ids[rows, :length].long(), mask)
