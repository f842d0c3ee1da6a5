"""How the samples of a step are divided among the passes of several processes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from camopd.update import micro_batches, num_tokens, shares


def make_rows(lengths: list[int], branch: str = "general") -> list[dict]:
    return [
        {"branch": branch, "prompt_ids": [0] * 2, "response_ids": [0] * length, "id": (branch, i)}
        for i, length in enumerate(lengths)
    ]


def lengths_of(parts: list[list[list[dict]]]) -> list[list[list[int]]]:
    return [[[len(row["response_ids"]) for row in batch] for batch in own] for own in parts]


def test_one_process_has_the_passes_as_they_come() -> None:
    batches = micro_batches(make_rows([8, 1, 2]) + make_rows([3], "domain"), 10)
    assert lengths_of(shares(batches, 1)) == [[[3], [1, 2], [8]]]


def test_the_largest_pass_is_halved_until_their_number_divides() -> None:
    batches = micro_batches(make_rows([1, 1, 1, 1, 8]), 20)
    assert lengths_of([batches]) == [[[1, 1, 1, 1], [8]]]
    assert lengths_of(shares(batches, 2)) == [[[8]], [[1, 1, 1, 1]]]
    assert lengths_of(shares(batches, 3)) == [[[1, 1]], [[1, 1]], [[8]]]
    assert lengths_of(shares(batches, 4)) == [[[1]], [[1]], [[1, 1]], [[8]]]


def test_a_process_without_a_sample_has_an_empty_pass() -> None:
    assert lengths_of(shares([make_rows([4])], 3)) == [[[]], [[]], [[4]]]


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=30),
    others=st.lists(st.integers(1, 40), max_size=10),
    num_ranks=st.integers(1, 9),
    budget=st.integers(1, 120),
)
def test_each_process_has_as_many_passes_and_every_sample_is_in_one(lengths, others, num_ranks, budget) -> None:
    rows = make_rows(lengths) + make_rows(others, "domain")
    parts = shares(micro_batches(rows, budget), num_ranks)
    assert len(parts) == num_ranks
    assert len({len(own) for own in parts}) == 1
    batches = [batch for own in parts for batch in own]
    assert sorted(row["id"] for batch in batches for row in batch) == sorted(row["id"] for row in rows)
    for batch in filter(None, batches):
        assert len({row["branch"] for row in batch}) == 1
        assert len(batch) == 1 or len(batch) * max(map(num_tokens, batch)) <= budget
