"""The text encoder, and the loss that aligns it with images."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from heterodiff.errors import CheckpointError, ConfigError
from heterodiff.text.contrastive import LogitScale, contrastive_losses
from heterodiff.text.encoder import TextEncoder, check_tokenizer, load_text_encoder
from heterodiff.text.tokenizer import tokenizer_fingerprint, train_tokenizer

WEIGHTS = "diffusion_pytorch_model.safetensors"
LENGTHS = (2, 3, 7, 12)


def small_encoder(**settings: Any) -> TextEncoder:
    torch.manual_seed(0)
    sizes = {"vocabulary_size": 50, "width": 32, "layers": 2, "num_heads": 4, "max_tokens": 20, "embedding_dim": 12}
    return TextEncoder(**(sizes | settings)).eval()


def some_texts(padded_to: int, pad: int = 0) -> tuple[Tensor, Tensor]:
    """Texts of LENGTHS tokens, the same at every call, filled up with ``pad``."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.full((len(LENGTHS), padded_to), pad)
    for row, length in zip(ids, LENGTHS, strict=True):
        row[:length] = torch.randint(4, 50, (length,), generator=generator)
    return ids, torch.arange(padded_to) < torch.tensor(LENGTHS)[:, None]


@torch.no_grad()
def slow_embeddings(encoder: TextEncoder, ids: Tensor, mask: Tensor) -> Tensor:
    """A text at a time, without padding and masks, by transformers' plain attention."""
    config = BertConfig(**encoder.transformer.config.to_dict())
    config._attn_implementation = "eager"
    bert = BertModel(config, add_pooling_layer=False).eval()
    bert.load_state_dict(encoder.transformer.state_dict())
    rows = [bert(row[real][None]).last_hidden_state[0] for row, real in zip(ids, mask, strict=True)]
    return torch.stack([encoder.projection(sum(row) / len(row)) for row in rows])


@torch.no_grad()
def test_embeddings_are_projected_means_over_real_tokens() -> None:
    encoder = small_encoder()
    embeddings = encoder(*some_texts(12))
    assert embeddings.shape == (4, 12)
    torch.testing.assert_close(embeddings, slow_embeddings(encoder, *some_texts(12)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("padded_to", range(13, 21))
@torch.no_grad()
def test_more_padding_changes_no_embedding(padded_to: int) -> None:
    encoder = small_encoder()
    expected = encoder(*some_texts(12))
    for pad in (0, 17):
        ids, mask = some_texts(padded_to, pad)
        for given in (mask, mask.long()):
            torch.testing.assert_close(encoder(ids, given), expected, atol=1e-5, rtol=0)
    assert (encoder(ids, torch.ones_like(mask)) - expected).abs().max() > 1e-3  # the mask is what does it


@torch.no_grad()
def test_other_tokens_and_another_order_change_the_embedding() -> None:
    encoder, (ids, mask) = small_encoder(), some_texts(12)
    expected = encoder(ids, mask)
    other, turned = ids.clone(), ids.clone()
    other[3, 5] = 4 if ids[3, 5] != 4 else 5
    turned[3] = ids[3].flip(0)
    for changed in (other, turned):
        difference = (encoder(changed, mask) - expected).abs().amax(dim=1)
        assert difference[3] > 1e-4
        assert difference[:3].max() < 1e-6


def test_every_weight_learns() -> None:
    encoder = small_encoder(dropout=0.1).train()
    encoder(*some_texts(12)).square().sum().backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.abs().sum() > 0), name


def test_a_saved_encoder_gives_the_same_embeddings(tmp_path: Path) -> None:
    encoder = small_encoder(tokenizer_fingerprint="0123456789abcdef")
    encoder.save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"config.json", WEIGHTS}
    with torch.no_grad():
        for loaded in (load_text_encoder(tmp_path), TextEncoder.from_pretrained(tmp_path, local_files_only=True)):
            # Rounding depends on the memory addresses of the weights.
            torch.testing.assert_close(loaded(*some_texts(15)), encoder(*some_texts(15)), atol=1e-6, rtol=0)
            assert all(torch.equal(value, encoder.state_dict()[name]) for name, value in loaded.state_dict().items())
            assert loaded.config.tokenizer_fingerprint == "0123456789abcdef"
    loaded = load_text_encoder(str(tmp_path))
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def change_weights(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        file = next(folder.glob("*.safetensors"))
        tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
        change(tensors)
        save_file(tensors, file)

    return damage


def change_config(**settings: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | settings))

    return damage


