"""Every command that uses a model gives on another device what it gives on the CPU."""

import contextlib
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import heterodiff as hd
from heterodiff.cli import main
from heterodiff.devices import find_device
from heterodiff.diffusion.samplers import list_samplers
from heterodiff.evaluation import captions as text_image_run
from heterodiff.metrics import classifiers
from heterodiff.metrics import shapes_classifier as shapes_reader
from heterodiff.pipelines.anomalies.mask_network import train_mask_network
from tests import test_pipelines_segment_files as volumes
from tests.devices import NAME, watched
from tests.devices.conftest import default_is_cpu
from tests.devices.runs import pixels, train
from tests.test_evaluation_segmentation_run import settings
from tests.test_pipelines_mask_network import bright_squares

Runs = Callable[[str], Path]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classifiers, "MAX_TRAIN_IMAGES", 150)
    monkeypatch.setattr(classifiers, "CONV_MAX_STEPS", 3)
    monkeypatch.setattr(classifiers, "CONV_MIN_STEPS", 2)
    fit = shapes_reader.ShapesClassifier.fit
    monkeypatch.setattr(shapes_reader.ShapesClassifier, "fit", lambda self, progress: fit(self, 3, 128, progress))
    monkeypatch.setattr(text_image_run, "TEST_RENDERS", 20)


def call(*arguments: object) -> str:
    """Run a command line of heterodiff; what it prints."""
    out, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors), pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    assert end.value.code == 0, errors.getvalue()
    return out.getvalue()


def on_both(*arguments: object) -> tuple[str, str]:
    """The outputs of a command line on the device, which it must use, and on the CPU."""
    with watched() as counts:
        here = call(*arguments)
    assert counts.launches > 0
    with default_is_cpu(), watched() as counts:
        there = call(*arguments)
    assert counts.launches == 0
    return here, there


def folders(tmp_path: Path, *arguments: object) -> None:
    """A command's folders of pictures and arrays are alike on the device and on the CPU."""
    call(*arguments, "--out", tmp_path / "device")
    with default_is_cpu():
        call(*arguments, "--out", tmp_path / "cpu")
    names = sorted(path.relative_to(tmp_path / "cpu") for path in (tmp_path / "cpu").rglob("*") if path.is_file())
    assert names == sorted(p.relative_to(tmp_path / "device") for p in (tmp_path / "device").rglob("*") if p.is_file())
    pictures = [name for name in names if name.suffix == ".png"]
    assert pictures
    for name in pictures:
        with Image.open(tmp_path / "device" / name) as here, Image.open(tmp_path / "cpu" / name) as there:
            difference = np.abs(np.asarray(here.convert("RGB"), int) - np.asarray(there.convert("RGB"), int))
        assert difference.mean() < 0.5, name


# ---- drawing --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def flow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flow") / "run"
    options = {"prediction": "flow", "learn_variance": False, "weighting": "none"}
    config = {f"diffusion__{key}": value for key, value in options.items()}
    train(pixels(folder, folder, training__steps=1, **config))
    return folder


