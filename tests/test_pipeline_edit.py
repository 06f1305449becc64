"""Editing images with a run: known pixels stay, new ones fit what is known, and nothing else is taken for an edit."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import heterodiff as hd
from heterodiff.cli import main
from heterodiff.config import DiffusionConfig
from heterodiff.data.reading import read_mask
from heterodiff.diffusion.anomaly import noising_timesteps
from heterodiff.diffusion.denoiser import Denoiser
from heterodiff.diffusion.schedule import NoiseSchedule
from heterodiff.errors import ConfigError, DataError
from heterodiff.image_spec import ImageSpec
from heterodiff.pipelines.editing import inpaint, known_latents
from heterodiff.training.start import train
from tests.text_runs import text_config
from tests.training_runs import tiny_config
from tests.vae_runs import plain_vae

CORRELATION = 0.9


def gaussian_denoiser(kind: str) -> Denoiser:
    """The ideal denoiser of pairs of pixels, normal with covariance C: E[x0 | z] = a C (a^2 C + s^2)^-1 z."""
    schedule = NoiseSchedule.from_config(DiffusionConfig.model_validate({"schedule": kind}))
    covariance = torch.tensor([[1.0, CORRELATION], [CORRELATION, 1.0]])

    def network(z: Tensor, time: Tensor) -> Tensor:
        t = int((schedule.time - time[0]).abs().argmin())
        alpha, sigma = schedule.alpha[t].item(), schedule.sigma[t].item()
        gain = alpha * covariance @ torch.linalg.inv(alpha**2 * covariance + sigma**2 * torch.eye(2))
        return (z.flatten(1) @ gain.T).view(z.shape)

    return Denoiser(network, schedule, "sample")


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_inpainting_draws_from_the_conditional_distribution(kind: str) -> None:
    """Of a Gaussian, what is unknown given x has mean rho x and variance 1 - rho^2; one attempt a step falls short."""
    generator = torch.Generator().manual_seed(0)
    x0 = torch.zeros(4000, 1, 1, 2)
    x0[..., 0] = 1.5
    known = torch.tensor([1.0, 0.0]).expand(4000, 1, 1, 2)
    means = {}
    for resamples in (1, 8):
        found = inpaint(
            gaussian_denoiser(kind),
            x0,
            known,
            noising_timesteps(1000, 50),
            lambda: torch.randn(x0.shape, generator=generator),
            resamples=resamples,
        )
        assert torch.equal(found[..., 0], x0[..., 0])
        means[resamples] = float(found[..., 1].mean())
    assert abs(means[8] - CORRELATION * 1.5) < 0.1
    assert abs(means[8] - CORRELATION * 1.5) < 0.5 * abs(means[1] - CORRELATION * 1.5)
    assert float(found[..., 1].std()) == pytest.approx(math.sqrt(1 - CORRELATION**2), abs=0.1)


def test_latents_are_known_where_all_their_pixels_are() -> None:
    known = torch.ones(1, 1, 8, 8)
    known[0, 0, 3, 4] = 0
    assert known_latents(known, (2, 2)).flatten().tolist() == [1, 0, 1, 1]
    assert torch.equal(known_latents(known, (8, 8)), known)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("edit")
    rng = np.random.default_rng(0)
    for name in "ab":
        (folder / "data" / name).mkdir(parents=True)
        for k in range(6):
            Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / "data" / name / f"{k}.png")
    data = {"data__source": "images", "data__path": str(folder / "data")}
    network = {"model__variant": "unet-conv", "model__channel_mult": [1, 1]}
    train(tiny_config(folder / "run", **data, **network, training__steps=2), quiet=True)
    return folder / "run"


@pytest.fixture(scope="module")
def latent_run(run: Path) -> Path:
    vae = plain_vae(in_channels=3, out_channels=3)
    vae.save_pretrained(run.parent / "vae")
    data = {"data__source": "images", "data__path": str(run.parent / "data")}
    codec = {"codec__kind": "kl-vae", "codec__path": str(run.parent / "vae"), "codec__statistics": "measured"}
    network = {"model__variant": "unet-conv", "model__channel_mult": [1]}
    train(tiny_config(run.parent / "latents", **data, **codec, **network, training__steps=2), quiet=True)
    return run.parent / "latents"


@pytest.fixture(scope="module", params=["film-unet", "unet-conv"])
def text_run(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    folder = tmp_path_factory.mktemp("text")
    train(text_config(folder / "run", model__variant=request.param), quiet=True)
    return folder / "run"


@pytest.mark.parametrize("kind", ["pixels", "latents"])
def test_known_pixels_stay_exactly(kind: str, request: pytest.FixtureRequest) -> None:
    pipe = hd.load(request.getfixturevalue("run" if kind == "pixels" else "latent_run"))
    images, hole = torch.rand(3, 3, 16, 16), torch.zeros(1, 1, 16, 16)
    hole[..., 4:9, 3:12] = 1
    calls: list[tuple[int, int]] = []
    found = pipe.edit(
        images, hole, ["a", "b", -1], num_inference_steps=3, resamples=2, progress=lambda *step: calls.append(step)
    )
    outside = (hole == 0).expand_as(images)
    assert torch.equal(found[outside], images[outside])
    assert not torch.equal(found, images)
    assert float(found.min()) >= 0
    assert float(found.max()) <= 1
    assert calls == [(k, 5) for k in range(1, 6)]


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp", "ddpm", "flow-euler"])
@pytest.mark.parametrize("kind", ["pixels", "latents"])
def test_strength_is_how_much_changes(kind: str, sampler: str, request: pytest.FixtureRequest) -> None:
    pipe = hd.load(request.getfixturevalue("run" if kind == "pixels" else "latent_run"))
    images = torch.rand(2, 3, 16, 16)
    unchanged = images if kind == "pixels" else pipe.codec.decode(pipe.codec.draw(pipe.codec.posterior(images), None))
    changes = []
    for strength in (0.001, 0.3, 1.0):
        options = {"strength": strength, "num_inference_steps": 8, "sampler": sampler}
        found = pipe.edit(images, class_labels="a", generator=torch.Generator().manual_seed(0), **options)
        again = pipe.edit(images, class_labels="a", generator=torch.Generator().manual_seed(0), **options)
        assert torch.equal(found, again)
        changes.append(float((found - unchanged).abs().mean()))
    assert changes[0] < changes[1] < changes[2] or kind == "latents"
    assert changes[0] < 0.05


def test_texts_edit_as_classes_do(text_run: Path) -> None:
    """The prompt changes what is drawn; known pixels stay; the prior is that of the prompt, not of the image."""
    pipe = hd.load(text_run)
    images, hole = torch.rand(3, 3, 16, 16), torch.zeros(1, 1, 16, 16)
    hole[..., 4:9, 3:12] = 1
    outside = (hole == 0).expand_as(images)
    drawn = {}
    for prompts in (None, "a red circle", ["a red circle", "a blue square", "a red circle"]):
        for mask in (hole, None):
            generators = [torch.Generator().manual_seed(k) for k in range(3)]
            found = pipe.edit(images, mask, prompts, num_inference_steps=3, guidance_scale=3.0, generator=generators)
            assert found.shape == images.shape
            assert torch.isfinite(found).all()
            if mask is not None:
                assert torch.equal(found[outside], images[outside])
                assert not torch.equal(found, images)
            drawn[str(prompts), mask is None] = found
    for whole in (False, True):
        one, each, none = (drawn[key, whole] for key in ("a red circle", str(prompts), "None"))
        assert torch.equal(one[[0, 2]], each[[0, 2]])
        assert not torch.equal(one[1], each[1])
        assert not torch.equal(one, none)


def test_editing_texts_is_drawing_where_nothing_is_known(text_run: Path) -> None:
    """At strength 1 the image hardly counts, and what comes out is what is drawn from the same noise."""
    pipe = hd.load(text_run)
    condition = pipe.encode_text("a red circle").expand(2, -1)
    noise = [torch.Generator().manual_seed(k) for k in range(2)]
    timesteps = noising_timesteps(1000, 100)
    settings = pipe.sampling_settings(guidance_scale=2.0)
    prior, null = pipe.codec.prior(condition), torch.zeros_like(condition)
    z = pipe.draw_latents(
        (condition, prior),
        (null, pipe.codec.prior(null)),
        (2, 6, 4, 4),
        noise,
        settings,
        sampler="ddim",
        timesteps=timesteps,
        callback=lambda step, t, z: z,
        progress=lambda total: None,
    )
    options = {"strength": 1.0, "num_inference_steps": 100, "guidance_scale": 2.0, "sampler": "ddim"}
    generators = [torch.Generator().manual_seed(k) for k in range(2)]
    found = pipe.edit(torch.rand(2, 3, 16, 16), None, "a red circle", generator=generators, **options)
    assert float((found - pipe.codec.decode(z)).abs().max()) < 0.05


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"images": torch.rand(2, 1, 16, 16)}, r"this run edits \(B, 3, 16, 16\)"),
        ({"images": torch.rand(2, 3, 32, 32)}, r"this run edits \(B, 3, 16, 16\)"),
        ({"prompts": ["one", "two", "three"]}, "3 prompts for 2 images"),
        ({"mask": torch.zeros(1, 1, 16, 16)}, "mask of the single value 0"),
    ],
)
def test_what_is_no_edit_of_texts(arguments: dict, message: str, text_run: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        hd.load(text_run).edit(**{"images": torch.rand(2, 3, 16, 16), **arguments})


WRONG = {
    "shape": ({"images": torch.rand(2, 1, 16, 16)}, r"this run edits \(B, 3, H, W\)"),
    "size": ({"images": torch.rand(2, 3, 15, 16)}, "divisible by 2"),
    "mask of another size": ({"mask": torch.zeros(1, 1, 8, 8)}, r"mask \(1, 1, 8, 8\): expected \(2, 1, 16, 16\)"),
    "nothing masked": ({"mask": torch.zeros(1, 1, 16, 16)}, "mask of the single value 0"),
    "all masked": ({"mask": torch.ones(1, 1, 16, 16)}, "mask of the single value 1"),
    "grey mask": ({"mask": torch.rand(1, 1, 16, 16)}, "mask of 256 different values"),
    "no strength": ({"strength": 0.0}, "strength 0.0: expected a number above 0"),
    "too strong": ({"strength": 1.5}, "strength 1.5: expected"),
    "NaN": ({"strength": math.nan}, "strength nan: expected"),
    "class": ({"class_labels": "c"}, "class 'c'"),
    "both": ({"mask": torch.eye(16)[None, None], "strength": 0.5}, "strength and sampler are for image to image"),
    "resamples": ({"mask": torch.eye(16)[None, None], "resamples": 0}, "resamples 0: expected at least 1"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_no_edit(case: str, run: Path) -> None:
    arguments, message = WRONG[case]
    with pytest.raises(ConfigError, match=message):
        hd.load(run).edit(**{"images": torch.rand(2, 3, 16, 16), **arguments})


def test_a_mask_is_resized_with_its_image(tmp_path: Path) -> None:
    spec = ImageSpec(8, 8, 3, (), (0.0, 255.0), "uint8")
    Image.new("RGB", (32, 16)).save(tmp_path / "image.png")
    mask = np.zeros((16, 32), np.uint8)
    mask[:, 16:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    found = read_mask(tmp_path / "mask.png", tmp_path / "image.png", spec, "crop")
    assert found.shape == (1, 1, 8, 8)
    assert found[0, 0].mean(dim=0).tolist() == [0] * 4 + [1] * 4


def edit(*arguments: object) -> int | str | None:
    with pytest.raises(SystemExit) as ended:
        main(["edit", *map(str, arguments)])
    return ended.value.code


def test_command(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = run.parent / "data" / "a" / "0.png"
    mask = np.zeros((16, 16), np.uint8)
    mask[4:8, 4:8] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    assert edit(run, image, "--mask", tmp_path / "mask.png", "--class", "b", "-n", 2, "--out", tmp_path / "out") == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "0_0000.png",
        "0_0001.png",
        "grid.png",
        "settings.json",
    ]
    original = np.asarray(Image.open(image))
    for k in range(2):
        found = np.asarray(Image.open(tmp_path / "out" / f"0_000{k}.png"))
        assert (found[mask == 0] == original[mask == 0]).all()
        assert (found[mask > 0] != original[mask > 0]).any()
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())
    assert (settings["command"], settings["class"], settings["strength"]) == ("edit", "b", None)
    capsys.readouterr()
    Image.new("L", (8, 8)).save(tmp_path / "small.png")
    Image.new("L", (16, 16)).save(tmp_path / "black.png")
    for arguments, message in (
        (("--mask", tmp_path / "small.png"), "expected the size of the image, 16x16, found 8x8"),
        (
            ("--mask", tmp_path / "black.png"),
            "expected two values, the higher one where to draw anew, found the",
        ),
        (("--mask", tmp_path / "none.png"), "none.png: no such mask file"),
        (("--mask", image), "different values; save it as png"),
        (("--strength", 7), "strength 7.0: expected"),
    ):
        assert edit(run, image, *arguments) == 1
        printed = capsys.readouterr().err
        assert message in printed
        assert printed.count("\n") == 1
    assert edit(run, tmp_path / "gone.png") == 1
    assert "gone.png: no such image file" in capsys.readouterr().err
    with pytest.raises(DataError, match="no such mask"):
        read_mask(tmp_path / "none.png", image, hd.load(run).spec, "crop")


def test_command_for_texts(text_run: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = run.parent / "data" / "a" / "0.png"
    out = ("-n", 2, "--steps", 2, "--out", tmp_path / "out")
    assert edit(text_run, image, "--prompt", "", *out) == 0  # as an empty prompt of text2image
    assert "note     an empty text means no condition" in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "settings.json").read_text())["prompt"] == ""
    assert len(list((tmp_path / "out").glob("0_*.png"))) == 2
    for folder, option, own in ((text_run, "class", "prompt"), (run, "prompt", "class")):
        assert edit(folder, image, f"--{option}", "b") == 1
        printed = capsys.readouterr().err
        assert f"--{option} is not for {folder}, which draws images of a {own}; use --{own}" in printed
        assert printed.count("\n") == 1


def test_runs_that_do_not_edit(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = run.parent / "data" / "a" / "0.png"
    train(text_config(tmp_path / "alignment", "alignment"), quiet=True)
    assert edit(tmp_path / "alignment", image, "--prompt", "b") == 1
    assert "this run has no denoiser (recipe alignment)" in capsys.readouterr().err
