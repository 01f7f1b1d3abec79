"""The configuration: every shipped file loads, and bad input is one line that names the key."""

import ast
from pathlib import Path

import pytest

from ctrl_hpc.config import ROOT, Config, dump, load, value
from ctrl_hpc.config.facts import facts

CONFIGS = sorted(path for path in (ROOT / "configs").glob("*.yaml"))
TINY = ROOT / "configs" / "tiny.yaml"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_configuration_loads_and_survives_a_dump(path: Path, tmp_path: Path) -> None:
    config = load(path)
    again = tmp_path / "config.yaml"
    again.write_text(dump(config))
    assert load(again) == config


def test_overrides_win_over_the_file_and_the_file_over_the_defaults(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("name: a\nrl: {steps: 7, clip_low: 0.1}\n")
    config = load(file, ["rl.steps=9", "eval.critics=[none,rl]"])
    assert (config.rl.steps, config.rl.clip_low, config.rl.clip_high) == (9, 0.1, 0.2)
    assert config.eval.critics == ("none", "rl")


def test_a_cluster_profile_lies_between_defaults_and_file(tmp_path: Path) -> None:
    (tmp_path / "cluster").mkdir()
    (tmp_path / "cluster" / "ours.yaml").write_text("launch: {engine: slurm, account: physics, heartbeat_s: 2.0}\n")
    file = tmp_path / "a.yaml"
    file.write_text("name: a\nlaunch: {heartbeat_s: 3.0}\n")
    config = load(file, ["cluster=ours"])
    assert (config.launch.engine, config.launch.account, config.launch.heartbeat_s) == ("slurm", "physics", 3.0)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("rl.stepss=1", "rl.stepss: unknown key (did you mean steps?)"),
        ("rl.steps=abc", "rl.steps: Value 'abc' of type 'str' could not be converted to Integer"),
        ("rl.ratio=word", "rl.ratio: Invalid value 'word', expected one of ['token', 'sequence']"),
        ("rl.kl_estimator=k1", "rl.kl_estimator: Invalid value 'k1', expected one of ['k2', 'k3']"),
        ("rl=3", "rl: 3 is not a section"),
        ("rl.steps=0", "rl.steps: 0 is not allowed; it must be greater than 0"),
        ("steps=1", "steps: unknown key (did you mean rl.steps?)"),
        ("rl.lr=1", "rl.lr: unknown key (did you mean rl.value_optimizer.lr or rl.optimizer.lr?)"),
        ("rl.max_staleness=-1", "rl.max_staleness: -1 is not allowed; it must be 0 or greater"),
        ("rl.group_size=1", "rl.group_size: 1 gives grpo no advantage; at least 2, or rl.estimator=gae"),
        ("rl.importance_cap=0", "rl.importance_cap: 0.0 is not allowed; it must be greater than 0, or null"),
        ("rl.dual_clip=1", "rl.dual_clip: 1.0 is not allowed; it must be greater than 1, or null"),
        ("rl.gae_gamma=0", "rl.gae_gamma: 0.0 is not allowed; it must lie in (0, 1]"),
        ("rl.optimizer.beta2=1", "rl.optimizer.beta2: 1.0 is not allowed; it must lie in [0, 1)"),
        ("rl.transition_reward={fix: 1}", "it must be a number for each of fix, keep, break, stuck"),
        ("executor.limits.cpu_s=0", "executor.limits.cpu_s: 0.0 is not allowed; it must be greater than 0"),
        ("executor.judges={mine: nowhere.py:close}", "executor.judges.mine: '"),
        ("judge.votes=[4,0]", "judge.votes: [4, 0] is not allowed; each must be greater than 0"),
        ("eval.widths=[a]", "override: eval.widths: Value ['a'] could not be converted to Integer"),
        ("data.eval_names=5", "override: data.eval_names: 5 is not a list; write data.eval_names=[A,B]"),
        (
            "tracking.writers=[tb]",
            "override: tracking.writers: Invalid value ['tb'], expected one of ['tensorboard', 'mlflow']",
        ),
        ("eval.widths=[3]", "eval.widths: [3] is not allowed; it must be the drafts of a problem, then"),
        ("launch.trainer.gpus=-1", "launch.trainer.gpus: -1 is not allowed; it must be 0 or greater"),
        ("name=a/b", "name: 'a/b' is not allowed; it must be a name without slashes"),
        ("tiny.models=elsewhere", "tiny.models: is a key no more; generator and critic.model name the folders"),
        (
            "rl.verdict_coef=2",
            "rl.verdict_coef: 2 is not allowed; it must lie in [0, 1], or be such numbers from steps on",
        ),
        ("cluster=nowhere", "cluster: 'nowhere' is not a profile; allowed:"),
        ("stages=[sample,party]", "stages: ['sample', 'party'] is not allowed; each must be one of sample, "),
        ("trainer.ranks_per_node=3", "parallel.pipeline = 2 x 1 does not divide the trainer's 3 ranks"),
        ("generator=http://localhost:1/v1", "generator_model: missing"),
        ("steps", "override 'steps': expected KEY=VALUE"),
    ],
)
def test_bad_input_is_one_line_that_names_the_key(override: str, told: str) -> None:
    with pytest.raises(ValueError) as caught:
        load(TINY, [override])
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_without_a_name_and_a_missing_file_say_so(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("seed: 1\n")
    with pytest.raises(ValueError, match="name: missing"):
        load(file)
    with pytest.raises(ValueError, match="no such configuration file"):
        load(tmp_path / "b.yaml")
    file.write_text("name: [unclosed\n")
    with pytest.raises(ValueError, match="not valid YAML"):
        load(file)


def test_relative_model_folders_are_found_from_the_project_root(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = load(TINY)
    assert config.run_dir == str(tmp_path / "runs" / "tiny")
    assert config.prompts.folder == "tiny"
    assert config.critic.model.endswith("models/tiny/critic")


def test_every_field_is_documented() -> None:
    for name in ("config/tree.py", "config/method.py", "config/machine.py"):
        tree = ast.parse((ROOT / "ctrl_hpc" / name).read_text())
        for section in [node for node in tree.body if isinstance(node, ast.ClassDef)]:
            for index, node in enumerate(section.body):
                if isinstance(node, ast.AnnAssign):
                    after = section.body[index + 1] if index + 1 < len(section.body) else None
                    documented = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                    assert documented, f"{section.name}.{ast.unparse(node.target)} has no docstring"


def test_value_reads_a_dotted_key() -> None:
    assert value(load(TINY), "rl.optimizer.beta1") == 0.9


def test_servers_of_others_get_whole_weights() -> None:
    urls = "rollout.critic_urls=[http://localhost:1]"
    assert load(TINY, [urls]).rl.publish == "full" and load(TINY, ["rl.publish=delta"]).rl.publish_full_every == 10
    with pytest.raises(ValueError, match=r"rl\.publish: delta is understood by servers of ours alone"):
        load(TINY, ["rl.publish=delta", urls])


def test_the_choices_of_the_kernels_are_the_kernels() -> None:
    """They stand in both places, as loading a configuration imports no torch."""
    import ctrl_kernels

    offered = {key: fact.choices for key, fact in facts(Config).items()}
    assert offered["rl.estimator"][: len(ctrl_kernels.ESTIMATORS)] == ctrl_kernels.ESTIMATORS
    assert offered["rl.aggregation"] == ctrl_kernels.AGGREGATIONS
    assert offered["trainer.kernels"] == ctrl_kernels.BACKENDS
    assert set(offered["rl.ratio"]) <= set(ctrl_kernels.RATIOS)
    assert set(offered["rl.kl_estimator"]) <= set(ctrl_kernels.KL_ESTIMATORS)
