"""Simplex noise is that of an oracle and of unit variance; runs train, draw and find anomalies with it."""

import math
from pathlib import Path
from typing import get_args

import diffusers
import pytest
import torch

import heterodiff as hd
from heterodiff.config import DiffusionConfig
from heterodiff.diffusion.noise import NOISES, VARIANCE, find_noise, lattice_size, simplex_noise, simplex_octave
from heterodiff.errors import ConfigError
from heterodiff.pipelines.anomalies.segment import Segmenter
from heterodiff.training.start import train
from tests.oracles.simplex import simplex_value
from tests.training_runs import assert_same_run, tiny_config


@pytest.mark.parametrize("frequency", [2**-6, 2**-3, 0.5, 0.9])
@pytest.mark.parametrize("size", [(5, 9), (8, 3)])
def test_an_octave_is_the_sum_over_all_lattice_points(size: tuple[int, int], frequency: float) -> None:
    generator = torch.Generator().manual_seed(0)
    angles = 2 * math.pi * torch.rand(2, 2, *lattice_size(*size, frequency), generator=generator)
    shift = torch.rand(2, 2, generator=generator)
    found = simplex_octave(angles, shift, *size, frequency)

    def value(n: int, c: int, y: int, x: int) -> float:
        return simplex_value(y, x, angles[n, c].tolist(), tuple(shift[n].tolist()), frequency)

    height, width = map(range, size)
    expected = [[[[value(n, c, y, x) for x in width] for y in height] for c in range(2)] for n in range(2)]
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-6, rtol=1e-4)
    assert float(found.abs().max()) > 1e-4


def test_every_lattice_point_that_is_reached_exists() -> None:
    for height, width in ((1, 1), (7, 64), (64, 7), (33, 33)):
        for frequency in (2**-6, 0.5, 1.0):
            angles = torch.zeros(1, 1, *lattice_size(height, width, frequency))
            simplex_octave(angles, torch.full((1, 2), 1 - 2**-24), height, width, frequency)


@pytest.mark.parametrize("name", NOISES)
def test_each_pixel_has_mean_0_and_variance_1(name: str) -> None:
    found = NOISES[name].draw((4000, 1, 5, 7), torch.Generator().manual_seed(0), "cpu")
    assert float(found.mean(dim=0).abs().max()) < 0.08  # 5 standard errors
    assert float((found.var(dim=0) - 1).abs().max()) < 0.15
    assert abs(float(found.square().mean()) - 1) < 0.03


def test_the_variance_of_an_octave_is_the_integral() -> None:
    """Far finer than the lattice, the mean square over one field comes near the variance."""
    angles = 2 * math.pi * torch.rand(4, 1, *lattice_size(256, 256, 0.23), generator=torch.Generator().manual_seed(0))
    found = simplex_octave(angles, torch.zeros(4, 2), 256, 256, 0.23)
    assert float(found.square().mean()) == pytest.approx(VARIANCE, rel=0.03)


def test_simplex_noise_is_smooth_and_not_gaussian() -> None:
    found = simplex_noise((64, 1, 64, 64), torch.Generator().manual_seed(0))
    neighbours = float((found[..., 1:] * found[..., :-1]).mean())
    assert 0.6 < neighbours < 0.95
    spectrum = torch.fft.rfft2(found).abs().square().mean(dim=(0, 1))
    assert float(spectrum[0, 1:4].mean()) > 100 * float(spectrum[0, 24:].mean())


@pytest.mark.parametrize("name", NOISES)
def test_draws_depend_on_the_generator_alone(name: str) -> None:
    draw, shape = NOISES[name].draw, (3, 2, 8, 6)
    once, again, other = (draw(shape, torch.Generator().manual_seed(seed), "cpu") for seed in (1, 1, 2))
    assert torch.equal(once, again)
    assert not torch.equal(once, other)
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6, 7)]
    together = draw(shape, generators, "cpu")
    for row, seed in enumerate((5, 6, 7)):
        one = draw((1, 2, 8, 6), torch.Generator().manual_seed(seed), "cpu")
        torch.testing.assert_close(together[row : row + 1], one, rtol=0, atol=1e-6)
    assert together.unique(dim=0).shape[0] == 3
    assert not torch.equal(together[:, 0], together[:, 1])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        assert draw(shape, None, "cpu").shape == shape


def test_the_names_are_those_of_the_configuration() -> None:
    assert list(get_args(DiffusionConfig.model_fields["noise"].annotation)) == list(NOISES)
    with pytest.raises(ConfigError, match="unknown noise 'simplx'"):
        find_noise("simplx")


NETWORK = {"model__variant": "unet-conv", "model__channel_mult": [1, 1], "diffusion__noise": "simplex"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("simplex") / "run"
    train(tiny_config(folder, **NETWORK, training__steps=6, training__checkpoint_every=2), quiet=True)
    return folder


def test_a_resumed_run_equals_one_that_was_not_interrupted(run: Path, tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run", **NETWORK, training__steps=6, training__checkpoint_every=2)
    train(config, quiet=True, stop_after=3)
    train(config, quiet=True)
    assert_same_run(run, tmp_path / "run")


def test_images_are_drawn_from_the_noise_of_the_training(run: Path, tmp_path: Path) -> None:
    pipe = hd.load(run)
    assert pipe.noise == "simplex"
    pipe.save_pretrained(tmp_path / "copy")
    copy = hd.load(tmp_path / "copy")
    assert copy.noise == "simplex"
    begun = []

    def remember(pipe: object, step: int, t: object, tensors: dict) -> dict:
        begun.append(tensors["latents"])
        return {}

    for one in (pipe, copy):
        options = {"sampler": "ddim", "timesteps": [999], "generator": torch.Generator().manual_seed(0)}
        one(["1"] * 2, callback_on_step_end=remember, **options)
    assert torch.equal(*begun)
    noise = simplex_noise((2, 1, 8, 8), torch.Generator().manual_seed(0))
    assert torch.equal(pipe.draw_noise((2, 1, 8, 8), torch.Generator().manual_seed(0)), noise)


def test_noise_that_samplers_would_add_is_refused(run: Path) -> None:
    pipe = hd.load(run)
    message = "sampler 'ddpm' adds Gaussian noise at each step, and the run was trained with simplex noise; take one of"
    with pytest.raises(ConfigError, match=message):
        pipe(num_images=1, sampler="ddpm")
    with pytest.raises(ConfigError, match=message):
        pipe.edit(torch.rand(1, 1, 8, 8), sampler="ddpm")
    with pytest.raises(ConfigError, match=message):
        train(tiny_config(run.parent / "other", **NETWORK, sampling__sampler="ddpm"), quiet=True)
    pipe.scheduler = diffusers.LCMScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(ConfigError, match="scheduler LCMScheduler: may add Gaussian noise"):
        pipe(num_images=1)
    with pytest.raises(ConfigError, match="learn_variance=true: its bound is that of Gaussian noise"):
        train(tiny_config(run.parent / "other", **NETWORK, diffusion__learn_variance=True), quiet=True)


def test_images_are_noised_in_part_with_it(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = tiny_config(run, segmentation__method="partial-noising", segmentation__num_inference_steps=2)
    segmenter, images = Segmenter(hd.load(run), settings.segmentation), torch.rand(2, 1, 8, 8)
    smooth = segmenter.maps(images).maps
    monkeypatch.setattr(segmenter.pipeline, "noise", "gaussian")
    assert not torch.allclose(segmenter.maps(images).maps, smooth)
