"""Types that the sections of the configuration share."""

from pathlib import Path
from typing import Annotated, Any, TypeVar

from PIL import ImageColor
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field


def _pair(value: Any) -> Any:
    """Expand one integer to a square (height, width)."""
    return (value, value) if isinstance(value, int) and not isinstance(value, bool) else value


def _ascending(bounds: tuple[float, float]) -> tuple[float, float]:
    if bounds[0] > bounds[1]:
        raise ValueError("expected [lowest, highest], the lower number first")
    return bounds


def _colour(name: str) -> str:
    try:
        values = len(ImageColor.getrgb(name))
    except ValueError:
        values = 0
    if values != 3:
        raise ValueError("expected the name of a colour, such as white, or red, green and blue as #102030")
    return name


Number = TypeVar("Number")
Range = Annotated[tuple[Number, Number], AfterValidator(_ascending)]
"""Lowest and highest value."""
UserPath = Annotated[Path, AfterValidator(Path.expanduser)]
Colour = Annotated[str, AfterValidator(_colour)]
Width = Annotated[int, Field(gt=0, le=16_384)]
"""Channels or pixels per side, bounded by the memory that a single layer or image needs."""
Depth = Annotated[int, Field(gt=0, le=64)]
LARGEST = 10**12
PositiveInt = Annotated[int, Field(gt=0, le=LARGEST)]
NonNegativeInt = Annotated[int, Field(ge=0, le=LARGEST)]
"""Counts that no run exceeds, and floats still hold exactly."""
BatchSize = Annotated[int, Field(gt=0, le=1_048_576)]
Timesteps = Annotated[int, Field(gt=0, le=1_000_000)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Levels = Annotated[tuple[Width, ...], Field(min_length=1, max_length=16)]
Size = Annotated[tuple[Width, Width], BeforeValidator(_pair)]


class Section(BaseModel):
    """Base of every section: unknown keys are errors, values are frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)
