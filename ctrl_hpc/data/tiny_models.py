"""The tiny models: a fixed generator and a base critic, trained from scratch into Hugging Face folders.

``python -m ctrl_hpc.data.tiny_models FOLDER --seed N`` writes ``FOLDER/generator``, ``FOLDER/critic`` and
``FOLDER/MANIFEST.json`` with the seed, the command and the SHA-256 of every file.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
import transformers
from transformers import PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM

from ctrl_hpc import jsonl
from ctrl_hpc.data import tiny
from ctrl_hpc.data.tiny_lessons import School, critic_lesson, generator_lesson
from ctrl_hpc.data.tiny_text import Habits, Weaknesses
from ctrl_hpc.data.tiny_tokenizer import TURN_END, train_tokenizer
from ctrl_hpc.data.tiny_training import Course, train
from ctrl_hpc.flow.prompts import Prompts

MANIFEST = "MANIFEST.json"
THREADS = 2
"""CPU threads: part of what makes a rebuild repeatable."""
GENERATOR_COURSE = Course(steps=1000)
CRITIC_COURSE = Course(steps=700)
_TOKENIZER_LESSONS = 4000


def rebuild(
    folder: Path,
    seed: int,
    *,
    world_seed: int = 0,
    generator_course: Course = GENERATOR_COURSE,
    critic_course: Course = CRITIC_COURSE,
) -> None:
    """Train both models from scratch: about three minutes on two CPU cores.

    Each model's folder is written whole or not at all. The same seed gives the same files on the same kind of machine.
    """
    folder.mkdir(parents=True, exist_ok=True)
    school = new_school(seed, world_seed)
    tokenizer = new_tokenizer(world_seed)
    model = new_model(tokenizer, seed)
    with _threads(THREADS):
        train(model, tokenizer, generator_lesson, school, generator_course, seed, "tiny generator")
        save(model, tokenizer, folder / "generator")
        # the critic begins as the generator, whose reading of problems and programs it needs
        train(model, tokenizer, critic_lesson, school, critic_course, seed + 1, "tiny base critic")
        save(model, tokenizer, folder / "critic")
    courses = {"generator_course": asdict(generator_course), "critic_course": asdict(critic_course)}
    _write_manifest(folder, {"seed": seed, "world_seed": world_seed, **courses})


def new_school(seed: int, world_seed: int) -> School:
    """Lessons about the training problems; ``seed`` draws the generator's weaknesses."""
    problems = tiny.world(world_seed).splits["train"]
    return School(
        problems=[(problem, tiny.composition_of(problem)) for problem in problems],
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
        texts.append(TURN_END.join([*turns, f"assistant\n{lesson.answer}"]))
    return train_tokenizer(texts)


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
    """SHA-256 of every file of the two models, by path relative to ``folder``."""
    files = sorted(path for name in ("generator", "critic") for path in (folder / name).rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def verify(folder: Path) -> None:
    """Raises ValueError with one line when a model's files are not those of the manifest."""
    listed = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["sha256"]
    found = hashes(folder)
    for name in sorted(listed.keys() | found.keys()):
        if listed.get(name) != found.get(name):
            what = "missing" if name not in found else "not in the manifest" if name not in listed else "changed"
            raise ValueError(f"{folder / name}: {what}; rebuild the models or restore the shipped ones")


def _write_manifest(folder: Path, facts: dict[str, object]) -> None:
    manifest = {
        **facts,
        "command": f"python -m ctrl_hpc.data.tiny_models {folder.as_posix()} --seed {facts['seed']}",
        "threads": THREADS,
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
    parser = argparse.ArgumentParser(description="Train the tiny world's generator and base critic from scratch.")
    parser.add_argument("folder", type=Path, help="where generator, critic and MANIFEST.json are written")
    parser.add_argument("--seed", type=int, default=0, help="draws the weights, the lessons and the weaknesses")
    arguments = parser.parse_args()
    rebuild(arguments.folder, arguments.seed)


if __name__ == "__main__":
    main()
