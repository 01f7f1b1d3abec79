"""SandboxFusion to the letter: our answers have the facts of the original's (``fusion_requests.py``)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import fusion_requests
import httpx
import pytest
from test_executor_server import serving

from ctrl_hpc.sandbox import fusion

pytestmark = pytest.mark.alone  # short limits

KNOWN = {(kind, name): facts for kind, name, facts in json.loads(fusion_requests.ANSWERS.read_text())}


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving(workers=2) as (address, _):
        yield address


def test_every_request_has_an_answer() -> None:
    asked = {("python", name) for name in fusion_requests.REQUESTS} | {
        ("cpp", name) for name in fusion_requests.CPP_REQUESTS
    }
    assert asked == KNOWN.keys() and len(fusion_requests.REQUESTS) >= 60


def differing(url: str, kind: str, requests: dict[str, tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    """The answers that are not the original's, by request."""
    with ThreadPoolExecutor(4) as threads:
        answers = threads.map(lambda name: fusion_requests.ask(url, *requests[name]), requests)
        return {name: answer for name, answer in zip(requests, answers, strict=True) if answer != KNOWN[kind, name]}


def test_answers_in_python_are_the_original_s(url: str) -> None:
    assert differing(url, "python", fusion_requests.REQUESTS) == {}


@pytest.mark.slow
def test_answers_in_cpp_are_the_original_s(url: str) -> None:
    assert differing(url, "cpp", fusion_requests.CPP_REQUESTS) == {}


def test_live_code_bench_answers_a_result_a_case_where_asked(url: str) -> None:
    path, body = fusion_requests.REQUESTS["wrong on the last of ten"]
    one = httpx.post(url + path, json=body).json()
    assert [test["passed"] for test in one["tests"]] == [False] and not one["accepted"]
    body["config"]["extra"] = {"per_case": True}
    each = httpx.post(url + path, json=body).json()
    assert [test["passed"] for test in each["tests"]] == [True] * 9 + [False]


def test_a_request_s_own_extraction_runs_in_a_jail(url: str) -> None:
    """Its blocks win by priority; it knows SandboxFusion's helpers, no more; where it fails the request is refused."""
    cases = [{"input": {"stdin": ""}, "output": {"stdout": "2"}}]
    body = {
        "dataset": "any",
        "id": 1,
        "completion": "```python\nprint(1)\n```\n```py\nprint(2)\n```",
        "config": {"dataset_type": "CommonOJDataset", "language": "python", "provided_data": {"id": 1, "test": cases}},
    }
    last = "block = extract_fenced_code(completion)[-1]; block.priority = 40; submit_code_blocks([block])"
    looks = "import os\nassert os.getuid() == 65534 and not os.path.exists('/etc')\n"
    for logic, code in ((None, "print(1)"), (looks + last, "print(2)"), (last.replace("40", "30"), "print(1)")):
        body["config"]["custom_extract_logic"] = logic  # type: ignore[index]
        answer = httpx.post(url + "/submit", json=body).json()
        assert answer["extracted_code"] == code and answer["accepted"] == (code == "print(2)")
    body["config"]["custom_extract_logic"] = "re.findall"  # type: ignore[index]
    answer = httpx.post(url + "/submit", json=body)
    assert answer.status_code == 400 and "it fails: NameError: name 're' is not defined" in answer.json()["detail"]


def test_only_wall_clock_time_is_limited() -> None:
    found = fusion.limits(2.0)
    assert found.wall_s == 2.0 and found.cpu_s >= 8.0


@pytest.mark.parametrize("folder", ["/etc/passwd", "../x", "/tmp/../etc/passwd", "/mnt", "/tmp", "/mnt/../x"])
def test_paths_that_lead_out_are_refused(url: str, folder: str) -> None:
    body: dict[str, Any] = {"code": "", "language": "python", "fetch_files": [folder]}
    answer = httpx.post(url + "/run_code", json=body)
    assert answer.status_code == 400 and "is not a path below the working folder" in answer.json()["detail"]
