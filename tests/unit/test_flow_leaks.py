"""Critiques that hold the answer, and those that only explain."""

import pytest

from ctrl_hpc.flow.reward import leaks_solution

DRAFT = "n = int(input())\ntotal = 0\nfor i in range(n):\n    total += i\nprint(total)"
FIXED = "n = int(input())\nprint(sum(value * value for value in range(1, n + 1)))"
LONG = "import sys\nnumbers = sys.stdin.read().split()\nvalues = list(map(int, numbers))\nprint(sum(values))"


@pytest.mark.parametrize(
    ("critique", "revision", "leaks"),
    [
        ("The loop starts at 0 and should start at 1; square each value.", FIXED, False),
        (f"Your code:\n```python\n{DRAFT}\n```\nThe range is wrong.", FIXED, False),
        ("Use this:\n```python\na = 1\nb = 2\nc = 3\nd = 4\nprint(a + b + c + d)\n```", FIXED, True),
        ("Change the line to `range(1, n + 1)`.\n```python\nfor i in range(1, n + 1):\n```", FIXED, False),
        ("Write\n- `numbers = sys.stdin.read().split()`\n- `values = list(map(int, numbers))`\nand print.", LONG, True),
        ("Read everything with sys.stdin.read, and sum it.", LONG, False),
        ("", None, False),
    ],
)
def test_what_counts_as_a_leak(critique, revision, leaks):
    assert leaks_solution(critique, DRAFT, revision) is leaks


def test_without_a_draft_any_long_block_is_a_leak():
    assert leaks_solution(f"```python\n{DRAFT}\n```", None, None)
