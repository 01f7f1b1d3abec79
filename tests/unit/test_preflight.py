"""What can be known at the start is told then: the same words from a dry run, a run, a suite, a sweep, Python."""

import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

import ctrl_hpc
from ctrl_hpc import cli, preflight
from ctrl_hpc.config import load

WRONG = [
    ("eval.critics=[none,bse]", "eval.critics: 'bse' is not a critic; allowed: none, base, sft, rl, "),
    ("eval.critics=[none,rl] stages=[eval]", "eval.critics: rl has not been trained in "),
    ("eval.models={sft: /x}", "eval.models: 'sft' is not allowed as a name"),
    ("data.name=tacoo", "data.name: 'tacoo' is not a data set (did you mean taco?); allowed: tiny, "),
    ("data.eval_names=[tiny,hummaneval]", "data.eval_names: 'hummaneval' is not a data set (did you mean humaneval?)"),
    ("data.name=jsonl", "data.path: missing; the data set jsonl is a file of problems"),
    ("data.name=jsonl data.path=nowhere.jsonl", "data.path: {here}/nowhere.jsonl: no such file or folder"),
    ("data.name=jsonl data.path=no_tests.jsonl", "{here}/no_tests.jsonl:1: no tests"),
    ("data.eval_names=[jsonl] data.eval_path=no_tests.jsonl", "{here}/no_tests.jsonl"),
    ("data.benchmarks={mbpp: nowhere}", "data.benchmarks.mbpp: {here}/nowhere: no such file or folder"),
    ("prompts.folder=nowhere", "prompts.folder: 'nowhere' is no folder; allowed: ctrl, default, tiny, or "),
    ("prompts.folder=./prompts", "{here}/prompts/solution.j2"),
]
"""Wrong anywhere: a dry run refuses them, too."""
LACKING = [
    ("generator=nowhere/model", "generator: {here}/nowhere/model is not a Hugging Face model folder (it hol"),
    ("critic.model=Qwen/Qwen2.5-0.5B", "from the hub: hf download Qwen/Qwen2.5-0.5B --local-dir Qwen/Qwen2.5-0.5B"),
    ("eval.models={mine: nowhere} eval.critics=[none,mine]", "eval.models.mine: {here}/nowhere is not a Hugging Face"),
    (
        "generator=http://127.0.0.1:{closed}/v1 generator_model=m",
        "generator: http://127.0.0.1:{closed}/v1 does no",
    ),
    ("rollout.critic_urls=[http://127.0.0.1:{closed}]", "rollout.critic_urls: http://127.0.0.1:{closed}"),
    (
        "rollout.critic_urls=[http://127.0.0.1:{refusing}] rollout.critic_key_env=NO_SUCH",
        "rollout.critic_key_env: the environment variable NO_SUCH is not set",
    ),
    (
        "generator=http://127.0.0.1:{refusing}/v1 generator_model=m",
        "it is read from $OPENAI_API_KEY (endpoint.",
    ),
    ("launch.bind=192.0.2.1", "launch.bind: 192.0.2.1: no service can listen there"),
]
"""Of this machine: a dry run notes them."""


class Refusing(BaseHTTPRequestHandler):
    """An endpoint that takes no key."""

    def do_GET(self) -> None:
        self.send_response(401)
        self.end_headers()

    def log_message(self, format: str, *arguments: object) -> None:
        """Say nothing."""


@pytest.fixture
def names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """What the cases speak of: a folder with files, a port nobody listens on, an endpoint that refuses."""
    monkeypatch.chdir(tmp_path)
    problem = '{"id": "a", "source": "ours", "split": "train", "prompt": "Print 1.", "tests": []}\n'
    (tmp_path / "no_tests.jsonl").write_text(problem)
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "solution.j2").write_text("{{ problem.prompt")
    with socket.socket() as closed, HTTPServer(("127.0.0.1", 0), Refusing) as server:
        closed.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        ports = {"closed": str(closed.getsockname()[1]), "refusing": str(server.server_address[1])}
        yield {"here": str(tmp_path), **ports}
        server.shutdown()
        thread.join()


def filled(text: str, names: dict[str, str]) -> str:
    for name, value in names.items():
        text = text.replace(f"{{{name}}}", value)
    return text


def overrides(text: str, names: dict[str, str]) -> list[str]:
    words: list[str] = []
    for word in filled(text, names).split(" "):
        if "=" in word:
            words.append(word)
        else:
            words[-1] += f" {word}"
    return words


@pytest.mark.parametrize(("given", "told"), WRONG)
@pytest.mark.parametrize("dry", [True, False])
def test_what_is_wrong_is_refused(
    given: str, told: str, dry: bool, names: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(Path.cwd().rglob("*"))
    assert cli.main(["run", "tiny", *overrides(given, names), *["--dry-run"] * dry]) == 2
    said = capsys.readouterr()
    assert filled(told, names) in said.err and said.err.count("\n") == 1
    assert said.out == ""
    assert sorted(Path.cwd().rglob("*")) == before


@pytest.mark.parametrize(("given", "told"), LACKING)
def test_what_is_lacking_here_ends_a_run(
    given: str, told: str, names: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    config = load("tiny", overrides(given, names))
    found = list(preflight.findings(config))
    assert any(filled(told, names) in finding.text and finding.here for finding in found)
    assert cli.main(["run", "tiny", *overrides(given, names)]) == 2
    assert filled(told, names) in capsys.readouterr().err


def test_a_dry_run_notes_what_is_lacking_here(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", "humaneval", "--dry-run", "generator=/no/model", f"run_dir={tmp_path}/run"]) == 0
    assert "# missing here: generator: /no/model is not a Hugging Face model folder" in capsys.readouterr().out


def test_suites_sweeps_and_python_say_the_same(names: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["suite", "tiny_ablation", "eval.critics=[bse]"]) == 2
    assert "grpo-seed0: eval.critics: 'bse' is not a critic" in capsys.readouterr().err
    assert cli.main(["sweep", "learning_rate", "--local", "eval.critics=[bse]"]) == 2
    assert "trial-000: eval.critics: 'bse' is not a critic" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"^eval\.critics: 'bse' is not a critic"):
        ctrl_hpc.launch("tiny", "eval.critics=[bse]")
    assert not Path("runs").exists()


def test_a_disk_too_small_for_training_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = preflight.shutil.disk_usage(tmp_path)._replace(free=2_000_000)
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda place: usage)
    (finding,) = preflight.findings(load("tiny", [f"run_dir={tmp_path}/run"]))
    assert finding.here and "0.0 GB are free; training " in finding.text and "writes at least 0.0 GB" in finding.text


def test_closing_words_that_leave_no_room_for_a_judgement_are_told(tmp_path: Path) -> None:
    """In the critic's own tokens, its judgement and the end of a block of code among them."""
    room = [f"{section}.max_tokens=100" for section in ("synthesize", "rl", "eval")]
    for words, wrong in (
        ("Overall judgment:", False),
        ("In one of the two words that you know, what you think:", True),
    ):
        config = load("tiny", [f"prompts.critique_close='{words}'", *room, f"run_dir={tmp_path / 'run'}"])
        told = [finding.text for finding in preflight.findings(config) if "critique_close" in finding.text]
        assert bool(told) == wrong
        assert all("tokens, line breaks and judgement among them; at most 31" in one for one in told)
