"""Benchmarks of critics as published, each as questions with answers of known worth."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ctrl_hpc.data import judgebench, table
from ctrl_hpc.jsonl import well_formed
from ctrl_hpc.records import LabelledAnswers


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """How a benchmark is read."""

    about: str
    make: Callable[[table.Row], LabelledAnswers]
    hub: str | None = None
    """Its data set on the hub; None: only local files."""
    split: str = "test"
    """The split that is taken where none is asked for; ``CONFIG/SPLIT`` where it has configurations."""
    files: tuple[str, ...] = ()
    """The files of the hub's data set, where they are read by name."""
    n_answers: int = 2
    """Answers of a question, at most."""
    n_questions: int | None = None
    """Questions of its split on the hub; None: that depends on the split."""


def load(name: str, path: str | None, split: str | None = None) -> list[LabelledAnswers]:
    """The questions of a benchmark; rows that cannot be read are left out and named on stderr.

    Raises ValueError for an unknown name, or one that has no home on the hub and no path.
    """
    check(name, path)
    benchmark = BENCHMARKS[name]
    config, _, part = (split or benchmark.split).rpartition("/")
    rows = table.rows(path, hub=benchmark.hub or "", files=benchmark.files, config=config or None, split=part)
    loaded = table.collect(rows, benchmark.make)
    for line in table.lines(loaded.left_out):
        print(f"{name}: {line}", file=sys.stderr)
    return loaded.items


def check(name: str, path: str | None) -> None:
    """Raises ValueError for an unknown name, or one that has no home on the hub and no path."""
    if name not in BENCHMARKS:
        raise ValueError(f"{name!r} is no benchmark of critics; allowed: {', '.join(BENCHMARKS)}")
    if path is None and BENCHMARKS[name].hub is None:
        raise ValueError(f"{name}: its path is missing; it is read from a file: {BENCHMARKS[name].about}")


def size(name: str, path: str | None, split: str | None = None, n: int | None = None) -> tuple[int, int] | None:
    """Answers, and pairs, of the first ``n`` questions, to plan with: counted in local files, as published on the hub.

    None where that is not known.
    """
    benchmark = BENCHMARKS[name]
    if path is not None:
        questions = load(name, path, split)[:n]
        return sum(len(item.answers) for item in questions), sum(item.is_pair for item in questions)
    known = [count for count in (n, benchmark.n_questions if split in (None, benchmark.split) else None) if count]
    if not known:
        return None
    return min(known) * benchmark.n_answers, min(known) * (benchmark.n_answers == 2)


def _labelled(
    row: table.Row, name: str, category: str, question: str, answers: list[Any], worth: list[float]
) -> LabelledAnswers:
    if not answers or not all(isinstance(answer, str) for answer in answers):
        raise ValueError("answers: expected texts")
    if not all(0.0 <= value <= 1.0 for value in worth):
        raise ValueError(f"worth: {worth} is not within 0 and 1")
    return LabelledAnswers(
        id=name,
        category=well_formed(category),
        question=well_formed(question),
        answers=tuple(map(well_formed, answers)),
        worth=tuple(map(float, worth)),
        provenance=row.where,
    )


def _id(row: table.Row, *names: str) -> str:
    """The first of the columns that the row has, with the row's number: ids of published rows repeat."""
    found = next((str(row.values[name]) for name in names if row.values.get(name) is not None), "row")
    return f"{found}#{row.number}"


def _codejudgebench(row: table.Row) -> LabelledAnswers:
    """Pairs of codegen, coderepair (the program to be repaired and its error belong to the question) and testgen."""
    question = row.text("question_content")
    right, wrong = row.text("pos_response"), row.text("neg_response")
    if row.get("wrong_code") is not None:
        question = (
            "You are provided with a coding question, a piece of code, and the associated error message. \n"
            f"You need to generate a corrected version of the code.\n\n### Question\n{question}\n\n"
            f"### Program to be fixed:\n```python\n{row.text('wrong_code')}\n```\n\n\n"
            f"### Error Information:\n{_error(row.decoded('wrong_meta'))}"
        )
    elif row.get("pos_input") is not None:
        question = (
            "For the below coding question, give a unit test including test input and test output.\n"
            f"### Question\n{question}"
        )
        right, wrong = _unit_test(row.text("pos_input"), right), _unit_test(row.text("neg_input"), wrong)
    difficulty = str(row.get("difficulty", "unknown"))
    return _labelled(row, _id(row, "question_id"), difficulty, question, [right, wrong], [1.0, 0.0])


def _unit_test(given: str, expected: str) -> str:
    return f"### Test Input\n```\n{given}\n```\n\n### Test Output\n```\n{expected}\n```"


