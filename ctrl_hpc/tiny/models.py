"""The miniature's two models, made from nothing: tokenizer, training, and the folders they are kept in."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import platform
import random
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
from torch.nn import functional
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from ctrl_hpc import jsonl
from ctrl_hpc.flow.prompts import Prompts
from ctrl_hpc.progress import Steps
from ctrl_hpc.rollout.thinking import CLOSE, OPEN
from ctrl_hpc.tiny import world
from ctrl_hpc.tiny.lessons import Lesson, School, critic_lesson, generator_lesson, thinking_lesson
from ctrl_hpc.tiny.text import Habits, Weaknesses

VOCABULARY = 448
"""Tokens, special and added ones included; divisible by 4 so that tensor-parallel ranks share it evenly."""
_CLAUSE_SHARE = 0.0005
"""Clauses that make up at least this share of all clauses become tokens."""
_MAX_LENGTH = 512
_END_OF_TEXT = "<|endoftext|>"
_TURN_START = "<|im_start|>"
_TURN_END = "<|im_end|>"
_CLAUSE = re.compile(r"\n?(?:[^\n;.:]|[.:](?!\s|$))+(?:;|[.:](?=\s|$)|\n)?|\n|;|[.:]")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

THINKING_TEMPLATE = CHAT_TEMPLATE.replace("<|im_start|>assistant\n", "<|im_start|>assistant\n" + OPEN + "\n")
"""Opens a thought, as those of DeepSeek-R1's distills do."""


def _train_tokenizer(texts: Iterable[str]) -> Qwen2Tokenizer:
    """A tokenizer fitted to rendered chats; raises ValueError when they hold too little for the vocabulary."""
    parts = [part for text in texts for part in re.split(r"<\|im_\w+\|>", text) if part]
    counts = Counter(clause for part in parts for clause in _CLAUSE.findall(part))
    least = _CLAUSE_SHARE * counts.total()
    clauses = sorted(clause for clause, count in counts.items() if count >= least and len(clause) > 1)
    special = [_END_OF_TEXT, _TURN_START, _TURN_END]
    words = VOCABULARY - len(clauses)
    vocabulary, merges = _train_bpe(sorted(counts), special, words)
    tokenizer = Qwen2Tokenizer(
        vocab=vocabulary,
        merges=merges,
        unk_token=_END_OF_TEXT,
        eos_token=_TURN_END,
        pad_token=_END_OF_TEXT,
        extra_special_tokens=[_TURN_START],
        model_max_length=_MAX_LENGTH,
        padding_side="left",
    )
    tokenizer.add_tokens([AddedToken(clause, normalized=False, special=False) for clause in clauses])
    tokenizer.chat_template = CHAT_TEMPLATE
    if len(tokenizer) != VOCABULARY:
        raise ValueError(f"tiny tokenizer: {len(tokenizer)} tokens learnt, {VOCABULARY} wanted; give it more texts")
    return tokenizer


def _train_bpe(texts: Sequence[str], special: list[str], size: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of byte-level BPE under Qwen2's splitting."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = Qwen2Tokenizer(vocab={_END_OF_TEXT: 0}, merges=[]).backend_tokenizer.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [(left, right) for left, right in model["merges"]]


_Teacher = Callable[[School, random.Random], Lesson]
_TokenPair = tuple[list[int], list[int]]
"""Token ids of a prompt and of its answer."""
_CHUNK_BATCHES = 16
"""Batches drawn at once, so that lessons of like length share a batch."""
_CLIP_GRAD = 1.0


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
    teacher: _Teacher,
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
            torch.nn.utils.clip_grad_norm_(model.parameters(), _CLIP_GRAD)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            progress.advance(note=f"loss {losses[-1]:.3f}")
    model.eval()
    return losses


def answer_loss(model: Qwen2ForCausalLM, batch: Sequence[_TokenPair], pad: int) -> torch.Tensor:
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
    tokenizer: PreTrainedTokenizerBase, teacher: _Teacher, school: School, course: Course, seed: int
) -> Iterator[list[_TokenPair]]:
    rng = random.Random(seed)
    given = 0
    while given < course.steps:
        lessons = [teacher(school, rng) for _ in range(_CHUNK_BATCHES * course.batch_size)]
        prompts = tokenizer(rendered(tokenizer, lessons), add_special_tokens=False)["input_ids"]
        answers = tokenizer([lesson.answer for lesson in lessons], add_special_tokens=False)["input_ids"]
        pairs = [(p, [*a, tokenizer.eos_token_id]) for p, a in zip(prompts, answers, strict=True)]
        pairs.sort(key=lambda pair: len(pair[0]) + len(pair[1]))
        batches = [pairs[i : i + course.batch_size] for i in range(0, len(pairs), course.batch_size)]
        rng.shuffle(batches)
        yield from batches[: course.steps - given]
        given += len(batches)


