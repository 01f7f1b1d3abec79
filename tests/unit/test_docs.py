"""Every command and every piece of code in README.md and docs/: run, run dry, or marked with what it needs.

Commands stand in blocks fenced as ``bash``, one a line. ``# needs: ...`` behind one says what a machine must have; such
a command is parsed all the same. Long commands are run dry here, and for real by the tests that :data:`FOR_REAL` names.
"""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from test_evaluate_paper import TURNS, ZERO, finished, row

from ctrl_hpc import cli, jsonl
from ctrl_hpc.config import ROOT, dump
from ctrl_hpc.judge import server as judge
from ctrl_hpc.records import Problem, StdinTest
from ctrl_hpc.rollout import server as rollout
from ctrl_hpc.rollout import worker as rollout_worker
from ctrl_hpc.sandbox import Sandbox
from ctrl_hpc.sandbox import server as executor

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "examples").glob("*/README.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#]+)(?:#[^)]*)?\)")
FOR_REAL = {
    "run": "tests/pipeline/test_tiny_run.py",
    "suite": "tests/pipeline/test_suite.py",
    "serve": "tests/sandbox/test_executor_server.py",
    "calibrate": "tests/unit/test_serve_judge.py",
    "convert": "tests/megatron/test_convert.py",
    "bench": "tests/megatron/test_memory.py",
    "make": "tests/pipeline/test_tiny_run.py",
    "sbatch": "tests/cluster/test_faults.py",
    "sync": "tests/cluster/test_sync.py",
    "logs": "tests/pipeline/test_tiny_run.py",
    "init": "tests/unit/test_init.py",
    "sweep": "tests/cluster/test_sweep.py",
}
"""Where the commands that are only run dry or parsed here are run."""
ROUTES = (
    "/run_code",
    "/submit",
    "/health",
    "/metrics",
    "/generate",
    "/v1/models",
    "/v1/chat/completions",
    "/v1/completions",
    "/score",
    "/critique",
    "/compare",
)
"""Routes of our services, asked by tests/sandbox/test_executor_server.py, tests/unit/test_rollout_server.py and
tests/unit/test_serve_judge.py."""
RUNS = ("tiny", "tiny-seed3", "tiny-rloo", "grpo-seed0", "grpo-seed1")
"""Finished runs that the pages speak of."""


def blocks(page: Path, *languages: str) -> list[str]:
    """The fenced blocks of a page in some languages."""
    return [body for language, body in FENCE.findall(page.read_text(encoding="utf-8")) if language in languages]


def commands(page: Path) -> list[tuple[str, str | None]]:
    """The commands of a page and what each needs."""
    out = []
    for block in blocks(page, "bash", "sh", "console"):
        for line in block.replace("\\\n", " ").splitlines():
            text, _, comment = line.partition(" #")
            if text.strip() and not text.lstrip().startswith("#"):
                needs = re.search(r"needs:\s*(.+)", comment)
                out.append((text.strip(), needs[1].strip() if needs else None))
    return out


