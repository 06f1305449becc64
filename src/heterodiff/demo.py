"""Demos: from images to a report in minutes on a laptop."""

import time
from collections.abc import Sequence
from pathlib import Path

from heterodiff.config import RunConfig
from heterodiff.config.file import load_config
from heterodiff.errors import ConfigError
from heterodiff.lazy import loaded
from heterodiff.progress import duration
from heterodiff.tasks import task_of
from heterodiff.training.start import train


def run_demo(config_file: Path, out: Path, seed: int, overrides: Sequence[str] = ()) -> None:
    """Train the run of ``config_file`` in ``out`` or resume it, draw samples, evaluate and write the report.

    A run on the latents of a VAE first trains the VAE in the folder ``<out>_vae``, and evaluates it too.

    Args:
        overrides: ``key.path=value``, as for ``heterodiff train``.

    Raises:
        HeterodiffError: ``out`` holds something else, or an override cannot be used.
    """
    start = time.perf_counter()
    config = _demo_config(config_file, out, seed, overrides)
    assert config.output is not None
    out = config.output
    if (demo := task_of(config).demo) is None:
        raise ConfigError(f"recipe {config.recipe}: has no demo; leave recipe out, or use heterodiff train")
    result = train(config)
    if result.stopped_by is not None:
        raise SystemExit(128 + result.stopped_by)
    lines = loaded(demo)(config, out, seed)
    print(f"time     {duration(time.perf_counter() - start)}")
    for line in lines:
        print(line)


def _demo_config(config_file: Path, out: Path, seed: int, overrides: Sequence[str]) -> RunConfig:
    """Return the configuration of ``config_file`` in ``out``; ``overrides`` come last."""
    own = [f"output={out}", f"training.seed={seed}"]
    config = load_config(config_file, [*own, *overrides])
    if config.codec.training is not None:
        own.append(f"codec.training.seed={seed}")
    if config.codec.kind == "kl-vae":
        assert config.output is not None
        own.append(f"codec.path={config.output.with_name(f'{config.output.name}_vae')}")
    return load_config(config_file, [*own, *overrides])
