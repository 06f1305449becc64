"""Shared parts of all denoisers: embeddings of time and condition, the pass down and up with skips, weight layout."""

from collections.abc import Callable
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
from heterodiff.models.conditioning import AttributeEmbedding, zero_rows
from heterodiff.models.defaults import NORM_GROUPS


@dataclass
class UNetOutput(BaseOutput):
    """Output of a :class:`Backbone`: ``sample`` (B, out_channels, H, W)."""

    sample: Tensor


WHITENING_FLOOR = 1e-5
"""Share of the total variance below which a direction counts as noise and is not amplified."""

Recompute = Literal["nothing", "cheap", "all"]
"""Activations recomputed in the backward pass: none; those that are cheap for the memory they take (norms, activations,
attention, hybrid blocks); or all, block by block."""


def whitening(examples: Tensor) -> Tensor:
    """Symmetric (D, D) matrix, float32, after which ``examples`` (N, D) have equal variance in all directions.

    It preserves the mean square of the entries.
    """
    values, axes = torch.linalg.eigh(examples.double().T @ examples.double() / len(examples))
    total = values.clamp_min(0).sum()
    factors = (values.clamp_min(0) + WHITENING_FLOOR * total).rsqrt()
    factors *= (total / (factors.square() * values.clamp_min(0)).sum()).sqrt()
    return ((axes * factors) @ axes.T).float()


def readable(values: Tensor) -> bool:
    """True only for CPU tensors outside torch.compile: reading others would wait for a device, or break the graph."""
    return type(values) is Tensor and values.device.type == "cpu" and not torch.compiler.is_compiling()


def embedding_mlp(in_features: int, embedding_dim: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(in_features, embedding_dim), nn.SiLU(), nn.Linear(embedding_dim, embedding_dim))


