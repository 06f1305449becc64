"""Text to image and back with a run folder: loading, drawing, captions, determinism, and what cannot be used."""

import json
import math
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import heterodiff as hd
from heterodiff.config.file import load_config
from heterodiff.data.sources import load_data
from heterodiff.errors import CheckpointError, ConfigError, DataError, RunError
from heterodiff.pictures import save_image
from heterodiff.pipelines.generate import seeded_generators
from heterodiff.pipelines.image_files import read_usable
from heterodiff.pipelines.text_to_image import TextImagePipeline, TextWarning, text_notes
from heterodiff.text.aligned import load_aligned_networks
from heterodiff.text.tokenizer import encode_texts, train_tokenizer
from heterodiff.training.start import train
from tests.test_text_encoder import change_config, change_weights, cut_weights
from tests.text_runs import forget_files, text_config

PROMPTS = ["a red circle in the centre", "a blue square", "a green triangle above a red circle"]
PARTS = ("image_codec", "text_encoder", "tokenizer", "captioner", "unet", "scheduler")


@pytest.fixture(scope="module")
def pipe(shapes_run: Path) -> TextImagePipeline:
    torch.set_num_threads(1)
    return hd.load(shapes_run)


@pytest.fixture(scope="module")
def images(shapes_run: Path) -> torch.Tensor:
    """Six of the run's pictures."""
    return load_data(load_config(shapes_run / "config.yaml").data).train.batch(range(6))[0]


def largest(difference: torch.Tensor) -> float:
    return float(difference.abs().max())


# ---- the folder -----------------------------------------------------------------------------------------------------


