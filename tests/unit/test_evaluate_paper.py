"""The paper's numbers, its tables with ours beside, and reports of several runs."""

import json
from dataclasses import replace

import numpy as np
import pytest

from ctrl_hpc import cli, jsonl
from ctrl_hpc.config import ROOT, dump, load
from ctrl_hpc.evaluate import metrics
from ctrl_hpc.evaluate.tree import Node
from ctrl_hpc.records import Problem, Solution, Verdict
from ctrl_hpc.report import combined, paper, runs, tables
from ctrl_hpc.report.results import History
from ctrl_hpc.report.runs import FinishedRun


def row(correct, judged=None):
    """A row of results.json from the samples' acceptance by turn, each sample a problem of its own."""
    correct_NT = np.array(correct, dtype=bool)
    outcomes = metrics.Outcomes(
        problem_N=np.arange(len(correct)),
        correct_NT=correct_NT,
        judged_N=np.array(judged if judged is not None else [0] * len(correct)),
        timeout_NT=~correct_NT,
    )
    weights = metrics.bootstrap_weights(len(correct), 50, 0)
    made = metrics.summary(outcomes, weights, judges=judged is not None)
    shares = [float(share) for share in correct_NT.mean(axis=0)]
    bands = [made["ci95"][f"pass_at_1@{turn}"] for turn in range(len(shares))]
    easy = {"n_samples": len(correct), "pass_at_1": shares, "ci95": bands}
    made["ci95"]["similarity"] = [0.2, 0.3]
    return made | {"similarity": 0.25, "by_difficulty": {"easy": easy}}


# of four drafts one passes; after the first turn two, one having been broken; after the fifth three
TURNS = [[0, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1], [1, 0, 0, 0, 0, 0]]
ZERO = [[bool(line[0])] * 6 for line in TURNS]


def finished(folder, *overrides, critics=None, **more):
    config = load(ROOT / "configs" / "tiny.yaml", [f"run_dir={folder}", "eval.turns=5", *overrides])
    rows = critics or {"none": row(ZERO), "rl": row(TURNS, [-1, -1, -1, -1])}
    entry = {"n_problems": 4, "n_samples": 1, "critics": rows, "differences": {}}
    results = {"datasets": {"codecontests": entry}, "wall_time_s": {}, "learning_curve": [], **more}
    return FinishedRun(folder=folder, variant="ours", config=config, results=results)


def by_title(made, start):
    return next(table for table in made if table.title.startswith(start))


def test_every_row_of_the_paper_keeps_the_identity():
    for entry in paper.numbers()["tables"]:
        zero = {
            (item["generator"], name): item[name]["pass_at_1"]
            for item in paper.numbers()["tables"][0]["rows"]
            if item["turns"] == 0
            for name in paper.DATASETS
        }
        for item in entry["rows"]:
            for dataset in paper.DATASETS:
                cell = item.get(dataset)
                if cell and "delta_up" in cell:
                    expected = zero[item["generator"], dataset] + cell["delta_up"] - cell["delta_down"]
                    assert cell["pass_at_1"] == pytest.approx(expected, abs=0.0101), item


def test_our_numbers_stand_beside_the_papers(tmp_path):
    made = paper.tables([finished(tmp_path)])
    table = by_title(made, "Pass@1 (Δ↑/Δ↓) by generator and critic (arXiv 2502.03492v2, Table 3)")
    assert table.columns[:4] == ("generator", "critic", "CodeContests: paper", "ours")
    cells = {(line[0], line[1]): line[2:4] for line in table.rows}
    assert cells["Qwen", "zero-shot"] == ("7.88", "25.00")
    assert cells["Qwen", "CTRL"] == ("11.76 (4.73/0.85)", "50.00 (50.00/25.00)")
    assert cells["Qwen", "CTRL ×5"] == ("16.24 (9.21/0.85)", "75.00 (75.00/25.00)")
    assert cells["Qwen", "GPT-4o"] == ("10.67 (4.85/2.06)", "–")
    assert cells["GPT-4o", "CTRL"] == ("23.03 (4.97/2.55)", "–")
    judged = by_title(made, "Judgement of drafts: F1")
    assert judged.rows[2] == ("CTRL", "93.19", "0.00", "45.02", "85.71", "69.10", "42.86")
    assert by_title(made, "Similarity").rows == (("self-critique", "0.482", "–"), ("CTRL", "0.313", "0.250"))
    assert by_title(made, "Relative gain").rows[0][:3] == ("CTRL", "+73.2", "+200.0")


def test_a_generator_called_gpt_4o_fills_its_own_rows(tmp_path):
    run = finished(tmp_path, "generator=http://127.0.0.1:1/v1", "generator_model=gpt-4o-2024-08-06")
    table = by_title(paper.tables([run]), "Pass@1")
    cells = {(line[0], line[1]): line[3] for line in table.rows}
    assert cells["GPT-4o", "CTRL"] == "50.00 (50.00/25.00)"
    assert cells["Qwen", "CTRL"] == "–"


