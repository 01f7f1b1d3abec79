"""Chats from templates: the content of every user turn is a Jinja2 file that can be replaced.

A folder holds four files, each with its own variables:

=====================  ========================================  =============================================
solution.j2            problem                                   asks the generator for a program
critique.j2            problem, draft, program                   asks the critic for a critique
critique_hinted.j2     problem, draft, program, hint             the same, with what the execution showed
revision.j2            problem, draft, program, critique         second turn: asks the generator to revise
=====================  ========================================  =============================================

``problem`` is the :class:`~ctrl_hpc.records.Problem` (``problem.prompt``, ``problem.starter_code``), ``draft`` the
generator's whole answer, ``program`` the code taken from it (None when it holds none), ``hint`` and ``critique`` texts.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Self

from jinja2 import Environment, StrictUndefined, Template, TemplateSyntaxError, meta

from ctrl_hpc.flow.feedback import Hint
from ctrl_hpc.flow.fences import answer, open_fence
from ctrl_hpc.flow.text import parse_judgement
from ctrl_hpc.jsonl import well_formed
from ctrl_hpc.records import Chat, Message, Problem, Solution

VARIABLES: dict[str, tuple[str, ...]] = {
    "solution": ("problem",),
    "critique": ("problem", "draft", "program"),
    "critique_hinted": ("problem", "draft", "program", "hint"),
    "revision": ("problem", "draft", "program", "critique"),
}
"""The templates of a folder and the variables each may use."""


def packaged() -> Path:
    """Folder of the templates that come with the package, in the run's copy of the code once that is imported from."""
    import ctrl_hpc.flow

    return Path(ctrl_hpc.flow.__path__[0]) / "templates"


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompts:
    """The four templates, and the system message that opens every chat (None: no such message)."""

    templates: dict[str, Template]
    system: str | None = None
    critique_prefix: str = ""
    """What every critique begins with: the critic's chats end with it, open."""
    critique_close: str = ""
    """What a critique without a judgement is continued after, by one of :func:`judgements`; empty: none is."""

    @classmethod
    def load(
        cls, folder: str, system: str | None = None, *, critique_prefix: str = "", critique_close: str = ""
    ) -> Self:
        """The templates of a packaged folder (``default``, ``tiny``) or of any other; the section ``prompts``'s keys.

        Raises ValueError with one line when the folder or a file is missing, does not parse, or uses a variable that
        it does not get.
        """
        place = packaged() / folder if "/" not in folder and (packaged() / folder).is_dir() else Path(folder)
        if not place.is_dir():
            names = ", ".join(sorted(path.parent.name for path in packaged().glob("*/critique.j2")))
            raise ValueError(f"prompts.folder: {folder!r} is no folder; allowed: {names}, or the path of a folder")
        return cls(
            templates={name: load_template(place / f"{name}.j2", VARIABLES[name]) for name in VARIABLES},
            system=system,
            critique_prefix=critique_prefix,
            critique_close=critique_close,
        )

    def solution(self, problem: Problem) -> Chat:
        """The generator's first turn: write a program."""
        return self._open(self._render("solution", problem=problem))

    def critique(self, problem: Problem, solution: Solution) -> Chat:
        """The critic's turn: judge a solution and say how to improve it."""
        return self._begun(self._render("critique", problem=problem, **_draft(solution)))

    def hinted_critique(self, problem: Problem, solution: Solution, hint: Hint) -> Chat:
        """The critic's turn with what the execution showed (stage I)."""
        return self._begun(self._render("critique_hinted", problem=problem, hint=hint.text, **_draft(solution)))

    def revision(self, problem: Problem, solution: Solution, critique_text: str) -> Chat:
        """The generator's second turn, after its draft: revise it in the light of a critique."""
        asked = self._render("revision", problem=problem, critique=critique_text, **_draft(solution))
        return (
            *self.solution(problem),
            Message(role="assistant", content=well_formed(solution.text)),
            Message(role="user", content=asked),
        )

    def _render(self, name: str, **variables: object) -> str:
        return well_formed(self.templates[name].render(**variables))

    def _begun(self, content: str) -> Chat:
        """The critic's chat, its answer begun."""
        prefix = Message(role="assistant", content=self.critique_prefix)
        return (*self._open(content), prefix) if self.critique_prefix else self._open(content)

    def _open(self, content: str) -> Chat:
        user = Message(role="user", content=content)
        return (user,) if self.system is None else (Message(role="system", content=self.system), user)


_LONGEST_FENCE = 4
"""Marks of a fence that is closed: a longer one would take the room of what follows it."""


def closing(words: str, critique: str = "") -> str:
    """What a critique without a judgement is continued after: ``critique_close``, as a paragraph of its own.

    A block of code that the critique ends within is closed before: what stands in code is no judgement.
    """
    fence = open_fence(answer(critique))
    return f"\n{fence}\n\n{words}" if 0 < len(fence) <= _LONGEST_FENCE else f"\n\n{words}"


def closings(words: str) -> tuple[str, ...]:
    """:func:`closing` of any critique: one that ends within a block of code, by its fence, or within none."""
    fences = [mark * n for mark in "`~" for n in range(3, _LONGEST_FENCE + 1)]
    return tuple(dict.fromkeys(closing(words, begun) for begun in ("", *(f"{fence}\n" for fence in fences))))


def judgements(words: str) -> tuple[str, ...]:
    """Both judgements as they follow ``critique_close``; none where what follows that is not the judgement's word."""
    blank = "" if words[-1:].isspace() else " "
    found = {f"{blank}{name.capitalize()}": name for name in ("correct", "incorrect")}
    return tuple(found) if all(parse_judgement(words + word) == name for word, name in found.items()) else ()


def _draft(solution: Solution) -> dict[str, object]:
    return {"draft": solution.text, "program": solution.program}


def load_template(path: str | Path, allowed: tuple[str, ...]) -> Template:
    """A template file that may use the variables ``allowed``.

    Raises ValueError with one line when it is missing, is not UTF-8, does not parse, or uses another variable.
    """
    path = Path(path)
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False)
    try:
        source = path.read_text(encoding="utf-8")
        unknown = sorted(meta.find_undeclared_variables(environment.parse(source)) - set(allowed))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such template; a folder of prompts holds {_files()}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8: {error.reason} at byte {error.start}") from None
    except TemplateSyntaxError as error:
        raise ValueError(f"{path}:{error.lineno}: {error.message}") from None
    if unknown:
        raise ValueError(f"{path}: unknown variable {unknown[0]!r}; allowed: {', '.join(allowed)}")
    return environment.from_string(source)


def _files() -> str:
    return ", ".join(f"{name}.j2" for name in VARIABLES)
