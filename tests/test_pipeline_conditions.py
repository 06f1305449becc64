"""Runs with images and columns as conditions: the same in training and in sampling, exact on resuming, from the CLI."""

import json
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import heterodiff as hd
from heterodiff.cli import main
from heterodiff.data.conditions import split_condition
from heterodiff.data.sources import load_data
from heterodiff.diffusion.guidance import join_conditions
from heterodiff.diffusion.samplers import list_samplers
from heterodiff.errors import ConfigError
from heterodiff.models.conditioning import Conditions
from heterodiff.models.variants import VARIANTS, create_model
from heterodiff.pipelines.conditions import ConditionWarning, conditions_of
from heterodiff.training.recipes.diffusion import build
from heterodiff.training.start import train
from tests.training_runs import assert_same_run, tiny_config
from tests.vae_runs import latent_config, plain_vae

RADAR: dict[str, Any] = {
    "data__source": "microdoppler",
    "data__image_size": 16,
    "data__microdoppler": {"images_per_class": 4},
    "data__conditions": {"speed_m_s": "number", "aspect_deg": "number"},
}
SMALL = {"model__variant": "unet-conv", "model__channel_mult": [1, 2]}


def both(output: Path, **overrides: Any) -> Any:
    """A run with an image and two numbers as conditions, beside the class."""
    return tiny_config(output, **RADAR | {"data__condition": {"downscale": 2}} | SMALL | overrides)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("conditions") / "run"
    train(both(output, training__steps=20), quiet=True)
    return output


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_attributes_steer_every_network_row_by_row(variant: str) -> None:
    torch.manual_seed(0)
    sizes = {"in_channels": 1, "model_channels": 32, "channel_mult": (1, 2), "layers_per_block": 1, "sample_size": 8}
    model = create_model(variant, **sizes, num_classes=3, attributes=(4, 0)).eval()
    for name, parameter in model.named_parameters():
        if parameter.abs().max() == 0:  # outputs are zero at first
            torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(len(name)))
    x, t, y = torch.randn(4, 1, 8, 8), torch.tensor([5, 400, 900, 30]), torch.tensor([0, -1, 2, 1])
    given = torch.tensor([[1, 0.3], [math.nan, -1.2], [3, math.nan], [math.nan, math.nan]])
    with torch.no_grad():
        found = model(x, t, y, attributes=given).sample
        for row in range(4):  # a row depends on its own condition alone
            one = slice(row, row + 1)
            torch.testing.assert_close(
                model(x[one], t[one], y[one], attributes=given[one]).sample, found[one], atol=1e-5, rtol=1e-5
            )
        torch.testing.assert_close(model(x[3:], t[3:], y[3:]).sample, found[3:], atol=1e-5, rtol=1e-5)  # none is none
        for row, place in ((0, 0), (0, 1), (1, 1), (2, 0)):
            changed = given.clone()
            changed[row, place] = 2
            assert not torch.allclose(model(x, t, y, attributes=changed).sample[row], found[row], atol=1e-4)
    for wrong, message in ((given[:2], r"attributes: expected shape \(4, 2\)"), (given[:, :1], "expected shape")):
        with pytest.raises(ConfigError, match=message):
            model(x, t, y, attributes=wrong)
    with pytest.raises(ConfigError, match="built without any"):
        create_model(variant, **sizes)(x, t, attributes=given)


