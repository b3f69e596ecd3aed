"""Tests of the law run in double precision, so that round-off cannot hide an error."""

import jax
import pytest


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield
