"""Near-duplicates of benchmark problems, and texts that only look like them."""

from hypothesis import given, settings
from hypothesis import strategies as st

from ctrl_hpc.data.decontamination import Duplicate, decontaminate, report, words
from ctrl_hpc.records import Problem


def problem(identity, prompt, starter_code=None):
    return Problem(id=identity, source="s", split="train", prompt=prompt, tests=(), starter_code=starter_code)


TEXT = st.lists(st.sampled_from("alpha beta gamma delta one two three four".split()), min_size=1, max_size=40).map(
    " ".join
)


STATEMENT = (
    "You are given an array of n integers and an integer k. In one operation you may choose any element and replace it "
    "by its remainder modulo k. Print the least number of operations after which all elements are equal."
)
OTHER = (
    "There are n towns joined by n minus one roads. Every road has a length. Find two towns so that the path between "
    "them is as long as possible, and print the length of this path."
)
BENCHMARK = {"bench": [problem("b/0", STATEMENT), problem("b/1", OTHER)]}


def decide(prompt, **options):
    _, left_out = decontaminate([problem("t/0", prompt)], BENCHMARK, **options)
    return left_out[0] if left_out else None


def test_the_same_text_in_other_clothes():
    found = decide(STATEMENT.upper().replace(" ", "\n  ").replace(".", " !"))
    assert found == Duplicate(train_id="t/0", benchmark="bench", benchmark_id="b/0", reason="same text", overlap=1.0)


def test_a_text_inside_a_longer_one():
    found = decide(
        f"Story: the king of a far land asks for help with sums. {OTHER} Input: the number n, then the roads."
    )
    assert (found.benchmark_id, found.reason, found.overlap) == ("b/1", "contained text", 1.0)


def test_a_text_with_some_words_changed():
    found = decide(STATEMENT.replace("an array of n integers", "a list of n numbers"))
    assert (found.benchmark_id, found.reason) == ("b/0", "common n-grams")
    assert 0.5 <= found.overlap < 1.0


def test_the_threshold_decides():
    changed = STATEMENT.replace("an array of n integers", "a list of n numbers")
    assert decide(changed, threshold=0.95) is None


def test_a_problem_on_the_same_subject_stays():
    assert (
        decide("You are given an array of n integers. Print the largest sum of a part of it that is not empty.") is None
    )


def test_short_statements_are_compared_whole():
    bench = {"bench": [problem("b/0", "Write a function to reverse a given string.")]}
    same, inside, alike = (
        problem("t/0", "write a function to reverse a given STRING"),
        problem(
            "t/1", "Write a function to reverse a given string. The string holds letters only, at most one hundred."
        ),
        problem(
            "t/2", "Write a function to sort a given list of tuples by the last item of each tuple, smallest first."
        ),
    )
    kept, left_out = decontaminate([same, inside, alike], bench)
    assert [item.id for item in kept] == ["t/2"]
    assert [(item.train_id, item.reason) for item in left_out] == [("t/0", "same text"), ("t/1", "contained text")]


def test_a_short_statement_inside_a_benchmark_is_found():
    words_of = "Reverse the words of the given line of text."
    bench = {"bench": [problem("b/0", f"Story first. {words_of} Then print it, in capital letters, on one line.")]}
    kept, left_out = decontaminate([problem("t/0", words_of), problem("t/1", "Reverse it.")], bench)
    assert [item.id for item in kept] == ["t/1"]
    assert [(item.benchmark_id, item.reason) for item in left_out] == [("b/0", "contained text")]


def test_only_the_same_text():
    training = [problem("t/0", STATEMENT.lower()), problem("t/1", f"Story. {STATEMENT}")]
    kept, left_out = decontaminate(training, BENCHMARK, threshold=None)
    assert ([item.id for item in kept], [item.train_id for item in left_out]) == (["t/1"], ["t/0"])


@settings(derandomize=True, max_examples=200)
@given(texts=st.lists(TEXT, min_size=1, max_size=5), bench=st.lists(TEXT, min_size=1, max_size=5))
def test_what_is_found_is_what_comparing_each_pair_finds(texts, bench):
    training = [problem(f"t/{number}", text) for number, text in enumerate(texts)]
    kept, _ = decontaminate(training, {"b": [problem(f"b/{number}", text) for number, text in enumerate(bench)]})
    assert [item.prompt for item in kept] == [text for text in texts if not any(alike(text, other) for other in bench)]


def alike(text, other):
    """The rules, pair by pair."""
    if text == other:
        return True
    ours, theirs = (
        {tuple(part.split()[start : start + 10]) for start in range(len(part.split()) - 9)} for part in (text, other)
    )
    if ours and theirs:
        return len(ours & theirs) / min(len(ours), len(theirs)) >= 0.5
    shorter = min(text, other, key=lambda part: len(part.split()))
    longer = other if shorter == text else text
    return 8 <= len(shorter.split()) < 10 and f" {shorter} " in f" {longer} "


def test_starter_code_counts():
    code = "def longest_path(towns, roads):\n    'Return the length of the longest path between any two towns.'\n"
    bench = {"bench": [problem("b/0", "Complete this function.", code)]}
    kept, _ = decontaminate(
        [problem("t/0", "Complete this function.", "def add(a, b):\n    'Return the sum of a and b.'")], bench
    )
    assert len(kept) == 1
    kept, _ = decontaminate([problem("t/0", "Complete this function!", code)], bench)
    assert kept == []


def test_the_report():
    training = [
        problem("t/0", STATEMENT),
        problem("t/1", "Print one."),
        problem("t/2", STATEMENT + " " + "Be quick. " * 9),
    ]
    benchmarks = {**BENCHMARK, "clean": [problem("c/0", "Say nothing at all to anyone.")]}
    kept, left_out = decontaminate(training, benchmarks)
    assert [item.id for item in kept] == ["t/1"]
    assert report(left_out, benchmarks, len(training)) == (
        "2 of 3 training problems left out as near-duplicates\n"
        "  bench (2 problems): 1 contained text, 1 same text\n"
        "  clean (1 problems): none"
    )


@settings(derandomize=True, max_examples=100)
@given(texts=st.lists(TEXT, min_size=1, max_size=6), bench=st.lists(TEXT, min_size=1, max_size=4))
def test_every_problem_is_kept_or_explained(texts, bench):
    training = [problem(f"t/{number}", text) for number, text in enumerate(texts)]
    benchmarks = {"b": [problem(f"b/{number}", text) for number, text in enumerate(bench)]}
    kept, left_out = decontaminate(training, benchmarks)
    assert sorted([item.id for item in kept] + [item.train_id for item in left_out]) == sorted(
        item.id for item in training
    )
    same = {tuple(words(text)) for text in bench}
    assert not any(tuple(words(item.prompt)) in same for item in kept)
