"""The records that flow between the stages: frozen dataclasses, no behaviour beyond small derived properties.

problem -> solution -> verdict -> critique -> revision -> verdict -> reward. Every record converts to and from one
JSON line with :mod:`ctrl_hpc.jsonl`.
"""

from __future__ import annotations

import base64
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Protocol, runtime_checkable

from pydantic import BeforeValidator, Field, GetCoreSchemaHandler, PlainSerializer
from pydantic_core import core_schema

Status = Literal[
    "accepted",
    "wrong_answer",
    "compile_error",
    "runtime_error",
    "time_limit",
    "memory_limit",
    "output_limit",
    "unsupported",
    "sandbox_error",
]
TestStatus = Literal[Status, "not_run"]
SAID = Field(exclude_if=operator.not_)
"""Annotates a field that JSON leaves out where it says nothing: 0, false, empty."""
Judgement = Literal["correct", "incorrect"]
Split = Literal["train", "dev", "test"]


def _from_base64(data: Any) -> Any:
    if not (isinstance(data, dict) and data.keys() == {"base64"} and isinstance(data["base64"], str)):
        raise ValueError("expected base64 bytes")
    return base64.b64decode(data["base64"])


Bytes = Annotated[
    bytes,
    BeforeValidator(_from_base64),
    PlainSerializer(lambda value: {"base64": base64.b64encode(value).decode("ascii")}),
]
"""Bytes, which JSON holds as ``{"base64": ...}``."""
_COLLECTIONS = {"__tuple__": tuple, "__set__": set, "__frozenset__": frozenset}


def encode_plain(value: Any) -> Any:
    """As JSON data: tuples, sets, complex, bytes and non-string keys tagged; raises ValueError for anything else."""
    if isinstance(value, (str, int, float, bool)) or value is None:
        return value
    if isinstance(value, list):
        return [encode_plain(item) for item in value]
    if isinstance(value, (tuple, set, frozenset)):
        items = value if isinstance(value, tuple) else sorted(value, key=repr)
        return {"__" + type(value).__name__ + "__": [encode_plain(item) for item in items]}
    if isinstance(value, bytes):
        return {"__bytes__": base64.b64encode(value).decode("ascii")}
    if isinstance(value, complex):
        return {"__complex__": [value.real, value.imag]}
    if isinstance(value, dict):
        if all(isinstance(key, str) and not key.startswith("__") for key in value):
            return {key: encode_plain(item) for key, item in value.items()}
        return {"__dict__": [[encode_plain(key), encode_plain(item)] for key, item in value.items()]}
    raise ValueError(f"a {type(value).__name__} cannot be an argument or result of a function test")


