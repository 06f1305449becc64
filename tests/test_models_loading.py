"""Loading networks strictly: what is not exactly a network of the right class, whole and finite, is refused."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from heterodiff import FiLMUNet, HAEUNet, create_model
from heterodiff.errors import CheckpointError
from heterodiff.models.loading import load_network, read_network_config

WEIGHTS = "diffusion_pytorch_model.safetensors"
WAY_OUT = "train it again"
TINY = {"sample_size": 8, "in_channels": 1, "model_channels": 32, "channel_mult": (1, 1), "layers_per_block": 1}


@pytest.fixture(scope="module")
def network() -> HAEUNet:
    return create_model("unet", **TINY)


@pytest.fixture
def folder(network: HAEUNet, tmp_path: Path) -> Path:
    network.save_pretrained(tmp_path / "unet")
    return tmp_path / "unet"


def change_weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        weights = load_file(folder / WEIGHTS)
        change(weights)
        save_file(weights, folder / WEIGHTS)

    return damage


def change_config(**changes: object) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return damage


def first(weights: dict[str, torch.Tensor]) -> str:
    return min(weights)


DAMAGES = {
    "NaN": (change_weights(lambda w: w[first(w)].view(-1)[0].fill_(torch.nan)), "NaN or infinite weights"),
    "infinite": (change_weights(lambda w: w[first(w)].view(-1)[-1].fill_(-torch.inf)), "NaN or infinite weights"),
    "a weight less": (change_weights(lambda w: w.pop(first(w))), "weights of another network"),
    "a weight more": (change_weights(lambda w: w.update(extra=torch.ones(1))), r"weights of another network \(extra"),
    "another shape": (change_weights(lambda w: w.update({first(w): torch.ones(3, 5)})), "damaged|another network"),
    "another width": (change_config(model_channels=64), "damaged network|another network"),
    "cut off": (lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-8]), "damaged network"),
    "no safetensors": (lambda folder: (folder / WEIGHTS).write_bytes(b"x" * 100), "not safetensors"),
    "only a pickle": (lambda folder: (folder / WEIGHTS).rename(folder / "diffusion_pytorch_model.bin"), "missing"),
    "another class": (change_config(_class_name="AutoencoderKL"), "class HAEUNet or FiLMUNet, found AutoencoderKL"),
    "no class": (lambda folder: (folder / "config.json").write_text("{}"), "HAEUNet or FiLMUNet, found None"),
    "no config": (lambda folder: (folder / "config.json").unlink(), r"config\.json: missing"),
    "no JSON": (lambda folder: (folder / "config.json").write_text("{"), r"config\.json: not readable as JSON"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_anything_but_a_whole_network_is_refused(damage: str, folder: Path) -> None:
    change, message = DAMAGES[damage]
    change(folder)
    with pytest.raises(CheckpointError, match=message) as error:
        load_network((HAEUNet, FiLMUNet), folder, WAY_OUT)
    assert str(error.value).startswith(str(folder))
    assert str(error.value).endswith(f"; {WAY_OUT}")


@pytest.mark.parametrize("variant", ["unet", "hae-v2"])
def test_a_whole_network_is_loaded_as_it_was_saved(variant: str, tmp_path: Path) -> None:
    network = create_model(variant, **TINY)
    network.save_pretrained(tmp_path)
    before = torch.get_rng_state()
    loaded = load_network(HAEUNet, tmp_path)
    assert torch.equal(before, torch.get_rng_state())
    assert not loaded.training
    assert type(loaded) is HAEUNet
    expected = network.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())
    assert read_network_config(HAEUNet, tmp_path)["model_channels"] == 32
