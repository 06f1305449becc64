"""Links in a run folder: whatever a run writes there, what they lead to stays as it is."""

from pathlib import Path

import pytest
from PIL import Image

from heterodiff.config.file import dump_config
from tests.test_cli import call
from tests.training_runs import last_checkpoint, tiny_config

FILES = (
    "config.yaml.tmp",
    "split.json.tmp",
    "data.json.tmp",
    "run.json.tmp",
    "weights.json.tmp",
    "metrics.tmp",
    "metrics.jsonl",
    "samples/step_000003.png",
    "samples/step_000004.png",
    ".report.html.part",
    "report.html",
    "evaluation.json",
    "samples.png",
    "nearest.png",
)
FOLDERS = (".pipeline", ".unet.old", "checkpoints/step_00000004.tmp", "checkpoints/step_00000001")


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    """A run of four steps on twelve pictures, which are evaluated in no time."""
    for k in range(12):
        (tmp_path / "images" / "ab"[k % 2]).mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 20 * k).save(tmp_path / "images" / "ab"[k % 2] / f"{k}.png")
    options = {"training__steps": 4, "training__checkpoint_every": 2, "training__preview_every": 3}
    data = {"data__source": "images", "data__path": str(tmp_path / "images"), "data__val_fraction": 0.5}
    (tmp_path / "mine.yaml").write_text(dump_config(tiny_config(tmp_path / "run", **options, **data)))
    return tmp_path / "mine.yaml"


@pytest.mark.parametrize("there", [True, False], ids=["a file", "nothing"])
def test_a_link_in_place_of_the_lock_is_refused(
    there: bool, config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    thesis = tmp_path / "thesis.txt"
    if there:
        thesis.write_text("precious")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(thesis)
    assert call("train", config_file, "--quiet") == 1
    assert capsys.readouterr().err == (
        f"error: {tmp_path / 'run' / '.lock'}: a link, expected a file of the run itself; remove it\n"
    )
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]
    assert (thesis.read_text() == "precious") if there else not thesis.exists()


@pytest.mark.parametrize("kind", ["symlink_to", "hardlink_to"])
def test_links_are_not_written_through(kind: str, config_file: Path, tmp_path: Path) -> None:
    """Hard links, as of a copy by ``cp -al``, cannot be told from a run's own files: the lock may be one."""
    run, theirs, soft = tmp_path / "run", tmp_path / "theirs", kind == "symlink_to"
    assert call("train", config_file, "--quiet", "--stop-after", "2") == 0
    theirs.mkdir()
    (run / "samples").mkdir(exist_ok=True)
    for k, name in enumerate(FILES if soft else (*FILES, ".lock")):
        (theirs / str(k)).write_text("precious")
        (run / name).unlink(missing_ok=True)
        getattr(run / name, kind)(theirs / str(k))
    for k, name in enumerate(FOLDERS if soft else ()):
        (theirs / f"folder{k}").mkdir()
        (theirs / f"folder{k}" / "config.json").write_text("precious")
        (run / name).symlink_to(theirs / f"folder{k}")
    before = {path: path.read_bytes() for path in theirs.rglob("*") if path.is_file()}
    assert call("train", config_file, "--quiet") == 0
    assert not soft or call("evaluate", run, "-n", "2", "--steps", "1") == 0
    assert before == {path: path.read_bytes() for path in theirs.rglob("*") if path.is_file()}
    assert last_checkpoint(run)[0] == 4
    written = [name for name in FILES if not name.endswith((".tmp", ".part"))]
    assert not soft or not [name for name in written if (run / name).is_symlink()]
