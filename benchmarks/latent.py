"""Training on cached latents against encoding every batch and against pixels; and the memory that encoding takes.

    python -m benchmarks.latent

Simulated radar pictures of 64x64. All ways of training take turns, step by step, in one run; the networks of a
row are of one width. Prints a table and writes benchmarks/results/latent.json.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL

from benchmarks.measure import interleaved, peak_memory_mb, ratio, write_results
from heterodiff.codecs.kl_vae import KLVAECodec, load_vae
from heterodiff.codecs.scaling import measure
from heterodiff.config import RunConfig, VAEConfig
from heterodiff.config.file import parse_config
from heterodiff.data.sources import load_data
from heterodiff.latents.encode import encode_data
from heterodiff.training.preflight.trial import trial
from heterodiff.training.recipes.vae import build_vae

BATCH = 32
ROUNDS = 3
IMAGES_PER_CLASS = 40
ENCODED = (2_000, 8_000)
DATA = {"source": "microdoppler", "image_size": 64, "microdoppler": {"images_per_class": IMAGES_PER_CLASS}}
WIDTHS = (32, 64)


def peer_vae(*channels: int) -> AutoencoderKL:
    """A VAE of the size that Rombach et al. (2022) train, for grey images."""
    return AutoencoderKL(
        in_channels=1,
        out_channels=1,
        block_out_channels=channels,
        layers_per_block=2,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
    )


def make_vaes(folder: Path) -> dict[str, Path]:
    """Untrained VAEs, scaled to their latents of the data: speed does not depend on what the weights are."""
    data = load_data(parse_config({"data": DATA}).data)
    torch.manual_seed(0)
    vaes = {
        "shipped": build_vae(VAEConfig(block_out_channels=(16, 32, 64)), data.spec),
        "default": build_vae(VAEConfig(), data.spec),
        "kl-f4 of LDM": peer_vae(128, 256, 512),
        "kl-f8 of Stable Diffusion": peer_vae(128, 256, 512, 512),
    }
    paths = {}
    for number, (name, vae) in enumerate(vaes.items()):
        codec = KLVAECodec(vae.eval())
        codec.set_statistics(*measure([codec.posterior(data.train.batch(range(16))[0])], codec.latent_channels))
        paths[name] = folder / f"vae{number}"
        vae.save_pretrained(paths[name])
    return paths


def config_of(width: int, vae: Path | None = None, latents: Path | None = None) -> RunConfig:
    """A run of hae-v2 on pixels, on images encoded with every batch, or on stored latents."""
    content: dict[str, Any] = {
        "data": DATA if latents is None else {"source": "latents", "path": str(latents)},
        "model": {"variant": "hae-v2", "model_channels": width, "layers_per_block": 1},
        "training": {"batch_size": BATCH},
    }
    if vae is not None:
        content["codec"] = {"kind": "kl-vae", "path": str(vae), "cache": latents is not None, "statistics": "measured"}
    return parse_config(content)


def encode(vae: Path, out: Path, data_config: dict[str, Any]) -> Path:
    config = parse_config({"data": data_config}).data
    return encode_data(load_data(config), config, KLVAECodec(load_vae(vae)), out, vae_path=vae, quiet=True)


def training_speed(folder: Path, vaes: dict[str, Path]) -> list[dict[str, Any]]:
    """Images a second of each way of training, a row each."""
    stored = {name: encode(path, folder / f"latents{k}", DATA) for k, (name, path) in enumerate(vaes.items())}
    rows = []
    print(
        f"{'width':>5} {'vae':26} {'pixels':>8} {'every batch':>12} {'cached':>8}   cached against: every batch, pixels"
    )
    for width in WIDTHS:
        calls = {"pixels": trial(config_of(width))[0].step_once}
        for name, path in vaes.items():
            calls[f"{name}, every batch"] = trial(config_of(width, path))[0].step_once
            calls[f"{name}, cached"] = trial(config_of(width, path, stored[name]))[0].step_once
        seconds = interleaved(calls, ROUNDS)
        for name in vaes:
            cached, fly = f"{name}, cached", f"{name}, every batch"
            speeds = {key: BATCH / float(np.median(seconds[key])) for key in ("pixels", fly, cached)}
            row = {
                "width": width,
                "vae": name,
                "pixels": speeds["pixels"],
                "every_batch": speeds[fly],
                "cached": speeds[cached],
                "cached_to_every_batch": ratio(seconds, fly, cached),
                "cached_to_pixels": ratio(seconds, "pixels", cached),
            }
            rows.append(row)
            print(
                f"{width:5} {name:26} {row['pixels']:8.1f} {row['every_batch']:12.1f} {row['cached']:8.1f}   "
                f"{row['cached_to_every_batch']:.1f}x, {row['cached_to_pixels']:.1f}x",
                flush=True,
            )
    return rows


def print_encoding_peak(vae: str, images: str) -> None:
    """Encode a folder of PNG files and print the peak memory of this process in MB."""
    with tempfile.TemporaryDirectory() as out:
        encode(Path(vae), Path(out) / "latents", {"path": images, "memory_limit_gb": 0, "labels": "none"})
    status = Path("/proc/self/status").read_text("utf-8")
    print(int(status.split("VmHWM:")[1].split()[0]) / 1000)


def encoding_memory(folder: Path, vae: Path) -> dict[str, float]:
    """Peak MB of processes that encode folders of few and of many images."""
    from PIL import Image

    rng = np.random.default_rng(0)
    peaks = {}
    for count in ENCODED:
        images = folder / f"images{count}"
        images.mkdir()
        for k in range(count):
            Image.fromarray(rng.integers(0, 256, (64, 64), np.uint8)).save(images / f"{k:05d}.png")
        peaks[str(count)] = peak_memory_mb("benchmarks.latent", str(vae), str(images))
        print(f"encoding {count} images takes at most {peaks[str(count)]:.0f} MB in all", flush=True)
    return peaks


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        vaes = make_vaes(folder)
        content = {"batch": BATCH, "rows": training_speed(folder, vaes)}
        content["encoding_peak_mb"] = encoding_memory(folder, vaes["shipped"])
    print(f"wrote {write_results('latent', content)}")


if __name__ == "__main__":
    if len(sys.argv) == 3:
        print_encoding_peak(sys.argv[1], sys.argv[2])
    else:
        main()
