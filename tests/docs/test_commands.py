"""The commands of the documentation, run as a reader would type them.

A block of ``bash`` is run, in the order of the page, in a folder that looks like a checkout. One that cannot be run here begins
with ``# not run: <why>``, for the reader to see; one that begins with ``# yours:`` sets what differs from site to site, and the
test sets it to its own servers.
"""

import contextlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from botocore.exceptions import ClientError

from tests.fixtures.kfp_api import KfpApi, kfp
from tests.fixtures.s3 import S3Server
from tests.helm.conftest import tools

__all__ = ["kfp", "tools"]
ROOT = Path(__file__).parents[2]
PAGES = ("components.md", "install.md", "operations.md", "promotion.md")
BLOCK = re.compile(r"^```bash\n(.*?)^```", re.MULTILINE | re.DOTALL)
NOT_RUN, YOURS = "# not run: ", "# yours:"


def blocks(page: str) -> list[str]:
    return BLOCK.findall((ROOT / "docs" / page).read_text(encoding="utf-8"))


def checkout(folder: Path) -> Path:
    """A folder with everything of the repository, where a command may write without touching it."""
    folder.mkdir()
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in {path.partition("/")[0] for path in tracked.split("\0") if path}:
        (folder / name).symlink_to(ROOT / name)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page_run(
    page: str, tmp_path: Path, s3_prefix: str, s3_server: S3Server, mlflow_server: str, kfp: KfpApi, tools: Path
) -> None:
    with contextlib.suppress(ClientError):  # of an earlier page
        s3_server.client().create_bucket(Bucket="camopd")
    script = "\n".join(block for block in blocks(page) if not block.startswith((NOT_RUN, YOURS)))
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{tools}:{os.environ['PATH']}", "PYTHONPATH": "src:."}
    environment |= {"MLFLOW_TRACKING_URI": mlflow_server, "RUNS": f"{s3_prefix}/runs", "KFP_HOST": kfp.host}
    done = subprocess.run(
        ["bash", "-euxo", "pipefail", "-c", script],
        cwd=checkout(tmp_path / "checkout"),
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    if page == "install.md":
        (run,) = kfp.runs.values()
        assert run["runtime_config"]["parameters"]["output_uri"] == "s3://camopd/runs", "what the values say"


def test_every_page_with_commands_is_run():
    """Installation and the like: a page with a block of bash is in PAGES."""
    assert {file.name for file in (ROOT / "docs").glob("*.md") if blocks(file.name)} == set(PAGES)
