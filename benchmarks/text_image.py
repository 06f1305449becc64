"""Text to image and back: speed at the sizes for 224x224, and how good the shipped runs are.

    python -m benchmarks.text_image                                  speed only
    python -m benchmarks.text_image --runs runs [shapes] [emoji]     also train (or go on with) and evaluate these

Speed is that of networks with random weights at 224x224: 256x7x7 maps, film-unet, a captioner over 49 positions.
The runs take about an hour each on two CPU cores; ``emoji`` needs the pictures (``--data``). Writes
benchmarks/results/text_image_{speed,shapes,emoji}.json and pictures to docs/images.
"""

import argparse
import os
import shutil
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.measure import MATRIX_GFLOP, interleaved, machine, matrix_product, ratio, write_results
from benchmarks.runs import ROOT, seconds_of, to_the_end
from heterodiff.codecs.cnn import FEATURE_CHANNELS, ImageCodec
from heterodiff.config import DiffusionConfig, TextConfig
from heterodiff.config.file import load_config
from heterodiff.config.shipped import shipped_configs
from heterodiff.diffusion.schedule import training_scheduler
from heterodiff.evaluation.captions import evaluate_text_image
from heterodiff.memory import keep_freed_memory
from heterodiff.models.variants import create_model
from heterodiff.pipelines.text_to_image import TextImagePipeline
from heterodiff.report.writing import summary_lines
from heterodiff.text.captioner import Captioner
from heterodiff.text.encoder import TextEncoder
from heterodiff.text.tokenizer import tokenizer_fingerprint, train_tokenizer

DATA = Path(os.environ.get("HETERODIFF_DATA") or ROOT.parent / "shared" / "data") / "noto_emoji"
STEPS, CAPTIONS, CAPTION_TOKENS, LONG_TOKENS, MANY = 50, 3, 30, 60, 16
ROUNDS = 3


def large_pipeline() -> TextImagePipeline:
    """All networks at the sizes of ``configs/coco_224.yaml``, with random weights."""
    torch.manual_seed(0)
    text = TextConfig()
    tokenizer = train_tokenizer([f"word{k}" for k in range(text.vocabulary_size)], text.vocabulary_size)
    codec = ImageCodec(feature_channels=FEATURE_CHANNELS).eval()
    encoder = TextEncoder(len(tokenizer), tokenizer_fingerprint=tokenizer_fingerprint(tokenizer)).eval()
    captioner = Captioner(len(tokenizer)).eval()
    prior_channels = 256 + FEATURE_CHANNELS
    unet = create_model(
        "film-unet",
        latent_channels=256,
        latent_size=7,
        condition_dim=512,
        guess_channels=prior_channels,
        model_channels=128,
        channel_mult=(1, 2, 4),
    ).eval()
    pipeline = TextImagePipeline(
        codec, encoder, tokenizer, captioner, unet, training_scheduler(DiffusionConfig(), False)
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def measure_speed() -> dict[str, Any]:
    """Seconds of a picture and of captions, and what the key-value cache is worth."""
    pipeline = large_pipeline()
    picture = torch.rand(1, 3, 224, 224)
    latents = pipeline.image_codec.encode(picture * 2 - 1).detach()

    def caption(tokens: int, count: int, use_cache: bool = True) -> list[Any]:
        return pipeline.captioner.generate(
            latents, num_captions=count, max_new_tokens=tokens, seed=0, use_cache=use_cache
        )

    calls = {
        "picture": lambda: pipeline.generate_from_text(
            "word1 word2", num_inference_steps=STEPS, guidance_scale=3.0, sampler="ddim"
        ),
        "captions": lambda: caption(CAPTION_TOKENS, CAPTIONS),
        "cached": lambda: caption(LONG_TOKENS, 1),
        "uncached": lambda: caption(LONG_TOKENS, 1, use_cache=False),
        "product": matrix_product,
        "many_cached": lambda: caption(LONG_TOKENS, MANY),
        "many_uncached": lambda: caption(LONG_TOKENS, MANY, use_cache=False),
    }
    lengths = [  # random weights hardly ever end a caption early
        len(ids) for ids in caption(CAPTION_TOKENS, CAPTIONS)[0]
    ]
    seconds = interleaved(calls, ROUNDS)
    parameters = sum(p.numel() for p in pipeline.unet.parameters())
    found = {
        "unet_parameters": parameters,
        "picture_seconds": median(seconds["picture"]),
        "captions_seconds": median(seconds["captions"]),
        "caption_lengths": lengths,
        "cache_speedup": ratio(seconds, "uncached", "cached"),
        f"cache_speedup_{MANY}_captions": ratio(seconds, "many_uncached", "many_cached"),
        "matrix_product_gflops": MATRIX_GFLOP / median(seconds["product"]),
    }
    print(f"film-unet            {parameters:,} parameters")
    print(f"1 picture, {STEPS} steps  {found['picture_seconds']:.2f} s with guidance (asked: 5)")
    print(
        f"{CAPTIONS} captions, {CAPTION_TOKENS} tokens {found['captions_seconds']:.2f} s (asked: 1); lengths {lengths}"
    )
    many = found[f"cache_speedup_{MANY}_captions"]
    print(
        f"key-value cache      {found['cache_speedup']:.1f} x faster at {LONG_TOKENS} tokens, {many:.1f} x with {MANY} "
        "captions at once (asked: 3)"
    )
    print(f"machine meanwhile    {found['matrix_product_gflops']:.0f} GFLOP/s in a large matrix product")
    return found


def measure_run(name: str, runs: Path, data: Path) -> dict[str, Any]:
    """Train the shipped configuration ``name`` to its end and evaluate it."""
    run = runs / name
    overrides = [f"output={run}", *([f"data.path={data}"] if name == "emoji" else [])]
    config = load_config(shipped_configs() / f"{name}.yaml", overrides)
    to_the_end(config)
    assert config.codec.path is not None
    found = evaluate_text_image(run)
    for line in summary_lines(found.metrics):
        print(line)
    for picture in sorted((run / "evaluation").glob("*.png")):
        shutil.copy(picture, ROOT / "docs" / "images" / f"{name}_{picture.name}")
    found.metrics["held_out"]["path"] = Path(found.metrics["held_out"]["path"]).name  # wherever it lies here
    return {"seconds": {"codec": seconds_of(config.codec.path), "denoiser": seconds_of(run)}, **found.metrics}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("names", nargs="*", choices=["shapes", "emoji", []], help="configurations to measure")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--data", type=Path, default=DATA)
    arguments = parser.parse_args()
    keep_freed_memory()
    if not arguments.names:
        print(f"wrote {write_results('text_image_speed', {**machine(), **measure_speed()})}")
    for name in arguments.names:
        found = measure_run(name, arguments.runs, arguments.data)
        print(f"wrote {write_results(f'text_image_{name}', found)}")


if __name__ == "__main__":
    main()
