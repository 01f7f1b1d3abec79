"""The sections of the configuration tree: a frozen dataclass each.

Every field says its meaning, its unit and its range; the names of the fields are the keys of the YAML files.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class TinyConfig:
    """The miniature world: its problems, and its two models when they are trained anew."""

    rebuild: bool = False
    """Train the generator and the base critic from scratch instead of using the shipped ones."""
    models: str = "models/tiny"
    """Folder with the shipped ``generator`` and ``critic``."""
    require_conditions: bool = True
    """Stop before RL when a condition of an honest reward is violated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CriticConfig:
    """The model that is trained."""

    model: str = "models/tiny/critic"
    """Hugging Face folder of the base critic."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleConfig:
    """Stage ``sample``: the generator's drafts, executed."""

    n_samples: int = 4
    """Drafts a problem; >= 1 (paper: 4)."""
    temperature: float = 1.0
    """Sampling temperature of the drafts; >= 0."""
    max_tokens: int = 1024
    """Longest draft in tokens."""
    adversarial_tests: int = 0
    """Tests added to a training problem at most, >= 0: inputs near those on which drafts failed, with the canonical
    solution's output, that a draft gets wrong (Code-A1's mistake book); 0: none. Needs canonical solutions and stdin
    tests; other problems stay as they are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SynthesizeConfig:
    """Stage ``synthesize``: critiques from the base critic that sees an execution hint."""

    n_critiques: int = 1000
    """Critiques kept for SFT at most; > 0."""
    temperature: float = 1.0
    """Sampling temperature; >= 0."""
    max_tokens: int = 1024
    """Longest critique in tokens."""
    balance: bool = True
    """Keep as many critiques of right drafts as of wrong ones."""
    consistent_only: bool = True
    """Drop critiques whose judgement contradicts the execution."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerConfig:
    """AdamW and its schedule."""

    lr: float = 1e-5
    """Peak learning rate; > 0."""
    min_lr: float = 0.0
    """Learning rate at the end of the schedule."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Decay after the warm-up."""
    warmup_steps: int = 0
    """Optimizer steps of linear warm-up; >= 0."""
    weight_decay: float = 0.0
    """Decoupled weight decay, >= 0; biases and norms do not decay."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.95
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    clip_grad: float = 1.0
    """Largest global gradient norm; 0 does not clip."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelConfig:
    """How Megatron-core divides the critic; the data-parallel size is what is left of the trainer's ranks."""

    tensor: int = 1
    """Tensor-parallel ranks; divides the attention heads."""
    pipeline: int = 1
    """Pipeline-parallel ranks; divides the layers."""
    sequence: bool = False
    """Sequence parallelism in the tensor-parallel group."""
    distributed_optimizer: bool = False
    """Shard the optimizer over data-parallel ranks (GPU)."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations computed again in the backward pass."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerConfig:
    """The trainer's processes and numerics, for SFT and RL."""

    nodes: int = 1
    """Nodes of the trainer job; >= 1."""
    ranks_per_node: int = 1
    """Ranks on a node: one a GPU, or plain processes on a CPU; >= 1."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the critic is trained; auto: cuda where there is one."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Weights and activations; auto: bfloat16 on cuda, float32 on cpu."""
    kernels: Literal["auto", "triton", "torch"] = "auto"
    """Backend of the loss kernels; auto: triton on cuda, torch on cpu."""
    micro_batch_tokens: int = 16384
    """Token budget of a micro-batch on one data-parallel rank, padding included; > 0."""
    threads: int = 1
    """CPU threads of a rank; >= 1."""
    timeout_s: float = 1800.0
    """A collective that takes longer is a fault: the stacks are dumped and the job ends."""
    save: Literal["auto", "sync", "async"] = "auto"
    """async: a checkpoint is written during the step after it, from a copy in host memory, the last one excepted.
    auto: async on cuda, sync on cpu."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept; >= 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanConfig:
    """Given rates for ``ctrl-hpc run --dry-run``: what the machines of the run do; measure yours and set them."""

    memory_gb: float | None = None
    """Memory of a trainer rank's device in GiB, > 0; None: this machine's GPU, or its memory shared by the ranks."""
    trainer_tflops: float | None = None
    """Useful Tflop/s of a trainer rank, > 0; None: 40 % of an H100's peak on cuda, 0.04 on a CPU core."""
    rollout_tokens_per_s: float | None = None
    """Tokens a second of one critic server, > 0; None: 3000 on cuda, 8000 on a CPU (the tiny critic)."""
    executor_runs_per_s: float = 4.0
    """Programs a second that one jail runs against their tests, > 0."""
    prompt_tokens: int = 768
    """Tokens of a typical critique prompt, > 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SFTConfig:
    """Stage ``sft``: the critic imitates the synthesised critiques, without the hint."""

    epochs: int = 1
    """Passes over the critiques; >= 1."""
    batch_size: int = 256
    """Critiques an optimizer step; >= 1."""
    max_length: int = 2048
    """Longest prompt + critique in tokens; longer ones are dropped and counted."""
    save_every: int = 50
    """Steps between checkpoints; the last step is always saved."""
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=2e-5))
    """AdamW for SFT."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RLConfig:
    """Stage ``rl``: GRPO on the reward of the revised program."""

    steps: int = 100
    """Rollout steps; > 0."""
    prompts_per_step: int = 128
    """Drafts critiqued a step; > 0."""
    group_size: int = 8
    """Critiques a draft; >= 1 (paper: 8)."""
    temperature: float = 1.0
    """Sampling temperature of the critiques; > 0."""
    max_prompt_tokens: int | None = None
    """Longest prompt of a critique in tokens, > 0: drafts with a longer one are left out, and counted; None: what a
    micro-batch leaves beside ``max_tokens``."""
    max_tokens: int = 768
    """Longest critique in tokens."""
    max_revision_tokens: int = 1024
    """Longest revision in tokens; revisions are greedy."""
    minibatches: int = 4
    """Optimizer steps a rollout step; >= 1."""
    estimator: Literal["grpo", "dr_grpo", "rloo", "gae"] = "grpo"
    """How rewards become advantages: within the group (``ctrl_kernels.group_advantages``), or by a value network that
    is trained beside (``gae``: PPO)."""
    gae_gamma: float = 1.0
    """Discount a token, in (0, 1], for ``gae``."""
    gae_lambda: float = 0.95
    """Decay of the temporal differences, in [0, 1], for ``gae``."""
    value_clip: float = 0.2
    """Largest move of a value in one update that lowers its loss, > 0, for ``gae``."""
    value_optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=1e-5, schedule="constant"))
    """AdamW of the value network, for ``gae``."""
    clip_low: float = 0.2
    """Lower clip range of the probability ratio."""
    clip_high: float = 0.2
    """Upper clip range of the probability ratio."""
    dual_clip: float | None = None
    """Dual clip for negative advantages, > 1; None: off."""
    ratio: Literal["token", "sequence"] = "token"
    """Probability ratio of a token, or of a whole critique."""
    aggregation: Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum"] = "token-mean"
    """How token losses become one number."""
    kl_coef: float = 1e-3
    """Weight of the KL divergence to the SFT critic; 0: no reference model."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """Estimator of that divergence."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""
    verdict_coef: float = 0.0
    """Weight of the reward for a right judgement (Critique-RL, RefCritic), in [0, 1]; 0 is the paper's reward."""
    transition_reward: dict[str, float] = field(default_factory=dict)
    """Reward of what became of the draft, in place of 1 or 0 for a revision that passes or not (ReCrit): a number for
    each of fix, keep, break and stuck, as in {fix: 1, keep: 1, break: -1, stuck: 0}; empty: the paper's reward."""
    verdict_only_share: float = 0.0
    """Share of a step's drafts, in [0, 1], whose critiques are rewarded for the judgement alone, without a revision
    (Critique-Coder: 0.2)."""
    leak_penalty: float = 0.0
    """Taken off the reward of a critique that gives the corrected program away, >= 0."""
    max_staleness: int = 0
    """Largest number of weight versions a rollout may be old, >= 0; 0: strictly on-policy; more: rollouts are made
    during the update, at most so many steps ahead."""
    chunk: int = 0
    """Drafts that are critiqued, revised and executed together, beside the step's others, >= 0; 0: all of a step's."""
    chunks_in_flight: int = 8
    """Chunks of a step on their way at a time, >= 1."""
    importance_cap: float | None = None
    """Cap of the importance weights that correct for rollouts by older weights or another engine (truncated importance
    sampling), > 0; None: no correction."""
    refill_rounds: int = 0
    """Times a step draws more drafts in place of those whose critiques all earned the same; >= 0 (0: they are skipped
    in the update)."""
    reference: Literal["copy", "swap"] = "copy"
    """The frozen reference: a second copy beside the critic, or its weights kept in host memory and swapped in."""
    replay: str | None = None
    """Folder of recorded rollouts (``rl/rollouts`` of another run) to learn from instead of sampling."""
    save_every: int = 10
    """Rollout steps between checkpoints; the last step is always saved."""
    eval_every: int = 0
    """Steps between quick evaluations, logged as ``eval/pass_at_1`` while RL runs (sweeps judge by it); 0: none."""
    eval_problems: int = 64
    """Problems of each evaluation set that a quick evaluation takes, > 0."""
    save_samples: int = 16
    """Samples a step written to the run's table for people to read."""
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=1e-5, schedule="constant"))
    """AdamW for RL."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitsConfig:
    """Limits of a test where the problem names none."""

    cpu_s: float = 10.0
    """CPU seconds."""
    wall_s: float = 20.0
    """Wall-clock seconds."""
    memory_mb: int = 512
    """Peak memory in MiB."""
    output_bytes: int = 1 << 20
    """Bytes of stdout and, apart, of stderr; at least twice what a test expects, whatever is said here."""
    processes: int = 128
    """Processes and threads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OverrideConfig:
    """What holds for the programs of one data set, whatever its problems say; None leaves a thing as it is."""

    cpu_s: float | None = None
    """CPU seconds of a test, > 0; not multiplied by ``time_factor``. Wall-clock time follows in proportion."""
    memory_mb: int | None = None
    """Peak memory in MiB, > 0."""
    comparison: str | None = None
    """How outputs are compared: a name of ``ctrl_hpc.sandbox.judge``, with options, or of a special judge."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecutorConfig:
    """The executor array: nsjail workers that run untrusted programs."""

    elements: int = 1
    """Array elements (services)."""
    workers: int = 2
    """Jails of an element; about one a core."""
    cache: bool = True
    """Share verdicts of identical programs through the run directory."""
    judges: dict[str, str] = field(default_factory=dict)
    """Special judges by name, each FILE.py:FUNCTION; problems ask for one by ``comparison``."""
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    """Default limits of a test."""
    time_factor: float = 1.0
    """Multiplies the time limits, those that problems state for faster languages among them; > 0."""
    overrides: dict[str, OverrideConfig] = field(default_factory=dict)
    """Limits and comparison by data set, as ``overrides.livecodebench.cpu_s=6``."""
    python: str = ""
    """Interpreter that programs run with, on every node: CPython 3.11 or newer by path or name; empty: this one."""
    packages: tuple[str, ...] = ("numpy",)
    """Packages of that interpreter that programs may import, with what they require; read-only."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutConfig:
    """The rollout arrays: inference servers for the critic and for the generator."""

    critic_elements: int = 1
    """Servers of the critic being trained."""
    critic_urls: tuple[str, ...] = ()
    """SGLang servers (real ones, or ``ctrl-hpc serve rollout``) that serve the critic instead of an array of ours."""
    generator_elements: int = 1
    """Servers of the fixed generator; 0 when ``generator`` is a URL or ``oracle``."""
    threads: int = 2
    """CPU threads of a server."""
    max_batch_tokens: int = 65536
    """Largest padded batch of a CPU server, in tokens."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the models run; auto: cuda where there is one."""
    batching: Literal["auto", "padded", "continuous"] = "auto"
    """padded: length-sorted batches, each request with its own random stream; continuous: requests join and leave the
    running batch, seeded together. auto: continuous on cuda, padded on a CPU."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EndpointConfig:
    """How a generator that is a URL is asked, and what it costs."""

    key_env: str = "OPENAI_API_KEY"
    """Environment variable that holds the key; an endpoint without keys needs none."""
    max_in_flight: int = 32
    """Requests at a time; >= 1."""
    requests_per_min: float | None = None
    """Rate limit, > 0; None: none."""
    max_tries: int = 8
    """Times a request is tried, with growing random pauses or those the endpoint asks for; >= 1."""
    timeout_s: float = 600.0
    """Longest wait for one answer, > 0."""
    price_in: float = 0.0
    """Price of a million prompt tokens, in any currency; >= 0."""
    price_out: float = 0.0
    """Price of a million completion tokens; >= 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobConfig:
    """Slurm resources of one job or array element; None leaves a thing to the cluster's default."""

    partition: str | None = None
    """Partition."""
    cpus: int = 2
    """CPUs a task."""
    memory_gb: float | None = None
    """Memory of a node's share in GiB."""
    gpus: int = 0
    """GPUs a task."""
    time_min: int = 240
    """Time limit in minutes."""
    constraint: str | None = None
    """Node features."""
    contained: bool = True
    """Whether ``launch.python`` and ``launch.srun_args`` hold for these jobs; False: this Python, in no container."""
    additional: dict[str, str] = field(default_factory=dict)
    """Any other sbatch option, by its long name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchConfig:
    """Where jobs run; usually a profile of ``configs/cluster``."""

    engine: Literal["local", "slurm"] = "local"
    """submitit's executor: processes on this machine, or Slurm jobs."""
    account: str | None = None
    """Slurm account."""
    qos: str | None = None
    """Quality of service."""
    setup: tuple[str, ...] = ()
    """Shell lines before the job's command: modules, environments, containers."""
    signal_delay_s: int = 120
    """Seconds before the time limit at which jobs are told to save and requeue."""
    max_requeues: int = 10
    """Times a job may be requeued after a timeout."""
    array_parallelism: int = 256
    """Array elements that run at once."""
    heartbeat_s: float = 5.0
    """Seconds between heartbeats of a service."""
    dead_after_s: float = 30.0
    """A service silent for longer is taken for dead."""
    start_timeout_s: float = 600.0
    """Longest wait for the first element of an array."""
    disk_patience_s: float = 3600.0
    """Longest wait for space on a full disk, >= 0; the run then ends, and continues when it is started again."""
    bind: str = "127.0.0.1"
    """Address services listen on; ``0.0.0.0`` where jobs run on several hosts."""
    advertise: str | None = None
    """Address by which other jobs reach a service; None: the one it listens on, or with 0.0.0.0 its node's address."""
    max_restarts: int = 5
    """Times in a row an element of an array is started again when it dies before it served; >= 0."""
    python: str | None = None
    """Command that starts Python in a Slurm job, for example inside a container; None: this Python."""
    srun_args: tuple[str, ...] = ()
    """More arguments of srun, for example of pyxis: ``--container-image=...``."""
    snapshot: Literal["new", "keep", "none"] = "new"
    """``new``: a copy of the code that the driver starts with runs; ``keep``: its last start's; ``none``: no copy."""
    trainer: JobConfig = field(default_factory=JobConfig)
    """The trainer job."""
    rollout: JobConfig = field(default_factory=JobConfig)
    """An element of the rollout arrays."""
    executor: JobConfig = field(default_factory=JobConfig)
    """An element of the executor array."""
