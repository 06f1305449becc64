"""Loading the pipeline of a run folder."""

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
from heterodiff.files import read_json, refuse_changed, write_again
from heterodiff.lazy import loaded
from heterodiff.models.classifier import NoisyClassifier
from heterodiff.models.film_unet import FiLMUNet
from heterodiff.models.loading import load_network
from heterodiff.models.unet import HAEUNet
from heterodiff.pipelines.classify import ClassifierPipeline
from heterodiff.pipelines.generate import GenerationPipeline
from heterodiff.pipelines.reconstruct import ReconstructionPipeline
from heterodiff.pipelines.text_to_image import TextImagePipeline
from heterodiff.run_folder import RunFolder
from heterodiff.tasks import TASKS, Task, task_of_pipeline
from heterodiff.text.aligned import load_aligned_networks

TRAIN_OR_IMPORT = "train or import it again; earlier checkpoints come in through `heterodiff import`"

P = TypeVar("P", GenerationPipeline, TextImagePipeline)


def load(run: str | Path, device: Device | None = None, compile: Compile = False, dtype: DType | None = None) -> Any:
    """Load the pipeline of a run folder, or of a folder written by ``heterodiff import`` or ``pipe.save_pretrained``.

    Args:
        run: folder with ``model_index.json`` and the folders it names; ``config.yaml`` and ``data.json``, if present,
            bring sampling defaults and class names.
        device: such as "cuda", "cuda:1", "mps" or "cpu"; default: a GPU if there is one, else the CPU.
        compile: compile the network with torch.compile: steps get faster, after about a minute at the first call and
            at each new batch or image size; needs a C++ compiler on a CPU. "graphs": also as CUDA graphs, which saves
            launching kernels one by one.
        dtype: precision of the denoiser, torch.bfloat16, torch.float16 or torch.float32, or its name; default: bfloat16
            on CUDA, else float32. Other networks, such as a VAE, stay in float32.

    Returns:
        The task's pipeline: a :class:`GenerationPipeline`; for recipe ``vae`` a :class:`ReconstructionPipeline`, for
        ``text-image`` and ``alignment`` a :class:`TextImagePipeline`.

    Raises:
        RunError: no such folder, or no weights in it yet.
        CheckpointError: weights or configuration that cannot be read, or of another kind.
        ConfigError: an unavailable device; a precision that is unknown or does not fit the run; CUDA graphs without
            CUDA.
    """
    device = find_device(device)
    precision = find_dtype(dtype, device)
    use_tf32(device)
    folder = Path(run)
    return loaded(pipeline_task(folder).load)(folder, Placing(device, precision, dtype is not None, compile))


@dataclass(frozen=True)
class Placing:
    """Device, precision and compilation of a pipeline.

    Attributes:
        precision: of the denoiser.
        asked: whether the user named the precision.
    """

    device: torch.device
    precision: torch.dtype
    asked: bool
    compile: Compile


def read_reconstruction(folder: Path, placing: Placing) -> ReconstructionPipeline:
    """Load the VAE in ``folder``; raises ConfigError for a precision other than float32."""
    if placing.asked and placing.precision != torch.float32:
        raise ConfigError(f"{folder}: a VAE computes in float32; leave {dtype_name(placing.precision)} out")
    return ReconstructionPipeline(load_vae(folder)).to(placing.device)


def read_classifier(folder: Path, placing: Placing) -> ClassifierPipeline:
    """Load the classifier in ``folder``; raises ConfigError for a precision other than float32."""
    if placing.asked and placing.precision != torch.float32:
        raise ConfigError(f"{folder}: a classifier computes in float32; leave {dtype_name(placing.precision)} out")
    network = load_network(NoisyClassifier, folder / "classifier", write_again(folder, TRAIN_OR_IMPORT))
    scheduler = _load_scheduler(folder / "scheduler")
    try:
        pipeline = ClassifierPipeline(network.requires_grad_(False), scheduler, **_kept(folder, ClassifierPipeline))
    except ConfigError as error:
        raise CheckpointError(f"{folder}: {error}") from None
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(placing.device)


def read_generation(folder: Path, placing: Placing) -> GenerationPipeline:
    """Load the denoiser in ``folder``, with its VAE, if it has one."""
    return _placed(GenerationPipeline, _generation_parts, folder, placing)


def read_text_image(folder: Path, placing: Placing) -> TextImagePipeline:
    """Load the image codec and text networks in ``folder``, with the denoiser, if there is one."""
    return _placed(TextImagePipeline, _text_image_parts, folder, placing)


def _placed(kind: type[P], parts: Callable[[Path], dict[str, Any]], folder: Path, placing: Placing) -> P:
    try:
        pipeline = kind(**parts(folder), **_kept(folder, kind))
    except ConfigError as error:
        raise CheckpointError(f"{folder}: {error}") from None
    pipeline.read_run(folder)
    pipeline.set_progress_bar_config(disable=True)
    if pipeline.unet is not None:
        # Not the pipeline's own `to`, whose warnings do not apply.
        torch.nn.Module.to(pipeline.unet, dtype=placing.precision)
        compile_for_drawing(pipeline.unet, placing.compile, placing.device)
    return pipeline.to(placing.device)


