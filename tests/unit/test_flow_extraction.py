"""The program in an answer: hand-written cases, and properties over generated text."""

import ast
import tomllib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctrl_hpc.flow import fences
from ctrl_hpc.flow.fences import NOT_PROGRAMS
from ctrl_hpc.flow.text import asked_for, extract_program
from ctrl_hpc.jsonl import well_formed
from ctrl_hpc.records import AssertTest, FunctionTest, Problem, StdinTest

CASES = {
    "one block": ("Sure.\n```python\nprint(1)\n```\nDone.", "print(1)"),
    "last of two": ("```python\na\n```\nBetter:\n```python\nb\n```", "b"),
    "tag in capitals": ("```Python3\nx = 1\n```", "x = 1"),
    "another language": ("```c++\nint main() {}\n```", "int main() {}"),
    "untagged": ("```\nprint(1)\n```", "print(1)"),
    "sample output after the program": ("```python\nprint(4)\n```\nOutput:\n```\n4\n```", "print(4)"),
    "tagged output after an untagged program": ("```\nprint(4)\n```\n```text\n4\n```", "print(4)"),
    "tildes": ("~~~python\nprint(1)\n~~~", "print(1)"),
    "backticks inside tildes": ("~~~python\ns = '''\n```\n'''\n~~~", "s = '''\n```\n'''"),
    "longer fence holds a shorter one": ("````python\ns = '''\n```\n'''\n````", "s = '''\n```\n'''"),
    "open block after a complete one": ("```python\na\n```\n```python\nb = ", "a"),
    "only an open block": ("```python\nprint(1)\nprint(2)", "print(1)\nprint(2)"),
    "unclosed before a closed one": ("```python\na = 1\n\nNow:\n```python\nb = 2\n```", "b = 2"),
    "fence in an indented docstring": (
        '```python\ndef f():\n    """\n    ```python\n    f()\n    ```\n    """\n    return 1\n```',
        'def f():\n    """\n    ```python\n    f()\n    ```\n    """\n    return 1',
    ),
    "indented in a list": ("1. Code:\n   ```python\n   if x:\n       y()\n   ```", "if x:\n    y()"),
    "Windows line ends": ("```python\r\na\r\nb\r\n```\r\n", "a\nb"),
    "blank block ignored": ("```python\na\n```\n```python\n\n```", "a"),
    "indentation kept": ("```python\n    def f(): pass\n```", "    def f(): pass"),
    "attributes": ("```{.python .numberLines}\na\n```", "a"),
    "inline span is no fence": ("Use ```x``` here.\n```python\na\n```", "a"),
    "span at the line's start": ("```x``` is a name.\nNo code.", None),
    "no fence": ("print(1)", None),
    "shell only": ("```bash\npip install x\n```", None),
    "empty": ("", None),
    # fences as models write them
    "an opening behind text": ("The program: ```python\nprint(1)\n```\nDone.", "print(1)"),
    "an opening behind a list's text": ("1. Code: ```python\n   print(1)\n   ```", "print(1)"),
    "a closing behind the code": ("```python\nprint(1)```\nDone.", "print(1)"),
    "a closing behind the code, then output": ("```python\nprint(1)```\nOutput:\n```\n1\n```", "print(1)"),
    "all on one line": ("Answer: ```python print(input())```, as asked.", "print(input())"),
    "code behind the tag": ("```python print(1)\nprint(2)\n```", "print(1)\nprint(2)"),
    "words behind the closing": ("```python\nprint(1)\n```Done.\nmore", "print(1)"),
    "a sentence behind the closing": ("```python\nprint(1)\n``` That is all.\nmore", "print(1)"),
    "words behind the tag": ("```Python code\nprint(1)\n```", "print(1)"),
    "a span in a docstring at the line's end": (
        '```python\ndef f():\n    """Example: ```\n    f()\n    ```\n    """\n    return 1\n```',
        'def f():\n    """Example: ```\n    f()\n    ```\n    """\n    return 1',
    ),
    "a control token behind the fence": ("```python\nprint(1)\n```<|im_end|>", "print(1)"),
    "a control token behind glued code": ("```python\nprint(1)```<|eot_id|>", "print(1)"),
    "a control token in an open block": ("```python\nprint(1)<|im_end|>", "print(1)"),
    "an end of sentence": ("```python\nprint(1)\n```\n</s>", "print(1)"),
    "a further turn": ("```python\na\n```<|im_end|>\n<|im_start|>user\n```python\nb\n```", "a"),
    "answer tags": ("<answer>```python\nprint(1)\n```</answer>", "print(1)"),
    # which block
    "usage": ("```python\ndef add(a): ...\n```\nExample usage:\n```python\nprint(4)\n```", "def add(a): ..."),
    "a call of what is defined": ("```python\ndef f(a): ...\n```\nThen\n```python\nprint(f(1))\n```", "def f(a): ..."),
    "another language after": ("```python\nprint(4)\n```\nIn C++:\n```cpp\nint main(){}\n```", "print(4)"),
    "another language after untagged": ("```\nprint(4)\n```\nIn C++:\n```cpp\nint main(){}\n```", "print(4)"),
    "a session after": ("```python\nprint(4)\n```\n```pycon\n>>> 4\n```", "print(4)"),
    "a session tagged Python": ("```python\nprint(1)\n```\n```python\n>>> print(1)\n1\n```", "print(1)"),
    "data after": ("```python\nprint(4)\n```\n```json5\n{}\n```\n```example\n4\n```", "print(4)"),
    "untagged output after an untagged program": ("```\nprint(4)\n```\nOutput:\n\n```\n4\n```", "print(4)"),
    # thoughts
    "a program in a thought": ("<think>\n```python\na\n```\n</think>\n```python\nb\n```", "b"),
    "only in a thought": ("<think>\n```python\na\n```\n</think>\nNo code.", None),
    "a thought cut off": ("<think>\n```python\na\n```", None),
    "a thought that the template began": ("Hm. ```python\na\n</think>\n```python\nb\n```", "b"),
    "tags in the program's strings": ("```python\nprint('<think>', '</think>')\n```", "print('<think>', '</think>')"),
    "a tag on a line of the program": ("```python\ns = '''\n<think>\n'''\n```", "s = '''\n<think>\n'''"),
    "an analysis channel": (
        "<|channel|>analysis<|message|>```python\na\n```<|end|><|start|>assistant<|channel|>final<|message|>"
        "```python\nb\n```<|return|>",
        "b",
    ),
    "an analysis cut off": ("<|channel|>analysis<|message|>```python\na\n```", None),
}


