"""Tokens of captions, by WordPiece learned from the captions themselves or the tokenizer of a pretrained BERT."""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Encoding, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from heterodiff.errors import CheckpointError, ConfigError, DataError, reason
from heterodiff.files import refuse_changed
from heterodiff.text.pretrained import AGAIN, find_pretrained

# The tokenizers library warns at every fork of a data loader if it has used threads.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

PAD, UNK, CLS, SEP, MASK = SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
PREFIX = "##"
LONGEST_WORD = 200
"""Longer words are unknown. Scripts without spaces (Thai) need more than the usual 100; time grows quadratically."""
_CJK = r"[\p{Han}\p{Hiragana}\p{Katakana}ー]"
_SPACING = (
    r" (?=[.,:;!?%)\]}…”»。、，！？：；」』）】])",  # before closing punctuation
    r"(?<=[(\[{¿¡“«。、，！？：；「『（【]) ",  # after opening punctuation
    r"(?<=\w) (?=['’/_-] \w)",  # around joints of words: d'ivoire, t-shirt
    r"(?<=\w['’/_-]) (?=\w)",
    r"(?<=\d[.:]) (?=\d)",  # 3.5, 10:30
    rf"(?<={_CJK}) (?={_CJK})",
)
"""Spaces that decoding removes, in this order. The decoder of `tokenizers` has its own list, but it also turns `do not`
into `don't`."""


@dataclass
class Tokens:
    """A batch of texts: ``ids`` (B, L) int64, padded at the end, and ``mask`` (B, L) bool, True for real tokens."""

    ids: Tensor
    mask: Tensor

    def to(self, device: torch.device | str) -> "Tokens":
        return Tokens(self.ids.to(device), self.mask.to(device))


def train_tokenizer(captions: Iterable[str], vocabulary_size: int) -> PreTrainedTokenizerFast:
    """Learn lower-case word pieces from ``captions``, independently of their order.

    Accents are kept. Every word spelt with characters of the captions has tokens, so the vocabulary is larger than
    ``vocabulary_size`` if the characters alone need more.

    Args:
        vocabulary_size: number of word pieces, characters and the 5 special tokens included.

    Raises:
        DataError: no character in any caption.

    Source: Wu et al. 2016 (WordPiece), learned as byte pair encoding (Sennrich et al. 2016); Devlin et al. 2019 (BERT).
    """
    captions = [_valid(caption) for caption in captions]
    tokenizer = _word_pieces({})
    # The library numbers characters inside words in the random order of a hash table, and breaks ties between merges
    # by number. Passed as special tokens, they have fixed numbers.
    inside = _characters_inside(tokenizer, captions)
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[*SPECIAL_TOKENS, *inside],
        limit_alphabet=0x110000,
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer)
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    if len(vocabulary) == len(SPECIAL_TOKENS):
        raise DataError("no text in any caption, so there is no vocabulary to learn")
    tokenizer = _word_pieces(vocabulary)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, unk_token=UNK, cls_token=CLS, sep_token=SEP, mask_token=MASK
    )


def _word_pieces(vocabulary: dict[str, int]) -> Tokenizer:
    tokenizer = Tokenizer(
        models.WordPiece(
            vocabulary, unk_token=UNK, max_input_chars_per_word=LONGEST_WORD, continuing_subword_prefix=PREFIX
        )
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.BertNormalizer(lowercase=True, strip_accents=False)]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = _decoder(PREFIX)
    if vocabulary:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{CLS} $A {SEP}", special_tokens=[(CLS, vocabulary[CLS]), (SEP, vocabulary[SEP])]
        )
    return tokenizer


def _decoder(prefix: str) -> decoders.Decoder:
    spacing = [decoders.Replace(Regex(pattern), "") for pattern in _SPACING]
    return decoders.Sequence([decoders.WordPiece(prefix, cleanup=False), decoders.Fuse(), *spacing])


def _characters_inside(tokenizer: Tokenizer, captions: Sequence[str]) -> list[str]:
    """``##c`` for every character c of the captions that can occur inside a word, in order."""

    def parts(text: str) -> list[str]:
        return [part for part, _ in tokenizer.pre_tokenizer.pre_tokenize_str(tokenizer.normalizer.normalize_str(text))]

    words = {word for caption in captions for word in re.split(r"[ \t\r\n]+", caption)}
    characters = {character for word in words for part in parts(word) for character in part}
    return [PREFIX + character for character in sorted(characters) if len(parts("a" + character)) == 1]


