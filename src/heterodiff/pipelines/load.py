"""From a run folder to the pipeline that fits it."""

import inspect
from pathlib import Path
from typing import Any

import torch
from diffusers import schedulers

from heterodiff.codecs.kl_vae import load_vae
from heterodiff.compiling import Compile, compile_for_drawing
from heterodiff.devices import Device, DType, dtype_name, find_device, find_dtype, use_tf32
from heterodiff.errors import CheckpointError, ConfigError, RunError, nearest_name
from heterodiff.files import read_json
from heterodiff.models.film_unet import FiLMUNet
from heterodiff.models.loading import load_network
from heterodiff.models.unet import HAEUNet
from heterodiff.pipelines.generate import GenerationPipeline
from heterodiff.pipelines.reconstruct import ReconstructionPipeline
from heterodiff.pipelines.text_image import TextImagePipeline
from heterodiff.run_folder import RunFolder
from heterodiff.text.networks import load_networks

TRAIN_OR_IMPORT = "train or import it again; earlier checkpoints come in through `heterodiff import`"

Pipeline = GenerationPipeline | ReconstructionPipeline | TextImagePipeline


def load(
    run: str | Path, device: Device | None = None, compile: Compile = False, dtype: DType | None = None
) -> Pipeline:
    """Load the pipeline of a run folder, or of a folder written by ``heterodiff import`` or ``pipe.save_pretrained``.

    Args:
        run: folder with ``model_index.json`` and the folders it names; ``config.yaml`` and ``data.json``, where
            present, bring sampling defaults and class names.
        device: as "cuda", "cuda:1", "mps" or "cpu"; default: a GPU if there is one, else the CPU.
        compile: compile the network with torch.compile: about a minute at the first call, and again for each other
            batch or image size, for faster steps after it. On a CPU this needs a C++ compiler. "graphs": as CUDA
            graphs, too, whose kernels need not be launched one by one.
        dtype: precision of the denoiser, torch.bfloat16, torch.float16 or torch.float32, or its name; default: bfloat16
            on CUDA, else float32. All else, such as a VAE, stays in float32.

    Returns:
        What draws images; for a run of recipe ``vae`` what reconstructs them, of recipe ``text-image`` or
        ``alignment`` what draws images of texts and writes captions.

    Raises:
        RunError: no such folder, or nothing to load in it yet.
        CheckpointError: weights or configuration that cannot be read, or of another kind.
        ConfigError: a device that this machine does not have; a precision that is unknown, or not for this run; CUDA
            graphs elsewhere than on CUDA.
    """
    device = find_device(device)
    precision = find_dtype(dtype, device)
    use_tf32(device)
    folder = Path(run)
    kind = pipeline_kind(folder)
    loaders = {GenerationPipeline.__name__: _load_generation, TextImagePipeline.__name__: _load_text_image}
    if kind == ReconstructionPipeline.__name__:
        if dtype is not None and precision != torch.float32:
            raise ConfigError(f"{folder}: a VAE computes in float32; leave {dtype_name(precision)} out")
        return ReconstructionPipeline(load_vae(folder)).to(device)
    if kind not in loaders:
        raise CheckpointError(
            f"{RunFolder(folder).index_file}: expected a GenerationPipeline, ReconstructionPipeline or "
            f"TextImagePipeline, found {kind}; it needs another loader"
        )
    try:
        pipeline = loaders[kind](folder)
    except ConfigError as error:
        raise CheckpointError(f"{folder}: {error}") from None
    pipeline.read_run(folder)
    pipeline.set_progress_bar_config(disable=True)
    if pipeline.unet is not None:
        torch.nn.Module.to(pipeline.unet, dtype=precision)  # not diffusers' own, which warns of what does not apply
        compile_for_drawing(pipeline.unet, compile, device)
    return pipeline.to(device)


