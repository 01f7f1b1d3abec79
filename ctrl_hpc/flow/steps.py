"""The steps of the method, records in, records out: draft, execute, critique, revise, elect."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from ctrl_hpc.flow.feedback import Hint
from ctrl_hpc.flow.prompts import Prompts, closing, judgements
from ctrl_hpc.flow.text import asked_for, extract_program, parse_judgement
from ctrl_hpc.harness import prepared
from ctrl_hpc.jsonl import well_formed
from ctrl_hpc.records import (
    CLOSE_ROOM,
    Chat,
    Continuing,
    Critique,
    Execution,
    Executor,
    Generation,
    Generator,
    Judgement,
    Limits,
    Override,
    Problem,
    Revision,
    Rules,
    Sampling,
    Solution,
    Verdict,
)
from ctrl_hpc.records.verdicts import unrun
from ctrl_hpc.seeds import derive_seed


def draft(problems: Sequence[Problem], generator: Generator, prompts: Prompts, sampling: Sampling) -> list[Solution]:
    """``sampling.n`` solutions for each problem, flat and in order, not yet executed; ids are ``PROBLEM/k``."""
    answers = generator.complete([prompts.solution(problem) for problem in problems], sampling)
    return [
        Solution(
            id=f"{problem.id}/{k}",
            problem_id=problem.id,
            text=text,
            program=extract_program(text, names, problem.language),
        )
        for problem, generations in zip(problems, answers, strict=True)
        for names in [asked_for(problem)]
        for k, generation in enumerate(generations)
        for text in [well_formed(generation.text)]
    ]


def limits(problem: Problem, rules: Rules) -> Limits:
    """The limits of one test: those of the data set's override, else the problem's, else the default.

    Times are multiplied by ``time_factor``, but for an override's. Wall-clock time grows and shrinks with the CPU time,
    in the proportion of the default.
    """
    default, override = rules.limits, _override(problem, rules)
    cpu_s = override.cpu_s or (problem.cpu_s or default.cpu_s) * rules.time_factor
    return Limits(
        cpu_s=cpu_s,
        wall_s=default.wall_s * cpu_s / default.cpu_s,
        memory_mb=override.memory_mb or problem.memory_mb or default.memory_mb,
        output_bytes=default.output_bytes,
        processes=default.processes,
    )


def _override(problem: Problem, rules: Rules) -> Override:
    return rules.overrides.get(problem.source, Override())


def execution(problem: Problem, program: str, rules: Rules, *, stop_at_first_failure: bool = False) -> Execution:
    """What the executor takes: a program with its problem's tests, limits and so on, for a slim verdict."""
    override = _override(problem, rules)
    harness = problem.harness if problem.language in (None, "python") else None
    preamble, program = prepared(harness or "", problem.starter_code, program)
    return Execution(
        program=program,
        preamble=preamble or None,
        language=problem.language,
        checker=problem.checker,
        tests=problem.tests,
        limits=limits(problem, rules),
        comparison=override.comparison or problem.comparison or "exact",
        stop_at_first_failure=stop_at_first_failure,
        time_budget_s=rules.time_budget_s,
        outputs="shown",
    )


def no_program(problem: Problem) -> Verdict:
    """The verdict of an answer that holds no program."""
    verdict = Verdict(status="wrong_answer", detail="no program in the answer")
    return unrun(len(problem.tests), "not_run", verdict)


