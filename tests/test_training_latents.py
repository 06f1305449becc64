"""Training on latents: the same however they are kept, checked before the first step, of use without the images."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import heterodiff
from heterodiff.codecs.kl_vae import KLVAECodec, load_vae
from heterodiff.config import CodecConfig, DataConfig, RunConfig
from heterodiff.config.file import dump_config, load_config
from heterodiff.data.sources import load_data
from heterodiff.errors import CheckpointError, ConfigError, DataError, HeterodiffError, RunError
from heterodiff.pipelines.generate import GenerationPipeline
from heterodiff.training.build import build_recipe
from heterodiff.training.codec_stage import codec_run
from heterodiff.training.latents import prepare_latents
from heterodiff.training.loop import Trainer
from heterodiff.training.preflight.trial import dry_run
from heterodiff.training.recipes.diffusion import DiffusionRecipe
from heterodiff.training.recipes.vae import VAERecipe
from heterodiff.training.start import train
from tests.test_cli import call
from tests.training_runs import assert_same_run, losses_of
from tests.vae_runs import latent_config, plain_vae, vae_config

WEIGHTS = "vae/diffusion_pytorch_model.safetensors"
SHORT = {"training__steps": 4, "training__log_every": 1}


@pytest.fixture
def vae(digits_vae: Path) -> Path:
    return digits_vae


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """A VAE of other images, with the factor that fits those."""
    plain_vae(scaling_factor=0.18215).save_pretrained(tmp_path / "foreign")
    return tmp_path / "foreign"


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """24 digits as files of two classes."""
    digits = load_data(DataConfig(source="digits", image_size=(16, 16))).train.batch(range(24))[0]
    for k, digit in enumerate(digits):
        file = tmp_path / "images" / "ab"[k % 2] / f"{k}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((digit[0] * 255).byte().numpy()).save(file)
    return tmp_path / "images"


def source_of(images: Path) -> dict[str, Any]:
    return {"data__source": "images", "data__path": str(images), "data__image_size": None}


def losses_while_training(config: RunConfig) -> list[float]:
    losses: list[float] = []
    train(config, quiet=True, on_step=lambda _, loss: losses.append(loss))
    return losses


def write(config: RunConfig, file: Path) -> Path:
    file.write_text(dump_config(config))
    return file


# ---- the same training, however latents are kept --------------------------------------------------------------------


@pytest.mark.parametrize("posterior", ["sample", "mode"])
def test_cached_encoded_and_stored_latents_train_alike(posterior: str, vae: Path, tmp_path: Path) -> None:
    options = {"training__steps": 20, "codec__posterior": posterior}
    cached = losses_while_training(latent_config(tmp_path / "cached", vae, **options))
    every = losses_while_training(latent_config(tmp_path / "every", vae, codec__cache=False, **options))
    assert len(cached) == len(set(cached)) == 20
    assert every == pytest.approx(cached, abs=1e-3)  # cached latents are float16
    assert every != cached
    assert not (tmp_path / "every" / "latents").exists()
    if posterior == "mode":
        return
    config = write(latent_config(tmp_path / "x", vae), tmp_path / "images.yaml")
    assert call("encode", config, "--vae", vae, "--out", tmp_path / "latents") == 0
    source = {"data__source": "latents", "data__path": str(tmp_path / "latents"), "data__image_size": None}
    assert losses_while_training(latent_config(tmp_path / "stored", vae, **source, **options)) == cached
    assert not (tmp_path / "stored" / "latents").exists()
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "stored" / weights).read_bytes() == (tmp_path / "cached" / weights).read_bytes()


@pytest.mark.parametrize("posterior", ["sample", "mode"])
def test_latents_are_drawn_anew_each_time(posterior: str, vae: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two images in batches of two: every step is an epoch."""
    config = latent_config(vae / "unused", vae, codec__posterior=posterior, training__batch_size=2)
    data = load_data(config.data)
    recipe = build_recipe(config, data)
    assert isinstance(recipe, DiffusionRecipe)
    seen: list[torch.Tensor] = []
    original = KLVAECodec.draw
    monkeypatch.setattr(KLVAECodec, "draw", lambda *a: seen.append(original(*a)) or seen[-1])
    inputs, labels = data.train.batch([3, 4])
    posteriors = recipe.prepare(inputs)
    for step in range(3):
        draws = recipe.draw(step, 2, torch.Generator().manual_seed(step), torch.device("cpu"))
        recipe.losses(recipe.model, posteriors, labels, draws)
    differ = [not torch.equal(seen[0], z) for z in seen[1:]]
    assert differ == [posterior == "sample"] * 2
    mean, std = (part.double() for part in posteriors.chunk(2, dim=1))
    scale = torch.tensor(recipe.codec.vae.config.latents_std).view(-1, 1, 1)
    shift = torch.tensor(recipe.codec.vae.config.latents_mean).view(-1, 1, 1)
    noise = (torch.stack(seen).double() * scale + shift - mean) / std
    assert float(noise.abs().max()) < 6
    if posterior == "sample":
        assert 0.8 < float(noise.std()) < 1.2
    else:
        assert float((noise * std).abs().max()) < 1e-5