MANIFEST = "MANIFEST.json"
_THREADS = 2
"""CPU threads: part of what makes a rebuild repeatable."""
_GENERATOR_COURSE = Course(steps=1000)
_CRITIC_COURSE = Course(steps=700)
_TOKENIZER_LESSONS = 4000


CRITICS: dict[str, _Teacher] = {"critic": critic_lesson, "thinking_critic": thinking_lesson}
"""The base critics and who teaches them: one that answers at once, and one that lists its checks in a thought."""


def rebuild(
    folder: Path,
    seed: int,
    *,
    critics: Sequence[str] = ("critic",),
    world_seed: int = 0,
    generator_course: Course = _GENERATOR_COURSE,
    critic_course: Course = _CRITIC_COURSE,
) -> None:
    """Train the generator and base critics from scratch: about three minutes on two CPU cores with one critic.

    Each model's folder is written whole or not at all. The same seed gives the same files on the same kind of machine.
    """
    folder.mkdir(parents=True, exist_ok=True)
    school = new_school(seed, world_seed)
    tokenizer = new_tokenizer(world_seed)
    model = new_model(tokenizer, seed)
    with _threads(_THREADS):
        train(model, tokenizer, generator_lesson, school, generator_course, seed, "tiny generator")
    save(model, tokenizer, folder / "generator")
    for name in critics:
        train_critic(folder, name, school, critic_course, seed)
    courses = {"generator_course": asdict(generator_course), "critic_course": asdict(critic_course)}
    _write_manifest(folder, {"seed": seed, "world_seed": world_seed, **courses})


def train_critic(folder: Path, name: str, school: School, course: Course, seed: int) -> None:
    """Train one of :data:`CRITICS` from the generator in ``folder``, whose reading of problems it needs."""
    model = Qwen2ForCausalLM.from_pretrained(folder / "generator")
    tokenizer = AutoTokenizer.from_pretrained(folder / "generator")
    if name == "thinking_critic":
        _teach_thoughts(model, tokenizer, seed)
    with _threads(_THREADS):
        train(model, tokenizer, CRITICS[name], school, course, seed + 1, f"tiny base {name.replace('_', ' ')}")
    save(model, tokenizer, folder / name)


def _teach_thoughts(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase, seed: int) -> None:
    """Two more tokens, with new embeddings, and a template that opens a thought."""
    tokenizer.add_tokens([AddedToken(mark, normalized=False, special=False) for mark in (OPEN, CLOSE)])
    tokenizer.chat_template = THINKING_TEMPLATE
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=4)


def new_school(seed: int, world_seed: int) -> School:
    """Lessons about the training problems; ``seed`` draws the generator's weaknesses."""
    problems = world.world(world_seed).splits["train"]
    return School(
        problems=[(problem, world.composition_of(problem)) for problem in problems],
        prompts=Prompts.load("tiny"),
        weaknesses=Weaknesses(seed, Habits()),
    )


def new_tokenizer(world_seed: int) -> PreTrainedTokenizerBase:
    """The tokenizer of every tiny model, fitted to lessons; it does not depend on the models' seed."""
    school, rng = new_school(0, world_seed), random.Random("tokenizer")
    texts = []
    for number in range(_TOKENIZER_LESSONS):
        lesson = (generator_lesson if number % 2 else critic_lesson)(school, rng)
        turns = [f"{turn.role}\n{turn.content}" for turn in lesson.chat]
        texts.append(_TURN_END.join([*turns, f"assistant\n{lesson.answer}"]))
    return _train_tokenizer(texts)


def new_model(tokenizer: PreTrainedTokenizerBase, seed: int) -> Qwen2ForCausalLM:
    """A Qwen2 model with random weights: 96 wide, 3 layers, 4 heads (2 for keys and values)."""
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen2ForCausalLM(config)


def save(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a model's folder beside its place, then put it there."""
    part = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    shutil.rmtree(part, ignore_errors=True)
    transformers.utils.logging.disable_progress_bar()  # of two milliseconds, amid our own
    model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    (part / "model.safetensors").chmod(0o644)
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    if folder.exists():
        folder.rename(old)
    part.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of the models, by path relative to ``folder``."""
    files = sorted(path for name in ("generator", *CRITICS) for path in (folder / name).rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _write_manifest(folder: Path, facts: dict[str, object]) -> None:
    manifest = {
        **facts,
        "command": f"python -m ctrl_hpc.tiny.models {folder.as_posix()} --seed {facts['seed']}",
        "threads": _THREADS,
        "machine": platform.machine(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "sha256": hashes(folder),
    }
    jsonl.write_text(folder / MANIFEST, json.dumps(manifest, indent=2) + "\n")


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Train the tiny world's generator and base critics from scratch.")
    parser.add_argument("folder", type=Path, help="where the models and MANIFEST.json are written")
    parser.add_argument("--seed", type=int, default=0, help="draws the weights, the lessons and the weaknesses")
    arguments = parser.parse_args()
    rebuild(arguments.folder, arguments.seed, critics=tuple(CRITICS))


if __name__ == "__main__":
    main()
