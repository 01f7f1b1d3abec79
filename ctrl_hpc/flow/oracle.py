"""The oracle generator: answers every chat with the canonical solution of its problem."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ctrl_hpc.flow.prompts import Prompts
from ctrl_hpc.records import Chat, Generation, Problem, Sampling


class OracleGenerator:
    """A :class:`~ctrl_hpc.records.Generator` that knows the data set's solutions; the problem is told by the chat's
    first user turn.

    Raises ValueError when a problem has no canonical solution, or when a chat is about no problem that it knows.
    """

    def __init__(self, problems: Iterable[Problem], prompts: Prompts) -> None:
        self._answers: dict[str, str] = {}
        for problem in problems:
            if problem.canonical_solution is None:
                raise ValueError(
                    f"generator=oracle: problem {problem.id} of {problem.source} has no canonical_solution"
                )
            answer = f"```python\n{problem.canonical_solution.rstrip()}\n```"
            self._answers[_first_user_turn(prompts.solution(problem))] = answer

    def complete(self, chats: Sequence[Chat], sampling: Sampling) -> list[list[Generation]]:
        """The canonical solution, ``sampling.n`` times for each chat."""
        out = []
        for chat in chats:
            turn = _first_user_turn(chat)
            if turn not in self._answers:
                raise ValueError(f"generator=oracle: no known problem asks {turn[:60]!r}")
            out.append([Generation(text=self._answers[turn])] * sampling.n)
        return out


def _first_user_turn(chat: Chat) -> str:
    return next(message.content for message in chat if message.role == "user")
