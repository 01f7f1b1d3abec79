"""The sections of the configuration that say where and how it runs: trainer, arrays, Slurm, endpoint, tracking.

A frozen dataclass each; the names of the fields are the keys of the YAML files. Every field says its meaning and its
unit, and by its type its range and choices: see :mod:`ctrl_hpc.config.facts`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from ctrl_hpc.config.facts import Example, Free, FunctionName, Must, NotNegative, PathName, Positive
from ctrl_hpc.records import Limits, Override, Rules

Device = Literal["auto", "cpu", "cuda"]
"""auto: cuda where there is one; :func:`resolve_device` says which."""
_Dtype = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerConfig:
    """The trainer's processes and numerics, for SFT and RL."""

    nodes: Free[Positive[int]] = 1
    """Nodes of the trainer job."""
    ranks_per_node: Free[Positive[int]] = 1
    """Ranks on a node: one a GPU, or plain processes on a CPU."""
    device: Device = "auto"
    """Where the critic is trained; auto: cuda where there is one."""
    dtype: _Dtype = "auto"
    """Weights and activations, with gradients and Adam's state in float32. auto: bfloat16 on cuda; on CPUs bfloat16
    for a critic in bfloat16 where the processor multiplies it (AVX512-BF16, AMX), else float32."""
    kernels: Literal["auto", "triton", "torch"] = "auto"
    """Backend of the loss kernels; auto: triton on cuda, torch on cpu."""
    micro_batch_tokens: Free[Positive[int]] = 16384
    """Token budget of a micro-batch on one data-parallel rank, padding included; a shared prompt counts once."""
    shared_prefix: Free[bool] = True
    """Compute the prompt that several responses of a batch share once: they are packed behind it as one sequence, each
    attending to it and to itself. False: each response has its prompt to itself. The same but for rounding."""
    threads: Free[Positive[int]] = 1
    """CPU threads of a rank."""
    timeout_s: Free[Positive[float]] = 1800.0
    """A collective that takes longer is a fault: the stacks are dumped and the job ends."""
    save: Free[Literal["auto", "sync", "async"]] = "auto"
    """async: a checkpoint is written during the step after it, from a copy in host memory, the last one excepted.
    auto: async on cuda, sync on cpu."""
    keep_checkpoints: Free[Positive[int]] = 2
    """Newest checkpoints kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelConfig:
    """How Megatron-core divides the critic; the data-parallel size is what is left of the trainer's ranks."""

    tensor: Free[Positive[int]] = 1
    """Tensor-parallel ranks; divides the attention heads."""
    pipeline: Free[Positive[int]] = 1
    """Pipeline-parallel ranks; divides the layers."""
    sequence: Free[bool] = False
    """Sequence parallelism in the tensor-parallel group."""
    distributed_optimizer: bool = False
    """Shard the optimizer over data-parallel ranks (GPU)."""
    recompute: Free[Literal["none", "selective", "full"]] = "none"
    """Activations computed again in the backward pass."""

    def check(self, ranks: int) -> None:
        """Raises ValueError for a division that this many ranks of the trainer cannot have."""
        model_ranks = self.tensor * self.pipeline
        if ranks % model_ranks:
            raise ValueError(
                f"parallel.tensor x parallel.pipeline = {self.tensor} x {self.pipeline} does not divide the trainer's "
                f"{ranks} ranks (trainer.nodes x trainer.ranks_per_node)"
            )
        if self.sequence and self.tensor == 1:
            raise ValueError("parallel.sequence: true needs parallel.tensor > 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutConfig:
    """The rollout arrays: inference servers for the critic and for the generator."""

    critic_elements: Free[Positive[int]] = 1
    """Servers of the critic being trained."""
    critic_urls: Free[tuple[str, ...]] = ()
    """SGLang servers (real ones, or ``ctrl-hpc serve rollout``) that serve the critic instead of an array of ours."""
    critic_key_env: Free[str | None] = None
    """Environment variable with the bearer token of ``critic_urls``; null: none is sent, the run's own least of all."""
    generator_elements: Free[NotNegative[int]] = 1
    """Servers of the fixed generator; 0 when ``generator`` is a URL or ``oracle``."""
    threads: Free[Positive[int]] = 2
    """CPU threads of a server."""
    max_batch_tokens: Free[Positive[int]] = 65536
    """Largest padded batch of a CPU server, in tokens."""
    device: Device = "auto"
    """Where the models run; auto: cuda where there is one."""
    dtype: _Dtype = "auto"
    """Weights and activations of the servers; logits are float32. auto: the weights' own on cuda; on CPUs bfloat16 for
    weights in bfloat16 where the processor multiplies it (AVX512-BF16, AMX), else float32."""
    batching: Literal["auto", "padded", "continuous"] = "auto"
    """padded: length-sorted batches, each request with its own random stream; continuous: requests join and leave the
    running batch, seeded together. auto: continuous on cuda, padded on a CPU."""
    engine: Free[Literal["builtin", "sglang", "vllm"]] = "builtin"
    """What an element of the rollout arrays is: our own server, or one of SGLang or vLLM, which must be installed on
    its node; ``threads``, ``device``, ``batching`` and ``max_batch_tokens`` are the built-in one's."""
    tensor: Free[Positive[int]] = 1
    """Tensor-parallel ranks (GPUs) of a server of SGLang or vLLM."""
    engine_command: Free[Annotated[tuple[str, ...], Example("[/opt/vllm/bin/vllm]")]] = ()
    """What starts the engine, before its arguments; empty: ``python -m sglang.launch_server`` of this interpreter, or
    ``vllm``."""
    engine_args: Free[Annotated[tuple[str, ...], Example("[--mem-fraction-static, '0.8']")]] = ()
    """Further arguments of the engine's command line."""


def _is_override(given: Override) -> bool:
    return all(limit is None or limit > 0 for limit in (given.cpu_s, given.memory_mb))


_OneOverride = Annotated[Override, Must(_is_override, "have a cpu_s and a memory_mb greater than 0, or null")]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecutorConfig:
    """The executor array: nsjail workers that run untrusted programs."""

    elements: Free[Positive[int]] = 1
    """Array elements (services)."""
    workers: Free[Positive[int]] = 2
    """Jails of an element; about one a core."""
    cache: bool = True
    """Share verdicts of identical programs through the run directory."""
    judges: Annotated[dict[str, FunctionName], Example("{close: judges.py:close}")] = field(default_factory=dict)
    """Special judges by name, each FILE.py:FUNCTION; problems ask for one by ``comparison``."""
    limits: Positive[Limits] = field(default_factory=Limits)
    """Limits of a test where the problem names none."""
    time_budget_s: Positive[float] | None = None
    """Wall-clock seconds of all tests of a program together, beyond which it is a time_limit; None: each test's limit
    alone. SandboxFusion gives LiveCodeBench's 160."""
    time_factor: Positive[float] = 1.0
    """Multiplies the time limits, those that problems state for faster languages among them."""
    overrides: Annotated[dict[str, _OneOverride], Example("{livecodebench: {cpu_s: 6}}")] = field(default_factory=dict)
    """Limits and comparison by data set, as ``overrides.livecodebench.cpu_s=6``."""
    python: str = ""
    """Interpreter that programs run with, on every node: CPython 3.11 or newer by path or name; empty: this one."""
    testlib: str = ""
    """Path of ``testlib.h`` on the executors' nodes, for problems with a checker; empty: the system's, if there."""
    packages: tuple[str, ...] = ("numpy",)
    """Packages of that interpreter that programs may import, with what they require; read-only."""

    @property
    def rules(self) -> Rules:
        """By which programs are judged."""
        return Rules(
            limits=self.limits,
            time_budget_s=self.time_budget_s,
            time_factor=self.time_factor,
            overrides=self.overrides,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class EndpointConfig:
    """How a generator that is a URL is asked, and what it costs."""

    key_env: Free[str] = "OPENAI_API_KEY"
    """Environment variable that holds the key; an endpoint without keys needs none."""
    max_in_flight: Free[Positive[int]] = 32
    """Requests at a time."""
    requests_per_min: Free[Positive[float]] | None = None
    """Rate limit; None: none."""
    max_tries: Free[Positive[int]] = 8
    """Times a request is tried, with growing random pauses or those the endpoint asks for."""
    timeout_s: Free[Positive[float]] = 600.0
    """Longest wait for one answer."""
    price_in: NotNegative[float] = 0.0
    """Price of a million prompt tokens, in any currency."""
    price_out: NotNegative[float] = 0.0
    """Price of a million completion tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobConfig:
    """Slurm resources of one job or array element; None leaves a thing to the cluster's default."""

    partition: str | None = None
    """Partition."""
    cpus: Positive[int] = 2
    """CPUs a task."""
    memory_gb: Positive[float] | None = None
    """Memory of a node's share in GiB."""
    gpus: NotNegative[int] = 0
    """GPUs a task; on this machine (``launch.engine=local``) those that the run's other jobs use least."""
    time_min: Positive[int] = 240
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
    signal_delay_s: NotNegative[int] = 120
    """Seconds before the time limit at which jobs are told to save and requeue."""
    max_requeues: NotNegative[int] = 10
    """Times a job may be requeued after a timeout."""
    array_parallelism: Positive[int] = 256
    """Array elements that run at once."""
    heartbeat_s: Positive[float] = 5.0
    """Seconds between heartbeats of a service."""
    dead_after_s: Positive[float] = 30.0
    """A service silent for longer is taken for dead."""
    start_timeout_s: Positive[float] = 600.0
    """Longest wait for the first element of an array."""
    disk_patience_s: NotNegative[float] = 3600.0
    """Longest wait for space on a full disk; the run then ends, and continues when it is started again."""
    bind: str = "127.0.0.1"
    """Address services listen on; ``0.0.0.0`` where jobs run on several hosts."""
    advertise: str | None = None
    """Address by which other jobs reach a service; None: the one it listens on, or with 0.0.0.0 its node's address."""
    max_restarts: NotNegative[int] = 5
    """Times in a row an element of an array is started again when it dies before it served."""
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


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanConfig:
    """Rates for ``ctrl-hpc run --dry-run``: what the machines of the run do. One that is given wins over a measured
    one, and that over what is assumed."""

    rates: Annotated[PathName, Example("site-rates.json")] | None = None
    """File of rates measured on this site, by ``ctrl-hpc bench rates``; None: none."""
    memory_gb: Positive[float] | None = None
    """Memory of a trainer rank's device in GiB; None: this machine's GPU, or its memory shared by the ranks."""
    trainer_tflops: Positive[float] | None = None
    """Tflop/s that a trainer rank executes, activations that are computed again included; None: 40 % of an H100's peak
    on cuda, 0.04 on a CPU core."""
    rollout_tokens_per_s: Positive[float] | None = None
    """Tokens a second of one critic server; None: 3000 on cuda, 8000 on a CPU (the tiny critic)."""
    executor_runs_per_s: Positive[float] | None = None
    """Programs a second that one jail runs against their tests; None: 40 tests a second, over ``tests_per_program``."""
    tests_per_program: Positive[float] = 10.0
    """Tests of a typical program that are run."""
    disk_gb_per_s: Positive[float] | None = None
    """GB a second that one process writes to, or reads from, the run directory's disk; None: 1."""
    prompt_tokens: Positive[int] = 768
    """Tokens of a typical critique prompt."""


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
    services_every_s: Positive[float] = 30.0
    """Seconds between what an element logs."""
    checkpoints: Literal["none", "final", "all"] = "final"
    """Critics kept as artifacts, whole models (7B: 15 GB each): final: the trained ones; all: at every save, too.
    Offline nothing is copied for ``final``; the sync says how much it sends."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrackingConfig:
    """TensorBoard and MLflow, beside wandb, from the same journals."""

    writers: Annotated[tuple[Literal["tensorboard", "mlflow"], ...], Example("[tensorboard]")] = ()
    """Told while the run works; each needs its package: pip install 'ctrl-hpc[tensorboard,mlflow]'."""
    mlflow_uri: str | None = None
    """MLflow's server or store; None: the environment's MLFLOW_TRACKING_URI, else the folder RUN/mlflow."""
    mlflow_experiment: str = "ctrl-hpc"
    """MLflow's experiment, in which every journal is a run."""


def resolve_device(key: str, wanted: str) -> Literal["cpu", "cuda"]:
    """What a device means on this machine. Raises ValueError naming ``key`` for cuda where there is none."""
    import torch

    if wanted == "cpu":
        return "cpu"
    if torch.cuda.is_available():
        return "cuda"
    if wanted == "cuda":
        raise ValueError(f"{key}=cuda: this machine has no usable GPU; use {key}=cpu or auto")
    return "cpu"
