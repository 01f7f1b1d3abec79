"""The overall judgement of a critique: hand-written cases, and properties over generated text."""

import tomllib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctrl_hpc.flow.text import parse_judgement

CASES = {
    "Overall judgment: Correct": "correct",
    "Overall judgment: Incorrect": "incorrect",
    "overall judgement: INCORRECT": "incorrect",
    "Overall judgment: Correct.": "correct",
    "Overall judgment: Incorrect. To be correct it must sort.": "incorrect",
    "Overall judgment: Incorrect because the loop ends early": "incorrect",
    "Overall judgment: Incorrect (see above)": "incorrect",
    "Overall judgment - Correct": "correct",
    "**Overall judgment:** Incorrect": "incorrect",
    "**Overall judgment**: **Correct**": "correct",
    "**Overall judgment: Correct**": "correct",
    "__Overall Judgment__: `Incorrect`.": "incorrect",
    "### Overall judgment\n\nIncorrect": "incorrect",
    "## Overall judgment:\n**Correct**\n": "correct",
    "3. Overall judgment: Correct": "correct",
    "- Overall judgment: [Incorrect]": "incorrect",
    "Analysis: fine.\r\nOverall judgment: Correct\r\n": "correct",
    "Overall judgment: Correct\nOverall judgment: Correct": "correct",
    "Overall judgment: (Correct/Incorrect)\nOverall judgment: Correct": "correct",
    # as critics write them
    "Correct": "correct",
    "The loop ends early.\n\n**Incorrect.**": "incorrect",
    "Incorrect\n\nThe loop ends early.": "incorrect",
    "✅ Correct": "correct",
    "❌ Incorrect": "incorrect",
    "Overall judgment: ✅ Correct": "correct",
    "Overall judgment: Incorrect ❌": "incorrect",
    "\\boxed{Correct}": "correct",
    "So the answer is $\\boxed{\\text{Incorrect}}$.": "incorrect",
    "Overall judgment: \\boxed{Incorrect}": "incorrect",
    "\\[\\boxed{\\textbf{Correct}}\\]": "correct",
    "Correct<|im_end|>": "correct",
    "Overall judgment: Incorrect<|eot_id|>": "incorrect",
    "Overall judgment: Correct</s>": "correct",
    "Overall judgment: Correct<|im_end|>\n<|im_start|>user\nOverall judgment: Incorrect": "correct",
    "Overall judgment：Incorrect。": "incorrect",
    "**Overall judgment：** **Incorrect**！": "incorrect",
    "Overall judgment: 「Correct」": "correct",
    "Overall judgment: 【Incorrect】": "incorrect",
    "Overall judgment: Incorrect، see above": "incorrect",
    "***Overall judgment: Correct***": "correct",
    "<b>Overall judgment:</b> <i>Incorrect</i>": "incorrect",
    "| Overall judgment | Incorrect |": "incorrect",
    "Overall judgment is: Correct": "correct",
    "Overall judgment: The program is incorrect.": "incorrect",
    "Final verdict: **Incorrect**": "incorrect",
    "<think> Overall judgment: Correct ... </think> Overall judgment: Incorrect": "incorrect",
    "Overall judgment: Correct? No.\n</think>\n\nOverall judgment: Incorrect": "incorrect",
    "[THINK]Correct[/THINK]\nIncorrect": "incorrect",
    # none, or several that disagree
    "<think>\nOverall judgment: Correct": None,
    "<think>Overall judgment: Correct</think>": None,
    "Correct\nIncorrect": None,
    "❌ Correct": None,
    "Overall judgment: ~~Correct~~ Incorrect": None,
    "Overall judgment: Correct？": None,
    "Overall judgment: the program is not correct": None,
    "\\boxed{Correct} \\boxed{Incorrect}": None,
    "```\nCorrect\n```": None,
    "> Correct": None,
    "": None,
    "This is correct.": None,
    "Overall judgment:": None,
    "Overall judgment: Correct\nOverall judgment: Incorrect": None,
    "Overall judgment: Correct. Overall judgment: Incorrect": None,
    "Overall judgment: Correct/Incorrect": None,
    "Overall judgment: {Correct|Incorrect}": None,
    "Overall judgment: Correct or Incorrect": None,
    "Overall judgment: Correct, or Incorrect": None,
    "Overall judgment: Correct (incorrect)": None,
    "Overall judgment: Not correct": None,
    "Overall judgment: Correct?": None,
    "Overall judgment: Correctness is good": None,
    "Overall judgment: partially correct": None,
    "My overall judgment: Correct": None,
    "The word overall judgment Correct": None,
    # inside code and quotations
    "```\nOverall judgment: Correct\n```": None,
    "```python\n# x\nOverall judgment: Correct": None,
    "~~~\nOverall judgment: Correct\n~~~\nOverall judgment: Incorrect": "incorrect",
    "    Overall judgment: Correct": None,
    "> Overall judgment: Correct": None,
    "# Overall judgment: Correct\n```\nx\n```": "correct",
}