def cut_weights(folder: Path) -> None:
    file = next(folder.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-100])


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no folder": (lambda folder: folder.rename(folder.with_name("elsewhere")), "missing"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json"),
    "not JSON": (lambda folder: (folder / "config.json").write_text("{"), "not readable as JSON"),
    "another class": (change_config(_class_name="AutoencoderKL"), "expected a network of class TextEncoder"),
    "another width": (change_config(width=64), "damaged|another network"),
    "no width": (change_config(width="wide"), "damaged"),
    "heads that do not fit": (change_config(num_heads=5), "does not split into 5"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), "safetensors only"),
    "cut": (cut_weights, "damaged"),
    "a weight missing": (change_weights(lambda tensors: tensors.pop("projection.weight")), "projection.weight"),
    "a weight too many": (change_weights(lambda tensors: tensors.update(more=torch.ones(1))), "more"),
    "NaN": (change_weights(lambda tensors: tensors["projection.bias"].fill_(math.nan)), "NaN"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_damaged_encoders_are_not_loaded(damage: str, tmp_path: Path) -> None:
    small_encoder().save_pretrained(tmp_path / "encoder")
    change, message = DAMAGES[damage]
    change(tmp_path / "encoder")
    with pytest.raises(CheckpointError, match=message):
        load_text_encoder(tmp_path / "encoder")


def test_impossible_sizes_are_errors() -> None:
    with pytest.raises(ConfigError, match="does not split into 3"):
        small_encoder(num_heads=3)
    with pytest.raises(ConfigError, match="L <= 20"):
        small_encoder()(*some_texts(21))


def test_an_encoder_knows_its_tokenizer() -> None:
    one, other = train_tokenizer(["a cat"], 60), train_tokenizer(["a dog"], 60)
    encoder = small_encoder(vocabulary_size=len(one), tokenizer_fingerprint=tokenizer_fingerprint(one))
    check_tokenizer(encoder, one)
    with pytest.raises(CheckpointError, match="tokenizer of another run"):
        check_tokenizer(encoder, other)
    check_tokenizer(small_encoder(vocabulary_size=len(one)), one)
    with pytest.raises(CheckpointError, match="tokenizer of another run"):
        check_tokenizer(small_encoder(vocabulary_size=10), one)


# ---- a pretrained BERT ---------------------------------------------------------------------------------------


def pretrained_bert(folder: Path) -> BertModel:
    """A small BERT in ``folder``, saved by transformers with a pooler."""
    torch.manual_seed(2)
    config = BertConfig(
        vocab_size=50,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=40,
        max_position_embeddings=30,
        hidden_act="relu",
    )
    bert = BertModel(config).eval()
    for parameter in bert.parameters():
        nn.init.normal_(parameter, std=0.2)
    bert.save_pretrained(folder)
    return bert


def as_a_head_had_it(tensors: dict[str, Tensor]) -> None:
    """The names of BertForPreTraining in checkpoints of TensorFlow's time."""
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): name
        for name in tensors
    }
    renamed = {f"bert.{name}": tensors[new] for name, new in old.items()}
    tensors.clear()
    tensors.update(renamed, **{"cls.predictions.bias": torch.ones(50)})


