"""Stage ``sft``: the critic learns to write the synthesised critiques without having seen the hint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from ctrl_hpc import jsonl
from ctrl_hpc.config import Config
from ctrl_hpc.flow.prompts import Prompts
from ctrl_hpc.megatron import parallel_state
from ctrl_hpc.megatron.parallel_state import World
from ctrl_hpc.records import Critique, Problem, Solution
from ctrl_hpc.rollout.chat import chat_ids
from ctrl_hpc.rollout.thinking import Thinking
from ctrl_hpc.seeds import take
from ctrl_hpc.train.batch import collate
from ctrl_hpc.train.drafts import response_ids
from ctrl_hpc.train.loop import Loop, learning_rate
from ctrl_hpc.train.losses import SFTLoss
from ctrl_hpc.train.policy import Policy

Sequences = list[tuple[Sequence[int], Sequence[int]]]
"""(prompt, response) token ids."""


def run(config: Config, run_dir: str | Path) -> None:
    """Train on every rank of the job; the critic ends in ``run_dir/sft/hf``.

    Continues from the last checkpoint in ``run_dir/sft/checkpoints``. Raises ValueError for what the user can mend.
    """
    with parallel_state.job(config) as world:
        train(config, Path(run_dir), world)


def train(config: Config, run_dir: Path, world: World) -> None:
    """The loop: batch, update, log and save; then export."""
    options = config.sft
    sequences, dropped = world.from_main(_read_sequences, config, run_dir)
    steps_per_epoch = -(-len(sequences) // options.batch_size)
    steps = options.epochs * steps_per_epoch
    policy = Policy(config, world, config.critic.model, optimizer=options.optimizer)
    with Loop(config, run_dir, "sft", {"policy": policy}, steps=steps, save_every=options.save_every) as loop:
        for step in loop:
            epoch, index = divmod(step, steps_per_epoch)
            first = epoch * len(sequences) + index * options.batch_size
            count = min(options.batch_size, (epoch + 1) * len(sequences) - first)
            rows = take(len(sequences), seed=config.seed, start=first, count=count)
            batch = collate([sequences[row] for row in rows])
            rate = learning_rate(options.optimizer, step, steps)
            with loop.clock("update"):
                logged = policy.update(batch, SFTLoss(n_tokens=batch.n_tokens), rate)
            facts = {"tokens": float(batch.n_tokens), "dropped": float(dropped)}
            loop.done(step, {f"sft/{name}": value for name, value in (logged | facts).items()})
    policy.export(run_dir / "sft" / "hf", source=config.critic.model)
    if config.lora.rank:
        policy.export_adapters(run_dir / "sft" / "adapters")


def _read_sequences(config: Config, run_dir: Path) -> tuple[Sequences, int]:
    """The critiques as token sequences, and how many were dropped for their length.

    Raises ValueError when there is none.
    """
    from transformers import AutoTokenizer

    problems = {problem.id: problem for problem in jsonl.iterate(Problem, run_dir / "problems" / "train.jsonl")}
    solutions = {item.id: item for item in jsonl.iterate(Solution, run_dir / "sample" / "solutions.jsonl")}
    critiques = jsonl.read(Critique, run_dir / "synthesize" / "critiques.jsonl")
    prompts = Prompts.load(**asdict(config.prompts))
    tokenizer = AutoTokenizer.from_pretrained(config.critic.model)
    switch = Thinking(mode=config.critic.thinking).switch
    sequences: Sequences = []
    for critique in critiques:
        solution = solutions[critique.solution_id]
        chat = prompts.critique(problems[solution.problem_id], solution)
        sequences.append((chat_ids(tokenizer, chat, **switch), response_ids(tokenizer, critique)))
    kept = [pair for pair in sequences if len(pair[0]) + len(pair[1]) <= config.sft.max_length]
    if not kept:
        raise ValueError(
            f"sft: none of the {len(critiques)} critiques of {run_dir / 'synthesize'} fits "
            f"sft.max_length={config.sft.max_length}"
        )
    return kept, len(critiques) - len(kept)
