"""The size, value range and classes of a run's images."""

from dataclasses import asdict, dataclass
from typing import Any

from heterodiff.errors import DataError


@dataclass(frozen=True)
class ConditionSpec:
    """The image that is given beside each image of a run.

    Attributes:
        kind: key of :class:`heterodiff.config.data.ConditionConfig`, or ``images`` for those in files.
        channels: of the condition image.
        factor: height and width of the image relative to the condition image.
        given: channels of the stored images that the condition consists of.
        stored: whether its channels are stored behind those of the image; else it is made of the image.
    """

    kind: str
    channels: int
    factor: int = 1
    given: tuple[int, ...] = ()
    stored: bool = False

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "ConditionSpec":
        """Read what ``dataclasses.asdict`` wrote."""
        return cls(
            str(content["kind"]),
            int(content["channels"]),
            int(content["factor"]),
            tuple(int(channel) for channel in content["given"]),
            bool(content["stored"]),
        )


@dataclass(frozen=True)
class AttributeSpec:
    """A column of metadata that is a condition: one of ``classes``, or a number.

    Attributes:
        classes: () for a number.
        mean, std: of the numbers of the training images; networks see (value - mean) / std.
        low, high: least and greatest of them.
    """

    name: str
    classes: tuple[str, ...] = ()
    mean: float = 0.0
    std: float = 1.0
    low: float = 0.0
    high: float = 0.0

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "AttributeSpec":
        """Read what ``dataclasses.asdict`` wrote."""
        numbers = {key: float(content[key]) for key in ("mean", "std", "low", "high")}
        return cls(str(content["name"]), tuple(str(name) for name in content["classes"]), **numbers)


@dataclass(frozen=True)
class ImageSpec:
    """Shape, classes and values of a run's images.

    Attributes:
        height, width, channels: shape of every image after resizing.
        class_names: by label; () when unlabelled.
        value_range: stored values mapped to 0 and to 1.
        dtype: type of the stored values: bool, uint8, uint16, or float32 for all other number types.
        condition: the image that is given beside each; None for none.
        attributes: further conditions, from columns of metadata.
    """

    height: int
    width: int
    channels: int
    class_names: tuple[str, ...]
    value_range: tuple[float, float]
    dtype: str
    condition: ConditionSpec | None = None
    attributes: tuple[AttributeSpec, ...] = ()

    @property
    def stored_channels(self) -> int:
        """Channels of a stored image: its own, then those of a stored condition."""
        return self.channels + (self.condition.channels if self.condition and self.condition.stored else 0)

    def condition_channels(self, factor: int = 1) -> int:
        """Channels of the condition for a network whose maps are smaller than the image by ``factor``."""
        return self.condition.channels * factor**2 if self.condition else 0

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-able dictionary that :meth:`from_dict` reads back."""
        content = asdict(self) | {"class_names": list(self.class_names), "value_range": list(self.value_range)}
        if self.condition is None:
            del content["condition"]
        else:
            content["condition"]["given"] = list(self.condition.given)
        content["attributes"] = [{**one, "classes": list(one["classes"])} for one in content["attributes"]]
        if not self.attributes:
            del content["attributes"]
        return content

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
            values["attributes"] = tuple(map(AttributeSpec.from_dict, values.get("attributes", ())))
            if (condition := values.get("condition")) is not None:
                values["condition"] = ConditionSpec.from_dict(condition)
            return cls(**values)
        except (KeyError, TypeError, ValueError) as error:
            expected = ", ".join(cls.__dataclass_fields__)
            raise DataError(f"saved image specification: expected {expected}; found {content!r:.200}") from error
