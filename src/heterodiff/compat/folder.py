"""Writing a network and its scheduler as a diffusers pipeline folder, all of it or nothing."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
from diffusers import DDPMScheduler
from safetensors import SafetensorError

from heterodiff.errors import CheckpointError
from heterodiff.files import write_json
from heterodiff.models.unet import HAEUNet
from heterodiff.run_folder import RunFolder


def check_target(out: Path) -> None:
    """Check that ``out`` is free to be written.

    Raises:
        CheckpointError: it is a file, or a folder that holds something.
    """
    if out.is_dir() and not any(out.iterdir()):
        return
    if out.exists() or out.is_symlink():
        raise CheckpointError(f"{out}: exists and is not empty; choose another folder, or delete this one")


def write_folder(out: Path, model: HAEUNet, scheduler: Mapping[str, Any]) -> None:
    """Write ``model`` and a DDPM scheduler to ``out``; nothing half-written stays behind.

    Raises:
        CheckpointError: ``out`` is taken, or cannot be written.
    """
    temporary = out.parent / f".{out.name}.{os.getpid()}.part"
    try:
        temporary.mkdir(parents=True)
        model.save_pretrained(temporary / "unet", safe_serialization=True)
        DDPMScheduler(**scheduler).save_pretrained(temporary / "scheduler")
        index = {
            "_class_name": "GenerationPipeline",
            "_diffusers_version": diffusers.__version__,
            "scheduler": ["diffusers", "DDPMScheduler"],
            "unet": ["heterodiff", "HAEUNet"],
        }
        write_json(RunFolder(temporary).index_file, index, indent=2)
        check_target(out)
        if out.is_dir():
            out.rmdir()
        temporary.rename(out)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{out}: cannot be written: {error}; free space or choose another folder") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
