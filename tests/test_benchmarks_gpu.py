"""benchmarks.gpu: its rows at their smallest on the CPU, and what becomes of rows that fail or take too long."""

import fnmatch
import inspect
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import session, ways
from benchmarks.gpu.goals import promises
from benchmarks.gpu.session import Bench, DeviceLost, OutOfTime, Results, Row, Unavailable, run_rows
from benchmarks.gpu.steps import a_step, totals
from heterodiff.models.attention import ways as attention_ways

ON_A_CPU = ("float16 needs a GPU", "only CUDA's calls are counted", "CUDA graphs need CUDA")
"""Why rows may be skipped here, beside libraries that are missing."""


def measured(out: Path, *arguments: str) -> dict[str, Any]:
    """Rows of a ``--tiny`` run, in which none may have failed."""
    code = command.main(["--tiny", "--out", str(out), *arguments])
    (path,) = out.glob("gpu_*.json")
    rows = json.loads(path.read_text())["rows"]
    assert [(name, row["why"]) for name, row in rows.items() if row["state"] not in ("done", "skipped")] == []
    assert code == 0
    for row in rows.values():
        assert row["state"] == "done" or row["why"] in ON_A_CPU or "No module named" in row["why"]
    return rows


def test_rows_on_the_cpu(tmp_path: Path) -> None:
    wanted = ["agrees", "steps digits float32", "overflow", "resume digits", "B train batch 1 eager", "norms", "TF32"]
    rows = measured(tmp_path, "--rows", *wanted, "attention 32x32", "counts of training digits")
    assert len(rows) == 3 + len(wanted) + 1
    found = {name: row["found"] for name, row in rows.items() if row["state"] == "done"}
    assert found["agrees with the CPU"]["hae-v2"] == {"output": 0, "gradient": 0}
    assert len(found["steps digits float32"]["loss"]) == 2
    assert found["resume digits"]["different"] == 0
    assert found["resume digits"]["of"] > 100
    assert found["B train batch 1 eager"]["unet"]["to_unet"] == 1
    assert found["B train batch 1 eager"]["hae-v2"]["share_of_product"] > 0
    assert set(found["attention 32x32"]["head 16"]) == {"gather", "dense"}
    assert found["TF32"]["largest_difference"] == 0
    assert found["norms"]["to_commit"].startswith('NORM_WAYS["cpu"] = ')
    assert rows["overflow float16"]["why"] == "float16 needs a GPU"


@pytest.mark.slow
def test_every_row_on_the_cpu(tmp_path: Path) -> None:
    assert list(measured(tmp_path)) == [row.name for row in command.all_rows()]


def test_every_row_can_be_called() -> None:
    rows = command.all_rows()
    assert len({row.name for row in rows}) == len(rows)
    bench = Bench(torch.device("cpu"), True, Path())
    for row in rows:
        inspect.signature(row.measure).bind(bench)
        assert row.seconds > 0
    for pattern in command.FIRST:
        assert fnmatch.filter([row.name for row in rows], pattern), pattern


# ---- what becomes of rows -------------------------------------------------------------------------------------


def run(folder: Path, *measures: Callable[[Bench], Any], minutes: float | None = None, version: str = "1") -> list[str]:
    """Run ``measures`` as rows a, b, ... of one second each; names of those for which there was no time."""
    rows = [Row(name, 1, measure) for name, measure in zip("abcdef", measures, strict=False)]
    return run_rows(rows, Bench(torch.device("cpu"), True, folder), Results("A GPU (1)", folder, version), minutes)


def rows_in(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "gpu_a_gpu_1.json").read_text())["rows"]


def failing(error: BaseException) -> Callable[[Bench], Any]:
    def measure(bench: Bench) -> Any:
        raise error

    return measure


def test_a_row_that_fails_stops_no_other(tmp_path: Path) -> None:
    library = ModuleNotFoundError("No module named 'monai'", name="monai")
    own = ModuleNotFoundError("No module named 'heterodiff.gone'", name="heterodiff.gone")
    errors = [ValueError("two\nlines"), library, own, Unavailable("no graphs"), torch.OutOfMemoryError("full")]
    run(tmp_path, *map(failing, errors), lambda bench: {"x": 1})
    rows = rows_in(tmp_path)
    assert {name: row["state"] for name, row in rows.items()} == {
        "a": "failed",
        "b": "skipped",
        "c": "failed",
        "d": "skipped",
        "e": "failed",
        "f": "done",
    }
    assert rows["a"]["why"] == "ValueError: two lines"
    assert rows["f"]["found"] == {"x": 1}


def test_a_run_that_is_killed_keeps_its_rows_and_goes_on_after_them(tmp_path: Path) -> None:
    calls: list[str] = []

    def counted(name: str) -> Callable[[Bench], Any]:
        return lambda bench: calls.append(name) or {}  # type: ignore[func-returns-value]

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, counted("a"), failing(ValueError()), failing(Unavailable()), failing(KeyboardInterrupt()))
    assert list(rows_in(tmp_path)) == ["a", "b", "c"]
    run(tmp_path, *map(counted, "abcd"))
    assert calls == ["a", "c", "d"]  # what could not be measured is tried again
    run(tmp_path, *map(counted, "ab"), version="2")
    assert calls == ["a", "c", "d", "a", "b"]
    assert [row["version"] for row in rows_in(tmp_path).values()] == ["2", "2", "1", "1"]


