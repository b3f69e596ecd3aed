"""One cache of the embedded image set for all tests of the trainer."""

import pytest


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory):
    """Where the embedded set is prepared, once."""
    return tmp_path_factory.mktemp("cache")
