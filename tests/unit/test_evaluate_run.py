"""The evaluation in a toy world: shared drafts, weights switched, turns carried, resumed after a kill."""

from itertools import pairwise

import pytest
import toy_world

from ctrl_hpc import jsonl
from ctrl_hpc.config import ROOT, load
from ctrl_hpc.evaluate import critics, tree
from ctrl_hpc.evaluate.run import run
from ctrl_hpc.flow.prompts import Prompts
from ctrl_hpc.records import Solution

PROBLEMS = {"toy": toy_world.problems(30)}
PROMPTS = Prompts.load("default")


@pytest.fixture
def make(tmp_path):
    """A configuration and its run directory, with the three critics' folders."""
    toy_world.folder(tmp_path / "base", 0.3)

    def configured(name, *overrides):
        run_dir = tmp_path / name
        toy_world.folder(run_dir / "sft" / "hf", 0.6)
        toy_world.folder(run_dir / "rl" / "hf", 0.95)
        settings = [
            f"run_dir={run_dir}",
            "data.eval_names=[toy]",
            "eval.critics=[none,base,sft,rl,exec_feedback]",
            f"critic.model={tmp_path / 'base'}",
            "eval.turns=3",
            "eval.chunk=8",
        ]
        return load(ROOT / "configs" / "tiny.yaml", [*settings, *overrides]), run_dir

    return configured


def records(run_dir):
    """The content of every file of the evaluation."""
    return {
        str(file.relative_to(run_dir)): file.read_text() for file in sorted(run_dir.glob("eval/**/*")) if file.is_file()
    }


def test_every_critic_starts_from_the_same_drafts(make):
    config, run_dir = make("run")
    connections = toy_world.Connections()
    run(config, run_dir, connections, PROBLEMS, PROMPTS)
    folder = run_dir / "eval" / "toy"
    trees = ["base", "base_greedy", "exec_feedback", "rl", "rl_greedy", "sft", "sft_greedy"]
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == trees
    drafts = jsonl.read(Solution, folder / "drafts.jsonl")
    assert [draft.id for draft in drafts] == [f"toy/{k}/0" for k in range(30)]
    assert all(draft.verdict is not None for draft in drafts)
    greedy = jsonl.read(Solution, folder / "drafts_greedy.jsonl")
    assert [draft.program for draft in greedy][:4] == ["print(1)", "print(1)", "print(2)", "print(4)"]
    for name in trees:
        first, *_ = tree.read(folder / name, 3)
        assert list(first) == [draft.id for draft in drafts]
        for draft in drafts:  # who keeps the program keeps the draft's
            if first[draft.id].kept:
                assert first[draft.id].program == draft.program
    places = [str(config.critic.model), str(run_dir / "sft" / "hf"), str(run_dir / "rl" / "hf")]
    assert [place for place, _ in connections.critic.loads] == places
    versions = [version for _, version in connections.critic.loads]
    assert versions == sorted(set(versions))


def test_a_program_judged_correct_is_not_critiqued_again(make):
    config, run_dir = make("run", "eval.critics=[sft]", "eval.greedy=false")
    run(config, run_dir, toy_world.Connections(), PROBLEMS, PROMPTS)
    turns = tree.read(run_dir / "eval" / "toy" / "sft", 3)
    for before, after in pairwise(turns):
        assert set(after) == {sample for sample, node in before.items() if node.judgement != "correct"}
    assert all(node.kept == (node.judgement == "correct") for nodes in turns for node in nodes.values())
    assert {node.critique_tokens for nodes in turns for node in nodes.values()} == {3}


def test_without_stopping_every_program_is_revised_each_turn(make):
    config, run_dir = make("run", "eval.critics=[sft]", "eval.greedy=false", "eval.stop_when_correct=false")
    run(config, run_dir, toy_world.Connections(), PROBLEMS, PROMPTS)
    turns = tree.read(run_dir / "eval" / "toy" / "sft", 3)
    assert [len(nodes) for nodes in turns] == [30, 30, 30]
    assert not any(node.kept for nodes in turns for node in nodes.values())


def test_nothing_is_asked_or_executed_twice(make):
    config, run_dir = make("run")
    connections = toy_world.Connections()
    run(config, run_dir, connections, PROBLEMS, PROMPTS)
    distinct = {
        (draft, node.program)
        for folder in (run_dir / "eval" / "toy").iterdir()
        if folder.is_dir()
        for nodes in tree.read(folder, 3)
        for draft, node in nodes.items()
    }
    drafts = jsonl.read(Solution, run_dir / "eval" / "toy" / "drafts.jsonl")
    distinct |= {(draft.id, draft.program) for draft in drafts}
    distinct |= {
        (draft.id, draft.program) for draft in jsonl.read(Solution, run_dir / "eval" / "toy" / "drafts_greedy.jsonl")
    }
    assert len(connections.executor.programs) == len(distinct)
    asked, loads = connections.critic.asked, len(connections.critic.loads)
    run(config, run_dir, connections, PROBLEMS, PROMPTS)
    assert (connections.critic.asked, len(connections.critic.loads)) == (asked, loads)


