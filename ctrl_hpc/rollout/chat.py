"""Chats as token ids: the one place where they are made, and where untrusted text stays text.

A problem, a program, a hint or a critique may hold ``<|im_start|>``, by chance or to open a turn of its own in another
model's prompt. Whatever a message says, only the template writes control tokens: where a message's text spells one, it
is cut after the first character and its parts are encoded apart. Text that spells none is encoded together with the
template, as ``apply_chat_template`` does it, to the same ids.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from ctrl_hpc.records import Message

_BARRED = re.compile(r"<[|｜].*[|｜]>", re.DOTALL)
"""Added tokens of this form are control tokens, also where the tokenizer does not call them special (Qwen3's
``<|fim_prefix|>``)."""
_BRACKETED = re.compile(r"[^\w\s]\S*[^\w\s]")
"""So are those of this form that the template writes: ``<tool_call>``, ``[INST]``."""
_PRIVATE = range(0xF0000, 0x10FFFE)
"""Unicode's private planes: characters of them that a chat does not hold mark the control tokens that it spells."""


def chat_ids(
    tokenizer: Any,
    chat: Sequence[Message],
    *,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    **template: bool | int | float | None,
) -> list[int]:
    """A chat by the tokenizer's template, as the model is asked it.

    ``continue_final_message`` leaves the last message open: its completion continues it. ``template`` are variables
    of the template, such as ``enable_thinking``. Raises ValueError when the template refuses the chat.
    """
    from jinja2 import TemplateError

    pattern = _control_pattern(tokenizer)
    contents = [message.content for message in chat]
    absent = _absent_characters(contents)
    cut = next(absent)
    marks: defaultdict[str, str] = defaultdict(
        lambda: next(absent)
    )  # one a token: a mark may be all that is left of it
    messages = [{"role": message.role, "content": _mark(message.content, pattern, marks, cut)} for message in chat]
    try:
        text = tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=add_generation_prompt and not continue_final_message,
            continue_final_message=continue_final_message,
            **template,
        )
    except TemplateError as error:
        raise ValueError(f"the chat template refuses the messages: {error}") from None
    for token, mark in marks.items():
        text = text.replace(mark + token, _cut(token, pattern, cut)).replace(mark, cut)
    return _encode(tokenizer, text.split(cut))


def text_ids(tokenizer: Any, text: str) -> list[int]:
    """Text as token ids, none of them a control token."""
    cut = next(_absent_characters([text]))
    return _encode(tokenizer, _cut(text, _control_pattern(tokenizer), cut).split(cut))


def inside_ids(tokenizer: Any, text: str) -> list[int]:
    """As :func:`text_ids`, of text that goes on after other text."""
    cut = next(_absent_characters([text]))
    pieces = _cut(text, _control_pattern(tokenizer), cut).split(cut)
    return [token for piece in pieces for token in _encode_inside(tokenizer, piece)]


def room_after(text: str, n_tokens: int, max_tokens: Sequence[int]) -> list[int]:
    """The tokens left of each ``max_tokens`` after a text of ``n_tokens``; ValueError where one leaves none."""
    if min(max_tokens, default=n_tokens + 1) <= n_tokens:
        raise ValueError(f"{text!r} has {n_tokens} tokens; it may have {min(max_tokens) - 1}")
    return [longest - n_tokens for longest in max_tokens]


_patterns: WeakKeyDictionary[Any, tuple[Any, re.Pattern[str]]] = WeakKeyDictionary()
"""What ``_control_pattern`` found, with the template it was found for."""


def _control_pattern(tokenizer: Any) -> re.Pattern[str]:
    """Matches what the tokenizer takes for a control token: special ones, those of its template, and barred ones.

    Other added tokens are words: the miniature's clauses, Gemma's runs of spaces.
    """
    template, pattern = _patterns.get(tokenizer, (None, None))
    if pattern is None or template != tokenizer.chat_template:
        pattern = _compile(tokenizer)
        _patterns[tokenizer] = (tokenizer.chat_template, pattern)
    return pattern


def _compile(tokenizer: Any) -> re.Pattern[str]:
    template = str(tokenizer.chat_template)
    control = {
        token.content
        for token in tokenizer.added_tokens_decoder.values()
        if len(token.content) > 1
        and (
            token.special
            or _BARRED.fullmatch(token.content)
            or (token.content in template and _BRACKETED.fullmatch(token.content))
        )
    }
    return re.compile("|".join(map(re.escape, sorted(control, key=lambda text: (-len(text), text)))) or "(?!)")


def _absent_characters(texts: Sequence[str]) -> Iterator[str]:
    """Private characters that none of the texts holds."""
    used = set().union(*texts)
    return (chr(code) for code in _PRIVATE if chr(code) not in used)


def _mark(text: str, pattern: re.Pattern[str], marks: Mapping[str, str], cut: str) -> str:
    """``text`` with its mark before each control token; the token stays whole, for templates that look for it.

    One that overlaps the next is cut at once.
    """
    parts, position = [], 0
    while match := pattern.search(text, position):
        inner = pattern.search(text, match.start() + 1)
        overlaps = inner is not None and inner.start() < match.end() < inner.end()
        parts += [text[position : match.start()], match[0][0] + cut if overlaps else marks[match[0]] + match[0]]
        position = match.start() + 1 if overlaps else match.end()
    return "".join((*parts, text[position:]))


def _cut(text: str, pattern: re.Pattern[str], cut: str) -> str:
    """``text`` with a cut after the first character of every control token, and of those that begin within one."""
    parts, position = [], 0
    while match := pattern.search(text, position):
        parts.append(text[position : match.start() + 1])
        position = match.start() + 1
    return cut.join((*parts, text[position:]))


def _encode(tokenizer: Any, pieces: Sequence[str]) -> list[int]:
    """The pieces' ids, each encoded for itself."""
    ids = list(tokenizer(pieces[0], add_special_tokens=False)["input_ids"])
    for piece in pieces[1:]:
        ids += _encode_inside(tokenizer, piece)
    return ids


def _encode_inside(tokenizer: Any, piece: str) -> list[int]:
    """The ids of a piece that does not begin the text: without the space some tokenizers put before a text."""
    if not piece:
        return []
    newline = list(tokenizer("\n", add_special_tokens=False)["input_ids"])
    after = list(tokenizer("\n" + piece, add_special_tokens=False)["input_ids"])
    if after[: len(newline)] == newline:
        return after[len(newline) :]
    return list(tokenizer(piece, add_special_tokens=False)["input_ids"])
