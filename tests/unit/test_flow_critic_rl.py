"""Templates from a checkout of the released code: a folder of its shape, with texts of our own."""

import json
import shutil
from pathlib import Path

import pytest

from ctrl_hpc.cli import main
from ctrl_hpc.config import ROOT
from ctrl_hpc.data import mbpp
from ctrl_hpc.flow.critic_rl import LIVECODEBENCH, MBPPPLUS, PROMPTS, templates
from ctrl_hpc.flow.feedback import Hint
from ctrl_hpc.flow.prompts import Prompts
from ctrl_hpc.records import Problem, Solution

PROMPTER = '''
import os
ASK = "Judge it."
ASK_HINTED = """Judge it.
With care."""

def extract_critique_from_xml(text):
    start_tag = "<out>"
    end_tag = "</out>"
    return text

class CodeContestsPrompter:
    _ask = "Read and print."
    def get_gen_prompt(self, problem):
        return f"""{self._ask}

{problem}

END {{{{x}}}}"""
    def get_critique_prompt(self, problem, solution):
        return f"""{ASK}
P: {problem}
A: {solution}
{{Analysis}} {{% if %}}"""
    def get_critique_with_exec_prompt(self, problem, solution, eval_res):
        hint = str(eval_res)
        return f"{ASK_HINTED}\\nP: {problem}\\nA: {solution}\\nH: {hint}"
    def get_revised_prompt_mt(self, critique):
        return f"""{extract_critique_from_xml(critique).strip()}

Again."""

class EvalPlusPrompter(CodeContestsPrompter):
    _ask = "Write a function."
    def get_gen_prompt(self, problem):
        return f"{self._ask} {problem}"
    def get_critique_prompt(self, problem, solution):
        return f"""{ASK}
F: {problem}
A: {solution}"""
    def get_critique_with_exec_prompt(self, problem, solution, eval_res):
        hint = str(eval_res)
        return f"{ASK_HINTED}\\nF: {problem}\\nA: {solution}\\nH: {hint}"
    def get_revised_prompt_mt(self, critique):
        return f"""{extract_critique_from_xml(critique).strip()}

Again."""

class LiveCodeBenchPrompter:
    def get_critique_prompt(self, problem, solution):
        question, _ = self._extract_question(problem)
        return f"L: {question}\\nA: {solution}"
    def get_revised_prompt_mt(self, critique):
        critique = extract_critique_from_xml(critique).strip()
        return f"""{critique}

Again."""

raise SystemExit("never run")
'''
FORMATS = 'io_format = """Q: {question}\nfrom stdin\n\n"""\nfn_format = """Q: {question}\nS: {starter_code}\n\n"""\n'
SOLUTION = Solution(id="p/0", problem_id="p", text="Here:\n```python\nprint(1)\n```", program="print(1)")


def problem(source: str, prompt: str = "Sum <n> & {{ n }}.", starter: str | None = None) -> Problem:
    return Problem(id="p", source=source, split="test", prompt=prompt, tests=(), starter_code=starter)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    joined = 'def format_problem(prompt, test):\n    return f"{prompt.strip()} It passes:\\n\\n{test.strip()}"\n'
    for name, text in ((PROMPTS, PROMPTER), (LIVECODEBENCH, FORMATS), (MBPPPLUS, joined)):
        file = tmp_path / "critic-rl" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return tmp_path / "critic-rl"


@pytest.fixture
def prompts(checkout: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Prompts:
    folder = tmp_path / "made"
    assert main(["prompts", "import", str(checkout), str(folder)]) == 0
    assert "solution.j2, critique.j2, critique_hinted.j2, revision.j2" in capsys.readouterr().out
    return Prompts.load(str(folder))


def test_every_kind_of_problem_has_its_wording(prompts: Prompts, tmp_path: Path) -> None:
    streams, lcb = problem("codecontests"), problem("livecodebench")
    assert prompts.solution(streams)[-1].content == "Read and print.\n\nSum <n> & {{ n }}.\n\nEND {{x}}"
    assert prompts.solution(lcb)[-1].content == "Q: Sum <n> & {{ n }}.\nfrom stdin\n\n"
    started = problem("livecodebench", starter="class S:")
    assert prompts.solution(started)[-1].content == "Q: Sum <n> & {{ n }}.\nS: class S:\n\n"
    assert prompts.solution(problem("taco", starter="def f"))[-1].content == "Write a function. Sum <n> & {{ n }}."
    code = "```python\nprint(1)\n```"
    assert prompts.critique(streams, SOLUTION)[-1].content == (
        f"Judge it.\nP: Sum <n> & {{{{ n }}}}.\nA: {code}\n{{Analysis}} {{% if %}}"
    )
    assert prompts.critique(lcb, SOLUTION)[-1].content == f"L: Sum <n> & {{{{ n }}}}.\nA: {code}"
    hinted = prompts.hinted_critique(streams, SOLUTION, Hint(kind="failed", text="Three."))[-1].content
    assert hinted == f"Judge it.\nWith care.\nP: Sum <n> & {{{{ n }}}}.\nA: {SOLUTION.text}\nH: Three."
    row = {
        "task_id": 2,
        "prompt": "Add.",
        "code": "x",
        "test_imports": [],
        "test_list": ["assert f()"],
        "test": "assert f() == 1",
    }
    (tmp_path / "plus.jsonl").write_text(json.dumps(row))
    (plus,) = mbpp.load_plus(str(tmp_path / "plus.jsonl"), "test").items
    assert prompts.solution(plus)[-1].content == "Write a function. Add. It passes:\n\nassert f()"


@pytest.mark.parametrize(
    ("said", "put"),
    [("so\n", "so"), ("a <out>\n b\n</out> c", "b"), ("<out> open", "<out> open"), ("</out><out>", "")],
)
def test_the_critique_is_put_without_its_tags(prompts: Prompts, said: str, put: str) -> None:
    chat = prompts.revision(problem("codecontests"), SOLUTION, said)
    assert chat[-1].content == f"{put}\n\nAgain." and chat[1].content == SOLUTION.text


def test_what_is_not_a_checkout_is_told(checkout: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"prompt\.py: no such file; a checkout of critic-rl is needed: git clone "):
        templates(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("x")
    assert main(["prompts", "import", str(checkout), str(tmp_path / "mine")]) == 2
    file = checkout / PROMPTS
    file.write_text(PROMPTER.replace("{solution}", "{other}"))
    with pytest.raises(ValueError, match=r"prompt\.py:\d+: other is not known; allowed: problem, "):
        templates(checkout)
    file.write_text(PROMPTER.replace("class EvalPlus", "class Other"))
    with pytest.raises(ValueError, match=r"prompt\.py: EvalPlusPrompter: no such class"):
        templates(checkout)
    file.write_text("def (")
    with pytest.raises(ValueError, match=r"prompt\.py: not Python: "):
        templates(checkout)
    file.write_text(PROMPTER)
    shutil.rmtree(checkout / "scripts")
    with pytest.raises(ValueError, match=r"preprocess_lcb\.py: no such file|preprocess_mbppplus\.py: no such file"):
        templates(checkout)


def test_the_released_critics_dry_run_names_what_to_fetch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["run", str(ROOT / "configs" / "ctrl_32b_released.yaml"), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "`ctrl-hpc prompts import CHECKOUT prompts/critic-rl`" in out
    for model in ("Zhihui/CTRL-32B", "Qwen/Qwen2.5-Coder-32B-Instruct"):
        assert f"hf download {model} --local-dir {model}" in out
