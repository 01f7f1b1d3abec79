"""The executor service, as a process of its own: routes, limits, token, drain, the PyPI client of SandboxFusion."""

from __future__ import annotations

import base64
import json
import pickle
import signal
import subprocess
import sys
import threading
import zlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import json_endpoint
import pytest
import sandbox_fusion

from ctrl_hpc import jsonl
from ctrl_hpc.flow import steps
from ctrl_hpc.flow.prompts import Prompts
from ctrl_hpc.records import (
    AssertTest,
    Critique,
    Execution,
    FunctionTest,
    Limits,
    Problem,
    Revision,
    Rules,
    Sampling,
    Solution,
    StdinTest,
    StoredTests,
    Verdict,
)
from ctrl_hpc.rollout.openai_client import OpenAIGenerator
from ctrl_hpc.sandbox import Sandbox
from ctrl_hpc.sandbox.client import ExecutorClient
from ctrl_hpc.store.tests import TestStore

SERVE = "import json, sys; from ctrl_hpc.sandbox.server import serve; serve(on_ready=lambda url: print(url, flush=True), **json.loads(sys.argv[1]))"  # noqa: E501
LIMITS = Limits(cpu_s=2.0, wall_s=4.0, memory_mb=256)


@contextmanager
def serving(**options: Any) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The URL and the process of a service."""
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE, json.dumps(options)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        url = process.stdout.readline().strip()
        assert url, process.communicate()[1]
        yield url, process
    finally:
        if process.poll() is None:
            process.terminate()
        process.communicate(timeout=30)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving(workers=2) as (address, _):
        yield address


def double(n: int, factor: int = 2) -> Execution:
    test = StdinTest(stdin=f"{n}\n", expected_stdout=f"{2 * n}\n")
    return Execution(program=f"print(int(input()) * {factor})", tests=(test, test), limits=LIMITS)


def test_the_client_gets_verdicts_in_order(url: str) -> None:
    with ExecutorClient(lambda: [url]) as executor:
        verdicts = executor.run_many([double(n, 2 + n % 2) for n in range(1, 21)])
    assert [verdict.accepted for verdict in verdicts] == [n % 2 == 0 for n in range(1, 21)]
    assert verdicts[1].tests[0].stdout == b"4\n"


def test_all_kinds_of_tests_cross(url: str) -> None:
    tests = (AssertTest(code="assert f((1, 2)) == {2, 1}"), FunctionTest(name="f", args=((1, 2),), expected={1, 2}))
    with ExecutorClient(lambda: [url]) as executor:
        (verdict,) = executor.run_many([Execution(program="f = set", tests=tests, limits=LIMITS)])
    assert verdict.accepted and verdict.passed == 2


@pytest.mark.parametrize("kind", ["program", "test"])
def test_a_lone_surrogate_spoils_nothing_beside_it(url: str, kind: str) -> None:
    code = "def f(x): return x  # \ud800"
    spoilt = double(1) if kind == "test" else Execution(program=code, tests=double(1).tests, limits=LIMITS)
    if kind == "test":
        spoilt = replace(spoilt, tests=(FunctionTest(name="f", args=("\udfff",), expected="\ud800"),), program=code)
    with ExecutorClient(lambda: [url]) as executor:
        verdicts = executor.run_many([double(2), spoilt, double(3)])
    assert [verdict.accepted for verdict in verdicts] == [True, False, True]
    assert verdicts[1].status != "sandbox_error"


def answering(answers: list[str], asked: list[dict[str, Any]]) -> AbstractContextManager[str]:
    """An OpenAI-compatible endpoint that gives these answers, one a request, and remembers what it was asked."""

    def answer(body: Any, _: dict[str, str]) -> tuple[int, dict[str, str], Any]:
        asked.append(body)
        message = {"role": "assistant", "content": answers[len(asked) - 1]}
        return 200, {}, {"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}

    return json_endpoint.serving(answer)


def test_a_lone_surrogate_in_an_answer_ends_no_step(url: str, tmp_path: Path) -> None:
    """Draft, execution, critique (continued), revision, execution: every answer holds one, and all is judged."""
    answers = [
        "Here \ud83d:\n```python\ns = '\ud800'\nprint(0)\n```",
        "It prints 0 \udc00, not 1.",
        " Incorrect \ud83d",
        "\udfff\n```python\ns = '\udfff'\nprint(1)\n```",
    ]
    asked: list[dict[str, Any]] = []
    problem = Problem(
        id="p", source="s", split="test", prompt="Print 1.", tests=(StdinTest(stdin="", expected_stdout="1"),)
    )
    prompts = Prompts.load("default", critique_close="Overall judgment:")
    sampling = Sampling(temperature=0.0, max_tokens=200)
    with answering(answers, asked) as endpoint, ExecutorClient(lambda: [url]) as executor:
        model = OpenAIGenerator(endpoint, "m", max_tries=1)
        drafts = steps.execute(
            [(problem, item) for item in steps.draft([problem], model, prompts, sampling)], executor, Rules()
        )
        critiques = steps.critique([(problem, drafts[0])], model, prompts, sampling)
        revised = steps.revise([(problem, drafts[0], critiques[0])], model, prompts, sampling)
        (revision,) = steps.execute([(problem, revised[0])], executor, Rules())
        model.close()
    assert drafts[0].program == "s = '\ufffd'\nprint(0)" and drafts[0].verdict.status == "wrong_answer"
    assert critiques[0].judgement == "incorrect"
    assert asked[2]["messages"][-1]["content"] == "It prints 0 \ufffd, not 1.\n\nOverall judgment:"
    assert revision.program == "s = '\ufffd'\nprint(1)" and revision.verdict.accepted
    for kind, record in ((Solution, drafts[0]), (Critique, critiques[0]), (Revision, revision)):
        jsonl.write(tmp_path / "records.jsonl", [record])
        assert jsonl.read(kind, tmp_path / "records.jsonl") == [record]


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("/run_tests", b"{", "not JSON"),
        ("/run_tests", b"[]", "executions: a list is needed"),
        ("/run_tests", b'{"executions": [{"program": 1}]}', "executions[0].program: expected str, got int 1"),
        ("/run_code", b'{"code": "", "language": "cobol"}', "language: 'cobol' is not supported; allowed: python, cpp"),
        ("/run_code", b'{"language": "python"}', "code: Field required"),
        ("/run_code", b'{"code": "", "language": "python", "run_timeout": 1e9}', "run_timeout: 1000000000.0"),
        ("/submit", b'{"dataset": "x", "id": 1, "completion": "", "config": {}}', "is not one of CommonOJDataset"),
    ],
)
def test_bad_requests_get_one_clear_line(url: str, path: str, body: bytes, message: str) -> None:
    answer = httpx.post(url + path, content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400 and message in answer.json()["detail"]


def test_bad_comparisons_and_limits_are_refused(url: str) -> None:
    for change, message in (
        ({"comparison": "fuzzy"}, "comparison: 'fuzzy' is not one of exact"),
        ({"limits": {"cpu_s": 0.0}}, "limits.cpu_s: 0.0 is not in"),
    ):
        body = {"executions": [jsonl.encode(double(1)) | change]}
        answer = httpx.post(url + "/run_tests", json=body)
        assert answer.status_code == 400 and message in answer.json()["detail"]


def test_health_and_metrics(url: str) -> None:
    assert httpx.get(url + "/health").json()["workers"] == 2
    before = httpx.get(url + "/metrics").text
    body = {"executions": [jsonl.encode(double(7, 5))]}
    verdict = jsonl.decode(Verdict, httpx.post(url + "/run_tests", json=body).json()["verdicts"][0])
    assert verdict.status == "wrong_answer"

    def value(text: str, name: str) -> float:
        return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name + " "))

    after = httpx.get(url + "/metrics").text
    for name, change in (("executor_runs_total", 1), ("executor_tests_total", 2), ("executor_queue_length", 0)):
        assert value(after, name) - value(before, name) == change
    assert 'executor_verdicts_total{status="wrong_answer"}' in after and "executor_request_seconds_bucket" in after


def test_token_and_size_limit() -> None:
    with serving(workers=1, token="secret", max_body_bytes=2000) as (address, _):
        assert httpx.get(address + "/health").status_code == 200
        body = {"executions": [jsonl.encode(double(1))]}
        for headers in ({}, {"authorization": "Bearer wrong"}):
            assert httpx.post(address + "/run_tests", json=body, headers=headers).status_code == 401
            assert httpx.get(address + "/metrics", headers=headers).status_code == 401
        right = {"authorization": "Bearer secret"}
        assert httpx.post(address + "/run_tests", json=body, headers=right).status_code == 200
        assert httpx.post(address + "/run_tests", content=b" " * 2001, headers=right).status_code == 413
        chunked = httpx.post(address + "/run_tests", content=iter([b" " * 1500, b" " * 1500]), headers=right)
        assert chunked.status_code == 413
        with ExecutorClient(lambda: [address], token="secret") as executor:
            assert executor.run_many([double(3)])[0].accepted


def sleeper(seconds: float, n: int = 0) -> Execution:
    tests = (StdinTest(stdin="", expected_stdout="done"),)
    program = f"import time; time.sleep({seconds}); print('done') #{n}"
    return Execution(program=program, tests=tests, limits=Limits(cpu_s=5.0, wall_s=20.0))


@pytest.mark.slow
def test_beyond_the_queue_the_answer_is_429_and_the_client_waits() -> None:
    with serving(workers=1, max_waiting=1) as (address, _):
        body = {"executions": [jsonl.encode(sleeper(1.0))]}
        with httpx.stream("GET", address + "/health"):
            background = threading.Thread(target=httpx.post, args=(address + "/run_tests",), kwargs={"json": body})
            background.start()
            while httpx.get(address + "/health").json()["waiting"] == 0:
                pass
            refused = httpx.post(address + "/run_tests", json=body)
            assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
            with ExecutorClient(lambda: [address]) as executor:
                assert all(verdict.accepted for verdict in executor.run_many([sleeper(0.0, n) for n in range(3)]))
            background.join()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2, signal.SIGINT])
def test_a_signal_drains(number: signal.Signals) -> None:
    """What was accepted is answered; then the process ends by itself with exit code 0, its jails with it."""
    with serving(workers=1) as (address, process):
        answers: list[httpx.Response] = []
        body = {"executions": [jsonl.encode(sleeper(1.0))]}
        request = threading.Thread(target=lambda: answers.append(httpx.post(address + "/run_tests", json=body)))
        request.start()
        while httpx.get(address + "/health").json()["waiting"] == 0:
            pass
        process.send_signal(number)
        request.join()
        assert process.wait(timeout=30) == 0
        assert answers[0].json()["verdicts"][0]["status"] == "accepted"
        with pytest.raises(httpx.ConnectError):
            httpx.get(address + "/health")


def test_a_port_in_use_is_one_clear_line(url: str) -> None:
    from ctrl_hpc.sandbox.server import serve

    port = int(url.rsplit(":", 1)[1])
    with pytest.raises(ValueError, match=f"cannot listen on 127.0.0.1:{port}: Address already in use"):
        serve(port=port)


def test_what_on_ready_raises_ends_the_service() -> None:
    from ctrl_hpc.sandbox.server import serve

    def fail(_: str) -> None:
        raise ValueError("cannot register")

    with pytest.raises(ValueError, match="cannot register"):
        serve(workers=1, on_ready=fail)


def test_the_cache_is_shared_between_services(tmp_path: Path) -> None:
    batch = [double(n) for n in range(5)]
    with (
        serving(workers=1, cache_dir=str(tmp_path)) as (first, _),
        serving(workers=1, cache_dir=str(tmp_path)) as (
            second,
            _,
        ),
    ):
        for address in (first, second):
            with ExecutorClient(lambda address=address: [address]) as executor:  # type: ignore[misc]
                assert all(verdict.accepted for verdict in executor.run_many(batch))
        assert "executor_runs_total 5.0" in httpx.get(first + "/metrics").text
        assert "executor_cache_hits_total 5.0" in httpx.get(second + "/metrics").text


def test_tests_that_executions_name_are_read_from_the_shared_disk_or_sent(tmp_path: Path) -> None:
    problem = Problem(id="p", source="s", split="test", prompt="", tests=double(7).tests)
    with TestStore(tmp_path / "run") as store, serving(workers=1, tests_dir=str(tmp_path / "run")) as (url, _):
        named = replace(double(7), tests=store.keep(problem, []).tests)
        body = {"executions": [jsonl.encode(named)]}
        assert httpx.post(url + "/run_tests", json=body).json()["verdicts"][0]["status"] == "accepted"
        sent = TestStore(tmp_path / "elsewhere").keep(replace(problem, tests=double(8).tests), []).tests
        lost = jsonl.decode(Execution, jsonl.encode(replace(named, tests=TestStore().keep(problem, []).tests)))
        assert httpx.post(url + "/run_tests", json={"executions": [jsonl.encode(replace(named, tests=sent))]}).json()[
            "missing"
        ] == [sent.sha256]
        with ExecutorClient(lambda: [url]) as executor:
            runs = [named, replace(double(8), tests=sent), replace(double(8, 3), tests=sent), lost]
            verdicts = executor.run_many(runs)
            assert [verdict.passed for verdict in verdicts] == [2, 2, 0, 2]
        assert httpx.post(url + "/tests", content=b'[{"kind": "no"}]').status_code == 400


def test_tests_that_are_nowhere_fail_alone(url: str) -> None:
    nowhere = replace(double(9), tests=StoredTests("0" * 64, 2))
    with ExecutorClient(lambda: [url]) as executor:
        verdicts = executor.run_many([double(1), nowhere, double(2)])
    assert [verdict.status for verdict in verdicts] == ["accepted", "sandbox_error", "accepted"]
    assert "the tests 000000000000 are not in the run's store" in verdicts[1].detail


def test_sandbox_fusion_run_code(url: str) -> None:
    def run(code: str, **options: Any) -> sandbox_fusion.RunCodeResponse:
        request = sandbox_fusion.RunCodeRequest(code=code, language="python", **options)
        return sandbox_fusion.run_code(request, endpoint=url, max_attempts=1)

    done = run("print(input())", stdin="hello")
    assert (done.status, done.run_result.stdout, done.run_result.return_code) == ("Success", "hello\n", 0)
    failed = run("import sys; sys.exit(3)")
    assert (failed.status, failed.run_result.status, failed.run_result.return_code) == ("Failed", "Finished", 3)
    late = run("while True: pass", run_timeout=0.5)
    assert (late.status, late.run_result.status) == ("Failed", "TimeLimitExceeded")
    flood = run("print('x' * 50_000_000)")
    assert (flood.status, flood.message) == ("Failed", "output_limit") and flood.run_result.return_code != 0
    summary = sandbox_fusion.summary_run_code_result(failed, sandbox_fusion.SummaryMapping(Success="ok", Failed="bad"))
    assert summary == "bad"


def submit(url: str, completion: str, kind: str, test: Any, **config: Any) -> sandbox_fusion.EvalResult:
    settings = sandbox_fusion.TestConfig(
        dataset_type=kind, language="python", provided_data={"id": 1, "test": test}, **config
    )
    request = sandbox_fusion.SubmitRequest(dataset="any", id=1, completion=completion, config=settings)
    return sandbox_fusion.submit(request, endpoint=url, max_attempts=1)


def test_sandbox_fusion_submit_common_oj(url: str) -> None:
    cases = [{"input": {"stdin": f"{n}\n"}, "output": {"stdout": f"{n + 1}\n"}} for n in range(4)]
    right = submit(url, "Here:\n```python\nprint(int(input()) + 1)\n```\n", "CommonOJDataset", cases)
    assert right.accepted and len(right.tests) == 4 and right.extracted_code == "print(int(input()) + 1)"
    assert right.tests[0].test_info == cases[0]
    wrong = "```python\nprint(int(input()) * 2)\n```"
    stopped = submit(url, wrong, "CommonOJDataset", json.dumps(cases))
    assert not stopped.accepted and [test.passed for test in stopped.tests] == [False]
    whole = submit(url, wrong, "CommonOJDataset", cases, extra={"run_all_cases": True})
    assert [test.passed for test in whole.tests] == [False, True, False, False]


def test_sandbox_fusion_submit_live_code_bench(url: str) -> None:
    calls = {"inputs": ["[1, 2]\n3", "[]\n0"], "outputs": ["[4, 5]", "[]"], "fn_name": "shift"}
    solution = (
        "```python\nclass Solution:\n  def shift(self, xs: List[int], k: int):\n    return [x + k for x in xs]\n```"
    )
    test = {"input_output": json.dumps(calls)}
    packed = base64.b64encode(zlib.compress(pickle.dumps(json.dumps(test)))).decode()
    for form in (test, json.dumps(test), packed):
        assert submit(url, solution, "LiveCodeBenchDataset", form).accepted
    assert not submit(url, solution.replace("+", "-"), "LiveCodeBenchDataset", test).accepted
    stdio = {"input_output": json.dumps({"inputs": ["2\n"], "outputs": ["0.50\n"]})}
    assert submit(url, "```python\nprint(1 / int(input()))\n```", "LiveCodeBenchDataset", stdio).accepted


def test_a_pickle_that_names_code_is_refused(url: str) -> None:
    packed = base64.b64encode(zlib.compress(pickle.dumps(print))).decode()
    with pytest.raises(Exception, match=r"builtins\.print is not plain data"):
        submit(url, "```python\n```", "LiveCodeBenchDataset", packed)


def encoded(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def test_sandbox_fusion_files(url: str) -> None:
    def run(code: str, **options: Any) -> sandbox_fusion.RunCodeResponse:
        request = sandbox_fusion.RunCodeRequest(code=code, language="python", **options)
        return sandbox_fusion.run_code(request, endpoint=url, max_attempts=1)

    files = {"data/in.txt": encoded("7"), "tool.py": encoded("def f(x): return x * 6"), "absent": None}
    code = "import os, tool; os.mkdir('out'); print(tool.f(int(open('data/in.txt').read())), file=open('out/a', 'w'))"
    done = run(code, files=files, fetch_files=["out/a", "data/in.txt", "nowhere"])
    assert done.status == "Success", done
    assert done.files == {"out/a": encoded("42\n"), "data/in.txt": encoded("7")}
    after = run("import os; print(os.listdir('.'))", files={"x": encoded("x")})
    assert after.run_result.stdout == "['x']\n"


def test_files_named_like_modules_mislead_only_the_program() -> None:
    """In fresh jails, where the harness is imported only once the files are there."""
    files = {name: base64.b64encode(b"raise SystemExit").decode() for name in ("json.py", "base64.py", "stat.py")}
    with Sandbox(workers=1, fresh=True) as sandbox:
        work = "open('/tmp/out', 'w').write('x')"
        result, fetched = sandbox.submit_program(work, "", LIMITS, files, ["out"]).result()
        assert result.status == "accepted" and fetched == {"out": base64.b64encode(b"x").decode()}
        result, _ = sandbox.submit_program("import json; print(1)", "", LIMITS, files, []).result()
        assert (result.exit_code, result.stdout) == (0, b"")
        result, _ = sandbox.submit_program("import os; print(os.listdir())", "", LIMITS, {}, []).result()
        assert result.stdout == b"[]\n"


def test_files_too_large_to_be_fetched_cost_the_program_nothing(url: str) -> None:
    """Whatever a program leaves, what it did is answered."""
    code = "for name in 'ab': open(name, 'wb').truncate(16 << 20)\nopen('c', 'w').write('x')\nprint(1)"
    body = {"code": code, "language": "python", "fetch_files": ["a", "b", "c", *["c"] * 20_000]}
    answer = httpx.post(url + "/run_code", json=body, timeout=60).json()
    assert answer["run_result"]["stdout"] == "1\n" and set(answer["files"]) <= {"a", "c"}


_LIMITED = '"limits":{"cpu_s":1,"wall_s":2,"memory_mb":64,"output_bytes":1000,"processes":4}'


@pytest.mark.parametrize(
    ("path", "body", "told"),
    [
        (
            "/run_code",
            '{"code": "1", "language": "python", "run_timeout": NaN}',
            "run_timeout: Input should be a finite",
        ),
        (
            "/run_code",
            '{"code": "1", "language": "cpp", "compile_timeout": NaN}',
            "compile_timeout: Input should be a f",
        ),
        (
            "/run_code",
            '{"code": "1", "language": "cpp", "compile_timeout": 1e300}',
            "compile_timeout_s: 1e+300 is more",
        ),
        (
            "/run_code",
            '{"code": "1", "language": "python", "files": {"a": ""}, "memory_limit_MB": 2000000}',
            "memory_mb: 2000000 is",
        ),
        (
            "/run_tests",
            f'{{"executions":[{{"program":"1","tests":[],"time_budget_s":NaN,{_LIMITED}}}]}}',
            "time_budget_s",
        ),
        (
            "/submit",
            '{"dataset":"","id":1,"completion":"","config":{"run_timeout":Infinity}}',
            "config.run_timeout: In",
        ),
        ("/tests", "[" * 100_000, "not JSON that can be read: nested too deeply"),
    ],
)
def test_numbers_that_are_none_and_bodies_too_deep_are_refused(url: str, path: str, body: str, told: str) -> None:
    answer = httpx.post(url + path, content=body, headers={"content-type": "application/json"}, timeout=60)
    assert answer.status_code == 400 and told in answer.json()["detail"], answer.text


def test_fetching_follows_no_link_and_opens_no_pipe(url: str) -> None:
    code = """
import os
os.symlink("/runner/runner.py", "link"); os.symlink("/runner", "folder"); os.mkfifo("fifo"); os.mkdir("directory")
open("plain", "w").write("x"); os.link("plain", "hard")
if os.fork() == 0:
    os.setsid()
    while True:
        try: os.symlink("/runner/runner.py", "late")
        except OSError: pass
"""
    names = ["link", "folder/runner.py", "fifo", "directory", "plain"]
    request = sandbox_fusion.RunCodeRequest(code=code, language="python", fetch_files=names)
    assert sandbox_fusion.run_code(request, endpoint=url, max_attempts=1).files == {"plain": encoded("x")}
    for path in ("../etc/passwd", "/etc/passwd", "a/../../b", ""):
        body = {"code": "", "language": "python", "fetch_files": [path]}
        answer = httpx.post(url + "/run_code", json=body)
        assert answer.status_code == 400 and "is not a path below the working folder" in answer.json()["detail"]
    huge = {"code": "", "language": "python", "files": {"x": base64.b64encode(bytes(20 << 20)).decode()}}
    assert httpx.post(url + "/run_code", json=huge, timeout=60).json()["detail"].startswith("files: they do not fit")
