"""Trees of any widths, votes, and evaluations that are killed at random moments."""

import random
import subprocess
import sys
from pathlib import Path

import pytest
import toy_world

from ctrl_hpc import jsonl
from ctrl_hpc.config import ROOT, load
from ctrl_hpc.evaluate import tree
from ctrl_hpc.evaluate.run import run
from ctrl_hpc.evaluate.write_ahead import WriteAheadLog, in_parts
from ctrl_hpc.flow.prompts import Prompts
from ctrl_hpc.flow.steps import elect, majority
from ctrl_hpc.records import Critique, Message, Solution, Verdict
from ctrl_hpc.report import results
from ctrl_hpc.seeds import evaluation_seed

PROBLEMS = toy_world.problems(20)


def evaluated(folder, *overrides):
    """The configuration and the run directory of an evaluation of the base critic."""
    toy_world.folder(folder / "base", 0.5)
    settings = [f"run_dir={folder / 'run'}", "data.eval_names=[toy]", "eval.critics=[none,base]"]
    settings += [f"critic.model={folder / 'base'}", "eval.greedy=false", "eval.bootstrap=50", *overrides]
    config = load(ROOT / "configs" / "tiny.yaml", settings)
    jsonl.write(folder / "run" / "problems" / "eval-toy.jsonl", PROBLEMS)
    run(config, folder / "run", toy_world.Connections(), {"toy": PROBLEMS}, Prompts.load("default"))
    return config, folder / "run"


def test_a_tree_has_its_widths(tmp_path):
    config, run_dir = evaluated(tmp_path, "eval.widths=[2,3,1,2]", "eval.stop_when_correct=false")
    assert (config.eval.n_samples, config.eval.turns) == (2, 3)
    folder = run_dir / "eval" / "toy" / "base"
    drafts = jsonl.read(Solution, run_dir / "eval" / "toy" / "drafts.jsonl")
    assert len(drafts) == 40
    first, second, third = tree.read(folder, 3)
    assert [len(first), len(second), len(third)] == [120, 120, 240]
    assert list(first)[:4] == ["toy/0/0.0", "toy/0/0.1", "toy/0/0.2", "toy/0/1.0"]
    assert [node.parent for node in first.values()][:4] == ["toy/0/0"] * 3 + ["toy/0/1"]
    assert list(second) == list(first)
    assert list(third)[:3] == ["toy/0/0.0.0", "toy/0/0.0.1", "toy/0/0.1.0"]
    critiques = [node.critique for node in first.values() if node.parent == "toy/1/0"]
    assert len(set(critiques)) > 1 or len({node.critique for node in first.values()}) > 1


@pytest.mark.parametrize("stop", ["true", "false"])
def test_the_numbers_of_a_tree_are_means_over_its_leaves(tmp_path, stop):
    config, run_dir = evaluated(tmp_path, "eval.widths=[2,3,2]", f"eval.stop_when_correct={stop}")
    histories = {"toy": results.read_histories(config, run_dir, "toy")}
    row = results.collect(config, run_dir, histories)["datasets"]["toy"]["critics"]["base"]
    first, second = tree.read(run_dir / "eval" / "toy" / "base", 2)
    drafts = jsonl.read(Solution, run_dir / "eval" / "toy" / "drafts.jsonl")
    assert row["pass_at_1"][0] == pytest.approx(sum(item.verdict.accepted for item in drafts) / 40)
    assert row["pass_at_1"][1] == pytest.approx(sum(node.verdict.accepted for node in first.values()) / 120)
    leaves = 0.0
    for node in first.values():
        children = [item for item in second.values() if item.parent == node.sample] or [node]
        leaves += sum(item.verdict.accepted for item in children) / len(children)
    assert row["pass_at_1"][2] == pytest.approx(leaves / 120)
    assert set(row["seeds"]["pass_at_1"]) == {"0", "1"}
    shares = [values[1] for values in row["seeds"]["pass_at_1"].values()]
    assert sum(shares) / 2 == pytest.approx(row["pass_at_1"][1])
    assert row["seeds"]["std"][1] == pytest.approx(abs(shares[0] - shares[1]) / 2**0.5)


def test_the_paths_of_a_tree_that_stopped_in_part():
    def node(sample, parent):
        verdict = Verdict(status="accepted")
        return tree.Node(
            sample=sample,
            parent=parent,
            critique="",
            judgement=None,
            kept=False,
            text="",
            program=None,
            verdict=verdict,
        )

    first = [node("p/0.0", "p/0"), node("p/0.1", "p/0")]
    second = [node("p/0.1.0", "p/0.1"), node("p/0.1.1", "p/0.1"), node("p/0.1.2", "p/0.1")]
    turns = [tree.children_of(first), tree.children_of(second)]
    ends = [[item.sample for item in path] for path in tree.paths("p/0", turns, (2, 3))]
    assert ends == [["p/0.0"]] * 3 + [["p/0.1", "p/0.1.0"], ["p/0.1", "p/0.1.1"], ["p/0.1", "p/0.1.2"]]
    assert tree.paths("q/0", turns, (2, 3)) == [()] * 6


@pytest.mark.parametrize("widths", ["[3]", "[1,0]", "[0,1]"])
def test_widths_that_cannot_be_are_one_line(widths):
    with pytest.raises(
        ValueError, match=r"^eval\.widths: \[.*\] is not allowed; (it must be the drafts of a problem|each must be)"
    ):
        load(ROOT / "configs" / "tiny.yaml", [f"eval.widths={widths}"])


