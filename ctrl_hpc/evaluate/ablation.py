"""The sentences on which the fixes of an evaluation hang (``eval.ablate``): ``CRITIC/ablation.jsonl``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ctrl_hpc import jsonl
from ctrl_hpc.evaluate.critics import Oracles
from ctrl_hpc.evaluate.tree import Environment, Node, Sample
from ctrl_hpc.evaluate.write_ahead import WriteAheadLog, in_parts
from ctrl_hpc.flow.ablation import Ablation, ablate, names_failure
from ctrl_hpc.records import Critique

_TRIPLE = tuple[Sample, Node]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sentence:
    """One sentence of a critique that led to a fix."""

    text: str
    decisive: bool | None
    """Whether the revision fails without it; None where the environment failed."""
    names_failure: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Fix:
    """A wrong draft that a critique's revision put right, in the first turn."""

    sample: str
    sentences: tuple[Sentence, ...]


def file_of(folder: Path) -> Path:
    """Where the fixes of a critic lie, beside its turns."""
    return folder / "ablation.jsonl"


def run(drafts: Sequence[Sample], environment: Environment, folder: Path, oracles: Oracles, size: int) -> None:
    """Ablate the fixes of the first turn that lies in ``folder``, unless it has been done."""
    by_id = {draft.id: (problem, draft) for problem, draft in drafts}
    fixes = [
        (by_id[node.parent], node)
        for node in jsonl.read(Node, folder / "turn_1.jsonl")
        if not node.kept and node.verdict.accepted and _is_wrong(by_id[node.parent])
    ]

    def work(part: Sequence[_TRIPLE], number: int, log: WriteAheadLog) -> list[Fix]:
        triples = [(*sample, _critique(node)) for sample, node in part]

        def asked() -> list[Ablation]:
            return ablate(
                triples,
                environment.generator,
                environment.executor,
                environment.prompts,
                environment.rules,
                environment.revision,
            )

        found = log.once("ablations", number, Ablation, asked)
        return [_fix(sample, node, ablation, oracles) for (sample, node), ablation in zip(part, found, strict=True)]

    in_parts(file_of(folder), Fix, fixes, work, size=size, at_once=1)


def _is_wrong(sample: Sample) -> bool:
    verdict = sample[1].verdict
    return verdict is not None and not verdict.accepted and verdict.status != "sandbox_error"


def _critique(node: Node) -> Critique:
    return Critique(id=node.sample, solution_id=node.parent, text=node.critique, judgement=node.judgement)


def _fix(sample: Sample, node: Node, ablation: Ablation, oracles: Oracles) -> Fix:
    problem, draft = sample
    out = []
    for (start, end), revision in zip(ablation.spans, ablation.revisions, strict=True):
        text, verdict = node.critique[start:end].strip(), revision.verdict
        assert verdict is not None
        named = names_failure(text, problem, draft, oracles.get(problem.source))
        decisive = None if verdict.status == "sandbox_error" else not verdict.accepted
        out.append(Sentence(text=text, decisive=decisive, names_failure=named))
    return Fix(sample=node.sample, sentences=tuple(out))


def numbers(fixes: Sequence[Fix], shown: int) -> dict[str, Any]:
    """A critic's part of ``results.json``: how many fixes hang on one sentence, and on which; shares of the fixes.

    ``names_failure``: of the fixes that hang on a single sentence, those in which it names the failing behaviour;
    ``all_sentences_name_failure``: the share of all sentences that do, for comparison. ``examples``: at most ``shown``.
    """
    decisive = [[item for item in fix.sentences if item.decisive] for fix in fixes]
    single = [found[0] for found in decisive if len(found) == 1]
    every = [item for fix in fixes for item in fix.sentences]
    return {
        "n_fixes": len(fixes),
        "sentences": len(every) / len(fixes) if fixes else None,
        "decisive": sum(map(len, decisive)) / len(fixes) if fixes else None,
        "none_decisive": decisive.count([]) / len(fixes) if fixes else None,
        "single_decisive": len(single) / len(fixes) if fixes else None,
        "names_failure": sum(item.names_failure for item in single) / len(single) if single else None,
        "all_sentences_name_failure": sum(item.names_failure for item in every) / len(every) if every else None,
        "examples": [
            {"sample": fix.sample, "decisive": [item.text for item in found], "sentences": len(fix.sentences)}
            for fix, found in zip(fixes, decisive, strict=True)
            if found
        ][:shown],
    }
