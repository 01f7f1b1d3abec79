"""``ctrl-hpc config``: what a key means, and where a value comes from."""

from pathlib import Path

import pytest

from ctrl_hpc import cli
from ctrl_hpc.commands.config import _default, _example, explained
from ctrl_hpc.config import ROOT, Config, load
from ctrl_hpc.config.tree import known

TINY = str(ROOT / "configs" / "tiny.yaml")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A configuration with a profile of its own: values from four places."""
    (tmp_path / "cluster").mkdir()
    (tmp_path / "cluster" / "ours.yaml").write_text("launch:\n  account: physics\n  heartbeat_s: 2.0\n")
    file = tmp_path / "a.yaml"
    file.write_text("name: a\ncluster: ours\nlaunch: {heartbeat_s: 3.0}\nrl:\n  steps: 7\n  optimizer:\n    lr: 0.1\n")
    return file


def test_the_tree_tells_where_each_value_comes_from(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", str(place), "rl.steps=9", "eval.widths=[2,1,1]"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == sum(not fact.is_section for fact in known().values())
    assert "rl.steps: 9  # override" in lines
    assert f"rl.optimizer.lr: 0.1  # {place}:7" in lines
    assert f"launch.heartbeat_s: 3.0  # {place}:3" in lines
    assert f"launch.account: physics  # {place.parent / 'cluster' / 'ours.yaml'}:2" in lines
    assert "rl.group_size: 8  # default" in lines
    assert "eval.n_samples: 2  # eval.widths, override" in lines


def test_a_key_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", "rl.estimator", TINY, "rl.estimator=rloo"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "rl.estimator: How rewards become advantages: within the group (``ctrl_hpc.train.advantages``), over the whole "
        "step (``reinforce_pp``), or by a value network that is trained beside (``gae``: PPO).",
        "  type:     word",
        "  allowed:  must be one of grpo, dr_grpo, rloo, opo, pass_k, reinforce_pp, reinforce_pp_baseline, gae",
        "  default:  grpo",
        "  example:  rl.estimator=dr_grpo",
        "  value:    rloo, from override",
        "  fixed once there are records of rl, which read it",
    ]
    assert cli.main(["config", "heartbeat_s"]) == 0
    told = capsys.readouterr().out
    assert told.startswith("launch.heartbeat_s: ") and "may change between two starts" in told
    assert "must lie in (0, 1]" in "\n".join(explained("rl.gae_gamma", None, []))
    assert "must be greater than 1, or null" in "\n".join(explained("rl.dual_clip", None, []))
    assert cli.main(["config", "launch.trainer"]) == 0
    assert "  launch.trainer.cpus: 2  # CPUs a task." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["rl.estimatr"], "rl.estimatr: unknown key (did you mean rl.estimator?)"),
        (["lr"], "lr: which? sft.optimizer.lr, rl.value_optimizer.lr, rl.optimizer.lr"),
        (["rl.steps=3"], "overrides go with a configuration"),
        ([TINY, "rl.stepss=3"], "rl.stepss: unknown key (did you mean steps?)"),
        ([TINY, "rl.steps=0"], "rl.steps: 0 is not allowed"),
        ([str(ROOT / "configs" / "tinny.yaml")], "no such configuration file (did you mean tiny.yaml?)"),
        (["rl.steps", "rl.chunk"], "one key and one configuration at a time"),
    ],
)
def test_wrong_words_are_one_line(arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", *arguments]) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1


def test_every_key_has_a_meaning_and_an_example_that_loads() -> None:
    at_once: dict[str, list[str]] = {}
    needed = {
        "generator": ["generator_model=m"],
        "parallel.sequence": ["parallel.tensor=2"],
        "rl.credit": [],  # of one turn only
        "rl.ratio_cap": ["rl.loss=dppo"],
        "critic.close_thought": ["critic.thought_tokens=9"],
        "generator_close_thought": ["generator_thought_tokens=9"],
        "trainer.ranks_per_node": ["parallel.tensor=1"],
    }
    for key, fact in known().items():
        assert fact.about.endswith((".", "?")), key
        if fact.is_section or key in ("executor.judges", "rl.reward", "cluster"):  # these name files that must be there
            continue
        text = _example(fact)
        if fact.choices:
            assert text != _default(key), key
        together = key.rpartition(".")[0] if key.count(".") else key
        at_once.setdefault(key if key in needed else together, []).append(f"{key}={text}")
    for name, words in at_once.items():
        assert isinstance(load(TINY, [*needed.get(name, []), *words]), Config), name
