"""A loopback server of as much of W&B as `wandb sync`, online runs, `wandb sweep` and `wandb agent` ask for."""

from __future__ import annotations

import base64
import contextlib
import json
import re
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "local-" + "0123456789" * 4


class Store:
    """What was sent, as the tests look at it."""

    def __init__(self) -> None:
        self.runs: dict[str, dict[str, Any]] = {}
        """By run id: group, job type, state, config, summary, and history as rows."""
        self.sweeps: dict[str, dict[str, Any]] = {}
        """By sweep id: its configuration and the trials handed out."""
        self.artifacts: list[tuple[str, str]] = []
        """Type and name of every artifact committed."""
        self.files: dict[str, bytes] = {}
        """Uploaded files by the last part of their URL."""
        self.asked: list[str] = []
        """Operations, in order."""
        self.stops: Callable[[str, list[float]], bool] = lambda run, values: False
        """Early termination: whether to stop a run of a sweep that has logged these values of the sweep's metric."""
        self.stopped: list[str] = []
        """Runs that an agent was told to stop."""
        self.refuse: Callable[[str], int] = lambda path: 0
        """The HTTP status with which a request to this path is refused; 0: it is answered."""
        self.lock = threading.RLock()

    def run(self, id: str) -> dict[str, Any]:
        empty: dict[str, Any] = {"group": None, "type": None, "sweep": None, "config": {}, "summary": {}, "rows": []}
        return self.runs.setdefault(id, empty)

    def trials(self, sweep: str) -> Iterator[dict[str, Any]]:
        """A grid over the sweep's parameters, each trial once."""
        grid: list[dict[str, Any]] = [{}]
        for name, choice in self.sweeps[sweep]["config"]["parameters"].items():
            choices = choice["values"] if "values" in choice else [choice["value"]]
            grid = [{**point, name: value} for point in grid for value in choices]
        yield from grid


def node(store: Store, id: str, new: bool) -> dict[str, Any]:
    """A run as GraphQL shows it."""
    run = store.run(id)
    project = {"id": "p", "name": "ctrl-hpc", "entity": {"id": "e", "name": "tests"}}
    history = [json.dumps(row) for row in run["rows"][-1:]]
    return {
        "id": base64.b64encode(id.encode()).decode(),
        "name": id,
        "displayName": id,
        "project": project,
        "sweepName": run["sweep"],
        "historyLineCount": len(run["rows"]),
        "logLineCount": 0,
        "eventsLineCount": 0,
        "historyTail": json.dumps(history),
        "eventsTail": "[]",
        "summaryMetrics": json.dumps(run["summary"]),
        "config": json.dumps({key: {"value": value} for key, value in run["config"].items()}),
        "tags": [],
        "wandbConfig": None if new else json.dumps({"t": 1}),  # "t": it has begun
    }


