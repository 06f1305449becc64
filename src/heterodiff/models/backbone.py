"""What all denoisers share: embedding of time and condition, the pass down and up with skips, layout of the weights."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from heterodiff.errors import ConfigError
from heterodiff.models.blocks import recomputed, timestep_embedding
from heterodiff.models.conditioning import zero_rows
from heterodiff.models.normalization import NORM_GROUPS


@dataclass
class UNetOutput(BaseOutput):
    """Output of a :class:`Denoiser`: ``sample`` (B, out_channels, H, W)."""

    sample: Tensor


WHITENING_FLOOR = 1e-5
"""Share of the variance below which directions of conditions count as noise and are not drawn out."""

Recompute = Literal["nothing", "cheap", "all"]
"""What the backward pass computes again instead of keeping it: nothing; what is cheap beside the memory it takes
(norms, activations, attention, hybrid blocks); or all, block by block."""


def whitening(examples: Tensor) -> Tensor:
    """The symmetric (D, D) matrix that makes ``examples`` (N, D) vary alike in all directions, in float32.

    The mean square of a number stays what it was.
    """
    values, axes = torch.linalg.eigh(examples.double().T @ examples.double() / len(examples))
    total = values.clamp_min(0).sum()
    factors = (values.clamp_min(0) + WHITENING_FLOOR * total).rsqrt()
    factors *= (total / (factors.square() * values.clamp_min(0)).sum()).sqrt()
    return ((axes * factors) @ axes.T).float()


def readable(values: Tensor) -> bool:
    """Whether ``values`` can be looked at: a device would have to be waited for, and a compiler has none to see."""
    return type(values) is Tensor and values.device.type == "cpu" and not torch.compiler.is_compiling()


def embedding_mlp(in_features: int, embedding_dim: int) -> nn.Sequential:
    """in_features -> E -> E, of the time or of a condition."""
    return nn.Sequential(nn.Linear(in_features, embedding_dim), nn.SiLU(), nn.Linear(embedding_dim, embedding_dim))


class Denoiser(ModelMixin, ConfigMixin):
    """A U-Net that sees (z_t, t, condition), without its blocks.

    A subclass's constructor calls ``_make_embeddings``, sets ``input_blocks``, ``middle_block``, ``output_blocks`` and
    ``out``, and calls ``_finish``. Its config has ``in_channels``, ``out_channels``, ``sample_size``, ``num_classes``,
    ``condition_dim`` and ``model_channels``.

    Attributes:
        factor: what height and width are divisible by.
        patch_size: pixels a side of what the first block sees as one position.
        gradient_checkpointing: recompute every block in the backward pass.
        memory_optimization: recompute what costs the most memory.
        zero_threshold: with memory_optimization, a condition's embedding whose largest absolute value is at most this
            counts as none.
    """

    _supports_gradient_checkpointing = True
    factor = 1
    patch_size = 1
    gradient_checkpointing = False
    memory_optimization = False
    zero_threshold = 0.0
    input_blocks: nn.ModuleList
    middle_block: nn.Module
    output_blocks: nn.ModuleList
    out: nn.Module
    condition_whitening: Tensor

    def _make_embeddings(self) -> int:
        """Add the embedding of the time and, with ``condition_dim``, of the condition; returns their width E."""
        c = self.config
        embedding_dim = 4 * c.model_channels
        self.time_embed = embedding_mlp(c.model_channels, embedding_dim)
        if c.condition_dim is not None:
            if c.condition_dim < 1:
                raise ConfigError(f"condition_dim: expected at least 1, or None, found {c.condition_dim}")
            self.condition_emb = embedding_mlp(c.condition_dim, embedding_dim)
            self.register_buffer("condition_whitening", torch.eye(c.condition_dim))
        return embedding_dim

    @torch.no_grad()
    def whiten_conditions(self, examples: Tensor) -> None:
        """See conditions in coordinates in which ``examples`` (N, condition_dim) vary alike in all directions.

        Who is where takes less than a hundredth of the variance of a text's embedding, which a network would learn to
        see last. Zeros stay zeros, and the mean square of a number what it was.
        """
        self.condition_whitening.copy_(whitening(examples))

    def _whitened(self, condition: Tensor | None) -> Tensor | None:
        """``condition`` in the network's coordinates; as it is where it does not fit."""
        if condition is None or condition.shape[-1] != self.config.condition_dim:
            return condition
        return condition.to(self.dtype) @ self.condition_whitening.to(self.dtype)

    def _finish(self) -> None:
        self._lay_out_weights()
        self.register_state_dict_post_hook(_make_contiguous)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As diffusers' ``ModelMixin.from_pretrained``."""
        found = super().from_pretrained(*args, **kwargs)
        (found[0] if isinstance(found, tuple) else found)._lay_out_weights()  # files hold them row by row
        return found

    def _lay_out_weights(self) -> None:
        """Store weights in the memory format of the maps; else each convolution would convert its own at each call."""
        for parameter in self.parameters():
            if parameter.ndim == 4:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)

    def _check_sample(self, sample: Tensor) -> None:
        if sample.ndim != 4 or sample.shape[1] != self.config.in_channels:
            raise ConfigError(
                f"sample: expected {self.config.in_channels} channels, found {tuple(sample.shape)} (B, C, H, W)"
            )

    def class_condition(self, class_labels: Tensor | None, batch: int) -> Tensor | None:
        """c (B, E) of ``class_labels`` (B,), exactly zero where the label is -1; None if no row has a condition.

        Raises:
            ConfigError: labels for a network without classes.
        """
        if class_labels is not None:
            width = self.config.condition_dim
            hint = "" if width is None else f"; it takes a condition (B, {width}) instead"
            raise ConfigError(
                f"class_labels given, but this network was built without classes (num_classes=None){hint}"
            )
        return None

    def vector_condition(self, condition: Tensor | None, batch: int) -> Tensor | None:
        """c (B, E) of ``condition`` (B, condition_dim), exactly zero where its row is; None if no row has a condition.

        Raises:
            ConfigError: a condition for a network that takes none, or of a wrong shape.
        """
        if condition is None:
            return None
        width = self.config.condition_dim
        if width is None:
            raise ConfigError("condition given, but this network was built without one (condition_dim=None)")
        if condition.shape != (batch, width):
            raise ConfigError(f"condition: expected shape ({batch}, {width}), found {tuple(condition.shape)}")
        given = condition.ne(0).any(dim=1)
        if self._may_leave_out(given):
            return None
        return zero_rows(self.condition_emb(condition.to(self.dtype)), given, self._threshold())

    def _may_leave_out(self, given: Tensor) -> bool:
        """Whether no row of ``given`` (B,) has a condition, as far as that may be known, and no gradient is wanted."""
        return self.memory_optimization and not torch.is_grad_enabled() and readable(given) and not given.any()

    def _threshold(self) -> float | None:
        return self.zero_threshold if self.memory_optimization else None

    def _recompute(self) -> Recompute:
        if not torch.is_grad_enabled():
            return "nothing"
        if self.gradient_checkpointing:
            return "all"
        return "cheap" if self.memory_optimization else "nothing"

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
        condition: Tensor | None = None,
    ) -> UNetOutput | tuple[Tensor]:
        """Predict from noisy images or latents.

        Args:
            sample: (B, in_channels, H, W); H and W divisible by the network's factor.
            timestep: (B,), (1,) or a number; fractions are allowed.
            class_labels: (B,) integers, -1 for rows without a condition; None if no row has one.
            condition: (B, condition_dim), zeros in rows without a condition; None if no row has one.

        Returns:
            ``UNetOutput`` with ``sample`` (B, out_channels, H, W), or a tuple of it.

        Raises:
            ConfigError: shapes, labels or a condition that do not fit the network.
        """
        self._check_sample(sample)
        batch = sample.shape[0]
        timestep = _on_device(timestep, sample.device).reshape(-1).expand(batch)
        embedding = self.time_embed(timestep_embedding(timestep, self.config.model_channels).to(self.dtype))
        condition = self._whitened(condition)
        of_class, of_vector = self.class_condition(class_labels, batch), self.vector_condition(condition, batch)
        c = of_class if of_vector is None else of_vector  # a network takes one kind only
        embedding = F.silu(embedding if c is None else embedding + c)  # once for all blocks
        h = F.pixel_unshuffle(sample.to(self.dtype), self.patch_size).contiguous(memory_format=torch.channels_last)
        recompute = self._recompute()
        skips = []
        for stage in self.input_blocks:
            h = stage(h, embedding, c, recompute)
            skips.append(h)
        h = self.middle_block(h, embedding, c, recompute)
        for stage in self.output_blocks:
            h = stage(torch.cat([h, skips.pop()], dim=1), embedding, c, recompute)
        out = self.out(h) if recompute == "nothing" else recomputed(self.out, h)
        out = F.pixel_shuffle(out, self.patch_size)
        return UNetOutput(sample=out) if return_dict else (out,)


def _on_device(timestep: Tensor | float, device: torch.device) -> Tensor:
    """``timestep`` on ``device``; one number is written there by a kernel, which nobody has to wait for."""
    if isinstance(timestep, Tensor) and timestep.numel() == 1 and device.type != "cpu" and readable(timestep):
        timestep = timestep.item()
    if isinstance(timestep, Tensor):
        return timestep.to(device, non_blocking=True)
    return torch.full((1,), timestep, device=device)


def _make_contiguous(module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: Any) -> None:
    """Let a state dictionary hold weights row by row, as files and other programs expect them."""
    for name, value in state.items():
        if name.startswith(prefix):
            state[name] = value.contiguous()


def check_widths(widths: list[int], model_channels: int) -> None:
    """Check the channels of each level, which are model_channels * channel_mult.

    Raises:
        ConfigError: there is none, or one of them does not split into the groups of the norms.
    """
    if not widths or any(width < 1 or width % NORM_GROUPS for width in widths):
        raise ConfigError(
            f"model_channels * channel_mult: every level needs a multiple of {NORM_GROUPS} channels, "
            f"found {sorted(set(widths))}; use model_channels={max(32, round(model_channels / 32) * 32)}"
        )
