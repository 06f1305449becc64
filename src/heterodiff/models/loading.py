"""Strict loading of networks: the right class, all weights there, none of them NaN."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.nn.parameter import is_lazy

from heterodiff.errors import CheckpointError, reason
from heterodiff.files import COPY_AGAIN, read_json, refuse_changed, refuse_header

LEAST_BYTES, SPARE_WEIGHTS = 2, 2**20
"""Bytes that a stored weight has at least, and how many may be missing in a file, which another error names."""


def read_network_config(kinds: Any, folder: Path, way_out: str = COPY_AGAIN) -> dict[str, Any]:
    """Read the configuration of a network saved in ``folder``; arguments as of :func:`load_network`.

    Raises:
        CheckpointError: no such folder, not readable, or a network of another class.
    """
    config = read_json(folder / "config.json", way_out=way_out)
    names = _by_name(kinds)
    if (found := config.get("_class_name")) not in names:
        raise CheckpointError(
            f"{folder}: expected a network of class {' or '.join(names)}, found {found!s:.60}; {way_out}"
        )
    return config


def load_network(kinds: Any, folder: Path, way_out: str = COPY_AGAIN) -> Any:
    """Load a network that ``ModelMixin.save_pretrained`` wrote, in evaluation mode.

    Args:
        kinds: class of the network, or a tuple of those allowed.
        way_out: advice at the end of an error's message.

    Raises:
        CheckpointError: no such folder, a network of another class, or damaged, incomplete or NaN weights.
    """
    cls = _by_name(kinds)[read_network_config(kinds, folder, way_out)["_class_name"]]
    refuse_changed(folder)
    weights = folder / SAFETENSORS_WEIGHTS_NAME
    refuse_header(weights, way_out)
    try:
        with _at_most(weights.stat().st_size // LEAST_BYTES + SPARE_WEIGHTS):
            network, info = cls.from_pretrained(
                folder,
                use_safetensors=True,
                local_files_only=True,
                low_cpu_mem_usage=False,  # transformers then draws as it always did before a run's next weights
                output_loading_info=True,
            )
    except (OSError, SafetensorError, RuntimeError, ValueError, TypeError) as error:
        raise CheckpointError(f"{folder}: damaged network ({reason(error)}); {way_out}") from None
    # diffusers fills missing weights with fresh ones, and only warns.
    if wrong := [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]:
        names = ", ".join(map(str, wrong[:4]))
        raise CheckpointError(
            f"{weights}: weights of another network ({names}, ...) than its config.json says; {way_out}"
        )
    refuse_nonfinite(network.state_dict(), weights, way_out)
    return network.eval()


def refuse_nonfinite(weights: Mapping[str, Tensor], where: object, way_out: str = COPY_AGAIN) -> None:
    """Check that no weight is NaN or infinite; ``where`` they come from begins the message.

    Raises:
        CheckpointError: some are.
    """
    if bad := [name for name, value in weights.items() if not bool(torch.isfinite(value).all())]:
        more = f" and {len(bad) - 4} more" if len(bad) > 4 else ""
        raise CheckpointError(f"{where}: NaN or infinite weights ({', '.join(bad[:4])}{more}); {way_out}")


@contextmanager
def _at_most(weights: int) -> Iterator[None]:
    """Let networks be made of at most ``weights`` weights: a configuration can declare any size."""
    count = 0

    def add(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal count
        count += 0 if parameter is None or is_lazy(parameter) else parameter.numel()
        if count > weights:
            raise ValueError("its config.json describes a larger network than the weights beside it")

    handle = register_module_parameter_registration_hook(add)
    try:
        yield
    finally:
        handle.remove()


def _by_name(kinds: Any) -> dict[str, Any]:
    return {kind.__name__: kind for kind in (kinds if isinstance(kinds, tuple) else (kinds,))}
