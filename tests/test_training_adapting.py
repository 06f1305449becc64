"""Runs that train a part of the weights of another one: low-rank updates, or what belongs to the condition."""

import copy
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from heterodiff.config import ModelConfig
from heterodiff.config.file import parse_config
from heterodiff.data.dataset import ImageSpec
from heterodiff.errors import ConfigError
from heterodiff.models.variants import VARIANTS, create_model, list_models
from heterodiff.pipelines.load import load_generation
from heterodiff.training.preflight.memory_plan import training_memory_bytes
from heterodiff.training.recipes.adapting import (
    LAYERS,
    MOST_SHARE,
    OF_CONDITION,
    LowRank,
    merged,
    save_updates,
    train_part,
)
from heterodiff.training.start import train
from tests.test_training_initial import begun, config, folder_of, weights_of
from tests.training_runs import assert_same_run, last_checkpoint

UPDATES = ("adapter/adapter_model.safetensors", "unet/diffusion_pytorch_model.safetensors")


def small_network(variant: str, **changes: Any) -> tuple[Any, dict[str, Tensor]]:
    """A network with random weights everywhere, and inputs for it."""
    torch.manual_seed(0)
    inputs = {"sample": torch.randn(2, 4, 8, 8), "timestep": torch.tensor([10.0, 500.0])}
    if variant in VARIANTS:
        arguments = {"sample_size": 8, "in_channels": 4, "num_classes": 3, "channel_mult": (1, 2)}
        inputs["class_labels"] = torch.tensor([0, -1])
    else:
        arguments = {"latent_channels": 4, "latent_size": 8, "condition_dim": 16}
        inputs["condition"] = torch.randn(2, 16)
    network = create_model(variant, model_channels=32, layers_per_block=1, **arguments, **changes)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return network, inputs


def with_updates(variant: str, rank: int = 2) -> tuple[Any, Any, dict[str, Tensor]]:
    """A network, the same with random low-rank updates, and inputs for both."""
    base, inputs = small_network(variant)
    network = copy.deepcopy(base)
    train_part(network, ModelConfig(variant=variant, train="lora", lora_rank=rank))
    with torch.no_grad():
        assert torch.equal(network(**inputs).sample, base(**inputs).sample)  # updates start at zero
        for module in network.modules():
            if isinstance(module, LowRank):
                nn.init.normal_(module.lora_B, std=0.1)
    return base, network, inputs


@pytest.mark.parametrize("variant", list_models())
def test_gradients_reach_all_updates_and_nothing_else(variant: str) -> None:
    base, network, inputs = with_updates(variant)
    network.train()
    network(**inputs).sample.square().sum().backward()
    trained = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert {name for name, p in network.named_parameters() if p.grad is not None and p.grad.any()} == trained
    updated = {name.partition(".parametrizations")[0] for name in trained if name.endswith("lora_A")}
    layers = {name: m for name, m in base.named_modules() if isinstance(m, LAYERS) or hasattr(m, "in_proj_weight")}
    weights = {
        name: getattr(m, "in_proj_weight", None) if not isinstance(m, LAYERS) else m.weight
        for name, m in layers.items()
    }
    assert updated == {name for name, weight in weights.items() if min(len(weight), weight[0].numel()) > 2}


