"""The configurations that come with heterodiff."""

from pathlib import Path

from heterodiff.errors import ConfigError, unknown_name


def shipped_configs() -> Path:
    """Folder of the shipped configurations."""
    installed = Path(__file__).parents[1] / "configs"
    return installed if installed.is_dir() else Path(__file__).parents[3] / "configs"


def find_config(name: str) -> Path:
    """Return the YAML file ``name``, a path or the name of a shipped configuration.

    Raises:
        ConfigError: neither; paths without a suffix must exist, others are left to the reader.
    """
    path, shipped = Path(name), shipped_configs() / f"{name}.yaml"
    if path.exists() or path.suffix:
        return path
    if not shipped.is_file():
        raise ConfigError(unknown_name("configuration", name, sorted(p.stem for p in shipped_configs().glob("*.yaml"))))
    return shipped
