"""Recipe ``adapt``: the short form of a run that goes on from another one with a few images of each class."""

from pathlib import Path
from typing import Any

import yaml

from heterodiff.config.file import dump_config, load_config
from heterodiff.errors import ConfigError
from heterodiff.files import read_json

OF_TRAINING = (
    "dropout",
    "gradient_checkpointing",
    "memory_optimization",
    "init_from",
    "train",
    "lora_rank",
    "prior_preservation",
    "prior_images",
)
"""Keys of section ``model`` that the new run may choose; all others are the architecture, as in the base."""
TRAINING = {"steps": 300, "batch_size": 16, "preview_every": 300, "checkpoint_every": 100}
"""Enough for five images a class, measured by ``python -m benchmarks.few_shot``."""
RUN = "model.init_from: RUN, a finished run"


def adapt_defaults(content: dict[str, Any]) -> dict[str, Any]:
    """``content`` of a configuration of recipe ``adapt`` as one of recipe ``diffusion``, with all that it leaves open.

    Images, architecture, noise and sampling are as in the run ``model.init_from``, of which low-rank updates are
    trained for some hundred steps.

    Raises:
        ConfigError: no run is named, or it cannot be read.
    """
    names = ("data", "model", "diffusion", "sampling", "codec", "training")
    given: dict[str, Any] = {name: content.get(name) or {} for name in names}
    if not all(isinstance(section, dict) for section in given.values()):
        return content | {"recipe": "diffusion"}  # wrong types are reported as such
    folder = given["model"].get("init_from")
    if not folder:
        raise ConfigError(f"recipe: adapt: expected {RUN} to go on from, found none")
    defaults = _as_in(Path(str(folder)).expanduser())
    training = dict(TRAINING)
    if given["training"].get("minutes") is not None:
        del training["steps"]
    defaults["training"] = training
    sections = {name: {**defaults.get(name, {}), **given[name]} for name in names}
    return content | {"recipe": "diffusion"} | {name: section for name, section in sections.items() if section}


def _as_in(run: Path) -> dict[str, dict[str, Any]]:
    """Return the sections that a run adapted from ``run`` has in common with it."""
    file, facts = run / "config.yaml", run / "data.json"
    if not file.is_file() or not facts.is_file():
        raise ConfigError(
            f"recipe: adapt: model.init_from={run}: expected a finished run, found no "
            f"{file.name if not file.is_file() else facts.name}; an imported model is adapted by recipe diffusion with "
            "model.train=lora, and a run that has begun goes on by its own config.yaml"
        )
    base = yaml.safe_load(dump_config(load_config(file)))
    spec = read_json(facts)["spec"]
    data: dict[str, Any] = {"image_size": [spec["height"], spec["width"]], "val_fraction": 0.0}
    if spec["dtype"] == "uint8":
        data["channels"] = spec["channels"]
    model = {key: value for key, value in base.get("model", {}).items() if key not in OF_TRAINING}
    found = {"data": data, "model": {**model, "train": "lora"}}
    found |= {name: dict(base[name]) for name in ("diffusion", "sampling") if name in base}
    if base.get("codec", {}).get("kind", "pixels") != "pixels":
        found["codec"] = {"kind": base["codec"]["kind"], "path": str(run)}  # it holds a copy
    return found