@pytest.mark.parametrize("names", ["as saved today", "of a head, long ago"])
@torch.no_grad()
def test_a_pretrained_bert_gives_what_transformers_says(
    names: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    bert = pretrained_bert(tmp_path / "bert")
    if names != "as saved today":
        change_weights(as_a_head_had_it)(tmp_path / "bert")
    capfd.readouterr()
    encoder = TextEncoder.from_bert(tmp_path / "bert", 12, 16, "00", frozen=False).eval()
    assert capfd.readouterr() == ("", "")
    ids, mask = some_texts(14)
    expected = torch.stack(
        [
            encoder.projection(bert(row[real][None]).last_hidden_state[0].mean(dim=0))
            for row, real in zip(ids, mask, strict=True)
        ]
    )
    torch.testing.assert_close(encoder(ids, mask), expected, atol=1e-5, rtol=0)
    encoder.save_pretrained(tmp_path / "encoder")
    loaded = load_text_encoder(tmp_path / "encoder")
    torch.testing.assert_close(loaded(ids, mask), encoder(ids, mask), atol=1e-6, rtol=0)


@pytest.mark.parametrize("frozen", [False, True])
def test_a_frozen_bert_stays_as_it_is_and_its_projection_learns(frozen: bool, tmp_path: Path) -> None:
    pretrained_bert(tmp_path / "bert")
    TextEncoder.from_bert(str(tmp_path / "bert"), 12, 16, "", frozen).save_pretrained(tmp_path / "encoder")
    for encoder in (
        TextEncoder.from_bert(tmp_path / "bert", 12, 16, "", frozen),
        TextEncoder.from_pretrained(tmp_path / "encoder", local_files_only=True),
    ):
        encoder.train()
        once, again = encoder(*some_texts(12)), encoder(*some_texts(12))
        assert torch.equal(once, again) == frozen  # no dropout
        once.sum().backward()
        assert all((p.grad is None) == frozen for p in encoder.transformer.parameters())
        assert encoder.projection.weight.grad is not None


BERT_DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no folder": (lambda folder: folder.rename(folder.with_name("elsewhere")), "no such folder"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "holds no network"),
    "another model": (change_config(model_type="roberta"), "expected a BERT .* found roberta"),
    "relative positions": (change_config(position_embedding_type="relative_key"), "absolute positions"),
    "nonsense": (change_config(hidden_size="wide"), "BertConfig"),
    "another size": (change_config(intermediate_size=20), "of shape"),
    "pickled": (lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"), "safetensors only"),
    "cut": (cut_weights, "damaged"),
    "a weight missing": (
        change_weights(lambda tensors: tensors.pop("embeddings.LayerNorm.weight")),
        "embeddings.LayerNorm.weight missing",
    ),
    "NaN": (change_weights(lambda tensors: tensors["embeddings.LayerNorm.bias"].fill_(math.nan)), "NaN"),
}


@pytest.mark.parametrize("damage", BERT_DAMAGES)
def test_damaged_berts_are_not_loaded(damage: str, tmp_path: Path) -> None:
    pretrained_bert(tmp_path / "bert")
    change, message = BERT_DAMAGES[damage]
    change(tmp_path / "bert")
    with pytest.raises(CheckpointError, match=message):
        TextEncoder.from_bert(tmp_path / "bert", max_tokens=16)


def test_a_bert_has_no_more_positions_than_it_has(tmp_path: Path) -> None:
    pretrained_bert(tmp_path / "bert")
    TextEncoder.from_bert(tmp_path / "bert", max_tokens=30)
    with pytest.raises(ConfigError, match=r"has 30 positions, found 31; set text\.max_tokens=30"):
        TextEncoder.from_bert(tmp_path / "bert", max_tokens=31)
    with pytest.raises(CheckpointError, match="hf download bert-base-uncased"):
        TextEncoder.from_bert("bert-base-uncased")


# ---- alignment -----------------------------------------------------------------------------------------------


def slow_losses(images: Tensor, texts: Tensor, scale: float, same: Tensor | None) -> list[float]:
    """InfoNCE both ways, a number at a time."""
    count = len(images)

    def similarity(i: int, j: int) -> float:
        return float(images[i] @ texts[j] / images[i].norm() / texts[j].norm())

    def allowed(i: int, j: int) -> bool:
        return i == j or same is None or not bool(same[i, j])

    losses = []
    for i in range(count):
        own = math.exp(scale * similarity(i, i))
        row = sum(math.exp(scale * similarity(i, j)) for j in range(count) if allowed(i, j))
        column = sum(math.exp(scale * similarity(j, i)) for j in range(count) if allowed(j, i))
        losses.append(-0.5 * (math.log(own / row) + math.log(own / column)))
    return losses


@pytest.mark.parametrize("scale", [1.0, 1 / 0.07, 100.0])
@pytest.mark.parametrize("equal_captions", [False, True])
def test_losses_are_those_of_the_slow_loop(scale: float, equal_captions: bool) -> None:
    images, texts = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0)).double().unbind(0)
    same = None
    if equal_captions:
        wording = torch.tensor([0, 1, 0, 2, 1, 0])
        same = wording[:, None] == wording[None]
    losses = contrastive_losses(images, texts, torch.tensor(scale), same)
    torch.testing.assert_close(losses, torch.tensor(slow_losses(images, texts, scale, same)), atol=2e-4, rtol=1e-5)


