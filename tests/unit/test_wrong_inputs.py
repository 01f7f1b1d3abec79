"""What a newcomer gets wrong: one line that says what, where and what is allowed; exit code 2; nothing changed on disk.

Every case is a command line as one would type it, in a folder with the files of :func:`place`.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from ctrl_hpc import cli

COMMAND_LINES = """
rnu tiny                                        | there is no 'rnu' (did you mean run?)
runs                                            | there is no 'runs' (did you mean run?)
train tiny                                      | there is no 'train'
evaluate tiny                                   | there is no 'evaluate'
--verison                                       | required: COMMAND
run                                             | required: CONFIG
run --dry-run                                   | required: CONFIG
run tiny --dryrun                               | --dryrun: no such option (did you mean --dry-run?)
run tiny --steps 5                              | --steps: no such option
run tiny --redo all                             | --redo: there is no 'all'; allowed: sample, synthesize, sft
run tiny --redo rl --dry-run                    | --redo: changes the run directory
run tiny --redo rl                              | --redo: rl: {here}/runs/tiny holds nothing of it
run tiny -x                                     | -x: no such option
sample                                          | required: CONFIG
rl nowhere.yaml                                 | nowhere.yaml: no such configuration file
status                                          | required: RUN
status a b                                      | 'b': one argument too many
status nowhere                                  | nowhere: not a run directory
status file                                     | file: not a run directory
logs nowhere                                    | nowhere: not a run directory
logs nowhere --lines x                          | --lines: invalid int value: 'x'
stop nowhere                                    | nowhere: not a run directory
sync nowhere                                    | nowhere: no journals of a run there
doctor file                                     | {here}/file: is a file
help rum                                        | help: 'rum' is no command (did you mean run?)
completion tcsh                                 | there is no 'tcsh'; allowed: bash, zsh, fish
serve                                           | required: KIND
serve executer --port 1                         | there is no 'executer' (did you mean executor?)
serve executor                                  | required: --port
serve executor --port x                         | --port: invalid int value: 'x'
serve executor --port 99999999                  | cannot listen on 127.0.0.1:99999999
serve executor --port 0 --max-waiting 0         | --max-waiting: 0 is not allowed; it must be greater than 0
serve executor --port 0 --python no-such        | --python: 'no-such' is not an interpreter on this machine
serve executor --port 0 --packages no-such      | --packages: no-such is not installed for
serve executor --port 0 --testlib /nowhere      | --testlib: cannot read /nowhere: No such file
serve executor --port 0 --judge x               | 'x' is not NAME=FILE.py:FUNCTION
serve executor --port 0 --token-env NO_SUCH     | --token-env: the environment variable NO_SUCH is not set
serve executor --port 0 --workers x             | --workers: invalid int value: 'x'
serve rollout --port 0                          | required: --model
serve rollout --model x --port 0 --device tpu   | --device: there is no 'tpu' (did you mean cpu?); allowed: a
serve rollout --model nowhere --port 0          | no model folder nowhere
convert hf-to-megatron                          | required: SRC, DST
convert hf2megatron a b                         | there is no 'hf2megatron'
convert hf-to-megatron nowhere out              | nowhere: not a Hugging Face model folder
convert hf-to-megatron file out                 | file: not a Hugging Face model folder
convert hf-to-megatron nowhere folder           | folder: exists; nothing was overwritten
convert megatron-to-hf a b --tp x               | --tp: invalid int value: 'x'
bench                                           | required: WHAT
bench trainr                                    | there is no 'trainr' (did you mean trainer?)
bench trainer --recompute some                  | there is no 'some'; allowed: none, selective, full
trial                                           | trial: a configuration is needed, or --again
trial --again                                   | trial --again: CTRL_HPC_TRIAL names no file
trial tiny                                      | trial: runs under `wandb agent`
config rl.stepps                                | config: rl.stepps: unknown key (did you mean rl.steps?)
config rl.steps sft.epochs                      | one key and one configuration at a time
config lr                                       | config: lr: which?
config rl.steps seed=3                          | overrides go with a configuration
sbatch tiny                                     | Unable to contact slurm controller
sbatch                                          | required: CONFIG
sbatch nowhere.yaml                             | nowhere.yaml: no such configuration file
report                                          | required
report nowhere                                  | nowhere: is not a run directory
report file                                     | file: is not a run directory
report folder other                             | --out: missing
report a=b                                      | 'a=b' is an override; name a configuration
report folder seed=1                            | overrides go with a configuration
report folder --out other                       | other is not empty and holds no results.json
report folder --out file                        | {here}/file is a file, not a folder
report folder --out /proc/x                     | /proc is not writable
report tiny --json                              | --json: goes with run directories
report tiny                                     | report: needs the records of eval
report tiny --out x                             | one configuration at a time, without --out
suite                                           | required: SUITE
suite tiny_ablaton                              | tiny_ablaton: no such suite file (did you mean tiny_ablation?)
suite list.yaml                                 | list.yaml: Suite: expected an object
suite broken.yaml                               | broken.yaml: not valid YAML
suite binary.yaml                               | binary.yaml: not valid YAML
suite empty.yaml                                | empty.yaml: Suite: expected an object
suite no_variants.yaml                          | no_variants.yaml: variants: none
suite twice.yaml                                | twice.yaml: variants: 'a' is not allowed; names are given once
suite no_config.yaml                            | variants: a: config: missing, and the suite has none
suite wrong_key.yaml                            | wrong_key.yaml: variants: a: override: rl.step: unknown key
suite one.yaml --only b                         | --only: 'b' is not a variant; allowed: a
suite one.yaml eval.critics=[bse]               | a-seed0: eval.critics: 'bse' is not a critic
sweep                                           | required: SWEEP
sweep learning_rat                              | learning_rat: no such sweep file (did you mean learning_rate?)
sweep list.yaml --local                         | list.yaml: method: missing
sweep learning_rate --local --count 0           | --count: 0 is not allowed; it must be greater than 0
sweep learning_rate --local --count x           | --count: invalid int value: 'x'
data                                            | required
data tacoo                                      | 'tacoo' is not a data set; allowed: tiny, jsonl
data tiny --split tset                          | tiny has no split 'tset'; allowed: train, dev, test
data tiny --n 0                                 | --n: 0 is not allowed
data tiny --n x                                 | --n: invalid int value: 'x'
data tiny --workers 0                           | --workers: 0 is not allowed
data tiny seed=1                                | overrides go with a configuration
data jsonl                                      | data.path: missing
data jsonl --path nowhere                       | nowhere: no such file
data jsonl --path folder                        | folder: no such file
data jsonl --path binary.yaml                   | binary.yaml
data jsonl --path empty.yaml                    | empty.yaml: cannot be read; allowed: .jsonl
data jsonl --path good.jsonl --split dev        | good.jsonl: no problem of the split 'dev'
data jsonl --path good.jsonl --out good.jsonl   | --out: good.jsonl is an input: nothing was overwritten
data jsonl --path good.jsonl --out ./folder/../good.jsonl | is an input: nothing was overwritten
data jsonl --path good.jsonl --out file         | --out: file exists and is not of this command
data jsonl --path good.jsonl --out folder       | --out: folder is a folder; name a file
data jsonl --path good.jsonl --out file/x       | --out: {here}/file is a file, not a folder
data jsonl --path good.jsonl --out /proc/x      | --out: /proc is not writable
data jsonl --path good.jsonl --verify good.jsonl | --verify: good.jsonl is an input
data jsonl --path no_tests.jsonl                | no_tests.jsonl:1: no tests
run tiny data.name=jsonl data.path=comparison.jsonl | sum-1: comparison: 'fuzy' is not one of
data jsonl --path kind.jsonl                    | kind.jsonl:1:
data jsonl --path no_id.jsonl                   | no_id.jsonl:1:
data jsonl --path syntax.jsonl                  | syntax.jsonl:1: tests: code: not Python
data jsonl --path not_json.jsonl                | not_json.jsonl:1:
data tiny.yaml --split dev                      | --path, --split, --n and --against go with the name
data nowhere.yaml                               | nowhere.yaml: no such configuration file
"""
"""``command | what the line says``."""

FILES = """
nowhere.yaml        | nowhere.yaml: no such configuration file
nowhere             | nowhere: no such configuration file; packaged: ctrl_32b_released, humaneval, qwen25
tinny               | tinny: no such configuration file (did you mean tiny?)
god.yaml            | god.yaml: no such configuration file (did you mean good.yaml?)
folder              | folder: is a folder, no configuration
list.yaml           | list.yaml: is not a configuration
empty.yaml          | name: missing; every configuration names it
broken.yaml         | broken.yaml: not valid YAML
binary.yaml         | binary.yaml: not valid YAML
text.yaml           | text.yaml: hello: unknown key
section.yaml        | rl: 5 is not a section; write rl.KEY=VALUE
no_key.yaml         | no_key.yaml: stepss: unknown key
"""
"""``configuration | what the line says``, run dry."""

VALUES = """
rl.step=1                        | rl.step: unknown key (did you mean steps?)
steps=1                          | steps: unknown key (did you mean rl.steps?)
trainr.nodes=2                   | trainr: unknown key (did you mean trainer?)
optimizer.lr=1                   | unknown key
rl=5                             | rl: 5 is not a section
rl.steps                         | 'rl.steps': one argument too many; a key is set as KEY=VALUE
rl.steps=                        | rl.steps
rl.steps=x                       | rl.steps
rl.steps=1.5                     | rl.steps
rl.steps=0                       | rl.steps: 0 is not allowed; it must be greater than 0
rl.steps=-1                      | rl.steps: -1 is not allowed
rl.steps=[1]                     | rl.steps
rl.steps=null                    | rl.steps
rl.group_size=0                  | rl.group_size: 0 is not allowed
rl.group_size=1                  | rl.group_size: 1 gives grpo no advantage
rl.prompts_per_step=0            | rl.prompts_per_step: 0 is not allowed
rl.minibatches=0                 | rl.minibatches: 0 is not allowed
rl.minibatches=1000000           | rl.minibatches: 1000000 is more than
rl.estimator=ppo                 | rl.estimator
rl.ratio=tokens                  | rl.ratio
rl.aggregation=mean              | rl.aggregation
rl.clip_low=-1                   | rl.clip_low: -1.0 is not allowed
rl.kl_coef=-1                    | rl.kl_coef: -1.0 is not allowed
rl.kl_estimator=k9               | rl.kl_estimator
rl.temperature=0                 | rl.temperature: 0.0 is not allowed
rl.temperature=hot               | rl.temperature
rl.max_tokens=0                  | rl.max_tokens: 0 is not allowed
rl.max_staleness=-1              | rl.max_staleness: -1 is not allowed
rl.importance_cap=0              | rl.importance_cap: 0.0 is not allowed
rl.optimizer.lr=-1               | rl.optimizer.lr
rl.optimizer.lr=fast             | rl.optimizer.lr
rl.optimizer.lr=.inf             | rl.optimizer.lr: inf is not allowed; it must be finite
rl.temperature=.nan              | rl.temperature: nan is not allowed; it must be finite
tracking.writers=tensorboard     | tracking.writers: 'tensorboard' is not a list
tracking.writers=[wandb]         | tracking.writers: Invalid value ['wandb'], expected one of
rl.optimizer.schedule=step       | rl.optimizer.schedule
rl.save_every=0                  | rl.save_every: 0 is not allowed
sft.epochs=0                     | sft.epochs: 0 is not allowed
sft.batch_size=0                 | sft.batch_size: 0 is not allowed
sft.max_length=0                 | sft.max_length: 0 is not allowed
sample.n_samples=0               | sample.n_samples: 0 is not allowed
sample.temperature=-1            | sample.temperature
synthesize.n_critiques=0         | synthesize.n_critiques: 0 is not allowed
synthesize.balance=maybe         | synthesize.balance
eval.critics=none                | eval.critics
eval.critics=[bse]               | eval.critics: 'bse' is not a critic; allowed: none, base
eval.turns=0                     | eval.turns: 0 is not allowed
eval.widths=[1]                  | eval.widths
eval.widths=[0,1]                | eval.widths
eval.votes=0                     | eval.votes: 0 is not allowed
eval.models={sft:\\ /x}          | eval.models: 'sft' is not allowed as a name
eval.bootstrap=0                 | eval.bootstrap: 0 is not allowed
data.name=tacoo                  | data.name: 'tacoo' is not a data set (did you mean taco?)
data.name=jsonl                  | data.path: missing
data.path=nowhere                | data.path: {here}/nowhere: no such file
data.n_train=0                   | data.n_train: 0 is not allowed
data.n_eval=-5                   | data.n_eval: -5 is not allowed
data.eval_names=[tinny]          | data.eval_names: 'tinny' is not a data set
data.eval_names=[humaneval]      | eval.critics: oracle: humaneval has none
data.overlap=2                   | data.overlap: 2.0 is not allowed
data.ngram=0                     | data.ngram: 0 is not allowed
prompts.folder=nowhere           | prompts.folder: 'nowhere' is no folder; allowed: ctrl, default, tiny
prompts.folder=folder            | folder/solution.j2: no such template; a folder of prompts holds
judge.votes=[0]                  | judge.votes
judge.mode=both                  | judge.mode
rollout.generator_elements=x     | rollout.generator_elements
generator=http://h/v1            | generator_model: missing
endpoint.timeout_s=0             | endpoint.timeout_s
endpoint.price_in=-1             | endpoint.price_in
trainer.device=tpu               | trainer.device
trainer.dtype=int8               | trainer.dtype
trainer.nodes=0                  | trainer.nodes: 0 is not allowed
trainer.ranks_per_node=0         | trainer.ranks_per_node: 0 is not allowed
trainer.kernels=cuda             | trainer.kernels
trainer.micro_batch_tokens=0     | trainer.micro_batch_tokens: 0 is not allowed
parallel.tensor=3                | parallel
parallel.tensor=0                | parallel.tensor: 0 is not allowed
parallel.pipeline=7              | parallel
rollout.generator_elements=0     | rollout.generator_elements: 0 leaves the generator's folder unserved
rollout.critic_elements=-1       | rollout.critic_elements
rollout.device=gpu               | rollout.device
executor.workers=0               | executor.workers: 0 is not allowed
executor.elements=0              | executor.elements: 0 is not allowed
executor.limits.cpu_s=0          | executor.limits.cpu_s
executor.limits.memory_mb=-1     | executor.limits.memory_mb
executor.judges={a:\\ b}         | executor.judges.a: 'b' is not allowed; it must be FILE.py:FUNCTION
launch.engine=pbs                | launch.engine
launch.heartbeat_s=0             | launch.heartbeat_s
launch.snapshot=old              | launch.snapshot
launch.trainer.gpus=-1           | launch.trainer.gpus
launch.trainer.time_min=0        | launch.trainer.time_min
launch.trainr.gpus=1             | launch.trainr: unknown key (did you mean trainer?)
wandb.mode=on                    | wandb.mode
wandb.checkpoints=some           | wandb.checkpoints
plan.memory_gb=0                 | plan.memory_gb
stages=[train]                   | stages
stages=train                     | stages
cluster=mysite                   | cluster: 'mysite' is not a profile
cluster=slrum                    | cluster: 'slrum' is not a profile (did you mean slurm?)
cluster=nowhere.yaml             | cluster: 'nowhere.yaml' is not a profile
name=a/b                         | name: 'a/b' is not allowed; it must be a name without slashes
name=                            | name
seed=-1                          | seed: -1 is not allowed
seed=99999999999999999999        | seed: 99999999999999999999 is not allowed; it must be less than 2**63
seed=x                           | seed
run_dir=file                     | {here}/file: is a file; choose another run_dir
run_dir=loop                     | {here}/loop: is a link that leads nowhere; choose another run_dir
run_dir=gone/x                   | {here}/gone: is a link that leads nowhere; choose another run_dir
run_dir=file/x                   | {here}/file: is a file; choose another run_dir
run_dir=other                    | {here}/other: is not a run directory and not empty
=5                               | expected KEY=VALUE
rl..steps=5                      | rl
rl.steps=[                       | rl.steps
"""
"""``override | what the line says``, on ``run tiny --dry-run``."""

PLACES = """
generator=nowhere/model          | generator: {here}/nowhere/model is not a Hugging Face model folder
critic.model=folder              | critic.model: {here}/folder is not a Hugging Face model folder
critic.model=Qwen/Qwen2.5-0.5B   | hf download Qwen/Qwen2.5-0.5B --local-dir Qwen/Qwen2.5-0.5B
run_dir=/proc/x                  | run_dir: /proc/x: /proc is not writable
run_dir=/sys/x                   | run_dir: /sys/x: /sys is not writable
launch.bind=192.0.2.1            | launch.bind: 192.0.2.1: no service can listen there
stages=[rl]                      | rl: needs the records of sample; run `ctrl-hpc sample`
stages=[eval]                    | eval.critics: sft has not been trained in
"""
"""``override | what the line says``, on ``run tiny``: what only this machine can tell."""


def cases(text: str, before: str = "", behind: str = "") -> list[tuple[str, str]]:
    pairs = (line.rsplit("|", 1) for line in text.strip().splitlines())
    return [(f"{before}{given.strip()}{behind}", told.strip()) for given, told in pairs]


CASES = [
    *cases(COMMAND_LINES),
    *cases(FILES, "run ", " --dry-run"),
    *cases(VALUES, "run tiny --dry-run "),
    *cases(PLACES, "run tiny "),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a newcomer's files."""
    folder = tmp_path_factory.mktemp("newcomer")
    problem = {
        "id": "sum-1",
        "source": "ours",
        "split": "train",
        "prompt": "Read two integers, print their sum.",
        "tests": [{"kind": "stdin", "stdin": "1 2\n", "stdout": "3\n"}],
    }
    lines = {
        "good": [problem],
        "no_tests": [problem | {"tests": []}],
        "comparison": [problem | {"comparison": "fuzy"}],
        "kind": [problem | {"tests": [{"kind": "stdn", "stdin": "", "stdout": "1"}]}],
        "no_id": [{name: value for name, value in problem.items() if name != "id"}],
        "syntax": [problem | {"tests": [{"kind": "assert", "code": "assert add(1, 2) = 3"}]}],
    }
    for name, rows in lines.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "loop").symlink_to("loop")
    (folder / "gone").symlink_to("nowhere")
    texts = {
        **{"file": "mine", "not_json.jsonl": "{'id': 1}\n", "list.yaml": "- a\n- b\n", "empty.yaml": ""},
        **{
            "broken.yaml": "a: [1\n",
            "text.yaml": "hello\n",
            "section.yaml": "name: x\nrl: 5\n",
            "good.yaml": "name: x\n",
        },
        **{"no_key.yaml": "name: x\nstepss: 5\n", "no_variants.yaml": "name: s\nvariants: []\n"},
        "twice.yaml": "name: s\nconfig: good.yaml\nvariants: [{name: a}, {name: a}]\n",
        "no_config.yaml": "name: s\nvariants: [{name: a}]\n",
        "wrong_key.yaml": "name: s\nconfig: good.yaml\nvariants: [{name: a, overrides: [rl.step=1]}]\n",
        "one.yaml": "name: s\nconfig: good.yaml\nvariants: [{name: a}]\n",
        "slurm.conf": "ClusterName=gone\nSlurmctldHost=localhost\nSlurmctldPort=1\nMessageTimeout=2\n",
    }
    for name, text in texts.items():
        (folder / name).write_text(text)
    (folder / "binary.yaml").write_bytes(b"\xff\xfe\x00\x80")
    (folder / "folder").mkdir()
    (folder / "other").mkdir()
    (folder / "other" / "mine").write_text("mine")
    return folder


def contents(folder: Path) -> dict[str, bytes | None]:
    return {str(file.relative_to(folder)): file.read_bytes() if file.is_file() else None for file in folder.rglob("*")}


@pytest.mark.slow
@pytest.mark.parametrize(("line", "told"), CASES, ids=[line[:60] for line, _ in CASES])
def test_a_wrong_input(
    line: str, told: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setenv("SLURM_CONF", str(place / "slurm.conf"))  # a cluster that is up would take what is submitted
    before = contents(place)
    try:
        code = cli.main(shlex.split(line))
    except SystemExit as exit_of_parser:
        code = exit_of_parser.code
    said = capsys.readouterr().err
    assert code == 2, said
    assert told.replace("{here}", str(place)) in said
    assert said.count("\n") == 1, said
    assert contents(place) == before


def test_there_are_two_hundred() -> None:
    assert len({line for line, _ in CASES}) == len(CASES) >= 200
