"""The table of tasks: what it finds, that nobody else asks which recipe a run is, and a task added in one row."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file

import heterodiff
from heterodiff import tasks
from heterodiff.cli import main
from heterodiff.config import RunConfig
from heterodiff.config.file import parse_config
from heterodiff.data.sources import load_data
from heterodiff.demo import run_demo
from heterodiff.errors import RunError
from heterodiff.lazy import loaded
from heterodiff.pipelines.load import load_generation
from heterodiff.tasks import TASKS, task_of, task_of_codec, task_of_pipeline, task_of_recipe

SOURCE = Path(heterodiff.__file__).parent
NAMES = ("load", "try_out", "build", "memory", "evaluate", "defaults", "metrics", "cards", "report", "demo")


@pytest.mark.parametrize("name", TASKS)
def test_all_that_a_row_names_is_there(name: str) -> None:
    task = TASKS[name]
    named = [getattr(task, field) for field in NAMES] + list(task.doubts)
    assert all(loaded(each) is not None for each in named if each is not None)
    assert set(task.sections) <= set(RunConfig.model_fields)
    assert task.next_lines("runs/x")[0].startswith("next     heterodiff ")


@pytest.mark.parametrize(
    ("content", "name"),
    [
        ({}, "class-images"),
        ({"data": {"source": "brain-phantom"}}, "anomalies"),
        ({"recipe": "vae", "data": {"source": "brain-phantom"}}, "vae"),
        ({"recipe": "classifier", "data": {"source": "brain-phantom"}}, "classifier"),
        ({"recipe": "alignment", "data": {"source": "shapes"}}, "alignment"),
        ({"recipe": "text-image", "data": {"source": "shapes"}}, "text-image"),
        ({"recipe": "text-image", "data": {"source": "shapes"}, "alignment": {"joint": True}}, "text-image-joint"),
    ],
)
def test_a_task_is_found_from_a_configuration(content: dict[str, Any], name: str) -> None:
    assert task_of(parse_config(content)) is TASKS[name]


def test_a_task_is_found_from_less() -> None:
    assert task_of_pipeline("GenerationPipeline") is TASKS["class-images"]
    assert task_of_pipeline("ReconstructionPipeline") is TASKS["vae"]
    assert task_of_pipeline("StableDiffusionPipeline") is None
    assert task_of_codec("cnn") is TASKS["alignment"]
    assert task_of_recipe("text-image") is TASKS["text-image"]
    assert task_of_recipe("") is TASKS["class-images"]


def test_the_table_itself_imports_nothing_heavy() -> None:
    code = "import sys, heterodiff.tasks; assert not {'torch', 'diffusers', 'pydantic'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- who asks which recipe it is -------------------------------------------------------------------------------------

MAY_ASK = ("tasks.py",)


def questions(path: Path) -> Iterator[str]:
    """Lines of ``path`` where a recipe is compared with a name, or a recipe or pipeline asked for its class."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if not isinstance(node, ast.Compare | ast.Call):
            continue
        text = ast.unparse(node)
        if isinstance(node, ast.Compare):
            operands = [ast.unparse(operand) for operand in (node.left, *node.comparators)]
            is_recipe = [bool(re.search(r"(^|\.)recipe$|\(?['\"]recipe['\"][)\]]$", operand)) for operand in operands]
            named = any("'" in operand for operand, found in zip(operands, is_recipe, strict=True) if not found)
            if (any(is_recipe) and named) or re.search(r"(Recipe|Pipeline)\.__name__", text):
                yield text
        elif re.match(r"(isinstance|issubclass)\(.*(Recipe|Pipeline)\b", text):
            yield text


def test_nobody_else_asks_which_recipe_it_is() -> None:
    asked = {
        f"{path.relative_to(SOURCE)}: {question}"
        for path in SOURCE.rglob("*.py")
        if not str(path.relative_to(SOURCE)).startswith(MAY_ASK)
        for question in questions(path)
    }
    assert asked == set()


def test_questions_are_seen(tmp_path: Path) -> None:
    lines = [
        "config.recipe == 'vae'",
        "recipe not in ('vae', 'alignment')",
        "isinstance(recipe, (VAERecipe, DiffusionRecipe))",
        "pipeline_kind(run) == TextImagePipeline.__name__",
        "content.get('recipe') == 'vae'",
    ]
    file = tmp_path / "file.py"
    file.write_text("\n".join([*lines, "kind != config.recipe", "recipe.codec.kind == 'cnn'", "isinstance(x, str)"]))
    assert len(list(questions(file))) == len(lines)


# ---- a task in one file and one row ----------------------------------------------------------------------------------


@pytest.fixture
def mean_image(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The table with one row more, as if ``tasks.py`` had it."""
    from tests.mean_image_task import TASK

    field = RunConfig.model_fields["recipe"]
    with monkeypatch.context() as patch:
        patch.setitem(TASKS, "mean-image", TASK)
        patch.setattr(field, "annotation", Literal[tuple(tasks.recipes())])
        RunConfig.model_rebuild(force=True)
        yield
    RunConfig.model_rebuild(force=True)
    with pytest.raises(heterodiff.errors.ConfigError, match="recipe: Input should be"):
        parse_config({"recipe": "mean-image"})


def call(*arguments: object) -> int:
    """Exit code of ``heterodiff arguments``."""
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    assert isinstance(stop.value.code, int)
    return stop.value.code


@pytest.mark.usefixtures("mean_image")
def test_a_new_task_is_one_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, run = tmp_path / "mean.yaml", tmp_path / "run"
    training = "steps: 60, batch_size: 16, learning_rate: 0.1, warmup_steps: 0, ema_decay: 0.5, log_every: 20"
    file.write_text(
        f"recipe: mean-image\noutput: {run}\ndata: {{source: digits}}\n"
        f"training: {{{training}, lr_schedule: cosine, tensorboard: false, precision: float32}}\n"
    )

    def says(*arguments: object) -> str:
        assert call(*arguments) == 0
        return capsys.readouterr().out

    assert "one image, 64 parameters" in says("check", file)
    assert "one image, 64 parameters" in says("train", file, "--dry-run")
    assert not run.exists()
    begun = says("train", file, "--stop-after", "30")
    for note in ("begins", "one label would do", "the mean of images is not an image"):
        assert f"note     {note}\n" in begun
    ended = says("train", file)
    assert "note     goes on\n" in ended
    assert f"next     look at {run}/samples.png\n" in ended

    data = load_data(parse_config({"data": {"source": "digits"}}).data)
    mean = data.train.batch(range(len(data.train)))[0].mean(dim=0)
    learned = heterodiff.load(run, device="cpu").image
    assert torch.equal(learned, load_file(run / "mean/model.safetensors")["image"])
    assert (learned - mean).abs().mean() < 0.1 * mean.abs().mean()

    assert "pass  mean       an image (1, 8, 8)" in says("check", run)
    assert says("evaluate", run).startswith("error    error of the mean image: held out 0.")
    written = (run / "report.html").read_text()
    for part in ("Error of the mean image", "The mean image", "It is no image.", f"look at {run}\n"):
        assert part in written
    run_demo(file, run, 0)
    assert f"shown    {run}" in capsys.readouterr().out
    with pytest.raises(RunError, match="draws no images of classes"):
        load_generation(run)
    assert call("text2image", run, "a prompt") == 1
    assert "knows no texts" in capsys.readouterr().err
