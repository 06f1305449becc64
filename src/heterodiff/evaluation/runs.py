"""Evaluation of a run folder: what is asked for, what comes out, and the data that it was trained on."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from heterodiff.data.assemble import LoadedData
from heterodiff.data.sources import encoded_from, load_data, load_decoded
from heterodiff.data.sources.volumes import known_fingerprint
from heterodiff.devices import Device
from heterodiff.errors import RunError
from heterodiff.lazy import loaded
from heterodiff.pipelines.load import check_preprocessing, pipeline_task
from heterodiff.run_folder import RunFolder
from heterodiff.tasks import Task, task_of

if TYPE_CHECKING:
    from heterodiff.config import DataConfig


@dataclass(frozen=True)
class Evaluation:
    """Numbers of an evaluated run, and the file of the picture that shows them."""

    metrics: dict[str, Any]
    picture: Path


@dataclass(frozen=True)
class Request:
    """Options of an evaluation; None leaves one to the task or the run.

    Attributes:
        number: images of each class, or prompts.
        data: real images unseen in training, in place of the run's own.
        batch_size: images drawn at once.
        steps, guidance, sampler: sampling options.
    """

    number: int | None = None
    data: Path | None = None
    seed: int = 0
    device: Device | None = None
    batch_size: int | None = None
    steps: int | None = None
    guidance: float | None = None
    sampler: str | None = None

    def options(self) -> dict[str, Any]:
        """Sampling options as arguments of the functions that evaluate."""
        drawing = {"num_inference_steps": self.steps, "guidance_scale": self.guidance, "sampler": self.sampler}
        batch_size = {} if self.batch_size is None else {"batch_size": self.batch_size}
        return {**drawing, "device": self.device, **batch_size}


def evaluate_task(run: Path, request: Request) -> Evaluation:
    """Evaluate the run in folder ``run`` as its task does.

    Raises:
        HeterodiffError: no usable run, data that are not there any more, or options that do not fit.
    """
    found: Evaluation = loaded(task_evaluated(run).evaluate)(run, request)
    return found


def task_evaluated(run: Path) -> Task:
    """Return the task to evaluate a run folder as; stored latents count as the images they were encoded from.

    Raises:
        RunError, CheckpointError: no run folder, or one that nothing fits.
        DataError: the latents are not there any more.
    """
    folder = RunFolder(run)
    if not folder.has_config:
        return pipeline_task(run)
    return task_of(folder.config().model_copy(update={"data": image_config(run)}))


def run_data(run: Path) -> LoadedData:
    """Load the data of the run in folder ``run``, with the split and value range it was trained with.

    Of a run on latents of another program, the images are what its VAE makes of these.

    Raises:
        RunError: the folder holds no run that was trained here.
        DataError: the images are not there any more, or not the same.
    """
    if not run.is_dir():
        raise RunError(f"{run}: no such run folder; `heterodiff train` makes one")
    folder = RunFolder(run)
    needed = [folder.config_file, folder.data_file, folder.split_file]
    if missing := [p.name for p in needed if not p.is_file()]:
        raise RunError(f"{run}: {', '.join(missing)} missing, so the training images are not known here")
    check_preprocessing(run, known_fingerprint(folder.config().data))
    if (config := image_config(run)).source == "latents":  # of another program, which tells nothing of its images
        return load_decoded(config, run, folder.split(), folder.spec())
    return load_data(config, split=folder.split(), spec=folder.spec())


def image_config(run: Path) -> "DataConfig":
    """Settings that the run's images are read with; for stored latents, the images they were encoded from.

    Raises:
        DataError: the latents are not there any more.
    """
    return encoded_from(RunFolder(run).config().data)
