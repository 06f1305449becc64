"""Compares, in each of several processes, networks whose weights are split with whole ones; started by torchrun."""

import copy

import torch
import torch.distributed as dist
from torch import nn
from torch.testing import assert_close

from heterodiff.models.variants import VARIANTS, create_model, list_models
from heterodiff.training.processes import make_accelerator, own_part, put, split_weights, whole

SIZE, IMAGES, WIDTH = 16, 4, 8
RECOMPUTES = False, True


def step(network: nn.Module, whole_batch: bool) -> None:
    """One update of AdamW, on all images or on this process's."""
    torch.manual_seed(1)
    inputs, times = torch.randn(IMAGES, 1, SIZE, SIZE), torch.rand(IMAGES) * 1000
    share = slice(None) if whole_batch else slice(dist.get_rank(), None, dist.get_world_size())
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2, fused=True)
    conditions = torch.randn(IMAGES, WIDTH)
    network(inputs[share], times[share], condition=conditions[share]).sample.square().mean().backward()
    optimizer.step()


def compare(variant: str) -> None:
    """A step of a network with a condition vector, without and with recomputation of its blocks."""
    for recomputes in RECOMPUTES:
        torch.manual_seed(0)
        names = ("in_channels", "sample_size") if variant in VARIANTS else ("latent_channels", "latent_size")
        sizes = dict(zip(names, (1, SIZE), strict=True))
        network = create_model(
            variant, **sizes, condition_dim=WIDTH, model_channels=32, channel_mult=(1, 2), use_checkpoint=recomputes
        )
        for parameter in network.parameters():  # some are zero at first, behind which no gradient passes
            nn.init.normal_(parameter, std=0.05)
        other = copy.deepcopy(network)
        split = split_weights(network)
        assert sum(own_part(p).numel() for p in split.parameters()) < 0.6 * sum(p.numel() for p in other.parameters())
        step(split, False)
        step(other, True)
        for (name, value), expected in zip(split.named_parameters(), other.parameters(), strict=True):
            assert value.grad is not None, name
            assert_close(
                whole(value.grad), expected.grad, atol=1e-5, rtol=1e-3, msg=lambda m, name=name: f"{name}: {m}"
            )
            put(expected, value)
            assert torch.equal(whole(value), expected), name


def main() -> None:
    accelerator = make_accelerator()
    for variant in list_models():
        compare(variant)
        if accelerator.is_main_process:
            print(variant, flush=True)
    accelerator.wait_for_everyone()


if __name__ == "__main__":
    main()
