"""Attacks again, in C++ (``attacks.cpp.toml``): contained, each with its own verdict, none a sandbox fault."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import attack_programs
import ordinary_user
import pytest
from attack_programs import Attack

from ctrl_hpc.records import Verdict
from ctrl_hpc.sandbox import Sandbox, rootfs

pytestmark = pytest.mark.alone  # short limits, and an ordinary user's processes are counted on the whole machine

_AS_USER = """
import json, sys
import test_attacks_cpp
print(json.dumps(test_attacks_cpp.complaints(fresh=False, binaries=sys.argv[1])))
"""


def load() -> list[Attack]:
    """All attacks, whole programs by then."""
    groups = tomllib.loads((Path(__file__).parent / "attacks.cpp.toml").read_text(encoding="utf-8"))
    prelude = groups.pop("prelude")
    return [
        Attack(
            group=group,
            name=name,
            program=f"{prelude}{entry['program']}}}\n",
            statuses=tuple(entry.get("statuses", ())),
            before=f"{prelude}{entry['before']}}}\n" if "before" in entry else None,
            language="cpp",
        )
        for group, entries in groups.items()
        for name, entry in entries.items()
    ]


ATTACKS = load()


def complaints(*, fresh: bool, binaries: str = "") -> dict[str, str]:
    """What is wrong with how attacks ended, by name; two workers, each with jails of its own.

    ``binaries``: a folder that has them compiled already.
    """

    def judged(attacks: list[Attack]) -> list[list[Verdict]]:
        with Sandbox(workers=1, fresh=fresh) as sandbox:
            sandbox.binaries.folder = Path(binaries) if binaries else sandbox.binaries.folder
            return [sandbox.run_many(attack.executions) for attack in attacks]

    halves = [ATTACKS[0::2], ATTACKS[1::2]]
    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(judged, halves))
    told = {
        f"{attack.group}/{attack.name}": attack_programs.complaint(attack, verdict)
        for attacks, verdicts in zip(halves, found, strict=True)
        for attack, verdict in zip(attacks, verdicts, strict=True)
    }
    return {name: text for name, text in told.items() if text}


def test_the_suite_is_whole() -> None:
    assert len(ATTACKS) >= 80 and {attack.group for attack in ATTACKS} == {
        "host_files", "devices", "network", "processes", "resources", "state", "reward_hacks"
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("jails", ["warm", "fresh"])
def test_attacks_in_cpp_are_contained(jails: str) -> None:
    assert complaints(fresh=jails == "fresh") == {}


if os.getuid() == 0:  # an ordinary user's own run is the test above

    @pytest.mark.slow
    def test_attacks_in_cpp_are_contained_as_an_ordinary_user() -> None:
        """With the binaries that root's own runs have left, so that they are compiled once."""
        with tempfile.TemporaryDirectory() as folder:
            os.chmod(folder, 0o755)
            kept = Path(folder) / "binaries"
            if (rootfs.default_parent() / "binaries").is_dir():
                shutil.copytree(rootfs.default_parent() / "binaries", kept)
                for path in [kept, *kept.iterdir()]:
                    os.chown(path, ordinary_user.UID, ordinary_user.UID)
            assert json.loads(ordinary_user.run(_AS_USER, str(kept)).splitlines()[-1]) == {}
