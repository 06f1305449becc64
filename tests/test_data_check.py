"""The check lists everything that is wrong; the scan of a folder always ends and names what it could not read."""

import os
import resource
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from heterodiff.config import DataConfig
from heterodiff.data import inspection
from heterodiff.data.check import DataFinding, check_data
from heterodiff.data.sources import load_data
from heterodiff.errors import DataError

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 9), dtype=np.uint8)


def make_folder(root):
    for name in ("a", "b"):
        (root / name).mkdir()
        for index in range(3):
            Image.fromarray(PIXELS).save(root / name / f"{index}.png")
    return root


def test_summary_of_good_data(tmp_path):
    summary = check_data(DataConfig(path=make_folder(tmp_path)))
    assert summary.spec == load_data(DataConfig(path=tmp_path)).spec
    assert summary.class_counts == {"a": 3, "b": 3}
    assert summary.sizes == (((6, 9), 6),)
    assert summary.dtypes == {"uint8": 6}
    assert (summary.minimum, summary.maximum) == (PIXELS.min(), PIXELS.max())
    assert summary.mean == pytest.approx(PIXELS.mean())
    assert summary.std == pytest.approx(PIXELS.std())
    assert (summary.bad, summary.problems, summary.warnings) == ((), (), ())


def test_every_bad_image_is_listed(tmp_path):
    make_folder(tmp_path)
    for index in range(15):
        (tmp_path / "a" / f"bad{index:02}.png").touch()
    summary = check_data(DataConfig(path=tmp_path))
    assert summary.bad == tuple(DataFinding(f"a/bad{i:02}.png", "empty file (0 bytes)") for i in range(15))
    assert summary.class_counts == {"a": 3, "b": 3}
    assert summary.spec is not None


def test_what_would_stop_training_is_a_problem(tmp_path):
    make_folder(tmp_path)
    Image.fromarray(PIXELS[:4]).save(tmp_path / "a" / "x.png")
    summary = check_data(DataConfig(path=tmp_path))
    assert summary.spec is None
    assert "set data.image_size" in summary.problems[0]
    assert summary.sizes == (((6, 9), 6), ((4, 9), 1))


def test_no_usable_image(tmp_path):
    (tmp_path / "a.png").touch()
    summary = check_data(DataConfig(path=tmp_path))
    assert (summary.spec, len(summary.bad), len(summary.problems)) == (None, 1, 1)
    assert np.isnan(summary.mean)


def test_nothing_to_check(tmp_path):
    with pytest.raises(DataError, match="no images found"):
        check_data(DataConfig(path=tmp_path))


def test_link_loops_end(tmp_path):
    make_folder(tmp_path)
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    (tmp_path / "b" / "other").symlink_to(tmp_path / "a")
    data = load_data(DataConfig(path=tmp_path))
    assert len(data.train) + len(data.val) == 6
    assert sum("not entered again" in warning for warning in data.warnings) == 2


def test_linked_folders_and_files_are_followed(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    make_folder(tmp_path / "elsewhere")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "x").symlink_to(tmp_path / "elsewhere" / "a")
    (tmp_path / "data" / "y").symlink_to(tmp_path / "elsewhere" / "b")
    (tmp_path / "data" / "z.png").symlink_to(tmp_path / "elsewhere" / "b" / "0.png")
    assert check_data(DataConfig(path=tmp_path / "data")).class_counts == {"x": 3, "y": 3, "": 1}


def test_unreadable_folder_is_named(tmp_path, monkeypatch):
    make_folder(tmp_path)
    (tmp_path / "a" / "locked").mkdir()
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)  # file modes do not stop a superuser
    assert check_data(DataConfig(path=tmp_path)).bad == (
        DataFinding("a/locked", "folder cannot be read: Permission denied"),
    )
    with pytest.raises(DataError, match="a/locked: folder cannot be read"):
        load_data(DataConfig(path=tmp_path))
    assert len(load_data(DataConfig(path=tmp_path, on_bad="skip")).train) == 4


def test_odd_file_names_are_read_and_printed_on_one_line(tmp_path):
    make_folder(tmp_path)
    (tmp_path / "a" / "new\nline.png").touch()
    (tmp_path / "a" / os.fsdecode(b"\xff.png")).touch()
    with pytest.raises(DataError) as caught:
        load_data(DataConfig(path=tmp_path))
    assert "'a/new\\nline.png': empty file" in str(caught.value)
    assert "'a/\\udcff.png': empty file" in str(caught.value)
    str(caught.value).encode("utf-8")


def test_huge_png_needs_no_memory(tmp_path):
    make_folder(tmp_path)
    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 0, 0, 0, 0)
    with (tmp_path / "a" / "huge.png").open("wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        for kind, content in ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(50_000_000))), (b"IEND", b"")):
            file.write(struct.pack(">I", len(content)) + kind + content)
            file.write(struct.pack(">I", zlib.crc32(kind + content)))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    summary = check_data(DataConfig(path=tmp_path))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB
    assert [finding.name for finding in summary.bad] == ["a/huge.png"]
    assert "pixels" in summary.bad[0].problem


def test_progress_bar_for_many_files(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(inspection, "PROGRESS_FROM", 5)
    load_data(DataConfig(path=make_folder(tmp_path)))
    assert capsys.readouterr().out == ""
