"""Run folders of tests/data, as a user has them: loaded, drawn from, gone on with, evaluated."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file

import heterodiff as hd
from heterodiff.cli import main
from heterodiff.config.file import load_config
from heterodiff.devices import default_device
from heterodiff.metrics import classifiers
from heterodiff.pipelines.generate import seeded_generators
from heterodiff.training.start import train
from tests.data.make_runs import GUIDANCE_SCALE, LABELS, PROMPTS, STEPS, STOP, TIMESTEPS, configs
from tests.golden_files import RUNS, moved, outcome, unpack

NAMES = sorted(path.stem for path in RUNS.glob("*.safetensors"))


@pytest.fixture(scope="module", params=NAMES)
def stopped(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped halfway; to be left as it is."""
    return unpack(request.param, tmp_path_factory.mktemp("golden") / request.param)


def assert_close(name: str, found: torch.Tensor, expected: torch.Tensor) -> None:
    """Compare summaries of the changes of all weights of run ``name``.

    Another processor adds up in another order, which after four steps is 1e-5 of a tensor's change at most. Not so for
    the VAE, whose moments are two steps old: biases before a norm have no gradient but rounding, and Adam gives all
    gradients the same size. They make up to 0.6 % of the change of all weights together.
    """
    relative, floor = (1e-2, 2e-2) if name == "vae" else (1e-3, 1e-5)
    limit = relative * expected[:, :1] + floor * expected[:, 0].norm()
    assert ((found - expected).abs() <= limit).all()


def test_there_is_a_folder_of_each_run() -> None:
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


@pytest.mark.skipif(default_device().type != "cpu", reason="noise is drawn on the device, here another than there")
def test_a_stopped_run_goes_on(stopped: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(stopped, tmp_path / "moved"))
    config = moved(load_config(run / "config.yaml"), run)
    assert train(config, quiet=True, stop_after=STOP + 2).step == STOP + 2
    assert train(config, quiet=True).step == STEPS
    found, golden = outcome(stopped, run), load_file(RUNS / f"{stopped.name}.safetensors")
    torch.testing.assert_close(found["losses"], golden["losses"], rtol=1e-3, atol=0)
    for group in ("model", "ema"):
        assert_close(stopped.name, found[group], golden[group])


@pytest.mark.parametrize("stopped", ["classes", "vae"], indirect=True)
def test_a_stopped_run_is_evaluated(
    stopped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(classifiers, "CONV_MAX_STEPS", 20)
    monkeypatch.setattr(classifiers, "CONV_MIN_STEPS", 10)
    run = Path(shutil.copytree(stopped, tmp_path / "moved"))
    arguments = [] if stopped.name == "vae" else ["-n", "2", "--steps", "2"]
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", str(run), *arguments])
    assert stop.value.code == 0
    held_out = len(json.loads((run / "split.json").read_text())["val"])
    assert f"of {held_out} " in capsys.readouterr().out
    page = (run / "report.html").read_text()
    assert json.loads((run / "run.json").read_text())["model_summary"] in page
