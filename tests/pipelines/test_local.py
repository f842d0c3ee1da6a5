"""The command behind `make demo`: what it says, and that it goes on where it was killed."""

import os
import subprocess
import sys
import time

import pytest
from rich.console import Console

from camopd.errors import InputError
from camopd.outcome import registered
from pipelines.local import last_words, recover, run_form

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


def test_the_first_failed_task_has_the_last_words():
    assert last_words(LOG) == [
        "loading",
        "Traceback (most recent call last):",
        '  File "train.py", line 1, in run',
        "camopd.errors.StoreError: the checkpoint is short",
    ]
    assert last_words(LOG, count=1) == ["camopd.errors.StoreError: the checkpoint is short"]


def test_without_a_failed_task_the_log_s_end_is_shown():
    assert last_words("ModuleNotFoundError: No module named 'kfp'\n") == ["ModuleNotFoundError: No module named 'kfp'"]


def test_keys_and_fields_are_both_understood():
    assert run_form(["seed=2", "method_num_rounds=3", "notes=a=b", "promote.enabled=false"]) == {
        "method_seed": "2",
        "method_num_rounds": "3",
        "output_notes": "a=b",
        "output_promote": False,
    }


def test_what_the_run_form_lacks_is_refused():
    with pytest.raises(InputError, match="did you mean 'method_seed'"):
        run_form(["method_sed=1"])


@pytest.mark.parametrize(
    ("release", "words"),
    [
        (None, "the gate said no"),
        ({"version": None, "status": "refused", "reasons": ["it was damaged"]}, "refused: it was damaged"),
        (
            {"version": 3, "status": "promoted", "model_name": "m", "alias": "champion"},
            "m version 3, alias champion (promoted)",
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

    def weights(output: str) -> bytes:
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
    assert weights("killed") == weights("unbroken")

    begun = time.monotonic()
    with start(*arguments("killed"), database=mlflow_sqlite) as last:
        text, _ = last.communicate()
    assert "Everything was done already; nothing was run." in text
    assert time.monotonic() - begun < 30


def test_a_recovery_in_one_process_is_refused_before_anything_is_started(small_recipe, tmp_path):
    small_recipe.write_text(f'execution = "colocated"\noutput = "{tmp_path}/runs"\n' + small_recipe.read_text())
    with pytest.raises(InputError, match="execution: the pipeline works in stages"):
        recover(str(small_recipe), [], Console())
    assert not (tmp_path / "runs").exists()


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