def test_judgebench_beside_the_paper(tmp_path):
    found = {
        "accuracy": {"1": 0.5, "2": 0.25, "128": 0.75},
        "ci95": {n: [0.2, 0.8] for n in ("1", "2", "128")},
        "n_pairs": 4,
    }
    run = finished(
        tmp_path, judgebench={"mode": "pointwise", "n_pairs": 4, "critics": {"rl": {"overall": found, "coding": found}}}
    )
    made = paper.tables([run])
    assert by_title(made, "JudgeBench: accuracy (the project page)").rows[0] == ("CTRL", "64.3", "75.0", "64.3", "75.0")
    votes = by_title(made, "JudgeBench: accuracy of CTRL by votes").rows
    assert votes[:2] == (("1", "–", "50.0"), ("2", "22.6", "25.0"))
    assert votes[-1] == ("128", "64.3", "75.0")
    own = tables.judgebench_table(run.results["judgebench"])
    assert own.rows == (("RL critic", "75.0", "50.0", "25.0", "75.0", "[20.0, 80.0]"),)
    assert f"{run.name}: {own.title}" in [table.title for table in combined.tables_of([run, run], {}, {})]


def test_without_the_papers_benchmarks_there_is_nothing_to_say(tmp_path):
    run = finished(tmp_path)
    run.results["datasets"]["tiny"] = run.results["datasets"].pop("codecontests")
    assert paper.tables([run]) == []


@pytest.fixture
def several(tmp_path):
    """Two seeds of one variant and one run of another, on disk."""
    for name, seed, turns in (
        ("grpo-seed0", 0, TURNS),
        ("grpo-seed1", 1, TURNS[1:] + TURNS[1:2]),
        ("rloo-seed0", 0, ZERO),
    ):
        folder = tmp_path / name
        run = finished(
            folder,
            f"seed={seed}",
            "data.eval_names=[codecontests]",
            critics={"none": row(ZERO), "rl": row(turns, [-1, -1, 1, 1])},
        )
        jsonl.write_text(folder / "config.yaml", dump(run.config))
        jsonl.write_text(folder / "report" / "results.json", json.dumps(run.results))
    return tmp_path


