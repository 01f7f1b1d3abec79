"""Programs that try to break out, to overload their jail, to leave something behind, or to cheat (``attacks/*.toml``).

Each prints ``ESCAPED`` when it got what it must not get. Those with ``statuses`` must end with one of them, others must
simply be contained and never accepted; none may cause a ``sandbox_error``. ``before`` runs first in the same jail, and
is judged as well: it ends as no fault of the sandbox's, and with one of ``before_statuses`` where they stand.
"""

from __future__ import annotations

import platform
import tomllib
from dataclasses import dataclass
from pathlib import Path

from ctrl_hpc.records import AssertTest, Execution, FunctionTest, Limits, StdinTest, TestCase, Verdict
from ctrl_hpc.sandbox import Sandbox

SECRET = "swordfish-7319"
"""The expected output, and a word of earlier programs, that no program may ever see."""
LIMITS = Limits(cpu_s=0.6, wall_s=2.0, memory_mb=128, output_bytes=100_000, processes=16)
_ADD_CHECK = """
def check(candidate):
    assert candidate(2, 3) == 5
    assert abs(candidate(0.5, 0.25) - 0.75) < 1e-6
    assert candidate([1], [2]) == [1, 2] and candidate("a", "b") == "ab"
    assert all(candidate(n, 1) == n + 1 for n in range(5))
check(add)
"""
_STDIN = StdinTest(stdin="", expected_stdout=SECRET)
_REWARD_TESTS: tuple[TestCase, ...] = (
    _STDIN,
    AssertTest(code=_ADD_CHECK),
    FunctionTest(name="add", args=(1234, 4321), expected=5555),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Attack:
    """A program, its class, how it may end, and what runs before it."""

    group: str
    name: str
    program: str
    statuses: tuple[str, ...] = ()
    before: str | None = None
    before_statuses: tuple[str, ...] = ()
    language: str | None = None

    @property
    def executions(self) -> list[Execution]:
        """What is run, in order, in one jail."""
        tests = _REWARD_TESTS if self.group == "reward_hacks" else (_STDIN,)
        if self.language is not None:
            tests = (_STDIN,)
        last = Execution(program=self.program, tests=tests, limits=LIMITS, language=self.language)
        if self.before is None:
            return [last]
        planted = StdinTest(stdin=f"{SECRET}\n" * 1000, expected_stdout="")
        return [Execution(program=self.before, tests=(planted,), limits=LIMITS, language=self.language), last]


def load() -> list[Attack]:
    """All attacks, in the files' order."""
    attacks = []
    for path in sorted((Path(__file__).parent / "attacks").glob("*.toml")):
        if path.stem.endswith("_x86_64") and platform.machine() != "x86_64":
            continue
        entries = tomllib.loads(path.read_text(encoding="utf-8"))
        prelude, before_prelude = entries.pop("prelude", ""), entries.pop("before_prelude", "")
        for name, entry in entries.items():
            before = entry.get("before")
            attacks.append(
                Attack(
                    group=path.stem,
                    name=name,
                    program=prelude + entry["program"],
                    statuses=tuple(entry.get("statuses", ())),
                    before=None if before is None else before_prelude + before,
                    before_statuses=tuple(entry.get("before_statuses", ())),
                )
            )
    return attacks


def run(attacks: list[Attack], *, fresh: bool) -> list[list[Verdict]]:
    """The verdicts of every attack, one after the other on one worker."""
    with Sandbox(workers=1, fresh=fresh) as sandbox:
        return [sandbox.run_many(attack.executions) for attack in attacks]


def complaint(attack: Attack, verdicts: list[Verdict]) -> str:
    """What is wrong with how an attack ended; empty when it was contained."""
    for before in verdicts[:-1]:
        if before.status == "sandbox_error" or b"ESCAPED" in before.tests[0].stdout:
            return f"what came before: {before.status}: {before.detail}"
        if attack.before_statuses and before.status not in attack.before_statuses:
            return f"what came before ended with {before.status}, not one of {', '.join(attack.before_statuses)}"
    verdict = verdicts[-1]
    for test in verdict.tests:
        if b"ESCAPED" in test.stdout:
            return f"escaped: {test.stdout[:300]!r}"
        if SECRET.encode() in test.stdout + test.stderr:
            return "saw the secret"
        if test.status == "sandbox_error":
            return f"caused a sandbox fault: {test.stderr!r}"
        if test.status == "accepted":
            return "was accepted"
    if attack.statuses and verdict.status not in attack.statuses:
        return f"ended with {verdict.status}, not one of {', '.join(attack.statuses)}: {verdict.tests[0]}"
    if not attack.statuses and attack.group != "reward_hacks" and verdict.status != "wrong_answer":
        return f"did not run to its end: {verdict.status}: {verdict.tests[0]}"
    return ""