def test_pairs_with_the_same_caption_do_not_repel() -> None:
    images, texts = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)).unbind(0)
    images.requires_grad_()
    same = torch.tensor([[True, True, False], [True, True, False], [False, False, True]])
    contrastive_losses(images, texts, torch.tensor(10.0), same)[0].backward()
    assert images.grad is not None
    assert bool(images.grad[1].abs().max() == 0)
    assert bool(images.grad[2].abs().max() > 0)


def test_extreme_embeddings() -> None:
    scale = LogitScale()()
    alike = torch.ones(5, 3, requires_grad=True)
    losses = contrastive_losses(alike, alike, scale)
    torch.testing.assert_close(losses, torch.full((5,), math.log(5)))
    losses.sum().backward()
    assert alike.grad is not None
    assert bool(torch.isfinite(alike.grad).all())
    assert contrastive_losses(alike[:1], -alike[:1], scale, torch.ones(1, 1, dtype=torch.bool)).item() == 0
    everything = contrastive_losses(alike, alike, scale, torch.ones(5, 5, dtype=torch.bool))
    assert everything.abs().max() == 0  # no negatives left
    zeros = contrastive_losses(torch.zeros(2, 3), 1e30 * torch.ones(2, 3), torch.tensor(100.0))
    torch.testing.assert_close(zeros, torch.full((2,), math.log(2)))


def test_losses_are_exact_under_autocast() -> None:
    images, texts = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(0)).unbind(0)
    expected = contrastive_losses(images, texts, torch.tensor(100.0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(contrastive_losses(images, texts, torch.tensor(100.0)), expected)


@pytest.mark.parametrize("start", [-5.0, 0.0, 2.0, 50.0])
def test_the_scale_stays_in_its_range_and_comes_back_into_it(start: float) -> None:
    module = LogitScale()
    assert module().item() == pytest.approx(1 / 0.07)
    with torch.no_grad():
        module.log_scale.fill_(start)
    scale = module()
    assert 1 <= scale.item() <= 100
    assert scale.item() == pytest.approx(math.exp(min(max(start, 0), math.log(100))))
    assert 0 <= module.log_scale.item() <= math.log(100)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    towards = 10.0
    for _ in range(300):
        optimizer.zero_grad()
        (module().log() - math.log(towards)).square().backward()
        optimizer.step()
    assert module().item() == pytest.approx(towards, rel=1e-3)
