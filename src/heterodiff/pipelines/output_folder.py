"""Output folders of calls, with the settings that their pictures were drawn with."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import heterodiff
from heterodiff.devices import dtype_name
from heterodiff.errors import RunError
from heterodiff.files import read_json, write_json
from heterodiff.pipelines.drawing import DrawingPipeline
from heterodiff.run_folder import RunFolder

SETTINGS_FILE = "settings.json"
PICTURES = (".png", ".npy", ".npz", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
TRIES = 100


def call_settings(
    command: str,
    run: Path,
    pipeline: DrawingPipeline,
    *,
    seed: int,
    number: int,
    sampler: str | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    **others: Any,
) -> dict[str, Any]:
    """Return everything that the pictures of a call depend on, defaults filled in, for ``settings.json``.

    Args:
        number: pictures of each class or prompt.
        sampler, steps, guidance: None for the run's own.
        **others: such as classes or prompts.
    """
    chosen = pipeline.sampling_settings(num_inference_steps=steps, guidance_scale=guidance)
    folder = RunFolder(run)
    return {
        "command": command,
        **others,
        "number": number,
        "seed": seed,
        "sampler": sampler or pipeline.default_sampler,
        "num_inference_steps": chosen.num_inference_steps,
        "guidance_scale": chosen.guidance_scale,
        "guidance_interval": list(chosen.guidance_interval),
        "dynamic_threshold": chosen.dynamic_threshold,
        "dtype": dtype_name(pipeline.unet.dtype) if pipeline.unet is not None else "float32",
        "device": pipeline.device.type,
        "weights": {
            "step": read_json(folder.weights_file).get("step") if folder.weights_file.is_file() else None,
            "digest": folder.weights_digest(),
        },
        "heterodiff": heterodiff.__version__,
    }


def check_output(out: Path | None, settings: dict[str, Any]) -> None:
    """Check that a call with ``settings`` may write its pictures to ``out``; the same call may do so again.

    Raises:
        RunError: the folder holds pictures of another call, or it or a folder in it holds pictures that no call drew,
            such as images to train on.
    """
    if out is None or not out.is_dir():
        return
    way_out = "choose another --out, or leave it out for a new folder in the run"
    if (out / SETTINGS_FILE).is_file():
        found = read_json(out / SETTINGS_FILE, RunError, way_out)
        for key in (*settings, *found):
            if found.get(key) != settings.get(key):
                differing = f"{key} {_short(found.get(key))}, not {_short(settings.get(key))}"
                raise RunError(f"{out}: holds pictures drawn with {differing}; {way_out}")
        return
    # Training images have a folder for each class; folders of other calls do no harm.
    folders = [path for path in out.iterdir() if path.is_dir() and not (path / SETTINGS_FILE).is_file()]
    if any(path.suffix.lower() in PICTURES for folder in (out, *folders) for path in folder.iterdir()):
        raise RunError(f"{out}: holds pictures of something else (it has no {SETTINGS_FILE}); {way_out}")


def make_output(run: Path, out: Path | None, settings: dict[str, Any]) -> Path:
    """Make the folder for the pictures of a call, with ``settings.json`` in it; raises RunError if the disk refuses.

    Without ``out``, this is a new folder ``RUN/generated/0001-dpmpp-20-w2-seed0``, numbered by call.
    """
    with writing(out or run):
        folder = _new_folder(RunFolder(run).generated, settings) if out is None else out
        folder.mkdir(parents=True, exist_ok=True)
        # Characters that no encoding can express become \udcff, which JSON reads back as it was.
        write_json(folder / SETTINGS_FILE, settings, "backslashreplace", ensure_ascii=False)
    return folder


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn errors of the disk into a :class:`RunError`."""
    try:
        yield
    except OSError as error:
        raise RunError(
            f"{folder}: cannot be written: {error.strerror or error}; make room or choose another --out"
        ) from None


def _new_folder(parent: Path, settings: dict[str, Any]) -> Path:
    parent.mkdir(parents=True, exist_ok=True)
    numbers = [int(found[1]) for path in parent.iterdir() if (found := re.match(r"(\d+)-", path.name))]
    first = max(numbers, default=0) + 1
    for number in range(first, first + TRIES):  # another call may take a number at the same time
        folder = parent / f"{number:04d}-{_name(settings)}"
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        return folder
    raise OSError(f"no free number from {first} on")


def _name(settings: dict[str, Any]) -> str:
    if settings.get("direct"):
        return f"direct-seed{settings['seed']}"
    steps, guidance = settings["num_inference_steps"], settings["guidance_scale"]
    return f"{settings['sampler']}-{steps}-w{guidance:g}-seed{settings['seed']}"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