class Backbone(ModelMixin, ConfigMixin):
    """A U-Net with input (z_t, t, condition), without its blocks.

    A subclass's constructor calls ``_make_embeddings``, sets ``input_blocks``, ``middle_block``, ``output_blocks`` and
    ``out``, and calls ``_finish``. Its config has ``in_channels``, ``out_channels``, ``sample_size``, ``num_classes``,
    ``condition_dim``, ``model_channels`` and ``channel_mult``, and ``class_embedding`` if it takes classes.

    Attributes:
        factor: divisor of height and width.
        patch_size: side in pixels of the patches that the first block gets as one position each.
        gradient_checkpointing: recompute every block in the backward pass.
        memory_optimization: recompute the activations that take the most memory.
        zero_threshold: with memory_optimization, a condition embedding whose largest absolute value is at most this
            counts as no condition.
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
        """Add the embeddings of time and of the condition, if there is one; returns their width E."""
        c = self.config
        embedding_dim = 4 * c.model_channels
        self.time_embed = embedding_mlp(c.model_channels, embedding_dim)
        if c.condition_dim is not None:
            if c.condition_dim < 1:
                raise ConfigError(f"condition_dim: expected at least 1, or None, found {c.condition_dim}")
            self.condition_emb = embedding_mlp(c.condition_dim, embedding_dim)
            self.register_buffer("condition_whitening", torch.eye(c.condition_dim))
        if c.num_classes is not None:
            direct = c.class_embedding == "direct"
            self.label_emb = nn.Embedding(c.num_classes, embedding_dim if direct else c.model_channels)
            self.class_emb = None if direct else embedding_mlp(c.model_channels, embedding_dim)
        attributes = c.get("attributes")
        self.attribute_emb = AttributeEmbedding(attributes, embedding_dim) if attributes else None
        return embedding_dim

    def _widths(self) -> list[int]:
        """Channels of each level."""
        return [int(self.config.model_channels * mult) for mult in self.config.channel_mult]

    def _check_widths(self, *others: int) -> None:
        """Check that there are levels, and that their channels and ``others`` split into the groups of the norms."""
        widths = {*others, *self._widths()} if self.config.channel_mult else set()
        if not widths or any(width < 1 or width % NORM_GROUPS for width in widths):
            raise ConfigError(
                f"model_channels * channel_mult: every level needs a multiple of {NORM_GROUPS} channels, "
                f"found {sorted(widths)}; use model_channels={max(32, round(self.config.model_channels / 32) * 32)}"
            )

    @torch.no_grad()
    def whiten_conditions(self, examples: Tensor) -> None:
        """Transform conditions by a matrix that gives ``examples`` (N, condition_dim) equal variance in all directions.

        Spatial relations make up less than 1 % of the variance of a text's embedding, so networks learn them last.
        Zeros stay zeros, and the mean square of the entries is preserved.
        """
        self.condition_whitening.copy_(whitening(examples))

    def _whitened(self, condition: Tensor | None) -> Tensor | None:
        """Whitened ``condition``; one of a wrong shape is left for :meth:`vector_condition` to refuse."""
        if condition is None or condition.shape[-1] != self.config.condition_dim:
            return condition
        return condition.to(self.dtype) @ self.condition_whitening.to(self.dtype)

    def _finish(self) -> None:
        self._lay_out_weights()
        self.register_state_dict_post_hook(_make_contiguous)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load a network, see diffusers' ``ModelMixin.from_pretrained``."""
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
            ConfigError: labels for a network without classes, of a wrong shape, or outside the range.
        """
        if class_labels is None:
            return None
        num_classes, width = self.config.num_classes, self.config.condition_dim
        if num_classes is None:
            hint = "" if width is None else f"; it takes a condition (B, {width}) instead"
            raise ConfigError(
                f"class_labels given, but this network was built without classes (num_classes=None){hint}"
            )
        if class_labels.shape != (batch,):
            raise ConfigError(f"class_labels: expected shape ({batch},), found {tuple(class_labels.shape)}")
        if readable(class_labels):  # elsewhere an index error is raised
            found = sorted(set(class_labels.tolist()))
            if found and not -1 <= found[0] <= found[-1] < num_classes:
                raise ConfigError(f"class_labels: expected -1 (none) or 0..{num_classes - 1}, found {found}")

        def embed() -> Tensor:
            c = self.label_emb(class_labels.clamp(min=0))
            return c if self.class_emb is None else self.class_emb(c)

        return self._embedded(class_labels >= 0, embed)

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
        return self._embedded(condition.ne(0).any(dim=1), lambda: self.condition_emb(condition.to(self.dtype)))

    def attribute_condition(self, attributes: Tensor | None, batch: int) -> Tensor | None:
        """c (B, E) of ``attributes`` (B, A), exactly zero in rows without any; None if no row has one.

        Raises:
            ConfigError: attributes for a network that takes none, or of a wrong shape.
        """
        if attributes is None:
            return None
        expected = len(self.config.get("attributes") or ())
        if self.attribute_emb is None:
            raise ConfigError("attributes given, but this network was built without any (attributes=None)")
        if attributes.shape != (batch, expected):
            raise ConfigError(f"attributes: expected shape ({batch}, {expected}), found {tuple(attributes.shape)}")
        return self.attribute_emb(attributes)

    def _embedded(self, given: Tensor, embed: Callable[[], Tensor]) -> Tensor | None:
        """Result of ``embed``, zero where ``given`` (B,) is False; None if memory is optimized and no row is given."""
        if not self.memory_optimization:
            return zero_rows(embed(), given, None)
        if not torch.is_grad_enabled() and readable(given) and not given.any():
            return None
        return zero_rows(embed(), given, self.zero_threshold)

    def _recompute(self) -> Recompute:
        if not torch.is_grad_enabled():
            return "nothing"
        if self.gradient_checkpointing:
            return "all"
        return "cheap" if self.memory_optimization else "nothing"

    def _time_embedding(self, timestep: Tensor | float, sample: Tensor) -> Tensor:
        """Embedding (B, E) of times (B,), (1,) or a number."""
        times = _on_device(timestep, sample.device).reshape(-1).expand(len(sample))
        embedding: Tensor = self.time_embed(timestep_embedding(times, self.config.model_channels).to(self.dtype))
        return embedding

    def _encoded(
        self, sample: Tensor, embedding: Tensor, c: Tensor | None, recompute: Recompute
    ) -> tuple[Tensor, list[Tensor]]:
        """Map at the coarsest level, after the middle, and the maps on the way down."""
        h = F.pixel_unshuffle(sample.to(self.dtype), self.patch_size).contiguous(memory_format=torch.channels_last)
        skips = []
        for stage in self.input_blocks:
            h = stage(h, embedding, c, recompute)
            skips.append(h)
        return self.middle_block(h, embedding, c, recompute), skips

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
        condition: Tensor | None = None,
        attributes: Tensor | None = None,
    ) -> UNetOutput | tuple[Tensor]:
        """Predict from noisy images or latents.

        Args:
            sample: (B, in_channels, H, W); H and W divisible by the network's factor.
            timestep: (B,), (1,) or a number; fractions are allowed.
            class_labels: (B,) integers, -1 for rows without a condition; None if no row has one.
            condition: (B, condition_dim), zeros in rows without a condition; None if no row has one.
            attributes: (B, A), class indices and standardised numbers, NaN where missing; None if no row has any.

        Returns:
            ``UNetOutput`` with ``sample`` (B, out_channels, H, W), or a tuple of it.

        Raises:
            ConfigError: shapes, labels or a condition that do not fit the network.
        """
        self._check_sample(sample)
        batch = sample.shape[0]
        embedding = self._time_embedding(timestep, sample)
        condition = self._whitened(condition)
        of_class, of_vector = self.class_condition(class_labels, batch), self.vector_condition(condition, batch)
        c = of_class if of_vector is None else of_vector  # a network takes one kind only
        if (of_attributes := self.attribute_condition(attributes, batch)) is not None:
            c = of_attributes if c is None else c + of_attributes
        embedding = F.silu(embedding if c is None else embedding + c)  # once for all blocks
        recompute = self._recompute()
        h, skips = self._encoded(sample, embedding, c, recompute)
        for stage in self.output_blocks:
            h = stage(torch.cat([h, skips.pop()], dim=1), embedding, c, recompute)
        out = self.out(h) if recompute == "nothing" else recomputed(self.out, h)
        out = F.pixel_shuffle(out, self.patch_size)
        return UNetOutput(sample=out) if return_dict else (out,)


def _on_device(timestep: Tensor | float, device: torch.device) -> Tensor:
    """``timestep`` on ``device``; a single number is written there by a kernel, without a wait."""
    if isinstance(timestep, Tensor) and timestep.numel() == 1 and device.type != "cpu" and readable(timestep):
        timestep = timestep.item()
    if isinstance(timestep, Tensor):
        return timestep.to(device, non_blocking=True)
    return torch.full((1,), timestep, device=device)


def _make_contiguous(module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: Any) -> None:
    """State dict hook: weights row by row, as files and other programs expect them."""
    for name, value in state.items():
        if name.startswith(prefix):
            state[name] = value.contiguous()
