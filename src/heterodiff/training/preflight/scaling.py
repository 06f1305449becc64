"""Estimate of a run on several devices: what each computes, exchanges and reads in a step, and what is saved."""

import gc
import os
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile

from heterodiff.config import RunConfig
from heterodiff.data.sources import LoadedData
from heterodiff.progress import duration
from heterodiff.training.optimization import check_batch
from heterodiff.training.preflight.findings import Findings
from heterodiff.training.preflight.trial import Part, time_steps, trial

GRADIENT_BYTES, CHECKPOINT_COPIES = 4, 4
"""Bytes of a gradient as DDP exchanges it, and copies of the weights in a checkpoint: weights, EMA, two moments."""
WRITTEN_BYTES = 2**26
"""Bytes that are written to time the disk of the run folder."""


@dataclass(frozen=True)
class Scaling:
    """A training step on several devices.

    Attributes:
        images: of each device in a step.
        compute_seconds: to compute a step of these images, measured on the device here.
        exchanged_bytes: sent by each device in a step.
        exchange_seconds: for that at the rate of the link.
    """

    devices: int
    images: int
    compute_seconds: float
    exchanged_bytes: int
    exchange_seconds: float

    @property
    def step_seconds(self) -> tuple[float, float]:
        """Seconds of a step: where all of the exchange runs beside computing, and where none of it does."""
        return max(self.compute_seconds, self.exchange_seconds), self.compute_seconds + self.exchange_seconds


def exchanged_bytes(parameters: int, devices: int) -> int:
    """Return the bytes that each device sends in a step: a ring adds gradients up in 2 (n - 1) parts of 1 / n.

    Patarasuk and Yuan, Bandwidth optimal all-reduce algorithms for clusters of workstations, 2009.
    """
    return round(2 * (devices - 1) / devices * GRADIENT_BYTES * parameters)


def scaled(config: RunConfig, data: LoadedData, parameters: int, devices: int, link: float) -> Scaling:
    """Estimate a step on several devices like this one.

    Args:
        data: of the run.
        parameters: that are trained.
        link: gigabytes per second that each device can send.

    Raises:
        ConfigError: the batch does not split evenly.
        HeterodiffError: as :func:`heterodiff.training.preflight.trial.trial`.
    """
    training = config.training
    check_batch(training, devices)
    share = training.batch_size // devices
    smaller = config.model_copy(update={"training": training.model_copy(update={"batch_size": share})})
    seconds = time_steps(trial(smaller, data).trainer)[0]
    gc.collect()  # the networks that were tried are in reference cycles
    sent = exchanged_bytes(parameters, devices)
    return Scaling(devices, share, seconds, sent, sent / (link * 1e9))


def write_rate(folder: Path) -> float:
    """Return the bytes per second that the disk of ``folder``, which need not exist yet, takes; nothing stays there."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    content = os.urandom(2**20)
    with TemporaryFile(dir=existing) as file:
        start = time.perf_counter()
        for _ in range(WRITTEN_BYTES // len(content)):
            file.write(content)
        file.flush()
        os.fsync(file.fileno())
        return WRITTEN_BYTES / (time.perf_counter() - start)


def report_scaling(
    config: RunConfig, data: LoadedData, part: Part, findings: Findings, devices: int, link: float
) -> None:
    """Report what a run, or the part of it that is trained last, costs on several devices; arguments as above.

    Raises:
        HeterodiffError: as :func:`scaled`.
    """
    found = scaled(config, data, part.parameters, devices, link)
    least, most = found.step_seconds
    findings.add(
        True,
        "devices",
        f"{devices} with {found.images} images each, which take {duration(found.compute_seconds)} to compute here",
    )
    findings.add(
        True,
        "exchange",
        f"{found.exchanged_bytes / 1e6:,.1f} MB of gradients from each device in a step: "
        f"{duration(found.exchange_seconds)} at {link:g} GB a second",
    )
    gains = sorted((part.step_seconds / least, part.step_seconds / most))
    findings.add(
        True,
        "step",
        f"{duration(least)} to {duration(most)} on {devices} devices, {gains[0]:.1f} to {gains[1]:.1f} times as fast "
        f"as on one; {part.steps:,} steps take {duration(part.steps * least)} to {duration(part.steps * most)}",
    )
    image = data.train.stored([0])[0].nbytes
    batch = config.training.batch_size
    findings.add(
        True,
        "reading",
        f"{batch:,} images of {image:,} bytes in a step, up to {batch * image / least / 1e6:,.1f} MB a second "
        "decoded, over all devices",
    )
    size = CHECKPOINT_COPIES * GRADIENT_BYTES * part.parameters
    rate = write_rate(config.output or Path())
    every = config.training.checkpoint_every
    findings.add(
        True,
        "checkpoint",
        f"{size / 1e6:,.1f} MB, about {duration(size / rate)} at {rate / 1e6:,.0f} MB a second, every {every:,} steps",
    )
