"""The tiny world's tokenizer, lessons, training and shipped models."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest
import rollout_server
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from ctrl_hpc.config import ROOT
from ctrl_hpc.flow.feedback import mentions_hint
from ctrl_hpc.flow.prompts import Prompts
from ctrl_hpc.flow.steps import critique
from ctrl_hpc.flow.text import extract_program, parse_judgement
from ctrl_hpc.records import Revision, Reward, Sampling
from ctrl_hpc.rollout.chat import chat_ids
from ctrl_hpc.rollout.client import RolloutClient
from ctrl_hpc.rollout.thinking import CLOSED_BY_FORCE, Thinking, opens_thought
from ctrl_hpc.rollout.thinking import split as thinking_split
from ctrl_hpc.tiny import grammar, models, world
from ctrl_hpc.tiny import lessons as tiny_lessons
from ctrl_hpc.tiny import text as tiny_text
from ctrl_hpc.tiny.lessons import Lesson, School
from ctrl_hpc.tiny.models import Course, answer_loss, rate, rendered, train
from ctrl_hpc.train.rollouts import Experience, Rollout

SHIPPED = ROOT / "models" / "tiny"


@pytest.fixture(scope="module")
def school() -> School:
    return models.new_school(0, 0)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(SHIPPED / "generator")


def lessons(school: School, count: int) -> list[Lesson]:
    rng = random.Random(3)
    teachers = (tiny_lessons.generator_lesson, tiny_lessons.critic_lesson)
    return [teachers[number % 2](school, rng) for number in range(count)]


def test_critique_has_three_parts_and_parses() -> None:
    composition = (0, 0, 0, 0)
    critique = tiny_text.critique(
        tiny_text.analysis(composition, [True, False, True, True]), tiny_text.suggestion(1, 0), False
    )
    assert critique == (
        "Analysis: keep the even ones; ok. square each; wrong. sum up; ok. add one; ok.\n"
        "Improvement suggestions: square each;\n"
        "Overall judgment: Incorrect"
    )
    assert parse_judgement(critique) == "incorrect"
    assert re.search(r"^Overall judgment: (Correct|Incorrect)$", critique, re.MULTILINE)


def test_oracle_names_the_first_mistake() -> None:
    problem = next(problem for problem in world.world().splits["dev"])
    wanted = world.composition_of(problem)
    assert wanted == world.world().compositions[problem.id]
    right = world.oracle_critique(problem, grammar.program(wanted))
    assert parse_judgement(right) == "correct"
    draft = tiny_text.replaced(tiny_text.replaced(wanted, 1, wanted[1] ^ 1), 3, wanted[3] ^ 1)
    wrong = world.oracle_critique(problem, grammar.program(draft))
    assert parse_judgement(wrong) == "incorrect"
    assert wrong.split("\n")[1] == f"Improvement suggestions: {grammar.MAPS[wanted[1]].phrase};"
    assert parse_judgement(world.oracle_critique(problem, "print(1)")) == "incorrect"


def test_generator_errs_in_the_same_places() -> None:
    """Mistakes are tied to pairs of steps: a fifth of them, at which most attempts fail in the same way."""
    weaknesses = tiny_text.Weaknesses(0, tiny_text.Habits(hard_share=0.2, hard_error=1.0, easy_error=0.0))
    assert len(weaknesses.mistakes) == 2 * sum(grammar.SIZES)
    compositions = list(world.world().compositions.values())[::7]
    first = [weaknesses.attempt(composition, random.Random(1)) for composition in compositions]
    assert first == [weaknesses.attempt(composition, random.Random(2)) for composition in compositions]
    right = sum(draft == wanted for draft, wanted in zip(first, compositions, strict=True)) / len(compositions)
    assert 0.35 < right < 0.47  # 0.8 to the power of 4 is 0.41
    assert tiny_text.Weaknesses(1, tiny_text.Habits()).mistakes != weaknesses.mistakes


def test_advice_is_taken_at_its_word() -> None:
    draft = (0, 2, 4, 6)
    assert tiny_text.follow(draft, 1, 5) == (0, 5, 4, 6)
    assert tiny_text.follow(draft, 1, 2) == (0, 3, 4, 6)  # told to do what it did, it does the partner
    weaknesses = tiny_text.Weaknesses(0, tiny_text.Habits())
    for operation in range(grammar.SIZES[0]):
        wanted = (operation, 2, 4, 6)
        changed = weaknesses.flounder(wanted, wanted)
        assert sum(a != b for a, b in zip(changed, wanted, strict=True)) == 1


def test_lessons_speak_the_format(school: School) -> None:
    """Every answer is a program that the pipeline extracts, a critique that it judges, or a comparison."""
    for lesson in lessons(school, 400):
        if lesson.answer.startswith("```python\n"):
            program = extract_program(lesson.answer)
            assert program is not None
            assert grammar.parse(program) is not None
        elif lesson.answer.startswith("Comparison:"):
            assert lesson.chat[0].content.endswith(tiny_lessons.COMPARE)
        else:
            assert parse_judgement(lesson.answer) is not None
            assert lesson.answer.count("\n") == 2


def test_a_critic_that_thinks_lists_its_checks_in_its_thought(school: School) -> None:
    """What it says then is the critique that it would have written without."""
    spoken = "Analysis: sum up; ok.\nImprovement suggestions: none.\nOverall judgment: Correct"
    assert tiny_text.thought_out(spoken, 2) == f" sum up; ok. sum up; ok.\n</think>\n\n{spoken}"
    rounds = []
    for number in range(400):
        plain, thinking = (
            teacher(school, random.Random(number))
            for teacher in (tiny_lessons.critic_lesson, tiny_lessons.thinking_lesson)
        )
        thought, answer, cut = thinking_split(thinking.answer, opened=True, thinks=True)
        assert (thinking.chat, answer, cut) == (plain.chat, plain.answer, False)
        checks = plain.answer.split("\n")[0].split(":", 1)[1].strip()
        assert thought is not None and thought.startswith(checks)
        rounds.append(thought.count(checks))
    assert set(rounds) == {1, 2, 3, 4} and rounds.count(1) > 350


def test_hinted_lessons_agree_with_the_execution(school: School) -> None:
    rng = random.Random(4)
    hinted = [
        lesson
        for lesson in (tiny_lessons.critic_lesson(school, rng) for _ in range(400))
        if "\nHint: " in lesson.chat[0].content
    ]
    assert len(hinted) > 100
    for lesson in hinted:
        passed = "\nHint: All tests passed.\n" in lesson.chat[0].content
        assert parse_judgement(lesson.answer) == ("correct" if passed else "incorrect")
    assert any(mentions_hint(lesson.answer) for lesson in hinted)


def test_executed_agrees_with_the_tests(school: School) -> None:
    problem, wanted = school.problems[0]
    right = tiny_lessons.executed(problem, wanted).verdict
    assert right is not None
    assert right.accepted
    wrong = tiny_lessons.executed(problem, tiny_text.replaced(wanted, 2, grammar.partner(wanted[2]))).verdict
    assert wrong is not None
    assert wrong.status == "wrong_answer"


def test_templates_are_short() -> None:
    prompts = Prompts.load("tiny")
    problem = world.world().splits["dev"][0]
    solution = tiny_lessons.executed(problem, world.composition_of(problem))
    assert prompts.solution(problem)[0].content == problem.prompt
    assert prompts.critique(problem, solution)[0].content == (
        f"{problem.prompt}\n```python\n{problem.canonical_solution}\n```\nReview."
    )
    revision = prompts.revision(problem, solution, "Overall judgment: Incorrect")
    assert [turn.role for turn in revision] == ["user", "assistant", "user"]
    assert revision[2].content == "Overall judgment: Incorrect\nRevise."


def test_tokenizer_round_trip(school: School, tokenizer: PreTrainedTokenizerBase) -> None:
    """Prompts and answers tokenize apart as they do together, and decode to what they were."""
    for lesson in lessons(school, 200):
        prompt = rendered(tokenizer, [lesson])[0]
        prompt_ids = tokenizer(prompt)["input_ids"]
        answer_ids = tokenizer(lesson.answer)["input_ids"]
        messages = [{"role": turn.role, "content": turn.content} for turn in lesson.chat]
        messages.append({"role": "assistant", "content": lesson.answer})
        whole = tokenizer.apply_chat_template(messages, tokenize=False)
        newline = tokenizer("\n")["input_ids"]
        assert tokenizer(whole)["input_ids"] == [*prompt_ids, *answer_ids, tokenizer.eos_token_id, *newline]
        assert tokenizer.decode(answer_ids) == lesson.answer
        assert tokenizer.decode(prompt_ids) == prompt
        assert len(answer_ids) <= 20
    other = "Any other text: naïve 漢字, 3.14\tand {x: 1}"
    assert tokenizer.decode(tokenizer(other)["input_ids"]) == other


def test_tokenizer_is_the_shipped_one(tokenizer: PreTrainedTokenizerBase) -> None:
    fresh = models.new_tokenizer(0)
    assert len(fresh) == len(tokenizer) == models.VOCABULARY
    assert fresh.get_vocab() == tokenizer.get_vocab()
    text = "For each line of integers: halve each; print it. 17"
    assert fresh(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_answer_loss_is_the_answers_cross_entropy(tokenizer: PreTrainedTokenizerBase) -> None:
    model = models.new_model(tokenizer, 0)
    pairs = [([5, 6, 7], [8, 9]), ([10], [11, 12, 13])]
    expected = []
    for prompt, answer in pairs:
        logprobs = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        expected += [-logprobs[len(prompt) + i - 1, token] for i, token in enumerate(answer)]
    torch.testing.assert_close(answer_loss(model, pairs, 0), torch.stack(expected).mean(), rtol=1e-5, atol=1e-6)


def test_learning_rate() -> None:
    course = Course(steps=100, warmup_steps=20)
    assert rate(0, course) == pytest.approx(1 / 20)
    assert rate(20, course) == pytest.approx(1.0)
    assert rate(60, course) == pytest.approx(0.5)
    assert rate(99, course) < 0.001


def test_a_few_steps_lower_the_loss_and_repeat(school: School, tokenizer: PreTrainedTokenizerBase) -> None:
    course = Course(steps=12, batch_size=16, warmup_steps=4)
    runs = []
    for _ in range(2):
        model = models.new_model(tokenizer, 1)
        runs.append(train(model, tokenizer, tiny_lessons.generator_lesson, school, course, 7, "smoke"))
    assert runs[0] == runs[1]
    assert sum(runs[0][-3:]) < 0.7 * sum(runs[0][:3])


def test_rebuild_writes_folders_and_manifest(tmp_path: Path) -> None:
    short = Course(steps=2, batch_size=4, warmup_steps=1)
    for _ in range(2):  # the second time over the first
        critics = tuple(models.CRITICS)
        models.rebuild(tmp_path / "models", 5, critics=critics, generator_course=short, critic_course=short)
    names = sorted(path.name for path in (tmp_path / "models").iterdir())
    assert names == ["MANIFEST.json", "critic", "generator", "thinking_critic"]
    manifest = json.loads((tmp_path / "models" / "MANIFEST.json").read_text())
    assert manifest["sha256"] == models.hashes(tmp_path / "models")
    assert manifest["seed"] == 5
    assert manifest["generator_course"]["steps"] == 2


def test_shipped_models_match_their_manifest() -> None:
    assert json.loads((SHIPPED / "MANIFEST.json").read_text())["sha256"] == models.hashes(SHIPPED)
    assert sum(path.stat().st_size for path in SHIPPED.rglob("*") if path.is_file()) < 8 << 20


@pytest.mark.parametrize("name", ["generator", "critic", "thinking_critic"])
def test_shipped_models_fit_two_tensor_parallel_ranks(name: str) -> None:
    config = AutoModelForCausalLM.from_pretrained(SHIPPED / name).config
    assert config.model_type == "qwen2"
    assert config.tie_word_embeddings
    assert config.num_attention_heads % 2 == config.num_key_value_heads % 2 == config.intermediate_size % 2 == 0
    assert config.vocab_size % 4 == 0
    assert 0 <= config.vocab_size - len(AutoTokenizer.from_pretrained(SHIPPED / name)) < 4


def test_shipped_models_speak(tokenizer: PreTrainedTokenizerBase) -> None:
    """Greedily, the generator writes programs of the grammar and the critic critiques that have a judgement."""
    prompts = Prompts.load("tiny")
    problems = world.world().splits["dev"][:8]
    chats = [prompts.solution(problem) for problem in problems]
    programs = [extract_program(text) for text in _greedy("generator", tokenizer, chats)]
    assert all(grammar.parse(program or "") is not None for program in programs)
    right = sum(program == problem.canonical_solution for program, problem in zip(programs, problems, strict=True))
    assert 0 < right < len(problems)
    drafts = [tiny_lessons.executed(problem, world.composition_of(problem)) for problem in problems]
    chats = [prompts.critique(problem, draft) for problem, draft in zip(problems, drafts, strict=True)]
    for text, problem in zip(_greedy("critic", tokenizer, chats), problems, strict=True):
        assert parse_judgement(text) is not None
        phrases = grammar.phrases(world.composition_of(problem))
        assert [part.split(";")[0] for part in text.split("\n")[0].removeprefix("Analysis: ").split(". ")] == phrases


def test_the_shipped_critic_that_thinks_checks_every_step_before_it_judges() -> None:
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED / "thinking_critic")
    prompts, problems = Prompts.load("tiny"), world.world().splits["dev"][:8]
    drafts = [tiny_lessons.executed(problem, world.composition_of(problem)) for problem in problems]
    chats = [prompts.critique(problem, draft) for problem, draft in zip(problems, drafts, strict=True)]
    assert opens_thought(tokenizer, chat_ids(tokenizer, chats[0]))
    for text, problem in zip(_greedy("thinking_critic", tokenizer, chats), problems, strict=True):
        thought, answer, cut = thinking_split(text, opened=True, thinks=True)
        assert thought is not None and not cut
        phrases = grammar.phrases(world.composition_of(problem))
        assert [part.split(";")[0] for part in thought.split(". ")] == phrases
        assert parse_judgement(answer) is not None


def test_a_thought_that_is_ended_by_force_is_judged_all_the_same() -> None:
    """A budget of 8 tokens is the four checks, without the line's end; all but what ends the thought is learnt."""
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED / "thinking_critic")
    closing = tuple(tokenizer(CLOSED_BY_FORCE, add_special_tokens=False)["input_ids"])
    prompts, problems = Prompts.load("tiny"), world.world().splits["dev"][:4]
    pairs = [(problem, tiny_lessons.executed(problem, world.composition_of(problem))) for problem in problems]
    with rollout_server.running(SHIPPED / "thinking_critic") as url:
        thinking = Thinking(mode="on", tokens=8, close=True)
        client = RolloutClient(lambda: [url], tokenizer, thinking=thinking, role="critic")
        made = critique(pairs, client, prompts, Sampling(temperature=0.0, max_tokens=32))
        client.close()
    rollouts = []
    for (problem, draft), item in zip(pairs, made, strict=True):
        generation = item.generation
        assert generation is not None and generation.forced == (8, 8 + len(closing)) and not generation.thought_cut
        checks = " ".join(rf"{phrase}; (ok|wrong)\." for phrase in grammar.phrases(world.composition_of(problem)))
        assert re.fullmatch(checks, generation.thought or "")
        assert item.text.startswith("Analysis: ") and item.judgement is not None
        kept = Revision(critique_id=item.id, text="", program=None, kept=True, verdict=draft.verdict)
        reward = Reward(critique_id=item.id, value=1.0, reason="kept_passed")
        rollouts.append(Rollout.of(item, kept, draft, reward))
    mask_SR = Experience.of(rollouts, version=0, position=0, metrics={}).batch.mask_SR
    end = 8 + len(closing)
    assert mask_SR[:, :8].all() and not mask_SR[:, 8:end].any() and mask_SR[:, end].all()


def _greedy(name: str, tokenizer: PreTrainedTokenizerBase, chats: list[tuple]) -> list[str]:
    model = AutoModelForCausalLM.from_pretrained(SHIPPED / name)
    prompts = rendered(tokenizer, [Lesson(chat=chat, answer="") for chat in chats])
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    out = model.generate(**batch, do_sample=False, max_new_tokens=32)
    return tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
