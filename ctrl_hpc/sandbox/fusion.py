"""SandboxFusion's protocol over our executor: ``/run_code`` and ``/submit``, as its PyPI client speaks it.

A program's failure is always a ``Failed`` result, never ``SandboxError``: clients retry that one.
"""

from __future__ import annotations

import base64
import binascii
import inspect
import io
import json
import pickle
import re
import zlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from ctrl_hpc import jsonl
from ctrl_hpc.harness import prepared
from ctrl_hpc.records import Execution, FunctionTest, Limits, StdinTest, TestCase, TestResult, Verdict
from ctrl_hpc.sandbox import languages

_DEFAULT_MEMORY_MB = 1024
IGNORED = "IGNORE_THIS_FILE"
"""Files with this in their path are not for the program."""
_RUN_TIMEOUT_S = {"CommonOJDataset": 20.0, "LiveCodeBenchDataset": 6.0}
_MAX_TIMEOUT_S = 3600
_CORES = 16
"""CPU time may be so many times the wall-clock time, which alone is limited."""
_SHOWN_CHARACTERS = 1000
_SHOWN_INPUT, _SHOWN_OUTPUT = 300, 200
_MAX_LIVE_CODE_BENCH_S = 160
_MAX_TESTS_BYTES = 1 << 28
ALIASES = {
    languages.PYTHON: ("python", "Python", "py", "Python3", "python3", "PY"),
    **{name: entry.aliases for name, entry in languages.LANGUAGES.items()},
}
"""What fences call the languages."""
_LANGUAGE_OF = {alias: name for name, aliases in ALIASES.items() for alias in aliases}
_EXTRACTION_S = 10.0
_IMPORT, _DEFINITION = re.compile(r"(?:import|from|#)[^\n]"), re.compile(r"(?:def|class) [^\n]")
_FENCE = "```"
FENCED = r"```([^\n]*)\n(.*?)\n\s*```"
"""SandboxFusion's expression of a fenced block (with DOTALL): its time is quadratic, so that only jails use it."""


class RunCodeBody(BaseModel):
    """Body of ``/run_code``. ``memory_limit_MB`` of -1 is our default."""

    model_config = ConfigDict(allow_inf_nan=False)
    code: str
    language: str
    compile_timeout: float = 10
    run_timeout: float = 10
    memory_limit_MB: int = -1
    stdin: str | None = None
    files: dict[str, str | None] = {}
    fetch_files: list[str] = []


class TestConfig(BaseModel):
    """The part of ``/submit``'s configuration that matters here; other fields are accepted and unused."""

    __test__ = False
    model_config = ConfigDict(allow_inf_nan=False)
    dataset_type: str | None = None
    language: str | None = None
    compile_timeout: float | None = None
    run_timeout: float | None = None
    custom_extract_logic: str | None = None
    provided_data: list[dict[str, Any]] | dict[str, Any] | None = None
    extra: dict[str, Any] = {}


class SubmitBody(BaseModel):
    """Body of ``/submit``."""

    dataset: str
    id: int | str
    completion: str
    config: TestConfig


def limits(run_timeout_s: float, memory_mb: int = -1) -> Limits:
    """The limits of a run whose only stated limit is its wall-clock time; no time at all is a time limit, too."""
    if not run_timeout_s <= _MAX_TIMEOUT_S:
        raise ValueError(f"run_timeout: {run_timeout_s} is more than {_MAX_TIMEOUT_S} s")
    wall_s = max(run_timeout_s, 1e-6)
    cpu_s = min(max(wall_s * _CORES, 0.001), _MAX_TIMEOUT_S)
    memory = memory_mb if memory_mb > 0 else _DEFAULT_MEMORY_MB
    return Limits(cpu_s=cpu_s, wall_s=wall_s, memory_mb=memory, output_bytes=4 << 20, processes=64)


def check_language(language: str | None, field: str) -> str | None:
    """The language as executions name it, None for Python. Raises ValueError for one that there is not."""
    if language not in (languages.PYTHON, *languages.LANGUAGES):
        allowed = ", ".join([languages.PYTHON, *languages.LANGUAGES])
        raise ValueError(f"{field}: {language!r} is not supported; allowed: {allowed}")
    return None if languages.language(language) is None else language


