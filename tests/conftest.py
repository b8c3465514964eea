"""For all tests: one thread each, a data cache of their own, and no way to the hub."""

import os
from pathlib import Path

import hypothesis
import pytest

# Before torch and datasets are imported, here and in the processes that tests start.
os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", PYTHONPATH=str(Path(__file__).parents[1]))

# The same examples in every run, and no deadline: others may use the machine too.
hypothesis.settings.register_profile("tests", deadline=None, derandomize=True)
hypothesis.settings.load_profile("tests")


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keeps the tests' data out of the user's cache, in started processes too."""
    import datasets
    import torch

    torch.set_num_threads(1)
    cache = tmp_path_factory.mktemp("datasets_cache")
    os.environ["HF_DATASETS_CACHE"] = str(cache)
    datasets.config.HF_DATASETS_CACHE = cache
    datasets.disable_progress_bars()


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of small domains (miniature.py), which no test changes."""
    from miniature import make_data

    return make_data(tmp_path_factory.mktemp("data") / "domains")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs in this process without what takes long and is tested elsewhere."""
    import miniature

    miniature.quick(monkeypatch)
