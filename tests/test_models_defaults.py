"""The same words give the same network: to ``create_model``, to ``heterodiff models`` and in a configuration."""

from typing import Any

import pytest
import torch

import heterodiff as hd
from heterodiff.config.file import parse_config
from heterodiff.data.dataset import ImageSpec
from heterodiff.models.backbone import Backbone
from heterodiff.models.profile import model_table
from heterodiff.models.unet import HAEUNet
from heterodiff.models.variants import NETWORKS, VARIANTS, create_model
from heterodiff.training.recipes.arguments import model_arguments
from heterodiff.training.recipes.text_image import denoiser_arguments

WORDS: dict[str, tuple[int | tuple[int, int], dict[str, Any]]] = {
    "none": (64, {}),
    "small images": (8, {"layers_per_block": 1}),
    "wide images": ((96, 192), {"model_channels": 32}),
    "patches": (128, {"patch_size": 2, "num_heads": 2}),
    "levels": (64, {"channel_mult": (1, 3)}),
    "no attention": (16, {"attention_resolutions": ()}),
    "sparser": (32, {"sparsity": 0.5, "dropout": 0.1, "num_head_channels": 32, "attention_resolutions": (1,)}),
}


def described(network: Backbone) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments, and shapes of all weights, of a network."""
    config = network.config
    size = config["sample_size"]
    arguments = {key: tuple(value) if isinstance(value, list) else value for key, value in config.items()}
    arguments |= {"sample_size": (size, size) if isinstance(size, int) else size}
    arguments |= {"out_channels": config["out_channels"] or config["in_channels"]}
    return (
        {key: value for key, value in arguments.items() if not key.startswith("_")},
        {key: value.shape for key, value in network.state_dict().items()},
    )


@pytest.mark.parametrize("case", WORDS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_three_ways_to_one_network(variant: str, case: str) -> None:
    size, words = WORDS[case]
    height, width = (size, size) if isinstance(size, int) else size
    given = words if size == 64 else {"sample_size": size, **words}
    config = parse_config({"model": {"variant": variant, **words}}, tolerated=None)  # unet reads no sparsity
    of_config = model_arguments(config, ImageSpec(height, width, 3, (), (0.0, 255.0), "uint8"))
    with torch.device("meta"):
        made, from_yaml = create_model(variant, **given), create_model(variant, **of_config)
        direct = HAEUNet(variant=variant, **given)
    assert described(made) == described(from_yaml) == described(direct)
    if case in ("none", "levels"):
        (row,) = model_table({"variant": variant, **given})
        assert row["parameters"] == sum(p.numel() for p in made.parameters())
        assert row["config"]["channel_mult"] == made.config.channel_mult


def test_three_ways_to_the_film_unet() -> None:
    config = parse_config({"recipe": "text-image", "model": {"norm_groups": 32}, "text": {"embedding_dim": 512}})
    of_config = denoiser_arguments(config, ImageSpec(224, 224, 3, (), (0.0, 255.0), "uint8"), (256, 7, 7))
    expected_map = {"guess_channels": of_config["guess_channels"]}  # which the recipe adds
    with torch.device("meta"):
        made, from_yaml = hd.create_model("film-unet", **expected_map), hd.create_model("film-unet", **of_config)
    (row,) = model_table({"variant": "film-unet", **expected_map})
    found, expected = described(from_yaml), described(made)
    assert found[1] == expected[1]
    assert {k: v for k, v in found[0].items() if "size" not in k and k != "out_channels"} == {
        k: v for k, v in expected[0].items() if "size" not in k and k != "out_channels"
    }
    assert row["parameters"] == sum(p.numel() for p in made.parameters())
    assert list(NETWORKS) == ["film-unet"]


@pytest.mark.parametrize(
    ("side", "mult", "attention"),
    [
        (8, (1, 2), (1, 2)),
        (32, (1, 2, 2), (2, 4)),
        (64, (1, 2, 2, 4), (4, 8)),
        (128, (1, 1, 2, 3, 4), (8, 16)),
        (256, (1, 1, 2, 2, 4, 4), (16, 32)),
    ],
)
def test_levels_follow_the_size_and_are_saved(side: int, mult: tuple, attention: tuple, tmp_path) -> None:
    with torch.device("meta"):
        model = create_model("unet", sample_size=side, model_channels=32, layers_per_block=1)
    assert (model.config.channel_mult, model.config.attention_resolutions) == (mult, attention)
    model.save_config(tmp_path)
    saved = HAEUNet.load_config(tmp_path)
    assert (saved["channel_mult"], saved["attention_resolutions"]) == (list(mult), list(attention))