class Handler(BaseHTTPRequestHandler):
    """GraphQL, the history stream, and uploads."""

    protocol_version = "HTTP/1.1"
    store: Store

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def answer(self, body: Any) -> None:
        data = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def body(self) -> bytes:
        if self.headers.get("transfer-encoding", "").lower() == "chunked":
            data = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return data
        return self.rfile.read(int(self.headers.get("content-length") or 0))

    def do_GET(self) -> None:
        self.answer({})

    def refused(self) -> bool:
        """Whether this request is one of those to be refused; it then has its answer."""
        with self.store.lock:
            status = self.store.refuse(self.path)
        if status:
            self.send_response(status)
            self.send_header("content-length", "0")
            self.end_headers()
        return bool(status)

    def do_PUT(self) -> None:
        body = self.body()
        if self.refused():
            return
        with self.store.lock:
            self.store.files[self.path.rpartition("/")[2]] = body
        self.answer({})

    def do_POST(self) -> None:
        body = self.body()
        if self.refused():
            return
        stream = re.fullmatch(r"/+files/.*/([^/]+)/file_stream", self.path)
        with self.store.lock:
            if stream:
                self.answer(self.stream(stream[1], json.loads(body)))
            elif self.path == "/graphql":
                data = json.loads(body)
                name = re.search(r"(?:mutation|query)\s+(\w+)", data["query"])
                self.store.asked.append(name[1] if name else "")
                self.answer({"data": self.operation(data["query"], data.get("variables") or {})})
            else:
                self.answer({})  # telemetry

    def stream(self, id: str, data: dict[str, Any]) -> dict[str, Any]:
        run = self.store.run(id)
        for name, file in (data.get("files") or {}).items():
            if name == "wandb-history.jsonl":
                run["rows"][file["offset"] :] = [json.loads(line) for line in file["content"]]
            elif name == "wandb-summary.json":
                run["summary"].update(json.loads(file["content"][-1]))
        if data.get("complete"):
            run["exitcode"] = data.get("exitcode")
        return {"exitcode": None, "limits": {}}

    def operation(self, query: str, given: dict[str, Any]) -> dict[str, Any]:
        store, host = self.store, self.headers["host"]
        given = given.get("input", given)
        if "upsertSweep" in query:
            sweep = f"sweep{len(store.sweeps)}"
            import yaml

            store.sweeps[sweep] = {"config": yaml.safe_load(given["config"]), "given": 0, "agents": 0}
            project = {"name": "ctrl-hpc", "entity": {"name": "tests"}}
            return {"upsertSweep": {"sweep": {"name": sweep, "project": project}, "configValidationWarnings": []}}
        if "createAgent" in query:
            store.sweeps[given["sweep"]]["agents"] += 1
            return {"createAgent": {"agent": {"id": f"{given['sweep']}/agent"}}}
        if "agentHeartbeat" in query:
            return {"agentHeartbeat": {"agent": {"id": given["id"]}, "commands": json.dumps(self.next_trial(given))}}
        if "upsertBucket" in query:
            id = given.get("name") or base64.b64decode(given["id"]).decode()
            new = id not in store.runs
            run = store.run(id)
            run["group"] = given.get("groupName") or run["group"]
            run["type"] = given.get("jobType") or run["type"]
            run["sweep"] = given.get("sweep") or run["sweep"]
            config = json.loads(given.get("config") or "{}")
            run["config"].update({key: item["value"] for key, item in config.items() if key != "_wandb"})
            return {"upsertBucket": {"bucket": node(store, id, new), "inserted": new}}
        if "createRunFiles" in query:
            files = [{"name": file, "uploadUrl": f"http://{host}/put/{file}"} for file in given["files"]]
            return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}
        if "createArtifactManifest" in query:
            file = {"id": "f", "name": "m", "displayName": "m", "uploadUrl": f"http://{host}/put/manifest"}
            file |= {"uploadHeaders": []}
            return {"createArtifactManifest": {"artifactManifest": {"id": "m", "file": file}}}
        if "createArtifactFiles" in query:
            urls = [f"http://{host}/put/{item['name'].replace('/', '_')}" for item in given["artifactFiles"]]
            edges = [
                {"node": {"id": "f", "name": item["name"], "displayName": item["name"], "uploadUrl": url,
                          "uploadHeaders": [], "storagePath": item["name"], "uploadMultipartUrls": None,
                          "artifact": {"id": "a"}}}
                for item, url in zip(given["artifactFiles"], urls, strict=True)
            ]  # fmt: skip
            return {"createArtifactFiles": {"files": {"edges": edges}}}
        if "createArtifact(" in query:
            store.artifacts.append((given["artifactTypeName"], given["artifactCollectionName"]))
            latest = {"id": "s", "latestArtifact": None}
            return {"createArtifact": {"artifact": {"id": "a", "state": "PENDING", "artifactSequence": latest}}}
        if "commitArtifact" in query:
            return {"commitArtifact": {"artifact": {"id": "a", "digest": "d"}}}
        if "viewer" in query.lower():
            teams = {"edges": [{"node": {"id": "e", "name": "tests"}}]}
            viewer = {"id": "u", "entity": "tests", "username": "tests", "email": "", "flags": "{}", "teams": teams}
            return {"viewer": viewer, "serverInfo": {"cliVersionInfo": {}, "features": []}}
        if re.search(r"\bartifact\(", query):  # is there an artifact of this name already?
            return {"project": {"artifact": None}}
        if "sweep(" in query:
            sweep = store.sweeps[given.get("sweep") or given["name"]]
            runs = {"edges": []}
            text = json.dumps(sweep["config"])
            shown = {"id": "s", "name": given.get("sweep"), "config": text, "runs": runs, "state": "RUNNING"}
            return {"project": {"sweep": shown}}
        if "bucket(" in query:
            id = given.get("name") or given.get("run")
            known = node(store, id, False) if id in store.runs else None
            return {"model": {"bucket": known}, "project": {"run": known}}
        return {"serverInfo": {"features": []}}

    def next_trial(self, given: dict[str, Any]) -> list[dict[str, Any]]:
        id = given["id"].partition("/")[0]
        sweep = self.store.sweeps[id]
        running = [run for run, runs in json.loads(given.get("runState") or "{}").items() if runs]
        if running:
            metric = sweep["config"]["metric"]["name"]
            values = {run: [row[metric] for row in self.store.run(run)["rows"] if metric in row] for run in running}
            late = [run for run in running if self.store.stops(run, values[run])]
            self.store.stopped += late
            return [{"type": "stop", "run_id": run} for run in late]
        trials = list(self.store.trials(id))
        if sweep["given"] == len(trials):
            return [{"type": "exit"}]
        number = sweep["given"]
        sweep["given"] += 1
        arguments = {name: {"value": value} for name, value in trials[number].items()}
        return [{"type": "run", "run_id": f"{id}-trial{number}", "args": arguments, "program": "train.py"}]


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: Any) -> None:
        """A client that went away is no news; anything else is."""
        if not isinstance(sys.exception(), ConnectionError):
            traceback.print_exc()


@contextlib.contextmanager
def running() -> Iterator[tuple[Store, dict[str, str]]]:
    """What was sent, and the environment that has wandb send it here."""
    store = Store()
    handler = type("BoundHandler", (Handler,), {"store": store})
    server = _Server(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield store, {"WANDB_BASE_URL": url, "WANDB_API_KEY": KEY, "WANDB_ENTITY": "tests"}
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
