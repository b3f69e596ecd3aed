"""Two CPU devices, no rank promotion, and the names that doctests use."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"
    ).strip()
# The suite compiles more than it runs.
if "xla_backend_optimization_level" not in os.environ["XLA_FLAGS"]:
    os.environ["XLA_FLAGS"] += " --xla_backend_optimization_level=1"

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
