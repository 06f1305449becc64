"""The captioner: it learns, looks at the map, and samples what its probabilities say, whatever the batch."""

import math
from collections import Counter
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from scipy.stats import chisquare
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from heterodiff.errors import CheckpointError, ConfigError
from heterodiff.text.captioner import Captioner, CaptionSampler, load_captioner
from heterodiff.text.tokenizer import encode_texts, train_tokenizer
from tests.test_text_encoder import change_config, change_weights

WEIGHTS = "diffusion_pytorch_model.safetensors"
CAPTIONS = ["a red circle", "a red circle above a small blue square", "two green triangles", "nothing at all, or so"]
SAMPLING: dict[str, Any] = {
    "temperature": 1.5,
    "top_k": 20,
    "top_p": 0.95,
    "repetition_penalty": 1.2,
    "max_new_tokens": 12,
}


def small_captioner(**settings: Any) -> Captioner:
    torch.manual_seed(0)
    sizes = {
        "vocabulary_size": 40,
        "latent_channels": 6,
        "latent_size": (2, 3),
        "embedding_dim": 10,
        "width": 32,
        "layers": 2,
        "num_heads": 4,
        "max_tokens": 20,
    }
    captioner = Captioner(**(sizes | settings)).eval()
    with torch.no_grad():  # far from uniform, and sensitive to every token and to the image
        for name, parameter in captioner.named_parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=1.0 if "wpe" in name else 0.3)
    return captioner


def maps(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 6, 2, 3, generator=torch.Generator().manual_seed(seed))


def embeddings(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 10, generator=torch.Generator().manual_seed(seed))


