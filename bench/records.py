"""Reading and writing records as JSON lines, in multiples of what the bare ``json`` module takes; and their size.

``--against REVISION`` measures the codec as it was at a commit, beside today's and in turn with it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from rich.console import Console
from rich.table import Table

from ctrl_hpc import jsonl
from ctrl_hpc.train.rollouts import Rollout, record_file, single_precision

ROUNDS, GROUP = 7, 8


def rollouts(count: int, prompt_tokens: int, completion_tokens: int) -> list[Rollout]:
    """Rollouts as training records them, eight a draft, of random tokens and words: real ones compress better."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 8))) for _ in range(2000)]
    prompts = [tuple(draw.choices(range(150_000), k=prompt_tokens)) for _ in range(count // GROUP + 1)]
    return [
        Rollout(
            solution_id=f"problem-{n // GROUP}/0",
            critique=" ".join(draw.choices(words, k=completion_tokens * 3 // 5)),
            judgement="incorrect",
            draft_accepted=False,
            revision=f"```python\n{' '.join(draw.choices(words, k=250))}\n```\n",
            kept=False,
            status="accepted",
            reward=1.0,
            reason="fix",
            masked=False,
            prompt_ids=prompts[n // GROUP],
            token_ids=tuple(draw.choices(range(150_000), k=completion_tokens)),
            logprobs=tuple(single_precision(-draw.expovariate(3.0)) for _ in range(completion_tokens)),
            finish_reason="stop",
            version=n,
        )
        for n in range(count)
    ]


def codec_at(revision: str) -> ModuleType:
    """The module ``jsonl`` of a commit."""
    source = subprocess.run(
        ["git", "show", f"{revision}:ctrl_hpc/jsonl.py"], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    if source.returncode:
        raise SystemExit(f"--against {revision}: {source.stderr.strip()}")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "jsonl.py"
        file.write_text(source.stdout)
        spec = importlib.util.spec_from_file_location(f"jsonl_{revision}", file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


def _bare_read(_: Any, file: Path) -> list[Any]:
    with open(file, encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def main() -> None:
    """The command's arguments."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rollouts", type=int, default=256)
    parser.add_argument("--prompt-tokens", type=int, default=768)
    parser.add_argument("--completion-tokens", type=int, default=768)
    parser.add_argument("--against", metavar="REVISION", help="a commit whose codec is measured, too")
    options = parser.parse_args()
    made = rollouts(options.rollouts, options.prompt_tokens, options.completion_tokens)
    codecs = {"now": jsonl} | ({options.against: codec_at(options.against)} if options.against else {})
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rollouts.jsonl"
        jsonl.write(file, made)
        data = _bare_read(None, file)
        rows: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
            "bare json": (lambda: _bare_read(None, file), lambda: [json.dumps(item) for item in data])
        }
        for name, codec in codecs.items():
            assert codec.read(Rollout, file) == made and "".join(map(codec.line, made)) == file.read_text()
            rows[name] = (
                lambda codec=codec: codec.read(Rollout, file),
                lambda codec=codec: list(map(codec.line, made)),
            )
        times: dict[str, list[list[float]]] = {name: [[], []] for name in rows}
        for _ in range(ROUNDS):
            for name, works in rows.items():
                for kept, work in zip(times[name], works, strict=True):
                    began = time.process_time()
                    work()
                    kept.append(1000 * (time.process_time() - began))
        zipped = record_file(Path(folder), 0)
        jsonl.write(zipped, made)
        sizes = [place.stat().st_size / 1e6 for place in (file, zipped)]
    table = Table("codec", "read, ms", "x json", "write, ms", "x json", title=f"{options.rollouts} rollouts")
    bare = [statistics.median(values) for values in times["bare json"]]
    for name, values in times.items():
        read, write = map(statistics.median, values)
        table.add_row(name, f"{read:.0f}", f"{read / bare[0]:.2f}", f"{write:.0f}", f"{write / bare[1]:.2f}")
    Console().print(table)
    print(f"{sizes[0]:.1f} MB of lines, {sizes[1]:.1f} MB compressed, as they are recorded")


if __name__ == "__main__":
    main()