def _kept(folder: Path, pipeline: type[Any]) -> dict[str, Any]:
    """Return the settings that ``save_pretrained`` kept for a class of pipelines; earlier folders have none."""
    names = set(inspect.signature(pipeline).parameters) - set(pipeline._optional_components)
    # Components are lists of a module and a class.
    return {k: v for k, v in RunFolder(folder).pipeline_index().items() if k in names and not isinstance(v, list)}


def _generation_parts(folder: Path) -> dict[str, Any]:
    vae = load_vae(folder / "vae") if (folder / "vae").is_dir() else None
    if vae is None and RunFolder(folder).has_config and RunFolder(folder).config().codec.kind == "kl-vae":
        raise CheckpointError(f"{folder}: the folder vae/ is missing; copy it back, or train the run again")
    unet = load_network(HAEUNet, folder / "unet", write_again(folder, TRAIN_OR_IMPORT))
    return {"unet": unet, "scheduler": _load_scheduler(folder / "scheduler"), "vae": vae}


def _text_image_parts(folder: Path) -> dict[str, Any]:
    parts = vars(load_aligned_networks(folder))
    if not (folder / "unet").is_dir():
        return parts
    unet = load_network((FiLMUNet, HAEUNet), folder / "unet", write_again(folder))
    codec = parts["image_codec"].config
    takes = unet.config.in_channels, unet.config.condition_dim
    given = 2 * codec.latent_channels + codec.feature_channels, codec.embedding_dim  # z_t beside its prior
    if takes != given:
        raise CheckpointError(
            f"{folder / 'unet'}: takes {takes[0]} channels and embeddings of {takes[1]}, but the image codec "
            f"brings {given[0]} and {given[1]}; they are of different runs: copy the folder again"
        )
    return {**parts, "unet": unet, "scheduler": _load_scheduler(folder / "scheduler")}


def _load_scheduler(folder: Path) -> Any:
    refuse_changed(folder)
    config = read_json(folder / "scheduler_config.json")
    name = str(config.get("_class_name"))
    known = [found for found in dir(schedulers) if found.endswith("Scheduler")]
    if name not in known:
        raise CheckpointError(f"{folder}: diffusers has no scheduler '{name}'{nearest_name(name, known)}")
    try:
        return getattr(schedulers, name).from_config(config)
    except (TypeError, ValueError, NotImplementedError, ImportError) as error:
        raise CheckpointError(f"{folder}: a scheduler cannot be made from this configuration: {error}") from None


def load_generation(
    run: str | Path, device: Device | None = None, compile: Compile = False, dtype: DType | None = None
) -> GenerationPipeline:
    """Load a run that draws images of classes, see :func:`load`; raises RunError for other runs, too."""
    return _load_for("sample", run, None, device, compile, dtype)


def load_text_image(
    run: str | Path, device: Device | None = None, compile: Compile = False, dtype: DType | None = None
) -> TextImagePipeline:
    """Load a run that knows texts, see :func:`load`; raises RunError for other runs, too."""
    reason = "knows no texts; train a run of recipe text-image (`heterodiff train shapes`)"
    return _load_for("caption", run, reason, device, compile, dtype)


def load_editing(run: str | Path, device: Device | None = None, dtype: DType | None = None) -> Any:
    """Load a run whose pipeline edits images, see :func:`load`; raises RunError for other runs, too."""
    return _load_for("edit", run, None, device, False, dtype)


def load_classifier(run: str | Path, device: Device | None = None) -> ClassifierPipeline:
    """Load a run of recipe ``classifier``, see :func:`load`; raises RunError for other runs, too."""
    found: ClassifierPipeline = _load_for(
        "classify", run, "expected a run of recipe classifier, found another kind of run", device
    )
    return found


def load_reconstruction(run: str | Path, device: Device | None = None) -> ReconstructionPipeline:
    """Load a run of recipe ``vae``, see :func:`load`; raises RunError for other runs, too."""
    return _load_for("encode", run, "expected a run of recipe vae, found one that draws images", device)


def _load_for(command: str, run: str | Path, reason: str | None, *how: Any) -> Any:
    pipeline, task = load(run, *how), pipeline_task(Path(run))
    if command not in task.commands:
        raise RunError(f"{run}: {(reason or task.no_classes).format(run=run)}")
    return pipeline


def pipeline_kind(folder: Path) -> str:
    """Return the name of the pipeline's class in ``folder``; raises RunError without a folder or weights."""
    return str(RunFolder(folder).pipeline_index().get("_class_name"))


def pipeline_task(folder: Path) -> Task:
    """Return the task of the pipeline in ``folder``; raises CheckpointError if no task has it."""
    kind = pipeline_kind(folder)
    if (task := task_of_pipeline(kind)) is not None:
        return task
    *most, last = dict.fromkeys(task.pipeline for task in TASKS.values())
    raise CheckpointError(
        f"{RunFolder(folder).index_file}: expected a {', '.join(most)} or {last}, found {kind}; it needs another loader"
    )


def check_preprocessing(run: Path, made: str | None) -> None:
    """Raise RunError unless slices of volumes were made as those the run was trained on.

    Args:
        made: :func:`heterodiff.data.sources.volumes.known_fingerprint` of the slices.
    """
    trained = RunFolder(run).facts().get("preprocessing")
    if trained != made:
        raise RunError(
            f"{RunFolder(run).data_file}: the run was trained on slices of fingerprint {trained or 'unknown'}, these "
            f"are of {made or 'unknown'}: cut or scaled in another way, so model and thresholds do not fit; use the "
            "settings and version of the training, or train again"
        )
