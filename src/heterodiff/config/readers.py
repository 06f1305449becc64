"""Who reads a key of the configuration: a table, so that a key that a run does not read is refused, not ignored."""

import json
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from heterodiff.config.base import Section
from heterodiff.models.variants import VARIANTS

if TYPE_CHECKING:
    from heterodiff.config.run import RunConfig

HYBRIDS = tuple(name for name, variant in VARIANTS.items() if variant.hybrid is not None)


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
        """Whether ``key`` is one of the keys, or in one of the sections."""
        return any(key == own or key.startswith(f"{own}.") for own in self.keys.split())


def _from(*sources: str) -> Callable[["RunConfig"], bool]:
    """Runs on one of ``sources``, or on latents, which compare the keys with those their images were read with."""
    return lambda run: run.data.source in (*sources, "latents")


def _with_texts(run: "RunConfig") -> bool:
    return run.recipe in ("text-image", "alignment")


def _denoises(run: "RunConfig") -> bool:
    return run.recipe in ("diffusion", "text-image")


def _on_pixels(run: "RunConfig") -> bool:
    return run.codec.kind == "pixels"


def _on_codec(run: "RunConfig") -> bool:
    """On the latents of a finished codec, which ``alignment.joint`` has none of."""
    return not _on_pixels(run) and not run.alignment.joint


def _trains_vae(run: "RunConfig") -> bool:
    return run.recipe == "vae" or (run.codec.kind == "kl-vae" and run.codec.training is not None)


def _sees_images(run: "RunConfig") -> bool:
    """Training reads images at every step, not stored latents."""
    return not _on_codec(run) or not (run.codec.cache or run.data.source == "latents")


def _conditional(run: "RunConfig") -> bool:
    unlabelled = run.data.labels == "none" or run.data.source in ("captions", "shapes")
    return run.recipe == "text-image" or not unlabelled


READERS = (
    Reader(
        "recipe output training data.source data.image_size data.channels data.labels data.value_range data.resize "
        "data.val_fraction data.test_fraction data.split_seed data.train_classes data.on_bad data.memory_limit_gb "
        "data.keep_on_device",
        "by every run",
        "recipe",
        lambda run: True,
    ),
    Reader(
        "data.path",
        "by data.source images, captions, volumes and latents",
        "data.source",
        _from("images", "captions", "volumes"),
    ),
    Reader(
        "data.captions_file data.file_column data.text_column",
        "by data.source captions and by recipes text-image and alignment",
        "data.source recipe",
        lambda run: _from("captions")(run) or _with_texts(run),  # evaluate --data reads captions for any of these
    ),
    Reader(
        "data.test_patients data.split_by",
        "by data.source volumes and brain-phantom, whose images belong to patients",
        "data.source",
        _from("volumes", "brain-phantom"),
    ),
    Reader("data.microdoppler", "by data.source microdoppler", "data.source", _from("microdoppler")),
    Reader("data.shapes", "by data.source shapes", "data.source", _from("shapes")),
    Reader("data.brain_phantom", "by data.source brain-phantom", "data.source", _from("brain-phantom")),
    Reader(
        "data.volumes",
        "by data.source volumes and brain-phantom",
        "data.source",
        _from("volumes", "brain-phantom"),  # evaluate --data takes volumes of patients for both
    ),
    Reader(
        "data.horizontal_flip data.random_crop",
        "where training sees images, not stored latents: on pixels, or with codec.cache=false, which encodes every "
        "batch and is slower",
        "codec.kind codec.cache",
        _sees_images,
        always=True,
    ),
    Reader(
        "model diffusion sampling", "by recipes diffusion and text-image, which train a denoiser", "recipe", _denoises
    ),
    Reader("codec", "by recipes diffusion and text-image, which train a denoiser", "recipe", _denoises, always=True),
    Reader(
        "codec.path codec.training",
        "with codec.kind=kl-vae and by recipe text-image",
        "codec.kind",
        lambda run: not _on_pixels(run),
        always=True,
    ),
    Reader(
        "codec.cache",
        "with codec.kind=kl-vae and by recipe text-image, for images that are encoded before the denoiser is trained",
        "codec.kind data.source alignment.joint",
        lambda run: _on_codec(run) and run.data.source != "latents",
    ),
    Reader(
        "codec.statistics",
        "with codec.kind=kl-vae and by recipe text-image, where the codec is trained before the denoiser",
        "codec.kind alignment.joint",
        _on_codec,
    ),
    Reader("codec.posterior", "with codec.kind=kl-vae", "codec.kind", lambda run: run.codec.kind == "kl-vae"),
    Reader(
        "vae",
        "where a VAE is trained: by recipe vae, or with codec.kind=kl-vae and codec.training",
        "recipe codec.kind codec.training",
        _trains_vae,
    ),
    Reader(
        "vae.latent_channels vae.block_out_channels vae.layers_per_block vae.mid_block_attention",
        "without vae.init_from, whose architecture the VAE has",
        "vae.init_from",
        lambda run: run.vae.init_from is None,
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
        "with text.encoder, whose weights stay as they are",
        "text.encoder",
        lambda run: run.text.encoder is not None,
    ),
    Reader(
        "text.vocabulary_size text.width text.layers",
        "without text.encoder, which brings its own",
        "text.encoder",
        lambda run: run.text.encoder is None,
    ),
    Reader(
        "alignment.diffusion_weight",
        "with alignment.joint=true",
        "alignment.joint",
        lambda run: run.alignment.joint,
    ),
    Reader(
        "model.patch_size model.attention_resolutions model.num_head_channels model.use_scale_shift_norm "
        "model.resblock_updown model.memory_optimization",
        f"by model.variant {', '.join(VARIANTS)}",
        "model.variant",
        lambda run: run.model.variant in VARIANTS,
    ),
    Reader(
        "model.attention_pattern model.sparsity",
        f"by the hybrid blocks of model.variant {', '.join(HYBRIDS)}",
        "model.variant",
        lambda run: run.model.variant in HYBRIDS,
    ),
    Reader(
        "model.num_heads",
        "without model.num_head_channels, which sets the width of a head instead of their number",
        "model.num_head_channels",
        lambda run: run.model.num_head_channels is None,
    ),
    Reader(
        "diffusion.schedule",
        "with diffusion.prediction epsilon, v and sample, whose levels of noise it sets",
        "diffusion.prediction",
        lambda run: run.diffusion.prediction != "flow",
    ),
    Reader(
        "diffusion.snr_gamma",
        "with diffusion.weighting=min-snr",
        "diffusion.weighting",
        lambda run: run.diffusion.weighting == "min-snr",
    ),
    Reader(
        "diffusion.p_uncond sampling.guidance_scale sampling.guidance_interval",
        "by runs with a condition: classes, or the texts of recipe text-image",
        "recipe data.source data.labels",
        _conditional,
    ),
    Reader(
        "sampling.dynamic_threshold",
        "on pixels, as latents have no fixed range",
        "codec.kind",
        _on_pixels,
        always=True,
    ),
    Reader(
        "sampling.candidates",
        "by recipe text-image, whose captioner judges them",
        "recipe",
        lambda run: run.recipe == "text-image",
        always=True,
    ),
    Reader(
        "segmentation",
        "by recipe diffusion on pixels, which can find anomalies",
        "recipe codec.kind",
        lambda run: run.recipe == "diffusion" and _on_pixels(run),
    ),
    Reader(
        "segmentation.patience",
        "by segmentation.method=forward-process",
        "segmentation.method",
        lambda run: run.segmentation.method == "forward-process",
    ),
    Reader(
        "segmentation.guidance_scale",
        "by segmentation.method forward-process and ddib, which are steered by classes",
        "segmentation.method",
        lambda run: run.segmentation.method != "partial-noising",
    ),
    Reader(
        "segmentation.seed",
        "by segmentation.method=partial-noising, which draws noise",
        "segmentation.method",
        lambda run: run.segmentation.method == "partial-noising",
    ),
)
"""Every key is in at least one row, and is read where all its rows say so; general rows come first."""


