"""Who reads a key: each has a reader, and a key that a run does not read is refused, with the name of what would."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from pydantic import BaseModel

from heterodiff.config import RunConfig
from heterodiff.config.file import dump_config, load_config, parse_config
from heterodiff.config.names import SAMPLERS, SOURCES
from heterodiff.config.readers import READERS, leaves
from heterodiff.data.sources import list_sources
from heterodiff.diffusion.samplers import list_samplers
from heterodiff.errors import ConfigError
from heterodiff.training.checkpoints.resume import FREE_TO_CHANGE

KEYS_FILE = Path(__file__).parent / "data" / "config_keys.txt"
TEXTS = {"recipe": "text-image"}
VAE = {"recipe": "vae"}
LATENT = {"codec.kind": "kl-vae", "codec.path": "runs/vae"}
JOINT = {**TEXTS, "alignment.joint": True}
FLOW = {"diffusion.prediction": "flow"}

# A key with a value that is not its default; a run that reads it, and one that does not.
CASES: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "data.background": ("black", {"data.source": "images", "data.path": "x"}, {"data.source": "digits"}),
    "data.condition": ({"downscale": 2}, {}, TEXTS),
    "data.conditions": ({"user": "class"}, {}, {"data.source": "latents"}),
    "model.init_from": ("runs/base", {}, TEXTS),
    "model.train": ("conditions", {"model.init_from": "runs/base"}, {}),
    "model.prior_images": (4, {"model.init_from": "x", "model.prior_preservation": 1}, {"model.init_from": "x"}),
    "model.lora_rank": (4, {"model.init_from": "runs/base", "model.train": "lora"}, {"model.init_from": "runs/base"}),
    "model.prior_preservation": (
        0.5,
        {"model.init_from": "runs/base"},
        {"model.init_from": "runs/base", "data.condition": {"downscale": 2}},
    ),
    "training.fsdp": (True, {}, {"recipe": "vae"}),
    "data.path": ("x", {}, {"data.source": "digits"}),
    "data.captions_file": ("c.jsonl", {"data.source": "captions"}, {"data.source": "images"}),
    "data.file_column": ("file", {**TEXTS, "data.source": "shapes"}, {"data.source": "images"}),
    "data.text_column": ("caption", {"recipe": "alignment", "data.source": "captions"}, {}),
    "data.test_patients": (["19"], {"data.source": "volumes"}, {"data.source": "images"}),
    "data.split_by": ("image", {"data.source": "brain-phantom"}, {"data.source": "microdoppler"}),
    "data.microdoppler.prf_hz": (2000, {"data.source": "microdoppler"}, {"data.source": "digits"}),
    "data.microdoppler.speeds_m_s.bird": ([5, 6], {"data.source": "latents"}, {"data.source": "shapes"}),
    "data.shapes.images": (10, {"data.source": "shapes"}, {"data.source": "captions"}),
    "data.brain_phantom.patients": (9, {"data.source": "brain-phantom"}, {"data.source": "volumes"}),
    "data.volumes.layout": ("atlas", {"data.source": "volumes"}, {"data.source": "images"}),
    "data.volumes.least_brain": (0.1, {"data.source": "brain-phantom"}, {"data.source": "digits"}),
    "data.horizontal_flip": (True, VAE, TEXTS),
    "data.random_crop": (2, {**LATENT, "codec.cache": False}, {**LATENT, "data.source": "latents"}),
    "model.variant": ("unet", {}, VAE),
    "model.attention_resolutions": ([2], {"model.variant": "unet"}, TEXTS),
    "model.resblock_updown": (True, {"model.variant": "hae"}, TEXTS),
    "model.memory_optimization": (True, {"model.variant": "hae-lite"}, TEXTS),
    "model.use_scale_shift_norm": (True, {**TEXTS, "model.variant": "hae-v2"}, TEXTS),
    "model.num_head_channels": (32, {}, TEXTS),
    "model.patch_size": (2, {"model.variant": "unet"}, TEXTS),
    "model.sparsity": (0.5, {"model.variant": "hae-v2-conservative"}, {"model.variant": "unet"}),
    "model.attention_pattern": ("sequence", {"model.variant": "hae-v2"}, TEXTS),
    "model.activation": ("identity", {}, TEXTS),
    "model.class_embedding": ("direct", {"model.variant": "unet"}, TEXTS),
    "model.conv_resample": (False, {"model.variant": "hae"}, TEXTS),
    "model.bottleneck_ratio": (0.5, {"model.variant": "hae-v2"}, {"model.variant": "hae"}),
    "model.num_heads_upsample": (2, {"model.variant": "unet"}, {"model.num_head_channels": 32}),
    "model.num_heads": (8, TEXTS, {"model.num_head_channels": 32}),
    "diffusion.prediction": ("epsilon", TEXTS, {"recipe": "alignment"}),
    "diffusion.schedule": ("linear", {"diffusion.prediction": "v"}, FLOW),
    "diffusion.noise": ("simplex", {}, LATENT),
    "diffusion.num_train_timesteps": (500, {"recipe": "classifier"}, VAE),
    "diffusion.timestep_sampler": ("loss-second-moment", {}, {"recipe": "classifier"}),
    "diffusion.snr_gamma": (3, {"diffusion.weighting": "min-snr"}, {}),
    "diffusion.p_uncond": (0.2, TEXTS, {"data.labels": "none"}),
    "sampling.guidance_scale": (3, {}, {"data.source": "shapes"}),
    "sampling.guidance_interval": ([0.2, 0.8], {"data.source": "digits"}, {"data.labels": "none"}),
    "sampling.num_inference_steps": (7, {}, VAE),
    "sampling.dynamic_threshold": (0.9, {}, LATENT),
    "sampling.candidates": (3, TEXTS, {}),
    "codec.kind": ("kl-vae", {"codec.path": "runs/vae"}, {**VAE, "codec.path": "runs/vae"}),
    "codec.path": ("x", {"codec.kind": "kl-vae"}, {}),
    "codec.training": ({"steps": 5}, LATENT, {}),
    "codec.cache": (False, TEXTS, JOINT),
    "codec.statistics": ("measured", LATENT, {}),
    "codec.posterior": ("mode", LATENT, TEXTS),
    "vae.kl_weight": (1e-3, VAE, {**LATENT, "codec.training": None}),
    "vae.adversarial_weight": (0.5, {**LATENT, "codec.training": {}}, {}),
    "vae.adversarial_start": (5, {**VAE, "vae.adversarial_weight": 0.5}, VAE),
    "vae.latent_channels": (8, VAE, {**VAE, "vae.init_from": "runs/other"}),
    "text.embedding_dim": (128, TEXTS, {}),
    "text.frozen": (True, {**TEXTS, "text.encoder": "bert"}, TEXTS),
    "text.width": (64, {"recipe": "alignment"}, {**TEXTS, "text.encoder": "bert"}),
    "alignment.latent_noise": (0.2, TEXTS, VAE),
    "alignment.diffusion_weight": (1, JOINT, TEXTS),
    "segmentation.depth": (100, {}, LATENT),
    "segmentation.patience": (3, {"segmentation.method": "forward-process"}, {"segmentation.method": "ddib"}),
    "segmentation.guidance_scale": (9, {"segmentation.method": "ddib"}, {"segmentation.method": "partial-noising"}),
    "segmentation.classifier": ("runs/classifier", {"segmentation.method": "classifier-guidance"}, {}),
    "segmentation.classifier_scale": (
        9,
        {"segmentation.method": "classifier-guidance", "segmentation.classifier": "runs/classifier"},
        {"segmentation.method": "ddib"},
    ),
    "segmentation.seed": (1, {}, {"segmentation.method": "ddib", "segmentation.network_steps": 0}),
    "segmentation.network_steps": (100, {}, LATENT),
    "segmentation.score": ("peak", {"segmentation.method": "ddib"}, {}),
}


def nested(flat: dict[str, Any]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for key, value in flat.items():
        *sections, last = key.split(".")
        inner = content
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[last] = value
    return content


def keys_of(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """All keys of a section and of the sections in it, from the types alone."""
    for name, field in section.model_fields.items():
        inner = [k for k in (field.annotation, *get_args(field.annotation)) if isinstance(k, type)]
        inner = [k for k in inner if issubclass(k, BaseModel)]
        if inner:
            yield from keys_of(inner[0], f"{prefix}{name}.")
        else:
            yield prefix + name


def test_public_keys_are_those_of_the_list() -> None:
    """Users' files hold these: take one away, or rename it, only on purpose, and say so in the changelog."""
    assert sorted(keys_of(RunConfig)) == KEYS_FILE.read_text().split()


