"""``/critique``, ``/score`` and ``/compare`` over a critic, each answer cached by what was asked.

A request holds ``items``, which are judged side by side with those of all other requests: the model decodes them in one
batch. An item that cannot be judged has an ``error`` in the place of its result; the others are served.
"""

from __future__ import annotations

import asyncio
import json
import logging
import tempfile
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from pydantic import BaseModel, ConfigDict, Field

from ctrl_hpc import jsonl
from ctrl_hpc.config.facts import is_url
from ctrl_hpc.evaluate.calibration import Calibration
from ctrl_hpc.flow.comparison import comparison_template
from ctrl_hpc.flow.prompts import Prompts, closings, judgements, packaged
from ctrl_hpc.judge.opinions import (
    TOP,
    Critic,
    How,
    Item,
    LocalCritic,
    Mode,
    Opinion,
    content_hash,
    right_one,
    score,
)
from ctrl_hpc.records import Generator
from ctrl_hpc.rollout.choices import check_close
from ctrl_hpc.service import http as http_service
from ctrl_hpc.store.segments import KEY_BYTES, Segments, Tolerant

AT_ONCE = 64
"""Items that are judged at a time, of all requests."""
KEPT = 1 << 16
"""Answers kept in memory."""
SAMPLED = 0.7
"""Temperature of several votes, where a request names none; one vote is greedy."""
_READING = "thoughts apart"
"""How an answer is read; another word where that changes, so that no answer kept before is served."""
_Text = Annotated[str, Field(max_length=1 << 22)]


class _Body(BaseModel):
    """Unknown fields are refused by name."""

    model_config = ConfigDict(extra="forbid")
    votes: int = Field(1, ge=1, le=256)
    temperature: float | None = Field(None, ge=0.0, le=10.0)
    max_tokens: int = Field(1024, ge=1, le=1 << 17)

    def how(self) -> How:
        """How the critic is asked."""
        temperature = self.temperature if self.temperature is not None else SAMPLED if self.votes > 1 else 0.0
        return How(votes=self.votes, temperature=temperature, max_tokens=self.max_tokens)


class AnswerBody(BaseModel):
    """An answer to be judged."""

    model_config = ConfigDict(extra="forbid")
    problem: _Text
    answer: _Text
    starter_code: _Text | None = None
    language: str | None = None

    def item(self) -> Item:
        """As the critic is asked."""
        return Item(**self.model_dump())


class PairBody(BaseModel):
    """Two answers to one problem."""

    model_config = ConfigDict(extra="forbid")
    problem: _Text
    answer_a: _Text
    answer_b: _Text


class JudgeBody(_Body):
    """Body of ``/critique`` and ``/score``."""

    items: list[AnswerBody] = Field(max_length=4096)


class CompareBody(_Body):
    """Body of ``/compare``. pointwise: each answer is judged by itself; pairwise: both are shown, in both orders."""

    items: list[PairBody] = Field(max_length=4096)
    mode: Mode = "pointwise"


@dataclass(slots=True)
class Totals:
    """What the service has done since it started."""

    requests: int = 0
    items: int = 0
    cached: int = 0
    """Questions that were asked before, or are being answered."""
    abstained: int = 0
    """Answers scored of which no opinion has a judgement."""
    errors: int = 0
    """Items that could not be judged."""
    busy_s: float = 0.0
    """Seconds of requests, added up."""


