"""The size, value range and classes of a run's images."""

from dataclasses import asdict, dataclass
from typing import Any

from heterodiff.errors import DataError


@dataclass(frozen=True)
class ImageSpec:
    """Shape, classes and values of a run's images.

    Attributes:
        height, width, channels: shape of every image after resizing.
        class_names: by label; () when unlabelled.
        value_range: stored values mapped to 0 and to 1.
        dtype: type of the stored values: bool, uint8, uint16, or float32 for all other number types.
    """

    height: int
    width: int
    channels: int
    class_names: tuple[str, ...]
    value_range: tuple[float, float]
    dtype: str

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-able dictionary that :meth:`from_dict` reads back."""
        return asdict(self) | {"class_names": list(self.class_names), "value_range": list(self.value_range)}

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "ImageSpec":
        """Read what :meth:`to_dict` wrote.

        Raises:
            DataError: keys are missing or unknown, or values have the wrong type.
        """
        try:
            values = dict(content)
            values["class_names"] = tuple(str(name) for name in values["class_names"])
            low, high = (float(value) for value in values["value_range"])
            values["value_range"] = (low, high)
            values |= {key: int(values[key]) for key in ("height", "width", "channels")}
            return cls(**values)
        except (KeyError, TypeError, ValueError) as error:
            expected = ", ".join(cls.__dataclass_fields__)
            raise DataError(f"saved image specification: expected {expected}; found {content!r:.200}") from error
