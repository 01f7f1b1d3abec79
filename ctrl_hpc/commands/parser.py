"""The command line's manners: errors in one line with what was perhaps meant, ``help``, shell completion."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import ctrl_hpc

_SHELLS = ("bash", "zsh", "fish")
"""Shells that ``ctrl-hpc completion`` writes for."""
EXAMPLES = {"": "tiny, humaneval", "suite": "tiny_ablation, paper", "sweep": "learning_rate"}
_CHOICE = re.compile(
    r"argument (?P<what>.+?): invalid choice: '(?P<given>.*?)'.* \(choose from (?P<names>.*)\)", re.DOTALL
)


class Parser(argparse.ArgumentParser):
    """An ``ArgumentParser`` that says what is wrong in one line, and what was perhaps meant."""

    def error(self, message: str) -> NoReturn:
        """Exit with 2."""
        self.exit(2, f"{self.prog}: {_meant(message)}; see {self.prog} --help\n")

    def refuse(self, words: Sequence[str]) -> NoReturn:
        """Exit with 2 for words that no argument takes."""
        word = words[0]
        if word.startswith("-"):
            options = [name for name in self._option_string_actions if name.startswith("--")]
            self.error(f"{word.partition('=')[0]}: no such option{_near(word.partition('=')[0], options)}")
        keys = "; a key is set as KEY=VALUE" if any(action.dest == "overrides" for action in self._actions) else ""
        self.error(f"{word!r}: one argument too many{keys}")


def add_help(commands: Any, parser: Parser) -> None:
    """``help [COMMAND ...]`` and ``completion SHELL``."""
    text = commands.add_parser("help", help="what a command does and takes")
    text.add_argument("words", nargs="*", metavar="COMMAND")
    text.set_defaults(command=lambda options: _help(parser, options.words))
    completion = commands.add_parser(
        "completion",
        help="completion of commands, files and keys in a shell",
        description='For this session: eval "$(ctrl-hpc completion bash)"; for good: the same line in ~/.bashrc.',
    )
    completion.add_argument("shell", choices=_SHELLS)
    completion.set_defaults(command=_completion)


def add_file(parser: argparse.ArgumentParser, name: str, metavar: str, folder: str = "") -> None:
    """A YAML file, or a packaged one by its name; a shell completes both."""
    action = parser.add_argument(
        name, metavar=metavar, help=f"a YAML file, or a packaged one by name: {EXAMPLES[folder]}"
    )

    def complete_file(prefix: str, **_: object) -> list[str]:
        from argcomplete.completers import FilesCompleter

        from ctrl_hpc.config.load import packaged_names

        return [*packaged_names(folder), *FilesCompleter(("yaml", "yml"))(prefix)]

    action.completer = complete_file  # type: ignore[attr-defined]


def add_overrides(parser: argparse.ArgumentParser, help: str = "any key of the configuration") -> None:
    """``a.b.c=value ...``, whose keys and words a shell completes."""
    action = parser.add_argument("overrides", nargs="*", metavar="a.b.c=value", help=help)
    action.completer = _complete_keys  # type: ignore[attr-defined]


def name_leaves(parser: argparse.ArgumentParser) -> None:
    """Give every parser's options the parser that took them, as ``options.parser``."""
    parser.set_defaults(parser=parser)
    for below in _commands(parser).values():
        name_leaves(below)


def complete(parser: argparse.ArgumentParser) -> None:
    """Answer the shell and exit, where it is a shell that asks."""
    if "_ARGCOMPLETE" in os.environ:
        import argcomplete

        argcomplete.autocomplete(parser)


def _complete_keys(prefix: str, **_: object) -> list[str]:
    """Overrides that begin so: every key with its ``=``; behind it the words that it takes."""
    from ctrl_hpc.config.tree import known

    key, equals, _value = prefix.partition("=")
    facts = known()
    if equals:
        fact = facts.get(key)
        words = (
            ("true", "false") if fact is not None and fact.kind is bool else fact.choices if fact is not None else ()
        )
        return [f"{key}={word}" for word in words]
    return [f"{name}=" for name, fact in facts.items() if not fact.is_section]


def version() -> str:
    """``ctrl-hpc VERSION``, with the commit in a checkout."""
    from importlib.metadata import version

    from ctrl_hpc.run.snapshot import identity

    return f"ctrl-hpc {version('ctrl-hpc')} ({identity()}), {os.path.dirname(ctrl_hpc.__file__)}"


def _commands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    return {name: below for names in _choices(parser) for name, below in names.items()}


def _choices(parser: argparse.ArgumentParser) -> Iterator[dict[str, argparse.ArgumentParser]]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            yield action.choices


def _help(parser: argparse.ArgumentParser, words: Sequence[str]) -> int:
    for word in words:
        below = _commands(parser)
        if word not in below:
            raise ValueError(f"help: {word!r} is no command{_near(word, list(below))}; allowed: {', '.join(below)}")
        parser = below[word]
    parser.print_help()
    return 0


def _completion(options: argparse.Namespace) -> int:
    import argcomplete

    print(argcomplete.shellcode(["ctrl-hpc"], shell=options.shell))
    return 0


def _meant(message: str) -> str:
    found = _CHOICE.fullmatch(message)
    if not found:
        return " ".join(message.removeprefix("argument ").split())
    names = [name.strip("' ") for name in found["names"].split(",")]
    return f"{found['what']}: there is no {found['given']!r}{_near(found['given'], names)}; allowed: {', '.join(names)}"


def _near(name: str, names: Sequence[str]) -> str:
    from ctrl_hpc.config.load import close_to

    return close_to(name, names)
