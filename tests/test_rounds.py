import pytest

from camopd import plan as layout
from camopd.errors import StoreError
from camopd.rounds import begin, begin_turn, record_stop, stop_reason
from camopd.store import Store
from tests.finished import make_plan


def finish(store: Store, uri: str, stage: str) -> None:
    def write(folder):
        (folder / "x").write_text(stage)
        return {}

    store.produce(uri, stage=stage, config={}, inputs={}, write=write)


@pytest.fixture
def run(tmp_path):
    store, run_uri = Store(), str(tmp_path / "run")
    finish(store, layout.plan_uri(run_uri), "prepare")
    return store, run_uri, [layout.round_uri(run_uri, number) for number in (1, 2, 3)]


def test_rounds_start_one_after_another(run) -> None:
    store, _, rounds = run
    assert begin(rounds[0], store=store) == "go"
    with pytest.raises(StoreError, match="round 2 cannot start: round 1 has no checkpoint"):
        begin(rounds[1], store=store)
    finish(store, layout.checkpoint_uri(rounds[0]), "train")
    assert begin(rounds[0], store=store) == "done"
    assert begin(rounds[1], store=store) == "go"
    with pytest.raises(StoreError, match="round 3 cannot start"):
        begin(rounds[2], store=store)


def test_a_stopped_run_starts_nothing_and_keeps_the_first_reason(run) -> None:
    store, run_uri, rounds = run
    assert stop_reason(run_uri, store=store) is None
    finish(store, layout.checkpoint_uri(rounds[0]), "train")
    record_stop(run_uri, stage="train", round_number=2, reason="loss nan is not finite", store=store)
    record_stop(run_uri, stage="train", round_number=3, reason="another", store=store)
    assert [begin(uri, store=store) for uri in rounds] == ["done", "stop", "stop"]
    assert stop_reason(run_uri, store=store) == "round 2, train: loss nan is not finite"


@pytest.mark.parametrize("shards", [1, 2])
def test_a_turn_of_the_loop_goes_by_the_recipe_s_shards(tmp_path, shards) -> None:
    store = Store()
    plan = make_plan(str(tmp_path), store, shards=shards)
    assert begin_turn(plan.rounds[0], store=store) == ("go" if shards == 1 else "shards")
    finish(store, layout.checkpoint_uri(plan.rounds[0]), "train")
    assert begin_turn(plan.rounds[0], store=store) == "done"


def test_a_run_that_was_not_prepared_is_named(tmp_path) -> None:
    with pytest.raises(StoreError, match=r"plan is not finished"):
        begin(str(tmp_path / "run" / "rounds" / "0001"))


@pytest.mark.parametrize("uri", ["/runs/x", "/runs/x/rounds", "/runs/x/rounds/first", "/runs/x/turns/0001"])
def test_a_prefix_that_is_no_round_is_refused(uri) -> None:
    with pytest.raises(ValueError, match="is not a round"):
        begin(uri)
