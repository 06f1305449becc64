"""Patch discriminator, which makes a VAE's decoder learn detail."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class PatchDiscriminator(nn.Module):
    """Scores of overlapping patches of an image: high for real ones, low for reconstructions (Isola et al. 2017).

    Group norms instead of batch norms, so that the scores of an image do not depend on the others of its batch.

    Args:
        channels: channels of the images.
        width: channels of the first layer; each of ``layers`` halvings doubles them, up to eight times.
    """

    def __init__(self, channels: int, width: int = 32, layers: int = 2):
        super().__init__()
        body: list[nn.Module] = [nn.Conv2d(channels, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        for k in range(1, layers + 1):
            before, after = width * min(2 ** (k - 1), 8), width * min(2**k, 8)
            stride = 2 if k < layers else 1
            body += [nn.Conv2d(before, after, 4, stride, 1, bias=False), nn.GroupNorm(8, after), nn.LeakyReLU(0.2)]
        self.body = nn.Sequential(*body, nn.Conv2d(width * min(2**layers, 8), 1, 4, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) in [-1, 1] -> scores (B, patches)."""
        return self.body(images).flatten(1)


def hinge_losses(real: Tensor, fake: Tensor) -> Tensor:
    """Discriminator loss (B,) of each pair from scores (B, patches): zero beyond +1 for real and -1 for fake."""
    return 0.5 * (F.relu(1 - real).mean(dim=1) + F.relu(1 + fake).mean(dim=1))


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last_layer: nn.Parameter) -> Tensor:
    """Weight that gives the adversarial loss a gradient as large as the reconstruction loss has (Esser et al. 2021).

    Args:
        reconstruction, adversarial: scalar losses whose graphs are kept.
        last_layer: weight of the decoder's last layer, where the gradients are compared.

    Returns:
        A scalar between 0 and 1e4, without gradient.
    """
    wanted, found = (
        torch.autograd.grad(loss, last_layer, retain_graph=True)[0] for loss in (reconstruction, adversarial)
    )
    return (wanted.norm() / (found.norm() + 1e-4)).clamp(0, 1e4).detach()
