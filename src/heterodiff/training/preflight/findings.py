"""Results of the checks before a run, a line each."""

from heterodiff.errors import ConfigError, visible


class Findings:
    """Print each result as it is found.

    Attributes:
        passed: whether no check has failed so far.
    """

    def __init__(self) -> None:
        self.passed = True

    def add(self, passed: bool, name: str, text: str) -> None:
        self.passed &= passed
        print(f"{'pass' if passed else 'FAIL'}  {name:10} {visible(text)}", flush=True)

    def note(self, text: str, name: str = "") -> None:
        print(f"note  {name:10} {visible(text)}", flush=True)


class Rows(Findings):
    """Keep the results as ``rows`` of (name, text); a check that fails raises ConfigError."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[str, str]] = []

    def add(self, passed: bool, name: str, text: str) -> None:
        if not passed:
            raise ConfigError(f"{name}: {text}")
        self.rows.append((name, text))

    def note(self, text: str, name: str = "") -> None:
        self.rows.append(("note", text))
