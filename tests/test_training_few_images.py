"""The short form for a few images of each class, and the images that the base run draws beside them."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from heterodiff.config import CodecConfig
from heterodiff.config.file import load_config, parse_config
from heterodiff.errors import ConfigError
from heterodiff.run_folder import RunFolder
from heterodiff.training.build import build_recipe, load_run_data
from heterodiff.training.recipes.preservation import FILE, Preserved
from heterodiff.training.start import train
from tests.test_training_initial import config, folder_of
from tests.training_runs import assert_same_run


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    changes = {"diffusion__prediction": "flow", "sampling__guidance_scale": 3.0, "model__patch_size": 2}
    train(config(folder / "run", folder_of(folder / "data", "cat", "dog"), **changes), quiet=True)
    return folder / "run"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return folder_of(tmp_path_factory.mktemp("new") / "data", "ant", "dog")


def short(base: Path, data: str, **sections: Any) -> dict[str, Any]:
    return {"recipe": "adapt", "data": {"path": data}, "model": {"init_from": str(base)}, **sections}


def test_five_lines_are_a_whole_run(base: Path, data: str, tmp_path: Path) -> None:
    file = tmp_path / "few.yaml"
    file.write_text(f"recipe: adapt\ndata: {{path: {data}}}\nmodel:\n  init_from: {base}\n")
    found, known = load_config(file), RunFolder(base).config()
    assert found.recipe == "diffusion"
    assert found.model.train == "lora"
    assert (found.diffusion, found.sampling) == (known.diffusion, known.sampling)
    part = {"init_from": None, "train": "all"}
    assert found.model.model_copy(update=part) == known.model.model_copy(update={"dropout": found.model.dropout})
    assert found.data.image_size == (8, 8)
    assert found.data.val_fraction == 0
    assert found.training.steps < 1000
    few = load_config(file, ["training.steps=2", f"output={tmp_path / 'run'}", "training.warmup_steps=0"])
    train(few, quiet=True)
    assert load_config(tmp_path / "run/config.yaml") == RunFolder(tmp_path / "run").config()
    assert (tmp_path / "run/adapter/adapter_config.json").is_file()
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    assert train(few.model_copy(update={"output": tmp_path / "again"}), quiet=True).step == 2  # it goes on as any run


def test_what_is_given_wins(base: Path, data: str) -> None:
    found = parse_config(short(base, data, training={"minutes": 2}, sampling={"guidance_scale": 1.5}))
    assert found.training.minutes == 2
    assert found.sampling.guidance_scale == 1.5
    whole = {"init_from": str(base), "train": "all", "model_channels": 64}
    found = parse_config(short(base, data) | {"model": whole})
    assert found.model.train == "all"
    assert found.model.model_channels == 64  # which init_from refuses, naming both widths
    with pytest.raises(ConfigError, match=r"^configuration: diffusion.prediction: Input should be"):
        parse_config(short(base, data, diffusion={"prediction": "x"}))


def test_latent_runs_keep_their_vae(tmp_path: Path, base: Path, data: str) -> None:
    latent = Path(shutil.copytree(base, tmp_path / "latent"))
    run = RunFolder(latent)
    codec = CodecConfig(kind="kl-vae", path=Path("gone"), statistics="measured")
    run.save_config(run.config().model_copy(update={"codec": codec}))
    found = parse_config(short(latent, data)).codec
    assert (found.kind, found.path, found.statistics) == ("kl-vae", latent, "stored")


@pytest.mark.parametrize(
    ("model", "message"),
    [({}, "expected model.init_from: RUN, a finished run"), ({"init_from": "gone"}, "found no config.yaml")],
)
def test_no_run_to_go_on_from(model: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=f"recipe: adapt: .*{message}"):
        parse_config({"recipe": "adapt", "model": model})


# ---- prior preservation ------------------------------------------------------------------------------------------

PRIOR = {"model__train": "lora", "model__prior_preservation": 0.5, "model__prior_images": 3}
OF_BASE = {"diffusion__prediction": "flow", "model__patch_size": 2}


def test_a_run_keeps_the_images_that_its_base_has_drawn(base: Path, data: str, tmp_path: Path) -> None:
    copied = shutil.copytree(base, tmp_path / "base")
    part = {"model__init_from": str(copied), "training__checkpoint_every": 1, **PRIOR, **OF_BASE}
    straight, stopped = (config(tmp_path / name, data, **part) for name in ("one", "two"))
    train(straight, quiet=True)
    drawn = safetensors.torch.load_file(tmp_path / "one" / FILE)
    assert drawn["images"].shape == (6, 1, 8, 8)
    assert drawn["images"].min() >= 0
    assert drawn["images"].max() <= 1
    assert drawn["labels"].tolist() == [-1, -1, -1, 1, 1, 1]  # of the cat, which is no class here, and the dog
    train(stopped, quiet=True, stop_after=1)
    shutil.rmtree(copied)
    train(stopped, quiet=True)
    assert_same_run(tmp_path / "one", tmp_path / "two")
    assert "prior_loss" in (tmp_path / "one/metrics.jsonl").read_text()


def test_the_loss_is_that_of_both_batches(base: Path, data: str, tmp_path: Path) -> None:
    run = config(tmp_path / "run", data, model__init_from=str(base), **PRIOR, **OF_BASE)
    loaded = load_run_data(run)
    recipe: Any = build_recipe(run, loaded)
    recipe.model.eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in recipe.model.parameters():  # the last layer is zero at first
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    images, labels = loaded.train.batch([0, 1, 2, 3])
    inputs = recipe.prepare(images)
    plain = recipe.draw(0, 4, torch.Generator().manual_seed(1), torch.device("cpu"))
    recipe.preserved = Preserved(torch.randn(6, 1, 8, 8), torch.tensor([-1, -1, -1, 1, 1, 1]))
    draws = recipe.draw(0, 4, torch.Generator().manual_seed(1), torch.device("cpu"))
    assert draws.preserved is not None
    assert torch.equal(draws.noise, plain.noise)
    with torch.no_grad():
        found = recipe.losses(recipe.model, inputs, labels, draws)
        own = recipe.losses(recipe.model, inputs, labels, plain).each
        rows = draws.preserved
        drawn = recipe.preserved
        prior = recipe.losses(recipe.model, drawn.inputs[rows], drawn.labels[rows], replace(draws, preserved=None)).each
        validated = recipe.validate([(inputs, labels)], seed=0)
        recipe.preserved = None
        assert recipe.validate([(inputs, labels)], seed=0) == validated
    assert torch.allclose(found.each, own + 0.5 * prior, rtol=1e-5)
    assert torch.allclose(found.parts["prior_loss"], prior, rtol=1e-5)
    assert (prior > 0.1).all()
