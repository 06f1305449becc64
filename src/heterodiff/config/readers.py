"""Table of which runs read a key, so that a key that a run does not read is refused, not ignored."""

import json
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from heterodiff.config.base import Section
from heterodiff.models.variants import VARIANTS
from heterodiff.tasks import task_of

if TYPE_CHECKING:
    from heterodiff.config.run import RunConfig

DENOISERS = "by recipes diffusion and text-image, which train a denoiser"
BOTTLENECKS = tuple(name for name, variant in VARIANTS.items() if variant.hybrid and variant.hybrid.bottleneck_mlp)
HYBRIDS = tuple(name for name, variant in VARIANTS.items() if variant.hybrid and not variant.hybrid.by_scale)


@dataclass(frozen=True)
class Reader:
    """A row of the table.

    Attributes:
        keys: sections or keys, separated by spaces.
        where: they are read, in words that continue "is read only".
        decided_by: keys that decide it; their values are shown beside ``where``.
        reads: whether a run reads them.
        always: refuse them in the saved configuration of a run as well.
    """

    keys: str
    where: str
    decided_by: str
    reads: Callable[["RunConfig"], bool]
    always: bool = False

    def covers(self, key: str) -> bool:
        """Return whether ``key`` is one of the keys, or in one of the sections."""
        return any(key == own or key.startswith(f"{own}.") for own in self.keys.split())


def _shown(value: Any) -> str:
    """A value as in YAML, not too long."""
    if isinstance(value, Section):
        return "{...}"
    text = json.dumps(value, default=str, ensure_ascii=False)
    return f"{text.strip(chr(34)):.100}"


def _with(keys: str, decided_by: str, *values: Any, note: str = "") -> Reader:
    """The row of keys that are read where ``decided_by`` has one of ``values``."""
    names = ", ".join(map(_shown, values))
    return Reader(
        keys,
        f"with {decided_by}={' or '.join(names.rsplit(', ', 1))}{note}",
        decided_by,
        lambda run: attrgetter(decided_by)(run) in values,
    )


def _without(keys: str, decided_by: str, note: str) -> Reader:
    """The row of keys that are read where ``decided_by`` is not set."""
    return Reader(keys, f"without {decided_by}{note}", decided_by, lambda run: attrgetter(decided_by)(run) is None)


def _in_task(section: str) -> Callable[["RunConfig"], bool]:
    return lambda run: section in task_of(run).sections


_with_texts = _in_task("text")


def _on_pixels(run: "RunConfig") -> bool:
    return run.codec.kind == "pixels"


def _on_codec(run: "RunConfig") -> bool:
    """On the latents of a finished codec, which ``alignment.joint`` has none of."""
    return not _on_pixels(run) and not run.alignment.joint


def _trains_vae(run: "RunConfig") -> bool:
    return _in_task("vae")(run) or (run.codec.kind == "kl-vae" and run.codec.training is not None)


def _sees_images(run: "RunConfig") -> bool:
    """Training reads images at every step, not stored latents."""
    return not _on_codec(run) or not (run.caches_latents or run.data.source == "latents")


def _conditional(run: "RunConfig") -> bool:
    unlabelled = run.data.labels == "none" or run.data.source in ("captions", "shapes")
    return _with_texts(run) or not unlabelled or bool(run.data.condition or run.data.conditions)


