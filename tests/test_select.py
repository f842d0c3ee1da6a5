"""Gap mass by hand and by its properties (method section 4)."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from camopd.config import Recipe
from camopd.plan import Plan
from camopd.score import is_scored
from camopd.select import gap_score, kl_score, select_by_mass, select_rows, summarise
from tests.test_config import MINIMAL_BRANCHES

scores_strategy = st.dictionaries(
    st.tuples(st.text("abc", min_size=1, max_size=3), st.integers(0, 3)), st.floats(0, 100), min_size=1, max_size=30
)


def test_scores_by_hand() -> None:
    teacher, student = [-1.0, -2.0, -0.5], [-2.0, -1.0, -0.5]  # gaps +1, -1, 0
    assert gap_score(teacher, student, "absolute") == pytest.approx(2 / 3)
    assert gap_score(teacher, student, "positive") == pytest.approx(1 / 3)


def test_keeps_the_shortest_prefix_that_reaches_the_mass() -> None:
    scores = {("a", 0): 1.0, ("b", 0): 5.0, ("c", 0): 3.0, ("d", 0): 1.0}  # 5 + 3 = 8 of 10
    choices = select_by_mass(scores, 0.8)
    assert {key for key, choice in choices.items() if choice.kept} == {("b", 0), ("c", 0)}
    assert [choices[key].rank for key in (("b", 0), ("c", 0), ("a", 0), ("d", 0))] == [1, 2, 3, 4]
    assert choices[("c", 0)].cumulative_share == pytest.approx(0.8)
    assert choices[("a", 0)].reason == "below mass"


def test_one_sample_may_hold_all_the_mass() -> None:
    choices = select_by_mass({("a", 0): 9.0, ("b", 0): 0.5, ("c", 0): 0.5}, 0.8)
    assert [choice.kept for choice in choices.values()] == [True, False, False]


def test_no_gap_keeps_everything() -> None:
    """The domain branch before the first update: student and teacher are the same model."""
    assert all(choice.kept for choice in select_by_mass({("a", 0): 0.0, ("b", 0): 0.0}, 0.8).values())


def test_rounding_errors_are_no_gap() -> None:
    """Decoding and scoring differ in the last bits: without a floor such a batch would lose two samples in three by chance."""
    scores = {("a", 0): 9e-7, ("b", 0): 1e-8, ("c", 0): 0.0}
    assert all(choice.kept for choice in select_by_mass(scores, 0.8, floor=1e-3).values())
    assert sum(choice.kept for choice in select_by_mass(scores, 0.8).values()) == 1
    assert sum(choice.kept for choice in select_by_mass({("a", 0): 0.9, ("b", 0): 0.0}, 0.8, floor=1e-3).values()) == 1


def test_ties_break_by_key() -> None:
    choices = select_by_mass({("b", 0): 1.0, ("a", 1): 1.0, ("a", 0): 1.0}, 0.5)
    assert [key for key, choice in choices.items() if choice.kept] == [("a", 0), ("a", 1)]


@given(scores_strategy, st.floats(0.01, 1.0), st.randoms())
def test_order_never_matters_and_the_prefix_is_minimal(scores: dict, mass: float, random) -> None:
    items = list(scores.items())
    random.shuffle(items)
    choices = select_by_mass(dict(items), mass)
    assert choices == select_by_mass(scores, mass)
    kept = [scores[key] for key, choice in choices.items() if choice.kept]
    dropped = [scores[key] for key, choice in choices.items() if not choice.kept]
    total = math.fsum(scores.values())
    assert math.fsum(kept) >= mass * total * (1 - 1e-9)
    if dropped:
        assert min(kept) >= max(dropped)
        assert math.fsum(kept) - min(kept) < mass * total * (1 + 1e-9)


def test_a_mass_of_one_is_no_selection() -> None:
    scores = {("a", 0): 0.1, ("b", 0): 0.2, ("c", 0): 0.3, ("d", 0): 0.0}
    assert all(choice.kept for choice in select_by_mass(scores, 1.0).values())
    dropped = [key for key, choice in select_by_mass(scores, 1 - 1e-15).items() if not choice.kept]
    assert dropped == [("d", 0)]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_scores_that_cannot_be_ranked_are_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        select_by_mass({("a", 0): bad, ("b", 0): 1.0}, 0.8)


def test_summary_shows_the_length_bias() -> None:
    rows = [{"kept": True, "score": 3.0, "num_tokens": 10}, {"kept": False, "score": 1.0, "num_tokens": 4}]
    summary = summarise(rows)
    assert (summary["kept_mass"], summary["mean_length_kept"], summary["mean_length_dropped"]) == (0.75, 10, 4)


# --- The exact divergence as a score --------------------------------------------------------------------------------------


def distributions(seed: int, length: int = 4, vocab: int = 7) -> np.ndarray:
    """Probabilities (L, V) of student and teacher."""
    return np.random.default_rng(seed).dirichlet(np.ones(vocab), (2, length))


@given(st.integers(0, 10_000), st.integers(1, 7))
def test_kl_score_is_the_coarse_divergence(seed: int, k: int) -> None:
    """Over the student's k most likely tokens and one bucket for the rest; over all of them the divergence itself."""
    student, teacher = distributions(seed)
    expected = []
    for p, q in zip(student, teacher, strict=True):
        ids = sorted(range(len(p)), key=lambda v: -p[v])[:k]
        pairs = [(p[v], q[v]) for v in ids]
        if k < len(p):
            pairs.append((1 - sum(own for own, _ in pairs), 1 - sum(theirs for _, theirs in pairs)))
        expected.append(sum(own * math.log(own / theirs) for own, theirs in pairs))
    ids = np.argsort(-student)[:, :k]
    ours, theirs = (np.log(np.take_along_axis(p, ids, -1)).astype(np.float32) for p in (student, teacher))
    assert kl_score(theirs, ours) == pytest.approx(np.mean(expected), abs=1e-5)


