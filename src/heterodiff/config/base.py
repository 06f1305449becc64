"""What all sections of the configuration are made of."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field


def _pair(value: Any) -> Any:
    """Read one integer as a square (height, width)."""
    return (value, value) if isinstance(value, int) and not isinstance(value, bool) else value


UserPath = Annotated[Path, AfterValidator(Path.expanduser)]
Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Levels = Annotated[tuple[Positive, ...], Field(min_length=1)]
Size = Annotated[tuple[Positive, Positive], BeforeValidator(_pair)]


class Section(BaseModel):
    """Base of every section: unknown keys are errors, values do not change after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)