def run_result(test: TestResult) -> dict[str, Any]:
    """A ``CommandRunResult``."""
    over_time = test.status == "time_limit"
    code = test.exit_code if test.exit_code is not None else -(test.signal or 0)
    if code == 0 and test.status in ("memory_limit", "output_limit"):
        code = -9
    return {
        "status": "TimeLimitExceeded" if over_time else "Finished",
        "execution_time": test.wall_s,
        "cpu_time": test.cpu_s,
        "return_code": None if over_time else code,
        "stdout": _decoded(test.stdout),
        "stderr": _decoded(test.stderr),
    }


def _decoded(output: bytes) -> str:
    """Text, or SandboxFusion's word for what is none."""
    try:
        return output.decode()
    except UnicodeDecodeError as error:
        return f"[DecodeError] {error}"


def _compile_result(test: TestResult) -> dict[str, Any]:
    """A ``CommandRunResult`` of the compiler, whose words are kept where it failed."""
    if test.status != "compile_error":
        return {"status": "Finished", "execution_time": 0.0, "return_code": 0, "stdout": "", "stderr": ""}
    over_time = test.exit_code is None
    return {
        "status": "TimeLimitExceeded" if over_time else "Finished",
        "execution_time": test.wall_s,
        "return_code": test.exit_code,
        "stdout": "",
        "stderr": _decoded(test.stderr),
    }


def run_response(
    test: TestResult, host: str, files: dict[str, str] | None = None, *, compiled: bool = False
) -> dict[str, Any]:
    """A ``RunCodeResponse``: Success when the program ended by itself with exit code 0, whatever it printed.

    ``compiled``: in a language that is; a program that does not compile has a compiler's result alone.
    """
    if test.status == "sandbox_error":
        message = test.stderr.decode("utf-8", "replace")
        return {"status": "SandboxError", "message": message, "executor_pod_name": host, "files": {}}
    succeeded = test.status in ("accepted", "wrong_answer")
    message = "" if succeeded or test.status in ("time_limit", "runtime_error", "compile_error") else test.status
    not_compiled = test.status == "compile_error"
    return {
        "status": "Success" if succeeded else "Failed",
        "message": message,
        "compile_result": _compile_result(test) if compiled else None,
        "run_result": None if not_compiled else run_result(test),
        "executor_pod_name": host,
        "files": files or {},
    }


Block = tuple[int, str, str]
"""A part of a completion that may be the program: priority, language ("" where it is not known), code."""


def extract(completion: str, language: str = languages.PYTHON, custom: Sequence[Block] = ()) -> str:
    """SandboxFusion's rule: the first fenced block of the language, else the first fenced one, else one left open.

    Without a fence, the first run of lines that looks like a definition of Python's; else "". ``custom`` blocks, which
    a request's own logic found, come after those of the same priority.
    """
    found = [*_blocks(completion, language), *custom]
    highest = max((priority for priority, _, _ in found), default=0)
    best = [block for block in found if block[0] == highest]
    ours = [block for block in best if block[1] == language]
    return (ours or best or [(0, "", "")])[0][2]


def _blocks(completion: str, language: str) -> list[Block]:
    for priority, found in ((30, _fenced(completion)), (20, _left_open(completion))):
        blocks = [(priority, _LANGUAGE_OF.get(tag.strip(), ""), code) for tag, code in found]
        if blocks:
            return blocks
    return [(10, language, code) for code in _definitions(completion)[:1]] if language == languages.PYTHON else []


def _fenced(text: str) -> list[tuple[str, str]]:
    """Tags and contents of fenced blocks: what :data:`FENCED` finds, in time linear in the text."""
    blocks, at = [], 0
    while (opened := _opened(text, at)) and (end := _end_of_block(text, opened[1] + 1)):
        tag_start, line_end = opened
        blocks.append((text[tag_start:line_end], text[line_end + 1 : end[0]]))
        at = end[1]
    return blocks


def _left_open(text: str) -> list[tuple[str, str]]:
    """The tag of the first fence, and all that follows it; empty where there is none."""
    opened = _opened(text, 0)
    return [(text[opened[0] : opened[1]], text[opened[1] + 1 :])] if opened else []


def _opened(text: str, at: int) -> tuple[int, int] | None:
    """Where the tag of the first fence from there on starts, and where its line ends."""
    fence = text.find(_FENCE, at)
    line_end = text.find("\n", fence) if fence >= 0 else -1
    return (fence + len(_FENCE), line_end) if line_end >= 0 else None


