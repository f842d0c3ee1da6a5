import pytest
from hypothesis import given
from hypothesis import strategies as st

from camopd.config import Branch
from camopd.schedule import Schedule, prompt_slice, seed_of

GENERAL = Branch(name="general", role="recover", prompts="/g.jsonl", steps=3)
DOMAIN = Branch(name="domain", role="retain", prompts="/d.jsonl")
LEGAL = Branch(name="legal", role="retain", prompts="/l.jsonl", steps=2)


def test_three_general_steps_then_one_review() -> None:
    steps = list(Schedule.of([GENERAL, DOMAIN]).ahead(120))
    assert [at.active for at in steps[:5]] == ["general", "general", "general", "domain", "general"]
    assert [at.active for at in steps].count("general") == 90  # the paper's 90 + 30
    assert [at.step for at in steps] == list(range(120))


@given(st.integers(0, 200))
def test_resumed_schedule_is_the_same_schedule(step: int) -> None:
    branches = [GENERAL, DOMAIN, LEGAL]
    unbroken = list(Schedule.of(branches).ahead(step + 10))
    assert list(Schedule.of(branches, step).ahead(10)) == unbroken[step:]
    at = unbroken[step]
    assert at.turns() == sum(before.active == at.active for before in unbroken[:step])


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
