"""The program in an answer: hand-written cases, and properties over generated text."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctrl_hpc.flow import text as fences
from ctrl_hpc.flow.text import NOT_PROGRAMS, extract_program

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
}


@pytest.mark.parametrize("name", CASES)
def test_extracts_the_last_complete_program(name):
    text, program = CASES[name]
    assert extract_program(text) == program


LINE = st.text(alphabet=st.characters(exclude_characters="`~\n\r", exclude_categories=["Cs"]), max_size=20)
PROSE = st.lists(LINE, max_size=4).map("\n".join)
PROGRAM = st.lists(LINE, min_size=1, max_size=6).map("\n".join).filter(str.strip)
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