def _end_of_block(text: str, start: int) -> tuple[int, int] | None:
    """Where a block's contents end, and where its closing fence does: the first on a line of its own."""
    fence = text.find(_FENCE, start)
    while fence >= 0:
        blank = fence
        while blank > start and text[blank - 1].isspace():
            blank -= 1
        line_end = text.find("\n", blank, fence)
        if line_end >= 0:
            return line_end, fence + len(_FENCE)
        fence = text.find(_FENCE, fence + 1)
    return None


def _definitions(text: str) -> list[str]:
    """Each ``def`` or ``class`` with an indented body, and the imports and remarks right before it."""
    lines = [line for line in text.split("\n") if line.strip()]
    found: list[str] = []
    first = index = 0
    while index < len(lines):
        end = index + 1
        if _DEFINITION.match(lines[index]):
            while end < len(lines) and lines[end][0].isspace():
                end += 1
            if end > index + 1:
                found.append("\n".join(lines[first:end]) + "\n")
        if not _IMPORT.match(lines[index]):
            first = end
        index = end
    return found


_EXTRACTOR = """
import dataclasses, json, re, sys

given, out, sys.stdout = json.load(sys.stdin), sys.stdout, sys.stderr

@dataclasses.dataclass(kw_only=True)
class CodeBlock:
    priority: int
    language: str
    code: str

def submit_code_blocks(blocks):
    for block in blocks:
        assert isinstance(block, CodeBlock), "extracted code must be of class CodeBlock"
        found.append(block)

def extract_fenced_code(text):
    blocks = re.findall(given["fence"], text, re.DOTALL)
    return [CodeBlock(priority=30, language=given["aliases"].get(tag.strip(), ""), code=code) for tag, code in blocks]

_IMPORT, _DEFINITION = map(re.compile, given["patterns"])

def extract_heuristic_code(text, language=""):
    codes = _definitions(text) if language == "python" else []
    return [CodeBlock(priority=10, language="python", code=code) for code in codes]

found = []
exec(given["logic"], {
    "CodeBlock": CodeBlock, "completion": given["completion"], "submit_code_blocks": submit_code_blocks,
    "extract_fenced_code": extract_fenced_code, "extract_heuristic_code": extract_heuristic_code,
})
print(json.dumps([[block.priority, block.language, block.code] for block in found]), file=out)
"""


def extraction(body: SubmitBody) -> Execution:
    """The run, in a jail, of a request's own logic, which hands over blocks of code."""
    given = {
        "completion": body.completion,
        "logic": body.config.custom_extract_logic,
        "aliases": _LANGUAGE_OF,
        "fence": FENCED,
        "patterns": [_IMPORT.pattern, _DEFINITION.pattern],
    }
    test = StdinTest(stdin=json.dumps(given), expected_stdout="")
    program = inspect.getsource(_definitions) + _EXTRACTOR
    return Execution(program=program, tests=(test,), limits=limits(_EXTRACTION_S))


def extracted(verdict: Verdict) -> list[Block]:
    """The blocks that a request's own logic found; ValueError when it failed."""
    result = verdict.tests[0]
    try:
        blocks = json.loads(result.stdout)
        return [(int(priority), str(language), str(code)) for priority, language, code in blocks]
    except (ValueError, TypeError):
        last = (result.stderr.decode("utf-8", "replace").strip().splitlines() or [result.status])[-1]
        raise ValueError(f"config.custom_extract_logic: it fails: {last[:300]}") from None


def submission(body: SubmitBody, custom: Sequence[Block] = ()) -> tuple[Execution, str]:
    """What to execute for a submission, and the program extracted from it. Raises ValueError naming the field.

    ``custom``: what the request's own logic extracted.
    """
    config = body.config
    kind = config.dataset_type or body.dataset
    if kind not in DATASETS:
        raise ValueError(f"config.dataset_type: {kind!r} is not one of {', '.join(DATASETS)}")
    language = check_language(config.language, "config.language") if kind == "CommonOJDataset" else None
    tests = DATASETS[kind](_row(body))
    code = extract(body.completion, language or languages.PYTHON, custom)
    preamble, program = prepared(_HARNESS[kind], None, code)
    default_s = languages.COMPILE_S if language is not None else _RUN_TIMEOUT_S[kind]
    run_limits, budget_s = _times(kind, config.run_timeout or default_s, len(tests))
    execution = Execution(
        program=program,
        language=language,
        compile_timeout_s=(config.compile_timeout or languages.COMPILE_S) if language is not None else None,
        preamble=preamble or None,
        tests=tests,
        limits=run_limits,
        comparison=str(config.extra.get("comparison", _COMPARISON[kind])),
        stop_at_first_failure=_one_result(body) or not config.extra.get("run_all_cases", False),
        time_budget_s=budget_s,
    )
    return execution, code


