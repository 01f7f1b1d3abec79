"""Who may ask a service, and what is believed of what lies in a run directory."""

from __future__ import annotations

import json
import os
import shutil
import socket
import stat
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import pytest
import uvicorn

from ctrl_hpc import cli
from ctrl_hpc.cluster.registry import Registry
from ctrl_hpc.service import access, http

needs_root = pytest.mark.skipif(os.getuid() != 0, reason="becoming another user needs root")
TOKEN = "a-token"


async def _app(scope: http.Scope, receive: http.Receive, send: http.Send) -> None:
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
    await send({"type": "http.response.body", "body": b""})


@pytest.fixture(scope="module")
def urls() -> Iterator[dict[bool, str]]:
    """A service that asks for its token, and one that spares its own user."""
    servers = []
    found = {}
    for own_user in (False, True):
        sock = http.listen("127.0.0.1", 0)
        gate = http.Gate(_app, token=TOKEN, max_body_bytes=1000, open_paths=frozenset({"/health"}), own_user=own_user)
        config = uvicorn.Config(gate, log_config=None, log_level="critical", lifespan="off", http=http.Protocol)
        server = http.DrainingServer(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
        thread.start()
        servers.append((server, thread, sock))
        found[own_user] = http.url(sock)
    yield found
    for server, thread, sock in servers:
        server.should_exit = True
        thread.join()
        sock.close()


def status(url: str, **headers: str) -> int:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_a_token_is_asked_for_on_loopback(urls: dict[bool, str]) -> None:
    for url in urls.values():
        assert status(f"{url}/run", authorization=f"Bearer {TOKEN}") == 200
        assert status(f"{url}/run", authorization="Basic OmEtdG9rZW4=") == 200  # :a-token, as from a URL
        assert status(f"{url}/run", authorization="Bearer other") == status(f"{url}/run", authorization="x") == 401
        assert status(f"{url}/run", authorization="") == status(f"{url}/run", authorization="Basic \xff") == 401
        assert status(f"{url}/health") == 200
    assert status(f"{urls[False]}/run") == 401
    assert status(f"{urls[True]}/run") == 200  # its own user
    assert status(f"{urls[True]}/run", origin="http://page.example") == 401  # a web page in its user's browser


@needs_root
def test_another_user_of_the_node_needs_the_token(urls: dict[bool, str]) -> None:
    ask = f"""
import urllib.request
print(urllib.request.urlopen({urls[True]!r} + "/run", timeout=10).status)
"""
    python = shutil.which("python3", path="/usr/bin:/usr/local/bin") or sys.executable
    command = ["setpriv", "--reuid=54321", "--regid=54321", "--clear-groups", "--", python, "-I", "-c", ask]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/", timeout=60, check=False)
    assert "HTTP Error 401" in done.stderr, done


def test_who_asks_and_closes_belongs_to_nobody(urls: dict[bool, str]) -> None:
    host, port = urls[True].removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as asking:
        ours, theirs = asking.getsockname(), asking.getpeername()
        scope = {"client": ours, "server": theirs, "headers": []}
        assert http._of_own_user(scope)
        assert not http._of_own_user({**scope, "client": ("10.0.0.1", ours[1])})
    assert not http._of_own_user(scope)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_connection_belongs_to_one_user_however_the_kernel_is_asked(host: str) -> None:
    with http.listen(host, 0) as server:
        client = socket.create_connection(server.getsockname()[:2])
        ours, theirs = client.getsockname()[:2], client.getpeername()[:2]
        state, user, inode = access._looked_up(ours, theirs) or (0, 0, 0)
        assert (state, user, inode) == (1, os.geteuid(), os.fstat(client.fileno()).st_ino)
        assert access._asked(ours, theirs) in [(state, user, inode), None]  # None where the kernel has no tcp_diag
        assert access.user_of_connection(ours, theirs) == os.geteuid()
        assert access.user_of_connection((host, 1), theirs) is None  # a listening socket is no connection
        client.close()
        assert access.user_of_connection(ours, theirs) is None


def test_serving_other_machines_without_a_token_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["serve", "executor", "--host", "0.0.0.0", "--port", "0"]) == 2
    assert cli.main(["serve", "rollout", "--model", str(tmp_path), "--host", "::", "--port", "0"]) == 2
    assert capsys.readouterr().err.count("so a token is needed (--token-env NAME)") == 2