def test_diffusers_own_way_of_loading_needs_no_other_import(shapes_run):
    code = (
        f"import heterodiff as hd; print(type(hd.TextImagePipeline.from_pretrained({str(shapes_run)!r}).unet).__name__)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.stdout.strip() == "FiLMUNet", found.stderr


def test_a_run_folder_is_a_pipeline_of_six_parts(shapes_run: Path, pipe: TextImagePipeline) -> None:
    assert isinstance(pipe, TextImagePipeline)
    index = json.loads((shapes_run / "model_index.json").read_text())
    assert index["_class_name"] == "TextImagePipeline"
    assert {name for name, value in index.items() if isinstance(value, list)} == set(PARTS)
    for name in PARTS:
        assert (shapes_run / name).is_dir(), name
    for name in ("image_codec", "text_encoder", "captioner", "unet"):
        assert {file.name for file in (shapes_run / name).iterdir()} == {
            "config.json", "diffusion_pytorch_model.safetensors"}  # fmt: skip
        network = getattr(pipe, name)
        assert not network.training
        assert network.device == pipe.device
    assert (shapes_run / "tokenizer" / "tokenizer.json").is_file()
    alignment = json.loads((shapes_run / "alignment" / "model_index.json").read_text())
    assert alignment["unet"] == alignment["scheduler"] == [None, None]
    assert not (shapes_run / "alignment" / "unet").exists()


def test_a_saved_pipeline_draws_and_writes_the_same(pipe: TextImagePipeline, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path / "copy", safe_serialization=True)
    assert {path.name for path in (tmp_path / "copy").iterdir()} == {"model_index.json", *PARTS}
    copy = hd.load(tmp_path / "copy")
    options = {"num_inference_steps": 2, "guidance_scale": 2.0, "sampler": "dpmpp"}
    expected = pipe.generate_from_text(PROMPTS, **options).images
    assert largest(copy.generate_from_text(PROMPTS, **options).images - expected) < 1e-5
    assert copy.generate_text_from_image(expected, seed=3) == pipe.generate_text_from_image(expected, seed=3)
    plain = TextImagePipeline.from_pretrained(tmp_path / "copy")  # diffusers' own way
    plain.set_progress_bar_config(disable=True)
    assert largest(plain.generate_from_text(PROMPTS, **options).images - expected) < 1e-5
    assert (copy.defaults, copy.spec, copy.resize) == (pipe.defaults, pipe.spec, pipe.resize)
    copy.spec = None
    with pytest.raises(RunError, match=r"no data\.json, which describes how to read images"):
        copy.generate_from_image([tmp_path / "a.png"])


def test_the_networks_are_those_of_the_alignment(shapes_run: Path) -> None:
    """But for the prior over maps, which the denoiser is trained beside."""
    changed = set()
    for name in ("image_codec", "text_encoder", "captioner"):
        before, after = (
            load_file(folder / name / "diffusion_pytorch_model.safetensors")
            for folder in (shapes_run / "alignment", shapes_run)
        )
        assert before.keys() == after.keys()
        changed |= {f"{name}.{key}" for key in before if not torch.equal(before[key], after[key])}
    assert {key.rpartition(".")[0] for key in changed} == {f"image_codec.projection.{layer}" for layer in (0, 2, 4)}


# ---- text to image --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_diffusion", [True, False])
def test_the_same_seed_draws_the_same_pictures(use_diffusion: bool, pipe: TextImagePipeline) -> None:
    def draw(seed: int) -> torch.Tensor:
        return pipe.generate_from_text(PROMPTS, 2, use_diffusion, seed=seed).images

    first = draw(5)
    assert first.shape == (6, 3, 16, 16)
    assert 0 <= float(first.min()) <= float(first.max()) <= 1
    torch.manual_seed(99)
    assert torch.equal(draw(5), first)
    assert torch.equal(draw(6), first) != use_diffusion
    assert (largest(first[0] - first[1]) > 1e-3) == use_diffusion  # samples of a prompt differ
    assert min(largest(first[0] - first[k]) for k in (2, 4)) > 1e-3  # and prompts


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpmpp"])
def test_a_batch_of_prompts_equals_one_by_one(sampler: str, pipe: TextImagePipeline) -> None:
    options = {"num_inference_steps": 4, "sampler": sampler, "seed": 3}
    together = pipe.generate_from_text(PROMPTS, 3, **options).images
    for k, prompt in enumerate(PROMPTS):
        alone = pipe.generate_from_text(prompt, 3, **options).images
        assert largest(alone - together[3 * k : 3 * k + 3]) < 1e-5
        first = pipe.generate_from_text(prompt, 1, **options).images
        assert largest(first[0] - alone[0]) < 1e-5
    pieces = pipe.generate_from_text(PROMPTS, 3, batch_size=2, **options).images
    assert largest(pieces - together) < 1e-5
    direct = pipe.generate_from_text(PROMPTS, use_diffusion=False).images
    assert largest(pipe.generate_from_text(PROMPTS, use_diffusion=False, batch_size=2).images - direct) < 1e-5


def test_samples_are_of_different_noise(pipe: TextImagePipeline) -> None:
    """Sample k has the same noise for every prompt, another than sample k + 1."""
    prompts = [PROMPTS[0]] * 2
    drawn = pipe.generate_from_text(prompts, 2, num_inference_steps=3).images
    assert largest(drawn[:2] - drawn[2:]) < 1e-5
    assert largest(drawn[0] - drawn[1]) > 1e-2


def test_of_several_candidates_the_likeliest_is_kept(pipe: TextImagePipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a slow way: draw each candidate alone, ask the captioner about each, take the best."""
    options = {"num_inference_steps": 3, "sampler": "dpmpp"}
    generators = [g for _ in PROMPTS for g in seeded_generators(4, 1)]
    embeddings = pipe.encode_text(PROMPTS)
    drawn = [pipe.generate_image_from_text(embeddings, generators=generators, **options) for _ in range(5)]
    tokens, _ = encode_texts(pipe.tokenizer, PROMPTS, pipe.captioner.config.max_tokens)
    with torch.no_grad():
        maps = [pipe.image_codec.encode(images * 2 - 1) for images in drawn]
        surprise = torch.stack([pipe.captioner.losses(found, tokens.ids, tokens.mask) for found in maps])
    expected = [drawn[int(k)][row] for row, k in enumerate(surprise.argmin(dim=0))]
    assert surprise.argmin(dim=0).any(), "not always the first"
    kept = pipe.generate_from_text(PROMPTS, seed=4, candidates=5, **options).images
    assert largest(kept - torch.stack(expected)) < 1e-5
    assert largest(pipe.generate_from_text(PROMPTS, seed=4, candidates=1, **options).images - drawn[0]) < 1e-5
    alone = pipe.generate_from_text(PROMPTS[2], 1, seed=4, candidates=5, **options).images
    assert largest(alone[0] - kept[2]) < 1e-5
    monkeypatch.setattr(pipe, "defaults", pipe.defaults.model_copy(update={"candidates": 5}))
    assert largest(pipe.generate_from_text(PROMPTS, seed=4, **options).images - kept) < 1e-5


def test_without_texts_candidates_are_judged_by_what_embeddings_retell(pipe: TextImagePipeline) -> None:
    embeddings = torch.cat([pipe.encode_text(PROMPTS), torch.zeros(1, 12)])
    texts = [found[0] for found in pipe.generate_text_from_image(embeddings, temperature=0)]
    options = {"num_inference_steps": 3, "candidates": 3, "sampler": "ddim"}
    found = pipe.generate_image_from_text(embeddings, **options)
    told = pipe.generate_image_from_text(embeddings, texts=texts, **options)
    assert largest(found - told) < 1e-5
    first = pipe.generate_image_from_text(embeddings, **options | {"candidates": 1})
    with pytest.raises(ConfigError, match="1 texts for 4 embeddings"):
        pipe.generate_image_from_text(embeddings, texts=texts[:1], **options)
    assert largest(found[3] - first[3]) < 1e-5, "without a condition there is nothing to be true to"


def test_guidance_and_negative_prompts(pipe: TextImagePipeline) -> None:
    def draw(**options: Any) -> torch.Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", TextWarning)
            return pipe.generate_from_text(PROMPTS, num_inference_steps=3, sampler="ddim", **options).images

    plain = draw(guidance_scale=3.0)
    assert torch.equal(draw(guidance_scale=3.0, negative_prompts=""), plain)
    assert torch.equal(draw(guidance_scale=3.0, negative_prompts=["", " ", "\n"]), plain)
    steered = draw(guidance_scale=3.0, negative_prompts="a blue square")
    assert min(largest(a - b) for a, b in zip(steered, plain, strict=True)) > 1e-4
    each = draw(guidance_scale=3.0, negative_prompts=["a blue square", "", "a blue square"])
    assert largest(each[[0, 2]] - steered[[0, 2]]) < 1e-5
    assert largest(each[1] - plain[1]) < 1e-5
    # against itself there is nothing left to steer to
    own = draw(guidance_scale=3.0, negative_prompts=PROMPTS)
    assert largest(own - draw(guidance_scale=1.0)) < 1e-4
    assert torch.equal(draw(guidance_scale=1.0, negative_prompts="a blue square"), draw(guidance_scale=1.0))
    assert largest(draw(guidance_scale=1.0) - plain) > 1e-4


@pytest.mark.parametrize("empty", ["", "   ", "\n\t", "\u200b", "\x00"])
def test_an_empty_prompt_is_no_condition_and_says_so(empty: str, pipe: TextImagePipeline) -> None:
    with pytest.warns(TextWarning, match="an empty text means no condition"):
        drawn = pipe.generate_from_text([empty, PROMPTS[0]], num_inference_steps=3).images
    embeddings = torch.cat([torch.zeros(1, 12), pipe.encode_text(PROMPTS[:1])])
    generators = [g for _ in range(2) for g in seeded_generators(0, 1)]
    expected = pipe.generate_image_from_text(embeddings, 3, generators=generators)
    assert largest(drawn - expected) < 1e-5
    assert largest(drawn[0] - drawn[1]) > 1e-4
    with pytest.warns(TextWarning), pytest.raises(ConfigError, match="empty prompt cannot be decoded directly"):
        pipe.generate_from_text(empty, use_diffusion=False)


def test_notes_are_of_texts_alone_and_survive_an_error() -> None:
    def draw() -> None:
        for message, category in (("cut", TextWarning), ("of torch", UserWarning), ("cut", TextWarning)):
            warnings.warn(message, category, stacklevel=1)
        raise KeyError

    with pytest.warns(UserWarning, match="of torch") as passed_on, pytest.raises(KeyError), text_notes() as notes:
        draw()
    assert notes == ["cut"]
    assert len(passed_on) == 1


def test_files_are_read_some_at_a_time(pipe: TextImagePipeline, images: torch.Tensor, tmp_path: Path) -> None:
    paths = [save_image(image, tmp_path / str(k)) for k, image in enumerate(images[:5])]
    paths.insert(3, tmp_path / "missing.png")
    parts = list(read_usable(pipeline=pipe, paths=paths, at_once=2))
    assert [usable for usable, _, _ in parts] == [paths[:2], [paths[2]], paths[4:]]
    assert [len(problems) for _, _, problems in parts] == [0, 1, 0]
    assert torch.equal(torch.cat([read for _, read, _ in parts]), pipe.read([*paths[:3], *paths[4:]]))


def test_texts_that_are_not_used_as_they_stand_are_said(pipe: TextImagePipeline) -> None:
    for text, words in (("a red circle " * 40, "of which 20 are used"), ("a 🙈 circle", "not in the vocabulary")):
        with pytest.warns(TextWarning, match=words):
            pipe.generate_from_text(text, num_inference_steps=2)
    with pytest.warns(TextWarning) as caught:
        embeddings = pipe.encode_text(["a red circle " * 40, "a red circle"])
    assert len(caught) == 1
    assert largest(embeddings.norm(dim=1) - 1) < 1e-5
    assert largest(pipe.encode_text("a red circle") - embeddings[1:]) < 1e-5  # one text is no list of letters


def test_embeddings_of_texts_and_images_as_conditions(pipe: TextImagePipeline, images: torch.Tensor) -> None:
    of_texts, of_images = pipe.encode_text(PROMPTS), pipe.encode_image(images[:3])
    for embeddings in (of_texts, of_images):
        assert embeddings.shape == (3, 12)
        assert largest(embeddings.norm(dim=1) - 1) < 1e-5
        drawn = pipe.generate_image_from_text(embeddings, 3, 2.0, seed=4)
        assert drawn.shape == (3, 3, 16, 16)
        assert largest(pipe.generate_image_from_text(50 * embeddings, 3, 2.0, seed=4) - drawn) < 1e-4  # of any length
        direct = pipe.generate_image_from_text(embeddings, use_diffusion=False)
        assert largest(direct - drawn) > 1e-3
        assert 0 <= float(direct.min()) <= float(direct.max()) <= 1
    expected = pipe.generate_from_text(PROMPTS, use_diffusion=False).images
    assert torch.equal(pipe.generate_image_from_text(of_texts, use_diffusion=False), expected)


def test_pil_pictures_and_a_call(pipe: TextImagePipeline) -> None:
    drawn = pipe.generate_from_text(PROMPTS[0], output_type="pil").images
    assert [(picture.mode, picture.size) for picture in drawn] == [("RGB", (16, 16))]
    assert torch.equal(pipe(PROMPTS, seed=1).images, pipe.generate_from_text(PROMPTS, seed=1).images)


WRONG_DRAWING: dict[str, tuple[dict[str, Any], str]] = {
    "no prompts": ({"prompts": []}, "0 prompts"),
    "no samples": ({"num_samples_per_prompt": 0}, "0 samples each"),
    "no batch": ({"batch_size": 0}, "0 at once"),
    "another output": ({"output_type": "jpeg"}, "'jpeg'; known: pt, np, pil"),
    "an unknown sampler": ({"sampler": "ddimm"}, "did you mean 'ddim'"),
    "no candidates": ({"candidates": 0}, "candidates: expected at least 1, found 0"),
    "candidates, directly": ({"candidates": 2, "use_diffusion": False}, "candidates are drawn by the diffusion"),
    "no steps": ({"num_inference_steps": 0}, "num_inference_steps|steps"),
    "too many steps": ({"num_inference_steps": 2000}, "1000"),
    "negative guidance": ({"guidance_scale": -1.0}, "guidance_scale -1.0: expected 0 or more"),
    "negative prompts, directly": (
        {"negative_prompts": "a", "use_diffusion": False},
        "negative prompts steer the diffusion; leave them out",
    ),
    "too few negative prompts": ({"negative_prompts": ["a", "b"]}, "2 negative prompts for 3 prompts"),
}


@pytest.mark.parametrize("case", WRONG_DRAWING)
def test_drawing_that_cannot_be_done_is_one_clear_error(case: str, pipe: TextImagePipeline) -> None:
    options, message = WRONG_DRAWING[case]
    with pytest.raises(ConfigError, match=message):
        pipe.generate_from_text(**{"prompts": PROMPTS, **options})


@pytest.mark.parametrize("shape", [(2, 13), (12,), (1, 2, 12), (0, 12)])
def test_embeddings_of_another_shape_are_refused(shape: tuple[int, ...], pipe: TextImagePipeline) -> None:
    message = rf"embeddings: expected shape \(B, 12\), found {re.escape(str(tuple(shape)))}"
    with pytest.raises(ConfigError, match=message):
        pipe.generate_image_from_text(torch.ones(shape))
    with pytest.raises(ConfigError, match=message):
        pipe.generate_image_from_text(torch.ones(2, 12), negative_embeddings=torch.ones(shape))
    with pytest.raises(ConfigError, match=message if len(shape) == 2 else "expected"):
        pipe.generate_text_from_image(torch.ones(shape))


def test_as_many_negative_embeddings_and_generators_as_embeddings(pipe: TextImagePipeline) -> None:
    for options in ({"negative_embeddings": torch.ones(3, 12)}, {"generators": seeded_generators(0, 1)}):
        with pytest.raises(ConfigError, match="expected as many of each"):
            pipe.generate_image_from_text(torch.ones(2, 12), **options)


# ---- image to text --------------------------------------------------------------------------------------------------


def test_the_same_seed_writes_the_same_captions(pipe: TextImagePipeline, images: torch.Tensor) -> None:
    def write(seed: int, **options: Any) -> list[list[str]]:
        return pipe.generate_text_from_image(images, 3, seed=seed, **options)

    first = write(1)
    assert [len(texts) for texts in first] == [3] * 6
    assert all(isinstance(text, str) for texts in first for text in texts)
    torch.manual_seed(99)
    assert write(1) == first
    assert write(2) != first
    assert write(1, use_cache=False) == first
    assert all(len(set(texts)) > 1 for texts in first)
    greedy = [[texts[0]] * 3 for texts in write(1, temperature=0.0)]
    assert write(2, temperature=0.0) == greedy


def test_captions_of_a_batch_equal_those_one_by_one(pipe: TextImagePipeline, images: torch.Tensor) -> None:
    options = {"seed": 7, "repetition_penalty": 1.3}
    together = pipe.generate_text_from_image(images, 3, **options)
    assert [pipe.generate_text_from_image(image[None], 3, **options)[0] for image in images] == together
    assert pipe.generate_text_from_image(images, 3, batch_size=4, **options) == together
    assert [texts[:1] for texts in together] == pipe.generate_text_from_image(images, 1, **options)


def test_captions_hold_no_special_tokens(pipe: TextImagePipeline, images: torch.Tensor) -> None:
    for texts in pipe.generate_text_from_image(images, 4, temperature=3.0, top_k=0, top_p=1.0):
        for text in texts:
            assert re.search(r"\[(PAD|UNK|CLS|SEP|MASK)\]", text) is None
            assert text == text.strip()


def test_captions_of_embeddings(pipe: TextImagePipeline, images: torch.Tensor) -> None:
    embeddings = pipe.encode_image(images)
    captions = pipe.generate_text_from_image(embeddings, 2, seed=2)
    assert [len(texts) for texts in captions] == [2] * 6
    assert pipe.generate_text_from_image(5 * embeddings, 2, seed=2) == captions
    assert [len(texts) for texts in pipe.generate_text_from_image(pipe.encode_text(PROMPTS), 2)] == [2] * 3


def test_image_files_of_any_size_and_kind(pipe: TextImagePipeline, images: torch.Tensor, tmp_path: Path) -> None:
    values = (images[0].permute(1, 2, 0) * 255).round().byte().numpy()
    large = Image.fromarray(values).resize((64, 64), Image.Resampling.NEAREST)
    large.save(tmp_path / "large.png")
    wide = Image.new("RGB", (96, 64), "red")
    wide.paste(large, (16, 0))
    wide.save(tmp_path / "wide.png")
    for mode in ("RGBA", "P", "L"):
        large.convert(mode).save(tmp_path / f"{mode}.png")
    names = ["large", "wide", "RGBA", "P", "L"]
    paths = [tmp_path / f"{name}.png" for name in names]
    read = pipe.read(paths)
    assert read.shape == (5, 3, 16, 16)
    assert float((read[0] - images[0]).abs().mean()) < 0.05
    assert float((read[1] - read[0])[:, :, 2:-2].abs().max()) < 0.01  # the centre, whose edges saw red beside them
    assert torch.equal(read[2], read[0])
    grey = read[4].double()
    assert largest(grey - grey.mean(dim=0)) < 1e-6
    captions = pipe.generate_from_image(paths, 2, seed=1, temperature=0.7, top_k=20, top_p=0.8)
    assert captions == pipe.generate_text_from_image(read, 2, seed=1, temperature=0.7, top_k=20, top_p=0.8)
    assert pipe.generate_from_image(str(paths[0]), 2, seed=1, temperature=0.7, top_k=20, top_p=0.8) == captions[:1]


BAD_FILES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (lambda path: None, "no such image file"),
    "a folder": (lambda path: path.mkdir(), "not a regular file"),
    "empty": (lambda path: path.write_bytes(b""), "empty file"),
    "text": (lambda path: path.write_text("hello"), "not a readable PNG"),
    "16 bit grey": (
        lambda path: Image.fromarray(np.arange(256, dtype=np.uint16).reshape(16, 16) * 200).save(path),
        "1 channels of uint16; the run was trained on 3 of uint8",
    ),
    "a photograph to print": (lambda path: Image.new("CMYK", (16, 16)).save(path, format="JPEG"), "JPEG"),
}


@pytest.mark.parametrize("what", BAD_FILES)
def test_image_files_that_cannot_be_used(what: str, pipe: TextImagePipeline, tmp_path: Path) -> None:
    make, message = BAD_FILES[what]
    path = tmp_path / "picture.png"
    make(path)
    with pytest.raises(DataError, match=message) as error:
        pipe.generate_from_image([path])
    assert str(error.value).startswith(f"{path}: ")


WRONG_CAPTIONS: dict[str, tuple[torch.Tensor, dict[str, Any], str]] = {
    "another size": (torch.rand(2, 3, 16, 32), {}, "images of 3x16x32: the image codec takes 3x16x16"),
    "grey": (torch.rand(2, 1, 16, 16), {}, "the image codec takes 3x16x16"),
    "one picture": (torch.rand(3, 16, 16), {}, r"images: expected \(B, C, H, W\)"),
    "bytes": (torch.zeros(2, 3, 16, 16, dtype=torch.uint8), {}, r"in \[0, 1\], found torch.uint8"),
    "no captions": (torch.rand(2, 3, 16, 16), {"num_captions_per_image": 0}, "num_captions: expected at least 1"),
    "no batch": (torch.rand(2, 3, 16, 16), {"batch_size": 0}, "batch_size: expected at least 1"),
    "cold": (torch.rand(2, 3, 16, 16), {"temperature": -1.0}, "temperature: expected at least 0"),
    "hot": (torch.rand(2, 3, 16, 16), {"temperature": math.inf}, "temperature"),
    "top_p": (torch.rand(2, 3, 16, 16), {"top_p": 0.0}, "top_p: expected above 0"),
    "top_k": (torch.rand(2, 3, 16, 16), {"top_k": -1}, "top_k: expected at least 0"),
    "penalty": (torch.rand(2, 3, 16, 16), {"repetition_penalty": 0.0}, "repetition_penalty: expected above 0"),
    "seed": (torch.rand(2, 3, 16, 16), {"seed": -1}, "seed: expected 0"),
}


@pytest.mark.parametrize("case", WRONG_CAPTIONS)
def test_captions_that_cannot_be_written_are_one_clear_error(case: str, pipe: TextImagePipeline) -> None:
    given, options, message = WRONG_CAPTIONS[case]
    with pytest.raises(ConfigError, match=message):
        pipe.generate_text_from_image(given, **options)


def test_no_files_is_an_error(pipe: TextImagePipeline) -> None:
    with pytest.raises(ConfigError, match="no image files"):
        pipe.generate_from_image([])


# ---- a run without a denoiser, and folders that cannot be used -------------------------------------------------------


def test_an_alignment_decodes_directly_and_says_why_it_does_not_draw(
    shapes_run: Path, pipe: TextImagePipeline, images: torch.Tensor
) -> None:
    alignment = hd.load(shapes_run / "alignment")
    assert alignment.unet is None
    assert not (set(PARTS) - {"unet", "scheduler"}) - {path.name for path in (shapes_run / "alignment").iterdir()}
    with pytest.raises(RunError, match=r"no denoiser.*train one with recipe text-image, or decode directly"):
        alignment.generate_from_text(PROMPTS)
    direct = alignment.generate_from_text(PROMPTS, use_diffusion=False).images
    assert direct.shape == (3, 3, 16, 16)
    assert alignment.generate_text_from_image(images, seed=3) == pipe.generate_text_from_image(images, seed=3)


@pytest.fixture
def copy(shapes_run: Path, tmp_path: Path) -> Path:
    ignore = shutil.ignore_patterns("checkpoints", "alignment", "latents")
    forget_files(shutil.copytree(shapes_run, tmp_path / "copy", ignore=ignore))
    return tmp_path / "copy"


def another_tokenizer(folder: Path) -> None:
    train_tokenizer(["other words, learned from other captions"], 130).save_pretrained(folder)


def shuffled_tokenizer(folder: Path) -> None:
    """As many tokens, with other numbers."""
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    first, second = [token for token in vocabulary if token.isalpha()][:2]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    file.write_text(json.dumps(content))


BROKEN: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "tokenizer of another run": ("tokenizer", another_tokenizer, "tokenizer of another run"),
    "tokenizer with tokens swapped": ("tokenizer", shuffled_tokenizer, "tokenizer of another run"),
    "damaged tokenizer": ("tokenizer", lambda f: (f / "tokenizer.json").write_text("{"), "no tokenizer that can be"),
    "no file of the tokenizer": ("tokenizer", lambda f: (f / "tokenizer.json").unlink(), "no tokenizer|tokenizer.json"),
    **{f"no {name}": (name, shutil.rmtree, f"{name}.*missing") for name in PARTS if name not in ("unet",)},
    **{f"cut {name}": (name, cut_weights, "damaged") for name in ("captioner", "text_encoder", "unet")},
    **{
        f"no weights of the {name}": (
            name,
            lambda f: (f / "diffusion_pytorch_model.safetensors").unlink(),
            "safetensors only",
        )
        for name in ("captioner", "text_encoder", "unet", "image_codec")
    },
    **{
        f"no config of the {name}": (name, lambda f: (f / "config.json").unlink(), "config.json: missing")
        for name in ("captioner", "text_encoder", "unet", "image_codec")
    },
    "NaN in the captioner": (
        "captioner",
        change_weights(lambda tensors: tensors["image_norm.bias"].fill_(math.nan)),
        "NaN",
    ),
    "captioner of other maps": ("captioner", change_config(latent_channels=7), "damaged|another network"),
    "another class of captioner": ("captioner", change_config(_class_name="TextEncoder"), "class Captioner, found"),
    "another class of denoiser": (
        "unet",
        change_config(_class_name="UNet2DModel"),
        "expected a network of class FiLMUNet or HAEUNet",
    ),
    "damaged schedule": ("scheduler", lambda f: (f / "scheduler_config.json").write_text("{"), "not readable as JSON"),
}


@pytest.mark.parametrize("what", BROKEN)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_broken_folder_is_one_clear_error(what: str, copy: Path) -> None:
    name, damage, message = BROKEN[what]
    damage(copy / name)
    with pytest.raises(CheckpointError, match=message) as error:
        hd.load(copy)
    assert "\n" not in str(error.value)
    assert str(copy) in str(error.value) or "tokenizer of another run" in str(error.value)


OTHER_SIZES: dict[str, tuple[dict[str, Any], str, str]] = {
    "image codec of other embeddings": ({"text__embedding_dim": 10}, "image_codec", "embeddings.*10 and 12"),
    "captioner of other maps": ({"alignment__latent_channels": 7}, "captioner", r"map of .*6 and 7"),
    "captioner of other sizes": ({"alignment__block_out_channels": [16]}, "captioner", r"\(4, 4\) and \(8, 8\)"),
    "captioner of other words": ({"text__vocabulary_size": 110}, "captioner", "vocabulary.*120 and 110"),
    "denoiser of other maps": (
        {"alignment__latent_channels": 7},
        "unet",
        "takes 14 channels and embeddings of 12, but",
    ),
    "denoiser of other embeddings": ({"text__embedding_dim": 10}, "unet", "embeddings of 10"),
}


@pytest.mark.parametrize("what", OTHER_SIZES)
def test_parts_of_different_runs_are_not_put_together(what: str, copy: Path, tmp_path: Path) -> None:
    overrides, name, message = OTHER_SIZES[what]
    joint = {"alignment__joint": True} if name == "unet" else {"recipe": "alignment"}
    train(text_config(tmp_path / "other", **joint, training__steps=1, **overrides), quiet=True)
    shutil.rmtree(copy / name)
    shutil.copytree(tmp_path / "other" / name, copy / name)
    with pytest.raises(CheckpointError, match=rf"of different runs.*{message}|{message}.*of different runs"):
        hd.load(copy)


def test_folders_that_hold_no_run(tmp_path: Path, shapes_run: Path) -> None:
    with pytest.raises(RunError, match="no such run folder"):
        hd.load(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="no finished run of recipe alignment"):
        load_aligned_networks(tmp_path)
    (tmp_path / "image_codec").mkdir()
    with pytest.raises(CheckpointError, match="incomplete, text_encoder, tokenizer, captioner missing"):
        load_aligned_networks(tmp_path)
    assert load_aligned_networks(shapes_run).captioner.config.vocabulary_size > 100
