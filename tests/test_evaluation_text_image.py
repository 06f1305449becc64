"""Evaluating text to image and back: the measures by hand, the reader on fresh renders, whole runs end to end."""

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from heterodiff.cli import main
from heterodiff.config import ShapesConfig
from heterodiff.config.file import load_config
from heterodiff.data.sources import load_data
from heterodiff.errors import ConfigError, DataError
from heterodiff.evaluation.captioned import CaptionedImages
from heterodiff.evaluation.captions import READER_FILE, evaluate_text_image
from heterodiff.evaluation.prompts import draw_pictures, embed_texts, own_recall, ways_of
from heterodiff.evaluation.runs import task_evaluated
from heterodiff.metrics.captions import caption_likeness, unigram_f1
from heterodiff.metrics.intervals import proportion
from heterodiff.metrics.retrieval import recall
from heterodiff.metrics.scenes import caption_truth, draw_asked, following, sharpness
from heterodiff.metrics.shapes_classifier import TEST_SEED, TRAIN_SEED, ShapesClassifier, blur, draw_renders
from heterodiff.pipelines.generate import seeded_generators
from heterodiff.pipelines.load import load_text_image
from heterodiff.report import captions as report_captions
from heterodiff.report.content import Report
from heterodiff.report.curves import curves_svg
from heterodiff.report.files import RunFiles
from heterodiff.report.writing import render, summary_lines, write_report
from heterodiff.run_folder import RunFolder
from heterodiff.simulators.shapes import scene_of
from heterodiff.simulators.shapes.scenes import ALL_THINGS, PLACES, Scene, Thing, parse_thing
from heterodiff.simulators.shapes.words import read_caption
from heterodiff.training.start import train
from tests.text_runs import text_config

SIZE = (32, 32)
UNSEEN = ("purple triangle", "green cross")
SHAPES = ShapesConfig(images=60, unseen=UNSEEN)
RED_CIRCLE, BLUE_SQUARE = Thing("red", "circle"), Thing("blue", "square")


@pytest.fixture(scope="module")
def reader() -> ShapesClassifier:
    torch.set_num_threads(1)
    return ShapesClassifier(*SIZE).fit(steps=240, renders=5000)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, reader: ShapesClassifier) -> Path:
    """A run of recipe text-image on 32x32 shapes, its alignment inside; both with the reader that is trained here."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("text") / "run"
    options: dict[str, Any] = {
        "data__image_size": 32,
        "data__shapes": SHAPES.model_dump(),
        "alignment__block_out_channels": [8, 16, 16],
    }
    train(text_config(folder, **options), quiet=True)
    for stage in (folder, folder / "alignment"):
        reader.save(stage / "evaluation" / READER_FILE)
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 30 pictures with captions in free words."""
    folder = tmp_path_factory.mktemp("photos")
    scenes, images = draw_renders((5,), 30, (16, 16))
    rows = []
    for k, (scene, image) in enumerate(zip(scenes, images, strict=True)):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{k:02d}.png")
        for text in (f"Look: {scene.things[0]}!", f"one {scene.things[0].shape}, at least"):
            rows.append(json.dumps({"file_name": f"{k:02d}.png", "text": text}))
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    return folder


