"""heterodiff: train and use conditional diffusion models with HAE U-Nets on your own images.

Names are imported on first use, so that ``import heterodiff`` itself is quick.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "FiLMUNet": "heterodiff.models.film_unet",
    "HAEUNet": "heterodiff.models.unet",
    "create_model": "heterodiff.models.variants",
    "list_models": "heterodiff.models.variants",
    "GenerationPipeline": "heterodiff.pipelines.generate",
    "TextImagePipeline": "heterodiff.pipelines.text_to_image",
    "load": "heterodiff.pipelines.load",
    "load_config": "heterodiff.config.file",
    "RunConfig": "heterodiff.config",
}

if TYPE_CHECKING:
    from heterodiff.config import RunConfig
    from heterodiff.config.file import load_config
    from heterodiff.models.film_unet import FiLMUNet
    from heterodiff.models.unet import HAEUNet
    from heterodiff.models.variants import create_model, list_models
    from heterodiff.pipelines.generate import GenerationPipeline
    from heterodiff.pipelines.load import load
    from heterodiff.pipelines.text_to_image import TextImagePipeline

__all__ = [
    "FiLMUNet",
    "GenerationPipeline",
    "HAEUNet",
    "RunConfig",
    "TextImagePipeline",
    "create_model",
    "list_models",
    "load",
    "load_config",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'heterodiff' has no attribute '{name}'")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