@pytest.mark.parametrize("patience", [3, 35, 61, 70, 90, 110])
def test_a_killed_evaluation_ends_with_the_same_records(make, patience):
    config, whole = make("whole")
    run(config, whole, toy_world.Connections(), PROBLEMS, PROMPTS)
    config, killed = make("killed")
    with pytest.raises(KeyboardInterrupt):
        run(config, killed, toy_world.Connections(patience), PROBLEMS, PROMPTS)
    assert records(killed) != records(whole)
    connections = toy_world.Connections()
    run(config, killed, connections, PROBLEMS, PROMPTS)
    assert records(killed) == records(whole)


def test_the_seed_decides(make):
    runs = []
    for name, seed in (("one", 1), ("same", 1), ("two", 2)):
        config, run_dir = make(name, f"seed={seed}", "eval.critics=[sft]")
        run(config, run_dir, toy_world.Connections(), PROBLEMS, PROMPTS)
        runs.append(records(run_dir))
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


def test_several_drafts_of_a_problem(make):
    config, run_dir = make("run", "eval.critics=[none,rl]", "eval.n_samples=3")
    run(config, run_dir, toy_world.Connections(), PROBLEMS, PROMPTS)
    drafts = jsonl.read(Solution, run_dir / "eval" / "toy" / "drafts.jsonl")
    assert [draft.id for draft in drafts][:4] == ["toy/0/0", "toy/0/1", "toy/0/2", "toy/1/0"]
    assert len(tree.read(run_dir / "eval" / "toy" / "rl", 1)[0]) == 90


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("eval.critics=[none,rlx]", r"eval\.critics: 'rlx' is not a critic; allowed: none, base, sft, rl, .*oracle$"),
        ("eval.critics=[oracle]", r"eval\.critics: oracle: toy has none; data sets that have: $"),
        ("eval.models={x/y: /tmp}", r"eval\.models: 'x/y' is not allowed as a name"),
    ],
)
def test_critics_that_cannot_be_are_one_line(make, override, message):
    config, run_dir = make("run", override)
    with pytest.raises(ValueError, match=message):
        run(config, run_dir, toy_world.Connections(), PROBLEMS, PROMPTS)
    assert not (run_dir / "eval").exists()


def test_a_critic_without_a_model_is_one_line(make, tmp_path):
    config, run_dir = make("run", "eval.critics=[mine]", f"eval.models={{mine: {tmp_path / 'nowhere'}}}")
    with pytest.raises(ValueError, match=r"eval\.critics: mine: .*nowhere is not a Hugging Face model folder"):
        run(config, run_dir, toy_world.Connections(), PROBLEMS, PROMPTS)


def test_a_critic_that_sees_what_the_execution_found(make):
    config, run_dir = make("run", "eval.critics=[self_exec_feedback]", "eval.greedy=false")
    connections = toy_world.Connections()
    asked = []
    complete = connections.critic.complete

    def listening(chats, sampling):
        asked.extend(chat[-1].content for chat in chats)
        return complete(chats, sampling)

    connections.critic.complete = listening
    run(config, run_dir, connections, PROBLEMS, PROMPTS)
    assert connections.critic.loads[0][0] == str(config.critic.model)
    assert all("for your eyes only" in text for text in asked)
    assert any("All tests passed" in text for text in asked)
    assert any("No test passed" in text for text in asked)
    assert critics.served(config)


def test_only_folders_need_the_critics_servers(make):
    for chosen, served in (("[none,exec_feedback]", False), ("[none,gpt]", False), ("[none,gpt,sft]", True)):
        config, _ = make("x" + str(len(chosen)), f"eval.critics={chosen}", "eval.models={gpt: 'http://h/v1#m'}")
        assert critics.served(config) is served


def test_a_further_critic_by_name(make, tmp_path):
    toy_world.folder(tmp_path / "other", 1.0)
    config, run_dir = make("run", "eval.critics=[mine]", f"eval.models={{mine: {tmp_path / 'other'}}}")
    run(config, run_dir, toy_world.Connections(), PROBLEMS, PROMPTS)
    (first, *_) = tree.read(run_dir / "eval" / "toy" / "mine", 3)
    assert all(node.verdict.accepted for node in first.values())
