"""Paths and globs over a tree of variables.

A path is the keys joined by "/": ``params/stage1/conv1/kernel``. A pattern is a glob
over it: ``*`` stays within one key, ``**`` crosses keys, ``{a,b}`` is either.
"""

import functools
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax

from compressjax.core import errors


def key_name(key: Any) -> str:
    """The text of one key of a JAX key path: dict key, attribute, index."""
    for field in ("key", "name", "idx"):
        if hasattr(key, field):
            return str(getattr(key, field))
    return str(key)


def join(keys: Iterable[Any]) -> str:
    """A JAX key path as one string.

    >>> [join(k) for k, _ in jax.tree_util.tree_leaves_with_path({"a": {"b": 1}})]
    ['a/b']
    """
    return "/".join(key_name(k) for k in keys)


def paths(tree: Any) -> tuple[str, ...]:
    """The path of every leaf, in the order of ``jax.tree.leaves``."""
    return tuple(join(k) for k, _ in jax.tree_util.tree_leaves_with_path(tree))


def flat(tree: Any) -> dict[str, Any]:
    """{path: leaf}.

    >>> flat({"params": {"w": 1, "b": 2}})
    {'params/b': 2, 'params/w': 1}
    """
    return {join(k): x for k, x in jax.tree_util.tree_leaves_with_path(tree)}


def map_with_path(fn: Callable[[str, Any], Any], tree: Any) -> Any:
    """``fn(path, leaf)`` at every leaf; the tree keeps its structure."""
    return jax.tree_util.tree_map_with_path(lambda k, x: fn(join(k), x), tree)


def replace(tree: Any, new: Mapping[str, Any]) -> Any:
    """The tree with the leaves at the given paths replaced; an unknown path raises.

    >>> replace({"a": 1, "b": 2}, {"b": 3})
    {'a': 1, 'b': 3}
    """
    known = paths(tree)
    for path in new:
        if path not in known:
            raise errors.no_match("variable", path, known)
    return map_with_path(lambda path, x: new.get(path, x), tree)


def unflat(leaves: Mapping[str, Any]) -> dict:
    """Nested dicts from {path: leaf}; the inverse of `flat` for trees of dicts.

    >>> unflat({"params/w": 1})
    {'params': {'w': 1}}
    """
    tree: dict = {}
    for path, leaf in leaves.items():
        *parents, last = path.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = leaf
    return tree


@functools.lru_cache(maxsize=4096)
def _compiled(pattern: str) -> re.Pattern:
    out, i, depth = "", 0, 0
    while i < len(pattern):
        c = pattern[i]
        if pattern.startswith("**/", i):
            out, i = out + "(?:.*/)?", i + 3
            continue
        if pattern.startswith("**", i):
            out, i = out + ".*", i + 2
            continue
        if c == "*":
            out += "[^/]*"
        elif c == "?":
            out += "[^/]"
        elif c == "{":
            out, depth = out + "(?:", depth + 1
        elif c == "}" and depth:
            out, depth = out + ")", depth - 1
        elif c == "," and depth:
            out += "|"
        else:
            out += re.escape(c)
        i += 1
    if depth:
        raise ValueError(f'unclosed "{{" in the pattern "{pattern}".')
    return re.compile(out)


def matches(pattern: str, path: str) -> bool:
    """True if the glob matches the whole path, or the path below its collection.

    ``stage1/**`` and ``params/stage1/**`` both match ``params/stage1/conv/kernel``.

    >>> matches("**/conv{1,2}/kernel", "params/stage1/conv2/kernel")
    True
    >>> matches("*/kernel", "params/a/b/kernel")
    False
    """
    regex = _compiled(pattern)
    if regex.fullmatch(path):
        return True
    _, slash, tail = path.partition("/")
    return bool(slash) and regex.fullmatch(tail) is not None


def select(
    pattern: str, names: Iterable[str], *, what: str = "variable"
) -> tuple[str, ...]:
    """The names that the glob matches, in their order.

    Raises:
      NoMatchError: if it matches nothing; the message lists near matches.
    """
    names = tuple(names)
    found = tuple(n for n in names if matches(pattern, n))
    if not found:
        raise errors.no_match(what, pattern, names)
    return found
