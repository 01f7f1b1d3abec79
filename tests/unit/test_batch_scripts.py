"""The batch scripts of a run, written without a Slurm: what the site's profile says is in them."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from ctrl_hpc.cli import main
from ctrl_hpc.cluster import element
from ctrl_hpc.cluster.jobs import scripts
from ctrl_hpc.config import ROOT, load
from ctrl_hpc.run import snapshot

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
        *("--mem=65536MB", "--time=1440", "--cpus-per-task=8", "--job-name=trainer-tiny_ci"),
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


def test_srun_gets_a_containers_arguments_word_by_word(tmp_path: Path) -> None:
    """The script's own line, run by bash with an srun that prints what it is given."""
    given = (
        *("--container-image=nvcr.io#nvidia/pytorch:25.01-py3", "--container-mounts=/shared:/shared,/data:/data:ro+x"),
        *("--container-env=OMP_NUM_THREADS,WANDB_MODE", "--no-container-mount-home", "--container-workdir=/a b/$HOME"),
    )
    config = load(ROOT / "configs" / "tiny_ci.yaml", [*OVERRIDES, f"run_dir={tmp_path / 'a run'}"])
    launch = dataclasses.replace(
        config.launch,
        srun_args=given,
        python="python3",
        executor=dataclasses.replace(config.launch.executor, contained=False),
    )
    written = scripts(dataclasses.replace(config, launch=launch))
    srun = tmp_path / "srun"
    srun.write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    srun.chmod(0o755)
    code = snapshot.place(tmp_path / "a run", "new")
    for role, text in written.items():
        environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "7", "HOME": "/root"}
        done = subprocess.run(["bash", "-c", text], env=environment, capture_output=True, text=True, check=True)
        folder = tmp_path / "a run" / "logs" / role
        job = "%A_%a" if role == "executor" else "%j"
        gang = ["--kill-on-bad-exit=1"] if role == "trainer" else []
        contained = role != "executor"
        assert done.stdout.splitlines() == [
            *("--unbuffered", "--output", f"{folder}/{job}_%t_log.out", *gang, *(given if contained else ())),
            *("python3" if contained else sys.executable, "-u", str(code), "-u", "-m", "submitit.core._submit"),
            str(folder),
        ]


def test_nodes_are_told_to_jobs_that_have_no_slurm_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scontrol = tmp_path / "scontrol"
    line = "NodeName=%s Arch=x86_64 CPUAlloc=1 NodeAddr=%s NodeHostName=vm Version=22.05\\n"
    scontrol.write_text(f"#!/bin/sh\nprintf '{line}' n03 10.0.0.3 n04 10.0.0.4\n")
    scontrol.chmod(0o755)
    text = scripts(load(ROOT / "configs" / "tiny_ci.yaml", ["cluster=slurm"]))["trainer"]
    (setup,) = [line for line in text.splitlines() if line.startswith("export CTRL_HPC_ADDRESSES")]
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_NODELIST": "n[03-04]"}
    done = subprocess.run(
        ["bash", "-c", f"{setup}\necho $CTRL_HPC_ADDRESSES"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "n03=10.0.0.3,n04=10.0.0.4\n"
    monkeypatch.setenv("CTRL_HPC_ADDRESSES", done.stdout.strip())
    monkeypatch.setenv("SLURMD_NODENAME", "n04")
    assert (element.address("n03"), element.address(element.this_node()), element.address("n05")) == (
        *("10.0.0.3", "10.0.0.4", "n05"),
    )
    lists = {"n[03-04]": "n03", "n[3,7-9],x1": "n3", "gpu-a,gpu-b": "gpu-a", "r[1-2]n[05-06,9],x": "r1n05", "n7": "n7"}
    for nodelist, first in lists.items():
        monkeypatch.setenv("SLURM_JOB_NODELIST", nodelist)
        assert element.first_node() == first
    monkeypatch.delenv("SLURM_JOB_NODELIST")
    assert element.first_node() == "n04"


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
