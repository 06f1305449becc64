"""A run folder: the names of its files, and how they are written, read, locked and repaired."""

import errno
import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from heterodiff.config import RunConfig
from heterodiff.config.file import dump_config, load_config
from heterodiff.errors import CheckpointError, RunError, reason
from heterodiff.files import (
    COPY_AGAIN,
    LIST_FILE,
    MAX_LIST_BYTES,
    fingerprint,
    parse_rows,
    read_bytes,
    read_json,
    refuse_changed,
    remove,
    remove_leftovers,
    replacing,
    share_files,
    write_again,
    write_json,
    write_text,
)
from heterodiff.image_spec import ImageSpec

NETWORK_FILES = ("config.json", "diffusion_pytorch_model.safetensors")
COMPONENT_FILES = {"scheduler": ("scheduler_config.json",), "tokenizer": ("tokenizer.json",)}
"""Files of a pipeline's components: of networks, and of components that are none."""

CHECKPOINTS = "checkpoints"
GONE = "the run folder is no longer there; rename it back if it was renamed, and start the same command again"


class RunFolder:
    """All files of a run, by name.

    A file appears under its name only when it is complete, and is never written through a link. After a crash the
    folder repairs itself when its run is resumed: checkpoints are written before the pipeline, and ``weights.json``
    last, so a pipeline without it is made again from the newest undamaged checkpoint; rows of ``metrics.jsonl`` after
    that checkpoint are written again; images are split again, with the same result, if ``split.json`` is missing.

    Args:
        path: the folder; it need not be there yet.
    """

    def __init__(self, path: str | Path):
        self.path = path = Path(path)
        self.lock_file = path / ".lock"
        # what a run trains or encodes for itself before it begins
        self.latents = path / "latents"
        self.alignment = path / "alignment"
        # written when it begins
        self.config_file = path / "config.yaml"
        self.data_file = path / "data.json"
        self.split_file = path / "split.json"
        self.machine_file = path / "run.json"
        # written while it trains
        self.metrics_file = path / "metrics.jsonl"
        self.checkpoints = path / CHECKPOINTS
        self.samples = path / "samples"
        # the pipeline: folders of components, their index, and the step that they are of
        self.index_file = path / "model_index.json"
        self.weights_file = path / LIST_FILE
        # written by what uses it
        self.generated = path / "generated"
        self.calibration_file = path / "calibration.json"
        self.known_patients_file = path / "patients.npz"
        self.mask_network = path / "segmentation_network"
        self.evaluation = path / "evaluation"
        self.evaluation_file = path / "evaluation.json"
        self.images_file = self.evaluation / "images.csv"
        self.anomalies_picture = self.evaluation / "segmentation.png"
        self.prompts_picture = self.evaluation / "text_to_image.png"
        self.captions_picture = self.evaluation / "image_to_text.png"
        self.augmentation_file = path / "augmentation.json"
        self.augmentation_picture = path / "augmentation.png"
        self.samples_picture = path / "samples.png"
        self.nearest_picture = path / "nearest.png"
        self.report_file = path / "report.html"

    def __str__(self) -> str:
        return str(self.path)

    # ---- reading --------------------------------------------------------------------------------------------

    def _from_images(self) -> str:
        """Return the way to a split and facts about the images that are sound."""
        if not self.has_config:
            return COPY_AGAIN
        return f"`heterodiff train {self.config_file}` makes it again from the images"

    @property
    def has_config(self) -> bool:
        return self.config_file.is_file()

    @property
    def has_begun(self) -> bool:
        """True if the folder holds anything but files that are written before a run begins."""
        before = {self.lock_file, self.latents, self.alignment}
        return self.path.is_dir() and any(path not in before for path in self.path.iterdir())

    def config(self) -> RunConfig:
        """Return the configuration that the run was started with.

        Raises:
            ConfigError: missing or damaged.
        """
        return load_config(self.config_file)

    def facts(self) -> dict[str, Any]:
        """Return facts about the images that the run was trained on, see :meth:`save_data`.

        Raises:
            CheckpointError: missing or damaged.
        """
        return read_json(self.data_file, way_out=self._from_images())

    def spec(self) -> ImageSpec | None:
        """Return the specification of the run's images; None for a folder that was not trained here.

        Raises:
            CheckpointError, DataError: the file is damaged.
        """
        return ImageSpec.from_dict(self.facts().get("spec", {})) if self.data_file.is_file() else None

    def split(self) -> dict[str, Any]:
        """Return the names of the images of each part, as ``LoadedData.split_to_dict`` gives them.

        Raises:
            CheckpointError: missing or damaged.
        """
        return read_json(self.split_file, way_out=self._from_images(), limit=MAX_LIST_BYTES)

    def facts_problem(self) -> str | None:
        """Return why training makes the split and facts about the images again; None if both are sound."""
        return _problem(self.split) or _problem(self.facts)

    def metrics(self) -> tuple[list[dict[str, Any]], int]:
        """Return the rows of ``metrics.jsonl``, and the number of damaged ones, which are left out.

        Raises:
            CheckpointError: the file cannot be read.
        """
        if not self.metrics_file.exists():
            return [], 0
        return parse_rows(read_bytes(self.metrics_file, limit=MAX_LIST_BYTES))

    def pipeline_index(self) -> dict[str, Any]:
        """Return the index of the pipeline, as diffusers writes it.

        Raises:
            RunError: no such folder, or no pipeline in it yet.
            CheckpointError: the index is damaged.
        """
        if not self.path.is_dir():
            raise RunError(f"{self}: no such run folder; `heterodiff train` makes one")
        if not self.index_file.is_file():
            raise RunError(f"{self}: no {self.index_file.name}, so no finished weights here yet; train it first")
        return read_json(self.index_file, way_out=write_again(self.path))

    def weights_step(self) -> int | None:
        """Return the step whose weights the pipeline holds; None if there is no complete pipeline.

        Raises:
            CheckpointError: the index or ``weights.json`` is damaged.
        """
        if not self.weights_file.is_file() or not self.index_file.is_file():
            return None
        for name, kind in self.pipeline_index().items():
            if name.startswith("_") or not isinstance(kind, list) or kind[0] is None:
                continue
            needed = COMPONENT_FILES.get(name, NETWORK_FILES)
            if not all((self.path / name / part).is_file() for part in needed):
                return None
        return read_json(self.weights_file, way_out=write_again(self.path)).get("step")

    def sound_step(self) -> int | None:
        """Return the step whose weights the pipeline holds; None if it is incomplete or a file of it is damaged."""
        try:
            step = self.weights_step()
            for name in {self.index_file.name, *self.pipeline_index()} if step is not None else ():
                refuse_changed(self.path / name)
        except CheckpointError:
            return None
        return step

    def weights_digest(self) -> str:
        """Return a hash (16 hex digits) of the denoiser's weights, or of all networks if there is no denoiser."""
        digest = hashlib.blake2b(digest_size=8)
        for path in sorted(self.path.glob("unet/*.safetensors")) or sorted(self.path.glob("*/*.safetensors")):
            with path.open("rb") as file:
                while part := file.read(2**24):
                    digest.update(part)
        return digest.hexdigest()

    def identity(self) -> int | None:
        """Return a number that tells this folder from another of its name; None if there is none."""
        return self.path.stat().st_ino if self.path.is_dir() else None

    # ---- writing --------------------------------------------------------------------------------------------

    @contextmanager
    def writing(self, path: Path) -> Iterator[None]:
        """Turn errors of writing ``path`` into RunError."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            if not self.path.is_dir():
                raise RunError(f"{self}: {GONE}") from None
            why = getattr(error, "strerror", None) or reason(error)
            raise RunError(f"{path}: cannot be written: {why}; make room, or copy the run") from None

    def write_json(self, path: Path, content: dict[str, Any], **layout: Any) -> None:
        """Write one of the run's files whole; ``layout`` as of :func:`heterodiff.files.write_json`.

        Raises:
            RunError: it cannot be written, and is as it was before.
        """
        with self.writing(path):
            write_json(path, content, **layout)

    def write_text(self, path: Path, text: str) -> None:
        """Write one of the run's files whole, see :meth:`write_json`."""
        with self.writing(path):
            write_text(path, text, "backslashreplace")  # names of files need not be UTF-8

    def write_picture(self, path: Path, picture: Any) -> None:
        """Write a PIL ``picture`` as one of the run's PNG files, see :meth:`write_json`; its folder is made."""
        with self.writing(path):
            path.parent.mkdir(exist_ok=True)
            with replacing(path) as file:
                picture.save(file, format="PNG")

    def save_config(self, config: RunConfig) -> None:
        """Write the configuration, see :meth:`write_json`."""
        self.write_text(self.config_file, dump_config(config))

    def save_data(self, split: dict[str, Any], facts: dict[str, Any]) -> None:
        """Write the split, unless a sound one is there, and facts about the images.

        Args:
            facts: ``spec``, ``preprocessing`` and counts.

        Raises:
            RunError: they cannot be written.
        """
        if _problem(self.split) is not None:
            self.write_json(self.split_file, split, sealed=True, ensure_ascii=False)
        self.write_json(self.data_file, facts, sealed=True, ensure_ascii=False)

    def save_pipeline(self, step: int, write: Callable[[Path], None]) -> None:
        """Replace the pipeline by that of ``step``, each component whole or not at all.

        Args:
            write: makes a pipeline in a folder.

        Raises:
            RunError: it cannot be written; the run makes it again from its checkpoint.
        """
        with self.writing(self.path):
            staging = self.path / ".pipeline"
            remove(staging)
            staging.mkdir()  # diffusers would make the run folder again if it was renamed
            write(staging)
            share_files(staging)
            paths = sorted(path for path in staging.rglob("*") if path.is_file())
            files = {path.relative_to(staging).as_posix(): fingerprint(path) for path in paths}
            self.weights_file.unlink(missing_ok=True)
            for part in staging.iterdir():
                self._replace_component(part)
            staging.rmdir()
        self.write_json(self.weights_file, {"step": step, "files": files}, sealed=True)

    def save_mask_network(self, write: Callable[[Path], None]) -> None:
        """Replace the segmentation network, whole or not at all; ``write`` makes it in a folder. Raises RunError."""
        with self.writing(self.mask_network):
            staging = self.path / ".staged" / self.mask_network.name
            remove(staging.parent)
            write(staging)
            share_files(staging)
            self._replace_component(staging)
            staging.parent.rmdir()

    def _replace_component(self, part: Path) -> None:
        target = self.path / part.name
        if part.is_dir():
            old = self.path / f".{part.name}.old"
            remove(old)
            if target.exists():
                target.rename(old)
            part.rename(target)
            remove(old)
        else:
            part.replace(target)

    # ---- one process at a time ------------------------------------------------------------------------------

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the folder, which is made, for this process; the lock ends with the process, however that ends.

        Raises:
            RunError: another process is training in it, or it cannot be made.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if self.lock_file.is_symlink():
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
            lock = FileLock(self.lock_file, timeout=0)
            lock.acquire()
        except Timeout:
            raise RunError(f"{self}: another run is training in this folder; wait for it or set output=...") from None
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise RunError(f"{self.lock_file}: a link, expected a file of the run itself; remove it") from None
            why = error.strerror or reason(error)
            raise RunError(f"{self}: cannot be written: {why}; set output=... elsewhere") from None
        try:
            remove_leftovers(self.path)
            yield
        finally:
            lock.release()


def _problem(read: Callable[[], Any]) -> str | None:
    """Why ``read`` cannot read a file; None if it can."""
    try:
        read()
    except CheckpointError as error:
        return str(error)
    return None