@pytest.mark.parametrize("variant", list_models())
def test_merged_weights_are_those_of_peft_and_draw_the_same(variant: str, tmp_path: Path) -> None:
    """peft reads the written updates and adds them to the base's weights by itself."""
    base, network, inputs = with_updates(variant)
    found = merged(network)
    with torch.no_grad():
        expected = network.eval()(**inputs).sample
        assert (found(**inputs).sample - expected).abs().max() < 1e-5
        assert (base.eval()(**inputs).sample - expected).abs().max() > 1e-2
    save_updates(network, tmp_path / "adapter", Path("runs/base"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its dependencies
        from peft import PeftModel

        theirs = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
        theirs.merge_adapter()
    wrapped = ("base_model.model.", "base_layer.", "modules_to_save.default.")
    weights = {}
    for name, value in theirs.state_dict().items():
        if "lora_" not in name and "original_module" not in name:
            for part in wrapped:
                name = name.replace(part, "")
            weights[name] = value
    assert weights.keys() == found.state_dict().keys()
    assert all((weights[name] - value).abs().max() < 1e-6 for name, value in found.state_dict().items())


@pytest.mark.parametrize("variant", VARIANTS)
def test_few_weights_are_trained_at_default_widths(variant: str) -> None:
    with torch.device("meta"):
        network = create_model(variant, sample_size=32, num_classes=10)
        count = sum(p.numel() for p in network.parameters())
        train_part(network, ModelConfig(variant=variant, train="lora"))
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    ranks = {len(module.lora_A) for module in network.modules() if isinstance(module, LowRank)}
    assert len(ranks) == 1
    assert ranks.pop() > 1
    assert 0.01 * count < trained <= MOST_SHARE * count


# ---- runs --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    train(config(folder / "run", folder_of(folder / "data", "cat", "dog")), quiet=True)
    return folder / "run"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return folder_of(tmp_path_factory.mktemp("new") / "data", "ant", "cat")


@pytest.mark.parametrize("mode", ["lora", "conditions"])
def test_a_run_trains_its_part_and_goes_on_exactly(mode: str, base: Path, data: str, tmp_path: Path) -> None:
    part = {"model__init_from": str(base), "model__train": mode, "training__checkpoint_every": 1}
    straight, stopped = (config(tmp_path / name, data, **part) for name in ("one", "two"))
    train(straight, quiet=True)
    train(stopped, quiet=True, stop_after=2)
    shutil.rmtree(sorted((tmp_path / "two/checkpoints").iterdir())[-1])  # killed before it was there
    train(stopped, quiet=True)
    assert_same_run(tmp_path / "one", tmp_path / "two")
    if mode == "lora":
        assert (tmp_path / "one" / UPDATES[0]).read_bytes() == (tmp_path / "two" / UPDATES[0]).read_bytes()

    tensors = last_checkpoint(tmp_path / "one")[1]
    started = begun(tmp_path / "start", data, base)
    frozen = {n: v for n, v in weights_of(base).items() if mode == "lora" or not OF_CONDITION.fullmatch(n)}
    frozen.pop("label_emb.weight", None)
    plain = {n.replace("parametrizations.", "").replace(".original", ""): v for n, v in tensors.items()}
    for name, value in frozen.items():
        assert torch.equal(plain[f"ema/{name}"], value), name
        assert torch.equal(plain[f"model/{name}"], value), name
    moved = {name.partition("/")[2].rpartition("/")[0] for name in tensors if name.startswith("optimizer/")}
    assert not any(name.endswith("original") for name in moved)
    assert "label_emb.weight" in moved
    assert moved.isdisjoint(frozen)
    rows = tensors["model/label_emb.weight"] - started["label_emb.weight"]
    assert (rows.abs().amax(1) > 1e-4).all()  # of the class that the base knows, and of the new one


def test_the_pipeline_holds_merged_weights_and_needs_no_peft(base: Path, data: str, tmp_path: Path) -> None:
    long = {"training__steps": 8, "training__learning_rate": 0.01}
    train(config(tmp_path / "run", data, model__init_from=str(base), model__train="lora", **long), quiet=True)
    tensors = last_checkpoint(tmp_path / "run")[1]
    saved, known = load_file(tmp_path / "run" / UPDATES[1]), load_file(base / UPDATES[1])
    updates = load_file(tmp_path / "run" / UPDATES[0])
    changed = 0
    for name, value in saved.items():
        layer = name.removesuffix(".weight")
        a, b = (updates.get(f"base_model.model.{layer}.lora_{part}.weight") for part in "AB")
        if a is None or b is None:
            continue
        expected = known[name] + torch.einsum("or,r...->o...", b.flatten(1), a)
        assert torch.allclose(value, expected, atol=1e-6)
        changed += not torch.allclose(value, known[name], atol=1e-5)
    assert changed > 20
    assert not any("parametrizations" in name for name in saved)
    assert torch.equal(saved["label_emb.weight"], tensors["ema/label_emb.weight"])
    assert load_generation(tmp_path / "run")(0, num_inference_steps=2).images[0].shape[-2:] == (8, 8)
    sizes = [(tmp_path / "run" / name).stat().st_size for name in UPDATES]
    assert sizes[0] < 0.1 * sizes[1]


def test_a_base_without_classes(data: str, tmp_path: Path) -> None:
    train(config(tmp_path / "plain", folder_of(tmp_path / "flat")), quiet=True)
    part = {"model__init_from": str(tmp_path / "plain")}
    with pytest.raises(ConfigError, match=r"^model.init_from=.*without classes.*model.train=conditions or all$"):
        train(config(tmp_path / "run", data, model__train="lora", **part), quiet=True)
    train(config(tmp_path / "run", data, model__train="conditions", **part), quiet=True)
    flat = str(tmp_path / "flat")
    with pytest.raises(ConfigError, match=r"^model\.train=conditions: unet-conv has no weights of a condition"):
        train(config(tmp_path / "other", flat, model__train="conditions", **part), quiet=True)


def test_layers_no_wider_than_the_rank(base: Path, data: str, tmp_path: Path) -> None:
    part = {"model__init_from": str(base), "model__train": "lora", "model__lora_rank": 1000}
    with pytest.raises(
        ConfigError, match=r"no attention, linear or convolution layer .* wider than model\.lora_rank=1000"
    ):
        train(config(tmp_path / "run", data, **part), quiet=True)


REFUSED = {
    "no base": ({"train": "lora"}, {}, "model.train=lora is read only with model.init_from"),
    "rank of none": ({"init_from": "x", "lora_rank": 4}, {}, "model.lora_rank=4 is read only with model.train=lora"),
    "split": (
        {"init_from": "x", "train": "lora"},
        {"fsdp": True},
        "training.fsdp=true splits networks that are trained",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_settings_that_do_not_go_together(case: str) -> None:
    model, training, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message):
        parse_config({"model": model, "training": training, "data": {"source": "digits"}})


def test_the_memory_plan_knows_of_it() -> None:
    """Gradients, moments and averages of few weights; the difference is 12 of 20 bytes of the others."""
    spec = ImageSpec(channels=1, height=8, width=8, class_names=("a", "b"), value_range=(0, 255), dtype="uint8")

    def needed(**model: Any) -> float:
        content = {
            "data": {"source": "digits"},
            "model": {"model_channels": 128, **model},
            "training": {"batch_size": 1},
        }
        return training_memory_bytes(parse_config(content), spec)

    count = sum(
        p.numel()
        for p in create_model(
            "unet-conv", sample_size=8, in_channels=1, num_classes=2, model_channels=128, channel_mult=(1, 2)
        ).parameters()
    )
    saved = needed() - needed(init_from="x", train="lora")
    assert (12 - 20 * MOST_SHARE) * count <= saved <= 12 * count
