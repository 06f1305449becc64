"""From a run folder to the pipeline that fits it."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import schedulers

from heterodiff.codecs.kl_vae import load_vae
from heterodiff.compiling import Compile, compile_for_drawing
from heterodiff.devices import Device, DType, dtype_name, find_device, find_dtype, use_tf32
from heterodiff.errors import CheckpointError, ConfigError, RunError, nearest_name
from heterodiff.files import read_json
from heterodiff.lazy import loaded
from heterodiff.models.film_unet import FiLMUNet
from heterodiff.models.loading import load_network
from heterodiff.models.unet import HAEUNet
from heterodiff.pipelines.generate import GenerationPipeline
from heterodiff.pipelines.reconstruct import ReconstructionPipeline
from heterodiff.pipelines.text_to_image import TextImagePipeline
from heterodiff.run_folder import RunFolder
from heterodiff.tasks import TASKS, Task, task_of_pipeline
from heterodiff.text.aligned import load_networks

TRAIN_OR_IMPORT = "train or import it again; earlier checkpoints come in through `heterodiff import`"

P = TypeVar("P", GenerationPipeline, TextImagePipeline)


def load(run: str | Path, device: Device | None = None, compile: Compile = False, dtype: DType | None = None) -> Any:
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
    return loaded(pipeline_task(folder).load)(folder, Placing(device, precision, dtype is not None, compile))


@dataclass(frozen=True)
class Placing:
    """How a pipeline is to compute.

    Attributes:
        precision: of the denoiser.
        asked: whether the user named the precision.
    """

    device: torch.device
    precision: torch.dtype
    asked: bool
    compile: Compile


def read_reconstruction(folder: Path, placing: Placing) -> ReconstructionPipeline:
    """The VAE in ``folder``.

    Raises:
        ConfigError: a precision other than float32.
    """
    if placing.asked and placing.precision != torch.float32:
        raise ConfigError(f"{folder}: a VAE computes in float32; leave {dtype_name(placing.precision)} out")
    return ReconstructionPipeline(load_vae(folder)).to(placing.device)


def read_generation(folder: Path, placing: Placing) -> GenerationPipeline:
    """The denoiser in ``folder``, with its VAE, if it has one."""
    return _placed(_load_generation, folder, placing)


def read_text_image(folder: Path, placing: Placing) -> TextImagePipeline:
    """The image codec and text networks in ``folder``, with the denoiser, if it has one."""
    return _placed(_load_text_image, folder, placing)


def _placed(read: Callable[[Path], P], folder: Path, placing: Placing) -> P:
    try:
        pipeline = read(folder)
    except ConfigError as error:
        raise CheckpointError(f"{folder}: {error}") from None
    pipeline.read_run(folder)
    pipeline.set_progress_bar_config(disable=True)
    if pipeline.unet is not None:
        # Not diffusers' own `to`, which warns of what does not apply.
        torch.nn.Module.to(pipeline.unet, dtype=placing.precision)
        compile_for_drawing(pipeline.unet, placing.compile, placing.device)
    return pipeline.to(placing.device)


def load_generation(
    run: str | Path, device: Device | None = None, compile: Compile = False, dtype: DType | None = None
) -> GenerationPipeline:
    """Load a run that draws images, see :func:`load`.

    Raises:
        RunError: also for a run of recipe ``vae``, which draws none.
    """
    pipeline: GenerationPipeline = load(run, device, compile, dtype)
    _refuse_unless("sample", run, pipeline_task(Path(run)).no_classes)
    return pipeline


def load_text_image(
    run: str | Path, device: Device | None = None, compile: Compile = False, dtype: DType | None = None
) -> TextImagePipeline:
    """Load a run of recipe ``text-image`` or ``alignment``, see :func:`load`.

    Raises:
        RunError: also for a run of another recipe.
    """
    pipeline: TextImagePipeline = load(run, device, compile, dtype)
    _refuse_unless("caption", run, "knows no texts; train a run of recipe text-image (`heterodiff train shapes`)")
    return pipeline


def load_reconstruction(run: str | Path, device: Device | None = None) -> ReconstructionPipeline:
    """Load a run of recipe ``vae``, see :func:`load`.

    Raises:
        RunError: also for a run of another recipe.
    """
    pipeline: ReconstructionPipeline = load(run, device)
    _refuse_unless("encode", run, "expected a run of recipe vae, found one that draws images")
    return pipeline


def _refuse_unless(command: str, run: str | Path, reason: str) -> None:
    if command not in pipeline_task(Path(run)).commands:
        raise RunError(f"{run}: {reason.format(run=run)}")


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
            (2 * codec.latent_channels + codec.feature_channels, codec.embedding_dim),  # z_t beside its prior
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


def pipeline_task(folder: Path) -> Task:
    """The task of the pipeline in ``folder``.

    Raises:
        RunError: see :func:`pipeline_kind`.
        CheckpointError: no task has such a pipeline.
    """
    kind = pipeline_kind(folder)
    if (task := task_of_pipeline(kind)) is not None:
        return task
    *most, last = dict.fromkeys(task.pipeline for task in TASKS.values())
    raise CheckpointError(
        f"{RunFolder(folder).index_file}: expected a {', '.join(most)} or {last}, found {kind}; it needs another loader"
    )


def check_preprocessing(run: Path, made: str | None) -> None:
    """Refuse slices of volumes that were made in another way than those the run was trained on.

    Args:
        made: :func:`heterodiff.data.sources.volumes.known_fingerprint` of the slices.

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
