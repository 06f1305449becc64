"""Captioner: a GPT-2 that writes a caption token by token from a latent map or an embedding."""

import math
from collections.abc import Iterable, Sequence
from itertools import takewhile
from pathlib import Path

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LogitsProcessor,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from heterodiff.codecs.cnn import Residual, scaled
from heterodiff.errors import ConfigError
from heterodiff.models.loading import load_network
from heterodiff.text.pretrained import make_config

EMBEDDING_TOKENS = 8
"""Tokens made from an embedding; a map gives one token for each position."""
MIN_TEMPERATURE = 1e-6
"""Temperatures below take the most likely token, since the divided logits would leave the range of float32."""


class TiedHead(nn.Module):
    """Output layer that shares the token embeddings, without a second copy of them in files."""

    def __init__(self, embedding: nn.Embedding):
        super().__init__()
        self._embedding = [embedding]  # in a list, so that it is not registered as a submodule

    def forward(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self._embedding[0].weight)


class Captioner(ModelMixin, ConfigMixin):
    """Latent map to caption: GPT-2 with cross-attention over the h * w positions of the map.

    It also takes embeddings (B, D) of images or texts, of any length, as 8 tokens each. These go to a second GPT-2:
    one trained on both would confuse contents of texts and images, and misread combinations of words that no training
    text has.

    Args:
        vocabulary_size: vocabulary size of the tokenizer.
        latent_channels, latent_size: C and (h, w) of the map.
        embedding_dim: D.
        width, layers, num_heads: sizes of each GPT-2; the MLPs have 4 * width.
        max_tokens: longest caption, start and end token included.
        dropout: probability in residual branches, embeddings and attention.
        bos_token_id, eos_token_id, pad_token_id: ids of the tokenizer's [CLS], [SEP] and [PAD].

    Raises:
        ConfigError: a width that does not split into heads.

    Source: Radford et al. 2019 (GPT-2); Xu et al. 2015 (captions by attention over a feature map).
    """

    @register_to_config
    def __init__(
        self,
        vocabulary_size: int,
        latent_channels: int = 256,
        latent_size: Sequence[int] = (7, 7),
        embedding_dim: int = 512,
        width: int = 256,
        layers: int = 4,
        num_heads: int = 4,
        max_tokens: int = 64,
        dropout: float = 0.0,
        bos_token_id: int = 2,
        eos_token_id: int = 3,
        pad_token_id: int = 0,
    ):
        super().__init__()
        if width % num_heads:
            raise ConfigError(
                f"captioner: a width of {width} does not split into {num_heads} heads; change text.captioner_width or "
                "text.num_heads"
            )
        settings = {
            "vocab_size": vocabulary_size,
            "n_positions": max_tokens,
            "n_embd": width,
            "n_layer": layers,
            "n_head": num_heads,
            "activation_function": "gelu_pytorch_tanh",  # GPT-2's own, in one kernel
            "resid_pdrop": dropout,
            "embd_pdrop": dropout,
            "attn_pdrop": dropout,
            "bos_token_id": bos_token_id,
            "eos_token_id": eos_token_id,
            "add_cross_attention": True,
        }
        config = make_config(GPT2Config, settings)
        self.gpt2 = GPT2LMHeadModel(config)
        inner = width // 2
        self.image_features = nn.Sequential(
            nn.Conv2d(latent_channels, inner, 3, padding=1), Residual(inner), nn.Conv2d(inner, width, 1)
        )
        self.image_positions = nn.Parameter(0.02 * torch.randn(math.prod(latent_size), width))
        self.image_norm = nn.LayerNorm(width)
        self.embedding_projection = nn.Linear(embedding_dim, EMBEDDING_TOKENS * width)
        self.embedding_norm = nn.LayerNorm(width)
        self.embedding_gpt2 = GPT2LMHeadModel(config)
        for gpt2 in (self.gpt2, self.embedding_gpt2):
            gpt2.lm_head = TiedHead(gpt2.transformer.wte)

    def image_tokens(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) -> tokens (B, h * w, width), row by row; embeddings (B, D) -> (B, 8, width).

        Raises:
            ConfigError: a map or an embedding of another shape than the captioner was made for.
        """
        expected = (self.config.latent_channels, *self.config.latent_size)
        if latents.ndim == 2 and latents.shape[1] == self.config.embedding_dim:
            found = self.embedding_projection(scaled(latents).to(self.dtype))
            return self.embedding_norm(found.unflatten(1, (EMBEDDING_TOKENS, -1)))
        if latents.ndim != 4 or tuple(latents.shape[1:]) != expected:
            raise ConfigError(
                f"captioner: expected latents (B, {', '.join(map(str, expected))}) or embeddings (B, "
                f"{self.config.embedding_dim}), found {tuple(latents.shape)}"
            )
        cells = self.image_features(latents.to(self.dtype)).flatten(2).transpose(1, 2)
        return self.image_norm(cells + self.image_positions)

    def forward(self, latents: Tensor, ids: Tensor) -> Tensor:
        """Logits (B, L, V) of the token after each of ``ids`` (B, L); attention is causal, so padding has no effect.

        Raises:
            ConfigError: a map of another shape than the captioner was made for, or L larger than max_tokens.
        """
        if ids.shape[1] > self.config.max_tokens:
            raise ConfigError(f"captions: expected at most {self.config.max_tokens} tokens, found {ids.shape[1]}")
        tokens = self.image_tokens(latents)
        causal = None
        if ids.device.type != "cpu":  # without a mask, transformers waits for the device to check the positions
            count = ids.shape[1]
            causal = torch.ones(count, count, dtype=torch.bool, device=ids.device).tril().expand(len(ids), 1, -1, -1)
        gpt2 = self._gpt2_for(latents)
        return gpt2(input_ids=ids, attention_mask=causal, encoder_hidden_states=tokens, use_cache=False).logits

    def _gpt2_for(self, latents: Tensor) -> GPT2LMHeadModel:
        return self.gpt2 if latents.ndim == 4 else self.embedding_gpt2

    def losses(self, latents: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Cross-entropy of each caption, the mean over its tokens after the first, in nats (B,).

        Args:
            latents: (B, C, h, w), or embeddings (B, D).
            ids: (B, L) int64, start and end token included.
            mask: (B, L), nonzero for real tokens.

        Raises:
            ConfigError: shapes that do not fit the network.
        """
        logits, targets = self(latents, ids[:, :-1]), ids[:, 1:]
        each = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)
        real = mask[:, 1:].to(each)
        return (each * real).sum(dim=1) / real.sum(dim=1).clamp(min=1)

    @torch.inference_mode()
    def generate(
        self,
        latents: Tensor,
        *,
        num_captions: int = 1,
        max_new_tokens: int | None = None,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        repetition_penalty: float = 1.0,
        seed: int = 0,
        use_cache: bool = True,
    ) -> list[list[list[int]]]:
        """Write captions. Caption k of an image depends on the image, k, ``seed`` and the settings alone.

        It does not depend on the rest of the batch (in float32; in bfloat16, rounding does).

        Args:
            latents: (B, C, h, w), or embeddings (B, D).
            num_captions: captions for each image.
            max_new_tokens: longest caption, end token included; default and maximum: max_tokens - 1.
            temperature: divisor of the logits; 0 takes the most likely token each time.
            top_k: draw from the k most likely tokens only; 0: from all.
            top_p: draw from the fewest tokens that have this probability together (Holtzman et al. 2020).
            repetition_penalty: above 1, makes tokens of the caption so far less likely (Keskar et al. 2019).
            seed: 0 .. 2^63 - 1.
            use_cache: keep keys and values of earlier tokens and of the image; faster, same captions.

        Returns:
            For each of B images, ``num_captions`` lists of ids, without start, end and padding.

        Raises:
            ConfigError: a setting outside its range, or a map of another shape than the captioner was made for.
        """
        longest = self.config.max_tokens - 1
        max_new_tokens = longest if max_new_tokens is None else max_new_tokens
        for name, value, fits, expected in (
            ("num_captions", num_captions, num_captions >= 1, "at least 1"),
            ("max_new_tokens", max_new_tokens, 1 <= max_new_tokens <= longest, f"1 to {longest}"),
            ("temperature", temperature, 0 <= temperature < math.inf, "at least 0"),
            ("top_k", top_k, top_k >= 0, "at least 0 (0: all tokens)"),
            ("top_p", top_p, 0 < top_p <= 1, "above 0, at most 1"),
            ("repetition_penalty", repetition_penalty, 0 < repetition_penalty < math.inf, "above 0 (1: none)"),
            ("seed", seed, 0 <= seed < 2**63, "0 to 2^63 - 1"),
        ):
            if not fits:
                raise ConfigError(f"{name}: expected {expected}, found {value}")
        if len(latents) == 0:
            return []
        # Start and padding are never targets in training, so their logits are arbitrary.
        never = {self.config.bos_token_id, self.config.pad_token_id} - {self.config.eos_token_id}
        sampler = CaptionSampler(num_captions, never, temperature, top_k, top_p, repetition_penalty, seed)
        training = self.training
        self.eval()
        try:
            tokens = self.image_tokens(latents).repeat_interleave(num_captions, dim=0)
            start = torch.full((len(tokens), 1), self.config.bos_token_id, device=tokens.device)
            written = self._gpt2_for(latents).generate(
                start,
                attention_mask=torch.ones_like(start),
                encoder_hidden_states=tokens,
                logits_processor=LogitsProcessorList([sampler]),
                generation_config=GenerationConfig(
                    max_new_tokens=max_new_tokens,
                    do_sample=False,
                    use_cache=use_cache,
                    bos_token_id=self.config.bos_token_id,
                    eos_token_id=self.config.eos_token_id,
                    pad_token_id=self.config.pad_token_id,
                ),
            )
        finally:
            self.train(training)
        end = self.config.eos_token_id
        captions = [list(takewhile(lambda token: token != end, row)) for row in written[:, 1:].tolist()]
        return [captions[i : i + num_captions] for i in range(0, len(captions), num_captions)]