@pytest.mark.parametrize("text", CASES)
def test_reads_the_judgement_line(text):
    assert parse_judgement(text) == CASES[text]


WORDINGS = tomllib.loads(Path(__file__).with_name("wordings.toml").read_text())["judgements"]


@pytest.mark.parametrize("text", WORDINGS)
def test_reads_the_judgement_in_other_words(text):
    assert (parse_judgement(text) or "") == WORDINGS[text]


PROSE = st.lists(
    st.text(alphabet=st.characters(exclude_characters="`~", exclude_categories=["Cs", "Cc"]), max_size=30).filter(
        lambda line: "overall" not in line.lower() and "correct" not in line.lower()
    ),
    max_size=4,
).map("\n".join)
SPELLING = st.sampled_from(["Overall judgment", "overall judgement", "OVERALL JUDGMENT", "Overall  judgment"])
VERDICT = st.sampled_from(["Correct", "Incorrect", "correct", "INCORRECT"])
WRAP = st.sampled_from(
    ["{label}: {verdict}", "**{label}:** {verdict}", "## {label}\n{verdict}", "- {label}: *{verdict}*."]
)


@settings(derandomize=True, max_examples=300)
@given(before=PROSE, after=PROSE, label=SPELLING, verdict=VERDICT, wrap=WRAP)
def test_prose_around_the_line_changes_nothing(before, after, label, verdict, wrap):
    line = wrap.format(label=label, verdict=verdict)
    assert parse_judgement(f"{before}\n{line}\n{after}") == verdict.lower()


@settings(derandomize=True, max_examples=100)
@given(before=PROSE, label=SPELLING, verdict=VERDICT, tag=st.sampled_from(["", "python", "text"]))
def test_code_never_judges(before, label, verdict, tag):
    assert parse_judgement(f"{before}\n```{tag}\n{label}: {verdict}\n```\n") is None


@settings(derandomize=True, max_examples=100)
@given(verdicts=st.lists(VERDICT, min_size=1, max_size=5), between=PROSE)
def test_several_must_agree(verdicts, between):
    text = f"\n{between}\n".join(f"Overall judgment: {verdict}" for verdict in verdicts)
    distinct = {verdict.lower() for verdict in verdicts}
    assert parse_judgement(text) == (distinct.pop() if len(distinct) == 1 else None)


@settings(derandomize=True, max_examples=200)
@given(
    text=st.text(max_size=200)
    | st.lists(st.sampled_from(["Overall judgment", ":", "Correct", "*", "\n", " "])).map("".join)
)
def test_any_text_has_an_answer(text):
    assert parse_judgement(text) in ("correct", "incorrect", None)


FENCES = st.sampled_from(["```", "````", "~~~"])


