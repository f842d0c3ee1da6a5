"""The page: safe, self-contained, complete; the numbers behind its tables by hand."""

import json
import re
import shutil
from html.parser import HTMLParser

import pytest

from camopd.evaluate import Contestant, sample_rows, summarise
from camopd.evaluation import gradients, report
from camopd.evaluation.charts import Point, lines
from camopd.evaluation.harness import Answer
from camopd.evaluation.report import Round
from camopd.ledger import Line
from camopd.store import Store
from tests import finished
from tests.evaluation import EVIL, make_answers, make_plan, settings

NUMBERS = {"kept_ratio": 0.98, "gap": 0.5, "mean_length": 6.0, "num_samples": 10, "num_selected": 4, "tokens": 24}
DIAGNOSTICS = {
    "parameters": "model.layers.0, model.layers.27",
    "gradient/cosine_domain_general": -0.25,
    "gradient/dot_domain_general": -1.5e-4,
    "general/coherence_all": 0.5,
    "general/coherence_selected": 0.75,
    "general/gcg": 50.0,
    "general/pair_cosine_all": 0.125,
    "domain/coherence_all": 0.25,
}
SELECTED = {
    "num_samples": 10,
    "num_kept": 4,
    "kept_mass": 0.8,
    "mean_length_kept": 8.0,
    "mean_length_dropped": 5.0,
    "mean_score": 0.1,
}
BOOKS = [
    Line("rollout", 6.0, 12.0, 1.5, 3.0, 0.25, 1200, 400.0, 2_500_000),
    Line("train", 18.0, 0.0, 0.0, 0.0, 0.0, 300, 20.0, 750),
    Line("total", 24.0, 12.0, 1.5, 3.0, 0.0625, None, None, 2_500_750),
]


