"""Tokens: learned the same every time, nothing lost, and the user told of what is cut or unknown."""

import json
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from heterodiff.errors import CheckpointError, ConfigError, DataError
from heterodiff.text.tokenizer import (
    SPECIAL_TOKENS,
    encode_texts,
    load_tokenizer,
    tokenizer_fingerprint,
    train_tokenizer,
)

CAPTIONS = [
    "A man: dark skin tone",
    "keycap: #",
    "Flag: Côte d’Ivoire",
    "It is 3.5 m, at 10:30 (not 11:00)!",
    "Кошка и Ёжик; й",
    "日本語です。猫！",
    "🚀 rocket, 😀😀",
    "a T-shirt, don't fold",
    "they do not “run”",
    "woman’s hat",
    "cafe\u0301",
    "ไทย",
]
DECODED = [
    "a man: dark skin tone",
    "keycap: #",
    "flag: côte d’ivoire",
    "it is 3.5 m, at 10:30 (not 11:00)!",
    "кошка и ёжик; й",
    "日本語です。猫！",
    "🚀 rocket, 😀😀",
    "a t-shirt, don't fold",
    "they do not “run”",
    "woman’s hat",
    "caf\u00e9",
    "ไทย",
]
WORDS = ["black", "blue", "brown", "cat", "circle", "dog", "left", "triangle", "square", "two", "яблоко", "кот", "猫"]
MANY = [f"{a} {b} {c}" for a in WORDS for b in WORDS for c in WORDS]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(CAPTIONS, 400)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("something reached for the network")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", fail)
    monkeypatch.setattr(socket.socket, "connect", fail)


def test_the_vocabulary_is_the_same_in_any_order_and_process() -> None:
    here = [train_tokenizer(captions, 80).get_vocab() for captions in (MANY, MANY[::-1], sorted(MANY, key=hash))]
    code = (
        "import json, sys; from heterodiff.text.tokenizer import train_tokenizer\n"
        "print(json.dumps(train_tokenizer(json.load(sys.stdin), 80).get_vocab()))"
    )
    other = subprocess.run(
        [sys.executable, "-c", code], input=json.dumps(MANY), capture_output=True, text=True, check=True
    )
    assert here[0] == here[1] == here[2] == json.loads(other.stdout)
    assert len(here[0]) == 80
    assert [here[0][token] for token in SPECIAL_TOKENS] == [0, 1, 2, 3, 4]


def test_every_character_of_the_captions_is_known(tokenizer: PreTrainedTokenizerFast) -> None:
    tight = train_tokenizer(CAPTIONS, 1)  # no room for anything but characters
    for each in (tokenizer, tight):
        tokens, warnings = encode_texts(each, CAPTIONS, 64)
        assert warnings == []
        assert [each.decode(ids, skip_special_tokens=True) for ids in tokens.ids] == DECODED
    assert encode_texts(tight, ["tekcor", "кй ёш", "ô3🚀😀"], 64)[1] == []  # words of no caption
    assert len(tokenizer) > len(tight)


def test_no_text_no_vocabulary() -> None:
    with pytest.raises(DataError, match="no text in any caption"):
        train_tokenizer(["", " \n"], 100)


def test_a_saved_tokenizer_is_the_same(tokenizer: PreTrainedTokenizerFast, tmp_path: Path, no_network: None) -> None:
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert tokenizer_fingerprint(loaded) == tokenizer_fingerprint(tokenizer)
    tokens, _ = encode_texts(loaded, CAPTIONS, 64)
    assert torch.equal(tokens.ids, encode_texts(tokenizer, CAPTIONS, 64)[0].ids)
    assert [loaded.decode(ids, skip_special_tokens=True) for ids in tokens.ids] == DECODED


