"""Paths and globs."""

import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from compressjax.core import errors, trees

CASES = [
    ("**", "params/a/kernel", True),
    ("*", "kernel", True),
    ("*", "params/kernel", True),  # below the collection
    ("*", "params/a/kernel", False),
    ("params/a/*", "params/a/kernel", True),
    ("params/*", "params/a/kernel", False),
    ("**/kernel", "params/kernel", True),
    ("**/kernel", "kernel", True),
    ("a/**", "params/a/b/kernel", True),
    ("a/**", "params/ab/kernel", False),
    ("**/conv{1,3}/kernel", "params/s/conv3/kernel", True),
    ("**/conv{1,3}/kernel", "params/s/conv2/kernel", False),
    ("**/conv?/kernel", "params/s/conv2/kernel", True),
    ("params/a.b/kernel", "params/axb/kernel", False),  # a dot is a dot
    ("params/w#2", "params/w#2", True),
    ("params/w", "params/w#2", False),
]


@pytest.mark.parametrize("pattern,path,expected", CASES)
def test_glob(pattern, path, expected):
    assert trees.matches(pattern, path) is expected


def test_unmatched_glob_lists_near_matches():
    with pytest.raises(errors.NoMatchError, match=r'Did you mean "params/conv1"'):
        trees.select("params/conv_1", ["params/conv1", "params/x"])


def test_unclosed_brace_is_an_error():
    with pytest.raises(ValueError, match="unclosed"):
        trees.matches("a{b", "ab")


keys = st.text("abc_0", min_size=1, max_size=3)
nested = st.recursive(
    st.integers(), lambda t: st.dictionaries(keys, t, min_size=1, max_size=3)
).filter(lambda t: isinstance(t, dict))


@given(nested)
def test_flat_and_unflat_are_inverse(tree):
    assert trees.unflat(trees.flat(tree)) == tree
    assert all(trees.matches(path, path) for path in trees.paths(tree))


def test_replace_keeps_the_rest_and_refuses_unknown_paths():
    tree = {"a": jnp.zeros(2), "b": [1, 2]}
    new = trees.replace(tree, {"b/1": 5})
    assert new["b"] == [1, 5] and new["a"] is tree["a"]
    with pytest.raises(errors.NoMatchError, match="b/2"):
        trees.replace(tree, {"b/2": 5})
