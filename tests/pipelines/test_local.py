"""The command behind `make demo`: what it says, and that it goes on where it was killed."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from camopd import workflow
from camopd.errors import InputError
from camopd.outcome import registered
from pipelines.local import last_words, run_form
from tests.integration.runs import weights

LOG = """\
10:00:00.100 - INFO - Executing task \x1b[96m'rollout'\x1b[0m
10:00:00.101 - INFO - Streamed logs:

    sampling
10:00:01.000 - INFO - Task \x1b[96m'rollout'\x1b[0m finished with status \x1b[92mSUCCESS\x1b[0m
10:00:01.100 - INFO - Executing task \x1b[96m'train'\x1b[0m
10:00:01.101 - INFO - Streamed logs:

    loading
    Traceback (most recent call last):
      File "train.py", line 1, in run
    camopd.errors.StoreError: the checkpoint is short

10:00:02.000 - ERROR - Task \x1b[96m'train'\x1b[0m finished with status \x1b[91mFAILURE\x1b[0m
10:00:02.100 - INFO - Executing task \x1b[96m'begin'\x1b[0m
    camopd.errors.StoreError: round 3 cannot start
10:00:03.000 - ERROR - Task \x1b[96m'begin'\x1b[0m finished with status \x1b[91mFAILURE\x1b[0m
"""


# As kfp 2.17.3 writes it where a task could not be started in the first of two turns: the next turn has begun already.
LOG_OF_AN_EXCEPTION = """\
10:00:00.100 - INFO - Executing task \x1b[96m'begin'\x1b[0m
10:00:01.000 - INFO - Task \x1b[96m'begin'\x1b[0m finished with status \x1b[92mSUCCESS\x1b[0m
10:00:01.100 - INFO - Executing task \x1b[96m'rollout'\x1b[0m
10:00:01.101 - INFO - Streamed logs:

    asking for a container
10:00:01.200 - INFO - Executing task \x1b[96m'begin'\x1b[0m
10:00:01.201 - ERROR - Task for-loop-2-iteration-0 failed with exception: no room for a container
10:00:01.202 - INFO - Streamed logs:

    camopd.errors.StoreError: round 2 cannot start
10:00:02.000 - ERROR - Task \x1b[96m'begin'\x1b[0m finished with status \x1b[91mFAILURE\x1b[0m
10:00:02.100 - INFO - Executing task \x1b[96m'report-outcome'\x1b[0m
10:00:03.000 - INFO - Task \x1b[96m'report-outcome'\x1b[0m finished with status \x1b[92mSUCCESS\x1b[0m
RuntimeError: Pipeline finished with status FAILURE
"""


def test_the_first_failed_task_has_the_last_words():
    assert last_words(LOG) == (
        "train",
        [
            "loading",
            "Traceback (most recent call last):",
            '  File "train.py", line 1, in run',
            "camopd.errors.StoreError: the checkpoint is short",
        ],
    )
    assert last_words(LOG, count=1) == ("train", ["camopd.errors.StoreError: the checkpoint is short"])


def test_a_task_that_could_not_be_run_has_failed_first():
    assert last_words(LOG_OF_AN_EXCEPTION) == ("rollout", ["asking for a container", "no room for a container"])
    assert last_words(LOG_OF_AN_EXCEPTION, count=1) == ("rollout", ["no room for a container"])
    assert last_words(LOG + LOG_OF_AN_EXCEPTION) == last_words(LOG)
    assert last_words(LOG_OF_AN_EXCEPTION + LOG) == last_words(LOG_OF_AN_EXCEPTION)


def test_where_no_other_turn_logs_the_line_is_the_root_logger_s():
    alone = re.sub(r"(?s)10:00:01.200.*?ERROR - (Task for.*?\n).*?(?=10:00:02.100)", r"ERROR:root:\1", LOG_OF_AN_EXCEPTION)
    assert "ERROR:root:Task for-loop-2-iteration-0 failed with exception" in alone
    assert last_words(alone) == ("rollout", ["asking for a container", "no room for a container"])


def test_a_task_whose_output_could_not_be_taken_is_the_turn_s():
    ended = "10:00:01.150 - INFO - Task 'rollout' finished with status SUCCESS\n10:00:01.200"
    assert last_words(LOG_OF_AN_EXCEPTION.replace("10:00:01.200", ended)) == ("", ["no room for a container"])


def test_without_a_failed_task_the_log_s_end_is_shown():
    assert last_words("ModuleNotFoundError: No module named 'kfp'\n") == ("", ["ModuleNotFoundError: No module named 'kfp'"])


def test_keys_and_fields_are_both_understood():
    assert run_form(["seed=2", "method_num_rounds=3", "notes=a=b", "output_promote=false"]) == {
        "method_seed": "2",
        "method_num_rounds": "3",
        "output_notes": "a=b",
        "output_promote": False,
    }


def test_what_the_run_form_lacks_is_refused():
    with pytest.raises(InputError, match="did you mean 'method_seed'"):
        run_form(["method_sed=1"])
    with pytest.raises(InputError, match=r"promote\.policy: the run form has no such field"):  # it has a switch
        run_form(["promote.policy=manual"])


@pytest.mark.parametrize(
    ("release", "words"),
    [
        (None, "the gate said no"),
        ({"version": None, "status": "refused", "reasons": ["it was damaged"]}, "refused: it was damaged"),
        (
            {"version": 3, "status": "promoted", "model_name": "m", "alias": "champion"},
            "m version 3, alias champion (promoted)",
        ),
        (
            {"version": 3, "status": "candidate", "model_name": "m", "alias": "candidate", "reasons": ["it waits: `camopd"]},
            "m version 3, alias candidate (candidate); it waits: `camopd",
        ),
    ],
)
def test_the_registry_s_line(release, words):
    assert words in registered(release)


# --- The whole command ----------------------------------------------------------------------------------------------------


def start(*arguments: str, database: str) -> subprocess.Popen[str]:
    """Start the command as `make demo` does."""
    command = [sys.executable, "-m", "pipelines.local", *arguments]
    environment = {**os.environ, "MLFLOW_TRACKING_URI": database, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def processes_of(session: int) -> list[str]:
    """Processes that live in a session."""
    return subprocess.run(["ps", "-o", "pid=", "-s", str(session)], capture_output=True, text=True, check=False).stdout.split()


@pytest.mark.slow
@pytest.mark.parametrize("shards", [1, 2])
def test_killed_and_started_again_it_ends_like_an_unbroken_run(small_recipe, mlflow_sqlite, tmp_path, shards):
    """Two shards, killed, end like one pod, unbroken."""
    text = small_recipe.read_text().replace("[rollout]", "[rollout]\nbatch_size = 4")
    small_recipe.write_text(text)
    spread = small_recipe.with_name("spread.toml")
    spread.write_text(f"shards = {shards}\n" + text)

    def arguments(output: str) -> list[str]:
        recipe = spread if output == "killed" else small_recipe
        return [str(recipe), "--set", f"output={tmp_path / output}", "--set", "num_rounds=2"]

    def last_weights(output: str) -> bytes:
        (path,) = (tmp_path / output).glob("*/rounds/0002/train/model.safetensors")
        return path.read_bytes()

    with start(*arguments("killed"), database=mlflow_sqlite) as first:
        assert first.stdout is not None
        assert any("round 1/2  rollout" in line for line in first.stdout), "it ended before the first round"
        children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(first.pid)], capture_output=True, text=True, check=True)
        (runner,) = map(int, children.stdout.split())
        first.kill()
    deadline = time.monotonic() + 10
    while processes_of(runner) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert processes_of(runner) == [], "a killed command leaves no stage at work"
    assert not list((tmp_path / "killed").glob("*/rounds/0002/train"))

    for output in ("killed", "unbroken"):
        with start(*arguments(output), database=mlflow_sqlite) as again:
            text, _ = again.communicate()
        assert again.returncode == 0, text
        assert "Gate:     passed" in text
        assert "Registry: camopd-recovered version" in text
    assert last_weights("killed") == last_weights("unbroken")

    begun = time.monotonic()
    with start(*arguments("killed"), database=mlflow_sqlite) as last:
        text, _ = last.communicate()
    assert "Everything was done already; nothing was run." in text
    assert time.monotonic() - begun < 30


@pytest.mark.slow
def test_all_rounds_in_one_pod_killed_and_started_again_are_those_of_the_command_line(small_recipe, mlflow_sqlite, tmp_path):
    """Killed after a round, it goes on from there in a new pipeline run, with the bytes of an unbroken ``camopd recover``."""
    small_recipe.write_text('execution = "colocated"\nsteps_per_round = 2\n' + small_recipe.read_text())
    arguments = [str(small_recipe), "--set", f"output={tmp_path / 'pods'}", "--set", "num_rounds=3"]
    with start(*arguments, database=mlflow_sqlite) as first:
        assert first.stdout is not None
        said = next((line for line in first.stdout if "round 1/3  recover" in line), "")
        assert "2/2 steps" in said, "each round is a line of the log"
        first.kill()
    (checkpoint,) = (tmp_path / "pods").glob("*/rounds/0001/train/model.safetensors")
    made = checkpoint.stat().st_mtime_ns
    with start(*arguments, database=mlflow_sqlite) as again:
        text, _ = again.communicate()
    assert again.returncode == 0, text
    assert "Gate:     passed" in text
    assert "round 1/3" not in text
    assert "round 3/3  recover  2/2 steps" in text
    assert checkpoint.stat().st_mtime_ns == made

    here = workflow.run(str(small_recipe), {"output": str(tmp_path / "here"), "num_rounds": 3}).uri
    (there,) = (path.parent for path in (tmp_path / "pods").glob("*/recipe.json"))
    assert there.name == Path(here).name, "the same run, wherever it is done"
    assert weights(str(there)) == weights(here)
    assert not list(there.glob("rounds/*/rollout"))


@pytest.mark.slow
def test_bad_input_is_told_before_anything_is_started(small_recipe, mlflow_sqlite, tmp_path):
    with start(
        str(small_recipe), "--set", f"output={tmp_path / 'runs'}", "--set", "seed=-1", database=mlflow_sqlite
    ) as process:
        text, _ = process.communicate()
    assert process.returncode == 1
    assert "method_seed" in text
    assert "Traceback" not in text
    assert not (tmp_path / "runs").exists()