def execute[R: (Solution, Revision)](
    problems_and_records: Sequence[tuple[Problem, R]],
    executor: Executor,
    rules: Rules,
    *,
    stop_at_first_failure: bool = False,
) -> list[R]:
    """The same records with their verdicts, in order; ``stop_at_first_failure`` where only the status matters.

    Records that have a verdict (kept drafts) keep it; identical programs of one problem are executed once, all in one
    call of the executor.
    """
    keys = [(problem.id, record.program) for problem, record in problems_and_records]
    todo: dict[tuple[str, str | None], Execution] = {}
    for key, (problem, record) in zip(keys, problems_and_records, strict=True):
        if record.verdict is None and record.program is not None and key not in todo:
            todo[key] = execution(problem, record.program, rules, stop_at_first_failure=stop_at_first_failure)
    verdicts = dict(zip(todo, executor.run_many(list(todo.values())), strict=True)) if todo else {}
    return [
        record
        if record.verdict is not None
        else replace(record, verdict=no_program(problem) if record.program is None else verdicts[key])
        for key, (problem, record) in zip(keys, problems_and_records, strict=True)
    ]


def critique(
    pairs: Sequence[tuple[Problem, Solution]], critic: Generator, prompts: Prompts, sampling: Sampling
) -> list[Critique]:
    """``sampling.n`` critiques of each solution, flat and in order; ids are ``SOLUTION#j``.

    They begin with ``prompts.critique_prefix``, and are continued after ``prompts.critique_close`` where they have no
    judgement. Raises ValueError for a critic that cannot continue a text.
    """
    chats = [prompts.critique(problem, solution) for problem, solution in pairs]
    return _ask(chats, [solution for _, solution in pairs], critic, prompts, sampling)


def critique_with_hints(
    triples: Sequence[tuple[Problem, Solution, Hint]], critic: Generator, prompts: Prompts, sampling: Sampling
) -> list[Critique]:
    """As :func:`critique`, by a critic that is shown what the execution found (stage I)."""
    chats = [prompts.hinted_critique(problem, solution, hint) for problem, solution, hint in triples]
    return _ask(chats, [solution for _, solution, _ in triples], critic, prompts, sampling)


def _ask(
    chats: Sequence[Chat], solutions: Sequence[Solution], critic: Generator, prompts: Prompts, sampling: Sampling
) -> list[Critique]:
    written = critic.complete(chats, _before_close(sampling) if prompts.critique_close else sampling)
    critiques = [
        _critique(f"{solution.id}#{j}", solution, prompts, generation)
        for solution, generations in zip(solutions, written, strict=True)
        for j, generation in enumerate(generations)
    ]
    return _closed(critiques, chats, critic, prompts, sampling) if prompts.critique_close else critiques


def _critique(name: str, solution: Solution, prompts: Prompts, generation: Generation) -> Critique:
    text = well_formed(prompts.critique_prefix + generation.text)
    return Critique(id=name, solution_id=solution.id, text=text, judgement=parse_judgement(text), generation=generation)


def _before_close(sampling: Sampling) -> Sampling:
    if sampling.max_tokens <= CLOSE_ROOM:
        raise ValueError(
            f"prompts.critique_close: takes {CLOSE_ROOM} of a critique's {sampling.max_tokens} tokens (max_tokens); "
            "raise them, or leave it empty"
        )
    return replace(sampling, max_tokens=sampling.max_tokens - CLOSE_ROOM)


def continuing(critic: Generator) -> Continuing:
    """The critic, which has to be one that continues texts; ValueError names the key that asks it to."""
    if not isinstance(critic, Continuing):
        raise ValueError("prompts.critique_close: this critic cannot continue a text; leave it empty")
    return critic