def _times(kind: str, timeout_s: float, tests: int) -> tuple[Limits, float | None]:
    """A test's limits, and the time of all of them together where SandboxFusion has one."""
    if kind != "LiveCodeBenchDataset":
        return limits(timeout_s), None
    whole_s = int(min(timeout_s, _MAX_TIMEOUT_S))
    budget_s = max(min((whole_s + 1) * tests + 5, _MAX_LIVE_CODE_BENCH_S), 0)
    return limits(whole_s if whole_s > 0 else budget_s), budget_s


def _one_result(body: SubmitBody) -> bool:
    """Whether all tests are answered as one, as SandboxFusion does for LiveCodeBench, where clients add up."""
    kind = body.config.dataset_type or body.dataset
    return kind == "LiveCodeBenchDataset" and not body.config.extra.get("per_case", False)


def _row(body: SubmitBody) -> dict[str, Any]:
    data = body.config.provided_data
    if isinstance(data, list):
        found = [row for row in data if str(row.get("id")) == str(body.id)]
        data = found[0] if found else None
    if data is None or "test" not in data:
        raise ValueError("config.provided_data: a row with a field 'test' is needed (this service keeps no data sets)")
    return data


def _common_tests(row: dict[str, Any]) -> tuple[TestCase, ...]:
    cases = json.loads(row["test"], strict=False) if isinstance(row["test"], str) else row["test"]
    try:
        tests = [
            StdinTest(stdin=str(case["input"]["stdin"]), expected_stdout=str(case["output"]["stdout"]))
            for case in cases
        ]
    except (TypeError, KeyError) as error:
        raise ValueError(f"config.provided_data.test: each needs input.stdin and output.stdout ({error})") from None
    return tuple(tests)


def _live_code_bench_tests(row: dict[str, Any]) -> tuple[TestCase, ...]:
    try:
        sample = _packed(row["test"]) if isinstance(row["test"], str) else row["test"]
        cases = json.loads(sample["input_output"])
        pairs = list(zip(cases["inputs"], cases["outputs"], strict=True))
        name = cases.get("fn_name")
        tests: list[TestCase] = []
        for given, expected in pairs:
            if name is None:
                tests.append(StdinTest(stdin=_joined(given), expected_stdout=_joined(expected)))
            else:
                arguments = [json.loads(line) for line in given.split("\n")]
                if isinstance(arguments[0], dict):
                    arguments = [jsonl.integer_keys(arguments[0])]
                tests.append(FunctionTest(name=name, args=tuple(arguments), expected=json.loads(expected)))
    except (TypeError, KeyError, ValueError, zlib.error, binascii.Error, pickle.UnpicklingError) as error:
        raise ValueError(f"config.provided_data.test: not LiveCodeBench's format ({error})") from None
    return tuple(tests)


def _joined(lines: str | list[str]) -> str:
    return lines if isinstance(lines, str) else "\n".join(lines)


class _PlainUnpickler(pickle.Unpickler):
    """Reads strings and containers only: no class or function can be named, so no code can run."""

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        raise pickle.UnpicklingError(f"{module_name}.{global_name} is not plain data")


def _packed(text: str) -> dict[str, Any]:
    """LiveCodeBench's tests as JSON, or as its base64 of a compressed pickle of plain data."""
    try:
        return json.loads(text, strict=False)
    except ValueError:
        data = zlib.decompressobj().decompress(base64.b64decode(text, validate=True), _MAX_TESTS_BYTES)
        value = _PlainUnpickler(io.BytesIO(data)).load()
        return json.loads(value) if isinstance(value, str) else value


DATASETS = {"CommonOJDataset": _common_tests, "LiveCodeBenchDataset": _live_code_bench_tests}
"""How each of SandboxFusion's data set classes that are served keeps its tests."""
_HARNESS = {"CommonOJDataset": "", "LiveCodeBenchDataset": "livecodebench"}
_COMPARISON: dict[str, Literal["sandbox_fusion", "livecodebench"]] = {
    "CommonOJDataset": "sandbox_fusion",
    "LiveCodeBenchDataset": "livecodebench",
}


