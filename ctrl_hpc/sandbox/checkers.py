"""Checkers in C++ that problems bring along, run as testlib's are: ``checker input output answer``."""

from __future__ import annotations

import base64
import dataclasses
import json

from ctrl_hpc.records import Limits, TestResult, TestStatus
from ctrl_hpc.sandbox import languages
from ctrl_hpc.sandbox.compiler import LIMITS_OF_MOVES, Compiler
from ctrl_hpc.sandbox.jail import Kind, executable
from ctrl_hpc.sandbox.jails import Jails, Role
from ctrl_hpc.sandbox.job_files import job_files

_COMPILE_S = 60.0
_LIMITS = Limits(cpu_s=10.0, wall_s=30.0, memory_mb=1024, output_bytes=1 << 16)
_STATUS: dict[int, TestStatus] = {
    0: "accepted",
    1: "wrong_answer",
    2: "wrong_answer",  # of another form
    4: "wrong_answer",  # more than is asked for
    7: "wrong_answer",  # a part of the points
    8: "wrong_answer",  # the output ends too early
}
"""Status by testlib's exit codes; 3, a checker that fails, and all others are no judgement."""


def checked(
    result: TestResult, checker: str, stdin: bytes, expected: bytes, *, jails: Jails, compiler: Compiler, testlib: str
) -> TestResult:
    """The result as a checker says, which is compiled with ``testlib``, the text of ``testlib.h``, beside it."""
    library = {"testlib.h": base64.b64encode(testlib.encode()).decode("ascii")} if testlib else {}
    built = compiler.build(languages.CHECKERS, checker, library, _COMPILE_S)
    if built.binary is None:
        status: TestStatus = "sandbox_error" if built.compiled.status == "sandbox_error" else "unsupported"
        remark = b"the checker does not compile: " + built.compiled.stderr[:2000] + b"\n"
        return dataclasses.replace(result, status=status, stderr=result.stderr + remark)
    texts = {"input": stdin, "output": result.stdout, "answer": expected}
    put = {name: base64.b64encode(text).decode("ascii") for name, text in texts.items()}
    with job_files(json.dumps(put).encode()) as given, job_files("\0".join(["checker", *texts]).encode()) as run:
        run.give(executable(built.binary))
        placed = jails.run(Kind.PUT, given, LIMITS_OF_MOVES, Role.CHECKER, keep=True)
        ended = jails.run(Kind.EXECUTE, run, _LIMITS, Role.CHECKER)
        said = (run.contents(3, 2000)[0].strip() or run.contents(2, 2000)[0].strip()) + b"\n"
    code = ended.exit_code
    if placed.exit_code != 0 or code is None or code not in _STATUS:
        said = said if placed.exit_code == 0 else b"input, output and answer are too large for a checker\n"
        return dataclasses.replace(result, status="unsupported", stderr=result.stderr + b"checker: " + said)
    status = _STATUS[code]
    if status == "accepted":
        return result
    return dataclasses.replace(result, status=status, stderr=result.stderr + b"checker: " + said)
