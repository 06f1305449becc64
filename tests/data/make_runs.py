"""Make tests/data/runs: run folders as they are written today, and what is to come of them.

    python -m tests.data.make_runs

Each run is stopped halfway. Beside its folder, NAME.safetensors holds the losses and the averaged weights of the run
that was not stopped. Large weights are cut to their headers (see tests/golden_files.py): such a run goes on from
weights made from names, in one piece here and in two in the test. The VAE is small enough to be kept whole.

Pictures of classes are drawn in float64 by the oracle's network and DDIM's formula; those of texts by the pipeline.

To be run when the format of run folders changes on purpose, with other names: the folders of before must still be read.
"""

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import heterodiff as hd
from heterodiff.config import RunConfig
from heterodiff.pipelines.generate import seeded_generators
from heterodiff.training.start import train
from tests.golden_files import RUNS, cut, moved, outcome, unpack
from tests.oracles.whole_network import predict
from tests.text_runs import text_config
from tests.training_runs import tiny_config
from tests.vae_runs import vae_config

STOP, STEPS = 4, 8
OPTIONS = {"steps": STEPS, "warmup_steps": 2, "checkpoint_every": 2, "keep_checkpoints": 2, "log_every": 1}
LEFT_OUT = (".lock", "step_00000002", "samples", "latents", "alignment/checkpoints")
KEPT_WHOLE = 50_000
"""Bytes of the largest file that is not cut."""

LABELS, TIMESTEPS, GUIDANCE_SCALE = (3, 7, -1), (600, 200, 10), 2.0
PROMPTS = ("a red circle", "")


def configs() -> dict[str, RunConfig]:
    """The runs by name, in folders relative to the working directory."""
    options = {f"training__{key}": value for key, value in OPTIONS.items()}
    network = {"model__model_channels": 8, "model__channel_mult": [4, 4]}
    vae = {"vae__block_out_channels": [4, 4], "vae__latent_channels": 2, "data__image_size": 8}
    text = {"codec__statistics": "measured", "alignment__block_out_channels": [8, 16], "data__shapes": {"images": 40}}
    return {
        "classes": tiny_config(Path("classes"), **network, **options),
        "vae": vae_config(Path("vae"), **vae, **options),
        "text-image": text_config(Path("text-image"), **text, **options),
    }


def make(name: str, config: RunConfig) -> None:
    """Write the folder and the file of run ``name``; the working directory is for what is not kept."""
    train(config, quiet=True, stop_after=STOP)
    store(Path(name), RUNS / name)
    whole = Path(f"{name}-whole")
    if name != "vae":
        unpack(name, whole)
        write_manifests(whole, RUNS / name)
    train(moved(config, whole), quiet=True)
    start = unpack(name, Path(f"{name}-start"))
    tensors = outcome(start, whole)
    if name == "classes":
        tensors["pictures"] = draw(start)
    if name == "text-image":
        tensors["pictures"] = hd.load(start)(list(PROMPTS), seed=0).images
    save_file(tensors, RUNS / f"{name}.safetensors")
    (RUNS / f"{name}.safetensors").chmod(0o644)


def store(run: Path, folder: Path) -> None:
    """Keep of a stopped run what is needed to go on: no older checkpoints, and of large files the headers."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(run, folder, ignore=lambda path, names: [n for n in names if f"{path}/{n}".endswith(LEFT_OUT)])
    for path in folder.rglob("*.safetensors"):
        if folder.name != "vae" and path.stat().st_size > KEPT_WHOLE:
            cut(path)


def write_manifests(filled: Path, stored: Path) -> None:
    """Give the sums of the ``filled`` files to both folders, as checkpoints are refused where they differ."""
    for path in filled.rglob("manifest.json"):
        manifest = json.loads(path.read_text())
        for name in manifest:
            content = (path.parent / name).read_bytes()
            manifest[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        path.write_text(json.dumps(manifest, indent=1))
        shutil.copy(path, stored / path.relative_to(filled))


@torch.no_grad()
def draw(run: Path) -> Tensor:
    """Pictures (B, C, H, W) in [0, 1]: DDIM (Song et al. 2021, eq. 12, eta = 0), x0 clipped, with guidance."""
    config = json.loads((run / "unet" / "config.json").read_text())
    weights = load_file(run / "unet" / "diffusion_pytorch_model.safetensors")
    weights = {name: value.double() for name, value in weights.items()}
    alpha_bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    labels = torch.tensor(LABELS)
    noise = [torch.randn(1, 1, 8, 8, generator=generator) for generator in seeded_generators(0, len(LABELS))]
    z = torch.cat(noise).double()
    for t, next_t in zip(TIMESTEPS, [*TIMESTEPS[1:], None], strict=True):
        time = torch.full((len(z),), t)
        with_class = predict(weights, config, z, time, labels)
        without = predict(weights, config, z, time, torch.full_like(labels, -1))
        eps = without + GUIDANCE_SCALE * (with_class - without)
        a = alpha_bar[t]
        x0 = ((z - (1 - a).sqrt() * eps) / a.sqrt()).clamp(-1, 1)
        eps = (z - a.sqrt() * x0) / (1 - a).sqrt()
        a = torch.ones(()) if next_t is None else alpha_bar[next_t]
        z = a.sqrt() * x0 + (1 - a).sqrt() * eps
    return ((z + 1) / 2).clamp(0, 1).float()


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)
        for each, settings in configs().items():
            make(each, settings)