def some_captions(padded_to: int) -> tuple[Tensor, Tensor]:
    lengths = torch.tensor([2, 5, 9])
    ids = torch.randint(4, 40, (3, padded_to), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(padded_to) < lengths[:, None]
    return torch.where(mask, ids, 0), mask


# ---- losses --------------------------------------------------------------------------------------------------


@torch.no_grad()
def slow_losses(captioner: Captioner, latents: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """A caption and a token at a time, each from the tokens before it alone."""
    losses = []
    for k, row in enumerate(ids):
        row = row[mask[k]]
        each = [
            -captioner(latents[k : k + 1], row[None, :end])[0, -1].log_softmax(dim=0)[row[end]]
            for end in range(1, len(row))
        ]
        losses.append(sum(each) / len(each))
    return torch.stack(losses)


@pytest.mark.parametrize("padded_to", [9, 14])
@torch.no_grad()
def test_losses_are_means_over_real_tokens(padded_to: int) -> None:
    captioner, (ids, mask) = small_captioner(), some_captions(padded_to)
    losses = captioner.losses(maps(3), ids, mask)
    torch.testing.assert_close(losses, slow_losses(captioner, maps(3), ids, mask), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(captioner.losses(maps(3), torch.where(mask, ids, 7), mask), losses)


@torch.no_grad()
def test_every_cell_of_the_map_matters_and_its_place_too() -> None:
    captioner, (ids, mask) = small_captioner(), some_captions(9)
    latents = maps(3)
    expected = captioner.losses(latents, ids, mask)
    for row, column in product(range(2), range(3)):
        changed = latents.clone()
        changed[1, :, row, column] += 1
        difference = (captioner.losses(changed, ids, mask) - expected).abs()
        assert difference[1] > 1e-4
        assert max(difference[0], difference[2]) < 1e-6
    assert (captioner.losses(latents.flip(3), ids, mask) - expected).abs().min() > 1e-4


@torch.no_grad()
def test_an_embedding_is_read_by_its_direction_in_place_of_a_map() -> None:
    captioner, (ids, mask) = small_captioner(), some_captions(9)
    expected = captioner.losses(embeddings(3), ids, mask)
    torch.testing.assert_close(captioner.losses(7 * embeddings(3), ids, mask), expected)
    changed = embeddings(3)
    changed[1] += torch.eye(10)[4]
    difference = (captioner.losses(changed, ids, mask) - expected).abs()
    assert difference[1] > 1e-4
    assert max(difference[0], difference[2]) < 1e-6
    written = captioner.generate(embeddings(3), num_captions=2, seed=3, **SAMPLING)
    assert captioner.generate(embeddings(3)[1:2], num_captions=2, seed=3, **SAMPLING) == written[1:2]
    assert written[0] != written[1]


def test_what_texts_teach_changes_nothing_of_how_maps_are_read() -> None:
    touched: dict[str, set[str]] = {}
    for name, given in (("maps", maps(3)), ("embeddings", embeddings(3))):
        captioner = small_captioner()
        captioner.losses(given, *some_captions(9)).sum().backward()
        touched[name] = {weight for weight, parameter in captioner.named_parameters() if parameter.grad is not None}
    assert touched["maps"]
    assert touched["embeddings"]
    assert not touched["maps"] & touched["embeddings"]


def test_every_weight_learns() -> None:
    captioner = small_captioner(dropout=0.1).train()
    captioner.losses(maps(3), *some_captions(20)).sum().backward()
    captioner.losses(embeddings(3), *some_captions(20)).sum().backward()
    for name, parameter in captioner.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.abs().sum() > 0), name


def test_shapes_that_do_not_fit_are_errors() -> None:
    captioner = small_captioner()
    with pytest.raises(ConfigError, match=r"latents \(B, 6, 2, 3\) or embeddings \(B, 10\), found \(1, 6, 3, 2\)"):
        captioner.generate(maps(1).transpose(2, 3))
    with pytest.raises(ConfigError, match=r"embeddings \(B, 10\), found \(3, 9\)"):
        captioner.losses(embeddings(3)[:, :9], *some_captions(9))
    with pytest.raises(ConfigError, match="at most 20 tokens"):
        captioner.losses(maps(3), *some_captions(22))
    with pytest.raises(ConfigError, match="does not split into 5 heads"):
        small_captioner(num_heads=5)
    assert captioner.generate(maps(0)) == []


@pytest.mark.parametrize("of", [maps, embeddings])
def test_it_learns_four_captions_by_heart(of: Callable[[int], Tensor]) -> None:
    tokenizer = train_tokenizer(CAPTIONS, 150)
    tokens, _ = encode_texts(tokenizer, CAPTIONS, 20)
    torch.manual_seed(0)
    captioner = Captioner(len(tokenizer), 6, (2, 3), 10, width=32, layers=2, num_heads=4, max_tokens=20)
    latents = of(4)
    optimizer = torch.optim.Adam(captioner.parameters(), lr=1e-2)
    for _ in range(100):
        optimizer.zero_grad()
        loss = captioner.losses(latents, tokens.ids, tokens.mask).mean()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05
    assert captioner.training
    for settings in ({"temperature": 0}, {"temperature": 0, "use_cache": False}, {"temperature": 0.7, "top_p": 0.9}):
        written = captioner.generate(latents, num_captions=2, **settings)
        texts = [[tokenizer.decode(ids) for ids in each] for each in written]
        assert texts == [[caption, caption] for caption in CAPTIONS]
    assert captioner.training  # as before; while it wrote, it was not
    cut = captioner.generate(latents, temperature=0, max_new_tokens=2)
    assert [tokenizer.decode(ids) for (ids,) in cut][2] == "two green"


# ---- sampling ------------------------------------------------------------------------------------------------


@torch.no_grad()
def probabilities(captioner: Captioner, latents: Tensor, ids: list[int]) -> Tensor:
    """Of each token after ``ids``; start and padding cannot follow."""
    logits = captioner(latents, torch.tensor([[2, *ids]]))[0, -1]
    logits[[0, 2]] = -math.inf
    return logits.double().softmax(dim=0)


def p_value(drawn: Counter[int], expected: Tensor) -> float:
    """Of the chi-square test of counts against probabilities (V,); what is too rare for it counts together."""
    weights = sum(drawn.values()) * expected
    common = weights > 5
    assert common.sum() >= 4
    if any(weights[token] == 0 for token in drawn):
        return 0.0
    observed = torch.tensor([drawn[token] for token in range(len(expected))])
    bins = [(observed[common], weights[common])]
    if weights[~common].sum() > 5:
        bins.append((observed[~common].sum()[None], weights[~common].sum()[None]))
    counts, means = (torch.cat(parts).double() for parts in zip(*bins, strict=True))
    return float(chisquare(counts, means * counts.sum() / means.sum()).pvalue)


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, 0), (0.5, 0), (2.0, 5)])
def test_tokens_are_drawn_as_often_as_their_probabilities_say(temperature: float, top_k: int) -> None:
    captioner, latents = small_captioner(), maps(1)
    settings = {"temperature": temperature, "top_k": top_k, "seed": 1}
    written = captioner.generate(latents, num_captions=4000, max_new_tokens=2, **settings)[0]

    def expected(ids: list[int]) -> Tensor:
        weights = probabilities(captioner, latents, ids) ** (1 / temperature)
        if top_k:
            weights[weights < weights.topk(top_k).values[-1]] = 0
        return weights / weights.sum()

    first = Counter((*ids, 3)[0] for ids in written)  # where a caption ends, its end token was drawn
    assert p_value(first, expected([])) > 1e-3
    # After the most frequent first token: noise at one position says nothing about that at the next.
    token = next(token for token, _ in first.most_common() if token != 3)
    second = Counter((*ids, 3)[1] for ids in written if (*ids, 3)[0] == token)
    assert p_value(second, expected([token])) > 1e-3
    assert p_value(first, expected([token])) < 1e-6  # the test can tell


