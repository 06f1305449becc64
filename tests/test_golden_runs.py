"""Run folders of tests/data, as a user has them: loaded, drawn from, gone on with, evaluated."""

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file

import heterodiff as hd
from heterodiff.config_file import load_config
from heterodiff.pipelines.generate import seeded_generators
from heterodiff.training.start import train
from tests.data.make_runs import GUIDANCE_SCALE, LABELS, PROMPTS, STEPS, STOP, TIMESTEPS, configs
from tests.golden_files import RUNS, moved, outcome, unpack

NAMES = sorted(path.stem for path in RUNS.glob("*.safetensors"))


@pytest.fixture(scope="module", params=NAMES)
def stopped(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped halfway; to be left as it is."""
    return unpack(request.param, tmp_path_factory.mktemp("golden") / request.param)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """The sums of the kernels of another machine differ by 1e-6 or so, which four steps make ten times as much.

    A hundredth of a tensor's change is far more, and far less than a lost moment, another draw or another rate makes.
    """
    floor = 1e-3 * expected[:, 0].norm()
    assert ((found - expected).abs() <= 1e-2 * expected[:, :1] + floor).all()


def test_folders_are_of_today(tmp_path: Path) -> None:
    assert set(NAMES) == set(configs())


@pytest.mark.filterwarnings("ignore:an empty text means no condition")
def test_a_stopped_run_draws(stopped: Path) -> None:
    pipe = hd.load(stopped, device="cpu")
    golden = load_file(RUNS / f"{stopped.name}.safetensors")
    if stopped.name == "classes":
        settings = {"sampler": "ddim", "timesteps": list(TIMESTEPS), "guidance_scale": GUIDANCE_SCALE}
        generators = seeded_generators(0, len(LABELS))
        found = pipe(list(LABELS), generator=generators, **settings).images
        expected = golden["pictures"]
    elif stopped.name == "text-image":
        found, expected = pipe(list(PROMPTS), seed=0).images, golden["pictures"]
    else:
        images = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        found = pipe(images).images
        vae = AutoencoderKL.from_pretrained(stopped / "vae")
        with torch.no_grad():
            expected = vae.decode(vae.encode(2 * images - 1).latent_dist.mode()).sample.add(1).div(2).clamp(0, 1)
    assert (found - expected).abs().max() <= 1e-3


def test_a_stopped_run_goes_on(stopped: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(stopped, tmp_path / "moved"))
    config = moved(load_config(run / "config.yaml"), run)
    assert train(config, quiet=True, stop_after=STOP + 2).step == STOP + 2
    assert train(config, quiet=True).step == STEPS
    found, golden = outcome(stopped, run), load_file(RUNS / f"{stopped.name}.safetensors")
    torch.testing.assert_close(found["losses"], golden["losses"], rtol=1e-3, atol=0)
    close(found["model"], golden["model"])
    close(found["ema"], golden["ema"])
    assert hd.load(run) is not None