def _closed(
    critiques: Sequence[Critique], chats: Sequence[Chat], critic: Generator, prompts: Prompts, sampling: Sampling
) -> list[Critique]:
    """The critiques, those without a judgement continued after ``prompts.critique_close``; each by its own seed.

    Where that introduces a judgement, one of the two words follows, as likely as the critic finds it beside the other.
    """
    continued = continuing(critic)
    todo: dict[str, list[tuple[int, Generation, Sampling]]] = {}
    for row, item in enumerate(critiques):
        generation, (i, j) = item.generation, divmod(row, sampling.n)
        assert generation is not None
        at_the_end_of_its_positions = generation.finish_reason == "length" and (
            0 < len(generation.token_ids) < sampling.max_tokens - CLOSE_ROOM
        )
        if item.judgement is None and not (at_the_end_of_its_positions or generation.thought_cut):
            seed = None if sampling.seed is None else derive_seed(sampling.seed, sampling.number(i), j, 1)
            how = replace(sampling, n=1, first=0, rows=(), seed=seed, max_tokens=CLOSE_ROOM)
            todo.setdefault(closing(prompts.critique_close, item.text), []).append((row, generation, how))
    out = list(critiques)
    for text, group in todo.items():
        rows, begun, hows = zip(*group, strict=True)
        asked = [chats[row // sampling.n] for row in rows]
        longer = continued.extend(asked, begun, text, hows, judgements(prompts.critique_close))
        for row, generation in zip(rows, longer, strict=True):
            words = well_formed(prompts.critique_prefix + generation.text)
            out[row] = replace(out[row], text=words, judgement=parse_judgement(words), generation=generation)
    return out


def revise(
    triples: Sequence[tuple[Problem, Solution, Critique]],
    generator: Generator,
    prompts: Prompts,
    sampling: Sampling,
    *,
    gate: bool = True,
    skip: frozenset[str] = frozenset(),
) -> list[Revision]:
    """One revision for each critique, in order, not yet executed.

    With ``gate`` a critique that judges the draft correct keeps it, verdict and all, without asking the generator
    (the paper stops there; its released code asks all the same: ``gate=False``). So do all critiques of the solutions
    ``skip``, by id. Greedy revisions (``sampling.temperature == 0``) of identical chats are asked for once.
    """
    assert sampling.n == 1, "one revision a critique"
    asked = [
        index
        for index, (_, solution, critique) in enumerate(triples)
        if not (gate and critique.judgement == "correct") and solution.id not in skip
    ]
    chats = {
        index: prompts.revision(problem, solution, critique.text)
        for index in asked
        for problem, solution, critique in [triples[index]]
    }
    distinct = list(dict.fromkeys(chats.values())) if sampling.temperature == 0 else list(chats.values())
    generations = generator.complete(distinct, sampling) if distinct else []
    answers = [well_formed(completions[0].text) for completions in generations]
    if sampling.temperature == 0:
        text_of_chat = dict(zip(distinct, answers, strict=True))
        texts = {index: text_of_chat[chat] for index, chat in chats.items()}
    else:
        texts = dict(zip(chats, answers, strict=True))
    names = {problem.id: asked_for(problem) for index in texts for problem in [triples[index][0]]}
    return [
        _revision(problem, critique, texts[index], names[problem.id]) if index in texts else _kept(critique, solution)
        for index, (problem, solution, critique) in enumerate(triples)
    ]


def _revision(problem: Problem, critique: Critique, text: str, names: Collection[str]) -> Revision:
    program = extract_program(text, names, problem.language)
    return Revision(critique_id=critique.id, text=text, program=program, kept=False)


def _kept(critique: Critique, solution: Solution) -> Revision:
    return Revision(
        critique_id=critique.id, text=solution.text, program=solution.program, kept=True, verdict=solution.verdict
    )


def majority(judgements: Sequence[Judgement | None]) -> Judgement | None:
    """The judgement that more than half of those that judge at all agree on; None for a tie or when none judges."""
    surplus = sum((judgement == "correct") - (judgement == "incorrect") for judgement in judgements)
    if surplus == 0:
        return None
    return "correct" if surplus > 0 else "incorrect"


def elect(critiques: Sequence[Critique]) -> Critique:
    """The critique that speaks for several of one program: the first whose judgement is the majority's.

    In a tie the first, without a judgement: the votes are several that disagree.
    """
    assert critiques, "no critique to choose from"
    verdict = majority([critique.judgement for critique in critiques])
    for critique in critiques:
        if critique.judgement == verdict and verdict is not None:
            return critique
    first = critiques[0]
    return Critique(
        id=first.id, solution_id=first.solution_id, text=first.text, judgement=None, generation=first.generation
    )