@pytest.mark.parametrize("name", CASES)
def test_extracts_the_last_complete_program(name):
    text, program = CASES[name]
    assert extract_program(text) == program


GIVEN = tomllib.loads(Path(__file__).with_name("wordings.toml").read_text())
WORDINGS = GIVEN["programs"]


@pytest.mark.parametrize("text", WORDINGS)
def test_extracts_the_program_of_any_dress(text):
    assert (extract_program(text) or "") == WORDINGS[text]


@pytest.mark.parametrize("case", GIVEN["asked"], ids=lambda case: case["text"][:60])
def test_extracts_what_is_asked_for(case):
    assert extract_program(case["text"], set(case["names"])) == case["program"]


LINE = st.text(alphabet=st.characters(exclude_characters="`~\n\r", exclude_categories=["Cs"]), max_size=20)
PROSE = st.lists(LINE, max_size=4).map("\n".join)


def does_something(text):
    """Whether a text is not Python that consists of values and comments alone."""
    parsed = fences.parsed(text)
    if parsed is None:
        return bool(text.strip())
    return any(not isinstance(node, (ast.Expr, ast.Pass, ast.Assert)) for node in parsed.body)


PROGRAM = st.lists(LINE, min_size=1, max_size=6).map("\n".join).filter(does_something)
TAG = st.sampled_from(["python", "py", "Python", "python3", "cpp", "C#", "java", "rust", "js"])
MARKS = st.sampled_from(["```", "````", "~~~", "~~~~~"])