def test_time_bounds_what_is_begun_and_what_is_running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "SHORTEST", 0.0)
    assert run(tmp_path, lambda bench: {}, minutes=0.5 / 60) == ["a"]  # it would take a second

    def hanging(bench: Bench) -> Any:
        try:
            time.sleep(60)
        except Exception:  # what a library catches, time that is up must pass
            return {}

    assert run(tmp_path, hanging, lambda bench: {}, minutes=1.5 / 60) == ["b"]
    assert rows_in(tmp_path)["a"]["state"] == "cut"
    assert issubclass(OutOfTime, BaseException)
    run(tmp_path, lambda bench: {})
    assert rows_in(tmp_path)["a"]["state"] == "done"


def test_again_measures_only_the_rows_that_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    rows = [Row(name, 1, lambda bench, name=name: calls.append(name) or {}) for name in ("one", "two")]
    monkeypatch.setattr(command, "all_rows", lambda: rows)
    for more in ([], [], ["--again", "--rows", "two"]):
        assert command.main(["--tiny", "--out", str(tmp_path), *more]) == 0
    assert calls == ["one", "two", "two"]


def test_a_lost_device_is_found_again_in_a_new_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(bench: Bench) -> None:
        raise DeviceLost("illegal address")

    class Replaced(Exception):
        pass

    def replace(program: str, arguments: list[str]) -> None:
        raise Replaced(*arguments[1:])

    monkeypatch.setattr(command, "all_rows", lambda: [Row("one", 1, failing(RuntimeError("illegal address")))])
    monkeypatch.setattr(session, "_tidy", lost)
    monkeypatch.setattr(os, "execv", replace)
    with pytest.raises(Replaced) as caught:
        command.main(["--tiny", "--out", str(tmp_path), "--again", "--rows", "one", "--minutes", "5"])
    *first, minutes, words, word = caught.value.args
    assert first == ["-m", "benchmarks.gpu", "--out", str(tmp_path), "--tiny", "--minutes"]
    assert (words, word) == ("--rows", "one")
    assert 0 < float(minutes) <= 5
    (path,) = tmp_path.glob("*.json")
    assert json.loads(path.read_text())["rows"]["one"]["state"] == "failed"  # and is not tried again there


def test_options_that_cannot_be_meant(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in ((["--tiny"], "--out"), (["--rows", "no-such"], "--list")):
        with pytest.raises(SystemExit):
            command.main(arguments)
        assert message in capsys.readouterr().err


# ---- numbers --------------------------------------------------------------------------------------------------


def test_calls_of_cuda_by_kind() -> None:
    few = totals({"cudaLaunchKernel": 7, "cuLaunchKernelEx": 2, "Memcpy HtoD (Pinned -> Device)": 1, "cudaMalloc": 3})
    assert few == {"launches": 9, "copies_to_device": 1}
    many = totals({"cudaLaunchKernelExC": 29, "Memcpy HtoD (Pageable -> Device)": 3, "cudaStreamSynchronize": 10})
    assert a_step(few, many, 10) == {"launches": 2, "copies_to_device": 0.2, "waits": 1}


def test_the_table_of_attention_says_what_was_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    fastest = {(1104, 16): "dense", (1104, 32): "gather", (4416, 16): "gather", (4416, 32): "flex"}
    rows = {
        str(length): {
            "found": {
                "choices": [
                    {"device": "cuda", "length": s, "head_width": width, "way": way}
                    for (s, width), way in fastest.items()
                    if s == length
                ]
            }
        }
        for length in (4416, 1104)
    }
    table = ways.attention_table(rows | {"norms": {"found": {}}, "other": {"why": "failed"}})
    assert table is not None
    before = {
        args: attention_ways.choose_way(*args) for args in (("cpu", 100, 16), ("cpu", 4416, 32), ("cuda", 100, 16))
    }
    monkeypatch.setattr(attention_ways, "way_rows", lambda: json.loads(table))
    for (length, width), way in fastest.items():
        assert attention_ways.choose_way("cuda", length, width) == way
    for args, way in before.items():
        assert attention_ways.choose_way(*args) == way
    assert attention_ways.choose_way("cuda", 10**6, 64) == "gather"
    assert ways.attention_table({"norms": {"found": {}}}) is None


def test_promises_are_those_of_the_rows_that_are_there() -> None:
    def network(to_unet: float, share: float) -> dict[str, float]:
        return {"ms": 1, "to_unet": to_unet, "share_of_product": share}

    others = {"diffusers": network(0.9, 0.5), "MONAI": "needs monai, einops"}
    rows = {
        "B train batch 32 eager": {
            "state": "done",
            "found": {"unet": network(1, 0.45), "hae-v2": network(1.2, 0.4), **others},
        },
        "B train batch 8 eager": {"state": "failed", "why": "full"},
        "B forward batch 1 compiled": {"state": "done", "found": {"unet": network(1, 0.1)}},
        "first step of train digits": {"state": "done", "found": {"seconds": 40}},
    }
    kept = {promise.name: promise.shortfall <= 0 for promise in promises(rows)}
    assert kept == {
        "B train batch 32 eager: hae-v2 / unet": True,
        "B train batch 32 eager: diffusers / unet": False,
        "B train batch 32 eager: share of a matrix product": True,
        "first step of train digits, s": False,
    }


def test_a_way_is_chosen_for_a_while() -> None:
    table = {"cpu": "kernel"}
    with ways.chosen_way(table, "cuda", "tokens"):
        assert table == {"cpu": "kernel", "cuda": "tokens"}
    assert table == {"cpu": "kernel"}
