"""Imports go strictly down the table of rooms; rooms on one line are closed."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
HEIGHTS = [
    {"core"},
    {"merge", "layers", "losses", "costs"},
    {"quantize"},
    {"prune", "binary", "factor", "ood", "deploy", "models"},
    {"search", "reid", "optim"},
    {"_explain", "_receptive_field"},
    {"__init__"},
]
HEIGHT = {room: i for i, rooms in enumerate(HEIGHTS) for room in rooms}
FILES = sorted((ROOT / "compressjax").rglob("*.py"))


def room_of(path: pathlib.Path) -> str:
    return path.relative_to(ROOT / "compressjax").parts[0].removesuffix(".py")


def imported(path: pathlib.Path) -> set[str]:
    """Dotted names a file imports, with "from a import b" as "a.b"."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path):
    here = room_of(path)
    assert here in HEIGHT, f"{here} has no line in the table of rooms"
    for name in imported(path):
        parts = name.split(".")
        assert parts[0] not in ("train", "tests", "configs", "benchmarks"), name
        if parts[0] != "compressjax":
            continue
        there = parts[1] if parts[1] in HEIGHT else "__init__"
        assert there == here or HEIGHT[there] < HEIGHT[here], f"{here} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_jax_internals_stay_in_core(path):
    for name in imported(path):
        assert not name.startswith("jax._src"), name
        if name.startswith(("jax.core", "jax.extend")):
            assert room_of(path) == "core", name


def test_train_uses_public_names_only():
    for path in sorted((ROOT / "train").rglob("*.py")):
        for name in imported(path):
            parts = name.split(".")
            private = any(p.startswith("_") and not p.startswith("__") for p in parts)
            assert not (parts[0] == "compressjax" and private), f"{path}: {name}"


def test_a_room_has_no_pickle():
    for path in FILES:
        assert not {"pickle", "cloudpickle", "dill"} & {
            n.split(".")[0] for n in imported(path)
        }, path
