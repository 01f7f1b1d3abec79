"""The plan says what a run takes before a queue does, by arithmetic that is worked out here by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from ctrl_hpc import cli
from ctrl_hpc.config import (
    ROOT,
    Config,
    CriticConfig,
    DataConfig,
    EndpointConfig,
    ExecutorConfig,
    LoraConfig,
    ParallelConfig,
    PlanConfig,
    RLConfig,
    RolloutConfig,
    TrainerConfig,
    load,
)
from ctrl_hpc.megatron import architecture as architectures
from ctrl_hpc.plan.memory import Workload, estimate, parameters_of_rank
from ctrl_hpc.plan.plan import count, plan
from ctrl_hpc.plan.work import work
from ctrl_hpc.records import Limits

GIB = 1 << 30
H200 = PlanConfig(memory_gb=139.0)
SIZES = {  # as the models' cards state them
    "Qwen/Qwen2.5-Coder-0.5B-Instruct": 0.49e9,
    "Qwen2.5-Coder-7B": 7.61e9,
    "models/Qwen2.5-Coder-32B-Instruct": 32.76e9,
    "Qwen3-4B": 4.02e9,
    "meta-llama/Llama-3.1-8B-Instruct": 8.03e9,
    "Llama-3.2-1B": 1.24e9,
}


def config_of(model: str, **changes: object) -> Config:
    """One GPU rank of an H200 that trains a known model."""
    whole = Config(
        name="plan",
        critic=CriticConfig(model=model),
        trainer=TrainerConfig(device="cuda", micro_batch_tokens=4096),
        rl=RLConfig(kl_coef=0.0),
        plan=H200,
    )
    return replace(whole, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", SIZES)
def test_well_known_models_have_the_sizes_of_their_cards(name: str) -> None:
    assert architectures.known(name).n_parameters == pytest.approx(SIZES[name], rel=0.01)


def test_four_billion_parameters_fit_a_gpu_and_eight_do_not() -> None:
    assert plan(config_of("Qwen3-4B")).fits
    eight = plan(config_of("Qwen3-8B"))
    assert eight.fits is False
    assert any(line.startswith("does not fit: a rank needs 1") for line in eight.lines())
    assert "raise parallel.tensor" in eight.verdict()


def test_more_ranks_make_a_model_fit() -> None:
    sharded = config_of(
        "Qwen3-8B",
        trainer=TrainerConfig(device="cuda", ranks_per_node=8, micro_batch_tokens=4096),
        parallel=ParallelConfig(tensor=2, sequence=True, distributed_optimizer=True),
    )
    assert plan(sharded).fits


def test_a_micro_batch_too_large_is_told_by_its_key() -> None:
    large = plan(config_of("Qwen3-0.6B", trainer=TrainerConfig(device="cuda", micro_batch_tokens=1 << 20)))
    assert large.fits is False and "lower trainer.micro_batch_tokens" in large.verdict()


def test_state_is_eighteen_bytes_a_parameter_in_bf16_and_is_sharded_by_the_distributed_optimizer() -> None:
    llama = architectures.known("Llama-3.1-8B")  # 128256 rows: no padding at TP 1
    n = llama.n_parameters
    work = Workload(data_size=4, tokens=1, response_tokens=1, on_gpu=True, half=True)
    whole = estimate(llama, ParallelConfig(), work)[0]
    assert (whole.weights, whole.gradients, whole.optimizer) == (2 * n, 4 * n, 12 * n)
    sharded = estimate(llama, ParallelConfig(distributed_optimizer=True), work)[0]
    assert sharded.optimizer == 3 * n
    doubled = estimate(llama, ParallelConfig(), replace(work, reference_copy=True, value_network=True))[0]
    assert (doubled.reference, doubled.value) == (2 * n, 18 * n)


def test_adapters_alone_have_gradients_and_an_optimizer() -> None:
    qwen = architectures.known("Qwen2.5-0.5B")  # 24 layers of width 896, 14 heads and 2 key-value heads of 64, MLP 4864
    layer = 16 * (3 * 896 + 1152) + 16 * (896 + 896) + 16 * (2 * 896 + 2 * 4864) + 16 * (4864 + 896)
    n = 24 * layer
    assert n == 8_798_208  # what PEFT prints for this model and rank
    work = Workload(data_size=1, tokens=1, response_tokens=1, on_gpu=True, half=True, lora=LoraConfig(rank=16))
    found = estimate(qwen, ParallelConfig(), work)[0]
    assert (found.gradients, found.optimizer) == (4 * n, 12 * n)
    assert found.weights == 2 * (parameters_of_rank(qwen, ParallelConfig(), 0) + n)
    values = replace(work, lora=LoraConfig(rank=16, targets=("v_proj",)))
    assert estimate(qwen, ParallelConfig(), values)[0].gradients == 4 * 24 * 16 * (896 + 1152)


def test_stages_of_a_pipeline_share_the_parameters() -> None:
    llama = architectures.known("Llama-3.1-8B")
    stages = [parameters_of_rank(llama, ParallelConfig(pipeline=4), stage) for stage in range(4)]
    assert sum(stages) == llama.n_parameters
    assert stages[0] - stages[1] == 128256 * 4096 and stages[3] - stages[0] == 4096
    assert stages[1] == stages[2]
    lines = list(
        plan(
            config_of(
                "Llama-3.1-8B",
                trainer=TrainerConfig(device="cuda", ranks_per_node=4),
                parallel=ParallelConfig(pipeline=4),
            )
        ).lines()
    )
    assert sum("pipeline stage" in line for line in lines) == 4


OUTPUT = 128256 * 4096
LAYERS = 8030261248 - 2 * OUTPUT
"""Of Llama-3.1-8B: the embedding multiplies nothing, the output layer critiques alone."""


@pytest.mark.parametrize(
    ("micro_batch", "nodes", "prompts"),
    [
        (8192, 1, 64),  # 256 + 8 * 768 = 6400: all of a draft's critiques behind one prompt
        (4096, 1, 128),  # 256 + 5 * 768 = 4096: five, and three behind another
        (8192, 128, 128),  # a rank has four critiques of the 512
        (1024, 1, 512),
    ],
)
def test_critiques_of_a_draft_share_its_prompt(micro_batch: int, nodes: int, prompts: int) -> None:
    given = replace(H200, trainer_tflops=400.0, prompt_tokens=256)
    rl = RLConfig(prompts_per_step=64, group_size=8, max_tokens=768, minibatches=1, kl_coef=0.0)
    trainer = TrainerConfig(device="cuda", micro_batch_tokens=micro_batch, nodes=nodes)
    found = plan(config_of("Llama-3.1-8B", rl=rl, plan=given, trainer=trainer))
    tokens = prompts * 256 + 512 * 768
    attended = prompts * 256 * 128 + 512 * 768 * (256 + 384)
    multiplied = LAYERS * tokens + OUTPUT * 512 * 768
    seconds = (6 * multiplied + 12 * 32 * 4096 * attended) / (400e12 * nodes)
    assert found.rl_update_s == pytest.approx(seconds, rel=1e-6)
    assert found.rl_tokens_per_s == pytest.approx(tokens / seconds, rel=1e-6)


@pytest.mark.parametrize(
    ("options", "passes"),
    [
        (RLConfig(minibatches=4, kl_coef=0.0), 3 + 3 / 4),
        (RLConfig(minibatches=4, kl_coef=0.0, loss="clip_cov"), 3 + 1),  # chooses tokens before its first update, too
        (RLConfig(minibatches=1, kl_coef=0.1, loss="kl_cov"), 3 + 1 + 1),
        (RLConfig(minibatches=1, kl_coef=0.1), 3 + 1),
        (RLConfig(minibatches=1, kl_coef=0.0, estimator="gae"), 3 + 1 + 3),
    ],
)
def test_passes_of_a_step(options: RLConfig, passes: float) -> None:
    assert work(config_of("Qwen3-4B", rl=options), 1).passes == pytest.approx(passes)


def test_adapters_have_half_a_backward_pass_and_full_recomputing_another_forward_one() -> None:
    """One rank, so that a step's and an update's times are in the ratio of their passes."""
    rl = RLConfig(minibatches=1, kl_coef=0.1)
    given = replace(H200, trainer_tflops=400.0)
    plain, adapters, again = (
        plan(config_of("Qwen3-4B", rl=rl, plan=given, trainer=TrainerConfig(device="cuda"), **more))
        for more in (
            {},
            {"lora": LoraConfig(rank=16)},
            {"lora": LoraConfig(rank=16), "parallel": ParallelConfig(recompute="full")},
        )
    )
    assert adapters.sft_step_s / plain.sft_step_s == pytest.approx(2 / 3)
    assert again.sft_step_s / plain.sft_step_s == pytest.approx(3 / 3)
    assert adapters.rl_update_s / plain.rl_update_s == pytest.approx((2 + 1) / (3 + 1))


def test_critiques_that_earn_by_their_judgement_alone_are_not_revised() -> None:
    """Half of 15 drafts are 8, as rounded; from the second of two steps on none."""
    given = replace(H200, rollout_tokens_per_s=100.0, executor_runs_per_s=2.0)
    rl = RLConfig(prompts_per_step=15, group_size=4, steps=2, max_tokens=100, max_revision_tokens=200)
    half, fading = replace(rl, verdict_only_share=0.5), replace(rl, verdict_only_share="0.5@0,0@1")
    all_of_them, found, faded = (
        plan(config_of("Qwen3-4B", rl=options, plan=given, generator="Qwen3-4B")).costs
        for options in (rl, half, fading)
    )
    jails = ExecutorConfig().elements * ExecutorConfig().workers
    assert all_of_them.revise_s == pytest.approx(60 * 200 / 100.0)
    assert found.revise_s == pytest.approx(28 * 200 / 100.0)
    assert faded.revise_s == pytest.approx((28 + 60) / 2 * 200 / 100.0)
    assert found.execute_s == pytest.approx(28 / 2.0 / jails)
    assert found.sample_s == all_of_them.sample_s == pytest.approx(60 * 100 / 100.0)
    assert found.disk_bytes == all_of_them.disk_bytes


def test_adapters_are_small_on_disk_and_half_precision_is_half_of_it_on_a_cpu_too() -> None:
    """8,798,208 numbers of adapters: versions of 2 bytes each, checkpoints of 14 with master weights and moments."""
    adapted = LoraConfig(rank=16)
    trainer = TrainerConfig(device="cpu", dtype="bfloat16", keep_checkpoints=2)
    found = plan(config_of("Qwen2.5-0.5B", trainer=trainer, lora=adapted))
    n, adapters = found.n_parameters, 8_798_208
    assert found.memory.weights == 2 * (n + adapters)
    assert (found.memory.gradients, found.memory.optimizer) == (4 * adapters, 12 * adapters)
    disk = found.costs.disk_bytes
    assert (disk["versions"], disk["checkpoints"], disk["exports"]) == (
        3 * 2 * adapters,
        2 * 14 * adapters,
        2 * 2 * n,
    )
    whole = plan(config_of("Qwen2.5-0.5B", trainer=replace(trainer, dtype="float32"), lora=adapted))
    assert whole.memory.weights == 4 * (n + adapters) and whole.memory.optimizer == 8 * adapters
    served = RolloutConfig(critic_urls=("http://127.0.0.1:1",))  # servers of others merge nothing
    elsewhere = plan(config_of("Qwen2.5-0.5B", trainer=trainer, lora=adapted, rollout=served)).costs
    assert elsewhere.disk_bytes["versions"] == 3 * 2 * n


def test_rows_that_large_models_on_cpus_go_on_from() -> None:
    """Twice 65,536 tokens of 24 layers, keys and values of 2 heads of 64 numbers, 2 bytes each."""
    for device, model, size in (
        ("cpu", "Qwen2.5-0.5B", 2 * 65536 * 24 * 2 * 2 * 64 * 2),
        ("cuda", "Qwen2.5-0.5B", 0),
        ("cpu", str(ROOT / "models/tiny/critic"), 0),
    ):
        found = plan(config_of(model, rollout=RolloutConfig(device=device))).costs
        assert found.remembered_bytes["critic"] == size
        assert any("rows to go on from" in line for line in found.lines()) == bool(size)


def test_times_follow_from_the_given_rates() -> None:
    given = replace(H200, trainer_tflops=400.0, rollout_tokens_per_s=1000.0, prompt_tokens=256, executor_runs_per_s=2.0)
    rl = RLConfig(prompts_per_step=64, group_size=8, max_tokens=768, minibatches=1, kl_coef=0.0)
    alone = TrainerConfig(device="cuda", micro_batch_tokens=4096, shared_prefix=False)
    found = plan(config_of("Llama-3.1-8B", rl=rl, plan=given, trainer=alone))
    tokens, length = 64 * 8 * 1024, 1024
    active = LAYERS + OUTPUT * 768 / 1024
    seconds = tokens * (6 * active + 6 * 32 * length * 4096) / 400e12
    assert found.rl_update_s == pytest.approx(seconds, rel=1e-6)
    assert found.rl_tokens_per_s == pytest.approx(tokens / seconds, rel=1e-6)
    assert found.rl_rollout_s == pytest.approx(64 * 8 * 768 / 1000.0)
    assert found.executor_workers == -(-64 * 8 // (2.0 * seconds))
    sampling = 64 * 8 * 768 / 1000.0
    assert found.overlap() == f"rl.max_staleness=0: one after the other, {seconds + sampling:.1f} s"
    ahead = plan(config_of("Llama-3.1-8B", rl=replace(rl, max_staleness=2), plan=given, trainer=alone)).overlap()
    assert ahead == f"rl.max_staleness=2: beside each other, {sampling:.1f} s; weights on disk: 4 versions at most"


def test_the_costs_of_a_run_by_hand(tmp_path: Path) -> None:
    (tmp_path / "site.json").write_text('{"executor_tests_per_s": 50, "disk_gb_per_s": 2, "trainer_tflops": 9}')
    given = replace(
        H200, trainer_tflops=400.0, rates=str(tmp_path / "site.json"), tests_per_program=25, prompt_tokens=256
    )
    config = config_of(
        "Llama-3.1-8B",
        rl=RLConfig(prompts_per_step=64, group_size=8, max_tokens=768, max_revision_tokens=512, kl_coef=0.0, steps=10),
        plan=given,
        data=DataConfig(n_train=1000),
        generator="https://api.example.org/v1",
        generator_model="large",
        endpoint=EndpointConfig(requests_per_min=512.0, price_in=1.0, price_out=2.0),
        executor=ExecutorConfig(elements=2, workers=8, limits=Limits(wall_s=4.0)),
    )
    found = plan(config).costs
    weights = 2 * 8030261248
    assert found.sample_s == pytest.approx(512 * 768 / 3000.0)
    assert found.revise_s == pytest.approx(60.0)
    assert found.execute_s == pytest.approx(512 * 25 / 50 / 16)
    assert found.execute_at_most_s == pytest.approx(512 * 25 * 4 / 16)
    assert found.load_s == found.publish_s == pytest.approx(weights / 2e9)
    together = found.load_s + found.sample_s + 60.0 + 16.0 + found.update_s + found.publish_s
    assert found.step_s == pytest.approx(together)
    assert (found.tokens_in, found.tokens_out) == (4000 * 256 + 5120 * 1024, 4000 * 1024 + 5120 * 512)
    assert found.price == pytest.approx((found.tokens_in + 2 * found.tokens_out) / 1e6)
    assert found.server_bytes == {"critic": weights} and found.cache_token_bytes == {"critic": 4 * 32 * 8 * 128}
    assert found.disk_bytes["versions"] == 3 * weights and found.disk_bytes["checkpoints"] == 2 * 7 * weights
    assert found.published_bytes == weights
    told = "\n".join(plan(config).lines())
    assert "(50 tests/s a jail, measured)" in told and "(2 GB/s of disk, measured)" in told
    assert "(3000 tokens/s a server, assumed)" in told and "(400 Tflop/s a rank, given)" in told


@pytest.mark.slow
def test_measured_rates_replace_assumed_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    site = tmp_path / "site.json"
    site.write_text('{"trainer_tflops": 9.0}')
    command = ["bench", "rates", "--out", str(site), "--folder", str(tmp_path), "--seconds", "0.1", "--only"]
    assert cli.main([*command, "rollout_tokens_per_s"]) == 2
    assert "--model: needed for rollout_tokens_per_s" in capsys.readouterr().err
    assert cli.main([*command, "executor_tests_per_s", "disk_gb_per_s"]) == 0
    measured = json.loads(site.read_text())
    assert set(measured) == {"trainer_tflops", "executor_tests_per_s", "disk_gb_per_s"}
    found = plan(config_of("Qwen3-4B", plan=replace(H200, rates=str(site)))).costs.rates
    assert (found.trainer_tflops.value, found.trainer_tflops.source) == (9.0, "measured")
    assert found.executor_tests_per_s.value == measured["executor_tests_per_s"] > 1
    assert found.rollout_tokens_per_s.source == "assumed"


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("[]", "must map rates to numbers"),
        ('{"speed": 1}', "speed: unknown; allowed: trainer_tflops, "),
        ('{"disk_gb_per_s": 0}', "disk_gb_per_s: 0: must be a number greater than 0"),
        ("{", "Expecting property name"),
    ],
)
def test_a_file_of_rates_that_is_none_is_told(content: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "site.json").write_text(content)
    with pytest.raises(ValueError, match=r"plan\.rates: .*site\.json: ") as error:
        plan(config_of("Qwen3-4B", plan=replace(H200, rates=str(tmp_path / "site.json"))))
    assert told in str(error.value)


@pytest.mark.parametrize("name", ["qwen25_coder_7b", "qwen25_coder_32b", "tiny", "humaneval"])
def test_a_dry_run_of_the_shipped_configurations_fits_and_is_a_configuration_itself(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = ROOT / "configs" / f"{name}.yaml"
    assert cli.main(["run", str(file), "--dry-run"]) == 0
    out = capsys.readouterr().out
    trains = name != "humaneval"
    assert ("#   fits: " in out) == trains
    if name.startswith("qwen"):
        assert "slurm: trainer, " in out and "is not here: sizes as known of" in out
    (tmp_path / "again.yaml").write_text(out)
    assert load(tmp_path / "again.yaml") == load(file)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["plan.memory_gb=40"], "does not fit: a rank needs "),
        (["critic.model=/no/such/model"], "critic.model: /no/such/model: neither a Hugging Face model folder"),
        (["parallel.tensor=3", "trainer.ranks_per_node=3"], "parallel.tensor=3 must divide the critic's 28 attention"),
    ],
)
def test_a_plan_that_cannot_be_is_one_line_and_exit_code_2(
    overrides: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(ROOT / "configs" / "qwen25_coder_7b.yaml")
    assert cli.main(["run", file, "--dry-run", *overrides]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"ctrl-hpc: {told}") and error.count("\n") == 1


def test_a_folder_with_only_a_configuration_is_enough(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "critic").mkdir()
    source = ROOT / "models" / "tiny" / "critic" / "config.json"
    (tmp_path / "critic" / "config.json").write_text(source.read_text())
    file = str(ROOT / "configs" / "tiny.yaml")
    assert cli.main(["run", file, "--dry-run", f"critic.model={tmp_path}/critic"]) == 0
    assert f"critic: 348k parameters ({tmp_path}/critic)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("number", "told"), [(640, "640"), (999, "999"), (348_160, "348k"), (999_600, "1M"), (7_615_616_512, "7.62B")]
)
def test_counts_in_three_digits(number: int, told: str) -> None:
    assert count(number) == told