def test_several_runs_by_variant(several, capsys):
    names = [str(several / name) for name in ("grpo-seed0", "grpo-seed1", "rloo-seed0")]
    assert cli.main(["report", *names, "--out", str(several / "out"), "--title", "Ablation", "--json"]) == 0
    results = json.loads((several / "out" / "results.json").read_text())
    assert json.loads(capsys.readouterr().out) == results
    grpo = results["variants"]["grpo"]
    assert grpo["seeds"] == [0, 1]
    found = grpo["datasets"]["codecontests"]["critics"]["rl"]
    assert found["n_runs"] == 2
    assert found["turn_1_of_runs"] == [0.5, 0.5]
    assert found["pass_at_1_sd"][1] == 0.0
    assert results["variants"]["rloo"]["datasets"]["codecontests"]["critics"]["rl"]["pass_at_1"][1] == 0.25
    assert set(results["runs"]) == {"grpo, seed 0", "grpo, seed 1", "rloo, seed 0"}
    text = (several / "out" / "results.md").read_text()
    assert "| grpo | RL critic | 2 | 25.0 ± 0.0 | 50.0 ± 0.0 |" in text
    assert "| rloo | RL critic | 1 | 25.0 | 25.0 |" in text
    assert "Table 3" in text
    assert "Δ" not in (several / "out" / "results.tex").read_text().split("\\midrule")[1].split("\\bottomrule")[0]
    assert "<h1>Ablation</h1>" in (several / "out" / "index.html").read_text()
    assert (several / "out" / "variants-codecontests.png").exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["{0}/grpo-seed0", "{0}/grpo-seed1"], "--out: missing"),
        (["{0}/grpo-seed0", "{0}/grpo-seed0", "--out", "{0}/o"], "two runs are"),
        (["{0}/nowhere", "--out", "{0}/o"], "nowhere: is not a run directory"),
        (["{0}/grpo-seed0", "seed=3"], "overrides go with a configuration"),
        (["seed=3"], "'seed=3' is an override; name a configuration"),
        (["{1}", "--out", "{0}/o"], "one configuration at a time"),
        (["{0}/empty", "--out", "{0}/o"], "empty: has no report/results.json; run `ctrl-hpc report"),
        (["{0}/broken", "--out", "{0}/o"], "results.json: cannot be used (pass@1"),
    ],
)
def test_what_cannot_be_reported_is_one_line(several, arguments, told, capsys):
    (several / "empty").mkdir()
    config = (several / "grpo-seed0" / "config.yaml").read_text()
    (several / "empty" / "config.yaml").write_text(config)
    jsonl.write_text(several / "broken" / "config.yaml", config)
    results = json.loads((several / "grpo-seed0" / "report" / "results.json").read_text())
    results["datasets"]["codecontests"]["critics"]["rl"]["delta_up"] += 0.1
    jsonl.write_text(several / "broken" / "report" / "results.json", json.dumps(results))
    tiny = str(ROOT / "configs" / "tiny.yaml")
    assert cli.main(["report", *(argument.format(several, tiny) for argument in arguments)]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1


def test_variants_are_named_by_their_folders():
    names = {"grpo-seed0": "grpo", "grpo_seed_12": "grpo", "dr_grpo-s3": "dr_grpo", "tiny": "tiny", "qwen7b": "qwen7b"}
    assert {name: runs._SEED.sub("", name) for name in names} == names
    assert runs.focus(["none", "base", "base_greedy"]) == "base"
    assert runs.focus(["none", "exec_feedback"]) == "exec_feedback"
    assert runs.focus(["none"]) == "none"


def test_variants_are_compared_by_seed_and_problem():
    config = load(ROOT / "configs" / "tiny.yaml", ["eval.bootstrap=400"])
    one = {0: {"p": 1.0, "q": 0.0, "r": 1.0}, 1: {"p": 1.0, "q": 1.0, "r": 1.0}, 5: {"p": 0.0}}
    other = {0: {"p": 0.0, "q": 0.0, "r": 1.0}, 1: {"p": 1.0, "q": 0.5, "r": 1.0}}
    found = combined._paired(one, other, config)
    assert found["seeds"] == [0, 1]
    assert found["pass_at_1"] == pytest.approx((0.5 + 0.25 + 0.0) / 3)
    low, high = found["ci95"]
    assert 0.0 <= low < found["pass_at_1"] < high <= 0.5
    assert combined._paired({0: {"p": 1.0}}, {1: {"p": 1.0}}, config) is None
    made = tables.variant_differences_table("tiny", "rl", "grpo", {"rloo": found})
    assert made.rows[0][:3] == ("rloo − grpo", "2", "+25.0")
    assert made.columns[2:] == ("after 1 turn", "95 %", "after the last turn", "95 %") and made.rows[0][4] == "–"


def _history(name: str, *passed: bool) -> History:
    """A sample of problem ``name`` that passes or not as draft and after each turn."""
    draft, *verdicts = [Verdict(status="accepted" if one else "wrong_answer") for one in passed]
    problem = Problem(id=name, source="ours", split="test", prompt="", tests=())
    solution = Solution(id=f"{name}/0", problem_id=name, text="", program="1", verdict=draft)
    said = {"sample": solution.id, "parent": solution.id, "critique": "", "judgement": None, "kept": False, "text": ""}
    nodes = tuple(Node(**said, program="2", verdict=verdict) for verdict in verdicts)
    return History(problem=problem, draft=solution, nodes=nodes)


def test_variants_are_compared_after_the_last_turn_too():
    """Two problems, two turns: after one turn one of them is gained, after two both; what ends stays as it is."""
    config = load(ROOT / "configs" / "tiny.yaml", ["eval.bootstrap=400"])
    one = {0: [_history("p", False, True), _history("q", False, False, True)]}
    other = {0: [_history("p", False, False), _history("q", True, False, False)]}
    found = combined._compared(one, other, 2, config)
    assert found["pass_at_1"] == 0.5 and found["last"]["turn"] == 2
    assert found["last"]["pass_at_1"] == 1.0 and found["last"]["ci95"] == [1.0, 1.0]
    assert "last" not in combined._compared(one, other, 1, config)
    assert combined._compared(one, {1: other[0]}, 2, config) is None
    made = tables.variant_differences_table("tiny", "rl", "plain", {"turns": found})
    assert made.columns[4] == "after 2 turns"
    assert made.rows[0][:3] == ("turns − plain", "1", "+50.0") and made.rows[0][4:] == ("+100.0", "[+100.0, +100.0]")


def test_critiques_to_the_same_reward(tmp_path):
    """Reward rises from 0 to 1: nine tenths are the first five steps whose mean is 0.9."""
    slow = [0.0] * 5 + [0.25] * 5 + [1.0] * 5  # with four of 1 the mean is 0.85
    fast = [0.0] * 2 + [1.0] * 13
    assert runs.steps_to(slow, slow) == 15
    assert runs.steps_to(fast, slow) == 7
    assert runs.steps_to([0.5] * 15, slow) is None

    def told(variant, rewards, *overrides):
        curve = [{"step": step, "reward": reward} for step, reward in enumerate(rewards, 1)]
        run = finished(tmp_path, "rl.prompts_per_step=4", "rl.group_size=2", *overrides, learning_curve=curve)
        return replace(run, variant=variant)

    made = [told("plain", slow), told("fast", fast), told("flat", [0.5] * 15), told("turns", fast, "rl.turns=3")]
    found = runs.to_reward([*made, told("other_seed", fast, "seed=4")])
    reached = {"plain": {"0": 15 * 8}, "fast": {"0": 7 * 8}, "flat": {"0": None}}
    assert found == {"baseline": "plain", "variants": reached}
    assert tables.to_reward_table(found).rows[1:] == (("fast", "56"), ("flat", "not reached"))
    assert runs.to_reward(made[:1]) == {}
