"""What may go and why the rest stays, by hand; and that nothing that is referred to ever goes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from camopd.retention import DAY, HOUR, Policy, Reference, Run, decide, is_within, needs_unit, state_of, units_of
from camopd.store import FileInfo, Manifest, join
from camopd.store.sweeper import Found

NOW = 1_800_000_000.0
OUTPUT = "s3://models/runs"
SHARD = "rounds/0001/shards/rollout-1-of-2/rollouts.parquet"
RECORDS = ["recipe.json", "settings.md", "registry.json", "attempts/rounds-0001-train.json", "notified/0123456789ab.json"]
EVIDENCE = [*RECORDS, "plan/plan.json", "evaluation/11111111/report.html", "release/22222222/release.json"]


def made(stage: str, content_id: str, *names: str, **more: Any) -> Manifest:
    return Manifest(stage, content_id, tuple(FileInfo(name, 10) for name in names), **more)


DEFAULT = Policy()


def make_run(
    name: str = "icd-0123456789ab", *, rounds: int = 2, age: float = 40 * DAY, passed: float = 1, **changes: Any
) -> Run:
    """A finished run of two rounds, promoted; every file has ten bytes."""
    names, manifests = list(EVIDENCE), {}
    for number in range(1, rounds + 1):
        above = f"rounds/{number:04d}"
        files = {
            "rollout": "rollouts.parquet",
            "score-general": "scored.parquet",
            "select": "selection.parquet",
            "train": "model.safetensors",
        }
        for unit, file in files.items():
            manifests[f"{above}/{unit}"] = made(unit, f"sha256:{name}-{unit}-{number}", file)
            names += [f"{above}/{unit}/{file}", f"{above}/{unit}/manifest.json"]
    manifests["plan"] = made("prepare", "sha256:plan", "plan.json")
    last = manifests[f"rounds/{rounds:04d}/train"].content_id
    manifests["evaluation/11111111"] = made("evaluate", "e", "report.html", inputs={"after": last}, metrics={"passed": passed})
    files = tuple(Found(file, 10, NOW - age) for file in names)
    return replace(Run(name, join(OUTPUT, name), files, {"num_rounds": rounds}, manifests), **changes)


def more_files(run: Run, *names: str, age: float = 40 * DAY) -> Run:
    return replace(run, files=(*run.files, *(Found(name, 10, NOW - age) for name in names)))


def without(run: Run, *starts: str) -> Run:
    kept = {name: manifest for name, manifest in run.manifests.items() if not name.startswith(starts)}
    return replace(run, files=tuple(file for file in run.files if not file.name.startswith(starts)), manifests=kept)


def goes(run: Run, policy: Policy = DEFAULT, references: Sequence[Reference] = ()) -> list[str]:
    (verdict,) = decide([run], references, policy, NOW)
    assert not verdict.whole
    return [unit.name for unit in verdict.removes]


def why(run: Run, policy: Policy = DEFAULT, references: Sequence[Reference] = ()) -> str:
    (verdict,) = decide([run], references, policy, NOW)
    return "; ".join(verdict.keeps)


TABLES = [f"rounds/000{number}/{name}" for number in (1, 2) for name in ("rollout", "score-general", "select")]


# --- What goes ------------------------------------------------------------------------------------------------------------


def test_a_finished_run_keeps_its_evidence_and_its_last_checkpoint() -> None:
    (verdict,) = decide([make_run()], [], Policy(), NOW)
    assert verdict.state == "finished"
    assert sorted(unit.name for unit in verdict.removes) == sorted([*TABLES, "rounds/0001/train"])
    assert verdict.bytes == 7 * 20
    assert verdict.keeps == (
        "the last checkpoint and what further rounds need (--checkpoints none removes it)",
        "plan, evaluation, release and records: the evidence",
    )


def test_checkpoints_none() -> None:
    run = more_files(make_run(), "teacher-prompts-general/prompts.parquet")
    assert "rounds/0002/train" not in goes(run)
    assert "teacher-prompts-general" not in goes(run)
    assert {"rounds/0001/train", "rounds/0002/train", "teacher-prompts-general"} < set(goes(run, Policy(checkpoints="none")))


def test_shards_and_leftovers_of_killed_attempts() -> None:
    names = [
        "rounds/0001/shards/rollout-1-of-2/rollouts.parquet",
        "rounds/0001/train-partial/0123456789ab/0004/model.safetensors",
    ]
    run = more_files(make_run(), *names, "rounds/0001/train-failure.json")
    assert {name.rpartition("/")[0] for name in names} < set(goes(run))


def test_what_a_killed_removal_has_left_goes_on_going() -> None:
    """Its manifest is a record by now, and names the files that are left, whatever they are called."""
    run = without(make_run(), "rounds/0001/train/manifest.json")
    record = made("train", "sha256:x", "model.safetensors", "own-name.xyz")
    unit = "rounds/0001/train"
    left = {name: manifest for name, manifest in run.manifests.items() if name != unit}
    run = more_files(replace(run, manifests=left, records={unit: record}), f"{unit}/own-name.xyz")
    assert unit in goes(run)
    assert unit not in goes(replace(run, records={}))  # nobody's name: a stranger's


def test_a_run_whose_rounds_are_gone_is_still_finished() -> None:
    run = make_run()
    records = {name: manifest for name, manifest in run.manifests.items() if name.startswith("rounds/")}
    gone = replace(without(run, "rounds/"), records=records)
    (verdict,) = decide([gone], [], Policy(checkpoints="none", whole_runs=True), NOW)
    assert (verdict.state, verdict.removes, verdict.whole) == ("finished", (), False)


# --- What stays -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "state"),
    [
        (lambda run: run, "finished"),
        (lambda run: replace(run, settings=None), "not understood"),
        (lambda run: replace(run, settings={"num_rounds": 3}), "unfinished"),  # more rounds were asked for since
        (lambda run: without(run, "evaluation/"), "unfinished"),
        (lambda run: without(run, "release/"), "unfinished"),  # the gate said yes, and promotion is still to come
        (lambda run: more_files(run, "stop.json"), "stopped"),
        (lambda run: more_files(run, "rounds/0003/rollout/rollouts.parquet", age=23 * HOUR), "running"),
        (lambda run: more_files(run, "rounds/0001/collected/rollout.json", age=HOUR), "finished"),  # our own record
        (lambda run: replace(run, begun=NOW - 2 * DAY), "running"),  # a long stage writes nothing
        (lambda run: replace(run, begun=NOW - 8 * DAY), "finished"),  # that was killed
    ],
)
def test_states(change, state) -> None:
    assert state_of(change(make_run()), NOW) == state
    if state != "finished":
        assert goes(change(make_run()), Policy(older_than=0)) == []


def test_a_refused_run_needs_no_release() -> None:
    assert state_of(without(make_run(passed=0), "release/"), NOW) == "finished"


def test_younger_runs_and_the_newest_of_each_recipe() -> None:
    runs = [make_run(f"{name}-00000000000{n}", age=(40 + n) * DAY) for name in ("icd", "law") for n in range(3)]
    verdicts = decide(runs, [], Policy(keep_last=2), NOW)
    assert [bool(verdict.removes) for verdict in verdicts] == [False, False, True] * 2
    assert verdicts[0].keeps == ("one of the newest 2 of its recipe (--keep-last)",)
    assert why(make_run(age=29 * DAY)) == "younger than 30 d (--older-than)"
    assert goes(make_run(age=31 * DAY))


@pytest.mark.parametrize(
    "location",
    [
        f"{OUTPUT}/icd-0123456789ab/rounds/0001/train",
        f"{OUTPUT}/icd-0123456789ab/rounds/0001/train/model.safetensors",
        f"{OUTPUT}/icd-0123456789ab/rounds/0001",
        f"{OUTPUT}/icd-0123456789ab/rounds",
    ],
)
def test_what_a_version_points_to_stays(location: str) -> None:
    reference = Reference("version 3 of icd", location)
    assert "rounds/0001/train" not in goes(make_run(), references=[reference])
    assert "rounds/0001/train is needed by version 3 of icd" in why(make_run(), references=[reference])


def test_a_version_that_names_the_run_alone_keeps_the_run_and_not_its_tables() -> None:
    """What a promoted version points to is its export below release/, and its tag names the run."""
    run = make_run()
    references = [Reference("version 3 of icd", run.uri), Reference("version 3 of icd", f"{run.uri}/release/22222222/model")]
    assert set(TABLES) < set(goes(run, Policy(checkpoints="none"), references))
    failed = without(run, "evaluation/")
    (verdict,) = decide([failed], references[:1], Policy(whole_runs=True), NOW)
    assert not verdict.whole
    assert verdict.keeps == ("needed by version 3 of icd",)


def test_a_checkpoint_that_another_run_begins_with_stays_by_place_and_by_content() -> None:
    run = make_run()
    other = Reference("run law-0123456789ab", f"{run.uri}/rounds/0001/train", owner="law-0123456789ab")
    assert "rounds/0001/train" not in goes(run, references=[other])
    same = Reference("run law-0123456789ab", content_id=run.manifests["rounds/0001/train"].content_id, owner="law-0123456789ab")
    assert "rounds/0001/train" not in goes(run, references=[same])
    assert "rounds/0001/train" in goes(run, references=[replace(same, owner=run.name)])  # no run needs protection from itself


def test_a_release_that_names_a_version_counts_where_no_registry_is_asked() -> None:
    run = make_run(released=(f"{OUTPUT}/icd-0123456789ab/rounds/0002/train",))
    assert "rounds/0002/train" not in goes(run, Policy(checkpoints="none"))


@pytest.mark.parametrize("name", ["rounds/0001/rollout/notes.txt", "rounds/0001/rollout/.DS_Store", "rounds/0001/rollout/a/b"])
def test_what_somebody_else_put_there_stops_its_folder_and_is_named(name: str) -> None:
    run = more_files(make_run(), name)
    assert "rounds/0001/rollout" not in goes(run)
    assert "rounds/0002/rollout" in goes(run)
    assert f"rounds/0001/rollout holds what is not ours: {name}" in why(run)


# --- Whole runs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change", [lambda run: without(run, "evaluation/", "release/"), lambda run: more_files(run, "stop.json")]
)
def test_a_run_that_came_to_nothing_goes_as_a_whole_when_asked(change) -> None:
    run = change(make_run())
    assert goes(run) == []
    (verdict,) = decide([run], [], Policy(whole_runs=True), NOW)
    assert verdict.whole
    assert verdict.bytes == 10 * len(run.files)


@pytest.mark.parametrize("name", ["README.txt", "rounds/0001/photo.png", "evaluation/11111111/own.ipynb", "rounds/x/y"])
def test_a_whole_run_with_a_strangers_file_stays(name: str) -> None:
    run = more_files(without(make_run(), "release/"), name)
    (verdict,) = decide([run], [], Policy(whole_runs=True), NOW)
    assert not verdict.whole
    assert verdict.keeps == (f"holds what is not ours: {name}",)


def test_what_a_killed_process_left_half_written_is_no_strangers() -> None:
    run = more_files(without(make_run(), "release/"), "rounds/0001/.camopd-ab12cd/model.safetensors", ".camopd-0123")
    assert decide([run], [], Policy(whole_runs=True), NOW)[0].whole


# --- Properties -----------------------------------------------------------------------------------------------------------

NAMES = ["icd-0123456789ab", "law-0123456789ab"]
PLACES = st.sampled_from(
    [f"rounds/000{n}/{u}" for n in (1, 2) for u in ("rollout", "score-general", "select", "train", "train/model.safetensors")]
    + ["rounds", "rounds/0002", "evaluation/11111111", "release/22222222/model", "teacher-prompts-general"]
)
REFERENCES = st.lists(
    st.builds(
        lambda name, place, how, owner: Reference(
            "somebody",
            location=f"{OUTPUT}/{name}/{place}" if how else "",
            content_id="" if how else f"sha256:{name}-train-{1 + len(place) % 2}",
            owner=owner,
        ),
        st.sampled_from(NAMES),
        PLACES,
        st.booleans(),
        st.sampled_from(["", *NAMES]),
    ),
    max_size=4,
)
CHANGES = st.sampled_from(
    [
        lambda run: run,
        lambda run: without(run, "release/"),
        lambda run: more_files(run, "stop.json"),
        lambda run: more_files(
            run, "teacher-prompts-general/prompts.parquet", "rounds/0001/shards/rollout-1-of-2/rollouts.parquet"
        ),
        lambda run: more_files(run, "rounds/0001/train/mine.txt"),
    ]
)
POLICIES = st.builds(
    Policy, st.sampled_from([0.0, 30 * DAY]), st.integers(0, 1), st.sampled_from(["last", "none"]), st.booleans()
)


@given(st.tuples(CHANGES, CHANGES), st.tuples(st.floats(0, 90 * DAY), st.floats(0, 90 * DAY)), REFERENCES, POLICIES)
def test_nothing_that_is_referred_to_ever_goes(changes, ages, references, policy) -> None:
    runs = [change(make_run(name, age=age)) for change, name, age in zip(changes, NAMES, ages, strict=True)]
    for verdict in decide(runs, references, policy, NOW):
        run = verdict.run
        foreign = [reference for reference in references if reference.owner != run.name]
        gone = [f"{run.uri}/{file.name}" for file in run.files] if verdict.whole else []
        gone += [f"{run.uri}/{unit.name}/{file.name}" for unit in verdict.removes for file in unit.files]
        ids = {
            run.manifests[unit].content_id for unit in run.manifests for file in gone if file.startswith(f"{run.uri}/{unit}/")
        }
        for reference in foreign:
            assert not any(is_within(file, reference.location) for file in gone if reference.location)
            assert not any(is_within(reference.location, file) for file in gone)
            assert reference.content_id not in ids
        assert not any(file.endswith("mine.txt") for file in gone)
        if NOW - run.newest < DAY:
            assert gone == []
        if not verdict.whole:
            assert all("/rounds/" in file or "/teacher-prompts-" in file for file in gone)


@given(st.lists(st.sampled_from([file.name for file in make_run().files]), unique=True))
def test_units_do_not_depend_on_the_order_of_a_listing(names: list[str]) -> None:
    files = [Found(name, 1, 0.0) for name in names]
    assert {unit.name: set(unit.files) for unit in units_of(files)} == {
        unit.name: set(unit.files) for unit in units_of(reversed(files))
    }


def test_a_name_that_begins_alike_is_another_place() -> None:
    run = make_run()
    (unit,) = (unit for unit in run.units if unit.name == "rounds/0001/train")
    assert not needs_unit(Reference("x", f"{run.uri}/rounds/0001/train-partial"), run, unit)
    assert not needs_unit(Reference("x", f"{run.uri}x/rounds/0001/train"), run, unit)
