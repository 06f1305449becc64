"""The files of a run folder that say how its pipeline is used."""

import hashlib
import json
from pathlib import Path
from typing import Any

from heterodiff.data.dataset import ImageSpec
from heterodiff.errors import CheckpointError

DATA_FILE = "data.json"
SPLIT_FILE = "split.json"
CONFIG_FILE = "config.yaml"
INDEX_FILE = "model_index.json"
WEIGHTS_FILE = "weights.json"


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: the file is missing, damaged, or holds something else.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: missing; the folder is incomplete, train or import it again")
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def load_spec(run: Path) -> ImageSpec | None:
    """What the run in folder ``run`` remembers about its images; None for a folder that was not trained here.

    Raises:
        DataError, CheckpointError: the file is damaged.
    """
    path = run / DATA_FILE
    return ImageSpec.from_dict(read_json(path).get("spec", {})) if path.is_file() else None


def weights_digest(run: Path) -> str:
    """Sixteen letters that change with the weights of the denoiser (of all networks where there is none)."""
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted((run / "unet").glob("*.safetensors")) or sorted(run.glob("*/*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