def test_a_teacher_equal_to_the_student_has_no_kl() -> None:
    """Never negative, however the tail is rounded: selection ranks no such score."""
    student = np.log(distributions(0)[0][:, :3]).astype(np.float32)
    assert kl_score(student, student) == 0
    almost = np.log(np.array([[0.7, 0.2999999]], np.float32))
    assert kl_score(almost, almost + np.float32(1e-7)) >= 0


# --- A round's selection --------------------------------------------------------------------------------------------------


def make_plan(**settings) -> Plan:
    recipe = Recipe.model_validate({"student": "/s", "branches": MINIMAL_BRANCHES, **settings})
    return Plan("/runs/x", recipe, {}, 20, (2,), 0, {"general": 9, "domain": 9}, "t", 32)


def make_row(branch: str, prompt_id: str, gap: float, *, step: int = 0, length: int = 2) -> tuple[dict, dict]:
    """A sample whose teacher is ``gap`` nats above the student at every token, and what the teacher says."""
    key = {"branch": branch, "prompt_id": prompt_id, "sample_index": 0, "step": step}
    own = np.full(length, -3.0, np.float32)
    return key | {"response_ids": np.arange(length, dtype=np.int32), "logprobs": own}, key | {"teacher_logprobs": own + gap}


def select(*pairs: tuple[dict, dict], **settings) -> dict[tuple, dict]:
    rollouts, scored = zip(*pairs, strict=True)
    return {(r["branch"], r["prompt_id"]): r for r in select_rows(rollouts, scored[::-1], make_plan(**settings))}


def test_branches_are_selected_apart_even_where_prompt_ids_agree() -> None:
    """Domain gaps count only where the teacher is above the student, and each branch has its own total."""
    chosen = select(
        make_row("general", "a", -2.0, length=3),
        make_row("general", "b", 0.25),
        make_row("domain", "a", 0.1),
        make_row("domain", "b", -2.0),
    )
    assert {key: row["score"] for key, row in chosen.items()} == pytest.approx(
        {("general", "a"): 2.0, ("general", "b"): 0.25, ("domain", "a"): 0.1, ("domain", "b"): 0.0}, abs=1e-6
    )
    assert {key for key, row in chosen.items() if row["kept"]} == {("general", "a"), ("domain", "a")}
    assert chosen["general", "a"]["num_tokens"] == 3


def test_steps_are_selected_apart() -> None:
    chosen = select(make_row("general", "a", 0.1, step=0), make_row("general", "b", 2.0, step=1), method="camopd")
    assert all(row["kept"] for row in chosen.values())


def test_samples_that_were_not_scored_are_left_out() -> None:
    (first, teacher), (second, _) = make_row("general", "a", 1.0), make_row("general", "b", 2.0)
    assert [row["prompt_id"] for row in select_rows([second, first], [teacher], make_plan())] == ["a"]
    assert select_rows([second], [], make_plan()) == []


def test_a_preset_without_selection_keeps_all() -> None:
    assert all(
        row["kept"] for row in select(make_row("general", "a", 2.0), make_row("general", "b", 0.0), method="mopd").values()
    )


def test_the_kl_of_both_models_ranks_a_branch_that_asks_for_it() -> None:
    """The sampled token hides a gap that the distributions show."""
    branches = [MINIMAL_BRANCHES[0] | {"score": "kl", "mass": 0.5}, MINIMAL_BRANCHES[1]]
    top = {"near": [0.5, 0.3], "far": [0.1, 0.7]}
    pairs = []
    for prompt_id, teacher in top.items():
        row, scored = make_row("general", prompt_id, 2.0 if prompt_id == "near" else 0.0)
        row["student_topk_logprobs"] = np.log([[0.6, 0.3]] * 2).astype(np.float32)
        scored["topk_logprobs"] = np.log([teacher] * 2).astype(np.float32)
        pairs.append((row, scored))
    chosen = select(*pairs, branches=branches, score={"signal": "topk", "top_k": 2, "top_k_of": "student"})
    assert [row["prompt_id"] for row in chosen.values() if row["kept"]] == ["far"]


@pytest.mark.parametrize(
    ("empty_answers", "length", "reason", "scored"),
    [
        ("skip", 1, "empty", False),
        ("score", 1, "empty", True),
        ("score", 0, "empty", False),
        ("score", 2, "invalid", False),
        ("skip", 2, "stop", True),
        ("skip", 2, "length", True),
    ],
)
def test_answers_of_an_end_token_alone_are_scored_where_the_recipe_says_so(
    empty_answers: str, length: int, reason: str, scored: bool
) -> None:
    """A row without tokens never gets as far as the loss, whatever the recipe says."""
    recipe = make_plan(score={"empty_answers": empty_answers}).recipe
    assert is_scored({"finish_reason": reason, "response_ids": [2] * length}, recipe) is scored
