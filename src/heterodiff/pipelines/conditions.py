"""Conditions beyond the class: images, and values of columns of metadata."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from heterodiff.data.attributes import encode_attribute, outside
from heterodiff.data.conditions import condition_image, to_maps
from heterodiff.errors import ConfigError, unknown_name
from heterodiff.models.conditioning import Conditions

if TYPE_CHECKING:
    from heterodiff.pipelines.generate import GenerationPipeline


class ConditionWarning(UserWarning):
    """A condition that is far from those of the training images."""


def conditions_of(
    pipeline: "GenerationPipeline",
    labels: Tensor,
    images: Tensor | None,
    values: Mapping[str, Any] | Tensor | None,
    guide: Sequence[str] | None,
) -> tuple[Conditions, Conditions]:
    """Return the conditions of images with class ``labels`` (B,), and what guidance leads away from.

    Args:
        images, values, guide: ``condition_images``, ``conditions`` and ``guide`` of
            :meth:`heterodiff.pipelines.generate.GenerationPipeline.__call__`.

    Raises:
        ConfigError: conditions that the run was trained without, of another shape or class, or not numbers; other than
            one for each image.
    """
    given = Conditions(
        labels,
        _attributes(pipeline, {} if values is None else values, len(labels)),
        _maps(pipeline, images, len(labels)),
    )
    null = given.none()
    if guide is None:
        return given, null
    names = _names(pipeline)
    if not names:
        raise ConfigError("guide: this model was trained without data.conditions; leave it out")
    if unknown := [name for name in guide if name not in names]:
        raise ConfigError(unknown_name("column to guide by", unknown[0], names))
    assert given.attributes is not None
    chosen = torch.tensor([name in guide for name in names])
    return given, replace(given, attributes=given.attributes.masked_fill(chosen, torch.nan))


def _names(pipeline: "GenerationPipeline") -> list[str]:
    return [attribute.name for attribute in pipeline.spec.attributes] if pipeline.spec else []


def _attributes(pipeline: "GenerationPipeline", values: Mapping[str, Any] | Tensor, count: int) -> Tensor | None:
    names = _names(pipeline)
    if isinstance(values, Tensor):
        if values.shape != (count, len(names)):
            raise ConfigError(f"conditions {tuple(values.shape)}: expected ({count}, {len(names)})")
        return values if names else None
    if unknown := [name for name in values if name not in names]:
        if not names:
            raise ConfigError(f"condition '{unknown[0]}': this model was trained without data.conditions; leave it out")
        raise ConfigError(unknown_name("condition", unknown[0], names))
    if not names:
        return None
    assert pipeline.spec is not None
    columns, notes = [], []
    for attribute in pipeline.spec.attributes:
        value = values.get(attribute.name)
        each = [value] * count if value is None or isinstance(value, str | int | float) else list(value)
        if len(each) != count:
            raise ConfigError(f"{attribute.name}: {len(each)} values for {count} images: expected one, or as many")
        columns.append(torch.tensor([encode_attribute(attribute, one) for one in each], dtype=torch.float32))
        notes += [note for one in dict.fromkeys(map(str, each)) if (note := outside(attribute, _plain(one)))]
    for note in dict.fromkeys(notes):
        warnings.warn(note, ConditionWarning, stacklevel=4)
    return torch.stack(columns, dim=1)


def _plain(text: str) -> str | None:
    return None if text == "None" else text


def _maps(pipeline: "GenerationPipeline", images: Tensor | None, count: int) -> Tensor | None:
    if images is None:
        return None
    condition = pipeline.spec.condition if pipeline.spec else None
    if condition is None:
        raise ConfigError("condition_images: this model was trained without data.condition; leave them out")
    if images.ndim != 4 or images.shape[:2] != (count, condition.channels):
        raise ConfigError(
            f"condition_images {tuple(images.shape)}: expected ({count}, {condition.channels}, H, W), one an image"
        )
    return to_maps(images.to(torch.float32), pipeline.codec.factor)


def pictured(conditions: Tensor, channels: int) -> Tensor:
    """Return condition images (B, C', H, W) as pictures of ``channels``, to show them beside others."""
    if conditions.shape[1] == channels:
        return conditions
    return conditions.mean(dim=1, keepdim=True).expand(-1, channels, -1, -1)


def translate(
    pipeline: "GenerationPipeline",
    images: Tensor,
    class_labels: Any = None,
    num_images: int = 1,
    *,
    ready: bool = True,
    **options: Any,
) -> Tensor:
    """Draw images of condition images; see :meth:`heterodiff.pipelines.generate.GenerationPipeline.translate`."""
    if pipeline.spec is None:
        raise ConfigError("this model does not know its images; use a run that was trained here")
    conditions = condition_image(torch.as_tensor(images, dtype=torch.float32), pipeline.spec, ready)
    labels = class_labels
    if labels is not None and not isinstance(labels, int | str):
        labels = [label for label in labels for _ in range(num_images)]
    each = conditions.repeat_interleave(num_images, dim=0)
    drawn = pipeline(labels, None if isinstance(labels, list) else len(each), condition_images=each, **options).images
    assert isinstance(drawn, Tensor)
    return drawn.unflatten(0, (len(conditions), num_images))
