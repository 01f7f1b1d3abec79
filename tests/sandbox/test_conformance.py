"""The verdicts of the data sets' own graders, recorded by bench/conformance, repeated here without their checkouts."""

from __future__ import annotations

import json
import re

import conformance
import pairs
import pytest

FACTS = json.loads(conformance.FACTS.read_text(encoding="utf-8"))


def test_every_data_set_has_its_facts() -> None:
    assert set(FACTS) == set(pairs.PAIRS)
    for dataset, make in pairs.PAIRS.items():
        made = make()
        assert len(made) >= 500 and len({pair.id for pair in made}) == len(made), dataset
        told = f"{dataset}: the pairs have changed: run bench/conformance {dataset} --harness CHECKOUT --record"
        assert FACTS[dataset]["pairs"] == pairs.digest(made), told
        assert len(FACTS[dataset]["passed"]) == len(made)
        assert set(conformance.reasons(dataset)) <= {pair.id for pair in made}


def test_the_page_tells_the_facts() -> None:
    page = (conformance.ROOT / "docs/executors.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| [^|]* \| (\d+) \| (\d+) \| (\d+) \|$", page, re.MULTILINE)
    assert {name: tuple(map(int, numbers)) for name, *numbers in rows} == {
        name: (len(FACTS[name]["passed"]), FACTS[name]["passed"].count("1"), len(conformance.reasons(name)))
        for name in pairs.PAIRS
    }


@pytest.mark.slow
@pytest.mark.parametrize("dataset", pairs.PAIRS)
def test_verdicts_are_the_official_ones(dataset: str) -> None:
    """All of them, but for the disagreements whose reason is that the official grader errs."""
    made = pairs.PAIRS[dataset]()
    passed = [digit == "1" for digit in FACTS[dataset]["passed"]]
    assert 100 < sum(passed) < len(made) - 100
    verdicts = conformance.ours(dataset, made)
    differ = {
        pair.id: f"official {theirs}, here {verdict.status} {verdict.detail}"
        for pair, theirs, verdict in zip(made, passed, verdicts, strict=True)
        if theirs != verdict.accepted
    }
    known = conformance.reasons(dataset)
    assert {name: told for name, told in differ.items() if name not in known} == {}
    assert set(differ) == set(known)
