"""The object that knows the files of a run: whole files, bounds, links, the lock, damage and repair."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from heterodiff.config import RunConfig
from heterodiff.errors import CheckpointError, DataError, HeterodiffError, RunError
from heterodiff.files import LEFTOVER, LEFTOVER_SECONDS, MAX_JSON_BYTES, read_json, replacing, write_text
from heterodiff.image_spec import ImageSpec
from heterodiff.run_folder import RunFolder

SPEC = ImageSpec(8, 8, 1, ("a", "b"), (0.0, 255.0), "uint8")
COMPONENTS = {
    "unet": ("config.json", "diffusion_pytorch_model.safetensors"),
    "scheduler": ("scheduler_config.json",),
    "tokenizer": ("tokenizer.json",),
}


def write_pipeline(folder: Path, mark: str = "first") -> None:
    """A pipeline as diffusers lays one out, of files that hold ``mark``."""
    for name, files in COMPONENTS.items():
        (folder / name).mkdir(parents=True)
        for file in files:
            (folder / name / file).write_text(mark)
    index = {"_class_name": "GenerationPipeline", "vae": [None, None], "classes": 2}
    (folder / "model_index.json").write_text(json.dumps(index | {name: ["x", "X"] for name in COMPONENTS}))


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    with folder.locked():
        folder.save_config(RunConfig(output=folder.path))
        folder.save_data({"train": ["ä", "b"]}, {"spec": SPEC.to_dict(), "preprocessing": None})
        folder.save_pipeline(3, write_pipeline)
    return folder


@contextmanager
def other_process(code: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """A Python process that runs ``code`` as far as ``wait()``; it is killed at the end."""
    wait = "def wait():\n    print('ready', flush=True)\n    sys.stdin.read()\n"
    imports = "import sys\nfrom pathlib import Path\nfrom heterodiff.files import replacing\n"
    imports += "from heterodiff.run_folder import RunFolder\n"
    command = [sys.executable, "-c", imports + wait + textwrap.dedent(code), *map(str, arguments)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.send_signal(signal.SIGKILL)


# ---- what is written is read back ---------------------------------------------------------------------------


def test_what_is_written_is_read_back(run: RunFolder) -> None:
    assert run.config() == RunConfig(output=run.path)
    assert (run.spec(), run.split(), run.weights_step()) == (SPEC, {"train": ["ä", "b"]}, 3)
    assert run.pipeline_index()["_class_name"] == "GenerationPipeline"
    assert sorted(path.name for path in run.path.iterdir()) == sorted(
        [".lock", "config.yaml", "data.json", "model_index.json", "split.json", "weights.json", *COMPONENTS]
    )


def test_a_split_is_never_replaced(run: RunFolder) -> None:
    run.save_data({"train": ["c"]}, {"spec": SPEC.to_dict()})
    assert run.split() == {"train": ["ä", "b"]}


def test_a_folder_that_is_not_there_holds_nothing(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "nowhere")
    assert (run.has_begun, run.has_config, run.spec(), run.weights_step(), run.metrics()) == (
        False, False, None, None, ([], 0)
    )  # fmt: skip
    with pytest.raises(RunError, match="nowhere: no such run folder"):
        run.pipeline_index()


def test_what_goes_before_a_run_does_not_begin_it(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    with run.locked():
        run.latents.mkdir()
        run.alignment.mkdir()
    assert not run.has_begun
    run.metrics_file.touch()
    assert run.has_begun


def test_reading_a_run_folder_needs_no_torch(run: RunFolder) -> None:
    code = """
        run = RunFolder(sys.argv[1])
        run.config(), run.spec(), run.split(), run.weights_step()
        assert not {"torch", "diffusers"} & set(sys.modules)
        wait()
    """
    with other_process(code, run):
        pass


# ---- whole or not at all ------------------------------------------------------------------------------------


def test_a_write_that_fails_leaves_what_was_there(run: RunFolder) -> None:
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    code = """
        import resource
        run = RunFolder(sys.argv[1])
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))  # as a full disk: after 1,000 bytes
        try:
            run.write_json(run.data_file, {"spec": "x" * 5000})
        except ValueError as error:
            assert "data.json: cannot be written: File too large; make room" in str(error), error
            wait()
    """
    with other_process(code, run):
        assert before == {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}


def test_a_killed_process_leaves_what_was_there(run: RunFolder) -> None:
    before = run.data_file.read_bytes()
    code = """
        with replacing(RunFolder(sys.argv[1]).data_file) as file:
            file.write(b"half")
            file.flush()
            wait()
    """
    with other_process(code, run):
        pass
    assert run.data_file.read_bytes() == before
    (leftover,) = [path for path in run.path.iterdir() if LEFTOVER.fullmatch(path.name)]
    with run.locked():
        assert leftover.exists()  # a process may just be writing it
    os.utime(leftover, (0, leftover.stat().st_mtime - LEFTOVER_SECONDS - 10))
    with run.locked():
        assert not leftover.exists()


def test_two_writers_of_one_file_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "x"
    with replacing(path) as first, replacing(path) as second:
        first.write(b"a" * 100)
        second.write(b"b" * 10)
    assert path.read_bytes() == b"a" * 100
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("kind", ["symlink_to", "hardlink_to"])
def test_what_a_link_leads_to_stays(kind: str, tmp_path: Path) -> None:
    thesis, path = tmp_path / "thesis", tmp_path / "x"
    thesis.write_text("precious")
    getattr(path, kind)(thesis)
    write_text(path, "own")
    assert (thesis.read_text(), path.read_text(), path.is_symlink()) == ("precious", "own", False)


@pytest.mark.parametrize("failing", range(8))
def test_a_pipeline_half_replaced_counts_as_none(failing: int, run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every rename of the replacement fails once: two of each of three folders, one of the index, that of the step."""
    calls = iter(range(100))

    def limited(self: Path, target: Path, original=Path.rename):  # type: ignore[no-untyped-def]
        if next(calls) == failing:
            raise OSError(28, "No space left on device")
        return original(self, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", limited)
        patched.setattr(Path, "replace", limited)
        with pytest.raises(RunError, match="cannot be written: No space left on device"):
            run.save_pipeline(4, lambda folder: write_pipeline(folder, "second"))
    assert run.weights_step() is None
    run.save_pipeline(5, lambda folder: write_pipeline(folder, "third"))
    assert run.weights_step() == 5
    assert {(run.path / name / file).read_text() for name in COMPONENTS for file in COMPONENTS[name]} == {"third"}
    assert not [path for path in run.path.iterdir() if path.name.startswith(".") and path != run.lock_file]


@pytest.mark.parametrize("file", [f"{name}/{file}" for name, files in COMPONENTS.items() for file in files])
def test_a_pipeline_that_lacks_a_file_counts_as_none(file: str, run: RunFolder) -> None:
    (run.path / file).unlink()
    assert run.weights_step() is None


# ---- one process at a time ----------------------------------------------------------------------------------


def test_a_lock_holds_against_other_processes_and_goes_with_a_killed_one(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    run.lock_file.write_text("kept")
    with other_process("with RunFolder(sys.argv[1]).locked():\n    wait()", run) as process:
        with pytest.raises(RunError, match=r"run: another run is training in this folder; wait for it or set output="):
            run.locked().__enter__()
        process.send_signal(signal.SIGKILL)
        process.wait()
        with run.locked():
            assert run.lock_file.read_text() == "kept"
    assert run.lock_file.exists()


def test_a_lock_is_free_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(KeyError), RunFolder(tmp_path).locked():
        raise KeyError
    with RunFolder(tmp_path).locked(), pytest.raises(RunError, match="another run"):
        RunFolder(tmp_path).locked().__enter__()


def test_a_folder_that_cannot_be_made_is_one_clear_message(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=r"run: cannot be written: Not a directory; set output=\.\.\. elsewhere"):
        RunFolder(tmp_path / "file" / "run").locked().__enter__()


# ---- damaged and foreign files ------------------------------------------------------------------------------

DAMAGES = {
    "empty": (b"", "not readable as JSON"),
    "cut off": (b'{"spec": {', "not readable as JSON"),
    "too deep": (b'{"a":' * 100_000, "not readable as JSON"),
    "no text": (b"\xff\xfe\x00{", "not readable as JSON"),
    "a number too long": (b'{"a": ' + b"9" * 10_000 + b"}", "not readable as JSON"),
    "a list": (b"[1]", "expected a JSON object, found list"),
    "nothing": (b"null", "expected a JSON object, found NoneType"),
}
READERS = {
    "data_file": RunFolder.facts,
    "split_file": RunFolder.split,
    "index_file": RunFolder.pipeline_index,
    "weights_file": RunFolder.weights_step,
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_named_with_the_way_out(damage: str, name: str, run: RunFolder) -> None:
    content, message = DAMAGES[damage]
    getattr(run, name).write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as error:
        READERS[name](run)
    assert str(error.value).startswith(f"{getattr(run, name)}: ")
    way_out = f"; `heterodiff train {run.config_file}` makes it again from the images"
    if name in ("index_file", "weights_file"):
        way_out = f"; `heterodiff train {run.config_file}` writes it again from the newest checkpoint"
    assert str(error.value).endswith(way_out)


@pytest.mark.parametrize("name", ["data_file", "split_file"])
def test_missing_files_are_named(name: str, run: RunFolder) -> None:
    getattr(run, name).unlink()
    with pytest.raises(CheckpointError, match=f"{getattr(run, name)}: missing; `heterodiff train .* makes it again"):
        READERS[name](run)


def test_a_folder_in_place_of_a_file_is_refused(run: RunFolder) -> None:
    run.split_file.unlink()
    run.split_file.mkdir()
    with pytest.raises(CheckpointError, match=r"split\.json: expected a file, found something else"):
        run.split()


def test_a_specification_of_something_else_is_refused(run: RunFolder) -> None:
    run.write_json(run.data_file, {"spec": {"height": 3}})
    with pytest.raises(DataError, match="saved image specification: expected height"):
        run.spec()


def test_files_are_read_up_to_a_bound(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text("{}".ljust(100))
    assert read_json(path, limit=100) == {}
    with pytest.raises(RunError, match=r"x\.json: 100 bytes, expected at most 99; look$"):
        read_json(path, RunError, "look", limit=99)
    os.truncate(path, MAX_JSON_BYTES + 1)
    with pytest.raises(HeterodiffError, match=r"67,108,865 bytes, expected at most 67,108,864"):
        read_json(path)


def test_rows_that_are_damaged_are_left_out_and_counted(run: RunFolder) -> None:
    run.metrics_file.write_bytes(b'{"step": 1}\n[2]\n\xff\xfe\n\n{"step": 2, "x": "\xe2\x80\xa8"}\n{"step": 3, "lo')
    assert run.metrics() == ([{"step": 1}, {"step": 2, "x": "\u2028"}], 3)
