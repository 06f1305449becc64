"""Pipelines as users of diffusers know them: forms of output, callbacks, progress, precision, devices, settings."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import heterodiff as hd
from heterodiff.cli import main
from heterodiff.config import SamplingConfig
from heterodiff.devices import find_dtype
from heterodiff.errors import ConfigError
from heterodiff.pipelines.generate import GenerationPipeline, seeded_generators
from heterodiff.training.start import train
from tests.training_runs import tiny_config

OPTIONS = {"training__steps": 3, "diffusion__prediction": "v", "sampling__guidance_scale": 1.25}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    train(tiny_config(folder, **OPTIONS), quiet=True)
    return folder


@pytest.fixture
def pipe(run: Path) -> GenerationPipeline:
    pipeline = hd.load(run, "cpu")
    assert isinstance(pipeline, GenerationPipeline)
    return pipeline


def draw(pipe: GenerationPipeline, **options: Any) -> Any:
    return pipe([3, 5], generator=seeded_generators(0, 2), **options).images


def call(*arguments: str | Path) -> int:
    """Exit code of ``heterodiff arguments``."""
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    assert isinstance(stop.value.code, int)
    return stop.value.code


# ---- output, callbacks, progress ----------------------------------------------------------------------------------


def test_images_come_as_tensor_array_and_pictures(pipe: GenerationPipeline) -> None:
    tensor, array, pictures = (draw(pipe, output_type=kind) for kind in ("pt", "np", "pil"))
    assert (tensor.shape, array.shape) == ((2, 1, 8, 8), (2, 8, 8, 1))
    np.testing.assert_array_equal(array.transpose(0, 3, 1, 2), tensor.numpy())
    assert all(isinstance(picture, Image.Image) for picture in pictures)
    np.testing.assert_allclose(np.asarray(pictures[1]) / 255, array[1, :, :, 0], atol=0.5 / 255 + 1e-6)
    (found,) = pipe([3, 5], generator=seeded_generators(0, 2), return_dict=False)
    assert torch.equal(found, tensor)


@pytest.mark.parametrize("sampler", ["dpmpp", None])
def test_a_callback_sees_and_changes_every_step(sampler: str | None, pipe: GenerationPipeline) -> None:
    if sampler is None:
        from diffusers import DDIMScheduler

        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    seen = []

    def note(pipeline: Any, step: int, t: Any, tensors: dict) -> dict:
        assert pipeline is pipe
        seen.append((step, int(t), tensors["latents"].clone()))
        return {}

    plain = draw(pipe, sampler=sampler, num_inference_steps=3, callback_on_step_end=note)
    assert [step for step, _, _ in seen] == [0, 1, 2]
    assert seen[0][1] > seen[1][1] > seen[2][1] >= 0
    torch.testing.assert_close(plain, ((seen[-1][2] + 1) / 2).clamp(0, 1))
    zeros = draw(
        pipe,
        sampler=sampler,
        num_inference_steps=3,
        callback_on_step_end=lambda _pipe, step, _t, given: {"latents": 0 * given["latents"]} if step == 2 else None,
        callback_on_step_end_tensor_inputs=["latents"],
    )
    assert torch.equal(zeros, torch.full_like(zeros, 0.5))
    with pytest.raises(ConfigError, match="prompt_embeds"):
        draw(pipe, callback_on_step_end=note, callback_on_step_end_tensor_inputs=["prompt_embeds"])


def test_a_callback_may_stop(pipe: GenerationPipeline) -> None:
    steps = []

    def stop(pipeline: Any, step: int, t: Any, tensors: dict) -> None:
        steps.append(step)
        pipeline.interrupt = step == 1

    images = pipe([1, 2, 3], num_inference_steps=4, batch_size=2, callback_on_step_end=stop).images
    assert (steps, len(images)) == ([0, 1], 2)
    assert len(pipe([1, 2, 3], num_inference_steps=2, batch_size=2).images) == 3  # the next call starts afresh


def test_progress_is_shown_where_it_is_wanted(pipe: GenerationPipeline, capsys: pytest.CaptureFixture) -> None:
    draw(pipe, num_inference_steps=3)
    assert capsys.readouterr().err == ""
    pipe.set_progress_bar_config(disable=False, desc="drawing")
    draw(pipe, num_inference_steps=3)
    shown = capsys.readouterr().err
    assert "drawing" in shown
    assert "3/3" in shown


# ---- precision and devices ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float16])
def test_the_network_computes_in_the_precision_asked_for(dtype: Any, run: Path, pipe: GenerationPipeline) -> None:
    low = hd.load(run, "cpu", dtype=dtype)
    assert low.unet.dtype == find_dtype(dtype, torch.device("cpu")) != torch.float32
    expected, found = draw(pipe, num_inference_steps=4), draw(low, num_inference_steps=4)
    assert found.dtype == torch.float32
    assert 0 < float((found - expected).abs().max()) < 0.02
    assert pipe.unet.dtype == torch.float32  # the default on a CPU


def test_latents_are_decoded_in_float32_whatever_the_denoiser(digits_vae: Path, tmp_path: Path) -> None:
    from diffusers import DDPMScheduler

    from heterodiff.codecs.kl_vae import load_vae

    vae = load_vae(digits_vae)
    network = hd.create_model(
        "unet",
        sample_size=4,
        in_channels=vae.config.latent_channels,
        model_channels=32,
        channel_mult=(1,),
        attention_resolutions=(),
    )
    GenerationPipeline(network, DDPMScheduler(), vae).save_pretrained(tmp_path)
    low = hd.load(tmp_path, "cpu", dtype="bfloat16")
    assert (low.unet.dtype, low.vae.dtype) == (torch.bfloat16, torch.float32)
    assert torch.isfinite(low(num_images=1, num_inference_steps=2).images).all()
    with pytest.raises(ConfigError, match="a VAE computes in float32"):
        hd.load(digits_vae, dtype="bfloat16")


def test_bfloat16_is_the_default_where_it_is_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("heterodiff.devices.has_bfloat16", lambda device: True)
    assert find_dtype(None, torch.device("cuda")) == torch.bfloat16
    assert find_dtype("float32", torch.device("cuda")) == torch.float32
    assert find_dtype(None, torch.device("cpu")) == find_dtype(None, torch.device("mps")) == torch.float32


def test_texts_are_drawn_in_low_precision(shapes_run: Path) -> None:
    pipe, low = hd.load(shapes_run, "cpu"), hd.load(shapes_run, "cpu", dtype=torch.bfloat16)
    assert (low.unet.dtype, low.text_encoder.dtype) == (torch.bfloat16, torch.float32)
    expected, found = (p("a red circle", num_inference_steps=2, output_type="np").images for p in (pipe, low))
    assert 0 < np.abs(found - expected).max() < 0.1


@pytest.mark.parametrize("command", ["sample", "text2image", "caption", "segment", "evaluate"])
def test_a_device_that_is_not_there_is_one_clear_error(
    command: str, run: Path, shapes_run: Path, capsys: pytest.CaptureFixture
) -> None:
    more: list[str | Path] = {
        "text2image": [shapes_run, "a circle"],
        "caption": [shapes_run, "no.png"],
        "segment": [run, "--calibrate"],
    }.get(command, [run])
    assert call(command, *more, "--device", "cuda:77") == 1
    shown = capsys.readouterr()
    assert (shown.out, shown.err.count("\n")) == ("", 1)
    assert "error: device 'cuda:77': not on this machine, which has cpu" in shown.err


def test_an_unknown_precision_is_refused_by_name(run: Path, capsys: pytest.CaptureFixture) -> None:
    assert call("sample", run, "--dtype", "bfloat") == 1
    assert "unknown dtype 'bfloat' (did you mean 'bfloat16'?)" in capsys.readouterr().err


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA"), RuntimeError("[...] DefaultCPUAllocator: can't")])
def test_out_of_memory_names_what_fits(
    error: RuntimeError,
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    forward = hd.HAEUNet.forward

    def limited(network: hd.HAEUNet, sample: torch.Tensor, *rest: Any, **more: Any) -> Any:
        if len(sample) > 4:  # two images, each with and without its class
            raise error
        return forward(network, sample, *rest, **more)

    monkeypatch.setattr(hd.HAEUNet, "forward", limited)
    options = ["-n", "4", "--class", "1", "--steps", "2", "--device", "cpu", "--out", tmp_path / "out"]
    assert call("sample", run, *options) == 1
    assert "out of memory on cpu, drawing 4 images at once; draw fewer at once: --batch-size 2" in (
        capsys.readouterr().err
    )
    assert call("sample", run, *options, "--batch-size", "2") == 0
    assert call("evaluate", run, "-n", "2") == 1
    assert "--batch-size 10" in capsys.readouterr().err


# ---- what is kept -------------------------------------------------------------------------------------------------


def test_settings_are_kept_by_every_way_of_loading(run: Path, tmp_path: Path) -> None:
    pipe = hd.load(run, "cpu")
    pipe.class_names = tuple(f"digit {k}" for k in range(10))
    pipe.defaults = SamplingConfig(sampler="ddim", guidance_scale=3.0, num_inference_steps=4)
    pipe.save_pretrained(tmp_path / "saved")
    expected = draw(pipe)
    for again in (hd.load(tmp_path / "saved", "cpu"), GenerationPipeline.from_pretrained(tmp_path / "saved")):
        again.set_progress_bar_config(disable=True)
        assert (again.class_names, again.defaults, again.spec) == (pipe.class_names, pipe.defaults, pipe.spec)
        assert torch.equal(draw(again), expected)
    assert call("sample", tmp_path / "saved", "--class", "digit 7", "-n", "1", "--out", tmp_path / "out") == 0
    assert np.load(tmp_path / "out" / "digit_7_0000.npy").max() > 1  # in the digits' own units, 0 to 16


def test_a_run_folder_loads_as_diffusers_loads_it(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "old")
    index = json.loads((run / "model_index.json").read_text())
    for key in ("id2label", "sampling", "image_spec", "draws_with_scheduler"):
        del index[key]  # as earlier versions wrote it
    (tmp_path / "old" / "model_index.json").write_text(json.dumps(index))
    expected = hd.load(run, "cpu")
    for folder in (run, tmp_path / "old"):
        for again in (GenerationPipeline.from_pretrained(folder), hd.load(folder, "cpu")):
            assert again.class_names == expected.class_names == tuple("0123456789")
            assert again.defaults == expected.defaults
            assert (again.defaults.guidance_scale, again.spec) == (1.25, expected.spec)


# ---- folders of pictures ------------------------------------------------------------------------------------------


def test_each_call_has_a_folder_of_its_own_with_its_settings(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    options = ["--class", "3", "-n", "1", "--device", "cpu"]
    assert call("sample", copy, *options) == 0
    assert call("sample", copy, *options, "--sampler", "euler", "--steps", "3", "--seed", "4", "--guidance", "2") == 0
    assert call("sample", copy, *options) == 0
    names = sorted(folder.name for folder in (copy / "generated").iterdir())
    assert names == ["0001-dpmpp-2-w1.25-seed0", "0002-euler-3-w2-seed4", "0003-dpmpp-2-w1.25-seed0"]
    found = json.loads((copy / "generated" / names[1] / "settings.json").read_text())
    assert {key: found[key] for key in ("command", "classes", "number", "seed", "sampler", "num_inference_steps")} == {
        "command": "sample", "classes": ["3"], "number": 1, "seed": 4, "sampler": "euler", "num_inference_steps": 3
    }  # fmt: skip
    assert (found["guidance_scale"], found["dtype"], found["device"]) == (2.0, "float32", "cpu")
    assert found["weights"]["step"] == 3


def test_a_folder_with_pictures_of_another_call_is_left_alone(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    options, out = ["--class", "3", "-n", "1", "--device", "cpu"], tmp_path / "out"
    (out / "notes").mkdir(parents=True)  # something that is no picture does not matter
    for _ in range(2):  # the same call replaces its own pictures
        assert call("sample", run, *options, "--out", out) == 0
    before = {path: path.read_bytes() for path in out.iterdir() if path.is_file()}
    capsys.readouterr()
    assert call("sample", run, *options, "--seed", "1", "--out", out) == 1
    assert f"{out}: holds pictures drawn with seed 0, not 1; choose another --out" in capsys.readouterr().err
    other = tmp_path / "other"
    train(tiny_config(other, training__seed=1, **OPTIONS), quiet=True)
    capsys.readouterr()
    assert call("sample", other, *options, "--out", out) == 1
    assert "drawn with weights" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in out.iterdir() if path.is_file()} == before
    (out / "settings.json").unlink()
    assert call("sample", run, *options, "--out", out) == 1
    assert "pictures of something else" in capsys.readouterr().err


def test_images_to_train_on_are_not_mixed_with_drawn_ones(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    options = ["--class", "3", "-n", "1", "--steps", "1", "--device", "cpu"]
    image = tmp_path / "data" / "zero" / "1.jpg"
    image.parent.mkdir(parents=True)
    image.touch()
    assert call("sample", run, *options, "--out", image.parents[1]) == 1
    assert "pictures of something else" in capsys.readouterr().err
    assert [path for path in image.parents[1].rglob("*") if path.is_file()] == [image]
    assert call("sample", run, *options, "--out", tmp_path / "out" / "first") == 0
    assert call("sample", run, *options, "--out", tmp_path / "out") == 0  # beside a folder of an earlier call


@pytest.mark.parametrize("guidance", ["inf", "nan", "-1"])
def test_guidance_that_is_no_scale_is_refused(run: Path, capsys: pytest.CaptureFixture, guidance: str) -> None:
    assert call("sample", run, "--class", "3", "-n", "1", "--guidance", guidance, "--device", "cpu") == 1
    assert "guidance" in capsys.readouterr().err


def test_a_usage_error_names_the_help_of_its_command(run: Path, capsys: pytest.CaptureFixture) -> None:
    assert call("sample", run, "-n", "0") == 1
    assert "(see heterodiff sample --help)" in capsys.readouterr().err


def test_pictures_of_prompts_have_a_folder_of_their_own_too(
    shapes_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(shapes_run, copy)
    prompt = ["a red circle", "-n", "1", "--device", "cpu"]
    assert call("text2image", copy, *prompt, "--steps", "2", "--batch-size", "1") == 0
    assert call("text2image", copy, *prompt, "--direct") == 0
    names = sorted(folder.name for folder in (copy / "generated").iterdir())
    assert [name.split("-")[0] for name in names] == ["0001", "0002"]
    assert names[1] == "0002-direct-seed0"
    found = json.loads((copy / "generated" / names[0] / "settings.json").read_text())
    assert (found["prompts"], found["command"], found["direct"]) == (["a red circle"], "text2image", False)
    first = copy / "generated" / names[0]
    assert call("text2image", copy, "a cross", "-n", "1", "--steps", "2", "--out", first) == 1
    assert 'prompts ["a red circle"], not ["a cross"]' in capsys.readouterr().err
