"""Tests that need a GPU: collected everywhere, skipped by name where there is none. `make test-gpu` runs them alone."""

from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=f"{item.name} needs a CUDA GPU; there is none here"))


@pytest.fixture
def device():
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture(autouse=True)
def _memory_is_given_back():
    yield
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
