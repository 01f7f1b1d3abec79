"""Stages ``sample`` and ``synthesize`` that were interrupted: what was written down is not asked for again."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from ctrl_hpc import jsonl, pipeline
from ctrl_hpc.config import load
from ctrl_hpc.records import Critique, Generation, Problem, Solution, StdinTest, TestResult, Verdict
from ctrl_hpc.train.drafts import response_ids

ROOT = Path(__file__).parents[2]
PROBLEMS = [
    Problem(
        id=f"p{k}",
        source="own",
        split="train",
        prompt=f"Say {k}.",
        tests=(StdinTest(stdin="", expected_stdout=f"{k}\n"),),
    )
    for k in range(5)
]


class Model:
    """Says how many chats it was asked for before, and is interrupted at a call."""

    def __init__(self, text, stops_at=None):
        self.text, self.stops_at, self.seen = text, stops_at, []

    def complete(self, chats, sampling):
        if len(self.seen) == self.stops_at:
            raise KeyboardInterrupt
        self.seen.append((len(chats), sampling.seed))
        text = self.text.format(seed=sampling.seed)
        return [[Generation(text=text, prompt_ids=(7, 8), token_ids=(4, 5), logprobs=(-1.0, -2.0))] for _ in chats]

    def update_weights(self, folder, version):
        pass


class AllRight:
    def run_many(self, items):
        return [Verdict(status="accepted", tests=(TestResult(status="accepted"),)) for _ in items]


def run_of(folder, *settings):
    jsonl.write(folder / "train.jsonl", PROBLEMS)
    data = ["data.name=jsonl", f"data.path={folder / 'train.jsonl'}", "data.eval_names=[]", "prompts.folder=default"]
    made = load(ROOT / "configs" / "tiny.yaml", [*data, "sample.n_samples=1", "synthesize.balance=false", *settings])
    return pipeline.prepare(made, folder / "run", ["sample", "synthesize"])


def connected(generator, critic):
    return type("Connections", (), {"generator": generator, "critic": critic, "executor": AllRight()})


def test_what_was_written_down_is_not_asked_again(tmp_path):
    program, critique = "```python\nprint({seed})\n```", "Seed {seed}.\n\nOverall judgment: Correct"
    runs = {name: run_of(tmp_path / name, "sample.chunk=2", "synthesize.chunk=2") for name in ("whole", "stopped")}
    whole, facts = connected(Model(program), Model(critique)), {}
    for stage in (pipeline.sample, pipeline.synthesize):
        facts[stage] = stage(runs["whole"], whole)
        stopped = connected(Model(program, stops_at=2), Model(critique, stops_at=2))
        with pytest.raises(KeyboardInterrupt):
            stage(runs["stopped"], stopped)
        again = connected(Model(program), Model(critique))
        assert stage(runs["stopped"], again) == facts[stage]
        asked = again.generator.seen or again.critic.seen
        assert asked == [(1, 4)]  # the fifth problem alone, with the seed of its place
    assert facts[pipeline.sample]["solutions"] == 5 and whole.generator.seen == [(2, 0), (2, 2), (1, 4)]
    for record, file in ((Solution, "sample/solutions.jsonl"), (Critique, "synthesize/critiques.jsonl")):
        first, second = (jsonl.read(record, run.folder / file) for run in runs.values())
        assert first == second and len(first) == (5 if record is Solution else len(first))
    assert response_ids(SimpleNamespace(eos_token_id=9), second[0]) == (4, 5, 9)  # what stage I learns
    assert [item.name for item in (runs["stopped"].folder / "sample").iterdir()] == ["solutions.jsonl"]
