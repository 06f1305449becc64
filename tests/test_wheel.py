"""A wheel built from the sdist and installed into an empty environment works away from the checkout."""

import json
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import heterodiff
from heterodiff.config import RunConfig
from heterodiff.config.file import load_config

ROOT = Path(__file__).parents[1]
CONFIGS = {path.stem: path for path in sorted((ROOT / "configs").glob("*.yaml"))}
FEWER = {
    "microdoppler": ["data.microdoppler.images_per_class=3"],
    "shapes": ["data.shapes.images=12"],
    "brain-phantom": ["data.brain_phantom.patients=6", "data.brain_phantom.slices_per_patient=4"],
}
DRY_RUNS = """
import contextlib, io, json, sys
import heterodiff
from heterodiff.cli import main

found = {"": heterodiff.__file__}
for name, overrides in json.loads(sys.argv[1]).items():
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(["train", name, "--dry-run", *overrides])
        except SystemExit as stop:
            found[name] = [stop.code, out.getvalue(), err.getvalue()]
print(json.dumps(found))
"""


def run(*command: str | Path, cwd: Path) -> str:
    """Standard output of a command that must succeed, run without what the checkout or the user adds."""
    added = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "HETERODIFF_DEBUG")
    environment = {key: value for key, value in os.environ.items() if key not in added}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONNOUSERSITE": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An sdist of the checkout, and a wheel of that sdist."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", folder, cwd=ROOT)
    (sdist,) = folder.glob("*.tar.gz")
    pip = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index")
    run(*pip, "-w", folder, sdist, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def programs(built: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the programs of an empty environment with the wheel; its dependencies are those of this one."""
    folder = tmp_path_factory.mktemp("environment") / "empty"
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    installing = (sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", "--quiet")
    run(*installing, built[1], cwd=folder)
    # The .pth files in these folders are not read, so a checkout that is installed there stays out of sight.
    packages = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (own,) = folder.glob("lib/python*/site-packages")
    (own / "dependencies.pth").write_text("\n".join(sorted(packages)) + "\n")
    return folder / "bin"


def test_sdist_and_wheel_hold_what_is_needed(built: tuple[Path, Path]) -> None:
    sdist, wheel = built
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "LICENSE", "README.md", *(f"configs/{name}.yaml" for name in CONFIGS)} <= inside
    with zipfile.ZipFile(wheel) as archive:
        packed = {name: archive.read(name) for name in archive.namelist() if name.startswith("heterodiff/")}
    source = ROOT / "src" / "heterodiff"
    expected = {
        f"heterodiff/{path.relative_to(source)}": path.read_bytes()
        for path in source.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    expected |= {f"heterodiff/configs/{path.name}": path.read_bytes() for path in CONFIGS.values()}
    assert packed.keys() == expected.keys()
    assert packed == expected


def test_help_and_version(programs: Path, tmp_path: Path) -> None:
    assert run(programs / "heterodiff", "--version", cwd=tmp_path) == f"heterodiff {heterodiff.__version__}\n"
    for start in ((programs / "heterodiff",), (programs / "python", "-m", "heterodiff")):
        for arguments in ((), ("--help",)):
            printed = run(*start, *arguments, cwd=tmp_path)
            assert re.search(r"\btrain\b.*Train a model", printed)
    printed = run(programs / "python", "-c", "import heterodiff; print(heterodiff.__file__)", cwd=tmp_path)
    assert Path(printed.strip()).is_relative_to(programs.parent)


def short(config: RunConfig) -> list[str]:
    return ["training.batch_size=2", "training.accumulation_steps=1", *FEWER.get(config.data.source, [])]


def test_every_shipped_configuration_is_found_and_tried(programs: Path, tmp_path: Path) -> None:
    configs = {name: load_config(path) for name, path in CONFIGS.items()}
    overrides = {name: short(config) for name, config in configs.items()}
    printed = run(programs / "python", "-c", DRY_RUNS, json.dumps(overrides), cwd=tmp_path)
    found = json.loads(printed.splitlines()[-1])
    assert Path(found.pop("")).is_relative_to(programs.parent)
    assert found.keys() == configs.keys()
    for name, (code, out, err) in found.items():
        path = configs[name].data.path
        if path is None:  # built-in images
            assert (code, out.splitlines()[-1], err) == (0, "nothing was written", ""), name
        else:  # the user's own, which are not here
            assert (code, out) == (1, ""), name
            assert re.fullmatch(rf"error: {re.escape(str(path))}: no such .*data\.path\n", err), name
    assert {path is None for path in (config.data.path for config in configs.values())} == {True, False}
    assert list(tmp_path.iterdir()) == []


def test_demo_of_a_few_steps(programs: Path, tmp_path: Path) -> None:
    few = ("training.steps=3", "training.warmup_steps=1", "sampling.num_inference_steps=2")
    printed = run(programs / "heterodiff", "demo", "digits", *few, cwd=tmp_path)
    assert "trained  3 steps" in printed
    rows = [json.loads(line) for line in (tmp_path / "runs/digits/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [3]
    assert "<html" in (tmp_path / "runs/digits/report.html").read_text()