@pytest.mark.parametrize(
    ("votes", "winner"),
    [
        ("c", "correct"),
        ("i", "incorrect"),
        ("ci", None),
        ("", None),
        ("n", None),
        ("nnc", "correct"),
        ("cci", "correct"),
        ("ciic", None),
        ("iincc", None),
        ("iinnc", "incorrect"),
    ],
)
def test_the_majority(votes, winner):
    judgements = [{"c": "correct", "i": "incorrect", "n": None}[vote] for vote in votes]
    assert majority(judgements) == winner
    critiques = [
        Critique(id=f"s#{j}", solution_id="s", text=f"text {j}", judgement=judgement)
        for j, judgement in enumerate(judgements)
    ]
    if critiques:
        elected = elect(critiques)
        assert elected.judgement == winner
        expected = judgements.index(winner) if winner else 0
        assert elected.text == f"text {expected}"


def test_votes_are_asked_for_and_counted(tmp_path):
    config, run_dir = evaluated(tmp_path, "eval.widths=[1,2]", "eval.votes=3", "eval.chunk=64")
    drafts = jsonl.read(Solution, run_dir / "eval" / "toy" / "drafts.jsonl")
    seed = evaluation_seed(evaluation_seed(config.seed, "toy", "base"), 1, 0)
    nodes = list(tree.read(run_dir / "eval" / "toy" / "base", 1)[0].values())
    assert len(nodes) == 40
    assert nodes[0].parent == drafts[0].id

    class Scripted:
        """Answers chat i's completions: correct, incorrect, incorrect, correct, correct, none."""

        def complete(self, chats, sampling):
            assert (sampling.n, sampling.seed) == (6, seed)
            lines = ["Correct", "Incorrect", "Incorrect", "Correct", "Correct", "?"]
            texts = [f"{j}\nOverall judgment: {line}" for j, line in enumerate(lines)]
            return [[toy_world.Generation(text=text) for text in texts] for _ in chats]

    from ctrl_hpc.evaluate.run import _ask
    from ctrl_hpc.records import Sampling

    samples = [(PROBLEMS[0], drafts[0])]
    sampling = Sampling(temperature=0.7, max_tokens=8)
    prompts = Prompts.load("default")
    written = _ask(samples, 2, seed, critic=Scripted(), prompts=prompts, sampling=sampling, votes=3)
    assert [(item.judgement, item.text[0]) for item in written] == [("incorrect", "1"), ("correct", "3")]


def test_a_journal_keeps_what_was_answered_and_drops_a_torn_line(tmp_path):
    place = tmp_path / "x.journal"
    with WriteAheadLog(place) as log:
        assert log.once("a", 0, Message, lambda: [Message(role="user", content="one")])[0].content == "one"
    with place.open("ab") as out:
        out.write(b'{"step":"a","part":1,"records":[{"role":"us')
    with WriteAheadLog(place) as log:
        assert log.once("a", 0, Message, lambda: pytest.fail("asked again"))[0].content == "one"
        log.once("a", 1, Message, lambda: [Message(role="user", content="two")])
    with WriteAheadLog(place) as log:
        assert log.once("a", 1, Message, lambda: pytest.fail("asked again"))[0].content == "two"


def test_parts_made_at_once_come_in_order_and_a_failure_is_raised(tmp_path):
    def make(part, number, log):
        return [Message(role="user", content=f"{number} {item}") for item in part]

    made = in_parts(tmp_path / "x", Message, list("abcdefg"), make, size=2, at_once=3)
    assert [item.content for item in made] == ["0 a", "0 b", "1 c", "1 d", "2 e", "2 f", "3 g"]
    assert list(tmp_path.iterdir()) == [tmp_path / "x"]

    def failing(part, number, log):
        if number == 1:
            raise ValueError("no part")
        return make(part, number, log)

    with pytest.raises(ValueError, match="no part"):
        in_parts(tmp_path / "y", Message, list("abcdefg"), failing, size=2, at_once=3)


def attempt(folder, name, patience, overrides):
    """One start of the evaluation; its exit status."""
    command = [sys.executable, Path(__file__).with_name("killed_evaluation.py")]
    command += [folder / name, folder / "base", folder / f"{name}.log", str(patience), *overrides]
    return subprocess.run(command, check=False).returncode


def record_files(folder):
    """Every file of the evaluation with its content."""
    return {str(file.relative_to(folder)): file.read_text() for file in folder.glob("eval/**/*") if file.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize(("at_once", "widths"), [(1, "[1,3]"), (3, "[1,3]"), (3, "[1,1,2,1]")])
def test_kill_9_at_random_moments_loses_only_the_requests_in_flight(tmp_path, at_once, widths):
    """In several turns the same question may come again by itself, so that there the records alone are compared.

    Executions are not counted: the executors remember verdicts themselves, on disk.
    """
    toy_world.folder(tmp_path / "base", 0.5)
    overrides = [f"eval.chunks_in_flight={at_once}", f"eval.widths={widths}"]
    assert attempt(tmp_path, "whole", 10**9, overrides) == 0
    rng = random.Random(at_once)
    log = tmp_path / "killed.log"
    kills = 0
    answered, in_flight = set(), set()
    while True:
        start = log.stat().st_size if log.exists() else 0
        status = attempt(tmp_path, "killed", rng.randint(15, 90), overrides)
        lines = [line.split() for line in log.read_text()[start:].splitlines()]
        asked = {key for done, kind, key in lines if (done, kind) == ("ask", "chat")}
        if widths == "[1,3]":
            again = asked & (answered - in_flight)
            # when one thread kills the process, each other one may hold one answer that it has not written down yet
            assert len(again) <= (at_once - 1) * 4 * 3, "answers that had come were asked for again"
        got = {key for done, kind, key in lines if (done, kind) == ("got", "chat")}
        answered |= got
        in_flight = asked - got
        if status == 0:
            break
        assert status == -9
        kills += 1
    assert kills >= 2
    assert record_files(tmp_path / "killed") == record_files(tmp_path / "whole")
