"""Run folders as pipelines: loading, drawing, determinism, and diffusers' own view of the folder."""

import json
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import heterodiff as hd
from heterodiff.errors import CheckpointError, ConfigError, RunError
from heterodiff.pipelines.generate import GenerationPipeline, seeded_generators
from heterodiff.pipelines.image_files import draw_classes, write_images
from heterodiff.training.start import train
from tests.training_runs import last_checkpoint, tiny_config


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    train(tiny_config(folder, training__steps=12, diffusion__prediction="v"), quiet=True)
    return folder


def test_weights_to_use_are_the_ema_weights(run: Path) -> None:
    _, tensors, _ = last_checkpoint(run)
    saved = load_file(run / "unet" / "diffusion_pytorch_model.safetensors")
    assert saved.keys() == {k.removeprefix("ema/") for k in tensors if k.startswith("ema/")}
    assert all(torch.equal(saved[k], tensors[f"ema/{k}"]) for k in saved)
    assert any(not torch.equal(saved[k], tensors[f"model/{k}"]) for k in saved)


def test_images_are_deterministic_and_independent_of_the_batch(run: Path) -> None:
    pipe = hd.load(run)
    together = pipe([3, 5, -1, 3], generator=seeded_generators(0, 4)).images
    assert together.shape == (4, 1, 8, 8)
    assert 0 <= float(together.min()) <= float(together.max()) <= 1
    assert torch.equal(together, pipe([3, 5, -1, 3], generator=seeded_generators(0, 4)).images)
    for k, label in enumerate([3, 5, -1, 3]):
        alone = pipe([label], generator=[seeded_generators(0, 4)[k]]).images
        torch.testing.assert_close(alone[0], together[k], atol=1e-4, rtol=0)
    pieces = pipe([3, 5, -1, 3], generator=seeded_generators(0, 4), batch_size=3).images
    torch.testing.assert_close(pieces, together, atol=1e-4, rtol=0)
    assert not torch.equal(together[0], together[3])
    assert not torch.equal(together, pipe([3, 5, -1, 3], generator=seeded_generators(1, 4)).images)


def test_the_label_matters_and_guidance_amplifies_it(run: Path) -> None:
    pipe = hd.load(run)

    def draw(label: int, scale: float) -> torch.Tensor:
        return pipe([label], generator=seeded_generators(0, 1), guidance_scale=scale, num_inference_steps=4).images

    none = draw(-1, 1.0)
    weak, strong = (draw(3, 1.0) - none).norm(), (draw(3, 4.0) - none).norm()
    assert 0 < weak < strong
    torch.testing.assert_close(draw(3, 0.0), none, atol=1e-5, rtol=0)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpmpp", "unipc", "euler", "heun", "flow-euler"])
def test_every_sampler_draws(sampler: str, run: Path) -> None:
    images = hd.load(run)("3", 2, sampler=sampler, generator=seeded_generators(0, 2), num_inference_steps=3).images
    assert torch.isfinite(images).all()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"class_labels": 10}, "0..9"),
        ({"class_labels": -2}, "-1 for none"),
        ({"class_labels": "three"}, "expected a class name"),
        ({"class_labels": [1, 2], "num_images": 3}, "num_images=3"),
        ({"sampler": "dpmp"}, "did you mean 'dpmpp'"),
        ({"num_inference_steps": 5000}, "1000"),
        ({"guidance_scale": -1.0}, "guidance_scale"),
        ({"output_type": "jpeg"}, "output_type"),
        ({"size": (9, 8)}, "divisible by 2"),
    ],
)
def test_bad_requests_are_explained(arguments: dict, expected: str, run: Path) -> None:
    with pytest.raises(ConfigError) as error:
        hd.load(run)(**arguments)
    assert expected in str(error.value)


