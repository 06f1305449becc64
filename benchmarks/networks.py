"""The networks that are compared: ours, a naive version of ours, and others of the same widths."""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from heterodiff.models.variants import VARIANTS, create_model

CHANNELS, CLASSES = 4, 2


@dataclass(frozen=True)
class Scale:
    """How large the compared networks and their images are.

    Attributes:
        size: side of the images.
        width: channels of the first level.
        channel_mult: channels of each level, in units of ``width``.
        attention: whether a level has attention.
        head_width: channels of an attention head of the other networks.
    """

    size: int = 128
    width: int = 128
    channel_mult: tuple[int, ...] = (1, 1, 2, 3, 4)
    attention: tuple[bool, ...] = (False, False, True, True, True)
    head_width: int = 64

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(self.width * m for m in self.channel_mult)

    @property
    def config(self) -> dict[str, Any]:
        """Arguments of ours."""
        return {
            "sample_size": self.size,
            "in_channels": CHANNELS,
            "model_channels": self.width,
            "channel_mult": self.channel_mult,
            "attention_resolutions": tuple(2**level for level, has in enumerate(self.attention) if has),
            "num_classes": CLASSES,
            "num_heads": 4,
        }


B = Scale()
"""Configuration B: 99 million parameters, the size class of the brain MRI models."""
SIZE, CONFIG = B.size, B.config

NETWORKS = [*VARIANTS, "hae-v2 naive", "diffusers", "MONAI"]


def build(name: str, scale: Scale = B) -> nn.Module:
    """One of ``NETWORKS``, called as (B, 4, H, W), timesteps (B,), labels (B,) -> (B, 4, H, W)."""
    torch.manual_seed(0)
    if name == "diffusers":
        return Peer(_diffusers(scale))
    if name == "MONAI":
        return Peer(_monai(scale))
    model = create_model(name.split()[0], **scale.config)
    if name.endswith("naive"):
        from tests.oracles.naive_backbone import make_naive

        model = make_naive(model)
    return Peer(model)


class Peer(nn.Module):
    """One call signature for all of them."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, timestep: Tensor, labels: Tensor) -> Tensor:
        out = self.network(x, timestep, class_labels=labels)
        return out if isinstance(out, Tensor) else out.sample


def _diffusers(scale: Scale) -> nn.Module:
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=scale.size,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        block_out_channels=scale.widths,
        layers_per_block=2,
        down_block_types=["AttnDownBlock2D" if a else "DownBlock2D" for a in scale.attention],
        up_block_types=["AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(scale.attention)],
        attention_head_dim=scale.head_width,
        num_class_embeds=CLASSES,
    )


def _monai(scale: Scale) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from monai.networks.nets import DiffusionModelUNet

    return DiffusionModelUNet(
        spatial_dims=2,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_res_blocks=2,
        channels=scale.widths,
        attention_levels=scale.attention,
        num_head_channels=scale.head_width,
        norm_num_groups=32,
        num_class_embeds=CLASSES,
    )


def inputs(batch: int = 1, size: int = SIZE) -> tuple[Tensor, Tensor, Tensor]:
    """Images, timesteps and labels."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, CHANNELS, size, size, generator=generator)
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
