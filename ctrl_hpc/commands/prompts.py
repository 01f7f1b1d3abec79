"""``ctrl-hpc prompts import``: a folder of templates from a checkout of the paper's released code."""

from __future__ import annotations

import argparse
from pathlib import Path

from ctrl_hpc.commands.output import check_folder, place


def add(parser: argparse.ArgumentParser) -> None:
    """Its arguments."""
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    text = "critic-rl's exact wording, which its released critics were trained on, from your own checkout of it"
    one = commands.add_parser("import", help=text, description=text)
    one.add_argument("checkout", type=place, metavar="CHECKOUT", help="git clone https://github.com/HKUNLP/critic-rl")
    one.add_argument(
        "folder", type=place, nargs="?", default=Path("prompts/critic-rl"), metavar="FOLDER",
        help="where the templates go (default: prompts/critic-rl)",
    )  # fmt: skip
    one.set_defaults(command=_import)


def _import(options: argparse.Namespace) -> int:
    from ctrl_hpc.flow.critic_rl import templates
    from ctrl_hpc.flow.prompts import Prompts

    check_folder(options.folder, "FOLDER", ours="critique.j2")
    found = templates(options.checkout)
    options.folder.mkdir(parents=True, exist_ok=True)
    for name, text in found.items():
        (options.folder / name).write_text(text, encoding="utf-8")
    Prompts.load(str(options.folder.absolute()))
    print(f"{options.folder}: {', '.join(found)}; use them with prompts.folder=./{options.folder}"
          if not options.folder.is_absolute() else f"{options.folder}: {', '.join(found)}")  # fmt: skip
    return 0