def test_fingerprints_tell_tokenizers_apart(tmp_path: Path) -> None:
    found = [tokenizer_fingerprint(train_tokenizer(CAPTIONS[:count], 400)) for count in (11, 12, 12)]
    assert found[0] != found[1] == found[2]
    assert all(len(each) == 16 and int(each, 16) >= 0 for each in found)
    for cased in (False, True):
        bert_tokenizer_folder(tmp_path / str(cased), do_lower_case=not cased)
    assert tokenizer_fingerprint(load_tokenizer(tmp_path / "False")) != tokenizer_fingerprint(
        load_tokenizer(tmp_path / "True")
    )


def test_texts_are_padded_to_the_longest_and_empty_ones_allowed(tokenizer: PreTrainedTokenizerFast) -> None:
    tokens, warnings = encode_texts(tokenizer, ["", "hat", " \n", "woman hat hat"], 64)
    hat, woman = tokenizer.convert_tokens_to_ids(["hat", "woman"])
    assert tokens.ids.tolist() == [[2, 3, 0, 0, 0], [2, hat, 3, 0, 0], [2, 3, 0, 0, 0], [2, woman, hat, hat, 3]]
    assert tokens.mask.sum(dim=1).tolist() == [2, 3, 2, 5]
    assert tokens.mask.dtype == torch.bool
    assert tokens.ids.dtype == torch.int64
    assert warnings == []


def test_long_texts_are_cut_between_start_and_end_and_said_to_be(tokenizer: PreTrainedTokenizerFast) -> None:
    long = "a man: dark skin tone, hat, woman, rocket and more of the same kind"
    tokens, warnings = encode_texts(tokenizer, ["hat", long], 8)
    assert tokens.ids.shape == (2, 8)
    assert tokens.ids[1, 0] == 2
    assert tokens.ids[1, -1] == 3
    assert tokenizer.decode(tokens.ids[1], skip_special_tokens=True) == "a man: dark skin tone"
    count = len(tokenizer(long)["input_ids"])
    assert len(warnings) == 1
    assert "'a man: dark skin tone, hat, woman, rocke…'" in warnings[0]
    assert f"has {count} tokens, of which 8 are used, up to 'dark skin tone'" in warnings[0]
    assert encode_texts(tokenizer, [long], count)[1] == []
    with pytest.raises(ConfigError, match="at least 3 tokens"):
        encode_texts(tokenizer, [long], 2)


def test_unknown_words_are_named(tokenizer: PreTrainedTokenizerFast) -> None:
    tokens, warnings = encode_texts(tokenizer, ["a ☃ hat ☃", "hat", "Ж! Q7z Ђ Ћ Џ Њ Љ"], 64)
    assert (tokens.ids == tokenizer.unk_token_id).sum(dim=1).tolist() == [2, 0, 6]
    assert len(warnings) == 2
    assert warnings[0] == "text 'a ☃ hat ☃': not in the vocabulary, read as [UNK]: '☃'"
    assert warnings[1].endswith("'Q7z', 'Ђ', 'Ћ', 'Џ', 'Њ' and 1 more")


def test_special_tokens_in_a_text_are_text_and_surrogates_harmless(tokenizer: PreTrainedTokenizerFast) -> None:
    tokens, warnings = encode_texts(tokenizer, ["hat [SEP] [PAD]", "😀 \ud83d\ude00 \ud83d hat\x00"], 64)
    assert tokens.ids[0, :-1].tolist().count(3) == 0
    assert "'['" in warnings[0]
    assert tokenizer.decode(tokens.ids[1], skip_special_tokens=True) == "😀 😀 hat"
    assert train_tokenizer(["a\ud83d b"], 10).get_vocab().keys() == {*SPECIAL_TOKENS, "a", "b", "##a", "##b"}


def cpu_seconds(tokenizer: PreTrainedTokenizerFast, text: str) -> float:
    """Processor time that this thread needs to encode ``text``: the least of three, without that of other programs."""
    seconds = []
    for _ in range(3):
        began = time.thread_time()
        encode_texts(tokenizer, [text], 64)
        seconds.append(time.thread_time() - began)
    return min(seconds)


