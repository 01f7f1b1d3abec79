"""The report of a toy run: results.json to its contract and recomputed from the raw records, page, plots, tables."""

import json
import re
import struct
from html.parser import HTMLParser

import pytest
import toy_world

from ctrl_hpc import jsonl
from ctrl_hpc.config import ROOT, load
from ctrl_hpc.evaluate.run import run
from ctrl_hpc.flow.prompts import Prompts
from ctrl_hpc.records import Verdict
from ctrl_hpc.report import page as report
from ctrl_hpc.report import plots, samples, tables

TURNS, COUNT = 3, 40
NAMES = ("none", "base", "sft", "rl", "exec_feedback")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """``(config, run_dir, results)`` of a toy run with stages' times and a learning curve."""
    folder = tmp_path_factory.mktemp("report")
    run_dir = folder / "run"
    places = (folder / "base", run_dir / "sft" / "hf", run_dir / "rl" / "hf")
    for place, skill in zip(places, (0.3, 0.6, 0.95), strict=True):
        toy_world.folder(place, skill)
    config = load(
        ROOT / "configs" / "tiny.yaml",
        [
            f"run_dir={run_dir}",
            "data.eval_names=[toy]",
            f"eval.critics=[{','.join(NAMES)}]",
            f"critic.model={folder / 'base'}",
            f"eval.turns={TURNS}",
            "eval.bootstrap=200",
            "eval.n_samples=2",
            "eval.report_samples=6",
            "wandb.mode=disabled",
        ],
    )
    problems = toy_world.problems(COUNT)
    jsonl.write(run_dir / "problems" / "eval-toy.jsonl", problems)
    run(config, run_dir, toy_world.Connections(), {"toy": problems}, Prompts.load("default"))
    (run_dir / "sft" / "done.json").write_text('{"stage": "sft", "wall_time_s": 12.5}')
    lines = [{"step": step, "rl/reward": step / 10, "rl/kl": 0.01 * step} for step in range(6)]
    (run_dir / "rl" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return config, run_dir, report.write(config, run_dir)


def statuses(run_dir, critic):
    """Acceptance by turn of every sample, and the first judgement, straight from the JSON of the files."""
    folder = run_dir / "eval" / "toy"
    drafts = [json.loads(line) for line in (folder / "drafts.jsonl").read_text().splitlines()]
    rows = {draft["id"]: [draft["verdict"]["status"] == "accepted"] for draft in drafts}
    judged = {}
    for turn in range(1, TURNS + 1):
        for row in rows.values():
            row.append(row[-1])
        for line in (folder / critic / f"turn_{turn}.jsonl").read_text().splitlines():
            node = json.loads(line)
            rows[node["sample"]][-1] = node["verdict"]["status"] == "accepted"
            if turn == 1:
                judged[node["sample"]] = node.get("judgement")
    return rows, judged


@pytest.mark.parametrize("critic", ["base", "base_greedy", "sft", "sft_greedy", "rl", "rl_greedy", "exec_feedback"])
def test_rows_recomputed_from_the_raw_records(finished, critic):
    _, run_dir, results = finished
    rows, judged = statuses(run_dir, critic)
    row = results["datasets"]["toy"]["critics"][critic]
    n = 2 * COUNT
    assert len(rows) == n
    assert row["pass_at_1"] == pytest.approx(
        [sum(item[turn] for item in rows.values()) / n for turn in range(TURNS + 1)]
    )
    assert row["delta_up"] == pytest.approx(sum(not item[0] and item[1] for item in rows.values()) / n)
    assert row["delta_down"] == pytest.approx(sum(item[0] and not item[1] for item in rows.values()) / n)
    right = sum((judged[name] == "correct") == item[0] for name, item in rows.items())
    assert row["judgement"]["accuracy"] == pytest.approx(right / n)
    easy = [item for name, item in rows.items() if int(name.split("/")[1]) % 2 == 0]
    level = row["by_difficulty"]["easy"]
    assert level["n_samples"] == COUNT
    assert level["pass_at_1"] == pytest.approx([sum(item[turn] for item in easy) / COUNT for turn in range(TURNS + 1)])
    for (low, high), share in zip(level["ci95"], level["pass_at_1"], strict=True):
        assert 0.0 <= low <= share <= high <= 1.0
    if row["similarity"] is not None:
        low, high = row["ci95"]["similarity"]
        assert low <= row["similarity"] <= high


def test_the_contract(finished):
    _, run_dir, results = finished
    assert json.loads((run_dir / "report" / "results.json").read_text()) == results
    assert results["wall_time_s"] == {"sft": 12.5}
    assert [(point["step"], point["reward"]) for point in results["learning_curve"]] == [
        (step + 1, step / 10) for step in range(6)
    ]
    toy = results["datasets"]["toy"]
    assert (toy["n_problems"], toy["n_samples"]) == (COUNT, 2)
    assert list(toy["critics"]) == [name + mode for name in NAMES for mode in ("", "_greedy")]
    for row in toy["critics"].values():
        assert len(row["pass_at_1"]) == TURNS + 1
        assert row["pass_at_1"][1] == pytest.approx(
            row["pass_at_1"][0] + row["delta_up"] - row["delta_down"], abs=1e-12
        )
        assert set(row["judgement"]) == {"accuracy", "f1_pass", "f1_fail", "f1_macro"}
        for low, high in row["ci95"].values():
            assert low <= high
        assert row["pass_at_k"]["1"] == pytest.approx(row["pass_at_1"])
    none = toy["critics"]["none"]
    assert none["pass_at_1"] == [none["pass_at_1"][0]] * (TURNS + 1)
    assert (none["delta_up"], none["delta_down"], none["judgement"]["accuracy"]) == (0.0, 0.0, None)
    exec_feedback = toy["critics"]["exec_feedback"]
    assert exec_feedback["judgement"]["accuracy"] == 1.0
    assert toy["critics"]["exec_feedback_greedy"] == exec_feedback
    assert toy["critics"]["rl"]["pass_at_1"][1] > toy["critics"]["sft"]["pass_at_1"][1]
    difference = toy["differences"]["rl - sft"]
    gap = toy["critics"]["rl"]["pass_at_1"][1] - toy["critics"]["sft"]["pass_at_1"][1]
    assert difference["pass_at_1"] == pytest.approx(gap)


def test_what_is_logged(finished):
    _, _, results = finished
    logged = report.metrics(results)
    critics = results["datasets"]["toy"]["critics"]
    assert logged["eval/toy/rl/pass_at_1"] == logged["eval/pass_at_1"] == critics["rl"]["pass_at_1"][1]
    assert logged["eval/toy/sft_greedy/delta_down"] == critics["sft_greedy"]["delta_down"]


class Page(HTMLParser):
    """Collects what a page refers to, its tags, and the text of its scripts."""

    def __init__(self):
        super().__init__()
        self.references, self.open, self.scripts, self.ids = [], [], [], set()

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.references += [values[name] for name in ("src", "srcset", "href") if name in values]
        self.ids.add(values.get("id"))
        if tag not in ("meta", "link", "img", "input", "source"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)


def test_the_page_needs_nothing_else(finished):
    _, run_dir, _ = finished
    text = (run_dir / "report" / "index.html").read_text()
    page = Page()
    page.feed(text)
    assert page.open == []
    assert all(reference.startswith("data:") for reference in page.references)
    assert "http://" not in text
    assert "https://" not in text
    assert str(run_dir) not in text  # no path of this machine
    assert {"dataset", "critic", "transition", "judgement", "difficulty", "words", "samples"} <= page.ids
    shown = json.loads(page.scripts[0])
    assert len(shown) == 6 * 7
    assert {"problem", "draft", "draft_verdict", "turns", "transition"} <= set(shown[0])
    assert {"critique", "judgement", "diff", "verdict", "kept"} <= set(shown[0]["turns"][0])
    used = set(re.findall(r'at\("(\w+)"\)', page.scripts[1]))
    assert used <= page.ids


def test_what_a_model_wrote_cannot_leave_its_place(finished):
    config, _, _ = finished
    history = next(iter(report.read_histories(config, finished[1], "toy")["rl"]))
    evil = toy_world.problems(1)[0]
    evil = type(evil)(id=evil.id, source="toy", split="test", prompt="</script><b>x</b>", tests=evil.tests)
    histories = {"toy": {"rl": [type(history)(problem=evil, draft=history.draft, nodes=history.nodes)]}}
    text = report.page("t", [], [], [], samples.rows(histories, 6), {})
    assert "</script><b>" not in text
    assert "\\u003c/script>\\u003cb>x" in text


def size_of(picture):
    """Width and height of a PNG in pixels, as its header says."""
    return struct.unpack(">II", picture.read_bytes()[16:24])


def test_plots_and_tables_are_there(finished):
    _, run_dir, _ = finished
    folder = run_dir / "report"
    pictures = sorted(path.name for path in folder.glob("*.png"))
    assert pictures == [
        "deltas-toy.png",
        "difficulty-toy.png",
        "error_compounding-toy.png",
        "learning_curve.png",
        "pass_at_1-toy.png",
        "pass_at_1_greedy-toy.png",
        "similarity-toy.png",
    ]
    for name in pictures:
        wide, narrow = (size_of(folder / place / name) for place in (".", "narrow"))
        assert narrow[0] < 0.75 * wide[0], name
        assert (folder / name).with_suffix(".svg").is_file()
    assert "| RL critic |" in (folder / "results.md").read_text()
    assert "RL critic &" in (folder / "results.tex").read_text()


def test_an_unfinished_evaluation_is_one_line(finished, tmp_path):
    config, _, _ = finished
    with pytest.raises(ValueError, match=r"holds no evaluation of toy; run `ctrl-hpc eval`"):
        report.write(config, tmp_path)


def test_a_sample_of_the_environments_fault_is_left_out(finished, tmp_path):
    config, run_dir, _ = finished
    histories = report.read_histories(config, run_dir, "toy")["exec_feedback"]
    first = histories[0]
    fault = type(first.draft)(
        id=first.draft.id,
        problem_id=first.draft.problem_id,
        text="",
        program="",
        verdict=Verdict(status="sandbox_error"),
    )
    from ctrl_hpc.report.results import outcomes

    order = {history.problem.id: index for index, history in enumerate(histories[::2])}
    broken = [type(first)(problem=first.problem, draft=fault, nodes=first.nodes), *histories[1:]]
    found, masked = outcomes(broken, TURNS, order)
    assert masked == 1
    assert len(found.problem_N) == 2 * COUNT - 1


def test_differences():
    assert samples.diff("a\nb\nc", "a\nx\nc") == [[" ", "a"], ["-", "b"], ["+", "x"], [" ", "c"]]
    assert samples.diff("a", "a") == []


def test_labels_are_pushed_apart_as_little_as_it_takes():
    assert plots.spread([0.1, 0.5], 0.1, 0.0, 1.0) == pytest.approx([0.1, 0.5])
    assert plots.spread([0.5, 0.5], 0.1, 0.0, 1.0) == pytest.approx([0.45, 0.55])
    assert plots.spread([0.98, 1.0], 0.1, 0.0, 1.0) == pytest.approx([0.9, 1.0])
    assert plots.spread([0.3, 0.44, 0.46], 0.1, 0.0, 1.0) == pytest.approx([0.3, 0.4, 0.5])


def test_bold_is_what_is_best_with_its_interval():
    bands = {  # critic: intervals of pass@1 after the turn, and of Δ↓
        "none": ((0.40, 0.44), (0.00, 0.00)),
        "sft": ((0.50, 0.58), (0.02, 0.04)),
        "rl": ((0.60, 0.70), (0.05, 0.08)),
        "oracle": ((0.90, 0.95), (0.00, 0.00)),
        "sft_greedy": ((0.55, 0.65), (0.01, 0.02)),
        "rl_greedy": ((0.60, 0.70), (0.03, 0.04)),
    }
    critics = {name: {"ci95": {"pass_at_1@1": turn, "delta_down": down}} for name, (turn, down) in bands.items()}
    # rl: apart from sft's; rl_greedy: not; Δ↓: lower is better, and none's ends where nobody's begins
    assert tables.best(critics, ["pass_at_1@1", "delta_down"]) == {(2, 1), (0, 2), (4, 2)}
    assert tables.best({"rl": critics["rl"]}, ["pass_at_1@1"]) == frozenset()


def test_ticks_have_as_many_decimals_as_their_values():
    assert [plots.PERCENT(value, 0) for value in (0.0, 0.025, 0.05, 0.125, 1.0)] == [
        "0%",
        "2.5%",
        "5%",
        "12.5%",
        "100%",
    ]


def test_tables_for_every_medium():
    table = tables.Table(title="t", columns=("a_b", "Δ↑"), rows=(("x", "5%"), ("y", "–")), strong=frozenset({(1, 1)}))
    assert tables.markdown(table) == "**t**\n\n| a_b | Δ↑ |\n| --- | ---: |\n| x | 5% |\n| y | **–** |\n"
    assert tables.latex(table) == (
        "% t\n\\begin{tabular}{lr}\n\\toprule\na\\_b & $\\Delta$$\\uparrow$ \\\\\n\\midrule\nx & 5\\% \\\\\n"
        "y & \\textbf{--} \\\\\n\\bottomrule\n\\end{tabular}\n"
    )