class Page(HTMLParser):
    """Tags, attributes and visible text."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attributes]

    def handle_data(self, data):
        self.text.append(data)


def make_rounds(count=3, names=("general", "domain")):
    return [
        Round(
            number=number,
            content_id=f"sha256:{number}",
            steps=[
                {"step": 4 * number + i, "loss": -0.1, "grad_norm": 1.0, "branches": {name: NUMBERS}}
                for i, name in enumerate(names)
            ],
            selection=dict.fromkeys(names, SELECTED),
        )
        for number in range(1, count + 1)
    ]


def page(*, plan=None, answers=None, rounds=None, **models):
    plan = plan or make_plan()
    answers = answers or make_answers(plan)
    contestants = models.pop("contestants", None) or [
        Contestant("before", "domain model before", "/d", plan.content_ids["student"], 0),
        Contestant("after", "recovered model after", "/a", "sha256:after", 2),
        *(
            Contestant(f"teacher-{name}", f"{name} teacher", "/t", plan.content_ids[f"teacher/{name}"])
            for name in (branch.name for branch in plan.recipe.branches)
            if f"teacher-{name}" in answers
        ),
    ]
    evaluation = json.loads(json.dumps(summarise(answers, contestants, plan, settings(plan)), allow_nan=False))
    return report.render(evaluation, plan, make_rounds() if rounds is None else rounds, sample_rows(answers), books=BOOKS)


def test_loads_and_runs_nothing():
    parsed = Page(page())
    assert not {"script", "link", "img", "iframe", "object", "embed", "form", "base"} & set(parsed.tags)
    references = [
        value for _, name, value in parsed.attributes if name in ("src", "href", "xlink:href", "data", "action", "poster")
    ]
    assert all(value.startswith("#") for value in references)
    assert not re.search(r"@import|url\((?!['\"]?#)", page())
    policy = [value for tag, name, value in parsed.attributes if (tag, name) == ("meta", "content") and "default-src" in value]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'"]


def test_what_models_and_users_wrote_stays_text():
    plan = make_plan(notes=EVIL, warnings=(EVIL,))
    answers = {
        model: {task: [Answer(a.item, EVIL, EVIL, EVIL, EVIL, a.score) for a in given] for task, given in tasks.items()}
        for model, tasks in make_answers(plan).items()
    }
    parsed = Page(page(plan=plan, answers=answers))
    assert not {"script", "img"} & set(parsed.tags)
    assert not [name for _, name, _ in parsed.attributes if name.startswith("on")]
    assert sum(EVIL in text for text in parsed.text) == 2 + 10 * 4  # notes, warning, and four cells of each of ten answers


def test_everything_is_there_and_accessible():
    parsed = Page(page())
    text = " ".join(" ".join(parsed.text).split())
    for heading in (
        "Before and after",
        "How it went",
        "What was selected",
        "Sample answers",
        "Time and cost by stage",
        "Settings",
        "Content ids",
    ):
        assert heading in text
    assert parsed.tags.count("svg") == 5
    assert [value for tag, name, value in parsed.attributes if (tag, name) == ("svg", "role")] == ["img"] * 5
    assert all(value for tag, name, value in parsed.attributes if (tag, name) == ("svg", "aria-label"))
    assert parsed.tags.count("th") == len([1 for tag, name, _ in parsed.attributes if (tag, name) == ("th", "scope")])
    assert "train.learning_rate" in text
    assert "sha256:after" in text


def test_the_verdict_is_one_sentence_on_top():
    text = " ".join(Page(page()).text)
    # General: start 0.25, teacher 1, after 0.75; domain: 1 and 1 (tests/evaluation.py).
    verdict = "66.7 % of the lost general ability is back, and 100.0 % of the domain score is kept."
    assert verdict in text
    assert text.index(verdict) < text.index("Before and after")


def test_without_metrics_of_rounds():
    text = " ".join(Page(page(rounds=[])).text)
    assert "The rounds left no metrics of single steps." in text
    assert "What was selected" not in text


def test_absent_and_infinite_metrics_of_steps_are_left_out():
    of_general = [{}, {"gap": None}, {"gap": 0.5}, {"gap": float("inf")}]
    steps = [{"step": step, "branches": {"general": numbers}} for step, numbers in enumerate(of_general)]
    assert report.step_series(steps, "gap", ["general", "domain"]) == {"general": [Point(2, 0.5)], "domain": []}
    assert Page(page(rounds=[Round(1, "sha256:1", steps, {})])).tags.count("svg") == 3


def test_a_step_of_two_branches_gives_a_point_to_each():
    steps = [{"step": 7, "branches": {"general": {"gap": 0.5}, "domain": {"gap": 0.25}}}]
    assert report.step_series(steps, "gap", ["general", "domain"]) == {"general": [Point(7, 0.5)], "domain": [Point(7, 0.25)]}


def with_diagnostics(rounds):
    for done, cosine in zip(rounds, (-0.25, 0.5, 0.125), strict=True):
        done.steps[0]["diagnostics"] = DIAGNOSTICS | {"gradient/cosine_domain_general": cosine}
    return rounds


def test_gradients_have_a_section_where_they_were_measured():
    assert "Gradients" not in [text.strip() for text in Page(page()).text]
    parsed = Page(page(rounds=with_diagnostics(make_rounds())))
    text = " ".join(" ".join(parsed.text).split())
    assert "taken on model.layers.0, model.layers.27" in text
    assert "Cosine domain and general -0.250 +0.125 +0.125 Below 0 the branches undo" in text
    assert "Dot product domain and general -1.50e-04" in text
    assert "GCG general +50.0 % +50.0 % +50.0 % Gradient coherence gain" in text
    assert "Coherence, all general 0.500 0.500 0.500 Length of the" in text
    assert parsed.tags.count("svg") == 7
    spoken = [value for tag, name, value in parsed.attributes if (tag, name) == ("svg", "aria-label")]
    assert "Cosine of the branches' gradients, by optimiser step: domain and general from -0.25 at 4 to 0.125 at 12." in spoken


def test_measures_that_were_never_defined_have_no_line():
    steps = [
        {"step": 0, "branches": {"general": {"tokens": 5}}, "diagnostics": {"parameters": "all parameters", "general/gcg": 2.0}}
    ]
    table = gradients.gradient_table(steps, ["general", "domain"])
    assert [group["measure"].title for group in table] == ["GCG", "Token share"]
    assert gradients.gradient_table([{"step": 0, "branches": {}}], ["general", "domain"]) == []


def test_token_shares_add_up_over_the_run():
    tokens = [{"general": 30}, {"general": 20, "domain": 30}, {"domain": 20}]
    steps = [
        {"step": step, "branches": {name: {"tokens": count} for name, count in own.items()}} for step, own in enumerate(tokens)
    ]
    assert gradients.token_shares(steps, ["general", "domain"]) == {
        "general": [Point(0, 1.0), Point(1, 50 / 80), Point(2, 0.5)],
        "domain": [Point(0, 0.0), Point(1, 30 / 80), Point(2, 0.5)],
    }


def test_rounds_are_read_as_far_as_they_are_there(tmp_path):
    store = Store()
    plan = finished.make_plan(str(tmp_path), store)
    branches = {"general": {"num_samples": 8, "num_selected": 3, "tokens": 9}}
    finished.make_round(plan, store, 1, steps=[{"step": 0, "branches": branches}, {"step": 1, "branches": branches}])
    for name in ("rollout", "score-general", "score-domain", "select"):  # a recovery in one process
        shutil.rmtree(tmp_path / plan.run_uri / "rounds" / "0001" / name)
    (done,) = report.read_rounds(plan, store)
    assert done.number == 1
    (row,) = report.selection_table([done])
    assert (row["num_samples"], row["num_kept"], row["share"], row["kept_mass"]) == (16, 6, 0.375, None)


def test_three_branches_two_of_them_with_teachers_of_their_own():
    plan = make_plan(extra=True)
    html = page(plan=plan, rounds=make_rounds(names=("general", "domain", "drugs")))
    text = " ".join(" ".join(Page(html).text).split())
    assert "drugs teacher" in text
    assert "of the domain score is kept, and 50.0 % of the drugs score is kept" in text
    assert "The model does not pass the gate" in text


def test_the_same_input_gives_the_same_bytes():
    assert page() == page()


def test_sample_answers_take_turns_and_do_not_depend_on_the_order_of_rows():
    plan = make_plan()
    answers = make_answers(plan)
    evaluation = {"branches": [{"name": b.name, "tasks": list(b.tasks)} for b in plan.recipe.branches]}
    rows = sample_rows(answers)
    chosen = report.sample_answers(evaluation, rows, count=5, seed=0)
    assert [pair["branch"] for pair in chosen] == ["general"] * 3 + ["domain"] * 2
    assert chosen == report.sample_answers(evaluation, rows[::-1], count=5, seed=0)
    assert all((p["before"]["task"], p["before"]["item"]) == (p["after"]["task"], p["after"]["item"]) for p in chosen)
    assert all((p["before"]["model"], p["after"]["model"]) == ("before", "after") for p in chosen)
    others = [report.sample_answers(evaluation, rows, count=5, seed=seed) for seed in range(1, 5)]
    assert any(other != chosen for other in others)


def test_selection_is_weighted_by_samples():
    first = SELECTED | {
        "num_samples": 10,
        "num_kept": 2,
        "mean_length_kept": 10.0,
        "mean_length_dropped": 4.0,
        "kept_mass": 1.0,
    }
    second = SELECTED | {
        "num_samples": 30,
        "num_kept": 30,
        "mean_length_kept": 6.0,
        "mean_length_dropped": None,
        "kept_mass": 0.8,
    }
    rounds = [Round(i, "", [], {"general": part}) for i, part in enumerate((first, second), 1)]
    (row,) = report.selection_table(rounds)
    assert (row["num_samples"], row["num_kept"], row["share"]) == (40, 32, 0.8)
    assert row["kept_mass"] == pytest.approx((10 * 1.0 + 30 * 0.8) / 40)
    assert row["length_kept"] == pytest.approx((2 * 10 + 30 * 6) / 32)
    assert row["length_dropped"] == 4.0  # the second round dropped nothing


def test_what_it_took_is_a_table():
    parsed = Page(page())
    text = " ".join(" ".join(parsed.text).split())
    assert "rollout 6.0 s 25 % 12.0 s 1,200 400 2.5 MB 25 % 1.5 s" in text
    assert "train 18.0 s 75 % none 300 20 750 B 0 %" in text
    assert "total 24.0 s 12.0 s 2.5 MB 6 % 1.5 s" in text


def test_how_numbers_look():
    assert report.number(1536, 0) == "1,536"
    assert report.number(0.45, sign="+") == "+0.450"
    assert report.number(None) == report.number(float("nan")) == "n/a"
    assert [report.duration(s) for s in (0.44, 59.9, 250.4, 11_100)] == ["0.4 s", "59.9 s", "4 min 10 s", "3 h 05 min"]
    assert [report.size(n) for n in (0, 812, 3_400_000, 1_200_000_000_000)] == ["0 B", "812 B", "3.4 MB", "1.2 TB"]
    assert report.bounded({"value": 0.72, "low": 0.64, "high": 0.79}) == "72.0 %"
    assert report.bounded({"value": 1.73, "low": None, "high": None}) == "an unknown share"
    assert report.shorten("x" * 700, 3) == "xxx … (700 characters)"


def test_charts_say_what_they_show_and_scale():
    svg = lines({"a": [Point(0, 0.1), Point(4, 0.75)], "b": []}, title="Score", x_label="round", y_label="score")
    opening = svg[: svg.index(">")]
    assert 'aria-label="Score, by round: a from 0.1 at 0 to 0.75 at 4."' in opening
    assert "viewBox" in opening
    assert " width=" not in opening
    assert "<metadata" not in svg