@pytest.fixture(scope="module")
def photo_run(tmp_path_factory: pytest.TempPathFactory, photos: Path) -> Path:
    """A run on pictures that no classifier knows, trained in one stage."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("photo_run") / "run"
    data = {"data__source": "captions", "data__path": str(photos), "data__val_fraction": 0.4}
    train(text_config(folder, alignment__joint=True, **data), quiet=True)
    return folder


def evaluated(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> dict[str, Any]:
    """What ``heterodiff evaluate --json`` prints."""
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", "--json", *map(str, arguments)])
    assert stop.value.code == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def numbers(content: Any) -> Iterator[float]:
    if isinstance(content, dict | list):
        for value in content.values() if isinstance(content, dict) else content:
            yield from numbers(value)
    elif isinstance(content, int | float):
        yield content


def assert_proportion(found: dict[str, Any], number: int) -> None:
    assert found["n"] == number
    assert 0 <= found["low"] <= found["share"] <= found["high"] <= 1
    assert found["low"] < found["high"]


# ---- retrieval ------------------------------------------------------------------------------------------------------


def slow_recall(images: np.ndarray, texts: np.ndarray, owner: list[int], captions: list[str], k: int) -> list[float]:
    """Recall at k of images among texts and of texts among images, one query after the other."""

    def cosine(a: np.ndarray, b: np.ndarray) -> float:
        return float(a @ b / math.sqrt((a @ a) * (b @ b)))

    def true_of(image: int, caption: str) -> bool:
        return any(owner[m] == image for m in range(len(texts)) if captions[m] == caption)

    image_hits = []
    for n in range(len(images)):
        nearest = sorted(range(len(texts)), key=lambda m: -cosine(images[n], texts[m]))[:k]
        image_hits.append(any(true_of(n, captions[m]) for m in nearest))
    text_hits = []
    for m in range(len(texts)):
        nearest = sorted(range(len(images)), key=lambda n: -cosine(texts[m], images[n]))[:k]
        text_hits.append(any(true_of(n, captions[m]) for n in nearest))
    return [float(np.mean(image_hits)), float(np.mean(text_hits))]


def test_recall_is_that_of_a_slow_loop_with_captions_that_repeat() -> None:
    rng = np.random.default_rng(0)
    owner = [int(n) for n in rng.integers(0, 12, 40)] + list(range(12))
    captions = [f"text {rng.integers(0, 25)}" for _ in owner]  # several images share a wording
    wordings = {caption: rng.normal(size=6) for caption in captions}
    texts = np.stack([wordings[caption] for caption in captions])
    images = rng.normal(size=(12, 6)) + np.stack([texts[owner.index(n)] for n in range(12)])
    for kind in ("as they are", "times numbers"):
        scale = 1.0 if kind == "as they are" else 37.0
        found = recall(torch.from_numpy(images * scale), torch.from_numpy(texts), torch.tensor(owner), captions)
        for k in (1, 5):
            # Ties of equal texts lie next to each other in a stable sort, but top-k may order them otherwise.
            both = slow_recall(images, texts, owner, captions, k)
            assert [found[f"recall@{k}_image_to_text"], found[f"recall@{k}_text_to_image"]] == pytest.approx(both)
    assert 0.1 < found["recall@1_image_to_text"] < found["recall@5_image_to_text"] <= 1


def test_recall_of_images_of_one_caption_is_perfect() -> None:
    images = torch.eye(4)
    found = recall(images, images[:1].repeat(4, 1), torch.arange(4), ["the same"] * 4)
    assert set(found.values()) == {1.0}
    found = recall(images, images.roll(1, 0), torch.arange(4), list("abcd"), ks=(1, 4))
    assert found == {
        "recall@1_image_to_text": 0.0,
        "recall@4_image_to_text": 1.0,
        "recall@1_text_to_image": 0.0,
        "recall@4_text_to_image": 1.0,
    }


# ---- the reader -----------------------------------------------------------------------------------------------------


def test_reader_reads_fresh_renders_sharp_blurred_and_noisy(reader: ShapesClassifier) -> None:
    assert reader.accuracy(300) > 0.9  # 0.998 when trained for as long as an evaluation trains it
    scenes, images = draw_renders((77,), 300, SIZE, pairs=0.5)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    for seen in (images / 255, blur(images / 255, 0.6), images / 255 + 0.03 * noise):
        right = [found.place == scene.place for found, scene in zip(reader.read(seen), scenes, strict=True)]
        assert np.mean(right) > 0.9


def test_reader_is_trained_and_tested_on_other_scenes_than_each_other() -> None:
    train_scenes, train_images = draw_renders(TRAIN_SEED, 40, SIZE)
    test_scenes, test_images = draw_renders(TEST_SEED, 40, SIZE)
    assert train_scenes != test_scenes
    assert not any(torch.equal(a, b) for a in train_images for b in test_images)
    assert torch.equal(draw_renders(TRAIN_SEED, 40, SIZE)[1], train_images)
    assert {thing for scene in draw_renders(TRAIN_SEED, 500, (16, 16))[0] for thing in scene.things} == set(ALL_THINGS)


def test_reader_weights_come_back_for_this_size_only(reader: ShapesClassifier, tmp_path: Path) -> None:
    path = tmp_path / "deep" / READER_FILE
    assert not ShapesClassifier(*SIZE).load(path)
    reader.save(path)
    assert [p.name for p in path.parent.iterdir()] == [READER_FILE]
    again = ShapesClassifier(*SIZE)
    images = draw_renders((3,), 20, SIZE)[1] / 255
    assert again.load(path)
    assert again.read(images) == reader.read(images)
    assert not ShapesClassifier(32, 48).load(path)
    path.write_bytes(path.read_bytes()[:-100])
    assert not ShapesClassifier(*SIZE).load(path)


def test_reader_takes_large_and_oblong_pictures_and_leaves_the_random_state_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    for size, inner in (((224, 224), (64, 64)), ((100, 200), (64, 128)), ((16, 24), (16, 24))):
        reader = ShapesClassifier(*size).fit(steps=1, renders=64)
        assert reader.size == inner
        for scene in reader.read(draw_renders((3,), 2, size)[1] / 255):
            assert len(scene.things) == (1 if scene.place in PLACES else 2)
    assert torch.equal(torch.rand(3), expected)


# ---- measures -------------------------------------------------------------------------------------------------------


def test_sharpness_falls_with_blur_and_hardly_changes_with_faint_noise() -> None:
    images = draw_renders((1,), 20, (64, 64))[1] / 255
    real = sharpness(images)
    assert real.shape == (20,)
    shares = [float(sharpness(blur(images, sigma)).mean() / real.mean()) for sigma in (0.0, 0.5, 1.0, 2.0)]
    assert shares[0] == pytest.approx(1)
    assert shares[1] < 0.9
    assert shares[2] < 0.7
    assert shares[3] < 0.5
    noisy = images + 0.01 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    assert 1 < float(sharpness(noisy).mean() / real.mean()) < 1.1
    ramp = torch.arange(8.0).expand(1, 3, 8, 8) * 0.1
    torch.testing.assert_close(sharpness(ramp), torch.tensor([0.1]))
    torch.testing.assert_close(sharpness(ramp + ramp.mT), torch.tensor([math.sqrt(0.02)]))


def test_blur_is_a_gaussian() -> None:
    point = torch.zeros(1, 2, 21, 21)
    point[0, 1, 10, 10] = 1
    blurred = blur(point, 1.5)
    assert float(blurred[0, 0].abs().max()) == 0
    offsets = torch.arange(-10.0, 11)
    assert float(blurred[0, 1].sum()) == pytest.approx(1, abs=1e-5)
    assert float((blurred[0, 1].sum(dim=0) * offsets**2).sum()) == pytest.approx(1.5**2, rel=0.03)
    torch.testing.assert_close(blur(torch.full((1, 3, 8, 8), 0.3), 1.0), torch.full((1, 3, 8, 8), 0.3))


def test_proportions_have_intervals() -> None:
    found = proportion([True] * 30 + [False] * 70, seed=3)
    assert (found["n"], found["share"]) == (100, 0.3)
    half = 1.96 * math.sqrt(0.3 * 0.7 / 100)
    assert found["low"] == pytest.approx(0.3 - half, abs=0.02)
    assert found["high"] == pytest.approx(0.3 + half, abs=0.02)
    assert found == proportion([True] * 30 + [False] * 70, seed=3)
    for hits, (low, high) in (([True] * 50, (0.9, 1.0)), ([False] * 50, (0.0, 0.1))):
        assert_proportion(found := proportion(hits, seed=0), 50)
        assert low <= found["low"] < found["high"] <= high


def test_scenes_asked_for_have_no_unseen_thing_or_always_one() -> None:
    unseen = {parse_thing(text) for text in UNSEEN}
    asked, other = (draw_asked(SHAPES, 60, SIZE, 0, unseen=flag) for flag in (False, True))
    assert not any(unseen & set(scene.things) for scene in asked.scenes)
    assert all(unseen & set(scene.things) for scene in other.scenes)
    for part in (asked, other):
        assert [read_caption(prompt) for prompt in part.prompts] == part.scenes
        assert part.real.shape == (60, 3, *SIZE)
        assert 0 <= float(part.real.min()) < float(part.real.max()) <= 1
    assert asked.scenes == draw_asked(SHAPES, 60, SIZE, 0).scenes
    assert asked.scenes != draw_asked(SHAPES, 60, SIZE, 1).scenes
    assert asked.scenes != [scene_of(SHAPES, k) for k in range(60)]


def test_pictures_are_judged_by_things_and_by_places(reader: ShapesClassifier) -> None:
    asked = draw_asked(SHAPES, 100, SIZE, 0)
    real = following(asked, asked.real, reader, 0)
    assert real["sharpness"] == pytest.approx(1)
    assert 0.7 < real["scene"]["share"] <= real["things"]["share"]
    turned = following(asked, asked.real.flip(2, 3), reader, 0)  # right things (triangles but seldom), wrong places
    assert turned["things"]["share"] > 0.5
    centres = np.mean([scene.place == "centre" for scene in asked.scenes])
    assert turned["scene"]["share"] <= centres + 0.05
    others = following(asked, asked.real.roll(1, 0), reader, 0)
    assert others["things"]["share"] < 0.1
    grey = following(asked, torch.full_like(asked.real, 0.9), reader, 0)
    assert grey["sharpness"] == 0
    assert grey["scene"]["share"] < 0.1


def test_captions_of_scenes_by_hand() -> None:
    pair, single = Scene((RED_CIRCLE, BLUE_SQUARE), "above"), Scene((RED_CIRCLE,), "top left")
    cases = [
        (pair, "a red circle above a blue square", (1, 1, 1)),
        (pair, "There is a blue square below a red circle.", (1, 1, 1)),
        (pair, "a blue square and a red circle", (1, 1, 0)),
        (pair, "a blue square above a red circle", (1, 0, 0)),
        (pair, "a red circle left of a blue square", (1, 0, 0)),
        (pair, "a red circle", (0, 0, 0)),
        (pair, "a red square above a blue circle", (0, 0, 0)),
        (pair, "a red circle above above", (0, 0, 0)),
        (single, "a red circle in the top left corner", (1, 1, 1)),
        (single, "a red circle", (1, 1, 0)),
        (single, "a red circle in the centre", (1, 0, 0)),
        (single, "", (0, 0, 0)),
    ]
    for scene, caption, expected in cases:
        found = caption_truth([caption], [scene], 0)
        assert tuple(found[name]["share"] for name in ("things", "true", "scene")) == expected, caption
    found = caption_truth([c for _, c, _ in cases], [s for s, _, _ in cases], 0)
    assert [found[name]["share"] for name in ("things", "true", "scene")] == pytest.approx([8 / 12, 5 / 12, 3 / 12])
    assert_proportion(found["true"], 12)


def test_captions_in_free_words_by_hand() -> None:
    assert unigram_f1("a dog runs", ["A dog runs!"]) == 1
    assert unigram_f1("a dog", ["the cat", "a small dog sleeps"]) == pytest.approx(2 * 2 / (2 + 4))
    assert unigram_f1("a a a", ["a b"]) == pytest.approx(2 * 1 / (3 + 2))
    assert unigram_f1("", ["a"]) == unigram_f1("a", [""]) == unigram_f1("", [""]) == 0
    found = caption_likeness(["A dog, runs", "runs dog a"], [["no", "a dog runs"], ["a dog runs"]], 0)
    assert found["exact"]["share"] == 0.5
    assert found["unigram_f1"] == 1


# ---- whole runs -----------------------------------------------------------------------------------------------------


def test_evaluate_a_run_on_shapes(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert task_evaluated(run).recipe == "text-image"
    weights = (run / "evaluation" / READER_FILE).read_bytes()
    found = evaluated(capsys, run, "-n", "6", "--guidance", "2.5")
    assert json.loads((run / "evaluation.json").read_text()) == found
    assert all(math.isfinite(number) for number in numbers(found))
    assert (run / "evaluation" / READER_FILE).read_bytes() == weights
    assert set(found) == {
        *("held_out", "seed", "number", "sampling", "retrieval", "reconstruction", "captions"),
        *("reader_accuracy", "reader_renders", "prompts", "unseen_prompts", "unseen_captions"),
    }
    assert found["held_out"] | {"notes": []} == {"path": "shapes", "part": "validation split", "n": 6, "notes": []}
    assert (found["sampling"]["guidance_scale"], found["sampling"]["num_inference_steps"]) == (2.5, 2)
    assert {name: part["images"] for name, part in found["retrieval"].items()} == {
        "held_out": 6,
        "train": 6,
        "train_more": 54,
    }
    for part in found["retrieval"].values():
        assert 3 * part["images"] <= part["texts"] <= 4 * part["images"]
        assert {key for key in part if "@" in key} == {
            f"recall@{k}_{way}" for k in (1, 5) for way in ("image_to_text", "text_to_image")
        }
    assert found["reconstruction"]["n"] == 6
    assert found["unseen_prompts"]["combinations"] == list(UNSEEN)
    for name, number in (("prompts", 6), ("unseen_prompts", 3)):
        assert found[name]["n"] == number
        for way in ("diffusion", "direct", "real"):
            assert_proportion(found[name][way]["things"], number)
            assert_proportion(found[name][way]["scene"], number)
        assert found[name]["real"]["sharpness"] == 1
    for name, number in (("captions", 6), ("unseen_captions", 3)):
        for value in found[name].values():
            assert_proportion(value, number)
    for picture in (RunFolder(run).prompts_picture, RunFolder(run).captions_picture):
        with Image.open(picture) as opened:
            assert min(opened.size) > 128
    report = (run / "report.html").read_text()
    for expected in ("Text to image", "Image to text", "Direct decoding", "Diffusion", "purple triangle, green cross"):
        assert expected in report
    assert "trained first" in report
    assert report.count("data:image/png") >= 3
    summary = summary_lines(found)
    assert len(summary) >= 12
    assert all(line in "\n".join(summary) for line in [f"note     {note}" for note in found["held_out"]["notes"]])


def test_evaluation_is_the_same_again(run: Path) -> None:
    first, again = (evaluate_text_image(run, seed=3, number=2) for _ in range(2))
    assert first.metrics == again.metrics
    assert first.picture == RunFolder(run).prompts_picture


def test_evaluate_an_alignment(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    alignment = run / "alignment"
    found = evaluated(capsys, alignment, "-n", "4")
    assert all(math.isfinite(number) for number in numbers(found))
    assert set(found["prompts"]) == set(found["unseen_prompts"]) - {"combinations"} == {"n", "direct", "real"}
    assert "sampling" not in found
    report = (alignment / "report.html").read_text()
    assert "Diffusion" not in report
    assert "trained first" not in report
    with pytest.raises(ConfigError, match="no denoiser to sample with; leave out sampler"):
        evaluate_text_image(alignment, sampler="ddim")


def test_evaluate_on_other_pictures(
    run: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = evaluated(capsys, run, "-n", "4", "--data", photos)
    assert (found["held_out"]["part"], found["held_out"]["n"]) == ("all", 30)
    assert set(found["captions"]) == {"exact", "unigram_f1"}
    assert "prompts" in found
    assert found["retrieval"]["held_out"]["texts"] == 60
    note = next(note for note in found["held_out"]["notes"] if "vocabulary" in note)
    assert "others)" in note
    with pytest.raises(DataError, match="no such folder of captioned images; correct --data"):
        evaluate_text_image(run, data=tmp_path / "nowhere")
    Image.new("RGB", (32, 32)).save(tmp_path / "alone.png")
    with pytest.raises(DataError, match="captions"):
        evaluate_text_image(run, data=tmp_path)


def test_training_pictures_are_told_from_held_out_ones(photo_run: Path, photos: Path) -> None:
    found = evaluate_text_image(photo_run, number=4, data=photos).metrics
    assert any("18 of 30 images" in note and "not held out" in note for note in found["held_out"]["notes"])


def test_evaluate_a_run_on_pictures_that_no_classifier_knows(
    photo_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = evaluated(capsys, photo_run, "-n", "8")
    assert all(math.isfinite(number) for number in numbers(found))
    assert "reader_accuracy" not in found
    assert "prompts" not in found
    assert not (photo_run / "evaluation" / READER_FILE).exists()
    assert set(found["captions"]) == {"exact", "unigram_f1"}
    judged = found["generated_recall"]
    assert (judged["n"], judged["judge"]) == (4, "the model's own encoders")
    for way in ("diffusion", "direct", "real"):
        assert judged[way]["generated_recall@1"] <= judged[way]["generated_recall@5"] == 1  # 4 prompts in all
    assert "Prompt recognised, recall@5" in (photo_run / "report.html").read_text()
    assert any("prompt recognised, recall@5" in line for line in summary_lines(found))


def test_what_is_chosen_among_candidates_is_measured_beside_what_is_drawn_first(photo_run: Path) -> None:
    pipeline, prompts = load_text_image(photo_run), ["Look: red circle!", "one square, at least"]
    assert list(ways_of(pipeline)) == ["diffusion", "direct"]
    pipeline.defaults = pipeline.defaults.model_copy(update={"candidates": 3})
    ways = ways_of(pipeline, num_inference_steps=2)
    drawn = {name: draw_pictures(pipeline, prompts, 5, **options) for name, options in ways.items()}
    assert list(drawn) == ["diffusion", "first", "direct"]
    for name, candidates in (("first", 1), ("diffusion", 3)):
        expected = pipeline.generate_image_from_text(
            embed_texts(pipeline, prompts),
            num_inference_steps=2,
            generators=seeded_generators(5, 2),
            candidates=candidates,
            texts=prompts,
        )
        torch.testing.assert_close(drawn[name], expected, atol=1e-5, rtol=0)


def test_own_recall_finds_the_prompt_whose_embedding_a_picture_has(
    photo_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = load_text_image(photo_run)
    prompts = ["Look: red circle!", "one square, at least", "Look: green cross!"]
    embeddings = embed_texts(pipeline, prompts)
    monkeypatch.setattr(pipeline, "encode_image", lambda images: embeddings[images[:, 0, 0, 0].long()])
    pictures = torch.arange(3.0).view(3, 1, 1, 1).expand(3, 3, 16, 16)
    assert own_recall(pipeline, pictures, prompts)["generated_recall@1"] == 1
    assert own_recall(pipeline, pictures.roll(1, 0), prompts)["generated_recall@1"] == 0


def test_without_held_out_pictures_the_way_out_is_named(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run / "alignment", copy)
    split = json.loads((copy / "split.json").read_text())
    (copy / "split.json").write_text(json.dumps({"train": split["train"] + split["val"], "val": []}))
    with pytest.raises(DataError, match="no held-out images; name some with --data"):
        evaluate_text_image(copy)


def test_images_are_chosen_by_seed_with_their_captions(run: Path) -> None:
    config = load_config(run / "config.yaml").data
    data = load_data(config)
    chosen = CaptionedImages.choose(data.train, data.captions, 10, 7)
    assert len(chosen) == 10
    assert list(chosen.rows) == sorted(set(chosen.rows))
    assert chosen == CaptionedImages.choose(data.train, data.captions, 10, 7)
    assert chosen != CaptionedImages.choose(data.train, data.captions, 10, 8)
    for name, captions in zip(chosen.names, chosen.captions, strict=True):
        assert read_caption(captions[0]) == scene_of(config.shapes, int(name))
    few = chosen.spread(3)
    assert few.rows == tuple(chosen.rows[k] for k in (0, 4, 9))
    assert torch.equal(few.images(), chosen.images()[[0, 4, 9]])
    assert torch.equal(torch.cat(list(chosen.parts())), chosen.images())


def test_report_survives_any_value(run: Path, tmp_path: Path) -> None:
    evaluation = evaluate_text_image(run, number=2).metrics | {"generated_recall": {"n": 2, "direct": {"x": 0.5}}}

    files = RunFiles(tmp_path)

    def places(content: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
        if path:
            yield path
        if isinstance(content, dict):
            for key, value in content.items():
                yield from places(value, (*path, key))

    for path in places(evaluation):
        for value in (None, "<script>", [[]], math.nan, "removed"):
            changed = json.loads(json.dumps(evaluation))
            place = changed
            for key in path[:-1]:
                place = place[key]
            place[path[-1]] = value
            if value == "removed":
                del place[path[-1]]
            files.evaluation = changed
            cards, sections = list(report_captions.cards(changed)), report_captions.sections(files)
            assert "<script>" not in render(Report("run", "", (), cards, sections))
            assert all(isinstance(line, str) for line in summary_lines(changed))


@pytest.mark.parametrize("codec", ["", "codec: 3", "codec: {path: null}", "codec: {path: [1]}", "codec: {path: none}"])
def test_report_without_a_first_stage(codec: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(f"recipe: text-image\n{codec}\n")
    report = write_report(tmp_path).read_text()
    assert "trained first" not in report
    assert "heterodiff text2image" in report


def test_report_shows_all_that_was_measured_on_held_out_images() -> None:
    svg = curves_svg([{"step": k, "loss": 1.0, "val_recall@5_x": 0.5, "l1": 2.0, "val_alone": 1.0} for k in (1, 2)])
    assert svg is not None
    assert svg.count(b"<!-- recall@5 x -->") == svg.count(b"<!-- alone -->") == 1
    assert b"<!-- l1 -->" not in svg
    assert curves_svg([{"step": 1, "val_psnr": 2.0}]) is None
