"""Which prompts are computed together: groups by hand, and no division of few prompts that costs less."""

from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctrl_hpc.rollout import prefill
from ctrl_hpc.rollout.prefill import Group, common, groups


def prompt(*parts: tuple[int, int]) -> tuple[int, ...]:
    """``(token, times)``, one after the other."""
    return tuple(token for token, times in parts for _ in range(times))


def test_what_two_prompts_begin_with_leaves_a_token_of_each() -> None:
    assert common((1, 2, 3), (1, 2, 4)) == 2
    assert common((1, 2), (1, 2, 4)) == 1  # the whole of the first, but for its last
    assert common((1,), (1, 2)) == 0
    assert common((3, 1), (4, 1)) == 0


def test_groups_by_hand() -> None:
    """Two drafts with three and two critiques, and a prompt of its own; 20 tokens that all share are not worth it."""
    begins = prompt((1, 20))
    first, second = begins + prompt((2, 300)), begins + prompt((3, 400))
    prompts = [
        first + prompt((4, 50)),
        second + prompt((5, 60)),
        first + prompt((6, 70)),
        begins + prompt((7, 200)),
        second + prompt((8, 61)),
        first + prompt((9, 10)),
    ]
    assert groups(prompts) == [
        Group(members=(0, 2, 5), prefix=320),
        Group(members=(1, 4), prefix=420),
        Group(members=(3,), prefix=0),
    ]


def cost(prompts: list[tuple[int, ...]], division: list[tuple[int, ...]]) -> int:
    """Tokens of a division, padding and passes included."""
    total = 0
    for members in division:
        texts = [prompts[member] for member in members]
        longest, passes = max(map(len, texts)), 1 if len(members) == 1 else 2
        shared = 0 if passes == 1 else min(common(one, other) for one in texts for other in texts if one is not other)
        total += shared + len(members) * (longest - shared) + passes * prefill._FORWARD
    return total


def divisions(order: list[int]) -> Iterator[list[tuple[int, ...]]]:
    """All into groups of neighbours."""
    if not order:
        yield []
    for end in range(1, len(order) + 1):
        for rest in divisions(order[end:]):
            yield [tuple(order[:end]), *rest]


@settings(max_examples=60, deadline=None)
@given(texts=st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=9), min_size=1, max_size=6), times=st.just(17))
def test_no_division_costs_less(texts: list[list[int]], times: int) -> None:
    prompts = list({tuple(token for token in text for _ in range(times)) for text in texts})
    found = groups(prompts)
    assert sorted(member for group in found for member in group.members) == list(range(len(prompts)))
    for group in found:
        beginnings = {prompts[member][: group.prefix] for member in group.members}
        assert len(beginnings) == 1 and all(len(prompts[member]) > group.prefix for member in group.members)
    order = sorted(range(len(prompts)), key=prompts.__getitem__)
    sharing = [one for one in divisions(order) if all(len(group) == 1 or _shares(prompts, group) for group in one)]
    assert cost(prompts, [group.members for group in found]) == min(cost(prompts, one) for one in sharing)


def _shares(prompts: list[tuple[int, ...]], members: tuple[int, ...]) -> bool:
    return all(common(prompts[one], prompts[other]) for one in members for other in members if one != other)


def test_a_group_is_not_larger_than_its_batch_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill, "_MOST", 3)
    prompts = [prompt((1, 400), (token, 5)) for token in range(2, 9)]
    assert sorted(len(group.members) for group in groups(prompts)) == [1, 3, 3]