class Judge:
    """A critic whose answers are kept: in memory, and in a folder where there is one."""

    def __init__(self, critic: Critic, identity: str, calibration: Calibration | None, cache: Path | None) -> None:
        """``identity``: of the critic's weights and prompts, of which what is kept depends."""
        self._critic, self._identity, self.calibration = critic, identity, calibration
        self._pool = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="judge")
        self._known: OrderedDict[str, asyncio.Task[Any]] = OrderedDict()
        self._disk = None if cache is None else Segments(cache)
        self._unless_disk_fails = Tolerant("judge's cache")
        self.totals = Totals()

    def close(self) -> None:
        """End the threads and close the cache's files."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        if self._disk is not None:
            self._unless_disk_fails(self._disk.close)

    @property
    def alive(self) -> bool:
        """Whether anything that was not asked before will be answered."""
        generator = self._critic.generator
        return not isinstance(generator, LocalCritic) or generator.worker.alive

    async def opinions(self, item: Item, how: How) -> list[Opinion]:
        """As :meth:`Critic.opinions`."""
        found = await self._once(("opinions", item, how), lambda: list(map(asdict, self._critic.opinions(item, how))))
        return [jsonl.decode(Opinion, opinion) for opinion in found]

    async def choices(self, question: str, answers: tuple[str, str], how: How) -> list[Any]:
        """As :meth:`Critic.choices`."""
        return await self._once(
            ("choices", question, answers, how), lambda: self._critic.choices(question, answers, how)
        )

    async def _once(self, asked: tuple[Any, ...], answer: Callable[[], Any]) -> Any:
        """What a question was answered, now or before."""
        key = content_hash(self._identity, asked)
        task = self._known.get(key)
        if task is None:
            task = self._known[key] = asyncio.create_task(self._answered(key, answer))
            while len(self._known) > KEPT:
                self._known.popitem(last=False)
        else:
            self.totals.cached += 1
            self._known.move_to_end(key)
        try:
            return await asyncio.shield(task)
        except BaseException:
            if task.done():
                self._known.pop(key, None)  # a fault is not kept
            raise

    async def _answered(self, key: str, answer: Callable[[], Any]) -> Any:
        def work() -> Any:
            place = bytes.fromhex(key)[:KEY_BYTES]
            disk = self._disk
            kept = None if disk is None else self._unless_disk_fails(lambda: disk.get(place))
            if kept is not None:
                self.totals.cached += 1
                return json.loads(kept)
            found = answer()
            if disk is not None:
                self._unless_disk_fails(lambda: disk.put(place, json.dumps(found).encode()))
            return found

        return await asyncio.get_running_loop().run_in_executor(self._pool, work)


def create_app(judge: Judge) -> FastAPI:
    """The HTTP application over a judge."""
    app = FastAPI(title="ctrl-hpc judge", docs_url=None, redoc_url=None)

    @app.exception_handler(RequestValidationError)
    async def bad_body(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:])
        return JSONResponse({"error": {"message": f"{where}: {first['msg']}"}}, status_code=400)

    @app.post("/critique")
    async def critique(body: JudgeBody) -> dict[str, Any]:
        async def one(item: AnswerBody) -> dict[str, Any]:
            return {"critiques": list(map(asdict, await judge.opinions(item.item(), body.how())))}

        return await _results(judge, body.items, one)

    @app.post("/score")
    async def scores(body: JudgeBody) -> dict[str, Any]:
        async def one(item: AnswerBody) -> dict[str, Any]:
            found = score(await judge.opinions(item.item(), body.how()), judge.calibration)
            judge.totals.abstained += found.raw is None
            return asdict(found)

        return await _results(judge, body.items, one)

    @app.post("/compare")
    async def compare(body: CompareBody) -> dict[str, Any]:
        compared = {"pointwise": _pointwise, "pairwise": _pairwise}[body.mode]
        return await _results(judge, body.items, lambda pair: compared(judge, pair, body.how()))

    @app.get("/health")
    async def health() -> Any:
        if not judge.alive:
            return JSONResponse({"status": "dead", "detail": "the model's thread has ended"}, status_code=503)
        return {"status": "ok", "calibrated": judge.calibration is not None}

    @app.get("/metrics")
    async def metrics() -> PlainTextResponse:
        return PlainTextResponse(_metrics(judge.totals))

    return app


async def _results[T](
    judge: Judge, items: Sequence[T], one: Callable[[T], Awaitable[dict[str, Any]]]
) -> dict[str, Any]:
    """The result of every item, or its error, in order."""
    started = time.perf_counter()
    judge.totals.requests += 1
    judge.totals.items += len(items)
    found = await asyncio.gather(*map(one, items), return_exceptions=True)
    results: list[dict[str, Any]] = []
    for item in found:
        if isinstance(item, Exception):
            judge.totals.errors += 1
            told = isinstance(item, ValueError | RuntimeError)
            if not told:
                logging.getLogger(__name__).error("an item cannot be judged", exc_info=item)
            results.append({"error": str(item) if told else f"{type(item).__name__}: {item}"})
        elif isinstance(item, BaseException):
            raise item
        else:
            results.append(item)
    judge.totals.busy_s += time.perf_counter() - started
    return {"results": results}


async def _pointwise(judge: Judge, pair: PairBody, how: How) -> dict[str, Any]:
    sides = [Item(problem=pair.problem, answer=answer) for answer in (pair.answer_a, pair.answer_b)]
    found = await asyncio.gather(*(judge.opinions(item, how) for item in sides))
    first, second = (score(opinions, judge.calibration).probability for opinions in found)
    return _better(right_one(first, second)) | {"scores": [first, second]}


async def _pairwise(judge: Judge, pair: PairBody, how: How) -> dict[str, Any]:
    votes = await judge.choices(pair.problem, (pair.answer_a, pair.answer_b), how)
    given = [vote for vote in votes if vote is not None]
    return _better(given.count("A") / len(given) if given else None) | {"votes": votes}


def _better(probability_a: float | None) -> dict[str, Any]:
    """The better answer; None where neither is, or nothing was said."""
    undecided = probability_a is None or probability_a == 0.5
    better = None if undecided else "A" if probability_a is not None and probability_a > 0.5 else "B"
    return {"better": better, "probability_a": probability_a}


def _metrics(totals: Totals) -> str:
    rows = (
        ("ctrl_judge_requests_total", "Requests.", totals.requests),
        ("ctrl_judge_items_total", "Answers and pairs asked about.", totals.items),
        ("ctrl_judge_cached_total", "Questions answered before.", totals.cached),
        ("ctrl_judge_abstained_total", "Answers scored without a judgement.", totals.abstained),
        ("ctrl_judge_errors_total", "Answers and pairs that could not be judged.", totals.errors),
        ("ctrl_judge_request_seconds_total", "Seconds of requests.", totals.busy_s),
    )
    return "".join(f"# HELP {name} {text}\n# TYPE {name} counter\n{name} {value}\n" for name, text, value in rows)


def identity(model: str, folder: str, *settings: Any) -> str:
    """What a critic's answers depend on: the names, sizes and times of its files, or its address; its prompts."""
    own = packaged() / folder
    prompts = sorted((own if own.is_dir() else Path(folder)).glob("*.j2"))
    texts = [file.read_text(encoding="utf-8") for file in (*prompts, packaged() / "comparison.j2")]
    if is_url(model):
        return content_hash(_READING, model, texts, settings)
    files = sorted(file for file in Path(model).resolve().iterdir() if file.is_file())
    facts = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return content_hash(_READING, facts, texts, settings)


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What is served, and how."""

    model: str
    """Hugging Face folder, or ``URL#MODEL`` of an OpenAI-compatible endpoint."""
    prompts: str = "default"
    """A packaged folder of templates, or another."""
    critique_prefix: str = ""
    """What every critique begins with."""
    critique_close: str = ""
    """What a critique without a judgement is continued after."""
    calibration: Path | None = None
    """File that ``ctrl-hpc calibrate`` made."""
    cache: Path | None = None
    """Folder of answers kept beyond this process."""
    threads: int = 2
    device: str = "cpu"
    dtype: str = "auto"
    batching: str = "padded"
    """continuous gives no other tokens' probabilities: an opinion's is then 1 or 0."""
    max_batch_tokens: int = 65536


