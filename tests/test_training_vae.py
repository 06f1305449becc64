"""The recipe `vae`: its losses by hand, what a run leaves behind, and that nothing that stops it changes the result."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.distributions import Normal, kl_divergence

from heterodiff.codecs.discriminator import PatchDiscriminator, adaptive_weight, hinge_losses
from heterodiff.codecs.kl_vae import KLVAECodec, load_vae
from heterodiff.config.file import dump_config
from heterodiff.data.dataset import ImageDataset, ImageSpec, MemoryStore
from heterodiff.data.sources import load_data
from heterodiff.errors import CheckpointError, ConfigError, DataError
from heterodiff.metrics.reconstruction import psnr, ssim
from heterodiff.pipelines.load import load
from heterodiff.pipelines.reconstruct import ReconstructionPipeline, comparison_picture
from heterodiff.training.preflight.memory_plan import training_memory_bytes
from heterodiff.training.preflight.trial import dry_run
from heterodiff.training.recipes.vae import VAEDraws, VAERecipe, structural_losses
from heterodiff.training.start import train
from tests.training_runs import last_checkpoint, losses_of
from tests.vae_runs import plain_vae, vae_config

ADVERSARY = {"vae__adversarial_weight": 0.5, "vae__adversarial_start": 3}
SPEC = ImageSpec(16, 16, 1, (), (0.0, 255.0), "uint8")
WEIGHTS = "vae/diffusion_pytorch_model.safetensors"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}


def images_of(values: np.ndarray) -> ImageDataset:
    """uint8 images (N, C, H, W) as a data set."""
    spec = ImageSpec(values.shape[2], values.shape[3], values.shape[1], (), (0.0, 255.0), "uint8")
    count = len(values)
    names = [str(k) for k in range(count)]
    return ImageDataset(spec, MemoryStore(values), np.arange(count), names, np.full(count, -1))


def recipe_of(tmp_path: Path, **overrides: Any) -> VAERecipe:
    noise = np.random.default_rng(0).integers(0, 256, (8, 1, 16, 16), dtype=np.uint8)
    torch.manual_seed(0)
    return VAERecipe(vae_config(tmp_path / "run", **overrides), SPEC, images_of(noise), images_of(noise[:2]))


def assert_same_vae_run(first: Path, second: Path) -> None:
    """Both runs ended bit by bit alike, adversary and its optimiser included."""
    (step, tensors, state), (other_step, other_tensors, other_state) = map(last_checkpoint, (first, second))
    assert (step, state) == (other_step, other_state)
    assert tensors.keys() == other_tensors.keys()
    assert [key for key in tensors if not torch.equal(tensors[key], other_tensors[key])] == []
    assert losses_of(first) == losses_of(second)
    for name in (WEIGHTS, "vae/config.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def rows_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


# ---- losses -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("structural_weight", [0.0, 0.5])
def test_loss_is_l1_and_the_divergence_of_the_posterior(structural_weight: float, tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, vae__kl_weight=0.01, vae__structural_weight=structural_weight)
    images = torch.rand(3, 1, 16, 16)
    draws = recipe.draw(0, 3, torch.Generator().manual_seed(5), torch.device("cpu"))
    assert tuple(draws.noise.shape) == (3, 4, 4, 4)
    inputs = recipe.prepare(images)
    losses = recipe.losses(recipe.model, inputs, torch.full((3,), -1), draws)
    vae = recipe.model.vae
    for k in range(3):
        with torch.no_grad():
            posterior = vae.encode(images[k : k + 1] * 2 - 1).latent_dist
            drawn = vae.decode(posterior.mean + posterior.std * draws.noise[k]).sample
        l1 = np.abs(drawn.numpy() - (images[k].numpy() * 2 - 1)).mean()
        kl = kl_divergence(Normal(posterior.mean, posterior.std), Normal(0.0, 1.0)).sum()
        expected = l1 + 0.01 * kl
        if structural_weight:
            scales = []
            x, y = images[k : k + 1], drawn / 2 + 0.5
            for size in (16, 8):  # halved once: then the images are too small to halve again
                scales.append(1 - float(ssim(x, y)))
                x, y = (t.view(1, 1, size // 2, 2, size // 2, 2).mean(dim=(3, 5)) for t in (x, y))
            expected += structural_weight * np.mean(scales)
            assert losses.parts["structural"][k].item() == pytest.approx(np.mean(scales), rel=1e-4)
        assert losses.each[k].item() == pytest.approx(float(expected), rel=1e-5)
        assert losses.parts["l1"][k].item() == pytest.approx(l1, rel=1e-5)
        assert losses.parts["kl"][k].item() == pytest.approx(kl.item(), rel=1e-5)
    assert losses.outputs is not None
    assert not losses.outputs.requires_grad
    assert not recipe.judges(draws)
    assert "adversarial" not in losses.parts
    losses.each.mean().backward()
    assert all(p.grad is not None for p in recipe.model.parameters())


def test_losses_of_parts_are_those_of_the_whole(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path)
    inputs, labels = torch.rand(4, 1, 16, 16) * 2 - 1, torch.zeros(4)
    draws = recipe.draw(0, 4, torch.Generator().manual_seed(0), torch.device("cpu"))
    whole = recipe.losses(recipe.model, inputs, labels, draws).each
    parts = [recipe.losses(recipe.model, inputs[p], labels[p], draws.rows(p)).each for p in (slice(0, 1), slice(1, 4))]
    torch.testing.assert_close(whole, torch.cat(parts))


@pytest.mark.parametrize("side", [8, 15, 16, 33, 64])
def test_structural_loss_is_zero_for_equal_images_and_above_for_others(side: int) -> None:
    images = torch.rand(3, 2, side, side) * 2 - 1
    torch.testing.assert_close(structural_losses(images, images), torch.zeros(3), atol=1e-5, rtol=0)
    assert float(structural_losses(images, images.roll(1, 0)).min()) > 0.01


def test_psnr_and_ssim_of_known_images() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.random((2, 5, 2, 13, 17)).astype(np.float32)
    for k, found in enumerate(psnr(torch.from_numpy(a), torch.from_numpy(b)).tolist()):
        squares = sum((float(x) - float(y)) ** 2 for x, y in zip(a[k].flat, b[k].flat, strict=True))
        assert found == pytest.approx(10 * math.log10(1 / (squares / a[k].size)), rel=1e-5)
    flat = torch.full((1, 1, 16, 16), 0.5)
    assert psnr(flat, flat + 0.1).tolist() == pytest.approx([20.0], rel=1e-4)
    # Constant images: only the luminance term is left, (2 m n + C1) / (m^2 + n^2 + C1).
    assert ssim(flat, flat + 0.25).tolist() == pytest.approx([(0.75 + 1e-4) / (0.25 + 0.5625 + 1e-4)], rel=1e-3)
    for size in (8, 12, 16):
        images = torch.rand(2, 1, size, size)
        torch.testing.assert_close(ssim(images, images), torch.ones(2))
        alone = torch.cat([ssim(images[:1], images[1:]), ssim(images[1:], images[:1])])
        torch.testing.assert_close(ssim(images, images.flip(0)), alone)
        assert float(alone.max()) < 0.9


def test_hinge_losses_by_hand() -> None:
    real = torch.tensor([[2.0, 1.0, 0.5], [-1.0, 0.0, 3.0]])
    fake = torch.tensor([[-2.0, -1.0, -0.5], [1.0, 0.0, -3.0]])
    by_hand = [0.5 * ((0 + 0 + 0.5) / 3 + (0 + 0 + 0.5) / 3), 0.5 * ((2 + 1 + 0) / 3 + (2 + 1 + 0) / 3)]
    assert hinge_losses(real, fake).tolist() == pytest.approx(by_hand)


def test_adaptive_weight_by_hand() -> None:
    """y = w x: the gradients in w are known numbers."""
    w = nn.Parameter(torch.tensor([3.0, 4.0]))
    x = torch.tensor([1.0, 2.0])
    reconstruction, adversarial = (w * x).sum(), 5 * (w * torch.tensor([3.0, 4.0])).sum()
    weight = adaptive_weight(reconstruction, adversarial, w)
    assert float(weight) == pytest.approx(math.sqrt(5) / (25 + 1e-4))
    assert not weight.requires_grad
    (reconstruction + weight * adversarial).backward()  # the graphs are still there
    assert w.grad is not None
    assert float(adaptive_weight((w * x).sum(), 1e-12 * (w * x).sum(), w)) == pytest.approx(1e4)


def test_verdict_on_an_image_depends_on_no_other() -> None:
    torch.manual_seed(0)
    judge = PatchDiscriminator(3)
    images = torch.randn(5, 3, 16, 24)
    scores = judge(images)
    assert scores.ndim == 2
    torch.testing.assert_close(scores, torch.cat([judge(image[None]) for image in images]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scores[:1], judge(torch.cat([images[:1], 100 * images[1:]]))[:1], rtol=1e-4, atol=1e-5)


def test_adversary_and_autoencoder_learn_from_their_own_losses_only(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, **ADVERSARY)
    inputs, labels = torch.rand(2, 1, 16, 16) * 2 - 1, torch.zeros(2)
    device, generator = torch.device("cpu"), torch.Generator()
    assert [recipe.draw(step, 2, generator, device).adversarial for step in (0, 2, 3, 4)] == [False, False, True, True]
    noise = torch.randn(2, 4, 4, 4)
    without = recipe.losses(recipe.model, inputs, labels, VAEDraws(noise, False))
    losses = recipe.losses(recipe.model, inputs, labels, VAEDraws(noise, True))
    drawn = recipe.model(inputs, noise)[0]
    judge = recipe.adversary
    assert judge is not None
    verdict = -judge(drawn).mean(dim=1)
    torch.testing.assert_close(losses.parts["adversarial"], verdict.detach())
    last = recipe.model.vae.decoder.conv_out.weight
    l1 = (drawn - inputs).abs().mean()
    scale = adaptive_weight(l1, verdict.mean(), last)
    torch.testing.assert_close(losses.each, without.each + 0.5 * scale * verdict, rtol=1e-4, atol=1e-5)
    judge.zero_grad()
    losses.each.mean().backward()
    assert all(p.grad is None for p in judge.parameters())
    assert all(p.requires_grad for p in judge.parameters())
    recipe.model.zero_grad()
    assert losses.outputs is not None
    recipe.adversary_losses(judge, inputs, losses.outputs).mean().backward()
    assert all(p.grad is not None for p in judge.parameters())
    assert all(p.grad is None for p in recipe.model.parameters())


# ---- a run --------------------------------------------------------------------------------------------------------


@pytest.fixture
def trained(digits_vae: Path) -> Path:
    return digits_vae


def test_training_improves_the_reconstruction(trained: Path) -> None:
    rows = rows_of(trained)
    before, after = (row for row in rows if "val_loss" in row)
    assert (before["step"], after["step"]) == (40, 80)
    assert after["val_loss"] < before["val_loss"]
    assert after["val_psnr"] > before["val_psnr"] + 0.2
    assert after["val_ssim"] > before["val_ssim"]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[-1] < 0.7 * losses[0]
    assert {"l1", "kl", "grad_norm", "lr"} <= rows[0].keys()
    for step in (40, 80):
        with Image.open(trained / "samples" / f"step_{step:06d}.png") as picture:
            assert picture.width > 3 * 16
            assert picture.height > 8 * 16


def test_logged_quality_is_that_of_the_saved_weights(trained: Path) -> None:
    pipeline = load(trained)
    assert isinstance(pipeline, ReconstructionPipeline)
    held_out = load_data(vae_config(trained).data).val
    assert len(held_out) <= 256  # so all are measured
    images = held_out.batch(range(len(held_out)))[0]
    last = rows_of(trained)[-1]
    found = pipeline(images).images
    errors = ((found - images) ** 2).flatten(1).mean(dim=1).double().numpy()
    assert last["val_psnr"] == pytest.approx(np.mean(-10 * np.log10(errors)), rel=1e-3)


def test_stored_statistics_are_those_of_all_training_images(trained: Path) -> None:
    vae = load_vae(trained)
    data = load_data(vae_config(trained).data).train
    means, variances = [], []
    with torch.no_grad():
        for k in range(len(data)):
            posterior = vae.encode(data[k][0][None] * 2 - 1).latent_dist
            means.append(posterior.mean[0].double().numpy())
            variances.append(posterior.var[0].double().numpy())
    mean, variance = np.stack(means), np.stack(variances)
    axes = (0, 2, 3)
    np.testing.assert_allclose(vae.config.latents_mean, mean.mean(axes), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(vae.config.latents_std, np.sqrt(mean.var(axes) + variance.mean(axes)), rtol=1e-4)
    assert vae.config.scaling_factor == 1.0
    codec = KLVAECodec(vae)
    posterior = codec.posterior(data.batch(range(len(data)))[0])
    z = codec.draw(posterior, torch.randn(len(data), 4, 4, 4))
    np.testing.assert_allclose(z.std(axes), 1, atol=0.02)
    np.testing.assert_allclose(z.mean(axes), 0, atol=0.02)


def test_pipeline_reconstructs_and_says_what_it_cannot_take(trained: Path) -> None:
    pipeline = load(trained)
    images = torch.rand(40, 1, 16, 16)
    whole = pipeline(images).images
    assert whole.shape == images.shape
    assert 0 <= float(whole.min()) <= float(whole.max()) <= 1
    torch.testing.assert_close(whole[35:], pipeline(images[35:]).images, atol=1e-5, rtol=1e-5)
    for bad, message in ((torch.rand(1, 3, 16, 16), "the VAE takes 1"), (torch.rand(1, 1, 18, 16), "divisible by 4")):
        with pytest.raises(ConfigError, match=message):
            pipeline(bad)
    picture = comparison_picture(images[:2], whole[:2])
    assert picture.width > picture.height / 2


def test_given_weights_are_the_start(trained: Path, tmp_path: Path) -> None:
    changes = {"training__steps": 1, "training__learning_rate": 1e-6, "training__log_every": 1}
    for name, more in (("fresh", {}), ("again", {"vae__init_from": str(trained)})):
        train(vae_config(tmp_path / name, **changes, **more), quiet=True)
    fresh, again, before = (rows_of(run)[-1]["val_loss"] for run in (tmp_path / "fresh", tmp_path / "again", trained))
    assert again == pytest.approx(before, rel=0.01)
    assert again < 0.6 * fresh
    # the architecture is that of the given weights
    other = plain_vae(down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
                      block_out_channels=(8, 8), latent_channels=2)  # fmt: skip
    other.save_pretrained(tmp_path / "other")
    config = vae_config(tmp_path / "run", vae__init_from=str(tmp_path / "other"), data__image_size=[18, 18])
    assert dry_run(config).parts[0].network == "AutoencoderKL to 2x9x9"


def test_memory_of_a_vae_grows_with_it_and_its_batch(tmp_path: Path) -> None:
    def needed(**overrides: Any) -> float:
        return training_memory_bytes(vae_config(tmp_path, **overrides), SPEC)

    sizes = (8, 16, 80)
    small, middle, large = (needed(training__batch_size=size) for size in sizes)
    assert large - small == pytest.approx(9 * (middle - small))
    assert needed(training__batch_size=80, training__accumulation_steps=10) == pytest.approx(small)
    wider = needed(vae__block_out_channels=[32, 32, 32], vae__mid_block_attention=True)
    assert wider > small + 1e6
    plain_vae(block_out_channels=(32, 32, 32), norm_num_groups=8).save_pretrained(tmp_path / "vae")
    assert needed(vae__init_from=str(tmp_path / "vae")) == pytest.approx(wider)


# ---- stopped and resumed --------------------------------------------------------------------------------------------


def test_resumed_run_is_the_one_that_did_not_stop(tmp_path: Path) -> None:
    """Stopped before, at and after the step at which the adversary begins."""
    changes = {**ADVERSARY, "training__steps": 9, "training__checkpoint_every": 4, "training__log_every": 3}
    train(vae_config(tmp_path / "straight", **changes), quiet=True)
    for name, stops in (("once", [3]), ("twice", [2, 6])):
        config = vae_config(tmp_path / name, **changes)
        for stop in stops:
            assert train(config, quiet=True, stop_after=stop).step == stop
            torch.manual_seed(12345)  # whatever the process did in between must not matter
        assert train(config, quiet=True).step == 9
        assert_same_vae_run(tmp_path / "straight", tmp_path / name)
    _, tensors, _ = last_checkpoint(tmp_path / "straight")
    groups = {key.partition("/")[0] for key in tensors}
    assert groups == {"model", "optimizer", "ema", "adversary", "adversary_optimizer"}
    steps = {float(v) for k, v in tensors.items() if k.startswith("adversary_optimizer/") and k.endswith("/step")}
    assert steps == {6.0}


@pytest.mark.slow
def test_killed_process_resumes_exactly(tmp_path: Path) -> None:
    changes = {**ADVERSARY, "training__steps": 600, "training__checkpoint_every": 7}
    config_file = tmp_path / "config.yaml"
    config = vae_config(tmp_path / "killed", **changes)
    config_file.write_text(dump_config(config))
    command = [sys.executable, "-m", "heterodiff.cli", "train", str(config_file), "--quiet"]
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    while not list((tmp_path / "killed" / "checkpoints").glob("step_????????")):
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(random.uniform(0, 0.5))  # wherever it is then
    process.send_signal(signal.SIGKILL)
    assert process.wait(60) == -9
    step = last_checkpoint(tmp_path / "killed")[0]
    assert 7 <= step < 590
    stop = step + 3
    train(config, quiet=True, stop_after=stop)
    train(vae_config(tmp_path / "straight", **changes), quiet=True, stop_after=stop)
    assert_same_vae_run(tmp_path / "straight", tmp_path / "killed")


# ---- parts and processes --------------------------------------------------------------------------------------------


def test_parts_of_a_batch_learn_what_the_whole_learns(tmp_path: Path) -> None:
    changes = {"training__steps": 6, "training__log_every": 1, "vae__structural_weight": 0.1}
    for name, parts in (("one", 1), ("two", 2)):
        train(vae_config(tmp_path / name, training__accumulation_steps=parts, **changes), quiet=True)
    for expected, found in zip(losses_of(tmp_path / "one"), losses_of(tmp_path / "two"), strict=True):
        assert found == pytest.approx(expected, abs=1e-5, rel=1e-5)


TRAIN_ALL = """
import sys
from heterodiff.config.file import load_config
from heterodiff.training.start import train
for name in sys.argv[1:]:
    train(load_config(name), quiet=True)
