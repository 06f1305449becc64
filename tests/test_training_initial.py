"""Runs that begin with the weights of another one."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from heterodiff.errors import ConfigError, RunError
from heterodiff.run_folder import CHECKPOINTS
from heterodiff.training.checkpoints.checkpoint import list_checkpoints, read_checkpoint
from heterodiff.training.start import train
from tests.training_runs import assert_same_run, losses_of, tiny_config

SMALL = {"model__variant": "unet-conv", "model__channel_mult": [1, 1], "training__log_every": 1}


def folder_of(root: Path, *classes: str) -> str:
    rng = np.random.default_rng(0)
    for name in classes or ("",):
        (root / name).mkdir(parents=True)
        for k in range(6):
            Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(root / name / f"{k}.png")
    return str(root)


def config(output: Path, data: str, **changes: Any) -> Any:
    given = {"data__source": "images", "data__path": data, "training__steps": 3, "training__warmup_steps": 0}
    return tiny_config(output, **{**SMALL, **given, **changes})


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    train(config(folder / "run", folder_of(folder / "data", "cat", "dog")), quiet=True)
    return folder / "run"


def weights_of(run: Path) -> dict[str, Tensor]:
    return dict(read_checkpoint(list_checkpoints(run / CHECKPOINTS)[-1]).tensors["ema"])


def begun(output: Path, data: str, base: Path, **changes: Any) -> dict[str, Tensor]:
    """The weights after a step that changes nothing that can be seen."""
    once = {"training__steps": 1, "training__learning_rate": 1e-12}
    train(config(output, data, model__init_from=str(base), **once, **changes), quiet=True)
    return weights_of(output)


def test_the_same_classes_go_on(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the EMA weights of the run, the ones that are used."""
    data = str(base.parent / "data")
    found, expected = begun(tmp_path / "run", data, base), weights_of(base)
    assert found.keys() == expected.keys()
    assert all(torch.allclose(found[name], expected[name], atol=1e-6) for name in expected)


def test_classes_are_known_by_name(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = folder_of(tmp_path / "data", "ant", "bee", "dog")
    once = {"training__steps": 1, "training__learning_rate": 1e-12, "training__seed": 1}
    train(config(tmp_path / "run", data, model__init_from=str(base), **once))
    assert f"note     begins with the weights of {base}; new: 2 of 3 classes" in capsys.readouterr().out
    table, known = weights_of(tmp_path / "run")["label_emb.weight"], weights_of(base)["label_emb.weight"]
    assert torch.allclose(table[2], known[1], atol=1e-6)  # dog
    assert not torch.allclose(table[0], known[0], atol=1e-3)


@pytest.mark.parametrize("classes", [("cat", "dog"), ()], ids=["classes of none", "none of classes"])
def test_a_condition_may_be_new_or_left_out(classes: tuple[str, ...], base: Path, tmp_path: Path) -> None:
    if classes:
        train(config(tmp_path / "plain", folder_of(tmp_path / "flat")), quiet=True)
        base = tmp_path / "plain"
    found = begun(tmp_path / "run", folder_of(tmp_path / "data", *classes), base)
    expected = weights_of(base)
    assert ("label_emb.weight" in found) == bool(classes)
    shared = found.keys() & expected.keys()
    assert "input_blocks.0.0.weight" in shared
    assert all(torch.allclose(found[name], expected[name], atol=1e-6) for name in shared)


def test_a_run_that_goes_on_needs_its_base_no_more(base: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(base, tmp_path / "base"))
    data = str(base.parent / "data")
    straight, stopped = (config(tmp_path / name, data, model__init_from=str(copied)) for name in ("one", "two"))
    train(straight, quiet=True)
    train(stopped, quiet=True, stop_after=1)
    shutil.rmtree(copied)
    train(stopped, quiet=True)
    assert_same_run(tmp_path / "one", tmp_path / "two")
    assert losses_of(tmp_path / "one") != losses_of(base)


WRONG = {
    "width": ({"model__model_channels": 64}, r"another architecture: model_channels 32 there, 64 here"),
    "levels": ({"model__channel_mult": [1, 2]}, r"channel_mult \[1, 1\] there, \[1, 2\] here"),
    "variant": ({"model__variant": "hae-v3"}, r"a network unet-conv, model.variant is hae-v3"),
    "prediction": ({"diffusion__prediction": "epsilon"}, "its network predicts v, diffusion.prediction is epsilon"),
}


@pytest.mark.parametrize("case", WRONG)
def test_another_network_is_refused(case: str, base: Path, tmp_path: Path) -> None:
    changes, message = WRONG[case]
    run = config(tmp_path / "run", str(base.parent / "data"), model__init_from=str(base), **changes)
    with pytest.raises(ConfigError, match=rf"^model.init_from={base}: .*{message}"):
        train(run, quiet=True)
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_no_run_there(base: Path, tmp_path: Path) -> None:
    run = config(tmp_path / "run", str(base.parent / "data"), model__init_from=str(tmp_path / "gone"))
    with pytest.raises(RunError, match=r"^model\.init_from: .*gone: no such"):
        train(run, quiet=True)