@settings(derandomize=True, max_examples=150)
@given(said=VERDICT, coded=VERDICT, marks=FENCES, closed=st.booleans(), first=st.booleans(), prose=PROSE)
def test_only_the_judgement_outside_code_counts(said, coded, marks, closed, first, prose):
    code = f"{marks}python\nprint(1)\nOverall judgment: {coded}\n" + (f"{marks}\n" if closed or first else "")
    line = f"Overall judgment: {said}\n"
    text = f"{prose}\n{code}{line}" if first else f"{prose}\n{line}{code}"
    assert parse_judgement(text) == said.lower()


@settings(derandomize=True, max_examples=100)
@given(verdict=VERDICT, marks=FENCES, prose=PROSE)
def test_a_judgement_after_a_fence_that_is_never_closed_is_inside_code(verdict, marks, prose):
    assert parse_judgement(f"{prose}\n{marks}python\nprint(1)\nOverall judgment: {verdict}") is None


@settings(derandomize=True, max_examples=100)
@given(first=VERDICT, second=VERDICT, label=SPELLING)
def test_a_judgement_and_a_quoted_one(first, second, label):
    assert parse_judgement(f"> {label}: {first}\n\n{label}: {second}") == second.lower()


THINK = st.sampled_from(
    [
        ("<think>\n", "\n</think>\n"),
        ("", "</think>\n\n"),
        ("<thinking>", "</thinking>\n"),
        ("◁think▷", "◁/think▷"),
        ("<|START_THINKING|>", "<|END_THINKING|>"),
        ("<seed:think>", "</seed:think>"),
        ("[THINK]", "[/THINK]\n"),
    ]
)
DRESS = st.sampled_from(
    [
        "{v}",
        "**{v}**",
        "{v}.",
        "\\boxed{{{v}}}",
        "$\\boxed{{\\text{{{v}}}}}$",
        "`{v}`",
        "__{v}__",
        "「{v}」",
        "{v}。",
        "*{v}*!",
        "Overall judgment: {v}",
        "**Overall judgment:** \\boxed{{{v}}}",
        "Overall judgment： {v}。",
        "### Overall judgment\n\n{v}",
        "<b>Overall judgment</b>: {v}",
        "- Overall judgment: **{v}**.",
        "| Overall judgment | {v} |",
        "Overall judgment: **_{v}_**",
        "Overall judgment → {v}",
        "The overall judgment is {v}.",
        "Overall judgment: \u2068{v}\u2069",
        "\ufeffOverall judgment:\u200b{v}…",
        "Final answer: {v}",
        "# {v}",
        "<verdict>{v}</verdict>",
        '{{"overall_judgment": "{v}"}}',
        "Step 4: Overall judgment: 〔{v}〕",
    ]
)
CONTROL = st.sampled_from(
    [
        "",
        "<|im_end|>",
        "</s>",
        "<|eot_id|>\n",
        " <|endoftext|>",
        "<｜end▁of▁sentence｜>",
        "<end_of_turn>",
        "<|user|>\nCorrect\n",
    ]
)


@settings(derandomize=True, max_examples=300)
@given(tags=THINK, thought=VERDICT, verdict=VERDICT, dress=DRESS, control=CONTROL, analysis=PROSE)
def test_any_wrapping_gives_the_judgement(tags, thought, verdict, dress, control, analysis):
    said = dress.format(v=verdict)
    text = f"{tags[0]}Overall judgment: {thought}{tags[1]}{analysis}\n{said}{control}"
    assert parse_judgement(text) == verdict.lower()


def test_stray_marks_behind_prose_hide_no_judgement() -> None:
    text = "Analysis: take the length; ok.```\nthe rest is right.\nSuggestions: none.\nOverall judgment: Correct"
    assert parse_judgement(text) == "correct"
    assert (
        parse_judgement(text.replace("ok.```", "like this: ```python").replace("the rest is right.", "x = 1")) is None
    )
