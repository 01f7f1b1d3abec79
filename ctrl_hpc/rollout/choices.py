"""One of several words after a text of ours, in tokens: what a completion that is closed by force goes on with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ctrl_hpc.records import CLOSE_ROOM, Generation
from ctrl_hpc.rollout.chat import inside_ids

BIAS = 100.0
"""Added to the logits of the tokens that may be drawn: the largest that OpenAI, SGLang and vLLM allow. No other token
is drawn then, and theirs are as likely as they are beside each other."""


@dataclass(frozen=True, slots=True)
class Choices:
    """A text, and the words of which one is to follow it."""

    forced: tuple[int, ...]
    """Tokens that all begin with: the text's, and what the words have in common."""
    words: dict[int, tuple[str, tuple[int, ...]]]
    """By the token with which a word goes on from there: the word, and its tokens after that. Empty: anything follows.
    """

    @classmethod
    def of(cls, tokenizer: Any, text: str, words: Sequence[str]) -> Choices:
        """In a tokenizer's tokens; each word is encoded behind the text, apart from it.

        Raises ValueError for words that are one word, or that the tokenizer makes the same beginning of.
        """
        forced = inside_ids(tokenizer, text)
        rests = {word: tuple(inside_ids(tokenizer, word)) for word in words}
        while rests and all(rests.values()) and len({rest[0] for rest in rests.values()}) == 1:
            forced.append(next(iter(rests.values()))[0])
            rests = {word: rest[1:] for word, rest in rests.items()}
        found = {rest[0]: (word, rest[1:]) for word, rest in rests.items() if rest}
        if len(found) < len(words):
            raise ValueError(f"{', '.join(map(repr, words))}: not told apart by the first token that differs")
        return cls(tuple(forced), found)

    @property
    def n_tokens(self) -> int:
        """Of the text and the longest word, but for the token that decides."""
        return len(self.forced) + max((len(rest) for _, rest in self.words.values()), default=0)

    @property
    def biases(self) -> tuple[tuple[int, float], ...]:
        """Of the logits of the token that decides; none where anything may follow."""
        return tuple((token, BIAS) for token in self.words)

    def whole[G: Generation](self, decided: G) -> G:
        """What was drawn after the forced tokens, with the rest of its word, whose tokens have no choice (log-prob 0).

        As it is where it is none of the words: the server knows no biases.
        """
        word, rest = self.words.get(decided.token_ids[0], (None, ())) if decided.token_ids else (None, ())
        if word is None:
            return decided
        return replace(
            decided,
            text=word,
            token_ids=(decided.token_ids[0], *rest),
            logprobs=(*decided.logprobs[:1], *(0.0 for _ in rest)),
            finish_reason="stop",
        )


def check_close(tokenizer: Any, texts: Sequence[str], words: Sequence[str], key: str) -> None:
    """Raises ValueError where one of the texts leaves no token of the room that is kept for it and a judgement."""
    try:
        n_tokens = max(Choices.of(tokenizer, text, words).n_tokens for text in texts)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None
    if n_tokens >= CLOSE_ROOM:
        raise ValueError(
            f"{key}: has {n_tokens} tokens, line breaks and judgement among them; at most {CLOSE_ROOM - 1}"
        )
