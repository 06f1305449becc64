"""``heterodiff check FOLDER`` names the source of captions and volumes, and is silent about images."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from heterodiff.cli import main
from heterodiff.config import DataConfig
from heterodiff.data.captions import open_captions
from heterodiff.data.sources.recognise import source_hint
from tests.test_data_webdataset import write_shards

COCO = {
    "images": [{"id": 1, "file_name": "0.png"}],
    "annotations": [{"image_id": 1, "caption": "a thing"}],
}
CAPTIONS = {
    "annotations/captions_train2017.json": ("train2017", json.dumps(COCO)),
    "results.csv": ("flickr30k_images", "image_name| comment_number| comment\n0.png| 0| a thing\n"),
    "captions.txt": ("Images", "image,caption\n0.png,a thing\n"),
    "metadata.csv": (".", "file_name,text\n0.png,a thing\n"),
    "metadata.jsonl": (".", '{"file_name": "0.png", "text": "a thing"}\n'),
    "captions.jsonl": (".", '{"file_name": "0.png", "text": "a thing"}\n'),
}


def picture(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(path)
    return path


def hint_of(folder: Path) -> str | None:
    return source_hint(DataConfig(path=folder))


@pytest.mark.parametrize("name", CAPTIONS)
def test_captions_are_recognised_and_the_named_settings_read_them(name: str, tmp_path: Path) -> None:
    folder, content = CAPTIONS[name]
    picture(tmp_path / folder / "0.png")
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(content)
    hint = hint_of(tmp_path)
    assert hint is not None
    assert f"captions ({name})" in hint
    settings = dict(setting.split("=") for setting in hint.split("set ")[1].split())
    named = {key.removeprefix("data."): value for key, value in settings.items()}
    assert named == {"source": "captions"} | ({"captions_file": name} if name == "captions.jsonl" else {})
    assert open_captions(DataConfig(path=tmp_path, **named)).captions == (("a thing",),)


def test_shards_are_recognised(tmp_path: Path) -> None:
    write_shards(tmp_path, "cls")
    hint = hint_of(tmp_path)
    assert hint is not None
    assert "tar files (part-000.tar)" in hint
    assert hint.endswith("set data.source=webdataset")


def test_volumes_are_recognised_at_any_depth(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "sub-01" / "anat").mkdir(parents=True)
    (tmp_path / "sub-01" / "anat" / "sub-01_T1w.nii.gz").touch()
    with pytest.raises(SystemExit) as stop:
        main(["check", str(tmp_path)])
    assert stop.value.code == 1
    printed = capsys.readouterr()
    assert "NIfTI volumes (sub-01_T1w.nii.gz)" in printed.out
    assert "data.source=volumes" in printed.out
    assert printed.err.startswith("error: ")


def test_other_folders_are_left_alone(tmp_path: Path) -> None:
    picture(tmp_path / "bird" / "0.png")
    (tmp_path / "results.csv").write_text("epoch,loss\n1,0.5\n")
    (tmp_path / "metadata.csv").write_text("file_name,label,text\nbird/0.png,bird,a bird\n")
    assert hint_of(tmp_path) is None
    (tmp_path / "metadata.csv").write_bytes(b"\xff\x00\n")
    (tmp_path / "metadata.jsonl").write_text("3\n")
    assert hint_of(tmp_path) is None
    assert hint_of(tmp_path / "bird" / "0.png") is None
    assert hint_of(tmp_path / "nowhere") is None
    assert source_hint(DataConfig(source="captions", path=tmp_path)) is None
    assert source_hint(DataConfig(source="digits")) is None
