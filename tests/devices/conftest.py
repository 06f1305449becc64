"""Registers the test device, for the tests of this folder only: ``pytest tests/devices``.

Registration lasts as long as the process and makes the device the default, so these tests are left out of a run that
holds others too.
"""

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
import torch

from tests.devices import register

HERE = Path(__file__).parent


def _alone(config: pytest.Config) -> bool:
    """Whether only tests of this folder were asked for."""
    asked = [Path(argument.partition("::")[0]).resolve() for argument in config.args]
    return all(path.is_relative_to(HERE) for path in asked)


def _reason() -> str | None:
    """Why the device cannot be registered here, if so."""
    if torch.accelerator.is_available():
        return "this machine has an accelerator of its own"
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 12):
        return "torch registers a device from Python since 2.12"
    return None


UNAVAILABLE = _reason()


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    return None if _alone(config) else True


def pytest_configure(config: pytest.Config) -> None:
    if _alone(config) and UNAVAILABLE is None:
        register()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if UNAVAILABLE is not None:
        for item in items:
            item.add_marker(pytest.mark.skip(reason=UNAVAILABLE))


@contextmanager
def default_is_cpu() -> Iterator[None]:
    """Let heterodiff choose the CPU in this block, as on a machine without the device."""
    with (
        mock.patch.object(torch.accelerator, "current_accelerator", return_value=None),
        mock.patch.object(torch.accelerator, "is_available", return_value=False),
    ):
        yield


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Give the run of two steps in float32 of a recipe; all processes of a test session make it once and read it."""
    from tests.devices.runs import RECIPES, train

    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "runs"

    def run(recipe: str) -> Path:
        torch.set_num_threads(1)  # sums depend on it
        made = folder / recipe.replace(" ", "-") / "run"
        folder.mkdir(exist_ok=True)
        with open(folder / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (made / "model_index.json").is_file():
                train(RECIPES[recipe](made, made.parent / "codecs"))
        return made

    return run
