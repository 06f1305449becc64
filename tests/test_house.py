"""How the package is built: who may import whom, how many files a folder holds, how docstrings begin."""

import ast
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

import heterodiff

SOURCE = Path(heterodiff.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))
FLOORS: tuple[tuple[str, ...], ...] = (
    ("__main__",),
    ("cli",),
    ("demo",),
    ("compat",),
    ("evaluation", "report", "training"),
    ("latents", "metrics", "pipelines"),
    ("simulators",),
    ("data", "text"),
    ("codecs", "compiling", "diffusion", "run_folder"),
    ("config",),
    ("models",),
    ("devices", "files", "image_spec", "pictures", "progress"),
    ("errors", "lazy", "memory"),
)
"""From top to bottom; a file imports from lower floors and from its own room."""
FREE = ("__init__", "tasks")  # the version; the table of tasks, which names what it needs as "module:name"
ROOMS = [path.parent.name for path in SOURCE.glob("*/__init__.py")]


def room_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported(node: ast.AST) -> Iterator[str]:
    """Names of the rooms that ``node`` imports from, at once or in a function; imports for types alone do not count."""
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
        return
    if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "heterodiff":
        parts = (node.module or "").split(".")
        names = [parts[1]] if len(parts) > 1 else [alias.name for alias in node.names]
        yield from (
            name if (SOURCE / name).is_dir() or (SOURCE / f"{name}.py").is_file() else "__init__" for name in names
        )
    if isinstance(node, ast.Import):
        yield from (
            (alias.name + ".__init__").split(".")[1] for alias in node.names if alias.name.startswith("heterodiff")
        )
    for child in ast.iter_child_nodes(node):
        yield from imported(child)


def imports(path: Path) -> set[str]:
    return set(imported(ast.parse(path.read_text("utf-8")))) - {room_of(path)}


def test_each_room_has_a_floor() -> None:
    rooms = {room_of(path) for path in FILES}
    assert rooms == {name for floor in FLOORS for name in floor} | set(FREE)


@pytest.mark.parametrize("floor", range(len(FLOORS)), ids=lambda number: FLOORS[number][0])
def test_a_file_imports_from_lower_floors_only(floor: int) -> None:
    below = {name for names in FLOORS[floor + 1 :] for name in names} | set(FREE)
    wrong = {
        path.relative_to(SOURCE).as_posix(): above
        for path in FILES
        if room_of(path) in FLOORS[floor] and (above := imports(path) - below)
    }
    assert not wrong


def test_the_large_rooms_know_few_others() -> None:
    """At most 35 % of the pairs that training, evaluation, pipelines and data could make with the other packages."""
    large = ("training", "evaluation", "pipelines", "data")
    known = {name: set[str]() for name in large}
    for path in FILES:
        if room_of(path) in large:
            known[room_of(path)] |= imports(path) & set(ROOMS)
    pairs = sum(map(len, known.values()))
    assert pairs <= 0.35 * len(large) * (len(ROOMS) - 1), known
    assert known["data"] == {"config"}


def test_no_folder_has_more_than_14_files() -> None:
    folders = [path.parent for path in FILES]
    assert max(folders.count(folder) for folder in folders) <= 14


def test_docstrings_begin_with_what_they_are_about() -> None:
    """A noun phrase or a verb, not the middle of a sentence."""
    half = ("Of", "From", "What", "Whether", "Where", "How", "Which", "So")
    found = [
        f"{path.relative_to(SOURCE)}: {text.splitlines()[0]}"
        for path in FILES
        for text in docstrings(ast.parse(path.read_text("utf-8")))
        if text.split()[0] in half
    ]
    assert not found


def docstrings(tree: ast.Module) -> Iterator[str]:
    """Docstrings of a file, of attributes too."""
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if not isinstance(body, list):
            continue
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (text := ast.get_docstring(node)):
            yield text
        for before, after in pairwise(body):
            if isinstance(before, ast.Assign | ast.AnnAssign) and isinstance(after, ast.Expr):
                text = getattr(after.value, "value", None)
                if isinstance(text, str):
                    yield text
