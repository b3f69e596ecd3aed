"""Two CPU devices, no rank promotion, and the names that doctests use."""

import gc
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

# Tracing makes many objects and few cycles: looking for them took a twentieth.
gc.set_threshold(200_000, 20, 100)
gc.freeze()


@pytest.fixture(autouse=True)
def _doctest_names(doctest_namespace):
    doctest_namespace.update(cj=cj, jax=jax, jnp=jnp, np=np)


@pytest.fixture
def key():
    """A fresh key, the same in every test."""
    return jax.random.key(0)