@dataclass(frozen=True)
class UnreadKey:
    """A key that a run does not read, its value, whether that is the default, and the reader that the run has not."""

    key: str
    value: Any
    is_default: bool
    reader: Reader


def leaves(section: Section, prefix: str = "") -> Iterator[tuple[str, Any, bool]]:
    """Dotted key, value, and whether that is the default, of all that is no section; an optional section is one key."""
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
    for key, value, is_default in leaves(run):
        reader = next((reader for reader in missing if reader.covers(key)), None)
        if reader is not None:
            found.append(UnreadKey(key, value, is_default, reader))
    return found


def unread_problems(run: "RunConfig", tolerated: Container[str] | None = ()) -> list[str]:
    """A line for each reader that ``run`` has not, though keys for it differ from their defaults.

    Args:
        tolerated: keys that are no problem, None for all; those of a reader that says ``always`` are one nevertheless.
    """
    of_reader: dict[Reader, list[UnreadKey]] = {}
    for unread in unread_keys(run):
        is_tolerated = not unread.reader.always and (tolerated is None or unread.key in tolerated)
        if not unread.is_default and not is_tolerated:
            of_reader.setdefault(unread.reader, []).append(unread)
    values = {key: value for key, value, _ in leaves(run)}
    lines = []
    for reader, some in of_reader.items():
        given = ", ".join(f"{one.key}={_shown(one.value)}" for one in some)
        found = ", ".join(f"{key}={_shown(values[key])}" for key in reader.decided_by.split())
        verb, them = ("is", "it") if len(some) == 1 else ("are", "them")
        lines.append(f"{given} {verb} read only {reader.where}, not with {found}; leave {them} out, or change that")
    return lines


def _shown(value: Any) -> str:
    """A value as in YAML, not too long."""
    if isinstance(value, Section):
        return "{...}"
    text = json.dumps(value, default=str, ensure_ascii=False)
    return f"{text.strip(chr(34)):.100}"
