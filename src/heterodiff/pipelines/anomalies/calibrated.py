"""A run's calibration, saved beside its weights, and the finder of anomalies that it describes."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from heterodiff.config import SegmentationConfig
from heterodiff.config.file import ADDED_KEYS
from heterodiff.devices import DTYPES, Device, find_device
from heterodiff.diffusion.anomaly import Progress
from heterodiff.errors import CheckpointError, RunError, unknown_name
from heterodiff.files import read_json
from heterodiff.models.loading import load_network
from heterodiff.models.unet import HAEUNet
from heterodiff.pipelines.anomalies.mask_network import MaskNetwork
from heterodiff.pipelines.anomalies.masks import Calibration
from heterodiff.pipelines.anomalies.segment import Segmentation, Segmenter
from heterodiff.pipelines.load import load_generation
from heterodiff.run_folder import RunFolder

DEFAULT_PRECISION = "float32"
"""Precision of the denoiser in segmentation, and of calibrations that name none."""


@dataclass(frozen=True)
class Finder:
    """Finds anomalies as a run was calibrated.

    Attributes:
        segment: (images (B, C, H, W) in [0, 1], number of the first among all images, progress) -> anomalies; progress
            is called after each step with its number and the number of steps.
        in_channels: C.
        channels: of the images, those that are compared.
    """

    calibration: Calibration
    in_channels: int
    channels: list[int]
    segment: Callable[[Tensor, int, Progress], Segmentation]

    @property
    def shown_channel(self) -> int:
        """The channel of pictures: the one that weighs most."""
        return self.channels[self.calibration.channel]


def open_finder(run: Path, settings: SegmentationConfig, device: Device | None = None) -> Finder:
    """Load what finds anomalies in the run: the segmentation network if it was calibrated with one, else the denoiser.

    Args:
        device: see :func:`heterodiff.load`.

    Raises:
        HeterodiffError: no usable run, or not calibrated with these ``settings`` and weights.
    """
    calibration, folder = load_calibration(run, settings), RunFolder(run)
    if calibration.network is None:
        segmenter = Segmenter(load_generation(run, device, dtype=calibrated_precision(run)), settings)
        load_calibration(run, settings, len(segmenter.channels))

        def segment(images: Tensor, first: int, progress: Progress) -> Segmentation:
            return segmenter.masks(segmenter.maps(images, first, progress), calibration)

        return Finder(calibration, segmenter.pipeline.unet.config.in_channels, segmenter.channels, segment)
    again = f"run `heterodiff segment {run} --calibrate` again"
    loaded = load_network(HAEUNet, folder.mask_network, again).to(find_device(device))
    network = MaskNetwork(loaded, settings.channels)
    if network.digest != calibration.network:
        raise RunError(f"{folder.mask_network}: other weights than the run was calibrated with; {again}")

    def segment_at_once(images: Tensor, first: int, progress: Progress) -> Segmentation:
        found = network.segment(images, settings.drop_small, calibration.score_limit)
        progress(1, 1)
        return found

    spec = folder.spec()
    count = loaded.config.in_channels if spec is None else spec.channels
    chosen = list(range(count) if settings.channels is None else settings.channels)
    return Finder(calibration, count, chosen, segment_at_once)


def save_calibration(
    run: Path, calibration: Calibration, settings: SegmentationConfig, precision: str = DEFAULT_PRECISION
) -> Path:
    """Write ``calibration.json`` into the run's folder, with the settings and weights that it is valid for.

    ``precision`` is that of the network, in which segmentation then computes. Raises RunError if the disk refuses.
    """
    folder = RunFolder(run)
    made_with = {"settings": settings.model_dump(mode="json"), "weights": folder.weights_digest()}
    content = {**made_with, "precision": precision, **calibration.to_dict()}
    folder.write_json(folder.calibration_file, content, sealed=True)
    return folder.calibration_file


def calibrated_precision(run: Path) -> str:
    """Return the precision of the run's calibration, or the default; raises RunError if it is unknown."""
    file = RunFolder(run).calibration_file
    try:
        found = read_json(file).get("precision", DEFAULT_PRECISION)
    except CheckpointError:
        return DEFAULT_PRECISION  # `load_calibration` reports the error
    if found not in DTYPES:
        raise RunError(
            f"{file}: {unknown_name('precision', found, DTYPES)}; run `heterodiff segment {run} --calibrate`"
        )
    return str(found)


def load_calibration(run: Path, settings: SegmentationConfig, channels: int | None = None) -> Calibration:
    """Read the calibration of the run for ``settings`` and a number of ``channels`` (None: any).

    Raises:
        RunError: missing or damaged, or made with other settings, weights or channels.
    """
    path = RunFolder(run).calibration_file
    way_out = f"run `heterodiff segment {run} --calibrate`"
    if not path.is_file():
        raise RunError(f"{run}: not calibrated yet, so there are no thresholds for masks; {way_out}")
    content = read_json(path, RunError, way_out)
    stored = content.pop("settings", None)
    wanted = settings.model_dump(mode="json")
    earlier = {key: value for (section, *_, key), value in ADDED_KEYS.items() if section == "segmentation"}
    stored = {**earlier, **stored} if isinstance(stored, dict) else {}
    if stored != wanted:
        other = [key for key in (*wanted, *stored) if stored.get(key, ...) != wanted.get(key, ...)]
        raise RunError(f"{path}: calibrated with another segmentation.{other[0]}; {way_out}, or leave it as it was")
    if content.get("weights") != RunFolder(run).weights_digest():
        raise RunError(f"{path}: calibrated before the run was trained further, so thresholds do not fit; {way_out}")
    try:
        found = Calibration.from_dict(content, channels)
    except RunError as error:
        raise RunError(f"{path}: {error}") from None
    if settings.method == "label-difference" and (found.evidence is None or found.intensity is None):
        raise RunError(f"{path}: holds no weights of method label-difference; {way_out} to calibrate again")
    return found
