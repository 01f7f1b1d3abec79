"""``ctrl-hpc bench critic``: a critic that is served, on benchmarks of critics."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ctrl_hpc.commands.calibrate import ask
from ctrl_hpc.commands.output import check_folder, place

if TYPE_CHECKING:
    from ctrl_hpc.evaluate.critic_benchmarks import Judged
    from ctrl_hpc.records import LabelledAnswers

_RESULTS = "results.json"


def add(parser: argparse.ArgumentParser) -> None:
    """Its arguments."""
    parser.add_argument("name", metavar="BENCHMARK", help="codejudgebench, codecriticbench, rewardbench2, jetts, ...")
    parser.add_argument("--judge", required=True, metavar="URL", help="of a judge that runs: ctrl-hpc serve judge")
    parser.add_argument("--path", default=None, help="file or folder with the benchmark (default: the hub's)")
    parser.add_argument("--split", default=None, help="SPLIT, or CONFIG/SPLIT as codegen/claude_4_opus")
    parser.add_argument("--mode", choices=["pointwise", "pairwise"], default="pointwise", help="pairwise: pairs, too")
    parser.add_argument("--votes", type=int, default=1, help="critiques of an answer (default: 1)")
    parser.add_argument("--n", type=int, default=None, help="questions at most (default: all)")
    parser.add_argument("--max-tokens", type=int, default=1024, help="longest critique (default: 1024)")
    parser.add_argument("--token-env", default=None, help="environment variable with the judge's bearer token")
    parser.add_argument("--out", type=place, required=True, help="folder for results.json, judged.jsonl and the plot")
    parser.set_defaults(command=bench)


def bench(options: argparse.Namespace) -> int:
    """Ask the judge about every answer, and tell and write what its opinions are worth."""
    from ctrl_hpc import jsonl
    from ctrl_hpc.data.critic_benchmarks import load
    from ctrl_hpc.evaluate.critic_benchmarks import numbers

    for name in ("votes", "n"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise ValueError(f"--{name}: {getattr(options, name)} is not allowed; it must be greater than 0")
    check_folder(options.out, "--out", ours=_RESULTS)
    questions = load(options.name, options.path, options.split)[: options.n]
    judged = list(_judged(options, questions))
    found = numbers(options.name, questions, judged)
    options.out.mkdir(parents=True, exist_ok=True)
    jsonl.write(options.out / "judged.jsonl", judged)
    jsonl.write_text(options.out / _RESULTS, json.dumps(found, indent=1) + "\n")
    _draw(found, options.out)
    for line in lines(found):
        print(line)
    print(f"{options.out}: {_RESULTS}, judged.jsonl")
    return 0


def _judged(options: argparse.Namespace, questions: Sequence[LabelledAnswers]) -> Iterator[Judged]:
    """What the judge says of every question, in order."""
    from ctrl_hpc.evaluate.critic_benchmarks import Judged
    from ctrl_hpc.progress import Steps

    asked: dict[str, Any] = {"token_env": options.token_env, "max_tokens": options.max_tokens}
    answers = [{"problem": item.question, "answer": answer} for item in questions for answer in item.answers]
    pairs = [
        {"problem": item.question, "answer_a": item.answers[0], "answer_b": item.answers[1]}
        for item in questions
        if options.mode == "pairwise" and item.is_pair
    ]
    scored = ask(options.judge, "/score", answers, votes=options.votes, **asked)
    votes = 2 * ((options.votes + 1) // 2)  # as many in each order
    compared = ask(options.judge, "/compare", pairs, votes=votes, mode="pairwise", **asked)
    with Steps(f"bench critic: {options.name}", len(questions)) as steps:
        for item in questions:
            found = [next(scored) for _ in item.answers]
            beside = next(compared) if options.mode == "pairwise" and item.is_pair else {}
            yield Judged(
                id=item.id,
                probabilities=tuple(result.get("probability") for result in found),
                judgements=tuple(result.get("judgement") for result in found),
                agreements=tuple(result.get("agreement") for result in found),
                votes=tuple(beside.get("votes", ())),
                errors=sum("error" in result for result in (*found, beside)),
            )
            steps.advance()


def _draw(found: dict[str, Any], folder: Path) -> None:
    """The reliability diagram, where there are answers that are right or wrong."""
    bins = found["answers"].get("calibration", {}).get("bins")
    if bins:
        import matplotlib

        from ctrl_hpc.report import plots

        with matplotlib.rc_context(plots.STYLE):
            title = f"{found['benchmark']}: ECE {found['answers']['calibration']['ece']:.3f}"
            plots.save(plots.reliability(bins, title), folder / "reliability.png")


def lines(found: dict[str, Any]) -> list[str]:
    """The numbers for people, in per cent."""

    def percent(value: float | None) -> str:
        return "-" if value is None else f"{100 * value:.1f} %"

    interval = f" [{', '.join(percent(end) for end in found['ci95'])}]" if found["ci95"] else ""
    out = [f"{found['benchmark']}: {percent(found['score'])}{interval} of {found['n']} questions"]
    out += [f"  {name}: {percent(row['score'])} of {row['n']}" for name, row in found["categories"].items()]
    answers, questions, position = found["answers"], found["questions"], found["position"]
    if answers["n_answers"]:
        names = ("accuracy", "f1_pass", "f1_fail", "f1_macro", "abstention", "agreement")
        told = ", ".join(f"{name.replace('_', ' ')} {percent(answers[name])}" for name in names)
        out.append(f"answers ({answers['n_answers']}): {told}")
        calibration = answers["calibration"]
        if calibration["n"]:
            out.append(f"calibration: ECE {calibration['ece']:.4f}, Brier score {calibration['brier']:.4f}")
    if questions["n_questions"]:
        rule = questions["stopping"]
        told = ", ".join(f"{name.replace('_', ' ')} {percent(questions[name])}" for name in ("random", "oracle"))
        out.append(f"re-ranking: best of n {percent(questions['best_of_n'])} ({told})")
        out.append(f"stopping at the first judged correct: {percent(rule['worth'])}, {rule['answers']:.2f} answers")
    if "normalised_helpfulness" in found:
        out.append(f"normalised helpfulness: {percent(found['normalised_helpfulness'])} (0: the greedy answers)")
    if position["first_place"] is not None:
        told = f"first place {percent(position['first_place'])} of decided votes"
        out.append(f"position: {told}, same answer in both orders {percent(position['consistent'])}")
    return out + ([f"{found['errors']} could not be judged"] if found["errors"] else [])
