"""A small run two versions off-policy, in chunks, through real servers; and the trace recorded from it."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import overlap
import pytest
from process_table import processes_of

from ctrl_hpc.config import ROOT

STEPS, STALE, DRAFTS, GROUP = 8, 2, 8, 8


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_two_versions_off_policy_in_chunks(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    changes = ["stages=[sample,synthesize,sft,rl]", f"rl.max_staleness={STALE}", "rl.importance_cap=2.0"]
    changes += ["rl.chunk=3", "rl.chunks_in_flight=2", f"run_dir={run_dir}"]
    changes += ["trainer.ranks_per_node=1", "parallel.tensor=1"]
    command = [sys.executable, "-m", "ctrl_hpc.cli", "run", "configs/tiny_faults.yaml", *changes]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-4000:]
    assert processes_of(run_dir) == []
    records = [json.loads(line) for line in (run_dir / "rl" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(STEPS))
    stale = [record["rl/staleness"] for record in records]
    assert stale[:2] == [0, 1] and all(1 <= age <= STALE for age in stale[2:])
    drafts: Counter[str] = Counter()
    for step, record in enumerate(records):
        lines = gzip.decompress((run_dir / "rl" / "rollouts" / f"step-{step:06d}.jsonl.gz").read_bytes()).splitlines()
        rollouts = [json.loads(line) for line in lines]
        assert len(rollouts) == DRAFTS * GROUP
        assert {item["version"] for item in rollouts} == {step - record["rl/staleness"]}
        assert record["rl/staleness_mean"] == record["rl/staleness"]
        drafts.update({item["solution_id"] for item in rollouts})
        # by the version it says: this policy, a few updates later, still finds them likely
        assert 0 <= record.get("rl/rollout_kl", 0.0) < 0.5
        assert record["time/rollout_s"] > 0 and record["time/wait_s"] >= 0
    assert sum(drafts.values()) == STEPS * DRAFTS and set(drafts.values()) == {1}, "64 of 96 drafts, each once"
    trace = overlap.record(run_dir, "a test")
    recorded = [sum(step["runs"]) for step in trace["steps"]]
    assert all(0 < runs <= record["executor/runs"] for runs, record in zip(recorded, records, strict=True))
    waits = overlap.simulate(trace, overlap.Layout(), max_staleness=STALE, steps=20)
    assert max(step - version for step, version in enumerate(waits.versions)) <= STALE
