"""Text to image and back on the command line: what it prints, what it writes, how it fails."""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import heterodiff as hd
from heterodiff.config.file import dump_config, load_config
from heterodiff.text.tokenizer import encode_texts
from heterodiff.training.start import train
from tests.test_cli import call
from tests.text_runs import text_config
from tests.training_runs import tiny_config

STEPS = ("--steps", "2")


@pytest.fixture(scope="module")
def class_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("runs") / "classes"
    train(tiny_config(folder, training__steps=1), quiet=True)
    return folder


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    """Three pictures of different size and kind."""
    kinds = {"one.png": ("RGB", (16, 16)), "two.jpg": ("L", (30, 40)), "drei Kreise.bmp": ("RGB", (64, 20))}
    for k, (name, (mode, size)) in enumerate(kinds.items()):
        values = np.random.default_rng(k).integers(0, 256, (*size, 3), np.uint8)
        Image.fromarray(values).convert(mode).save(tmp_path / name)
    return [tmp_path / name for name in kinds]


def prompts_of(folder: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / "prompts.jsonl").read_text("utf-8").splitlines()]


# ---- text2image -----------------------------------------------------------------------------------------------------


def test_pictures_of_each_prompt_with_a_grid_and_a_list(
    shapes_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out, prompts = tmp_path / "out", ["a red circle", "a blue square in the centre"]
    assert call("text2image", shapes_run, *prompts, "-n", "3", *STEPS, "--out", out) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert captured.out.startswith("drawn    6 images in ")
    assert f"images   6 in {out}\ngrid     {out / 'grid.png'}\n" in captured.out
    names = [f"{k:04d}_{name}.png" for k, name in enumerate(["a_red_circle"] * 3 + ["a_blue_square_in_the_centre"] * 3)]
    assert sorted(path.name for path in out.iterdir()) == sorted([*names, "grid.png", "prompts.jsonl", "settings.json"])
    assert [row["file_name"] for row in prompts_of(out)] == names
    assert [row["text"] for row in prompts_of(out)] == [prompt for prompt in prompts for _ in range(3)]
    expected = hd.load(shapes_run).generate_from_text(prompts, 3, num_inference_steps=2).images
    for name, image in zip(names, expected, strict=True):
        with Image.open(out / name) as picture:
            assert (picture.mode, picture.size) == ("RGB", (16, 16))
            found = torch.from_numpy(np.asarray(picture, dtype=np.float32) / 255).permute(2, 0, 1)
        assert float((found - image).abs().max()) < 1 / 255
    with Image.open(out / "grid.png") as grid:
        assert grid.width > 3 * 64
        assert grid.height > 2 * 64


def test_the_same_command_writes_the_same_files(shapes_run: Path, tmp_path: Path) -> None:
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        arguments = ["a red circle", "-n", "2", "--seed", seed, "--guidance", "3", "--sampler", "ddim", *STEPS]
        assert call("text2image", shapes_run, *arguments, "--out", tmp_path / name) == 0
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert all((tmp_path / "a" / n).read_bytes() == (tmp_path / "b" / n).read_bytes() for n in names)
    assert (tmp_path / "a" / "grid.png").read_bytes() != (tmp_path / "c" / "grid.png").read_bytes()


def test_direct_decoding_gives_one_picture_of_a_prompt(shapes_run: Path, tmp_path: Path) -> None:
    """Of a run without a denoiser, too; as often as wished it would be the same."""
    for name, run in (("a", shapes_run), ("b", shapes_run / "alignment")):
        assert call("text2image", run, "a red circle", "a cross", "-n", "4", "--direct", "--out", tmp_path / name) == 0
        assert len(prompts_of(tmp_path / name)) == 2
        with Image.open(tmp_path / name / "0001_a_cross.png") as picture:
            assert picture.size == (16, 16)


def test_a_negative_prompt_changes_the_picture(shapes_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    options = {"plain": [], "negative": ["--negative", "a blue square"], "empty": ["--negative", ""]}
    for name, more in options.items():
        arguments = ["a red circle", "-n", "1", "--guidance", "5", *STEPS, *more]
        assert call("text2image", shapes_run, *arguments, "--out", tmp_path / name) == 0
    plain, negative, empty = ((tmp_path / name / "0000_a_red_circle.png").read_bytes() for name in options)
    assert plain == empty != negative
    capsys.readouterr()
    out = tmp_path / "out"
    for more in (
        ["--negative", "a blue square"],
        ["--steps", "9"],
        ["--guidance", "2"],
        ["--sampler", "ddim"],
        ["--candidates", "2"],
    ):
        assert call("text2image", shapes_run, "a cross", "--direct", *more, "--out", out) == 1
        assert capsys.readouterr().err.startswith("error: --direct is one pass, without --negative")
    assert not out.exists()


UNICODE = "ein großer roter Kreis — 红色的圆 🔴"


def test_a_prompt_in_any_script(shapes_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert call("text2image", shapes_run, UNICODE, "-n", "1", *STEPS, "--out", tmp_path / "out") == 0
    error = capsys.readouterr().err
    assert error.startswith(f"note     text '{UNICODE[:20]}")
    assert "not in the vocabulary, read as [UNK]" in error
    (row,) = prompts_of(tmp_path / "out")
    assert row["text"] == UNICODE
    assert (tmp_path / "out" / row["file_name"]).is_file()


@pytest.mark.parametrize("what", ["words", "one word", "characters of four bytes", "a path", "bytes of no encoding"])
def test_prompts_that_are_no_good_file_names(
    what: str, shapes_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []

    def encode(tokenizer: Any, texts: Sequence[str], max_tokens: int) -> Any:
        read.extend(texts)
        return encode_texts(tokenizer, texts, max_tokens)

    monkeypatch.setattr("heterodiff.pipelines.embeddings.encode_texts", encode)
    prompt = {
        "words": "a red circle " * 8000,
        "one word": "x" * 100_000,
        "characters of four bytes": "𠀀" * 300,
        "a path": "../../a\nred/circle\\ *?",
        "bytes of no encoding": "a red circle \udcff\udcfe",
    }[what]
    assert call("text2image", shapes_run, prompt, "a cross", "-n", "2", *STEPS, "--out", tmp_path / "out") == 0
    assert sum(text != "a cross" for text in read) == 1  # a long one costs time: once, not for each image or step
    error = capsys.readouterr().err
    if what in ("words", "one word"):
        assert "note     text '" in error
    assert all(line.startswith("note     ") and len(line) < 400 for line in error.splitlines())
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.parent for path in written} == {tmp_path / "out"}
    assert len(written) == 7  # four pictures, the grid, the prompts, the settings
    rows = prompts_of(tmp_path / "out")
    assert len(rows) == 4
    if what != "bytes of no encoding":
        assert rows[0]["text"] == prompt
    assert all((tmp_path / "out" / row["file_name"]).is_file() for row in rows)


def test_an_empty_prompt_is_said_to_be_no_condition(
    shapes_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert call("text2image", shapes_run, "", "-n", "2", *STEPS, "--out", tmp_path / "out") == 0
    error = capsys.readouterr().err
    assert error == "note     an empty text means no condition\n"
    assert [row["file_name"] for row in prompts_of(tmp_path / "out")] == [
        "0000_no_condition.png",
        "0001_no_condition.png",
    ]


# ---- caption --------------------------------------------------------------------------------------------------------


def test_a_line_for_each_caption(shapes_run: Path, pictures: list[Path], capsys: pytest.CaptureFixture) -> None:
    assert call("caption", shapes_run, *pictures) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    greedy = [texts[0] for texts in hd.load(shapes_run).generate_from_image(pictures, temperature=0.0)]
    assert captured.out.splitlines() == [f"{path}: {text}" for path, text in zip(pictures, greedy, strict=True)]
    assert call("caption", shapes_run, *pictures, "-n", "3", "--seed", "4", "--top-k", "9", "--json") == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    found = hd.load(shapes_run).generate_from_image(pictures, 3, seed=4, top_k=9)
    assert [row["file_name"] for row in rows] == [str(path) for path in pictures for _ in range(3)]
    assert [row["text"] for row in rows] == [text for texts in found for text in texts]


def test_files_that_cannot_be_used_are_named_and_the_others_done(
    shapes_run: Path, pictures: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    Image.fromarray(np.zeros((16, 16), np.uint16)).save(tmp_path / "deep.png")
    bad = [tmp_path / "missing.png", tmp_path / "broken.png", tmp_path / "deep.png", tmp_path]
    given = [pictures[0], *bad, pictures[1]]
    assert call("caption", shapes_run, *given, "--json") == 1
    captured = capsys.readouterr()
    assert [json.loads(line)["file_name"] for line in captured.out.splitlines()] == [str(p) for p in pictures[:2]]
    errors = captured.err.splitlines()
    assert len(errors) == 4
    for path, line in zip(bad, errors, strict=True):
        assert line.startswith(f"error: {path}: ")
    assert call("caption", shapes_run, *bad) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 4


def test_names_of_files_that_no_terminal_shows(
    shapes_run: Path, pictures: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Undecodable bytes and a newline in names."""
    odd = [tmp_path / os.fsdecode(name) for name in (b"caf\xe9.png", b"two\nlines.png", b"miss\xffing.png")]
    for path in odd[:2]:
        os.link(pictures[0], path)
    assert call("caption", shapes_run, *odd, pictures[0]) == 1
    captured = capsys.readouterr()
    first, second, third = captured.out.splitlines()  # a line each
    assert r"caf\udce9.png" in first
    assert r"two\nlines.png" in second
    assert third.startswith(f"{pictures[0]}: ")
    assert captured.err.startswith("error: ")
    assert captured.err.endswith(r"miss\udcffing.png': no such image file" + "\n")
    assert call("caption", shapes_run, *odd[:2], "--json") == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["file_name"] for row in rows] == [str(path) for path in odd[:2]]


# ---- wrong use ------------------------------------------------------------------------------------------------------

WRONG_USE: dict[str, tuple[list[str], str]] = {
    "text2image of no run": (["text2image", "missing", "a"], "no such run folder"),
    "caption with no run": (["caption", "missing", "a.png"], "no such run folder"),
    "a run of classes": (["text2image", "CLASSES", "a"], "knows no texts; train a run of recipe text-image"),
    "captions of a run of classes": (["caption", "CLASSES", "a.png"], "knows no texts"),
    "classes of a run of texts": (["sample", "TEXTS"], "draws images of texts, not of classes; use `heterodiff text2i"),
    "no prompt": (["text2image", "TEXTS"], "PROMPT"),
    "no image": (["caption", "TEXTS"], "IMAGE"),
    "no pictures": (["text2image", "TEXTS", "a", "-n", "0"], "-n"),
    "no steps": (["text2image", "TEXTS", "a", "--steps", "0"], "--steps"),
    "too many steps": (["text2image", "TEXTS", "a", "--steps", "5000"], "1000"),
    "an unknown sampler": (["text2image", "TEXTS", "a", "--sampler", "ddimm"], "did you mean 'ddim'"),
    "negative guidance": (["text2image", "TEXTS", "a", "--guidance", "-2"], "--guidance"),
    "an empty prompt, directly": (["text2image", "TEXTS", "", "--direct"], "cannot be decoded directly"),
    "no denoiser": (["text2image", "ALIGNMENT", "a"], "no denoiser (recipe alignment); train one with recipe text-im"),
    "cold": (["caption", "TEXTS", "PICTURE", "--temperature", "-1"], "temperature: expected at least 0"),
    "no probability": (["caption", "TEXTS", "PICTURE", "-n", "2", "--top-p", "0"], "top_p: expected above 0"),
    "no token": (["caption", "TEXTS", "PICTURE", "-n", "2", "--top-k", "-5"], "top_k: expected at least 0"),
    "no captions": (["caption", "TEXTS", "PICTURE", "-n", "0"], "-n"),
    "a seed below 0": (["caption", "TEXTS", "PICTURE", "--seed", "-1"], "seed: expected 0"),
    "a misspelt option": (["text2image", "TEXTS", "a", "--guidence", "2"], "--guidence"),
    "an output in a file": (["text2image", "TEXTS", "a", "--steps", "1", "--out", "PICTURE"], "choose another --out"),
}


@pytest.mark.parametrize("case", WRONG_USE)
def test_wrong_use_is_one_clear_message(
    case: str, shapes_run: Path, class_run: Path, pictures: list[Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    arguments, expected = WRONG_USE[case]
    named = {"TEXTS": shapes_run, "ALIGNMENT": shapes_run / "alignment", "CLASSES": class_run, "PICTURE": pictures[0]}
    before = sorted(path.name for path in tmp_path.iterdir())
    assert call(*[named.get(argument, argument) for argument in arguments]) == 1
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if not line.startswith("note")]
    assert lines[0].startswith("error: ")
    assert expected in captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == before


# ---- check and train ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("joint", [False, True])
def test_check_and_dry_run_of_a_configuration(joint: bool, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(dump_config(text_config(tmp_path / "run", alignment__joint=joint)))
    assert call("check", config) == 0
    out = capsys.readouterr().out
    assert "FAIL" not in out
    names = [line[6:16].strip() for line in out.splitlines() if line.startswith("pass")]
    denoiser = [] if joint else ["memory", "network", "loss", "encoding", "step"]
    assert names[4:] == ["memory", "network", "loss", "step", *denoiser, "total"]
    assert "image codec to 6x4x4, text encoder, captioner" in out
    assert ("holds no finished codec; it is trained first" in out) == (not joint)
    assert ("film-unet on 6x4x4 latents" in out) == (not joint)
    assert ("film-unet, jointly" in out) == joint
    losses = [line for line in out.splitlines() if "loss" in line or "network" in line]
    assert call("train", config, "--dry-run") == 0
    out = capsys.readouterr().out
    tried = [f"pass  {line[:8]}   {line[9:]}" for line in out.splitlines() if line.startswith(("loss", "network"))]
    assert tried == losses
    assert out.endswith("nothing was written\n")
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_check_of_a_configuration_whose_networks_are_there(
    shapes_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """A codec of 60 steps reconstructs badly, which is said; all else passes."""
    config = load_config(shapes_run / "config.yaml").model_copy(update={"output": tmp_path / "run"})
    (tmp_path / "config.yaml").write_text(dump_config(config))
    call("check", tmp_path / "config.yaml")
    out = capsys.readouterr().out
    found = {line[6:16].strip(): line[:4] for line in out.splitlines() if line.startswith(("pass", "FAIL"))}
    assert {"codec", "round trip", "loader", "forward", "loss", "sample", "encoding", "step", "total"} <= found.keys()
    assert {name for name, result in found.items() if result == "FAIL"} <= {"round trip"}
    assert "3x16x16 to 6x4x4, fingerprint" in out


@pytest.mark.parametrize("part", ["", "alignment"])
def test_check_of_a_run_draws_a_picture_and_writes_a_caption(
    part: str, shapes_run: Path, capsys: pytest.CaptureFixture
) -> None:
    assert call("check", shapes_run / part) == 0
    out = capsys.readouterr().out
    assert "FAIL" not in out
    names = [line[6:16].strip() for line in out.splitlines()]
    assert names == ["config", "checkpoint", "caption", "sample"]
    assert f"one picture of a text (3, 16, 16), {'decoded directly' if part else '2 steps'}" in out
    assert "one caption of a picture of noise: '" in out


def test_check_of_a_damaged_run_says_what_is_wrong(
    shapes_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    shutil.copytree(shapes_run / "alignment", tmp_path / "run")
    (tmp_path / "run" / "captioner" / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    assert call("check", tmp_path / "run") == 1
    out = capsys.readouterr().out
    assert [line[6:16].strip() for line in out.splitlines() if line.startswith("FAIL")] == ["sample"]
    assert "captioner/diffusion_pytorch_model.safetensors: damaged: not the file that was written" in out


def test_training_says_what_to_do_next(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    config, run = tmp_path / "config.yaml", tmp_path / "run"
    config.write_text(dump_config(text_config(run, training__steps=1)))
    assert call("train", config) == 0
    captured = capsys.readouterr()
    assert "279 captions" in captured.out
    assert f'next     heterodiff text2image {run} "a prompt"\n' in captured.out
    assert f"         heterodiff caption {run} PICTURE.png\n" in captured.out
    assert (run / "report.html").is_file()
    assert "Traceback" not in captured.err
    assert call("train", config) == 0  # it is finished
    assert "done     step 1 of 1" in capsys.readouterr().out
    assert call("train", config, "alignment.latent_noise=0.5") == 1
    assert "alignment.latent_noise: 0.1 -> 0.5" in capsys.readouterr().err