@pytest.mark.parametrize("sampler", list_samplers())
def test_every_sampler_draws_the_same(sampler: str, runs: Runs, flow: Path) -> None:
    run = flow if sampler.startswith("flow") else runs("pixels")
    found = []
    for device in (NAME, "cpu"):
        pipeline = hd.load(run, device=device)
        options: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 3.0, "guidance_interval": (0.2, 0.8)}
        generators = [torch.Generator().manual_seed(k) for k in range(2)]
        with watched() as counts:
            plain = pipeline([1, 2], sampler=sampler, generator=generators, **options)
            limited = pipeline([1, 2], sampler=sampler, generator=generators, dynamic_threshold=0.9, **options)
        assert (counts.launches > 0) == (device == NAME)
        found.append((plain.images, limited.images))
    for here, there in zip(*found, strict=True):
        torch.testing.assert_close(here, there, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(*found[0], atol=1e-3)


def test_a_generator_of_the_device_draws_too(runs: Runs) -> None:
    pipeline = hd.load(runs("pixels"))
    drawn = [
        pipeline(1, 2, sampler="ddpm", num_inference_steps=2, generator=torch.Generator(d).manual_seed(1)).images
        for d in (NAME, "cpu")
    ]
    torch.testing.assert_close(*drawn, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("recipe", ["pixels", "cached latents"])
def test_sample(recipe: str, runs: Runs, tmp_path: Path) -> None:
    folders(tmp_path, "sample", runs(recipe), "-n", 1, "--steps", 2)


@pytest.mark.parametrize("recipe", ["text-image", "joint"])
def test_text2image(recipe: str, runs: Runs, tmp_path: Path) -> None:
    options = ["-n", 2, "--steps", 2, "--candidates", 2, "--negative", "a blue square", "--guidance", 2]
    folders(tmp_path, "text2image", runs(recipe), "a red circle", "a green square", *options)


def test_text2image_without_diffusion(runs: Runs, tmp_path: Path) -> None:
    folders(tmp_path, "text2image", runs("alignment"), "a red circle", "--direct")


def test_caption(runs: Runs, tmp_path: Path) -> None:
    files = []
    for k in range(2):
        files.append(tmp_path / f"{k}.png")
        noise = np.random.default_rng(k).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(noise).save(files[-1])
    for options in ([], ["-n", 2, "--top-k", 5, "--repetition-penalty", 1.5]):
        here, there = on_both("caption", runs("text-image"), *files, "--json", *options)
        assert here == there
        assert here.count("\n") == (4 if options else 2)


# ---- anomalies ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["label-difference", "forward-process", "ddib", "partial-noising"])
def test_segment_and_evaluate_anomalies(method: str, tmp_path: Path) -> None:
    phantom = {"patients": 6, "slices_per_patient": 2, "contrast": 3, "lesion_radius": [0.25, 0.35]}
    small = {"data__image_size": 32, "data__brain_phantom": phantom, "training__preview_every": 100}
    network = {"model__channel_mult": [1], "segmentation__num_inference_steps": 3, "training__precision": "float32"}
    run = tmp_path / "run"
    score = "peak" if method == "ddib" else "method"  # one by which a network that learned nothing can be calibrated
    train(settings(run, segmentation__method=method, segmentation__score=score, **small, **network))
    shutil.copytree(run, tmp_path / "cpu")
    call("segment", run, "--calibrate")
    here = json.loads(call("evaluate", run, "--json"))
    with default_is_cpu():
        call("segment", tmp_path / "cpu", "--calibrate")
        there = json.loads(call("evaluate", tmp_path / "cpu", "--json"))
    assert_close(here, there, "")


def test_a_segmentation_network_learns_and_marks_on_the_device() -> None:
    images, truth, labels = bright_squares(8)
    here, there = (
        train_mask_network(images, truth, np.zeros_like(truth), labels, steps=3, seed=0, device=device)
        for device in (find_device(None), torch.device("cpu"))
    )
    assert (here.network.device.type, there.network.device.type) == (find_device(None).type, "cpu") != ("cpu", "cpu")
    found, expected = (network.segment(images.batch(range(8))[0], 3, 0) for network in (here, there))
    np.testing.assert_allclose(found.maps, expected.maps, atol=1e-3)
    np.testing.assert_allclose(found.score, expected.score, atol=1e-2)


def test_segment_a_folder_of_patients(tmp_path: Path) -> None:
    config = volumes.settings(tmp_path / "run", volumes.patients(tmp_path / "data"))
    train(config.model_copy(update={"training": config.training.model_copy(update={"precision": "float32"})}))
    volumes.save_calibration(tmp_path / "run", volumes.CALIBRATION, config.segmentation)
    volumes.write_patient(tmp_path / "patients", "a", np.eye(4))
    folders(tmp_path, "segment", tmp_path / "run", tmp_path / "patients")
    maps = [nibabel.load(tmp_path / place / "a" / "anomaly.nii.gz").get_fdata() for place in ("device", "cpu")]
    np.testing.assert_allclose(*maps, rtol=1e-3, atol=1e-4)


def assert_close(here: Any, there: Any, place: str) -> None:
    """Nested numbers are equal to rounding; clocks, paths and words aside."""
    if isinstance(here, dict):
        assert here.keys() == there.keys(), place
        for key in here:
            if "second" not in key:
                assert_close(here[key], there[key], f"{place}/{key}")
    elif isinstance(here, list):
        assert len(here) == len(there), place
        for k, (one, other) in enumerate(zip(here, there, strict=True)):
            assert_close(one, other, f"{place}/{k}")
    elif isinstance(here, float):
        assert here == pytest.approx(there, rel=2e-2, abs=2e-3, nan_ok=True), place
    elif not isinstance(here, str):
        assert here == there, place


# ---- measuring ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "options"),
    [
        ("pixels", ["-n", 2, "--steps", 2]),
        ("cached latents", ["-n", 2, "--steps", 2]),
        ("pixels", ["--augmentation", "-n", 3, "--seeds", 1, "--steps", 2]),
        ("vae", []),
        ("text-image", ["-n", 4, "--steps", 2]),
        ("alignment", ["-n", 4]),
    ],
)
def test_evaluate(recipe: str, options: list[object], runs: Runs, tmp_path: Path) -> None:
    shutil.copytree(runs(recipe), tmp_path / "run")
    here, there = map(json.loads, on_both("evaluate", tmp_path / "run", "--json", *options))
    assert_close(here, there, "")


# ---- files ----------------------------------------------------------------------------------------------------------


def test_encode(runs: Runs, tmp_path: Path) -> None:
    overrides = ["data.image_size=16", "--vae", runs("vae"), "--batch-size", 500]
    printed = {}
    for place in ("device", "cpu"):
        with default_is_cpu() if place == "cpu" else contextlib.nullcontext():
            printed[place] = call("encode", "digits", *overrides, "--out", tmp_path / place)
    lines = [[line for line in text.splitlines() if line.startswith("std")] for text in printed.values()]
    assert lines[0] == lines[1]
    from safetensors.torch import load_file

    shards = sorted((tmp_path / "device").rglob("*.safetensors"))
    assert shards
    for shard in shards:
        expected = load_file(tmp_path / "cpu" / shard.relative_to(tmp_path / "device"))
        for name, value in load_file(shard).items():
            torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-3)


def test_import(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = {
        "sample_size": 16,
        "in_channels": 2,
        "out_channels": 2,
        "model_channels": 32,
        "layers_per_block": 1,
        "channel_mult": (1,),
        "attention_resolutions": (),
        "num_classes": 3,
        "num_heads": 2,
    }
    model = hd.create_model("unet", **config, class_embedding="direct")
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    given = ["image_size=16", "num_heads=2", "--format", "anofpdm"]
    call("import", tmp_path / "weights.safetensors", "--out", tmp_path / "model", *given)
    folders(tmp_path, "sample", tmp_path / "model", "-n", 1, "--steps", 2)
