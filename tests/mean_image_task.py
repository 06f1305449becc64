"""A task of its own in one file: a network that is one image learns the mean of the training images."""

import json
import shlex
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from heterodiff.config import RunConfig
from heterodiff.data.assemble import LoadedData
from heterodiff.data.dataset import ImageSpec
from heterodiff.evaluation.held_out import images_of
from heterodiff.evaluation.runs import Evaluation, Request, run_data
from heterodiff.pictures import image_grid
from heterodiff.pipelines.load import Placing
from heterodiff.report.content import Card, Section, Text
from heterodiff.report.files import RunFiles
from heterodiff.report.formatting import number, part_of
from heterodiff.report.metrics import Metric, MetricTable, Value
from heterodiff.tasks import Task
from heterodiff.training.preflight.memory_costs import Cost, MemoryTerms
from heterodiff.training.processes import HostGroup
from heterodiff.training.recipes.base import Draws, Losses, Recipe

WEIGHTS = "mean/model.safetensors"


class MeanImage(nn.Module):
    """One image (C, H, W) for whatever comes in."""

    def __init__(self, shape: tuple[int, ...]):
        super().__init__()
        self.image = nn.Parameter(torch.zeros(shape))

    def forward(self, images: Tensor) -> Tensor:
        return self.image.expand_as(images)


class MeanImageRecipe(Recipe):
    warnings = ("the mean of images is not an image",)
    summary = "one image"

    def __init__(self, config: RunConfig, data: LoadedData):
        self.spec = spec = data.spec
        self.model = MeanImage((spec.channels, spec.height, spec.width))

    def before_training(
        self, config: RunConfig, data: LoadedData, hosts: HostGroup, begins: bool, quiet: bool
    ) -> tuple[LoadedData, list[str]]:
        return data, ["begins" if begins else "goes on"]

    def prepare(self, images: Tensor) -> Tensor:
        return images

    def draw(self, step: int, batch_size: int, generator: torch.Generator, device: torch.device) -> Draws:
        return Draws()  # no random numbers

    def losses(self, network: Callable[..., Any], inputs: Tensor, labels: Tensor, draws: Draws) -> Losses:
        return Losses((network(inputs) - inputs).square().mean(dim=(1, 2, 3)))

    def validate(self, batches: Iterable[tuple[Tensor, Tensor]], seed: int) -> dict[str, float]:
        return {"val_loss": float(torch.cat([self.losses(self.model, x, y, Draws()).each for x, y in batches]).mean())}

    def preview(self, seed: int) -> Image:
        return image_grid(self.model.image.detach()[None].clamp(0, 1).cpu())

    def pipeline(self) -> "MeanImagePipeline":
        return MeanImagePipeline(self.model.image)

    def save(self, folder: Path) -> None:
        (folder / WEIGHTS).parent.mkdir(parents=True)
        save_file({"image": self.model.image.detach().cpu().contiguous()}, folder / WEIGHTS)
        (folder / "model_index.json").write_text(json.dumps({"_class_name": MeanImagePipeline.__name__}))


class MeanImagePipeline:
    def __init__(self, image: Tensor):
        self.image = image


def read_pipeline(folder: Path, placing: Placing) -> MeanImagePipeline:
    return MeanImagePipeline(load_file(folder / WEIGHTS)["image"].to(placing.device))


def try_out(pipeline: MeanImagePipeline, add: Callable[[bool, str, str], None]) -> None:
    add(bool(torch.isfinite(pipeline.image).all()), "mean", f"an image {tuple(pipeline.image.shape)}")


def doubts(config: RunConfig, data: LoadedData) -> list[str]:
    return ["one label would do"] if data.spec.class_names else []


def evaluate(run: Path, request: Request) -> Evaluation:
    image = load_file(run / WEIGHTS)["image"]
    images, _ = images_of(run_data(run).val)
    metrics = {"mean_image": {"n": len(images), "error": float((images - image).abs().mean())}}
    (run / "evaluation.json").write_text(json.dumps(metrics))
    image_grid(image[None].clamp(0, 1)).save(run / "samples.png")
    return Evaluation(metrics, run / "samples.png")


def metrics(evaluation: dict[str, Any]) -> list[MetricTable]:
    found = part_of(evaluation, "mean_image")
    error = Value(number(found.get("error"), "{:.4f}"), n=found.get("n"))
    return [MetricTable("Metric", ("Held out",), [Metric("Error of the mean image", [error], tag="error")])]


def cards(evaluation: dict[str, Any]) -> list[Card]:
    found = "mean_image" in evaluation
    return [row.card("held-out images") for table in metrics(evaluation) for row in table.rows if found]


def report(files: RunFiles) -> list[Section]:
    if "mean_image" not in files.evaluation:
        return []
    tables = [table.table() for table in metrics(files.evaluation)]
    return [Section("The mean image", [Text("It is no image."), *tables])]


def demo(config: RunConfig, out: Path, seed: int) -> list[str]:
    print(evaluate(out, Request(seed=seed)).metrics)
    return [f"shown    {shlex.quote(str(out))}"]


def _cost(config: RunConfig, spec: ImageSpec) -> Cost:
    values = spec.channels * spec.height * spec.width
    return Cost(values, 0, 4.0 * values, 4.0 * values)


MEMORY = MemoryTerms(_cost, lambda config: ([1], 1), smaller="data.image_size")

TASK = Task(
    recipe="mean-image",
    sections=(),
    pipeline="MeanImagePipeline",
    load="tests.mean_image_task:read_pipeline",
    try_out="tests.mean_image_task:try_out",
    commands=("look",),
    build="tests.mean_image_task:MeanImageRecipe",
    memory="tests.mean_image_task:MEMORY",
    evaluate="tests.mean_image_task:evaluate",
    doubts=("tests.mean_image_task:doubts",),
    next_steps=("look at {run}/samples.png",),
    metrics="tests.mean_image_task:metrics",
    cards="tests.mean_image_task:cards",
    report="tests.mean_image_task:report",
    reproduce=("look at {run}",),
    demo="tests.mean_image_task:demo",
)
