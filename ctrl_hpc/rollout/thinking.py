"""Models that think before they answer: asked by the template's own switch, their thought kept from what is answered.

A thought stands before the answer, between ``<think>`` and ``</think>``. Some templates open it themselves (Qwen3.5,
DeepSeek-R1's distills), so that a completion begins inside it; Qwen3's leaves that to the model. Where
``enable_thinking`` is false Qwen's put an empty one before the answer. Whatever a completion's thought says,
``Generation.text`` is the answer alone; its token ids and log-probabilities are those of both.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from ctrl_hpc.records import Generation, thought_room

OPEN, CLOSE = "<think>", "</think>"
CLOSED_BY_FORCE = f"\n{CLOSE}\n\n"
"""What ends a thought that did not end within its budget."""
type Mode = Literal["auto", "on", "off"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Thinking:
    """Whether a model is asked to think, and how long it may."""

    mode: Mode = "auto"
    """``auto``: as its template does of itself."""
    tokens: int = 0
    """For the thought, beside those of the answer; 0: both share the answer's."""
    close: bool = False
    """Whether a thought that is too long is ended by force, for the answer to follow."""

    @property
    def switch(self) -> dict[str, bool]:
        """The template's variables."""
        return {} if self.mode == "auto" else {"enable_thinking": self.mode == "on"}

    @property
    def room(self) -> int:
        """Tokens asked for beside the answer's."""
        return thought_room(self.mode, self.tokens)

    def check(self, tokenizer: Any, key: str) -> None:
        """Raises ValueError, naming the key, where the tokenizer's template cannot do what is asked."""
        if self.mode == "auto" or "enable_thinking" in str(tokenizer.chat_template):
            return
        opens = opens_thought(tokenizer, template_ids(tokenizer))
        if opens != (self.mode == "on"):
            does = "always thinks" if opens else "does not think"
            raise ValueError(f"{key}: {self.mode} is not possible: this model {does}, by its chat template; auto")


def template_ids(tokenizer: Any) -> list[int]:
    """What the template makes of a short chat."""
    text = tokenizer.apply_chat_template([{"role": "user", "content": "?"}], tokenize=False, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def can_think(tokenizer: Any) -> bool:
    """Whether the template knows of thoughts."""
    return OPEN in str(tokenizer.chat_template) or CLOSE in str(tokenizer.chat_template)


def opens_thought(tokenizer: Any, prompt_ids: list[int]) -> bool:
    """Whether a prompt ends within a thought that the template has opened."""
    return str(tokenizer.decode(prompt_ids[-16:])).rstrip().endswith(OPEN)


def split(text: str, *, opened: bool, thinks: bool) -> tuple[str | None, str, bool]:
    """The thought of a completion (None: it has none), the answer, and whether the thought is cut off.

    ``opened``: the prompt ends within a thought; ``thinks``: an end without a beginning ends one, too. The first end
    counts, as for SGLang and vLLM; a thought that follows a thought at once belongs to it. One that has no end leaves
    no answer.
    """
    thoughts, rest = [], text
    if not opened and thinks and CLOSE in rest and OPEN not in rest[: rest.index(CLOSE)]:
        opened = True
    while opened or rest.lstrip().startswith(OPEN):
        if rest.lstrip().startswith(OPEN):
            rest = rest.lstrip()[len(OPEN) :]
        head, end, tail = rest.partition(CLOSE)
        thoughts.append(head.strip())
        if not end:
            return "\n".join(thoughts), "", True
        opened, rest = False, tail
    if not thoughts:
        return None, text, False
    return "\n".join(thoughts), rest.lstrip("\n"), False


def without_thought(generation: Generation, *, opened: bool, tokenizer: Any) -> Generation:
    """A completion whose text is the answer alone; its thought and the tokens of it beside."""
    thought, answer, cut = split(generation.text, opened=opened, thinks=can_think(tokenizer))
    if thought is None:
        return generation
    ids = generation.token_ids
    n_tokens = len(ids)
    if not cut:
        closing = list(tokenizer(CLOSE, add_special_tokens=False)["input_ids"])
        ends = [at + len(closing) for at in range(len(ids)) if list(ids[at : at + len(closing)]) == closing]
        n_tokens = ends[0] if ends else len(tokenizer(thought + CLOSE, add_special_tokens=False)["input_ids"])
    return replace(generation, text=answer, thought=thought, thought_cut=cut, thought_tokens=n_tokens)


def too_long(generation: Generation, budget: int, *, opened: bool, tokenizer: Any) -> bool:
    """Whether a completion's thought, without what ends it, has more tokens than its budget, or has no end."""
    read = without_thought(generation, opened=opened, tokenizer=tokenizer)
    return (
        read.thought_cut or read.thought_tokens - len(tokenizer(CLOSE, add_special_tokens=False)["input_ids"]) > budget
    )


def within_budget(generation: Generation, budget: int, tokenizer: Any) -> Generation:
    """The beginning of a thought, without what comes after its budget."""
    if len(generation.token_ids) <= budget:
        return generation
    ids = generation.token_ids[:budget]
    text = tokenizer.decode(list(ids), skip_special_tokens=True)
    return replace(generation, text=text, token_ids=ids, logprobs=generation.logprobs[:budget])
