"""Pretrained networks in a folder or in the local cache of the Hugging Face hub; nothing is downloaded."""

import re
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from heterodiff.errors import CheckpointError, ConfigError, reason

AGAIN = "copy it again, or correct its path"


def find_pretrained(name_or_folder: str | Path) -> Path:
    """Return the folder itself, or the snapshot of a hub name in the local cache.

    Raises:
        CheckpointError: it is neither.
    """
    name, folder = str(name_or_folder), Path(name_or_folder).expanduser()
    if name and folder.is_dir():
        return folder
    if re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name) is None:
        raise CheckpointError(f"'{name}': no such folder, and no name on the Hugging Face hub; correct the path")
    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (OSError, ValueError):
        raise CheckpointError(
            f"{name}: neither a folder nor in the local cache of the Hugging Face hub, and nothing is downloaded here; "
            f"on a machine with internet run `hf download {name}`, then copy its cache (~/.cache/huggingface, or "
            "where HF_HOME points) here, or give the path of a folder"
        ) from None


def make_config(cls: Any, settings: dict[str, Any]) -> Any:
    """Make a configuration of class ``cls`` of transformers, with PyTorch's fused attention.

    Raises:
        ConfigError: invalid settings.
    """
    try:
        config = cls(**settings)
    except Exception as error:  # its validation raises errors of several kinds
        raise ConfigError(f"{cls.__name__}: {reason(error)}") from None
    config._attn_implementation = "sdpa"
    return config
