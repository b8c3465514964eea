"""Fixtures: every kind of template, and a cache of the tests' own."""

import datasets
import pytest
from templates import TEMPLATES


@pytest.fixture(params=list(TEMPLATES))
def kind(request: pytest.FixtureRequest) -> str:
    """The name of a template."""
    return request.param


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keeps the tests' data out of the user's cache."""
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("cache")
    datasets.disable_progress_bars()
