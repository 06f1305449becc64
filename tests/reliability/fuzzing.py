"""Random damage to every kind of file that a user or a stranger may give: an error that we word, or a usable result.

    python -m tests.reliability.fuzzing [--seconds 60] [--keep DIR] [NAME]...

Each case damages one file of a sound set and reads the set as the command line does. Anything but success or a
HeterodiffError is a crash: it is printed with its seed, from which the case is made again, and kept in DIR.
"""

import argparse
import io
import shutil
import sys
import tarfile
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from heterodiff.codecs.kl_vae import KLVAECodec, load_vae
from heterodiff.codecs.weight_files import read_weights
from heterodiff.config import DataConfig
from heterodiff.config.file import dump_config, load_config
from heterodiff.config.shipped import shipped_configs
from heterodiff.data.check import check_data
from heterodiff.data.sources import load_data
from heterodiff.errors import HeterodiffError
from heterodiff.latents.encode import encode_data
from heterodiff.latents.reading import load_latents
from heterodiff.training.checkpoints.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from tests.vae_runs import plain_vae

TOKENS = (
    *(b"\x00", b"\xff", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\x80\x00\x00\x00", b"\x00\x00\x00\x00"),
    *(b"{", b"}", b"[", b"]", b'"', b"'", b":", b",", b"\n", b"-", b"&a", b"*a", b"!!python/name:os.system", b"~"),
    *(b"nan", b".inf", b"1e999", b"-1", b"99999999999999999999", b"null", b"true", b"../../x", b"\\u0000", b"\xc3"),
    *(b"descr", b"<O8", b"|O", b"fortran_order", b"IHDR", b"IDAT", b"PK\x01\x02", b"II*\x00", b"MM\x00*"),
)


def mutated(content: bytes, rng: np.random.Generator) -> bytes:
    """Return ``content`` with one to four faults: bits, bytes, missing or repeated parts, and tokens that hurt."""
    data = bytearray(content)
    for _ in range(int(rng.integers(1, 5))):
        where = int(rng.integers(len(data))) if data else 0
        # half of the faults lie in the first bytes, where files describe themselves
        where = min(where, int(rng.integers(1, 400))) if rng.random() < 0.5 else where
        length = int(rng.integers(1, 17))
        token = TOKENS[int(rng.integers(len(TOKENS)))]
        match int(rng.integers(7)):
            case 0:
                data[where : where + 1] = bytes([(data[where] if data else 0) ^ (1 << int(rng.integers(8)))])
            case 1:
                data[where : where + length] = rng.integers(0, 256, length, dtype=np.uint8).tobytes()
            case 2:
                del data[where:]
            case 3:
                del data[where : where + length]
            case 4:
                data[where:where] = data[where : where + length] * int(rng.integers(1, 50))
            case 5:
                data[where : where + len(token)] = token
            case _:
                data[where:where] = token
    return bytes(data)


def _pixels(number: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (16, 16, channels), dtype=np.uint8).squeeze()


def _pictures(suffix: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        for name in ("a", "b"):
            (folder / name).mkdir()
            for number in range(2):
                Image.fromarray(_pixels(number)).save(folder / name / f"{number}.{suffix}")

    return make


def _deflated_tiff(folder: Path) -> None:
    for number in range(2):
        Image.fromarray(_pixels(number, 1)).save(folder / f"{number}.tif", compression="tiff_adobe_deflate")


def _arrays(folder: Path) -> None:
    for number in range(2):
        np.save(folder / f"{number}.npy", _pixels(number).astype(np.float32))


def _npz(folder: Path) -> None:
    images = np.stack([_pixels(number) for number in range(6)])
    np.savez_compressed(folder / "data.npz", images=images, labels=np.array([0, 1, 0, 1, 0, 1]))


def _metadata(folder: Path) -> None:
    for number in range(4):
        Image.fromarray(_pixels(number)).save(folder / f"{number}.png")
    rows = "".join(f"{number}.png,{'ab'[number % 2]}\n" for number in range(4))
    (folder / "metadata.csv").write_text("file_name,label\n" + rows)


def _json_lines(folder: Path) -> None:
    _metadata(folder)
    (folder / "metadata.csv").unlink()
    rows = [f'{{"file_name": "{number}.png", "label": "{"ab"[number % 2]}"}}\n' for number in range(4)]
    (folder / "metadata.jsonl").write_text("".join(rows))


def _captions(folder: Path) -> None:
    for number in range(4):
        Image.fromarray(_pixels(number)).save(folder / f"{number}.png")
    (folder / "captions.csv").write_text(
        "file_name,text\n" + "".join(f'{number}.png,"a red, round thing"\n' for number in range(4))
    )


def _coco(folder: Path) -> None:
    for number in range(4):
        Image.fromarray(_pixels(number)).save(folder / f"{number}.png")
    images = ", ".join(f'{{"id": {number}, "file_name": "{number}.png"}}' for number in range(4))
    texts = ", ".join(f'{{"image_id": {number}, "caption": "a thing"}}' for number in range(4))
    (folder / "captions.json").write_text(f'{{"images": [{images}], "annotations": [{texts}]}}')


def _shards(folder: Path) -> None:
    for number in range(2):
        with tarfile.open(folder / f"{number}.tar", "w") as archive:
            for sample in range(3):
                picture = io.BytesIO()
                Image.fromarray(_pixels(sample)).save(picture, "png")
                texts = {"cls": b"ab"[sample % 2 :][:1], "json": b'{"caption": "a thing"}'}
                for kind, content in {"png": picture.getvalue(), **texts}.items():
                    member = tarfile.TarInfo(f"{sample}.{kind}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))


def _volumes(folder: Path) -> None:
    for patient in ("p1", "p2"):
        (folder / patient).mkdir()
        voxels = np.zeros((12, 12, 6), np.float32)
        voxels[2:10, 2:10] = np.random.default_rng(0).random((8, 8, 6)) + 1
        voxels[:, :, 3:] = np.minimum(voxels[:, :, 3:], 1.8)  # three healthy slices
        for name in ("flair", "seg"):
            array = voxels if name == "flair" else (voxels > 1.85).astype(np.float32)
            nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), folder / patient / f"{patient}_{name}.nii")


def _config(folder: Path) -> None:
    for name in ("digits", "shapes", "phantom", "radar_gestures_latent"):
        shutil.copy(shipped_configs() / f"{name}.yaml", folder)
    (folder / "saved.yaml").write_text(dump_config(load_config(folder / "digits.yaml")))


def _checkpoint(folder: Path) -> None:
    tensors = {"model": {"a": torch.arange(6.0)}, "ema": {"a": torch.arange(6.0)}}
    write_checkpoint(folder, Checkpoint(3, tensors, {"recipe": "diffusion", "window": {}}), 1)


def _safetensors(folder: Path) -> None:
    save_file({"time_embed.0.weight": torch.ones(4, 4), "b": torch.ones(3)}, folder / "w.safetensors", {"a": "b"})


def _torch_file(folder: Path) -> None:
    torch.save({"time_embed.0.weight": torch.ones(4, 4), "b": torch.ones(3)}, folder / "w.pt")


def _latents(folder: Path) -> None:
    (folder / "images").mkdir()
    _pictures("png")(folder / "images")
    vae = plain_vae(in_channels=3, out_channels=3)
    vae.save_pretrained(folder / "vae")
    config = DataConfig.model_validate({"source": "images", "path": folder / "images", "val_fraction": 0.3})
    data, codec = load_data(config), KLVAECodec(load_vae(folder / "vae"))
    encode_data(data, config, codec, folder / "latents", vae_path=folder / "vae", shard_size=2, quiet=True)


@dataclass(frozen=True)
class Target:
    """A kind of input.

    Attributes:
        make: writes a sound set into a folder.
        read: reads it as the command line does.
        damaged: pattern of the files that are damaged, one a case.
    """

    make: Callable[[Path], None]
    read: Callable[[Path], object]
    damaged: str = "**/*"


def _check(**settings: object) -> Callable[[Path], object]:
    def read(folder: Path) -> object:
        path = folder / "data.npz" if (folder / "data.npz").exists() else folder
        config = DataConfig.model_validate({"path": path, "image_size": 16, "val_fraction": 0.3, **settings})
        check_data(config)
        data = load_data(config)
        return data.train.batch([0])

    return read


def _read_configs(folder: Path) -> None:
    for path in sorted(folder.iterdir()):
        load_config(path)


def _read_latents(folder: Path) -> object:
    return load_latents(folder / "latents").train.batch([0])


def _read_checkpoint(folder: Path) -> None:
    read_checkpoint(next(folder.glob("step_*")))


VOLUMES = {"modalities": {"flair": "*_flair"}, "mask": "*_seg"}
TARGETS = {
    "configuration": Target(_config, _read_configs),
    "png": Target(_pictures("png"), _check(source="images")),
    "jpg": Target(_pictures("jpg"), _check(source="images")),
    "bmp": Target(_pictures("bmp"), _check(source="images")),
    "tif": Target(_pictures("tif"), _check(source="images")),
    "deflated tif": Target(_deflated_tiff, _check(source="images", labels="none")),
    "npy": Target(_arrays, _check(source="images", labels="none")),
    "npz": Target(_npz, _check(source="images")),
    "metadata.csv": Target(_metadata, _check(source="images"), "metadata.csv"),
    "metadata.jsonl": Target(_json_lines, _check(source="images"), "metadata.jsonl"),
    "captions.csv": Target(_captions, _check(source="captions", captions_file="captions.csv"), "captions.csv"),
    "captions.json": Target(_coco, _check(source="captions", captions_file="captions.json"), "captions.json"),
    "webdataset": Target(_shards, _check(source="webdataset")),
    "NIfTI": Target(_volumes, _check(source="volumes", volumes=VOLUMES), "**/*.nii"),
    "latents": Target(_latents, _read_latents, "latents/*"),
    "checkpoint": Target(_checkpoint, _read_checkpoint),
    "safetensors": Target(_safetensors, lambda folder: read_weights(folder / "w.safetensors")),
    "torch file": Target(_torch_file, lambda folder: read_weights(folder / "w.pt")),
}


class Case:
    """Damages one file of a sound set, which is made once, and reads the set."""

    def __init__(self, name: str, folder: Path):
        self.name, self.target, self.folder = name, TARGETS[name], folder
        sound = folder / "sound"
        sound.mkdir(parents=True)
        self.target.make(sound)
        found = sorted(path for path in sound.glob(self.target.damaged) if path.is_file())
        self.content = {path.relative_to(sound): path.read_bytes() for path in found}
        self.target.read(self._copy())  # sound sets are read

    def _copy(self) -> Path:
        copy = self.folder / "case"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(self.folder / "sound", copy)
        return copy

    def run(self, seed: int) -> str | None:
        """Return the traceback of case ``seed`` if it crashes."""
        rng = np.random.default_rng(seed)
        name = list(self.content)[int(rng.integers(len(self.content)))]
        folder = self._copy()
        (folder / name).write_bytes(mutated(self.content[name], rng))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of the libraries that decode
                self.target.read(folder)
        except HeterodiffError as error:
            return None if str(error).strip() else "an error without a message"
        except Exception:
            return traceback.format_exc()
        return None


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", help=", ".join(TARGETS))
    parser.add_argument("--seconds", type=float, default=60.0, help="of each kind of input")
    parser.add_argument("--first", type=int, default=0, help="seed of the first case")
    parser.add_argument("--keep", type=Path, help="folder for the sets that crash")
    options = parser.parse_args()
    crashes = 0
    for name in options.names or TARGETS:
        with tempfile.TemporaryDirectory() as folder:
            case, end, seed, seen = Case(name, Path(folder)), time.monotonic() + options.seconds, options.first, set()
            while time.monotonic() < end:
                problem = case.run(seed)
                if problem is not None and (where := _where(problem)) not in seen:
                    seen.add(where)
                    print(f"{name}, seed {seed}:\n{problem}", flush=True)
                    if options.keep is not None:
                        shutil.copytree(case.folder / "case", options.keep / f"{name} {seed}", dirs_exist_ok=True)
                seed += 1
        print(f"{name}: {seed - options.first:,} cases, {len(seen)} kinds of crash", flush=True)
        crashes += len(seen)
    return min(crashes, 1)


def _where(problem: str) -> str:
    """The last two places of a traceback, by which crashes are told apart."""
    return "".join([line for line in problem.splitlines() if line.startswith("  File")][-2:])


if __name__ == "__main__":
    sys.exit(main())
