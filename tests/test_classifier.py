"""Recipe ``classifier`` learns classes of noisy images, resumes exactly, is measured, and guides a denoiser."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import heterodiff as hd
from heterodiff.cli import main
from heterodiff.config import RunConfig
from heterodiff.config.file import parse_config
from heterodiff.data.sources import load_data
from heterodiff.errors import ConfigError, DataError, RunError
from heterodiff.models.classifier import NoisyClassifier
from heterodiff.models.variants import VARIANTS
from heterodiff.pipelines.anomalies.segment import Segmenter
from heterodiff.pipelines.load import load_classifier, load_generation
from heterodiff.training.build import build_recipe
from heterodiff.training.start import train
from tests.training_runs import last_checkpoint, losses_of

DATA = {"source": "brain-phantom", "image_size": 32, "val_fraction": 0.2, "test_fraction": 0.2}
DATA["brain_phantom"] = {"patients": 8, "slices_per_patient": 12}
NETWORK = {"model_channels": 32, "channel_mult": [1, 1], "layers_per_block": 1, "patch_size": 4}
QUIET = {"batch_size": 8, "warmup_steps": 1, "log_every": 1, "tensorboard": False, "preview_every": 100}


def config(output: Path, recipe: str = "classifier", steps: int = 6, **sections: Any) -> RunConfig:
    content: dict[str, Any] = {"recipe": recipe, "output": str(output), "data": DATA, "model": NETWORK}
    content["training"] = {**QUIET, "steps": steps, "checkpoint_every": 2}
    for name, changes in sections.items():
        content[name] = {**content.get(name, {}), **changes}
    return parse_config(content)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("classifier") / "run"
    train(config(run), quiet=True)
    return run


@pytest.fixture(scope="module")
def denoiser(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("denoiser") / "run"
    train(config(run, "diffusion", 2), quiet=True)
    return run


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_variant_has_a_classifier(variant: str) -> None:
    """Log odds depend on image and time alone; all weights get a gradient; the decoder is not there."""
    torch.manual_seed(0)
    size = {"sample_size": 8, "in_channels": 2, "model_channels": 32, "channel_mult": (1, 1), "layers_per_block": 1}
    network = NoisyClassifier(variant=variant, out_channels=3, **size)
    denoiser = hd.create_model(variant, **size)
    assert sum(p.numel() for p in network.parameters()) < 0.75 * sum(p.numel() for p in denoiser.parameters())
    x = torch.randn(4, 2, 8, 8)
    found = network(x, torch.tensor([1.0, 1.0, 500.0, 1.0]))
    assert found.shape == (4, 3)
    torch.testing.assert_close(network(x[1:2], 1.0), found[1:2], atol=1e-5, rtol=1e-4)
    found.square().sum().backward()
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in network.parameters())
    whole = network.log_probability(x, 3.0, 0).exp() + network.log_probability(x, 3.0, 1).exp()
    torch.testing.assert_close(whole + network.log_probability(x, 3.0, 2).exp(), torch.ones(4))


def test_a_resumed_run_equals_one_that_was_not_interrupted(classifier: Path, tmp_path: Path) -> None:
    train(config(tmp_path / "run"), quiet=True, stop_after=3)
    train(config(tmp_path / "run"), quiet=True)
    (step, tensors, _), (other_step, others, _) = (last_checkpoint(run) for run in (classifier, tmp_path / "run"))
    assert step == other_step == 6
    assert [name for name in tensors if not torch.equal(tensors[name], others[name])] == []
    assert losses_of(classifier) == losses_of(tmp_path / "run")
    weights = "classifier/diffusion_pytorch_model.safetensors"
    assert (classifier / weights).read_bytes() == (tmp_path / "run" / weights).read_bytes()


def test_it_learns_what_tells_the_classes(tmp_path: Path) -> None:
    """Digits: after some steps well above chance where noise is low, and no better than chance on pure noise."""
    run = tmp_path / "run"
    network = {"model_channels": 32, "channel_mult": [1, 1], "layers_per_block": 1}
    training = {**QUIET, "steps": 60, "batch_size": 32, "learning_rate": 1e-3, "log_every": 50, "ema_decay": 0.8}
    content = {"recipe": "classifier", "data": {"source": "digits"}, "model": network, "training": training}
    train(parse_config({**content, "output": str(run)}), quiet=True)
    pipeline = load_classifier(run, "cpu")
    images, labels = (data := load_data(RunConfig(data={"source": "digits"}).data).val).batch(range(len(data)))
    right = [
        float((pipeline(images, level, torch.Generator().manual_seed(0)).argmax(dim=1) == labels).float().mean())
        for level in (0.0, 1.0)
    ]
    assert right[0] > 0.5
    assert right[1] < 0.3


def test_unlabelled_images_do_not_count(classifier: Path) -> None:
    recipe = build_recipe(config(classifier), load_data(config(classifier).data))
    draws = recipe.draw(0, 3, torch.Generator().manual_seed(0), torch.device("cpu"))
    found = recipe.losses(recipe.model, torch.zeros(3, 4, 32, 32), torch.tensor([0, -1, 1]), draws)
    assert found.each[1] == 0
    assert bool((found.each[[0, 2]] > 0).all())
    assert recipe.validate([(torch.zeros(2, 4, 32, 32), torch.tensor([-1, -1]))], 0) == {}


def call(*arguments: object) -> int | str | None:
    with pytest.raises(SystemExit) as ended:
        main([*map(str, arguments)])
    return ended.value.code


def test_it_is_checked_and_evaluated(classifier: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("check", classifier) == 0
    assert "probabilities of 2 classes of a picture of noise" in capsys.readouterr().out
    assert call("evaluate", classifier) == 0
    printed = capsys.readouterr().out
    assert printed.count("class accuracy at noise level") == 6
    found = json.loads((classifier / "evaluation.json").read_text())
    assert [row["level"] for row in found["noise_levels"]] == [0.0, 0.1, 0.25, 0.5, 0.75, 0.9]
    report = (classifier / "report.html").read_text()
    assert "Classes of noisy images" in report
    assert "Class accuracy at noise level 0.50" in report
    with pytest.raises(RunError, match=r"draws none; let it guide a denoiser .*segmentation\.classifier="):
        load_generation(classifier)
    with pytest.raises(ConfigError, match="a classifier computes in float32"):
        hd.load(classifier, dtype="bfloat16")


def test_images_without_two_classes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="needs at least two classes, found images without labels"):
        train(config(tmp_path / "run", data={"labels": "none"}), quiet=True)


# ---- guidance --------------------------------------------------------------------------------------------------------


def guided(classifier: Path, **changes: Any) -> Any:
    section = {"method": "classifier-guidance", "classifier": str(classifier), "num_inference_steps": 3, **changes}
    return parse_config({"data": DATA, "segmentation": section}).segmentation


@pytest.fixture(scope="module")
def unlabelled(tmp_path_factory: pytest.TempPathFactory, classifier: Path) -> Path:
    """A run whose denoiser has never seen a label; every image counts as healthy when it is calibrated."""
    run = tmp_path_factory.mktemp("unlabelled") / "run"
    segmentation = {"method": "classifier-guidance", "classifier": str(classifier), "num_inference_steps": 2}
    segmentation |= {"network_steps": 0, "threshold": "half-peak"}
    train(config(run, "diffusion", 2, data={"labels": "none"}, segmentation=segmentation), quiet=True)
    return run


@pytest.mark.parametrize("kind", ["denoiser", "unlabelled"])
def test_maps_depend_on_the_classifier(kind: str, classifier: Path, request: pytest.FixtureRequest) -> None:
    pipeline, images = load_generation(request.getfixturevalue(kind), "cpu"), torch.rand(2, 4, 32, 32)
    maps = {scale: Segmenter(pipeline, guided(classifier, classifier_scale=scale)).maps(images) for scale in (0, 50)}
    assert maps[0].maps.shape == (2, 4, 32, 32)
    assert not torch.allclose(maps[0].maps, maps[50].maps)
    assert maps[50].calls.tolist() == [9, 9]


def test_calibrated_and_evaluated_from_the_command_line(unlabelled: Path) -> None:
    assert call("segment", unlabelled, "--calibrate") == 0
    assert call("evaluate", unlabelled) == 0
    found = json.loads((unlabelled / "evaluation.json").read_text())
    assert found["settings"]["method"] == "classifier-guidance"
    assert found["calls_per_image"] == 6
    assert np.isfinite(found["unhealthy"]["dice"]["mean"])


WRONG = {
    "noise levels": (
        {"diffusion": {"num_train_timesteps": 500}},
        "number of noise levels of the denoiser, 1000, found 500",
    ),
    "schedule": ({"diffusion": {"schedule": "linear"}}, "diffusion.schedule of the denoiser, found another"),
    "path": ({"diffusion": {"prediction": "flow"}}, "schedule of the denoiser, kind vp, found kind flow"),
    "noise": ({"diffusion": {"noise": "simplex"}}, "noise of the denoiser, gaussian, found simplex"),
    "size": ({"data": {"image_size": 48}}, "image size of the denoiser, 4x32x32, found 4x48x48"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_classifier_of_other_images_is_refused(case: str, denoiser: Path, tmp_path: Path) -> None:
    changes, message = WRONG[case]
    train(config(tmp_path / "run", steps=1, **changes), quiet=True)
    with pytest.raises(
        ConfigError, match=re.escape(f"segmentation.classifier={tmp_path / 'run'}: expected the {message}")
    ):
        Segmenter(load_generation(denoiser, "cpu"), guided(tmp_path / "run"))


def test_what_is_no_classifier_of_these_classes(classifier: Path, denoiser: Path, tmp_path: Path) -> None:
    pipeline = load_generation(denoiser, "cpu")
    with pytest.raises(
        ConfigError, match=r"knows the classes healthy, unhealthy; none of them is segmentation\.healthy=well"
    ):
        Segmenter(pipeline, guided(classifier, healthy="well"))
    pipeline.class_names = ("healthy", "ill")
    with pytest.raises(ConfigError, match="classes of the denoiser, healthy, ill, found healthy, unhealthy"):
        Segmenter(pipeline, guided(classifier))
    with pytest.raises(RunError, match="expected a run of recipe classifier"):
        Segmenter(pipeline, guided(denoiser))
    with pytest.raises(RunError, match=r"no such run folder|no such folder"):
        Segmenter(pipeline, guided(tmp_path / "nothing"))
    with pytest.raises(ConfigError, match=r"needs segmentation\.classifier: a run of recipe classifier"):
        parse_config({"data": DATA, "segmentation": {"method": "classifier-guidance"}})