@settings(derandomize=True, max_examples=200)
@given(before=PROSE, program=PROGRAM, after=PROSE, tag=TAG, marks=MARKS)
def test_a_tagged_block_comes_back_unchanged(before, program, after, tag, marks):
    assert extract_program(f"{before}\n{marks}{tag}\n{program}\n{marks}\n{after}") == program


@settings(derandomize=True, max_examples=100)
@given(programs=st.lists(PROGRAM, min_size=1, max_size=4), tag=TAG, marks=MARKS, prose=PROSE)
def test_the_last_of_several_wins(programs, tag, marks, prose):
    text = "\n".join(f"{prose}\n{marks}{tag}\n{program}\n{marks}" for program in programs)
    assert extract_program(text) == programs[-1]


@settings(derandomize=True, max_examples=100)
@given(program=PROGRAM, cut=PROGRAM, tag=TAG, marks=MARKS)
def test_a_cut_off_block_does_not_replace_a_complete_one(program, cut, tag, marks):
    assert extract_program(f"{marks}{tag}\n{program}\n{marks}\n{marks}{tag}\n{cut}") == program


@settings(derandomize=True, max_examples=100)
@given(program=PROGRAM, output=PROGRAM, tag=TAG, other=st.sampled_from(sorted(NOT_PROGRAMS)))
def test_blocks_of_output_never_count(program, output, tag, other):
    text = f"```{tag}\n{program}\n```\n```{other}\n{output}\n```\n```\n{output}\n```"
    assert extract_program(text) == program


MARKDOWN = st.lists(
    st.sampled_from(["```", "```python", "````", "~~~", "  ```", "\t```", "```a`b", "x", "", "    y", "```py extra"]),
    max_size=12,
).map("\n".join)


@settings(derandomize=True, max_examples=300)
@given(text=MARKDOWN | st.text(max_size=60))
def test_any_text_is_split_without_losing_a_line(text):
    blocks, outside = fences.split(text)
    lines = text.replace("\r\n", "\n").split("\n")
    inside = [line for block in blocks for line in block.content.split("\n") if line.strip()]
    assert {line.strip() for line in inside + outside} <= {line.strip() for line in lines}
    plain = [line.strip() for line in lines if line.strip() and "```" not in line and "~~~" not in line]
    kept = [line.strip() for line in inside + outside if line.strip() and "```" not in line and "~~~" not in line]
    assert sorted(plain) == sorted(kept)
    program = extract_program(text)
    assert program is None or program.strip()


@settings(derandomize=True, max_examples=150)
@given(before=PROSE, program=PROGRAM, tag=TAG, marks=MARKS)
def test_a_block_that_is_never_closed_counts_when_it_is_the_only_one(before, program, tag, marks):
    assert extract_program(f"{before}\n{marks}{tag}\n{program}") == program


@settings(derandomize=True, max_examples=150)
@given(first=PROGRAM, second=PROGRAM, tag=TAG, prose=PROSE)
def test_a_forgotten_closing_fence_does_not_swallow_the_next_block(first, second, tag, prose):
    text = f"```{tag}\n{first}\n```{tag}\n{second}\n```\n{prose}"
    assert extract_program(text) == second


@settings(derandomize=True, max_examples=150)
@given(program=PROGRAM, tag=TAG)
def test_a_longer_fence_may_hold_a_shorter_one(program, tag):
    inner = f"```text\nx\n```\n{program}"
    assert extract_program(f"````{tag}\n{inner}\n````") == inner


DEFINITION = "def asked(x):\n    return x"
OTHERS = st.sampled_from(
    ["print(asked(1))", "def helper():\n    return 2", "asked(3) == 3", "import sys\nprint(sys.argv)", "x = asked", "@"]
)


@settings(derandomize=True, max_examples=200)
@given(before=st.lists(OTHERS, max_size=3), after=st.lists(OTHERS, max_size=3), prose=PROSE, closed=st.booleans())
def test_the_block_that_defines_what_is_asked_for_wins(before, after, prose, closed):
    blocks = [f"{prose}\n```python\n{code}\n```" for code in [*before, DEFINITION, *after]]
    text = "\n".join(blocks) if closed else "\n".join(blocks).removesuffix("\n```")
    assert extract_program(text, {"asked"}) == DEFINITION


