"""Benchmarks of critics within a run's evaluation: asked by its own servers, continued, counted, shown."""

import json
import math
from pathlib import Path

import pytest
import rollout_server
import toy_world
from transformers import AutoTokenizer

from ctrl_hpc import cli, jsonl, pipeline, preflight
from ctrl_hpc.config import ROOT, load
from ctrl_hpc.evaluate import benchmarked
from ctrl_hpc.evaluate.critic_benchmarks import Judged
from ctrl_hpc.evaluate.run import run
from ctrl_hpc.flow.prompts import Prompts
from ctrl_hpc.flow.steps import critique
from ctrl_hpc.records import Critique, Generation, Sampling, Solution
from ctrl_hpc.report import page, results
from ctrl_hpc.rollout.client import RolloutClient
from ctrl_hpc.rollout.confidence import judgement_probability
from ctrl_hpc.tiny import world


class Judge(toy_world.Critic):
    """Calls what is good right and everything else wrong; prefers the first place; refuses a chat that is too long."""

    patience = math.inf

    def complete(self, chats, sampling):
        texts = [chat[0].content for chat in chats]
        if self.asked + len(texts) > self.patience:
            raise KeyboardInterrupt
        if any("too long" in text for text in texts):
            raise ValueError("too long")
        self.asked += len(texts)
        said = [
            "Better answer: A"
            if "<answer-a>" in text
            else f"Overall judgment: {'Correct' if 'good' in text.split('<answer>')[1] else 'Incorrect'}"
            for text in texts
        ]
        return [[Generation(text=text)] * sampling.n for text in said]


ROWS = [
    {"question": "1", "answers": ["good", "bad"], "right": [True, False], "category": "pairs"},
    {"question": "2", "answers": ["fine", "bad"], "right": [True, False], "category": "pairs"},
    {"question": "3", "answers": ["a", "good", "b"], "worth": [0, 1, 0.5], "category": "several"},
    {"question": "4", "answer": "too long", "right": False, "category": "single"},
]
"""Of the judge's seven opinions on right and wrong answers six are right (not of "fine"), and one is refused."""


def configured(tmp_path, *overrides):
    toy_world.folder(tmp_path / "base", 0.5)
    file = tmp_path / "own.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    settings = [f"run_dir={tmp_path / 'run'}", "data.eval_names=[]", "eval.critics=[none,base,self_exec_feedback]"]
    settings += [f"critic.model={tmp_path / 'base'}", "eval.bootstrap=50", "eval.chunk=3", "wandb.mode=disabled"]
    settings += [f"eval.critic_benchmarks.sources.own={file}", "prompts.folder=default", *overrides]
    return load(ROOT / "configs" / "tiny.yaml", settings)


def evaluated(config, judge):
    """The evaluation by a judge, on the questions that the pipeline reads."""
    connections = toy_world.Connections()
    connections.critic = judge
    folder = Path(config.run_dir)
    pipeline.prepare(config, folder, ["eval"])
    run(config, folder, connections, {}, Prompts.load("default"))
    return folder


def test_every_critic_that_is_a_model_is_scored(tmp_path):
    config, judge = configured(tmp_path, "eval.critic_benchmarks.pairwise=true"), Judge()
    folder = evaluated(config, judge)
    found = results.collect(config, folder, {})["critic_benchmarks"]
    assert list(found) == ["own"] and list(found["own"]) == ["base"]  # no hinted critic, and none without a model
    row = found["own"]["base"]
    # best of n: 1 right, 1/2 by chance, 1, and the refused one, which is silence, counts as wrong: right
    assert (row["n"], row["errors"], row["score"]) == (4, 1, pytest.approx((1 + 0.5 + 1 + 1) / 4))
    # right or wrong are five answers: good and bad, fine and bad, and the refused one
    assert row["answers"]["n_answers"] == 5 and row["answers"]["accuracy"] == pytest.approx(3 / 5)
    assert row["answers"]["abstention"] == pytest.approx(1 / 5) and row["answers"]["calibration"]["n"] == 4
    assert row["position"] == {"first_place": 1.0, "consistent": 0.0}
    assert row["questions"]["stopping"] == {"worth": pytest.approx((1 + 0 + 1) / 3), "answers": pytest.approx(5 / 3)}
    asked = judge.asked
    evaluated(config, judge)
    assert judge.asked == asked, "what is on disk is not asked again"
    judged = jsonl.read(Judged, benchmarked.judged_file(folder, "own", "base"))
    assert judged[0].votes == ("A", "B") and judged[2].votes == ()


def test_a_killed_evaluation_asks_nothing_again(tmp_path):
    config, first = configured(tmp_path), Judge()
    first.patience = 3
    with pytest.raises(KeyboardInterrupt):
        evaluated(config, first)
    again = Judge()
    evaluated(config, again)
    assert (first.asked, again.asked) == (2, 5)  # a question a part: 2, 2 and 3 answers, and one that is refused


def test_a_critic_that_refuses_everything_is_told(tmp_path):
    class Refusing(Judge):
        def complete(self, chats, sampling):
            raise ValueError("no such model")

    with pytest.raises(ValueError, match=r"eval\.critic_benchmarks: own: base refuses every answer: no such model"):
        evaluated(configured(tmp_path), Refusing())


