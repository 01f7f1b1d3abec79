"""The sections of the configuration that say what is measured, and where it is kept: data, prompts, evaluation, wandb.

As in :mod:`ctrl_hpc.config.sections`, every field says its meaning, its unit and its range.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class FilterConfig:
    """Training problems left out by what they are; in brackets CTRL's rules, which take TACO from 26443 to 18820."""

    without: tuple[str, ...] = ()
    """Texts that a statement must not hold (["<image>", "<span "])."""
    min_tokens: int | None = None
    """A problem of a ``train`` split has a statement of more tokens than this, >= 0 (64); None: any."""
    max_tokens: int | None = None
    """... and of fewer tokens than this, > 0 (2048); None: any."""
    tokenizer: str | None = None
    """Folder of the tokenizer that counts them; None: the critic's."""
    unique: bool = False
    """Leave out a statement that came before in its split (true)."""
    stdin_without: tuple[str, ...] = ()
    """Texts that the input of a stdin test must not hold, or the test is left out ([" = ", "[]"])."""
    list_streams: bool = True
    """TACO: keep stdin tests whose input or output is a list of lines (false)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """Which problems the run trains on and which it reports on."""

    name: str = "tiny"
    """Data set of the training problems: a key of ``ctrl_hpc.data.DATASETS``, or ``jsonl``."""
    path: str | None = None
    """File or folder with the data set, for ``jsonl`` and for machines without a hub; None: the data set's default."""
    eval_names: tuple[str, ...] = ("tiny",)
    """Data sets the critics are evaluated on."""
    split: str = "train"
    """Split trained on; TACO has ``all`` too (train and test, as in the paper)."""
    eval_path: str | None = None
    """As ``path``, for the evaluation problems."""
    eval_paths: dict[str, str] = field(default_factory=dict)
    """The same by data set, where each has a place of its own; wins over ``eval_path``."""
    decontaminate: bool = True
    """Leave out training problems that are like a problem of ``eval_names`` or ``benchmarks``; what went and why is
    written to problems/decontamination.json. The tiny world's splits are apart by their making and are not compared."""
    overlap: float = 0.5
    """Share of the shorter statement's n-grams that makes two alike, in (0, 1]."""
    ngram: int = 10
    """Words of an n-gram; > 0."""
    exact: bool = False
    """Only the very same statement is a duplicate (CTRL's own rule), whatever ``overlap``."""
    filters: FilterConfig = field(default_factory=FilterConfig)
    """Rules by which training problems are left out before all else."""
    verified_only: bool | None = None
    """Leave out training problems whose canonical solution does not pass its own tests, as the run's executors judge.
    None: of those that have one; true: also those without; false: none, and nothing is run."""
    benchmarks: dict[str, str] = field(default_factory=dict)
    """Further benchmarks that training problems must not be like: a path by name of the data set, or "" for the hub."""
    eval_split: str = "test"
    """Split reported on: ``dev`` while tuning, ``test`` for results."""
    n_train: int = 1000
    """Training problems used at most; > 0."""
    n_eval: int = 600
    """Evaluation problems used at most, of each data set; > 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptConfig:
    """Templates of the user turns."""

    folder: str = "default"
    """``default``, ``tiny``, ``ctrl`` (the form of CTRL's released critics), or a folder that holds solution.j2,
    critique.j2, critique_hinted.j2 and revision.j2."""
    system: str | None = None
    """System message of every chat; None: none is added (the chat template may have a default of its own)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalConfig:
    """Stage ``eval``: critique-revision turns on held-out problems."""

    critics: tuple[str, ...] = ("none", "base", "sft", "rl", "exec_feedback")
    """Critics compared: keys of ``ctrl_hpc.evaluate.critics.CRITICS``."""
    turns: int = 5
    """Critique-revision turns; >= 1."""
    n_samples: int = 1
    """Drafts a problem; >= 1. Draft k of every problem together are one seed: the paper's five are n_samples=5."""
    widths: tuple[int, ...] = ()
    """Shape of the critique-revision tree, in place of ``n_samples`` and ``turns``: drafts a problem, then critiques of
    each program in each turn, for example [1,5,1,1,1,1]; empty: one critique of each."""
    votes: int = 1
    """Judgements whose majority decides, >= 1; a tie is no judgement. The first critique of the majority is used."""
    temperature: float = 0.7
    """Sampling temperature of drafts and critiques; > 0. Revisions are greedy."""
    greedy: bool = True
    """Evaluate every critic greedily too, as NAME_greedy."""
    max_tokens: int = 1024
    """Longest draft, critique or revision in tokens."""
    bootstrap: int = 2000
    """Resamples of the confidence intervals; > 0."""
    stop_when_correct: bool = True
    """A draft judged Correct is kept and not critiqued again."""
    models: dict[str, str] = field(default_factory=dict)
    """Further critics by name, to be listed in ``critics``: a Hugging Face folder of the critic's architecture, or
    ``URL#MODEL`` of an OpenAI-compatible endpoint."""
    chunk: int = 1024
    """Samples of a turn that are asked for together, each answer written down when it comes; > 0."""
    chunks_in_flight: int = 1
    """Chunks of a turn in the works at a time; > 0. Many small chunks keep a large server busy and lose little when the
    evaluation is killed; one large chunk is fastest where all runs on one machine."""
    report_samples: int = 24
    """Samples of every critic shown in the report."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgeConfig:
    """JudgeBench in the stage ``eval``: which of two answers does a critic take for the right one?"""

    votes: tuple[int, ...] = ()
    """Numbers of votes that accuracy is reported for, each > 0, for example [1,2,4,8,16,32,64,128]; empty: JudgeBench
    is left out. As many judgements are asked for as the largest."""
    mode: Literal["pointwise", "pairwise"] = "pointwise"
    """pointwise: each answer is critiqued by itself, and the one more often judged Correct wins (the paper's way);
    pairwise: both are shown, and the critic names the better one."""
    swap: bool = True
    """pairwise: half of the requests show the answers in the other order, so that a place has no advantage."""
    path: str | None = None
    """File or folder with JudgeBench, for machines without a hub; None: the hub's."""
    split: str = "gpt"
    """``gpt`` (350 pairs, the paper's) or ``claude`` (270)."""
    template: str | None = None
    """pairwise: file in place of the packaged comparison.j2; variables question, answer_a, answer_b."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WandbConfig:
    """Weights & Biases."""

    mode: Literal["offline", "online", "disabled"] = "offline"
    """offline writes beside the run, for ``ctrl-hpc sync`` later."""
    project: str = "ctrl-hpc"
    """Project."""
    entity: str | None = None
    """Team or user; None: the account's default."""
    group: str | None = None
    """Run group; None: the run's name."""
    services: bool = True
    """A run for every element of the arrays too, from its first ``services_every_s`` on."""
    services_every_s: float = 30.0
    """Seconds between what an element logs, > 0."""
    checkpoints: Literal["none", "final", "all"] = "final"
    """Critics kept as artifacts, whole models (7B: 15 GB each): final: the trained ones; all: at every save, too.
    Offline nothing is copied for ``final``; the sync says how much it sends."""
