"""Names that a configuration may give; listed apart from what they name, so that reading one imports nothing heavy."""

from collections.abc import Callable, Iterable

from pydantic import AfterValidator
from pydantic_core import PydanticCustomError

from heterodiff.errors import unknown_name

SOURCES = ("images", "captions", "volumes", "digits", "microdoppler", "shapes", "brain-phantom", "latents")
SAMPLERS = ("ddpm", "ddim", "dpmpp", "unipc", "euler", "heun", "flow-euler")

UNKNOWN_NAME = "unknown_name"
"""Type of the error for a name that is not known; its message already shows the name."""


def known_name(kind: str, known: Callable[[], Iterable[str]]) -> AfterValidator:
    """A validator that accepts the names of some ``kind`` alone; others are refused with the nearest one."""

    def check(name: str) -> str:
        if name not in known():
            raise PydanticCustomError(UNKNOWN_NAME, "{problem}", {"problem": unknown_name(kind, name, known())})
        return name

    return AfterValidator(check)
