"""Networks of other libraries in our training loop, as one more variant."""

from dataclasses import replace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from torch import Tensor

from heterodiff.config import readers
from heterodiff.models.backbone import UNetOutput
from heterodiff.models.unet import HAEUNet
from heterodiff.models.variants import VARIANTS, Variant

HEAD_CHANNELS, ATTENTION_SIDE = 32, 16
PEER = "diffusers"


class DiffusersUNet(HAEUNet):
    """diffusers' UNet2DModel with the arguments of ours: same widths and depth, attention on maps of at most 16x16."""

    def _make_embeddings(self) -> int:
        return 0

    def _build(self, embedding_dim: int) -> None:
        c = self.config
        size = c.sample_size if isinstance(c.sample_size, int) else max(c.sample_size)
        side, area = size // c.patch_size, c.patch_size**2
        attended = [side // 2**level <= ATTENTION_SIDE for level in range(len(c.channel_mult))]
        self.network = UNet2DModel(
            sample_size=side,
            in_channels=c.in_channels * area,
            out_channels=(c.out_channels or c.in_channels) * area,
            block_out_channels=self._widths(),
            layers_per_block=c.layers_per_block,
            down_block_types=["AttnDownBlock2D" if has else "DownBlock2D" for has in attended],
            up_block_types=["AttnUpBlock2D" if has else "UpBlock2D" for has in reversed(attended)],
            attention_head_dim=HEAD_CHANNELS,
            num_class_embeds=None if c.num_classes is None else c.num_classes + 1,  # the last: no class
        )

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
        condition: Tensor | None = None,
    ) -> Any:
        """As :meth:`HAEUNet.forward`."""
        classes = self.config.num_classes
        if classes is not None:
            none = torch.full((len(sample),), classes, device=sample.device)
            class_labels = none if class_labels is None else torch.where(class_labels < 0, classes, class_labels)
        h = F.pixel_unshuffle(sample, self.patch_size).contiguous(memory_format=torch.channels_last)
        out = F.pixel_shuffle(self.network(h, timestep, class_labels=class_labels).sample, self.patch_size)
        return UNetOutput(sample=out) if return_dict else (out,)


def register_peers() -> None:
    """Let configurations name the networks of this file, and pipelines load them."""
    VARIANTS[PEER] = Variant("diffusers' UNet2DModel", network=f"{__name__}:DiffusersUNet")
    for index, reader in enumerate(readers.READERS):
        if reader.covers("model.patch_size") and reader.decided_by == "model.variant":
            everywhere = replace(reader, reads=lambda run: run.model.variant in VARIANTS)
            readers.READERS = (*readers.READERS[:index], everywhere, *readers.READERS[index + 1 :])
    mock.patch("heterodiff.pipelines.load.HAEUNet", (HAEUNet, DiffusersUNet)).start()
