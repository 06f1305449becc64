"""Folders that bring Python code of their own: it is never run, whatever is answered, and the message says so."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import ResNetConfig, ResNetModel

from heterodiff.config.file import dump_config
from tests.test_cli import call
from tests.text_runs import forget_files, text_config

CODE = """
from pathlib import Path
Path({marker!r}).write_text("was here")
from transformers import BertTokenizer as Tokenizer, ResNetConfig as Config, ResNetModel as Model
"""


def change_json(file: Path, **changes: Any) -> None:
    content = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps(content | changes))


def own_config(folder: Path) -> None:
    change_json(
        folder / "config.json", model_type="own", auto_map={"AutoConfig": "own.Config", "AutoModel": "own.Model"}
    )


def own_model(folder: Path) -> None:
    """Of a kind whose configuration transformers knows, but no plain model."""
    change_json(folder / "config.json", model_type="depth_anything", auto_map={"AutoModel": "own.Model"})


def own_tokenizer(folder: Path) -> None:
    change_json(folder / "config.json", model_type="own")
    change_json(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["own.Tokenizer", None]})


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose code leaves a mark; whoever is asked whether to run it says yes."""
    (tmp_path / "pretrained").mkdir()
    (tmp_path / "pretrained" / "own.py").write_text(CODE.format(marker=str(tmp_path / "marker")))
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    return tmp_path / "pretrained"


@pytest.mark.parametrize("command", [("train",), ("train", "--dry-run"), ("check",)], ids=" ".join)
@pytest.mark.parametrize(
    ("bring", "setting"),
    [(own_config, "alignment.backbone"), (own_model, "alignment.backbone"), (own_tokenizer, "text.encoder")],
)
def test_code_in_a_folder_is_never_run(
    command: tuple[str, ...],
    bring: Callable[[Path], None],
    setting: str,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    bring(folder)
    section, _, key = setting.partition(".")
    config = text_config(tmp_path / "run", recipe="alignment", **{f"{section}__{key}": str(folder)})
    (tmp_path / "mine.yaml").write_text(dump_config(config))
    name, *options = command
    assert call(name, tmp_path / "mine.yaml", *options) == 1
    captured = capsys.readouterr()
    (line,) = [line for line in (captured.out + captured.err).splitlines() if str(folder) in line]
    assert "custom code is never run" in line
    assert "y/N" not in captured.out
    assert not (tmp_path / "marker").exists()
    assert not (tmp_path / "run").exists()


def test_code_that_a_run_names_is_never_run(
    folder: Path, shapes_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run passed on by somebody, its backbone changed to one of a folder with code."""
    run = tmp_path / "theirs"
    forget_files(shutil.copytree(shapes_run, run))
    backbone = {"model_type": "depth_anything", "_name_or_path": str(folder), "auto_map": {"AutoModel": "own.Model"}}
    change_json(run / "image_codec" / "config.json", backbone=backbone)
    assert call("text2image", run, "a red circle", "-n", "1", "--out", tmp_path / "out") == 1
    captured = capsys.readouterr()
    assert captured.err.startswith(f"error: {run}")
    assert "custom code is never run" in captured.err
    assert not (tmp_path / "marker").exists()


def test_kernels_that_a_configuration_names_are_not_fetched(folder: Path, tmp_path: Path) -> None:
    """Trying to is an error here: tests are offline."""
    network = ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"))
    network.save_pretrained(folder)
    change_json(folder / "config.json", _attn_implementation="someone/kernels", attn_implementation="someone/kernels")
    overrides = {"alignment__block_out_channels": [8, 8, 16], "data__image_size": 32, "training__steps": 1}
    config = text_config(tmp_path / "run", recipe="alignment", alignment__backbone=str(folder), **overrides)
    (tmp_path / "mine.yaml").write_text(dump_config(config))
    assert call("train", tmp_path / "mine.yaml", "--quiet") == 0
    assert call("check", tmp_path / "run") == 0
