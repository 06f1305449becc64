"""Plans of folders of latents, and the differences between two of them."""

import hashlib
import json
from pathlib import Path

import numpy as np
import torch

from heterodiff.codecs.scaling import LatentCodec
from heterodiff.config import DataConfig
from heterodiff.data.assemble import LoadedData
from heterodiff.errors import DataError
from heterodiff.latents.format import FORMAT, Part, Plan

SHARD_SIZE = 1024
SAMPLED_IMAGES = 256


def plan_of(
    data: LoadedData, data_config: DataConfig, codec: LatentCodec, vae_path: Path, shard_size: int = SHARD_SIZE
) -> Plan:
    """Return the plan of a folder of latents of ``data``.

    Raises:
        ConfigError: images that the VAE cannot take.
        DataError: the data are latents already.
    """
    if data.latents is not None:
        raise DataError(f"{data.latents.folder}: latents already; set data.source and data.path to images to encode")
    spec = data.spec
    config = data_config.model_dump(mode="json")
    if data_config.path is not None:
        config["path"] = str(data_config.path.expanduser().absolute())
    return Plan(
        format=FORMAT,
        vae_fingerprint=codec.fingerprint(),
        source_fingerprint=source_fingerprint(data),
        transform_fingerprint=transform_fingerprint(data, data_config),
        vae_path=str(vae_path.expanduser().absolute()),
        shape=codec.latent_shape(spec.channels, spec.height, spec.width),
        spec=spec.to_dict(),
        data_config=config,
        train=Part(names=tuple(data.train.names), labels=tuple(data.train.labels.tolist())),
        val=Part(names=tuple(data.val.names), labels=tuple(data.val.labels.tolist())),
        shard_size=shard_size,
    )


def source_fingerprint(data: LoadedData) -> str:
    """Hash of the class names, all names and labels, and the values of up to 256 evenly spaced images.

    Images count in the order of their names, whatever their split. Values are hashed as they are encoded, in [0, 1]
    at their final size; a change to an image that is not among the 256 goes unseen.
    """
    labels = [*data.train.labels.tolist(), *data.val.labels.tolist()]
    order = sorted(zip([*data.train.names, *data.val.names], labels, range(len(labels)), strict=True))
    digest = hashlib.sha256(json.dumps([data.spec.class_names, [item[:2] for item in order]]).encode())
    for k in np.unique(np.linspace(0, len(order) - 1, min(SAMPLED_IMAGES, len(order)), dtype=np.int64)):
        position = order[k][2]
        digest.update(images_at(data, range(position, position + 1)).numpy().tobytes())
    return digest.hexdigest()[:16]


def transform_fingerprint(data: LoadedData, data_config: DataConfig) -> str:
    """Hash of the settings that change an image's values or shape: size, channels, value range, way of resizing."""
    spec = data.spec
    resize = None if data_config.image_size is None else data_config.resize
    settings = [spec.height, spec.width, spec.channels, [float(value) for value in spec.value_range], resize]
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]


def images_at(data: LoadedData, positions: range) -> torch.Tensor:
    """Images (B, C, H, W) in [0, 1], training images first."""
    count = len(data.train)
    train = [position for position in positions if position < count]
    val = [position - count for position in positions if position >= count]
    parts = [part.batch(rows)[0] for part, rows in ((data.train, train), (data.val, val)) if rows]
    return torch.cat(parts)


def differences(saved: Plan, plan: Plan) -> list[str]:
    """Return the differences between the latents of ``saved`` and ``plan``, in words; paths may differ."""
    found = []
    if saved.vae_fingerprint != plan.vae_fingerprint:
        found.append(f"VAE: fingerprint {saved.vae_fingerprint}, now {plan.vae_fingerprint}")
    if saved.transform_fingerprint != plan.transform_fingerprint:  # then sampled values differ for that reason
        old, new = saved.transform_fingerprint, plan.transform_fingerprint
        found.append(f"transform (size, channels, value range, resizing): fingerprint {old}, now {new}")
    elif saved.source_fingerprint != plan.source_fingerprint:
        old, new = saved.source_fingerprint, plan.source_fingerprint
        found.append(f"source (images, names, labels): fingerprint {old}, now {new}")
    elif (saved.train, saved.val) != (plan.train, plan.val):
        found.append("split into training and held-out images (data.val_fraction, data.split_seed)")
    if saved.shard_size != plan.shard_size:
        found.append(f"shard size {saved.shard_size}, now {plan.shard_size}")
    if not found and (saved.spec, saved.shape) != (plan.spec, plan.shape):
        found.append(f"image specification {saved.spec}, now {plan.spec}")
    return found