# Rows of a source are those of its stored latents too, which compare these keys with those of their images.
READERS = (
    Reader(
        "recipe output training data.source data.image_size data.channels data.labels data.value_range data.resize "
        "data.val_fraction data.test_fraction data.split_seed data.train_classes data.on_bad data.memory_limit_gb "
        "data.keep_on_device",
        "by every run",
        "recipe",
        lambda run: True,
    ),
    _with(
        "data.background",
        "data.source",
        "images",
        "captions",
        "webdataset",
        "hf-dataset",
        "latents",
        note=" (pictures, which may be transparent)",
    ),
    _with("data.path", "data.source", "images", "captions", "webdataset", "hf-dataset", "volumes", "latents"),
    Reader(
        "data.captions_file data.file_column data.text_column",
        "by data.source captions, webdataset or hf-dataset and by recipes text-image and alignment",
        "data.source recipe",
        lambda run: (
            run.data.source in ("captions", "webdataset", "hf-dataset", "latents") or _with_texts(run)
        ),  # evaluate --data reads captions
    ),
    _with(
        "data.test_patients data.split_by", "data.source", "volumes", "brain-phantom", "latents", note=" (of patients)"
    ),
    _with("data.microdoppler", "data.source", "microdoppler", "latents"),
    _with("data.shapes", "data.source", "shapes", "latents"),
    _with("data.brain_phantom", "data.source", "brain-phantom", "latents"),
    # evaluate --data takes volumes of patients for the phantom as well
    _with("data.volumes", "data.source", "volumes", "brain-phantom", "latents"),
    Reader(
        "data.horizontal_flip data.random_crop",
        "where training sees images, not stored latents: on pixels, or with codec.cache=false, which encodes every "
        "batch and is slower",
        "codec.kind codec.cache",
        _sees_images,
        always=True,
    ),
    Reader(
        "data.condition data.conditions",
        "by recipe diffusion, of images and not of stored latents",
        "recipe data.source",
        lambda run: "sample" in task_of(run).commands and run.data.source != "latents",
    ),
    Reader(
        "model diffusion",
        "by recipes diffusion and text-image, which train a denoiser, and classifier",
        "recipe",
        _in_task("model"),
    ),
    Reader(
        "sampling diffusion.learn_variance diffusion.weighting diffusion.timestep_sampler diffusion.p_uncond",
        DENOISERS,
        "recipe",
        _in_task("sampling"),
    ),
    Reader(
        "training.fsdp",
        "by a denoiser that is trained on its own: recipe diffusion, and text-image without alignment.joint",
        "recipe alignment.joint",
        lambda run: _in_task("sampling")(run) and not run.alignment.joint,
    ),
    _with("model.init_from", "recipe", "diffusion"),
    Reader(
        "model.train model.prior_preservation",
        "with model.init_from, of whose weights a part is trained, or whose images are kept",
        "model.init_from",
        lambda run: run.model.init_from is not None,
    ),
    Reader(
        "model.prior_preservation",
        "without data.condition and data.conditions, which the images of the base lack",
        "data.condition data.conditions",
        lambda run: not (run.data.condition or run.data.conditions),
    ),
    _with("model.lora_rank", "model.train", "lora"),
    Reader(
        "model.prior_images",
        "with model.prior_preservation above 0",
        "model.prior_preservation",
        lambda run: run.model.prior_preservation > 0,
    ),
    Reader("codec", DENOISERS, "recipe", _in_task("codec"), always=True),
    Reader(
        "codec.path codec.training",
        "with codec.kind=kl-vae and by recipe text-image",
        "codec.kind",
        lambda run: not _on_pixels(run),
        always=True,
    ),
    Reader(
        "codec.cache",
        "with codec.kind=kl-vae and by recipe text-image, for images that are encoded before the denoiser is trained, "
        "without data.condition",
        "codec.kind data.source data.condition alignment.joint",
        lambda run: _on_codec(run) and run.data.source != "latents" and run.data.condition is None,
    ),
    Reader(
        "codec.statistics",
        "with codec.kind=kl-vae and by recipe text-image, where the codec is trained before the denoiser",
        "codec.kind alignment.joint",
        _on_codec,
    ),
    _with("codec.posterior", "codec.kind", "kl-vae"),
    Reader(
        "vae",
        "where a VAE is trained: by recipe vae, or with codec.kind=kl-vae and codec.training",
        "recipe codec.kind codec.training",
        _trains_vae,
    ),
    _without(
        "vae.latent_channels vae.block_out_channels vae.layers_per_block vae.mid_block_attention",
        "vae.init_from",
        ", whose architecture the VAE has",
    ),
    Reader(
        "vae.adversarial_start",
        "with vae.adversarial_weight above 0",
        "vae.adversarial_weight",
        lambda run: run.vae.adversarial_weight > 0,
    ),
    Reader("text alignment", "by recipes text-image and alignment", "recipe", _with_texts),
    Reader(
        "text.frozen",
        "with text.encoder, whose weights it freezes",
        "text.encoder",
        lambda run: run.text.encoder is not None,
    ),
    _without("text.vocabulary_size text.width text.layers", "text.encoder", ", which brings its own"),
    _with("alignment.diffusion_weight", "alignment.joint", True),
    _with(
        "model.patch_size model.attention_resolutions model.mid_attention model.condition_tokens "
        "model.num_head_channels model.use_scale_shift_norm model.resblock_updown model.memory_optimization "
        "model.activation model.class_embedding model.conv_resample model.num_heads_upsample",
        "model.variant",
        *VARIANTS,
    ),
    _with("model.bottleneck_ratio", "model.variant", *BOTTLENECKS, note=" (bottlenecks in hybrid blocks)"),
    _with("model.attention_pattern model.sparsity", "model.variant", *HYBRIDS, note=" (hybrid blocks)"),
    _without(
        "model.num_heads model.num_heads_upsample",
        "model.num_head_channels",
        ", which sets the width of a head instead of the number of heads",
    ),
    _with("diffusion.schedule", "diffusion.prediction", "epsilon", "v", "sample"),
    _with("diffusion.snr_gamma", "diffusion.weighting", "min-snr"),
    Reader(
        "diffusion.noise",
        "where pixels are denoised, as simplex noise is made of shapes in images",
        "recipe codec.kind",
        lambda run: _in_task("diffusion")(run) and _on_pixels(run),
        always=True,
    ),
    Reader(
        "diffusion.p_uncond sampling.guidance_scale sampling.guidance_interval",
        "by runs with a condition: classes, or the texts of recipe text-image",
        "recipe data.source data.labels",
        _conditional,
    ),
    Reader(
        "sampling.dynamic_threshold", "on pixels, as latents have no fixed range", "codec.kind", _on_pixels, always=True
    ),
    Reader(
        "sampling.candidates", "by recipe text-image, whose captioner ranks them", "recipe", _with_texts, always=True
    ),
    Reader(
        "segmentation",
        "by recipe diffusion on pixels, which can find anomalies",
        "recipe codec.kind",
        lambda run: "segment" in task_of(run).commands and _on_pixels(run),
    ),
    _with("segmentation.classifier segmentation.classifier_scale", "segmentation.method", "classifier-guidance"),
    _with("segmentation.patience", "segmentation.method", "forward-process"),
    _with("segmentation.guidance_scale", "segmentation.method", "forward-process", "ddib", note=" (guided by classes)"),
    Reader(
        "segmentation.seed",
        "with segmentation.method=label-difference or partial-noising (draw noise), or segmentation.network_steps > 0",
        "segmentation.method segmentation.network_steps",
        lambda run: (
            bool(run.segmentation.network_steps) or run.segmentation.method in ("label-difference", "partial-noising")
        ),
    ),
    _with(
        "segmentation.score segmentation.threshold",
        "segmentation.method",
        "forward-process",
        "ddib",
        "partial-noising",
        "classifier-guidance",
        note=" (the maps of label-difference are probabilities)",
    ),
)
"""Every key is in at least one row, and is read where all its rows apply; general rows come first."""


