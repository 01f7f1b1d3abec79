"""Programs in C++: compiled once, in a jail of their own, run under the same limits; what does not compile says so."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from ctrl_hpc.flow.steps import execution
from ctrl_hpc.flow.text import extract_program
from ctrl_hpc.records import AssertTest, Execution, Limits, Problem, Rules, StdinTest, TestResult, Verdict
from ctrl_hpc.sandbox import Sandbox, fusion, languages

pytestmark = pytest.mark.alone  # short limits

LIMITS = Limits(cpu_s=0.5, wall_s=2.0, memory_mb=64, output_bytes=100_000, processes=16)
SUM = '#include <cstdio>\nint main() { int a, b; scanf("%d%d", &a, &b); printf("%d\\n", a + b); }'


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(workers=2) as sandbox:
        yield sandbox


def run(sandbox: Sandbox, program: str, stdin: str = "", expected: str = "", limits: Limits = LIMITS) -> Verdict:
    return sandbox.run_tests(program, [StdinTest(stdin=stdin, expected_stdout=expected)], limits, language="cpp")


def test_tests_are_judged_as_in_python(sandbox: Sandbox) -> None:
    tests = [StdinTest(stdin=f"{n} 4\n", expected_stdout=f"{n + 4}\n") for n in range(6)]
    tests[3] = StdinTest(stdin="1 1", expected_stdout="3")
    verdict = sandbox.run_tests(SUM, tests, LIMITS, language="cpp")
    assert [test.status for test in verdict.tests] == ["accepted"] * 3 + ["wrong_answer"] + ["accepted"] * 2
    assert verdict.tests[0].stdout == b"4\n" and 0 < verdict.tests[0].cpu_s < 0.2
    assert sandbox.run_tests(SUM, [AssertTest(code="assert f()")], LIMITS, language="cpp").status == "unsupported"


@pytest.mark.parametrize(
    ("status", "body"),
    [
        ("time_limit", "for (volatile int i = 0;; i++) ;"),
        ("time_limit", "sleep(100);"),
        ("memory_limit", "for (size_t n = 1 << 20, i = 0; i < 200; i++) memset(malloc(n), 1, n);"),
        ("memory_limit", "char a[80 << 20]; memset(a, 1, sizeof a); printf(\"%d\", a[rand() % 100]);"),
        ("output_limit", "for (;;) puts(\"xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx\");"),
        ("runtime_error", "raise(SIGSEGV);"),
        ("runtime_error", "abort();"),
        ("runtime_error", "exit(3);"),
        ("wrong_answer", "for (int i = 0; i < 200; i++) if (fork() == 0) { sleep(9); }"),
    ],
)  # fmt: skip
def test_limits_hold(sandbox: Sandbox, status: str, body: str) -> None:
    headers = ("csignal", "cstdio", "cstdlib", "cstring", "unistd.h")
    program = "".join(f"#include <{name}>\n" for name in headers) + f"int main() {{ {body} }}"
    verdict = run(sandbox, program, expected="never")
    assert verdict.status == status, verdict
    assert run(sandbox, SUM, "1 2", "3").accepted


def test_a_language_is_one_entry_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """C, added here: compiled, run and judged, its errors told apart, asked for by requests, found in answers."""
    entry = replace(
        languages.LANGUAGES["cpp"], compiler="gcc", source="main.c", options=("-O1", "-static", "-o", "program")
    )
    proof = '#include <stdio.h>\nint main(void) { puts("1"); }\n'
    monkeypatch.setitem(languages.LANGUAGES, "c", replace(entry, aliases=("c", "C"), proof=proof))
    text = '#include <stdio.h>\nint main(void) { int new = 0; scanf("%d", &new); printf("%d\\n", new + 1); }'
    tests = [StdinTest(stdin="4\n", expected_stdout="5\n")]
    with Sandbox(workers=1) as sandbox:
        assert sandbox.run_tests(text, tests, LIMITS, language="c").accepted
        assert sandbox.run_tests(text, tests, LIMITS, language="cpp").status == "compile_error"  # new is no name there
        assert sandbox.run_tests("int main(void) { return x; }", tests, LIMITS, language="c").status == "compile_error"
    assert fusion.check_language("c", "language") == "c"
    assert extract_program(f"```python\nprint(1)\n```\n```c\n{text}\n```", language="c") == text
    with pytest.raises(ValueError, match="language: 'rust' is not supported; allowed: python, cpp, c"):
        languages.language("rust")


def test_deep_recursion_is_bounded_by_memory_alone(sandbox: Sandbox) -> None:
    recurse = "int f(volatile int n) { return n ? 1 + f(n - 1) : 0; }"
    program = f'#include <cstdio>\n{recurse}\nint main() {{ printf("%d", f(500000)); }}'
    assert run(sandbox, program, expected="500000").accepted


def test_what_does_not_compile_is_told_apart(sandbox: Sandbox) -> None:
    tests = [StdinTest(stdin="", expected_stdout="")] * 2
    verdict = sandbox.run_tests("int main() { return x; }", tests, LIMITS, language="cpp")
    assert [test.status for test in verdict.tests] == ["compile_error"] * 2 and verdict.status == "compile_error"
    assert verdict.tests[0].exit_code == 1 and b"was not declared" in verdict.tests[0].stderr
    assert verdict.detail.startswith("test 1 of 2: compile_error: main.cpp:1:21: error: ")


BOMBS = {
    "templates": "template <int n> struct F { F<n + 1> f; };\nF<0> f;\nint main() {}",
    "more templates": "template <int n, int m> struct F {\n"
    " static const long v = F<n - 1, m>::v + F<n - 1, m + 1>::v;\n};\n"
    "template <int m> struct F<0, m> { static const long v = m; };\nint main() { return F<700, 0>::v; }",
    "constexpr": "constexpr long f(long n) { long s = 0; for (long i = 0; i < n; i++) s += i; return s; }\n"
    "constexpr long x = f(1L << 40);\nint main() { return x; }",
    "macros": "".join(f"#define {b} {f'{a} ' * 8}\n" for a, b in zip("XABCDEF", "ABCDEFG", strict=True))
    + '#define X "xxxxxxxxxxxxxxxx"\nconst char *s = G G G G G;\nint main() {}',
    "includes itself": "#include \"main.cpp\"\n#include \"main.cpp\"\nint main() {}",
    "a large array": "int a[1 << 28] = {1};\nint main() { return a[5]; }",
    "a device": "#include \"/dev/zero\"\nint main() {}",
    "the terminal": "#include \"/dev/stdin\"\nint main() {}",
    "the host's passwords": "#include \"/etc/passwd\"\nint main() {}",
    "the host's processes": "#include \"/proc/self/environ\"\nint main() {}",
    "a file as data": "asm(\".incbin \\\"/etc/passwd\\\"\");\nint main() {}",
    "an assembler's loop": "asm(\".rept 1000000000\\n nop\\n .endr\");\nint main() {}",
    "an assembler's space": "asm(\".zero 99999999999\");\nint main() {}",
    "a name too long": "int " + "x" * 5_000_000 + "; int main() { return y; }",
    "deep brackets": "int main() { return " + "(" * 200_000 + "1" + ")" * 200_000 + "; }",
    "warnings": "int main() { " + "x;" * 100_000 + " }",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", BOMBS)
def test_no_program_harms_the_compiler_s_host(sandbox: Sandbox, name: str) -> None:
    """Each ends within the compiler's limits as the program's fault; the next one compiles."""
    tests = (StdinTest(stdin="", expected_stdout="never"),)
    execution = Execution(program=BOMBS[name], tests=tests, limits=LIMITS, language="cpp", compile_timeout_s=3.0)
    verdict = sandbox.submit(execution).result()
    assert verdict.status in ("compile_error", "wrong_answer"), verdict
    assert name == "deep brackets" or verdict.status == "compile_error"
    assert b"root:" not in verdict.tests[0].stderr and len(verdict.tests[0].stderr) < 100_000
    assert run(sandbox, f"// {name}\n{SUM}", "1 2", "3").accepted


def test_a_program_is_compiled_once(tmp_path: Path) -> None:
    tests = [StdinTest(stdin=f"{n} 1", expected_stdout=f"{n + 1}") for n in range(4)]
    for compiled in (2, 0):  # the second time from the disk
        with Sandbox(workers=2) as sandbox:
            sandbox.binaries.folder = tmp_path / "binaries"
            for text in (SUM, SUM + "// another"):
                assert sandbox.run_tests(text, tests, LIMITS, language="cpp").accepted
            assert sandbox.run_tests(SUM, tests * 2, LIMITS, language="cpp").accepted
            assert sandbox.binaries.compiled == compiled


def test_the_oldest_binaries_make_room(tmp_path: Path) -> None:
    kept = languages.Binaries(tmp_path / "kept", max_mb=1)
    for name in ("a", "b", "c"):
        kept.put(name, languages.Built(compiled=TestResult(status="accepted", exit_code=0), binary=bytes(400_000)))
    assert kept.get("a") is None and kept.get("b") is not None and kept.get("c") is not None


def test_a_program_among_files(sandbox: Sandbox) -> None:
    files = {"mine.h": base64.b64encode(b'#define NAME "in/x"\n').decode(), "in/x": base64.b64encode(b"7").decode()}
    body = 'int n; std::ifstream(NAME) >> n; std::ofstream("o") << n * 6;'
    program = f'#include "mine.h"\n#include <fstream>\nint main() {{ {body} }}'
    result, fetched = sandbox.submit_program(program, "", LIMITS, files, ["o", "program"], language="cpp").result()
    assert result.status == "accepted" and fetched == {"o": base64.b64encode(b"42").decode()}


def test_languages_are_known_by_name(sandbox: Sandbox) -> None:
    with pytest.raises(ValueError, match="language: 'cobol' is not supported; allowed: python, cpp"):
        sandbox.run_tests("", [StdinTest(stdin="", expected_stdout="")], LIMITS, language="cobol")
    assert sandbox.run_tests("print(1)", [StdinTest(stdin="", expected_stdout="1")], LIMITS, language="python").accepted


def test_a_problem_says_what_it_is_written_in(sandbox: Sandbox) -> None:
    problem = Problem(
        id="p", source="s", split="test", prompt="Add.", language="cpp",
        tests=(StdinTest(stdin="1 2", expected_stdout="3"),),
    )  # fmt: skip
    assert sandbox.submit(execution(problem, SUM, Rules(limits=LIMITS))).result().accepted


def test_what_a_compiler_lacks_is_no_program_s_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a compiler that is not there nor one that cannot link makes a program wrong: the request is refused."""
    whole = languages.LANGUAGES["cpp"]
    monkeypatch.setitem(languages.LANGUAGES, "none", replace(whole, compiler="no-such-compiler"))
    monkeypatch.setitem(languages.LANGUAGES, "broken", replace(whole, options=(*whole.options, "-lno-such-library")))
    with pytest.raises(ValueError, match=r"none needs /usr/bin/no-such-compiler; install the package g\+\+"):
        languages.language("none")
    with pytest.raises(ValueError, match=r"broken: /usr/bin/g\+\+ compiles no program: .*static libraries too"):
        languages.language("broken")
