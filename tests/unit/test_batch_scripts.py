"""The batch scripts of a run, written without a Slurm: what the site's profile says is in them."""

import dataclasses
import subprocess

import pytest

from ctrl_hpc.cli import main
from ctrl_hpc.cluster import snapshot
from ctrl_hpc.cluster.jobs import scripts
from ctrl_hpc.config import ROOT, load

OVERRIDES = (
    *("cluster=slurm", "launch.account=science", "launch.qos=long", "executor.elements=40", "trainer.nodes=2"),
    *("trainer.ranks_per_node=8", "parallel.tensor=2", "launch.array_parallelism=16", "rollout.generator_elements=1"),
    *("launch.setup=[module load cuda/12.8]", "launch.trainer.constraint=h100", "launch.trainer.memory_gb=64"),
    *("launch.trainer.additional={exclude: n05}", "launch.srun_args=['--container-image=/shared/ctrl.sqsh']"),
)


def test_scripts_hold_what_the_profile_says() -> None:
    written = scripts(load(ROOT / "configs" / "tiny_ci.yaml", OVERRIDES))
    assert set(written) == {"executor", "critic", "generator", "trainer"}
    trainer, executor = written["trainer"], written["executor"]
    for line in (
        *("--account=science", "--qos=long", "--nodes=2", "--ntasks-per-node=8", "--gpus-per-node=8"),
        *("--constraint=h100", "--exclude=n05", "--requeue", "--open-mode=append", "--signal=USR2@120"),
        *("--mem=65536MB", "--time=1440", "--cpus-per-task=8", "--job-name=tiny_ci-trainer"),
    ):
        assert f"#SBATCH {line}\n" in trainer, trainer
    assert "module load cuda/12.8\n" in trainer and "--container-image=/shared/ctrl.sqsh" in trainer
    assert "--kill-on-bad-exit=1" in trainer and "--kill-on-bad-exit" not in executor
    assert "#SBATCH --array=0-39%16\n" in executor and "#SBATCH --partition=cpu\n" in executor
    assert "--array" not in written["generator"]
    for text in written.values():
        assert "SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}" in text and "TMPDIR=${SLURM_TMPDIR:-" in text
        assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0


def test_a_generator_elsewhere_has_no_script() -> None:
    config = load(ROOT / "configs" / "tiny_ci.yaml", ["cluster=slurm", "generator=oracle"])
    assert "generator" not in scripts(config)
    apptainer = dataclasses.replace(config.launch, python="apptainer exec /shared/ctrl.sif python")
    written = scripts(dataclasses.replace(config, launch=apptainer))
    code = snapshot.place(config.run_dir or "", "new")
    assert all(f"apptainer exec /shared/ctrl.sif python -u {code} -u -m submitit" in text for text in written.values())
    without = dataclasses.replace(apptainer, snapshot="none")
    written = scripts(dataclasses.replace(config, launch=without))
    assert all("apptainer exec /shared/ctrl.sif python -u -m submitit" in text for text in written.values())


def test_the_logs_of_earlier_starts_are_put_aside(tmp_path) -> None:
    config = load(ROOT / "configs" / "tiny_ci.yaml", ["cluster=slurm", f"run_dir={tmp_path / 'a run'}"])
    text = scripts(config)["trainer"]
    setup = [line for line in text.splitlines() if line.startswith(("export SRUN", "id=", "for log"))]
    logs = tmp_path / "a run" / "logs" / "trainer"
    logs.mkdir(parents=True)
    for start in (0, 1):
        environment = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(start), "PATH": "/usr/bin:/bin"}
        subprocess.run(["bash", "-euc", "\n".join(setup)], env=environment, check=True)
        for rank in (0, 1):
            (logs / f"7_{rank}_log.out").write_text(f"start {start}")
    assert sorted(file.name for file in logs.iterdir()) == [
        *("7_0_log.out", "7_0_log.start1.out", "7_1_log.out", "7_1_log.start1.out"),
    ]
    assert (logs / "7_0_log.start1.out").read_text() == "start 0"


def test_a_dry_run_prints_them_as_comments(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(ROOT / "configs" / "tiny_ci.yaml"), "--dry-run", *OVERRIDES]) == 0
    said = capsys.readouterr().out
    assert "# batch script of trainer:\n#   #!/bin/bash" in said
    assert all(line.startswith("#") for line in said.partition("# batch script")[2].splitlines()[1:])