def test_diffusers_loads_the_folder_and_samples_from_it(run: Path) -> None:
    pipe = diffusers.DDPMPipeline(
        unet=hd.HAEUNet.from_pretrained(run / "unet"),
        scheduler=diffusers.DDPMScheduler.from_pretrained(run / "scheduler"),
    )
    pipe.set_progress_bar_config(disable=True)
    images = pipe(
        batch_size=2, num_inference_steps=3, generator=torch.Generator().manual_seed(0), output_type="np"
    ).images
    assert images.shape == (2, 8, 8, 1)
    again = GenerationPipeline.from_pretrained(run)
    assert torch.equal(next(again.unet.parameters()), next(pipe.unet.parameters()))


def test_files_are_the_images_and_a_second_time_identical(run: Path, tmp_path: Path) -> None:
    pipe = hd.load(run)
    images, _ = draw_classes(pipe, [3, 7], 2, seed=0)
    for folder in ("a", "b"):
        write_images(*draw_classes(pipe, [3, 7], 2, seed=0), pipe, tmp_path / folder)
    names = sorted(p.name for p in (tmp_path / "a").iterdir())
    numbered = [f"{c}_000{k}.{suffix}" for c in (3, 7) for k in (0, 1) for suffix in ("npy", "png")]
    assert names == [*numbered, "grid.png"]
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    stored = np.load(tmp_path / "a" / "7_0001.npy")
    np.testing.assert_allclose(stored, 16 * images[3].numpy(), atol=1e-5)  # the digits' own units, 0 to 16
    with Image.open(tmp_path / "a" / "grid.png") as grid:
        assert grid.width > 100
    only_seven, _ = draw_classes(pipe, [7], 2, seed=0)
    torch.testing.assert_close(only_seven, images[2:], atol=1e-4, rtol=0)


def broken(run: Path, tmp_path: Path, how: str) -> Path:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    weights = copy / "unet" / "diffusion_pytorch_model.safetensors"
    if how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif how == "no weights":
        weights.unlink()
    elif how == "pickle":
        tensors = load_file(weights)
        weights.unlink()
        torch.save(tensors, copy / "unet" / "diffusion_pytorch_model.bin")
    elif how == "other network":
        save_file({"a": torch.zeros(2)}, weights)
    elif how == "other pipeline":
        (copy / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    elif how == "not JSON":
        (copy / "unet" / "config.json").write_text("{")
    elif how == "unknown scheduler":
        (copy / "scheduler" / "scheduler_config.json").write_text(json.dumps({"_class_name": "PNDMSchedular"}))
    return copy


@pytest.mark.parametrize(
    "how",
    ["truncated", "no weights", "pickle", "other network", "other pipeline", "not JSON", "unknown scheduler"],
)
def test_broken_folders_are_explained(how: str, run: Path, tmp_path: Path) -> None:
    folder = broken(run, tmp_path, how)
    with pytest.raises(CheckpointError) as error:
        hd.load(folder)
    assert str(folder) in str(error.value)


def test_folders_without_a_run_are_explained(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no such run folder"):
        hd.load(tmp_path / "nothing")
    with pytest.raises(RunError, match="no finished weights"):
        hd.load(tmp_path)


def test_integer_labels_are_indices_even_where_names_are_other_numbers(run: Path) -> None:
    pipe = hd.load(run)
    pipe.class_names = tuple("1234567890")
    assert [pipe.class_index(k) for k in (0, 1, 9, -1)] == [0, 1, 9, -1]
    assert [pipe.class_index(k) for k in ("0", "1", "9", "-1")] == [9, 0, 8, -1]
    assert pipe._labels(torch.tensor([0, 1, 2]), None).tolist() == [0, 1, 2]


def test_classes_whose_names_clean_up_alike_do_not_overwrite_each_other(run: Path, tmp_path: Path) -> None:
    pipe = hd.load(run)
    pipe.class_names = ("a b", "a_b", *map(str, range(8)))
    images, labels = draw_classes(pipe, [0, 1], 2, seed=0)
    written = write_images(images, labels, pipe, tmp_path / "out")
    assert len(set(written)) == len(written) == 5