def submit_response(body: SubmitBody, execution: Execution, code: str, verdict: Verdict, host: str) -> dict[str, Any]:
    """An ``EvalResult`` with the tests that were run; those of LiveCodeBench as one, as SandboxFusion's harness tells.

    ``config.extra.per_case`` asks for a result a test there too.
    """
    if _one_result(body):
        tests = [{"passed": verdict.accepted, "exec_info": _told(execution, verdict, host), "test_info": None}]
    else:
        whole = bool(body.config.extra.get("return_full_case", False))
        tests = [
            {
                "passed": result.status == "accepted",
                "exec_info": run_response(result, host, compiled=execution.language is not None),
                "test_info": _info(case, whole or result.status != "accepted"),
            }
            for case, result in zip(execution.tests, verdict.tests, strict=True)
            if result.status != "not_run"
        ]
    return {"id": body.id, "accepted": verdict.accepted, "extracted_code": code, "full_code": code, "tests": tests}


_TOLD = {
    "wrong_answer": (-2, "Wrong Answer"),
    "unsupported": (-2, "Wrong Answer"),
    "time_limit": (-3, "Time Limit Exceeded"),
}
_COMPILES_NOT = ("SyntaxError", "IndentationError", "TabError")


def _told(execution: Execution, verdict: Verdict, host: str) -> dict[str, Any]:
    """A ``RunCodeResponse`` as of one program that runs all tests, prints what failed, and exits with 255 or 0."""
    if verdict.status == "sandbox_error":
        failed = next(test for test in verdict.tests if test.status == "sandbox_error")
        return run_response(failed, host)
    wall_s = sum(test.wall_s for test in verdict.tests)
    cpu_s = sum(test.cpu_s for test in verdict.tests)
    whole = TestResult(status="accepted", exit_code=0, cpu_s=cpu_s, wall_s=wall_s)
    index = next((i for i, test in enumerate(verdict.tests) if test.status == verdict.status), 0)
    if verdict.accepted or not verdict.tests:
        return run_response(whole, host)
    case, result = execution.tests[index], verdict.tests[index]
    if result.status == "time_limit" and execution.time_budget_s is not None and wall_s >= execution.time_budget_s:
        return run_response(replace(whole, status="time_limit"), host)
    told = str(_metadata(case, result)).encode("utf-8", "backslashreplace") + b"\n"
    ended = replace(whole, status="runtime_error", exit_code=255, stdout=told)
    return run_response(ended, host)


def _metadata(case: TestCase, result: TestResult) -> dict[str, Any]:
    """What LiveCodeBench's harness tells of the test that failed."""
    code, message = _TOLD.get(result.status, (-4, "Runtime Error"))
    last = (result.stderr.decode("utf-8", "replace").strip().splitlines() or [result.status])[-1]
    if result.status == "runtime_error" and last.startswith(_COMPILES_NOT):
        return {"error": last, "error_code": -1, "error_message": "Compilation Error"}
    if isinstance(case, FunctionTest) and last.endswith(f"does not define {case.name}"):
        return {"error": last, "error_code": -1, "error_message": "Unable to extract code"}
    if isinstance(case, StdinTest):
        given, expected, output = case.stdin, case.expected_stdout, result.stdout.decode("utf-8", "replace")
    else:
        assert isinstance(case, FunctionTest)
        given, expected, output = "\n".join(map(repr, case.args)), repr(case.expected), ""
    shown = {"inputs": _middle_out(given, _SHOWN_INPUT), "expected": _middle_out(expected, _SHOWN_OUTPUT)}
    found = {"output": _middle_out(output, _SHOWN_OUTPUT)} if code == -2 else {"error": last}
    return {**found, **shown, "error_code": code, "error_message": message}


def _middle_out(text: str, most: int, placeholder: str = "...(truncated) ...") -> str:
    return text if len(text) <= most else text[: most // 2] + placeholder + text[-(most // 2) :]


def _info(case: TestCase, whole: bool) -> dict[str, Any]:
    def shown(text: str) -> str:
        return text if whole or len(text) <= _SHOWN_CHARACTERS else _middle_out(text, _SHOWN_CHARACTERS - 3, "...")

    if isinstance(case, StdinTest):
        return {"input": {"stdin": shown(case.stdin)}, "output": {"stdout": shown(case.expected_stdout)}}
    assert isinstance(case, FunctionTest)
    return {"name": case.name, "args": shown(repr(case.args)), "expected": shown(repr(case.expected))}
