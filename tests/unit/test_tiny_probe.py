"""The conditions of an honest reward, measured on scripted models."""

from __future__ import annotations

from collections.abc import Sequence

from ctrl_hpc.flow.prompts import Prompts
from ctrl_hpc.flow.text import extract_program
from ctrl_hpc.records import Chat, Execution, Generation, Sampling, StdinTest, TestResult, Verdict
from ctrl_hpc.tiny import grammar, text, world
from ctrl_hpc.tiny.probe import TOLD, Condition, probe

PROBLEMS = world.world().splits["dev"][:60]
COMPOSITIONS = {problem.prompt: world.composition_of(problem) for problem in PROBLEMS}
ORDER = {problem.prompt: number for number, problem in enumerate(PROBLEMS)}


class ScriptedGenerator:
    """Right about every second problem; takes advice at its word, or never changes a right program."""

    def __init__(self, obedient: bool) -> None:
        self.obedient = obedient

    def complete(self, chats: Sequence[Chat], sampling: Sampling) -> list[list[Generation]]:
        return [[Generation(text=text.answer(self.write(chat)))] * sampling.n for chat in chats]

    def write(self, chat: Chat) -> tuple[int, int, int, int]:
        wanted = COMPOSITIONS[chat[0].content]
        if len(chat) == 1:
            slip = text.replaced(wanted, 2, grammar.partner(wanted[2]))
            return wanted if ORDER[chat[0].content] % 2 else slip
        draft = grammar.parse(extract_program(chat[1].content) or "")
        assert draft is not None
        advice = chat[2].content.split("\n")[1].removeprefix("Improvement suggestions:")
        if "Overall judgment: Correct" in chat[2].content or (draft == wanted and not self.obedient):
            return draft
        named = [slot for slot, operation in enumerate(wanted) if advice == text.suggestion(slot, operation)]
        slot = named[0] if named else 0
        return text.follow(draft, slot, wanted[slot])


class ScriptedCritic:
    """Says Correct every second time."""

    def complete(self, chats: Sequence[Chat], sampling: Sampling) -> list[list[Generation]]:
        said = [Generation(text=f"Overall judgment: {verdict}") for verdict in ("Correct", "Incorrect")]
        return [[said[number % 2] for number in range(sampling.n)] for _ in chats]


class GrammarExecutor:
    """Judges programs of the grammar by their meaning."""

    def run_many(self, executions: Sequence[Execution]) -> list[Verdict]:
        return [self.judge(execution) for execution in executions]

    def judge(self, execution: Execution) -> Verdict:
        composition = grammar.parse(execution.program)
        assert composition is not None
        tests = [test for test in execution.tests if isinstance(test, StdinTest)]
        right = all(grammar.run(composition, test.stdin) == test.expected_stdout for test in tests)
        status = "accepted" if right else "wrong_answer"
        return Verdict(status=status, tests=tuple(TestResult(status=status) for _ in tests))


def measure(obedient: bool) -> list[Condition]:
    generator = ScriptedGenerator(obedient)
    return probe(PROBLEMS, generator, ScriptedCritic(), GrammarExecutor(), Prompts.load("tiny"))


def test_an_obedient_generator_keeps_the_reward_honest() -> None:
    conditions = measure(obedient=True)
    assert [condition.value for condition in conditions] == [0.5, 0.0, 0.5, 1.0, 0.0, 0.0, 0.0, 1.0]
    assert all(condition.ok for condition in conditions)


def test_a_generator_that_leaves_right_programs_alone_is_found_out() -> None:
    conditions = measure(obedient=False)
    assert [condition.name for condition in conditions if not condition.ok] == [
        told.name for told in TOLD if not told.mistaken_step and not told.correct
    ]
    assert [condition.value for condition in conditions[4:7]] == [1.0, 1.0, 1.0]
