"""Print the packages that heterodiff needs, with their licences, as in dependencies.md.

    python docs/dependencies.py > docs/dependencies.md

Names and licences are those of the packages installed here; nothing is fetched.
"""

import re
from importlib.metadata import Distribution, distribution

HEAD = """# Dependencies

Packages that `pip install heterodiff` and its extras `mri` and `datasets` install, directly or through another, and the
licences that they declare. `python docs/dependencies.py` prints this page from the installed packages, without network.
CUDA packages, which torch brings on Linux with a GPU, are NVIDIA's and under its own licences; they are not listed.

Known vulnerabilities change from day to day: `pip install pip-audit && pip-audit` compares the packages installed with
the public lists. No package is fetched or updated by heterodiff itself.

| package | version | licence | needed by |
|---|---|---|---|"""


def needed_by(root: str, extras: set[str]) -> dict[str, set[str]]:
    """Return the packages below ``root`` and what needs each of them."""
    found: dict[str, set[str]] = {}
    waiting = [(root, extras)]
    while waiting:
        name, wanted = waiting.pop()
        for line in distribution(name).requires or []:
            requirement, _, marker = line.partition(";")
            extra = re.search(r"extra == ['\"]([\w-]+)['\"]", marker)
            if extra and extra[1] not in wanted:
                continue
            match = re.match(r"[\w.-]+", requirement.strip())
            assert match is not None
            package = re.sub(r"[-_.]+", "-", match[0]).lower()
            try:
                distribution(package)
            except ModuleNotFoundError:  # of another system or version of Python
                continue
            if package not in found:
                waiting.append((package, set()))
            found.setdefault(package, set()).add(distribution(name).metadata["Name"])
    return found


def licence(package: Distribution) -> str:
    """Return what the package declares."""
    metadata = package.metadata
    if expression := metadata["License-Expression"]:
        return str(expression)
    classifiers = [
        line.split(" :: ")[-1] for line in metadata.get_all("Classifier") or [] if line.startswith("License")
    ]
    return ", ".join(classifiers) or (metadata["License"] or "not declared").splitlines()[0]


if __name__ == "__main__":
    print(HEAD)
    for name, users in sorted(needed_by("heterodiff", {"mri", "datasets"}).items()):
        package = distribution(name)
        print(f"| {name} | {package.version.partition('+')[0]} | {licence(package)} | {', '.join(sorted(users))} |")
