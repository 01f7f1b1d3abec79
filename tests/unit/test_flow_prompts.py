"""Chats from templates: their turns and variables, and the one-line errors of a folder that is not right."""

import shutil

import pytest
import random_qwen
from transformers import AutoTokenizer

from ctrl_hpc.config import ROOT
from ctrl_hpc.flow.feedback import Hint
from ctrl_hpc.flow.prompts import Prompts, closing, judgements, packaged
from ctrl_hpc.flow.text import parse_judgement
from ctrl_hpc.records import Problem, Solution
from ctrl_hpc.rollout.chat import chat_ids

PROBLEM = Problem(id="p", source="s", split="test", prompt="Print <n> & {{ n }}.", tests=())
SOLUTION = Solution(id="p/0", problem_id="p", text="Here:\n```python\nprint(1)\n```", program="print(1)")
HINT = Hint(kind="failed", text="THE HINT")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "solution.j2").write_text("S {{ problem.prompt }}")
    (tmp_path / "critique.j2").write_text("C {{ problem.prompt }} | {{ draft }} | {{ program }}")
    (tmp_path / "critique_hinted.j2").write_text("H {{ program }} | {{ hint }}")
    (tmp_path / "revision.j2").write_text("R {{ critique }}")
    return tmp_path


@pytest.mark.parametrize(
    "critique",
    [
        "It adds.",
        "It adds:\n```python\nprint(1)",
        "It adds:\n~~~~\nx = 1\n",
        "It adds:\n```python\nprint(1)\n```\nso it is",
        "> It adds:\n> ```\n> print(1)",
        "<think>\n```\n</think>It adds:\n    ```\n    x = 1",
    ],
)
def test_a_judgement_after_the_closing_words_is_outside_all_code(critique):
    for word in judgements("Overall judgment:"):
        closed = critique + closing("Overall judgment:", critique) + word
        assert parse_judgement(closed) == word.strip().lower()


def test_closing_words():
    assert closing("Overall judgment:") == closing("Overall judgment:", "No.") == "\n\nOverall judgment:"
    assert closing("So:", "See:\n```c\nint x") == "\n```\n\nSo:"
    assert closing("So:", "See:\n`````c\nint x") == "\n\nSo:"  # no room for a fence of any length
    assert judgements("Overall judgment:") == (" Correct", " Incorrect")
    assert judgements("All in all, as one line.\nOverall judgment: ") == ("Correct", "Incorrect")
    assert judgements("Say what you think of it in the form asked for.") == ()
    assert judgements("So") == ()


def turns(chat):
    return [(message.role, message.content) for message in chat]


def test_every_chat_from_a_folder_of_ones_own(folder):
    prompts = Prompts.load(str(folder))
    asked = "S Print <n> & {{ n }}."
    assert turns(prompts.solution(PROBLEM)) == [("user", asked)]
    assert turns(prompts.critique(PROBLEM, SOLUTION)) == [
        ("user", f"C Print <n> & {{{{ n }}}}. | {SOLUTION.text} | print(1)")
    ]
    assert turns(prompts.hinted_critique(PROBLEM, SOLUTION, HINT)) == [("user", "H print(1) | THE HINT")]
    assert turns(prompts.revision(PROBLEM, SOLUTION, "No.")) == [
        ("user", asked),
        ("assistant", SOLUTION.text),
        ("user", "R No."),
    ]


def test_the_system_message_opens_every_chat(folder):
    prompts = Prompts.load(str(folder), system="Be brief.")
    chats = [
        prompts.solution(PROBLEM),
        prompts.critique(PROBLEM, SOLUTION),
        prompts.hinted_critique(PROBLEM, SOLUTION, HINT),
        prompts.revision(PROBLEM, SOLUTION, "No."),
    ]
    assert [turns(chat)[0] for chat in chats] == [("system", "Be brief.")] * 4
    assert [len(chat) for chat in chats] == [2, 2, 2, 4]


@pytest.mark.parametrize("name", sorted(path.name for path in packaged().iterdir() if path.is_dir()))
def test_packaged_templates_carry_their_variables(name):
    prompts = Prompts.load(name)
    solution, critique = prompts.solution(PROBLEM)[-1].content, prompts.critique(PROBLEM, SOLUTION)[-1].content
    hinted = prompts.hinted_critique(PROBLEM, SOLUTION, HINT)[-1].content
    revision = prompts.revision(PROBLEM, SOLUTION, "THE CRITIQUE")[-1].content
    assert PROBLEM.prompt in solution
    for text in (critique, hinted):
        assert PROBLEM.prompt in text
        assert "print(1)" in text
    assert "THE HINT" in hinted
    assert "THE HINT" not in critique
    assert "THE CRITIQUE" in revision