def test_a_token_is_made_once_and_again_where_a_full_disk_left_an_empty_one(tmp_path: Path) -> None:
    file = tmp_path / "services" / "token"
    with ThreadPoolExecutor(8) as pool:
        tokens = set(pool.map(lambda _: http.token_in(file), range(32)))
    assert len(tokens) == 1 and len(tokens.pop()) >= 32
    assert stat.S_IMODE(file.stat().st_mode) == 0o600 and stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    assert [entry.name for entry in file.parent.iterdir()] == ["token"]
    file.write_text("")
    assert len(http.token_in(file)) >= 32


@needs_root
def test_what_another_user_wrote_is_not_believed(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    with registry.register("executor", "http://127.0.0.1:1", id="0"):
        (entry,) = (tmp_path / "services" / "executor").glob("*.json")
        os.chown(entry, 54321, 54321)
        assert Registry(tmp_path).services() == []
    token = tmp_path / "token"
    token.write_text("planted")
    os.chown(token, 54321, 54321)
    with pytest.raises(ValueError, match="is not this user's file"):
        http.token_in(token)


ODD = [b"", b"null", b"[]", b"5", b'"a"', b"{}", b"\xff\xfe", b"[" * 50_000, b'{"role":1}', b"x" * 200_000]


def test_no_odd_file_stops_a_reader_of_the_registry(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    with registry.register("executor", "http://127.0.0.1:1", id="0"):
        (service,) = Registry(tmp_path).services()
        folder = tmp_path / "services" / "executor"
        good = asdict(service)
        wrong = [{**good, "pid": "1"}, {**good, "url": None}, {**good, "started": []}, {**good, "pid": True}]
        for index, content in enumerate([*ODD, *(json.dumps(item).encode() for item in wrong)]):
            (folder / f"odd{index}.json").write_bytes(content)
        (folder / "folder.json").mkdir()
        (folder / "link.json").symlink_to("/etc/passwd")
        os.mkfifo(folder / "pipe.json")
        began = time.monotonic()
        assert Registry(tmp_path).services() == [service] and time.monotonic() - began < 5


def test_a_run_directory_is_its_owners_alone(tmp_path: Path) -> None:
    new, old = tmp_path / "runs" / "new", tmp_path / "old"
    access.make_private(new)
    old.mkdir()
    old.chmod(0o775)
    access.make_private(old)
    assert stat.S_IMODE(new.stat().st_mode) == 0o700 and stat.S_IMODE(old.stat().st_mode) == 0o755


def test_connections_that_say_nothing_or_little_are_closed(
    urls: dict[bool, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "FIRST_S", 0.3)
    host, port = urls[False].removeprefix("http://").split(":")
    slow = [b"", b"GET / HT", b"GET /health HTTP/1.1\r\nhost: x\r\na: b"]
    for sent in slow:
        with socket.create_connection((host, int(port)), timeout=5) as idle:
            idle.sendall(sent)
            assert idle.recv(100) == b""
    with socket.create_connection((host, int(port)), timeout=5) as again:
        again.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\nGET /hea")
        assert again.recv(1000).startswith(b"HTTP/1.1 200") and again.recv(1000) == b""


def test_many_idle_connections_keep_nobody_out(urls: dict[bool, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "MOST_IDLE", 50)
    monkeypatch.setattr(http, "_YOUNG_S", 0.0)
    host, port = urls[False].removeprefix("http://").split(":")
    idle = [socket.create_connection((host, int(port)), timeout=5) for _ in range(150)]
    assert status(f"{urls[False]}/health") == 200
    assert idle[0].recv(1) == b""  # the oldest went
    idle[-1].sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
    assert idle[-1].recv(100).startswith(b"HTTP/1.1 200")
    for one in idle:
        one.close()


def test_a_flood_of_headers_is_refused(urls: dict[bool, str]) -> None:
    host, port = urls[False].removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=5) as flood:
        flood.sendall(b"GET /health HTTP/1.1\r\n")
        said = b""
        try:
            for _ in range(1000):
                flood.sendall(b"a: " + b"b" * 1000 + b"\r\n")
            said = flood.recv(1000)
        except ConnectionError:
            return
    assert said.startswith(b"HTTP/1.1 400")


def test_a_body_that_stops_ends_its_request(urls: dict[bool, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "_BODY_S", 0.2)
    host, port = urls[False].removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=5) as slow:
        slow.sendall(b"POST /health HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\nab")
        assert slow.recv(100).startswith(b"HTTP/1.1 200")  # this application answers what it got
