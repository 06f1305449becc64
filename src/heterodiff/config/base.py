"""What all sections of the configuration are made of."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field


def _pair(value: Any) -> Any:
    """Read one integer as a square (height, width)."""
    return (value, value) if isinstance(value, int) and not isinstance(value, bool) else value


UserPath = Annotated[Path, AfterValidator(Path.expanduser)]
Positive = Annotated[int, Field(gt=0)]
Width = Annotated[int, Field(gt=0, le=16_384)]
"""Channels, or pixels of a side: above it, no machine has the memory for a single layer or image."""
Depth = Annotated[int, Field(gt=0, le=64)]
BatchSize = Annotated[int, Field(gt=0, le=1_048_576)]
Timesteps = Annotated[int, Field(gt=0, le=1_000_000)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Levels = Annotated[tuple[Width, ...], Field(min_length=1, max_length=16)]
Size = Annotated[tuple[Width, Width], BeforeValidator(_pair)]


class Section(BaseModel):
    """Base of every section: unknown keys are errors, values do not change after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)
