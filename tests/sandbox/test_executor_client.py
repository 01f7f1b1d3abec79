"""The client against scripted services: spreading, retrying elsewhere, busy answers, faults that persist."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import json_endpoint
import pytest

from ctrl_hpc.records import Execution, Limits, StdinTest
from ctrl_hpc.sandbox.client import ExecutorClient
from ctrl_hpc.service import fleet

Answer = Callable[[list[dict[str, Any]], dict[str, str]], tuple[int, Any]]


def executions(count: int) -> list[Execution]:
    tests = (StdinTest(stdin="", expected_stdout=""),)
    return [Execution(program=str(n), tests=tests, limits=Limits(wall_s=1.0)) for n in range(count)]


def judged(items: list[dict[str, Any]], status: str = "") -> tuple[int, Any]:
    """Accept even programs, reject odd ones."""
    verdicts = [{"status": status or ("accepted", "wrong_answer")[int(item["program"]) % 2]} for item in items]
    return 200, {"verdicts": verdicts}


def service(answer: Answer) -> AbstractContextManager[str]:
    """A service that answers ``/run_tests`` as told; status 0 drops the connection."""

    def answered(body: Any, headers: dict[str, str]) -> tuple[int, dict[str, str], Any]:
        status, data = answer(body["executions"], headers)
        return status, {}, data

    return json_endpoint.serving(answered)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet, "POLL_S", 0.02)
    monkeypatch.setattr(fleet, "COOL_DOWN_S", (0.01, 0.05))


def statuses(urls: list[str], count: int, **options: Any) -> list[str]:
    with ExecutorClient(lambda: urls, **options) as executor:
        return [verdict.status for verdict in executor.run_many(executions(count))]


EXPECTED = ["accepted", "wrong_answer"] * 20


def test_a_batch_is_spread_over_all_services_in_order() -> None:
    served: list[list[str]] = [[], []]

    def remember(index: int) -> Answer:
        def answer(items: list[dict[str, Any]], _: dict[str, str]) -> tuple[int, Any]:
            served[index] += [item["program"] for item in items]
            return judged(items)

        return answer

    with service(remember(0)) as one, service(remember(1)) as two:
        assert statuses([one, two], 40) == EXPECTED
    assert served[0] and served[1] and sorted(served[0] + served[1], key=int) == [str(n) for n in range(40)]


@pytest.mark.parametrize("failure", [0, 500, 502])
def test_lost_work_is_done_elsewhere(failure: int) -> None:
    with service(lambda *_: (failure, {})) as broken, service(lambda items, _: judged(items)) as sound:
        assert statuses([broken, sound, "http://127.0.0.1:9"], 40) == EXPECTED


def test_sandbox_faults_are_retried_elsewhere_and_never_wrong_answers() -> None:
    with service(lambda items, _: judged(items, "sandbox_error")) as broken:
        with service(lambda items, _: judged(items)) as sound:
            assert statuses([broken, sound], 40) == EXPECTED
        assert statuses([broken], 3) == ["sandbox_error"] * 3


def test_work_that_every_service_loses_is_a_sandbox_error() -> None:
    with service(lambda *_: (0, {})) as broken, ExecutorClient(lambda: [broken]) as executor:
        (verdict,) = executor.run_many(executions(1))
    assert verdict.status == "sandbox_error" and [test.status for test in verdict.tests] == ["sandbox_error"]


def test_a_busy_service_is_asked_again() -> None:
    refusals = iter([429, 503, 429])

    def answer(items: list[dict[str, Any]], _: dict[str, str]) -> tuple[int, Any]:
        status = next(refusals, 200)
        return judged(items) if status == 200 else (status, {})

    with service(answer) as url:
        assert statuses([url], 40) == EXPECTED


def test_services_that_appear_later_are_used() -> None:
    with ExitStack() as stack:
        urls: list[str] = []
        looks = 0

        def endpoints() -> list[str]:
            nonlocal looks
            looks += 1
            if looks == 5:
                urls.append(stack.enter_context(service(lambda items, _: judged(items))))
            return urls

        with ExecutorClient(endpoints) as executor:
            assert [verdict.status for verdict in executor.run_many(executions(4))] == EXPECTED[:4]


def test_a_service_that_leaves_the_list_loses_its_work_to_another() -> None:
    asked, release = threading.Event(), threading.Event()

    def hang(items: list[dict[str, Any]], _: dict[str, str]) -> tuple[int, Any]:
        asked.set()
        release.wait(30)
        return 500, {}

    with service(hang) as hanging, service(lambda items, _: judged(items)) as sound:
        with ExecutorClient(lambda: [sound] if asked.is_set() else [hanging]) as executor:
            try:
                assert [verdict.status for verdict in executor.run_many(executions(4))] == EXPECTED[:4]
            finally:
                release.set()


def test_nobody_there_and_refusals_are_errors() -> None:
    with pytest.raises(RuntimeError, match="no executor has answered"):
        statuses([], 1, patience_s=0.1)
    with pytest.raises(RuntimeError, match="no executor has answered"):
        statuses(["http://127.0.0.1:9"], 1, patience_s=0.1)
    with service(lambda *_: (401, {"detail": "a bearer token is needed"})) as url:
        with pytest.raises(ValueError, match="refuses: 401"):
            statuses([url], 1)
    assert statuses([], 0) == []


def test_an_execution_too_large_ends_alone() -> None:
    def answer(items: list[dict[str, Any]], _: dict[str, str]) -> tuple[int, Any]:
        return (413, {"detail": "too large"}) if any(item["program"] == "5" for item in items) else judged(items)

    with service(answer) as url, ExecutorClient(lambda: [url]) as executor:
        verdicts = executor.run_many(executions(40))
    assert [verdict.status for verdict in verdicts] == [*EXPECTED[:5], "sandbox_error", *EXPECTED[6:]]
    assert verdicts[5].detail == f"executor {url}/run_tests refuses: 413 too large"


def test_answers_that_are_none_are_losses() -> None:
    answers = iter([{}, {"verdicts": [{"status": "fine"}]}, {"verdicts": []}, "text"])

    def answer(items: list[dict[str, Any]], _: dict[str, str]) -> tuple[int, Any]:
        told = next(answers, None)
        return judged(items) if told is None else (200, told)

    with service(answer) as url:
        assert statuses([url], 2) == EXPECTED[:2]


def test_a_look_at_who_is_there_that_hangs_stops_no_work() -> None:
    first, hangs, release = iter([True]), threading.Event(), threading.Event()

    def answer(items: list[dict[str, Any]], _: dict[str, str]) -> tuple[int, Any]:
        return judged(items) if hangs.wait(30) else (400, {})

    with service(answer) as url:

        def endpoints() -> list[str]:
            if not next(first, False):
                hangs.set()
                release.wait(30)
            return [url]

        with ExecutorClient(endpoints) as executor:
            assert [verdict.status for verdict in executor.run_many(executions(40))] == EXPECTED
            assert hangs.is_set() and not release.is_set()
            release.set()


def test_a_service_that_is_silent_though_listed_loses_its_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet, "QUESTION_S", 0.05)
    monkeypatch.setattr(fleet, "SILENT_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as mute:  # takes connections, answers nothing
        hung = f"http://127.0.0.1:{mute.getsockname()[1]}"
        with service(lambda items, _: judged(items)) as sound:
            assert statuses([hung, sound], 40) == EXPECTED


def test_a_slow_service_that_answers_about_its_health_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet, "QUESTION_S", 0.05)
    monkeypatch.setattr(fleet, "SILENT_S", 0.3)
    asked: list[str] = []

    def answer(items: list[dict[str, Any]], _: dict[str, str]) -> tuple[int, Any]:
        asked.extend(item["program"] for item in items)
        time.sleep(1.0)
        return judged(items)

    with service(answer) as slow:  # it knows no /health: 501 is a sign of life, too
        assert statuses([slow], 4) == EXPECTED[:4]
    assert sorted(asked) == ["0", "1", "2", "3"]


def test_the_token_is_sent() -> None:
    seen = []

    def answer(items: list[dict[str, Any]], headers: dict[str, str]) -> tuple[int, Any]:
        seen.append(headers.get("authorization"))
        return judged(items)

    with service(answer) as url:
        statuses([url], 1, token="secret")
    assert seen == ["Bearer secret"]
