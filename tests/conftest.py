"""What the tests share: small models made on the spot, and the folder of real data if it is there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)
"""With two threads one of the bit-for-bit comparisons of a resumed run fails: the cause is not yet known."""

DATA = Path(os.environ.get("REBEL_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")


LONGEST = ("test_quickstart.py", "test_image_runs.py", "test_distributed.py", "test_rollouts.py", "test_loop.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, so that no process is left alone with one at the end."""
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(LONGEST)))


@pytest.fixture(autouse=True)
def one_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def stories() -> Path:
    """A real pretrained language model of 260 thousand parameters."""
    folder = DATA / "stories260K"
    if not folder.exists():
        pytest.skip(f"the story model is not at {folder}; set REBEL_DATA to the folder that has it")
    return folder
