"""Every attack is contained: as root and as an ordinary user, in fresh jails and in one warm jail shared by all."""

from __future__ import annotations

import json
import os

import attack_programs
import ordinary_user
import pytest

pytestmark = pytest.mark.alone  # short limits, and an ordinary user's processes are counted on the whole machine

ATTACKS = attack_programs.load()
_AS_USER = """
import json, sys
import attack_programs
attacks = attack_programs.load()
verdicts = attack_programs.run(attacks, fresh=sys.argv[1] == "fresh")
print(json.dumps([attack_programs.complaint(attack, verdict) for attack, verdict in zip(attacks, verdicts)]))
"""


def test_the_suite_is_whole() -> None:
    groups = {attack.group for attack in ATTACKS} - {"system_calls_x86_64"}
    assert groups == {"host_files", "devices", "network", "processes", "resources", "state", "reward_hacks"}
    assert len(ATTACKS) >= 150


def complaints(found: list[str]) -> dict[str, str]:
    assert len(found) == len(ATTACKS)
    return {f"{attack.group}/{attack.name}": text for attack, text in zip(ATTACKS, found, strict=True) if text}


@pytest.mark.slow
@pytest.mark.parametrize("jails", ["warm", "fresh"])
def test_attacks_are_contained(jails: str) -> None:
    """As whoever runs the tests: in most places root, and then with a cgroup."""
    verdicts = attack_programs.run(ATTACKS, fresh=jails == "fresh")
    assert complaints([attack_programs.complaint(*pair) for pair in zip(ATTACKS, verdicts, strict=True)]) == {}


if os.getuid() == 0:  # an ordinary user's own run is the test above

    @pytest.mark.slow
    @pytest.mark.parametrize("jails", ["warm", "fresh"])
    def test_attacks_are_contained_as_an_ordinary_user(jails: str) -> None:
        found = json.loads(ordinary_user.run(_AS_USER, jails).splitlines()[-1])
        assert complaints(found) == {}
