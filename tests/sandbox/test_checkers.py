"""Checkers in C++ as special judges: testlib's conventions, in a jail that no program sees."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from ctrl_hpc.flow.steps import execution
from ctrl_hpc.records import Execution, Limits, Problem, Rules, StdinTest, TestResult
from ctrl_hpc.sandbox import Sandbox, checkers, languages
from ctrl_hpc.sandbox.cache import VerdictCache

pytestmark = pytest.mark.alone  # short limits

LIMITS = Limits(cpu_s=1.0, wall_s=4.0, memory_mb=128)
DIVISOR = r"""
#include <cstdio>
#include <cstdlib>
int main(int count, char **paths) {
    if (count != 4) return 3;
    FILE *input = fopen(paths[1], "r"), *output = fopen(paths[2], "r"), *answer = fopen(paths[3], "r");
    long n, d, most;
    if (!input || !output || !answer || fscanf(input, "%ld", &n) != 1 || fscanf(answer, "%ld", &most) != 1) return 3;
    if (fscanf(output, "%ld", &d) != 1) { fputs("a number is missing", stderr); return 2; }
    if (d == 77) for (;;) ;
    if (d == 78) abort();
    if (d == 79) { fputs("the answer is wrong", stderr); return 3; }
    if (d < 1 || d > most || n % d) { fprintf(stderr, "%ld does not divide %ld", d, n); return 1; }
    return 0;
}
"""
"""Any divisor up to the answer will do."""
WORDS = """
#include "testlib.h"
int main(int argc, char *argv[]) {
    registerTestlibCmd(argc, argv);
    while (!ans.seekEof()) {
        std::string expected = ans.readWord(), found = ouf.readWord();
        if (upperCase(expected) != upperCase(found)) quitf(_wa, "expected %s", expected.c_str());
    }
    if (!ouf.seekEof()) quitf(_pe, "more words than expected");
    quitf(_ok, "all words");
}
"""
TEST = StdinTest(stdin="12\n", expected_stdout="6\n")


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(workers=2) as sandbox:
        yield sandbox


def judged(sandbox: Sandbox, program: str, checker: str = DIVISOR, test: StdinTest = TEST) -> TestResult:
    asked = Execution(program=program, tests=(test,), limits=LIMITS, checker=checker)
    return sandbox.submit(asked).result().tests[0]


@pytest.mark.parametrize(
    ("program", "status", "word"),
    [
        ("print(4)", "accepted", ""),
        ("print(6)", "accepted", ""),
        ("print(12)", "wrong_answer", "12 does not divide 12"),
        ("print(5)", "wrong_answer", "5 does not divide 12"),
        ("print('x')", "wrong_answer", "a number is missing"),
        ("print(78)", "unsupported", "checker"),
        ("print(79)", "unsupported", "the answer is wrong"),
        ("print(4); 1 / 0", "runtime_error", "ZeroDivisionError"),
        ("while True: pass", "time_limit", ""),
        ("print(open('/tmp/answer').read())", "runtime_error", "FileNotFoundError"),
    ],
)
def test_a_checker_judges(sandbox: Sandbox, program: str, status: str, word: str) -> None:
    result = judged(sandbox, program)
    assert (result.status, word in result.stderr.decode()) == (status, True)


def test_a_checker_that_never_ends_ends(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkers, "_LIMITS", LIMITS)
    assert judged(sandbox, "print(77)").status == "unsupported"
    assert judged(sandbox, "print(4)").status == "accepted"


def test_programs_in_cpp_and_checkers(sandbox: Sandbox) -> None:
    problem = Problem(
        id="p", source="s", split="test", prompt="Divide.", tests=(TEST,), language="cpp", checker=DIVISOR
    )
    for number, status in ((3, "accepted"), (5, "wrong_answer")):
        asked = execution(problem, f'#include <cstdio>\nint main() {{ printf("{number}"); }}', Rules(limits=LIMITS))
        assert sandbox.submit(asked).result().status == status


def test_what_cannot_judge_is_no_wrong_answer(sandbox: Sandbox) -> None:
    broken = judged(sandbox, "print(4)", checker="int main() { return x; }")
    assert broken.status == "unsupported" and b"the checker does not compile" in broken.stderr
    large = replace(TEST, expected_stdout="6\n" + " " * (17 << 20))
    result = judged(sandbox, "print(4)", test=large)
    assert result.status == "unsupported" and b"too large for a checker" in result.stderr


def test_without_testlib_a_checker_that_includes_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(languages, "TESTLIB", Path("/nowhere/testlib.h"))
    with pytest.raises(ValueError, match=r"checker: it includes testlib\.h; say where that is: executor\.testlib"):
        languages.check_checker(WORDS, languages.testlib(""))
    with pytest.raises(ValueError, match=r"testlib: cannot read /nowhere/else: No such file"):
        languages.testlib("/nowhere/else")


def test_verdicts_depend_on_the_checker(tmp_path: Path) -> None:
    cache = VerdictCache(tmp_path)
    plain = Execution(program="print(4)", tests=(TEST,), limits=LIMITS)
    keys = {cache.key(replace(plain, checker=text)) for text in (None, DIVISOR, DIVISOR + "// 2")}
    assert len(keys) == 3 and json.dumps(sorted(keys))


PLACE = Path(__file__).parents[2] / ".cache" / "testlib" / "rbx" / "resources" / "predownloaded" / "testlib.h"


@pytest.mark.slow
@pytest.mark.skipif(not PLACE.is_file(), reason=f"no {PLACE}: scripts/setup-tests puts it there")
def test_checkers_with_the_real_testlib() -> None:
    with Sandbox(workers=1, testlib=PLACE) as sandbox:
        test = StdinTest(stdin="", expected_stdout="YES no\nYes\n")
        for text, status in (
            ("yes NO yes", "accepted"),
            ("yes NO", "wrong_answer"),
            ("yes NO yes yes", "wrong_answer"),
            ("no NO yes", "wrong_answer"),
            ("", "wrong_answer"),
        ):
            assert judged(sandbox, f"print({text!r})", checker=WORDS, test=test).status == status
