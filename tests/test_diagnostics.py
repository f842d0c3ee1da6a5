"""Gradients of single samples, and what is made of them: by hand, and against backward passes on a real architecture."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

from camopd import diagnostics
from camopd.diagnostics import GradientSum, branch_sums, compare_branches, draw, gcg, gradient_blocks, measure, spread
from tests.tiny import tiny_model


def summed(*vectors: list[float]) -> GradientSum:
    total = GradientSum(torch.zeros(len(vectors[0]), dtype=torch.float64))
    for vector in vectors:
        total.add(torch.tensor(vector, dtype=torch.float64))
    return total


def row(branch: str, number: int, *, kept: bool = True, **values):
    return {"branch": branch, "prompt_id": f"{branch}-{number}", "sample_index": 0, "kept": kept, **values}


# --- By hand --------------------------------------------------------------------------------------------------------------


def test_coherence_by_hand() -> None:
    three = summed([3, 0], [0, 4], [0, 0])  # the sum is (3, 4), of length 5; the lengths add up to 7
    assert three.coherence == pytest.approx(5 / 7)
    assert three.mean.tolist() == pytest.approx([1, 4 / 3])
    assert three.mean_norm == pytest.approx(7 / 3)
    assert three.pair_cosine == 0
    assert summed([1, 2], [2, 4]).coherence == pytest.approx(1)
    assert summed([1, 2], [-1, -2]).coherence == 0
    assert summed([1, 0], [-2, 0]).pair_cosine == -1


def test_what_is_undefined_is_nan() -> None:
    assert math.isnan(summed([0, 0], [0, 0]).coherence)
    assert math.isnan(summed([1, 1]).pair_cosine)  # one sample makes no pair
    assert math.isnan(gcg(0.5, 0.0))


def test_gcg_is_in_percent() -> None:
    assert gcg(0.75, 0.5) == pytest.approx(50)
    assert gcg(0.4, 0.5) == pytest.approx(-20)


def test_unrelated_samples_are_more_coherent_the_fewer_they_are_but_their_pairs_are_not() -> None:
    unit = torch.eye(8).tolist()
    every, selected = summed(*unit), summed(*unit[:2])
    assert every.coherence == pytest.approx(1 / math.sqrt(8))
    assert gcg(selected.coherence, every.coherence) == pytest.approx(100)  # from the number alone: sqrt(8) / sqrt(2) - 1
    assert every.pair_cosine == selected.pair_cosine == 0


def test_every_pair_of_branches_is_compared() -> None:
    means = {"a": torch.tensor([2.0, 0.0]), "b": torch.tensor([-1.0, 0.0]), "c": torch.tensor([3.0, 3.0])}
    assert compare_branches(dict(reversed(means.items()))) == pytest.approx(
        {
            "gradient/cosine_a_b": -1,
            "gradient/dot_a_b": -2,
            "gradient/cosine_a_c": math.sqrt(0.5),
            "gradient/dot_a_c": 6,
            "gradient/cosine_b_c": -math.sqrt(0.5),
            "gradient/dot_b_c": -3,
        }
    )


def test_measure_by_hand() -> None:
    """A linear model w.x with the loss (w.x - y)^2 / 2 has the gradient (w.x - y) x; at w = 0 that is -y x."""
    model = nn.Linear(2, 1, bias=False)
    nn.init.zeros_(model.weight)
    rows = {
        # gradients (-3, 0), (0, -4) and, not selected, (0, 12)
        "general": [
            row("general", 1, x=[1.0, 0.0], y=3.0),
            row("general", 2, x=[0.0, 1.0], y=4.0),
            row("general", 3, x=[0.0, -12.0], y=1.0, kept=False),
        ],
        "domain": [row("domain", 1, x=[1.0, 1.0], y=-1.0)],  # gradient (1, 1)
        "idle": [row("idle", 1, x=[1.0, 1.0], y=0.0)],  # no gradient
    }
    found = measure(model, rows, lambda row: (model(torch.tensor(row["x"])) - row["y"]).pow(2).sum() / 2)
    assert found.pop("parameters") == "all parameters"
    every, selected = math.hypot(3, 8) / 19, 5 / 7
    assert found == pytest.approx(
        {
            "general/num_gradients": 3,
            "general/gradient_norm": 2.5,  # of the mean of the two selected, (-1.5, -2)
            "general/coherence_all": every,
            "general/coherence_selected": selected,
            "general/gcg": 100 * (selected - every) / every,
            "general/pair_cosine_all": -48 / (12 + 36 + 48),
            "general/pair_cosine_selected": 0,
            "domain/num_gradients": 1,
            "domain/gradient_norm": math.sqrt(2),
            "domain/coherence_all": 1,
            "domain/coherence_selected": 1,
            "domain/gcg": 0,
            "idle/num_gradients": 1,
            "idle/gradient_norm": 0,
            "gradient/dot_domain_general": -3.5,
            "gradient/cosine_domain_general": -3.5 / (2.5 * math.sqrt(2)),
        },
        rel=1e-6,
        abs=1e-6,
    )


def test_rounding_is_no_gradient() -> None:
    """Before its first update the domain branch has a gap of zero up to rounding, whose direction means nothing."""
    model = nn.Linear(2, 1, bias=False)
    rows = {"general": [row("general", 1, scale=1.0)], "domain": [row("domain", 1, scale=1e-7)]}
    found = measure(model, rows, lambda row: row["scale"] * model(torch.ones(2)).sum())
    assert "gradient/cosine_domain_general" not in found
    assert "domain/coherence_all" not in found
    assert found["domain/gradient_norm"] == pytest.approx(1e-7 * math.sqrt(2))
    assert found["general/coherence_all"] == pytest.approx(1)


def test_a_branch_of_which_nothing_was_selected_has_no_direction() -> None:
    model = nn.Linear(2, 1, bias=False)
    rows = {"general": [row("general", 1, kept=False)], "domain": [row("domain", 1)], "empty": []}
    found = measure(model, rows, lambda row: model(torch.ones(2)).sum())
    assert {name for name in found if name.startswith(("general", "gradient", "empty"))} == {
        "general/num_gradients",
        "general/coherence_all",
        "empty/num_gradients",
    }
    assert all(math.isfinite(value) for value in found.values() if not isinstance(value, str))


# --- On a real architecture -----------------------------------------------------------------------------------------------


def language_rows(branch: str, count: int):
    generator = torch.Generator().manual_seed(len(branch))
    return [
        row(branch, i, kept=i % 3 != 0, ids=torch.randint(3, 24, (5 + i,), generator=generator).tolist()) for i in range(count)
    ]


def loss_under(model):
    def loss_of(row):
        ids = torch.tensor([row["ids"]])
        return model(ids, labels=ids).loss

    return loss_of


def test_against_backward_passes_one_by_one() -> None:
    model = tiny_model().double()
    loss_of = loss_under(model)
    batches = {branch: language_rows(branch, 6) for branch in ("general", "domain")}
    found = measure(model, batches, loss_of)

    def gradients(rows):
        vectors = []
        for sample in rows:
            model.zero_grad()
            loss_of(sample).backward()
            vectors.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
        return torch.stack(vectors)  # (N, P)

    means = {}
    for branch, rows in batches.items():
        every_NP = gradients(rows)
        selected_NP = every_NP[[i for i, sample in enumerate(rows) if sample["kept"]]]
        means[branch] = selected_NP.mean(0)
        for name, matrix in (("all", every_NP), ("selected", selected_NP)):
            coherence = matrix.sum(0).norm() / matrix.norm(dim=1).sum()
            assert found[f"{branch}/coherence_{name}"] == pytest.approx(coherence.item(), rel=1e-9)
            pairs = list(itertools.combinations(matrix, 2))
            cosine = sum(a @ b for a, b in pairs) / sum(a.norm() * b.norm() for a, b in pairs)
            assert found[f"{branch}/pair_cosine_{name}"] == pytest.approx(cosine.item(), rel=1e-9)
    cosine = torch.cosine_similarity(means["general"], means["domain"], dim=0)
    assert found["gradient/cosine_domain_general"] == pytest.approx(cosine.item(), rel=1e-9)
    assert found["gradient/dot_domain_general"] == pytest.approx((means["general"] @ means["domain"]).item(), rel=1e-9)


def test_the_mean_of_the_samples_is_the_gradient_of_their_mean() -> None:
    """So the branch's gradient is the update's, up to the draw."""
    model = tiny_model().double()
    loss_of, rows = loss_under(model), language_rows("general", 4)
    parameters = list(model.parameters())
    every, _ = branch_sums(rows, loss_of, parameters, max_rows=4)
    whole = torch.autograd.grad(sum(loss_of(sample) for sample in rows) / len(rows), parameters)
    torch.testing.assert_close(every.mean, torch.cat([gradient.flatten() for gradient in whole]), rtol=1e-9, atol=1e-12)


def test_the_model_is_left_as_it_was() -> None:
    model = tiny_model()
    loss_of = loss_under(model)
    loss_of(language_rows("general", 1)[0]).backward()
    before = [(parameter.detach().clone(), parameter.grad.clone()) for parameter in model.parameters()]
    state = torch.get_rng_state()
    measure(model, {"general": language_rows("general", 3)}, loss_of)
    for parameter, (value, gradient) in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter, value)
        assert torch.equal(parameter.grad, gradient)
    assert torch.equal(torch.get_rng_state(), state)


def test_blocks_of_a_model_that_is_too_large() -> None:
    model = tiny_model()
    size = sum(parameter.numel() for parameter in model.parameters())
    block = sum(parameter.numel() for parameter in model.model.layers[0].parameters())
    assert [id(p) for p in gradient_blocks(model, max_parameters=size)["all parameters"]] == [id(p) for p in model.parameters()]
    assert list(gradient_blocks(model, max_parameters=size - 1)) == ["model.layers.0", "model.layers.1"]
    assert list(gradient_blocks(model, max_parameters=2 * block - 1)) == ["model.layers.1"]
    assert list(gradient_blocks(model, max_parameters=1)) == ["model.layers.1"]  # one at least
    found = measure(model, {"general": language_rows("general", 2)}, loss_under(model), max_parameters=1)
    assert found["parameters"] == "model.layers.1"


@pytest.mark.parametrize(
    ("length", "count", "places"), [(28, 1, [14]), (28, 2, [0, 27]), (28, 3, [0, 13, 27]), (3, 3, [0, 1, 2])]
)
def test_blocks_are_spread_from_first_to_last(length: int, count: int, places: list[int]) -> None:
    assert spread(length, count) == places


def test_the_draw_depends_on_keys_alone() -> None:
    rows = language_rows("general", 20)
    assert draw(rows, 8) == draw(rows[::-1], 8)
    assert [row for row, _ in draw(rows, 8)] != rows[:8]


@pytest.mark.parametrize(
    ("num_kept", "num_other", "drawn_kept", "drawn_other"),
    [(3, 93, 3, 5), (40, 60, 4, 4), (96, 0, 8, 0), (0, 96, 0, 8), (90, 2, 6, 2), (2, 1, 2, 1), (0, 0, 0, 0)],
)
def test_half_of_the_draw_was_selected_and_weights_make_up_for_it(
    num_kept: int, num_other: int, drawn_kept: int, drawn_other: int
) -> None:
    rows = [row("general", i, kept=i < num_kept) for i in range(num_kept + num_other)]
    drawn = draw(rows, 8)
    weights = {kept: [weight for row, weight in drawn if row["kept"] is kept] for kept in (True, False)}
    assert (len(weights[True]), len(weights[False])) == (drawn_kept, drawn_other)
    for kept, number in ((True, num_kept), (False, num_other)):
        assert sum(weights[kept]) == pytest.approx(len(drawn) * number / max(len(rows), 1))


def test_drawn_samples_stand_for_the_batch() -> None:
    """One selected sample of a hundred: drawn for half, it weighs no more in the coherence of all than it should."""
    model = nn.Linear(2, 1, bias=False)
    rows = [row("general", i, kept=i == 0, x=[1.0, 0.0] if i == 0 else [0.0, 1.0]) for i in range(100)]
    found = measure(model, {"general": rows}, lambda row: model(torch.tensor(row["x"])).sum(), max_rows=2)
    assert found["general/num_gradients"] == 2
    assert found["general/coherence_all"] == pytest.approx(math.hypot(1, 99) / 100)
    assert found["general/coherence_selected"] == pytest.approx(1)


def test_a_parameter_that_no_row_reaches_has_a_gradient_of_zero() -> None:
    experts = nn.ModuleList([nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)])
    (gradient,) = diagnostics.per_sample_gradients(
        [row("general", 1)], lambda _: experts[0](torch.ones(1)).sum(), list(experts.parameters())
    )
    assert gradient.tolist() == [1, 0]