_ERRORS = {
    -1: ("got the following compilation error.", ("error",)),
    -2: ("got a wrong answer.", ("inputs", "output", "expected")),
    -3: ("got time limit exceeded.", ("error", "inputs", "expected")),
    -4: ("got a runtime error.", ("inputs", "expected", "error", "error_message")),
}
_TITLES = {"inputs": "Input:\n", "output": "Generated Output:\n", "expected": "Expected:\n"}


def _error(meta: Any) -> str:
    """What was wrong with the program to be repaired: by its code, what the row tells of it."""
    if not isinstance(meta, dict) or meta.get("error_code") not in _ERRORS:
        raise ValueError(f"wrong_meta: expected an error_code of {', '.join(map(str, _ERRORS))}")
    told, names = _ERRORS[meta["error_code"]]
    parts = [f"{_TITLES.get(name, '')}{meta[name]}" for name in names if meta.get(name) is not None]
    return "\n".join([f"The above code is incorrect and {told}", "\n\n".join(parts)])


def _codecriticbench(row: table.Row) -> LabelledAnswers:
    """Single answers, to code questions and to questions about code, labelled Correct or Error."""
    label = row.text("correctness")
    if label.lower() not in ("correct", "error"):
        raise ValueError(f"correctness: {label!r} is not one of Correct, Error")
    source = row.text("source")
    subset = str(row.get("subset", row.get("category", source))) if "stackoverflow" in source else source
    return _labelled(
        row, _id(row, "id"), subset, row.text("question"), [row.text("answer")], [float(label.lower() == "correct")]
    )


def _rewardbench2(row: table.Row) -> LabelledAnswers:
    """One right answer and three wrong ones, but for the subset Ties, which has several of both."""
    chosen, rejected = list(row["chosen"]), list(row["rejected"])
    worth = [1.0] * len(chosen) + [0.0] * len(rejected)
    return _labelled(row, str(row["id"]), row.text("subset"), row.text("prompt"), chosen + rejected, worth)


def _jetts(row: table.Row) -> LabelledAnswers:
    """Up to ten responses of a generator to a query, each with its score: the data of reranking and refinement."""
    query, responses = row["query"], list(row["responses"])
    worth = [float(response["metadata"]["score"]) for response in responses]
    answers = [response["content"] for response in responses]
    category = str((query.get("metadata") or {}).get("dataset", "all"))
    return _labelled(row, _id(row), category, query["content"], answers, worth)


def _judgebench(row: table.Row) -> LabelledAnswers:
    pair = judgebench.pair_of(row)
    worth = [1.0, 0.0] if pair.right == "A" else [0.0, 1.0]
    return _labelled(row, pair.id, pair.category, pair.question, [pair.answer_a, pair.answer_b], worth)


def _own(row: table.Row) -> LabelledAnswers:
    """``answers`` and ``worth`` (or ``right``: true or false of each), or one ``answer`` and ``right``."""
    name, category = _id(row, "id"), str(row.get("category", "all"))
    single = row.get("answer") is not None
    answers = [row["answer"]] if single else list(row["answers"])
    worth = row.get("worth", row.get("right"))
    worth = [worth] if single else worth
    if not isinstance(worth, list) or len(worth) != len(answers):
        raise ValueError(f"worth: expected a number, or right: true or false, for each of {len(answers)} answers")
    if not all(isinstance(value, bool | int | float) for value in worth):
        raise ValueError(f"worth: {worth}: expected numbers, or true or false")
    return _labelled(row, name, category, row.text("question"), answers, worth)


BENCHMARKS: dict[str, Benchmark] = {
    "codejudgebench": Benchmark(
        about="pairs: code generation, repair, unit tests (arXiv 2507.10535)",
        make=_codejudgebench,
        hub="mattymchen/codejudgebench",
        split="codegen/claude_3.7_sonnet",
    ),
    "codecriticbench": Benchmark(
        about="single answers, right or wrong (arXiv 2502.16614)",
        make=_codecriticbench,
        hub="m-a-p/CodeCriticBench",
        files=("data/CodeCriticBench.jsonl",),
        n_answers=1,
        n_questions=4300,
    ),
    "rewardbench2": Benchmark(
        about="best of four, and ties (arXiv 2506.01937)",
        make=_rewardbench2,
        hub="allenai/reward-bench-2",
        n_answers=4,
        n_questions=1865,
    ),
    "jetts": Benchmark(about="best of ten: a .jsonl of its reranking_and_refinement (arXiv 2504.15253)", make=_jetts),
    "judgebench": Benchmark(
        about="pairs (arXiv 2410.12784)",
        make=_judgebench,
        hub="ScalerLab/JudgeBench",
        split="gpt",
        n_questions=judgebench.SIZES["gpt"],
    ),
    "own": Benchmark(about='JSON lines: {"question", "answers": [...], "right": [true, ...]}', make=_own),
}
"""Every benchmark of critics, by name."""
