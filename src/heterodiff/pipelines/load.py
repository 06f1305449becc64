"""From a run folder to the pipeline that fits it."""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import schedulers
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

from heterodiff.codecs.kl_vae import load_vae
from heterodiff.config_file import load_config
from heterodiff.data.dataset import ImageSpec
from heterodiff.devices import find_device, use_tf32
from heterodiff.errors import CheckpointError, RunError, unknown_name
from heterodiff.models.film_unet import FiLMUNet
from heterodiff.models.loading import load_network
from heterodiff.models.unet import HAEUNet
from heterodiff.pipelines.generate import GenerationPipeline
from heterodiff.pipelines.reconstruct import ReconstructionPipeline
from heterodiff.pipelines.text_image import TextImagePipeline
from heterodiff.text.networks import load_networks

DATA_FILE = "data.json"
SPLIT_FILE = "split.json"
CONFIG_FILE = "config.yaml"
INDEX_FILE = "model_index.json"


Pipeline = GenerationPipeline | ReconstructionPipeline | TextImagePipeline


def load(run: str | Path, device: str | torch.device | None = None, compile: bool = False) -> Pipeline:
    """Load the pipeline of a run folder, or of a folder written by ``heterodiff import``.

    Args:
        run: folder with ``model_index.json`` and the folders it names; ``config.yaml`` and ``data.json``, where
            present, bring sampling defaults and class names.
        device: default: a GPU if there is one, else the CPU.
        compile: compile the network with torch.compile: about a minute at the first call, and again for each other
            batch or image size, for faster steps after it. On a CPU this needs a C++ compiler.

    Returns:
        What draws images; for a run of recipe ``vae`` what reconstructs them, of recipe ``text-image`` or
        ``alignment`` what draws images of texts and writes captions.

    Raises:
        RunError: no such folder, or nothing to load in it yet.
        CheckpointError: weights or configuration that cannot be read, or of another kind.
        ConfigError: a device that this machine does not have.
    """
    device = find_device(device)
    use_tf32(device)
    folder = Path(run)
    kind = pipeline_kind(folder)
    if kind == ReconstructionPipeline.__name__:
        return ReconstructionPipeline(load_vae(folder)).to(device)
    if kind == TextImagePipeline.__name__:
        return _load_text_image(folder, compile).to(device)
    if kind != GenerationPipeline.__name__:
        raise CheckpointError(
            f"{folder / INDEX_FILE}: expected a GenerationPipeline, ReconstructionPipeline or TextImagePipeline, found "
            f"{kind}; it needs another loader"
        )
    vae = load_vae(folder / "vae") if (folder / "vae").is_dir() else None
    pipeline = GenerationPipeline(_load_unet(folder / "unet"), _load_scheduler(folder / "scheduler"), vae)
    if (folder / CONFIG_FILE).is_file():
        config = load_config(folder / CONFIG_FILE)
        pipeline.defaults = config.sampling
        if config.codec.kind == "kl-vae" and vae is None:
            raise CheckpointError(f"{folder}: the folder vae/ is missing; copy it back, or train the run again")
    spec = load_spec(folder)
    if spec is not None:
        pipeline.class_names = spec.class_names
    pipeline.set_progress_bar_config(disable=True)
    if compile:
        pipeline.unet.compile(dynamic=False)
    return pipeline.to(device)


def load_generation(run: str | Path, compile: bool = False) -> GenerationPipeline:
    """Load a run that draws images, see :func:`load`.

    Raises:
        RunError: also for a run of recipe ``vae``, which draws none.
    """
    pipeline = load(run, compile=compile)
    if isinstance(pipeline, TextImagePipeline):
        raise RunError(f'{run}: draws images of texts, not of classes; use `heterodiff text2image {run} "a prompt"`')
    if not isinstance(pipeline, GenerationPipeline):
        raise RunError(
            f"{run}: a VAE, which reconstructs images but draws none; train a run with codec.kind=kl-vae "
            f"codec.path={run}"
        )
    return pipeline


def load_text_image(run: str | Path, compile: bool = False) -> TextImagePipeline:
    """Load a run of recipe ``text-image`` or ``alignment``, see :func:`load`.

    Raises:
        RunError: also for a run of another recipe.
    """
    pipeline = load(run, compile=compile)
    if not isinstance(pipeline, TextImagePipeline):
        raise RunError(f"{run}: knows no texts; train a run of recipe text-image (`heterodiff train shapes`)")
    return pipeline


