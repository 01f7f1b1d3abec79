"""The program in a model's answer."""

from __future__ import annotations

from ctrl_hpc.flow import fences

NOT_PROGRAMS = frozenset(
    "bash console csv diff html input json latex log markdown math md none output plain plaintext sh shell stderr "
    "stdin stdout terminal tex text toml traceback txt xml yaml yml".split()
)
"""Tags of blocks that show something else than a program: sample output, commands, data."""


def extract_program(text: str) -> str | None:
    """The last complete fenced block that is a program, whatever language its tag names.

    Blocks tagged as something else (:data:`NOT_PROGRAMS`) and blank blocks never count. A tagged block wins over
    untagged ones, which often show sample output. A block left open counts only when the answer has no complete one.
    None when there is no such block: text outside fences is not a program.
    """
    blocks, _ = fences.split(text)
    programs = [block for block in blocks if block.content.strip() and block.tag not in NOT_PROGRAMS]
    for closed in (True, False):
        found = [block for block in programs if block.closed is closed]
        tagged = [block for block in found if block.tag]
        if found:
            return (tagged or found)[-1].content
    return None