CASES = [
    (page.relative_to(ROOT).as_posix().removeprefix("docs/"), command, needs)
    for page in PAGES
    for command, needs in commands(page)
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like the project's, with the files that the pages speak of."""
    folder = tmp_path_factory.mktemp("docs")
    for here in (folder, folder / "fresh"):  # the latter without the runs
        here.mkdir(exist_ok=True)
        for name in ("configs", "models", "ctrl_hpc", "slurm", "scripts", "images", "examples", "Makefile", "tests"):
            (here / name).symlink_to(ROOT / name)
    tests = (StdinTest(stdin="1 2\n", expected_stdout="3\n"),)
    jsonl.write(
        folder / "problems.jsonl",
        [
            Problem(id=f"{split}-1", source="ours", split=split, prompt=f"Print a sum, {split}.", tests=tests)
            for split in ("train", "test")
        ],
    )
    for index, name in enumerate(RUNS):
        rows = {"none": row(ZERO), "rl": row(TURNS, [-1, -1, 1, 1])}
        run = finished(folder / "runs" / name, f"seed={index}", "data.eval_names=[tiny]", critics=rows)
        run.results["datasets"] = {"tiny": run.results["datasets"]["codecontests"]}
        jsonl.write_text(run.folder / "config.yaml", dump(run.config))
        jsonl.write_text(run.folder / "report" / "results.json", json.dumps(run.results))
        line = {"step": 0, "time": 1_700_000_000.0, "time/step_s": 2.0, "time/wait_s": 1.0, "rl/reward": 0.5}
        jsonl.write_text(run.folder / "rl" / "metrics.jsonl", json.dumps(line) + "\n")
    return folder


def parse_alternatives(words: list[str]) -> list[str]:
    """``a|b|c`` in a synopsis stands for its first; capitals for something of one's own."""
    return [word.split("|")[0] if re.fullmatch(r"[\w-]+(\|[\w-]+)+", word) else word for word in words]


@pytest.mark.parametrize(("page", "command", "needs"), CASES, ids=[f"{page}: {text[:60]}" for page, text, _ in CASES])
def test_a_command(
    page: str, command: str, needs: str | None, place: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(place)
    words = parse_alternatives(shlex.split(command))
    program, arguments = words[0], words[1:]
    if program == "ctrl-hpc":
        cli._parse(arguments)
        if needs is None:
            ctrl_hpc(arguments)
    elif program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert arguments[0] in targets
    elif program == "python":
        subprocess.run([sys.executable, ROOT / arguments[0], "--help"], check=True, capture_output=True)
    elif program in ("sbatch", "export") or "/" in program:
        paths = re.findall(r"[\w.-]+(?:/[\w.-]+)+", command)
        assert paths, f"{page}: {command}: names no file"
        for path in paths:
            assert needs is not None or (ROOT / path).exists(), f"{page}: {command}: there is no {path}"
    elif program == "cp":
        subprocess.run(words, check=True)
        target = place / arguments[-1]
        assert target.exists()
        (shutil.rmtree if target.is_dir() else Path.unlink)(target)
    elif program == "source":
        assert arguments == [".venv/bin/activate"]  # which `make setup` makes, and says so
    elif program == "eval":
        inner = re.fullmatch(r"\$\((ctrl-hpc .*)\)", arguments[0])
        assert inner is not None and cli.main(inner[1].split()[1:]) == 0
    elif program == "curl":
        route = re.search(r"https?://[\w.-]+(?::\d+)?(/[\w/]+)", command)
        assert route is not None and route[1] in ROUTES, f"{page}: {command}: no such route"
        if "-d" in words:
            json.loads(words[words.index("-d") + 1])
    else:
        assert needs is not None, f"{page}: {command}: is neither run here nor marked with `# needs: ...`"


def ctrl_hpc(arguments: list[str]) -> None:
    """Run a command of ours: really where it is short, dry where it starts a run, else as parsed already."""
    name = arguments[0]
    placeholder = any(re.fullmatch(r"[A-Z_]{3,}(\.yaml)?|[\w.]+=[A-Z_]{3,}(\.yaml)?", word) for word in arguments)
    if name in ("run", "suite") and not placeholder:
        dry = arguments if "--dry-run" in arguments else [*arguments, "--dry-run"]
        folder = Path("my_prompts")
        with contextlib.chdir("fresh"):
            if Path("..", "problems.jsonl").exists():
                shutil.copy(Path("..", "problems.jsonl"), ".")
            if any("my_prompts" in word for word in arguments):
                shutil.copytree(ROOT / "ctrl_hpc" / "flow" / "templates" / "default", folder, dirs_exist_ok=True)
            assert cli.main(dry) == 0
    elif name in ("help", "completion", "data", "report", "status", "stop", "track", "timeline") and not placeholder:
        assert cli.main(arguments) == 0
    elif name == "doctor":
        assert cli.main(arguments) in (0, 1)  # it names what this machine lacks


def test_the_dashboard_shows_what_services_tell() -> None:
    """Every name in its queries is one of a service's ``/metrics``, or Prometheus' own."""
    dashboard = json.loads((ROOT / "examples" / "monitoring" / "dashboard.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    asked = {name for query in queries for name in re.findall(r"\b(?:executor|ctrl)_\w+", query)}
    with Sandbox(workers=1) as sandbox:
        metrics = executor.Metrics(sandbox)
        metrics.answered(["accepted"], 0.1)
        told = metrics.text().decode()
    worker = SimpleNamespace(totals=rollout_worker.Totals(), engine=SimpleNamespace(version=0), waiting=0)
    told += rollout._metrics(SimpleNamespace(worker=worker)) + judge._metrics(judge.Totals())
    known = set(re.findall(r"^(\w+)(?:\{| )", told, re.MULTILINE))
    assert asked <= known
    assert len(asked) > 10
    settings = yaml.safe_load((ROOT / "examples" / "monitoring" / "prometheus.yml").read_text())
    (job,) = settings["scrape_configs"]
    assert f'job="{job["job_name"]}"' in " ".join(queries)


def test_how_many_commands_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    marked = sum(needs is not None for _, _, needs in CASES)
    assert len(CASES) > 100
    with capsys.disabled():
        print(
            f"\n{len(CASES)} commands in {len(PAGES)} pages: {len(CASES) - marked} tried, {marked} name what they need"
        )


def test_what_is_run_dry_here_is_run_for_real_elsewhere() -> None:
    for path in FOR_REAL.values():
        assert (ROOT / path).exists()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_and_links(page: Path) -> None:
    for body in blocks(page, "python"):
        code = compile(body, str(page), "exec")
        if "launch(" not in body:
            exec(code, {})
    for body in blocks(page, "json"):
        json.loads(body)
    for body in blocks(page, "yaml"):
        yaml.safe_load(body)
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        assert "://" in link or (page.parent / link).exists(), f"{page.name}: {link} leads nowhere"


@pytest.mark.slow
def test_the_site_is_built_of_every_page(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(tmp_path / "site")]
    subprocess.run(command, cwd=ROOT, check=True)
    for page in (ROOT / "docs").glob("*.md"):
        made = tmp_path / "site" / ("" if page.stem == "index" else page.stem) / "index.html"
        assert "<h1" in made.read_text(encoding="utf-8"), page.name
    home = (tmp_path / "site" / "index.html").read_text(encoding="utf-8")
    titles = re.findall(r'class="md-nav__link[^"]*">\s*<span class="md-ellipsis">\s*(.*?)\s*<', home)
    assert {"A first run", "On your Slurm", "Architecture"} <= set(titles)
