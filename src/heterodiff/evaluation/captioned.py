"""Images with captions to evaluate a run on, held out or from another folder."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from heterodiff.data.assemble import LoadedData
from heterodiff.data.dataset import ImageDataset
from heterodiff.data.sources import load_data
from heterodiff.errors import DataError
from heterodiff.evaluation.held_out import count_seen
from heterodiff.evaluation.runs import image_config
from heterodiff.metrics.intervals import seed_words

PART = 64


@dataclass(frozen=True)
class CaptionedImages:
    """Some images of a data set, read when they are needed, with all captions of each.

    Attributes:
        dataset: its labels are indices of captions.
        rows: chosen rows of the data set.
        captions: captions of each chosen image.
    """

    dataset: ImageDataset
    rows: tuple[int, ...]
    captions: tuple[tuple[str, ...], ...]

    @classmethod
    def choose(
        cls, dataset: ImageDataset, captions: Sequence[tuple[str, ...]], most: int, seed: int
    ) -> "CaptionedImages":
        """Draw at most ``most`` images of ``dataset`` with ``seed``, in the order of the data set."""
        rows = np.sort(np.random.default_rng(seed_words(seed)).permutation(len(dataset))[:most]).tolist()
        return cls(dataset, tuple(rows), tuple(captions[int(dataset.labels[row])] for row in rows))

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def names(self) -> list[str]:
        """Name of each image in its data set."""
        return [self.dataset.names[row] for row in self.rows]

    def spread(self, count: int) -> "CaptionedImages":
        """Return at most ``count`` of them, evenly spread."""
        chosen = np.linspace(0, len(self) - 1, min(count, len(self))).round().astype(int).tolist()
        rows = tuple(self.rows[k] for k in chosen)
        return CaptionedImages(self.dataset, rows, tuple(self.captions[k] for k in chosen))

    def parts(self) -> Iterator[Tensor]:
        """Yield images (B, C, H, W) in [0, 1], up to 64 at once."""
        for start in range(0, len(self), PART):
            yield self.dataset.batch(self.rows[start : start + PART])[0]

    def images(self) -> Tensor:
        """All images (N, C, H, W) in [0, 1]."""
        return self.dataset.batch(self.rows)[0]


def held_out_captioned(
    run: Path, loaded: LoadedData, path: Path | None
) -> tuple[ImageDataset, Sequence[tuple[str, ...]], dict[str, Any]]:
    """Return images that were not trained on, the captions that their labels index, and a record ready for JSON.

    Raises:
        DataError: no such images, or none with captions.
    """
    config = image_config(run)
    if path is None:
        if len(loaded.val) == 0:
            raise DataError(
                f"{run}: no held-out images; name some with --data, or train with data.val_fraction above 0"
            )
        where = str(config.path or config.source)
        return loaded.val, loaded.captions, _record(where, "validation split", len(loaded.val))
    if not path.expanduser().is_dir():
        raise DataError(f"{path}: no such folder of captioned images; correct --data")
    spec, named = loaded.spec, config.captions_file
    others = config.model_copy(
        update={
            "source": "captions",
            "path": path,
            "captions_file": named if named is not None and (path.expanduser() / named).exists() else None,
            "image_size": (spec.height, spec.width),
            "channels": spec.channels,
            "val_fraction": 0.0,
        }
    )
    found = load_data(others, spec=spec)
    dataset, part = (found.val, "validation images") if len(found.val) else (found.train, "all")
    record = _record(str(path), part, len(dataset))
    record["notes"] += found.warnings
    everything = CaptionedImages(dataset, tuple(range(len(dataset))), found.captions)
    if seen := count_seen((image for part in everything.parts() for image in part), loaded.train):
        record["notes"].append(
            f"{seen:,} of {len(dataset):,} images at {path} are training images too: they are not held out"
        )
    return dataset, found.captions, record


def _record(path: str, part: str, number: int) -> dict[str, Any]:
    return {"path": path, "part": part, "n": number, "notes": []}
