"""A world of one-line programs for tests of the evaluation: prompt ``say K``, right program ``print(K)``.

The generator's drafts are wrong for every third K; it follows a critique that says ``use X``. The critic's folder holds
its skill: the share of drafts that it judges rightly, and for which it names the right program.
"""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

from ctrl_hpc.records import Generation, Problem, StdinTest, TestResult, Verdict

DIFFICULTIES = ("easy", "hard")


def problems(count: int) -> list[Problem]:
    """Problems ``toy/0`` and on."""
    return [
        Problem(
            id=f"toy/{k}",
            source="toy",
            split="test",
            prompt=f"say {k}",
            tests=(StdinTest(stdin="", expected_stdout=f"{k}\n"),),
            difficulty=DIFFICULTIES[k % 2],
            canonical_solution=f"print({k})",
        )
        for k in range(count)
    ]


def fenced(number: int) -> str:
    """An answer."""
    return f"```python\nprint({number})\n```"


def folder(path: Path, skill: float) -> Path:
    """A critic's model folder."""
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")
    (path / "skill").write_text(str(skill))
    return path


class Generator:
    """The fixed generator; counts what it is asked, and fails when it has answered ``patience`` chats."""

    def __init__(self, patience: float = float("inf")) -> None:
        self.patience, self.asked = patience, 0

    def complete(self, chats: Any, sampling: Any) -> list[list[Generation]]:
        out = []
        for i, chat in enumerate(chats):
            self.asked += 1
            if self.asked > self.patience:
                raise KeyboardInterrupt
            k = int(re.search(r"say (\d+)", chat[0].content)[1])
            if len(chat) == 1:
                rng = random.Random(f"{sampling.seed} {i}")
                out.append(
                    [
                        Generation(text=fenced(k + (k % 3 == 0 or (sampling.temperature > 0 and rng.random() < 0.1))))
                        for _ in range(sampling.n)
                    ]
                )
            else:
                named = re.search(r"use (\d+)", chat[2].content)
                out.append([Generation(text=fenced(int(named[1]) if named else k + 7))])
        return out


class Critic:
    """The critic's servers."""

    def __init__(self) -> None:
        self.loads: list[tuple[str, int]] = []
        self.asked = 0

    def update_weights(self, place: str, version: int) -> int:
        self.loads.append((place, version))
        self.skill = float((Path(place) / "skill").read_text())
        return 1

    def complete(self, chats: Any, sampling: Any) -> list[list[Generation]]:
        out = []
        for i, chat in enumerate(chats):
            self.asked += 1
            text = chat[0].content
            k, said = int(re.search(r"say (\d+)", text)[1]), int(re.search(r"print\((\d+)\)", text)[1])
            row = []
            for j in range(sampling.n):
                rng = random.Random(f"{sampling.seed} {i} {j}" if sampling.temperature else f"{k} {said}")
                able = rng.random() < self.skill
                judgement = "Correct" if (k == said) == able else "Incorrect"
                advice = f"use {k}" if able else "look again"
                critique = f"Analysis: ...\nImprovement suggestions: {advice}\nOverall judgment: {judgement}"
                row.append(Generation(text=critique, token_ids=(1, 2, 3)))
            out.append(row)
        return out


class Executor:
    """Compares the printed number; a program that prints 666 makes the sandbox fail."""

    def __init__(self) -> None:
        self.programs: list[str] = []

    def run_many(self, executions: Any) -> list[Verdict]:
        out = []
        for execution in executions:
            self.programs.append(execution.program)
            number = re.fullmatch(r"print\((\d+)\)", execution.program)[1]
            if number == "666":
                out.append(Verdict(status="sandbox_error", detail="gone"))
                continue
            right = execution.tests[0].expected_stdout == number + "\n"
            status = "accepted" if right else "wrong_answer"
            out.append(Verdict(status=status, tests=(TestResult(status=status, stdout=f"{number}\n".encode()),)))
        return out


class Connections:
    """What the evaluation talks to."""

    def __init__(self, patience: float = float("inf")) -> None:
        self.generator, self.critic, self.executor = Generator(patience), Critic(), Executor()
