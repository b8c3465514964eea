import os

import pytest
import torch
from tiny import World, make_world


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Tiny matrices: more threads only get in each other's way."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def world(one_thread) -> World:
    return make_world()
