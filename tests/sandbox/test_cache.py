"""The verdict cache: what it keeps, for how long, and that programs in flight together run once."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from ctrl_hpc.records import Execution, Limits, StdinTest, TestResult, Verdict
from ctrl_hpc.sandbox import Sandbox
from ctrl_hpc.sandbox.cache import VerdictCache, lasting

EXECUTION = Execution(
    program="print(1)", tests=(StdinTest(stdin="", expected_stdout="1"),), limits=Limits(cpu_s=2.0, wall_s=9.0)
)
ACCEPTED = Verdict(
    status="accepted", tests=(TestResult(status="accepted", stdout=b"1\n\xff", exit_code=0, cpu_s=0.01),)
)


def one(status: str, cpu_s: float = 0.0, stdout: bytes = b"") -> Verdict:
    result = TestResult(status=status, cpu_s=cpu_s, stdout=stdout)  # type: ignore[arg-type]
    return Verdict(status=status, tests=(result,))  # type: ignore[arg-type]


def test_a_verdict_comes_back_whole_from_another_process_s_cache(tmp_path: Path) -> None:
    first, second = VerdictCache(tmp_path), VerdictCache(tmp_path)
    key = first.key(EXECUTION)
    assert second.get(key) is None and first.put(key, ACCEPTED)
    assert second.get(second.key(EXECUTION)) == ACCEPTED


@pytest.mark.parametrize(
    "change",
    [
        {"program": "print(2)"},
        {"tests": (StdinTest(stdin="", expected_stdout="2"),)},
        {"limits": Limits(cpu_s=3.0, wall_s=9.0)},
        {"comparison": "float"},
        {"stop_at_first_failure": True},
        {"time_budget_s": 9.0},
        {"language": "cpp"},
    ],
)
def test_the_key_tells_all_that_matters_apart(tmp_path: Path, change: dict) -> None:
    cache = VerdictCache(tmp_path)
    assert cache.key(replace(EXECUTION, **change)) != cache.key(EXECUTION) == cache.key(replace(EXECUTION))


def test_the_key_depends_on_python_and_runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = VerdictCache(tmp_path).key(EXECUTION)
    monkeypatch.setattr("sys.version", "4.0")
    assert VerdictCache(tmp_path).key(EXECUTION) != before


def test_what_is_not_kept(tmp_path: Path) -> None:
    """Sandbox faults, kills by the wall clock, and huge outputs; kills by CPU time are kept."""
    cache = VerdictCache(tmp_path, max_mb=16)  # a verdict has at most a sixteenth
    noise = os.urandom(1 << 20)
    for verdict, kept in (
        (one("sandbox_error"), False),
        (replace(ACCEPTED, tests=one("sandbox_error").tests), False),
        (one("time_limit", cpu_s=0.1), False),
        (one("time_limit", cpu_s=2.0), True),
        (one("wrong_answer", stdout=noise), False),
        (one("wrong_answer", stdout=noise[: 1 << 19]), True),
        (one("wrong_answer", stdout=b"x" * (1 << 22)), True),
        (one("wrong_answer"), True),
    ):
        assert (lasting(EXECUTION, verdict) and cache.put(cache.key(EXECUTION), verdict)) == kept


def test_a_torn_file_counts_as_absent(tmp_path: Path) -> None:
    cache = VerdictCache(tmp_path)
    keys = [cache.key(replace(EXECUTION, program=f"print({n})")) for n in range(2)]
    for key in keys:
        cache.put(key, ACCEPTED)
    cache.close()
    (values,) = tmp_path.glob("*.dat")
    values.write_bytes(values.read_bytes()[:-1] + b"?")
    again = VerdictCache(tmp_path)
    assert again.get(keys[0]) == ACCEPTED and again.get(keys[1]) is None
    assert again.put(keys[1], ACCEPTED) and again.get(keys[1]) == ACCEPTED


def test_a_large_program_is_a_hit(tmp_path: Path) -> None:
    tests = tuple(StdinTest(stdin="", expected_stdout="7" * 200_000) for _ in range(10))
    large = Execution(program="print('7' * 200_000)", tests=tests, limits=EXECUTION.limits, outputs="shown")
    with Sandbox(workers=1, cache_dir=tmp_path) as sandbox:
        assert [verdict.passed for verdict in sandbox.run_many([large]) + sandbox.run_many([large])] == [10, 10]
        assert (sandbox.counts["executions"], sandbox.counts["cache_hits"]) == (1, 1)
    assert len(list(tmp_path.iterdir())) == 2
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 400


def test_identical_programs_run_once(tmp_path: Path) -> None:
    slow = Execution(
        program="import time; time.sleep(0.5); print(1)",
        tests=EXECUTION.tests,
        limits=EXECUTION.limits,
    )
    with Sandbox(workers=2, cache_dir=tmp_path) as sandbox:
        assert all(verdict.accepted for verdict in sandbox.run_many([slow] * 10))
        assert (sandbox.counts["executions"], sandbox.counts["joined"], sandbox.counts["cache_hits"]) == (1, 9, 0)
        assert sandbox.run_many([slow])[0].accepted
        assert (sandbox.counts["executions"], sandbox.counts["cache_hits"]) == (1, 1)
    with Sandbox(workers=1, cache_dir=tmp_path) as other:
        assert other.run_many([slow])[0].accepted
        assert (other.counts["executions"], other.counts["cache_hits"]) == (0, 1)


def test_without_a_cache_every_program_runs() -> None:
    with Sandbox(workers=1) as sandbox:
        sandbox.run_many([EXECUTION] * 3)
        assert sandbox.counts["executions"] == 3


def test_a_lost_disk_costs_the_cache_not_the_verdict(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with Sandbox(workers=1, cache_dir=tmp_path / "cache") as sandbox:
        (tmp_path / "cache").rmdir()
        (tmp_path / "cache").write_text("a file")
        assert sandbox.run_many([EXECUTION])[0].accepted
    assert "the verdict cache fails" in caplog.text
    with pytest.raises(ValueError, match="cannot make the verdict cache"):
        VerdictCache(tmp_path / "cache" / "inner")
