"""Drafts for RL: in a reproducible order, none twice in a step, none whose prompt is too long to train on."""

from __future__ import annotations

from pathlib import Path

import pytest
import random_qwen

from ctrl_hpc.flow.prompts import Prompts
from ctrl_hpc.records import Problem, Solution, StdinTest, Verdict
from ctrl_hpc.rollout.chat import chat_ids
from ctrl_hpc.train.drafts import DraftPool


def pool_of(sizes: list[int]) -> DraftPool:
    """A draft for every number of words in its problem's statement."""
    tests = (StdinTest(stdin="1\n", expected_stdout="1\n"),)
    pairs = []
    for number, size in enumerate(sizes):
        prompt = "print " * size
        problem = Problem(id=f"p{number}", source="test", split="train", prompt=prompt, tests=tests)
        verdict = Verdict(status="accepted")
        pairs.append(
            (problem, Solution(id=f"s{number}", problem_id=problem.id, text="x", program="x", verdict=verdict))
        )
    return DraftPool(pairs=tuple(pairs), seed=0)


def test_no_draft_comes_twice_in_a_step() -> None:
    pool = pool_of([1] * 5)
    first = [draft.id for _, draft in pool.draw(0, 7)]  # a pass of five, then two of them again
    assert sorted(first) == ["s0", "s1", "s2", "s3", "s4"]
    assert [draft.id for _, draft in pool.draw(0, 5, used=first[:2])] == first[2:]
    assert pool.draw(0, 5, used=first) == []


def test_prompts_that_are_too_long_are_left_out_and_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoTokenizer

    random_qwen.build(tmp_path / "critic")
    tokenizer, prompts = AutoTokenizer.from_pretrained(tmp_path / "critic"), Prompts.load("default")
    pool = pool_of([1, 40, 400, 2])
    lengths = [len(chat_ids(tokenizer, prompts.critique(*pair))) for pair in pool.pairs]
    kept = pool.fitting(prompts, tokenizer, lengths[1])
    assert [draft.id for _, draft in kept.pairs] == ["s0", "s1", "s3"]
    assert f"1 of 4 drafts left out: their prompts have more than {lengths[1]} tokens" in capsys.readouterr().out
    assert pool.fitting(prompts, tokenizer, 10**6).pairs == pool.pairs
    with pytest.raises(ValueError, match=r"each of the 4 drafts is longer than 3 tokens; raise rl.max_prompt_tokens"):
        pool.fitting(prompts, tokenizer, 3)