def test_training_and_sampling_see_the_same_condition(run: Path) -> None:
    """The prediction of the recipe's loss is that of the pipeline given the same values by name."""
    config = both(run)
    data = load_data(config.data)
    recipe, pipeline = build(config, data), hd.load(run)
    recipe.model.load_state_dict(pipeline.unet.state_dict())
    recipe.model.eval()  # without dropout
    rows = list(range(6))
    images, labels = data.train.inputs(rows)
    draws = recipe.draw(0, 6, torch.Generator().manual_seed(0), torch.device("cpu"))
    draws.drop = torch.tensor([True, False, False, False, True, False])
    draws.drop_each = torch.zeros(6, 2, dtype=torch.bool)
    draws.drop_each[2, 0] = True
    seen: dict[str, torch.Tensor] = {}
    inputs = recipe.prepare(images)
    recipe.losses(
        lambda x, t, **given: seen.update(x=x, t=t, **given) or recipe.model(x, t, **given), inputs, labels, draws
    )
    whole, condition = split_condition(images, data.spec)
    speed, aspect = data.spec.attributes
    values = {one.name: [] for one in (speed, aspect)}
    for row, (_, *numbers) in enumerate(labels.tolist()):
        for one, number in zip((speed, aspect), numbers, strict=True):
            hidden = row in (0, 4) or (row, one) == (2, speed)
            values[one.name].append(None if hidden else one.mean + one.std * number)
    classes = torch.where(draws.drop, -1, data.train.labels_of(rows))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConditionWarning)  # rounded, the least and greatest are outside
        given, null = conditions_of(pipeline, classes, condition, values, None)
    dropped = draws.drop[:, None, None, None]
    assert torch.equal(seen["class_labels"], given.labels)
    torch.testing.assert_close(seen["attributes"], given.attributes, equal_nan=True, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(seen["x"][:, 1:], torch.where(dropped, 0, given.image))
    with torch.no_grad():
        expected = recipe.model(seen["x"], seen["t"], class_labels=classes, attributes=seen["attributes"]).sample
        without = Conditions(given.labels, given.attributes, torch.where(dropped, 0, given.image))
        found = pipeline.predict(seen["x"][:, :1], seen["t"], without)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        bare = pipeline.predict(seen["x"][:, :1], seen["t"], null.labels)  # labels alone: no image, no numbers
        torch.testing.assert_close(bare, pipeline.predict(seen["x"][:, :1], seen["t"], null), atol=1e-5, rtol=1e-5)
    assert whole.shape == (6, 1, 16, 16)


def test_the_loss_depends_on_every_condition(run: Path) -> None:
    config = both(run)
    data = load_data(config.data)
    recipe = build(config, data)
    recipe.model.load_state_dict(hd.load(run).unet.state_dict())
    images, labels = data.train.inputs([0, 1])
    draws = recipe.draw(0, 2, torch.Generator().manual_seed(0), torch.device("cpu"))
    draws.drop[:], draws.drop_each[:] = False, False
    inputs, labels = recipe.prepare(images).requires_grad_(), labels.requires_grad_()
    recipe.losses(recipe.model, inputs, labels, draws).each.sum().backward()
    assert (inputs.grad[:, 1:].abs().amax(dim=(1, 2, 3)) > 0).all()
    assert (labels.grad[:, 1:].abs() > 0).all()


def test_guidance_over_one_condition_alone_keeps_the_others(run: Path) -> None:
    pipeline, labels = hd.load(run), torch.tensor([1, 2])
    image = torch.rand(2, 1, 16, 16)
    values = {"speed_m_s": 3, "aspect_deg": [10, 150]}
    given, null = conditions_of(pipeline, labels, image, values, ["aspect_deg"])
    assert torch.equal(null.labels, labels)
    assert torch.equal(null.image, given.image)
    assert torch.equal(null.attributes[:, 0], given.attributes[:, 0])
    assert null.attributes[:, 1].isnan().all()
    joined = join_conditions(given, null)
    assert joined.labels.tolist() == [1, 2, 1, 2]
    assert joined.image.shape[0] == 4
    _, null = conditions_of(pipeline, labels, image, values, None)
    assert (null.labels.tolist(), float(null.image.abs().max()), bool(null.attributes.isnan().all())) == (
        [-1, -1],
        0,
        True,
    )


@pytest.mark.parametrize("sampler", list_samplers())
def test_every_sampler_draws_of_conditions(run: Path, sampler: str) -> None:
    pipeline = hd.load(run)
    small = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    options = {"num_inference_steps": 3, "sampler": sampler, "conditions": {"speed_m_s": 2.0}}
    drawn = pipeline.translate(
        small, [0, 1], 2, generator=[torch.Generator().manual_seed(k) for k in range(4)], **options
    )
    assert drawn.shape == (2, 2, 1, 16, 16)
    assert torch.isfinite(drawn).all()
    generators = [torch.Generator().manual_seed(k) for k in (2, 3)]
    alone = pipeline.translate(small[1:], [1], 2, generator=generators, **options)
    torch.testing.assert_close(alone[0], drawn[1], atol=1e-4, rtol=1e-4)  # whatever else is drawn with it
    larger = pipeline.translate(torch.rand(1, 1, 12, 20), generator=torch.Generator().manual_seed(0), **options)
    assert larger.shape == (1, 1, 1, 24, 40)  # of twice its size, whatever that is


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "channels": ({"condition_images": torch.rand(2, 3, 16, 16)}, r"expected \(2, 1, H, W\), one an image"),
    "number of images": ({"condition_images": torch.rand(3, 1, 16, 16)}, r"expected \(2, 1, H, W\)"),
    "size": ({"condition_images": torch.rand(2, 1, 15, 16)}, "image size 15x16"),
    "name": ({"conditions": {"sped_m_s": 3}}, "unknown condition 'sped_m_s'.*speed_m_s"),
    "text": ({"conditions": {"speed_m_s": "fast"}}, "speed_m_s: expected a finite number, found fast"),
    "count": ({"conditions": {"speed_m_s": [1, 2, 3]}}, "3 values for 2 images"),
    "guide": ({"guide": ["user"]}, "unknown column to guide by 'user'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_conditions_are_refused(run: Path, case: str) -> None:
    options, message = WRONG[case]
    with pytest.raises(ConfigError, match=message):
        hd.load(run)([0, 1], num_inference_steps=2, **options)


def test_numbers_outside_the_training_range_are_warned_about(run: Path) -> None:
    with pytest.warns(ConditionWarning, match="speed_m_s=400 is outside the training images'"):
        hd.load(run)([0], num_inference_steps=2, conditions={"speed_m_s": 400})


def test_models_without_conditions_refuse_them(tmp_path: Path) -> None:
    train(tiny_config(tmp_path / "run", training__steps=2), quiet=True)
    pipeline = hd.load(tmp_path / "run")
    for options, message in (
        ({"condition_images": torch.rand(1, 1, 8, 8)}, r"trained without data\.condition"),
        ({"conditions": {"speed": 1}}, r"trained without data\.conditions"),
        ({"guide": ["speed"]}, r"trained without data\.conditions"),
    ):
        with pytest.raises(ConfigError, match=message):
            pipeline([0], **options)
    with pytest.raises(ConfigError, match="trained without images as conditions"):
        pipeline.translate(torch.rand(1, 1, 8, 8))


def test_runs_with_conditions_resume_bit_by_bit(tmp_path: Path) -> None:
    for name, stops in (("whole", (None,)), ("parts", (7, None))):
        for stop in stops:
            train(both(tmp_path / name, data__horizontal_flip=True), stop_after=stop, quiet=True)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize("posterior", ["sample", "mode"])
def test_latents_with_conditions(tmp_path: Path, posterior: str) -> None:
    """Images are encoded with every batch, and the condition keeps all of its pixels as channels."""
    plain_vae().save_pretrained(tmp_path / "vae")
    options: dict[str, Any] = {"codec__posterior": posterior, "codec__statistics": "measured", **SMALL}
    options |= RADAR | {"data__condition": {"edges": True}, "training__steps": 3}
    train(latent_config(tmp_path / "run", tmp_path / "vae", **options), quiet=True)
    pipeline = hd.load(tmp_path / "run")
    assert pipeline.unet.config.in_channels == 4 + 16  # of a VAE of four channels and a factor of four
    drawn = pipeline.translate(torch.rand(1, 1, 16, 16), 0, 2, ready=False, num_inference_steps=2)
    assert drawn.shape == (1, 2, 1, 16, 16)


@pytest.mark.parametrize(
    "condition", [{"channels": [1, 3]}, {"mask": True}, {"downscale": 2}], ids=lambda c: next(iter(c))
)
def test_a_vae_that_is_trained_first_sees_the_images_alone(tmp_path: Path, condition: dict[str, Any]) -> None:
    config = latent_config(
        tmp_path / "run",
        tmp_path / "vae",
        data__source="brain-phantom",
        data__image_size=32,
        data__brain_phantom={"patients": 6, "slices_per_patient": 3},
        data__condition=condition,
        codec__training={"steps": 2, "batch_size": 4, "warmup_steps": 0, "preview_every": 2, "tensorboard": False},
        codec__statistics="measured",
        vae__block_out_channels=[8, 8, 8],
        training__steps=2,
        **SMALL,
    )
    train(config, quiet=True)
    pipeline = hd.load(tmp_path / "run")
    drawn = 2 if "channels" in condition else 4
    assert pipeline.vae.config.in_channels == drawn
    given = torch.rand(
        1,
        {"channels": 2, "mask": 1, "downscale": 4}[next(iter(condition))],
        *[16 if "downscale" in condition else 32] * 2,
    )
    assert pipeline.translate(given, num_inference_steps=2).shape == (1, 1, drawn, 32, 32)


def test_stored_latents_keep_the_columns_of_their_images(tmp_path: Path) -> None:
    plain_vae().save_pretrained(tmp_path / "vae")
    options = {"codec__statistics": "measured", **SMALL}
    for name, stops in (("whole", (None,)), ("parts", (2, None))):
        for stop in stops:
            config = latent_config(tmp_path / name, tmp_path / "vae", training__steps=5, **RADAR, **options)
            train(config, stop_after=stop, quiet=True)
    assert (tmp_path / "whole" / "latents").is_dir()
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    assert hd.load(tmp_path / "whole")([0], num_inference_steps=2, conditions={"speed_m_s": 2}).images.shape[0] == 1


# ---- from the command line


def cli(capsys: pytest.CaptureFixture, *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as exit_:
        main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    return int(exit_.value.code or 0), printed.out, printed.err


def test_translate_writes_images_of_condition_images(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    values = np.random.default_rng(0).random((1, 8, 8), np.float32) * -45
    for name in ("a", "b"):
        np.save(tmp_path / f"{name}.npy", values)
    np.save(tmp_path / "whole.npy", np.random.default_rng(1).random((1, 16, 16), np.float32) * -45)
    out = tmp_path / "out"
    options = ["--steps", 2, "--set", "speed_m_s=2", "--class", "walking"]
    code, printed, _ = cli(
        capsys, "translate", run, tmp_path / "a.npy", tmp_path / "b.npy", "-n", 2, *options, "--out", out
    )
    assert code == 0, printed
    assert "drawn    4 images" in printed
    assert sorted(path.name for path in out.glob("?_*.npy")) == ["a_0000.npy", "a_0001.npy", "b_0000.npy", "b_0001.npy"]
    assert np.load(out / "a_0000.npy").shape == (1, 16, 16)
    with Image.open(out / "grid.png") as grid:
        assert grid.size[0] > 48
    settings = json.loads((out / "settings.json").read_text())
    assert (settings["set"], settings["class"], settings["whole"]) == ({"speed_m_s": "2"}, "walking", False)
    code, printed, _ = cli(
        capsys, "translate", run, tmp_path / "whole.npy", "--whole", "--steps", 2, "--out", tmp_path / "w"
    )
    assert (code, (tmp_path / "w" / "whole_0000.npy").is_file()) == (0, True)


def test_sample_takes_values_of_conditions(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    sample = ["sample", run, "--class", "bird", "-n", 1, "--steps", 2, "--out", tmp_path / "out"]
    code, _, noted = cli(capsys, *sample, "--set", "speed_m_s=99", "--set", "aspect_deg=20", "--guide", "aspect_deg")
    assert (code, noted.count("note     speed_m_s=99 is outside")) == (0, 1)
    for wrong, message in (
        (["--set", "speed_m_s"], "--set speed_m_s: expected NAME=VALUE"),
        (["--set", "speed_m_s=1", "--set", "speed_m_s=2"], "--set speed_m_s: given twice"),
        (["--set", "user=3"], "unknown condition 'user'"),
        (["--set", "speed_m_s=slow"], "speed_m_s: expected a finite number, found slow"),
    ):
        code, _, error = cli(capsys, *sample[:-1], tmp_path / "other", *wrong)
        assert (code, message in error) == (1, True), error
    assert not (tmp_path / "other").exists()


def test_evaluate_compares_with_the_true_images(run: Path, capsys: pytest.CaptureFixture) -> None:
    code, printed, _ = cli(capsys, "evaluate", run, "-n", 2, "--steps", 2)
    assert code == 0
    found = json.loads((run / "evaluation.json").read_text())["translation"]
    assert (found["n"], found["condition"], found["baseline"]) == (2, "downscale", "bicubic")
    data = load_data(both(run).data)
    images, conditions = split_condition(data.val.inputs([0, len(data.val) - 1])[0], data.spec)
    error = (images - conditions).square().mean(dim=(1, 2, 3))
    assert found["psnr"]["baseline"]["mean"] == pytest.approx(float((-10 * error.log10()).mean()), abs=1e-3)
    assert "PSNR     drawn" in printed
    assert "Beside the true images" in (run / "report.html").read_text()


def test_runs_with_images_as_conditions_do_not_segment(run: Path, capsys: pytest.CaptureFixture) -> None:
    code, _, error = cli(capsys, "segment", run, "--calibrate")
    assert (code, "this run draws them of images (data.condition): train one without" in error) == (1, True)


def test_translate_needs_a_run_with_images_as_conditions(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    train(tiny_config(tmp_path / "run", training__steps=2), quiet=True)
    code, _, error = cli(capsys, "translate", tmp_path / "run", tmp_path / "x.png")
    assert (code, "trained without images as conditions (data.condition); `heterodiff edit`" in error) == (1, True)
