"""The wording of critic-rl (the paper's released code), read from a user's own checkout into a folder of templates.

The released critic was trained on exact prompts. They stand as Python f-strings in the checkout; its code is parsed,
never run: constants are taken as they are, and what stands in braces is told by the names in it.

==============================  =====================================================================================
``ctrl/gen/prompt.py``          classes whose methods return the prompts of problems on streams, of functions with
                                assertions, and of LiveCodeBench
``scripts/data/preprocess_*``   what the problem's text becomes before it is put there (LiveCodeBench, MBPP+)
==============================  =====================================================================================
"""

from __future__ import annotations

import ast
import string
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

PROMPTS = "ctrl/gen/prompt.py"
LIVECODEBENCH = "scripts/data/preprocess_lcb.py"
MBPPPLUS = "scripts/data/preprocess_mbppplus.py"
TEST_FOLLOWS = "\n\nYour code should pass this test:\n\n"
"""What stands between statement and test in a problem of MBPP+ here."""

_IS_LIVECODEBENCH = 'problem.source == "livecodebench"'
_IS_FUNCTION = 'problem.source in ("mbppplus", "mbpp", "humaneval") or problem.starter_code'
_ANSWER = {
    "critique": '{% set answer = "```python\\n" ~ program ~ "\\n```" if program else draft %}\n',
    "critique_hinted": "{% set answer = draft %}\n",
}
"""What the critic is shown of a draft: its program, or with a hint the whole of it."""
_METHODS = {
    "solution": "get_gen_prompt",
    "critique": "get_critique_prompt",
    "critique_hinted": "get_critique_with_exec_prompt",
    "revision": "get_revised_prompt_mt",
}
"""The method that makes each template."""
_CLASSES = {
    "streams": "CodeContestsPrompter",
    "functions": "EvalPlusPrompter",
    "livecodebench": "LiveCodeBenchPrompter",
}
"""The class of each kind of problem."""
_NAMES = {
    "problem": "{{ question }}",
    "question": "{{ question }}",
    "starter_code": "{{ problem.starter_code }}",
    "solution": "{{ answer }}",
    "critique": "{{ said }}",
    "hint": "{{ hint }}",
}
"""What a name in braces becomes."""


def templates(checkout: str | Path) -> dict[str, str]:
    """File name and content of every template of the folder; raises ValueError that names what was not found."""
    root = Path(checkout)
    code = _Module(root, PROMPTS)
    out = {}
    for name, method in _METHODS.items():
        bodies = {kind: code.prompt(of, method) for kind, of in _CLASSES.items() if kind != "livecodebench"}
        if name == "solution":
            bodies["livecodebench"] = _livecodebench(_Module(root, LIVECODEBENCH))
        elif name != "critique_hinted":  # of LiveCodeBench's problems there is none
            bodies["livecodebench"] = code.prompt(_CLASSES["livecodebench"], method)
        head = _said(code) if name == "revision" else _question(_Module(root, MBPPPLUS))
        out[f"{name}.j2"] = head + _ANSWER.get(name, "") + _branches(bodies)
    return out


def _branches(bodies: Mapping[str, str]) -> str:
    """One body where all are the same, else by the kind of problem."""
    if len(set(bodies.values())) == 1:
        return next(iter(bodies.values()))
    first = f"{{% if {_IS_LIVECODEBENCH} %}}\n{bodies['livecodebench']}{{%+ el" if "livecodebench" in bodies else "{% "
    return f"{first}if {_IS_FUNCTION} %}}\n{bodies['functions']}{{%+ else %}}\n{bodies['streams']}{{%+ endif %}}"


def _question(code: _Module) -> str:
    """The problem's text as the released code puts it: MBPP+'s test follows by words of its own."""
    pieces = code.pieces(code.returned(code.function("format_problem")))
    words = [piece for piece in pieces if isinstance(piece, str)]
    if len(words) != 1 or len(pieces) != 3:
        raise ValueError(f"{code.path}: format_problem: expected a statement, words and a test")
    ours, theirs = ast.unparse(ast.Constant(TEST_FOLLOWS)), ast.unparse(ast.Constant(words[0]))
    return (
        "{% set question = problem.prompt %}\n"
        '{% if problem.source == "mbppplus" %}\n'
        f"{{% set question = problem.prompt.replace({ours}, {theirs}) %}}\n"
        "{% endif %}\n"
    )


def _livecodebench(code: _Module) -> str:
    """The two formats of LiveCodeBench: with starter code, and without."""

    def body(key: str) -> str:
        out = []
        for literal, name, _, _ in string.Formatter().parse(code.constant(key)):
            if name is not None and name not in ("question", "starter_code"):
                raise ValueError(f"{code.path}: {key}: {{{name}}} is not known; allowed: question, starter_code")
            out.append(_escaped(literal) + ("" if name is None else _NAMES[name]))
        return "".join(out)

    return f"{{% if problem.starter_code %}}\n{body('fn_format')}{{%+ else %}}\n{body('io_format')}{{%+ endif %}}"


