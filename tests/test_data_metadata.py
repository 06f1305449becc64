"""Labels from metadata.csv and metadata.jsonl."""

import csv
import json

import numpy as np
import pytest

from heterodiff.config import DataConfig
from heterodiff.data.check import check_data
from heterodiff.data.sources import load_data
from heterodiff.errors import DataError

IMAGE = np.random.default_rng(0).integers(0, 256, (4, 5), dtype=np.uint8)


def write(root, rows, kind="csv", columns=("file_name", "label"), images=("a.npy", "b.npy", "c.npy", "d/e.npy")):
    for name in images:
        (root / name).parent.mkdir(exist_ok=True)
        np.save(root / name, IMAGE)
    path = root / f"metadata.{kind}"
    if kind == "csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([columns, *rows])
    else:
        path.write_text("\n".join(json.dumps(dict(zip(columns, row, strict=True))) for row in rows) + "\n")
    return DataConfig(path=root, val_fraction=0)


def labels_by_name(data):
    names = data.spec.class_names
    return {
        name: names[label] if label >= 0 else None
        for name, label in zip(data.train.names, data.train.labels, strict=True)
    }


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_text_labels(tmp_path, kind):
    config = write(tmp_path, [("a.npy", "dog"), ("d/e.npy", "cat, big"), ("./b.npy", "")], kind)
    data = load_data(config)
    assert data.spec.class_names == ("cat, big", "dog")
    assert labels_by_name(data) == {"a.npy": "dog", "d/e.npy": "cat, big", "b.npy": None}
    assert "1 images are not listed in metadata.csv" in data.warnings[0].replace("jsonl", "csv")


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_integer_labels_are_sorted_by_number(tmp_path, kind):
    data = load_data(write(tmp_path, [("a.npy", 10), ("b.npy", 9), ("c.npy", 10)], kind))
    assert data.spec.class_names == ("9", "10")
    assert labels_by_name(data) == {"a.npy": "10", "b.npy": "9", "c.npy": "10"}


def test_long_captions_and_byte_order_mark_are_fine(tmp_path):
    config = write(tmp_path, [("a.npy", "x", "word " * 20_000), ("b.npy", "y", "line\nbreak")],
                   columns=("file_name", "label", "text"))  # fmt: skip
    path = tmp_path / "metadata.csv"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert load_data(config).spec.class_names == ("x", "y")


def test_all_labels_empty_is_unlabelled(tmp_path):
    config = write(tmp_path, [("a.npy", ""), ("b.npy", "")])
    assert load_data(config).spec.class_names == ()
    with pytest.raises(DataError, match=r"data.labels=required but no image"):
        load_data(config.model_copy(update={"labels": "required"}))


def test_labels_none_needs_no_label_column(tmp_path):
    config = write(tmp_path, [("a.npy",), ("b.npy",)], columns=("file_name",))
    with pytest.raises(DataError, match=r"metadata.csv: no column label; found \['file_name'\].*data.labels=none"):
        load_data(config)
    assert load_data(config.model_copy(update={"labels": "none"})).train.names == ["a.npy", "b.npy"]


WRONG_ROWS = [
    (("gone.npy", "x"), "file gone.npy does not exist in .*; correct or remove the row"),
    (("../a.npy", "x"), "file_name ../a.npy leaves the folder"),
    (("d/../../a.npy", "x"), "leaves the folder"),
    (("/etc/passwd", "x"), "leaves the folder"),
    (("C:\\a.npy", "x"), "leaves the folder"),
    (("", "x"), "file_name is empty"),
    (("a.npy", "x"), "a.npy is listed twice"),
    (("n" * 5000, "x"), r"file n+\.\.\. does not exist"),
    (("nul\0.npy", "x"), "does not exist"),
]


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
@pytest.mark.parametrize(("row", "message"), WRONG_ROWS)
def test_wrong_rows_are_named(tmp_path, row, message, kind):
    if kind == "csv" and "\0" in row[0]:
        row = (row[0].replace("\0", "\x01"), row[1])
    config = write(tmp_path, [("a.npy", "x"), row, ("b.npy", "y")], kind)
    line = 3 if kind == "csv" else 2
    with pytest.raises(
        DataError, match=rf"1 metadata rows cannot be used:\n  metadata.{kind} line {line}: .*{message}"
    ):
        load_data(config)
    bad = check_data(config).bad
    assert [finding.name for finding in bad] == [f"metadata.{kind} line {line}"]


@pytest.mark.parametrize("label", [1.5, True, ["x"], {}])
def test_labels_of_other_types_are_refused(tmp_path, label):
    with pytest.raises(DataError, match=r"line 1: label .* is neither text nor an integer"):
        load_data(write(tmp_path, [("a.npy", label)], "jsonl"))


@pytest.mark.parametrize(
    ("kind", "content", "message"),
    [
        ("csv", b"", "no column file_name and label"),
        ("csv", b"file_name;label\na.npy;x\n", r"found \['file_name;label'\]"),
        ("csv", b"file_name,label\n", "no rows"),
        ("csv", b"file_name,label\na.npy,\xe4\n", "metadata.csv line 2: not UTF-8; save"),
        ("csv", b'file_name,label\na.npy,"x\n', "line 2: not readable as CSV"),
        ("csv", b"file_name,label\na.npy," + b"x" * 200_000, "not readable as CSV: field larger"),
        ("jsonl", b"\n", "no rows"),
        ("jsonl", b'{"file_name": "a.npy", "label": "x"}\n{"file_name"', "metadata.jsonl line 2: not readable as JSON"),
        ("jsonl", b"[" * 100_000, "line 1: not readable as JSON"),
        ("jsonl", b"[1]", r"line 1: expected an object with file_name and label, found \[1\]"),
        ("jsonl", b'{"file_name": "a.npy"}', "line 1: no label"),
    ],
)
def test_unreadable_files(tmp_path, kind, content, message):
    np.save(tmp_path / "a.npy", IMAGE)
    (tmp_path / f"metadata.{kind}").write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_data(DataConfig(path=tmp_path))


def test_two_metadata_files_are_refused(tmp_path):
    write(tmp_path, [("a.npy", "x")])
    with pytest.raises(DataError, match=r"both metadata.csv and metadata.jsonl; keep one"):
        load_data(write(tmp_path, [("a.npy", "x")], "jsonl"))


def test_listed_file_of_unknown_type_is_a_bad_image(tmp_path):
    config = write(tmp_path, [("a.npy", "x"), ("b.npy", "y"), ("z.gif", "y")])
    (tmp_path / "z.gif").write_bytes(b"GIF89a")
    with pytest.raises(DataError, match=r"z.gif: suffix '.gif' is not one of"):
        load_data(config)