@pytest.mark.parametrize("text", ["a man ", "aaaaaaaaaa", " ", "☃ж ", "😀", "猫", "#", "man" * 60 + " "])
def test_long_texts_take_time_in_proportion(
    text: str, tokenizer: PreTrainedTokenizerFast, capfd: pytest.CaptureFixture[str]
) -> None:
    text = (text * 160_000)[:160_000]
    # 16 times as long: about 16 times as much where time grows in proportion, 256 times where it grows with the square.
    assert cpu_seconds(tokenizer, text) < 64 * cpu_seconds(tokenizer, text[:10_000])
    tokens, warnings = encode_texts(tokenizer, [text], 64)
    assert tokens.ids.shape[1] <= 64
    assert all(len(warning) < 500 for warning in warnings)
    assert capfd.readouterr() == ("", "")  # transformers has words of its own for long texts


def bert_tokenizer_folder(folder: Path, **settings: Any) -> None:
    """A folder like that of a BERT on the hub: vocabulary, sizes, and settings as they were in its time."""
    folder.mkdir(parents=True)
    vocabulary = [*SPECIAL_TOKENS, "a", "cat", "do", "not", ":", "##s"]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", "vocab_size": len(vocabulary)}))
    tokenizer_config = {"tokenizer_class": "BertTokenizer", "model_max_length": 6, "clean_up_tokenization_spaces": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config | settings))


def test_the_tokenizer_of_a_bert(tmp_path: Path, no_network: None, capfd: pytest.CaptureFixture[str]) -> None:
    bert_tokenizer_folder(tmp_path / "bert")
    tokenizer = load_tokenizer(tmp_path / "bert")
    tokens, warnings = encode_texts(tokenizer, ["A cat : cats do not"], 64)
    assert tokens.ids.tolist() == [[2, 5, 6, 9, 6, 10, 7, 8, 3]]
    assert warnings == []
    assert tokenizer.decode(tokens.ids[0], skip_special_tokens=True) == "a cat: cats do not"
    tokenizer.save_pretrained(tmp_path / "copy")
    assert tokenizer_fingerprint(load_tokenizer(tmp_path / "copy")) == tokenizer_fingerprint(tokenizer)
    assert capfd.readouterr() == ("", "")


def test_a_name_in_the_local_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_network: None) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    cached, revision = tmp_path / "models--someone--small-bert", "0" * 40
    bert_tokenizer_folder(cached / "snapshots" / revision)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(revision)
    assert load_tokenizer("someone/small-bert").get_vocab()["cat"] == 6
    with pytest.raises(CheckpointError, match="hf download someone/other-bert"):
        load_tokenizer("someone/other-bert")


def test_padding_and_cutting_stored_with_a_tokenizer_have_no_effect(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(CAPTIONS, 400)
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=30)
    tokenizer.save_pretrained(tmp_path)
    tokens, warnings = encode_texts(load_tokenizer(tmp_path), ["a man a man a man"], 64)
    assert tokens.ids.shape == (1, 8)
    assert warnings == []


def without_special_tokens(folder: Path) -> None:
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordPiece({"a": 0}, unk_token="a"))).save_pretrained(
        folder
    )


def broken(folder: Path) -> None:
    train_tokenizer(CAPTIONS, 100).save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{broken")


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda folder: None, "no tokenizer that can be read"),
        (broken, "no tokenizer that can be read"),
        (without_special_tokens, "expected a tokenizer like that of BERT"),
    ],
)
def test_folders_without_a_usable_tokenizer(prepare: Any, message: str, tmp_path: Path, no_network: None) -> None:
    prepare(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bert-base-uncased", "hf download bert-base-uncased"),
        ("runs/none", "neither a folder nor in the local cache"),
        ("/nowhere/at/all", "no such folder"),
        ("~/nowhere/at/all", "no such folder"),
        ("", "no such folder"),
    ],
)
def test_names_that_are_nowhere(
    name: str, message: str, no_network: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match=message):
        load_tokenizer(name)
