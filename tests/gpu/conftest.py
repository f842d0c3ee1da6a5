"""Where these tests run: on the first GPU; without one they are skipped. CAMOPD_TEST_DEVICE=cpu runs what a CPU can."""

from __future__ import annotations

import os

import pytest
import torch

CHOSEN = "CAMOPD_TEST_DEVICE"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(os.path.dirname(__file__)):
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(scope="session")
def where() -> torch.device:
    """The device of the tests, which is also the one that camopd chooses."""
    name = os.environ.get(CHOSEN, "cuda")
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip(f"there is no CUDA GPU; {CHOSEN}=cpu runs what a CPU can")
    if name == "cpu" and torch.cuda.is_available():
        pytest.skip(f"{CHOSEN}=cpu is for machines without a GPU: hide it with CUDA_VISIBLE_DEVICES=")
    return torch.device(name)


@pytest.fixture
def gpu(where: torch.device) -> torch.device:
    """A device whose allocator can be asked what it holds."""
    if where.type != "cuda":
        pytest.skip("a CPU has no allocator that says what it holds")
    return where