def serve(
    options: Options,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    on_ready: Callable[[str], None] | None = None,
    token: str | None = None,
    own_user: bool = False,
) -> None:
    """Serve a critic until SIGTERM, SIGINT or SIGUSR2; ``on_ready`` gets the URL once it answers.

    Every route but ``/health`` and ``/metrics`` asks for a token, see :func:`http.access`. Raises ValueError for a
    missing model, template or calibration, and for a port in use.
    """
    token, own_user = http_service.access(host, token, own_user)
    asked = {"critique_prefix": options.critique_prefix, "critique_close": options.critique_close}
    prompts = Prompts.load(options.prompts, **asked)
    calibration = None if options.calibration is None else Calibration.load(options.calibration)
    if options.cache is not None:
        _make_cache(options.cache)
    sock = http_service.listen(host, port)
    try:
        generator, end = load_critic(options)
        name = identity(options.model, options.prompts, asked, options.batching, options.dtype)
        critic = Critic(generator=generator, prompts=prompts, comparison=comparison_template(None))
        judge = Judge(critic, name, calibration, options.cache)
        try:
            http_service.serve_until_told(create_app(judge), sock, on_ready, token, own_user)
        finally:
            judge.close()
            end()
    finally:
        sock.close()


def _make_cache(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"--cache {folder}: is no folder that can be written: {error.strerror}") from None


def load_critic(options: Options) -> tuple[Generator, Callable[[], None]]:
    """A folder's model in this process, or an endpoint; and what ends it. Raises ValueError where there is none."""
    if is_url(options.model):
        from ctrl_hpc.rollout.openai_client import OpenAIGenerator

        url, _, model = options.model.partition("#")
        if not model:
            raise ValueError(f"--model {options.model}: names no model; expected URL#MODEL")
        endpoint = OpenAIGenerator(url, model)
        return endpoint, endpoint.close
    from ctrl_hpc.rollout.server import open_worker
    from ctrl_hpc.rollout.weights import weight_files

    weight_files(options.model)

    def check(tokenizer: Any) -> None:
        if options.critique_close:
            words = options.critique_close
            check_close(tokenizer, closings(words), judgements(words), "--critique-close")

    worker, tokenizer = open_worker(
        options.model,
        device=options.device,
        threads=options.threads,
        dtype=options.dtype,
        batching=options.batching,
        max_batch_tokens=options.max_batch_tokens,
        check=check,
    )

    def end() -> None:
        worker.abort()  # nobody is there for whom it decodes
        worker.close()

    return LocalCritic(worker, tokenizer, top_logprobs=0 if options.batching == "continuous" else TOP), end
