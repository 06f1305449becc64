"""Contrastive alignment of images and texts: symmetric InfoNCE with a learned temperature."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

INITIAL_SCALE = 1 / 0.07
MAX_LOG_SCALE = 4.60517
"""log 100, rounded down so that its exponential in float32 is at most 100."""


class LogitScale(nn.Module):
    """Learned inverse temperature, stored as its logarithm in [0, log 100].

    Source: Radford et al. 2021 (CLIP), section 2.5.
    """

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(math.log(INITIAL_SCALE)))

    def forward(self) -> Tensor:
        """Return the scale, in [1, 100], after clamping the parameter itself.

        A clamp in the graph has no gradient outside the range, so a parameter that left it could not come back.
        """
        with torch.no_grad():
            self.log_scale.clamp_(0, MAX_LOG_SCALE)
        return self.log_scale.exp()


def contrastive_losses(
    image_embeddings: Tensor, text_embeddings: Tensor, logit_scale: Tensor, same: Tensor | None = None
) -> Tensor:
    """Symmetric InfoNCE of each pair; computed in float32.

    Args:
        image_embeddings, text_embeddings: (B, D), of any length; row i of one belongs to row i of the other.
        logit_scale: scalar, see :class:`LogitScale`.
        same: (B, B) bool, True where image i and text j match although i != j (equal captions): no negatives.

    Returns:
        (B,): half the cross-entropy of an image among the texts and half that of a text among the images, in nats.

    Source: Radford et al. 2021 (CLIP), figure 3; van den Oord et al. 2018 (InfoNCE).
    """
    with torch.autocast(image_embeddings.device.type, enabled=False):  # bfloat16 would round logits near 100 by 0.25
        images = F.normalize(image_embeddings.float(), dim=1)
        texts = F.normalize(text_embeddings.float(), dim=1)
        logits = logit_scale.float() * images @ texts.T
        own = torch.arange(len(logits), device=logits.device)
        if same is not None:
            others = ~torch.eye(len(logits), dtype=torch.bool, device=logits.device)
            logits = logits.masked_fill(same.to(logits.device) & others, -math.inf)
        rows = F.cross_entropy(logits, own, reduction="none")
        columns = F.cross_entropy(logits.T, own, reduction="none")
        return 0.5 * (rows + columns)
