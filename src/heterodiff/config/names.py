"""Names that are valid in a configuration, listed apart from the objects so that reading one imports nothing heavy."""

from collections.abc import Callable, Iterable

from pydantic import AfterValidator
from pydantic_core import PydanticCustomError

from heterodiff.errors import unknown_name

SOURCES = (
    *("images", "captions", "webdataset", "hf-dataset", "volumes", "latents"),
    *("digits", "microdoppler", "shapes", "brain-phantom"),
)
SAMPLERS = ("ddpm", "ddim", "dpmpp", "unipc", "euler", "heun", "flow-euler")

UNKNOWN_NAME = "unknown_name"
"""Error type of unknown names, whose message already shows the name."""


def known_name(kind: str, known: Callable[[], Iterable[str]]) -> AfterValidator:
    """A validator that refuses unknown names of a ``kind`` and suggests the nearest known one."""

    def check(name: str) -> str:
        if name not in known():
            raise PydanticCustomError(UNKNOWN_NAME, "{problem}", {"problem": unknown_name(kind, name, known())})
        return name

    return AfterValidator(check)