def test_every_key_has_a_reader_and_every_reader_a_key() -> None:
    keys = [key for key, _, _ in leaves(RunConfig())]
    optional = ("codec.training", "data.condition")  # a section, or none
    inner = tuple(f"{section}." for section in optional)
    assert {key for key in keys_of(RunConfig) if not key.startswith(inner)} == {*keys} - {*optional}
    assert [key for key in keys if not any(reader.covers(key) for reader in READERS)] == []
    known = {*keys, *(key.rpartition(".")[0] for key in keys)}
    for reader in READERS:
        assert set(reader.keys.split()) <= known
        assert set(reader.decided_by.split()) <= set(keys)


def test_keys_that_a_resumed_run_may_change_exist() -> None:
    keys = [key for key, _, _ in leaves(RunConfig())]
    assert [free for free in FREE_TO_CHANGE if not any(f"{key}.".startswith(f"{free}.") for key in keys)] == []


def refusal(run: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as error:
        parse_config(nested(run), "mine.yaml")
    return str(error.value)


def test_every_reader_has_a_case() -> None:
    refused = [refusal({**other, key: value}) for key, (value, _, other) in CASES.items()]
    without = [reader.keys for reader in READERS if not any(reader.where in message for message in refused)]
    assert without == [READERS[0].keys]  # what every run reads


@pytest.mark.parametrize("key", CASES)
def test_a_key_is_taken_by_who_reads_it_and_refused_elsewhere(key: str) -> None:
    value, reads, other = CASES[key]
    taken = parse_config(nested({**reads, key: value}))
    assert parse_config(yaml.safe_load(dump_config(taken))) == taken
    message = refusal({**other, key: value})
    assert message.startswith("mine.yaml: ")
    (line,) = [line for line in message.splitlines() if f"{key}=" in line.partition(" read only ")[0]]
    assert "; leave " in line


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (
            {"data.source": "images", "data.captions_file": "c.jsonl"},
            "data.captions_file=c.jsonl is read only by data.source captions, webdataset or hf-dataset and by recipes "
            "text-image and alignment, not with data.source=images, recipe=diffusion; leave it out, or change that",
        ),
        (
            {"model.variant": "unet", "model.sparsity": 0.5},
            "model.sparsity=0.5 is read only with model.variant=hae, hae-lite, hae-v2 or hae-v2-conservative (hybrid "
            "blocks), not with model.variant=unet; leave it out, or change that",
        ),
        (
            {**TEXTS, "model.attention_resolutions": [2], "model.resblock_updown": True},
            "model.attention_resolutions=[2], model.resblock_updown=true are read only with model.variant=unet, hae, "
            "hae-lite, hae-v2, hae-v2-conservative, hae-v2-conservative-public, hae-v3, unet-lean or unet-conv, not "
            "with model.variant=film-unet; leave them out, or change that",
        ),
    ],
)
def test_the_message_names_key_reader_and_what_was_found_in_one_line(run: dict[str, Any], message: str) -> None:
    assert refusal(run) == f"mine.yaml: {message}"