def load_tokenizer(name_or_folder: str | Path) -> PreTrainedTokenizerFast:
    """Load a tokenizer from a folder, or by a hub name in the local cache.

    Raises:
        CheckpointError: no or a damaged tokenizer, or one without padding, start and end tokens.
    """
    folder = find_pretrained(name_or_folder)
    refuse_changed(Path(folder))
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the Rust side raises plain Exception
        raise CheckpointError(f"{folder}: no tokenizer that can be read ({reason(error)}); {AGAIN}") from None
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or None in (tokenizer.pad_token_id, tokenizer.cls_token_id, tokenizer.sep_token_id):
        raise CheckpointError(
            f"{folder}: expected a tokenizer like that of BERT, with tokens that pad, start and end a text "
            f"(pad_token, cls_token, sep_token), found {type(tokenizer).__name__} without; {AGAIN}"
        )
    if isinstance(backend.model, models.WordPiece):
        backend.decoder = _decoder(backend.model.continuing_subword_prefix)
    tokenizer.clean_up_tokenization_spaces = False
    return tokenizer


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """Hash of 16 hexadecimal digits; tokenizers with equal fingerprints give equal ids."""
    settings = json.loads(tokenizer.backend_tokenizer.to_str())
    parts = [
        sorted(tokenizer.get_vocab().items()),
        {key: settings[key] for key in ("normalizer", "pre_tokenizer", "post_processor")},
        {key: value for key, value in settings["model"].items() if key not in ("vocab", "merges")},
        [tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.cls_token_id, tokenizer.sep_token_id],
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def encode_texts(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], max_tokens: int) -> tuple[Tokens, list[str]]:
    """Encode texts, padded to the longest of them and cut at ``max_tokens``.

    Start and end token stay when a text is cut. Special tokens spelt out in a text (``[SEP]``) count as text.

    Returns:
        Tokens of shape (B, L), L <= max_tokens, and a warning for each text that was cut or has unknown words.

    Raises:
        ConfigError: no texts, or ``max_tokens`` leaves no room for one token of text.
    """
    backend = tokenizer.backend_tokenizer
    room = max_tokens - backend.num_special_tokens_to_add(is_pair=False)
    if room < 1 or not texts:
        raise ConfigError(f"expected texts and at least 3 tokens for each, found {len(texts)} and {max_tokens}")
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    warnings: list[str] = []
    rows: list[list[int]] = []
    for text in map(_valid, texts):
        encoding = backend.encode(text, add_special_tokens=False)
        if len(encoding) > room:
            warnings.append(_cut_warning(text, encoding, room, max_tokens))
            encoding.truncate(room)
        if unknown := _unknown_words(text, encoding, tokenizer.unk_token_id):
            warnings.append(_unknown_warning(text, unknown, tokenizer.unk_token))
        rows.append(backend.post_process(encoding).ids)
    ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=tokenizer.pad_token_id)
    mask = torch.arange(ids.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]
    return Tokens(ids, mask), warnings


def _valid(text: str) -> str:
    """``text`` with surrogates, which cannot be encoded, joined to characters or replaced."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _cut_warning(text: str, encoding: Encoding, room: int, max_tokens: int) -> str:
    end = encoding.offsets[room - 1][1]
    last = " ".join(text[max(0, end - 60) : end].split()[-3:])
    return (
        f"text '{_shortened(text)}' has {len(encoding) + max_tokens - room} tokens, of which {max_tokens} are used, "
        f"up to '{last}'; raise text.max_tokens, or shorten it"
    )


def _unknown_words(text: str, encoding: Encoding, unknown_id: int | None) -> list[str]:
    spans = [span for token, span in zip(encoding.ids, encoding.offsets, strict=True) if token == unknown_id]
    return list(dict.fromkeys(text[start:end] for start, end in spans))


def _unknown_warning(text: str, words: list[str], unknown_token: str) -> str:
    listed = ", ".join(f"'{_shortened(word)}'" for word in words[:5])
    more = f" and {len(words) - 5} more" if len(words) > 5 else ""
    return f"text '{_shortened(text)}': not in the vocabulary, read as {unknown_token}: {listed}{more}"


def _shortened(text: str, length: int = 40) -> str:
    """``text`` on one line, and no longer than ``length`` characters."""
    line = " ".join(text[: 4 * length].split())
    return line if len(line) <= length and len(text) <= 4 * length else f"{line[:length].rstrip()}…"
