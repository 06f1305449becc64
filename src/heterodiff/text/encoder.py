"""Text encoder: BERT, trained from scratch or pretrained, and a projection to the space of the image embeddings."""

from pathlib import Path
from typing import Any

from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from heterodiff.errors import CheckpointError, ConfigError, reason
from heterodiff.files import read_json, refuse_header
from heterodiff.models.loading import load_network, refuse_nonfinite
from heterodiff.text.pretrained import AGAIN, find_pretrained, make_config
from heterodiff.text.tokenizer import tokenizer_fingerprint

_BERT_KEYS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "hidden_act",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "max_position_embeddings",
    "type_vocab_size",
    "layer_norm_eps",
    "pad_token_id",
)
"""Entries of a BERT's configuration on which its forward pass depends."""


class TextEncoder(ModelMixin, ConfigMixin):
    """Texts to embeddings: BERT, the mean of its outputs over a text's tokens, a linear projection.

    The mean, not the output of [CLS]: it gives every token a gradient, which a small network from scratch needs, and
    for a pretrained BERT it is the better sentence embedding before fine-tuning (Reimers & Gurevych 2019, table 1).

    Args:
        vocabulary_size: vocabulary size of the tokenizer.
        width, layers, num_heads: sizes of the BERT from scratch; the MLPs have 4 * width.
        max_tokens: longest text, start and end token included.
        embedding_dim: width D of a text's embedding.
        dropout: probability in the BERT from scratch.
        pad_token_id: id of the tokenizer's padding.
        tokenizer_fingerprint: see :func:`check_tokenizer`; empty if unknown.
        bert: configuration of a pretrained BERT, by transformers' names; its sizes replace those above.
        frozen: train the projection only.

    Raises:
        ConfigError: an argument that no network can be built from.

    Source: Devlin et al. 2019 (BERT).
    """

    @register_to_config
    def __init__(
        self,
        vocabulary_size: int,
        width: int = 256,
        layers: int = 4,
        num_heads: int = 4,
        max_tokens: int = 64,
        embedding_dim: int = 512,
        dropout: float = 0.0,
        pad_token_id: int = 0,
        tokenizer_fingerprint: str = "",
        bert: dict[str, Any] | None = None,
        frozen: bool = False,
    ):
        super().__init__()
        if bert is None:
            bert = {
                "vocab_size": vocabulary_size,
                "hidden_size": width,
                "num_hidden_layers": layers,
                "num_attention_heads": num_heads,
                "intermediate_size": 4 * width,
                "hidden_dropout_prob": dropout,
                "attention_probs_dropout_prob": dropout,
                "max_position_embeddings": max_tokens,
                "type_vocab_size": 1,
                "pad_token_id": pad_token_id,
            }
        config = make_config(BertConfig, bert)
        if config.hidden_size % config.num_attention_heads:
            raise ConfigError(
                f"text encoder: a width of {config.hidden_size} does not split into {config.num_attention_heads} "
                "heads; change text.width or text.num_heads"
            )
        if max_tokens > config.max_position_embeddings:
            raise ConfigError(
                f"max_tokens: this BERT has {config.max_position_embeddings} positions, found {max_tokens}; "
                f"set text.max_tokens={config.max_position_embeddings}"
            )
        self.transformer = BertModel(config, add_pooling_layer=False)
        self.projection = nn.Linear(config.hidden_size, embedding_dim)
        if frozen:
            self.transformer.requires_grad_(False)

    @classmethod
    def from_bert(
        cls,
        name_or_folder: str | Path,
        embedding_dim: int = 512,
        max_tokens: int = 64,
        tokenizer_fingerprint: str = "",
        frozen: bool = False,
    ) -> "TextEncoder":
        """Start from a pretrained BERT: a folder of transformers, or a hub name in the local cache.

        Args:
            frozen: train the projection only, and use the BERT without dropout.

        Raises:
            CheckpointError: neither of the two, another kind of network, or damaged, incomplete or NaN weights.
            ConfigError: ``max_tokens`` larger than its number of positions.
        """
        folder = find_pretrained(name_or_folder)
        bert = _read_bert_config(folder)
        if frozen:
            bert |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        encoder = cls(
            vocabulary_size=bert["vocab_size"],
            width=bert["hidden_size"],
            layers=bert["num_hidden_layers"],
            num_heads=bert["num_attention_heads"],
            max_tokens=max_tokens,
            embedding_dim=embedding_dim,
            dropout=bert["hidden_dropout_prob"],
            pad_token_id=bert["pad_token_id"],
            tokenizer_fingerprint=tokenizer_fingerprint,
            bert=bert,
            frozen=frozen,
        )
        _load_bert_weights(encoder.transformer, folder)
        return encoder

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Embeddings (B, D) of texts, not normalised.

        Args:
            ids: (B, L) int64.
            mask: (B, L), nonzero for real tokens; other ids have no effect.

        Raises:
            ConfigError: L larger than max_tokens.
        """
        if ids.shape != mask.shape or ids.shape[1] > self.config.max_tokens:
            raise ConfigError(
                f"text: expected ids and mask of shape (B, L) with L <= {self.config.max_tokens}, "
                f"found {tuple(ids.shape)} and {tuple(mask.shape)}"
            )
        mask = mask.bool()
        visible = mask
        if ids.device.type != "cpu":  # transformers waits for the device to check if a (B, L) mask hides anything
            visible = mask[:, None, None, :].expand(-1, 1, ids.shape[1], -1)
        hidden = self.transformer(input_ids=ids, attention_mask=visible).last_hidden_state
        weights = mask[..., None].to(hidden)
        return self.projection((hidden * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1))


def load_text_encoder(folder: str | Path) -> TextEncoder:
    """Load a frozen text encoder, see :func:`load_network`."""
    return load_network(TextEncoder, Path(folder).expanduser()).requires_grad_(False)


def check_tokenizer(encoder: TextEncoder, tokenizer: PreTrainedTokenizerFast) -> None:
    """Check that ``tokenizer`` is the one that ``encoder`` was trained with.

    Raises:
        CheckpointError: it is not.
    """
    expected, found = encoder.config.tokenizer_fingerprint, tokenizer_fingerprint(tokenizer)
    if len(tokenizer) > encoder.config.vocabulary_size or expected not in ("", found):
        raise CheckpointError(
            f"tokenizer of another run: the text encoder was trained with tokenizer {expected or '(unnamed)'} of "
            f"{encoder.config.vocabulary_size} tokens, found {found} of {len(tokenizer)}; take both from one folder"
        )


def _read_bert_config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    if not file.is_file():
        raise CheckpointError(f"{folder}: holds no network (config.json); {AGAIN}")
    content = read_json(file, way_out=AGAIN)
    kind, positions = content.get("model_type"), content.get("position_embedding_type", "absolute")
    if kind != "bert" or positions != "absolute":
        raise CheckpointError(
            f"{folder}: expected a BERT with absolute positions (model_type bert), found {kind} with {positions}; "
            "set text.encoder to one, or leave it out to train a small encoder"
        )
    try:
        config = make_config(BertConfig, {key: content[key] for key in _BERT_KEYS if key in content})
    except ConfigError as error:
        raise CheckpointError(f"{file}: {error}; {AGAIN}") from None
    return {key: getattr(config, key) for key in _BERT_KEYS}


def _load_bert_weights(bert: nn.Module, folder: Path) -> None:
    """Copy weights from ``folder`` into ``bert``; heads and pooler, which it lacks, are ignored."""
    file = folder / "model.safetensors"
    refuse_header(file, AGAIN)
    try:
        stored = {_bert_name(name): value for name, value in load_file(file).items()}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file}: damaged weights ({reason(error)}); {AGAIN}") from None
    for name, value in bert.state_dict().items():
        found = stored.get(name)
        if found is None or found.shape != value.shape:
            problem = "missing" if found is None else f"of shape {tuple(found.shape)}, expected {tuple(value.shape)}"
            raise CheckpointError(f"{file}: {name} {problem}: weights of another network than its config.json says")
        refuse_nonfinite({name: found}, file, AGAIN)
        value.copy_(found)


def _bert_name(name: str) -> str:
    """Current name of a weight: checkpoints with heads have a prefix, old ones of TensorFlow gamma and beta."""
    name = name.removeprefix("bert.")
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
