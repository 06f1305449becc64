"""Arguments and options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

from heterodiff.errors import ConfigError

MOST_IMAGES = MOST_STEPS = 1_000_000
MOST_CANDIDATES = 10_000

RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.", show_default=False)]
ConfigArgument = Annotated[
    str, typer.Argument(metavar="CONFIG", help="YAML file, or the name of a shipped one (digits).", show_default=False)
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[key.path=value]...", help="Changes to the configuration.")
]
Seed = Annotated[int, typer.Option(help="Seed; the same seed gives the same result.")]
Device = Annotated[
    str | None,
    typer.Option(
        help="Where to compute: cpu, cuda, cuda:1, mps, ...; default: a GPU if there is one.", show_default=False
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the results as JSON.")]

# Drawing images
Steps = Annotated[int | None, typer.Option(min=1, max=MOST_STEPS, help="Denoising steps; default: the run's.")]
Guidance = Annotated[
    float | None, typer.Option(min=0, help="Guidance scale; 1 is unguided. Default: the run's.", show_default=False)
]
Sampler = Annotated[
    str | None, typer.Option(help="ddpm, ddim, dpmpp, unipc, euler, heun or flow-euler; default: the run's.")
]
BatchSize = Annotated[
    int | None, typer.Option(min=1, help="Images drawn at once; fewer take less memory.", show_default=False)
]
DType = Annotated[
    str | None,
    typer.Option(
        help="Precision of the denoiser: float32, bfloat16 or float16; default: bfloat16 on CUDA, else float32.",
        show_default=False,
    ),
]
Compile = Annotated[bool, typer.Option("--compile", help="Compile the network first; pays off for many images.")]
Graphs = Annotated[bool, typer.Option("--graphs", help="Compile the network into CUDA graphs; needs CUDA.")]
ImagesFolder = Annotated[
    Path | None, typer.Option(help="Folder for the images; default: a new one in RUN/generated.", show_default=False)
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="NAME=VALUE", help="Value of a condition (data.conditions); repeatable.", show_default=False
    ),
]


def settings(given: list[str] | None) -> dict[str, str]:
    """Read ``NAME=VALUE`` options; raises ConfigError for one without a name and a value, or twice the same name."""
    found: dict[str, str] = {}
    for text in given or ():
        name, equals, value = text.partition("=")
        if not equals or not name or not value:
            raise ConfigError(f"--set {text}: expected NAME=VALUE, such as --set angle_deg=30")
        if name in found:
            raise ConfigError(f"--set {name}: given twice; give it once")
        found[name] = value
    return found
