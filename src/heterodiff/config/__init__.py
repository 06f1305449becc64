"""Typed configuration of a run: sections, keys, defaults and bounds."""

from heterodiff.config.base import Section
from heterodiff.config.data import (
    BrainPhantomConfig,
    DataConfig,
    MicrodopplerConfig,
    ShapesConfig,
    VolumesConfig,
)
from heterodiff.config.networks import AlignmentConfig, CodecConfig, ModelConfig, TextConfig, VAEConfig
from heterodiff.config.run import RunConfig
from heterodiff.config.sampling import SamplingConfig, SegmentationConfig
from heterodiff.config.training import DiffusionConfig, TrainingConfig

__all__ = [
    "AlignmentConfig",
    "BrainPhantomConfig",
    "CodecConfig",
    "DataConfig",
    "DiffusionConfig",
    "MicrodopplerConfig",
    "ModelConfig",
    "RunConfig",
    "SamplingConfig",
    "Section",
    "SegmentationConfig",
    "ShapesConfig",
    "TextConfig",
    "TrainingConfig",
    "VAEConfig",
    "VolumesConfig",
]
