"""Thousands of runs, one in five misbehaving: nothing wrong, nothing left."""

from __future__ import annotations

import pytest
from soak import CPP, CPP_MISBEHAVING, MISBEHAVING, executions, soak

pytestmark = pytest.mark.alone  # short limits, and what is left on the machine is counted


def test_one_in_five_misbehaves_in_every_way() -> None:
    hostile = {**MISBEHAVING, **CPP_MISBEHAVING}
    names = [name for name, _, _ in executions(2000, seed=0)]
    assert [index % 5 == 4 for index in range(2000)] == [name in hostile for name in names]
    assert {*hostile, *CPP} <= set(names) and {"stdin", "function", "assert"} <= set(names)


@pytest.mark.slow
def test_two_thousand_runs_are_clean() -> None:
    report = soak(2000)
    assert (report.runs, dict(report.wrong)) == (2000, {})
    assert {kind: left for kind, left in report.left.items() if left} == {}
    assert report.clean