class CaptionSampler(LogitsProcessor):
    """Processors of transformers, then Gumbel noise, with which greedy search samples.

    The largest noisy score is a draw from the softmax (Gumbel-max; Maddison et al. 2014, eq. 2). The noise on caption k
    at a position is a function of (seed, k, position), the same for every image.

    One processor, not a list, because transformers inspects the signature of each processor at each step, and because
    top-p then sorts only the k scores that top-k leaves, not the whole vocabulary.

    Args:
        num_captions: K; rows are captions 0 to K - 1 of the first image, then of the second, and so on.
        never: tokens that are never written.
        temperature, top_k, top_p, repetition_penalty, seed: see :meth:`Captioner.generate`.
    """

    def __init__(
        self,
        num_captions: int,
        never: Iterable[int],
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        repetition_penalty: float = 1.0,
        seed: int = 0,
    ):
        self.num_captions, self.never, self.top_k, self.seed = num_captions, list(never), top_k, seed
        self.draws = temperature >= MIN_TEMPERATURE
        self.penalty = RepetitionPenaltyLogitsProcessor(repetition_penalty) if repetition_penalty != 1 else None
        self.warpers: list[LogitsProcessor] = []
        if self.draws and temperature != 1:
            self.warpers.append(TemperatureLogitsWarper(float(temperature)))
        if self.draws and top_p < 1:
            self.warpers.append(TopPLogitsWarper(float(top_p)))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """``scores`` (B * K, V), logits after ``input_ids`` (B * K, L) -> scores of the same shape."""
        scores = scores.clone()
        scores[:, self.never] = -math.inf
        if self.penalty is not None:
            scores = self.penalty(input_ids, scores)
        if not self.draws:
            return scores
        size = scores.shape[1]
        noise = self._noise(input_ids.shape[1], size).to(scores).repeat(len(scores) // self.num_captions, 1)
        if not 0 < self.top_k < size:
            return self._warped(input_ids, scores) + noise
        best, where = scores.topk(self.top_k, dim=1)
        best = self._warped(input_ids, best) + noise.gather(1, where)
        return torch.full_like(scores, -math.inf).scatter_(1, where, best)

    def _warped(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        for warper in self.warpers:
            scores = warper(input_ids, scores)
        return scores

    def _noise(self, position: int, size: int) -> Tensor:
        """Standard Gumbel noise (K, size) from a counter-based generator, whose stream NumPy guarantees."""
        bits = [
            np.random.Philox(key=[self.seed, k], counter=[0, position, 0, 0]).random_raw(size)
            for k in range(self.num_captions)
        ]
        uniform = torch.from_numpy((np.stack(bits) >> np.uint64(11)) * 2.0**-53)
        return uniform.log_().neg_().log_().neg_().float()


def load_captioner(folder: str | Path) -> Captioner:
    """Load a frozen captioner, see :func:`load_network`."""
    return load_network(Captioner, Path(folder).expanduser()).requires_grad_(False)