def load_generation(
    run: str | Path, device: Device | None = None, compile: Compile = False, dtype: DType | None = None
) -> GenerationPipeline:
    """Load a run that draws images, see :func:`load`.

    Raises:
        RunError: also for a run of recipe ``vae``, which draws none.
    """
    pipeline = load(run, device, compile, dtype)
    if isinstance(pipeline, TextImagePipeline):
        raise RunError(f'{run}: draws images of texts, not of classes; use `heterodiff text2image {run} "a prompt"`')
    if not isinstance(pipeline, GenerationPipeline):
        raise RunError(
            f"{run}: a VAE, which reconstructs images but draws none; train a run with codec.kind=kl-vae "
            f"codec.path={run}"
        )
    return pipeline


def load_text_image(
    run: str | Path, device: Device | None = None, compile: Compile = False, dtype: DType | None = None
) -> TextImagePipeline:
    """Load a run of recipe ``text-image`` or ``alignment``, see :func:`load`.

    Raises:
        RunError: also for a run of another recipe.
    """
    pipeline = load(run, device, compile, dtype)
    if not isinstance(pipeline, TextImagePipeline):
        raise RunError(f"{run}: knows no texts; train a run of recipe text-image (`heterodiff train shapes`)")
    return pipeline


def _load_generation(folder: Path) -> GenerationPipeline:
    vae = load_vae(folder / "vae") if (folder / "vae").is_dir() else None
    if vae is None and RunFolder(folder).has_config and RunFolder(folder).config().codec.kind == "kl-vae":
        raise CheckpointError(f"{folder}: the folder vae/ is missing; copy it back, or train the run again")
    return GenerationPipeline(
        load_network(HAEUNet, folder / "unet", TRAIN_OR_IMPORT),
        _load_scheduler(folder / "scheduler"),
        vae,
        **_kept(folder, GenerationPipeline),
    )


def _kept(folder: Path, pipeline: type[Any]) -> dict[str, Any]:
    """Settings that ``save_pretrained`` kept for a class of pipelines; earlier folders have none."""
    names = set(inspect.signature(pipeline).parameters) - set(pipeline._optional_components)
    # Components are lists of a module and a class.
    return {k: v for k, v in RunFolder(folder).pipeline_index().items() if k in names and not isinstance(v, list)}


def _load_text_image(folder: Path) -> TextImagePipeline:
    networks = load_networks(folder)
    unet = scheduler = None
    if (folder / "unet").is_dir():
        unet = load_network((FiLMUNet, HAEUNet), folder / "unet")
        scheduler = _load_scheduler(folder / "scheduler")
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
    return TextImagePipeline(
        networks.image_codec,
        networks.text_encoder,
        networks.tokenizer,
        networks.captioner,
        unet,
        scheduler,
        **_kept(folder, TextImagePipeline),
    )


def pipeline_kind(folder: Path) -> str:
    """Name of the pipeline's class in ``folder``.

    Raises:
        RunError: no such folder, or no weights in it yet.
    """
    return str(RunFolder(folder).pipeline_index().get("_class_name"))


def check_preprocessing(run: Path, made: str | None) -> None:
    """Refuse slices of volumes that were made in another way than those the run was trained on.

    Args:
        made: :func:`heterodiff.data.volumes.known_fingerprint` of the slices.

    Raises:
        RunError: they were.
    """
    trained = RunFolder(run).facts().get("preprocessing")
    if trained != made:
        raise RunError(
            f"{RunFolder(run).data_file}: the run was trained on slices of fingerprint {trained or 'unknown'}, these "
            f"are of {made or 'unknown'}: cut or scaled in another way, so model and limits do not fit; use the "
            "settings and version of the training, or train again"
        )


def _load_scheduler(folder: Path) -> Any:
    config = read_json(folder / "scheduler_config.json")
    name = str(config.get("_class_name"))
    known = [found for found in dir(schedulers) if found.endswith("Scheduler")]
    if name not in known:
        raise CheckpointError(f"{folder}: diffusers has no scheduler '{name}'{nearest_name(name, known)}")
    try:
        return getattr(schedulers, name).from_config(config)
    except (TypeError, ValueError, NotImplementedError, ImportError) as error:
        raise CheckpointError(f"{folder}: a scheduler cannot be made from this configuration: {error}") from None