def _said(code: _Module) -> str:
    """The critique as it is put: what stands between two tags where it has both, the whole of it else."""
    function = code.function("extract_critique_from_xml")
    named = dict(_constants(function.body))
    if not {"start_tag", "end_tag"} <= named.keys():
        raise ValueError(f"{code.path}: extract_critique_from_xml: expected start_tag and end_tag")
    opens, closes = (ast.unparse(ast.Constant(named[key])) for key in ("start_tag", "end_tag"))
    return (
        f"{{% set begins, ends = critique.find({opens}), critique.find({closes}) %}}\n"
        "{% set said = critique.strip() %}\n"
        "{% if begins >= 0 and ends >= 0 %}\n"
        f"{{% set said = critique[begins + {len(named['start_tag'])}:ends].strip() %}}\n"
        "{% endif %}\n"
    )


def _escaped(text: str) -> str:
    """Text as Jinja2 gives it back."""
    for mark in ("{{", "{%", "{#", "}}", "%}", "#}"):
        if mark in text:
            return "".join(f"{{{{ {ast.unparse(ast.Constant(part))} }}}}" for part in text.splitlines(keepends=True))
    return text


@dataclass(frozen=True, slots=True)
class _Module:
    """A file of the checkout, parsed."""

    root: Path
    name: str

    @property
    def path(self) -> Path:
        return self.root / self.name

    def tree(self) -> ast.Module:
        """Raises ValueError where the file is missing or no Python."""
        try:
            return ast.parse(self.path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ValueError(
                f"{self.path}: no such file; a checkout of critic-rl is needed: "
                "git clone https://github.com/HKUNLP/critic-rl"
            ) from None
        except (SyntaxError, UnicodeDecodeError) as error:
            raise ValueError(f"{self.path}: not Python: {error}") from None

    def function(self, name: str, within: str | None = None) -> ast.FunctionDef:
        body: list[ast.stmt] = self.tree().body if within is None else self._class(within).body
        for node in body:
            if isinstance(node, ast.FunctionDef) and node.name == name:
                return node
        raise ValueError(f"{self.path}: {name if within is None else f'{within}.{name}'}: not found")

    def constant(self, name: str) -> str:
        found = dict(_constants(self.tree().body))
        if name not in found:
            raise ValueError(f"{self.path}: {name}: no such text")
        return found[name]

    def _class(self, name: str) -> ast.ClassDef:
        for node in self.tree().body:
            if isinstance(node, ast.ClassDef) and node.name == name:
                return node
        raise ValueError(f"{self.path}: {name}: no such class")

    def returned(self, function: ast.FunctionDef) -> ast.expr:
        returns = [node for node in ast.walk(function) if isinstance(node, ast.Return) and node.value is not None]
        if len(returns) != 1:
            raise ValueError(f"{self.path}:{function.lineno}: {function.name}: expected one text that is returned")
        assert returns[0].value is not None
        return returns[0].value

    def pieces(self, value: ast.expr) -> list[str | ast.expr]:
        """An f-string's texts and what stands in braces between them."""
        parts = value.values if isinstance(value, ast.JoinedStr) else [value]
        out: list[str | ast.expr] = []
        for part in parts:
            if isinstance(part, ast.Constant) and isinstance(part.value, str):
                out.append(part.value)
            else:
                out.append(part.value if isinstance(part, ast.FormattedValue) else part)
        return out

    def prompt(self, within: str, method: str) -> str:
        """The body of a template: what a method of a class returns."""
        constants = dict(_constants(self.tree().body))
        own = dict(_constants(self._class(within).body))
        out = []
        for piece in self.pieces(self.returned(self.function(method, within))):
            if isinstance(piece, str):
                out.append(_escaped(piece))
            elif isinstance(piece, ast.Attribute) and piece.attr in own:
                out.append(_escaped(own[piece.attr]))
            elif isinstance(piece, ast.Name) and piece.id in constants:
                out.append(_escaped(constants[piece.id]))
            else:
                out.append(self._variable(piece))
        return "".join(out)

    def _variable(self, piece: ast.expr) -> str:
        """What stands in braces, by the one name in it that is known."""
        found = {node.id for node in ast.walk(piece) if isinstance(node, ast.Name)} & _NAMES.keys()
        if len(found) != 1:
            known = ", ".join(_NAMES)
            raise ValueError(f"{self.path}:{piece.lineno}: {ast.unparse(piece)} is not known; allowed: {known}")
        return _NAMES[found.pop()]


def _constants(body: list[ast.stmt]) -> Iterator[tuple[str, str]]:
    for node in body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            for target in node.targets:
                if isinstance(target, ast.Name):
                    yield target.id, node.value.value
