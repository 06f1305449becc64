"""The networks that are compared: ours, a naive version of ours, and others of the same widths."""

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from heterodiff.models.variants import VARIANTS, create_model
from tests.oracles.naive_backbone import make_naive

SIZE, CHANNELS, CLASSES = 128, 4, 2
CONFIG: dict[str, Any] = {
    "sample_size": SIZE,
    "in_channels": CHANNELS,
    "model_channels": 128,
    "channel_mult": (1, 1, 2, 3, 4),
    "attention_resolutions": (4, 8, 16),
    "num_classes": CLASSES,
    "num_heads": 4,
}
"""Configuration B: 99 million parameters, the size class of the brain MRI models."""
WIDTHS = (128, 128, 256, 384, 512)
ATTENTION = (False, False, True, True, True)
HEAD_WIDTH = 64

NETWORKS = [*VARIANTS, "hae-v2 naive", "diffusers", "MONAI"]


def build(name: str) -> nn.Module:
    """One of ``NETWORKS``, called as (B, 4, H, W), timesteps (B,), labels (B,) -> (B, 4, H, W)."""
    torch.manual_seed(0)
    if name == "diffusers":
        return Peer(_diffusers())
    if name == "MONAI":
        return Peer(_monai())
    model = create_model(name.split()[0], **CONFIG)
    return Peer(make_naive(model) if name.endswith("naive") else model)


class Peer(nn.Module):
    """One call signature for all of them."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, timestep: Tensor, labels: Tensor) -> Tensor:
        out = self.network(x, timestep, class_labels=labels)
        return out if isinstance(out, Tensor) else out.sample


def _diffusers() -> nn.Module:
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=SIZE,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        block_out_channels=WIDTHS,
        layers_per_block=2,
        down_block_types=["AttnDownBlock2D" if a else "DownBlock2D" for a in ATTENTION],
        up_block_types=["AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(ATTENTION)],
        attention_head_dim=HEAD_WIDTH,
        num_class_embeds=CLASSES,
    )


def _monai() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from monai.networks.nets import DiffusionModelUNet

    return DiffusionModelUNet(
        spatial_dims=2,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_res_blocks=2,
        channels=WIDTHS,
        attention_levels=ATTENTION,
        num_head_channels=HEAD_WIDTH,
        norm_num_groups=32,
        num_class_embeds=CLASSES,
    )


def inputs(batch: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Images, timesteps and labels."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, CHANNELS, SIZE, SIZE, generator=generator)
    return x, torch.full((batch,), 500), torch.ones(batch, dtype=torch.long)


def forward(network: nn.Module, *arguments: Tensor) -> None:
    """As in sampling."""
    with torch.no_grad():
        network(*arguments)


def train(network: nn.Module, *arguments: Tensor) -> None:
    """Forward and backward pass as in training, without the optimiser, which is the same for all."""
    network(*arguments).square().mean().backward()
    network.zero_grad(set_to_none=True)


def main() -> None:
    """Print the peak memory in MB of a process that trains the named network for two steps."""
    import sys

    network = build(sys.argv[1]).train()
    for _ in range(2):
        train(network, *inputs())
    status = Path("/proc/self/status").read_text("utf-8").splitlines()  # getrusage would count the parent, too
    print(next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024 / 1e6)


if __name__ == "__main__":
    main()
