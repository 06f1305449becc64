"""Finding one's way on the command line: help in groups, completion, and both without heavy imports."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from heterodiff.cli import app, main

HEAVY = ("torch", "numpy", "diffusers", "pydantic")


def fresh(code: str, **environment: str) -> str:
    """Standard output of ``code`` in a fresh interpreter."""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_command_is_in_a_group(capsys: pytest.CaptureFixture) -> None:
    groups = [command.rich_help_panel for command in app.registered_commands]
    assert set(groups) == {"Start", "Data", "Train", "Use a run"}
    with pytest.raises(SystemExit):
        main(["--help"])
    printed = capsys.readouterr().out
    assert printed.index("─ Start ─") < printed.index("─ Data ─") < printed.index("─ Train ─") < printed.index("─ Use")
    assert "─ Commands ─" not in printed


def test_help_loads_nothing_heavy() -> None:
    code = f"""
import sys
from heterodiff.cli import main
try:
    main(["--help"])
except SystemExit:
    print("heavy:", [name for name in {HEAVY} if name in sys.modules])
"""
    assert fresh(code).splitlines()[-1] == "heavy: []"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("heterodiff te", ["text2image"]),
        ("heterodiff e", ["edit", "encode", "evaluate"]),
        ("heterodiff train digits --dr", ["--dry-run"]),
    ],
)
def test_shell_completes_commands_and_options(words: str, expected: list[str]) -> None:
    completed = fresh(
        "from heterodiff.cli import main; main()",
        _HETERODIFF_COMPLETE="complete_bash",
        COMP_WORDS=words,
        COMP_CWORD=str(len(words.split()) - 1),
    )
    assert sorted(completed.split()) == expected


def test_completion_is_installed_for_the_name_of_the_program(tmp_path: Path) -> None:
    detected = "import shellingham; shellingham.detect_shell = lambda *_: ('bash', '/bin/bash')"
    fresh(f"{detected}; from heterodiff.cli import main; main(['--install-completion'])", HOME=str(tmp_path))
    (script,) = (tmp_path / ".bash_completions").iterdir()
    assert script.name == "heterodiff.sh"
    assert str(script) in (tmp_path / ".bashrc").read_text()
    assert "_HETERODIFF_COMPLETE=complete_bash" in script.read_text()