@settings(derandomize=True, max_examples=100)
@given(first=OTHERS, name=st.sampled_from(["Solution", "asked"]))
def test_of_two_definitions_the_last_wins(first, name):
    code = "class Solution:\n    def asked(self): ..."
    blocks = [code, first, f"{code} # better", first]
    text = "\n".join(f"```python\n{block}\n```" for block in blocks)
    assert extract_program(text, {name}) == f"{code} # better"


THINK = st.sampled_from(
    [
        ("<think>", "</think>"),
        ("<Think>\n", "\n</Think>"),
        ("<thinking>", "</thinking>"),
        ("◁think▷", "◁/think▷"),
        ("<|START_THINKING|>", "<|END_THINKING|>"),
        ("<seed:think>", "</seed:think>"),
        ("[THINK]", "[/THINK]"),
        ("", "</think>"),
    ]
)
CONTROL = st.sampled_from(
    [
        "",
        "<|im_end|>",
        "</s>",
        "<|eot_id|>",
        "<|endoftext|>",
        " <|im_end|>\n",
        "<｜end▁of▁sentence｜>",
        "<end_of_turn>",
        "<|user|>\nno",
        "<|return|>",
    ]
)
GLUE = st.sampled_from(
    ["{p}```python\n{c}\n```", "{p}\n```python\n{c}```", "{p}\n```py\n{c}\n``` and so on.", "{p} ```python\n{c}```"]
)


@settings(derandomize=True, max_examples=300)
@given(tags=THINK, thought=PROSE, wrong=PROGRAM, prose=LINE, glue=GLUE, control=CONTROL, number=st.integers(0, 99))
def test_any_wrapping_gives_the_program(tags, thought, wrong, prose, glue, control, number):
    code = f"n = {number}\nprint(n)"
    text = f"{tags[0]}{thought}\n```python\n{wrong}\n{tags[1]}\n" + glue.format(p=prose, c=code) + control
    assert extract_program(text) == code


@settings(derandomize=True, max_examples=200)
@given(tags=THINK, thought=PROSE, wrong=PROGRAM, prose=PROSE, ends=st.booleans())
def test_nothing_is_taken_from_a_thought(tags, thought, wrong, prose, ends):
    opening = tags[0] if ends else tags[0] or "<think>"
    text = f"{opening}{thought}\n```python\n{wrong}\n```\n" + (f"{tags[1]}\n{prose}" if ends else "")
    assert extract_program(text) is None


def test_what_a_problem_asks_for():
    def problem(*tests, **more):
        return Problem(id="p", source="s", split="test", prompt="", tests=tests, **more)

    assert asked_for(problem(StdinTest(stdin="", expected_stdout="1"))) == set()
    assert asked_for(problem(FunctionTest(name="f", args=(), expected=1))) == {"f"}
    code = "import math\ndef check(c):\n    assert math.isclose(c(1), max(2, 3))\ncheck(triple)"
    assert asked_for(problem(AssertTest(code=code))) == {"triple"}
    solution = "def triple(x):\n    return 3 * half(x)\ndef half(x): ..."
    assert asked_for(problem(AssertTest(code=code), canonical_solution=solution)) == {"triple"}
    assert asked_for(problem(AssertTest(code="def ("))) == set()


@pytest.mark.parametrize("text", ["\ud83d\ude00 \ud83d", "\udfff", "a\ud800b"])
def test_text_that_cannot_be_encoded_is_made_well_formed(text):
    assert "\ufffd" in well_formed(text)
    assert well_formed(text).encode()
    assert well_formed("\ud83d\ude00") == "😀"
    assert extract_program(f"```python\nprint({text!r})\n```") == f"print({text!r})"
    assert extract_program(f"```python\nprint('{text}')\n```") == f"print('{text}')"