"""


def test_two_processes_learn_what_one_learns(tmp_path: Path) -> None:
    """Without an adversary; with one, each process weighs it by its own share of the batch."""
    common = {"training__steps": 6, "training__log_every": 1}
    train(vae_config(tmp_path / "one", **common), quiet=True)
    judged = vae_config(tmp_path / "judged", training__accumulation_steps=2, **common, **ADVERSARY)
    configs = {"two": vae_config(tmp_path / "two", **common), "judged": judged}
    for name, config in configs.items():
        (tmp_path / f"{name}.yaml").write_text(dump_config(config))
    (tmp_path / "train_all.py").write_text(TRAIN_ALL)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train_all.py"]
    done = subprocess.run(
        [sys.executable, *launch, "two.yaml", "judged.yaml"],
        cwd=tmp_path,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    one, two = losses_of(tmp_path / "one"), losses_of(tmp_path / "two")
    assert len(one) == 6
    for expected, found in zip(one, two, strict=True):
        assert found == pytest.approx(expected, abs=1e-5, rel=1e-5)
    rows = [row for row in rows_of(tmp_path / "judged") if "loss" in row]
    assert ["adversary" in row for row in rows] == [False] * 3 + [True] * 3
    assert all(math.isfinite(value) for row in rows for value in row.values())
    for expected, row in zip(one[:4], rows, strict=False):  # the loss of the fourth step has a verdict in it
        assert row["l1"] + 1e-6 * row["kl"] == pytest.approx(expected[1], abs=1e-5)
    load_vae(tmp_path / "judged")


# ---- what cannot work -----------------------------------------------------------------------------------------------

BAD = {
    "float16": ({"training__precision": "float16", **ADVERSARY}, "found float16|needs a GPU"),
    "small for the adversary": ({"data__image_size": 12, **ADVERSARY}, r"12x12 are too small.*set it to 0"),
    "indivisible": ({"data__image_size": 18}, r"divisible by 4; set data\.image_size="),
    "latents": ({"data__source": "latents", "data__path": "latents", "data__image_size": None}, "latents"),
    "nothing to start from": ({"vae__init_from": "nowhere"}, "nowhere: no such folder"),
    "a crop of the whole image": ({"data__random_crop": 16}, "less than the image size"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_work_stops_before_anything_is_written(case: str, tmp_path: Path) -> None:
    overrides, message = BAD[case]
    with pytest.raises((ConfigError, DataError, CheckpointError), match=message) as error:
        train(vae_config(tmp_path / "run", **overrides), quiet=True)
    assert not (tmp_path / "run").exists()
    assert "\n\n" not in str(error.value)


def test_float16_with_an_adversary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="bfloat16 or float32, found float16"):
        recipe_of(tmp_path, training__precision="float16", **ADVERSARY)


def test_channels_are_those_of_the_given_weights(tmp_path: Path) -> None:
    plain_vae(in_channels=3, out_channels=3).save_pretrained(tmp_path / "rgb")
    with pytest.raises(ConfigError, match="the VAE takes 3"):
        recipe_of(tmp_path, vae__init_from=str(tmp_path / "rgb"))


def test_constant_images_are_named(tmp_path: Path) -> None:
    """Constant images give latents that vary with the place only where the convolutions pad; here they never do."""
    recipe = recipe_of(tmp_path)
    with torch.no_grad():
        for parameter in recipe.model.parameters():
            parameter.zero_()
        recipe.model.vae.quant_conv.bias[4:] = -30
    with pytest.raises(DataError, match=r"never varies .*images are constant, or the encoder is not trained"):
        recipe.save(tmp_path / "vae")


def test_a_discriminator_that_cannot_take_part_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"adversarial_start=2000: the discriminator would never begin"):
        recipe_of(tmp_path, vae__adversarial_weight=0.5)
    with pytest.raises(ConfigError, match=r"does not go with training\.compile=true"):
        recipe_of(tmp_path, vae__adversarial_weight=0.5, vae__adversarial_start=0, training__compile=True)
