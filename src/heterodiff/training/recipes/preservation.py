"""Prior preservation: images that the base run draws join the loss, so that an adapted network does not forget them.

Ruiz et al. 2023 (DreamBooth), section 3.2. Theirs share the class of the new images; here a drawn image keeps its class
where the new run has one of that name, and teaches what images look like without a class where it has none.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from heterodiff.errors import CheckpointError
from heterodiff.files import write_bytes
from heterodiff.models.conditioning import NO_CLASS
from heterodiff.pipelines.generate import seeded_generators
from heterodiff.pipelines.load import load_generation
from heterodiff.training.processes import HostGroup

FILE = "prior.safetensors"
"""Drawn images in the run folder, from which the run goes on as it began."""
DRAWN_AT_ONCE = 16


@dataclass(frozen=True)
class Preserved:
    """Drawn images as the recipe prepares them, (N, ...), and their labels (N,) in the new run, both on its device."""

    inputs: Tensor
    labels: Tensor


def drawn_images(folder: Path, base: Path, per_class: int, names: Sequence[str], seed: int, hosts: HostGroup) -> Any:
    """Images (N, C, H, W) in [0, 1] and labels (N,) of the run in ``folder``; the first process draws them if needed.

    Args:
        base: run that draws ``per_class`` images of each of its classes, or without a class.
        names: classes of the run; labels of others are -1.
        seed: of the images.

    Raises:
        CheckpointError: the file of images is damaged, or there is none and the base cannot be read.
        RunError: there is neither file nor base.
    """
    file = folder / FILE
    if hosts.rank == 0 and not file.is_file():
        write_bytes(file, safetensors.torch.save(_draw(base, per_class, names, seed)))
    hosts.wait()
    try:
        tensors = safetensors.torch.load_file(file)
        return tensors["images"], tensors["labels"]
    except (OSError, SafetensorError, KeyError) as error:
        raise CheckpointError(f"{file}: damaged ({error}); remove it, and it is drawn again from {base}") from None


def _draw(base: Path, per_class: int, names: Sequence[str], seed: int) -> dict[str, Tensor]:
    pipeline = load_generation(base, dtype="float32")
    known = pipeline.class_names
    asked = [k for k in (range(len(known)) if known else [NO_CLASS]) for _ in range(per_class)]
    generators = seeded_generators(seed, len(asked))
    parts = [slice(k, k + DRAWN_AT_ONCE) for k in range(0, len(asked), DRAWN_AT_ONCE)]
    images = [pipeline(asked[part], generator=generators[part]).images.float().cpu() for part in parts]
    own = {k: names.index(name) for k, name in enumerate(known) if name in names}
    return {"images": torch.cat(images).contiguous(), "labels": torch.tensor([own.get(k, NO_CLASS) for k in asked])}
