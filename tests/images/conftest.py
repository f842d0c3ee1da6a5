"""Containers of the built images, started as a strict cluster does: any user, read-only root, no network, no capability."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from images.build import NAMES, engine_environment, run, tag_of

ENGINE = os.environ.get("ENGINE", "podman")
HARDENED = ("--user=1234567:0", "--read-only", "--network=none", "--cap-drop=all", "--security-opt=no-new-privileges")
Inside = Callable[..., str]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`make test-images` asks for these; otherwise images of some other day would decide about a change."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.images)
            item.add_marker(pytest.mark.slow)
            if "CAMOPD_TEST_IMAGES" not in os.environ:
                item.add_marker(pytest.mark.skip(reason="`make test-images` runs it"))


@pytest.fixture(params=NAMES)
def image(request: pytest.FixtureRequest) -> str:
    """Each image by name. Fails when it has not been built."""
    assert run(ENGINE, "images", "--quiet", tag_of(request.param)), f"no image {request.param}: `make images` builds it"
    return request.param


@pytest.fixture
def inside(image: str) -> Inside:
    """Runs a command in a hardened container of the image and returns what it printed; raises with its messages."""

    def start(*command: str, flags: tuple[str, ...] = ()) -> str:
        whole = [ENGINE, "run", "--rm", *HARDENED, *flags, tag_of(image), *command]
        done = subprocess.run(whole, env=engine_environment(ENGINE), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout

    return start