def test_defaults_may_be_written_out() -> None:
    """A file that holds every key with its default, as runs saved it before, is read by every recipe."""
    for recipe in ("diffusion", "vae", "alignment"):
        content = RunConfig().model_dump(mode="json") | {"recipe": recipe}
        assert parse_config(content) == parse_config({"recipe": recipe})


@pytest.mark.parametrize("beside", ["run.json", "model_index.json"])
def test_the_configuration_in_a_run_folder_may_hold_what_was_never_read(beside: str, tmp_path: Path) -> None:
    """Earlier versions accepted it; such a run still loads, goes on, and is repeated from its folder."""
    file = tmp_path / "config.yaml"
    file.write_text("{output: x, model: {variant: unet, sparsity: 0.5}, data: {source: digits, captions_file: c.csv}}")
    with pytest.raises(ConfigError, match=r"model\.sparsity=0\.5"):
        load_config(file)
    (tmp_path / beside).write_text("{}")
    config = load_config(file)
    assert config.model.sparsity == 0.5
    assert load_config(file, ["training.steps=3"]).data.captions_file == Path("c.csv")
    (tmp_path / "again.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "again.yaml") == config  # not lost, so that a fingerprint stays that of the run
    with pytest.raises(ConfigError, match=r"model\.sparsity=0\.6"):
        load_config(file, ["model.sparsity=0.6"])
    with pytest.raises(ConfigError, match=r"diffusion\.snr_gamma=3"):
        load_config(file, ["diffusion.snr_gamma=3"])


def test_a_key_that_an_override_leaves_without_a_reader_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "config.yaml").write_text(dump_config(parse_config({"model": {"variant": "hae", "sparsity": 0.5}})))
    with pytest.raises(ConfigError, match=r"model\.sparsity=0\.5 is read only"):
        load_config(tmp_path / "config.yaml", ["model.variant=unet"])


def test_what_a_run_saves_is_what_it_reads() -> None:
    saved = yaml.safe_load(dump_config(parse_config({"recipe": "vae", "data": {"source": "digits"}})))
    assert list(saved) == ["recipe", "output", "data", "vae", "training"]
    assert "microdoppler" not in saved["data"]
    saved = yaml.safe_load(dump_config(parse_config({"model": {"variant": "unet"}})))
    assert "sparsity" not in saved["model"]
    assert saved["codec"] == {"kind": "pixels"}


@pytest.mark.parametrize(
    ("key", "name", "nearest"),
    [
        ("sampling.sampler", "dpmp", "dpmpp"),
        ("model.variant", "hae_v2", "hae-v2"),
        ("model.variant", "film_unet", "film-unet"),
        ("data.source", "digit", "digits"),
    ],
)
def test_names_are_checked_when_the_file_is_read(key: str, name: str, nearest: str) -> None:
    message = refusal({key: name})
    assert f"{key}: unknown" in message
    assert f"'{name}' (did you mean '{nearest}'?); known: " in message
    assert "found" not in message


def test_names_are_those_of_what_they_name() -> None:
    assert list(SOURCES) == list_sources()
    assert list(SAMPLERS) == list_samplers()


def test_reading_a_configuration_imports_nothing_heavy(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("{sampling: {sampler: ddim}, model: {variant: hae}, data: {source: digits}}")
    code = (
        "import sys; from heterodiff.config.file import load_config; load_config(sys.argv[1]); "
        "print([name for name in ('torch', 'diffusers', 'numpy') if name in sys.modules])"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "c.yaml")]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "[]"