def decode_plain(value: Any) -> Any:
    """The inverse of :func:`encode_plain`."""
    if isinstance(value, list):
        return [decode_plain(item) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        ((tag, items),) = value.items()
        if tag == "__bytes__":
            return base64.b64decode(items)
        if tag == "__complex__":
            return complex(*items)
        if tag == "__dict__":
            return {decode_plain(key): decode_plain(item) for key, item in items}
        if tag in _COLLECTIONS:
            return _COLLECTIONS[tag](decode_plain(item) for item in items)
    return {key: decode_plain(item) for key, item in value.items()}


Plain = Annotated[Any, BeforeValidator(decode_plain), PlainSerializer(encode_plain)]
"""Plain data of Python as JSON that people read and write: what JSON lacks is tagged, all else is as it is.

What crosses between a hostile program and its judge has a stricter form, in which every dictionary is tagged."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StdinTest:
    """The program reads ``stdin`` and must print ``expected_stdout`` (compared by the problem's comparison mode)."""

    kind: Literal["stdin"] = "stdin"
    stdin: str
    expected_stdout: Annotated[str, Field(alias="stdout")]


@dataclass(frozen=True, slots=True, kw_only=True)
class AssertTest:
    """Test code that calls the program's functions and raises when they are wrong (MBPP+, HumanEval)."""

    kind: Literal["assert"] = "assert"
    code: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FunctionTest:
    """Calling ``name(*args)`` must return ``expected``; all of it plain data (JSON, tuples, sets)."""

    kind: Literal["function"] = "function"
    name: str
    args: tuple[Plain, ...]
    expected: Plain


TestCase = Annotated[StdinTest | AssertTest | FunctionTest, Field(discriminator="kind")]


class StoredTests(Sequence[TestCase]):
    """Tests that lie in a store and are read when they are looked at; a record names them by their hash.

    In JSON ``{"sha256": HASH, "total": N, "names": [...]}``.
    """

    __slots__ = ("names", "sha256", "store", "total")

    def __init__(self, sha256: str, total: int, names: Sequence[str] = (), store: TestSource | None = None) -> None:
        """``names``: functions and classes that the tests call; ``store``: where they are read, None: unknown here."""
        self.sha256, self.total, self.names, self.store = sha256, total, tuple(names), store

    def read(self) -> tuple[TestCase, ...]:
        """The tests; raises ValueError where they are not."""
        if self.store is None:
            raise ValueError(f"the tests {self.sha256[:12]} lie in a store that is not known here")
        return self.store.load(self.sha256)

    def content(self) -> bytes | None:
        """Their JSON, of which the hash is; None where it is not."""
        return self.store.content(self.sha256) if self.store is not None else None

    def __len__(self) -> int:
        return self.total

    def __getitem__(self, index: Any) -> Any:
        return self.read()[index]

    def __iter__(self) -> Iterator[TestCase]:
        return iter(self.read())

    def __eq__(self, other: object) -> bool:
        if isinstance(other, StoredTests):
            return self.sha256 == other.sha256
        return isinstance(other, tuple) and self.read() == other

    def __hash__(self) -> int:
        return hash(self.sha256)

    def __repr__(self) -> str:
        return f"StoredTests({self.sha256[:12]}, {self.total})"


class TestSource(Protocol):
    """Where stored tests are read."""

    def load(self, sha256: str) -> tuple[TestCase, ...]:
        """The tests of a hash; raises ValueError where there are none."""
        ...

    def content(self, sha256: str) -> bytes | None:
        """Their JSON, of which that is the hash; None where they are not there."""
        ...


class _TestsSchema:
    """A list of tests in JSON is a tuple, an object the name of stored ones."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        listed = handler.generate_schema(tuple[TestCase, ...])
        return core_schema.no_info_wrap_validator_function(
            _read_tests,
            listed,
            serialization=core_schema.wrap_serializer_function_ser_schema(_write_tests, schema=listed),
        )


def _read_tests(data: Any, listed: Callable[[Any], Any]) -> Any:
    if not isinstance(data, dict):
        return listed(data)
    sha256, total, names = (data.get(name) for name in ("sha256", "total", "names"))
    right = data.keys() <= {"sha256", "total", "names"} and isinstance(sha256, str) and isinstance(total, int)
    if not (right and re.fullmatch("[0-9a-f]{64}", str(sha256)) and isinstance(names, list)):
        raise ValueError("expected a list of tests, or the sha256, total and names of stored ones")
    return StoredTests(str(sha256), int(total or 0), [str(name) for name in names])


def _write_tests(tests: Any, listed: Callable[[Any], Any]) -> Any:
    if isinstance(tests, StoredTests):
        return {"sha256": tests.sha256, "total": tests.total, "names": list(tests.names)}
    return listed(tests)


Tests = Annotated[Sequence[TestCase], _TestsSchema()]
"""A tuple of tests, or :class:`StoredTests`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one test of one program may use."""

    cpu_s: float = 10.0
    """CPU seconds."""
    wall_s: float = 20.0
    """Wall-clock seconds."""
    memory_mb: int = 512
    """Peak memory in MiB."""
    output_bytes: int = 1 << 20
    """Bytes of stdout and, apart, of stderr."""
    processes: int = 128
    """Processes and threads alive at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Override:
    """What holds for the programs of one data set, whatever its problems say; None leaves a thing as it is."""

    cpu_s: float | None = None
    """CPU seconds of a test, > 0; not multiplied by ``time_factor``. Wall-clock time follows in proportion."""
    memory_mb: int | None = None
    """Peak memory in MiB, > 0."""
    comparison: str | None = None
    """How outputs are compared: a name of ``ctrl_hpc.sandbox.judge``, with options, or of a special judge."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """By which limits and comparisons the programs of all problems are judged."""

    limits: Limits = Limits()
    """Limits of a test where the problem names none."""
    time_budget_s: float | None = None
    """Wall-clock seconds of all tests of a program together; None: none."""
    time_factor: float = 1.0
    """Multiplies the time limits, those that problems state among them."""
    overrides: Mapping[str, Override] = field(default_factory=dict)
    """By data set."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TestResult:
    """What one test of one program did."""

    __test__ = False  # not a pytest class

    status: TestStatus
    stdout: Bytes = b""
    stderr: Bytes = b""
    exit_code: int | None = None
    """None when the process ended by a signal or never ran."""
    signal: int | None = None
    cpu_s: float = 0.0
    wall_s: float = 0.0
    peak_memory_mb: float = 0.0
    index: int | None = None
    """Number of the test, from 0, in a slim verdict, which has the results of a few."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What a slim verdict says of all tests."""

    statuses: tuple[tuple[TestStatus, int], ...]
    """The tests' statuses in order, run-length encoded."""
    cpu_s: float = 0.0
    """Of all tests together."""
    wall_s: float = 0.0
    """Of all tests together."""
    peak_memory_mb: float = 0.0
    """The highest of any test."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The judgement of a program against all tests; ``status`` is the first test's that is not accepted.

    A slim verdict has a ``summary``, and of the tests' results only the failures that are shown to anybody (see
    ``ctrl_hpc.records.verdicts``).
    """

    status: Status
    tests: tuple[TestResult, ...] = ()
    detail: str = ""
    """One line on what went wrong; empty when accepted."""
    summary: Summary | None = None

    @property
    def statuses(self) -> list[TestStatus]:
        """The status of every test, in order."""
        if self.summary is None:
            return [test.status for test in self.tests]
        return [status for status, count in self.summary.statuses for _ in range(count)]

    @property
    def passed(self) -> int:
        """Number of accepted tests."""
        return self.statuses.count("accepted")

    @property
    def total(self) -> int:
        """Number of tests, run or not."""
        return len(self.statuses)

    @property
    def wall_s(self) -> float:
        """Wall-clock seconds of all tests together."""
        return sum(test.wall_s for test in self.tests) if self.summary is None else self.summary.wall_s

    def result(self, index: int) -> TestResult | None:
        """The result of a test; None where the verdict does not hold it."""
        if self.summary is None:
            return self.tests[index] if index < len(self.tests) else None
        return next((test for test in self.tests if test.index == index), None)

    @property
    def accepted(self) -> bool:
        """Whether every test passed."""
        return self.status == "accepted"


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A programming problem with its tests; None means unknown."""

    id: str
    source: str
    split: str
    prompt: str
    tests: Tests
    starter_code: str | None = None
    cpu_s: float | None = None
    memory_mb: int | None = None
    difficulty: str | None = None
    canonical_solution: str | None = None
    wrong_solutions: tuple[str, ...] | None = None
    """Programs that the data set says are wrong."""
    comparison: str | None = None
    """How outputs are compared: see ``ctrl_hpc.sandbox.judge.COMPARISONS``; None is the default, exact tokens."""
    harness: str | None = None
    """Whose grader's preamble a program is run with: a name of ``ctrl_hpc.harness.HARNESSES``; None: none."""
    checker: str | None = None
    """Source of a testlib checker in C++, which says whether an output is right; None: outputs are compared."""
    language: str | None = None
    """What its programs are written in: a name of ``ctrl_hpc.sandbox.languages.LANGUAGES``; None: Python."""
    provenance: str | None = None
    """Where the problem was read: file and line, or row of a data set of the hub; then its address where it has one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Execution:
    """One program to be run against tests: what an executor takes."""

    program: str
    tests: Tests
    limits: Limits
    checker: str | None = None
    """Source of a checker in C++ that judges outputs in place of the comparison, run as ``checker input output answer``
    with testlib's exit codes."""
    language: str | None = None
    """A name of ``ctrl_hpc.sandbox.languages.LANGUAGES``; None: Python."""
    compile_timeout_s: float | None = None
    """Wall-clock seconds to compile; None: the executor's default."""
    preamble: str | None = None
    """Trusted source that is run before the program, in its namespace: see :mod:`ctrl_hpc.harness`."""
    comparison: str = "exact"
    stop_at_first_failure: bool = False
    """Leave out the tests after the first that is not accepted: the status is known."""
    time_budget_s: float | None = None
    """Wall-clock seconds of all tests together, a test beyond which is a ``time_limit``; None: none."""
    outputs: Literal["shown"] | None = None
    """``shown``: the verdict is slim, with the results of the failures that are shown; None: with every test's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One turn of a chat."""

    role: Literal["system", "user", "assistant"]
    content: str


Chat = tuple[Message, ...]


CLOSE_ROOM = 32
"""Tokens of a critique kept free for ``prompts.critique_close`` and what follows it."""


def thought_room(mode: str, tokens: int) -> int:
    """Tokens asked for beside an answer's: the thought's budget, but for a model that is told not to think (off)."""
    return 0 if mode == "off" else tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How to sample completions; ``temperature=0`` is greedy decoding."""

    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 1024
    n: int = 1
    """Completions a chat."""
    seed: int | None = None
    """Completion j of chat i is drawn with a seed derived from (seed, i, j), whatever the batch it is decoded in."""
    first: int = 0
    """The number i of a call's first chat: a part of a call is drawn as it would be in the whole."""
    rows: tuple[int, ...] = ()
    """The number i of each chat, where they do not follow each other; empty: they do, from ``first`` on."""

    def number(self, index: int) -> int:
        """The number i of the chat at an index of the call."""
        return self.rows[index] if self.rows else self.first + index


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """One completion. Token ids and log-probs are empty when the endpoint does not give them."""

    text: str
    prompt_ids: tuple[int, ...] = ()
    token_ids: tuple[int, ...] = ()
    """The completion's tokens, the end-of-turn token included when it was sampled."""
    logprobs: tuple[float, ...] = ()
    """Natural log-probability of each token under the sampling distribution at the sampling temperature."""
    finish_reason: Literal["stop", "length", "abort"] = "stop"
    version: int = 0
    """Version of the weights that made it (see weight sync); 0 for a model that never changes."""
    forced: tuple[int, int] | None = None
    """Where tokens were put by us, not sampled: ``token_ids[start:end]``; their log-probs are 0."""
    thought: str | None = None
    """What a thinking model wrote before ``text``; None: nothing. The token ids are those of both."""
    thought_tokens: Annotated[int, SAID] = 0
    """How many of the tokens are the thought's, with what ends it."""
    thought_cut: Annotated[bool, SAID] = False
    """Whether the thought has no end, so that there is no answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Solution:
    """A draft program for a problem, by the fixed generator, with its verdict once executed."""

    id: str
    problem_id: str
    text: str
    """The generator's whole answer."""
    program: str | None
    """The code taken from the answer; None when it holds none."""
    verdict: Verdict | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Critique:
    """Feedback on a solution, by a critic."""

    id: str
    solution_id: str
    text: str
    judgement: Judgement | None
    """The overall judgement; None when the critique has none, or several that disagree."""
    generation: Generation | None = None
    """Token ids and log-probs, kept where training needs them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Revision:
    """The generator's second try, after reading a critique."""

    critique_id: str
    text: str
    program: str | None
    kept: bool
    """True when the critique judged the draft correct, so that the draft was kept and the generator not asked."""
    verdict: Verdict | None = None


TRANSITIONS = ("fix", "keep", "break", "stuck")
"""What became of a draft: wrong to right, right to right, right to wrong, wrong to wrong."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reward:
    """What a critique earned, and why."""

    critique_id: str
    value: float
    reason: str
    """One of ``ctrl_hpc.flow.reward.REASONS``."""
    masked: bool = False
    """True when the environment failed (a sandbox fault): the sample leaves its group."""
    leaked: bool = False
    """True when the critique gave the solution away and paid for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two answers to one question, of which one is right (JudgeBench)."""

    id: str
    category: str
    """knowledge, reasoning, math or coding."""
    source: str
    question: str
    answer_a: str
    answer_b: str
    right: Literal["A", "B"]
    provenance: str | None = None
    """File and line, or row of the hub's data set."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelledAnswers:
    """A question of a benchmark of critics, with answers of which it is known what they are worth."""

    id: str
    category: str
    question: str
    answers: tuple[str, ...]
    worth: tuple[float, ...]
    """Of each answer, in [0, 1]: 1 is right, 0 is wrong."""
    provenance: str | None = None
    """File and line, or row of the hub's data set."""

    @property
    def is_pair(self) -> bool:
        """Whether there are two answers, one right and one wrong."""
        return sorted(self.worth) == [0.0, 1.0]

    @property
    def is_binary(self) -> bool:
        """Whether every answer is right or wrong."""
        return set(self.worth) <= {0.0, 1.0}


EVALUATION = 10**12
"""Weight versions from here on are evaluation's, milliseconds since 1970: newer than whatever a server holds."""


class Generator(Protocol):
    """Answers chats: the rollout array, an OpenAI-compatible endpoint, or the oracle."""

    def complete(self, chats: Sequence[Chat], sampling: Sampling) -> list[list[Generation]]:
        """``sampling.n`` completions for each chat, in order.

        A chat that ends with a message of the assistant is open: its completions continue that message.
        """
        ...


@runtime_checkable
class Confident(Protocol):
    """A critic that tells how sure it is of a judgement."""

    def probability(self, found: Critique, prefix: str) -> float | None:
        """That the answer is right, by a critique of its own that begins with ``prefix``; None where it cannot tell."""
        ...


@runtime_checkable
class Continuing(Protocol):
    """A generator that can go on with a completion after a text of ours."""

    def extend(
        self,
        chats: Sequence[Chat],
        begun: Sequence[Generation],
        text: str,
        sampling: Sequence[Sampling],
        choices: Sequence[str] = (),
    ) -> list[Generation]:
        """Each completion, ``text``, and what follows that, as one; the tokens of ``text`` are ``forced``.

        ``sampling.max_tokens`` is for the text and what follows it, where the text's tokens are known. With ``choices``
        one of these follows, drawn among them alone, and ends the completion; where tokens are not known the model goes
        on as it likes.
        """
        ...


class Executor(Protocol):
    """Runs programs against tests: a local ``Sandbox``, or the executor array over HTTP."""

    def run_many(self, executions: Sequence[Execution]) -> list[Verdict]:
        """A verdict for each execution, in order; an environment fault that persists is ``sandbox_error``."""
        ...
