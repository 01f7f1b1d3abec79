"""SandboxFusion's protocol over our executor: ``/run_code`` and ``/submit`` for Python, as its PyPI client speaks it.

A program's failure is always a ``Failed`` result, never ``SandboxError``: clients retry that one.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import pickle
import re
import zlib
from typing import Any, Literal

from pydantic import BaseModel

from ctrl_hpc.harness import prepared
from ctrl_hpc.records import Execution, FunctionTest, Limits, StdinTest, TestCase, TestResult, Verdict

DEFAULT_MEMORY_MB = 1024
_RUN_TIMEOUT_S = {"CommonOJDataset": 20.0, "LiveCodeBenchDataset": 6.0}
_SHOWN_CHARACTERS = 1000
_MAX_TESTS_BYTES = 1 << 28
_PYTHON = ("python", "Python", "py", "Python3", "python3", "PY")
_FENCED = re.compile(r"```([^\n]*)\n(.*?)\n\s*```", re.DOTALL)
_OPEN_FENCE = re.compile(r"```([^\n]*)\n(.*)", re.DOTALL)


class RunCodeBody(BaseModel):
    """Body of ``/run_code``. ``memory_limit_MB`` of -1 is our default."""

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
    dataset_type: str | None = None
    language: str | None = None
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
    """The limits of a run whose only stated limit is its time."""
    if not 0 < run_timeout_s <= 3600:
        raise ValueError(f"run_timeout: {run_timeout_s} is not in (0, 3600]")
    memory = memory_mb if memory_mb > 0 else DEFAULT_MEMORY_MB
    return Limits(cpu_s=run_timeout_s, wall_s=run_timeout_s, memory_mb=memory, output_bytes=4 << 20, processes=64)


def check_language(language: str | None, field: str) -> None:
    """Raise ValueError unless the language is Python."""
    if language != "python":
        raise ValueError(f"{field}: {language!r} is not supported; allowed: python")


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
        "stdout": test.stdout.decode("utf-8", "replace"),
        "stderr": test.stderr.decode("utf-8", "replace"),
    }


def run_response(test: TestResult, host: str, files: dict[str, str] | None = None) -> dict[str, Any]:
    """A ``RunCodeResponse``: Success when the program ended by itself with exit code 0, whatever it printed."""
    if test.status == "sandbox_error":
        message = test.stderr.decode("utf-8", "replace")
        return {"status": "SandboxError", "message": message, "executor_pod_name": host, "files": {}}
    succeeded = test.status in ("accepted", "wrong_answer")
    message = "" if succeeded or test.status in ("time_limit", "runtime_error") else test.status
    return {
        "status": "Success" if succeeded else "Failed",
        "message": message,
        "compile_result": None,
        "run_result": run_result(test),
        "executor_pod_name": host,
        "files": files or {},
    }


def extract(completion: str) -> str:
    """SandboxFusion's rule: the first fenced Python block, else the first fenced block, else one left open, else ''."""
    for pattern in (_FENCED, _OPEN_FENCE):
        blocks = pattern.findall(completion)
        tagged = [code for tag, code in blocks if tag.strip() in _PYTHON]
        if tagged:
            return tagged[0]
        if blocks:
            return blocks[0][1]
    return ""


def submission(body: SubmitBody) -> tuple[Execution, str]:
    """What to execute for a submission, and the program extracted from it. Raises ValueError naming the field."""
    config = body.config
    if config.custom_extract_logic:
        raise ValueError("config.custom_extract_logic: running the caller's code outside a jail is not supported")
    kind = config.dataset_type or body.dataset
    if kind not in DATASETS:
        raise ValueError(f"config.dataset_type: {kind!r} is not one of {', '.join(DATASETS)}")
    if kind == "CommonOJDataset" or config.language is not None:
        check_language(config.language, "config.language")
    tests = DATASETS[kind](_row(body))
    code = extract(body.completion)
    preamble, program = prepared(_HARNESS[kind], None, code)
    execution = Execution(
        program=program,
        preamble=preamble or None,
        tests=tests,
        limits=limits(config.run_timeout or _RUN_TIMEOUT_S[kind]),
        comparison=str(config.extra.get("comparison", _COMPARISON[kind])),
        stop_at_first_failure=not config.extra.get("run_all_cases", False),
    )
    return execution, code


def _row(body: SubmitBody) -> dict[str, Any]:
    data = body.config.provided_data
    if isinstance(data, list):
        found = [row for row in data if str(row.get("id")) == str(body.id)]
        data = found[0] if found else None
    if data is None or "test" not in data:
        raise ValueError("config.provided_data: a row with a field 'test' is needed (this service keeps no data sets)")
    return data


def _common_tests(row: dict[str, Any]) -> tuple[TestCase, ...]:
    cases = json.loads(row["test"]) if isinstance(row["test"], str) else row["test"]
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
                tests.append(StdinTest(stdin=given, expected_stdout=expected))
            else:
                arguments = tuple(json.loads(line) for line in given.split("\n"))
                tests.append(FunctionTest(name=name, args=arguments, expected=json.loads(expected)))
    except (TypeError, KeyError, ValueError, zlib.error, binascii.Error, pickle.UnpicklingError) as error:
        raise ValueError(f"config.provided_data.test: not LiveCodeBench's format ({error})") from None
    return tuple(tests)


class _PlainUnpickler(pickle.Unpickler):
    """Reads strings and containers only: no class or function can be named, so no code can run."""

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        raise pickle.UnpicklingError(f"{module_name}.{global_name} is not plain data")


def _packed(text: str) -> dict[str, Any]:
    """LiveCodeBench's tests as JSON, or as its base64 of a compressed pickle of plain data."""
    try:
        return json.loads(text)
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
    """An ``EvalResult`` with the tests that were run."""
    whole = bool(body.config.extra.get("return_full_case", False))
    tests = [
        {
            "passed": result.status == "accepted",
            "exec_info": run_response(result, host),
            "test_info": _info(case, whole),
        }
        for case, result in zip(execution.tests, verdict.tests, strict=True)
        if result.status != "not_run"
    ]
    return {"id": body.id, "accepted": verdict.accepted, "extracted_code": code, "tests": tests}


def _info(case: TestCase, whole: bool) -> dict[str, Any]:
    def shown(text: str) -> str:
        return text if whole or len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "..."

    if isinstance(case, StdinTest):
        return {"input": {"stdin": shown(case.stdin)}, "output": {"stdout": shown(case.expected_stdout)}}
    assert isinstance(case, FunctionTest)
    return {"name": case.name, "args": shown(repr(case.args)), "expected": shown(repr(case.expected))}
