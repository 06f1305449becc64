"""Loading networks from folders, strictly: the right kind, all weights there, none of them NaN."""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError

from heterodiff.errors import CheckpointError, reason

AGAIN = "train the run again, or copy the folder again"


def read_network_config(cls: Any, folder: Path) -> dict[str, Any]:
    """Configuration of a network of class ``cls`` saved in ``folder``, without its weights.

    Raises:
        CheckpointError: no such folder, not readable, or a network of another class.
    """
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text("utf-8"))
        found = config.get("_class_name")
    except FileNotFoundError:
        raise CheckpointError(f"{file}: missing; {AGAIN}") from None
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{file}: not readable as a JSON object ({error}); {AGAIN}") from None
    if found != cls.__name__:
        raise CheckpointError(f"{folder}: expected a network of class {cls.__name__}, found {found}; {AGAIN}")
    return config


def load_network(cls: Any, folder: Path) -> Any:
    """A network of class ``cls`` (diffusers' ModelMixin) from a folder it was saved in, in evaluation mode.

    Raises:
        CheckpointError: no such folder, a network of another class, or damaged, incomplete or NaN weights.
    """
    read_network_config(cls, folder)
    return load_weights(cls, folder)


def load_weights(cls: Any, folder: Path) -> Any:
    """As :func:`load_network`, of a folder whose configuration has been looked at.

    Raises:
        CheckpointError: damaged, incomplete or NaN weights.
    """
    weights = folder / SAFETENSORS_WEIGHTS_NAME
    if not weights.is_file():
        raise CheckpointError(f"{weights}: missing; weights are loaded from safetensors only; {AGAIN}")
    try:
        network, info = cls.from_pretrained(
            folder, use_safetensors=True, local_files_only=True, low_cpu_mem_usage=False, output_loading_info=True
        )
    except (OSError, SafetensorError, RuntimeError, ValueError, TypeError) as error:
        raise CheckpointError(f"{folder}: damaged network ({reason(error)}); {AGAIN}") from None
    wrong = [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]
    if wrong:
        names = ", ".join(map(str, wrong[:4]))
        raise CheckpointError(
            f"{weights}: weights of another network ({names}, ...) than its config.json says; {AGAIN}"
        )
    if bad := [name for name, value in network.state_dict().items() if not bool(torch.isfinite(value).all())]:
        raise CheckpointError(f"{weights}: NaN or infinite weights ({', '.join(bad[:4])}); {AGAIN}")
    return network.eval()
