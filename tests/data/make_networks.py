"""Make tests/data/networks: outputs and gradients of a small network of each variant, computed by the oracle.

    python -m tests.data.make_networks [NAME]...

Weights are made from their names (see tests/golden_files.py); outputs and gradients come from
tests/oracles/whole_network.py in float64, so that no number in these files was computed by the networks they test.
Files are made anew only when a network changes on purpose, and such a change breaks the checkpoints of all users.
"""

import json
import sys
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

import heterodiff as hd
from tests.golden_files import DATA, summary, uniform, weight
from tests.oracles.whole_network import predict

SMALL = {"in_channels": 2, "model_channels": 8, "channel_mult": (4, 4), "layers_per_block": 1, "num_classes": 3}
OPTIONS = {"use_scale_shift_norm": True, "num_head_channels": 16, "patch_size": 2, "out_channels": 4}
NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "unet": ("unet", SMALL),
    "unet-options": ("unet", SMALL | OPTIONS),
    "hae": ("hae", SMALL),
    "hae-lite": ("hae-lite", SMALL),
    "hae-v2": ("hae-v2", SMALL),
    "hae-v2-conservative": ("hae-v2-conservative", SMALL),
    "hae-v2-conservative-public": ("hae-v2-conservative-public", SMALL),
    "hae-v2-vector": ("hae-v2", {**SMALL, "num_classes": None, "condition_dim": 6}),
    "hae-v3": ("hae-v3", SMALL),
    "unet-conv": ("unet-conv", SMALL),
    "unet-lean": ("unet-lean", SMALL),
    "film-unet": (
        "film-unet",
        {"latent_channels": 2, "latent_size": 4, "condition_dim": 6, "model_channels": 32, "layers_per_block": 1},
    ),
}
SIZES = {"film-unet": (4, 6)}
SIZE = (16, 24)


def inputs(name: str, classes: bool) -> dict[str, Tensor]:
    """Three images, of which the second has no condition."""
    condition = torch.tensor([2, -1, 0]) if classes else uniform("condition", (3, 6)) * torch.tensor([[1.0], [0], [1]])
    return {
        "in.x": 2 * uniform("x", (3, 2, *SIZES.get(name, SIZE))),
        "in.t": torch.tensor([3, 500, 999]),
        "in.condition": condition,
    }


def make(name: str) -> None:
    """Write the golden file ``name``."""
    variant, arguments = NETWORKS[name]
    torch.manual_seed(0)
    model = hd.create_model(variant, **arguments)
    config = {key: value for key, value in model.config.items() if not key.startswith("_")}
    shapes = {key: list(value.shape) for key, value in model.state_dict().items()}
    trained = [key for key, _ in model.named_parameters()]
    weights = {key: weight(key, shape).double().requires_grad_(key in trained) for key, shape in shapes.items()}
    tensors = inputs(name, classes=arguments.get("num_classes") is not None)
    x = tensors["in.x"].double()
    condition = tensors["in.condition"]
    out = predict(weights, config, x, tensors["in.t"], condition if condition.ndim == 1 else condition.double())
    out.square().mean().backward()
    gradients = {key: torch.zeros(shapes[key]) if weights[key].grad is None else weights[key].grad for key in trained}
    tensors["out"] = out.detach().float()
    tensors["gradients"] = torch.stack([summary(key, gradients[key]) for key in trained])
    metadata = {"variant": variant, "arguments": arguments, "shapes": shapes, "trained": trained}
    path = DATA / "networks" / f"{name}.safetensors"
    path.parent.mkdir(exist_ok=True)
    save_file(tensors, path, {key: json.dumps(value) for key, value in metadata.items()})


if __name__ == "__main__":
    for each in sys.argv[1:] or NETWORKS:
        make(each)
