"""Images with captions: every layout, every wrong input, and which image a label points at."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from heterodiff.config import DataConfig
from heterodiff.data.assemble import LoadedData, with_captions
from heterodiff.data.captions import clean_caption, open_captions
from heterodiff.data.check import check_data
from heterodiff.data.dataset import ImageSpec, MemoryStore
from heterodiff.data.sources import image_captions, list_sources, load_data, open_source
from heterodiff.errors import DataError
from heterodiff.latents.reading import LatentDataset


def picture(path: Path, value: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((4, 5, 3), 100, np.uint8)
    pixels[0, 0] = value
    Image.fromarray(pixels).save(path)


def pictures(root: Path, names) -> None:
    for value, name in enumerate(names):
        picture(root / name, value)


def settings(root: Path, **other) -> DataConfig:
    return DataConfig(source="captions", path=root, **other)


def coco(path: Path, captions: dict[str, list], first_id: int = 1) -> None:
    """Write captions by file name in the format of COCO."""
    ids = {name: first_id + k for k, name in enumerate(captions)}
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [{"id": k, "file_name": name, "height": 4, "width": 5} for name, k in ids.items()]
    annotations = [{"id": 0, "image_id": ids[name], "caption": text} for name in ids for text in captions[name]]
    path.write_text(json.dumps({"info": {}, "images": images, "annotations": annotations}))


def jsonl(path: Path, rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def table(path: Path, rows) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


def by_name(config: DataConfig) -> dict[str, tuple[str, ...]]:
    collection = open_captions(config)
    return dict(zip(collection.names, collection.captions, strict=True))


def captions_of(data: LoadedData) -> dict[str, tuple[str, ...]]:
    """The captions that the labels point at."""
    return {
        name: data.captions[label]
        for part in (data.train, data.val)
        for name, label in zip(part.names, part.labels, strict=True)
    }


# --- layouts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("folders", [("train2017", "val2017"), ("images/train2017", "images/val2017"), ("images",) * 2])
def test_coco(tmp_path, folders):
    train, val = folders
    pictures(tmp_path, [f"{train}/000001.png", f"{train}/000002.png", f"{val}/000003.png", "test2017/000004.png"])
    many = {"000001.png": ["A man .", "Someone."], "000002.png": ["A horse\n on the  beach "]}
    coco(tmp_path / "annotations/captions_train2017.json", many)
    coco(tmp_path / "annotations/captions_val2017.json", {"000003.png": ["A dog"]}, first_id=1)
    (tmp_path / "annotations/instances_train2017.json").write_text("{}")
    data = load_data(settings(tmp_path))
    assert data.train.names == [f"{train}/000001.png", f"{train}/000002.png"]
    assert data.val.names == [f"{val}/000003.png"]
    assert data.captions == (("A man .", "Someone."), ("A horse on the beach",), ("A dog",))
    assert data.train.labels.tolist() == [0, 1]
    assert data.val.labels.tolist() == [2]
    assert data.spec.class_names == ()
    assert data.warnings == ()
    assert data.skipped == ()


def test_coco_without_a_training_file_is_split_like_any_other(tmp_path):
    pictures(tmp_path, [f"{k}.png" for k in range(10)])
    coco(tmp_path / "annotations/captions_val2014.json", {f"{k}.png": [f"Picture {k}"] for k in range(10)})
    assert open_captions(settings(tmp_path)).held_out is None
    data = load_data(settings(tmp_path, val_fraction=0.3))
    assert (len(data.train), len(data.val)) == (7, 3)
    named = settings(tmp_path, captions_file="annotations/captions_val2014.json")
    assert by_name(named) == by_name(settings(tmp_path))


def test_files_of_one_part_come_together(tmp_path):
    pictures(tmp_path, ["images/a.png", "images/b.png"])
    coco(tmp_path / "annotations/captions_one.json", {"a.png": ["first", "both"]})
    coco(tmp_path / "annotations/captions_two.json", {"a.png": ["both", "second"], "b.png": ["other"]})
    assert by_name(settings(tmp_path)) == {"images/a.png": ("first", "both", "second"), "images/b.png": ("other",)}


def test_an_image_in_both_parts_is_refused(tmp_path):
    pictures(tmp_path, ["images/a.png", "images/b.png"])
    coco(tmp_path / "annotations/captions_train.json", {"a.png": ["x"], "b.png": ["y"]})
    coco(tmp_path / "annotations/captions_val.json", {"b.png": ["z"]})
    with pytest.raises(DataError, match=r"1 images are described in the training and in the val.* images/b.png"):
        open_captions(settings(tmp_path))


FLICKR = (
    "image_name| comment_number| comment\n"
    '1.png| 0| Two men , one says "hi" , are outside .\n'
    "1.png| 1| A | B .\r\n"
    "\n"
    "2199089797.png| 4   A dog runs across the grass .\n"
)


@pytest.mark.parametrize("folder", ["flickr30k_images", "flickr30k-images", "images", "Images", "."])
def test_flickr30k(tmp_path, folder):
    pictures(tmp_path / folder, ["1.png", "2199089797.png"])
    (tmp_path / "results.csv").write_text(FLICKR)
    assert by_name(settings(tmp_path)) == {
        str(Path(folder, "1.png")): ('Two men , one says "hi" , are outside .', "A | B ."),
        str(Path(folder, "2199089797.png")): ("A dog runs across the grass .",),
    }


@pytest.mark.parametrize("folder", ["flickr30k_images", "Images", "."])
def test_captions_txt(tmp_path, folder):
    pictures(tmp_path / folder, ["1.png", "2.png"])
    table(tmp_path / "captions.txt", [("image", "caption"), ("1.png", "A child , in pink"), ("1.png", 'a "wall"'),
                                      ("2.png", "dogs")])  # fmt: skip
    expected = {"1.png": ("A child , in pink", 'a "wall"'), "2.png": ("dogs",)}
    assert by_name(settings(tmp_path)) == {str(Path(folder, name)): texts for name, texts in expected.items()}


def test_captions_txt_with_other_columns(tmp_path):
    pictures(tmp_path, ["1.png"])
    table(tmp_path / "captions.txt", [("image_name", "number", "comment"), ("1.png", "0", "a dog")])
    with pytest.raises(DataError, match=r"no column image and caption; found .*data.file_column or data.text_column"):
        open_captions(settings(tmp_path))
    assert by_name(settings(tmp_path, file_column="image_name", text_column="comment")) == {"1.png": ("a dog",)}


def test_metadata_csv(tmp_path):
    pictures(tmp_path, ["a.png", "d/e.png"])
    rows = [("file_name", "text", "label"), ("a.png", "one, two", "x"), ("./d/e.png", "tab\there", ""),
            ("a.png", "more\nlines", "x")]  # fmt: skip
    table(tmp_path / "metadata.csv", rows)
    path = tmp_path / "metadata.csv"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert by_name(settings(tmp_path)) == {"a.png": ("one, two", "more lines"), "d/e.png": ("tab here",)}


def test_metadata_jsonl_with_own_columns_and_lists(tmp_path):
    pictures(tmp_path, ["a.png", "b.png"])
    rows = [{"file": "a.png", "said": [" one ", "two", "one"]}, {"file": "b.png", "said": "ünïcode 🐕"},
            {"file": "a.png", "said": "three"}]  # fmt: skip
    jsonl(tmp_path / "metadata.jsonl", rows)
    config = settings(tmp_path, file_column="file", text_column="said")
    assert by_name(config) == {"a.png": ("one", "two", "three"), "b.png": ("ünïcode 🐕",)}
    with pytest.raises(DataError, match=r"none of .*\n  metadata.jsonl line 1: no file_name and no text; found file, "):
        open_captions(settings(tmp_path))


@pytest.mark.parametrize("absolute", [False, True])
def test_a_named_file_of_captions_goes_first(tmp_path, absolute):
    pictures(tmp_path, ["a.png", "sub/b.png"])
    (tmp_path / "results.csv").write_text("not this one")
    jsonl(tmp_path / "other.jsonl", [{"file_name": "a.png", "text": "a dog"}])
    jsonl(tmp_path / "sub/own.jsonl", [{"file_name": "b.png", "text": "a cat"}])
    name = tmp_path / "other.jsonl" if absolute else "other.jsonl"
    assert by_name(settings(tmp_path, captions_file=name)) == {"a.png": ("a dog",)}
    assert by_name(settings(tmp_path, captions_file="sub/own.jsonl")) == {"sub/b.png": ("a cat",)}
    (tmp_path / "flickr.csv").write_text("image_name| comment_number| comment\na.png| 0| a fox\n")
    assert by_name(settings(tmp_path, captions_file="flickr.csv")) == {"a.png": ("a fox",)}


def test_files_outside_the_listing_are_found_all_the_same(tmp_path):
    pictures(tmp_path, [".hidden/a.png", "b.png"])
    (tmp_path / "again").symlink_to(tmp_path)
    rows = [(".hidden/a.png", "x"), ("b.png", "y"), ("again/b.png", "z")]
    jsonl(tmp_path / "metadata.jsonl", [{"file_name": name, "text": text} for name, text in rows])
    assert by_name(settings(tmp_path)) == {".hidden/a.png": ("x",), "again/b.png": ("z",), "b.png": ("y",)}


@pytest.mark.parametrize("kind", ["csv", "jsonl", "txt", "json", "flickr"])
def test_very_long_captions_stay_whole(tmp_path, kind):
    pictures(tmp_path, ["a.png"])
    long = "word " * 60_000
    if kind == "json":
        coco(tmp_path / "annotations/captions_x.json", {"a.png": [long]})
    elif kind == "jsonl":
        jsonl(tmp_path / "metadata.jsonl", [{"file_name": "a.png", "text": long}])
    elif kind == "flickr":
        (tmp_path / "results.csv").write_text(f"image_name| comment_number| comment\na.png| 0| {long}\n")
    else:
        header = ("image", "caption") if kind == "txt" else ("file_name", "text")
        table(tmp_path / ("captions.txt" if kind == "txt" else "metadata.csv"), [header, ("a.png", long)])
    limit = csv.field_size_limit()
    assert by_name(settings(tmp_path)) == {"a.png": (long.strip(),)}
    assert csv.field_size_limit() == limit


# --- wrong input ---------------------------------------------------------------------------------


def test_nothing_to_open(tmp_path):
    with pytest.raises(DataError, match=r"'captions' needs data.path"):
        open_source(DataConfig(source="captions"))
    with pytest.raises(DataError, match="absent: no such folder; expected a folder of images and their captions"):
        open_captions(settings(tmp_path / "absent"))
    picture(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"a\.png: a file; expected a folder"):
        open_captions(settings(tmp_path / "a.png"))
    with pytest.raises(
        DataError,
        match=r"no captions here; looked for annotations/captions_\*.json, results.csv, captions.txt, metadata.csv and "
        r"metadata.jsonl. Add one of these, or name another file with data.captions_file",
    ):
        open_captions(settings(tmp_path))
    with pytest.raises(DataError, match=r"gone.json: no such file; correct data.captions_file, which is relative"):
        open_captions(settings(tmp_path, captions_file="gone.json"))
    (tmp_path / "a.xml").touch()
    with pytest.raises(DataError, match=r"a.xml: expected a file ending in .json, .jsonl, .csv, .txt; correct"):
        open_captions(settings(tmp_path, captions_file="a.xml"))
    for name in ("metadata.csv", "metadata.jsonl"):
        (tmp_path / name).touch()
    with pytest.raises(DataError, match=r"both metadata.csv and metadata.jsonl; keep one"):
        open_captions(settings(tmp_path))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metadata.csv", b"", "no column file_name and text; found"),
        ("metadata.csv", b"file_name,label\na.png,x\n", "no column text; found .*Add it; or name the column with data"),
        ("metadata.csv", b"file_name,text\n", "metadata.csv: no captions"),
        ("metadata.csv", b"file_name,text\na.png,\xe4\n", "metadata.csv line 2: not UTF-8; save"),
        ("metadata.csv", b'file_name,text\na.png,"x\n', "line 2: not readable as CSV"),
        ("metadata.jsonl", b"\n", "metadata.jsonl: no captions"),
        ("metadata.jsonl", b'{"file_name": "a.png", "text": "x"}\n{', "metadata.jsonl line 2: not readable as JSON"),
        ("captions.txt", b"image;caption\na.png;x\n", r"no column image and caption; found \['image;caption'\]"),
        ("captions.txt", b"image,caption\nb.png,x\xff\n", "captions.txt line 2: not UTF-8"),
        (
            "results.csv",
            b"image_name| comment\na.png| x\n",
            "expected the header image_name| comment_number| comment; ",
        ),
        ("results.csv", b"image_name| comment_number| comment\n", "results.csv: no captions"),
        ("annotations/captions_x.json", b'{"images"', "captions_x.json: not readable as JSON"),
        ("annotations/captions_x.json", b"[" * 100_000, "not readable as JSON"),
        ("annotations/captions_x.json", b"[1]", "lists 'images' and 'annotations', found none"),
        ("annotations/captions_x.json", b'{"images": [], "info": 1}', "'annotations', found keys images, info"),
        ("annotations/captions_x.json", b'{"images": [], "annotations": []}', "captions_x.json: no captions"),
        ("annotations/captions_x.json", b'{"a": "\xe4"}', "captions_x.json line 1: not UTF-8"),
    ],
)
def test_unreadable_files(tmp_path, name, content, message):
    picture(tmp_path / "a.png")
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as refusal:
        open_captions(settings(tmp_path))
    assert str(tmp_path / name) in str(refusal.value)


WRONG_ROWS = [
    ({"file_name": "gone.png", "text": "x"}, "file gone.png does not exist in .*; correct or remove the row"),
    ({"file_name": "../a.png", "text": "x"}, "file_name ../a.png leaves the folder"),
    ({"file_name": "/etc/passwd", "text": "x"}, "leaves the folder"),
    ({"file_name": "C:\\a.png", "text": "x"}, "leaves the folder"),
    ({"file_name": "nul\0.png", "text": "x"}, "does not exist"),
    ({"file_name": "", "text": "x"}, "file_name is empty or not text"),
    ({"file_name": ["a.png"], "text": "x"}, "file_name is empty or not text"),
    ({"file_name": "a.png", "text": ""}, "the caption is empty"),
    ({"file_name": "a.png", "text": " \n\t "}, "the caption is empty"),
    ({"file_name": "a.png", "text": None}, "the caption is empty"),
    ({"file_name": "a.png", "text": []}, "the caption is empty"),
    ({"file_name": "a.png", "text": 7}, "caption 7 is not text"),
    ({"file_name": "a.png", "text": ["fine", {}]}, "caption {} is not text"),
    ({"file_name": "a.png", "text": "half \ud800"}, "surrogate pair"),
    ({"file_name": "a.png"}, "no text; found file_name; or name the column with data.file_column"),
    ([1, 2], r"expected an object with file_name and text, found \[1, 2\]"),
]


@pytest.mark.parametrize(("row", "message"), WRONG_ROWS)
def test_wrong_rows_are_named_or_left_out(tmp_path, row, message):
    pictures(tmp_path, ["a.png", "b.png"])
    good = [{"file_name": "a.png", "text": "a dog"}, {"file_name": "b.png", "text": "a cat"}]
    jsonl(tmp_path / "metadata.jsonl", [good[0], row, good[1]])
    config = settings(tmp_path, val_fraction=0)
    expected = rf"1 captions cannot be used:\n  metadata.jsonl line 2: .*{message}(.|\n)*set data.on_bad=skip"
    with pytest.raises(DataError, match=expected):
        load_data(config)
    with pytest.raises(DataError, match=expected):
        image_captions(config)
    assert [finding.name for finding in check_data(config).bad] == ["metadata.jsonl line 2"]
    lenient = config.model_copy(update={"on_bad": "skip"})
    data = load_data(lenient)
    assert data.train.names == ["a.png", "b.png"]
    assert captions_of(data)["b.png"] == ("a cat",)
    assert [name for name, _ in data.skipped] == ["metadata.jsonl line 2"]
    assert any("1 captions cannot be used and were left out: metadata.jsonl line 2:" in text for text in data.warnings)
    assert image_captions(lenient) == captions_of(data)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "captions.txt",
            "image,caption\na.png,ok\na.png,two, three\n",
            "line 3: 1 fields more than the header has; put",
        ),
        ("captions.txt", "image,caption\na.png,ok\na.png\n", "line 3: the caption is empty"),
        ("captions.txt", "image,caption\na.png,ok\n\n/a.png,x\n", "line 4: image /a.png leaves the folder"),
        ("results.csv", "image_name| comment_number| comment\na.png|0|ok\na.png\n", "line 3: expected three fields"),
        ("results.csv", "image_name| comment_number| comment\na.png|0|ok\na.png|1| \n", "line 3: the caption is empty"),
    ],
)
def test_wrong_lines_of_tables(tmp_path, name, content, message):
    picture(tmp_path / "a.png")
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=f"1 captions cannot be used:\n  {name} {message}"):
        load_data(settings(tmp_path))
    assert by_name(settings(tmp_path)) == {"a.png": ("ok",)}


@pytest.mark.parametrize(
    ("images", "annotations", "message"),
    [
        ([{"id": 2}], [], r"images\[1\]: expected an object with id and file_name"),
        ([{"id": [2], "file_name": "b.png"}], [], r"images\[1\]: expected an object with id"),
        ([7], [], r"images\[1\]: expected an object with id and file_name, found 7"),
        ([{"id": 1, "file_name": "b.png"}], [], r"images\[1\]: id 1 is also that of another image"),
        ([], [{"image_id": 9, "caption": "x"}], r"annotations\[1\]: image_id 9 is not among the images"),
        ([], [{"image_id": {}, "caption": "x"}], r"annotations\[1\]: image_id {} is not among"),
        ([], [{"image_id": 1, "bbox": []}], r"annotations\[1\]: expected an object with image_id and caption"),
        ([], [{"image_id": 1, "caption": 3}], r"annotations\[1\]: caption 3 is not text"),
    ],
)
def test_wrong_entries_of_coco(tmp_path, images, annotations, message):
    picture(tmp_path / "a.png")
    path = tmp_path / "captions.json"
    content = {
        "images": [{"id": 1, "file_name": "a.png"}, *images],
        "annotations": [{"image_id": 1, "caption": "a dog"}, *annotations],
    }
    path.write_text(json.dumps(content))
    config = settings(tmp_path, captions_file="captions.json", val_fraction=0)
    with pytest.raises(DataError, match=f"1 captions cannot be used:\n  captions.json {message}"):
        load_data(config)
    assert by_name(config) == {"a.png": ("a dog",)}


def test_many_wrong_rows_are_counted(tmp_path):
    picture(tmp_path / "a.png")
    rows = [("file_name", "text"), ("a.png", "x"), *((f"{k}.png", "x") for k in range(25))]
    table(tmp_path / "metadata.csv", rows)
    with pytest.raises(DataError, match=r"25 captions cannot be used:(\n.*){10}\n  ... and 15 more\nCorrect or"):
        load_data(settings(tmp_path))


def test_images_that_are_elsewhere(tmp_path):
    pictures(tmp_path, ["elsewhere/a.png", "train2017/other.png"])
    coco(tmp_path / "annotations/captions_train2017.json", {"a.png": ["x"], "b.png": ["y"]})
    with pytest.raises(
        DataError,
        match=r"captions_train2017.json: none of the 2 images it names was found, for example a.png; looked in .*"
        r"/train2017, .*/images/train2017, .*/images, .*\. Put them into one of these folders",
    ):
        open_captions(settings(tmp_path, on_bad="skip"))


def test_no_usable_caption_at_all(tmp_path):
    picture(tmp_path / "a.png")
    table(tmp_path / "metadata.csv", [("file_name", "text"), ("a.png", ""), ("../b.png", "x")])
    with pytest.raises(DataError, match=r"none of the captions can be used:\n  metadata.csv line 2: the caption is"):
        open_captions(settings(tmp_path, on_bad="skip"))


def test_images_without_captions_are_announced(tmp_path):
    pictures(tmp_path, ["a.png", "b.png", "c/d.png"])
    jsonl(tmp_path / "metadata.jsonl", [{"file_name": "b.png", "text": "x"}])
    data = load_data(settings(tmp_path))
    assert data.train.names == ["b.png"]
    assert data.warnings[0] == "2 images have no caption and were left out, for example a.png"


def test_captioned_files_that_are_no_images_are_bad_images(tmp_path):
    pictures(tmp_path, ["a.png", "b.png"])
    (tmp_path / "c.gif").write_bytes(b"GIF89a")
    (tmp_path / "d.png").write_bytes(b"no picture")
    rows = [{"file_name": name, "text": name} for name in ("a.png", "b.png", "c.gif", "d.png")]
    jsonl(tmp_path / "metadata.jsonl", rows)
    with pytest.raises(DataError, match=r"2 of 4 images cannot be used:\n  c.gif: suffix"):
        load_data(settings(tmp_path))
    data = load_data(settings(tmp_path, on_bad="skip", val_fraction=0.5))
    assert captions_of(data) == {"a.png": ("a.png",), "b.png": ("b.png",)}


@pytest.mark.parametrize("text", ["", " \u3000\n", None, 3, b"x", ["x"]])
def test_what_is_no_caption(text):
    with pytest.raises(ValueError, match="caption"):
        clean_caption(text)


# --- labels that point at captions ---------------------------------------------------------------


def ten(root: Path) -> DataConfig:
    """Ten pictures whose first pixel is their number, which their two captions give."""
    pictures(root, [f"{k}.png" for k in range(10)])
    jsonl(root / "metadata.jsonl", [{"file_name": f"{k}.png", "text": [f"it is {k}", str(k)]} for k in range(10)])
    return settings(root, val_fraction=0.3)


def test_labels_point_at_the_captions_of_their_image(tmp_path):
    assert "captions" in list_sources()
    data = load_data(ten(tmp_path))
    assert (len(data.train), len(data.val), len(data.captions)) == (7, 3, 10)
    for part in (data.train, data.val):
        images, labels = part.batch(range(len(part)))
        for image, label in zip(images, labels, strict=True):
            number = round(float(image[0, 0, 0]) * 255)
            assert data.captions[int(label)] == (f"it is {number}", str(number))
    said = [{text for label in part.labels for text in data.captions[label]} for part in (data.train, data.val)]
    assert not said[0] & said[1]
    assert image_captions(ten(tmp_path)) == captions_of(data)


def test_a_saved_split_and_specification_are_reused(tmp_path):
    config = ten(tmp_path)
    first = load_data(config)
    other = config.model_copy(update={"split_seed": 5, "val_fraction": 0.5})
    again = load_data(other, split=first.split_to_dict(), spec=first.spec)
    assert again.val.names == first.val.names != load_data(other).val.names
    assert again.captions == first.captions
    assert again.spec == first.spec


def test_a_saved_split_goes_before_the_sources_own(tmp_path):
    pictures(tmp_path, ["images/a.png", "images/b.png"])
    coco(tmp_path / "annotations/captions_train.json", {"a.png": ["x"]})
    coco(tmp_path / "annotations/captions_val.json", {"b.png": ["y"]})
    assert load_data(settings(tmp_path, val_fraction=0)).val.names == ["images/b.png"]
    data = load_data(settings(tmp_path), split={"train": ["images/b.png"], "val": ["images/a.png"]})
    assert data.captions == (("y",), ("x",))
    (tmp_path / "images/a.png").write_bytes(b"damaged")
    with pytest.raises(DataError, match="no image is left for training; add usable images to the training part"):
        load_data(settings(tmp_path, on_bad="skip"))


def test_a_run_of_classes_takes_no_captions(tmp_path):
    config = ten(tmp_path)
    spec = ImageSpec(4, 5, 3, ("cat", "dog"), (0.0, 255.0), "uint8")
    with pytest.raises(DataError, match=r"the run expects images of 2 classes, found images with captions; use"):
        load_data(config, spec=spec)
    with pytest.raises(DataError, match=r"data.labels=required but no image has a label"):
        load_data(config.model_copy(update={"labels": "required"}))


def test_captions_for_stored_latents():
    spec = ImageSpec(8, 8, 3, ("cat", "dog"), (0.0, 255.0), "uint8")
    posteriors = np.arange(3 * 4 * 2 * 2, dtype=np.float16).reshape(3, 4, 2, 2)

    def part(rows: list[int]) -> LatentDataset:
        return LatentDataset(
            spec, MemoryStore(posteriors), np.array(rows), [f"{k}.png" for k in rows], np.full(len(rows), -1)
        )

    data = LoadedData(spec, part([2, 0]), part([1]), (), ("note",))
    captions = {"0.png": ("zero",), "1.png": ("one", "uno"), "2.png": ("two",), "3.png": ("three",)}
    found = with_captions(data, captions)
    assert found.captions == (("two",), ("zero",), ("one", "uno"))
    assert (found.train.labels.tolist(), found.val.labels.tolist()) == ([0, 1], [2])
    assert data.train.labels.tolist() == [-1, -1]  # the given sets stay as they are
    assert isinstance(found.train, LatentDataset)
    assert found.spec.class_names == found.train.spec.class_names == ()
    assert found.warnings == ("note",)
    latents, labels = found.train.batch([1])
    assert torch.equal(latents[0], torch.from_numpy(posteriors[0]).float())
    assert found.captions[int(labels[0])] == ("zero",)
    assert with_captions(found, captions).captions == found.captions
    with pytest.raises(DataError, match=r"1 of 3 images have no caption, for example 1.png; restore"):
        with_captions(data, captions | {"1.png": ()})


def test_sources_without_captions():
    assert image_captions(DataConfig(source="digits")) is None
    assert load_data(DataConfig(source="digits")).captions == ()
    with pytest.raises(DataError, match="stored latents, not images"):
        image_captions(DataConfig(source="latents", path="x"))


def test_real_emoji(real_data):
    folder = real_data / "noto_emoji"
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent")
    config = settings(folder, captions_file="captions.jsonl", file_column="file", text_column="caption", channels=3)
    collection = open_captions(config)
    captions = image_captions(config)
    assert len(collection.names) == 2175
    assert collection.problems == collection.warnings == ()
    assert captions["png128/emoji_u0023.png"] == ("number sign",)
    assert collection.read(0).shape == (3, 128, 128)
