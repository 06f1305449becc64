"""Conditions: rows without one, and the condition tokens of the attention blocks in closed form."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

NO_CLASS = -1
"""Class label of rows without a condition."""


def drop_condition(labels: Tensor, probability: float, generator: torch.Generator | None = None) -> Tensor:
    """Replace labels (B,) by -1 with ``probability`` each (classifier-free guidance, Ho & Salimans 2022)."""
    keep = torch.rand(labels.shape, device=labels.device, generator=generator) >= probability
    return torch.where(keep, labels, NO_CLASS)


class AttributeEmbedding(nn.Module):
    """Embedding of several attributes: the sum of those that are given.

    Numbers pass through sines and cosines of several frequencies (Tancik et al. 2020) and a small network, so that
    values that lie close together can be told apart.

    Args:
        attributes: number of classes of each; 0 for a number.
        width: of the embedding.
    """

    FREQUENCIES = 6

    def __init__(self, attributes: Sequence[int], width: int):
        super().__init__()
        self.each = nn.ModuleList(
            nn.Embedding(classes, width)
            if classes
            else nn.Sequential(nn.Linear(2 * self.FREQUENCIES + 1, width), nn.SiLU(), nn.Linear(width, width))
            for classes in attributes
        )

    def forward(self, values: Tensor) -> Tensor:
        """Embed values (B, A), class indices and standardised numbers, NaN where missing; returns (B, width).

        Rows without any are zero.
        """
        given, values = ~values.isnan(), values.nan_to_num()
        found = [torch.where(given[:, k : k + 1], self._one(k, values[:, k]), 0) for k in range(len(self.each))]
        return torch.stack(found).sum(dim=0)

    def _one(self, place: int, values: Tensor) -> Tensor:
        one = self.each[place]
        if isinstance(one, nn.Embedding):
            return one(values.long())
        angles = values[:, None] * (math.pi / 4 * 2.0 ** torch.arange(self.FREQUENCIES, device=values.device) / 2)
        features = torch.cat([values[:, None], angles.sin(), angles.cos()], dim=1)
        return one(features.to(next(one.parameters()).dtype))


@dataclass(frozen=True)
class Conditions:
    """Everything that a denoiser of images is given beside the noise, each None for none.

    Attributes:
        labels: classes (B,), -1 for rows without one.
        attributes: (B, A), see :class:`AttributeEmbedding`.
        image: maps of condition images (B, k, h, w), zero in rows without one.
    """

    labels: Tensor | None = None
    attributes: Tensor | None = None
    image: Tensor | None = None

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Conditions":
        return Conditions(**{k: None if v is None else change(v) for k, v in vars(self).items()})

    def rows(self, part: slice) -> "Conditions":
        """Return the conditions of the images in ``part``."""
        return self._each(lambda value: value[part])

    def to(self, device: torch.device) -> "Conditions":
        """Return a copy on ``device``."""
        return self._each(lambda value: value.to(device))

    def none(self) -> "Conditions":
        """Return the condition "none" of the same kinds."""
        empty = {"labels": NO_CLASS, "attributes": math.nan, "image": 0.0}
        return Conditions(**{k: None if v is None else torch.full_like(v, empty[k]) for k, v in vars(self).items()})

    def any(self) -> bool:
        """Return whether any image has any condition; for conditions on the CPU."""
        attributes = self.attributes is not None and not bool(self.attributes.isnan().all())
        return self.image is not None or attributes or (self.labels is not None and bool((self.labels >= 0).any()))

    def call(self, network: Callable[..., Any], z: Tensor, time: Tensor) -> Tensor:
        """Call the denoiser at z (B, C, h, w) and network times (B,), in training and in sampling."""
        more = {} if self.attributes is None else {"attributes": self.attributes}
        sample = z if self.image is None else torch.cat([z, self.image.to(z)], dim=1)
        return network(sample, time, class_labels=self.labels, **more).sample


def zero_rows(c: Tensor, given: Tensor, zero_threshold: float | None) -> Tensor:
    """Condition embedding c (B, E) with exact zeros in rows without a condition.

    Args:
        given: (B,) bool, True for rows with a condition.
        zero_threshold: rows whose largest absolute value is at most this count as rows without; None: no threshold.
    """
    if zero_threshold is not None:
        given = given & ~(c.detach().abs().amax(dim=1) <= zero_threshold)  # NaN stays visible
    return torch.where(given[:, None], c, 0)


def attend_with_condition(
    q: Tensor,
    kv: Tensor,
    condition: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    merge_tokens: bool | None = None,
    shown: Tensor | None = None,
) -> Tensor:
    """Attention over the positions and the E condition tokens.

    The tokens are the columns of the outer product c c^T (E, E) after a 1x1 projection W, b. Column s of that
    product is c c_s, so token s has the key u c_s + b_k and the value w c_s + b_v with u = W_k c, w = W_v c:
    rank one, and the product is never formed.

    The score of token s is alpha c_s + beta with alpha = q.u and beta = q.b_k (both scaled). For a query, all E tokens
    together are therefore equivalent to one with score beta + log sum_s exp(alpha c_s) and value w r + b_v, where r is
    the mean of c_s under the weights exp(alpha c_s). For c = 0 these are beta + log E and b_v.

    Args:
        q: (B, T, heads, d).
        kv: (B, T, heads, 2, d), keys and values.
        condition: c (B, E), zeros in rows without a condition; None if no row has one.
        weight, bias: (2 * heads * d, E) and (2 * heads * d,), rows per head [k; v].
        merge_tokens: replace the E tokens by that one. Default: on a CPU, for at most E positions, where it is less
            work; elsewhere it takes four times the kernel launches, and fused kernels do not take its head width.
        shown: bool scalar on the device, False hides all condition tokens; they are then not merged.

    Returns:
        (B, T, heads, d).
    """
    if shown is None and merge_tokens is None:
        merge_tokens = q.device.type == "cpu" and q.shape[1] <= weight.shape[1]
    if merge_tokens:
        return _attend_merged(q, kv, condition, weight, bias)
    batch, _, heads, _, width = kv.shape
    tokens = bias.to(q.dtype).expand(batch, weight.shape[1], -1)
    if condition is not None:
        c, factors = condition.to(q.dtype), F.linear(condition, weight).to(q.dtype)
        tokens = torch.baddbmm(tokens, c[:, :, None], factors[:, None])
    every = tokens.unflatten(-1, (heads, 2, width)).to(kv.dtype), kv
    k, v = torch.cat([t.permute(3, 0, 2, 1, 4) for t in every], dim=3)  # each (B, heads, E + T, d)
    mask = None
    if shown is not None:
        seen = torch.ones(kv.shape[1], dtype=torch.bool, device=kv.device)
        mask = torch.cat([shown.expand(tokens.shape[1]), seen])[None, None, None]
    return F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=mask).transpose(1, 2)


def _attend_merged(q: Tensor, kv: Tensor, condition: Tensor | None, weight: Tensor, bias: Tensor) -> Tensor:
    q, (k, v) = q.transpose(1, 2), kv.transpose(1, 2).unbind(3)
    batch, heads, _, width = q.shape
    bias_k, bias_v = bias.to(q.dtype).view(heads, 2, 1, width).unbind(1)
    dtype = torch.promote_types(q.dtype, torch.float32)
    if condition is None:
        total, offset = q.new_full((), math.log(weight.shape[1]), dtype=dtype).expand(q.shape[:3]), None
    else:
        u, w = F.linear(condition, weight).to(q.dtype).view(batch, heads, 2, 1, width).unbind(2)
        alpha = (q * u).sum(-1, dtype=dtype) * width**-0.5
        total, mean = log_sum_and_mean(alpha, condition.to(dtype))
        offset = mean.unsqueeze(-1).to(q.dtype) * w
    return _attend_with_one(q, k, v, total, offset, bias_k, bias_v).transpose(1, 2)


def _attend_with_one(
    q: Tensor, k: Tensor, v: Tensor, total: Tensor, offset: Tensor | None, bias_k: Tensor, bias_v: Tensor
) -> Tensor:
    """Attention over the positions and one token with score q.bias_k + total and value bias_v + offset.

    ``total`` (B, heads, T) and ``offset`` (B, heads, T, d; None: 0) depend on the query; the biases are (heads, 1, d).
    Two more channels carry the score: q holds ``total`` there as a number and its rounding error, the token's key ones,
    all other keys zeros. One more value channel is 1 for the token alone, so that its output is the token's weight, by
    which the offset is multiplied.
    """
    batch, heads, _, width = q.shape
    scale = width**-0.5
    score = total / scale
    high = score.to(q.dtype)
    low = (score - high).to(q.dtype)
    ones = bias_k.new_ones(heads, 1, 2)
    ones_v = torch.stack([ones[..., 0], torch.zeros_like(ones[..., 0])], -1)
    token_k = torch.cat([bias_k, ones], -1).expand(batch, heads, 1, width + 2)
    token_v = torch.cat([bias_v, ones_v], -1).expand(batch, heads, 1, width + 2)
    out = F.scaled_dot_product_attention(
        torch.cat([q, high[..., None], low[..., None]], dim=-1),
        torch.cat([token_k, F.pad(k, (0, 2))], dim=2),
        torch.cat([token_v, F.pad(v, (0, 2))], dim=2),
        scale=scale,
    )
    answer, token_weight = out[..., :width], out[..., width : width + 1]
    return answer if offset is None else answer + token_weight * offset


def log_sum_and_mean(alpha: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """log sum_s exp(alpha c_s) and the mean of c_s under those weights, (B, heads, T) each.

    alpha is (B, heads, T), c (B, E).
    """
    if torch.compiler.is_compiling():  # fused there, without forming the scores
        scores = alpha[..., None] * c[:, None, None]
        return scores.logsumexp(-1), (scores.softmax(-1) * c[:, None, None]).sum(-1)
    total, mean = _LogSumAndMean.apply(alpha.flatten(1), c)
    return total.view_as(alpha), mean.view_as(alpha)


class _LogSumAndMean(torch.autograd.Function):
    """Function of alpha (B, N) and c (B, E) that recomputes the weights (B, N, E) in the backward pass."""

    @staticmethod
    def forward(ctx: Any, alpha: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        # Relative to the heaviest token, so that no large numbers cancel where it takes all the weight.
        ends = torch.stack([c.amax(1), c.amin(1)], dim=1)  # (B, 2)
        far = c[..., None] - ends[:, None]  # (B, E, 2)
        heaviest = (alpha < 0).long()
        pivot = ends.gather(1, heaviest)
        with torch.autocast(alpha.device.type, enabled=False):
            moments = torch.cat([torch.ones_like(far[..., :1]), far, far * far], dim=-1)
            sums = _weights(alpha, c, alpha * pivot) @ moments  # (B, N, 5)
        total = alpha * pivot + sums[..., 0].log()
        first, second = (sums[..., 1:] / sums[..., :1]).unflatten(-1, (2, 2)).unbind(2)
        offset = first.gather(2, heaviest[..., None]).squeeze(2)
        mean, variance = pivot + offset, second.gather(2, heaviest[..., None]).squeeze(2) - offset * offset
        ctx.save_for_backward(alpha, c, total, mean, variance)
        return total, mean

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, grad_mean: Tensor) -> tuple[Tensor, Tensor]:
        alpha, c, total, mean, variance = ctx.saved_tensors
        factors = torch.stack([grad_total * alpha + grad_mean * (1 - alpha * mean), grad_mean * alpha], dim=-1)
        with torch.autocast(alpha.device.type, enabled=False):
            sums = _weights(alpha, c, total).transpose(1, 2) @ factors  # (B, E, 2)
        return grad_total * mean + grad_mean * variance, sums[..., 0] + c * sums[..., 1]


def _weights(alpha: Tensor, c: Tensor, top: Tensor) -> Tensor:
    """exp(alpha c_s - top) (B, N, E)."""
    return (alpha[..., None] * c[:, None]).sub_(top[..., None]).exp_()
