"""Two CPU devices, no rank promotion, and the names that doctests use."""

import os

from tests import flags

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = flags.xla_flags(devices=2)

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import compressjax as cj

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(autouse=True)
def _doctest_names(doctest_namespace):
    doctest_namespace.update(cj=cj, jax=jax, jnp=jnp, np=np)


@pytest.fixture
def key():
    """A fresh key, the same in every test."""
    return jax.random.key(0)