@dataclass(frozen=True)
class UnreadKey:
    """A key that a run does not read, its value, whether that is the default, and the reader that the run lacks."""

    key: str
    value: Any
    is_default: bool
    reader: Reader


def leaves(section: Section, prefix: str = "") -> Iterator[tuple[str, Any, bool]]:
    """Yield dotted key, value, and whether that is the default; an optional section is one key."""
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(field.default, Section):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value, value == field.default


def unread_keys(run: "RunConfig") -> list[UnreadKey]:
    """All keys that ``run`` does not read, in their order."""
    missing = [reader for reader in READERS if not reader.reads(run)]
    found = []
    for leaf in leaves(run):
        reader = next((reader for reader in missing if reader.covers(leaf[0])), None)
        if reader is not None:
            found.append(UnreadKey(*leaf, reader))
    return found


def unread_problems(run: "RunConfig", tolerated: Container[str] | None = ()) -> list[str]:
    """A line for each reader that ``run`` lacks though keys for it differ from their defaults.

    Args:
        tolerated: keys that are no problem, None for all; those of a reader with ``always`` are one nevertheless.
    """
    of_reader: dict[Reader, list[UnreadKey]] = {}
    for unread in unread_keys(run):
        is_tolerated = not unread.reader.always and (tolerated is None or unread.key in tolerated)
        if not unread.is_default and not is_tolerated:
            of_reader.setdefault(unread.reader, []).append(unread)
    lines = []
    for reader, some in of_reader.items():
        given = ", ".join(f"{one.key}={_shown(one.value)}" for one in some)
        found = ", ".join(f"{key}={_shown(attrgetter(key)(run))}" for key in reader.decided_by.split())
        verb, them = ("is", "it") if len(some) == 1 else ("are", "them")
        lines.append(f"{given} {verb} read only {reader.where}, not with {found}; leave {them} out, or change that")
    return lines
