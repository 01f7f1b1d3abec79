"""What spreading work costs the one who spreads it: CPU time of the client a program, by the number of servers.

All servers listen in one process beside this one and answer at once what every program deserves, so that the client
alone is measured, discovery of the servers through a run directory included. The floor is the same number of bare
requests to the same servers.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import itertools
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

import aiohttp
from rich.console import Console
from rich.table import Table

from ctrl_hpc.cluster.registry import Registry
from ctrl_hpc.cluster.services import WATCH_S
from ctrl_hpc.records import Execution, Limits, StdinTest
from ctrl_hpc.sandbox.client import ExecutorClient

ROUNDS = 3
_LIMITS = Limits()
_numbers = itertools.count()


class _Fake(asyncio.Protocol):
    """A connection to a fake executor, which accepts every program."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin with nothing read."""
        self._transport, self._read = transport, b""

    def data_received(self, data: bytes) -> None:
        """Answer the requests that are there in full."""
        self._read += data
        while (end := self._read.find(b"\r\n\r\n")) >= 0:
            length = int(self._read[:end].lower().partition(b"content-length:")[2].split(b"\r\n")[0] or b"0")
            if len(self._read) < end + 4 + length:
                return
            body, self._read = self._read[end + 4 : end + 4 + length], self._read[end + 4 + length :]
            verdict = '{"status":"accepted","tests":[{"status":"accepted","stdout":{"base64":"MQo="},"exit_code":0}]}'
            text = f'{{"verdicts":[{",".join([verdict] * body.count(b"program"))}]}}'
            head = f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {len(text)}\r\n\r\n"
            self._transport.write((head + text).encode())  # type: ignore[attr-defined]


def _serve(count: int, ports: Connection) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        servers = [await loop.create_server(_Fake, "127.0.0.1", 0) for _ in range(count)]
        ports.send([server.sockets[0].getsockname()[1] for server in servers])
        await asyncio.Event().wait()

    asyncio.run(main())


@contextmanager
def fakes(count: int) -> Iterator[list[str]]:
    """URLs of so many fake executors in one process."""
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    with _process(_serve, count, theirs):
        yield [f"http://127.0.0.1:{port}" for port in ours.recv()]


@contextmanager
def _process(target: Callable[..., None], *arguments: object) -> Iterator[None]:
    process = multiprocessing.get_context("spawn").Process(target=target, args=arguments, daemon=True)
    process.start()
    try:
        yield
    finally:
        process.terminate()
        process.join()


@contextmanager
def registered(urls: Sequence[str]) -> Iterator[Registry]:
    """A registry in which all of these are alive, and as many of another role; a driver looks at them."""
    with tempfile.TemporaryDirectory() as folder:
        for role in ("executor", "critic"):
            with Registry(folder, heartbeat_s=3600).register(role, "", id="0"):
                entry = json.loads((Path(folder) / "services" / role / "0.json").read_text())
            for number, url in enumerate(urls):
                text = json.dumps(entry | {"url": url, "id": str(number), "machine": "elsewhere"})
                (Path(folder) / "services" / role / f"{number}.json").write_text(text)
        _look(Registry(folder, dead_after_s=3600))
        with _process(_drive, folder):
            yield Registry(folder, dead_after_s=3600)


def _drive(folder: str) -> None:
    registry = Registry(folder, dead_after_s=3600)
    while True:
        _look(registry)
        time.sleep(WATCH_S)


def _look(registry: Registry) -> None:
    """What a driver does about once a second."""
    registry.write_list(registry.census()[0])


def _programs(count: int) -> list[Execution]:
    tests = (StdinTest(stdin="1\n", expected_stdout="1\n"),)
    return [Execution(program=f"print(input())  # {next(_numbers)}", tests=tests, limits=_LIMITS) for _ in range(count)]


async def _bare(urls: Sequence[str], count: int, lanes: int) -> None:
    """The floor: so many requests of one program, without anything around them."""
    body = b'{"executions":[{"program":"print(input())","tests":[]}]}'
    left = iter(range(count))
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def lane(url: str) -> None:
            for _ in left:
                async with session.post(f"{url}/run_tests", data=body) as answer:
                    await answer.json()

        await asyncio.gather(*(lane(url) for url in [*urls] * lanes))


@dataclasses.dataclass(frozen=True, slots=True)
class Cost:
    """Of one program: CPU time of the client and of a bare request; and programs a second."""

    client_ms: float
    bare_ms: float
    per_s: float


def measure(servers: int, programs: int, calls: int) -> Cost:
    """Medians of rounds in which the client and bare requests take turns."""
    rounds = []
    with fakes(servers) as urls, registered(urls) as registry:
        with ExecutorClient(lambda: registry.endpoints("executor")) as client:
            client.run_many(_programs(programs))
            for _ in range(ROUNDS):
                batches = [_programs(programs) for _ in range(calls)]
                began, cpu = time.perf_counter(), time.process_time()
                for batch in batches:
                    assert all(verdict.accepted for verdict in client.run_many(batch))
                spent, wall = time.process_time() - cpu, time.perf_counter() - began
                cpu = time.process_time()
                asyncio.run(_bare(urls, programs * calls, 4))
                bare, count = time.process_time() - cpu, programs * calls
                rounds.append(Cost(1000 * spent / count, 1000 * bare / count, count / wall))
    return Cost(*(statistics.median(values) for values in zip(*map(dataclasses.astuple, rounds), strict=True)))


def main() -> None:
    """The command's arguments."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--servers", type=int, nargs="+", default=[1, 10, 100, 1000])
    parser.add_argument("--programs", type=int, default=1024, help="of a call (default: 1024)")
    parser.add_argument("--calls", type=int, default=4, help="one after the other, a round (default: 4)")
    options = parser.parse_args()
    table = Table("servers", "client CPU ms/program", "bare request", "ratio", "programs/s", title="ExecutorClient")
    for column in table.columns:
        column.justify = "right"
    for servers in options.servers:
        cost = measure(servers, options.programs, options.calls)
        ratio = f"{cost.client_ms / cost.bare_ms:.2f}"
        table.add_row(str(servers), f"{cost.client_ms:.3f}", f"{cost.bare_ms:.3f}", ratio, f"{cost.per_s:.0f}")
    Console().print(table)


if __name__ == "__main__":
    main()