def test_seeds_and_captions_have_noise_of_their_own() -> None:
    captioner = small_captioner()
    written = [
        captioner.generate(maps(2), num_captions=4, seed=seed, **SAMPLING) for seed in (0, 0, 1, 2**32, 2**63 - 1)
    ]
    assert written[0] == written[1]
    captions = [tuple(ids) for each in written[1:] for ids in each[0]]
    assert len(set(captions)) == len(captions)


def test_a_caption_depends_on_its_image_its_number_and_the_seed_alone() -> None:
    captioner, latents = small_captioner(), maps(7)
    together = captioner.generate(latents, num_captions=3, seed=5, **SAMPLING)
    assert len({tuple(ids) for each in together for ids in each}) > 10
    assert len({len(i) for e in together for i in e}) > 1
    for k, latent in enumerate(latents):
        assert captioner.generate(latent[None], num_captions=3, seed=5, **SAMPLING) == together[k : k + 1]
    order = [3, 0, 6, 2, 5, 1, 4]
    assert captioner.generate(latents[order], num_captions=3, seed=5, **SAMPLING) == [together[k] for k in order]
    more = captioner.generate(latents, num_captions=5, seed=5, **SAMPLING)
    assert [each[:3] for each in more] == together
    longer = captioner.generate(latents, num_captions=3, seed=5, **(SAMPLING | {"max_new_tokens": 19}))
    assert [[ids[:12] for ids in each] for each in longer] == together


@pytest.mark.parametrize("settings", [{"temperature": 0}, SAMPLING, {"temperature": 1.0}])
def test_the_cache_changes_no_token(settings: dict[str, Any]) -> None:
    captioner, latents = small_captioner(), maps(5)
    written = captioner.generate(latents, num_captions=2, seed=3, **settings)
    assert captioner.generate(latents, num_captions=2, seed=3, use_cache=False, **settings) == written
    assert len({tuple(ids) for each in written for ids in each}) >= 5


@torch.no_grad()
def test_greedy_is_the_most_likely_token_each_time() -> None:
    captioner, latents = small_captioner(), maps(3)
    written = captioner.generate(latents, temperature=0)
    for latent, (ids,) in zip(latents, written, strict=True):
        slow: list[int] = []
        while len(slow) < 19 and (token := int(probabilities(captioner, latent[None], slow).argmax())) != 3:
            slow.append(token)
        assert ids == slow
    for settings in ({"top_k": 1}, {"temperature": 1e-6}, {"temperature": 1e-45}, {"top_p": 1e-9}):
        assert captioner.generate(latents, seed=9, **settings) == written
    assert captioner.generate(latents, temperature=0, top_k=3, top_p=0.1, seed=8) == written


def test_the_image_is_looked_at_in_every_step_and_its_keys_are_computed_once() -> None:
    captioner, calls = small_captioner(), Counter[str]()
    for block in captioner.gpt2.transformer.h:
        for name in ("c_attn", "q_attn"):
            layer = getattr(block.crossattention, name)
            layer.register_forward_hook(lambda *_, name=name: calls.update([name]))
    captioner.gpt2.register_forward_hook(lambda *_: calls.update(["step"]))
    captioner.generate(maps(2), num_captions=2, max_new_tokens=10, temperature=1.0)
    assert calls["q_attn"] == 2 * calls["step"] > 10
    assert calls["c_attn"] == 2
    calls.clear()
    captioner.generate(maps(2), num_captions=2, max_new_tokens=10, temperature=1.0, use_cache=False)
    assert calls["q_attn"] == calls["c_attn"] == 2 * calls["step"] > 10