def test_the_default_asks_for_the_papers_form_and_shows_the_starter_code():
    prompts = Prompts.load("default")
    critique = prompts.critique(PROBLEM, SOLUTION)[-1].content
    positions = [critique.index(part) for part in ("\nAnalysis:", "\nImprovement suggestions:", "\nOverall judgment:")]
    assert positions == sorted(positions)
    started = Problem(id="p", source="s", split="test", prompt="?", tests=(), starter_code="def f(x):")
    assert "```python\ndef f(x):\n```" in prompts.solution(started)[-1].content
    assert "starter" not in prompts.solution(PROBLEM)[-1].content


def test_a_folder_that_does_not_exist_names_the_choices():
    with pytest.raises(
        ValueError, match=r"prompts.folder: 'nowhere' is no folder; allowed: ctrl, default, .*path of a folder"
    ):
        Prompts.load("nowhere")


def test_a_missing_file_is_named(folder):
    (folder / "revision.j2").unlink()
    with pytest.raises(ValueError, match=r"revision\.j2: no such template"):
        Prompts.load(str(folder))


def test_an_unknown_variable_is_named_when_loading(folder):
    (folder / "critique.j2").write_text("{{ problem.prompt }} {{ hint }}")
    with pytest.raises(ValueError, match=r"critique\.j2: unknown variable 'hint'; allowed: problem, draft, program$"):
        Prompts.load(str(folder))


def test_a_syntax_error_names_file_and_line(folder):
    (folder / "critique.j2").write_text("fine\n{% if x %}")
    with pytest.raises(ValueError, match=r"critique\.j2:2: "):
        Prompts.load(str(folder))


def test_the_packaged_folder_can_be_copied_and_edited(tmp_path):
    copy = tmp_path / "mine"
    shutil.copytree(packaged() / "default", copy)
    (copy / "revision.j2").write_text("Again: {{ critique }}")
    assert Prompts.load(str(copy)).revision(PROBLEM, SOLUTION, "No.")[-1].content == "Again: No."


def test_the_tiny_critic_sees_an_answer_without_a_program_as_it_is():
    answer = Solution(id="p/0", problem_id=PROBLEM.id, text="I cannot.", program=None)
    asked = Prompts.load("tiny").critique(PROBLEM, answer)[-1].content
    assert asked == f"{PROBLEM.prompt}\n```python\nI cannot.\n```\nReview."


def test_ctrls_own_form_is_the_papers_and_its_judgement_is_read():
    prompts = Prompts.load("ctrl")
    asked = prompts.critique(PROBLEM, SOLUTION)[-1].content
    headings = ("\nAnalysis:", "\nImprovement suggestions:", "\nOverall judgment:")
    positions = [asked.index(part) for part in headings]
    assert positions == sorted(positions)
    assert SOLUTION.text in asked
    answer = "Analysis:\nIt prints 1.\n\nImprovement suggestions:\nPrint n.\n\nOverall judgment: Incorrect"
    assert parse_judgement(answer) == "incorrect"
    assert parse_judgement(asked) is None  # the form offers both verdicts
    assert prompts.revision(PROBLEM, SOLUTION, answer)[-1].content.startswith(answer)


@pytest.mark.parametrize("name", ["default", "tiny", "ctrl"])
def test_no_system_turn_is_added_unless_it_is_configured(name):
    for system, roles in ((None, {"user", "assistant"}), ("Be brief.", {"system", "user", "assistant"})):
        prompts = Prompts.load(name, system=system)
        chats = [
            prompts.solution(PROBLEM),
            prompts.critique(PROBLEM, SOLUTION),
            prompts.revision(PROBLEM, SOLUTION, "?"),
        ]
        chats.append(prompts.hinted_critique(PROBLEM, SOLUTION, HINT))
        assert {message.role for chat in chats for message in chat} == roles


def test_no_models_own_system_message_is_written_anywhere_in_the_package():
    sources = [
        *(ROOT / "ctrl_hpc").rglob("*.py"),
        *(ROOT / "ctrl_hpc").rglob("*.j2"),
        *(ROOT / "configs").rglob("*.yaml"),
    ]
    for path in sources:
        text = path.read_text(encoding="utf-8")
        assert "You are Qwen" not in text, path


def test_the_chat_template_is_the_tokenizers(tmp_path):
    """A tokenizer whose template has a system message of its own keeps it; a configured one takes its place."""
    template = (
        "{% if messages[0].role != 'system' %}[own]{% endif %}"
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    tokenizer = AutoTokenizer.from_pretrained(random_qwen.build(tmp_path))
    tokenizer.chat_template = template
    said = tokenizer.decode(chat_ids(tokenizer, Prompts.load("tiny").solution(PROBLEM)))
    assert said == f"[own][user]{PROBLEM.prompt}[assistant]"
    said = tokenizer.decode(chat_ids(tokenizer, Prompts.load("tiny", system="S").solution(PROBLEM)))
    assert said == f"[system]S[user]{PROBLEM.prompt}[assistant]"
