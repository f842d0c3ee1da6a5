"""Whose turn it is, how a mixed batch is divided, and that prompts are neither skipped nor repeated (method section 3)."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from camopd.config import Branch, Recipe
from camopd.schedule import Schedule, make_cycle, prompt_slice, seed_of, share_slice

GENERAL = Branch(name="general", role="recover", prompts="/g.jsonl", steps=3)
DOMAIN = Branch(name="domain", role="retain", prompts="/d.jsonl")
LEGAL = Branch(name="legal", role="retain", prompts="/l.jsonl", steps=2)
UNUSED = Branch(name="unused", role="retain", prompts="/u.jsonl", steps=0)


def make_recipe(*branches: Branch, mixing: str = "alternating", prompts_per_step: int = 8) -> Recipe:
    return Recipe(student="/s", branches=branches, mixing=mixing, rollout={"prompts_per_step": prompts_per_step})


def test_three_general_steps_then_one_review() -> None:
    steps = list(Schedule.of(make_recipe(GENERAL, DOMAIN)).ahead(120))
    assert [list(at.active) for at in steps[:5]] == [["general"], ["general"], ["general"], ["domain"], ["general"]]
    assert [list(at.active) for at in steps].count(["general"]) == 90  # the paper's 90 + 30
    assert [at.step for at in steps] == list(range(120))
    assert all(sum(at.active.values()) == 8 for at in steps)


def test_mixed_batches_are_divided_by_steps() -> None:
    assert make_cycle([GENERAL, DOMAIN], "mixed", 512) == ({"general": 384, "domain": 128},)
    assert make_cycle([GENERAL, DOMAIN, LEGAL], "mixed", 6) == ({"general": 3, "domain": 1, "legal": 2},)


@pytest.mark.parametrize("mixing", ["alternating", "mixed"])
def test_zero_steps_leave_a_branch_out(mixing: str) -> None:
    schedule = Schedule.of(make_recipe(GENERAL, UNUSED, mixing=mixing), 7)
    assert all(prompts == {"general": 8} for prompts in schedule.cycle)
    assert (schedule.taken("general"), schedule.taken("unused")) == (56, 0)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=5).filter(any), st.integers(1, 600))
def test_the_parts_of_a_mixed_batch_add_up_and_are_near_their_shares(parts: list[int], prompts: int) -> None:
    names = [f"b{i}" for i in range(len(parts))]
    branches = [DOMAIN.model_copy(update={"name": name, "steps": part}) for name, part in zip(names, parts, strict=True)]
    (counts,) = make_cycle(branches, "mixed", prompts)
    assert sum(counts.values()) == prompts
    for name, part in zip(names, parts, strict=True):
        share = Fraction(prompts * part, sum(parts))
        assert abs(counts.get(name, 0) - share) < 1
        assert name in counts if share >= 1 else counts.get(name, 0) <= 1


@given(st.integers(0, 200), st.sampled_from(["alternating", "mixed"]))
def test_resumed_schedule_is_the_same_schedule(step: int, mixing: str) -> None:
    recipe = make_recipe(GENERAL, DOMAIN, LEGAL, mixing=mixing)
    unbroken = list(Schedule.of(recipe).ahead(step + 10))
    assert list(Schedule.of(recipe, step).ahead(10)) == unbroken[step:]
    for branch in ("general", "domain", "legal"):
        assert unbroken[step].taken(branch) == sum(before.active.get(branch, 0) for before in unbroken[:step])


@given(st.floats(0, 1), st.lists(st.integers(0, 40), min_size=1, max_size=40))
def test_shares_tile_without_gap_or_overlap(share: float, counts: list[int]) -> None:
    """A part's slices follow one another, take no more than there is, and hold their share of all positions so far."""
    start, reached = 0, 0
    for count in counts:
        first, taken = share_slice(start, count, share)
        assert (first, taken >= 0, taken <= count) == (reached, True, True)
        start, reached = start + count, first + taken
        assert start * share - 1 <= reached <= start * share + 1e-6


def test_shares_by_hand() -> None:
    assert [share_slice(start, 8, 0.25) for start in (0, 8, 16)] == [(0, 2), (2, 2), (4, 2)]
    assert [share_slice(start, 1, 0.1)[1] for start in range(10)] == [0] * 9 + [1]
    assert [share_slice(start, 1, 0.7)[1] for start in range(10)].count(1) == 7
    assert (share_slice(5, 3, 0.0), share_slice(5, 3, 1.0)) == ((0, 0), (5, 3))


@given(st.integers(1, 30), st.lists(st.integers(1, 17), min_size=1, max_size=12))
def test_no_prompt_is_skipped_and_none_comes_twice_in_a_pass(num_prompts: int, counts: list[int]) -> None:
    picked, start = [], 0
    for count in counts:
        picked += prompt_slice(num_prompts=num_prompts, seed=5, branch="general", start=start, count=count)
        start += count
    assert len(picked) == sum(counts)
    for epoch in range(len(picked) // num_prompts):
        rows = picked[epoch * num_prompts : (epoch + 1) * num_prompts]
        assert sorted(rows) == [(row, epoch) for row in range(num_prompts)]
    assert picked == prompt_slice(num_prompts=num_prompts, seed=5, branch="general", start=0, count=sum(counts))


def test_branches_and_seeds_have_orders_of_their_own() -> None:
    def order(seed: int, branch: str) -> list[tuple[int, int]]:
        return prompt_slice(num_prompts=50, seed=seed, branch=branch, start=0, count=50)

    assert len({tuple(order(s, b)) for s in (0, 1) for b in ("general", "domain")}) == 4


def test_no_prompts_is_an_error_that_names_the_branch() -> None:
    with pytest.raises(ValueError, match="branch 'legal' has no prompts"):
        prompt_slice(num_prompts=0, seed=0, branch="legal", start=0, count=1)


def test_seed_depends_on_every_part_and_on_their_borders() -> None:
    assert seed_of(1, "rollout", "a", 0) != seed_of(1, "rollout", "a", 1)
    assert seed_of("ab", "c") != seed_of("a", "bc")
    assert seed_of(1, "rollout", "a", 0) == 9693364006456277598  # pinned: another value would change every run