def _load_text_image(folder: Path, compile: bool) -> TextImagePipeline:
    networks = load_networks(folder)
    unet = scheduler = None
    if (folder / "unet").is_dir():
        kind = read_json(folder / "unet" / "config.json").get("_class_name")
        network = next((cls for cls in (FiLMUNet, HAEUNet) if cls.__name__ == kind), None)
        if network is None:
            raise CheckpointError(f"{folder / 'unet'}: expected a FiLMUNet or HAEUNet, found {kind}")
        unet, scheduler = load_network(network, folder / "unet"), _load_scheduler(folder / "scheduler")
        codec = networks.image_codec.config
        takes, given = (
            (unet.config.in_channels, unet.config.condition_dim),
            (2 * codec.latent_channels + codec.feature_channels, codec.embedding_dim),  # z_t beside its guess
        )
        if takes != given:
            raise CheckpointError(
                f"{folder / 'unet'}: takes {takes[0]} channels and embeddings of {takes[1]}, but the image codec "
                f"brings {given[0]} and {given[1]}; they are of different runs: copy the folder again"
            )
    pipeline = TextImagePipeline(
        networks.image_codec, networks.text_encoder, networks.tokenizer, networks.captioner, unet, scheduler
    )
    if (folder / CONFIG_FILE).is_file():
        pipeline.set_up(load_config(folder / CONFIG_FILE), load_spec(folder))
    if compile and unet is not None:
        unet.compile(dynamic=False)
    return pipeline


def pipeline_kind(folder: Path) -> str:
    """Name of the pipeline's class in ``folder``.

    Raises:
        RunError: no such folder, or no weights in it yet.
    """
    if not folder.is_dir():
        raise RunError(f"{folder}: no such run folder; `heterodiff train` makes one")
    if not (folder / INDEX_FILE).is_file():
        raise RunError(f"{folder}: no {INDEX_FILE}, so no finished weights here yet; train it first")
    return str(read_json(folder / INDEX_FILE).get("_class_name"))


def check_preprocessing(run: Path, made: str | None) -> None:
    """Refuse slices of volumes that were made in another way than those the run was trained on.

    Args:
        made: :func:`heterodiff.data.volumes.known_fingerprint` of the slices.

    Raises:
        RunError: they were.
    """
    trained = read_json(run / DATA_FILE).get("preprocessing")
    if trained != made:
        raise RunError(
            f"{run / DATA_FILE}: the run was trained on slices of fingerprint {trained or 'unknown'}, these are of "
            f"{made or 'unknown'}: cut or scaled in another way, so model and limits do not fit; use the settings and "
            "version of the training, or train again"
        )


def load_spec(run: Path) -> ImageSpec | None:
    """What the run in folder ``run`` remembers about its images; None for a folder that was not trained here.

    Raises:
        DataError, CheckpointError: the file is damaged.
    """
    path = run / DATA_FILE
    return ImageSpec.from_dict(read_json(path).get("spec", {})) if path.is_file() else None


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: the file is missing, damaged, or holds something else.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: missing; the folder is incomplete, train or import it again")
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def _load_unet(folder: Path) -> HAEUNet:
    kind = read_json(folder / "config.json").get("_class_name")
    if kind != HAEUNet.__name__:
        raise CheckpointError(
            f"{folder}: expected a network of class HAEUNet, found {kind}; earlier checkpoints come in through "
            "`heterodiff import`"
        )
    weights = folder / SAFETENSORS_WEIGHTS_NAME
    if not weights.is_file():
        raise CheckpointError(f"{weights}: missing; weights are loaded from safetensors only")
    try:
        # diffusers would fill what a file lacks with fresh weights and only warn, so the names are compared first.
        with safe_open(weights, "pt") as file:
            found = set(file.keys())
        with torch.device("meta"):
            expected = set(HAEUNet.from_config(HAEUNet.load_config(folder)).state_dict())
        if found != expected:
            differing = ", ".join(sorted(found ^ expected)[:4])
            raise CheckpointError(
                f"{weights}: weights of another network: {len(expected - found)} missing, "
                f"{len(found - expected)} unexpected ({differing}, ...)"
            )
        unet = HAEUNet.from_pretrained(folder, use_safetensors=True, local_files_only=True)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise CheckpointError(f"{folder}: damaged weights ({error}); train or import it again") from None
    return unet.eval()


def _load_scheduler(folder: Path) -> Any:
    config = read_json(folder / "scheduler_config.json")
    known = ["DDPMScheduler", "FlowMatchEulerDiscreteScheduler"]
    name = str(config.get("_class_name"))
    if name not in known:
        raise CheckpointError(f"{folder}: {unknown_name('scheduler', name, known)}")
    try:
        return getattr(schedulers, name).from_config(config)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise CheckpointError(f"{folder}: a scheduler cannot be made from this configuration: {error}") from None
