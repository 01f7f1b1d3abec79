"""The tiny world's grammar, problems and splits."""

from __future__ import annotations

import io
from contextlib import redirect_stdout

import numpy as np
import pytest

from ctrl_hpc.records import Problem, StdinTest
from ctrl_hpc.tiny import grammar
from ctrl_hpc.tiny import world as tiny
from ctrl_hpc.tiny.grammar import Composition


def output(program: str, stdin: str) -> str:
    """What a trusted program of the grammar prints, by plain execution in this process."""

    def fake_open(descriptor: int) -> io.StringIO:
        assert descriptor == 0
        return io.StringIO(stdin)

    with redirect_stdout(io.StringIO()) as printed:
        exec(program, {"open": fake_open})
    return printed.getvalue()


def passes(program: str, problem: Problem) -> bool:
    tests = [test for test in problem.tests if isinstance(test, StdinTest)]
    return all(output(program, test.stdin) == test.expected_stdout for test in tests)


def operation(slot: int, phrase: str) -> int:
    return [each.phrase for each in grammar.SLOTS[slot]].index(phrase)


@pytest.mark.parametrize(
    ("slot", "phrase", "value", "count", "result"),
    [
        (0, "keep the even ones", [3, -4, 0, 7], 4, [-4, 0]),
        (0, "keep the odd ones", [3, -5, 0, 8], 4, [3, -5]),
        (0, "keep those above five", [5, 6, -6], 3, [6]),
        (0, "drop multiples of three", [-3, -2, 0, 4], 4, [-2, 4]),
        (0, "skip every second one", [1, 2, 3, 4, 5], 5, [2, 4]),
        (0, "leave out the last", [1, 2, 3], 3, [1, 2]),
        (1, "cube each", [-2, 3], 2, [-8, 27]),
        (1, "halve each", [-3, 5], 2, [-2, 2]),
        (1, "keep the last digit", [-17, 25], 2, [7, 5]),
        (1, "drop the last digit", [-17, 5], 2, [1, 0]),
        (2, "sum with alternating signs", [5, 3, 1], 3, 3),
        (2, "find the largest", [], 3, 0),
        (2, "largest less smallest", [-1, 4, 2], 3, 5),
        (2, "sum the two largest", [9], 1, 9),
        (2, "count different values", [2, 2, 5], 3, 2),
        (2, "sum different values", [2, 2, 5], 3, 7),
        (3, "take it modulo seven", -1, 4, 6),
        (3, "take the line's length", 10, 4, 6),
    ],
)
def test_operation_means_what_it_says(slot: int, phrase: str, value: object, count: int, result: object) -> None:
    chosen = grammar.SLOTS[slot][operation(slot, phrase)]
    assert chosen.apply(value, count) == result
    names = {"x": value, "r": value, "line": "7 " * count}
    exec(chosen.code, names)
    assert names["x" if slot < 2 else "r"] == result


def test_hand_worked_problem() -> None:
    composition = (operation(0, "keep the odd ones"), operation(1, "square each"), 0, operation(3, "negate it"))
    assert grammar.prompt(composition) == (
        "For each line of integers: keep the odd ones; square each; sum up; negate it; print it."
    )
    # 3, -5 and 1 are odd: 9 + 25 + 1
    assert output(grammar.program(composition), "3 4 -5 1\n2 4\n") == "-35\n0\n"


def test_operations_agree_with_their_programs() -> None:
    lines = tiny.input_lines(np.random.default_rng(5), 12)
    stdin = "".join(" ".join(map(str, line)) + "\n" for line in lines)
    answers_FMTEL = grammar.answers(lines)
    rng = np.random.default_rng(6)
    for _ in range(300):
        composition = tuple(int(rng.integers(size)) for size in grammar.SIZES)
        printed = output(grammar.program(composition), stdin)
        assert [int(text) for text in printed.split()] == answers_FMTEL[composition].tolist()


def test_programs_parse_to_their_compositions() -> None:
    composition = (3, 1, 4, 9)
    text = grammar.program(composition)
    assert grammar.parse(text) == composition
    assert grammar.parse(text + "\n") == composition
    assert grammar.parse(text.replace("print", "return")) is None
    assert grammar.parse("") is None


def test_partners_are_mutual_and_of_the_same_slot() -> None:
    for slot in grammar.SLOTS:
        assert len(slot) % 2 == 0
        assert [grammar.partner(grammar.partner(i)) for i in range(len(slot))] == list(range(len(slot)))
    phrases = [each.phrase for slot in grammar.SLOTS for each in slot]
    codes = [each.code for slot in grammar.SLOTS for each in slot]
    assert len(set(phrases)) == len(set(codes)) == len(phrases)


def test_counts_and_sizes() -> None:
    world = tiny.world()
    counts = world.counts
    assert counts.compositions == 12 * 10 * 10 * 10
    assert sum(counts.problems.values()) == counts.compositions - counts.indistinct == len(world.compositions)
    assert counts.problems["train"] > 5000
    assert counts.problems["dev"] >= 600
    assert counts.problems["test"] >= 600
    assert counts.groups < sum(counts.problems.values())


def test_load_is_deterministic_and_seeded() -> None:
    first = [problem.id for problem in tiny.load()["test"]]
    tiny.world.cache_clear()
    assert [problem.id for problem in tiny.load()["test"]] == first
    assert [problem.id for problem in tiny.world(1).splits["test"]] != first


def test_splits_are_disjoint_in_meaning() -> None:
    """Compared on inputs the generation never saw: programs that agree there lie in one split."""
    lines = tiny.input_lines(np.random.default_rng(99), 150)
    answers_FMTEL = grammar.answers(lines)
    world = tiny.world()
    split_of: dict[bytes, str] = {}
    for split, problems in world.splits.items():
        for problem in problems:
            assert problem.split == split
            signature = answers_FMTEL[world.compositions[problem.id]].tobytes()
            assert split_of.setdefault(signature, split) == split, problem.id


def confusions(composition: Composition) -> list[Composition]:
    """The four compositions in which one step is taken for its partner."""
    out = []
    for slot, operation in enumerate(composition):
        mutant = list(composition)
        mutant[slot] = grammar.partner(operation)
        out.append((mutant[0], mutant[1], mutant[2], mutant[3]))
    return out


def test_canonical_solutions_pass_and_confusions_fail() -> None:
    world = tiny.world()
    problems = [problem for members in world.splits.values() for problem in members][::23]
    for problem in problems:
        assert problem.canonical_solution is not None
        assert passes(problem.canonical_solution, problem), problem.id
        for mutant in confusions(world.compositions[problem.id]):
            assert not passes(grammar.program(mutant), problem), (problem.id, mutant)
