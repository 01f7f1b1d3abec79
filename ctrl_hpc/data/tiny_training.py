"""Training a tiny model on lessons, with plain PyTorch.

Array names carry their shapes: B sequences, T tokens, D model width, N tokens to be learnt, V vocabulary.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional
from transformers import PreTrainedTokenizerBase, Qwen2ForCausalLM

from ctrl_hpc.data.tiny_lessons import Lesson, School
from ctrl_hpc.progress import Steps

Teacher = Callable[[School, random.Random], Lesson]
TokenPair = tuple[list[int], list[int]]
"""Token ids of a prompt and of its answer."""
CHUNK_BATCHES = 16
"""Batches drawn at once, so that lessons of like length share a batch."""
CLIP_GRAD = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Course:
    """How a model is trained: AdamW, linear warm-up, cosine decay to zero."""

    steps: int
    lr: float = 2e-3
    batch_size: int = 64
    warmup_steps: int = 30
    weight_decay: float = 0.01


def train(
    model: Qwen2ForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    teacher: Teacher,
    school: School,
    course: Course,
    seed: int,
    description: str,
) -> list[float]:
    """Train a model in place on a teacher's lessons; returns the loss of each step."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=course.lr, betas=(0.9, 0.98), weight_decay=course.weight_decay, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, course))
    losses: list[float] = []
    model.train()
    with Steps(description, course.steps) as progress:
        for batch in _batches(tokenizer, teacher, school, course, seed):
            loss = answer_loss(model, batch, int(tokenizer.pad_token_id))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_GRAD)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            progress.advance(note=f"loss {losses[-1]:.3f}")
    model.eval()
    return losses


def answer_loss(model: Qwen2ForCausalLM, batch: Sequence[TokenPair], pad: int) -> torch.Tensor:
    """Mean cross-entropy of the answers' tokens; each sequence is a prompt and its answer, padded on the right."""
    rows = [[*prompt, *answer] for prompt, answer in batch]
    longest = max(map(len, rows))
    tokens_BT = torch.tensor([row + [pad] * (longest - len(row)) for row in rows])
    learnt_BT = torch.zeros_like(tokens_BT, dtype=torch.bool)
    for index, (prompt, answer) in enumerate(batch):
        learnt_BT[index, len(prompt) : len(prompt) + len(answer)] = True
    # attention is causal, so padding on the right needs no mask
    hidden_BTD = model.model(input_ids=tokens_BT[:, :-1], use_cache=False).last_hidden_state
    logits_NV = model.lm_head(hidden_BTD[learnt_BT[:, 1:]])
    return functional.cross_entropy(logits_NV, tokens_BT[:, 1:][learnt_BT[:, 1:]])


def rate(step: int, course: Course) -> float:
    """The learning rate at a step, as a fraction of its peak."""
    if step < course.warmup_steps:
        return (step + 1) / course.warmup_steps
    done = (step - course.warmup_steps) / max(course.steps - course.warmup_steps, 1)
    return 0.5 * (1.0 + math.cos(math.pi * done))


def rendered(tokenizer: PreTrainedTokenizerBase, lessons: Sequence[Lesson]) -> list[str]:
    """The prompts of lessons as text, up to where the answer begins."""
    chats = [[{"role": turn.role, "content": turn.content} for turn in lesson.chat] for lesson in lessons]
    return tokenizer.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)


def _batches(
    tokenizer: PreTrainedTokenizerBase, teacher: Teacher, school: School, course: Course, seed: int
) -> Iterator[list[TokenPair]]:
    rng = random.Random(seed)
    given = 0
    while given < course.steps:
        lessons = [teacher(school, rng) for _ in range(CHUNK_BATCHES * course.batch_size)]
        prompts = tokenizer(rendered(tokenizer, lessons), add_special_tokens=False)["input_ids"]
        answers = tokenizer([lesson.answer for lesson in lessons], add_special_tokens=False)["input_ids"]
        pairs = [(p, [*a, tokenizer.eos_token_id]) for p, a in zip(prompts, answers, strict=True)]
        pairs.sort(key=lambda pair: len(pair[0]) + len(pair[1]))
        batches = [pairs[i : i + course.batch_size] for i in range(0, len(pairs), course.batch_size)]
        rng.shuffle(batches)
        yield from batches[: course.steps - given]
        given += len(batches)