def test_the_report_shows_them(tmp_path, capsys):
    config = configured(tmp_path, "eval.critic_benchmarks.n_questions=3")
    folder = evaluated(config, Judge())
    written = page.write(config, folder)
    assert page.metrics(written) == {"eval/critic_benchmarks/own/base/score": pytest.approx(2.5 / 3)}
    assert (folder / "report" / "reliability-own-base.png").stat().st_size > 0
    told = (folder / "report" / "results.md").read_text()
    assert "own: 3 questions, the critics as judges; in %" in told and "own: score by category; in %" in told
    assert "by chance 50.0, at most 100.0" in told
    shown = capsys.readouterr().out
    assert "refused" in shown and "first place" not in shown


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("{mtbench: ''}", "'mtbench' is no benchmark of critics; allowed: codejudgebench, codecriticbench"),
        ("{jetts: ''}", "jetts: its path is missing"),
        ("{own: /nowhere.jsonl}", "/nowhere.jsonl: no such file or folder"),
    ],
)
def test_what_cannot_be_read_is_told_before_anything_starts(tmp_path, source, told):
    config = configured(tmp_path, f"eval.critic_benchmarks.sources={source}")
    (found,) = [item for item in preflight.findings(config, ["eval"]) if "critic_benchmarks" in item.text]
    assert found.text.startswith("eval.critic_benchmarks.sources: ") and told in found.text and not found.here


class Pieces:
    """A tokenizer of five tokens."""

    texts = ("Overall judgment:", " In", "correct", " Correct", "\n")

    def decode(self, ids, skip_special_tokens=False):
        return "".join(self.texts[token] for token in ids)


@pytest.mark.parametrize(
    ("ids", "shares", "judgement", "probability"),
    [
        ((0, 3), (0.5, 0.75), "correct", 0.75),
        ((0, 1, 2, 4), (0.5, 0.9, 0.6, 1.0), "incorrect", 0.1),  # where the word begins its verdict is decided
        ((0, 3), (0.5, 0.75), None, None),
        ((4, 4), (0.5, 0.75), "correct", None),  # a judgement that no token is
    ],
)
def test_how_sure_a_critic_is_by_its_verdicts_own_token(ids, shares, judgement, probability):
    text = Pieces().decode(ids)
    made = Generation(text=text, token_ids=ids, logprobs=tuple(map(math.log, shares)))
    found = Critique(id="c", solution_id="s", text=f"So. {text}", judgement=judgement, generation=made)
    sure = judgement_probability(found, "So. ", Pieces())
    assert sure is None if probability is None else sure == pytest.approx(probability)


def test_the_runs_own_server_tells_how_sure_the_critic_is():
    model = str(ROOT / "models" / "tiny" / "critic")
    tokenizer = AutoTokenizer.from_pretrained(model)
    problem = world.load()["test"][0]
    program = problem.canonical_solution
    draft = Solution(id=f"{problem.id}/0", problem_id=problem.id, text=program, program=program)
    with rollout_server.running(model) as url:
        client = RolloutClient(lambda: [url], tokenizer, role="critic")
        sampling = Sampling(temperature=0.0, max_tokens=64)
        (found,) = critique([(problem, draft)], client, Prompts.load("tiny"), sampling)
        sure = client.probability(found, "")
        client.close()
    made = found.generation
    pieces = [tokenizer.decode([token]).strip().lower() for token in made.token_ids]
    (place,) = [k for k, piece in enumerate(pieces) if piece == found.judgement]
    said = math.exp(made.logprobs[place])
    assert sure == pytest.approx(said if found.judgement == "correct" else 1 - said)


def test_the_plan_counts_them(tmp_path, capsys):
    """Own: 8 answers and 2 pairs; two votes are sampled, and two comparisons shown, one in each order."""
    config = configured(tmp_path)
    keys = ["eval.critics=[none,base]", "eval.critic_benchmarks.votes=2", "eval.critic_benchmarks.pairwise=true"]
    sources = f"{{own: {config.eval.critic_benchmarks.sources['own']}, judgebench: '', rewardbench2@other: ''}}"
    given = [
        f"critic.model={tmp_path / 'base'}",
        "generator=oracle",
        f"run_dir={tmp_path / 'planned'}",
        "stages=[eval]",
    ]
    given += ["data.name=humaneval", "data.eval_names=[humaneval]", "eval.max_tokens=100"]
    given += ["plan.rollout_tokens_per_s=200", f"eval.critic_benchmarks.sources={sources}", *keys]
    assert cli.main(["run", str(ROOT / "configs" / "tiny.yaml"), *given, "--dry-run"]) == 0
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("# eval:")]
    by, rate = "critiques and comparisons by each of 1 critics, at most", "(200 tokens/s a server, given)"
    assert told == [
        f"# eval: own: {8 * 2 + 2 * 2} {by} 10.0 s {rate}",
        f"# eval: judgebench: {700 * 2 + 350 * 2} {by} 18 min {rate}",
        "# eval: rewardbench2@other: its size is not known here; eval.critic_benchmarks.n_questions limits it",
    ]
