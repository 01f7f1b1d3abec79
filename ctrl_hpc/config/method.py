"""The sections of the configuration that say what the method does: problems, prompts, stages, evaluation.

A frozen dataclass each; the names of the fields are the keys of the YAML files. Every field says its meaning and its
unit, and by its type its range and choices: see :mod:`ctrl_hpc.config.facts`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal, get_args

from annotated_types import Gt, Interval

from ctrl_hpc.config.facts import (
    Example,
    Free,
    FunctionName,
    IsPath,
    Must,
    NotNegative,
    PathName,
    Positive,
    Scheduled,
    ScheduledPenalty,
    ScheduledShare,
    Share,
)
from ctrl_hpc.config.objectives import LOSSES, is_loss
from ctrl_hpc.records import TRANSITIONS, thought_room

_IS_TREE = Must(
    lambda widths: not widths or len(widths) > 1, "be the drafts of a problem, then the critiques of at least one turn"
)
LoraTarget = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
_IS_NOT_EMPTY = Must(bool, "name at least one")
_IS_TRANSITIONS = Must(
    lambda rewards: not rewards or set(rewards) == set(TRANSITIONS), f"be a number for each of {', '.join(TRANSITIONS)}"
)

_IS_LOSS = Must(is_loss, f"be one of {', '.join(LOSSES)}, or FILE.py:FUNCTION of a file that exists and defines it")
_IS_INTERVAL = Must(lambda ends: not ends or (len(ends) == 2 and ends[0] < ends[1]), "be two numbers, the lower first")


@dataclass(frozen=True, slots=True, kw_only=True)
class TinyConfig:
    """The miniature world: its problems, and its models when they are trained anew."""

    rebuild: bool = False
    """Train the generator and the base critic from scratch instead of using the shipped ones."""
    require_conditions: Free[bool] = True
    """Stop before RL when a condition of an honest reward is violated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FilterConfig:
    """Training problems left out by what they are; in brackets CTRL's rules, which take TACO from 26443 to 18820."""

    without: tuple[str, ...] = ()
    """Texts that a statement must not hold (["<image>", "<span "])."""
    min_tokens: NotNegative[int] | None = None
    """A problem of a ``train`` split has a statement of more tokens than this (64); None: any."""
    max_tokens: Positive[int] | None = None
    """... and of fewer tokens than this (2048); None: any."""
    tokenizer: PathName | None = None
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
    """Data set of the training problems: a key of ``ctrl_hpc.data.catalog.DATASETS``, or ``jsonl``."""
    path: PathName | None = None
    """File or folder with the data set, for ``jsonl`` and for machines without a hub; None: the data set's default."""
    eval_names: tuple[str, ...] = ("tiny",)
    """Data sets the critics are evaluated on."""
    split: str = "train"
    """Split trained on; TACO has ``all`` too (train and test, as in the paper)."""
    eval_path: PathName | None = None
    """As ``path``, for the evaluation problems."""
    eval_paths: dict[str, PathName] = field(default_factory=dict)
    """The same by data set, where each has a place of its own; wins over ``eval_path``."""
    decontaminate: bool = True
    """Leave out training problems that are like a problem of ``eval_names`` or ``benchmarks``; what went and why is
    written to problems/decontamination.json. The tiny world's splits are apart by their making and are not compared."""
    overlap: Annotated[float, Interval(gt=0, le=1)] = 0.5
    """Share of the shorter statement's n-grams that makes two alike."""
    ngram: Positive[int] = 10
    """Words of an n-gram."""
    exact: bool = False
    """Only the very same statement is a duplicate (CTRL's own rule), whatever ``overlap``."""
    filters: FilterConfig = field(default_factory=FilterConfig)
    """Rules by which training problems are left out before all else."""
    verified_only: bool | None = None
    """Leave out training problems whose canonical solution does not pass its own tests, as the run's executors judge.
    None: of those that have one; true: also those without; false: none, and nothing is run."""
    benchmarks: dict[str, PathName] = field(default_factory=dict)
    """Further benchmarks that training problems must not be like: a path by name of the data set, or "" for the hub."""
    eval_split: str = "test"
    """Split reported on: ``dev`` while tuning, ``test`` for results."""
    n_train: Positive[int] = 1000
    """Training problems used at most."""
    n_eval: Positive[int] = 600
    """Evaluation problems used at most, of each data set."""

    @property
    def compared_names(self) -> tuple[str, ...]:
        """The data sets that training problems must not be like, the tiny world's own excepted; none where none is."""
        names = dict.fromkeys((*self.eval_names, *self.benchmarks)) if self.decontaminate else ()
        return tuple(name for name in names if not name == self.name == "tiny")


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptConfig:
    """Templates of the user turns."""

    folder: Annotated[str, IsPath(or_name=True)] = "default"
    """``default``, ``tiny``, ``ctrl`` (the form of CTRL's released critics), or a folder that holds solution.j2,
    critique.j2, critique_hinted.j2 and revision.j2."""
    system: str | None = None
    """System message of every chat; None: none is added (the chat template may have a default of its own)."""
    critique_prefix: str = ""
    """Text that every critique begins with, as ``Analysis:``: small models, which answer a request for a critique with
    one word, then write one. The critic continues it; it is no part of what is learnt. Empty: none."""
    critique_close: str = ""
    """Text, as ``Overall judgment:``, after which a critique that ended without a judgement is continued, within its
    ``max_tokens``: where a judgement follows such a text, by ``Correct`` or ``Incorrect``, drawn between the two.
    RL learns from what the critic wrote itself, before and after the text. Empty: no critique is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CriticConfig:
    """The model that is trained."""

    model: PathName = "models/tiny/critic"
    """Hugging Face folder of the base critic."""
    thinking: Literal["auto", "on", "off"] = "auto"
    """Whether it thinks before it answers, by its chat template's own switch; auto: as the template does of itself.
    What it thinks is learnt, and is no part of the critique."""
    thought_tokens: NotNegative[int] = 0
    """Longest thought in tokens, beside the ``max_tokens`` of the critique (which may use what the thought leaves); 0:
    both share those."""
    close_thought: bool = False
    """End a thought that does not end within ``thought_tokens`` by force, for a critique to follow; RL does not learn
    what is put there. False: a thought without an end is a critique without a judgement."""

    @property
    def thought_room(self) -> int:
        """Tokens of a thought, beside those of the critique."""
        return thought_room(self.thinking, self.thought_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters that are trained in place of the critic's own weights (Hu et al. 2021)."""

    rank: NotNegative[int] = 0
    """Rank of the adapters; 0: all weights are trained. Adapters want a larger ``optimizer.lr``, ten times about."""
    alpha: Positive[float] = 32.0
    """Their scale: alpha / rank times what they make is added to a layer's output."""
    targets: Annotated[tuple[LoraTarget, ...], _IS_NOT_EMPTY, Example("[q_proj, v_proj]")] = get_args(LoraTarget)
    """Linear layers that have one, by Hugging Face's names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleConfig:
    """Stage ``sample``: the generator's drafts, executed."""

    n_samples: Positive[int] = 4
    """Drafts a problem (paper: 4)."""
    temperature: NotNegative[float] = 1.0
    """Sampling temperature of the drafts."""
    max_tokens: Positive[int] = 1024
    """Longest draft in tokens."""
    adversarial_tests: NotNegative[int] = 0
    """Tests added to a training problem at most: inputs near those on which drafts failed, with the canonical
    solution's output, that a draft gets wrong (Code-A1's mistake book); 0: none. Needs canonical solutions and stdin
    tests; other problems stay as they are."""
    chunk: Positive[int] = 512
    """Problems drafted and executed together, then written down: an interruption loses one chunk at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SynthesizeConfig:
    """Stage ``synthesize``: critiques from the base critic that sees an execution hint."""

    n_critiques: Positive[int] = 1000
    """Critiques kept for SFT at most."""
    temperature: NotNegative[float] = 1.0
    """Sampling temperature."""
    max_tokens: Positive[int] = 1024
    """Longest critique in tokens."""
    balance: bool = True
    """Keep as many critiques of right drafts as of wrong ones."""
    consistent_only: bool = True
    """Drop critiques whose judgement contradicts the execution."""
    chunk: Positive[int] = 512
    """Drafts critiqued together, then written down: an interruption loses one chunk at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerConfig:
    """AdamW and its schedule."""

    lr: Positive[float] = 1e-5
    """Peak learning rate."""
    min_lr: NotNegative[float] = 0.0
    """Learning rate at the end of the schedule."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Decay after the warm-up."""
    warmup_steps: NotNegative[int] = 0
    """Optimizer steps of linear warm-up."""
    weight_decay: NotNegative[float] = 0.0
    """Decoupled weight decay; biases and norms do not decay."""
    beta1: Annotated[float, Interval(ge=0, lt=1)] = 0.9
    """Decay of the first moment."""
    beta2: Annotated[float, Interval(ge=0, lt=1)] = 0.95
    """Decay of the second moment."""
    eps: Positive[float] = 1e-8
    """Added to the root of the second moment."""
    clip_grad: NotNegative[float] = 1.0
    """Largest global gradient norm; 0 does not clip."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SFTConfig:
    """Stage ``sft``: the critic imitates the synthesised critiques, without the hint."""

    epochs: Positive[int] = 1
    """Passes over the critiques."""
    batch_size: Positive[int] = 256
    """Critiques an optimizer step."""
    max_length: Positive[int] = 2048
    """Longest prompt + critique in tokens; longer ones are dropped and counted."""
    save_every: Positive[int] = 50
    """Steps between checkpoints; the last step is always saved."""
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=2e-5))
    """AdamW for SFT."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RLConfig:
    """Stage ``rl``: GRPO on the reward of the revised program."""

    steps: Positive[int] = 100
    """Rollout steps."""
    prompts_per_step: Positive[int] = 128
    """Drafts critiqued a step."""
    group_size: Positive[int] = 8
    """Critiques a draft (paper: 8)."""
    temperature: Positive[float] = 1.0
    """Sampling temperature of the critiques."""
    max_prompt_tokens: Positive[int] | None = None
    """Longest prompt of a critique in tokens: drafts with a longer one are left out, and counted; None: what a
    micro-batch leaves beside ``max_tokens``."""
    max_tokens: Positive[int] = 768
    """Longest critique in tokens."""
    max_revision_tokens: Positive[int] = 1024
    """Longest revision in tokens; revisions are greedy."""
    minibatches: Positive[int] = 4
    """Optimizer steps a rollout step."""
    estimator: Literal["grpo", "dr_grpo", "rloo", "opo", "pass_k", "reinforce_pp", "reinforce_pp_baseline", "gae"] = (
        "grpo"
    )
    """How rewards become advantages: within the group (``ctrl_hpc.train.advantages``), over the whole step
    (``reinforce_pp``), or by a value network that is trained beside (``gae``: PPO)."""
    pass_k: Annotated[int, Gt(1)] = 4
    """For ``pass_k``: critiques of which the best one counts; fewer than ``group_size``."""
    gae_gamma: Annotated[float, Interval(gt=0, le=1)] = 1.0
    """Discount a token, for ``gae`` and ``reinforce_pp``."""
    gae_lambda: Share = 0.95
    """Decay of the temporal differences, for ``gae``."""
    value_clip: Positive[float] = 0.2
    """Largest move of a value in one update that lowers its loss, for ``gae``."""
    value_optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=1e-5, schedule="constant"))
    """AdamW of the value network, for ``gae``."""
    loss: Annotated[str, IsPath(function=True), _IS_LOSS, Example("clip_cov")] = "clip"
    """The policy loss: a name of ``ctrl_hpc.config.objectives.LOSSES``, or FILE.py:FUNCTION of one's own."""
    clip_low: NotNegative[float] = 0.2
    """How far the probability ratio may fall below 1, at most 1; for ``dppo`` how far a probability may fall, for
    ``gmpo`` the log-ratio."""
    clip_high: NotNegative[float] = 0.2
    """How far it may rise, likewise."""
    dual_clip: Annotated[float, Gt(1)] | None = None
    """Dual clip for negative advantages (``clip``, ``clip_cov``, ``gspo_token``); None: off."""
    ratio_cap: Positive[float] | None = None
    """Largest ratio that counts, for ``dppo``; None: no limit."""
    tau_positive: Positive[float] = 1.0
    """Steepness of the gate of ``sapo`` where the advantage is positive."""
    tau_negative: Positive[float] = 1.05
    """Steepness of that gate elsewhere."""
    cov_fraction: Annotated[float, Interval(gt=0, le=1)] = 2e-4
    """Share of a minibatch's tokens, at least one, that ``clip_cov`` and ``kl_cov`` treat apart."""
    cov_bounds: Annotated[tuple[float, ...], _IS_INTERVAL] = (1.0, 5.0)
    """Covariances between which ``clip_cov`` draws them."""
    cov_coef: NotNegative[float] = 1.0
    """Weight of the penalty of ``kl_cov``."""
    ratio: Literal["token", "sequence"] = "token"
    """Probability ratio of a token, or of a whole critique, for ``clip`` and ``clip_cov``."""
    aggregation: Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum"] = "token-mean"
    """How token losses become one number."""
    kl_coef: NotNegative[float] = 1e-3
    """Weight of the KL divergence to the SFT critic; 0: no reference model."""
    kl_estimator: Literal["k2", "k3"] = "k3"
    """Estimator of that divergence, part of the loss: k2's expected gradient is that of KL(policy || SFT critic), k3's
    that of KL(SFT critic || policy), the forward one. k3 is held at 10 and has no gradient beyond: where the policy
    gives a token less than 1/13.6 of the SFT critic's probability, or more than 60000 times it. The gradient of k1, the
    log-ratio itself, is zero in expectation: not allowed."""
    entropy_coef: NotNegative[float] = 0.0
    """Weight of the entropy bonus."""
    turns: Positive[int] = 1
    """Critique-revision turns of an episode at most: each revision is the next turn's draft, and each turn's critique a
    sample, compared with those of the same draft and turn. A critique that judges correct ends its episode."""
    turn_reward: Literal["last", "each", "gain"] = "last"
    """What a turn's critique earns: what the episode's last one did (``last``); the mean of its own and the later
    ones', where a last one counts for all turns after it (``each``); or how much more than the turn before, later gains
    included (``gain``)."""
    turn_discount: Share = 1.0
    """Weight of the next turn's reward against a turn's own."""
    credit: Literal["critique", "sentence"] = "critique"
    """critique: all tokens of a critique have its advantage. sentence: the generator revises again with each sentence
    left out, and what that changes of the reward, less its mean over the critique's tokens, is added to the advantages
    of the sentence's tokens. Goes with grpo, dr_grpo and rloo, and one turn."""
    credit_limit: Positive[int] = 10000
    """Revisions a step that ``credit=sentence`` may take, by an estimate of a sentence for every 24 tokens."""
    reward: FunctionName | None = None
    """FILE.py:FUNCTION in place of the reward that the keys below make; None: those."""
    verdict_coef: ScheduledShare = 0.0
    """Weight of the reward for a right judgement (Critique-RL, RefCritic); 0 is the paper's reward. As the other
    coefficients of the reward a number, or a schedule: ``1@0,0@50`` is 1 from step 0 on and 0 from step 50 on."""
    transition_reward: Annotated[
        dict[str, Scheduled], _IS_TRANSITIONS, Example("{fix: 1, keep: 1, break: -1, stuck: 0}")
    ] = field(default_factory=dict)
    """Reward of what became of the draft, in place of 1 or 0 for a revision that passes or not (ReCrit): a number for
    each of fix, keep, break and stuck; empty: the paper's reward."""
    verdict_only_share: ScheduledShare = 0.0
    """Share of a step's drafts whose critiques are rewarded for the judgement alone, without a revision
    (Critique-Coder: 0.2)."""
    overlong_buffer: NotNegative[int] = 0
    """Tokens before a critique's longest (thought and all) in which a penalty grows from 0 to ``overlong_penalty``
    (DAPO's soft overlong punishment); 0: none."""
    overlong_penalty: ScheduledPenalty = 1.0
    """Taken off the reward of a critique of the longest length."""
    leak_penalty: ScheduledPenalty = 0.0
    """Taken off the reward of a critique that gives the corrected program away."""
    stop_at_first_failure: bool = True
    """Run a revision's tests up to the first that fails, as rewards need no more: an endless loop costs one time limit,
    not one a test. False: run them all."""
    max_staleness: NotNegative[int] = 0
    """Largest number of weight versions a rollout may be old; 0: strictly on-policy; more: rollouts are made
    during the update, at most so many steps ahead."""
    publish: Literal["full", "delta"] = "full"
    """How the critic's servers get a version of its weights: whole, or what has changed since the version before, which
    is for servers of ours alone. Of a critic with ``lora.rank`` those get the adapters, others it whole."""
    publish_full_every: Positive[int] = 10
    """Versions of which one is published whole with ``delta``: a server that is new reads at most so many folders."""
    chunk: NotNegative[int] = 0
    """Drafts that are critiqued, revised and executed together, beside the step's others; 0: all of a step's."""
    chunks_in_flight: Positive[int] = 8
    """Chunks of a step on their way at a time."""
    importance_cap: Positive[float] | None = None
    """Cap of the importance weights that correct for rollouts by older weights or another engine (truncated importance
    sampling); None: none, and without ``importance_bounds`` no correction."""
    importance_level: Literal["token", "sequence", "geometric"] = "token"
    """Whose importance weight: a token's, its critique's, or the geometric mean over its critique."""
    importance_bounds: Annotated[tuple[NotNegative[float], ...], _IS_INTERVAL, Example("[0.5,5]")] = ()
    """Weights outside are 0: masked importance sampling (``sequence``, ``geometric``), IcePop (``token``); empty: none
    is masked."""
    refill_rounds: NotNegative[int] = 0
    """Times a step draws more drafts in place of those whose critiques all earned the same; 0: they are skipped in the
    update."""
    reference: Literal["copy", "swap"] = "copy"
    """The frozen reference: a second copy beside the critic, or its weights kept in host memory and swapped in."""
    replay: PathName | None = None
    """Folder of recorded rollouts (``rl/rollouts`` of another run) to learn from instead of sampling."""
    save_every: Positive[int] = 10
    """Rollout steps between checkpoints; the last step is always saved."""
    eval_every: NotNegative[int] = 0
    """Steps between quick evaluations, logged as ``eval/pass_at_1`` while RL runs (sweeps judge by it); 0: none."""
    eval_problems: Positive[int] = 64
    """Problems of each evaluation set that a quick evaluation takes."""
    save_samples: NotNegative[int] = 16
    """Samples a step written to the run's table for people to read."""
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=1e-5, schedule="constant"))
    """AdamW for RL."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CriticBenchmarksConfig:
    """Benchmarks of critics in the stage ``eval``: answers known to be right or wrong, judged by each critic."""

    sources: Annotated[dict[str, PathName], Example("{own: answers.jsonl}")] = field(default_factory=dict)
    """A file or folder, or "" for the hub, by name of the benchmark: a key of
    ``ctrl_hpc.data.critic_benchmarks.BENCHMARKS``, with @SPLIT or @CONFIG/SPLIT behind it for another split than its
    own; empty: none."""
    n_questions: Positive[int] | None = None
    """Questions of each that are asked, the first ones; None: all."""
    votes: Positive[int] = 1
    """Critiques of an answer: one is greedy, several are sampled at ``eval.temperature``."""
    pairwise: bool = False
    """Show both answers of a pair, too, in both orders, for the better one to be named."""

    @staticmethod
    def parts(source: str) -> tuple[str, str | None]:
        """The benchmark's name, and the split that is asked for, of a key of ``sources``."""
        name, _, split = source.partition("@")
        return name, split or None


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalConfig:
    """Stage ``eval``: critique-revision turns on held-out problems."""

    critics: tuple[str, ...] = ("none", "base", "sft", "rl", "exec_feedback")
    """Critics compared: keys of ``ctrl_hpc.evaluate.critics.CRITICS``."""
    turns: Positive[int] = 5
    """Critique-revision turns."""
    n_samples: Positive[int] = 1
    """Drafts a problem. Draft k of every problem together are one seed: the paper's five are n_samples=5."""
    widths: Annotated[tuple[Positive[int], ...], _IS_TREE, Example("[1,5,1,1,1,1]")] = ()
    """Shape of the critique-revision tree, in place of ``n_samples`` and ``turns``: drafts a problem, then critiques of
    each program in each turn; empty: one critique of each."""
    votes: Positive[int] = 1
    """Judgements whose majority decides; a tie is no judgement. The first critique of the majority is used."""
    temperature: Positive[float] = 0.7
    """Sampling temperature of drafts and critiques. Revisions are greedy."""
    greedy: bool = True
    """Evaluate every critic greedily too, as NAME_greedy."""
    max_tokens: Positive[int] = 1024
    """Longest draft, critique or revision in tokens."""
    bootstrap: Positive[int] = 2000
    """Resamples of the confidence intervals."""
    stop_when_correct: bool = True
    """A draft judged Correct is kept and not critiqued again."""
    ablate: bool = False
    """Have the generator revise again with each sentence of a critique left out, for every draft that the first turn
    fixed, and report the sentences on which the fixes hang. Costs a greedy revision and an execution a sentence."""
    critic_benchmarks: CriticBenchmarksConfig = field(default_factory=CriticBenchmarksConfig)
    """Benchmarks that the critics of the run which are models are scored on."""
    models: Annotated[dict[str, PathName], Example("{gpt4o: 'https://api.openai.com/v1#gpt-4o'}")] = field(
        default_factory=dict
    )
    """Further critics by name, to be listed in ``critics``: a Hugging Face folder of the critic's architecture, or
    ``URL#MODEL`` of an OpenAI-compatible endpoint."""
    chunk: Positive[int] = 1024
    """Samples of a turn that are asked for together, each answer written down when it comes."""
    chunks_in_flight: Free[Positive[int]] = 1
    """Chunks of a turn in the works at a time. Many small chunks keep a large server busy and lose little when the
    evaluation is killed; one large chunk is fastest where all runs on one machine."""
    report_samples: NotNegative[int] = 24
    """Samples of every critic shown in the report."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgeConfig:
    """JudgeBench in the stage ``eval``: which of two answers does a critic take for the right one?"""

    votes: Annotated[tuple[Positive[int], ...], Example("[1,2,4,8,16,32,64,128]")] = ()
    """Numbers of votes that accuracy is reported for; empty: JudgeBench is left out. As many judgements are asked
    for as the largest."""
    mode: Literal["pointwise", "pairwise"] = "pointwise"
    """pointwise: each answer is critiqued by itself, and the one more often judged Correct wins (the paper's way);
    pairwise: both are shown, and the critic names the better one."""
    swap: bool = True
    """pairwise: half of the requests show the answers in the other order, so that a place has no advantage."""
    path: PathName | None = None
    """File or folder with JudgeBench, for machines without a hub; None: the hub's."""
    split: str = "gpt"
    """``gpt`` (350 pairs, the paper's) or ``claude`` (270)."""
    template: PathName | None = None
    """pairwise: file in place of the packaged comparison.j2; variables question, answer_a, answer_b."""
