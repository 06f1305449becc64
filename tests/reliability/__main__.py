"""Inject all faults and print the table of what came of them: ``make test-reliability``.

python -m tests.reliability [ROW]... [--workers 2]
"""

import argparse
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from tests.reliability.rows import ROWS

TESTS = Path(__file__).parents[1]


class Results:
    """Outcomes of the tests of each row."""

    def __init__(self, rows: list[int]):
        self.rows = rows
        self.tests: list[str] = []
        self.outcomes: dict[int, Counter[str]] = defaultdict(Counter)

    def rows_of(self, test: str) -> list[int]:
        name = test.removeprefix("tests/")
        return [row for row in self.rows if name.startswith(ROWS[row].tests)]

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        self.tests = [item.nodeid for item in items if self.rows_of(item.nodeid)]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            for row in self.rows_of(report.nodeid):
                self.outcomes[row][report.outcome] += 1

    def result(self, row: int) -> str:
        found = self.outcomes[row]
        if not found:
            return "no test ran"
        parts = [f"{found[outcome]} {outcome}" for outcome in ("failed", "passed", "skipped") if found[outcome]]
        return ("pass: " if found["passed"] and not found["failed"] else "FAIL: ") + ", ".join(parts)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("rows", nargs="*", type=int, default=sorted(ROWS))
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    results = Results(options.rows)
    files = sorted({str(TESTS / test.partition("::")[0]) for row in options.rows for test in ROWS[row].tests})
    pytest.main([*files, "--collect-only", "-qqq"], plugins=[results])
    code = int(pytest.main([*results.tests, "-q", "-n", str(options.workers)], plugins=[results]))
    for number in options.rows:
        row = ROWS[number]
        print(f"{number:2} {row.fault}\n   injected: {row.injected}\n   {results.result(number)}")
    passed = sum(results.result(row).startswith("pass") for row in options.rows)
    print(f"{passed} of {len(options.rows)} rows pass")
    return code or int(passed < len(options.rows))


if __name__ == "__main__":
    sys.exit(main())