@pytest.mark.parametrize("top_k", [0, 1, 7, 1000])
@pytest.mark.parametrize("top_p", [0.3, 0.9, 1.0])
def test_without_noise_the_scores_are_those_of_transformers(
    top_k: int, top_p: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    logits, ids = 3 * torch.randn(6, 40, generator=generator), torch.randint(1, 40, (6, 5), generator=generator)
    given = logits.clone()
    allowed = logits.clone()
    allowed[:, 39] = -math.inf
    monkeypatch.setattr(CaptionSampler, "_noise", lambda self, position, size: torch.zeros(3, size))
    for temperature, repetition_penalty in product((0.7, 1.0, 3.0), (0.8, 1.0, 1.5)):
        stock = [RepetitionPenaltyLogitsProcessor(repetition_penalty), TemperatureLogitsWarper(temperature)]
        stock += [TopKLogitsWarper(top_k)] if top_k else []
        stock += [TopPLogitsWarper(top_p)] if top_p < 1 else []
        sampler = CaptionSampler(3, (39,), temperature, top_k, top_p, repetition_penalty)
        torch.testing.assert_close(sampler(ids, logits), LogitsProcessorList(stock)(ids, allowed.clone()))
    assert torch.equal(logits, given)


def test_a_repetition_penalty_makes_for_fewer_repetitions() -> None:
    captioner = small_captioner()

    def repeated(penalty: float) -> int:
        written = captioner.generate(maps(8), temperature=0, repetition_penalty=penalty)
        return sum(len(ids) - len(set(ids)) for (ids,) in written)

    assert repeated(5.0) < repeated(1.0) < repeated(0.5)


def test_start_and_padding_are_never_written() -> None:
    captioner = small_captioner()
    captioner.gpt2.transformer.wte.weight.data[[0, 2]] *= 5  # as likely as it gets
    written = captioner.generate(maps(4), num_captions=20, temperature=5.0)
    assert not {0, 2, 3} & {token for each in written for ids in each for token in ids}


@pytest.mark.parametrize(
    ("setting", "values"),
    [
        ("num_captions", (0, -1)),
        ("max_new_tokens", (0, 20)),
        ("temperature", (-0.1, math.nan, math.inf)),
        ("top_k", (-1,)),
        ("top_p", (0, -0.5, 1.1, math.nan)),
        ("repetition_penalty", (0, -1, math.nan)),
        ("seed", (-1, 2**63)),
    ],
)
def test_settings_outside_their_range_are_errors(setting: str, values: tuple[Any, ...]) -> None:
    for value in values:
        with pytest.raises(ConfigError, match=f"^{setting}: expected .*, found {value}"):
            small_captioner().generate(maps(1), **{setting: value})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_writes_in_silence(dtype: torch.dtype, capfd: pytest.CaptureFixture[str]) -> None:
    captioner = small_captioner().to(dtype)
    capfd.readouterr()  # diffusers warns of every change of dtype
    written = captioner.generate(maps(24), num_captions=4, seed=4, **SAMPLING)  # some end before others
    assert len({len(ids) for each in written for ids in each}) > 1
    assert captioner.losses(maps(3), *some_captions(9)).dtype == torch.float32
    assert capfd.readouterr() == ("", "")


def test_dropout_is_off_while_it_writes() -> None:
    captioner = small_captioner(dropout=0.5).train()
    assert captioner.generate(maps(3), **SAMPLING) == captioner.eval().generate(maps(3), **SAMPLING)
    latents, (ids, mask) = maps(3), some_captions(9)
    captioner.train()
    assert not torch.equal(captioner.losses(latents, ids, mask), captioner.losses(latents, ids, mask))
    captioner.losses(latents, ids, mask).sum().backward()  # nothing of the generation is left in the graph


# ---- files ---------------------------------------------------------------------------------------------------


def test_a_saved_captioner_writes_the_same(tmp_path: Path) -> None:
    captioner = small_captioner()
    captioner.save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"config.json", WEIGHTS}
    assert sum(tensor.shape == (40, 32) for tensor in load_file(tmp_path / WEIGHTS).values()) == 2  # tied, one each
    expected = captioner.generate(maps(3), num_captions=2, **SAMPLING)
    for loaded in (load_captioner(tmp_path), Captioner.from_pretrained(tmp_path, local_files_only=True)):
        assert loaded.generate(maps(3), num_captions=2, **SAMPLING) == expected
        with torch.no_grad():
            losses, expected_losses = (each.eval().losses(maps(3), *some_captions(9)) for each in (loaded, captioner))
        torch.testing.assert_close(losses, expected_losses, atol=1e-5, rtol=0)  # rounding depends on memory addresses
        assert all(torch.equal(value, captioner.state_dict()[name]) for name, value in loaded.state_dict().items())
    assert not any(parameter.requires_grad for parameter in load_captioner(str(tmp_path)).parameters())


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no folder": (lambda folder: folder.rename(folder.with_name("elsewhere")), "missing"),
    "another class": (change_config(_class_name="TextEncoder"), "expected a network of class Captioner"),
    "another map": (change_config(latent_size=[3, 3]), "damaged|another network"),
    "no width": (change_config(width=-32), "damaged"),
    "no dropout": (change_config(dropout="some"), "GPT2Config"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), "safetensors only"),
    "a weight missing": (change_weights(lambda tensors: tensors.pop("image_positions")), "image_positions"),
    "NaN": (change_weights(lambda tensors: tensors["image_positions"].fill_(math.nan)), "NaN"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_captioners_are_not_loaded(damage: str, tmp_path: Path) -> None:
    small_captioner().save_pretrained(tmp_path / "captioner")
    change, message = DAMAGES[damage]
    change(tmp_path / "captioner")
    with pytest.raises(CheckpointError, match=message):
        load_captioner(tmp_path / "captioner")
