"""docs/hazards.md is complete: every hazard once, every test with its number, none made up."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STATES = {"held", "partly", "open"}
NUMBERS = range(1, 53)


@pytest.fixture(scope="module")
def rows():
    """number -> (state, what is open, tests)"""
    found = {}
    for line in (ROOT / "docs" / "hazards.md").read_text().splitlines():
        if match := re.match(r"\| H(\d+) \|", line):
            number = int(match[1])
            assert number not in found, f"H{number} stands there twice"
            _, _, _, _, state, reason, tests, _ = (cell.strip() for cell in line.split("|"))
            found[number] = (state, reason, set(re.findall(r"`(test_\w+)`", tests)))
    return found


def numbered_tests() -> Iterator[tuple[int, str]]:
    """(hazard, test) of every test whose name begins with one or more numbers."""
    for path in (ROOT / "tests").rglob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                match = re.match(r"test_((?:h\d+_)+)", node.name)
                for number in re.findall(r"h(\d+)_", match[1]) if match else ():
                    yield int(number), node.name


def test_every_hazard_stands_there_once_with_a_state(rows):
    assert sorted(rows) == list(NUMBERS)
    assert {state for state, _, _ in rows.values()} <= STATES


def test_what_is_held_has_tests_and_what_is_not_a_reason(rows):
    for number, (state, reason, tests) in rows.items():
        assert bool(tests) or state == "open", f"H{number} has no test"
        assert bool(reason) == (state != "held"), f"H{number}: a reason, if it is not held"


def test_the_page_and_the_tests_name_each_other(rows):
    by_number = {number: set() for number in NUMBERS}
    for number, name in numbered_tests():
        by_number[number].add(name)

    assert {number: tests for number, (_, _, tests) in rows.items()} == by_number