def test_two_processes_train_the_vae_and_its_latents(images: Path, tmp_path: Path) -> None:
    options = {"model__dropout": 0.0, "codec__training": training_of(3), **source_of(images), **SHORT}
    one = latent_config(tmp_path / "one", tmp_path / "vae_one", **vae_section(), **options)
    two = latent_config(tmp_path / "two", tmp_path / "vae_two", **vae_section(), **options)
    train(one, quiet=True)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "heterodiff.cli", "train"]
    done = subprocess.run(
        [sys.executable, *launch, str(write(two, tmp_path / "two.yaml"))],
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("done     step 4 of 4") == 1
    assert len(losses_of(tmp_path / "one")) == 4
    for expected, found in zip(losses_of(tmp_path / "one"), losses_of(tmp_path / "two"), strict=True):
        assert found == pytest.approx(expected, rel=1e-3)


# ---- the VAE first --------------------------------------------------------------------------------------------------


def training_of(steps: int) -> dict[str, Any]:
    return {"steps": steps, "batch_size": 8, "checkpoint_every": 2, "log_every": 1, "tensorboard": False}


def vae_section() -> dict[str, Any]:
    return {"vae__block_out_channels": [8, 8, 8]}


def two_stages(folder: Path, images: Path) -> RunConfig:
    options = {"codec__training": training_of(5), **vae_section(), **source_of(images), **SHORT}
    return latent_config(folder / "run", folder / "vae", **options)


def test_one_command_trains_the_vae_first(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = two_stages(tmp_path, images)
    file = write(config, tmp_path / "config.yaml")
    assert call("train", file, "--dry-run") == 0
    assert "AutoencoderKL to 4x4x4" in capsys.readouterr().out
    assert not (tmp_path / "vae").exists()
    assert call("train", file, "--stop-after", "2") == 0
    assert "stopped  at step 2 of 4" in capsys.readouterr().out
    before = (tmp_path / "vae" / WEIGHTS).stat().st_mtime_ns
    needed = codec_run(config)
    assert needed is None
    assert call("train", file) == 0
    out = capsys.readouterr().out
    assert "going on from step 2" in out
    assert "AutoencoderKL" not in out
    assert (tmp_path / "vae" / WEIGHTS).stat().st_mtime_ns == before
    assert (tmp_path / "run" / "report.html").is_file()
    # alike: the VAE trained by a command of its own, and used
    alone = vae_config(
        tmp_path / "alone", training__learning_rate=2e-4, training__ema_decay=0.9999, **source_of(images)
    )
    alone = alone.model_copy(update={"training": config.codec.training})
    train(alone, quiet=True)
    assert (tmp_path / "alone" / WEIGHTS).read_bytes() == (tmp_path / "vae" / WEIGHTS).read_bytes()
    assert losses_while_training(
        latent_config(tmp_path / "again", tmp_path / "alone", **source_of(images), **SHORT)
    ) == pytest.approx([loss for _, loss, _ in losses_of(tmp_path / "run")], rel=1e-12)
    monkeypatch.setattr(Trainer, "run", lambda *_: pytest.fail("trained again"))
    assert train(config, quiet=True).step == 4


@pytest.mark.parametrize(("where", "step"), [("observe", 3), ("preview", 5)])
def test_stopped_while_the_vae_trains(
    where: str, step: int, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In its third step, or after its last one: either way the command ends, and goes on from there."""
    config = two_stages(tmp_path / "stopped", images)
    original, calls = getattr(VAERecipe, where), []

    def stop(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == (3 if where == "observe" else 1):
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(VAERecipe, where, stop)
        result = train(config, quiet=True)
    assert result.stopped_by == signal.SIGTERM
    assert not (tmp_path / "stopped" / "run").exists()
    assert json.loads((tmp_path / "stopped" / "vae" / "weights.json").read_text())["step"] == step
    train(config, quiet=True)
    train(two_stages(tmp_path / "straight", images), quiet=True)
    for name in (WEIGHTS, "vae/config.json"):
        assert len({(tmp_path / run / "vae" / name).read_bytes() for run in ("stopped", "straight")}) == 1
    assert losses_of(tmp_path / "stopped" / "run") == losses_of(tmp_path / "straight" / "run")


def test_a_given_vae_is_not_trained(images: Path, vae: Path, tmp_path: Path) -> None:
    shutil.copytree(vae / "vae", tmp_path / "vae")
    config = two_stages(tmp_path, images)
    assert codec_run(config) is None
    assert train(config, quiet=True).step == 4


# ---- using a run ----------------------------------------------------------------------------------------------------


def test_a_run_brings_its_vae(vae: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    shutil.copytree(vae, tmp_path / "vae")
    run = tmp_path / "run"
    train(latent_config(run, tmp_path / "vae", **SHORT), quiet=True)
    shutil.rmtree(tmp_path / "vae")
    pipeline = heterodiff.load(run)
    assert isinstance(pipeline, GenerationPipeline)
    assert isinstance(pipeline.codec, KLVAECodec)
    assert pipeline.image_size == (16, 16)
    drawn = pipeline(["3", "7"]).images
    assert tuple(drawn.shape) == (2, 1, 16, 16)
    assert 0 <= float(drawn.min()) < float(drawn.max()) <= 1
    assert torch.equal(pipeline.codec.vae.encoder.conv_in.weight, load_vae(vae).encoder.conv_in.weight)
    assert tuple(pipeline("3", 1, size=24).images.shape) == (1, 1, 24, 24)
    assert tuple(pipeline("3", 1, size=(32, 16)).images.shape) == (1, 1, 32, 16)
    with pytest.raises(ConfigError, match="18x18: the VAE needs sides divisible by 4"):
        pipeline("3", 1, size=18)
    with pytest.raises(ConfigError, match=r"20x20.*divisible by 8"):  # 4 of the VAE, 2 of the network
        pipeline("3", 1, size=20)
    generators = [torch.Generator().manual_seed(k) for k in range(4)]
    together = pipeline([1, 2, 3, 4], generator=generators, batch_size=2).images
    alone = pipeline([3], generator=[torch.Generator().manual_seed(2)]).images
    torch.testing.assert_close(together[2:3], alone, atol=1e-4, rtol=1e-4)
    assert call("sample", run, "--class", "3", "-n", "1", "--out", tmp_path / "out") == 0
    assert call("check", run) == 0
    assert "FAIL" not in capsys.readouterr().out
    shutil.rmtree(run / "vae")
    with pytest.raises(CheckpointError, match="vae"):
        heterodiff.load(run)


def test_resumed_run_needs_no_images(images: Path, vae: Path, tmp_path: Path) -> None:
    options = {**source_of(images), **SHORT, "training__steps": 8}
    train(latent_config(tmp_path / "straight", vae, **options), quiet=True)
    config = latent_config(tmp_path / "resumed", vae, **options)
    assert train(config, quiet=True, stop_after=3).step == 3
    shutil.rmtree(images)
    torch.manual_seed(12345)
    assert train(config, quiet=True).step == 8
    assert_same_run(tmp_path / "straight", tmp_path / "resumed")
    for name in ("vae/config.json", WEIGHTS, "split.json", "data.json"):
        assert (tmp_path / "straight" / name).read_bytes() == (tmp_path / "resumed" / name).read_bytes()


def test_encoding_that_was_interrupted_goes_on(
    images: Path, vae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**source_of(images), **SHORT}
    config = latent_config(tmp_path / "run", vae, **options)

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("heterodiff.latents.encode._write_index", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(config, quiet=True)
    shard = tmp_path / "run" / "latents" / "shard_00000.safetensors"
    before = shard.stat().st_mtime_ns
    assert train(config, quiet=True).step == 4
    assert shard.stat().st_mtime_ns == before
    assert losses_while_training(latent_config(tmp_path / "straight", vae, **options)) == [
        loss for _, loss, _ in losses_of(tmp_path / "run")
    ]


def test_latents_left_by_another_run_are_not_taken_for_ones_own(images: Path, vae: Path, tmp_path: Path) -> None:
    first = latent_config(tmp_path / "first", vae, **source_of(images), **SHORT)
    train(first, quiet=True)
    (tmp_path / "run").mkdir()
    shutil.copytree(tmp_path / "first" / "latents", tmp_path / "run" / "latents")
    config = latent_config(tmp_path / "run", vae, **SHORT)  # of the digits
    with pytest.raises(DataError, match=rf"{tmp_path}/run/latents: holds other latents .*delete this one"):
        train(config, quiet=True)


# ---- stops before the first step ------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", [True, False])
def test_a_vae_of_other_images_needs_measured_statistics(cache: bool, foreign: Path, tmp_path: Path) -> None:
    config = latent_config(tmp_path / "run", foreign, codec__cache=cache, **SHORT)
    steps: list[int] = []
    for attempt in (lambda: train(config, quiet=True, on_step=lambda s, _: steps.append(s)), lambda: dry_run(config)):
        with pytest.raises(DataError, match=r"std of 0\.\d+ after scaling, expected 1.*codec\.statistics=measured"):
            attempt()
    assert steps == []
    assert not (tmp_path / "run" / "config.yaml").exists()
    # the same command with the way out works
    config = latent_config(tmp_path / "run", foreign, codec__cache=cache, codec__statistics="measured", **SHORT)
    assert train(config, quiet=True).step == 4
    codec = KLVAECodec(load_vae(tmp_path / "run"))
    assert codec.per_channel
    data = load_data(config.data).train
    posterior = codec.posterior(data.batch(range(len(data)))[0])
    z = codec.draw(posterior, torch.randn(len(data), 4, 4, 4))
    np.testing.assert_allclose(z.std((0, 2, 3)), 1, atol=0.03)
    np.testing.assert_allclose(z.mean((0, 2, 3)), 0, atol=0.03)


def test_measured_statistics_are_of_all_classes(vae: Path, tmp_path: Path) -> None:
    """Images sorted by class, a few more than are measured: the last ones count as well."""
    values = np.zeros((1300, 16, 16), np.uint8)
    values[1000:] = np.random.default_rng(0).integers(0, 256, (300, 16, 16))
    values[0] = 255
    np.savez(tmp_path / "data.npz", image=values, label=np.arange(1300) // 1000)
    options = {"data__source": "images", "data__path": str(tmp_path / "data.npz"), "data__val_fraction": 0.0}
    config = latent_config(tmp_path / "run", vae, codec__cache=False, codec__statistics="measured", **options)
    data = load_data(config.data)
    recipe = build_recipe(config, data)
    trainer = Trainer(config, recipe, data)
    assert isinstance(recipe, DiffusionRecipe)
    prepare_latents(config, recipe, data, trainer.hosts, quiet=True)
    codec = KLVAECodec(load_vae(vae))
    posterior = codec.posterior(data.train.batch(range(1300))[0])
    mean = posterior[:, :4].double().mean((0, 2, 3))
    std = (posterior[:, :4].double().var((0, 2, 3)) + posterior[:, 4:].double().square().mean((0, 2, 3))).sqrt()
    np.testing.assert_allclose(recipe.codec.vae.config.latents_mean, mean, atol=0.02 * float(std.max()))
    np.testing.assert_allclose(recipe.codec.vae.config.latents_std, std, rtol=0.02)


def test_what_cannot_work_stops_before_the_first_step(vae: Path, foreign: Path, images: Path, tmp_path: Path) -> None:
    source = source_of(images)
    file = write(latent_config(tmp_path / "x", vae, **source), tmp_path / "images.yaml")
    assert call("encode", file, "--vae", vae, "--out", tmp_path / "latents") == 0
    stored = {"data__source": "latents", "data__path": str(tmp_path / "latents"), "data__image_size": None}
    plain_vae(in_channels=3, out_channels=3).save_pretrained(tmp_path / "rgb")
    run = tmp_path / "run"
    cases: list[tuple[dict[str, Any], str]] = [
        ({"codec__path": str(foreign), **stored}, r"of the VAE .*/vae \(fingerprint .*use that VAE, or encode"),
        ({"codec__kind": "pixels", "codec__path": None, **stored}, r"codec\.kind=kl-vae codec\.path=.*/vae"),
        ({"codec__path": str(tmp_path / "rgb"), **source}, "images of 1 channels: the VAE takes 3"),
        ({"codec__path": str(tmp_path / "rgb"), **stored}, "images of 1 channels: the VAE takes 3"),
        ({"codec__path": str(tmp_path / "nowhere"), **source}, "nowhere: no such folder"),
        ({"data__image_size": 18}, "18x18: the VAE needs sides divisible by 4"),
        ({"model__channel_mult": [1, 2, 2, 2], **source}, r"16x16.*divisible by 32"),
        ({"data__random_crop": 1, **stored, "codec__cache": False}, "stored latents"),
    ]
    for overrides, message in cases:
        with pytest.raises(HeterodiffError, match=message):
            train(latent_config(run, vae, **overrides), quiet=True)
        assert not run.exists() or [p.name for p in run.iterdir()] == [".lock"]
    for key, value in (("horizontal_flip", True), ("random_crop", 2)):
        with pytest.raises(ConfigError, match=rf"data\.{key}=.* not stored latents: .* codec\.cache=false"):
            latent_config(run, vae, **{f"data__{key}": value})
    with pytest.raises(ConfigError, match=r"needs codec\.path"):
        latent_config(run, vae, codec__path=None)
    assert latent_config(run, vae, data__horizontal_flip=True, codec__cache=False).data.horizontal_flip


@pytest.mark.parametrize("cache", [True, False])
def test_resumed_run_needs_the_vae_it_began_with(cache: bool, images: Path, vae: Path, tmp_path: Path) -> None:
    shutil.copytree(vae / "vae", tmp_path / "vae")
    config = latent_config(tmp_path / "run", tmp_path / "vae", codec__cache=cache, **source_of(images), **SHORT)
    train(config, quiet=True, stop_after=2)
    other = load_vae(vae)
    with torch.no_grad():
        other.encoder.conv_in.weight.mul_(1.01)
    other.save_pretrained(tmp_path / "vae")
    with pytest.raises(DataError, match="fingerprint"):
        train(config, quiet=True)
    shutil.copytree(vae / "vae", tmp_path / "vae", dirs_exist_ok=True)
    assert train(config, quiet=True).step == 4


def test_a_vae_cannot_be_trained_on_latents(vae: Path, images: Path, tmp_path: Path) -> None:
    source = source_of(images)
    file = write(latent_config(tmp_path / "x", vae, **source), tmp_path / "images.yaml")
    assert call("encode", file, "--vae", vae, "--out", tmp_path / "latents") == 0
    stored = {"data__source": "latents", "data__path": str(tmp_path / "latents"), "data__image_size": None}
    config = vae_config(tmp_path / "run", **stored)
    for codec in ({}, {"kind": "kl-vae", "path": vae}):
        changed = config.model_copy(update={"codec": config.codec.model_copy(update=codec)})
        with pytest.raises(ConfigError, match="recipe vae needs images"):
            train(changed, quiet=True)


# ---- check ----------------------------------------------------------------------------------------------------------

PARTS = ["vae", "round trip", "loader", "forward", "loss", "sample"]


def check(target: Path, capsys: pytest.CaptureFixture) -> tuple[int, dict[str, str], str]:
    """Exit code, pass or FAIL by name, and all that was printed."""
    capsys.readouterr()
    code = call("check", target)
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if line.startswith(("pass", "FAIL"))]
    return code, {line[6:16].strip(): line[:4] for line in lines}, out


def test_check_goes_through_every_part(vae: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    config = latent_config(tmp_path / "run", vae, **source_of(images))
    code, found, out = check(write(config, tmp_path / "config.yaml"), capsys)
    assert code == 0, out
    assert {name: found[name] for name in PARTS} == dict.fromkeys(PARTS, "pass")
    order = [name for name in found if name in PARTS]
    assert order == PARTS
    for words in ("1x16x16 to 4x4x4", "fingerprint", "dB", "after scaling", "(16, 4, 4, 4)", "decodes to (1, 16, 16)"):
        assert words in out
    assert not (tmp_path / "run").exists()


def test_check_of_stored_latents(vae: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert call("encode", write(latent_config(tmp_path / "x", vae, **source_of(images)), tmp_path / "images.yaml"),
                "--vae", vae, "--out", tmp_path / "latents") == 0  # fmt: skip
    stored = {"data__source": "latents", "data__path": str(tmp_path / "latents"), "data__image_size": None}
    code, found, out = check(write(latent_config(tmp_path / "run", vae, **stored), tmp_path / "c.yaml"), capsys)
    assert code == 0, out
    assert {name: found[name] for name in ["latents", *PARTS]} == dict.fromkeys(["latents", *PARTS], "pass")
    assert "stored latents, decoded and encoded again, differ by" in out


def test_check_finds_what_is_wrong(foreign: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    cases: list[tuple[Path, dict[str, Any], str, str]] = [
        (tmp_path / "nowhere", {}, "set-up", "nowhere: no such folder"),
        (foreign, {}, "set-up", "codec.statistics=measured"),
        (foreign, {"codec__statistics": "measured"}, "round trip", "expected 15 dB"),
    ]
    for path, overrides, name, message in cases:
        config = latent_config(tmp_path / "run", path, **source_of(images), **overrides)
        code, found, out = check(write(config, tmp_path / "config.yaml"), capsys)
        assert code == 1
        assert [key for key, result in found.items() if result == "FAIL"] == [name]
        assert message in out
        assert "Traceback" not in out


def test_check_of_a_vae_and_of_one_that_is_to_be_trained(
    vae: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    code, found, out = check(vae, capsys)
    assert code == 0, out
    assert {found["config"], found["checkpoint"], found["vae"]} == {"pass"}
    code, found, out = check(write(two_stages(tmp_path, images), tmp_path / "config.yaml"), capsys)
    assert code == 0, out
    assert "holds no finished codec; it is trained first" in out
    assert "AutoencoderKL to 4x4x4" in out
    assert not (tmp_path / "vae").exists()


def test_a_vae_draws_no_images(vae: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert call("sample", vae, "--out", tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {vae}: a VAE, which reconstructs images but draws none; train a run with")
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
    with pytest.raises(RunError, match="no such run folder"):
        heterodiff.load(tmp_path / "nowhere")


def test_a_finished_vae_of_other_settings_is_not_taken_silently(digits_vae: Path, tmp_path: Path) -> None:
    trained = load_config(digits_vae / "config.yaml")
    config = RunConfig(
        data=trained.data,
        vae=trained.vae.model_copy(update={"kl_weight": 0.5}),
        codec=CodecConfig(kind="kl-vae", path=digits_vae, training=trained.training),
        output=tmp_path / "run",
    )
    with pytest.raises(RunError, match=r"codec\.path=.*other settings(.|\n)*vae\.kl_weight: .* -> 0\.5"):
        train(config, quiet=True)
    assert codec_run(config.model_copy(update={"vae": trained.vae})) is None
    shorter = trained.training.model_copy(update={"steps": 7})
    with pytest.raises(RunError, match=r"training\.steps: 80 -> 7; 80 steps are done"):
        codec_run(config.model_copy(update={"codec": CodecConfig(kind="kl-vae", path=digits_vae, training=shorter)}))


def test_dry_run_and_check_do_not_mind_a_vae_of_other_settings(
    digits_vae: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    trained = load_config(digits_vae / "config.yaml")
    config = RunConfig(
        data=trained.data, codec=CodecConfig(kind="kl-vae", path=digits_vae, training=trained.training)
    ).model_copy(update={"vae": trained.vae, "output": tmp_path / "run"})
    (tmp_path / "config.yaml").write_text(dump_config(config))
    channels = "vae.latent_channels=3"
    for arguments in (("train", "--dry-run"), ("check",)):
        assert call(arguments[0], tmp_path / "config.yaml", channels, *arguments[1:]) == 0
        out = capsys.readouterr().out
        assert f"train would refuse codec.path={digits_vae}: its VAE was trained with other settings" in out
        assert "AutoencoderKL to 3x4x4" in out
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"model__model_channels": 16}, "denoiser of 4x4x4 latents: .*multiple of 32"),
        ({"training__batch_size": 9, "training__accumulation_steps": 2}, "batch_size=9 does not split"),
    ],
)
def test_a_mistake_in_the_denoiser_is_found_before_its_vae_is_trained(
    overrides: dict[str, Any], message: str, tmp_path: Path
) -> None:
    config = latent_config(tmp_path / "run", tmp_path / "vae", codec__training={"steps": 1}, **overrides)
    for attempt in (lambda: train(config, quiet=True), lambda: dry_run(config)):
        with pytest.raises(ConfigError, match=message):
            attempt()
    assert not (tmp_path / "vae").exists()


def test_latents_that_are_stored_already_need_no_training_of_their_vae(digits_vae: Path, tmp_path: Path) -> None:
    config = latent_config(tmp_path / "first", digits_vae, training__steps=1)
    train(config, quiet=True)
    stored = tmp_path / "first" / "latents"
    again = latent_config(
        tmp_path / "again",
        digits_vae,
        data__source="latents",
        data__path=str(stored),
        codec__training={"steps": 7},
        training__steps=1,
    )
    assert train(again, quiet=True).step == 1


def test_a_run_goes_on_with_its_own_copy_when_its_vae_is_gone(digits_vae: Path, tmp_path: Path) -> None:
    vae = tmp_path / "vae"
    shutil.copytree(digits_vae, vae)
    config = latent_config(tmp_path / "run", vae, training__steps=4, codec__cache=False)
    train(config, quiet=True, stop_after=2)
    shutil.rmtree(vae)
    with pytest.raises(CheckpointError, match="no such folder"):
        train(config, quiet=True)
    copy = config.codec.model_copy(update={"path": tmp_path / "run" / "vae"})
    assert train(config.model_copy(update={"codec": copy}), quiet=True).step == 4


def test_held_out_images_are_read_as_those_that_were_encoded(digits_vae: Path, tmp_path: Path) -> None:
    from heterodiff.evaluation.held_out import held_out_images
    from heterodiff.evaluation.runs import run_data

    rng = np.random.default_rng(0)
    for k in range(12):
        path = tmp_path / "images" / f"c{k % 2}" / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16, 32), np.uint8)).save(path)
    first = latent_config(
        tmp_path / "first",
        digits_vae,
        data__source="images",
        data__path=str(tmp_path / "images"),
        data__resize="stretch",
        codec__statistics="measured",
        training__steps=1,
        training__batch_size=4,
    )
    train(first, quiet=True)
    stored = {"data__source": "latents", "data__path": str(tmp_path / "first" / "latents")}
    second = latent_config(
        tmp_path / "second",
        digits_vae,
        **stored,
        codec__statistics="measured",
        training__steps=1,
        training__batch_size=4,
    )
    train(second, quiet=True)
    data = run_data(tmp_path / "second")
    held_out = held_out_images(tmp_path / "second", data, tmp_path / "images")
    assert torch.equal(
        data.train.batch([0])[0][0],
        held_out.images[sorted([*data.train.names, *data.val.names]).index(data.train.names[0])],
    )
    assert any("are training images too" in note for note in held_out.record["notes"])
