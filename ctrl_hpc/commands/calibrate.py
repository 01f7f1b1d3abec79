"""``ctrl-hpc calibrate``: the file that makes a judge's probabilities those of a development set."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ctrl_hpc.commands.output import check_file, place

_ITEMS = 64
"""Answers of a request."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Labelled:
    """A line of the development set."""

    problem: str
    answer: str
    right: bool
    starter_code: str | None = None
    language: str | None = None


def add(parser: argparse.ArgumentParser) -> None:
    """Its arguments."""
    parser.add_argument("url", metavar="URL", help="of a judge that runs: ctrl-hpc serve judge")
    parser.add_argument("dev", metavar="DEV.jsonl", help='a line an answer: {"problem", "answer", "right": true|false}')
    parser.add_argument("--out", type=place, required=True, help="file for serve judge --calibration")
    parser.add_argument("--method", choices=["platt", "isotonic"], default="platt", help="isotonic: from about 1000 on")
    parser.add_argument("--votes", type=int, default=1, help="opinions of an answer, as it will be asked (default: 1)")
    parser.add_argument("--token-env", default=None, help="environment variable with the judge's bearer token")
    parser.set_defaults(command=calibrate)


def calibrate(options: argparse.Namespace) -> int:
    """Ask the judge about every answer, fit, and tell how well calibrated it is, held out, before and after."""
    from ctrl_hpc import jsonl
    from ctrl_hpc.evaluate.calibration import brier, expected_calibration_error, fit, held_out

    check_file(options.out, "--out", inputs=[options.dev])
    if not Path(options.dev).is_file():
        raise ValueError(f"{options.dev}: no such file")
    labelled = jsonl.read(Labelled, options.dev)
    if len(labelled) < 10:
        raise ValueError(f"{options.dev}: {len(labelled)} answers; at least 10 are needed")
    n_right = sum(item.right for item in labelled)
    if not 0 < n_right < len(labelled):
        raise ValueError(f"{options.dev}: {len(labelled)} answers of which {n_right} are right; both kinds are needed")
    raw = _scores(options, labelled)
    judged = [(score, item.right) for score, item in zip(raw, labelled, strict=True) if score is not None]
    scores, right = [score for score, _ in judged], [label for _, label in judged]
    found = fit(options.method, scores, right)
    found.save(options.out)
    after = held_out(options.method, scores, right)
    print(
        f"{len(judged)} answers judged, {sum(right)} of them right; {len(labelled) - len(judged)} without a judgement"
    )
    for name, values in (("as the critic says", scores), (f"{options.method}, held out", after)):
        if values is None:
            print(f"{name}: not possible with fewer than two right answers, or wrong ones")
            continue
        print(f"{name}: ECE {expected_calibration_error(values, right):.4f}, Brier score {brier(values, right):.4f}")
    print(f"{options.out}: for ctrl-hpc serve judge --calibration")
    return 0


def _scores(options: argparse.Namespace, labelled: list[Labelled]) -> list[float | None]:
    """The judge's own probabilities; raises ValueError where it refuses an answer or does not reply."""
    items = [
        {
            "problem": item.problem,
            "answer": item.answer,
            "starter_code": item.starter_code,
            "language": item.language,
        }
        for item in labelled
    ]
    out: list[float | None] = []
    for number, result in enumerate(
        ask(options.url, "/score", items, token_env=options.token_env, votes=options.votes)
    ):
        if "error" in result:
            raise ValueError(f"{options.dev}:{number + 1}: {result['error']}")
        out.append(result["raw"])
    return out


def ask(
    url: str, route: str, items: Sequence[dict[str, Any]], *, token_env: str | None, **body: Any
) -> Iterator[dict[str, Any]]:
    """A judge's results, in order; raises ValueError where it refuses or does not reply."""
    import httpx

    headers = {}
    if token_env:
        if not os.environ.get(token_env):
            raise ValueError(f"--token-env: the environment variable {token_env} is not set")
        headers["authorization"] = f"Bearer {os.environ[token_env]}"
    with httpx.Client(base_url=url, headers=headers, timeout=None) as client:
        for start in range(0, len(items), _ITEMS):
            try:
                answer = client.post(route, json={"items": list(items[start : start + _ITEMS]), **body})
            except (httpx.HTTPError, httpx.InvalidURL) as error:
                raise ValueError(f"{url}: cannot be asked: {error}") from None
            if answer.status_code != 200:
                raise ValueError(f"{url}: {answer.status_code} {answer.text[:200]}")
            yield from answer.json()["results"]
