"""Which synthesised critiques are kept, and what is said about the others."""

from dataclasses import replace

from ctrl_hpc.flow.filters import DROPPED, counts, mend, select, traits
from ctrl_hpc.records import Critique, Generation, Solution, Verdict


def pair(number, *, right, judgement, text="The loop is fine.", status=None):
    verdict = Verdict(status=status or ("accepted" if right else "wrong_answer"))
    solution = Solution(id=f"p/{number}", problem_id="p", text="", program="", verdict=verdict)
    return Critique(id=f"p/{number}#0", solution_id=solution.id, text=text, judgement=judgement), solution


def choose(pairs, n=100, balance=False, consistent_only=True, seed=0):
    kept, rejected = select(pairs, n=n, balance=balance, consistent_only=consistent_only, seed=seed)
    assert len(kept) + len(rejected) == len(pairs)
    return kept, counts(rejected)


GOOD = [pair(i, right=i % 2 == 0, judgement="correct" if i % 2 == 0 else "incorrect") for i in range(10)]


def test_each_fault_is_counted_once_under_its_first_reason():
    pairs = [
        pair(0, right=True, judgement="correct"),
        pair(1, right=True, judgement=None),
        pair(2, right=True, judgement="correct", text="As the hint says"),
        pair(3, right=True, judgement="incorrect"),
        pair(4, right=False, judgement="correct", text="By the hint"),
        pair(5, right=False, judgement="incorrect", status="sandbox_error"),
    ]
    kept, dropped = choose(pairs)
    assert [critique.id for critique in kept] == ["p/0#0"]
    expected = {"not_executed": 1, "no_judgement": 1, "mentions_hint": 2, "contradicts_execution": 1, "surplus": 0}
    assert dropped == expected
    assert list(dropped) == list(DROPPED)


def test_contradictions_stay_when_consistency_is_not_asked_for():
    kept, dropped = choose([pair(3, right=True, judgement="incorrect")], consistent_only=False)
    assert len(kept) == 1
    assert dropped["contradicts_execution"] == 0


def test_balance_keeps_as_many_of_right_as_of_wrong_drafts():
    surplus = [pair(100 + i, right=True, judgement="correct") for i in range(20)]
    kept, dropped = choose(surplus + GOOD, balance=True)
    assert [critique.judgement for critique in kept].count("correct") == 5
    assert [critique.judgement for critique in kept].count("incorrect") == 5
    assert dropped["surplus"] == 20
    four, _ = choose(surplus + GOOD, n=5, balance=True)
    assert sorted(critique.judgement for critique in four) == ["correct", "correct", "incorrect", "incorrect"]


def test_n_is_drawn_at_random_in_the_given_order():
    kept, dropped = choose(GOOD, n=4, seed=1)
    assert len(kept) == 4
    assert dropped["surplus"] == 6
    ids = [critique.id for critique in kept]
    assert ids == sorted(ids)
    assert choose(GOOD, n=4, seed=1)[0] == kept
    assert any(choose(GOOD, n=4, seed=seed)[0] != kept for seed in range(2, 6))


def test_traits_and_what_mends_a_stage_without_critiques():
    closed = Generation(text="", forced=(3, 6))
    cut = Generation(text="", finish_reason="length")
    right, solution = pair(
        0, right=True, judgement="incorrect", text="a test failed: use\n```python\na\nb\nc\nd\ne\n```"
    )
    silent, _ = pair(1, right=True, judgement=None)
    pairs = [
        (replace(right, generation=closed), replace(solution, program="x")),
        (replace(silent, generation=cut), replace(solution, id="p/1")),
        (replace(silent, id="p/2#0", solution_id="p/2"), replace(solution, id="p/2")),
    ]
    found = {name: [item.id for item in items] for name, items in traits(pairs).items()}
    assert found == {
        "judged": ["p/0#0"],
        "closed": ["p/0#0"],
        "cut off": ["p/1#0"],
        "mentions hint": ["p/0#0"],
        "leaks": ["p/0#0"],
        "contradicts": ["p/0#0"],
    }
    critiques = [critique for critique, _ in pairs[1:]]
    _, rejected = select(pairs[1:], n=9, balance=False, consistent_only=True, seed=0)
    assert "prompts.critique_prefix" in mend(critiques, rejected)
    assert "synthesize.max_tokens" in mend(critiques[:1], rejected[:1])
    _, rejected = select(GOOD[:1], n=9, balance=True, consistent_only=True, seed=0)
    assert "synthesize.balance" in mend([GOOD[0][0]], rejected)
    assert "sample.n_samples" in mend([], [])
